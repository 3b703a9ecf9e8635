"""The output head of a model: in float32, outside autocast, or only a few rows of it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from appo.lm import linear


def float32_head(model: PreTrainedModel) -> nn.Module:
    """The model's head; a frozen one of less precision is replaced by a copy in float32, which the embedding is not."""
    head = model.get_output_embeddings()
    if head.weight.dtype.itemsize < 4:
        head = copy.deepcopy(head).float()
        model.set_output_embeddings(head)
    return head


def exempt_from_autocast(head: nn.Module) -> None:
    """Lets the head compute in the dtype of its weights, whatever autocast says around it."""
    head.forward = partial(_without_autocast, head, head.forward)  # bound to the head, so that a deep copy has its own


def _without_autocast(head: nn.Module, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
    with torch.autocast(hidden.device.type, enabled=False):
        return forward(hidden.to(next(head.parameters()).dtype))


@contextmanager
def only_rows(model: PreTrainedModel, tokens: Sequence[int] | None) -> Iterator[list[int] | None]:
    """Lets the model compute the logits of a few tokens only; yields the columns that hold them.

    The model still scales or soft-caps its logits. A head that is not a plain linear layer stays as it is. The few rows
    are float32 even if the model is bfloat16, where logits near 20 are 0.125 apart: label words would tie, and the
    first one would win.
    """
    head = model.get_output_embeddings()
    if tokens is None or type(head) not in (nn.Linear, linear.OneDNNLinear):
        yield None if tokens is None else list(tokens)
        return
    model.set_output_embeddings(_HeadRows(head, tokens))
    try:
        yield list(range(len(tokens)))
    finally:
        model.set_output_embeddings(head)


class _HeadRows(nn.Module):
    """Some rows of a linear head, in float32."""

    def __init__(self, head: nn.Linear, tokens: Sequence[int]) -> None:
        super().__init__()
        self.weight = head.weight[list(tokens)].float()
        self.bias = None if head.bias is None else head.bias[list(tokens)].float()

    def forward(self, hidden: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden.float(), self.weight, self.bias)
