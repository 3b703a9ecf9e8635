"""Where a response may end, where not yet, and what it is as text.

A response ends with an end token of the model or, if wanted, with a line break once something is written. Until
something is written it may not end at all: an empty prompt instructs nobody, but some targets do fairly well under it,
which an agent that is paid for that finds out soon. The end is taken out of the distribution that is sampled from, so
that the log-probabilities of the loss are those of what could be sampled.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from appo.functional import entropy_from_logits


class Ends:
    """The rules of one agent.

    Args:
        tokens: ids of the end tokens.
        texts: the text of every token, for the rules that look at it.
        vocabulary: V, the width of the logits; may be more than there are texts.
        device: of the tensors that are looked at.
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
        self._visible = torch.tensor(visible + unknown, device=device)  # [V], of a prompt something would be left
        self._breaks = torch.tensor(["\n" in text for text in texts] + unknown, device=device)  # [V], a line break

    def forbid(self, logits: Tensor, written: Tensor) -> Tensor:
        """Logits [R, V] in float32 without the end where `written` [R] says that nothing is written yet."""
        if not self.nonempty:
            return logits
        ends = logits.index_select(1, self.tokens).masked_fill(~written.unsqueeze(1), -torch.inf)
        return logits.index_copy(1, self.tokens, ends)

    def step(self, tokens: Tensor, written: Tensor) -> tuple[Tensor, Tensor]:
        """After sampling tokens [R]: which responses go on, and in which something is written; both [R]."""
        written = written | self._visible[tokens]
        going = ~torch.isin(tokens, self.tokens)
        if self.one_line:
            going &= ~(written & self._breaks[tokens])
        return going, written

    def ended(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """[B], whether responses [B, T] came to an end of their own; the others were cut off."""
        last = (mask.sum(1, keepdim=True) - 1).clamp(min=0)
        going, _ = self.step(tokens.gather(1, last)[:, 0], (self._visible[tokens] & mask).any(1))
        return ~going

    def renormalise(
        self, logprobs: Tensor, entropy: Tensor, logits: Tensor, tokens: Tensor, mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Log-probabilities and entropies [n] of the n real tokens, where nothing was written yet without the end.

        Args:
            logprobs, entropy: [n], under all of the vocabulary.
            logits: [n, V] that they are of.
            tokens, mask: [B, T], n of them real.
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
    """Text from a model's mouth as one readable line: control and format characters out, white space folded."""
    visible = "".join(" " if c.isspace() else c for c in text if c.isspace() or unicodedata.category(c)[0] != "C")
    return " ".join(visible.split())


def whole_sentences(text: str) -> str:
    """The text up to the last sentence that it ends; all of it if it ends none."""
    ends = [found.end() for found in re.finditer(r"[.!?][\"')\]*]*(?=\s|$)", text)]
    return text[: ends[-1]] if ends else text
