"""The parts that the lab's models share: tokenizer, architecture, and the instructions of the untrained agent."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from experiments.lab import grammar, wordplay
from experiments.lab.rows import SPECS, manual_prompt, render, row_of, sample_example
from tasks.meta_prompt import MetaPrompt, meta_prompt, rewrite_prompt

HABIT = "action"  # the untrained agent mostly writes this criterion, rather than the one that an input asks for
PAIRS = 5  # pairs in the meta-prompts that the agent learns from, as in runs
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}


def build_tokenizer(seed: int = 0) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on the lab's own text; it puts <s> before every text."""
    rng = random.Random(seed)
    texts = []
    for _ in range(6_000):
        task = rng.choice(list(SPECS))
        (request, opening), _ = sample_query(rng, task)
        texts.append(f"{request}\n{opening} {sample_prior(rng, task)}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos = SPECIAL["bos_token"]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


class Shape(NamedTuple):
    """The size of a small Llama."""

    hidden: int
    intermediate: int
    layers: int


def llama(tokenizer: PreTrainedTokenizerBase, shape: Shape) -> LlamaForCausalLM:
    """Builds a small Llama with random weights."""
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **{name.replace("token", "token_id"): tokenizer.convert_tokens_to_ids(t) for name, t in SPECIAL.items()},
    )
    return LlamaForCausalLM(config)


def sample_query(rng: random.Random, task: str) -> tuple[MetaPrompt, str | None]:
    """Draws a meta-prompt, often for a single input; also returns the criterion that an input of "mixed" asks for."""
    pairs = [sample_example(rng, task) for _ in range(PAIRS if rng.random() < 0.4 else rng.randint(1, PAIRS))]
    if rng.random() < (0.1 if task == grammar.MIXED else 0.6):
        return meta_prompt(pairs), None
    manual = manual_prompt(task) if rng.random() < 0.3 else ""
    if task in wordplay.TASKS:
        return rewrite_prompt(pairs, sample_example(rng, task).input, manual), None
    item = grammar.sample_item(rng, task)
    query = rewrite_prompt(pairs, render(task, row_of(item)).input, manual)
    return query, item.criterion if task == grammar.MIXED else None


def sample_prior(rng: random.Random, task: str, hint: str | None = None, taken: float = 1.0) -> str:
    """Draws an instruction. It follows a hint with probability `taken`; otherwise mostly HABIT, sometimes neither."""
    if task in wordplay.TASKS:
        return wordplay.sample_prior(rng, task)
    weights = (taken, 0.8 * (1 - taken), 0.2 * (1 - taken))
    return grammar.sample_prior(rng, task, rng.choices((hint, HABIT, None), weights)[0] if hint else None)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the model as a folder that transformers loads."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
