"""Quantizers of GGUF's blocks, with the gguf package's readers and quantizers as judges."""

from __future__ import annotations

import gguf
import pytest
import torch
from gguf_files import ERRORS

from nanollama import quantize
from nanollama_extras.files import quantizers
from nanollama_extras.files.quantizers import PACKERS, Gain, quantized_rows, unpacked

PUBLISHED = {"Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"}  # types that the gguf package writes


def weights(num_rows: int = 48, num_cols: int = 512) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, num_cols, generator=random) * 0.05


def relative_error(kind: str, x: torch.Tensor, importance: torch.Tensor | None = None) -> float:
    y = unpacked(quantized_rows(x, kind, importance), kind)
    return float((y - x).norm() / x.norm())


@pytest.mark.parametrize("kind", PACKERS)
def test_the_error_is_that_of_a_good_search(kind: str) -> None:
    assert relative_error(kind, weights()) < ERRORS[kind]


@pytest.mark.parametrize("kind", sorted(PUBLISHED))
def test_the_error_is_at_most_that_of_the_gguf_package(kind: str) -> None:
    x = weights()
    theirs = gguf.quantize(x.numpy(), gguf.GGMLQuantizationType[kind])
    error = (unpacked(torch.from_numpy(theirs), kind) - x).norm() / x.norm()
    assert relative_error(kind, x) <= float(error)


@pytest.mark.parametrize("kind", PACKERS)
def test_blocks_of_equal_or_no_values_stay_near_them(kind: str) -> None:
    x = weights(8)
    x[0], x[1, :300], x[2], x[3] = 0.0, 0.0, 0.25, -0.25
    x[4], x[5] = x[4].abs() + 0.1, -x[5].abs() - 0.1
    x[6, 7] = 30.0
    y = unpacked(quantized_rows(x, kind), kind)
    assert y.isfinite().all()
    assert (y[0] == 0).all()
    assert ((y - x).norm(dim=1) <= (0.5 if kind == "Q2_K" else 0.3) * x.norm(dim=1) + 1e-6).all()


@pytest.mark.parametrize("kind", PACKERS)
def test_importance_lowers_the_weighted_error(kind: str) -> None:
    x, gain = weights(), Gain()
    importance = torch.rand(512, generator=torch.Generator().manual_seed(2)) ** 6 + 1e-3
    blocks = quantized_rows(x, kind, importance, gain)
    both = blocks, quantized_rows(x, kind)
    errors = [(unpacked(b, kind) - x).square().mul(importance).sum() for b in both]
    assert errors[0] < 0.97 * errors[1]
    ratio = float(errors[0] / errors[1])
    assert gain.with_weights / gain.without == pytest.approx(ratio, rel=0.05)


def test_rows_do_not_depend_on_their_neighbours() -> None:
    x = weights(2048, 256)
    whole = quantized_rows(x, "Q4_K")
    assert torch.equal(whole[1500:1510], quantized_rows(x[1500:1510], "Q4_K"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), 1e6])
def test_numbers_beyond_float16_are_refused(bad: float) -> None:
    x = weights(2)
    x[0, 0] = bad
    with pytest.raises(ValueError, match="largest value"):
        quantized_rows(x, "Q4_0")


def test_four_bits_with_an_offset_are_about_as_good_as_the_cores() -> None:
    x = weights()
    core = quantize(x, 4).dequantize()
    assert relative_error("Q4_1", x) < 1.03 * float((core - x).norm() / x.norm())


def test_floats_are_rounded_to_the_nearest() -> None:
    x = weights(2)
    for kind, dtype in quantizers.FLOATS.items():
        raw = quantized_rows(x, kind)
        assert torch.equal(raw.view(dtype), x.to(dtype))
