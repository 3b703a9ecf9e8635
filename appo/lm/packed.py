"""Sequences that share prefixes, run through a causal LM as one row: each prefix once, no padding.

The K responses to a query share the query, the inputs under an instruction share the instruction. In padded rows most
of the work would be repetition. Here all tokens stand in one row of S: the prefixes, then the branches that continue
them. Embeddings, MLPs and heads treat each token alone; only attention looks at other tokens. Hugging Face models look
it up in a table, to which we add ours: every branch sees its prefix and itself, and nothing else.

Models that do not use that table run padded rows instead, with the same results.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from appo.lm.attention import CPU, NAME, Branches, Layout, layout_of

WINDOWS = ("sliding_window", "attention_chunk_size")  # what models and their configurations call them
NARROW = 3  # tokens
TRIAL = [[1, 2, 3, 4], [5]], [[6, 7, 8], [9], [3, 2]]  # prefixes and branches


class Output(NamedTuple):
    """Logits [n, V] of the kept tokens, and the hidden states [n, H] that the head read."""

    logits: Tensor
    hidden: Tensor


@torch.no_grad()
def install(model: PreTrainedModel) -> bool:
    """Sets the model's attention to ours, which is SDPA for ordinary passes; False if the model cannot use it.

    A model cannot if its attention is not taken from transformers' table, if it is of another kind (with sinks, or with
    keys that each query picks), or if other parts look at other tokens too (convolutions, state spaces). No flag says
    so reliably, hence a trial: packed and padded must give the same logits.
    """
    if is_installed(model) or not model._supports_attention_backend:
        return is_installed(model)
    before = model.config._attn_implementation
    prefixes, branches = (known(model, rows) for rows in TRIAL)
    trial = Branches(prefixes, branches, [0, 0, 1])
    counts = [len(branch) for branch in trial.branches]
    model.set_attn_implementation("eager")  # the model's definition; SDPA may silently leave out a soft cap
    with _narrow_windows(model):
        defined = _run_padded(model, trial, counts).logits
    model.set_attn_implementation(NAME)
    if is_installed(model) and not _computes_the_same(model, trial, counts, defined):
        model.set_attn_implementation(before)
    return is_installed(model)


def _computes_the_same(model: PreTrainedModel, trial: Branches, counts: Sequence[int], defined: Tensor) -> bool:
    """Whether our attention gives the logits that the model's own has given, `defined`, and gives them packed too."""
    try:
        with _narrow_windows(model):
            padded, packed = _run_padded(model, trial, counts).logits, run(model, trial).logits
    except torch.OutOfMemoryError:
        raise
    except Exception:  # of any kind: layers that take no layout, or need the tokens in rows
        return False
    # In standard deviations: bfloat16 moves single rows of eager attention by 0.4, most by 0.07; a wrong layout moves
    # most rows by 0.5. The same attention, packed and padded, differs by 0.02 at most.
    loose = 0.05 if model.dtype.itemsize >= 4 else 0.25
    return bool(apart(packed, padded).max() <= 0.05 and apart(padded, defined).median() <= loose)  # False for NaN


def known(model: PreTrainedModel, rows: Sequence[Sequence[int]]) -> list[list[int]]:
    """The rows of a trial in tokens that the model has: a toy may have fewer than the trial."""
    size = len(model.get_output_embeddings().weight)
    return [[token % size for token in row] for row in rows]


@contextmanager
def _narrow_windows(model: PreTrainedModel) -> Iterator[None]:
    """Lets every token see a few others only, where the model has windows: a short trial would lie within them.

    Some models apply a window in the usual mask alone and do not tell the attention function, so that a packed pass
    would see beyond it. Windows as wide as the context hide nothing, and stay.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or torch.inf
    owners = {id(owner): owner for module in model.modules() for owner in (module, getattr(module, "config", module))}
    found = [(o, name, getattr(o, "__dict__", {}).get(name)) for o in owners.values() for name in WINDOWS]
    wide = [(owner, name, size) for owner, name, size in found if isinstance(size, int) and NARROW < size < context]
    for owner, name, _ in wide:
        setattr(owner, name, NARROW)
    try:
        yield
    finally:
        for owner, name, size in wide:
            setattr(owner, name, size)


def apart(some: Tensor, others: Tensor) -> Tensor:
    """RMS distance of each row of logits [n, V] from the others', in standard deviations of all the others: [n]."""
    return (some - others).float().square().mean(-1).sqrt() / others.float().std()


