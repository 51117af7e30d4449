"""A model over several processes, on one machine or more: tensor parallel on torch.distributed.

Adds       `torchrun --nproc-per-node N -m nanollama ..`, and `--tensor-parallel N`, which starts
           torchrun. Process 0 schedules, samples and answers. It tells the others each step's
           tokens; all run the step, each with its part of the matrices (cluster.shards), and
           add their results up, or gather them.

               process 0   engine > plan | embed  attention + MLP + .. head | logits > sampler
                                    |         \\     |        |          |
               process 1         plan | embed  attention + MLP + .. head |

Seam       cluster.options calls `enter` before a mode runs. `join` puts this module's decoder into
           the rows of FAMILIES; it is the family's own one with the backend, the weights and the
           cache wrapped. Imports cluster.shards.
Remove     delete this file and cluster.shards; --tensor-parallel then says that it needs it.
Source     https://arxiv.org/abs/1909.08053 (Megatron-LM)
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import datetime
import itertools
import json
import logging
import os
import re
import signal
import sys
import threading
import types
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import nanollama
from nanollama import (
    GATED,
    Batch,
    Decoder,
    KVCache,
    ModelConfig,
    ModelStore,
    NanollamaError,
    Projection,
    UsageError,
    Weights,
    available_memory,
    extra_object,
    first_line,
    human_bytes,
    log,
    open_checkpoint,
    preferred,
    uninterrupted,
)
from nanollama_extras.cluster import shards
from nanollama_extras.cluster.shards import Share, SplitError

if TYPE_CHECKING:
    from nanollama import Backend, MoE, Norm, Settings, TensorSource

STEP_TIMEOUT_S = 300  # for the other processes to reach the same sum
IDLE_TIMEOUT_S = 365 * 86400  # for process 0 to have work
STOP_S = 45  # for process 0 to end its answers after a signal
MESSAGE_BYTES = 1024  # of a plan's first piece, which is the whole of most
HERE = "cluster.tensor_parallel:new_decoder"

# ---- the processes -------------------------------------------------------------------------------


@dataclass(eq=False)
class World:
    """The processes that run a model together."""

    share: Share  # of this process
    num_local: int  # processes on this machine
    plans: Any  # group of the plans, which waits for as long as process 0 is idle
    lock: threading.RLock = field(default_factory=threading.RLock)
    leads: bool = False  # while process 0 runs an operation that the others run, too

    @property
    def is_first(self) -> bool:
        return self.share.rank == 0

    def add_up(self, x: Tensor) -> Tensor:
        """The sum of all processes' x in the order of the processes, in float32.

        Every element is added alone: a row's sum does not depend on other rows."""
        self.check_leads()
        own = x.float().contiguous()
        parts = [torch.empty_like(own) for _ in range(self.share.size)]
        dist.all_gather(parts, own)
        for part in parts[1:]:
            parts[0] += part
        return parts[0].to(x.dtype)

    def side_by_side(self, x: Tensor, num_cols: int) -> Tensor:
        """Columns of all processes (R, num_cols), in process 0; elsewhere x, which is its part."""
        self.check_leads()
        sizes = [len(self.share.of(num_cols, rank)) for rank in range(self.share.size)]
        own = F.pad(x, (0, max(sizes) - x.shape[-1])).contiguous()
        if not self.is_first:
            dist.gather(own)
            return x
        parts = [torch.empty_like(own) for _ in sizes]
        dist.gather(own, parts)
        return torch.cat([part[..., :size] for part, size in zip(parts, sizes)], dim=-1)

    def everywhere(self, x: Tensor, num_cols: int, num_parts: int = 1) -> Tensor:
        """x (N, parts x own columns) -> (N, parts x num_cols) in all processes; each part is split
        over them."""
        self.check_leads()
        sizes = [len(self.share.of(num_cols, rank)) for rank in range(self.share.size)]
        own = x.unflatten(-1, (num_parts, -1))
        own = F.pad(own, (0, max(sizes) - own.shape[-1])).contiguous()
        parts = [torch.empty_like(own) for _ in sizes]
        dist.all_gather(parts, own)
        kept = [part[..., :size] for part, size in zip(parts, sizes)]
        return torch.cat(kept, dim=-1).flatten(-2)

    def check_leads(self) -> None:
        """Raises NanollamaError where process 0 alone computes: the others would not take part."""
        if self.is_first and not self.leads:
            raise NanollamaError("a model over several processes cannot do this")

    def send(self, *plan: Any) -> None:
        """Tell the other processes what to do next."""
        data = json.dumps(plan).encode()
        head = len(data).to_bytes(8, "little") + data
        message = torch.zeros(max(MESSAGE_BYTES, len(head)), dtype=torch.uint8)
        message[: len(head)] = torch.frombuffer(bytearray(head), dtype=torch.uint8)
        dist.broadcast(message[:MESSAGE_BYTES], 0, self.plans)
        if len(message) > MESSAGE_BYTES:
            dist.broadcast(message[MESSAGE_BYTES:], 0, self.plans)

    def receive(self) -> list[Any]:
        """The next plan of process 0. Where that has ended, it or torchrun says so."""
        message = torch.empty(MESSAGE_BYTES, dtype=torch.uint8)
        try:
            dist.broadcast(message, 0, self.plans)
        except RuntimeError:
            os._exit(1)
        num_bytes = int.from_bytes(bytes(message[:8].tolist()), "little")
        if num_bytes + 8 > MESSAGE_BYTES:
            rest = torch.empty(num_bytes + 8 - MESSAGE_BYTES, dtype=torch.uint8)
            dist.broadcast(rest, 0, self.plans)
            message = torch.cat((message, rest))
        plan: list[Any] = json.loads(message[8 : 8 + num_bytes].numpy().tobytes())
        return plan

    @contextlib.contextmanager
    def leading(self, *plan: Any) -> Iterator[None]:
        """Tell the others what to do, and do it in the block. An error here would leave them in
        the middle of it: it ends the program."""
        with self.lock, uninterrupted():
            was_leading, self.leads = self.leads, True
            try:
                self.send(*plan)
                yield
            except BaseException as error:
                end_program(self, error)
            finally:
                self.leads = was_leading

    def meet(self) -> None:
        """Wait for the other processes, whose disks may be slower."""
        try:
            dist.barrier(self.plans)
        except RuntimeError as error:
            end_program(self, error)

    def dismiss(self) -> None:
        """Let the other processes leave `follow`."""
        with self.lock:
            self.send("end")


