"""No work is lost: checkpoints are complete or absent, stops are clean, and a resumed run is equal bit for bit."""

from __future__ import annotations

import json
import os
import random
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from appo.trainer import APPOTrainer
from experiments import evaluate
from experiments.arms.fixed import FixedPrompt
from experiments.config import build_config
from experiments.diagnostics.results import UNFINISHED, read_row
from experiments.report import main as report
from experiments.run.checkpoint import MANIFEST
from experiments.run.folder import LOCK, OUTCOME, RunFolder, read_jsonl
from experiments.run.run import prepare
from experiments.terminal.console import Progress
from experiments.terminal.signals import Signals, StoppedError
from experiments.train import main, train
from rewards.reward import ClassificationReward, RewardResult
from tests.test_checkpoint import signed, stored
from tests.test_sources import sst2_folder

ROOT = Path(__file__).parent.parent
KILLS = int(os.environ.get("KILLS", "2"))  # 50 in the full test
SMALL = {"prompts": 4, "threads": 1, "sampling.max_new_tokens": 16, "examples.test_limit": 20, "anchor.prompts": 2}
OPTIONS = [f"{key}={value}" for key, value in SMALL.items()] + ["examples.shots=4", "examples.batch_size=4"]
STEPS = 8  # eight examples in batches of four are two iterations an epoch; a review after each epoch


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--task", "sst2", "--run", str(folder), *OPTIONS, "checkpoint_every=2", "anchor.period=1", *more]


def rows(folder: Path) -> tuple[list[dict[str, Any]], bytes]:
    """What a run logged, without the columns of seconds."""
    metrics = [{k: v for k, v in row.items() if "seconds" not in k} for row in read_jsonl(folder / "metrics.jsonl")]
    return metrics, (folder / "prompts.jsonl").read_bytes()


def weights(folder: Path) -> bytes:
    return (folder / "agent" / "model.safetensors").read_bytes() + (folder / "best_prompt.json").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert main(arguments(folder, f"steps={STEPS}")) == 0
    return folder


def interrupted(
    folder: Path, monkeypatch: pytest.MonkeyPatch, at: int, number: int = signal.SIGINT, given: Sequence[str] = ()
) -> int:
    """Runs, sends the process a signal after iteration `at`, and returns the exit code."""
    show = Progress.show

    def show_and_signal(self: Progress, iteration: int, *rest: Any) -> None:
        show(self, iteration, *rest)
        if iteration == at:
            os.kill(os.getpid(), number)

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "show", show_and_signal)
        return main(given or arguments(folder, f"steps={STEPS}"))


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
    assert not (folder / "best_so_far.json").exists()  # best_prompt.json takes its place


