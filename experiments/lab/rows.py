"""The lab's rows: data in the real tasks' columns, drawn from `grammar` and `wordplay`."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from experiments.lab import grammar, wordplay
from tasks.catalogue import load_spec
from tasks.spec import Example

TRAIN_ROWS, TEST_ROWS = 400, 600
SPECS = {task: load_spec(task) for task in (*grammar.TASKS, *wordplay.TASKS)}


def row_of(item: grammar.Item) -> dict[str, Any]:
    """Returns the item as a row of the real task's data."""
    spec = SPECS[item.task]
    return item.fields | {spec.label[0]: list(spec.verbalizer)[spec.words.index(item.answer)]}


def render(task: str, row: dict[str, Any]) -> Example:
    """Renders a row with the spec of its task."""
    rendered = SPECS[task].example(row, "the lab")
    assert rendered is not None
    return rendered


def sample_example(rng: random.Random, task: str) -> Example:
    """Draws a random example of one of the lab's tasks."""
    if task in wordplay.TASKS:
        return render(task, wordplay.sample_row(rng, task))
    return render(task, row_of(grammar.sample_item(rng, task)))


def write_data(folder: Path, seed: int = 7) -> None:
    """Writes train.jsonl, test.jsonl and manual_prompt.txt of every task, with distinct inputs and the real columns."""
    for task in SPECS:
        rng = random.Random(f"{seed}-{task}")
        rows = _grammar_rows(rng, task) if task in grammar.TASKS else _wordplay_rows(rng, task)
        train = min(TRAIN_ROWS, len(rows) * 2 // 3)  # some tasks have few distinct inputs
        (folder / task).mkdir(parents=True, exist_ok=True)
        for name, part in (("train", rows[:train]), ("test", rows[train:])):
            text = "".join(json.dumps(row) + "\n" for row in part)
            (folder / task / f"{name}.jsonl").write_text(text, encoding="utf-8")
        (folder / task / "manual_prompt.txt").write_text(manual_prompt(task) + "\n", encoding="utf-8")


def manual_prompt(task: str) -> str:
    """Returns the prompt with which a user of the task would begin."""
    if task in wordplay.TASKS:
        return "Do the task."
    return " ".join(clause.wordings()[0] for clause in grammar.manual_clauses(task))


def _grammar_rows(rng: random.Random, task: str) -> list[dict[str, Any]]:
    shares = grammar.TASKS[task].shares
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < TRAIN_ROWS + TEST_ROWS:
        item = grammar.sample_item(rng, task, rng.choices(list(shares), list(shares.values()))[0])
        rows.setdefault(render(task, row_of(item)).input, row_of(item))
    return list(rows.values())


def _wordplay_rows(rng: random.Random, task: str) -> list[dict[str, Any]]:
    if task in wordplay.INPUTS:
        texts = rng.sample(wordplay.INPUTS[task], len(wordplay.INPUTS[task]))
        return [wordplay.sample_row(rng, task, text) for text in texts]
    rows: dict[str, dict[str, Any]] = {}
    while len(rows) < TRAIN_ROWS + TEST_ROWS:
        row = wordplay.sample_row(rng, task)
        rows.setdefault(render(task, row).input, row)
    return list(rows.values())
