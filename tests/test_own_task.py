"""A user's own task: runs are trained on it, it is edited afterwards, and runs are used with inputs of all kinds."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.evaluate import main as evaluate
from experiments.prompt import main as prompt
from experiments.tasks import main as tasks
from experiments.train import main as train
from tests.test_sources import write

SMALL = ["steps=1", "prompts=2", "examples.shots=2", "examples.pairs=2", "threads=1", "sampling.max_new_tokens=8"]
REVIEWS: dict[str, Any] = {
    "name": "reviews",
    "description": "Is a review friendly?",
    "fields": {"text": ["body"]},
    "label": ["label"],
    "verbalizer": {"bad": "no", "good": "yes"},
    "input": "{text}",
    "files": {"train": ["rows.jsonl"]},
    "manual_prompt": "Is the review friendly?",
}
QUIZ: dict[str, Any] = {
    "name": "quiz",
    "description": "Which is right?",
    "fields": {"question": []},
    "choices": ["opts"],
    "label": ["ans"],
    "input": "{question}\n{choices}",
    "files": {"train": ["rows.jsonl"]},
    "manual_prompt": "Which is right?",
}


def reviews(folder: Path, rows: int = 16, **changes: Any) -> Path:
    """Writes the spec, with changed keys, beside its rows; returns its path."""
    found = [{"body": f"review {i}", "label": ("bad", "good")[i % 2]} for i in range(rows)]
    write(folder / "rows.jsonl", "\n".join(map(json.dumps, found)))
    return write(folder / "reviews.yaml", yaml.safe_dump(REVIEWS | changes, sort_keys=False))


def quiz(folder: Path) -> Path:
    """Writes a task of questions with two choices and one with four; returns the spec's path."""
    rows = [{"question": f"q {i}", "opts": ["x", "y"], "ans": i % 2} for i in range(15)]
    rows += [{"question": "q", "opts": ["x", "y", "z", "w"], "ans": 3}]
    write(folder / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    return write(folder / "quiz.yaml", yaml.safe_dump(QUIZ, sort_keys=False))


def begin(spec: Path, *more: str) -> Path:
    """Trains on the task for a few steps; returns the run's folder."""
    run = spec.parent / "run"
    assert train(["--task", str(spec), "--run", str(run), *SMALL, *more]) == 0
    return run


def test_the_readmes_task_of_ones_own_trains(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    readme = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")
    (spec,) = re.findall(r"```yaml\n(# reviews\.yaml\n.*?)```", readme, re.DOTALL)
    (row,) = re.findall(r"a row such as `(.*?)`", readme)
    write(tmp_path / "reviews.yaml", spec)
    rows = [
        json.loads(row) | {"body": f"They were {word} {i}.", "label": label}
        for word, label in (("kind", "good"), ("rude", "bad"))
        for i in range(8)
    ]
    write(tmp_path / "reviews.jsonl", "\n".join(map(json.dumps, rows)))
    small = ["steps=1", "prompts=2", "examples.shots=2", "threads=1", "sampling.max_new_tokens=8"]
    assert train(["--task", str(tmp_path / "reviews.yaml"), "--run", str(tmp_path / "run"), *small]) == 0
    said = capsys.readouterr().out
    assert "manual prompt" in said and "report:" in said
    assert json.loads((tmp_path / "run" / "best_prompt.json").read_text())["task"] == "reviews"


# -- a task that is edited after the run -------------------------------------------------------------------------

EDITS: list[tuple[Callable[[Path], object], str]] = [
    (lambda folder: reviews(folder, template="{prompt}\n{input}\nAnswer :"), "template"),
    (lambda folder: reviews(folder, manual_prompt="Friendly?"), "manual prompt"),
    (lambda folder: reviews(folder, verbalizer={"bad": "never", "good": "yes"}), "label words"),
    (lambda folder: reviews(folder, rows=15), "test rows"),
]
HARMLESS: list[Callable[[Path], object]] = [
    lambda folder: reviews(folder, description="another"),
    lambda folder: reviews(folder, fields={"text": ["body", "review"]}),
]


@pytest.mark.parametrize(("edit", "part"), EDITS)
def test_resuming_an_edited_task_is_refused_by_what_changed(
    edit: Callable[[Path], object], part: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(reviews(tmp_path))
    edit(tmp_path)
    before = (run / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert train(["--run", str(run), "--resume", "--steps", "2"]) == 2
    message = capsys.readouterr().err
    assert "the data are not those that the run was begun with; changed: " in message and part in message
    assert (run / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("edit", HARMLESS)
def test_resuming_takes_an_edit_that_changes_no_number(edit: Callable[[Path], object], tmp_path: Path) -> None:
    run = begin(reviews(tmp_path))
    edit(tmp_path)
    assert train(["--run", str(run), "--resume", "--steps", "2"]) == 0


def test_using_a_run_says_what_changed_since(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = begin(reviews(tmp_path))
    commands: list[tuple[Callable[[list[str]], int], list[str]]] = [(evaluate, []), (prompt, ["--input", "review"])]
    for command, arguments in commands:
        capsys.readouterr()
        assert command(["--run", str(run), *arguments]) == 0
        output = capsys.readouterr()
        assert "changed" not in output.err and "None" not in output.out
    assert json.loads((run / "evaluation.json").read_text())["changed"] is None
    for edit, part in EDITS:
        edit(tmp_path)
        for command, arguments in commands:
            assert command(["--run", str(run), *arguments]) == 0
            note = capsys.readouterr().err
            assert "note: the task has changed since the run: " in note and part in note
        assert part in json.loads((run / "evaluation.json").read_text())["changed"]


# -- inputs ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answered(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A finished run on each task, and one in mode tte."""
    spec = reviews(tmp_path_factory.mktemp("tte"))
    return {
        "quiz": begin(quiz(tmp_path_factory.mktemp("quiz"))),
        "reviews": begin(reviews(tmp_path_factory.mktemp("reviews"))),
        "tte": begin(spec, "mode=tte", "examples.batch_size=2"),
    }


@pytest.mark.parametrize(
    ("choices", "letters"), [("(A) x\n(B) y", ["A", "B"]), ("(A) x\n(B) y\n(C) z", ["A", "B", "C"])]
)
def test_only_letters_that_a_question_offers_have_a_probability(
    choices: str, letters: list[str], answered: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write(tmp_path / "a.jsonl", json.dumps({"input": f"q of\n(A) and\n(B)?\n{choices}"}))
    assert prompt(["--run", str(answered["quiz"]), "--file", str(file), "--answer"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert list(row["probabilities"]) == letters and row["answer"] in letters
    assert sum(row["probabilities"].values()) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("text", "fragment"),
    [
        ("q", "offers 0 choices, in lines (A), (B), ...; expected 2 to 4"),
        (r"q\n(A) x", "offers 0 choices"),
        (r"q\n(A) x\n(C) y", "offers 0 choices"),
        (r"q\n(A) x\n(B) y\n(C) z\n(D) w\n(E) v", "offers 5 choices, in lines"),
    ],
)
def test_a_question_without_choices_is_refused(
    text: str, fragment: str, answered: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert prompt(["--run", str(answered["quiz"]), "--input", text, "--answer"]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: the input 'q") and fragment in message and message.count("\n") == 1


@pytest.mark.parametrize("command", [["--input", "word " * 2000], ["--input", "word " * 2000, "--answer"]])
def test_an_input_too_long_for_the_agent_is_refused_before_any_work(
    command: list[str], answered: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert prompt(["--run", str(answered["tte"]), *command]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("error: ") and "context" in captured.err and "1024" in captured.err


@pytest.mark.parametrize("suffix", ["csv", "tsv", "json", "jsonl", "CSV"])
def test_inputs_are_read_from_files_of_rows(
    suffix: str, answered: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = {
        "csv": 'id,input\n1,"a, b"\n2,c\n',
        "tsv": "id\tinput\n1\ta, b\n2\tc\n",
        "json": '[{"input": "a, b"}, {"input": "c"}]',
    }
    rows = '{"input": "a, b"}\n{"input": "c"}\n'
    path = write(tmp_path / f"a.{suffix}", content.get(suffix.lower(), rows))
    assert prompt(["--run", str(answered["reviews"]), "--file", str(path)]) == 0
    assert [json.loads(line)["input"] for line in capsys.readouterr().out.splitlines()] == ["a, b", "c"]


@pytest.mark.parametrize(
    ("name", "content", "fragment"),
    [
        ("a.csv", "body,label\nkind,good\n", "a.csv:2: no column 'input'; the columns are body, label"),
        ("a.jsonl", '{"input": ""}\n', "a.jsonl:1: field 'input' is ''"),
        ("a.jsonl", '{"input": "\\ud800"}\n', "a.jsonl:1: field 'input'"),
        ("a.txt", b"caf\xe9\n", "a.txt: not UTF-8 at byte 3"),
        ("a.txt", "\n" + "a" * 10**7, "a.txt:2: field 'input' has 10000000 characters"),
    ],
)
def test_a_file_without_inputs_is_refused(
    name: str,
    content: str | bytes,
    fragment: str,
    answered: dict[str, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert prompt(["--run", str(answered["reviews"]), "--file", str(write(tmp_path / name, content))]) == 2
    message = capsys.readouterr().err
    assert fragment in message and message.startswith("error: ") and message.count("\n") == 1


def test_an_input_per_line_may_hold_unicodes_own_line_ends(
    answered: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.txt", "\ufeffone\u2028still one\r\ntwo\n")
    assert prompt(["--run", str(answered["reviews"]), "--file", str(path)]) == 0
    rows = capsys.readouterr().out.split("\n")[:-1]
    assert [json.loads(row)["input"] for row in rows] == ["one\u2028still one", "two"]


# -- what a terminal shows ---------------------------------------------------------------------------------------


def test_no_escape_sequence_of_the_data_reaches_the_terminal(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spec = reviews(tmp_path, description="\x1b[31mred", manual_prompt="a\x1b]0;b\x07\u202e {input}")
    rows = [{"body": f"\x1b[2J{i}\x9b2J", "label": ("bad", "good")[i % 2]} for i in range(99)]
    write(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    assert tasks(["--show", str(spec)]) == 0
    page = capsys.readouterr().out
    assert all(line.isprintable() for line in page.splitlines())
    assert r"\x1b[2J" in page and r"a\x1b]0;b\x07\u202e {input} Input : \x1b[2J" in page


@pytest.mark.parametrize("form", ["--input", "--file"])
def test_no_escape_sequence_of_an_input_or_an_answer_reaches_the_terminal(
    form: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin(reviews(tmp_path, verbalizer={"bad": "n\x9bo", "good": "yes"}))
    text = "\x9b2J\u202eé"
    given = str(write(tmp_path / "a.txt", text)) if form == "--file" else text
    capsys.readouterr()
    assert prompt(["--run", str(run), form, given, "--answer"]) == 0
    page = capsys.readouterr().out
    assert all(line.isprintable() for line in page.splitlines())
    if form == "--file":
        assert json.loads(page)["input"] == text


def test_too_few_rows_name_the_key_that_asks_for_fewer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train(["--task", str(reviews(tmp_path)), "--run", str(tmp_path / "run")]) == 2
    assert "16 shots need 16; ask for fewer with examples.shots" in capsys.readouterr().err
