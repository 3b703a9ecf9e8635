"""APPO, the training loop's body; reads like the paper's algorithm box.

    for each iteration:
        step(queries, reward_fn)          collect: sample prompts, score them, reference log-probabilities
                                          update:  advantages, then PPO epochs on both losses
        every `period` epochs:
        review_anchor(queries, score_fn)  promote, roll back, or keep

Where queries and rewards come from, what is logged and when to stop is the caller's business.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from appo.anchor import Anchor, AnchorDecision, KLController, decide
from appo.config import AnchorConfig, APPOConfig
from appo.functional import kl_estimate, masked_mean, policy_loss, value_loss
from appo.policy import Policy
from appo.rollout import Batch, Query, Rollout, RolloutBuffer, minibatches


class Rewarded(Protocol):
    """What a reward function returns: scores [B], and metrics by name, each [B]."""

    @property
    def scores(self) -> Tensor: ...
    @property
    def metrics(self) -> Mapping[str, Tensor]: ...


RewardFn = Callable[[list[str]], Rewarded]


@dataclass(frozen=True)
class Collected:
    """One collect: the rollout, its prompts as text, and what the reward function said of them."""

    rollout: Rollout
    prompts: list[str]
    rewarded: Rewarded
    kl: float  # KL(policy || anchor), k1 summed over tokens, mean over responses, nats; whatever the reference is

    def stats(self) -> dict[str, float]:
        """Rewards and lengths as flat numbers."""
        scores = self.rewarded.scores
        return {
            "reward_mean": scores.mean().item(),
            "reward_max": scores.max().item(),
            **{f"{name}_mean": values.float().mean().item() for name, values in self.rewarded.metrics.items()},
            "kl": self.kl,
            "length_mean": self.rollout.mask.sum(1).float().mean().item(),
        }


@dataclass(frozen=True)
class AnchorReview:
    """The record of one review: the decision, and all that it was made from."""

    decision: AnchorDecision
    policy_scores: list[float]
    anchor_scores: list[float]
    promote_threshold: float
    rollback_threshold: float


class APPOTrainer:
    """Trains a policy by PPO against an anchor.

    Args:
        policy: the agent; its parameters with requires_grad are trained.
        config: PPO, the penalty and its reference.
        anchor: thresholds and number of prompts of the review.
        generator: source of all randomness (sampling and minibatch order), on the policy's device.

    Attributes:
        collected: what the last collect brought; for logging.
    """

    def __init__(
        self,
        policy: Policy,
        config: APPOConfig | None = None,
        anchor: AnchorConfig | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        self.policy = policy
        self.config = config or APPOConfig()
        self.anchor_config = anchor or AnchorConfig()
        self.generator = generator
        groups: list[dict[str, Any]] = [
            {"params": [p for p in policy.model.parameters() if p.requires_grad]},
            {"params": list(policy.value_head.parameters())},
        ]
        groups[1]["lr"] = self.config.value_learning_rate or self.config.learning_rate
        self.optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, weight_decay=0.0)
        self.anchor = Anchor(policy, self.optimizer)
        self.kl_controller = KLController(self.config.kl_coef, self.config.kl_target, self.config.kl_horizon)
        self.buffer = RolloutBuffer()
        self.collected: Collected | None = None

    def step(self, queries: Sequence[Query], reward_fn: RewardFn) -> dict[str, float]:
        """One iteration: collect on the queries, then update. Returns flat statistics of both."""
        collected = self.collect(queries, reward_fn)
        stats = self.update()
        self.kl_controller.update(collected.kl, len(queries))
        return {**collected.stats(), **stats}

    def collect(self, queries: Sequence[Query], reward_fn: RewardFn) -> Collected:
        """Samples a response to each query, scores them, and adds them to the buffer; may be called repeatedly.

        The KL penalty is measured against the anchor, which for reference "initial" is never promoted. For
        "previous" and "none" the reference is the policy that samples, so that no token is penalised here.
        """
        rollout = self.policy.sample(queries, self.generator)
        prompts = self.policy.decode(rollout)
        rewarded = reward_fn(prompts)
        anchor_logprobs = self.anchor.logprobs(self.policy, rollout)
        ref_logprobs = anchor_logprobs if self.config.reference in ("anchor", "initial") else rollout.logprobs
        self.buffer.add(rollout, rewarded.scores.to(self.policy.device), ref_logprobs)
        kl = kl_estimate(rollout.logprobs, anchor_logprobs).sum(1).mean().item()
        self.collected = Collected(rollout, prompts, rewarded, kl)
        return self.collected

    def update(self) -> dict[str, float]:
        """PPO epochs on everything collected; empties the buffer. Returns means over the optimizer steps."""
        config = self.config
        penalty = 0.0 if self.kl_in_loss else self.kl_controller.coef
        batch = self.buffer.finish(penalty, config.gamma, config.lam, config.whiten_advantages)
        self.buffer.clear()
        steps = [
            self.optimizer_step(minibatch)
            for _ in range(config.ppo_epochs)
            for minibatch in minibatches(batch, config.minibatch_size, self.generator)
        ]
        return {name: sum(step[name] for step in steps) / len(steps) for name in steps[0]}

    def optimizer_step(self, minibatch: Batch) -> dict[str, float]:
        """One gradient step; micro-batches add up to exactly the gradient of the whole minibatch."""
        self.optimizer.zero_grad()
        tokens = minibatch.mask.sum()
        totals: dict[str, float] = {}
        for part in minibatch.split(self.config.micro_batch_size):
            share = part.mask.sum() / tokens  # means over tokens, hence weighted by tokens
            loss, stats = self.loss(part)
            (share * loss).backward()
            for name, value in stats.items():
                totals[name] = totals.get(name, 0.0) + (share * value).item()
        limit = float("inf") if self.config.max_grad_norm is None else self.config.max_grad_norm
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), limit, error_if_nonfinite=True)
        self.optimizer.step()
        return {**totals, "grad_norm": norm.item()}

    def loss(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """L = policy loss + value_coef * value loss (StablePrompt, Eq. 12) on a batch, and its statistics.

        With the KL in the loss (`kl_in_loss`, and always for reference "previous"), kl_coef * k3 is added.
        """
        config = self.config
        now = self.policy.evaluate(batch)
        policy = policy_loss(now.logprobs, batch.logprobs, batch.advantages, batch.mask, config.clip_range)
        value = value_loss(now.values, batch.values, batch.returns, batch.mask, config.value_clip_range)
        loss = policy.loss + config.value_coef * value.loss
        if self.kl_in_loss:
            kl = masked_mean(kl_estimate(now.logprobs, batch.ref_logprobs, "k3"), batch.mask)
            loss = loss + self.kl_controller.coef * kl
        stats = {
            "policy_loss": policy.loss,
            "value_loss": value.loss,
            "entropy": masked_mean(now.entropy, batch.mask),
            "clip_fraction": policy.clip_fraction,
            "approx_kl": policy.approx_kl,
        }
        return loss, {name: value.detach() for name, value in stats.items()}

    @property
    def kl_in_loss(self) -> bool:
        """Whether the KL enters the loss. Against "previous" it must: at sampling time that KL is zero."""
        return self.config.reference == "previous" or (self.config.kl_in_loss and self.config.reference != "none")

    def review_anchor(self, queries: Sequence[Query], score_fn: Callable[[list[str]], Sequence[float]]) -> AnchorReview:
        """Lets agent and anchor answer the same queries, compares their mean scores, and acts on it.

        Args:
            queries: one per prompt to sample; built from training examples, like any query.
            score_fn: prompts to accuracies in [0, 1] on the *validation* split.
        """
        policy_scores = list(score_fn(self.policy.decode(self.policy.sample(queries, self.generator))))
        with self.anchor.in_place_of(self.policy):
            prompts = self.policy.decode(self.policy.sample(queries, self.generator))
        anchor_scores = list(score_fn(prompts))
        config = self.anchor_config
        thresholds = (config.promote_threshold, config.rollback_threshold)
        decision = decide(_mean(policy_scores), _mean(anchor_scores), *thresholds)
        if decision is AnchorDecision.PROMOTE and config.promote:
            self.anchor.promote(self.policy, self.optimizer)
        elif decision is AnchorDecision.ROLLBACK and config.rollback:
            self.anchor.rollback(self.policy, self.optimizer)
        else:
            decision = AnchorDecision.KEEP
        return AnchorReview(decision, policy_scores, anchor_scores, *thresholds)


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)
