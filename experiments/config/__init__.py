"""The configuration of a run: one frozen dataclass, filled from a preset, a file and key=value pairs, strictly.

The comment at each key says what the key means and where its default comes from. An unknown key, a wrong type or a
value out of range raises a `ConfigError` that names the key, before anything is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from appo.config import AnchorConfig, APPOConfig, SamplingConfig
from experiments.config.strict import ConfigError, Tree, assigned, construct, merge, read_yaml
from tasks.catalogue import is_spec_file
from tasks.errors import shown

CONFIG_DIR = Path(__file__).parents[1] / "configs"
ARMS_DIR = CONFIG_DIR / "arms"  # presets of the arms that differ from appo in keys only
LAB = "lab"
MODELS = "models"  # the folder that `make weights` fills
COMMAND_LINE = "command line"
Dtype = Literal["auto", "float32", "bfloat16"]
LAB_DIR = Path(__file__).parents[1] / "lab"
LABS = (LAB, f"{LAB}/small", f"{LAB}/deep")  # names of the lab's models; lab/deep has a target only
DEFAULT_PRESETS = {  # (the lab's agent, mode tte) -> name
    (True, False): LAB,
    (True, True): f"{LAB}_tte",
    (False, False): None,
    (False, True): "tte",
}
# fmt: off
ArmName = Literal[
    "appo", "ppo", "rlhf", "none", "reinforce", "grpo", "frozen", "paraphrase", "edits",
    "manual", "empty", "few_shot", "step_by_step",
]
# fmt: on
TRAINED = ("appo", "ppo", "rlhf", "none", "reinforce", "grpo")  # arms that update the agent
GIVEN = ("manual", "empty", "few_shot", "step_by_step")  # arms that evaluate one prompt, without any iteration
MAX_THREADS = 1024  # torch crashes if the system cannot start as many threads as asked
REFERENCES = {"ppo": "previous", "rlhf": "initial", "none": "none"}  # arms that differ from appo in appo.reference only
OF_MODE = {"fixed": ("few_shot", "race", "show_best"), "tte": ("edit_manual",)}  # keys that have no effect in the other
INCIDENTAL = ("run", "checkpoint_every", "trust_remote_code", "tensorboard", "wandb", "shard")  # do not alter results
RESUMABLE = ("steps", "epochs", *INCIDENTAL)  # keys that --resume may change: also how long the run is


@dataclass(frozen=True)
class ExamplesConfig:
    """How many examples a run uses, and for what."""

    shots: int = 16  # training examples per label, and as many validation examples [P, Table 7]
    pairs: int = 5  # input-output pairs in the meta-prompt [P, Figure 6]
    batch_size: int = 16  # training examples on which an iteration's prompts are scored; as in the published code
    review_rows: int | None = 8  # validation rows per prompt in a review (mode fixed), drawn for each; null: all; ours
    test_limit: int | None = None  # most test examples; null: all

    def __post_init__(self) -> None:
        _at_least(self, shots=1, pairs=1, batch_size=1, review_rows=1, test_limit=1)


@dataclass(frozen=True)
class RewardConfig:
    """R = accuracy_weight * accuracy + margin_weight * softmax margin, or metric_weight * metric of generated text."""

    accuracy_weight: float = 10.0  # c_a, the weight of the accuracy [P]
    margin_weight: float = 10.0  # c_s, the weight of the margin, which separates prompts of equal accuracy; [P]: 0.1
    metric_weight: float = 10.0  # weight of the metric of generated text; 10 is the accuracy's scale; [P]: 1
    likelihood_weight: float = 0.0  # weight of the right answer's likelihood, to break ties in generated text; ours
    answer_tokens: int = 50  # most tokens of a generated answer (APE, Zhou et al. 2023)

    def __post_init__(self) -> None:
        _at_least(self, accuracy_weight=0, margin_weight=0, metric_weight=0, likelihood_weight=0, answer_tokens=1)


@dataclass(frozen=True)
class LoRAConfig:
    """An adapter, trained instead of all the agent's weights; needs the extra `lora`."""

    rank: int | None = None  # rank of the adapter; null: no adapter, all weights are trained. Published code: 16
    alpha: float | None = None  # the adapter's output is scaled by alpha / rank; null: alpha is twice the rank
    targets: str = "all-linear"  # layers with an adapter: all-linear (without the head), or names such as q_proj,v_proj
    dropout: float = 0.0  # only 0 is accepted: with dropout, PPO's ratios would not start at 1

    def __post_init__(self) -> None:
        _at_least(self, rank=1)
        if self.alpha is not None and not self.alpha > 0:
            raise ValueError(f"alpha is {self.alpha!r}; expected above 0, or null")
        if not all(self.layers):
            raise ValueError(f"targets is {self.targets!r}; expected all-linear, or names of layers between commas")
        if self.dropout != 0:
            raise ValueError(f"dropout is {self.dropout!r}; expected 0: with it, PPO's ratios would not start at 1")

    @property
    def layers(self) -> list[str]:
        """The names in `targets`, as a list."""
        return [name.strip() for name in self.targets.split(",")]


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run."""

    task: str = "mnli"  # name of a task (tasks/specs), or path of a spec
    agent: str = LAB  # model that writes the prompts: a folder or hub id of a causal LM, or lab, lab/small
    target: str = LAB  # model that answers: like agent, or lab/deep, or one behind a server: http://host:port#model
    data: str = LAB  # source of the examples: lab, hub, or a folder
    arm: ArmName = "appo"  # how prompts are found (docs/arms.md); for example frozen: best-of-N, without training
    mode: Literal["fixed", "tte"] = "fixed"  # one prompt for the task, or (test-time editing) one for each input
    edit_manual: bool = False  # in mode tte: the agent edits the manual prompt, which its meta-prompt shows
    run: str | None = None  # the run's folder; null: runs/TASK-DATE-TIME
    seed: int = 0  # seed of splits, batches, sampling and minibatch order
    epochs: int = 100  # passes over the training examples [P, A.5]
    steps: int | None = None  # iterations; null: as many as the epochs take
    prompts: int = 16  # K, prompts sampled in an iteration (in mode tte for each input of it); [P, Table 6]: 4
    pool: int = 16  # how many prompts, best by training reward, are scored on validation at the end; [P, 4.1]: 5
    shortlist: int = 64  # score so many (at least `pool`) on all training rows first, if batches are smaller; 0: no [P]
    few_shot: int = 0  # further candidates at the end: the manual prompt followed by training pairs, drawn for each
    race: bool = False  # at the end, drop candidates that fall behind on the first validation rows; ours
    paper_protocol: bool = False  # at the end, score five more prompts on test and report the best; [P, 4.1]: true
    show_best: int = 0  # how many of the best prompts so far the meta-prompt shows (GFlowPO, arXiv 2602.03358); [P]: 0
    headroom: int = 16  # prompts of the untrained agent to score before training; 0: no such check
    checkpoint_every: int = 10  # iterations between checkpoints; a signal and the end of a run write one too
    tensorboard: bool = False  # also log to TensorBoard, in the run's folder; needs the extra `tensorboard`
    wandb: str | None = None  # also log to this project of Weights & Biases; null: do not; needs the extra `wandb`
    device: str = "auto"  # auto: cuda if there is a GPU, else cpu
    dtype: Dtype = "auto"  # the agent computes in it, its weights stay float32. auto: bfloat16 on a GPU, else float32
    target_dtype: Dtype = "auto"  # dtype of the target. auto: bfloat16 if the device has instructions for it
    target_quantization: Literal["int8", "int4"] | None = None  # quantise the target's weights; needs bitsandbytes
    threads: int = 2  # CPU threads of torch; results repeat bit for bit only with the same number
    gradient_checkpointing: bool = False  # for the agent's updates: far less memory, a third more time
    shard: bool = False  # divide the agent's weights and optimizer among several GPUs: docs/several-gpus.md
    onednn: bool = True  # use oneDNN for large matrix products on CPUs if it is faster; false: never
    agent_chat: bool | None = None  # use the agent's chat template; null: if it has one
    target_chat: bool = False  # use the target's chat template; the paper's template is plain text
    trust_remote_code: bool = False  # run code that comes with a model; can be set on the command line, not in a file
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    appo: APPOConfig = field(default_factory=APPOConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)

    def __post_init__(self) -> None:
        _at_least(self, seed=0, epochs=1, steps=1, prompts=1, pool=1, checkpoint_every=1, threads=1)
        _at_least(self, shortlist=0, few_shot=0, show_best=0, headroom=0)
        if self.mode == "tte" and self.arm not in (*TRAINED, "frozen"):
            raise ValueError(f"arm is {self.arm!r}, which finds one prompt for all inputs; expected mode fixed")
        if self.arm == "edits" and self.prompts == 1:
            raise ValueError("prompts is 1; expected at least 2 in arm edits: one of them is the prompt that is edited")
        expected = REFERENCES.get(self.arm, self.appo.reference)
        if self.appo.reference != expected:
            raise ValueError(f"appo.reference is {self.appo.reference!r}; expected {expected!r} in arm {self.arm}")
        if self.shard and self.lora.rank is not None:
            raise ValueError("shard is true and lora.rank is set; expected one: an adapter fits each GPU undivided")
        if self.wandb == "":
            raise ValueError("wandb is ''; expected the name of a project, or null")
        if self.threads > MAX_THREADS:
            raise ValueError(f"threads is {self.threads}; expected at most {MAX_THREADS}")


def _at_least(config: Any, **bounds: float) -> None:
    for name, bound in bounds.items():
        value = getattr(config, name)
        if value is not None and not value >= bound:
            raise ValueError(f"{name} is {value!r}; expected at least {bound}")


# -- reading -----------------------------------------------------------------------------------------------------


class Source(NamedTuple):
    """Some keys of a configuration, and where they come from.

    Attributes:
        name: "preset NAME", "config file PATH", "command line" or, on a resume, "the run's config.yaml".
        file: the file that holds the keys, for errors; "" for the command line.
        keys: the keys and their values, nested; a file may hold dotted keys too.
    """

    name: str
    file: str
    keys: Tree


def build_config(
    options: Mapping[str, Any] | None = None, file: str | None = None, assignments: Sequence[str] = ()
) -> RunConfig:
    """Builds the configuration of a run from its `sources`.

    Raises:
        ConfigError: unknown key or preset, wrong type, value out of range, file not readable.
    """
    return merged_config(sources(options, file, assignments))


def check_keys(assignments: Sequence[str]) -> None:
    """Refuses "dotted.key=value" strings that are wrong in every configuration.

    Raises:
        ConfigError: one is not of that form, has an unknown key, or a value of the wrong type.
    """
    tree = assigned(assignments)
    tree.pop("preset", None)
    merge({}, tree, RunConfig)


def sources(
    options: Mapping[str, Any] | None = None, file: str | None = None, assignments: Sequence[str] = ()
) -> list[Source]:
    """Returns the sources of a configuration; later ones win: preset, arm, file, named options, assignments.

    Args:
        options: top-level keys, as from --task and --seed; None values are left out.
        file: a YAML file of keys.
        assignments: "dotted.key=value" strings; `preset=NAME` takes experiments/configs/NAME.yaml. Without one the
            preset is `lab` (in mode tte `lab_tte`) for the lab's agent, and none (in mode tte `tte`) for any other.

    Raises:
        ConfigError: unknown preset, file not readable, or an assignment that is not key=value.
    """
    tree = read_yaml(Path(file)) if file else {}
    if tree.get("trust_remote_code"):
        raise ConfigError(f"{file}: trust_remote_code may only be set on the command line: trust_remote_code=true")
    found = [Source(f"config file {file}", file, tree)] if file else []
    found += [Source(COMMAND_LINE, "", _given(options)), Source(COMMAND_LINE, "", assigned(assignments))]
    preset: object = None
    named = ""  # the file that names the preset, if one does
    agent, mode = LAB, "fixed"
    for source in found:
        if "preset" in source.keys:
            preset, named = source.keys.pop("preset"), source.file
        agent, mode = source.keys.get("agent", agent), source.keys.get("mode", mode)
    if preset is None:
        preset = DEFAULT_PRESETS[agent in LABS, mode == "tte"]
    while preset is not None:  # a preset may build on another
        path = _preset(preset, named)
        tree, named = read_yaml(path), str(path)
        found.insert(0, Source(f"preset {preset}", named, tree))
        preset = tree.pop("preset", None)
    return _with_arm(found)


def _with_arm(found: list[Source]) -> list[Source]:
    """Adds the keys of the arm to the sources. They win over presets; the user's own keys win over them."""
    arm = next((source.keys["arm"] for source in reversed(found) if "arm" in source.keys), None)
    path = ARMS_DIR / f"{arm}.yaml"
    if arm not in get_args(ArmName) or not path.is_file():
        return found
    place = sum(source.name.startswith("preset ") for source in found)
    return [*found[:place], Source(f"arm {arm}", str(path), read_yaml(path)), *found[place:]]


