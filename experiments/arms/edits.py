"""Edits phrases of the manual prompt and keeps the edits that help: GrIPS (Prasad et al. 2023), without a parser."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.arms.arm import Question, Step
from experiments.arms.untrained import BestOfN
from experiments.run.run import Run, stream
from tasks.errors import TaskError

LONGEST = 4  # words of a phrase, at most
MOST_EDITS = 2  # edits of a candidate, at most


def phrases(text: str) -> list[str]:
    """Splits a text into phrases, which end at punctuation or after four words."""
    found: list[list[str]] = [[]]
    for word in text.split():
        found[-1].append(word)
        if len(found[-1]) == LONGEST or re.search(r"[.,;:!?]$", word):
            found.append([])
    return [" ".join(words) for words in found if words]


class PhraseEdits(BestOfN):
    """Every iteration scores the base prompt and K - 1 edits of it; the best of these K is the next base.

    An edit deletes a phrase, swaps two phrases, has the untrained agent paraphrase one, or adds a phrase that was
    deleted before. All K prompts are scored on the same batch, so the comparison is paired.

    Attributes:
        base: the prompt that is edited.
        deleted: phrases that were deleted, and may be added again.
        written: how many tokens the agent has written in this iteration.
    """

    def __init__(self, run: Run) -> None:
        super().__init__(run)
        self.base, self.deleted, self.written = run.data.spec.manual_prompt, list[str](), 0
        if not phrases(self.base):
            raise TaskError(f"{run.data.spec.name}: the manual prompt is empty; arm edits needs one to edit")
        self.streams["edits"] = stream(run.config.seed, "edits")

    def learn(self, question: Question) -> Step:
        """Scores the base and its edits; the best becomes the base. In a tie the base stays."""
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
        """Returns `count` edits of the base."""
        drafts = [self._draft() for _ in range(count)]
        open_places = [(parts, i) for parts, i in drafts if i is not None]
        said = self._paraphrased([parts[i] for parts, i in open_places])
        for (parts, i), phrase in zip(open_places, said, strict=True):
            parts[i] = phrase
        return [" ".join(parts) for parts, _ in drafts]

    def _draft(self) -> tuple[list[str], int | None]:
        """Makes one or two edits of the base; returns its phrases, and the index of the one to paraphrase, if any."""
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
        """Has the agent paraphrase phrases; one that is too long for it, or for which it writes nothing, stays."""
        queries = [self.variation(phrase) for phrase in asked]
        fitting = [query for query in queries if query is not None]
        if not fitting:
            return list(asked)
        rollout = self.run.policy.sample(fitting, self.generator)
        self.written += int(rollout.mask.sum())
        written = iter(self.run.policy.decode(rollout))
        return [(query and next(written)) or phrase for query, phrase in zip(queries, asked, strict=True)]

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of any arm, the base and the deleted phrases."""
        return super().state_dict() | {"base": self.base, "deleted": self.deleted}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a saved state."""
        super().load_state_dict(state)
        self.base, self.deleted = state["base"], list(state["deleted"])
