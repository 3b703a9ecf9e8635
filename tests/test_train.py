"""Whole runs on the lab: the files that they write, the mistakes that they refuse, and that they learn."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from appo.policy import Policy
from experiments.arms.fixed import FixedPrompt
from experiments.config import build_config
from experiments.run.folder import PHASES, read_jsonl
from experiments.run.run import prepare
from experiments.terminal.console import Progress
from experiments.train import main, parse_args, train

ROOT = Path(__file__).parent.parent
SMALL = ["prompts=4", "threads=1", "sampling.max_new_tokens=24", "examples.test_limit=30", "anchor.prompts=2", "pool=5"]


def run_small(folder: Path, *assignments: str, steps: int = 3, seed: int = 0) -> dict:
    options = {"task": "sst2", "steps": steps, "seed": seed, "run": str(folder)}
    return train(prepare(build_config(options, assignments=[*SMALL, *assignments])), quiet=True)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """A run of three iterations with seed 0, and its result."""
    folder = tmp_path_factory.mktemp("runs") / "small"
    return folder, run_small(folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """A run through the real command line, with a review in it."""
    folder = tmp_path_factory.mktemp("runs") / "first"
    arguments = ["--task", "sst2", "--steps", "10", "--run", str(folder), *SMALL]
    command = [sys.executable, "-m", "experiments.train", *arguments]
    return folder, subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_command_line_ends_well(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    assert (finished[1].returncode, "Traceback" in finished[1].stderr) == (0, False), finished[1].stderr


def test_an_arm_without_iterations_ends_well_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--task", "sst2", "--run", str(tmp_path / "run"), "arm=manual", *SMALL]
    assert main(words) == 0
    shown = capsys.readouterr().out
    assert "manual prompt" in shown and "time:" not in shown
    assert main(["--run", str(tmp_path / "run"), "--resume"]) == 0  # nothing to restore: it is scored once more
    assert capsys.readouterr().out.split("answers on test")[1] == shown.split("answers on test")[1]


def test_command_line_ends_with_a_table(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, process = finished
    for part in ("manual prompt", "best prompt found", "validation", "test", "paper's protocol", str(folder)):
        assert part in process.stdout
    prompt, report = process.stdout.splitlines()[-2:]
    assert prompt.endswith(f"prompt --run {folder} --input TEXT --answer")
    assert report.endswith(f"open {folder / 'report.html'}")


def test_command_line_says_where_the_time_went(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, process = finished
    told = re.findall(r"^  (\w+) +(\d+) s  (\d+)%(.*)$", process.stdout, re.MULTILINE)
    assert [phase for phase, *_ in told] == list(PHASES)
    assert all(bool(re.search(r"\d% of the machine's rate$", more)) == (phase != "review") for phase, *_, more in told)
    assert re.match(r", \d+ tokens a second, ", told[0][3])
    rows = read_jsonl(folder / "metrics.jsonl")
    assert all(0 < sum(row[f"{phase}_seconds"] for phase in PHASES) < row["seconds"] for row in rows)
    assert [row["review_seconds"] > 0 for row in rows] == [row["anchor"] is not None for row in rows]


def test_command_line_begins_with_a_header(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, process = finished
    header = dict(re.split(r"  +", line, maxsplit=1) for line in process.stdout.split("\n\n")[0].splitlines())
    assert header["task"].startswith("sst2, judged by accuracy, data from lab: ")
    assert header["models"] == "agent lab, target lab, on auto"
    assert header["preset"] == "lab, which builds on paper"
    assert header["iteration"] == "4 prompts x 16 examples"
    assert (header["length"], header["writes to"]) == ("10 iterations", str(folder))
    size = r"0\.\d M parameters in float32"
    assert re.fullmatch(rf"agent {size}, target {size}, on (cpu, threads 1|cuda.*)", header["loaded"])
    assert header[""] == "32 train, 32 validation and 30 test rows, 10 iterations"
    assert "\r" not in process.stderr and "\x1b" not in process.stderr
    assert re.search(r"^about .* left: 8 iterations of ", process.stderr, re.MULTILINE)


@pytest.mark.parametrize("mode", ["fixed", "tte"])
def test_a_dry_run_measures_and_writes_nothing(
    mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    small = [*SMALL[1:], "prompts=2", "examples.batch_size=4", "headroom=0"]
    assert main(["--task", "sst2", "--mode", mode, "--dry-run", *small]) == 0
    page = capsys.readouterr().out
    for part in ("writes to  nothing: a dry run", "headroom: accuracy on 32 validation rows", "16 prompts of"):
        assert part in page
    steps = {"fixed": 100, "tte": 200}[mode]
    assert re.search(rf"^time: about .* for {steps} iterations of .* s ", page, re.MULTILINE)
    assert 0.1 < float(re.search(r"^memory: (.*) GiB", page, re.MULTILINE)[1]) < 20  # type: ignore[index]
    assert list(tmp_path.iterdir()) == []


def test_show_config_says_where_each_value_comes_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.yaml").write_text("appo: {lam: 0.5}\n", encoding="utf-8")
    file = str(tmp_path / "mine.yaml")
    assert (
        main(["--show-config", "--config", file, "--task", "rte", "appo.gamma=0.9", "--run", str(tmp_path / "r")]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    shown = dict(re.split(r" +# ", line, maxsplit=1) for line in lines if "  # " in line)
    expected = {
        "task=rte": "command line", "appo.gamma=0.9": "command line", "appo.lam=0.5": f"config file {file}",
        "steps=100": "preset lab", "appo.ppo_epochs=4": "preset paper", "seed=0": "default",
    }  # fmt: skip
    assert {key: shown[key] for key in expected} == expected
    assert lines[lines.index(next(line for line in lines if line.startswith("seed=0"))) + 1] == (
        "    seed of splits, batches, sampling and minibatch order"
    )
    assert not (tmp_path / "r").exists()


def test_show_config_of_a_resumed_run_names_the_runs_own_file(
    finished: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = finished[0]
    assert main(["--show-config", "--run", str(folder), "--resume", "--steps", "12"]) == 0
    shown = dict(re.findall(r"^(\S+) +# (.*)$", capsys.readouterr().out, re.MULTILINE))
    assert (shown["steps=12"], shown["prompts=4"]) == ("command line", f"{folder}/config.yaml")


def test_run_leaves_its_files(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    files = {"config.yaml", "metrics.jsonl", "prompts.jsonl", "best_prompt.json", "headroom.json", "report.html"}
    expected = {*files, "candidates.jsonl", "predictions.jsonl", "agent", "checkpoint"}
    assert {path.name for path in finished[0].iterdir()} == expected


def test_metrics_have_a_row_per_iteration(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    rows = read_jsonl(finished[0] / "metrics.jsonl")
    columns = {
        *("iteration", "reward_mean", "reward_max", "accuracy_mean", "margin_mean", "kl", "policy_loss"),
        *("value_loss", "entropy", "clip_fraction", "seconds", "anchor"),
    }
    assert [row["iteration"] for row in rows] == list(range(1, 11))
    assert all(columns <= set(row) for row in rows)


def test_reviews_are_recorded_with_all_they_were_made_from(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    # 32 training examples in batches of 16 are two iterations an epoch; five epochs are ten iterations.
    reviews = {row["iteration"]: row["review"] for row in read_jsonl(finished[0] / "metrics.jsonl") if row["anchor"]}
    assert list(reviews) == [10]
    assert set(reviews[10]) == {
        *("decision", "reason", "policy_scores", "anchor_scores", "promote_threshold", "rollback_threshold"),
        *("policy_health", "anchor_health"),
    }


def test_every_scored_prompt_is_recorded(finished: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    rows = read_jsonl(finished[0] / "prompts.jsonl")
    assert len(rows) == 10 * 4
    assert set(rows[0]) == {"iteration", "prompt", "reward", "accuracy", "margin", "overlap"}


def test_result_has_what_is_needed_to_use_the_prompt(
    finished: tuple[Path, subprocess.CompletedProcess[str]],
) -> None:
    result = json.loads((finished[0] / "best_prompt.json").read_text())
    expected = {
        *("prompt", "task", "template", "verbalizer", "target", "validation_score", "test_score"),
        *("manual_prompt", "manual_test_score", "seed"),
    }
    assert expected <= set(result)


def test_a_second_run_over_the_first_is_refused(
    finished: tuple[Path, subprocess.CompletedProcess[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in finished[0].rglob("*") if path.is_file()}
    assert main(["--task", "sst2", "--steps", "1", "--run", str(finished[0])]) == 2
    assert "exists" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in finished[0].rglob("*") if path.is_file()} == before


def test_same_seed_same_run(small: tuple[Path, dict], tmp_path: Path) -> None:
    run_small(tmp_path / "again")
    assert (small[0] / "prompts.jsonl").read_bytes() == (tmp_path / "again/prompts.jsonl").read_bytes()


def test_other_seed_other_run(small: tuple[Path, dict], tmp_path: Path) -> None:
    run_small(tmp_path / "other", seed=1, steps=1)
    other = read_jsonl(tmp_path / "other/prompts.jsonl")
    assert other != read_jsonl(small[0] / "prompts.jsonl")[: len(other)]


def test_test_split_is_not_touched_before_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop and its reviews run on data without a test split; only the result asks for it."""
    options = {"task": "sst2", "steps": 10, "run": str(tmp_path / "run")}
    run = prepare(build_config(options, assignments=SMALL))
    untested = SimpleNamespace(spec=run.data.spec, train=run.data.train, validation=run.data.validation)

    class ReachedError(Exception):
        pass

    def result(_arm: FixedPrompt) -> None:
        raise ReachedError

    monkeypatch.setattr(FixedPrompt, "result", result)
    with pytest.raises(ReachedError):
        train(replace(run, data=untested), quiet=True)
    assert len(read_jsonl(tmp_path / "run/metrics.jsonl")) == 10


