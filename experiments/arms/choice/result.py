"""The parts that all arms' results share: scores beside the manual prompt's, answers, and what a user needs."""

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
        result: what best_prompt.json holds.
        candidates: the prompts from which the result was chosen, with their scores on validation; best first.
        predictions: for every test row, the target's answers under the manual prompt and under the result.
    """

    result: dict[str, Any]
    candidates: list[dict[str, Any]]
    predictions: list[dict[str, Any]]


class Answers(NamedTuple):
    """The target's answers to N examples under some prompts: their scores [N], and a record of each answer."""

    values: Tensor
    records: list[dict[str, Any]]


def answers(run: Run, prompts: Sequence[str], examples: Sequence[Example]) -> Answers:
    """What the target answers to each example under its own prompt; a score is NaN where the logits are not numbers."""
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
    """The rows of predictions.jsonl; `words` are the target's label words, if it chooses one."""
    return [
        {"row": i, "input": example.input, "expected": _expected(example, words), "manual": before, "best": after}
        for i, (example, before, after) in enumerate(zip(examples, manual.records, best.records, strict=True))
    ]


def _expected(example: Example, words: Sequence[str]) -> list[str]:
    """Every answer that counts as right."""
    return list(example.answers) or [example.answer, *(words[also] for also in example.also)]


def shares(given: Sequence[str], words: Sequence[str]) -> dict[str, float]:
    """How answers are spread over the label words."""
    return {word: given.count(word) / len(given) for word in words}


def scores(best: Mapping[str, Tensor], manual: Mapping[str, Tensor]) -> dict[str, Any]:
    """Means, intervals, difference and verdict of the result and the manual prompt; both map splits to row values."""
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
    """Rows, means and intervals of the result and the manual prompt on one split, from their row values."""
    found: dict[str, Any] = {f"{split}_rows": len(best)}
    for name, values in ((split, best), (f"manual_{split}", manual)):
        found[f"{name}_score"] = values.double().mean().item()
        found[f"{name}_interval"] = interval(values.tolist())
    return found


def chance(examples: Sequence[Example]) -> float | None:
    """The score of the best constant answer; None where answers are text."""
    labels = Counter(label for e in examples if e.label is not None for label in (e.label, *e.also))
    return max(labels.values()) / len(examples) if labels else None


def described(run: Run) -> dict[str, Any]:
    """The other keys of a result, which a user needs to apply the prompt."""
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
