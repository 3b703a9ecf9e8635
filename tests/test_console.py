"""The progress of a run: an intact bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.terminal.console import Progress, clip, duration, our_command, stopped

STATS = {"reward_mean": 1.0, "accuracy_mean": 0.5, "kl": 0.1}


class Terminal(io.StringIO):
    """Stands in for a terminal, and keeps what it shows."""

    def isatty(self) -> bool:
        return True

    def lines(self) -> list[str]:
        """The lines on the screen, after carriage returns, line feeds, moves up and erasures."""
        rows, y, x = [""], 0, 0
        for part in re.findall(r"\x1b\[[AJ]|.", self.getvalue(), re.DOTALL):
            if part == "\x1b[A":
                y = max(0, y - 1)
            elif part == "\x1b[J":
                rows[y:] = [rows[y][:x]]
            elif part == "\r":
                x = 0
            elif part == "\n":
                y, x = y + 1, 0
                rows += [""] * (y + 1 - len(rows))
            else:
                rows[y] = rows[y][:x].ljust(x) + part + rows[y][x + 1 :]
                x += 1
        return [row.rstrip() for row in rows]


def on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> Terminal:
    """Called in a test, not as a fixture: pytest sets sys.stderr between the two."""
    found = Terminal()
    monkeypatch.setattr(sys, "stderr", found)
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("LINES", "24")
    return found


def test_the_bar_is_whole_at_the_end_and_nothing_is_left_below_it(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = on_a_terminal(monkeypatch)
    progress = Progress(2)
    for iteration in (1, 2):
        progress.show(iteration, STATS, "best 10.00  Turn it around.")
    assert terminal.lines()[1] == "best 10.00  Turn it around."
    progress.close()
    print("what follows", file=terminal)
    bar, *rest = terminal.lines()
    assert re.fullmatch(r"tuning: 100%\|#+\| 2/2 \[.*accuracy=0\.50, kl=0\.10\]", bar)
    assert rest == ["what follows", ""]


def test_a_printed_line_stands_above_the_bar_after_an_echoed_ctrl_c(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    terminal = on_a_terminal(monkeypatch)
    progress = Progress(4)
    progress.show(1, STATS, "best 1.00  Say yes.")
    terminal.write("^C")
    progress.say("finishing this iteration; press Ctrl-C again to stop at once")
    progress.show(2, STATS, "best 1.00  Say yes.")
    progress.close()
    said, timed, bar, *rest = terminal.lines()
    assert said == "finishing this iteration; press Ctrl-C again to stop at once"
    assert timed.startswith("about ") and timed.endswith(", then the test split")
    assert bar.startswith("tuning:  50%|") and bar.endswith("kl=0.10]")
    assert rest == [""]


def test_what_goes_into_a_file_is_plain_lines(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(5)
    for iteration in range(1, 6):
        progress.show(iteration, STATS, "best 1.00  Say yes.")
    progress.close()
    lines = capsys.readouterr().err.splitlines()
    (timed,) = [line for line in lines if line.startswith("about ")]
    assert re.fullmatch(r"about \d+ s left: 3 iterations of \S+ s, then the test split", timed)
    lines.remove(timed)
    expected = "reward 1.00  accuracy 0.50  kl 0.10  best 1.00  Say yes."
    assert lines == [f"   {n}/5  {expected}" for n in range(1, 6)]


def test_a_prompt_that_quotes_data_cannot_control_the_terminal_either(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(5)
    progress.show(1, STATS, "best 1.00  Say\n\x1b[2J yes.")
    progress.close()
    assert capsys.readouterr().err == "   1/5  reward 1.00  accuracy 0.50  kl 0.10  best 1.00  Say\\n\\x1b[2J yes.\n"


def test_a_quiet_run_shows_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(5, quiet=True)
    for iteration in range(1, 6):
        progress.show(iteration, STATS | {"empty_rate": 1.0})
    progress.close()
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("text", "width", "expected"),
    [
        ("abcdef", 6, "abcdef"),
        ("abcdefg", 6, "abc..."),
        ("abc", 2, ".."),
        ("回答は", 6, "回答は"),  # two columns each
        ("回答はい", 6, "回..."),
    ],
)
def test_a_text_is_cut_to_the_columns_that_it_takes(text: str, width: int, expected: str) -> None:
    assert clip(text, width) == expected


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.4, "0 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (12_000, "3 h 20 min")]
)
def test_a_duration_is_in_the_units_of_people(seconds: float, expected: str) -> None:
    assert duration(seconds) == expected


@pytest.mark.parametrize(
    ("found", "started", "expected"),
    [
        ("/usr/bin/appo", "x/experiments/train.py", "appo train --run 'a b'"),
        (None, ".venv/bin/appo", ".venv/bin/appo train --run 'a b'"),
        (None, "x/experiments/train.py", f"{sys.executable} -m experiments.cli train --run 'a b'"),
    ],
)
def test_a_command_can_be_typed_as_it_is_printed(
    found: str | None, started: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("shutil.which", lambda _: found)
    monkeypatch.setattr("sys.argv", [started])
    assert our_command("train", "--run", "a b") == expected


def test_a_stopped_run_without_a_prompt_says_only_how_to_go_on() -> None:
    assert (
        stopped(Path("r"), Path("r/best_so_far.json"), None)
        == f"to go on: {our_command('train', '--run', 'r', '--resume')}"
    )


def test_a_stopped_run_names_its_best_prompt_with_interval_and_rows() -> None:
    found: dict[str, Any] = {"prompt": "Say yes.", "metric": "accuracy", "validation_rows": 32}
    for name in ("validation", "manual_validation"):
        found |= {f"{name}_score": 0.5, f"{name}_interval": [0.336, 0.664]}
    page = stopped(Path("r"), Path("r/best_so_far.json"), found)
    assert "best prompt so far: Say yes." in page and "32 validation rows" in page
    assert page.count("0.500 (0.336 to 0.664)") == 2
    assert "r/best_so_far.json; it has no test score" in page


def test_a_stopped_run_whose_scores_are_no_numbers_says_so() -> None:
    found: dict[str, Any] = {"prompt": "Say yes.", "metric": "accuracy", "validation_rows": 32}
    for name in ("validation", "manual_validation"):
        found |= {f"{name}_score": None, f"{name}_interval": [None, None]}
    assert "none (none to none)" in stopped(Path("r"), Path("r/best_so_far.json"), found)


def test_a_prompt_is_shown_line_by_line_and_cannot_control_the_terminal() -> None:
    found = {"prompt": "Say yes.\nInput : \x1b[2J Output : yes", "metric": "accuracy", "validation_rows": 32}
    for name in ("validation", "manual_validation"):
        found |= {f"{name}_score": 0.5, f"{name}_interval": [0.336, 0.664]}
    shown = stopped(Path("r"), Path("r/best_so_far.json"), found)
    assert "best prompt so far: Say yes.\nInput : \\x1b[2J Output : yes\n" in shown
