"""Where rows come from: a folder of files, or the hub through `datasets`. The lab is a folder like any other."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from tasks.task import SPLITS, Example, TaskData, TaskError, TaskSpec, build_data, load_spec, task_names

USUAL_STEMS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "validation_matched", "dev_matched"),
    "test": ("test",),
}
SUFFIXES = (".jsonl", ".tsv", ".csv", ".parquet")
MANUAL_PROMPT_FILE = "manual_prompt.txt"
HUB_TRAIN_POOL = 5_000  # training rows rendered from a hub data set: plenty to draw k shots from

Row = dict[str, Any]


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
        manual = folder / MANUAL_PROMPT_FILE  # a folder's inputs may want another baseline than the real ones
        if manual.is_file():
            spec = replace(spec, manual_prompt=manual.read_text(encoding="utf-8").strip())
    return build_data(spec, rows, shots, seed, test_limit)


# -- files -------------------------------------------------------------------------------------------------------


def _task_folder(spec: TaskSpec, data: Path) -> Path:
    if not data.is_dir():
        raise TaskError(f"no data folder {str(data.absolute())!r}; expected a folder, 'lab' or 'hub'")
    return data / spec.name if (data / spec.name).is_dir() else data


def _file_rows(spec: TaskSpec, folder: Path) -> dict[str, list[Example]]:
    found = {split: _find(spec, folder, split) for split in SPLITS}
    for split in ("train", "test"):
        if found[split] is None:
            names = [*spec.files.get(split, []), f"{split}.jsonl (or .tsv, .csv, .parquet)"]
            raise TaskError(
                f"{spec.name}: no {split} file in {str(folder.absolute())!r}; looked for {', '.join(names)}"
            )
    return {split: _examples(spec, read_rows(path)) for split, path in found.items() if path is not None}


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


def read_rows(path: Path) -> Iterator[tuple[str, Row]]:
    """Yields (file and row, columns -> values) of a .jsonl, .tsv, .csv or .parquet file.

    Raises:
        TaskError: the file has no rows, or one of them is malformed.
    """
    readers = {".jsonl": _read_jsonl, ".tsv": _read_tsv, ".csv": _read_csv, ".parquet": _read_parquet}
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


def _read_tsv(path: Path) -> Iterator[tuple[int, Row]]:
    # GLUE's files hold stray quotes, so nothing is quoted; SNLI's rows may be longer than the header, by further
    # annotators' labels before the gold one, so the last field is always the last column.
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
        try:
            header = next(reader, [])
            if not header and reader.line_num:
                raise TaskError(f"{path}:1: the header is an empty line")
            for row in reader:
                _check_width(path, reader.line_num, len(row), len(header), longer=True)
                yield reader.line_num, {**dict(zip(header[:-1], row, strict=False)), header[-1]: row[-1]}
        except csv.Error as error:
            raise TaskError(f"{path}:{reader.line_num}: not TSV: {error}") from error


def _read_csv(path: Path) -> Iterator[tuple[int, Row]]:
    with path.open(encoding="utf-8-sig", newline="") as lines:
        reader = csv.reader(lines, strict=True)
        header = next(reader, [])
        try:
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
        raise TaskError(f"{spec.name}: the task has no hub data set; use data=DIR")
    missing = [key for key in ("path", "train", "test") if key not in spec.hub]
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
