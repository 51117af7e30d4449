"""`--prompt-cache DIR`: what is computed of prompts, in files: a machine reads each prompt once.

Adds       `attach`, which makes an engine's scheduler keep the keys and values of prompts in a
           `files.block_store`, and take them from there where a new prompt begins with the same
           tokens. An answer is the same, bit for bit. Imports files.block_store.
Seam       LLM calls `attach` with `EngineConfig.prompt_cache`, LLM.forget calls `leave`, and
           commands.details `add_details`. The scheduler's `admit`, `schedule` and `retire` are
           extended; a block is the bytes of KVCache's strips and rings, and of the states that
           models.recurrent saves.
Remove     delete this file and files/block_store.py; the options then say that they need it.

A prompt is cut into blocks of BLOCK tokens. A block's key is a hash of the model, of all tokens
before the block and of its own, so equal keys mean equal bytes:

    tokens   [ system prompt and tools ........................ | question ]
    blocks   [ block 0 ][ block 1 ][ block 2 ][ block 3 ][ block 4 ][ ..
    key        h(model, 0)  h(key 0, 1)  h(key 1, 2) ..

A block is copied after the step that completes it, and written by another thread. A prompt whose
first blocks are there is admitted as usual; while others decode, each step takes the blocks that a
third thread has read by then, for at most MOST_S, and steps wait for them where nothing else runs.
Layers with a state resume where a state is there, too; it is saved at the ends of blocks before the
points of models.recurrent.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import logging
import math
import platform
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nanollama import (
    WORTH_WAITING,
    CheckpointError,
    KVCache,
    Scheduler,
    __version__,
    human_bytes,
    log,
)
from nanollama_extras.files.block_store import BlockStore, Payload, describe, model_marks

if TYPE_CHECKING:
    from nanollama import LLM, Engine, EngineConfig, Json, Sequence

BLOCK = 128  # tokens; a multiple of KV_BLOCK
FORMAT = 2
AHEAD = 4  # blocks that are read before the scheduler takes them
MOST_S = 0.005  # seconds of a step for blocks, while others decode
MOST_IDLE_S = 0.1  # while no other does: a server then looks for new requests

Read = Future["Payload | None"]


# ---- what a block belongs to ---------------------------------------------------------------------


def arithmetic(engine: Engine) -> list[str]:
    """What else the bytes depend on: how this machine computes. Native kernels name their
    instructions, and give the same with any number of threads."""
    decoder = engine.decoder
    marks = [decoder.kernels, str(decoder.dtype), decoder.kv_dtype, platform.machine()]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        marks.append(importlib.metadata.version("torch"))
    if not decoder.kernels.startswith("native"):
        import torch

        marks += [torch.backends.cpu.get_cpu_capability(), str(torch.get_num_threads())]
        if decoder.device.type == "cuda":
            marks.append(torch.cuda.get_device_name(decoder.device))
    return marks


def plain_caches(cache: Any) -> list[KVCache]:
    """The KVCaches that a cache consists of; none for a kind whose states are not known here."""
    place = f"{type(cache).__module__}.{type(cache).__qualname__}"
    if isinstance(cache, KVCache):
        return [cache] if type(cache).resumable is KVCache.resumable else []
    inner = {
        "nanollama_extras.models.grouped_cache.GroupedCache": "caches",
        "nanollama_extras.models.recurrent.RecurrentCache": "cache",
    }.get(place)
    parts = getattr(cache, inner) if inner else []
    found = [plain_caches(part) for part in (parts if isinstance(parts, list) else [parts])]
    return [each for own in found for each in own] if all(found) else []


# ---- the bytes of a block ------------------------------------------------------------------------


def host(x: Any) -> npt.NDArray[Any]:
    """A tensor as an array: the same memory, or a copy of what is on a GPU."""
    array: npt.NDArray[Any] = (x if x.device.type == "cpu" else x.cpu()).numpy()
    return array


def assign(x: Any, at: Any, values: npt.NDArray[Any]) -> None:
    """x[:, :, :, at] = values"""
    if x.device.type == "cpu":
        host(x)[:, :, :, at] = values
    else:
        import torch

        x[:, :, :, at] = torch.from_numpy(values).to(x.device)


class Layout:
    """Where the keys and values of a block are in the payload of its file: of each KVCache, those
    of the strip and those of the ring, each (planes, L, Hkv, BLOCK, bytes of a head)"""

    def __init__(self, caches: list[KVCache]) -> None:
        self.caches = caches
        strips = [strip for cache in caches for strip in (cache.strips[0], cache.rings[0])]
        self.shapes = [(*s.shape[:3], BLOCK, s.shape[4]) for s in strips]
        self.num_bytes = sum(map(math.prod, self.shapes))

    def parts(self, payload: Payload) -> Iterator[tuple[KVCache, bool, npt.NDArray[np.uint8]]]:
        """Each cache, whether it is about its ring, and the part of the payload, unless empty"""
        start = 0
        for i, shape in enumerate(self.shapes):
            end = start + math.prod(shape)
            if end > start:
                yield self.caches[i // 2], bool(i % 2), payload[start:end].reshape(shape)
            start = end

    def holds(self, slot: int, index: int) -> bool:
        """Whether rings still have the whole block `index` of a slot."""
        return all(
            not cache.ring or index * BLOCK >= cache.written[slot] - cache.ring
            for cache in self.caches
        )

    def copy(self, slot: int, index: int) -> Payload:
        """The payload of block `index` of a slot."""
        payload = np.empty(self.num_bytes, np.uint8)
        for cache, in_ring, values in self.parts(payload):
            at: Any = slice(index * BLOCK, (index + 1) * BLOCK)
            if in_ring:
                at = np.arange(at.start, at.stop) % cache.ring
            kept = cache.rings[slot] if in_ring else cache.strips[slot][:, :, :, at]
            values[...] = host(kept)[:, :, :, at] if in_ring else host(kept)
        return payload

    def paste(self, slot: int, index: int, payload: Payload) -> None:
        """Put a payload into a slot, which has room for it."""
        for cache, in_ring, values in self.parts(payload):
            at: Any = slice(index * BLOCK, (index + 1) * BLOCK)
            if in_ring:
                at = np.arange(at.start, at.stop) % cache.ring
            assign((cache.rings if in_ring else cache.strips)[slot], at, values)


# ---- prompts and their blocks --------------------------------------------------------------------


@dataclass(slots=True)
class Plan:
    """What is done for one sequence."""

    keys: list[str]  # of the blocks of its prompt
    regime: int  # of the RoPE
    used: int  # time of use of its files
    num_kept: int = 0  # leading blocks that need not be written
    num_taken: int = 0  # leading blocks that are in the slot
    num_wanted: int = 0  # leading blocks that are to be taken from files
    reads: deque[Read] = field(default_factory=deque)  # of blocks from num_taken on
    state: Read | None = None  # of the end of those wanted
    num_states: set[int] = field(default_factory=set)  # blocks at whose ends states are kept

    @property
    def is_reading(self) -> bool:
        return self.num_taken < self.num_wanted

    def time_of(self, index: int) -> int:
        """A block goes after those behind it, which are of no use without it."""
        return self.used - 1000 * index


class PromptCache:
    """The blocks of one engine's prompts."""

    def __init__(self, engine: Engine, store: BlockStore, marks: Json) -> None:
        """`marks`: what the model is."""
        self.cache: Any = engine.cache
        self.store, self.decoder, self.parts = store, engine.decoder, engine.decoder.parts()
        self.has_changed = False  # a weight, in place
        self.layout = Layout(plain_caches(engine.cache))
        self.state_floats = getattr(engine.cache, "num_floats", 0)  # models.recurrent has it
        marks = {"format": FORMAT, "block": BLOCK, "shapes": self.layout.shapes, **marks}
        self.model = hashlib.blake2b(json.dumps(marks).encode(), digest_size=20).hexdigest()

    def is_of_model(self) -> bool:
        """Whether the model still computes what its files say."""
        return not self.has_changed and self.decoder.parts() == self.parts

    def keys(self, token_ids: list[int], regime: int) -> list[str]:
        """A key for each whole block of ids. An image, and what follows it, is in none."""
        plain = next((i for i, token in enumerate(token_ids) if type(token) is not int), None)
        ids = np.array(token_ids[:plain], "<i8")
        key, keys = f"{self.model} {regime}", []
        for start in range(0, len(ids) - BLOCK + 1, BLOCK):
            data = key.encode() + ids[start : start + BLOCK].tobytes()
            keys.append(key := hashlib.blake2b(data, digest_size=20).hexdigest())
        return keys

    def head(self, kind: str, key: str) -> bytes:
        """The first line of a file."""
        about = {"nanollama": "prompt cache", "format": FORMAT, "kind": kind}
        return json.dumps({**about, "model": self.model, "key": key}).encode() + b"\n"

    def open(self, seq: Sequence) -> Plan:
        """The plan for a sequence that has just been admitted."""
        regime = self.layout.caches[0].regime_of(len(seq.token_ids))
        plan = Plan(self.keys(seq.token_ids[: seq.num_prompt], regime), regime, time.time_ns())
        for index, key in enumerate(plan.keys):
            if not self.store.has(f"{key}.kv"):
                break
            plan.num_kept = index + 1
        kept = enumerate(plan.keys[: plan.num_kept])
        self.store.use({f"{key}.kv": plan.time_of(index) for index, key in kept})
        # the last token of the prompt, and those with prompt_logprobs, are read anew, for logits
        most = (seq.logprobs_from if seq.params.prompt_logprobs else seq.num_prompt) - 1
        wanted = min(plan.num_kept, most // BLOCK)
        while self.state_floats and wanted and not self.store.has(f"{plan.keys[wanted - 1]}.state"):
            wanted -= 1
        if wanted * BLOCK >= seq.num_cached + WORTH_WAITING:
            plan.num_taken, plan.num_wanted = seq.num_cached // BLOCK, wanted
            self.read_ahead(plan)
            if self.state_floats:
                key = plan.keys[wanted - 1]
                size = 4 * self.state_floats
                plan.state = self.store.fetch(f"{key}.state", self.head("state", key), size)
        return plan

    def read_ahead(self, plan: Plan) -> None:
        """Let the next blocks be read."""
        while len(plan.reads) < AHEAD and plan.num_taken + len(plan.reads) < plan.num_wanted:
            key = plan.keys[plan.num_taken + len(plan.reads)]
            read = self.store.fetch(f"{key}.kv", self.head("kv", key), self.layout.num_bytes)
            plan.reads.append(read)

    def take(self, seq: Sequence, plan: Plan) -> None:
        """Put the next block into the slot; after the last one, the sequence has them all."""
        payload = plan.reads.popleft().result()
        if payload is None:  # damaged, or deleted meanwhile
            plan.num_wanted = plan.num_kept = plan.num_taken
        else:
            self.cache.reserve(seq.slot, plan.num_wanted * BLOCK)
            self.layout.paste(seq.slot, plan.num_taken, payload)
            plan.num_taken += 1
            self.read_ahead(plan)
        if not plan.is_reading:
            self.resume(seq, plan, is_whole=payload is not None)

    def resume(self, seq: Sequence, plan: Plan, is_whole: bool) -> None:
        """Let a sequence go on after the blocks in its slot, or from its start without a state."""
        num_tokens = plan.num_taken * BLOCK
        if self.state_floats:
            state = plan.state.result() if plan.state and is_whole else None
            if state is None:
                begin_anew(self.cache, seq)
                return
            set_state(self.cache, seq.slot, num_tokens, state)
            key = plan.keys[plan.num_taken - 1]
            self.store.use({f"{key}.state": plan.time_of(plan.num_taken)})
            plan.num_states.add(plan.num_taken)
        seq.num_computed = seq.num_cached = max(num_tokens, seq.num_cached)
        text = f"{num_tokens} of {seq.num_prompt} tokens come from {self.store.folder}"
        log.debug(f"prompt cache: {text}")

    def keep(self, seq: Sequence, plan: Plan, most: int) -> None:
        """Copy at most `most` blocks that a sequence has computed and no file has."""
        num_done = min(seq.num_computed // BLOCK, len(plan.keys))
        if plan.num_kept >= num_done or self.layout.caches[0].regimes[seq.slot] != plan.regime:
            num_done = 0
        for index in range(plan.num_kept, min(num_done, plan.num_kept + most)):
            key = plan.keys[index]
            if not self.store.has(f"{key}.kv"):
                if not self.store.takes(self.layout.num_bytes):
                    break  # before the copy: this is asked again at each step
                if not self.layout.holds(seq.slot, index):
                    plan.keys = plan.keys[:index]  # those behind it are of no use without it
                    break
                payload = self.layout.copy(seq.slot, index)
                head = self.head("kv", key)
                if not self.store.put(f"{key}.kv", head, payload, plan.time_of(index)):
                    break
            plan.num_kept = index + 1
        if self.state_floats:
            self.keep_states(seq, plan)

    def keep_states(self, seq: Sequence, plan: Plan) -> None:
        """Keep the states that were saved at the ends of blocks; they do not change any more."""
        for at, saved in list(self.cache.saved[seq.slot].items()):
            index = at // BLOCK
            if at % BLOCK or not 0 < at <= seq.num_computed or index in plan.num_states:
                continue
            if index <= plan.num_kept and index <= len(plan.keys):
                key = plan.keys[index - 1]
                payload = host(saved.state).view(np.uint8)
                name, head = f"{key}.state", self.head("state", key)
                if self.store.has(name) or self.store.put(name, head, payload, plan.time_of(index)):
                    plan.num_states.add(index)


def begin_anew(cache: Any, seq: Sequence) -> None:
    """Let a sequence compute its whole prompt."""
    cache.start(seq.slot, seq.slot, 0, seq.token_ids)
    seq.num_computed = seq.num_cached = 0


def set_state(cache: Any, slot: int, num_tokens: int, payload: Payload) -> None:
    """Give a slot of a RecurrentCache the states after `num_tokens` tokens."""
    import torch

    floats = torch.from_numpy(payload.copy().view(np.float32))
    cache.states[slot] = floats.to(cache.cache.strips[0].device)
    cache.lengths[slot], cache.guesses[slot] = num_tokens, {}
    cache.save(slot)


# ---- the scheduler -------------------------------------------------------------------------------


class StoredPrefixes(Scheduler):
    """The first base of an engine's scheduler: takes prefixes from files, and keeps new ones."""

    disk: PromptCache
    plans: dict[Sequence, Plan]

    def admit(self) -> tuple[Sequence, int] | None:
        admitted = super().admit()
        if admitted:
            seq, _ = admitted
            if seq.shared_ids and not seq.pooler and self.disk.is_of_model():
                self.plans[seq] = self.disk.open(seq)
        return admitted

    def schedule(self) -> list[tuple[Sequence, int]]:
        for seq, plan in list(self.plans.items()):
            if not seq.shared_ids:  # the engine reuses nothing of what it has
                del self.plans[seq]
                if plan.is_reading:
                    begin_anew(self.disk.cache, seq)
            elif not plan.is_reading:
                self.mark(seq, plan)
                self.disk.keep(seq, plan, self.prefill_chunk // BLOCK + 1)
        self.take_blocks()
        running = self.running
        self.running = [seq for seq in running if not self.is_reading(seq)]
        try:
            return super().schedule()
        finally:
            self.running = running

    def is_reading(self, seq: Sequence) -> bool:
        return seq in self.plans and self.plans[seq].is_reading

    def take_blocks(self) -> None:
        """Take blocks that have been read; where no other sequence runs, wait for them."""
        is_alone = all(map(self.is_reading, self.running))
        end_s = time.perf_counter() + (MOST_IDLE_S if is_alone else MOST_S)
        for seq in filter(self.is_reading, self.running):
            plan = self.plans[seq]
            while plan.is_reading and time.perf_counter() < end_s:
                if not (is_alone or plan.reads[0].done()):
                    break
                self.disk.take(seq, plan)

    def mark(self, seq: Sequence, plan: Plan) -> None:
        """Let models.recurrent save states at the ends of blocks before its points, too."""
        if self.disk.state_floats and seq.num_computed == seq.num_cached:
            points = self.disk.cache.points[seq.slot]
            points |= {at // BLOCK * BLOCK for at in points if at >= BLOCK}

    def retire(self, seq: Sequence) -> None:
        plan = self.plans.pop(seq, None)
        if plan and seq.shared_ids and not plan.is_reading:
            self.disk.keep(seq, plan, self.prefill_chunk // BLOCK + 1)
        super().retire(seq)


def obstacle(engine: Engine) -> str:
    """Why an engine's cache cannot be kept in files; empty if it can."""
    caches, chunk = plain_caches(engine.cache), engine.scheduler.prefill_chunk
    if not caches:
        return "what its layers keep of a text has a form of its own"
    if any(cache.ring and cache.ring < chunk + BLOCK for cache in caches):
        return f"its windows are too short for --prefill-chunk {chunk}"
    if getattr(engine.cache, "most_saved", 1) == 0:
        return "its layers keep a state, and --state-mb leaves no room to save it"
    return ""


def marks_of(llm: LLM, adapter: str | Path | None, config: EngineConfig) -> Json:
    """All that decides which bytes a text has. Raises OSError and CheckpointError."""
    return {
        "version": __version__,
        "model": model_marks(llm.checkpoint.path),
        "adapter": model_marks(Path(adapter)) if adapter else None,
        "weights": [config.dtype, config.quantize],
        "arithmetic": arithmetic(llm.engine),
    }


def attach(llm: LLM, adapter: str | Path | None, config: EngineConfig) -> None:
    """Let the engine of a model keep prompts in `config.prompt_cache`. Raises NanollamaError for a
    folder that cannot be written."""
    engine, marks, reason = llm.engine, None, obstacle(llm.engine)
    try:
        marks = None if reason else marks_of(llm, adapter, config)
    except (OSError, CheckpointError) as error:
        reason = f"its files cannot be read: {error}"
    if marks is None:
        log.warning(f"--prompt-cache has no effect for this model: {reason}")
        return
    folder = Path(str(config.prompt_cache)).expanduser()
    store = BlockStore(folder, config.prompt_cache_mb << 20)
    scheduler: Any = engine.scheduler
    kind = type(scheduler)
    scheduler.__class__ = type(f"Stored{kind.__name__}", (StoredPrefixes, kind), {})
    scheduler.disk, scheduler.plans = PromptCache(engine, store, marks), {}
    if log.isEnabledFor(logging.DEBUG):
        each = human_bytes(scheduler.disk.layout.num_bytes)
        kept = describe(folder, store.most_bytes)
        log.debug(f"prompt cache: {kept}; {each} for {BLOCK} tokens")


def leave(engine: Engine) -> None:
    """Neither take nor keep prefixes any more: a weight has changed in place."""
    if isinstance(engine.scheduler, StoredPrefixes):
        engine.scheduler.disk.has_changed = True


def add_details(lines: dict[str, str], engine: EngineConfig) -> None:
    """Add a line to those of `show`."""
    if engine.prompt_cache:
        folder = Path(str(engine.prompt_cache)).expanduser()
        lines["prompt cache"] = describe(folder, engine.prompt_cache_mb << 20)
