"""The parts of a run, loaded, checked and wired together."""

from __future__ import annotations

import math
import platform
import random
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from appo.lm import adapter
from appo.lm.model import CausalLM, ContextTooLongError
from appo.lm.packed import layers
from appo.lm.parallel.ranks import Ranks
from appo.policy import Policy
from experiments.config import GIVEN, RunConfig, data_source, is_served
from experiments.config.extras import check_extras
from experiments.config.strict import ConfigError
from experiments.run.fingerprint import Fingerprint, fingerprint
from experiments.run.folder import ReadFolder, RunFolder, RunFolderError, finished, new_folder
from experiments.run.models import ModelError, check_source, load_model, load_models, reach_server
from rewards.local import LocalTarget
from rewards.reward import ClassificationReward, GenerationReward, Reward
from rewards.served import ServedTarget
from rewards.target import Remembered, Shared, Target
from tasks.errors import TooFewRowsError, shown
from tasks.meta_prompt import as_lines, meta_prompt, rewrite_prompt
from tasks.sources import load_task
from tasks.spec import SPLITS, Example
from tasks.splits import TaskData

SHORTER = "use shorter inputs, a shorter prompt, or a lower sampling.max_new_tokens"


@dataclass(frozen=True)
class Run:
    """The parts of a run; the state that changes between iterations belongs to an arm."""

    config: RunConfig
    data: TaskData
    policy: Policy
    target: Remembered
    reward: Reward
    folder: RunFolder
    fingerprint: Fingerprint  # of the task
    sizes: dict[str, int]  # parameters of agent and target, where they are loaded here
    served: ServedTarget | None = None  # the target, if it is behind a server

    @property
    def steps_per_epoch(self) -> int:
        return math.ceil(len(self.data.train) / self.config.examples.batch_size)

    @property
    def steps(self) -> int:
        if self.config.arm in GIVEN:
            return 0
        return self.config.steps or self.config.epochs * self.steps_per_epoch

    @property
    def instruction(self) -> str:
        """The prompt that the agent edits for each input in mode tte; "": it writes from scratch."""
        return self.data.spec.manual_prompt if self.config.edit_manual else ""

    def environment(self) -> dict[str, Any]:
        """What else the results depend on: code, versions, device, threads, and how the models are run."""
        return {
            "commit": current_commit(),
            "python": platform.python_version(),
            **{package: version(package) for package in ("torch", "transformers", "datasets", "numpy")},
            "device": str(self.policy.device),
            "threads": torch.get_num_threads(),
            "processes": self.policy.ranks.size,
            "agent_computes_in": str(self.policy.lm.compute_dtype).removeprefix("torch."),
            "agent_chat": self.policy.lm.chat,
            "agent_packed": self.policy.lm.packed,
            **{f"target_{name}": value for name, value in self.target.described().items()},
        }


