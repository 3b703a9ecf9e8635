"""What a task is: a declarative spec, and how it makes an example of a raw row.

Knows no model and no tokenizer. There are three kinds of tasks, by what an answer is: one of the task's own label
words (`verbalizer`), the letter of one of the choices that each input offers (`choices`), or text (`answers`).
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase
from typing import Any, Literal

SPLITS = ("train", "validation", "test")
LETTERS = tuple(ascii_uppercase)


class TaskError(ValueError):
    """A spec or a data file is not as it should be; the message names file, key or row, and what was expected."""


@dataclass(frozen=True)
class Example:
    """One example, rendered.

    Attributes:
        input: what the target reads.
        label: index of the right class; None where the answer is text.
        answer: the right answer as meta-prompts show it: a label word, a letter, a text.
        also: indices of further classes that are right as well.
        choices: how many classes this example offers, the first ones; None: all that the task has.
        answers: every accepted answer, where it is text.
    """

    input: str
    label: int | None
    answer: str
    also: tuple[int, ...] = ()
    choices: int | None = None
    answers: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskSpec:
    """A task as its YAML file describes it; exactly one of `verbalizer`, `choices` and `answers` is given.

    Attributes:
        name: what `--task` takes.
        description: one line, with the source.
        fields: the columns that the input is made of, each with other names it goes by in data files. A dot goes
            into a column ("question.stem"). A list of texts is joined by commas.
        input: how an input is rendered from the fields, in braces; {choices} stands for the lettered choices.
        manual_prompt: the instruction a person would write; the baseline.
        label: the names that the column of the right answer goes by, for a verbalizer or choices. Integers index the
            classes; a column of scores (BIG-bench's target_scores) means the highest.
        verbalizer: label as it stands in the data -> word the target answers with, in class order.
        choices: the names that the column of the choices goes by. Without such a column they are the columns A, B,
            C, ..., or the lines (A), (B), ... of the input itself.
        answers: names of the columns that hold accepted answers; what the first one that is there says comes first.
        metric: "accuracy"; for text exact_match, exact_string, exact_set, contains or f1 (rewards/functional.py).
        template: what the target reads; {prompt} and {input}. Ends where the answer begins.
        shuffle: the order of choices (or of the fields, where there are none) gives the answer away, so it is drawn
            anew for every row, always the same for the same row.
        max_shots: examples per label at most, for data sets with few rows of one.
        hub: path, name, revision and, for each split, the data set's name of it.
        folder: the folder of the task's files within a data folder; by default the task's name.
        files: for each split, file names to look for in there, besides the usual ones. Where no test file is named
            or found, train is cut into all three splits. "manual" is a file of instructions, of which the first counts.
        columns: names of the columns of a .csv or .tsv without header.
        drop_labels: labels of rows to leave out (SNLI's -1: the annotators did not agree).
    """

    name: str
    description: str
    fields: dict[str, list[str]]
    input: str
    manual_prompt: str
    label: list[str] = field(default_factory=list)
    verbalizer: dict[str, str] = field(default_factory=dict)
    choices: list[str] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)
    metric: str = "accuracy"
    template: str = "{prompt} Input : {input} Output :"
    shuffle: bool = False
    max_shots: int | None = None
    hub: dict[str, str] = field(default_factory=dict)
    folder: str = ""
    files: dict[str, list[str]] = field(default_factory=dict)
    columns: list[str] = field(default_factory=list)
    drop_labels: list[str] = field(default_factory=list)

    @property
    def kind(self) -> Literal["labels", "choices", "text"]:
        """What an answer is."""
        return "labels" if self.verbalizer else "choices" if self.choices else "text"

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
            TaskError: a column is missing or empty, or the answer is none of those there are.
        """
        values = {
            name: _text(_column(row, [name, *others], where), name, where) for name, others in self.fields.items()
        }
        if self.kind == "labels":
            label = self._label(_column(row, self.label, where), where)
            if label is None:
                return None
            return Example(fill(self.input, values), label, self.words[label])
        if self.kind == "choices":
            return self._choice_example(row, values, where)
        if self.shuffle:
            values = dict(zip(values, _drawn_order(values.values()), strict=True))
        answers = _accepted(row, self.answers, where)
        return Example(fill(self.input, values), None, answers[0], answers=answers)

    def _label(self, value: Any, where: str) -> int | None:
        if isinstance(value, Mapping):
            value = max(value, key=lambda name: value[name])
        names = list(self.verbalizer)
        if str(value) in self.drop_labels:
            return None
        if str(value) in names:
            return names.index(str(value))
        if re.fullmatch(r"\d+", str(value)) and int(value) < len(names):
            return int(value)
        allowed = ", ".join(names)
        raise TaskError(f"{where}: label {value!r} is not in the verbalizer; expected one of {allowed}, or its index")

    def _choice_example(self, row: Mapping[str, Any], values: dict[str, str], where: str) -> Example:
        column = next((value for name in self.choices if (value := _find(row, name)) is not None), None)
        choices = _choice_texts(column, row, where)
        if not choices:  # they stand in the input itself
            written = re.findall(r"^\(([A-Z])\)", fill(self.input, values | {"choices": ""}), re.MULTILINE)
            if written != list(LETTERS[: len(written)]) or len(written) < 2:
                raise TaskError(f"{where}: no column {' or '.join(map(repr, self.choices))}, no columns A and B")
            choices = written
        scores = next((v for v in (column, *(_find(row, name) for name in self.label)) if _is_scores(v)), None)
        right = _right_choices(scores if scores else _column(row, self.label, where), choices, where)
        order = list(range(len(choices)))
        if self.shuffle:
            order = [choices.index(choice) for choice in _drawn_order(choices)]
        values["choices"] = "\n".join(f"({LETTERS[i]}) {choices[old]}" for i, old in enumerate(order))
        places = sorted(order.index(old) for old in right)
        return Example(
            fill(self.input, values), places[0], LETTERS[places[0]], also=tuple(places[1:]), choices=len(choices)
        )


def fill(template: str, values: Mapping[str, str]) -> str:
    """Puts values for {names}; braces inside a value are just braces."""
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)


# -- from raw columns --------------------------------------------------------------------------------------------


def _find(row: Mapping[str, Any], name: str) -> Any:
    """The column's value, or that of a dotted path into one; None if there is no such thing."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def _column(row: Mapping[str, Any], names: Sequence[str], where: str) -> Any:
    for name in names:
        if (value := _find(row, name)) is not None:
            return value
    empty = [name for name in names if name in row]
    if empty:
        raise TaskError(f"{where}: column {empty[0]!r} is null")
    raise TaskError(f"{where}: no column {' or '.join(map(repr, names))}; the columns are {', '.join(map(str, row))}")


def _text(value: Any, name: str, where: str) -> str:
    if isinstance(value, list) and value and all(isinstance(item, str) for item in value):
        value = ", ".join(value)
    if not isinstance(value, str) or not value.strip() or re.search("[\ud800-\udfff]", value):
        raise TaskError(f"{where}: field {name!r} is {value!r}; expected some text")
    return value.strip()


def _accepted(row: Mapping[str, Any], names: Sequence[str], where: str) -> tuple[str, ...]:
    """All accepted answers, each once: columns of a text, of a list of texts, or of scored texts (the highest)."""
    found: list[str] = []
    _column(row, names, where)  # one of them must be there
    for name in names:
        value = _find(row, name)
        if _is_scores(value):
            value = [text for text in value if value[text] == max(value.values())]
        listed = [text for text in value if text != ""] if isinstance(value, list) else []
        found += [_text(text, name, where) for text in listed or [value] if text is not None]
    return tuple(dict.fromkeys(found))


def _is_scores(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(v, int | float) for v in value.values())


def _choice_texts(column: Any, row: Mapping[str, Any], where: str) -> list[str]:
    """The choices of a row: a list of texts or of {text: ...}, {text: [...]}, scored texts, or the columns A, B, ..."""
    if isinstance(column, Mapping):
        column = column["text"] if isinstance(column.get("text"), list) else list(column)
    if column is None:
        column = [row[letter] for letter in LETTERS if letter in row]
    if not isinstance(column, list):
        raise TaskError(f"{where}: the choices are {column!r}; expected a list")
    texts = [choice.get("text") if isinstance(choice, Mapping) else choice for choice in column]
    return [_text(text, "choices", where) for text in texts]


def _right_choices(value: Any, choices: Sequence[str], where: str) -> list[int]:
    if _is_scores(value):
        return [i for i, score in enumerate(value.values()) if score == max(value.values())]
    letter = str(value).strip().strip("()")
    if letter in LETTERS[: len(choices)]:
        return [LETTERS.index(letter)]
    if re.fullmatch(r"\d+", letter) and int(letter) < len(choices):
        return [int(letter)]
    raise TaskError(f"{where}: answer {value!r}; expected a letter up to {LETTERS[len(choices) - 1]}, or an index")


def _drawn_order(texts: Iterable[str]) -> list[str]:
    """The texts in an order that depends on nothing but the texts."""
    given = list(texts)
    return random.Random("\n".join(given)).sample(given, len(given))
