"""What a task is: a declarative spec, and how it turns a raw row into an example.

Knows no model and no tokenizer. There are three kinds of tasks, by what an answer is: one of the task's own label
words (`verbalizer`), the letter of one of the choices that each input offers (`choices`), or text (`answers`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from tasks import cells
from tasks.cells import LETTERS, Row
from tasks.errors import TaskError, shown

SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Example:
    """One example, rendered.

    Attributes:
        input: what the target reads.
        label: index of the right class; None where the answer is text.
        answer: the right answer as meta-prompts show it: a label word, a letter, a text.
        also: indices of further classes that are right as well.
        choices: how many classes this example offers, the first ones of the task; None: all of them.
        answers: every accepted answer, where the answer is text.
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
        fields: the columns that the input is made of, each with its other names in data files. A dot reaches
            into a column ("question.stem"). A list of texts is joined by commas.
        input: how an input is rendered from the fields, in braces; {choices} stands for the lettered choices.
        manual_prompt: the instruction a person would write; the baseline.
        label: possible names of the column with the right answer, for a verbalizer or choices. Integers index the
            classes; of scores by label, text or letter (BIG-bench's target_scores), the highest is right.
        verbalizer: label in the data -> word that the target answers with, in class order. Where a label is a number
            (stars from 1 to 5), numbers are labels and never indices.
        choices: possible names of the column with the choices: 2 to 26 texts, which may have labels of their own or
            scores. Without such a column, they are the columns A, B, C, ... or the lines (A), (B), ... of the input.
        answers: names of the columns that hold accepted answers; meta-prompts show the first answer found.
        metric: "accuracy"; for text exact_match, exact_string, exact_set, contains or f1 (rewards/functional.py).
        template: what the target reads; {prompt} and {input}. Ends where the answer begins.
        shuffle: whether to shuffle the choices (or the fields, where there are none) because their order gives the
            answer away. Each row has its own order, which is always the same for the same row.
        max_shots: the most examples per label, for data sets with few rows of a label.
        hub: path, name, revision and, for each split, the data set's name for it.
        folder: the folder of the task's files within a data folder; by default the task's name.
        files: for each split, file names to look for in that folder, before the usual ones (train.jsonl, dev.tsv, ...).
            If a train file is named but no test file is named or found, train is cut into all three splits. If no
            train file is named, a folder with the task's name is searched with all its subfolders. "manual": a file
            of instructions, the first of which is used.
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
        """What an answer is: a label word, the letter of a choice, or text."""
        return "labels" if self.verbalizer else "choices" if self.choices else "text"

    @property
    def short_name(self) -> str:
        """The name without the family's name."""
        return self.name.rsplit("/", 1)[-1]

    @property
    def words(self) -> tuple[str, ...]:
        """The label words in class order."""
        return tuple(self.verbalizer.values())

    def shots(self, asked: int) -> int:
        """The examples per label in train, and in validation, if so many are asked for."""
        return min(asked, self.max_shots or asked)

    def example(self, row: Row, where: str) -> Example | None:
        """Renders one raw row; None for a row whose label is to be dropped.

        Args:
            row: column -> value.
            where: file and row, for error messages.

        Raises:
            TaskError: a column is missing or empty, or the answer is not one of the possible answers.
        """
        try:
            values = {
                name: cells.text_of(cells.column(row, [name, *others]), name) for name, others in self.fields.items()
            }
            if self.kind == "labels":
                return self._labelled(cells.column(row, self.label), fill(self.input, values))
            if self.kind == "choices":
                return self._question(row, values)
            return self._open_question(row, values)
        except TaskError as error:
            raise TaskError(f"{where}: {error}") from None

    def _labelled(self, value: Any, text: str) -> Example | None:
        given = cells.told_apart(value) if isinstance(value, Mapping) else [self._known(value)]
        if any(label in self.drop_labels for label in given):
            return None
        places = [place for label in given if (place := self._place(label)) is not None]
        if len(places) < len(given):
            expected = f"one of {', '.join(self.verbalizer)}" + ("" if self._numbered else ", or its index")
            raise TaskError(f"label {shown(value)} is not in the verbalizer; expected {expected}")
        return Example(text, places[0], self.words[places[0]], also=tuple(places[1:]))

    def _known(self, value: Any) -> str | None:
        """The label of a class or one to drop, or the index of a class, whichever a cell spells; None if it is none."""
        known = (*self.verbalizer, *self.drop_labels, *self._indices)
        return next((text for text in cells.spellings(value) if text in known), None)

    @property
    def _numbered(self) -> bool:
        """Whether labels are numbers themselves, as stars from 1 to 5 are; then no number is an index."""
        return any(re.fullmatch(r"-?\d+", label) for label in self.verbalizer)

    @property
    def _indices(self) -> list[str]:
        return [] if self._numbered else list(map(str, range(len(self.words))))

    def _place(self, label: str | None) -> int | None:
        """The class of a label by its name or, if no class has that name and names are no numbers, by its index."""
        for known in (list(self.verbalizer), self._indices):
            if label in known:
                return known.index(label)
        return None

    def _question(self, row: Row, values: dict[str, str]) -> Example:
        column = next((value for name in self.choices if (value := cells.find(row, name)) is not None), None)
        choices = cells.offered(column, row)
        order = None
        if choices is None:  # the input itself contains the choices
            letters = list(LETTERS[: cells.lettered(fill(self.input, values | {"choices": ""}))])
            if not letters:
                raise TaskError(f"no column {' or '.join(map(repr, self.choices))}, no columns A and B")
            choices = cells.Choices(letters, letters)
        elif self.shuffle:
            order = cells.drawn_order(choices.texts)
        order = order or list(range(len(choices.texts)))
        if not cells.is_scores(column):
            if not self.label:
                raise TaskError(
                    "the choices have no scores, and the spec has no 'label' to name the column with the answer"
                )
            column = cells.column(row, self.label)
        right = cells.right_choices(column, choices)
        values["choices"] = "\n".join(f"({LETTERS[i]}) {choices.texts[old]}" for i, old in enumerate(order))
        places = sorted(order.index(old) for old in right)
        text, letter = fill(self.input, values), LETTERS[places[0]]
        return Example(text, places[0], letter, also=tuple(places[1:]), choices=len(order))

    def _open_question(self, row: Row, values: dict[str, str]) -> Example:
        if self.shuffle:
            texts = list(values.values())
            values = {name: texts[i] for name, i in zip(values, cells.drawn_order(texts), strict=True)}
        answers = cells.accepted(row, self.answers)
        return Example(fill(self.input, values), None, answers[0], answers=answers)


def fill(template: str, values: Mapping[str, str]) -> str:
    """Replaces each {name} by its value; braces inside a value stay as they are."""
    return re.sub(r"\{(\w+)\}", lambda match: values[match[1]], template)
