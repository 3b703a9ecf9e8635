"""Packed passes against plain ones: every sequence alone, with transformers' own attention."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.testing import assert_close
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from appo.lm import attention, packed, trial
from appo.lm.attention import NAME, Branches
from appo.lm.decoding import recorded
from appo.lm.decoding.cache import RoomyLayer, new_cache, surviving_rows
from appo.lm.model import CausalLM
from appo.lm.packed import Output
from appo.lm.trial import UnsupportedModelError
from appo.rollout import Batch, Query, Scored
from appo.trainer import APPOTrainer
from experiments.bench.plain import as_plain, plain_loss, plain_sample, plain_scores
from rewards.local import LocalTarget
from tests.conftest import byte_tokenizer, logits_of, plain_sampling, policy_of, sharpen, target_of

VOCABULARY = 259  # of the byte tokenizer
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}
GPT2 = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256}
SOFTCAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 8}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
PACKING = {
    "llama": {},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    "gemma2": {"sliding_window": 8} | SOFTCAPS,
    "gpt2": GPT2,
    "mistral": {"sliding_window": 8},
    "mixtral": EXPERTS,
}
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "num_hidden_layers": 3, "dropout": 0.5}  # its layers call dropout
PLAIN = {  # attention of their own, convolutions over neighbours, attention sinks, windows that only the mask knows
    "bloom": {"n_layer": 3, "n_head": 4},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"], "block_multiple_of": 8},
    "gpt_oss": EXPERTS | {"sliding_window": 8},
    "phimoe": EXPERTS | {"sliding_window": 12},
    "llama4_text": EXPERTS | {"attention_chunk_size": 12, "no_rope_layers": [1, 0, 1]},
}
RECURRENT = {  # two read the padding too, one does not take the cache
    "rwkv": {"attention_hidden_size": 32},
    "mamba": {"state_size": 8},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 16, "block_types": ("recurrent", "attention")},
}
IDS = st.lists(st.integers(0, VOCABULARY - 1), max_size=20)
SCORED = ["The film", "a much longer input , of many words", "x"]
TEMPLATE, WORDS = "{prompt} Input : {input} Output : ", ("y", "n", "m")


def build(name: str, **changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **(SIZES | (PACKING | PLAIN | RECURRENT | {"opt": OPT})[name] | changes))
    # Eager attention is the model's definition; older versions of transformers' SDPA leave the soft cap out.
    return sharpen(AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval())


def alone(model: PreTrainedModel, batch: Branches) -> Tensor:
    """[n, V]: each branch behind its prefix, in a pass of its own."""
    rows = [
        model(torch.tensor([[*batch.prefixes[m], *branch]])).logits[0, -len(branch) :]
        for m, branch in zip(batch.owner, batch.branches, strict=True)
    ]
    return torch.cat(rows)


def random_branches(prefixes: Sequence[int], branches: Sequence[tuple[int, int]]) -> Branches:
    """Prefixes of these lengths; branches of (owner, length)."""
    generator = torch.Generator().manual_seed(1)

    def ids(length: int) -> list[int]:
        return torch.randint(0, VOCABULARY, (length,), generator=generator).tolist()

    return Branches(list(map(ids, prefixes)), [ids(length) for _, length in branches], [owner for owner, _ in branches])


BATCH = random_branches([11, 1, 0, 20, 3], [(0, 9), (0, 1), (1, 14), (2, 5), (2, 1), (3, 12), (3, 12), (0, 4)])


@pytest.mark.parametrize("block_keys", [1, 40, 10_000])
@pytest.mark.parametrize("name", PACKING)
def test_packed_equals_every_sequence_alone(name: str, block_keys: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    expected = alone(copy.deepcopy(model), BATCH)
    monkeypatch.setattr(attention, "BLOCK_KEYS", block_keys)
    assert packed.install(model)
    assert_close(packed.run(model, BATCH).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PACKING)
def test_an_ordinary_pass_is_as_it_was(name: str) -> None:
    model = build(name)
    pristine = copy.deepcopy(model)
    assert packed.install(model)
    ids = torch.tensor([BATCH.prefixes[3], BATCH.prefixes[3]])
    mask = torch.ones_like(ids).index_fill(1, torch.arange(4), 0)
    for attention_mask in (None, mask):
        logits, expected = (m(ids, attention_mask=attention_mask).logits[:, 4:] for m in (model, pristine))
        assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PLAIN)
def test_models_that_cannot_be_packed_are_left_as_they_are(name: str) -> None:
    model = build(name)
    before = model.config._attn_implementation
    expected = alone(model, BATCH)
    assert not packed.install(model)
    assert model.config._attn_implementation == before
    assert_close(packed.run(model, BATCH).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("argument", attention.UNKNOWN)
def test_attention_of_another_kind_is_left_as_it_is(argument: str) -> None:
    # What gpt-oss (sinks) and models with sparse attention tell the function; a short trial may hide what it changes.
    model = build("llama")
    before = model.config._attn_implementation
    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(
            lambda _layer, args, kwargs: (args, kwargs | {argument: torch.zeros(1)}), with_kwargs=True
        )
    assert not packed.install(model)
    assert model.config._attn_implementation == before


def test_a_model_whose_layers_fail_in_a_packed_pass_runs_padded_rows() -> None:
    model = build("llama")
    expected = alone(model, BATCH)

    def fail(_layer: torch.nn.Module, _args: Any, kwargs: dict[str, Any]) -> None:
        if "layout" in kwargs:
            raise TypeError("unexpected keyword argument 'layout'")

    model.model.layers[0].register_forward_pre_hook(fail, with_kwargs=True)
    assert not packed.install(model)
    assert_close(packed.run(model, BATCH).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["rwkv", "recurrent_gemma"])
def test_a_model_that_reads_padding_is_refused(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    with pytest.raises(UnsupportedModelError, match=f"'{name}' cannot run several texts at a time: in padded rows"):
        CausalLM(build(name), tokenizer)


def test_a_model_that_does_not_take_the_cache_is_refused_when_it_is_to_decode(
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    lm = CausalLM(build("mamba"), tokenizer)
    assert_close(lm.run(BATCH).logits, alone(lm.model, BATCH), rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedModelError, match="'mamba' cannot run several texts at a time: token by token"):
        lm.decode([[1, 2]], lambda output, alive: (alive, alive > 0), budget=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PLAIN)
def test_models_of_padded_rows_pass_their_trials(name: str, dtype: torch.dtype) -> None:
    model = build(name).to(dtype)
    trial.check_padding(model)
    trial.check_decoding(model)


def test_a_model_of_few_tokens_is_tried_with_those_that_it_has() -> None:
    model = build("llama", vocab_size=3)
    batch = Branches([[1, 0]], [[2, 2], [0]], [0, 0])
    expected = alone(model, batch)
    assert packed.install(model)
    assert recorded.computes_the_same(model)
    assert_close(packed.run(model, batch).logits, expected, rtol=1e-4, atol=1e-4)


@settings(max_examples=30, deadline=None)
@given(prefixes=st.lists(IDS, min_size=1, max_size=4), data=st.data())
def test_packed_equals_padded_for_any_lengths(prefixes: list[list[int]], data: st.DataObject) -> None:
    model = build("llama")
    count = data.draw(st.integers(1, 6))
    branches = [data.draw(IDS.filter(len)) for _ in range(count)]
    owner = data.draw(st.lists(st.integers(0, len(prefixes) - 1), min_size=count, max_size=count))
    keep = [data.draw(st.integers(1, len(branch))) for branch in branches]
    batch = Branches(prefixes, branches, owner)
    expected = packed.run(model, batch, keep)
    assert packed.install(model)
    found = packed.run(model, batch, keep)
    assert_close(found.logits, expected.logits, rtol=1e-4, atol=1e-4)
    assert_close(found.hidden, expected.hidden, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_no_branch_depends_on_another(name: str) -> None:
    model = build(name)
    assert packed.install(model)
    whole = packed.run(model, BATCH).logits
    rest = Branches(BATCH.prefixes, BATCH.branches[2:], BATCH.owner[2:])
    assert_close(packed.run(model, rest).logits, whole[10:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", PACKING)
def test_gradients_equal_those_of_every_sequence_alone(name: str) -> None:
    model = build(name)
    pristine = copy.deepcopy(model)
    assert packed.install(model)
    weight = torch.linspace(-1, 1, VOCABULARY)
    for m, logits in ((model, packed.run(model, BATCH).logits), (pristine, alone(pristine, BATCH))):
        m.zero_grad()
        (logits.log_softmax(-1) @ weight).mean().backward()
    for (which, ours), theirs in zip(model.named_parameters(), pristine.parameters(), strict=True):
        if theirs.grad is not None:
            scale = theirs.grad.abs().max().item()
            assert ours.grad is not None, which
            assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5 * scale + 1e-9, msg=which)


def test_a_saved_model_knows_nothing_of_ours(tmp_path: Path) -> None:
    model = build("llama")
    assert packed.install(model)
    model.save_pretrained(tmp_path)
    assert NAME not in (tmp_path / "config.json").read_text(encoding="utf-8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert not packed.is_installed(again)
    assert_close(alone(again, BATCH), packed.run(model, BATCH).logits, rtol=1e-4, atol=1e-4)


# -- the head ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gemma2", "bloom"])
def test_the_head_reads_one_block(name: str) -> None:
    """In bfloat16 torch multiplies a slice of the states row by row, and copies the head's weights for each row."""
    model, whole = build(name), []
    packed.install(model)
    model.get_output_embeddings().register_forward_hook(lambda _, args, __: whole.append(args[0].is_contiguous()))
    packed.run(model, BATCH, [1] * len(BATCH.branches))
    packed.call(model, input_ids=torch.ones(3, 4, dtype=torch.long), logits_to_keep=1)
    assert whole == [True, True]


