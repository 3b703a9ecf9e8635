"""Where rows come from: a folder of files, or the hub through `datasets`. The lab is a folder like any other."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from tasks.catalogue import load_spec, task_names
from tasks.task import SPLITS, Example, TaskData, TaskError, TaskSpec, build_data

USUAL_STEMS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "validation_matched", "dev_matched"),
    "test": ("test",),
}
SUFFIXES = (".jsonl", ".json", ".tsv", ".csv", ".parquet")
MANUAL_PROMPT_FILE = "manual_prompt.txt"
HUB_TRAIN_POOL = 5_000  # training rows rendered from a hub data set: plenty to draw k shots from

Row = dict[str, Any]


class MissingFilesError(TaskError):
    """A folder does not hold the files of a task."""


def load_task(name: str, data: str, shots: int = 16, seed: int = 0, test_limit: int | None = None) -> TaskData:
    """A task's splits, ready to use.

    Args:
        name: a task's name, or the path of a spec.
        data: "hub", or a folder that holds the files of the task, directly or in a folder of the task's name.
        shots, seed, test_limit: of `build_data`.

    Raises:
        TaskError: unknown task, missing or malformed files, unknown labels, too few rows.
    """
    spec = load_spec(name)
    if data == "hub":
        rows = _hub_rows(spec)
    else:
        folder = _task_folder(spec, Path(data))
        rows = _file_rows(spec, folder)
        spec = replace(spec, manual_prompt=_manual_prompt(spec, folder))
    return build_data(spec, rows, shots, seed, test_limit)


# -- files -------------------------------------------------------------------------------------------------------


def _task_folder(spec: TaskSpec, data: Path) -> Path:
    if not data.is_dir():
        raise TaskError(f"no data folder {str(data.absolute())!r}; expected a folder, 'lab' or 'hub'")
    within = (data / (spec.folder or spec.name), data / spec.name, data / spec.name.rsplit("/", 1)[-1])
    return next((folder for folder in within if folder.is_dir()), data)


def _file_rows(spec: TaskSpec, folder: Path) -> dict[str, list[Example]]:
    found = {split: _find(spec, folder, split) for split in SPLITS}
    one_pool = bool(spec.files.get("train")) and not spec.files.get("test")  # the spec says that there is no more
    for split in ("train",) if one_pool else ("train", "test"):
        if found[split] is None:
            names = [*spec.files.get(split, []), f"{split}.jsonl (or {', '.join(SUFFIXES[1:])})"]
            raise MissingFilesError(
                f"{spec.name}: no {split} file in {str(folder.absolute())!r}; looked for {', '.join(names)}"
            )
    return {split: _examples(spec, read_rows(path, spec.columns)) for split, path in found.items() if path is not None}


def _manual_prompt(spec: TaskSpec, folder: Path) -> str:
    """The folder's own instruction, if it has one: its inputs may want another baseline than the spec's."""
    for name in (MANUAL_PROMPT_FILE, *spec.files.get("manual", [])):
        path = folder / name
        if path.is_file() and path.suffix == ".json":
            annotations = _load_json(path).get("annotations")
            if not isinstance(annotations, list) or not annotations:
                raise TaskError(f"{path}: expected a list of instructions under 'annotations'")
            return str(annotations[0]).strip()
        if path.is_file():
            return path.read_text(encoding="utf-8").strip()
    return spec.manual_prompt


def _find(spec: TaskSpec, folder: Path, split: str) -> Path | None:
    """The split's file: one that the spec names, else one with a usual name, the least nested, then the first."""
    for name in spec.files.get(split, []):
        if (folder / name).is_file():
            return folder / name
    others = set(task_names()) - {spec.name}
    usual = [
        p
        for p in folder.rglob("*")
        if p.suffix in SUFFIXES
        and p.stem in USUAL_STEMS[split]
        and p.is_file()
        and p.relative_to(folder).parts[0] not in others
    ]
    return min(usual, key=lambda path: (len(path.parts), str(path)), default=None)


def _examples(spec: TaskSpec, rows: Iterator[tuple[str, Row]]) -> list[Example]:
    return [example for where, row in rows if (example := spec.example(row, where)) is not None]


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
    rows = _load_json(path)["examples"]
    for number, row in enumerate(rows.values() if isinstance(rows, dict) else rows, 1):
        if not isinstance(row, dict):
            raise TaskError(f"{path}:{number}: expected an object, found {type(row).__name__}")
        yield number, row


def _load_json(path: Path) -> dict[str, Any]:
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


# -- hub ---------------------------------------------------------------------------------------------------------


def _hub_rows(spec: TaskSpec) -> dict[str, list[Example]]:
    import datasets  # seconds to import, and not needed for files

    if not spec.hub:
        raise MissingFilesError(f"{spec.name}: the task has no hub data set; use data=DIR")
    missing = [key for key in ("path", "train") if key not in spec.hub]
    if missing:
        raise TaskError(f"{spec.name}: the task's 'hub' has no {missing[0]!r}; use data=DIR")
    rows: dict[str, list[Example]] = {}
    for split in SPLITS:
        if split not in spec.hub:
            continue
        source = (spec.hub["path"], spec.hub.get("name"))
        try:
            data = datasets.load_dataset(*source, split=spec.hub[split], revision=spec.hub.get("revision"))
        except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise TaskError(
                f"{spec.name}: cannot load {spec.hub['path']!r} from the hub ({reason}); without a network put "
                f"train and test files ({', '.join(SUFFIXES)}) into a folder and use data=DIR, or data=lab"
            ) from error
        if split == "train" and len(data) > HUB_TRAIN_POOL:
            data = data.shuffle(seed=0).select(range(HUB_TRAIN_POOL))
        where = f"{'/'.join(filter(None, source))}[{spec.hub[split]}]"
        rows[split] = _examples(spec, ((f"{where}:{i}", row) for i, row in enumerate(data)))
    return rows
