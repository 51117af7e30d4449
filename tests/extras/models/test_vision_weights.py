"""Images for quantized models: a vision part in floats is read as it is, a quantized one as the
floats that it stands for."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import oracle
import pytest
import quantized_files
import safetensors.torch
import torch
import vision_models
from torch import Tensor
from vision_models import picture

from nanollama import LLM, CheckpointError, GenerationRequest

A = picture(40, 23)
TEXT = r"(language_model|^model\.layers).*self_attn\.q_proj\.weight$"
VISION = r"(vision|visual).*(qkv|[qkv]_proj)\.weight$"
MLX_TEXT = "language_model.model."
MLX = {"group_size": 32, "bits": 4}
INT8 = {"weights": {"type": "int", "num_bits": 8, "strategy": "channel", "symmetric": True}}


def fp8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(-1) / 448
    q = (weight / scale[:, None]).to(torch.float8_e4m3fn)
    return {"weight": q, "weight_scale_inv": scale}, q.float() * scale[:, None]


def int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = (weight.abs().amax(-1, keepdim=True) / 127).half()
    q = (weight / scale.float()).round().clamp(-128, 127).to(torch.int8)
    return {"weight": q, "weight_scale": scale}, q * scale.float()


def mlx(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    q, scale, zero = quantized_files.grid(weight, 4, 32)
    words = quantized_files.words(q, 4).view(torch.uint32)
    floats = quantized_files.floats(q, scale, zero, 32)
    return {"weight": words, "scales": scale, "biases": -(scale * zero).half()}, floats


# settings, quantizer, and how far rounding to 8 bits may move the rows of an image
FORMATS: dict[str, tuple[dict[str, Any], quantized_files.Quantizer, float]] = {
    "fp8": ({"quant_method": "fp8"}, fp8, 2e-2),
    "int8": ({"quant_method": "compressed-tensors", "config_groups": {"a": INT8}}, int8, 1e-5),
    "mlx": (MLX, mlx, 2e-3),
    "awq": (
        {**quantized_files.AWQ, "modules_to_not_convert": ["visual"]},
        quantized_files.awq,
        2e-3,
    ),
    "gptq": (quantized_files.GPTQ, quantized_files.gptq, 2e-3),
    "nf4": (quantized_files.NF4, quantized_files.bnb4, 2e-2),
}


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_models.save(tmp_path_factory.mktemp("gemma3"), "gemma3")


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vision_models.save(tmp_path_factory.mktemp("qwen"), "qwen2_5_vl")


def quantized(path: Path, target: Path, form: str, pattern: str) -> tuple[Path, Path]:
    settings, quantizer, _ = FORMATS[form]
    key = "quantization" if form == "mlx" else "quantization_config"
    packed, plain = quantized_files.saved(path, target, settings, quantizer, pattern, key)
    if form == "mlx":
        as_mlx(packed)
    return packed, plain


def as_mlx(path: Path) -> None:
    """Bring a model's tensors under MLX's names, and channels of convolutions to the end."""
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    found = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^(model\.)?visual\.", "vision_tower.", name)
        name = re.sub(r"^model\.(language_model\.|(?=layers|norm|embed))", MLX_TEXT, name)
        name = name.removeprefix("model.")
        found[name] = tensor.movedim(1, -1).contiguous() if tensor.ndim > 3 else tensor
    safetensors.torch.save_file(found, path / "model.safetensors")


def rows(path: Path) -> Tensor:
    found: Tensor = LLM(path, kernels="torch").vision.tower.encode(A.pixels, "an image")[1]
    return found


@pytest.mark.parametrize("form", FORMATS)
def test_the_vision_part_may_be_floats_or_quantized(gemma: Path, tmp_path: Path, form: str) -> None:
    whole, _ = quantized(gemma, tmp_path / "text", form, TEXT)
    torch.testing.assert_close(rows(whole), rows(gemma), rtol=0, atol=0)
    packed, plain = quantized(gemma, tmp_path / "all", form, f"{TEXT}|{VISION}")
    expected = rows(plain)
    assert (expected - rows(gemma)).abs().max() > 1e-3
    bound = FORMATS[form][2] * float(expected.abs().max())
    torch.testing.assert_close(rows(packed), expected, rtol=0, atol=bound)


@pytest.mark.parametrize("form", ["int8", "awq", "gptq", "nf4"])
def test_a_quantized_model_answers_about_an_image(qwen: Path, tmp_path: Path, form: str) -> None:
    """Its vision part is in floats, as in most files."""
    packed, plain = quantized(qwen, tmp_path, form, TEXT)
    check_answers(packed, plain)


def test_a_model_of_quantized_parts_answers_about_an_image(gemma: Path, tmp_path: Path) -> None:
    check_answers(*quantized(gemma, tmp_path, "int8", f"{TEXT}|{VISION}"))


def check_answers(packed: Path, plain: Path) -> None:
    message = {"role": "user", "content": [{"type": "image", "image": A}]}
    request = GenerationRequest(messages=[message], params=oracle.GREEDY)
    answers = [LLM(path, kernels="torch").complete(request) for path in (packed, plain)]
    assert answers[0].token_ids == answers[1].token_ids


def test_names_and_axes_of_mlx(qwen: Path, tmp_path: Path) -> None:
    packed, _ = quantized(qwen, tmp_path / "mlx", "mlx", TEXT)
    torch.testing.assert_close(rows(packed), rows(qwen), rtol=0, atol=0)


def test_a_tensor_of_another_shape_is_named(gemma: Path, tmp_path: Path) -> None:
    """transformers would put random numbers in its place."""
    path = oracle.rewritten(gemma, tmp_path / "model", lambda _: None)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    name = next(name for name in tensors if "patch_embedding.weight" in name)
    tensors[name] = tensors[name][:, :2].clone()
    safetensors.torch.save_file(tensors, path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"patch_embedding.* has another shape"):
        rows(path)
