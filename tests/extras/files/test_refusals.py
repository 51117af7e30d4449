"""What a path is that is no model, and what to do with it."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_files import SHAPES, STRING, U32, smallest

import nanollama
from nanollama_extras.files.refusals import check_start

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 9\n"


def refusal(path: Path) -> str:
    """The one line that refuses a path, which begins with its name."""
    with pytest.raises(nanollama.CheckpointError) as error:
        nanollama.open_checkpoint(path)
    message = str(error.value)
    assert message.startswith(str(path))
    assert len(message.splitlines()) == 1
    return message


def gguf(**metadata: Any) -> bytes:
    """A GGUF of one layer with other values of general."""
    kinds = {str: STRING, int: U32, type(None): None}
    changed = {
        key.replace("__", "."): None if item is None else (kinds[type(item)], item)
        for key, item in metadata.items()
    }
    return smallest(changed)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("a.gguf", POINTER, "git-lfs pointer.*git lfs pull"),
        ("a.safetensors", POINTER, "git-lfs pointer"),
        ("a.gguf", b"<!DOCTYPE html><html>", "web page.*download it again"),
        ("a.gguf", b"tjgg" + bytes(60), "before GGUF"),
        ("a.gguf", b"PK\3\4" + bytes(60), "PyTorch pickle, which is never opened"),
        ("a.gguf", b"\x1f\x8b\x08" + bytes(60), "compressed; unpack it"),
        ("a.safetensors", b"\x80\x02\0\0\0\0\0\0{}" + bytes(60), "give the directory"),
        ("a.gguf", smallest(version=3 << 24)[0], "big-endian; convert it"),
        ("a.gguf", smallest(version=1)[0], "GGUF version 1"),
        ("mm.gguf", gguf(general__architecture="clip"), r"image part \(mmproj\)"),
        ("mm.gguf", gguf(general__type="mmproj", general__architecture="x"), "image part"),
        ("lora.gguf", gguf(general__type="adapter", llama__block_count=None), "LoRA adapter"),
        ("i.gguf", gguf(general__type="imatrix", general__architecture=None), "imatrix"),
        ("v.gguf", smallest(shapes=dict.fromkeys(SHAPES))[0], "vocabulary without weights"),
        ("renamed.gguf", gguf(split__count=3, split__no=0), r"part 1 of 3 .*-00001-of-00003\.gguf"),
        (
            "renamed.gguf",
            gguf(split__count=2, split__no=1, general__architecture=None),
            "part 2 of 2 files of a model; keep them side by side",
        ),
        *(
            ("old.gguf", smallest(kinds={"output_norm.weight": number})[0], f"type {name}, .*as")
            for number, name in (
                (4, "Q4_2"),
                (31, "Q4_0_4_4"),
                (33, "Q4_0_8_8"),
                (37, "IQ4_NL_4_8"),
            )
        ),
    ],
)
def test_a_file_that_is_no_model_is_named(
    tmp_path: Path, name: str, data: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(data)
    assert re.search(words, refusal(tmp_path / name))


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_pointer_in_a_directory_is_named(
    tiny: Callable[..., Path], tmp_path: Path, file: str
) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny(), path)
    (path / file).write_bytes(POINTER)
    with pytest.raises(nanollama.CheckpointError, match=f"{file}: is a git-lfs pointer"):
        nanollama.open_checkpoint(path)


def test_an_adapter_given_as_the_model_names_its_base(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    settings = {"base_model_name_or_path": "org/base", "peft_type": "LORA"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(settings))
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    words = "is a LoRA adapter; give its base ('org/base') to --model"
    assert words in refusal(tmp_path)
    shutil.copy(tiny() / "config.json", tmp_path)  # some have the base's
    assert words in refusal(tmp_path)
    shutil.copy(tiny() / "model.safetensors", tmp_path)
    nanollama.open_checkpoint(tmp_path)


def test_a_directory_of_gguf_files_names_them(tmp_path: Path) -> None:
    for name in ("b.gguf", "a.gguf"):
        (tmp_path / name).write_bytes(smallest()[0])
    assert "give one of them: a.gguf, b.gguf" in refusal(tmp_path)


def test_a_pickle_beside_no_weights_is_named(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny(), path)
    (path / "model.safetensors").rename(path / "pytorch_model.bin")
    assert "pytorch_model.bin is a pickle, which is never opened" in refusal(path)


def test_what_is_not_known_keeps_its_own_message(tmp_path: Path) -> None:
    (tmp_path / "a.gguf").write_bytes(gguf(general__architecture="whisper"))
    assert "general.architecture 'whisper' is not supported" in refusal(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"what is this")
    assert "not a GGUF file: it starts with b'what'" in refusal(tmp_path / "a.gguf")


def test_a_first_look_takes_what_may_be_a_model(tiny: Callable[..., Path]) -> None:
    for data in (
        smallest()[0],
        smallest()[0][:100],
        gguf(split__count=3, split__no=1, general__architecture=None),
        (tiny() / "model.safetensors").read_bytes()[:100],
        b'\x80\x02\0\0\0\0\0\0{"',
        b"",
    ):
        check_start(data)
    for data in (POINTER, gguf(general__architecture="clip"), smallest(version=3 << 24)[0]):
        with pytest.raises(nanollama.CheckpointError):
            check_start(data)
