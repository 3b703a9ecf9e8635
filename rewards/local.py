"""A target that runs on this machine: a frozen causal LM that chooses among label words or generates text.

Two things are easy to get wrong here, and every score depends on them. The tokens of a label word depend on what
precedes it (a space or none, a newline, a chat turn), so the words are tokenised *in place*, behind the filled
template. And the answer is predicted at the template's last token, whatever the padding.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from appo.lm.attention import Branches
from appo.lm.model import CausalLM, out_of_memory
from appo.lm.packed import Output, common_prefix
from rewards.target import NO_NUMBERS, Asked, cut, fill

T = TypeVar("T")


@dataclass(frozen=True)
class Verbalizer:
    """The label words as token ids, as they continue the filled template.

    Attributes:
        words: the C label words, in class order.
        tokens: their token ids behind the template; several ids where the tokenizer splits a word.
        overlap: how many of the template's last tokens change when a word follows them (mostly 0).
    """

    words: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    overlap: int

    @classmethod
    def build(cls, lm: CausalLM, context: str, words: Sequence[str]) -> Verbalizer:
        """Tokenises each word behind `context`, a filled template, after a space if the context does not end in one.

        Raises:
            ValueError: two words have the same tokens, or a word has none or an unknown one.
        """
        if not words:  # the answer is text: there are no label words
            return cls((), (), 0)
        base, *full = lm.tokens([context, *(lm.continued(context, word) for word in words)])
        return cls.placed(words, base, full, lm.tokenizer.unk_token_id)

    @classmethod
    def placed(
        cls, words: Sequence[str], base: Sequence[int], full: Sequence[Sequence[int]], unknown: int | None = None
    ) -> Verbalizer:
        """The words' tokens, given those of a context alone (`base`) and those of the context with each word (`full`).

        Args:
            words: at least one.
            base: token ids.
            full: token ids for each word.
            unknown: the tokenizer's token for what it does not know, if it has one.

        Raises:
            ValueError: two words have the same tokens, one begins another, or a word has none or an unknown one.
        """
        shared = min(common_prefix([base, ids]) for ids in full)
        tokens = tuple(tuple(ids[shared:]) for ids in full)
        for word, ids in zip(words, tokens, strict=True):
            if not ids or (unknown is not None and unknown in ids):
                raise ValueError(f"the target's tokenizer has no token for the label word {word!r}")
            twins = [other for other, theirs in zip(words, tokens, strict=True) if theirs == ids]
            if len(twins) > 1:
                raise ValueError(f"the label words {twins} are the same tokens {list(ids)} to the target's tokenizer")
            longer = [other for other, theirs in zip(words, tokens, strict=True) if theirs[: len(ids)] == ids != theirs]
            if longer:  # its first tokens are as likely as this word, and it has more
                raise ValueError(f"the label word {word!r} begins {longer[0]!r}, which the target could never choose")
        return cls(tuple(words), tokens, len(base) - shared)

    @property
    def stems(self) -> list[tuple[int, ...]]:
        """What may stand between the template and a word's token: the words without their last tokens, each once."""
        return list(dict.fromkeys(ids[:-1] for ids in self.tokens)) or [()]


class _Job(NamedTuple):
    """A filled template as tokens: the prefix that it shares with others, and the rest, which is not empty."""

    prefix: tuple[int, ...]
    rest: list[int]


