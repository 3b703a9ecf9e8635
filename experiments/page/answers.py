"""What the target answered on the test rows, before and after: confusion matrices, and rows mended and broken."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from experiments.page.html import scrolled, table

SHOWN = 10  # mended rows, and as many broken ones
AS_THEY_COME = 5  # rows of a run with an instruction for each input
NOTHING = "(nothing)"  # the answer of a target that writes, where it named no label word
Row = Mapping[str, Any]


def answers_section(rows: Sequence[Row], words: Sequence[str], edited: bool) -> list[str]:
    """The section on the answers of predictions.jsonl.

    Args:
        rows: what predictions.jsonl holds.
        words: the label words; none where answers are text.
        edited: each input has an instruction of its own.
    """
    if not rows:
        return []
    name = "the instruction for each input" if edited else "the best prompt"
    parts = ["<h2>Answers on the test rows</h2>"]
    if words:
        known = {word for row in rows for word in (*row["expected"], row["manual"]["answer"], row["best"]["answer"])}
        named = [word for word in words if word in known]
        parts += ['<div class="curves">', _matrix("under the manual prompt", rows, "manual", named)]
        parts += [_matrix(f"under {name}", rows, "best", named), "</div>"]
    mended = [row for row in rows if _gain(row) > 0]
    broken = [row for row in rows if _gain(row) < 0]
    header = ("input", *(["instruction written for it"] if edited else []), "right", "under the manual prompt", "now")
    for title, how, found, order in (("Mended", "better", mended, -1), ("Broken", "worse", broken, 1)):
        what = f"{len(found)} of {len(rows)} rows are answered {how} than under the manual prompt"
        part = f"; the {SHOWN} that changed most" if len(found) > SHOWN else ""
        most = sorted(found, key=lambda row: (order * _gain(row), order * _shift(row)))[:SHOWN]
        parts += _changes(title, what + part, header, most, words)
    if edited:
        parts += _changes("As they come", "the first test rows", header, rows[:AS_THEY_COME], words)
    return parts


def _changes(title: str, what: str, header: Sequence[str], rows: Sequence[Row], words: Sequence[str]) -> list[str]:
    """A table of inputs with their answers before and after."""
    listed = [
        (
            row["input"],
            *([str(row["best"].get("prompt"))] if len(header) == 5 else []),
            " or ".join(row["expected"]),
            *(_answered(row[side], words) for side in ("manual", "best")),
        )
        for row in rows
    ]
    text = table(what, header, listed, texts=len(header)) if rows else f"<p>{escape(what)}.</p>"
    return [f"<h3>{title}</h3>", text]


def _gain(row: Row) -> float:
    """By how much the score of a row rose."""
    before, after = row["manual"]["score"], row["best"]["score"]
    return 0.0 if before is None or after is None else after - before


def _shift(row: Row) -> float:
    """By how much the probability of a right answer rose."""
    before, after = (_chance(row[side], row["expected"]) for side in ("manual", "best"))
    return after - before


def _chance(answer: Row, expected: Sequence[str]) -> float:
    return sum(answer["probabilities"].get(word) or 0.0 for word in expected)


def _matrix(title: str, rows: Sequence[Row], side: str, words: Sequence[str]) -> str:
    """How often each right answer (down) got each answer (across); the last column counts rows without an answer."""
    answers = [row[side]["answer"] for row in rows]
    across = [*words, *([""] if "" in answers else [])]
    counts: Counter[tuple[str, str]] = Counter()
    for row, given in zip(rows, answers, strict=True):
        counts[given if given in row["expected"] else row["expected"][0], given] += 1
    head = "".join(f'<th scope="col" class="number">{escape(word or NOTHING)}</th>' for word in across)
    body = ""
    for right in words:
        total = sum(counts[right, given] for given in across) or 1
        cells = "".join(
            f'<td style="--share:{counts[right, given] / total:.2f}">{counts[right, given]}</td>' for given in across
        )
        body += f'<tr><th scope="row">{escape(right)}</th>{cells}</tr>'
    caption = f"Right answer (rows) against the answer given (columns) {title}; {len(rows)} test rows"
    return scrolled(
        caption,
        f'<table class="matrix"><caption>{escape(caption)}</caption><thead><tr><td></td>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table>",
    )


def _answered(answer: Row, words: Sequence[str]) -> str:
    chances = ", ".join(f"{word} {answer['probabilities'].get(word) or 0:.2f}" for word in words)
    return (answer["answer"] or NOTHING) + (f" ({chances})" if chances else "")
