"""Intervals of scores, and tests of whether prompts differ on the same rows. numpy only.

`values` are the scores of single rows, between 0 and 1: 0 or 1 where an answer is right or wrong, anything between for
a metric such as F1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

DRAWS = 2_000  # of a bootstrap or permutation; the standard error of p near 0.05 is about 0.005
Z = 1.959963984540054  # of a 95 % interval
LEVEL = 0.05  # a difference counts if its p-value is below this


class Interval(NamedTuple):
    """A 95 % interval."""

    low: float
    high: float


class Spread(NamedTuple):
    """How much the mean scores of K prompts differ, and how much they would by chance alone."""

    between: float  # standard deviation of the K means
    noise: float  # the same, expected where prompts have no effect
    p: float


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
    draws = np.random.default_rng(0).choice(rows, (DRAWS, len(rows))).mean(1)
    return Interval(*np.quantile(draws, [0.025, 0.975]).tolist())


def paired_p(one: Sequence[float], other: Sequence[float]) -> float:
    """Two-sided p-value that two prompts score the same, from their values on the same rows.

    McNemar's exact test where rows are right or wrong (a binomial test of the rows on which the two differ), else a
    permutation test that swaps the two prompts row by row.
    """
    differences = np.asarray(one) - np.asarray(other)
    differing = differences[differences != 0]
    n = len(differing)
    if n == 0:
        return 1.0
    if _binary(np.abs(differences)):
        fewer = min(int((differing > 0).sum()), int((differing < 0).sum()))
        return min(1.0, 2 * sum(math.comb(n, k) for k in range(fewer + 1)) / 2**n)
    signs = np.random.default_rng(0).choice([-1, 1], (DRAWS, n))
    swapped = np.abs(signs @ differing)
    return float((1 + (swapped >= abs(differing.sum()) - 1e-9).sum()) / (1 + DRAWS))


def paired_interval(one: Sequence[float], other: Sequence[float]) -> Interval:
    """The interval of the mean difference between two prompts on the same rows: a percentile bootstrap over rows."""
    differences = np.asarray(one) - np.asarray(other)
    draws = np.random.default_rng(0).choice(differences, (DRAWS, len(differences))).mean(1)
    return Interval(*np.quantile(draws, [0.025, 0.975]).tolist())


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
    return Spread(between, noise, float((1 + (shuffled >= between - 1e-9).sum()) / (1 + DRAWS)))


def compared(best: Sequence[float], manual: Sequence[float]) -> str:
    """The verdict on a prompt against the manual one, in words, from their values on the same test rows."""
    p = paired_p(best, manual)
    lead = float(np.mean(best) - np.mean(manual))
    low, high = paired_interval(best, manual)
    found = f"{lead:+.3f}, {low:+.3f} to {high:+.3f}, on {len(best)} test rows; p = {p:.2g}"
    if p >= LEVEL:
        return f"no difference to the manual prompt that these rows can show ({found})"
    return f"{'better' if lead > 0 else 'worse'} than the manual prompt ({found})"


def _binary(rows: np.ndarray) -> bool:
    return bool(np.isin(rows, (0.0, 1.0)).all())
