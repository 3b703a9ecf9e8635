"""APE with iterative paraphrase (Zhou et al. 2023): propose prompts, score them, and paraphrase the best."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from experiments.arms.arm import Question
from experiments.arms.untrained import BestOfN
from tasks.meta_prompt import paraphrase_prompt
from tasks.spec import Example

PROPOSING = 0.5  # share of the iterations that ask for new prompts, as best-of-N does
VARIATIONS = 2  # paraphrases of each of the best prompts, in an iteration


class Paraphrase(BestOfN):
    """In the second half of the run the untrained agent rewrites the best prompts so far."""

    def ask(self, batch: Sequence[Example], rng: random.Random) -> Question:
        """Asks for K new prompts; in the second half of the run, for K paraphrases of the K / 2 best prompts."""
        question = super().ask(batch, rng)
        count = self.run.config.prompts
        best = self.pool.best(max(1, count // VARIATIONS))
        if self.number <= PROPOSING * self.run.steps or not best:
            return question
        asked = [best[i % len(best)].prompt for i in range(count)]
        queries = [self.run.policy.query(*paraphrase_prompt(prompt)) for prompt in asked]
        return replace(question, queries=queries, copies=1)
