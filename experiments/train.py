"""Tunes a prompt for a task with APPO.

    python -m experiments.train --task mnli
    python -m experiments.train --task sst2 --agent google/gemma-1.1-2b-it --target google/gemma-1.1-2b-it --data hub
    python -m experiments.train --task rte --seed 1 appo.kl_coef=0.1 prompts=8

Leaves a folder: config.yaml, metrics.jsonl (a row per iteration), prompts.jsonl (a row per scored prompt),
best_prompt.json and report.html. The test split is read once, at the end.
"""

from __future__ import annotations

import argparse
import math
import platform
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
import yaml

from appo.policy import Policy
from appo.rollout import Query
from appo.selfcheck import SelfCheckError, self_check
from appo.trainer import AnchorReview, APPOTrainer, RewardFn
from experiments.config import LAB, ConfigError, RunConfig, build_config, to_dict
from experiments.console import Progress, summary
from experiments.editing import Editor
from experiments.models import LAB_DIR, ModelError, load_model, save_agent
from experiments.report import render_report
from experiments.runlog import PromptPool, RunExistsError, RunLog
from rewards.reward import ClassificationReward, GenerationReward
from rewards.target import ContextTooLongError, TargetModel
from tasks.sources import load_task
from tasks.task import SPLITS, Example, TaskData, TaskError, meta_prompt, rewrite_prompt

EDITS_SHOWN = 5  # instructions for single inputs that the result quotes
PAPER_POOL = 5  # prompts that the paper runs on test, to report the best of them [P, 4.1]
USER_ERRORS = (ConfigError, TaskError, ModelError, RunExistsError, ContextTooLongError)


@dataclass(frozen=True)
class Run:
    """The parts of a run, wired together; built by `prepare`, consumed by `train`."""

    config: RunConfig
    data: TaskData
    policy: Policy
    reward: ClassificationReward | GenerationReward
    log: RunLog

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.data.train) / self.config.examples.batch_size)

    @property
    def steps(self) -> int:
        return self.config.steps or self.config.epochs * self.steps_per_epoch

    @property
    def editor(self) -> Editor:
        """The agent as a writer of instructions for single inputs."""
        instruction = self.data.spec.manual_prompt if self.config.edit_manual else ""
        return Editor(self.policy, self.data.train, self.config.examples.pairs, instruction)


def open_run(folder: Path) -> Run:
    """A run that is done, with the agent that it left behind, to be used.

    Raises:
        ConfigError: the folder holds no finished run.
    """
    for name in ("config.yaml", "best_prompt.json", "agent"):
        if not (folder / name).exists():
            raise ConfigError(f"{str(folder)!r} holds no {name}; expected the folder of a finished run")
    options = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    options.pop("environment", None)
    config = build_config(options | {"agent": str(folder / "agent")})
    return _assemble(config, RunLog(folder, new=False))


def prepare(config: RunConfig) -> Run:
    """Loads data and models, and refuses what cannot work, before anything is written."""
    folder = Path(config.run or f"runs/{Path(config.task).stem}-{datetime.now():%Y%m%d-%H%M%S}")
    return _assemble(config, RunLog(folder))


def _assemble(config: RunConfig, log: RunLog) -> Run:
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    options = config.examples
    data = load_task(config.task, data_source(config.task, config.data), options.shots, config.seed, options.test_limit)
    agent, target = (load_model(config, role) for role in ("agent", "target"))
    policy = Policy(agent.model, agent.tokenizer, config.sampling, chat=config.agent_chat)
    scorer = TargetModel(target.model, target.tokenizer, data.spec.template, data.words, config.target_chat)
    run = Run(config, data, policy, _reward(config, data, scorer), log)
    _check_context(run)
    return run


def data_source(task: str, data: str) -> str:
    """Where a task's data are: the lab's folder for "lab", except that a spec of one's own lies beside its files."""
    if data != LAB:
        return data
    return str(Path(task).parent) if task.endswith((".yaml", ".yml")) else str(LAB_DIR / "data")


def _reward(config: RunConfig, data: TaskData, target: TargetModel) -> ClassificationReward | GenerationReward:
    weights = config.reward
    if data.spec.kind == "text":
        return GenerationReward(
            target, data.spec.metric, weights.metric_weight, weights.likelihood_weight, weights.answer_tokens
        )
    return ClassificationReward(target, weights.accuracy_weight, weights.margin_weight)


def _check_context(run: Run) -> None:
    """Refuses meta-prompts that do not fit the agent, and inputs that leave the target no room for a prompt."""
    longest = sorted(run.data.train, key=lambda e: -len(e.input))[: run.config.examples.pairs]
    every = (example.input for split in (run.data.train, run.data.validation, run.data.test) for example in split)
    longest_input = max(every, key=len)
    asked = meta_prompt(longest)
    if run.config.mode == "tte":
        asked = rewrite_prompt(longest, longest_input, run.editor.instruction)
    try:
        run.policy.check_fits(run.policy.query(*asked))
    except ValueError as error:
        raise ConfigError(f"{error}; use fewer examples.pairs or a lower sampling.max_new_tokens") from error
    answer = run.config.reward.answer_tokens if run.data.spec.kind == "text" else 0
    run.reward.target.check_fits(run.config.sampling.max_new_tokens + answer, longest_input)
    run.reward.target.check_fits(run.data.spec.manual_prompt, longest_input)


# -- the loop ----------------------------------------------------------------------------------------------------


