"""Where a response may end, and how it is read as text.

A response ends with an end token of the model or, if wanted, with a line break once something is written. With
`nonempty` it may not end before that: some targets score fairly well under an empty prompt, and an agent soon learns
to write nothing. Until there is visible text, end tokens are removed from the sampling distribution itself, so that the
log-probabilities in the loss are those of the distribution that was sampled from.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Sequence
from math import comb

import torch
from torch import Tensor

from appo.functional import entropy_from_logits


class Ends:
    """One agent's rules on where a response ends.

    Args:
        tokens: ids of the end tokens.
        texts: the text of every token, for the rules that look at it.
        vocabulary: V, the width of the logits; may exceed the number of texts.
        device: of the logits and tokens.
        nonempty: no end before something is written.
        one_line: a line break ends a response, once something is written.
    """

    def __init__(
        self,
        tokens: Collection[int],
        texts: Sequence[str],
        vocabulary: int,
        device: torch.device,
        nonempty: bool = True,
        one_line: bool = True,
    ) -> None:
        self.nonempty, self.one_line = nonempty, one_line
        self.tokens = torch.tensor(sorted(tokens), device=device)  # [E]
        unknown = [False] * (vocabulary - len(texts))
        visible = [bool(clean(text)) and token not in tokens for token, text in enumerate(texts)]
        self._visible = torch.tensor(visible + unknown, device=device)  # [V], visible text
        self._breaks = torch.tensor(["\n" in text for text in texts] + unknown, device=device)  # [V], a line break

    def forbid(self, logits: Tensor, written: Tensor) -> Tensor:
        """Logits [R, V] in float32; end tokens get -inf in rows where `written` [R] is False."""
        if not self.nonempty:
            return logits
        ends = logits.index_select(1, self.tokens).masked_fill(~written.unsqueeze(1), -torch.inf)
        return logits.index_copy(1, self.tokens, ends)

    def step(self, tokens: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
        """After sampling tokens [R]: which responses go on, and which hold visible text; both [R]."""
        written = written | self._visible[tokens]
        going = ~torch.isin(tokens, self.tokens)
        if self.one_line:
            going &= ~(written & self._breaks[tokens])
        return going, written

    def ended(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """[B], whether responses [B, T] ended by themselves; the others were cut off."""
        last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
        going, _ = self.step(tokens.gather(1, last)[:, 0], (self._visible[tokens] & mask).any(1))
        return ~going

    def renormalise(
        self, logprobs: Tensor, entropy: Tensor, logits: Tensor, tokens: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [n] of the n real tokens, corrected where end tokens were not allowed yet.

        Args:
            logprobs, entropy: [n], over the whole vocabulary.
            logits: [n, V], from which both were computed.
            tokens, mask: [B, T], with n real tokens.
        """
        if not self.nonempty:
            return logprobs, entropy
        visible = (self._visible[tokens] & mask).long()
        rows = (visible.cumsum(1) == visible)[mask].nonzero()[:, 0]  # no visible token before
        states = logits[rows].float()
        allowed = states.index_fill(1, self.tokens, -torch.inf)
        logprobs = logprobs.index_add(0, rows, states.logsumexp(-1) - allowed.logsumexp(-1))
        return logprobs, entropy.index_copy(0, rows, entropy_from_logits(allowed))


def clean(text: str) -> str:
    """A model's text as one readable line: without control and format characters, white space collapsed."""
    visible = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    return " ".join(visible.split())


def whole_sentences(text: str) -> str:
    """The text up to its last complete sentence; all of it if there is none."""
    ends = [found.end() for found in re.finditer(r"[.!?][\"')\]*]*(?=\s|$)", text)]
    return text[: ends[-1]] if ends else text


def distinct_share(texts: Sequence[str], among: int = 8) -> float:
    """The expected share of different texts among `among` of them (or all, if fewer), drawn at random.

    A share that does not depend on how many texts there are (rarefaction; Hurlbert 1971): an agent with ten equally
    likely texts writes 0.7 different ones among eight, but only 0.3 among 32.
    """
    among = min(among, len(texts))
    missed = sum(comb(len(texts) - count, among) for count in Counter(texts).values()) / comb(len(texts), among)
    return (len(set(texts)) - missed) / among


def distinct_ngrams(texts: Sequence[str], size: int) -> float:
    """Share of distinct word n-grams, n = `size` (Li et al. 2016, distinct-n): near 0 when texts repeat themselves."""
    words = [text.split() for text in texts]
    runs = [tuple(row[i : i + size]) for row in words for i in range(len(row) - size + 1)]
    return len(set(runs)) / max(1, len(runs))
