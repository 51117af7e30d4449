"""Gemma 4's layers: heads of two widths, keys and values that layers share, an embedding of each
token for each layer, experts beside the MLP.

Adds       `Gemma4Decoder`. Its table of embeddings for layers stays in the file.
Seam       Family.layout, Family.gguf_layout and Family.decoder. models.gemma_config reads the
           configs, models.grouped_cache keeps keys and values; imports models.layers and
           models.whole_images.
Source     https://github.com/huggingface/transformers (src/transformers/models/gemma4)
Remove     delete this file; the families that name it then say that they need it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import nanollama
from nanollama import (
    Attention,
    Batch,
    CheckpointError,
    Decoder,
    KVCache,
    ModelConfig,
    MoE,
    Norm,
    PackedLinear,
    Rotation,
    Scheduler,
    TensorSource,
    Weights,
)
from nanollama_extras.models.gemma_config import Gemma4Shape
from nanollama_extras.models.grouped_cache import GroupedCache, head_groups
from nanollama_extras.models.layers import VariedLayer
from nanollama_extras.models.whole_images import MOST_TOKENS, ImageScheduler

TABLE = "model.embed_tokens_per_layer.weight"
PROJECTION = "model.per_layer_model_projection"
GELU = 7  # of the kernels' activations
GGUF_NAMES = {
    r"blk\.(\d+)\.ffn_gate_inp\.scale": r"model.layers.\1.mlp.gate.scale",
    r"blk\.(\d+)\.ffn_down_exps\.scale": r"model.layers.\1.mlp.gate.per_expert_scale",
}


def hub_layout(tensors: Mapping[str, TensorSource], config: ModelConfig) -> dict[str, TensorSource]:
    """The tensors, of which the table of embeddings for layers stays in the file."""
    kept = dict(tensors)
    if TABLE in kept:
        kept[TABLE] = dataclasses.replace(kept[TABLE], stays=True)
    return kept


def gguf_layout(
    tensors: Mapping[str, TensorSource], config: ModelConfig
) -> dict[str, TensorSource]:
    """As `hub_layout`, for tensors of GGUF files. Raises CheckpointError."""
    if "rope_freqs.weight" not in tensors:  # which columns turn
        raise CheckpointError("tensor rope_freqs.weight is missing")
    named: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        for pattern, ours in GGUF_NAMES.items():
            name = re.sub(pattern, ours, name)
        named[name] = tensor
    return hub_layout(named, config)


class Gemma4Attention(Attention):
    """Attention of normed values, or a layer that reads the keys and values of an earlier one."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, index: int) -> None:
        shape: Gemma4Shape = config.own["shape"]
        source = shape.sources[index]
        before = config.windows[:source]
        self.group = int(config.windows[source] is not None)
        self.is_reader = source != index
        view = head_groups(config)[self.group]
        v_proj = f"{prefix}.v_proj.weight"
        if shape.k_is_v and not self.group and v_proj not in weights.tensors:
            key = f"{prefix}.k_proj.weight"
            found = weights.tensors.get(key)
            weights.tensors = {**weights.tensors, **({v_proj: found} if found else {})}
        if self.is_reader:
            self.read_only(view, weights, prefix, source)
        else:
            super().__init__(view, weights, prefix, index)
        self.index = len([w for w in before if w != 0 and (w is not None) == self.group])
        ones = torch.ones(view.head_dim, device=weights.device, dtype=weights.dtype)
        self.v_norm = Norm(weights.backend, ones, config.norm_eps)

    def read_only(self, config: ModelConfig, weights: Weights, prefix: str, source: int) -> None:
        """`__init__` of a layer that has queries only."""
        C, H, Hkv, D = config.n_embd, config.n_heads, config.n_kv_heads, config.head_dim
        self.backend, self.head_dim, self.sizes = weights.backend, D, (H, Hkv, Hkv)
        self.qkv_proj = weights.linear({f"{prefix}.q_proj": H * D}, C, config.qkv_bias)
        self.o_proj = weights.linear({f"{prefix}.o_proj": C}, H * D, config.o_bias)
        names = f"{prefix}.q_norm", f"model.layers.{source}.self_attn.k_norm"
        self.q_norm, self.k_norm = (nanollama.make_norm(config, weights, n, D) for n in names)
        unused = ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias", "k_norm.weight")
        weights.used |= {f"{prefix}.{name}" for name in unused}

    def heads(self, qkv: Tensor, rotation: Rotation) -> nanollama.Heads:
        q, k, v = super().heads(qkv, rotation)
        return q, k, self.v_norm(v)


