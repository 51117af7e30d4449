"""GGUF's rarer tensor types: of 1 to 4 bits, packed.

Adds       Q2_K, Q3_K, the IQ types, TQ1_0, TQ2_0, NVFP4 with its `.scale` tensors, Q1_0 and Q2_0,
           of which the gguf package does not know the last two well or at all.
Seam       `find` gives the BlockType of a number that the core does not know; `scaled` takes the
           factors of NVFP4 into its weights. Weights are FineLinears (kernels.fine, which it
           imports), so no number of a file is rounded.
Remove     delete this file; files with such types then say that they need it.
Source     https://github.com/ggml-org/ggml (src/ggml-common.h, src/ggml-quants.c); grids of the IQ
           types come from the gguf package.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import gguf.quants
import torch
from torch import Tensor

from nanollama import BlockType, CheckpointError, PackedLinear, TensorSource, excerpt
from nanollama_extras.kernels.fine import Fine, FineLinear

Tensors = Mapping[str, TensorSource]

# ---- parts of blocks: b (rows, blocks, bytes of a block) uint8 -----------------------------------


def copied(b: Tensor, at: int, end: int) -> Tensor:
    """Bytes of each block, where integers of any width may start"""
    return b[..., at:end].clone(memory_format=torch.contiguous_format)


def half(b: Tensor, at: int) -> Tensor:
    """The float16 at a byte of each block (rows, blocks)"""
    return copied(b, at, at + 2).view(torch.float16).squeeze(-1)


def integers(b: Tensor, at: int, end: int, dtype: torch.dtype) -> Tensor:
    """Little-endian integers, without a sign if int32 holds them (rows, blocks, n)"""
    found = copied(b, at, end).view(dtype)
    return found.int() & 0xFFFF if dtype == torch.int16 else found


def shifted(x: Tensor, step: int, count: int) -> Tensor:
    """Numbers, shifted by 0, step, 2 step, .. (.., count)"""
    return x.unsqueeze(-1) >> torch.arange(0, step * count, step, dtype=x.dtype)


def nibbles(b: Tensor) -> Tensor:
    """Bytes (.., n) as the low and the high one of each (.., 2n)"""
    return (shifted(b, 4, 2) & 15).flatten(-2)


def planes(b: Tensor, bits: int) -> Tensor:
    """Codes of 1 or 2 bits: byte i of 32 has those of columns i, i + 32, .. -> (.., columns)"""
    words = copied(b, 0, b.shape[-1]).view(torch.int32).unflatten(-1, (-1, 1, 8))
    shifts = torch.arange(0, 8, bits, dtype=torch.int32).view(-1, 1)
    return (words >> shifts & (2**bits - 1) * 0x01010101).flatten(-3).view(torch.uint8)


def halved(b: Tensor) -> Tensor:
    """Bytes (.., n): n low nibbles, then n high ones"""
    return torch.cat((b & 15, b >> 4), dim=-1)


# ---- grids: 4 or 8 codes for an index, and signs of 8 --------------------------------------------


def signed(magnitudes: tuple[int, ...]) -> tuple[int, ...]:
    """Levels of codes whose highest bit is the sign."""
    return (*magnitudes, *(-level for level in magnitudes))


IQ4 = gguf.quants.IQ4_NL.kvalues
FLOAT4 = gguf.quants.MXFP4.kvalues
IQ3_XXS, IQ3_S = (signed(gguf.quants.__dict__[n].grid_map) for n in ("IQ3_XXS", "IQ3_S"))
IQ2 = signed((*gguf.quants.IQ2_XXS.grid_map, 0))
IQ1 = (-9, -1, 7, 0, -7, 1, 9, 0)  # 8 times -1, 0, 1 less 1/8; plus 1/8


@functools.cache
def grid(name: str) -> Tensor:
    """The codes of a type's grid as integers of 4 or 8 bytes, one for each index."""
    kind = gguf.quants.__dict__[name]
    kind.init_grid()
    values = torch.from_numpy(kind.grid.copy()).reshape(kind.grid_shape)
    levels = torch.tensor(kind.grid_map, dtype=values.dtype)
    codes = torch.searchsorted(levels, values).to(torch.uint8)
    return codes.view(torch.int32 if codes.shape[1] == 4 else torch.int64).squeeze(1)


