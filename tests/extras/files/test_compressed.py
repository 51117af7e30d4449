"""compressed-tensors in safetensors files, packed by the steps of its compressors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quantized_files as files
import torch
from oracle import Tiny
from quantized_files import check, floats, saved, sources, unpacked
from torch import Tensor

from nanollama import LLM, CheckpointError, PackedLinear


def settings(file_format: str, **weights: Any) -> dict[str, Any]:
    group = {"targets": ["Linear"], "input_activations": None, "weights": weights}
    return {
        "quant_method": "compressed-tensors",
        "format": file_format,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        "quantization_status": "compressed",
    }


W4 = settings("pack-quantized", num_bits=4, type="int", strategy="group", group_size=32)
W8 = settings("int-quantized", num_bits=8, type="int", strategy="channel")
FLOAT = settings("float-quantized", num_bits=8, type="float", strategy="channel")


def pack(
    weight: Tensor,
    bits: int = 4,
    group: int = 32,
    is_symmetric: bool = True,
    order: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Words of numbers, each plus 2^(bits - 1); zeros are packed along the rows."""
    pick = files.centred if is_symmetric else files.grid
    order = torch.arange(weight.shape[1]) if order is None else order
    q, scale, zero = pick(weight[:, order], bits, group)
    inverse = order.argsort()
    parts = {
        "weight_packed": files.words(q[:, inverse], bits),
        "weight_scale": scale.bfloat16(),
        "weight_shape": torch.tensor(weight.shape),
    }
    if not is_symmetric:
        parts["weight_zero_point"] = files.words(zero.T, bits).T
    if not torch.equal(order, inverse):
        parts["weight_g_idx"] = (torch.arange(weight.shape[1]) // group)[inverse].int()
    return parts, floats(q, scale.bfloat16(), zero, group)[:, inverse]


def int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
    q = (weight / scale.float()).round().clamp(-128, 127)
    return {"weight": q.to(torch.int8), "weight_scale": scale}, q * scale.float()


def float8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = (weight.abs().amax(1, keepdim=True) / 448).bfloat16()
    q = (weight / scale.float()).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale": scale}, q.float() * scale.float()


def source_of(parts: dict[str, Tensor], config: dict[str, Any]) -> Any:
    return sources(config, {f"a.{end}": part for end, part in parts.items()})


@pytest.mark.parametrize(
    ("name", "config", "quantizer", "bound", "title"),
    [
        ("Llama", W4, pack, 1e-5, "compressed-tensors 4-bit, packed as 4 bits"),
        ("Qwen3Moe", W4, pack, 1e-5, "compressed-tensors 4-bit, packed as 4 bits"),
        ("Qwen3", W8, int8, 1e-5, "compressed-tensors 8-bit, packed as 8 bits"),
        ("Qwen3", FLOAT, float8, 0.04, "FP8, packed as 8 bits"),
    ],
)
def test_logits_are_those_of_the_floats(
    tiny: Tiny,
    tmp_path: Path,
    name: str,
    config: dict[str, Any],
    quantizer: files.Quantizer,
    bound: float,
    title: str,
) -> None:
    packed, plain = saved(tiny(name, **files.SIZES.get(name, {})), tmp_path, config, quantizer)
    check(packed, plain, bound)
    assert LLM(packed).checkpoint.quantization == title


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_words_are_exact(bits: int, group: int, is_symmetric: bool) -> None:
    torch.manual_seed(0)
    parts, expected = pack(torch.randn(24, 256), bits, group, is_symmetric)
    weights = {"num_bits": bits, "strategy": "group", "group_size": group}
    config = settings("pack-quantized", **weights, symmetric=is_symmetric)
    source = source_of(parts, config)["a.weight"]
    packed = source.load()
    assert isinstance(packed, PackedLinear)
    assert (packed.bits, packed.offset is None) == (bits, is_symmetric)
    torch.testing.assert_close(packed.dequantize(), expected, rtol=0, atol=2e-6)
    for rows in (torch.tensor([23, 1]), slice(8, 16)):
        assert torch.equal(unpacked(source, rows), packed.dequantize()[rows])


def test_columns_in_another_order_are_rounded_to_8_bits() -> None:
    torch.manual_seed(0)
    parts, expected = pack(torch.randn(32, 128), order=torch.randperm(128))
    packed = source_of(parts, W4)["a.weight"].load()
    assert isinstance(packed, PackedLinear)
    assert packed.bits == 8
    assert (packed.dequantize() - expected).norm() < 0.006 * expected.norm()


def test_groups_of_a_config_may_have_widths_of_their_own() -> None:
    config = {**W4, "config_groups": dict(W4["config_groups"])}
    wide = settings("x", num_bits=8, strategy="group", group_size=32)["config_groups"]["group_0"]
    config["config_groups"]["group_1"] = {**wide, "targets": ["re:.*down_proj"]}
    for bits in (4, 8):
        parts, expected = pack(torch.randn(24, 64), bits)
        found = unpacked(source_of(parts, config)["a.weight"])
        torch.testing.assert_close(found, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": None}, r"no tensor is named \*.weight_scale"),
        ({"weight_scale": torch.ones(24, 1)}, r"shape \(24, 1\).* asks for \(24, 2\)"),
        ({"weight_packed": None}, "is of no kind in"),
        ({"weight_packed": torch.ones(24, 8)}, "is of type F32; I32 is needed"),
        ({"weight_g_idx": torch.ones(3, dtype=torch.int32)}, r"shape \(3,\)"),
    ],
)
def test_files_that_contradict_their_config_are_refused(
    change: dict[str, Any], message: str
) -> None:
    parts, _ = pack(torch.randn(24, 64))
    given = {end: part for end, part in {**parts, **change}.items() if part is not None}
    with pytest.raises(CheckpointError, match=message):
        source_of(given, W4)


def test_missing_zero_points_are_refused() -> None:
    parts, _ = pack(torch.randn(24, 64))
    config = settings(
        "pack-quantized", num_bits=4, strategy="group", group_size=32, symmetric=False
    )
    with pytest.raises(CheckpointError, match=r"a\.weight_zero_point.* is missing"):
        source_of(parts, config)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({**W4, "format": "marlin-24"}, "format is 'marlin-24'"),
        ({**W4, "config_groups": {}}, "config_groups is {}"),
        ({**W4, "config_groups": {"group_0": {"weights": None}}}, "group_0 is {'weights'"),
        (settings("x", num_bits=4), "format is 'x'"),
        (settings("pack-quantized", num_bits=3), "num_bits is 3"),
        (settings("float-quantized", num_bits=4, type="float"), "strategy is None"),
        (settings("pack-quantized", num_bits=4, strategy="group", group_size=8), "group_size is 8"),
        (settings("pack-quantized", num_bits=4, strategy="block"), "strategy block of int"),
    ],
)
def test_settings_that_are_not_supported_are_named(config: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        sources(config, {})
