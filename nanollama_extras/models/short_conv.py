"""LFM2's layers: gated short convolutions beside attention.

Adds       `ShortConv`, a layer whose state is the last inputs of a convolution over a few tokens;
           `ShortConvDecoder`, which has it or attention in each layer, and MLPs or experts.
Seam       Family.gguf_layout and Family.decoder. models.hybrid_config reads the configs,
           models.recurrent keeps the states, models.routers has the experts of LFM2-MoE.
Source     https://arxiv.org/abs/2511.23404 (LFM2)
           https://github.com/huggingface/transformers (src/transformers/models/lfm2)
Remove     delete this file and the rows of these families.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nanollama import Attention, DecoderLayer, ModelConfig, Norm, TensorSource, Weights
from nanollama_extras.models.recurrent import Inputs, RecurrentDecoder, RecurrentMixer
from nanollama_extras.models.routers import RoutedMoE


def gguf_layout(
    tensors: Mapping[str, TensorSource], config: ModelConfig
) -> dict[str, TensorSource]:
    """Tensors of GGUF files under the decoder's names."""
    named: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        ours = "model.norm.weight" if name == "token_embd_norm.weight" else name
        if ".shortconv." in name:
            ours = name.replace("blk.", "model.layers.").replace(".shortconv.", ".conv.")
        named[ours] = tensor
    return named


class ShortConv(RecurrentMixer):
    """y = C conv(B x) for in_proj's output B | C | x, with a filter for each channel."""

    kernel = "short_conv"

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        C, taps, has_bias = config.n_embd, config.own["taps"], config.own["conv_bias"]
        self.taps, self.num_floats, self.width = taps, (taps - 1) * C, C
        self.in_proj = weights.linear({f"{prefix}.in_proj": 3 * C}, C, has_bias)
        self.out_proj = weights.linear({f"{prefix}.out_proj": C}, C, has_bias)
        name = f"{prefix}.conv.weight"
        shape = (C, 1, taps) if len(weights.tensors[name].shape) == 3 else (C, taps)
        conv = weights.take(name, *shape, dtype=torch.float32)
        self.conv = conv.view(C, taps).T.contiguous()  # (taps, C)
        self.bias = None
        if has_bias:
            self.bias = weights.take(f"{prefix}.conv.bias", C, dtype=torch.float32)
        fits = C % 16 == 0 and taps <= 8
        self.run_kernel = getattr(weights.backend, "run_kernel", None) if fits else None

    def inputs(self, x: Tensor, norm: Norm | None) -> Inputs:
        return (self.in_proj(x, norm=norm),)

    def kernel_fields(self, inputs: Inputs) -> dict[str, Any]:
        (x,) = inputs
        fields = {"x": x, "conv": self.conv, "bias": self.bias}
        return {**fields, "cols": self.width, "taps": self.taps}

    def scan_span(self, inputs: Inputs, state: Tensor) -> Tensor:
        b, c, x = inputs[0].float().chunk(3, dim=1)
        tail = state.view(-1, self.width)
        seen = torch.cat((tail, b * x))  # (taps - 1 + n, C)
        tail.copy_(seen[len(x) :])
        return c * F.conv1d(seen.T, self.conv.T.unsqueeze(1), self.bias, groups=self.width).T


class ShortConvLayer(DecoderLayer):
    mixture = RoutedMoE

    @staticmethod
    def mixer(  # type: ignore[override]
        config: ModelConfig, weights: Weights, prefix: str, index: int
    ) -> Attention | ShortConv:
        if config.windows[index] == 0:
            return ShortConv(config, weights, prefix.replace("self_attn", "conv"))
        return Attention(config, weights, prefix, index)


class ShortConvDecoder(RecurrentDecoder):
    layer = ShortConvLayer
