"""Rows of different lengths as columns [R, T], 0 on padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unpack(values: Tensor, mask: Tensor) -> Tensor:
    """Puts the [n] values of real tokens at their places in [R, T]."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def stacked(steps: Sequence[tuple[Tensor, ...]], lengths: Tensor) -> list[Tensor]:
    """The steps of a decoding as columns [R, T].

    Args:
        steps: for each, which rows went on, [A], at which of their tokens, [A], and their entry in each column, [A].
        lengths: [R], tokens in each row.
    """
    found = [entries.new_zeros(len(lengths), int(lengths.max())) for entries in steps[0][2:]]
    for alive, token, *step in steps:
        for column, entries in zip(found, step, strict=True):
            column[alive, token] = entries
    return found
