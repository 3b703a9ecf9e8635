"""Both losses of PPO: six-case table, clipped value table, slow twins, gradients, masks."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from appo.functional import policy_loss, value_loss

F64 = torch.float64
# ratio r, advantage A, max(-A r, -A clip(r, .8, 1.2)), and its derivative by the log-probability: -A r where the
# unclipped term is larger or r is inside the range, 0 where the clipped term, a constant, is larger.
SIX_CASES = [
    (0.5, 1.0, -0.5, -0.5),  # max(-.5, -.8): unclipped
    (1.0, 1.0, -1.0, -1.0),
    (1.5, 1.0, -1.2, 0.0),  # max(-1.5, -1.2): clipped
    (0.5, -1.0, 0.8, 0.0),  # max(.5, .8): clipped
    (1.0, -1.0, 1.0, 1.0),
    (1.5, -1.0, 1.5, 1.5),  # max(1.5, 1.2): unclipped
]


def tokens(*values: float) -> Tensor:
    return torch.tensor([values], dtype=F64)


@pytest.mark.parametrize(("ratio", "advantage", "loss", "slope"), SIX_CASES)
def test_policy_loss_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    logprobs = tokens(math.log(ratio)).requires_grad_()
    result = policy_loss(logprobs, tokens(0.0), tokens(advantage), torch.ones(1, 1), clip_range=0.2)
    result.loss.backward()
    assert_close(result.loss, torch.tensor(loss, dtype=F64), rtol=1e-6, atol=0)
    # At ratio 1 both terms are equal and lie inside the range, so both have the slope -A r.
    assert_close(logprobs.grad, tokens(slope), rtol=1e-6, atol=1e-12)


def test_policy_loss_counts_the_tokens_whose_clipped_term_is_used() -> None:
    ratios, advantages = tokens(0.5, 1.0, 1.5, 0.5, 1.0, 1.5), tokens(1, 1, 1, -1, -1, -1)
    result = policy_loss(ratios.log(), torch.zeros_like(ratios), advantages, torch.ones(1, 6))
    assert_close(result.clip_fraction, torch.tensor(2 / 6, dtype=F64))


def test_policy_loss_reports_the_k3_estimate_of_the_step() -> None:
    # KL(old || new) by k3 is r - 1 - ln r: for r = 2 that is 1 - ln 2
    result = policy_loss(tokens(math.log(2)), tokens(0.0), tokens(1.0), torch.ones(1, 1))
    assert_close(result.approx_kl, torch.tensor(1 - math.log(2), dtype=F64), rtol=1e-6, atol=0)


def test_policy_gradient_at_ratio_one_is_minus_advantage_over_n() -> None:
    logprobs = tokens(-1.0, -2.0, -3.0).requires_grad_()
    policy_loss(logprobs, logprobs, tokens(3.0, -6.0, 9.0), torch.ones(1, 3)).loss.backward()
    assert_close(logprobs.grad, tokens(-1.0, 2.0, -3.0))


def test_value_loss_by_hand() -> None:
    # V_old = 1, R = 2, eps = .2: V = 1.5 -> clip 1.2, (.5)^2 < (.8)^2 -> .32; V = .5 -> clip .8,
    # (1.5)^2 > (1.2)^2 -> 1.125; V = 1.05 inside -> .5 * .95^2 = .45125
    values, old, returns = tokens(1.5, 0.5, 1.05), tokens(1, 1, 1), tokens(2, 2, 2)
    each = [
        value_loss(values[:, i : i + 1], old[:, i : i + 1], returns[:, i : i + 1], torch.ones(1, 1)) for i in range(3)
    ]
    assert_close([x.loss.item() for x in each], [0.32, 1.125, 0.45125], rtol=1e-6, atol=0)
    assert [x.clip_fraction.item() for x in each] == [1.0, 0.0, 0.0]
    whole = value_loss(values, old, returns, torch.ones(1, 3))
    assert_close(whole.loss, torch.tensor((0.32 + 1.125 + 0.45125) / 3, dtype=F64), rtol=1e-6, atol=0)


def test_value_loss_without_clipping_is_half_the_squared_error() -> None:
    result = value_loss(tokens(1.5, 0.5), tokens(1, 1), tokens(2, 2), torch.ones(1, 2), clip_range=None)
    assert_close(result.loss, torch.tensor(0.5 * (0.25 + 2.25) / 2, dtype=F64))
    assert result.clip_fraction == 0


def slow_policy_loss(rows: list[list[tuple[float, float, float]]], eps: float) -> float:
    """The definition, token by token, over responses of (logprob, old logprob, advantage)."""
    losses = []
    for row in rows:
        for new, old, advantage in row:
            ratio = math.exp(new - old)
            clipped = min(max(ratio, 1 - eps), 1 + eps)
            losses.append(-min(ratio * advantage, clipped * advantage))
    return sum(losses) / max(len(losses), 1)


def slow_value_loss(rows: list[list[tuple[float, float, float]]], eps: float) -> float:
    """The definition over responses of (value, old value, return)."""
    losses = [
        0.5 * max((v - r) ** 2, (min(max(v, old - eps), old + eps) - r) ** 2) for row in rows for v, old, r in row
    ]
    return sum(losses) / max(len(losses), 1)


ROWS = st.lists(st.lists(st.tuples(*[st.floats(-2, 2)] * 3), max_size=5), min_size=1, max_size=4)


def padded(rows: list[list[tuple[float, float, float]]], filler: float) -> tuple[list[Tensor], Tensor]:
    width = max(map(len, rows)) + 1
    full = torch.full((len(rows), width, 3), filler, dtype=F64)
    mask = torch.zeros(len(rows), width)
    for i, row in enumerate(rows):
        for j, triple in enumerate(row):
            full[i, j], mask[i, j] = torch.tensor(triple, dtype=F64), 1
    return list(full.unbind(-1)), mask


@pytest.mark.parametrize(("fast", "slow"), [(policy_loss, slow_policy_loss), (value_loss, slow_value_loss)])
@pytest.mark.parametrize("filler", [0.0, float("nan"), float("inf")])
@settings(deadline=None, max_examples=40)
@given(rows=ROWS, eps=st.floats(0.05, 0.5))
def test_losses_equal_their_slow_twins_whatever_is_under_the_mask(fast, slow, filler, rows, eps) -> None:
    columns, mask = padded(rows, filler)
    assert_close(fast(*columns, mask, eps).loss.item(), slow(rows, eps), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_gradients_agree_with_finite_differences(loss) -> None:
    generator = torch.Generator().manual_seed(3)  # its draws avoid the kinks
    old, other = (torch.randn(3, 4, generator=generator, dtype=F64) for _ in range(2))
    new = (old + 0.5 * torch.randn(3, 4, generator=generator, dtype=F64)).requires_grad_()
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 0, 0]])
    assert torch.autograd.gradcheck(lambda x: loss(x, old, other, mask).loss, (new,))


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_masked_tokens_get_no_gradient(loss) -> None:
    new = torch.tensor([[0.1, float("nan"), float("inf")]], dtype=F64, requires_grad=True)
    other = torch.tensor([[0.0, float("nan"), float("inf")]], dtype=F64)
    loss(new, other, other + 1, torch.tensor([[1, 0, 0]])).loss.backward()
    assert new.grad is not None
    assert new.grad[0, 0] != 0
    assert new.grad[0, 1:].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_only_the_new_numbers_are_differentiated(loss) -> None:
    new, old, other = (torch.full((1, 2), x, dtype=F64, requires_grad=True) for x in (0.1, 0.0, 1.0))
    loss(new, old, other, torch.ones(1, 2)).loss.backward()
    assert (old.grad, other.grad) == (None, None)


@pytest.mark.parametrize("loss", [policy_loss, value_loss])
def test_the_loss_of_no_tokens_is_zero(loss) -> None:
    empty = torch.zeros(2, 3, dtype=F64)
    assert loss(empty, empty, empty, empty).loss == 0
