"""Which format a config describes; configs and tensors of any shape; what `show` says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Tiny
from quantized_files import saved, sources
from test_mlx import MLX, affine

import nanollama
from nanollama import Backend, CheckpointError, EngineConfig, open_checkpoint
from nanollama_extras.commands.details import weight_bytes
from nanollama_extras.files.quantized import METHODS, read_config, unpacked_bits

ROOT = Path(__file__).parents[3]
KEYS = (
    "quant_method bits group_size version zero_point sym desc_act checkpoint_format dynamic "
    "packing_format mode weight_block_size expert_dtype fmt format config_groups "
    "quantization_status model.layers.0.mlp.gate weights num_bits type strategy symmetric "
    "block_structure group_0 load_in_4bit load_in_8bit bnb_4bit_quant_type quant_type weight_dtype "
    "quant_algo extra_config"
).split()
WORDS = ["", *"awq gemm affine int float group channel block nf4 NVFP4".split()]
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 130) | st.floats() | st.sampled_from(WORDS),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=12,
)


def test_the_docs_list_every_method() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    table = text.partition("### Quantized safetensors")[2].partition("Exact means")[0]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    names = {name for row in rows for name in re.findall(r"`([\w-]+)`", row)}
    assert names - {"quant_method"} == set(METHODS)


@settings(max_examples=300)
@given(st.sampled_from([*METHODS, None]), st.dictionaries(st.sampled_from(KEYS), VALUES))
def test_any_config_is_read_or_refused_in_one_line(
    method: str | None, values: dict[str, Any]
) -> None:
    try:
        assert callable(read_config({**values, "quant_method": method}))
    except CheckpointError as error:
        refused = str(error)
    else:
        refused = "quantization_config is read"
    assert re.fullmatch("quantization_config.*", refused)


@pytest.mark.parametrize("given", [[1], "fp8", {"quant_method": "vptq"}, {"quant_method": []}])
def test_an_unknown_method_is_refused_with_the_known_ones(given: Any) -> None:
    with pytest.raises(CheckpointError, match=r"quantization_config .*mlx, compressed-tensors"):
        read_config(given)


SETTINGS: dict[str, dict[str, Any]] = {
    "fp8": {"quant_method": "fp8", "weight_block_size": [32, 32]},
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 32},
    "gptq": {"quant_method": "gptq", "bits": 3, "group_size": 32},
    "mlx": {"bits": 6, "group_size": 32},
    "compressed": {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "a": {"weights": {"num_bits": 4, "strategy": "group", "group_size": 32}},
            "b": {"weights": {"num_bits": 8, "type": "float", "strategy": "channel"}},
        },
    },
    "mixed": {"quant_method": "gptq", "bits": 4, "group_size": 32, "dynamic": {"a": {"bits": 8}}},
    "modelopt": {"quant_algo": "MIXED_PRECISION"},
    "bnb": {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "int8": {"quant_method": "bitsandbytes", "load_in_8bit": True},
    "torchao": {"quant_method": "torchao"},
}
ENDS = (
    "weight scales biases qweight qzeros g_idx weight_scale weight_scale_inv weight_packed "
    "weight_zero_point weight_g_idx weight_scale_2 SCB _weight_qdata _weight_scale "
    "_weight_zero_point weight.absmax weight.quant_map weight.quant_state.bitsandbytes__nf4"
).split()
TYPES = [torch.float32, torch.float16, torch.int32, torch.uint32, torch.int8, torch.int64]
TYPES += [torch.float8_e4m3fn, torch.uint8]
SHAPES = st.lists(st.sampled_from([0, 1, 2, 3, 4, 6, 8, 32, 33, 64]), max_size=3)
TENSORS = st.dictionaries(st.sampled_from(ENDS), st.tuples(SHAPES, st.sampled_from(TYPES)))


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(list(SETTINGS)), TENSORS)
def test_tensors_of_any_shape_are_packed_or_refused_in_one_line(
    name: str, given: dict[str, tuple[list[int], torch.dtype]]
) -> None:
    tensors = {f"a.{end}": torch.zeros(s).to(kind) for end, (s, kind) in given.items()}
    try:
        for source in sources(SETTINGS[name], tensors).values():
            if source.is_packed:
                assert tuple(source.load().shape) == source.shape
    except CheckpointError as error:
        refused = str(error)
    except RuntimeError:  # which Weights turns into one line
        refused = ""
    else:
        refused = "not"
    assert "\n" not in refused


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
def test_bits_are_taken_from_the_lowest_on(bits: int) -> None:
    q = torch.arange(64) % 2**bits
    number = sum(int(value) << bits * i for i, value in enumerate(q.tolist()))
    words = torch.frombuffer(bytearray(number.to_bytes(8 * bits, "little")), dtype=torch.int32)
    assert torch.equal(unpacked_bits(words, bits), q.byte())


def test_show_names_the_format_and_counts_packed_bytes(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    packed, plain = saved(tiny(), tmp_path, MLX, affine)
    assert nanollama.main(["show", str(packed)]) == 0
    assert "quantization  MLX 4-bit, packed as 4 bits (safetensors" in capsys.readouterr().out
    backend = Backend(torch.device("cpu"), torch.float32, "torch")
    quantized, floats = (
        weight_bytes(open_checkpoint(path), EngineConfig(), backend) for path in (packed, plain)
    )
    matrices = [t for t in open_checkpoint(packed).tensors.values() if t.is_packed]
    num_weights = sum(t.shape[0] * t.shape[1] for t in matrices)
    assert quantized == floats - int(num_weights * (4 - 5 / 8))