def is_installed(model: PreTrainedModel) -> bool:
    """Whether `run` runs shared prefixes of this model once."""
    return bool(model.config.get_text_config()._attn_implementation == NAME)


def run(model: PreTrainedModel, batch: Branches, keep: Sequence[int] | None = None) -> Output:
    """Logits and hidden states of the branches' tokens, in order.

    Args:
        model: in eval mode.
        batch: what to run.
        keep: how many of each branch's last tokens are wanted; default: all of them.
    """
    counts = [len(branch) for branch in batch.branches] if keep is None else list(keep)
    if not is_installed(model):
        return _run_padded(model, batch, counts)
    device = model.device
    rows = [*batch.prefixes, *batch.branches]
    starts = [0]
    for row in rows:
        starts.append(starts[-1] + len(row))
    ends = starts[len(batch.prefixes) + 1 :]
    offsets = [0] * len(batch.prefixes) + [len(batch.prefixes[m]) for m in batch.owner]
    ids = torch.tensor([[token for row in rows for token in row]], device=device)
    places = [torch.arange(o, o + len(row), device=CPU) for o, row in zip(offsets, rows, strict=True)]
    positions = torch.cat(places).to(device)
    read = [torch.arange(end - count, end, device=CPU) for end, count in zip(ends, counts, strict=True)]
    wanted = torch.cat(read).to(device)
    layout = layout_of(batch, starts, [len(row) for row in rows], model.dtype, device)
    reading = layout_of(batch, starts, [0] * len(batch.prefixes) + counts, model.dtype, device)
    unmasked = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=device)  # a 4-D mask is used as it is
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
    return Output(logits.squeeze(0), hidden.squeeze(0))  # [0] would allocate zeros for the gradient


def call(model: PreTrainedModel, **inputs: Any) -> Output:
    """One forward pass of the model: its logits, and the hidden states that the head made them from, as computed."""
    seen: list[Tensor] = []

    def see(_head: nn.Module, states: tuple[Tensor]) -> tuple[Tensor]:
        seen.append(states[0].contiguous())  # torch multiplies a slice row by row, with a copy of the weights for each
        return (seen[0],)

    handle = model.get_output_embeddings().register_forward_pre_hook(see)
    try:
        return Output(model(**inputs).logits, seen[0])
    finally:
        handle.remove()


@contextmanager
def _last_layer_on(model: PreTrainedModel, wanted: Tensor, total: int, reading: Layout) -> Iterator[None]:
    """Skips work of the last layer that nobody reads: all tokens give keys and values, only `wanted` ones are queried.

    Its attention follows the layout `reading`. Its MLP and the projections of queries and outputs see only the wanted
    tokens; keys and values are computed for all.
    """
    last = next(reversed(layers(model)), None)
    if last is None or last.training:  # checkpointing runs the layer again after the hooks are gone
        yield
        return

    def attend(_layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, kwargs | {"layout": reading}

    def pick(_part: nn.Module, states: tuple[Tensor]) -> tuple[Tensor]:
        return (states[0].index_select(1, wanted),)

    def put_back(part: nn.Module, states: tuple[Tensor], output: Any) -> Any:
        if isinstance(output, tuple):  # a mixture of experts also returns its router's scores
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
    """The plain way, for models that cannot be packed: every sequence whole, in a padded row."""
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
    """Position ids [R, L] that count real tokens only: models with learned positions (GPT-2) need them."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def layers(model: nn.Module) -> list[nn.Module]:
    """The model's decoder layers, in order."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all sequences share."""
    columns = zip(*sequences, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, sequences)))


def unpack(values: Tensor, mask: Tensor) -> Tensor:
    """Puts the [n] values of real tokens at their places in [R, T]."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)
