"""The examples of a run: train and validation are drawn with a seed, and no two splits share an input."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from tasks.cells import LETTERS
from tasks.errors import TaskError, TooFewRowsError
from tasks.spec import Example, TaskSpec

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TaskData:
    """The examples of a run. No two splits share a normalised input; labels in train and validation are balanced."""

    spec: TaskSpec
    train: tuple[Example, ...]
    validation: tuple[Example, ...]
    test: tuple[Example, ...]

    @property
    def words(self) -> tuple[str, ...]:
        """What the target chooses from, in class order: label words, or letters. Empty where the answer is text."""
        if self.spec.kind == "labels":
            return self.spec.words
        every = chain(self.train, self.validation, self.test)
        return LETTERS[: max((example.choices or 0 for example in every), default=0)]

    def __post_init__(self) -> None:
        for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
            shared = _texts(getattr(self, one)) & _texts(getattr(self, other))
            if shared:
                raise TaskError(f"{self.spec.name}: {one} and {other} share the input {sorted(shared)[0]!r}")


def build_data(
    spec: TaskSpec, rows: Mapping[str, Sequence[Example]], shots: int = 16, seed: int = 0, test_limit: int | None = None
) -> TaskData:
    """Draws train and validation with a seed; no input is in two of train, validation and test.

    With a verbalizer both hold `shots` examples of each label. Choices and texts have no labels to balance: there both
    hold 2 * shots examples, as for two labels, or fewer if data are few, with right letters as balanced as possible.

    Args:
        spec: the task.
        rows: examples of "train", and of "validation" and "test" if the source has them; a missing split is cut from
            "train". A missing test split gets all examples that are left.
        shots: examples per label in train, and as many in validation; no more than the spec's max_shots.
        seed: of the draw.
        test_limit: the most test examples to keep, drawn with the same seed; None keeps all.

    Raises:
        TooFewRowsError: too few examples.
        TaskError: a label of the verbalizer has no example.
    """
    rng = random.Random(seed)
    shots = spec.shots(shots)
    test = list(rows.get("test") or ())
    if test_limit is not None and test_limit < len(test):
        test = rng.sample(test, test_limit)
    taken = _texts(test)
    repeated = len(taken & _texts(rows["train"]))
    if repeated:
        log.warning("%s: %d inputs of train are in test as well; left out of train", spec.name, repeated)
    drawn = {}
    for split in ("train", "validation"):
        pool = list(rows.get(split) or rows["train"])
        for label in _absent(spec, pool):
            raise TaskError(f"{spec.name}: no row of {split} has the label {label!r} of the verbalizer")
        rng.shuffle(pool)
        unique = {_normalise(e.input): e for e in pool if _normalise(e.input) not in taken}
        if spec.kind == "labels":
            chosen = _balanced(spec, list(unique.values()), shots, split)
        else:
            last = split == "validation" and bool(rows.get("validation"))  # no other split is drawn from these rows
            shares = 1 + (split == "train" and not rows.get("validation")) + (not test and not last)
            chosen = _stratified(unique.values())[: min(2 * shots, len(unique) // shares)]
        if not chosen:
            raise TooFewRowsError(f"{spec.name}: no examples left for {split}")
        rng.shuffle(chosen)
        taken |= _texts(chosen)
        drawn[split] = tuple(chosen)
    if not test:
        test = [e for e in rows["train"] if _normalise(e.input) not in taken]
        test = rng.sample(test, min(len(test), test_limit or len(test)))
    if not test:
        raise TooFewRowsError(f"{spec.name}: no examples left for test")
    for label in _absent(spec, test):
        log.warning("%s: no test row has the label %r; test scores say nothing about it", spec.name, label)
    return TaskData(spec, drawn["train"], drawn["validation"], tuple(test))


def _absent(spec: TaskSpec, examples: Sequence[Example]) -> list[str]:
    """The labels of the verbalizer that no example has."""
    found = {example.label for example in examples}
    return [label for number, label in enumerate(spec.verbalizer) if number not in found]


def _balanced(spec: TaskSpec, pool: Sequence[Example], shots: int, split: str) -> list[Example]:
    chosen: list[Example] = []
    for label, word in enumerate(spec.words):
        mine = [example for example in pool if example.label == label]
        if len(mine) < shots:
            raise TooFewRowsError(
                f"{spec.name}: {len(mine)} different examples left with label {word!r} for {split}; {shots} shots "
                f"need {shots}"
            )
        chosen += mine[:shots]
    return chosen


def _stratified(pool: Iterable[Example]) -> list[Example]:
    """Orders the examples so that the first n, for any n, have right letters that are as balanced as possible."""
    groups: dict[int | None, list[Example]] = {}
    for example in pool:
        groups.setdefault(example.label, []).append(example)
    return [example for example in chain.from_iterable(zip_longest(*groups.values())) if example is not None]


def _normalise(text: str) -> str:
    return " ".join(text.lower().split())


def _texts(examples: Iterable[Example]) -> set[str]:
    return {_normalise(example.input) for example in examples}
