"""gpt-oss's layout of experts in safetensors files.

Adds       experts' matrices from tensors (E, columns, rows), where rows of gate_proj and up_proj
           take turns.
Seam       Family.layout: `split_experts`.
Source     https://github.com/openai/gpt-oss/blob/main/gpt_oss/torch/model.py
Remove     delete this file; the model_type gpt_oss then says that it needs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from nanollama import ModelConfig, TensorSource


def split_experts(
    tensors: Mapping[str, TensorSource], config: ModelConfig
) -> dict[str, TensorSource]:
    """The tensors, with those that hold all experts split into those of each. A tensor of another
    shape stays whole, and the decoder refuses it."""
    split: dict[str, TensorSource] = {}
    count = config.experts.count if config.experts else 0
    for name, tensor in tensors.items():
        stem, _, suffix = name.rpartition(".")
        owner, _, part = stem.rpartition(".")
        if not owner.endswith("mlp.experts") or tensor.shape[:1] != (count,):
            split[name] = tensor
            continue
        is_transposed = len(tensor.shape) == 3 and not tensor.is_packed
        rows = torch.arange(tensor.shape[-1 if is_transposed else min(1, len(tensor.shape) - 1)])
        parts = {part: rows}
        if part == "gate_up_proj":
            parts = {"gate_proj": rows[::2], "up_proj": rows[1::2]}
        for key, part_rows in parts.items():
            for e in range(count):
                expert = transposed_expert if is_transposed else TensorSource.part
                split[f"{owner}.{e}.{key}.{suffix}"] = expert(tensor, part_rows, e)
    return split


def transposed_expert(tensor: TensorSource, rows: Tensor, expert: int) -> TensorSource:
    """These rows of one expert of a tensor (E, columns, rows)."""

    def load(at: slice | Tensor = slice(None)) -> Tensor:
        return cast("Tensor", tensor.load(expert)).T[rows[at]].contiguous()

    nbytes = tensor.nbytes * len(rows) // math.prod(tensor.shape[::2])
    return TensorSource((len(rows), tensor.shape[1]), tensor.kind, nbytes, load)
