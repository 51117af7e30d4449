"""Float weights as blocks of GGUF files: the inverse of the core's REPACK.

Adds       `quantized_rows`: Q4_0 to Q8_0, and Q2_K to Q6_K, which the gguf package only reads. Each
           group's scale, and offset where the type has one, are searched for the least squared
           error, weighted by the importance of columns if it is given. Q4_1 and Q8_0 without
           importance are the core's `quantize`. `packed_blocks` writes packed weights as they are.
Seam       files.conversion calls it. No other extra is imported.
Remove     delete this file with commands/convert.py.
Spec       https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (block layouts)

Shapes: G groups of n columns; S super-blocks of 256 columns, which are G groups each.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import gguf
import torch
from torch import Tensor

from nanollama import (
    GROUP,
    LEAST_WEIGHT,
    MOST_WEIGHT,
    SEARCH_WEIGHTS,
    PackedLinear,
    pack_nibbles,
    quantize,
)

SUPER = 256  # columns of a super-block
FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# Grids that a search tries: levels beyond the outermost one, where the value farthest from 0 lies;
# for types with an offset, steps inside the span, where a grid begins and ends.
BEYOND = (0.0, 0.2, 0.45, 0.75, -0.3, -0.6, -0.9)
ENDS = tuple(itertools.product((-0.2, 0.2, 0.6), repeat=2))
WITHIN = (-2, -1)  # dimensions of a super-block
LEAST_SHARE = 1e-3  # least importance of a column, as a share of the mean


@dataclass(frozen=True, slots=True)
class Groups:
    """Values x (.., G, n), and weights of their squared errors, or None for equal ones."""

    x: Tensor
    weight: Tensor | None

    def weighted(self, values: Tensor) -> Tensor:
        return values if self.weight is None else values * self.weight

    def sum(self, values: Tensor, *dims: int) -> Tensor:
        """Weighted sums (.., 1) over the last dimension, or over `dims`"""
        return self.weighted(values).sum(dims or -1, keepdim=True)

    def errors(self, values: Tensor, *dims: int) -> Tensor:
        """Weighted squared errors of values for x, as `sum`"""
        return self.sum((values - self.x).square_(), *dims)


def nonzero(divisor: Tensor) -> Tensor:
    """1 in place of 0, the scale of a group of zeros"""
    return torch.where(divisor == 0, 1.0, divisor)


def levels(x: Tensor, scale: Tensor, least: int, most: int) -> Tensor:
    """The integers from `least` to `most` that are nearest to x / scale, as floats"""
    return (x / nonzero(scale)).round_().clamp_(least, most)


# ---- searches for the scales of groups -----------------------------------------------------------


def symmetric_scales(groups: Groups, least: int, most: int) -> Tensor:
    """Scales (.., G, 1) for x = q scale, with q from `least`, a negative number, to `most`. Grids
    put the value that is farthest from 0 near `least`; each is fitted to its levels by least
    squares, and the best one once more."""
    x = groups.x
    farthest = x.gather(-1, x.abs().argmax(-1, keepdim=True))
    best, gained = torch.zeros_like(farthest), torch.full_like(farthest, -1.0)
    for beyond in (*BEYOND, None):
        scale = best if beyond is None else farthest / (least - beyond)
        q = levels(x, scale, least, most)
        weighted = groups.weighted(q)
        product = (weighted * x).sum(-1, keepdim=True)
        scale = product / nonzero(weighted.mul_(q).sum(-1, keepdim=True))
        gain = product * scale  # by which the squared error is less than that of zeros
        best = torch.where(gain > gained, scale, best)
        gained = torch.maximum(gain, gained)
    return best


def affine_scales(groups: Groups, most: int, below: bool) -> tuple[Tensor, Tensor]:
    """Scales and offsets (.., G, 1) for x = q scale + offset, with q from 0 to `most`; `below` if
    offsets must not be positive. Searches as `symmetric_scales`."""
    x, count = groups.x, groups.sum(torch.ones_like(groups.x))
    mean = groups.sum(x) / count
    centred = x - mean
    low, high = x.aminmax(dim=-1, keepdim=True)
    low = low.clamp(max=0) if below else low
    step = (high - low) / most
    scale, offset = step, low
    gained = torch.full_like(low, -torch.inf)
    for ends in (*ENDS, None):
        grid = scale, offset
        if ends:
            grid = step * (1 - sum(ends) / most), low + step * ends[0]
        q = levels(x - grid[1], grid[0], 0, most)
        fit = fitted(groups, q, centred, mean, count, below)
        is_better = fit[0] > gained
        scale, offset = (torch.where(is_better, *two) for two in zip(fit[1:], (scale, offset)))
        gained = torch.maximum(fit[0], gained)
    return scale, offset


def fitted(
    groups: Groups, q: Tensor, centred: Tensor, mean: Tensor, count: Tensor, below: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """For levels q (.., G, n): by how much a line through them lowers the squared error from that
    of the mean, its scale and its offset (.., G, 1)"""
    weighted = groups.weighted(q)
    sum_q = weighted.sum(-1, keepdim=True)
    product = (weighted * centred).sum(-1, keepdim=True)
    square = (weighted * q).sum(-1, keepdim=True)
    scale = product / nonzero(square - sum_q.square() / count)
    offset = mean - scale * sum_q / count
    gain = scale * product
    if not below:
        return gain, scale, offset
    whole = product + mean * sum_q  # without an offset
    plain = whole / nonzero(square)
    is_above = offset > 0
    return (
        torch.where(is_above, plain * whole - count * mean.square(), gain),
        torch.where(is_above, plain, scale).clamp_(min=0),
        offset.clamp(max=0),
    )


# ---- types with groups of 32 ---------------------------------------------------------------------


def half(x: Tensor) -> Tensor:
    """Numbers (.., k) as bytes of float16 (.., 2k)"""
    return x.to(torch.float16).contiguous().view(torch.uint8)


def fifth_bits(q: Tensor) -> Tensor:
    """The fifth bits of 32 numbers (.., 32) -> (.., 4) bytes, the first number's bit lowest"""
    bits = (q >> 4 & 1).unflatten(-1, (4, 8)) << torch.arange(8, dtype=torch.uint8)
    return bits.sum(-1, dtype=torch.uint8)


