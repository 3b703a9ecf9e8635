"""The page of a comparison: the curves of each arm with the band of its seeds, and every run's score on test."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from experiments.diagnostics.records import mean
from experiments.diagnostics.results import RunRow, scored
from experiments.diagnostics.tables import better, middle
from experiments.page.charts import WINDOW, Band, Curve, Entry, forest, line_chart, running_mean, swatch
from experiments.page.html import document, figure, table
from experiments.page.run_page import iterations_of, points_of
from experiments.run.folder import METRICS
from experiments.run.statistics import coefficient_of_variation

COLOURS = ("one", "two", "three", "four")  # each with dashes of its own
STYLES = (*COLOURS, *(f"{colour} again" for colour in COLOURS), *(f"{colour} thrice" for colour in COLOURS))


def render_comparison(rows: Sequence[RunRow]) -> str:
    """The HTML page of runs that were scored on the same test; runs without a result are curves only.

    Args:
        rows: at least one; those of one arm and one pair of models are its seeds.
    """
    arms: dict[str, list[RunRow]] = {}
    for row in rows:
        arms.setdefault(_named(row, rows), []).append(row)
    styles = {arm: STYLES[i % len(STYLES)] for i, arm in enumerate(arms)}
    metric = next((row.metric for row in rows if row.metric), "accuracy")
    title = f"{rows[0].task}: {_count(len(arms), 'way')} to tune a prompt, {_count(len(rows), 'run')}"
    finished = [row for row in rows if row.finished]
    return document(
        title,
        [
            f"<h1>{escape(title)}</h1>",
            "<h2>Scores on test</h2>",
            *([_arms(rows, metric), _forest(arms, styles, metric)] if finished else ["<p>No run is finished.</p>"]),
            "<h2>While training</h2>",
            _curves(arms, styles, metric),
            "<h2>Runs</h2>",
            _runs(rows),
        ],
    )


def _named(row: RunRow, rows: Sequence[RunRow]) -> str:
    """The arm, with the models where the runs differ in them."""
    models = {(other.agent, other.target) for other in rows}
    return row.arm if len(models) == 1 else f"{row.arm}, {row.agent} for {row.target}"


def summaries(rows: Sequence[RunRow]) -> tuple[Sequence[str], list[Sequence[str]]]:
    """A table of the arms: its header, and a row for each arm that has a finished run.

    The interquartile mean over seeds and the probability to beat the first arm carry intervals (bootstraps over seeds).
    """
    arms: dict[str, list[float]] = {}
    manual: dict[str, list[float]] = {}
    for row in rows:
        if row.test_score is not None and row.manual_test_score is not None:
            arms.setdefault(_named(row, rows), []).append(row.test_score)
            manual.setdefault(_named(row, rows), []).append(row.manual_test_score)
    first = next(iter(arms), "")
    listed: list[Sequence[str]] = []
    for arm, scores in arms.items():
        beats = better(scores, arms[first]) if arm != first else ""
        variation = coefficient_of_variation(scores)
        spread = "" if math.isnan(variation) else f"{variation:.3f}"
        counted = (f"{mean(scores):.3f}", middle(scores), spread, f"{min(scores):.3f}", f"{max(scores):.3f}")
        listed.append((arm, str(len(scores)), *counted, f"{mean(manual[arm]):.3f}", beats))
    header = ("arm", "runs", "test, mean", "interquartile mean", "variation", "lowest", "highest", "manual, test")
    return (*header, f"beats {first}"), listed


def _arms(rows: Sequence[RunRow], metric: str) -> str:
    header, listed = summaries(rows)
    caption = (
        f"{metric} on the test rows, over seeds, with 95 % intervals; variation: standard deviation over mean; the "
        "last column: how likely one of its seeds beats one of the first arm's"
    )
    return table(caption, header, listed)


def _forest(arms: Mapping[str, Sequence[RunRow]], styles: Mapping[str, str], metric: str) -> str:
    """Every finished run's score with its interval, and the manual prompt's; nothing if no score is a number."""
    entries = [
        Entry(f"{arm}, seed {row.seed}", row.test_score, row.test_low, row.test_high, styles[arm])
        for arm, rows in arms.items()
        for row in rows
        if row.test_score is not None and row.test_low is not None and row.test_high is not None
    ]
    manual = [row.manual_test_score for rows in arms.values() for row in rows if row.manual_test_score is not None]
    title = f"{metric} of the chosen prompts on test, with 95 % intervals"
    if not entries:
        return ""
    note = "dashed: the manual prompt, mean" if manual else ""
    return figure(title, note, forest(title, metric, entries, mean(manual)))


def _curves(arms: Mapping[str, Sequence[RunRow]], styles: Mapping[str, str], metric: str) -> str:
    """The running mean of sampled prompts' scores: the mean over seeds, and the band from the lowest to the highest."""
    curves, bands, legend = [], [], []
    for arm, rows in arms.items():
        runs = [smooth for row in rows if (smooth := _smooth(Path(row.run), f"{metric}_mean"))]
        shared = sorted(set.intersection(*(set(run) for run in runs))) if runs else []
        if not shared:
            continue
        curves.append(Curve([(x, mean([run[x] for run in runs])) for x in shared], arm, f"line {styles[arm]}"))
        bands.append(Band([(x, min(r[x] for r in runs), max(r[x] for r in runs)) for x in shared], styles[arm]))
        legend.append(f"<span>{swatch(f'line {styles[arm]}')}{escape(arm)} ({_count(len(runs), 'run')})</span>")
    if not curves:
        return "<p>Nothing was measured.</p>"
    title = f"{metric} of sampled prompts"
    caption = f"mean over the last {WINDOW} iterations and over seeds; bands: lowest to highest seed"
    chart = line_chart(title, metric, curves, bands=bands)
    return figure(title, caption, f'<div class="legend">{"".join(legend)}</div>{chart}')


def _smooth(folder: Path, column: str) -> dict[float, float]:
    """The running mean of a column of metrics.jsonl, by iteration."""
    return dict(running_mean(points_of(iterations_of(folder / METRICS), column)))


def _runs(rows: Sequence[RunRow]) -> str:
    listed = []
    for row in rows:
        best = scored(row.test_score, row.test_low, row.test_high, row.test_rows)
        manual = scored(row.manual_test_score, row.manual_test_low, row.manual_test_high, row.test_rows)
        listed.append((Path(row.run).name, row.arm, row.verdict, str(row.seed), str(row.steps), best, manual))
    header = ("run", "arm", "verdict", "seed", "iterations", "test", "manual, test")
    return table("Every run, with 95 % intervals", header, listed, texts=3)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"