def train(run: Run, quiet: bool = False) -> dict[str, Any]:
    """Runs all iterations and the final evaluation; returns what best_prompt.json holds."""
    config, pool = run.config, PromptPool()
    device = run.policy.device
    trainer = APPOTrainer(
        run.policy, config.appo, config.anchor, torch.Generator(device).manual_seed(config.seed)
    )  # fmt: skip
    rng = random.Random(config.seed)
    batches = _batches(run.data.train, config.examples.batch_size, rng)
    run.log.write_config(to_dict(config) | {"environment": environment(run)})
    progress = Progress(run.steps, run.reward.metric, quiet)
    for iteration in range(1, run.steps + 1):
        started = time.perf_counter()
        queries, reward_fn = _ask(run, next(batches), rng)
        if iteration == 1:
            self_check(run.policy, trainer.anchor, run.policy.sample(queries, torch.Generator(device).manual_seed(0)))
        stats = _explore(trainer, queries, reward_fn) if config.frozen else trainer.step(queries, reward_fn)
        review = _review(run, trainer, rng) if _review_due(run, iteration) else None
        seconds = time.perf_counter() - started
        _record(run, pool, trainer, iteration, stats, review, seconds)
        progress.show(iteration, stats, pool)
    progress.close()
    save_agent(run.policy, run.log.folder / "agent")
    result = finish_editing(run) if config.mode == "tte" else finish(run, pool)
    run.log.write_json("best_prompt.json", result)
    run.log.write_text("report.html", render_report(run.log.folder))
    return result


def _explore(trainer: APPOTrainer, queries: Sequence[Query], reward_fn: RewardFn) -> dict[str, float]:
    """What `trainer.step` does, without the update: best-of-N sampling."""
    collected = trainer.collect(queries, reward_fn)
    trainer.buffer.clear()
    return collected.stats()


def _batches(examples: Sequence[Example], size: int, rng: random.Random) -> Iterator[list[Example]]:
    """Endless epochs of shuffled batches; the last of an epoch may be smaller."""
    while True:
        order = rng.sample(examples, len(examples))
        yield from (order[i : i + size] for i in range(0, len(order), size))


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


def _record(
    run: Run,
    pool: PromptPool,
    trainer: APPOTrainer,
    iteration: int,
    stats: dict[str, float],
    review: AnchorReview | None,
    seconds: float,
) -> None:
    assert trainer.collected is not None
    prompts, rewarded = trainer.collected.prompts, trainer.collected.rewarded
    rewards = rewarded.scores.tolist()
    if run.config.mode == "fixed":
        pool.add(prompts, rewards)
    row: dict[str, Any] = {"iteration": iteration, **stats, "seconds": seconds, "anchor": None}
    if review:
        row |= {"anchor": review.decision.value, "review": vars(review) | {"decision": review.decision.value}}
    run.log.append("metrics.jsonl", [row])
    names = list(rewarded.metrics)
    columns = zip(prompts, rewards, *(rewarded.metrics[name].tolist() for name in names), strict=True)
    run.log.append(
        "prompts.jsonl",
        [
            {"iteration": iteration, "prompt": prompt, "reward": reward, **dict(zip(names, values, strict=True))}
            for prompt, reward, *values in columns
        ],
    )


def finish(run: Run, pool: PromptPool) -> dict[str, Any]:
    """Chooses the winner on validation and runs it on test; returns the result.

    The winner alone is the result. The paper's own number, the best of the top five *on test*, is selection on
    the test split; it stands beside the result under its name, to compare with published tables.
    """
    spec, test = run.data.spec, run.data.test
    candidates = [entry.prompt for entry in pool.best(run.config.pool)] or [spec.manual_prompt]
    validation = run.reward([*candidates, spec.manual_prompt], run.data.validation)
    best = int(validation.scores[: len(candidates)].argmax())
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
            "test_score": max(tested[:-2]),
        },
    }


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


def environment(run: Run) -> dict[str, Any]:
    """What else the results depend on: versions, device, threads, and whether chat templates were used."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "datasets", "numpy")},
        "device": str(run.policy.device),
        "threads": torch.get_num_threads(),
        "agent_chat": run.policy.chat,
        "target_chat": run.reward.target.chat,
        "steps": run.steps,
    }


# -- command line ------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None = None) -> RunConfig:
    """The configuration that the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.train",
        description=(__doc__ or "").split("\n\n")[0],
        epilog="Any field of experiments/config.py is set by its dotted name, such as appo.kl_coef=0.05 or "
        "sampling.max_new_tokens=100. preset=published takes the published code's values.",
    )
    parser.add_argument("--task", help="a name, see `make tasks`, or the path of a spec (default: mnli)")
    parser.add_argument("--agent", help="writes the prompts: folder or hub id of a causal LM (default: lab)")
    parser.add_argument("--target", help="answers under them: folder or hub id of a causal LM (default: lab)")
    parser.add_argument("--data", help="lab, hub, or a folder of .jsonl, .tsv, .csv or .parquet files (default: lab)")
    parser.add_argument("--mode", choices=["fixed", "tte"], help="one prompt, or one for each input (default: fixed)")
    parser.add_argument("--steps", type=int, help="iterations (default: 100 in the lab, else 100 epochs)")
    parser.add_argument("--seed", type=int, help="of everything random (default: 0)")
    parser.add_argument("--run", help="the run's folder, which must not exist yet (default: runs/TASK-DATE-TIME)")
    parser.add_argument("--config", help="a YAML file of keys")
    parser.add_argument("assignments", nargs="*", metavar="key=value", help="sets any field of the configuration")
    options = vars(parser.parse_args(argv))
    assignments, file = options.pop("assignments"), options.pop("config")
    return build_config(options, file, assignments)


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 0, 2 (a mistake in what was asked for), 3 (the first rollout is unsound), 130 (Ctrl-C)."""
    try:
        run = prepare(parse_args(argv))
        result = train(run)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except SelfCheckError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        print("\ninterrupted; the rows written so far stay in the run's folder", file=sys.stderr)
        return 130
    print(f"\n{summary(result, run.log.folder)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
