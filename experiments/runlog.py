"""What a run leaves behind: its folder, its JSON lines, and the pool of its best prompts."""

from __future__ import annotations

import fcntl
import json
import math
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

LOCK = ".lock"  # who is at work in a run's folder


class RunExistsError(ValueError):
    """The run's folder is there already, or another process is at work in it; nothing in it has been touched."""


class RunLog:
    """The folder of one run. Made by the first write, never over an existing one.

    Args:
        folder: where; must not exist, or be an empty folder.
        new: False: the folder is that of a run that is done.

    Raises:
        RunExistsError: the folder holds something.
    """

    def __init__(self, folder: Path, new: bool = True) -> None:
        if new and folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise RunExistsError(f"{str(folder)!r} exists and is not empty; name another run folder")
        self.folder = folder

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other processes from writing here while a block runs; the system lets go when this one dies, however.

        Raises:
            RunExistsError: another process is at work here.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / LOCK).open("a+", encoding="utf-8") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                file.seek(0)
                raise RunExistsError(f"{str(self.folder)!r} is in use by {file.read() or 'another process'}") from error
            file.truncate(0)
            file.write(f"process {os.getpid()} on {platform.node()}")
            file.flush()
            try:
                yield
            finally:
                (self.folder / LOCK).unlink(missing_ok=True)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """config.yaml: everything that shaped the run."""
        self._write("config.yaml", yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))

    def write_json(self, name: str, data: Mapping[str, Any]) -> None:
        """One JSON object as a file of its own."""
        self._write(name, json.dumps(data, indent=2, ensure_ascii=False, allow_nan=False) + "\n")

    def write_text(self, name: str, text: str) -> None:
        """A file of text, such as the report."""
        self._write(name, text)

    def append(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Adds rows to a .jsonl file, all or (but for a crash of the machine) none; NaN and infinity become null."""
        lines = "".join(json.dumps(_finite(row), ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / name).open("a", encoding="utf-8") as file:
            size = file.tell()
            try:
                file.write(lines)
                file.flush()
            except OSError:  # the disk is full: no half line stays
                os.truncate(self.folder / name, size)
                raise

    def sizes(self) -> dict[str, int]:
        """Bytes of each .jsonl file, all of them on the disk."""
        sizes = {}
        for path in sorted(self.folder.glob("*.jsonl")):
            with path.open("rb") as file:
                os.fsync(file.fileno())
            sizes[path.name] = path.stat().st_size
        return sizes

    def truncate(self, sizes: Mapping[str, int]) -> None:
        """Cuts the .jsonl files back to these sizes."""
        for name, size in sizes.items():
            os.truncate(self.folder / name, size)

    def _write(self, name: str, text: str) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        part = self.folder / f"{name}.part"  # moved into place when whole, so that no reader sees half a file
        part.write_text(text, encoding="utf-8")
        part.replace(self.folder / name)


def _finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """The row as JSON can hold it, which knows no NaN."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in row.items()}


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file that `RunLog.append` wrote; half a last line, left by a kill, is none."""
    with path.open(encoding="utf-8") as lines:  # not str.splitlines, which also breaks at \u2028 and the like
        return [json.loads(line) for line in lines if line.endswith("\n")]


@dataclass(frozen=True)
class PoolEntry:
    """A prompt, its mean training reward and how often it was scored."""

    prompt: str
    reward: float
    count: int


class PromptPool:
    """All distinct prompts of a run with their mean training reward; the best of them are looked at again.

    Batches differ, so a prompt that was scored several times is judged by the mean of its rewards. Empty prompts
    are not instructions and do not enter.
    """

    def __init__(self) -> None:
        self._entries: dict[str, PoolEntry] = {}

    def add(self, prompts: Sequence[str], rewards: Sequence[float]) -> None:
        """Takes in the prompts of one iteration."""
        for prompt, reward in zip(prompts, rewards, strict=True):
            if not prompt:
                continue
            old = self._entries.get(prompt, PoolEntry(prompt, 0.0, 0))
            mean = (old.reward * old.count + reward) / (old.count + 1)
            self._entries[prompt] = PoolEntry(prompt, mean, old.count + 1)

    def state_dict(self) -> list[tuple[str, float, int]]:
        """The entries, oldest first."""
        return [(entry.prompt, entry.reward, entry.count) for entry in self._entries.values()]

    def load_state_dict(self, state: Sequence[tuple[str, float, int]]) -> None:
        """Takes over saved entries."""
        self._entries = {prompt: PoolEntry(prompt, reward, count) for prompt, reward, count in state}

    def best(self, size: int) -> list[PoolEntry]:
        """The `size` best distinct prompts, best first; of equal ones the more often scored, then the older."""
        return sorted(self._entries.values(), key=lambda e: (-e.reward, -e.count))[:size]
