"""Memory that a program holds without use, returned to the system.

Seam: the core's `return_unused_memory`, called after a model was loaded or unloaded. To remove it,
delete this module.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import re
from pathlib import Path

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
