"""Layers that keep a state of fixed size of each sequence, instead of keys and values.

Adds       `RecurrentCache`, a KVCache beside these states; `RecurrentMixer`, the base of such
           layers; `RecurrentDecoder`. A state cannot be cut: a text may resume only where one was
           saved. States are saved after the first and the last two turns of a prompt, at its end,
           where an answer ended, and every SAVE_EVERY tokens; the oldest go when they take more
           than --state-mb.
Seam       Family.decoder names a `RecurrentDecoder`, whose layers make their mixers; ModelConfig's
           `windows` has 0 for a layer without keys, `state_bytes` the size of all states.
Remove     delete this file and the mixers beside it; such a model then says that it needs them.

A rejected guess must leave no trace. So only the tokens before the guesses go into the state; the
guesses' inputs are kept, and those that were right go into the state before the next step:

    tokens     [ .. in the state .. | last token | guess | guess | guess ]
    next step  [ .. in the state ..              | guess ] last token, ...    one guess was right
"""

from __future__ import annotations

import ctypes
import itertools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
from torch import Tensor

from nanollama import Batch, Decoder, Norm, Rotation, Span

if TYPE_CHECKING:
    from nanollama import KVCache, ModelConfig, Weights

SAVE_EVERY = 1024  # tokens
NEAR = 16  # tokens: a prompt that ends so near to a turn's end is not saved at both places
MOST_GUESSES = 64  # of a draft: the limit of --lookup


class StateSpan(NamedTuple):
    """`num_new` tokens of a sequence, rows `row`.. of a batch, and the states (floats) of it."""

    state: Tensor
    num_new: int
    row: int


class Saved(NamedTuple):
    """A copy of the states of a sequence; the smallest age is the oldest."""

    state: Tensor
    age: int


class Round(NamedTuple):
    """Spans to run together; then each pair's second state becomes a copy of the first one."""

    spans: Any  # list[StateSpan], or a backend's table of them
    copies: list[tuple[Tensor, Tensor]]


Inputs = tuple[Tensor, ...]  # of a layer's state, (N, ..) each


class RecurrentMixer:
    """A layer with a state: `inputs`, then `scan` takes them through the state, then `out_proj`."""

    out_proj: Any
    width: int  # columns of what out_proj gets
    num_floats: int  # of its state
    kernel: str  # the native one
    run_kernel: Callable[..., Tensor] | None  # the backend's, if it has the kernel for these sizes
    first = 0  # place of its state among those of all layers

    def inputs(self, x: Tensor, norm: Norm | None) -> Inputs:
        """x (N, C) -> what `scan` takes"""
        raise NotImplementedError

    def scan(
        self, inputs: Inputs, spans: Any, out: Tensor | None, first: int | None = None
    ) -> Tensor:
        """Take the rows of `spans` of the inputs into the states -> their rows of `out` (N, width),
        which is made if it is None. This layer's part of each state begins at `first`."""
        x, first = inputs[0], self.first if first is None else first
        if out is None:
            out = torch.empty(x.size(0), self.width, dtype=x.dtype, device=x.device)
        if self.run_kernel is not None:
            place = {"spans": ctypes.addressof(spans), "first": first}
            return self.run_kernel(self.kernel, out, **place, **self.kernel_fields(inputs))
        for span in spans:
            rows = slice(span.row, span.row + span.num_new)
            state = span.state[first : first + self.num_floats]
            out[rows] = self.scan_span(tuple(each[rows] for each in inputs), state).to(x.dtype)
        return out

    def kernel_fields(self, inputs: Inputs) -> dict[str, Any]:
        """The other fields of the kernel's structure."""
        raise NotImplementedError

    def scan_span(self, inputs: Inputs, state: Tensor) -> Tensor:
        """`scan` by torch, of the inputs (n, ..) of one sequence and this layer's part of its state
        -> (n, width)"""
        raise NotImplementedError

    def part(self, state: Tensor) -> Tensor:
        """This layer's part of the states of a sequence."""
        return state[self.first : self.first + self.num_floats]

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None,
        rotation: Rotation,
        cache: KVCache,
        batch: Batch,
        residual: Tensor | None,
    ) -> Tensor:
        out = cast("RecurrentCache", cache).run(self, self.inputs(x, norm), batch)
        return cast("Tensor", self.out_proj(out, residual=residual))


