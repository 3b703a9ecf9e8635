"""A check of the first rollout of every run that trains: do the log-probabilities in the loss match those at sampling?

Without it these mistakes would stay silent: training would go on with wrong ratios.
"""

from __future__ import annotations

import torch
from torch import Tensor

from appo.anchor import Anchor
from appo.policy import Policy
from appo.rollout import Rollout
from appo.update import ROUNDING


class SelfCheckError(RuntimeError):
    """The first rollout fails a check; the message says which one, and the likely cause."""


@torch.no_grad()
def self_check(policy: Policy, anchor: Anchor, rollout: Rollout) -> None:
    """Checks a rollout that `policy` has just sampled, before any update.

    1. The KL to the anchor is 0, since the anchor still equals the policy.
    2. The row with the most padding has the same log-probabilities alone as in the batch.
    3. Recomputed log-probabilities equal the sampled ones, so every ratio starts at 1.

    Each up to rounding, in nats per token: 1e-4, for models that compute in bfloat16 0.1 in the root mean square; for
    the KL, where both sides make the same pass, a tenth of that.

    Raises:
        SelfCheckError: one of them does not hold.
    """
    exact = policy.lm.compute_dtype.itemsize >= 4
    tolerance = ROUNDING if exact else 0.1  # nats: the largest difference; below float32, the root of the mean square

    def size(difference: Tensor) -> float:
        return (difference.abs().max() if exact else difference.square().mean().sqrt()).item()

    together = policy.measure(rollout).logprobs
    if not size(together - anchor.logprobs(rollout)) <= tolerance / 10:
        cause = "the anchor is not a copy of the agent's current weights"
        raise SelfCheckError(f"KL to the anchor is not 0 before the first update; likely cause: {cause}")

    queries = [len(rollout.queries[m].tokens) for m in rollout.owner.tolist()]
    shortest = min(range(len(rollout)), key=lambda i: queries[i] + int(rollout.mask[i].sum()))
    alone = rollout.select(torch.tensor([shortest], device="cpu"))
    difference = policy.evaluate(alone).logprobs[0] - together[shortest][rollout.mask[shortest]]
    if not (error := size(difference)) <= tolerance:
        raise SelfCheckError(
            f"response {shortest} has different log-probabilities alone and batched (by {error:.2g}); likely cause: "
            "padding side or position ids: the model sees the padding"
        )

    difference = (rollout.logprobs - together)[rollout.mask]
    if not (error := size(difference)) <= tolerance:
        raise SelfCheckError(
            f"recomputed log-probabilities differ from the sampled ones by {error:.2g}, "
            f"more than {tolerance:g}; likely cause: {_sampling_cause(difference)}"
        )


def _sampling_cause(difference: Tensor) -> str:
    # Truncation renormalises over fewer tokens, so that every sampled token looks likelier than it is.
    if (difference >= -1e-6).all():
        return "the sampler cut the distribution (top_k, top_p or min_p, perhaps from a generation_config)"
    return "sampling and loss use different temperatures"
