"""Section 3: packed weights against the gguf package, and our own rounding against its bounds."""

from __future__ import annotations

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from nanollama import GROUP, REPACK, PackedLinear, pack_nibbles, quantize

EXACT = ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
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
    return blocks


def reference(name: str, blocks: np.ndarray) -> torch.Tensor:
    kind = gguf.GGMLQuantizationType[name]
    return torch.from_numpy(gguf.quants.dequantize(blocks.reshape(len(blocks), -1), kind))


def packed(name: str, blocks: np.ndarray) -> PackedLinear:
    return REPACK[name](torch.from_numpy(blocks))


def random_packed(name: str = "Q4_1", num_rows: int = 24, num_blocks: int = 3) -> PackedLinear:
    return packed(name, random_blocks(name, num_rows, num_blocks))


# ---- repacking -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXACT)
def test_repacking_loses_nothing(name: str) -> None:
    for num_rows, num_blocks in ((64, 4), (1, 1), (3, 9)):
        blocks = random_blocks(name, num_rows, num_blocks)
        ours, theirs = packed(name, blocks), reference(name, blocks)
        assert ours.shape == tuple(theirs.shape)
        torch.testing.assert_close(ours.dequantize(), theirs, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", K_TYPES)
def test_repacking_k_types_loses_only_the_rounding_of_combined_scales(name: str) -> None:
    for num_rows, num_blocks in ((64, 4), (1, 1), (3, 2)):
        blocks = random_blocks(name, num_rows, num_blocks)
        ours, theirs = packed(name, blocks), reference(name, blocks)
        assert ours.shape == tuple(theirs.shape)
        assert ours.scale.dtype == torch.float16
        # q * scale and offset each carry half a unit of float16's last place
        q_scale = ours.dequantize()
        offset = torch.zeros_like(ours.scale) if ours.offset is None else ours.offset
        offset = offset.float().repeat_interleave(ours.shape[1] // offset.shape[1], dim=1)
        bound = 2.0**-11 * ((q_scale - offset).abs() + offset.abs()) + 63 * 2.0**-25
        assert ((q_scale - theirs).abs() <= bound * 1.01).all()


@pytest.mark.parametrize("name", EXACT)
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
    assert linear.bits == (4 if name in ("Q4_0", "Q4_1", "Q4_K") else 8)
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


# ---- quantize ------------------------------------------------------------------------------------

WEIGHTS = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.sampled_from([32, 64, 96])),
    elements=st.floats(-1000, 1000, width=32),
)


def group_bound(groups: torch.Tensor, bits: int) -> torch.Tensor:
    """Most that rounding may change a weight of each group: half a step, and what float16 does to
    the scale (times the largest q) and to the offset."""
    if bits == 8:
        largest = groups.abs().amax(-1, keepdim=True)
        return largest / 127 / 2 + largest * 2.0**-11 + 127 * 2.0**-25
    low, high = groups.aminmax(dim=-1, keepdim=True)
    return (high - low) * (1 / 30 + 2.0**-11) + low.abs() * 2.0**-11 + 16 * 2.0**-25


@settings(max_examples=200)
@given(WEIGHTS, st.sampled_from([8, 4]))
def test_rounding_stays_within_half_a_step_of_its_group(array: np.ndarray, bits: int) -> None:
    weight = torch.from_numpy(array)
    linear = quantize(weight, bits)
    assert linear.bits == bits
    assert linear.shape == tuple(weight.shape)
    groups = weight.unflatten(1, (-1, GROUP))
    error = (linear.dequantize().unflatten(1, (-1, GROUP)) - groups).abs()
    assert (error <= group_bound(groups, bits) * 1.01).all()


@pytest.mark.parametrize("bits", [8, 4])
def test_groups_of_zeros_and_of_one_value_are_exact(bits: int) -> None:
    assert torch.equal(quantize(torch.zeros(2, 64), bits).dequantize(), torch.zeros(2, 64))
    mixed = torch.cat((torch.zeros(1, 32), torch.full((1, 32), 0.5)), dim=1)
    torch.testing.assert_close(quantize(mixed, bits).dequantize(), mixed, rtol=1e-3, atol=0)


@pytest.mark.parametrize("bits", [8, 4])
def test_an_outlier_harms_only_its_own_group(bits: int) -> None:
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    alone = quantize(weight, bits).dequantize()
    weight[0, 0] = 1000
    assert torch.equal(quantize(weight, bits).dequantize()[:, 32:], alone[:, 32:])


def test_eight_bits_are_as_good_as_the_gguf_package_s_and_better_than_four() -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    q8_0 = gguf.GGMLQuantizationType.Q8_0
    theirs = gguf.quants.dequantize(gguf.quants.quantize(weight.numpy(), q8_0), q8_0)
    error = {
        bits: (quantize(weight, bits).dequantize() - weight).square().mean() for bits in (8, 4)
    }
    assert error[8] <= 1.01 * (torch.from_numpy(theirs) - weight).square().mean()
    assert error[8] < error[4] / 100
    assert error[4].sqrt() < 0.1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_weights_are_quantized_in_float32(dtype: torch.dtype) -> None:
    weight = torch.randn(4, 64).to(dtype)
    ours, exact = quantize(weight, 4), quantize(weight.float(), 4)
    assert torch.equal(ours.q, exact.q)
    assert torch.equal(ours.scale, exact.scale)
