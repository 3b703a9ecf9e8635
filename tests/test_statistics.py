"""Intervals and paired tests: against published tables and exact sums, and laws for any scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from experiments.run.statistics import (
    NO_VERDICT,
    coefficient_of_variation,
    compared,
    corrected,
    improvement_interval,
    interquartile_interval,
    interquartile_mean,
    interval,
    paired_interval,
    paired_p,
    probability_of_improvement,
    spread,
    wilson,
)

scores = st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"),
    [
        # Newcombe 1998 (Statistics in Medicine 17, 857), Table I, method 3: 81/263, 15/148, 0/20, 1/29.
        (81, 263, 0.2553, 0.3662),
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0000, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_equals_the_published_table(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 3000), st.floats(0, 1))
def test_wilson_equals_scipy(n: int, share: float) -> None:
    right = round(share * n)
    theirs = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert wilson(right, n) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_equals_scipy(only_one: int, only_other: int) -> None:
    one, other = [1.0] * only_one + [0.0] * only_other + [1.0], [0.0] * only_one + [1.0] * only_other + [1.0]
    theirs = stats.binomtest(only_one, only_one + only_other).pvalue if only_one + only_other else 1.0
    assert paired_p(one, other) == pytest.approx(theirs, rel=1e-9)


def test_scores_that_are_not_numbers_decide_nothing() -> None:
    unsound, sound = [math.nan, 1.0, 1.0, 1.0], [1.0, 0.0, 0.0, 0.0]
    assert math.isnan(paired_p(unsound, sound)) and math.isnan(spread([unsound, sound]).p)
    assert compared(unsound, sound) == NO_VERDICT


@pytest.mark.parametrize("kind", ["binary", "real"])
def test_the_interval_of_a_difference_is_near_scipys_bootstrap(kind: str) -> None:
    rng = np.random.default_rng(3)
    one, other = rng.beta(3, 2, 400), rng.beta(2, 2, 400)
    if kind == "binary":
        one, other = (one > 0.5).astype(float), (other > 0.5).astype(float)
    theirs = stats.bootstrap((one - other,), np.mean, n_resamples=20_000, method="percentile", rng=4)
    expected = (theirs.confidence_interval.low, theirs.confidence_interval.high)
    width = expected[1] - expected[0]
    assert paired_interval(one.tolist(), other.tolist()) == pytest.approx(expected, abs=0.06 * width)


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=30))
def test_the_interval_of_a_difference_turns_with_its_sides(pairs: list[tuple[float, float]]) -> None:
    one, other = [a for a, _ in pairs], [b for _, b in pairs]
    low, high = paired_interval(one, other)
    assert (-high, -low) == pytest.approx(paired_interval(other, one), abs=1e-9)
    assert low - 1e-9 <= np.mean(np.subtract(one, other)) + (high - low) and low <= high


@given(scores)
def test_an_interval_holds_the_mean_and_stays_between_0_and_1(values: list[float]) -> None:
    low, high = interval(values)
    assert -1e-9 <= low <= np.mean(values) + 1e-6 and np.mean(values) - 1e-6 <= high <= 1 + 1e-9


def test_the_interval_of_a_mean_is_near_the_normal_one_for_many_rows() -> None:
    values = np.random.default_rng(1).beta(2, 3, 2000)  # mean .4, deviation .2
    half = 1.96 * values.std() / math.sqrt(2000)
    assert interval(values.tolist()) == pytest.approx((values.mean() - half, values.mean() + half), abs=1e-3)


@pytest.mark.parametrize(
    ("only_one", "only_other", "expected"),
    [
        (0, 0, 1.0),
        (5, 5, 1.0),
        (10, 2, 2 * (1 + 12 + 66) / 4096),  # P(at most 2 of 12 heads), twice
        (1, 6, 2 * (1 + 7) / 128),
    ],
)
def test_mcnemar_is_the_binomial_test_of_the_rows_that_differ(only_one: int, only_other: int, expected: float) -> None:
    one = [1.0] * only_one + [0.0] * only_other + [1.0] * 7 + [0.0] * 3
    other = [0.0] * only_one + [1.0] * only_other + [1.0] * 7 + [0.0] * 3
    assert paired_p(one, other) == pytest.approx(expected, rel=1e-12)


def test_many_rows_are_drawn_in_portions_with_the_same_result() -> None:
    rows = np.random.default_rng(1).random(12_000)
    draws = np.random.default_rng(0).choice(rows, (2_000, len(rows))).mean(1)
    assert interval(rows.tolist()) == pytest.approx(np.quantile(draws, [0.025, 0.975]), abs=1e-12)
    signs = np.random.default_rng(0).choice([-1, 1], (2_000, len(rows)))
    shifted = rows - 0.497
    expected = (1 + (np.abs(signs @ shifted) >= abs(shifted.sum())).sum()) / 2_001
    assert paired_p(shifted.tolist(), [0.0] * len(rows)) == pytest.approx(expected, abs=1e-12)


def test_mcnemar_takes_tens_of_thousands_of_rows() -> None:
    one, other = [1.0] * 20_300 + [0.0] * 19_700, [0.0] * 20_300 + [1.0] * 19_700
    assert paired_p(one, other) == pytest.approx(stats.binomtest(19_700, 40_000).pvalue, rel=1e-6)


def test_the_permutation_test_equals_all_sign_flips() -> None:
    one, other = [0.9, 0.8, 0.35, 0.6, 0.75, 0.2], [0.5, 0.6, 0.4, 0.1, 0.7, 0.1]
    differences = np.subtract(one, other)
    flips = [
        abs(np.dot(differences, [1 if bits >> i & 1 else -1 for i in range(6)])) >= abs(differences.sum()) - 1e-9
        for bits in range(2**6)
    ]
    assert paired_p(one, other) == pytest.approx(np.mean(flips), abs=0.02)


@given(scores)
def test_the_same_scores_differ_with_p_1(values: list[float]) -> None:
    assert paired_p(values, values) == 1.0


def table(effect: float, seed: int = 0) -> list[list[float]]:
    """12 prompts on 32 rows of differing difficulty; half of the prompts are better by `effect`."""
    rng = np.random.default_rng(seed)
    difficulty = rng.uniform(0.2, 0.8, 32)
    better = np.repeat([effect, 0.0], 6)[:, None]
    return (rng.uniform(size=(12, 32)) < difficulty + better).astype(float).tolist()


def test_prompts_without_effect_are_called_noise_in_19_of_20_cases() -> None:
    assert sum(spread(table(0.0, seed)).p < 0.05 for seed in range(40)) <= 5  # 2 expected; 6 or more: 1.4 %


def test_prompts_that_differ_are_told_from_noise() -> None:
    seen = spread(table(0.3))
    assert seen.p < 0.01 and seen.between > 1.5 * seen.noise


def test_expected_noise_is_the_deviation_that_chance_gives() -> None:
    # On every row half of the 12 prompts are right: the mean of 32 rows has standard deviation sqrt(.25 / 32).
    rng = np.random.default_rng(0)
    rows = [rng.permutation([1.0] * 6 + [0.0] * 6) for _ in range(32)]
    assert spread(np.transpose(rows).tolist()).noise == pytest.approx(math.sqrt(0.25 / 32), rel=0.02)


@pytest.mark.parametrize(
    ("best", "manual", "words"),
    [
        ([1.0] * 40, [0.0] * 40, "better than the manual prompt"),
        ([0.0] * 40, [1.0] * 40, "worse than the manual prompt"),
        ([1.0, 0.0] * 20, [0.0, 1.0] * 20, "no difference"),
        ([1.0] * 21 + [0.0] * 19, [0.0] * 2 + [1.0] * 19 + [0.0] * 19, "no difference"),
    ],
)
def test_a_difference_is_called_one_only_where_rows_show_it(best: list[float], manual: list[float], words: str) -> None:
    assert compared(best, manual).startswith(words)


# -- over seeds ------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(0, 1, width=32), min_size=1, max_size=30))
def test_the_interquartile_mean_is_scipys_trimmed_mean(values: list[float]) -> None:
    assert interquartile_mean(values) == pytest.approx(float(stats.trim_mean(values, 0.25)), abs=1e-9)


def test_the_interval_of_the_interquartile_mean_is_near_scipys_bootstrap() -> None:
    values = np.random.default_rng(3).beta(3, 2, 25)
    expected = stats.bootstrap(
        (values,), lambda x, axis: stats.trim_mean(x, 0.25, axis=axis), n_resamples=9_000, method="percentile", rng=4
    ).confidence_interval
    width = expected.high - expected.low
    assert interquartile_interval([values.tolist()]) == pytest.approx((expected.low, expected.high), abs=0.06 * width)


def test_seeds_are_drawn_within_their_task() -> None:
    same = [[0.1] * 4, [0.9] * 4]  # no seed differs within its task, so nothing is uncertain
    assert interquartile_interval(same) == pytest.approx((0.5, 0.5))


@settings(max_examples=20)
@given(st.lists(st.integers(0, 5), min_size=1, max_size=9), st.lists(st.integers(0, 5), min_size=1, max_size=9))
def test_the_probability_of_improvement_is_mann_whitneys_u(one: list[float], other: list[float]) -> None:
    found = probability_of_improvement(one, other)
    assert found == pytest.approx(stats.mannwhitneyu(one, other).statistic / (len(one) * len(other)))
    assert probability_of_improvement(other, one) == pytest.approx(1 - found)
    low, high = improvement_interval(one, other)
    assert 0 <= low <= high <= 1


def test_the_probability_of_improvement_is_uncertain_as_scipys_bootstrap_says() -> None:
    rng = np.random.default_rng(0)
    one, other = rng.normal(0.5, 1, 12), rng.normal(0, 1, 10)
    resampled = stats.bootstrap(
        (one, other), probability_of_improvement, n_resamples=4_000, method="percentile", vectorized=False, rng=1
    )
    expected = resampled.confidence_interval
    assert improvement_interval(one.tolist(), other.tolist()) == pytest.approx((expected.low, expected.high), abs=0.03)


@given(st.lists(st.floats(0.125, 1, width=32), min_size=2, max_size=20))
def test_the_coefficient_of_variation_is_scipys(values: list[float]) -> None:
    assert coefficient_of_variation(values) == pytest.approx(float(stats.variation(values, ddof=1)), abs=1e-9)


def test_one_seed_has_no_variation() -> None:
    assert math.isnan(coefficient_of_variation([0.5])) and math.isnan(coefficient_of_variation([0.0, 0.0]))


def test_the_best_of_many_equal_prompts_is_worth_what_they_are() -> None:
    rng = np.random.default_rng(1)
    tables = rng.random((40, 16, 48)) < 0.5  # 40 times the best of 16 equal prompts on 48 rows
    flattered = float(np.mean([table.mean(1).max() for table in tables]))
    fair = float(np.mean([corrected(table.astype(float).tolist()) for table in tables]))
    assert flattered > 0.6
    assert fair == pytest.approx(0.5, abs=0.03)


def test_where_one_prompt_is_far_better_nothing_is_taken_off() -> None:
    rng = np.random.default_rng(2)
    table = np.vstack([rng.random(48) < 0.95, rng.random((7, 48)) < 0.2]).astype(float)
    assert corrected(table.tolist()) == pytest.approx(table.mean(1).max(), abs=0.01)
