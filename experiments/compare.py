"""What is the RL for? APPO against best-of-N sampling at the same number of scored prompts, over seeds.

    python -m experiments.compare --task mnli --seeds 0 1 2 3 4
    python -m experiments.compare --task mnli --arms anchor initial previous none best-of-n

The arms are the four references of the KL penalty (anchor is APPO, initial is RLHF-style PPO, previous is plain
PPO, none has no penalty), best-of-n, which never updates the agent, and test-time editing, with the trained (tte) and
the untrained agent. Prints a table in Markdown.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from experiments.config import build_config
from experiments.runlog import read_jsonl
from experiments.session import prepare
from experiments.train import USER_ERRORS, train

ARMS = {
    "anchor": ["appo.reference=anchor"],
    "initial": ["appo.reference=initial"],
    "previous": ["appo.reference=previous"],
    "none": ["appo.reference=none"],
    "best-of-n": ["frozen=true"],
    "tte": ["mode=tte"],
    "tte-untrained": ["mode=tte", "frozen=true", "steps=1"],
}
EDGE = 20  # iterations at either end whose mean accuracies are compared


def run_arm(arm: str, task: str, seed: int, folder: Path, assignments: Sequence[str]) -> dict[str, Any]:
    """One run of one arm; its result, and mean accuracies of sampled prompts at either end."""
    started = time.perf_counter()
    options = {"task": task, "seed": seed, "run": str(folder / f"{arm}-{seed}")}
    run = prepare(build_config(options, assignments=[*assignments, *ARMS[arm]]))
    result = train(run, quiet=True)
    rows = read_jsonl(run.log.folder / "metrics.jsonl")
    scores = [row[f"{result['metric']}_mean"] for row in rows]
    return result | {
        "first": sum(scores[:EDGE]) / len(scores[:EDGE]),
        "last": sum(scores[-EDGE:]) / len(scores[-EDGE:]),
        "seconds": time.perf_counter() - started,
        "prompts": len(read_jsonl(run.log.folder / "prompts.jsonl")),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Runs all arms on all seeds and prints a row for each, then the means."""
    parser = argparse.ArgumentParser(prog="python -m experiments.compare", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--task", default="mnli")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=["anchor", "best-of-n"])
    parser.add_argument("--folder", type=Path, help="for the runs (default: runs/compare-DATE-TIME)")
    parser.add_argument("assignments", nargs="*", metavar="key=value", help="for all runs")
    options = parser.parse_intermixed_args(argv)
    folder = options.folder or Path(f"runs/compare-{datetime.now():%Y%m%d-%H%M%S}")
    print("| arm | seed | prompts | first 20 | last 20 | validation | test | manual, test | top 5 on test | seconds |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    columns = ("first", "last", "validation_score", "test_score", "manual_test_score")
    try:
        for arm in options.arms:
            results = []
            for seed in options.seeds:
                result = run_arm(arm, options.task, seed, folder, options.assignments)
                protocol = result.get("paper_protocol", {}).get("test_score", math.nan)  # there is none in mode tte
                row = [result[column] for column in columns] + [protocol]
                results.append(row)
                cells = " | ".join(f"{value:.3f}" for value in row)
                print(f"| {arm} | {seed} | {result['prompts']} | {cells} | {result['seconds']:.0f} |", flush=True)
            means = " | ".join(f"{sum(column) / len(column):.3f}" for column in zip(*results, strict=True))
            print(f"| **{arm}** | mean | | {means} | |", flush=True)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
