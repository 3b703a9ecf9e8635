"""Compares APPO with best-of-N sampling at the same number of scored prompts, over seeds; or runs that exist.

    appo compare --task mnli --seeds 0 1 2 3 4
    appo compare --task mnli --arms anchor initial previous none best-of-n
    appo compare --runs runs/mnli-* --out results.csv --page comparison.html

The arms are the four references of the KL penalty (anchor is APPO, initial is RLHF-style PPO, previous is plain
PPO, none has no penalty), best-of-n, which never updates the agent, and test-time editing with the trained agent (tte)
or the untrained one (tte-untrained). Prints a table in Markdown. --out also writes a CSV file with a row for each run,
--page a page with curves and intervals.
"""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from experiments.config import build_config
from experiments.diagnostics.results import RunRow, grouped, read_row, scored, write_csv
from experiments.page.comparison import render_comparison
from experiments.run.files import write_whole
from experiments.run.folder import read_jsonl
from experiments.terminal.command import UNSOUND, Parser, UsageError, in_order, one_line
from experiments.terminal.signals import ending_at_once
from experiments.train import train
from tasks.errors import printable

ARMS = {
    "anchor": ["appo.reference=anchor"],
    "initial": ["appo.reference=initial"],
    "previous": ["appo.reference=previous"],
    "none": ["appo.reference=none"],
    "best-of-n": ["frozen=true"],
    "tte": ["mode=tte"],
    "tte-untrained": ["mode=tte", "frozen=true", "steps=1"],
}
EDGE = 20  # iterations averaged at the beginning and at the end of a run
COLUMNS = ("first", "last", "validation_score", "test_score", "manual_test_score", "top")


def run_arm(arm: str, task: str, seed: int, folder: Path, assignments: Sequence[str]) -> dict[str, Any]:
    """Runs one arm; returns its result with the mean scores of sampled prompts in the first and last iterations."""
    from experiments.run.run import prepare

    started = time.perf_counter()
    options = {"task": task, "seed": seed, "run": str(folder / f"{arm}-{seed}")}
    run = prepare(build_config(options, assignments=[*assignments, *ARMS[arm]]))
    with run.folder.lock():
        result = train(run, quiet=True)
    rows = read_jsonl(run.folder.path / "metrics.jsonl")
    scores = [math.nan if (score := row[f"{result['metric']}_mean"]) is None else score for row in rows]
    return result | {
        "first": sum(scores[:EDGE]) / len(scores[:EDGE]),
        "last": sum(scores[-EDGE:]) / len(scores[-EDGE:]),
        "top": result.get("paper_protocol", {}).get("test_score", math.nan),  # mode tte has none
        "top_interval": result.get("paper_protocol", {}).get("test_interval"),
        "seconds": time.perf_counter() - started,
        "prompts": len(read_jsonl(run.folder.path / "prompts.jsonl")),
    }


def parse_args(argv: Sequence[str]) -> Namespace:
    """What to compare: runs that exist; or task, seeds, arms, folder and assignments of runs to be made."""
    parser = Parser("appo compare", __doc__)
    parser.add_argument("--runs", nargs="+", type=Path, metavar="DIR", help="folders of runs to show, finished or not")
    parser.add_argument("--separate", action="store_true", help="--runs of several tasks: a table for each")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the rows as CSV too, as in results.csv")
    parser.add_argument("--page", type=Path, metavar="FILE", help="draw a page too, as in comparison.html")
    parser.add_argument("--task", help="default: mnli")
    parser.add_argument("--seeds", nargs="+", action="append", help="default: 0 1 2 3 4")
    parser.add_argument("--arms", nargs="+", action="append", help=f"of {', '.join(ARMS)} (default: anchor best-of-n)")
    parser.add_argument("--folder", type=Path, help="folder of the runs (default: runs/compare-DATE-TIME)")
    parser.add_argument("assignments", nargs="*", metavar="key=value", help="sets a configuration field of every run")
    options = parser.parse_intermixed_args(argv)
    if options.runs and any((options.task, options.seeds, options.arms, options.folder, options.assignments)):
        raise UsageError("--runs shows runs that exist; it goes with --separate, --out and --page only")
    if options.separate and not options.runs:
        raise UsageError("--separate goes with --runs only")
    if options.separate and options.page:
        raise UsageError("--page shows runs of one test; leave out --separate")
    options.task = options.task or "mnli"
    for name, default in (("seeds", ["0", "1", "2", "3", "4"]), ("arms", ["anchor", "best-of-n"])):
        given = getattr(options, name) or [default]  # nargs="+" takes every word that follows, assignments too
        options.assignments += [word for words in given for word in words if "=" in word]
        setattr(options, name, [word for word in given[-1] if "=" not in word])
    for word in options.seeds:
        if not word.isdecimal():
            raise UsageError(f"--seeds: {word!r} is no seed; expected whole numbers")
    for word in options.arms:
        if word not in ARMS:
            raise UsageError(f"--arms: unknown arm {word!r}; expected {', '.join(ARMS)}")
    options.seeds = list(map(int, options.seeds))
    return options