class RecurrentCache:
    """A KVCache for the layers with keys and values, and the states of the other layers."""

    def __init__(
        self,
        cache: KVCache,
        mixers: list[RecurrentMixer],
        num_slots: int,
        table: Callable[[list[StateSpan]], Any] = list,
        end_ids: frozenset[int] = frozenset(),
        state_mb: int = 0,
    ) -> None:
        """`table` makes a list of spans into a table of the backend's. `end_ids` end a turn."""
        self.cache, self.table, self.end_ids = cache, table, end_ids
        for mixer, first in zip(mixers, itertools.accumulate([0, *(m.num_floats for m in mixers)])):
            mixer.first = first
        self.num_floats = sum(mixer.num_floats for mixer in mixers)
        self.most_floats = max(mixer.num_floats for mixer in mixers)
        self.rooms: list[Tensor] = []  # for one layer's state each, of a sequence with guesses
        self.most_saved = (state_mb << 20) // (4 * self.num_floats)
        self.states: list[Tensor | None] = [None] * num_slots
        self.lengths = [0] * num_slots  # tokens in each state
        # each layer's inputs of guesses after these tokens
        self.guesses: list[dict[RecurrentMixer, Inputs]] = [{} for _ in range(num_slots)]
        self.points: list[set[int]] = [set() for _ in range(num_slots)]  # to save the state at
        self.saved: list[dict[int, Saved]] = [{} for _ in range(num_slots)]  # by length
        self.ages = itertools.count()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    @property
    def nbytes(self) -> int:
        num_states = len(self.saved_ages()) + sum(state is not None for state in self.states)
        return self.cache.nbytes + 4 * self.num_floats * num_states

    def saved_ages(self) -> list[int]:
        """The ages of all saved states; slots whose texts begin the same way share some."""
        return sorted({kept.age for saved in self.saved for kept in saved.values()})

    def resumable(self, slot: int, num_tokens: int, length: int) -> int:
        """As KVCache.resumable: the longest beginning of which there is, or will be, a state."""
        live = self.lengths[slot]
        most_live = min(num_tokens, live + self.num_guesses(slot))
        future = {point for point in self.points[slot] if point > live}
        known = {0, *self.saved[slot], *future, *range(live, most_live + 1)}
        longest = max(at for at in known if at <= num_tokens)
        return self.cache.resumable(slot, longest, length)

    def num_guesses(self, slot: int) -> int:
        return next((len(inputs[0]) for inputs in self.guesses[slot].values()), 0)

    def start(self, source: int, target: int, num_tokens: int, token_ids: list[int]) -> None:
        """As KVCache.start, from a saved state or the one that `source` has."""
        self.cache.start(source, target, num_tokens, token_ids)
        if num_tokens and num_tokens not in self.saved[source]:
            self.settle(source, num_tokens)
            self.save(source)  # the end of an answer
        saved = {at: kept for at, kept in self.saved[source].items() if at <= num_tokens}
        if num_tokens and (source != target or self.lengths[source] != num_tokens):
            live, kept = self.states[source], saved.get(num_tokens)
            state = kept.state if kept else live
            assert state is not None
            self.states[target] = state.clone()
        self.saved[target] = saved if num_tokens else {}
        self.lengths[target] = num_tokens
        self.guesses[target] = {}
        self.points[target] = self.choose_points(token_ids) if self.most_saved else set()

    def choose_points(self, token_ids: list[int]) -> set[int]:
        """Lengths of a prompt at which its state is saved."""
        last = len(token_ids) - 1  # a text that begins the same way processes its last token anew
        ends = [i + 1 for i, token_id in enumerate(token_ids[:-1]) if token_id in self.end_ids]
        points = {*ends[:1], *ends[-2:]}
        return points if ends and last - ends[-1] < NEAR else {*points, last}

    def save(self, slot: int, length: int | None = None) -> Tensor | None:
        """Save the states of a slot. For another `length`, only make room -> the room for a copy"""
        state, at = self.states[slot], self.lengths[slot] if length is None else length
        if not self.most_saved or state is None or at in self.saved[slot]:
            return None
        ages = self.saved_ages()
        if len(ages) >= self.most_saved:
            for saved in self.saved:
                for oldest in [key for key, kept in saved.items() if kept.age == ages[0]]:
                    del saved[oldest]
        copy = state.clone() if length is None else torch.empty_like(state)
        self.saved[slot][at] = Saved(copy, next(self.ages))
        return copy

    def settle(self, slot: int, length: int) -> None:
        """Take the first guesses into the state, so that it has `length` tokens."""
        state = self.states[slot]
        if state is None:
            new = torch.zeros(self.num_floats, device=self.cache.strips[0].device)
            state = self.states[slot] = new
        if length == 0:
            state.zero_()
            self.lengths[slot], self.guesses[slot] = 0, {}
        num_right = length - self.lengths[slot]
        assert 0 <= num_right <= self.num_guesses(slot), "a state cannot be cut"
        if num_right:
            spans = self.table([StateSpan(state, num_right, 0)])
            for mixer, inputs in self.guesses[slot].items():
                mixer.scan(tuple(x[:num_right] for x in inputs), spans, None)
                self.guesses[slot][mixer] = tuple(x[num_right:] for x in inputs)
            self.lengths[slot] = length

    def begin(self, spans: Iterable[Span]) -> None:
        """Bring the states of spans to the length at which each span starts."""
        for span in spans:
            self.settle(span.slot, span.start)
            self.guesses[span.slot] = {}
            if span.start and (
                span.start in self.points[span.slot] or span.start % SAVE_EVERY == 0
            ):
                self.save(span.slot)

    def rounds(self, batch: Batch) -> list[Round]:
        """How the rows of a batch go through the states: cut where a state is saved. Guesses come
        after all of them."""
        if "rounds" in batch.memo:
            return cast("list[Round]", batch.memo["rounds"])
        self.begin(batch.spans)
        columns = list(itertools.zip_longest(*map(self.pieces, batch.spans)))
        rounds = batch.memo["rounds"] = []
        for column in columns:
            found = [piece for piece in column if piece is not None]
            copies = [(piece.state, copy) for piece, copy in found if copy is not None]
            rounds.append(Round(self.table([piece for piece, _ in found]), copies))
        batch.memo["guesses"] = self.guess_round(batch.spans)
        return rounds

    def guess_round(self, spans: list[Span]) -> Round:
        """The guesses of spans, which go through copies of one layer's state at a time: these stay
        in the processor's cache."""
        pieces: list[StateSpan] = []
        copies: list[tuple[Tensor, Tensor]] = []
        for span in spans:
            state, done = self.states[span.slot], self.lengths[span.slot] - span.start
            if done < span.num_new:
                assert state is not None
                if len(self.rooms) == len(pieces):
                    self.rooms.append(torch.empty(self.most_floats, device=state.device))
                room = self.rooms[len(pieces)]
                pieces.append(StateSpan(room, span.num_new - done, span.row + done))
                copies.append((state, room))
        return Round(self.table(pieces), copies)

    def pieces(self, span: Span) -> list[tuple[StateSpan, Tensor | None]]:
        """The pieces of a span without its guesses, with the tensor that gets a copy of the state
        after each one."""
        slot, state = span.slot, self.states[span.slot]
        assert state is not None
        num_guesses = max(0, min(span.num_rows, span.num_new, MOST_GUESSES + 1) - 1)
        stop = span.start + span.num_new
        end = stop - num_guesses
        every = range(span.start // SAVE_EVERY * SAVE_EVERY, end, SAVE_EVERY)
        cuts = sorted(at for at in {*every, *self.points[slot]} if span.start < at < end)
        found: list[tuple[StateSpan, Tensor | None]] = []
        for start, cut in itertools.pairwise([span.start, *cuts, end]):
            copy = self.save(slot, cut) if cut < end else None
            found.append((StateSpan(state, cut - start, span.row + start - span.start), copy))
        self.lengths[slot] = end
        return found

    def run(self, mixer: RecurrentMixer, inputs: Inputs, batch: Batch) -> Tensor:
        """Take a batch's inputs through a layer's states -> the layer's `scan` of them"""
        if "states" in batch.memo:  # a recorded step
            return mixer.scan(inputs, batch.memo["states"], None)
        out = None
        for spans, copies in self.rounds(batch):
            out = mixer.scan(inputs, spans, out)
            for state, copy in copies:
                mixer.part(copy).copy_(mixer.part(state))
        spans, copies = batch.memo["guesses"]
        for state, room in copies:
            room[: mixer.num_floats].copy_(mixer.part(state))
        out = mixer.scan(inputs, spans, out, 0) if copies else out
        for span in batch.spans:
            stop = span.start + span.num_new
            if self.lengths[span.slot] < stop:
                first = span.row + self.lengths[span.slot] - span.start
                rows = slice(first, span.row + span.num_new)
                self.guesses[span.slot][mixer] = tuple(x[rows].clone() for x in inputs)
        assert out is not None
        out[sum(span.num_new for span in batch.spans) :] = 0  # rows that only pad the batch
        return out

    # -- recorded steps --------------------------------------------------------------------------

    def new_tables(self, batch: Batch, num_rows: int) -> None:
        """Put what a recorded step reads into a batch; `fill` changes it."""
        self.cache.new_tables(batch, num_rows)  # type: ignore[attr-defined]
        nothing = torch.zeros(0)
        batch.memo["states"] = self.table([StateSpan(nothing, 1, i) for i in range(num_rows)])

    def fill(self, batch: Batch) -> None:
        """Write the spans of a step with one token for each into its tables."""
        self.cache.fill(batch)  # type: ignore[attr-defined]
        self.begin(batch.spans)
        states = [cast("Tensor", self.states[span.slot]) for span in batch.spans]
        filled = self.table([StateSpan(state, 1, row) for row, state in enumerate(states)])
        for i, entry in enumerate(filled):
            batch.memo["states"][i] = entry
        for span in batch.spans:
            self.lengths[span.slot] += 1


class RecurrentDecoder(Decoder):
    """A Decoder some of whose layers have a RecurrentMixer."""

    def __init__(self, config: ModelConfig, weights: Weights, kv_dtype: str = "auto") -> None:
        super().__init__(config, weights, kv_dtype)
        parts = [part for layer in self.layers for part in vars(layer).values()]
        self.mixers = [part for part in parts if isinstance(part, RecurrentMixer)]
        self.is_recordable = hasattr(self.backend, "state_table")

    def new_cache(self, num_slots: int, most_new: int = 0, **saving: Any) -> KVCache:
        cache = super().new_cache(num_slots, most_new)
        if not self.mixers:
            return cache
        is_native = all(mixer.run_kernel for mixer in self.mixers)
        table = self.backend.state_table if is_native else list  # type: ignore[attr-defined]
        new = RecurrentCache(cache, self.mixers, num_slots, table, **saving)
        return cast("KVCache", new)
