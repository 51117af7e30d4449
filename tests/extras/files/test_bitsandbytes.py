"""bitsandbytes in safetensors files: nf4, fp4 and int8, packed as its QuantState documents it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import quantized_files as files
import torch
from oracle import Tiny
from quantized_files import MAPS, NF4, bnb4, check, saved, sources, unpacked
from torch import Tensor

from nanollama import LLM, CheckpointError, PackedLinear
from nanollama_extras.files.bitsandbytes import integer_levels

FP4 = {**NF4, "bnb_4bit_quant_type": "fp4"}
INT8 = {**NF4, "load_in_4bit": False, "load_in_8bit": True}


def int8(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    scale = weight.abs().amax(1)
    q = (weight * 127 / scale.unsqueeze(1)).round()
    kind = torch.zeros((), dtype=torch.uint8)
    parts = {"weight": q.to(torch.int8), "SCB": scale, "weight_format": kind}
    return parts, q * scale.unsqueeze(1) / 127


def source_of(parts: dict[str, Tensor | None], settings: dict[str, Any]) -> Any:
    return sources(settings, {f"a.{end}": t for end, t in parts.items() if t is not None})


@pytest.mark.parametrize(
    ("name", "settings", "quantizer", "bound", "title"),
    [
        ("Llama", NF4, bnb4, 0.05, "bitsandbytes nf4, packed as 4 bits"),
        ("Qwen3Moe", NF4, bnb4, 0.2, "bitsandbytes nf4, packed as 4 bits"),
        ("Llama", FP4, lambda w: bnb4(w, "fp4"), 0.05, "bitsandbytes fp4, packed as 4 bits"),
        ("Qwen3", INT8, int8, 1e-5, "LLM.int8, packed as 8 bits"),
    ],
)
def test_logits_are_those_of_the_floats(
    tiny: Tiny, tmp_path: Path, name: str, settings: Any, quantizer: Any, bound: float, title: str
) -> None:
    path = tiny(name, **files.SIZES.get(name, {}))
    packed, plain = saved(path, tmp_path, settings, quantizer)
    check(packed, plain, bound)
    assert LLM(packed).checkpoint.quantization == title


@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("is_double", [True, False])
@pytest.mark.parametrize("block", [32, 64, 256])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_numbers_are_rounded_to_8_bits(
    kind: str, block: int, is_double: bool, storage: torch.dtype
) -> None:
    torch.manual_seed(0)
    parts, expected = bnb4(torch.randn(48, 96), kind, block, is_double, storage)
    source = source_of(parts, NF4 if kind == "nf4" else FP4)["a.weight"]
    packed = source.load()
    assert isinstance(packed, PackedLinear)
    assert source.shape == packed.shape == (48, 96)
    assert 8 * packed.nbytes == 4.5 * 48 * 96
    assert (packed.dequantize() - expected).norm() < 0.007 * expected.norm()
    for rows in (slice(16, 24), slice(47, 48), torch.tensor([40, 3, 3])):
        assert torch.equal(unpacked(source, rows), packed.dequantize()[rows])


def test_columns_that_32_does_not_divide_become_floats() -> None:
    for weight, block in ((torch.randn(7, 36), 64), (torch.randn(8, 64), 16)):
        parts, expected = bnb4(weight, block=block)
        source = source_of(parts, NF4)["a.weight"]
        assert (source.is_packed, source.kind) == (False, "bitsandbytes nf4, unpacked")
        torch.testing.assert_close(unpacked(source), expected)
        torch.testing.assert_close(unpacked(source, slice(3, 6)), expected[3:6])


def test_integer_levels_are_as_near_as_8_bits_allow() -> None:
    for kind, bound in (("nf4", 0.00332), ("fp4", 0.00227)):
        values = torch.tensor(MAPS[kind])
        q, unit = integer_levels(values)
        assert (q * unit - values).norm() <= bound * values.norm()
    assert integer_levels(torch.zeros(16))[0].tolist() == [0] * 16


STATE = "weight.quant_state.bitsandbytes__nf4"


def state(**changes: Any) -> Tensor:
    values = {"blocksize": 64, "shape": [24, 64], "nested_blocksize": 256, "nested_offset": 0.5}
    data = json.dumps({**values, **changes}).encode()
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({STATE: None}, r"says bitsandbytes nf4, but no tensor is named \*\.weight\.quant_state"),
        ({"weight.quant_map": None}, "a.weight.quant_map.* is missing"),
        ({"weight.nested_absmax": None}, "a.weight.nested_absmax.* is missing"),
        ({"weight.absmax": torch.ones(24)}, "absmax.* is of type F32; U8 is needed"),
        ({"weight.absmax": torch.ones(25).byte()}, r"shape \(25,\).* asks for \(24,\)"),
        ({"weight": torch.ones(24, 32).byte()}, r"shape \(24, 32\)"),
        ({STATE: state(shape=[24, 128])}, "has 768 bytes; the shape .* asks for 1536"),
        ({STATE: state(shape=[24])}, "shape, blocksize and"),
        ({STATE: state(blocksize=0)}, "shape, blocksize and"),
        ({STATE: state(nested_offset=float("inf"))}, "shape, blocksize and"),
        ({STATE: torch.ones(9).byte()}, "holds None; shape"),
        ({STATE.replace("nf4", "fp4"): state()}, "contradicts quantization_config, which says nf4"),
        ({"../b.weight": torch.ones(9, 1).byte()}, r"b.weight' of type U8 has no \.quant_state"),
    ],
)
def test_files_that_contradict_their_config_are_refused(
    change: dict[str, Any], message: str
) -> None:
    parts, _ = bnb4(torch.randn(24, 64))
    with pytest.raises(CheckpointError, match=message):
        source_of({**parts, **change}, NF4)


def test_integers_without_their_factors_are_refused() -> None:
    parts, _ = int8(torch.randn(24, 64))
    with pytest.raises(CheckpointError, match=r"shape \(2,\).* asks for \(24,\)"):
        source_of({**parts, "SCB": torch.ones(2)}, INT8)
    with pytest.raises(CheckpointError, match=r"b.weight' of type I8 has no \.SCB"):
        source_of({**parts, "../b.weight": parts["weight"]}, INT8)


def test_settings_that_are_not_supported_are_named() -> None:
    for change, named in (
        ({"load_in_8bit": True}, "load_in_4bit is True; 4 or 8 bits, not both"),
        ({"load_in_4bit": False}, "load_in_4bit is False; 4 or 8 bits"),
        ({"bnb_4bit_quant_type": "int4"}, "bnb_4bit_quant_type is 'int4'; nf4 or fp4"),
    ):
        with pytest.raises(CheckpointError, match=named):
            sources({**NF4, **change}, {})
