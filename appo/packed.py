"""Sequences that share prefixes, run through a causal LM as one: each prefix once, no padding.

The K responses to a query share the query, the inputs under an instruction share the instruction. Run as padded rows,
most of the work is repetition. Here all tokens stand in one row of S: the prefixes, then the branches that go on
from them. Embeddings, MLPs and heads do not care who stands next to whom; attention does, and Hugging Face models
take theirs from a table in which ours is entered: every branch sees its prefix and itself, and nothing else.

Models that do not use that table get the padded rows after all, and give the same numbers.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_layers import GradientCheckpointingLayer

NAME = "appo_packed"
CPU = torch.device("cpu")  # layouts are made there, whatever the model's device: many small steps
BLOCK_KEYS = 2048  # keys that are attended to at once; more only adds to the memory


class Branches(NamedTuple):
    """N token sequences that go on from M prefixes: `owner[n]` is the prefix of branch n; a prefix may be empty."""

    prefixes: Sequence[Sequence[int]]
    branches: Sequence[Sequence[int]]
    owner: Sequence[int]


class Output(NamedTuple):
    """Of the kept tokens: logits [n, V] and the hidden states [n, H] that the head read."""

    logits: Tensor
    hidden: Tensor


class _Block(NamedTuple):
    """Some sequences of about the same length: places of their tokens and of what these may see, and the mask."""

    queries: Tensor  # [n, R]
    keys: Tensor  # [n, W]
    age: Tensor  # [n, R, W]: how many positions the key is behind the query; negative where it must not be seen
    mask: Tensor  # [n, 1, R, W], 0 or -inf


class _Layout(NamedTuple):
    blocks: list[_Block]
    restore: Tensor  # [S]: where in the blocks' queries, one after another, each token is


@torch.no_grad()
def install(model: PreTrainedModel) -> bool:
    """Makes the model's attention ours, which is SDPA for ordinary passes; False if the model does not fit it.

    It does not where attention comes from elsewhere, or where other parts look at neighbours too (convolutions, state
    spaces). Nothing says so reliably, hence a trial: packed and padded must give the same logits.
    """
    if packs(model) or not model._supports_attention_backend:
        return packs(model)
    before = model.config._attn_implementation
    trial = Branches([[1, 2, 3, 4], [5]], [[6, 7, 8], [9], [3, 2]], [0, 0, 1])
    counts = [len(branch) for branch in trial.branches]
    model.set_attn_implementation("eager")  # the model's definition; SDPA may leave a soft cap out without a word
    defined = _run_padded(model, trial, counts).logits
    model.set_attn_implementation(NAME)
    if packs(model):
        padded, packed = _run_padded(model, trial, counts).logits, run(model, trial).logits
        # bfloat16 moves single rows of eager attention by 0.4 of the deviation, most by 0.07; a wrong layout moves most
        # rows by 0.5. The same attention, packed and padded, differs by 0.02 at most.
        loose = 0.05 if model.dtype.itemsize >= 4 else 0.25
        if not (
            _apart(packed, padded).max() <= 0.05 and _apart(padded, defined).median() <= loose
        ):  # so NaN is refused
            model.set_attn_implementation(before)
    return packs(model)


def _apart(some: Tensor, others: Tensor) -> Tensor:
    """How far logits [n, V] are from others, row by row, as a share of their standard deviation: [n]."""
    return (some - others).float().square().mean(-1).sqrt() / others.float().std()


def packs(model: PreTrainedModel) -> bool:
    """Whether `run` packs for this model."""
    return bool(model.config.get_text_config()._attn_implementation == NAME)


def run(model: PreTrainedModel, batch: Branches, keep: Sequence[int] | None = None) -> Output:
    """Logits and hidden states of the branches' tokens, in order.

    Args:
        model: in eval mode.
        batch: what to run.
        keep: how many of each branch's last tokens are wanted; default: all of them.
    """
    counts = [len(branch) for branch in batch.branches] if keep is None else list(keep)
    if not packs(model):
        return _run_padded(model, batch, counts)
    device = model.device
    rows = [*batch.prefixes, *batch.branches]
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    ends = starts[len(batch.prefixes) + 1 :]
    offsets = [0] * len(batch.prefixes) + [len(batch.prefixes[m]) for m in batch.owner]
    ids = torch.tensor([[token for row in rows for token in row]], device=device)
    positions = torch.cat([torch.arange(o, o + len(row), device=CPU) for o, row in zip(offsets, rows, strict=True)]).to(
        device
    )
    wanted = torch.cat(
        [torch.arange(end - count, end, device=CPU) for end, count in zip(ends, counts, strict=True)]
    ).to(device)
    layout = _layout(batch, starts, [len(row) for row in rows], model.dtype, device)
    reading = _layout(batch, starts, [0] * len(batch.prefixes) + counts, model.dtype, device)
    unmasked = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)  # a mask in four dimensions is not made again
    with _last_layer_on(model, wanted, starts[-1], reading):
        logits, hidden = call(
            model,
            input_ids=ids,
            position_ids=positions.unsqueeze(0),
            attention_mask=unmasked,
            logits_to_keep=wanted,
            use_cache=False,
            layout=layout,
        )
    return Output(logits.squeeze(0), hidden.squeeze(0))  # as [0], but that has zeros made for the gradient


def call(model: PreTrainedModel, **inputs: Any) -> Output:
    """One forward pass of the model as it is: its logits, and the hidden states that its head made them from."""
    seen: list[Tensor] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0]))
    try:
        return Output(model(**inputs).logits, seen[0])
    finally:
        handle.remove()


@contextmanager
def _last_layer_on(model: PreTrainedModel, wanted: Tensor, total: int, reading: _Layout) -> Iterator[None]:
    """Spares the last layer what the wanted ones of the `total` tokens do not need: the others are attended to no more.

    Its attention goes by the layout `reading`; its MLP and the projections around its attention, all but those for
    keys and values, see the wanted tokens alone.
    """
    last = next(reversed(layers(model)), None)
    if last is None or last.training:  # checkpointing: the layer is run again when the hooks are gone
        yield
        return

    def attend(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"layout": reading}

    def pick(_part: nn.Module, states: tuple[Tensor]) -> tuple[Tensor]:
        return (states[0].index_select(1, wanted),)

    def put_back(part: nn.Module, states: tuple[Tensor], output: Any) -> Any:
        if isinstance(output, tuple):  # with the scores of a router
            return put_back(part, states, output[0]), *output[1:]
        return output.new_zeros(1, total, output.shape[-1]).index_copy(1, wanted, output)

    handles = [last.register_forward_pre_hook(attend, with_kwargs=True)]
    parts = dict(last.named_modules())
    for name in ("self_attn.q_proj", "self_attn.o_proj", "mlp"):
        if name in parts:
            handles += [parts[name].register_forward_pre_hook(pick), parts[name].register_forward_hook(put_back)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _run_padded(model: PreTrainedModel, batch: Branches, counts: Sequence[int]) -> Output:
    """The plain way, for models with an attention of their own: every sequence whole, in a padded row."""
    rows = [[*batch.prefixes[m], *branch] for m, branch in zip(batch.owner, batch.branches, strict=True)]
    ids, mask = pad_left(rows, model.device)
    most = max(counts)
    output = call(
        model,
        input_ids=ids,
        attention_mask=mask.long(),
        position_ids=real_positions(mask),
        logits_to_keep=most,
        use_cache=False,
    )
    wanted = torch.arange(most, device=CPU) >= most - torch.tensor(counts, device=CPU).unsqueeze(1)
    return Output(output.logits[wanted], output.hidden[:, -most:][wanted])


def pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [R, L] and their mask, True on real tokens; all rows end in the last column."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids, torch.arange(width, device=device) >= width - lengths.unsqueeze(1)


def real_positions(mask: Tensor) -> Tensor:
    """[R, L], counting real tokens only: models with learned positions (GPT-2) give other logits without them."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def layers(model: nn.Module) -> list[nn.Module]:
    """The model's decoder layers, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all sequences share."""
    columns = zip(*sequences, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, sequences)))


