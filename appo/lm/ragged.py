"""Rows of different lengths as columns [R, T], 0 on padding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def unpack(values: Tensor, mask: Tensor) -> Tensor:
    """Puts the [n] values of real tokens at their places in [R, T]."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def stacked(steps: Sequence[tuple[Tensor, ...]], rows: int) -> list[Tensor]:
    """The steps of a decoding as columns [R, T].

    Args:
        steps: T of them: which rows went on, [A], and their entry in each column, [A].
        rows: R.
    """
    found = [values.new_zeros(rows, len(steps)) for values in steps[0][1:]]
    for t, (alive, *entries) in enumerate(steps):
        for column, entry in zip(found, entries, strict=True):
            column[alive, t] = entry
    return found
