"""Checkpoints as files: complete or absent, skipped if damaged, and never run as code."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from experiments.run import checkpoint
from experiments.run.checkpoint import MANIFEST, STATE, CheckpointError


def state(number: int) -> dict[str, Any]:
    return {"number": number, "tensor": torch.arange(number), "rng": random.Random(number).getstate()}


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 3, state(3))
    loaded, damaged = checkpoint.load(tmp_path)
    assert (loaded["number"], loaded["tensor"].tolist(), damaged) == (3, [0, 1, 2], [])
    random.Random().setstate(loaded["rng"])


def test_the_two_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 30):
        checkpoint.save(tmp_path, step, state(step))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-000002", "step-000030"]


def test_a_finished_run_keeps_the_newest(tmp_path: Path) -> None:
    for step in (9, 10):
        checkpoint.save(tmp_path, step, state(step))
    checkpoint.keep_newest(tmp_path)
    assert checkpoint.load(tmp_path).state["number"] == 10
    assert [path.name for path in tmp_path.iterdir()] == ["step-000010"]


@pytest.mark.parametrize(
    ("found", "count", "fits"),
    [(0, 1, 1), (0, 2, 2), (0, 3, 3), (0, 99, 3), (1, 9, 2), (2, 1, 1), (2, 9, 1), (2, 0, 0)],
)
def test_the_disk_needs_room_for_those_that_are_kept_and_one_more(
    found: int, count: int, fits: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "checkpoint"
    for step in range(found):
        checkpoint.save(folder, step, state(step))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=fits * 10**9))
    checkpoint.check_room(folder, count, 10**9)
    if count:
        with pytest.raises(OSError, match=rf"need {fits * 1.1:.2g} GB, and {fits} GB are free"):
            checkpoint.check_room(folder, count, 11 * 10**8)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


DAMAGES = {
    "flipped byte": (lambda folder: flip(folder / STATE), "sha256"),
    "cut state": (lambda folder: cut(folder / STATE), "bytes long"),
    "no state": (lambda folder: (folder / STATE).unlink(), "FileNotFoundError"),
    "no manifest": (lambda folder: (folder / MANIFEST).unlink(), "no sound manifest"),
    "cut manifest": (lambda folder: cut(folder / MANIFEST), "no sound manifest"),
    "other schema": (lambda folder: (folder / MANIFEST).write_text('{"schema": 99}'), "schema 99"),
    "manifest of another kind": (lambda folder: (folder / MANIFEST).write_text("[]"), "no sound manifest"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage: str, tmp_path: Path) -> None:
    for step in (1, 2):
        checkpoint.save(tmp_path, step, state(step))
    harm, reason = DAMAGES[damage]
    harm(tmp_path / "step-000002")
    loaded, damaged = checkpoint.load(tmp_path)
    assert loaded["number"] == 1
    assert len(damaged) == 1 and reason in damaged[0] and "step-000002" in damaged[0]


def test_without_a_whole_checkpoint_all_are_named(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    flip(tmp_path / "step-000001" / STATE)
    with pytest.raises(CheckpointError, match=r"step-000001: state\.pt is not what was written"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint in"):
        checkpoint.load(tmp_path / "none")


def test_leftovers_of_a_killed_writer_are_not_checkpoints(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    (tmp_path / "step-000002.tmp-77").mkdir()
    assert checkpoint.load(tmp_path).state["number"] == 1
    checkpoint.tidy(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]


def test_a_full_disk_leaves_the_checkpoint_before_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint.save(tmp_path, 1, state(1))

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(tmp_path, 2, state(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    assert checkpoint.load(tmp_path).state["number"] == 1


class Harm:
    """Makes the folder `mark` when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


def signed(folder: Path, step: int, content: bytes) -> Path:
    """A checkpoint of any bytes, with a matching manifest."""
    path = folder / f"step-{step:06d}"
    path.mkdir(parents=True)
    (path / STATE).write_bytes(content)
    manifest = {"schema": checkpoint.SCHEMA, "size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / MANIFEST).write_text(json.dumps(manifest))
    return path


def test_a_state_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"danger": Harm(tmp_path / "harmed")})
    with pytest.raises(CheckpointError, match="cannot be read, or holds more than plain values"):
        checkpoint.load(tmp_path)
    assert not (tmp_path / "harmed").exists()


def stored(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


CONTENTS = {
    "nothing": b"",
    "text": b"hello",
    "a pickle": pickle.dumps({"iteration": 3}),
    "a pickle with code": pickle.dumps(Harm(Path("harmed"))),
    "a list": stored([1, 2]),
    "a zip file's beginning": stored({"iteration": 3})[:100],
}


@pytest.mark.parametrize("name", CONTENTS)
def test_a_file_that_fits_its_manifest_but_holds_no_state_is_skipped(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint.save(tmp_path / "c", 1, state(1))
    signed(tmp_path / "c", 2, CONTENTS[name])
    loaded, damaged = checkpoint.load(tmp_path / "c")
    assert loaded["number"] == 1
    assert len(damaged) == 1 and "step-000002: state.pt" in damaged[0]
    assert not Path("harmed").exists()


def test_checkpoints_go_by_their_number(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):  # in alphabetical order, the other way round
        checkpoint.save(tmp_path, step, state(3))
        checkpoint.save(tmp_path, step, state(step % 7))
    assert checkpoint.load(tmp_path).state["number"] == 1_000_000 % 7
