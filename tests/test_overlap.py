"""Prompts that score without an instruction: copies of inputs, bare label words."""

from __future__ import annotations

import pytest

from experiments.diagnostics.overlap import only_labels, overlap, word_runs

RUNS = word_runs(["The cat sat on the mat .", "dogs bark"])


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("the CAT sat, on", 1.0),  # one run, copied
        ("the cat sat on a mat", 1 / 3),  # the first of three runs
        ("say what the cat does", 0.0),
        ("dogs bark", 0.0),  # too short to have a run
        ("", 0.0),
    ],
)
def test_overlap_is_the_share_of_copied_word_runs(prompt: str, expected: float) -> None:
    assert overlap(prompt, RUNS) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("yes, no", True), ("YES no maybe yes", True), ("say yes or no", False), ("", False), ("very good", True)],
)
def test_bare_label_words_are_recognised(prompt: str, expected: bool) -> None:
    assert only_labels(prompt, ("yes", "no", "maybe", "very good")) is expected
