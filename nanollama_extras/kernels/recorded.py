"""Recorded steps of the CPU backend: the kernel calls of a step as a list that C runs.

Adds       `DecodeCalls`, steps in which sequences decode and, beside them, pieces of prompts and
           drafts are read. `Arena`, the memory of their results. `Ahead`, the next step, which runs
           while Python chooses tokens.
Seam       `DecodeSteps` of nanollama.py; NativeBackend.record makes `recorded_steps`.
Imports    kernels.arrays, kernels.native
Remove     delete this file: Python then calls every kernel of every step.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import math
import time
import weakref
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from nanollama import Batch, Decoder, KernelError, KVCache, Rope, Rotation, Span, preferred
from nanollama_extras.kernels.arrays import torch
from nanollama_extras.kernels.native import (
    NUMBERS,
    STRUCTURES,
    KernelCalls,
    NativeKVCache,
    load_kernels,
    num_recorded,
)

if TYPE_CHECKING:
    from torch import Tensor

    from nanollama import Work


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
        new_choice: Any = preferred("kernels.thread_choice", "new_choice", lambda: None)
        self.threads = new_choice()
        self.has_turns = of_position and type(decoder).rotations is Decoder.rotations
        self.ahead: Ahead | None = None

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
        ahead = self.ahead
        if ahead and ahead.is_for(work):
            return self.decoder.capped(ahead.run(self, work, True))
        if ahead:
            ahead.stop(work)
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
            if ahead:
                return self.decoder.capped(ahead.run(self, work, False))
            self.run_timed(num)
        else:
            self.rotate(num)
            self.calls.run(num, 0, self.head)
            ends = [(span.row + span.num_new, span.num_rows) for span in spans]
            rows = [row for end, num in ends for row in range(end - num, end)]
            num = len(rows)
            self.end_states[:num] = self.all_states[rows]
            self.calls.run(num, self.end)
        return self.decoder.capped(self.results[num])

    def run_timed(self, num_rows: int) -> None:
        """Run a step with one row of each sequence, on as many threads as are fast now."""
        if self.threads is None:
            self.calls.run(num_rows, 0, self.end)
            return
        started = time.perf_counter()
        self.calls.run(num_rows, 0, self.end, self.threads.count)
        self.threads.learn(num_rows, time.perf_counter() - started)

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
            for old, new in zip(self.turned, self.turns_of(position)):
                old[row] = new[position % TURNS]

    def turns_of(self, position: int) -> list[Any]:
        """The arrays (TURNS, ..) of the rotations to a position and its neighbours"""
        block = position // TURNS
        if block not in self.turns:
            if len(self.turns) > 2 * self.num_sequences:
                del self.turns[next(iter(self.turns))]
            first = block * TURNS
            which = torch.from_numpy(np.arange(first, first + TURNS))
            self.turns[block] = self.rotations(which)
        return self.turns[block]


AHEAD_BITS = ("AHEAD_RAN", "AHEAD_WAITED", "AHEAD_BEGAN")


class Ahead:
    """The next step of the same sequences, with the likeliest tokens: a worker runs it while Python
    chooses tokens, a tenth of a small model's time. If Python chooses others, it is stopped.

    Its scores are written to another place than those of the step before, which Python reads."""

    most_sequences = 4
    least_odds = 0.6  # of a right guess; where they are less, steps ahead are only tried
    trials = 32  # steps between two trials where the odds are bad

    def __init__(self, steps: DecodeCalls) -> None:
        """Raises KernelError for a decoder whose steps cannot be run again, or have another end."""
        result, calls = steps.calls.result, steps.calls.live[1]
        _, head = calls[steps.end - 1]
        is_plain = type(steps.cache) is NativeKVCache and not steps.cache.ring
        is_linear = isinstance(head, STRUCTURES["linear_call"]) and head.num_parts == 1
        is_plain &= steps.has_turns and not hasattr(steps.decoder, "prepare")
        if not (is_plain and is_linear and head.out == result.data_ptr()):
            raise KernelError("no step runs ahead")
        other = torch.empty(*result.shape)
        self.outs = [result.data_ptr(), other.data_ptr()]
        self.results = [[x[:n] for n in range(len(x) + 1)] for x in (result, other)]
        self.now = 0  # which of them the next step fills
        self.strips = steps.cache.strips
        self.expected: list[tuple[int, int, Any]] = []  # slot, start, strip of each sequence
        self.ids, self.odds, self.num_steps = steps.token_ids, 1.0, 0
        self.turned = [(x.__array_interface__["data"][0], x.strides[0]) for x in steps.turned]
        self.moves = (STRUCTURES["move"] * (len(self.turned) * self.most_sequences))()
        self.call = STRUCTURES["decode_step"](
            steps=steps.calls.address,
            num_steps=steps.end,
            ids=self.ids.ctypes.data,
            spans=ctypes.addressof(steps.batch.memo["spans", False]),
            head=ctypes.addressof(head),
            moves=ctypes.addressof(self.moves),
        )
        self.address, kernels = ctypes.addressof(self.call), load_kernels()
        self.run_step, self.stop_ahead = kernels.run_step, kernels.stop_ahead
        # before the first of what a step reads and writes is freed, or the program ends
        weakref.finalize(steps, kernels.stop_ahead)

    def is_for(self, work: list[Work]) -> bool:
        """Whether this is the step that was begun."""
        return (
            0 < len(work) == len(self.expected)
            and self.are_expected(work)
            and all(new == [i] for (_, _, new, _), i in zip(work, self.ids))
        )

    def are_expected(self, work: list[Work]) -> bool:
        """Whether work is that of the step that was begun, but for the tokens."""
        return all(
            slot == its_slot and start == its_start and rows == 1 and self.strips[slot] is strip
            for (slot, start, _, rows), (its_slot, its_start, strip) in zip(work, self.expected)
        )

    def stop(self, work: list[Work]) -> None:
        """Stop the step ahead, since other work comes."""
        self.stop_ahead()
        if len(work) == len(self.expected) and self.are_expected(work):
            self.odds *= 15 / 16
        self.expected = []

    def run(self, steps: DecodeCalls, work: list[Work], is_begun: bool) -> Tensor:
        """The scores of a step whose input is written, or which was begun."""
        num, threads, result = len(work), steps.threads, self.results[self.now][len(work)]
        count = threads.count if threads else torch.get_num_threads()
        is_trial = threads and threads.trial  # of a number that a step ahead could not know
        goes_on = not is_trial and count > 1 and self.goes_on(work)
        self.call.num_tokens, self.call.num_threads = num, count
        if goes_on:
            self.prepare(steps, work)
        started = time.perf_counter()
        found = self.run_step(self.address, is_begun, goes_on)
        if threads and not (is_trial and is_begun):
            threads.learn(num, time.perf_counter() - started)
        ran, waited, began = (found >> NUMBERS[name] & 1 for name in AHEAD_BITS)
        if is_begun:  # without a free worker, or one that gets a core, nothing is gained
            self.odds += (ran * (1 - waited) - self.odds) / 16
        self.expected = []
        if began:
            self.now ^= 1
            self.expected = [(slot, start + 1, self.strips[slot]) for slot, start, *_ in work]
        return result

    def goes_on(self, work: list[Work]) -> bool:
        """Whether to run the next step ahead."""
        self.num_steps += 1
        return (
            (self.odds > self.least_odds or self.num_steps % self.trials == 0)
            and len(work) <= self.most_sequences
            and all(start + 1 < self.strips[slot].shape[3] for slot, start, *_ in work)
        )

    def prepare(self, steps: DecodeCalls, work: list[Work]) -> None:
        """Note where the rotations to the next positions are, and where scores go."""
        self.call.next_out = self.outs[1 - self.now]
        self.call.num_moves = len(work) * len(self.turned)
        moves = iter(self.moves)
        for row, (_, start, *_) in enumerate(work):
            for turns, (to, size) in zip(steps.turns_of(start + 1), self.turned):
                move, at = next(moves), (start + 1) % TURNS
                move.to, move.num_bytes = to + row * size, size
                move.source = turns.__array_interface__["data"][0] + at * size


def recorded_steps(decoder: Decoder, cache: KVCache) -> DecodeCalls:
    """Those of an engine, which run ahead where a step can be run again. Raises KernelError."""
    steps = DecodeCalls(decoder, cache)
    with contextlib.suppress(KernelError):
        steps.ahead = Ahead(steps)
    return steps


def arrays_of(rotations: dict[int | None, Rotation]) -> list[Any]:
    """The arrays of rotations, in their order"""
    return [x.numpy() for rotation in rotations.values() for x in rotation if x is not None]
