"""A dry run: what a run would gain, how long it would take and how much memory, found out on its first iterations."""

from __future__ import annotations

import time
from collections.abc import Iterator

from experiments.diagnostics.headroom import look
from experiments.run.models import peak_memory
from experiments.run.run import Run
from experiments.terminal.console import duration
from experiments.tuning.loop import arm_of

LOOKED_AT = 16  # prompts of the untrained agent, where the configuration asks for no look at the headroom


def trial(run: Run) -> Iterator[str]:
    """Looks at the headroom and makes two iterations; writes nothing.

    The first iteration checks itself and warms up, so the second one is timed. What is left out of the estimate is
    said in its line.
    """
    yield from look(run, run.config.headroom or LOOKED_AT).lines()
    if not run.steps:
        yield "time: no iterations; the prompt is scored on validation and test"
        return
    arm = arm_of(run)
    arm.step(1)
    started = time.perf_counter()
    arm.step(2)
    seconds = time.perf_counter() - started - arm.cost["review_seconds"]
    yield (
        f"time: about {duration(seconds * run.steps)} for {run.steps} iterations of {seconds:.2g} s (sampling, scoring "
        "and updating); reviews of the anchor and the final scores come on top"
    )
    yield f"memory: {peak_memory(run.policy.device) / 2**30:.1f} GiB at the peak"
