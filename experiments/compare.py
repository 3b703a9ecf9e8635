"""Compares ways to tune a prompt under one budget of scored prompts, over seeds; or runs that exist.

    appo compare --task mnli --seeds 0-4
    appo compare --task mnli --arms "appo ppo rlhf none frozen" --seeds 0-9 --folder runs/mnli --jobs 2
    appo compare --runs runs/mnli-* --out results.csv --page comparison.html

The arms are those of the key `arm` (docs/arms.md), and test-time editing with the trained agent (tte) or the untrained
one (tte-untrained). Prints tables in Markdown. --out also writes a CSV file with a row for each run, --page a page with
curves and intervals. With the --folder of an earlier call, finished runs are taken as they are and stopped ones resume.
"""

from __future__ import annotations

import math
import sys
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, get_args

from experiments.config import GIVEN, ArmName, build_config
from experiments.diagnostics.records import mean
from experiments.diagnostics.results import RunRow, grouped, read_row, scored, write_csv
from experiments.diagnostics.tables import markdown
from experiments.page.comparison import render_comparison, summaries
from experiments.run.files import write_whole
from experiments.run.folder import METRICS, PROMPTS, read_optional, read_result
from experiments.terminal.command import Parser, UsageError, in_order, new_file
from experiments.tuning.cells import OWN, Cell, check_assignments, make, seeds_of
from tasks.errors import printable

ARMS = {
    **{arm: [f"arm={arm}"] for arm in get_args(ArmName)},
    "tte": ["mode=tte"],
    "tte-untrained": ["mode=tte", "arm=frozen", "steps=1"],
}
SEEDS, COMPARED = "0-4", "appo frozen"  # by default
EDGE = 20  # iterations averaged at the beginning and at the end of a run
HEADER = (
    *("arm", "seed", "prompts", "answers", "first 20", "last 20", "validation", "test", "manual, test"),
    *("top 5 on test", "seconds"),
)
COLUMNS = ("first", "last", "validation_score", "test_score", "manual_test_score", "top")


def cells_of(options: Namespace) -> list[Cell]:
    """The runs to be made, by arm and seed.

    Raises:
        ConfigError: one of them cannot be.
    """
    folder = options.folder or Path(f"runs/compare-{datetime.now():%Y%m%d-%H%M%S}")
    alone = ["threads=1"] if options.jobs > 1 else []
    found = []
    for arm in options.arms:
        for seed in options.seeds:
            given = {"task": options.task, "seed": seed, "run": str(folder / f"{arm}-{seed}")}
            assignments = [*alone, *options.assignments, *ARMS[arm]]
            config = build_config(given, assignments=assignments)
            words = [word for name, value in given.items() for word in (f"--{name}", str(value))]
            found.append(Cell(f"{arm}, seed {seed}", config, [*words, *assignments]))
    return found


def measured(cell: Cell) -> dict[str, Any]:
    """The result of a finished run with the mean scores of sampled prompts in its first and last iterations."""
    result, rows = read_result(cell.folder), read_optional(cell.folder / METRICS)
    ranked = (cell.config.arm not in GIVEN and result.get("paper_protocol")) or {}  # only runs that were asked for it
    scores = [math.nan if (score := row[f"{result['metric']}_mean"]) is None else score for row in rows]
    return result | {
        "first": mean(scores[:EDGE]),
        "last": mean(scores[-EDGE:]),
        "top": ranked.get("test_score", math.nan),
        "top_interval": ranked.get("test_interval"),
        "seconds": sum(row["seconds"] for row in rows),
        "prompts": len(read_optional(cell.folder / PROMPTS)),
        "answers": sum(row["answers"] for row in rows),
    }


def parse_args(argv: Sequence[str]) -> Namespace:
    """What to compare: runs that exist; or task, seeds, arms, folder and assignments of runs to be made."""
    parser = Parser("appo compare", __doc__)
    parser.add_argument("--runs", nargs="+", type=Path, metavar="DIR", help="folders of runs to show, finished or not")
    parser.add_argument("--separate", action="store_true", help="--runs of several tasks: a table for each")
    parser.add_argument("--out", type=new_file, metavar="FILE", help="write the rows as CSV too, as in results.csv")
    parser.add_argument("--page", type=new_file, metavar="FILE", help="draw a page too, as in comparison.html")
    parser.add_argument("--task", help="default: mnli")
    parser.add_argument("--seeds", nargs="+", action="append", help=f"such as 0 1 5-9 (default: {SEEDS})")
    parser.add_argument("--arms", nargs="+", action="append", help=f"of {', '.join(ARMS)} (default: {COMPARED})")
    parser.add_argument("--folder", type=Path, help="folder of the runs (default: runs/compare-DATE-TIME)")
    parser.add_argument("--jobs", type=int, help="runs at a time, in processes of one thread each (default: 1)")
    parser.add_argument("assignments", nargs="*", metavar="key=value", help="sets a configuration field of every run")
    options = parser.parse_mixed(argv, "seeds", "arms")
    made = (options.task, options.seeds, options.arms, options.folder, options.jobs, options.assignments)
    if options.runs and any(made):
        raise UsageError("--runs shows runs that exist; it goes with --separate, --out and --page only")
    if options.separate and not options.runs:
        raise UsageError("--separate goes with --runs only")
    if options.separate and options.page:
        raise UsageError("--page shows runs of one test; leave out --separate")
    options.task = options.task or "mnli"
    options.jobs = 1 if options.jobs is None else options.jobs
    if options.jobs < 1:
        raise UsageError(f"--jobs is {options.jobs}; expected at least 1")
    check_assignments(options.assignments, OWN)
    options.seeds = seeds_of(options.seeds or [SEEDS])
    options.arms = list(dict.fromkeys(options.arms or COMPARED.split()))
    for word in options.arms:
        if word not in ARMS:
            raise UsageError(f"--arms: unknown arm {word!r}; expected {', '.join(ARMS)}")
    return options


