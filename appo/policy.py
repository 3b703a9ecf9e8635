"""The agent: a causal LM and a value head that starts at zero.

Two methods. `sample` writes responses and records log-probabilities and values as it goes; `evaluate` gives the
same numbers, differentiably, for given responses. Both run each query once, however many responses it has: K
responses to one meta-prompt run that meta-prompt once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from appo.config import SamplingConfig
from appo.lm.attention import Branches
from appo.lm.decoding.flight import stacked
from appo.lm.ends import Ends, clean, whole_sentences
from appo.lm.logits import draw, logprobs_and_entropy
from appo.lm.model import CausalLM
from appo.lm.packed import Output, unpack
from appo.lm.parallel.ranks import Ranks
from appo.rollout import Query, Rollout

MOST_AT_ONCE = 256  # most responses that are written at a time, for the memory of their keys, values and logits


class Evaluation(NamedTuple):
    """The policy's log-probabilities, values and entropies of given responses; each [B, T] float32, 0 on padding."""

    logprobs: Tensor
    values: Tensor
    entropy: Tensor


class Policy(nn.Module):
    """A causal LM with a value head, as a distribution over responses.

    The model is kept in eval mode: with dropout, log-probabilities in the loss would differ from those at sampling.

    Trained parameters stay in float32, whatever dtype the model computes in: a step of AdamW at 1e-5 is smaller than
    the spacing of bfloat16 numbers, so bfloat16 weights hardly move. Log-probabilities and values are float32 too.

    Args:
        lm: the model; its parameters with requires_grad are trained.
        sampling: length and temperature, and where a prompt ends.
        ranks: the processes that share the work; default: this one alone.

    Raises:
        ValueError: there is no end-of-sequence token, a trainable parameter is coarser than float32, or the frozen
            ones beside it are coarser than what `lm` computes in.
    """

    def __init__(self, lm: CausalLM, sampling: SamplingConfig | None = None, ranks: Ranks | None = None) -> None:
        super().__init__()
        if not lm.ends:
            raise ValueError(f"the tokenizer of {lm.model.name_or_path!r} has no end-of-sequence token")
        low = next((p.dtype for p in lm.model.parameters() if p.requires_grad and p.dtype.itemsize < 4), None)
        if low is not None:
            raise ValueError(f"the parameters to train are {low}; load the model in float32, with compute_dtype={low}")
        if not lm.frozen and lm.model.dtype.itemsize < lm.compute_dtype.itemsize:
            raise ValueError(f"the model is in {lm.model.dtype}; pass compute_dtype={lm.model.dtype} to CausalLM")
        self.lm, self.model = lm, lm.model
        self.sampling = sampling or SamplingConfig()
        self.ranks = ranks or Ranks()
        self.value_head = nn.Linear(lm.model.get_output_embeddings().weight.shape[1], 1, device=lm.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        looked_at = range(len(lm.tokenizer)) if self.sampling.nonempty or self.sampling.one_line else ()
        texts = lm.tokenizer.batch_decode([[token] for token in looked_at], skip_special_tokens=True)
        self.ends = Ends(lm.ends, texts, lm.vocabulary, lm.device, self.sampling.nonempty, self.sampling.one_line)

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters with requires_grad, by name: what training changes and snapshots and checkpoints hold."""
        return {name: parameter for name, parameter in self.named_parameters() if parameter.requires_grad}

    @property
    def device(self) -> torch.device:
        return self.value_head.weight.device

    def train(self, mode: bool = True) -> Policy:
        """Stays in eval mode for any `mode`: see the class's docstring."""
        return super().train(False)

    def query(self, request: str, opening: str) -> Query:
        """The token ids of a meta-prompt: `request`, then the `opening` of the answer, which the agent continues."""
        return Query(self.lm.encode(request, opening))

    def check_fits(self, *queries: Query) -> None:
        """Raises ContextTooLongError if a query and the longest response to it do not fit into the context."""
        asked, longest = max((len(query.tokens) for query in queries), default=0), self.sampling.max_new_tokens
        what = f"a meta-prompt of {asked} tokens and a response of {longest} do not fit into the agent's context"
        self.lm.check_fits(asked + longest, what)

    def decode(self, rollout: Rollout) -> list[str]:
        """The responses as clean text: no special tokens, no control characters, no surrounding white space.

        With `sampling.whole_sentences` a response that was cut off at the limit loses its last, unfinished
        sentence if a whole one precedes it. Training still uses every sampled token.
        """
        texts = [clean(self.lm.decode_text(response.tokens)) for response in rollout.responses()]
        if not self.sampling.whole_sentences:
            return texts
        ended = self.ended(rollout).tolist()
        return [text if whole else whole_sentences(text) for text, whole in zip(texts, ended, strict=True)]

    def ended(self, rollout: Rollout) -> Tensor:
        """[B], True where a response ended by itself, False where it was cut off at `max_new_tokens`."""
        return self.ends.ended(rollout.tokens, rollout.mask)

    @torch.no_grad()
    def sample(
        self, queries: Sequence[Query], generator: torch.Generator | None = None, copies: int = 1, greedy: bool = False
    ) -> Rollout:
        """Samples responses from the softmax of logits / temperature, without top-k or top-p.

        A response ends with an end token of the model or, with `sampling.one_line`, with a line break after some text.
        That last token is part of the response. Without one, the response is cut off at `max_new_tokens`.

        Args:
            queries: M of them.
            generator: on the policy's device.
            copies: responses to each query.
            greedy: take the likeliest token instead of sampling; for using an agent, not for training it.

        Returns:
            A rollout of B = M * copies responses; those to the same query are side by side.

        Raises:
            FloatingPointError: the model's logits are not numbers.
            ContextTooLongError: a query and a response do not fit into the context.
        """
        self.check_fits(*queries)
        owner = torch.arange(len(queries), device=self.device).repeat_interleave(copies)
        # Response i draws from row i, whichever rank writes it: the same prompts on any number of ranks.
        chances = torch.zeros(len(owner), self.sampling.max_new_tokens, dtype=torch.float64, device=self.device)
        if not greedy:
            chances.uniform_(generator=generator)
        with self.ranks.gathered():
            parts = self.ranks.divide(len(owner), lambda rows: self._write(queries, owner[rows], chances[rows], greedy))
        return Rollout(tuple(queries), owner, *parts)

    def _write(self, queries: Sequence[Query], owner: Tensor, chances: Tensor, greedy: bool) -> list[Tensor]:
        """Tokens, mask, logprobs and values of a response for each entry of `owner` [R], each [R, T]; see `sample`."""
        written, length = torch.zeros_like(owner, dtype=torch.bool), torch.zeros_like(owner)  # visible text; tokens
        steps: list[tuple[Tensor, ...]] = []

        def choose(output: Output, alive: Tensor) -> tuple[Tensor, Tensor]:
            logits, values = self._read(output)
            logprobs = self.ends.forbid(logits.float(), written[alive]).log_softmax(-1)
            tokens = logprobs.argmax(-1) if greedy else draw(logprobs, chances[alive, length[alive]])  # [alive]
            chosen = logprobs.gather(-1, tokens.unsqueeze(-1))[:, 0]
            if chosen.isnan().any():  # where one is NaN, so are all of its row
                raise FloatingPointError("the agent's logits are not numbers; its weights are damaged, or overflow")
            steps.append((alive, length[alive], tokens, torch.ones_like(alive, dtype=torch.bool), chosen, values))
            length[alive] += 1
            going, written[alive] = self.ends.step(tokens, written[alive])
            return tokens, going

        contexts, budget = [query.tokens for query in queries], self.sampling.max_new_tokens
        self.lm.decode(contexts, choose, budget, owner.tolist(), at_once=MOST_AT_ONCE)
        return stacked(steps, length)

    @torch.no_grad()
    def measure(self, rollout: Rollout) -> Evaluation:
        """As `evaluate`, but without gradients, and each rank runs only its share of the responses."""
        rows, width = torch.arange(len(rollout), device=self.device), rollout.tokens.shape[1]
        columns = self.ranks.divide(len(rollout), lambda share: self.evaluate(rollout.select(rows[share])))
        return Evaluation(*(F.pad(column, (0, width - column.shape[1])) for column in columns))

    def evaluate(self, rollout: Rollout) -> Evaluation:
        """Log-probabilities, values and entropies of the rollout's tokens under the current policy."""
        owner, lengths = rollout.owner.tolist(), rollout.mask.sum(1).tolist()
        # Token t is predicted at token t - 1, hence the inputs shifted by one.
        branches = [
            [rollout.queries[m].tokens[-1], *tokens][:length]
            for m, tokens, length in zip(owner, rollout.tokens.tolist(), lengths, strict=True)
        ]
        prefixes = [query.tokens[:-1] for query in rollout.queries]
        logits, values = self._read(self.lm.run(Branches(prefixes, branches, owner)))
        logprobs, entropy = logprobs_and_entropy(logits, rollout.tokens[rollout.mask], used_up=True)
        logprobs, entropy = self.ends.renormalise(logprobs, entropy, logits, rollout.tokens, rollout.mask)
        return Evaluation(*(unpack(column, rollout.mask) for column in (logprobs, values, entropy)))

    def _read(self, output: Output) -> tuple[Tensor, Tensor]:
        """Logits / temperature [*, V] and values [*]."""
        logits, temperature = output.logits, self.sampling.temperature
        if temperature != 1 or logits.dtype == torch.float64:
            logits = logits.float() / temperature
        return logits, self.value_head(output.hidden.to(self.value_head.weight.dtype)).squeeze(-1).float()
