"""`--mcp FILE`: the tools of MCP servers, which the model may ask the user to run.

FILE holds the `mcpServers` object of other clients. A thread of its own starts the programs in it,
or reaches the addresses, and talks to them through the package `mcp`. An error of a server becomes
a warning at the start, and the text of a result later.

Seam       `open_servers(path)` gives answers.toolbox and api.lent_tools an object with `tools`,
           `call` and `close`. It imports answers.schemas, to leave out a tool that no request
           could offer.
Remove     delete this module, api/lent_tools.py and its row of DIALECTS, and --mcp.
Source     https://modelcontextprotocol.io/specification
"""

from __future__ import annotations

import asyncio
import atexit
import base64
import contextlib
import json
import logging
import math
import os
import re
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import Future, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio

import nanollama
from nanollama import PackageError, RequestError, UsageError, excerpt, first_line, log
from nanollama_extras.answers.schemas import readied

if TYPE_CHECKING:
    from nanollama import Fields, Json

INSTALL = 'pip install ".[mcp]"'
mcp: Any = nanollama.LazyModule("mcp", "client.streamable_http", install=INSTALL)
httpx2: Any = nanollama.LazyModule("httpx2", install=INSTALL)

START_S = 60.0  # for a server to list its tools: `npx` and `uvx` download a package first
PATIENCE_S = 3.0  # before a line says that servers are waited for
CALL_S = 120.0  # for the result of a call
CLOSE_S = 10.0  # for all servers to end: the package itself kills one that does not
MAX_TOOLS = 500  # of a server
MAX_NAME_CHARS = 64  # of a tool, as OpenAI has it
MAX_RESULT_CHARS = 20_000  # of a result: a context holds few of that length
STRINGS = "an object of strings"
FIELDS = {  # of a server in the file -> what its value must be
    "command": "a string",
    "args": "a list of strings",
    "env": STRINGS,
    "cwd": "a string",
    "url": "a string",
    "headers": STRINGS,
    "type": "a string",
    "transport": "a string",
    "disabled": "true or false",
}
HTTP = ("http", "streamable-http", "streamable_http", "streamablehttp")  # names of one transport


# ---- the file ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class ServerEntry:
    """A server of the file: a program to start, or an address. `problem`: why it cannot be used."""

    name: str
    command: str = ""
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    cwd: str | None = None
    url: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    problem: str = ""


def is_valid(value: Any, wanted: str) -> bool:
    if wanted == "true or false":
        return isinstance(value, bool)
    if wanted == "a string":
        return isinstance(value, str)
    kind, parts = (list, value) if wanted != STRINGS else (dict, getattr(value, "values", list)())
    return isinstance(value, kind) and all(isinstance(part, str) for part in parts)


def expanded(value: Any, where: str) -> Any:
    """A value of the file with the environment's variables in the place of ${NAME}, ${env:NAME} and
    ${NAME:-default}. Raises UsageError."""

    def variable(found: re.Match[str]) -> str:
        name, has_default, default = found[1].removeprefix("env:").partition(":-")
        if name not in os.environ and not has_default:
            raise UsageError(f"{where}: {found[0]} is not a variable of the environment")
        return os.environ.get(name) or default

    if isinstance(value, str):
        return re.sub(r"\$\{([^}]*)\}", variable, value)
    if isinstance(value, list):
        return [expanded(part, where) for part in value]
    if isinstance(value, dict):
        return {key: expanded(part, where) for key, part in value.items()}
    return value


