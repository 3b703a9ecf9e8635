"""Linear layers by oneDNN, on CPUs where it multiplies matrices faster than torch's default.

torch leaves float32 products to MKL, which uses AVX-512 on Intel's CPUs only: on others it reaches half of their
rate. torch also ships oneDNN, which uses AVX-512 on all CPUs, but calls it for other dtypes only. So this file gives
`nn.Linear` layers another class, which calls torch's private oneDNN operator. Nothing outside of
`CausalLM(onednn=...)` knows of it; results equal those of `nn.Linear` but for rounding.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

FEW = 64  # rows: with fewer, reading the weights takes most of the time, and MKL has less overhead
MANY = 2**25  # weights: with more (an output head), oneDNN computes their gradient no faster, in more memory


@cache
def is_faster() -> bool:
    """Whether oneDNN is faster than MKL on this machine's CPU."""
    cpu = torch.cpu.get_capabilities()
    built = torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()
    return built and bool(cpu.get("avx512_f")) and "intel" not in str(cpu.get("cpu_name", "intel")).lower()


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
        by_weight = _multiply if weight.numel() < MANY else torch.nn.functional.linear
        return (
            _multiply(gradient, weight.t()).view(x.shape) if to_input else None,
            by_weight(gradient.t(), rows.t()) if to_weight else None,
            gradient.sum(0) if to_bias else None,
        )


def _multiply(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [*, k] @ b' [k, n] + bias [n]."""
    product: Tensor = torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")
    return product
