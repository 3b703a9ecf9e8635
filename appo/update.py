"""PPO's update: from a scored rollout to advantages, then some epochs of clipped steps."""

from __future__ import annotations

import math
from collections.abc import Mapping
from statistics import fmean

import torch
from torch import Tensor

from appo.anchor import Reference
from appo.config import APPOConfig
from appo.functional import (
    gae,
    group_scaled,
    kl_estimate,
    leave_one_out,
    masked_mean,
    masked_whiten,
    policy_loss,
    token_rewards,
    value_loss,
)
from appo.policy import Policy
from appo.rollout import Batch, Scored, minibatches

MEAN_RATE = 0.1  # of the running mean of scores, per iteration
MIN_ENTROPY = 1.0  # nats per token; below it the weight of the entropy bonus stops growing
STATS = ("policy_loss", "value_loss", "entropy", "ratio", "clip_fraction", "approx_kl")  # of the losses
ROUNDING = 1e-4  # nats per token: differences up to this between two passes of the same weights count as rounding
FAULTS = ("nonfinite_reward", "nonfinite_loss", "nonfinite_gradient", "exploded_ratio")  # counted in the statistics


def advantages(scored: Scored, config: APPOConfig, kl_coef: float, mean_score: float = 0.0) -> tuple[Tensor, Tensor]:
    """From scores to advantages and returns, each [B, T], 0 on padding: baseline, token rewards, GAE, whitening.

    A score that is the same for all responses must not move the policy. Without centring it would: while the value
    head is still 0, GAE with lam < 1 gives token t of T the advantage lam^(T - 1 - t) * score, and whitening turns that
    into a push on every end-of-sequence token. On real language models this shrinks all prompts to nothing in ten
    iterations. So scores are centred first (`config.leave_one_out`). The paper is silent; its code does not centre.
    Equal scores, centred, are not whitened: that would blow up the critic's small errors to full steps.

    Args:
        scored: a scored rollout.
        config: leave_one_out, scale_scores, gamma, lam, whiten_advantages.
        kl_coef: weight of the k1 penalty on each token's reward; 0 for none.
        mean_score: the mean of earlier scores: the baseline if a query has a single response.
    """
    scores = scored.scores
    if config.leave_one_out:
        scores = leave_one_out(scores, scored.owner, otherwise=mean_score)
    if config.scale_scores:
        scores = group_scaled(scores, scored.owner)
    kl = kl_estimate(scored.logprobs, scored.ref_logprobs)
    kl = kl.masked_fill(kl.abs() < ROUNDING, 0.0)  # if scores are equal, whitening would turn rounding into full steps
    rewards = token_rewards(scores, kl, scored.mask, kl_coef)
    estimated, returns = gae(rewards, scored.values, scored.mask, config.gamma, config.lam)
    alike = len(scored) == 1 or (config.leave_one_out and not scores.any())  # a lone one would lose its score
    if config.whiten_advantages and not alike:
        estimated = masked_whiten(estimated, scored.mask)
    return estimated, returns


