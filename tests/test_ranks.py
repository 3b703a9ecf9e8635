"""Two processes give the results of one: same prompts, update and decisions; and they end together, cleanly."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from appo.lm.parallel.ranks import Ranks
from experiments.run.folder import read_jsonl
from experiments.terminal.console import Progress
from experiments.train import main
from rewards.target import Asked, Shared, Target
from tests.ranks_job import CONFIGS, DIVIDED, REPEATED, arguments, launch, look, tune, updates, verbs

STEPS = "steps=4"
CONTEXT = multiprocessing.get_context("forkserver")  # its processes find torch and transformers imported
CONTEXT.set_forkserver_preload(["tests.ranks_job", "peft", "experiments.tuning.loop"])


def started(log: Path, work: Callable[..., None], *arguments: Any) -> ForkServerProcess:
    """A job of two processes."""
    process = CONTEXT.Process(target=launch, args=(log, work, *arguments))
    process.start()
    return process


def ended(process: ForkServerProcess, log: Path, seconds: float = 60) -> str:
    """Returns all output of a job, once it has ended."""
    process.join(seconds)
    assert process.exitcode is not None, log.read_text(encoding="utf-8")
    return log.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with runs of one process: one that is whole, and one that was stopped after one iteration."""
    folder = tmp_path_factory.mktemp("ranks")
    assert main(arguments(folder / "whole", STEPS)) == 0
    show = Progress.show

    def show_and_signal(self: Progress, iteration: int, *rest: Any) -> None:
        show(self, iteration, *rest)
        if iteration == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Progress, "show", show_and_signal)
        assert main(arguments(folder / "begun", STEPS)) == 143
    return folder


@pytest.fixture(scope="module")
def job(alone: Path) -> tuple[Path, list[dict[str, Any]], str]:
    """The folder of a finished job, what each of its two processes found, and all that they printed."""
    process = started(alone / "log", look, alone)
    printed = ended(process, alone / "log", 300)
    assert process.exitcode == 0, printed
    return alone, [torch.load(alone / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)], printed


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    """Returns the results of one process."""
    return updates(None)


def test_a_process_on_its_own_gets_what_it_gives() -> None:
    found = verbs(Ranks())
    assert found["numbers"].shape == (5, 5) and found["texts"][3] == "row of 5"
    assert found["sums"] == {"a": 1.0} and found["gradients"][0].tolist() == [1.0, 1.0]
    assert found["largest"] == 0 and found["equal"] == [True, True] and found["apart"] == ""


def test_a_share_is_cut_into_parts_that_hold_every_row() -> None:
    one, none = Ranks(), Ranks()
    none.rank, none.size = 0, 2  # of one row, the second rank's
    assert [rows.tolist() for rows, _ in one.parts(3, 2)] == [[0, 1], [2]]
    assert [rows.tolist() for rows, _ in one.parts(3)] == [[0, 1, 2]]
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
        assert found["equal"] == [True, False]  # rank 0's are equal, rank 1's are not


def test_rank_0_is_copied_and_a_difference_is_an_error(job: tuple[Path, list[dict[str, Any]], str]) -> None:
    for found in (rank["verbs"] for rank in job[1]):
        assert found["first"].tolist() == [0.0, 0.0] and found["same"] is None
        assert "come apart: numbers differ (process 0: 0; process 1: 1)" in found["apart"]


@pytest.mark.parametrize("name", CONFIGS)
def test_two_ranks_end_in_the_update_of_one(
    job: tuple[Path, list[dict[str, Any]], str], one: dict[str, Any], name: str
) -> None:
    alone, both = one[name], [rank["updates"][name] for rank in job[1]]
    for mine in both:
        assert all(map(torch.equal, mine["tokens"], alone["tokens"]))
        assert_close(mine["weights"], alone["weights"], rtol=0, atol=1e-6)
        for here, there in zip(mine["stats"], alone["stats"], strict=True):
            assert here == pytest.approx(there, rel=1e-4, abs=1e-5)
        assert mine["anchor is policy"] == [False, True, False, True]
    assert torch.equal(both[0]["weights"], both[1]["weights"])


@pytest.mark.parametrize("name", DIVIDED)
def test_ranks_that_divide_an_agent_end_in_the_update_of_one(
    job: tuple[Path, list[dict[str, Any]], str], one: dict[str, Any], name: str
) -> None:
    for mine in (rank["divided"][name] for rank in job[1]):
        assert all(map(torch.equal, mine["tokens"], one[name]["tokens"]))
        for weights in ("weights", "rolled back"):
            assert_close(mine[weights], one[name][weights], rtol=0, atol=1e-6)
        for here, there in zip(mine["stats"], one[name]["stats"], strict=True):
            assert here == pytest.approx(there, rel=1e-4, abs=1e-5)
        assert mine["anchor is policy"] == [False, True, False, True]
    assert not torch.equal(one[name]["weights"], one[name]["rolled back"])


@pytest.mark.parametrize("wrong", ["lora.rank=4", "shard=true"], ids=["an adapter", "one process"])
def test_an_impossible_division_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], wrong: str) -> None:
    assert main(arguments(tmp_path / "run", "shard=true", wrong)) == 2
    assert "error: shard is true" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_only_an_adapter_and_the_head_are_exchanged(job: tuple[Path, list[dict[str, Any]], str]) -> None:
    # q and o 32 x 32, k and v 32 x 16, three of 32 x 64, in two layers of rank 4; the head's 33; 6 statistics
    numbers = 2 * 4 * (2 * 64 + 2 * 48 + 3 * 96) + 33 + 6
    assert [rank["updates"]["adapter"]["exchanged"] for rank in job[1]] == [{numbers}] * 2


