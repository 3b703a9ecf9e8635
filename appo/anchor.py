"""The anchor: the one idea that APPO adds to PPO.

PPO for language models keeps the policy near a reference. A fixed reference (RLHF) holds it back from moving
far; a reference that follows every step (plain PPO) does not hold it at all. APPO's reference is an *anchor*, a
snapshot of the agent. When the agent is clearly better, it becomes the new anchor (promotion); when it is clearly
worse, it returns to the anchor (rollback) (StablePrompt, section 3.2, Eqs. 10-12).

There is one live model. The anchor is a second set of tensors for it, never an alias of the live ones.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from enum import StrEnum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from appo.config import ReferenceName
from appo.policy import Policy
from appo.rollout import Rollout

PATTERNS = 4000  # random signs for a set of leads


class AnchorDecision(StrEnum):
    """The outcome of a review; metrics.jsonl records its value."""

    PROMOTE = "promote"
    ROLLBACK = "rollback"
    KEEP = "keep"


def decide(
    policy_score: float, anchor_score: float, promote_threshold: float, rollback_threshold: float
) -> AnchorDecision:
    """The anchor rule of the paper; a lead or deficit at a threshold (up to 1e-9, for rounding) changes nothing.

    Args:
        policy_score, anchor_score: mean validation accuracy of prompts sampled from each, in [0, 1].
        promote_threshold, rollback_threshold: in the same unit, at least 0.
    """
    if policy_score - anchor_score > promote_threshold + 1e-9:
        return AnchorDecision.PROMOTE
    if anchor_score - policy_score > rollback_threshold + 1e-9:
        return AnchorDecision.ROLLBACK
    return AnchorDecision.KEEP


def luck(leads: Sequence[float]) -> float:
    """One-sided p of a sign-flip test: how likely a lead (or deficit) this large in total is if both sides are equal.

    Both sides answer the same queries on the same rows; if equal, each lead is as likely with its sign flipped.
    """
    found = torch.tensor(leads, dtype=torch.float64, device="cpu")
    random_bits = torch.rand(PATTERNS, len(found), generator=torch.Generator().manual_seed(0), device="cpu") < 0.5
    flipped = (1 - 2 * random_bits.double()) @ found
    return (1 + (flipped >= found.sum().abs() - 1e-9).sum().item()) / (1 + PATTERNS)


class Health(NamedTuple):
    """Statistics of some prompts that do not depend on their scores."""

    length: float  # mean, in tokens
    empty_rate: float  # share of prompts without a word
    distinct: float  # expected share of different prompts among eight of them
    variety: float  # mean share of distinct word pairs within a prompt; near 0 for "no no no no"
    entropy: float  # nats per token: minus the mean log-probability of the sampled tokens


def collapse(policy: Health, anchor: Health) -> str | None:
    """The sign, in words, that the policy has collapsed and the anchor has not; None if there is none.

    The paper has no such rule. Short prompts that score higher are not a collapse: see `APPOTrainer.review_anchor`.
    """
    if policy.empty_rate > 0.5 >= anchor.empty_rate:
        return f"{policy.empty_rate:.0%} of its prompts are empty (the anchor's: {anchor.empty_rate:.0%})"
    if policy.length < anchor.length / 3:
        return f"its prompts are {policy.length:.1f} tokens long (the anchor's: {anchor.length:.1f})"
    if policy.distinct < 1 / 3 <= anchor.distinct:  # a third of the anchor's would let it shrink with each promotion
        return f"only {policy.distinct:.0%} of its prompts are distinct (the anchor's: {anchor.distinct:.0%})"
    if policy.variety < anchor.variety / 3:
        return f"its prompts repeat word pairs: {policy.variety:.0%} are distinct (the anchor's: {anchor.variety:.0%})"
    return None


class Anchor:
    """A snapshot of the trained parameters (value head included) and of the optimizer's state.

    Args:
        policy: the live agent; its parameters with requires_grad are copied.
        optimizer: the live optimizer over them.
    """

    def __init__(self, policy: Policy, optimizer: torch.optim.Optimizer) -> None:
        self._policy, self._optimizer = policy, optimizer
        self._parameters = {name: p.detach().clone() for name, p in policy.trained().items()}
        self._optimizer_state = copy.deepcopy(optimizer.state_dict())

    @torch.no_grad()
    def promote(self) -> None:
        """anchor := copy of the policy, optimizer state included."""
        for name, parameter in self._policy.trained().items():
            self._parameters[name].copy_(parameter)
        self._optimizer_state = copy.deepcopy(self._optimizer.state_dict())

    @torch.no_grad()
    def rollback(self) -> None:
        """policy := copy of the anchor, in place, so that the optimizer stays attached to the live parameters.

        The optimizer's state is restored too: moments from the way down would push the weights down again.
        """
        for name, parameter in self._policy.trained().items():
            parameter.copy_(self._parameters[name])
        self._optimizer.load_state_dict(copy.deepcopy(self._optimizer_state))

    def is_policy(self) -> bool:
        """Whether the policy's weights are the anchor's: at first, and right after a promotion or a rollback."""
        return self._policy.ranks.equal([(p, self._parameters[name]) for name, p in self._policy.trained().items()])

    def state_dict(self) -> dict[str, Any]:
        """The snapshot, to be saved."""
        return {"parameters": self._parameters, "optimizer": self._optimizer_state}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies the values of a saved snapshot."""
        for name, parameter in self._parameters.items():
            parameter.copy_(state["parameters"][name])
        self._optimizer_state = copy.deepcopy(state["optimizer"])

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the policy *is* the anchor; their tensors are swapped, not copied.

        Do not enter it between a forward pass and its backward pass.
        """
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def logprobs(self, rollout: Rollout) -> Tensor:
        """log p_anchor of the rollout's tokens, [B, T], 0 on padding."""
        with self.in_place():
            return self._policy.measure(rollout).logprobs

    def _exchange(self) -> None:
        for name, parameter in self._policy.trained().items():
            self._parameters[name] = self._policy.ranks.swap(parameter, self._parameters[name])


