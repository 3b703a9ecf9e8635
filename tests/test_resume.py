"""Nothing lost: checkpoints that are whole or not there, stops in good order, and resuming bit for bit."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from appo.trainer import APPOTrainer
from experiments import checkpoint
from experiments.checkpoint import MANIFEST, STATE, CheckpointError
from experiments.config import build_config
from experiments.console import Progress
from experiments.runlog import LOCK, RunLog, read_jsonl
from experiments.signals import Signals, StoppedError
from experiments.train import main, prepare, train
from rewards.reward import ClassificationReward, RewardResult
from tests.test_sources import sst2_folder

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("KILLS", "2"))  # the full measure is 50
SMALL = {"prompts": 4, "threads": 1, "sampling.max_new_tokens": 16, "examples.test_limit": 20, "anchor.prompts": 2}
OPTIONS = [f"{key}={value}" for key, value in SMALL.items()] + ["examples.shots=4", "examples.batch_size=4"]
STEPS = 8  # eight examples in batches of four: a review every ten iterations, or with period 1 every two


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--task", "sst2", "--run", str(folder), *OPTIONS, "checkpoint_every=2", "anchor.period=1", *more]


def rows(folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    """What a run logged, but for the time that it took."""
    metrics = [{k: v for k, v in row.items() if k != "seconds"} for row in read_jsonl(folder / "metrics.jsonl")]
    return metrics, (folder / "prompts.jsonl").read_bytes()


def weights(folder: Path) -> bytes:
    return (folder / "agent" / "model.safetensors").read_bytes() + (folder / "best_prompt.json").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert main(arguments(folder, f"steps={STEPS}")) == 0
    return folder


def interrupted(folder: Path, monkeypatch: pytest.MonkeyPatch, at: int, number: int = signal.SIGINT) -> int:
    """Runs until iteration `at`, sends the process a signal there; returns the exit code."""
    show = Progress.show

    def show_and_signal(self: Progress, iteration: int, *rest: Any) -> None:
        show(self, iteration, *rest)
        if iteration == at:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "show", show_and_signal)
        return main(arguments(folder, f"steps={STEPS}"))


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_iteration_and_resuming_gives_the_same_run(
    number: int, code: int, undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    assert interrupted(folder, monkeypatch, at=3, number=number) == code
    assert len(rows(folder)[0]) == 3
    assert (folder / "report.html").is_file() and not (folder / "best_prompt.json").exists()
    assert main(["--run", str(folder), "--resume"]) == 0
    assert rows(folder) == rows(undisturbed)
    assert weights(folder) == weights(undisturbed)


def test_handlers_are_as_before_after_a_block() -> None:
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    with Signals():
        assert [signal.getsignal(number) for number in numbers] != before
    assert [signal.getsignal(number) for number in numbers] == before


def test_rows_after_the_checkpoint_are_dropped_and_made_again(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    interrupted(folder, monkeypatch, at=5)
    (newest,) = (folder / "checkpoint").glob("step-000005")
    (newest / MANIFEST).unlink()  # as if the process had died while writing it
    assert main(["--run", str(folder), "--resume"]) == 0
    assert rows(folder) == rows(undisturbed)


def test_a_finished_run_can_be_given_more_steps(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert main(arguments(folder, "steps=6")) == 0
    assert main(["--run", str(folder), "--resume", "--steps", str(STEPS)]) == 0
    assert rows(folder) == rows(undisturbed)
    assert weights(folder) == weights(undisturbed)


@pytest.mark.parametrize("kill", range(KILLS))
def test_a_killed_run_goes_on_bit_for_bit(kill: int, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.train"]
    process = subprocess.Popen(
        [*command, *arguments(folder, f"steps={STEPS}")], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (folder / "checkpoint").is_dir():
        time.sleep(0.01)
    time.sleep(random.Random(kill).uniform(0, 2.0))
    process.kill()
    process.wait()
    again = [*command, "--run", str(folder), "--resume"]
    done = subprocess.run(again, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert rows(folder) == rows(undisturbed)
    assert weights(folder) == weights(undisturbed)
    assert not list((folder / "checkpoint").glob("*.tmp-*"))


@pytest.mark.parametrize(
    ("more", "fragments"),
    [
        (["appo.kl_coef=0.3", "--seed", "4"], ["appo.kl_coef (0.1 -> 0.3)", "seed (0 -> 4)", "only steps"]),
        (["--config", "x.yaml"], ["--resume takes no --config"]),
    ],
)
def test_resuming_with_another_configuration_is_refused(
    more: list[str], fragments: list[str], undisturbed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = rows(undisturbed)
    assert main(["--run", str(undisturbed), "--resume", *more]) == 2
    error = capsys.readouterr().err
    assert all(fragment in error for fragment in fragments)
    assert rows(undisturbed) == before


def test_resuming_with_other_data_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = sst2_folder(tmp_path / "data", train=40)
    assert main(arguments(tmp_path / "run", "steps=2", f"data={data}")) == 0
    path = next(data.glob("test.*"))
    path.write_text(path.read_text(encoding="utf-8").replace("\t0", "\t1", 1), encoding="utf-8")
    assert main(["--run", str(tmp_path / "run"), "--resume", "--steps", "4"]) == 2
    assert "the data are not those that the run was begun with" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "fragment"),
    [(["--resume"], "--resume needs --run"), (["--resume", "--run", "nowhere"], "'nowhere' holds no config.yaml")],
)
def test_resuming_nothing_is_refused(more: list[str], fragment: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(more) == 2
    assert fragment in capsys.readouterr().err


def test_a_folder_in_use_is_refused(undisturbed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = rows(undisturbed)
    with RunLog(undisturbed, new=False).lock():
        assert main(["--run", str(undisturbed), "--resume"]) == 2
    assert f"is in use by process {os.getpid()} on" in capsys.readouterr().err
    assert rows(undisturbed) == before


def test_the_lock_of_a_dead_process_holds_nobody_up(undisturbed: Path) -> None:
    (undisturbed / LOCK).write_text("process 1 on elsewhere", encoding="utf-8")
    with RunLog(undisturbed, new=False).lock():
        pass
    assert not (undisturbed / LOCK).exists()


def test_a_run_that_diverges_logs_every_iteration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poor(self: ClassificationReward, prompts: list[str], examples: object) -> RewardResult:
        return RewardResult(torch.full((len(prompts),), torch.nan), {"accuracy": torch.zeros(len(prompts))})

    monkeypatch.setattr(ClassificationReward, "__call__", poor)
    assert main(arguments(tmp_path / "run", "steps=8", "appo.max_bad_steps=2")) == 3
    metrics, _ = rows(tmp_path / "run")
    assert [row["nonfinite_reward"] for row in metrics] == [1.0] * 4


def test_out_of_memory_is_one_line_with_advice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def starve(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 MiB.")

    monkeypatch.setattr(APPOTrainer, "update", starve)
    assert main(arguments(tmp_path / "run", "steps=8")) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: out of memory; use ") and "gradient_checkpointing=true" in error


def test_a_second_signal_stops_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepare(build_config({"task": "sst2", "run": str(tmp_path / "run"), "steps": 3}, assignments=OPTIONS))

    def twice(*_: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Progress, "show", twice)
    with pytest.raises(StoppedError) as caught:
        train(run, quiet=True)
    assert caught.value.number == signal.SIGTERM
    assert not (tmp_path / "run" / "checkpoint").exists()


# -- the files ---------------------------------------------------------------------------------------------------


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


def test_leftovers_of_a_killed_writer_are_no_checkpoints(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, state(1))
    (tmp_path / "step-000002.tmp-77").mkdir()
    assert checkpoint.load(tmp_path).state["number"] == 1
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


def test_a_state_with_code_in_it_is_not_run(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, 1, {"danger": Path})  # a class is more than plain values
    with pytest.raises(Exception, match=r"weights_only|Unsupported"):
        checkpoint.load(tmp_path)
