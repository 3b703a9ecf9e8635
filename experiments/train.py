"""Tunes a prompt for a task with APPO.

    appo train --task mnli
    appo train --task sst2 --agent google/gemma-1.1-2b-it --target google/gemma-1.1-2b-it --data hub
    appo train --task rte --seed 1 appo.kl_coef=0.1 prompts=8

Leaves a folder: config.yaml, metrics.jsonl (a row per iteration), prompts.jsonl (a row per scored prompt),
best_prompt.json and report.html. The test split is read once, at the end.
"""

from __future__ import annotations

import math
import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from appo.rollout import Query
from appo.selfcheck import self_check
from appo.trainer import AnchorReview, APPOTrainer, DivergedError, RewardFn
from experiments.command import Parser, UsageError, in_order
from experiments.config import RunConfig, build_config, resumed_config
from experiments.console import Progress, summary
from experiments.hacking import only_labels, overlap
from experiments.models import save_agent
from experiments.report import render_report
from experiments.runlog import PromptPool
from experiments.session import Run, Session, begin, prepare, stored_config
from experiments.signals import Signals, StoppedError
from tasks.task import SPLITS, Example, meta_prompt

EDITS_SHOWN = 5  # instructions for single inputs that the result quotes
PAPER_POOL = 5  # prompts that the paper runs on test, to report the best of them [P, 4.1]


# -- the loop ----------------------------------------------------------------------------------------------------


def train(run: Run, quiet: bool = False, resume: bool = False) -> dict[str, Any]:
    """Runs all iterations and the final evaluation; returns what best_prompt.json holds.

    Raises:
        StoppedError: a signal came; the iteration was finished, and a checkpoint and a report so far were written.
    """
    config, session = run.config, Session(run)
    for note in begin(session, resume):
        print(f"note: {note}", file=sys.stderr)
    progress = Progress(run.steps, run.reward.metric, quiet, done=session.iteration)
    with Signals() as signals:
        while session.iteration < run.steps:
            session.iteration += 1
            stats = iterate(session)
            progress.show(session.iteration, stats, session.pool)
            last = signals.received or session.iteration == run.steps
            if last or session.iteration % config.checkpoint_every == 0:
                session.save()
            if signals.received:
                progress.close()
                run.log.write_text("report.html", render_report(run.log.folder, run.reward.metric))
                raise StoppedError(signals.received)
    progress.close()
    save_agent(run.policy, run.log.folder / "agent")
    result = finish_editing(run) if config.mode == "tte" else finish(run, session.pool)
    run.log.write_json("best_prompt.json", result)
    run.log.write_text("report.html", render_report(run.log.folder, run.reward.metric))
    return result


def iterate(session: Session) -> dict[str, float]:
    """One iteration, logged; returns its statistics."""
    run, trainer, started = session.run, session.trainer, time.perf_counter()
    queries, reward_fn = _ask(run, session.batches.next(), session.rng)
    if session.iteration == 1:
        generator = torch.Generator(run.policy.device).manual_seed(0)
        self_check(run.policy, trainer.anchor, run.policy.sample(queries, generator))
    try:
        stats = _explore(trainer, queries, reward_fn) if run.config.frozen else trainer.step(queries, reward_fn)
    except DivergedError as error:
        _record(session, error.stats, None, time.perf_counter() - started)
        raise
    review = _review(run, trainer, session.rng) if _review_due(run, session.iteration) else None
    _record(session, stats, review, time.perf_counter() - started)
    return stats


def _explore(trainer: APPOTrainer, queries: Sequence[Query], reward_fn: RewardFn) -> dict[str, float]:
    """What `trainer.step` does, without the update: best-of-N sampling."""
    collected = trainer.collect(queries, reward_fn)
    trainer.buffer.clear()
    return collected.stats()


def _ask(run: Run, batch: Sequence[Example], rng: random.Random) -> tuple[list[Query], RewardFn]:
    """What the agent is asked in one iteration, and what its answers are worth."""
    count = run.config.prompts
    if run.config.mode == "fixed":
        return [_query(run, batch, rng)] * count, lambda prompts: run.reward(prompts, batch)
    queries = [query for example in batch for query in [run.editor.query(example.input, rng)] * count]
    asked = [example for example in batch for _ in range(count)]
    return queries, lambda prompts: run.reward.each(prompts, asked)


def _query(run: Run, batch: Sequence[Example], rng: random.Random) -> Query:
    """A meta-prompt of training pairs, by preference none that the prompts are about to be scored on."""
    scored = set(batch)
    others = [example for example in run.data.train if example not in scored]
    count = min(run.config.examples.pairs, len(run.data.train))
    pairs = rng.sample(others if len(others) >= count else run.data.train, count)
    return run.policy.query(*meta_prompt(pairs))


def _review_due(run: Run, iteration: int) -> bool:
    every = run.config.anchor.period * run.steps_per_epoch
    return run.config.appo.reference == "anchor" and not run.config.frozen and iteration % every == 0