@cache
def current_commit() -> str | None:
    """The commit of this copy of the code, with a "+" if something has been changed since; None outside of git."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(root), *words], capture_output=True, text=True, check=True).stdout

    try:
        return git("rev-parse", "--short", "HEAD").strip() + "+" * bool(git("status", "--porcelain", "--", "*.py"))
    except (OSError, subprocess.CalledProcessError):
        return None


def stream(seed: int, name: str) -> random.Random:
    """A stream of random numbers for one purpose of a run, independent of those for other purposes."""
    return random.Random(f"{seed} {name}")


def few_shot_prompts(config: RunConfig, data: TaskData) -> list[str]:
    """Returns the few-shot prompts of a run, each the manual prompt followed by training pairs of its own."""
    count = 1 if config.arm == "few_shot" else {"fixed": config.few_shot, "tte": 0}[config.mode]
    rng, pairs = stream(config.seed, "few-shot"), min(config.examples.pairs, len(data.train))
    drawn = [rng.sample(data.train, pairs) for _ in range(count)]
    return [f"{data.spec.manual_prompt}\n{as_lines(shown)}\n" for shown in drawn]


def open_run(folder: Path, trust_remote_code: bool = False) -> Run:
    """Opens a finished run for use, with the agent that it saved.

    Args:
        folder: the run's folder.
        trust_remote_code: run code that comes with a model; the folder's own setting is ignored.

    Raises:
        RunFolderError: the folder holds no finished run, or files of two different ones.
    """
    config, _ = finished(folder)
    agent = folder / "agent"
    if not agent.is_dir():
        raise RunFolderError(f"{str(folder)!r} holds no folder 'agent'; expected the folder of a finished run")
    config = replace(config, agent=str(agent.absolute()), trust_remote_code=trust_remote_code)
    return _assemble(config, RunFolder(folder, new=False), Ranks())


def prepare(config: RunConfig, resume: bool = False, ranks: Ranks | None = None) -> Run:
    """Loads data and models, and refuses what cannot work, before anything is written.

    Args:
        config: of the run.
        resume: the run was begun before.
        ranks: the processes that share the work; the first of them alone writes. Default: this one.
    """
    check_extras(config)
    check_source(config, "agent")
    check_source(config, "target")
    ranks, path = ranks or Ranks(), new_folder(config)
    if config.shard and ranks.size == 1:
        raise ConfigError("shard is true, but there is one process only; start more: docs/several-gpus.md")
    return _assemble(config, RunFolder(path, new=not resume) if ranks.rank == 0 else ReadFolder(path), ranks)


def _assemble(config: RunConfig, folder: RunFolder, ranks: Ranks) -> Run:
    torch.set_num_threads(max(1, config.threads // ranks.size))
    torch.manual_seed(config.seed)
    data = _load_data(config)
    inputs = [example.input for example in data.train]
    served = _served(config, data, inputs) if is_served(config.target) else None
    answering: Target
    if served:  # the address with the model's name, also where it was left out
        config = replace(config, target=f"{served.server.connection.url}#{served.server.model}")
        agent = reading = load_model(config, "agent")
        sizes, answering = {"agent": _size(agent)}, served
    else:
        agent, reading = load_models(config)
        sizes = {"agent": _size(agent), "target": _size(reading)}
        try:
            answering = LocalTarget(reading, data.spec.template, data.words, inputs)
        except ValueError as error:  # a label word that its tokenizer does not know, or cannot tell from another
            raise ModelError(f"target: {error}") from error
    if config.shard and ranks.size > 1:
        ranks = _sharded(agent)
    target = Remembered(Shared(answering, ranks) if ranks.size > 1 else answering)
    policy, reward = Policy(agent, config.sampling, ranks), _reward(config, data, target)
    run = Run(config, data, policy, target, reward, folder, fingerprint(data), sizes, served)
    _check_agent_fits(run)
    _check_target_fits(run, reading)
    return run


def _sharded(agent: CausalLM) -> Ranks:
    """Processes that divide the agent; they have met before."""
    from appo.lm.parallel.sharded import Sharded  # takes a second to load

    if not layers(agent.model) or adapter.is_in(agent.model):
        has = "is an adapter" if adapter.is_in(agent.model) else "has no layers that can be told apart"
        raise ModelError(f"agent: shard is true, but the model {has}; set shard=false")
    return Sharded(agent.compute_dtype, agent.device)


def _served(config: RunConfig, data: TaskData, inputs: Sequence[str]) -> ServedTarget:
    """The target behind a server.

    Raises:
        ServerError: no server at the address, or one that cannot do what a target must.
        ConfigError: the reward needs log-probabilities, and the server gives none.
    """
    server = reach_server(config)
    weight = "reward.likelihood_weight" if data.spec.kind == "text" else "reward.margin_weight"
    if not server.scores and getattr(config.reward, weight.removeprefix("reward.")) > 0:
        raise ConfigError(
            f"{weight} is above 0, which takes log-probabilities, and the target's server gives none; set {weight}=0, "
            f"or use vLLM, SGLang or llama.cpp ({server.refused})"
        )
    return ServedTarget(server, data.spec.template, data.words, inputs)


def _size(lm: CausalLM) -> int:
    return sum(parameter.numel() for parameter in lm.model.parameters())


def _load_data(config: RunConfig) -> TaskData:
    source, options = data_source(config.task, config.data), config.examples
    try:
        return load_task(config.task, source, options.shots, config.seed, options.test_limit)
    except TooFewRowsError as error:
        raise ConfigError(f"{error}; ask for fewer with examples.shots") from error


def _reward(config: RunConfig, data: TaskData, target: Target) -> Reward:
    weights = config.reward
    if data.spec.kind == "text":
        return GenerationReward(
            target, data.spec.metric, weights.metric_weight, weights.likelihood_weight, weights.answer_tokens
        )
    return ClassificationReward(target, weights.accuracy_weight, weights.margin_weight)


def _check_agent_fits(run: Run) -> None:
    """Refuses meta-prompts that leave no room in the agent's context for the longest prompt."""
    pairs = _by_length(run.policy.lm, run.data.train)[: run.config.examples.pairs]
    asked = meta_prompt(pairs)
    if run.config.mode == "tte":
        longest, *_ = _by_length(run.policy.lm, _every(run.data), answers=False)
        asked = rewrite_prompt(pairs, longest.input, run.instruction)
    try:
        run.policy.check_fits(run.policy.query(*asked))
    except ContextTooLongError as error:
        raise ConfigError(f"{error}; use fewer examples.pairs or a lower sampling.max_new_tokens") from error


def _check_target_fits(run: Run, reading: CausalLM) -> None:
    """Refuses inputs that leave the target no room for a prompt.

    Args:
        run: of whose data all inputs are looked at.
        reading: whose tokenizer tells which inputs are longest: the target, or the agent if the target is behind a
            server. The server then counts the tokens of a few, as its own tokenizer may differ on which is longest.
    """
    config, data = run.config, run.data
    answer = config.reward.answer_tokens if data.spec.kind == "text" else 0
    if answer and config.reward.likelihood_weight:
        answer = max(answer, *map(len, reading.tokenizer([example.answer for example in _every(data)])["input_ids"]))
    shots = few_shot_prompts(config, data)
    advice = f"{SHORTER}, or fewer examples.pairs in few-shot prompts" if shots else SHORTER
    for example in _by_length(reading, _every(data), answers=False)[: 8 if run.served else 1]:
        try:
            run.target.check_fits(config.sampling.max_new_tokens + answer, example.input)
            for prompt in (data.spec.manual_prompt, *shots):
                run.target.check_fits(prompt, example.input)
        except ContextTooLongError as error:
            raise ContextTooLongError(f"{error}; {advice}; the longest input is {shown(example.input)}") from error


def _every(data: TaskData) -> list[Example]:
    return [example for split in SPLITS for example in getattr(data, split)]


def _by_length(lm: CausalLM, examples: Sequence[Example], answers: bool = True) -> list[Example]:
    """The examples, most tokens first, with or without those of the answer.

    Characters would mislead, as a longer text may have fewer tokens.
    """
    tokens = lm.tokenizer([f"{e.input} {e.answer}" if answers else e.input for e in examples])["input_ids"]
    return [examples[i] for i in sorted(range(len(examples)), key=lambda i: -len(tokens[i]))]
