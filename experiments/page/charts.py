"""Charts as inline SVG: round ticks, named axes, a legend, colours from the page's style sheet.

Lines differ by dashes as well as by colour, and marks by shape, so that a chart is read in black and white too.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from experiments.terminal.console import clip

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 480, 270, 58, 14, 24, 46
TICKS = 5  # about so many on an axis
WINDOW = 10  # iterations in a running mean
MARKS = {"promote": "promoted", "rollback": "rolled back"}


class Curve(NamedTuple):
    """One line of a chart: its points (x, y), its name in the legend, and the classes that style it."""

    points: list[tuple[float, float]]
    name: str
    style: str


class Mark(NamedTuple):
    """A vertical line at x; `kind` is a key of MARKS."""

    x: float
    kind: str


class Band(NamedTuple):
    """An area between two lines: its points (x, low, high), and the class that styles it."""

    points: list[tuple[float, float, float]]
    style: str


class Entry(NamedTuple):
    """A score with its interval, in a chart of many."""

    name: str
    score: float
    low: float
    high: float
    style: str


class Dot(NamedTuple):
    """A point of a strip chart; agent and anchor have different shapes."""

    x: float
    y: float
    side: str  # "agent" or "anchor"


class Scale(NamedTuple):
    """The part of a chart that data are drawn in."""

    low_x: float
    high_x: float
    low_y: float
    high_y: float

    def place(self, x: float, y: float) -> tuple[float, float]:
        """A point in the chart's coordinates, which count from the upper left corner."""
        across = LEFT + (x - self.low_x) / (self.high_x - self.low_x) * (WIDTH - LEFT - RIGHT)
        down = TOP + (self.high_y - y) / (self.high_y - self.low_y) * (HEIGHT - TOP - BOTTOM)
        return round(across, 1), round(down, 1)


def running_mean(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Each point with the mean of the last WINDOW values up to it."""
    windows = [[y for _, y in points[max(0, i - WINDOW + 1) : i + 1]] for i in range(len(points))]
    return [(x, sum(ys) / len(ys)) for (x, _), ys in zip(points, windows, strict=True)]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers, 1, 2 or 5 times a power of ten apart, from at most `low` to at least `high`."""
    smallest = max(1e-12 * max(abs(low), abs(high)), 1e-300)  # what the sum of two ticks can still show
    wide = high - low if high - low > smallest else max(abs(high), 1.0)
    rough = wide / TICKS
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(step for factor in (1, 2, 5, 10) if (step := factor * power) >= rough * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, max(last, first + 1) + 1)]


def shown(value: float, step: float) -> str:
    """A tick as text, with as many decimals as the distance to the next one needs."""
    if not 1e-4 <= step < 1e6:
        return f"{value:.1e}"
    return f"{value:.{max(0, -math.floor(math.log10(step) + 1e-9))}f}".replace("-", "\N{MINUS SIGN}")


def line_chart(
    name: str, unit: str, curves: Sequence[Curve], marks: Sequence[Mark] = (), bands: Sequence[Band] = ()
) -> str:
    """Curves over iterations, with vertical lines where the anchor moved.

    Args:
        name: of the chart, for screen readers.
        unit: title of the vertical axis.
        curves: at least one point in all.
        marks: promotions and rollbacks.
        bands: areas behind the curves.
    """
    points = [point for curve in curves for point in curve.points]
    points += [(x, y) for band in bands for x, *ends in band.points for y in ends]
    scale, axes = _axes(points, unit)
    drawn = [_mark(mark, scale) for mark in marks]
    for band in bands:
        around = [(x, low) for x, low, _ in band.points] + [(x, high) for x, _, high in reversed(band.points)]
        path = " ".join(f"{x},{y}" for x, y in (scale.place(*point) for point in around))
        drawn.append(f'<polygon class="band {band.style}" points="{path}"/>')
    for curve in curves:
        path = " ".join(f"{x},{y}" for x, y in (scale.place(*point) for point in curve.points))
        if len(curve.points) == 1:
            x, y = scale.place(*curve.points[0])
            drawn.append(f'<circle class="{curve.style}" cx="{x}" cy="{y}" r="3"/>')
        drawn.append(f'<polyline class="{curve.style}" points="{path}"><title>{escape(curve.name)}</title></polyline>')
    strong = curves[-1].points
    summary = f"from {strong[0][1]:.3g} in iteration {strong[0][0]:.0f} to {strong[-1][1]:.3g} in {strong[-1][0]:.0f}"
    return _svg(name, summary, [axes, *drawn])


def strip_chart(
    name: str, unit: str, dots: Sequence[Dot], ends: tuple[float, float], marks: Sequence[Mark] = ()
) -> str:
    """Single scores of agent and anchor at each review, and a bar at each mean; `ends` are those of the x axis."""
    scale, axes = _axes([*((dot.x, dot.y) for dot in dots), *((x, dots[0].y) for x in ends)], unit)
    drawn = [_mark(mark, scale) for mark in marks]
    for side, shift in (("agent", -3.5), ("anchor", 3.5)):
        mine = [dot for dot in dots if dot.side == side]
        for dot in mine:
            x, y = scale.place(dot.x, dot.y)
            x = round(x + shift, 1)
            if side == "agent":
                drawn.append(f'<circle class="dot one" cx="{x}" cy="{y}" r="2.6"/>')
            else:
                drawn.append(f'<rect class="dot two" x="{x - 2.4:.1f}" y="{y - 2.4:.1f}" width="4.8" height="4.8"/>')
        for at in sorted({dot.x for dot in mine}):
            values = [dot.y for dot in mine if dot.x == at]
            x, y = scale.place(at, sum(values) / len(values))
            x = x + shift
            kind = "one" if side == "agent" else "two"
            drawn.append(f'<line class="mean {kind}" x1="{x - 6:.1f}" x2="{x + 6:.1f}" y1="{y}" y2="{y}"/>')
    return _svg(name, f"{len({dot.x for dot in dots})} reviews", [axes, *drawn])


