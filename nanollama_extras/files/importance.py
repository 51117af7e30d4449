"""How much each column of a model's matrices matters: the mean square of its operand over a text.

Adds       `importance`, which runs a model over a text. The squared error of a product is about the
           sum of the squared errors of weights, each times the mean square of what it multiplies,
           so quantizers weigh errors by it.
Seam       `Weights.adapter`: `Recorder.wrap` sees every matrix. commands/convert.py calls it.
Remove     delete this file; `nanollama convert --text` then says that it needs it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanollama import (
    Batch,
    Checkpoint,
    Decoder,
    Norm,
    Projection,
    Weights,
    available_memory,
    extra_object,
    find_family,
    operand,
)


@dataclass(slots=True)
class Recorder:
    """Sums of squares of operands by the names of matrices."""

    sums: dict[str, Tensor] = field(default_factory=dict)  # (cols,) each
    counts: dict[str, int] = field(default_factory=dict)

    def wrap(
        self, weights: Weights, projection: Projection, outputs: Mapping[str, int], num_cols: int
    ) -> Projection:
        return Recorded(projection, tuple(outputs), self)

    def check_used(self) -> None:
        """Every matrix counts."""

    def add(self, names: tuple[str, ...], x: Tensor) -> None:
        """Add the rows of an operand (N, cols)."""
        square = x.float().square().sum(0)
        for name in names:
            self.sums[name] = self.sums[name] + square if name in self.sums else square
            self.counts[name] = self.counts.get(name, 0) + len(x)

    def means(self) -> dict[str, Tensor]:
        return {name: total / self.counts[name] for name, total in self.sums.items()}


class Recorded(Projection):
    """A projection whose operands are recorded."""

    def __init__(self, base: Projection, names: tuple[str, ...], recorder: Recorder) -> None:
        super().__init__(base.parts)
        self.base, self.names, self.recorder = base, names, recorder

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None = None,
        act: str = "",
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        x = operand(x, norm, act)
        self.recorder.add(self.names, x)
        return self.base(x, residual=residual, out=out)


def importance(checkpoint: Checkpoint, windows: Iterable[list[int]]) -> dict[str, Tensor]:
    """The mean square of each column's operand, by the decoder's name of a matrix, over windows of
    token ids. Raises CheckpointError."""
    recorder = Recorder()
    files, device = (checkpoint.tensors, str(checkpoint.path)), torch.device("cpu")
    is_large = 4 * checkpoint.num_parameters > available_memory(device) / 2
    bits = 8 if is_large else None
    weights = Weights(*files, device, torch.float32, bits, adapter=recorder)
    place = find_family(checkpoint.config.model_type).decoder
    new_decoder = extra_object(place, "a decoder") if place else Decoder
    with torch.inference_mode():
        decoder = new_decoder(checkpoint.config, weights)
        for ids in windows:
            cache = decoder.new_cache(1, len(ids))
            cache.reserve(0, len(ids))
            decoder(Batch([(0, 0, ids, len(ids))], decoder.device, decoder.row_tile), cache)
    return recorder.means()
