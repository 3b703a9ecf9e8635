"""Decoding on a GPU by a recorded step, and the choice of the fastest way for a model.

A step launches some ten kernels a layer. On a GPU, launching them from Python takes far longer than running them: 55 ms
for 7 B parameters, whose bfloat16 weights are read in 3. `Fixed` records the launches of one step as a CUDA graph and
replays them all at once. A graph reads and writes the same memory every time, so finished rows stay and the cache has
its full length from the start. On a CPU, Llama-like models are decoded by a step of our own (`direct`); everything else
is faster with `Growing`.
"""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Hashable

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from appo.lm import packed
from appo.lm.attention import CPU
from appo.lm.decoding.direct import Direct, looks_familiar
from appo.lm.decoding.growing import Growing, run
from appo.lm.packed import Output

BLOCK = 256  # tokens: a recorded cache's length is a multiple, so that one recording serves queries of many lengths
ROW_BLOCK = 4  # and its number of rows is a multiple of this
MOST_ROWS = 128  # with more rows the kernels themselves take the time
LEAST_TOKENS = 8  # recording costs about four steps
KEPT = 3  # recordings: of iterations, and of both sides of a review; those of one size share a cache


Size = tuple[Hashable, int, int]  # of a recording: its kind, rows, tokens in a row


class Fixed:
    """Responses in decoding, as in `Growing`, in tensors that stay; on a GPU with the step recorded as a CUDA graph.

    Args:
        begun: responses after their contexts were read; gives the shapes.
        rows: how many rows to have room for.
        length: most tokens of a response with its context.
        beside: another of that size, for other weights, whose tensors it shares: only one is decoding at a time.
    """

    def __init__(self, begun: Growing, rows: int, length: int, beside: Fixed | None = None) -> None:
        self.model, device = begun.model, begun.ids.device
        if beside is None:
            self.ids = torch.zeros(rows, 1, dtype=torch.long, device=device)
            self.positions = torch.zeros_like(self.ids)
            self.column = torch.zeros(1, dtype=torch.long, device=device)  # of the cache, where the next token goes
            self.mask = torch.zeros(rows, 1, 1, length, dtype=torch.bool, device=device)  # a 4-D mask is used as it is
            self.cache = DynamicCache()
            self.cache.layers = [_FixedLayer(layer, rows, length, self.column) for layer in begun.cache.layers]
        else:
            self.ids, self.positions, self.column = beside.ids, beside.positions, beside.column
            self.mask, self.cache = beside.mask, beside.cache
        self.graph: torch.cuda.CUDAGraph | None = None
        if device.type == "cuda":
            self._record()

    def begin(self, begun: Growing) -> Fixed:
        """Takes over responses whose contexts were read."""
        used, held = begun.mask.shape
        for layer, other in zip(self.cache.layers, begun.cache.layers, strict=True):
            for fixed, grown in ((layer.keys, other.keys), (layer.values, other.values)):
                fixed.zero_()  # hidden keys count for nothing, but not if they are NaN
                fixed[:used, :, :held] = grown
        self.mask.zero_()
        self.mask[:used, 0, 0, :held] = begun.mask
        self.positions.zero_()  # of spare rows, too: a position beyond the context's end may not exist
        self.column.fill_(held)
        self.ids[:used], self.positions[:used] = begun.ids, begun.positions
        self.alive, self.rows = begun.alive, torch.arange(used, device=self.ids.device)
        return self

    def step(self) -> Output:
        """As in `Growing`."""
        if self.graph is None:
            self.output = self._compute()
        else:
            self.graph.replay()
        return Output(self.output.logits[self.rows], self.output.hidden[self.rows])

    def feed(self, tokens: Tensor, going: Tensor) -> None:
        """As in `Growing`, but the responses that have ended are only hidden."""
        self.ids[self.rows, 0] = tokens
        self.positions[self.rows] *= going.unsqueeze(1)  # ended rows run on, and the context may have no more positions
        kept = going.nonzero()[:, 0]
        self.alive, self.rows = self.alive[kept], self.rows[kept]

    def into(self, begun: Growing) -> Growing:
        """As in `Growing`."""
        rows, held = self.rows, int(self.column)
        layers = ((layer.keys[rows, :, :held], layer.values[rows, :, :held]) for layer in self.cache.layers)
        return begun.hold(layers, self.mask[rows, 0, 0, :held], self.ids[rows], self.positions[rows], self.alive)

    def _compute(self) -> Output:
        self.mask.index_fill_(3, self.column, True)
        output = run(self.model, self.ids, self.mask, self.positions, self.cache)
        self.column.add_(1)
        self.positions.add_(1)
        return output

    def _record(self) -> None:
        # Autocast must not keep its copies of the weights: they would be old when the graph is replayed.
        kind, dtype = self.ids.device.type, torch.get_autocast_dtype("cuda")
        self.column.zero_()
        self.positions.zero_()
        with torch.autocast(kind, dtype, enabled=torch.is_autocast_enabled(kind), cache_enabled=False):
            aside = torch.cuda.Stream()
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                self._compute()  # libraries allocate at their first call
                self._compute()
            torch.cuda.current_stream().wait_stream(aside)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.output = self._compute()
        self.graph = graph


