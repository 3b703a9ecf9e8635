"""Responses that begin beside others are what they are alone, and as many are in flight as there is room for."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from appo import policy
from appo.lm.decoding import flight, recorded
from appo.lm.decoding.flight import Waiting
from appo.lm.decoding.growing import Growing
from appo.lm.model import CausalLM
from appo.lm.packed import Output
from appo.rollout import Query, Rollout
from tests.conftest import plain_sampling, policy_of
from tests.test_decoding import always
from tests.test_packed import build

BUDGET = 12
CONTEXTS = [list(range(3 + i, 3 + i + size)) for i, size in enumerate([4, 1, 9, 6, 2, 15, 3, 5, 1, 7])]
ENDS = [1, 12, 3, 2, 2, 9, 5, 12, 2, 4]  # tokens of each response; two are cut off by the budget


def decoded(
    lm: CausalLM, room: int | None, owner: Sequence[int] | None = None
) -> tuple[list[list[int]], list[list[Tensor]], list[int]]:
    """Each response's tokens, the logits from which they were taken, and how many responses each step had."""
    ends = ENDS if owner is None else [ENDS[i % 10] for i in range(len(owner))]
    tokens: list[list[int]] = [[] for _ in ends]
    logits: list[list[Tensor]] = [[] for _ in ends]
    rows = []

    def choose(output: Output, alive: Tensor) -> tuple[Tensor, Tensor]:
        rows.append(len(alive))
        best = output.logits.argmax(-1)
        for i, token, row in zip(alive.tolist(), best.tolist(), output.logits.clone(), strict=True):
            tokens[i].append(token)
            logits[i].append(row)
        limits = [100 if ends[i] == BUDGET else ends[i] for i in alive.tolist()]  # the budget ends two of them
        return best, torch.tensor([len(tokens[i]) < limit for i, limit in zip(alive.tolist(), limits, strict=True)])

    lm.decode(CONTEXTS, choose, BUDGET, owner, room)
    assert [len(response) for response in tokens] == ends
    return tokens, logits, rows


def assert_as_alone(model: PreTrainedModel, tokens: list[list[int]], logits: list[list[Tensor]]) -> None:
    for context, response, found in zip(CONTEXTS, tokens, logits, strict=True):
        row = torch.tensor([[*context, *response[:-1]]])
        with torch.no_grad():
            expected = model(row, use_cache=False).logits[0, len(context) - 1 :]
        assert_close(torch.stack(found), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral", "gemma2", "mixtral", "bloom", "llama4_text"])
@pytest.mark.parametrize(("room", "longest_first"), [(1, False), (60, False), (100, False), (60, True)])
def test_responses_that_join_others_are_as_alone(
    name: str, room: int, longest_first: bool, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    if longest_first:  # so that those that go on are longer than those that join
        monkeypatch.setattr("tests.test_flight.CONTEXTS", sorted(CONTEXTS, key=len, reverse=True))
    model = build(name)
    tokens, logits, rows = decoded(CausalLM(model, tokenizer), room)
    assert_as_alone(model, tokens, logits)
    if room == 1:
        assert rows == [1] * sum(ENDS)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_they_join_in_fixed_tensors_too(
    name: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded, "BLOCK", 8)
    made = always(monkeypatch)
    model = build(name)
    tokens, logits, _ = decoded(CausalLM(model, tokenizer), room=60)
    assert_as_alone(model, tokens, logits)
    assert len(made) > 1


def test_copies_of_a_context_may_begin_at_different_times(tokenizer: PreTrainedTokenizerBase) -> None:
    lm = CausalLM(build("llama"), tokenizer)
    owner = [m for m in range(len(CONTEXTS)) for _ in range(3)]
    tokens, logits, rows = decoded(lm, 100, owner)
    at_once, expected, _ = decoded(lm, None, owner)
    assert tokens == at_once and max(rows) < len(owner)
    for found, those in zip(logits, expected, strict=True):
        assert_close(torch.stack(found), torch.stack(those), rtol=1e-3, atol=1e-4)


def test_where_caches_cannot_be_joined_the_next_ones_wait_for_the_last(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = CausalLM(build("gpt2"), tokenizer)
    expected, _, joined = decoded(lm, 60)
    monkeypatch.setattr(flight, "can_join", lambda cache: False)
    found, _, rows = decoded(lm, 60)
    assert found == expected
    assert len(rows) > len(joined)
    assert all(later <= earlier for earlier, later in itertools.pairwise(rows) if earlier > 1)


@given(
    st.lists(st.integers(1, 50), min_size=1, max_size=8),
    st.integers(0, 5),
    st.integers(1, 40),
    st.integers(1, 300),
    st.integers(1, 9),
)
def test_as_many_fit_as_there_is_room_for(lengths: list[int], going: int, width: int, room: int, at_once: int) -> None:
    budget = 7
    waiting = Waiting([[0] * length for length in lengths], range(len(lengths)), budget, room, going + at_once)
    width = width if going else 0
    count = waiting.fitting(0, going, width)

    def fits(new: int) -> bool:
        widest = max([width, *(length + budget for length in lengths[:new])])
        return new <= min(len(lengths), at_once) and ((going + new) * widest <= room or (going == 0 and new == 1))

    assert count == 0 or fits(count)
    assert not fits(count + 1)
    assert Waiting(waiting.contexts, waiting.owner, budget).fitting(0, going, width) == len(lengths)


def test_padding_in_all_rows_is_dropped_when_others_join(tokenizer: PreTrainedTokenizerBase) -> None:
    """Else a long flight would read ever more of it, and fewer responses would fit."""
    columns = []

    def joined(self: Growing, others: Growing) -> Growing:
        found = join(self, others)
        assert found.mask.any(0).all()
        columns.append(found.mask.shape[1])
        return found

    join = Growing.join
    for name in ("gpt2", "mistral"):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Growing, "join", joined)
            decoded(CausalLM(build(name), tokenizer), 60)
    assert len(columns) > 4 and max(columns) < max(map(len, CONTEXTS)) + BUDGET


def test_positions_stay_within_the_context_in_fixed_tensors(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows whose response has ended run on, and gpt2 has no position beyond its context."""
    monkeypatch.setattr(recorded, "BLOCK", 8)
    always(monkeypatch)
    model = build("gpt2", n_positions=max(map(len, CONTEXTS)) + BUDGET)
    tokens, logits, _ = decoded(CausalLM(model, tokenizer), room=60)
    assert_as_alone(model, tokens, logits)


@pytest.mark.parametrize("greedy", [True, False])
def test_the_agent_writes_the_same_however_many_responses_it_writes_at_a_time(
    greedy: bool, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = policy_of(build("gpt2"), tokenizer, plain_sampling(BUDGET))
    agent.ends.tokens = torch.arange(0, 259, 5)  # many end tokens, so that lengths differ
    queries = [Query(tuple(context)) for context in CONTEXTS]

    def sampled() -> Rollout:
        return agent.sample(queries, torch.Generator().manual_seed(0), copies=2, greedy=greedy)

    at_once = sampled()
    assert len(set(at_once.mask.sum(1).tolist())) > 3
    monkeypatch.setattr(policy, "MOST_AT_ONCE", 3)
    some = sampled()
    for name in ("tokens", "mask", "owner"):
        assert torch.equal(getattr(some, name), getattr(at_once, name))
    assert_close(some.logprobs, at_once.logprobs, rtol=1e-4, atol=1e-4)
    assert_close(some.values, at_once.values, rtol=1e-4, atol=1e-4)