@functools.cache
def sign_bits(bit: int) -> Tensor:
    """For each byte of 8 signs the 8 bytes with this bit set where there is one (256) int64"""
    signs = shifted(torch.arange(256, dtype=torch.int32), 1, 8) & 1
    return (signs << bit).to(torch.uint8).view(torch.int64).squeeze(1)


@functools.cache
def even_signs() -> Tensor:
    """For 7 signs, the byte of 8 of which an even number is set (128) int32"""
    return torch.frombuffer(bytearray(gguf.quants.IQ2_XXS.ksigns), dtype=torch.uint8).int()


def from_grid(name: str, index: Tensor, signs: Tensor | None, bit: int) -> Tensor:
    """Codes (.., columns) uint8 of grid entries `index`, with a bit for each of 8 signs."""
    codes = grid(name)[index.int()].view(torch.int64)
    if signs is not None:
        codes = codes | sign_bits(bit)[signs.int()]
    return codes.view(torch.uint8)


def packed_signs(words: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of 32 bits: the bytes of 8 signs in 4 times 7 bits (.., 4), the scale in 4 bits"""
    return even_signs()[(shifted(words, 7, 4) & 127)], words >> 28 & 15


# ---- types: blocks -> Fine -----------------------------------------------------------------------


def fine(kind: str, bits: int, codes: Tensor, scale: Tensor | None, **parts: Any) -> Fine:
    small = parts.pop("small", None)
    small = None if small is None else small.to(torch.uint8).flatten(1)
    levels, codes = parts.pop("levels", None), codes.flatten(1)
    return Fine(kind, bits, codes, levels, small, scale, **parts)


def q2_k(b: Tensor) -> Fine:  # 16 scales and minima of 4 bits | 64 bytes | d (2) | d of minima (2)
    codes, scales = planes(b[..., 16:80], 2), b[..., :16]
    return fine("SCALES_MINS", 2, codes, half(b, 80), small=scales, minima=half(b, 82))


def q3_k(b: Tensor) -> Fine:  # high bits (32) | 64 bytes | 16 scales of 6 bits (12) | d (2)
    codes = planes(b[..., 32:96], 2) | planes(b[..., :32], 1) << 2
    low, high = b[..., 96:104], b[..., 104:108].unsqueeze(-2)
    high = (high >> torch.arange(0, 8, 2, dtype=torch.uint8).view(4, 1)).flatten(-2) & 3
    scales = (halved(low) | high << 4) - 32
    return fine("SCALES_16", 3, codes, half(b, 108), small=scales, levels=tuple(range(-4, 4)))


def iq4_nl(b: Tensor) -> Fine:  # d (2) | 16 bytes: 16 low nibbles, then 16 high
    return fine("ONE_SCALE", 4, halved(b[..., 2:]), half(b, 0), levels=IQ4)


def iq4_xs(b: Tensor) -> Fine:  # d (2) | high bits of 8 scales (2) | low ones (4) | 8 times 16
    high = shifted(integers(b, 2, 4, torch.int16), 2, 8).flatten(-2) & 3
    scales = (nibbles(b[..., 4:8]) | high << 4) - 32
    codes = halved(b[..., 8:].unflatten(-1, (8, 16)))
    return fine("SCALES_32", 4, codes, half(b, 0), small=scales, levels=IQ4)


def iq3_xxs(b: Tensor) -> Fine:  # d (2) | 64 indices | 8 times 32 bits: signs, scale
    signs, scales = packed_signs(integers(b, 66, 98, torch.int32))
    codes = from_grid("IQ3_XXS", b[..., 2:66], signs.flatten(-2), 3)
    scales = 2 * scales + 1
    return fine("SCALES_32", 4, codes, half(b, 0), small=scales, levels=IQ3_XXS, unit=0.25)


def iq3_s(b: Tensor) -> Fine:  # d (2) | 64 indices | ninth bits (8) | signs (32) | 8 scales (4)
    index = b[..., 2:66].int() | (shifted(b[..., 66:74], 1, 8).flatten(-2).int() & 1) << 8
    codes = from_grid("IQ3_S", index, b[..., 74:106], 3)
    scales = 2 * nibbles(b[..., 106:110]) + 1
    return fine("SCALES_32", 4, codes, half(b, 0), small=scales, levels=IQ3_S)


def iq2(b: Tensor, codes: Tensor, scales: Tensor) -> Fine:
    """Scales of 16 columns; d is in the first two bytes."""
    scales = 2 * scales + 1
    return fine("SCALES_16", 3, codes, half(b, 0), small=scales, levels=IQ2, unit=0.125)


def iq2_xxs(b: Tensor) -> Fine:  # d (2) | 8 times: 4 indices, 32 bits of signs and scale
    words = integers(b, 2, 66, torch.int32).unflatten(-1, (8, 2))
    signs, scales = packed_signs(words[..., 1])
    index = copied(words, 0, 1).view(torch.uint8)
    return iq2(b, from_grid("IQ2_XXS", index, signs, 2), scales.repeat_interleave(2, -1))


def iq2_xs(b: Tensor) -> Fine:  # d (2) | 32 times 16 bits: index (9), signs (7) | 16 scales (8)
    words = integers(b, 2, 66, torch.int16)
    codes = from_grid("IQ2_XS", words & 511, even_signs()[words >> 9], 2)
    return iq2(b, codes, nibbles(b[..., 66:74]))


def iq2_s(b: Tensor) -> Fine:  # d (2) | 32 indices | signs (32) | high bits (8) | 16 scales (8)
    index = b[..., 2:34].int() | (shifted(b[..., 66:74], 2, 4).flatten(-2).int() & 3) << 8
    return iq2(b, from_grid("IQ2_S", index, b[..., 34:66], 2), nibbles(b[..., 74:82]))


def iq1(index: Tensor, is_less: Tensor, scales: Tensor, scale: Tensor) -> Fine:
    """Entries `index` of the grid, 1/8 more or less, with scales of 16 columns."""
    more = (~is_less).long() * 0x0404040404040404
    codes = (grid("IQ1_S")[index] | more).view(torch.uint8)
    small = 2 * scales + 1
    return fine("SCALES_16", 3, codes, scale, small=small, levels=IQ1, unit=0.125)


def iq1_s(b: Tensor) -> Fine:  # d (2) | 32 indices | 8 times 16 bits: high bits, scale (3), sign
    words = integers(b, 34, 50, torch.int16)
    index = b[..., 2:34].int() | (shifted(words, 3, 4).flatten(-2) & 7) << 8
    is_less = (words >> 15 == 1).repeat_interleave(4, -1)
    return iq1(index, is_less, (words >> 12 & 7).repeat_interleave(2, -1), half(b, 0))


def iq1_m(b: Tensor) -> Fine:  # 32 indices | their high bits, signs (16) | 16 scales, d (8)
    high, words = nibbles(b[..., 32:48]).int(), integers(b, 48, 56, torch.int16)
    index = b[..., :32].int() | (high & 7) << 8
    d = ((words >> 12) << torch.arange(0, 16, 4, dtype=torch.int32)).sum(-1, dtype=torch.int32)
    scale = d.to(torch.int16).view(torch.float16)
    return iq1(index, high & 8 == 8, shifted(words, 3, 4).flatten(-2) & 7, scale)


def ternary(codes: Tensor, d: Tensor) -> Fine:
    """Codes 1 above the levels (rows, blocks, columns), with d for each block of 64 or more"""
    times = codes.shape[-1] // 64
    return fine("ONE_SCALE", 2, codes, d.repeat_interleave(times, -1).contiguous())


def tq1_0(b: Tensor) -> Fine:  # 48 bytes of five digits, 4 of four: base 3, highest first | d (2)
    powers = torch.tensor([1, 3, 9, 27, 81], dtype=torch.uint8).view(5, 1)
    parts = (b[..., :32], 5), (b[..., 32:48], 5), (b[..., 48:52], 4)
    digits = [(part.unsqueeze(-2) * powers[:count]).flatten(-2) for part, count in parts]
    codes = (torch.cat(digits, dim=-1).to(torch.int16) * 3 >> 8).to(torch.uint8)
    return ternary(codes, half(b, 52))


def tq2_0(b: Tensor) -> Fine:  # 64 bytes | d (2)
    return ternary(planes(b[..., :64], 2), half(b, 64))


def q1_0(b: Tensor) -> Fine:  # d (2) | 128 bits: d or -d
    return ternary((shifted(b[..., 2:], 1, 8).flatten(-2) & 1) << 1, half(b, 0))


def q2_0(b: Tensor) -> Fine:  # d (2) | 64 times 2 bits
    return ternary(shifted(b[..., 2:], 2, 4).flatten(-2) & 3, half(b, 0))


def nvfp4(b: Tensor) -> Fine:  # 4 scales (E4M3) | 4 times 8 bytes: 8 low nibbles, then 8 high
    scales = torch.where(b[..., :4] == 127, 0, b[..., :4] & 127)  # NaN is 0 in llama.cpp, too
    codes = halved(b[..., 4:].unflatten(-1, (4, 8)))
    # levels are doubled; E4M3 is read times 2^-8
    return fine("SCALES_FLOAT", 4, codes, None, small=scales, levels=FLOAT4, unit=128.0)


def block_type(function: Callable[[Tensor], Fine], width: int, num_bytes: int) -> BlockType:
    unpack = lambda b: FineLinear(function(b))  # noqa: E731
    return BlockType(function.__name__.upper(), width, num_bytes, unpack)


# ggml_type of ggml.h -> the type
TYPES = {
    10: block_type(q2_k, 256, 84),
    11: block_type(q3_k, 256, 110),
    16: block_type(iq2_xxs, 256, 66),
    17: block_type(iq2_xs, 256, 74),
    18: block_type(iq3_xxs, 256, 98),
    19: block_type(iq1_s, 256, 50),
    20: block_type(iq4_nl, 32, 18),
    21: block_type(iq3_s, 256, 110),
    22: block_type(iq2_s, 256, 82),
    23: block_type(iq4_xs, 256, 136),
    29: block_type(iq1_m, 256, 56),
    34: block_type(tq1_0, 256, 54),
    35: block_type(tq2_0, 256, 66),
    40: block_type(nvfp4, 64, 36),
    41: block_type(q1_0, 128, 18),
    42: block_type(q2_0, 64, 18),
}


def held_bits(kind: str) -> float:
    """Bits of a weight of a type of TYPES as native kernels hold it; 0 for another one."""
    found = next((each for each in TYPES.values() if each.name == kind), None)
    if found is None or found.unpack is None:
        return 0
    blocks = torch.zeros((1, 1, found.num_bytes), dtype=torch.uint8)
    return 8 * found.unpack(blocks).nbytes / found.width


# ---- NVFP4's factors -----------------------------------------------------------------------------


def scaled(tensors: Tensors) -> dict[str, TensorSource]:
    """The tensors, with NAME.scale, a number or one for each expert, taken into the NVFP4 weight
    NAME.weight. NAME.input_scale is left out: activations are not rounded to 4 bits here.
    Raises CheckpointError."""
    found = dict(tensors)
    for name, weight in tensors.items():
        stem = name.removesuffix(".weight")
        if weight.kind != "NVFP4" or stem == name:
            continue
        found.pop(f"{stem}.input_scale", None)
        if factor := found.pop(f"{stem}.scale", None):
            if factor.shape != (weight.shape[:-2] or (1,)):
                raise CheckpointError(f"tensor {excerpt(stem)}.scale has shape {factor.shape}")
            load = functools.partial(load_scaled, weight, factor)
            found[name] = dataclasses.replace(weight, load=load)
    return found


def load_scaled(weight: TensorSource, factor: TensorSource, *index: Any) -> Tensor | PackedLinear:
    factors, loaded = factor.load(), weight.load(*index)
    assert isinstance(factors, Tensor)
    if isinstance(loaded, FineLinear):
        expert = index[0] if len(weight.shape) == 3 else 0
        unit = loaded.fine.unit * float(factors[expert])
        return FineLinear(dataclasses.replace(loaded.fine, unit=unit))
    assert isinstance(loaded, Tensor)
    return loaded * factors.view(-1, *(1,) * (loaded.dim() - 1))


def find(number: int, part: str) -> BlockType:
    """The type of this number, which `part` of a file has. Raises CheckpointError."""
    if number in TYPES:
        return TYPES[number]
    names = {kind.value: kind.name for kind in gguf.GGMLQuantizationType}
    if number in names:
        raise CheckpointError(f"{part} is of type {names[number]}, which holds no weights")
    raise CheckpointError(f"{part} has unknown type {number}")
