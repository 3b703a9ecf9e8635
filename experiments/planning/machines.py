"""The machines for which a plan says memory and hours."""

from __future__ import annotations

from typing import NamedTuple

COMPUTE_SHARE, BANDWIDTH_SHARE = 0.4, 0.6  # shares of a GPU's peak rates that a run reaches; assumed
LAUNCH = 1e-3  # least seconds per layer on a GPU, for launching its kernels; twice with an adapter (measured on H200)
STEP = 2.5e-4  # the same in a decoding step, which a GPU replays: 16 ms for 28 layers with an adapter (H200)


class Machine(NamedTuple):
    """A device that runs a model.

    Attributes:
        name: the maker's name for it.
        memory: its memory in GiB.
        flops: peak rate of (dense) matrix products in FLOP/s; on a GPU in bfloat16.
        bandwidth: memory bandwidth in bytes/s.
        launch: least seconds per layer.
        step: least seconds per layer in a decoding step.
        share: the share of `flops` that a run reaches.
        target_flops: the rate for the target's products, where it computes in another dtype than the agent.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    launch: float = LAUNCH
    step: float = STEP
    share: float = COMPUTE_SHARE
    target_flops: float | None = None


GPUS = (
    Machine("H100 80 GB", 79.6, 989e12, 3.35e12),
    Machine("H200", 140.4, 989e12, 4.8e12),
    Machine("A100 80 GB", 79.2, 312e12, 2.04e12),
    Machine("RTX 4090", 24.0, 165e12, 1.01e12),
    Machine("L4", 22.5, 121e12, 0.30e12),
)
