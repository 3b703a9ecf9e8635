"""The cache of keys and values in decoding: it has room to grow, rows leave it, and others join them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer


class RoomyLayer(DynamicLayer):  # type: ignore[misc]
    """A layer's keys and values with spare room: new ones are written into it, where DynamicLayer copies everything."""

    ROOM = 128  # tokens
    keys: Tensor | None
    values: Tensor | None
    is_initialized: bool

    def __init__(self) -> None:
        super().__init__()
        self.room: list[Tensor] = []

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.keys, self.values, self.is_initialized = key_states, value_states, True
            return self.keys, self.values
        held, length = self.keys.shape[2], self.keys.shape[2] + key_states.shape[2]
        if not self.room or self.room[0].shape[2] < length:
            rows, heads, _, _ = self.keys.shape
            self.room = [x.new_empty(rows, heads, length + self.ROOM, x.shape[3]) for x in (self.keys, self.values)]
            for room, old in zip(self.room, (self.keys, self.values), strict=True):
                room[:, :, :held] = old
        for room, new in zip(self.room, (key_states, value_states), strict=True):
            room[:, :, held:length] = new
        self.keys, self.values = (room[:, :, :length] for room in self.room)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        rows = len(beam_idx)
        if not self.room or rows > len(self.room[0]):
            super().reorder_cache(beam_idx)
            self.room = []  # of the rows before reordering
            return
        assert self.keys is not None
        held = self.keys.shape[2]
        moved = (beam_idx != torch.arange(rows, device=beam_idx.device)).nonzero()[:, 0]
        for room in self.room:
            room[moved, :, :held] = room[beam_idx[moved], :, :held]
        self.room = [room[:rows] for room in self.room]
        self.keys, self.values = (room[:, :, :held] for room in self.room)


def new_cache(model: PreTrainedModel) -> DynamicCache:
    """An empty cache for the model: transformers' own, except that a new token does not copy all earlier ones."""
    cache = DynamicCache(config=model.config)
    cache.layers = [RoomyLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_join(cache: DynamicCache) -> bool:
    """Whether `join` knows how: every layer holds keys and values of past tokens, and nothing else."""
    return all(type(layer) in (DynamicLayer, RoomyLayer, DynamicSlidingWindowLayer) for layer in cache.layers)


def join(cache: DynamicCache, other: DynamicCache, rows: int) -> None:
    """Puts the `rows` rows of another cache below those of `cache`; the shorter ones are padded on the left."""
    for layer, new in zip(cache.layers, other.layers, strict=True):
        put(layer, _below(layer.keys, new.keys, rows), _below(layer.values, new.values, rows))
        if layer.is_sliding:
            layer.cumulative_length = max(layer.cumulative_length, new.cumulative_length)


def trim(cache: DynamicCache, columns: int) -> None:
    """Drops the first columns, which are padding in every row."""
    left = cache.get_seq_length() - columns
    for layer in cache.layers:
        put(layer, layer.keys[:, :, -left:], layer.values[:, :, -left:])  # a sliding layer may hold fewer
        if layer.is_sliding:
            layer.cumulative_length = left


def put(layer: DynamicLayer, keys: Tensor | None, values: Tensor | None) -> None:
    """Replaces what a layer holds by keys and values [R, kv, L, D]."""
    layer.keys, layer.values = keys, values
    if isinstance(layer, RoomyLayer):
        layer.room = []


def _below(upper: Tensor, lower: Tensor | None, rows: int) -> Tensor:
    if lower is None:  # contexts of one token, which the first step runs
        lower = upper.new_empty(rows, upper.shape[1], 0, upper.shape[3])
    width = max(upper.shape[2], lower.shape[2])
    return torch.cat([F.pad(x, (0, 0, width - x.shape[2], 0)) for x in (upper, lower)])


def surviving_rows(going: Tensor) -> Tensor:
    """Indices of the rows that go on, given [R] booleans. The last rows fill the gaps, so that few rows move."""
    rows = going.nonzero()[:, 0]
    order = torch.arange(len(rows), device=going.device)
    order[~going[: len(rows)]] = rows[rows >= len(rows)]
    return order
