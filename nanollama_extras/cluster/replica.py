"""A replica: one engine with the whole application of `nanollama --serve`, in a process that Ray
places. Calls of fronts take the place of HTTP connections.

Seam       cluster.shipped opens a `Replica`. It imports cluster.calls.
Remove     delete the folder.
"""

from __future__ import annotations

import argparse
import asyncio
import hmac
import logging
import secrets
import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from nanollama import (
    TINY_RANDOM,
    Json,
    LogFormatter,
    NanollamaError,
    ServerConfig,
    create_app,
    extra,
    first_line,
    given_flags,
    log,
    preferred,
    read_settings,
)
from nanollama_extras.cluster.calls import (
    KEY,
    OWN_HEADERS,
    Address,
    Call,
    Channel,
    Failure,
    Head,
    Part,
)

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message

    from nanollama import Models, Settings

CANCEL_S = 5.0  # until a call whose client has gone is cancelled


def settings_of(values: Json) -> Settings:
    """The settings of a command line that was parsed elsewhere."""
    return read_settings(argparse.Namespace(**values))


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
    """One call of an ASGI application: its messages in and out. put: sends a part of the answer."""

    def __init__(self, call: Call, put: Callable[[Part | bytes], None]) -> None:
        self.call, self.put = call, put
        self.head: Head | None = None
        self.is_read = False
        self.gone = asyncio.Event()  # the client, or the front
        self.stored, self.known = dict(call.stored), set(call.stored)

    async def receive(self) -> Message:
        """The body, then the end of the connection when the client has gone."""
        if not self.is_read:
            self.is_read = True
            return {"type": "http.request", "body": self.call.body, "more_body": False}
        await self.gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message: Message) -> None:
        """Pass a message of the answer on."""
        if message["type"] == "http.response.start":
            headers = (pair for pair in message.get("headers", []) if pair[0] not in OWN_HEADERS)
            self.head = Head(message["status"], tuple(headers))
        elif message.get("body"):
            self.pass_on(message["body"])

    def pass_on(self, data: bytes) -> None:
        """Send bytes, with the head before the first ones, and with responses that are new."""
        if self.head is None and self.stored.keys() == self.known:
            self.put(data)
            return
        new = {name: one for name, one in self.stored.items() if name not in self.known}
        new |= dict.fromkeys(self.known - self.stored.keys())  # deleted ones
        self.put(Part(data, self.head, new))
        self.head, self.known = None, set(self.stored)

    async def run(self, app: ASGIApp) -> None:
        """Run the application with the call's stored responses, in a context of its own."""
        if kept := preferred("api.responses", "STORED", cast("Any", None)):
            kept.set(self.stored)
        await app(self.scope(), self.receive, self.send)
        if self.head or self.stored.keys() != self.known:
            self.pass_on(b"")

    def scope(self) -> Json:
        """The call in ASGI's form."""
        call = self.call
        head = {"type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1"}
        path = {"path": call.path, "raw_path": call.path.encode(errors="replace"), "root_path": ""}
        rest = {"method": call.method, "query_string": call.query, "headers": list(call.headers)}
        return {**head, **path, **rest, "scheme": "http", "client": ("front", 0), "server": None}


class FrontChannel(Channel):
    """The connection of a front, at the replica. Its calls run until it ends."""

    def __init__(self, replica: Replica) -> None:
        super().__init__()
        self.replica = replica
        self.calls: dict[int, tuple[Exchange, asyncio.Task[None]]] = {}

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self.replica.channels.add(self)
        self.challenge = secrets.token_bytes(KEY)
        self.transport.write(self.challenge)

    def read_proof(self) -> bool:
        if len(self.received) < KEY:
            return False
        proof = bytes(self.received[:KEY])
        del self.received[:KEY]
        own = hmac.digest(self.replica.address.secret, self.challenge, "sha256")
        self.is_trusted = hmac.compare_digest(proof, own)
        if not self.is_trusted:
            self.received.clear()
            self.transport.close()
        return self.is_trusted

    def got(self, number: int, item: Call | None) -> None:
        if item:
            exchange = Exchange(item, partial(self.put, number))
            task = asyncio.ensure_future(self.answer(number, exchange))
            self.calls[number] = exchange, task
        elif number in self.calls:
            self.end(*self.calls[number])

    def end(self, exchange: Exchange, task: asyncio.Task[None]) -> None:
        """End a call whose client has gone: it cancels its sequences, or is cancelled itself."""
        exchange.gone.set()
        self.loop.call_later(CANCEL_S, task.cancel)

    async def answer(self, number: int, exchange: Exchange) -> None:
        """Run a call to its end."""
        end = None
        try:
            await exchange.run(self.replica.app)
        except (Exception, asyncio.CancelledError) as error:
            end = Failure(f"{type(error).__name__}: {first_line(error)}")
        finally:
            del self.calls[number]
            self.put(number, end)

    def connection_lost(self, error: Exception | None) -> None:
        self.replica.channels.discard(self)
        for call in self.calls.values():
            self.end(*call)


class Replica:
    """One engine behind an application. name: Ray's name of it."""

    def __init__(self, values: Json, name: str) -> None:
        log.handlers[:] = [logging.StreamHandler(sys.stderr)]
        log.handlers[0].setFormatter(LogFormatter())
        log.setLevel(logging.DEBUG if values.get("verbose") else logging.WARNING)
        self.name, self.failures = name, list[BaseException]()
        self.channels: set[FrontChannel] = set()
        self.models = open_models(settings_of(values))
        self.models.on_failure = self.failures.append
        self.app = create_app(self.models)

    async def opened(self, host: str) -> Replica:
        """The replica with its model in memory, which listens. Raises as `check_health`."""
        self.life = self.models.lifespan(None)
        await self.life.__aenter__()
        while self.models.is_loading and not self.failures:
            await asyncio.sleep(0.01)
        self.check_health()
        await self.listen(host)
        return self

    async def listen(self, host: str) -> None:
        """Take connections of fronts at a free port."""
        loop = asyncio.get_running_loop()
        self.server = await loop.create_server(lambda: FrontChannel(self), host, 0)
        port = self.server.sockets[0].getsockname()[1]
        self.address = Address(self.name, host, port, secrets.token_bytes(KEY))

    def check_health(self) -> None:
        """Raise the error after which the engine cannot run; Ray then replaces the replica."""
        for error in self.failures:
            if isinstance(error, NanollamaError):  # Ray shows no more than its text
                raise RuntimeError(f"nanollama: {error}")
            raise error

    @property
    def num_calls(self) -> int:
        """The calls that have not ended."""
        return sum(len(channel.calls) for channel in self.channels)

    async def close(self) -> None:
        """Wait for the end of every call. Then no front can begin another one here."""
        while self.num_calls:
            await asyncio.sleep(0.02)
        self.server.close()
        for channel in self.channels:
            channel.flush()
            channel.transport.close()
