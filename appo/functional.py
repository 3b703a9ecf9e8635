"""The maths of PPO for language models, as free functions: tensors and floats in, tensors out.

No model, no config, no device, no I/O. Shapes: B responses, T response positions, right-padded, V vocabulary.
`mask` is 1 (or True) on real response tokens, the end-of-sequence token included, and 0 on padding. Values
on padding are never used: NaN or inf there changes no result and no gradient, and outputs there are 0. That is
why padding is removed with `masked_fill` and never by multiplying: inf * 0 is NaN.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

KLKind = Literal["k1", "k2", "k3"]


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of `x` [*] over the positions that `mask` selects, along `dim` or (None) all; 0 where it selects none."""
    mask = mask.bool()
    return x.masked_fill(~mask, 0.0).sum(dim) / mask.sum(dim).clamp(min=1)


def masked_var(x: Tensor, mask: Tensor, unbiased: bool = True) -> Tensor:
    """Variance of `x` over `mask`, a scalar; with Bessel's correction by default. 0 for fewer than two values."""
    mask = mask.bool()
    squares = (x.masked_fill(~mask, 0.0) - masked_mean(x, mask)) ** 2
    count = mask.sum()
    return squares.masked_fill(~mask, 0.0).sum() / (count - int(unbiased)).clamp(min=1)


