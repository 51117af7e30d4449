"""The native kernels: every format, shape and code path against float64, rows that do not
depend on what else is in the call, and what happens where no compiler helps."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import itertools
import logging
import math
import os
import platform
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hypothesis
import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as F
from command_line import share_kernels
from families import ROWS
from gguf_files import Kind, encode, rare_blocks
from hypothesis import strategies as st
from serving import serving
from torch import Tensor

import nanollama
from nanollama import (
    ACTS,
    GATED,
    LLM,
    REPACK,
    Backend,
    Batch,
    KernelError,
    Norm,
    PackedLinear,
    RequestError,
    Rotation,
    make_rope,
    quantize,
    rotate,
    round_up,
)
from nanollama_extras.files import gguf_blocks, gguf_types
from nanollama_extras.kernels import native as kernels
from nanollama_extras.kernels.fine import WideLinear
from nanollama_extras.kernels.native import (
    KERNEL_FLAGS,
    SOURCE,
    NativeBackend,
    NativeKVCache,
    NativeLinear,
    NativeProjection,
)
from nanollama_extras.models.apertus import xielu
from nanollama_extras.models.layers import LayerNorm

try:
    kernels.find_compiler()
except KernelError:
    pytest.skip("there is no C compiler", allow_module_level=True)

CPU = torch.device("cpu")
TORCH = Backend(CPU, torch.float32, "torch")
NATIVE = NativeBackend(CPU, torch.float32, "native")
QK_NORMS = ("head", "full", "after_rope")
ACTS["xielu 0.9 0.6 0.5 -1e-06"] = functools.partial(xielu, 0.9, 0.6, 0.5, -1e-6)

# ---- code paths ----------------------------------------------------------------------------------

X86 = platform.machine() in ("x86_64", "AMD64")
COMMON = KERNEL_FLAGS[:-1]  # all but the CPU
AVX2 = "avx2 fma f16c bmi2".split()
AVX_VNNI = ("-march=haswell", "-include", str(Path(__file__).with_name("avx_vnni.h")))  # emulated
PLAIN = (*COMMON, "-O1")  # -O3 would take half a minute
PATHS = {  # flags, the features that they take for granted, what the kernels then call themselves
    "native": (KERNEL_FLAGS, [], None),
    "avx2": ((*COMMON, "-march=haswell"), AVX2, "AVX2"),
    "avx_vnni": ((*PLAIN, *AVX_VNNI), AVX2, "AVX-VNNI"),
    "portable": ((*PLAIN, "-march=x86-64" if X86 else "-march=armv8-a"), [], "portable C"),
}


@pytest.fixture(scope="module")
def kernel_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cache for the kernels of all code paths; this CPU's own may be compiled already."""
    folder = tmp_path_factory.mktemp("kernels")
    share_kernels(folder)
    return folder


