"""Linear layers on CPUs where torch's default multiplies matrices slowly.

`install` gives `nn.Linear` layers another class, which calls torch's private oneDNN operator where that is faster:

- Many rows in float32: torch leaves these to MKL, which uses AVX-512 on Intel's CPUs only, and reaches half of the rate
  of others. oneDNN uses it on all CPUs.
- Few rows, as in decoding: oneDNN and MKL first put the weights in another order. Within `laid_out` that is done once.

Results equal those of `nn.Linear` up to rounding. `CausalLM(onednn=...)` installs it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MOST = 2**32  # bytes of weights: a copy of more might not fit into memory
FEW = 64  # rows: with fewer, reading the weights takes most of the time, and MKL has less overhead
MANY = 2**25  # weights: with more (an output head), oneDNN computes their gradient no faster, in more memory

Product = Callable[[Tensor], Tensor]


@cache
def is_faster() -> bool:
    """Whether oneDNN is faster than MKL on this machine's CPU."""
    cpu = torch.cpu.get_capabilities()
    built = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return built and bool(cpu.get("avx512_f")) and "intel" not in str(cpu.get("cpu_name", "intel")).lower()


@cache
def native_dtypes() -> set[torch.dtype]:
    """The dtypes that oneDNN multiplies on this machine's CPU; bfloat16 where torch says that oneDNN supports it."""
    if not torch.backends.mkldnn.is_available() or torch.cpu.get_capabilities().get("architecture") != "x86_64":
        return set()
    return {torch.float32, *([torch.bfloat16] if torch.ops.mkldnn._is_mkldnn_bf16_supported() else [])}


def install(model: nn.Module) -> None:
    """Lets the model's linear layers use oneDNN; their weights and names stay."""
    if is_faster() or native_dtypes():
        for module in model.modules():
            if type(module) is nn.Linear:  # not a subclass, which may compute something else
                module.__class__ = OneDNNLinear


def uninstall(model: nn.Module) -> None:
    """Turns the layers back into `nn.Linear`."""
    for module in model.modules():
        if isinstance(module, OneDNNLinear):
            module.__class__ = nn.Linear  # type: ignore[assignment]


class OneDNNLinear(nn.Linear):
    """A linear layer that leaves products to oneDNN where that is faster; otherwise `nn.Linear`.

    Attributes:
        laid_out: the weights in oneDNN's order, within `laid_out`.
    """

    laid_out: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu" or x.dtype != self.weight.dtype or torch.is_autocast_enabled("cpu"):
            return super().forward(x)
        many = x.numel() >= FEW * self.in_features
        if self.laid_out is not None and not many:
            return _multiply(x, self.laid_out, self.bias)
        if not (many and x.dtype == torch.float32 and is_faster()):
            return super().forward(x)
        product: Tensor = _Product.apply(x, self.weight, self.bias)
        return product


class _Product(torch.autograd.Function):
    """x [*, in] @ weight' + bias -> [*, out]."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _multiply(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows, gradient = x.flatten(0, -2), grad_outputs[0].flatten(0, -2)
        to_input, to_weight, to_bias = ctx.needs_input_grad
        by_weight = _multiply if weight.numel() < MANY else F.linear
        return (
            _multiply(gradient, weight.t()).view(x.shape) if to_input else None,
            by_weight(gradient.t(), rows.t()) if to_weight else None,
            gradient.sum(0) if to_bias else None,
        )


@contextmanager
def laid_out(model: nn.Module) -> Iterator[None]:
    """Within this block the model's oneDNN layers multiply few rows by a copy of their weights in oneDNN's own order.

    A product of few rows takes as long as the weights take to pass, and torch lays them out anew for each. Making the
    copies costs a few such products. Later changes of the weights have no effect; nothing has a gradient. Models of
    more than `MOST` bytes, and those that compute in another dtype than their weights', stay as they are; so does a
    model whose copies do not fit into memory. Blocks do not nest.
    """
    found = [module for module in model.modules() if isinstance(module, OneDNNLinear)]
    layers = [layer for layer in found if layer.weight.device.type == "cpu" and layer.weight.dtype in native_dtypes()]
    if torch.is_autocast_enabled("cpu") or sum(layer.weight.nbytes for layer in layers) > MOST:
        layers = []
    try:
        for layer in layers:
            layer.laid_out = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach())
    except (RuntimeError, MemoryError):
        _drop(layers)
    try:
        yield
    finally:
        _drop(layers)


def _drop(layers: Sequence[OneDNNLinear]) -> None:
    for layer in layers:
        vars(layer).pop("laid_out", None)


def product_of(layers: Sequence[nn.Module]) -> Product:
    """The outputs of layers with the same input, side by side; where weights are laid out, no module is called."""
    products = [_product(layer) for layer in layers]
    return products[0] if len(products) == 1 else lambda x: torch.cat([product(x) for product in products], dim=-1)


def _product(layer: nn.Module) -> Product:
    if isinstance(layer, OneDNNLinear) and layer.laid_out is not None:
        return partial(_multiply, b=layer.laid_out, bias=layer.bias)
    return layer


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [*, k] @ b' [k, n] + bias [n]."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return product
