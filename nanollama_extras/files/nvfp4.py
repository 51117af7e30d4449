"""Weights in NVFP4 in safetensors files, packed as they are there.

Adds       the quant_method `modelopt` (quant_algo NVFP4, FP8 and both mixed), and `float4` for
           files.compressed (nvfp4-pack-quantized): a byte holds the 4-bit floats of columns 2i and
           2i + 1, 16 columns share a scale in FP8, and all of them one in float32.
Seam       a row of METHODS in files.quantized, which it imports, as it does files.fp8 and
           kernels.fine.
Source     https://docs.nvidia.com/deeplearning/cudnn (Block Scaling)
           https://github.com/NVIDIA/Model-Optimizer (modelopt/torch/quantization/qtensor)
Remove     delete this file and its row of METHODS; such files then say that they need it.

Twice a 4-bit float is an integer up to 12, so the repacking is exact. Where 64 does not divide the
columns, weights become such integers in 8 bits.
"""

from __future__ import annotations

import functools
import math
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
from nanollama_extras.kernels.fine import Fine, FineLinear

GROUP = 16
BLOCK = 64  # columns of a block of kernels.fine


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
        factor = float(cast("Tensor", whole.load()))
        scale = cast("Tensor", scales.load(at))
        return packed_floats(codes, scale, 1 / factor if divides and factor else factor)

    bits = memory_bits(num_cols)
    return packed_source("NVFP4", (num_rows, num_cols), bits, load, weight, scales, whole)


def memory_bits(num_cols: int) -> float:
    """Bits of a weight in memory"""
    return 9 if num_cols % BLOCK else 4.5


def packed_floats(codes: Tensor, scale: Tensor, factor: float = 1.0) -> PackedLinear:
    """4-bit floats (rows, cols) times scales (rows, cols / 16) in E4M3 and a factor. Raises
    CheckpointError for numbers that are not finite."""
    bits = scale.view(torch.uint8)
    if bool((bits & 127 == 127).any()) or not math.isfinite(factor):
        raise CheckpointError("a scale is infinite or NaN")
    if codes.shape[-1] % BLOCK:
        q = torch.tensor(FLOAT4, dtype=torch.int8)[codes.long()].unflatten(-1, (-1, GROUP))
        return grouped(q, scale.float() * (factor / 2))
    codes = codes ^ (bits >> 7 << 3).repeat_interleave(GROUP, -1)  # the sign of a scale
    # E4M3 is read times 2^-8
    return FineLinear(
        Fine("SCALES_FLOAT", 4, codes, tuple(FLOAT4), bits & 127, None, unit=128 * factor)
    )
