"""The part of Ollama's API that lists, shows, downloads, makes and deletes models.

Seam       `ModelHandlers` is the base of the dialect in api/ollama.py, which imports it. Models are
           unloaded and loaded anew by api.shelf; api.blobs keeps files and makes weights.
Remove     delete this file together with api/ollama.py.
Spec       https://github.com/ollama/ollama/blob/main/docs/api.md
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import importlib.util
import json
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from nanollama import (
    ALIASES,
    CHATML,
    DIRECTIVES,
    MODEL_NAME,
    TINY_RANDOM,
    ChatTemplate,
    DownloadError,
    Encoding,
    Handlers,
    Json,
    Modelfile,
    ModelNotFoundError,
    ModelStore,
    NanollamaError,
    RequestError,
    Route,
    WireError,
    as_json,
    check_type,
    encode_json,
    excerpt,
    log,
    open_checkpoint,
    parse_hub_ref,
    parse_modelfile,
    plain_name,
    preferred,
    public_name,
    read_directive,
    read_fields,
    refuse,
    required,
    set_parameter,
    stream_response,
    table,
    unless_disconnected,
)
from nanollama_extras.api import blobs
from nanollama_extras.api.shelf import Shelf

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from nanollama import CachedModel, Fields
    from nanollama_extras.api.shelf import ServedModel, ShelfPool

NDJSON = Encoding(
    "application/x-ndjson",
    lambda value: encode_json(value) + b"\n",
    lambda error: {"error": str(error)},
)
# Fields for features that this server lacks -> the values that are accepted
OLLAMA_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "images": ([],),
    "suffix": ("",),
    "template": ("",),
    **dict.fromkeys(("width", "height", "steps", "path"), ()),
    "adapters": ({},),
}
# Downloads wait for each other here, and not in the threads that read requests
STORE_THREADS = ThreadPoolExecutor(4, "store")
FAR_S = 1e9  # the end of a time without one; a date has at most four digits for its year
OLLAMA_VERSION = "0.13.4"  # clients ask for this release or a later one before they use Responses


OLLAMA_MODEL = table(string="model name", boolean="verbose")


OLLAMA_PULL = table(OLLAMA_MODEL, boolean="stream insecure")


OLLAMA_COPY = table(string="source destination")


OLLAMA_CREATE = table(
    OLLAMA_MODEL,
    string="from modelfile system quantize",
    object="parameters files",
    array="messages",
    string_or_array="license",
    boolean="stream",
)


def timestamp(seconds: float | None = None) -> str:
    """A time in RFC 3339, as Ollama writes it; the present one by default."""
    moment = datetime.fromtimestamp(time.time() if seconds is None else seconds, timezone.utc)
    return moment.isoformat().replace("+00:00", "Z")


def created_modelfile(given: Fields) -> Modelfile:
    """A Modelfile of the fields of a body of /api/create other than `from` and `modelfile`. Raises
    RequestError."""
    parameters: Json = {}
    for name, value in given.get("parameters", {}).items():
        for text in value if isinstance(value, list) else [value]:
            set_parameter(parameters, name, str(text))
    messages = []
    for i, message in enumerate(given.get("messages", [])):
        check_type(f"messages[{i}]", message, "object")
        role, content = message.get("role"), message.get("content")
        if role not in ("system", "user", "assistant") or not isinstance(content, str):
            refuse(f"messages[{i}] needs a role (system, user, assistant) and a text", "messages")
        messages.append({"role": role, "content": content})
    text = given.get("license")
    return Modelfile(
        system=given.get("system"),
        license="\n".join(map(str, text)) if isinstance(text, list) else text,
        parameters=parameters,
        messages=tuple(messages),
    )


Report = Callable[[Json], None]  # receives a line of progress


def ollama_name(given: Fields) -> str:
    """The name of a body's model. Raises RequestError."""
    return str(given.get("model") or given.get("name") or required(given, "model"))