# -- one token after another -------------------------------------------------------------------------------------


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """Keys and values of a layer, with room for more: new ones are written there, where DynamicLayer copies all."""

    ROOM = 128  # tokens
    keys: Tensor | None
    values: Tensor | None
    is_initialized: bool

    def __init__(self) -> None:
        super().__init__()
        self.room: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
            return self.keys, self.values
        held, length = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if not self.room or self.room[0].shape[2] < length:
            rows, heads, _, _ = self.keys.shape
            self.room = [x.new_empty(rows, heads, length + self.ROOM, x.shape[3]) for x in (self.keys, self.values)]
            for room, old in zip(self.room, (self.keys, self.values), strict=True):
                room[:, :, :held] = old
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, held:length] = new
        self.keys, self.values = (room[:, :, :length] for room in self.room)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        rows = len(beam_idx)
        if not self.room or rows > len(self.room[0]):
            super().reorder_cache(beam_idx)
            self.room = []  # of the rows that were
            return
        assert self.keys is not None
        held = self.keys.shape[2]
        moved = (beam_idx != torch.arange(rows, device=beam_idx.device)).nonzero()[:, 0]
        for room in self.room:
            room[moved, :, :held] = room[beam_idx[moved], :, :held]
        self.room = [room[:rows] for room in self.room]
        self.keys, self.values = (room[:, :, :held] for room in self.room)


