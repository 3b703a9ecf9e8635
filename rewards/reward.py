"""From prompts and examples to one number per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.functional import accuracy, best, contains, exact_match, exact_set, exact_string, f1, softmax_margin
from rewards.generation import answer_logprobs, generate
from rewards.target import TargetModel
from tasks.spec import Example


@dataclass(frozen=True)
class RewardResult:
    """What K prompts are worth: scores [K], what they are made of by name, each [K]; all on the CPU."""

    scores: Tensor
    metrics: dict[str, Tensor]

    def pick(self, rows: list[int]) -> RewardResult:
        """The result with these rows, in this order; a row may come several times."""
        return RewardResult(self.scores[rows], {name: values[rows] for name, values in self.metrics.items()})


TEXT_METRICS = {metric.__name__: metric for metric in (exact_match, exact_string, exact_set, contains, f1)}
STOPS = ("\n", "Input :")  # an answer is one line, and the template's next example is none of it


class ClassificationReward:
    """R = accuracy_weight * accuracy + margin_weight * softmax margin, means over examples (StablePrompt, Eq. 13).

    Args:
        target: answers the examples.
        accuracy_weight, margin_weight: c_a and c_s of the paper, whose values are the defaults.
    """

    metric = "accuracy"  # what results are reported in

    def __init__(self, target: TargetModel, accuracy_weight: float = 10.0, margin_weight: float = 0.1) -> None:
        self.target = target
        self.accuracy_weight = accuracy_weight
        self.margin_weight = margin_weight

    def __call__(self, prompts: Sequence[str], examples: Sequence[Example]) -> RewardResult:
        """Scores K prompts on the same examples; a prompt that occurs twice is run once."""
        distinct = list(dict.fromkeys(prompts))
        logits = self.target.class_logits(distinct, [example.input for example in examples])  # [K', N, C]
        result = self._result(logits, examples, mean=True)
        return result.pick([distinct.index(prompt) for prompt in prompts])

    def answers(self, prompt: str, examples: Sequence[Example]) -> list[str]:
        """The label word or letter that the target chooses for each example."""
        (logits,) = self.target.class_logits([prompt], [example.input for example in examples])  # [N, C]
        chosen = _offered(logits, examples).argmax(-1).tolist()
        return [self.target.verbalizer.words[c] for c in chosen]

    def each(self, prompts: Sequence[str], examples: Sequence[Example]) -> RewardResult:
        """Scores B prompts, each on its own example."""
        logits = self.target.pair_logits(prompts, [example.input for example in examples])  # [B, C]
        return self._result(logits.unsqueeze(0), examples, mean=False)

    def _result(self, logits: Tensor, examples: Sequence[Example], mean: bool) -> RewardResult:
        """Of [K, N, C] logits: means over examples, [K], or of one prompt's row the single values, [N]."""
        logits, labels = _settle(logits, examples)
        values = {"accuracy": accuracy(logits, labels), "margin": softmax_margin(logits, labels)}
        metrics = {name: value.mean(1) if mean else value[0] for name, value in values.items()}
        scores = self.accuracy_weight * metrics["accuracy"] + self.margin_weight * metrics["margin"]
        return RewardResult(scores, metrics)


def by_example(
    reward: ClassificationReward | GenerationReward, prompts: Sequence[str], examples: Sequence[Example]
) -> Tensor:
    """[K, N]: the metric of every prompt on every example."""
    values = reward.each([p for p in prompts for _ in examples], [e for _ in prompts for e in examples])
    return values.metrics[reward.metric].view(len(prompts), len(examples))


def _offered(logits: Tensor, examples: Sequence[Example]) -> Tensor:
    """Logits [*, N, C], -inf for the classes that an example does not offer."""
    absent = torch.zeros(logits.shape[-2:], dtype=torch.bool, device="cpu")
    for row, example in enumerate(examples):
        if example.choices is not None:
            absent[row, example.choices :] = True
    return logits.masked_fill(absent, -torch.inf)


def _settle(logits: Tensor, examples: Sequence[Example]) -> tuple[Tensor, Tensor]:
    """Leaves each example the classes that it offers and, of several right ones, the one the target prefers.

    Returns:
        [K, N, C] logits, -inf for classes out of question, and [K, N] labels.
    """
    right = torch.zeros(logits.shape[1:], dtype=torch.bool, device="cpu")
    for row, example in enumerate(examples):
        right[row, [example.label, *example.also]] = True
    lowest = torch.finfo(logits.dtype).min  # an impossible right class still goes before the wrong ones
    labels = torch.where(right, logits.clamp(min=lowest), -torch.inf).argmax(-1)
    others = right & ~torch.zeros_like(logits, dtype=torch.bool).scatter(-1, labels.unsqueeze(-1), True)
    return _offered(logits, examples).masked_fill(others, -torch.inf), labels


class GenerationReward:
    """R = metric_weight * metric + likelihood_weight * likelihood, means over examples; the paper's F1 and its kin.

    The metric compares what the target generates with the accepted answer that it is nearest to. The likelihood is the
    mean probability per token of the first accepted answer. It is ours, and 0 by default: rewards that are mostly 0
    teach nothing, and the likelihood breaks their ties.

    Args:
        target: answers the examples.
        metric: a name in TEXT_METRICS.
        metric_weight: 1 in the paper.
        likelihood_weight: 0 in the paper.
        answer_tokens: budget of an answer.
    """

    def __init__(
        self,
        target: TargetModel,
        metric: str,
        metric_weight: float = 1.0,
        likelihood_weight: float = 0.0,
        answer_tokens: int = 50,
    ) -> None:
        self.target = target
        self.metric = metric
        self.metric_weight = metric_weight
        self.likelihood_weight = likelihood_weight
        self.answer_tokens = answer_tokens

    def __call__(self, prompts: Sequence[str], examples: Sequence[Example]) -> RewardResult:
        """Scores K prompts on the same examples; a prompt that occurs twice is run once."""
        distinct = list(dict.fromkeys(prompts))
        single = self.each(
            [prompt for prompt in distinct for _ in examples], [example for _ in distinct for example in examples]
        )
        shape = (len(distinct), len(examples))
        metrics = {name: values.view(shape).mean(1) for name, values in single.metrics.items()}
        result = RewardResult(single.scores.view(shape).mean(1), metrics)
        return result.pick([distinct.index(prompt) for prompt in prompts])

    def each(self, prompts: Sequence[str], examples: Sequence[Example]) -> RewardResult:
        """Scores B prompts, each on its own example."""
        inputs = [example.input for example in examples]
        said = generate(self.target, prompts, inputs, self.answer_tokens, STOPS)
        metric = TEXT_METRICS[self.metric]
        values = torch.tensor(
            [best(metric, text, e.answers) for text, e in zip(said, examples, strict=True)], device="cpu"
        )
        metrics, scores = {self.metric: values}, self.metric_weight * values
        if self.likelihood_weight:
            likely = answer_logprobs(self.target, prompts, inputs, [example.answer for example in examples]).exp()
            metrics["likelihood"] = likely
            scores = scores + self.likelihood_weight * likely
        return RewardResult(scores, metrics)
