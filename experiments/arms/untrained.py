"""The controls: the same arms with an agent that never learns."""

from __future__ import annotations

from appo.trainer import Iteration
from experiments.arms.arm import Arm, Question, Step
from experiments.arms.editing import TestTimeEditing
from experiments.arms.fixed import FixedPrompt


class Untrained(Arm):
    """Samples and scores as its arm does, but never updates the agent."""

    def learn(self, question: Question) -> Step:
        """Collects rollouts and discards them."""
        collected = self.trainer.collect(question.queries, question.reward_fn, question.copies)
        self.trainer.buffer.clear()
        return Step.of(Iteration(collected, collected.stats()))

    def reviewed(self, step: Step) -> Step:
        """No review: the agent has not changed."""
        return step


class BestOfN(FixedPrompt, Untrained):
    """Best-of-N sampling: all prompts come from the agent as it was loaded."""


class UntrainedEditing(TestTimeEditing, Untrained):
    """Test-time editing by the agent as it was loaded."""
