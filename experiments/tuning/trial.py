"""A dry run measures on two iterations how long a run would take and how much memory, and how much it could gain."""

from __future__ import annotations

import time
from collections.abc import Iterator

from experiments.diagnostics.headroom import look
from experiments.run.models import peak_memory
from experiments.run.run import Run
from experiments.terminal.console import duration
from experiments.tuning.loop import arm_of

LOOKED_AT = 16  # prompts of the untrained agent to score, if the configuration asks for no headroom check


def trial(run: Run) -> Iterator[str]:
    """Checks the headroom and makes two iterations; yields what they tell, and writes nothing.

    The second iteration is timed, since the first checks itself and warms up. The time of a review is left out.
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
        "and updating), without reviews of the anchor and the final scores"
    )
    yield f"memory: {peak_memory(run.policy.device) / 2**30:.1f} GiB at the peak"
