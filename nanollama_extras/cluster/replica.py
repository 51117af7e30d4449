"""A replica: one engine with the whole application of `nanollama --serve`, in a process that Ray
places. It answers calls instead of connections.

Seam       cluster.shipped opens a `Replica`. It imports cluster.calls.
Remove     delete the folder.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import sys
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING, Any, cast

from nanollama import (
    TINY_RANDOM,
    Json,
    LogFormatter,
    NanollamaError,
    ServerConfig,
    build_parser,
    create_app,
    extra,
    given_flags,
    log,
    preferred,
    read_settings,
)
from nanollama_extras.cluster.calls import OWN_HEADERS, Call, Head, Part

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message

    from nanollama import Models, Settings


def settings_of(values: Json) -> Settings:
    """The settings of a command line that was parsed elsewhere."""
    return read_settings(argparse.Namespace(**values), build_parser())


def open_models(settings: Settings) -> Models:
    """The models of a replica. The front has checked keys, origins and names of hosts."""
    args = settings.args
    is_test = bool(args.script) or settings.model == TINY_RANDOM
    own = given_flags(args, ServerConfig)
    own |= {"any_model": args.any_model or is_test, "api_keys": (), "cors_origins": ()}
    module = extra(*(("testing", "--script") if is_test else ("api.shelf", "--ray")))
    opener = module.open_models if is_test else module.open_shelf
    models: Models = opener(settings, ServerConfig(**own | {"host": "0.0.0.0"}))
    return models


class Exchange:
    """One call of an ASGI application: its messages in and out."""

    def __init__(self, call: Call, replica: str) -> None:
        self.call, self.replica = call, replica
        self.head: Head | None = None
        self.data: list[bytes] = []
        self.is_read = False
        self.gone, self.changed = asyncio.Event(), asyncio.Event()
        self.stored, self.known = dict(call.stored), set(call.stored)

    async def receive(self) -> Message:
        """The body, then the end of the connection when the front has closed it."""
        if not self.is_read:
            self.is_read = True
            return {"type": "http.request", "body": self.call.body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Take a message of the answer."""
        if message["type"] == "http.response.start":
            headers = (pair for pair in message.get("headers", []) if pair[0] not in OWN_HEADERS)
            self.head = Head(message["status"], tuple(headers), self.replica)
        elif message.get("body"):
            self.data.append(message["body"])
            self.changed.set()

    def take(self) -> Part:
        """Everything that came since the last time."""
        self.changed.clear()
        new = {name: one for name, one in self.stored.items() if name not in self.known}
        new |= dict.fromkeys(self.known - self.stored.keys())  # deleted ones
        self.known = set(self.stored)
        part = Part(b"".join(self.data), self.head, new)
        self.data, self.head = [], None
        return part

    async def parts(self, app: ASGIApp) -> AsyncIterator[Part]:
        """Run the application; yield its answer as it comes. Ends it when the front goes away."""
        task = asyncio.ensure_future(self.run(app))
        task.add_done_callback(lambda _: self.changed.set())
        try:
            while not task.done():
                await self.changed.wait()
                if self.data:
                    yield self.take()
            if self.data or self.head:
                yield self.take()
            task.result()
        finally:
            self.gone.set()
            if not task.done():  # it cancels its sequences, and then ends
                await asyncio.wait({task}, timeout=5)
                task.cancel()

    async def run(self, app: ASGIApp) -> None:
        """Run the application with the call's stored responses, in a context of its own."""
        if kept := preferred("api.responses", "STORED", cast("Any", None)):
            kept.set(self.stored)
        await app(self.scope(), self.receive, self.send)

    def scope(self) -> Json:
        """The call in ASGI's form."""
        call = self.call
        head = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1"}
        path = {"path": call.path, "raw_path": call.path.encode(errors="replace"), "root_path": ""}
        rest = {"method": call.method, "query_string": call.query, "headers": list(call.headers)}
        return {**head, **path, **rest, "scheme": "http", "client": ("front", 0), "server": None}


class Replica:
    """One engine behind an application. name: Ray's name of it."""

    def __init__(self, values: Json, name: str) -> None:
        log.handlers[:] = [logging.StreamHandler(sys.stderr)]
        log.handlers[0].setFormatter(LogFormatter())
        log.setLevel(logging.DEBUG if values.get("verbose") else logging.WARNING)
        self.name, self.failures = name, list[BaseException]()
        self.models = open_models(settings_of(values))
        self.models.on_failure = self.failures.append
        self.app = create_app(self.models)

    async def opened(self) -> Replica:
        """The replica with its model in memory. Raises as `check_health`."""
        self.life = self.models.lifespan(None)
        await self.life.__aenter__()
        while self.models.is_loading and not self.failures:
            await asyncio.sleep(0.01)
        self.check_health()
        return self

    def check_health(self) -> None:
        """Raise the error after which the engine cannot run; Ray then replaces the replica."""
        for error in self.failures:
            if isinstance(error, NanollamaError):  # Ray shows no more than its text
                raise RuntimeError(f"nanollama: {error}")
            raise error

    async def answer(self, call: Call) -> AsyncIterator[Part]:
        """The parts of the answer to a call."""
        async for part in Exchange(call, self.name).parts(self.app):
            yield part

    async def peek(self, path: str) -> tuple[int, bytes]:
        """The status and the body of GET `path`."""
        head, data = None, b""
        async for part in self.answer(Call("GET", path, b"", (), b"")):
            head, data = head or part.head, data + part.data
        return head.status if head else 500, data