@lru_cache(maxsize=64)
def ollama_details(path: Path, modified: float) -> Json:
    """The details of model files for /api/tags and /api/show; `modified` keys the cache."""
    checkpoint = open_checkpoint(path)
    c, num, template = checkpoint.config, checkpoint.num_parameters, ChatTemplate(checkpoint.text)
    kind = c.model_type
    # tools are described in the system prompt where the template has no place for them
    has_tools = importlib.util.find_spec("nanollama_extras.answers.tools") is not None
    embeds_only = "reach" in c.own  # models.bidirectional
    sees: Any = preferred("models.vision", "has_vision", lambda _: False)
    able = {
        "completion": not embeds_only,
        "embedding": embeds_only,
        "tools": has_tools and not embeds_only,
        "vision": sees(checkpoint),
        "thinking": template.thoughts is not None,
    }
    return {
        "details": {
            "parent_model": "",
            "format": checkpoint.format,
            "family": kind,
            "families": [kind],
            "parameter_size": f"{num / 1e9:.1f}B" if num >= 1e9 else f"{num / 1e6:.2f}M",
            "quantization_level": checkpoint.quantization,
        },
        "model_info": {
            "general.architecture": kind,
            "general.parameter_count": num,
            f"{kind}.attention.head_count": c.n_heads,
            f"{kind}.attention.head_count_kv": c.n_kv_heads,
            f"{kind}.block_count": c.n_layers,
            f"{kind}.context_length": c.n_ctx,
            f"{kind}.embedding_length": c.n_embd,
            f"{kind}.feed_forward_length": c.n_ff,
            f"{kind}.vocab_size": c.n_vocab,
        },
        "template": template.source or CHATML,
        "capabilities": [name for name, has in able.items() if has],
        "size": checkpoint.num_bytes,
    }


def source_details(source: ServedModel) -> tuple[Json, float]:
    """`ollama_details` of a model, and the time of its files' last change; empty without files."""
    path = source.locate()
    if path is None:
        return {"details": {}, "model_info": {}, "template": "", "capabilities": [], "size": 0}, 0.0
    file = path / "config.json" if path.is_dir() else path
    modified = file.stat().st_mtime
    return ollama_details(path, modified), modified


def ollama_model(source: ServedModel) -> Json:
    """A row of /api/tags. The digest is the file's, where an alias or its name on the hub has it;
    otherwise a digest of name, size and time."""
    try:
        found, modified = source_details(source)
    except (NanollamaError, OSError) as error:
        log.debug(f"{source.name}: {error}")
        return {}
    pinned = ALIASES.get(source.reference)
    blob = pinned.sha256 if pinned else (source.locate() or Path()).resolve().name
    identity = f"{source.name} {found['size']} {modified} {format_modelfile(source.modelfile)}"
    is_hash = re.fullmatch("[0-9a-f]{64}", blob) and not source.modelfile.model
    return {
        "name": source.name,
        "model": source.name,
        "modified_at": timestamp(modified),
        "size": found["size"],
        "digest": blob if is_hash else hashlib.sha256(identity.encode()).hexdigest(),
        "details": found["details"],
    }


def ollama_show(source: ServedModel) -> Json:
    """The answer of /api/show. Raises CheckpointError."""
    found, modified = source_details(source)
    file = dataclasses.replace(source.modelfile, model=source.reference or source.name)
    others = {name: getattr(file, name) for name in ("tokenizer", "adapter", "draft")}
    others = {name: value and public_name(value) for name, value in others.items()}
    file = dataclasses.replace(file, **others)
    rows = {**source.sampling, **file.parameters}
    names = {"max_tokens": "num_predict", "ctx": "num_ctx", "threads": "num_thread"}
    lines = [
        f"{names.get(name, name):<30} {json.dumps(one) if name == 'stop' else one}"
        for name, value in rows.items()
        for one in (value if isinstance(value, tuple) else [value])
    ]
    return {
        **({"license": file.license} if file.license else {}),
        "modelfile": format_modelfile(file),
        "parameters": "\n".join(lines),
        "template": file.template or found["template"],
        **({"system": file.system} if file.system else {}),
        "details": found["details"],
        **({"messages": list(file.messages)} if file.messages else {}),
        "model_info": found["model_info"],
        "capabilities": found["capabilities"],
        "modified_at": timestamp(modified),
    }


def pull_lines(name: str, report: Report) -> None:
    """Download a model, and report the progress."""
    report({"status": "pulling manifest"})
    reported: dict[str, int] = {}

    def tell(file: str, num_there: int, total: int) -> None:
        if num_there == total or num_there - reported.get(file, -(1 << 40)) >= 1 << 20:
            reported[file] = num_there
            line = {"status": f"pulling {file}", "digest": file, "total": total}
            report({**line, "completed": num_there})

    ModelStore().fetch(name, new_bar=partial(progress_bar, report=tell))
    report({"status": "verifying sha256 digest"})  # `fetch` did, before it kept the files


