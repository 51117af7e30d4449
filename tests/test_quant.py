"""Section 3: packed weights against the gguf package."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch

import nanollama
from nanollama import REPACK, Backend, Linear, PackedLinear, pack_nibbles
from nanollama_extras.kernels.int4 import Int4Linear

K_TYPES = ["Q4_K", "Q5_K", "Q6_K"]
# Where each block keeps its float16 scales: random bytes there would be inf and nan.
SCALES_AT = {
    "Q4_0": [0],
    "Q4_1": [0, 2],
    "Q5_0": [0],
    "Q5_1": [0, 2],
    "Q8_0": [0],
    "Q4_K": [0, 2],
    "Q5_K": [0, 2],
    "Q6_K": [208],
    "MXFP4": [],  # a power of two
}


def random_blocks(name: str, num_rows: int, num_blocks: int, seed: int = 0) -> np.ndarray:
    """(rows, blocks, block bytes) of random bytes, every pattern of bits allowed but for the
    scales, which are about as large as in real models."""
    random = np.random.default_rng(seed)
    block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]][1]
    blocks = random.integers(0, 256, (num_rows, num_blocks, block_bytes), dtype=np.uint8)
    for at in SCALES_AT[name]:
        scale = random.normal(scale=0.01, size=(num_rows, num_blocks, 1)).astype(np.float16)
        blocks[..., at : at + 2] = scale.view(np.uint8)
    if name == "MXFP4":
        blocks[..., 0] = random.integers(105, 130, blocks.shape[:2])
    return blocks


def reference(name: str, blocks: np.ndarray) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[name]
    return torch.from_numpy(gguf.quants.dequantize(blocks.reshape(len(blocks), -1), kind))


def packed(name: str, blocks: np.ndarray) -> PackedLinear:
    return REPACK[name](torch.from_numpy(blocks))


def random_packed(name: str = "Q4_1", num_rows: int = 24, num_blocks: int = 3) -> PackedLinear:
    return packed(name, random_blocks(name, num_rows, num_blocks))


# ---- repacking -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPACK)
def test_repacking_loses_nothing(name: str) -> None:
    for num_rows, num_blocks in ((64, 4), (1, 1), (3, 9)):
        blocks = random_blocks(name, num_rows, num_blocks)
        ours, theirs = packed(name, blocks), reference(name, blocks)
        assert ours.shape == tuple(theirs.shape)
        torch.testing.assert_close(ours.dequantize(), theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", K_TYPES)
def test_combined_scales_are_rounded_only_where_the_arithmetic_is_coarser(name: str) -> None:
    blocks = random_blocks(name, 3, 2)
    exact, theirs = packed(name, blocks), reference(name, blocks)
    assert exact.to(torch.device("cpu"), torch.float32).scale.dtype == torch.float32
    half = exact.to(torch.device("cpu"), torch.bfloat16)
    assert {part.dtype for part in (half.scale, half.offset) if part is not None} == {torch.float16}
    torch.testing.assert_close(half.dequantize().float(), theirs, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", [name for name in REPACK if name not in K_TYPES])
def test_blocks_made_by_the_gguf_package_repack_exactly(name: str) -> None:
    weight = np.random.default_rng(1).normal(size=(16, 128)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[name]
    raw = gguf.quants.quantize(weight, kind)
    blocks = raw.reshape(16, 4, -1)
    torch.testing.assert_close(
        packed(name, blocks).dequantize(), reference(name, blocks), rtol=1e-6, atol=1e-8
    )


@pytest.mark.parametrize("name", REPACK)
def test_packed_weights_stay_small(name: str) -> None:
    linear = random_packed(name, 32, 2)
    num_weights = linear.shape[0] * linear.shape[1]
    assert linear.bits == (4 if name in ("Q4_0", "Q4_1", "Q4_K", "MXFP4") else 8)
    # a 4-bit weight takes half a byte, an 8-bit one a byte; scales add at most a quarter byte
    assert linear.bits / 8 <= linear.nbytes / num_weights <= linear.bits / 8 + 0.25


@pytest.mark.parametrize("name", REPACK)
def test_every_packed_type_is_one_the_gguf_package_knows(name: str) -> None:
    assert gguf.GGMLQuantizationType[name]
    assert name in SCALES_AT


# ---- PackedLinear --------------------------------------------------------------------------------


@pytest.mark.parametrize("name", REPACK)
def test_a_packed_linear_computes_what_its_float_weight_does(name: str) -> None:
    linear = random_packed(name)
    weight, bias = linear.dequantize(), torch.randn(24)
    x = torch.randn(5, weight.shape[1])
    torch.testing.assert_close(linear(x), x @ weight.T, rtol=1e-4, atol=1e-4)
    linear.bias = bias
    torch.testing.assert_close(linear(x), x @ weight.T + bias, rtol=1e-4, atol=1e-4)


def test_a_packed_linear_too_large_for_one_piece_is_unpacked_in_several(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    linear = random_packed("Q4_0", num_rows=23, num_blocks=2)
    x = torch.randn(4, 64)
    whole = linear(x)
    monkeypatch.setattr(
        "nanollama.DEQUANT_WEIGHTS", 5 * 64
    )  # 5 rows at a time, 3 in the last piece
    torch.testing.assert_close(linear(x), whole, rtol=1e-5, atol=1e-6)


def test_rows_of_a_packed_weight_are_its_embeddings() -> None:
    linear = random_packed("Q6_K", num_blocks=1)
    index = torch.tensor([3, 3, 0, 23])
    assert torch.equal(linear.rows(index), linear.dequantize()[index])
    assert torch.equal(linear.select(slice(4, 9)).dequantize(), linear.dequantize()[4:9])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", REPACK)
def test_half_precision_unpacks_to_about_the_same_weight(name: str, dtype: torch.dtype) -> None:
    linear = random_packed(name, num_blocks=2)
    half = linear.to(torch.device("cpu"), dtype)
    assert half.dequantize().dtype == dtype
    exact = linear.dequantize()
    error = (half.dequantize().float() - exact).abs().max() / exact.abs().max()
    assert error < 2 * torch.finfo(dtype).eps


def test_nibbles_lie_as_the_banner_says() -> None:
    q = torch.arange(32).clamp(max=15).view(1, 1, 32)
    packed_q = pack_nibbles(q)
    assert packed_q.shape == (1, 1, 16)
    assert (packed_q & 15).flatten().tolist() == q.flatten().tolist()[:16]  # column j
    assert (packed_q >> 4).flatten().tolist() == q.flatten().tolist()[16:]  # column j + 16


# ---- without the native kernels ------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_native_kernels_packed_weights_take_torch_s_fastest_way(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    backend = Backend(torch.device("cpu"), dtype, "torch", missing="they are not installed")
    packed = {name: random_packed(name, num_rows=32) for name in ("Q4_1", "Q8_0", "MXFP4")}
    x = torch.randn(5, 96).to(dtype)

    def made(name: str, is_table: bool = False) -> object:
        weight, bias = packed[name], torch.randn(32).to(dtype)
        matrix = backend.pack(weight.shape, weight.select, bias, is_table)
        exact = x.float() @ weight.dequantize().T + bias.float()
        assert (matrix(x).float() - exact).norm() < 1e-2 * exact.norm()
        assert matrix(x).dtype == dtype
        return matrix

    for name, is_table in (("Q4_1", True), ("Q4_1", False), ("Q8_0", False)):
        assert isinstance(made(name, is_table), Int4Linear)
    assert isinstance(made("MXFP4"), Linear)
    assert caplog.messages == [
        "warning: packed weights run on torch's slower operations; they are not installed"
    ]
    monkeypatch.setattr(nanollama, "available_memory", lambda device: 1000)
    assert isinstance(made("MXFP4"), PackedLinear)
