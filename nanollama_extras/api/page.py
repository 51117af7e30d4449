"""The web chat: GET / serves the page of the folder web, with its styles and scripts written into
it, and POST /chat/completions is a short route for web pages. With --mcp, the page calls the tools
of api.lent_tools.

Seam: a dialect (`nanollama.DIALECTS`). To remove it, delete this file, the folder web and that row.
"""

from __future__ import annotations

import base64
import dataclasses
import gzip
import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import Response

from nanollama import (
    CHAT_FIELDS,
    SSE,
    GenerationRequest,
    Handlers,
    Reply,
    Route,
    SamplingParams,
    UsageError,
    parse_messages,
    read_fields,
    refuse,
    sse,
)

if TYPE_CHECKING:
    from starlette.requests import Request

    from nanollama import Delta, Json, Models, Observer, ServerConfig

WEB = Path(__file__).with_name("web")
WEB_SSE = dataclasses.replace(SSE, last=sse({"done": True}))
MAX_MESSAGES, MAX_MESSAGE_CHARS, MAX_CHARS = 500, 8000, 32000  # of a conversation
# (least, most, default) of the sampling fields; a value outside is clamped
CLAMPS = {"temperature": (0.0, 2.0, 0.8), "top_k": (0, 200, 50), "max_tokens": (1, 4096, 512)}


def read_page() -> str:
    """page.html with the text of each style sheet and script in place of its link: one request."""
    page = (WEB / "page.html").read_text(encoding="utf-8")
    style, script = r'<link rel="stylesheet" href="(.+?)">', r'<script src="(.+?)"(.*?)></script>'
    page = re.sub(style, lambda m: f"<style>\n{(WEB / m[1]).read_text('utf-8')}</style>", page)

    def inlined(match: re.Match[str]) -> str:
        return f"<script{match[2]}>\n{(WEB / match[1]).read_text('utf-8')}</script>"

    return re.sub(script, inlined, page)


PAGE = read_page()
# What sets formulas; the page loads it, as ./?temml, with the first formula of an answer
MATH = (WEB / "vendored/temml.js").read_text(encoding="utf-8")


def page_server(url: str) -> str:
    """The address of a server that the page may use, without /v1. Raises UsageError."""
    if not re.fullmatch(r"https?://([\w.-]+|\[[\da-f:.]+\])(:\d+)?(/[\w./~-]*)?", url, re.ASCII):
        raise UsageError(f"--page-server {url}: give an address, as in http://localhost:8080")
    return re.sub(r"/(v1/?)?$", "", url)


@lru_cache(maxsize=4)
def page_headers(servers: tuple[str, ...] = ()) -> dict[str, str]:
    """Headers that let the browser run the page's own scripts and style, known by their hashes, and
    what these scripts load, and nothing else; and let these reach `servers` beside their own."""
    origins = ["'self'", *dict.fromkeys("/".join(url.split("/")[:3]) for url in servers)]

    def hashes(tag: str) -> str:
        texts = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", PAGE, re.DOTALL)
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        return " ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests)

    return {
        "content-security-policy": (
            f"default-src 'none'; script-src {hashes('script')} 'strict-dynamic'; style-src "
            f"{hashes('style')}; connect-src {' '.join(origins)}; img-src data:; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
            "trusted-types temml"
        ),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }


@lru_cache(maxsize=4)
def compressed(text: str) -> bytes:
    """The text in gzip's format."""
    return gzip.compress(text.encode())


def text_response(
    request: Request, text: str, media_type: str, servers: tuple[str, ...] = ()
) -> Response:
    """A response with a text, compressed for a client that takes that."""
    headers = {**page_headers(servers), "vary": "accept-encoding"}
    if "gzip" not in request.headers.get("accept-encoding", ""):
        return Response(text, headers=headers, media_type=media_type)
    headers["content-encoding"] = "gzip"
    return Response(compressed(text), headers=headers, media_type=media_type)


def check_length(messages: list[Json]) -> None:
    """Raise RequestError for a conversation that is over the limits."""
    sizes = [len(message.get("content") or "") for message in messages]
    if len(messages) > MAX_MESSAGES:
        refuse(f"there are {len(messages)} messages; at most {MAX_MESSAGES} fit", "messages")
    if max(sizes) > MAX_MESSAGE_CHARS or sum(sizes) > MAX_CHARS:
        refuse(
            f"the longest message has {max(sizes)} characters and the conversation {sum(sizes)}; "
            f"at most {MAX_MESSAGE_CHARS} and {MAX_CHARS} fit",
            "messages",
        )


@dataclass
class PageReply(Reply):
    """The stream of an answer: an event for each piece of text. `gpu` numbers the replica."""

    gpu: int

    def push(self, delta: Delta) -> list[Json]:
        return [{"token": delta.text, "gpu": self.gpu}] if delta.text else []


class API(Handlers):
    """The page and its own route."""

    def __init__(self, models: Models, config: ServerConfig, observer: Observer) -> None:
        super().__init__(models, config, observer)
        self.servers = tuple(map(page_server, config.page_servers))

    async def page(self, request: Request) -> Response:
        """GET /: the chat"""
        if request.url.query == "temml":
            return text_response(request, MATH, "text/javascript")
        mark = " data-tools" if self.config.mcp else ""  # the page then asks for the tools
        mark += f' data-servers="{" ".join(self.servers)}"' if self.servers else ""
        page = PAGE.replace("<html", f"<html{mark}", 1)
        return text_response(request, page, "text/html", self.servers)

    async def chat_stream(self, request: Request) -> Response:
        """POST /chat/completions: {token, gpu} events, then {done}. Sampling values out of range
        are clamped; conversations over the limits are refused."""
        given, _ = read_fields(await self.body(request), CHAT_FIELDS)
        pool = await self.models.pool(given.get("model"))
        messages = parse_messages(given, pool.source.opening)
        check_length(messages)
        values = {"repeat_penalty": 1.0, **pool.sampling}
        for name, (least, most, default) in CLAMPS.items():
            value = given.get(name, values.get(name, default))
            values[name] = most if value is None else min(max(value, least), most)
        params = SamplingParams(**values)
        chat = GenerationRequest(messages=messages, params=params)
        job = await pool.start((chat,), {"prompt": "messages"})
        return await self.answer(request, job, PageReply(pool.workers.index(job.worker)), WEB_SSE)

    routes = (
        Route(page, ("GET /",)),
        Route(chat_stream, ("POST /chat/completions",), CHAT_FIELDS, ("messages",)),
    )
