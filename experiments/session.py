"""A run as objects: the parts that it is put together from, and the state that has to be saved to go on with it."""

from __future__ import annotations

import math
import platform
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from appo.policy import Policy
from appo.rollout import Query
from appo.trainer import APPOTrainer
from experiments import checkpoint
from experiments.checkpoint import CheckpointError
from experiments.config import RunConfig, data_source, read_config, to_dict
from experiments.editing import Editor
from experiments.fingerprint import Fingerprint, differing, fingerprint
from experiments.hacking import word_runs
from experiments.models import ModelError, compute_dtype, load_model
from experiments.runlog import CONFIG, RESULT, PromptPool, RunFolderError, RunLog, read_jsonl, read_result
from experiments.strict import ConfigError
from rewards.reward import ClassificationReward, GenerationReward
from rewards.target import ContextTooLongError, TargetModel, out_of_memory
from tasks.errors import TooFewRowsError, shown
from tasks.meta_prompt import meta_prompt, rewrite_prompt
from tasks.sources import load_task
from tasks.spec import SPLITS, Example
from tasks.splits import TaskData


@dataclass(frozen=True)
class Run:
    """The parts of a run, wired together; built by `prepare`, consumed by `train`."""

    config: RunConfig
    data: TaskData
    policy: Policy
    reward: ClassificationReward | GenerationReward
    log: RunLog
    fingerprint: Fingerprint  # of the task

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


def open_run(folder: Path, trust_remote_code: bool = False) -> Run:
    """A run that is done, with the agent that it left behind, to be used.

    Args:
        folder: the run's.
        trust_remote_code: run code that comes with a model; what the folder says about it does not count.

    Raises:
        RunFolderError: the folder holds no finished run.
    """
    config = stored_config(folder)
    read_result(folder)
    agent = folder / "agent"
    if not agent.is_dir():
        raise RunFolderError(f"{str(folder)!r} holds no folder 'agent'; expected that of a run that came to its end")
    config = replace(config, agent=str(agent.absolute()), trust_remote_code=trust_remote_code)
    return _assemble(config, RunLog(folder, new=False))


def stored_config(folder: Path) -> RunConfig:
    """The configuration that a run left in its folder.

    Raises:
        RunFolderError: there is none.
        ConfigError: it is not what a run writes.
    """
    if not (folder / CONFIG).is_file():
        raise RunFolderError(f"{str(folder)!r} holds no {CONFIG}; expected the folder of a run")
    return read_config(folder / CONFIG)


def prepare(config: RunConfig, resume: bool = False) -> Run:
    """Loads data and models, and refuses what cannot work, before anything is written."""
    folder = Path(config.run or f"runs/{Path(config.task).stem}-{datetime.now():%Y%m%d-%H%M%S}")
    return _assemble(config, RunLog(folder, new=not resume))


def _assemble(config: RunConfig, log: RunLog) -> Run:
    torch.set_num_threads(config.threads)
    torch.manual_seed(config.seed)
    data = _load_data(config)
    agent, target = (load_model(config, role) for role in ("agent", "target"))
    computes_in = compute_dtype(config.dtype, agent.model.device, "agent")
    policy = Policy(
        agent.model, agent.tokenizer, config.sampling, config.agent_chat, config.gradient_checkpointing, computes_in
    )
    spec, inputs = data.spec, [example.input for example in data.train]
    try:
        scorer = TargetModel(
            target.model, target.tokenizer, spec.template, data.words, config.target_chat, inputs=inputs
        )
    except ValueError as error:  # a label word that its tokenizer does not know, or cannot tell from another
        raise ModelError(f"target: {error}") from error
    run = Run(config, data, policy, _reward(config, data, scorer), log, fingerprint(data))
    _check_context(run)
    return run


def _load_data(config: RunConfig) -> TaskData:
    source, options = data_source(config.task, config.data), config.examples
    try:
        return load_task(config.task, source, options.shots, config.seed, options.test_limit)
    except TooFewRowsError as error:
        raise ConfigError(f"{error}; ask for fewer with examples.shots") from error