def pack_symmetric(groups: Groups, bits: int) -> Tensor:
    """Q4_0: d (2) | nibbles (16). Q5_0: d | fifth bits (4) | nibbles. Q8_0: d | 32 int8"""
    least, most = (-127, 127) if bits == 8 else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
    scale = symmetric_scales(groups, least, most).half().float()
    q = levels(groups.x, scale, least, most)
    if bits == 8:
        return torch.cat((half(scale), q.to(torch.int8).view(torch.uint8)), -1)
    return torch.cat((half(scale), *low_bits((q - least).to(torch.uint8), bits)), -1)


def pack_affine(groups: Groups, bits: int) -> Tensor:
    """Q4_1: d (2) | m (2) | nibbles (16). Q5_1: d | m | fifth bits (4) | nibbles"""
    scale, offset = (part.half() for part in affine_scales(groups, 2**bits - 1, below=False))
    q = levels(groups.x - offset, scale.float(), 0, 2**bits - 1).to(torch.uint8)
    return torch.cat((half(scale), half(offset), *low_bits(q, bits)), -1)


def low_bits(q: Tensor, bits: int) -> list[Tensor]:
    """32 numbers of 4 bits as nibbles, of 5 bits as fifth bits and nibbles"""
    nibbles = pack_nibbles(q & 15)
    return [nibbles] if bits == 4 else [fifth_bits(q), nibbles]


# ---- super-blocks of 256, whose groups have scales of few bits -----------------------------------


def shared(scales: Tensor, least: int, most: int) -> tuple[Tensor, Tensor]:
    """Scales (.., S, G, 1) as integers from `least` to `most`, and their unit (.., S, 1, 1), which
    float16 holds. The scale that is farthest from 0 becomes `least`, or `most` if that is 0."""
    flat = scales.flatten(-2)
    farthest = flat.gather(-1, flat.abs().argmax(-1, keepdim=True)).unsqueeze(-1)
    unit = (farthest / (least or most)).half().float()
    return levels(scales, unit, least, most), unit


