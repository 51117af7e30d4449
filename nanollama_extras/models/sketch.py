"""A decoder made of shapes: its modules are the real ones, its weights are not read.

Adds       `sketch`: the decoder of a checkpoint, of which only config and headers are there, with
           each tensor's form and bytes as the backend would hold it. `weights_of`: the bytes alone.
Seam       `Weights` of nanollama.py, by inheritance: a decoder asks it for its tensors;
           commands.details asks `weights_of`.
Imports    files.gguf_blocks and files.gguf_types, for the layouts of GGUF's types, and
           kernels.fine, for that of ternary weights.
Remove     delete this file with commands/anatomy.py, whose `explain` needs it; `show` then counts
           the bytes of packed weights as they are in the file.

A matrix's bytes are those of the matrix that the backend makes of a few rows of zeros, extended to
all rows. A tensor is one zero with the strides of many, so that nothing grows with the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from nanollama import (
    FLOAT_KINDS,
    GGUF_TYPES,
    GROUP,
    BlockType,
    Decoder,
    EngineConfig,
    PackedLinear,
    Projection,
    TensorSource,
    Weights,
    extra,
    extra_object,
    find_family,
    pick_device,
    preferred,
)

if TYPE_CHECKING:
    from nanollama import Checkpoint

SAMPLE_ROWS = 32  # a multiple of the rows that any backend lays out together


@dataclass(slots=True)
class Taken:
    """A tensor that the decoder asks for. `num_bytes` are those in memory."""

    name: str
    shape: tuple[int, ...]
    kind: str  # its type in the file
    num_bytes: int = 0
    is_table: bool = False  # single rows are read
    is_matrix: bool = False  # tokens are multiplied with it

    @property
    def num_parameters(self) -> int:
        return math.prod(self.shape)


class SketchedMatrix:
    """Stands for a matrix; its rows are zeros."""

    bias: Tensor | None = None

    def __init__(self, shape: tuple[int, int], num_bytes: int) -> None:
        self.shape, self.nbytes = shape, num_bytes


class SketchedProjection(Projection):
    """A projection that knows the names of its matrices."""

    outputs: Mapping[str, int]  # name -> rows
    num_cols: int


class SketchWeights(Weights):
    """Weights that reads nothing: `taken` has each tensor that a decoder asks for, in order.
    Raises CheckpointError as Weights does."""

    num_sample: int | None = None  # rows of the sample that is made now

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.taken: dict[str, Taken] = {}
        self.sizes: dict[tuple[Any, ...], int] = {}

    def _find(self, name: str, shape: tuple[int, ...]) -> TensorSource:
        if self.num_sample is not None:
            return self.tensors[name]
        found = super()._find(name, shape)
        self.taken.setdefault(name, Taken(name, shape, found.kind.partition(",")[0]))
        return found

    def _read(self, name: str, *rows: slice) -> Tensor | PackedLinear:
        num_rows = len(range(*rows[0].indices(cast("int", self.num_sample))))
        return zeros_of(self.tensors[name], num_rows)

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        self._find(name, shape)
        zero = torch.zeros((), dtype=dtype or self.dtype, device=self.device)
        self.taken[name].num_bytes = math.prod(shape) * zero.itemsize
        self.taken[name].is_matrix = len(shape) == 2
        return zero.expand(shape)

    def linear(
        self, outputs: Mapping[str, int], num_cols: int, bias: bool = False, is_table: bool = False
    ) -> Projection:
        parts = []
        for name, num_rows in outputs.items():
            parts.append(self._part(f"{name}.weight", (num_rows, num_cols), None, is_table))
            parts[-1].bias = self.take(f"{name}.bias", num_rows) if bias else None
        projection = SketchedProjection(parts)
        projection.outputs, projection.num_cols = outputs, num_cols
        return projection

    def _part(self, name: str, shape: tuple[int, int], b: Tensor | None, is_table: bool) -> Any:
        if self.num_sample is not None:
            return super()._part(name, shape, b, is_table)
        self._find(name, shape)
        taken = self.taken[name]
        taken.num_bytes = self.matrix_bytes(name, shape, is_table)
        taken.is_table, taken.is_matrix = is_table, not is_table
        return SketchedMatrix(shape, taken.num_bytes)

    def matrix_bytes(self, name: str, shape: tuple[int, int], is_table: bool) -> int:
        """Bytes of a matrix as the backend packs it: exact, as samples of two heights show how
        they grow."""
        (num_rows, num_cols), tensor = shape, self.tensors[name]
        low = SAMPLE_ROWS + num_rows % SAMPLE_ROWS
        traits = tensor.kind, tensor.bits, num_cols, is_table, name in self.sensitive

        def size(num_sample: int) -> int:
            key = (num_sample, *traits)
            if key not in self.sizes:
                self.sizes[key] = int(self.sample(name, num_sample, is_table).nbytes)
            return self.sizes[key]

        if num_rows <= low:
            return size(num_rows)
        return size(low) + (size(low + SAMPLE_ROWS) - size(low)) * (num_rows - low) // SAMPLE_ROWS

    def tensor_bytes(self, name: str) -> int:
        """Bytes of a tensor in memory, as far as they do not depend on the decoder."""
        tensor = self.tensors[name]
        if tensor.stays:
            return 0
        if len(tensor.shape) == 2:
            return self.matrix_bytes(name, (tensor.shape[0], tensor.shape[1]), False)
        return math.prod(tensor.shape) * self.backend.float_bytes(tensor.kind)

    def tensor_bits(self, name: str) -> float:
        """Bits of a weight of a tensor in memory, without rows that only fill up a block."""
        shape = self.tensors[name].shape
        if len(shape) != 2:
            return 8.0 * self.backend.float_bytes(self.tensors[name].kind)
        num_rows = 2 * SAMPLE_ROWS
        size = self.matrix_bytes(name, (num_rows, shape[1]), False)
        return 8 * size / (num_rows * max(1, shape[1]))

    def sample(self, name: str, num_rows: int, is_table: bool = False) -> Any:
        """A matrix of the backend's with some rows, all 0, of the tensor `name`."""
        self.num_sample = num_rows
        try:
            return self._part(name, (num_rows, self.tensors[name].shape[1]), None, is_table)
        finally:
            self.num_sample = None

    def is_copy(self, name: str, original: str) -> bool:
        """Whether `name` is not in the file, or as large as `original`: a config that says that
        both are one is believed."""
        self.used.add(f"{name}.weight")
        copy, first = (self.tensors.get(f"{each}.weight") for each in (name, original))
        return copy is None or (first is not None and copy.shape == first.shape)


