"""report.html: one page that loads nothing, escapes all text, and draws what was measured."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import math
import re
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from experiments.config import GIVEN, ArmName
from experiments.page.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Curve, Mark, line_chart, shown, ticks
from experiments.page.html import POLICY, SCRIPT
from experiments.page.run_page import CURVES, TITLES, render_report
from experiments.page.use import snippets
from experiments.run.folder import RunFolderError
from tasks.catalogue import load_spec

VOID = {"meta", "br", "hr", "img", "link", "input"}  # elements that HTML does not close
COLUMNS = [column.format(metric="accuracy") for chart in CURVES for column, _ in chart.columns]
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
    "chance": 0.375,
    "paper_protocol": {
        "name": "best of the top 5 by training reward, chosen on test",
        "test_score": 0.875,
        "test_interval": [0.75, 1.0],
    },
    "template": "{prompt} Input : {input} Output :",
    "verbalizer": {"entailment": "yes", "contradiction": "no"},
    "target": "some/target",
    "seed": 7,
}
CONFIG = {"task": "mnli", "agent": "some/agent", "target": "some/target", "data": "hub", "appo": {"kl_coef": 0.2}}


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
    predictions: Sequence[dict[str, Any]] = (),
    candidates: Sequence[dict[str, Any]] = (),
    **result: Any,
) -> str:
    """The page of a run folder written by hand."""
    (folder / "config.yaml").write_text(yaml.safe_dump(CONFIG, sort_keys=False), encoding="utf-8")
    files = {"metrics": metrics, "prompts": prompts, "predictions": predictions, "candidates": candidates}
    for name, rows in files.items():
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
    table = re.search(r"<tbody>(.*?)</tbody>", page.split(heading, 1)[1], re.DOTALL)
    assert table
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", line, re.DOTALL) for line in table[1].split("<tr>")]
    return [[html.unescape(cell) for cell in line] for line in rows if line]


def lines(svg: str) -> list[list[tuple[float, float]]]:
    """The points of each polyline."""
    return [
        [(float(x), float(y)) for x, y in (point.split(",") for point in points.split())]
        for points in re.findall(r'<polyline class="[^"]*" points="([^"]*)"', svg)
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
    assert escaped in page and page.count("<script") == 1 and "<img" not in page


@pytest.mark.parametrize("key", ["agent", "target", "data"])
def test_names_from_the_config_are_escaped(key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIG, key, "<b>&x")  # type: ignore[arg-type]
    page = render(tmp_path)
    assert page.count("&lt;b&gt;&amp;x") >= 2 and "<b>" not in page  # in the first paragraph and in the configuration


def test_a_prompt_keeps_its_characters(tmp_path: Path) -> None:
    text = "Sag »ja«,\n日本 🙂 \u2028 wenn's stimmt"
    assert f"<q>{html.escape(text)}</q>" in render(tmp_path, prompt=text)


def test_the_page_loads_nothing(tmp_path: Path) -> None:
    page = render(tmp_path)
    loading = {"src", "href", "xlink:href", "srcset", "data", "action", "poster", "background", "xmlns"}
    assert [(tag, set(attributes) & loading) for tag, attributes in elements(page) if set(attributes) & loading] == []


@pytest.mark.parametrize("mark", ["http:", "https:", "url(", "@import", "<link", "<iframe"])
def test_the_page_names_nothing_outside_itself(mark: str, tmp_path: Path) -> None:
    assert mark not in render(tmp_path).replace("http://localhost:8000/v1", "")  # in the snippet for a server


def test_the_page_forbids_itself_to_load_anything(tmp_path: Path) -> None:
    policies = [
        a["content"] for tag, a in elements(render(tmp_path)) if a.get("http-equiv") == "Content-Security-Policy"
    ]
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    assert policies == [POLICY] == [f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"]


def test_its_only_script_is_the_one_that_the_policy_names(tmp_path: Path) -> None:
    assert re.findall(r"<script>(.*?)</script>", render(tmp_path), re.DOTALL) == [SCRIPT]


def test_the_page_declares_its_encoding_first_of_all(tmp_path: Path) -> None:
    assert render(tmp_path).index('<meta charset="utf-8">') < 1024  # browsers look no further


# -- what is in it -----------------------------------------------------------------------------------------------


def test_the_page_shows_the_scores_beside_the_manual_prompts(tmp_path: Path) -> None:
    assert cells(render(tmp_path), "<h1>") == [
        ["best prompt, chosen on validation", "0.625 (0.125 to 0.875)", "0.750 (0.125 to 0.875)"],
        ["manual prompt", "0.500 (0.125 to 0.875)", "0.250 (0.125 to 0.875)"],
        ["the paper's protocol: best of the top 5 by training reward, chosen on test", "", "0.875 (0.750 to 1.000)"],
        ["always the most frequent answer", "", "0.375"],
    ]


def test_the_verdict_is_there_in_words(tmp_path: Path) -> None:
    assert f'<p class="verdict better">{RESULT["verdict"]}</p>' in render(tmp_path)


def answered(right: str, before: str, after: str, text: str = "some input", sure: float = 0.75) -> dict[str, Any]:
    """A row of predictions.jsonl of a task with the words yes and no."""

    def side(answer: str) -> dict[str, Any]:
        other = "no" if answer == "yes" else "yes"
        return {"answer": answer, "score": float(answer == right), "probabilities": {answer: sure, other: 1 - sure}}

    return {"row": 0, "input": text, "expected": [right], "manual": side(before), "best": side(after)}


ANSWERED = [
    *[answered("yes", "no", "yes", f"mended {i}", 0.5 + i / 100) for i in range(12)],
    answered("no", "no", "yes", "broken <b>"),
    answered("no", "no", "no", "right all along"),
]


def test_confusion_matrices_count_rows(tmp_path: Path) -> None:
    page = render(tmp_path, predictions=ANSWERED)
    # Right answers: yes 12 times, no twice; rows are right answers, columns the answers given.
    assert cells(page, "under the manual prompt; 14 test rows") == [["yes", "0", "12"], ["no", "0", "2"]]
    assert cells(page, "under the best prompt; 14 test rows") == [["yes", "12", "0"], ["no", "1", "1"]]


def test_a_target_that_names_no_label_word_has_a_column(tmp_path: Path) -> None:
    silent = answered("yes", "no", "yes")
    silent["manual"] |= {"answer": "", "probabilities": {"yes": 0.0, "no": 0.0}}
    page = render(tmp_path, predictions=[*ANSWERED, silent])
    # As above, and one more row whose right answer is yes.
    assert cells(page, "under the manual prompt; 15 test rows") == [["yes", "0", "12", "1"], ["no", "0", "2", "0"]]
    assert cells(page, "under the best prompt; 15 test rows") == [["yes", "13", "0"], ["no", "1", "1"]]


def test_an_answer_that_is_no_label_word_is_in_no_matrix(tmp_path: Path) -> None:
    page = render(tmp_path, predictions=[*ANSWERED, answered("perhaps", "perhaps", "perhaps")])  # edited by hand
    assert cells(page, "under the manual prompt; 15 test rows") == [["yes", "0", "12"], ["no", "0", "2"]]


def test_rows_mended_and_broken_are_listed_those_that_changed_most_first(tmp_path: Path) -> None:
    page = render(tmp_path, predictions=ANSWERED)
    mended, broken = cells(page, "<h3>Mended"), cells(page, "<h3>Broken")
    assert [row[0] for row in mended] == [f"mended {i}" for i in range(11, 1, -1)]
    assert "12 of 14 rows are answered better than under the manual prompt; the 10 that changed most" in page
    assert broken == [["broken <b>", "no", "no (yes 0.25, no 0.75)", "yes (yes 0.75, no 0.25)"]]


def test_an_instruction_for_each_input_is_shown_beside_it(tmp_path: Path) -> None:
    row = answered("yes", "no", "yes")
    row["best"]["prompt"] = "Say yes."
    page = render(tmp_path, predictions=[row], mode="tte", prompt=None, edits=[{"input": "a", "prompt": "b"}])
    assert cells(page, "<h3>Mended")[0][:3] == ["some input", "Say yes.", "yes"]
    assert "All prompts" not in page  # each was judged on one answer


def test_text_has_no_matrix(tmp_path: Path) -> None:
    side = {"answer": "dark", "score": 1.0, "probabilities": {}}
    silent = side | {"answer": "", "score": 0.0}
    row = {"row": 0, "input": "light", "expected": ["dark"], "manual": silent, "best": side}
    page = render(tmp_path, predictions=[row], verbalizer={})
    assert 'class="matrix"' not in page
    assert cells(page, "<h3>Mended") == [["light", "dark", "(nothing)", "dark"]]


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("predictions", {"expected": []}, "'expected'"),
        ("predictions", {"manual": {"answer": "yes"}}, "'probabilities' is missing"),
        ("predictions", {"best": 3}, "'best' is 3"),
        ("candidates", {"validation_interval": [1]}, "two numbers"),
        ("candidates", {"prompt": None}, "'prompt' is None"),
    ],
)
def test_a_file_that_no_run_wrote_is_named(name: str, change: dict[str, Any], message: str, tmp_path: Path) -> None:
    rows = {"predictions": answered("yes", "no", "yes"), "candidates": candidate("a", 0.5)}
    with pytest.raises(RunFolderError, match=rf"{name}.jsonl:1.*{re.escape(message)}"):
        render(tmp_path, **{name: [rows[name] | change]})


def candidate(text: str, score: float, kind: str = "tuned") -> dict[str, Any]:
    interval = {"validation_score": score, "validation_interval": [0.0, 1.0], "validation_rows": 32}
    return {"prompt": text, "kind": kind, "reward": None if kind == "manual" else 2.0, **interval}


def test_candidates_are_shown_with_their_scores_on_validation(tmp_path: Path) -> None:
    rows = [candidate("a", 0.75), candidate("by hand", 0.5, "manual")]
    assert cells(render(tmp_path, candidates=rows), "<h2>Candidates") == [
        ["a", "tuned", "2.000", "0.750 (0.000 to 1.000)"],
        ["by hand", "manual", "", "0.500 (0.000 to 1.000)"],
    ]


def test_candidates_of_a_race_are_shown_with_their_rows(tmp_path: Path) -> None:
    page = render(tmp_path, candidates=[candidate("a", 0.75), candidate("b", 0.875) | {"validation_rows": 8}])
    assert [row[-1] for row in cells(page, "<h2>Candidates")] == ["32", "8"]
    assert "Raced on validation rows: those with most rows first" in page and "Scored on all" not in page
    page = render(tmp_path, candidates=[candidate("a", 0.75)])
    assert "Scored on all 32 validation rows, best first" in page


CHOICE = ("chosen on validation", "best of the top", "what to expect", "How it went", "not measured", "0 iterations")


@pytest.mark.parametrize("arm", get_args(ArmName))
def test_a_page_is_titled_by_its_arm(arm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIG, "arm", arm)
    page = render(tmp_path, (), (), candidates=[candidate("a", 0.75)], expected_on_new_rows=0.5)
    assert f"<h1>mnli: {TITLES[arm]}</h1>" in page and ("APPO</h1>" in page) == (arm == "appo")
    assert [part in page for part in CHOICE] == [arm not in GIVEN] * len(CHOICE)


def test_the_manual_prompt_is_not_compared_with_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(CONFIG, "arm", "manual")
    page = render(tmp_path, (), (), chosen="manual", verdict="no prompt better than the manual one was found")
    assert "no prompt better" not in page
    assert [name for name, *_ in cells(page, "</h1>")] == ["manual prompt", "always the most frequent answer"]
    monkeypatch.setitem(CONFIG, "arm", "empty")
    assert cells(render(tmp_path, (), ()), "</h1>")[0][0] == "the arm's prompt"


def test_a_copied_prompt_and_a_one_sided_target_are_warned_of(tmp_path: Path) -> None:
    shares = {"best": {"no": 0.05, "yes": 0.95}, "manual": {"no": 1.0, "yes": 0.0}, "right": {"no": 0.5, "yes": 0.5}}
    copied = [prompt("Is it so?") | {"overlap": 0.5}]
    page = render(tmp_path, prompts=copied, answers_on_test=shares)
    assert "50% of the prompt&#x27;s runs of four words come from training inputs" in page
    assert "the target answers &#x27;yes&#x27; to 95% of the test rows" in page
    assert 'class="warning"' not in render(tmp_path).split("<main>")[1]


@pytest.mark.parametrize(
    ("data", "target", "told"),
    [
        ("lab", "lab", None),
        ("hub", "a/model", None),
        ("hub", "lab", "target lab: toy models that only know the lab"),
        ("lab", "a/model", "what target a/model scores on it says nothing about the real task"),
    ],
)
def test_toys_beside_what_is_real_are_warned_of(
    data: str, target: str, told: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIG, "data", data)  # type: ignore[arg-type]
    monkeypatch.setitem(CONFIG, "target", target)  # type: ignore[arg-type]
    page = render(tmp_path)
    assert told in page if told else 'class="warning"' not in page.split("<main>")[1]


def test_a_collapse_during_the_run_is_warned_of(tmp_path: Path) -> None:
    metrics = [row(1), row(2) | {"empty_rate": 1.0}, row(3) | {"empty_rate": 1.0}]
    assert "Iteration 2: nearly all prompts are empty" in render(tmp_path, metrics)


def test_the_cost_is_added_up(tmp_path: Path) -> None:
    phases = {"sampling_seconds": 1.0, "scoring_seconds": 2.0, "update_seconds": 4.0, "review_seconds": 2.5}
    spent = {"seconds": 10.0, **phases, "answers": 100.0, "tokens": 50}
    page = render(tmp_path, [row(1) | spent, row(2) | spent])
    assert "20 s of training; 100 tokens in 1 prompts, 200 answers of the target" in page
    assert cells(page, "Seconds of training") == [
        ["sampling", "2", "10%"],
        ["scoring", "4", "20%"],
        ["update", "8", "40%"],
        ["review", "5", "25%"],
        ["the rest", "1", "5%"],
    ]


def test_the_code_for_using_the_result_compiles(tmp_path: Path) -> None:
    text = "Say \"yes\"\nor 'no' {x}"
    blocks = re.findall(r"<h3>With [^<]*</h3><pre>(.*?)</pre>", render(tmp_path, prompt=text), re.DOTALL)
    assert len(blocks) == 2
    for block in map(html.unescape, blocks):
        compile(block, "snippet", "exec")
        assert repr(text) in block


def test_the_command_that_uses_the_result_names_the_folder_where_the_run_lies_now(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CONFIG, "run", "runs/where-it-was-made")
    assert f"appo prompt --run {tmp_path} --input" in html.unescape(render(tmp_path))


def test_the_code_that_uses_the_labs_target_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = load_spec("mnli").manual_prompt
    page = render(tmp_path, prompt=text, target="lab")
    (block,) = re.findall(r"<h3>With [^<]*</h3><pre>(.*?)</pre>", page, re.DOTALL)
    exec(compile(html.unescape(block), "snippet", "exec"), {})
    answer = capsys.readouterr().out
    assert answer.split()[0] in load_spec("mnli").verbalizer.values()


def test_the_code_fills_a_template_with_other_braces(tmp_path: Path) -> None:
    result = {"template": '{"a": 1} {prompt} Input : {input}', "prompt": "say {x}, {input}", "target": "some/target"}
    for _, code in snippets(result, "r", {})[1:]:
        lines = code.splitlines()
        names: dict[str, str] = {}
        exec("\n".join(line for line in lines if line.startswith(("template", "text"))), names)
        assert names["text"] == '{"a": 1} say {x}, {input} Input : ...'


def test_the_code_asks_a_chat_target_in_a_chat() -> None:
    result = {"template": "{prompt} {input}", "prompt": "p", "target": "http://host:1"}  # a server with one model only
    ((_, command), (_, code)) = snippets(result, "my runs/x", {"target_chat": True})
    assert command == "appo prompt --run 'my runs/x' --input \"...\" --answer"
    assert "model=client.models.list().data[0].id, messages=" in code and "client.chat.completions.create(" in code
    compile(code, "snippet", "exec")
    (_, local), (_, served) = snippets(result | {"target": "some/target"}, "r", {"target_chat": True})[1:]
    for block in (local, served):
        compile(block, "snippet", "exec")
        assert '[{"role": "user", "content": text}]' in block


def test_the_code_cuts_text_answers_as_the_run_did() -> None:
    result = {"template": "{prompt} {input}", "prompt": "p", "target": "some/target", "metric": "f1"}
    for _, code in snippets(result, "r", {"reward": {"answer_tokens": 30}})[1:]:
        assert "tokens=30" in code
        names: dict[str, str] = {"answer": " first line\nInput : another"}
        exec(code.splitlines()[-1].replace("print(", "found = (", 1), names)
        assert names["found"] == "first line"
    assert all("tokens=8" in code for _, code in snippets(result | {"metric": "accuracy"}, "r", {})[1:])


def test_what_differs_from_the_defaults_comes_first(tmp_path: Path) -> None:
    rows = cells(render(tmp_path), "What differs from the defaults")
    assert ["appo.kl_coef", "0.2", "0.05"] in rows and not any(key == "prompts" for key, *_ in rows)


def test_the_look_before_training_is_quoted(tmp_path: Path) -> None:
    (tmp_path / "headroom.json").write_text(json.dumps({"lines": ["headroom: much", "  <b>verdict</b>"]}))
    assert "<p>headroom: much</p><p>&lt;b&gt;verdict&lt;/b&gt;</p>" in render(tmp_path).replace("\n", "")


def test_the_page_says_what_was_run(tmp_path: Path) -> None:
    page = render(tmp_path, [row(1), row(2), row(3)], [prompt("a"), prompt("b")])
    assert "3 iterations, 2 prompts scored, seed 7, agent some/agent, target some/target, data hub</p>" in page


def test_the_page_holds_the_configuration(tmp_path: Path) -> None:
    block = re.search(r"All keys</summary><pre>(.*?)</pre>", render(tmp_path), re.DOTALL)
    assert block and yaml.safe_load(html.unescape(block[1])) == CONFIG


def test_prompts_are_shown_once_best_first_at_their_best(tmp_path: Path) -> None:
    prompts = [prompt("a", 1.0, 1), prompt("b", 3.0, 1), prompt("a", 2.0, 2), prompt("c", 2.5, 3), prompt("a", 0.5, 4)]
    assert cells(render(tmp_path, prompts=prompts), "All prompts") == [
        ["b", "1", "3.000"],
        ["c", "3", "2.500"],
        ["a", "2", "2.000"],
    ]


def test_a_long_run_stays_a_small_page(tmp_path: Path) -> None:
    metrics = [row(i, anchor="promote" if i % 5 == 0 else None) for i in range(1, 501)]
    prompts = [prompt(f"number {i} " + "word " * 30, float(i)) for i in range(16_000)]
    page = render(tmp_path, metrics, prompts)
    assert len(page.encode()) < 1_500_000 and "The best 200 of 16000 distinct prompts" in page


def test_every_anchor_review_is_a_row_with_both_means(tmp_path: Path) -> None:
    metrics = [row(1), row(2, anchor="promote"), row(3, anchor="keep"), row(4, anchor="rollback")]
    assert cells(render(tmp_path, metrics), "<h2>Anchor reviews") == [
        ["promote: as the scores say", "2", "0.625 (n = 2)", "0.250 (n = 2)"],
        ["keep: as the scores say", "3", "0.625 (n = 2)", "0.250 (n = 2)"],
        ["rollback: as the scores say", "4", "0.625 (n = 2)", "0.250 (n = 2)"],
    ]


def test_a_run_without_reviews_says_so(tmp_path: Path) -> None:
    assert '<h2>Anchor reviews</h2>\n<p class="muted">None in this run.</p>' in render(tmp_path)


# -- charts ------------------------------------------------------------------------------------------------------


def test_there_is_a_chart_for_every_curve_with_data(tmp_path: Path) -> None:
    assert render(tmp_path).count('role="img"') == len(CURVES)


def test_the_scores_of_reviews_are_a_chart_of_their_own(tmp_path: Path) -> None:
    page = render(tmp_path, [row(1), row(2, anchor="keep"), row(3)])
    chart = page.split("Validation scores at the anchor")[1].split("</figure>")[0]
    assert (chart.count('class="dot one"'), chart.count('class="dot two"'), chart.count('class="mean')) == (2, 2, 2)


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
    assert (page.count('role="img"'), page.count("not measured in this run")) == (left, len(CURVES) - left)


def test_a_column_that_begins_late_is_drawn_from_there(tmp_path: Path) -> None:
    late = {key: value for key, value in row(1).items() if key != "kl"}
    page = render(tmp_path, [late, row(2), row(3)])
    chart = page.split("<figcaption>KL to the anchor")[1].split("</figure>")[0]
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
    (line,) = lines(line_chart("c", "u", [Curve([(3, 0.0), (5, 1.0), (7, 0.5)], "c", "line")]))
    assert [x for x, _ in line] == [LEFT, (LEFT + WIDTH - RIGHT) / 2, WIDTH - RIGHT]


def test_larger_values_stand_higher_and_in_proportion() -> None:
    (line,) = lines(line_chart("c", "u", [Curve([(1, 0.0), (2, 1.0), (3, 0.25)], "c", "line")]))
    low, high, quarter = (y for _, y in line)
    # SVG counts from the top; coordinates are rounded to 0.1.
    assert high < low and abs((low - quarter) - (low - high) / 4) <= 0.1


def test_curves_of_one_chart_share_their_scale() -> None:
    both = [Curve([(1, 1.0), (2, 2.0)], "a", "line"), Curve([(1, 2.0), (2, 1.0)], "b", "line")]
    one, other = lines(line_chart("c", "u", both))
    assert ([y for _, y in one], [x for x, _ in one]) == ([y for _, y in reversed(other)], [x for x, _ in other])


@given(st.floats(-1e6, 1e6), st.one_of(st.just(0.0), st.floats(1e-3, 1e9), st.floats(0, 1e-30)))
def test_ticks_are_round_and_hold_the_data(low: float, wide: float) -> None:
    found = ticks(low, low + wide)
    step = found[1] - found[0]
    slack = 1e-6 * step + 1e-12 * max(abs(low), abs(low + wide))
    assert found[0] <= low + slack and found[-1] >= low + wide - slack
    assert 2 <= len(found) <= 8
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-5)
    assert min(abs(mantissa - round_one) for round_one in (1, 2, 5)) < 1e-4


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.0, 1.0, ["0.0", "0.2", "0.4", "0.6", "0.8", "1.0"]),
        (20.0, 25.0, ["20", "21", "22", "23", "24", "25"]),
        (0.257, 0.31, ["0.24", "0.26", "0.28", "0.30", "0.32"]),
        (-3.0, 7.0, ["\N{MINUS SIGN}4", "\N{MINUS SIGN}2", "0", "2", "4", "6", "8"]),
    ],
)
def test_ticks_as_text(low: float, high: float, expected: list[str]) -> None:
    found = ticks(low, high)
    assert [shown(value, found[1] - found[0]) for value in found] == expected


def test_both_axes_have_titles() -> None:
    chart = line_chart("KL", "nats a prompt", [Curve([(1, 20.0), (2, 25.0)], "c", "line")])
    assert re.findall(r'<text class="axis"[^>]*>([^<]*)<', chart) == ["iteration", "nats a prompt"]


def test_a_picture_says_what_it_shows() -> None:
    chart = line_chart("KL", "nats", [Curve([(1, 20.0), (7, 25.0)], "c", "line")])
    assert 'aria-label="KL: from 20 in iteration 1 to 25 in 7"' in chart


def test_reviews_stand_at_their_iteration_and_differ_in_shape() -> None:
    curves = [Curve([(0, 0.0), (10, 1.0)], "c", "line")]
    up, down = (line_chart("c", "u", curves, [Mark(5, kind)]) for kind in ("promote", "rollback"))
    middle = (LEFT + WIDTH - RIGHT) / 2
    for kind, chart in (("promote", up), ("rollback", down)):
        assert f'<line class="mark {kind}" x1="{middle}" x2="{middle}"' in chart
    assert re.findall(r' d="(M[^"]*)"', up) != re.findall(r' d="(M[^"]*)"', down)
    assert "<title>promoted after iteration 5</title>" in up and "<title>rolled back after iteration 5</title>" in down


@pytest.mark.parametrize(("anchor", "count"), [("promote", 1), ("rollback", 1), ("keep", 0)])
def test_only_decisions_that_changed_something_are_marked(anchor: str, count: int, tmp_path: Path) -> None:
    page = render(tmp_path, [row(1), row(2, anchor=anchor), row(3)])
    charts = len(CURVES) + 1  # the last is that of the reviews
    assert page.split("<main>")[1].count('<line class="mark') == count * charts


def test_the_strong_line_is_the_mean_over_the_last_ten(tmp_path: Path) -> None:
    values = [float((7 * i) % 13) for i in range(25)]  # no two neighbours alike
    page = render(tmp_path, [row(i, value) for i, value in enumerate(values)])
    faint, strong = lines(page.split("<figcaption>Value loss")[1].split("</figure>")[0])
    ys = [y for _, y in faint]
    means = [sum(ys[max(0, i - 9) : i + 1]) / len(ys[max(0, i - 9) : i + 1]) for i in range(25)]
    # The scale is linear, so heights can be averaged; both sides are rounded to 0.1, each off by at most 0.05.
    assert max(abs(y - mean) for (_, y), mean in zip(strong, means, strict=True)) <= 0.1


def test_a_legend_names_every_line(tmp_path: Path) -> None:
    figure = render(tmp_path).split("<figcaption>Reward")[1].split("</figure>")[0]
    named = ["best, over the last 10", "mean, over the last 10", "single iterations"]
    assert re.findall(r"</svg>([^<]*)</span>", figure) == named


def test_a_run_without_result_is_shown_as_far_as_it_came(tmp_path: Path) -> None:
    render(tmp_path)
    (tmp_path / "best_prompt.json").unlink()
    config = yaml.safe_dump(CONFIG | {"seed": 3})
    (tmp_path / "config.yaml").write_text(config, encoding="utf-8")
    page = render_report(tmp_path, "accuracy")
    assert "stopped before its end" in page and "<svg" in page and "seed 3" in page
    assert "<p>The prompt of the highest training reward so far:</p>" in page and "<q>Is it so?</q>" in page
    rows = [
        json.dumps({"iteration": 1, "prompt": text, "reward": reward}) for text, reward in (("", 9.0), ("Say.", 1.0))
    ]
    (tmp_path / "prompts.jsonl").write_text("\n".join([*rows, ""]), encoding="utf-8")
    page = render_report(tmp_path, "accuracy")
    assert 'so far:</p><div class="prompt"><q>Say.</q>' in page  # no result is an empty prompt
