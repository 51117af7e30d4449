"""Memory: weights in large pages, and what a program holds without use returned to the system.

Seam: the core calls `return_unused_memory` after a model was loaded or unloaded, and `copied` for
tensors in safetensors files; kernels.native and kernels.floats take memory for weights from
`large_pages`. To remove it, delete this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import math
import mmap
import re
import sys
import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LARGE_PAGE = 1 << 21  # bytes
RESERVED = 1 << 26  # bytes of addresses that weights share; only what is written takes memory

# A code segment in /proc/self/smaps whose pages all equal those of its file
CODE = re.compile(r"(?m)^(\w+)-(\w+) r-xp .* /.*\n(?:[A-Z]\w+:.*\n)*?Anonymous: +0 kB")


class Reserve:
    """Addresses in large pages that are left for the next weights."""

    def __init__(self) -> None:
        self.lock, self.left = threading.Lock(), torch.empty(0, dtype=torch.uint8)

    def take(self, num_bytes: int) -> Tensor:
        """Memory that stays in use as long as the tensor or a view of it -> (num_bytes,) uint8"""
        with self.lock:
            if len(self.left) < num_bytes:
                self.left = mapped(max(RESERVED, num_bytes))
            taken, self.left = self.left[:num_bytes], self.left[-(-num_bytes // 64) * 64 :]
            return taken

    def drop(self) -> None:
        """Leave the rest, so that another model's weights do not keep this one's memory."""
        with self.lock:
            self.left = torch.empty(0, dtype=torch.uint8)


_reserve = Reserve()


def mapped(num_bytes: int) -> Tensor:
    """New memory, from the start of a large page on -> (num_bytes,) uint8. Raises OSError."""
    memory = mmap.mmap(-1, num_bytes + LARGE_PAGE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    whole = torch.frombuffer(memory, dtype=torch.uint8)  # which keeps `memory`
    return whole[-whole.data_ptr() % LARGE_PAGE :][:num_bytes]


def large_pages(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """An empty tensor whose memory is in pages of 2 MB where the system has them (Linux). Reading
    it from front to back then looks up 500 times fewer addresses of pages."""
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):
            num_bytes = math.prod(shape) * dtype.itemsize
            return _reserve.take(num_bytes).view(dtype).view(shape)
    return torch.empty(shape, dtype=dtype)


def return_unused_memory() -> None:
    """Return freed memory from malloc (glibc) and the pages of libraries' code (Linux, 60 MB with
    torch) to the system. Code that runs again is read from the system's file cache."""
    _reserve.drop()
    with contextlib.suppress(OSError, AttributeError, TypeError):
        libc = ctypes.CDLL(None)
        libc.malloc_trim(0)
        for start, stop in CODE.findall(Path("/proc/self/smaps").read_text()):
            size = ctypes.c_size_t(int(stop, 16) - int(start, 16))
            libc.madvise(ctypes.c_void_p(int(start, 16)), size, mmap.MADV_DONTNEED)


def copied(tensor: Tensor, at: Any) -> Tensor:
    """A copy of `tensor[at]`. On Linux, the pages of the tensor, which is mapped from a file and is
    not used again, stay in the system's file cache only."""
    copy = tensor[at].clone()
    if sys.platform == "linux" and tensor.is_contiguous():
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        size = tensor.data_ptr() + tensor.nbytes - start
        if size > mmap.PAGESIZE:
            size -= size % mmap.PAGESIZE
            madvise = ctypes.CDLL(None).madvise
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(size), mmap.MADV_DONTNEED)
    return copy