class Gemma4MoE(MoE):
    """Experts whose router has a norm of its own, and a factor on each expert's weight."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        super().__init__(config, weights, prefix)
        scale = weights.take(f"{prefix}.gate.scale", config.n_embd) * config.n_embd**-0.5
        self.router_norm = Norm(weights.backend, scale, config.norm_eps)
        name = f"{prefix}.gate.per_expert_scale"
        self.scales = weights.take(name, self.config.count, dtype=torch.float32)

    def __call__(self, x: Tensor, norm: Norm | None, residual: Tensor | None = None) -> Tensor:
        return self.backend.experts(self, norm(x) if norm else x, residual, self.router_norm(x))

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        weight, chosen = super().choose(scores)
        return weight * self.scales[chosen], chosen


class Gemma4Layer(VariedLayer):
    mixer = Gemma4Attention  # type: ignore[assignment]

    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        shape: Gemma4Shape = config.own["shape"]
        n_ff = shape.n_ffs[index]
        super().__init__(dataclasses.replace(config, n_ff=n_ff, experts=None), weights, index)
        prefix, C, self.index = f"model.layers.{index}", config.n_embd, index
        self.experts = Gemma4MoE(config, weights, f"{prefix}.mlp") if config.experts else None
        if self.experts:
            names = "post_mlp_layernorm_1", "post_attention_layernorm_2", "post_mlp_layernorm_2"
            self.mlp_norm, self.experts_norm, self.sum_norm = (
                nanollama.make_norm(config, weights, f"{prefix}.{name}", C) for name in names
            )
        if P := shape.per_layer:
            self.per_layer_input_gate = weights.linear({f"{prefix}.per_layer_input_gate": P}, C)
            self.per_layer_projection = weights.linear({f"{prefix}.per_layer_projection": C}, P)
            name = f"{prefix}.post_per_layer_input_norm"
            self.post_per_layer_input_norm = nanollama.make_norm(config, weights, name, C)
        self.width, run = P, getattr(weights.backend, "run_kernel", None)
        self.run_kernel = run if C % 16 == 0 else None
        scalar, self.scalar = f"{prefix}.layer_scalar.weight", 1.0
        if scalar in weights.tensors:
            self.scalar = weights.take(scalar, 1, dtype=torch.float32).item()

    def __call__(self, x: Tensor, rotation: Rotation, cache: KVCache, batch: Batch) -> Tensor:
        added = self.self_attn(x, self.input_layernorm, rotation, cache, batch, None)
        h = cast("Norm", self.post_self_attn_layernorm)(added, x)
        added = self.mlp(h, self.post_attention_layernorm)
        if self.experts:
            added = self.sum_norm(self.experts(h, self.experts_norm), self.mlp_norm(added))
        h = cast("Norm", self.post_mlp_layernorm)(added, h)
        if self.width:
            added = self.gated(self.per_layer_input_gate(h), batch.memo["per_layer"])
            h = self.post_per_layer_input_norm(self.per_layer_projection(added), h)
        return h if self.scalar == 1 else self.scaled(h, self.scalar)

    def scaled(self, x: Tensor, factor: float) -> Tensor:
        return x * factor if self.run_kernel is None else self.product(x, factor=factor)

    def gated(self, gate: Tensor, inputs: Tensor) -> Tensor:
        """GELU of the gate (N, P), times this layer's part of the inputs (N, L P)"""
        own = inputs[:, self.index * self.width :]
        if self.run_kernel is None or self.width % 16:
            return F.gelu(gate, approximate="tanh") * own[:, : self.width]
        return self.product(gate, times=own, stride=inputs.size(1), before=GELU, factor=1.0)

    def product(self, x: Tensor, **fields: Any) -> Tensor:
        """The kernel of this name."""
        run = cast("Any", self.run_kernel)
        return cast("Tensor", run("product", torch.empty(x.shape), x=x, cols=x.size(1), **fields))


