"""The prompts of a run, best first."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class PoolEntry:
    """A prompt, its mean training reward and how often it was scored."""

    prompt: str
    reward: float
    count: int


class PromptPool:
    """All distinct prompts of a run with their mean training rewards; the best are scored again on validation.

    Batches differ, so a prompt that was scored several times counts with the mean of its rewards. Two kinds of prompts
    are left out: empty ones, and those whose reward is not finite.
    """

    def __init__(self) -> None:
        self._entries: dict[str, PoolEntry] = {}

    def add(self, prompts: Sequence[str], rewards: Sequence[float]) -> None:
        """Adds the prompts of one iteration."""
        for prompt, reward in zip(prompts, rewards, strict=True):
            if not prompt or not math.isfinite(reward):
                continue
            old = self._entries.get(prompt, PoolEntry(prompt, 0.0, 0))
            mean = (old.reward * old.count + reward) / (old.count + 1)
            self._entries[prompt] = PoolEntry(prompt, mean, old.count + 1)

    def state_dict(self) -> list[tuple[str, float, int]]:
        """Returns the entries, oldest first, for a checkpoint."""
        return [(entry.prompt, entry.reward, entry.count) for entry in self._entries.values()]

    def load_state_dict(self, state: Sequence[tuple[str, float, int]]) -> None:
        """Restores saved entries."""
        self._entries = {prompt: PoolEntry(prompt, reward, count) for prompt, reward, count in state}

    def best(self, size: int) -> list[PoolEntry]:
        """Returns the `size` best prompts, best first; in a tie the prompt scored more often, then the older, wins."""
        return sorted(self._entries.values(), key=lambda e: (-e.reward, -e.count))[:size]

    def leader(self) -> str:
        """Returns a line with the best prompt so far and its reward; "" while the pool is empty."""
        return "".join(f"best {entry.reward:.2f}  {entry.prompt}" for entry in self.best(1))
