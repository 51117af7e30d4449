"""Weights of 2 to 4 bits with scales of 8 bits: a form of packed weights for native kernels.

Seam       PackedLinear of nanollama.py, by inheritance. kernels.native asks `layout` and `fill`
           of a weight that has them; for torch and Triton the same weight is integers of 8 bits,
           or of 4, which is exact.
Imports    kernels.arrays
Remove     delete this file with files.gguf_types, files.bitnet, files.bitsandbytes and
           files.nvfp4, which make such weights; files.quantized makes WideLinears if it is there.

A weight is levels[code] * scale - minimum, where the scale is a product: one of 8 bits, which 16 or
32 columns share, one in float16, which a block of columns shares, and a number for all. native.c
(`multiply_fine`) has the layout of the blocks.

  kind           columns of a block   8-bit scales                                  bits a weight
  ONE_SCALE      32 or 64             none                                          4.5 or 2.25
  SCALES_32      256                  integers                                      4.31
  SCALES_16      256                  integers                                      3.56
  SCALES_MINS    256                  4 bits, and 4 bits of the minimum             2.63
  SCALES_FLOAT   64                   floats without a sign (E4M3), none in float16 4.5

A WideLinear is ONE_SCALE of 128 columns (4.13 bits), or ONE_OFFSET of 64 or 128 with an offset in
float16 (4.5 or 4.25), where a PackedLinear repeats scales and offsets for each 32.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanollama import GROUP, PackedLinear, pack_nibbles
from nanollama_extras.kernels.arrays import F, torch

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_ROWS = 16
# kind -> columns that share an 8-bit scale, 0 without them
WIDTHS = {"ONE_SCALE": 0, "SCALES_32": 32, "SCALES_16": 16, "SCALES_MINS": 16, "SCALES_FLOAT": 16}


@dataclass(frozen=True, slots=True)
class Fine:
    """A weight (rows, cols) in parts that multiply: codes, levels and scales."""

    kind: str  # of WIDTHS
    bits: int  # of a code: 2, 3 or 4
    codes: Tensor  # (rows, cols) uint8
    levels: tuple[int, ...] | None  # 2^bits integers; None: the code itself, or 1 less (ONE_SCALE)
    small: Tensor | None  # 8-bit scales (rows, cols / 16 or 32) uint8 or int8
    scale: Tensor | None  # (rows, blocks) float16; float32 is rounded to it by native kernels
    minima: Tensor | None = None  # the scale of minima (rows, blocks) float16
    unit: float = 1.0  # the number for all

    @property
    def wide(self) -> int:
        """Columns of a block"""
        return 64 if self.scale is None else self.codes.shape[1] // self.scale.shape[1]

    def integers(self) -> Tensor:
        """The q of a PackedLinear: (rows, groups, columns of a group) int8, or nibbles"""
        codes = self.codes.unflatten(1, (-1, WIDTHS[self.kind] or 32))
        if self.levels is not None:
            return torch.tensor(self.levels, dtype=torch.int8)[codes.int()]
        return pack_nibbles(codes + 7) if self.kind == "ONE_SCALE" else codes.view(torch.int8)

    def scales(self) -> Tensor:
        """(rows, groups) float32"""
        if self.kind == "SCALES_FLOAT":
            assert self.small is not None
            return float8(self.small) * self.unit
        assert self.scale is not None
        each = self.scale.float() * self.unit
        if self.small is None:
            return each.repeat_interleave(self.wide // 32, 1)
        small = self.small & 15 if self.kind == "SCALES_MINS" else self.small.view(torch.int8)
        return (small.unflatten(1, (each.shape[1], -1)) * each.unsqueeze(-1)).flatten(1)

    def offsets(self) -> Tensor | None:
        """(rows, groups) float32"""
        if self.minima is None or self.small is None:
            return None
        small = (self.small >> 4).unflatten(1, (self.minima.shape[1], -1))
        return -(small * self.minima.float().unsqueeze(-1)).flatten(1)


def float8(bits: Tensor) -> Tensor:
    """E4M3 without a sign, times 2^-8: its bits are those of a float16."""
    return (bits.to(torch.int16) << 7).view(torch.float16).float()


class FineLinear(PackedLinear):
    """A PackedLinear of 8-bit integers, or of 4 bits for two, which are made when something other
    than native kernels asks for them."""

    def __init__(self, fine: Fine) -> None:
        self.fine, self.bias, self.dtype, self.float4 = fine, None, torch.float32, False

    @functools.cached_property
    def q(self) -> Tensor:  # type: ignore[override]
        return self.fine.integers()

    @functools.cached_property
    def scale(self) -> Tensor:  # type: ignore[override]
        return self.fine.scales()

    @functools.cached_property
    def offset(self) -> Tensor | None:  # type: ignore[override]
        return self.fine.offsets()

    @property
    def shape(self) -> tuple[int, int]:
        num_rows, num_cols = self.fine.codes.shape
        return num_rows, num_cols

    @property
    def nbytes(self) -> int:
        """As native kernels hold it"""
        num_rows, num_cols = self.shape
        return num_rows * num_cols // self.fine.wide * row_bytes(self.fine)

    def select(self, rows: Tensor | slice) -> FineLinear:
        fine, names = self.fine, ("codes", "small", "scale", "minima")
        parts = {name: getattr(fine, name) for name in names}
        chosen: Any = {n: None if part is None else part[rows] for n, part in parts.items()}
        return FineLinear(dataclasses.replace(fine, **chosen))

    def layout(self, kinds: dict[str, int]) -> tuple[dict[str, Any], int]:
        """The fields of native.c's `matrix`, whose enum is `kinds`, and the bytes of a block."""
        fine = self.fine
        fields = {"bits": fine.bits, "group": fine.wide, "fine": kinds[fine.kind]}
        levels = {"levels": level_bytes(fine), "centre": centre(fine), "unit": fine.unit}
        return fields | levels, BLOCK_ROWS * row_bytes(fine)

    def fill(self, blocks: Tensor) -> None:
        """Write the weight into blocks (rows / 16, cols / wide, bytes)."""
        fine, (num_blocks, num_wide, _) = self.fine, blocks.shape
        missing = num_blocks * BLOCK_ROWS - len(fine.codes)
        shape = num_blocks, BLOCK_ROWS, num_wide

        def tiled(part: Tensor) -> Tensor:
            part = F.pad(part, (0, 0, 0, missing)) if missing else part
            return part.unflatten(1, (num_wide, -1)).unflatten(0, shape[:2])  # (.., 16, wide, n)

        words = code_words(tiled(fine.codes), fine.bits).permute(0, 2, 3, 4, 1)
        at = 4 * words[0, 0].numel()
        blocks[..., :at].view(torch.int32).view(words.shape).copy_(words)
        if fine.small is not None:
            small = tiled(fine.small.view(torch.uint8)).permute(0, 2, 3, 1)
            end = at + small[0, 0].numel()
            blocks[..., at:end].view(small.shape).copy_(small)
            at = end
        for part in (fine.scale, fine.minima):
            if part is not None:
                lanes = tiled(part)[..., 0].transpose(1, 2)
                blocks[..., at : at + 2 * BLOCK_ROWS].view(torch.float16).copy_(lanes)
                at += 2 * BLOCK_ROWS


