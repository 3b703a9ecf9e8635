"""Tables of the runs of a study, in Markdown.

summary of AXIS                 a row for each setting: scores of its seeds' last prompts, and of the results on test
runs of AXIS                    a row for each run
plane of AXIS by AXIS           a cell for each pair of settings: scores of the last prompts
curve of AXIS by AXIS at N N    a cell for each pair of settings: scores of the prompts up to some iterations
test of AXIS by AXIS            a cell for each pair of settings: scores of the results on test

With " where AXIS = SETTING" at its end, a table counts the runs of that setting only.
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from experiments.config import TRAINED
from experiments.diagnostics.records import Record, mean
from experiments.run.statistics import (
    Interval,
    coefficient_of_variation,
    improvement_interval,
    interquartile_interval,
    interquartile_mean,
    probability_of_improvement,
)
from tasks.errors import printable

LAST = 20  # a run ends with the mean score of this many last iterations
FIRST = 5
SHORT = 60  # characters of a prompt in a table
GAIN = 0.05  # a run has failed if its last prompts score less than this much above the untrained agent's
Table = list[list[str]]  # the first row is the header
VIEW = re.compile(r"(summary|runs) of (.+)|(plane|test) of (.+) by (.+)|(curve) of (.+) by (.+) at ([0-9 ]*[0-9])")
WHERE = re.compile(r"(.+) where (.+?) = (.+)")


class Asked(NamedTuple):
    """The table that some words ask for."""

    kind: str
    axes: list[str]
    at: list[int]  # iterations of a curve
    where: tuple[str, str] | None  # axis and setting; only its runs count


def view(records: Sequence[Record], words: str) -> Table:
    """Returns the table that the words ask for; the module's docstring lists the tables.

    Raises:
        ValueError: the words ask for no table, or for an axis that the records lack.
    """
    records, (kind, axes, at, _) = _chosen(records, words)
    if not records:
        return [axes]
    if kind in ("summary", "runs"):
        return (summary if kind == "summary" else listed)(records, *axes)
    rows, columns = axes
    if kind == "curve":
        return over_time(records, rows, columns, at)
    return (plane if kind == "plane" else on_test)(records, rows, columns)


def scores_on_test(records: Sequence[Record], words: str) -> dict[str, dict[str, float]] | None:
    """Returns the numbers of a table `test of AXIS by AXIS`: setting -> setting -> mean score on test.

    Returns:
        The numbers; None for other tables.

    Raises:
        ValueError: as `view`.
    """
    records, (kind, axes, *_) = _chosen(records, words)
    if kind != "test":
        return None
    rows, columns = axes
    finished = [run for run in records if run["test_score"] is not None]
    return {
        setting: {name: mean([run["test_score"] for run in some]) for name, some in by(runs, columns).items()}
        for setting, runs in by(finished, rows).items()
    }


def _chosen(records: Sequence[Record], words: str) -> tuple[Sequence[Record], Asked]:
    """Returns the runs that a table counts, and the table that its words ask for."""
    shared = [axis for axis in records[0]["labels"] if all(axis in record["labels"] for record in records)]
    found = asked(words, shared)
    return (by(records, found.where[0]).get(found.where[1], []) if found.where else records), found


def asked(words: str, known: Sequence[str]) -> Asked:
    """Reads the words for a table.

    Raises:
        ValueError: they ask for no table, or for an axis that is not in `known`.
    """
    limited = WHERE.fullmatch(words)
    table, *where = limited.groups() if limited else [words]
    found = VIEW.fullmatch(table)
    if not found:
        raise ValueError(f"{words!r} is no table; expected words such as 'summary of arm' or 'plane of task by arm'")
    kind, *axes = [part for part in found.groups() if part]
    at = [int(n) for n in axes.pop().split()] if kind == "curve" else []
    for axis in [*axes, *where[:1]]:
        if axis not in known:
            raise ValueError(f"{words!r}: no axis {axis!r}; expected one of {', '.join(known)}")
    return Asked(kind, axes, at, (where[0], where[1]) if where else None)


def summary(records: Sequence[Record], axis: str) -> Table:
    """Returns a row for each setting of an axis: where its seeds end, their deviation, failures and test scores.

    A run that trains has failed if its last prompts do not score at least GAIN above those of the untrained agent: it
    has learnt nothing, or has lost what it learnt. "beats" is the probability that a seed's test score beats that of a
    seed of the first setting; it and the interquartile mean have bootstrap intervals over seeds.
    """
    groups = by(records, axis)
    first = next(iter(groups.values()))
    header = [axis, "runs", f"last {LAST}, mean", "deviation", "worst seed", "failed", "largest KL, median"]
    found = [[*header, "test, interquartile mean", "worst", "variation", f"beats {next(iter(groups))}"]]
    for label, runs in groups.items():
        ends = _ends(runs)
        tests, base = ([run["test_score"] for run in some if run["test_score"] is not None] for some in (runs, first))
        furthest = [max(kl) for run in runs if (kl := _kl(run))]
        widest = statistics.median(furthest) if furthest else math.nan
        found.append(
            [
                *(label, str(len(runs)), _number(mean(ends)), _number(_deviation(ends))),
                _number(min(ends, default=math.nan)),
                *(_failures(runs, records), _number(widest, 1)),
                *_over_seeds(tests, base if runs is not first else []),
            ]
        )
    return found


def plane(records: Sequence[Record], rows: str, columns: str) -> Table:
    """Returns a cell for each pair of settings: mean of the last prompts, lowest to highest seed, and failures.

    Runs of arms that do not train cannot fail, so their cells do not count failures.
    """

    def cell(runs: list[Record]) -> str:
        ends = _ends(runs)
        if not ends:
            return ""
        failed = _failures(runs, records)
        return f"{mean(ends):.2f} ({min(ends):.2f} to {max(ends):.2f})" + (f", failed: {failed}" if failed else "")

    return _crossed(records, rows, columns, cell)


def over_time(records: Sequence[Record], rows: str, columns: str, at: Sequence[int]) -> Table:
    """Returns a cell for each pair of settings: mean scores of the LAST iterations up to each of some iterations.

    A seed that has not come that far does not count.
    """

    def cell(runs: list[Record]) -> str:
        curves = [run["curve"] for run in runs]
        near = [[curve[max(0, n - LAST) : n] for curve in curves if len(curve) >= n] for n in at]
        means = [_number(mean([score for scores in some for score in scores]), 2) for some in near]
        return " / ".join(means) if any(means) else ""

    return _crossed(records, rows, columns, cell)


def on_test(records: Sequence[Record], rows: str, columns: str) -> Table:
    """Returns a cell for each pair of settings: mean test score, lowest to highest seed, and the manual prompt's.

    A single seed has its 95 % interval instead, with the number of rows.
    """

    def cell(runs: list[Record]) -> str:
        finished = [run for run in runs if run["test_score"] is not None]
        if not finished:
            return "(stopped)"
        scores = [run["test_score"] for run in finished]
        low, high, count = min(scores), max(scores), ""
        if len(finished) == 1:
            low, high = finished[0]["test_interval"]
            count = f", n = {finished[0]['test_rows']}"
        manual = mean([run["manual_test_score"] for run in finished])
        return f"**{mean(scores):.3f}** ({low:.3f} to {high:.3f}{count}; manual {manual:.3f})"

    return _crossed(records, rows, columns, cell)


def listed(records: Sequence[Record], axis: str) -> Table:
    """Returns a row for each run."""
    header = [axis, "seed", f"first {FIRST}", f"last {LAST // 2}", "KL, mean (most)", "promoted", "rolled back"]
    found = [[*header, "validation", "test (95 % interval)", "manual, test", "prompt"]]
    for run in records:
        kl = _kl(run)
        found.append(
            [
                *(run["labels"][axis], str(run["seed"])),
                *(_number(mean(run["curve"][:FIRST])), _number(mean(run["curve"][-LAST // 2 :]))),
                *(f"{mean(kl):.1f} ({max(kl):.1f})" if kl else "", str(run["promoted"]), str(run["rolled_back"])),
                *_scores(run),
            ]
        )
    return found


def _over_seeds(tests: Sequence[float], base: Sequence[float]) -> list[str]:
    """Returns the cells for some seeds' test scores: interquartile mean, lowest, variation, and how often they win."""
    if not tests:
        return [""] * 4
    beats = better(tests, base) if base else ""
    return [f"{middle(tests)}, n = {len(tests)}", _number(min(tests)), _number(coefficient_of_variation(tests)), beats]


