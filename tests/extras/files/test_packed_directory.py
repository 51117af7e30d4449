"""Packed directories: read back by nanollama, and by compressed-tensors' own formula."""

from __future__ import annotations

import json
from pathlib import Path

import oracle
import pytest
import safetensors.torch
import torch
import transformers
from families import ALL
from oracle import Tiny

from nanollama import LLM, CheckpointError, open_checkpoint
from nanollama_extras.files.conversion import Plan
from nanollama_extras.files.packed_directory import convert_to_directory


def converted(path: Path, target: Path, quantize: str | None, **plan: object) -> Path:
    convert_to_directory(Plan(open_checkpoint(path), quantize, **plan), target)  # type: ignore[arg-type]
    return target


def unpacked(tensors: dict[str, torch.Tensor], name: str, bits: int) -> torch.Tensor:
    """(q - middle) * scale, with codes in words, the first lowest, as compressed-tensors' README
    has it"""
    words, scale = tensors[f"{name}_packed"], tensors[f"{name}_scale"].float()
    shifts = torch.arange(0, 32, bits)
    q = (words.unsqueeze(-1) >> shifts & (2**bits - 1)).flatten(1)
    assert list(q.shape) == tensors[f"{name}_shape"].tolist()
    return (q - 2 ** (bits - 1)) * scale.repeat_interleave(32, dim=1)


@pytest.mark.parametrize(("quantize", "bits", "most"), [("q4", 4, 0.1), ("q8", 8, 0.007)])
def test_matrices_of_layers_are_packed_and_near_the_original(
    tiny: Tiny, tmp_path: Path, quantize: str, bits: int, most: float
) -> None:
    path = tiny()
    target = converted(path, tmp_path / "packed", quantize)
    before, after = (safetensors.torch.load_file(p / "model.safetensors") for p in (path, target))
    for name, weight in before.items():
        if name.endswith("_proj.weight"):
            assert (unpacked(after, name, bits) - weight).norm() < most * weight.norm()
        else:
            assert torch.equal(after[name], weight)
    config = transformers.AutoConfig.from_pretrained(target)
    assert config.quantization_config["format"] == "pack-quantized"
    assert config.quantization_config["ignore"] == ["lm_head"]


def test_nanollama_reads_what_it_packed(tiny: Tiny, tmp_path: Path) -> None:
    for variant in ("qwen2", "qwen3_moe", "phi3"):
        name, overrides = ALL[variant]
        path, ids = tiny(name, **overrides), oracle.random_ids(30)
        target = converted(path, tmp_path / variant, "q8")
        one, two = (LLM(source, kernels="torch") for source in (path, target))
        expected = one.logits(ids)
        assert (two.logits(ids) - expected).std() < 0.15 * expected.std()
        assert two.encode("the quick brown fox") == one.encode("the quick brown fox")


@pytest.mark.parametrize("quantize", ["F16", "BF16", None])
def test_floats_of_another_type(tiny: Tiny, tmp_path: Path, quantize: str | None) -> None:
    target = converted(tiny(), tmp_path / "model", quantize)
    for tensor in safetensors.torch.load_file(target / "model.safetensors").values():
        assert str(tensor.dtype)[6:] == {"F16": "float16", "BF16": "bfloat16"}.get(
            str(quantize), "float32"
        )
    assert LLM(target).logits([1, 2, 3]).isfinite().all()


def test_importance_counts(tiny: Tiny, tmp_path: Path) -> None:
    from nanollama_extras.files import conversion

    plan = conversion.weighted(Plan(open_checkpoint(tiny()), "q4"), "the quick brown fox " * 30, 2)
    written = convert_to_directory(plan, tmp_path / "packed")
    assert 0 < written.gain.with_weights < written.gain.without


def test_what_no_directory_is_made_of(tiny: Tiny, tmp_path: Path) -> None:
    packed = converted(tiny(), tmp_path / "packed", "q4")
    with pytest.raises(CheckpointError, match="quantized already"):
        converted(packed, tmp_path / "again", "q4")
    with pytest.raises(CheckpointError, match="type of GGUF files"):
        converted(tiny(), tmp_path / "k", "Q4_K_M")
    assert json.loads((packed / "config.json").read_text())["quantization_config"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["packed"]
