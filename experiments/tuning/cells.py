"""The cells of a table: runs that are made once. A finished one is not run again, a stopped one resumes.

Several cells run side by side in processes of their own, each on one thread.
"""

from __future__ import annotations

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

MAY_DIFFER = {*INCIDENTAL, "threads"}  # --jobs sets one thread each, which changes no more than how sums are rounded
ROOT = Path(__file__).parents[2]  # of this copy of the code, which the processes run too
MOST_SEEDS = 1000  # in a range
OWN = {"seed": "--seeds", "run": "--folder", "arm": "--arms"}  # keys that runs of a table differ in -> their option
PAUSE = 0.2  # seconds between two looks at the processes


@dataclass(frozen=True)
class Cell:
    """One run of a table.

    Attributes:
        name: for people.
        config: as asked for; its `run` is the cell's folder.
        words: what `appo train` takes to make it.
    """

    name: str
    config: RunConfig
    words: list[str]

    @property
    def folder(self) -> Path:
        return Path(str(self.config.run))

    @property
    def finished(self) -> bool:
        """Whether its result is there."""
        return (self.folder / RESULT).is_file()

    @property
    def incidental(self) -> list[str]:
        """Those of its key=value words that shape no result: they hold for a run that goes on, too."""
        return [word for word in self.words if word.partition("=")[0] in INCIDENTAL]

    @property
    def going_on(self) -> list[str]:
        """What `appo train` takes to go on with it."""
        return ["--run", str(self.folder), "--resume", *self.incidental]

    @property
    def begun(self) -> bool:
        """Whether its folder holds a run, finished or not.

        Raises:
            RunFolderError: the run has another configuration than the cell.
        """
        if not (self.folder / CONFIG).is_file():
            return False
        old, new = (flat(to_dict(config)) for config in (stored_config(self.folder), self.config))
        if is_served(self.config.target) and old["target"].startswith(self.config.target):
            old["target"] = self.config.target  # the model's name has been added to the address
        changed = [f"{key} ({old[key]} -> {new[key]})" for key in new if old[key] != new[key] and key not in MAY_DIFFER]
        if changed:
            raise RunFolderError(f"{str(self.folder)!r} holds a run with other settings: {', '.join(changed)}")
        return True


def make(cells: Sequence[Cell], jobs: int) -> Iterator[tuple[Cell, int, str]]:
    """Makes all cells that are not finished; yields each when it is done, with its exit code and error.

    With one job they run in this process, one after the other, and only a run that diverges lets the others go on.

    Raises:
        RunFolderError: a folder holds another run; nothing has been run.
        KeyboardInterrupt: a signal came; each cell that was running has written a checkpoint.
    """
    for cell in cells:
        cell.begun  # noqa: B018 - refuses what another run has left, before anything slow
    yield from ((cell, 0, "") for cell in cells if cell.finished)
    left = [cell for cell in cells if not cell.finished]
    yield from _side_by_side(left, jobs) if jobs > 1 else _one_by_one(left)


def _one_by_one(cells: Sequence[Cell]) -> Iterator[tuple[Cell, int, str]]:
    with ending_at_once():  # takes seconds to load
        from appo.trainer import DivergedError
        from experiments.run.run import prepare
        from experiments.tuning.loop import train
    for cell in cells:
        begun = cell.begun
        config = cell.config
        if begun:
            config = resumed_config(stored_config(cell.folder), {"run": config.run}, None, cell.incidental)
        run = prepare(config, begun)
        try:
            with run.folder.lock():
                train(run, quiet=True, resume=begun)
        except (DivergedError, FloatingPointError) as error:
            yield cell, UNSOUND, one_line(error)
        else:
            yield cell, 0, ""


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
    """A process that makes a cell. It has a session of its own, so that a Ctrl-C does not reach it twice."""
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
    """Where a process writes what it would show."""
    return cell.folder.with_name(f"{cell.folder.name}.log")


def _error(cell: Cell, said: int) -> str:
    """The error that a cell's process ended with; the first `said` bytes of its log are those of earlier ones."""
    lines = _log(cell).read_bytes()[said:].decode(errors="replace").splitlines()
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return told[-1] if told else f"ended without a word; see {_log(cell)}"


def seeds_of(words: Iterable[str], where: str = "--seeds") -> list[int]:
    """The seeds that words name, each once; a word is a number, or a range such as 0-9.

    Raises:
        UsageError: a word names none; the message begins with `where`.
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
    """Refuses key=value words for all runs that set a key in which the runs differ.

    Raises:
        UsageError: one of them sets a key in `own`, keys of OWN.
    """
    for word in assignments:
        key = word.partition("=")[0]
        if key in own:
            raise UsageError(f"{word!r} would make all runs alike; {OWN[key]} says it for each")
