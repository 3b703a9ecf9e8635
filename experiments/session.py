"""A run as objects: the parts that it is put together from, and the state that has to be saved to go on with it."""

from __future__ import annotations

import hashlib
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

from appo.policy import Policy
from appo.trainer import APPOTrainer
from experiments import checkpoint
from experiments.checkpoint import CheckpointError
from experiments.config import RunConfig, data_source, read_config, to_dict
from experiments.editing import Editor
from experiments.hacking import word_runs
from experiments.models import ModelError, load_model
from experiments.runlog import CONFIG, RESULT, PromptPool, RunFolderError, RunLog, read_jsonl, read_result
from experiments.strict import ConfigError
from rewards.reward import ClassificationReward, GenerationReward
from rewards.target import TargetModel, out_of_memory
from tasks.sources import load_task
from tasks.task import Example, TaskData, meta_prompt, rewrite_prompt


@dataclass(frozen=True)
class Run:
    """The parts of a run, wired together; built by `prepare`, consumed by `train`."""

    config: RunConfig
    data: TaskData
    policy: Policy
    reward: ClassificationReward | GenerationReward
    log: RunLog
    fingerprint: str  # of the data

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
    options = config.examples
    data = load_task(config.task, data_source(config.task, config.data), options.shots, config.seed, options.test_limit)
    agent, target = (load_model(config, role) for role in ("agent", "target"))
    policy = Policy(agent.model, agent.tokenizer, config.sampling, config.agent_chat, config.gradient_checkpointing)
    try:
        scorer = TargetModel(target.model, target.tokenizer, data.spec.template, data.words, config.target_chat)
    except ValueError as error:  # a label word that its tokenizer does not know, or cannot tell from another
        raise ModelError(f"target: {error}") from error
    run = Run(config, data, policy, _reward(config, data, scorer), log, fingerprint(data))
    _check_context(run)
    return run


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


class Batches:
    """Endless epochs of shuffled batches; the last of an epoch may be smaller."""

    def __init__(self, examples: Sequence[Example], size: int, rng: random.Random) -> None:
        self.examples, self.size, self.rng = examples, size, rng
        self.order: list[int] = []

    def next(self) -> list[Example]:
        """The next batch."""
        if not self.order:
            self.order = self.rng.sample(range(len(self.examples)), len(self.examples))
        taken, self.order = self.order[: self.size], self.order[self.size :]
        return [self.examples[i] for i in taken]


class Session:
    """Everything about a run that changes from iteration to iteration, and so has to be saved."""

    def __init__(self, run: Run) -> None:
        config = run.config
        self.run, self.pool, self.iteration = run, PromptPool(), 0
        self.rng = random.Random(config.seed)
        self.inputs = word_runs(example.input for example in run.data.train)
        self.batches = Batches(run.data.train, config.examples.batch_size, self.rng)
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
            "rng": self.rng.getstate(),
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
        if state["data"] != self.run.fingerprint:
            raise checkpoint.CheckpointError("the data are not those that the run was begun with")
        now = environment(self.run)
        before = state["environment"]
        changed = [f"{name} was {before[name]}, is {now[name]}" for name in now if before[name] != now[name]]
        if changed:
            notes = [*notes, f"not bit for bit the same run: {'; '.join(changed)}"]
        self.iteration = state["iteration"]
        self.trainer.load_state_dict(state["trainer"])
        self.run.reward.target.load_state_dict(state["target"])
        self.pool.load_state_dict(state["pool"])
        self.rng.setstate(state["rng"])
        self.batches.order = state["order"]
        self.run.log.truncate(state["log"])
        return notes


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


def fingerprint(data: TaskData) -> str:
    """A hash of all examples; that of another seed or of changed files is another."""
    return hashlib.sha256(repr((data.train, data.validation, data.test)).encode()).hexdigest()


def environment(run: Run) -> dict[str, Any]:
    """What else the results depend on: versions, device, threads, and whether chat templates were used."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in ("torch", "transformers", "datasets", "numpy")},
        "device": str(run.policy.device),
        "threads": torch.get_num_threads(),
        "agent_chat": run.policy.chat,
        "target_chat": run.reward.target.chat,
    }
