"""The log of a server: the time of each line, and for each request the reason of an error, the
tokens and their speed; as JSON lines with --log-json.

Seam       `nanollama.create_app` makes `layer` the outermost ASGI layer and wraps the observer in
           `Watched`; `nanollama.serve` calls `set_up`; `add_options` adds --log-json.
Remove     delete this file; a line then has client, method, path, status, seconds and id.
"""

from __future__ import annotations

import json
import logging
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from nanollama import LogFormatter, Observer, log, option_group

if TYPE_CHECKING:
    import argparse

    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from nanollama import ServerConfig, Usage

MAX_REASON = 4096  # bytes of an error's body that are read


@dataclass(slots=True)
class Notes:
    """What a request did, for its line."""

    status: int = 0
    body: bytearray = field(default_factory=bytearray)  # of an error
    usages: list[Usage] = field(default_factory=list)  # of its sequences


NOTES: ContextVar[Notes | None] = ContextVar("notes", default=None)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add --log-json."""
    option_group(parser, "server")("--log-json", "log JSON lines", action="store_true")


class layer:
    """ASGI middleware that notes the status of each answer, and the body of an error."""

    def __init__(self, app: ASGIApp, _: ServerConfig) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        notes = Notes()

        async def note(message: Message) -> None:
            if message["type"] == "http.response.start":
                notes.status = message["status"]
            elif notes.status >= 400 and len(notes.body) < MAX_REASON:
                notes.body += message.get("body", b"")
            await send(message)

        token = NOTES.set(notes)
        try:
            await self.app(scope, receive, note)
        finally:
            NOTES.reset(token)


class Watched(Observer):
    """An observer that notes the tokens of each request, in front of another one."""

    def __init__(self, inner: Observer) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        return getattr(self.inner, name)

    def count_request(self, route: str, status: int) -> None:
        self.inner.count_request(route, status)

    def count_usage(self, usage: Usage) -> None:
        self.inner.count_usage(usage)
        if notes := NOTES.get():
            notes.usages.append(usage)


def reason(body: bytes) -> str:
    """The text of an error object, in any dialect; empty for other bodies."""
    try:
        found = json.loads(body)["error"]
    except (ValueError, KeyError, TypeError):
        return ""
    return str(found.get("message", "") if isinstance(found, dict) else found)[:200]


def details(notes: Notes | None) -> dict[str, Any]:
    """The fields of a request beyond those of the core's line."""
    if notes is None:
        return {}
    found: dict[str, Any] = {}
    if notes.status >= 400 and (text := reason(bytes(notes.body))):
        found["reason"] = text
    if notes.usages:
        found["prompt_tokens"] = sum(usage.prompt_tokens for usage in notes.usages)
        found["completion_tokens"] = sum(usage.completion_tokens for usage in notes.usages)
        longest = max(usage.decode_s for usage in notes.usages)
        later = sum(max(usage.completion_tokens - 1, 0) for usage in notes.usages)
        found["tokens_per_second"] = round(later / longest, 1) if longest > 0 else 0.0
    return found


class ServerFormatter(LogFormatter):
    """Lines with their time; for a request, with its details."""

    def format(self, record: logging.LogRecord) -> str:
        moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(record.created))
        line = f"{moment} {super().format(record)}"
        if not hasattr(record, "request"):
            return line
        found = details(NOTES.get())
        if "completion_tokens" in found:
            line += f" {found['prompt_tokens']}+{found['completion_tokens']} tokens"
            line += f" {found['tokens_per_second']} t/s"
        return f"{line} ({found['reason']})" if "reason" in found else line


class JsonFormatter(logging.Formatter):
    """One JSON object for each line."""

    def format(self, record: logging.LogRecord) -> str:
        moment = datetime.fromtimestamp(record.created, timezone.utc).isoformat(
            timespec="milliseconds"
        )
        body: dict[str, Any] = {"time": moment, "level": record.levelname.lower()}
        request = getattr(record, "request", None)
        if request is None:
            return json.dumps({**body, "message": record.getMessage()})
        return json.dumps({**body, **request, **details(NOTES.get())})


def set_up(args: argparse.Namespace) -> None:
    """Give the log of a server its form."""
    form = JsonFormatter() if getattr(args, "log_json", False) else ServerFormatter()
    for handler in log.handlers:
        handler.setFormatter(form)
