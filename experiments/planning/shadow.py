"""Runs a model without its weights, on tensors of the device "meta", and counts the memory of its passes.

Such tensors have a shape and a dtype but no data, so a model of any size is built and run in a second. The passes are
the real ones of `appo.lm`, so the count includes whatever autograd keeps; no formula has to guess it.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from appo.lm import adapter, packed
from appo.lm.attention import NAME, Branches
from appo.lm.logits import logprobs_and_entropy
from experiments.run.models import ModelError, is_missing_folder, no_folder

META = torch.device("meta")


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors that were made inside the block.

    Attributes:
        now: bytes at this moment.
        peak: the most bytes so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def ignore(self, tensors: Iterable[Tensor]) -> None:
        """Leaves these tensors, which were there before, out of the count."""
        for tensor in tensors:
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(found):
            if isinstance(tensor, Tensor) and tensor.layout == torch.strided:
                storage = tensor.untyped_storage()
                if storage not in self._seen:
                    self._seen.add(storage)
                    size = storage.nbytes()
                    self.now += size
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._gone, size)
        return found

    def _gone(self, size: int) -> None:
        self.now -= size


@contextmanager
def _as_run(computes_in: torch.dtype, head: nn.Module, cast: dict[int, Tensor]) -> Iterator[None]:
    """Makes meta tensors behave as under autocast and the attention kernels of a real device.

    Replaces three functions of torch within the block: a torch dispatch mode would not reach the passes of
    checkpointing.

    Args:
        computes_in: dtype of products and attention.
        head: the output layer; it is exempt, as in `appo.lm.model`.
        cast: id of a weight -> the weight in that dtype: autocast casts a weight once per pass.
    """
    places = ((F, "linear"), (F, "scaled_dot_product_attention"), (torch, "addmm"))
    linear, _, addmm = before = [getattr(*place) for place in places]

    def lower(tensor: Any) -> Any:
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == computes_in:
            return tensor
        if not isinstance(tensor, nn.Parameter):
            return tensor.to(computes_in)
        return cast.setdefault(id(tensor), tensor.to(computes_in))

    def lower_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if weight is head.weight:
            return linear(x.to(weight.dtype), weight, bias)
        return linear(lower(x), lower(weight), lower(bias))

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, scale: float | None = None) -> Tensor:
        kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # keeps as much as those of GPUs
        return kernel(lower(q), lower(k), lower(v), 0.0, False, attn_mask=lower(attn_mask), scale=scale)[0]

    def lower_addmm(*tensors: Tensor) -> Tensor:  # the products of GPT-2
        return addmm(*map(lower, tensors))

    for place, function in zip(places, (lower_linear, attend, lower_addmm), strict=True):
        setattr(*place, function)
    try:
        yield
    finally:
        for place, function in zip(places, before, strict=True):
            setattr(*place, function)


class Shadow:
    """A causal LM without weights.

    Args:
        source: a folder, a config.json or a hub id.
        stored_in: dtype of the weights.
        computes_in: dtype of products.
        trained: whether this is an agent, whose weights (or adapter only) have gradients.
        rank: rank of a LoRA adapter; None: no adapter.
        checkpointing: whether gradient checkpointing is on.
        trust_remote_code: whether code that comes with the model may run.
        targets: the layers that get the adapter.

    Raises:
        ModelError: no such model, one that does not run packed, or one without layers of these names.
    """

    def __init__(
        self,
        source: str,
        stored_in: torch.dtype = torch.float32,
        computes_in: torch.dtype = torch.float32,
        trained: bool = False,
        rank: int | None = None,
        checkpointing: bool = False,
        trust_remote_code: bool = False,
        targets: str | Sequence[str] = adapter.ALL_LINEAR,
    ) -> None:
        self.model = _without_weights(source, stored_in, trust_remote_code)
        self.computes_in, self.checkpointing = computes_in, checkpointing
        head, embedding = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        self.linear = [m for m in self.model.modules() if isinstance(m, nn.Linear) and m is not head]
        self.parameters, self.layers = sum(p.numel() for p in self.model.parameters()), len(packed.layers(self.model))
        if trained and head.weight.element_size() < 4:  # an agent's head is float32: see CausalLM
            self.model.set_output_embeddings(copy.deepcopy(head).float())
        self.bytes = sum(p.numel() * p.element_size() for p in self.model.parameters())
        self.tied = head.weight is embedding.weight
        outside = {id(embedding.weight), id(self.model.get_output_embeddings().weight)}
        self.in_layers = sum(p.numel() for p in self.model.parameters() if p.dim() > 1 and id(p) not in outside)
        self.head = head.weight.numel()
        self.width = head.weight.shape[1]
        self.vocabulary = head.weight.shape[0]
        self.trained = 0
        self.adapted: list[Any] = []
        self._extra: list[nn.Parameter] = []
        self._casts: dict[int, Tensor] = {}
        self.model.requires_grad_(trained and rank is None)
        if trained and rank is not None:
            try:
                layers = adapter.chosen(self.model, rank, targets)
            except ValueError as error:
                raise ModelError(f"agent: no adapter fits {source!r}: {error}") from error
            self.adapted = [layer for layer in layers if isinstance(layer, nn.Linear | Conv1D)]
            self._extra = [p for layer in self.adapted for p in _adapt(layer, rank)]
        if trained:
            value_head = self.width + 1
            self.trained = (sum(p.numel() for p in self._extra) if rank else self.parameters) + value_head
        if checkpointing:
            enable = getattr(self.model, "activation_checkpointing_enable", self.model.gradient_checkpointing_enable)
            enable({"use_reentrant": False, "context_fn": self._around_a_layer})
        if trained and rank is None and self.tied:
            # The embedding's gradient is sparse and is added to the head's (see CausalLM); meta tensors have no sparse
            # gradients.
            embedding.weight = nn.Parameter(head.weight.detach(), requires_grad=False)

    def update(self, prefixes: Sequence[int], branches: Sequence[int], owner: Sequence[int], scaled: bool) -> int:
        """Returns the peak bytes of a forward and backward pass over responses, with gradients, without weights.

        Args:
            prefixes: number of tokens of each query, without its last.
            branches: number of tokens of each response.
            owner: index of the query of each response.
            scaled: whether logits are divided by a temperature, which makes another copy of them.
        """
        with self._passes() as count:
            output = packed.run(self.model, _blank(prefixes, branches, owner))
            self._casts.clear()  # autograd keeps the casts that the backward pass needs
            logits = output.logits.float() / 0.5 if scaled else output.logits
            tokens = torch.zeros(len(logits), dtype=torch.long, device=META)
            values = output.hidden.float() @ torch.zeros(self.width, 1, device=META, requires_grad=True)
            logprobs, entropy = logprobs_and_entropy(logits, tokens, used_up=True)
            loss = logprobs.mean() + values.mean() - 0.01 * entropy.mean()
            del output, logits, values, logprobs, entropy
            loss.backward()
        for parameter in (*self.model.parameters(), *self._extra):
            parameter.grad = None
        return count.peak

    @torch.no_grad()
    def forward(self, prefixes: Sequence[int], branches: Sequence[int], owner: Sequence[int], keep: int) -> int:
        """Returns the peak bytes of a pass without gradients.

        Args:
            prefixes, branches, owner: as in `update`.
            keep: how many of each branch's last tokens get logits; 0: the last one, for a few label words only.
        """
        with self._passes() as count:
            counts = [min(max(keep, 1), length) for length in branches]
            if keep:
                packed.run(self.model, _blank(prefixes, branches, owner), counts)
            else:
                head, rows = self.model.get_output_embeddings(), torch.zeros(4, self.width, device=META)
                handle = head.register_forward_pre_hook(lambda _head, states: (states[0][..., :0],))
                whole, head.weight = head.weight, nn.Parameter(rows[:, :0])
                try:
                    packed.run(self.model, _blank(prefixes, branches, owner), counts)
                finally:
                    handle.remove()
                    head.weight = whole
        return count.peak

    def _around_a_layer(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """Returns what encloses a checkpointed layer: in the forward pass, and when it runs again.

        The second run is a pass of its own for autocast, which forgets its casts at the end.
        """
        again = ExitStack()
        again.callback(self._casts.clear)
        return nullcontext(), again

    @contextmanager
    def _passes(self) -> Iterator[LiveBytes]:
        layers = packed.layers(self.model) if self.checkpointing and torch.is_grad_enabled() else []
        for layer in layers:
            layer.training = True
        count = LiveBytes()
        count.ignore([*self.model.parameters(), *self._extra])
        try:
            with _as_run(self.computes_in, self.model.get_output_embeddings(), self._casts), count:
                yield count
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            raise ModelError(f"this architecture cannot be planned: {' '.join(str(error).split())[:300]}") from error
        finally:
            self._casts.clear()
            for layer in layers:
                layer.training = False


def _without_weights(source: str, dtype: torch.dtype, trust_remote_code: bool) -> PreTrainedModel:
    if source.endswith(".json") and not Path(source).is_file():  # else transformers would ask the hub for it
        raise ModelError(f"no file {source!r}; expected the config.json of a causal LM")
    if is_missing_folder(source):
        raise ModelError(no_folder(source))
    if Path(source).is_dir() and not Path(source, "config.json").is_file():
        raise ModelError(f"{source!r} holds no config.json; expected the folder of a causal LM")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
        with META:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=trust_remote_code)
        model.tie_weights()
    except Exception as error:  # whatever a configuration can cause in transformers
        raise ModelError(
            f"cannot read the configuration of {source!r}: {' '.join(str(error).split())[:300]}"
        ) from error
    model.eval().set_attn_implementation(NAME)
    if not packed.is_installed(model):
        raise ModelError(f"{source!r}: its attention cannot run shared prefixes once; such models cannot be planned")
    return model


def _adapt(layer: nn.Linear | Conv1D, rank: int) -> list[nn.Parameter]:
    """Makes a layer add B A x, as peft's LoRA with dropout 0; returns A and B, in float32."""
    shape = layer.weight.shape
    width, height = shape if isinstance(layer, Conv1D) else reversed(shape)  # GPT-2's weights are [in, out]
    with META:
        down = nn.Parameter(torch.zeros(rank, width))
        up = nn.Parameter(torch.zeros(height, rank))
    forward: Callable[[Tensor], Tensor] = layer.forward

    def adapted(x: Tensor) -> Tensor:
        found = forward(x)
        return (found + F.linear(F.linear(x.to(down.dtype), down), up) * 2.0).to(found.dtype)

    layer.forward = adapted  # type: ignore[method-assign]
    return [down, up]


def _blank(prefixes: Sequence[int], branches: Sequence[int], owner: Sequence[int]) -> Branches:
    return Branches([[0] * n for n in prefixes], [[0] * n for n in branches], owner)
