"""The front: a server without a model. It checks keys, origins and bodies, picks a replica for each
request, passes the answer on as it comes, and keeps the stored responses.

A request whose replica ends before it answered goes to another one. A stream that has begun ends
with an error event. A replica whose queue is full is passed over; the last one's 429 goes out when
all are full.

Seam       a subclass of `nanollama.Models` with middleware around the routes; cluster.serve opens
           it. It imports cluster.calls, cluster.links and cluster.placement, and api.metrics's
           text in sums.
Remove     delete the folder.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import math
import re
import types
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

from starlette.middleware import Middleware
from starlette.responses import Response

from nanollama import (
    SSE,
    Encoding,
    EngineWorker,
    Json,
    Models,
    NanollamaError,
    WireError,
    as_json,
    extra_object,
    find_dialect,
    first_line,
    log,
    parse_json,
    preferred,
    unless_disconnected,
)
from nanollama_extras.cluster.calls import FRONT_HEADERS, Address, Call, Head, Part
from nanollama_extras.cluster.links import POLL_S, Answer, Links, LostError, ReplicaChannel
from nanollama_extras.cluster.placement import Beginning, Placement, beginning, session

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

# Paths that need no model; the tools of --mcp run where the front is
OWN_PATHS = re.compile("/|/health|/openapi.json|/v1/capabilities|/tools(/.*)?")
ENCODINGS = {  # module of an API -> the encoding of its streams, where it is not SSE
    "api.anthropic": "api.anthropic:EVENTS",
    "api.ollama": "api.ollama_models:NDJSON",
    "api.page": "api.page:WEB_SSE",
    "api.responses": "api.responses:NAMED_SSE",
}
STREAMS = (b"text/event-stream", b"application/x-ndjson")
OPENINGS = (  # events at the beginning of a stream that have nothing of the answer yet
    b'"delta": {"role": "assistant"',
    b"event: message_start\n",
    b"event: response.created\n",
    b"event: response.in_progress\n",
)
MAX_TRIES = 4  # replicas that end before they answer the same request
FULL_S = 0.2  # until a request that lost its replica asks full ones again
NONE_S = 600.0  # for a replica to come, where there is none
PEEK_S = 5.0  # for a replica to show its metrics


def is_opening(data: bytes) -> bool:
    """Whether the events of a stream have nothing of the answer yet."""
    *events, rest = data.split(b"\n\n")
    return not rest and all(any(mark in event for mark in OPENINGS) for event in events)


def stream_error(path: str, error: NanollamaError, sent: bytes) -> bytes:
    """The end of a stream that cannot go on, in the form of its API. sent: its last bytes."""
    module = find_dialect(path) or ""
    place = ENCODINGS.get(module)
    encoding: Encoding = extra_object(place, path) if place else SSE
    body = encoding.error(error)
    if module == "api.responses":
        numbers = re.findall(rb'"sequence_number": (\d+)', sent)
        fields = {"code": error.code, "message": str(error), "param": None}
        body = {"type": "error", **fields, "sequence_number": int((numbers or [-1])[-1]) + 1}
    return encoding.encode(body) + encoding.last


def summed(texts: list[str]) -> str:
    """Texts of Prometheus's format as one, in which each number is the sum; a time, the first."""
    sums: dict[str, float] = {}
    for line in "\n".join(texts).splitlines():
        name, _, value = line.rpartition(" ")
        if line.startswith("#"):
            sums.setdefault(line, 0)
        elif "_created" in name:  # a time
            sums[name] = min(sums.get(name, math.inf), float(value))
        elif name:
            sums[name] = sums.get(name, 0) + float(value)
    lines = [name if name.startswith("#") else f"{name} {value}" for name, value in sums.items()]
    return "\n".join([*lines, ""])


