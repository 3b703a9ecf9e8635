"""The race for the final choice: what it drops, what it costs, and that its prompt is as good as without a race."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.arms.choice.race import race
from experiments.arms.fixed import FixedPrompt
from experiments.config import build_config
from experiments.run.run import prepare
from tests.test_anchor_rule import ALIKE, BETWEEN, MEAN


def simulated(rng: np.random.Generator, count: int, rows: int) -> tuple[np.ndarray, Tensor]:
    """True accuracies of prompts [K], and right answers [K, N]; rows that are hard for one are hard for others too."""
    true = rng.normal(MEAN, BETWEEN, count).clip(0.02, 0.98)
    ease = np.vectorize(NormalDist().inv_cdf)(true)[:, None]
    row, own = rng.normal(0, 1, rows), rng.normal(0, 1, (count, rows))
    right = ease + ALIKE**0.5 * row + (1 - ALIKE) ** 0.5 * own > 0
    return true, torch.from_numpy(right).float()


def run_race(right: Tensor, seed: int) -> tuple[Tensor, int]:
    """The table that a race leaves, and how many answers it cost."""
    cost = 0

    def score(alive: list[int], rows: list[int]) -> dict[str, Tensor]:
        nonlocal cost
        cost += len(alive) * len(rows)
        return {"accuracy": right[alive][:, rows]}

    return race(score, *right.shape, "accuracy", random.Random(seed))["accuracy"], cost  # type: ignore[arg-type]


@pytest.mark.parametrize("rows", [32, 48, 200])
def test_a_race_finds_as_good_a_prompt_for_a_third_of_the_cost(rows: int) -> None:
    rng, count, games = np.random.default_rng(0), 41, 300
    lost, costs = [], []
    for seed in range(games):
        true, right = simulated(rng, count, rows)
        found, cost = run_race(right, seed)
        lost.append(true[int(right.mean(1).argmax())] - true[int(found.mean(1).nan_to_num(-1).argmax())])
        costs.append(cost / right.numel())
    assert max(costs) <= 1 / 3
    error = (MEAN * (1 - MEAN) / rows) ** 0.5  # of one prompt's score on these rows
    assert float(np.mean(lost)) < error / 3


def test_the_first_and_the_leaders_are_scored_on_all_rows_and_nothing_is_made_up() -> None:
    _, right = simulated(np.random.default_rng(1), 9, 21)
    right[0] = 0.0  # the manual prompt never leads
    found, _ = run_race(right, 0)
    whole = found.isfinite().all(1)
    assert whole[0] and whole.sum() == 2
    known = found.isfinite()
    assert torch.equal(found[known], right[known])
    assert known.sum(1).tolist() == sorted(known.sum(1).tolist(), reverse=True) or known.sum(1).min() == 3


@pytest.mark.parametrize(("count", "rows"), [(1, 5), (2, 1), (5, 3)])
def test_few_candidates_and_few_rows_are_raced_too(count: int, rows: int) -> None:
    found, _ = run_race(torch.rand(count, rows), 0)
    assert found[0].isfinite().all()


def test_a_run_that_races_has_a_result_that_was_scored_on_all_rows(tmp_path: Path) -> None:
    small = ["threads=1", "sampling.max_new_tokens=8", "examples.test_limit=10", "pool=8"]
    run = prepare(build_config({"task": "sst2", "run": str(tmp_path / "run")}, assignments=small))
    prompts = [f"Do number {i}." for i in range(7)] + [f"{run.data.spec.manual_prompt} Be exact."]
    outcomes = {}
    for racing in (False, True):
        arm = FixedPrompt(replace(run, config=replace(run.config, race=racing)))
        arm.pool.add(prompts, [1.0] * len(prompts))
        outcomes[racing] = arm.result()
    result, rows = outcomes[True].result, [row["validation_rows"] for row in outcomes[True].candidates]
    assert result["validation_rows"] == max(rows) == len(run.data.validation) and rows.count(max(rows)) == 2
    assert min(rows) == len(run.data.validation) // 7 and rows == sorted(rows, reverse=True)
    exact = {row["prompt"]: row["validation_score"] for row in outcomes[False].candidates}
    assert result["validation_score"] == pytest.approx(exact[result["prompt"]])
