"""The folder of a run: how its files are written, and how they are read and checked again."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
import platform
import reprlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from experiments.config import RunConfig, read_config
from experiments.run.files import write_whole, writing

LOCK = ".lock"  # names the process that is using a run's folder
CONFIG, RESULT, HEADROOM = "config.yaml", "best_prompt.json", "headroom.json"
METRICS, PROMPTS = "metrics.jsonl", "prompts.jsonl"  # grow row by row
CANDIDATES, PREDICTIONS = "candidates.jsonl", "predictions.jsonl"  # written whole, at the end of a run
PHASES = ("sampling", "scoring", "update", "review")  # of an iteration; metrics.jsonl has the seconds of each
EVALUATION = "evaluation.json"  # of `appo evaluate`
OUTCOME = (RESULT, CANDIDATES, PREDICTIONS, EVALUATION)  # of a finished run
SCORED = "scored.jsonl"  # of a run whose target is behind a server: its answers, which cost something
SO_FAR = "best_so_far.json"  # of a run that was stopped
ADAPTER = "adapter_config.json"  # in the folder of an agent that is an adapter, not a whole model
SCORES = tuple(f"{which}{split}" for which in ("", "manual_") for split in ("validation", "test"))
UNBEGUN = {LOCK, f"{CONFIG}.part"}  # all that a run leaves if killed before it wrote its configuration
NUMBER = (int, float, type(None))  # a score; None where it was not finite
Kind = type | tuple[type, ...]
RESULT_KEYS: dict[str, Kind] = {
    **dict.fromkeys(("task", "mode", "metric", "manual_prompt", "chosen", "verdict"), str),
    **dict.fromkeys(("seed", "validation_rows", "test_rows"), int),
    **dict.fromkeys((f"{name}_score" for name in SCORES), NUMBER),
    **dict.fromkeys((f"{name}_interval" for name in SCORES), list),
}


class RunExistsError(ValueError):
    """The run's folder is there already, or another process is using it; nothing in it has been changed."""


class RunFolderError(ValueError):
    """A file in a run's folder is not what a run writes; the message names it."""


