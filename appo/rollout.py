"""What the agent was asked, what it wrote, what that was worth, and the minibatches made of it. Needs no model.

Time alignment, stated here for the whole package: index t of logprobs, values, rewards, advantages and returns
refers to response token t, and `values[:, t]` is the value of the state *before* token t is emitted.

Responses are ragged. They are right-padded to a common T only where tensors are needed, and everything outside
`mask` is zero.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence


@dataclass(frozen=True)
class Query:
    """What the agent is given: the token ids of a meta-prompt, at least one."""

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.tokens:
            raise ValueError("a query needs at least one token; the agent's first token is conditioned on it")


def distinct(queries: Sequence[Query]) -> tuple[list[Query], list[int]]:
    """The queries without repetition, in order, and for each of the given ones its place among them."""
    places = {query: m for m, query in enumerate(dict.fromkeys(queries))}
    return list(places), [places[query] for query in queries]


@dataclass(frozen=True)
class Response:
    """One sampled continuation, ragged: tokens [t] (the end-of-sequence token included), logprobs [t], values [t]."""

    tokens: Tensor
    logprobs: Tensor
    values: Tensor


@dataclass(frozen=True)
class Rollout:
    """B responses to B queries, as sampled.

    Attributes:
        queries: one per response; responses to the same query hold equal (mostly the same) objects.
        tokens: [B, T] int64.
        mask: [B, T] bool, True on real tokens.
        logprobs: [B, T], log-probability of each token under the policy that sampled it.
        values: [B, T].
    """

    queries: tuple[Query, ...]
    tokens: Tensor
    mask: Tensor
    logprobs: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        shape = (len(self.queries), self.tokens.shape[-1])
        for name in ("tokens", "mask", "logprobs", "values"):
            found = tuple(getattr(self, name).shape)
            if found != shape:
                raise ValueError(f"{name} has shape {found}; {len(self.queries)} queries and T tokens need {shape}")

    def __len__(self) -> int:
        return len(self.queries)

    @classmethod
    def stack(cls, queries: Sequence[Query], responses: Sequence[Response]) -> Rollout:
        """Right-pads ragged responses to the longest of them."""
        if len(queries) != len(responses) or not responses:
            raise ValueError(f"{len(queries)} queries and {len(responses)} responses; expected as many, and some")
        mask = [torch.ones_like(r.tokens, dtype=torch.bool) for r in responses]
        columns = [[r.tokens for r in responses], mask, [r.logprobs for r in responses], [r.values for r in responses]]
        return cls(tuple(queries), *(pad_sequence(column, batch_first=True) for column in columns))

    def responses(self) -> list[Response]:
        """The ragged responses again, without padding."""
        return [
            Response(self.tokens[i, row], self.logprobs[i, row], self.values[i, row]) for i, row in enumerate(self.mask)
        ]


@dataclass(frozen=True)
class Scored(Rollout):
    """A rollout with ref_logprobs [B, T], what the KL is measured against, and scores [B], one per response."""

    ref_logprobs: Tensor
    scores: Tensor

    @property
    def groups(self) -> Tensor:
        """[B], the same number for responses to the same query."""
        return torch.tensor(distinct(self.queries)[1], device=self.scores.device)


@dataclass(frozen=True)
class Batch(Scored):
    """All that the losses need: a scored rollout with its advantages and returns, each [B, T]."""

    advantages: Tensor
    returns: Tensor

    @classmethod
    def of(cls, scored: Scored, advantages: Tensor, returns: Tensor) -> Batch:
        """The scored rollout with these advantages and returns."""
        given = {f.name: getattr(scored, f.name) for f in fields(Scored)}
        return cls(**given, advantages=advantages, returns=returns)

    def select(self, rows: Tensor) -> Batch:
        """The given rows, cut to the longest response among them."""
        width = max(int(self.mask[rows].sum(1).max()), 1)
        tensors = {f.name: getattr(self, f.name)[rows] for f in fields(self) if f.name != "queries"}
        cut = {name: value[:, :width] if value.dim() > 1 else value for name, value in tensors.items()}
        return replace(self, queries=tuple(self.queries[i] for i in rows.tolist()), **cut)

    def split(self, size: int) -> Iterator[Batch]:
        """Consecutive parts of at most `size` rows; 0 means all of it."""
        for rows in torch.arange(len(self), device="cpu").split(size or len(self)):
            yield self.select(rows)


class RolloutBuffer:
    """Collects scored rollouts until an update is due."""

    def __init__(self) -> None:
        self._queries: list[Query] = []
        self._responses: list[Response] = []
        self._ref_logprobs: list[Tensor] = []
        self._scores: list[Tensor] = []

    def __len__(self) -> int:
        return len(self._responses)

    def add(self, rollout: Rollout, scores: Tensor, ref_logprobs: Tensor) -> None:
        """Takes in one collect; nothing of the caller's is kept by reference or changed.

        Args:
            rollout: B responses.
            scores: [B], the reward of each whole response.
            ref_logprobs: [B, T], what the KL penalty is measured against.

        Raises:
            ValueError: shapes that do not fit the rollout, or a score that is not finite.
        """
        if scores.shape != (len(rollout),):
            raise ValueError(f"scores has shape {tuple(scores.shape)}; {len(rollout)} responses need [{len(rollout)}]")
        if ref_logprobs.shape != rollout.tokens.shape:
            raise ValueError(
                f"ref_logprobs has shape {tuple(ref_logprobs.shape)}; the rollout's is {tuple(rollout.tokens.shape)}"
            )
        if not scores.isfinite().all():
            bad = int((~scores.isfinite()).nonzero()[0])
            raise ValueError(f"the reward of response {bad} is {scores[bad].item()}; rewards must be finite")
        self._queries += rollout.queries
        self._responses += rollout.responses()
        self._ref_logprobs += [ref[row].clone() for ref, row in zip(ref_logprobs, rollout.mask, strict=True)]
        self._scores.append(scores.detach().clone().float())

    def stacked(self) -> Scored:
        """Everything collected so far as one scored rollout; the buffer itself is unchanged."""
        if not self._responses:
            raise ValueError("the buffer is empty; add a rollout before an update")
        rollout = Rollout.stack(self._queries, self._responses)
        tensors = (rollout.tokens, rollout.mask, rollout.logprobs, rollout.values)
        ref_logprobs = pad_sequence(self._ref_logprobs, batch_first=True)
        return Scored(rollout.queries, *tensors, ref_logprobs, torch.cat(self._scores))

    def clear(self) -> None:
        """Forgets everything collected."""
        self.__init__()  # type: ignore[misc]


def minibatches(batch: Batch, size: int, generator: torch.Generator | None = None) -> Iterator[Batch]:
    """Cuts a random permutation of the batch's rows into minibatches; every row is in exactly one of them.

    Args:
        size: rows per minibatch, the last one may be smaller; 0 means the whole batch.
        generator: on the CPU, whatever device the batch is on; makes the order reproducible.
    """
    order = torch.randperm(len(batch), generator=generator, device="cpu")
    for rows in order.split(size or len(batch)):
        yield batch.select(rows)