def show(rows: Sequence[RunRow]) -> None:
    """Prints a table of runs in Markdown."""
    print("| run | task | arm | agent | target | seed | steps | test | manual, test | verdict |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        best = scored(row.test_score, row.test_low, row.test_high, row.test_rows)
        manual = scored(row.manual_test_score, row.manual_test_low, row.manual_test_high, row.test_rows)
        described = (row.run, row.task, row.arm, row.agent, row.target, row.seed, row.steps, best, manual, row.verdict)
        print("| " + " | ".join(printable(str(cell)).replace("|", "\\|") for cell in described) + " |")


def _cell(result: Mapping[str, Any], column: str) -> str:
    """A score of a run, with its interval and number of rows if it has any."""
    ends = result.get(f"{column.removesuffix('_score')}_interval")
    if ends is None:
        return f"{result[column]:.3f}"
    low, high = ends
    return scored(result[column], low, high, result["validation_rows" if "validation" in column else "test_rows"])


def compare_runs(folders: Sequence[Path], separate: bool) -> list[RunRow]:
    """Prints a table of runs that exist, or one for each task and test split; returns the rows.

    Raises:
        UsageError: the runs were not scored on the same test, and are not to be separate.
    """
    rows = [read_row(folder) for folder in folders]
    groups = grouped(rows)
    if len(groups) > 1 and not separate:
        one, other = groups[0][0], groups[1][0]
        what = f"another task ({other.task})" if one.task != other.task else "another test split or template"
        raise UsageError(f"{other.run} has {what} than {one.run}; --separate shows each in a table of its own")
    for number, group in enumerate(groups if separate else [rows]):
        if number:
            print()
        show(group)
    return rows


@in_order
def main(argv: Sequence[str]) -> int:
    """Shows runs that exist, or makes them and shows their scores; returns the exit code."""
    options = parse_args(argv)
    if not options.runs:
        return compare_arms(options)
    rows = compare_runs(options.runs, options.separate)
    keep(rows, options)
    return 0


def keep(rows: Sequence[RunRow], options: Namespace) -> None:
    """Writes the rows as CSV and as a page, where asked for."""
    if options.out:
        write_csv(options.out, rows)
    if options.page:
        write_whole(options.page, render_comparison(rows))


def compare_arms(options: Namespace) -> int:
    """Runs all arms on all seeds and prints a row for each, then the means; returns the exit code.

    A run that diverges is a row without numbers, and the others go on.
    """
    with ending_at_once():
        from appo.trainer import DivergedError  # takes seconds to load
    folder = options.folder or Path(f"runs/compare-{datetime.now():%Y%m%d-%H%M%S}")
    print("| arm | seed | prompts | first 20 | last 20 | validation | test | manual, test | top 5 on test | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    code, made = 0, list[Path]()
    for arm in options.arms:
        found = []
        for seed in options.seeds:
            made.append(folder / f"{arm}-{seed}")
            try:
                result = run_arm(arm, options.task, seed, folder, options.assignments)
                found.append([result[column] for column in COLUMNS])
                cells = " | ".join(_cell(result, column) for column in COLUMNS)
                line = f"| {arm} | {seed} | {result['prompts']} | {cells} | {result['seconds']:.0f} |"
            except (DivergedError, FloatingPointError) as error:
                code = UNSOUND
                print(f"error: {arm}, seed {seed}: {one_line(error)}", file=sys.stderr)
                line = f"| {arm} | {seed} | | | | diverged | | | | |"
            print(line, flush=True)
            if options.out or options.page:  # after each run: a stop loses none
                keep([read_row(run) for run in made], options)
        means = " | ".join(f"{sum(column) / len(column):.3f}" for column in zip(*found, strict=True))
        if found:
            print(f"| **{arm}** | mean | | {means} | |", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
