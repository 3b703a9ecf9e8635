"""Decoding on a CPU without transformers: one step of Llama-like models, written out.

A step of some rows is little work in many pieces. In transformers' code a layer takes some forty-five operators and a
dozen calls of modules; here it takes thirty. The keys of a query are kept once for all its responses; each response
keeps its own keys beside them. Llama, Qwen, SmolLM and similar models differ only in biases and in norms of queries and
keys; other models are decoded by `growing.Growing`.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from appo.lm.decoding.cache import surviving_rows
from appo.lm.decoding.growing import Growing
from appo.lm.linear import Product, product_of
from appo.lm.packed import Output

PARTS = {  # of a Llama-like model, by path; with any other module it is another model
    "": {"embed_tokens", "layers", "norm", "rotary_emb"},
    "layers.0": {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"},
    "layers.0.self_attn": {"q_proj", "k_proj", "v_proj", "o_proj"},
    "layers.0.mlp": {"gate_proj", "up_proj", "down_proj", "act_fn"},
}
OPTIONAL = {"q_norm", "k_norm"}


def looks_familiar(begun: Growing) -> bool:
    """Whether the model has the parts that `Direct` runs, in float32 on a CPU. Only a trial says what they compute."""
    model, cache = begun.model, begun.cache
    if any(weight.dtype != torch.float32 or weight.device.type != "cpu" for weight in model.parameters()):
        return False
    if torch.is_autocast_enabled("cpu") or any(cache.is_sliding) or not cache.get_seq_length():
        return False
    if any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules()):
        return False  # somebody wants to see or change what a module computes
    try:
        found = {path: {name for name, _ in model.base_model.get_submodule(path).named_children()} for path in PARTS}
    except AttributeError:
        return False
    return all(PARTS[path] == names - OPTIONAL for path, names in found.items())


class Direct:
    """Responses in decoding, as in `growing.Growing`, of a Llama-like model in float32 on a CPU.

    Args:
        begun: a model that `looks_familiar`, after the contexts were read.
        budget: most tokens in a response.
    """

    def __init__(self, begun: Growing, budget: int) -> None:
        self.alive, self.ids, self.positions = begun.alive, begun.ids, begun.positions
        body: Any = begun.model.base_model
        self.embed, self.rotary, self.norm = body.embed_tokens, body.rotary_emb, _norm(body.norm)
        self.head = product_of([begun.model.get_output_embeddings()])
        self.hidden = ~begun.mask[:, None, :] if begun.padded else None  # [R, 1, L]: padding
        self.layers = [
            _layer(layer, cached.keys, cached.values, begun.owner, budget)
            for layer, cached in zip(body.layers, begun.cache.layers, strict=True)
        ]
        keys = self.layers[0].keys
        queries = body.config.num_attention_heads
        # Scores are scaled by turning queries into shorter ones.
        self.scale = keys.new_ones(queries + len(keys), 1)
        self.scale[:queries] = body.layers[0].self_attn.scaling
        self.written = 0

    def step(self) -> Output:
        """The model's output for the last token of each response that goes on, [R, *]."""
        x = self.embed(self.ids[:, 0])
        cos, sin = (table * self.scale for table in self.rotary(x, self.positions))  # [R, heads + kv, D]
        sin[..., : sin.shape[-1] // 2].neg_()
        for layer in self.layers:
            x = x + layer.out(self._attend(layer, layer.qkv(layer.norm(x)), cos, sin))
            gate, up = layer.gate_up(layer.mlp_norm(x)).chunk(2, dim=-1)
            x = x + layer.down(layer.activation(gate) * up)
        self.written += 1
        x = self.norm(x)
        return Output(self.head(x), x)

    def feed(self, tokens: Tensor, going: Tensor) -> None:
        """The responses' next tokens [R], and which of them go on [R]; the others leave."""
        self.ids, self.positions = tokens.unsqueeze(1), self.positions + 1
        if going.all():
            return
        rows = surviving_rows(going)
        self.alive, self.ids, self.positions = self.alive[rows], self.ids[rows], self.positions[rows]
        self.hidden = None if self.hidden is None else self.hidden[rows]
        self.layers = [layer.select(rows) for layer in self.layers]

    def into(self, begun: Growing) -> Growing:
        """The responses as they stand, held by `begun`, from which they began."""
        read, rows = self.layers[0].keys.shape[2], len(self.ids)
        mask = begun.mask.new_ones(rows, read + self.written)
        if self.hidden is not None:
            mask[:, :read] = ~self.hidden[:, 0]
        layers = (layer.whole(rows, self.written) for layer in self.layers)
        return begun.hold(layers, mask, self.ids, self.positions, self.alive)

    def _attend(self, layer: _Layer, qkv: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention of a token of each response, which joins the cache: [R, (heads + 2 kv) * D] -> [R, heads * D]."""
        (kv, shares, length, width), (rows, turning, _), end = layer.keys.shape, cos.shape, self.written + 1
        qkv, heads = qkv.view(rows, -1, width), turning - kv
        qk, v = qkv[:, :turning], qkv[:, turning:]
        if layer.qk_norms is not None:
            qk = torch.cat([layer.qk_norms[0](qk[:, :heads]), layer.qk_norms[1](qk[:, heads:])], dim=1)
        qk = torch.addcmul(qk * cos, qk.roll(width // 2, -1), sin)
        layer.own_keys[:, :, self.written] = qk[:, heads:].transpose(0, 1)
        layer.own_values[:, :, self.written] = v.transpose(0, 1)
        # Query heads that share a key head, and responses that share a context, are rows of one product.
        q = qk[:, :heads].unflatten(1, (kv, -1)).transpose(0, 1).contiguous()  # [kv, R, groups, D]
        seen = torch.bmm(q.view(kv * shares, -1, width), layer.keys.flatten(0, 1).transpose(1, 2))
        own = torch.bmm(q.flatten(0, 1), layer.own_keys.flatten(0, 1)[:, :end].transpose(1, 2))
        weights = torch.cat([seen.view(kv, rows, -1, length), own.view(kv, rows, -1, end)], dim=-1)
        if self.hidden is not None:
            weights[..., :length].masked_fill_(self.hidden, -torch.inf)
        weights = weights.softmax(-1)
        seen = torch.bmm(weights[..., :length].reshape(kv * shares, -1, length), layer.values.flatten(0, 1))
        own = weights[..., length:].reshape(kv * rows, -1, end)
        found = torch.baddbmm(seen.view(kv * rows, -1, width), own, layer.own_values.flatten(0, 1)[:, :end])
        return found.view(kv, rows, -1).transpose(0, 1).reshape(rows, -1)


class _Layer(NamedTuple):
    """A layer's keys and values, and what it computes."""

    norm: Product
    qkv: Product
    qk_norms: tuple[Product, Product] | None
    out: Product
    mlp_norm: Product
    gate_up: Product
    activation: Product
    down: Product
    keys: Tensor  # of the contexts, [kv, P, L, D]: P is 1 if all responses have the same one, else R
    values: Tensor
    own_keys: Tensor  # of the responses, [kv, R, budget, D]
    own_values: Tensor

    def whole(self, rows: int, written: int) -> tuple[Tensor, Tensor]:
        """Keys and values of contexts and responses, [R, kv, L + written, D]."""
        pairs = (self.keys, self.own_keys), (self.values, self.own_values)
        keys, values = (torch.cat([read.expand(-1, rows, -1, -1), own[:, :, :written]], dim=2) for read, own in pairs)
        return keys.transpose(0, 1), values.transpose(0, 1)

    def select(self, rows: Tensor) -> _Layer:
        """The layer for some of the responses."""
        found = self._replace(own_keys=self.own_keys[:, rows], own_values=self.own_values[:, rows])
        if self.keys.shape[1] == 1:
            return found
        return found._replace(keys=self.keys[:, rows], values=self.values[:, rows])


def _layer(layer: Any, keys: Tensor, values: Tensor, owner: Tensor, budget: int) -> _Layer:
    attention, mlp, count = layer.self_attn, layer.mlp, len(owner)
    keys, values = (x.transpose(0, 1) if len(x) == 1 else x.transpose(0, 1)[:, owner] for x in (keys, values))
    return _Layer(
        norm=_norm(layer.input_layernorm),
        qkv=product_of([attention.q_proj, attention.k_proj, attention.v_proj]),
        qk_norms=(_norm(attention.q_norm), _norm(attention.k_norm)) if hasattr(attention, "q_norm") else None,
        out=product_of([attention.o_proj]),
        mlp_norm=_norm(layer.post_attention_layernorm),
        gate_up=product_of([mlp.gate_proj, mlp.up_proj]),
        activation=mlp.act_fn,
        down=product_of([mlp.down_proj]),
        keys=keys,
        values=values,
        own_keys=keys.new_empty(len(keys), count, budget, keys.shape[3]),
        own_values=values.new_empty(len(values), count, budget, values.shape[3]),
    )


def _norm(norm: Any) -> Product:
    """An RMS norm, as one operator."""
    weight, epsilon = norm.weight, norm.variance_epsilon
    return lambda x: F.rms_norm(x, weight.shape, weight, epsilon)
