"""Detects prompts that may score well without an instruction: copied training inputs, bare lists of label words."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

RUN = 4  # this many words in a row count as copied


def word_runs(texts: Iterable[str]) -> set[tuple[str, ...]]:
    """Returns all runs of RUN words that occur in the texts."""
    every = (_words(text) for text in texts)
    return {tuple(words[i : i + RUN]) for words in every for i in range(len(words) - RUN + 1)}


def overlap(prompt: str, runs: set[tuple[str, ...]]) -> float:
    """Returns the share of the prompt's word runs that are in `runs`; 0 for a prompt that is too short."""
    own = word_runs([prompt])
    return len(own & runs) / len(own) if own else 0.0


def only_labels(prompt: str, labels: Sequence[str]) -> bool:
    """Whether the prompt consists of label words alone."""
    known = {word for label in labels for word in _words(label)}
    words = _words(prompt)
    return bool(words) and set(words) <= known


def _words(text: str) -> list[str]:
    return "".join(c.lower() if c.isalnum() else " " for c in text).split()
