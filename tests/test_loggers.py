"""TensorBoard and Weights & Biases get the rows of metrics.jsonl, once per iteration, and only if configured."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from experiments.config import RunConfig, build_config
from experiments.config.extras import EXTRAS, check_extras
from experiments.config.strict import ConfigError
from experiments.run.folder import read_jsonl, read_result
from experiments.run.loggers import WANDB_ID, final_scores, numbers
from experiments.run.run import prepare
from experiments.train import main, train

ROOT = Path(__file__).parents[1]
SMALL = ["prompts=2", "threads=1", "sampling.max_new_tokens=8", "examples.test_limit=10", "pool=2", "headroom=0"]
MORE = ["examples.shots=4", "examples.batch_size=4", "anchor.period=1", "anchor.prompts=2"]  # two iterations an epoch


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--task", "sst2", "--run", str(folder), *SMALL, *MORE, *more]


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Returns what TensorBoard shows of a run: name -> (iteration, value)."""
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    seen = accumulator.EventAccumulator(str(folder / "tensorboard"))
    seen.Reload()
    return {tag: [(event.step, event.value) for event in seen.Scalars(tag)] for tag in seen.Tags()["scalars"]}


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    return [(row["iteration"], pytest.approx(row[name])) for row in read_jsonl(folder / "metrics.jsonl")]


# -- numbers -----------------------------------------------------------------------------------------------------


def test_a_row_gives_its_numbers() -> None:
    assert numbers({"iteration": 3, "kl": 0.5, "anchor": None}) == {"kl": 0.5}


def test_a_review_gives_its_mean_scores_and_its_outcome() -> None:
    review = {"policy_scores": [0.5, 1.0], "anchor_scores": [0.25], "decision": "promote", "reason": "x"}
    assert numbers({"iteration": 3, "kl": 0.5, "anchor": "promote", "review": review}) == {
        "kl": 0.5,
        "review/policy_score": 0.75,
        "review/anchor_score": 0.25,
        "review/promote": 1.0,
        "review/rollback": 0.0,
    }


# -- absent packages ---------------------------------------------------------------------------------------------


@pytest.fixture
def nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the packages from the import system."""
    find, packages = importlib.util.find_spec, [package for package, _ in EXTRAS.values()]
    monkeypatch.setattr("experiments.config.extras.find_spec", lambda name: None if name in packages else find(name))


@pytest.mark.usefixtures("nothing_installed")
@pytest.mark.parametrize(
    ("given", "package", "extra"),
    [
        ("tensorboard=true", "tensorboard", "tensorboard"),
        ("wandb=mine", "wandb", "wandb"),
        ("lora.rank=4", "peft", "lora"),
        ("target_quantization=int8", "bitsandbytes", "bitsandbytes"),
    ],
)
def test_a_package_that_is_absent_is_one_line_before_any_model_is_loaded(
    given: str,
    package: str,
    extra: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def loading(*_given: Any) -> Any:
        raise AssertionError("a model is loaded")

    monkeypatch.setattr("experiments.run.run.load_models", loading)
    assert main(arguments(tmp_path / "run", given)) == 2
    key = given.partition("=")[0]
    said = f"{key} is set, but the package {package} is not installed; pip install 'stableprompt-appo[{extra}]'"
    assert capsys.readouterr().err == f"error: {said}\n"
    assert not (tmp_path / "run").exists()


def test_a_folder_with_the_packages_name_is_not_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """W&B makes a folder `wandb` where it is called, and Python takes any folder for a package."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    with pytest.raises(ConfigError, match="the package wandb is not installed"):
        check_extras(RunConfig(wandb="mine"))


def test_an_empty_project_is_refused() -> None:
    with pytest.raises(ConfigError, match="wandb is ''; expected the name of a project"):
        build_config({"wandb": ""})


def test_nothing_is_imported_unless_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded() -> list[str]:
        return [name for name in sys.modules if {"tensorboard", "wandb"} & set(name.split("."))]

    for name in loaded():  # by other tests
        monkeypatch.delitem(sys.modules, name)
    assert main(arguments(tmp_path / "run", "steps=2")) == 0
    assert loaded() == []
    assert not {"tensorboard", "wandb", WANDB_ID} & {path.name for path in (tmp_path / "run").iterdir()}


# -- TensorBoard -------------------------------------------------------------------------------------------------


