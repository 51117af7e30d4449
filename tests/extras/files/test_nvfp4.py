"""NVFP4 in safetensors files, as ModelOpt and compressed-tensors write it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Tiny
from quantized_files import SIZES, check, saved, sources, unpacked
from torch import Tensor

from nanollama import LLM, CheckpointError
from nanollama_extras.kernels.native import NativeLinear

MODELOPT: dict[str, Any] = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
WEIGHTS = {"num_bits": 4, "type": "float", "strategy": "tensor_group", "group_size": 16}
MIXED = {**MODELOPT, "quant_algo": "MIXED_PRECISION"}
COMPRESSED: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "nvfp4-pack-quantized",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": WEIGHTS}},
}
LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
VALUES = torch.cat((LEVELS, -LEVELS))


def nvfp4(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    whole = weight.abs().amax() / (6 * 448)
    x = weight.unflatten(-1, (-1, 16))
    scale = (x.abs().amax(-1) / 6 / whole).to(torch.float8_e4m3fn)
    unit = scale.float().unsqueeze(-1) * whole
    codes = ((x / unit).unsqueeze(-1) - VALUES).abs().argmin(-1)
    pairs = codes.flatten(-2).to(torch.uint8)
    parts = {"weight": pairs[:, ::2] | pairs[:, 1::2] << 4, "weight_scale": scale}
    parts |= {"weight_scale_2": whole, "input_scale": torch.ones(())}
    return parts, (VALUES[codes] * unit).flatten(-2)


def compressed(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    parts, expected = nvfp4(weight)
    whole = (1 / parts["weight_scale_2"]).view(1)
    packed = {"weight_packed": parts["weight"], "weight_scale": parts["weight_scale"]}
    return {**packed, "weight_global_scale": whole, "input_global_scale": whole + 1}, expected


def float8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax() / 448
    q = (weight / scale).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale": scale, "input_scale": scale + 1}, q.float() * scale


@pytest.mark.parametrize(
    ("name", "settings", "quantizer", "bound", "title"),
    [
        ("Llama", MODELOPT, nvfp4, 1e-5, "NVFP4, packed as 4 bits"),
        ("Qwen3Moe", MODELOPT, nvfp4, 1e-5, "NVFP4, packed as 4 bits"),
        ("Qwen3", COMPRESSED, compressed, 1e-5, "NVFP4, packed as 4 bits"),
        ("Llama", {**MODELOPT, "quant_algo": "FP8"}, float8, 0.04, "FP8, packed as 8 bits"),
        ("Llama", MIXED, lambda w: (nvfp4 if w.shape[1] == 96 else float8)(w), 0.04, "FP8, .*"),
    ],
)
def test_logits_are_those_of_the_floats(
    tiny: Tiny, tmp_path: Path, name: str, settings: Any, quantizer: Any, bound: float, title: str
) -> None:
    packed, plain = saved(tiny(name, **SIZES.get(name, {})), tmp_path, settings, quantizer)
    check(packed, plain, bound)
    assert re.fullmatch(title, LLM(packed).checkpoint.quantization)


def test_modelopt_s_own_file_names_the_format(tiny: Tiny, tmp_path: Path) -> None:
    packed, plain = saved(tiny(), tmp_path, MODELOPT, nvfp4)
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (packed / "config.json").write_text(json.dumps(config))
    quantization = {"quant_algo": "NVFP4", "group_size": 16, "exclude_modules": ["lm_head"]}
    own = {"producer": {"name": "modelopt"}, "quantization": quantization}
    (packed / "hf_quant_config.json").write_text(json.dumps(own))
    check(packed, plain)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight_scale": None}, r"no tensor is named \*.weight_scale"),
        ({"weight_scale_2": None}, r"a.weight_scale_2.* is missing"),
        ({"weight_scale": torch.ones(8, 4)}, "is of type F32; F8_E4M3 is needed"),
        ({"weight": torch.ones(8, 36).byte()}, "has 72 columns"),
        ({"weight": torch.ones(8, 64).byte()}, r"asks for \(8, 8\)"),
    ],
)
def test_files_that_contradict_their_config_are_refused(
    change: dict[str, Any], message: str
) -> None:
    parts = {**nvfp4(torch.randn(8, 64))[0], **change}
    tensors = {f"a.{end}": part for end, part in parts.items() if part is not None}
    with pytest.raises(CheckpointError, match=message):
        sources(MODELOPT, tensors)


def test_rows_are_those_of_the_matrix_and_other_algorithms_are_named() -> None:
    parts, expected = nvfp4(torch.randn(8, 64))
    source = sources(MODELOPT, {f"a.{end}": part for end, part in parts.items()})["a.weight"]
    torch.testing.assert_close(unpacked(source, torch.tensor([7, 2])), expected[[7, 2]])
    with pytest.raises(
        CheckpointError, match="quant_algo is 'W4A8_AWQ'; NVFP4 or MIXED_PRECISION or FP8"
    ):
        sources({**MODELOPT, "quant_algo": "W4A8_AWQ"}, {})


@pytest.mark.parametrize(("num_cols", "bits"), [(128, 4.5), (96, 9)])
def test_weights_take_the_bits_of_the_file(num_cols: int, bits: float) -> None:
    """Scales may have a sign."""
    parts, expected = nvfp4(torch.randn(16, num_cols))
    parts["weight_scale"] = (-parts["weight_scale"].float()).to(torch.float8_e4m3fn)
    source = sources(MODELOPT, {f"a.{end}": part for end, part in parts.items()})["a.weight"]
    torch.testing.assert_close(unpacked(source), -expected)
    held: Any = NativeLinear(source.shape, source.load, None)
    torch.testing.assert_close(held.dequantize(), -expected, rtol=1e-3, atol=1e-6)
    assert 8 * held.nbytes == bits * expected.numel() == source.bits * expected.numel()
