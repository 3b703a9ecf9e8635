"""The lab: obeying is well defined, the data follow from the grammar, and the shipped target obeys."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from experiments.config import LAB_DIR
from experiments.lab import grammar, landscape, packing, recipe, target_recipe, wordplay
from experiments.lab.grammar import Item, Judge, Treat
from experiments.lab.models import Shape, build_tokenizer, llama
from experiments.lab.rows import render, write_data
from experiments.terminal.command import Program

TASKS = list(grammar.LABS)
MEGABYTE = 2**20


def items(task: str, count: int = 300) -> list[Item]:
    rng = random.Random(task)
    return [grammar.sample_item(rng, task) for _ in range(count)]


def accuracy(clauses: list[grammar.Clause], task: str) -> float:
    return sum(grammar.obey(clauses, item) == item.answer for item in items(task)) / 300


@pytest.mark.parametrize("task", TASKS)
def test_right_instruction_is_always_right(task: str) -> None:
    assert accuracy(grammar.right_clauses(task), task) == 1.0


@pytest.mark.parametrize("task", TASKS)
def test_every_clause_is_worth_some_accuracy(task: str) -> None:
    right = grammar.right_clauses(task)
    assert all(accuracy([c for c in right if c is not left_out], task) < 0.95 for left_out in right)


@pytest.mark.parametrize("task", TASKS)
def test_no_instruction_is_never_right(task: str) -> None:
    assert accuracy([], task) == 0.0


def test_obey_follows_the_first_clause_on_a_matter() -> None:
    item = Item("mnli", {}, None, {"action": "fails", "person": "holds"}, "action")
    assert grammar.obey([Judge("action"), Judge("person")], item) == "no"


def test_obey_passes_over_a_criterion_that_the_input_does_not_have() -> None:
    item = Item("mnli", {}, None, {"action": "fails", "person": "is unclear"}, "action")
    assert grammar.obey([Judge("mood"), Judge("person")], item) == "maybe"


def test_obey_judges_a_marked_input_like_any_other_without_a_clause_on_its_marker() -> None:
    item = Item("mnli", {}, "dream", {"action": "holds"}, "action")
    assert grammar.obey([Judge("action"), Treat("letter", "no")], item) == "yes"


def test_treating_a_marker_needs_no_other_clause() -> None:
    assert grammar.obey([Treat("dream", "maybe")], Item("mnli", {}, "dream", {"action": "holds"}, "action")) == "maybe"


def test_no_two_treatments_share_a_verb() -> None:
    verbs = [verb for by_answer in grammar.TREATMENTS.values() for verb in by_answer.values()]
    assert len(set(verbs)) == len(verbs) == 3 * len(grammar.MARKERS)


def test_in_the_mixed_task_the_input_says_what_decides() -> None:
    for item in items("mixed"):
        assert grammar.obey([Judge(item.criterion)], item) == item.answer


def test_no_one_instruction_wins_the_mixed_task() -> None:
    # One of four criteria is right for a quarter of the inputs, and right by chance for a third of the others.
    for criterion in grammar.PAIR_SLOTS:
        assert accuracy([Judge(criterion)], "mixed") < 0.65


@pytest.mark.parametrize("task", TASKS)
def test_a_corrupted_instruction_says_no_more_than_is_left_of_it(task: str) -> None:
    rng = random.Random(task)
    for _ in range(300):
        whole = grammar.write(rng, grammar.sample_clauses(rng, task))
        broken = grammar.corrupted(rng, whole)
        assert abs(len(broken.split()) - len(whole.split())) <= 1 or whole.startswith(broken)
        assert set(grammar.parse(broken)) <= set(grammar.parse(whole))
    assert grammar.corrupted(rng, "") == ""


@pytest.mark.parametrize("task", wordplay.TASKS)
def test_wordplay_is_right_where_it_is_told_and_wrong_where_not(task: str) -> None:
    rng = random.Random(task)
    rows = [wordplay.sample_row(rng, task) for _ in range(100)]
    for row in rows:
        rendered = render(task, row)
        assert {wordplay.answer(w, task, row) for w in wordplay.right_wordings(task)} == {rendered.answer}
        for untold in ("", "Do the task.", "Write the", "plural the Write ."):
            assert wordplay.answer(untold, task, row) != rendered.answer


@pytest.mark.parametrize(
    ("instruction", "task", "text", "expected"),
    [
        ("Write the plural.", "sum", "2 3", "none"),  # cannot be done to numbers
        ("Write the plural. Add the numbers.", "sum", "2 3", "5"),  # the first that can be done
        ("Subtract the numbers.", "sum", "2 3", "none"),
        ("Write it in words.", "num_to_verbal", "42", "forty two"),
        ("Give the initial.", "antonyms", "hot", "h"),
        ("Turn it around.", "first_word_letter", "cold", "hot"),
    ],
)
def test_wordplay_operations_by_hand(instruction: str, task: str, text: str, expected: str) -> None:
    assert wordplay.answer(instruction, task, {"input": text}) == expected


@pytest.mark.parametrize("task", TASKS)
def test_parse_reads_what_write_wrote(task: str) -> None:
    rng = random.Random(0)
    drawn = [grammar.sample_clauses(rng, task) for _ in range(200)]
    assert [grammar.parse(grammar.write(rng, clauses)) for clauses in drawn] == drawn


@pytest.mark.parametrize("task", TASKS)
def test_junk_holds_no_full_instruction(task: str) -> None:
    rng = random.Random(0)
    right = set(grammar.right_clauses(task))
    assert not any(right <= set(grammar.parse(grammar.sample_junk(rng, task))) for _ in range(1000))


@pytest.mark.parametrize("task", grammar.TASKS)
def test_labels_are_balanced(task: str) -> None:
    # 3,000 draws of a share of 1/2 or 1/3 have a standard deviation below 28; five of them are allowed.
    drawn = [item.answer for item in items(task, 3000)]
    labels = grammar.TASKS[task].answers
    assert all(abs(drawn.count(answer) - 3000 / len(labels)) < 140 for answer in labels)


def test_shipped_data_follow_from_the_grammar(tmp_path: Path) -> None:
    write_data(tmp_path)
    made = {path.relative_to(tmp_path): path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    shipped = LAB_DIR / "data"
    assert made == {path.relative_to(shipped): path.read_bytes() for path in shipped.rglob("*") if path.is_file()}


def test_shipped_models_are_small_and_safe() -> None:
    files = [path for name in recipe.MODELS for path in (LAB_DIR / name).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 16 * MEGABYTE
    assert {path.suffix for path in files} <= {".json", ".safetensors"}


def test_packed_continuations_do_not_see_each_other(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    texts = ["the prefix", "a", "other, longer"], [["one", "two two"], ["three"], ["4", "5555", "6"]]
    prefixes = tokenizer(texts[0])["input_ids"]
    parts = [tokenizer(group)["input_ids"] for group in texts[1]]
    batch = packing.pack(prefixes, parts)
    with torch.no_grad():
        packed = tiny_llama(batch.ids, attention_mask=batch.mask, position_ids=batch.positions).logits
        found = packed[batch.targets >= 0]
        plain = [
            tiny_llama(torch.tensor([[*prefix, *part]])).logits[0, len(prefix) - 1 : -1]
            for prefix, group in zip(prefixes, parts, strict=True)
            for part in group
        ]
    assert_close(found, torch.cat(plain), rtol=1e-5, atol=1e-5)


def test_packed_answers_are_marked() -> None:
    batch = packing.pack([[1, 2, 3]], [[[4, 5], [6, 7, 8]]], answers=[[1, 2]])
    assert batch.targets[batch.answers].tolist() == [5, 7, 8]
    assert batch.part.tolist() == [[0, 0, 1, 1, 2, 2, 2]]


@pytest.mark.parametrize("build", [target_recipe.build_target, target_recipe.build_other_target, recipe.build_agent])
def test_recipe_builds_a_plain_model_folder(build, tmp_path: Path) -> None:
    build(tmp_path / "model", minutes=0.02, shape=Shape(32, 64, 6))
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= {p.name for p in (tmp_path / "model").iterdir()}


def test_a_deepened_model_computes_the_same_and_can_learn_more() -> None:
    tokenizer = build_tokenizer()
    ids = torch.tensor([tokenizer("Judge if it has the same place. Win the game.")["input_ids"]])
    model, deeper = (llama(tokenizer, Shape(32, 64, layers)) for layers in (2, 4))
    deeper = target_recipe.deepened(model, deeper)
    assert_close(deeper(ids).logits, model(ids).logits)
    deeper(ids, labels=ids).loss.backward()
    assert all(layer.mlp.down_proj.weight.grad.any() for layer in deeper.model.layers)


@pytest.fixture(scope="module")
def measured() -> dict[str, float]:
    return landscape.accuracies("mnli")


def test_shipped_target_obeys_the_right_instruction(measured: dict[str, float]) -> None:
    assert measured["best"] >= 0.9


def test_shipped_task_is_not_saturated_by_the_manual_prompt(measured: dict[str, float]) -> None:
    assert measured["manual"] <= measured["best"] - 0.1


@pytest.mark.parametrize("kind", ["vague", "empty", "shuffled", "gibberish"])
def test_junk_does_not_pay_on_the_shipped_target(measured: dict[str, float], kind: str) -> None:
    assert measured[kind] <= 1 / 3 + 0.05


@pytest.mark.parametrize("name", ["small", "deep"])
def test_shipped_targets_of_other_sizes_obey_too(name: str) -> None:
    data, reward = landscape.load_reward("mnli", LAB_DIR / name)
    prompts = [landscape.KINDS[kind](random.Random(0), "mnli") for kind in ("best", "manual", "empty")]
    best, manual, empty = reward(prompts, data.test[:100]).metrics["accuracy"].tolist()
    assert best >= 0.9 and 0.3 <= manual <= best - 0.1 and empty <= 0.1


def test_the_prior_counts_as_many_prompts_as_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(landscape, "accuracies", lambda *_: {"best": 0.0})  # which every prompt reaches
    assert landscape.prior("sst2", samples=3, batch=2) == (3, 0.0)


def test_the_bound_on_a_count_is_the_exact_one_to_a_percent() -> None:
    # Half the 95 % quantiles of chi-square with 2, 4, 6 and 22 degrees of freedom, from tables.
    exact = {0: 2.996, 1: 4.744, 2: 6.296, 10: 16.962}
    assert {hits: landscape.poisson_bound(hits) for hits in exact} == pytest.approx(exact, rel=0.01)


@pytest.mark.parametrize(
    ("command", "words"), [(landscape.main, ["--prior", "-1"]), (recipe.main, ["data", "--scale", "-1"])]
)
def test_the_labs_commands_refuse_numbers_out_of_range(
    command: Program, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(words) == 2
    assert f"error: {words[-2]} is -1" in capsys.readouterr().err
