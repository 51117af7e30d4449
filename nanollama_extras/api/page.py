"""The web chat: GET / serves page.html, and POST /chat/completions is a short route for web pages.
With --mcp, the page calls the tools of api.lent_tools.

Seam: a dialect (`nanollama.DIALECTS`). To remove it, delete this file, page.html and that row.
"""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import re
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from starlette.responses import HTMLResponse

from nanollama import (
    CHAT_FIELDS,
    SSE,
    GenerationRequest,
    Handlers,
    Reply,
    Route,
    SamplingParams,
    parse_messages,
    read_fields,
    refuse,
    sse,
)

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from nanollama import Delta, Json

PAGE = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
WEB_SSE = dataclasses.replace(SSE, last=sse({"done": True}))
MAX_MESSAGES, MAX_MESSAGE_CHARS, MAX_CHARS = 500, 8000, 32000  # of a conversation
# (least, most, default) of the sampling fields; a value outside is clamped
CLAMPS = {"temperature": (0.0, 2.0, 0.8), "top_k": (0, 200, 50), "max_tokens": (1, 4096, 512)}


@lru_cache(maxsize=1)
def page_headers() -> dict[str, str]:
    """Headers that let the browser run the page's own script and style, known by their hashes, and
    nothing else."""

    def digest(tag: str) -> str:
        element = re.search(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
        assert element is not None
        return base64.b64encode(hashlib.sha256(element[1].encode()).digest()).decode()

    return {
        "content-security-policy": (
            f"default-src 'none'; script-src 'sha256-{digest('script')}'; style-src "
            f"'sha256-{digest('style')}'; connect-src 'self'; img-src data:; base-uri 'none'; "
            "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
            "trusted-types 'none'"
        ),
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
    }


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

    async def page(self, request: Request) -> Response:
        """GET /: the chat"""
        mark = " data-tools" if self.config.mcp else ""  # the page then asks for the tools
        return HTMLResponse(PAGE.replace("<html", f"<html{mark}", 1), headers=page_headers())

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
