"""Files of rows: .jsonl, .json, .tsv, .csv and .parquet, each row as columns and values with the place it stands at."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from tasks.spec import TaskError

SUFFIXES = (".jsonl", ".json", ".tsv", ".csv", ".parquet")

Row = dict[str, Any]


def read_rows(path: Path, columns: Sequence[str] = ()) -> Iterator[tuple[str, Row]]:
    """Yields (file and row, columns -> values) of a .jsonl, .json, .tsv, .csv or .parquet file.

    Args:
        path: the file.
        columns: the names of the columns of a .tsv or .csv without header.

    Raises:
        TaskError: the file has no rows, or one of them is malformed.
    """
    readers: dict[str, Callable[[Path], Iterator[tuple[int, Row]]]] = {
        ".jsonl": _read_jsonl,
        ".json": _read_json,
        ".tsv": partial(_read_tsv, columns=columns),
        ".csv": partial(_read_csv, columns=columns),
        ".parquet": _read_parquet,
    }
    empty = True
    try:
        for number, row in readers[path.suffix](path):
            empty = False
            yield f"{path}:{number}", row
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: not UTF-8 at byte {_bad_byte(path)}") from error
    if empty:
        raise TaskError(f"{path}: the file has no rows")


def _bad_byte(path: Path) -> int:
    """Where a file stops being UTF-8; the decoder of an open file counts from its last block."""
    try:
        path.read_bytes().decode()
    except UnicodeDecodeError as error:
        return error.start
    return 0


def _read_jsonl(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise TaskError(f"{path}:{number}: not JSON: {error.msg} at column {error.colno}") from error
            if not isinstance(row, dict):
                raise TaskError(f"{path}:{number}: expected an object, found {type(row).__name__}")
            yield number, row


def _read_json(path: Path) -> Iterator[tuple[int, Row]]:
    """A list of objects, or an object with such a list, or such numbered objects, under "examples"."""
    rows = load_json(path)["examples"]
    for number, row in enumerate(rows.values() if isinstance(rows, dict) else rows, 1):
        if not isinstance(row, dict):
            raise TaskError(f"{path}:{number}: expected an object, found {type(row).__name__}")
        yield number, row


def load_json(path: Path) -> dict[str, Any]:
    """The object of a .json file; a list becomes an object that has it under "examples"."""
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise TaskError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from error
    except UnicodeDecodeError as error:
        raise TaskError(f"{path}: not UTF-8 at byte {_bad_byte(path)}") from error
    if isinstance(data, list):
        return {"examples": data}
    if isinstance(data, dict) and isinstance(data.get("examples", []), list | dict):
        return {"examples": []} | data
    raise TaskError(f"{path}: expected a list of objects, or an object with 'examples'")


def _read_tsv(path: Path, columns: Sequence[str] = ()) -> Iterator[tuple[int, Row]]:
    # GLUE's files hold stray quotes, so nothing is quoted; SNLI's rows may be longer than the header, by further
    # annotators' labels before the gold one, so the last field is always the last column.
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            header = list(columns) or next(reader, [])
            if not header and reader.line_num:
                raise TaskError(f"{path}:1: the header is an empty line")
            for row in reader:
                _check_width(path, reader.line_num, len(row), len(header), longer=True)
                yield reader.line_num, {**dict(zip(header[:-1], row, strict=False)), header[-1]: row[-1]}
        except csv.Error as error:
            raise TaskError(f"{path}:{reader.line_num}: not TSV: {error}") from error


def _read_csv(path: Path, columns: Sequence[str] = ()) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        try:
            header = list(columns) or next(reader, [])
            for row in reader:
                _check_width(path, reader.line_num, len(row), len(header))
                yield reader.line_num, dict(zip(header, row, strict=True))
        except csv.Error as error:
            raise TaskError(f"{path}:{reader.line_num}: not CSV: {error}") from error


def _read_parquet(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow.parquet  # comes with `datasets`; half a second to import

    try:
        rows = pyarrow.parquet.read_table(path).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise TaskError(f"{path}: not a readable parquet file: {error}") from error
    yield from enumerate(rows, 1)


def _check_width(path: Path, line: int, found: int, expected: int, longer: bool = False) -> None:
    if found < expected or (found > expected and not longer):
        raise TaskError(f"{path}:{line}: {found} fields; the header has {expected} columns")
