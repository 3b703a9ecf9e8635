"""The agent writes instructions for single inputs, in training and in use."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from appo.lm.model import ContextTooLongError
from appo.policy import Policy
from appo.rollout import Query
from experiments.run.run import Run
from tasks.errors import shown
from tasks.meta_prompt import rewrite_prompt
from tasks.spec import Example


@dataclass(frozen=True)
class Editor:
    """The agent and its rewriting meta-prompt, which has the same form in training and in use.

    Attributes:
        policy: the agent.
        examples: training examples, from which the pairs are drawn.
        pairs: how many pairs the meta-prompt shows.
        instruction: the manual prompt that the agent edits; "": the agent writes from scratch.
    """

    policy: Policy
    examples: Sequence[Example]
    pairs: int
    instruction: str = ""

    def query(self, text: str, rng: random.Random) -> Query:
        """Returns the meta-prompt for one input; its pairs are training examples with other inputs."""
        others = [example for example in self.examples if example.input != text]
        pairs = rng.sample(others, min(self.pairs, len(others)))
        return self.policy.query(*rewrite_prompt(pairs, text, self.instruction))

    def write(self, inputs: Sequence[str], seed: int = 0, generator: torch.Generator | None = None) -> list[str]:
        """Writes an instruction for each input: by greedy decoding, or sampled if there is a generator.

        Args:
            inputs: rendered inputs.
            seed: seed for drawing pairs; the pairs for an input do not depend on the other inputs.
            generator: random numbers for sampling, on the agent's device; None: greedy decoding.

        Raises:
            ContextTooLongError: an input is too long for the agent. Lengths are checked before the agent writes.
        """
        queries = [self.query(text, random.Random(seed)) for text in inputs]
        for text, query in zip(inputs, queries, strict=True):
            try:
                self.policy.check_fits(query)
            except ValueError as error:
                raise ContextTooLongError(f"the input {shown(text)}: {error}") from error
        return self.policy.decode(self.policy.sample(queries, generator, greedy=generator is None)) if queries else []


def editor_of(run: Run) -> Editor:
    """Returns the editor of a run, with the run's agent, training examples, number of pairs and instruction."""
    return Editor(run.policy, run.data.train, run.config.examples.pairs, run.instruction)
