"""Reads the cells of a raw row: texts, labels, answers, choices.

Cells come from files and may hold anything. Each function here takes any value, and reads it or raises a TaskError that
names the fault; the caller adds the file and the row.
"""

from __future__ import annotations

import math
import random
import re
import unicodedata
from collections.abc import Mapping, Sequence
from string import ascii_uppercase
from typing import Any, NamedTuple

from tasks.errors import TaskError, listed, shown

LETTERS = tuple(ascii_uppercase)
LONGEST_TEXT = 1_000_000  # characters; longer texts fit no model's context, and tokenising one takes half a minute

Row = Mapping[str, Any]  # column -> value


# -- columns and texts -------------------------------------------------------------------------------------------


def find(row: Row, name: str) -> Any:
    """The value of a column, or at a dotted path into a column; None if there is no such value."""
    if name in row:
        return row[name]
    value: Any = row
    for part in name.split("."):
        if not isinstance(value, Mapping) or part not in value:
            return None
        value = value[part]
    return value


def column(row: Row, names: Sequence[str]) -> Any:
    """The value of the first of these columns that is present and not null."""
    for name in names:
        if (value := find(row, name)) is not None:
            return value
    empty = [name for name in names if name in row]
    if empty:
        raise TaskError(f"column {empty[0]!r} is null")
    raise TaskError(f"no column {' or '.join(map(repr, names))}; the columns are {listed(row)}")


def written(value: Any) -> str | None:
    """Text, a number or a truth value as a .csv would hold it; None for anything else."""
    return str(value) if isinstance(value, str | int | float) else None


def spellings(value: Any) -> list[str]:
    """A cell as `written`, then the same value as other programs write it.

    pandas writes whole numbers of a column with gaps as 1.0, and truth values as True; macOS takes accents apart.
    """
    text = written(value)
    if text is None:
        return []
    other = re.sub(r"^(-?\d+)\.0$", r"\1", text.lower() if text in ("True", "False") else text)
    return [text, unicodedata.normalize("NFC", other)]


def text_of(value: Any, name: str) -> str:
    """The text of a field: text, a number, or a list of these, joined by commas."""
    items = value if isinstance(value, list) else [value]
    if items and all(isinstance(item, str) or _is_number(item) for item in items):
        joined = ", ".join(map(str, items)).strip()
        if len(joined) > LONGEST_TEXT:
            raise TaskError(f"field {name!r} has {len(joined)} characters; expected at most {LONGEST_TEXT}")
        if joined and not re.search("[\ud800-\udfff]", joined):  # a lone surrogate, which no tokenizer takes
            return joined
    raise TaskError(f"field {name!r} is {shown(value)}; expected some text")


