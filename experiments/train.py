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
from collections.abc import Mapping, Sequence
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
from experiments.headroom import look
from experiments.models import save_agent
from experiments.report import render_report
from experiments.runlog import HEADROOM, PromptPool
from experiments.session import Run, Session, begin, meta_query, prepare, stored_config, stream
from experiments.signals import Signals, StoppedError
from experiments.statistics import compared, interval
from rewards.reward import ClassificationReward, by_example
from tasks.meta_prompt import as_lines
from tasks.spec import SPLITS, Example

EDITS_SHOWN = 5  # instructions for single inputs that the result quotes
NO_BETTER = "no prompt better than the manual one was found"
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
    if config.headroom and session.iteration == 0:
        seen = look(run, config.headroom)
        run.log.write_json(HEADROOM, seen.as_json())
        if not quiet:
            print(*seen.lines(), sep="\n", file=sys.stderr, flush=True)
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
    queries, reward_fn = _ask(run, session.batches.next(), session.streams["pairs"])
    if session.iteration == 1:
        generator = torch.Generator(run.policy.device).manual_seed(0)
        self_check(run.policy, trainer.anchor, run.policy.sample(queries, generator))
    try:
        stats = _explore(trainer, queries, reward_fn) if run.config.frozen else trainer.step(queries, reward_fn)
    except DivergedError as error:
        _record(session, error.stats, None, time.perf_counter() - started)
        raise
    review = _review(run, trainer, session.streams["review"]) if _review_due(run, session.iteration) else None
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
        return [meta_query(run, batch, rng)] * count, lambda prompts: run.reward(prompts, batch)
    queries = [query for example in batch for query in [run.editor.query(example.input, rng)] * count]
    asked = [example for example in batch for _ in range(count)]
    return queries, lambda prompts: run.reward.each(prompts, asked)


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
    queries = [meta_query(run, (), rng) for _ in range(run.config.anchor.prompts)]
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
        sides = {side: getattr(review, side)._asdict() for side in ("policy_health", "anchor_health")}
        row |= {"anchor": review.decision.value, "review": vars(review) | {"decision": review.decision.value} | sides}
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

    The manual prompt (and few-shot prompts, if wanted) stand for election too, so that nobody ends with less on
    validation than they had; of equal ones the manual prompt wins. The winner alone is the result. The paper's own
    number, the best of the top five *on test*, is selection on the test split; it stands beside the result under its
    name, to compare with published tables.
    """
    manual = run.data.spec.manual_prompt
    tuned = [entry.prompt for entry in pool.best(run.config.pool)]
    candidates = [manual, *few_shot_prompts(run), *tuned]
    validation = by_example(run.reward, candidates, run.data.validation)
    rewards = run.reward(candidates, run.data.validation).scores
    if not rewards.isfinite().any():
        raise FloatingPointError("no prompt has a finite score on the validation split; see metrics.jsonl")
    rewards = rewards.nan_to_num(-math.inf)
    scores = validation.mean(1).tolist()
    best = max(range(len(candidates)), key=lambda i: (scores[i], rewards[i].item(), -i))
    best = best if scores[best] > scores[0] else 0
    published = tuned[:PAPER_POOL] or [manual]
    test = by_example(run.reward, [*published, manual, candidates[best]], run.data.test)
    return {
        "prompt": candidates[best],
        "chosen": "manual" if best == 0 else "tuned" if candidates[best] in tuned else "few-shot",
        **_described(run),
        **_scores({"validation": validation[best], "test": test[-1]}, {"validation": validation[0], "test": test[-2]}),
        "answers_on_test": _answers(run, {"best": candidates[best], "manual": manual}),
        "paper_protocol": {
            "name": f"best of the top {len(published)} by training reward, chosen on test",
            "test_score": test[:-2].mean(1).max().item(),
        },
    }


def few_shot_prompts(run: Run) -> list[str]:
    """The manual prompt with training pairs behind it, drawn anew for each."""
    rng, count = stream(run.config.seed, "few-shot"), min(run.config.examples.pairs, len(run.data.train))
    drawn = [rng.sample(run.data.train, count) for _ in range(run.config.few_shot)]
    return [f"{run.data.spec.manual_prompt}\n{as_lines(pairs)}\n" for pairs in drawn]


def finish_editing(run: Run) -> dict[str, Any]:
    """Lets the agent write its likeliest instruction for every input of validation and test; returns the result.

    Where the manual prompt does no worse on validation, it is the result: `prompt` holds it, in place of null.
    """
    written, edits, manual = {}, {}, {}
    for split in SPLITS[1:]:
        examples = getattr(run.data, split)
        written[split] = run.editor.write([example.input for example in examples])
        edits[split] = run.reward.each(written[split], examples).metrics[run.reward.metric]
        manual[split] = by_example(run.reward, [run.data.spec.manual_prompt], examples)[0]
    better = edits["validation"].mean() > manual["validation"].mean()
    shown_edits = zip(run.data.test[:EDITS_SHOWN], written["test"], strict=False)
    return {
        "prompt": None if better else run.data.spec.manual_prompt,
        "chosen": "edits" if better else "manual",
        "edits": [{"input": example.input, "prompt": prompt} for example, prompt in shown_edits],
        "edits_validation_score": edits["validation"].mean().item(),
        "edits_test_score": edits["test"].mean().item(),
        **_described(run),
        **_scores(edits if better else manual, manual),
    }


def _scores(best: Mapping[str, Tensor], manual: Mapping[str, Tensor]) -> dict[str, Any]:
    """What validation and test say of the result and of the manual prompt; of each split the values of its rows."""
    same = torch.equal(best["validation"], manual["validation"]) and torch.equal(best["test"], manual["test"])
    scores: dict[str, Any] = {}
    for split in SPLITS[1:]:
        scores[f"{split}_rows"] = len(best[split])
        for name, values in ((split, best[split]), (f"manual_{split}", manual[split])):
            scores[f"{name}_score"] = values.mean().item()
            scores[f"{name}_interval"] = interval(values.tolist())
    scores["verdict"] = NO_BETTER if same else compared(best["test"].tolist(), manual["test"].tolist())
    return scores


def _answers(run: Run, prompts: Mapping[str, str]) -> dict[str, dict[str, float]]:
    """How the target's answers on test are spread over the labels under some prompts, and what is right."""
    if not isinstance(run.reward, ClassificationReward):
        return {}
    said = {name: run.reward.answers(prompt, run.data.test) for name, prompt in prompts.items()}
    said["right"] = [example.answer for example in run.data.test]
    return {
        name: {word: answers.count(word) / len(answers) for word in run.data.words} for name, answers in said.items()
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
        "manual_prompt": spec.manual_prompt,
        "fingerprint": run.fingerprint,
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
