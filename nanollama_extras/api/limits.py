"""Limits on what a connection may cost before its request runs: time, memory, connections.

A body that arrives too slowly is answered 408, one that is too long 413, one for which there is no
room now 503. A connection whose next request does not come within --idle-timeout is closed.

Seam       `nanollama.serve` asks for `CONNECTIONS`, which names `Connection`; `create_app`
           for `layer`, `Bodies`, between the gate, which checks the key, and the handlers;
           `Handlers.body` for `read_json`; `Pool.start` for `prepare_all`.
Remove     delete this file; the size of a body is then limited, and the rest is not.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from nanollama import (
    ContextLengthError,
    RequestError,
    WireError,
    human_bytes,
    message_text,
    notify,
    parse_json,
    refuse,
)

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from nanollama import LLM, GenerationRequest, Prepared, ServerConfig

MAX_CONNECTIONS = 1000  # or three quarters of the files that this process may open
# Bytes a second: a body may take --idle-timeout and its size over this rate, and no pause in it
# may be longer than --idle-timeout
LEAST_RATE = 1 << 16
SMALL_BYTES = 1 << 16  # of a body that always has room
FILES = "/api/blobs/"  # beginning of paths whose bodies go to files, whatever their size
# Paths whose messages may have images, and what an image of the largest size adds to their bodies
WITH_IMAGES = re.compile(
    r"(/v1)?/(chat/completions|responses(/compact)?|messages(/count_tokens)?)"
    "|/tokenize|/apply-template|/api/(chat|generate)"
)
IMAGE_BYTES = 27 << 20  # 20 MB in base64
MAX_BODIES = 8  # of the largest size, for which there is room at a time
# Values in a body. Parsing holds the interpreter, so nothing else runs meanwhile: this many take
# 0.05 to 0.3 s, and a body of one long text takes less.
MAX_VALUES = 200_000
# Entries of a field, of which each costs time in every step, or in the template
MAX_ENTRIES = {"stop": 64, "logit_bias": 1024, "tools": 512}
MAX_OBJECTS = 10_000  # messages, items, .. in a field
CHARS_READ = 16  # of a prompt, for each token of the context, before it is encoded as a whole
STRING = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"', re.DOTALL)


def most_connections() -> int:
    """Connections at a time, fewer where the system allows few open files."""
    with contextlib.suppress(ImportError):  # Windows has no such module
        import resource

        num_files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        if num_files > 0:
            return min(MAX_CONNECTIONS, num_files * 3 // 4)
    return MAX_CONNECTIONS


class Connection(H11Protocol):
    """A connection that ends where the head of a request, or the rest of a body that was refused,
    takes longer than --idle-timeout. uvicorn's own timer stops at a request's first byte. Beyond
    `most_connections`, the connection that has waited longest for a request makes room."""

    waits_since = 0.0
    timer: asyncio.TimerHandle | None = None
    timed_cycle: Any = None  # the last request when the timer began

    @property
    def serves(self) -> bool:
        """True while a request runs."""
        return self.cycle is not None and not self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.watch()
        if len(self.connections) > most_connections():
            idle = [
                one for one in self.connections if isinstance(one, Connection) and not one.serves
            ]
            min(idle, key=lambda one: one.waits_since, default=self).transport.close()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self.watch()

    def connection_lost(self, exc: Exception | None) -> None:
        self.stop_timer()
        super().connection_lost(exc)

    def watch(self) -> None:
        """Let the timer run while bytes come that are part of no running request."""
        if self.serves or self.timed_cycle is not self.cycle:
            self.stop_timer()
        if not self.serves and self.timer is None:
            self.timed_cycle, self.waits_since = self.cycle, time.monotonic()
            self.timer = self.loop.call_later(self.timeout_keep_alive, self.end_wait)

    def stop_timer(self) -> None:
        if self.timer:
            self.timer.cancel()
        self.timer = None

    def end_wait(self) -> None:
        """Close the connection, unless a request came meanwhile."""
        self.timer = None
        if self.timed_cycle is self.cycle and not self.serves:
            self.transport.close()


class Bodies:
    """ASGI middleware that limits the bodies of requests."""

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self.app, self.config = app, config
        self.num_bytes = 0  # of all bodies that are read or wait for their answer
        self.turn = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        notify("api.image_hosts", "allow", self.config.image_hosts)
        body = Body(self, scope, receive)

        async def send_on(message: Message) -> None:
            body.release()
            await send(message)

        try:
            await self.app(scope, body.receive, send_on)
        finally:
            body.release()


class Body:
    """The body of one request on its way in."""

    def __init__(self, bodies: Bodies, scope: Scope, receive: Receive) -> None:
        self.bodies, self.receive_next = bodies, receive
        self.started_s = time.monotonic()
        self.num_bytes = self.num_held = 0
        self.is_whole = False
        length = dict(scope["headers"]).get(b"content-length", b"0")
        self.length = int(length) if length.isdigit() else 0
        self.is_file = scope["path"].startswith(FILES)
        more = IMAGE_BYTES if WITH_IMAGES.fullmatch(scope["path"]) else 0
        self.limit = scope["body_limit"] = bodies.config.max_body_bytes + more

    async def receive(self) -> Message:
        """The next message. Raises WireError 408, 413 or 503 for a body over a limit."""
        if self.is_whole:
            return await self.receive_next()
        self.check_size(self.length)
        message = await self.receive_in_time()
        if message["type"] == "http.request":
            self.num_bytes += len(message.get("body", b""))
            self.check_size(self.num_bytes)
            self.hold()
            self.is_whole = not message.get("more_body")
            if self.is_whole and self.num_bytes > SMALL_BYTES:
                async with self.bodies.turn:  # one is parsed in each round of the event loop
                    await asyncio.sleep(0)
        return message

    async def receive_in_time(self) -> Message:
        """The next message. Raises WireError 408 when it does not come, or the body is too slow."""
        idle_s = self.bodies.config.idle_s
        left_s = self.started_s + idle_s + self.num_bytes / LEAST_RATE - time.monotonic()
        task = asyncio.ensure_future(self.receive_next())
        try:
            if not (await asyncio.wait({task}, timeout=max(min(left_s, idle_s), 0)))[0]:
                problem = f"the rest of the body did not come; {self.num_bytes} bytes did"
                raise WireError(408, "request_timeout", problem, {"connection": "close"})
            return task.result()
        finally:
            task.cancel()

    def check_size(self, num_bytes: int) -> None:
        if num_bytes > self.limit and not self.is_file:
            text = f"the body is over {human_bytes(self.limit)}"
            raise WireError(413, "request_too_large", text)

    def hold(self) -> None:
        """Take room for the bytes beyond SMALL_BYTES."""
        if self.is_file:
            return
        bodies, more = self.bodies, max(self.num_bytes - SMALL_BYTES, 0) - self.num_held
        if bodies.num_bytes + more > MAX_BODIES * bodies.config.max_body_bytes:
            problem = "other requests' bodies take all the room; try again soon"
            raise WireError(503, "bodies_too_large", problem, {"retry-after": "1"})
        bodies.num_bytes += more
        self.num_held += more

    def release(self) -> None:
        """Give the room back."""
        self.bodies.num_bytes -= self.num_held
        self.num_held = 0


def read_json(data: bytes | bytearray) -> Any:
    """The value of a body. Raises ValueError where it is no JSON, RequestError for too many values
    in all or in a field."""
    if has_many_values(data):
        raise RequestError(f"the body has more than {MAX_VALUES} values; send fewer")
    value = parse_json(data)
    check_entries(value)
    check_entries(value.get("options") if isinstance(value, dict) else None)
    return value


def has_many_values(data: bytes | bytearray) -> bool:
    """True for JSON with more than MAX_VALUES values, found without parsing it."""

    def count_values(text: bytes | bytearray) -> int:
        return sum(map(text.count, (b",", b"[", b"{")))

    if count_values(data) <= MAX_VALUES:
        return False
    num_strings = (data.count(b'"') - data.count(b'\\"')) // 2  # or more
    return num_strings > 2 * MAX_VALUES or count_values(STRING.sub(b"", data)) > MAX_VALUES


def check_entries(fields: Any) -> None:
    """Raise RequestError for a field with too many entries."""
    for name, value in fields.items() if isinstance(fields, dict) else ():
        has_objects = isinstance(value, list) and bool(value) and isinstance(value[0], dict)
        most = MAX_ENTRIES.get(name, MAX_OBJECTS if has_objects else MAX_VALUES)
        if isinstance(value, (list, dict)) and len(value) > most:
            refuse(f"{name} has {len(value)} entries; at most {most} fit", name)


def prepare_all(llm: LLM, requests: Iterable[GenerationRequest]) -> list[Prepared]:
    """As `LLM.prepare_all`; refuses a text whose beginning fills the context twice before it reads
    the rest. Raises ContextLengthError."""
    requests, n_ctx = list(requests), llm.engine.n_ctx
    for request in {id(one.messages or one.prompt): one for one in requests}.values():
        text = request.prompt if isinstance(request.prompt, str) else ""
        text = max(text, request.suffix, key=len)
        if request.messages is not None:
            text = "".join(map(message_text, request.messages))
        start = text[: CHARS_READ * n_ctx]
        if start != text and (num_tokens := len(llm.encode(start))) > 2 * n_ctx:
            problem = f"the prompt has over {num_tokens} tokens and the context holds {n_ctx}"
            raise ContextLengthError(f"{problem}; shorten it", "prompt")
    return llm.prepare_all(requests)


layer = Bodies
CONNECTIONS: Mapping[str, Any] = {"http": Connection}  # settings of uvicorn