class Updater:
    """Trains a policy by PPO, one scored rollout after another.

    Args:
        policy: its parameters with requires_grad are trained.
        config: the settings of PPO.
        generator: for the minibatch order, on the CPU.

    Raises:
        ValueError: the policy has nothing to train.
    """

    def __init__(self, policy: Policy, config: APPOConfig, generator: torch.Generator | None = None) -> None:
        self.policy, self.config, self.generator = policy, config, generator
        self.reference = Reference.of(config.reference, config.kl_in_loss)
        rate = config.learning_rate or policy.lm.default_learning_rate
        policy.ranks.begin(policy.model, policy.value_head)
        weights, head = [p for p in policy.model.parameters() if p.requires_grad], list(policy.value_head.parameters())
        if not weights:
            raise ValueError("the agent has no parameter to train; is its model object that of the frozen target?")
        self.trained = [*weights, *head]
        self.optimizer = torch.optim.AdamW(weights, lr=rate, weight_decay=0.0, fused=True)
        self.optimizer.add_param_group({"params": head, "lr": config.value_learning_rate or rate})
        self.mean_score: float | None = None  # running, over updates

    def update(self, scored: Scored, kl_coef: float) -> dict[str, float]:
        """PPO epochs on a scored rollout. Returns means over the optimizer steps, and counts of FAULTS.

        With a `target_kl`, training on this rollout stops after the epoch whose mean approx_kl exceeds it.
        """
        config = self.config
        penalty = 0.0 if self.reference.in_loss else kl_coef
        estimated, returns = advantages(scored, config, penalty, self._follow(scored.scores))
        batch = Batch(**vars(scored), advantages=estimated, returns=returns)
        entropy_coef = config.entropy_coef / max(-masked_mean(scored.logprobs, scored.mask).item(), MIN_ENTROPY)
        steps: list[dict[str, float]] = []
        for _ in range(config.ppo_epochs):
            parts = minibatches(batch, config.minibatch_size, self.generator)
            epoch = [self.optimizer_step(part, kl_coef, entropy_coef) for part in parts]
            steps += epoch
            moved = [step["approx_kl"] for step in epoch if "approx_kl" in step]  # of the sound steps
            if config.target_kl is not None and moved and fmean(moved) > config.target_kl:
                break
        names = dict.fromkeys(name for step in steps for name in step if name not in FAULTS)
        faults = {name: sum(step.get(name, 0.0) for step in steps) for name in FAULTS}
        return {name: fmean([step[name] for step in steps if name in step]) for name in names} | faults

    def _follow(self, scores: Tensor) -> float:
        """Updates the running mean of scores with these; returns its earlier value (on the first call, their mean)."""
        now = (scores[0] + (scores - scores[0]).mean()).item()  # exact where all scores are equal
        before = now if self.mean_score is None else self.mean_score
        self.mean_score = before + MEAN_RATE * (now - before)
        return before

    def optimizer_step(self, minibatch: Batch, kl_coef: float = 0.0, entropy_coef: float = 0.0) -> dict[str, float]:
        """One gradient step; micro-batches, of all ranks, add up to exactly the gradient of the whole minibatch.

        A loss or gradient that is not finite, or a mean probability ratio above `max_ratio`, ends the step before it
        changes the weights. The statistics count the step as skipped and name the fault.
        """
        self.optimizer.zero_grad()
        tokens = minibatch.mask.sum()
        totals = dict.fromkeys(STATS, 0.0)
        for rows, weight in self.policy.ranks.parts(len(minibatch), self.config.micro_batch_size):
            part = minibatch.select(rows)
            share = weight * part.mask.sum() / tokens  # losses are means over tokens, so parts are weighted by tokens
            loss, stats = self.loss(part, kl_coef, entropy_coef)
            (share * loss).backward()
            for name, value in stats.items():
                totals[name] += (share * value).item()
        totals = self.policy.ranks.sum_gradients(self.trained, totals)
        norm = self.policy.ranks.clip_gradients(self.trained, self.config.max_grad_norm or math.inf)
        if fault := self._fault(totals, norm):
            self.optimizer.zero_grad()
            return {"skipped_steps": 1.0, fault: 1.0}
        if self.config.warm_up:  # else Adam's first moment, corrected for its bias, makes the first steps the largest
            done = int(self.optimizer.state.get(self.trained[-1], {}).get("step", 0))
            for group in self.optimizer.param_groups:
                group["lr"] = group.setdefault("initial_lr", group["lr"]) * (1 - group["betas"][0] ** (done + 1))
        self.optimizer.step()
        return {**totals, "grad_norm": norm, "skipped_steps": 0.0}

    def _fault(self, stats: Mapping[str, float], grad_norm: float) -> str | None:
        """The fault, one of FAULTS, that makes a step unsound; None if the step is sound."""
        if not all(math.isfinite(stats[name]) for name in ("policy_loss", "value_loss")):
            return "nonfinite_loss"
        if not math.isfinite(grad_norm):
            return "nonfinite_gradient"
        if self.config.max_ratio is not None and stats["ratio"] > self.config.max_ratio:
            return "exploded_ratio"
        return None

    def loss(self, batch: Batch, kl_coef: float = 0.0, entropy_coef: float = 0.0) -> tuple[Tensor, dict[str, Tensor]]:
        """L = policy loss + value_coef * value loss (StablePrompt, Eq. 12) on a batch, and its statistics.

        With the KL in the loss (`kl_in_loss`, and always for reference "previous"), kl_coef * k3 is added, a mean over
        tokens. As in GRPO, its gradient is that of KL(reference || policy); for "previous", up to second order.

        The entropy bonus is ours: once all prompts are the same, rewards no longer move the policy, but the bonus does.
        Its weight from `update` is a share of 1 / entropy: log entropy's gradient does not vanish where entropy does.
        """
        config = self.config
        now = self.policy.evaluate(batch)
        policy = policy_loss(now.logprobs, batch.logprobs, batch.advantages, batch.mask, config.clip_range)
        value = value_loss(now.values, batch.values, batch.returns, batch.mask, config.value_clip_range)
        loss = policy.loss + config.value_coef * value.loss
        entropy = masked_mean(now.entropy, batch.mask)
        if entropy_coef:
            loss = loss - entropy_coef * entropy
        if self.reference.in_loss:
            loss = loss + kl_coef * masked_mean(kl_estimate(now.logprobs, batch.ref_logprobs, "k3"), batch.mask)
        stats = {
            "policy_loss": policy.loss,
            "value_loss": value.loss,
            "entropy": entropy,
            "ratio": masked_mean((now.logprobs - batch.logprobs).exp(), batch.mask),
            "clip_fraction": policy.clip_fraction,
            "approx_kl": policy.approx_kl,
        }
        return loss, {name: value.detach() for name, value in stats.items()}