def test_winner_is_chosen_on_validation_not_on_test(small: tuple[Path, dict]) -> None:
    folder, result = small
    if result["chosen"] == "tuned":  # the best of a pool of five, which includes the winner
        assert result["test_score"] <= result["paper_protocol"]["test_score"] + 1e-6  # the former is a float32 mean
    written = {row["prompt"] for row in read_jsonl(folder / "prompts.jsonl")}
    assert result["prompt"] in written | {result["manual_prompt"]}


def test_assignments_may_stand_between_options() -> None:
    config, resume = parse_args(["threads=1", "--task", "rte", "appo.kl_coef=0.5", "--seed", "3", "steps=7"])
    assert (config.threads, config.task, config.appo.kl_coef, config.seed, config.steps) == (1, "rte", 0.5, 3, 7)
    assert not resume


def test_onednn_can_be_switched_off() -> None:
    assert [parse_args(given)[0].onednn for given in ([], ["onednn=false"])] == [True, False]


def test_frozen_agent_is_best_of_n(tmp_path: Path) -> None:
    run_small(tmp_path / "run", "arm=frozen", steps=4)
    rows = read_jsonl(tmp_path / "run/metrics.jsonl")
    assert all(abs(row["kl"]) < 1e-5 for row in rows)  # the agent is still the anchor


