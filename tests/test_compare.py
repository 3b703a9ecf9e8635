"""Arms side by side: which runs are compared, and that a failing arm does not stop the others."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import weakref
from pathlib import Path
from typing import Any

import pytest

from appo.trainer import APPOTrainer, DivergedError, Iteration
from experiments import train
from experiments.compare import COLUMNS, cells_of, main, parse_args
from experiments.config import build_config
from experiments.diagnostics.results import arm_of
from experiments.run.folder import read_result, stored_config
from experiments.run.run import prepare
from experiments.tuning.cells import make
from tasks.catalogue import load_spec

SMALL = ["prompts=2", "threads=1", "sampling.max_new_tokens=8", "examples.test_limit=10", "pool=2", "steps=2"]


def arguments(folder: Path, *more: str) -> list[str]:
    return ["--task", "sst2", "--folder", str(folder), *more]


def rows(out: str) -> list[list[str]]:
    """The cells of the first table's rows, without its header."""
    lines = out.partition("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def csv_rows(file: Path) -> list[dict[str, str]]:
    with file.open(encoding="utf-8", newline="") as lines:
        return list(csv.DictReader(lines))


def test_a_row_for_each_run_and_a_mean_for_each_arm(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ["--out", str(tmp_path / "results.csv")]
    assert main(arguments(tmp_path, "--arms", "appo", "frozen", "--seeds", "0", "1", *SMALL, *out)) == 0
    found = rows(capsys.readouterr().out)
    assert [row[:2] for row in found] == [
        *(["appo", "0"], ["appo", "1"], ["**appo**", "mean"]),
        *(["frozen", "0"], ["frozen", "1"], ["**frozen**", "mean"]),
    ]
    for one, other, mean in (found[:3], found[3:]):
        for i in range(4, 4 + len(COLUMNS)):  # each is rounded to three digits
            values = [float(cell[i].split(" ")[0]) for cell in (one, other)]
            assert float(mean[i]) == pytest.approx(sum(values) / 2, abs=0.0011)
        for row in (one, other):  # all that is scored on a split carries its interval and its rows
            assert all(re.fullmatch(r"[\d.]+ \([\d.]+ to [\d.]+, n = \d+\)", row[i]) for i in range(6, 10)), row
    written = csv_rows(tmp_path / "results.csv")
    assert [(row["arm"], row["seed"]) for row in written] == [tuple(row[:2]) for row in found if row[1] != "mean"]


# What `make compare SEEDS=0 ARGS="steps=2"` and the like expand to.
ORDERS = [
    ["--seeds", "5", "steps=2", "--arms", "tte", "--seeds", "0", "1", "prompts=3"],  # the later seeds count
    ["--seeds", "0", "1", "steps=2", "prompts=3"],
    ["steps=2", "--seeds", "0", "1", "prompts=3"],
    ["--seeds", "0", "1", "--arms", "tte", "steps=2", "prompts=3"],
    ["--arms", "tte", "steps=2", "prompts=3", "--seeds", "0", "1"],
]


@pytest.mark.parametrize("given", ORDERS)
def test_an_assignment_is_neither_a_seed_nor_an_arm(given: list[str]) -> None:
    options = parse_args(given)
    assert (options.seeds, sorted(options.assignments)) == ([0, 1], ["prompts=3", "steps=2"])
    assert options.arms == (["tte"] if "--arms" in given else ["appo", "frozen"])


@pytest.mark.parametrize(
    ("given", "fragment"),
    [
        (["--seeds", "x"], "--seeds: 'x' is no seed"),
        (["--seeds", "-1"], "--seeds"),
        (["--seeds", "3-1"], "--seeds: '3-1' is no seed"),
        (["--seeds", "0-99999999999"], "--seeds: '0-99999999999' is no seed"),
        (["--jobs", "0"], "--jobs is 0; expected at least 1"),
        (["--seeds", "0", "steps=2", "--arms", "apo"], "unknown arm 'apo'; expected appo, "),
        (["--seeds", str(2**64)], "seed is"),
        (["--task", "mnIi"], "did you mean 'mnli'"),
        (["--seeds", "0", "stepz=2"], "unknown key 'stepz'"),
        (["--seeds", "steps=2"], "--seeds: expected a value before 'steps=2'"),
        (["--seeds", "0", "seed=3"], "'seed=3' would make all runs alike; use --seeds"),
        (["run=here"], "'run=here' would make all runs alike; use --folder"),
        (["--arms", "appo", "arm=ppo"], "'arm=ppo' would make all runs alike; use --arms"),
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

    monkeypatch.setattr(APPOTrainer, "step", diverging)  # frozen takes no step
    out = ["--out", str(tmp_path / "results.csv")]
    assert main(arguments(tmp_path, "--seeds", "0", "--arms", "appo", "frozen", *SMALL, *out)) == 3
    captured = capsys.readouterr()
    assert captured.err == "error: appo, seed 0: no sound step\n"
    assert [row[:2] for row in rows(captured.out)] == [["appo", "0"], ["frozen", "0"], ["**frozen**", "mean"]]
    assert [row["finished"] for row in csv_rows(tmp_path / "results.csv")] == ["False", "True"]
    assert "failed" in rows(captured.out)[0] and len(rows(captured.out)[0]) == len(rows(captured.out)[1])


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
    assert [path.name for path in tmp_path.iterdir()] == ["appo-0"]
    assert list((tmp_path / "appo-0" / "checkpoint").iterdir())


def test_a_stopped_cell_resumes_and_a_finished_one_is_not_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step, taken = APPOTrainer.step, list[int]()

    def stopping(self: APPOTrainer, *given: Any) -> Any:
        taken.append(1)
        if len(taken) == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, *given)

    monkeypatch.setattr(APPOTrainer, "step", stopping)
    asked = arguments(tmp_path, "--arms", "appo manual", "--seeds", "0", *SMALL, "headroom=0")
    assert main(asked) == 130 and len(taken) == 1
    assert main([*asked, "checkpoint_every=7"]) == 0 and len(taken) == 2  # the second of two iterations
    assert stored_config(tmp_path / "appo-0").checkpoint_every == 7  # what shapes no result may change
    shown = capsys.readouterr().out
    assert [row[:3] for row in rows(shown[shown.rindex("| arm | seed |") :])][::2] == [
        ["appo", "0", "4"],
        ["manual", "0", "0"],
    ]
    monkeypatch.setattr("experiments.run.run.prepare", lambda *given: 1 / 0)
    assert main(asked) == 0
    assert main([*asked, "shard=true", "threads=2", "checkpoint_every=3"]) == 0  # they shape no result
    assert main([*asked, "examples.pairs=4"]) == 2
    error = capsys.readouterr().err
    assert "holds a run with other settings: examples.pairs (5 -> 4)" in error.splitlines()[-1]


def test_cells_run_side_by_side_in_processes_of_their_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = ["--arms", "manual", "empty", "--seeds", "3", "--jobs", "2", *SMALL]
    assert main(arguments(tmp_path, *arms)) == 0
    found = capsys.readouterr().out
    assert [row[:3] for row in rows(found)][::2] == [["manual", "3", "0"], ["empty", "3", "0"]]
    assert [row[9] for row in rows(found)] == [""] * 4  # no prompts were ranked by training reward
    config = stored_config(tmp_path / "empty-3")
    assert (config.threads, config.arm, config.seed) == (1, "empty", 3)
    assert read_result(tmp_path / "empty-3")["chosen"] == "empty" and (tmp_path / "empty-3.log").is_file()
    arms_table = found.partition("\n\n")[2]
    assert "| interquartile mean |" in arms_table and "| beats manual |" in arms_table


def test_a_resumed_cell_takes_incidental_keys_from_this_call(tmp_path: Path) -> None:
    (cell,) = cells_of(parse_args(["--arms", "manual", "--seeds", "0", "--folder", str(tmp_path), "--jobs", "2"]))
    assert cell.going_on == ["--run", str(tmp_path / "manual-0"), "--resume"]
    asked = ["--arms", "manual", "--seeds", "0", "--folder", str(tmp_path), "--jobs", "2", "trust_remote_code=true"]
    (cell,) = cells_of(parse_args([*asked, "prompts=2"]))
    assert cell.going_on == ["--run", str(tmp_path / "manual-0"), "--resume", "trust_remote_code=true"]


def test_a_process_without_an_error_message_does_not_get_an_older_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (cell,) = cells_of(parse_args(["--arms", "manual", "--seeds", "0", "--folder", str(tmp_path), "--jobs", "2"]))
    (tmp_path / "manual-0.log").write_text("error: the disk was full\n", encoding="utf-8")
    monkeypatch.setattr("sys.executable", shutil.which("false"))
    ((_, code, error),) = make([cell], 2)
    assert code == 1 and error == f"ended without an error message; see {tmp_path / 'manual-0.log'}"


def test_a_process_that_a_signal_stopped_is_said_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (cell,) = cells_of(parse_args(["--arms", "manual", "--seeds", "0", "--folder", str(tmp_path), "--jobs", "2"]))
    program = tmp_path / "stopped"
    program.write_text("#!/bin/sh\necho stopped\nexit 143\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    assert [found[1:] for found in make([cell], 2)] == [(143, "stopped by a signal; the same command goes on with it")]


def test_the_models_of_a_cell_are_gone_before_those_of_the_next_are_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = list[weakref.ref[Any]]()

    def watched(*given: Any) -> Any:
        assert all(model() is None for model in models)
        run = prepare(*given)
        models.append(weakref.ref(run.policy.model))
        return run

    monkeypatch.setattr("experiments.run.run.prepare", watched)
    asked = ["--arms", "manual", "--seeds", "0-1", "--folder", str(tmp_path), "examples.test_limit=4", "headroom=0"]
    assert [code for _, code, _ in make(cells_of(parse_args(asked)), 1)] == [0, 0] and len(models) == 2


@pytest.mark.parametrize(
    ("words", "seeds"), [(["0-3"], [0, 1, 2, 3]), (["7", "0-1", "1"], [7, 0, 1]), (["0 2-3"], [0, 2, 3])]
)
def test_seeds_are_numbers_and_ranges(words: list[str], seeds: list[int]) -> None:
    assert parse_args(["--seeds", *words]).seeds == seeds


# -- runs that exist ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Runs by name: two that can be compared, one of another task, one with another test split."""
    folder = tmp_path_factory.mktemp("runs")
    given = {
        "appo": ["--task", "sst2"],
        "random": ["--task", "sst2", "--seed", "0", "arm=frozen"],
        "mnli": ["--task", "mnli"],
        "shorter": ["--task", "sst2", "examples.test_limit=5"],
    }
    for name, words in given.items():
        assert train.main([*SMALL, "headroom=0", *words, "--run", str(folder / name)]) == 0
    return {name: folder / name for name in given}


def compared(made: dict[str, Path], *names: str, more: tuple[str, ...] = ()) -> int:
    return main(["--runs", *(str(made[name]) for name in names), *more])


def test_runs_that_exist_are_shown_with_intervals_and_verdict(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(made, "appo", "random", more=("--out", str(tmp_path / "results.csv"))) == 0
    found, written = rows(capsys.readouterr().out), csv_rows(tmp_path / "results.csv")
    assert [row[:7] for row in found] == [
        [str(made["appo"]), "sst2", "appo", "lab", "lab", "0", "2"],
        [str(made["random"]), "sst2", "frozen", "lab", "lab", "0", "2"],
    ]
    for name, cells, row in zip(("appo", "random"), found, written, strict=True):
        result = read_result(made[name])
        for cell, which in ((cells[7], ""), (cells[8], "manual_")):
            low, high = result[f"{which}test_interval"]
            score = result[f"{which}test_score"]
            assert cell == f"{score:.3f} ({low:.3f} to {high:.3f}, n = 10)"
            written_ends = [float(row[f"{which}test_{end}"]) for end in ("score", "low", "high")]
            assert written_ends == [score, low, high]
        assert cells[9] == row["verdict"] == result["verdict"]
        assert (row["test_rows"], row["steps"], row["finished"]) == ("10", "2", "True")
    assert written[0]["test"] == written[1]["test"]


def test_the_page_of_a_comparison_shows_every_run_and_every_arm(made: dict[str, Path], tmp_path: Path) -> None:
    assert compared(made, "appo", "random", more=("--page", str(tmp_path / "page.html"))) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<h1>sst2: 2 ways to tune a prompt, 2 runs</h1>" in page
    forest, curves = page.split("<h2>While training")
    for name, arm in (("appo", "appo"), ("random", "frozen")):
        result = read_result(made[name])
        low, high = result["test_interval"]
        assert f">{arm}, seed 0</text>" in forest and f"{arm}, seed 0 {result['test_score']:.3f}" in forest
        assert f"{arm} (1 run)" in curves
        assert f"{result['test_score']:.3f} ({low:.3f} to {high:.3f}, n = 10)" in curves
    assert curves.count("<polyline") == curves.count("<polygon") == 2


def test_a_page_without_a_finished_run_says_so(made: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(made["appo"], tmp_path / "run")
    (tmp_path / "run/best_prompt.json").unlink()
    assert main(["--runs", str(tmp_path / "run"), "--page", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "<p>No run is finished.</p>" in page and "<polyline" in page


def test_curves_of_unfinished_runs_are_drawn_in_the_tasks_own_metric(made: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(made["appo"], tmp_path / "run")
    (tmp_path / "run/best_prompt.json").unlink()
    config = (tmp_path / "run/config.yaml").read_text(encoding="utf-8")
    (tmp_path / "run/config.yaml").write_text(config.replace("task: sst2", "task: antonyms"), encoding="utf-8")
    metrics = (tmp_path / "run/metrics.jsonl").read_text(encoding="utf-8")
    metric = load_spec("antonyms").metric
    (tmp_path / "run/metrics.jsonl").write_text(metrics.replace("accuracy_mean", f"{metric}_mean"), encoding="utf-8")
    assert main(["--runs", str(tmp_path / "run"), "--page", str(tmp_path / "page.html")]) == 0
    assert "<polyline" in (tmp_path / "page.html").read_text(encoding="utf-8")


def test_a_metric_that_a_file_names_is_escaped(made: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made["appo"], tmp_path / "run"))
    result = (folder / "best_prompt.json").read_text(encoding="utf-8")
    (folder / "best_prompt.json").write_text(result.replace('"accuracy"', '"<b>"'), encoding="utf-8")
    metrics = (folder / "metrics.jsonl").read_text(encoding="utf-8")
    (folder / "metrics.jsonl").write_text(metrics.replace("accuracy_mean", "<b>_mean"), encoding="utf-8")
    assert main(["--runs", str(folder), "--page", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "&lt;b&gt;" in page and "<b>" not in page


def test_rows_of_metrics_that_no_run_wrote_are_not_drawn(made: dict[str, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(made["appo"], tmp_path / "run"))
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write(
            '{"iteration": 3, "accuracy_mean": {}}\n{"accuracy_mean": 1.0}\n{"iteration": 4, "accuracy_mean": "x"}\n'
        )
    assert main(["--runs", str(folder), "--page", str(tmp_path / "page.html")]) == 0
    assert (tmp_path / "page.html").read_text(encoding="utf-8").count("<polyline") == 1


@pytest.mark.parametrize("lacking", [["test"], ["manual_test"], ["test", "manual_test"]])
def test_a_score_that_is_not_finite_leaves_its_cells_empty(
    lacking: list[str], made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(made["random"], tmp_path / "frozen-0"))  # as a run whose target gave no number
    found = read_result(folder) | {f"{name}_score": None for name in lacking}
    found |= {f"{name}_interval": [None, None] for name in lacking}
    (folder / "best_prompt.json").write_text(json.dumps(found), encoding="utf-8")
    page = ["--page", str(tmp_path / "page.html")]
    assert main(["--runs", str(folder), *page]) == 0
    assert ("frozen, seed 0</text>" in (tmp_path / "page.html").read_text(encoding="utf-8")) == ("test" not in lacking)
    capsys.readouterr()
    assert main(arguments(tmp_path, "--arms", "frozen", "--seeds", "0", *SMALL, "headroom=0", *page)) == 0
    run, mean = rows(capsys.readouterr().out)
    for cells in (run, mean):
        assert [cells[7] == "", cells[8] == ""] == ["test" in lacking, "manual_test" in lacking]


def test_seeds_that_share_no_iteration_have_no_curve(made: dict[str, Path], tmp_path: Path) -> None:
    first, second = (made["random"] / "metrics.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    runs = [shutil.copytree(made["random"], tmp_path / name) for name in ("begun", "late")]
    (runs[0] / "metrics.jsonl").write_text(first, encoding="utf-8")
    (runs[1] / "metrics.jsonl").write_text(second, encoding="utf-8")
    page = tmp_path / "page.html"
    assert main(["--runs", str(made["appo"]), *map(str, runs), "--page", str(page)]) == 0
    assert page.read_text(encoding="utf-8").count("<polyline") == 1


def test_a_run_that_is_not_finished_is_marked(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begun = Path(shutil.copytree(made["appo"], tmp_path / "begun|half"))
    (begun / "best_prompt.json").unlink()
    (begun / "metrics.jsonl").write_text('{"iteration": 1}\n', encoding="utf-8")
    assert compared(made | {"begun": begun}, "begun", "random", more=("--out", str(tmp_path / "a.csv"))) == 0
    table = capsys.readouterr().out.replace("begun\\|half", "begun")
    assert rows(table)[0][1:] == ["sst2", "appo", "lab", "lab", "0", "1", "", "", "unfinished"]
    assert [(row["finished"], row["test_score"] == "") for row in csv_rows(tmp_path / "a.csv")] == [
        ("False", True),
        ("True", False),
    ]


@pytest.mark.parametrize(
    ("names", "fragment"),
    [
        (("appo", "mnli"), "mnli has another task (mnli) than "),
        (("appo", "shorter"), "shorter has another test split or template than "),
    ],
)
def test_runs_with_different_tests_are_refused_unless_they_are_shown_apart(
    names: tuple[str, str], fragment: str, made: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(made, *names) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert fragment in captured.err and "--separate" in captured.err
    assert compared(made, *names, more=("--separate",)) == 0
    tables = capsys.readouterr().out.split("\n\n")
    assert [[row[0] for row in rows(table)] for table in tables] == [[str(made[name])] for name in names]


def test_runs_are_shown_in_the_order_given_and_grouped_where_they_belong(
    made: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert compared(made, "appo", "mnli", "random", more=("--separate",)) == 0
    tables = capsys.readouterr().out.split("\n\n")
    assert [[Path(row[0]).name for row in rows(table)] for table in tables] == [["appo", "random"], ["mnli"]]


def test_a_run_that_is_named_twice_counts_once_and_a_log_not_at_all(
    made: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = tmp_path / "appo.log"
    log.touch()
    assert compared(made | {"log": log}, "appo", "log", "random", "appo") == 0
    assert [Path(row[0]).name for row in rows(capsys.readouterr().out)] == ["appo", "random"]
    assert compared({"log": log}, "log") == 2
    assert "appo.log' is a file; expected folders of runs" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "fragment"),
    [
        (["--runs", "no-such-folder"], "'no-such-folder' holds no config.yaml; expected the folder of a run"),
        (
            ["--runs", "a", "--task", "sst2"],
            "--runs shows runs that exist; it goes with --separate, --out and --page only",
        ),
        (["--runs", "a", "--seeds", "0"], "--runs shows runs that exist"),
        (["--separate"], "--separate goes with --runs only"),
        (["--runs", "a", "--out", "tests"], "--out: 'tests' is a folder; expected a file"),
        (["--runs", "a", "--page", "no/b"], "--page: 'no/b' cannot be written: there is no folder 'no'"),
        (["--runs", "a", "--separate", "--page", "b"], "--page shows runs of one test; leave out --separate"),
    ],
)
def test_mistakes_with_runs_are_one_clear_line(
    given: list[str], fragment: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(given) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and fragment in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("assignments", "arm"),
    [
        ([], "appo"),
        (["appo.reference=none"], "none"),
        (["appo.reference=previous"], "ppo"),
        (["arm=ppo"], "ppo"),
        (["arm=few_shot"], "few_shot"),
        (["arm=frozen"], "frozen"),
        (["mode=tte"], "tte"),
        (["mode=tte", "appo.reference=initial"], "tte, rlhf"),
        (["mode=tte", "arm=frozen"], "tte-untrained"),
    ],
)
def test_a_run_has_the_name_of_its_arm(assignments: list[str], arm: str) -> None:
    assert arm_of(build_config(assignments=assignments)) == arm