class _FixedLayer(DynamicLayer):  # type: ignore[misc]
    """A layer's keys and values with all the room that they will need."""

    def __init__(self, like: DynamicLayer, rows: int, length: int, column: Tensor) -> None:
        super().__init__()
        self.column, self.is_initialized = column, True
        self.keys, self.values = (x.new_zeros(rows, x.shape[1], length, x.shape[3]) for x in (like.keys, like.values))

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        self.keys.index_copy_(2, self.column, key_states)
        self.values.index_copy_(2, self.column, value_states)
        return self.keys, self.values


class Recordings:
    """The fastest way to decode with a model; recorded steps are made when they are first needed.

    The least recently used ones are dropped.
    """

    def __init__(self) -> None:
        self._made: OrderedDict[tuple[Size, tuple[int, ...]], Fixed] = OrderedDict()  # by size, and where weights lie
        self._possible = True
        self._direct: bool | None = None

    def take_over(self, begun: Growing, budget: int, kind: Hashable = None) -> Growing | Fixed | Direct:
        """The responses in the form that is decoded faster.

        Args:
            begun: responses after their contexts were read.
            budget: most tokens in a response.
            kind: what else a recording depends on.
        """
        if looks_familiar(begun):
            if self._direct is None:
                self._direct = computes_the_same(begun.model)
            if self._direct:
                return Direct(begun, budget)
        begun.spread()
        read = begun.mask.shape[1]  # tokens of a context in the cache; if 0, it has no shape yet
        plain = packed.is_installed(begun.model) and not any(begun.cache.is_sliding)
        if not (read and plain and self._possible and _launches_take_longest(begun, budget)):
            return begun
        rows, length = room_for(len(begun.ids), read + budget)
        # A graph knows weights by their address; those of agent and anchor change places (`Anchor.in_place`).
        weights = tuple(weight.data_ptr() for weight in begun.model.parameters())
        size = self._serving(kind, weights, rows, length)
        key = (size, weights)
        if key not in self._made:
            beside = next((made for (other, _), made in self._made.items() if other == size), None)
            try:
                self._made[key] = Fixed(begun, rows, length, beside)
            except RuntimeError as error:
                warnings.warn(f"no CUDA graph of this model's step can be recorded: {error}", stacklevel=2)
                self._possible = False
                return begun
        self._made.move_to_end(key)
        while len(self._made) > KEPT:
            self._made.popitem(last=False)
        return self._made[key].begin(begun)

    def _serving(self, kind: Hashable, weights: tuple[int, ...], rows: int, length: int) -> Size:
        """The size of a recording that serves, if it is at most twice as large as needed; else the size of a new one.

        So responses that join others, in ever other numbers, do not need a recording each.
        """
        made = [size for size, others in self._made if others == weights and size[0] == kind]
        large = [size for size in made if rows <= size[1] and length <= size[2]]
        best = min(large, key=lambda size: size[1] * size[2], default=(kind, rows, length))
        return best if best[1] * best[2] <= 2 * rows * length else (kind, rows, length)


def room_for(rows: int, tokens: int) -> tuple[int, int]:
    """Rows and length of the recording that serves so many rows of at most so many tokens."""
    return -(-rows // ROW_BLOCK) * ROW_BLOCK, -(-tokens // BLOCK) * BLOCK


def computes_the_same(model: PreTrainedModel) -> bool:
    """Whether a model that looks like what `Direct` runs also computes that, in a trial near the end of its context.

    There some models scale what they leave alone at the beginning.
    """
    text, following = packed.known(model, [[1, 2, 3, 4], [5, 6, 7]])
    begun = Growing(model, [text], [0])
    context: int = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 0
    begun.positions = begun.positions.clamp(min=context - 4)
    try:
        ours, theirs = Direct(begun, budget=3), begun.spread()
        for token in following:
            found, expected = ours.step(), theirs.step()
            if not (found.logits - expected.logits).abs().max() <= 1e-3 * expected.logits.std():  # False for NaN
                return False
            for way in (ours, theirs):
                way.feed(torch.tensor([token], device=CPU), torch.tensor([True], device=CPU))
    except (AttributeError, RuntimeError):  # a part has the name, but not what belongs to it, or another shape
        return False
    return True


def _launches_take_longest(begun: Growing, budget: int) -> bool:
    """Whether launching a step's kernels takes longer than running them, and recording pays."""
    return begun.ids.is_cuda and len(begun.ids) <= MOST_ROWS and budget >= LEAST_TOKENS
