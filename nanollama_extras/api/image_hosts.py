"""--allow-image-hosts: images of messages from other servers, of those that it names.

A request could make the server read what only the server can reach. So nothing is fetched unless
the host is named; its name is resolved once, every address must be public, and the connection goes
to that very address. Each redirect is checked in the same way.

Seam       answers.images calls `fetch`; api.limits calls `allow` with the hosts of a server, for
           each request.
Remove     delete this file; images must then be in the message itself.
"""

from __future__ import annotations

import contextlib
import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, wait
from contextvars import ContextVar
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NoReturn
from urllib.parse import SplitResult, urljoin, urlsplit

from nanollama import excerpt, first_line, human_bytes, refuse
from nanollama_extras.answers.images import MAX_BYTES

REDIRECTS, MAX_REDIRECTS = (301, 302, 303, 307, 308), 3
MAX_SECONDS = 15.0  # for an image, redirects included
PIECE = 1 << 16
HOSTS: ContextVar[tuple[str, ...]] = ContextVar("HOSTS", default=())  # of the request's server
# Of IPv6, the addresses of the internet: https://www.iana.org/assignments/ipv6-address-space
UNICAST = ipaddress.ip_network("2000::/3")


def allow(hosts: tuple[str, ...]) -> None:
    """Let the present request fetch images from these hosts: NAME, or NAME:PORT."""
    HOSTS.set(tuple(host.lower() for host in hosts))


@dataclass(frozen=True, slots=True)
class Place:
    """Where an image is, as its URL says, and until when it may take (time.monotonic)."""

    name: str  # of the image, for errors
    url: SplitResult
    host: str
    port: int
    end_s: float

    def refuse(self, problem: str) -> NoReturn:
        """Raise RequestError about this image."""
        refuse(f"{self.name}: {problem}; send the image as a data: URL", self.name)

    def left_s(self) -> float:
        """The seconds that are left. Raises RequestError for none."""
        left_s = self.end_s - time.monotonic()
        if left_s <= 0:
            self.refuse(f"{self.host} took more than {MAX_SECONDS:g} s")
        return left_s


def fetch(url: str, name: str) -> bytes:
    """The file at a URL of an allowed host. Raises RequestError, which begins with `name`."""
    end_s, num_left = time.monotonic() + MAX_SECONDS, MAX_REDIRECTS
    while True:
        place = find_place(url, name, end_s)
        with errors_of_network(place), connected(place) as connection:
            response = ask(connection, place)
            if response.status not in REDIRECTS or not num_left:
                return read_body(response, place)
            url = urljoin(url, response.headers.get("location") or "")
            num_left -= 1


def find_place(url: str, name: str, end_s: float) -> Place:
    """A URL taken apart. Raises RequestError for a host that is not allowed."""
    try:
        parts = urlsplit(url)
        usual = {"http": 80, "https": 443}[parts.scheme]
        port = parts.port or usual
        host = (parts.hostname or "").encode("idna").decode()
    except (ValueError, KeyError):  # UnicodeError is a ValueError
        refuse(f"{name}: {excerpt(url)} is no http or https URL", name)
    place = Place(name, parts, host, port, end_s)
    spelled = [host] if port in (80, 443) else []
    if not {*spelled, f"{host}:{port}"} & {*HOSTS.get()}:
        known = f"{host}:{port}" if not spelled else host
        place.refuse(f"images of {excerpt(known)[1:-1]} are not fetched (--allow-image-hosts)")
    return place


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet, in each of its notations."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        if ip.ipv4_mapped:
            ip = ip.ipv4_mapped
        elif ip.sixtofour or ip.teredo or ip not in UNICAST:  # the first two stand for one of IPv4
            return False
    return ip.is_global and not ip.is_multicast


@contextlib.contextmanager
def connected(place: Place) -> Iterator[socket.socket]:
    """A connection that is shut when the time is over, however slowly bytes come."""
    connection = connect(place)
    timer = threading.Timer(place.left_s(), shut, (connection,))
    timer.daemon = True
    timer.start()
    try:
        yield connection
    finally:
        timer.cancel()
        connection.close()


def shut(connection: socket.socket) -> None:
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def connect(place: Place) -> socket.socket:
    """A connection to the first address of a host. Raises RequestError where one of its addresses
    is not public, and OSError."""
    addresses = addresses_of(place)
    if not addresses or not all(map(is_public, addresses)):
        place.refuse(f"{place.host} is not a host of the internet")
    connection = socket.create_connection((addresses[0], place.port), timeout=place.left_s())
    if place.url.scheme == "https":
        try:
            return tls().wrap_socket(connection, server_hostname=place.host)
        except BaseException:
            connection.close()
            raise
    return connection


def addresses_of(place: Place) -> list[str]:
    """The addresses of a host. Raises RequestError when the time is over, and OSError."""
    answer: Future[Any] = Future()

    def resolve() -> None:
        try:
            answer.set_result(socket.getaddrinfo(place.host, place.port, type=socket.SOCK_STREAM))
        except Exception as error:  # for the thread that waits
            answer.set_exception(error)

    threading.Thread(target=resolve, daemon=True).start()  # it cannot be told when to end
    while not wait([answer], place.left_s()).done:
        pass
    return [str(row[4][0]) for row in answer.result()]


@lru_cache(maxsize=1)
def tls() -> ssl.SSLContext:
    return ssl.create_default_context()


def ask(connection: socket.socket, place: Place) -> http.client.HTTPResponse:
    """Send the request, and read the head of the answer."""
    client = http.client.HTTPConnection(place.host, place.port)
    client.sock = connection
    path = place.url.path or "/"
    target = f"{path}?{place.url.query}" if place.url.query else path
    client.request("GET", target, headers={"Accept": "image/*", "Accept-Encoding": "identity"})
    return client.getresponse()


def read_body(response: Any, place: Place) -> bytes:
    """The body of an answer. Raises RequestError for another status, too many bytes, too long a
    wait."""
    if response.status != 200:
        place.refuse(f"{place.host} answered with status {response.status}")
    data = bytearray()
    while piece := response.read1(PIECE):
        data += piece
        if len(data) > MAX_BYTES:
            place.refuse(f"the file is over {human_bytes(MAX_BYTES)}")
    place.left_s()  # a connection that was shut looks as if it had ended
    return bytes(data)


@contextlib.contextmanager
def errors_of_network(place: Place) -> Iterator[None]:
    """Turn errors of the connection into RequestErrors."""
    try:
        yield
    except (OSError, http.client.HTTPException, ValueError) as error:
        place.left_s()
        place.refuse(f"{place.host} cannot be read: {first_line(error)}")