def merged_config(found: Sequence[Source]) -> RunConfig:
    """Builds the configuration from these sources; later ones win.

    Raises:
        ConfigError: unknown key, wrong type, value out of range.
    """
    merged: Tree = {}
    for source in found:
        merge(merged, source.keys, RunConfig, source.file)
    try:
        return construct(RunConfig, merged)
    except ConfigError as error:
        key = str(error).split()[0]
        file = next((source.file for source in reversed(found) if key in flat(source.keys)), "")
        raise ConfigError(f"{file}: {error}" if file else str(error)) from error


def origins(found: Sequence[Source]) -> dict[str, str]:
    """Returns the name of each key's source; leaves out keys that no source sets."""
    return {key: source.name for source in found for key in flat(source.keys)}


def read_config(path: Path) -> RunConfig:
    """Reads the configuration that a run left in its folder; ignores its `trust_remote_code`.

    Raises:
        ConfigError: the file cannot be read, or no run has written it.
    """
    tree = {key: value for key, value in read_yaml(path).items() if key not in ("environment", "trust_remote_code")}
    merged: Tree = {"shortlist": 0, "appo": {"warm_up": False}, "examples": {"review_rows": None}}  # before these keys
    merge(merged, tree, RunConfig, str(path))
    return construct(RunConfig, merged, f"{path}: ")