def read_entry(name: str, given: Any, where: str) -> ServerEntry:
    """A server of the file. Raises UsageError, which names the place and what is needed there."""
    if not isinstance(given, dict):
        raise UsageError(f"{where} is {excerpt(given)}; an object is needed")
    known = {key: value for key, value in given.items() if key in FIELDS and value is not None}
    for key, value in known.items():
        if not is_valid(value, FIELDS[key]):
            raise UsageError(f"{where}.{key} is {excerpt(value)}; {FIELDS[key]} is needed")
    if not known.get("command") and not known.get("url"):
        raise UsageError(f'{where} needs "command", a program to start, or "url", an address')
    if ignored := ", ".join(key for key in given if key not in FIELDS):
        log.warning(f"{where}: without effect here: {ignored[:200]}")
    default = "stdio" if known.get("command") else "http"
    transport = str(known.pop("type", None) or known.pop("transport", None) or default).lower()
    values = {key: expanded(value, f"{where}.{key}") for key, value in known.items()}
    url = values.get("url", "")
    if transport in HTTP and not re.match(r"https?://[^/]", url):
        raise UsageError(f"{where}.url is {excerpt(url)}; an address with http:// is needed")
    if transport == "stdio" and not values.get("command"):
        raise UsageError(f'{where} needs "command", a program to start')
    if transport not in ("stdio", *HTTP):
        problem = f"its transport is {excerpt(transport)}; stdio and http are supported"
        return ServerEntry(name, problem=problem)
    own = ("url", "headers") if transport in HTTP else ("command", "args", "env", "cwd")
    fields = {key: values[key] for key in own if key in values}
    return ServerEntry(name, **{**fields, "args": tuple(fields.get("args", ()))})


def read_servers(path: str) -> list[ServerEntry]:
    """The servers of the file that are not disabled. Raises UsageError."""
    try:
        body = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: not valid JSON: {first_line(error)}") from None
    key = "servers" if isinstance(body, dict) and "mcpServers" not in body else "mcpServers"
    servers = body.get(key) if isinstance(body, dict) else None
    if not isinstance(servers, dict):
        raise UsageError(f'{path}: needs {{"mcpServers": {{"NAME": {{"command": ...}}}}}}')
    entries = [
        read_entry(name, given, f"{path}: {key}.{name}")
        for name, given in servers.items()
        if not (isinstance(given, dict) and given.get("disabled") is True)
    ]
    if not entries:
        raise UsageError(f"{path}: {key} holds no server that is not disabled")
    return entries


# ---- results -------------------------------------------------------------------------------------


def num_bytes(data: str) -> int:
    """The length of what a text in base64 stands for."""
    with contextlib.suppress(ValueError):
        return len(base64.b64decode(data))
    return len(data)


def block_text(block: Any) -> str:
    """A content block as text. What is no text is named."""
    kind = block.type
    if kind == "text":
        return str(block.text)
    if kind == "resource_link":
        return f"[{block.name}: {block.uri}]"
    if kind == "resource":
        resource = block.resource
        if hasattr(resource, "text"):
            return str(resource.text)
        size, mime = num_bytes(resource.blob), resource.mime_type or "no type"
        return f"[{resource.uri}, {mime}, {size} bytes: not shown]"
    if kind in ("image", "audio"):
        return f"[{kind}, {block.mime_type}, {num_bytes(block.data)} bytes: not shown]"
    return f"[{kind}: not shown]"


def result_text(result: Any) -> str:
    """The result of a call as the model reads it."""
    text = "\n".join(map(block_text, result.content))
    if not result.content and result.structured_content is not None:
        text = json.dumps(result.structured_content, ensure_ascii=False)
    text = text.encode("utf-8", errors="replace").decode("utf-8")
    if len(text) > MAX_RESULT_CHARS:
        rest = len(text) - MAX_RESULT_CHARS
        text = f"{text[:MAX_RESULT_CHARS]}\n[{rest} more characters are left out]"
    return f"Error: {text or 'no text says why'}" if result.is_error else text or "(no text)"


def reason(error: BaseException) -> str:
    """What went wrong, in one line: the first error of a group, however deep."""
    while parts := getattr(error, "exceptions", ()):
        error = parts[0]
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    text = re.sub(r"For further information visit \S+", "", str(error))  # of pydantic
    return " ".join(text.split())[:400] or type(error).__name__


# ---- connections ---------------------------------------------------------------------------------


