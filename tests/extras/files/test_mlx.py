"""MLX's quantized weights in safetensors files, packed as mlx.core.quantize documents it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import quantized_files as files
import safetensors.torch
import torch
from oracle import Tiny, rewritten
from quantized_files import IDS, check, saved, sources, unpacked
from torch import Tensor

from nanollama import LLM, CheckpointError, PackedLinear

MLX: dict[str, Any] = {"bits": 4, "group_size": 32, "mode": "affine"}
EVERY = r"(layers\.\d+\..*_proj|embed_tokens|lm_head)\.weight$"


def affine(
    weight: Tensor, bits: int = 4, group: int = 32, dtype: torch.dtype = torch.bfloat16
) -> tuple[dict[str, Tensor], Tensor]:
    x = weight.unflatten(-1, (-1, group))
    low, high = x.aminmax(dim=-1)
    scale, bias = ((high - low) / (2**bits - 1)).to(dtype), low.to(dtype)
    s, b = scale.float().unsqueeze(-1), bias.float().unsqueeze(-1)
    q = ((x - b) / s).round().clamp(0, 2**bits - 1)
    words = files.words(q.flatten(-2), bits).view(torch.uint32)
    return {"weight": words, "scales": scale, "biases": bias}, (q * s + b).flatten(-2)


def source_of(parts: dict[str, Tensor], settings: dict[str, Any]) -> Any:
    return sources(settings, {f"a.{end}": part for end, part in parts.items()})


@pytest.mark.parametrize("key", ["quantization", "quantization_config"])
def test_logits_are_those_of_the_floats(tiny: Tiny, tmp_path: Path, key: str) -> None:
    packed, plain = saved(tiny("Llama"), tmp_path, MLX, affine, EVERY, key)
    check(packed, plain)
    assert LLM(packed).checkpoint.quantization == "MLX 4-bit, packed as 4 bits"


def test_a_tied_table_and_layers_with_settings_of_their_own(tiny: Tiny, tmp_path: Path) -> None:
    down = {f"model.layers.{i}.mlp.down_proj": {"group_size": 32, "bits": 6} for i in (0, 1)}
    packed, plain = saved(
        tiny("Qwen3", tie_word_embeddings=True),
        tmp_path,
        {**MLX, **down, "lm_head": False},
        lambda w: affine(w, 6 if w.shape[1] == 96 else 4),
        EVERY,
    )
    check(packed, plain)


def test_stacked_experts(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny("Qwen3Moe", **files.SIZES["Qwen3Moe"])
    packed, plain = saved(path, tmp_path, MLX, affine)
    tensors = safetensors.torch.load_file(packed / "model.safetensors")
    named = ("gate_proj", "up_proj", "down_proj")
    for layer in (0, 1):
        for part in (f"{name}.{end}" for name in named for end in ("weight", "scales", "biases")):
            prefix = f"model.layers.{layer}.mlp."
            each = [tensors.pop(f"{prefix}experts.{e}.{part}") for e in range(4)]
            tensors[f"{prefix}switch_mlp.{part}"] = torch.stack(each)
    safetensors.torch.save_file(tensors, packed / "model.safetensors")
    check(packed, plain)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("group", [32, 64, 128])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_every_width_is_exact(bits: int, group: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parts, expected = affine(torch.randn(24, 256), bits, group, dtype)
    source = source_of(parts, {**MLX, "bits": bits, "group_size": group})["a.weight"]
    packed = source.load()
    assert isinstance(packed, PackedLinear)
    assert packed.bits == (4 if bits <= 4 else 8)
    torch.testing.assert_close(packed.dequantize(), expected, rtol=0, atol=2e-6)
    rows = torch.tensor([23, 1])
    assert torch.equal(unpacked(source, rows), packed.dequantize()[rows])


LEVELS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


@pytest.mark.parametrize("mode", ["mxfp4", "mxfp8", "nvfp4"])
def test_modes_of_floats_are_exact(mode: str) -> None:
    torch.manual_seed(0)
    group, bits = 16 if mode == "nvfp4" else 32, 8 if mode == "mxfp8" else 4
    scales = torch.randint(120, 130, (8, 64 // group), dtype=torch.uint8)
    values = torch.exp2(scales.float() - 127)
    if mode == "nvfp4":
        scales = torch.rand(8, 4).to(torch.float8_e4m3fn)
        values, scales = scales.float(), scales.view(torch.uint8)
    codes = torch.randint(16, (8, 64))
    numbers = torch.cat((LEVELS, -LEVELS))[codes]
    if mode == "mxfp8":
        numbers = torch.randint(16, 31, (8, 64)) * torch.tensor(1.0)  # of 4 significant bits
        numbers = (numbers // 2 * 2).clamp(16, 30)
        codes = numbers.to(torch.float8_e4m3fn).view(torch.uint8)
    parts = {"weight": files.words(codes, bits).view(torch.uint32), "scales": scales}
    found = source_of(parts, {"bits": bits, "group_size": group, "mode": mode})["a.weight"]
    assert found.kind == f"MLX {mode}, packed as {bits} bits"
    assert torch.equal(unpacked(found), numbers * values.repeat_interleave(group, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a.scales": None}, r"no tensor is named \*.scales"),
        ({"a.biases": None}, "a.biases.* is missing"),
        ({"a.biases": torch.ones(24, 3)}, r"shape \(24, 3\).* asks for \(24, 2\)"),
        ({"a.weight": torch.ones(24, 64)}, "is of type F32; U32 is needed"),
        ({"b.weight": torch.ones(4, 4).to(torch.uint32)}, "b.weight.* has no scales"),
        ({"a.conv1d.weight": torch.ones(8, 4, 1)}, "order of axes"),
    ],
)
def test_files_that_contradict_their_config_are_refused(
    change: dict[str, Any], message: str
) -> None:
    parts, _ = affine(torch.randn(24, 64))
    tensors = {f"a.{end}": part for end, part in parts.items()} | change
    with pytest.raises(CheckpointError, match=message):
        sources(MLX, {name: tensor for name, tensor in tensors.items() if tensor is not None})


def test_another_width_than_the_configs_is_refused() -> None:
    parts, _ = affine(torch.randn(24, 64))
    with pytest.raises(CheckpointError, match=r"'a' has 4 bits by its shapes; .* says 8"):
        source_of(parts, {**MLX, "a": {"bits": 8, "group_size": 32}})


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"bits": 7}, "bits is 7"),
        ({"bits": None}, "bits is None"),
        ({"group_size": 16}, "group_size is 16; 32 or 64 or 128"),
        ({"mode": "mxfp6"}, "mode is 'mxfp6'; affine or mxfp4 or mxfp8 or nvfp4"),
        ({"mode": "nvfp4"}, "group_size is 32; 16 is needed"),
        ({"model.layers.0.mlp.gate": {"bits": 9}}, "bits is 9"),
    ],
)
def test_settings_that_are_not_supported_are_named(change: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        sources({**MLX, **change}, {})


def test_an_error_names_the_directory(tiny: Tiny, tmp_path: Path) -> None:
    path = rewritten(tiny(), tmp_path / "floats", lambda c: c.update(quantization=MLX))
    with pytest.raises(CheckpointError, match=r"floats: quantization_config says MLX, but no"):
        LLM(path)
    assert IDS
