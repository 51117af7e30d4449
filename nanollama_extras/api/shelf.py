"""Models that leave memory: after an idle time (--keep-alive), or where another model needs room.

Seam       a subclass of `nanollama.Models`, which `nanollama.create_app` prefers.
Remove     delete this file; models then stay in memory, --keep-alive is refused, and Ollama's API,
           which unloads models, goes as well.
"""

from __future__ import annotations

import asyncio
import math
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nanollama import Models, log

if TYPE_CHECKING:
    from nanollama import Pool

KEEP_ALIVE_S = 300.0  # idle time by default, as with Ollama; a single named model stays


@dataclass(slots=True)
class Stay:
    """How long an idle model stays, and the memory that it takes."""

    keep_s: float = math.inf
    timer: asyncio.TimerHandle | None = None
    need_bytes: int = 0  # of the whole model, estimated; 0 until it is known
    loading_bytes: int = 0  # the part that loading has still to take


def is_idle(pool: Pool) -> bool:
    """True while no request uses a model or waits for it."""
    return not pool.num_waiting and not any(worker.num_sequences for worker in pool.workers)


@dataclass(eq=False)
class Shelf(Models):
    """The models in memory, each with its stay. Where memory is short, the idle model least
    recently used leaves first, and busy ones are awaited."""

    stays: weakref.WeakKeyDictionary[Pool, Stay] = field(default_factory=weakref.WeakKeyDictionary)
    room: asyncio.Lock = field(default_factory=asyncio.Lock)  # held while a model makes room
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    tasks: set[asyncio.Task[None]] = field(default_factory=set)  # the loop holds weak references

    def __post_init__(self) -> None:
        super().__post_init__()
        default_s = math.inf if self.starting else KEEP_ALIVE_S
        self.keep_s = default_s if self.config.keep_alive_s is None else self.config.keep_alive_s

    def stay(self, pool: Pool) -> Stay:
        """The stay of a model, which may have left already."""
        return self.stays.setdefault(pool, Stay())

    async def pool(self, name: str | None, keep_s: float | None = None) -> Pool:
        """As Models.pool. keep_s: the idle time from now on, instead of the server's."""
        pool = await super().pool(name)
        self.stay(pool).keep_s = self.keep_s if keep_s is None else keep_s
        self.note_use(pool)
        return pool

    async def load(self, pool: Pool) -> None:
        try:
            await super().load(pool)
        except BaseException:
            self.stays.pop(pool, None)
            raise
        self.stay(pool).loading_bytes = 0

    async def make_room(self, pool: Pool) -> None:
        """Unload other models until the memory suffices, or none is left. The model that the server
        starts with needs no room."""
        if self.starting:
            return
        async with self.room:
            stay = self.stay(pool)
            stay.need_bytes = await asyncio.to_thread(pool.source.need_bytes)
            while stay.need_bytes > self.unclaimed_bytes():
                others = [other for other in self.pools.values() if other.ready]
                if not others:
                    break
                if idle := [other for other in others if is_idle(other)]:
                    await self.forget(min(idle, key=lambda other: other.used_s))
                else:
                    self.idle.clear()
                    await self.idle.wait()
            stay.loading_bytes = stay.need_bytes

    def unclaimed_bytes(self) -> float:
        """The free memory that no model is about to take."""
        return self.free_bytes() - sum(self.stay(p).loading_bytes for p in self.pools.values())

    def note_use(self, pool: Pool) -> None:
        """Start the idle time of a model that has become idle."""
        super().note_use(pool)
        stay = self.stay(pool)
        if stay.timer:
            stay.timer.cancel()
        if is_idle(pool):
            self.idle.set()
            if 0 <= stay.keep_s < math.inf:
                loop = asyncio.get_running_loop()
                stay.timer = loop.call_later(stay.keep_s, self.expire, pool)

    def expire(self, pool: Pool) -> None:
        """Unload a model whose idle time is over."""
        if is_idle(pool) and pool.ready:
            self.forget(pool)

    def forget(self, pool: Pool) -> asyncio.Task[None]:
        """Take a model out of service. Returns the task that ends its threads after its last
        answer."""

        async def retire() -> None:
            while not is_idle(pool):
                self.idle.clear()
                await self.idle.wait()
            await pool.stop()
            self.stays.pop(pool, None)

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
            if is_idle(pool):
                await task
