"""Memory: weights in large pages, and what a program holds without use returned to the system.

Seam: the core calls `get_ready` before a model's weights are read, `return_unused_memory` when it
was unloaded, and `copied` for tensors in safetensors files; kernels.native and kernels.floats take
memory for weights from `large_pages`. Imports kernels.arrays. To remove it, delete this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import re
import sys
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanollama_extras.kernels.arrays import torch

if TYPE_CHECKING:
    from torch import Tensor

LARGE_PAGE = 1 << 21  # bytes
RESERVED = 1 << 26  # bytes of addresses that weights share; only what is written takes memory
COLLAPSE = 25  # MADV_COLLAPSE, since Linux 6.1
POPULATE_WRITE = 23  # MADV_POPULATE_WRITE, since Linux 5.14
POPULATED = 1 << 23  # bytes at a time
JOIN_AFTER_S = 5.0  # after loading: a short answer does without

# A code segment in /proc/self/smaps whose pages all equal those of its file
CODE = re.compile(r"(?m)^(\w+)-(\w+) r-xp .* /.*\n(?:[A-Z]\w+:.*\n)*?Anonymous: +0 kB")


class Weights:
    """Memory of models' weights, which take addresses one after another.

    It begins as small pages, since a virtual machine may have given its large ones back, and then
    needs milliseconds for each. `join` makes pages of 2 MB of it, while the model is in use."""

    def __init__(self) -> None:
        self.lock, self.joining = threading.Lock(), threading.Lock()
        self.chunks: list[Chunk] = []  # of which weights are left, and pages to join
        self.memory: Any = ()  # what is left of the last chunk is from num_taken on
        self.num_taken = 0

    def drop(self) -> None:
        """Leave the rest, so that the next model's weights do not keep this one's memory."""
        with self.lock:
            if self.chunks and len(self.memory):
                start = -(-self.num_taken // mmap.PAGESIZE) * mmap.PAGESIZE
                madvise(self.chunks[-1].start + start, len(self.memory) - start, mmap.MADV_DONTNEED)
            self.memory, self.num_taken = (), 0
            self.chunks = [chunk for chunk in self.chunks if chunk.memory()]

    def reserve(self, num_bytes: int) -> None:
        """New addresses for at least so many bytes."""
        chunk, self.memory = mapped(max(RESERVED, num_bytes))
        self.chunks.append(chunk)
        self.num_taken = 0

    def take(self, num_bytes: int) -> Tensor:
        """Memory, in use as long as the tensor or a view of it -> (num_bytes,) uint8"""
        with self.lock:
            if self.num_taken + num_bytes > len(self.memory):
                self.reserve(num_bytes)
            start, stop = self.num_taken, self.num_taken + num_bytes
            self.num_taken, self.chunks[-1].num_bytes = -(-stop // 64) * 64, stop
            return self.memory[start:stop]

    def populate(self, chunk: Chunk, num_bytes: int) -> None:
        """Have the system provide memory for weights that come soon, while something else is done:
        one that is written first waits for each page."""
        at = 0
        while at + POPULATED <= num_bytes and (memory := chunk.memory()):
            with self.lock:
                at = max(at, self.num_taken) if self.chunks[-1:] == [chunk] else num_bytes
            at = -(-at // mmap.PAGESIZE) * mmap.PAGESIZE
            if madvise(chunk.start + at, min(POPULATED, num_bytes - at), POPULATE_WRITE):
                break  # an older Linux
            at += POPULATED
            del memory

    def join(self, wait_s: float = 0) -> None:
        """Make large pages of the small ones, after `wait_s` seconds, and then half of the time."""
        time.sleep(wait_s)
        with self.joining:
            for chunk in list(self.chunks):
                while chunk.num_joined + LARGE_PAGE <= chunk.num_bytes:
                    started, memory = time.perf_counter(), chunk.memory()
                    if not memory or madvise(chunk.start + chunk.num_joined, LARGE_PAGE, COLLAPSE):
                        break  # it is gone, or the system has no such pages left
                    chunk.num_joined += LARGE_PAGE
                    del memory
                    time.sleep(wait_s and time.perf_counter() - started)


@dataclass(slots=True)
class Chunk:
    """Memory from the start of a large page on."""

    memory: weakref.ref[mmap.mmap]
    start: int  # its address
    num_bytes: int = 0  # in use
    num_joined: int = 0


_weights = Weights()


def madvise(start: int, num_bytes: int, advice: int) -> int:
    """0, or -1 where the system does not do it"""
    address, size = ctypes.c_void_p(start), ctypes.c_size_t(num_bytes)
    return int(ctypes.CDLL(None).madvise(address, size, advice))


def mapped(num_bytes: int) -> tuple[Chunk, Tensor]:
    """New memory -> it, and its bytes (num_bytes,) uint8. Raises OSError."""
    memory = mmap.mmap(-1, num_bytes + LARGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with torch.inference_mode(False):  # a tensor made under it can be written there only
        whole = torch.frombuffer(memory, dtype=torch.uint8)  # which keeps `memory`
        part = whole[-whole.data_ptr() % LARGE_PAGE :][:num_bytes]
    return Chunk(weakref.ref(memory), part.data_ptr()), part


def large_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor whose memory will be in pages of 2 MB where the system has them (Linux).
    Reading it from front to back then looks up 500 times fewer addresses of pages."""
    num_bytes = math.prod(shape) * dtype.itemsize
    if sys.platform == "linux" and num_bytes:
        with contextlib.suppress(OSError):
            return _weights.take(num_bytes).view(dtype).view(shape)
    return torch.empty(shape, dtype=dtype)


