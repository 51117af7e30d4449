"""Float weights on native kernels: the layout, products against float64, rows that do not depend
on what else is in the call, and models of 16 bits, which stay so in memory."""

from __future__ import annotations

import itertools
import math
import shutil
from pathlib import Path
from typing import Any

import gguf_files
import hypothesis
import oracle
import pytest
import safetensors.torch
import test_native
import torch
from families import ALL
from hypothesis import strategies as st
from oracle import Tiny, matrices
from test_native import code_path, kernel_folder, num_threads
from torch import Tensor

import nanollama
from nanollama import ACTS, GATED, LLM, Norm, open_checkpoint
from nanollama_extras.commands.details import weight_bytes
from nanollama_extras.kernels import floats
from nanollama_extras.kernels.floats import FloatLinear
from nanollama_extras.kernels.native import NativeLinear, NativeProjection

__all__ = ["code_path", "kernel_folder"]  # fixtures

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
TYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}


def matrix(
    dtype: torch.dtype, num_rows: int, num_cols: int, bias: Tensor | None = None, seed: int = 0
) -> FloatLinear:
    """A random weight (rows, cols)"""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(num_rows, num_cols, generator=generator).to(dtype)
    return FloatLinear((num_rows, num_cols), lambda rows: weight[rows], bias, torch.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_hold_exactly_the_weight(
    code_path: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(floats, "LOAD_WEIGHTS", 20 * 48)  # 32 rows at a time
    every = torch.arange(65536, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    numbers = every.float()[every.isfinite()].to(dtype)
    for num_rows in (1, 15, 31, 32, 33, 70):
        weight = numbers[torch.randint(len(numbers), (num_rows, 48))]
        ours = FloatLinear(weight.shape, lambda rows, w=weight: w[rows], None, torch.float32)
        assert ours.dtype == dtype
        assert torch.equal(ours.dequantize(), weight.float())
        index = torch.randint(num_rows, (9,))
        assert torch.equal(ours.rows(index, 0.5), weight.float()[index] * 0.5)
        assert ours.nbytes == dtype.itemsize * 48 * nanollama.round_up(num_rows, 32)


def check(
    parts: list[NativeLinear], x: Tensor, norm: Norm | None, act: str, residual: Tensor | None
) -> None:
    """Hold a product with float weights against float64."""
    y = NativeProjection(parts)(x, norm, act, residual)
    weight = torch.cat([part.dequantize() for part in parts]).double()
    bias = torch.cat([torch.zeros(p.shape[0]) if p.bias is None else p.bias for p in parts])
    rest = bias.double() + (0 if residual is None else residual.double())
    exact = test_native.prepared(x, norm, act)
    bound = 4e-6 * ((exact.abs() + 0.1) @ weight.abs().T) + 1e-6 * (bias.abs() + rest.abs())
    assert ((y - (exact @ weight.T + rest)).abs() <= bound).all()


@hypothesis.settings(max_examples=60)
@hypothesis.given(
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=4),
    sizes=st.lists(st.integers(1, 100), min_size=4, max_size=4),
    num_groups=st.integers(1, 20),
    num_tokens=st.one_of(st.integers(1, 30), st.just(491)),
    before=st.sampled_from(["plain", "norm", *ACTS]),
    bias=st.booleans(),
    residual=st.booleans(),
    threads=st.integers(1, 4),
    seed=st.integers(0, 9),
)
def test_matrices_side_by_side_of_any_types_and_sizes(
    code_path: str,
    dtypes: list[torch.dtype],
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
    num_cols = 16 * num_groups
    parts: list[NativeLinear] = [
        matrix(dtype, n, num_cols, torch.randn(n) if bias else None, seed + i)
        for i, (dtype, n) in enumerate(zip(dtypes, sizes))
    ]
    x = torch.randn(num_tokens, num_cols * (1 + (before in GATED))) * torch.rand(num_tokens, 1)
    norm = Norm(test_native.TORCH, torch.rand(num_cols) + 0.5, 1e-5) if before == "norm" else None
    rest = torch.randn(num_tokens, sum(part.shape[0] for part in parts)) if residual else None
    with num_threads(threads):
        check(parts, x, norm, before if before in ACTS else "", rest)


BEFORE = ["plain", "norm", "swiglu"]


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_is_bit_for_bit_the_same_in_any_batch_on_any_number_of_threads(
    code_path: str, dtype: torch.dtype, before: str
) -> None:
    torch.manual_seed(0)
    packed = test_native.native(test_native.packed("Q4_0", 20, 288))
    run = NativeProjection([matrix(dtype, 70, 288, torch.randn(70)), packed, matrix(dtype, 3, 288)])
    norm = Norm(test_native.TORCH, torch.rand(288), 1e-5) if before == "norm" else None
    x = torch.randn(33, 576 if before in GATED else 288)
    residual = torch.randn(33, run.num_rows)

    def rows(start: int, stop: int) -> Tensor:
        at = slice(start, stop)
        return run(x[at], norm, before if before in ACTS else "", residual[at])

    whole = rows(0, 33)
    assert torch.equal(torch.cat([rows(i, i + 1) for i in range(33)]), whole)
    for count, size in itertools.product((1, 2, 3, 4), (*range(2, 14), 20, 33)):
        with num_threads(count):
            assert torch.equal(rows(33 - size, 33), whole[33 - size :]), (count, size)
    alone = NativeProjection([packed])(x, norm, before if before in ACTS else "")
    torch.testing.assert_close(whole[:, 70:90], alone + residual[:, 70:90], rtol=0, atol=1e-5)
    many = run(x.repeat(40, 1), norm, before if before in ACTS else "", residual.repeat(40, 1))
    assert torch.equal(many, whole.repeat(40, 1))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_broken_token_is_not_hidden_and_harms_no_other(
    code_path: str, dtype: torch.dtype, bad: float
) -> None:
    run, x = NativeProjection([matrix(dtype, 40, 64)]), torch.randn(15, 64)
    fine = run(x)
    x[2, 5] = bad
    y = run(x)
    assert not torch.isfinite(y[2]).any()
    y[2] = fine[2]
    assert torch.equal(y, fine)


# ---- models --------------------------------------------------------------------------------------


def halved(path: Path, target: Path, dtype: torch.dtype) -> Path:
    """A copy of a checkpoint whose float tensors are `dtype`."""
    shutil.copytree(path, target)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    safetensors.torch.save_file(
        {name: tensor.to(dtype) for name, tensor in tensors.items()},
        target / "model.safetensors",
        {"format": "pt"},
    )
    return target


@pytest.mark.parametrize("variant", ALL)
def test_a_bfloat16_model_is_transformers_in_float32(
    tiny: Tiny, tmp_path: Path, variant: str
) -> None:
    name, overrides = ALL[variant]
    path = halved(tiny(name, **overrides), tmp_path / "half", torch.bfloat16)
    ids = oracle.random_ids(40)
    llm, expected = LLM(path, kernels="native"), oracle.logits(oracle.load(path), ids)
    torch.testing.assert_close(llm.logits(ids), expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("form", ["safetensors", "gguf"])
@pytest.mark.parametrize("asked", ["float32", "float16", "bfloat16"])
def test_weights_of_16_bits_stay_so_whatever_is_asked_for(
    tiny: Tiny, tmp_path: Path, dtype: str, form: str, asked: str
) -> None:
    path = halved(tiny(tie_word_embeddings=True), tmp_path / "half", getattr(torch, dtype))
    if form == "gguf":
        path = gguf_files.convert(path, tmp_path / "model.gguf", TYPES[dtype])[0]
    llm = LLM(path, dtype=asked)
    found: Any = matrices(llm.engine.decoder)
    kept = asked if dtype == "float32" else dtype
    assert {part.dtype for part in found} == {getattr(torch, kept)}
    assert llm.engine.decoder.dtype == torch.float32
    assert llm.engine.decoder.kv_dtype == ("float32" if asked == "float32" else "float16")
    ids = oracle.random_ids(20)
    exact = LLM(path, kernels="torch").logits(ids)
    bound = 1e-4 if asked == "float32" else 0.5 if dtype == "float32" else 2e-2
    torch.testing.assert_close(llm.logits(ids), exact, rtol=0, atol=bound)


def test_the_estimate_of_memory_is_that_of_the_weights(tiny: Tiny, tmp_path: Path) -> None:
    path = halved(tiny(), tmp_path / "half", torch.bfloat16)
    llm = LLM(path)
    backend: Any = llm.engine.decoder.backend
    found = weight_bytes(open_checkpoint(path), nanollama.EngineConfig(), backend)
    held = sum(part.nbytes for part in backend.floats)
    assert found == pytest.approx(held, rel=0.02)
    assert found < 1.01 * llm.checkpoint.num_bytes


def test_columns_that_16_does_not_divide_are_torchs(tiny: Tiny) -> None:
    llm, ids = LLM(tiny(intermediate_size=72), kernels="native"), oracle.random_ids(20)
    mlp: Any = llm.engine.decoder.layers[0].mlp
    assert isinstance(mlp.down_proj.parts[0], nanollama.Linear)
    assert isinstance(mlp.gate_up_proj.parts[0], FloatLinear)
    assert llm.engine.decoder.row_tile == nanollama.ROW_TILE
    expected = LLM(tiny(intermediate_size=72), kernels="torch").logits(ids)
    torch.testing.assert_close(llm.logits(ids), expected, rtol=0, atol=1e-4)


def test_a_large_model_of_floats_says_once_what_8_bits_would_gain(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny()), "-p", "fox", "-m", "1"]
    nanollama.main(flags)
    assert "note: " not in capsys.readouterr().err  # not for a tiny one
    monkeypatch.setattr(floats, "LARGE", 1000)
    nanollama.main(flags)
    nanollama.main(flags)
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("note: ")]
    assert line.endswith("and decode about 3.8 times as fast")
    nanollama.main([*flags, "--quantize", "q8"])
    assert "note: " not in capsys.readouterr().err
