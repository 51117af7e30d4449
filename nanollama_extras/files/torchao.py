"""Weights that torchao quantized, in safetensors files as transformers saves them.

Adds       the quant_method `torchao`: int8, int4 and other widths of integers, and FP8.
Seam       a row of METHODS in files.quantized, which it imports, as it does files.fp8.
Source     https://github.com/pytorch/ao (torchao/prototype/safetensors, quantization/quantize_)
Remove     delete this file and its row of METHODS; such files then say that they need it.

NAME.weight is taken apart into NAME._weight_qdata and so on, by torchao's class of the tensor:

  Int8Tensor, IntxUnpackedToInt8Tensor   int8 (rows, cols): w = (q - zero_point) * scale, which are
                                         (rows / height, cols / width) for blocks of that size
  Int4Tensor                             4 bits (rows, cols / 2), the low ones first, from -8 to 7:
                                         w = q * scale + zero_point, which are (cols / width, rows)
  Float8Tensor                           as in files.fp8

That is exact in groups of 32 columns. The other classes have the layouts of single GPUs; they are
refused by name. So are scales of activations (AWQ, SmoothQuant).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from nanollama import GROUP, CheckpointError, PackedLinear, TensorSource, excerpt
from nanollama_extras.files import fp8
from nanollama_extras.files.quantized import (
    FLOATS,
    Packing,
    Settings,
    Tensors,
    affine,
    check_found,
    packed_source,
    part_of,
    rounded,
    spread,
    stems,
    unpacked_bits,
)

DATA = "._weight_qdata"
PARTS = ("qdata", "scale", "zero_point", "act_quant_scale", "act_quant_zero_point")
REFUSED = {
    "scale_and_zero": "torchao's layout for CUDA (Int4TilePackedTo4dTensor)",
    "per_tensor_scale": "torchao's NVFP4Tensor",
    "act_pre_scale": "scaled activations",
}


def packing(settings: Settings) -> Packing:
    """For the quant_method torchao."""
    widths = list(weight_bits(settings.get("quant_type")))
    is_narrow = bool(widths) and max(widths) <= 4
    return functools.partial(packed_tensors, is_narrow=is_narrow)


def weight_bits(value: Any) -> Iterator[int]:
    """The widths of all weight_dtype in a config, such as {"_type": "torch.dtype", "_data":
    "int4"}"""
    if not isinstance(value, Mapping):
        return
    for key, inner in value.items():
        data = inner.get("_data") if isinstance(inner, Mapping) else None
        if key == "weight_dtype" and (name := re.fullmatch(r"u?int([1-8])", str(data))):
            yield int(name[1])
        yield from weight_bits(inner)


def packed_tensors(tensors: Tensors, is_narrow: bool) -> Tensors:
    """The tensors, with the packed NAME.weight in place of NAME._weight_*."""
    found = dict(tensors)
    names = list(stems(tensors, DATA))
    check_found(names, "torchao", DATA)
    for name in names:
        for part, words in REFUSED.items():
            if f"{name}._weight_{part}" in tensors:
                raise CheckpointError(
                    f"tensor {excerpt(name)}._weight_{part} belongs to {words}, which is not "
                    "supported; take GGUF or float weights"
                )
        found[f"{name}.weight"] = matrix(tensors, name, is_narrow)
        for part in PARTS:
            found.pop(f"{name}._weight_{part}", None)
    return found


def matrix(tensors: Tensors, name: str, is_narrow: bool) -> TensorSource:
    """The packed matrix of a name. Raises CheckpointError."""
    kind, scale = tensors[name + DATA].kind, f"{name}._weight_scale"
    if kind == fp8.FP8:
        return fp8.float8(tensors, name + DATA, scale, block_of(tensors, name))
    if kind == "U8":
        return int4(tensors, name)
    return integers(tensors, name, is_narrow)


def block_of(tensors: Tensors, name: str) -> tuple[int, int] | None:
    """Rows and columns that share a scale, where the scales are a matrix with several columns."""
    q, scale = tensors[name + DATA].shape, tensors.get(f"{name}._weight_scale")
    if scale is None or len(scale.shape) != 2 or len(q) != 2 or scale.shape[1] < 2:
        return None
    height, width = (max(1, size // max(1, n)) for size, n in zip(q, scale.shape))
    return height, width


def integers(tensors: Tensors, name: str, is_narrow: bool) -> TensorSource:
    """A matrix of int8, of which `is_narrow` ones lie from -8 to 7. Raises CheckpointError."""
    codes = part_of(tensors, name + DATA, "I8", (-1, -1))
    scales = part_of(tensors, f"{name}._weight_scale", FLOATS, (-1, -1))
    (num_rows, num_cols), (high, wide) = codes.shape, scales.shape
    if not high or not wide or num_rows % high or num_cols % wide or not num_cols:
        raise CheckpointError(
            f"tensor {excerpt(name)}._weight_scale has shape {scales.shape}, which does not divide "
            f"{codes.shape}"
        )
    zeros = tensors.get(f"{name}._weight_zero_point")
    if zeros is not None:
        zeros = part_of(tensors, f"{name}._weight_zero_point", f"I8 {FLOATS}", scales.shape)
    bits, width = 4 if is_narrow else 8, num_cols // wide

    def load(at: slice | Tensor = slice(None)) -> PackedLinear | Tensor:
        q, rows = cast("Tensor", codes.load(at)), torch.arange(num_rows)[at] * high // num_rows
        if is_narrow and q.numel() and not -8 <= int(q.min()) <= int(q.max()) <= 7:
            raise CheckpointError("its config says 4 bits, but numbers go beyond -8 to 7")
        scale = cast("Tensor", scales.load()).float()[rows]
        every = torch.zeros(1) if zeros is None else cast("Tensor", zeros.load()).float()
        has_zeros = bool(every.any())
        zero = every[rows] if has_zeros else torch.zeros(1, 1)
        if num_cols % GROUP or width % GROUP:
            wider = [x.repeat_interleave(num_cols // x.shape[1], 1) for x in (scale, zero)]
            weight = (q - wider[1]) * wider[0]
            return weight if num_cols % GROUP else rounded(weight)
        middle = 2 ** (bits - 1)
        offset = spread(-(middle + zero) * scale, num_cols, width) if has_zeros else None
        code = (q.to(torch.int16) + middle).to(torch.uint8)
        return affine(code, spread(scale, num_cols, width), offset, bits, width)

    parts = codes, scales, zeros
    return packed_source(f"torchao int{bits}", codes.shape, bits + 0.5, load, *parts)


def int4(tensors: Tensors, name: str) -> TensorSource:
    """A matrix of torchao's Int4Tensor. Raises CheckpointError."""
    codes = part_of(tensors, name + DATA, "U8", (-1, -1))
    num_rows, num_cols = codes.shape[0], 2 * codes.shape[1]
    scales, zeros = (
        part_of(tensors, f"{name}._weight_{part}", FLOATS, (-1, num_rows))
        for part in ("scale", "zero_point")
    )
    num_groups = scales.shape[0]
    width = num_cols // max(1, num_groups)
    is_even = num_groups and num_cols == num_groups * width and width % GROUP == 0
    if zeros.shape != scales.shape or not is_even:
        raise CheckpointError(
            f"tensors {excerpt(name)}._weight_scale and _weight_zero_point have shapes "
            f"{scales.shape} and {zeros.shape}; groups of a multiple of {GROUP} columns are needed"
        )

    def load(at: slice | Tensor = slice(None)) -> PackedLinear:
        q = unpacked_bits(cast("Tensor", codes.load(at)), 4) ^ 8  # so that 8 stands for 0
        scale, zero = (cast("Tensor", part.load()).T.float() for part in (scales, zeros))
        offset = spread((zero - 8 * scale)[at], num_cols, width) if bool(zero.any()) else None
        return affine(q, spread(scale[at], num_cols, width), offset, 4, width)

    parts = codes, scales, zeros
    return packed_source("torchao int4", (num_rows, num_cols), 5, load, *parts)
