"""LoRA adapters: small trained matrices beside the frozen weights of a model's linear layers (Hu et al. 2021).

The package peft puts them in place. An adapter begins with no effect: one of its two matrices is 0. Its dropout stays
0: with dropout, the log-probabilities in PPO's loss would differ from those recorded at sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

ALL_LINEAR = "all-linear"  # every linear layer but the head, as peft names them


def add(
    model: PreTrainedModel, rank: int, alpha: float | None = None, targets: str | Sequence[str] = ALL_LINEAR
) -> None:
    """Freezes the model and adds an adapter of float32 weights, whatever dtype the model has.

    Args:
        model: without an adapter.
        rank: of the products that are added to the weights.
        alpha: these products are scaled by alpha / rank; None: twice the rank.
        targets: `ALL_LINEAR`, or a list of the ends of the names of the layers that get one.

    Raises:
        ImportError: peft is not installed.
        ValueError: no layer has one of the names, or the rank is above the full rank of each layer.
    """
    from peft import LoraConfig

    chosen(model, rank, targets)  # peft is content if one of several names is there, and takes any rank
    model.requires_grad_(False)
    wanted = targets if isinstance(targets, str) else list(targets)
    scale: Any = 2 * rank if alpha is None else alpha  # annotated as int by peft, which takes any number
    transposed = any(isinstance(layer, Conv1D) for layer in model.modules())  # GPT-2's weights are [in, out]
    model.add_adapter(
        LoraConfig(r=rank, lora_alpha=scale, target_modules=wanted, fan_in_fan_out=transposed, task_type="CAUSAL_LM")
    )
    make_trainable(model)


def chosen(model: PreTrainedModel, rank: int, targets: str | Sequence[str]) -> list[nn.Module]:
    """The layers that an adapter of this rank on these targets goes to; see `add`.

    Raises:
        ValueError: no layer has one of the names, or the rank is above the full rank of each layer.
    """
    layers = _named(model, targets)
    full = max((min(layer.weight.shape) for layer in layers if isinstance(layer, nn.Linear | Conv1D)), default=rank)
    if rank > full:
        raise ValueError(f"the rank is {rank}; expected at most {full}, the full rank of the largest layer")
    return layers


def _named(model: PreTrainedModel, targets: str | Sequence[str]) -> list[nn.Module]:
    if targets == ALL_LINEAR:
        head = model.get_output_embeddings()
        return [layer for layer in model.modules() if isinstance(layer, nn.Linear | Conv1D) and layer is not head]
    found = {end: [layer for name, layer in model.named_modules() if f".{name}".endswith(f".{end}")] for end in targets}
    if absent := [end for end in found if not found[end]]:
        raise ValueError(f"no layer is named {', '.join(absent)}")
    return list(dict.fromkeys(layer for layers in found.values() for layer in layers))


def make_trainable(model: PreTrainedModel) -> None:
    """Makes the adapter's weights float32 and trained, and nothing else."""
    model.requires_grad_(False)
    for layer in _layers(model):
        for name in layer.adapter_layer_names:
            getattr(layer, name).requires_grad_(True).to(torch.float32)


def is_in(model: nn.Module) -> bool:
    """Whether the model has an adapter."""
    return next(_layers(model), None) is not None


@contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """Within this block the model computes as if it had no adapter. Do not enter it before a backward pass is done."""
    layers = [(layer, [(p, p.requires_grad) for p in layer.parameters()]) for layer in _layers(model)]
    for layer, _ in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer, parameters in layers:
            layer.enable_adapters(True)
            for parameter, trained in parameters:  # peft makes all of an adapter trainable that it switches on
                parameter.requires_grad_(trained)


def _layers(model: nn.Module) -> Iterator[Any]:
    return (module for module in model.modules() if _is_adapted(module))


def _is_adapted(module: nn.Module) -> bool:
    """Whether a layer has an adapter; without importing peft, which a model without adapters does not need."""
    return hasattr(module, "adapter_layer_names") and hasattr(module, "enable_adapters")
