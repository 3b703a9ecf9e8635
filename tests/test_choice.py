"""The final choice is made on validation, never scores worse there than the manual prompt, and comes with a verdict."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from experiments.arms.choice.result import NO_BETTER, Answers, chance
from experiments.arms.editing import TestTimeEditing
from experiments.arms.fixed import FixedPrompt
from experiments.config import build_config
from experiments.lab import grammar
from experiments.run.run import Run, few_shot_prompts, prepare
from tasks.spec import Example

SMALL = ["threads=1", "sampling.max_new_tokens=24", "examples.test_limit=60", "prompts=4"]
JUNK = ["Sing.", "Do nothing."]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    options = {"task": "sst2", "run": str(tmp_path_factory.mktemp("runs") / "run")}
    return prepare(build_config(options, assignments=SMALL))


def finish(run: Run, *prompts: str) -> dict[str, Any]:
    """The result of a run in which these prompts had the highest training rewards."""
    arm = FixedPrompt(run)
    arm.pool.add(prompts, [10.0] * len(prompts))
    return arm.result().result


@pytest.fixture(scope="module")
def better(run: Run) -> str:
    """The full instruction of the lab's language; the manual prompt lacks some of its clauses."""
    return grammar.write(random.Random(0), grammar.right_clauses(run.data.spec.name))


def test_junk_loses_to_the_manual_prompt_whatever_training_said(run: Run) -> None:
    result = finish(run, *JUNK)
    assert (result["prompt"], result["chosen"]) == (run.data.spec.manual_prompt, "manual")
    assert result["verdict"] == NO_BETTER
    assert result["test_score"] == result["manual_test_score"]


def test_an_empty_pool_leaves_the_manual_prompt(run: Run) -> None:
    assert finish(run)["chosen"] == "manual"


def test_a_better_prompt_wins_and_is_called_better(run: Run, better: str) -> None:
    result = finish(run, *JUNK, better)
    assert (result["prompt"], result["chosen"]) == (better, "tuned")
    assert result["validation_score"] > result["manual_validation_score"]
    assert result["verdict"].startswith("better than the manual prompt (+")


def test_scores_carry_rows_and_intervals(run: Run) -> None:
    result = finish(run, *JUNK)
    assert (result["validation_rows"], result["test_rows"]) == (32, 60)
    for name in ("validation", "test", "manual_validation", "manual_test"):
        low, high = result[f"{name}_interval"]
        assert 0 <= low <= result[f"{name}_score"] <= high <= 1


def test_the_difference_carries_its_interval(run: Run, better: str) -> None:
    result = finish(run, better)
    low, high = result["difference_interval"]
    assert result["difference"] == pytest.approx(result["test_score"] - result["manual_test_score"])
    assert 0 < low <= result["difference"] <= high and result["p"] < 0.05
    labels = [example.answer for example in run.data.test]
    assert result["chance"] == max(map(labels.count, run.data.words)) / len(labels)


def test_a_constant_answer_counts_where_it_is_one_of_the_right_answers() -> None:
    rows = [Example("a", 0, "A", also=(1,)), Example("b", 1, "B"), Example("c", 0, "A", also=(1, 2))]
    assert chance(rows) == 1.0  # B is always right, though A comes first in two rows
    assert chance([Example("d", None, "text", answers=("text",))]) is None


