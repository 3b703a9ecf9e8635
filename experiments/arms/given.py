"""Controls without a search: each scores one given prompt, without any iteration."""

from __future__ import annotations

from collections.abc import Sequence

from experiments.arms.fixed import Candidate
from experiments.arms.untrained import BestOfN
from experiments.run.run import few_shot_prompts

STEPWISE = "Let's think step by step."  # Kojima et al. 2022


class Given(BestOfN):
    """The result is the prompt that the arm names, whatever its score."""

    def candidates(self) -> list[Candidate]:
        """Returns the manual prompt and the arm's own prompt, if it is another."""
        manual = self.run.data.spec.manual_prompt
        own = {
            "manual": lambda: Candidate(manual, "manual"),
            "empty": lambda: Candidate("", "empty"),
            "few_shot": lambda: Candidate(few_shot_prompts(self.run.config, self.run.data)[0], "few-shot"),
            "step_by_step": lambda: Candidate(f"{manual} {STEPWISE}", "step-by-step"),
        }[self.run.config.arm]()
        return [Candidate(manual, "manual"), *([] if own.kind == "manual" else [own])]

    def choose(self, means: Sequence[float], rewards: Sequence[float]) -> int:
        """Returns the index of the arm's own prompt, the last candidate."""
        return len(means) - 1
