"""What `show` says of a model's types, and of models of which a part is missing."""

from __future__ import annotations

import json
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import oracle
import pytest
import quantized_files as files
import safetensors.torch
from gguf_files import U32, convert, smallest
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import Tiny
from test_gptq import AWQ, awq

import nanollama
from nanollama import CheckpointError, EngineConfig
from nanollama_extras.commands.details import weight_bytes
from nanollama_extras.files.show_types import read_header

Show = Callable[..., tuple[str, str]]
TYPE = re.compile(r"^  (\S.*?) +(\d+) tensors +(.+) in the file +(.+) in memory: (.*)$", re.M)


@pytest.fixture
def show(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Show:
    """`nanollama show` of a path -> its output, and warnings."""

    def run(*argv: object) -> tuple[str, str]:
        caplog.clear()
        assert nanollama.main(["show", *map(str, argv)]) == 0
        return capsys.readouterr().out, "\n".join(caplog.messages)

    return run


def types(out: str) -> dict[str, tuple[str, ...]]:
    """The rows of the table: number, bytes in the file, bytes in memory and form of each type."""
    return {row[0]: row[1:] for row in TYPE.findall(out)}


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(smallest()[0])
    return path


def test_a_gguf_s_types_are_listed_with_their_bytes(gguf: Path, show: Show) -> None:
    out, warnings = show(gguf, "--kernels", "torch")
    tensors = nanollama.open_checkpoint(gguf).tensors.values()
    packed = [t for t in tensors if t.kind == "Q8_0"]
    size = nanollama.human_bytes(sum(t.nbytes for t in packed))
    found = types(out)
    assert found["Q8_0"] == (str(len(packed)), size, size, "packed, 8.5 bits a weight")
    assert found["F32"][3] == "float32"
    assert list(found) == ["Q8_0", "F32"]
    assert warnings == ""


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_bytes_in_memory_are_those_of_the_loaded_model(
    tiny: Tiny, tmp_path: Path, show: Show, kernels: str
) -> None:
    path = tiny("Llama", hidden_size=256, intermediate_size=256, vocab_size=330)
    file, _ = convert(path, tmp_path / "model.gguf", "Q4_K")
    decoder = nanollama.LLM(file, kernels=kernels).engine.decoder
    num_bytes = sum({id(m): m.nbytes for m in oracle.matrices(decoder)}.values())
    found = types(show(file, "--kernels", kernels)[0])["Q4_K"]
    assert found[2] == nanollama.human_bytes(num_bytes)
    guessed = weight_bytes(
        nanollama.open_checkpoint(file), EngineConfig(kernels=kernels), decoder.backend
    )
    assert guessed == pytest.approx(num_bytes, rel=0.02)


def test_quantized_safetensors_take_other_bytes_in_memory(
    tiny: Tiny, tmp_path: Path, show: Show
) -> None:
    packed, _ = files.saved(tiny(), tmp_path, AWQ, awq)
    num_weights = sum(
        t.shape[0] * t.shape[1]
        for t in nanollama.open_checkpoint(packed).tensors.values()
        if t.is_packed
    )
    found = types(show(packed)[0])
    _, on_disk, in_memory, form = found["AWQ 4-bit"]
    # in groups of 32: 4 bits, a zero of 4 bits, a scale in float16
    assert on_disk == nanollama.human_bytes(num_weights * (4 + 20 / 32) / 8)
    assert (in_memory, form) == (
        nanollama.human_bytes(num_weights * 5 / 8),
        "packed, 5 bits a weight",
    )
    assert found["F32"][3] == "float32"
    assert types(show(packed, "--dtype", "bfloat16")[0])["F32"][3] == "16-bit floats"
    assert "rounded to q8" in types(show(packed, "--quantize", "q8")[0])["F32"][3]


@pytest.mark.parametrize("missing", [1, 2000])
def test_a_truncated_gguf_is_described(gguf: Path, show: Show, missing: int) -> None:
    whole, _ = show(gguf)
    data = gguf.read_bytes()
    gguf.write_bytes(data[:-missing])
    out, warnings = show(gguf)
    assert out == whole
    assert re.search(r"model.gguf: incomplete: .* of .* are here$", warnings)
    with pytest.raises(CheckpointError, match="truncated"):
        nanollama.open_checkpoint(gguf)


def test_a_gguf_whose_header_is_cut_is_refused(gguf: Path) -> None:
    data, header = smallest()
    gguf.write_bytes(data[: header - 60])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        nanollama.command_show([str(gguf)])


def test_parts_of_a_split_gguf_may_be_missing(tmp_path: Path, show: Show) -> None:
    path = tmp_path / "m-00001-of-00003.gguf"
    path.write_bytes(smallest({"split.count": (U32, 3), "split.no": (U32, 0)})[0])
    out, warnings = show(path)
    assert "Q8_0" in types(out)
    assert "2 more files are missing" in warnings


def test_a_download_of_the_hub_is_described(
    tmp_path: Path, show: Show, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    blobs = tmp_path / "models--org--name" / "blobs"
    blobs.mkdir(parents=True)
    (blobs / "0.incomplete").write_bytes(b"{")
    with pytest.raises(nanollama.ModelNotFoundError, match="not on this machine"):
        nanollama.command_show(["org/name:Q8_0"])
    (blobs / "1.incomplete").write_bytes(smallest()[0][:-500])
    out, warnings = show("org/name:Q8_0")
    assert "Q8_0" in types(out)
    assert "incomplete" in warnings


def test_a_directory_with_a_cut_file_or_without_one_is_described(
    tiny: Tiny, tmp_path: Path, show: Show
) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny(), path)
    whole, _ = show(path)
    file = path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    file.write_bytes(file.read_bytes()[:-10])
    out, warnings = show(path)
    assert out == whole
    assert "incomplete" in warnings
    file.unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-{i % 2}.safetensors" for i, name in enumerate(names)}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    first = {name: tensors[name] for name in names[::2]}
    safetensors.torch.save_file(first, path / "model-0.safetensors")
    out, warnings = show(path)
    assert int(types(out)["F32"][0]) == len(first)
    assert "1 more files are missing" in warnings


def test_packed_tensors_whose_scales_are_missing_are_listed_as_they_are(
    tiny: Tiny, tmp_path: Path, show: Show
) -> None:
    path, _ = files.saved(tiny(), tmp_path, AWQ, awq)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    (path / "model.safetensors").unlink()
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("qzeros")}
    weight_map = dict.fromkeys(kept, "a.safetensors") | {"x": "b.safetensors"}
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    safetensors.torch.save_file(kept, path / "a.safetensors")
    assert types(show(path)[0])["I32"][0] == "14"


@given(
    st.recursive(
        st.none() | st.integers(-3, 99) | st.sampled_from(["F32", "I8", ""]),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(st.sampled_from(["dtype", "shape", "data_offsets", "a"]), inner)
        ),
        max_leaves=9,
    ),
    st.integers(-9, 9),
)
@settings(max_examples=200)
def test_any_header_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, value: object, more: int
) -> None:
    data = json.dumps({"a": value}).encode()
    file = tmp_path_factory.getbasetemp() / "header.safetensors"
    file.write_bytes(struct.pack("<q", max(0, len(data) + more)) + data)
    try:
        tensors, size = read_header(file)
    except CheckpointError as error:
        refused = str(error)
    else:
        assert list(tensors) in ([], ["a"])
        assert size >= 8
        refused = "its header is missing, cut or damaged"
    assert refused.endswith("its header is missing, cut or damaged")


def test_an_incomplete_tensor_is_not_read(tiny: Tiny, tmp_path: Path) -> None:
    tensors, _ = read_header(tiny() / "model.safetensors")
    with pytest.raises(CheckpointError, match="is incomplete"):
        next(iter(tensors.values())).load()
