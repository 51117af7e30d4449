"""A request on its way from the front to a replica, and its answer on the way back.

Seam       values that cluster.front and cluster.replica exchange; they are pickled.
Remove     delete the folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

Headers = tuple[tuple[bytes, bytes], ...]
# Headers of a client that the front has checked, or that are about its own connection
FRONT_HEADERS = frozenset(
    b"host origin authorization x-api-key cookie connection content-length transfer-encoding "
    b"expect access-control-request-method access-control-request-headers".split()
)
OWN_HEADERS = frozenset((b"x-request-id", b"request-id"))  # of an answer; the front sets its own


@dataclass(frozen=True, slots=True)
class Call:
    """A request. replica: the one that shall answer. stored: earlier responses that it names, by
    their ids."""

    method: str
    path: str
    query: bytes
    headers: Headers
    body: bytes
    replica: str = ""
    stored: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Head:
    """The beginning of an answer."""

    status: int
    headers: Headers
    replica: str  # the one that answers


@dataclass(frozen=True, slots=True)
class Part:
    """A part of an answer. The first one has a head. stored: responses to keep for later calls;
    None for one to delete."""

    data: bytes
    head: Head | None = None
    stored: dict[str, Any] = field(default_factory=dict)
