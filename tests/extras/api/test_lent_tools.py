"""The routes for the page's tools: who may use them, and what they answer."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from mcp_server import ENTRY

import nanollama
from nanollama_extras.answers.mcp_tools import open_servers
from nanollama_extras.testing import Script, ScriptLLM, scripted_models

pytest.importorskip("mcp")
OWN = {"host": "localhost:8000", "origin": "http://localhost:8000"}
CALL = {"name": "weather", "arguments": {"city": "Oslo"}}


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    path = tmp_path_factory.mktemp("mcp") / "mcp.json"
    path.write_text(json.dumps({"mcpServers": {"plain": ENTRY}}), encoding="utf-8")
    yield str(path)
    open_servers(str(path)).close()


def ask(
    mcp: str | None,
    method: str,
    path: str,
    body: Any = None,
    client: str = "127.0.0.1",
    **headers: str,
) -> httpx.Response:
    """The answer of a server with --mcp to a request of a client with this address."""
    config = nanollama.ServerConfig(mcp=mcp, host="0.0.0.0", allowed_hosts=("*",))
    models = scripted_models(lambda: ScriptLLM(Script("Hi")), "m", config)
    transport = httpx.ASGITransport(nanollama.create_app(models), client=(client, 1))

    async def run() -> httpx.Response:
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
            return await http.request(method, path, json=body, headers=headers)

    return asyncio.run(run())


def test_the_page_lists_and_calls_tools(file: str) -> None:
    listed = ask(file, "GET", "/tools", host="127.0.0.1:8000").json()
    names = [tool["function"]["name"] for tool in listed["tools"]]
    assert names[0] == "weather"
    assert listed["servers"] == dict.fromkeys(names, "plain")
    answer = ask(file, "POST", "/tools/call", CALL, **OWN)
    assert (answer.status_code, answer.json()) == (200, {"content": "snow in Oslo"})
    secure = {"host": "[::1]:8000", "origin": "http://[::1]:8000"}
    assert ask(file, "POST", "/tools/call", CALL, client="::1", **secure).status_code == 200


@pytest.mark.parametrize(
    ("body", "field"), [({}, "name"), ({"name": "no"}, "name"), ({**CALL, "arguments": []}, "arg")]
)
def test_a_wrong_call_is_refused_by_name(file: str, body: Any, field: str) -> None:
    answer = ask(file, "POST", "/tools/call", body, **OWN)
    assert answer.status_code == 400
    assert answer.json()["error"]["message"].startswith(field)


@pytest.mark.parametrize(
    ("method", "client", "headers"),
    [
        ("POST", "127.0.0.1", {"host": "localhost"}),  # no browser, or none that tells its page
        ("POST", "127.0.0.1", {**OWN, "origin": "http://localhost:3000"}),
        ("POST", "127.0.0.1", {**OWN, "origin": "null"}),
        ("POST", "127.0.0.1", {**OWN, "origin": "vscode-webview://x"}),
        ("POST", "127.0.0.1", {"host": "evil.example", "origin": "http://evil.example"}),
        ("POST", "10.0.0.7", OWN),
        ("GET", "10.0.0.7", {"host": "localhost"}),
        ("GET", "127.0.0.1", {"host": "evil.example"}),
        ("GET", "127.0.0.1", {**OWN, "origin": "http://localhost:3000"}),
    ],
)
def test_other_pages_and_machines_have_no_tools(
    file: str, method: str, client: str, headers: dict[str, str]
) -> None:
    path, body = ("/tools/call", CALL) if method == "POST" else ("/tools", None)
    assert ask(file, method, path, body, client, **headers).status_code == 403


def test_a_server_without_tools_says_so() -> None:
    answer = ask(None, "GET", "/tools", host="localhost")
    assert answer.status_code == 404
    assert "--mcp FILE" in answer.json()["error"]["message"]
    page = ask(None, "GET", "/", host="localhost").text
    assert "data-tools" not in page[:100]


def test_the_page_is_told_that_there_are_tools(file: str) -> None:
    assert "<html data-tools" in ask(file, "GET", "/", host="localhost").text