class Connection:
    """A server of the file. `listed` gets its tools, or none; `client` is there while it answers.
    Its methods run in the loop of `Servers`."""

    def __init__(self, entry: ServerEntry) -> None:
        self.entry, self.problem = entry, entry.problem
        self.client: Any = None
        self.listed: Future[list[LentTool]] = Future()
        self.leaving = asyncio.Event()
        self.scope = anyio.CancelScope()
        self.status = 0  # of the last answer over HTTP, if that is an error

    async def run(self) -> None:
        """Start the server, list its tools, and stay until it is to be left."""
        try:
            if not self.problem:
                await self.stay()
        except Exception as error:  # of any kind: programs of other people are at work here
            self.problem = reason(error) + (f" (HTTP status {self.status})" if self.status else "")
        self.client = None
        if not self.listed.done():
            if not self.leaving.is_set():
                remedy = "; --verbose shows what it prints" if self.entry.command else ""
                log.warning(f"MCP server {self.entry.name} cannot be used: {self.problem}{remedy}")
            self.listed.set_result([])

    async def stay(self) -> None:
        """`run`, for a server that can be tried. Raises any error of it."""
        self.scope.deadline = anyio.current_time() + START_S
        with self.scope:
            async with connect(self.entry, self.note_status) as client:
                tools = await list_tools(client)
                self.client, self.scope.deadline = client, math.inf
                self.listed.set_result([LentTool(self, tool) for tool in tools if usable(tool)])
                await self.leaving.wait()
        self.problem = f"no list of tools came in {START_S:g} s"

    async def note_status(self, response: Any) -> None:
        """Note the status of an answer over HTTP, which the errors of the package leave out."""
        self.status = response.status_code if response.status_code >= 400 else 0

    def leave(self) -> None:
        """End the server; one that has not listed its tools, at once."""
        self.leaving.set()
        if not self.listed.done():
            self.scope.cancel()

    async def call(self, tool: str, arguments: Fields) -> str:
        """The text of a tool's result, or of the error that takes its place."""
        if self.client is None:
            return f"Error: the MCP server {self.entry.name} has ended: {self.problem}"
        try:
            with anyio.fail_after(CALL_S):
                return result_text(await self.client.call_tool(tool, dict(arguments)))
        except TimeoutError:
            return f"Error: no result came in {CALL_S:g} s"
        except Exception as error:  # as above
            return f"Error: {reason(error)}"


@contextlib.asynccontextmanager
async def connect(
    entry: ServerEntry, note_status: Callable[[Any], Awaitable[None]]
) -> AsyncIterator[Any]:
    """A client of the package `mcp` that is connected to a server."""
    async with contextlib.AsyncExitStack() as stack:
        if entry.url:
            options: Json = {"timeout": httpx2.Timeout(START_S, read=CALL_S)}
            options["event_hooks"] = {"response": [note_status]}
            http = httpx2.AsyncClient(headers=dict(entry.headers), **options)
            await stack.enter_async_context(http)
            transport = mcp.client.streamable_http.streamable_http_client(
                entry.url, http_client=http
            )
        else:
            options = {name: getattr(entry, name) for name in ("command", "env", "cwd")}
            program = mcp.StdioServerParameters(args=list(entry.args), **options)
            is_told = log.isEnabledFor(logging.DEBUG)
            errors = sys.stderr if is_told else subprocess.DEVNULL
            transport = mcp.stdio_client(program, errlog=errors)
        yield await stack.enter_async_context(mcp.Client(transport, cache=None))


async def list_tools(client: Any) -> list[Any]:
    """The tools of a server, of all pages of the list."""
    page = await client.list_tools()
    tools = list(page.tools)
    while page.next_cursor and len(tools) < MAX_TOOLS:
        page = await client.list_tools(cursor=page.next_cursor)
        tools += page.tools
    return tools[:MAX_TOOLS]


def usable(tool: Any) -> bool:
    """Whether a request can offer a tool. Says why not."""
    try:
        if tool.input_schema.get("type") != "object":
            raise RequestError("its arguments are no object")
        readied(tool.input_schema, "its schema")
    except RequestError as error:
        log.warning(f"MCP tool {excerpt(tool.name)} is left out: {error}")
        return False
    return True


# ---- all servers of a file -----------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class LentTool:
    """A tool of a server, as the package describes it."""

    connection: Connection
    tool: Any

    @property
    def server(self) -> str:
        return self.connection.entry.name

    def definition(self, name: str) -> Json:
        """The tool under a name, as a request offers it."""
        text = self.tool.description or self.tool.title or ""
        body = {"name": name, "description": text, "parameters": self.tool.input_schema}
        return {"type": "function", "function": body}


