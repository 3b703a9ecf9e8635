"""Batches: each epoch has every example once, and each batch has the labels in proportion."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments.arms.batches import Batches
from experiments.run.run import stream
from tasks.spec import Example


def examples(*labels: int | None) -> list[Example]:
    return [Example(f"input {i}", label, str(label)) for i, label in enumerate(labels)]


def epoch(given: list[Example], size: int, seed: int = 0) -> list[list[Example]]:
    batches = Batches(given, size, random.Random(seed))
    return [batches.next() for _ in range(-(-len(given) // size))]


@given(st.lists(st.sampled_from([0, 1, 2, None]), min_size=1, max_size=40), st.integers(1, 12), st.integers(0, 9))
def test_an_epoch_shows_every_example_once(labels: list[int | None], size: int, seed: int) -> None:
    rows = examples(*labels)
    shown = [example for batch in epoch(rows, size, seed) for example in batch]
    assert sorted(e.input for e in shown) == sorted(e.input for e in rows)


@given(st.lists(st.sampled_from([0, 1, 2]), min_size=1, max_size=40), st.integers(1, 12), st.integers(0, 9))
def test_a_batch_has_each_label_in_proportion_to_within_one(labels: list[int], size: int, seed: int) -> None:
    rows = examples(*labels)
    for batch in epoch(rows, size, seed):
        counts = Counter(example.label for example in batch)
        for label, total in Counter(labels).items():
            assert abs(counts[label] - len(batch) * total / len(labels)) < 2


@pytest.mark.parametrize(("labels", "size"), [((0, 1) * 16, 16), ((0, 1) * 16, 8), ((0, 1, 2) * 16, 24)])
def test_batches_of_balanced_labels_are_balanced(labels: tuple[int, ...], size: int) -> None:
    for seed in range(20):
        for batch in epoch(examples(*labels), size, seed):
            assert set(Counter(example.label for example in batch).values()) == {size // len(set(labels))}


@given(st.integers(1, 60), st.integers(1, 20))
def test_the_batches_of_an_epoch_are_alike_in_size(rows: int, size: int) -> None:
    """No prompt is judged on the single row that a larger batch leaves over: 33 rows by 16 are 11, 11 and 11."""
    sizes = [len(batch) for batch in epoch(examples(*[0] * rows), size)]
    assert max(sizes) - min(sizes) <= 1 and max(sizes) <= size and sum(sizes) == rows
    assert rows % size or set(sizes) == {size}


def test_the_order_is_drawn_anew_every_epoch() -> None:
    batches = Batches(examples(*(0, 1) * 16), 16, random.Random(0))
    first, _, second = batches.next(), batches.next(), batches.next()
    assert [e.input for e in first] != [e.input for e in second]
    assert {e.input for e in first} != {e.input for e in second}


def test_each_purpose_has_a_stream_of_its_own() -> None:
    draws = {name: stream(0, name).random() for name in ("batches", "pairs", "review")}
    assert len(set(draws.values())) == 3
    assert stream(0, "pairs").random() == draws["pairs"] != stream(1, "pairs").random()
