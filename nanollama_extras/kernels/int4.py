"""Packed weights on torch's own kernel for the CPU, where there are no native kernels.

Adds       `new_linear`: 4 bits, and 8 bits as twice 4, with scales and operands in bfloat16.
Seam       Backend: `Backend.pack` of nanollama.py asks for it where native kernels cannot be had,
           and in bfloat16. With --kernels torch, float32 stays exact.
Remove     delete this file; without native kernels, weights are then unpacked when they are loaded,
           if there is room, and otherwise at each step.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from nanollama import GROUP, PackedLinear


def new_linear(packed: PackedLinear, bias: Tensor | None, is_table: bool) -> Int4Linear | None:
    """A packed weight on torch's kernel; None for one that the kernel does not take."""
    (num_rows, num_groups, _), (_, num_cols) = packed.q.shape, packed.shape
    is_usual = packed.q.device.type == "cpu" and not packed.float4 and num_rows % 16 == 0
    fits = is_usual and num_cols == GROUP * num_groups
    return Int4Linear(packed, bias, is_table) if fits else None


class Int4Linear:
    """A PackedLinear as one or two weights (q - 8) * scale + offset of 4 bits: 8 bits are the low 4
    and 16 times the high 4. A row of the result does not depend on their number."""

    def __init__(self, packed: PackedLinear, bias: Tensor | None, is_table: bool) -> None:
        """`is_table` if single rows are taken, too."""
        scale, self.bias = packed.scale.float(), bias
        self.table = packed if is_table else None
        offset = torch.zeros_like(scale) if packed.offset is None else packed.offset.float()
        if packed.bits == 4:
            q = torch.cat((packed.q & 15, packed.q >> 4), dim=-1)
            zero = 8 if packed.offset is None else 0
            parts = [(q, scale, offset + (8 - zero) * scale)]
        else:
            high = (packed.q >> 4) + 8, 16 * scale, torch.zeros_like(scale)
            parts = [(packed.q & 15, scale, offset + 8 * scale), high]
        self.weights = [self.converted(q.flatten(1)) for q, _, _ in parts]
        self.scales = [torch.stack((s.T, o.T), dim=-1).to(torch.bfloat16) for _, s, o in parts]

    @staticmethod
    def converted(q: Tensor) -> Tensor:
        """Values 0 to 15 (rows, cols) in the kernel's order, converted some rows at a time"""
        convert = torch.ops.aten._convert_weight_to_int4pack_for_cpu
        return torch.cat([convert(rows.int(), 1) for rows in q.split(CONVERT_ROWS)])

    @property
    def nbytes(self) -> int:
        table = self.table.nbytes if self.table else 0
        return table + sum(part.nbytes for part in (*self.weights, *self.scales))

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, cols) -> (N, rows)"""
        half, multiply = x.to(torch.bfloat16), torch.ops.aten._weight_int4pack_mm_for_cpu
        pairs = zip(self.weights, self.scales)
        products = [multiply(half, weight, GROUP, scales).to(x.dtype) for weight, scales in pairs]
        y = functools.reduce(torch.add, products)
        return y if self.bias is None else y + self.bias

    def rows(self, index: Tensor) -> Tensor:
        """The weight's rows at `index` (N,) -> (N, cols)"""
        assert self.table
        return self.table.rows(index)


CONVERT_ROWS = 4096  # a multiple of the kernel's blocks of rows
