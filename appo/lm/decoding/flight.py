"""Responses in flight: as some end, others that wait begin beside them.

A step takes nearly as long for two responses as for ten: reading the weights, and Python, take most of it. Without this
a batch would go on until the last of its responses has ended, with few of them for most of the time.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from appo.lm.decoding.cache import can_join
from appo.lm.decoding.direct import Direct
from appo.lm.decoding.growing import Growing
from appo.lm.decoding.recorded import Fixed, Recordings
from appo.lm.head import only_rows


class Flight:
    """Decodes responses to contexts, as many at a time as there is room for.

    Args:
        model: a causal LM.
        recordings: the model's.
        contexts: token ids, at least one each.
        owner: [R], which context each response is to, in order.
        budget: most tokens in a response.
        room: most tokens of contexts and responses at a time, padding included; None: no limit. A single response may
            have more.
        kind: what else a recording depends on.

    Attributes:
        responses: those that go on, after `board`.
    """

    responses: Growing | Fixed | Direct

    def __init__(
        self,
        model: PreTrainedModel,
        recordings: Recordings,
        contexts: Sequence[Sequence[int]],
        owner: Sequence[int],
        budget: int,
        room: int | None = None,
        kind: Hashable = None,
    ) -> None:
        self.model, self.recordings, self.kind = model, recordings, kind
        self.contexts, self.owner, self.budget, self.room = contexts, owner, budget, room
        self.widths = [len(contexts[m]) + budget for m in owner]
        self.begun: Growing | None = None  # the responses when the last ones joined; None: nobody goes on
        self.boarded = 0
        self.width = 0  # tokens in each row of the cache, and the budget of a response that begins beside them
        self.left = torch.full((len(owner),), budget, device=model.device)  # tokens that each response may still take

    def board(self) -> bool:
        """Lets waiting responses begin, if there is room; whether any response goes on.

        They join those in flight only if they are as many, or the last ones.
        """
        waiting = self.widths[self.boarded :]
        going = len(self.responses.alive) if self.begun else 0
        count = fitting(waiting, going, self.width, self.room)
        wanted = count >= max(going, 1) or count == len(waiting) > 0
        if wanted and (self.begun is None or can_join(self.begun.cache)):
            self._begin(count)
            self.width = max(self.width, *waiting[:count])
        return self.begun is not None

    def feed(self, tokens: Tensor, going: Tensor) -> None:
        """The responses' next tokens [R], and which go on [R] unless their budget is spent; the others leave."""
        alive = self.responses.alive
        self.left[alive] -= 1
        going = going & (self.left[alive] > 0)
        if going.any():
            self.responses.feed(tokens, going)
            self.width += 1
        else:
            self.begun, self.width = None, 0

    def _begin(self, count: int) -> None:
        owner = self.owner[self.boarded : self.boarded + count]
        contexts = self.contexts[owner[0] : owner[-1] + 1]
        with only_rows(self.model, [0]):  # nobody reads the logits of the contexts: one column is enough
            new = Growing(self.model, contexts, [m - owner[0] for m in owner])
        new.alive += self.boarded
        self.boarded += count
        self.begun = self.responses.into(self.begun).join(new) if self.begun else new
        self.responses = self.recordings.take_over(self.begun, self.budget, self.kind)


def fitting(widths: Sequence[int], going: int, width: int, room: int | None) -> int:
    """How many responses of such widths [W], in tokens, fit beside `going` others of the same `width`.

    All take as much room as the widest. If nobody goes on, the first one fits in any case.
    """
    if room is None:
        return len(widths)
    for count, new in enumerate(widths):
        width = max(width, new)
        if (going + count + 1) * width > room and going + count > 0:
            return count
    return len(widths)


def stacked(steps: Sequence[tuple[Tensor, ...]], lengths: Tensor) -> list[Tensor]:
    """The steps of a decoding as columns [R, T].

    Args:
        steps: for each, which rows went on, [A], at which of their tokens, [A], and their entry in each column, [A].
        lengths: [R], tokens in each row.
    """
    found = [entries.new_zeros(len(lengths), int(lengths.max())) for entries in steps[0][2:]]
    for alive, token, *step in steps:
        for column, entries in zip(found, step, strict=True):
            column[alive, token] = entries
    return found
