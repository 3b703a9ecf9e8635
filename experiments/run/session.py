"""What a run must save to go on: its state as a checkpoint, written and gone back to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from appo.lm.model import out_of_memory
from experiments.config import to_dict
from experiments.run import checkpoint
from experiments.run.checkpoint import CheckpointError
from experiments.run.fingerprint import differing
from experiments.run.run import Run, stored_config
from experiments.run.runlog import RESULT, RunFolderError, read_jsonl


class Stateful(Protocol):
    """What can be saved and gone on with: an arm."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Session:
    """A run at work: its parts, the arm that changes from iteration to iteration, and how far it has come."""

    def __init__(self, run: Run, arm: Stateful) -> None:
        self.run, self.arm, self.iteration = run, arm, 0

    def begin(self, resume: bool) -> list[str]:
        """Writes down what the run is made with and, if it is to go on, goes back to its last checkpoint.

        A run that was killed before its first checkpoint begins anew.

        Returns:
            What a person should know.

        Raises:
            CheckpointError: no checkpoint can be gone back to; the folder is as it was.
        """
        run, notes = self.run, []
        folder = run.log.folder / "checkpoint"
        checkpoint.tidy(folder)
        if resume and self._killed_early():
            run.log.clear()
            notes = ["the run was stopped before its first checkpoint, and begins anew"]
        elif resume:
            try:
                notes = self.restore()
            except (CheckpointError, RunFolderError):
                raise
            except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
                if out_of_memory(error):
                    raise
                raise CheckpointError(f"{folder}: the newest holds no state of this run ({error!r})") from error
        run.log.write_config(to_dict(run.config) | {"environment": run.environment()})
        return notes

    def save(self) -> None:
        """Writes a checkpoint.

        Raises:
            OSError: it cannot be written; the one before is as it was.
        """
        state = {
            "iteration": self.iteration,
            "arm": self.arm.state_dict(),
            "target": self.run.target.state_dict(),
            "data": self.run.fingerprint,
            "environment": self.run.environment(),
            "log": self.run.log.sizes(),
        }
        checkpoint.save(self.run.log.folder / "checkpoint", self.iteration, state)

    def restore(self) -> list[str]:
        """Goes back to the last checkpoint that is whole; rows that were logged after it are dropped.

        Returns:
            What a person should know: damaged checkpoints that were passed over, a changed environment.

        Raises:
            CheckpointError: there is no whole one, or the data are not those that it was made with.
        """
        state, notes = checkpoint.load(self.run.log.folder / "checkpoint")
        if parts := differing(state["data"], self.run.fingerprint):
            raise CheckpointError(f"the data are not those that the run was begun with; changed: {parts}")
        now, before = self.run.environment(), state["environment"]
        changed = [f"{name} was {before[name]}, is {now[name]}" for name in now if before[name] != now[name]]
        if changed:
            notes = [*notes, f"not bit for bit the same run: {'; '.join(changed)}"]
        self.iteration = state["iteration"]
        self.arm.load_state_dict(state["arm"])
        self.run.target.load_state_dict(state["target"])
        self.run.log.truncate(state["log"])
        return notes

    def _killed_early(self) -> bool:
        """Whether there is no checkpoint yet, rather than none any more."""
        folder = self.run.log.folder
        if checkpoint.any_in(folder / "checkpoint") or (folder / RESULT).exists():
            return False
        metrics = folder / "metrics.jsonl"
        return not metrics.exists() or len(read_jsonl(metrics)) <= stored_config(folder).checkpoint_every
