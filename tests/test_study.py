"""Studies: the runs that a file describes, their plans and records, and the tables made from the records."""

from __future__ import annotations

import math
from pathlib import Path
from xml.etree import ElementTree

import pytest

from experiments.config import build_config
from experiments.diagnostics.records import Record
from experiments.diagnostics.tables import (
    by,
    markdown,
    on_test,
    over_time,
    plane,
    scores_on_test,
    summary,
    untrained,
    view,
)
from experiments.page.heat_map import drawn, heat_map
from experiments.run.folder import jsonl_of, read_jsonl
from experiments.run.run import current_commit
from experiments.study import main, show
from experiments.tuning.cells import Cell
from experiments.tuning.study import STUDIES, Study

SVG = "{http://www.w3.org/2000/svg}"
SMALL = "prompts=2 threads=1 sampling.max_new_tokens=8 examples.test_limit=10 pool=2 steps=2 headroom=0"
FILE = f"""
question: Does the reference matter?
seeds: 0 2-3
keys: task=sst2 {SMALL}
axes:
  lr:
    small: appo.learning_rate=1e-5
    large: appo.learning_rate=1e-3
  reference:
    anchor: ""
    none: arm=none
tables:
  - summary of reference
  - plane of lr by reference
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "references.yaml"
    path.write_text(FILE, encoding="utf-8")
    return path


def test_there_is_a_run_for_each_combination_and_seed(file: Path, tmp_path: Path) -> None:
    study = Study.load(str(file))
    assert (study.name, study.seeds) == ("references", [0, 2, 3])
    cells = list(study.cells(tmp_path, study.seeds, ["steps=7"]))
    assert len(cells) == 2 * 2 * 3
    labels, cell = cells[1]
    assert labels == {"lr": "small", "reference": "none"}
    assert (cell.name, cell.folder.name) == ("small, none, seed 0", "small-none-0")
    assert (cell.config.arm, cell.config.seed, cell.config.steps) == ("none", 0, 7)
    assert cell.config.appo.learning_rate == 1e-5
    assert len({cell.folder for _, cell in cells}) == len(cells)


@pytest.mark.parametrize("path", sorted(STUDIES.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_study_that_is_shipped_can_be_run(path: Path, tmp_path: Path) -> None:
    study = Study.load(path.stem)
    cells = list(study.cells(tmp_path, study.seeds))
    assert len({cell.folder for _, cell in cells}) == len(cells)
    on_the_lab = ["agent=lab", "target=lab", "data=lab", "preset=lab", "lora.rank=null"]
    if path.stem.startswith("paper-"):  # what `make reproduce LAB=1` adds
        assert {cell.config.target for _, cell in study.cells(tmp_path, [0], on_the_lab)} == {"lab"}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nonsense"], "no study 'nonsense'; expected one of ablate, "),
        (["ablate", "--jobs", "0"], "--jobs is 0; expected at least 1"),
        (["ablate", "--seeds", "x"], "'x' is no seed"),
        (["ablate", "apo.lam=1"], "apo"),
        (["steps=3"], "'steps=3' is no study"),
        (["--seeds", "0", "steps=3"], "'steps=3' is no study"),
        (["ablate", "--seeds", "steps=3"], "--seeds: expected a value before 'steps=3'"),
        (["ablate", "--record", "tests"], "'tests' is a folder; expected a file"),
        (["ablate", "--record", "no/r.jsonl"], "'no/r.jsonl' cannot be written: there is no folder 'no'"),
        (["ablate", "seed=3"], "'seed=3' would make all runs alike; use --seeds"),
        (["ablate", "--seeds", "0", "run=here"], "'run=here' would make all runs alike; use --folder"),
    ],
)
def test_mistakes_are_one_line(words: list[str], told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    error = capsys.readouterr().err
    assert told in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        (
            "tables:",
            "pictures:",
            "unknown key 'pictures'; no key 'tables'; expected question, seeds, keys, axes, tables",
        ),
        ("seeds: 0 2-3", "", "no key 'seeds'; expected question, "),
        ("arm=none", "task=snil", "small, none, seed 0: unknown task 'snil'; did you mean 'snli'?"),
        ("arm=none", "task=no.yaml", "small, none, seed 0: no spec file"),
        ("    small: appo.learning_rate=1e-5\n    large: appo.learning_rate=1e-3", "    3", "axes.lr: expected names"),
        ("summary of", "sum of", "tables: 'sum of reference' is no table"),
        (
            "by reference",
            "by referense",
            "tables: 'plane of lr by referense': no axis 'referense'; expected",
        ),
        (
            "summary of reference",
            "summary of lr where reference = nun",
            "no setting 'nun'; expected one of anchor, none",
        ),
        ("keys: task", "keys: 'task", "not YAML"),
        ("task=sst2", "task='sst2", "keys: No closing quotation"),
        ("arm=none", 'arm="none', "axes.reference.none: No closing quotation"),
        ("arm=none", "arms=none", "axes.reference.none: unknown key 'arms'; did you mean 'arm'?"),
        ("arm=none", "none", "axes.reference.none: 'none': expected key=value"),
        ("arm=none", "[arm=none]", "axes.reference.none: expected a text of key=value, found ['arm=none']"),
        ("arm=none", "arm=none seed=3", "axes.reference.none: 'seed=3' would make all runs alike"),
        ("steps=2", "steps=0", "small, anchor, seed 0: steps is 0"),
        ("    none: arm", "    no: arm", "axes.reference: YAML reads the name False as no text; put it in quotes"),
        ("  lr:", "  1:", "axes.1: YAML reads the name 1 as no text"),
        ("seeds: 0 2-3", "seeds: [0, x]", "seeds: 'x' is no seed"),
        ("seeds: 0 2-3", "seeds: []", "seeds: expected at least one"),
        ("    small:", "    large!:", "axes: 'large!, anchor' and 'large, anchor' would share a folder"),
    ],
)
def test_a_file_that_is_no_study_is_refused_before_anything_runs(
    old: str, new: str, told: str, file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file.write_text(FILE.replace(old, new), encoding="utf-8")
    assert main([str(file)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {file}: ") and told in error and error.count("\n") == 1


def test_seeds_may_be_a_list(file: Path) -> None:
    file.write_text(FILE.replace("seeds: 0 2-3", "seeds: [2, 0, 4-5, 2]"), encoding="utf-8")
    assert Study.load(str(file)).seeds == [2, 0, 4, 5]


def test_letters_of_any_script_tell_folders_apart(file: Path, tmp_path: Path) -> None:
    text = FILE.replace("small:", "λ_1:").replace("large:", "β, lr 1e-3:")
    file.write_text(text, encoding="utf-8")
    folders = [cell.folder.name for _, cell in Study.load(str(file)).cells(tmp_path, [0])]
    assert folders == ["λ-1-anchor-0", "λ-1-none-0", "β-lr-1e-3-anchor-0", "β-lr-1e-3-none-0"]


def test_runs_are_made_recorded_and_not_made_again(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "references.jsonl"
    words = [str(file), "--seeds", "0", "--folder", str(tmp_path / "runs"), "--record", str(record)]
    assert main(words) == 0
    first = capsys.readouterr()
    assert "4/4  large, none, seed 0: done" in first.err
    assert "| anchor | 2 |" in first.out and "| small |" in first.out
    written = read_jsonl(record)
    assert [run["labels"] for run in written] == list(Study.load(str(file)).combinations())
    assert {len(run["curve"]) for run in written} == {2}
    assert {run["config"]["appo.learning_rate"] for run in written} == {1e-5, 1e-3}
    assert all(run["environment"]["torch"] and run["commit"] == current_commit() for run in written)
    before = sorted(path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("metrics.jsonl"))
    assert main(words) == 0
    assert sorted(path.stat().st_mtime_ns for path in (tmp_path / "runs").rglob("metrics.jsonl")) == before
    assert read_jsonl(record) == written
    assert capsys.readouterr().out == first.out
    assert main([*words, "--seeds", "0", "1", "--show"]) == 0  # there is none of seed 1
    assert read_jsonl(record) == written and capsys.readouterr().out == first.out


@pytest.mark.parametrize(
    "words",
    [
        ["--seeds", "0", "2", "0-1", "steps=1", "prompts=3"],  # `make ablate SEEDS="0 2 0-1" ARGS="steps=1 prompts=3"`
        ["--seeds", "7", "steps=1", "--seeds", "0 2", "1", "prompts=3"],
    ],
)
def test_an_assignment_is_no_seed_and_a_seed_counts_once(
    words: list[str], file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = list[Cell]()
    monkeypatch.setattr("experiments.study.made", lambda cells, jobs: asked.extend(cells) or {})
    assert main([str(file), "--folder", str(tmp_path), *words]) == 0
    assert [cell.config.seed for cell in asked] == [0] * 4 + [2] * 4 + [1] * 4
    assert {(cell.config.steps, cell.config.prompts) for cell in asked} == {(1, 3)}


def test_a_record_is_not_overwritten_with_no_runs(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "r.jsonl"
    record.write_text("kept")
    assert main([str(file), "--show", "--folder", str(tmp_path / "wrong"), "--record", str(record)]) == 2
    assert "no run in" in capsys.readouterr().err and record.read_text() == "kept"


def test_a_folder_without_a_finished_run_is_named(
    file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(file), "--show", "--folder", str(tmp_path / "typo")]) == 2
    assert capsys.readouterr().err == f"error: no run in '{tmp_path / 'typo'}' is finished\n"


def test_edits_which_have_no_kl_are_recorded_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "edits.yaml"
    keys = f"task=sst2 {SMALL} steps=1"
    file.write_text(
        f"question: What?\nseeds: 0\nkeys: {keys}\naxes: {{arm: {{e: arm=edits}}}}\ntables: [runs of arm]\n"
    )
    assert main([str(file), "--folder", str(tmp_path / "runs"), "--record", str(tmp_path / "r.jsonl")]) == 0
    (found,) = read_jsonl(tmp_path / "r.jsonl")
    assert (found["kl"], len(found["curve"])) == ([None], 1)
    assert "| e | 0 |" in capsys.readouterr().out


def test_tables_are_printed_even_if_the_record_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cells = [(run["labels"], Cell(str(run["seed"]), build_config({"run": "r"}), [])) for run in RUNS]
    rows = iter(RUNS)
    monkeypatch.setattr("experiments.study.record_of", lambda *given: next(rows))
    study = Study(Path("s.yaml"), "?", [0], [], {}, ["summary of arm"])
    with pytest.raises(OSError, match="directory") as error:
        show(study, cells, tmp_path, tmp_path)
    assert error.value.filename == str(tmp_path)  # not that of a .part file
    assert "| appo | 2 |" in capsys.readouterr().out


def test_a_plan_says_what_all_runs_would_take(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(file), "--dry"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith(("| small", "| large")) for line in lines) == 4
    assert lines[-1].startswith("12 runs, in all: ")


@pytest.mark.parametrize("more", [["--show"], ["--record", "r.jsonl"]])
def test_a_plan_shows_and_records_no_run(
    more: list[str], file: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main([str(file), "--dry", *more]) == 2
    assert "it goes without --show and --record" in capsys.readouterr().err


# -- tables ------------------------------------------------------------------------------------------------------------


def record(
    arm: str, seed: int, curve: list[float | None], test: float | None = 0.5, task: str = "t", mode: str = "fixed"
) -> Record:
    given = {"study": "s", "labels": {"arm": arm, "task": task}, "seed": seed, "task": task, "arm": arm}
    given |= {"agent": "a", "target": "b", "config": {"arm": arm, "mode": mode}}
    scores = {"test_score": test, "test_interval": [0.4, 0.6], "test_rows": 100}
    scores |= {"manual_test_score": None if test is None else 0.45}
    chosen = {"validation_score": 0.5, "validation_rows": 32, "prompt": "a | b"}
    moves = {"kl": [0.0] * len(curve), "promoted": 1, "rolled_back": 0, "iterations": len(curve)}
    return {**given, **scores, **chosen, **moves, "curve": curve}


RUNS = [
    record("appo", 0, [0.3] * 20 + [0.9] * 20, 0.9),
    record("appo", 1, [0.3] * 20 + [0.7] * 20, 0.8),
    record("none", 0, [0.3] * 20 + [0.8] * 20, 0.7),
    record("none", 1, [0.3] * 20 + [0.32] * 20, 0.4),
]


def test_a_summary_has_what_the_seeds_end_with() -> None:
    header, appo, none = summary(RUNS, "arm")
    assert dict(zip(header, appo, strict=True)) == {
        "arm": "appo",
        "runs": "2",
        "last 20, mean": "0.800",
        "deviation": "0.141",
        "worst seed": "0.700",
        "failed": "0 of 2",
        "largest KL, median": "0.0",
        "worst": "0.800",
        "variation": "0.083",
        "beats appo": "",
        "test, interquartile mean": "0.850 (0.800 to 0.900), n = 2",
    }
    assert (none[2], none[5], none[-1]) == (
        "0.560",
        "1 of 2",
        "0.00 (0.00 to 0.00)".replace("0.00 to 0.00", "0.000 to 0.000"),
    )


def test_a_run_whose_last_prompts_have_no_score_has_failed() -> None:
    lost = record("appo", 3, [*[0.3] * 20, *[None] * 20])
    assert summary([*RUNS, lost], "arm")[1][5] == "1 of 3"


def test_arms_without_training_cannot_fail() -> None:
    frozen = [record("frozen", seed, [0.3] * 40) for seed in range(2)]
    assert summary([*RUNS, *frozen], "arm")[3][5] == ""
    assert plane([*RUNS, *frozen], "arm", "task")[3] == ["frozen", "0.30 (0.30 to 0.30)"]


def test_planes_and_curves_cross_two_axes() -> None:
    other = [record("appo", 0, [0.2] * 40, task="u")]
    assert plane([*RUNS, *other], "arm", "task") == [
        ["arm \\ task", "t", "u"],
        ["appo", "0.80 (0.70 to 0.90), failed: 0 of 2", "0.20 (0.20 to 0.20), failed: 1 of 1"],
        ["none", "0.56 (0.32 to 0.80), failed: 1 of 2", ""],
    ]
    assert over_time(RUNS, "arm", "task", [20, 40])[1] == ["appo", "0.30 / 0.80"]
    stopped = [record("appo", 2, [0.3] * 9, None), record("none", 2, [0.3] * 9, None, task="u")]
    assert on_test([*RUNS, *other, *stopped], "arm", "task")[1:] == [
        ["appo", "**0.850** (0.800 to 0.900; manual 0.450)", "**0.500** (0.400 to 0.600, n = 100; manual 0.450)"],
        ["none", "**0.550** (0.400 to 0.700; manual 0.450)", "(stopped)"],
    ]


def test_a_table_of_test_scores_is_a_picture_too() -> None:
    runs = [*RUNS, record("appo", 0, [0.2] * 40, 0.25, task="u"), record("none", 0, [0.2] * 9, None, task="u")]
    words = "test of arm by task"
    assert scores_on_test(runs, words) == {
        "appo": {"t": pytest.approx(0.85), "u": 0.25},
        "none": {"t": pytest.approx(0.55)},
    }
    assert scores_on_test(runs, f"{words} where arm = none") == {"none": {"t": pytest.approx(0.55)}}
    assert scores_on_test(runs, "plane of arm by task") is None
    texts = [text.text for text in ElementTree.fromstring(drawn(runs, words) or "").iter(f"{SVG}text")]
    assert texts == ["task", "arm", "t", "u", "appo", "0.850", "0.250", "none", "0.550", "score on test, mean of seeds"]
    assert drawn(runs, "summary of arm") is None
    assert drawn(runs[-1:], words) is None  # it was stopped


def test_a_heat_map_is_darker_where_scores_are_higher_and_safe_whatever_settings_are_called() -> None:
    odd = '<b>\x1b[31m & "' + "long" * 20
    picture = ElementTree.fromstring(heat_map("r", "c", {odd: {"x": 0.0, "y": 0.5, "z": 1.0, odd: 1.5}}, "score"))
    cells = [box.get("fill") for box in picture.iter(f"{SVG}rect")][1:]  # the first is the ground
    assert cells == ["#ffffff", "#8ba2be", "#17467c", "#17467c"]
    styles = {text.text: text.get("class") for text in picture.iter(f"{SVG}text")}
    assert (styles["0.500"], styles["1.000"]) == (None, "light")
    assert max(len(text) for text in styles if text) <= 18


def test_a_cell_is_empty_where_a_run_has_no_iteration() -> None:
    manual = [record("manual", seed, [], 0.6) for seed in range(2)]
    row = dict(zip(*(summary([*RUNS, *manual], "arm")[i] for i in (0, 3)), strict=True))
    assert [row[name] for name in ("last 20, mean", "deviation", "worst seed", "failed", "largest KL, median")] == [
        ""
    ] * 5
    assert (row["runs"], row["worst"]) == ("2", "0.600")
    assert plane(manual, "arm", "task")[1] == ["manual", ""]
    assert over_time(manual, "arm", "task", [1, 5])[1] == ["manual", ""]
    short = [record("appo", 0, [0.3]), record("appo", 1, [0.5] * 5)]
    assert over_time(short, "arm", "task", [0, 1, 5, 6])[1] == ["appo", " / 0.40 / 0.50 / "]


def test_the_untrained_agent_is_judged_by_first_iterations_with_its_task_and_models() -> None:
    others = [
        record("appo", 0, [0.9], task="u"),
        *(RUNS[0] | {name: "x", "curve": [0.9]} for name in ("agent", "target")),
    ]
    assert untrained([*RUNS, *others], RUNS[0]) == pytest.approx(0.3)
    assert math.isnan(untrained(RUNS, others[0]))


def test_the_manual_prompt_that_edits_begin_with_is_not_the_untrained_agents() -> None:
    assert untrained([*RUNS, record("edits", 0, [0.9] * 40)], RUNS[0]) == pytest.approx(0.3)


def test_an_agent_that_edits_is_trained_too_and_judged_by_what_it_edited_at_first() -> None:
    editing = [record("appo", seed, [0.6] * 40, mode="tte") | {"arm": "tte"} for seed in range(2)]
    assert summary([*RUNS, *editing], "arm")[1][5] == "2 of 4"
    assert untrained([*RUNS, *editing], RUNS[0]) == pytest.approx(0.3)
    assert untrained([*RUNS, *editing], editing[0]) == pytest.approx(0.6)


def test_nothing_in_a_prompt_controls_the_terminal() -> None:
    assert "*\\x1b[2J Say yes.*" in markdown(view([RUNS[0] | {"prompt": "\x1b[2J\nSay yes."}], "runs of arm"))


def test_tables_with_names_in_any_script_are_pictures_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    runs = [record("appo", 0, [0.5], task=task) for task in ("κ", "λ")]
    cells = [(run["labels"], Cell(str(run["seed"]), build_config({"run": "r"}), [])) for run in runs]
    rows = iter(runs)
    monkeypatch.setattr("experiments.study.record_of", lambda *given: next(rows))
    tables = [f"test of arm by task where task = {task}" for task in ("κ", "λ")]
    show(Study(Path("s.yaml"), "?", [0], [], {}, tables), cells, tmp_path, None)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "test-of-arm-by-task-where-task-κ.svg",
        "test-of-arm-by-task-where-task-λ.svg",
    ]


def test_a_table_without_a_finished_run_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("experiments.study.record_of", lambda *given: RUNS[0])
    cells = [(RUNS[0]["labels"], Cell("0", build_config({"run": "r"}), []))]
    show(Study(Path("s.yaml"), "?", [0], [], {}, ["runs of arm where task = u"]), cells, tmp_path, None)
    assert capsys.readouterr().out == "runs of arm where task = u\n\nnone of its runs is finished\n\n"


def test_a_table_leaves_out_what_it_is_not_asked_for() -> None:
    runs = [*RUNS, record("appo", 0, [0.2] * 40, task="u")]
    assert view(runs, "summary of arm where task = t") == summary(RUNS, "arm")
    assert view(runs, "plane of arm by task where arm = none") == plane(RUNS[2:], "arm", "task")
    assert view(runs, "summary of arm where task = v") == [["arm"]]  # none of its runs is finished yet


def test_a_run_that_was_stopped_has_no_scores_in_its_row() -> None:
    stopped = view([record("appo", 0, [0.3] * 9, None)], "runs of arm")[1]
    assert stopped[-3] == "(stopped after 9)"
    assert summary([record("appo", 0, [0.3] * 9, None)], "arm")[1][-4:] == ["", "", "", ""]


def test_nothing_in_a_prompt_ends_a_cell() -> None:
    assert "| *a / b* |" in markdown(view(RUNS[:1], "runs of arm"))
    assert markdown([["a|b"], ["|"]]) == "| a\\|b |\n|---|\n| \\| |\n"


@pytest.mark.parametrize(
    "words", ["sums of arm", "plane of arm", "curve of arm by task", "summary of lr", "runs of arm where lr = 1"]
)
def test_unknown_tables_are_refused(words: str) -> None:
    with pytest.raises(ValueError, match=words.split(maxsplit=1)[0]):
        view(RUNS, words)


def test_records_come_back_as_written(tmp_path: Path) -> None:
    odd = RUNS[0] | {"prompt": "one\u2028two"}  # str.splitlines would cut the row in two
    (tmp_path / "r.jsonl").write_text(jsonl_of([*RUNS, odd]), encoding="utf-8")
    assert read_jsonl(tmp_path / "r.jsonl") == [*RUNS, odd]
    assert list(by(RUNS, "arm")) == ["appo", "none"]
