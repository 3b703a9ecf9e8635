"""The target: a frozen causal LM that answers inputs under a prompt, scored over a few label words.

Two things are easy to get wrong here and decide every number above. Which token is a label word? It depends on
what precedes it (a space or none, a newline, a chat turn), so the words are tokenised *in place*, behind the
filled template. And where does the answer begin? At the template's last token, whatever the padding.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase


class ContextTooLongError(ValueError):
    """A prompt and its input do not fit into the target's context."""


@dataclass(frozen=True)
class Verbalizer:
    """The label words as token ids, as they continue the filled template.

    Attributes:
        words: the C label words, in class order.
        tokens: their token ids behind the template; several ids where the tokenizer splits a word.
        overlap: how many of the template's own last tokens the words are tokenised together with (mostly 0).
    """

    words: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    overlap: int

    @classmethod
    def build(
        cls, tokenizer: PreTrainedTokenizerBase, context: str, words: Sequence[str], chat: bool = False
    ) -> Verbalizer:
        """Tokenises each word behind `context`, a filled template, after a space where none stands there yet.

        Raises:
            ValueError: two words have the same tokens, or a word has none or an unknown one.
        """
        if not words:  # the answer is text: there is nothing to choose from
            return cls((), (), 0)
        separator = "" if chat or not context or context[-1].isspace() else " "
        base, *full = encode(tokenizer, [context, *(f"{context}{separator}{word}" for word in words)], chat)
        shared = min(common_prefix([base, ids]) for ids in full)
        tokens = tuple(tuple(ids[shared:]) for ids in full)
        for word, ids in zip(words, tokens, strict=True):
            if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
                raise ValueError(f"the target's tokenizer has no token for the label word {word!r}")
            twins = [other for other, theirs in zip(words, tokens, strict=True) if theirs == ids]
            if len(twins) > 1:
                raise ValueError(f"the label words {twins} are the same tokens {list(ids)} to the target's tokenizer")
        return cls(tuple(words), tokens, len(base) - shared)


