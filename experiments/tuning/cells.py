"""The cells of a table. Each cell is a run: a finished run is kept, and a stopped run resumes.

Several cells may run at a time, each in its own process, on one thread.
"""

from __future__ import annotations

import gc
import os
import re
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from experiments.config import INCIDENTAL, RunConfig, flat, is_served, resumed_config, to_dict
from experiments.run.folder import CONFIG, RESULT, RunFolderError, stored_config
from experiments.terminal.command import UNSOUND, UsageError, one_line
from experiments.terminal.signals import ending_at_once

MAY_DIFFER = {*INCIDENTAL, "threads"}  # --jobs sets one thread per run, which only changes how sums are rounded
ROOT = Path(__file__).parents[2]  # root of this copy of the code, which the processes run, too
MOST_SEEDS = 1000  # most seeds in a range
OWN = {"seed": "--seeds", "run": "--folder", "arm": "--arms"}  # keys in which a table's runs differ -> their option
PAUSE = 0.2  # seconds between two checks of the processes


@dataclass(frozen=True)
class Cell:
    """One run of a table.

    Attributes:
        name: the name shown to people.
        config: its configuration; `config.run` is the cell's folder.
        words: arguments with which `appo train` makes the run.
    """

    name: str
    config: RunConfig
    words: list[str]

    @property
    def folder(self) -> Path:
        return Path(str(self.config.run))

    @property
    def finished(self) -> bool:
        """Whether the run has a result."""
        return (self.folder / RESULT).is_file()

    @property
    def incidental(self) -> list[str]:
        """Its key=value words that do not alter results; they apply to a resumed run, too."""
        return [word for word in self.words if word.partition("=")[0] in INCIDENTAL]

    @property
    def going_on(self) -> list[str]:
        """Arguments with which `appo train` resumes the run."""
        return ["--run", str(self.folder), "--resume", *self.incidental]

    @property
    def begun(self) -> bool:
        """Whether its folder holds a run, finished or not.

        Raises:
            RunFolderError: the folder's run has another configuration than the cell.
        """
        if not (self.folder / CONFIG).is_file():
            return False
        old, new = (flat(to_dict(config)) for config in (stored_config(self.folder), self.config))
        if is_served(self.config.target) and old["target"].startswith(self.config.target):
            old["target"] = self.config.target  # the run has added the model's name to the address
        changed = [f"{key} ({old[key]} -> {new[key]})" for key in new if old[key] != new[key] and key not in MAY_DIFFER]
        if changed:
            raise RunFolderError(f"{str(self.folder)!r} holds a run with other settings: {', '.join(changed)}")
        return True


def make(cells: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, int, str]]:
    """Makes all cells that are not finished; yields each cell when it is done, with its exit code and error.

    With one job the cells run in this process, one after another. If a run diverges, the next one starts; any other
    error ends them all.

    Raises:
        RunFolderError: a folder holds another run. All folders are checked before the first run.
        KeyboardInterrupt: a signal came; each cell that was running has written a checkpoint.
    """
    for cell in cells:
        cell.begun  # noqa: B018 - refuses the folder of another run, before anything slow
    yield from ((cell, 0, "") for cell in cells if cell.finished)
    left = [cell for cell in cells if not cell.finished]
    yield from _side_by_side(left, jobs) if jobs > 1 else _one_by_one(left)


def _one_by_one(cells: Sequence[Cell]) -> Iterator[tuple[Cell, int, str]]:
    with ending_at_once():  # takes seconds to load
        from appo.trainer import DivergedError
        from experiments.run.run import prepare
        from experiments.tuning.loop import train

    def made(cell: Cell) -> tuple[Cell, int, str]:
        begun = cell.begun
        config = cell.config
        if begun:
            config = resumed_config(stored_config(cell.folder), {"run": config.run}, None, cell.incidental)
        run = prepare(config, begun)
        try:
            with run.folder.lock():
                train(run, quiet=True, resume=begun)
        except (DivergedError, FloatingPointError) as error:
            return cell, UNSOUND, one_line(error)
        return cell, 0, ""

    for cell in cells:
        yield made(cell)
        gc.collect()  # or the models of this cell would still be there when those of the next are loaded


def _side_by_side(cells: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, int, str]]:
    waiting, running = deque(cells), list[tuple[Cell, int, subprocess.Popen[bytes]]]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                cell = waiting.popleft()
                said = _log(cell).stat().st_size if _log(cell).is_file() else 0  # by earlier ones
                running.append((cell, said, _started(cell)))
            for cell, said, process in list(running):
                if (code := process.poll()) is not None:
                    running.remove((cell, said, process))
                    yield cell, code if code >= 0 else 128 - code, _error(cell, said) if code else ""
            time.sleep(PAUSE)
    finally:  # a signal came: each finishes its iteration and writes a checkpoint
        for *_, process in running:
            process.send_signal(signal.SIGTERM)
        for *_, process in running:
            process.wait()


def _started(cell: Cell) -> subprocess.Popen[bytes]:
    """Starts a process that makes a cell, in a session of its own, so that a Ctrl-C does not reach it twice."""
    words = cell.going_on if cell.begun else cell.words
    cell.folder.parent.mkdir(parents=True, exist_ok=True)
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    surroundings = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    with _log(cell).open("ab") as log:
        command = [sys.executable, "-P", "-m", "experiments.train", *words]
        return subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=surroundings, start_new_session=True
        )


def _log(cell: Cell) -> Path:
    """Returns the file with the output of a cell's process."""
    return cell.folder.with_name(f"{cell.folder.name}.log")


def _error(cell: Cell, said: int) -> str:
    """Returns the error with which a cell's process ended; skips the first `said` bytes of its log, which are older."""
    lines = _log(cell).read_bytes()[said:].decode(errors="replace").splitlines()
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if lines and lines[-1] == "stopped":
        return "stopped by a signal; the same command goes on with it"
    return told[-1] if told else f"ended without an error message; see {_log(cell)}"


def seeds_of(words: Iterable[str], where: str = "--seeds") -> list[int]:
    """Returns the seeds that words name, each once; a word is a number, or a range such as 0-9.

    Raises:
        UsageError: a word names no seed; the message begins with `where`.
    """
    found = dict[int, None]()
    for word in words:
        ends = re.fullmatch(r"([0-9]{1,20})(?:-([0-9]{1,20}))?", word)
        first, last = (int(end) for end in (ends[1], ends[2] or ends[1])) if ends else (0, -1)
        if not 0 <= last - first < MOST_SEEDS:
            most = f"of at most {MOST_SEEDS} seeds"
            raise UsageError(f"{where}: {word!r} is no seed; expected whole numbers, or ranges {most} such as 0-9")
        found |= dict.fromkeys(range(first, last + 1))
    return list(found)


def check_assignments(assignments: Iterable[str], own: Iterable[str]) -> None:
    """Refuses key=value words for all runs if they set a key in which the runs differ.

    Args:
        assignments: the words.
        own: the keys in which the runs differ, some of OWN.

    Raises:
        UsageError: a word sets one of these keys.
    """
    for word in assignments:
        key = word.partition("=")[0]
        if key in own:
            raise UsageError(f"{word!r} would make all runs alike; use {OWN[key]}")
