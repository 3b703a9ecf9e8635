"""An agent that is trained as a whole and divided among several GPUs by torch's FSDP2 (`fully_shard`).

Between passes a rank holds its part of each trained tensor, in float32, and likewise of its gradient, of the
optimizer's moments and of the anchor. A pass gathers one layer at a time, in the dtype that the model computes in, so
all ranks must make equally many passes. Sampling does not: there the whole model is gathered first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from appo.lm import packed
from appo.lm.parallel.ranks import Joined, meeting


class Sharded(Joined):
    """One process of several, which holds a part of the agent; see `Joined` for its verbs.

    Args:
        dtype: what the layers compute in.
        device: of this process.
    """

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self._dtype, self._device, self._roots = dtype, device, list[FSDPModule]()
        self._mesh = init_device_mesh(device.type, (self.size,))

    def begin(self, *modules: nn.Module) -> None:
        """As `Ranks.begin`; replaces the modules' parameters by parts of them."""
        super().begin(*modules)
        always: dict[str, Any] = {"mesh": self._mesh, "reshard_after_forward": True}
        # States between the layers stay float32, as they do under autocast.
        mixed = MixedPrecisionPolicy(self._dtype, torch.float32, cast_forward_inputs=False)
        for module in modules:
            for layer in packed.layers(module):
                fully_shard(layer, mp_policy=mixed, **always)
            self._roots.append(fully_shard(module, **always))  # with its embedding and head, in float32
            for inner in module.modules():
                if isinstance(inner, nn.Embedding):
                    inner.sparse = False  # FSDP knows dense gradients only
        for part in self._parts():
            part.set_gradient_divide_factor(1.0)  # losses are shares of a whole, to be added up
            part.set_force_sum_reduction_for_comms(True)  # gloo can do nothing else

    def parts(self, count: int, size: int = 0) -> list[tuple[Tensor, float]]:
        """As `Ranks.parts`; a rank that has fewer parts than another repeats a row, with weight 0."""
        mine = super().parts(count, size)
        repeated = (torch.zeros(1, dtype=torch.long, device="cpu"), 0.0)
        return mine + [repeated] * (self.largest(len(mine)) - len(mine))

    def sum_gradients(self, parameters: Sequence[nn.Parameter], numbers: dict[str, float]) -> dict[str, float]:
        """As `Ranks.sum_gradients`; the backward passes have added the gradients up already."""
        told = torch.tensor(list(numbers.values()), device=self._device)
        with meeting():
            dist.all_reduce(told)
        return dict(zip(numbers, told.tolist(), strict=True))

    def clip_gradients(self, parameters: Sequence[nn.Parameter], limit: float) -> float:
        """As `Ranks.clip_gradients`."""
        with meeting():
            norm = nn.utils.clip_grad_norm_(parameters, limit)
            return float(norm.full_tensor() if isinstance(norm, DTensor) else norm)

    def check_weights(self, tensors: Sequence[Tensor]) -> None:
        """Nothing to compare once each rank holds another part."""
        if not self._roots:
            super().check_weights(tensors)

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """As `Ranks.gathered`."""
        for root in self._roots:
            root.set_reshard_after_forward(False)
        with meeting():
            for part in self._parts():
                part.unshard()
        try:
            yield
        finally:
            for part in self._parts():
                part.reshard()
            for root in self._roots:
                root.set_reshard_after_forward(True)

    def swap(self, parameter: nn.Parameter, other: Tensor) -> Tensor:
        """As `Ranks.swap`; by copying, since FSDP keeps the memory that it gathers from."""
        before = parameter.detach().clone()
        parameter.detach().copy_(other)
        return before

    def equal(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
        """As `Ranks.equal`; each rank compares its parts."""
        return super().equal([(_part(one), _part(other)) for one, other in pairs])

    def whole(self, state: Any) -> Any:
        """As `Ranks.whole`; in the CPU's memory, and on the first rank only: others get empty tensors."""
        if isinstance(state, DTensor):
            with meeting():
                full = state.full_tensor().detach()
            return full.cpu() if self.rank == 0 else full.new_empty(0)
        if isinstance(state, dict):
            return {name: self.whole(value) for name, value in state.items()}
        if isinstance(state, list | tuple):
            return type(state)([self.whole(value) for value in state])
        return state

    def part(self, state: Any) -> Any:
        """As `Ranks.part`; all that has floating-point entries is divided by its first dimension, as FSDP does."""
        if isinstance(state, Tensor) and state.is_floating_point() and state.dim() > 0:
            return distribute_tensor(state.to(self._device), self._mesh, [Shard(0)], src_data_rank=None)
        if isinstance(state, dict):
            return {name: self.part(value) for name, value in state.items()}
        if isinstance(state, list | tuple):
            return type(state)([self.part(value) for value in state])
        return state

    def _parts(self) -> list[FSDPModule]:
        """The modules that are gathered at once, each without those in it."""
        return [part for root in self._roots for part in root.modules() if isinstance(part, FSDPModule)]  # type: ignore[attr-defined]


def _part(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
