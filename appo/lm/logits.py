"""What PPO wants of logits, without the memory that autograd would take for it.

Logits are by far the largest tensor of PPO on language models. Log-probabilities and entropies are computed some rows
at a time, and only the logits are kept for the gradient; `appo.functional` has the plain forms, which they equal.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from appo.functional import at_least_float32, entropy_from_logprobs

AT_ONCE = 2**17  # numbers: what fits into the caches of a CPU


def logprobs_and_entropy(logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens and entropies, as in `appo.functional`, in one pass; entropies have no gradient.

    Args:
        logits: [n, V].
        tokens: [n].

    Returns:
        ([n], [n]) in float32 (float64 for float64 logits).
    """
    found: tuple[Tensor, Tensor] = _TokenLogprobs.apply(logits, tokens)
    return found


class _TokenLogprobs(torch.autograd.Function):
    """The gradient is that of cross-entropy: one at the token, minus softmax(logits)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        tokens = tokens.unsqueeze(-1)
        ctx.save_for_backward(logits, tokens)
        chosen, entropies = [], []
        for rows, token in _chunks(logits, tokens):
            logprobs = at_least_float32(rows).log_softmax(-1)
            chosen.append(logprobs.gather(-1, token).squeeze(-1))
            entropies.append(entropy_from_logprobs(logprobs))
        found = torch.cat(entropies)
        ctx.mark_non_differentiable(found)
        return torch.cat(chosen), found

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        logits, tokens = ctx.saved_tensors
        gradient = torch.empty_like(logits)
        for rows, token, grad, out in _chunks(logits, tokens, grad_outputs[0].unsqueeze(-1), gradient):
            out.copy_(at_least_float32(rows).softmax(-1).mul_(-grad).scatter_add_(-1, token, grad))
        return gradient, None


def _chunks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Some rows at a time of logits [n, V], and the same rows of the others [n, *]."""
    rows = max(1, AT_ONCE // logits.shape[-1])
    return zip(*(x.split(rows) for x in (logits, *others)), strict=True)