def _review(run: Run, trainer: APPOTrainer, rng: random.Random) -> AnchorReview:
    """Agent against anchor on the validation split; the pairs come from the training split as always."""
    if run.config.mode == "tte":
        queries = [run.editor.query(example.input, rng) for example in run.data.validation]
        return trainer.review_anchor(
            queries, lambda prompts: run.reward.each(prompts, run.data.validation).metrics[run.reward.metric].tolist()
        )
    queries = [_query(run, (), rng) for _ in range(run.config.anchor.prompts)]
    return trainer.review_anchor(
        queries, lambda prompts: run.reward(prompts, run.data.validation).metrics[run.reward.metric].tolist()
    )


def _record(session: Session, stats: dict[str, float], review: AnchorReview | None, seconds: float) -> None:
    run, collected = session.run, session.trainer.collected
    assert collected is not None
    prompts, rewarded = collected.prompts, collected.rewarded
    rewards = rewarded.scores.tolist()
    if run.config.mode == "fixed":
        session.pool.add(prompts, rewards)
    bare = sum(only_labels(prompt, run.reward.target.verbalizer.words) for prompt in prompts) / len(prompts)
    row: dict[str, Any] = {"iteration": session.iteration, **stats, "label_list_rate": bare}
    row |= {"seconds": seconds, "anchor": None}
    if review:
        row |= {"anchor": review.decision.value, "review": vars(review) | {"decision": review.decision.value}}
    run.log.append("metrics.jsonl", [row])
    names = list(rewarded.metrics)
    rows = []
    for prompt, reward, *values in zip(prompts, rewards, *(rewarded.metrics[n].tolist() for n in names), strict=True):
        metrics = dict(zip(names, values, strict=True))
        rows.append({"iteration": session.iteration, "prompt": prompt, "reward": reward, **metrics})
        rows[-1]["overlap"] = overlap(prompt, session.inputs)
    run.log.append("prompts.jsonl", rows)


def finish(run: Run, pool: PromptPool) -> dict[str, Any]:
    """Chooses the winner on validation and runs it on test; returns the result.

    The winner alone is the result. The paper's own number, the best of the top five *on test*, is selection on
    the test split; it stands beside the result under its name, to compare with published tables.
    """
    spec, test = run.data.spec, run.data.test
    candidates = [entry.prompt for entry in pool.best(run.config.pool)] or [spec.manual_prompt]
    validation = run.reward([*candidates, spec.manual_prompt], run.data.validation)
    best = _best(validation.scores[: len(candidates)])
    published = candidates[:PAPER_POOL]
    tested = run.reward([*published, candidates[best], spec.manual_prompt], test).metrics[run.reward.metric].tolist()
    return {
        "prompt": candidates[best],
        **_described(run),
        "validation_score": validation.metrics[run.reward.metric][best].item(),
        "test_score": tested[-2],
        "manual_prompt": spec.manual_prompt,
        "manual_validation_score": validation.metrics[run.reward.metric][-1].item(),
        "manual_test_score": tested[-1],
        "paper_protocol": {
            "name": f"best of the top {len(published)} by training reward, chosen on test",
            "test_score": max(filter(math.isfinite, tested[:-2]), default=math.nan),
        },
    }


def _best(scores: Tensor) -> int:
    """The place of the highest score; NaN, which argmax would prefer, is none."""
    finite = scores.isfinite()
    if not finite.any():
        raise FloatingPointError("no prompt has a finite score on the validation split; see metrics.jsonl")
    return int(scores.masked_fill(~finite, -torch.inf).argmax())


def finish_editing(run: Run) -> dict[str, Any]:
    """Lets the agent write its likeliest instruction for every input of validation and test; returns the result."""
    written = {split: run.editor.write([e.input for e in getattr(run.data, split)]) for split in SPLITS[1:]}
    metric, manual = run.reward.metric, run.data.spec.manual_prompt
    scores = {}
    for split, prompts in written.items():
        examples = getattr(run.data, split)
        scores[split] = run.reward.each(prompts, examples).metrics[metric].mean().item()
        scores[f"manual {split}"] = run.reward([manual], examples).metrics[metric].item()
    shown = zip(run.data.test[:EDITS_SHOWN], written["test"], strict=False)
    return {
        "prompt": None,
        "edits": [{"input": example.input, "prompt": prompt} for example, prompt in shown],
        **_described(run),
        "validation_score": scores["validation"],
        "test_score": scores["test"],
        "manual_prompt": manual,
        "manual_validation_score": scores["manual validation"],
        "manual_test_score": scores["manual test"],
    }


def _described(run: Run) -> dict[str, Any]:
    """What else is needed to use a result."""
    spec = run.data.spec
    return {
        "task": spec.name,
        "mode": run.config.mode,
        "template": spec.template,
        "verbalizer": spec.verbalizer,
        "metric": run.reward.metric,
        "target": run.config.target,
        "seed": run.config.seed,
    }


# -- command line ------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> tuple[RunConfig, bool]:
    """The configuration that the command line asks for, and whether an interrupted run is to go on."""
    parser = Parser(
        prog="appo train",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Any field of experiments/config.py is set by its dotted name, such as appo.kl_coef=0.05 or "
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