def _is_number(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


# -- scores and answers ------------------------------------------------------------------------------------------


def is_scores(value: Any) -> bool:
    """Whether a cell maps names to scores."""
    return isinstance(value, Mapping) and bool(value) and all(map(_is_score, value.values()))


def _is_score(value: Any) -> bool:
    return isinstance(value, bool) or _is_number(value)


def best(scores: Mapping[str, Any]) -> list[str]:
    """The names with the highest score."""
    if not is_scores(scores):
        raise TaskError(f"the scores are {shown(scores)}; expected a number for each name")
    highest = max(scores.values())
    return [name for name, score in scores.items() if score == highest]


def told_apart(scores: Mapping[str, Any]) -> list[str]:
    """As `best`, but refuses scores that are all equal."""
    names = best(scores)
    if len(names) == len(scores) > 1:
        raise TaskError(f"the scores are {shown(scores)}; expected a highest one")
    return names


def accepted(row: Row, names: Sequence[str]) -> tuple[str, ...]:
    """All accepted answers, each once; a column holds a text, a list of texts, or scored texts (the highest count)."""
    column(row, names)  # one of them must be there
    answers: list[str] = []
    for name in names:
        value = find(row, name)
        if isinstance(value, Mapping):
            value = best(value)
        items = value if isinstance(value, list) else [value]
        answers += [text_of(item, name) for item in items if item is not None and item != ""]
    if not answers:
        raise TaskError(f"no answer in column {' or '.join(map(repr, names))}")
    return tuple(dict.fromkeys(answers))


# -- choices -----------------------------------------------------------------------------------------------------


class Choices(NamedTuple):
    """The choices of a row, and the names by which an answer refers to them: letters, or the row's own names."""

    texts: list[str]
    names: list[str]


def offered(value: Any, row: Row) -> Choices | None:
    """The choices of a row, from a column or else from the columns A, B, C, ...; None if it has none.

    Args:
        value: of the column: a list of texts or of {text, label}, a {text: [...], label: [...]}, scored texts, or
            texts by letter; None if there is no such column.
        row: the row.
    """
    names: Any = None
    if value is None:
        texts: Any = _lettered_columns(row)
        if not texts:
            return None
    elif isinstance(value, Mapping) and isinstance(value.get("text"), list):
        texts, names = value["text"], value.get("label")
    elif is_scores(value):
        texts = list(value)
    elif isinstance(value, Mapping) and tuple(value) == LETTERS[: len(value)]:
        texts = list(value.values())
    elif isinstance(value, list):
        texts = [item.get("text") if isinstance(item, Mapping) else item for item in value]
        names = [item.get("label") if isinstance(item, Mapping) else None for item in value]
    else:
        raise TaskError(f"the choices are {shown(value)}; expected a list")
    if not 2 <= len(texts) <= len(LETTERS):
        raise TaskError(f"the number of choices is {len(texts)}; expected 2 to {len(LETTERS)}")
    return Choices([text_of(text, "choices") for text in texts], _names(names, len(texts)))


def _lettered_columns(row: Row) -> list[Any]:
    present = [letter for letter in LETTERS if row.get(letter) is not None]
    if present != list(LETTERS[: len(present)]):
        raise TaskError(f"the columns of choices are {listed(present)}; expected no gaps")
    return [row[letter] for letter in present]


def _names(given: Any, count: int) -> list[str]:
    """The row's own names for its choices if each choice has a different one, else letters."""
    names = [written(name) for name in given] if isinstance(given, list) else []
    own = [name.strip() for name in names if name is not None]
    return own if len(own) == len(set(own)) == count else list(LETTERS[:count])


def lettered(text: str) -> int:
    """How many choices a text offers at its end, in lines that begin with (A), (B) and so on; 0 if it offers none."""
    letters = "".join(re.findall(r"^\(([A-Z])\)", text, re.MULTILINE))
    last = letters[letters.rfind("A") :]
    return len(last) if len(last) > 1 and tuple(last) == LETTERS[: len(last)] else 0


def right_choices(answer: Any, choices: Choices) -> list[int]:
    """The indices of the right choices.

    Args:
        answer: the name of a choice, or its index; or a score for each choice, by its text or by its name.
        choices: all choices of the row.
    """
    if isinstance(answer, Mapping):
        return _scored_choices(answer, choices)
    letters = list(LETTERS[: len(choices.texts)])
    indices = list(map(str, range(len(choices.texts)))) if choices.names == letters else []
    for given in map(str.strip, spellings(answer)):
        for name in (given, given.strip("()")):
            if name in choices.names:
                return [choices.names.index(name)]
        if given in indices:
            return [indices.index(given)]
    expected = f"a letter up to {letters[-1]}, or an index" if choices.names == letters else listed(choices.names)
    raise TaskError(f"answer {shown(answer)}; expected {expected}")


def _scored_choices(scores: Mapping[str, Any], choices: Choices) -> list[int]:
    highest = {name.strip() for name in told_apart(scores)}
    scored = {name.strip() for name in scores}
    for called in (choices.texts, choices.names):
        if scored == set(called):
            return [place for place, name in enumerate(called) if name in highest]
    raise TaskError(f"the scores are {shown(scores)}; expected one for each of {listed(choices.texts)}")


def drawn_order(texts: Sequence[str]) -> list[int]:
    """A shuffled order of the texts that depends only on the texts."""
    return random.Random("\n".join(texts)).sample(range(len(texts)), len(texts))
