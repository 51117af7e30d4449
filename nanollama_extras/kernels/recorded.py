"""Recorded steps of the CPU backend: the kernel calls of a step as a list that C runs.

Adds       `DecodeCalls`, steps in which sequences decode and, beside them, pieces of prompts and
           drafts are read. `Arena`, the memory of their results.
Seam       `DecodeSteps` of nanollama.py; NativeBackend.record makes them.
Imports    kernels.arrays, kernels.native
Remove     delete this file: Python then calls every kernel of every step.
"""

from __future__ import annotations

import copy
import math
import weakref
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from nanollama import Batch, Decoder, KernelError, KVCache, Rope, Rotation, Span
from nanollama_extras.kernels.arrays import torch
from nanollama_extras.kernels.native import KernelCalls, num_recorded

if TYPE_CHECKING:
    from torch import Tensor

    from nanollama import Work
    from nanollama_extras.kernels.native import NativeKVCache


TURNS = 64  # positions


class Lent:
    """A buffer's memory. All arrays and tensors of it that NumPy and torch make refer to this."""

    def __init__(self, buffer: Any) -> None:
        self.__array_interface__ = buffer.__array_interface__


class Arena:
    """Memory for the results of recorded calls. Where nothing refers to a result any more, no later
    call reads it, and the next result of its size takes its place."""

    def __init__(self) -> None:
        self.free: dict[int, list[Any]] = {}  # bytes -> arrays of this size
        self.sizes: dict[int, int] = {}  # address -> bytes

    def empty(self, *shape: Any, dtype: Any = None, device: Any = "cpu") -> Tensor:
        """torch.empty, on the CPU"""
        dtype, size = dtype or torch.float32, shape if isinstance(shape[0], int) else shape[0]
        num_bytes = math.prod(size) * dtype.itemsize
        free = self.free.setdefault(num_bytes, [])
        buffer = free.pop() if free else torch.empty(num_bytes, dtype=torch.uint8).numpy()
        self.sizes[buffer.ctypes.data] = num_bytes
        lent = Lent(buffer)
        weakref.finalize(lent, free.append, buffer)  # when the last tensor is gone
        return torch.from_numpy(np.asarray(lent)).view(dtype).view(size)

    def owns(self, x: Tensor) -> bool:
        """Whether a tensor is a result, or a part of one."""
        address = x.data_ptr()
        return any(start <= address < start + size for start, size in self.sizes.items())


