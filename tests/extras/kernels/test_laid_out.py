"""--packed-cache: weights from a file of laid-out blocks, with the same answers to the last bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import oracle
import pytest
from command_line import Ran
from hypothesis import given
from hypothesis import strategies as st

from nanollama import LLM, GenerationRequest, NanollamaError, SamplingParams, log
from nanollama_extras.files import block_store
from nanollama_extras.kernels import laid_out

IDS = oracle.random_ids(40, seed=1)
SIZES: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 256}  # blocks of 256 columns


@pytest.fixture(scope="module")
def models(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder, llama = tmp_path_factory.mktemp("laid_out"), tiny("Llama", **SIZES)
    paths = {
        kind: gguf_files.convert(llama, folder / f"{kind}.gguf", kind)[0]
        for kind in ("Q4_K", "Q6_K", "IQ4_NL", "BF16")
    }
    mixture = gguf_files.convert(tiny("Qwen3Moe"), folder / "mixture.gguf", "Q8_0")[0]
    return paths | {"floats": llama, "mixture": mixture}


def answer(llm: LLM) -> Any:
    params = SamplingParams(seed=5, max_tokens=8, logprobs=3, ignore_eos=True)
    found = llm.complete(GenerationRequest(IDS, params=params))
    return found.token_ids, found.logprobs


def load(path: Path, folder: Path | None, **options: Any) -> LLM:
    """A model, once its file is written"""
    llm = LLM(path, parallel=1, packed_cache=folder and str(folder), **options)
    if kept := llm.engine.decoder.backend.kept:  # type: ignore[attr-defined]
        kept.store.wait()
    return llm


def is_mapped(llm: LLM) -> bool:
    return bool(llm.engine.decoder.backend.kept.is_whole)  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["Q4_K", "Q6_K", "IQ4_NL", "BF16", "floats", "mixture"])
def test_a_later_start_answers_from_the_file_with_the_same_bits(
    models: dict[str, Path], name: str, tmp_path: Path
) -> None:
    wanted = answer(load(models[name], None))
    first = load(models[name], tmp_path / "new")
    (file,) = (tmp_path / "new").iterdir()
    assert file.stat().st_mode & 0o777 == 0o600
    written = file.stat().st_ino
    second = load(models[name], tmp_path / "new")
    assert (is_mapped(first), is_mapped(second)) == (False, True)
    assert answer(first) == answer(second) == wanted
    assert file.stat().st_ino == written


def test_a_folder_may_be_a_link(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "real", target_is_directory=True)
    (tmp_path / "real").mkdir(mode=0o700)
    load(models["Q4_K"], tmp_path / "link")
    assert is_mapped(load(models["Q4_K"], tmp_path / "link"))


def test_another_model_and_other_options_have_files_of_their_own(
    models: dict[str, Path], tmp_path: Path
) -> None:
    path = tmp_path / "model.gguf"
    for name in ("Q4_K", "Q6_K"):  # another model in the same place
        path.write_bytes(models[name].read_bytes())
        assert not is_mapped(load(path, tmp_path / "cache"))
        assert is_mapped(load(path, tmp_path / "cache"))
    assert not is_mapped(load(path, tmp_path / "cache", dtype="bfloat16"))
    os.utime(path, (1, 1))
    assert not is_mapped(load(path, tmp_path / "cache"))
    assert len(list((tmp_path / "cache").iterdir())) == 4


@pytest.fixture(scope="module")
def whole(models: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    folder = tmp_path_factory.mktemp("whole")
    load(models["Q4_K"], folder)
    (file,) = folder.iterdir()
    return file, file.read_bytes()


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 4]) + data[at + 1 :]


DAMAGES: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "a head alone": lambda data: data[: laid_out.HEAD],
    "another magic": lambda data: flipped(data, 3),
    "a size beyond the file": lambda data: flipped(data, 38),
    "the list": lambda data: flipped(data, laid_out.HEAD + 20),
    "the first block": lambda data: flipped(data, data.index(b"]}") + 100),
    "the last block": lambda data: flipped(data, len(data) - 1 - laid_out.ALIGNMENT),
    "zeros": lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2),
    "cut": lambda data: data[:-64],
    "longer": lambda data: data + bytes(64),
    "of a foreign program": lambda _: b"{}" * 1000,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_replaced_and_the_answer_stays(
    models: dict[str, Path],
    whole: tuple[Path, bytes],
    damage: str,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    file, data = whole
    file.unlink()
    file.write_bytes(DAMAGES[damage](data))
    file.chmod(0o600)
    monkeypatch.setattr(log, "propagate", True)
    llm = load(models["Q4_K"], file.parent)
    assert caplog.text.count("the weights are laid out anew") == 1
    assert answer(llm) == answer(load(models["Q4_K"], None))
    assert file.read_bytes() == data


def test_a_file_that_others_may_change_is_not_read(
    models: dict[str, Path], whole: tuple[Path, bytes]
) -> None:
    file, _ = whole
    file.chmod(0o666)
    assert not is_mapped(load(models["Q4_K"], file.parent))
    assert file.stat().st_mode & 0o777 == 0o600
    file.rename(file.with_name("elsewhere"))
    file.symlink_to("elsewhere")
    assert not is_mapped(load(models["Q4_K"], file.parent))
    assert not file.is_symlink()


def test_a_folder_that_others_may_write_is_refused(models: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    with pytest.raises(NanollamaError, match="other users may write there; name another folder"):
        load(models["Q4_K"], tmp_path / "shared")


@given(data=st.binary(max_size=200), at=st.integers(0, 199), change=st.integers(1, 255))
def test_a_checksum_tells_bytes_and_their_order(data: bytes, at: int, change: int) -> None:
    def summed(data: bytes) -> int:
        array = np.frombuffer(data or b"\0", np.uint8)
        return laid_out.checksum(array.ctypes.data, len(data))

    assert summed(data) == summed(bytes(data))
    assert summed(data) != summed(data + b"\0")
    if at < len(data):
        assert summed(data) != summed(data[:at] + bytes([data[at] ^ change]) + data[at + 1 :])
    if data != data[::-1]:
        assert summed(data) != summed(data[::-1])


@given(parts=st.lists(st.binary(max_size=20)), size=st.integers(1, 30))
def test_pieces_have_the_bytes_of_the_parts(parts: list[bytes], size: int) -> None:
    pieces = [bytes(piece) for piece in laid_out.in_pieces(parts, size)]
    assert b"".join(pieces) == b"".join(parts)
    assert all(len(piece) == size for piece in pieces[:-1])


def test_weights_beyond_the_budget_are_not_written(
    models: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(log, "propagate", True)
    large = load(models["floats"], tmp_path, packed_cache_mb=1)
    assert "--packed-cache-mb 4 or more keeps them" in caplog.text
    assert not list(tmp_path.iterdir())
    del large
    for name in ("Q4_K", "Q6_K", "IQ4_NL"):
        load(models[name], tmp_path, packed_cache_mb=1)
    assert len(list(tmp_path.iterdir())) == 1  # what was not used for longest is gone


def test_a_full_disk_is_said_once_and_the_answer_stays(
    models: dict[str, Path],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(block_store.os, "replace", fail)
    monkeypatch.setattr(log, "propagate", True)
    llm = load(models["Q4_K"], tmp_path)
    assert caplog.text.count(f"--packed-cache {tmp_path}: [Errno 28] No space left") == 1
    assert not list(tmp_path.iterdir())
    assert answer(llm) == answer(load(models["Q4_K"], None))


def test_two_processes_at_once(models: dict[str, Path], tmp_path: Path) -> None:
    program = (
        "import sys; from nanollama import LLM; llm = LLM(sys.argv[1], packed_cache=sys.argv[2]);"
        "print(llm.complete([3, 4, 5], temperature=0, max_tokens=8, ignore_eos=True).token_ids);"
        "assert 'torch' not in sys.modules"
    )
    command = [sys.executable, "-c", program, str(models["Q4_K"]), str(tmp_path)]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = (process.communicate()[0] for process in running)
    assert first == second != ""
    assert is_mapped(load(models["Q4_K"], tmp_path))
    assert len(list(tmp_path.iterdir())) == 1


def test_show_and_a_model_without_native_kernels_say_what_it_does(
    models: dict[str, Path], tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    load(models["Q4_K"], tmp_path)
    (file,) = tmp_path.iterdir()
    ran = cli("show", models["Q4_K"], "--packed-cache", tmp_path)
    assert f"{tmp_path}, " in ran.out
    assert " of 17.2 GB in 1 files" in ran.out
    ran = cli(
        "--model", models["Q4_K"], "-p", "a", "--packed-cache", tmp_path, "--kernels", "torch"
    )
    assert "--packed-cache has no effect for this model: the model runs on" in ran.err
    assert file.exists()