def masked_whiten(x: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    """`x` at mean 0 and variance 1 over `mask`: (x - mean) / sqrt(var + 1e-8), 0 on padding; a single value gives 0.

    With `shift_mean=False` the mean is added back and only the scale changes, as in Ziegler et al. 2019
    (some libraries give the flag the opposite meaning).
    """
    mask = mask.bool()
    mean = masked_mean(x, mask)
    whitened = (x.masked_fill(~mask, 0.0) - mean) * torch.rsqrt(masked_var(x, mask) + 1e-8)
    return (whitened if shift_mean else whitened + mean).masked_fill(~mask, 0.0)


def logprobs_from_logits(logits: Tensor, tokens: Tensor) -> Tensor:
    """log softmax(logits)[token], in float32 (float64 for float64 logits).

    Args:
        logits: [*, V], any floating dtype.
        tokens: [*] token ids.

    Returns:
        [*]
    """
    return at_least_float32(logits).log_softmax(-1).gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy in nats of softmax(logits): [*, V] -> [*]. Tokens of probability 0 add nothing."""
    return entropy_from_logprobs(at_least_float32(logits).log_softmax(-1))


def entropy_from_logprobs(logprobs: Tensor) -> Tensor:
    """Entropy in nats of a distribution, from its log-probabilities: [*, V] -> [*]."""
    return -(logprobs.exp() * logprobs.clamp(min=torch.finfo(logprobs.dtype).min)).sum(-1)  # 0 * -inf is NaN


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind = "k1") -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled.

    With d = log p(token) - log p_ref(token): k1 = d, unbiased but of either sign; k2 = d^2 / 2, biased;
    k3 = exp(-d) - 1 + d, unbiased and never negative (http://joschu.net/blog/kl-approx.html).

    Raises:
        ValueError: `kind` is none of the three.
    """
    difference = logprobs - ref_logprobs
    if kind == "k1":
        return difference
    if kind == "k2":
        return 0.5 * difference**2
    if kind == "k3":
        return torch.expm1(-difference) + difference
    raise ValueError(f"unknown KL estimator {kind!r}; one of k1, k2, k3")


def leave_one_out(scores: Tensor, groups: Tensor, otherwise: float = 0.0) -> Tensor:
    """Each score minus the mean of the other scores in its group: REINFORCE leave-one-out (Kool et al. 2019).

    A response does not affect its own baseline, so the expected policy gradient is unchanged. Equal scores give
    exactly 0: scores are subtracted pairwise, which leaves no rounding error for whitening to amplify.

    Args:
        scores: [B].
        groups: [B], the group index of each score.
        otherwise: the baseline of a score that is alone in its group.
    """
    others = (groups[:, None] == groups).fill_diagonal_(False)  # [B, B]
    differences = (scores[:, None] - scores).masked_fill(~others, 0.0).sum(1)
    count = others.sum(1)
    return torch.where(count > 0, differences / count.clamp(min=1), scores - otherwise)


def group_scaled(centred: Tensor, groups: Tensor) -> Tensor:
    """Centred scores over their root mean square in their group, as in GRPO (Shao et al. 2024); both [B]; 0 stays 0."""
    same = (groups[:, None] == groups).to(centred.dtype)  # [B, B]
    return centred / (same @ centred**2 / same.sum(1)).sqrt().clamp(min=1e-4)


def token_rewards(scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """Reward of each token: -kl_coef * kl everywhere, plus the response's score on its last real token.

    The penalty P of StablePrompt (Eq. 10) enters PPO here, as in Ziegler et al. 2019, Eq. 2. A row without any
    real token gets nothing.

    Args:
        scores: [B], one per response.
        kl: [B, T], from `kl_estimate`.
        mask: [B, T].

    Returns:
        [B, T], 0 on padding.
    """
    mask = mask.bool()
    is_last = mask & ~F.pad(mask[:, 1:], (0, 1))
    penalty = -kl_coef * kl.masked_fill(~mask, 0.0)
    return penalty + torch.where(is_last, scores.unsqueeze(1), 0.0)


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, Eq. 16; StablePrompt, Eq. 4).

    delta_t = r_t + gamma V_{t+1} - V_t and A_t = delta_t + gamma lam A_{t+1}. The episode ends with the last
    real token of each row, not at T: V and A after it are 0. lam = 1 gives discounted reward-to-go minus V,
    lam = 0 the one-step error delta. Not whitened.

    Args:
        rewards, values, mask: [B, T]; values[:, t] is V of the state before token t.

    Returns:
        (advantages, returns), both [B, T] and 0 on padding; returns = advantages + values.
    """
    mask = mask.bool()
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    next_values = F.pad(values[:, 1:], (0, 1))
    deltas = rewards + gamma * next_values - values
    advantages = torch.zeros_like(deltas)
    running = torch.zeros_like(deltas[:, 0])
    for t in reversed(range(deltas.shape[1])):
        running = deltas[:, t] + gamma * lam * running
        advantages[:, t] = running
    return advantages, advantages + values


class PolicyLoss(NamedTuple):
    """Result of `policy_loss`: scalars; only `loss` carries a gradient."""

    loss: Tensor
    clip_fraction: Tensor
    approx_kl: Tensor


def policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, mask: Tensor, clip_range: float = 0.2
) -> PolicyLoss:
    """PPO's clipped surrogate (Schulman et al. 2017, Eq. 7; StablePrompt, Eqs. 5-6), to be minimised.

    Mean over `mask` of max(-A r, -A clip(r, 1 - eps, 1 + eps)) with r = exp(logprobs - old_logprobs). The max of
    the negated terms is Schulman's min; StablePrompt prints the clipped term alone, which
    cannot pull back a ratio that has left the range in the wrong direction.

    Args:
        logprobs, old_logprobs, advantages, mask: [B, T]. Only `logprobs` is differentiated.

    Returns:
        loss; clip_fraction, the share of tokens whose clipped term is the one used; approx_kl, the k3 estimate
        of KL(old || new).
    """
    mask = mask.bool()
    old_logprobs, advantages = old_logprobs.detach(), advantages.detach()
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)
    ratio = log_ratio.exp()
    unclipped = -advantages * ratio
    clipped = -advantages * ratio.clamp(1.0 - clip_range, 1.0 + clip_range)
    with torch.no_grad():
        clip_fraction = masked_mean((clipped > unclipped).to(ratio.dtype), mask)
        approx_kl = masked_mean(torch.expm1(log_ratio) - log_ratio, mask)
    return PolicyLoss(masked_mean(torch.maximum(unclipped, clipped), mask), clip_fraction, approx_kl)


class ValueLoss(NamedTuple):
    """Result of `value_loss`: scalars; only `loss` carries a gradient."""

    loss: Tensor
    clip_fraction: Tensor


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip_range: float | None = 0.2
) -> ValueLoss:
    """Squared error of the value head (StablePrompt, Eq. 3), clipped around the values of the rollout.

    0.5 * mean over `mask` of max((V - R)^2, (clip(V, V_old - eps, V_old + eps) - R)^2);
    clip_range=None turns the clipping off.

    Args:
        values, old_values, returns, mask: [B, T]. Only `values` is differentiated.
    """
    mask = mask.bool()
    values = values.masked_fill(~mask, 0.0)
    old_values, returns = (x.detach().masked_fill(~mask, 0.0) for x in (old_values, returns))
    unclipped = (values - returns) ** 2
    if clip_range is None:
        return ValueLoss(0.5 * masked_mean(unclipped, mask), unclipped.new_zeros(()))
    clipped = (values.clamp(old_values - clip_range, old_values + clip_range) - returns) ** 2
    clip_fraction = masked_mean((clipped > unclipped).to(values.dtype), mask)
    return ValueLoss(0.5 * masked_mean(torch.maximum(unclipped, clipped), mask), clip_fraction)


def at_least_float32(x: Tensor) -> Tensor:
    """`x` as float32; float64 stays float64."""
    return x if x.dtype == torch.float64 else x.float()
