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
    """All distinct prompts of a run with their mean training reward; the best are scored again on validation.

    Batches differ, so a prompt that was scored several times is judged by the mean of its rewards. Empty prompts,
    which instruct nothing, and prompts with a reward that is not finite are left out.
    """

    def __init__(self) -> None:
        self._entries: dict[str, PoolEntry] = {}

    def add(self, prompts: Sequence[str], rewards: Sequence[float]) -> None:
        """Takes in the prompts of one iteration."""
        for prompt, reward in zip(prompts, rewards, strict=True):
            if not prompt or not math.isfinite(reward):
                continue
            old = self._entries.get(prompt, PoolEntry(prompt, 0.0, 0))
            mean = (old.reward * old.count + reward) / (old.count + 1)
            self._entries[prompt] = PoolEntry(prompt, mean, old.count + 1)

    def state_dict(self) -> list[tuple[str, float, int]]:
        """The entries, oldest first."""
        return [(entry.prompt, entry.reward, entry.count) for entry in self._entries.values()]

    def load_state_dict(self, state: Sequence[tuple[str, float, int]]) -> None:
        """Takes over saved entries."""
        self._entries = {prompt: PoolEntry(prompt, reward, count) for prompt, reward, count in state}

    def best(self, size: int) -> list[PoolEntry]:
        """The `size` best distinct prompts, best first; ties go to the more often scored, then to the older."""
        return sorted(self._entries.values(), key=lambda e: (-e.reward, -e.count))[:size]

    def leader(self) -> str:
        """The best prompt so far and its reward, in a line; "" while there is none."""
        return "".join(f"best {entry.reward:.2f}  {entry.prompt}" for entry in self.best(1))
