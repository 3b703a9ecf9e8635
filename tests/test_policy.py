"""The policy: evaluation gives the log-probabilities of sampling, whatever else is in the batch."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tokenizers import processors
from torch.testing import assert_close
from transformers import OPTConfig, OPTForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from appo.lm import packed
from appo.lm.ends import clean
from appo.lm.model import ContextTooLongError
from appo.policy import Policy
from appo.rollout import Query, Rollout
from tests.conftest import SPECIAL_IDS, plain_sampling, policy_of

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% if not (loop.last and continue_final_message) %}<|end|>{% endif %}{% endfor %}"
)


def make(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    temperature: float = 1.0,
    length: int = 9,
    compute_dtype: torch.dtype = torch.float32,
) -> Policy:
    with torch.no_grad():  # make endings likely, so that responses are ragged
        model.get_output_embeddings().weight[tokenizer.eos_token_id] *= 4
    return policy_of(model, tokenizer, plain_sampling(length, temperature), compute_dtype=compute_dtype)


def ragged_queries(policy: Policy) -> list[Query]:
    return [policy.query("", text) for text in ("a", "a rather longer query", "middling")]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ragged(policy: Policy, seed: int = 0, copies: int = 3) -> Rollout:
    return policy.sample(ragged_queries(policy), seeded(seed), copies)


def plain_logprobs(policy: Policy, rollout: Rollout, row: int) -> torch.Tensor:
    """One row alone, by one plain forward pass: no padding, no cache."""
    query, response = rollout.queries[int(rollout.owner[row])].tokens, rollout.responses()[row].tokens
    ids = torch.tensor([[*query, *response.tolist()]])
    logits = policy.model(ids).logits[0] / policy.sampling.temperature
    return logits.log_softmax(-1)[len(query) - 1 : -1].gather(1, response.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_recomputed_logprobs_equal_the_sampled_ones(tiny_lm, tokenizer, temperature: float) -> None:
    policy = make(tiny_lm, tokenizer, temperature)
    rollout = ragged(policy)
    with torch.no_grad():
        assert_close(policy.evaluate(rollout).logprobs, rollout.logprobs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_logprobs_equal_a_plain_forward_of_each_row_alone(tiny_lm, tokenizer, temperature: float) -> None:
    policy = make(tiny_lm, tokenizer, temperature)
    rollout = ragged(policy)
    with torch.no_grad():
        logprobs = policy.evaluate(rollout).logprobs
        for row in range(len(rollout)):
            expected = plain_logprobs(policy, rollout, row)
            assert_close(logprobs[row, : len(expected)], expected, rtol=0, atol=1e-5)
    assert (logprobs[~rollout.mask] == 0).all()


def test_copies_stand_side_by_side_and_queries_once(tiny_llama, tokenizer) -> None:
    policy = make(tiny_llama, tokenizer)
    rollout = ragged(policy, copies=2)
    assert rollout.queries == tuple(ragged_queries(policy))
    assert rollout.owner.tolist() == [0, 0, 1, 1, 2, 2]


def test_greedy_takes_the_likeliest_token(tiny_llama, tokenizer) -> None:
    policy = make(tiny_llama, tokenizer)
    (query, *_) = ragged_queries(policy)
    found = policy.sample([query], greedy=True)
    for response in found.responses():
        ids = torch.tensor([[*query.tokens, *response.tokens.tolist()]])
        logits = tiny_llama(ids).logits[0, len(query.tokens) - 1 : -1]
        assert torch.equal(logits.argmax(-1), response.tokens)
    assert torch.equal(policy.sample([query], seeded(), greedy=True).tokens, found.tokens)


def test_the_common_beginning_of_all_queries_is_run_once(tiny_lm, tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    policy = make(tiny_lm, tokenizer)
    queries = [policy.query("A beginning that all have.", text) for text in ("a", "of different length")]
    passes, call = [], packed.call

    def counted(model: PreTrainedModel, **inputs: Any) -> packed.Output:
        passes.append(tuple(inputs["input_ids"].shape))
        return call(model, **inputs)

    monkeypatch.setattr(packed, "call", counted)
    rollout = policy.sample(queries, seeded(), copies=3)
    assert passes[:2] == [(1, 27), (2, 18)]  # the beginning, both endings without their last token
    monkeypatch.undo()
    with torch.no_grad():
        for row, response in enumerate(rollout.responses()):
            assert_close(response.logprobs, plain_logprobs(policy, rollout, row), rtol=0, atol=1e-5)


def test_gradient_through_the_shared_query_is_that_of_plain_forwards(tiny_lm, tokenizer) -> None:
    policy = make(tiny_lm, tokenizer)
    rollout = ragged(policy)
    parameters = list(policy.model.parameters())
    fast = torch.autograd.grad(policy.evaluate(rollout).logprobs.sum(), parameters)
    slow = torch.autograd.grad(sum(plain_logprobs(policy, rollout, i).sum() for i in range(len(rollout))), parameters)
    for mine, theirs in zip(fast, slow, strict=True):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_responses_end_with_the_end_of_sequence_or_at_the_limit(tiny_llama, tokenizer) -> None:
    policy = make(tiny_llama, tokenizer)
    responses = policy.sample([policy.query("", "x")], seeded(), copies=64).responses()
    ended = [r for r in responses if r.tokens[-1] == tokenizer.eos_token_id]
    assert 0 < len(ended) < 64
    assert all((r.tokens[:-1] != tokenizer.eos_token_id).all() for r in responses)
    assert all(len(r.tokens) == 9 for r in responses if r.tokens[-1] != tokenizer.eos_token_id)


def test_a_pad_token_that_is_the_end_of_sequence_token_changes_nothing(tiny_llama, tokenizer) -> None:
    policy = make(tiny_llama, tokenizer)
    expected = ragged(policy, copies=24)
    tokenizer.pad_token = tokenizer.eos_token
    found = ragged(policy, copies=24)
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.mask, expected.mask)
    last = [r.tokens[-1] for r in found.responses()]
    assert tokenizer.eos_token_id in last  # it counts as a token of the response


def test_generation_config_does_not_leak_in(tiny_llama, tokenizer) -> None:
    policy = make(tiny_llama, tokenizer)
    before = ragged(policy)
    tiny_llama.generation_config.update(do_sample=True, temperature=0.1, top_k=1, max_new_tokens=2)
    assert_close(ragged(policy).tokens, before.tokens, rtol=0, atol=0)


def test_sampling_follows_the_generator(tiny_llama, tokenizer) -> None:
    policy = make(tiny_llama, tokenizer)
    one, same, other = (ragged(policy, seed) for seed in (0, 0, 1))
    assert torch.equal(one.tokens, same.tokens)
    assert not torch.equal(one.tokens, other.tokens)


def test_tokens_are_drawn_with_their_probabilities(tiny_llama, tokenizer) -> None:
    policy = policy_of(tiny_llama, tokenizer, plain_sampling(1, 0.02))
    query, draws = policy.query("One", "two"), 20_000
    tokens = policy.sample([query], seeded(), copies=draws).tokens[:, 0]
    drawn = torch.bincount(tokens, minlength=tiny_llama.vocab_size)
    logits = tiny_llama(torch.tensor([query.tokens])).logits[0, -1]
    expected = draws * (logits / 0.02).softmax(-1)
    assert 0.4 < expected.max() / draws < 0.6  # near-equal probabilities would hide an error
    often = expected > 10
    freedom = int(often.sum())
    chi_squared = ((drawn - expected) ** 2 / expected)[often].sum().item()
    assert abs(chi_squared - freedom) < 4 * (2 * freedom) ** 0.5  # its mean and standard deviation


def test_value_head_starts_at_zero_and_learns(tiny_llama, tokenizer) -> None:
    policy = make(tiny_llama, tokenizer)
    rollout = ragged(policy)
    assert (rollout.values == 0).all()
    policy.evaluate(rollout).values.sum().backward()
    assert policy.value_head.weight.grad.abs().sum() > 0


def test_gradients_reach_the_language_model(tiny_llama, tokenizer) -> None:
    policy = make(tiny_llama, tokenizer)
    policy.evaluate(ragged(policy)).logprobs.sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in policy.model.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("column", ["logprobs", "values"])
def test_tied_weights_get_an_ordinary_gradient_of_any_loss(column, dtype, tiny_gpt2, tokenizer) -> None:
    policy = make(tiny_gpt2, tokenizer, compute_dtype=dtype)
    torch.nn.init.normal_(policy.value_head.weight)
    rollout = ragged(policy)
    getattr(policy.evaluate(rollout), column).sum().backward()
    found = tiny_gpt2.get_input_embeddings().weight.grad
    assert found.layout is torch.strided and found.abs().sum() > 0


def test_entropy_and_its_gradient_are_those_of_plain_forwards(tiny_llama, tokenizer) -> None:
    policy = make(tiny_llama, tokenizer, temperature=0.7)
    rollout = ragged(policy)
    entropy, parameters = policy.evaluate(rollout).entropy, list(policy.model.parameters())
    plain = []
    for query, response in zip(rollout.owner.tolist(), rollout.responses(), strict=True):
        ids = torch.tensor([[*rollout.queries[query].tokens, *response.tokens.tolist()]])
        logits = tiny_llama(ids).logits[0, -1 - len(response.tokens) : -1] / 0.7
        plain.append(torch.distributions.Categorical(logits=logits).entropy())
    assert_close(entropy[rollout.mask], torch.cat(plain), rtol=0, atol=1e-5)
    assert (entropy[rollout.mask] > 0).all() and (entropy[~rollout.mask] == 0).all()
    assert (entropy <= torch.tensor(float(len(tokenizer))).log()).all()
    fast, slow = (torch.autograd.grad(column.sum(), parameters) for column in (entropy, torch.cat(plain)))
    for mine, theirs in zip(fast, slow, strict=True):
        assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


def test_policy_stays_in_eval_mode(tiny_gpt2, tokenizer) -> None:
    policy = make(tiny_gpt2, tokenizer)
    policy.train()
    assert not any(module.training for module in policy.modules())


def test_a_model_in_training_mode_still_runs_without_dropout(tiny_gpt2, tokenizer) -> None:
    policy = make(tiny_gpt2, tokenizer)
    assert any(isinstance(part, torch.nn.Dropout) and part.p > 0 for part in tiny_gpt2.modules())
    expected = ragged(policy)
    tiny_gpt2.train()
    found = ragged(policy)
    assert torch.equal(found.tokens, expected.tokens) and torch.equal(found.logprobs, expected.logprobs)
    tiny_gpt2.train()
    torch.testing.assert_close(policy.evaluate(found).logprobs, found.logprobs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("queries", "copies"), [(0, 1), (1, 0)])
def test_nothing_to_write_is_refused(queries: int, copies: int, tiny_llama, tokenizer) -> None:
    policy = make(tiny_llama, tokenizer)
    with pytest.raises(ValueError, match="nothing to write"):
        policy.sample([policy.query("Write.", "")] * queries, seeded(), copies)


def test_tokenizer_without_end_of_sequence_is_refused(tiny_llama, tokenizer) -> None:
    tokenizer.eos_token = None
    for config in (tiny_llama.config, tiny_llama.generation_config):
        config.eos_token_id = None
    with pytest.raises(ValueError, match="end-of-sequence"):
        policy_of(tiny_llama, tokenizer)


def test_an_end_that_only_the_model_names_is_enough(tiny_llama, tokenizer) -> None:
    end = tokenizer.eos_token_id
    tokenizer.eos_token = None
    assert policy_of(tiny_llama, tokenizer).lm.ends == {end}


def test_chat_leaves_the_assistant_turn_open(tiny_llama, tokenizer) -> None:
    tokenizer.chat_template = CHATML
    policy = policy_of(tiny_llama, tokenizer)
    assert policy.lm.chat
    text = tokenizer.decode(policy.query("question", "The instruction was :").tokens)
    assert text == "<|user|>question<|end|><|assistant|>The instruction was :"


def test_plain_query_is_request_newline_opening(tiny_llama, tokenizer) -> None:
    query = policy_of(tiny_llama, tokenizer).query("request", "opening :")
    assert tokenizer.decode(query.tokens) == "request\nopening :"


def test_a_tokenizer_that_ends_every_text_leaves_a_query_open(tiny_llama, tokenizer) -> None:
    query = policy_of(tiny_llama, tokenizer).query("request", "opening :")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    )
    assert policy_of(tiny_llama, tokenizer).query("request", "opening :").tokens == (
        tokenizer.bos_token_id,
        *query.tokens,
    )


def test_the_value_head_is_as_wide_as_what_the_head_reads(tokenizer) -> None:
    """OPT-350m's layers are wider than its embedding."""
    sizes = {"hidden_size": 32, "word_embed_proj_dim": 16, "ffn_dim": 64, "max_position_embeddings": 64}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
    model = OPTForCausalLM(OPTConfig(vocab_size=len(tokenizer), **sizes, **layers, **SPECIAL_IDS)).eval()
    policy = make(model, tokenizer)
    rollout = policy.sample(ragged_queries(policy), torch.Generator().manual_seed(0))
    assert policy.evaluate(rollout).values.shape == rollout.values.shape