def join_pages() -> None:
    """Make large pages of all weights now."""
    _weights.join()


def get_ready(num_bytes: int, backend: Any) -> None:
    """Prepare for the weights of a model, which take so many bytes, in another thread. Some seconds
    later, that thread returns the memory that only loading needed. It calls nothing of torch's, in
    which a program that ends would abort."""
    weights = _weights
    weights.drop()
    if (kept := getattr(backend, "kept", None)) and kept.is_whole:
        num_bytes = 0  # the weights' memory is that of a file
    chunk: Chunk | None = None
    if sys.platform == "linux" and hasattr(backend, "run_kernel"):
        with contextlib.suppress(OSError), weights.lock:
            weights.reserve(num_bytes + RESERVED)
            chunk = weights.chunks[-1]

    def prepare() -> None:
        if chunk:
            weights.populate(chunk, num_bytes)
        before = -1
        while before != weights.num_taken:  # as long as weights are read
            before = weights.num_taken
            time.sleep(JOIN_AFTER_S)
        tidy(weights)

    threading.Thread(target=prepare, daemon=True).start()


def return_unused_memory() -> None:
    """Return freed memory from malloc (glibc) and the pages of libraries' code (Linux, 60 MB with
    torch) to the system. Code that runs again is read from the system's file cache."""
    tidy(_weights)


def tidy(weights: Weights) -> None:
    """`return_unused_memory`, and join the pages of these weights."""
    weights.drop()
    if any(chunk.num_joined + LARGE_PAGE <= chunk.num_bytes for chunk in weights.chunks):
        threading.Thread(target=weights.join, args=(JOIN_AFTER_S,), daemon=True).start()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
        for start, stop in CODE.findall(Path("/proc/self/smaps").read_text()):
            madvise(int(start, 16), int(stop, 16) - int(start, 16), mmap.MADV_DONTNEED)


def copied(tensor: Tensor, at: Any) -> Tensor:
    """A copy of `tensor[at]`. On Linux, the pages of the tensor, which is mapped from a file and is
    not used again, stay in the system's file cache only."""
    copy = tensor[at].clone()
    if sys.platform == "linux" and tensor.is_contiguous():
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - start
        if size > mmap.PAGESIZE:
            madvise(start, size - size % mmap.PAGESIZE, mmap.MADV_DONTNEED)
    return copy
