"""The configuration of a run: one frozen dataclass, filled from a preset, a file and key=value pairs, strictly.

What a key means and where its default comes from stands at the key. An unknown key, a wrong type or a value out
of range is a `ConfigError` that names it, before anything is loaded.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal

import yaml

from appo.config import AnchorConfig, APPOConfig, SamplingConfig
from tasks.catalogue import parse_yaml

CONFIG_DIR = Path(__file__).parent / "configs"
LAB = "lab"
Dtype = Literal["auto", "float32", "bfloat16"]
RESUMABLE = ("steps", "epochs", "run", "checkpoint_every")  # what may differ when a run goes on


class ConfigError(ValueError):
    """A configuration is not as it should be; the message names file, key and what was expected."""


@dataclass(frozen=True)
class ExamplesConfig:
    """Examples, and how many of them are used for what."""

    shots: int = 16  # per label in train, and as many in validation [P, Table 7]
    pairs: int = 5  # input-output pairs in the meta-prompt [P, Figure 6]
    batch_size: int = 16  # training examples that the prompts of an iteration are scored on [published code]
    test_limit: int | None = None  # at most so many test examples; null: all of them

    def __post_init__(self) -> None:
        _at_least(self, shots=1, pairs=1, batch_size=1, test_limit=1)


@dataclass(frozen=True)
class RewardConfig:
    """R = accuracy_weight * accuracy + margin_weight * softmax margin, or metric_weight * metric of generated text."""

    accuracy_weight: float = 10.0  # c_a [P]
    margin_weight: float = 0.1  # c_s [P]
    metric_weight: float = 1.0  # of generated text: the paper's reward is the F1 itself
    likelihood_weight: float = 0.0  # of generated text: of how likely the right answer was, which breaks ties; ours
    answer_tokens: int = 50  # longest generated answer, in tokens of the target (APE, Zhou et al. 2023)

    def __post_init__(self) -> None:
        _at_least(self, accuracy_weight=0, margin_weight=0, metric_weight=0, likelihood_weight=0, answer_tokens=1)


@dataclass(frozen=True)
class RunConfig:
    """Everything that shapes a run."""

    task: str = "mnli"  # a name (tasks/specs) or the path of a spec
    agent: str = LAB  # writes the prompts: a folder or hub id of a causal LM, or lab
    target: str = LAB  # answers under them: likewise
    data: str = LAB  # where examples come from: lab, hub, or a folder
    mode: Literal["fixed", "tte"] = "fixed"  # one prompt for the task, or (test-time editing) one for each input
    edit_manual: bool = False  # in mode tte: show the agent the manual prompt, for it to edit
    run: str | None = None  # the run's folder; null: runs/TASK-DATE-TIME
    seed: int = 0  # of splits, batches, sampling and minibatch order
    epochs: int = 100  # passes over the training examples [P, A.5]
    steps: int | None = None  # iterations; null: as many as the epochs take
    prompts: int = 4  # K, sampled per iteration, in mode tte per input [P, Table 6; the published code has 2 in TTE]
    pool: int = 5  # best prompts by training reward that are re-scored on validation at the end [P, 4.1]
    few_shot: int = 0  # prompts with training pairs, behind the manual one, that stand for election beside the pool
    headroom: int = 16  # prompts of the untrained agent that are looked at before training; 0: no look
    frozen: bool = False  # True: never update the agent, that is, best-of-N sampling; the control arm
    checkpoint_every: int = 10  # iterations between two checkpoints; a stop by signal and the end make one too
    device: str = "auto"  # auto: cuda where there is one, else cpu
    dtype: Dtype = "auto"  # the agent computes in; its weights stay float32. auto: bfloat16 on a GPU, float32 on a CPU
    target_dtype: Dtype = "auto"  # of the frozen target. auto: bfloat16 where the device has instructions for it
    threads: int = 2  # CPU threads of torch; results repeat bit for bit only under the same number
    gradient_checkpointing: bool = False  # of the agent: a third more time for far less memory in updates
    agent_chat: bool | None = None  # use the agent's chat template; null: if it has one
    target_chat: bool = False  # likewise the target's; the paper's template is plain text
    trust_remote_code: bool = False  # run code that comes with a model
    examples: ExamplesConfig = field(default_factory=ExamplesConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    reward: RewardConfig = field(default_factory=RewardConfig)
    appo: APPOConfig = field(default_factory=APPOConfig)
    anchor: AnchorConfig = field(default_factory=AnchorConfig)

    def __post_init__(self) -> None:
        _at_least(
            self, seed=0, epochs=1, steps=1, prompts=1, pool=1, checkpoint_every=1, threads=1, few_shot=0, headroom=0
        )


def _at_least(config: Any, **bounds: float) -> None:
    for name, bound in bounds.items():
        value = getattr(config, name)
        if value is not None and not value >= bound:
            raise ValueError(f"{name} is {value!r}; expected at least {bound}")


# -- reading -----------------------------------------------------------------------------------------------------


def build_config(
    options: Mapping[str, Any] | None = None, file: str | None = None, assignments: Sequence[str] = ()
) -> RunConfig:
    """The configuration of a run; later sources win: defaults, preset, file, named options, assignments.

    Args:
        options: top-level keys, as from --task and --seed; None values are left out.
        file: a YAML file of keys.
        assignments: "dotted.key=value" strings; `preset=NAME` takes experiments/configs/NAME.yaml. Without one the
            preset is `lab` (`lab_tte` in mode tte) for the lab's agent, and none (the paper's values) for any other.

    Raises:
        ConfigError: unknown key or preset, wrong type, value out of range, file not readable.
    """
    tree = _read_yaml(Path(file)) if file else {}
    origins = [(file or "", tree)]
    assigned: dict[str, Any] = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key or not text:
            raise ConfigError(f"{assignment!r}: expected key=value")
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ConfigError(f"{key}: cannot read the value {text!r}") from error
        _put(assigned, key.split("."), value)
    origins.append(("", {k: v for k, v in (options or {}).items() if v is not None}))
    origins.append(("", assigned))
    preset = None
    agent, mode = LAB, "fixed"
    for _, source in origins:
        preset = source.pop("preset", preset)
        agent, mode = source.get("agent", agent), source.get("mode", mode)
    if agent == LAB:
        preset = preset or (f"{LAB}_tte" if mode == "tte" else LAB)
    merged: dict[str, Any] = {}
    if preset:
        path = CONFIG_DIR / f"{preset}.yaml"
        if not path.is_file():
            presets = sorted(p.stem for p in CONFIG_DIR.glob("*.yaml"))
            raise ConfigError(
                f"unknown preset {preset!r}; {_hint(str(preset), presets)}presets are {', '.join(presets)}"
            )
        origins.insert(0, (str(path), _read_yaml(path)))
    for origin, source in origins:
        _merge(merged, source, RunConfig, origin)
    return _construct(RunConfig, merged, "")


def resumed_config(
    stored: Mapping[str, Any], options: Mapping[str, Any], file: str | None, assignments: Sequence[str]
) -> RunConfig:
    """The configuration of a run that goes on: what was stored, and of what is asked for now only more steps.

    Raises:
        ConfigError: something else would change; all such keys are named.
    """
    before = build_config(stored)
    after = build_config({**to_dict(before), **options}, None, assignments) if not file else None
    if after is None:
        raise ConfigError("--resume takes no --config; the run's own configuration holds")
    old, new = (_flat(to_dict(config)) for config in (before, after))
    changed = [f"{key} ({old[key]} -> {new[key]})" for key in old if old[key] != new[key] and key not in RESUMABLE]
    if changed:
        raise ConfigError(f"--resume cannot change {', '.join(changed)}; only {', '.join(RESUMABLE)} may differ")
    return after


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value}
    return flat


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as nested plain values, ready for YAML."""
    return dataclasses.asdict(config)


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        data = parse_yaml(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path.absolute()}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, dict):
        raise ConfigError(f"{path}: expected keys and values, found {type(data).__name__}")
    return data