def end_program(world: World, error: BaseException) -> None:
    """End this process at once, with one line: the other ones are in the middle of a step."""
    reason = f"{type(error).__name__}: {first_line(error)}"
    if re.search("gloo|NCCL|Connection|timed out", reason, re.IGNORECASE):
        log.debug(reason)
        reason = "another one has ended, or does not answer"
    log.error(f"error: process {world.share.rank} of {world.share.size} ends: {reason}")
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(1)


_world: World | None = None


def join(device: str = "cpu") -> World:
    """Meet the other processes that torchrun has started, and split the models that are loaded from
    now on. `device` is the kind of device that will run them."""
    global _world
    if _world is None:
        env = os.environ
        seconds = datetime.timedelta(seconds=STEP_TIMEOUT_S)
        both = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(both, timeout=seconds)
        idle = datetime.timedelta(seconds=IDLE_TIMEOUT_S)
        share = Share(dist.get_rank(), dist.get_world_size())
        num_local = int(env.get("LOCAL_WORLD_SIZE", share.size))
        _world = World(share, num_local, dist.new_group(backend="gloo", timeout=idle))
        own = nanollama.preferred("models.families", "FAMILIES", nanollama.FAMILIES)
        for table in (nanollama.FAMILIES, own):
            for name, row in table.items():
                if row.decoder != HERE:
                    shards.DECODERS[name] = row.decoder
                    table[name] = dataclasses.replace(row, decoder=HERE)
    return _world


# ---- one step in all processes -------------------------------------------------------------------


class Summed(Projection):
    """A matrix whose columns are split: each process has a part of every sum."""

    def __init__(self, part: Projection, world: World) -> None:
        super().__init__(part.parts)
        self.part, self.world = part, world

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None = None,
        act: str = "",
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        y = self.world.add_up(self.part(x, norm, act))
        y = y if residual is None else residual + y
        return y if out is None else out.copy_(y)


