"""Checkpoints, whole or absent: written beside their place, synced, then moved there; the last one stays until then.

A checkpoint is a folder `step-000123` with the state and a manifest that holds its size and sha256. `load` skips a
checkpoint whose manifest is missing or does not fit, and takes the one before. States hold tensors and plain
values only, so that they load with `weights_only`: no pickle from a file is ever run.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

from appo.lm.model import out_of_memory
from experiments.run.files import writing

SCHEMA = 5
KEPT = 2  # checkpoints; the newest may turn out to be damaged
STATE, MANIFEST = "state.pt", "manifest.json"


class CheckpointError(ValueError):
    """No checkpoint can be read; the message says which were tried and what is wrong with them."""


class Loaded(NamedTuple):
    """A state, and why newer checkpoints were passed over."""

    state: dict[str, Any]
    damaged: list[str]


def save(folder: Path, step: int, state: dict[str, Any]) -> Path:
    """Writes the state of iteration `step`; returns the checkpoint's folder.

    Raises:
        OSError: the disk is full, the folder cannot be written to; older checkpoints are as they were.
    """
    final = folder / f"step-{step:06d}"
    part = folder / f"{final.name}.tmp-{os.getpid()}"
    try:
        with writing(final):
            part.mkdir(parents=True, exist_ok=True)
            with (part / STATE).open("wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())
            size, digest = (part / STATE).stat().st_size, _sha256(part / STATE)
            with (part / MANIFEST).open("w", encoding="utf-8") as file:
                json.dump({"schema": SCHEMA, "step": step, "size": size, "sha256": digest}, file)
                file.flush()
                os.fsync(file.fileno())
            _sync_folder(part)
            shutil.rmtree(final, ignore_errors=True)  # a checkpoint of the same iteration holds the same state
            part.replace(final)
            _sync_folder(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # there only if something went wrong
    for old in _found(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load(folder: Path) -> Loaded:
    """The newest state that is whole.

    Raises:
        CheckpointError: there is no checkpoint, or all are damaged.
    """
    damaged: list[str] = []
    for path in _found(folder):
        try:
            return Loaded(_whole(path), damaged)
        except CheckpointError as error:
            damaged.append(f"{path}: {error}")
    raise CheckpointError("; ".join(damaged) or f"no checkpoint in {str(folder)!r}")


def tidy(folder: Path) -> None:
    """Removes what a killed writer left half-written."""
    for leftover in folder.glob("step-*.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def keep_newest(folder: Path) -> None:
    """Removes all but the newest checkpoint, which is enough once a run is finished."""
    for old in _found(folder)[1:]:
        shutil.rmtree(old, ignore_errors=True)


def check_room(folder: Path, count: int, size: int) -> None:
    """Refuses checkpoints for which the disk has no room.

    Args:
        folder: where they go.
        count: how many are going to be written.
        size: bytes of each, roughly.

    Raises:
        OSError: fewer bytes are free than they take; one more than are kept, since a new one precedes the removal.
    """
    found, there = len(_found(folder)), next(path for path in folder.absolute().parents if path.exists())
    needed, free = (min(found + count, KEPT + 1) - found) * size, shutil.disk_usage(there).free
    if needed > free:
        what = f"checkpoints need {needed / 1e9:.2g} GB, and {free / 1e9:.2g} GB are free; no iteration was made"
        raise OSError(errno.ENOSPC, what, str(folder))


def any_in(folder: Path) -> bool:
    """Whether there is a checkpoint, damaged or not."""
    return bool(_found(folder))


def _found(folder: Path) -> list[Path]:
    """Checkpoints, newest first, without what a killed writer left half-written."""
    steps = (p for p in folder.glob("step-*") if p.name.removeprefix("step-").isdecimal() and p.is_dir())
    return sorted(steps, key=lambda path: int(path.name.removeprefix("step-")), reverse=True)


def _whole(path: Path) -> dict[str, Any]:
    """The state of a checkpoint; raises CheckpointError, with the reason, if it is not whole."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            raise CheckpointError(f"schema {manifest['schema']}; this version reads {SCHEMA}")
        if (path / STATE).stat().st_size != manifest["size"]:
            raise CheckpointError(f"{STATE} is {(path / STATE).stat().st_size} bytes long, not {manifest['size']}")
        if _sha256(path / STATE) != manifest["sha256"]:
            raise CheckpointError(f"{STATE} is not what was written (sha256)")
    except CheckpointError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointError(f"no sound manifest ({type(error).__name__}: {error})") from error
    try:
        state = torch.load(path / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises errors of every kind for a file that it did not write
        if out_of_memory(error):
            raise
        what = type(error).__name__  # without the message, which advises an unsafe load
        raise CheckpointError(f"{STATE} cannot be read, or holds more than plain values ({what})") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{STATE} holds no state, but {type(state).__name__}")
    return state


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
