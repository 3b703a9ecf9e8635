"""Decoding with a cache that grows: the plain way, for every model on every device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from appo.lm import packed
from appo.lm.decoding.cache import join, new_cache, put, surviving_rows, trim
from appo.lm.packed import Output, common_prefix


class Growing:
    """Responses in decoding: their cache grows by a token a step, and rows leave when their response ends.

    Args:
        model: a causal LM.
        contexts: token ids, at least one each. Each is run once; a prefix that all share is run once for all.
        owner: which context each response is to.

    Attributes:
        cache: keys and values of all tokens but the last of each row; a row for each context, after `spread` for each
            response.
        owner: [R], the context of each response.
        mask: [R, L], False where the cache holds padding; follows the cache only if there is any (`padded`).
        ids, positions: [R, 1], each response's last token, which is run next.
        alive: [R], the indices of the responses that go on.
    """

    def __init__(self, model: PreTrainedModel, contexts: Sequence[Sequence[int]], owner: Sequence[int]) -> None:
        self.model, self.cache, self.contexts = model, new_cache(model), len(contexts)
        # A sliding window would count the padding between the shared prefix and the rest.
        sharing = packed.is_installed(model) and not any(self.cache.is_sliding)
        shared = common_prefix([context[:-1] for context in contexts]) if sharing else 0
        ids, mask = packed.pad_left([context[shared:] for context in contexts], model.device)  # all end in one column
        mask = torch.cat([mask.new_ones(len(contexts), shared), mask], dim=1)
        positions = packed.real_positions(mask)
        if shared:
            beginning = torch.tensor([list(contexts[0][:shared])], device=model.device)
            self._run(beginning, mask[:1, :shared], positions[:1, :shared])
            if len(contexts) > 1:
                self.cache.reorder_cache(torch.zeros(len(contexts), dtype=torch.long, device=model.device))
        if ids.shape[1] > 1:
            self._run(ids[:, :-1], mask[:, :-1], positions[:, shared:-1])
        rows = self.owner = torch.tensor(owner, device=model.device)
        self.alive = torch.arange(len(rows), device=model.device)
        self.mask, self.ids, self.positions = mask[rows, :-1], ids[rows, -1:], mask.sum(1)[rows].unsqueeze(1) - 1
        self.padded = not mask.all()  # without padding no mask is needed

    def spread(self) -> Growing:
        """Gives each response a copy of its context's keys and values; before the first step."""
        if self.owner.tolist() != list(range(self.contexts)):
            self.cache.reorder_cache(self.owner)
        return self

    def step(self) -> Output:
        """The model's output for the last token of each response that goes on, [R, *]."""
        if self.padded:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.ids), 1)], dim=1)
        return self._run(self.ids, self.mask if self.padded else None, self.positions)

    def feed(self, tokens: Tensor, going: Tensor) -> None:
        """The responses' next tokens [R], and which of them go on [R]; the others leave."""
        self.ids, self.positions = tokens.unsqueeze(1), self.positions + 1
        if not going.all():
            rows = surviving_rows(going)
            self.cache.reorder_cache(rows)
            self.alive, self.ids, self.positions = self.alive[rows], self.ids[rows], self.positions[rows]
            self.mask = self.mask[rows]

    def into(self, begun: Growing) -> Growing:
        """The responses as they stand, held by `begun`, from which they began: here they always were."""
        return begun

    def hold(
        self, layers: Iterable[tuple[Tensor, Tensor]], mask: Tensor, ids: Tensor, positions: Tensor, alive: Tensor
    ) -> Growing:
        """Takes over responses from another form; each layer has keys and values [R, kv, L, D]."""
        for layer, (keys, values) in zip(self.cache.layers, layers, strict=True):
            put(layer, keys, values)
        self.mask, self.ids, self.positions, self.alive = mask, ids, positions, alive
        return self._settle()

    def forget(self) -> None:
        """Frees keys and values, which another form has taken over."""
        for layer in self.cache.layers:
            put(layer, None, None)

    def join(self, others: Growing) -> Growing:
        """Lets others go on beside these, from their first step. What is shorter is padded on the left."""
        others.spread()
        masks = [self._whole_mask(), others._whole_mask()]
        spare = int(masks[0].long().argmax(1).min())  # those whose context was longest may have left
        if spare:
            trim(self.cache, spare)
            masks[0] = masks[0][:, spare:]
        join(self.cache, others.cache, len(others.ids))
        columns = max(mask.shape[1] for mask in masks)
        self.mask = torch.cat([F.pad(mask, (columns - mask.shape[1], 0)) for mask in masks])
        self.ids = torch.cat([self.ids, others.ids])
        self.positions = torch.cat([self.positions, others.positions])
        self.alive = torch.cat([self.alive, others.alive])
        return self._settle()

    def _whole_mask(self) -> Tensor:
        return self.mask if self.padded else self.mask.new_ones(len(self.ids), self.cache.get_seq_length())

    def _settle(self) -> Growing:
        """From now on every response has its own context."""
        self.contexts, self.padded = len(self.ids), not self.mask.all()
        self.owner = torch.arange(self.contexts, device=self.ids.device)
        return self

    def _run(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Output:
        return run(self.model, ids, None if mask is None else mask.long(), positions, self.cache)


def run(model: PreTrainedModel, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: DynamicCache) -> Output:
    """Adds the ids [R, S] to the cache; the model's output for the last of each row, [R, *]."""
    output = packed.call(
        model,
        input_ids=ids,
        attention_mask=mask,
        position_ids=positions,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    return Output(output.logits[:, 0], output.hidden[:, 0])
