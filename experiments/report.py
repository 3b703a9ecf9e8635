"""report.html: a run at a glance, one file that opens offline and loads nothing.

Everything that is shown is read back from the run's folder, so a report can be made again at any time:

    appo report runs/mnli-20260101-120000

A model wrote the prompts: all text is escaped, and the page forbids scripts and outside content.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from experiments.config.strict import LARGEST, read_yaml
from experiments.run.folder import CONFIG, RESULT, RunFolder, RunFolderError, read_headroom, read_jsonl, read_result
from experiments.terminal.command import Parser, in_order
from tasks.catalogue import METRICS

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
table { border-collapse: collapse; } th, td { padding: .25rem .8rem; text-align: left; vertical-align: top; }
th { border-bottom: 1px solid #999; font-weight: 600; } td.number, th.number { text-align: right; }
td.number { font-variant-numeric: tabular-nums; } .muted { color: #666; font-weight: normal; }
blockquote { margin: .5rem 0; padding: .6rem 1rem; background: #f3f5f7; border-left: 4px solid #3b6ea5; }
pre { background: #f3f5f7; padding: .6rem 1rem; overflow-x: auto; font-size: 13px; }
.curves { display: grid; grid-template-columns: repeat(auto-fit, minmax(25rem, 1fr)); gap: 1rem; }
figure { margin: 0; } figcaption { font-weight: 600; } svg { width: 100%; height: auto; }
"""
WIDTH, HEIGHT, LEFT, BOTTOM, TOP, RIGHT = 460, 220, 52, 28, 10, 10
SHOWN_PROMPTS = 10
LONGEST = 10**9  # rows from this iteration number on are not read
CURVES = (  # title, caption, columns of metrics.jsonl
    ("Reward", "mean and best of the prompts of an iteration", ("reward_mean", "reward_max")),
    ("Score", "mean over the prompts of an iteration, on its training examples", ("{metric}_mean",)),
    ("Value loss", "half squared error of the value head against the returns", ("value_loss",)),
    ("KL to the anchor", "nats per prompt", ("kl",)),
    ("Entropy", "nats per token", ("entropy",)),
    ("Prompt length", "tokens of the agent", ("length_mean",)),
)
COLOURS = ("#3b6ea5", "#b0b7bf")
MARKS = {"promote": "#2e8b57", "rollback": "#c0392b"}


class Curve(NamedTuple):
    """One line of a chart: its points (x, y), its name, its colour."""

    points: list[tuple[float, float]]
    name: str
    colour: str


def render_report(folder: Path, metric: str) -> str:
    """The HTML page of a run, built from its folder; `metric` names the score that prompts are judged by."""
    config = read_yaml(folder / CONFIG)
    metrics, prompts = (_rows(folder / f"{name}.jsonl") for name in ("metrics", "prompts"))
    result = read_result(folder) if (folder / RESULT).is_file() else None
    described = config | (result or {})
    title = f"{described.get('task')}: a prompt tuned with APPO"
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<p class="muted">{len(metrics)} iterations, {len(prompts)} prompts scored, '
        + escape(", ".join(f"{key} {described.get(key)}" for key in ("seed", "agent", "target", "data")))
        + "</p>",
        _result(result) if result else "<p>The run was stopped before its end; this is how far it came.</p>",
        "<h2>Before training</h2>" if (looked := read_headroom(folder)) else "",
        *(f"<p>{escape(line)}</p>" for line in looked),
        "<h2>How it went</h2>",
        '<p class="muted">Faint: single iterations; strong: their mean over the last ten. Vertical lines: the anchor '
        f'was <span style="color:{MARKS["promote"]}">promoted</span> or the agent '
        f'<span style="color:{MARKS["rollback"]}">rolled back</span>.</p>',
        '<div class="curves">',
        *(
            _figure(title, caption, [column.format(metric=metric) for column in columns], metrics)
            for title, caption, columns in CURVES
        ),
        "</div>",
        "<h2>Best prompts by training reward</h2>",
        _prompt_table(prompts),
        "<h2>Anchor reviews</h2>",
        _review_table(metrics),
        f"<h2>Configuration</h2><pre>{escape(yaml.safe_dump(config, sort_keys=False, allow_unicode=True))}</pre>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _result(result: Mapping[str, Any]) -> str:
    """What the run found, in words and in numbers."""
    if result["prompt"] is None:
        best = "the likeliest prompt for each input"
        quotes = [f"<p>{escape(e['input'])}</p><blockquote>{escape(e['prompt'])}</blockquote>" for e in result["edits"]]
    else:
        best = "best prompt, chosen on validation"
        quotes = [f"<blockquote>{escape(result['prompt'])}</blockquote>"]
    rows = [
        (name, _score(result, f"{which}validation"), _score(result, f"{which}test"))
        for name, which in ((best, ""), ("manual prompt", "manual_"))
    ]
    if protocol := result.get("paper_protocol"):
        rows.append((f"the paper's protocol: {protocol['name']}", "", _number(protocol["test_score"])))
    splits = [f"{split} ({result[f'{split}_rows']} rows)" for split in ("validation", "test")]
    return (
        "".join(quotes)
        + f"<p><strong>{escape(result['verdict'])}</strong></p>"
        + _table((result["metric"], *splits), rows)
        + f'<p class="muted">Manual prompt: {escape(result["manual_prompt"])}</p>'
        + _answers(result.get("answers_on_test") or {})
    )