def test_candidates_and_predictions_add_up_to_the_scores(run: Run, better: str) -> None:
    arm = FixedPrompt(run)
    arm.pool.add([*JUNK, better], [1.0, 2.0, 3.0])
    result, candidates, predictions = arm.result()
    listed = {row["prompt"]: row for row in candidates}
    assert set(listed) == {run.data.spec.manual_prompt, *JUNK, better}
    assert candidates[0]["prompt"] == result["prompt"] == better
    assert listed[better]["validation_score"] == pytest.approx(result["validation_score"])
    assert (listed[better]["kind"], listed[better]["reward"]) == ("tuned", 3.0)
    assert listed[run.data.spec.manual_prompt]["reward"] is None
    assert [row["input"] for row in predictions] == [example.input for example in run.data.test]
    assert [row["expected"] for row in predictions] == [[example.answer] for example in run.data.test]
    for side, score in (("best", "test_score"), ("manual", "manual_test_score")):
        right = [row[side]["answer"] in row["expected"] for row in predictions]
        assert [row[side]["score"] for row in predictions] == right
        assert sum(right) / len(right) == pytest.approx(result[score])
        for row in predictions:
            chances = row[side]["probabilities"]
            assert (
                sum(chances.values()) == pytest.approx(1)
                and max(chances, key=chances.__getitem__) == row[side]["answer"]
            )


@pytest.mark.parametrize(("keys", "again"), [({}, True), ({"shortlist": 0}, False), ({"shortlist": 1}, True)])
def test_the_best_by_single_batches_are_scored_again_on_all_training_rows(
    run: Run, better: str, keys: dict[str, int], again: bool
) -> None:
    """Luck has put the best of four prompts last; `shortlist` is at least `pool`, so with 1 the last two stay out."""
    config = replace(run.config, **{"pool": 2, "shortlist": 64, **keys})
    arm = FixedPrompt(replace(run, config=config))
    luck = {JUNK[0]: 9.0, JUNK[1]: 8.0, "Guess.": 7.0, better: 6.0}
    arm.pool.add(list(luck), list(luck.values()))
    _, *tuned = arm.candidates()
    assert len(tuned) == 2
    if not again:
        assert [(c.prompt, c.reward) for c in tuned] == [(prompt, luck[prompt]) for prompt in JUNK]
        return
    eligible = list(luck) if config.shortlist == 64 else JUNK
    rewards = dict(zip(eligible, run.reward(eligible, run.data.train).scores.tolist(), strict=True))
    assert [c.prompt for c in tuned] == sorted(eligible, key=lambda prompt: -rewards[prompt])[:2]
    assert [c.reward for c in tuned] == pytest.approx([rewards[c.prompt] for c in tuned])
    assert (tuned[0].prompt == better) == (config.shortlist == 64)


def test_rewards_on_batches_of_all_training_rows_stand(run: Run, better: str) -> None:
    examples = replace(run.config.examples, batch_size=len(run.data.train))
    arm = FixedPrompt(replace(run, config=replace(run.config, pool=1, shortlist=64, examples=examples)))
    arm.pool.add([JUNK[0], better], [9.0, 8.0])
    assert [(c.prompt, c.reward) for c in arm.candidates()[1:]] == [(JUNK[0], 9.0)]


def test_the_winner_is_expected_to_score_lower_on_new_rows(run: Run, better: str) -> None:
    clear, luck = finish(run, *JUNK, better), finish(run, *JUNK)
    assert clear["expected_on_new_rows"] == pytest.approx(clear["validation_score"], abs=0.02)  # it wins on any rows
    assert luck["expected_on_new_rows"] < luck["validation_score"]
    raced = replace(run, config=replace(run.config, race=True))
    assert finish(raced, *JUNK)["expected_on_new_rows"] is None  # some candidates have not seen all rows


def test_answers_are_counted_over_the_labels(run: Run) -> None:
    spread = finish(run, *JUNK)["answers_on_test"]
    assert set(spread) == {"best", "manual", "right"}
    assert all(set(shares) == set(run.data.words) for shares in spread.values())
    assert all(sum(shares.values()) == pytest.approx(1) for shares in spread.values())
    manual, test = run.data.spec.manual_prompt, run.data.test
    said = run.reward.reply([manual] * len(test), [e.input for e in test], [e.choices for e in test])
    right = [reply.answer == example.answer for reply, example in zip(said, test, strict=True)]
    accuracy = run.reward.by_example([manual], test).mean().item()
    assert sum(right) / len(right) == pytest.approx(accuracy)