@pytest.fixture(params=PATHS)
def code_path(
    request: pytest.FixtureRequest, kernel_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> str:
    """The kernels of one code path take the place of this CPU's own."""
    flags, features, name = PATHS[request.param]
    if not set(features) <= set(kernels.cpu_features().split()):
        pytest.skip(f"this CPU lacks one of {' '.join(features)}")
    monkeypatch.setattr(kernels, "KERNEL_FLAGS", flags)
    monkeypatch.setenv("NANOLLAMA_CACHE", str(kernel_folder))
    assert kernels.load_kernels().path().decode() == (name or native_path())
    return request.param


def native_path() -> str:
    """What the kernels should call themselves on this CPU."""
    features = set(kernels.cpu_features().split())
    if "avx512_vnni" in features:
        return "AVX-512 VNNI"
    if "avx_vnni" in features:
        return "AVX-VNNI"
    if X86:
        return "AVX2" if {"avx2", "fma", "f16c"} <= features else "portable C"
    return "NEON dot product" if "asimddp" in features else "portable C"


@contextlib.contextmanager
def num_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


# ---- the matrices --------------------------------------------------------------------------------

LAYOUTS = [  # those of REPACK, for q of any bits
    "4 bits, group 32",
    "4 bits, group 32, offset",
    "8 bits, group 32",
    "8 bits, group 32, offset",
    "8 bits, group 16",
    "8 bits, group 16, offset",
]
RARE = {kind.name: kind for kind in gguf_types.TYPES.values()}
UNPACK = REPACK | {kind.name: kind.unpack for kind in gguf_blocks.TYPES.values()}
WIDE = ["wide 064, offset", "wide 128, offset", "wide 128"]  # columns that share a scale
KINDS = [*REPACK, *RARE, "q8", "q4", *LAYOUTS, *WIDE]


def block_width(kind: str) -> int:
    """Columns that a matrix of the kind has a multiple of"""
    if kind in WIDE:
        return int(kind[5:8])
    return RARE[kind].width if kind in RARE else 256 if kind.endswith("_K") else 32


def packed(kind: str, num_rows: int, num_cols: int, seed: int = 0) -> PackedLinear:
    """A random weight (rows, cols) with a standard deviation of about 0.06"""
    random = np.random.default_rng(seed)
    if kind in LAYOUTS:
        bits, group = int(kind[0]), int(kind[14:16])
        shape = (num_rows, num_cols // group)
        bounds, dtype = ((0, 256), np.uint8) if bits == 4 else ((-128, 128), np.int8)
        q = random.integers(*bounds, (*shape, group * bits // 8), dtype=dtype)
        scale, offset = (random.normal(scale=0.001, size=shape).astype(np.float16) for _ in "so")
        parts = [q, scale, offset] if "offset" in kind else [q, scale]
        return PackedLinear(*map(torch.from_numpy, parts))
    if kind in WIDE:
        plain, num = (
            packed(f"4 bits, group 32{kind[8:]}", num_rows, num_cols),
            block_width(kind) // 32,
        )
        numbers = [part for part in (plain.scale, plain.offset) if part is not None]
        equal = [part[:, ::num].repeat_interleave(num, 1).contiguous() for part in numbers]
        return WideLinear(plain.q, *equal).widened(32 * num)
    weight = random.normal(scale=0.06, size=(num_rows, num_cols)).astype(np.float32)
    if kind in ("q8", "q4"):
        return quantize(torch.from_numpy(weight), int(kind[1]))
    if kind in RARE:
        blocks = rare_blocks(RARE[kind], num_rows, num_cols, random)
        linear = RARE[kind].unpack(torch.from_numpy(blocks))
        assert isinstance(linear, PackedLinear)
        return linear
    raw = encode(weight, Kind[kind], random)
    blocks = raw.reshape(num_rows, num_cols // block_width(kind), -1)
    unpack = UNPACK[kind]
    assert unpack
    return unpack(torch.from_numpy(blocks))


def native(weight: PackedLinear, bias: Tensor | None = None) -> NativeLinear:
    return NativeLinear(weight.shape, weight.select, bias)


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_hold_exactly_the_packed_weight(code_path: str, kind: str) -> None:
    for num_rows in (1, 15, 16, 17, 50):
        weight = packed(kind, num_rows, 256)
        blocks = native(weight)
        assert blocks.shape == weight.shape
        assert torch.equal(blocks.dequantize(), weight.dequantize())
        index = torch.randint(num_rows, (9,))
        assert torch.equal(blocks.rows(index), weight.rows(index))
        assert blocks.nbytes * num_rows == weight.nbytes * round_up(num_rows, 16)


@pytest.mark.parametrize("kind", ["Q4_1", "Q6_K"])
def test_blocks_are_filled_a_few_rows_at_a_time(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = packed(kind, 77, 256)
    reads: list[tuple[int, int]] = []

    def read(rows: slice) -> PackedLinear:
        reads.append((rows.start, rows.stop))
        return weight.select(rows)

    monkeypatch.setattr(kernels, "LOAD_WEIGHTS", 20 * 256)
    monkeypatch.setattr(type(weight), "load_weights", 20 * 256, raising=False)
    blocks = NativeLinear(weight.shape, read, None)
    assert reads == [(0, 1), (0, 32), (32, 64), (64, 77)]
    assert torch.equal(blocks.dequantize(), weight.dequantize())


# ---- linear --------------------------------------------------------------------------------------


def activations(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (N, cols) as int8 with a scale for each group of 32, as float64; and, where x lies so near
    the middle between two integers that either may come out, the scale."""
    groups = x.float().unflatten(-1, (-1, 32))
    most = groups.abs().amax(-1, keepdim=True)
    exact = groups * torch.where(most > 0, 127 / most, 0)
    q, scale = exact.round(), (most / 127).double()
    unsure = ((exact - q).abs() > 0.499) * scale
    return (q * scale).flatten(-2), unsure.flatten(-2)


def prepared(x: Tensor, norm: Norm | None, act: str) -> Tensor:
    """What goes into the matrix, float64"""
    x = x.double()
    if act:
        x = ACTS[act](*x.chunk(1 + (act in GATED), dim=-1))
    if norm is not None:
        mean = x.square().mean(-1, keepdim=True)
        x = x * (mean + norm.eps).rsqrt() * norm.weight.double()
    return x


def check_linear(
    parts: list[NativeLinear],
    x: Tensor,
    norm: Norm | None = None,
    act: str = "",
    residual: Tensor | None = None,
) -> Tensor:
    """Run the kernel and hold it against float64, with activations of 8 bits and without."""
    y = NativeProjection(parts)(x, norm, act, residual)
    weight = torch.cat([part.dequantize() for part in parts]).double()
    bias = torch.cat([torch.zeros(p.shape[0]) if p.bias is None else p.bias for p in parts])
    rest = bias.double() + (0 if residual is None else residual.double())
    exact = prepared(x, norm, act)
    acts, unsure = activations(exact)
    assert y.shape == (len(x), len(weight))
    sizes = weight.abs().T
    rounding = 1e-5 * (acts.abs() @ sizes) + 1e-6 * (bias.abs() + rest.abs()) + 1e-12
    assert ((y - (acts @ weight.T + rest)).abs() <= rounding + unsure @ sizes).all()
    step = exact.unflatten(-1, (-1, 32)).abs().amax(-1).repeat_interleave(32, -1) / 127
    assert ((y - (exact @ weight.T + rest)).abs() <= rounding + 0.51 * step @ sizes).all()
    return y


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_and_number_of_rows(code_path: str, kind: str) -> None:
    torch.manual_seed(0)
    for num_rows in (1, 15, 16, 17, 50):
        part = native(packed(kind, num_rows, 256), torch.randn(num_rows))
        for num_tokens in (1, 2, 3, 7, 8, 20):
            check_linear([part], torch.randn(num_tokens, 256))


CODE_BYTES = {  # of a block
    **{kind: slice(2, None) for kind in ("Q4_0", "Q5_0")},
    **{kind: slice(4, None) for kind in ("Q4_1", "Q5_1")},
    **{kind: slice(16, None) for kind in ("Q4_K", "Q5_K")},
    "Q6_K": slice(192),
}


@pytest.mark.parametrize("kind", CODE_BYTES)
def test_the_largest_codes_and_activations_overflow_no_sum(code_path: str, kind: str) -> None:
    weight: Any = packed(kind, 16, 256)
    weight.blocks[..., CODE_BYTES[kind]] = 255
    for num_tokens in (1, 2, 4, 20):
        check_linear([native(weight)], torch.ones(num_tokens, 256))
        check_linear([native(weight)], -torch.ones(num_tokens, 256))


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    kinds=st.lists(st.sampled_from(KINDS), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 70), min_size=4, max_size=4),
    num_groups=st.integers(1, 9),
    num_tokens=st.one_of(st.integers(1, 20), st.just(33)),
    before=st.sampled_from(["plain", "norm", *ACTS]),
    bias=st.booleans(),
    residual=st.booleans(),
    threads=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_matrices_side_by_side_of_any_kinds_and_sizes(
    code_path: str,
    kinds: list[str],
    sizes: list[int],
    num_groups: int,
    num_tokens: int,
    before: str,
    bias: bool,
    residual: bool,
    threads: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    num_cols = round_up(32 * num_groups, max(map(block_width, kinds)))
    parts = [
        native(packed(kind, n, num_cols, seed), torch.randn(n) if bias else None)
        for kind, n in zip(kinds, sizes)
    ]
    x = torch.randn(num_tokens, num_cols * (1 + (before in GATED))) * torch.rand(num_tokens, 1)
    norm = Norm(TORCH, torch.rand(num_cols) + 0.5, 1e-5) if before == "norm" else None
    rest = torch.randn(num_tokens, sum(part.shape[0] for part in parts)) if residual else None
    with num_threads(threads):
        check_linear(parts, x, norm, before if before in ACTS else "", rest)


BEFORE = ["plain", "norm", "swiglu"]


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize(
    "kinds",
    [
        ["Q4_0"],
        ["Q4_K", "Q4_K", "Q6_K"],
        ["Q8_0", "Q5_1"],
        ["Q3_K", "IQ4_NL"],
        ["NVFP4", "Q2_K", "TQ2_0"],
    ],
)
def test_a_token_is_bit_for_bit_the_same_in_any_batch_on_any_number_of_threads(
    code_path: str, kinds: list[str], before: str
) -> None:
    torch.manual_seed(0)
    run = NativeProjection([native(packed(kind, 40, 256), torch.randn(40)) for kind in kinds])
    norm = Norm(TORCH, torch.rand(256), 1e-5) if before == "norm" else None
    x = torch.randn(33, 512 if before in GATED else 256)
    residual = torch.randn(33, run.num_rows)

    def rows(start: int, stop: int) -> Tensor:
        at = slice(start, stop)
        return run(x[at], norm, before if before in ACTS else "", residual[at])

    whole = rows(0, 33)
    assert torch.equal(torch.cat([rows(i, i + 1) for i in range(33)]), whole)
    for count, size in itertools.product((1, 2, 3, 4), (2, 3, 4, 5, 7, 8, 9, 20, 33)):
        with num_threads(count):
            assert torch.equal(rows(33 - size, 33), whole[33 - size :]), (count, size)


def test_a_matrix_too_wide_for_all_tokens_at_once(code_path: str) -> None:
    torch.manual_seed(0)
    part = native(packed("Q4_1", 17, 8192))
    x = torch.randn(70, 8192)  # of 13 KB each, 32 or 36 of which the kernel takes at a time
    whole = check_linear([part], x)
    assert torch.equal(NativeProjection([part])(x[35:36]), whole[35:36])


def test_no_tokens_and_zeros_are_fine(code_path: str) -> None:
    run = NativeProjection([native(packed("Q5_1", 20, 64))])
    assert run(torch.empty(0, 64)).shape == (0, 20)
    assert torch.equal(run(torch.zeros(3, 64)), torch.zeros(3, 20))
    assert run(torch.full((3, 64), 1e-38)).abs().max() < 1e-35
    assert run(torch.full((1, 64), 1e-45)).abs().max() < 1e-35


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q8_0", "Q6_K"])
def test_a_gate_of_any_size_is_silu(code_path: str, kind: str) -> None:
    part = native(packed(kind, 20, 256))
    for low, high in ((-95, -80), (-1e4, 1e4), (80, 95), (-3, 3)):
        gate, up = torch.linspace(low, high, 256 * 3).view(3, 256), torch.ones(3, 256)
        y = NativeProjection([part])(torch.cat((gate, up), 1), act="swiglu")
        exact = prepared(torch.cat((gate, up), 1), None, "swiglu")
        assert torch.isfinite(y).all()
        bound = exact.abs().amax() / 127 * part.dequantize().abs().sum(1).double() + 1e-30
        assert ((y - exact @ part.dequantize().double().T).abs() <= bound).all()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("before", BEFORE)
def test_a_broken_token_is_not_hidden_and_harms_no_other(
    code_path: str, before: str, bad: float
) -> None:
    torch.manual_seed(0)
    run = NativeProjection([native(packed(kind, 20, 64)) for kind in ("Q4_0", "Q4_1", "Q8_0")])
    norm = Norm(TORCH, torch.ones(64), 1e-5) if before == "norm" else None
    for column in range(64):
        x = torch.randn(5, 128 if before in GATED else 64)
        fine = run(x, norm, before if before in ACTS else "")
        x[2, column] = bad
        y = run(x, norm, before if before in ACTS else "")
        if not (before in GATED and bad == -math.inf):  # silu(-inf) is 0, or nan, as one likes
            assert not torch.isfinite(y[2]).any()
        assert torch.equal(y[[0, 1, 3, 4]], fine[[0, 1, 3, 4]])


# ---- attention -----------------------------------------------------------------------------------

KV_DTYPES = NativeKVCache.kinds
TOLERANCES = {kind: {"rtol": 1e-5, "atol": 2e-6} for kind in KV_DTYPES}
TOLERANCES["q8"] = {"rtol": 1e-4, "atol": 5e-4}  # queries, and weights of values, have 16 bits
HEADS = [  # H, Hkv, D: 1 to 8 query heads share a key/value head
    (2, 2, 16),
    (4, 2, 48),
    (9, 3, 64),
    (4, 1, 80),
    (10, 2, 32),
    (6, 1, 16),
    (7, 1, 128),
    (8, 1, 64),
    (2, 1, 256),
]


class Attend:
    """A cache of its own, and qkv (T, (H + 2 Hkv) D) of each slot to put into it."""

    def __init__(
        self,
        heads: tuple[int, int, int],
        kv_dtype: str,
        lengths: list[int],
        window: int | None = None,
        qk_norm: str = "",
        attn_softcap: float = 0.0,
        attn_scale: float | None = None,
        sinks: bool = False,
        grows: bool = False,
        most_new: int = 0,
        fill: Callable[[Tensor], object] = lambda strip: None,
    ) -> None:
        torch.manual_seed(0)
        self.heads, self.window = heads, window
        H, Hkv, D = heads
        names = ("n_heads", "n_kv_heads", "head_dim")
        config = SimpleNamespace(
            ring_tokens=lambda num: round_up((window or 0) + num, 512),
            **dict(zip(names, heads)),
            n_layers=3,
            kv_planes=2,
            own={},
            windows=(5, window, None),
            norm_eps=1e-6,
            qk_norm=qk_norm,
            attn_softcap=attn_softcap,
            attn_scale=attn_scale,
        )
        self.cache = NativeKVCache(config, len(lengths), kv_dtype, CPU, most_new)  # type: ignore
        for slot, length in enumerate(lengths):
            self.cache.reserve(slot, length + 20)
            fill(self.cache.strips[slot])
        sizes = (H * D, Hkv * D) if qk_norm == "full" else (D, D)
        norms = [Norm(TORCH, torch.rand(n) + 0.5, 1e-6) if qk_norm else None for n in sizes]
        self.attn = SimpleNamespace(index=1, q_norm=norms[0], k_norm=norms[1])
        self.attn.sinks = 3 * torch.randn(H) if sinks else None
        self.qkv = [torch.randn(length, (H + 2 * Hkv) * D) for length in lengths]
        positions = torch.arange(max(lengths)).unsqueeze(1)
        rope = {"rope_type": "default", "rope_theta": 1e4}
        angles = positions * make_rope(rope, D).freqs
        self.rotation = Rotation(angles.cos(), angles.sin())
        if grows:
            self.rotation = self.rotation._replace(q_scale=1 + positions / 1000)

    def __call__(self, *work: tuple[int, int, int], padding: int = 0) -> list[Tensor]:
        """Positions start .. stop of each (slot, start, stop) in one call -> [(n, H D)]"""
        batch = Batch([(slot, a, [0] * (b - a), 0) for slot, a, b in work], CPU, row_tile=1)
        qkv = torch.cat([self.qkv[slot][start:stop] for slot, start, stop in work])
        at = F.pad(batch.positions, (0, padding))
        rotation = Rotation(*(part if part is None else part[at] for part in self.rotation))
        args = (F.pad(qkv, (0, 0, 0, padding), value=1.0), rotation, batch)
        out = self.cache.attend(self.attn, *args)  # type: ignore
        assert out.shape == (len(at), self.heads[0] * self.heads[2])
        assert not out[len(qkv) :].any()
        return list(out[: len(qkv)].split([stop - start for _, start, stop in work]))

    def kept(self, slot: int) -> list[Tensor]:
        """Keys and values (Hkv, capacity, D) float64 that the strip holds"""
        _, Hkv, D = self.heads
        stored = dict(zip(KV_DTYPES, (torch.float32, torch.float16, torch.int8)))
        strip = self.cache.strips[slot][:, 1]
        blocks = strip.reshape(2, Hkv, -1, 16 * strip.shape[-1])
        dtype = stored[self.cache.kv_dtype]
        end = 16 * D * dtype.itemsize
        elements = blocks[..., :end].contiguous().view(dtype).double()
        keys, values = elements[0].unflatten(-1, (D, 16)).mT, elements[1].unflatten(-1, (16, D))
        if dtype == torch.int8:
            group = 32 if D % 32 == 0 else D
            scales = blocks[..., end:].contiguous().view(torch.float16).double()
            scales = scales.unflatten(-1, (-1, 16)).mT.repeat_interleave(group, -1)
            pairs = elements.unflatten(-1, (D // 2, 16, 2))[0], elements.unflatten(-1, (8, D, 2))[1]
            keys = pairs[0].transpose(-2, -1).flatten(-3, -2).mT * scales[0]
            values = pairs[1].transpose(-2, -1).flatten(-3, -2) * scales[1]
        return [keys.flatten(1, 2), values.flatten(1, 2)]

    def rotated(self, slot: int) -> list[Tensor]:
        """Queries, keys and values (T, heads, D) float64 as they should be"""
        H, Hkv, D = self.heads
        x = self.qkv[slot].double().unflatten(1, (-1, D))
        q, k, v = x.split((H, Hkv, Hkv), 1)
        kind, norms = self.cache.config.qk_norm, (self.attn.q_norm, self.attn.k_norm)
        cos, sin, q_scale = (None if p is None else p[: len(x)].double() for p in self.rotation)

        def turned(x: Tensor) -> Tensor:
            return rotate(x, cos, sin)

        def normed(x: Tensor, norm: Norm | None) -> Tensor:
            return prepared(x.flatten(1) if kind == "full" else x, norm, "").view(x.shape)

        q, k = (
            normed(turned(x), norm) if kind == "after_rope" else turned(normed(x, norm))
            for x, norm in zip((q, k), norms)
        )
        return [q if q_scale is None else q * q_scale.unsqueeze(2), k, v]

    def expected(self, slot: int, start: int, stop: int) -> Tensor:
        """(n, H D) float64 over what the strip holds"""
        H, Hkv, D = self.heads
        q, *_ = self.rotated(slot)
        keys, values = (x.repeat_interleave(H // Hkv, 0) for x in self.kept(slot))
        out = []
        for i in range(start, stop):
            first = 0 if self.window is None else max(0, i + 1 - self.window)
            k, v = keys[:, first : i + 1], values[:, first : i + 1]  # (H, S, D)
            config = self.cache.config
            scores = k @ q[i].unsqueeze(-1) * (config.attn_scale or 1 / math.sqrt(D))
            if cap := config.attn_softcap:
                scores = cap * torch.tanh(scores / cap)
            if self.attn.sinks is not None:  # a key of its own, whose value is 0
                scores = torch.cat((scores, self.attn.sinks.double().view(H, 1, 1)), 1)
                v = F.pad(v, (0, 0, 0, 1))
            out.append((torch.softmax(scores, 1) * v).sum(1).flatten())
        return torch.stack(out)

    def check(self, *work: tuple[int, int, int]) -> None:
        for out, (slot, start, stop) in zip(self(*work), work):
            theirs = self.expected(slot, start, stop)
            tolerances = TOLERANCES[self.cache.kv_dtype]
            torch.testing.assert_close(out.double(), theirs, **tolerances)

    def strips(self) -> list[Tensor]:
        return [strip.clone() for strip in self.cache.strips]


CUTS = [0, 1, 15, 16, 17, 33, 127, 128, 129, 140, 141, 256, 257, 270]


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
@pytest.mark.parametrize("heads", HEADS)
def test_attention_is_that_of_float64(
    code_path: str, heads: tuple[int, int, int], kv_dtype: str
) -> None:
    attend = Attend(heads, kv_dtype, [270])
    for start, stop in itertools.pairwise(CUTS):
        attend.check((0, start, stop))


@pytest.mark.parametrize("window", [1, 7, 16, 130, 1000])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_window_hides_what_lies_further_back(code_path: str, kv_dtype: str, window: int) -> None:
    attend = Attend((6, 2, 32), kv_dtype, [270], window)
    for start, stop in itertools.pairwise(CUTS):
        attend.check((0, start, stop))


@pytest.mark.parametrize(
    "more",
    [{"attn_softcap": 2.0}, {"attn_scale": 0.1}, {"sinks": True}],
    ids=lambda more: next(iter(more)),
)
@pytest.mark.parametrize("window", [None, 20])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_attention_with_a_cap_a_scale_or_sinks_is_that_of_float64(
    code_path: str, kv_dtype: str, window: int | None, more: dict[str, Any]
) -> None:
    attend = Attend((6, 2, 32), kv_dtype, [270], window, **more)
    for count, (start, stop) in zip(itertools.cycle((1, 3)), itertools.pairwise(CUTS)):
        with num_threads(count):
            attend.check((0, start, stop))


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_ring_gives_what_a_strip_gives(code_path: str, kv_dtype: str) -> None:
    """Bit for bit, though it keeps 512 positions only."""
    length, window = 1500, 150
    strip = Attend((6, 2, 32), kv_dtype, [length], window)
    ring = Attend((6, 2, 32), kv_dtype, [length], window, most_new=100)
    assert ring.cache.rings[0].shape[3] == 512
    for start in range(0, length, 100):
        count = 1 + start // 100 % 3
        with num_threads(count):
            (ours,), (theirs,) = ring((0, start, start + 100)), strip((0, start, start + 100))
        assert torch.equal(ours, theirs), start
    for start in (1400, 1450, 1499):  # what was drafted and dropped is computed anew
        assert torch.equal(ring((0, start, 1500))[0], strip((0, start, 1500))[0])


@hypothesis.settings(max_examples=40)
@hypothesis.given(
    num_kv_heads=st.integers(1, 3),
    group=st.integers(1, 8),
    head_dim=st.integers(1, 8).map(lambda n: 16 * n),
    kv_dtype=st.sampled_from(KV_DTYPES),
    window=st.one_of(st.none(), st.integers(1, 150)),
    qk_norm=st.sampled_from(["", *QK_NORMS]),
    grows=st.booleans(),
    cuts=st.lists(
        st.tuples(st.integers(0, 150), st.integers(1, 20), st.integers(1, 5)),
        min_size=1,
        max_size=3,
    ),
    threads=st.integers(1, 4),
)
def test_sequences_of_any_lengths_in_one_call(
    code_path: str,
    num_kv_heads: int,
    group: int,
    head_dim: int,
    kv_dtype: str,
    window: int | None,
    qk_norm: str,
    grows: bool,
    cuts: list[tuple[int, int, int]],
    threads: int,
) -> None:
    heads = (num_kv_heads * group, num_kv_heads, head_dim)
    lengths = [a + b + c for a, b, c in cuts]
    attend = Attend(heads, kv_dtype, lengths, window, qk_norm, grows=grows)
    with num_threads(threads):
        if filled := [(slot, 0, a) for slot, (a, _, _) in enumerate(cuts) if a]:
            attend(*filled)
        attend.check(*[(slot, a, a + b) for slot, (a, b, _) in enumerate(cuts)])
        attend.check(*[(slot, a + b, a + b + c) for slot, (a, b, c) in enumerate(cuts)])


@pytest.mark.parametrize("qk_norm", ["", *QK_NORMS])
@pytest.mark.parametrize("heads", [(4, 2, 16), (6, 2, 48), (2, 1, 160)])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_the_strip_holds_rotated_keys_and_plain_values(
    code_path: str, kv_dtype: str, heads: tuple[int, int, int], qk_norm: str
) -> None:
    attend = Attend(heads, kv_dtype, [70], qk_norm=qk_norm)
    attend((0, 0, 50))
    attend((0, 50, 70))
    for kept, exact in zip(attend.kept(0), attend.rotated(0)[1:]):
        exact, kept = exact.transpose(0, 1), kept[:, :70]
        if kv_dtype == "q8":
            groups = exact.unflatten(-1, (-1, 32 if heads[2] % 32 == 0 else heads[2]))
            step = groups.abs().amax(-1, keepdim=True).expand_as(groups).flatten(-2) / 127
            assert ((kept - exact).abs() <= 0.57 * step + 1e-6).all()
        else:
            rtol = 1e-6 if kv_dtype == "float32" else 2**-11 * 1.01
            torch.testing.assert_close(kept, exact, rtol=rtol, atol=1e-6)


@pytest.mark.parametrize("heads", [(4, 2, 16), (9, 3, 64), (5, 1, 48), (7, 1, 32)])
@pytest.mark.parametrize(("kv_dtype", "window"), [("float32", 140), ("float16", None), ("q8", 9)])
def test_a_query_is_bit_for_bit_the_same_however_its_prompt_is_cut(
    code_path: str, heads: tuple[int, int, int], kv_dtype: str, window: int | None
) -> None:
    attend = Attend(heads, kv_dtype, [400], window)
    (whole,) = attend((0, 0, 400))
    strips = attend.strips()
    for count in (1, 2, 3, 4):
        with num_threads(count):
            for start, n in ((0, 1), (14, 3), (16, 1), (126, 5), (128, 1), (139, 64), (250, 150)):
                (rows,) = attend((0, start, start + n))
                assert torch.equal(rows, whole[start : start + n]), (count, start, n)
            for i in (127, 128, 255, 256, 399):
                assert torch.equal(attend((0, i, i + 1))[0], whole[i : i + 1]), (count, i)
    assert torch.equal(attend.cache.strips[0], strips[0])
    again = Attend(heads, kv_dtype, [400], window)
    cuts = [0, 1, 2, 100, 101, 128, 129, 256, 300, 400]
    parts = [again((0, start, stop), padding=3)[0] for start, stop in itertools.pairwise(cuts)]
    assert torch.equal(torch.cat(parts), whole)
    assert torch.equal(again.cache.strips[0], strips[0])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_sequences_in_one_call_do_not_notice_each_other(code_path: str, kv_dtype: str) -> None:
    lengths = [150, 3, 31, 290]
    attend, apart = (Attend((6, 2, 32), kv_dtype, lengths) for _ in "ab")
    for count, cut in ((1, [0, 0, 0, 0]), (4, [149, 2, 20, 128])):
        work = [(slot, cut[slot], length) for slot, length in enumerate(lengths)]
        with num_threads(count):
            together = attend(*work[::-1])[::-1]
        for ours, item in zip(together, work):
            assert torch.equal(ours, apart(item)[0])
    for ours, theirs in zip(attend.cache.strips, apart.cache.strips):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_what_lies_beyond_the_end_of_a_sequence_never_matters(
    code_path: str, kv_dtype: str, poison: float
) -> None:
    def fill(strip: Tensor) -> None:  # of q8, the scales are float16
        strip.view(torch.float32 if kv_dtype == "float32" else torch.float16).fill_(poison)

    clean, poisoned = (
        Attend((6, 2, 48), kv_dtype, [40, 150], fill=f) for f in (lambda strip: None, fill)
    )
    before = poisoned.strips()
    work = [(0, 0, 7), (1, 0, 131)], [(0, 7, 8), (1, 131, 133)], [(0, 8, 40), (1, 133, 150)]
    for count, items in zip((1, 4, 2), work):
        with num_threads(count):
            for ours, theirs in zip(poisoned(*items), clean(*items)):
                assert torch.isfinite(ours).all()
                assert torch.equal(ours, theirs)
    for slot, (after, strip) in enumerate(zip(poisoned.cache.strips, before)):
        assert torch.equal(after[:, [0, 2]], strip[:, [0, 2]])  # the other layers
        end = round_up(len(poisoned.qkv[slot]), 16)
        assert torch.equal(after[:, :, :, end:], strip[:, :, :, end:])


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_strip_that_grows_or_is_copied_holds_the_same(code_path: str, kv_dtype: str) -> None:
    attend = Attend((4, 2, 32), kv_dtype, [200, 200])
    attend.qkv[1] = attend.qkv[0]
    (whole,) = attend((0, 0, 200))
    attend.cache.start(0, 1, 101, [0] * 102)
    attend.cache.reserve(1, 5000)
    assert torch.equal(attend((1, 101, 200))[0], whole[101:])


def test_a_strip_has_room_for_its_whole_text_at_once() -> None:
    cache = Attend((4, 2, 32), "float16", [200]).cache
    cache.start(0, 0, 0, [0] * 1000)
    cache.reserve(0, 300)
    assert cache.strips[0].shape[3] == 1008


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_a_broken_key_is_not_hidden_from_those_who_see_it(code_path: str, kv_dtype: str) -> None:
    fine, broken = (Attend((4, 2, 32), kv_dtype, [60]) for _ in "ab")
    broken.qkv[0][50, 4 * 32 : 6 * 32] = math.nan
    (ours,), (theirs,) = broken((0, 0, 60)), fine((0, 0, 60))
    assert torch.equal(ours[:50], theirs[:50])
    if kv_dtype != "q8":  # integers know no nan
        assert not torch.isfinite(ours[50:]).any()


def test_the_code_paths_agree(kernel_folder: Path) -> None:
    features = set(kernels.cpu_features().split())
    found = []
    for flags, needed, _ in PATHS.values():
        if set(needed) <= features:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(kernels, "KERNEL_FLAGS", flags)
                patch.setenv("NANOLLAMA_CACHE", str(kernel_folder))
                torch.manual_seed(0)
                parts = [native(packed(kind, 30, 256)) for kind in ("Q4_K", "Q6_K", "Q4_0")]
                y = NativeProjection(parts)(torch.randn(9, 256))
                attend = Attend((6, 2, 64), "float32", [150])
                found.append((y, attend((0, 0, 150))[0]))
    assert len(found) > 1
    for linear, attention in found:
        torch.testing.assert_close(linear, found[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(attention, found[0][1], rtol=1e-5, atol=1e-5)


# ---- half precision and exp ----------------------------------------------------------------------

HARNESS = """
void halves(const uint16_t *x, float *y, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) store(y + i, from_half(x + i));
}
void floats(const float *x, uint16_t *y, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) to_half(y + i, load(x + i));
}
void exps(const float *x, float *y, int64_t n) {
    for (int64_t i = 0; i < n; i += LANES) store(y + i, exp_of(load(x + i)));
}
"""


@pytest.fixture
def harness(code_path: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    """The kernels' arithmetic on vectors, open to calls."""
    lanes = SOURCE[: SOURCE.index("/* ---- linear:")]
    library = tmp_path / "harness.so"
    kernels.compile_kernels(library, kernels.KERNEL_FLAGS, lanes + HARNESS)
    return ctypes.CDLL(str(library))


def through(function: Any, x: np.ndarray, dtype: type) -> np.ndarray:
    """Each of x, whose number is a multiple of 16, through a function of the harness."""
    assert len(x) % 16 == 0
    y = np.zeros(len(x), dtype)
    function(*(ctypes.c_void_p(a.ctypes.data) for a in (x, y)), ctypes.c_int64(len(x)))
    return y


def test_every_float16_becomes_its_float32(harness: ctypes.CDLL) -> None:
    x = np.arange(65536, dtype=np.uint16)
    ours, theirs = through(harness.halves, x, np.float32), x.view(np.float16).astype(np.float32)
    same = ours.view(np.uint32) == theirs.view(np.uint32)
    assert (same | (np.isnan(ours) & np.isnan(theirs))).all()


def test_float32_rounds_to_the_nearest_float16(harness: ctypes.CDLL) -> None:
    random = np.random.default_rng(0)
    halves = np.arange(65536, dtype=np.uint16).view(np.float16)
    finite = np.sort(halves[np.isfinite(halves)].astype(np.float32))
    ties = (finite[1:] + finite[:-1]) / 2
    edges = np.float32([0, -0.0, np.inf, -np.inf, np.nan, -np.nan, 65504, 65519.99, 65520, 1e38])
    around = [np.nextafter(ties, to, dtype=np.float32) for to in (-np.inf, np.inf)]
    bits = random.integers(0, 2**32, 1 << 18, dtype=np.uint32).view(np.float32)
    subnormal = random.uniform(-1e-4, 1e-4, 1 << 16).astype(np.float32)
    x = np.concatenate([finite, ties, *around, edges, bits, subnormal])
    x = np.resize(x, round_up(len(x), 16))
    ours = through(harness.floats, x, np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):
        theirs = x.astype(np.float16)
    same = ours == theirs.view(np.uint16)
    assert (same | (np.isnan(ours.view(np.float16)) & np.isnan(theirs))).all()


def test_exp_is_within_three_units_in_the_last_place(harness: ctypes.CDLL) -> None:
    random = np.random.default_rng(0)
    x = np.concatenate([np.linspace(-87, 88, 1 << 18), random.normal(size=1 << 16)])
    x = np.append(x, [0, -0.0, -87, 88, 1e-45, -1e-45] + [1.0] * 10).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    ours = through(harness.exps, x, np.float32)
    assert (np.abs(ours - exact) <= 3 * np.spacing(exact.astype(np.float32))).all()
    assert ours[x == 0].tolist() == [1.0] * (x == 0).sum()
    low = np.float32([-87.01, -88, -100, -1e4, -1e30, -3e38, -np.inf, -1000] * 2)
    assert not through(harness.exps, low, np.float32).any()
    high = np.float32([88.01, 88.7, 88.8, 89, 100, 1e4, 1e30, np.inf] * 2)
    assert np.ptp(through(harness.exps, high, np.float32)) == 0
    assert np.isnan(through(harness.exps, np.float32([np.nan] * 16), np.float32)).all()


# ---- norms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_centred", [False, True])
@pytest.mark.parametrize("num_cols", [16, 48, 1024])
def test_norms_are_torchs(code_path: str, is_centred: bool, num_cols: int) -> None:
    torch.manual_seed(0)
    x, residual = torch.randn(2, 7, num_cols) * 3 + 1
    weight = torch.rand(num_cols)
    for bias in (None, torch.randn(num_cols)):
        bias = bias if is_centred else None
        kind = LayerNorm if is_centred else Norm
        ours, theirs = (kind(by, weight, 1e-5, bias) for by in (NATIVE, TORCH))
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(ours(x, residual), residual + theirs(x), rtol=1e-5, atol=1e-5)
        for count in (1, 3):
            with num_threads(count):
                assert torch.equal(ours(x[3:4], residual[3:4]), ours(x, residual)[3:4])


# ---- a mixture of experts ------------------------------------------------------------------------

MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "gpt_oss", "glm4_moe")
MIXTURES += ("minimax_m2", "ernie4_5_moe", "phimoe", "deepseek_v2", "deepseek_v3", "mistral4")


@pytest.mark.parametrize("family", MIXTURES)
def test_experts_give_what_torch_makes_of_the_same_matrices(
    family: str, code_path: str, tiny: oracle.Tiny
) -> None:
    name, overrides = ROWS[family]
    llm = LLM(tiny(name, **overrides), quantize="q8", kernels="native")
    torch.manual_seed(0)
    mlps = [layer.mlp for layer in llm.engine.decoder.layers]
    mixture = next(mlp for mlp in mlps if isinstance(mlp, nanollama.MoE))
    x, norm = torch.randn(37, llm.config.n_embd), Norm(TORCH, torch.rand(llm.config.n_embd), 1e-5)
    with torch.inference_mode():
        for residual in (None, torch.randn_like(x)):
            ours = mixture(x, norm, residual)
            for count in (1, 3):
                with num_threads(count):
                    one = mixture(x[5:6], norm, None if residual is None else residual[5:6])
                assert torch.equal(one, ours[5:6])
            theirs = mixture.plain(norm(x), residual)
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        mixture.gate.weight = mixture.gate.weight.clone()
        mixture.gate.weight[1, 2] = torch.nan
        assert mixture(x, norm).isnan().all()  # not hidden


# ---- latent attention ----------------------------------------------------------------------------


def latent_attention(
    kv_dtype: str, num_tokens: int, H: int = 5, D: int = 96, latent: int = 64
) -> tuple[NativeKVCache, Callable[[Tensor, int], Tensor]]:
    """A cache whose values are the beginnings of its keys, and its attention of qk (n, (H + 1) D)
    from a position on."""
    config = SimpleNamespace(n_heads=H, n_kv_heads=1, head_dim=D, n_layers=2, windows=(None, None))
    vars(config).update(kv_planes=1, own={"latent": SimpleNamespace(latent=latent)})
    vars(config).update(norm_eps=1e-6, qk_norm="", attn_softcap=0.0, attn_scale=0.1)
    cache = NativeKVCache(config, 1, kv_dtype, CPU)  # type: ignore
    cache.reserve(0, num_tokens)
    attn: Any = SimpleNamespace(index=1, q_norm=None, k_norm=None, sinks=None)
    nothing = torch.zeros(num_tokens, D // 2)

    def attend(qk: Tensor, start: int) -> Tensor:
        batch = Batch([(0, start, [0] * len(qk), 0)], CPU, row_tile=1)
        return cache.attend(attn, qk, Rotation(nothing, nothing), batch)

    return cache, attend


@pytest.mark.parametrize("kv_dtype", KV_DTYPES)
def test_attention_on_latents_is_that_of_float64(code_path: str, kv_dtype: str) -> None:
    num, H, D, latent = 300, 5, 96, 64
    cache, attend = latent_attention(kv_dtype, num)
    torch.manual_seed(0)
    qk = torch.randn(num, (H + 1) * D)
    whole = attend(qk, 0)
    q, keys = qk.double().unflatten(1, (-1, D)).split([H, 1], 1)
    stored = {"float32": torch.float32, "float16": torch.float16, "q8": torch.int8}[kv_dtype]
    blocks = cache.strips[0][0, 1, 0].view(-1, 16 * cache.strips[0].shape[-1])
    end = 16 * D * stored.itemsize
    kept = blocks[:, :end].contiguous().view(stored).double().unflatten(1, (16, D))
    if kv_dtype == "q8":
        kept = kept.reshape(-1, 8, D, 2).transpose(2, 3).reshape(-1, 16, D)
        scales = blocks[:, end:].contiguous().view(torch.float16).double()
        kept *= scales.unflatten(1, (-1, 16)).mT.repeat_interleave(32, 2)
    kept = kept.flatten(0, 1)[:num]
    atol = {"float32": 0.0, "float16": 2e-3, "q8": 0.02}[kv_dtype]
    torch.testing.assert_close(kept, keys[:, 0], rtol=0, atol=atol)
    hidden = torch.full((num, num), -torch.inf).triu(1)
    weights = (0.1 * torch.einsum("qhd,kd->hqk", q, kept) + hidden).softmax(-1)
    expected = torch.einsum("hqk,kd->qhd", weights, kept[:, :latent]).flatten(1)
    torch.testing.assert_close(whole.double(), expected, **TOLERANCES[kv_dtype])
    _, attend = latent_attention(kv_dtype, num)
    for count, (start, stop) in zip(itertools.cycle((1, 3)), itertools.pairwise([*CUTS, num])):
        with num_threads(count):
            assert torch.equal(attend(qk[start:stop], start), whole[start:stop])


def test_queries_to_latents_are_what_torch_makes_of_the_same_matrices(
    code_path: str, tiny: oracle.Tiny
) -> None:
    name, overrides = ROWS["deepseek_v3"]
    llm = LLM(tiny(name, **overrides), quantize="q8", kernels="native")
    attn: Any = llm.engine.decoder.layers[0].self_attn
    s, H, n = attn.shape, llm.config.n_heads, 37
    torch.manual_seed(0)
    q, kv = torch.randn(n, H * (s.nope + s.rope)), torch.randn(n, s.latent + s.rope)
    angles = torch.randn(n, (s.latent + s.rope) // 2)
    rotation = Rotation(angles.cos(), angles.sin())
    with torch.inference_mode():
        ours = attn.latent_heads(q, kv, rotation)
        out = attn.v_b_proj(ours[:, : H * s.latent].contiguous())
        one = Rotation(*(x[3:4].contiguous() for x in rotation[:2]))
        for count in (1, 3):
            with num_threads(count):
                assert torch.equal(attn.latent_heads(q[3:4], kv[3:4], one), ours[3:4])
                part = ours[3:4, : H * s.latent].contiguous()
                assert torch.equal(attn.v_b_proj(part), out[3:4])
        for projection in (attn.k_b_proj, attn.v_b_proj):  # to torch's loop over the same matrices
            projection.run_kernel = None
            parts = [NativeProjection([part]) for part in projection.parts]
            projection.projection = SimpleNamespace(parts=parts)
        attn.backend = TORCH
        theirs = attn.latent_heads(q, kv, rotation)
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
        again = attn.v_b_proj(ours[:, : H * s.latent].contiguous())
        torch.testing.assert_close(out, again, rtol=0, atol=0)


# ---- threads and forks ---------------------------------------------------------------------------


def test_python_threads_that_share_weights_get_the_same_bits() -> None:
    torch.manual_seed(0)
    run = NativeProjection([native(packed(kind, 300, 256)) for kind in ("Q4_0", "Q6_K")])
    x, attends = torch.randn(24, 256), [Attend((6, 2, 32), "float16", [300]) for _ in range(4)]
    linear, (attention,) = run(x), attends[0]((0, 0, 300))
    wrong: list[str] = []

    def caller(attend: Attend) -> None:
        for _ in range(40):
            if not torch.equal(run(x), linear):
                wrong.append("linear")
            if not torch.equal(attend((0, 299, 300))[0], attention[299:]):
                wrong.append("attention")

    with num_threads(3):
        attends[1]((0, 0, 300)), attends[2]((0, 0, 300)), attends[3]((0, 0, 300))
        callers = [threading.Thread(target=caller, args=(attend,)) for attend in attends]
        for thread in callers:
            thread.start()
        for thread in callers:
            thread.join()
    assert wrong == []


FORK = """
import ctypes, os, signal, sys
from nanollama_extras.kernels import native
kernels, data = native.load_kernels(), bytes([1, 0, 0, 0]) * 2**18
def read(num_threads): return kernels.read_all(data, len(data), num_threads)
expected, total = [1, 1, 2, 4, 4], 2**18
def num_tasks(n): return read(n) == total and len(os.listdir("/proc/self/task"))
assert [num_tasks(n) for n in (1, 1, 2, 4, 3)] == expected
for depth in range(3):
    child = os.fork()
    if child:
        assert os.waitpid(child, 0)[1] == 0
        assert num_tasks(4) == 4
        sys.exit()
    signal.alarm(60)
    assert [num_tasks(n) for n in (1, 1, 2, 4, 3)] == expected, depth
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts threads in /proc")
def test_a_fork_has_threads_of_its_own() -> None:
    done = python(FORK)
    assert (done.returncode, done.stderr) == (0, "")


# ---- the compiled library ------------------------------------------------------------------------

ROOT = Path(nanollama.__file__).parent
LOAD = "print(native.load_kernels().path().decode())"
SH = "#!/bin/sh\n"
TO_TARGET = 'while [ "$1" != -o ]; do shift; done; '


def python(program: str, **variables: object) -> subprocess.CompletedProcess[str]:
    """Run a program in a process of its own."""
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        env={**os.environ, **{name: str(value) for name, value in variables.items()}},
        capture_output=True,
        text=True,
        check=False,
    )


def executable(path: Path, program: str) -> Path:
    path.write_text(program)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


class Desk:
    """A cache, a place for temporary files, and a compiler that counts its runs, and that copies
    what the system's has made."""

    def __init__(self, folder: Path, compiled: bytes) -> None:
        self.cache, self.temporary, self.runs = folder / "cache", folder / "tmp", folder / "runs"
        self.temporary.mkdir()
        made = folder / "made"
        made.write_bytes(compiled)
        copies = f'echo run >> "{self.runs}"; {TO_TARGET} exec cp "{made}" "$2"'
        self.compiler = executable(folder / "compiler", f"{SH}{copies}\n")

    def load(self, before: str = "") -> str:
        """What the kernels call themselves in a new process."""
        places = {"NANOLLAMA_CACHE": self.cache, "TMPDIR": self.temporary, "CC": self.compiler}
        done = python(f"from nanollama_extras.kernels import native\n{before}\n{LOAD}", **places)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout.strip()

    @property
    def num_runs(self) -> int:
        return len(self.runs.read_text().split())

    @property
    def files(self) -> list[Path]:
        """All that is left in the cache; nothing must be left among temporary files."""
        assert list(self.temporary.iterdir()) == []
        return [path for path in self.cache.rglob("*") if path.is_file()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The kernels, compiled quickly."""
    target = tmp_path_factory.mktemp("compiled") / "kernels.so"
    kernels.compile_kernels(target, (*KERNEL_FLAGS, "-O0"))
    return target.read_bytes()


@pytest.fixture
def desk(tmp_path: Path, compiled: bytes) -> Desk:
    return Desk(tmp_path, compiled)


def test_the_second_process_does_not_compile(desk: Desk) -> None:
    assert desk.load() == native_path()
    assert desk.load() == native_path()
    assert desk.num_runs == 1
    (library,) = desk.files
    assert library.suffix == ".so"


def test_another_compiler_or_source_makes_another_library(desk: Desk) -> None:
    desk.load()
    with desk.compiler.open("a") as file:
        file.write("# another version\n")
    desk.load()
    assert desk.num_runs == len(desk.files) == 2
    desk.load("native.SOURCE += ' '")
    assert desk.num_runs == len(desk.files) == 3


def test_processes_that_start_at_once_all_get_the_kernels(desk: Desk) -> None:
    ran: list[str] = []
    threads = [threading.Thread(target=lambda: ran.append(desk.load())) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ran == [native_path()] * 4
    assert len(desk.files) == 1


def test_a_damaged_library_is_built_anew(desk: Desk) -> None:
    desk.load()
    (library,) = desk.files
    whole = library.read_bytes()
    middle = len(whole) // 2
    damages = [
        b"not a library",
        whole[:middle],
        whole[:middle] + bytes(len(whole) - middle),
        whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
    ]
    for num_built, damaged in enumerate(damages, 1):
        assert desk.num_runs == num_built
        library.write_bytes(damaged)
        assert desk.load() == native_path()
        assert library.read_bytes() == whole
        assert desk.files == [library]
    desk.load()
    assert desk.num_runs == len(damages) + 1


def test_a_cache_that_cannot_be_written_is_done_without(desk: Desk) -> None:
    desk.cache.write_text("a file where the directory should be")
    assert desk.load() == native_path()
    assert desk.cache.read_text().startswith("a file")
    assert desk.files == []


# ---- places that are full, closed, or open to others ---------------------------------------------


@pytest.fixture
def places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compiled: bytes
) -> Callable[..., list[Path]]:
    """places(refuse): load kernels that no compiler has to make, with `cache` and `temporary` in
    tmp_path; the folders where they were made, in order. refuse(step, path) may raise OSError."""
    cache, temporary = tmp_path / "cache", tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setenv("NANOLLAMA_CACHE", str(cache))
    monkeypatch.setenv("TMPDIR", str(temporary))
    true = ctypes.CDLL

    def load(refuse: Callable[[str, str], object] = lambda step, path: None) -> list[Path]:
        made = []

        def make(target: Path, *_: Any) -> None:
            made.append(target.parent.parent)
            refuse("compile", str(target))
            target.write_bytes(compiled)

        def link(path: str) -> ctypes.CDLL:
            refuse("load", path)
            return true(path)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kernels, "compile_kernels", make)
            patch.setattr(ctypes, "CDLL", link)
            library = kernels._load_kernels.__wrapped__(KERNEL_FLAGS)
        assert library.path().decode() == native_path()
        assert not temporary.exists() or list(temporary.iterdir()) == []
        return made

    return load


def refusing(step: str, folder: Path) -> Callable[[str, str], None]:
    def refuse(at: str, path: str) -> None:
        if at == step and path.startswith(str(folder)):
            raise OSError(28, "No space left on device")

    return refuse


def test_the_folder_of_compiled_kernels_is_private(
    places: Callable[..., list[Path]], tmp_path: Path
) -> None:
    folder = tmp_path / "cache" / "kernels"
    assert places() == [folder]
    (library,) = folder.iterdir()
    assert (folder.stat().st_mode & 0o777, library.stat().st_mode & 0o077) == (0o700, 0)
    folder.chmod(0o755)  # as earlier releases made it
    assert places() == []
    assert folder.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("step", ["compile", "load"])
def test_a_cache_that_is_full_or_may_hold_no_programs_is_done_without(
    places: Callable[..., list[Path]], tmp_path: Path, step: str
) -> None:
    cache, temporary = tmp_path / "cache" / "kernels", tmp_path / "temporary"
    assert places(refusing(step, cache)) == [cache, temporary]
    assert list(cache.iterdir()) == []


@pytest.mark.parametrize("fault", ["compile", "load", "missing", "open to others"])
def test_another_temporary_folder_is_taken(
    places: Callable[..., list[Path]], tmp_path: Path, fault: str
) -> None:
    (tmp_path / "cache").write_text("a file where the directory should be")
    temporary = tmp_path / "temporary"
    if fault == "missing":
        temporary.rmdir()
    elif fault == "open to others":
        temporary.chmod(0o777)
    made = places(refusing(fault, temporary))
    assert made[-1] not in (tmp_path / "cache" / "kernels", temporary)
    assert len(made) == (2 if fault in ("compile", "load") else 1)


def test_without_any_folder_the_reason_is_one_line(
    places: Callable[..., list[Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KernelError, match=r"No space left on device; point .* TMPDIR") as error:
        places(refusing("compile", Path("/")))
    assert len(str(error.value).splitlines()) == 1
    (tmp_path / "cache" / "kernels").rmdir()
    (tmp_path / "cache" / "kernels").write_text("a file")
    monkeypatch.setattr(kernels, "temporary_folders", list)
    with pytest.raises(KernelError, match="no folder that only this user can write"):
        places()


@pytest.fixture
def planted(tmp_path: Path, compiled: bytes) -> Path:
    """A library in a cache, under the name that its content has."""
    folder = tmp_path / "cache" / "kernels"
    folder.mkdir(parents=True)
    library = folder / f"key-{kernels.short_hash(compiled)}.so"
    library.write_bytes(compiled)
    library.chmod(0o700)
    return library


def is_loaded(planted: Path) -> bool:
    folder = kernels.private_folder(planted.parent)
    return folder is not None and kernels.cached_kernels(folder, "key") is not None


@pytest.mark.parametrize("place", ["file", "folder", "parent", "link to a folder", "link"])
def test_what_others_can_write_is_not_loaded(planted: Path, tmp_path: Path, place: str) -> None:
    assert is_loaded(planted)
    folder = planted.parent
    if place == "file":
        planted.chmod(0o702)
    elif place == "folder":
        planted.chmod(0o777)
        folder.chmod(0o777)
    elif place == "parent":
        folder.parent.chmod(0o777)
    elif place == "link":
        planted.rename(tmp_path / "x.so")
        planted.symlink_to(tmp_path / "x.so")
    else:
        folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(tmp_path / "elsewhere")
    assert not is_loaded(planted)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid(), reason="only root changes owners")
@pytest.mark.parametrize("place", ["file", "folder", "parent"])
def test_what_another_user_owns_is_not_loaded(planted: Path, place: str) -> None:
    owned = {"file": planted, "folder": planted.parent, "parent": planted.parent.parent}
    os.chown(owned[place], 12345, -1)
    assert not is_loaded(planted)


@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="of Unix")
def test_a_group_of_this_user_alone_may_write(
    planted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planted.parent.parent.chmod(0o775)
    for is_own in (True, False):
        monkeypatch.setattr(kernels, "is_own_group", lambda gid, is_own=is_own: is_own)
        assert is_loaded(planted) == is_own


# ---- no kernels ----------------------------------------------------------------------------------

FAILS = "echo said >&2; echo 'x.c:1: error: no vectors here' >&2; echo more >&2; exit 1"
OTHER = f"echo 'int other;' | {kernels.find_compiler()} -x c -shared -fPIC -o \"$2\" -"
BAD_COMPILERS: dict[str, tuple[str | None, str]] = {  # the file, and what is said of it
    "missing": (None, "no C compiler was found"),
    "fails": (SH + FAILS, "cannot compile the kernels: x.c:1: error: no vectors here"),
    "says-nothing": (SH + "exit 3", "cannot compile the kernels: exit code 3"),
    "makes-garbage": (SH + TO_TARGET + 'echo garbage > "$2"', "the compiled kernels do not load: "),
    "makes-nothing": (SH + "exit 0", "the compiled kernels do not load: "),
    "makes-another": (SH + TO_TARGET + OTHER, "the compiled kernels do not load: "),
    "no-program": ("\x7fELF and no more", "does not run: "),
}


@pytest.fixture(params=BAD_COMPILERS)
def said(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """What is said of the bad compiler that stands in for the system's."""
    program, said = BAD_COMPILERS[request.param]
    monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(kernels, "KERNEL_FLAGS", (*KERNEL_FLAGS, f"-D{tmp_path.name}"))
    if program is None:
        monkeypatch.delenv("CC", raising=False)
        monkeypatch.setenv("PATH", str(tmp_path))
    else:
        monkeypatch.setenv("CC", str(executable(tmp_path / "cc", program)))
    return said


def test_without_kernels_torch_answers_after_one_line_of_warning(
    said: str, tiny: oracle.Tiny, caplog: pytest.LogCaptureFixture
) -> None:
    llm, ids = LLM(tiny(), quantize="q4"), oracle.random_ids(20)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert said in record.getMessage()
    assert len(record.getMessage().splitlines()) == 1
    assert said in llm.engine.decoder.kernels
    assert llm.engine.decoder.kernels.startswith("torch (")
    exact = LLM(tiny(), quantize="q4", kernels="torch").logits(ids)
    assert (llm.logits(ids) - exact).norm() < 0.05 * exact.norm()  # kernels.int4: bfloat16
    assert len(caplog.records) == 1


def test_kernels_that_were_asked_for_are_an_error_of_one_line(said: str, tiny: oracle.Tiny) -> None:
    with pytest.raises(RequestError, match="native kernels cannot be had: ") as error:
        LLM(tiny(), kernels="native")
    assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 1
    assert error.value.param == "kernels"


@pytest.mark.parametrize("said", ["missing", "fails", "makes-garbage"], indirect=True)
def test_the_command_answers_without_a_compiler(said: str, tiny: oracle.Tiny) -> None:
    command = [sys.executable, nanollama.__file__, "--model", str(tiny()), "-p", "fox", "-m", "5"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0
    assert len(ran.stdout) > 1
    warning, _, speed = ran.stderr.splitlines()
    assert warning.startswith("warning: torch's slower kernels")
    assert said in warning
    assert speed.startswith("[prefill: ")


# ---- which kernels, and why ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "device", "dtype", "why"),
    [
        ("torch", "cpu", torch.float32, "torch"),
        ("torch", "cpu", torch.float16, "torch"),
        ("auto", "meta", torch.float32, "torch (native ones run on the CPU, not on meta)"),
        ("auto", "cpu", torch.float16, f"native ({native_path()}), in float32"),
        ("auto", "cpu", torch.float32, f"native ({native_path()})"),
        ("native", "cpu", torch.float32, f"native ({native_path()})"),
    ],
)
def test_the_choice_of_kernels_comes_with_its_reason(
    wanted: str, device: str, dtype: torch.dtype, why: str, caplog: pytest.LogCaptureFixture
) -> None:
    backend = nanollama.pick_backend(wanted, torch.device(device), dtype)
    assert isinstance(backend, NativeBackend) == why.startswith("native")
    assert backend.describe().startswith(why)
    assert caplog.records == []  # nothing is wrong with any of these


def test_native_kernels_where_there_are_none_are_refused() -> None:
    with pytest.raises(RequestError, match="native ones run on the CPU, not on meta"):
        nanollama.pick_backend("native", torch.device("meta"), torch.float32)


def test_the_kernels_are_shown(tiny: oracle.Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--model", str(tiny()), "-p", "fox", "-m", "1", "--verbose"]
    nanollama.main([*flags, "--quantize", "q8"])
    line = f"kernels: native ({native_path()}); keys and values: float16"
    assert line in capsys.readouterr().err
    nanollama.main([*flags, "--kernels", "torch"])
    assert "kernels: torch; keys and values: float32" in capsys.readouterr().err
    nanollama.main(["show", str(tiny())])
    assert f"native ({native_path()})" in capsys.readouterr().out
    nanollama.main(["show", str(tiny()), "--dtype", "float16"])
    line = f"native ({native_path()}), in float32; keys and values in float16"
    assert line in capsys.readouterr().out
    with serving(lambda: LLM(tiny())) as live:
        (worker,) = live.http.get("/stats").json()["workers"]
    assert worker["kernels"] == f"native ({native_path()})"


CODE_PAGES = """
import torch, nanollama

def file_bytes():
    status = open("/proc/self/status").read()
    return int(status.partition("RssFile:")[2].split()[0])

before = file_bytes()
nanollama.notify("kernels.memory", "return_unused_memory")
assert file_bytes() < before / 2
assert torch.arange(5).softmax(0, dtype=torch.float32).argmax() == 4
"""


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="gives back as Linux does")
def test_code_that_only_importing_needed_counts_no_longer() -> None:
    done = python(CODE_PAGES)
    assert (done.returncode, done.stderr) == (0, "")


AWAKE = """
import os, time, torch, nanollama

def used():
    tasks = os.listdir("/proc/self/task")
    return {t: int(open(f"/proc/self/task/{t}/schedstat").read().split()[0]) for t in tasks}

nanollama.MLP_BYTES = 1 << 20
params = nanollama.SamplingParams(max_tokens=5, min_p=0.01, logprobs=2)
llm = nanollama.LLM(os.environ["MODEL"], quantize="q8", threads=2, prefill_chunk=4096)
request = nanollama.GenerationRequest(list(range(60)) * 50, params=params)
llm.complete(request)
llm.engine.forget()
time.sleep(0.5)  # until all threads sleep
before = used()
llm.complete(request)
after = used()
print(sum(after[task] > before.get(task, 0) for task in after))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux does")
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Llama", {}),
        ("Llama", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
        ("Phi3", {"partial_rotary_factor": 0.5}),
        ("SmolLM3", {"no_rope_layers": [1, 0]}),
        ("Gemma2", {"head_dim": 64}),
    ],
)
def test_a_step_on_packed_weights_leaves_torchs_threads_asleep(
    name: str, options: dict[str, Any], tiny: Callable[..., Path]
) -> None:
    # 3,000 rows of 32 pairs of columns are more than torch leaves
    # to one thread, and so are the logits of 50,000 tokens
    wide = {"num_attention_heads": 2, "num_key_value_heads": 1, "hidden_size": 128}
    model = tiny(name, max_position_embeddings=4096, vocab_size=50000, **wide, **options)
    ran = python(AWAKE, MODEL=model, OMP_NUM_THREADS=2)
    assert ran.stdout in ("1\n", "2\n"), ran.stderr  # the caller, and perhaps the kernels' worker
