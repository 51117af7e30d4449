"""Weights as compressed-tensors (llm-compressor) writes them in safetensors files.

Adds       the formats `pack-quantized` (2, 4 and 8 bits, symmetric or not, with or without
           weight_g_idx), `int-quantized` (8 bits), `float-quantized` (FP8), `naive-quantized` and
           `nvfp4-pack-quantized`.
Seam       a row of METHODS in files.quantized, which it imports, as it does files.fp8 and
           files.nvfp4.
Source     https://github.com/vllm-project/compressed-tensors (compressors/quantized_compressors)
Remove     delete this file and its row of METHODS; such files then say that they need it.

A weight is int32 words of numbers (NAME.weight_packed), int8 or FP8 (NAME.weight), with
NAME.weight_scale, which is one number, one a row, or one a group of columns. Which numbers of bits
and groups it has follows from the shapes, and must be those of one of the config's groups.
Activations are never rounded as the config says: kernels have their own 8 bits for them.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from nanollama import GROUP, CheckpointError, PackedLinear, TensorSource, check_value, excerpt
from nanollama_extras.files import fp8, nvfp4
from nanollama_extras.files.quantized import (
    FLOATS,
    Packing,
    Settings,
    Tensors,
    affine,
    check_found,
    choice,
    packed_source,
    part_of,
    rounded,
    spread,
    stems,
    unpacked_bits,
    width,
)

FORMATS = tuple(
    "pack-quantized int-quantized float-quantized naive-quantized nvfp4-pack-quantized".split()
)
# suffixes of tensors that are not needed
UNUSED = tuple(".weight_shape .input_zero_point .output_scale .input_global_scale".split())
UNUSED += fp8.UNUSED


@dataclass(frozen=True, slots=True)
class Scheme:
    """How the weights of a group are quantized."""

    kind: str  # int or float
    bits: int
    group: int  # columns that share a scale; 0 for all
    block: fp8.Block | None
    is_symmetric: bool


def packing(settings: Settings) -> Packing:
    """For the quant_method compressed-tensors. Raises CheckpointError."""
    groups = settings.get("config_groups")
    is_valid = isinstance(groups, Mapping) and 0 < len(groups) < 100
    check_value(is_valid, "quantization_config: config_groups", groups, "an object")
    choice(settings, "format", *FORMATS, "mixed-precision", default="pack-quantized")
    choice(settings, "quantization_status", "compressed", "frozen", default="compressed")
    schemes = []
    for name, group in cast("Mapping[str, Any]", groups).items():
        weights = group.get("weights") if isinstance(group, Mapping) else None
        title = f"quantization_config: {name}"
        check_value(isinstance(weights, Mapping), title, group, "an object with weights")
        choice(group, "format", *FORMATS, default="pack-quantized")
        schemes.append(scheme_of(cast("Mapping[str, Any]", weights)))
    return functools.partial(packed_tensors, schemes=tuple(schemes))


def scheme_of(weights: Mapping[str, Any]) -> Scheme:
    kind = choice(weights, "type", "int", "float", default="int")
    bits = choice(weights, "num_bits", *((4, 8) if kind == "float" else (2, 4, 8)))
    if (kind, bits) == ("float", 4):
        choice(weights, "strategy", "tensor_group")
        return Scheme(kind, bits, choice(weights, "group_size", nvfp4.GROUP), None, True)
    strategy = choice(weights, "strategy", "tensor", "channel", "group", "block", default="tensor")
    is_symmetric = choice(weights, "symmetric", True, False, default=True)
    group = width(weights, "group_size", GROUP) if strategy == "group" else 0
    title = "quantization_config: group_size"
    check_value(group % GROUP == 0, title, group, f"a multiple of {GROUP}")
    block = fp8.block_of(weights, "block_structure") if strategy == "block" else None
    if (strategy == "block") != (block is not None) or (block and kind == "int"):
        raise CheckpointError(
            f"quantization_config: strategy {strategy} of {kind} is not supported"
        )
    return Scheme(kind, bits, group, block, is_symmetric)


def packed_tensors(tensors: Tensors, schemes: tuple[Scheme, ...]) -> Tensors:
    """The tensors, with the packed NAME.weight in place of itself and its scales."""
    found = {name: t for name, t in tensors.items() if not name.endswith(UNUSED)}
    names = list(stems(tensors, ".weight_scale"))
    check_found(names, "compressed-tensors", ".weight_scale")
    for name in names:
        found[f"{name}.weight"] = matrix(tensors, name, schemes)
        for suffix in ("packed", "scale", "zero_point", "g_idx", "global_scale"):
            found.pop(f"{name}.weight_{suffix}", None)
    fp8.check_scaled(found)
    for name in found:
        if name.endswith(".weight_packed"):
            raise CheckpointError(f"tensor {excerpt(name)} has no weight_scale")
    return found


def matrix(tensors: Tensors, name: str, schemes: tuple[Scheme, ...]) -> TensorSource:
    """The packed matrix of a name, by the first scheme that fits. Raises CheckpointError."""
    packed, weight = (tensors.get(f"{name}.{key}") for key in ("weight_packed", "weight"))
    refused: CheckpointError | None = None
    for scheme in schemes:
        try:
            scale = f"{name}.weight_scale"
            if packed is not None and scheme.kind == "float" and scheme.bits == 4:
                whole = f"{name}.weight_global_scale"
                return nvfp4.float4(tensors, f"{name}.weight_packed", scale, whole, divides=True)
            if packed is not None and scheme.kind == "int":
                return Integers(tensors, name, "weight_packed", scheme).source()
            if weight is not None and scheme.kind == "int" and weight.kind == "I8":
                return Integers(tensors, name, "weight", scheme).source()
            if weight is not None and scheme.kind == "float" and weight.kind == fp8.FP8:
                return fp8.float8(tensors, f"{name}.weight", scale, scheme.block)
        except CheckpointError as error:
            refused = refused or error
    if refused:
        raise refused
    raise CheckpointError(f"tensor {excerpt(name)}.weight is of no kind in quantization_config")


class Integers:
    """A matrix (rows, cols) of integers, packed in words or not, and its scales and zeros. Raises
    CheckpointError for wrong shapes."""

    def __init__(self, tensors: Tensors, name: str, key: str, scheme: Scheme) -> None:
        self.bits, self.is_packed = scheme.bits, key == "weight_packed"
        self.codes = part_of(tensors, f"{name}.{key}", "I32" if self.is_packed else "I8", (-1, -1))
        num_rows, width = self.codes.shape
        num_cols = width * 32 // self.bits if self.is_packed else width
        self.shape, self.group = (num_rows, num_cols), scheme.group or num_cols
        if num_cols % self.group or not num_rows or not num_cols:
            raise CheckpointError(
                f"tensor {excerpt(name)} has {num_cols} columns, in groups of {self.group}"
            )
        num_groups = num_cols // self.group
        shape, scale_name = (num_rows, num_groups), f"{name}.weight_scale"
        one = ((), (1,), (1, 1))
        if num_groups == 1 and scale_name in tensors and tensors[scale_name].shape in one:
            shape = tensors[scale_name].shape  # type: ignore[assignment]
        self.scales = part_of(tensors, scale_name, FLOATS, shape)
        self.zeros = None
        if not scheme.is_symmetric:
            # zeros of packed weights are packed along the rows
            high = -(-num_rows * self.bits // 32) if self.is_packed else num_rows
            kinds = "I32" if self.is_packed else "I8"
            zero_shape = (high, num_groups) if shape == (num_rows, num_groups) else shape
            self.zeros = part_of(tensors, f"{name}.weight_zero_point", kinds, zero_shape)
        self.order = None
        if f"{name}.weight_g_idx" in tensors:
            self.order = part_of(tensors, f"{name}.weight_g_idx", "I32 I64", (num_cols,))

    def source(self) -> TensorSource:
        bits = 8.5 if self.bits == 8 else 4.5
        title = f"compressed-tensors {self.bits}-bit"
        bits += 0.5 * (self.zeros is not None)
        parts = self.codes, self.scales, self.zeros, self.order
        return packed_source(title, self.shape, bits, self.load, *parts)

    def column_groups(self) -> Tensor | None:
        """The group of each column; None if the columns of a group are side by side"""
        if self.order is None:
            return None
        groups, usual = cast("Tensor", self.order.load()).long(), torch.arange(self.shape[1])
        if bool((groups == -1).all()) or torch.equal(groups, usual // self.group):
            return None
        if not 0 <= int(groups.min()) <= int(groups.max()) < self.shape[1] // self.group:
            raise CheckpointError("a weight_g_idx names groups without scales")
        return groups

    def zero_points(self) -> Tensor:
        """(rows, G) floats: what is taken from codes from 0 on"""
        middle = 2 ** (self.bits - 1)
        if self.zeros is None:
            return torch.full((1, 1), float(middle)).expand(self.shape[0], 1)
        zeros = cast("Tensor", self.zeros.load())
        if not self.is_packed:
            return (zeros.float() + middle).reshape(-1, max(1, self.shape[1] // self.group))
        return unpacked_bits(zeros.T, self.bits).T[: self.shape[0]].float()

    def load(self, at: slice | Tensor = slice(None)) -> PackedLinear | Tensor:
        num_rows, num_cols = self.shape
        codes = cast("Tensor", self.codes.load(at))
        q = unpacked_bits(codes, self.bits) if self.is_packed else codes.view(torch.uint8) ^ 128
        num_groups = num_cols // self.group
        scale = cast("Tensor", self.scales.load()).float().reshape(-1, num_groups)
        scale = scale.expand(num_rows, num_groups)[at]
        zero = self.zero_points().expand(num_rows, num_groups)[at]
        groups = self.column_groups()
        if groups is not None or num_cols % GROUP:
            columns = torch.arange(num_cols) // self.group if groups is None else groups
            weight = (q - zero[:, columns]) * scale[:, columns]
            return weight if num_cols % GROUP else rounded(weight)
        offset = None if self.zeros is None else spread(-zero * scale, num_cols, self.group)
        return affine(q, spread(scale, num_cols, self.group), offset, self.bits, self.group)
