"""`appo tasks`: the list, one task, and the check of a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from experiments.tasks import main
from tasks.catalogue import task_names
from tests.test_formats import bigbench
from tests.test_sources import REAL, sst2_folder


def named(page: str) -> list[str]:
    """The tasks of the list: the first words of its indented lines, without the headings."""
    words = [line.split()[0] for line in page.splitlines() if line.startswith("  ")]
    return [word for word in words if word != "task"]


def test_the_list_names_every_task(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--all"]) == 0
    assert sorted(named(capsys.readouterr().out)) == task_names()


def test_the_list_fits_on_a_terminal_and_has_one_line_for_mmlu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    page = capsys.readouterr().out
    assert max(map(len, page.splitlines())) <= 100
    assert sorted(named(page)) == sorted([*(n for n in task_names() if not n.startswith("mmlu/")), "mmlu/<subject>:"])
    assert "mmlu/<subject>: 57 tasks, see appo tasks --all" in page


@pytest.mark.parametrize("name", ["mnli", "antonyms", "openbookqa"])
def test_show_fills_an_example_of_the_lab(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--show", name]) == 0
    page = capsys.readouterr().out
    assert "sizes " in page and "Output : [" in page and "The instruction was :" in page


def test_show_of_a_task_without_data_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--show", "agnews"]) == 0
    assert "no data here: agnews: no train file in" in capsys.readouterr().out


def test_show_of_an_unknown_task_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--show", "mnIi"]) == 2
    assert "did you mean 'mnli'?" in capsys.readouterr().err


def test_few_rows_are_shown_if_fewer_are_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--show", "sst2", "--data", str(sst2_folder(tmp_path / "sst2", train=8))]
    assert main(words) == 2
    assert capsys.readouterr().err.endswith("16 shots need 16; ask for fewer with --shots\n")
    assert main([*words, "--shots", "4"]) == 0
    assert "sizes     8 train, 8 validation, 4 test" in capsys.readouterr().out
    assert main(["--check", "--data", str(tmp_path), "--shots", "4"]) == 0
    assert main([*words, "--shots", "0"]) == 2
    assert capsys.readouterr().err == "error: --shots is 0; expected at least 1\n"


def test_check_stops_at_a_file_that_is_not_as_it_should_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [{"input": f"w{i}", "target": f"a{i}"} for i in range(9)]
    bigbench(tmp_path, "word_sorting", rows)
    bigbench(tmp_path, "word_unscrambling", [*rows, {"input": "w"}])
    assert main(["--check", "--data", str(tmp_path)]) == 2
    captured = capsys.readouterr()
    assert "word_sorting " in captured.out
    assert captured.err.startswith("error: word_unscrambling: ")
    assert "task.json:10: no column 'target'" in captured.err


@pytest.mark.skipif(not REAL.is_dir(), reason="the real data files are not at hand")
def test_all_real_files_load(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--check", "--data", str(REAL)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert int(lines[-1].split()[0]) >= 60
