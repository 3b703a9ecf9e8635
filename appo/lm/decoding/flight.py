"""Responses in flight: as some end, others that wait begin beside them.

A step takes nearly as long for two responses as for ten: reading the weights, and Python, take most of it. Without this
a batch would go on until the last of its responses has ended, with few of them for most of the time.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from appo.lm.decoding.cache import can_join
from appo.lm.decoding.direct import Direct
from appo.lm.decoding.growing import Growing
from appo.lm.decoding.recorded import Fixed, Recordings
from appo.lm.head import only_rows


@dataclass(frozen=True)
class Waiting:
    """Responses to contexts, in the order in which they begin.

    Attributes:
        contexts: token ids, at least one each.
        owner: [R], which context each response is to, in order.
        budget: most tokens in a response.
        room: most tokens of contexts and responses at a time, padding included; None: no limit. A single response may
            have more.
        at_once: most responses at a time; None: no limit.
        joining: whether responses may begin beside others; else they wait until all in flight have ended.
    """

    contexts: Sequence[Sequence[int]]
    owner: Sequence[int]
    budget: int
    room: int | None = None
    at_once: int | None = None
    joining: bool = True

    def width(self, response: int) -> int:
        """The most tokens that a response has with its context."""
        return len(self.contexts[self.owner[response]]) + self.budget

    def fitting(self, first: int, going: int, width: int) -> int:
        """How many responses, from `first` on, fit beside `going` others of the same `width` in tokens.

        All take as much room as the widest. If nobody goes on, the first one fits in any case.
        """
        most = len(self.owner) if self.at_once is None else first + self.at_once - going
        end = min(len(self.owner), most)
        for response in range(first, end):
            width, count = max(width, self.width(response)), response - first
            if self.room is not None and (going + count + 1) * width > self.room and going + count > 0:
                return count
        return max(0, end - first)


class Flight:
    """Decodes responses, as many at a time as there is room for.

    Args:
        model: a causal LM.
        recordings: the model's.
        waiting: what is to be decoded.
        kind: what else a recording depends on.

    Attributes:
        responses: those that go on, after `board`.
    """

    responses: Growing | Fixed | Direct

    def __init__(self, model: PreTrainedModel, recordings: Recordings, waiting: Waiting, kind: Hashable = None) -> None:
        self.model, self.recordings, self.waiting, self.kind = model, recordings, waiting, kind
        self.begun: Growing | None = None  # the responses when the last ones joined; None: nobody goes on
        self.boarded = 0
        self.written = torch.zeros(len(waiting.owner), dtype=torch.long, device=model.device)  # tokens of each response
        self.read = torch.tensor([len(waiting.contexts[m]) for m in waiting.owner], device=model.device)

    def board(self) -> bool:
        """Lets waiting responses begin, if there is room; whether any response goes on.

        They join those in flight only if they are at least as many, or the last ones.
        """
        left = len(self.waiting.owner) - self.boarded
        if left and (self.begun is None or (self.waiting.joining and can_join(self.begun.cache))):
            going, width = 0, 0
            if self.begun:
                alive = self.responses.alive
                going, width = len(alive), int((self.read + self.written)[alive].max()) + self.waiting.budget
            count = self.waiting.fitting(self.boarded, going, width)
            if count >= max(going, 1) or count == left:
                self._begin(count)
        return self.begun is not None

    def feed(self, tokens: Tensor, going: Tensor) -> None:
        """The responses' next tokens [R], and which go on [R] unless their budget is spent; the others leave."""
        alive = self.responses.alive
        self.written[alive] += 1
        going = going & (self.written[alive] < self.waiting.budget)
        if going.any():
            self.responses.feed(tokens, going)
        else:
            self.begun = None
            del self.responses  # and the keys and values that it holds

    def _begin(self, count: int) -> None:
        owner = self.waiting.owner[self.boarded : self.boarded + count]
        contexts = self.waiting.contexts[owner[0] : owner[-1] + 1]
        with only_rows(self.model, [0]):  # nobody reads the logits of the contexts: one column is enough
            new = Growing(self.model, contexts, [m - owner[0] for m in owner])
        new.alive += self.boarded
        self.boarded += count
        self.begun = self.responses.into(self.begun).join(new) if self.begun else new
        self.responses = self.recordings.take_over(self.begun, self.waiting.budget, self.kind)
        if self.responses is not self.begun:
            self.begun.forget()


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
