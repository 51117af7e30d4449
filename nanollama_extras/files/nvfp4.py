"""Weights in NVFP4 in safetensors files, packed as 8-bit integers in groups of 16.

Adds       the quant_method `modelopt` (quant_algo NVFP4, FP8 and both mixed), and `float4` for
           files.compressed (nvfp4-pack-quantized): a byte holds the 4-bit floats of columns 2i and
           2i + 1, 16 columns share a scale in FP8, and all of them one in float32.
Seam       a row of METHODS in files.quantized, which it imports, as it does files.fp8.
Source     https://docs.nvidia.com/deeplearning/cudnn (Block Scaling)
           https://github.com/NVIDIA/Model-Optimizer (modelopt/torch/quantization/qtensor)
Remove     delete this file and its row of METHODS; such files then say that they need it.

Twice a 4-bit float is an integer up to 12, so the repacking is exact.
"""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor

from nanollama import FLOAT4, CheckpointError, PackedLinear, TensorSource, excerpt
from nanollama_extras.files import fp8
from nanollama_extras.files.quantized import (
    Packing,
    Settings,
    Tensors,
    check_found,
    choice,
    grouped,
    packed_source,
    part_of,
    stems,
    unpacked_bits,
)

GROUP = 16


def packing(settings: Settings) -> Packing:
    """For the quant_method modelopt. Raises CheckpointError."""
    if choice(settings, "quant_algo", "NVFP4", "MIXED_PRECISION", "FP8") == "FP8":
        return functools.partial(fp8.packed_tensors, block=None, suffix=".weight_scale")
    choice(settings, "group_size", GROUP, default=GROUP)
    return packed_tensors


def packed_tensors(tensors: Tensors) -> Tensors:
    """The tensors, with the packed NAME.weight in place of itself and its scales. FP8 weights are
    packed, too."""
    found = {name: t for name, t in tensors.items() if not name.endswith(fp8.UNUSED)}
    names = list(stems(tensors, ".weight_scale"))
    check_found(names, "NVFP4", ".weight_scale")
    for name in names:
        weight, scale = f"{name}.weight", f"{name}.weight_scale"
        if weight in tensors and tensors[weight].kind == fp8.FP8:
            found[weight] = fp8.float8(tensors, weight, scale, None)
        else:
            found[weight] = float4(tensors, weight, scale, f"{name}.weight_scale_2")
            del found[f"{name}.weight_scale_2"]
        del found[scale]
    fp8.check_scaled(found)
    return found


def float4(
    tensors: Tensors, name: str, scale_name: str, whole_name: str, divides: bool = False
) -> TensorSource:
    """The packed matrix of a weight (rows, cols / 2), its scales (rows, cols / 16) and the scale of
    all, which multiplies or `divides`. Raises CheckpointError."""
    weight = part_of(tensors, name, "U8", (-1, -1))
    num_rows, num_cols = weight.shape[0], 2 * weight.shape[1]
    if num_cols % 32:
        raise CheckpointError(f"tensor {excerpt(name)} has {num_cols} columns; 32 must divide them")
    scales = part_of(tensors, scale_name, fp8.FP8, (num_rows, num_cols // GROUP))
    given = tensors.get(whole_name)
    whole = part_of(tensors, whole_name, "F32", (1,) if given and given.shape == (1,) else ())

    def load(at: slice | Tensor = slice(None)) -> PackedLinear:
        codes = unpacked_bits(cast("Tensor", weight.load(at)), 4)
        factor = cast("Tensor", whole.load()).reshape(())
        scale = cast("Tensor", scales.load(at)).float()
        return packed_floats(codes, scale / factor if divides else scale * factor)

    return packed_source("NVFP4", (num_rows, num_cols), 9, load, weight, scales, whole)


def packed_floats(codes: Tensor, scale: Tensor) -> PackedLinear:
    """4-bit floats (rows, cols) times scales (rows, cols / 16)"""
    q = torch.tensor(FLOAT4, dtype=torch.int8)[codes.long()].unflatten(-1, (-1, GROUP))
    return grouped(q, scale / 2)