def show(rows: Sequence[RunRow]) -> None:
    """Prints a table of runs in Markdown."""
    listed = [["run", "task", "arm", "agent", "target", "seed", "steps", "test", "manual, test", "verdict"]]
    for row in rows:
        best = scored(row.test_score, row.test_low, row.test_high, row.test_rows)
        manual = scored(row.manual_test_score, row.manual_test_low, row.manual_test_high, row.test_rows)
        described = (row.run, row.task, row.arm, row.agent, row.target, row.seed, row.steps, best, manual, row.verdict)
        listed.append([printable(str(cell)) for cell in described])
    print(markdown(listed), end="")


def _cell(result: Mapping[str, Any], column: str) -> str:
    """A score of a run, with its interval and number of rows if it has any."""
    ends = result.get(f"{column.removesuffix('_score')}_interval")
    if ends is None:
        return "" if math.isnan(result[column]) else f"{result[column]:.3f}"
    low, high = ends
    return scored(result[column], low, high, result["validation_rows" if "validation" in column else "test_rows"])


def compare_runs(folders: Sequence[Path], separate: bool) -> list[RunRow]:
    """Prints a table of runs that exist, or one for each task and test split; returns the rows.

    Raises:
        UsageError: the runs were not scored on the same test, and are not to be separate.
    """
    named = {folder.resolve(): folder for folder in folders if not folder.is_file()}  # `*` matches the logs beside runs
    if not named:
        raise UsageError(f"--runs names no folder: {str(folders[0])!r} is a file; expected folders of runs")
    rows = [read_row(folder) for folder in named.values()]
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


def _lines(cells: Sequence[Cell], codes: Mapping[str, int]) -> Iterator[str]:
    """The table of runs, in order: "" wherever the next run is not done yet, that is, not in `codes`."""
    yield f"| {' | '.join(HEADER)} |"
    yield "|---" * len(HEADER) + "|"
    found: list[list[float]] = []
    for number, cell in enumerate(cells):
        while cell.name not in codes:
            yield ""
        arm, seed = cell.folder.name.rsplit("-", 1)
        if codes[cell.name]:
            yield f"| {arm} | {seed} | | | | | failed | | | | |"
        else:
            result = measured(cell)
            numbers = " | ".join(_cell(result, column) for column in COLUMNS)
            found.append([math.nan if result[column] is None else result[column] for column in COLUMNS])
            cost = f"{result['prompts']} | {result['answers']:.0f}"
            yield f"| {arm} | {seed} | {cost} | {numbers} | {result['seconds']:.0f} |"
        if found and (number + 1 == len(cells) or cells[number + 1].folder.name.rsplit("-", 1)[0] != arm):
            means = " | ".join(_cell({"mean": mean(column)}, "mean") for column in zip(*found, strict=True))
            yield f"| **{arm}** | mean | | | {means} | |"
            found = []


def compare_arms(options: Namespace) -> int:
    """Makes the runs of all arms and seeds and prints a row for each, then one for each arm; returns the exit code.

    A run that diverges or fails is a row without numbers, and the others go on.
    """
    cells, codes = cells_of(options), dict[str, int]()
    lines = _lines(cells, codes)
    print(*(next(lines) for _ in range(2)), sep="\n", flush=True)
    for cell, code, error in make(cells, options.jobs):
        codes[cell.name] = code
        if code:
            print(f"error: {cell.name}: {error}", file=sys.stderr)
        for line in lines:
            if not line:
                break
            print(line, flush=True)
        if options.out or options.page:  # after each run: a stop loses none
            keep([read_row(other.folder) for other in cells if other.begun], options)
    header, rows = summaries([read_row(cell.folder) for cell in cells if not codes[cell.name]])
    if rows:
        print(f"\n{markdown([header, *rows])}", end="")
    return max(codes.values())


if __name__ == "__main__":
    sys.exit(main())
