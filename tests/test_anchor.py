"""The anchor. Guards against the published code's faults: its anchor aliases the policy, is never the KL reference and
never samples the "anchor" prompts, and its rollback cuts the optimizer off from the model.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch.testing import assert_close

from appo.anchor import Anchor, AnchorDecision, KLController, decide
from appo.policy import Policy
from appo.rollout import Rollout
from tests.conftest import plain_sampling, policy_of


@pytest.fixture
def policy(tiny_llama, tokenizer) -> Policy:
    return policy_of(tiny_llama, tokenizer, plain_sampling(6))


@pytest.fixture
def optimizer(policy: Policy) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.parameters(), lr=0.05)


def rollout_of(policy: Policy) -> Rollout:
    return policy.sample([policy.query("", "q")], torch.Generator().manual_seed(0), copies=4)


def weights(policy: Policy) -> list[torch.Tensor]:
    return [p.detach().clone() for p in policy.parameters()]


def train_a_little(policy: Policy, optimizer: torch.optim.Optimizer, steps: int = 2) -> None:
    for _ in range(steps):
        rollout = rollout_of(policy)
        optimizer.zero_grad()
        now = policy.evaluate(rollout)
        (now.logprobs.sum() + (now.values - 1).square().sum()).backward()
        optimizer.step()


def kl(policy: Policy, anchor: Anchor) -> torch.Tensor:
    rollout = rollout_of(policy)
    with torch.no_grad():
        return (policy.evaluate(rollout).logprobs - anchor.logprobs(rollout)).abs().max()


@pytest.mark.parametrize(
    ("policy_score", "anchor_score", "expected"),
    [  # thresholds 1/4 and 1/2, exact in binary; at a threshold nothing changes
        (0.5, 0.5, AnchorDecision.KEEP),
        (0.75, 0.5, AnchorDecision.KEEP),
        (0.7500001, 0.5, AnchorDecision.PROMOTE),
        (0.25, 0.75, AnchorDecision.KEEP),
        (0.2499999, 0.75, AnchorDecision.ROLLBACK),
        (0.375, 0.75, AnchorDecision.KEEP),
        (1.0, 0.0, AnchorDecision.PROMOTE),
        (0.0, 1.0, AnchorDecision.ROLLBACK),
    ],
)
def test_decide(policy_score: float, anchor_score: float, expected: AnchorDecision) -> None:
    assert decide(policy_score, anchor_score, 0.25, 0.5) is expected


def test_rounding_does_not_carry_a_lead_over_the_threshold() -> None:
    assert 0.55 - 0.5 > 0.05 and 0.4 - 0.3 > 0.1
    assert decide(0.55, 0.5, 0.05, 0.1) is decide(0.3, 0.4, 0.05, 0.1) is AnchorDecision.KEEP


def test_anchor_shares_no_storage_with_the_policy(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    anchor = Anchor(policy, optimizer)
    live = {p.data_ptr() for p in policy.parameters()}
    assert live.isdisjoint(p.data_ptr() for p in anchor._parameters.values())
    anchor.promote()
    assert live.isdisjoint(p.data_ptr() for p in anchor._parameters.values())
    anchor.rollback()
    assert {p.data_ptr() for p in policy.parameters()} == live


def test_anchor_logprobs_stay_when_the_policy_moves(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    anchor, rollout = Anchor(policy, optimizer), rollout_of(policy)
    before = anchor.logprobs(rollout)
    train_a_little(policy, optimizer)
    assert_close(anchor.logprobs(rollout), before, rtol=0, atol=0)
    assert kl(policy, anchor) > 1e-3


def test_kl_is_against_the_promoted_anchor_not_the_initial_model(
    policy: Policy, optimizer: torch.optim.Optimizer
) -> None:
    anchor, initial = Anchor(policy, optimizer), Anchor(policy, optimizer)
    train_a_little(policy, optimizer)
    before = weights(policy)
    anchor.promote()
    assert all(torch.equal(a, b) for a, b in zip(weights(policy), before, strict=True))
    assert kl(policy, anchor) == 0
    assert kl(policy, initial) > 1e-3
    train_a_little(policy, optimizer)
    assert kl(policy, anchor) > 1e-3


def test_rollback_restores_weights_and_optimizer_exactly(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    train_a_little(policy, optimizer)
    anchor = Anchor(policy, optimizer)
    weights_then, state_then = weights(policy), copy.deepcopy(optimizer.state_dict())
    train_a_little(policy, optimizer, 3)
    anchor.rollback()
    assert all(torch.equal(a, b) for a, b in zip(weights(policy), weights_then, strict=True))
    state = optimizer.state_dict()["state"]
    assert state.keys() == state_then["state"].keys()
    for key, entries in state_then["state"].items():
        assert all(torch.equal(state[key][name], entries[name]) for name in entries)


def test_training_after_a_rollback_repeats_training_before_it(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    """This needs live parameters, restored moments, and an anchor that is unchanged after a rollback to it."""
    train_a_little(policy, optimizer)
    anchor = Anchor(policy, optimizer)
    train_a_little(policy, optimizer)
    once = weights(policy)
    for _ in range(2):
        anchor.rollback()
        train_a_little(policy, optimizer)
        assert all(torch.equal(a, b) for a, b in zip(weights(policy), once, strict=True))


def test_rollback_before_any_promotion_does_not_end_learning(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    anchor, initial = Anchor(policy, optimizer), weights(policy)
    train_a_little(policy, optimizer)
    anchor.rollback()
    assert all(torch.equal(a, b) for a, b in zip(weights(policy), initial, strict=True))
    train_a_little(policy, optimizer)
    assert all(not torch.equal(a, b) for a, b in zip(weights(policy), initial, strict=True))


def test_promoted_optimizer_state_is_a_copy(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    anchor = Anchor(policy, optimizer)
    train_a_little(policy, optimizer)
    anchor.promote()
    then = copy.deepcopy(optimizer.state_dict()["state"])
    train_a_little(policy, optimizer)
    anchor.rollback()
    now = optimizer.state_dict()["state"]
    assert all(torch.equal(now[k]["exp_avg"], then[k]["exp_avg"]) for k in then)


def test_anchor_prompts_come_from_the_anchor(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    anchor, before = Anchor(policy, optimizer), rollout_of(policy)
    train_a_little(policy, optimizer, 4)
    with anchor.in_place():
        sampled = rollout_of(policy)
    assert torch.equal(sampled.tokens, before.tokens)
    assert not torch.equal(rollout_of(policy).logprobs, before.logprobs)


def test_policy_is_back_even_after_an_exception(policy: Policy, optimizer: torch.optim.Optimizer) -> None:
    anchor = Anchor(policy, optimizer)
    train_a_little(policy, optimizer)
    before = weights(policy)
    with pytest.raises(KeyError), anchor.in_place():
        raise KeyError
    assert all(torch.equal(a, b) for a, b in zip(weights(policy), before, strict=True))
    assert kl(policy, anchor) > 1e-3


def test_only_what_is_trained_is_copied(policy: Policy) -> None:
    policy.model.requires_grad_(False)
    anchor = Anchor(policy, torch.optim.AdamW(policy.value_head.parameters()))
    assert set(anchor._parameters) == {"value_head.weight", "value_head.bias"}


def test_kl_coefficient_is_constant_without_a_target() -> None:
    controller = KLController(0.2)
    controller.update(1e9, 1000)
    assert controller.coef == 0.2


@pytest.mark.parametrize(
    ("kl_seen", "expected"),
    # target 6, horizon 10,000, n = 100: error clipped to +-.2, or 6.6 / 6 - 1 = .1; coef *= 1 + error * .01
    [(60.0, 0.2 * 1.002), (0.0, 0.2 * 0.998), (6.6, 0.2 * 1.001), (6.0, 0.2), (math.nan, 0.2)],
)
def test_kl_coefficient_adapts(kl_seen: float, expected: float) -> None:
    controller = KLController(0.2, target=6.0, horizon=10_000)
    controller.update(kl_seen, 100)
    assert controller.coef == pytest.approx(expected, rel=1e-9)


def test_kl_coefficient_changes_by_a_fifth_at_most() -> None:
    controller = KLController(0.05, target=6.0, horizon=10)
    controller.update(0.0, 64)  # more responses than the horizon
    assert controller.coef == pytest.approx(0.04, rel=1e-9)


@pytest.mark.parametrize(("target", "horizon"), [(0.0, 100), (6.0, None), (6.0, 0)])
def test_adaptive_coefficient_needs_target_and_horizon(target: float, horizon: int | None) -> None:
    with pytest.raises(ValueError, match="target and horizon"):
        KLController(0.2, target, horizon)
