"""Rewards: margin and accuracy against hand-computed values, the whole reward against a plain loop over the model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from random import Random
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rewards.functional import accuracy, softmax_margin
from rewards.reward import ClassificationReward
from rewards.target import Asked, Target
from tasks.spec import Example
from tests.conftest import sharpen, target_of

EXAMPLES = (
    Example("a fine film", 1, "yes"),
    Example("dull", 0, "no"),
    Example("it never ends , and it never begins", 0, "no"),
)
WORDS = ("no", "yes")
TEMPLATE = "{prompt} Input : {input} Output :"
PROMPTS = ("Is it good ?", "Say yes .", "Answer yes when the sentence below is about a film , else no .")


def logs(*probabilities: float) -> Tensor:
    """[1, C] logits whose softmax is exactly these probabilities."""
    return torch.tensor([probabilities], dtype=torch.float64).log()


def stub(tables: dict[str, Sequence[Sequence[float]]]) -> tuple[Target, list[list[str]]]:
    """A target that gives these probabilities, prompt -> [N, C], and a list that records what it is asked."""
    asked: list[list[str]] = []

    def class_logits(wanted: Sequence[Asked]) -> Tensor:
        asked.append([prompt for prompt, _ in wanted])
        return torch.tensor([row for prompt, _ in wanted for row in tables[prompt]], dtype=torch.float64).log()

    return cast(Target, SimpleNamespace(class_logits=class_logits)), asked


# -- margin ------------------------------------------------------------------------------------------------------

# (probabilities, label, p_label - best other probability)
MARGINS = [
    ((0.9, 0.1), 0, 0.8),
    ((0.9, 0.1), 1, -0.8),
    ((0.25, 0.75), 1, 0.5),
    ((0.1, 0.2, 0.3, 0.4), 0, -0.3),  # .1 - .4
    ((0.1, 0.2, 0.3, 0.4), 1, -0.2),  # .2 - .4
    ((0.1, 0.2, 0.3, 0.4), 2, -0.1),  # .3 - .4
    ((0.1, 0.2, 0.3, 0.4), 3, 0.1),  # .4 - .3
    ((0.4, 0.4, 0.15, 0.05), 2, -0.25),  # .15 - .4
]


@pytest.mark.parametrize(("probabilities", "label", "expected"), MARGINS)
def test_margin_is_the_label_minus_the_best_other_class(
    probabilities: tuple[float, ...], label: int, expected: float
) -> None:
    margin = softmax_margin(logs(*probabilities), torch.tensor([label]))
    assert_close(margin, torch.tensor([expected], dtype=torch.float64), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("probabilities", [(0.5, 0.5), (0.4, 0.4, 0.1, 0.1)])
def test_margin_of_a_tie_is_zero(probabilities: tuple[float, ...]) -> None:
    assert softmax_margin(logs(*probabilities), torch.tensor([0])).item() == 0


@pytest.mark.parametrize(("label", "expected"), [(0, 1.0), (1, -1.0), (2, -1.0)])
def test_margin_of_certainty_is_one(label: int, expected: float) -> None:
    logits = torch.tensor([[0.0, -1000.0, -1000.0]])  # exp(-1000) underflows to 0, so p = (1, 0, 0)
    assert softmax_margin(logits, torch.tensor([label])).item() == expected


def test_margin_takes_logits_that_are_all_very_negative() -> None:
    # p = (1/(1+e^-1), e^-1/(1+e^-1)); the difference is tanh(1/2)
    margin = softmax_margin(torch.tensor([[-1000.0, -1001.0]], dtype=torch.float64), torch.tensor([0]))
    assert_close(margin.item(), math.tanh(0.5), rtol=1e-12, atol=0)


def test_margin_normalises_over_the_classes_given() -> None:
    # Log-likelihoods .03 and .01 of a whole vocabulary: over the two classes that is .75 and .25.
    assert_close(softmax_margin(logs(0.03, 0.01), torch.tensor([0])).item(), 0.5, rtol=1e-12, atol=0)


def test_margin_reads_each_row_by_its_own_label() -> None:
    rows = logs(0.9, 0.1).repeat(2, 1)
    expected = torch.tensor([0.8, -0.8], dtype=torch.float64)
    assert_close(softmax_margin(rows, torch.tensor([0, 1])), expected, rtol=1e-12, atol=0)


finite = st.floats(-50, 50, allow_nan=False, width=32)
rows = st.lists(finite, min_size=2, max_size=5)


@settings(deadline=None, max_examples=50)
@given(rows, st.data())
def test_margin_lies_between_minus_one_and_one(row: list[float], data: st.DataObject) -> None:
    label = data.draw(st.integers(0, len(row) - 1))
    assert -1 <= softmax_margin(torch.tensor([row]), torch.tensor([label])).item() <= 1


@settings(deadline=None, max_examples=50)
@given(rows, finite)
def test_margin_ignores_a_constant_added_to_all_logits(row: list[float], constant: float) -> None:
    logits, label = torch.tensor([row], dtype=torch.float64), torch.tensor([0])
    assert_close(softmax_margin(logits + constant, label), softmax_margin(logits, label), rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=50)
@given(rows, st.randoms(use_true_random=False))
def test_margin_ignores_the_order_of_the_wrong_classes(row: list[float], random: Random) -> None:
    others = row[1:]
    random.shuffle(others)
    one, other = (torch.tensor([[row[0], *rest]], dtype=torch.float64) for rest in (row[1:], others))
    label = torch.tensor([0])
    assert_close(softmax_margin(one, label), softmax_margin(other, label), rtol=0, atol=1e-12)


def test_margin_is_positive_exactly_where_the_label_is_strictly_likeliest() -> None:
    logits = torch.tensor([[3.0, 1.0, 2.0], [1.0, 3.0, 2.0], [2.0, 2.0, 1.0]])
    assert softmax_margin(logits, torch.tensor([0, 0, 0])).sign().tolist() == [1, -1, 0]


# -- accuracy ----------------------------------------------------------------------------------------------------


def test_accuracy_is_one_where_the_label_is_likeliest() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [1.0, 2.0, 0.0], [-5.0, -9.0, -7.0]])
    assert accuracy(logits, torch.tensor([1, 0, 0])).tolist() == [1, 0, 1]


def test_accuracy_of_a_tie_goes_to_the_first_class() -> None:
    logits = torch.zeros(3, 3)
    assert accuracy(logits, torch.tensor([0, 1, 2])).tolist() == [1, 0, 0]


def test_accuracy_of_logits_that_are_no_numbers_is_none() -> None:
    # argmax takes NaN for the highest value, so a broken target would be right wherever the label is 0
    logits = torch.tensor([[math.nan, 1.0], [0.0, 1.0], [-math.inf, 1.0]])
    found = accuracy(logits, torch.tensor([0, 1, 1]))
    assert found[0].isnan() and found[1:].tolist() == [1, 1]


def test_accuracy_keeps_the_dtype_so_that_it_can_be_averaged() -> None:
    assert accuracy(logs(0.9, 0.1), torch.tensor([0])).dtype == torch.float64


# -- the reward --------------------------------------------------------------------------------------------------


def test_reward_is_the_weighted_sum_of_mean_accuracy_and_mean_margin() -> None:
    # Labels 1, 0, 0. Probabilities (no, yes), by example:
    # right: (.3, .7) acc 1, margin .4;  (.4, .6) acc 0, margin -.2;  (.8, .2) acc 1, margin .6
    #        mean acc 2/3, mean margin .8/3; score 10 * 2/3 + .1 * .8/3 = 20.08/3
    # wrong: (.9, .1) acc 0, margin -.8;  (.5, .5) acc 1 (first class), margin 0;  (.2, .8) acc 0, margin -.6
    #        mean acc 1/3, mean margin -1.4/3; score 10/3 - .14/3 = 9.86/3
    target, _ = stub({"right": [(0.3, 0.7), (0.4, 0.6), (0.8, 0.2)], "wrong": [(0.9, 0.1), (0.5, 0.5), (0.2, 0.8)]})
    result = ClassificationReward(target)(["right", "wrong"], EXAMPLES)
    assert_close(result.scores, torch.tensor([20.08 / 3, 9.86 / 3], dtype=torch.float64), rtol=1e-12, atol=0)


@pytest.mark.parametrize(("name", "expected"), [("accuracy", 2 / 3), ("margin", 0.8 / 3)])  # as derived above
def test_reward_reports_what_it_is_made_of(name: str, expected: float) -> None:
    target, _ = stub({"right": [(0.3, 0.7), (0.4, 0.6), (0.8, 0.2)]})
    metrics = ClassificationReward(target)(["right"], EXAMPLES).metrics
    assert_close(metrics[name].item(), expected, rtol=1e-12, atol=0)


def test_reward_weights_can_be_set() -> None:
    # accuracy 2/3 and margin .8/3 as above; 3 * 2/3 + 2 * .8/3 = 7.6/3
    target, _ = stub({"right": [(0.3, 0.7), (0.4, 0.6), (0.8, 0.2)]})
    reward = ClassificationReward(target, accuracy_weight=3, margin_weight=2)
    assert_close(reward(["right"], EXAMPLES).scores.item(), 7.6 / 3, rtol=1e-12, atol=0)


def test_reward_asks_for_each_distinct_prompt_once() -> None:
    table = [(0.5, 0.5)] * len(EXAMPLES)
    target, asked = stub({"a": table, "b": table})
    ClassificationReward(target)(["b", "a", "b", "b"], EXAMPLES)
    assert sorted(map(sorted, asked)) == [["a", "b"]]


def test_reward_gives_each_copy_of_a_prompt_that_prompts_score() -> None:
    # b is certain and right on all three examples, a certain and wrong: scores 10 + .1 and 0 - .1.
    right, wrong = [(0.0, 1.0), (1.0, 0.0), (1.0, 0.0)], [(1.0, 0.0), (0.0, 1.0), (0.0, 1.0)]
    target, _ = stub({"a": wrong, "b": right})
    scores = ClassificationReward(target)(["b", "a", "b", "b"], EXAMPLES).scores
    assert_close(scores, torch.tensor([10.1, -0.1, 10.1, 10.1], dtype=torch.float64), rtol=1e-12, atol=0)


# -- the reward over a real model --------------------------------------------------------------------------------


def loop_score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompt: str) -> float:
    """The reward of one prompt the slow way: one example at a time, no padding, no cache, all logits."""
    right, margins = [], []
    for example in EXAMPLES:
        context = tokenizer(f"{prompt} Input : {example.input} Output :")["input_ids"]
        likelihoods = []
        for word in WORDS:
            ids = tokenizer(f" {word}")["input_ids"]
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([context + ids]), use_cache=False).logits[0].double()
            logprobs = logits.log_softmax(-1)
            steps = [logprobs[len(context) - 1 + i, token].item() for i, token in enumerate(ids)]
            likelihoods.append(math.exp(sum(steps)))
        probabilities = [likelihood / sum(likelihoods) for likelihood in likelihoods]
        wrong = max(p for i, p in enumerate(probabilities) if i != example.label)
        right.append(probabilities.index(max(probabilities)) == example.label)
        margins.append(probabilities[example.label] - wrong)
    return 10 * sum(right) / len(right) + 0.1 * sum(margins) / len(margins)


def test_reward_equals_a_plain_loop_over_the_model(
    tiny_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    sharpen(tiny_lm)
    expected = [loop_score(tiny_lm, tokenizer, prompt) for prompt in PROMPTS]
    scores = ClassificationReward(target_of(tiny_lm, tokenizer, TEMPLATE, WORDS))(PROMPTS, EXAMPLES).scores
    assert_close(scores.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-5)


def test_reward_of_permuted_prompts_is_the_permuted_reward(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    reward = ClassificationReward(target_of(sharpen(tiny_llama), tokenizer, TEMPLATE, WORDS))
    order = [2, 0, 1]
    permuted = reward([PROMPTS[i] for i in order], EXAMPLES).scores
    assert_close(permuted, reward(PROMPTS, EXAMPLES).scores[order], rtol=0, atol=1e-5)


def test_duplicate_prompts_cost_no_further_pass_of_the_model(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    reward = ClassificationReward(target_of(tiny_llama, tokenizer, TEMPLATE, WORDS))
    sizes: list[int] = []

    def count(_module: object, _args: object, kwargs: dict[str, Tensor]) -> None:
        sizes.append(kwargs["input_ids"].numel())

    tiny_llama.register_forward_pre_hook(count, with_kwargs=True)
    reward([PROMPTS[0]], EXAMPLES)
    once = list(sizes)
    sizes.clear()
    reward([PROMPTS[0]] * 4, EXAMPLES)
    assert once and sizes == once
