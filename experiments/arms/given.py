"""Prompts that need no search: the controls that cost nothing. They make no iterations and are only scored."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.arms.fixed import Candidate
from experiments.arms.untrained import BestOfN

STEPWISE = "Let's think step by step."  # Kojima et al. 2022


class Given(BestOfN):
    """The prompt that the arm names is the result, whatever its score."""

    def candidates(self) -> list[Candidate]:
        """The manual prompt and the arm's own."""
        manual = self.run.data.spec.manual_prompt
        own = {
            "manual": lambda: Candidate(manual, "manual"),
            "empty": lambda: Candidate("", "empty"),
            "few_shot": lambda: Candidate(self._few_shot_prompts(1)[0], "few-shot"),
            "step_by_step": lambda: Candidate(f"{manual} {STEPWISE}", "step-by-step"),
        }[self.run.config.arm]()
        return [Candidate(manual, "manual"), *([] if own.kind == "manual" else [own])]

    def choose(self, means: Sequence[float], rewards: Sequence[float]) -> int:
        """The last one, which is the arm's own."""
        return len(means) - 1