def test_tensorboard_shows_every_iteration_once_also_of_a_resumed_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The resumed run begins at iteration 3, behind the only whole checkpoint, although four were logged."""
    pytest.importorskip("tensorboard")
    monkeypatch.setattr("experiments.run.checkpoint.keep_newest", lambda _: None)  # as if killed before the end
    folder = tmp_path / "run"
    assert main(arguments(folder, "steps=4", "tensorboard=true", "checkpoint_every=2")) == 0
    for left in (folder / "checkpoint" / "step-000004").iterdir():
        left.unlink()
    assert main(["--run", str(folder), "--resume", "--steps", "5"]) == 0
    found = events(folder)
    assert [step for step, _ in found["kl"]] == [1, 2, 3, 4, 5]
    for name in ("kl", "reward_mean", "accuracy_mean", "seconds", "label_list_rate"):
        assert found[name] == logged(folder, name)
    reviews = [row["iteration"] for row in read_jsonl(folder / "metrics.jsonl") if row["anchor"]]
    assert [step for step, _ in found["review/policy_score"]] == reviews == [2, 4]
    expected = final_scores(read_result(folder))
    assert {name: found[name] for name in expected} == {name: [(5, pytest.approx(expected[name]))] for name in expected}


def test_logging_may_be_switched_on_for_the_rest_of_a_run(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    folder = tmp_path / "run"
    assert main(arguments(folder, "steps=2")) == 0
    assert main(["--run", str(folder), "--resume", "--steps", "3", "tensorboard=true"]) == 0
    assert [step for step, _ in events(folder)["kl"]] == [3]


def test_a_run_that_fails_closes_what_it_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    closed = []
    close = SummaryWriter.close
    monkeypatch.setattr(SummaryWriter, "close", lambda self: (closed.append(self), close(self)))
    monkeypatch.setattr("experiments.arms.fixed.FixedPrompt.result", lambda self: 1 / 0)
    options = {"task": "sst2", "steps": 1, "run": str(tmp_path / "run"), "tensorboard": True}
    with pytest.raises(ZeroDivisionError):
        train(prepare(build_config(options, assignments=[*SMALL, *MORE])), quiet=True)
    assert len(closed) == 1 and [step for step, _ in events(tmp_path / "run")["kl"]] == [1]


# -- Weights & Biases --------------------------------------------------------------------------------------------


def offline(command: Sequence[str], monkeypatch: pytest.MonkeyPatch) -> int:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    return main(command)


@pytest.mark.filterwarnings("ignore")  # of W&B and what it imports
def test_wandb_gets_every_iteration_and_a_resumed_run_goes_on_under_its_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "run"
    assert offline(arguments(folder, "steps=2", "wandb=mine"), monkeypatch) == 0
    known = (folder / WANDB_ID).read_text(encoding="utf-8").strip()
    assert offline(["--run", str(folder), "--resume", "--steps", "3"], monkeypatch) == 0
    assert (folder / WANDB_ID).read_text(encoding="utf-8").strip() == known
    files = sorted((folder / "wandb").glob(f"offline-run-*-{known}/run-{known}.wandb"))
    assert len(files) == 2
    found = [list(rows_of(file)) for file in files]
    assert [[step for step, _ in rows] for rows in found] == [[1, 2], [3]]
    assert [(step, row["kl"]) for rows in found for step, row in rows] == logged(folder, "kl")
    assert found[1][-1][1]["final/test_score"] == pytest.approx(read_result(folder)["test_score"])


def test_wandb_without_a_login_is_one_line_and_the_run_can_be_resumed(tmp_path: Path) -> None:
    pytest.importorskip("wandb")
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "experiments.train", *arguments(folder, "steps=1", "wandb=mine")]
    without = os.environ | {"HOME": str(tmp_path), "WANDB_API_KEY": "", "WANDB_MODE": "online"}  # HOME keeps a login
    done = subprocess.run(command, cwd=ROOT, env=without, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert done.stderr.splitlines()[-1].startswith("error: wandb: No API key configured")
    assert main(["--run", str(folder), "--resume", "wandb=null"]) == 0
    assert len(read_jsonl(folder / "metrics.jsonl")) == 1


BLOCK, HEADER = 32_768, 7  # bytes of a W&B file: blocks of parts, each behind a checksum, a size and a kind


def rows_of(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a file that W&B wrote offline: (step, values by name)."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, record = file.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # no room was left in the block
            at += BLOCK - at % BLOCK
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + HEADER : at + HEADER + size]
        at += HEADER + size
        if kind in (1, 4):  # a whole record, or the last part of one
            history = Record.FromString(record).history
            values = {"/".join(item.nested_key): json.loads(item.value_json) for item in history.item}
            record = b""
            if values:
                yield history.step.num, values
