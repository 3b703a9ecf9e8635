"""Intervals of scores, and tests of whether prompts differ on the same rows. numpy only.

`values` are the scores of single rows, between 0 and 1: 0 or 1 where an answer is right or wrong, anything between for
a metric such as F1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

DRAWS = 2_000  # of a bootstrap or permutation; the standard error of p near 0.05 is about 0.005
Z = 1.959963984540054  # of a 95 % interval
NO_VERDICT = "no verdict: some scores are not numbers"
LEVEL = 0.05  # a difference counts if its p-value is below this


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


class Spread(NamedTuple):
    """How much the mean scores of K prompts differ, and how much they would by chance alone."""

    between: float  # standard deviation of the K means
    noise: float  # the same, expected where prompts have no effect
    p: float  # NaN where a value is NaN


def wilson(right: int, n: int) -> Interval:
    """Wilson's score interval for `right` of `n` (Wilson 1927)."""
    share, tail = right / n, Z * Z / n
    centre = share + tail / 2
    half = Z * math.sqrt(share * (1 - share) / n + tail / (4 * n))
    return Interval(max(0.0, (centre - half) / (1 + tail)), min(1.0, (centre + half) / (1 + tail)))


def interval(values: Sequence[float]) -> Interval:
    """The interval of the mean: Wilson's where rows are right or wrong, else a percentile bootstrap over rows."""
    rows = np.asarray(values)
    if _binary(rows):
        return wilson(int(rows.sum()), len(rows))
    return _bootstrap(rows)


