"""Models that come and go: several, or all on this machine, loaded when a request names them, and
unloaded after an idle time (--keep-alive) or where another one needs room; and replicas on GPUs.

Seam       subclasses of `nanollama.Models` and `nanollama.Pool`; `nanollama.run_serve` asks for
           `open_shelf`, the list of models for `model_fields`. commands.details tells how much
           memory a model needs.
Remove     delete this file; a server then has one model on one device, /v1/models lists its name
           alone, and Ollama's API, which loads and unloads models, goes as well.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import math
import os
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanollama import (
    LLM,
    SAMPLING_FIELDS,
    SLOT_TOKENS,
    EngineWorker,
    Modelfile,
    Models,
    ModelSource,
    ModelStore,
    NanollamaError,
    Pool,
    RequestError,
    SamplingParams,
    UsageError,
    WireError,
    available_memory,
    excerpt,
    first_line,
    local_path,
    log,
    mark_used,
    model_source,
    open_checkpoint,
    pick_device,
    plain_name,
    preferred,
    public_name,
    refuse,
    use_model,
)
from nanollama_extras.commands.details import memory_needed, tower_memory

if TYPE_CHECKING:
    from nanollama import Fields, GenerationRequest, Json, ServerConfig, Settings

KEEP_ALIVE_S = 300.0  # idle time by default, as with Ollama; a single named model stays
# The directories of an absolute path; no part of a URL, a route, a hub id or a quotient
DIRECTORIES = re.compile(
    r"""(?<![\w./:~-])(?<!GET )(?<!POST )([A-Za-z]:\\|~?/)(?=\S)(([^\\/:;\n'"]|'(?=\w))*[\\/])*"""
)
MAX_REMEMBERED = 1024  # beginnings of prompts whose replica is known


def parse_duration(value: Any, name: str = "keep_alive") -> float:
    """Seconds of a number or of 5m, 1h30m, 500ms, 30s; infinity for a negative duration. Raises
    RequestError. Spec: https://pkg.go.dev/time#ParseDuration"""
    units = {"ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}
    text = str(value).strip() if not isinstance(value, bool) else ""
    terms = re.findall(r"(\d{1,9}(?:\.\d{1,9})?)(ms|h|m|s)?", text)
    if not terms or len(text) > 40 or text.removeprefix("-") != "".join(map("".join, terms)):
        refuse(f"{name} is {excerpt(value)}; give 30s, 5m, 1h, 0 or -1", name)
    seconds = sum(float(number) * units[unit or "s"] for number, unit in terms)
    return math.inf if text.startswith("-") else seconds


def hide_paths(error: NanollamaError) -> None:
    """Leave the last part of each absolute path in an error for a client; the log gets the whole
    text. An error about a request may repeat its text."""
    is_own = not isinstance(error, (RequestError, WireError)) or error.status >= 500
    if is_own and (text := DIRECTORIES.sub("", str(error))) != str(error):
        log.error(str(error).encode(errors="backslashreplace").decode())  # no lone surrogates
        error.args = (text,)


# ---- models --------------------------------------------------------------------------------------


def public_names(models: Iterable[str], given: tuple[str, ...]) -> dict[str, str]:
    """Name for clients -> model: the `given` names in order, then the models' own. A name that is
    taken gets a number. Raises UsageError for more names than models."""
    names: dict[str, str] = {}
    for model, name in itertools.zip_longest(dict.fromkeys(models), given):
        if model is None:
            raise UsageError(f"--alias {name} has no --model: {len(names)} are given")
        own = name or public_name(model)
        numbered = itertools.chain([own], (f"{own}-{i}" for i in itertools.count(2)))
        names[next(name for name in numbered if name not in names)] = model
    return names


@dataclass(frozen=True, slots=True, eq=False)
class ServedModel(ModelSource):
    """A model that may come and go.

    need_bytes: downloads the files that are missing and estimates the memory. locate: the path of
    the files; None where they are not on this machine. replicas: a loader for each GPU, where there
    are several. reference: the model's own name, where that is no path. ctx: the longest context
    that the settings allow."""

    need_bytes: Callable[[], int] = int
    locate: Callable[[], Path | None] = lambda: None
    modelfile: Modelfile = field(default_factory=Modelfile)
    replicas: tuple[Callable[[], LLM], ...] = ()
    reference: str = ""
    ctx: int | None = None


def as_served(source: ModelSource) -> ServedModel:
    """A source as one that needs no memory and has no files of its own, unless it says so."""
    if isinstance(source, ServedModel):
        return source
    return ServedModel(source.name, source.load, source.sampling, source.opening)


def cached_path(store: ModelStore, reference: str) -> Path | None:
    """The path of a model in the caches, or of weights that /api/create made; None for others"""
    made = Path(reference)
    if (store.root / "created") in made.parents and ".." not in made.parts and made.exists():
        return made
    return store.find_cached(reference)


def served_model(settings: Settings, name: str, path: Path | None = None) -> ServedModel:
    """The server's source of a model under a name; `path` leads to the files, where it is known."""
    files: dict[str, Any] = {"model": str(path) if path else absolute(settings.model)}
    for name_of in ("tokenizer", "adapter", "draft", "mmproj"):
        files[name_of] = absolute(settings.value(name_of)[0])
    args = argparse.Namespace(**{**vars(settings.args), **files})
    reference = public_name((settings.modelfile.model or name) if path else settings.model)
    settings = dataclasses.replace(settings, args=args)  # a flag goes before a Modelfile's line
    plain, num_gpus = model_source(settings, name), args.num_gpus or 1
    gpus = [f"cuda:{i}" for i in range(num_gpus)] if num_gpus > 1 else []

    def need_bytes() -> int:
        files = ModelStore().resolve(settings.model, args.revision)
        mark_used(files)
        found = open_checkpoint(files)
        return sum(memory_needed(found, settings, SLOT_TOKENS)) + tower_memory(found, settings)

    return ServedModel(
        name,
        plain.load,
        plain.sampling,
        plain.opening,
        need_bytes,
        lambda: path or ModelStore().find(settings.model, args.revision),
        settings.modelfile,
        tuple(partial(settings.load, gpu) for gpu in gpus),
        reference,
        settings.value("ctx")[0],
    )


def absolute(reference: str | None) -> str | None:
    """A reference, or the absolute form of a relative path, which `hide_paths` knows in errors.
    A single word may be an alias."""
    is_path = reference and Path(reference).name != reference and local_path(reference)
    return os.path.abspath(is_path) if is_path else reference


@dataclass(frozen=True, slots=True)
class Library:
    """All models on this machine: `names` lists them, the last used first; `find` returns one."""

    find: Callable[[str], ServedModel | None] = lambda name: None
    names: Callable[[], list[str]] = list


def library_of(settings: Settings) -> Library:
    """The models in the cache, and those that were created over the API."""
    store = ModelStore()

    def find(name: str) -> ServedModel | None:
        modelfile = store.modelfile(name) or Modelfile()
        path = cached_path(store, modelfile.model or name)
        its_settings = dataclasses.replace(settings, modelfile=modelfile)
        return served_model(its_settings, name, path) if path else None

    def is_usable(name: str) -> bool:
        with contextlib.suppress(OSError, NanollamaError):  # damaged, or deleted meanwhile
            path = cached_path(store, (store.modelfile(name) or Modelfile()).model or name)
            return bool(numbers_of(path))
        return False

    def names() -> list[str]:
        recent = sorted(store.models(), key=lambda m: -m.last_used)
        return [m.id for m in recent if is_usable(m.id)]

    return Library(find, names)


def open_shelf(settings: Settings, config: ServerConfig) -> Shelf:
    """The models of --model or the Modelfile; without either, all models on this machine. Raises
    UsageError."""
    args = settings.args
    if config.num_gpus > 1:
        import torch

        if config.num_gpus > (num_there := torch.cuda.device_count()):
            message = f"--num-gpus is {config.num_gpus}; this machine has {num_there} CUDA GPUs"
            raise UsageError(message)
    one = {model: use_model(settings, model) for model in args.models}
    if args.modelfile and not one:
        one = {settings.model: settings}
    names = public_names(one, config.served_names)
    named = {name: served_model(one[model], name) for name, model in names.items()}
    library = Library() if named else library_of(settings)
    device = args.device
    return Shelf(
        named, config, library=library, free_bytes=lambda: available_memory(pick_device(device))
    )


# ---- what /v1/models says ------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def file_numbers(path: Path, modified: float, size: int) -> Json:
    """The numbers of a model's files, as llama.cpp names them, and whether it reads images
    (`vision`); empty for files that cannot be opened. `modified` and `size` tell versions of the
    files apart."""
    try:
        checkpoint = open_checkpoint(path)
    except (NanollamaError, OSError) as error:
        log.debug(f"{path}: {error}")
        return {}
    c = checkpoint.config
    numbers = {"n_ctx_train": c.n_ctx, "n_vocab": c.n_vocab, "n_embd": c.n_embd}
    numbers |= {"n_params": checkpoint.num_parameters, "size": checkpoint.num_bytes}
    sees: Any = preferred("models.vision", "has_vision", lambda _: False)
    return {**numbers, "vision": sees(checkpoint)}


def numbers_of(path: Path | None) -> Json:
    """The numbers of a model of a known family; empty for any other path."""
    with contextlib.suppress(OSError):
        if path:
            stat = (path / "config.json" if path.is_dir() else path).stat()
            return file_numbers(path, stat.st_mtime, stat.st_size)
    return {}


def sampling_numbers(defaults: Fields) -> Json:
    """The numbers of the sampling of a chat request that names none."""
    params = SamplingParams(**{"repeat_penalty": 1.0, "max_tokens": None, **defaults})
    numbers = {name: getattr(params, name) for name in SAMPLING_FIELDS}
    return {name: value for name, value in numbers.items() if type(value) in (int, float)}


async def model_fields(models: Models, name: str) -> Json:
    """The state of a model, its default sampling and its context: `max_model_len` is vLLM's name,
    `context_length` OpenRouter's, `meta` and `architecture` have llama.cpp's. Files say the context
    of a model that is not in memory."""
    pool = models.pools.get(name)
    state = "unloaded" if pool is None else "loaded" if pool.ready else "loading"
    try:
        source = as_served(await models.source(name))
    except WireError:  # deleted meanwhile
        return {"state": state}
    ctx, defaults = source.ctx, pool.sampling if pool and pool.ready else source.sampling
    said = {"state": state, "sampling": sampling_numbers(defaults)}
    if pool and pool.ready:
        ctx, checkpoint = pool.llm().engine.n_ctx, getattr(pool.llm(), "checkpoint", None)
        path = checkpoint and checkpoint.path  # a script has none
    else:
        path = None
        with contextlib.suppress(NanollamaError):  # the path of a named model leads nowhere
            path = await asyncio.to_thread(source.locate)
    meta = dict(await asyncio.to_thread(numbers_of, path))
    if meta.pop("vision", False):
        kinds = {"input_modalities": ["text", "image"], "output_modalities": ["text"]}
        said["architecture"] = kinds
    n_ctx = min(filter(None, (ctx, meta.get("n_ctx_train"))), default=None)
    if n_ctx is None:
        return said
    lengths = {"max_model_len": n_ctx, "context_length": n_ctx}
    return {**said, **lengths, "meta": {"n_ctx": n_ctx, **meta}}


# ---- the shelf -----------------------------------------------------------------------------------


@dataclass(eq=False)
class ShelfPool(Pool):
    """A model on the shelf: one replica, or several on GPUs of their own. The least busy one takes
    a request, or the one that saw the same beginning, with the prefix in its cache, if it is about
    as free."""

    source: ServedModel
    on_use: Callable[[ShelfPool], None] = lambda pool: None
    keep_s: float = math.inf  # how long it stays when idle
    used_s: float = field(default_factory=time.monotonic)
    num_waiting: int = 0  # requests that wait for the model
    need_bytes: int = 0  # of the whole model, estimated; 0 until it is known
    loading_bytes: int = 0  # the part that loading has still to take
    timer: asyncio.TimerHandle | None = None
    loading: asyncio.Task[None] | None = None
    seen: dict[int, EngineWorker] = field(default_factory=dict)  # hash of a prompt's beginning

    def __post_init__(self) -> None:
        loads = self.source.replicas or (self.source.load,)
        self.workers = [EngineWorker(load, self.on_failure) for load in loads]

    @property
    def is_idle(self) -> bool:
        """True while no request uses the model or waits for it."""
        return not self.num_waiting and not any(worker.num_sequences for worker in self.workers)

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Keep the model in memory while the block waits for something."""
        self.num_waiting += 1
        try:
            yield
        finally:
            self.num_waiting -= 1

    def note_use(self) -> None:
        self.on_use(self)

    def pick(self, request: GenerationRequest) -> EngineWorker:
        beginning = request.messages[0].get("content") if request.messages else request.prompt
        key = hash(str((beginning or "")[:512]))
        least = min(self.workers, key=lambda worker: worker.num_sequences)
        known = self.seen.pop(key, least)
        self.seen[key] = worker = known if known.num_sequences <= least.num_sequences + 1 else least
        while len(self.seen) > MAX_REMEMBERED:
            del self.seen[next(iter(self.seen))]
        return worker


@dataclass(eq=False)
class Shelf(Models):
    """The models in memory. A request for another model waits until it is loaded, which happens
    once for all requests. Where memory is short, the idle model least recently used leaves first,
    and busy ones are awaited. A single named model is loaded at the start.

    library: the models that may be served where none is named. free_bytes: the memory for more."""

    named: Mapping[str, ServedModel]
    pools: dict[str, ShelfPool] = field(default_factory=dict)  # type: ignore[assignment]
    library: Library = field(default_factory=Library)
    free_bytes: Callable[[], float] = lambda: math.inf
    room: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while a model makes room
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)  # the loop holds weak references

    def __post_init__(self) -> None:
        self.named = {name: as_served(source) for name, source in self.named.items()}
        self.is_loading = len(self.named) == 1
        self.keep_s = math.inf if self.is_loading else KEEP_ALIVE_S
        if self.config.keep_alive is not None:
            try:
                self.keep_s = parse_duration(self.config.keep_alive)
            except RequestError as error:
                raise UsageError(str(error), error.param) from None

    def __str__(self) -> str:
        models = ", ".join(self.named) or "the models on this machine"
        return f"loading {models}" if self.is_loading else f"{models}, on demand"

    async def names(self) -> list[str]:
        """The models that may be served; those in memory first, the last used before others."""
        known: Iterable[str] = self.named or await asyncio.to_thread(self.library.names)
        recent = sorted(self.pools.values(), key=lambda pool: -pool.used_s)
        return list(dict.fromkeys([*(pool.source.name for pool in recent), *known]))

    async def find(self, name: str) -> ServedModel | None:
        """A model by its exact name."""
        if name in self.pools:
            return self.pools[name].source
        if self.named:
            return self.named.get(name)
        return await asyncio.to_thread(self.library.find, plain_name(name))

    async def source(self, name: str | None) -> ServedModel:
        for wanted in dict.fromkeys((name, plain_name(name)) if name else ()):
            if found := await self.find(wanted):
                return found
        names = await self.names()
        if names and (name is None or self.config.any_model):
            return await self.source(names[0])
        problem = "no model is named" if name is None else f"model {name!r} is not served here"
        known = ", ".join(self.named or names) or "none yet; POST /api/pull"
        raise WireError(404, "model_not_found", f"{problem}; there is: {known}")

    async def pool(self, name: str | None, keep_s: float | None = None) -> ShelfPool:
        """As Models.pool; raises also the error of a model that cannot be loaded. The caller starts
        a job before it awaits anything, or the model may be gone. keep_s: the idle time from now
        on, instead of the server's."""
        self.check_ready()
        source = await self.source(name)
        pool = self.pools.get(source.name) or self.open(source)
        assert pool.loading is not None
        with pool.held():
            await asyncio.shield(pool.loading)
        pool.keep_s = self.keep_s if keep_s is None else keep_s
        self.note_use(pool)
        return pool

    async def start(self) -> None:
        """Begin to load a single named model."""
        if self.is_loading:
            (source,) = self.named.values()
            self.open(source)

    def open(self, source: ServedModel) -> ShelfPool:
        """Begin to load a model."""
        pool = ShelfPool(source, self.config.max_queue, self.on_failure, self.note_use)
        self.pools[source.name] = pool
        pool.loading = asyncio.create_task(self.load(pool))
        pool.loading.add_done_callback(lambda task: task.cancelled() or task.exception())
        return pool

    async def load(self, pool: ShelfPool) -> None:
        """Load a model. Raises the error of one that cannot run."""
        try:
            if not self.is_loading:
                await self.make_room(pool)
            await pool.load()
            pool.loading_bytes, self.is_loading = 0, False
        except Exception as error:
            await pool.stop()
            if self.is_loading:
                self.on_failure(error)
            else:
                log.error(f"{pool.source.name}: {first_line(error)}")
                del self.pools[pool.source.name]
            raise

    async def make_room(self, pool: ShelfPool) -> None:
        """Unload other models until the memory suffices, or none is left."""
        async with self.room:
            pool.need_bytes = await asyncio.to_thread(pool.source.need_bytes)
            while pool.need_bytes > self.unclaimed_bytes():
                others = [other for other in self.pools.values() if other.ready]
                if not others:
                    break
                if idle := [other for other in others if other.is_idle]:
                    await self.forget(min(idle, key=lambda other: other.used_s))
                else:
                    self.idle.clear()
                    await self.idle.wait()
            pool.loading_bytes = pool.need_bytes

    def unclaimed_bytes(self) -> float:
        """The free memory that no model is about to take."""
        return self.free_bytes() - sum(pool.loading_bytes for pool in self.pools.values())

    def note_use(self, pool: ShelfPool) -> None:
        """Start the idle time of a model that has become idle."""
        pool.used_s = time.monotonic()
        if pool.timer:
            pool.timer.cancel()
        if pool.is_idle:
            self.idle.set()
            if 0 <= pool.keep_s < math.inf:
                loop = asyncio.get_running_loop()
                pool.timer = loop.call_later(pool.keep_s, self.expire, pool)

    def expire(self, pool: ShelfPool) -> None:
        """Unload a model whose idle time is over."""
        if pool.is_idle and pool.ready:
            self.forget(pool)

    def forget(self, pool: ShelfPool) -> asyncio.Task[None]:
        """Take a model out of service. Returns the task that ends its threads after its last
        answer."""

        async def retire() -> None:
            while not pool.is_idle:
                self.idle.clear()
                await self.idle.wait()
            await pool.stop()

        if self.pools.get(pool.source.name) is pool:
            del self.pools[pool.source.name]
            log.info(f"{pool.source.name}: unloaded")
        task = asyncio.create_task(retire())
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    async def renew(self, name: str) -> None:
        """Let the next request load a model anew because its files change; running answers keep
        the old one."""
        if pool := self.pools.get(name):
            task = self.forget(pool)
            if pool.is_idle:
                await task
