"""AWQ and GPTQ in safetensors files, packed by the steps of AutoAWQ and GPTQModel."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quantized_files as files
import torch
from oracle import Tiny
from quantized_files import AWQ, GPTQ, awq, check, gptq, saved, sources, unpacked
from torch import Tensor

from nanollama import LLM, CheckpointError, PackedLinear


def source_of(parts: dict[str, Tensor], settings: dict[str, Any]) -> Any:
    return sources(settings, {f"a.{end}": part.contiguous() for end, part in parts.items()})


@pytest.mark.parametrize("name", ["Llama", "Qwen3Moe"])
def test_logits_of_awq_are_those_of_the_floats(tiny: Tiny, tmp_path: Path, name: str) -> None:
    packed, plain = saved(tiny(name, **files.SIZES.get(name, {})), tmp_path, AWQ, awq)
    check(packed, plain)
    assert LLM(packed).checkpoint.quantization == "AWQ 4-bit, packed as 4 bits"


@pytest.mark.parametrize("is_symmetric", [True, False])
def test_logits_of_gptq_are_those_of_the_floats(
    tiny: Tiny, tmp_path: Path, is_symmetric: bool
) -> None:
    settings = {**GPTQ, "sym": is_symmetric, "desc_act": False}
    packed, plain = saved(
        tiny("Qwen3"), tmp_path, settings, lambda w: gptq(w, is_symmetric=is_symmetric)
    )
    check(packed, plain)


def test_logits_of_gptq_with_columns_in_another_order(tiny: Tiny, tmp_path: Path) -> None:
    order = torch.randperm(96, generator=torch.Generator().manual_seed(1))
    settings = {**GPTQ, "desc_act": True}
    packed, plain = saved(tiny(), tmp_path, settings, lambda w: gptq(w, order=order))
    check(packed, plain, bound=0.06)
    assert LLM(packed).checkpoint.quantization == "GPTQ 4-bit, packed as 8 bits"


def test_awq_in_groups_of_128_is_exact() -> None:
    torch.manual_seed(0)
    parts, expected = awq(torch.randn(48, 256), 128)
    source = source_of(parts, {**AWQ, "group_size": 128})["a.weight"]
    packed = source.load()
    assert isinstance(packed, PackedLinear)
    assert (packed.bits, source.shape, packed.offset is not None) == (4, (48, 256), True)
    torch.testing.assert_close(packed.dequantize(), expected, rtol=0, atol=1e-6)
    rows = torch.tensor([47, 0, 5])
    assert torch.equal(unpacked(source, rows), packed.dequantize()[rows])


@pytest.mark.parametrize("version", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [64, -1])
def test_gptq_is_exact(bits: int, group: int, is_symmetric: bool, version: str) -> None:
    torch.manual_seed(0)
    parts, expected = gptq(torch.randn(64, 128), bits, group, is_symmetric, version)
    settings = {**GPTQ, "bits": bits, "group_size": group, "checkpoint_format": version}
    source = source_of(parts, {**settings, "sym": is_symmetric})["a.weight"]
    packed = source.load()
    assert isinstance(packed, PackedLinear)
    assert (packed.bits, packed.offset is None) == (8 if bits == 8 else 4, is_symmetric)
    torch.testing.assert_close(packed.dequantize(), expected, rtol=0, atol=2e-6)


def test_an_offset_costs_little_in_float16() -> None:
    torch.manual_seed(0)
    parts, expected = awq(torch.randn(64, 256), 128)
    packed = source_of(parts, {**AWQ, "group_size": 128})["a.weight"].load()
    assert isinstance(packed, PackedLinear)
    half = packed.to(torch.device("cpu"), torch.float16)
    half.dtype = torch.float32
    step = parts["scales"].T.float().repeat_interleave(128, 1)
    assert ((half.dequantize() - expected).abs() <= 0.004 * step).all()


def test_columns_in_another_order_are_rounded_to_8_bits() -> None:
    torch.manual_seed(0)
    order = torch.randperm(128)
    parts, expected = gptq(torch.randn(64, 128), order=order)
    packed = source_of(parts, {**GPTQ, "desc_act": True})["a.weight"].load()
    assert isinstance(packed, PackedLinear)
    assert packed.bits == 8
    assert (packed.dequantize() - expected).norm() < 0.006 * expected.norm()


def test_a_matrix_is_read_once_and_let_go() -> None:
    torch.manual_seed(0)
    parts, expected = awq(torch.randn(48, 64))
    source = source_of(parts, AWQ)["a.weight"]
    holder = source.load.__self__
    found = [source.load(slice(at, at + 16)) for at in (0, 16)]
    assert holder.packed is not None
    found.append(source.load(slice(32, 48)))
    assert holder.packed is None
    torch.testing.assert_close(torch.cat([part.dequantize() for part in found]), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"scales": None}, "a.scales.* is missing"),
        ({"qzeros": None}, "a.qzeros.* is missing"),
        ({"qzeros": torch.ones(2, 5, dtype=torch.int32)}, r"shape \(2, 5\).* asks for \(2, 6\)"),
        ({"scales": torch.ones(1, 48)}, r"shape \(1, 48\).* asks for \(2, 48\)"),
        ({"qweight": torch.ones(8, 48)}, "is of type F32; I32 is needed"),
        ({"qweight": torch.ones(5, 48, dtype=torch.int32)}, "has 40 columns"),
        ({"g_idx": torch.ones(63, dtype=torch.int32)}, r"shape \(63,\)"),
        ({"qweight": None}, r"no tensor is named \*.qweight"),
    ],
)
def test_files_that_contradict_their_config_are_refused(
    change: dict[str, Any], message: str
) -> None:
    parts, _ = gptq(torch.randn(48, 64))
    given = {end: part for end, part in {**parts, **change}.items() if part is not None}
    with pytest.raises(CheckpointError, match=message):
        source_of(given, GPTQ)


def test_groups_without_scales_are_refused() -> None:
    parts, _ = gptq(torch.randn(48, 64))
    parts["g_idx"] = parts["g_idx"] + 1
    with pytest.raises(CheckpointError, match="names groups without scales"):
        source_of(parts, GPTQ)["a.weight"].load()


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({**AWQ, "bits": 8}, "bits is 8; 4 is needed"),
        ({**AWQ, "version": "gemv"}, "version is 'gemv'; gemm"),
        ({**AWQ, "zero_point": False}, "zero_point is False"),
        ({**AWQ, "group_size": 16}, "group_size is 16"),
        ({**GPTQ, "group_size": 48}, "group_size is 48; -1 or a multiple of 32"),
        ({**GPTQ, "bits": 5}, "bits is 5; 2 or 3 or 4 or 8"),
        ({**GPTQ, "bits": True}, "bits is True"),
        ({**GPTQ, "checkpoint_format": "marlin"}, "checkpoint_format is 'marlin'"),
        ({**GPTQ, "quant_method": "auto-round", "packing_format": "mlx"}, "format is 'mlx'; auto"),
        ({**GPTQ, "quant_method": "auto-round", "backend": [1]}, r"packing_format is \[1\]; auto"),
    ],
)
def test_settings_that_are_not_supported_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        sources(settings, {})


@pytest.mark.parametrize(
    ("settings", "quantizer"),
    [
        ({"packing_format": "auto_round:auto_awq"}, awq),
        ({"packing_format": "auto_round:awq"}, awq),
        ({"packing_format": "auto_round:auto_gptq"}, gptq),
        ({"quant_method": "intel/auto-round", "backend": "auto_round:gptq:exllamav2"}, gptq),
        ({}, gptq),
        ({"packing_format": "auto_round"}, lambda w: gptq(w, version="gptq_v2")),
        ({"packing_format": "auto_round:gptqmodel"}, lambda w: gptq(w, version="gptq_v2")),
    ],
)
def test_auto_round_names_the_format(settings: dict[str, Any], quantizer: Any) -> None:
    parts, expected = quantizer(torch.randn(48, 64))
    settings = {"quant_method": "auto-round", "bits": 4, "group_size": 32, **settings}
    found = unpacked(source_of(parts, settings)["a.weight"])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("key", ["dynamic", "extra_config"])
@pytest.mark.parametrize(("bits", "group"), [(2, 32), (3, 64), (4, 128), (8, 32)])
def test_single_layers_may_have_widths_of_their_own(bits: int, group: int, key: str) -> None:
    parts, expected = gptq(torch.randn(32, 128), bits, group)
    settings = {**GPTQ, key: {"+:.*": {"bits": bits}}}
    source = source_of(parts, settings)["a.weight"]
    assert source.kind == f"GPTQ {bits}-bit, packed as {8 if bits == 8 else 4} bits"
    torch.testing.assert_close(unpacked(source), expected, rtol=0, atol=2e-6)
    words = rf"'a' has {bits} bits by its shapes; quantization_config says 4, and nothing else"
    with pytest.raises(CheckpointError, match=r"a\.scales' has shape" if bits == 4 else words):
        source_of(parts, GPTQ)


def test_biases_of_zeros_are_left_out(tiny: Tiny, tmp_path: Path) -> None:
    def with_bias(weight: Tensor, value: float = 0.0) -> tuple[dict[str, Tensor], Tensor]:
        parts, expected = gptq(weight)
        return {**parts, "bias": torch.full((len(weight),), value)}, expected

    check(*saved(tiny(), tmp_path / "zeros", GPTQ, with_bias))
    packed, _ = saved(tiny(), tmp_path / "halves", GPTQ, lambda w: with_bias(w, 0.5))
    with pytest.raises(CheckpointError, match=r"unexpected tensor .*bias"):
        LLM(packed)
    check(*saved(tiny("Qwen2"), tmp_path / "own", GPTQ, gptq))  # has biases of its own
