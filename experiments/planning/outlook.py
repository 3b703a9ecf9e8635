"""Says before a run what it will take: memory, work, and time at the rates of this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from experiments.planning.estimate import GIB, Estimate, Lengths, Options
from experiments.planning.machines import LAUNCH, STEP, Machine
from experiments.run.models import ModelError
from experiments.run.run import Run
from experiments.terminal.console import duration
from tasks.meta_prompt import meta_prompt, rewrite_prompt

TEMPLATE = 12  # tokens of the target's template around an input, roughly
MEASURED_SHARE = 0.6  # a run reaches this share of the rate of one large product; see docs/benchmarks.md
LAUNCH_ON_CPU = 3e-4  # least seconds per layer


def outlook(run: Run) -> Iterator[tuple[str, str]]:
    """Yields the names and texts of a few lines; nothing if the run cannot be planned."""
    if (plan := plan_of(run)) is None:
        return
    held = plan.memory()
    parts = ", ".join(f"{line.name} {line.value / GIB:.2g}" for line in held if line.value)
    yield "memory", f"{sum(line.value for line in held) / GIB:.2g} GiB held ({parts}), plus what each phase needs"
    if not (work := plan.work()):
        return  # no iterations
    total = sum(line.value for line in work)
    most = ", ".join(f"{line.name} {line.value / total:.0%}" for line in sorted(work, key=lambda line: -line.value)[:3])
    yield "work", f"{total / 1e12:.2g} TFLOP an iteration: {most}"
    machine = measured(run.policy.device, run.policy.lm.compute_dtype)
    if (scores_in := scoring_dtype(run)) != run.policy.lm.compute_dtype:
        machine = machine._replace(target_flops=measured(run.policy.device, scores_in).flops)
    seconds = plan.seconds(machine) / run.policy.ranks.size
    each = f"{seconds:.2g} s" if seconds < 100 else duration(seconds)
    how = "from the rate of a matrix product just now; the progress bar will know better"
    yield "expected", f"about {each} an iteration and {duration(seconds * run.steps)} for all of them, {how}"


def scoring_dtype(run: Run) -> torch.dtype:
    """Returns what the target of a run computes in; it is not on a server."""
    found: torch.dtype = getattr(torch, run.target.described()["computes_in"])
    return found


def plan_of(run: Run) -> Estimate | None:
    """Returns the plan of a run; None if a model cannot be planned (see `appo plan`) or the target is on a server."""
    bfloat16, recorded = run.policy.lm.compute_dtype == torch.bfloat16, run.policy.device.type == "cuda"
    options = Options.of(run.config, bfloat16, recorded, run.policy.ranks.size)
    try:
        return None if run.served else Estimate(run.config, lengths_of(run), options)
    except ModelError:
        return None


def lengths_of(run: Run) -> Lengths:
    """Returns the lengths of a run's texts, with the mean length of its inputs, and of its data."""
    data, lm = run.data.train, run.policy.lm
    pairs = data[: run.config.examples.pairs]
    asked = meta_prompt(pairs) if run.config.mode == "fixed" else rewrite_prompt(pairs, data[-1].input, run.instruction)
    query = len(run.policy.query(*asked).tokens)
    tokens = lm.tokenizer([example.input for example in data])["input_ids"]
    example = sum(map(len, tokens)) // len(tokens) + TEMPLATE
    return Lengths(query, run.config.sampling.max_new_tokens, example, run.steps, len(data))


def measured(device: torch.device, dtype: torch.dtype) -> Machine:
    """Measures this machine by the time of a matrix product and of a copy, about a fiftieth of a second each."""
    size = 4096 if device.type == "cuda" else 768
    a = torch.randn(size, size, device=device, dtype=dtype)
    seconds = _quickest(lambda: a @ a, device)
    flops = 2.0 * size**3 / seconds
    bandwidth = 2.0 * a.nbytes / _quickest(a.clone, device)
    launch, step = (LAUNCH, STEP) if device.type == "cuda" else (LAUNCH_ON_CPU, LAUNCH_ON_CPU)
    return Machine("this machine", 0.0, flops, bandwidth, launch, step, MEASURED_SHARE)


def _quickest(work: Callable[[], object], device: torch.device) -> float:
    """Returns the shortest of three times, after one run to warm up."""
    times = []
    for _ in range(4):
        started = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - started)
    return min(times[1:])
