"""Phrase edits of the manual prompt, kept where they help: GrIPS (Prasad et al. 2023), without a parser."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.arms.arm import Question, Step
from experiments.arms.untrained import BestOfN
from experiments.run.run import Run, stream
from tasks.meta_prompt import paraphrase_prompt

LONGEST = 4  # words of a phrase
MOST_EDITS = 2  # that make a candidate


def phrases(text: str) -> list[str]:
    """The phrases of a text: they end at punctuation, and after four words at the latest."""
    found: list[list[str]] = [[]]
    for word in text.split():
        found[-1].append(word)
        if len(found[-1]) == LONGEST or re.search(r"[.,;:!?]$", word):
            found.append([])
    return [" ".join(words) for words in found if words]


class PhraseEdits(BestOfN):
    """Every iteration scores the best prompt so far beside K - 1 edits of it; the best of them is edited next.

    An edit deletes a phrase, swaps two, has the untrained agent paraphrase one, or adds one that was deleted before.
    All K are scored on the same batch, so the comparison is paired.

    Attributes:
        base: the prompt that is edited.
        deleted: phrases that may come back.
        written: tokens of the agent in this iteration.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.base, self.deleted, self.written = run.data.spec.manual_prompt, list[str](), 0
        self.streams["edits"] = stream(run.config.seed, "edits")

    def learn(self, question: Question) -> Step:
        """Scores the base and its edits; the best is the next base, the old one in a tie."""
        prompts = [self.base, *self._edits(self.run.config.prompts - 1)]
        rewarded = question.reward_fn(prompts)
        scores = rewarded.scores.nan_to_num(-math.inf).tolist()
        self.base = prompts[max(range(len(prompts)), key=lambda i: (scores[i], -i))]
        self.pool.add(prompts, rewarded.scores.tolist())
        stats = {
            "reward_mean": rewarded.scores.mean().item(),
            "reward_max": rewarded.scores.max().item(),
            **{f"{name}_mean": values.float().mean().item() for name, values in rewarded.metrics.items()},
            "empty_rate": prompts.count("") / len(prompts),
            "duplicate_rate": 1 - len(set(prompts)) / len(prompts),
        }
        tokens, self.written = self.written, 0
        return Step(prompts, rewarded, stats, tokens)

    def _edits(self, count: int) -> list[str]:
        """`count` edits of the base."""
        drafts = [self._draft() for _ in range(count)]
        open_places = [(parts, i) for parts, i in drafts if i is not None]
        said = self._paraphrased([parts[i] for parts, i in open_places])
        for (parts, i), phrase in zip(open_places, said, strict=True):
            parts[i] = phrase
        return [" ".join(parts) for parts, _ in drafts]

    def _draft(self) -> tuple[list[str], int | None]:
        """The base after one or two edits: its phrases, and the index of the one that is still to be paraphrased."""
        rng, parts = self.streams["edits"], phrases(self.base)
        for _ in range(rng.randint(1, MOST_EDITS)):
            kind = rng.choice(["delete", "swap", "paraphrase", "add"])
            if kind == "delete" and len(parts) > 1:
                self.deleted.append(parts.pop(rng.randrange(len(parts))))
            elif kind == "swap" and len(parts) > 1:
                i, j = rng.sample(range(len(parts)), 2)
                parts[i], parts[j] = parts[j], parts[i]
            elif kind == "add" and self.deleted:
                parts.insert(rng.randint(0, len(parts)), rng.choice(self.deleted))
            else:
                return parts, rng.randrange(len(parts))
        return parts, None

    def _paraphrased(self, asked: Sequence[str]) -> list[str]:
        """The agent's variations of phrases; the phrase itself where it writes nothing."""
        if not asked:
            return []
        policy = self.run.policy
        rollout = policy.sample([policy.query(*paraphrase_prompt(phrase)) for phrase in asked], self.generator)
        self.written += int(rollout.mask.sum())
        return [new or old for new, old in zip(policy.decode(rollout), asked, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """As any arm's, with the base and the phrases that may come back."""
        return super().state_dict() | {"base": self.base, "deleted": self.deleted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a saved state."""
        super().load_state_dict(state)
        self.base, self.deleted = state["base"], list(state["deleted"])