def test_reading_contexts_makes_no_logits(tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recorded, "looks_familiar", lambda begun: False)
    lm, seen = target_of(build("llama"), tokenizer, TEMPLATE, WORDS).lm, []
    lm.model.get_output_embeddings().register_forward_hook(lambda _, args, __: seen.append(args[0].shape[:2]))

    def choose(output: Output, alive: Tensor) -> tuple[Tensor, Tensor]:
        return output.logits.argmax(-1), torch.ones(len(alive), dtype=torch.bool)

    lm.decode([[1, 2, 3, 4], [1, 2, 5], [1, 2, 3, 6, 7]], choose, budget=2)
    assert seen == [(3, 1), (3, 1)]


# -- the cache ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "qwen2", "gpt2"])
def test_one_token_after_another_equals_all_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RoomyLayer, "ROOM", 3)  # so small that the cache has to grow
    model = build(name)
    ids = torch.tensor([row[:12] for row in (BATCH.prefixes[3], BATCH.branches[5], BATCH.branches[2])])
    expected = model(ids).logits
    cache, rows = new_cache(model), torch.arange(3)
    # One of three rows leaves, the other two change places, one is copied, and one goes on alone.
    changes = {t: torch.tensor(new) for t, new in ((6, [0, 2]), (8, [1, 0]), (10, [1, 0, 1]), (11, [2]))}
    model(ids[:, :4], past_key_values=cache, use_cache=True)
    for t in range(4, 12):
        if t in changes:
            rows = rows[changes[t]]
            cache.reorder_cache(changes[t])
        logits = model(ids[rows, t : t + 1], past_key_values=cache, use_cache=True).logits[:, 0]
        assert_close(logits, expected[rows, t], rtol=1e-4, atol=1e-4)