def base_modelfile(name: str) -> Modelfile:
    """The Modelfile of a model that another one is based on. Raises ModelNotFoundError for a model
    outside the cache, such as a path."""
    store, name = ModelStore(), plain_name(name)
    if found := store.modelfile(name):
        return found
    if store.find_cached(name) is None:
        raise ModelNotFoundError(f"{name}: not in the cache; POST /api/pull it first")
    return Modelfile(model=name)


def named_base(text: str) -> str:
    """The value of FROM in the text of a Modelfile, which is never a path here. Raises
    RequestError."""
    lines, named = enumerate(text.split("\n")), ""
    for _, line in lines:
        if line.strip() and not line.strip().startswith("#"):
            key, _, value = read_directive(line, lines)
            named = value.strip() if key == "FROM" else named
    if not named:
        refuse("the Modelfile has no FROM", "modelfile")
    return named


def create_model(name: str, given: Fields, report: Report) -> None:
    """Create a model that is based on another one, or on files that were sent before."""
    check_new_name(name)
    with blobs.CREATING:
        modelfile = new_modelfile(given, report)
        if kind := given.get("quantize"):
            modelfile = blobs.quantized(modelfile, kind, report)
        report({"status": "writing manifest"})
        write_modelfile(name, modelfile)
    blobs.discard_unused()


def new_modelfile(given: Fields, report: Report) -> Modelfile:
    """The Modelfile of a body of /api/create. Raises RequestError and CheckpointError."""
    report({"status": "reading model metadata"})
    reference, whole = given.get("from"), Modelfile()
    if text := given.get("modelfile"):
        whole = parse_modelfile(text, Path("Modelfile"))
        if whole.template or whole.tokenizer or whole.adapter or whole.draft or whole.mmproj:
            kinds = "TEMPLATE, TOKENIZER, ADAPTER, DRAFT and a second FROM"
            refuse(f"{kinds} are not allowed in a request", "modelfile")
        reference = named_base(text)
    if given.get("files"):
        path = blobs.made_of_files(given["files"])
        report({"status": "parsing GGUF" if path.is_file() else "converting model"})
        open_checkpoint(path)  # raises where it is no model
        modelfile = Modelfile(model=str(path))
    else:
        modelfile = base_modelfile(reference or required(given, "from"))
    for own in (whole, created_modelfile(given)):  # the later one overrides
        modelfile = dataclasses.replace(
            modelfile,
            system=own.system or modelfile.system,
            license=own.license or modelfile.license,
            parameters={**modelfile.parameters, **own.parameters},
            messages=own.messages or modelfile.messages,
        )
    return modelfile


def cached_models(name: str) -> list[CachedModel]:
    """The models that a request to delete `name` means. Raises ModelNotFoundError."""
    store = ModelStore()
    if not (store.modelfile(name) or name in ALIASES or parse_hub_ref(name)):
        raise ModelNotFoundError(f"{name}: no such model")
    return store.cached(name)


def pool_state(pool: ShelfPool) -> Json:
    """The fields of /api/ps for a model in memory."""
    engines = [worker.llm.engine for worker in pool.workers if worker.llm]
    num_bytes = pool.need_bytes + sum(engine.cache.nbytes for engine in engines)
    left_s = min(pool.used_s + pool.keep_s - time.monotonic(), FAR_S)
    return {
        "size": num_bytes,
        "size_vram": 0 if str(engines[0].decoder.device) in ("cpu", "none") else num_bytes,
        "expires_at": timestamp(time.time() + left_s),
        "context_length": pool.llm().engine.n_ctx,
    }


async def last_of(events: AsyncIterator[Json]) -> Json:
    """The last event of a stream."""
    async for event in events:
        last = event
    return last


