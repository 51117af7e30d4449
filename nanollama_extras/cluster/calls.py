"""A request on its way from the front to a replica, its answer on the way back, and the connection
that carries both.

A front has one connection to each replica, for all calls. A message on it is its length in 4 bytes
and a pickled list of (number of the call, item). An end collects what it has to send until its
event loop has run everything that is ready: the tokens of one step make one message.

    front -> replica   Call: begin; None: the client has gone
    replica -> front   Part, bytes: more of the answer; None: its end; Failure: its end

A replica first sends a random challenge. It reads nothing but the answer to it, an HMAC under a
secret that the front got through Ray, before it unpickles anything.

Seam       cluster.front and cluster.replica have the two ends.
Remove     delete the folder.
"""

from __future__ import annotations

import asyncio
import pickle
import socket
from dataclasses import dataclass, field
from typing import Any, cast

Headers = tuple[tuple[bytes, bytes], ...]
# Headers of a client that the front has checked, or that are about its own connection
FRONT_HEADERS = frozenset(
    b"host origin authorization x-api-key cookie connection content-length transfer-encoding "
    b"expect access-control-request-method access-control-request-headers".split()
)
OWN_HEADERS = frozenset((b"x-request-id", b"request-id"))  # of an answer; the front sets its own
LENGTH = 4  # bytes before a message
KEY = 32  # bytes of a secret, of a challenge, and of the HMAC that answers it
ALIVE = {  # a host that is gone closes no connection: these notice it within 20 s
    "TCP_KEEPIDLE": 5,
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    "TCP_USER_TIMEOUT": 20_000,  # ms
}


@dataclass(frozen=True, slots=True)
class Call:
    """A request. stored: earlier responses that it names, by their ids."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    stored: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of an answer."""

    status: int
    headers: Headers


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an answer. The first one has a head. stored: responses to keep for later calls;
    None for one to delete."""

    data: bytes
    head: Head | None = None
    stored: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Failure:
    """The end of an answer that the replica cannot finish."""

    reason: str


@dataclass(frozen=True, slots=True)
class Address:
    """Where a replica takes connections. replica: Ray's name of it."""

    replica: str
    host: str
    port: int
    secret: bytes


class Channel(asyncio.Protocol):
    """One end of a connection. A subclass takes items in `got`."""

    transport: asyncio.Transport
    is_trusted = False  # whether the other end has proved that it knows the secret

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.received, self.unsent = bytearray(), list[tuple[int, Any]]()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        own = transport.get_extra_info("socket")
        own.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in ALIVE.items():
            if hasattr(socket, name):
                own.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def put(self, number: int, item: Any) -> None:
        """Send an item, with others of this turn of the event loop."""
        if not self.unsent:
            self.loop.call_soon(self.flush)
        self.unsent.append((number, item))

    def flush(self) -> None:
        """Send what is not sent yet."""
        items, self.unsent = self.unsent, []
        if items and not self.transport.is_closing():
            data = pickle.dumps(items, pickle.HIGHEST_PROTOCOL)
            self.transport.write(len(data).to_bytes(LENGTH, "big") + data)

    def data_received(self, data: bytes) -> None:
        self.received += data
        if not self.is_trusted and not self.read_proof():
            return
        start, size = 0, len(self.received)
        while size - start >= LENGTH:
            end = start + LENGTH + int.from_bytes(self.received[start : start + LENGTH], "big")
            if end > size:
                break
            for number, item in pickle.loads(self.received[start + LENGTH : end]):
                self.got(number, item)
            start = end
        del self.received[:start]

    def read_proof(self) -> bool:
        """Read what comes before the first message. Returns whether the other end is trusted."""
        raise NotImplementedError

    def got(self, number: int, item: Any) -> None:
        """Take an item of a call."""
        raise NotImplementedError
