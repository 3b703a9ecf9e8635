"""Batches of examples, balanced over the labels."""

from __future__ import annotations

import random
from collections.abc import Sequence

from tasks.spec import Example


class Batches:
    """Endless epochs of shuffled batches; if `size` does not divide an epoch, all its batches are somewhat smaller.

    In each batch the right labels (or letters) have nearly the same shares as in all examples. This matters because
    small targets prefer one label: if 11 of 16 examples had that label, every prompt that makes the target say it would
    be rewarded.
    """

    def __init__(self, examples: Sequence[Example], size: int, rng: random.Random) -> None:
        self.examples, self.size, self.rng = examples, size, rng
        self.order: list[int] = []

    def next(self) -> list[Example]:
        """Returns the next batch."""
        if not self.order:
            self.order = self._epoch()
        left = -(-len(self.order) // self.size)  # batches of this epoch
        size = -(-len(self.order) // left)
        taken, self.order = self.order[:size], self.order[size:]
        return [self.examples[i] for i in taken]

    def _epoch(self) -> list[int]:
        """Returns the indices of all examples, shuffled, with the examples of each label evenly spaced."""
        shuffled = self.rng.sample(range(len(self.examples)), len(self.examples))
        of_label: dict[int | None, list[int]] = {}
        for i in shuffled:
            of_label.setdefault(self.examples[i].label, []).append(i)
        place: dict[int, float] = {}
        for members in of_label.values():
            offset = self.rng.random()
            place |= {i: (rank + offset) / len(members) for rank, i in enumerate(members)}
        return sorted(shuffled, key=lambda i: place[i])