def middle(scores: Sequence[float]) -> str:
    """Returns the interquartile mean of some seeds' scores, with its interval."""
    return f"{interquartile_mean(scores):.3f} {_range(interquartile_interval([scores]))}"


def better(scores: Sequence[float], others: Sequence[float]) -> str:
    """Returns the probability that a seed beats one of the others, with its interval."""
    return f"{probability_of_improvement(scores, others):.2f} {_range(improvement_interval(scores, others))}"


def _scores(run: Record) -> list[str]:
    """Returns the cells for the result of a run; they are empty if the run was stopped."""
    if run["test_score"] is None:
        return ["", f"(stopped after {run['iterations']})", "", ""]
    low, high = run["test_interval"]
    return [
        f"{run['validation_score']:.3f} (n = {run['validation_rows']})",
        f"**{run['test_score']:.3f}** ({low:.3f} to {high:.3f}, n = {run['test_rows']})",
        *(f"{run['manual_test_score']:.3f}", _short(run["prompt"] or "")),
    ]


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Returns the table as Markdown, with a line break at the end."""
    header, *rows = map(markdown_row, table)
    return "".join(f"{line}\n" for line in (header, "|---" * len(table[0]) + "|", *rows))


def markdown_row(cells: Sequence[str]) -> str:
    """Returns a row of a table in Markdown; a | in a cell is escaped."""
    inside = "|".join(f" {cell} ".replace("|", "\\|") for cell in cells)
    return f"|{inside}|"


def by(records: Iterable[Record], axis: str) -> dict[str, list[Record]]:
    """Returns the records of each setting of an axis, in their order."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(record["labels"][axis], []).append(record)
    return groups