def test_a_stopped_run_leaves_its_best_prompt_and_the_command_that_goes_on(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "a run"
    assert interrupted(folder, monkeypatch, at=3) == 130
    found = json.loads((folder / "best_so_far.json").read_text(encoding="utf-8"))
    tried = {row["prompt"] for row in read_jsonl(folder / "prompts.jsonl")}
    assert found["prompt"] in tried | {found["manual_prompt"]}
    assert found["iteration"] == 3 and "before it had a test score" in found["chosen_by"]
    assert found["validation_rows"] == 8 and len(found["validation_interval"]) == 2
    assert found["validation_score"] >= found["manual_validation_score"]
    assert not any("test" in key for key in found)
    said = capsys.readouterr().err.splitlines()
    assert f"best prompt so far: {found['prompt']}" in said and said[-1] == "stopped"
    (command,) = [line.removeprefix("to go on: ") for line in said if line.startswith("to go on: ")]
    program, asked = (words := shlex.split(command))[: words.index("train")], words[words.index("train") + 1 :]
    assert program[-1].rpartition("/")[2] in ("appo", "experiments.cli")
    assert main(asked) == 0
    assert rows(folder) == rows(undisturbed)


def test_a_signal_during_the_final_choice_leaves_the_best_prompt_too(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(arm: FixedPrompt) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(FixedPrompt, "candidates", interrupt)
        assert main(arguments(folder, f"steps={STEPS}")) == 130
    found = json.loads((folder / "best_so_far.json").read_text(encoding="utf-8"))
    assert found["iteration"] == STEPS and (folder / "report.html").is_file()
    assert f"best prompt so far: {found['prompt']}" in capsys.readouterr().err
    assert main(["--run", str(folder), "--resume"]) == 0
    assert rows(folder) == rows(undisturbed) and weights(folder) == weights(undisturbed)
    assert not (folder / "best_so_far.json").exists()


def test_a_stopped_run_with_a_prompt_for_each_input_has_no_single_best(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert interrupted(folder, monkeypatch, 1, given=arguments(folder, "mode=tte", "steps=3")) == 130
    assert not (folder / "best_so_far.json").exists()
    assert f"--run {folder} --resume" in capsys.readouterr().err


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


def test_a_finished_run_that_was_given_more_steps_and_stopped_has_no_result(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    assert evaluate.main(["--run", str(folder)]) == 0
    assert all((folder / name).is_file() for name in OUTCOME)
    assert interrupted(folder, monkeypatch, STEPS + 1, given=["--run", str(folder), "--resume", "--steps", "20"]) == 130
    assert not any((folder / name).exists() for name in OUTCOME)
    assert read_row(folder).verdict == UNFINISHED
    assert "The run was stopped before its end" in (folder / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("less", [["--steps", str(STEPS - 1)], ["steps=null", "epochs=3"]])
def test_fewer_steps_than_are_done_are_refused(
    less: list[str], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert main(["--run", str(folder), "--resume", *less]) == 2
    assert f"but the run has done {STEPS}; expected at least as many" in capsys.readouterr().err.splitlines()[-1]
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_new_run_in_the_folder_of_a_stopped_one_is_pointed_to_resume(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    assert main(arguments(folder)) == 2
    assert "exists and is not empty; name another run folder" in capsys.readouterr().err
    (folder / "best_prompt.json").unlink()
    assert main(arguments(folder)) == 2
    assert "; --resume goes on with the run in it, or name another run folder" in capsys.readouterr().err


@pytest.mark.parametrize("kill", range(KILLS))
def test_a_killed_run_goes_on_bit_for_bit(kill: int, undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.train"]
    process = subprocess.Popen(
        [*command, *arguments(folder, f"steps={STEPS}")], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (folder / "config.yaml").is_file():
        time.sleep(0.01)
    time.sleep(random.Random(kill).uniform(0, 2.0))  # some kills come before the first checkpoint
    process.kill()
    process.wait()
    assert main(["--run", str(folder), "--resume"]) == 0
    assert rows(folder) == rows(undisturbed)
    assert weights(folder) == weights(undisturbed)
    assert not list((folder / "checkpoint").glob("*.tmp-*"))


@pytest.mark.parametrize(
    ("more", "fragments"),
    [
        (["appo.kl_coef=0.3", "--seed", "4"], ["appo.kl_coef (0.1 -> 0.3)", "seed (0 -> 4)", "only steps"]),
        (["--config", "x.yaml"], ["--resume takes no --config"]),
        (["preset=published"], ["--resume takes no --config and no preset"]),
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


@pytest.mark.parametrize("arm", ["appo", "manual"])
def test_resuming_with_other_data_is_refused(arm: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = sst2_folder(tmp_path / "data", train=40)
    assert main(arguments(tmp_path / "run", "steps=2", f"arm={arm}", f"data={data}")) == 0
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
    with RunFolder(undisturbed, new=False).lock():
        assert main(["--run", str(undisturbed), "--resume"]) == 2
    assert f"is in use by process {os.getpid()} on" in capsys.readouterr().err
    assert rows(undisturbed) == before


def test_the_lock_of_a_dead_process_holds_nobody_up(undisturbed: Path) -> None:
    (undisturbed / LOCK).write_text("process 1 on elsewhere", encoding="utf-8")
    with RunFolder(undisturbed, new=False).lock():
        pass
    assert not (undisturbed / LOCK).exists()


def test_a_run_that_diverges_logs_every_iteration_and_the_way_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def poor(self: ClassificationReward, prompts: list[str], examples: object) -> RewardResult:
        return RewardResult(torch.full((len(prompts),), torch.nan), {"accuracy": torch.zeros(len(prompts))})

    monkeypatch.setattr(ClassificationReward, "__call__", poor)
    assert main(arguments(tmp_path / "run", "steps=8", "appo.max_bad_steps=2")) == 3
    metrics, _ = rows(tmp_path / "run")
    assert [row["nonfinite_reward"] for row in metrics] == [1.0] * 4
    assert [row.get("guard_rollback") for row in metrics] == [None, 1.0, None, None]
    said = "no sound update for appo.max_bad_steps iterations: the agent went back to its anchor"
    assert f"warning: iteration 2: {said}" in capsys.readouterr().err
    assert report([str(tmp_path / "run")]) == 0
    assert f"Iteration 2: {said}" in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


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


@pytest.mark.parametrize("content", [{"iteration": 3}, {}, {"data": 1}])
def test_a_state_of_something_else_is_refused_in_one_line(
    content: dict[str, Any], undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(folder / "checkpoint")
    signed(folder / "checkpoint", 8, stored(content))
    before = rows(folder)
    assert main(["--run", str(folder), "--resume"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    assert rows(folder) == before


# -- the disk ----------------------------------------------------------------------------------------------------


@contextmanager
def limited(size: int) -> Iterator[None]:
    """Limits every file to `size` bytes: writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("size", "every", "named"),
    [(300, 2, "config.yaml"), (3_000, 99, "metrics.jsonl"), (100_000, 2, "checkpoint/step-000002")],
)
def test_a_full_disk_is_one_line_that_names_what_could_not_be_written(
    size: int, every: int, named: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    with limited(size):
        assert main(arguments(folder, "steps=8", f"checkpoint_every={every}")) == 74
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert errors == [f"error: {folder / named}: File too large"]


def test_checkpoints_that_the_disk_has_no_room_for_are_refused_before_the_first_iteration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**7))
    assert main(arguments(folder)) == 74
    (error,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert error.startswith(f"error: {folder / 'checkpoint'}: checkpoints need 0.039 GB, and 0.01 GB are free")
    assert not list(folder.iterdir())
    assert main(arguments(folder, "arm=frozen")) == 0  # its checkpoints hold no weights


def test_an_agent_that_does_not_fit_on_the_disk_is_one_line(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "run", ignore=shutil.ignore_patterns("agent"))
    with limited(50_000):
        assert main(["--run", str(folder), "--resume"]) == 74
    assert f"error: {folder / 'agent'}: File too large" in capsys.readouterr().err
    assert main(["--run", str(folder), "--resume"]) == 0
    assert weights(folder) == weights(undisturbed)


# -- what may change ---------------------------------------------------------------------------------------------


def test_steps_given_at_a_resume_apply_to_the_next_one(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    assert main(arguments(folder, "steps=3")) == 0
    assert interrupted(folder, monkeypatch, 5, signal.SIGINT, ["--run", str(folder), "--resume", "--steps", "8"]) == 130
    assert main(["--run", str(folder), "--resume"]) == 0
    assert rows(folder) == rows(undisturbed)


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_anew(
    undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    for name in ("checkpoint", "agent"):
        shutil.rmtree(folder / name)
    (folder / "best_prompt.json").unlink()
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (folder / "metrics.jsonl").write_text(lines[0] + lines[1][:20], encoding="utf-8")
    assert main(["--run", str(folder), "--resume"]) == 0
    assert "begins anew" in capsys.readouterr().err
    assert (rows(folder), weights(folder)) == (rows(undisturbed), weights(undisturbed))


@pytest.mark.parametrize("name", ["best_prompt.json", "metrics.jsonl"])
def test_a_run_whose_checkpoints_are_gone_is_not_begun_anew(
    name: str, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Either file proves that there was a checkpoint: a result, or more rows than come before the first checkpoint."""
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    shutil.rmtree(folder / "checkpoint")
    if name != "best_prompt.json":
        (folder / "best_prompt.json").unlink()
    before = rows(folder)
    assert main(["--run", str(folder), "--resume"]) == 2
    assert "no checkpoint in" in capsys.readouterr().err
    assert rows(folder) == before


def test_a_folder_of_a_run_that_wrote_nothing_counts_as_empty(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / LOCK).write_text("process 1 on elsewhere")
    (folder / "config.yaml.part").write_text("task:")
    assert main(arguments(folder, "steps=1")) == 0


@pytest.mark.parametrize("kept", [None, 10])
def test_a_log_that_lost_rows_is_refused_and_never_filled_up(
    kept: int | None, undisturbed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(undisturbed, tmp_path / "run")
    prompts = (folder / "prompts.jsonl").read_bytes()
    path = folder / "metrics.jsonl"
    path.unlink() if kept is None else path.write_bytes(path.read_bytes()[:kept])
    assert main(["--run", str(folder), "--resume", "--steps", "9"]) == 2
    assert f"{path}: {kept or 0} bytes, but " in capsys.readouterr().err
    assert (path.stat().st_size if path.exists() else None, (folder / "prompts.jsonl").read_bytes()) == (kept, prompts)