def plain_name(name: str) -> str:
    """A name of characters that every template and notation of calls can write."""
    return re.sub(r"[^a-zA-Z0-9_-]", "_", name)[:MAX_NAME_CHARS] or "_"


def distinct_names(tools: Iterable[tuple[str, str]], taken: Iterable[str] = ()) -> list[str]:
    """A name for each (server, tool): the tool's, after the server's where that name is not its
    own, with a number where that does not suffice."""
    tools, names, used = list(tools), list[str](), set(taken)
    counts = Counter([*(plain_name(tool) for _, tool in tools), *used])
    for server, tool in tools:
        own = plain_name(tool)
        base = own if counts[own] == 1 else plain_name(f"{server}__{tool}")
        further = (f"{base[: MAX_NAME_CHARS - 4]}_{number}" for number in range(2, 1000))
        names.append(next(name for name in (base, *further) if name not in used))
        used.add(names[-1])
    return names


class Servers:
    """The servers of a file, each with a connection, in a thread of their own."""

    def __init__(self, path: str) -> None:
        self.path, entries = path, read_servers(path)
        if not hasattr(mcp, "Client"):
            raise PackageError(f"--mcp needs mcp 2 or newer; run: {INSTALL}")
        logging.getLogger("mcp").addHandler(logging.NullHandler())  # an error is told once, here
        self.has_started, self.closing = threading.Event(), asyncio.Event()
        self.thread = threading.Thread(target=asyncio.run, args=(self.run(entries),), daemon=True)
        self.thread.start()
        self.has_started.wait()
        atexit.register(self.close)

    async def run(self, entries: list[ServerEntry]) -> None:
        """Connect to all servers at once, and stay until `close`."""
        self.loop = asyncio.get_running_loop()
        self.connections = [Connection(entry) for entry in entries]
        tasks = [asyncio.ensure_future(connection.run()) for connection in self.connections]
        self.has_started.set()
        await self.closing.wait()
        for connection in self.connections:
            connection.leave()
        await asyncio.wait(tasks, timeout=CLOSE_S)

    def close(self) -> None:
        """End all servers, and wait for their end, which Ctrl-C does not cut short."""
        atexit.unregister(self.close)
        OPEN.pop(self.path, None)
        handler: Any = None
        if threading.current_thread() is threading.main_thread():
            handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self.loop.call_soon_threadsafe(self.closing.set)
        self.thread.join(CLOSE_S)
        if handler is not None:
            signal.signal(signal.SIGINT, handler)

    def tools(self, taken: Iterable[str] = ()) -> dict[str, LentTool]:
        """The tools of all servers that answer, under distinct names, once all have answered or
        failed. `taken`: names of other tools."""
        listed = [connection.listed for connection in self.connections]
        if wait(listed, timeout=PATIENCE_S).not_done:
            log.warning(f"waiting for MCP servers, at most {START_S:g} s")
        tools = [tool for future in listed for tool in future.result()]
        return dict(zip(distinct_names(((t.server, t.tool.name) for t in tools), taken), tools))

    def start(self, tool: LentTool, arguments: Fields) -> Future[str]:
        """Begin a call, whose result will be a text in any case."""
        if not self.thread.is_alive():
            ended = Future[str]()
            ended.set_result("Error: the MCP servers have ended")
            return ended
        work = tool.connection.call(tool.tool.name, arguments)
        return asyncio.run_coroutine_threadsafe(work, self.loop)

    def call(self, tool: LentTool, arguments: Fields) -> str:
        """The text of a call's result. Ctrl-C ends the call."""
        running = self.start(tool, arguments)
        try:
            return running.result()
        finally:
            running.cancel()


def end_at_signals() -> None:
    """Let signals that would end the program at once end it as sys.exit does: servers first."""
    if threading.current_thread() is threading.main_thread():
        for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
            if signal.getsignal(number) is signal.SIG_DFL:
                signal.signal(number, lambda number, _: sys.exit(128 + number))


OPEN: dict[str, Servers] = {}  # by the path of their file, until they are closed


def open_servers(path: str) -> Servers:
    """The servers of a file, which start now. Raises UsageError, and PackageError without `mcp`."""
    if path not in OPEN:
        OPEN[path] = Servers(path)
        end_at_signals()
    return OPEN[path]
