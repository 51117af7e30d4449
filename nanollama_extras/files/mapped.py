"""Safetensors files without torch: their floats are views of the file, in memory of kernels.arrays.

Seam       `nanollama.read_safetensors` opens a file with `open_file`, which gives what
           safetensors.safe_open does.
Imports    kernels.arrays
Remove     delete this file; a safetensors model then imports torch before it is read.
Source     https://huggingface.co/docs/safetensors: 8 bytes, the size of the header; the header; the
           tensors without gaps, which safetensors itself has checked.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import safetensors

from nanollama_extras.kernels.arrays import DTYPES, Tensor

KINDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


class MappedSlice:
    """A tensor of a file; indexing reads it."""

    def __init__(self, found: Any, data: Any, at: int) -> None:
        self.shape, self.name = tuple(found.get_shape()), found.get_dtype()
        self.get_shape, self.get_dtype = found.get_shape, found.get_dtype
        self.kind = DTYPES[KINDS[self.name]]
        self.end = at + math.prod(self.shape) * self.kind.itemsize
        self.bytes = data[at : self.end]

    def __getitem__(self, index: Any) -> Any:
        # a tensor may start at any byte
        array = np.ndarray(self.shape, self.kind.storage, self.bytes)[index]
        tensor = Tensor(np.asarray(array), self.kind)
        return tensor.real() if "torch" in sys.modules else tensor


class MappedFile:
    """The tensors of a file, all of KINDS."""

    def __init__(self, file: Path, opened: Any) -> None:
        data = np.memmap(file, np.uint8, mode="c")  # the file's own pages: none is written
        at = 8 + int.from_bytes(data[:8].tobytes(), "little")
        self.slices: dict[str, MappedSlice] = {}
        for key in opened.offset_keys():
            self.slices[key] = MappedSlice(opened.get_slice(key), data, at)
            at = self.slices[key].end
        self.keys = opened.keys

    def get_slice(self, key: str) -> MappedSlice:
        return self.slices[key]

    def get_tensor(self, key: str) -> Any:
        return self.slices[key][...]


def open_file(file: Path, framework: str) -> Any:
    """The file as safe_open gives it, with torch's tensors if it has other types than KINDS."""
    if "torch" not in sys.modules:
        opened = safetensors.safe_open(file, framework="np")
        keys = opened.keys()
        if all(opened.get_slice(key).get_dtype() in KINDS for key in keys):
            return MappedFile(file, opened)
    return safetensors.safe_open(file, framework)