def _reward(config: RunConfig, data: TaskData, target: TargetModel) -> ClassificationReward | GenerationReward:
    weights = config.reward
    if data.spec.kind == "text":
        return GenerationReward(
            target, data.spec.metric, weights.metric_weight, weights.likelihood_weight, weights.answer_tokens
        )
    return ClassificationReward(target, weights.accuracy_weight, weights.margin_weight)


def _check_context(run: Run) -> None:
    """Refuses meta-prompts that do not fit the agent, and inputs that leave the target no room for a prompt."""
    config, data, target = run.config, run.data, run.reward.target
    every = [example for split in SPLITS for example in getattr(data, split)]
    pairs = _by_length(run.policy.tokenizer, data.train)[: config.examples.pairs]
    asked = meta_prompt(pairs)
    if config.mode == "tte":
        asked = rewrite_prompt(pairs, _by_length(run.policy.tokenizer, every)[0].input, run.editor.instruction)
    try:
        run.policy.check_fits(run.policy.query(*asked))
    except ValueError as error:
        raise ConfigError(f"{error}; use fewer examples.pairs or a lower sampling.max_new_tokens") from error
    answer = config.reward.answer_tokens if data.spec.kind == "text" else 0
    longest = _by_length(target.tokenizer, every)[0].input
    try:
        target.check_fits(config.sampling.max_new_tokens + answer, longest)
        target.check_fits(data.spec.manual_prompt, longest)
    except ContextTooLongError as error:
        raise ContextTooLongError(f"{error}; the longest input is {shown(longest)}") from error


