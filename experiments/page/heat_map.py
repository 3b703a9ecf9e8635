"""A heat map as a picture of its own: scores of two crossed axes, each with its number, darker where it is higher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

from experiments.diagnostics.records import Record
from experiments.diagnostics.tables import asked, scores_on_test
from experiments.terminal.console import clip
from tasks.errors import printable

NAMES, CELL, ROW, TOP, BOTTOM = 170, 110, 44, 56, 30
LONGEST = 18  # characters of a setting's name
SHEET = "text { font: 13px system-ui, sans-serif; fill: #1d2125; } .light { fill: #fff; } .axis { fill: #4d565f; }"


def drawn(records: Sequence[Record], words: str) -> str | None:
    """A table `test of AXIS by AXIS` as an SVG file; None for other tables, and where no run has a score.

    Raises:
        ValueError: as `experiments.diagnostics.tables.view`.
    """
    scores = scores_on_test(records, words)
    rows, columns = asked(words, list(records[0]["labels"])).axes[:2] if scores else ("", "")
    return heat_map(rows, columns, scores, "score on test, mean of seeds") if scores else None


def heat_map(rows: str, columns: str, scores: Mapping[str, Mapping[str, float]], unit: str) -> str:
    """An SVG file with a cell for each pair of settings that has a score; shades run from 0 (white) to 1 (dark blue).

    Args:
        rows: name of the axis that runs down.
        columns: name of the axis that runs across.
        scores: setting of `rows` -> setting of `columns` -> score, between 0 and 1.
        unit: what the scores are.
    """
    across = list(dict.fromkeys(name for cells in scores.values() for name in cells))
    width, height = NAMES + CELL * len(across) + 10, TOP + ROW * len(scores) + BOTTOM
    middle = NAMES + CELL * len(across) / 2
    out = [_text(middle, 18, _short(columns), "axis"), _text(NAMES - 12, 42, _short(rows), "axis", "end")]
    out += [_text(NAMES + CELL * (i + 0.5), 42, _short(name)) for i, name in enumerate(across)]
    for j, (setting, cells) in enumerate(scores.items()):
        y = TOP + ROW * j
        out.append(_text(NAMES - 12, y + ROW / 2 + 5, _short(setting), anchor="end"))
        for i, name in enumerate(across):
            if name in cells:
                out.append(_cell(NAMES + CELL * i, y, cells[name]))
    out.append(_text(middle, height - 10, unit, "axis"))
    body = f'<rect width="100%" height="100%" fill="#fff"/><style>{SHEET}</style>' + "".join(out)
    told = escape(printable(f"{unit}, {rows} by {columns}: {_in_words(scores)}"))
    opened = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" aria-label="{told}">'
    return f"{opened}{body}</svg>\n"


def _cell(x: float, y: float, score: float) -> str:
    """A shaded box and its number, white on dark ground."""
    red, green, blue = (round(255 + (dark - 255) * min(max(score, 0.0), 1.0)) for dark in (23, 70, 124))
    shade = f"#{red:02x}{green:02x}{blue:02x}"
    box = f'<rect x="{x + 1}" y="{y + 1}" width="{CELL - 2}" height="{ROW - 2}" fill="{shade}"/>'
    return box + _text(x + CELL / 2, y + ROW / 2 + 5, f"{score:.3f}", "light" if score > 0.55 else "")


def _text(x: float, y: float, text: str, style: str = "", anchor: str = "middle") -> str:
    styled = f' class="{style}"' if style else ""
    return f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}"{styled}>{escape(text)}</text>'


def _short(name: str) -> str:
    return clip(printable(name), LONGEST)


def _in_words(scores: Mapping[str, Mapping[str, float]]) -> str:
    """All numbers as text, for screen readers."""
    rows = [
        f"{setting}: " + ", ".join(f"{name} {score:.3f}" for name, score in cells.items())
        for setting, cells in scores.items()
    ]
    return "; ".join(rows)
