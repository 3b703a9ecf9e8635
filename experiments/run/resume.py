"""Saves the state of a run as a checkpoint, and restores it."""

from __future__ import annotations

from collections.abc import Mapping
from threading import Lock
from typing import Any, Protocol

from appo.anchor import Reference
from appo.lm.model import out_of_memory
from experiments.config import TRAINED, RunConfig, to_dict
from experiments.config.strict import ConfigError
from experiments.run import checkpoint
from experiments.run.checkpoint import CheckpointError
from experiments.run.fingerprint import changed_since, differing
from experiments.run.folder import METRICS, OUTCOME, RESULT, SCORED, RunFolderError, read_optional, stored_config
from experiments.run.run import Run


class Stateful(Protocol):
    """What has a state to save and restore: an arm."""

    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def begin(run: Run, arm: Stateful, resume: bool) -> tuple[int, list[str]]:
    """Writes config.yaml; on a resume, first restores the last checkpoint.

    A run that was killed before its first checkpoint begins anew. A finished run that gets more iterations is no longer
    finished: its result is removed.

    Returns:
        How many iterations are done, and notes for the user.

    Raises:
        CheckpointError: no checkpoint can be restored; the logs are unchanged.
        ConfigError: the run has done more iterations than it is to have; the folder is unchanged.
        OSError: the disk has no room for its checkpoints; no result is removed, and the run can be resumed as before.
    """
    done, notes = 0, list[str]()
    folder = run.folder.path / "checkpoint"
    if run.folder.written:
        checkpoint.tidy(folder)
    if resume and _killed_early(run):
        run.folder.clear()
        notes = ["the run was stopped before its first checkpoint, and begins anew"]
    elif resume and not run.steps:  # no iterations, so no checkpoint: its prompt is scored once more
        _check_data(changed_since(run.folder.path, run.fingerprint))
    elif resume:
        try:
            done, notes = restore(run, arm)
        except (CheckpointError, ConfigError, RunFolderError):
            raise
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, RuntimeError) as error:
            if out_of_memory(error):
                raise
            raise CheckpointError(f"{folder}: the newest one holds no state of this run ({error!r})") from error
    run.policy.ranks.check_same("the iterations that are done", done)
    if run.folder.written and done < run.steps:
        trained = sum(weight.numel() for weight in run.policy.trained().values())
        every = run.config.checkpoint_every
        checkpoint.check_room(folder, -(-run.steps // every) - done // every, trained * bytes_saved(run.config))
    _keep_answers(run)
    if done < run.steps:
        for name in OUTCOME:
            run.folder.remove(name)
    run.folder.write_config(to_dict(run.config) | {"environment": run.environment()})
    return done, notes


def bytes_saved(config: RunConfig) -> int:
    """Bytes that a checkpoint holds for each trained number: it, the anchor's, and two moments of what has moved."""
    if config.arm not in TRAINED:
        return 0
    reference = Reference.of(config.appo.reference, config.appo.kl_in_loss)
    return 4 * (6 if reference.reviewed and config.anchor.promote else 4)


def _keep_answers(run: Run) -> None:
    """Reads what the target's server has answered, and from now on writes down each answer as it comes.

    So no answer is paid for twice, however the run ended. Call it before the first answer and after restoring a state.

    Raises:
        RunFolderError: the file holds anything else.
    """
    if run.served is None:
        return
    path, lock = run.folder.path / SCORED, Lock()
    rows = read_optional(path)
    try:
        run.target.learn(rows)
    except (KeyError, TypeError, ValueError) as error:
        raise RunFolderError(f"{path}: a row is not what a run writes ({error!r})") from error
    run.folder.write_rows(SCORED, rows)  # without half a last line

    def keep(row: dict[str, Any]) -> None:
        with lock:  # called from many threads
            run.folder.append(SCORED, [row])

    run.served.kept = keep


def finish(run: Run) -> None:
    """Keeps a single checkpoint of a finished run, from which it can still get more iterations."""
    if run.folder.written:
        checkpoint.keep_newest(run.folder.path / "checkpoint")


def save(run: Run, arm: Stateful, iteration: int) -> None:
    """Writes a checkpoint. Of several processes the first one does; all check that they still have the same weights.

    Raises:
        OSError: it cannot be written; the one before is unchanged.
        RanksError: the processes' weights differ.
    """
    run.policy.ranks.check_weights(list(run.policy.trained().values()))
    state = {
        "iteration": iteration,
        "arm": arm.state_dict(),
        "target": run.target.state_dict(),
        "data": run.fingerprint,
        "environment": run.environment(),
        "log": run.folder.sizes(),
    }
    if run.folder.written:
        checkpoint.save(run.folder.path / "checkpoint", iteration, state)


def restore(run: Run, arm: Stateful) -> tuple[int, list[str]]:
    """Restores the last checkpoint that is whole, and drops the rows that were logged after it.

    Returns:
        The iteration of the checkpoint, and notes for the user: damaged checkpoints that were skipped, a changed
        environment.

    Raises:
        CheckpointError: all checkpoints are damaged, or the data have changed.
        ConfigError: the run is to have fewer iterations than it has done.
    """
    state, notes = checkpoint.load(run.folder.path / "checkpoint")
    if state["iteration"] > run.steps:
        asked = f"steps or epochs ask for {run.steps} iterations in all"
        raise ConfigError(f"{asked}, but the run has done {state['iteration']}; expected at least as many")
    _check_data(differing(state["data"], run.fingerprint))
    now, before = run.environment(), state["environment"]
    before = {"processes": 1, "commit": None, **before}
    changed = [f"{name} was {before[name]}, is {now[name]}" for name in now if before[name] != now[name]]
    if changed:
        notes = [*notes, f"not bit for bit the same run: {'; '.join(changed)}"]
    arm.load_state_dict(state["arm"])
    run.target.load_state_dict(state["target"])
    run.folder.truncate(state["log"])
    return state["iteration"], notes


def _check_data(changed: str) -> None:
    if changed:
        raise CheckpointError(f"the data are not those that the run was begun with; changed: {changed}")


def _killed_early(run: Run) -> bool:
    """Whether the run was stopped before its first checkpoint; False if its checkpoints were lost."""
    folder = run.folder.path
    if checkpoint.any_in(folder / "checkpoint") or (folder / RESULT).exists():
        return False
    return len(read_optional(folder / METRICS)) <= stored_config(folder).checkpoint_every
