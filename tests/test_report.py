"""report.html: one page that loads nothing, escapes all text, and draws what was measured."""

from __future__ import annotations

import html
import json
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml

from experiments.report import BOTTOM, CURVES, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Curve, line_chart, render_report

VOID = {"meta", "br", "hr", "img", "link", "input"}  # elements that HTML does not close
COLUMNS = [column.format(metric="accuracy") for _, _, columns in CURVES for column in columns]
REVIEW = {
    "reason": "as the scores say",
    "policy_scores": [0.5, 0.75],
    "anchor_scores": [0.25, 0.25],
}  # means .625 and .25
RESULT: dict[str, Any] = {
    "prompt": "Is it so?",
    "task": "mnli",
    "validation_score": 0.625,
    "test_score": 0.75,
    "manual_prompt": "Say yes or no.",
    "manual_validation_score": 0.5,
    "manual_test_score": 0.25,
    **{f"{name}_interval": [0.125, 0.875] for name in ("validation", "test", "manual_validation", "manual_test")},
    "validation_rows": 32,
    "test_rows": 600,
    "chosen": "tuned",
    "verdict": "better than the manual prompt (by 0.500 on 600 test rows, p = 0.001)",
    "answers_on_test": {},
    "metric": "accuracy",
    "mode": "fixed",
    "paper_protocol": {"name": "best of the top 5 by training reward, chosen on test", "test_score": 0.875},
    "seed": 7,
}
CONFIG = {"task": "mnli", "agent": "some/agent", "target": "some/target", "data": "lab", "appo": {"kl_coef": 0.2}}


def row(iteration: int, value: float | None = None, anchor: str | None = None) -> dict[str, Any]:
    """A row of metrics.jsonl: every column holds `value`, by default 0.5 + iteration."""
    columns = dict.fromkeys(COLUMNS, 0.5 + iteration if value is None else value)
    return {"iteration": iteration, **columns, "anchor": anchor} | ({"review": REVIEW} if anchor else {})


def prompt(text: str, reward: float = 1.0, iteration: int = 1) -> dict[str, Any]:
    return {"iteration": iteration, "prompt": text, "reward": reward}


