"""Tunes a prompt for a task with APPO.

    appo train --task mnli
    appo train --task sst2 --agent google/gemma-1.1-2b-it --target google/gemma-1.1-2b-it --data hub
    appo train --task rte --seed 1 appo.kl_coef=0.1 prompts=8

Writes a folder: config.yaml, metrics.jsonl (a row per iteration), prompts.jsonl (a row per scored prompt),
best_prompt.json and report.html. The test split is read once, at the end.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
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
from experiments.page.run_page import render_report
from experiments.run.folder import CANDIDATES, HEADROOM, METRICS, PREDICTIONS, PROMPTS, RESULT
from experiments.run.loggers import Log, final_scores, loggers
from experiments.run.models import save_agent
from experiments.run.resume import begin, save
from experiments.run.run import Run, prepare, stored_config
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
    with ExitStack() as open_loggers:
        return _train(run, quiet, resume, open_loggers)


def _train(run: Run, quiet: bool, resume: bool, open_loggers: ExitStack) -> dict[str, Any]:
    config = run.config
    arm = ARMS[config.mode, config.frozen](run)
    done, notes = begin(run, arm, resume)
    for note in [*notes, *_fallbacks(run)]:
        print(f"note: {note}", file=sys.stderr)
    if config.headroom and done == 0:
        seen = look(run, config.headroom)
        run.folder.write_json(HEADROOM, seen.as_json())
        if not quiet:
            print(*seen.lines(), sep="\n", file=sys.stderr, flush=True)
    progress = Progress(run.steps, run.reward.metric, quiet, done)
    log = open_loggers.enter_context(loggers(config, run.folder, done))
    record = Record(run, log)
    with Signals() as signals:
        for number in range(done + 1, run.steps + 1):
            iteration = record.timed(number, arm)
            progress.show(number, iteration.stats, arm.pool.leader())
            last = signals.received or number == run.steps
            if last or number % config.checkpoint_every == 0:
                save(run, arm, number)
            if signals.received:
                progress.close()
                run.folder.write_text("report.html", render_report(run.folder.path, run.reward.metric))
                raise StoppedError(signals.received)
    progress.close()
    save_agent(run.policy, run.folder.path / "agent")
    result, candidates, predictions = arm.result()
    run.folder.write_rows(CANDIDATES, candidates)
    run.folder.write_rows(PREDICTIONS, predictions)
    run.folder.write_json(RESULT, result)
    log(run.steps, final_scores(result))
    run.folder.write_text("report.html", render_report(run.folder.path, run.reward.metric))
    return result


def _fallbacks(run: Run) -> list[str]:
    """Notes on models that run slower than they could."""
    packed = {"agent": run.policy.lm.packed, "target": run.target.described().get("packed", True)}
    slow = [role for role in packed if not packed[role]]
    return [f"the {role} runs in padded batches: its attention cannot run shared prefixes once" for role in slow]


class Record:
    """Logs iterations: a row of metrics.jsonl for each, which `log` gets too, and one of prompts.jsonl per prompt."""

    def __init__(self, run: Run, log: Log) -> None:
        self.run, self.log = run, log
        self.inputs = word_runs(example.input for example in run.data.train)

    def timed(self, number: int, arm: Arm) -> Iteration:
        """Runs iteration `number` of the arm and logs it, also if it raises DivergedError."""
        started = time.perf_counter()
        try:
            iteration = arm.step(number)
        except DivergedError as error:
            self._write(number, error.iteration, time.perf_counter() - started, arm.cost)
            raise
        self._write(number, iteration, time.perf_counter() - started, arm.cost)
        return iteration

    def _write(self, number: int, iteration: Iteration, seconds: float, cost: Mapping[str, float]) -> None:
        prompts, rewarded, review = iteration.collected.prompts, iteration.collected.rewarded, iteration.review
        bare = sum(only_labels(prompt, self.run.target.words) for prompt in prompts) / len(prompts)
        row: dict[str, Any] = {"iteration": number, **iteration.stats, "label_list_rate": bare}
        row |= {"seconds": seconds, **cost, "tokens": int(iteration.collected.rollout.mask.sum()), "anchor": None}
        if review:
            sides = {side: getattr(review, side)._asdict() for side in ("policy_health", "anchor_health")}
            decision = review.decision.value
            row |= {"anchor": decision, "review": vars(review) | {"decision": decision} | sides}
        self.run.folder.append(METRICS, [row])
        self.log(number, row)
        columns = {"reward": rewarded.scores.tolist()}
        columns |= {name: values.tolist() for name, values in rewarded.metrics.items()}
        rows = []
        for i, prompt in enumerate(prompts):
            worth = {name: values[i] for name, values in columns.items()}
            rows.append({"iteration": number, "prompt": prompt, **worth, "overlap": overlap(prompt, self.inputs)})
        self.run.folder.append(PROMPTS, rows)


# -- command line ------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> tuple[RunConfig, bool]:
    """The configuration that the command line asks for, and whether to resume an interrupted run."""
    parser = Parser(
        prog="appo train",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Any field of experiments/config/ is set by its dotted name, such as appo.kl_coef=0.05 or "
        "sampling.max_new_tokens=100. preset=published takes the published code's values.",
    )
    parser.add_argument("--task", help="a name, see `appo tasks`, or the path of a spec (default: mnli)")
    parser.add_argument("--mode", choices=["fixed", "tte"], help="one prompt, or one for each input (default: fixed)")
    parser.add_argument("--agent", help="model that writes the prompts: folder or hub id of a causal LM (default: lab)")
    parser.add_argument("--target", help="model that is prompted: folder or hub id of a causal LM (default: lab)")
    parser.add_argument("--data", help="lab, hub, or a folder of files (default: lab)")
    parser.add_argument("--steps", type=int, help="iterations (default: lab 100, or 200 in mode tte; else 100 epochs)")
    parser.add_argument("--seed", type=int, help="seed of everything random (default: 0)")
    parser.add_argument("--run", help="the run's folder, which must not exist yet (default: runs/TASK-DATE-TIME)")
    parser.add_argument("--resume", action="store_true", help="resume the run in --run from its last checkpoint")
    parser.add_argument("--config", help="a YAML file of configuration keys")
    parser.add_argument("assignments", nargs="*", metavar="key=value", help="sets any field of the configuration")
    options = vars(parser.parse_intermixed_args(argv))  # key=value anywhere among the options
    assignments, file, resume = options.pop("assignments"), options.pop("config"), options.pop("resume")
    if not resume:
        return build_config(options, file, assignments), False
    if not options["run"]:
        raise UsageError("--resume needs --run, the folder of the run to resume")
    return resumed_config(stored_config(Path(options["run"])), options, file, assignments), True


@in_order
def main(argv: Sequence[str]) -> int:
    """Returns the exit code: 0; 1: out of memory; 2: a mistake in what was asked for; 3: the first rollout is unsound,
    or training diverged; 70: a fault of the program; 74: a file cannot be read or written; 130 and 143: stopped
    by Ctrl-C or SIGTERM.
    """
    config, resume = parse_args(argv)
    run = prepare(config, resume)
    with run.folder.lock():
        try:
            result = train(run, resume=resume)
        except KeyboardInterrupt:
            print(f"--run {run.folder.path} --resume goes on from the last checkpoint", file=sys.stderr)
            raise
    print(f"\n{summary(result, run.folder.path)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
