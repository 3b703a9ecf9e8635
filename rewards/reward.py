"""From prompts and examples to one number per prompt."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rewards.functional import accuracy, best, contains, exact_match, exact_set, exact_string, f1, softmax_margin
from rewards.target import Asked, Target, grid, pairs
from tasks.spec import Example

TEXT_METRICS = {metric.__name__: metric for metric in (exact_match, exact_string, exact_set, contains, f1)}
STOPS = ("\n", "Input :")  # an answer is one line, and ends before another example


@dataclass(frozen=True)
class RewardResult:
    """The rewards of K prompts: scores [K], and the metrics that they are made of, by name, each [K]; on the CPU."""

    scores: Tensor
    metrics: dict[str, Tensor]


class Reply(NamedTuple):
    """The target's answer to an input and, if it chose a word, the probability of each word on offer."""

    answer: str
    probabilities: dict[str, float]

    @property
    def sound(self) -> bool:
        """Whether all probabilities are numbers."""
        return not any(map(math.isnan, self.probabilities.values()))


class Reward(ABC):
    """A weighted sum of metrics, each the mean over examples.

    Attributes:
        target: answers the examples.
        metric: the name of the metric that results are reported in.
        weights: the weight of each metric in the sum, by name.
    """

    target: Target
    metric: str
    weights: dict[str, float]

    @abstractmethod
    def judge(self, asked: Sequence[Asked], examples: Sequence[Example]) -> dict[str, Tensor]:
        """Metrics of single answers, each [B]; the B examples belong to the B inputs, in order."""

    @abstractmethod
    def reply(self, prompts: Sequence[str], inputs: Sequence[str], choices: Sequence[int | None]) -> list[Reply]:
        """The target's reply to each input under its own prompt; `choices`: how many letters each offers, if any."""

    @abstractmethod
    def right(self, answer: str, example: Example) -> float:
        """The metric of an answer to an example."""

    def __call__(self, prompts: Sequence[str], examples: Sequence[Example]) -> RewardResult:
        """Scores K prompts on the same examples; repeated prompts are run once."""
        distinct = {prompt: k for k, prompt in enumerate(dict.fromkeys(prompts))}
        rows = [distinct[prompt] for prompt in prompts]
        found = self.table(list(distinct), examples)
        return self.weighed({name: values.mean(1)[rows] for name, values in found.items()})

    def each(self, prompts: Sequence[str], examples: Sequence[Example]) -> RewardResult:
        """Scores B prompts, each on its own example."""
        return self.apart(prompts, [[example] for example in examples])

    def apart(self, prompts: Sequence[str], examples: Sequence[Sequence[Example]]) -> RewardResult:
        """Scores K prompts, each on examples of its own, K lists of at least one."""
        asked = [Asked(p, tuple(x.input for x in own)) for p, own in zip(prompts, examples, strict=True)]
        found = self.judge(asked, [example for own in examples for example in own])
        counts = [len(own) for own in examples]
        means = {name: torch.stack([x.mean() for x in values.split(counts)]) for name, values in found.items()}
        return self.weighed(means)

    def by_example(self, prompts: Sequence[str], examples: Sequence[Example]) -> Tensor:
        """[K, N]: the metric of every prompt on every example."""
        return self.table(prompts, examples)[self.metric]

    def table(self, prompts: Sequence[str], examples: Sequence[Example]) -> dict[str, Tensor]:
        """[K, N] of each metric."""
        asked = grid(prompts, [example.input for example in examples])
        found = self.judge(asked, [example for _ in prompts for example in examples])
        return {name: values.view(len(prompts), len(examples)) for name, values in found.items()}

    def weighed(self, metrics: dict[str, Tensor]) -> RewardResult:
        """The metrics and their weighted sum, the score."""
        terms = [weight * metrics[name] for name, weight in self.weights.items() if name in metrics]
        return RewardResult(torch.stack(terms).sum(0), metrics)


