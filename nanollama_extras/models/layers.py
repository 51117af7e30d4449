"""Layers that differ from Llama's: norms of other kinds and in other places, a norm of whole
queries and keys or after RoPE, attention sinks, the MLP beside attention.

Adds       `VariedDecoder`, whose layers are built as ModelConfig's `norms`, `parallel`, `qk_norm`
           and `sinks` say; LayerNorm and norms without a weight; activations.
Seam       Family.decoder names `VariedDecoder`. The core asks `make_norm` for a norm of another
           kind than RMSNorm. The activations are rows of ACTS. Imports kernels.arrays.
Remove     delete this file; a model with such layers then says that it needs it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import nanollama
from nanollama import (
    POST_NORMS,
    Attention,
    Batch,
    Decoder,
    DecoderLayer,
    KVCache,
    ModelConfig,
    Norm,
    Rotation,
    Weights,
)
from nanollama_extras.kernels.arrays import F, torch

if TYPE_CHECKING:
    from torch import Tensor


def clamped_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """gpt-oss's activation: https://github.com/openai/gpt-oss/blob/main/gpt_oss/torch/model.py"""
    gate = gate.clamp(max=7.0)
    return gate * torch.sigmoid(1.702 * gate) * (up.clamp(-7.0, 7.0) + 1)


nanollama.ACTS["clamped_swiglu"] = clamped_swiglu


class LayerNorm(Norm):
    """A norm that subtracts the mean (https://arxiv.org/abs/1607.06450)."""

    is_centred = True

    def plain(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.weight, self.bias, self.eps)


def make_norm(config: ModelConfig, weights: Weights, name: str, width: int) -> Norm:
    """The norm of the kind `config.norm`: weightless, layer (without a bias) or layer_bias."""
    if config.norm == "weightless":
        ones = torch.ones(width, device=weights.device, dtype=weights.dtype)
        return Norm(weights.backend, ones, config.norm_eps)
    bias = weights.take(f"{name}.bias", width) if config.norm == "layer_bias" else None
    weight = weights.take(f"{name}.weight", width)
    return LayerNorm(weights.backend, weight, config.norm_eps, bias)


class VariedAttention(Attention):
    """Attention with sinks, or with a norm of all heads together or of each head after RoPE."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, index: int) -> None:
        super().__init__(config, weights, prefix, index)
        self.qk_norm, D = config.qk_norm, config.head_dim
        if self.qk_norm not in ("", "head"):
            self.q_norm, self.k_norm = (
                nanollama.make_norm(
                    config,
                    weights,
                    f"{prefix}.{name}",
                    num_heads * D if self.qk_norm == "full" else D,
                )
                for name, num_heads in (("q_norm", config.n_heads), ("k_norm", config.n_kv_heads))
            )
        if config.sinks:
            name = f"{prefix}.sinks.weight"
            self.sinks = weights.take(name, config.n_heads, dtype=torch.float32)

    def turned(self, x: Tensor, norm: Norm | None, rotation: Rotation) -> Tensor:
        """Queries or keys (N, heads, D), normed and rotated to their positions"""
        if norm is not None and self.qk_norm == "after_rope":
            return norm(super().turned(x, None, rotation))
        if norm is not None and self.qk_norm == "full":
            x, norm = norm(x.flatten(1)).view(x.shape), None
        return super().turned(x, norm, rotation)


class VariedLayer(DecoderLayer):
    """A layer with norms before or after its blocks, or both, or with the MLP beside attention."""

    mixer = VariedAttention

    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        super().__init__(config, weights, index)
        self.parallel = config.parallel
        self.post_self_attn_layernorm, self.post_mlp_layernorm = (
            nanollama.make_norm(config, weights, f"model.layers.{index}.{name}", config.n_embd)
            if name in config.norms
            else None
            for name in POST_NORMS
        )

    def __call__(self, x: Tensor, rotation: Rotation, cache: KVCache, batch: Batch) -> Tensor:
        norm, post = self.input_layernorm, self.post_self_attn_layernorm
        added = self.self_attn(x, norm, rotation, cache, batch, None if post else x)
        h = post(added, x) if post else added
        norm, post = self.post_attention_layernorm, self.post_mlp_layernorm
        if self.parallel:
            return self.mlp(x, self.input_layernorm, h)
        added = self.mlp(h, norm, None if post else h)
        return post(added, h) if post else added  # (N, C)


class VariedDecoder(Decoder):
    layer = VariedLayer
