"""Where rows come from: a folder of files, or the hub through `datasets`. The lab is a folder like any other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from tasks.catalogue import load_spec
from tasks.cells import Row, text_of
from tasks.errors import MissingFilesError, TaskError, TooFewRowsError
from tasks.rows import SUFFIXES, read_json, read_rows, read_text
from tasks.spec import SPLITS, Example, TaskSpec
from tasks.splits import TaskData, build_data

USUAL_STEMS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "validation_matched", "dev_matched"),
    "test": ("test",),
}
MANUAL_PROMPT_FILE = "manual_prompt.txt"
HUB_TRAIN_POOL = 5_000  # training rows rendered from a hub data set: plenty to draw k shots from


def load_task(name: str, data: str, shots: int = 16, seed: int = 0, test_limit: int | None = None) -> TaskData:
    """A task's splits, ready to use.

    Args:
        name: a task's name, or the path of a spec.
        data: "hub", or a folder that holds the files of the task, directly or in a folder of the task's name.
        shots, seed, test_limit: as in `build_data`.

    Raises:
        TaskError: unknown task, missing or malformed files, unknown labels, too few rows.
    """
    spec = load_spec(name)
    try:
        if data == "hub":
            rows, source = _hub_rows(spec), spec.hub["path"]
        else:
            folder = _task_folder(spec, Path(data))
            rows, source = _file_rows(spec, folder), str(folder)
            spec = replace(spec, manual_prompt=_manual_prompt(spec, folder))
        return build_data(spec, rows, shots, seed, test_limit)
    except TooFewRowsError as error:
        raise TooFewRowsError(f"{source}: {error}") from None
    except OSError as error:  # an invalid path, or a folder that may not be read
        raise TaskError(f"{spec.name}: {error}") from error


# -- files -------------------------------------------------------------------------------------------------------


def _task_folder(spec: TaskSpec, data: Path) -> Path:
    """The folder of the task's files: the data folder, or the subfolder named by the spec or by the task."""
    if not data.is_dir():
        raise TaskError(f"no data folder {str(data.absolute())!r}; expected a folder, 'lab' or 'hub'")
    within = (data / (spec.folder or spec.name), data / spec.name, data / spec.short_name, data)
    folders = [folder for folder in within if folder.is_dir()]
    return next((folder for folder in folders if _find(spec, folder, "train")), folders[0])


def _file_rows(spec: TaskSpec, folder: Path) -> dict[str, list[Example]]:
    found = {split: _find(spec, folder, split) for split in SPLITS}
    for split, path in found.items():
        # A spec without `files` needs train and test; one that names a training file may have only that.
        needed = spec.files.get(split) or split == "train" or (split == "test" and not spec.files.get("train"))
        if path is None and needed:
            raise MissingFilesError(_missing(spec, folder, split))
    files = {split: path for split, path in found.items() if path is not None}
    return {split: _examples(spec, read_rows(path, spec.columns), str(path)) for split, path in files.items()}


def _find(spec: TaskSpec, folder: Path, split: str) -> Path | None:
    """The split's file: one that the spec names, else one with a usual name (the least nested, then by path)."""
    for name in spec.files.get(split, []):
        if (folder / name).is_file():
            return folder / name
    paths = folder.rglob("*") if _is_own(spec, folder) else folder.iterdir()
    usual = [p for p in paths if p.stem in USUAL_STEMS[split] and p.suffix.lower() in SUFFIXES and p.is_file()]
    return min(usual, key=lambda path: (len(path.parts), str(path)), default=None)


def _is_own(spec: TaskSpec, folder: Path) -> bool:
    """Whether files in subfolders count: the folder has the task's name, and the spec names no training file.

    In any other folder, a file further down may belong to another task.
    """
    return folder.resolve().name == spec.short_name and not spec.files.get("train")


def _missing(spec: TaskSpec, folder: Path, split: str) -> str:
    names = [*spec.files.get(split, []), f"{split}.jsonl (or {', '.join(SUFFIXES[1:])})"]
    message = f"{spec.name}: no {split} file in {str(folder.absolute())!r}; looked for {', '.join(names)}"
    if not _is_own(spec, folder) and any(path.is_dir() for path in folder.iterdir()):
        message += f"; files further down count only in a folder named {spec.short_name!r}"
    return message


def _manual_prompt(spec: TaskSpec, folder: Path) -> str:
    """The manual prompt in the folder, else the spec's: the folder's inputs may need a baseline of their own."""
    for name in (MANUAL_PROMPT_FILE, *spec.files.get("manual", [])):
        path = folder / name
        if path.is_file() and path.suffix == ".json":
            annotations = read_json(path)
            found = annotations.get("annotations") if isinstance(annotations, dict) else None
            if not isinstance(found, list) or not found:
                raise TaskError(f"{path}: expected a list of instructions under 'annotations'")
            try:
                return text_of(found[0], "annotations")
            except TaskError as error:
                raise TaskError(f"{path}: {error}") from None
        if path.is_file():
            return read_text(path).strip()
    return spec.manual_prompt


def _examples(spec: TaskSpec, rows: Iterable[tuple[str, Row]], source: str) -> list[Example]:
    examples = [example for where, row in rows if (example := spec.example(row, where)) is not None]
    if not examples:  # an empty split would silently be cut from train
        raise TaskError(f"{source}: no row is left; all have one of the labels {', '.join(spec.drop_labels)}")
    return examples


# -- hub ---------------------------------------------------------------------------------------------------------


def _hub_rows(spec: TaskSpec) -> dict[str, list[Example]]:
    import datasets  # takes seconds to import, and files do not need it

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
            reason = next(iter(str(error).splitlines()), "") or type(error).__name__
            raise TaskError(
                f"{spec.name}: cannot load {spec.hub['path']!r} from the hub ({reason}); without a network put "
                f"train and test files ({', '.join(SUFFIXES)}) into a folder and use data=DIR, or data=lab"
            ) from error
        if split == "train" and len(data) > HUB_TRAIN_POOL:
            data = data.shuffle(seed=0).select(range(HUB_TRAIN_POOL))
        where = f"{'/'.join(filter(None, source))}[{spec.hub[split]}]"
        if not len(data):
            raise TaskError(f"{where}: the split has no rows")
        rows[split] = _examples(spec, ((f"{where}:{i}", row) for i, row in enumerate(data)), where)
    return rows
