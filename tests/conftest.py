"""Test doubles that are real but tiny: two-layer Hugging Face models with random weights, a byte tokenizer."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from appo.config import SamplingConfig
from appo.lm.model import CausalLM
from appo.policy import Policy
from appo.rollout import Query, Response, Rollout
from rewards.local import LocalTarget
from rewards.target import Target, grid

# CI draws the same examples in every run, `make fuzz` new ones (tests/fuzz.py).
settings.register_profile("same", derandomize=True, deadline=None)
settings.register_profile("search", max_examples=200, deadline=None, print_blob=True)
settings.load_profile("same")

torch.set_num_threads(1)  # a toy run takes 1 s with one thread and up to 57 s with two on a busy two-core machine

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
SPECIAL_IDS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token per byte, after <s>, </s> and <pad>; adds no special tokens by itself."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*SPECIAL.values(), *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def plain_sampling(length: int, temperature: float = 1.0) -> SamplingConfig:
    """Returns settings that sample from the whole softmax; only the model's end tokens end a response."""
    return SamplingConfig(length, temperature, nonempty=False, one_line=False, whole_sentences=False)


def llama(vocabulary: int, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        **SPECIAL_IDS,
    )
    return LlamaForCausalLM(config).eval()


def gpt2(vocabulary: int, seed: int = 0) -> PreTrainedModel:
    torch.manual_seed(seed)
    config = GPT2Config(vocab_size=vocabulary, n_embd=32, n_layer=2, n_head=4, n_positions=512, **SPECIAL_IDS)
    return GPT2LMHeadModel(config).eval()


def sharpen(model: PreTrainedModel) -> PreTrainedModel:
    """Scales the tiny random weights up, so that inputs change answers by far more than the tolerance."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
    return model


def policy_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampling: SamplingConfig | None = None,
    chat: bool | None = None,
    gradient_checkpointing: bool = False,
    compute_dtype: torch.dtype = torch.float32,
) -> Policy:
    """A policy on a model."""
    return Policy(CausalLM(model, tokenizer, chat, compute_dtype, gradient_checkpointing), sampling)


def target_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: str,
    words: Sequence[str],
    chat: bool = False,
    max_batch_tokens: int | None = None,
    inputs: Sequence[str] = ("input",),
) -> LocalTarget:
    """Makes a target of a model, and freezes the model's weights."""
    lm = CausalLM(model.requires_grad_(False), tokenizer, chat)
    return LocalTarget(lm, template, words, inputs, max_batch_tokens)


def stack(queries: Sequence[Query], owner: Sequence[int], responses: Sequence[Response]) -> Rollout:
    """A rollout of ragged responses, right-padded to the longest of them."""
    mask = [torch.ones_like(response.tokens, dtype=torch.bool) for response in responses]
    columns = [[r.tokens for r in responses], mask, [r.logprobs for r in responses], [r.values for r in responses]]
    padded = (pad_sequence(column, batch_first=True) for column in columns)
    return Rollout(tuple(queries), torch.tensor(owner), *padded)


def logits_of(target: Target, prompts: Sequence[str], inputs: Sequence[str]) -> Tensor:
    """Class logits of every prompt with every input, [K, N, C]."""
    return target.class_logits(grid(prompts, inputs)).view(len(prompts), len(inputs), -1)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return byte_tokenizer()


@pytest.fixture
def tiny_llama(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return llama(len(tokenizer))


@pytest.fixture
def tiny_gpt2(tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    return gpt2(len(tokenizer))


@pytest.fixture(params=["llama", "gpt2"])
def tiny_lm(request: pytest.FixtureRequest, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """Rotary and learned positions in turn, since a padding fault may show with only one of them."""
    return {"llama": llama, "gpt2": gpt2}[request.param](len(tokenizer))
