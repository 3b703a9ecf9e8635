"""The target as rewards see it: a frozen model that answers inputs under a prompt, wherever it runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from appo.lm.parallel.ranks import Ranks

REMEMBERED = 100_000  # answers; some 20 MB of class logits, or 50 of texts
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


def flat(asked: Sequence[Asked]) -> list[tuple[str, str]]:
    """The B pairs of prompt and input, in order."""
    return [(prompt, text) for prompt, inputs in asked for text in inputs]


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
        every = flat(asked)

        def mine(rows: slice) -> list[Any]:
            grouped = groupby(every[rows], key=lambda pair: pair[0])
            return [answer([Asked(prompt, tuple(text for _, text in part)) for prompt, part in grouped], rows)]

        (found,) = self.ranks.divide(len(every), mine)
        return found


class Remembered:
    """A target that answers each input under each prompt once, and remembers class logits, texts and log-probabilities.

    The same answer computed in another batch differs in its last bits, so a run's checkpoint holds the memory.
    """

    def __init__(self, target: Target) -> None:
        self.target, self.words = target, target.words
        self.check_fits, self.described = target.check_fits, target.described
        # By prompt, input and what else an answer depends on; the values are class logits [C], a text or a number.
        self._known: dict[tuple[Any, ...], Any] = {}

    def class_logits(self, asked: Sequence[Asked]) -> Tensor:
        """The target's class logits."""
        return torch.stack(self._answers([(*pair,) for pair in flat(asked)], self.target.class_logits))

    def generate(self, asked: Sequence[Asked], budget: int, stop: Sequence[str]) -> list[str]:
        """The target's texts."""
        keys = [(*pair, budget, tuple(stop)) for pair in flat(asked)]
        return self._answers(keys, lambda new: self.target.generate(new, budget, stop))

    def answer_logprobs(self, asked: Sequence[Asked], answers: Sequence[str]) -> Tensor:
        """The target's log-probabilities of the answers."""
        keys = [(*pair, answer) for pair, answer in zip(flat(asked), answers, strict=True)]
        found = self._answers(keys, lambda new, said: self.target.answer_logprobs(new, said).tolist(), with_rest=True)
        return torch.tensor(found, dtype=torch.float32, device="cpu")

    def _answers(
        self, keys: Sequence[tuple[Any, ...]], answer: Callable[..., Iterable[Any]], with_rest: bool = False
    ) -> list[Any]:
        """The value of each key; `answer` computes only those that are not known yet.

        Args:
            keys: (prompt, input, *rest).
            answer: maps a list of Asked to values, in order; with `with_rest` it also gets each key's rest, one item.
        """
        missing: dict[str, dict[tuple[Any, ...], None]] = {}
        for key in keys:
            if key not in self._known:
                missing.setdefault(key[0], {})[key] = None
        if missing:
            # In a fixed order: in another batch logits differ in their last bits.
            new = [Asked(prompt, tuple(key[1] for key in missing[prompt])) for prompt in sorted(missing)]
            named = [key for prompt in sorted(missing) for key in missing[prompt]]
            rest = [[key[2] for key in named]] if with_rest else []
            self._known |= zip(named, answer(new, *rest), strict=True)
        found = [self._known[key] for key in keys]
        for key in list(self._known)[: max(0, len(self._known) - REMEMBERED)]:
            del self._known[key]
        return found

    def learn(self, rows: Iterable[Mapping[str, Any]]) -> None:
        """Adds answers from elsewhere; answers that are known already stay.

        Args:
            rows: "prompt" and "input" with "logits" (C numbers), with "text", "budget" and "stop", or with "answer" and
                "logprob"; None stands for -inf.
        """
        for row in rows:
            key: tuple[Any, ...] = (row["prompt"], row["input"])
            value = row.get("text")
            if "logits" in row:
                value = torch.tensor([_number(x) for x in row["logits"]], dtype=torch.float32, device="cpu")
            elif "text" in row:
                key = (*key, row["budget"], tuple(row["stop"]))
            else:
                key, value = (*key, row["answer"]), _number(row["logprob"])
            self._known.setdefault(key, value)

    def state_dict(self) -> dict[str, Any]:
        """The remembered answers, to be saved; class logits as one tensor, as many small ones are slow to write."""
        logits = {key: value for key, value in self._known.items() if isinstance(value, Tensor)}
        others = {key: value for key, value in self._known.items() if key not in logits}
        return {
            "pairs": list(logits),
            "logits": torch.stack(list(logits.values())) if logits else None,
            "others": others,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores the remembered answers."""
        self._known = dict(zip(state["pairs"], state["logits"], strict=True)) if state["pairs"] else {}
        self._known |= state.get("others", {})


def _number(value: float | None) -> float:
    return -torch.inf if value is None else value