def resumed_config(
    before: RunConfig, options: Mapping[str, Any], file: str | None, assignments: Sequence[str]
) -> RunConfig:
    """Returns the configuration of a resumed run: the one it began with, in which only RESUMABLE keys may change.

    Raises:
        ConfigError: another key would change (the error names them all), or a file or preset is given.
    """
    asked = (_given(options), assigned(assignments))
    if file or any("preset" in source for source in asked):
        raise ConfigError("--resume takes no --config and no preset; the run's own configuration holds")
    tree = to_dict(before)
    for source in asked:
        merge(tree, source, RunConfig)
    after = construct(RunConfig, tree)
    old, new = (flat(to_dict(config)) for config in (before, after))
    changed = [f"{key} ({old[key]} -> {new[key]})" for key in old if old[key] != new[key] and key not in RESUMABLE]
    if changed:
        raise ConfigError(f"--resume cannot change {', '.join(changed)}; only {', '.join(RESUMABLE)} may differ")
    return after


def data_source(task: str, data: str) -> str:
    """Returns where a task's data are; "lab" means the lab's folder or, for a spec file, the folder of that file."""
    if data != LAB:
        return data
    return str(Path(task).parent) if is_spec_file(task) else str(LAB_DIR / "data")


def lab_folder(name: str, role: str) -> Path:
    """Returns the folder of the lab's model `name`, one of LABS, in the role "agent" or "target"."""
    return LAB_DIR / name.removeprefix(LAB).strip("/") / role


