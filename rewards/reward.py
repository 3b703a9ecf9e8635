"""From prompts and examples to one number per prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rewards.functional import accuracy, softmax_margin
from rewards.target import TargetModel
from tasks.task import Example


@dataclass(frozen=True)
class RewardResult:
    """What K prompts are worth: scores [K], what they are made of by name, each [K]; all on the CPU."""

    scores: Tensor
    metrics: dict[str, Tensor]


class ClassificationReward:
    """R = accuracy_weight * accuracy + margin_weight * softmax margin, means over examples (StablePrompt, Eq. 13).

    Args:
        target: answers the examples.
        accuracy_weight, margin_weight: c_a and c_s of the paper, whose values are the defaults.
    """

    def __init__(self, target: TargetModel, accuracy_weight: float = 10.0, margin_weight: float = 0.1) -> None:
        self.target = target
        self.accuracy_weight = accuracy_weight
        self.margin_weight = margin_weight

    def __call__(self, prompts: Sequence[str], examples: Sequence[Example]) -> RewardResult:
        """Scores K prompts on the same examples; a prompt that occurs twice is run once."""
        distinct = list(dict.fromkeys(prompts))
        logits = self.target.class_logits(distinct, [example.input for example in examples]).cpu()  # [K', N, C]
        logits = logits[[distinct.index(prompt) for prompt in prompts]]
        labels = torch.tensor([example.label for example in examples]).expand(len(prompts), -1)
        means = {
            "accuracy": accuracy(logits, labels).mean(1),
            "margin": softmax_margin(logits, labels).mean(1),
        }
        return RewardResult(self.accuracy_weight * means["accuracy"] + self.margin_weight * means["margin"], means)
