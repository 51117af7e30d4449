"""Weights of AWQ and GPTQ in safetensors files: NAME.qweight, NAME.scales and NAME.qzeros.

Adds       the quant_methods `awq` (version gemm, 4 bits), `gptq` (2, 3, 4 and 8 bits, formats v1
           and v2, symmetric or not, in any order of columns) and `auto-round`, which writes both.
Seam       rows of METHODS in files.quantized, which it imports.
Source     https://github.com/casper-hansen/AutoAWQ (awq/modules/linear/gemm.py, awq/utils)
           https://github.com/ModelCloud/GPTQModel (nn_modules/qlinear)
           https://github.com/intel/auto-round (inference/convert_model.py: packing_format)
Remove     delete this file and its rows of METHODS; such files then say that they need it.

Both store w^T: qweight is (cols / n, rows) for GPTQ, with n numbers of a column in an int32, and
(cols, rows / n) for AWQ. w = (q - z) * scale, with a scale and a zero z for each group of columns.
That is exact in groups of 32 columns: without an offset where every z is the middle, else with the
offset -z * scale. GPTQ's g_idx gives the group of each column. Where columns of a group are far
apart (desc_act), a group of 32 columns has many scales; these matrices are rounded to 8 bits.
Where a config has widths for single layers (`dynamic`, `extra_config`), shapes tell each one's.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from nanollama import GROUP, CheckpointError, PackedLinear, TensorSource, check_value, excerpt
from nanollama_extras.files.quantized import (
    FLOATS,
    Packing,
    Settings,
    Tensors,
    WholeMatrix,
    affine,
    check_found,
    check_width,
    choice,
    packed_source,
    part_of,
    rounded,
    spread,
    stems,
    unpacked_bits,
    wide,
    width,
)

# packing_format of auto-round, or its older `backend` -> method and format of zeros
ROUND_FORMATS = {
    **dict.fromkeys(("auto", "auto_round:auto_gptq", "auto_round:gptq"), ("gptq", "gptq")),
    "auto_round:gptq:exllamav2": ("gptq", "gptq"),
    **dict.fromkeys(("auto_round", "auto_round:gptqmodel"), ("gptq", "gptq_v2")),
    **dict.fromkeys(("auto_round:auto_awq", "auto_round:awq"), ("awq", "")),
}
ROUND_NAMES = " or ".join(ROUND_FORMATS)
AWQ_ORDER = [0, 4, 1, 5, 2, 6, 3, 7]  # the nibbles of an int32 that hold its 8 rows
STEP = 1 << 22  # weights that are unpacked at a time


@dataclass(frozen=True, slots=True)
class Layout:
    """How a file holds its matrices."""

    method: str  # awq or gptq
    bits: int
    group: int  # columns that share a scale; 0 for all
    subtracts_one: bool = False  # from each zero, in the file
    has_offset: bool = True  # expected, beside the scales in memory
    is_reordered: bool = False  # expected of the columns
    is_mixed: bool = False  # whether single layers have other widths and groups


def packing(settings: Settings) -> Packing:
    """For the quant_methods awq, gptq and auto-round. Raises CheckpointError."""
    group = 0 if settings.get("group_size") == -1 else width(settings, "group_size", GROUP)
    title = "quantization_config: group_size"
    check_value(group % GROUP == 0, title, group, f"-1 or a multiple of {GROUP}")
    method, version = str(settings["quant_method"]), "gptq"
    if method == "auto-round":
        kind = settings.get("packing_format") or settings.get("backend", "auto")
        is_known = isinstance(kind, str) and kind in ROUND_FORMATS
        check_value(is_known, "quantization_config: packing_format", kind, ROUND_NAMES)
        method, version = ROUND_FORMATS[kind]
    is_mixed = any(settings.get(key) for key in ("dynamic", "extra_config"))
    if method == "awq":
        choice(settings, "bits", 4)
        choice(settings, "version", "gemm", "GEMM", default="gemm")
        choice(settings, "zero_point", True, default=True)
        layout = Layout("awq", 4, group, is_mixed=is_mixed)
        return functools.partial(packed_tensors, layout=layout)
    bits = choice(settings, "bits", 2, 3, 4, 8)
    version = choice(settings, "checkpoint_format", "gptq", "gptq_v2", default=version)
    layout = Layout(
        "gptq",
        bits,
        group,
        subtracts_one=version == "gptq",
        has_offset=not choice(settings, "sym", True, False, default=True),
        is_reordered=choice(settings, "desc_act", True, False, default=False),
        is_mixed=is_mixed,
    )
    return functools.partial(packed_tensors, layout=layout)


def packed_tensors(tensors: Tensors, layout: Layout) -> Tensors:
    """The tensors, with NAME.weight in place of NAME.qweight, .scales, .qzeros and .g_idx."""
    found = dict(tensors)
    names = list(stems(tensors, ".qweight"))
    check_found(names, layout.method, ".qweight")
    for name in names:
        found[f"{name}.weight"] = Matrix(tensors, name, layout).source()
        for suffix in ("qweight", "scales", "qzeros", "g_idx"):
            found.pop(f"{name}.{suffix}", None)
    return found


def own_layout(tensors: Tensors, name: str, layout: Layout) -> Layout:
    """The layout of a matrix by its shapes: qzeros (groups, rows * bits / 32), qweight of GPTQ
    (cols * bits / 32, rows). Raises CheckpointError."""
    zeros = part_of(tensors, f"{name}.qzeros", "I32", (-1, -1)).shape
    high, wide = part_of(tensors, f"{name}.qweight", "I32", (-1, -1)).shape
    bits = layout.bits if layout.method == "awq" else 32 * zeros[1] // max(1, wide)
    num_cols = high if layout.method == "awq" else high * 32 // max(1, bits)
    group = num_cols // max(1, zeros[0])
    if bits not in (2, 3, 4, 8) or group % GROUP or not group:
        raise CheckpointError(
            f"tensor {excerpt(name)}.qzeros has shape {zeros}, for {bits} bits in groups of {group}"
        )
    return dataclasses.replace(layout, bits=bits, group=group)


class Matrix:
    """A matrix (rows, cols) and its tensors. Raises CheckpointError for wrong shapes."""

    def __init__(self, tensors: Tensors, name: str, layout: Layout) -> None:
        self.codes = part_of(tensors, f"{name}.qweight", "I32", (-1, -1))
        high, wide = self.codes.shape
        if layout.is_mixed:
            layout = own_layout(tensors, name, layout)
        elif layout.method == "gptq":
            zeros = part_of(tensors, f"{name}.qzeros", "I32", (-1, -1)).shape
            check_width(name, 32 * zeros[1] / max(1, wide), layout.bits)
        self.layout, self.name = layout, name
        words = wide if layout.method == "awq" else -(-wide * layout.bits // 32)
        num_rows = 8 * wide if layout.method == "awq" else wide
        num_cols = high if layout.method == "awq" else high * 32 // layout.bits
        self.shape, self.group = (num_rows, num_cols), layout.group or num_cols
        if num_cols % GROUP or num_cols % self.group or not num_rows:
            raise CheckpointError(
                f"tensor {excerpt(name)}.qweight has {num_cols} columns, in groups of "
                f"{self.group}; a multiple of that and of {GROUP} is needed"
            )
        num_groups = num_cols // self.group
        self.scales = part_of(tensors, f"{name}.scales", FLOATS, (num_groups, num_rows))
        self.zeros = part_of(tensors, f"{name}.qzeros", "I32", (num_groups, words))
        self.order = None
        if f"{name}.g_idx" in tensors:
            self.order = part_of(tensors, f"{name}.g_idx", "I32 I64", (num_cols,))

    def source(self) -> TensorSource:
        layout = self.layout
        title = f"{layout.method.upper()} {layout.bits}-bit"
        is_wide = layout.bits == 8 or layout.is_reordered
        bits = 8.5 if is_wide else 4.5 + 0.5 * layout.has_offset
        parts = self.codes, self.scales, self.zeros, self.order
        return packed_source(title, self.shape, bits, WholeMatrix(self.pack).load, *parts)

    def column_groups(self) -> Tensor | None:
        """The group of each column; None if the columns of a group are side by side"""
        if self.order is None:
            return None
        groups, usual = cast("Tensor", self.order.load()).long(), torch.arange(self.shape[1])
        if not 0 <= int(groups.min()) <= int(groups.max()) < self.shape[1] // self.group:
            raise CheckpointError(f"tensor {excerpt(self.name)}.g_idx names groups without scales")
        return None if torch.equal(groups, usual // self.group) else groups

    def zero_points(self) -> Tensor:
        """(rows, G) uint8: the numbers that are taken from the codes"""
        bits, words = self.layout.bits, cast("Tensor", self.zeros.load())
        if self.layout.subtracts_one and bits != 3:
            # from whole words, so that the 0 of one number borrows from the next one
            words = words + sum(1 << at for at in range(0, 32, bits))
        zeros = unpacked_bits(words, bits)[:, : self.shape[0]]
        if self.layout.method == "awq":
            zeros = zeros.unflatten(1, (-1, 8))[..., AWQ_ORDER].flatten(1)
        return (zeros + int(self.layout.subtracts_one and bits == 3) & (2**bits - 1)).T

    def codes_of(self, words: Tensor, rows: slice) -> Tensor:
        """Rows of the codes (n, cols); of AWQ's, a multiple of 8"""
        if self.layout.method == "gptq":
            return unpacked_bits(words[:, rows].T, self.layout.bits)
        data = words[:, rows.start // 8 : rows.stop // 8].contiguous().view(torch.uint8)
        data = data.T.contiguous().unflatten(0, (-1, 4))  # (n / 8, 4, cols) of two nibbles each
        return torch.stack((data & 15, data >> 4), 2).flatten(1, 2)[:, AWQ_ORDER].flatten(0, 1)

    def pack(self) -> PackedLinear:
        (num_rows, num_cols), bits = self.shape, self.layout.bits
        words, groups = cast("Tensor", self.codes.load()), self.column_groups()
        zeros, scales = self.zero_points(), cast("Tensor", self.scales.load()).T.float()
        has_offset = bool((zeros != 2 ** (bits - 1)).any())
        step = max(1, STEP // num_cols // 8) * 8
        parts = []
        for at in range(0, num_rows, step):
            rows = slice(at, min(at + step, num_rows))
            q, scale, zero = self.codes_of(words, rows), scales[rows], zeros[rows].float()
            if groups is not None:
                parts.append(rounded((q - zero[:, groups]) * scale[:, groups]))
                continue
            offset = spread(-zero * scale, num_cols, self.group) if has_offset else None
            parts.append(affine(q, spread(scale, num_cols, self.group), offset, bits, self.group))
        packed = joined(parts)
        return wide(packed, self.group) if packed.bits == 4 else packed


def joined(parts: list[PackedLinear]) -> PackedLinear:
    """Rows below each other."""
    is_half = all(part.scale.dtype == torch.float16 for part in parts)
    dtype = torch.float16 if is_half else torch.float32
    offset = None
    if parts[0].offset is not None:
        offset = torch.cat([cast("Tensor", part.offset).to(dtype) for part in parts])
    scale = torch.cat([part.scale.to(dtype) for part in parts])
    return PackedLinear(torch.cat([part.q for part in parts]), scale, offset)