class PerLayerInputs:
    """The input of every layer beside the stream: an embedding of the token, from a table in the
    file, and a projection of the stream's start, which is normed for each layer."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        shape: Gemma4Shape = config.own["shape"]
        self.width, self.num_rows = shape.per_layer, shape.table_rows
        self.device, self.dtype = weights.device, weights.dtype
        L, P, C = config.n_layers, shape.per_layer, config.n_embd
        self.cols = L * P
        self.table = weights._find(TABLE, (shape.table_rows, self.cols))
        self.factor = (P / 2) ** 0.5
        self.run_kernel = getattr(weights.backend, "run_kernel", None) if P % 16 == 0 else None
        self.projection = weights.linear({PROJECTION: self.cols}, C)
        norm = weights.take("model.per_layer_projection_norm.weight", P) * 0.5**0.5
        self.norm = Norm(weights.backend, norm, config.norm_eps * C)

    def rows(self, token_ids: Tensor) -> Tensor:
        """Rows of the table, times the factor, (N,) -> (N, L P)"""
        known = torch.where(token_ids < self.num_rows, token_ids, 0).cpu()
        ids, places = known.unique(return_inverse=True)
        found = [self.table.load(slice(i, i + 1)) for i in ids.tolist()]
        floats = [row.dequantize() if isinstance(row, PackedLinear) else row for row in found]
        table = torch.cat([row.to(self.dtype) for row in floats])
        return table.to(self.device)[places.to(self.device)] * self.factor

    def __call__(self, x: Tensor, rows: Tensor) -> Tensor:
        """The stream's start (N, C) and the rows of its tokens -> (N, L P)"""
        y, norm = self.projection(x), self.norm
        if self.run_kernel is None:
            return norm(y.unflatten(1, (-1, self.width))).flatten(1) + rows
        parts = {"cols": self.width, "num_parts": self.cols // self.width}
        out, fields = torch.empty(y.shape), {"weight": norm.weight, "eps": norm.eps, **parts}
        return cast("Tensor", self.run_kernel("norm", out, x=y, residual=rows, **fields))


class Gemma4Decoder(Decoder):
    layer = Gemma4Layer
    is_recordable = False  # as a CUDA graph, which knows one cache

    def __init__(self, config: ModelConfig, weights: Weights, kv_dtype: str = "auto") -> None:
        has_inputs = config.own["shape"].per_layer
        self.per_layer = PerLayerInputs(config, weights) if has_inputs else None
        self.scheduler = ImageScheduler if config.own.get("whole_images") else Scheduler
        super().__init__(config, weights, kv_dtype)

    def new_cache(self, num_slots: int, most_new: int = 0, **saving: Any) -> KVCache:
        whole_images = bool(self.config.own.get("whole_images"))
        if whole_images:
            self.most_image = max(most_new, MOST_TOKENS)
            most_new = most_new and self.most_image
        caches = [
            self.backend.new_cache(view, num_slots, self.kv_dtype, most_new)
            for view in head_groups(self.config)
        ]
        return cast("KVCache", GroupedCache(caches, whole_images))

    def prepare(self, batch: Batch) -> None:
        """Read the rows of a batch's tokens from the file, before a step that may be recorded."""
        if self.per_layer is None:
            return
        num = sum(span.num_new for span in batch.spans)
        rows = self.per_layer.rows(batch.token_ids[:num])
        if "rows" not in batch.memo:
            batch.memo["rows"] = rows.new_zeros(len(batch.token_ids), rows.size(1))
        batch.memo["rows"][:num] = rows

    def hidden(self, batch: Batch, cache: KVCache) -> Tensor:
        rotations = batch.rotations or self.rotations(batch, cache)
        x = self.embedded(batch)
        for layer, rope in zip(self.layers, self.config.layer_ropes):
            x = layer(x, rotations[rope], cache, batch)
        return self.merged(x)

    def embedded(self, batch: Batch) -> Tensor:
        """The first layer's input; the batch gets what layers have beside it."""
        x = self.embed(batch)
        if self.per_layer is not None:
            if "rows" not in batch.memo:
                self.prepare(batch)
            batch.memo["per_layer"] = self.per_layer(x, batch.memo["rows"])
        return x

    def merged(self, x: Tensor) -> Tensor:
        """The last layer's output as one stream (N, C)"""
        return x
