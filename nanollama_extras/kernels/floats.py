"""Float weights on the CPU's native kernels: those that a file has in 16 bits stay in 16 bits.

Seam       `pack` of the native backend, which asks for a matrix of floats as `Weights` reads it.
           The kernels are in native.c, and compute in float32.
Needs      kernels.native
Remove     delete this file; float weights then run on torch's operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nanollama import human_bytes, warn_once
from nanollama_extras.kernels.native import NUMBERS, NativeLinear, run_kernel, weight_blocks

if TYPE_CHECKING:
    import torch
    from torch import Tensor

BLOCK_ROWS = 32  # FLOAT_ROWS of native.c
LOAD_WEIGHTS = 1 << 22  # weights read at a time
LARGE = 500_000_000  # bytes of weights from which on a smaller form is worth a line


class FloatLinear(NativeLinear):
    """A float weight (rows, cols) in the kernels' layout; `read_rows` gives some of its rows.

    Rows of 16 bits stay as they are; others become `dtype`. cols is a multiple of 16."""

    def __init__(
        self,
        shape: tuple[int, int],
        read_rows: Callable[[slice], Tensor],
        bias: Tensor | None,
        dtype: torch.dtype,
        kept: Any = None,
    ) -> None:
        self.shape, self.bias = shape, bias
        num_rows, num_cols = shape
        first = read_rows(slice(0, 1))
        self.dtype = first.dtype if first.dtype.itemsize == 2 else dtype
        self.fields = {"floats": NUMBERS[str(self.dtype).replace("torch.", "IN_").upper()]}
        blocks_shape = (-(-num_rows // BLOCK_ROWS), BLOCK_ROWS * num_cols)
        self.blocks, is_filled = weight_blocks(blocks_shape, self.dtype, self.fields, kept)
        if is_filled:
            return
        step = -(-LOAD_WEIGHTS // num_cols // BLOCK_ROWS) * BLOCK_ROWS
        for start in range(0, num_rows, step):
            rows = read_rows(slice(start, min(start + step, num_rows))).contiguous()
            run_kernel(
                "lay_floats",
                self.blocks[start // BLOCK_ROWS :][: -(-len(rows) // BLOCK_ROWS)],
                rows=rows.to(self.dtype),
                num_rows=len(rows),
                cols=num_cols,
                **self.fields,
            )


def advise(floats: list[NativeLinear]) -> None:
    """Say, once, what --quantize q8 would gain for a model of so many floats."""
    num_bytes = sum(part.nbytes for part in floats)
    packed = 1.0625 * sum(part.shape[0] * part.shape[1] for part in floats)
    if num_bytes >= LARGE:
        warn_once(
            f"note: the weights take {human_bytes(num_bytes)}; --quantize q8 would take "
            f"{human_bytes(packed)} and decode about {num_bytes / packed:.1f} times as fast"
        )