def zeros_of(tensor: TensorSource, num_rows: int) -> Tensor | PackedLinear:
    """What `load` gives for some rows of a matrix (rows, cols), with zeros in place of weights."""
    num_cols = tensor.shape[-1]
    if not tensor.is_packed:
        kind = FLOAT_KINDS.get(tensor.kind, "float32")
        return torch.zeros(num_rows, num_cols, dtype=getattr(torch, kind))
    if not tensor.bits and (block := block_type(tensor.kind)) and block.unpack:
        blocks = (num_rows, num_cols // block.width, block.num_bytes)
        return block.unpack(torch.zeros(blocks, dtype=torch.uint8))
    if tensor.bits < 4:
        fine = extra("kernels.fine", "weights of 2 bits")
        codes = torch.zeros(num_rows, num_cols, dtype=torch.uint8)
        scale = torch.zeros((num_rows, num_cols // 64), dtype=torch.float16)
        packed: PackedLinear = fine.FineLinear(fine.Fine("ONE_SCALE", 2, codes, None, None, scale))
        return packed
    bits = 8 if tensor.bits >= 8 else 4
    q = torch.zeros(
        (num_rows, num_cols // GROUP, GROUP * bits // 8),
        dtype=torch.int8 if bits == 8 else torch.uint8,
    )
    scale = torch.zeros((num_rows, num_cols // GROUP), dtype=torch.float16)
    return PackedLinear(q, scale, scale if tensor.bits >= bits + 1 else None)


def block_type(name: str) -> BlockType | None:
    """A type of GGUF's by its name."""
    places = "files.gguf_blocks", "files.gguf_types"
    extras: list[Mapping[int, BlockType]] = [preferred(each, "TYPES", {}) for each in places]
    kinds = [kind for types in (*extras, GGUF_TYPES) for kind in types.values()]
    return next((kind for kind in kinds if kind.name == name), None)


def weights_of(checkpoint: Checkpoint, engine: EngineConfig) -> SketchWeights:
    """A checkpoint's tensors as the backend of these settings would hold them."""
    bits = {"q8": 8, "q4": 4}.get(engine.quantize or "")
    kind = getattr(torch, engine.dtype), bits, engine.kernels
    source = dict(checkpoint.tensors), str(checkpoint.path)
    return SketchWeights(*source, pick_device(engine.device), *kind)


def sketch(checkpoint: Checkpoint, engine: EngineConfig) -> tuple[Decoder, SketchWeights]:
    """The decoder of a checkpoint, and the tensors that it asked for. Its tables of positions are
    real, its weights cannot run. Raises CheckpointError, as loading the model would."""
    weights, family = weights_of(checkpoint, engine), checkpoint.config.model_type
    place = find_family(family).decoder
    new_decoder = extra_object(place, family) if place else Decoder
    with torch.inference_mode():
        decoder = new_decoder(checkpoint.config, weights, engine.kv_dtype)
    for name, tensor in weights.tensors.items():
        if tensor.stays and name in weights.taken:
            weights.taken[name].is_table = True
    return decoder, weights
