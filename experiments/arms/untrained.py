"""The controls: the same arms with an agent that never learns."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from appo.lm.model import ContextTooLongError
from appo.rollout import Query
from appo.trainer import Collected, Iteration
from experiments.arms.arm import Arm, Question, Step
from experiments.arms.editing import TestTimeEditing
from experiments.arms.fixed import FixedPrompt
from tasks.meta_prompt import paraphrase_prompt


class Untrained(Arm):
    """Samples and scores like the arm it is mixed into, but never updates the agent; has no optimizer and no anchor."""

    def prepare(self) -> None:
        """Gives all processes the weights of the first one."""
        self.run.policy.ranks.begin(self.run.policy.model, self.run.policy.value_head)

    def learn(self, question: Question) -> Step:
        """Scores what the agent writes."""
        policy = self.run.policy
        rollout = policy.sample(question.queries, self.generator, question.copies)
        prompts = policy.decode(rollout)
        rewarded = question.reward_fn(prompts)
        policy.ranks.check_same("rewards", rewarded.scores.tolist())
        cut_off = 1 - policy.ended(rollout).float().mean().item()
        collected = Collected(rollout, prompts, rewarded, cut_off, kl=0.0)  # to the agent itself
        return Step.of(Iteration(collected, collected.stats()))

    def reviewed(self, step: Step) -> Step:
        """Returns the step without a review, since the agent has not changed."""
        return step

    def learnt(self) -> dict[str, Any]:
        """Returns the state of the sampling; the agent's weights never change."""
        return {"generator": self.generator.get_state()}

    def go_on(self, learnt: Mapping[str, Any]) -> None:
        """Restores a saved state of the sampling."""
        if learnt["generator"].shape == self.generator.get_state().shape:  # else of another kind of device
            self.generator.set_state(learnt["generator"])


class BestOfN(FixedPrompt, Untrained):
    """Best-of-N sampling: all prompts come from the agent as it was loaded."""

    def variation(self, text: str) -> Query | None:
        """Returns the query for a paraphrase of a text; None if the text is too long for the agent's context."""
        query = self.run.policy.query(*paraphrase_prompt(text))
        try:
            self.run.policy.check_fits(query)
        except ContextTooLongError:
            return None
        return query


class UntrainedEditing(TestTimeEditing, Untrained):
    """Test-time editing by the agent as it was loaded."""
