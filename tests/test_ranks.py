"""Two processes are as good as one: same prompts, same update, same decisions; and they end together, in order."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from appo.lm.ranks import Ranks
from experiments.run.folder import read_jsonl
from experiments.terminal.console import Progress
from experiments.train import main
from rewards.target import Asked, Shared, Target
from tests.ranks_job import CONFIGS, arguments, updates, verbs

ROOT = Path(__file__).parent.parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
STEPS = "steps=4"


def started(*command: str) -> subprocess.Popen[str]:
    """A job of two processes."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen([*TORCHRUN, *command], cwd=ROOT, env=environment, text=True, **pipes)  # type: ignore[call-overload,no-any-return]


def logged(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """Rows of metrics.jsonl without seconds, and prompts.jsonl."""
    metrics = [{k: v for k, v in row.items() if "seconds" not in k} for row in read_jsonl(folder / "metrics.jsonl")]
    return metrics, (folder / "prompts.jsonl").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of one process: one that is whole, and one that was stopped after two iterations."""
    folder = tmp_path_factory.mktemp("ranks")
    assert main(arguments(folder / "whole", STEPS)) == 0
    show = Progress.show

    def show_and_signal(self: Progress, iteration: int, *rest: Any) -> None:
        show(self, iteration, *rest)
        if iteration == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "show", show_and_signal)
        assert main(arguments(folder / "begun", STEPS)) == 143
    return folder


@pytest.fixture(scope="module")
def job(alone: Path) -> tuple[Path, list[dict[str, Any]], str]:
    """The folder of a finished job, what each of its two processes found, and all that they printed."""
    process = started("tests.ranks_job", str(alone))
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return alone, [torch.load(alone / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)], printed


def test_a_process_on_its_own_gets_what_it_gives() -> None:
    found = verbs(Ranks())
    assert found["numbers"].shape == (5, 5) and found["texts"][3] == "row of 5"
    assert found["sums"] == {"a": 1.0} and found["gradients"][0].tolist() == [1.0, 1.0]
    assert found["largest"] == 0 and found["apart"] == ""


def test_a_share_is_cut_into_parts_that_hold_every_row() -> None:
    one, none = Ranks(), Ranks()
    none.rank, none.size = 0, 2  # of one row, the second rank's
    assert [rows.tolist() for rows in one.parts(3, 2)] == [[0, 1], [2]]
    assert [rows.tolist() for rows in one.parts(3)] == [[0, 1, 2]]
    assert none.parts(1) == []


def test_every_rank_gets_the_rows_of_all(job: tuple[Path, list[dict[str, Any]], str]) -> None:
    expected = verbs(Ranks())
    for found in (rank["verbs"] for rank in job[1]):
        assert torch.equal(found["numbers"], expected["numbers"]) and torch.equal(found["mask"], expected["mask"])
        assert found["texts"] == expected["texts"] and found["few"] == [["only"]]


def test_gradients_and_numbers_are_added_up(job: tuple[Path, list[dict[str, Any]], str]) -> None:
    for found in (rank["verbs"] for rank in job[1]):
        assert [g.tolist() for g in found["gradients"]] == [[1.0, 1.0], [2.0]]  # rank 1 had none for the first
        assert found["sums"] == {"a": 3.0} and found["largest"] == 1


def test_rank_0_is_copied_and_a_difference_is_an_error(job: tuple[Path, list[dict[str, Any]], str]) -> None:
    for found in (rank["verbs"] for rank in job[1]):
        assert found["first"].tolist() == [0.0, 0.0] and found["same"] is None
        assert "come apart: numbers differ (process 0: 0; process 1: 1)" in found["apart"]


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_end_in_the_update_of_one(job: tuple[Path, list[dict[str, Any]], str], name: str) -> None:
    alone, both = updates(None)[name], [rank["updates"][name] for rank in job[1]]
    for mine in both:
        assert all(map(torch.equal, mine["tokens"], alone["tokens"]))
        assert_close(mine["weights"], alone["weights"], rtol=0, atol=1e-6)
        for here, there in zip(mine["stats"], alone["stats"], strict=True):
            assert here == pytest.approx(there, rel=1e-4, abs=1e-5)
    assert torch.equal(both[0]["weights"], both[1]["weights"])


@pytest.mark.parametrize("name", CONFIGS)
def test_the_same_seed_gives_the_same_bits(job: tuple[Path, list[dict[str, Any]], str], name: str) -> None:
    for rank in job[1]:
        assert torch.equal(rank["updates"][name]["weights"], rank["again"][name]["weights"])


def test_a_job_writes_the_prompts_and_decisions_of_one_process(job: tuple[Path, list[dict[str, Any]], str]) -> None:
    (rows, prompts), (expected, expected_prompts) = (logged(job[0] / name) for name in ("fixed", "whole"))
    assert [json.loads(line)["prompt"] for line in prompts.splitlines()] == [
        json.loads(line)["prompt"] for line in expected_prompts.splitlines()
    ]
    reviews = [row["review"] for row in rows if row["anchor"]]
    assert len(reviews) == len([row for row in expected if row["anchor"]]) > 0
    for mine, other in zip(rows, expected, strict=True):
        assert mine["anchor"] == other["anchor"]
        if mine["anchor"]:
            assert mine["review"]["policy_scores"] == other["review"]["policy_scores"]


def test_every_kind_of_run_ends_well(job: tuple[Path, list[dict[str, Any]], str]) -> None:
    folder, ranks, printed = job
    assert [rank["codes"] for rank in ranks] == [{"fixed": 0, "resumed": 143, "dry": 0, "tte": 0, "text": 0}] * 2
    assert not (folder / "dry").exists()
    assert all((folder / name / "best_prompt.json").is_file() for name in ("fixed", "tte", "text"))
    assert printed.count("best prompt found") <= 3 and printed.count("loaded") == 5  # the second process is silent
    assert "processes was 1, is 2" in printed


def test_a_run_goes_from_one_process_to_two_and_back(job: tuple[Path, list[dict[str, Any]], str]) -> None:
    folder = job[0] / "begun"
    assert len(read_jsonl(folder / "metrics.jsonl")) == 3  # the signal came to one process in the third iteration
    assert main(["--run", str(folder), "--resume"]) == 0
    assert [row["prompt"] for row in read_jsonl(folder / "prompts.jsonl")] == [
        row["prompt"] for row in read_jsonl(job[0] / "whole" / "prompts.jsonl")
    ]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[tuple[Path, subprocess.Popen[str], Callable[[int], int]]]:
    """A job in its third iteration or later: its folder, torchrun, and a function from ranks to process ids."""
    folder = tmp_path / "run"
    process = started("experiments.train", *arguments(folder, "steps=5000"))
    metrics, limit = folder / "metrics.jsonl", time.monotonic() + 200
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 3:
        assert process.poll() is None and time.monotonic() < limit, process.communicate()[0]
        time.sleep(0.05)

    def pid(rank: int) -> int:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="ascii").split()
        ours = (p for p in children if f"RANK={rank}".encode() in Path(f"/proc/{p}/environ").read_bytes().split(b"\0"))
        return int(next(ours))

    yield folder, process, pid
    process.kill()


@pytest.mark.skipif(not Path("/proc/self/environ").is_file(), reason="finds the processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_job(
    running: tuple[Path, subprocess.Popen[str], Callable[[int], int]], rank: int
) -> None:
    folder, process, pid = running
    os.kill(pid(rank), signal.SIGKILL)
    printed, _ = process.communicate(timeout=30)
    assert process.returncode != 0
    assert [line for line in printed.splitlines() if line.startswith("error: another process of this job has ended")]
    assert printed.count("error: ") == 1
    done = len(read_jsonl(folder / "metrics.jsonl"))
    assert main(["--run", str(folder), "--resume", f"steps={done + 1}"]) == 0


@pytest.mark.parametrize("number", [signal.SIGTERM])
def test_a_signal_to_the_job_ends_it_in_order(
    running: tuple[Path, subprocess.Popen[str], Callable[[int], int]], number: int
) -> None:
    folder, process, _ = running
    process.send_signal(number)
    printed, _ = process.communicate(timeout=60)
    assert printed.count("finishing this iteration") == 1 and printed.count("to go on: ") == 1
    assert (folder / "best_so_far.json").is_file() and (folder / "report.html").is_file()
    steps = sorted(int(p.name.removeprefix("step-")) for p in (folder / "checkpoint").iterdir())
    assert steps[-1] == len(read_jsonl(folder / "metrics.jsonl"))  # nothing is lost


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    process = started("experiments.train", *arguments(tmp_path / "run", "nonsense=1"))
    printed, _ = process.communicate(timeout=100)
    assert printed.count("error: ") == 1 and "nonsense" in printed


class Echo:
    """A target that answers with what it was asked."""

    words = ("no", "yes")

    def check_fits(self, prompt: str | int, text: str) -> None: ...

    def described(self) -> dict[str, Any]:
        return {}

    def class_logits(self, asked: list[Asked]) -> torch.Tensor:
        return torch.tensor([[len(prompt), len(text)] for prompt, inputs in asked for text in inputs])

    def generate(self, asked: list[Asked], budget: int, stop: list[str]) -> list[str]:
        return [f"{prompt}/{text}" for prompt, inputs in asked for text in inputs]

    def answer_logprobs(self, asked: list[Asked], answers: list[str]) -> torch.Tensor:
        texts = self.generate(asked, 0, [])
        return torch.tensor([float(text.endswith(answer)) for text, answer in zip(texts, answers, strict=True)])


class Halves(Ranks):
    """Both ranks in one process, one after the other."""

    def divide(self, count: int, work: Any) -> list[Any]:
        parts = [work(slice(0, count // 2)), work(slice(count // 2, count))]
        return [torch.cat(c) if torch.is_tensor(c[0]) else [x for p in c for x in p] for c in zip(*parts, strict=True)]


def test_a_shared_target_answers_as_the_target_does() -> None:
    target: Target = Echo()  # type: ignore[assignment]
    shared = Shared(target, Halves())
    asked = [Asked("a", ("1", "22", "333")), Asked("bb", ("1",)), Asked("bb", ("4444",))]
    assert torch.equal(shared.class_logits(asked), target.class_logits(asked))
    assert shared.generate(asked, 1, ()) == target.generate(asked, 1, ())
    answers = ["1", "22", "333", "1", "4444"]
    assert shared.answer_logprobs(asked, answers).tolist() == [1.0] * 5
