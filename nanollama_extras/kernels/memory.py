"""Memory that a program holds without use, returned to the system.

Seam: the core calls `return_unused_memory` after a model was loaded or unloaded, and `copied` for
tensors in safetensors files. To remove it, delete this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

# A code segment in /proc/self/smaps whose pages all equal those of its file
CODE = re.compile(r"(?m)^(\w+)-(\w+) r-xp .* /.*\n(?:[A-Z]\w+:.*\n)*?Anonymous: +0 kB")


def return_unused_memory() -> None:
    """Return freed memory from malloc (glibc) and the pages of libraries' code (Linux, 60 MB with
    torch) to the system. Code that runs again is read from the system's file cache."""
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
