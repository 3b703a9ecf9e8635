"""Checkpoints: whole or not there. Written beside, synced, moved into place; the one before is kept until then.

A checkpoint is a folder `step-000123` with the state and a manifest that holds its size and sha256. One without a
manifest that fits does not exist for `load`, which then goes back to the one before. States hold tensors and plain
values only, so that they load with `weights_only`: no pickle from a file is ever run.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch

SCHEMA = 3
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
        part.mkdir(parents=True, exist_ok=True)
        with (part / STATE).open("wb") as file:  # a path would lose the OSError, and with it the file's name
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        size, digest = (part / STATE).stat().st_size, _sha256(part / STATE)
        with (part / MANIFEST).open("w", encoding="utf-8") as file:
            json.dump({"schema": SCHEMA, "step": step, "size": size, "sha256": digest}, file)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(part)
        shutil.rmtree(final, ignore_errors=True)  # of the same iteration, so of the same state
        part.replace(final)
        _sync_folder(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)  # there only if something went wrong
    for old in _found(folder)[KEPT:]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def load(folder: Path) -> Loaded:
    """The newest state that is whole; what a killed writer left half-written is removed.

    Raises:
        CheckpointError: there is none, or none that is whole.
    """
    for leftover in folder.glob("step-*.tmp-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    damaged: list[str] = []
    for path in _found(folder):
        fault = _fault(path)
        if fault is None:
            return Loaded(torch.load(path / STATE, map_location="cpu", weights_only=True), damaged)
        damaged.append(f"{path}: {fault}")
    raise CheckpointError("; ".join(damaged) or f"no checkpoint in {str(folder)!r}")


def _found(folder: Path) -> list[Path]:
    """Checkpoints by name, newest first; leftovers of a killed writer are none."""
    return sorted((p for p in folder.glob("step-*") if p.suffix == "" and p.is_dir()), reverse=True)


def _fault(path: Path) -> str | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        if manifest["schema"] != SCHEMA:
            return f"schema {manifest['schema']}; this version reads {SCHEMA}"
        if (path / STATE).stat().st_size != manifest["size"]:
            return f"{STATE} is {(path / STATE).stat().st_size} bytes long, not {manifest['size']}"
        if _sha256(path / STATE) != manifest["sha256"]:
            return f"{STATE} is not what was written (sha256)"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"no sound manifest ({type(error).__name__}: {error})"
    return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
