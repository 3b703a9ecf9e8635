"""The final choice as a race: candidates that fall behind on the first blocks of rows are not scored on the rest."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor

BLOCKS = 7  # half of the rivals is dropped after each block, so they cost 2 / 7 of scoring all of them on all rows

Score = Callable[[Sequence[int], Sequence[int]], Mapping[str, Tensor]]


def race(score: Score, count: int, rows: int, metric: str, rng: random.Random) -> dict[str, Tensor]:
    """Scores candidates block by block, and drops the worse half after each block.

    This is sequential halving (Karnin et al. 2013). The remaining candidates have been scored on the same rows, so
    their comparison is paired. The first candidate is the manual prompt, with which the others are compared: it is
    never dropped.

    Args:
        score: maps candidates and rows, by their indices, to metrics by name, [candidates, rows] each.
        count: number of candidates, at least one.
        rows: number of rows.
        metric: the metric that decides who goes on.
        rng: shuffles the rows.

    Returns:
        Metrics by name, [count, rows] each; NaN where a candidate was not scored.
    """
    order = rng.sample(range(rows), rows)
    alive, found = list(range(count)), dict[str, Tensor]()
    for start, end in pairwise(rows * i // BLOCKS for i in range(BLOCKS + 1)):
        if start == end:
            continue
        for name, values in score(alive, order[start:end]).items():
            table = found.setdefault(name, torch.full((count, rows), math.nan))
            table[torch.tensor(alive)[:, None], torch.tensor(order[start:end])] = values.to(table)
        means = found[metric][:, order[:end]].mean(1).nan_to_num(-math.inf).tolist()
        rivals = sorted(alive[1:], key=lambda i: -means[i])
        if end < rows:
            alive = [0, *sorted(rivals[: max(1, len(rivals) // 2)])]
    return found
