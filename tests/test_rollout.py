"""Ragged responses, the buffer, and minibatches; no model anywhere."""

from __future__ import annotations

import math

import pytest
import torch
from torch.testing import assert_close

from appo.rollout import Batch, Query, Response, Rollout, RolloutBuffer, minibatches
from tests.conftest import stack

QUERY = Query((1, 2))


def responses(*lengths: int, seed: int = 0) -> list[Response]:
    generator = torch.Generator().manual_seed(seed)
    return [
        Response(
            torch.randint(3, 9, (n,), generator=generator),
            torch.randn(n, generator=generator),
            torch.randn(n, generator=generator),
        )
        for n in lengths
    ]


def rollout(*lengths: int, seed: int = 0) -> Rollout:
    return stack([QUERY], [0] * len(lengths), responses(*lengths, seed=seed))


def finished(*lengths: int) -> Batch:
    buffer = RolloutBuffer()
    given = rollout(*lengths)
    buffer.add(given, torch.arange(len(lengths)).float(), torch.zeros_like(given.logprobs))
    return Batch(*vars(buffer.stacked()).values(), given.logprobs + given.values, given.values)


def test_empty_query_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one token"):
        Query(())


def test_wrong_shape_is_refused_by_name() -> None:
    good = rollout(2, 3)
    with pytest.raises(ValueError, match="logprobs has shape"):
        Rollout(good.queries, good.owner, good.tokens, good.mask, good.logprobs[:, :2], good.values)


def test_padded_responses_come_apart_again() -> None:
    ragged = responses(3, 1, 2)
    stacked = stack([QUERY], [0, 0, 0], ragged)
    assert stacked.mask.tolist() == [[True, True, True], [True, False, False], [True, True, False]]
    assert [r.tokens.tolist() for r in stacked.responses()] == [r.tokens.tolist() for r in ragged]


@pytest.mark.parametrize("size", [0, 1, 2, 3, 7])
def test_minibatches_partition_the_rows(size: int) -> None:
    batch = finished(3, 1, 2, 5, 4)
    parts = list(minibatches(batch, size, torch.Generator().manual_seed(0)))
    assert [len(part) for part in parts] == {0: [5], 1: [1] * 5, 2: [2, 2, 1], 3: [3, 2], 7: [5]}[size]
    found = sorted(row[mask].tolist() for part in parts for row, mask in zip(part.advantages, part.mask, strict=True))
    assert found == sorted(row[mask].tolist() for row, mask in zip(batch.advantages, batch.mask, strict=True))


def test_minibatches_follow_the_seed() -> None:
    batch = finished(*range(1, 9))
    orders = [
        [int(part.mask.sum()) for part in minibatches(batch, 1, torch.Generator().manual_seed(seed))]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]
    assert orders[0] != sorted(orders[0])


def test_a_selection_is_cut_to_its_longest_response() -> None:
    assert finished(5, 1, 2).select(torch.tensor([1, 2])).tokens.shape == (2, 2)


def test_several_collects_are_as_one() -> None:
    whole, parts = RolloutBuffer(), RolloutBuffer()
    first, second = responses(3, 1), responses(6, seed=1)
    scores = torch.tensor([1.0, 2.0, 3.0])
    everything = stack([QUERY], [0, 0, 0], [*first, *second])
    whole.add(everything, scores, torch.zeros_like(everything.logprobs))
    for ragged, part in ((first, scores[:2]), (second, scores[2:])):
        piece = stack([QUERY], [0] * len(ragged), ragged)
        parts.add(piece, part, torch.zeros_like(piece.logprobs))
    for name in ("tokens", "mask", "logprobs", "values", "ref_logprobs", "scores"):
        assert_close(getattr(parts.stacked(), name), getattr(whole.stacked(), name), rtol=0, atol=0)


def asked(rollout: Rollout) -> list[Query]:
    """The query of each response."""
    return [rollout.queries[m] for m in rollout.owner.tolist()]


def test_responses_to_the_same_query_of_a_collect_are_a_group() -> None:
    first = stack([QUERY, Query((3,))], [0, 1, 0], responses(1, 1, 1))
    second = stack([Query((4,)), QUERY], [0, 1], responses(2, 2))
    buffer = RolloutBuffer()
    for given in (first, second):
        buffer.add(given, torch.zeros(len(given)), given.logprobs)
    stacked = buffer.stacked()
    assert stacked.owner.tolist() == [0, 1, 0, 2, 3]
    assert asked(stacked) == [*asked(first), *asked(second)]


def test_a_selection_holds_the_queries_of_its_rows_and_no_others() -> None:
    given = stack([Query((n,)) for n in range(4)], [0, 3, 1, 3], responses(1, 2, 3, 4))
    picked = given.select(torch.tensor([3, 0, 1]))
    assert picked.queries == (Query((0,)), Query((3,)))
    assert asked(picked) == [Query((3,)), Query((0,)), Query((3,))]
    assert [r.tokens.tolist() for r in picked.responses()] == [given.responses()[i].tokens.tolist() for i in (3, 0, 1)]


def test_the_buffer_keeps_copies() -> None:
    given, scores = rollout(2), torch.tensor([1.0])
    ref = torch.zeros_like(given.logprobs)
    buffer = RolloutBuffer()
    buffer.add(given, scores, ref)
    before = buffer.stacked()
    scores += 100
    ref += 100
    given.values.add_(100)
    given.logprobs.add_(100)
    for name in ("logprobs", "values", "ref_logprobs", "scores"):
        assert_close(getattr(buffer.stacked(), name), getattr(before, name), rtol=0, atol=0)


def test_a_reward_that_is_not_finite_is_refused_by_number() -> None:
    given = rollout(2, 2)
    with pytest.raises(ValueError, match="response 1 is nan"):
        RolloutBuffer().add(given, torch.tensor([0.0, math.nan]), torch.zeros_like(given.logprobs))


@pytest.mark.parametrize(("scores", "width"), [(1, 2), (2, 3)])
def test_shapes_that_do_not_fit_the_rollout_are_refused(scores: int, width: int) -> None:
    with pytest.raises(ValueError, match="shape"):
        RolloutBuffer().add(rollout(2, 2), torch.zeros(scores), torch.zeros(2, width))


def test_an_empty_buffer_has_nothing_to_stack() -> None:
    buffer = RolloutBuffer()
    given = rollout(2)
    buffer.add(given, torch.zeros(1), torch.zeros_like(given.logprobs))
    assert len(buffer) == 1
    buffer.clear()
    with pytest.raises(ValueError, match="empty"):
        buffer.stacked()
