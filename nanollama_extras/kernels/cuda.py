"""The CUDA backend: packed products, norms, rotation and attention as Triton kernels, and decode
steps recorded as CUDA graphs.

Seam: `Backend` of nanollama.py. `pick_backend` calls `make_backend` here for models on CUDA.
To remove the feature, delete this file: models on CUDA then run on torch's own operations.

A kernel is a function over blocks of numbers, run by many programs at once: `kernel[grid](..)`
starts one for each point of the grid. Block sizes (capital constexpr names) are powers of two;
masks cut off what sticks out. See https://triton-lang.org.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanollama import (
    Backend,
    Batch,
    KVCache,
    Linear,
    Norm,
    PackedLinear,
    RequestError,
    Rotation,
    first_line,
    log,
)

if TYPE_CHECKING:
    from nanollama import Attention, Decoder, DecodeSteps, ModelConfig, Span, Work


@functools.cache
def shared_memory_limit(device: int) -> int:
    """Bytes of shared memory that one program may use on a GPU."""
    properties = triton.runtime.driver.active.utils.get_device_properties(device)
    return int(properties["max_shared_mem"])


class Kernel:
    """Decorates a Triton kernel. Nothing is compiled before the first launch."""

    def __init__(self, function: Callable[..., None]) -> None:
        self.function = function
        self.tiles: dict[Any, dict[str, int]] = {}  # those chosen by `fitting`

    @functools.cached_property
    def jit(self) -> Any:
        varying = ("num_x", "layer", "window", "ring", "num_programs")  # not to be compiled in
        return triton.jit(self.function, do_not_specialize=varying)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., Any]:
        return self.jit[grid]

    def fitting(
        self, tiles: list[dict[str, int]], *arguments: Any, **constants: Any
    ) -> dict[str, int]:
        """The first of `tiles`, each some more constants, with which the compiled kernel fits into
        the shared memory of the current GPU; else the last. It depends on the types of the tensors
        and the constants, so that a model's rows are all computed in the same way."""
        if not isinstance(self.jit, triton.runtime.JITFunction):  # Triton's interpreter
            return tiles[0]
        device = triton.runtime.driver.active.get_current_device()
        dtypes = tuple(x.dtype for x in arguments if isinstance(x, Tensor))
        key = (device, dtypes, *constants.items(), *map(str, tiles))
        if key not in self.tiles:
            limit = shared_memory_limit(device)
            for tile in tiles:
                made = self.jit.warmup(*arguments, grid=(1,), **constants, **tile)
                self.tiles[key] = tile
                if made.metadata.shared <= limit:
                    break
        return self.tiles[key]


