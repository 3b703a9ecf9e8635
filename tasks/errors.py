"""Errors about a spec or data, for the person who wrote it: one printable line each, never a long one."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from reprlib import Repr

LONGEST = 2_000  # characters of a message
QUOTED = 100  # characters of each value that a message quotes
NAMED = 30  # names (of columns, of choices) that a message lists


class TaskError(ValueError):
    """A spec or a data file is invalid; the message names the file, the key or row, and what was expected.

    A message quotes files, and a terminal obeys escape sequences, so the message escapes them.
    """

    def __init__(self, message: str) -> None:
        super().__init__(printable(message if len(message) <= LONGEST else f"{message[:LONGEST]}..."))


class MissingFilesError(TaskError):
    """A folder does not hold the files of a task, or the task has no data set on the hub."""


class TooFewRowsError(TaskError):
    """The data have fewer rows than the run has to draw."""


def printable(text: str) -> str:
    """The text on one line, with every unprintable character escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def shown(value: object) -> str:
    """A value as messages quote it, shortened where it is long or deep."""
    short = Repr()
    short.maxlevel, short.maxstring, short.maxother, short.maxlong = 3, QUOTED, QUOTED, QUOTED
    try:
        return short.repr(value)
    except ValueError:  # Python refuses to write integers of more than 4300 digits
        return "a number of thousands of digits"


def listed(names: Iterable[object]) -> str:
    """Names joined by commas; of many, only the first ones. White space at an end of a name is shown by quotes."""
    cut = (str(name)[:QUOTED] for name in islice(names, NAMED + 1))
    first = [text if text and text == text.strip() else repr(text) for text in cut]
    return ", ".join(first[:NAMED]) + (", ..." if len(first) > NAMED else "")
