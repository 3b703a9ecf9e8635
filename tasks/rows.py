"""Reads .jsonl, .json, .tsv, .csv and .parquet files: each row as column -> value, with its file and number."""

from __future__ import annotations

import csv
import json
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from tasks.errors import TaskError, shown

SUFFIXES = (".jsonl", ".json", ".tsv", ".csv", ".parquet")

Row = dict[str, Any]


csv.field_size_limit(2**31 - 1)  # a cell may be a document; the csv module's own limit is 128 kB


def read_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[tuple[str, Row]]:
    """Yields ("file:number", column -> value) for each row of a .jsonl, .json, .tsv, .csv or .parquet file.

    Args:
        path: the file.
        columns: the names of the columns of a .tsv or .csv without header.

    Raises:
        TaskError: the file cannot be read, has no rows, or has a malformed row.
    """
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".tsv": partial(_read_tsv, columns=columns),
        ".csv": partial(_read_csv, columns=columns),
        ".parquet": _read_parquet,
    }
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise TaskError(f"{path}: unknown kind of file; expected {', '.join(SUFFIXES)}")
    empty = True
    with _reading(path):
        for number, row in reader(path):
            empty = False
            yield f"{path}:{number}", row
    if empty:
        raise TaskError(f"{path}: the file has no rows")


def read_text(path: Path) -> str:
    """The whole text of a file.

    Raises:
        TaskError: it cannot be read, or is not UTF-8.
    """
    with _reading(path):
        return path.read_text(encoding="utf-8-sig")


def read_json(path: Path) -> Any:
    """The value in a .json file.

    Raises:
        TaskError: it cannot be read, or is not JSON.
    """
    return _parse_json(read_text(path), path, 1)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Says in one line why a file cannot be read."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: not UTF-8 at byte {_bad_byte(path)}") from error
    except OSError as error:
        raise TaskError(f"{path}: cannot be read: {error.strerror or error}") from error


def _bad_byte(path: Path) -> int:
    """The byte at which a file stops being UTF-8; the decoder of an open file counts from its last block only."""
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


# -- JSON --------------------------------------------------------------------------------------------------------


def _read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield number, _object(_parse_json(line.rstrip("\n"), path, number), path, number)


def _read_json(path: Path) -> Iterator[tuple[int, Row]]:
    """A list of objects, or an object whose "examples" is such a list or maps keys to objects."""
    data = read_json(path)
    rows = data.get("examples") if isinstance(data, dict) else data
    if not isinstance(rows, list | dict):
        raise TaskError(f"{path}: expected a list of objects, or an object with 'examples'")
    for number, row in enumerate(rows.values() if isinstance(rows, dict) else rows, 1):
        yield number, _object(row, path, number)


def _parse_json(text: str, path: Path, line: int) -> Any:
    """The value of a JSON text that begins in this line of the file."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place = f"{path}:{line + error.lineno - 1}"
        several = error.msg == "Extra data" and path.suffix.lower() == ".json"
        hint = "; a file with an object on each line is called .jsonl" if several else ""
        raise TaskError(f"{place}: not JSON: {error.msg} at column {error.colno}{hint}") from error
    except RecursionError as error:
        raise TaskError(f"{path}:{line}: values are nested too deeply") from error
    except ValueError as error:  # Python refuses whole numbers of more than 4300 digits
        raise TaskError(f"{path}:{line}: a number has too many digits") from error


def _object(row: Any, path: Path, number: int) -> Row:
    if not isinstance(row, dict):
        raise TaskError(f"{path}:{number}: expected an object, found {type(row).__name__}")
    return row


# -- tables ------------------------------------------------------------------------------------------------------


def _read_tsv(path: Path, columns: Sequence[str] = ()) -> Iterator[tuple[int, Row]]:
    # GLUE's files hold stray quotes, so quotes mean nothing here. SNLI's rows may hold more annotators' labels than the
    # header has columns for (label1, ...), all before the gold label; the last field belongs to the last column.
    with path.open(encoding="utf-8-sig") as lines:
        table = (
            (number, line.rstrip("\n").split("\t") if line != "\n" else []) for number, line in enumerate(lines, 1)
        )
        header = _header(path, table, columns, "tabs", ",;")
        longer = header[-1:] == ["gold_label"] and "label1" in header
        for number, row in table:
            if row:
                _check_width(path, number, len(row), len(header), longer)
                yield number, {**dict(zip(header[:-1], row, strict=False)), header[-1]: row[-1]}


def _read_csv(path: Path, columns: Sequence[str] = ()) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        table = ((reader.line_num, row) for row in reader)
        try:
            header = _header(path, table, columns, "commas", ";\t")
            for number, row in table:
                if row:
                    _check_width(path, number, len(row), len(header))
                    yield number, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise TaskError(f"{path}:{reader.line_num}: not CSV: {error}") from error


def _header(
    path: Path, table: Iterator[tuple[int, list[str]]], columns: Sequence[str], between: str, others: str
) -> list[str]:
    """The names of the columns: `columns` if given, else the table's first row.

    A header that is not divided as it should be (`between`), but has one of the characters `others`, is refused.
    """
    header: list[str] | None = list(columns) or next((row for _, row in table), None)
    if header == []:
        raise TaskError(f"{path}:1: the header is an empty line")
    if not columns and header and len(header) == 1 and any(other in header[0] for other in others):
        raise TaskError(f"{path}:1: the header is {shown(header[0])}; expected columns divided by {between}")
    repeated = [name for name, count in Counter(header).items() if name and count > 1]
    if repeated:
        raise TaskError(f"{path}:1: {shown(repeated[0])} is the name of two columns")
    return header or []


def _check_width(path: Path, line: int, found: int, expected: int, longer: bool = False) -> None:
    if found < expected or (found > expected and not longer):
        raise TaskError(f"{path}:{line}: {found} fields; the header has {expected} columns")


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow.parquet  # comes with `datasets`; half a second to import

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise TaskError(f"{path}: not a readable parquet file: {error}") from error
    yield from enumerate(rows, 1)
