"""The job of which this process is a part; torchrun describes it in the environment. Without torchrun, a job of one.

The first process prints for all; the others are silent, since they would print the same. Most errors hit all processes
at once, so only the first process that has an error reports it.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    from appo.lm.parallel.ranks import Ranks

STARTED_BY = "TORCHELASTIC_RUN_ID"  # torchrun sets it; other programs set RANK too, with another meaning
_joined: dict[str, Any] = {}  # "store": the job's; "meetings": their number; "stderr": descriptor of a silent process


class JobError(ValueError):
    """The processes of this job cannot have the devices that were asked for."""


def rank() -> int:
    """Returns the number of this process, from 0."""
    return int(os.environ["RANK"]) if STARTED_BY in os.environ else 0


def size() -> int:
    """Returns the number of processes."""
    return int(os.environ["WORLD_SIZE"]) if STARTED_BY in os.environ else 1


def be_silent() -> None:
    """Silences every process but the first: drops its stdout and stderr, including what libraries print."""
    if rank() > 0 and "stderr" not in _joined:
        _joined["stderr"] = os.dup(2)
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)


def join(device: str) -> Ranks:
    """Connects to the other processes; on GPUs each process takes its own GPU.

    Args:
        device: the configured device; with several processes auto, cpu or cuda.

    Raises:
        JobError: there are not enough GPUs, or one GPU is named for all.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]
    from torch.distributed.rendezvous import rendezvous

    from appo.lm.parallel.ranks import Joined, Ranks

    if size() == 1:
        return Ranks()
    if device not in ("auto", "cpu", "cuda"):
        raise JobError(f"device is {device!r}; expected auto, cpu or cuda: each of the {size()} processes has its own")
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    if gpus:
        local = int(os.environ["LOCAL_RANK"])
        if local >= gpus:
            raise JobError(f"more processes on this machine than its {gpus} GPUs; start fewer, or give device=cpu")
        torch.cuda.set_device(local)
    store, number, count = next(iter(rendezvous("env://")))
    # Tensors on GPUs go by NCCL, all others by gloo, which notices at once when a process has ended.
    _joined["meetings"] = _joined.get("meetings", 0) + 1
    fresh = PrefixStore(f"meeting {_joined['meetings']}", store)  # addresses from an earlier meeting are invalid
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", store=fresh, rank=number, world_size=count)
    _joined["store"] = store
    return Joined()


def leave() -> None:
    """Disconnects from the other processes, once nothing is left to do together."""
    if "store" in _joined:
        import torch.distributed as dist

        dist.destroy_process_group()
        del _joined["store"]


def end(code: int) -> NoReturn:
    """Ends the process with this exit code; in a job of several at once, since FSDP2 may abort Python's cleanup."""
    if size() > 1:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def is_spokesman() -> bool:
    """Decides whether this process, which is about to end, reports its error; if so, it can print from now on."""
    if size() == 1:
        return True
    first = "store" not in _joined
    for number in (signal.SIGINT, signal.SIGTERM):  # torchrun sends one when another process has ended
        signal.signal(number, signal.SIG_DFL if first and rank() > 0 else signal.SIG_IGN)
    if first and rank() > 0:
        time.sleep(10)  # the first process probably has the same error and reports it; then torchrun ends this one
    elif not first:
        try:
            first = _joined["store"].add("told", 1) == 1
        except RuntimeError:  # the process that kept the store has ended
            first = True
    if first and "stderr" in _joined:
        os.dup2(_joined["stderr"], 2)
    return bool(first)