def _put(tree: dict[str, Any], keys: list[str], value: Any) -> None:
    for key in keys[:-1]:
        tree = tree.setdefault(key, {})
        if not isinstance(tree, dict):
            raise ConfigError(f"{'.'.join(keys)}: {key!r} has been given a value already")
    tree[keys[-1]] = value


def _merge(into: dict[str, Any], source: Mapping[str, Any], cls: type, origin: str, prefix: str = "") -> None:
    """Adds a tree of keys to another, checking every key against the dataclass."""
    kinds = typing.get_type_hints(cls)
    start = f"{origin}: " if origin else ""
    for key, value in source.items():
        if key not in kinds:
            known = _dotted_keys(RunConfig)
            near = [k for k in known if k.split(".")[-1] == key] or get_close_matches(
                f"{prefix}{key}", known, n=1, cutoff=0.5
            )
            hint = f"; did you mean {near[0]!r}?" if near else f"; keys are {', '.join(kinds)}"
            raise ConfigError(f"{start}unknown key {prefix + str(key)!r}{hint}")
        if dataclasses.is_dataclass(kinds[key]):
            if not isinstance(value, Mapping):
                raise ConfigError(
                    f"{start}{prefix}{key} is {value!r}; expected keys such as {prefix}{key}.{_first(kinds[key])}"
                )
            _merge(into.setdefault(key, {}), value, typing.cast(type, kinds[key]), origin, f"{prefix}{key}.")
        else:
            into[key] = _coerce(value, kinds[key], f"{start}{prefix}{key}")


