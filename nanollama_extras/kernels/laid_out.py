"""`--packed-cache DIR`: weights as kernels read them, in files that later starts map into memory.

Adds       `attach`, which gives a native backend the blocks of a model's weights from a file, or
           writes that file when they are complete. An answer is the same, bit for bit.
Seam       LLM calls `attach` with `EngineConfig.packed_cache`; kernels.native and kernels.floats
           ask NativeBackend.kept for blocks, kernels.memory whether it has them all, and
           commands.details `add_details`.
Imports    files.block_store, kernels.arrays and kernels.native
Remove     delete this file; the options then say that they need it.

    file   [ MAGIC | size of the list | digest of the list ][ list: JSON ][ blocks ][ blocks ] ..
                                                                          each from a multiple of 64

The list has for each weight, in the order in which the model asks for them, its shape and layout,
its bytes and a checksum. A file's name is a hash of the model's files, the options and the layout.
A start believes neither: a thread computes the checksums of what it maps while the tokenizer is
made, and a weight whose place, shape or checksum differs is laid out from the model's own file, as
are all after it; a new file then takes the old one's place.

The file's pages are the memory: of 2 MB where the system keeps files in such pages, shared by all
processes that run the model, and the system may drop them and read them again. A file that is cut
short while it is mapped would end the process. So only its owner may write it or its folder, and
nanollama replaces or deletes files but never changes one.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
import mmap
import os
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from nanollama import (
    CheckpointError,
    NanollamaError,
    __version__,
    first_line,
    human_bytes,
    log,
    round_up,
)
from nanollama_extras.files.block_store import (
    DIGEST,
    READ_FLAGS,
    BlockStore,
    Payload,
    describe,
    digest_of,
    model_marks,
)
from nanollama_extras.kernels.arrays import torch
from nanollama_extras.kernels.native import is_safe, load_kernels

if TYPE_CHECKING:
    from torch import Tensor

    from nanollama import Checkpoint, EngineConfig

OPTION, KIND = "--packed-cache", "blocks"
MAGIC = b"nanollama laid-out weights, 1   "  # 32 bytes
HEAD = len(MAGIC) + 8 + DIGEST  # bytes
ALIGNMENT = 64  # bytes: a line of the processor's cache
PIECE = 1 << 21  # bytes written at a time: the system keeps such a piece in one large page
LAYOUT = ("native.c", "native.py", "fine.py", "floats.py")  # files that say where a weight lies


class Entry(NamedTuple):
    """A weight in a file."""

    about: str  # its shape, type and fields of `matrix`
    num_bytes: int
    checksum: int


# ---- files ---------------------------------------------------------------------------------------


def checksum(address: int, num_bytes: int) -> int:
    return int(load_kernels().checksum(address, num_bytes))


def read_list(file: Any, key: str) -> tuple[list[Entry], int]:
    """The weights of an open file, and where their blocks begin. Raises OSError, and ValueError
    for a file that is not as `file_parts` makes it for this key, up to the blocks."""
    size = os.fstat(file.fileno()).st_size
    head = file.read(HEAD)
    num_bytes = int.from_bytes(head[len(MAGIC) : -DIGEST], "little")
    if len(head) < HEAD or not head.startswith(MAGIC) or num_bytes > size:
        raise ValueError("it does not begin as such a file")
    listed = file.read(num_bytes)
    if digest_of(head[:-DIGEST], listed) != head[-DIGEST:]:
        raise ValueError("its list of weights is damaged")
    found = json.loads(listed)
    entries = list(itertools.starmap(Entry, found["weights"]))
    start = round_up(HEAD + num_bytes, ALIGNMENT)
    end = start + sum(round_up(entry.num_bytes, ALIGNMENT) for entry in entries)
    if found["key"] != key or size != end:
        raise ValueError(f"it is of another model, or has {size} bytes where {end} are listed")
    return entries, start


def file_parts(key: str, weights: list[tuple[str, Tensor]]) -> Iterator[bytes | Payload]:
    """A file with these weights, in parts"""
    blocks = [np.frombuffer(memory_of(weight), np.uint8) for _, weight in weights]
    entries = [
        Entry(about, len(own), checksum(weight.data_ptr(), len(own)))
        for (about, weight), own in zip(weights, blocks)
    ]
    listed = json.dumps({"key": key, "weights": entries}).encode()
    head = MAGIC + len(listed).to_bytes(8, "little")
    yield head + digest_of(head, listed) + listed
    yield bytes(-(HEAD + len(listed)) % ALIGNMENT)
    for own in blocks:
        yield own
        yield bytes(-len(own) % ALIGNMENT)


def memory_of(x: Tensor) -> Any:
    """The bytes of a contiguous tensor, which must outlive them"""
    import ctypes

    return (ctypes.c_char * x.nbytes).from_address(x.data_ptr())


def in_pieces(parts: Iterable[bytes | Payload], size: int) -> Iterator[Payload]:
    """The same bytes in arrays of `size`, but for the last; each is valid until the next one."""
    room, filled = np.empty(size, np.uint8), 0
    for part in parts:
        data = np.frombuffer(part, np.uint8)
        while len(data):
            num = min(len(data), size - filled)
            room[filled : filled + num] = data[:num]
            filled, data = filled + num, data[num:]
            if filled == size:
                yield room
                filled = 0
    yield room[:filled]


class MappedBlocks:
    """The weights of a file, in order, each checked before it is given out."""

    def __init__(self, path: Path, key: str) -> None:
        """Raises OSError, and ValueError for a file that is damaged or not this user's alone."""
        with open(os.open(path, READ_FLAGS), "rb", buffering=0) as file:
            if not is_safe(path):
                raise ValueError("other users may change it")
            self.entries, start = read_list(file, key)
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            memory.madvise(mmap.MADV_HUGEPAGE)  # read ahead in such pages, too
        with torch.inference_mode(False):
            self.data = torch.frombuffer(memory, dtype=torch.uint8)
        sizes = [round_up(entry.num_bytes, ALIGNMENT) for entry in self.entries]
        self.starts = list(itertools.accumulate(sizes, initial=start))
        self.num_given = 0
        checker = ThreadPoolExecutor(1, "packed-cache-check")
        self.checks = checker.map(self.is_right, range(len(self.entries)))
        checker.shutdown(wait=False)

    def is_right(self, index: int) -> bool:
        entry, address = self.entries[index], self.data.data_ptr() + self.starts[index]
        return checksum(address, entry.num_bytes) == entry.checksum

    def take(self, about: str) -> Tensor | None:
        """The bytes of the next weight; None if it is another one, or damaged."""
        index = self.num_given
        if index == len(self.entries) or self.entries[index].about != about:
            return None
        if not next(self.checks):
            return None
        self.num_given += 1
        start = self.starts[index]
        return self.data[start : start + self.entries[index].num_bytes]


