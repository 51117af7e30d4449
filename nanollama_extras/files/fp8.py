"""Weights in FP8 (E4M3) in safetensors files, packed as 8-bit integers.

Adds       the quant_methods `fp8` (Qwen, DeepSeek, MiniMax, Mistral) and `fbgemm_fp8`, and `float8`
           for files.compressed: NAME.weight of FP8 beside NAME.weight_scale_inv or
           NAME.weight_scale, which is one number, one a row, or one a block of rows and columns.
Seam       rows of METHODS in files.quantized, which it imports.
Source     https://arxiv.org/abs/2209.05433 (FP8), 2412.19437 (scales of blocks, DeepSeek-V3)
Remove     delete this file and its rows of METHODS; FP8 files then say that they need it.

An FP8 number has 4 significant bits. In each group of 32 columns the unit of the integers is 1/64
of the power of two below the largest number, so numbers of at least 1/8 of that power, thus most,
are exact; smaller ones are rounded to the unit.
"""

from __future__ import annotations

import functools
from typing import cast

import torch
from torch import Tensor

from nanollama import GROUP, CheckpointError, PackedLinear, TensorSource, check_value, excerpt
from nanollama_extras.files.quantized import (
    FLOATS,
    Packing,
    Settings,
    Tensors,
    check_found,
    choice,
    grouped,
    packed_source,
    part_of,
    renamed,
    rounded,
    spread,
    stems,
)

Block = tuple[int, int]
FP8 = "F8_E4M3"
SCALES = f"{FLOATS} F8_E8M0"
# suffixes of tensors that only matter where activations or the cache are FP8, too
UNUSED = (".input_scale", ".activation_scale", ".input_scale_ub", ".k_scale", ".v_scale")


def packing(settings: Settings) -> Packing:
    """For the quant_methods fp8 and fbgemm_fp8. Raises CheckpointError."""
    choice(settings, "expert_dtype", "fp8", default="fp8")
    choice(settings, "fmt", "e4m3", "float8_e4m3fn", default="e4m3")
    block = block_of(settings, "weight_block_size")
    is_channel = settings["quant_method"] == "fbgemm_fp8"
    suffix = ".weight_scale" if is_channel else ".weight_scale_inv"
    return functools.partial(packed_tensors, block=block, suffix=suffix)


def block_of(settings: Settings, key: str) -> Block | None:
    """The rows and columns that share a scale; None for scales of rows or matrices."""
    value = settings.get(key)
    if value is None:
        return None
    sizes = value if isinstance(value, list) else []
    is_valid = len(sizes) == 2 and all(type(n) is int and 0 < n < 2**31 for n in sizes)
    check_value(is_valid, f"quantization_config: {key}", value, "a list of two sizes")
    return sizes[0], sizes[1]


def packed_tensors(tensors: Tensors, block: Block | None, suffix: str) -> Tensors:
    """The tensors with each FP8 weight and its scale as one tensor."""
    tensors = renamed(tensors, lambda name: name.replace("_proj_scale_inv", "_proj" + suffix))
    found = {name: t for name, t in tensors.items() if not name.endswith(UNUSED)}
    names = [f"{stem}.weight" for stem in stems(tensors, suffix)]
    check_found(names, "FP8", suffix)
    for name in names:
        scale = name.removesuffix(".weight") + suffix
        found[name] = float8(tensors, name, scale, block)
        del found[scale]
    check_scaled(found)
    return found


def check_scaled(tensors: Tensors) -> None:
    """Raises CheckpointError for FP8 numbers that are left without a scale."""
    for name, tensor in tensors.items():
        if tensor.kind.startswith("F8_"):
            raise CheckpointError(f"tensor {excerpt(name)} of type {tensor.kind} has no scale")


def float8(tensors: Tensors, name: str, scale_name: str, block: Block | None) -> TensorSource:
    """The packed matrix of an FP8 weight (rows, cols), or matrices (E, rows, cols), and its scale.
    Raises CheckpointError."""
    is_stack = name in tensors and len(tensors[name].shape) == 3
    weight = part_of(tensors, name, FP8, (-1,) * (2 + is_stack))
    num_rows, num_cols = weight.shape[-2:]
    height, width = block or (1, num_cols)
    shape = *weight.shape[:-2], -(-num_rows // height), -(-num_cols // width)
    if block is None and scale_name in tensors and not is_stack:
        given = tensors[scale_name].shape
        shape = given if given in ((), (1,), (1, 1), (num_rows,)) else shape
    scale = part_of(tensors, scale_name, SCALES, shape)
    height = num_rows if scale.shape in ((), (1,), (1, 1)) and block is None else height

    def load(*index: int | slice | Tensor) -> PackedLinear | Tensor:
        *expert, at = index or (slice(None),)
        numbers = cast("Tensor", scale.load())[tuple(expert)].float()
        numbers = numbers.reshape(-1, -(-num_cols // width))[torch.arange(num_rows)[at] // height]
        return scaled(cast("Tensor", weight.load(*index)), numbers, width)

    return packed_source("FP8", weight.shape, 8.5, load, weight, scale)


def scaled(weight: Tensor, scale: Tensor, width: int) -> PackedLinear | Tensor:
    """FP8 numbers (rows, cols) times scales (rows, blocks of `width` columns)"""
    num_cols = weight.shape[1]
    if num_cols % GROUP == 0 and width % GROUP == 0:
        return packed_floats(weight, spread(scale, num_cols, width))
    floats = weight.float() * scale.repeat_interleave(width, dim=1)[:, :num_cols]
    return floats if num_cols % GROUP else rounded(floats)


def packed_floats(weight: Tensor, scale: Tensor) -> PackedLinear:
    """FP8 numbers (rows, cols) times scales (rows, cols / 32)

    The bits s eeee mmm, moved to those of a float16, stand for the number / 2^8; torch's own
    conversion of FP8 takes four times as long."""
    codes = weight.view(torch.uint8).unflatten(-1, (-1, GROUP))
    largest = (codes & 127).amax(-1)
    if bool((largest == 127).any()):
        raise CheckpointError("an FP8 weight is NaN")
    _, exponent = torch.frexp(largest.view(torch.float8_e4m3fn).float())  # it is below 2^exponent
    unit = torch.exp2((exponent - 7).float())  # so that it becomes 64 to 120
    halves = (codes.view(torch.int8).to(torch.int16) << 7 & ~(1 << 14)).view(torch.float16)
    numbers = halves.float().mul_((2**8 / unit).unsqueeze(-1))
    return grouped(numbers.round_().to(torch.int8), unit * scale)
