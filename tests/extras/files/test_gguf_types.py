"""GGUF's rarer types against the gguf package and llama.cpp, and how many bits they take."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Tiny, matrices

import nanollama
from nanollama import LLM, BlockType, CheckpointError, TensorSource
from nanollama_extras.files import gguf_types
from nanollama_extras.kernels.fine import FineLinear

DATA = Path(__file__).parents[2] / "data"
TYPES = list(gguf_types.TYPES.values())
KNOWN = [kind for kind in TYPES if kind.name in gguf_files.DEQUANTIZABLE]
every_type = pytest.mark.parametrize("kind", TYPES, ids=lambda kind: kind.name)


def random_packed(kind: BlockType, num_rows: int = 24, num_cols: int = 512) -> FineLinear:
    blocks = gguf_files.rare_blocks(kind, num_rows, num_cols, np.random.default_rng(0))
    packed = kind.unpack(torch.from_numpy(blocks)) if kind.unpack else None
    assert isinstance(packed, FineLinear)
    return packed


# ---- numbers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.name)
def test_a_type_holds_exactly_what_the_gguf_package_reads(kind: BlockType) -> None:
    number = gguf.GGMLQuantizationType[kind.name]
    assert gguf_types.TYPES[number.value] is kind
    assert gguf.GGML_QUANT_SIZES[number] == (kind.width, kind.num_bytes)
    assert kind.unpack
    for num_rows, num_cols in ((24, 512), (1, 256), (3, 1280)):
        random = np.random.default_rng(num_rows)
        blocks = gguf_files.rare_blocks(kind, num_rows, num_cols, random)
        expected = gguf.quants.dequantize(blocks.reshape(num_rows, -1), number)
        packed = kind.unpack(torch.from_numpy(blocks))
        assert packed.shape == expected.shape
        assert np.array_equal(packed.dequantize().numpy(), expected)


@pytest.mark.parametrize("number", [40, 41, 42])
def test_a_type_holds_exactly_what_llama_cpp_reads(number: int) -> None:
    """The values are of `to_float` of ggml's type traits."""
    kind, vectors = gguf_types.TYPES[number], np.load(DATA / "gguf_types.npz")
    assert kind.unpack
    blocks, values = (vectors[f"{kind.name}_{part}"] for part in ("blocks", "values"))
    assert blocks.shape[-1] == kind.num_bytes
    packed = kind.unpack(torch.from_numpy(blocks))
    assert np.array_equal(packed.dequantize().numpy(), values)


@every_type
def test_rows_and_products_are_those_of_the_floats(kind: BlockType) -> None:
    packed, x = random_packed(kind), torch.randn(5, 512)
    weight, index = packed.dequantize(), torch.tensor([3, 3, 0, 23])
    torch.testing.assert_close(packed(x), x @ weight.T, rtol=1e-4, atol=1e-4)
    assert torch.equal(packed.rows(index), weight[index])
    assert torch.equal(packed.select(slice(3, 9)).dequantize(), weight[3:9])
    half = packed.to(torch.device("cpu"), torch.bfloat16)
    torch.testing.assert_close(half.dequantize().float(), weight, rtol=0.02, atol=0.01)


@every_type
@settings(max_examples=20)
@given(data=st.data())
def test_any_bytes_are_numbers(kind: BlockType, data: st.DataObject) -> None:
    raw = data.draw(st.binary(min_size=kind.num_bytes, max_size=kind.num_bytes))
    assert kind.unpack
    packed = kind.unpack(torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(1, 1, -1))
    assert packed.shape == packed.dequantize().shape == (1, kind.width)


# ---- memory --------------------------------------------------------------------------------------


