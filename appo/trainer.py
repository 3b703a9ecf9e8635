"""APPO, the training loop's body; reads like the paper's algorithm box.

    for each iteration:
        step(queries, reward_fn)          collect: sample prompts, score them, reference log-probabilities
                                          update:  advantages, then PPO epochs on both losses
        every `period` epochs:
        review_anchor(queries, score_fn)  promote, roll back, or keep

Where queries and rewards come from, what is logged and when to stop is the caller's business.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from appo.anchor import Anchor, AnchorDecision, Health, KLController, collapse, decide
from appo.config import AnchorConfig, APPOConfig
from appo.functional import (
    gae,
    kl_estimate,
    leave_one_out,
    masked_mean,
    masked_whiten,
    policy_loss,
    token_rewards,
    value_loss,
)
from appo.policy import Policy
from appo.rollout import Batch, Query, Rollout, RolloutBuffer, Scored, minibatches

MEAN_RATE = 0.1  # of the running mean of scores, per iteration
FAULTS = ("nonfinite_reward", "nonfinite_loss", "nonfinite_gradient", "exploded_ratio")  # counted in the statistics


class DivergedError(ArithmeticError):
    """Training has come to a state that it cannot leave; `stats` are those of the iteration that showed it."""

    def __init__(self, message: str, stats: Mapping[str, float]) -> None:
        super().__init__(message)
        self.stats = dict(stats)


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
    truncated_rate: float  # share of responses that were cut off at max_new_tokens
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
            "truncated_rate": self.truncated_rate,
            "empty_rate": self.prompts.count("") / len(self.prompts),
            "duplicate_rate": 1 - len(set(self.prompts)) / len(self.prompts),
            "distinct_2": _distinct(self.prompts, 2),
        }


@dataclass(frozen=True)
class AnchorReview:
    """The record of one review: the decision, its reason in words, and all that it was made from."""

    decision: AnchorDecision
    reason: str
    policy_scores: list[float]
    anchor_scores: list[float]
    promote_threshold: float
    rollback_threshold: float
    policy_health: Health
    anchor_health: Health


def advantages(scored: Scored, config: APPOConfig, kl_coef: float, mean_score: float = 0.0) -> tuple[Tensor, Tensor]:
    """From scores to advantages and returns, each [B, T], 0 on padding: baseline, token rewards, GAE, whitening.

    A score that is the same for all responses must move nothing. It would: while the value head is still 0, GAE with
    lam < 1 gives token t of T the advantage lam^(T - 1 - t) * score, and whitening turns that into a push on every
    end-of-sequence token. On real language models this shrinks all prompts to nothing in ten iterations. So scores
    are centred first (`config.leave_one_out`); the paper is silent, the published code does not centre them.

    Args:
        scored: a scored rollout.
        config: leave_one_out, gamma, lam, whiten_advantages.
        kl_coef: weight of the k1 penalty on each token's reward; 0 for none.
        mean_score: the baseline of a response that is the only one to its query: the mean of earlier scores.
    """
    scores = scored.scores
    if config.leave_one_out:
        scores = leave_one_out(scores, scored.groups, otherwise=mean_score)
    kl = kl_estimate(scored.logprobs, scored.ref_logprobs)
    rewards = token_rewards(scores, kl, scored.mask, kl_coef)
    estimated, returns = gae(rewards, scored.values, scored.mask, config.gamma, config.lam)
    if config.whiten_advantages:
        estimated = masked_whiten(estimated, scored.mask)
    return estimated, returns


class APPOTrainer:
    """Trains a policy by PPO against an anchor.

    Args:
        policy: the agent; its parameters with requires_grad are trained.
        config: PPO, the penalty and its reference.
        anchor: thresholds and number of prompts of the review.
        generator: of the sampling of rollouts, on the policy's device; its seed also begins the streams of reviews and
            of the minibatch order, so that none of the three moves another.

    Attributes:
        collected: what the last collect brought; for logging.

    Raises:
        ValueError: the policy has nothing to train.
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
        self.review_generator = _stream(generator, "review", policy.device)
        self.order_generator = _stream(generator, "order", torch.device("cpu"))
        groups: list[dict[str, Any]] = [
            {"params": [p for p in policy.model.parameters() if p.requires_grad]},
            {"params": list(policy.value_head.parameters())},
        ]
        if not groups[0]["params"]:
            raise ValueError(
                "the agent has no parameter to train: all have requires_grad=False; is its model the same object as "
                "that of the frozen target?"
            )
        groups[1]["lr"] = self.config.value_learning_rate or self.config.learning_rate
        self.optimizer = torch.optim.AdamW(groups, lr=self.config.learning_rate, weight_decay=0.0, fused=True)
        self.anchor = Anchor(policy, self.optimizer)
        self.kl_controller = KLController(self.config.kl_coef, self.config.kl_target, self.config.kl_horizon)
        self.buffer = RolloutBuffer()
        self.collected: Collected | None = None
        self.mean_score: float | None = None  # running, over iterations
        self.bad_steps = 0  # in a row

    def step(self, queries: Sequence[Query], reward_fn: RewardFn) -> dict[str, float]:
        """One iteration: collect on the queries, then update. Returns flat statistics of both.

        Raises:
            DivergedError: too many iterations in a row had nothing to learn from.
        """
        collected = self.collect(queries, reward_fn)
        if len(self.buffer):
            stats = self.update()
            self.kl_controller.update(collected.kl, len(queries))
        else:
            stats = {"skipped_steps": 1.0, "nonfinite_reward": 1.0}
        stats = {**collected.stats(), **stats}
        self._guard(stats)
        return stats

    def _guard(self, stats: Mapping[str, float]) -> None:
        """Counts iterations without a single sound optimizer step: after some back to the anchor, after more an end."""
        self.bad_steps = self.bad_steps + 1 if stats["skipped_steps"] == 1.0 else 0
        if self.bad_steps == self.config.max_bad_steps and self.anchor_config.rollback:
            self.anchor.rollback(self.policy, self.optimizer)
        if self.bad_steps >= 2 * self.config.max_bad_steps:
            reasons = ", ".join(name for name in FAULTS if stats.get(name))
            raise DivergedError(
                f"{self.bad_steps} iterations in a row without a sound step ({reasons}); see metrics.jsonl", stats
            )

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, randomness included, to be saved; tensors and plain values only."""
        return {
            "policy": self.policy.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "anchor": self.anchor.state_dict(),
            "kl_coef": self.kl_controller.coef,
            "generators": [stream and stream.get_state() for stream in self._streams()],
            "mean_score": self.mean_score,
            "bad_steps": self.bad_steps,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a saved state, bit for bit on the same machine."""
        self.policy.load_state_dict(state["policy"])
        self.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # or both would share their moments
        self.anchor.load_state_dict(state["anchor"])
        self.kl_controller.coef = state["kl_coef"]
        for stream, saved in zip(self._streams(), state["generators"], strict=True):
            if stream is not None:
                stream.set_state(saved)
        self.mean_score = state["mean_score"]
        self.bad_steps = state["bad_steps"]

    def _streams(self) -> tuple[torch.Generator | None, ...]:
        return self.generator, self.review_generator, self.order_generator

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
        if rewarded.scores.isfinite().all():  # else there is nothing to learn from; `step` counts it
            self.buffer.add(rollout, rewarded.scores.to(self.policy.device), ref_logprobs)
        kl = kl_estimate(rollout.logprobs, anchor_logprobs).sum(1).mean().item()
        truncated = 1 - self.policy.ended(rollout).float().mean().item()
        self.collected = Collected(rollout, prompts, rewarded, truncated, kl)
        return self.collected

    def update(self) -> dict[str, float]:
        """PPO epochs on everything collected; empties the buffer. Returns means over the optimizer steps.

        With a `target_kl` no further epoch is begun once the policy has moved that far.
        """
        config = self.config
        penalty = 0.0 if self.kl_in_loss else self.kl_controller.coef
        scored = self.buffer.stacked()
        self.buffer.clear()
        now = scored.scores[0] + (scored.scores - scored.scores[0]).mean()  # exact where all scores are equal
        before = now.item() if self.mean_score is None else self.mean_score
        self.mean_score = before + MEAN_RATE * (now.item() - before)
        batch = Batch.of(scored, *advantages(scored, config, penalty, before))
        steps: list[dict[str, float]] = []
        for _ in range(config.ppo_epochs):
            parts = minibatches(batch, config.minibatch_size, self.order_generator)
            epoch = [self.optimizer_step(part) for part in parts]
            steps += epoch
            if config.target_kl is not None and _mean([s.get("approx_kl", 0.0) for s in epoch]) > config.target_kl:
                break
        names = dict.fromkeys(name for step in steps for name in step if name not in FAULTS)
        faults = {name: sum(step.get(name, 0.0) for step in steps) for name in FAULTS}
        return {name: _mean([step[name] for step in steps if name in step]) for name in names} | faults

    def optimizer_step(self, minibatch: Batch) -> dict[str, float]:
        """One gradient step; micro-batches add up to exactly the gradient of the whole minibatch.

        A loss or gradient that is not finite, or a mean probability ratio above `max_ratio`, ends the step before it
        touches the weights: it counts as skipped, and the fault is named.
        """
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
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), limit).item()
        fault = self._fault(totals, norm)
        if fault:
            self.optimizer.zero_grad()
            return {"skipped_steps": 1.0, fault: 1.0}
        self.optimizer.step()
        return {**totals, "grad_norm": norm, "skipped_steps": 0.0}

    def _fault(self, stats: Mapping[str, float], grad_norm: float) -> str | None:
        """What makes a step unsound, if anything does; one of FAULTS."""
        if not all(math.isfinite(stats[name]) for name in ("policy_loss", "value_loss")):
            return "nonfinite_loss"
        if not math.isfinite(grad_norm):
            return "nonfinite_gradient"
        if self.config.max_ratio is not None and stats["ratio"] > self.config.max_ratio:
            return "exploded_ratio"
        return None

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
            "ratio": masked_mean((now.logprobs - batch.logprobs).exp(), batch.mask),
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

        Scores alone do not show a collapse: an agent that writes nothing any more may be at chance, as its anchor is.
        So what both wrote is compared too (`appo.anchor.collapse`), and an agent that has collapsed goes back. Its lead
        does not save it unless it beats the anchor's best prompt: an agent that writes "no" to everything may be better
        than the mean of eight different prompts, but it will never find another.

        Args:
            queries: one per prompt to sample; built from training examples, like any query.
            score_fn: prompts to accuracies in [0, 1] on the *validation* split.
        """
        config = self.anchor_config
        prompts, policy_health = self._written(queries)
        policy_scores = list(score_fn(prompts))
        with self.anchor.in_place_of(self.policy):
            prompts, anchor_health = self._written(queries)
        anchor_scores = list(score_fn(prompts))
        thresholds = (config.promote_threshold, config.rollback_threshold)
        policy_mean, anchor_mean = _mean(policy_scores), _mean(anchor_scores)
        decision = decide(policy_mean, anchor_mean, *thresholds)
        reason = f"mean score {policy_mean:.3f} against the anchor's {anchor_mean:.3f}"
        sign = collapse(policy_health, anchor_health) if config.collapse else None
        wins = decision is AnchorDecision.PROMOTE and policy_mean > max(anchor_scores)
        if sign and not wins:
            decision, reason = AnchorDecision.ROLLBACK, f"the agent has collapsed: {sign}"
        if decision is AnchorDecision.PROMOTE and config.promote and self.config.reference != "initial":
            self.anchor.promote(self.policy, self.optimizer)
        elif decision is AnchorDecision.ROLLBACK and config.rollback:
            self.anchor.rollback(self.policy, self.optimizer)
        elif decision is not AnchorDecision.KEEP:
            decision, reason = AnchorDecision.KEEP, f"{reason}; {decision} is switched off"
        sides = (policy_scores, anchor_scores, *thresholds, policy_health, anchor_health)
        return AnchorReview(decision, reason, *sides)

    def _written(self, queries: Sequence[Query]) -> tuple[list[str], Health]:
        """What the policy as it is now writes to the queries, for a review."""
        rollout = self.policy.sample(queries, self.review_generator)
        prompts = self.policy.decode(rollout)
        return prompts, Health(
            length=rollout.mask.sum(1).float().mean().item(),
            empty_rate=prompts.count("") / len(prompts),
            distinct=len(set(prompts)) / len(prompts),
            distinct_2=_mean([_distinct([prompt], 2) for prompt in prompts if len(prompt.split()) > 1] or [1.0]),
            entropy=-masked_mean(rollout.logprobs, rollout.mask).item(),
        )


def _stream(parent: torch.Generator | None, name: str, device: torch.device) -> torch.Generator | None:
    """A generator for one purpose, seeded by the parent's seed and the purpose's name; the parent stays as it is."""
    if parent is None:
        return None
    return torch.Generator(device).manual_seed(random.Random(f"{parent.initial_seed()} {name}").getrandbits(63))


def _distinct(prompts: Sequence[str], size: int) -> float:
    """Distinct runs of `size` words over all of them (Li et al. 2016, distinct-n): near 0 when prompts repeat."""
    words = [prompt.split() for prompt in prompts]
    runs = [tuple(row[i : i + size]) for row in words for i in range(len(row) - size + 1)]
    return len(set(runs)) / max(1, len(runs))


def _mean(scores: Sequence[float]) -> float:
    return sum(scores) / len(scores)