def _score(result: Mapping[str, Any], name: str) -> str:
    low, high = result[f"{name}_interval"]
    return f"{_number(result[f'{name}_score'])} ({_number(low)} to {_number(high)})"


def _answers(spread: Mapping[str, Mapping[str, float]]) -> str:
    """How the target's answers are spread over the labels."""
    if not spread:
        return ""
    names = {"best": "under the best prompt", "manual": "under the manual prompt", "right": "right answers"}
    rows = [(names.get(name, name), *map(_number, shares.values())) for name, shares in spread.items()]
    return "<h2>Answers on test</h2>" + _table(("share of answers", *next(iter(spread.values()))), rows)


def _prompt_table(prompts: Sequence[Mapping[str, Any]]) -> str:
    best: dict[str, tuple[float, str]] = {}
    for row in prompts:
        text, reward = str(row.get("prompt")), _finite(row.get("reward"))
        if reward is not None and (text not in best or reward > best[text][0]):
            best[text] = (reward, str(row["iteration"]))
    top = sorted(best.items(), key=lambda item: -item[1][0])[:SHOWN_PROMPTS]
    rows = [(text, iteration, _number(reward)) for text, (reward, iteration) in top]
    return _table(("prompt", "iteration", "best reward"), rows)


def _review_table(metrics: Sequence[Mapping[str, Any]]) -> str:
    rows = []
    for row in metrics:
        decision, review = row.get("anchor"), row.get("review")
        if decision and isinstance(review, Mapping):
            means = [_number(_mean(_numbers(review.get(side)))) for side in ("policy_scores", "anchor_scores")]
            rows.append((f"{decision}: {review.get('reason', '')}", str(row["iteration"]), *means))
    if not rows:
        return '<p class="muted">None in this run.</p>'
    return _table(("decision", "iteration", "agent", "anchor"), rows)


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """The first column is text, all others are numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        first, *others = (escape(cell) for cell in row)
        return f"<{tag}>{first}</{tag}>" + "".join(f'<{tag} class="number">{cell}</{tag}>' for cell in others)

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return f"<table><tr>{cells('th', header)}</tr>{body}</table>"


# -- charts ------------------------------------------------------------------------------------------------------


def _figure(title: str, caption: str, columns: Sequence[str], metrics: Sequence[Mapping[str, Any]]) -> str:
    curves = []
    for column, colour in reversed(list(zip(columns, COLOURS, strict=False))):
        points = [(float(row["iteration"]), y) for row in metrics if (y := _finite(row.get(column))) is not None]
        if points:
            curves += [Curve(points, column, colour + "55"), Curve(_smooth(points), column, colour)]
    decided = [(float(row["iteration"]), str(row.get("anchor"))) for row in metrics]
    marks = [(iteration, MARKS[decision]) for iteration, decision in decided if decision in MARKS]
    chart = line_chart(curves, marks) if curves else '<p class="muted">not measured in this run</p>'
    return (
        f'<figure><figcaption>{escape(title)} <span class="muted">{escape(caption)}</span></figcaption>{chart}</figure>'
    )


def line_chart(curves: Sequence[Curve], marks: Sequence[tuple[float, str]] = ()) -> str:
    """An inline SVG of curves over a shared x axis, with vertical lines at `marks` (x, colour)."""
    xs = [x for curve in curves for x, _ in curve.points]
    ys = [y for curve in curves for _, y in curve.points]
    low_x, high_x = min(xs), max(*xs, min(xs) + 1)
    low_y, high_y = _nice_range(min(ys), max(ys))

    def place(x: float, y: float) -> tuple[float, float]:
        across = LEFT + (x - low_x) / (high_x - low_x) * (WIDTH - LEFT - RIGHT)
        down = TOP + (high_y - y) / (high_y - low_y) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)

    out = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" font-size="11" fill="#666">']
    for i in range(5):
        value = low_y + i * (high_y - low_y) / 4
        _, y = place(low_x, value)
        out.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}" stroke="#e3e6e9"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{value:.3g}</text>')
    for x_value in (low_x, (low_x + high_x) / 2, high_x):
        x, _ = place(x_value, low_y)
        out.append(f'<text x="{x}" y="{HEIGHT - 8}" text-anchor="middle">{x_value:.0f}</text>')
    for x_value, colour in marks:
        x, _ = place(x_value, low_y)
        out.append(
            f'<line x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="{colour}" stroke-dasharray="3 3"/>'
        )
    for curve in curves:
        path = " ".join(f"{x},{y}" for x, y in (place(*point) for point in curve.points))
        name = escape(curve.name)
        out.append(
            f'<polyline points="{path}" fill="none" stroke="{curve.colour}" stroke-width="1.8">'
            f"<title>{name}</title></polyline>"
        )
    return "".join([*out, "</svg>"])


def _smooth(points: Sequence[tuple[float, float]], window: int = 10) -> list[tuple[float, float]]:
    windows = [[y for _, y in points[max(0, i - window + 1) : i + 1]] for i in range(len(points))]
    return [(x, sum(ys) / len(ys)) for (x, _), ys in zip(points, windows, strict=True)]


def _nice_range(low: float, high: float) -> tuple[float, float]:
    margin = 0.05 * (high - low) or max(abs(high), 1.0) * 0.1
    return (0.0 if 0 <= low <= high / 2 else low - margin), high + margin


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _numbers(values: object) -> list[float]:
    listed = values if isinstance(values, list) else []
    return [number for value in listed if (number := _finite(value)) is not None]


def _finite(value: object) -> float | None:
    """The value if it is a number that can be drawn, else None; null, for example, stands for NaN."""
    return float(value) if isinstance(value, int | float) and abs(value) <= LARGEST[float] else None


def _rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file that belong to an iteration; none if the run was stopped before its first."""
    rows = read_jsonl(path) if path.is_file() else []
    return [row for row in rows if isinstance(row.get("iteration"), int) and 0 <= row["iteration"] < LONGEST]


# -- command line ------------------------------------------------------------------------------------------------


@in_order
def main(argv: Sequence[str]) -> int:
    """Rebuilds the report of a run and prints its path; returns the exit code."""
    parser = Parser(prog="appo report", description="Rebuilds the report.html of a run, finished or not.")
    parser.add_argument("run", type=Path, help="the run's folder")
    folder = parser.parse_args(argv).run
    if not (folder / CONFIG).is_file():
        raise RunFolderError(f"{str(folder)!r} holds no {CONFIG}; expected the folder of a run")
    columns = {column for row in _rows(folder / "metrics.jsonl") for column in row}
    metric = next((name for name in METRICS if f"{name}_mean" in columns), "accuracy")
    RunFolder(folder, new=False).write_text("report.html", render_report(folder, metric))
    print(folder / "report.html")
    return 0


if __name__ == "__main__":
    sys.exit(main())