class Gathered(Projection):
    """A matrix whose rows are split: each process has all of some sums, for whose operand it needs
    the columns of all. The result is to the bit that of one process."""

    def __init__(self, part: Projection, world: World, num_rows: int, num_cols: int) -> None:
        super().__init__(part.parts)
        self.part, self.world, self.num_rows, self.num_cols = part, world, num_rows, num_cols

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None = None,
        act: str = "",
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        whole = self.world.everywhere(x, self.num_cols, 2 if act in GATED else 1)
        own = self.world.share.of(self.num_rows)
        if residual is not None:
            residual = residual[:, own.start : own.stop].contiguous()
        y = self.world.everywhere(self.part(whole, norm, act, residual), self.num_rows)
        return y if out is None else out.copy_(y)


class Vocabulary(Projection):
    """A table of embeddings, or the head, whose rows are split."""

    def __init__(self, part: Projection, world: World, num_rows: int) -> None:
        super().__init__(part.parts)
        self.part, self.world, self.num_rows = part, world, num_rows

    def __call__(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Scores (R, V) in process 0"""
        return self.world.side_by_side(self.part(x, *args, **kwargs), self.num_rows)

    def rows(self, index: Tensor, factor: float = 1) -> Tensor:
        own = self.world.share.of(self.num_rows)
        is_here = (index >= own.start) & (index < own.stop)
        found = self.part.rows((index - own.start).clamp(0, len(own) - 1), factor)
        return self.world.add_up(found.masked_fill(~is_here.unsqueeze(1), 0))


class SplitBackend:
    """A Backend whose mixtures of experts add up what the experts of each process give."""

    def __init__(self, backend: Any, world: World) -> None:
        self.backend, self.world = backend, world
        if getattr(backend, "kept", None):
            log.warning("--packed-cache has no effect with --tensor-parallel, which splits weights")
            backend.kept = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def describe(self) -> str:
        return f"{self.backend.describe()}, {self.world.share.size} processes"

    def experts(self, moe: MoE, x: Tensor, residual: Tensor | None, *routed: Tensor) -> Tensor:
        y = self.world.add_up(self.backend.experts(moe, x, None, *routed))
        return y if residual is None else residual + y

    def record(self, decoder: Decoder, cache: KVCache, compile: bool) -> None:
        """A recorded step would leave the sums out."""
        if compile:
            log.warning("compile is left off: the steps of several processes are not recorded")


class SplitWeights(Weights):
    """Weights that hand out this process's part of each tensor."""

    def __init__(self, whole: Weights, config: ModelConfig, world: World) -> None:
        vars(self).update(vars(whole))
        self.world = world
        self.backend = cast("Backend", SplitBackend(whole.backend, world))
        self.num_experts = config.experts.count if config.experts else 0
        found = {name: tensor for name, tensor in whole.tensors.items() if self.is_here(name)}
        # where activations are rounded, a sum in parts could be rounded to another number
        self.gathered = {
            name.removesuffix(".weight")
            for name, tensor in found.items()
            if self.backend.rounds_activations and shards.is_packed(tensor, self.quantize_bits)
        }
        self.tensors = {name: self.part(name, tensor) for name, tensor in found.items()}

    def part(self, name: str, tensor: TensorSource) -> TensorSource:
        """This process's part of a tensor."""
        module = name.rpartition(".")[0]
        if module in self.gathered and shards.SUMMED.search(module):
            return shards.rows_of(tensor, self.world.share.of(tensor.shape[0]))
        return shards.part_of(name, tensor, self.world.share, self.quantize_bits)

    def is_here(self, name: str) -> bool:
        """Whether this process has a part of the tensor, or module."""
        expert = shards.EXPERT.search(name)
        return expert is None or int(expert[1]) in self.world.share.of(self.num_experts)

    def linear(
        self, outputs: Mapping[str, int], num_cols: int, bias: bool = False, is_table: bool = False
    ) -> Projection:
        name = next(iter(outputs))
        if not self.is_here(name):
            return shards.Absent(outputs)
        is_summed, world = shards.SUMMED.search(name), self.world
        own = {name: len(world.share.of(outputs[name]))}
        if name in shards.VOCABULARY:
            part = super().linear(own, num_cols, bias, is_table)
            return Vocabulary(part, world, outputs[name])
        if is_summed and name in self.gathered:
            num_cols *= world.share.size
            return Gathered(super().linear(own, num_cols, bias), world, outputs[name], num_cols)
        part = super().linear(outputs, num_cols, bias, is_table)
        return Summed(part, world) if is_summed else part


class SentRow(int):
    """A row of an image that process 0 has sent, in place of its models.vision.VectorId: in a text
    its `place` alone is needed, in a batch the rest."""

    place: list[int]
    vector: Tensor
    image: Any  # `deep`: tensors (n, C), to be added to row `index` after the first layers
    index: int


def find_places(text: list[int]) -> list[list[int]]:
    """Index, and positions in three dimensions, of each row of an image in a text."""
    return [[i, *token.place] for i, token in enumerate(text) if hasattr(token, "place")]


def text_with(length: int, places: list[list[int]]) -> list[int]:
    """A text of which only its length and such places count."""
    text = [0] * length
    for i, *place in places:
        text[i] = token = SentRow()
        token.place = place
    return text


def rows_of_images(batch: Batch) -> Tensor | None:
    """What a batch has of images (n, 1 + number of `deep`, C) float32; None without one."""
    tokens = batch.vectors.values()
    rows = [[t.vector, *(deep[t.index] for deep in t.image.deep)] for t in tokens]
    return torch.stack([torch.stack(row) for row in rows]).float().cpu() if rows else None


def with_rows(work: Any, at: list[int], rows: Tensor) -> Any:
    """The work of a step whose flat rows `at` are those of images."""
    image = types.SimpleNamespace(deep=tuple(rows[:, 1:].unbind(1)))
    sent = dict(zip(at, range(len(at))))
    flat, out = 0, []
    for slot, start, ids, num_rows in work:
        ids = list(ids)
        for i in (i for i in range(len(ids)) if flat + i in sent):
            ids[i] = token = SentRow(ids[i])
            token.index, token.image = sent[flat + i], image
            token.vector = rows[token.index, 0]
        out.append((slot, start, ids, num_rows))
        flat += len(ids)
    return out


class LedCache:
    """The KVCache of process 0, which notes for the others which texts begin in which slot."""

    def __init__(self, cache: KVCache, number: int) -> None:
        self.cache, self.number = cache, number
        self.starts: list[tuple[int, int, int, int, Any]] = []  # since the last step

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def start(self, source: int, target: int, num_tokens: int, token_ids: list[int]) -> None:
        self.cache.start(source, target, num_tokens, token_ids)
        places = find_places(token_ids)
        self.starts.append((source, target, num_tokens, len(token_ids), places))

    def news(self) -> list[tuple[int, int, int, int, Any]]:
        """The starts since the last call."""
        starts, self.starts = self.starts, []
        return starts


class SplitDecoder(Decoder):
    """The part of a decoder in one process, above the family's own class.

    Process 0 announces each method that computes; `follow` calls the same in the other ones."""

    world: World
    numbers: Iterator[int]  # of caches
    caches: dict[int, KVCache]  # in the other processes
    dropped: list[int]  # numbers of caches that process 0 no longer has

    def new_cache(self, num_slots: int, most_new: int = 0, **saving: Any) -> KVCache:
        """In the other processes, the engine's cache is as large as that of process 0."""
        if not self.world.is_first:
            return self.add_cache(*self.world.receive()[1:])
        number, dropped = next(self.numbers), self.dropped[:]
        del self.dropped[: len(dropped)]
        with self.world.leading("cache", number, num_slots, most_new, dropped):
            cache = LedCache(super().new_cache(num_slots, most_new), number)
        weakref.finalize(cache, self.dropped.append, number)
        return cast("KVCache", cache)

    def add_cache(self, number: int, num_slots: int, most_new: int, dropped: list[int]) -> KVCache:
        """A cache like that of process 0."""
        for old in dropped:
            del self.caches[old]
        self.caches[number] = super().new_cache(num_slots, most_new)
        return self.caches[number]

    def hidden(self, batch: Batch, cache: KVCache) -> Tensor:
        if not self.world.is_first:
            return super().hidden(batch, cache)
        led = cast("LedCache", cache)
        ids = batch.token_ids.tolist()
        work = [
            (span.slot, span.start, ids[span.row : span.row + span.num_new], span.num_rows)
            for span in batch.spans
        ]
        rows = rows_of_images(batch)
        shape = [] if rows is None else rows.shape
        with self.world.leading("hidden", led.number, led.news(), work, [*batch.vectors], [*shape]):
            if rows is not None:
                dist.broadcast(rows, 0, self.world.plans)
            return super().hidden(batch, led.cache)

    def logits(self, x: Tensor, batch: Batch) -> Tensor:
        if not self.world.is_first:
            return super().logits(x, batch)
        with self.world.leading("logits"):
            return super().logits(x, batch)


@torch.inference_mode()
def follow(decoder: SplitDecoder) -> None:
    """Run the steps that process 0 announces, until it dismisses the others."""
    world, hidden = decoder.world, None
    while (plan := world.receive())[0] != "end":
        kind, *values = plan
        if kind == "cache":
            decoder.add_cache(*values)
        elif kind == "hidden":
            number, starts, work, at, shape = values
            cache = decoder.caches[number]
            if at:
                rows = torch.empty(shape)
                dist.broadcast(rows, 0, world.plans)
                work = with_rows(work, at, rows)
            for source, target, num_tokens, length, places in starts:
                cache.start(source, target, num_tokens, text_with(length, places))
            for slot, start, ids, _ in work:
                cache.reserve(slot, start + len(ids))
            batch = Batch(work, decoder.device, decoder.row_tile)
            hidden = decoder.hidden(batch, cache)
        elif hidden is not None:
            decoder.logits(hidden, batch)


def new_decoder(config: ModelConfig, weights: Weights, kv_dtype: str = "auto") -> Decoder:
    """This process's part of a model. Raises SplitError for a model that cannot be split so."""
    world = join()
    shards.check_split(config, world.share.size)
    if weights.adapter:
        raise SplitError("--adapter cannot be split over several processes yet")
    place = shards.own_decoder(config)
    base = extra_object(place, config.model_type) if place else Decoder
    fields: dict[str, Any] = {"world": world, "numbers": itertools.count()}
    fields |= {"caches": {}, "dropped": []}
    kind = type(f"Split{base.__name__}", (SplitDecoder, base), fields)
    num_sharing = world.num_local if weights.device.type == "cpu" else 1
    own = shards.split_config(config, world.share, num_sharing)
    split = SplitWeights(weights, config, world)
    check_memory(split, num_sharing)
    decoder: Decoder = kind(own, split, kv_dtype)
    world.meet()
    return decoder


def check_memory(weights: SplitWeights, num_sharing: int) -> None:
    """Raises SplitError, in all processes, where one's part does not fit in its share of the free
    memory."""
    needed = shards.part_bytes(weights)
    free = available_memory(weights.device) / num_sharing
    excess = torch.tensor(needed / max(free, 1.0))
    dist.all_reduce(excess, dist.ReduceOp.MAX, weights.world.plans)  # before one takes memory
    if excess > 1 and not shards.ignores_memory:
        problem = f"a process's weights take {human_bytes(needed)}, and {human_bytes(free)} are"
        remedy = "take more processes on more machines, or --force"
        raise SplitError(f"{weights.source}: {problem} free for it; {remedy}")


# ---- the command line ----------------------------------------------------------------------------


def enter(settings: Settings, argv: list[str]) -> int | None:
    """Take part in a mode with several processes -> the exit code; None in process 0, which runs
    the mode itself. Raises UsageError and NanollamaError."""
    args, env = settings.args, os.environ
    wanted, size = args.tensor_parallel, int(env.get("WORLD_SIZE", 1)) if "RANK" in env else 0
    if size and wanted not in (None, size):
        raise UsageError(f"--tensor-parallel is {wanted}, and torchrun has started {size}")
    if (size or wanted) == 1:
        return None
    check_mode(settings)
    if not size:
        return launch(settings, argv)
    args.device = pick_device(args.device, int(env.get("LOCAL_RANK", 0)))
    shards.ignores_memory, args.force = args.force, True  # a process needs its share only
    world = join(args.device)
    if not world.is_first:
        return run_follower(settings, world)
    atexit.register(leave, world)
    return None


def check_mode(settings: Settings) -> None:
    """Raises UsageError for options that several processes do not have yet."""
    args = settings.args
    is_one = len(set(args.models)) == 1 or (args.modelfile and not args.models) or not args.serve
    for is_wrong, reason in (
        (args.tensor_parallel is not None and args.tensor_parallel < 1, "it must be at least 1"),
        (args.script or not is_one, "--serve needs exactly one --model with it"),
        (getattr(args, "keep_alive", None) is not None, "--keep-alive cannot be used with it"),
        ((getattr(args, "num_gpus", None) or 1) > 1, "--num-gpus cannot be used with it"),
        (settings.value("adapter")[0], "--adapter cannot be used with it yet"),
        (args.lookup == "mtp", "--lookup mtp cannot be used with it yet"),
        (settings.value("draft")[0], "--draft cannot be used with it yet"),
    ):
        if is_wrong:
            raise UsageError(f"--tensor-parallel: {reason}")


def pick_device(wanted: str | None, local_rank: int) -> str:
    """The device of a process: its own GPU, or the CPU. Raises UsageError."""
    num_gpus = torch.cuda.device_count()
    if wanted not in (None, "cuda") or (wanted is None and not num_gpus):
        return wanted or "cpu"
    if local_rank >= num_gpus:
        raise UsageError(f"each process needs a GPU of its own, and there are {num_gpus}")
    torch.cuda.set_device(local_rank)
    return f"cuda:{local_rank}"


def run_follower(settings: Settings, world: World) -> int:
    """Load a part of the model and follow process 0 until it ends -> the exit code."""
    log.setLevel(logging.ERROR)  # process 0 has the same warnings
    for number in (signal.SIGINT, signal.SIGTERM):  # process 0 decides when to end
        signal.signal(number, signal.SIG_IGN)
    try:
        follow(cast("SplitDecoder", settings.load(needs_text=False).engine.decoder))
    except SplitError:
        world.receive()  # process 0 finds the same, and says so before it ends
        return 1
    except RuntimeError as error:
        end_program(world, error)
    dist.destroy_process_group()
    return 0


def leave(world: World) -> None:
    """End the other processes with process 0."""
    if world.lock.acquire(timeout=1):  # else a thread is in the middle of a step
        with contextlib.suppress(Exception):
            world.send("end")
        dist.destroy_process_group()


def launch(settings: Settings, argv: list[str]) -> int:
    """Run this command line in several processes by torchrun -> the exit code."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    size = settings.args.tensor_parallel
    checkpoint = open_checkpoint(ModelStore().resolve(settings.model, settings.args.revision))
    shards.check_split(checkpoint.config, size)
    cores = max(1, preferred("kernels.containers", "num_cores", os.cpu_count)() // size)
    os.environ.setdefault("OMP_NUM_THREADS", str(settings.value("threads")[0] or cores))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=size,
        run_id=f"nanollama-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
        shutdown_timeout=STOP_S,
    )
    logging.disable()  # torchrun's report: the errors below are one line
    try:
        elastic_launch(config, sys.executable)(str(nanollama.__file__), *argv)
    except ChildFailedError as error:
        # when one is killed, the others end by themselves or by torchrun's SIGTERM
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        killed = [rank for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM]
        rank = killed[0] if killed else error.get_first_failure()[0]
        if codes[rank] >= 0:  # it has printed its error
            return codes[rank]
        reason = f"signal {-codes[rank]} ended process {rank} of {size}"
        raise NanollamaError(f"{reason}, and with it the others") from None
    except SignalException as error:
        return 128 + int(error.sigval)
    finally:
        logging.disable(logging.NOTSET)
    return 0