class WideLinear(PackedLinear):
    """A PackedLinear of 4 bits whose scales and offsets are the same for `wide` columns."""

    wide = GROUP

    def widened(self, num_cols: int) -> WideLinear:
        """The same with scales that are equal for each `num_cols`"""
        widths = (128, 64) if self.offset is not None else (128,)
        fits = (n for n in widths if num_cols % n == 0 and self.shape[1] % n == 0)
        self.wide = next(fits, GROUP)
        return self

    @property
    def nbytes(self) -> int:
        """As native kernels hold it"""
        (num_rows, num_cols), (_, num_bytes) = self.shape, self.layout({})
        return num_rows * num_cols // self.wide * num_bytes // BLOCK_ROWS

    def _changed(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> WideLinear:
        plain = super()._changed(change, dtype)
        return WideLinear(plain.q, plain.scale, plain.offset, dtype=dtype).widened(self.wide)

    def layout(self, kinds: dict[str, int]) -> tuple[dict[str, Any], int]:
        """As that of FineLinear"""
        num_floats = 1 + (self.offset is not None)
        fields: dict[str, Any] = {"bits": 4, "group": self.wide, "has_offset": num_floats == 2}
        if self.wide > GROUP:
            kind, middle = ("ONE_SCALE", 8) if self.offset is None else ("ONE_OFFSET", 0)
            fields |= {"fine": kinds.get(kind), "centre": middle, "unit": 1.0}
        return fields, BLOCK_ROWS * (self.wide // 2 + 2 * num_floats)

    def fill(self, blocks: Tensor) -> None:
        """As that of FineLinear"""
        num_blocks, num_wide, _ = blocks.shape
        missing = num_blocks * BLOCK_ROWS - len(self.q)

        def tiled(part: Tensor) -> Tensor:
            return F.pad(part, (0, 0, 0, missing)).view(num_blocks, BLOCK_ROWS, num_wide, -1)

        words = tiled(self.q.flatten(1).view(torch.int32)).permute(0, 2, 3, 1)
        at = 4 * words[0, 0].numel()
        blocks[..., :at].view(torch.int32).view(words.shape).copy_(words)
        for part in (self.scale, self.offset):
            if part is not None:
                lanes = tiled(part)[..., 0].transpose(1, 2)
                blocks[..., at : at + 2 * BLOCK_ROWS].view(torch.float16).copy_(lanes)
                at += 2 * BLOCK_ROWS


def row_bytes(fine: Fine) -> int:
    """Bytes of one row of a block."""
    num_scales = fine.wide // WIDTHS[fine.kind] if WIDTHS[fine.kind] else 0
    num_floats = sum(part is not None for part in (fine.scale, fine.minima))
    return fine.wide * fine.bits // 8 + num_scales + 2 * num_floats


def centre(fine: Fine) -> int:
    """What codes, or the bytes of levels, are above their numbers: 64 for levels of at most 62, as
    with scales of 16 columns, so that 16 bits hold the sum of two products."""
    if fine.levels is None:
        return int(fine.kind == "ONE_SCALE")
    return 64 if WIDTHS[fine.kind] == 16 else 128


def level_bytes(fine: Fine) -> Tensor | None:
    """Levels as 16 unsigned bytes"""
    if fine.levels is None:
        return None
    levels = torch.tensor(fine.levels * (16 // len(fine.levels)), dtype=torch.int16)
    return levels.add(centre(fine)).to(torch.uint8)


def code_words(codes: Tensor, bits: int) -> Tensor:
    """Codes (blocks, 16, wide, cols) -> (blocks, 16, wide, cols / 32, registers) int32 in the order
    of `code_word` in native.c"""
    words = codes.contiguous().view(torch.int32).unflatten(-1, (-1, 2, 4))  # (.., half, word)
    if bits == 4:
        return words[..., 0, :] | words[..., 1, :] << 4
    low = merged(words & 0x03030303, 2)
    if bits == 2:
        return low
    high = merged((words >> 2 & 0x01010101).flatten(-2), 1)
    return torch.cat((low, high.unsqueeze(-1)), dim=-1)


def merged(words: Tensor, step: int) -> Tensor:
    """Words (.., n), each shifted by `step` bits more than the one before -> (..)"""
    found = words[..., 0]
    for i in range(1, words.shape[-1]):
        found = found | words[..., i] << step * i
    return found