def is_served(target: str) -> bool:
    """Whether a target is the address of a server, not a model to load."""
    return target.lower().startswith(("http://", "https://"))


def on_toys(task: str, data: str, agent: str, target: str) -> str | None:
    """Returns a warning if a run uses the lab's tiny models on other data, or its data for other models; else None."""
    toys = [f"{role} {name}" for role, name in (("agent", agent), ("target", target)) if name in LABS]
    on_lab = data_source(task, data) == data_source(LAB, LAB)
    if toys and not on_lab:
        return (
            f"{' and '.join(toys)}: toy models that only know the lab's own language; their scores on other data mean "
            "nothing. Name real models with --agent and --target"
        )
    if on_lab and target not in LABS:
        return (
            f"data lab: {task} stands for a toy task in the lab's own language; what target {target} scores on it says "
            "nothing about the real task. Name its data with --data"
        )
    return None


def idle_keys(config: RunConfig) -> str | None:
    """Returns a warning if some keys that are set have no effect, because of the mode or of `steps`; else None."""
    idle = [key for mode, keys in OF_MODE.items() if config.mode != mode for key in keys if getattr(config, key)]
    found = [f"{', '.join(idle)}: no effect in mode {config.mode}"] if idle else []
    if config.steps and config.epochs != RunConfig.epochs and config.arm not in GIVEN:  # a preset may have set steps
        found.append(f"epochs has no effect, since steps is {config.steps}; steps=null counts by epochs")
    return "; ".join(found) or None


def _given(options: Mapping[str, Any] | None) -> dict[str, Any]:
    return {key: value for key, value in (options or {}).items() if value is not None}


def _preset(name: object, named: str) -> Path:
    presets = {path.stem: path for path in sorted(CONFIG_DIR.glob("*.yaml"))}
    if not isinstance(name, str) or name not in presets:
        near = get_close_matches(str(name), presets, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        origin = f"{named}: " if named else ""
        raise ConfigError(f"{origin}unknown preset {shown(name)}; {hint}presets are {', '.join(presets)}")
    return presets[name]


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns nested keys and values as dotted keys and values."""
    found: Tree = {}
    for key, value in tree.items():
        found |= flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return found


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Returns the configuration as nested plain values, ready for YAML."""
    return dataclasses.asdict(config)
