"""A model of the hub of which only config.json and the headers of its weights are fetched.

Adds       `open_remote`: a checkpoint with the names, shapes and types of all tensors, which
           cannot be read. Requests for a part of a file (Range) bring no weights.
Seam       Checkpoint of nanollama.py; commands.anatomy asks for a model that is not here.
Imports    files.show_types, which opens files that are cut.
Remove     delete this file; `nanollama explain` then asks to pull such a model first.
Spec       https://huggingface.co/docs/safetensors (8 bytes with the length of a header of JSON)
           https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, hf_hub_url, utils

import nanollama
from nanollama import (
    ALIASES,
    HUB_TIMEOUT_S,
    Checkpoint,
    CheckpointError,
    GGUFCursor,
    HubRef,
    ModelNotFoundError,
    check_inside,
    excerpt,
    hub_errors,
    model_files,
    parse_hub_ref,
)
from nanollama_extras.files import show_types

HTTP: Any = utils  # which does not declare all of its names as exported
CHUNK = 1 << 16  # bytes of a GGUF's header that are taken at a time
AT_ONCE = 8  # files
JSON_FILES = {
    *("config.json", "generation_config.json", "hf_quant_config.json"),
    "model.safetensors.index.json",
}
MOST_JSON_BYTES = 1 << 26


class Remote:
    """A repo of the hub at one commit."""

    def __init__(self, hub: HubRef, revision: str | None) -> None:
        with hub_errors(hub):
            info = HfApi().model_info(hub.repo, revision=revision, timeout=HUB_TIMEOUT_S)
        self.hub, self.sha = hub, check_inside(str(info.sha))
        self.sizes: list[int] = []  # of the pieces that were read
        self.names = [file.rfilename for file in info.siblings or []]

    @contextlib.contextmanager
    def part(self, name: str, start: int = 0, stop: int | None = None) -> Iterator[Iterator[bytes]]:
        """The bytes of a file from `start` to `stop`, or until the caller has enough."""
        headers = HTTP.build_hf_headers() | {"Accept-Encoding": "identity"}
        headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
        url = hf_hub_url(self.hub.repo, check_inside(name), revision=self.sha)
        with HTTP.http_stream_backoff("GET", url, headers=headers, max_retries=1) as response:
            HTTP.hf_raise_for_status(response)
            if start and response.status_code != 206:
                raise CheckpointError(f"{self.hub.tag}: {name}: the server sends whole files only")
            yield self.counted(response.iter_bytes(CHUNK))

    def counted(self, chunks: Iterator[bytes]) -> Iterator[bytes]:
        for chunk in chunks:
            self.sizes.append(len(chunk))  # of several threads
            yield chunk

    def read(self, name: str, start: int, stop: int) -> bytes:
        """These bytes of a file."""
        data = bytearray()
        with self.part(name, start, stop) as chunks:
            for chunk in chunks:
                data += chunk
                if len(data) >= stop - start:
                    break
        return bytes(data[: stop - start])


class StreamCursor(GGUFCursor):
    """Reads values of a file that is still coming: `bounded` takes more of it when it must."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self.chunks, self.taken = chunks, bytearray()
        super().__init__(memoryview(b""))

    def bounded(self, count: int, item_bytes: int) -> int:
        """As in GGUFCursor. Raises CheckpointError for a header beyond show_types' limit."""
        needed = self.at + count * item_bytes
        while needed > len(self.taken) <= show_types.MOST_HEADER_BYTES:
            if not (chunk := next(self.chunks, b"")):
                break
            self.data = memoryview(b"")  # a bytearray with views cannot grow
            self.taken += chunk
        self.data = memoryview(self.taken)
        return super().bounded(count, item_bytes)


def gguf_header(chunks: Iterator[bytes]) -> bytes:
    """The header of a GGUF, to the end of its list of tensors. Raises CheckpointError."""
    cursor = StreamCursor(chunks)
    magic = bytes(cursor.scalars("B", 4))
    if magic != b"GGUF":
        raise CheckpointError(f"not a GGUF file: it starts with {excerpt(magic)}")
    cursor.scalar("I")  # its version
    num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
    for _ in range(num_values):
        cursor.string()
        cursor.value(cursor.scalar("I"))
    for _ in range(num_tensors):
        cursor.string()
        cursor.scalars("Q", cursor.scalar("I"))
        cursor.scalar("I")
        cursor.scalar("Q")
    return bytes(cursor.data[: cursor.at])


def fetch_header(remote: Remote, name: str, folder: Path) -> None:
    """Write the beginning of a file of weights, without weights. Raises CheckpointError."""
    target = folder / name
    target.parent.mkdir(parents=True, exist_ok=True)
    with hub_errors(remote.hub):
        if name.endswith(".gguf"):
            with remote.part(name) as chunks, nanollama.errors_about(name):
                target.write_bytes(gguf_header(chunks))
            return
        length = remote.read(name, 0, 8)
        size = int.from_bytes(length, "little")
        if len(length) < 8 or not 0 < size <= show_types.MOST_HEADER_BYTES:
            raise CheckpointError(f"{remote.hub.tag}: {name} is not a safetensors file")
        target.write_bytes(length + remote.read(name, 8, 8 + size))


def hub_ref(reference: str) -> HubRef:
    """The place of a model on the hub. Raises ModelNotFoundError."""
    if alias := ALIASES.get(reference):
        return HubRef(alias.repo, file=alias.file)
    if hub := parse_hub_ref(reference):
        return hub
    raise ModelNotFoundError(f"{reference}: no such model; give a path or a hub id (org/name)")


def open_remote(reference: str, revision: str | None = None) -> tuple[Checkpoint, int]:
    """A model of the hub as far as its headers go, and how many bytes of its files were read.
    Raises ModelNotFoundError, DownloadError and CheckpointError."""
    remote = Remote(hub := hub_ref(reference), revision)
    needed = model_files(hub, remote.names)
    weights = [n for n in needed if re.fullmatch(r"[^/]+\.safetensors|.+\.gguf", n)]
    is_gguf = weights[0].endswith(".gguf")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        folder = Path(place)
        for name in () if is_gguf else sorted(JSON_FILES.intersection(remote.names)):
            with hub_errors(hub):
                (folder / name).write_bytes(remote.read(name, 0, MOST_JSON_BYTES))
        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(lambda name: fetch_header(remote, name, folder), weights))
        if is_gguf:
            part = show_types.gguf_part(folder / weights[0])
        else:
            part = show_types.directory_part(folder)
    return dataclasses.replace(part.checkpoint, path=Path(hub.tag)), sum(remote.sizes)
