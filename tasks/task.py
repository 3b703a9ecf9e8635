"""What a task is: a declarative spec, its examples, their splits, and the meta-prompt that shows them to the agent.

Knows no model and no tokenizer. A spec is a YAML file (`tasks/specs/*.yaml`); a list of tasks is a dict of specs.
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import yaml

SPEC_DIR = Path(__file__).parent / "specs"
SPLITS = ("train", "validation", "test")
NUMBER_WORDS = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")


class TaskError(ValueError):
    """A spec or a data file is not as it should be; the message names file, key or row, and what was expected."""


@dataclass(frozen=True)
class Example:
    """One labelled input, rendered: what the target reads, the class index, and the word for that class."""

    input: str
    label: int
    answer: str


@dataclass(frozen=True)
class TaskSpec:
    """A task as its YAML file describes it.

    Attributes:
        name: what `--task` takes.
        description: one line, with the source.
        fields: the columns that the input is made of, each with other names it goes by in data files.
        label: the names the label's column goes by.
        verbalizer: label as it stands in the data -> word the target answers with, in class order. Integer labels
            index this order.
        input: how an input is rendered from the fields, in braces.
        template: what the target reads; {prompt} and {input}. Ends where the answer begins.
        manual_prompt: the instruction a person would write; the baseline.
        metric: "accuracy".
        hub: path, name, revision and, for each split, the data set's name of it.
        files: for each split, file names to look for in a data folder, besides the usual ones.
        drop_labels: labels of rows to leave out (SNLI's -1: the annotators did not agree).
    """

    name: str
    description: str
    fields: dict[str, list[str]]
    label: list[str]
    verbalizer: dict[str, str]
    input: str
    manual_prompt: str
    template: str = "{prompt} Input : {input} Output :"
    metric: str = "accuracy"
    hub: dict[str, str] = field(default_factory=dict)
    files: dict[str, list[str]] = field(default_factory=dict)
    drop_labels: list[str] = field(default_factory=list)

    @property
    def words(self) -> tuple[str, ...]:
        """The label words in class order."""
        return tuple(self.verbalizer.values())

    def example(self, row: Mapping[str, Any], where: str) -> Example | None:
        """Renders one raw row; None for a row whose label is to be dropped.

        Args:
            row: column -> value.
            where: file and row, for the error.

        Raises:
            TaskError: a column is missing or empty, or the label is none of the verbalizer's.
        """
        label = self._label(_column(row, self.label, where), where)
        if label is None:
            return None
        values = {}
        for name, others in self.fields.items():
            value = _column(row, [name, *others], where)
            if not isinstance(value, str) or not value.strip() or re.search("[\ud800-\udfff]", value):
                raise TaskError(f"{where}: field {name!r} is {value!r}; expected some text")
            values[name] = value.strip()
        return Example(fill(self.input, values), label, self.words[label])

    def _label(self, value: Any, where: str) -> int | None:
        names = list(self.verbalizer)
        if str(value) in self.drop_labels:
            return None
        if str(value) in names:
            return names.index(str(value))
        if re.fullmatch(r"\d+", str(value)) and int(value) < len(names):
            return int(value)
        allowed = ", ".join(names)
        raise TaskError(f"{where}: label {value!r} is not in the verbalizer; expected one of {allowed}, or its index")


def fill(template: str, values: Mapping[str, str]) -> str:
    """Puts values for {names}; braces inside a value are just braces."""
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)


def _column(row: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    for name in names:
        if row.get(name) is not None:
            return row[name]
    empty = [name for name in names if name in row]
    if empty:
        raise TaskError(f"{where}: column {empty[0]!r} is null")
    raise TaskError(f"{where}: no column {' or '.join(map(repr, names))}; the columns are {', '.join(map(str, row))}")


# -- specs -------------------------------------------------------------------------------------------------------


def task_names() -> list[str]:
    """All tasks that come with the project, sorted."""
    return sorted(path.stem for path in SPEC_DIR.glob("*.yaml"))


def load_spec(name: str) -> TaskSpec:
    """The spec of a task by name, or from a YAML file of the same form by its path.

    Raises:
        TaskError: no such task (the nearest names are in the message), or a spec that is not well formed.
    """
    path = Path(name) if name.endswith((".yaml", ".yml")) else SPEC_DIR / f"{name}.yaml"
    if not path.is_file():
        known = task_names()
        near = get_close_matches(name.lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise TaskError(f"unknown task {name!r}; {hint}tasks are {', '.join(known)}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise TaskError(f"{path}: not readable as YAML: {' '.join(str(error).split())}") from error
    return _check_spec(path, data)


def _check_spec(path: Path, data: Any) -> TaskSpec:
    if not isinstance(data, dict):
        raise TaskError(f"{path}: expected a mapping of keys to values, found {type(data).__name__}")
    known = {f.name: f for f in fields(TaskSpec)}
    for key in data:
        if key not in known:
            near = get_close_matches(str(key), list(known), n=1)
            raise TaskError(f"{path}: unknown key {key!r}" + (f"; did you mean {near[0]!r}?" if near else ""))
    required = ("name", "description", "fields", "label", "verbalizer", "input", "manual_prompt")
    missing = [key for key in required if key not in data]
    if missing:
        raise TaskError(f"{path}: missing key {missing[0]!r}")
    _check_types(path, data)
    for label, word in data["verbalizer"].items():
        if not isinstance(label, str) or not isinstance(word, str):
            raise TaskError(f"{path}: verbalizer {label!r}: {word!r} is not text; write words such as yes in quotes")
    if len(data["verbalizer"]) < 2 or len(set(data["verbalizer"].values())) < len(data["verbalizer"]):
        raise TaskError(f"{path}: the verbalizer needs two or more different words")
    spec = TaskSpec(**data)
    used = set(re.findall(r"\{(\w+)\}", spec.input))
    if not used or not used <= set(spec.fields):
        raise TaskError(f"{path}: 'input' uses {sorted(used)}; the fields are {sorted(spec.fields)}")
    if sorted(re.findall(r"\{(\w+)\}", spec.template)) != ["input", "prompt"]:
        raise TaskError(f"{path}: 'template' needs {{prompt}} and {{input}}, once each")
    if spec.metric != "accuracy":
        raise TaskError(f"{path}: unknown metric {spec.metric!r}; expected accuracy")
    return spec


def _check_types(path: Path, data: dict[str, Any]) -> None:
    known = {f.name: f for f in fields(TaskSpec)}
    kinds: dict[str, type[Any]] = {"str": str, "dict": dict, "list": list}
    for key, value in data.items():
        kind = str(known[key].type).split("[")[0]
        if not isinstance(value, kinds[kind]):
            raise TaskError(f"{path}: {key!r} is {value!r}; expected a {kind}")
        parts = value.values() if isinstance(value, dict) else [value] if isinstance(value, list) else []
        if key in ("fields", "files", "label", "drop_labels") and not all(map(_is_list_of_text, parts)):
            raise TaskError(f"{path}: {key!r} is {value!r}; expected a {known[key].type}")
        if key == "hub" and not _is_list_of_text([*parts]):
            raise TaskError(f"{path}: {key!r} is {value!r}; expected a {known[key].type}")


def _is_list_of_text(value: object) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


# -- splits ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskData:
    """The examples of a run. Disjoint by normalised text; train and validation balanced over labels."""

    spec: TaskSpec
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    def __post_init__(self) -> None:
        for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
            shared = _texts(getattr(self, one)) & _texts(getattr(self, other))
            if shared:
                raise TaskError(f"{self.spec.name}: {one} and {other} share the input {sorted(shared)[0]!r}")


def build_data(
    spec: TaskSpec, rows: Mapping[str, Sequence[Example]], shots: int = 16, seed: int = 0, test_limit: int | None = None
) -> TaskData:
    """Draws balanced k-shot train and validation splits, seeded, and keeps them out of one another and of test.

    Args:
        spec: the task.
        rows: examples of "train" and "test", and of "validation" if the source has one; without it both small
            splits are drawn from "train".
        shots: examples per label in train, and as many in validation.
        seed: of the draw.
        test_limit: at most so many test examples, drawn with the same seed; None keeps all.

    Raises:
        TaskError: too few examples of a label.
    """
    rng = random.Random(seed)
    test = list(rows["test"])
    if test_limit is not None and test_limit < len(test):
        test = rng.sample(test, test_limit)
    taken = _texts(test)
    drawn = {}
    for split in ("train", "validation"):
        pool = list(rows[split] if rows.get(split) else rows["train"])
        rng.shuffle(pool)
        chosen: list[Example] = []
        for label, word in enumerate(spec.words):
            mine = {_normalise(e.input): e for e in pool if e.label == label and _normalise(e.input) not in taken}
            if len(mine) < shots:
                raise TaskError(
                    f"{spec.name}: {len(mine)} examples left with label {word!r} for {split}; "
                    f"{shots} shots need {shots}; ask for fewer"
                )
            chosen += list(mine.values())[:shots]
            taken |= set(list(mine)[:shots])
        rng.shuffle(chosen)
        drawn[split] = tuple(chosen)
    return TaskData(spec, drawn["train"], drawn["validation"], tuple(test))


def _normalise(text: str) -> str:
    return " ".join(text.lower().split())


def _texts(examples: Sequence[Example]) -> set[str]:
    return {_normalise(example.input) for example in examples}


# -- meta-prompt -------------------------------------------------------------------------------------------------


class MetaPrompt(NamedTuple):
    """What the agent is asked, and the opening of the answer that it is to go on with."""

    request: str
    opening: str


def meta_prompt(pairs: Sequence[Example]) -> MetaPrompt:
    """The fixed meta-prompt of the paper (Figure 6), filled with input-output pairs."""
    count = NUMBER_WORDS[len(pairs)] if len(pairs) < len(NUMBER_WORDS) else str(len(pairs))
    noun = "input" if len(pairs) == 1 else "inputs"
    shown = "\n".join(f"Input : {pair.input} Output : {pair.answer}" for pair in pairs)
    return MetaPrompt(
        f"I gave a friend an instruction and {count} {noun}.\n"
        "The friend read the instruction and wrote an output for every one of the inputs.\n"
        f"Here are the input-output pairs:\n{shown}",
        "The instruction was :",
    )