@Kernel
def linear_kernel(
    y: tl.tensor,
    x: tl.tensor,
    q: tl.tensor,
    scale: tl.tensor,
    offset: tl.tensor,
    bias: tl.tensor,
    num_x: tl.tensor,
    num_rows: tl.tensor,
    num_groups: tl.tensor,
    one: tl.tensor,
    bits: tl.constexpr,
    zero: tl.constexpr,
    width: tl.constexpr,
    NUM: tl.constexpr,
    ROWS: tl.constexpr,
    GROUPS: tl.constexpr,
    SLICES: tl.constexpr,
) -> None:
    """y (N, rows) = x W^T: a program makes ROWS x NUM numbers. Each of its SLICES (warps) sums up
    other columns, in an order that neither N nor NUM changes. `width` bytes hold a group.

    GPUs are slow at converting integers. A nibble becomes a float without it: or-ed into the bits
    of 1.0, which `one` holds, a nibble u makes 1 + u / 256, or 1 + u / 16 if it is the high one."""
    n = tl.program_id(0) * NUM + tl.arange(0, NUM)[None, :, None]
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[None, :, None].to(tl.int64)
    byte = tl.arange(0, width)[None, None, None, :]
    slices = tl.arange(0, SLICES)[:, None, None] * GROUPS + tl.arange(0, GROUPS)[None, None, :]
    total = tl.zeros((SLICES, ROWS, NUM), tl.float32)
    for start in range(0, num_groups, SLICES * GROUPS):
        g = start + slices  # (SLICES, 1, GROUPS)
        inside = (row < num_rows) & (g < num_groups)
        at = row * num_groups + g
        packed = tl.load(q + (at[:, :, :, None] * width + byte), inside[:, :, :, None], 0)
        s = tl.load(scale + at, inside, 0).to(tl.float32)[:, :, :, None]
        o = -zero * s
        if offset is not None:
            o += tl.load(offset + at, inside, 0).to(tl.float32)[:, :, :, None]
        x_at = (n * num_groups + g)[:, :, :, None] * (width * 8 // bits) + byte
        x_inside = ((n < num_x) & (g < num_groups))[:, :, :, None]
        for part in tl.static_range(0, 8 // bits):
            if bits == 8:
                w = packed.to(tl.float32) * s + o
            else:
                u = (packed.to(tl.int32) << 15) & (0x78000 << (4 * part))
                unit = s * (256 >> (4 * part))
                w = (u | one).to(tl.float32, bitcast=True) * unit + (o - unit)
            w = tl.reshape(w.to(x.dtype.element_ty), (SLICES, ROWS, GROUPS * width))
            xs = tl.load(x + x_at + part * width, x_inside, 0)
            xs = tl.permute(tl.reshape(xs, (SLICES, NUM, GROUPS * width)), (0, 2, 1))
            total = tl.dot(w, xs, total, input_precision="tf32x3")
    out = tl.sum(total, 0)  # (ROWS, NUM)
    n = tl.program_id(0) * NUM + tl.arange(0, NUM)[None, :]
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)[:, None]
    if bias is not None:
        out += tl.load(bias + row, row < num_rows, 0)
    tl.store(y + n * num_rows + row, out.to(y.dtype.element_ty), (n < num_x) & (row < num_rows))


def triton_linear(x: Tensor, packed: PackedLinear) -> Tensor:
    """x (N, cols) -> (N, rows), weights unpacked on the way; not for 4-bit floats"""
    num_rows, num_groups, width = packed.q.shape
    y = x.new_empty(len(x), num_rows)
    weight = packed.q, packed.scale, packed.offset, packed.bias
    arguments = y, x.contiguous(), *weight, len(x), num_rows, num_groups, 0x3F800000
    zero = 8 if packed.bits == 4 and packed.offset is None else 0
    constants = {"bits": packed.bits, "zero": zero, "width": width}
    constants |= {"ROWS": 16, "GROUPS": 4, "SLICES": 4}
    num = 32 if len(x) > 16 and x.itemsize == 2 else 16
    stages = 3 if num == 16 and x.itemsize == 2 else 2
    sizes = [(num, stages), (num, 1), (16, 1)]  # the order of a sum is the same in all of them
    tiles = [{"NUM": num, "num_stages": stages} for num, stages in sizes]
    tile = linear_kernel.fitting(tiles, *arguments, **constants)
    grid = triton.cdiv(len(x), tile["NUM"]), triton.cdiv(num_rows, constants["ROWS"])
    linear_kernel[grid](*arguments, **constants, **tile)
    return y


class TritonLinear(PackedLinear):
    def __call__(self, x: Tensor) -> Tensor:
        return super().__call__(x) if self.float4 else triton_linear(x, self)


@Kernel
def rms_norm_kernel(
    y: tl.tensor,
    x: tl.tensor,
    weight: tl.tensor,
    num_cols: tl.tensor,
    eps: tl.tensor,
    COLS: tl.constexpr,
) -> None:
    """A program normalizes one row."""
    col = tl.arange(0, COLS)
    at = tl.program_id(0) * num_cols + col
    x32 = tl.load(x + at, col < num_cols, 0).to(tl.float32)
    normed = x32 * tl.rsqrt(tl.sum(x32 * x32, 0) / num_cols + eps)
    w = tl.load(weight + col, col < num_cols, 0)
    normed = normed.to(w.dtype).to(tl.float32) * w.to(tl.float32)
    tl.store(y + at, normed.to(w.dtype), col < num_cols)


def triton_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x = x.contiguous()
    y, num_cols = torch.empty_like(x), x.shape[-1]
    rms_norm_kernel[(x.numel() // num_cols,)](
        y, x, weight, num_cols, eps, COLS=triton.next_power_of_2(num_cols)
    )
    return y


@Kernel
def rotate_kernel(
    y: tl.tensor,
    x: tl.tensor,
    cos: tl.tensor,
    sin: tl.tensor,
    x_stride: tl.tensor,
    num_heads: tl.tensor,
    half: tl.tensor,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
) -> None:
    """A program turns the heads of one token."""
    n = tl.program_id(0)
    h, i = tl.arange(0, HEADS)[:, None], tl.arange(0, HALF)[None, :]
    at, inside = h * 2 * half + i, (h < num_heads) & (i < half)
    c = tl.load(cos + n * half + i, i < half, 0).to(tl.float32)
    s = tl.load(sin + n * half + i, i < half, 0).to(tl.float32)
    a = tl.load(x + n * x_stride + at, inside, 0).to(tl.float32)
    b = tl.load(x + n * x_stride + at + half, inside, 0).to(tl.float32)
    y += n * num_heads * 2 * half + at
    tl.store(y, (a * c - b * s).to(x.dtype.element_ty), inside)
    tl.store(y + half, (b * c + a * s).to(x.dtype.element_ty), inside)


def triton_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    N, H, D = x.shape
    y = x.new_empty(N, H, D)
    heads, half = triton.next_power_of_2(H), triton.next_power_of_2(D // 2)
    rotate_kernel[(N,)](y, x, cos, sin, x.stride(0), H, D // 2, HEADS=heads, HALF=half)
    return y


SHORT_SPAN = 8  # rows of one sequence that read its strip one by one: decoding, and drafts
STRIP_KEYS = 64  # keys in a block, fewer on a GPU whose shared memory they exceed
STRIP_PARTS = 16  # a strip's blocks are dealt out to so many parts, which are summed up apart
STRIP_PROGRAMS = 512  # enough to keep a large GPU busy


@dataclass(frozen=True, slots=True)
class StripRows:
    """Rows of a batch, each with the strip it belongs to: (R,) int64 each."""

    rows: Tensor  # in the batch
    positions: Tensor  # of their tokens
    addresses: Tensor  # of the strips' first elements
    capacities: Tensor  # tokens the strips have room for


@Kernel
def store_kernel(
    k: tl.tensor,
    v: tl.tensor,
    k_stride: tl.tensor,
    v_stride: tl.tensor,
    rows: tl.tensor,
    positions: tl.tensor,
    addresses: tl.tensor,
    capacities: tl.tensor,
    layer: tl.tensor,
    n_layers: tl.tensor,
    ring: tl.tensor,
    Hkv: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    COLS: tl.constexpr,
) -> None:
    """A program writes one row's keys and values into its strip (2, L, Hkv, capacity, D)."""
    r = tl.program_id(0)
    h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, COLS)[None, :]
    inside = (h < Hkv) & (d < D)
    capacity = tl.load(capacities + r)
    keys = tl.load(addresses + r).to(tl.pointer_type(k.dtype.element_ty))
    at = ((layer * Hkv + h) * capacity + tl.load(positions + r) % ring) * D + d
    row = tl.load(rows + r)
    tl.store(keys + at, tl.load(k + row * k_stride + h * D + d, inside, 0), inside)
    at += n_layers * Hkv * capacity * D
    tl.store(keys + at, tl.load(v + row * v_stride + h * D + d, inside, 0), inside)


@Kernel
def part_kernel(
    sums: tl.tensor,
    stats: tl.tensor,
    q: tl.tensor,
    rows: tl.tensor,
    positions: tl.tensor,
    addresses: tl.tensor,
    capacities: tl.tensor,
    layer: tl.tensor,
    n_layers: tl.tensor,
    window: tl.tensor,
    ring: tl.tensor,
    num_programs: tl.tensor,
    factor: tl.tensor,
    softcap: tl.tensor,
    H: tl.constexpr,
    Hkv: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    COLS: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    CAPPED: tl.constexpr,
) -> None:
    """A program attends with the H/Hkv queries of one row and one key/value head to some parts of
    the strip: its blocks of KEYS keys are dealt out to PARTS parts. Softmax as in
    https://arxiv.org/abs/2205.14135: the largest score so far, the sum of exp(score - largest), and
    the values weighted with it."""
    r, kv = tl.program_id(0), tl.program_id(1)
    h, d = tl.arange(0, HEADS)[:, None], tl.arange(0, COLS)[None, :]
    inside = (h < H // Hkv) & (d < D)
    head = kv * (H // Hkv) + h
    queries = tl.load(q + (tl.load(rows + r) * H + head) * D + d, inside, 0)
    position, capacity = tl.load(positions + r), tl.load(capacities + r)
    address = tl.multiple_of(tl.load(addresses + r), 16)
    keys = address.to(tl.pointer_type(q.dtype.element_ty))
    keys += (layer * Hkv + kv) * capacity * D
    size = tl.maximum(-window, 1)  # of a chunk
    first = tl.where(window > 0, tl.maximum(position + 1 - window, 0), position // size * size)
    for part in range(tl.program_id(2), PARTS, num_programs):
        largest = tl.full((HEADS, 1), -1e30, tl.float32)
        weight = tl.zeros((HEADS, 1), tl.float32)
        total = tl.zeros((HEADS, COLS), tl.float32)
        for start in range((first // KEYS + part) * KEYS, position + 1, PARTS * KEYS):
            s = start + tl.arange(0, KEYS)
            seen = (s >= first) & (s <= position)
            at, there = (s % ring)[:, None] * D + d, seen[:, None] & (d < D)
            scores = tl.dot(queries, tl.trans(tl.load(keys + at, there, 0)), input_precision="ieee")
            scores = scores * factor
            if CAPPED:  # c tanh(x / c)
                scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
            scores = tl.where(seen[None, :], scores, -1e30)
            top = tl.maximum(largest, tl.max(scores, 1)[:, None])
            shrink, scores = tl.exp(largest - top), tl.exp(scores - top)
            values = tl.load(keys + n_layers * Hkv * capacity * D + at, there, 0)
            total = total * shrink
            total += tl.dot(scores.to(values.dtype), values, input_precision="ieee")
            weight = weight * shrink + tl.sum(scores, 1)[:, None]
            largest = top
        at = (r * H + head) * PARTS + part
        tl.store(sums + at * D + d, total, inside & (weight > 0))
        tl.store(stats + at * 2, largest, h < H // Hkv)
        tl.store(stats + at * 2 + 1, weight, h < H // Hkv)


@Kernel
def join_kernel(
    out: tl.tensor,
    sums: tl.tensor,
    stats: tl.tensor,
    rows: tl.tensor,
    sinks: tl.tensor,
    H: tl.constexpr,
    D: tl.constexpr,
    COLS: tl.constexpr,
    PARTS: tl.constexpr,
) -> None:
    """A program adds up the parts of one head of one row, and its sink, which weighs nothing."""
    r, head = tl.program_id(0), tl.program_id(1)
    at = (r * H + head) * PARTS + tl.arange(0, PARTS)
    largest, weight = tl.load(stats + at * 2), tl.load(stats + at * 2 + 1)
    top, rest = tl.max(largest, 0), 0.0
    if sinks is not None:
        sink = tl.load(sinks + head)
        top = tl.maximum(top, sink)
        rest = tl.exp(sink - top)
    factor = tl.exp(largest - top)
    d = tl.arange(0, COLS)[None, :]
    values = tl.load(sums + at[:, None] * D + d, (d < D) & (weight > 0)[:, None], 0)
    total = tl.sum(values * factor[:, None], 0) / (tl.sum(weight * factor, 0) + rest)
    d = tl.arange(0, COLS)
    to = out + (tl.load(rows + r) * H + head) * D + d
    tl.store(to, total.to(out.dtype.element_ty), d < D)


def strip_attention(
    out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    strips: StripRows,
    layer: int,
    n_layers: int,
    window: int | None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    ring: int = 0,
) -> None:
    """Write keys and values of the rows in `strips` to their strips, then attend with each row to
    all of its strip up to its position, or to the last `window` keys. A row's result does not
    depend on the others. `scale`, `softcap` and `sinks` as in `attention`; in strips of `ring`
    positions, later ones take the place of earlier ones.

    out, q (N, H, D); k, v (N, Hkv, D); every row's strip is one of KVCache's."""
    (_, H, D), Hkv = q.shape, k.shape[1]
    table = (strips.rows, strips.positions, strips.addresses, strips.capacities)
    shape = {"Hkv": Hkv, "D": D, "COLS": max(triton.next_power_of_2(D), 16)}
    num_rows, ring = len(strips.rows), ring or 2**31 - 1
    heads = triton.next_power_of_2(Hkv)
    store_kernel[(num_rows,)](
        k, v, k.stride(0), v.stride(0), *table, layer, n_layers, ring, HEADS=heads, **shape
    )
    sums = q.new_empty((num_rows, H, STRIP_PARTS, D), dtype=torch.float32)
    stats = q.new_empty((num_rows, H, STRIP_PARTS, 2), dtype=torch.float32)
    num_programs = max(1, min(STRIP_PARTS, STRIP_PROGRAMS // (num_rows * Hkv)))
    heads = max(triton.next_power_of_2(H // Hkv), 16)
    window = getattr(window, "signed", window) or 2**31 - 1
    place = layer, n_layers, window, ring, num_programs
    arguments = sums, stats, q.contiguous(), *table, *place, scale or D**-0.5, softcap or 1.0
    constants = {"H": H, "CAPPED": softcap > 0, "HEADS": heads, "PARTS": STRIP_PARTS, **shape}
    stages = 2 if D * q.itemsize <= 256 else 1
    sizes = [(STRIP_KEYS, stages), (STRIP_KEYS, 1), (STRIP_KEYS // 2, 1), (STRIP_KEYS // 4, 1)]
    tiles = [{"KEYS": keys, "num_stages": stages} for keys, stages in sizes]
    tile = part_kernel.fitting(tiles, *arguments, **constants)
    part_kernel[num_rows, Hkv, num_programs](*arguments, **constants, **tile)
    join_kernel[num_rows, H](
        out, sums, stats, strips.rows, sinks, H=H, D=D, COLS=shape["COLS"], PARTS=STRIP_PARTS
    )


# ---- attention over strips -----------------------------------------------------------------------


class CudaKVCache(KVCache):
    """KVCache whose short spans are processed together, with one call."""

    def attend(self, attn: Attention, qkv: Tensor, rotation: Rotation, batch: Batch) -> Tensor:
        q, k, v = heads = attn.heads(qkv, rotation)
        out = torch.zeros_like(heads[0])  # rows that only pad the batch stay zero
        spans = batch.spans
        if qkv.dtype == getattr(torch, self.kv_dtype, None):
            self.attend_rows(attn, (q, k, v), batch, out)
            spans = [span for span in spans if not is_short(span)]
        for span in spans:
            out[span.row : span.row + span.num_new] = self.attend_span(attn, heads, batch, span)
        return out.flatten(1)

    def attend_rows(
        self, attn: Attention, heads: tuple[Tensor, Tensor, Tensor], batch: Batch, out: Tensor
    ) -> None:
        """`attend` for all short spans."""
        in_ring, index = self.places[attn.index]
        strips = self.rings if in_ring else self.strips
        rows = batch.memo.get(("strips", in_ring))
        if rows is None:
            rows = batch.memo["strips", in_ring] = find_rows(batch.spans, strips)
        if len(rows.rows):
            config = self.config
            strip_attention(
                out,
                *heads,
                rows,
                index,
                n_layers=strips[0].shape[1],
                window=config.windows[attn.index],
                scale=config.attn_scale,
                softcap=config.attn_softcap,
                sinks=attn.sinks,
                ring=self.ring if in_ring else 0,
            )


def is_short(span: Span) -> bool:
    return span.num_new <= SHORT_SPAN and not span.is_whole


def find_rows(spans: Iterable[Span], strips: list[Tensor]) -> StripRows:
    """The rows of all short spans."""
    short = list(filter(is_short, spans))
    rows = [(s.row + i, s.start + i, strips[s.slot]) for s in short for i in range(s.num_new)]
    table = [(row, at, strip.data_ptr(), strip.shape[3]) for row, at, strip in rows]
    columns = torch.tensor(table, dtype=torch.int64, device=strips[0].device).view(-1, 4)
    return StripRows(*columns.T.contiguous())


# ---- recorded decode steps -----------------------------------------------------------------------


class DecodeBatch(Batch):
    """One new token for each of up to `num_rows` sequences, in tensors that stay where they are
    from step to step, so that a step can be recorded. Needs kernels that take StripRows.

    Rows without a sequence write to a strip of their own."""

    def __init__(self, num_rows: int, cache: KVCache) -> None:
        device = cache.strips[0].device
        self.num_logits, self.logit_rows = num_rows, slice(None)
        self.spans, self.memo, self.rotations, self.vectors = [], {}, {}, {}
        self.unused = [
            like.new_zeros((*like.shape[:3], 1, like.shape[4]))
            for like in (cache.strips[0], cache.rings[0])
        ]
        self.inputs = torch.zeros((6, num_rows), dtype=torch.int64, device=device)
        self.token_ids, self.positions, *places = self.inputs
        at = torch.arange(num_rows, device=device), self.positions
        self.memo["strips", False] = StripRows(*at, *places[:2])
        self.memo["strips", True] = StripRows(*at, *places[2:])

    def load(self, rows: Iterable[tuple[int, int, Iterable[Tensor]]]) -> None:
        """Put in (token id, position, strip and ring) for each sequence."""
        unused = [(0, 0, self.unused)] * self.num_logits
        table = [
            (token_id, at, *(n for strip in strips for n in (strip.data_ptr(), strip.shape[3])))
            for token_id, at, strips in [*rows, *unused][: self.num_logits]
        ]
        self.inputs.copy_(torch.tensor(table).T)


class DecodeGraphs:
    """Decode steps recorded as CUDA graphs: replaying one starts its hundreds of kernels at once
    (https://pytorch.org/blog/accelerating-pytorch-with-cuda-graphs). A graph is recorded when
    first needed, for 1, 2, 4, 8, .. sequences. It holds no address of a strip, for these are among
    its inputs: strips may grow, move and change hands."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self.decoder, self.cache, self.num_rows = decoder, cache, len(cache.strips)
        self.parts = decoder.parts()
        self.recorded: dict[int, tuple[DecodeBatch, Callable[[], Tensor]]] = {}
        self.pool: Any = None  # memory that all graphs share: only one runs at a time

    def __call__(self, work: list[Work]) -> Tensor | None:
        """As in DecodeSteps: one token of each sequence was recorded."""
        if len(work) > self.num_rows or any((len(new), n) != (1, 1) for _, _, new, n in work):
            return None
        size = 1 << (len(work) - 1).bit_length()
        strips, rings = self.cache.strips, self.cache.rings
        inputs = [(new[0], at, (strips[slot], rings[slot])) for slot, at, new, _ in work]
        if size not in self.recorded:
            batch = DecodeBatch(size, self.cache)
            batch.load(inputs)
            self.recorded[size] = batch, self.record(batch)
        batch, replay = self.recorded[size]
        batch.load(inputs)
        return replay()[: len(work)]

    def record(self, batch: DecodeBatch) -> Callable[[], Tensor]:
        """-> a function that runs the decoder on what the batch's tensors hold then."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            self.decoder(batch, self.cache)  # compiles the kernels; a second time changes nothing
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool):
            logits = self.decoder(batch, self.cache)
        self.pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay


# ---- the backend ---------------------------------------------------------------------------------


class CudaBackend(Backend):
    """Packed products, norms, rotation and short spans by Triton, everything else by torch."""

    def pack(
        self,
        shape: tuple[int, int],
        read_rows: Callable[[slice], PackedLinear | Tensor],
        bias: Tensor | None,
        is_table: bool,
    ) -> PackedLinear | Linear:
        packed = read_rows(slice(0, shape[0])).to(self.device, self.dtype)
        if isinstance(packed, Tensor):
            return Linear(packed, bias)
        return TritonLinear(packed.q, packed.scale, packed.offset, bias, self.dtype, packed.float4)

    def norm(self, norm: Norm, x: Tensor, residual: Tensor | None) -> Tensor:
        if norm.is_centred:
            return super().norm(norm, x, residual)
        y = triton_rms_norm(x, norm.weight, norm.eps)
        return y if residual is None else residual + y

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return triton_rotate(x, cos, sin)

    def new_cache(
        self, config: ModelConfig, num_slots: int, kv_dtype: str, most_new: int
    ) -> KVCache:
        if kv_dtype == "q8" or config.kv_planes < 2:
            return super().new_cache(config, num_slots, kv_dtype, most_new)
        return CudaKVCache(config, num_slots, kv_dtype, self.device, most_new)

    def record(self, decoder: Decoder, cache: KVCache, compile: bool) -> DecodeSteps | None:
        """Raises RequestError if the first step cannot be recorded."""
        looks_at_results = decoder.config.experts or not getattr(decoder, "is_recordable", True)
        # graphs know one position of a token
        moves = any(rope.parameters["rope_type"] == "mrope" for rope in decoder.ropes)
        is_direct = getattr(torch, decoder.kv_dtype, None) == decoder.dtype
        if not compile or not is_direct or looks_at_results or moves:
            return super().record(decoder, cache, compile)
        steps = DecodeGraphs(decoder, cache)
        try:
            cache.reserve(0, 1)
            steps([(0, 0, [0], 1)])
        except RuntimeError as error:
            raise RequestError(
                f"compile does not work on this machine: {first_line(error)}", "compile"
            ) from None
        return steps


def make_backend(device: torch.device, dtype: torch.dtype, reason: str = "") -> Backend:
    """On torch alone where Triton does not work."""
    kind = CudaBackend if triton_works() else Backend
    return kind(device, dtype, f"torch ({reason})" if reason else "torch")


@functools.cache
def triton_works() -> bool:
    """Try a kernel. If Triton or the C compiler that it needs is missing, say so once."""
    try:
        ones = torch.ones(2, 32, device="cuda")
        y = triton_rms_norm(ones, ones[0], 0.0)
        works = torch.equal(y, ones)
        reason = "its results are wrong"
    except Exception as error:  # of any kind: torch's own operations do the same
        works, reason = False, first_line(error)
    if not works:
        log.warning(f"Triton does not work here, CUDA will be slower: {reason}")
    return works
