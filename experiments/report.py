"""Rebuilds report.html, a run at a glance: one file that opens offline and loads nothing.

appo report runs/mnli-20260101-120000-0
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments.page.run_page import render_report
from experiments.run.folder import CONFIG, METRICS, RunFolder, RunFolderError, read_optional
from experiments.terminal.command import Parser, in_order
from tasks.catalogue import METRICS as TASK_METRICS


@in_order
def main(argv: Sequence[str]) -> int:
    """Rebuilds the report of a run and prints its path; returns the exit code."""
    parser = Parser(prog="appo report", description="Rebuilds the report.html of a run, finished or not.")
    parser.add_argument("run", type=Path, help="the run's folder")
    folder = parser.parse_args(argv).run
    if not (folder / CONFIG).is_file():
        raise RunFolderError(f"{str(folder)!r} holds no {CONFIG}; expected the folder of a run")
    columns = {column for row in read_optional(folder / METRICS) for column in row}
    metric = next((name for name in TASK_METRICS if f"{name}_mean" in columns), "accuracy")
    RunFolder(folder, new=False).write_text("report.html", render_report(folder, metric))
    print(folder / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
