"""The target as rewards see it: a frozen model that answers inputs under a prompt, wherever it runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from appo.lm.ranks import Ranks

REMEMBERED = 100_000  # pairs of prompt and input; some 20 MB
NO_NUMBERS = "the target's logits are not numbers; its weights are damaged, or overflow"


class Asked(NamedTuple):
    """A prompt, and the rendered inputs to answer under it."""

    prompt: str
    inputs: tuple[str, ...]


def grid(prompts: Sequence[str], inputs: Sequence[str]) -> list[Asked]:
    """Every input under every prompt."""
    return [Asked(prompt, tuple(inputs)) for prompt in prompts]


def pairs(prompts: Sequence[str], inputs: Sequence[str]) -> list[Asked]:
    """Each input under its own prompt."""
    return [Asked(prompt, (text,)) for prompt, text in zip(prompts, inputs, strict=True)]


def fill(template: str, prompt: str, text: str) -> str:
    """The template with its prompt and input. Braces in prompts and inputs are just braces."""
    values = {"{prompt}": prompt, "{input}": text}
    return "".join(values.get(part, part) for part in re.split(r"(\{prompt\}|\{input\})", template))


def cut(text: str, stop: Sequence[str]) -> tuple[str, bool]:
    """The text up to the first stop string, and whether there is one; leading white space never counts as one."""
    lead = len(text) - len(text.lstrip())
    places = [place for word in stop if (place := text.find(word, lead)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


class Target(Protocol):
    """Answers B inputs, in the order asked; B counts the inputs under all prompts.

    Attributes:
        words: the label words in class order; none where the answer is text.
    """

    words: tuple[str, ...]

    def class_logits(self, asked: Sequence[Asked]) -> Tensor:
        """[B, C] float32 on the CPU: log-likelihoods of the label words, up to a constant per row."""
        ...

    def generate(self, asked: Sequence[Asked], budget: int, stop: Sequence[str]) -> list[str]:
        """B texts of at most `budget` tokens: the likeliest continuation, cut before the first stop string."""
        ...

    def answer_logprobs(self, asked: Sequence[Asked], answers: Sequence[str]) -> Tensor:
        """[B] float32 on the CPU: mean log-probability per token of each of the B answers."""
        ...

    def check_fits(self, prompt: str | int, text: str) -> None:
        """Refuses an input that leaves no room for the prompt (or, given a number, for a prompt of that length)."""
        ...

    def described(self) -> dict[str, Any]:
        """The settings that its answers depend on, as plain values."""
        ...


class Shared:
    """A target that the processes of a job run together: each answers its share, and gets all answers."""

    def __init__(self, target: Target, ranks: Ranks) -> None:
        self.target, self.ranks, self.words = target, ranks, target.words
        self.check_fits, self.described = target.check_fits, target.described

    def class_logits(self, asked: Sequence[Asked]) -> Tensor:
        """The target's class logits."""
        return self._divided(asked, lambda mine, _: self.target.class_logits(mine))

    def generate(self, asked: Sequence[Asked], budget: int, stop: Sequence[str]) -> list[str]:
        """The target's texts."""
        return self._divided(asked, lambda mine, _: self.target.generate(mine, budget, stop))

    def answer_logprobs(self, asked: Sequence[Asked], answers: Sequence[str]) -> Tensor:
        """The target's log-probabilities of the answers."""
        return self._divided(asked, lambda mine, rows: self.target.answer_logprobs(mine, answers[rows]))

    def _divided(self, asked: Sequence[Asked], answer: Callable[[list[Asked], slice], Any]) -> Any:
        """The answers to all inputs; a prompt whose inputs go to two ranks is read by both."""
        every = [(prompt, text) for prompt, inputs in asked for text in inputs]

        def mine(rows: slice) -> list[Any]:
            grouped = groupby(every[rows], key=lambda pair: pair[0])
            return [answer([Asked(prompt, tuple(text for _, text in part)) for prompt, part in grouped], rows)]

        (found,) = self.ranks.divide(len(every), mine)
        return found


class Remembered:
    """A target that computes the class logits of a prompt and an input once, and remembers them.

    In another batch the same logits differ in their last bits, so what is remembered is part of a run's state.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.words = target, target.words
        self.generate, self.answer_logprobs = target.generate, target.answer_logprobs
        self.check_fits, self.described = target.check_fits, target.described
        self._known: dict[tuple[str, str], Tensor] = {}

    def class_logits(self, asked: Sequence[Asked]) -> Tensor:
        """The target's class logits; it computes only pairs of prompt and input that are not known yet."""
        wanted = [(prompt, text) for prompt, inputs in asked for text in inputs]
        missing: dict[str, dict[str, None]] = {}
        for prompt, text in wanted:
            if (prompt, text) not in self._known:
                missing.setdefault(prompt, {})[text] = None
        if missing:
            # In a fixed order: in another batch logits differ in their last bits.
            new = [Asked(prompt, tuple(missing[prompt])) for prompt in sorted(missing)]
            named = [(prompt, text) for prompt, inputs in new for text in inputs]
            self._known |= zip(named, self.target.class_logits(new), strict=True)
        found = torch.stack([self._known[pair] for pair in wanted])
        for pair in list(self._known)[: len(self._known) - REMEMBERED]:
            del self._known[pair]
        return found

    def learn(self, scored: Iterable[tuple[str, str, Sequence[float | None]]]) -> None:
        """Adds class logits from elsewhere: prompt, input and [C] numbers, None for -inf. What is known stays."""
        for prompt, text, logits in scored:
            values = [-torch.inf if value is None else value for value in logits]
            self._known.setdefault((prompt, text), torch.tensor(values, dtype=torch.float32, device="cpu"))

    def state_dict(self) -> dict[str, Any]:
        """What is remembered, to be saved."""
        return {"pairs": list(self._known), "logits": torch.stack(list(self._known.values())) if self._known else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores what was remembered."""
        self._known = dict(zip(state["pairs"], state["logits"], strict=True)) if state["pairs"] else {}
