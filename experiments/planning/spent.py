"""Says how much time each phase of a run took, and how that compares with the planned work of the phase."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from experiments.planning.estimate import Estimate
from experiments.planning.outlook import measured, plan_of, scoring_dtype
from experiments.run.folder import METRICS, PHASES, read_optional
from experiments.run.run import Run


def spent(run: Run) -> Iterator[str]:
    """Yields a line per phase: its seconds, and which share of the machine's rate it reached.

    Yields nothing for a run without iterations. The rate is that of one large matrix product, measured now in the dtype
    of the phase: the target's for scoring, the agent's for the rest. Answers that the target remembered count as work.
    """
    rows = read_optional(run.folder.path / METRICS)
    total = sum(row["seconds"] for row in rows)
    if not total:
        return
    yield f"time: {total:.0f} s for {len(rows)} iterations, without the headroom check and the final choice"
    tokens = sum(row["tokens"] for row in rows)
    work: dict[str, float] = {}
    if plan := plan_of(run):  # it assumes prompts of full length
        lengths = replace(plan.lengths, prompt=round(tokens / len(rows) / plan.responses))
        work = {line.name: line.value for line in Estimate(plan.config, lengths, plan.options).work()}
    work.pop("reviews", None)  # a run may have made more or fewer reviews than planned
    known = {phase: work.pop(phase, 0.0) for phase in ("sampling", "scoring")}
    if run.config.arm == "edits":  # the agent writes phrases, while the plan assumes whole prompts
        known["sampling"] = 0.0
    known["update"] = sum(work.values())
    dtypes = dict.fromkeys(PHASES, run.policy.lm.compute_dtype)
    if known["scoring"]:
        dtypes["scoring"] = scoring_dtype(run)
    rates = {dtype: measured(run.policy.device, dtype).flops * run.policy.ranks.size for dtype in set(dtypes.values())}
    for phase in PHASES:
        if seconds := sum(row.get(f"{phase}_seconds", 0.0) for row in rows):
            told = [f"{seconds / total:.0%}"]
            if phase == "sampling":
                told.append(f"{tokens / seconds:.0f} tokens a second")
            if known.get(phase):
                told.append(f"{known[phase] * len(rows) / seconds / rates[dtypes[phase]]:.0%} of the machine's rate")
            yield f"  {phase:<10}{seconds:>6.0f} s  {', '.join(told)}"
