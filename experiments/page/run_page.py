"""The page of one run, finished or stopped, made from the files in its folder and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from experiments.config import GIVEN, RunConfig, flat, on_toys, to_dict
from experiments.config.strict import LARGEST, read_yaml
from experiments.diagnostics.records import mean
from experiments.page.answers import answers_section
from experiments.page.charts import MARKS, WINDOW, Curve, Dot, Mark, line_chart, running_mean, sign, strip_chart, swatch
from experiments.page.html import code, document, figure, prompt, search, table
from experiments.page.use import snippets
from experiments.run.folder import (
    CONFIG,
    METRICS,
    PHASES,
    PROMPTS,
    RESULT,
    read_candidates,
    read_headroom,
    read_optional,
    read_predictions,
    read_result,
)
from experiments.terminal.console import WARNINGS

LONGEST = 10**9  # rows from this iteration number on are not read
MOST_CANDIDATES = 10  # are shown at once, the others on a click
MOST_PROMPTS = 200  # of the best by training reward are listed
COPIED = 0.2  # share of a prompt's word runs found in training inputs from which the page warns
ONE_SIDED = 0.9  # share of one answer from which the page warns
TITLES = {  # by arm
    "appo": "a prompt tuned with APPO",
    "ppo": "a prompt tuned with PPO",
    "rlhf": "a prompt tuned with PPO, KL against the initial agent",
    "none": "a prompt tuned with PPO, no KL penalty",
    "reinforce": "a prompt tuned with REINFORCE",
    "grpo": "a prompt tuned with GRPO",
    "frozen": "prompts of an untrained agent",
    "paraphrase": "a prompt found by paraphrasing",
    "edits": "a prompt found by edits of phrases",
    "manual": "the manual prompt",
    "empty": "no prompt",
    "few_shot": "the manual prompt with examples",
    "step_by_step": "the manual prompt, step by step",
}


class Shown(NamedTuple):
    """A chart: its title, what it shows, the title of its axis, and columns of metrics.jsonl with their names."""

    title: str
    caption: str
    unit: str
    columns: tuple[tuple[str, str], ...]


CURVES = (
    Shown("Score", "on the iteration's training examples", "{metric}", (("{metric}_mean", "mean of its prompts"),)),
    Shown("Reward", "of the iteration's prompts", "reward", (("reward_max", "best"), ("reward_mean", "mean"))),
    Shown("KL to the anchor", "how far the agent has moved from its anchor", "nats a prompt", (("kl", "mean"),)),
    Shown("Entropy", "near 0 the agent writes the same prompt again and again", "nats a token", (("entropy", "mean"),)),
    Shown("Prompt length", "of the iteration's prompts", "tokens", (("length_mean", "mean"),)),
    Shown("Value loss", "half squared error of the value head", "loss", (("value_loss", "mean"),)),
)


def render_report(folder: Path, metric: str) -> str:
    """The HTML page of a run, built from its folder; `metric` names the score that prompts are judged by.

    Raises:
        RunFolderError: a file in the folder is not what a run writes.
    """
    config = read_yaml(folder / CONFIG)
    metrics, prompts = (iterations_of(folder / name) for name in (METRICS, PROMPTS))
    candidates, predictions = read_candidates(folder), read_predictions(folder)
    result = read_result(folder) if (folder / RESULT).is_file() else None
    described = config | (result or {})
    edited = described.get("mode") == "tte"
    words = list(dict.fromkeys((result or {}).get("verbalizer", {}).values())) or _letters(predictions)
    arm = str(config.get("arm", "appo"))
    title = f"{described.get('task')}: {TITLES.get(arm, arm)}"
    about = [f"{key} {described.get(key)}" for key in ("seed", "agent", "target", "data")]
    if given := arm in GIVEN:  # nothing was searched for and nothing chosen
        candidates = []
    else:
        about = [f"{len(metrics)} iterations", f"{len(prompts)} prompts scored", *about]
    looked = read_headroom(folder)
    return document(
        title,
        [
            f"<h1>{escape(title)}</h1>",
            f'<p class="muted">{escape(", ".join(about))}</p>',
            *(_answer(result, given) if result else _so_far([] if edited else prompts)),
            *(f'<p class="warning">{escape(line)}</p>' for line in _warnings(config, result, metrics, prompts)),
            *(["<h2>Before training</h2>", *(f"<p>{escape(line.strip())}</p>" for line in looked)] if looked else []),
            *([] if given else ["<h2>How it went</h2>", *_curves(metrics, metric)]),
            *answers_section(predictions, words, edited),
            *_candidates(candidates),
            *([] if edited else _pool(prompts)),
            *([] if given else _reviews(metrics, metric)),
            *_cost(metrics, prompts),
            *_use(result, str(folder), config),
            *_configuration(config),
        ],
    )


# -- the answer --------------------------------------------------------------------------------------------------


def _answer(result: Mapping[str, Any], given: bool) -> list[str]:
    """What the run found: the verdict, the prompt, and its scores beside the manual prompt's.

    Args:
        result: of the run.
        given: the arm gave the prompt, so there was no choice to tell of.
    """
    manual = given and result["chosen"] == "manual"
    kind = next((word for word in ("better", "worse") if result["verdict"].startswith(word)), "")
    parts = [] if manual else [f'<p class="verdict {kind}">{escape(result["verdict"])}</p>']
    if result["prompt"] is None:
        best = "an instruction for each input"
        edits = [f"<p>{escape(edit['input'])}</p>{prompt(edit['prompt'])}" for edit in result["edits"]]
        parts += ["<p>The agent writes an instruction for each input, for example:</p>", *edits]
    else:
        best = "the arm's prompt" if given else "best prompt, chosen on validation"
        parts.append(prompt(result["prompt"]))
    rows = [
        (name, score(result, f"{which}validation"), score(result, f"{which}test"))
        for name, which in (*([] if manual else [(best, "")]), ("manual prompt", "manual_"))
    ]
    if (protocol := result.get("paper_protocol")) and not given:
        rows.append((f"the paper's protocol: {protocol['name']}", "", score(protocol, "test")))
    if result.get("expected_on_new_rows") is not None and not given:
        expected = number(result["expected_on_new_rows"])
        rows.append(("what to expect of a prompt chosen on half of the validation rows, on the others", expected, ""))
    if result.get("chance") is not None:
        rows.append(("always the most frequent answer", "", number(result["chance"])))
    splits = [f"{split} ({result[f'{split}_rows']} rows)" for split in ("validation", "test")]
    caption = f"{result['metric']}, with 95 % intervals"
    return [
        *parts,
        table(caption, ("", *splits), rows),
        f'<p class="muted">Manual prompt: {escape(result["manual_prompt"])}</p>',
    ]


def _so_far(prompts: Sequence[Mapping[str, Any]]) -> list[str]:
    best = [text for text, _, _ in _best_first(prompts) if text][:1]
    return [
        "<p>The run was stopped before its end; this is how far it came. It has no test score.</p>",
        *(f"<p>The prompt of the highest training reward so far:</p>{prompt(text)}" for text in best),
    ]


def _warnings(
    config: Mapping[str, Any],
    result: Mapping[str, Any] | None,
    metrics: Sequence[Mapping[str, Any]],
    prompts: Sequence[Mapping[str, Any]],
) -> list[str]:
    """What a reader should know before trusting the numbers."""
    toys = on_toys(*(str(config.get(key)) for key in ("task", "data", "agent", "target")))
    found = [toys] if toys else []
    for name, bound, words in WARNINGS:
        first = next((row for row in metrics if (_finite(row.get(name)) or 0.0) >= bound), None)
        if first:
            found.append(f"Iteration {first['iteration']}: {words}")
    if result is None:
        return found
    copied = next((_finite(row.get("overlap")) for row in prompts if row.get("prompt") == result["prompt"]), None)
    if copied and copied >= COPIED:
        found.append(
            f"{copied:.0%} of the prompt's runs of four words come from training inputs: it may work by their examples "
            "and not as an instruction."
        )
    if spread := result.get("answers_on_test"):
        word, share = max(spread["best"].items(), key=lambda item: item[1] or 0.0)
        if (share or 0.0) >= ONE_SIDED > (spread["right"][word] or 0.0):
            found.append(f"Under this prompt the target answers {word!r} to {share:.0%} of the test rows.")
    return found


# -- how it went -------------------------------------------------------------------------------------------------


def _curves(metrics: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    marks = _marks(metrics)
    figures = [_validation(metrics, metric, marks)]
    for shown in CURVES:
        curves, legend = [], []
        for (column, name), style in zip(shown.columns, ("two", "one")[-len(shown.columns) :], strict=True):
            points = points_of(metrics, column.format(metric=metric))
            if points:
                curves += [
                    Curve(points, name, f"line faint {style}"),
                    Curve(running_mean(points), name, f"line {style}"),
                ]
                legend.append(f"<span>{swatch(f'line {style}')}{escape(name)}, over the last {WINDOW}</span>")
        unit = shown.unit.format(metric=metric)
        if curves:
            legend.append(f"<span>{swatch('line faint one')}single iterations</span>")
            figures.append(
                _figure(shown.title, shown.caption, line_chart(shown.title, unit, curves, marks), legend, marks)
            )
        else:
            figures.append(
                f"<figure><figcaption>{escape(shown.title)}</figcaption><p>not measured in this run</p></figure>"
            )
    return ['<div class="curves">', *figures, "</div>"]


def _validation(metrics: Sequence[Mapping[str, Any]], metric: str, marks: Sequence[Mark]) -> str:
    """The single scores of every review."""
    dots = [
        Dot(float(row["iteration"]), score, side)
        for row in metrics
        for side, key in (("anchor", "anchor_scores"), ("agent", "policy_scores"))
        for score in _numbers(_review(row).get(key))
    ]
    if not dots:
        return ""
    legend = [f"<span>{sign('agent')}the agent's prompts</span>", f"<span>{sign('anchor')}the anchor's</span>"]
    ends = (float(metrics[0]["iteration"]), float(metrics[-1]["iteration"]))
    chart = strip_chart("Validation scores at the anchor's reviews", f"{metric} on validation", dots, ends, marks)
    return _figure("Validation", "at the anchor's reviews; bars are means", chart, legend, marks)


def _figure(title: str, caption: str, chart: str, legend: Sequence[str], marks: Sequence[Mark]) -> str:
    kinds = [kind for kind in MARKS if any(mark.kind == kind for mark in marks)]
    signs = "".join(f"<span>{sign(kind)}{MARKS[kind]}</span>" for kind in kinds)
    return figure(title, caption, f'<div class="legend">{"".join(legend)}{signs}</div>{chart}')


def _reviews(metrics: Sequence[Mapping[str, Any]], metric: str) -> list[str]:
    rows = []
    for row in metrics:
        review = _review(row)
        if row.get("anchor") and review:
            sides = [_numbers(review.get(side)) for side in ("policy_scores", "anchor_scores")]
            reason = f"{row['anchor']}: {review.get('reason', '')}"
            rows.append(
                (reason, str(row["iteration"]), *(f"{number(_finite(mean(side)))} (n = {len(side)})" for side in sides))
            )
    if not rows:
        return ["<h2>Anchor reviews</h2>", '<p class="muted">None in this run.</p>']
    caption = f"Mean {metric} on validation of the prompts that each side wrote"
    return ["<h2>Anchor reviews</h2>", table(caption, ("decision", "iteration", "agent", "anchor"), rows)]


# -- prompts -----------------------------------------------------------------------------------------------------


def _candidates(candidates: Sequence[Mapping[str, Any]]) -> list[str]:
    """The prompts that the choice was made among."""
    if not candidates:
        return []
    rows = [
        [str(row.get("prompt")), str(row.get("kind")), number(_finite(row.get("reward"))), score(row, "validation")]
        for row in candidates
    ]
    header, counts = ["prompt", "kind", "training reward", "validation"], [row["validation_rows"] for row in candidates]
    caption = f"Scored on all {counts[0]} validation rows, best first; 95 % intervals"
    if len(set(counts)) > 1:
        rows, header = [[*row, str(count)] for row, count in zip(rows, counts, strict=True)], [*header, "rows"]
        caption = "Raced on validation rows: those with most rows first, then best first; 95 % intervals"
    parts = ["<h2>Candidates</h2>", table(caption, header, rows[:MOST_CANDIDATES], texts=2)]
    if rest := rows[MOST_CANDIDATES:]:
        folded = table(f"The other {len(rest)} candidates", header, rest, texts=2)
        parts.append(f"<details><summary>The other {len(rest)} candidates</summary>{folded}</details>")
    return parts


def _pool(prompts: Sequence[Mapping[str, Any]]) -> list[str]:
    """All prompts, best first."""
    best = _best_first(prompts)
    if not best:
        return []
    rows = [(text, str(iteration), number(reward)) for text, reward, iteration in best[:MOST_PROMPTS]]
    caption = f"The best {len(rows)} of {len(best)} distinct prompts by their highest training reward"
    listed = table(caption, ("prompt", "iteration", "best reward"), rows, name="prompts")
    return [
        "<h2>All prompts</h2>",
        f"<details><summary>{escape(caption)}</summary>{search('prompts', 'prompts')}{listed}</details>",
    ]


def _best_first(prompts: Sequence[Mapping[str, Any]]) -> list[tuple[str, float, int]]:
    """(prompt, highest reward, its iteration) of every distinct prompt."""
    best: dict[str, tuple[float, int]] = {}
    for row in prompts:
        text, reward = str(row.get("prompt")), _finite(row.get("reward"))
        if reward is not None and (text not in best or reward > best[text][0]):
            best[text] = (reward, row["iteration"])
    return [(text, *found) for text, found in sorted(best.items(), key=lambda item: -item[1][0])]


# -- cost, use, configuration ------------------------------------------------------------------------------------


def _cost(metrics: Sequence[Mapping[str, Any]], prompts: Sequence[object]) -> list[str]:
    def total(column: str) -> float:
        return sum(_numbers([row.get(column) for row in metrics]))

    if not (seconds := total("seconds")):
        return []
    spent = {phase: total(f"{phase}_seconds") for phase in PHASES}
    spent["the rest"] = seconds - sum(spent.values())
    rows = [(phase, f"{part:.0f}", f"{part / seconds:.0%}") for phase, part in spent.items()]
    counted = f"{total('tokens'):.0f} tokens in {len(prompts)} prompts, {total('answers'):.0f} answers of the target"
    if asked := total("requests"):
        counted += f"; {asked:.0f} requests to its server with {total('prompt_tokens'):.0f} tokens of prompts"
    return [
        "<h2>Cost</h2>",
        f"<p>{seconds:.0f} s of training; {counted}, reviews included in the answers only.</p>",
        table("Seconds of training", ("part", "seconds", "share"), rows),
    ]


def _use(result: Mapping[str, Any] | None, folder: str, config: Mapping[str, Any]) -> list[str]:
    if result is None or "template" not in result:
        return []
    shown = [f"<h3>{escape(title)}</h3>{code(text)}" for title, text in snippets(result, folder, config)]
    return ["<h2>Use it</h2>", *shown]


def _configuration(config: Mapping[str, Any]) -> list[str]:
    """What differs from the defaults, then everything."""
    defaults = flat(to_dict(RunConfig()))
    differing = [
        (key, str(value), str(defaults[key]))
        for key, value in flat(config).items()
        if key in defaults and defaults[key] != value  # what a run adds, such as versions, is under "All keys"
    ]
    return [
        "<h2>Configuration</h2>",
        table("What differs from the defaults", ("key", "value", "default"), differing, texts=3) if differing else "",
        "<details><summary>All keys</summary>"
        + code(yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True))
        + "</details>",
    ]


# -- reading -----------------------------------------------------------------------------------------------------


def score(row: Mapping[str, Any], name: str) -> str:
    """A score with its interval."""
    low, high = row.get(f"{name}_interval") or (None, None)
    shown = number(_finite(row.get(f"{name}_score")))
    return shown if low is None else f"{shown} ({number(low)} to {number(high)})"


def number(value: float | None) -> str:
    """Three decimals; nothing for None."""
    return "" if value is None else f"{value:.3f}"


def _marks(metrics: Sequence[Mapping[str, Any]]) -> list[Mark]:
    return [Mark(float(row["iteration"]), str(row["anchor"])) for row in metrics if str(row.get("anchor")) in MARKS]


def points_of(metrics: Sequence[Mapping[str, Any]], column: str) -> list[tuple[float, float]]:
    """(iteration, number) of every row that has a number in this column."""
    return [(float(row["iteration"]), y) for row in metrics if (y := _finite(row.get(column))) is not None]


def _review(row: Mapping[str, Any]) -> Mapping[str, Any]:
    review = row.get("review")
    return review if isinstance(review, Mapping) else {}


def _letters(predictions: Sequence[Mapping[str, Any]]) -> list[str]:
    """The letters of a task with choices, in order; none where answers are text."""
    return sorted({word for row in predictions for word in row["manual"]["probabilities"]})


def _numbers(values: object) -> list[float]:
    listed = values if isinstance(values, list) else []
    return [number for value in listed if (number := _finite(value)) is not None]


def _finite(value: object) -> float | None:
    """The value if it is a number that can be drawn, else None; null, for example, stands for NaN."""
    return float(value) if isinstance(value, int | float) and abs(value) <= LARGEST[float] else None


def iterations_of(path: Path) -> list[dict[str, Any]]:
    """The rows of a .jsonl file that belong to an iteration; none if the run was stopped before its first."""
    return [
        row for row in read_optional(path) if isinstance(row.get("iteration"), int) and 0 <= row["iteration"] < LONGEST
    ]