class DecodeCalls:
    """Steps recorded as the list of their kernel calls: run again from C, they leave out what
    Python does for each layer, a third of a small model's time.

    They are recorded once, for the most rows that they take, and take fewer just as well: a row of
    each sequence that decodes, more of a draft or of a piece of a prompt. They hold no address of a
    strip, since these are inputs: strips may move and change hands."""

    most_sequences = 16  # from there on, Python's share is small
    most_rows = 128

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        """Raises KernelError for a decoder that computes with other operators too."""
        if not hasattr(getattr(cache, "cache", cache), "fill"):  # that of states holds another
            raise KernelError("attention is not a native kernel")
        self.decoder, self.parts = decoder, decoder.parts()
        self.cache = cast("NativeKVCache", cache)
        self.num_sequences = min(len(cache.strips), self.most_sequences)
        self.most_new = 1 if hasattr(cache, "cache") else self.most_rows  # as states are recorded
        self.num_rows = self.num_sequences if self.most_new == 1 else self.most_rows
        self.batch = batch = Batch([(0, 0, [0], 1)] * self.num_rows, decoder.device, 1)
        batch.rotations = decoder.rotations(batch, cache)
        self.cache.new_tables(batch, self.num_rows)
        self.prepare = getattr(decoder, "prepare", lambda batch: None)  # before each step
        self.prepare(batch)
        self.calls = KernelCalls(self.step, Arena())
        # Between two steps, all that Python touches comes from memory: so it touches little.
        self.token_ids, self.positions = batch.token_ids.numpy(), batch.positions.numpy()
        self.all_states, self.end_states = self.hidden.numpy(), self.states.numpy()
        self.results = [self.calls.result[:num] for num in range(self.num_sequences + 1)]
        self.turns: dict[int, list[Any]] = {}  # by number of block
        self.turned = arrays_of(batch.rotations)
        of_position = all(type(rope).angles is Rope.angles for rope in decoder.ropes)
        self.has_turns = of_position and type(decoder).rotations is Decoder.rotations

    def step(self) -> Tensor:
        """The scores of `num_sequences` rows"""
        self.hidden = self.decoder.hidden(self.batch, self.cache)
        self.states = torch.empty(self.num_sequences, self.hidden.size(1))
        self.head = num_recorded()  # calls before the head's
        head, norm = self.decoder.lm_head, self.decoder.norm
        place = head(self.hidden[: self.num_sequences], norm=norm).data_ptr()
        self.end = num_recorded()  # calls of a step with one row of each sequence
        scores = head(self.states, norm=norm).float()
        assert scores.data_ptr() == place  # free memory of its size
        return scores

    def __call__(self, work: list[Work]) -> Tensor | None:
        """As in DecodeSteps."""
        spans, ids, positions = list[Span](), list[int](), list[int]()
        for slot, start, new, num_logits in work:
            spans.append(Span(slot, start, len(new), len(ids), num_logits))
            ids += new
            positions += range(start, start + len(new))
        if not self.takes(spans, ids):
            return None
        num = len(ids)
        self.token_ids[:num], self.positions[:num] = ids, positions
        self.batch.spans = spans
        self.cache.fill(self.batch)
        self.prepare(self.batch)
        if num == len(spans):
            self.turn(positions)
            self.calls.run(num, 0, self.end)
        else:
            self.rotate(num)
            self.calls.run(num, 0, self.head)
            ends = [(span.row + span.num_new, span.num_rows) for span in spans]
            rows = [row for end, num in ends for row in range(end - num, end)]
            num = len(rows)
            self.end_states[:num] = self.all_states[rows]
            self.calls.run(num, self.end)
        return self.decoder.capped(self.results[num])

    def takes(self, spans: list[Span], ids: list[int]) -> bool:
        """Whether such a step was recorded. One for a pooler, which has no logits, was not."""
        return (
            len(ids) <= self.num_rows
            and sum(span.num_rows for span in spans) <= self.num_sequences
            and all(span.num_rows and span.num_new <= self.most_new for span in spans)
            and not any(hasattr(i, "vector") for i in ids)
        )

    def rotate(self, num_rows: int) -> None:
        """Compute how the first rows are turned."""
        for old, new in zip(self.turned, self.rotations(self.batch.positions[:num_rows])):
            old[:num_rows] = new

    def rotations(self, positions: Tensor) -> list[Any]:
        """The arrays (N, ..) of the rotations to positions (N,)"""
        view = copy.copy(self.batch)
        view.positions = positions
        return arrays_of(self.decoder.rotations(view, self.cache))

    def turn(self, positions: list[int]) -> None:
        """Turn a row of each sequence: for TURNS positions, most rotations are computed once."""
        if not self.has_turns:
            self.rotate(len(positions))
            return
        for row, position in enumerate(positions):
            block, at = divmod(position, TURNS)
            if block not in self.turns:
                if len(self.turns) > 2 * self.num_sequences:
                    del self.turns[next(iter(self.turns))]
                first = block * TURNS
                which = torch.from_numpy(np.arange(first, first + TURNS))
                self.turns[block] = self.rotations(which)
            for old, new in zip(self.turned, self.turns[block]):
                old[row] = new[at]


def arrays_of(rotations: dict[int | None, Rotation]) -> list[Any]:
    """The arrays of rotations, in their order"""
    return [x.numpy() for rotation in rotations.values() for x in rotation if x is not None]
