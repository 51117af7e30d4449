"""GGUF's usual packed types in the layout of native kernels, against the gguf package."""

from __future__ import annotations

from pathlib import Path

import gguf
import gguf_files
import numpy as np
import oracle
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracle import Tiny, matrices

import nanollama
from nanollama import (
    LLM,
    BlockType,
    CheckpointError,
    EngineConfig,
    GGUFCursor,
    KernelError,
    PackedLinear,
)
from nanollama_extras.files.gguf_blocks import TYPES, BlockLinear
from nanollama_extras.files.gguf_lists import file_merges, strings
from nanollama_extras.kernels.native import NativeLinear, find_compiler
from nanollama_extras.models.sketch import weights_of

try:
    find_compiler()
except KernelError:
    pytest.skip("there is no C compiler", allow_module_level=True)

every_type = pytest.mark.parametrize("kind", TYPES.values(), ids=lambda kind: kind.name)


def blocks_of(kind: BlockType, num_rows: int, num_cols: int) -> np.ndarray:
    """Blocks (rows, blocks, bytes) of random weights or, where gguf cannot quantize, bits"""
    random, number = np.random.default_rng(num_rows), gguf_files.Kind[kind.name]
    weight = random.normal(size=(num_rows, num_cols)).astype(np.float32)
    raw: np.ndarray = gguf_files.encode(weight, number, random)
    return raw.reshape(num_rows, -1, kind.num_bytes)


def unpacked(kind: BlockType, blocks: np.ndarray) -> PackedLinear:
    assert kind.unpack
    return kind.unpack(torch.from_numpy(blocks))


SIZES = st.sampled_from([0, 1, 2, 5, 255, 2**63, 2**64 - 1])


@given(st.lists(st.tuples(SIZES, st.binary(max_size=6))), st.integers(0, 8))
def test_strings_are_those_that_are_read_one_by_one(parts: list, count: int) -> None:
    data = memoryview(b"".join(size.to_bytes(8, "little") + text for size, text in parts))
    cursor, whole = GGUFCursor(data), GGUFCursor(data)
    try:
        expected = [cursor.string() for _ in range(count)]
    except CheckpointError:
        with pytest.raises(CheckpointError, match="truncated or corrupt: the header needs"):
            strings(whole, count)
        return
    assert (strings(whole, count), whole.at) == (expected, cursor.at)


LINES = st.lists(st.text(alphabet="ab ", max_size=5))


@given(LINES, st.lists(st.text(alphabet="ab ", min_size=1, max_size=3)))
def test_merges_in_one_go_are_those_of_the_core(lines: list[str], pieces: list[str]) -> None:
    vocab = {piece: i for i, piece in enumerate(dict.fromkeys(["a", "b", "ab", *pieces]))}
    metadata = {"merges": lines}
    assert file_merges(metadata, vocab) == nanollama.file_merges(metadata, vocab)


@every_type
def test_the_kernels_hold_exactly_what_the_gguf_package_reads(kind: BlockType) -> None:
    for num_rows, num_cols in ((48, 512), (1, 256), (17, 1280)):
        blocks = blocks_of(kind, num_rows, num_cols)
        number = gguf_files.Kind[kind.name]
        expected = gguf.quants.dequantize(blocks.reshape(num_rows, -1), number)
        packed = unpacked(kind, blocks)
        assert packed.shape == expected.shape
        native = NativeLinear(packed.shape, packed.select, None)
        assert np.array_equal(native.dequantize().numpy(), expected)


@every_type
def test_memory_is_within_a_tenth_of_the_file(kind: BlockType) -> None:
    blocks = blocks_of(kind, 32, 512)
    packed = unpacked(kind, blocks)
    native = NativeLinear(packed.shape, packed.select, None)
    assert native.nbytes == packed.nbytes
    assert blocks.nbytes <= native.nbytes <= 1.03 * blocks.nbytes


@every_type
def test_torch_computes_with_the_core_s_own_weight(kind: BlockType) -> None:
    blocks = blocks_of(kind, 24, 512)
    packed, core = (unpacked(each, blocks) for each in (kind, core_type(kind)))
    assert isinstance(packed, BlockLinear)
    assert torch.equal(packed.dequantize(), core.dequantize())
    rows = torch.tensor([3, 3, 0, 23])
    assert torch.equal(packed.rows(rows), core.rows(rows))
    moved = packed.to(torch.device("cpu"), torch.bfloat16)
    assert type(moved) is PackedLinear
    assert (moved.bits, moved.nbytes) == (core.bits, core.to(moved.q.device, moved.dtype).nbytes)


def core_type(kind: BlockType) -> BlockType:
    return next(each for each in nanollama.GGUF_TYPES.values() if each.name == kind.name)


@pytest.mark.parametrize("kind", ["Q5_K", "Q6_K"])
def test_a_model_computes_what_its_dequantized_weights_do(
    tiny: Tiny, tmp_path: Path, kind: str
) -> None:
    directory = tiny("Llama", hidden_size=256, intermediate_size=256)
    path, _ = gguf_files.convert(directory, tmp_path / "model.gguf", kind)
    floats, _ = gguf_files.convert(directory, tmp_path / "floats.gguf", kind, unpacked=True)
    llm, ids = LLM(path, kernels="native"), oracle.random_ids(24)
    packed = [t for t in llm.checkpoint.tensors.values() if t.is_packed]
    held = sum(matrix.nbytes for matrix in matrices(llm.engine.decoder))
    assert held <= 1.03 * sum(tensor.nbytes for tensor in packed)
    logits, expected = llm.logits(ids), LLM(floats, kernels="torch").logits(ids)
    assert (logits - expected).square().mean().sqrt() < 0.05 * expected.std()


# ---- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_the_estimate_of_memory_is_what_the_weights_take(
    tiny: Tiny, tmp_path: Path, kernels: str
) -> None:
    directory = tiny("Llama", hidden_size=256, intermediate_size=256)
    for kind in ("Q4_0", "Q5_1", "Q4_K", "Q6_K", "IQ1_S", "MXFP4"):
        path, _ = gguf_files.convert(directory, tmp_path / f"{kind}.gguf", kind)
        llm = LLM(path, kernels=kernels)
        packed = [name for name, t in llm.checkpoint.tensors.items() if t.is_packed]
        sizes = weights_of(llm.checkpoint, EngineConfig(kernels=kernels))
        held = sum(matrix.nbytes for matrix in matrices(llm.engine.decoder))
        assert sum(map(sizes.tensor_bytes, packed)) == held


def resident(field: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since the last reset"""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.partition(f"{field}:")[2].split()[0])


def test_loading_takes_little_more_than_the_weights(tmp_path: Path) -> None:
    kind, shape = next(each for each in TYPES.values() if each.name == "Q6_K"), (40_960, 1024)
    blocks = np.resize(blocks_of(kind, 256, 1024).reshape(-1), shape[0] * 4 * kind.num_bytes)
    path = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tensor("a", blocks.reshape(shape[0], -1), raw_dtype=gguf_files.Kind.Q6_K)
    for write in ("header", "kv_data", "tensors"):
        getattr(writer, f"write_{write}_to_file")()
    writer.close()
    del blocks
    source = nanollama.read_gguf(path)[1]["a"]
    NativeLinear((16, 1024), lambda rows: source.load(slice(0, 16)), None)  # compiles the kernels
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        pytest.skip("this system does not reset a process's peak of memory")
    before = resident("VmRSS")
    weight = NativeLinear(shape, source.load, None)
    assert weight.nbytes == source.nbytes
    assert resident("VmHWM") - before < 1.3 * weight.nbytes
