"""A bare causal LM and its tokenizer: text to tokens, passes over given tokens, and decoding token by token.

Everything specific to running a Hugging Face model is in `appo/lm`, for agents and targets alike.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from appo.lm import adapter, head, linear, packed, trial
from appo.lm.attention import Branches
from appo.lm.decoding.flight import Flight, Waiting
from appo.lm.decoding.recorded import Recordings
from appo.lm.packed import Output

# Found on SmolLM2-135M, where it makes 6e-5. With 6e-5 the updates of Gemma 3 270M, whose weights are a fifth as large,
# explode.
RELATIVE_RATE = 3.15e-4

# Takes the output for R responses and their indices [R]; returns their next tokens [R], and which go on [R].
Choose = Callable[[Output, Tensor], tuple[Tensor, Tensor]]


class ContextTooLongError(ValueError):
    """A text does not fit into a model's context."""


class CausalLM:
    """A causal LM with its tokenizer, the only object through which a model is run; built where models are loaded.

    This is the only place that alters a model. It puts the model into eval mode and, where the model allows it,
    installs an attention that runs shared prefixes once (`packed`), matrix products by oneDNN (`linear`), and a tied
    embedding whose gradient is added to the head's in place. What the model computes changes by rounding only. An
    adapter (`appo.lm.adapter`) may be added before or afterwards.

    Args:
        model: any Hugging Face causal LM. Of its generation_config only the end tokens are read.
        tokenizer: the one that the model was trained with.
        chat: put requests into the tokenizer's chat template; None: if it has one.
        compute_dtype: what the layers compute in, by autocast; weights stay as they are. The head computes in the dtype
            of its weights, at least float32: logits near 20 are 0.125 apart in bfloat16, and so would be
            log-probabilities.
        gradient_checkpointing: keep only the layers' inputs for the backward pass; less memory, a third more time.
        onednn: use oneDNN for large matrix products on CPUs where it is faster.

    Raises:
        UnsupportedModelError: the model cannot run several texts at a time; a trial of a few tokens tells.

    Attributes:
        context: the most tokens that the model can see; None if its configuration does not say.
        ends: tokens that end a text.
        packed: whether shared prefixes are run once; else every sequence is a padded row.
        bare: whether the model's adapter is left out; see `without_adapter`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        chat: bool | None = None,
        compute_dtype: torch.dtype = torch.float32,
        gradient_checkpointing: bool = False,
        onednn: bool = True,
    ) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.chat = tokenizer.chat_template is not None if chat is None else chat
        self.compute_dtype = compute_dtype
        self.context: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.ends = _end_tokens(model, tokenizer)
        if getattr(model.config, "output_router_logits", False):
            model.config.output_router_logits = False  # for a loss on a mixture's router, which reads the mask too
        if onednn:
            linear.install(model)
        self.packed = packed.install(model)
        if not self.packed:
            trial.check_padding(model)
        self._decodes = self._joins = self.packed  # else a trial shows it
        self.bare = False
        self._recordings = Recordings()
        if compute_dtype != torch.float32:
            self.use_float32_head()
        self._checkpoints = gradient_checkpointing
        if gradient_checkpointing:
            # transformers' current name for it, else its former one.
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
            for layer in packed.layers(model):
                checkpoint: Any = layer._gradient_checkpointing_func
                layer._gradient_checkpointing_func = partial(_checkpointed, layer, checkpoint)  # type: ignore[assignment]
        embedding = model.get_input_embeddings()
        if embedding.weight is model.get_output_embeddings().weight and embedding.weight.requires_grad:
            # The head's gradient spans the vocabulary already. A sparse gradient of the few tokens read is added to it;
            # a dense one would need as much memory again.
            embedding.sparse = True
            embedding.weight.register_post_accumulate_grad_hook(_make_dense)  # if the loss does not use the head

    def use_float32_head(self) -> None:
        """Lets the head compute in float32 from now on, whatever the layers compute in."""
        head.exempt_from_autocast(head.float32_head(self.model))

    @property
    def device(self) -> torch.device:
        found: torch.device = self.model.device
        return found

    @property
    def frozen(self) -> bool:
        """Whether no weight that it uses is trained."""
        return self.bare or not any(weight.requires_grad for weight in self.model.parameters())

    def without_adapter(self, chat: bool) -> CausalLM:
        """The same model, sharing its weights, with its adapter left out: a target beside the agent that it became."""
        twin = copy.copy(self)
        twin.chat, twin.compute_dtype, twin.bare = chat, torch.float32, True
        return twin

    @property
    def vocabulary(self) -> int:
        """V, the width of the logits."""
        return len(self.model.get_output_embeddings().weight)

    @property
    def default_learning_rate(self) -> float:
        """A learning rate of AdamW for all weights, to two digits: `RELATIVE_RATE` times the size of the weights.

        AdamW moves each weight by about the learning rate, so what matters is its share of the weight. As in Adafactor
        (Shazeer & Stern 2018, section 8), the size of a matrix is the root mean square of its entries. Here the model
        has one size, the median of its matrices, adapters left out.
        """
        weights = [weight for name, weight in self.model.named_parameters() if "lora_" not in name]
        matrices = [w.detach() for w in weights if w.dim() > 1 and w.is_floating_point()]  # quantised ones are integers
        sizes = [torch.linalg.vector_norm(m, dtype=torch.float32).item() / m.numel() ** 0.5 for m in matrices]
        return float(f"{RELATIVE_RATE * median(sizes):.1e}")  # rounded, to be the same on every device

    # -- text --------------------------------------------------------------------------------------------------------

    def text(self, request: str, opening: str = "") -> str:
        """What the model reads: the request, then the opening of the answer, which it continues.

        In a chat the request is the user's turn and the opening begins an assistant's turn that is left open: if it
        were closed, the model would have to write after the end of its own turn.
        """
        if not self.chat:
            return f"{request}\n{opening}" if opening else request
        turns = [{"role": "user", "content": self._spelt_out(request)}]
        if not opening:
            return str(self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
        turns.append({"role": "assistant", "content": opening})
        return str(self.tokenizer.apply_chat_template(turns, tokenize=False, continue_final_message=True))

    def tokens(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of texts that `text` made.

        A chat template has written its special tokens already. In plain text they are added here, and a special token
        spelt out in a text ("</s>") is read as ordinary characters: requests come from a model and from data, and
        neither may end the text or open a turn. An end token that the tokenizer puts behind every text is left out:
        all texts here are to be continued.
        """
        encoded = self.tokenizer(list(texts), add_special_tokens=not self.chat, split_special_tokens=not self.chat)
        end = None if self.chat else self.tokenizer.eos_token_id
        return [ids[:-1] if len(ids) > 1 and ids[-1] == end else ids for ids in encoded["input_ids"]]

    def encode(self, request: str, opening: str = "") -> tuple[int, ...]:
        """The token ids of a request with the opening of its answer."""
        return tuple(self.tokens([self.text(request, opening)])[0])

    def decode_text(self, tokens: Sequence[int] | Tensor) -> str:
        """Tokens as text, without special ones."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    def continued(self, text: str, answer: str) -> str:
        """A text that `text` made, followed by an answer; outside a chat, white space separates the two."""
        return f"{text}{'' if self.chat or not text or text[-1].isspace() else ' '}{answer}"

    def check_fits(self, count: int, what: str) -> None:
        """Refuses more tokens than the context holds.

        Raises:
            ContextTooLongError: `count` is larger; the message begins with `what`.
        """
        if self.context is not None and count > self.context:
            raise ContextTooLongError(f"{what}: up to {count} tokens, but the context holds {self.context}")

    def _spelt_out(self, text: str) -> str:
        """The text with a space in every special token that it spells out, so that only the template writes any."""
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        return re.sub("|".join(map(re.escape, special)) or r"(?!)", lambda found: f"{found[0][0]} {found[0][1:]}", text)

    # -- passes ------------------------------------------------------------------------------------------------------

    def run(self, batch: Branches, keep: Sequence[int] | None = None, only: Sequence[int] | None = None) -> Output:
        """Logits and hidden states of the branches' tokens, in order, from one pass.

        Args:
            batch: prefixes, each run once, and the branches that continue them.
            keep: how many of each branch's last tokens are wanted; default: all of them.
            only: the few tokens of the vocabulary whose logits are wanted, in float32; default: all, as computed.
        """
        self.model.eval()  # a caller's model.train() would turn dropout on
        with self._adapting(), self._computing(), self._checkpointing(), head.only_rows(self.model, only) as columns:
            output = packed.run(self.model, batch, keep)
        return output if columns is None else Output(output.logits[:, columns].float(), output.hidden)

    @torch.no_grad()
    def decode(
        self,
        contexts: Sequence[Sequence[int]],
        choose: Choose,
        budget: int,
        owner: Sequence[int] | None = None,
        room: int | None = None,
        at_once: int | None = None,
    ) -> None:
        """Decodes responses to contexts, token by token, until `choose` ends all or `budget` is spent.

        Args:
            contexts: token ids, at least one each, which leave room for the budget (`check_fits`). Responses that begin
                together run their context once, and a prefix that all contexts share once for all.
            choose: called with the model's output for the responses that go on; see `Choose`.
            budget: most tokens in a response.
            owner: which context each response is to, in order; default: one response to each.
            room: most tokens of contexts and responses at a time, padding included, except for a single response. As
                responses end, others begin beside those that go on. Default: no limit.
            at_once: most responses at a time. Default: no limit.

        Raises:
            UnsupportedModelError: the model cannot decode several texts at a time; the first call tells, by a trial.
        """
        self.model.eval()  # before the trial, which compares passes
        if not self._decodes:
            trial.check_decoding(self.model)
            self._decodes, self._joins = True, trial.lets_join(self.model)
        owner = range(len(contexts)) if owner is None else owner
        if not len(owner):
            raise ValueError("nothing to write: no contexts, or no copies")
        waiting = Waiting(contexts, owner, budget, room, at_once, joining=self._joins)
        fast = linear.laid_out(self.model) if len(owner) > 1 else nullcontext()  # for one row it takes long to pay
        with self._adapting(), self._computing(), fast:
            flight = Flight(self.model, self._recordings, waiting, kind=self.bare)
            while flight.board():
                output = flight.responses.step()
                with torch.autocast(self.device.type, enabled=False):
                    tokens, going = choose(output, flight.responses.alive)
                flight.feed(tokens, going)

    def _adapting(self) -> AbstractContextManager[None]:
        return adapter.switched_off(self.model) if self.bare else nullcontext()

    def _computing(self) -> torch.autocast:
        """The layers compute in `compute_dtype` within this block; weights are cast once for all of it."""
        return torch.autocast(self.device.type, self.compute_dtype, enabled=self.compute_dtype != torch.float32)

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Gradient checkpointing, which Hugging Face ties to training mode, for a model in eval mode."""
        layers = packed.layers(self.model) if self._checkpoints and torch.is_grad_enabled() else []
        for layer in layers:
            layer.training = True  # only the layer's own flag, and not while it runs: see _checkpointed
        try:
            yield
        finally:
            for layer in layers:
                layer.training = False


def _checkpointed(layer: nn.Module, checkpoint: Callable[..., Any], forward: Callable[..., Any], *args: Any) -> Any:
    """Runs a layer under gradient checkpointing in eval mode; else the dropout that it calls itself would be on."""

    def in_eval(*args: Any) -> Any:
        before, layer.training = layer.training, False
        try:
            return forward(*args)
        finally:
            layer.training = before

    return checkpoint(in_eval, *args)


def out_of_memory(error: BaseException) -> bool:
    """Whether the error says that a GPU or the CPU ran out of memory."""
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def _end_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """All tokens that end a text: the tokenizer's, and those in the model's configuration (ends of turns, too)."""
    ends = {tokenizer.eos_token_id}
    for config in (model.config.get_text_config(), model.generation_config):
        named = getattr(config, "eos_token_id", None)
        ends |= set(named) if isinstance(named, list) else {named}
    vocabulary = len(model.get_output_embeddings().weight)  # a configuration may name tokens that do not exist
    return {token for token in ends - {None} if 0 <= token < vocabulary}


def _make_dense(weight: Tensor) -> None:
    if weight.grad is not None:
        weight.grad = weight.grad.to_dense()