@every_type
def test_weights_take_as_many_bits_as_the_file_or_few(kind: BlockType) -> None:
    packed, file_bits = random_packed(kind), 8 * kind.num_bytes / kind.width
    bits = 8 * packed.nbytes / (24 * 512)
    assert bits <= 1.1 * file_bits or (file_bits < 3.5 and bits <= 4.5)


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("kind", KNOWN, ids=lambda kind: kind.name)
def test_a_model_computes_what_its_dequantized_weights_do(
    tiny: Tiny, tmp_path: Path, kind: BlockType, kernels: str
) -> None:
    directory = tiny("Llama", hidden_size=256, intermediate_size=256)
    path, _ = gguf_files.convert(directory, tmp_path / "model.gguf", kind.name)
    floats, _ = gguf_files.convert(directory, tmp_path / "floats.gguf", kind.name, unpacked=True)
    llm, ids = LLM(path, kernels=kernels), oracle.random_ids(24)
    assert llm.checkpoint.quantization == kind.name
    assert not any(isinstance(m, nanollama.Linear) for m in matrices(llm.engine.decoder))
    logits, expected = llm.logits(ids), LLM(floats, kernels="torch").logits(ids)
    limit = 1e-4 if kernels == "torch" else 0.05  # of activations in 8 bits
    assert (logits - expected).square().mean().sqrt() < limit * expected.std()


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_experts_are_packed(tiny: Tiny, tmp_path: Path, kernels: str) -> None:
    sizes = {"hidden_size": 256, "intermediate_size": 256, "moe_intermediate_size": 256}
    sizes |= {"num_experts": 5, "num_experts_per_tok": 2}
    directory = tiny("Qwen3Moe", **sizes)
    for kind in ("IQ3_XXS", "NVFP4"):
        path, _ = gguf_files.convert(directory, tmp_path / "model.gguf", kind)
        floats, _ = gguf_files.convert(directory, tmp_path / "floats.gguf", kind, unpacked=True)
        llm, ids = LLM(path, kernels=kernels), oracle.random_ids(12)
        expert = llm.engine.decoder.layers[0].mlp.experts[0]
        assert not isinstance(expert.down_proj.parts[0], nanollama.Linear)
        logits, expected = llm.logits(ids), LLM(floats, kernels="torch").logits(ids)
        assert (logits - expected).square().mean().sqrt() < 0.05 * expected.std()


def test_a_type_that_the_gguf_package_does_not_know(tmp_path: Path) -> None:
    name, random = "blk.0.ffn_up.weight", np.random.default_rng(0)
    blocks = gguf_files.rare_blocks(gguf_types.TYPES[42], 8, 64, random)
    raw, at = gguf_files.smallest({}, {name: (8, 64)}, {name: 42})
    path = tmp_path / "x.gguf"
    path.write_bytes(raw)
    _, tensors = nanollama.read_gguf(path)
    source = tensors[name]
    assert (source.kind, source.nbytes, source.is_packed) == ("Q2_0", 8 * 18, True)
    assert blocks.shape == (8, 1, 18)
    assert at < len(raw)
    assert tuple(source.load(slice(2, 5)).shape) == (3, 64)


# ---- NVFP4's factors -----------------------------------------------------------------------------


def source(value: Any) -> TensorSource:
    """A tensor, or a packed matrix for each of its experts."""
    if isinstance(value, torch.Tensor):
        return TensorSource(tuple(value.shape), "F32", 0, lambda *_: value)
    shape = len(value), *value[0].shape

    def load(*index: Any) -> Any:
        if not index:
            return torch.stack([each.dequantize() for each in value])
        return value[index[0]].select(index[1])

    return TensorSource(shape, "NVFP4", 0, load, is_packed=True)


def test_scales_of_nvfp4_multiply_the_weights_of_a_matrix_or_an_expert() -> None:
    packed = random_packed(gguf_types.TYPES[40], 16, 64)
    weight = packed.dequantize()
    one = TensorSource((16, 64), "NVFP4", 0, lambda rows=slice(None): packed.select(rows), True)
    found = gguf_types.scaled(
        {
            "a.weight": one,
            "a.scale": source(torch.tensor([0.3])),
            "a.input_scale": source(torch.tensor([7.0])),
            "e.weight": source([packed, packed]),
            "e.scale": source(torch.tensor([0.5, 1e-5])),
            "b.scale": source(torch.tensor([1.0])),
        }
    )
    assert list(found) == ["a.weight", "e.weight", "b.scale"]
    rows = torch.tensor([1, 5])
    close = functools.partial(torch.testing.assert_close, rtol=1e-6, atol=0)
    loaded = found["a.weight"].load(rows)
    assert isinstance(loaded, FineLinear)
    close(loaded.dequantize(), weight[rows] * 0.3)
    close(found["e.weight"].load(1, rows).dequantize(), weight[rows] * 1e-5)
    close(found["e.weight"].load(), torch.stack((weight * 0.5, weight * 1e-5)))


def test_a_scale_of_another_shape_is_refused() -> None:
    packed = random_packed(gguf_types.TYPES[40], 16, 64)
    tensors = {"e.weight": source([packed]), "e.scale": source(torch.ones(3))}
    with pytest.raises(CheckpointError, match=r"tensor 'e'\.scale has shape \(3,\)"):
        gguf_types.scaled(tensors)