@dataclass(eq=False)
class FrontModels(Models):
    """What the front knows: the replicas, their loads, and the stored responses.

    connect: deploys the replicas, or finds them -> a Ray handle. disconnect: the opposite. live:
    the names of the replicas that Ray knows."""

    connect: Callable[[], Any] = lambda: None
    disconnect: Callable[[], None] = lambda: None
    live: Callable[[], tuple[str, ...]] = tuple
    title: str = "replicas on Ray"
    waits: bool = False  # for replicas, before it takes requests; else it says that it is loading
    stored: dict[str, Any] = field(default_factory=dict)
    statuses: Counter[int] = field(default_factory=Counter)  # of answers
    num_lost: int = 0  # replicas that ended before they answered
    handle: Any = None
    watching: asyncio.Task[None] | None = None

    def __post_init__(self) -> None:
        self.middleware = [Middleware(cast("Any", Front), models=self)]
        self.links = Links(self.live, self.address)
        self.placement = Placement(self.links.names)

    def __str__(self) -> str:
        return self.title

    @property
    def workers(self) -> list[EngineWorker]:
        """A stand-in with the load of each replica, for /health."""
        loads = self.placement.loads
        names = self.placement.replicas()
        rows = [types.SimpleNamespace(num_sequences=loads[name]) for name in names]
        return cast("list[EngineWorker]", rows)

    async def address(self, name: str) -> Address:
        """Where a replica takes calls."""
        address: Address = await self.handle.address.remote(name)
        return address

    async def start(self) -> None:
        """Deploy the replicas, which load the model. An error ends the server."""
        try:
            self.handle = await asyncio.to_thread(self.connect)
            self.watching = asyncio.ensure_future(self.links.watch())
            while not self.links.channels:
                await asyncio.sleep(0.01)
            self.is_loading = False
        except Exception as error:
            self.waits = False
            self.on_failure(error)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Any) -> AsyncIterator[None]:
        async with super().lifespan(_):
            while self.is_loading and self.waits:
                await asyncio.sleep(0.01)
            yield
        if self.watching:
            self.watching.cancel()
        await asyncio.to_thread(self.disconnect)

    def keep(self, part: Part, replica: str) -> None:
        """Store the responses of a part; the oldest make room."""
        for name, response in part.stored.items():
            self.stored[name] = response
            if response is None:
                del self.stored[name]
            self.placement.note(Beginning((session(name),)), replica)
        if part.stored:
            preferred("api.responses", "make_room", cast("Any", len))(self.stored)

    def stored_for(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The stored responses that a request names."""
        if find_dialect(path) != "api.responses":
            return {}
        names = {body.get("previous_response_id"), *path.split("/")}
        items = body.get("input") if isinstance(body.get("input"), list) else []
        wanted = {item.get("id") for item in items or [] if isinstance(item, dict)} - {None}

        def has_item(response: Any) -> bool:
            return any(item.get("id") in wanted for item in response.body["output"])

        known = self.stored.items()
        return {n: one for n, one in known if n in names or (wanted and has_item(one))}


class Front:
    """ASGI middleware that answers by replicas."""

    def __init__(self, app: ASGIApp, models: FrontModels) -> None:
        self.app, self.models = app, models

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or OWN_PATHS.fullmatch(scope["path"]):
            await self.app(scope, receive, send)
            return
        self.models.check_ready()
        if scope["path"] in ("/metrics", "/stats"):
            own = self.metrics if scope["path"] == "/metrics" else self.stats
            await (await own())(scope, receive, send)
            return
        request = await self.read(scope, receive)
        await unless_disconnected(receive, request.answer(send), lambda: None)

    async def read(self, scope: Scope, receive: Receive) -> Forwarded:
        """A request with its whole body."""
        data = bytearray()
        more = True
        while more:
            message = await receive()
            more = bool(message.get("more_body"))
            data += message.get("body", b"")
        body: Json = {}
        with contextlib.suppress(ValueError, NanollamaError):  # the replica refuses it
            body = preferred("api.limits", "read_json", parse_json)(data) if data else {}
        body = body if isinstance(body, dict) else {}
        headers = tuple(pair for pair in scope["headers"] if pair[0] not in FRONT_HEADERS)
        path, stored = scope["path"], self.models.stored_for(scope["path"], body)
        call = Call(scope["method"], path, scope["query_string"], headers, bytes(data), stored)
        texts = {name.decode("latin-1"): value.decode("latin-1") for name, value in headers}
        start = beginning(body, texts)
        ids = tuple(session(name) for name in stored)
        return Forwarded(
            self.models, call, dataclasses.replace(start, sessions=(*ids, *start.sessions))
        )

    async def peeks(self, path: str) -> list[bytes]:
        """The answers of all replicas to GET `path`; those that do not answer are left out."""
        channels = self.models.links.channels
        asked = (self.peek(channels[name], path) for name in self.models.links.names())
        found = await asyncio.gather(*asked, return_exceptions=True)
        return [data for data in found if isinstance(data, bytes)]

    async def peek(self, channel: ReplicaChannel, path: str) -> bytes:
        """The answer of a replica to GET `path`. Raises LostError and TimeoutError."""

        async def whole() -> bytes:
            data = b""
            while (part := await answer.next()) is not None:
                if isinstance(part, Part):
                    if part.head and part.head.status != 200:
                        raise LostError(f"status {part.head.status}")
                    part = part.data
                data += part
            return data

        answer = channel.begin(Call("GET", path, b"", (), b""))
        try:
            return await asyncio.wait_for(whole(), PEEK_S)
        finally:
            answer.close()

    async def metrics(self) -> Response:
        """GET /metrics: the sums over the replicas, and the front's own numbers"""
        texts = [text.decode() for text in await self.peeks("/metrics")]
        rows = [
            f'nanollama_front_answers_total{{status="{status}"}} {count}'
            for status, count in sorted(self.models.statuses.items())
        ]
        rows.append(f"nanollama_front_replicas {len(self.models.placement.replicas())}")
        rows.append(f"nanollama_front_lost_total {self.models.num_lost}")
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(summed(texts) + "\n".join([*rows, ""]), media_type=kind)

    async def stats(self) -> Response:
        """GET /stats: the load of each replica"""
        bodies = [json.loads(data) for data in await self.peeks("/stats")]
        counts = ("total_workers", "available_workers", "busy_workers")
        totals = {name: sum(body[name] for body in bodies) for name in counts}
        rows = [
            {**row, "replica": number}
            for number, body in enumerate(bodies)
            for row in body["workers"]
        ]
        return as_json({**totals, "workers": rows})


@dataclass(eq=False)
class Forwarded:
    """A request that replicas answer."""

    models: FrontModels
    call: Call
    start: Beginning
    tried: set[str] = field(default_factory=set)
    num_sent: int = 0  # parts that the client has got
    last: bytes = b""  # the last of them

    async def answer(self, send: Send) -> None:
        """Answer by the first replica that can. Raises WireError where none can."""
        num_lost = 0
        while num_lost < MAX_TRIES:
            try:
                if await self.ask(send, num_lost):
                    return
                if num_lost and not self.others():  # it had a place once, so it may wait for one
                    await asyncio.sleep(FULL_S)
                    self.tried.clear()
            except LostError as error:
                num_lost += 1
                self.models.num_lost += 1
                log.warning(f"a replica ended before it answered: {first_line(error)}")
        message = "the replicas end before they answer; try again soon"
        raise WireError(503, "no_replica", message, {"retry-after": "5"})

    async def pick(self) -> str:
        """The replica to ask. Waits for one where there is none. Raises WireError."""
        loop, timeout_s = asyncio.get_running_loop(), self.models.config.timeout_s
        started_s = loop.time()
        while not (name := self.models.placement.pick(self.start, self.tried)):
            if timeout_s and loop.time() - started_s > timeout_s:
                message = f"no replica was ready in {timeout_s:g} s"
                raise WireError(504, "timeout", message, {"x-should-retry": "false"})
            if loop.time() - started_s > NONE_S:
                message = f"no replica was ready in {NONE_S:g} s; try again soon"
                raise WireError(503, "no_replica", message, {"retry-after": "5"})
            await asyncio.sleep(POLL_S)
            self.tried.clear()
        return name

    async def ask(self, send: Send, num_lost: int) -> bool:
        """Pass one replica's answer on. Returns False for another try: this one was full, and
        others may not be, or the request had a place before. Raises LostError."""
        placement, name = self.models.placement, await self.pick()
        self.tried.add(name)
        placement.begin(name)
        answer = self.models.links.channels[name].begin(self.call)
        try:
            return await self.pass_all(answer, name, send, num_lost)
        except LostError as error:
            if not self.num_sent:
                raise
            await self.break_off(error, send)
            return True
        finally:
            placement.end(name)
            answer.close()

    async def pass_all(self, answer: Answer, name: str, send: Send, num_lost: int) -> bool:
        """`ask`, for the answer of replica `name`. The opening of a stream goes out with what
        follows: until then, another replica may answer."""
        head, opening = None, b""
        while (part := await answer.next()) is not None:
            if isinstance(part, Part):
                if part.head and part.head.status == 429 and (self.others() or num_lost):
                    return False
                head = head or part.head
                self.models.keep(part, name)
                part = part.data
            if head:
                opening += part
                if is_opening(opening):
                    continue
                self.models.placement.note(self.start, name)
                await self.begin(head, send)
                head, part = None, opening
            await self.pass_on(part, send)
        if head:
            await self.begin(head, send)
        await send({"type": "http.response.body", "body": opening if head else b""})
        return True

    def others(self) -> set[str]:
        """The replicas that have not been asked."""
        return set(self.models.placement.replicas()) - self.tried

    async def begin(self, head: Head, send: Send) -> None:
        """Send the beginning of an answer to the client."""
        self.models.statuses[head.status] += 1
        kinds = [value for key, value in head.headers if key == b"content-type"]
        self.is_stream = any(kind.startswith(STREAMS) for kind in kinds)
        start = {"type": "http.response.start", "status": head.status}
        await send({**start, "headers": list(head.headers)})

    async def pass_on(self, data: bytes, send: Send) -> None:
        """Send a part to the client."""
        self.num_sent += 1
        self.last = data
        await send({"type": "http.response.body", "body": data, "more_body": True})

    async def break_off(self, error: LostError, send: Send) -> None:
        """End an answer whose replica has ended; the server closes a connection that fails."""
        if not self.is_stream:
            raise RuntimeError(first_line(error))
        shown = WireError(502, "replica_lost", "the replica has ended; send the request again")
        data = stream_error(self.call.path, shown, self.last)
        await send({"type": "http.response.body", "body": data, "more_body": False})