def last(run: Record) -> float:
    """Returns the mean score of a run's last iterations; NaN if there are none."""
    return mean(run["curve"][-LAST:])


def _ends(runs: Sequence[Record]) -> list[float]:
    """Returns the mean score of the last iterations of each run, without runs that have no score there."""
    return [end for run in runs if not math.isnan(end := last(run))]


def _kl(run: Record) -> list[float]:
    """Returns the KL of each iteration that has one."""
    return [value for value in run["kl"] if value is not None]


def untrained(records: Iterable[Record], like: Record) -> float:
    """Returns the mean score of the untrained agent: that of all first iterations with the same task, models and mode.

    Runs of arm edits do not count: they begin with the manual prompt, not with prompts of the agent.
    """

    def asked_for(run: Record) -> tuple[str, ...]:
        return (run["task"], run["agent"], run["target"], run["config"]["mode"])

    alike = [run for run in records if asked_for(run) == asked_for(like)]
    return mean([run["curve"][0] for run in alike if run["curve"] and run["arm"] != "edits"])


def _failures(runs: Sequence[Record], records: Sequence[Record]) -> str:
    trained = [run for run in runs if run["config"]["arm"] in TRAINED and run["curve"]]
    failed = sum(not last(run) >= untrained(records, run) + GAIN for run in trained)  # not: a NaN has failed, too
    return f"{failed} of {len(trained)}" if trained else ""


def _crossed(records: Sequence[Record], rows: str, columns: str, cell: Callable[[list[Record]], str]) -> Table:
    across = list(by(records, columns))
    found = [[f"{rows} \\ {columns}", *across]]
    for label, runs in by(records, rows).items():
        parts = by(runs, columns)
        found.append([label, *(cell(parts[name]) if name in parts else "" for name in across)])
    return found


def _deviation(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _number(value: float, digits: int = 3) -> str:
    return "" if math.isnan(value) else f"{value:.{digits}f}"


def _range(ends: Interval) -> str:
    return f"({ends.low:.3f} to {ends.high:.3f})"


def _short(text: str) -> str:
    """Returns the beginning of a prompt in italics, without what would end the cell or control the terminal."""
    text = printable(" ".join(text.replace("|", "/").replace("*", "").replace("_", " ").replace("`", "'").split()))
    return f"*{text if len(text) <= SHORT else text[: SHORT - 3].rstrip() + '...'}*" if text else "(empty)"