# ---- a model's weights ---------------------------------------------------------------------------


class LaidOut:
    """The blocks of a model's weights, in the order in which it asks for them: those of a file, and
    new ones, which then become a file."""

    def __init__(self, store: BlockStore, key: str) -> None:
        self.store, self.key, self.path = store, key, store.folder / f"{key}.{KIND}"
        self.weights: list[tuple[str, Tensor]] = []  # that are in memory
        self.mapped: MappedBlocks | None = None
        try:
            self.mapped = MappedBlocks(self.path, key)
            store.use({self.path.name: time.time_ns()})
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.refuse(first_line(error))

    @property
    def is_whole(self) -> bool:
        """Whether all weights so far are those of a file."""
        return self.mapped is not None

    def refuse(self, reason: str) -> None:
        self.mapped = None
        log.warning(f"{OPTION} {self.path}: {reason}; the weights are laid out anew")

    def take(self, shape: tuple[int, ...], dtype: torch.dtype, fields: dict[str, Any]) -> Any:
        """The blocks of the next weight, if the file has them; else None."""
        if self.mapped is None:
            return None
        about = described(shape, dtype, fields)
        found = self.mapped.take(about)
        if found is None:
            self.refuse(f"its weight {self.mapped.num_given} is damaged or another one")
            return None
        blocks = found.view(dtype).view(shape)
        self.weights.append((about, blocks))
        return blocks

    def add(self, blocks: Tensor, fields: dict[str, Any]) -> None:
        """Note the memory of a new weight's blocks, which are about to be laid out."""
        self.weights.append((described(blocks.shape, blocks.dtype, fields), blocks))

    def save(self) -> None:
        """Let a thread write the weights, which are complete now, unless a file has them."""
        weights, self.weights = self.weights, []
        num_bytes = sum(blocks.nbytes for _, blocks in weights)
        if not weights or self.is_whole:
            return
        if num_bytes > self.store.most_bytes:
            remedy = f"{OPTION}-mb {math.ceil(num_bytes / 2**20)} or more keeps them"
            log.warning(f"{OPTION}: the weights take {human_bytes(num_bytes)}; {remedy}")
            return
        pieces = in_pieces(file_parts(self.key, weights), PIECE)
        self.store.put_parts(self.path.name, pieces, num_bytes, time.time_ns())


def described(shape: Iterable[int], dtype: torch.dtype, fields: dict[str, Any]) -> str:
    """A weight's layout, as files have it"""
    return json.dumps([list(shape), str(dtype), fields], default=lambda x: x.tolist())


@functools.cache
def layout_hash() -> str:
    sources = (Path(__file__).with_name(name).read_bytes() for name in LAYOUT)
    return hashlib.blake2b(b"".join(sources), digest_size=20).hexdigest()


def attach(backend: Any, checkpoint: Checkpoint, config: EngineConfig) -> None:
    """Let a native backend keep the weights of a model in `config.packed_cache`. Raises
    NanollamaError for a folder that cannot be written, or that others can."""
    folder = Path(str(config.packed_cache)).expanduser().resolve()
    reason = f"the model runs on {backend.describe()}"
    try:
        marks = hasattr(backend, "run_kernel") and {
            "version": __version__,
            "model": model_marks(checkpoint.path),
            "options": [config.dtype, config.quantize, config.lookup == "mtp"],
            "kernels": backend.describe(),
            "layout": layout_hash(),
        }
    except (OSError, CheckpointError) as error:
        marks, reason = None, f"its files cannot be read: {error}"
    if not marks:
        log.warning(f"{OPTION} has no effect for this model: {reason}")
        return
    store = BlockStore(folder, config.packed_cache_mb << 20, OPTION, KIND)
    if not is_safe(folder):
        raise NanollamaError(f"{OPTION} {folder}: other users may write there; name another folder")
    key = hashlib.blake2b(json.dumps(marks).encode(), digest_size=20).hexdigest()
    backend.kept = LaidOut(store, key)
    log.debug(f"packed cache: {describe(folder, store.most_bytes, KIND)}")


def add_details(lines: dict[str, str], engine: EngineConfig) -> None:
    """Add a line to those of `show`."""
    if engine.packed_cache:
        folder = Path(str(engine.packed_cache)).expanduser()
        lines["packed cache"] = describe(folder, engine.packed_cache_mb << 20, KIND)
