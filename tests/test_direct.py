"""The written-out decoding step equals the model's own, and is used only if it does."""

from __future__ import annotations

import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from appo.lm import adapter, linear
from appo.lm.decoding import recorded
from appo.lm.decoding.direct import Direct, looks_familiar
from appo.lm.decoding.growing import Growing
from appo.lm.decoding.recorded import Recordings, computes_the_same
from appo.lm.model import CausalLM
from appo.rollout import Query
from tests.conftest import plain_sampling, policy_of, sharpen
from tests.test_packed import SIZES

CONTEXTS = [[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6, 7, 8, 9]]
OWNERS = {"copies": ([0, 0, 1, 1, 1, 2], CONTEXTS), "one query": ([0] * 5, CONTEXTS[:1]), "each": ([0, 1, 2], CONTEXTS)}
KINDS = {
    "llama": {},
    "no groups": {"num_key_value_heads": 4},
    "qwen2": {},  # biases
    "qwen3": {},  # norms of queries and keys
    "scaled positions": {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 100.0}},
}


def build(kind: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    name = kind if kind in ("qwen2", "qwen3", "ministral3", "granite", "gemma", "olmo", "glm4_moe", "gpt2") else "llama"
    config = AutoConfig.for_model(name, **(SIZES | KINDS.get(kind, {}) | changes))
    model = sharpen(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval())
    for parameter in model.parameters():
        if parameter.dim() == 1:  # weights of norms and biases, which begin as 1 and 0
            torch.nn.init.uniform_(parameter.data, 0.5, 1.5)
    return model


@pytest.mark.parametrize("laid_out", [True, False])
@pytest.mark.parametrize("responses", OWNERS)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_steps_equal_the_models_own(kind: str, responses: str, laid_out: bool) -> None:
    owner, contexts = OWNERS[responses]
    model = build(kind)
    begun = Growing(model, contexts, owner)
    assert looks_familiar(begun)
    if laid_out:
        linear.install(model)
        with linear.laid_out(model):
            ours = Direct(begun, budget=9)
    else:
        ours = Direct(begun, budget=9)
    theirs = begun.spread()
    for step in range(9):
        found, expected = ours.step(), theirs.step()
        assert torch.equal(ours.alive, theirs.alive)
        assert_close(found.logits, expected.logits, rtol=1e-5, atol=1e-5)
        assert_close(found.hidden, expected.hidden, rtol=1e-5, atol=1e-5)
        going = (ours.alive + 3) * 2 > step + 1  # the first responses leave first
        for way in (ours, theirs):
            way.feed(expected.logits.argmax(-1), going)


def test_sampling_is_what_the_pass_says(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = policy_of(build("llama"), tokenizer, plain_sampling(12))
    queries = [Query((*range(3, 20), *ending)) for ending in ((40, 41), (50,), (60, 61, 62))]
    for asked in (queries, queries[:1]):
        rollout = policy.sample(asked, torch.Generator().manual_seed(0), copies=4)
        with torch.no_grad():
            again = policy.evaluate(rollout)
        assert_close(again.logprobs.exp(), rollout.logprobs.exp(), rtol=1e-4, atol=0)
        assert_close(again.values, rollout.values)
        with monkeypatch.context() as patch:
            patch.setattr(recorded, "looks_familiar", lambda begun: False)
            plain = policy.sample(asked, torch.Generator().manual_seed(0), copies=4)
        assert torch.equal(plain.tokens, rollout.tokens)


def test_changed_weights_count(tokenizer: PreTrainedTokenizerBase) -> None:
    policy = policy_of(build("llama"), tokenizer, plain_sampling(6))
    queries = [Query((3, 4, 5, 6))]
    for _ in range(2):
        rollout = policy.sample(queries, torch.Generator().manual_seed(0), copies=3)
        with torch.no_grad():
            assert_close(policy.evaluate(rollout).logprobs, rollout.logprobs, rtol=1e-4, atol=1e-5)
            for parameter in policy.model.parameters():
                parameter.mul_(1.1)


def test_an_adapter_counts_unless_it_is_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    pytest.importorskip("peft")
    model = build("llama")
    adapter.add(model, rank=2)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    lm = CausalLM(model, tokenizer)
    seen = []
    for one in (lm, lm.without_adapter(chat=False)):
        chosen: list[int] = []

        def choose(output, alive):  # type: ignore[no-untyped-def]
            chosen.append(int(output.logits[0].argmax()))  # noqa: B023
            return output.logits.argmax(-1), torch.ones_like(alive, dtype=torch.bool)

        one.decode([[3, 4, 5]], choose, budget=8)
        assert isinstance(one._recordings.take_over(Growing(model, [[3, 4, 5]], [0]), 8), Direct)
        ids = [3, 4, 5]
        with one._adapting(), torch.no_grad():
            for _ in range(8):
                ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        assert chosen == ids[3:]
        seen.append(chosen)
    assert seen[0] != seen[1]


LATE = {"llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 16}  # scales queries from there on


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("granite", {"embedding_multiplier": 3.0}),
        ("gemma", {}),
        ("olmo", {}),
        ("glm4_moe", {"first_k_dense_replace": 3}),  # turns half of each head
        ("ministral3", {"sliding_window": None, "rope_parameters": LATE | {"rope_type": "default", "rope_theta": 1e4}}),
    ],
)
def test_a_model_that_only_looks_alike_is_decoded_by_its_own_code(kind: str, changes: dict[str, object]) -> None:
    lookalike = build(kind, **changes)
    begun = Growing(lookalike, CONTEXTS, [0, 1, 2])
    assert looks_familiar(begun)
    assert not computes_the_same(lookalike)
    assert Recordings().take_over(begun, 8) is begun
    assert computes_the_same(build("llama"))


@pytest.mark.parametrize(
    "model",
    [
        lambda: build("gpt2"),
        lambda: build("llama").bfloat16(),
        lambda: build("qwen2", use_sliding_window=True, max_window_layers=1),
    ],
    ids=["other parts", "bfloat16", "sliding window"],
)
def test_other_models_are_not_tried(model) -> None:  # type: ignore[no-untyped-def]
    assert not looks_familiar(Growing(model(), CONTEXTS, [0, 1, 2]))


def test_contexts_of_one_token_and_autocast_are_left_to_the_model() -> None:
    model = build("llama")
    assert not looks_familiar(Growing(model, [[5], [6]], [0, 1]))
    begun = Growing(model, CONTEXTS, [0, 1, 2])
    with torch.autocast("cpu", torch.bfloat16):
        assert not looks_familiar(begun)


def test_a_model_with_hooks_runs_its_own_code() -> None:
    model = build("llama")
    begun = Growing(model, CONTEXTS, OWNERS["copies"][0])
    assert looks_familiar(begun)
    handle = model.get_output_embeddings().register_forward_hook(lambda _module, _inputs, logits: logits + 1)
    assert not looks_familiar(begun)
    handle.remove()
    assert looks_familiar(begun)
    model.base_model.layers[0].mlp.forward = lambda x: x
    assert not looks_familiar(begun)