def forest(name: str, unit: str, entries: Sequence[Entry], line: float) -> str:
    """Scores with their intervals, one below the other, and a dashed line, if it is a number, to compare them with."""
    names, row, top, named = 190, 20, 8, escape(unit)
    height = top + row * len(entries) + 44
    lines = [] if math.isnan(line) else [line]
    across = ticks(min([*lines, *(entry.low for entry in entries)]), max([*lines, *(entry.high for entry in entries)]))
    low, high = across[0], across[-1]

    def at(value: float) -> float:
        return round(names + (value - low) / (high - low) * (WIDTH - names - RIGHT - 10), 1)

    foot = height - 44
    out = [f'<line class="rule" x1="{at(x)}" x2="{at(x)}" y1="{top}" y2="{foot}"/>' for x in lines]
    for value in across:
        out.append(f'<text x="{at(value)}" y="{foot + 18}" text-anchor="middle">{shown(value, across[1] - low)}</text>')
        out.append(f'<line class="grid" x1="{at(value)}" x2="{at(value)}" y1="{top}" y2="{foot}"/>')
    for i, entry in enumerate(entries):
        y = top + row * i + row / 2
        out.append(f'<text x="{names - 10}" y="{y + 4}" text-anchor="end">{escape(clip(entry.name, 32))}</text>')
        out.append(f'<line class="mean {entry.style}" x1="{at(entry.low)}" x2="{at(entry.high)}" y1="{y}" y2="{y}"/>')
        out.append(f'<circle class="dot {entry.style}" cx="{at(entry.score)}" cy="{y}" r="4"/>')
    out.append(f'<text class="axis" x="{(names + WIDTH) / 2}" y="{height - 8}" text-anchor="middle">{named}</text>')
    label = escape(f"{name}: " + "; ".join(f"{entry.name} {entry.score:.3f}" for entry in entries))
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{label}">{"".join(out)}</svg>'


def swatch(style: str) -> str:
    """A sample of a curve, for the legend."""
    return f'<svg class="swatch" viewBox="0 0 24 10" aria-hidden="true"><path class="{style}" d="M1 5H23"/></svg>'


def sign(kind: str) -> str:
    """The shape of a mark or a dot, for the legend."""
    shapes = {
        "promote": '<path class="promote" d="M7 1L12 9H2Z"/>',
        "rollback": '<path class="rollback" d="M7 9L12 1H2Z"/>',
        "agent": '<circle class="dot one" cx="7" cy="5" r="3"/>',
        "anchor": '<rect class="dot two" x="4" y="2" width="6" height="6"/>',
    }
    return f'<svg class="swatch" viewBox="0 0 14 10" aria-hidden="true">{shapes[kind]}</svg>'


def _axes(points: Sequence[tuple[float, float]], unit: str) -> tuple[Scale, str]:
    xs, ys = [x for x, _ in points], [y for _, y in points]
    low, high = min(ys), max(ys)
    across, down = ticks(min(xs), max(xs)), ticks(0.0 if 0 <= low <= high / 2 else low, high)
    scale = Scale(min(xs), max(*xs, min(xs) + 1), down[0], down[-1])
    out = []
    for value in down:
        _, y = scale.place(scale.low_x, value)
        out.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
        out.append(f'<text x="{LEFT - 6}" y="{y + 4}" text-anchor="end">{shown(value, down[1] - down[0])}</text>')
    for value in (tick for tick in across if scale.low_x <= tick <= scale.high_x and tick == round(tick)):
        x, _ = scale.place(value, scale.low_y)
        out.append(f'<text x="{x}" y="{HEIGHT - BOTTOM + 17}" text-anchor="middle">{value:.0f}</text>')
    middle, named = (TOP + HEIGHT - BOTTOM) / 2, escape(unit)
    out.append(
        f'<text class="axis" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">iteration</text>'
    )
    out.append(f'<text class="axis" transform="translate(13 {middle}) rotate(-90)" text-anchor="middle">{named}</text>')
    return scale, "".join(out)


def _mark(mark: Mark, scale: Scale) -> str:
    x, _ = scale.place(mark.x, scale.low_y)
    up = mark.kind == "promote"
    shape = f"M{x} {TOP - 14}L{x + 5} {TOP - 4}H{x - 5}Z" if up else f"M{x} {TOP - 4}L{x + 5} {TOP - 14}H{x - 5}Z"
    return (
        f'<line class="mark {mark.kind}" x1="{x}" x2="{x}" y1="{TOP - 4}" y2="{HEIGHT - BOTTOM}"/>'
        f'<path class="{mark.kind}" d="{shape}"><title>{MARKS[mark.kind]} after iteration {mark.x:.0f}</title></path>'
    )


def _svg(name: str, summary: str, parts: Sequence[str]) -> str:
    label = escape(f"{name}: {summary}")
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg>'
