"""torchao in safetensors files, taken apart as its flatten_tensor_state_dict does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Tiny
from quantized_files import check, saved, sources, unpacked
from torch import Tensor

from nanollama import LLM, CheckpointError, PackedLinear


def settings(name: str, dtype: str | None = None) -> dict[str, Any]:
    data = {"weight_dtype": {"_type": "torch.dtype", "_data": dtype}} if dtype else {}
    kind = {"default": {"_type": name, "_version": 1, "_data": data}}
    return {"quant_method": "torchao", "quant_type": kind, "modules_to_not_convert": None}


INT8 = settings("Int8WeightOnlyConfig")
INT4 = settings("Int4WeightOnlyConfig")
INTX4 = settings("IntxWeightOnlyConfig", "int4")


def intx(
    weight: Tensor, bits: int = 4, group: int = 32, is_symmetric: bool = True
) -> tuple[dict[str, Tensor], Tensor]:
    """Int8Tensor and IntxUnpackedToInt8Tensor: (q - zero_point) * scale"""
    x = weight.unflatten(-1, (-1, group))
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    least, most = x.aminmax(dim=-1, keepdim=True)
    if is_symmetric:
        scale, zero = torch.maximum(most, -least) / high, torch.zeros_like(most)
    else:
        scale = (most - least) / (high - low)
        zero = (low - least / scale).round().clamp(low, high)
    q = (x / scale + zero).round().clamp(low, high)
    parts = {"qdata": q.flatten(1).to(torch.int8), "scale": scale.squeeze(-1)}
    parts["zero_point"] = zero.squeeze(-1).to(torch.int8)
    return {f"_weight_{end}": part for end, part in parts.items()}, ((q - zero) * scale).flatten(1)


def int4(weight: Tensor, group: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    """Int4Tensor: q * scale + zero_point, where the zero_point is the middle of a group"""
    x = weight.unflatten(-1, (-1, group))
    least, most = x.aminmax(dim=-1, keepdim=True)
    scale = ((most - least) / 15).bfloat16().float()
    zero = (least + 8 * scale).bfloat16().float()
    q = ((x - zero) / scale).round().clamp(-8, 7)
    nibbles = (q.flatten(1).int() & 15).to(torch.uint8)
    parts = {"qdata": nibbles[:, ::2] | nibbles[:, 1::2] << 4}
    parts |= {"scale": scale.squeeze(-1).T.bfloat16(), "zero_point": zero.squeeze(-1).T.bfloat16()}
    return {f"_weight_{end}": part for end, part in parts.items()}, (q * scale + zero).flatten(1)


def float8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    q = (weight / scale).to(torch.float8_e4m3fn)
    return {"_weight_qdata": q, "_weight_scale": scale}, q.float() * scale


def source_of(parts: dict[str, Tensor | None], config: dict[str, Any]) -> Any:
    return sources(
        config, {f"a.{end}": t.contiguous() for end, t in parts.items() if t is not None}
    )


@pytest.mark.parametrize(
    ("config", "quantizer", "bound", "title"),
    [
        (INT8, lambda w: intx(w, 8, w.shape[1]), 1e-5, "torchao int8, packed as 8 bits"),
        (INTX4, intx, 1e-5, "torchao int4, packed as 4 bits"),
        (INT4, int4, 1e-5, "torchao int4, packed as 4 bits"),
        (settings("Float8WeightOnlyConfig"), float8, 0.04, "FP8, packed as 8 bits"),
    ],
)
def test_logits_are_those_of_the_floats(
    tiny: Tiny, tmp_path: Path, config: Any, quantizer: Any, bound: float, title: str
) -> None:
    packed, plain = saved(tiny("Qwen3"), tmp_path, config, quantizer)
    check(packed, plain, bound)
    assert LLM(packed).checkpoint.quantization == title


@pytest.mark.parametrize("is_symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_integers_are_exact(bits: int, group: int, is_symmetric: bool) -> None:
    torch.manual_seed(0)
    parts, expected = intx(torch.randn(24, 256), bits, group, is_symmetric)
    source = source_of(parts, settings("IntxWeightOnlyConfig", f"int{bits}"))["a.weight"]
    packed = source.load()
    assert isinstance(packed, PackedLinear)
    assert (packed.bits, packed.offset is None) == (8 if bits == 8 else 4, is_symmetric)
    torch.testing.assert_close(packed.dequantize(), expected, rtol=0, atol=4e-6)
    for rows in (torch.tensor([23, 1]), slice(8, 16)):
        assert torch.equal(unpacked(source, rows), packed.dequantize()[rows])


def test_int4_is_exact() -> None:
    torch.manual_seed(0)
    parts, expected = int4(torch.randn(24, 256), 64)
    source = source_of(parts, INT4)["a.weight"]
    torch.testing.assert_close(unpacked(source), expected, rtol=0, atol=4e-6)
    torch.testing.assert_close(unpacked(source, slice(8, 16)), expected[8:16], rtol=0, atol=4e-6)


def test_one_scale_for_all_and_narrow_groups() -> None:
    torch.manual_seed(0)
    parts, expected = intx(torch.randn(1, 24 * 64), 8, 24 * 64)
    parts["_weight_qdata"] = parts["_weight_qdata"].view(24, 64)
    found = source_of(parts, INT8)["a.weight"].load()
    torch.testing.assert_close(found.dequantize(), expected.view(24, 64), rtol=0, atol=4e-6)
    parts, expected = intx(torch.randn(24, 64), 8, 16)
    found = source_of(parts, INT8)["a.weight"].load()
    assert (found.dequantize() - expected).norm() < 0.006 * expected.norm()
    parts, expected = intx(torch.randn(24, 40), 8, 40)
    assert torch.equal(source_of(parts, INT8)["a.weight"].load(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"_weight_qdata": None}, r"says torchao, but no tensor is named \*\._weight_qdata"),
        ({"_weight_scale": None}, "a._weight_scale.* is missing"),
        ({"_weight_scale": torch.ones(24, 3)}, r"shape \(24, 3\), which does not divide"),
        ({"_weight_scale": torch.ones(24)}, r"shape \(24,\)"),
        ({"_weight_zero_point": torch.ones(24, 1)}, r"shape \(24, 1\).* asks for \(24, 2\)"),
        ({"_weight_qdata": torch.ones(24, 64)}, "is of type F32; I8 is needed"),
        ({"_weight_act_pre_scale": torch.ones(64)}, "scaled activations, which is not supported"),
        ({"_weight_scale_and_zero": torch.ones(2, 24, 2)}, "layout for CUDA"),
    ],
)
def test_files_that_are_not_supported_are_refused(change: dict[str, Any], message: str) -> None:
    parts, _ = intx(torch.randn(24, 64))
    with pytest.raises(CheckpointError, match=message):
        source_of({**parts, **change}, INTX4)
    parts, _ = int4(torch.randn(24, 64))
    with pytest.raises(CheckpointError, match=r"shapes \(3, 24\) and \(2, 24\)"):
        source_of({**parts, "_weight_scale": torch.ones(3, 24)}, INT4)


def test_numbers_beyond_the_config_s_width_are_refused() -> None:
    parts, _ = intx(torch.randn(24, 64), 8)
    with pytest.raises(CheckpointError, match="says 4 bits, but numbers go beyond"):
        source_of(parts, INTX4)["a.weight"].load()
