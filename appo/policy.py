"""The agent: a bare Hugging Face causal LM and a value head that starts at zero.

Two verbs. `sample` writes responses and records log-probabilities and values as it goes; `evaluate` gives the
same numbers, differentiably, for responses that are given. Both run each query once, however many responses to it
there are: the K responses to one meta-prompt cost one meta-prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from appo.config import SamplingConfig
from appo.ends import Ends, clean, whole_sentences
from appo.functional import logprobs_and_entropy
from appo.lm import linear, packed
from appo.lm.attention import Branches
from appo.lm.cache import closed_up, new_cache
from appo.rollout import Query, Response, Rollout, distinct


class Evaluation(NamedTuple):
    """What the policy says of given responses; each [B, T] float32, 0 on padding. `entropy` has no gradient."""

    logprobs: Tensor
    values: Tensor
    entropy: Tensor


class Policy(nn.Module):
    """A causal LM with a value head, as a distribution over responses.

    The model stays in eval mode: dropout would make the log-probabilities of the loss differ from those that
    were sampled from. Of its generation_config only the end tokens are read, for the same reason.

    What is trained stays in float32, whatever the model computes in: a step of AdamW at 1e-5 is smaller than the
    spacing of bfloat16 numbers, so that weights kept in bfloat16 hardly move.

    Args:
        model: any Hugging Face causal LM; its parameters with requires_grad are what is trained.
        tokenizer: the one it was trained with; needs an end-of-sequence token.
        sampling: length and temperature, and where a prompt ends.
        chat: put meta-prompts into the tokenizer's chat template; None: if it has one.
        gradient_checkpointing: keep only the layers' inputs for the backward pass; saves memory, costs a third of time.
        compute_dtype: what the model's layers compute in, by autocast; log-probabilities and values are float32.

    Raises:
        ValueError: no end-of-sequence token, or trainable parameters of less than float32.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        sampling: SamplingConfig | None = None,
        chat: bool | None = None,
        gradient_checkpointing: bool = False,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        if tokenizer.eos_token_id is None:
            raise ValueError(f"the tokenizer of {model.name_or_path!r} has no end-of-sequence token")
        low = next((p.dtype for p in model.parameters() if p.requires_grad and p.dtype.itemsize < 4), None)
        if low is not None:
            raise ValueError(
                f"the parameters to train are {low}, which small steps do not move; load the model in float32 and set "
                f"compute_dtype={low}"
            )
        self.compute_dtype = compute_dtype
        self.model = model.eval()
        linear.install(model)
        packed.install(model)
        self.tokenizer = tokenizer
        self.sampling = sampling or SamplingConfig()
        self.gradient_checkpointing = gradient_checkpointing
        if gradient_checkpointing:
            # The name that transformers has now, else the one it had before.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        embedding = model.get_input_embeddings()
        if embedding.weight is model.get_output_embeddings().weight and embedding.weight.requires_grad:
            # The head's gradient is as large as the vocabulary: that of the few tokens read is added to it, where a
            # dense one would be made beside it.
            embedding.sparse = True
            embedding.weight.register_post_accumulate_grad_hook(_make_dense)  # of a loss that does not use the head
        self.chat = tokenizer.chat_template is not None if chat is None else chat
        self.value_head = nn.Linear(model.config.get_text_config().hidden_size, 1, device=model.device)
        nn.init.zeros_(self.value_head.weight)
        nn.init.zeros_(self.value_head.bias)
        looked_at = range(len(tokenizer)) if self.sampling.nonempty or self.sampling.one_line else ()
        texts = tokenizer.batch_decode([[token] for token in looked_at], skip_special_tokens=True)
        ends = sorted(packed.end_tokens(model, tokenizer))
        self.ends = Ends(self.sampling, ends, texts, model.get_output_embeddings().weight.shape[0], model.device)

    @property
    def device(self) -> torch.device:
        return self.value_head.weight.device

    def train(self, mode: bool = True) -> Policy:
        """Stays in eval mode, whatever is asked: see the class's docstring."""
        return super().train(False)

    def query(self, request: str, opening: str) -> Query:
        """The token ids of a meta-prompt: `request`, then the `opening` of the answer for the agent to go on with.

        In a chat the opening begins an assistant turn that is left open: closed, the agent would be asked to
        speak after it had ended its turn.
        """
        if not self.chat:
            # What a data row spells out ("</s>") is no special token.
            return Query(tuple(self.tokenizer(f"{request}\n{opening}", split_special_tokens=True)["input_ids"]))
        turns = [{"role": "user", "content": self._spelt_out(request)}, {"role": "assistant", "content": opening}]
        text = self.tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True)
        return Query(tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"]))

    def _spelt_out(self, text: str) -> str:
        """The text with a space in every special token that it spells out: in a chat only the template's own count."""
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return re.sub("|".join(map(re.escape, special)) or r"(?!)", lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def check_fits(self, query: Query) -> None:
        """Raises ValueError if the query and the longest response to it do not fit into the model's context."""
        limit = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        needed = len(query.tokens) + self.sampling.max_new_tokens
        if limit is not None and needed > limit:
            raise ValueError(
                f"meta-prompt ({len(query.tokens)} tokens) and response (up to {self.sampling.max_new_tokens}) do not "
                f"fit into the agent's context of {limit} tokens"
            )

    def decode(self, rollout: Rollout) -> list[str]:
        """The responses as clean text: no special tokens, no control characters, no white space around.

        With `sampling.whole_sentences` a response that was cut off at the limit loses the sentence that it did not
        end, if it has a whole one before. What is trained on is still all that was sampled.
        """
        texts = [clean(self.tokenizer.decode(r.tokens, skip_special_tokens=True)) for r in rollout.responses()]
        if not self.sampling.whole_sentences:
            return texts
        ended = self.ended(rollout).tolist()
        return [text if whole else whole_sentences(text) for text, whole in zip(texts, ended, strict=True)]

    def ended(self, rollout: Rollout) -> Tensor:
        """[B], True where a response came to an end of its own, False where it was cut off at `max_new_tokens`."""
        return self.ends.ended(rollout.tokens, rollout.mask)

    @torch.no_grad()
    def sample(
        self, queries: Sequence[Query], generator: torch.Generator | None = None, greedy: bool = False
    ) -> Rollout:
        """Samples one response to each query, from the softmax of logits / temperature and nothing else.

        Greedy, it takes the likeliest token instead: for use, not for training.

        Repeat a query to get several responses to it. A response ends with an end token of the model or, with
        `sampling.one_line`, a line break after some text; either belongs to it. Else it is cut off at `max_new_tokens`.

        Raises:
            FloatingPointError: the model's logits are not numbers.
        """
        with self._computing():
            return self._sample(queries, generator, greedy)

    def _sample(self, queries: Sequence[Query], generator: torch.Generator | None, greedy: bool) -> Rollout:
        prefix = self._prefill(queries)
        inputs, mask, position = prefix.last_tokens, prefix.mask, prefix.lengths - 1
        padded = not mask.all()  # else no mask is needed, nor made from step to step
        alive = torch.arange(len(queries), device=self.device)
        written = torch.zeros(len(queries), dtype=torch.bool, device=self.device)  # something that can be seen
        steps: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        for _ in range(self.sampling.max_new_tokens):
            mask = torch.cat([mask, mask.new_ones(len(alive), 1)], dim=1) if padded else mask
            logits, values = self._forward(inputs, mask if padded else None, position.unsqueeze(1), prefix.cache)
            logprobs = self.ends.forbid(logits[:, 0].float(), written).log_softmax(-1)
            if logprobs.isnan().any():
                raise FloatingPointError("the agent's logits are not numbers; its weights are damaged, or overflow")
            race = logprobs
            if not greedy:
                # argmax(p / E) with E ~ Exp(1) is a sample from p. torch.multinomial does the same, but its exponential
                # numbers take four times as long on a CPU.
                uniform = torch.rand(logprobs.shape, generator=generator, device=self.device)
                race = logprobs.exp() / -uniform.log()
            tokens = race.argmax(-1, keepdim=True)  # [alive, 1]
            steps.append((alive, tokens[:, 0], logprobs.gather(-1, tokens)[:, 0], values[:, 0]))
            inputs, position = tokens, position + 1
            going, written = self.ends.step(tokens[:, 0], written)
            if not going.any():
                break
            if not going.all():
                rows = closed_up(going)  # finished responses leave the batch
                prefix.cache.reorder_cache(rows)
                alive, inputs, mask = alive[rows], inputs[rows], mask[rows]
                position, written = position[rows], written[rows]
        owner, *columns = (torch.cat(column) for column in zip(*steps, strict=True))
        responses = [Response(*(column[owner == i] for column in columns)) for i in range(len(queries))]
        return Rollout.stack(queries, responses)

    def evaluate(self, rollout: Rollout) -> Evaluation:
        """Log-probabilities, values and entropies of the rollout's tokens under the policy as it is now."""
        queries, owner = distinct(rollout.queries)
        lengths = rollout.mask.sum(1).tolist()
        # The state in which token t is emitted ends with token t - 1, hence the inputs shifted by one.
        branches = [
            [query.tokens[-1], *tokens][:length]
            for query, tokens, length in zip(rollout.queries, rollout.tokens.tolist(), lengths, strict=True)
        ]
        checkpointing = self.gradient_checkpointing and torch.is_grad_enabled()
        with self._computing(), _checkpointing(self.model, checkpointing):
            output = packed.run(self.model, Branches([query.tokens[:-1] for query in queries], branches, owner))
        logits, values = self._read(output)
        logprobs, entropy = logprobs_and_entropy(logits, rollout.tokens[rollout.mask])
        logprobs, entropy = self.ends.renormalise(logprobs, entropy, logits, rollout.tokens, rollout.mask)
        return Evaluation(*(_unpack(column, rollout.mask) for column in (logprobs, values, entropy)))

    forward = evaluate

    def _computing(self) -> torch.autocast:
        """The model's layers compute in `compute_dtype` within this block; weights are cast once for all of it."""
        return torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32)

    def _prefill(self, queries: Sequence[Query]) -> _Prefix:
        """Runs each distinct query once, but for its last token, and gives every response its own view of it.

        What all queries begin with is run once for all of them.
        """
        prefixes, owner = distinct(queries)
        cache = new_cache(self.model)
        # A window that slides would count the padding between the common beginning and the rest.
        sharing = packed.packs(self.model) and not any(cache.is_sliding)
        shared = packed.common_prefix([query.tokens[:-1] for query in prefixes]) if sharing else 0
        rests = [query.tokens[shared:] for query in prefixes]
        ids, mask = packed.pad_left(rests, self.device)  # so that all queries end in the same column
        mask = torch.cat([mask.new_ones(len(prefixes), shared), mask], dim=1)
        positions = packed.real_positions(mask)
        if shared:
            beginning = torch.tensor([prefixes[0].tokens[:shared]], device=self.device)
            self._forward(beginning, mask[:1, :shared], positions[:1, :shared], cache)
            if len(prefixes) > 1:
                cache.reorder_cache(torch.zeros(len(prefixes), dtype=torch.long, device=self.device))
        if ids.shape[1] > 1:
            self._forward(ids[:, :-1], mask[:, :-1], positions[:, shared:-1], cache)
        rows = torch.tensor(owner, device=self.device)
        if len(queries) > 1:
            cache.reorder_cache(rows)
        return _Prefix(cache, mask[rows, :-1], ids[rows, -1:], mask.sum(1)[rows])

    def _forward(
        self, ids: Tensor, mask: Tensor | None, positions: Tensor, cache: DynamicCache
    ) -> tuple[Tensor, Tensor]:
        """Logits / temperature [B, 1, V] and values [B, 1] of the last inputs; the cache takes in all."""
        return self._read(
            packed.call(
                self.model,
                input_ids=ids,
                attention_mask=None if mask is None else mask.long(),
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
        )

    def _read(self, output: packed.Output) -> tuple[Tensor, Tensor]:
        """Logits / temperature [*, V] and values [*]."""
        logits, temperature = output.logits, self.sampling.temperature
        if temperature != 1:
            logits = logits.float() / temperature
        with torch.autocast(self.device.type, enabled=False):
            return logits, self.value_head(output.hidden.to(self.value_head.weight.dtype)).squeeze(-1).float()


class _Prefix(NamedTuple):
    """Queries without their last token: the cache of B rows, its mask [B, L - 1], last tokens [B, 1], lengths [B]."""

    cache: DynamicCache
    mask: Tensor
    last_tokens: Tensor
    lengths: Tensor


def _unpack(values: Tensor, mask: Tensor) -> Tensor:
    """[n] values of real tokens at their places in [B, T], 0 on padding."""
    return torch.zeros(mask.shape, dtype=values.dtype, device=values.device).masked_scatter(mask, values)


def _make_dense(weight: Tensor) -> None:
    if weight.grad is not None:
        weight.grad = weight.grad.to_dense()


@contextmanager
def _checkpointing(model: PreTrainedModel, wanted: bool) -> Iterator[None]:
    """Gradient checkpointing, which Hugging Face ties to training mode, for a model in eval mode."""
    layers = packed.layers(model) if wanted else []
    for layer in layers:
        layer.training = True  # the layer's own flag only, not that of its dropout
    try:
        yield
    finally:
        for layer in layers:
            layer.training = False
