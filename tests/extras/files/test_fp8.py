"""FP8 in safetensors files: blocks, rows and matrices that share a scale."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import Tiny
from quantized_files import SIZES, check, saved, sources, unpacked
from torch import Tensor
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from nanollama import LLM, CheckpointError, PackedLinear

FP8: dict[str, Any] = {"quant_method": "fp8", "activation_scheme": "dynamic"}
BLOCKS = {**FP8, "weight_block_size": [32, 32], "modules_to_not_convert": ["lm_head"]}


def blocks(weight: Tensor, ends: str = "weight_scale_inv") -> tuple[dict[str, Tensor], Tensor]:
    """An FP8 weight with a scale for each block of 32 x 32, unpacked by transformers."""
    rows, cols = weight.shape
    tiles = weight.view(rows // 32, 32, cols // 32, 32)
    scale = tiles.abs().amax((1, 3)) / 448
    q = (tiles / scale[:, None, :, None]).view(rows, cols).to(torch.float8_e4m3fn)
    dequantized = Fp8Dequantize(None)._dequantize_one(q, scale, torch.float32)
    return {"weight": q, ends: scale}, dequantized


def channels(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(1, keepdim=True) / 448
    q = (weight / scale).to(torch.float8_e4m3fn)
    extra = {"input_scale_ub": torch.ones(1)}
    return {"weight": q, "weight_scale": scale, **extra}, q.float() * scale


def whole(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax() / 448
    q = (weight / scale).to(torch.float8_e4m3fn)
    return {
        "weight": q,
        "weight_scale_inv": scale.bfloat16(),
        "activation_scale": torch.ones(()),
    }, q.float() * scale.bfloat16().float()


@pytest.mark.parametrize("name", ["Llama", "Qwen3", "Qwen3Moe"])
def test_logits_are_those_of_the_floats(tiny: Tiny, tmp_path: Path, name: str) -> None:
    packed, plain = saved(tiny(name, **SIZES.get(name, {})), tmp_path, BLOCKS, blocks)
    check(packed, plain, bound=0.04)
    assert LLM(packed).checkpoint.quantization == "FP8, packed as 8 bits"


@pytest.mark.parametrize(
    ("quantizer", "settings"),
    [(channels, {"quant_method": "fbgemm_fp8", "activation_scale_ub": 1200.0}), (whole, FP8)],
)
def test_scales_of_rows_and_of_matrices(
    tiny: Tiny, tmp_path: Path, quantizer: Any, settings: dict[str, Any]
) -> None:
    check(*saved(tiny(), tmp_path, settings, quantizer), bound=0.04)


def test_numbers_near_a_groups_largest_are_exact_and_others_near() -> None:
    torch.manual_seed(0)
    parts, expected = blocks(torch.randn(64, 96))
    found = unpacked(sources(BLOCKS, {f"a.{end}": part for end, part in parts.items()})["a.weight"])
    groups, theirs = found.unflatten(-1, (-1, 32)), expected.unflatten(-1, (-1, 32))
    largest = theirs.abs().amax(-1, keepdim=True)
    is_large = theirs.abs() >= largest / 8
    assert torch.equal(groups[is_large], theirs[is_large])
    assert is_large.float().mean() > 0.6
    assert ((groups - theirs).abs() <= largest / 127).all()
    assert (groups - theirs).norm() < 0.005 * theirs.norm()


@pytest.mark.parametrize("block", [[24, 64], [128, 128], [40, 16]])
def test_blocks_that_do_not_divide_the_matrix(block: list[int]) -> None:
    torch.manual_seed(0)
    shape = -(-50 // block[0]), -(-96 // block[1])
    scale, weight = torch.rand(shape) + 0.5, torch.randn(50, 96).to(torch.float8_e4m3fn)
    tensors = {"a.weight": weight, "a.weight_scale_inv": scale}
    source = sources({**FP8, "weight_block_size": block}, tensors)["a.weight"]
    wide = scale.repeat_interleave(block[0], 0)[:50].repeat_interleave(block[1], 1)[:, :96]
    expected = weight.float() * wide
    assert (unpacked(source) - expected).abs().max() < 0.01 * expected.abs().max()
    rows = torch.tensor([49, 3, 3])
    assert torch.equal(unpacked(source, rows), unpacked(source)[rows])
    assert torch.equal(unpacked(source, slice(16, 32)), unpacked(source)[16:32])


def test_stacked_experts_and_exponents_as_scales() -> None:
    torch.manual_seed(0)
    weight = torch.randn(3, 64, 96).to(torch.float8_e4m3fn)
    scale = torch.tensor([0.5, 1.0, 2.0]).view(3, 1, 1).to(torch.float8_e8m0fnu)
    tensors = {"mlp.experts.down_proj.weight": weight}
    tensors["mlp.experts.down_proj_scale_inv"] = scale
    settings = {**FP8, "weight_block_size": [128, 128]}
    source = sources(settings, tensors)["mlp.experts.down_proj.weight"]
    rows = torch.arange(8, 24)
    packed = source.load(2, rows)
    assert isinstance(packed, PackedLinear)
    expected = weight[2, 8:24].float() * 2
    assert (packed.dequantize() - expected).norm() < 0.005 * expected.norm()


def test_columns_that_32_does_not_divide_become_floats() -> None:
    weight = torch.randn(8, 40).to(torch.float8_e4m3fn)
    tensors = {"a.weight": weight, "a.weight_scale_inv": torch.full((), 0.25)}
    source = sources(FP8, tensors)["a.weight"]
    assert (source.is_packed, source.kind) == (False, "FP8, unpacked")
    assert torch.equal(unpacked(source), weight.float() / 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.weight_scale_inv": torch.ones(2, 2)}, r"shape \(2, 2\).* asks for \(2, 3\)"),
        ({"a.weight_scale_inv": torch.ones((), dtype=torch.int32)}, "is of type I32"),
        ({"a.weight_scale_inv": None}, r"no tensor is named \*\.weight_scale_inv"),
        ({"b.weight": torch.ones(2, 2).to(torch.float8_e4m3fn)}, "b.weight.* has no scale"),
        ({"a.weight": torch.ones(64, 96)}, "a.weight.* is of type F32; F8_E4M3 is needed"),
        ({"a.weight": None}, "a.weight.* is missing"),
    ],
)
def test_files_that_contradict_their_config_are_refused(
    change: dict[str, Any], message: str
) -> None:
    tensors = {"a.weight": torch.ones(64, 96).to(torch.float8_e4m3fn)}
    tensors |= {"a.weight_scale_inv": torch.ones(2, 3), **change}
    with pytest.raises(CheckpointError, match=message):
        sources(BLOCKS, {name: t for name, t in tensors.items() if t is not None})


@pytest.mark.parametrize(
    "change",
    [
        {"weight_block_size": [128]},
        {"weight_block_size": [0, 128]},
        {"weight_block_size": "128"},
        {"expert_dtype": "fp4"},
        {"fmt": "e5m2"},
    ],
)
def test_settings_that_are_not_supported_are_named(change: dict[str, Any]) -> None:
    (key,) = change
    with pytest.raises(CheckpointError, match=re.escape(f"quantization_config: {key} is ")):
        sources({**FP8, **change}, {})


def test_numbers_and_scales_that_are_not_finite_are_refused() -> None:
    weight = torch.ones(4, 32)
    for value, scale in ((float("nan"), 1.0), (1.0, float("inf"))):
        tensors = {"a.weight": (weight * value).to(torch.float8_e4m3fn)}
        source = sources(FP8, {**tensors, "a.weight_scale_inv": torch.tensor(scale)})["a.weight"]
        with pytest.raises(CheckpointError, match="NaN"):
            source.load()
