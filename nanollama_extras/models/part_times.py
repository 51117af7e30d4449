"""How long each part of a decode step takes.

Adds       `part_times`: the seconds of a step by part, beside those of the whole step.
Seam       `DecodeSteps` that the native backend records: a list of kernel calls, which is run in
           pieces. On another backend, blocks run one by one from Python.
Imports    models.dissection, for the names of parts; models.tracing, for modules with other
           methods.
Remove     delete this file; `nanollama explain --run` then says that it needs it.

A clock is read between parts, in the order of the step, so that each part finds in the processor's
caches what it would find there. That takes time of its own: the sum of all parts is measured in
turns with the step as a whole, and both are given.
"""

from __future__ import annotations

import copy
import ctypes
import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from nanollama import Attention, Batch, extra
from nanollama_extras.models.dissection import kernel_lines, word_of
from nanollama_extras.models.tracing import derived

if TYPE_CHECKING:
    from nanollama import LLM, Decoder, Json

BETWEEN = "rest of the layers"  # norms and sums that are not in a block


class Marks:
    """Where parts end: places in a list of calls, or times."""

    def __init__(self, now: Callable[[], float]) -> None:
        self.now, self.ends = now, [("", now())]

    def end(self, part: str) -> None:
        """The work since the last mark belongs to `part`."""
        self.ends.append((part, self.now()))

    def begin(self) -> None:
        """A block begins: the work since the last mark was between blocks, or before them all."""
        self.end("embedding" if len(self.ends) == 1 else BETWEEN)

    def pieces(self) -> Iterator[tuple[str, float, float]]:
        """Part, begin and end of each piece that is not empty."""
        for (_, start), (part, end) in itertools.pairwise(self.ends):
            if end > start:
                yield part, start, end


def matrices_of(block: Any) -> str:
    """The name of the work of a block; of a mixer, without its keys and values, or its state."""
    is_mixer = isinstance(block, Attention) or hasattr(block, "num_floats")
    return f"{word_of(block)}, its matrices" if is_mixer else word_of(block)


def marked_block(block: Any, marks: Marks) -> Any:
    """A block that marks the end of what was before it, and its own."""
    kind, name = type(block), matrices_of(block)

    def call(self: Any, *args: Any, **rest: Any) -> Any:
        marks.begin()
        result = kind.__call__(self, *args, **rest)
        marks.end(name)
        return result

    return derived(block, {"__call__": call})


def marked_cache(cache: Any, marks: Marks) -> Any:
    """A KVCache that marks attention apart from the products around it."""
    kind = type(cache)

    def attend(self: Any, attn: Any, *args: Any) -> Any:
        marks.end(matrices_of(attn))
        result = kind.attend(self, attn, *args)
        marks.end(f"{word_of(attn)}, over keys and values")
        return result

    def run(self: Any, mixer: Any, *args: Any) -> Any:
        marks.end(matrices_of(mixer))
        result = kind.run(self, mixer, *args)
        marks.end(f"{word_of(mixer)}, its state")
        return result

    methods: dict[str, Callable[..., Any]] = {"attend": attend}
    if hasattr(kind, "run"):  # that of states holds another one, which attends
        methods = {"run": run}
    new: Any = object.__new__(type(kind.__name__, (kind,), methods))  # copies of some ask `cache`
    vars(new).update(vars(cache))
    if hasattr(kind, "run"):
        new.cache = marked_cache(cache.cache, marks)
    return new


def rewind(cache: Any, depth: int) -> None:
    """Let the next token be that after `depth` once more; a recurrent state goes on."""
    if "lengths" in vars(cache):
        cache.lengths[0] = depth
        cache.guesses[0] = {}


def marked_decoder(decoder: Decoder, marks: Marks) -> Any:
    """A copy of a decoder whose blocks mark their ends."""
    view = copy.copy(decoder)
    view.layers = []
    for layer in decoder.layers:
        new = derived(layer, {})
        for name in ("self_attn", "mamba", "mlp", "experts"):
            if callable(block := getattr(layer, name, None)):
                setattr(new, name, marked_block(block, marks))
        view.layers.append(new)
    return view


def synchronize(device: torch.device) -> None:
    """Wait for a device that computes on its own."""
    if device.type != "cpu":
        getattr(torch, device.type).synchronize()


def filled_cache(decoder: Decoder, depth: int) -> Any:
    """A cache for one sequence that holds `depth` random tokens."""
    cache, chunk = decoder.new_cache(1), 256
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(decoder.config.n_vocab, (depth,), generator=generator).tolist()
    cache.start(0, 0, 0, [*ids, 0])
    cache.reserve(0, depth + 1)
    for at in range(0, depth, chunk):
        new = ids[at : at + chunk]
        decoder.hidden(Batch([(0, at, new, 0)], decoder.device, decoder.row_tile), cache)
    return cache


