"""Decoding in tensors of fixed size equals decoding with a growing cache."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import PreTrainedTokenizerBase

from appo.lm import packed
from appo.lm.decoding import recorded
from appo.lm.decoding.growing import Growing
from appo.lm.decoding.recorded import Fixed, Recordings
from appo.lm.model import CausalLM
from appo.lm.packed import Output
from appo.rollout import Query
from tests.conftest import plain_sampling, policy_of
from tests.test_packed import build

CONTEXTS = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6, 7, 8, 9]]
OWNER = [0, 0, 1, 1, 1, 2]


def decoded(lm: CausalLM, budget: int = 12) -> list[tuple[list[int], Tensor]]:
    """What `choose` saw at each step: the responses that went on, and their logits. They end one after another."""
    seen = []

    def choose(output: Output, alive: Tensor) -> tuple[Tensor, Tensor]:
        order = alive.argsort()
        seen.append((alive[order].tolist(), output.logits[order].clone()))
        return output.logits.argmax(-1), alive * 2 + 3 > len(seen)

    lm.decode(CONTEXTS, choose, budget, OWNER)
    return seen


def always(monkeypatch: pytest.MonkeyPatch) -> list[Fixed]:
    """Decodes in fixed tensors on the CPU too, without a graph; the list collects what was made."""
    made: list[Fixed] = []
    init = Fixed.__init__

    def noted(self: Fixed, begun: Growing, rows: int, length: int, beside: Fixed | None = None) -> None:
        init(self, begun, rows, length, beside)
        made.append(self)

    monkeypatch.setattr(recorded, "looks_familiar", lambda begun: False)
    monkeypatch.setattr(recorded, "_launches_take_longest", lambda begun, budget: True)
    monkeypatch.setattr(Fixed, "__init__", noted)
    return made


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_fixed_equals_growing(name: str, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = policy_of(build(name), tokenizer, plain_sampling(12)).lm
    expected = decoded(lm)
    monkeypatch.setattr(recorded, "BLOCK", 8)
    made = always(monkeypatch)
    for _ in range(2):  # the second time it begins with what the first has left
        found = decoded(lm)
        assert [alive for alive, _ in found] == [alive for alive, _ in expected]
        for (_, ours), (_, theirs) in zip(found, expected, strict=True):
            assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        made[0].cache.layers[0].keys.fill_(float("nan"))
    assert len(made) == 1
    assert made[0].ids.shape == (8, 1)  # six responses, rounded up
    assert made[0].mask.shape[-1] == 24  # 6 tokens read, 12 to come


def test_sampling_draws_the_same_prompts(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(build("llama"), tokenizer, plain_sampling(12))
    queries = [Query((*range(3, 20), *ending)) for ending in ((40, 41), (50,), (60, 61, 62))]
    expected = policy.sample(queries, torch.Generator().manual_seed(0), copies=3)
    always(monkeypatch)
    found = policy.sample(queries, torch.Generator().manual_seed(0), copies=3)
    assert torch.equal(found.tokens, expected.tokens)
    assert_close(found.logprobs, expected.logprobs, rtol=1e-4, atol=1e-4)


def test_contexts_of_one_token_are_decoded_as_before(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = policy_of(build("llama"), tokenizer, plain_sampling(12))
    queries = [Query((5,)), Query((6,))]
    expected = policy.sample(queries, torch.Generator().manual_seed(0), copies=2)
    made = always(monkeypatch)
    assert torch.equal(policy.sample(queries, torch.Generator().manual_seed(0), copies=2).tokens, expected.tokens)
    assert not made


def test_a_recording_is_of_certain_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph reads the memory with which it was recorded, so other weights need another graph."""
    made = always(monkeypatch)
    monkeypatch.setattr(recorded, "KEPT", 4)
    model = build("llama")
    packed.install(model)
    recordings, begun = Recordings(), Growing(model, CONTEXTS, OWNER)

    def taken(budget: int, kind: object = None) -> Growing | Fixed:
        return recordings.take_over(begun, budget, kind)

    first = taken(20)
    assert taken(100) is first  # the same length, rounded up
    assert taken(300) is not first
    assert taken(20, kind="without its adapter") is not first
    weight = next(model.parameters())
    held, weight.data = weight.data, weight.data.clone()
    other = taken(20)
    assert isinstance(first, Fixed) and isinstance(other, Fixed)
    assert other is not first and other.cache is first.cache
    weight.data = held
    assert taken(20) is first
    for budget in (600, 900, 1200, 1500):
        taken(budget)
    assert taken(20) is not first  # not used for longest
    assert len(made) == 9


def test_a_model_that_cannot_be_recorded_is_decoded_as_before(
    tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = policy_of(build("llama"), tokenizer, plain_sampling(12)).lm
    expected = decoded(lm)
    always(monkeypatch)

    def fails(*args: object) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Fixed, "__init__", fails)
    with pytest.warns(UserWarning, match="no CUDA graph of this model's step can be recorded: operation not permitted"):
        found = decoded(lm)
    assert [alive for alive, _ in found] == [alive for alive, _ in expected]
    assert decoded(lm)  # and no second warning


@pytest.mark.parametrize("name", ["mistral", "bloom"])
def test_sliding_windows_and_attention_of_their_own_are_decoded_as_before(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    always(monkeypatch)
    begun = Growing(build(name), CONTEXTS, OWNER)
    assert Recordings().take_over(begun, 100) is begun


def test_nothing_is_recorded_on_a_cpu() -> None:
    begun = Growing(build("gpt2"), CONTEXTS, OWNER)
    assert Recordings().take_over(begun, 100) is begun
