"""The target: a frozen causal LM that answers inputs under a prompt, scored over a few label words.

Two things are easy to get wrong here and decide every number above. Which token is a label word? It depends on
what precedes it (a space or none, a newline, a chat turn), so the words are tokenised *in place*, behind the
filled template. And where does the answer begin? At the template's last token, whatever the padding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from appo.lm import linear, packed
from appo.lm.attention import Branches

REMEMBERED = 100_000  # pairs; some 20 MB
NO_NUMBERS = "the target's logits are not numbers; its weights are damaged, or overflow"


class ContextTooLongError(ValueError):
    """A text does not fit into the context of the model that is to read it."""


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
        shared = min(packed.common_prefix([base, ids]) for ids in full)
        tokens = tuple(tuple(ids[shared:]) for ids in full)
        for word, ids in zip(words, tokens, strict=True):
            if not ids or (tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids):
                raise ValueError(f"the target's tokenizer has no token for the label word {word!r}")
            twins = [other for other, theirs in zip(words, tokens, strict=True) if theirs == ids]
            if len(twins) > 1:
                raise ValueError(f"the label words {twins} are the same tokens {list(ids)} to the target's tokenizer")
        return cls(tuple(words), tokens, len(base) - shared)


class _Job(NamedTuple):
    """A filled template as tokens: what it shares with others, and the rest, which is not empty."""

    prefix: tuple[int, ...]
    rest: list[int]


class TargetModel:
    """Class logits of a frozen causal LM under prompts.

    The tokens that a prompt's examples share (the prompt itself, mostly) are run once, no token is run for padding,
    and of the vocabulary only the label words are looked at; see appo/lm/packed.py for how. What was scored once in
    a run is never scored again.

    Args:
        model: any Hugging Face causal LM. Put into eval mode, its parameters frozen.
        tokenizer: the target's own; the agent's may be another.
        template: text with {prompt} and {input}, ending where the answer begins.
        words: the label words in class order; none where the answer is text (rewards/generation.py).
        chat: put the filled template into a user turn of the tokenizer's chat template.
        max_batch_tokens: upper bound on the tokens of one forward pass, halved whenever memory runs out; default: 2048
            on the CPU, where more only leave its caches, 32768 elsewhere.
        inputs: some of the task's inputs. Where the template ends in one, the label words follow its last character.

    Raises:
        ValueError: the tokenizer does not know a label word, or cannot tell two apart.

    Attributes:
        scored: class logits [C] of the (prompt, input) pairs of this run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        words: Sequence[str],
        chat: bool = False,
        max_batch_tokens: int | None = None,
        inputs: Sequence[str] = ("input",),
    ) -> None:
        self.model = model.eval().requires_grad_(False)
        linear.install(model)
        packed.install(model)
        self.tokenizer = tokenizer
        self.template = template
        self.chat = chat
        self.max_batch_tokens = max_batch_tokens or (2048 if model.device.type == "cpu" else 32_768)
        self.scored: dict[tuple[str, str], Tensor] = {}
        # The words are tokenised as they will stand there: behind a filled template, not an empty one.
        self.verbalizer, *others = {
            Verbalizer.build(tokenizer, self.context("prompt", text), words, chat): None for text in inputs
        }
        if others:
            raise ValueError("behind different inputs a label word is different tokens; let the template end in a text")
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
        """Logits over the classes, of every prompt with every input.

        The logit of a class is the log-likelihood of its word behind the filled template, up to a constant that
        the classes of a pair share: where words are single tokens, what normalises them all is never computed.

        Args:
            prompts: K instructions.
            inputs: N rendered inputs.

        Returns:
            [K, N, C] float32, on the CPU.

        Raises:
            ContextTooLongError: a filled template is longer than the target's context.
        """
        pairs = [(prompt, text) for prompt in prompts for text in inputs]
        return self._logits(pairs).view(len(prompts), len(inputs), -1)

    @torch.inference_mode()
    def pair_logits(self, prompts: Sequence[str], inputs: Sequence[str]) -> Tensor:
        """As `class_logits`, but of each of B prompts with its own input only: [B, C]."""
        return self._logits(list(zip(prompts, inputs, strict=True)))

    def state_dict(self) -> dict[str, Any]:
        """What was scored, to be saved: computed again, in other company, logits differ in their last bits."""
        return {"pairs": list(self.scored), "logits": torch.stack(list(self.scored.values())) if self.scored else None}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes over what was scored before."""
        self.scored = dict(zip(state["pairs"], state["logits"], strict=True)) if state["pairs"] else {}

    def _logits(self, pairs: Sequence[tuple[str, str]]) -> Tensor:
        """[B, C] of (prompt, input) pairs; none is run that has been run before."""
        known = {pair: self.scored[pair] for pair in pairs if pair in self.scored}
        if new := [pair for pair in dict.fromkeys(pairs) if pair not in known]:
            new.sort(key=lambda pair: pair[0])  # stable: those of one prompt side by side
            known |= zip(new, self._run(self._jobs(new)), strict=True)
            self.scored |= {pair: known[pair] for pair in new}
            for pair in list(self.scored)[: len(self.scored) - REMEMBERED]:
                del self.scored[pair]
        return torch.stack([known[pair] for pair in pairs])

    def _jobs(self, pairs: Sequence[tuple[str, str]]) -> list[_Job]:
        """The filled templates as tokens, each cut where what it shares with the others of its prompt ends."""
        texts = [self.context(prompt, text) for prompt, text in pairs]
        contexts = [ids[: len(ids) - self.verbalizer.overlap] for ids in encode(self.tokenizer, texts, self.chat)]
        self.check_width(max(map(len, contexts)) + max(map(len, self._stems)))
        of_prompt: dict[str, list[list[int]]] = {}
        for (prompt, _), ids in zip(pairs, contexts, strict=True):
            of_prompt.setdefault(prompt, []).append(ids)
        jobs = []
        for many in of_prompt.values():
            # What is not shared keeps at least the last token, the one that predicts the answer.
            shared = packed.common_prefix([ids[:-1] for ids in many]) if len(many) > 1 else 0
            jobs += [_Job(tuple(ids[:shared]), ids[shared:]) for ids in many]
        return jobs

    def _run(self, jobs: Sequence[_Job]) -> Tensor:
        """[n, C]: in one pass if that fits, else in halves."""
        size = sum(map(len, {job.prefix for job in jobs}))
        size += sum(len(job.rest) + len(stem) for job in jobs for stem in self._stems)
        if size <= self.max_batch_tokens or len(jobs) == 1:
            try:
                return self._pass(jobs)
            except RuntimeError as error:
                if len(jobs) == 1 or not out_of_memory(error):
                    raise
            self.max_batch_tokens = size // 2
        half = len(jobs) // 2
        return torch.cat([self._run(jobs[:half]), self._run(jobs[half:])])

    def _pass(self, jobs: Sequence[_Job]) -> Tensor:
        """[n, C], from one forward pass."""
        prefixes = {prefix: m for m, prefix in enumerate(dict.fromkeys(job.prefix for job in jobs))}
        branches = [[*job.rest, *stem] for job in jobs for stem in self._stems]
        owner = [prefixes[job.prefix] for job in jobs for _ in self._stems]
        keep = [1 + len(stem) for stem in self._stems]
        batch = Branches(list(prefixes), branches, owner)
        if self._stems == [()] and self.verbalizer.words:
            with _only_rows(self.model, [word[0] for word in self.verbalizer.tokens]) as columns:
                return packed.run(self.model, batch, keep * len(jobs)).logits[:, columns].float().cpu()
        logits = packed.run(self.model, batch, keep * len(jobs)).logits.float().log_softmax(-1)
        logits = logits.view(len(jobs), sum(keep), -1)
        return torch.stack([self._word_logprob(logits, word) for word in self.verbalizer.tokens], dim=-1).cpu()

    def _word_logprob(self, logprobs: Tensor, word: tuple[int, ...]) -> Tensor:
        """[n]: the sum over the word's tokens, each at the position that predicts it, behind its own stem."""
        first = sum(1 + len(stem) for stem in self._stems[: self._stems.index(word[:-1])])
        return torch.stack([logprobs[:, first + i, token] for i, token in enumerate(word)]).sum(0)

    def check_fits(self, prompt: str | int, text: str) -> None:
        """Raises ContextTooLongError if the input leaves no room for the prompt, or for one of so many tokens."""
        room, written = (prompt, "") if isinstance(prompt, int) else (0, prompt)
        (ids,) = encode(self.tokenizer, [self.context(written, text)], self.chat)
        self.check_width(len(ids) - self.verbalizer.overlap + room + max(map(len, self._stems)))

    def check_width(self, width: int) -> None:
        """Raises ContextTooLongError if the context holds fewer tokens than these."""
        config = self.model.config.get_text_config()
        limit = getattr(config, "max_position_embeddings", None)
        if limit is not None and width > limit:
            raise ContextTooLongError(
                f"a filled template takes up to {width} tokens of the target, whose context holds {limit}; "
                "use shorter inputs, a shorter prompt, or lower sampling.max_new_tokens"
            )


def out_of_memory(error: BaseException) -> bool:
    """Whether the error is one of memory, on a GPU or on the CPU."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


@contextmanager
def _only_rows(model: PreTrainedModel, tokens: Sequence[int]) -> Iterator[list[int]]:
    """Lets the model compute the logits of a few tokens only; yields the columns where they are then.

    What a model does to its logits (soft-capping, scaling) it still does. A head that is no plain linear layer
    stays as it is. The few rows are float32 also where the model is bfloat16, in which logits near 20 are 0.125 apart:
    label words would tie, and the first one win.
    """
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, linear.OneDNNLinear):
        yield list(tokens)
        return
    rows = _LabelRows(head, tokens)
    model.set_output_embeddings(rows)
    try:
        yield list(range(len(tokens)))
    finally:
        model.set_output_embeddings(head)


class _LabelRows(nn.Module):
    """Some rows of a linear head, in float32."""

    def __init__(self, head: nn.Linear, tokens: Sequence[int]) -> None:
        super().__init__()
        self.weight = head.weight[list(tokens)].float()
        self.bias = None if head.bias is None else head.bias[list(tokens)].float()

    def forward(self, hidden: Tensor) -> Tensor:
        return nn.functional.linear(hidden.float(), self.weight, self.bias)


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
