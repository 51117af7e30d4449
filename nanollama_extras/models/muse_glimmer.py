"""Muse Glimmer: embeddings that are normed, attention with a gate, queries and keys of one length.

Adds       `MuseDecoder`, and its layouts of tensors.
Seam       Family.layout, .gguf_layout and .decoder. models.families reads the config. Imports
           models.delta_net, whose attention has such a gate, models.families and models.layers.
Source     https://github.com/huggingface/transformers (src/transformers/models/muse_glimmer)
Remove     delete this file and the row of this family.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor

import nanollama
from nanollama import ModelConfig, Norm, Projection, TensorSource, Weights
from nanollama_extras.models.delta_net import GatedAttention
from nanollama_extras.models.families import plus_one
from nanollama_extras.models.layers import VariedDecoder, VariedLayer


def hub_layout(tensors: Mapping[str, TensorSource], config: ModelConfig) -> dict[str, TensorSource]:
    """Tensors of safetensors files as the decoder wants them: norms of layers with 1 added, and
    norms of queries and keys that have the factor between them as their weights."""
    named = {
        name: plus_one(tensor) if name.endswith("layernorm.weight") else tensor
        for name, tensor in tensors.items()
    }
    for i in range(config.n_layers):
        for part, factor in (("q", config.own["qk_scale_factor"]), ("k", 1.0)):
            weight = torch.full((config.head_dim,), factor)
            source = TensorSource((config.head_dim,), "F32", 0, lambda w=weight: w)
            named[f"model.layers.{i}.self_attn.{part}_norm.weight"] = source
    return named


def gguf_layout(
    tensors: Mapping[str, TensorSource], config: ModelConfig
) -> dict[str, TensorSource]:
    """Tensors of GGUF files under the decoder's names."""
    return {
        name.replace("blk.", "model.layers.").replace("attn_gate", "self_attn.gate_proj"): tensor
        for name, tensor in tensors.items()
    }


class NormedTable:
    """A table of embeddings whose rows are normed."""

    def __init__(self, table: Projection, norm: Norm) -> None:
        self.table, self.norm = table, norm

    def __getattr__(self, name: str) -> Any:
        return getattr(self.table, name)

    def rows(self, index: Tensor, factor: float = 1) -> Tensor:
        return self.norm(self.table.rows(index, factor))


class MuseLayer(VariedLayer):
    mixer = GatedAttention  # type: ignore[assignment]

    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        super().__init__(config, weights, index)
        for norm in (self.post_self_attn_layernorm, self.post_mlp_layernorm):
            cast("Norm", norm).eps = config.own["post_norm_eps"]


class MuseDecoder(VariedDecoder):
    layer = MuseLayer

    def __init__(self, config: ModelConfig, weights: Weights, kv_dtype: str = "auto") -> None:
        super().__init__(config, weights, kv_dtype)
        ones = torch.ones(config.n_embd, device=weights.device, dtype=weights.dtype)
        norm = nanollama.Norm(weights.backend, ones, config.norm_eps)
        self.embed_tokens = cast("Projection", NormedTable(self.embed_tokens, norm))
