"""Weights as bitsandbytes quantizes them in safetensors files: nf4, fp4 and int8 (LLM.int8()).

Adds       the quant_method `bitsandbytes`: NAME.weight with NAME.weight.quant_state.* (4 bits, with
           or without double quantization) or with NAME.SCB (8 bits).
Seam       a row of METHODS in files.quantized, which it imports.
Source     https://arxiv.org/abs/2305.14314 (QLoRA: NF4, double quantization), 2208.07339 (LLM.int8)
           https://github.com/bitsandbytes-foundation/bitsandbytes (functional.py, QuantState)
Remove     delete this file and its row of METHODS; such files then say that they need it.

The 4-bit numbers of a matrix are one string, row after row, high nibbles first. They are indices
into quant_map, whose values lie from -1 to 1. `blocksize` numbers share a factor, absmax; with
double quantization, absmax = nested_quant_map[absmax] * nested_absmax + nested_offset.

The values of nf4 are no multiples of a common step. They are rounded to integers of 8 bits, with
the step that suits them best. That adds 0.5 % (relative RMS) to nf4's own error of 9.2 %. Weights
stay indices of 4 bits (kernels.fine, which it imports).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from nanollama import GROUP, CheckpointError, PackedLinear, TensorSource, check_value, excerpt
from nanollama_extras.files.quantized import (
    Packing,
    Settings,
    Tensors,
    check_found,
    choice,
    grouped,
    halved,
    packed_source,
    part_of,
    spread,
    stems,
)
from nanollama_extras.kernels.fine import Fine, FineLinear

STATE = ".weight.quant_state.bitsandbytes__"
# ends of names of the tensors beside a 4-bit weight
PARTS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map")
MOST_STATE_BYTES = 1 << 16
STEPS = torch.linspace(64, 127, 8001)  # tried steps of the largest value


def packing(settings: Settings) -> Packing:
    """For the quant_method bitsandbytes. Raises CheckpointError."""
    wide, narrow = (
        choice(settings, key, True, False, default=bool(settings.get(f"_{key}")))
        for key in ("load_in_8bit", "load_in_4bit")
    )
    is_one = wide != narrow
    check_value(is_one, "quantization_config: load_in_4bit", narrow, "4 or 8 bits, not both,")
    if wide:
        return packed_integers
    kind = choice(settings, "bnb_4bit_quant_type", "nf4", "fp4", default="fp4")
    return functools.partial(packed_tensors, kind=kind)


# ---- 8 bits --------------------------------------------------------------------------------------


def packed_integers(tensors: Tensors) -> Tensors:
    """The tensors, with the packed NAME.weight in place of itself, NAME.SCB and
    NAME.weight_format."""
    found = dict(tensors)
    names = list(stems(tensors, ".SCB"))
    check_found(names, "bitsandbytes in 8 bits", ".SCB")
    for name in names:
        found[f"{name}.weight"] = int8(tensors, name)
        del found[f"{name}.SCB"]
        found.pop(f"{name}.weight_format", None)
    check_packed(found, "I8", ".SCB")
    return found


def int8(tensors: Tensors, name: str) -> TensorSource:
    """A matrix whose row r is weight[r] * SCB[r] / 127. Raises CheckpointError."""
    weight = part_of(tensors, f"{name}.weight", "I8", (-1, -1))
    num_rows, num_cols = weight.shape
    scales = part_of(tensors, f"{name}.SCB", "F32 F16 BF16", (num_rows,))

    def load(at: slice | Tensor = slice(None)) -> PackedLinear | Tensor:
        q = cast("Tensor", weight.load(at))
        scale = cast("Tensor", scales.load())[at].float().unsqueeze(1) / 127
        if num_cols % GROUP:
            return q * scale
        return grouped(q.unflatten(-1, (-1, GROUP)), spread(scale, num_cols, num_cols))

    return packed_source("LLM.int8", weight.shape, 8.5, load, weight, scales)


def check_packed(tensors: Tensors, kind: str, missing: str) -> None:
    """Raises CheckpointError for integers that are left without the tensor that scales them."""
    for name, tensor in tensors.items():
        if tensor.kind == kind and name.endswith(".weight"):
            raise CheckpointError(f"tensor {excerpt(name)} of type {kind} has no {missing}")


# ---- 4 bits --------------------------------------------------------------------------------------


def packed_tensors(tensors: Tensors, kind: str) -> Tensors:
    """The tensors, with the packed NAME.weight in place of itself and NAME.weight.*."""
    found = dict(tensors)
    names = list(stems(tensors, STATE + kind))
    check_found(names, f"bitsandbytes {kind}", STATE + kind)
    for name in names:
        found[f"{name}.weight"] = Matrix(tensors, name, kind).source()
        for part in PARTS:
            found.pop(f"{name}.weight.{part}", None)
        del found[name + STATE + kind]
    for name in found:
        if STATE in name:
            raise CheckpointError(
                f"tensor {excerpt(name)} contradicts quantization_config, which says {kind}"
            )
    check_packed(found, "U8", f"{STATE.removeprefix('.weight')}{kind}")
    return found


@dataclass(frozen=True, slots=True)
class State:
    """What quant_state says of a matrix."""

    shape: tuple[int, int]
    block: int  # numbers that share a factor
    nested_block: int  # factors that share one; 0 without double quantization
    nested_offset: float


def read_state(source: TensorSource, title: str) -> State:
    """The state in a tensor of JSON. Raises CheckpointError."""
    raw: Any = None
    if len(source.shape) == 1 and source.kind == "U8" and source.nbytes <= MOST_STATE_BYTES:
        data = cast("Tensor", source.load())
        try:
            raw = json.loads(bytes(data.tolist()))
        except (ValueError, RecursionError):
            raw = None
    values = raw if isinstance(raw, Mapping) else {}
    shape, nested = values.get("shape"), values.get("nested_blocksize")
    sizes = [*(shape if isinstance(shape, list) else []), values.get("blocksize"), nested or 1]
    offset = values.get("nested_offset", 0.0)
    is_valid = len(sizes) == 4 and all(type(n) is int and 0 < n < 2**31 for n in sizes)
    if not is_valid or not isinstance(offset, float) or not math.isfinite(offset):
        raise CheckpointError(
            f"tensor {excerpt(title)} holds {excerpt(raw)}; shape, blocksize and, if the factors "
            "are quantized, nested_blocksize and nested_offset are needed"
        )
    num_rows, num_cols, block, _ = sizes
    return State((num_rows, num_cols), block, nested or 0, offset)


class Matrix:
    """A matrix (rows, cols) of 4-bit numbers and its tensors. Raises CheckpointError for wrong
    shapes."""

    def __init__(self, tensors: Tensors, name: str, kind: str) -> None:
        self.kind, self.tensors, self.name = kind, tensors, f"{name}.weight"
        title = name + STATE + kind
        self.state = state = read_state(tensors[title], title)
        count = math.prod(state.shape)
        self.weight = part_of(tensors, self.name, "U8 BF16 F16 F32", (-1, 1))
        if self.weight.nbytes != -(-count // 2):
            raise CheckpointError(
                f"tensor {excerpt(self.name)} has {self.weight.nbytes} bytes; the shape "
                f"{state.shape} in its quant_state asks for {-(-count // 2)}"
            )
        num_blocks = -(-count // state.block)
        kinds = "U8" if state.nested_block else "F32"
        self.absmax = self.part("absmax", kinds, num_blocks)
        self.quant_map = self.part("quant_map", "F32", 16)
        if state.nested_block:
            self.nested_absmax = self.part(
                "nested_absmax", "F32", -(-num_blocks // state.nested_block)
            )
            self.nested_map = self.part("nested_quant_map", "F32", 256)

    def part(self, end: str, kinds: str, count: int) -> TensorSource:
        return part_of(self.tensors, f"{self.name}.{end}", kinds, (count,))

    def source(self) -> TensorSource:
        title = f"bitsandbytes {self.kind}"
        parts = [self.weight, self.absmax, self.quant_map]
        if self.state.nested_block:
            parts += [self.nested_absmax, self.nested_map]
        found = packed_source(title, self.state.shape, 4.5, self.load, *parts)
        if self.state.block % GROUP and found.is_packed:
            kind = f"{title}, unpacked"
            return dataclasses.replace(found, kind=kind, is_packed=False, bits=0)
        return found

    def codes(self, start: int, stop: int) -> Tensor:
        """The numbers from `start` to `stop` of the string: indices into quant_map"""
        size = self.weight.nbytes // self.weight.shape[0]  # bytes of an element
        first, last = start // 2 // size, -(-stop // 2 // size)
        elements = cast("Tensor", self.weight.load(slice(first, max(last, first))))
        data = elements.flatten().view(torch.uint8)
        codes = torch.stack((data >> 4, data & 15), dim=-1).flatten()
        return codes[start - 2 * size * first :][: stop - start]

    def factors(self, start: int, stop: int) -> Tensor:
        """absmax of blocks"""
        absmax = cast("Tensor", self.absmax.load(slice(start, stop)))
        if not self.state.nested_block:
            return absmax
        values = cast("Tensor", self.nested_map.load())[absmax.long()]
        index = torch.arange(start, stop) // self.state.nested_block
        wide = cast("Tensor", self.nested_absmax.load())[index]
        return values * wide + self.state.nested_offset

    @functools.cached_property
    def levels(self) -> tuple[Tensor, float]:
        """quant_map as int8 (16) and the value of 1 in it"""
        values = cast("Tensor", self.quant_map.load())
        return integer_levels(values)

    def load(self, at: slice | Tensor = slice(None)) -> PackedLinear | Tensor:
        num_rows, num_cols = self.state.shape
        rows = torch.arange(num_rows)[at]
        first, last = (int(rows.min()), int(rows.max()) + 1) if len(rows) else (0, 0)
        packed = self.pack(first * num_cols, last * num_cols)
        if len(rows) == last - first and isinstance(at, slice):
            return packed
        index = rows - first
        return packed[index] if isinstance(packed, Tensor) else packed.select(index)

    def pack(self, start: int, stop: int) -> PackedLinear | Tensor:
        """Rows, which are the numbers from `start` to `stop`"""
        num_cols, block = self.state.shape[1], self.state.block
        num_rows = (stop - start) // num_cols
        codes, first = self.codes(start, stop).view(num_rows, num_cols), start // block
        factors = self.factors(first, -(-stop // block))
        is_packed = num_cols % GROUP == 0 and block % GROUP == 0
        at = torch.arange(start, stop, GROUP if is_packed else 1) // block - first
        if not is_packed:
            values = cast("Tensor", self.quant_map.load())
            return values[codes.long()] * factors[at].view(num_rows, num_cols)
        (scale,), (levels, unit) = halved(factors[at].view(num_rows, -1)), self.levels
        numbers = tuple(levels.tolist())
        return FineLinear(Fine("ONE_SCALE", 4, codes, numbers, None, scale, unit=unit))


def integer_levels(values: Tensor) -> tuple[Tensor, float]:
    """Integers from -127 to 127 and a unit: their products are nearest to `values` (squared error,
    all values alike). Raises CheckpointError for values that are not finite."""
    largest = values.abs().max()
    if not bool(largest.isfinite()):
        raise CheckpointError("a quant_map holds numbers that are not finite")
    if not largest:
        return torch.zeros(len(values), dtype=torch.int8), 1.0
    target = values.double() / largest.double()
    q = (target * STEPS.double().unsqueeze(1)).round()  # (steps, 16)
    fitted = (q * target).sum(-1) / (q * q).sum(-1)  # least squares
    best = (q * fitted.unsqueeze(1) - target).square().sum(-1).argmin()
    return q[best].to(torch.int8), float(fitted[best] * largest)