def super_symmetric(groups: Groups, least: int, least_scale: int) -> tuple[Tensor, Tensor, Tensor]:
    """Levels q from `least` on (.., S, G, n), the groups' integer scales (.., S, G, 1), and the
    unit of these (.., S, 1, 1), which is fitted to the first levels where that is better."""
    plain = symmetric_scales(groups, least, -least - 1)
    scales, unit = shared(plain, least_scale, -least_scale - 1)
    q = levels(groups.x, unit * scales, least, -least - 1)
    products = q * scales
    square = groups.sum(products.square(), *WITHIN)
    other = (groups.sum(products * groups.x, *WITHIN) / nonzero(square)).half().float()
    q2 = levels(groups.x, other * scales, least, -least - 1)
    old, new = (groups.errors(u * v * scales, *WITHIN) for u, v in ((unit, q), (other, q2)))
    return torch.where(new < old, q2, q), scales, torch.where(new < old, other, unit)


def super_affine(groups: Groups, most: int, most_scale: int) -> tuple[Tensor, ...]:
    """Levels q from 0 to `most` (.., S, G, n), the groups' integer scales and minima (.., S, G, 1),
    and the units of both (.., S, 1, 1), fitted to the first levels where that is better."""
    x = groups.x
    scale, offset = affine_scales(groups, most, below=True)
    (scales, d), (mins, m) = (shared(part, 0, most_scale) for part in (scale, -offset))
    q = levels(x + m * mins, d * scales, 0, most)
    a, b = q * scales, mins.expand_as(q)  # x = d a - m b
    aa, ab, bb = (groups.sum(u * v, *WITHIN) for u, v in ((a, a), (a, b), (b, b)))
    ax, bx = (groups.sum(u * x, *WITHIN) for u in (a, b))
    determinant = aa * bb - ab.square()
    is_even = determinant <= 1e-6 * aa * bb
    divisor = torch.where(is_even, 1.0, determinant)
    d2 = torch.where(is_even, d, (ax * bb - bx * ab) / divisor).half().float()
    m2 = torch.where(is_even, m, (ax * ab - bx * aa) / divisor).half().float()
    q2 = levels(x + m2 * mins, d2 * scales, 0, most)
    both = (d, q, m), (d2, q2, m2)
    errors = [groups.errors(u * v * scales - w * mins, *WITHIN) for u, v, w in both]
    is_better = (errors[1] < errors[0]) & (d2 >= 0) & (m2 >= 0)
    q, d, m = (torch.where(is_better, *two) for two in ((q2, q), (d2, d), (m2, m)))
    return q, scales, mins, d, m


def six_bits(scales: Tensor, mins: Tensor) -> Tensor:
    """8 scales and 8 minima (.., 8) of 6 bits -> (.., 12) bytes: the inverse of `_k_scales`"""
    (low, high), (low_m, high_m) = scales.chunk(2, -1), mins.chunk(2, -1)
    tops = low | (high >> 4) << 6, low_m | (high_m >> 4) << 6
    return torch.cat((*tops, (high & 15) | (high_m & 15) << 4), -1)


def pack_k_affine(groups: Groups, bits: int) -> Tensor:
    """Q4_K: d (2) | dmin (2) | scales (12) | nibbles (128). Q5_K has fifth bits (32) before these.
    Of four times two groups, the first has the low nibbles of 32 bytes."""
    q, *parts = super_affine(groups, 2**bits - 1, 63)
    scales, mins = (part.squeeze(-1).to(torch.uint8) for part in parts[:2])  # (.., S, 8)
    q = q.to(torch.uint8)  # (.., S, 8, 32)
    head = [*(half(part.squeeze(-1)) for part in parts[2:]), six_bits(scales, mins)]
    if bits == 5:
        shift = torch.arange(8, dtype=torch.uint8).unsqueeze(-1)
        head.append((q >> 4 << shift).sum(-2, dtype=torch.uint8))
    nibbles = pack_nibbles((q & 15).unflatten(-2, (4, 2)).flatten(-2))  # (.., S, 4, 32)
    return torch.cat((*head, nibbles.flatten(-2)), -1)


def quarters(q: Tensor) -> Tensor:
    """256 numbers of 2 bits (.., 256) -> (.., 64) bytes: of each 128, a byte has those at distance
    32, the first one lowest"""
    shift = torch.arange(0, 8, 2, dtype=torch.uint8).unsqueeze(-1)
    return (q.unflatten(-1, (2, 4, 32)) << shift).sum(-2, dtype=torch.uint8).flatten(-2)


