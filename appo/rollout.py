"""Queries, responses, scores, and the minibatches made of them. Needs no model.

Time alignment, stated here for the whole package: index t of logprobs, values, rewards, advantages and returns
refers to response token t, and `values[:, t]` is the value of the state *before* token t is emitted.

Responses are right-padded to a common T, and everything outside `mask` is zero. A rollout holds each query once; its
`owner` says which query a response answers.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Query:
    """The agent's input: the token ids of a meta-prompt, at least one."""

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("a query needs at least one token; the agent's first token is conditioned on it")


@dataclass(frozen=True)
class Response:
    """One sampled continuation, ragged: tokens [t] (the end-of-sequence token included), logprobs [t], values [t]."""

    tokens: Tensor
    logprobs: Tensor
    values: Tensor


@dataclass(frozen=True)
class Rollout:
    """B responses to M queries, as sampled.

    Attributes:
        queries: M of them.
        owner: [B] int64, the index of the query that each response answers.
        tokens: [B, T] int64.
        mask: [B, T] bool, True on real tokens.
        logprobs: [B, T], log-probability of each token under the policy that sampled it.
        values: [B, T].
    """

    queries: tuple[Query, ...]
    owner: Tensor
    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        shape = (len(self.owner), self.tokens.shape[-1])
        for name in ("tokens", "mask", "logprobs", "values"):
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"{name} has shape {found}; {len(self.owner)} responses of T tokens need {shape}")

    def __len__(self) -> int:
        return len(self.owner)

    def select(self, rows: Tensor) -> Self:
        """The given rows with the queries that they answer, cut to the longest response among them."""
        width = max(int(self.mask[rows].sum(1).max()), 1)
        used, owner = self.owner[rows].unique(return_inverse=True)
        picked = {name: value[rows] for name, value in vars(self).items() if name not in ("queries", "owner")}
        cut = {name: value[:, :width] if value.dim() > 1 else value for name, value in picked.items()}
        return replace(self, queries=tuple(self.queries[m] for m in used.tolist()), owner=owner, **cut)

    def responses(self) -> list[Response]:
        """The responses without padding."""
        rows = zip(self.tokens, self.logprobs, self.values, self.mask, strict=True)
        return [Response(tokens[m], logprobs[m], values[m]) for tokens, logprobs, values, m in rows]


@dataclass(frozen=True)
class Scored(Rollout):
    """A rollout with ref_logprobs [B, T], log-probabilities under the KL's reference, and scores [B]."""

    ref_logprobs: Tensor
    scores: Tensor

    @classmethod
    def of(cls, rollout: Rollout, scores: Tensor, ref_logprobs: Tensor) -> Scored:
        """The rollout with its scores, all copied from the caller's tensors.

        Raises:
            ValueError: shapes that do not fit the rollout, or a score that is not finite.
        """
        if scores.shape != (len(rollout),):
            raise ValueError(f"scores has shape {tuple(scores.shape)}; {len(rollout)} responses need [{len(rollout)}]")
        if ref_logprobs.shape != rollout.tokens.shape:
            found, wanted = tuple(ref_logprobs.shape), tuple(rollout.tokens.shape)
            raise ValueError(f"ref_logprobs has shape {found}; the rollout's is {wanted}")
        if not scores.isfinite().all():
            bad = int((~scores.isfinite()).nonzero()[0])
            raise ValueError(f"the reward of response {bad} is {scores[bad].item()}; rewards must be finite")
        copies = {name: value.clone() for name, value in vars(rollout).items() if name != "queries"}
        worth = {"ref_logprobs": ref_logprobs.clone(), "scores": scores.detach().clone().float()}
        return cls(queries=rollout.queries, **copies, **worth)


@dataclass(frozen=True)
class Batch(Scored):
    """Everything the losses need: a scored rollout with its advantages and returns, each [B, T]."""

    advantages: Tensor
    returns: Tensor


class RolloutBuffer:
    """Collects scored rollouts until an update is due."""

    def __init__(self) -> None:
        self._parts: list[Scored] = []

    def __len__(self) -> int:
        return sum(map(len, self._parts))

    def add(self, rollout: Rollout, scores: Tensor, ref_logprobs: Tensor) -> None:
        """Adds the rollout of one collect; see `Scored.of`."""
        self._parts.append(Scored.of(rollout, scores, ref_logprobs))

    def stacked(self) -> Scored:
        """Everything collected so far as one scored rollout (if nothing: ValueError); the buffer is unchanged."""
        if not self._parts:
            raise ValueError("the buffer is empty; add a rollout before an update")
        width = max(part.tokens.shape[1] for part in self._parts)
        starts = [sum(len(part.queries) for part in self._parts[:n]) for n in range(len(self._parts))]
        merged: dict[str, Tensor] = {}
        for name in [f.name for f in fields(Scored) if f.name not in ("queries", "owner")]:
            columns = [getattr(part, name) for part in self._parts]
            merged[name] = torch.cat([F.pad(x, (0, width - x.shape[1])) if x.dim() > 1 else x for x in columns])
        owner = torch.cat([part.owner + start for part, start in zip(self._parts, starts, strict=True)])
        return Scored(queries=tuple(q for part in self._parts for q in part.queries), owner=owner, **merged)

    def clear(self) -> None:
        """Forgets everything collected."""
        self._parts = []


def minibatches(batch: Batch, size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
    """Cuts a random permutation of the batch's rows into minibatches; every row is in exactly one of them.

    Args:
        size: rows per minibatch (the last one may be smaller); 0 means the whole batch.
        generator: on the CPU, whatever device the batch is on; makes the order reproducible.
    """
    order = torch.randperm(len(batch), generator=generator, device="cpu")
    for rows in order.split(size or len(batch)):
        yield batch.select(rows)