class ModelHandlers(Handlers):
    """The routes of Ollama's API about models."""

    models: Shelf

    async def ollama_given(
        self, request: Request, fields: Mapping[str, str]
    ) -> tuple[Json, tuple[str, ...]]:
        body = await self.body(request)
        return read_fields(body, fields, self.config.strict, OLLAMA_NEUTRAL)

    async def ollama_version(self, request: Request) -> Response:
        """GET /api/version: the release of Ollama with this API"""
        return as_json({"version": OLLAMA_VERSION})

    async def ollama_tags(self, request: Request) -> Response:
        """GET /api/tags: the models that may be served"""
        found = [await self.models.find(name) for name in await self.models.names()]
        sources = [source for source in found if source]  # others were deleted meanwhile
        bodies = await asyncio.to_thread(lambda: [ollama_model(source) for source in sources])
        return as_json({"models": [body for body in bodies if body]})

    async def ollama_ps(self, request: Request) -> Response:
        """GET /api/ps: the models in memory"""
        pools = [pool for pool in self.models.pools.values() if pool.ready]
        for pool in pools:
            path = None if pool.need_bytes else await asyncio.to_thread(pool.source.locate)
            if path:  # not for a model whose files are gone
                pool.need_bytes = await asyncio.to_thread(pool.source.need_bytes)
        states = {pool.source: pool_state(pool) for pool in pools if pool.ready}
        bodies = await asyncio.to_thread(lambda: [ollama_model(source) for source in states])
        return as_json({"models": [{**b, **state} for b, state in zip(bodies, states.values())]})

    async def ollama_show(self, request: Request) -> Response:
        """POST /api/show"""
        given, _ = await self.ollama_given(request, OLLAMA_MODEL)
        source = await self.models.source(ollama_name(given))
        return as_json(await asyncio.to_thread(ollama_show, source))

    def check_open(self) -> None:
        """Raise WireError 403 where the models were named at the start."""
        if self.models.named:
            message = "this server serves the models it was started with"
            raise WireError(403, "fixed_models", f"{message}; start it without --model")

    async def ollama_pull(self, request: Request) -> Response:
        """POST /api/pull: download a model"""
        given, _ = await self.ollama_given(request, OLLAMA_PULL)
        self.check_open()
        name = plain_name(ollama_name(given))
        return await self.progress(request, given, lambda report: pull_lines(name, report))

    async def ollama_create(self, request: Request) -> Response:
        """POST /api/create: make a model that is based on another one"""
        given, _ = await self.ollama_given(request, OLLAMA_CREATE)
        self.check_open()
        name = plain_name(ollama_name(given))
        await self.models.renew(name)
        return await self.progress(request, given, lambda report: create_model(name, given, report))

    async def progress(
        self, request: Request, given: Fields, work: Callable[[Report], None]
    ) -> Response:
        """Run `work` in a thread, and answer with its lines as they come, or with the last one."""
        lines: asyncio.Queue[Json | None] = asyncio.Queue()
        loop, gone = asyncio.get_running_loop(), threading.Event()

        def report(line: Json) -> None:
            if gone.is_set():
                raise WireError(499, "client_gone", "the client went away")
            loop.call_soon_threadsafe(lines.put_nowait, line)

        def ended(task: asyncio.Future[None]) -> None:
            lines.put_nowait(None)
            if not task.cancelled():
                task.exception()  # marks it as seen: the client may be gone

        async def events() -> AsyncIterator[Json]:
            task = asyncio.ensure_future(loop.run_in_executor(STORE_THREADS, work, report))
            task.add_done_callback(ended)
            while (line := await lines.get()) is not None:
                yield line
            await task
            yield {"status": "success"}

        if given.get("stream", True):
            return stream_response(events(), NDJSON, gone.set)
        return as_json(await unless_disconnected(request.receive, last_of(events()), gone.set))

    async def ollama_copy(self, request: Request) -> Response:
        """POST /api/copy: another name for a model"""
        given, _ = await self.ollama_given(request, OLLAMA_COPY)
        self.check_open()
        source, target = required(given, "source"), plain_name(required(given, "destination"))
        await self.models.renew(target)
        await asyncio.to_thread(lambda: write_modelfile(target, base_modelfile(source)))
        return as_json({})

    async def ollama_delete(self, request: Request) -> Response:
        """DELETE /api/delete: unload a model and delete its files"""
        given, _ = await self.ollama_given(request, OLLAMA_MODEL)
        self.check_open()
        name = plain_name(ollama_name(given))
        found = await asyncio.to_thread(cached_models, name)
        await self.models.renew(name)
        await asyncio.to_thread(ModelStore().remove, found)
        await asyncio.to_thread(blobs.discard_unused)
        return as_json({})

    async def ollama_has_blob(self, request: Request) -> Response:
        """HEAD /api/blobs/{digest}: whether a file was sent before"""
        has_blob = blobs.blob_path(request.path_params["digest"]).exists()
        return as_json({}, 200 if has_blob else 404)

    async def ollama_blob(self, request: Request) -> Response:
        """POST /api/blobs/{digest}: keep a file for /api/create"""
        self.check_open()
        is_new = await blobs.receive_blob(request.path_params["digest"], request.stream())
        return as_json({}, 201 if is_new else 200)

    async def ollama_refuse(self, request: Request) -> Response:
        """POST /api/push: not supported"""
        raise WireError(400, "unsupported", f"{request.url.path} is not supported by this server")

    routes: ClassVar[tuple[Route, ...]] = (
        Route(ollama_version, ("GET /api/version",)),
        Route(ollama_tags, ("GET /api/tags",)),
        Route(ollama_ps, ("GET /api/ps",)),
        Route(ollama_show, ("POST /api/show",), OLLAMA_MODEL, ("model",)),
        Route(ollama_pull, ("POST /api/pull",), OLLAMA_PULL, ("model",)),
        Route(ollama_create, ("POST /api/create",), OLLAMA_CREATE, ("model",)),
        Route(ollama_copy, ("POST /api/copy",), OLLAMA_COPY, ("source", "destination")),
        Route(ollama_delete, ("DELETE /api/delete",), OLLAMA_MODEL, ("model",)),
        Route(ollama_has_blob, ("HEAD /api/blobs/{digest}",)),
        Route(ollama_blob, ("POST /api/blobs/{digest}",)),
        Route(ollama_refuse, ("POST /api/push",)),
    )