def pack_q2_k(groups: Groups) -> Tensor:
    """16 times scale and minimum of 4 bits | 2 bits (64) | d (2) | dmin (2)"""
    q, *parts = super_affine(groups, 3, 15)
    scales, mins = (part.squeeze(-1).to(torch.uint8) for part in parts[:2])  # (.., S, 16)
    units = [half(part.squeeze(-1)) for part in parts[2:]]
    return torch.cat((scales | mins << 4, quarters(q.to(torch.uint8).flatten(-2)), *units), -1)


def pack_q3_k(groups: Groups) -> Tensor:
    """third bits (32) | 2 bits (64) | 16 scales of 6 bits (12) | d (2)"""
    q, scales, d = super_symmetric(groups, -4, -32)
    q = (q + 4).to(torch.uint8).flatten(-2)
    shift = torch.arange(8, dtype=torch.uint8).unsqueeze(-1)
    high = (q >> 2).unflatten(-1, (8, 32)) << shift
    s = (scales.squeeze(-1) + 32).to(torch.uint8)  # (.., S, 16)
    low = (s[..., :8] & 15) | (s[..., 8:] & 15) << 4
    tops = (s >> 4).unflatten(-1, (4, 4)) << torch.arange(0, 8, 2, dtype=torch.uint8).unsqueeze(-1)
    thirds, last = (part.sum(-2, dtype=torch.uint8) for part in (high, tops))
    return torch.cat((thirds, quarters(q & 3), low, last, half(d.squeeze(-1))), -1)


def pack_q6_k(groups: Groups) -> Tensor:
    """low nibbles (128) | 2 high bits (64) | 16 int8 scales | d (2)"""
    q, scales, d = super_symmetric(groups, -32, -128)
    q = (q + 32).to(torch.uint8).flatten(-2)
    low = pack_nibbles((q & 15).unflatten(-1, (2, 128))).flatten(-2)
    s = scales.squeeze(-1).to(torch.int8).view(torch.uint8)
    return torch.cat((low, quarters(q >> 4), s, half(d.squeeze(-1))), -1)


# ---- packed weights, which some types hold exactly -----------------------------------------------


def plain(packed: PackedLinear) -> PackedLinear:
    """A weight of a form of its own as integers of 4 or 8 bits, with scales in float16 if it holds
    all of them"""
    if type(packed) is PackedLinear:
        return packed
    q, scale, offset = packed.q, packed.scale, packed.offset
    if offset is None and torch.equal(scale.half().float(), scale.float()):
        scale = scale.half()
    return PackedLinear(q, scale, offset)


def packed_kind(packed: PackedLinear) -> str | None:
    """The type whose blocks hold packed weights exactly; None for none"""
    numbers = [packed.scale] if packed.offset is None else [packed.scale, packed.offset]
    is_half = all(part.dtype == torch.float16 for part in numbers)
    is_grouped = packed.shape[1] == packed.scale.shape[1] * GROUP
    if not (is_half and is_grouped):
        return None
    if packed.float4:
        return "MXFP4"
    if packed.bits == 4:
        return "Q4_0" if packed.offset is None else "Q4_1"
    return "Q8_0" if packed.offset is None else None


def packed_blocks(packed: PackedLinear) -> Tensor:
    """Packed weights of a type of `packed_kind` as rows of blocks (rows, bytes)"""
    numbers = [packed.scale] if packed.offset is None else [packed.scale, packed.offset]
    head = [half(part.unsqueeze(-1)) for part in numbers]
    if packed.float4:
        head = [(packed.scale.float().log2() + 128).to(torch.uint8).unsqueeze(-1)]
    return torch.cat((*head, packed.q.view(torch.uint8)), -1).flatten(1)


# ---- rows of a matrix ----------------------------------------------------------------------------

# type -> columns of a group, and the function that packs (.., G, n) or (.., S, G, n)
PACKERS: dict[str, tuple[int, Callable[[Groups], Tensor]]] = {
    **{f"Q{n}_0": (GROUP, functools.partial(pack_symmetric, bits=n)) for n in (4, 5, 8)},
    **{f"Q{n}_1": (GROUP, functools.partial(pack_affine, bits=n)) for n in (4, 5)},
    **{f"Q{n}_K": (GROUP, functools.partial(pack_k_affine, bits=n)) for n in (4, 5)},
    "Q2_K": (16, pack_q2_k),
    "Q3_K": (16, pack_q3_k),
    "Q6_K": (16, pack_q6_k),
}


