"""The splits of a run, and the meta-prompts that show them to the agent."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import pytest

from tasks.errors import TaskError
from tasks.meta_prompt import meta_prompt
from tasks.spec import SPLITS, Example, TaskSpec
from tasks.splits import TaskData, build_data
from tests.test_tasks import SPEC


def pool(count: int, prefix: str = "text", labels: int = 2) -> list[Example]:
    """`count` distinct examples of each label, label by label."""
    words = ("no", "yes", "maybe")
    return [Example(f"{prefix} {label} {i}", label, words[label]) for label in range(labels) for i in range(count)]


def splits(**options: Any) -> TaskData:
    """Splits drawn from 40 training rows and 10 test rows per label, for two labels."""
    return build_data(TaskSpec(**SPEC), {"train": pool(40), "test": pool(10, "test")}, **options)


def inputs(examples: Sequence[Example]) -> set[str]:
    return {" ".join(example.input.lower().split()) for example in examples}


@pytest.mark.parametrize("split", ["train", "validation"])
@pytest.mark.parametrize("shots", [1, 5, 16])
def test_each_small_split_holds_as_many_shots_of_every_label(split: str, shots: int) -> None:
    assert Counter(e.label for e in getattr(splits(shots=shots), split)) == {0: shots, 1: shots}


def test_sixteen_shots_is_the_default() -> None:
    data = splits()
    assert (len(data.train), len(data.validation)) == (32, 32)  # paper, Table 7: 16 per label, two labels


def test_small_splits_are_not_sorted_by_label() -> None:
    labels = [example.label for example in splits(seed=0).train]
    assert labels not in (sorted(labels), sorted(labels, reverse=True))


@pytest.mark.parametrize(("one", "other"), [("train", "validation"), ("train", "test"), ("validation", "test")])
def test_splits_share_no_input(one: str, other: str) -> None:
    data = splits(shots=16)
    assert not inputs(getattr(data, one)) & inputs(getattr(data, other))


@pytest.mark.parametrize("split", SPLITS)
def test_the_same_seed_draws_the_same_splits(split: str) -> None:
    one, other = (splits(seed=3, test_limit=8) for _ in range(2))
    assert getattr(one, split) == getattr(other, split)


@pytest.mark.parametrize("split", SPLITS)
def test_another_seed_draws_other_splits(split: str) -> None:
    one, other = (splits(seed=seed, test_limit=8) for seed in (3, 4))
    assert inputs(getattr(one, split)) != inputs(getattr(other, split))


def test_all_test_rows_are_kept_in_order_by_default() -> None:
    assert list(splits().test) == pool(10, "test")


@pytest.mark.parametrize(("limit", "kept"), [(7, 7), (20, 20), (1000, 20)])
def test_test_limit_is_an_upper_bound(limit: int, kept: int) -> None:
    test = splits(test_limit=limit).test
    assert (len(test), len(set(test) & set(pool(10, "test")))) == (kept, kept)


@pytest.mark.parametrize("seed", range(5))
def test_rows_that_differ_in_case_and_spaces_only_count_once(seed: int) -> None:
    # Two different texts per label, each written in three ways: one goes to train and the other to validation.
    ways = ("the cat {}", "The  Cat {}", " the\tcat\n{} ")
    train = [Example(way.format(f"{y}{i}"), y, "") for y in (0, 1) for i in (0, 1) for way in ways]
    data = build_data(TaskSpec(**SPEC), {"train": train, "test": pool(1)}, shots=1, seed=seed)
    assert inputs(data.train) | inputs(data.validation) == {f"the cat {y}{i}" for y in (0, 1) for i in (0, 1)}


def test_a_text_with_two_labels_is_drawn_at_most_once() -> None:
    train = [Example("same", 0, "no"), Example("Same", 1, "yes"), *pool(2)]
    data = build_data(TaskSpec(**SPEC), {"train": train, "test": pool(1, "test")}, shots=1)
    assert not inputs(data.train) & inputs(data.validation)


@pytest.mark.parametrize("seed", range(5))
def test_test_rows_are_never_drawn(seed: int) -> None:
    # Four rows per label; two of them are test rows too, in other case and spacing.
    test = [Example(f" TEXT  {label} {i}", label, "") for label in (0, 1) for i in (0, 1)]
    data = build_data(TaskSpec(**SPEC), {"train": pool(4), "test": test}, shots=1, seed=seed)
    assert inputs(data.train) | inputs(data.validation) == {f"text {y} {i}" for y in (0, 1) for i in (2, 3)}


def test_validation_comes_from_its_own_rows_where_there_are_any() -> None:
    rows = {"train": pool(5), "validation": pool(5, "own"), "test": pool(1, "test")}
    data = build_data(TaskSpec(**SPEC), rows, shots=3)
    assert all(example.input.startswith("own") for example in data.validation)


@pytest.mark.parametrize("more", [{}, {"test": [Example("t", None, "a", answers=("a",))]}])
def test_validation_rows_of_its_own_are_used_whether_or_not_test_has_any(more: dict[str, list[Example]]) -> None:
    def rows(name: str, count: int) -> list[Example]:
        return [Example(f"{name} {i}", None, "a", answers=("a",)) for i in range(count)]

    spec = TaskSpec("text", "d", {}, "{x}", "m", answers=["y"], metric="f1")
    data = build_data(spec, {"train": rows("train", 200), "validation": rows("own", 30), **more})
    assert len(data.validation) == 30 and len(data.train) == 32


def test_train_comes_from_train_rows_where_validation_has_its_own() -> None:
    rows = {"train": pool(5), "validation": pool(5, "own"), "test": pool(1, "test")}
    assert all(example.input.startswith("text") for example in build_data(TaskSpec(**SPEC), rows, shots=5).train)


def test_validation_rows_that_are_in_train_are_left_out() -> None:
    # All five training rows of a label are drawn; five of its ten validation rows repeat them.
    rows = {"train": pool(5), "validation": [*pool(5), *pool(5, "own")], "test": pool(1, "test")}
    assert inputs(build_data(TaskSpec(**SPEC), rows, shots=5).validation) == inputs(pool(5, "own"))


def test_too_few_rows_name_label_split_and_numbers() -> None:
    train = [*pool(4), Example("one more", 0, "no")]  # 5 sad ones, 4 happy ones
    with pytest.raises(TaskError, match="mood: 4 different examples left with label 'yes' for train; 5 shots need 5"):
        build_data(TaskSpec(**SPEC), {"train": train, "test": pool(1, "test")}, shots=5)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_a_label_without_any_row_is_named(split: str) -> None:
    sad = [example for example in pool(9) if example.label == 0]
    rows = {"train": pool(5), "validation": pool(5, "own"), "test": pool(1, "test")} | {split: sad}
    with pytest.raises(TaskError, match=f"mood: no row of {split} has the label 'happy' of the verbalizer"):
        build_data(TaskSpec(**SPEC), rows, shots=1)


def test_a_test_split_without_a_label_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    train = [*pool(4), *(Example(f"more {i}", 1, "yes") for i in range(9))]
    assert {example.label for example in build_data(TaskSpec(**SPEC), {"train": train}, shots=2).test} == {1}
    assert "mood: no test row has the label 'sad'; test scores say nothing about it" in caplog.text


def test_too_few_rows_for_validation_count_what_train_has_left() -> None:
    with pytest.raises(
        TaskError, match="mood: 2 different examples left with label 'no' for validation; 3 shots need 3"
    ):
        build_data(TaskSpec(**SPEC), {"train": pool(5), "test": pool(1, "test")}, shots=3)


@pytest.mark.parametrize("splits", [("train", "validation"), ("train", "test"), ("validation", "test")])
def test_data_with_an_input_in_two_splits_cannot_be_made(splits: tuple[str, str]) -> None:
    rows: Mapping[str, tuple[Example, ...]] = {
        split: (Example(f"{split} only", 0, "no"), *([Example("Shared  one", 0, "no")] if split in splits else []))
        for split in SPLITS
    }
    with pytest.raises(TaskError, match=f"mood: {splits[0]} and {splits[1]} share the input 'shared one'"):
        TaskData(TaskSpec(**SPEC), **rows)


# -- the meta-prompt --------------------------------------------------------------------------------------------------


def test_the_meta_prompt_is_the_papers() -> None:
    # Figure 6, with "two" for "five".
    pairs = [Example("a fine film", 1, "yes"), Example("dull {0}", 0, "no")]
    expected = (
        "I gave a friend an instruction and two inputs.\n"
        "The friend read the instruction and wrote an output for every one of the inputs.\n"
        "Here are the input-output pairs:\n"
        "Input : a fine film Output : yes\n"
        "Input : dull {0} Output : no"
    )
    assert meta_prompt(pairs) == (expected, "The instruction was :")


@pytest.mark.parametrize(
    ("count", "words"), [(1, "one input."), (5, "five inputs."), (10, "ten inputs."), (11, "11 inputs.")]
)
def test_the_meta_prompt_counts_its_pairs_in_words(count: int, words: str) -> None:
    first = meta_prompt(pool(count, labels=1)).request.splitlines()[0]
    assert first == f"I gave a friend an instruction and {words}"


def test_the_meta_prompt_shows_the_pairs_in_the_order_given() -> None:
    pairs = pool(3, labels=1)
    shown = meta_prompt(pairs).request.splitlines()[3:]
    assert shown == [f"Input : {pair.input} Output : {pair.answer}" for pair in pairs]
