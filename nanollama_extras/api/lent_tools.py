"""The tools of MCP servers for the web chat: GET /tools lists them, and POST /tools/call runs one,
which the page does when its user agrees. Both are for the page in a browser of this machine.

Seam: a dialect (`nanollama.DIALECTS`), and --mcp. It imports answers.mcp_tools. To remove it,
delete this file and its row.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
from typing import TYPE_CHECKING

from nanollama import (
    LOOPBACK_HOSTS,
    Handlers,
    Route,
    WireError,
    as_json,
    log,
    read_fields,
    refuse,
    required,
    table,
    unless_disconnected,
)
from nanollama_extras.answers.mcp_tools import open_servers

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from nanollama_extras.answers.mcp_tools import Servers

FIELDS = table(string="name", object="arguments")


def is_loopback(address: str) -> bool:
    """Whether a client's address is one of this machine's own."""
    with contextlib.suppress(ValueError):
        found = ipaddress.ip_address(address)
        return (getattr(found, "ipv4_mapped", None) or found).is_loopback
    return False


def check_page(request: Request) -> None:
    """Raise WireError 403 for any client but the server's own page in a browser of this machine. A
    browser names the origin of each POST; of a GET, only that of another site."""
    host = request.headers.get("host", "").lower()
    name = re.sub(r":\d*$", "", host).strip("[]")
    origin = request.headers.get("origin", "" if request.method == "POST" else None)
    is_own = origin is None or origin == f"{request.url.scheme}://{host}"
    client = request.client.host if request.client else ""
    if not (is_own and name in LOOPBACK_HOSTS and is_loopback(client)):
        problem = "tools are for this server's own page in a browser of the same machine"
        raise WireError(403, "not_local", problem)


class API(Handlers):
    """The tools that the page may call."""

    def servers(self, request: Request) -> Servers:
        """The servers of --mcp. Raises WireError 403 and 404."""
        check_page(request)
        if not self.config.mcp:
            raise WireError(404, "no_tools", "this server has no tools; start it with --mcp FILE")
        return open_servers(self.config.mcp)

    async def tools(self, request: Request) -> Response:
        """GET /tools: the tools of the MCP servers, for the page"""
        lent = await asyncio.to_thread(self.servers(request).tools)
        body = {name: tool.server for name, tool in lent.items()}
        tools = [tool.definition(name) for name, tool in lent.items()]
        return as_json({"tools": tools, "servers": body})

    async def call(self, request: Request) -> Response:
        """POST /tools/call: the result of a call as text"""
        servers = self.servers(request)
        given, _ = read_fields(await self.body(request), FIELDS)
        name, lent = required(given, "name"), await asyncio.to_thread(servers.tools)
        if name not in lent:
            refuse(f"name is {name!r}, which no tool has", "name")

        async def result() -> str:
            return await asyncio.wrap_future(servers.start(lent[name], given.get("arguments", {})))

        log.info(f"call of {name} on {lent[name].server}")
        text = await unless_disconnected(request.receive, result(), lambda: None)
        return as_json({"content": text})

    routes = (Route(tools, ("GET /tools",)), Route(call, ("POST /tools/call",), FIELDS, ("name",)))
