"""Scores of single answers, as pure functions of tensors: no model, no text."""

from __future__ import annotations

import torch
from torch import Tensor


def accuracy(class_logits: Tensor, labels: Tensor) -> Tensor:
    """1 where the likeliest class is the label, else 0; of equal logits the first class wins.

    Args:
        class_logits: [N, C], over the verbalizer's classes, not the vocabulary.
        labels: [N] class indices.

    Returns:
        [N], in the dtype of `class_logits`.
    """
    return (class_logits.argmax(-1) == labels).to(class_logits.dtype)


def softmax_margin(class_logits: Tensor, labels: Tensor) -> Tensor:
    """p_label - max_{j != label} p_j with p = softmax over the C classes (StablePrompt, Eq. 14).

    Adding a constant to a row's logits changes nothing, so log-likelihoods serve as logits.

    Args:
        class_logits: [N, C], C >= 2.
        labels: [N] class indices.

    Returns:
        [N], in [-1, 1]; 0 on a tie with the best wrong class.
    """
    probabilities = class_logits.softmax(-1)
    index = labels.unsqueeze(-1)
    right = probabilities.gather(-1, index).squeeze(-1)
    best_wrong = probabilities.scatter(-1, index, -torch.inf).amax(-1)
    return right - best_wrong
