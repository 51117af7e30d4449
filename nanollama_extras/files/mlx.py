"""Weights as MLX quantizes them in safetensors files: NAME.weight, NAME.scales and NAME.biases.

Adds       the modes `affine` (2, 3, 4, 5, 6 and 8 bits, in groups of 32, 64 or 128 columns),
           `mxfp4`, `mxfp8` and `nvfp4`, with settings for single layers.
Seam       a row of METHODS in files.quantized, which it imports, as it does files.fp8,
           files.mxfp4 and files.nvfp4.
Source     https://ml-explore.github.io/mlx (mlx.core.quantize, mlx.core.dequantize)
           https://github.com/ml-explore/mlx-lm (models/switch_layers.py, utils.py)
Remove     delete this file and its row of METHODS; MLX's files then say that they need it.

weight (.., rows, words) uint32 holds the numbers q of a row from the lowest bits on, across borders
of words. w = q * scale + bias, with scales and biases (.., rows, cols / group), is exact in groups
of 32 columns: 2 and 3 bits in 4, and 5 and 6 bits in 8. The modes of floats have no biases, and
scales of 8 bits: powers of two (mxfp4, mxfp8) or FP8 (nvfp4).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

import nanollama
from nanollama import GROUP, CheckpointError, PackedLinear, TensorSource, excerpt
from nanollama_extras.files import fp8, mxfp4, nvfp4
from nanollama_extras.files.quantized import (
    FLOATS,
    Packing,
    Settings,
    Tensors,
    affine,
    check_found,
    check_width,
    choice,
    packed_source,
    part_of,
    renamed,
    spread,
    stems,
    unpacked_bits,
)

# Modes of floats -> bits, columns that share a scale, and bits of a weight in memory
MODES = {"mxfp4": (4, GROUP, 4.5), "mxfp8": (8, GROUP, 8.5), "nvfp4": (4, 16, 9)}


@dataclass(frozen=True, slots=True)
class Layout:
    bits: int
    group: int  # columns that share a scale
    mode: str


def packing(settings: Settings) -> Packing:
    """For `quantization`, with perhaps a dict for a layer of its own. Raises CheckpointError."""
    own = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            merged = {name: settings.get(name) for name in ("bits", "group_size", "mode")}
            own[plain_name(key)] = layout_of({**merged, **value})
    return functools.partial(packed_tensors, usual=layout_of(settings), own=own)


def layout_of(settings: Mapping[str, Any]) -> Layout:
    mode = choice(settings, "mode", "affine", *MODES, default="affine")
    if mode in MODES:
        bits, group, _ = MODES[mode]
        return Layout(choice(settings, "bits", bits), choice(settings, "group_size", group), mode)
    bits = choice(settings, "bits", 2, 3, 4, 5, 6, 8)
    return Layout(bits, choice(settings, "group_size", 32, 64, 128), mode)


def plain_name(name: str) -> str:
    """A name in MLX's files -> Hugging Face's: experts are stacked as (E, rows, words)."""
    return name.removeprefix("language_model.").replace(".switch_mlp.", ".experts.")


def packed_tensors(tensors: Tensors, usual: Layout, own: Mapping[str, Layout]) -> Tensors:
    """The tensors, with the packed NAME.weight in place of itself, NAME.scales and NAME.biases."""
    found = renamed(tensors, plain_name)
    names = list(stems(found, ".scales"))
    check_found(names, "MLX", ".scales")
    for name in names:
        found[f"{name}.weight"] = matrix(found, name, own.get(name, usual))
        del found[f"{name}.scales"]
        found.pop(f"{name}.biases", None)
    for name, tensor in found.items():
        if name.endswith("conv1d.weight") and tensor.shape[-1] == 1:
            raise CheckpointError(
                f"tensor {excerpt(name)} has MLX's order of axes, which is not supported; take "
                "GGUF or the original model"
            )
        if tensor.kind == "U32":
            raise CheckpointError(f"tensor {excerpt(name)} of type U32 has no scales")
    return found


def matrix(tensors: Tensors, name: str, layout: Layout) -> TensorSource:
    """The packed matrix, or matrices, of a name. Raises CheckpointError."""
    bits, group = layout.bits, layout.group
    is_stack = len(tensors[f"{name}.scales"].shape) == 3
    weight = part_of(tensors, f"{name}.weight", "U32", (-1,) * (2 + is_stack))
    words, num_cols = weight.shape[-1], weight.shape[-1] * 32 // bits
    grouped = *weight.shape[:-1], num_cols // group
    is_float = layout.mode in MODES
    num_groups = tensors[f"{name}.scales"].shape[-1:] or (0,)
    check_width(name, 32 * words / max(1, num_groups[0] * group), bits)
    scales = part_of(tensors, f"{name}.scales", "U8" if is_float else FLOATS, grouped)
    shape = *weight.shape[:-1], num_cols
    if words * 32 % bits or num_cols % group or not num_cols:
        raise CheckpointError(
            f"tensor {excerpt(name)}.weight has {words} words a row; its quantization asks for "
            f"groups of {group} numbers of {bits} bits"
        )
    if is_float:
        load_floats = functools.partial(floats, layout.mode, weight, scales)
        title, in_memory = f"MLX {layout.mode}", MODES[layout.mode][2]
        if layout.mode == "nvfp4":
            in_memory = nvfp4.memory_bits(num_cols)
        return packed_source(title, shape, in_memory, load_floats, weight, scales)
    biases = part_of(tensors, f"{name}.biases", FLOATS, grouped)

    def load(*index: int | slice | Tensor) -> PackedLinear:
        q = unpacked_bits(cast("Tensor", weight.load(*index)), bits)
        scale, bias = (
            spread(cast("Tensor", part.load(*index)).float(), num_cols, group)
            for part in (scales, biases)
        )
        return affine(q, scale, bias, bits, group)

    parts = weight, scales, biases
    return packed_source(f"MLX {bits}-bit", shape, 5 if bits <= 4 else 9, load, *parts)


def floats(mode: str, weight: TensorSource, scales: TensorSource, *index: Any) -> PackedLinear:
    """Rows of a matrix of 4- or 8-bit floats"""
    data, scale = (cast("Tensor", part.load(*index)) for part in (weight, scales))
    if mode == "mxfp8":
        numbers = data.contiguous().view(torch.float8_e4m3fn)
        return fp8.packed_floats(numbers, torch.exp2(scale.float() - 127))
    codes = unpacked_bits(data, 4)
    if mode == "mxfp4":
        return mxfp4.packed_floats(scale, nanollama.pack_nibbles(codes.unflatten(-1, (-1, GROUP))))
    return nvfp4.packed_floats(codes, scale.view(torch.float8_e4m3fn))
