"""Where rows come from: a folder of files, or the hub through `datasets`. The lab is a folder like any other."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from tasks.catalogue import load_spec, task_names
from tasks.rows import SUFFIXES, Row, load_json, read_rows
from tasks.spec import SPLITS, Example, TaskError, TaskSpec
from tasks.splits import TaskData, build_data

USUAL_STEMS = {
    "train": ("train",),
    "validation": ("validation", "valid", "val", "dev", "validation_matched", "dev_matched"),
    "test": ("test",),
}
MANUAL_PROMPT_FILE = "manual_prompt.txt"
HUB_TRAIN_POOL = 5_000  # training rows rendered from a hub data set: plenty to draw k shots from


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
            annotations = load_json(path).get("annotations")
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
