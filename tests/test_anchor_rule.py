"""Simulated reviews show how often an agent that is no better replaces the anchor.

They compare the paper's rule, a test, and many prompts on few rows each.
"""

from __future__ import annotations

from collections import Counter
from itertools import product
from statistics import NormalDist

import numpy as np
import pytest

from appo.anchor import AnchorDecision, decide, luck
from appo.config import AnchorConfig
from experiments.config import ExamplesConfig

REVIEWS, PROMPTS, ROWS = 1000, 8, 48
MANY, EACH = 96, 4  # prompts, on rows of their own: as many answers as PROMPTS x ROWS
THRESHOLDS = (0.05, 0.1)  # of promotion and rollback, the paper's
SIGNIFICANCE = 0.04
BETWEEN, ASKED, MEAN, ALIKE = 0.09, 0.04, 0.6, 0.5


def review(
    rng: np.random.Generator, rows: int, lead: float, prompts: int = PROMPTS, each: int | None = None
) -> np.ndarray:
    """Scores of both sides' prompts, [2, prompts], each on all rows, or on `each` of them, the same for both sides.

    A prompt's accuracy varies around MEAN with its query (sd ASKED) and by itself (sd BETWEEN, as measured for an agent
    of 135 M parameters and a target of 0.5 B on sst2). Rows that are hard for one prompt are hard for others too.
    """
    query = rng.normal(0, ASKED, prompts)
    quality = MEAN + query + rng.normal(0, BETWEEN, (2, prompts)) + np.array([[lead], [0.0]])
    ease = np.vectorize(NormalDist().inv_cdf)(quality.clip(0.02, 0.98))
    row, own = rng.normal(0, 1, rows), rng.normal(0, 1, (2, prompts, rows))
    right = ease[:, :, None] + ALIKE**0.5 * row + (1 - ALIKE) ** 0.5 * own > 0
    if each:
        kept = rng.permutation(rows)[np.arange(prompts * each).reshape(prompts, each) % rows]
        right = np.take_along_axis(right, np.broadcast_to(kept, (2, *kept.shape)), axis=2)
    return right.mean(2)


def rates(rows: int, lead: float = 0.0) -> dict[str, tuple[float, float]]:
    """Returns each rule's share of promotions and of rollbacks."""
    rng, ended = np.random.default_rng(0), {"paper": [0, 0], "paired": [0, 0]}
    for _ in range(REVIEWS):
        agent, anchor = review(rng, rows, lead)
        decision = decide(agent.mean(), anchor.mean(), *THRESHOLDS)
        for i, wanted in enumerate((AnchorDecision.PROMOTE, AnchorDecision.ROLLBACK)):
            ended["paper"][i] += decision is wanted
            ended["paired"][i] += decision is wanted and luck((agent - anchor).tolist()) <= SIGNIFICANCE
    return {rule: (found[0] / REVIEWS, found[1] / REVIEWS) for rule, found in ended.items()}


@pytest.mark.parametrize(("rows", "expected"), [(32, 0.19), (48, 0.16)])
def test_an_agent_that_is_its_anchor_is_promoted_falsely(rows: int, expected: float) -> None:
    found = rates(rows)
    assert found["paper"][0] == pytest.approx(expected, abs=0.03)  # the rate that docs/arms.md states
    assert max(found["paired"]) <= 0.05


def decisions(
    lead: float, prompts: int, each: int | None, rows: int = ROWS, thresholds: tuple[float, float] = THRESHOLDS
) -> Counter[AnchorDecision]:
    """Returns how often the paper's rule makes each decision."""
    rng = np.random.default_rng(0)
    means = (review(rng, rows, lead, prompts, each).mean(1) for _ in range(REVIEWS))
    return Counter(decide(agent, anchor, *thresholds) for agent, anchor in means)


def test_many_prompts_on_few_rows_are_less_luck_and_more_power_for_as_many_answers() -> None:
    assert PROMPTS * ROWS == MANY * EACH
    equal = decisions(0.0, MANY, EACH)
    assert equal[AnchorDecision.PROMOTE] <= 0.05 * REVIEWS and equal[AnchorDecision.ROLLBACK] <= 0.01 * REVIEWS
    few, many = (decisions(0.1, *shape)[AnchorDecision.PROMOTE] / REVIEWS for shape in ((PROMPTS, None), (MANY, EACH)))
    assert few == pytest.approx(0.82, abs=0.03) and many == pytest.approx(0.95, abs=0.02)  # as docs/arms.md states


def test_the_default_review_makes_fewer_mistakes_than_few_prompts_on_all_rows() -> None:
    """On the 32 validation rows of a task with two labels; docs/arms.md states these rates."""
    default, few = (AnchorConfig().prompts, ExamplesConfig().review_rows), (PROMPTS, None)
    assert default[0] * (default[1] or 0) == PROMPTS * 32
    mistakes = [(0.0, THRESHOLDS, "promote", 0.19, 0.10), (0.0, THRESHOLDS, "rollback", 0.04, 0.01)]
    mistakes += [(0.05, (0.0, 0.0), "rollback", 0.17, 0.12), (0.1, (0.0, 0.0), "rollback", 0.04, 0.01)]  # above max_kl
    for lead, thresholds, decision, before, now in mistakes:
        for shape, rate in ((few, before), (default, now)):
            found = decisions(lead, *shape, 32, thresholds)[AnchorDecision(decision)] / REVIEWS
            assert found == pytest.approx(rate, abs=0.02), (lead, thresholds, decision, shape)


def test_an_agent_that_is_far_better_is_still_promoted() -> None:
    assert rates(48, lead=0.2)["paired"][0] > 0.85


def test_the_test_is_exact_up_to_its_random_signs() -> None:
    leads = [0.1, 0.25, -0.05, 0.3, 0.15, -0.1, 0.2, 0.05]
    sums = [sum(s * lead for s, lead in zip(signs, leads, strict=True)) for signs in product((1, -1), repeat=8)]
    exact = sum(total >= sum(leads) - 1e-9 for total in sums) / len(sums)
    assert luck(leads) == pytest.approx(exact, abs=0.01)
    assert luck([-lead for lead in leads]) == pytest.approx(exact, abs=0.01)
    assert luck([0.0] * 8) == 1.0 and luck([0.3]) == pytest.approx(0.5, abs=0.03)