def test_few_shot_prompts_hold_the_manual_one_and_training_pairs(run: Run) -> None:
    config = replace(run.config, few_shot=2)
    prompts = few_shot_prompts(config, run.data)
    assert len(set(prompts)) == 2
    known = {f"Input : {e.input} Output : {e.answer}" for e in run.data.train}
    for prompt in prompts:
        first, *pairs = prompt.splitlines()
        assert first == run.data.spec.manual_prompt
        assert len(pairs) == run.config.examples.pairs and set(pairs) <= known
    assert few_shot_prompts(config, run.data) == prompts


def test_few_shot_prompts_are_candidates(run: Run, better: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("experiments.arms.fixed.few_shot_prompts", lambda *_: [better])
    result = finish(run, *JUNK)
    assert (result["prompt"], result["chosen"]) == (better, "few-shot")


@pytest.fixture(scope="module")
def editing(tmp_path_factory: pytest.TempPathFactory) -> Run:
    options = {"task": "sst2", "mode": "tte", "run": str(tmp_path_factory.mktemp("runs") / "tte")}
    return prepare(build_config(options, assignments=[*SMALL, "sampling.max_new_tokens=8"]))


def test_an_agent_that_edits_worse_than_the_manual_prompt_is_not_the_result(editing: Run) -> None:
    # Eight tokens are too few for an instruction of the lab.
    result, candidates, predictions = TestTimeEditing(editing).result()
    assert candidates == [] and all(isinstance(row["best"]["prompt"], str) for row in predictions)
    right = [row["best"]["score"] for row in predictions]
    assert sum(right) / len(right) == pytest.approx(result["edits_test_score"])
    assert result["edits_validation_score"] < result["manual_validation_score"]
    assert (result["prompt"], result["chosen"]) == (editing.data.spec.manual_prompt, "manual")
    assert result["validation_score"] == result["manual_validation_score"]
    assert result["verdict"] == NO_BETTER


def test_an_agent_whose_edits_are_scored_wins_over_a_manual_prompt_without_a_score(
    editing: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    manual = editing.data.spec.manual_prompt

    def half_sound(run: Run, prompts: Sequence[str], examples: Sequence[Example]) -> Answers:
        values = torch.tensor([math.nan if prompt == manual else 0.0 for prompt in prompts])
        return Answers(values, [{"answer": "", "score": value} for value in values.tolist()])

    monkeypatch.setattr("experiments.arms.editing.answers", half_sound)
    assert TestTimeEditing(editing).result().result["chosen"] == "edits"


def test_without_any_finite_score_there_is_no_result(editing: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def unsound(run: Run, prompts: Sequence[str], examples: Sequence[Example]) -> Answers:
        return Answers(torch.full((len(examples),), math.nan), [{} for _ in examples])

    monkeypatch.setattr("experiments.arms.editing.answers", unsound)
    with pytest.raises(FloatingPointError, match="no prompt has a finite score"):
        TestTimeEditing(editing).result()


def test_the_papers_protocol_passes_over_prompts_without_a_score(
    run: Run, better: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    by_example = run.reward.by_example

    def first_unsound(prompts: Sequence[str], rows: Sequence[Example]) -> torch.Tensor:
        values = by_example(prompts, rows)
        values[0] = math.nan
        return values

    monkeypatch.setattr(run.reward, "by_example", first_unsound)
    assert finish(run, *JUNK, better)["paper_protocol"]["test_score"] > 0.9


def test_the_papers_protocol_reads_the_test_split_only_if_asked_to(
    run: Run, better: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scored = []
    by_example = run.reward.by_example
    monkeypatch.setattr(run.reward, "by_example", lambda *given: scored.append(given) or by_example(*given))
    assert len(finish(run, *JUNK, better)["paper_protocol"]["test_interval"]) == 2 and scored
    scored.clear()
    without = replace(run, config=replace(run.config, paper_protocol=False))
    assert finish(without, *JUNK, better)["paper_protocol"] is None and not scored
