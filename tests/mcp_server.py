"""An MCP server without a library, of the protocol's first form. A "mute" one answers nothing, an
"odd" one lists a number in the place of tools, and a "stubborn" one goes on without its client."""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

ENTRY: dict[str, Any] = {"command": sys.executable, "args": [__file__]}  # as --mcp FILE has it
TEXT = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}}
SCHEMAS = {"weather": TEXT, "pid": NOTHING, "crash": NOTHING, "never": NOTHING, "torn": NOTHING}
TOOLS = [{"name": name, "inputSchema": schema} for name, schema in SCHEMAS.items()]
MANY = [{"const": number} for number in range(2000)]  # more than nanollama compiles
TOOLS += [{"name": "broad", "inputSchema": {**NOTHING, "properties": {"a": {"anyOf": MANY}}}}]


def call(name: str, arguments: dict[str, Any]) -> Any:
    """The result of a call; None for no answer."""
    if name == "crash":
        os._exit(3)
    if name == "never":
        return None
    if name == "torn":
        return {"content": "not a list"}
    text = str(os.getpid()) if name == "pid" else f"snow in {arguments.get('city')}"
    return {"content": [{"type": "text", "text": text}]}


def answer(method: str, params: dict[str, Any], mode: str) -> Any:
    if method == "initialize":
        info = {"name": "plain", "version": "1"}
        version = params["protocolVersion"]
        return {"protocolVersion": version, "capabilities": {"tools": {}}, "serverInfo": info}
    if method == "tools/list":
        return {"tools": 7 if mode == "odd" else TOOLS}
    return call(params["name"], params.get("arguments") or {}) if method == "tools/call" else {}


def main(mode: str = "") -> None:
    for line in sys.stdin:
        message = json.loads(line)
        if "id" not in message or mode == "mute":
            continue
        known = message["method"] != "server/discover"
        params = message.get("params") or {}
        result = answer(message["method"], params, mode) if known else None
        own = {"result": result} if known else {"error": {"code": -32601, "message": "unknown"}}
        if not known or result is not None:
            print(json.dumps({"jsonrpc": "2.0", "id": message["id"], **own}), flush=True)
    while mode == "stubborn":
        time.sleep(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
