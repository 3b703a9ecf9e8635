"""APE with iterative paraphrase (Zhou et al. 2023): propose prompts, score them, and paraphrase the best."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from experiments.arms.arm import Question
from experiments.arms.untrained import BestOfN
from tasks.spec import Example

PROPOSING = 0.5  # share of the iterations that ask for new prompts, as best-of-N does
VARIATIONS = 2  # paraphrases of each of the best prompts, in an iteration


class Paraphrase(BestOfN):
    """In the second half of the run the untrained agent rewrites the best prompts so far."""

    def ask(self, batch: Sequence[Example], rng: random.Random) -> Question:
        """Asks for K new prompts; in the second half of the run, for K paraphrases of the K / 2 best prompts.

        A prompt that is too long for the agent's context is not paraphrased.
        """
        question = super().ask(batch, rng)
        count = self.run.config.prompts
        if self.number <= PROPOSING * self.run.steps:
            return question
        best = self.pool.best(max(1, count // VARIATIONS))
        queries = [query for entry in best if (query := self.variation(entry.prompt)) is not None]
        if not queries:
            return question
        return replace(question, queries=[queries[i % len(queries)] for i in range(count)], copies=1)