# Called with a file's name, the bytes there, and their number at the end; an exception that it
# raises ends the download
Progress = Callable[[str, int, int], None]


def progress_bar(name: str, report: Progress) -> type:
    """A class that huggingface_hub takes for tqdm, and that reports to a function."""

    class Bar:
        def __init__(self, *_: Any, total: int | None = None, initial: int = 0, **__: Any) -> None:
            self.total, self.n = total or 0, initial

        def update(self, num: int = 1) -> None:
            self.n += num
            report(name, self.n, self.total)

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def __getattr__(self, name: str) -> Any:  # set_description, refresh, ..: nothing to draw
            return lambda *_, **__: None

    return Bar


def check_new_name(name: str) -> None:
    """Raise RequestError for a bad name, or that of a model that was not created."""
    if not MODEL_NAME.fullmatch(name):
        raise RequestError(
            f"{excerpt(name)} is no name for a model; use name or name:tag of up to 200 letters",
            "model",
        )
    if name in (*ALIASES, TINY_RANDOM) or ModelStore().find_cached(name):
        raise RequestError(f"{name} is a model already; choose another name", "model")


def write_modelfile(name: str, modelfile: Modelfile) -> None:
    """Write the Modelfile of a model under its name. Raises RequestError for a bad name or that of
    another model, DownloadError where the file cannot be written."""
    check_new_name(name)
    path = ModelStore().modelfile_path(name)
    text = format_modelfile(modelfile)
    if re.search("[\ud800-\udfff]", text):
        raise RequestError("a lone surrogate is not text; no file can hold it", "system")
    if parse_modelfile(text, path) != modelfile:
        raise RequestError('a Modelfile cannot hold """, or text that is all space', "system")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        scratch = path.with_name(f"{path.name}.{secrets.token_hex(4)}~")
        scratch.write_text(text, encoding="utf-8")
        scratch.replace(path)
    except OSError as error:
        raise DownloadError(f"{path}: cannot be written: {error.strerror}") from None


def format_modelfile(modelfile: Modelfile) -> str:
    """Text that `parse_modelfile` reads as the same Modelfile, unless a line of a value ends with
    triple quotes."""
    block = '"""\n{}\n"""'.format
    files = (modelfile.model, modelfile.mmproj)
    rows: list[tuple[str, Any]] = [("FROM", file) for file in files if file]
    for name, value in modelfile.parameters.items():
        if name == "stop":
            rows += [("PARAMETER stop", block(word)) for word in value]
        else:  # max_tokens is None without a limit
            rows.append((f"PARAMETER {name}", -1 if value is None else value))
    for key in ("TOKENIZER", "ADAPTER", "DRAFT", "SYSTEM", "TEMPLATE", "LICENSE"):
        if (value := getattr(modelfile, DIRECTIVES[key])) is not None:
            rows.append((key, block(value)))
    rows += [(f"MESSAGE {m['role']}", block(m["content"])) for m in modelfile.messages]
    return "".join(f"{key} {value}\n" for key, value in rows)
