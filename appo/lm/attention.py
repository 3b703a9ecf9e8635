"""Attention over packed sequences: the function for transformers' attention table, and the layouts it follows.

All tokens of a pass stand in one row of S: prefixes, then the branches that continue them. A layout says which
tokens each token sees, in blocks of sequences of about the same length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "appo_packed"
CPU = torch.device("cpu")  # layouts take many small steps, so they are built there, whatever the model's device
BLOCK_KEYS = 2048  # keys of one block, over all its rows; more only takes more memory
UNKNOWN = ("s_aux", "indices", "block_indices")  # transformers' names of attention sinks, and of keys that queries pick


class Branches(NamedTuple):
    """N token sequences that continue M prefixes: `owner[n]` is the prefix of branch n; a prefix may be empty."""

    prefixes: Sequence[Sequence[int]]
    branches: Sequence[Sequence[int]]
    owner: Sequence[int]


class _Block(NamedTuple):
    """Sequences of about the same length: the places of their queries and keys, and the mask between them."""

    queries: Tensor  # [n, R]
    keys: Tensor  # [n, W]
    age: Tensor  # [n, R, W]: positions from the key to the query; negative where the query must not see the key
    mask: Tensor  # [n, 1, R, W], 0 or -inf


class Layout(NamedTuple):
    """Which of the S tokens in one row see which."""

    blocks: list[_Block]
    restore: Tensor  # [S]: the place of each token in the concatenated queries of all blocks


def layout_of(
    batch: Branches, starts: Sequence[int], asking: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Layout:
    """Blocks of sequences that see equally long prefixes, sorted by length, so that little of a block is padding.

    Args:
        batch: its prefixes and branches are the sequences.
        starts: where each sequence begins, followed by S, the number of tokens.
        asking: how many of each sequence's last tokens attend; the output of the others is arbitrary.
        dtype: of the masks, which are added to scores of queries in the same dtype.
        device: of the model; the layout is built on the CPU and copied there.
    """
    length = [len(row) for row in (*batch.prefixes, *batch.branches)]
    parent = [-1] * len(batch.prefixes) + list(batch.owner)
    seen = [length[m] if m >= 0 else 0 for m in parent]
    blocks, groups = [], list[list[int]]()
    for row in sorted((row for row in range(len(length)) if asking[row]), key=lambda row: (seen[row], length[row])):
        fits = groups and (len(groups[-1]) + 1) * (seen[row] + length[row]) <= BLOCK_KEYS
        if not fits or seen[groups[-1][0]] != seen[row]:
            groups.append([])
        groups[-1].append(row)
    restore, offset = torch.zeros(starts[-1], dtype=torch.long, device=CPU), 0
    for rows in groups:
        first, size, count = (
            torch.tensor([of[r] for r in rows], device=CPU)[:, None] for of in (starts, length, asking)
        )
        before = seen[rows[0]]
        own = torch.arange(int(size.max()), device=CPU).clamp(max=size - 1)  # padding repeats the last token
        steps = torch.arange(int(count.max()), device=CPU)
        asked = size - count + steps.clamp(max=count - 1)
        queries = first + asked
        prefix = torch.tensor([starts[max(parent[r], 0)] for r in rows], device=CPU)[:, None]
        inherited = prefix + torch.arange(before, device=CPU)
        keys = torch.cat([inherited, first + own], dim=1)
        age = before + asked[:, :, None] - torch.arange(keys.shape[1], device=CPU)
        age[:, :, before:].masked_fill_((torch.arange(own.shape[1], device=CPU) >= size)[:, None, :], -1)
        mask = torch.zeros(age.shape, dtype=dtype, device=CPU).masked_fill(age < 0, -torch.inf).unsqueeze(1)
        blocks.append(_Block(*(t.to(device) for t in (queries, keys, age, mask))))
        real = steps < count
        restore[queries[real]] = offset + torch.arange(real.numel(), device=CPU).view_as(real)[real]
        offset += real.numel()
    return Layout(blocks, restore.to(device))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    layout: Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of a model: for packed [1, heads, S, D] with a `layout`, for an ordinary batch without.

    Returns:
        [B, S, heads, D], as Hugging Face wants it, and None for the weights.

    Raises:
        NotImplementedError: the model's attention is of a kind that this function does not compute.
    """
    if unknown := [name for name in UNKNOWN if kwargs.get(name) is not None]:
        raise NotImplementedError(f"attention with {', '.join(unknown)}")
    if layout is None:
        if softcap is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        if attention_mask is None:  # to SDPA, no mask means that only later tokens are hidden
            lengths = query.shape[2], key.shape[2]
            attention_mask = torch.ones(lengths, dtype=torch.bool, device=key.device).tril(lengths[1] - lengths[0])
        return _attend(query, key, value, attention_mask, scaling, softcap).transpose(1, 2), None
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))  # [S, heads, D]
    parts = []
    for block in layout.blocks:
        mask = block.mask
        if sliding_window is not None and sliding_window < mask.shape[-1]:
            mask = mask.masked_fill((block.age >= sliding_window).unsqueeze(1), -torch.inf)
        places = ((query, block.queries), (key, block.keys), (value, block.keys))
        q, k, v = (_take(x, i).transpose(1, 2) for x, i in places)
        parts.append(_attend(q, k, v, mask, scaling, softcap).transpose(1, 2).flatten(0, 1))
    return _take(torch.cat(parts), layout.restore).unsqueeze(0), None


def _take(x: Tensor, places: Tensor) -> Tensor:
    """x[places], the rows of x [S, *] at places [*]; on a CPU several times faster than indexing."""
    return x.index_select(0, places.flatten()).unflatten(0, places.shape)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """softmax(q k' * scaling + mask) v for [n, heads, R or W, D]; query heads may share key heads."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # padding attends to nothing: -inf gives NaN
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ v


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
