"""Writes GGUF files: metadata, a list of tensors, and their bytes piece by piece.

Adds       `write_gguf`, and `value_bytes` and `copied_values` for metadata.
Seam       files.conversion calls it. Imports files.gguf_types, for the sizes of rarer types.
Remove     delete this file with commands/convert.py.
Spec       https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import contextlib
import math
import os
import secrets
import shutil
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from nanollama import (
    GGUF_ARRAY,
    GGUF_SCALARS,
    GGUF_STRING,
    GGUF_TYPES,
    GGUFCursor,
    NanollamaError,
    human_bytes,
    round_up,
)
from nanollama_extras.files import gguf_types

ALIGNMENT = 32  # of each tensor, in bytes
KINDS = {kind.name: (n, kind) for n, kind in {**gguf_types.TYPES, **GGUF_TYPES}.items()}
CODES = {code: kind for kind, code in GGUF_SCALARS.items()}


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written: its row-major shape, its type, and its bytes, a piece at a time."""

    name: str
    shape: tuple[int, ...]
    kind: str
    pieces: Callable[[], Iterator[bytes | memoryview]]

    @property
    def nbytes(self) -> int:
        block = KINDS[self.kind][1]
        return math.prod(self.shape) // block.width * block.num_bytes


def text_bytes(text: str) -> bytes:
    raw = text.encode("utf-8", "replace")
    return struct.pack("<Q", len(raw)) + raw


def value_bytes(value: Any) -> bytes:
    """A value of metadata with its type: bool, str, 32-bit numbers, 64 bits for large integers, or
    a list of one kind."""
    if isinstance(value, str):
        return struct.pack("<I", GGUF_STRING) + text_bytes(value)
    if not isinstance(value, (list, tuple)):
        code = scalar_code([value], "I")
        return struct.pack(f"<I{code}", CODES[code], value)
    if value and isinstance(value[0], str):
        head = struct.pack("<IIQ", GGUF_ARRAY, GGUF_STRING, len(value))
        return head + b"".join(map(text_bytes, value))
    code = scalar_code(value, "i")  # as llama.cpp needs it
    head = struct.pack("<IIQ", GGUF_ARRAY, CODES[code], len(value))
    return head + struct.pack(f"<{len(value)}{code}", *value)


def scalar_code(values: list[Any] | tuple[Any, ...], usual: str) -> str:
    """The struct code of a type for all of the values: `usual`, I or i, for integers that fit"""
    if any(isinstance(value, float) for value in values):
        return "f"
    if values and isinstance(values[0], bool):
        return "?"
    low, high = min(values, default=0), max(values, default=0)
    if low >= 0 and usual == "I":
        return "I" if high < 2**32 else "Q"
    return "i" if low >= -(2**31) and high < 2**31 else "q"


def copied_values(path: Path) -> dict[str, bytes]:
    """The metadata of a GGUF file that `read_gguf` accepts, as bytes with their types."""
    data = np.memmap(path, dtype=np.uint8, mode="r").data
    cursor = GGUFCursor(data)
    cursor.at = 16  # magic, version, number of tensors
    found = {}
    for _ in range(cursor.scalar("Q")):
        key, start = cursor.string(), cursor.at
        cursor.value(cursor.scalar("I"))
        found[key] = bytes(data[start : cursor.at])
    return found


def write_gguf(
    file: IO[bytes],
    metadata: Mapping[str, bytes],
    tensors: list[NewTensor],
    done: Callable[[int], None],
) -> None:
    """Write a file of version 3. `done` receives the number of bytes of each piece."""
    file.write(struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(metadata)))
    for key, value in metadata.items():
        file.write(text_bytes(key) + value)
    offset = 0
    for tensor in tensors:
        number, sizes = KINDS[tensor.kind][0], tensor.shape[::-1]
        shape = struct.pack(f"<I{len(sizes)}Q", len(sizes), *sizes)
        file.write(text_bytes(tensor.name) + shape + struct.pack("<IQ", number, offset))
        offset += round_up(tensor.nbytes, ALIGNMENT)
    for tensor in tensors:
        file.write(bytes(-file.tell() % ALIGNMENT))
        start = file.tell()
        for piece in tensor.pieces():
            file.write(piece)
            done(len(piece))
        assert file.tell() - start == tensor.nbytes, tensor.name
    file.write(bytes(-file.tell() % ALIGNMENT))


# ---- results that appear when they are complete --------------------------------------------------


@contextlib.contextmanager
def complete_or_absent(target: Path, num_bytes: int, force: bool) -> Iterator[Path]:
    """A path beside `target` to write to, which takes its place at the end; after an error or
    Ctrl-C it is removed. Raises NanollamaError if `target` exists, unless `force`, and where the
    disk is full or not writable."""
    if target.exists() and not force:
        raise NanollamaError(f"{target}: exists; give another name, or --force to replace it")
    scratch = target.with_name(f".{target.name}.{secrets.token_hex(4)}~")
    try:
        free = shutil.disk_usage(target.parent).free
        if num_bytes > free:
            sizes = f"needs {human_bytes(num_bytes)}, and {human_bytes(free)} are free"
            raise NanollamaError(f"{target}: {sizes} on its disk")
        yield scratch
        if target.is_dir() and not target.is_symlink():
            shutil.rmtree(target)
        os.replace(scratch, target)
    except OSError as error:
        raise NanollamaError(f"{target}: cannot be written: {error.strerror or error}") from None
    finally:
        if scratch.is_dir():
            shutil.rmtree(scratch, ignore_errors=True)
        else:
            with contextlib.suppress(OSError):
                scratch.unlink(missing_ok=True)
