"""Scores of single answers, as pure functions: of logits over classes, and of generated text."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def accuracy(class_logits: Tensor, labels: Tensor) -> Tensor:
    """1 where the likeliest class is the label, else 0. In a tie the first class wins; a row with NaN gives NaN.

    A row of -inf throughout stands for a target that chose no class, and gives 0.

    Args:
        class_logits: [N, C], over the verbalizer's classes, not the vocabulary.
        labels: [N] class indices.

    Returns:
        [N], in the dtype of `class_logits`.
    """
    right = (class_logits.argmax(-1) == labels).to(class_logits.dtype)
    right = right.masked_fill(class_logits.isneginf().all(-1), 0)
    return right.masked_fill(class_logits.isnan().any(-1), torch.nan)  # argmax would prefer NaN to any number


def softmax_margin(class_logits: Tensor, labels: Tensor) -> Tensor:
    """p_label - max_{j != label} p_j with p = softmax over the C classes (StablePrompt, Eq. 14).

    Adding a constant to a row's logits changes nothing, so log-likelihoods serve as logits.

    Args:
        class_logits: [N, C], C >= 2.
        labels: [N] class indices.

    Returns:
        [N], in [-1, 1]; 0 on a tie with the best wrong class, and where all logits of a row are -inf.
    """
    probabilities = class_logits.softmax(-1).masked_fill(class_logits.isneginf().all(-1, keepdim=True), 0)
    index = labels.unsqueeze(-1)
    right = probabilities.gather(-1, index).squeeze(-1)
    best_wrong = probabilities.scatter(-1, index, -torch.inf).amax(-1)
    return right - best_wrong


# -- generated text ----------------------------------------------------------------------------------------------
#
# Each metric takes the generated text and one accepted answer, and returns a number in [0, 1]; `best` takes the
# best value over several accepted answers.


def best(metric: Callable[[str, str], float], prediction: str, answers: Sequence[str]) -> float:
    """The best value of the metric over the accepted answers."""
    return max(metric(prediction, answer) for answer in answers)


def exact_match(prediction: str, answer: str) -> float:
    """1 if both are the same after `normalise` (Instruction Induction, Honovich et al. 2022)."""
    return float(normalise(prediction) == normalise(answer))


def exact_string(prediction: str, answer: str) -> float:
    """1 where both are the same up to white space (BIG-bench's exact_str_match)."""
    return float(prediction.split() == answer.split())


def exact_set(prediction: str, answer: str) -> float:
    """1 where both have the same words, in any order and number, after `normalise`."""
    return float(set(normalise(prediction).split()) == set(normalise(answer).split()))


def contains(prediction: str, answer: str) -> float:
    """1 where the answer occurs in the prediction, as whole words, after `normalise`."""
    return float(bool(re.search(rf"(?<!\w){re.escape(normalise(answer))}(?!\w)", normalise(prediction))))


def f1(prediction: str, answer: str) -> float:
    """Harmonic mean of word precision and recall after `normalise`, as in SQuAD (Rajpurkar et al. 2016)."""
    predicted, wanted = (Counter(normalise(text).split()) for text in (prediction, answer))
    shared = (predicted & wanted).total()
    if not predicted or not wanted:
        return float(predicted == wanted)
    return 2 * shared / (predicted.total() + wanted.total())


def normalise(text: str) -> str:
    """What Instruction Induction compares: the first line up to a full stop, lower case, without "and" and punctuation.

    A hyphen becomes a space. If this leaves nothing (of brackets, say), only white space is normalised.
    """
    first = text.replace(" and ", " ").replace("Sentence 1:", " ").replace("Sentence 2:", " ").strip()
    first = first.split("\n")[0].split(".")[0].lower().replace("-", " ")
    words = first.translate(str.maketrans("", "", string.punctuation)).split()
    return " ".join(words or text.split())