@pytest.mark.parametrize("name", REPEATED)
def test_the_same_seed_gives_the_same_bits(job: tuple[Path, list[dict[str, Any]], str], name: str) -> None:
    for rank in job[1]:
        assert torch.equal(rank["updates"][name]["weights"], rank["again"][name]["weights"])


def test_every_kind_of_run_ends_well(job: tuple[Path, list[dict[str, Any]], str]) -> None:
    folder, ranks, printed = job
    assert [rank["codes"] for rank in ranks] == [{"resumed": 143, "divided": 143, "dry": 0, "tte": 0, "text": 0}] * 2
    assert not (folder / "dry").exists()
    assert all((folder / name / "best_prompt.json").is_file() for name in ("tte", "text"))
    assert printed.count("best prompt found") <= 2 and printed.count("loaded") == 5  # the second process is silent
    assert "processes was 1, is 2" in printed


def test_a_run_goes_from_one_process_to_two_and_back(job: tuple[Path, list[dict[str, Any]], str]) -> None:
    """Whole, divided among two processes, whole again: prompts, decisions and agent are as in an unbroken run."""
    begun, whole = job[0] / "begun", job[0] / "whole"
    assert len(read_jsonl(begun / "metrics.jsonl")) == 3  # a signal came to one process in each job's only iteration
    assert main(["--run", str(begun), "--resume", "shard=false"]) == 0
    mine, other = (read_jsonl(folder / "prompts.jsonl") for folder in (begun, whole))
    assert [row["prompt"] for row in mine] == [row["prompt"] for row in other]
    mine, other = (read_jsonl(folder / "metrics.jsonl") for folder in (begun, whole))
    assert [row["anchor"] for row in mine] == [row["anchor"] for row in other] and any(row["anchor"] for row in mine)
    scores = [[row["review"]["policy_scores"] for row in rows if row["anchor"]] for rows in (mine, other)]
    assert scores[0] == scores[1]
    mine, other = (load_file(folder / "agent" / "model.safetensors") for folder in (begun, whole))
    assert_close(mine, other, rtol=0, atol=1e-4)


def test_a_divided_agent_is_saved_whole(job: tuple[Path, list[dict[str, Any]], str]) -> None:
    divided, whole = (load_file(job[0] / name / "agent" / "model.safetensors") for name in ("tte", "whole"))
    assert {name: (w.shape, w.dtype) for name, w in divided.items()} == {
        name: (w.shape, w.dtype) for name, w in whole.items()
    }


Running = tuple[Path, ForkServerProcess, Callable[[int], int]]


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Running]:
    """A job in its third iteration or later: its folder, its first process, and a function from ranks to process ids.

    What it prints is in the file `log` beside the folder.
    """
    folder = tmp_path / "run"
    process = started(tmp_path / "log", tune, *arguments(folder, "steps=5000"))
    metrics, limit = folder / "metrics.jsonl", time.monotonic() + 200
    while not metrics.is_file() or metrics.read_bytes().count(b"\n") < 3:
        assert process.is_alive() and time.monotonic() < limit, (tmp_path / "log").read_text(encoding="utf-8")
        time.sleep(0.05)

    def pid(rank: int) -> int:
        # Forked in order, and never replaced.
        tasks = Path(f"/proc/{process.pid}/task").glob("*/children")
        children = [int(child) for task in tasks for child in task.read_text(encoding="ascii").split()]
        return sorted(children)[-2:][rank]

    yield folder, process, pid
    with suppress(ProcessLookupError):
        os.killpg(process.pid or 0, signal.SIGKILL)
    process.join()


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_job(running: Running, rank: int) -> None:
    folder, process, pid = running
    os.kill(pid(rank), signal.SIGKILL)
    printed = ended(process, folder.parent / "log", 30)
    assert process.exitcode != 0
    assert [line for line in printed.splitlines() if line.startswith("error: another process of this job has ended")]
    assert printed.count("error: ") == 1
    if rank == 1:
        done = len(read_jsonl(folder / "metrics.jsonl"))
        assert main(["--run", str(folder), "--resume", f"steps={done + 1}"]) == 0


@pytest.mark.parametrize("to_all", [False, True], ids=["SIGTERM to torchrun", "Ctrl-C"])
def test_a_signal_to_the_job_ends_it_in_order(running: Running, to_all: bool) -> None:
    folder, process, _ = running
    if to_all:
        os.killpg(process.pid or 0, signal.SIGINT)  # as a terminal does; torchrun sends it once more
    else:
        os.kill(process.pid or 0, signal.SIGTERM)
    printed = ended(process, folder.parent / "log")
    assert printed.count("finishing this iteration") == 1 and printed.count("to go on: ") == 1, printed
    assert (folder / "best_so_far.json").is_file() and (folder / "report.html").is_file()
    steps = sorted(int(p.name.removeprefix("step-")) for p in (folder / "checkpoint").iterdir())
    assert steps[-1] == len(read_jsonl(folder / "metrics.jsonl"))  # nothing is lost


def test_a_mistake_is_told_once(tmp_path: Path) -> None:
    printed = ended(started(tmp_path / "log", tune, *arguments(tmp_path / "run", "nonsense=1")), tmp_path / "log")
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
