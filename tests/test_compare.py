"""Arms side by side: what is compared with what, and an arm that fails does not stop the others."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from appo.trainer import APPOTrainer, DivergedError, Iteration
from experiments.compare import COLUMNS, main, parse_args

SMALL = ["prompts=2", "threads=1", "sampling.max_new_tokens=8", "examples.test_limit=10", "pool=2", "steps=2"]


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--task", "sst2", "--folder", str(folder), *more]


def rows(out: str) -> list[list[str]]:
    """The cells of the table's rows, without its header."""
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:]]


def test_a_row_for_each_run_and_a_mean_for_each_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments(tmp_path, "--arms", "anchor", "best-of-n", "--seeds", "0", "1", *SMALL)) == 0
    found = rows(capsys.readouterr().out)
    assert [row[:2] for row in found] == [
        *(["anchor", "0"], ["anchor", "1"], ["**anchor**", "mean"]),
        *(["best-of-n", "0"], ["best-of-n", "1"], ["**best-of-n**", "mean"]),
    ]
    for one, other, mean in (found[:3], found[3:]):
        for i in range(3, 3 + len(COLUMNS)):  # each is rounded to three digits
            assert float(mean[i]) == pytest.approx((float(one[i]) + float(other[i])) / 2, abs=0.0011)


# What `make compare SEEDS=0 ARGS="steps=2"` and the like expand to.
ORDERS = [
    ["--seeds", "5", "steps=2", "--arms", "tte", "--seeds", "0", "1", "prompts=3"],  # the later seeds count
    ["--seeds", "0", "1", "steps=2", "prompts=3"],
    ["steps=2", "--seeds", "0", "1", "prompts=3"],
    ["--seeds", "0", "1", "--arms", "tte", "steps=2", "prompts=3"],
    ["--arms", "tte", "steps=2", "prompts=3", "--seeds", "0", "1"],
]


@pytest.mark.parametrize("given", ORDERS)
def test_an_assignment_is_no_seed_and_no_arm(given: list[str]) -> None:
    options = parse_args(given)
    assert (options.seeds, sorted(options.assignments)) == ([0, 1], ["prompts=3", "steps=2"])
    assert options.arms == (["tte"] if "--arms" in given else ["anchor", "best-of-n"])


@pytest.mark.parametrize(
    ("given", "fragment"),
    [
        (["--seeds", "x"], "--seeds: 'x' is no seed"),
        (["--seeds", "-1"], "--seeds"),
        (["--seeds", "0", "steps=2", "--arms", "ancor"], "unknown arm 'ancor'; expected anchor, "),
        (["--seeds", str(2**64)], "seed is"),
        (["--task", "mnIi"], "did you mean 'mnli'"),
        (["--seeds", "0", "stepz=2"], "unknown key 'stepz'"),
    ],
)
def test_mistakes_are_one_clear_line(
    given: list[str], fragment: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--folder", str(tmp_path), *given]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and fragment in error and error.count("\n") == 1


def test_an_arm_that_diverges_is_a_row_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverging(self: APPOTrainer, *given: Any) -> Any:
        collected = self.collect(*given)  # the run logs its statistics
        raise DivergedError("no sound step", Iteration(collected, collected.stats()))

    monkeypatch.setattr(APPOTrainer, "step", diverging)  # best-of-n takes no step
    assert main(arguments(tmp_path, "--seeds", "0", "--arms", "anchor", "best-of-n", *SMALL)) == 3
    captured = capsys.readouterr()
    assert captured.err == "error: anchor, seed 0: no sound step\n"
    assert [row[:2] for row in rows(captured.out)] == [["anchor", "0"], ["best-of-n", "0"], ["**best-of-n**", "mean"]]
    assert "diverged" in rows(captured.out)[0] and len(rows(captured.out)[0]) == len(rows(captured.out)[1])


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_it_in_order(
    number: int, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = APPOTrainer.step

    def stopping(self: APPOTrainer, *given: Any) -> Any:
        os.kill(os.getpid(), number)
        return step(self, *given)

    monkeypatch.setattr(APPOTrainer, "step", stopping)
    assert main(arguments(tmp_path, "--seeds", "0", "1", *SMALL)) == code
    assert "Traceback" not in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["anchor-0"]
    assert list((tmp_path / "anchor-0" / "checkpoint").iterdir())