class ClassificationReward(Reward):
    """R = accuracy_weight * accuracy + margin_weight * softmax margin (StablePrompt, Eq. 13).

    Args:
        target: answers the examples.
        accuracy_weight, margin_weight: c_a and c_s of the paper, whose values are the defaults.
    """

    metric = "accuracy"

    def __init__(self, target: Target, accuracy_weight: float = 10.0, margin_weight: float = 0.1) -> None:
        self.target = target
        self.weights = {"accuracy": accuracy_weight, "margin": margin_weight}

    def judge(self, asked: Sequence[Asked], examples: Sequence[Example]) -> dict[str, Tensor]:
        """Accuracy and softmax margin of each answer."""
        logits, labels = _settle(self.target.class_logits(asked), examples)
        return {"accuracy": accuracy(logits, labels), "margin": softmax_margin(logits, labels)}

    def reply(self, prompts: Sequence[str], inputs: Sequence[str], choices: Sequence[int | None]) -> list[Reply]:
        """The label word or letter that the target chooses for each input; "" where it names none."""
        logits = _offered(self.target.class_logits(pairs(prompts, inputs)), choices)
        none = logits.isneginf().all(-1)  # of a target that writes, and named no word
        chances = logits.softmax(-1).masked_fill(none.unsqueeze(-1), 0)
        found = []
        for row, count, nothing in zip(chances.tolist(), choices, none.tolist(), strict=True):
            offered = dict(zip(self.target.words[:count], row, strict=False))
            found.append(Reply("" if nothing else max(offered, key=lambda word: offered[word]), offered))
        return found

    def right(self, answer: str, example: Example) -> float:
        """1 for a right label word or letter."""
        known = answer in self.target.words  # "" is none
        return float(known and self.target.words.index(answer) in (example.label, *example.also))


class GenerationReward(Reward):
    """R = metric_weight * metric + likelihood_weight * likelihood; the paper's F1, or another text metric.

    The metric compares the generated text with each accepted answer and takes the best value. The likelihood is that
    of the first accepted answer: the geometric mean of its tokens' probabilities. The paper has no such term, and its
    default weight is 0; it breaks ties where most rewards are 0.

    Args:
        target: answers the examples.
        metric: a name in TEXT_METRICS.
        metric_weight: 1 in the paper.
        likelihood_weight: 0 in the paper.
        answer_tokens: budget of an answer.
    """

    def __init__(
        self,
        target: Target,
        metric: str,
        metric_weight: float = 1.0,
        likelihood_weight: float = 0.0,
        answer_tokens: int = 50,
    ) -> None:
        self.target, self.metric, self.answer_tokens = target, metric, answer_tokens
        self.weights = {metric: metric_weight, "likelihood": likelihood_weight}

    def judge(self, asked: Sequence[Asked], examples: Sequence[Example]) -> dict[str, Tensor]:
        """The metric of each generated answer and, if it has a weight, the likelihood of the example's `answer`."""
        said = self.target.generate(asked, self.answer_tokens, STOPS)
        values = [self.right(text, example) for text, example in zip(said, examples, strict=True)]
        metrics = {self.metric: torch.tensor(values, device="cpu")}
        if self.weights["likelihood"]:
            answers = [example.answer for example in examples]
            metrics["likelihood"] = self.target.answer_logprobs(asked, answers).exp()
        return metrics

    def reply(self, prompts: Sequence[str], inputs: Sequence[str], choices: Sequence[int | None]) -> list[Reply]:
        """What the target writes to each input."""
        return [Reply(text, {}) for text in self.target.generate(pairs(prompts, inputs), self.answer_tokens, STOPS)]

    def right(self, answer: str, example: Example) -> float:
        """The best value of the metric over the accepted answers."""
        return best(TEXT_METRICS[self.metric], answer, example.answers)


def _offered(logits: Tensor, choices: Sequence[int | None]) -> Tensor:
    """Logits [B, C], -inf for the classes that a row does not offer."""
    absent = torch.zeros(logits.shape, dtype=torch.bool, device="cpu")
    for row, count in enumerate(choices):
        if count is not None:
            absent[row, count:] = True
    return logits.masked_fill(absent, -torch.inf)


def _settle(logits: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Masks classes that an example does not offer and, of several right ones, all but the one the target prefers.

    Args:
        logits: [B, C].
        examples: B of them.

    Returns:
        [B, C] logits, -inf for masked classes, and [B] labels.
    """
    right = torch.zeros(logits.shape, dtype=torch.bool, device="cpu")
    for row, example in enumerate(examples):
        right[row, [example.label, *example.also]] = True
    lowest = torch.finfo(logits.dtype).min  # a right class of probability 0 still goes before the wrong ones
    labels = torch.where(right, logits.clamp(min=lowest), -torch.inf).argmax(-1)
    others = right & ~torch.zeros_like(right).scatter(-1, labels.unsqueeze(-1), True)
    return _offered(logits, [example.choices for example in examples]).masked_fill(others, -torch.inf), labels
