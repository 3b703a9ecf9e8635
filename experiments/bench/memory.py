"""The memory that a piece of work needs, beside what it leaves behind."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile


def transient(work: Callable[[], Any], device: str) -> int:
    """Runs `work`; returns the most bytes of tensors it held at once, minus those that stay, as optimizer state does.

    On a CPU these are counted, allocation by allocation. What the system reports would differ by a half from one
    measurement to the next, since freed memory is kept and reused.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        work()
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        work()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        found.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8"))["traceEvents"]
    changes = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
    held = list(accumulate((event["args"]["Bytes"] for event in changes), initial=0))
    return max(held) - held[-1]
