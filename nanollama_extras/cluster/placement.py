"""The choice of a replica for a request: the one that holds the beginning of its text.

A text is cut into blocks, each with a hash of everything up to its end. The replica that got the
most blocks of a text before takes the request, unless it is much busier than the least busy one.

Seam       cluster.front asks a `Placement` for each request. It needs no Ray.
Remove     delete the folder.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nanollama import Fields

BLOCK = 256  # characters
MAX_BLOCKS = 256  # of a text: 64 KB decide
MAX_REMEMBERED = 1 << 17  # blocks and sessions whose replica is known
SLACK = 4  # requests that a replica may have beyond the least busy one, and still get its texts
HEAD = ("model", "tools", "system", "instructions")  # fields that many chats share
TEXT = ("prompt", "messages", "input", "query")  # the field with the text itself
SESSION_HEADERS = ("x-session-id", "session-id", "session_id", "x-claude-code-session-id")


LIVE: dict[str, tuple[str, ...]] = {}  # name of an application on Ray -> its replicas


@dataclass(frozen=True, slots=True)
class Beginning:
    """The hashes of a request: of sessions that it belongs to, and of its blocks in order, of which
    the first `num_shared` are of fields that many chats share."""

    sessions: tuple[bytes, ...] = ()
    blocks: tuple[bytes, ...] = ()
    num_shared: int = 0


def pieces(value: Any) -> Iterator[str]:
    """The text of a field in blocks; each item of a list begins one."""
    for item in value if isinstance(value, list) else [value]:
        is_system = isinstance(item, dict) and item.get("role") in ("system", "developer")
        text = item if isinstance(item, str) else json.dumps(item, sort_keys=True)
        for start in range(0, len(text), BLOCK):
            yield f"{is_system:d}{text[start : start + BLOCK]}"


def chained(texts: Iterable[str]) -> Iterator[bytes]:
    """A hash of each text and all before it."""
    last = b""
    for text in texts:
        encoded = text.encode("utf-8", errors="replace")
        last = hashlib.blake2b(last + encoded, digest_size=8).digest()
        yield last


def beginning(body: Fields, headers: Mapping[str, str]) -> Beginning:
    """The hashes of a body, with the sessions that headers and fields name."""
    names = [headers[name] for name in SESSION_HEADERS if headers.get(name)]
    names += [value for value in (body.get("prompt_cache_key"),) if isinstance(value, str)]
    head = [json.dumps([body.get(name) for name in HEAD], sort_keys=True)]
    text: Any = next((body[name] for name in TEXT if body.get(name)), [])
    texts = list(itertools.islice(itertools.chain(pieces(head), pieces(text)), MAX_BLOCKS))
    num_head = len(list(pieces(head)))
    first = (index for index, one in enumerate(texts) if index >= num_head and one[0] == "0")
    sessions = tuple(session(name) for name in names)
    return Beginning(sessions, tuple(chained(texts)), next(first, len(texts)))


def session(name: str) -> bytes:
    """The hash of a session's name."""
    return next(chained([f"session {name}"]))


@dataclass(eq=False)
class Placement:
    """The replicas with their loads, and the replica of each block that was seen lately."""

    replicas: Callable[[], tuple[str, ...]]  # those that run
    loads: Counter[str] = field(default_factory=Counter)  # requests that have not ended
    seen: dict[bytes, str] = field(default_factory=dict)  # hash -> replica, the newest last
    turns: Iterator[int] = field(default_factory=itertools.count)
    last_turn: Counter[str] = field(default_factory=Counter)  # when each was chosen as least busy

    def pick(self, start: Beginning, avoid: Container[str] = ()) -> str:
        """The replica for a request; an empty name where none is left."""
        free = {name: None for name in self.replicas() if name not in avoid}  # in their order
        if not free:
            return ""
        least = min(free, key=lambda name: (self.loads[name], self.last_turn[name]))
        known = self.holder(start, free)
        if known and self.loads[known] <= self.loads[least] + SLACK:
            return known
        self.last_turn[least] = next(self.turns) + 1
        return least

    def holder(self, start: Beginning, free: Container[str]) -> str | None:
        """The replica of a session, or else of the longest beginning that is more than shared."""
        longest_first = reversed(start.blocks[start.num_shared :])
        names = (self.seen.get(key) for key in (*start.sessions, *longest_first))
        return next((name for name in names if name in free), None)

    def note(self, start: Beginning, replica: str) -> None:
        """Remember that a replica has a beginning."""
        for key in (*start.sessions, *start.blocks[start.num_shared :]):
            self.seen.pop(key, None)
            self.seen[key] = replica
        while len(self.seen) > MAX_REMEMBERED:
            del self.seen[next(iter(self.seen))]

    def begin(self, replica: str) -> None:
        """Count a request that a replica gets."""
        self.loads[replica] += 1

    def end(self, replica: str) -> None:
        """Count a request as ended."""
        self.loads[replica] -= 1
        if self.loads[replica] <= 0:  # the names of replicas that are gone must not pile up
            del self.loads[replica]