Times = dict[str, float]  # part -> seconds


class RecordedParts:
    """A step that the native backend recorded, whole and in pieces."""

    method = "the recorded list of kernel calls, run in pieces"

    def __init__(self, decoder: Decoder, cache: Any, depth: int) -> None:
        """Raises KernelError where the step cannot be recorded."""
        self.native = extra("kernels.native", "kernels in C")
        marks = Marks(self.native.num_recorded)
        view = marked_decoder(decoder, marks)
        recorded = extra("kernels.recorded", "recorded steps")
        self.steps = recorded.DecodeCalls(view, marked_cache(cache, marks))
        self.marks, self.row = marks, (0, depth, [0], 1)
        calls = self.steps.calls.live[1]
        marks.ends.append(("head", len(calls)))
        self.kernels: dict[str, list[str]] = {}
        for part, start, end in marks.pieces():
            names = (kernel.__name__ for kernel, _ in calls[int(start) : int(end)])
            known = self.kernels.setdefault(part, [])
            known += [name for name in dict.fromkeys(names) if name not in known]

    def whole(self) -> float:
        """Seconds of the step as the engine runs it."""
        rewind(self.steps.cache, self.row[1])
        started = time.perf_counter()
        self.steps([self.row])
        return time.perf_counter() - started

    def parts(self) -> Times:
        """Seconds by part."""
        times: Times = {}
        library, calls = self.native.load_kernels(), self.steps.calls.steps
        size, threads = ctypes.sizeof(calls._type_), torch.get_num_threads()
        for part, start, end in self.marks.pieces():
            address = ctypes.c_void_p(ctypes.addressof(calls) + int(start) * size)
            started = time.perf_counter()
            library.replay(address, int(end - start), 1, threads)
            times[part] = times.get(part, 0.0) + time.perf_counter() - started
        return times


class PlainParts:
    """A step that Python runs block by block."""

    method = "blocks run one by one from Python"

    def __init__(self, decoder: Decoder, cache: Any, depth: int) -> None:
        self.decoder, self.cache, self.depth = decoder, cache, depth
        self.kernels: dict[str, list[str]] = {}
        if decoder.device.type != "cpu":
            self.method += ", with a wait for the device after each"

    def batch(self) -> Batch:
        return Batch([(0, self.depth, [0], 1)], self.decoder.device, self.decoder.row_tile)

    def now(self) -> float:
        synchronize(self.decoder.device)
        return time.perf_counter()

    def whole(self) -> float:
        """Seconds of the step without marks."""
        rewind(self.cache, self.depth)
        started = self.now()
        self.decoder(self.batch(), self.cache)
        return self.now() - started

    def parts(self) -> Times:
        """Seconds by part."""
        rewind(self.cache, self.depth)
        marks, times = Marks(self.now), Times()
        view, cache = marked_decoder(self.decoder, marks), marked_cache(self.cache, marks)
        marks.ends = [("", self.now())]
        view(self.batch(), cache)
        marks.end("head")
        for part, start, end in marks.pieces():
            times[part] = times.get(part, 0.0) + end - start
        return times


def part_times(llm: LLM, depth: int, num_rounds: int = 15) -> Json:
    """Times of a decode step after `depth` tokens: `step_s` of the whole step, a median; `parts`
    with the seconds and kernels of each part, in the round whose sum, `parts_s`, is the median; and
    by which `method`."""
    decoder = llm.engine.decoder
    with llm.engine.lock, torch.inference_mode():
        cache = filled_cache(decoder, depth)
        is_native = type(llm.engine.decode_steps).__name__ == "DecodeCalls"
        kind = RecordedParts if is_native else PlainParts
        step = kind(decoder, cache, depth)
        step.whole(), step.parts()
        rounds = [(step.whole(), step.parts()) for _ in range(num_rounds)]
    by_sum = sorted((times for _, times in rounds), key=lambda times: sum(times.values()))
    middle = by_sum[len(by_sum) // 2]
    lines = kernel_lines() if is_native else {}
    return {
        "method": step.method,
        "step_s": statistics.median(whole for whole, _ in rounds),
        "parts_s": sum(middle.values()),
        "parts": {
            part: {
                "seconds": seconds,
                "kernels": {name: lines[name] for name in step.kernels.get(part, ())},
            }
            for part, seconds in middle.items()
        },
    }
