"""The Makefile's targets become the commands that the README promises."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def printed(*arguments: str) -> str:
    """What make would run."""
    command = ["make", "--dry-run", "--no-print-directory", "--assume-old=ready", "READY=ready", "BIN=bin", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["train"], "bin/appo train"),
        (["train", "TASK=rte", "MODE=tte", "STEPS=3"], 'bin/appo train --task "rte" --mode "tte" --steps "3"'),
        (["train", "RUN=r", "RESUME=1"], 'bin/appo train --run "r" --resume'),  # whatever its task
        (["train", "RUN=a b", "ARGS=steps=2"], 'bin/appo train --run "a b" steps=2'),
        (["tasks", "SHOW=mnli"], 'bin/appo tasks --show "mnli"'),
        (["compare", "SEEDS=0", "ARGS=steps=2"], "bin/appo compare --seeds 0 steps=2"),
        (["compare"], "bin/appo compare --seeds 0-4"),
        (
            ["compare", "TASK=rte", "AGENT=a", "TARGET=b", "DATA=d", "STEPS=2"],
            'bin/appo compare --task "rte" --seeds 0-4 "agent=a" "target=b" "data=d" "steps=2"',
        ),
        (["plan", "MODE=tte", "STEPS=5"], 'bin/appo plan --mode "tte" --steps "5"'),
        (["grid", "DATA=d", "SEEDS=0"], 'bin/appo study grid --seeds 0 "data=d"'),
        (["ablate"], "bin/appo study ablate"),  # the study has its own seeds
        (["ablate", "SEEDS=1 3", "DRY=1"], "bin/appo study ablate --seeds 1 3 --dry"),
        (["ablate", "SEEDS=0-2", "ARGS=steps=5"], "bin/appo study ablate --seeds 0-2 steps=5"),
        (["grid", "REAL=1", "DATA=x", "SEEDS=0"], 'bin/appo study grid-real --seeds 0 "data=x"'),
        (
            ["compare", "ARMS=appo ppo", "SEEDS=0-9", "FOLDER=runs/a", "JOBS=2"],
            'bin/appo compare --arms "appo ppo" --seeds 0-9 --folder "runs/a" --jobs 2',
        ),
    ],
)
def test_a_target_becomes_a_command(arguments: list[str], command: str) -> None:
    assert " ".join(printed(*arguments).split()) == command


def test_where_there_is_no_python_one_line_says_so(tmp_path: Path) -> None:
    command = ["make", "setup", f"VENV={tmp_path / 'venv'}", "PYTHON=no-such-python"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: no Python from 3.11 on") and "PYTHON=" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_without_mkdocs_one_line_says_so(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\n[ "$1" != -c ]\n', encoding="utf-8")  # imports nothing
    python.chmod(0o755)
    command = ["make", "docs", "--assume-old=ready", "READY=ready", f"BIN={tmp_path}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: the site needs mkdocs: ") and "'.[docs]'" in done.stderr