class Reference(NamedTuple):
    """The reference of the KL penalty, and where the penalty enters: see `APPOConfig.reference` and `kl_in_loss`."""

    fixed: bool  # KL to the anchor's weights; else to the sampling policy, where it is 0 at sampling time
    moves: bool  # the anchor may be promoted
    in_loss: bool  # the KL is k3 in the loss; else k1 in each token's reward

    @property
    def reviewed(self) -> bool:
        """Whether reviews are due: only for an anchor that is in use and may move."""
        return self.fixed and self.moves

    @classmethod
    def of(cls, name: ReferenceName, kl_in_loss: bool) -> Reference:
        """anchor: APPO. initial: RLHF-style PPO. previous: plain PPO. none: no penalty."""
        fixed = name in ("anchor", "initial")
        return cls(fixed, name != "initial", name == "previous" or (fixed and kl_in_loss))


class KLController:
    """The coefficient of the KL penalty: constant, or adapted towards a target.

    Adaptive as in Ziegler et al. 2019, section 2.2: coef *= 1 + clip(kl / target - 1, -0.2, 0.2) * min(n / horizon, 1).

    Args:
        coef: the (initial) coefficient.
        target: nats of KL per response to aim at; None keeps the coefficient constant.
        horizon: number of responses over which the largest (clipped) error changes the coefficient by 20 %.
    """

    def __init__(self, coef: float, target: float | None = None, horizon: int | None = None) -> None:
        if target is not None and not (target > 0 and horizon is not None and horizon > 0):
            raise ValueError(f"an adaptive KL coefficient needs target and horizon above 0, not {target} and {horizon}")
        self.coef, self.target, self.horizon = coef, target, horizon

    def update(self, kl: float, n: int) -> None:
        """Adapts the coefficient to `kl`, the mean KL of `n` responses in nats; NaN changes nothing."""
        if self.target is None or self.horizon is None or math.isnan(kl):
            return
        error = min(max(kl / self.target - 1.0, -0.2), 0.2)
        self.coef *= 1.0 + error * min(n / self.horizon, 1.0)
