"""Compares APPO with best-of-N sampling at the same number of scored prompts, over seeds.

    appo compare --task mnli --seeds 0 1 2 3 4
    appo compare --task mnli --arms anchor initial previous none best-of-n

The arms are the four references of the KL penalty (anchor is APPO, initial is RLHF-style PPO, previous is plain
PPO, none has no penalty), best-of-n, which never updates the agent, and test-time editing with the trained agent (tte)
or the untrained one (tte-untrained). Prints a table in Markdown.
"""

from __future__ import annotations

import math
import sys
import time
from argparse import Namespace
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from appo.trainer import DivergedError
from experiments.config import build_config
from experiments.run.folder import read_jsonl
from experiments.run.run import prepare
from experiments.terminal.command import UNSOUND, Parser, UsageError, in_order, one_line
from experiments.train import train

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
        "seconds": time.perf_counter() - started,
        "prompts": len(read_jsonl(run.folder.path / "prompts.jsonl")),
    }


def parse_args(argv: Sequence[str]) -> Namespace:
    """Task, seeds, arms, folder and assignments of a comparison."""
    parser = Parser(prog="appo compare", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--task", default="mnli")
    parser.add_argument("--seeds", nargs="+", action="append", help="default: 0 1 2 3 4")
    parser.add_argument("--arms", nargs="+", action="append", help=f"of {', '.join(ARMS)} (default: anchor best-of-n)")
    parser.add_argument("--folder", type=Path, help="folder of the runs (default: runs/compare-DATE-TIME)")
    parser.add_argument("assignments", nargs="*", metavar="key=value", help="sets a configuration field of every run")
    options = parser.parse_intermixed_args(argv)
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


@in_order
def main(argv: Sequence[str]) -> int:
    """Runs all arms on all seeds and prints a row for each, then the means; returns the exit code.

    A run that diverges is a row without numbers, and the others go on.
    """
    options = parse_args(argv)
    folder = options.folder or Path(f"runs/compare-{datetime.now():%Y%m%d-%H%M%S}")
    print("| arm | seed | prompts | first 20 | last 20 | validation | test | manual, test | top 5 on test | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|", flush=True)
    code = 0
    for arm in options.arms:
        found = []
        for seed in options.seeds:
            try:
                result = run_arm(arm, options.task, seed, folder, options.assignments)
            except (DivergedError, FloatingPointError) as error:
                code = UNSOUND
                print(f"error: {arm}, seed {seed}: {one_line(error)}", file=sys.stderr)
                print(f"| {arm} | {seed} | | | | diverged | | | | |", flush=True)
                continue
            found.append([result[column] for column in COLUMNS])
            cells = " | ".join(f"{value:.3f}" for value in found[-1])
            print(f"| {arm} | {seed} | {result['prompts']} | {cells} | {result['seconds']:.0f} |", flush=True)
        means = " | ".join(f"{sum(column) / len(column):.3f}" for column in zip(*found, strict=True))
        if found:
            print(f"| **{arm}** | mean | | {means} | |", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
