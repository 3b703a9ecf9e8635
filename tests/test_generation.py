"""Generated answers: greedy continuations against a plain loop, stop strings, token limits, and scores."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from appo.lm.model import ContextTooLongError
from rewards.functional import best, contains, exact_match, exact_set, exact_string, f1, normalise
from rewards.reward import TEXT_METRICS, ClassificationReward, GenerationReward
from rewards.target import Asked, Target, pairs
from tasks.spec import Example
from tests.conftest import sharpen, target_of

TEMPLATE = "{prompt} Input : {input} Output :"
PROMPTS = ("Say it .", "", "Write the plural of the word , and nothing else .")  # ragged
INPUTS = ("cup", "a much longer input than the others", "é")
PAIRS = [(prompt, text) for prompt in PROMPTS for text in INPUTS]
BUDGET = 6


def plain_greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, context: str, budget: int) -> str:
    """Continues one row without padding and cache: runs the whole text again for every token."""
    ids = tokenizer(context)["input_ids"]
    written: list[int] = []
    for _ in range(budget):
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + written]), use_cache=False).logits[0, -1].argmax())
        if token == tokenizer.eos_token_id:
            break
        written.append(token)
    return tokenizer.decode(written, skip_special_tokens=True)


@pytest.mark.parametrize("max_batch_tokens", [16_384, 200, 1])
def test_generation_equals_the_plain_loop(
    tiny_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_batch_tokens: int
) -> None:
    target = target_of(sharpen(tiny_lm), tokenizer, TEMPLATE, (), max_batch_tokens=max_batch_tokens)
    plain = [plain_greedy(tiny_lm, tokenizer, target.context(p, x), BUDGET).strip() for p, x in PAIRS]
    assert target.generate(pairs(*zip(*PAIRS, strict=True)), BUDGET, stop=()) == plain
    assert len(set(plain)) > 1  # the comparison compares something


def always(model: PreTrainedModel, token: int) -> PreTrainedModel:
    """Makes a model that says one token, whatever it reads: its head has zero weights and a bias of 1 for the token."""
    model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
    bias = torch.zeros(model.lm_head.out_features)
    bias[token] = 1.0
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


@pytest.mark.parametrize(("stop", "expected"), [((), "a" * BUDGET), (("aaa",), ""), (("b",), "a" * BUDGET)])
def test_the_budget_and_stop_strings_end_an_answer(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, stop: tuple[str, ...], expected: str
) -> None:
    target = target_of(always(tiny_llama, tokenizer.convert_tokens_to_ids("a")), tokenizer, TEMPLATE, ())
    assert target.generate(pairs(["p"], ["x"]), BUDGET, stop) == [expected]


def test_an_end_of_sequence_ends_an_answer(tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    target = target_of(always(tiny_llama, tokenizer.eos_token_id), tokenizer, TEMPLATE, ())
    assert target.generate(pairs(["p", "p"], ["x", "y"]), BUDGET, ()) == ["", ""]


def test_logits_that_are_no_numbers_end_in_an_error_that_says_so(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    target = target_of(always(tiny_llama, 9), tokenizer, TEMPLATE, ())
    with torch.no_grad():
        target.lm.model.lm_head.bias[7] = torch.nan
    with pytest.raises(FloatingPointError, match="the target's logits are not numbers"):
        target.generate(pairs(["p"], ["x"]), BUDGET, ())


def test_the_models_generation_config_changes_nothing(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    target = target_of(sharpen(tiny_llama), tokenizer, TEMPLATE, ())
    before = target.generate(pairs(PROMPTS, INPUTS), BUDGET, ())
    tiny_llama.generation_config.update(do_sample=True, temperature=9.0, repetition_penalty=50.0, min_new_tokens=3)
    assert target.generate(pairs(PROMPTS, INPUTS), BUDGET, ()) == before


def test_what_does_not_fit_into_the_context_is_refused_before_it_is_run(
    tiny_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    # ' Input : x Output :' has 19 bytes; the context holds 512.
    target = target_of(tiny_lm, tokenizer, TEMPLATE, ())
    assert len(target.generate(pairs(["p" * (512 - 19 - BUDGET)], ["x"]), BUDGET, ())) == 1
    with pytest.raises(ContextTooLongError, match="up to 513 tokens"):
        target.generate(pairs(["p", "p" * (512 - 19 - BUDGET + 1)], ["x", "x"]), BUDGET, ())
    with pytest.raises(ContextTooLongError, match="up to 514 tokens"):
        target.answer_logprobs(pairs(["p" * (512 - 19)], ["x"]), ["a"])  # the answer is two tokens, " a"


@pytest.mark.parametrize("max_batch_tokens", [16_384, 1])
def test_answer_logprobs_equal_the_plain_loop(
    tiny_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_batch_tokens: int
) -> None:
    answers = ("cups", "no", "a long answer")
    target = target_of(sharpen(tiny_lm), tokenizer, TEMPLATE, (), max_batch_tokens=max_batch_tokens)
    plain = []
    for prompt, text, answer in zip(PROMPTS, INPUTS, answers, strict=True):
        context = tokenizer(target.context(prompt, text))["input_ids"]
        ids = tokenizer(f" {answer}")["input_ids"]
        with torch.no_grad():
            logits = tiny_lm(input_ids=torch.tensor([context + ids]), use_cache=False).logits[0]
        steps = logits.log_softmax(-1)[len(context) - 1 : -1].gather(-1, torch.tensor(ids).unsqueeze(-1))
        plain.append(steps.mean())
    assert_close(target.answer_logprobs(pairs(PROMPTS, INPUTS), answers), torch.stack(plain), rtol=1e-4, atol=1e-4)


# -- metrics -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" The Cat. And more", "the cat"),
        ("one\ntwo", "one"),
        ("well-known!", "well known"),
        ("cats and dogs", "cats dogs"),
        ("Sentence 1: it rains", "it rains"),
        ("} ] )", "} ] )"),  # nothing but punctuation stays as it is
        (" \n", ""),
    ],
)
def test_normalise_is_that_of_the_benchmark(text: str, expected: str) -> None:
    assert normalise(text) == expected


@pytest.mark.parametrize(
    ("metric", "prediction", "answer", "expected"),
    [
        (exact_match, "Cups.", "cups", 1.0),
        (exact_match, "the cups", "cups", 0.0),
        (exact_match, "} ]", "} )", 0.0),
        (exact_string, " 180.000  Leute", "180.000 Leute", 1.0),
        (exact_string, "Leute", "leute", 0.0),
        (exact_set, "dog, cat, dog", "cat dog", 1.0),
        (exact_set, "dog", "cat dog", 0.0),
        (contains, "a big dog", "dog", 1.0),
        (contains, "a hotdog", "dog", 0.0),
        (contains, "c++", "c++", 1.0),
        # shared words 1 of 3 said and 1 of 2 wanted: precision 1/3, recall 1/2, 2 * 1/6 / (5/6) = 2/5
        (f1, "the red cup", "cup here", 0.4),
        (f1, "cup cup", "cup", 2 / 3),  # a word counts as often as it is wanted
        (f1, "", "cup", 0.0),
        (f1, "", "", 1.0),
    ],
)
def test_metrics_of_text(metric, prediction: str, answer: str, expected: float) -> None:
    assert metric(prediction, answer) == pytest.approx(expected, abs=1e-12)


def test_the_best_accepted_answer_counts() -> None:
    assert best(exact_match, "dogs", ("cat", "Dogs.")) == 1.0


@given(st.sampled_from(sorted(TEXT_METRICS)), st.text(max_size=30), st.text(max_size=30))
def test_metrics_stay_between_0_and_1_and_an_answer_is_right_itself(name: str, one: str, other: str) -> None:
    metric = TEXT_METRICS[name]
    assert 0 <= metric(one, other) <= 1
    assert metric(one, one) == 1


# -- rewards -----------------------------------------------------------------------------------------------------

TEXTS = [Example("cup", None, "a", answers=("x", "a")), Example("hat", None, "b", answers=("b",))]


def test_generation_reward_is_the_weighted_mean_metric(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    # The model says "a" always: right for the first example, wrong for the second.
    target = target_of(always(tiny_llama, tokenizer.convert_tokens_to_ids("a")), tokenizer, TEMPLATE, ())
    result = GenerationReward(target, "exact_match", metric_weight=4.0, answer_tokens=1)(["p", "q", "p"], TEXTS)
    assert result.metrics["exact_match"].tolist() == [0.5, 0.5, 0.5]
    assert result.scores.tolist() == [2.0, 2.0, 2.0]


def test_likelihood_is_added_on_every_example(tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    # q = 1 / (e + V - 1) is the probability of every token but "a", which has e q. " a" is two tokens, with the mean
    # log-probability log sqrt(q * e q); " b" is two tokens of q each.
    vocabulary = len(tokenizer)
    target = target_of(always(tiny_llama, tokenizer.convert_tokens_to_ids("a")), tokenizer, TEMPLATE, ())
    reward = GenerationReward(target, "exact_match", likelihood_weight=0.1, answer_tokens=1)
    q = 1 / (torch.e + vocabulary - 1)
    assert reward(["p"], TEXTS).scores.item() == pytest.approx(0.5 + 0.1 * (torch.e**0.5 * q + q) / 2, rel=1e-5)


def table_target(table: list[list[float]]) -> Target:
    """A stub of a target, with only what the reward calls: the given class logits, the same for every prompt."""

    def class_logits(asked: Sequence[Asked]) -> torch.Tensor:
        return torch.tensor(table * len(asked)).log()

    return cast(Target, SimpleNamespace(class_logits=class_logits))


def test_classes_that_an_example_does_not_offer_do_not_count() -> None:
    # Class 2 is the likeliest, but the example has two choices: 0 is right, margin (.3 - .2) / (.3 + .2) = .2.
    result = ClassificationReward(table_target([[0.3, 0.2, 0.5]]))(["p"], [Example("x", 0, "A", choices=2)])
    assert result.metrics["accuracy"].item() == 1
    assert result.metrics["margin"].item() == pytest.approx(0.2, abs=1e-6)


def test_of_several_right_classes_the_one_the_target_prefers_counts() -> None:
    # 0 and 2 are right. The target prefers 2 to all: right; 0 no longer competes: (.5 - .2) / (.5 + .2) = 3/7.
    result = ClassificationReward(table_target([[0.3, 0.2, 0.5]]))(["p"], [Example("x", 0, "A", also=(2,))])
    assert result.metrics["accuracy"].item() == 1
    assert result.metrics["margin"].item() == pytest.approx(3 / 7, abs=1e-6)


def test_a_wrong_class_before_all_right_ones_is_wrong() -> None:
    result = ClassificationReward(table_target([[0.3, 0.5, 0.2]]))(["p"], [Example("x", 0, "A", also=(2,))])
    assert result.metrics["accuracy"].item() == 0


def test_out_of_memory_halves_the_batches(
    tiny_lm: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = target_of(sharpen(tiny_lm), tokenizer, TEMPLATE, (), max_batch_tokens=10_000)
    prompts, inputs = ["Go on."] * 6, ["a", "bc", "def", "g", "hi", "jkl"]
    expected = target.generate(pairs(prompts, inputs), 5, ())
    forward, sizes = type(target.lm.model).forward, []

    def starving(self: PreTrainedModel, input_ids: torch.Tensor, **rest: object) -> object:
        if len(input_ids) > 3:
            raise torch.OutOfMemoryError("no memory")
        sizes.append(len(input_ids))
        return forward(self, input_ids=input_ids, **rest)

    monkeypatch.setattr(type(target.lm.model), "forward", starving)
    assert target.generate(pairs(prompts, inputs), 5, ()) == expected
    assert max(sizes) == 3 and target.max_batch_tokens < 10_000