@given(st.lists(st.booleans(), min_size=1, max_size=12))
def test_closing_up_keeps_those_who_go_on_and_moves_few(going: list[bool]) -> None:
    rows = surviving_rows(torch.tensor(going)).tolist()
    assert sorted(rows) == [row for row, goes in enumerate(going) if goes]
    assert sum(row != place for place, row in enumerate(rows)) <= going.count(False)


@pytest.mark.parametrize("name", [*PACKING, *PLAIN])
def test_sampled_logprobs_equal_the_evaluated_ones(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    policy = policy_of(build(name), tokenizer, plain_sampling(12))
    beginning = tuple(range(3, 30))  # shared by all queries, and longer than the sliding windows
    queries = [Query((*beginning, *ending)) for ending in ((40, 41), (50,), (60, 61, 62, 63, 64))]
    rollout = policy.sample(queries, torch.Generator().manual_seed(0), copies=2)
    with torch.no_grad():
        found = policy.evaluate(rollout)
    assert_close(found.logprobs, rollout.logprobs, rtol=0, atol=1e-4)
    assert rollout.logprobs[rollout.mask].std() > 0.1


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_mixture_that_is_to_report_its_router_runs_like_any_other(
    name: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    found = []
    for report in (False, True):
        policy = policy_of(build(name, output_router_logits=report), tokenizer, plain_sampling(6))
        queries = [Query((3, 4, 5)), Query((6,))]
        rollout = policy.sample(queries, torch.Generator().manual_seed(0), copies=2)
        found.append(policy.evaluate(rollout).logprobs)
    assert_close(*found, rtol=0, atol=0)


# -- what is built on it, against the plain way ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", PACKING)
def test_scores_equal_the_plain_ones(name: str, dtype: torch.dtype) -> None:
    def target() -> LocalTarget:
        return target_of(build(name, dtype=dtype).to(dtype), byte_tokenizer(), TEMPLATE, WORDS)

    plain = target()
    as_plain(plain.lm)
    prompts = ["Say y.", "", "A longer prompt , of some words."]
    expected = plain_scores(plain, prompts, SCORED, 4).log_softmax(-1)
    found = logits_of(target(), prompts, SCORED).log_softmax(-1)
    if dtype == torch.float32:
        assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:  # the best class is the same, except where two classes are nearly equal
        assert_close(found, expected, rtol=0.1, atol=0.1)
        best = expected.topk(2).values
        clear = best[..., 0] - best[..., 1] > 0.1
        assert clear.any()
        assert torch.equal(found.argmax(-1)[clear], expected.argmax(-1)[clear])


def trainer(name: str, tokenizer: PreTrainedTokenizerBase, **options: bool) -> APPOTrainer:
    return APPOTrainer(policy_of(build(name), tokenizer, plain_sampling(12), **options))


def minibatch(trainer: APPOTrainer, responses: int) -> Batch:
    query = Query(tuple(range(3, 40)))
    rollout = plain_sample(trainer.policy, query, responses, 12)
    advantages = torch.linspace(-1, 1, rollout.mask.numel()).view(rollout.mask.shape)
    scored = Scored.of(rollout, advantages[:, 0], rollout.logprobs)
    return Batch(*vars(scored).values(), advantages, advantages + 1)


def our_loss(trainer: APPOTrainer, batch: Batch) -> tuple[Tensor, Any]:
    return trainer.updater.loss(batch)


def gradients(trainer: APPOTrainer, loss: Callable[[APPOTrainer, Batch], tuple[Tensor, Any]], batch: Batch) -> Tensor:
    trainer.updater.optimizer.zero_grad()
    loss(trainer, batch)[0].backward()
    return torch.cat([p.grad.flatten() for p in trainer.policy.parameters() if p.grad is not None])


@pytest.mark.parametrize("name", PACKING)
def test_gradients_of_an_update_equal_the_plain_ones(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    plain, ours = trainer(name, tokenizer), trainer(name, tokenizer)
    as_plain(plain.policy.lm)
    batch = minibatch(plain, 3)
    expected = gradients(plain, plain_loss, batch)
    assert expected.abs().max() > 0
    assert_close(gradients(ours, our_loss, batch), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
def test_checkpointing_changes_no_gradient(name: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Nor does it turn on the dropout that OPT's layers call themselves."""
    kept, recomputed = trainer(name, tokenizer), trainer(name, tokenizer, gradient_checkpointing=True)
    passes = []
    parts = [m for m in recomputed.policy.model.modules() if type(m).__name__ in ("LlamaMLP", "GPT2MLP")]
    layer = parts[0] if parts else recomputed.policy.model.model.decoder.layers[0].fc1
    layer.register_forward_pre_hook(lambda *_: passes.append(1))
    batch = minibatch(kept, 2)
    expected, found = (gradients(t, our_loss, batch) for t in (kept, recomputed))
    assert_close(found, expected)
    assert len(passes) == 2  # in the forward pass, and again in the backward pass
    assert not any(module.training for module in recomputed.policy.model.modules())