class LocalTarget:
    """A frozen causal LM under prompts; see `rewards.target.Target`.

    To choose among label words, the tokens that a prompt's inputs share (the prompt itself, mostly) are run once, no
    token is run for padding, and logits are computed for the words only, if each is a single token.

    Args:
        lm: the model, with none of its weights trainable.
        template: text with {prompt} and {input}, ending where the answer begins.
        words: the label words in class order; none where the answer is text.
        inputs: some of the task's inputs. If the template ends in {input}, the words follow an input's last character.
        max_batch_tokens: upper bound on the tokens of one forward pass, or of the contexts and answers that are being
            written, halved whenever memory runs out; default: 2048 on the CPU, whose caches hold no more, 32768
            elsewhere.

    Raises:
        ValueError: the tokenizer does not know a label word, or cannot tell two apart; a weight is trainable.
    """

    def __init__(
        self,
        lm: CausalLM,
        template: str,
        words: Sequence[str],
        inputs: Sequence[str] = ("input",),
        max_batch_tokens: int | None = None,
    ) -> None:
        if not lm.frozen:
            raise ValueError("the target has trainable weights; freeze it, and give the agent a model of its own")
        self.lm, self.template, self.words = lm, template, tuple(words)
        self.max_batch_tokens = max_batch_tokens or (2048 if lm.device.type == "cpu" else 32_768)
        # The words are tokenised where they will stand: behind a filled template, not an empty one.
        self.verbalizer, *others = {Verbalizer.build(lm, self.context("prompt", text), words): None for text in inputs}
        if others:
            raise ValueError("a label word's tokens depend on the input before it; let the template end in fixed text")
        # A word of several tokens needs the log-probability of each token, so a branch holds all but the last of them.
        self._stems = self.verbalizer.stems
        if self._stems != [()] and lm.model.get_output_embeddings().weight.dtype.itemsize < 4:
            lm.use_float32_head()  # logits near 20 are 0.125 apart in bfloat16, and words would tie

    def context(self, prompt: str, text: str) -> str:
        """The text that the target continues."""
        return self.lm.text(fill(self.template, prompt, text))

    def described(self) -> dict[str, Any]:
        """The precision that it computes in; whether its chat template is used, passes are packed, and its weights are
        an agent's too.
        """
        computes_in = str(self.lm.model.dtype).removeprefix("torch.")
        return {"computes_in": computes_in, "chat": self.lm.chat, "packed": self.lm.packed, "shared": self.lm.bare}

    def check_fits(self, prompt: str | int, text: str) -> None:
        """Refuses an input that leaves no room for the prompt (or, given a number, for a prompt of that length).

        Raises:
            ContextTooLongError: they do not fit into the target's context.
        """
        room, written = (prompt, "") if isinstance(prompt, int) else (0, prompt)
        (ids,) = self.lm.tokens([self.context(written, text)])
        self._check_width(len(ids) - self.verbalizer.overlap + room + max(map(len, self._stems)))

    def _check_width(self, width: int) -> None:
        self.lm.check_fits(width, "a filled template does not fit into the target's context")

    # -- label words -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def class_logits(self, asked: Sequence[Asked]) -> Tensor:
        """Log-likelihoods of the label words behind each filled template, up to a constant per row.

        If all words are single tokens, the softmax over the vocabulary is never computed.

        Returns:
            [B, C] float32, on the CPU.

        Raises:
            ContextTooLongError: a filled template is longer than the target's context.
        """
        return self._run(self._jobs(asked))

    def _jobs(self, asked: Sequence[Asked]) -> list[_Job]:
        """The filled templates as tokens, each split after the prefix that all inputs of its prompt share."""
        texts = [self.context(prompt, text) for prompt, inputs in asked for text in inputs]
        contexts = iter([ids[: len(ids) - self.verbalizer.overlap] for ids in self.lm.tokens(texts)])
        jobs = []
        for _, inputs in asked:
            many = [next(contexts) for _ in inputs]
            # The rest keeps at least the last token, the one that predicts the answer.
            shared = common_prefix([ids[:-1] for ids in many]) if len(many) > 1 else 0
            jobs += [_Job(tuple(ids[:shared]), ids[shared:]) for ids in many]
        longest = max(len(job.prefix) + len(job.rest) for job in jobs)
        self._check_width(longest + max(map(len, self._stems)))
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
        if self._stems == [()] and self.words:
            only = [word[0] for word in self.verbalizer.tokens]
            return self.lm.run(batch, keep * len(jobs), only).logits.cpu()
        logits = self.lm.run(batch, keep * len(jobs)).logits.float().log_softmax(-1)
        logits = logits.view(len(jobs), sum(keep), -1)
        return torch.stack([self._word_logprob(logits, word) for word in self.verbalizer.tokens], dim=-1).cpu()

    def _word_logprob(self, logprobs: Tensor, word: tuple[int, ...]) -> Tensor:
        """[n]: the sum over the word's tokens, each at the position that predicts it, behind its own stem."""
        first = sum(1 + len(stem) for stem in self._stems[: self._stems.index(word[:-1])])
        return torch.stack([logprobs[:, first + i, token] for i, token in enumerate(word)]).sum(0)

    # -- text --------------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def generate(self, asked: Sequence[Asked], budget: int, stop: Sequence[str]) -> list[str]:
        """Greedy answers: the likeliest token, until an end token, a stop string or the budget.

        Of the model's generation_config only the end tokens are used. A stop string is not part of the answer.

        Returns:
            B texts, stripped.

        Raises:
            ContextTooLongError: a filled template and the longest answer do not fit into the target's context.
            FloatingPointError: the target's logits are not numbers.
        """
        contexts = self.lm.tokens([self.context(prompt, text) for prompt, inputs in asked for text in inputs])

        def write(rows: list[int], _fit: int, answers: dict[int, str]) -> None:
            self._greedy({row: contexts[row] for row in rows}, budget, stop, answers)

        return self._within_memory([len(ids) + budget for ids in contexts], write)

    def _greedy(
        self, contexts: dict[int, list[int]], budget: int, stop: Sequence[str], answers: dict[int, str]
    ) -> None:
        """Adds the answers to contexts, each under its context's number, as they end."""
        rows = list(contexts)
        written: list[list[int]] = [[] for _ in rows]

        def choose(output: Output, alive: Tensor) -> tuple[Tensor, Tensor]:
            best, tokens = output.logits.max(-1)
            if best.isnan().any():  # max prefers NaN to any number
                raise FloatingPointError(NO_NUMBERS)
            going = []
            for i, token in zip(alive.tolist(), tokens.tolist(), strict=True):
                ended = token in self.lm.ends
                if not ended:
                    written[i].append(token)
                text, stopped = cut(self.lm.decode_text(written[i]), stop)
                going.append(not ended and not stopped)
                if not going[-1] or len(written[i]) == budget:
                    answers[rows[i]] = text.strip()
            return tokens, torch.tensor(going, device=alive.device)

        self.lm.decode(list(contexts.values()), choose, budget, room=self.max_batch_tokens)

    @torch.inference_mode()
    def answer_logprobs(self, asked: Sequence[Asked], answers: Sequence[str]) -> Tensor:
        """Mean log-probability per token of each answer to its own input.

        Returns:
            [B] float32 on the CPU, at most 0.

        Raises:
            ContextTooLongError: a filled template and its answer do not fit into the target's context.
        """
        contexts = [self.context(prompt, text) for prompt, inputs in asked for text in inputs]
        wholes = [self.lm.continued(context, answer) for context, answer in zip(contexts, answers, strict=True)]
        before, after = self.lm.tokens(contexts), self.lm.tokens(wholes)
        lengths = [len(w) - common_prefix([b, w]) for b, w in zip(before, after, strict=True)]

        def means(rows: list[int], fit: int, done: dict[int, float]) -> None:
            rows = rows[:fit]
            counts = [lengths[r] for r in rows]
            # A token is predicted at the token before it, so the last token is not run.
            batch = Branches([[]], [after[r][:-1] for r in rows], [0] * len(rows))
            logprobs = self.lm.run(batch, counts).logits.float().log_softmax(-1)
            tokens = torch.tensor([token for r in rows for token in after[r][-lengths[r] :]], device=logprobs.device)
            chosen = logprobs.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
            done |= zip(rows, [part.mean().item() for part in chosen.split(counts)], strict=True)

        return torch.tensor(self._within_memory(list(map(len, after)), means), device="cpu")

    def _within_memory(self, widths: Sequence[int], work: Callable[[list[int], int, dict[int, T]], None]) -> list[T]:
        """Works until all rows are done; the token budget is halved whenever memory runs out.

        Args:
            widths: tokens of each row.
            work: takes the rows that are left, narrow ones first, how many of the first fit into the token budget (at
                least one), and where to put results; what is put there stays if memory runs out.
        """
        self._check_width(max(widths, default=0))
        done: dict[int, T] = {}
        while todo := sorted(set(range(len(widths))) - done.keys(), key=lambda row: widths[row]):
            fit = 1
            while fit < len(todo) and widths[todo[fit]] * (fit + 1) <= self.max_batch_tokens:
                fit += 1
            try:
                work(todo, fit, done)
            except RuntimeError as error:
                if fit == 1 or not out_of_memory(error):
                    raise
                self.max_batch_tokens = fit // 2 * widths[todo[fit - 1]]
        return [done[row] for row in range(len(widths))]
