"""BitNet's norms of what o_proj and down_proj get, and its activation.

Adds       `BitDecoder`, whose attention and MLPs have a norm more; the activation reglu2.
Seam       Family.decoder; Attention.sub_norm and MLP.sub_norm; a row of ACTS.
Source     https://arxiv.org/abs/2504.12285
Remove     delete this file; the model_type bitnet then says that it needs it.
"""

from __future__ import annotations

import torch.nn.functional as F

import nanollama
from nanollama import MLP, Attention, Decoder, DecoderLayer, ModelConfig, Weights

nanollama.ACTS["reglu2"] = lambda gate, up: F.relu(gate).square() * up


class BitAttention(Attention):
    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, index: int) -> None:
        super().__init__(config, weights, prefix, index)
        width = config.n_heads * config.head_dim
        self.sub_norm = nanollama.make_norm(config, weights, f"{prefix}.attn_sub_norm", width)


class BitLayer(DecoderLayer):
    mixer = BitAttention

    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        super().__init__(config, weights, index)
        assert isinstance(self.mlp, MLP)
        name = f"model.layers.{index}.mlp.ffn_sub_norm"
        self.mlp.sub_norm = nanollama.make_norm(config, weights, name, config.n_ff)


class BitDecoder(Decoder):
    layer = BitLayer