def _coerce(value: Any, kind: Any, where: str) -> Any:
    """`value` as `kind`, or an error; 1e-5 is text to YAML but a number here."""
    options = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    for option in options:
        if typing.get_origin(option) is Literal and value in typing.get_args(option):
            return value
        if option is type(None) and value is None:
            return None
        if option in (bool, str) and isinstance(value, option):
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            return value
        if option is float and not isinstance(value, bool) and _is_number(value):
            return float(value)
    if str in options and not isinstance(value, (dict, list, type(None))):
        return str(value)
    raise ConfigError(f"{where} is {value!r}; expected {_kind_name(options)}")


def _is_number(value: Any) -> bool:
    try:
        return float(value) - float(value) == 0  # neither NaN nor infinite
    except (TypeError, ValueError, OverflowError):
        return False


def _kind_name(options: Sequence[Any]) -> str:
    names = {float: "a number", int: "a whole number", bool: "true or false", str: "text", type(None): "null"}
    return " or ".join(names.get(o) or f"one of {', '.join(map(str, typing.get_args(o)))}" for o in options)


def _construct(cls: Any, tree: Mapping[str, Any], prefix: str) -> Any:
    kinds = typing.get_type_hints(cls)
    values = {
        key: _construct(kinds[key], value, f"{prefix}{key}.") if dataclasses.is_dataclass(kinds[key]) else value
        for key, value in tree.items()
    }
    try:
        return cls(**values)
    except ValueError as error:
        raise ConfigError(f"{prefix}{error}") from error


def _dotted_keys(cls: Any, prefix: str = "") -> list[str]:
    keys: list[str] = []
    for name, kind in typing.get_type_hints(cls).items():
        keys += _dotted_keys(kind, f"{prefix}{name}.") if dataclasses.is_dataclass(kind) else [f"{prefix}{name}"]
    return keys


def _hint(name: str, known: Sequence[str]) -> str:
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}? " if near else ""


def _first(cls: Any) -> str:
    return dataclasses.fields(cls)[0].name