def render(
    folder: Path,
    metrics: Sequence[dict[str, Any]] = (row(1), row(2)),
    prompts: Sequence[dict[str, Any]] = (prompt("Is it so?"),),
    **result: Any,
) -> str:
    """The page of a run folder written by hand."""
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False), encoding="utf-8")
    for name, rows in (("metrics", metrics), ("prompts", prompts)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    (folder / "best_prompt.json").write_text(json.dumps(RESULT | result), encoding="utf-8")
    return render_report(folder, "accuracy")


def elements(page: str) -> list[tuple[str, dict[str, str | None]]]:
    """Every element with its attributes; raises ValueError where a tag closes what is not open, or is never closed."""
    found: list[tuple[str, dict[str, str | None]]] = []
    opened: list[str] = []
    parser = HTMLParser()

    def start(tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found.append((tag, dict(attributes)))
        if tag not in VOID:
            opened.append(tag)

    def end(tag: str) -> None:
        if not opened or opened.pop() != tag:
            raise ValueError(f"</{tag}> closes nothing")

    parser.handle_starttag = start  # type: ignore[method-assign]
    parser.handle_endtag = end  # type: ignore[method-assign]
    parser.handle_startendtag = lambda tag, attributes: found.append((tag, dict(attributes)))  # type: ignore[method-assign]
    parser.feed(page)
    parser.close()
    if opened:
        raise ValueError(f"left open: {opened}")
    return found


def cells(page: str, heading: str) -> list[list[str]]:
    """The text of the first table after a heading, row by row, without its header."""
    table = re.search(r"<table>(.*?)</table>", page.split(heading, 1)[1])
    assert table
    rows = [re.findall(r"<td[^>]*>(.*?)</td>", line) for line in table[1].split("<tr>")]
    return [[html.unescape(cell) for cell in line] for line in rows if line]


def lines(svg: str) -> list[list[tuple[float, float]]]:
    """The points of each polyline."""
    return [
        [(float(x), float(y)) for x, y in (point.split(",") for point in points.split())]
        for points in re.findall(r'<polyline points="([^"]*)"', svg)
    ]


# -- text --------------------------------------------------------------------------------------------------------

HOSTILE = "</pre><script>alert('x')</script> <img src=\"http://evil.example/a.png\" onerror=x> &amp; & {0} %s"


@pytest.mark.parametrize("place", ["best", "manual", "table", "task", "protocol"])
def test_a_models_words_are_escaped_wherever_they_stand(place: str, tmp_path: Path) -> None:
    results: dict[str, dict[str, Any]] = {
        "best": {"prompt": HOSTILE},
        "manual": {"manual_prompt": HOSTILE},
        "task": {"task": HOSTILE},
        "protocol": {"paper_protocol": {"name": HOSTILE, "test_score": 0.5}},
    }
    page = render(tmp_path, prompts=[prompt(HOSTILE if place == "table" else "ok")], **results.get(place, {}))
    # Escaped by hand: & first, then the two brackets and the two quotes.
    escaped = (
        "&lt;/pre&gt;&lt;script&gt;alert(&#x27;x&#x27;)&lt;/script&gt; "
        "&lt;img src=&quot;http://evil.example/a.png&quot; onerror=x&gt; &amp;amp; &amp; {0} %s"
    )
    assert escaped in page and "<script" not in page and "<img" not in page


@pytest.mark.parametrize("key", ["agent", "target", "data"])
def test_names_from_the_config_are_escaped(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIG, key, "<b>&x")  # type: ignore[arg-type]
    page = render(tmp_path)
    assert page.count("&lt;b&gt;&amp;x") == 2 and "<b>" not in page  # in the first paragraph and in the configuration


def test_a_prompt_keeps_its_characters(tmp_path: Path) -> None:
    text = "Sag »ja«,\n日本 🙂 \u2028 wenn's stimmt"
    assert f"<blockquote>{html.escape(text)}</blockquote>" in render(tmp_path, prompt=text)


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    page = render(tmp_path)
    loading = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background", "xmlns"}
    assert [(tag, set(attributes) & loading) for tag, attributes in elements(page) if set(attributes) & loading] == []


@pytest.mark.parametrize("mark", ["http:", "https:", "//", "url(", "@import", "<script", "<link", "<iframe"])
def test_the_page_names_nothing_outside_itself(mark: str, tmp_path: Path) -> None:
    assert mark not in render(tmp_path)


def test_the_page_forbids_itself_to_load_anything(tmp_path: Path) -> None:
    policies = [
        a["content"] for tag, a in elements(render(tmp_path)) if a.get("http-equiv") == "Content-Security-Policy"
    ]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_the_page_declares_its_encoding_first_of_all(tmp_path: Path) -> None:
    assert render(tmp_path).index('<meta charset="utf-8">') < 1024  # browsers look no further


# -- what is in it -----------------------------------------------------------------------------------------------


def test_the_page_shows_the_scores_beside_the_manual_prompts(tmp_path: Path) -> None:
    assert cells(render(tmp_path), "<h1>") == [
        ["best prompt, chosen on validation", "0.625 (0.125 to 0.875)", "0.750 (0.125 to 0.875)"],
        ["manual prompt", "0.500 (0.125 to 0.875)", "0.250 (0.125 to 0.875)"],
        ["the paper's protocol: best of the top 5 by training reward, chosen on test", "", "0.875"],
    ]


def test_the_verdict_is_there_in_words(tmp_path: Path) -> None:
    assert f"<strong>{RESULT['verdict']}</strong>" in render(tmp_path)


def test_answers_are_shown_label_by_label(tmp_path: Path) -> None:
    shares = {"best": {"no": 0.25, "yes": 0.75}, "manual": {"no": 1.0, "yes": 0.0}, "right": {"no": 0.5, "yes": 0.5}}
    assert cells(render(tmp_path, answers_on_test=shares), "Answers on test") == [
        ["under the best prompt", "0.250", "0.750"],
        ["under the manual prompt", "1.000", "0.000"],
        ["right answers", "0.500", "0.500"],
    ]


def test_the_look_before_training_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "headroom.json").write_text(json.dumps({"lines": ["headroom: much", "  <b>verdict</b>"]}))
    assert "<p>headroom: much</p><p>  &lt;b&gt;verdict&lt;/b&gt;</p>" in render(tmp_path).replace("\n", "")


def test_the_page_says_what_was_run(tmp_path: Path) -> None:
    page = render(tmp_path, [row(1), row(2), row(3)], [prompt("a"), prompt("b")])
    assert "3 iterations, 2 prompts scored, seed 7, agent some/agent, target some/target, data lab</p>" in page


def test_the_page_holds_the_configuration(tmp_path: Path) -> None:
    shown = re.search(r"<pre>(.*?)</pre>", render(tmp_path), re.DOTALL)
    assert shown and yaml.safe_load(html.unescape(shown[1])) == CONFIG


def test_the_best_prompts_are_shown_once_best_first_at_their_best(tmp_path: Path) -> None:
    prompts = [prompt("a", 1.0, 1), prompt("b", 3.0, 1), prompt("a", 2.0, 2), prompt("c", 2.5, 3), prompt("a", 0.5, 4)]
    assert cells(render(tmp_path, prompts=prompts), "Best prompts") == [
        ["b", "1", "3.000"],
        ["c", "3", "2.500"],
        ["a", "2", "2.000"],
    ]


def test_no_more_than_ten_prompts_are_shown(tmp_path: Path) -> None:
    prompts = [prompt(f"number {i}", float(i)) for i in range(25)]
    shown = cells(render(tmp_path, prompts=prompts), "Best prompts")
    assert [cell for cell, *_ in shown] == [f"number {i}" for i in range(24, 14, -1)]


def test_every_anchor_review_is_a_row_with_both_means(tmp_path: Path) -> None:
    metrics = [row(1), row(2, anchor="promote"), row(3, anchor="keep"), row(4, anchor="rollback")]
    assert cells(render(tmp_path, metrics), "Anchor reviews") == [
        ["promote: as the scores say", "2", "0.625", "0.250"],
        ["keep: as the scores say", "3", "0.625", "0.250"],
        ["rollback: as the scores say", "4", "0.625", "0.250"],
    ]


def test_a_run_without_reviews_says_so(tmp_path: Path) -> None:
    assert '<h2>Anchor reviews</h2>\n<p class="muted">None in this run.</p>' in render(tmp_path)


# -- charts ------------------------------------------------------------------------------------------------------


def test_there_is_a_chart_for_every_curve_with_data(tmp_path: Path) -> None:
    assert render(tmp_path).count("<svg") == len(CURVES)


# (missing columns, charts that are left); a frozen run, for example, measures no losses.
@pytest.mark.parametrize(
    ("missing", "left"),
    [
        (["value_loss", "entropy"], len(CURVES) - 2),
        (["reward_max"], len(CURVES)),  # the mean is in the same chart
        (COLUMNS, 0),
    ],
)
def test_a_curve_without_data_is_said_to_be_missing(missing: list[str], left: int, tmp_path: Path) -> None:
    metrics = [{key: value for key, value in row(i).items() if key not in missing} for i in (1, 2)]
    page = render(tmp_path, metrics)
    assert (page.count("<svg"), page.count("not measured in this run")) == (left, len(CURVES) - left)


def test_a_column_that_begins_late_is_drawn_from_there(tmp_path: Path) -> None:
    late = {key: value for key, value in row(1).items() if key != "kl"}
    page = render(tmp_path, [late, row(2), row(3)])
    chart = page.split("KL to the anchor")[1].split("</figure>")[0]
    assert [len(points) for points in lines(chart)] == [2, 2]


MARKUP = {
    "usual": [row(1), row(2), row(3)],
    "one iteration": [row(1)],
    "constant": [row(1, 0.5), row(2, 0.5), row(3, 0.5)],
    "zero": [row(1, 0.0), row(2, 0.0)],
    "negative": [row(1, -3.0), row(2, -3.0), row(3, -7.0)],
    "huge and tiny": [row(1, 1e-30), row(2, 1e30)],
    "reviewed": [row(1, anchor="promote"), row(2, anchor="rollback"), row(3, anchor="keep")],
    "nothing measured": [{"iteration": 1, "anchor": None}],
}


@pytest.mark.parametrize("metrics", MARKUP.values(), ids=MARKUP)
def test_every_tag_is_closed(metrics: list[dict[str, Any]], tmp_path: Path) -> None:
    tags = [tag for tag, _ in elements(render(tmp_path, metrics))]  # raises where one is not
    assert [tags.count(tag) for tag in ("html", "head", "body")] == [1, 1, 1]


@pytest.mark.parametrize("metrics", MARKUP.values(), ids=MARKUP)
def test_every_point_lies_inside_its_chart(metrics: list[dict[str, Any]], tmp_path: Path) -> None:
    points = [point for line in lines(render(tmp_path, metrics)) for point in line]
    inside = [LEFT <= x <= WIDTH - RIGHT and TOP <= y <= HEIGHT - BOTTOM for x, y in points]  # False for NaN
    assert all(inside) and len(points) == 2 * sum(key in COLUMNS for line in metrics for key in line)


def test_a_curve_runs_from_edge_to_edge() -> None:
    (line,) = lines(line_chart([Curve([(3, 0.0), (5, 1.0), (7, 0.5)], "c", "#000")]))
    # The chart is 460 wide with margins of 52 and 10, so x runs from 52 through 251, the middle, to 450.
    assert [x for x, _ in line] == [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT]


def test_larger_values_stand_higher_and_in_proportion() -> None:
    (line,) = lines(line_chart([Curve([(1, 0.0), (2, 1.0), (3, 0.25)], "c", "#000")]))
    low, high, quarter = (y for _, y in line)
    # SVG counts from the top; coordinates are rounded to 0.1.
    assert high < low and abs((low - quarter) - (low - high) / 4) <= 0.1


def test_curves_of_one_chart_share_their_scale() -> None:
    one, other = lines(line_chart([Curve([(1, 1.0), (2, 2.0)], "a", "#0"), Curve([(1, 2.0), (2, 1.0)], "b", "#1")]))
    assert ([y for _, y in one], [x for x, _ in one]) == ([y for _, y in reversed(other)], [x for x, _ in other])


def test_the_axis_of_iterations_names_its_ends(tmp_path: Path) -> None:
    chart = line_chart([Curve([(1, 0.0), (101, 1.0)], "c", "#000")])
    assert re.findall(r'text-anchor="middle">([^<]*)<', chart) == ["1", "51", "101"]


def test_the_axis_of_values_spans_the_data() -> None:
    chart = line_chart([Curve([(1, 20.0), (2, 25.0)], "c", "#000")])
    ticks = [float(tick) for tick in re.findall(r'text-anchor="end">([^<]*)<', chart)]
    assert min(ticks) <= 20 and max(ticks) >= 25 and len(set(ticks)) == 5


def test_reviews_stand_at_their_iteration_in_their_colour() -> None:
    chart = line_chart([Curve([(0, 0.0), (10, 1.0)], "c", "#000")], [(5, "#2e8b57")])
    middle = (LEFT + WIDTH - RIGHT) / 2
    assert f'<line x1="{middle}" x2="{middle}" y1="{TOP}" y2="{HEIGHT - BOTTOM}" stroke="#2e8b57"' in chart


@pytest.mark.parametrize(("anchor", "count"), [("promote", 1), ("rollback", 1), ("keep", 0)])
def test_only_decisions_that_changed_something_are_marked(anchor: str, count: int, tmp_path: Path) -> None:
    page = render(tmp_path, [row(1), row(2, anchor=anchor), row(3)])
    assert page.count("stroke-dasharray") == count * len(CURVES)


def test_the_strong_line_is_the_mean_over_the_last_ten(tmp_path: Path) -> None:
    values = [float((7 * i) % 13) for i in range(25)]  # no two neighbours alike
    page = render(tmp_path, [row(i, value) for i, value in enumerate(values)])
    faint, strong = lines(page.split("Value loss")[1].split("</figure>")[0])
    ys = [y for _, y in faint]
    means = [sum(ys[max(0, i - 9) : i + 1]) / len(ys[max(0, i - 9) : i + 1]) for i in range(25)]
    # The scale is linear, so heights can be averaged; both sides are rounded to 0.1, each off by at most 0.05.
    assert max(abs(y - mean) for (_, y), mean in zip(strong, means, strict=True)) <= 0.1


def test_curves_are_named_by_their_columns(tmp_path: Path) -> None:
    assert set(re.findall(r"<title>([a-z_]+)</title>", render(tmp_path))) == set(COLUMNS)


def test_a_run_without_result_is_shown_as_far_as_it_came(tmp_path: Path) -> None:
    render(tmp_path)
    (tmp_path / "best_prompt.json").unlink()
    config = yaml.safe_dump(CONFIG | {"seed": 3})
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    page = render_report(tmp_path, "accuracy")
    assert "stopped before its end" in page and "<svg" in page and "seed 3" in page