def _by_length(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[Example]:
    """The examples, those of most tokens first: of two texts the longer one may well have fewer."""
    tokens = tokenizer([f"{example.input} {example.answer}" for example in examples])["input_ids"]
    return [examples[i] for i in sorted(range(len(examples)), key=lambda i: -len(tokens[i]))]


def meta_query(run: Run, scored: Sequence[Example], rng: random.Random) -> Query:
    """A meta-prompt of training pairs, by preference none that the prompts are about to be scored on."""
    known = set(scored)
    others = [example for example in run.data.train if example not in known]
    count = min(run.config.examples.pairs, len(run.data.train))
    pairs = rng.sample(others if len(others) >= count else run.data.train, count)
    return run.policy.query(*meta_prompt(pairs))


class Batches:
    """Endless epochs of shuffled batches; the last of an epoch may be smaller.

    Batches are as even over the right labels (or letters) as the examples are. Small targets lean to one label: a batch
    with 11 of 16 such examples would pay every prompt that makes the target say it.
    """

    def __init__(self, examples: Sequence[Example], size: int, rng: random.Random) -> None:
        self.examples, self.size, self.rng = examples, size, rng
        self.order: list[int] = []

    def next(self) -> list[Example]:
        """The next batch."""
        if not self.order:
            self.order = self._epoch()
        taken, self.order = self.order[: self.size], self.order[self.size :]
        return [self.examples[i] for i in taken]

    def _epoch(self) -> list[int]:
        """All examples, shuffled, those of each label at even distances from one another."""
        shuffled = self.rng.sample(range(len(self.examples)), len(self.examples))
        of_label: dict[int | None, list[int]] = {}
        for i in shuffled:
            of_label.setdefault(self.examples[i].label, []).append(i)
        place: dict[int, float] = {}
        for members in of_label.values():
            offset = self.rng.random()
            place |= {i: (rank + offset) / len(members) for rank, i in enumerate(members)}
        return sorted(shuffled, key=lambda i: place[i])


class Session:
    """Everything about a run that changes from iteration to iteration, and so has to be saved."""

    def __init__(self, run: Run) -> None:
        config = run.config
        self.run, self.pool, self.iteration = run, PromptPool(), 0
        # A stream for each purpose, so that arms which differ in one see the same of the others.
        self.streams = {name: stream(config.seed, name) for name in ("batches", "pairs", "review")}
        self.inputs = word_runs(example.input for example in run.data.train)
        self.batches = Batches(run.data.train, config.examples.batch_size, self.streams["batches"])
        generator = torch.Generator(run.policy.device).manual_seed(config.seed)
        self.trainer = APPOTrainer(run.policy, config.appo, config.anchor, generator)

    def save(self) -> None:
        """Writes a checkpoint.

        Raises:
            OSError: it cannot be written; the one before is as it was.
        """
        state = {
            "iteration": self.iteration,
            "trainer": self.trainer.state_dict(),
            "target": self.run.reward.target.state_dict(),
            "pool": self.pool.state_dict(),
            "streams": {name: rng.getstate() for name, rng in self.streams.items()},
            "order": self.batches.order,
            "data": self.run.fingerprint,
            "environment": environment(self.run),
            "log": self.run.log.sizes(),
        }
        checkpoint.save(self.run.log.folder / "checkpoint", self.iteration, state)

    def restore(self) -> list[str]:
        """Goes back to the last checkpoint that is whole; rows that were logged after it are dropped.

        Returns:
            What a person should know: damaged checkpoints that were passed over, a changed environment.

        Raises:
            CheckpointError: there is no whole one, or the data are not those that it was made with.
        """
        state, notes = checkpoint.load(self.run.log.folder / "checkpoint")
        if parts := differing(state["data"], self.run.fingerprint):
            raise checkpoint.CheckpointError(f"the data are not those that the run was begun with; changed: {parts}")
        now = environment(self.run)
        before = state["environment"]
        changed = [f"{name} was {before[name]}, is {now[name]}" for name in now if before[name] != now[name]]
        if changed:
            notes = [*notes, f"not bit for bit the same run: {'; '.join(changed)}"]
        self.iteration = state["iteration"]
        self.trainer.load_state_dict(state["trainer"])
        self.run.reward.target.load_state_dict(state["target"])
        self.pool.load_state_dict(state["pool"])
        for name, rng in self.streams.items():
            rng.setstate(state["streams"][name])
        self.batches.order = state["order"]
        self.run.log.truncate(state["log"])
        return notes


def stream(seed: int, name: str) -> random.Random:
    """The random numbers of a run for one purpose; those for another are independent of it."""
    return random.Random(f"{seed} {name}")


def begin(session: Session, resume: bool) -> list[str]:
    """Writes down what the run is made with and, if it is to go on, goes back to its last checkpoint.

    A run that was killed before its first checkpoint begins anew.

    Returns:
        What a person should know.

    Raises:
        CheckpointError: no checkpoint can be gone back to; the folder is as it was.
    """
    run, notes = session.run, []
    checkpoint.tidy(run.log.folder / "checkpoint")
    if resume and _killed_early(run):
        run.log.clear()
        notes = ["the run was stopped before its first checkpoint, and begins anew"]
    elif resume:
        try:
            notes = session.restore()
        except (CheckpointError, RunFolderError):
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            folder = run.log.folder / "checkpoint"
            raise CheckpointError(f"{folder}: the newest holds no state of this run ({error!r})") from error
    run.log.write_config(to_dict(run.config) | {"environment": environment(run)})
    return notes


def _killed_early(run: Run) -> bool:
    """Whether there is no checkpoint yet, rather than none any more."""
    folder = run.log.folder
    if checkpoint.any_in(folder / "checkpoint") or (folder / RESULT).exists():
        return False
    metrics = folder / "metrics.jsonl"
    return not metrics.exists() or len(read_jsonl(metrics)) <= stored_config(folder).checkpoint_every


def environment(run: Run) -> dict[str, Any]:
    """What else the results depend on: versions, device, threads, and whether chat templates were used."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "datasets", "numpy")},
        "device": str(run.policy.device),
        "threads": torch.get_num_threads(),
        "agent_computes_in": str(run.policy.compute_dtype).removeprefix("torch."),
        "target_computes_in": str(run.reward.target.model.dtype).removeprefix("torch."),
        "agent_chat": run.policy.chat,
        "target_chat": run.reward.target.chat,
    }