CORE_BITS = {"Q4_1": 4, "Q8_0": 8}  # types of the core's own search


def row_bytes(kind: str, num_cols: int) -> int:
    """Bytes of a row in a type"""
    block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    return num_cols // block * block_bytes


def unpacked(blocks: Tensor, kind: str) -> Tensor:
    """Rows of blocks (rows, bytes) as floats (rows, cols)"""
    values = gguf.quants.dequantize(blocks.numpy(), gguf.GGMLQuantizationType[kind])
    return torch.from_numpy(values)


def packed_rows(rows: Tensor, kind: str, weight: Tensor | None) -> Tensor:
    """Rows (rows, cols) float32 as blocks (rows, bytes) of a type in PACKERS; `weight` (cols,)"""
    width, pack = PACKERS[kind]

    def grouped(x: Tensor) -> Tensor:
        groups = x.unflatten(-1, (-1, width))
        return groups.unflatten(-2, (-1, SUPER // width)) if kind.endswith("_K") else groups

    groups = Groups(grouped(rows), None if weight is None else grouped(weight))
    return pack(groups).reshape(len(rows), -1)


def weighted_rows(rows: Tensor, kind: str, weight: Tensor) -> tuple[Tensor, float, float]:
    """Blocks as `packed_rows`, of the weighted search for rows whose weighted error that lowers and
    of the other search for the rest; the weighted error of the other search, and of the blocks"""
    both = [packed_rows(rows, kind, w) for w in (None, weight)]
    errors = [((unpacked(b, kind) - rows).square_() * weight).sum(-1) for b in both]
    is_lower = errors[1] < errors[0]
    least = torch.minimum(*errors)
    blocks = torch.where(is_lower.unsqueeze(-1), both[1], both[0])
    return blocks, float(errors[0].sum()), float(least.sum())


def column_weights(importance: Tensor) -> Tensor | None:
    """Weights (cols,) of squared errors, whose mean is about 1; None if nothing was seen"""
    mean = importance.mean()
    return (importance / mean).clamp_(min=LEAST_SHARE) if mean > 0 else None


@dataclass(slots=True)
class Gain:
    """Weighted squared errors of matrices: without the weights in the search, and with them."""

    without: float = 0.0
    with_weights: float = 0.0


def quantized_rows(
    rows: Tensor, kind: str, importance: Tensor | None = None, gain: Gain | None = None
) -> Tensor:
    """Rows of a matrix (rows, cols) as blocks (rows, bytes) uint8 of a type of PACKERS or FLOATS.

    importance: the mean square of each column's operand (cols,). Weighted errors are added to
    `gain`. Raises ValueError for numbers that float16 scales cannot hold, or NaN."""
    if kind in FLOATS:
        return rows.to(FLOATS[kind]).contiguous().view(torch.uint8)
    largest = max(float(end.abs()) for end in rows.aminmax())
    if largest and not largest <= MOST_WEIGHT:  # false for NaN
        raise ValueError(f"its largest value is {largest:g}, which float16 scales cannot hold")
    weight = None if importance is None else column_weights(importance)
    if kind in CORE_BITS and weight is None and largest >= LEAST_WEIGHT:
        return packed_blocks(quantize(rows, CORE_BITS[kind]))
    out = torch.empty((len(rows), row_bytes(kind, rows.shape[1])), dtype=torch.uint8)
    step = max(1, SEARCH_WEIGHTS // 4 // rows.shape[1])

    def search_rows(start: int) -> tuple[float, float]:
        piece = slice(start, start + step)
        with torch.inference_mode():
            x = rows[piece].float()
            if weight is None:
                out[piece] = packed_rows(x, kind, None)
                return 0.0, 0.0
            out[piece], *errors = weighted_rows(x, kind, weight)
            return errors[0], errors[1]

    # each core works on rows of its own, as sharing small operations would make cores wait
    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(num_threads, "", torch.set_num_threads, (1,)) as pool:
        errors = list(pool.map(search_rows, range(0, len(rows), step)))
    torch.set_num_threads(num_threads)  # for threads that start later
    if gain:
        gain.without += sum(old for old, _ in errors)
        gain.with_weights += sum(new for _, new in errors)
    return out