def test_self_check_stops_a_run_that_does_not_add_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sampler at another temperature than the loss: exit code 3, the cause named, no metrics written."""
    original = Policy.sample

    def hot(policy, queries, generator=None, copies=1, greedy=False):
        policy.sampling, kept = replace(policy.sampling, temperature=2.0), policy.sampling
        rollout = original(policy, queries, generator, copies)
        policy.sampling = kept
        return rollout

    monkeypatch.setattr(Policy, "sample", hot)
    assert main(["--task", "sst2", "--run", str(tmp_path / "run"), *SMALL]) == 3
    assert "temperature" in capsys.readouterr().err


def test_interrupted_run_keeps_its_rows_and_shows_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Progress, "show", interrupt)
    assert main(["--task", "sst2", "--steps", "3", "--run", str(tmp_path / "run"), *SMALL]) == 130
    assert "stopped" in capsys.readouterr().err
    assert len(read_jsonl(tmp_path / "run/metrics.jsonl")) == 1


def test_worked_examples_that_do_not_fit_are_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.run.run.few_shot_prompts", lambda *_: ["go " * 2000])
    folder = tmp_path / "run"
    assert main(["--task", "sst2", "few_shot=1", "--run", str(folder), *SMALL]) == 2
    error = capsys.readouterr().err
    assert "does not fit into the target's context" in error and "fewer examples.pairs in few-shot prompts" in error
    assert not folder.exists()


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["--task", "mnIi"], ["unknown task 'mnIi'", "did you mean 'mnli'"]),
        (["appo.kl_coeff=0.1"], ["appo.kl_coeff", "did you mean 'appo.kl_coef'"]),
        (["--data", "no/such/folder"], ["no/such/folder"]),
        (["--agent", "./no-such-model"], ["agent", "no-such-model"]),
        (["--target", "experiments/configs"], ["target", "config.json"]),
        (["examples.shots=5000"], ["5000 shots", "label"]),
        (["sampling.max_new_tokens=1000"], ["agent's context: ", "the context holds 1024", "sampling.max_new_tokens"]),
        (["sampling.max_new_tokens=5000"], ["5000", "context"]),
        (["--steps", "0"], ["steps is 0"]),
        (["device=nonsense"], ["nonsense"]),
        (["preset=publishd"], ["did you mean 'published'"]),
    ],
)
def test_mistakes_end_in_one_clear_line(
    arguments: list[str], fragments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "run"
    assert main([*arguments, "--run", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    assert all(fragment in error for fragment in fragments), error
    assert not folder.exists()


@pytest.fixture
def climb(tmp_path: Path) -> Callable[..., list[float]]:
    """Mean accuracies of the sampled prompts of a short real run on the lab."""

    def run(*assignments: str) -> list[float]:
        options = {"task": "sst2", "steps": 18, "run": str(tmp_path / "run")}
        given = ["threads=1", "examples.test_limit=30", "headroom=0", "prompts=16", "appo.learning_rate=4e-4"]
        train(prepare(build_config(options, assignments=[*given, *assignments])), quiet=True)
        return [row["accuracy_mean"] for row in read_jsonl(tmp_path / "run/metrics.jsonl")]

    return run


def test_agent_learns_on_the_lab(climb: Callable[..., list[float]]) -> None:
    scores = climb()
    assert sum(scores[-5:]) / 5 > sum(scores[:5]) / 5 + 0.1
