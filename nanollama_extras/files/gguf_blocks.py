"""GGUF's usual packed types for native kernels, which hold them in as many bits as the file.

Adds       Q5_0, Q5_1, Q4_K, Q5_K and Q6_K in 4 to 6 bits with all numbers of the file, and a fast
           way from the blocks of a file to those of the kernels, also of Q4_0, Q4_1 and Q8_0.
Seam       `nanollama.read_gguf` takes a type of TYPES in place of its own in GGUF_TYPES.
           kernels.native asks `layout` and `fill` of a weight; for torch and Triton the same
           weight is the core's PackedLinear.
Imports    kernels.arrays; kernels.native, in `fill` alone.
Remove     delete this file; native kernels then hold 5 and 6 bits as 8.

                 bits  scales and offsets                                           bits a weight
  Q4_0 .. Q8_0   4, 5  float16, for 32 columns                                      as in the file
  Q4_K, Q5_K     4, 5  two integers for 32 columns, two float16 for 256             4.63, 5.63
  Q6_K           6     an integer for 16 columns, a float16 for 256                 6.56
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from nanollama import GGUF_TYPES, PackedLinear, extra
from nanollama_extras.kernels.arrays import torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_ROWS = 16
# Name of a type -> bits of a code, columns of a block, 8-bit scales, float16 scales, and fields of
# `matrix` in native.c
LAYOUTS: dict[str, tuple[int, int, int, int, dict[str, Any]]] = {
    "Q4_0": (4, 32, 0, 1, {"has_offset": False}),
    "Q4_1": (4, 32, 0, 2, {"has_offset": True}),
    "Q5_0": (5, 32, 0, 1, {"fine": "ONE_SCALE", "centre": 16}),
    "Q5_1": (5, 32, 0, 2, {"fine": "ONE_OFFSET"}),
    "Q8_0": (8, 32, 0, 1, {"has_offset": False}),
    "Q4_K": (4, 256, 16, 2, {"fine": "MINS_32"}),
    "Q5_K": (5, 256, 16, 2, {"fine": "MINS_32"}),
    "Q6_K": (6, 256, 16, 1, {"fine": "SCALES_16", "centre": 32}),
}


def held_bits(kind: str) -> float:
    """Bits of a weight of a type of LAYOUTS in memory; 0 for another one."""
    bits, group, num_scales, num_halves, _ = LAYOUTS.get(kind, (0, 1, 0, 0, {}))
    return bits + (8 * num_scales + 16 * num_halves) / group


class BlockLinear(PackedLinear):
    """A weight as blocks of a GGUF file (rows, blocks, bytes), which become the core's q, scale and
    offset when something other than native kernels asks for them."""

    load_weights = 1 << 22  # at a time, since they are read from the file's own pages

    def __init__(self, number: int, blocks: Tensor) -> None:
        self.number, self.blocks = number, blocks
        self.bias, self.dtype, self.float4 = None, torch.float32, False

    @functools.cached_property
    def plain(self) -> PackedLinear:
        unpack = GGUF_TYPES[self.number].unpack
        assert unpack
        return unpack(self.blocks)

    @property
    def q(self) -> Tensor:  # type: ignore[override]
        return self.plain.q

    @property
    def scale(self) -> Tensor:  # type: ignore[override]
        return self.plain.scale

    @property
    def offset(self) -> Tensor | None:  # type: ignore[override]
        return self.plain.offset

    @property
    def shape(self) -> tuple[int, int]:
        num_rows, num_blocks, _ = self.blocks.shape
        return num_rows, num_blocks * GGUF_TYPES[self.number].width

    @property
    def nbytes(self) -> int:
        """As native kernels hold it"""
        num_rows, num_cols = self.shape
        fields, num_bytes = self.layout({})
        return num_rows * num_cols // int(fields["group"]) * num_bytes // BLOCK_ROWS

    def select(self, rows: Tensor | slice) -> BlockLinear:
        return BlockLinear(self.number, self.blocks[rows])

    def layout(self, kinds: dict[str, int]) -> tuple[dict[str, Any], int]:
        """The fields of native.c's `matrix`, whose enums are `kinds`, and the bytes of a block."""
        bits, group, num_scales, num_halves, fields = LAYOUTS[GGUF_TYPES[self.number].name]
        fields = {"bits": bits, "group": group, "unit": 1.0, **fields}
        if "fine" in fields:
            fields["fine"] = kinds.get(fields["fine"])
        return fields, BLOCK_ROWS * (group * bits // 8 + num_scales + 2 * num_halves)

    def fill(self, blocks: Tensor) -> None:
        """Write the weight into blocks (rows / 16, cols / group, bytes)."""
        kernels = extra("kernels.native", "fast arithmetic")
        num_rows, num_cols = self.shape
        kernels.run_kernel(
            "lay_blocks",
            blocks.flatten(1),
            rows=self.blocks.contiguous(),
            num_rows=num_rows,
            cols=num_cols,
            type=kernels.NUMBERS[f"OF_{GGUF_TYPES[self.number].name}"],
        )


TYPES = {
    number: kind._replace(unpack=functools.partial(BlockLinear, number))
    for number, kind in GGUF_TYPES.items()
    if kind.name in LAYOUTS
}