def test_query_that_leaves_no_room_is_refused(tiny_llama, tokenizer) -> None:
    policy = policy_of(tiny_llama, tokenizer, plain_sampling(500))
    policy.check_fits(policy.query("", "x" * 11))  # 12 tokens with the newline and 500 are 512, the context
    for refuse in (policy.check_fits, lambda query: policy.sample([query])):
        with pytest.raises(ContextTooLongError, match="512"):
            refuse(policy.query("", "x" * 12))


def test_decoded_text_is_clean(tiny_llama, tokenizer) -> None:
    policy = policy_of(tiny_llama, tokenizer)
    ids = torch.tensor([[*tokenizer(" a\x1b[2Jb\n")["input_ids"], tokenizer.eos_token_id]])
    zeros = torch.zeros(ids.shape)
    assert policy.decode(Rollout((Query((1,)),), torch.zeros(1).long(), ids, ids >= 0, zeros, zeros)) == ["a[2Jb"]


@pytest.mark.parametrize(
    ("dirty", "tidy"),
    [(" a \t b\n", "a b"), ("x\x00y\x07z", "xyz"), ("a\u202eb\u200bc", "abc"), ("\ud800", ""), ("é ß 你", "é ß 你")],
)
def test_clean_keeps_what_can_be_read(dirty: str, tidy: str) -> None:
    assert clean(dirty) == tidy


@pytest.mark.parametrize("chat", [False, True])
def test_a_data_row_cannot_smuggle_special_tokens_into_a_query(
    chat: bool, tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m['content'] }}{% if not loop.last %}</s>{% endif %}{% endfor %}"
    )
    policy = policy_of(tiny_llama, tokenizer, plain_sampling(4), chat)
    counts = [
        sum(token in tokenizer.all_special_ids for token in policy.query(request, "Go :").tokens)
        for request in ("a plain row", "a row </s> with <pad> more <s>")
    ]
    assert counts == ([3, 3] if chat else [0, 0])
