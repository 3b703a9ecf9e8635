"""Tunes a prompt for a task with APPO.

    appo train --task mnli
    appo train --task sst2 --agent google/gemma-1.1-2b-it --target google/gemma-1.1-2b-it --data hub
    appo train --task rte --seed 1 appo.kl_coef=0.1 prompts=8

Leaves a folder: config.yaml, metrics.jsonl (a row per iteration), prompts.jsonl (a row per scored prompt),
best_prompt.json and report.html. The test split is read once, at the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from appo.trainer import DivergedError, Iteration
from experiments.arms.arm import Arm
from experiments.arms.editing import TestTimeEditing
from experiments.arms.fixed import FixedPrompt
from experiments.arms.untrained import BestOfN, UntrainedEditing
from experiments.config import RunConfig, build_config, resumed_config
from experiments.diagnostics.headroom import look
from experiments.diagnostics.overlap import only_labels, overlap, word_runs
from experiments.report import render_report
from experiments.run.models import save_agent
from experiments.run.run import Run, prepare, stored_config
from experiments.run.runlog import HEADROOM, RESULT
from experiments.run.session import Session
from experiments.terminal.command import Parser, UsageError, in_order
from experiments.terminal.console import Progress, summary
from experiments.terminal.signals import Signals, StoppedError

ARMS: dict[tuple[str, bool], type[Arm]] = {  # (mode, frozen)
    ("fixed", False): FixedPrompt,
    ("tte", False): TestTimeEditing,
    ("fixed", True): BestOfN,
    ("tte", True): UntrainedEditing,
}


def train(run: Run, quiet: bool = False, resume: bool = False) -> dict[str, Any]:
    """Runs all iterations and the final evaluation; returns what best_prompt.json holds.

    Raises:
        StoppedError: a signal came; the iteration was finished, and a checkpoint and a report so far were written.
    """
    config = run.config
    arm = ARMS[config.mode, config.frozen](run)
    session = Session(run, arm)
    for note in [*session.begin(resume), *_fallbacks(run)]:
        print(f"note: {note}", file=sys.stderr)
    if config.headroom and session.iteration == 0:
        seen = look(run, config.headroom)
        run.log.write_json(HEADROOM, seen.as_json())
        if not quiet:
            print(*seen.lines(), sep="\n", file=sys.stderr, flush=True)
    progress = Progress(run.steps, run.reward.metric, quiet, done=session.iteration)
    record = Record(run)
    with Signals() as signals:
        while session.iteration < run.steps:
            session.iteration += 1
            iteration = record.timed(session.iteration, arm)
            progress.show(session.iteration, iteration.stats, arm.pool.leader())
            last = signals.received or session.iteration == run.steps
            if last or session.iteration % config.checkpoint_every == 0:
                session.save()
            if signals.received:
                progress.close()
                run.log.write_text("report.html", render_report(run.log.folder, run.reward.metric))
                raise StoppedError(signals.received)
    progress.close()
    save_agent(run.policy, run.log.folder / "agent")
    result = arm.result()
    run.log.write_json(RESULT, result)
    run.log.write_text("report.html", render_report(run.log.folder, run.reward.metric))
    return result


def _fallbacks(run: Run) -> list[str]:
    """What runs slower than it might."""
    packed = {"agent": run.policy.lm.packed, "target": run.target.described().get("packed", True)}
    slow = [role for role in packed if not packed[role]]
    return [f"the {role} runs in padded batches: its attention cannot run shared beginnings once" for role in slow]


class Record:
    """Writes iterations down: a row of metrics.jsonl each, and a row of prompts.jsonl for every prompt."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.inputs = word_runs(example.input for example in run.data.train)

    def timed(self, number: int, arm: Arm) -> Iteration:
        """Lets the arm make iteration `number`, and writes it down; also one that shows that training has diverged."""
        started = time.perf_counter()
        try:
            iteration = arm.step(number)
        except DivergedError as error:
            self._write(number, error.iteration, time.perf_counter() - started)
            raise
        self._write(number, iteration, time.perf_counter() - started)
        return iteration

    def _write(self, number: int, iteration: Iteration, seconds: float) -> None:
        prompts, rewarded, review = iteration.collected.prompts, iteration.collected.rewarded, iteration.review
        bare = sum(only_labels(prompt, self.run.target.words) for prompt in prompts) / len(prompts)
        row: dict[str, Any] = {"iteration": number, **iteration.stats, "label_list_rate": bare}
        row |= {"seconds": seconds, "anchor": None}
        if review:
            sides = {side: getattr(review, side)._asdict() for side in ("policy_health", "anchor_health")}
            decision = review.decision.value
            row |= {"anchor": decision, "review": vars(review) | {"decision": decision} | sides}
        self.run.log.append("metrics.jsonl", [row])
        columns = {"reward": rewarded.scores.tolist()}
        columns |= {name: values.tolist() for name, values in rewarded.metrics.items()}
        rows = []
        for i, prompt in enumerate(prompts):
            worth = {name: values[i] for name, values in columns.items()}
            rows.append({"iteration": number, "prompt": prompt, **worth, "overlap": overlap(prompt, self.inputs)})
        self.run.log.append("prompts.jsonl", rows)


# -- command line ------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> tuple[RunConfig, bool]:
    """The configuration that the command line asks for, and whether an interrupted run is to go on."""
    parser = Parser(
        prog="appo train",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Any field of experiments/config/ is set by its dotted name, such as appo.kl_coef=0.05 or "
        "sampling.max_new_tokens=100. preset=published takes the published code's values.",
    )
    parser.add_argument("--task", help="a name, see `appo tasks`, or the path of a spec (default: mnli)")
    parser.add_argument("--mode", choices=["fixed", "tte"], help="one prompt, or one for each input (default: fixed)")
    parser.add_argument("--agent", help="writes the prompts: folder or hub id of a causal LM (default: lab)")
    parser.add_argument("--target", help="answers under them: folder or hub id of a causal LM (default: lab)")
    parser.add_argument("--data", help="lab, hub, or a folder of files (default: lab)")
    parser.add_argument("--steps", type=int, help="iterations (default: 100 in the lab, else 100 epochs)")
    parser.add_argument("--seed", type=int, help="of everything random (default: 0)")
    parser.add_argument("--run", help="the run's folder, which must not exist yet (default: runs/TASK-DATE-TIME)")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --run from its last checkpoint")
    parser.add_argument("--config", help="a YAML file of keys")
    parser.add_argument("assignments", nargs="*", metavar="key=value", help="sets any field of the configuration")
    options = vars(parser.parse_intermixed_args(argv))  # key=value anywhere among the options
    assignments, file, resume = options.pop("assignments"), options.pop("config"), options.pop("resume")
    if not resume:
        return build_config(options, file, assignments), False
    if not options["run"]:
        raise UsageError("--resume needs --run, the folder of the run that is to go on")
    return resumed_config(stored_config(Path(options["run"])), options, file, assignments), True


@in_order
def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0; 1: out of memory; 2: a mistake in what was asked for; 3: the first rollout is unsound,
    or training diverged; 70: a fault of the program; 74: the disk is full or cannot be written to; 130 and 143: stopped
    by Ctrl-C or SIGTERM.
    """
    config, resume = parse_args(argv)
    run = prepare(config, resume)
    with run.log.lock():
        try:
            result = train(run, resume=resume)
        except KeyboardInterrupt:
            print(f"--run {run.log.folder} --resume goes on from the last checkpoint", file=sys.stderr)
            raise
    print(f"\n{summary(result, run.log.folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
