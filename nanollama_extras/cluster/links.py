"""The front's connections to its replicas: one for each replica that Ray knows. A replica without a
connection gets no requests.

Seam       cluster.front has `Links`. It imports cluster.calls.
Remove     delete the folder.
"""

from __future__ import annotations

import asyncio
import hmac
import itertools
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from nanollama import first_line, log
from nanollama_extras.cluster.calls import KEY, Address, Call, Channel, Failure, Part

POLL_S = 0.05  # between two looks at the replicas that Ray knows
ASK_S = 10.0  # for a replica to give its address, and to take a connection
AGAIN_S = 1.0  # until a replica that could not be reached is tried again


class LostError(Exception):
    """The replica has ended before it answered."""


class Answer:
    """The answer to one call, as it comes."""

    def __init__(self, channel: ReplicaChannel, number: int) -> None:
        self.channel, self.number = channel, number
        self.items: deque[Part | bytes | Failure | LostError | None] = deque()
        self.changed = asyncio.Event()

    def put(self, item: Part | bytes | Failure | LostError | None) -> None:
        self.items.append(item)
        self.changed.set()

    async def next(self) -> Part | bytes | None:
        """The next part; all bytes that have come, at once; None at the end. Raises LostError, and
        RuntimeError where the replica has failed."""
        while not self.items:
            self.changed.clear()
            await self.changed.wait()
        item = self.items.popleft()
        if isinstance(item, bytes):
            while self.items and isinstance(self.items[0], bytes):
                item += self.items.popleft()  # type: ignore[operator]
        if isinstance(item, LostError):
            raise item
        if isinstance(item, Failure):
            raise RuntimeError(item.reason)
        return item

    def close(self) -> None:
        """Forget the answer. The replica hears of it if it has not ended."""
        if self.channel.answers.pop(self.number, None):
            self.channel.put(self.number, None)


class ReplicaChannel(Channel):
    """The connection to a replica, at the front."""

    def __init__(self, address: Address) -> None:
        super().__init__()
        self.address = address
        self.numbers = itertools.count()
        self.answers: dict[int, Answer] = {}
        self.trusted, self.lost = asyncio.Event(), asyncio.Event()

    def read_proof(self) -> bool:
        if len(self.received) < KEY:
            return False
        challenge = bytes(self.received[:KEY])
        del self.received[:KEY]
        self.transport.write(hmac.digest(self.address.secret, challenge, "sha256"))
        self.is_trusted = True
        self.trusted.set()
        return True

    def begin(self, call: Call) -> Answer:
        """Send a call."""
        number = next(self.numbers)
        answer = self.answers[number] = Answer(self, number)
        self.put(number, call)
        return answer

    def got(self, number: int, item: Any) -> None:
        if answer := self.answers.get(number):
            if item is None or isinstance(item, Failure):
                del self.answers[number]
            answer.put(item)

    def connection_lost(self, error: Exception | None) -> None:
        reason = first_line(error) if error else "its connection has ended"
        for answer in self.answers.values():
            answer.put(LostError(reason))
        self.answers.clear()
        self.lost.set()


@dataclass(eq=False)
class Links:
    """The connections. live: the names of the replicas that Ray knows. ask: the address that a name
    has; of another replica where that one has ended."""

    live: Callable[[], tuple[str, ...]]
    ask: Callable[[str], Awaitable[Address]]
    channels: dict[str, ReplicaChannel] = field(default_factory=dict)
    tasks: dict[str, asyncio.Task[None]] = field(default_factory=dict)

    def names(self) -> tuple[str, ...]:
        """The replicas that take requests."""
        open_ones = {name for name, one in self.channels.items() if not one.lost.is_set()}
        return tuple(name for name in self.live() if name in open_ones)

    async def watch(self) -> None:
        """Connect to replicas as they come, until it is cancelled."""
        try:
            while True:
                for name in self.live():
                    if name not in self.tasks:
                        self.tasks[name] = asyncio.ensure_future(self.link(name))
                await asyncio.sleep(POLL_S)
        finally:
            for task in self.tasks.values():
                task.cancel()

    async def link(self, name: str) -> None:
        """Connect to a replica, and keep the connection until it ends; then it may be tried
        again."""
        try:
            channel = await asyncio.wait_for(self.connect(name), ASK_S)
        except Exception as error:
            level = logging.DEBUG if isinstance(error, LostError) else logging.WARNING
            reason = first_line(error) or type(error).__name__
            log.log(level, f"replica {name} cannot be reached: {reason}; trying again")
            await asyncio.sleep(AGAIN_S)
        else:
            self.channels[name] = channel
            try:
                await channel.lost.wait()
            finally:
                del self.channels[name]
                channel.transport.close()
        del self.tasks[name]

    async def connect(self, name: str) -> ReplicaChannel:
        """A connection to a replica. Raises LostError and OSError."""
        address = await self.ask(name)
        if address.replica != name:
            raise LostError("it has ended")
        loop = asyncio.get_running_loop()
        _, channel = await loop.create_connection(
            lambda: ReplicaChannel(address), address.host, address.port
        )
        await channel.trusted.wait()
        return channel