class TargetModel:
    """Class log-likelihoods of a frozen causal LM under prompts.

    The tokens that a prompt's examples share (the prompt itself, mostly) are run once; their key-value cache is
    then read by all its examples.

    Args:
        model: any Hugging Face causal LM. Put into eval mode, its parameters frozen.
        tokenizer: the target's own; the agent's may be another.
        template: text with {prompt} and {input}, ending where the answer begins.
        words: the label words in class order; none where the answer is text (rewards/generation.py).
        chat: put the filled template into a user turn of the tokenizer's chat template.
        max_batch_tokens: upper bound on rows x columns of one forward pass; lower it to save memory.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        words: Sequence[str],
        chat: bool = False,
        max_batch_tokens: int = 16_384,
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.template = template
        self.chat = chat
        self.max_batch_tokens = max_batch_tokens
        self.verbalizer = Verbalizer.build(tokenizer, self.context("", ""), words, chat)
        # A word of several tokens needs the log-probability of each, hence a row that holds all but its last.
        self._stems = list(dict.fromkeys(ids[:-1] for ids in self.verbalizer.tokens)) or [()]

    def context(self, prompt: str, text: str) -> str:
        """The text that the target continues. Braces in prompts and inputs are just braces."""
        values = {"{prompt}": prompt, "{input}": text}
        parts = re.split(r"(\{prompt\}|\{input\})", self.template)
        filled = "".join(values.get(part, part) for part in parts)
        if not self.chat:
            return filled
        turn = [{"role": "user", "content": spell_out(self.tokenizer, filled)}]
        return str(self.tokenizer.apply_chat_template(turn, tokenize=False, add_generation_prompt=True))

    @torch.inference_mode()
    def class_logits(self, prompts: Sequence[str], inputs: Sequence[str]) -> Tensor:
        """log p(word | template filled with prompt and input), for every pair.

        Args:
            prompts: K instructions.
            inputs: N rendered inputs.

        Returns:
            [K, N, C] float32: whole-word log-likelihoods, which are logits over the C classes.

        Raises:
            ContextTooLongError: a filled template is longer than the target's context.
        """
        contexts, rows = self._contexts([(prompt, text) for prompt in prompts for text in inputs])
        by_prompt = [contexts[i : i + len(inputs)] for i in range(0, len(contexts), len(inputs))]
        if rows < len(inputs):
            parts = [[self._score([c[i : i + rows]]) for i in range(0, len(inputs), rows)] for c in by_prompt]
            return torch.cat([torch.cat(part, dim=1) for part in parts])
        group = rows // len(inputs)
        return torch.cat([self._score(by_prompt[i : i + group]) for i in range(0, len(by_prompt), group)])

    @torch.inference_mode()
    def pair_logits(self, prompts: Sequence[str], inputs: Sequence[str]) -> Tensor:
        """As `class_logits`, but of each of B prompts with its own input only: [B, C]."""
        contexts, rows = self._contexts(list(zip(prompts, inputs, strict=True)))
        alone = [[ids] for ids in contexts]
        return torch.cat([self._score(alone[i : i + rows])[:, 0] for i in range(0, len(alone), rows)])

    def _contexts(self, pairs: Sequence[tuple[str, str]]) -> tuple[list[list[int]], int]:
        """The filled templates of (prompt, input) pairs as token ids, and how many of them fit into one batch."""
        texts = [self.context(prompt, text) for prompt, text in pairs]
        contexts = [ids[: len(ids) - self.verbalizer.overlap] for ids in encode(self.tokenizer, texts, self.chat)]
        width = max(map(len, contexts)) + max(map(len, self._stems))
        self._check_width(width)
        return contexts, max(1, self.max_batch_tokens // (width * len(self._stems)))

    def check_fits(self, prompt: str | int, text: str) -> None:
        """Raises ContextTooLongError if the input leaves no room for the prompt, or for one of so many tokens."""
        room, written = (prompt, "") if isinstance(prompt, int) else (0, prompt)
        (ids,) = encode(self.tokenizer, [self.context(written, text)], self.chat)
        self._check_width(len(ids) - self.verbalizer.overlap + room + max(map(len, self._stems)))

    def _check_width(self, width: int) -> None:
        config = self.model.config.get_text_config()
        limits = [getattr(config, name, None) for name in ("max_position_embeddings", "sliding_window")]
        limit = min((n for n in limits if n), default=None)
        if limit is not None and width > limit:
            raise ContextTooLongError(
                f"a filled template takes up to {width} tokens of the target, whose context holds {limit}; "
                "use shorter inputs, a shorter prompt, or lower sampling.max_new_tokens"
            )

    def _score(self, contexts: list[list[list[int]]]) -> Tensor:
        """[G, N, C] for the contexts of G prompts with N inputs each, in one pass over prefixes and one over rests."""
        device = self.model.device
        # Each rest keeps its context's last token, the one that predicts the answer.
        prefixes = [ids[0][: common_prefix([row[:-1] for row in ids])] for ids in contexts]
        rests = [
            [*ids[len(prefix) :], *stem]
            for prefix, many in zip(prefixes, contexts, strict=True)
            for ids in many
            for stem in self._stems
        ]
        owner = torch.arange(len(prefixes), device=device).repeat_interleave(len(rests) // len(prefixes))
        prefix_ids, prefix_mask = _pad_left(prefixes, device)
        ids, mask = _pad_left(rests, device)
        cache = DynamicCache(config=self.model.config)
        if prefix_ids.shape[1]:
            self._forward(prefix_ids, prefix_mask, _positions(prefix_mask), cache, keep=1)
            cache.batch_select_indices(owner)
        visible = torch.cat([prefix_mask[owner], mask], dim=1)
        positions = _positions(visible)[:, prefix_mask.shape[1] :]
        depth = 1 + max(map(len, self._stems))
        logprobs = self._forward(ids, visible, positions, cache, keep=depth).float().log_softmax(-1)
        logprobs = logprobs.view(len(contexts), len(contexts[0]), len(self._stems), depth, -1)
        return torch.stack([self._word_logprob(logprobs, word) for word in self.verbalizer.tokens], dim=-1)

    def _word_logprob(self, logprobs: Tensor, word: tuple[int, ...]) -> Tensor:
        """[G, N]: the sum over the word's tokens, each at the position that predicts it."""
        row = logprobs[:, :, self._stems.index(word[:-1]), -len(word) :]  # [G, N, len(word), V]
        return sum((row[:, :, i, token] for i, token in enumerate(word)), torch.zeros_like(row[:, :, 0, 0]))

    def _forward(self, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache, keep: int) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=mask.long(),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
        )
        return output.logits


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], chat: bool = False) -> list[list[int]]:
    """Token ids of texts; a chat template has written its special tokens already, plain text gets them here.

    In plain text a special token that is spelt out ("</s>") is a few characters like any others: prompts come from
    a model and inputs from a file, and neither may end the text or open a turn.
    """
    return list(tokenizer(list(texts), add_special_tokens=not chat, split_special_tokens=not chat)["input_ids"])


def spell_out(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The text with a space in every special token that it spells out, for a chat template, whose own must stay."""
    special = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return re.sub("|".join(map(re.escape, special)) or r"(?!)", lambda found: f"{found[0][0]} {found[0][1:]}", text)


def common_prefix(sequences: Sequence[Sequence[int]]) -> int:
    """Length of the longest prefix that all sequences share."""
    columns = zip(*sequences, strict=False)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), min(map(len, sequences)))


def _pad_left(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Token ids [R, L] and their mask, all rows ending in the last column."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + list(row) for row in rows], device=device).view(len(rows), width)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids.long(), torch.arange(width, device=device) >= width - lengths.unsqueeze(1)


def _positions(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)
