"""Llama 4's attention: chunks, layers without positions, norms without weights after RoPE.

Adds       `Llama4Decoder`, whose layers without RoPE scale queries by their position, and whose
           other layers norm queries and keys. Chunks are windows of a kind of their own: see
           `Chunk` of models.families.
Seam       Family.decoder. Imports models.layers and models.routers.
Source     https://github.com/huggingface/transformers (src/transformers/models/llama4)
           https://arxiv.org/abs/2501.19399 (the scale)
Remove     delete this file; the model_type llama4_text then says that it needs it.
"""

from __future__ import annotations

from typing import Any

import torch

from nanollama import Batch, KVCache, ModelConfig, Norm, Rotation, Weights
from nanollama_extras.models.layers import VariedAttention
from nanollama_extras.models.routers import RoutedDecoder, RoutedLayer


class Llama4Attention(VariedAttention):
    """Attention with norms where it has RoPE, if the model has such norms: without weights, so that
    it does not matter that they come before RoPE here."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, index: int) -> None:
        super().__init__(config, weights, prefix, index)
        if config.own["use_qk_norm"] and config.layer_ropes[index] is not None:
            ones = torch.ones(config.head_dim, device=weights.device, dtype=weights.dtype)
            self.q_norm = self.k_norm = Norm(weights.backend, ones, config.norm_eps)


class Llama4Layer(RoutedLayer):
    mixer = Llama4Attention


class Llama4Decoder(RoutedDecoder):
    layer = Llama4Layer

    def rotations(self, batch: Batch, cache: KVCache) -> dict[int | None, Rotation]:
        found, own = super().rotations(batch, cache), self.config.own
        if None in found and own["attn_scale"]:
            lib: Any = self.backend.arrays or torch
            positions = lib.asarray(self.backend.array(batch.positions), dtype=lib.float32)[:, None]
            scale = 1 + own["attn_scale"] * lib.log(1 + (positions + 1) // own["floor_scale"])
            scale = torch.as_tensor(scale).to(self.dtype)
            found[None] = found[None]._replace(q_scale=scale)
        return found