def paired_p(one: Sequence[float], other: Sequence[float]) -> float:
    """Two-sided p-value that two prompts score the same, from their values on the same rows.

    McNemar's exact test where rows are right or wrong (a binomial test of the rows on which the two differ), else a
    permutation test that swaps the two prompts row by row. NaN where a value is NaN.
    """
    differences = np.asarray(one) - np.asarray(other)
    if np.isnan(differences).any():
        return math.nan
    differing = differences[differences != 0]
    n = len(differing)
    if n == 0:
        return 1.0
    if _binary(np.abs(differences)):
        fewer = min(int((differing > 0).sum()), int((differing < 0).sum()))
        terms = accumulate(range(1, fewer + 1), lambda term, k: term * (n - k + 1) // k, initial=1)  # n over k
        return min(1.0, 2 * sum(terms) / 2**n)
    rng = np.random.default_rng(0)
    swapped = np.abs(np.concatenate([rng.choice([-1, 1], (few, n)) @ differing for few in _portions(n)]))
    return float((1 + (swapped >= abs(differing.sum()) - 1e-9).sum()) / (1 + DRAWS))


def paired_interval(one: Sequence[float], other: Sequence[float]) -> Interval:
    """The interval of the mean difference between two prompts on the same rows: a percentile bootstrap over rows."""
    return _bootstrap(np.asarray(one) - np.asarray(other))


def _bootstrap(rows: npt.NDArray[Any]) -> Interval:
    """The percentile bootstrap of the mean, over rows."""
    rng = np.random.default_rng(0)
    draws = np.concatenate([rng.choice(rows, (few, len(rows))).mean(1) for few in _portions(len(rows))])
    return Interval(*np.quantile(draws, [0.025, 0.975]).tolist())


def _portions(n: int) -> list[int]:
    """DRAWS, divided so that so many samples of n rows take some 200 MB: all of 40,000 rows would take 1.2 GB."""
    most = max(1, 10**7 // n)
    return [min(most, DRAWS - begun) for begun in range(0, DRAWS, most)]


def spread(table: Sequence[Sequence[float]]) -> Spread:
    """What K prompts on the same N rows show: do they differ by more than chance?

    A permutation test: where prompts have no effect, all orders of the K values of a row are equally likely.

    Args:
        table: [K][N] values.
    """
    values = np.asarray(table)
    between = float(values.mean(1).std())
    rng = np.random.default_rng(0)
    shuffled = np.array([rng.permuted(values, axis=0).mean(1).std() for _ in range(DRAWS)])
    noise = float(np.sqrt(np.square(shuffled).mean()))
    p = float((1 + (shuffled >= between - 1e-9).sum()) / (1 + DRAWS))
    return Spread(between, noise, math.nan if math.isnan(between) else p)


def interquartile_mean(values: Sequence[float]) -> float:
    """The mean without the lowest and the highest quarter: steadier than the mean, less wasteful than the median."""
    rows = np.sort(np.asarray(values, dtype=float))
    cut = len(rows) // 4
    return float(rows[cut : len(rows) - cut].mean())


def interquartile_interval(strata: Sequence[Sequence[float]]) -> Interval:
    """The interval of the interquartile mean of all scores: a percentile bootstrap over seeds.

    Args:
        strata: the scores of the seeds of each task; seeds are drawn within their task (Agarwal et al. 2021).
    """
    rng = np.random.default_rng(0)
    drawn = np.concatenate([rng.choice(np.asarray(scores), (DRAWS, len(scores))) for scores in strata], axis=1)
    drawn.sort(axis=1)
    cut = drawn.shape[1] // 4
    return Interval(*np.quantile(drawn[:, cut : drawn.shape[1] - cut].mean(1), [0.025, 0.975]).tolist())


def probability_of_improvement(one: Sequence[float], other: Sequence[float]) -> float:
    """How likely a seed of `one` scores above a seed of `other`; a tie counts half (Mann-Whitney's U over n m)."""
    differences = np.asarray(one)[:, None] - np.asarray(other)
    return float((np.sign(differences).mean() + 1) / 2)


def improvement_interval(one: Sequence[float], other: Sequence[float]) -> Interval:
    """The interval of `probability_of_improvement`: a percentile bootstrap over the seeds of both sides."""
    rng = np.random.default_rng(0)
    above = (np.sign(np.asarray(one)[:, None] - np.asarray(other)) + 1) / 2
    rows, columns = rng.integers(0, len(one), (DRAWS, len(one))), rng.integers(0, len(other), (DRAWS, len(other)))
    drawn = above[rows[:, :, None], columns[:, None, :]].mean((1, 2))
    return Interval(*np.quantile(drawn, [0.025, 0.975]).tolist())


def coefficient_of_variation(values: Sequence[float]) -> float:
    """The standard deviation over the mean; NaN for fewer than two values or a mean of 0."""
    rows = np.asarray(values, dtype=float)
    return float(rows.std(ddof=1) / rows.mean()) if len(rows) > 1 and rows.mean() else math.nan


def corrected(table: Sequence[Sequence[float]]) -> float:
    """What the best of a shortlist is worth, without the winner's curse.

    The highest of K mean scores is flattered by the luck that made it the highest. So the rows are split at random,
    many times: one half selects a prompt, the other half scores it; the mean of those scores is unbiased for what
    selecting on half of the rows yields, and so a little too low for selecting on all of them.

    Args:
        table: [K][N] values of K prompts on the same N rows, N at least 2.
    """
    values = np.asarray(table, dtype=float)
    n = values.shape[1]
    half = np.random.default_rng(0).permuted(np.tile(np.arange(n) < n // 2, (DRAWS, 1)), axis=1).astype(float)
    chosen = (values @ half.T).argmax(0)  # [DRAWS]
    scored = values @ (1 - half).T / (n - n // 2)  # [K, DRAWS]
    return float(scored[chosen, np.arange(DRAWS)].mean())


def compared(best: Sequence[float], manual: Sequence[float]) -> str:
    """The verdict on a prompt against the manual one, in words, from their values on the same test rows."""
    p = paired_p(best, manual)
    if math.isnan(p):
        return NO_VERDICT
    lead = float(np.mean(best) - np.mean(manual))
    low, high = paired_interval(best, manual)
    found = f"{lead:+.3f}, {low:+.3f} to {high:+.3f}, on {len(best)} test rows; p = {p:.2g}"
    if p >= LEVEL:
        return f"no difference to the manual prompt that these rows can show ({found})"
    return f"{'better' if lead > 0 else 'worse'} than the manual prompt ({found})"


def _binary(rows: np.ndarray) -> bool:
    return bool(np.isin(rows, (0.0, 1.0)).all())
