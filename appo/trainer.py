"""APPO, the training loop; reads like the paper's algorithm box.

    for each iteration:
        step(queries, reward_fn)          collect: sample prompts, score them, reference log-probabilities
                                          update:  advantages, then PPO epochs on both losses
        every `period` iterations:
        review_anchor(queries, score_fn)  promote, roll back, or keep

`fit` does all of it. The caller supplies queries and rewards, and logs what it wants.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Protocol

import torch
from torch import Tensor

from appo.anchor import Anchor, AnchorDecision, Health, KLController, collapse, decide, luck
from appo.config import AnchorConfig, APPOConfig
from appo.functional import kl_estimate, masked_mean
from appo.lm.ends import distinct_ngrams, distinct_share
from appo.policy import Policy
from appo.rollout import Query, Rollout, RolloutBuffer
from appo.update import FAULTS, Updater


class Rewarded(Protocol):
    """The rewards of B prompts: scores [B], and the metrics that make up the scores, by name, each [B]."""

    @property
    def scores(self) -> Tensor: ...
    @property
    def metrics(self) -> Mapping[str, Tensor]: ...


RewardFn = Callable[[list[str]], Rewarded | Tensor | Sequence[float]]
ScoreFn = Callable[[list[str]], Sequence[float]]


@dataclass(frozen=True)
class Scores:
    """Rewards without metrics."""

    scores: Tensor
    metrics: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Collected:
    """One collect: the rollout, its prompts as text, and their rewards."""

    rollout: Rollout
    prompts: list[str]
    rewarded: Rewarded
    truncated_rate: float  # share of responses that were cut off at max_new_tokens
    kl: float  # KL(policy || anchor), k1 summed over tokens, mean over responses, nats; whatever the reference is

    def stats(self) -> dict[str, float]:
        """Statistics of the rewards and prompts, by name."""
        scores, health = self.rewarded.scores, _health(self.rollout, self.prompts)
        return {
            "reward_mean": scores.mean().item(),
            "reward_max": scores.max().item(),
            **{f"{name}_mean": values.float().mean().item() for name, values in self.rewarded.metrics.items()},
            "kl": self.kl,
            "length_mean": health.length,
            "truncated_rate": self.truncated_rate,
            "empty_rate": health.empty_rate,
            "duplicate_rate": 1 - len(set(self.prompts)) / len(self.prompts),
            "distinct_2": distinct_ngrams(self.prompts, 2),
        }


@dataclass(frozen=True)
class AnchorReview:
    """The record of one review: the decision, its reason in words, and the numbers that it is based on."""

    decision: AnchorDecision
    reason: str
    policy_scores: list[float]
    anchor_scores: list[float]
    promote_threshold: float
    rollback_threshold: float
    policy_health: Health
    anchor_health: Health


@dataclass(frozen=True)
class Iteration:
    """What one iteration did: what it collected, its statistics, and the review that followed, if one was due."""

    collected: Collected
    stats: dict[str, float]
    review: AnchorReview | None = None


class DivergedError(ArithmeticError):
    """Training has diverged and cannot recover; `iteration` is the last one."""

    def __init__(self, message: str, iteration: Iteration) -> None:
        super().__init__(message)
        self.iteration = iteration


class APPOTrainer:
    """Trains a policy by PPO against an anchor.

    Args:
        policy: the agent; its parameters with requires_grad are trained (ValueError if it has none).
        config: PPO, the penalty and its reference.
        anchor: when the anchor is reviewed, and by how much.
        generator: for sampling rollouts, on the policy's device. Reviews and the minibatch order have generators of
            their own, made from its seed, so that none of the three changes what another draws.
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
        self.updater = Updater(policy, self.config, _stream(generator, "order", torch.device("cpu")))
        self.anchor = Anchor(policy, self.updater.optimizer)
        self.kl_controller = KLController(self.config.kl_coef, self.config.kl_target, self.config.kl_horizon)
        self.buffer = RolloutBuffer()
        self.bad_steps = 0  # in a row
        self.far = False  # whether the last rollout's KL to the anchor is above `AnchorConfig.max_kl`

    def fit(
        self,
        queries: Sequence[Query] | Callable[[int], Sequence[Query]],
        reward_fn: RewardFn,
        steps: int,
        copies: int = 8,
        score_fn: ScoreFn | None = None,
    ) -> Iterator[Iteration]:
        """The whole algorithm: yields each iteration when it is done. Raises DivergedError as `step` does.

        Args:
            queries: those of every iteration, or a function from the iteration's number (from 1) to its queries.
            reward_fn: maps prompts, with those for one query side by side, to rewards.
            steps: iterations.
            copies: prompts for each query, K.
            score_fn: maps prompts to accuracies in [0, 1] on *validation* data. With it the anchor is reviewed every
                `AnchorConfig.period` iterations, and when the agent is far from it; without it the anchor stays.
        """
        ask = queries if callable(queries) else lambda _number: queries
        for number in range(1, steps + 1):
            asked = ask(number)
            iteration = self.step(asked, reward_fn, copies)
            due = self.far or number % self.anchor_config.period == 0
            if due and score_fn is not None and self.updater.reference.reviewed:
                each = -(-self.anchor_config.prompts // len(asked))
                iteration = replace(iteration, review=self.review_anchor(asked, score_fn, each))
            yield iteration

    def step(self, queries: Sequence[Query], reward_fn: RewardFn, copies: int = 1) -> Iteration:
        """One iteration: collect on the queries, then update.

        Raises:
            DivergedError: too many iterations in a row had no sound step.
        """
        collected = self.collect(queries, reward_fn, copies)
        if len(self.buffer):
            stats = self.update()
            self.kl_controller.update(collected.kl, len(collected.rollout))
        else:
            stats = {"skipped_steps": 1.0, "nonfinite_reward": 1.0}
        iteration = Iteration(collected, {**collected.stats(), **stats})
        self._guard(iteration)
        return iteration

    def collect(self, queries: Sequence[Query], reward_fn: RewardFn, copies: int = 1) -> Collected:
        """Samples `copies` responses to each query, scores them, and adds them to the buffer; may be called repeatedly.

        A rollout with a reward that is not finite is returned, but does not enter the buffer. Without a number
        for each prompt: TypeError or ValueError; for other errors see `Policy.sample`.
        """
        rollout = self.policy.sample(queries, self.generator, copies)
        if self.policy.lm.compute_dtype.itemsize < 4:
            now = self.policy.measure(rollout)  # token by token, bfloat16 rounds otherwise than in the loss
            rollout = replace(rollout, logprobs=now.logprobs, values=now.values)
        prompts = self.policy.decode(rollout)
        rewarded = _rewarded(reward_fn(prompts), len(prompts))
        self.policy.ranks.check_same("rewards", rewarded.scores.tolist())
        anchor_logprobs = rollout.logprobs if self.anchor.is_policy() else self.anchor.logprobs(rollout)
        cut_off = 1 - self.policy.ended(rollout).float()
        if rewarded.scores.isfinite().all():
            ref_logprobs = anchor_logprobs if self.updater.reference.fixed else rollout.logprobs
            scores = rewarded.scores.to(self.policy.device) - self.config.cut_off_penalty * cut_off
            self.buffer.add(rollout, scores, ref_logprobs)
        kl = kl_estimate(rollout.logprobs, anchor_logprobs).sum(1).mean().item()
        self.far = kl > (self.anchor_config.max_kl or float("inf"))
        return Collected(rollout, prompts, rewarded, cut_off.mean().item(), kl)

    def update(self) -> dict[str, float]:
        """PPO epochs on everything collected (ValueError if nothing is); empties the buffer. See `Updater.update`."""
        scored = self.buffer.stacked()
        self.buffer.clear()
        return self.updater.update(scored, self.kl_controller.coef)

    def _guard(self, iteration: Iteration) -> None:
        """After `max_bad_steps` iterations in a row without a sound step, rolls back; after twice as many, raises."""
        self.bad_steps = self.bad_steps + 1 if iteration.stats["skipped_steps"] == 1.0 else 0
        if self.bad_steps == self.config.max_bad_steps and self.anchor_config.rollback:
            self.anchor.rollback()
            iteration.stats["guard_rollback"] = 1.0
        if self.bad_steps >= 2 * self.config.max_bad_steps:
            reasons = ", ".join(name for name in FAULTS if iteration.stats.get(name))
            raise DivergedError(f"{self.bad_steps} iterations in a row without a sound step ({reasons})", iteration)

    def review_anchor(self, queries: Sequence[Query], score_fn: ScoreFn, copies: int = 1) -> AnchorReview:
        """Lets agent and anchor answer the same queries, compares their mean scores, and acts on the result.

        Scores alone do not show a collapse: an agent that has stopped writing may be at chance, just like its anchor.
        So the prompts of both are compared too (`appo.anchor.collapse`), and a collapsed agent is rolled back. A lead
        prevents this only if the mean beats the anchor's best prompt: an agent that always writes "no" may beat the
        mean of many different prompts, but it will never find another.
        Far from the anchor (`AnchorConfig.max_kl`) both thresholds are 0: an agent that is kept there would drift on.

        Args:
            queries: built from training examples, like any query.
            score_fn: maps prompts to accuracies in [0, 1] on the *validation* split (else TypeError or ValueError).
            copies: prompts to sample for each query, from each side.
        """
        config = self.anchor_config
        prompts, policy_health = self._written(queries, copies)
        policy_scores = _rewarded(score_fn(prompts), len(prompts), "score", torch.float64).scores.tolist()
        with self.anchor.in_place():
            prompts, anchor_health = self._written(queries, copies)
        anchor_scores = _rewarded(score_fn(prompts), len(prompts), "score", torch.float64).scores.tolist()
        thresholds = (0.0, 0.0) if self.far else (config.promote_threshold, config.rollback_threshold)
        policy_mean, anchor_mean = (sum(scores) / len(scores) for scores in (policy_scores, anchor_scores))
        decision = decide(policy_mean, anchor_mean, *thresholds)
        reason = f"mean score {policy_mean:.3f} against the anchor's {anchor_mean:.3f}"
        if decision is not AnchorDecision.KEEP and not self.far and config.significance is not None:
            p = luck([one - other for one, other in zip(policy_scores, anchor_scores, strict=True)])
            if p > config.significance:
                decision, reason = AnchorDecision.KEEP, f"{reason}; that may be luck (p = {p:.2f})"
        wins = policy_mean > max(anchor_scores)
        if config.collapse and not wins and (sign := collapse(policy_health, anchor_health)):
            decision, reason = AnchorDecision.ROLLBACK, f"the agent has collapsed: {sign}"
        if decision is AnchorDecision.PROMOTE and config.promote and self.updater.reference.moves:
            self.anchor.promote()
        elif decision is AnchorDecision.ROLLBACK and config.rollback:
            self.anchor.rollback()
        elif decision is not AnchorDecision.KEEP:
            decision, reason = AnchorDecision.KEEP, f"{reason}; {decision} is switched off"
        self.policy.ranks.check_same("decisions on the anchor", (decision.value, policy_scores, anchor_scores))
        return AnchorReview(decision, reason, policy_scores, anchor_scores, *thresholds, policy_health, anchor_health)

    def _written(self, queries: Sequence[Query], copies: int) -> tuple[list[str], Health]:
        """The prompts that the current policy writes for the queries of a review, and their health."""
        rollout = self.policy.sample(queries, self.review_generator, copies)
        prompts = self.policy.decode(rollout)
        return prompts, _health(rollout, prompts)

    def state_dict(self) -> dict[str, Any]:
        """Everything the next step depends on, random states included. The tensors are live: save them before it."""
        state = {
            "policy": {name: weight.detach() for name, weight in self.policy.trained().items()},
            "optimizer": self.updater.optimizer.state_dict(),
            "anchor": self.anchor.state_dict(),
            "kl_coef": self.kl_controller.coef,
            "generators": [stream and stream.get_state() for stream in self._streams()],
            "mean_score": self.updater.mean_score,
            "bad_steps": self.bad_steps,
        }
        return dict(self.policy.ranks.whole(state))

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restores a saved state; on the same machine, training then continues bit for bit."""
        state = self.policy.ranks.part(state)
        self.policy.load_state_dict(self.policy.state_dict() | state["policy"])
        self.updater.optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # or both would share their moments
        self.anchor.load_state_dict(state["anchor"])
        self.kl_controller.coef = state["kl_coef"]
        for stream, saved in zip(self._streams(), state["generators"], strict=True):
            if stream and saved is not None and saved.shape == stream.get_state().shape:  # else of another device
                stream.set_state(saved)
        self.updater.mean_score, self.bad_steps = state["mean_score"], state["bad_steps"]

    def _streams(self) -> tuple[torch.Generator | None, ...]:
        return self.generator, self.review_generator, self.updater.generator


def _stream(parent: torch.Generator | None, name: str, device: torch.device) -> torch.Generator | None:
    """A generator for one purpose, seeded from the parent's seed and the purpose's name; the parent is not changed."""
    if parent is None:
        return None
    return torch.Generator(device).manual_seed(random.Random(f"{parent.initial_seed()} {name}").getrandbits(63))


def _rewarded(found: Any, count: int, what: str = "reward", dtype: torch.dtype = torch.float32) -> Rewarded:
    """The return value of a reward or score function (`what`), after a check that it has a number for each prompt."""
    try:
        scores = torch.as_tensor(getattr(found, "scores", found), dtype=dtype, device="cpu")
    except (TypeError, ValueError) as error:
        raise TypeError(f"the {what} function gave {found!r:.80}, not a number for each of {count} prompts") from error
    if scores.shape != (count,):
        raise ValueError(f"the {what} function gave {what}s of shape {tuple(scores.shape)}, not [{count}]")
    if what == "score" and (outside := scores[(scores < 0) | (scores > 1)]).numel():
        raise ValueError(f"the score function gave {outside[0].item():g}; expected accuracies between 0 and 1")
    return Scores(scores, getattr(found, "metrics", {}))


def _health(rollout: Rollout, prompts: Sequence[str]) -> Health:
    return Health(
        length=rollout.mask.sum(1).float().mean().item(),
        empty_rate=prompts.count("") / len(prompts),
        distinct=distinct_share(prompts),
        variety=fmean([distinct_ngrams([prompt], 2) for prompt in prompts if len(prompt.split()) > 1] or [1.0]),
        entropy=-masked_mean(rollout.logprobs, rollout.mask).item(),
    )