class RunFolder:
    """The folder of one run. Created by the first write; an existing run is never overwritten.

    Args:
        path: must not exist, or be an empty folder, if `new`.
        new: False for the folder of a run that was begun before.

    Attributes:
        written: whether this process writes here; False in a `ReadFolder`.

    Raises:
        RunExistsError: the folder of a new run holds something.
    """

    written = True

    def __init__(self, path: Path, new: bool = True) -> None:
        self.path, self._new = path, new
        self._check_new()

    def _check_new(self) -> None:
        """Raises RunExistsError if this is the folder of a new run and holds something."""
        path = self.path
        if self._new and path.exists() and not (path.is_dir() and {p.name for p in path.iterdir()} <= UNBEGUN):
            stopped = (path / CONFIG).is_file() and not (path / RESULT).is_file()
            way = "--resume goes on with the run in it, or name" if stopped else "name"
            raise RunExistsError(f"{str(path)!r} exists and is not empty; {way} another run folder")

    def check_writable(self) -> None:
        """Raises an OSError if nothing can be written here, as far as permissions tell; writes nothing."""
        there = next(path for path in (self.path.absolute(), *self.path.absolute().parents) if path.exists())
        writable = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
        if not writable:
            number = errno.EACCES if there.is_dir() else errno.ENOTDIR
            raise OSError(number, os.strerror(number), str(there))

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from writing here while a block runs; if this process dies, the system frees the lock.

        Raises:
            RunExistsError: another process is using the folder, or made a run in it while this one was loading.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with (self.path / LOCK).open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                file.seek(0)
                raise RunExistsError(f"{str(self.path)!r} is in use by {file.read() or 'another process'}") from error
            except OSError as error:  # some network file systems have no locks
                raise OSError(error.errno, f"cannot be locked ({error.strerror})", file.name) from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            try:
                self._check_new()
                self._new = False
                yield
            finally:
                (self.path / LOCK).unlink(missing_ok=True)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """config.yaml: everything that shaped the run."""
        self.write_text(CONFIG, yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """One JSON object as a file of its own; NaN and infinity become null."""
        self.write_text(name, json.dumps(_finite(data), indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def read_json(self, name: str) -> dict[str, Any] | None:
        """What `write_json` wrote; None if the file is not there.

        Raises:
            RunFolderError: the file holds anything else.
        """
        path = self.path / name
        return _object(path.read_bytes(), str(path)) if path.is_file() else None

    def write_text(self, name: str, text: str) -> None:
        """A file of text, such as the report."""
        write_whole(self.path / name, text)

    def write_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """A .jsonl file as a whole; NaN and infinity become null."""
        self.write_text(name, jsonl_of(rows))

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows to a .jsonl file, all or (unless the machine crashes) none; NaN and infinity become null."""
        path = self.path / name
        with writing(path):
            self.path.mkdir(parents=True, exist_ok=True)
            path.touch()
            size = path.stat().st_size
            try:
                with path.open("a", encoding="utf-8") as file:
                    file.write(jsonl_of(rows))
            except OSError:  # the disk is full: leave no half line, also of what was written when the file was closed
                os.truncate(path, size)
                raise

    def sizes(self) -> dict[str, int]:
        """The size in bytes of each .jsonl file that grows, after syncing it to the disk."""
        sizes = {}
        for path in (self.path / name for name in (METRICS, PROMPTS) if (self.path / name).is_file()):
            with writing(path), path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
        return sizes

    def truncate(self, sizes: Mapping[str, int]) -> None:
        """Cuts the .jsonl files back to these sizes.

        Raises:
            RunFolderError: a file is shorter than that, so rows are missing; no file is changed.
        """
        paths = {self.path / name: size for name, size in sizes.items()}
        for path, size in paths.items():
            found = path.stat().st_size if path.is_file() else 0
            if found < size:
                raise RunFolderError(
                    f"{path}: {found} bytes, but {size} when the checkpoint was made; rows are missing"
                )
        for path, size in paths.items():
            os.truncate(path, size)

    def remove(self, name: str) -> None:
        """Removes a file, if it is there."""
        (self.path / name).unlink(missing_ok=True)

    def clear(self) -> None:
        """Removes the .jsonl files, for a run that begins anew; a server's answers are kept."""
        for path in self.path.glob("*.jsonl"):
            if path.name != SCORED:
                path.unlink()


class ReadFolder(RunFolder):
    """The folder of a run whose files another process of the same job writes; everything that would write does nothing.

    Args:
        path: as for `RunFolder`.
    """

    written = False

    def __init__(self, path: Path) -> None:
        super().__init__(path, new=False)

    @contextmanager
    def lock(self) -> Iterator[None]:
        """No lock: the other process has it."""
        yield

    def write_text(self, name: str, text: str) -> None:
        """Nothing."""

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Nothing."""

    def sizes(self) -> dict[str, int]:
        """Nothing."""
        return {}

    def truncate(self, sizes: Mapping[str, int]) -> None:
        """Nothing."""

    def remove(self, name: str) -> None:
        """Nothing."""

    def clear(self) -> None:
        """Nothing."""


def jsonl_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The text of a .jsonl file with these rows; NaN and infinity become null."""
    return "".join(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)


def _finite(value: Any) -> Any:
    """The value with NaN and infinity as None, since JSON has neither."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file that `RunFolder.append` wrote; half a last line, left by a kill, is skipped.

    Raises:
        RunFolderError: a line is no JSON object.
    """
    with path.open("rb") as lines:  # not str.splitlines, which also breaks at \u2028 and the like
        return [_object(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line.endswith(b"\n")]


def new_folder(config: RunConfig) -> Path:
    """The folder that a run of this configuration writes into, by default named after task, time and seed."""
    return Path(config.run or f"runs/{Path(config.task).stem}-{datetime.now():%Y%m%d-%H%M%S}-{config.seed}")


def stored_config(folder: Path) -> RunConfig:
    """The configuration that a run left in its folder.

    Raises:
        RunFolderError: there is none.
        ConfigError: it is not what a run writes.
    """
    if not (folder / CONFIG).is_file():
        raise RunFolderError(f"{str(folder)!r} holds no {CONFIG}; expected the folder of a run")
    return read_config(folder / CONFIG)


def read_result(folder: Path) -> dict[str, Any]:
    """What best_prompt.json of a run's folder holds.

    Raises:
        RunFolderError: it is not there, or not what a run writes.
    """
    path = folder / RESULT
    if not path.is_file():
        raise RunFolderError(f"{str(folder)!r} holds no {RESULT}; expected the folder of a finished run")
    result = _object(path.read_bytes(), str(path))
    _check(result, RESULT_KEYS, str(path))
    for name in SCORES:
        _check_interval(result, name, str(path))
    if result["mode"] == "tte":
        _check(result, {"edits": list, "prompt": (str, type(None))}, str(path))
        for edit in result["edits"]:
            _check(edit, {"input": str, "prompt": str}, f"{path}: 'edits'")
    else:
        _check(result, {"prompt": str, "paper_protocol": (dict, type(None)), "answers_on_test": dict}, str(path))
        if (protocol := result["paper_protocol"]) is not None:
            _check(protocol, {"name": str, "test_score": NUMBER}, f"{path}: 'paper_protocol'")
        if shares := result["answers_on_test"]:
            _check(shares, dict.fromkeys(("best", "manual", "right"), dict), f"{path}: 'answers_on_test'")
            for name in shares:
                _check(shares[name], dict.fromkeys(shares["right"], NUMBER), f"{path}: 'answers_on_test' {name!r}")
    return result


def read_predictions(folder: Path) -> list[dict[str, Any]]:
    """The rows of predictions.jsonl; none if the run has no such file.

    Raises:
        RunFolderError: a row is not what a run writes.
    """
    rows = read_optional(folder / PREDICTIONS)
    for n, row in enumerate(rows, 1):
        where = f"{folder / PREDICTIONS}:{n}"
        _check(row, {"input": str, "expected": list, "manual": dict, "best": dict}, where)
        for side in ("manual", "best"):
            _check(row[side], {"answer": str, "score": NUMBER, "probabilities": dict}, f"{where}: {side!r}")
            _check(row[side]["probabilities"], dict.fromkeys(row[side]["probabilities"], NUMBER), f"{where}: {side!r}")
        if not row["expected"] or not all(isinstance(answer, str) for answer in row["expected"]):
            raise RunFolderError(f"{where}: 'expected' is {reprlib.repr(row['expected'])}; expected the right answers")
    return rows


def read_candidates(folder: Path) -> list[dict[str, Any]]:
    """The rows of candidates.jsonl; none if the run has no such file.

    Raises:
        RunFolderError: a row is not what a run writes.
    """
    rows = read_optional(folder / CANDIDATES)
    for n, row in enumerate(rows, 1):
        kinds: dict[str, Kind] = {"prompt": str, "kind": str, "reward": NUMBER, "validation_score": NUMBER}
        _check(row, kinds | {"validation_interval": list, "validation_rows": int}, f"{folder / CANDIDATES}:{n}")
        _check_interval(row, "validation", f"{folder / CANDIDATES}:{n}")
    return rows


def read_optional(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file, as `read_jsonl`; none if there is no such file."""
    return read_jsonl(path) if path.is_file() else []


def _check_interval(found: Mapping[str, Any], name: str, where: str) -> None:
    ends = found[f"{name}_interval"]
    if len(ends) != 2 or not all(isinstance(end, NUMBER) for end in ends):
        raise RunFolderError(f"{where}: '{name}_interval' is {reprlib.repr(ends)}; expected two numbers")


def finished(folder: Path) -> tuple[RunConfig, dict[str, Any]]:
    """The configuration and the result of a finished run.

    Raises:
        RunFolderError: the folder holds no finished run, or files of two different ones.
    """
    config, result = stored_config(folder), read_result(folder)
    if result["mode"] != config.mode:
        raise RunFolderError(
            f"{folder / CONFIG} says mode {config.mode}, but {folder / RESULT} comes from a run in mode "
            f"{result['mode']}"
        )
    return config, result


def read_headroom(folder: Path) -> list[str]:
    """The lines of headroom.json; none if the run has no such file, as with headroom=0.

    Raises:
        RunFolderError: the file is not what a run writes.
    """
    path = folder / HEADROOM
    if not path.is_file():
        return []
    seen = _object(path.read_bytes(), str(path))
    _check(seen, {"lines": list}, str(path))
    return [str(line) for line in seen["lines"]]


def _check(found: object, kinds: Mapping[str, Kind], where: str) -> None:
    if not isinstance(found, dict):
        raise RunFolderError(f"{where}: found {reprlib.repr(found)}; expected what a finished run writes")
    for key, kind in kinds.items():
        if not isinstance(found.get(key), kind):
            shown = f"is {reprlib.repr(found[key])}" if key in found else "is missing"
            raise RunFolderError(f"{where}: {key!r} {shown}; expected what a finished run writes")


def _object(line: bytes, where: str) -> dict[str, Any]:
    try:
        found = json.loads(line.decode(), parse_int=_integer)
        if b"\\u" in line:
            json.dumps(found, ensure_ascii=False).encode()  # raises for half a character written as an escape
    except (ValueError, RecursionError) as error:
        raise RunFolderError(f"{where}: not JSON: {error}") from error
    if not isinstance(found, dict):
        raise RunFolderError(f"{where}: expected a JSON object, found {type(found).__name__}")
    return found


def _integer(digits: str) -> int:
    """A whole number that a float can hold; a run writes no larger ones."""
    number = int(digits)
    if abs(number) > sys.float_info.max:
        raise ValueError(f"a number of {len(digits)} digits")
    return number
