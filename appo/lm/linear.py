"""Linear layers on CPUs where torch's default multiplies matrices slowly.

torch leaves float32 products to MKL, which is at its best on Intel's CPUs only.

Many rows: MKL uses AVX-512 on Intel's CPUs only, and reaches half of the rate of others. torch also ships oneDNN, which
uses AVX-512 on all CPUs, but torch calls it for other dtypes only. `install` gives `nn.Linear` layers another class,
which calls torch's private oneDNN operator. Nothing outside of `CausalLM(onednn=...)` knows of it.

Few rows, as in decoding: `product_of` multiplies by a copy of the weights in another order.

Results equal those of `nn.Linear` up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FEW = 64  # rows: with fewer, reading the weights takes most of the time, and MKL has less overhead
PANEL = 16  # columns that MKL's innermost loop takes at once
FEWEST, MOST = 2, 32  # rows between which panels pay
MANY = 2**25  # weights: with more (an output head), oneDNN computes their gradient no faster, in more memory

Product = Callable[[Tensor], Tensor]


@cache
def is_faster() -> bool:
    """Whether oneDNN is faster than MKL on this machine's CPU."""
    cpu = torch.cpu.get_capabilities()
    built = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return built and bool(cpu.get("avx512_f")) and "intel" not in str(cpu.get("cpu_name", "intel")).lower()


@cache
def panels_pay() -> bool:
    """Whether MKL spends much of a product of few rows on copying weights, as it does on CPUs that are not Intel's."""
    name = str(torch.cpu.get_capabilities().get("cpu_name", "intel"))
    return torch.backends.mkl.is_available() and "intel" not in name.lower()


def install(model: nn.Module) -> None:
    """Lets the model's linear layers use oneDNN on a CPU where that is faster; their weights and names stay."""
    if is_faster():
        for module in model.modules():
            if type(module) is nn.Linear:  # not a subclass, which may compute something else
                module.__class__ = OneDNNLinear


def uninstall(model: nn.Module) -> None:
    """Turns the layers back into `nn.Linear`."""
    for module in model.modules():
        if isinstance(module, OneDNNLinear):
            module.__class__ = nn.Linear  # type: ignore[assignment]


class OneDNNLinear(nn.Linear):
    """A linear layer that leaves float32 products of many rows to oneDNN; otherwise `nn.Linear`."""

    def forward(self, x: Tensor) -> Tensor:
        many = x.numel() >= FEW * self.in_features and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
        if not (many and x.dtype == self.weight.dtype == torch.float32):
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


class Panels:
    """The outputs of linear layers with the same input, side by side, for few rows.

    A product of few rows takes as long as the weights take to pass. MKL first copies weights that lie row by row into
    panels, which its innermost loop reads straight through. Here they are copied once, into panels [n, in, 16], and
    multiplied as a batch of n matrices, which MKL takes as they are.

    Args:
        layers: the layers; later changes of their weights have no effect.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        weight = torch.cat([layer.weight.detach() for layer in layers])
        biases = [weight.new_zeros(x.out_features) if x.bias is None else x.bias.detach() for x in layers]
        self.width, spare = len(weight), -len(weight) % PANEL
        self.weight = F.pad(weight, (0, 0, 0, spare)).view(-1, PANEL, weight.shape[1]).transpose(1, 2).contiguous()
        self.bias = F.pad(torch.cat(biases), (0, spare)).view(-1, 1, PANEL)
        self.biased = any(layer.bias is not None for layer in layers)
        self.count = len(self.weight)

    def __call__(self, x: Tensor) -> Tensor:
        """[R, in] -> [R, out]."""
        rows = x.expand(self.count, *x.shape)
        found = torch.baddbmm(self.bias, rows, self.weight) if self.biased else torch.bmm(rows, self.weight)
        return found.transpose(0, 1).reshape(x.shape[0], -1)[:, : self.width]


def product_of(layers: Sequence[nn.Module], rows: int) -> Product:
    """The outputs of layers with the same input, side by side, as a function that is called often with so many rows."""
    own = all(type(layer) in (nn.Linear, OneDNNLinear) for layer in layers)
    if own and FEWEST <= rows <= MOST and panels_pay():
        return Panels([layer for layer in layers if isinstance(layer, nn.Linear)])
    return layers[0] if len(layers) == 1 else lambda x: torch.cat([layer(x) for layer in layers], dim=-1)


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [*, k] @ b' [k, n] + bias [n]."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return product
