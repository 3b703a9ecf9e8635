"""Trains on several continuations of one prefix at a time: packed rows with a block mask, and the training loop."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import LlamaForCausalLM


class Packed(NamedTuple):
    """Rows of a prefix and its continuations: ids [R, L], block mask [R, 1, L, L], positions, next tokens [R, L].

    `targets` is -100 at positions that predict no token of a continuation. `part` numbers the continuations from 1; it
    is 0 on the prefix and -1 on padding. `answers` marks positions whose next token belongs to an answer.
    """

    ids: Tensor
    mask: Tensor
    positions: Tensor
    targets: Tensor
    part: Tensor
    answers: Tensor


def pack(
    prefixes: Sequence[Sequence[int]],
    continuations: Sequence[Sequence[Sequence[int]]],
    answers: Sequence[Sequence[int]] | None = None,
) -> Packed:
    """Puts each prefix and all its continuations into one row.

    Every continuation begins with the last token of the prefix, from which its first token is predicted.

    Args:
        prefixes: token ids of R prefixes.
        continuations: for each prefix, the token ids of its continuations.
        answers: for each continuation, how many tokens at its end are the answer; None: all tokens.
    """
    rows = len(prefixes)
    width = max(len(p) - 1 + sum(map(len, parts)) for p, parts in zip(prefixes, continuations, strict=True))
    ids, positions = (torch.zeros((rows, width), dtype=torch.long) for _ in range(2))
    part, targets = (torch.full((rows, width), fill) for fill in (-1, -100))
    answered = torch.zeros((rows, width), dtype=torch.bool)
    for r, (prefix, parts) in enumerate(zip(prefixes, continuations, strict=True)):
        shared = len(prefix) - 1
        ids[r, :shared], part[r, :shared] = torch.tensor(prefix[:-1]), 0
        positions[r, :shared] = torch.arange(shared)
        start = shared
        for s, tokens in enumerate(parts, 1):
            stop = start + len(tokens)
            ids[r, start:stop], part[r, start:stop] = torch.tensor([prefix[-1], *tokens[:-1]]), s
            targets[r, start:stop] = torch.tensor(tokens)
            positions[r, start:stop] = torch.arange(shared, shared + len(tokens))
            answered[r, stop - (answers[r][s - 1] if answers else len(tokens)) : stop] = True
            start = stop
    same = part.unsqueeze(2) == part.unsqueeze(1)
    visible = (same | (part == 0).unsqueeze(1)) & torch.ones(width, width, dtype=torch.bool).tril()
    return Packed(ids, visible.unsqueeze(1), positions, targets, part, answered)


def fit(
    model: LlamaForCausalLM,
    batches: Callable[[], Packed],
    loss_fn: Callable[[Tensor, Packed], Tensor],
    save: Callable[[], None],
    minutes: float,
    peak: float,
    hold: float,
) -> None:
    """Trains for `minutes` of processor time, so that a busy machine trains as long as an idle one.

    The learning rate warms up to `peak`, stays there until the share `hold` of the time, then falls to 2 % of it along
    a cosine.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, weight_decay=0.05, betas=(0.9, 0.98))
    started, step, total = time.process_time(), 0, 0.0
    while (done := (time.process_time() - started) / (60 * minutes)) < 1:
        decay = 1.0 if done < hold else max(0.02, 0.5 + 0.5 * math.cos(math.pi * (done - hold) / (1 - hold)))
        optimizer.param_groups[0]["lr"] = peak * decay * min(1.0, (step + 1) / 100)
        batch = batches()
        hidden = model.model(batch.ids, attention_mask=batch.mask, position_ids=batch.positions).last_hidden_state
        loss = loss_fn(hidden, batch)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        step, total = step + 1, total + loss.item()
        if step % 100 == 0:
            print(f"{done * minutes:5.1f} min  step {step:5d}  loss {total / 100:.3f}", flush=True)
            total = 0.0
        if step % 500 == 0:
            save()
    save()
