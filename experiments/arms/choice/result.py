"""The parts that every arm's result has: scores beside the manual prompt's, answers, and what its use requires."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from experiments.run.run import Run
from experiments.run.statistics import compared, interval, paired_interval, paired_p
from tasks.spec import SPLITS, Example

NO_BETTER = "no prompt better than the manual one was found"


class Outcome(NamedTuple):
    """What a run found.

    Attributes:
        result: the content of best_prompt.json.
        candidates: the prompts among which the result was chosen, with their validation scores, best first.
        predictions: the target's answers to every test row, under the manual prompt and under the prompt found.
    """

    result: dict[str, Any]
    candidates: list[dict[str, Any]]
    predictions: list[dict[str, Any]]


class Answers(NamedTuple):
    """The target's answers to N examples under some prompts: their scores [N], and a record of each answer."""

    values: Tensor
    records: list[dict[str, Any]]


def answers(run: Run, prompts: Sequence[str], examples: Sequence[Example]) -> Answers:
    """Returns the target's answer to each example under its own prompt; scores are NaN if logits are not finite."""
    inputs, choices = [example.input for example in examples], [example.choices for example in examples]
    replies = run.reward.reply(prompts, inputs, choices)
    values = [
        run.reward.right(reply.answer, example) if reply.sound else math.nan
        for reply, example in zip(replies, examples, strict=True)
    ]
    records = [
        {"answer": reply.answer, "score": value, "probabilities": reply.probabilities}
        for reply, value in zip(replies, values, strict=True)
    ]
    return Answers(torch.tensor(values, device="cpu"), records)


def predictions(
    examples: Sequence[Example], manual: Answers, best: Answers, words: Sequence[str]
) -> list[dict[str, Any]]:
    """Returns the rows of predictions.jsonl; `words` are the label words, empty if the target writes text."""
    return [
        {"row": i, "input": example.input, "expected": _expected(example, words), "manual": before, "best": after}
        for i, (example, before, after) in enumerate(zip(examples, manual.records, best.records, strict=True))
    ]


def _expected(example: Example, words: Sequence[str]) -> list[str]:
    """Returns every answer that counts as right."""
    return list(example.answers) or [example.answer, *(words[also] for also in example.also)]


def shares(given: Sequence[str], words: Sequence[str]) -> dict[str, float]:
    """Returns each label word's share of the answers."""
    return {word: given.count(word) / len(given) for word in words}


def scores(best: Mapping[str, Tensor], manual: Mapping[str, Tensor]) -> dict[str, Any]:
    """Compares the result with the manual prompt: means, intervals, difference, p-value and verdict.

    Args:
        best: split -> the result's score on each row.
        manual: split -> the manual prompt's score on each row.
    """
    same = torch.equal(best["validation"], manual["validation"]) and torch.equal(best["test"], manual["test"])
    found: dict[str, Any] = {}
    for split in SPLITS[1:]:
        found |= split_scores(split, best[split], manual[split])
    of_best, of_manual = best["test"].tolist(), manual["test"].tolist()
    found["difference"] = best["test"].double().mean().item() - manual["test"].double().mean().item()
    found["difference_interval"] = paired_interval(of_best, of_manual)
    found["p"] = paired_p(of_best, of_manual)
    found["verdict"] = NO_BETTER if same else compared(of_best, of_manual)
    return found


def split_scores(split: str, best: Tensor, manual: Tensor) -> dict[str, Any]:
    """Returns the number of rows, and mean and interval of both prompts, from their scores on each row of a split."""
    found: dict[str, Any] = {f"{split}_rows": len(best)}
    for name, values in ((split, best), (f"manual_{split}", manual)):
        found[f"{name}_score"] = values.double().mean().item()
        found[f"{name}_interval"] = interval(values.tolist())
    return found


def chance(examples: Sequence[Example]) -> float | None:
    """Returns the score of the best constant answer; None if answers are text."""
    labels = Counter(label for e in examples if e.label is not None for label in (e.label, *e.also))
    return max(labels.values()) / len(examples) if labels else None


def described(run: Run) -> dict[str, Any]:
    """Returns what else the use of a result requires: task, template, models, seed."""
    spec = run.data.spec
    return {
        "task": spec.name,
        "mode": run.config.mode,
        "template": spec.template,
        "verbalizer": spec.verbalizer,
        "metric": run.reward.metric,
        "target": run.config.target,
        "target_chat": run.config.target_chat,
        "seed": run.config.seed,
        "manual_prompt": spec.manual_prompt,
        "fingerprint": run.fingerprint,
    }
