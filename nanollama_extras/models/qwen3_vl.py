"""Qwen3-VL's layers, which take more of an image than its rows, and its layout of experts.

Adds       `DeepDecoder`: after each of the first layers, a vector is added to each row of an image
           (https://arxiv.org/abs/2406.04334, DeepStack).
           Experts' matrices from tensors (E, columns, rows), as the files on the hub have them;
           transformers 5 writes (E, rows, columns), which the core reads.
Seam       Family.decoder: `DeepDecoder`. Family.layout: `split_experts`, which reads single experts
           by models.gpt_oss.
Source     https://github.com/huggingface/transformers (src/transformers/models/qwen3_vl_moe)
Remove     delete this file; the model_type qwen3_vl_moe_text then says that it needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from nanollama import (
    Batch,
    Decoder,
    DecoderLayer,
    KVCache,
    ModelConfig,
    Rotation,
    TensorSource,
    Weights,
)
from nanollama_extras.models.gpt_oss import transposed_expert


class DeepLayer(DecoderLayer):
    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        super().__init__(config, weights, index)
        self.index = index

    def __call__(self, x: Tensor, rotation: Rotation, cache: KVCache, batch: Batch) -> Tensor:
        y = super().__call__(x, rotation, cache, batch)
        vectors: dict[int, Any] = batch.vectors
        for row, token in vectors.items():
            if self.index < len(token.image.deep):
                y[row] += token.image.deep[self.index][token.index]
        return y


class DeepDecoder(Decoder):
    layer = DeepLayer


def split_experts(
    tensors: Mapping[str, TensorSource], config: ModelConfig
) -> dict[str, TensorSource]:
    """The tensors, with those that hold all experts in columns split into those of each."""
    experts = config.experts
    assert experts is not None
    shape = (experts.count, experts.n_ff, config.n_embd)  # of down_proj's columns
    down, fused = ".experts.down_proj.weight", ".experts.gate_up_proj.weight"
    if shape not in {t.shape for name, t in tensors.items() if name.endswith(down)}:
        return dict(tensors)
    split: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        if not name.endswith((down, fused)) or len(tensor.shape) != 3:
            split[name] = tensor
            continue
        owner, part, _ = name.rsplit(".", 2)
        rows = torch.arange(tensor.shape[-1])
        parts = dict(zip(("gate_proj", "up_proj"), rows.chunk(2))) if part != "down_proj" else {}
        for key, part_rows in (parts or {part: rows}).items():
            for e in range(tensor.shape[0]):
                split[f"{owner}.{e}.{key}.weight"] = transposed_expert(tensor, part_rows, e)
    return split
