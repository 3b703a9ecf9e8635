"""Generalised advantage estimation, against hand-worked rows, its O(T^2) definition and its special cases."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close

from appo.functional import gae

LENGTHS = st.lists(st.integers(0, 6), min_size=1, max_size=4)
UNIT = st.floats(0, 1)


def ragged(lengths: list[int], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Random float64 rewards and values, right-padded with garbage, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    width = max(*lengths, 1) + 1
    rewards, values = (torch.randn(len(lengths), width, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = torch.arange(width) < torch.tensor(lengths).unsqueeze(1)
    garbage = torch.tensor([torch.nan, torch.inf, 1e6], dtype=torch.float64)
    filler = garbage[torch.randint(3, mask.shape, generator=generator)]
    return torch.where(mask, rewards, filler), torch.where(mask, values, filler), mask


def slow_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum_l (gamma lam)^l delta_{t+l}, for one response without padding."""
    after = [*values, 0.0][1:]
    deltas = [r + gamma * n - v for r, n, v in zip(rewards, after, values, strict=True)]
    return [
        sum((gamma * lam) ** (s - t) * deltas[s] for s in range(t, len(deltas))) for t in range(len(deltas))
    ]  # fmt: skip


def test_gae_by_hand() -> None:
    # gamma .9, lam .8, V = .5: delta_2 = 1 - .5 = .5; delta_0 = delta_1 = .45 - .5 = -.05;
    # A_2 = .5; A_1 = -.05 + .72 * .5 = .31; A_0 = -.05 + .72 * .31 = .1732
    rewards = torch.tensor([[0.0, 0.0, 1.0]], dtype=torch.float64)
    values = torch.full((1, 3), 0.5, dtype=torch.float64)
    advantages, returns = gae(rewards, values, torch.ones(1, 3), gamma=0.9, lam=0.8)
    assert_close(advantages, torch.tensor([[0.1732, 0.31, 0.5]], dtype=torch.float64), rtol=1e-6, atol=0)
    assert_close(returns, torch.tensor([[0.6732, 0.81, 1.0]], dtype=torch.float64), rtol=1e-6, atol=0)


@settings(deadline=None, max_examples=60)
@given(LENGTHS, UNIT, UNIT, st.integers(0, 99))
def test_gae_equals_its_definition_on_ragged_rows(lengths: list[int], gamma: float, lam: float, seed: int) -> None:
    rewards, values, mask = ragged(lengths, seed)
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row, n in enumerate(lengths):
        expected = slow_gae(rewards[row, :n].tolist(), values[row, :n].tolist(), gamma, lam)
        assert_close(advantages[row, :n], torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-12)
        assert_close(returns[row, :n], advantages[row, :n] + values[row, :n])
    assert (advantages[~mask] == 0).all()
    assert (returns[~mask] == 0).all()


def test_gae_with_gamma_and_lam_one_is_reward_to_go_minus_value() -> None:
    rewards, values, mask = ragged([4, 4])
    advantages, _ = gae(rewards, values, mask, 1.0, 1.0)
    real = rewards[:, :4]
    assert_close(advantages[:, :4], real.flip(1).cumsum(1).flip(1) - values[:, :4], rtol=1e-9, atol=1e-12)


def test_gae_with_lam_zero_is_the_one_step_error() -> None:
    rewards, values, mask = ragged([3])
    advantages, _ = gae(rewards, values, mask, 0.9, 0.0)
    r, v = rewards[0], values[0]
    expected = torch.stack([r[0] + 0.9 * v[1] - v[0], r[1] + 0.9 * v[2] - v[1], r[2] - v[2]])
    assert_close(advantages[0, :3], expected, rtol=1e-9, atol=1e-12)


def test_gae_with_gamma_zero_looks_at_nothing_later() -> None:
    rewards, values, mask = ragged([3])
    advantages, _ = gae(rewards, values, mask, 0.0, 0.95)
    assert_close(advantages[0, :3], (rewards - values)[0, :3])


def test_gae_of_one_token_is_reward_minus_value() -> None:
    advantages, returns = gae(torch.tensor([[2.0]]), torch.tensor([[0.5]]), torch.ones(1, 1))
    assert (advantages.item(), returns.item()) == (1.5, 2.0)


@pytest.mark.parametrize("garbage", [1e6, float("nan"), float("inf")])
def test_gae_ignores_padding(garbage: float) -> None:
    rewards, values, mask = ragged([2, 5, 0])
    clean = [x.masked_fill(~mask, 0.0) for x in (rewards, values)]
    dirty = [x.masked_fill(~mask, garbage) for x in (rewards, values)]
    assert_close(gae(*dirty, mask), gae(*clean, mask), rtol=0, atol=0)


def test_gae_does_not_depend_on_how_far_rows_are_padded() -> None:
    rewards, values, mask = ragged([2, 5])
    wider = [torch.nn.functional.pad(x, (0, 3)) for x in (rewards, values, mask)]
    assert_close(gae(*wider)[0][:, : mask.shape[1]], gae(rewards, values, mask)[0], rtol=0, atol=0)


def test_gae_permutes_with_its_rows() -> None:
    rewards, values, mask = ragged([2, 5, 3])
    order = torch.tensor([2, 0, 1])
    assert_close(gae(rewards[order], values[order], mask[order])[0], gae(rewards, values, mask)[0][order])


def test_gae_leaves_its_arguments_alone() -> None:
    rewards, values, mask = torch.ones(1, 3), torch.ones(1, 3), torch.tensor([[1, 1, 0]])
    gae(rewards, values, mask)
    assert (rewards.tolist(), values.tolist(), mask.tolist()) == ([[1.0] * 3], [[1.0] * 3], [[1, 1, 0]])
