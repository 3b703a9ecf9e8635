"""KL estimates, token rewards with them, log-probabilities and entropies, plain and in blocks of rows."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.testing import assert_close

from appo.functional import (
    entropy_from_logits,
    kl_estimate,
    leave_one_out,
    logprobs_from_logits,
    token_rewards,
)
from appo.lm.logits import logprobs_and_entropy

F64 = torch.float64


@pytest.mark.parametrize(
    ("kind", "expected"),
    # d = ln 2: k1 = ln 2; k2 = (ln 2)^2 / 2; k3 = 1/2 - 1 + ln 2
    [("k1", math.log(2)), ("k2", math.log(2) ** 2 / 2), ("k3", math.log(2) - 0.5)],
)
def test_kl_estimates_by_hand(kind: str, expected: float) -> None:
    found = kl_estimate(torch.tensor(math.log(0.5), dtype=F64), torch.tensor(math.log(0.25), dtype=F64), kind)
    assert_close(found.item(), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_kl_estimate_is_unbiased_on_an_enumerated_categorical(kind: str) -> None:
    p, q = torch.tensor([0.5, 0.3, 0.2], dtype=F64), torch.tensor([0.3, 0.3, 0.4], dtype=F64)
    exact = 0.5 * math.log(0.5 / 0.3) + 0.2 * math.log(0.2 / 0.4)
    assert_close((p * kl_estimate(p.log(), q.log(), kind)).sum().item(), exact, rtol=1e-9, atol=0)


def test_k3_is_never_negative() -> None:
    differences = torch.linspace(-5, 5, 101, dtype=F64)
    assert (kl_estimate(differences, torch.zeros(101, dtype=F64), "k3") >= 0).all()


def test_unknown_estimator_is_refused() -> None:
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), "k4")  # type: ignore[arg-type]


def test_score_lands_on_the_last_real_token_and_the_penalty_on_every_one() -> None:
    kl = torch.tensor([[1.0, 2.0, math.nan], [3.0, 4.0, 5.0]])
    mask = torch.tensor([[1, 1, 0], [1, 1, 1]])
    found = token_rewards(torch.tensor([10.0, 20.0]), kl, mask, kl_coef=0.5)
    assert found.tolist() == [[-0.5, 9.0, 0.0], [-1.5, -2.0, 17.5]]


def test_a_response_without_tokens_gets_no_reward() -> None:
    assert token_rewards(torch.tensor([7.0]), torch.ones(1, 3), torch.zeros(1, 3), 0.1).tolist() == [[0.0] * 3]


def test_leave_one_out_by_hand() -> None:
    found = leave_one_out(torch.tensor([1.0, 5.0, 2.0, 6.0, 7.0]), torch.tensor([0, 1, 0, 0, 2]))
    assert found.tolist() == [1.0 - 4.0, 5.0, 2.0 - 3.5, 6.0 - 1.5, 7.0]  # 5 and 7 are alone


def test_a_score_alone_in_its_group_is_measured_against_the_given_baseline() -> None:
    assert leave_one_out(torch.tensor([5.0, 1.0, 3.0]), torch.tensor([0, 1, 1]), 2.0).tolist() == [3.0, -2.0, 2.0]


@given(st.floats(-1e6, 1e6, width=32), st.integers(2, 9))
def test_equal_scores_leave_exactly_nothing(score: float, count: int) -> None:
    assert leave_one_out(torch.full((count,), score), torch.zeros(count, dtype=torch.long)).tolist() == [0.0] * count


@given(st.lists(st.tuples(st.floats(-100, 100), st.integers(0, 3)), min_size=1, max_size=12))
def test_leave_one_out_takes_out_what_a_group_has_in_common(rows: list[tuple[float, int]]) -> None:
    scores, groups = torch.tensor([s for s, _ in rows], dtype=F64), torch.tensor([g for _, g in rows])
    found = leave_one_out(scores, groups)
    for group in groups.unique():
        members = groups == group
        if members.sum() > 1:
            assert_close(found[members].sum(), torch.zeros((), dtype=F64), rtol=0, atol=1e-9)
            assert_close(leave_one_out(scores + 50 * members, groups), found, rtol=0, atol=1e-9)


def test_logprobs_are_the_log_softmax_of_the_chosen_tokens() -> None:
    logits = torch.tensor([[[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]], dtype=F64).log()
    found = logprobs_from_logits(logits.nan_to_num(neginf=0.0), torch.tensor([[2, 1]]))
    # softmax of ln(1, 2, 3) is (1, 2, 3) / 6; of three equal logits 1 / 3
    assert_close(found, torch.tensor([[math.log(3 / 6), math.log(1 / 3)]], dtype=F64), rtol=1e-6, atol=0)


def test_logprobs_of_half_precision_logits_are_float32() -> None:
    logits = torch.randn(1, 2, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    found = logprobs_from_logits(logits, torch.tensor([[0, 4]]))
    assert found.dtype == torch.float32
    assert_close(found, logits.float().log_softmax(-1)[0, [0, 1], [0, 4]].unsqueeze(0))


def test_entropy_of_many_rows_is_that_of_each() -> None:
    logits = torch.randn(2, 4, 5, dtype=F64, generator=torch.Generator().manual_seed(0))
    assert_close(entropy_from_logits(logits), torch.distributions.Categorical(logits=logits).entropy())


def test_entropy_of_the_uniform_and_of_the_certain() -> None:
    logits = torch.tensor([[[0.0] * 4, [0.0, -math.inf, -math.inf, -math.inf]]], dtype=F64)
    assert_close(entropy_from_logits(logits), torch.tensor([[math.log(4), 0.0]], dtype=F64))


def test_the_entropy_has_a_gradient_if_it_is_part_of_the_loss() -> None:
    logits = torch.randn(3, 5, dtype=F64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(entropy_from_logits, logits)


# -- some rows at a time -----------------------------------------------------------------------------------------

TOKENS = torch.tensor([0, 4, 2, 2, 1, 1, 3, 0])


@pytest.fixture(params=[1, 3, 10**6])
def rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("appo.lm.logits.AT_ONCE", 5 * request.param)  # each row has five logits
    return int(request.param)


def random_logits() -> torch.Tensor:
    return torch.randn(8, 5, dtype=F64, generator=torch.Generator().manual_seed(0))


def test_gradient_of_logprobs_is_that_of_log_softmax(rows_at_once: int) -> None:
    logits = random_logits()
    logits[1, 3] = -math.inf  # a token that is ruled out
    weight = torch.linspace(-1, 2, 8, dtype=F64)
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    found, _ = logprobs_and_entropy(ours, TOKENS)
    expected = plain.log_softmax(-1).gather(-1, TOKENS.unsqueeze(-1)).squeeze(-1)
    assert_close(found, expected)
    (found * weight).sum().backward()
    (expected * weight).sum().backward()
    assert_close(ours.grad, plain.grad)


def test_logprobs_and_entropy_are_those_of_the_functions_for_each(rows_at_once: int) -> None:
    logits = random_logits()
    logits[1, 3] = -math.inf
    weight = torch.linspace(-1, 2, 8, dtype=F64)
    ours, plain = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    logprobs, entropy = logprobs_and_entropy(ours, TOKENS)
    assert_close(logprobs, logprobs_from_logits(plain, TOKENS))
    assert_close(entropy, entropy_from_logits(logits))
    (logprobs.sum() + (weight * entropy).sum()).backward()
    (logprobs_from_logits(plain, TOKENS).sum() + (weight * entropy_from_logits(plain)).sum()).backward()
    assert ours.grad is not None and ours.grad.isfinite().all()
    assert_close(ours.grad, plain.grad)


def test_entropies_that_are_only_looked_at_have_no_part_in_the_gradient(rows_at_once: int) -> None:
    one, other = (random_logits().requires_grad_() for _ in range(2))
    logprobs_and_entropy(one, TOKENS)[0].sum().backward()
    logprobs, entropy = logprobs_and_entropy(other, TOKENS)
    (logprobs.sum() + 0.0 * entropy.sum()).backward()
    assert_close(one.grad, other.grad)


def test_a_gradient_that_takes_the_place_of_the_logits_is_the_same(rows_at_once: int) -> None:
    one, other = (random_logits().requires_grad_() for _ in range(2))
    logits = other * 1  # not a leaf, which its owner may still want to read
    for found in (logprobs_and_entropy(one, TOKENS), logprobs_and_entropy(logits, TOKENS, used_up=True)):
        loss = (found[0] * torch.linspace(-1, 2, 8, dtype=F64)).sum() + found[1].square().sum()
        loss.backward(retain_graph=True)
    assert_close(other.grad, one.grad, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_entropy_of_a_certain_row_is_finite(rows_at_once: int) -> None:
    logits = torch.full((8, 5), -math.inf, dtype=F64).scatter(1, TOKENS.unsqueeze(1), 0.0)
    logprobs, entropy = logprobs_and_entropy(logits, TOKENS)
    assert (logprobs.tolist(), entropy.tolist()) == ([0.0] * 8, [0.0] * 8)


def test_gradient_of_logprobs_keeps_the_precision_of_the_logits() -> None:
    logits = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens = torch.tensor([0, 7, 49])
    ours, plain = logits.clone().requires_grad_(), logits.float().requires_grad_()
    logprobs, entropy = logprobs_and_entropy(ours, tokens)
    assert (logprobs.dtype, entropy.dtype) == (torch.float32, torch.float32)
    logprobs.sum().backward()
    plain.log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).sum().backward()
    assert ours.grad is not None and ours.grad.dtype == torch.bfloat16
    assert_close(ours.grad.float(), plain.grad, rtol=1e-2, atol=1e-4)
