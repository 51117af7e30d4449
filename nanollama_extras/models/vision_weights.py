"""The vision part of a quantized model's files as floats, which transformers' towers compute with.

Adds       `float_weights`: its tensors where some of them are quantized, or have MLX's order of
           axes. Where the format keeps it in floats, transformers reads the files itself.
Seam       models.vision_towers calls it for a model with ModelConfig.packing, by which the tensors
           become floats; it calls `fitted` with the shapes that transformers' model has.
Remove     delete this file; images for quantized models then name it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nanollama import (
    NOT_TEXT,
    PackedLinear,
    TensorSource,
    read_json,
    read_safetensors,
    weight_files,
)

if TYPE_CHECKING:
    from nanollama import ModelConfig

PLAIN = frozenset("F16 BF16 F32 F64 I64 BOOL".split())  # integers: indices of positions
# Name in MLX's files -> in transformers' models whose vision part is called `visual`
MLX_PREFIX, VISUAL = "vision_tower.", "model.visual."


def is_from_mlx(path: Path) -> bool:
    """Whether MLX wrote the files: it names its settings `quantization`, and copies them."""
    return isinstance(read_json(path / "config.json").get("quantization"), Mapping)


def float_weights(path: Path, config: ModelConfig, dtype: torch.dtype) -> dict[str, Tensor] | None:
    """The tensors beside the text part in `dtype`; None where they are floats as transformers has
    them. Raises CheckpointError."""
    if config.packing is None:
        return None
    tensors: dict[str, TensorSource] = {}
    for name in weight_files(path):
        found = read_safetensors(path / name)
        tensors |= {key: tensor for key, tensor in found.items() if NOT_TEXT.match(key)}
    is_plain = all(tensor.kind in PLAIN for tensor in tensors.values())
    if is_plain and not is_from_mlx(path):
        return None
    sources = tensors if is_plain else config.packing(tensors)
    return {name: floats(source.load(), dtype) for name, source in sources.items()}


def floats(weight: Tensor | PackedLinear, dtype: torch.dtype) -> Tensor:
    """A tensor, its packed integers as floats of `dtype`."""
    plain = weight.dequantize() if isinstance(weight, PackedLinear) else weight
    return plain.to(dtype) if plain.is_floating_point() else plain


def fitted(weights: Mapping[str, Tensor], shapes: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors under the names, and in the order of axes, of transformers' model: MLX has the
    channels of a convolution last."""
    found: dict[str, Tensor] = {}
    for key, tensor in weights.items():
        names = key, f"model.{key}", key.replace(MLX_PREFIX, VISUAL, 1)
        name = next((name for name in names if name in shapes), key)
        if tensor.ndim > 3 and name in shapes and tensor.shape != shapes[name]:
            moved = tensor.movedim(-1, 1)
            tensor = moved.contiguous() if moved.shape == shapes[name] else tensor
        found[name] = tensor
    return found
