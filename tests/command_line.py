"""Runs of the command line: what one in this process left, and kernels for those in others."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import nanollama
from nanollama_extras.kernels import native


class Ran(NamedTuple):
    code: Any
    out: str
    err: str

    @property
    def error(self) -> str:
        """The only line on stderr, which is an error; nothing else came of the run."""
        assert self.code == 1
        assert self.out == ""
        (line,) = self.err.splitlines()
        assert line.startswith("error: ")
        return line


def share_kernels(cache: Path) -> None:
    """Copy the compiled kernels into a test's own cache: compiling them takes many seconds."""
    with contextlib.suppress(nanollama.KernelError):  # of a machine without a compiler
        native.load_kernels()
    target = cache / "kernels"
    target.mkdir(mode=0o700, parents=True)
    for library in (nanollama.cache_root() / "kernels").glob("*.so"):
        shutil.copy2(library, target)
