"""Where responses end: at each end token of the model, at a line break, never before there is visible text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from appo.config import SamplingConfig
from appo.lm.ends import clean, whole_sentences
from appo.policy import Policy
from appo.rollout import Query, Response, Rollout
from tests.conftest import byte_tokenizer, llama, plain_sampling, policy_of, stack

END, NEWLINE, SPACE, A = (byte_tokenizer().convert_tokens_to_ids(token) for token in ("</s>", "Ċ", "Ġ", "a"))
QUERY = Query((5, 6, 7))


def make(likely: int, by: float = 6.0, length: int = 12, **sampling: bool) -> Policy:
    """A policy with uniform logits, except that one token is likelier by `by` nats, whatever it reads."""
    tokenizer = byte_tokenizer()
    model = llama(len(tokenizer))
    with torch.no_grad():  # every state is 32 ones: a row filled with r has the logit 32 r
        model.model.embed_tokens.weight.fill_(1.0)
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.weight[likely] = by / 32
    return policy_of(model, tokenizer, replace(plain_sampling(length), **sampling))


def sampled(policy: Policy) -> Rollout:
    return policy.sample([QUERY], torch.Generator().manual_seed(0), copies=64)


def texts(policy: Policy, rollouts: Rollout) -> list[str]:
    return [policy.lm.decode_text(response.tokens) for response in rollouts.responses()]


def rollout(*texts: str) -> Rollout:
    tokenizer = byte_tokenizer()
    responses = []
    for text in texts:
        ids = torch.tensor(tokenizer(text)["input_ids"])
        responses.append(Response(ids, torch.zeros(len(ids)), torch.zeros(len(ids))))
    return stack([QUERY], [0] * len(texts), responses)


def test_no_prompt_is_empty_even_if_the_end_token_is_most_likely() -> None:
    free, bound = make(END), make(END, nonempty=True)
    assert free.decode(sampled(free)).count("") > 32
    rollouts = sampled(bound)
    assert (rollouts.tokens[:, 0] != END).all() and "" not in bound.decode(rollouts)


def test_white_space_alone_is_nothing_written() -> None:
    policy = make(SPACE, nonempty=True)
    with torch.no_grad():
        policy.model.lm_head.weight[END] = policy.model.lm_head.weight[SPACE]
    for response in sampled(policy).responses():
        text = policy.lm.decode_text(response.tokens)
        assert text.strip() or END not in response.tokens


@pytest.mark.parametrize("nonempty", [False, True])
@pytest.mark.parametrize("likely", [END, NEWLINE, SPACE])
def test_recomputed_logprobs_are_the_sampled_ones(nonempty: bool, likely: int) -> None:
    policy = make(likely, by=3.0, nonempty=nonempty, one_line=True)
    rollouts = sampled(policy)
    with torch.no_grad():
        now = policy.evaluate(rollouts)
    assert_close(now.logprobs, rollouts.logprobs, rtol=0, atol=1e-5)


def test_the_end_is_taken_out_of_the_distribution_by_hand() -> None:
    # V tokens, one of them e^3 times as likely as the others: without it each of the V - 1 others has 1 / (V - 1).
    policy = make(END, by=3.0, nonempty=True)
    vocabulary = len(policy.lm.tokenizer)
    with torch.no_grad():
        now = policy.evaluate(rollout("a</s>", " a</s>"))
    without = -torch.tensor(vocabulary - 1.0).log()
    total = torch.tensor(vocabulary - 1 + torch.e**3).log()
    assert_close(now.logprobs[0, :2], torch.stack([without, 3 - total]), rtol=1e-4, atol=0)
    assert_close(now.logprobs[1], torch.stack([without, without, 3 - total]), rtol=1e-4, atol=0)
    assert_close(now.entropy[0, 0], -without, rtol=1e-4, atol=0)


def test_gradients_pass_where_the_end_is_out() -> None:
    policy = make(END, by=3.0, nonempty=True)
    (gradient,) = torch.autograd.grad(policy.evaluate(rollout("a")).logprobs.sum(), policy.model.lm_head.weight)
    assert gradient[END].abs().max() < 1e-6  # the end takes no part
    assert gradient[A].abs().max() > 0.5


def test_a_line_break_ends_a_prompt_once_something_is_written() -> None:
    policy = make(NEWLINE, one_line=True)
    written = [text for text in texts(policy, sampled(policy)) if clean(text)]
    lines = [text[next(i for i, c in enumerate(text) if clean(c)) :] for text in written]  # from the first visible one
    assert lines and not any("\n" in line[:-1] for line in lines)


def test_without_the_rule_prompts_go_on_over_line_breaks() -> None:
    policy = make(NEWLINE, by=5.0)
    assert any("\n" in text.strip() for text in texts(policy, sampled(policy)))


@pytest.mark.parametrize(
    ("text", "one_line", "expected"),
    [
        ("abc", True, False),
        ("abc</s>", False, True),
        ("abc\n", True, True),
        ("abc\n", False, False),
        ("\n", True, False),  # nothing is written
        ("\n\n\na", True, False),
    ],
)
def test_ended_and_cut_off_responses_are_told_apart(text: str, one_line: bool, expected: bool) -> None:
    assert make(A, one_line=one_line).ended(rollout(text, "filler to pad the other")).tolist()[0] is expected


def test_ends_that_are_no_tokens_are_left_out(tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tiny_llama.generation_config.eos_token_id = [-1, END, len(tokenizer)]
    policy = policy_of(tiny_llama, tokenizer, SamplingConfig(4))
    assert policy.ends.tokens.tolist() == [END]
    sampled(policy)


def test_every_end_that_the_model_names_ends_a_response(
    tiny_llama: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    tiny_llama.generation_config.eos_token_id = [END, A]
    policy = policy_of(tiny_llama, tokenizer, plain_sampling(40))
    with torch.no_grad():
        tiny_llama.lm_head.weight[A] *= 30
    rollouts = sampled(policy)
    assert rollouts.mask.sum(1).min() < 40
    assert all(A not in response.tokens[:-1] for response in rollouts.responses())
    assert policy.ended(rollouts).any()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Say yes. Say no. And the", "Say yes. Say no."),
        ("No end in sight", "No end in sight"),
        ("One!", "One!"),
        ('He said "go." Then he', 'He said "go."'),
        ("Use 3.5 of them and", "Use 3.5 of them and"),
        ("Why? Because", "Why?"),
        ("", ""),
    ],
)
def test_the_last_whole_sentence(text: str, expected: str) -> None:
    assert whole_sentences(text) == expected


def test_only_prompts_that_were_cut_off_lose_their_last_sentence() -> None:
    policy = make(A, whole_sentences=True)
    assert policy.decode(rollout("One. Two", "One. Two</s>")) == ["One.", "One. Two"]
    assert make(A).decode(rollout("One. Two")) == ["One. Two"]
