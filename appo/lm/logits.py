"""Log-probabilities and entropies of logits, without the memory that autograd would take.

Logits are by far the largest tensor of PPO on language models. Log-probabilities and entropies are computed some rows
at a time, and only the logits are kept for the gradient; the plain forms in `appo.functional` give equal values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from appo.functional import at_least_float32, entropy_from_logprobs

AT_ONCE = 2**17  # numbers in a chunk, which then fits into the caches of a CPU


def logprobs_and_entropy(logits: Tensor, tokens: Tensor, used_up: bool = False) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens and entropies, as in `appo.functional`, in one pass.

    Args:
        logits: [n, V].
        tokens: [n].
        used_up: nobody reads the logits after a backward pass has begun; their gradient then takes their place in
            memory. (If a second backward pass needs them, torch raises RuntimeError.)

    Returns:
        ([n], [n]) in float32 (float64 for float64 logits).
    """
    found: tuple[Tensor, Tensor] = _TokenLogprobs.apply(logits, tokens, used_up)
    return found


def draw(logprobs: Tensor, uniform: Tensor) -> Tensor:
    """A token [n] from each distribution [n, V]: the first whose cumulative probability exceeds a number [n] in [0, 1).

    One number for a token, where torch.multinomial and an exponential race need V of them: two to four times faster on
    a CPU. In float64, because the sum of a large vocabulary is near 1, where float32 loses its rare tokens.
    """
    below = logprobs.exp().cumsum(-1, dtype=torch.float64)
    level = uniform.unsqueeze(-1) * below[:, -1:]
    return torch.searchsorted(below, level, right=True)[:, 0].clamp(max=logprobs.shape[-1] - 1)


class _TokenLogprobs(torch.autograd.Function):
    """With p = softmax(logits) and entropy H: d log p[token] = onehot(token) - p; d H = -p (log p + H)."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor, used_up: bool) -> tuple[Tensor, Tensor]:
        tokens, ctx.used_up = tokens.unsqueeze(-1), used_up
        ctx.set_materialize_grads(False)  # the entropies' gradient is None if the loss does not use them
        chosen, entropies = [], []
        for rows, token in _chunks(logits, tokens):
            logprobs = at_least_float32(rows).log_softmax(-1)
            chosen.append(logprobs.gather(-1, token).squeeze(-1))
            entropies.append(entropy_from_logprobs(logprobs))
        found = torch.cat(entropies)
        ctx.save_for_backward(logits, tokens, found.unsqueeze(-1))
        return torch.cat(chosen), found

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor, None, None]:
        logits, tokens, entropies = ctx.saved_tensors
        of_token, of_entropy = (torch.zeros_like(entropies) if g is None else g.unsqueeze(-1) for g in grads)
        gradient = logits if ctx.used_up else torch.empty_like(logits)  # each row is read before it is written
        for rows, token, entropy, g, h, out in _chunks(logits, tokens, entropies, of_token, of_entropy, gradient):
            part = at_least_float32(rows).softmax(-1).mul_(-g)
            if grads[1] is not None:
                logprobs = at_least_float32(rows).log_softmax(-1)
                least = torch.finfo(logprobs.dtype).min  # 0 * -inf is NaN
                part -= h * logprobs.exp() * (logprobs.clamp(min=least) + entropy)
            out.copy_(part.scatter_add_(-1, token, g))
        return gradient, None, None


def _chunks(logits: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yields some rows of logits [n, V] at a time, with the same rows of the others [n, *]."""
    rows = max(1, AT_ONCE // logits.shape[-1])
    return zip(*(x.split(rows) for x in (logits, *others)), strict=True)