def end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All tokens that end a text: the tokenizer's, and those that the model's configuration names (turn ends, too)."""
    ends = {tokenizer.eos_token_id}
    for config in (model.config.get_text_config(), model.generation_config):
        named = getattr(config, "eos_token_id", None)
        ends |= set(named) if isinstance(named, list) else {named}
    vocabulary = model.get_output_embeddings().weight.shape[0]  # a configuration may name what the model does not have
    return {token for token in ends - {None} if token < vocabulary}


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for the model; as transformers has it, but that a token more does not copy all those before."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def closed_up(going: Tensor) -> Tensor:
    """Indices of the rows that go on, of [R] booleans; the last of them fill the gaps, so that few have to move."""
    rows = going.nonzero()[:, 0]
    order = torch.arange(len(rows), device=going.device)
    order[~going[: len(rows)]] = rows[rows >= len(rows)]
    return order


# -- attention ---------------------------------------------------------------------------------------------------


def _layout(
    batch: Branches, starts: Sequence[int], asking: Sequence[int], dtype: torch.dtype, device: torch.device
) -> _Layout:
    """Blocks of sequences that see equally long prefixes, sorted by length, so that little of a block is padding.

    Args:
        batch: of which the sequences are, prefixes and branches.
        starts: where each of them begins, and at last the number of tokens S.
        asking: how many of the last tokens of each attend; the others get what another token gets.
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
        # Padded with the last token again.
        own, steps = (
            torch.arange(int(size.max()), device=CPU).clamp(max=size - 1),
            torch.arange(int(count.max()), device=CPU),
        )
        asked = size - count + steps.clamp(max=count - 1)
        queries = first + asked
        inherited = torch.tensor([starts[max(parent[r], 0)] for r in rows], device=CPU)[:, None] + torch.arange(
            before, device=CPU
        )
        keys = torch.cat([inherited, first + own], dim=1)
        age = before + asked[:, :, None] - torch.arange(keys.shape[1], device=CPU)
        age[:, :, before:].masked_fill_((torch.arange(own.shape[1], device=CPU) >= size)[:, None, :], -1)
        mask = torch.zeros(age.shape, dtype=dtype, device=CPU).masked_fill(age < 0, -torch.inf).unsqueeze(1)
        blocks.append(_Block(*(t.to(device) for t in (queries, keys, age, mask))))
        real = steps < count
        restore[queries[real]] = offset + torch.arange(real.numel(), device=CPU).view_as(real)[real]
        offset += real.numel()
    return _Layout(blocks, restore.to(device))


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    layout: _Layout | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function of a model: [1, heads, S, D] by `layout`; without one, an ordinary batch as SDPA has it.

    Returns:
        [B, S, heads, D], as Hugging Face wants it, and no weights.
    """
    if layout is None:
        if softcap is None:
            return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **kwargs)
        if attention_mask is None:  # SDPA's way to say that nothing is hidden but what comes later
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
    """x[places], rows of x [S, *] at places [*]; several times as fast on a CPU."""
    return x.index_select(0, places.flatten()).unflatten(0, places.shape)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scaling: float | None, softcap: float | None
) -> Tensor:
    """softmax(q k' * scaling + mask) v for [n, heads, R or W, D]; fewer key heads than query heads are shared."""
    groups = q.shape[1] // k.shape[1]
    if groups > 1:
        k, v = (x.repeat_interleave(groups, dim=1) for x in (k, v))
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
    scores = q @ k.transpose(-1, -2) * (q.shape[-1] ** -0.5 if scaling is None else scaling)
    scores = softcap * torch.tanh(scores / softcap)
    if mask is not None and mask.dtype == torch.bool:
        scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)  # padding sees nothing: -inf would make NaN
    elif mask is not None:
        scores = scores + mask
    return scores.softmax(-1) @ v


AttentionInterface.register(NAME, _attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
