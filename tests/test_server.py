"""The server (section 13) over plain HTTP: routes, errors, keys, origins, and --serve itself."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import http.client
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import httpx
import pytest
import uvicorn
from prometheus_client.parser import text_string_to_metric_families
from serving import Live, serving, url_in, wait_until

import nanollama
from nanollama_extras.api.shelf import Shelf

USER = [{"role": "user", "content": "hello"}]
POSTS = (
    "/v1/chat/completions /v1/completions /completions /chat/completions /tokenize /detokenize "
    "/apply-template"
).split()
GETS = "/ /health /stats /metrics /tokenizer_info /v1/capabilities /v1/models /models".split()


@pytest.fixture(scope="module")
def live(tiny: Callable[..., Path]) -> Iterator[Live]:
    with serving(lambda: nanollama.LLM(tiny(), parallel=2), max_body_bytes=20_000) as live:
        yield live


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error object of a response, whose shape is checked."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    assert list(response.json()) == ["error"]
    error: dict[str, Any] = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    return error


# ---- bodies that are no requests -----------------------------------------------------------------


@pytest.mark.parametrize("route", POSTS)
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b"null",
        b'"text"',
        b"\xff\xfe{\x00}\x00",
        b'{"prompt": "\xe9"}',
        b'{"temperature": NaN}',
        b'{"temperature": -Infinity}',
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b"[" * 15_000,
        b'{"a":' * 3_000 + b"1" + b"}" * 3_000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}], "prompt": "\\ud800", "tokens": 1}',
    ],
    ids=lambda body: ascii(body[:24]),
)
def test_what_is_not_a_request_is_a_400(live: Live, route: str, body: bytes) -> None:
    error = error_of(live.http.post(route, content=body), 400)
    assert error["type"] == "invalid_request_error"
    assert "\n" not in error["message"]
    assert live.text(max_tokens=1).status_code == 200


@pytest.mark.parametrize("depth", [50, 200, 400, 480, 900])
def test_depth_inside_a_message_is_never_an_internal_error(live: Live, depth: int) -> None:
    message = b'{"role": "user", "content": "hi", "extra": ' + b"[" * depth + b"]" * depth + b"}"
    data = b'{"messages": [' + message + b'], "max_tokens": 1}'
    for route in ("/v1/chat/completions", "/chat/completions", "/apply-template"):
        response = live.http.post(route, content=data)
        assert response.status_code == 200 or error_of(response, 400)
    assert live.chat(max_tokens=1).status_code == 200


def test_control_characters_are_text_like_any_other(live: Live) -> None:
    text = "a\x00b\x1b[31m\u202e\ufdd0"
    tokens = live.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    assert live.http.post("/detokenize", json={"tokens": tokens}).json()["prompt"] == text
    assert live.chat(text, max_tokens=1).status_code == 200


def test_any_content_type_will_do(live: Live) -> None:
    body = json.dumps({"prompt": "hello", "max_tokens": 1})
    for kind in ("application/x-www-form-urlencoded", "text/plain", "application/json; charset=x"):
        response = live.http.post("/v1/completions", content=body, headers={"content-type": kind})
        assert response.status_code == 200
    assert live.http.post("/v1/completions", content=iter([body.encode()])).status_code == 200


def test_a_body_over_the_limit(live: Live) -> None:
    body = json.dumps({"prompt": "x" * 30_000}).encode()
    for content in (body, iter([body[:9_000], body[9_000:18_000], body[18_000:]])):
        error = error_of(live.http.post("/v1/completions", content=content), 413)
        assert error["code"] == "request_too_large"
        assert "20.0 KB" in error["message"]


def raw(live: Live, data: bytes, hang_up: bool = False) -> bytes:
    """What comes back for bytes sent as they are, until the server closes."""
    with socket.create_connection(("127.0.0.1", httpx.URL(live.url).port)) as connection:
        connection.sendall(data)
        return b"" if hang_up else b"".join(iter(lambda: connection.recv(65536), b""))


def test_a_length_that_lies(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: "
    assert b" 400 " in raw(live, head + b'5\r\n\r\n{"prompt": "a"}\r\n\r\n')  # there is more
    raw(live, head + b'500\r\n\r\n{"prompt": "hello"}', hang_up=True)  # there is less
    raw(live, head + b"99999999999\r\n\r\n" + b" " * 19_000, hang_up=True)
    assert live.text(max_tokens=1).status_code == 200
    wait_until(live.is_idle)
    assert "internal error" not in caplog.text


def test_a_client_that_asks_before_it_sends(live: Live) -> None:
    body = b'{"prompt": "hello", "max_tokens": 1}'
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n"
    more = b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
    answer = raw(live, head + more + body)
    assert answer.startswith(b"HTTP/1.1 100 ")
    assert b"HTTP/1.1 200 OK" in answer


# ---- routes and methods --------------------------------------------------------------------------


@pytest.mark.parametrize("route", POSTS)
def test_post_routes_take_post_alone(live: Live, route: str) -> None:
    for method in ("GET", "PUT", "DELETE", "OPTIONS"):
        response = live.http.request(method, route)
        error = error_of(response, 405)
        assert error["code"] == "method_not_allowed"
        assert error["message"] == f"there is no route {method} {route!r}; use POST"
        assert response.headers["allow"] == "POST"


@pytest.mark.parametrize("route", GETS)
def test_get_routes_take_get_and_head(live: Live, route: str) -> None:
    assert live.http.get(route).status_code == 200
    assert live.http.head(route).status_code == 200
    response = live.http.post(route, json={})
    assert error_of(response, 405)["type"] == "invalid_request_error"
    assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD"}


def test_a_route_that_does_not_exist(live: Live) -> None:
    for route in ("/v2", "/v1/images", "/..%2f..%2fetc/passwd", "/%ff"):
        error = error_of(live.http.get(route), 404)
        assert error["code"] == "not_found"
        assert error["message"].startswith(
            f"there is no route GET {unquote(route, errors='replace')!r}"
        )


def test_a_wrong_method_hears_of_all_right_ones(live: Live) -> None:
    response = live.http.put("/v1/responses/any")
    assert "use " in error_of(response, 405)["message"]
    assert set(response.headers["allow"].split(", ")) == {"GET", "HEAD", "DELETE"}


def test_models(live: Live, tiny: Callable[..., Path]) -> None:
    listed = live.http.get("/v1/models").json()
    assert live.http.get("/models").json() == listed
    (model,) = listed["data"]
    assert model == live.http.get("/v1/models/model").json()
    assert isinstance(model["created"], int)
    assert error_of(live.http.get("/v1/models/gpt-4o"), 404)["code"] == "model_not_found"
    assert error_of(live.text(model="gpt-4o"), 404)["code"] == "model_not_found"
    load = lambda: nanollama.LLM(tiny())  # noqa: E731
    with serving(load, any_model=True, model_id="org/a:b c\u00e9") as other:
        assert other.http.get("/v1/models/org%2Fa%3Ab%20c%C3%A9").json()["id"] == "org/a:b c\u00e9"
        assert other.text(model="gpt-4o", max_tokens=1).json()["model"] == "gpt-4o"
        named = json.dumps({"prompt": "a", "model": "\ud800", "max_tokens": 1, "stream": True})
        assert '"model": "?"' in other.http.post("/v1/completions", content=named).text


def test_strict_refuses_what_it_does_not_know(tiny: Callable[..., Path]) -> None:
    with serving(lambda: nanollama.LLM(tiny()), strict=True) as strict:
        error = error_of(strict.chat(colour="red"), 400)
        assert (error["param"], error["code"]) == ("colour", "unknown_parameter")
        assert strict.chat(user="me", top_k=1, max_tokens=1).status_code == 200
        assert strict.http.get("/v1/capabilities").json()["other_fields"] == "refused"


def test_ignored_fields_of_any_name_fit_into_the_header(live: Live) -> None:
    names = ["a\r\nset-cookie: b", "\u20ac\ud800", *(f"field{i}" for i in range(900))]
    body = {"prompt": "a", "max_tokens": 1, **dict.fromkeys(names, 1)}
    response = live.http.post("/v1/completions", content=json.dumps(body))
    assert response.status_code == 200
    named = response.headers["x-nanollama-ignored"]
    assert named.startswith(r"a\r\nset-cookie: b, \u20ac\ud800, field0, field1")
    assert len(named) == 1000
    for more in ({"trace ": 1}, {" a": 1}, {"b": 1, "": 1}, {"": 1}, {"\t": 1, "\x7f": 1}):
        response = live.http.post("/v1/completions", json={"prompt": "a", "max_tokens": 1, **more})
        assert response.status_code == 200
        assert "x-nanollama-ignored" in response.headers


def test_an_internal_error_is_an_error_object(
    live: Live, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any) -> None:
        raise ZeroDivisionError("what only\nthe log says")

    monkeypatch.setattr(live.pool, "pick", broken)
    response = live.http.post(
        "/v1/completions", json={"prompt": "a"}, headers={"origin": "http://localhost:3000"}
    )
    error = error_of(response, 500)
    assert (error["type"], error["code"]) == ("server_error", "internal_error")
    assert "what only" not in error["message"]
    assert response.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert "internal error: ZeroDivisionError: what only" in caplog.text


def test_greedy_is_greedy_unless_a_penalty_is_asked_for(
    live: Live, tiny: Callable[..., Path]
) -> None:
    params = nanollama.SamplingParams(temperature=0, repeat_penalty=1, max_tokens=20)
    request = nanollama.GenerationRequest(prompt="the fox the fox the fox", params=params)
    expected = nanollama.LLM(tiny()).complete(request).text
    fields = {"prompt": request.prompt, "temperature": 0, "max_tokens": 20}
    assert live.text(**fields).json()["choices"][0]["text"] == expected
    assert live.text(**fields, repeat_penalty=2).json()["choices"][0]["text"] != expected


# ---- keys and origins ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def locked(tiny: Callable[..., Path]) -> Iterator[Live]:
    load = lambda: nanollama.LLM(tiny())  # noqa: E731
    with serving(
        load, api_keys=("k1", "k\u00e9y2"), cors_origins=("https://chat.example",)
    ) as live:
        yield live


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer k", "Bearer k1x", "k2", "\x80"])
def test_without_the_key_only_the_page_and_health_are_open(locked: Live, given: str | None) -> None:
    headers = {} if given is None else {"authorization": given.encode("latin-1")}
    for route in ("/", "/health"):
        assert locked.http.get(route, headers=headers).status_code == 200
    for route in [*(r for r in GETS if r not in ("/", "/health")), "/nowhere", "/health/"]:
        response = locked.http.get(route, headers=headers)
        assert error_of(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    for route in POSTS:
        error_of(locked.http.post(route, json={}, headers=headers), 401)


def test_every_key_opens(locked: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    compare = nanollama.hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        compared.append(b)
        return compare(a, b)

    monkeypatch.setattr(nanollama.hmac, "compare_digest", counting)
    for key in ("k1", "k\u00e9y2"):
        headers = {"authorization": f"Bearer {key}".encode()}
        assert locked.http.get("/v1/models", headers=headers).status_code == 200
    assert compared == [b"k1", "k\u00e9y2".encode()] * 2  # all keys, whichever matches
    for header in ("bearer k1", "k1"):
        assert locked.http.get("/stats", headers={"authorization": header}).status_code == 200


def test_a_host_header_is_not_a_way_round_the_key(locked: Live) -> None:
    for host in (b"x/health?", b"x/health#", b"x/?", b"x/\\"):
        request = b"GET /v1/models HTTP/1.1\r\nHost: " + host + b"\r\nConnection: close\r\n\r\n"
        assert raw(locked, request).split(b" ")[1] in (b"401", b"400")


@pytest.mark.parametrize("route", ["/v1/models", "/health", "/", "/api/tags", "/nowhere"])
def test_a_name_that_a_web_page_chose_is_refused(live: Live, route: str) -> None:
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io"):
        response = live.http.get(route, headers={"host": host})
        assert response.status_code == 403
        assert "--allowed-host" in response.text
    for host in ("localhost", "LOCALHOST:8000", "a.localhost", "192.168.0.7", "[::1]:8000"):
        assert live.http.get(route, headers={"host": host}).status_code in (200, 404)


@pytest.mark.parametrize(
    ("config", "host", "status"),
    [
        ({"allowed_hosts": ("box.lan",)}, "BOX.lan:80", 200),
        ({"allowed_hosts": ("*",)}, "anything.example", 200),
        ({"host": "0.0.0.0"}, "box.lan", 200),
        ({"host": "0.0.0.0", "allowed_hosts": ("box.lan",)}, "box.lan", 200),
        ({"host": "0.0.0.0", "allowed_hosts": ("box.lan",)}, "evil.example", 403),
    ],
)
def test_names_of_the_server(config: dict[str, Any], host: str, status: int) -> None:
    async def ask() -> int:
        statuses: list[int] = []

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200})

        async def send(message: Any) -> None:
            statuses.append(message.get("status", 0))

        scope = {"type": "http", "path": "/", "raw_path": b"/", "method": "GET"}
        scope["headers"] = [(b"host", host.encode())]
        gate = nanollama.Gate(app, nanollama.ServerConfig(**config), nanollama.Observer())
        await gate(scope, None, send)  # type: ignore[arg-type]
        return statuses[0]

    assert asyncio.run(ask()) == status


@pytest.mark.parametrize("route", ["/v1/models", "/v1/chat/completions", "/api/tags", "/health"])
def test_a_page_of_another_site_is_refused_on_every_route(live: Live, route: str) -> None:
    for origin in ("https://evil.example", "null", "http://localhost.evil.example", "file://"):
        assert live.http.get(route, headers={"origin": origin}).status_code == 403
    for origin in ("app://obsidian.md", "tauri://localhost", "vscode-webview://a1", live.url):
        response = live.http.get(route, headers={"origin": origin})
        assert response.status_code in (200, 405)
        assert response.headers["access-control-allow-origin"] == origin


def test_origins(locked: Live, live: Live, tiny: Callable[..., Path]) -> None:
    def allowed(server: Live, origin: str) -> str | None:
        headers = {"origin": origin, "authorization": "Bearer k1"}
        return server.http.get("/stats", headers=headers).headers.get("access-control-allow-origin")

    for origin in ("http://localhost:3000", "http://127.0.0.1", "https://[::1]:8080"):
        assert allowed(live, origin) == allowed(locked, origin) == origin
    for origin in ("https://chat.example", "http://localhost.evil.example", "null"):
        assert allowed(live, origin) is None
    assert allowed(locked, "https://chat.example") == "https://chat.example"
    with serving(lambda: nanollama.LLM(tiny()), cors_origins=("*",)) as everyone:
        assert allowed(everyone, "https://anything.example") == "*"


def test_browsers_may_ask_first_without_a_key(locked: Live) -> None:
    response = locked.http.options(
        "/v1/chat/completions",
        headers={
            "origin": "https://chat.example",
            "access-control-request-method": "POST",
            "access-control-request-headers": "authorization, content-type, x-stainless-os",
            "access-control-request-private-network": "true",  # Chrome, for a page of the internet
        },
    )
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == "https://chat.example"
    assert "POST" in response.headers["access-control-allow-methods"]
    assert "x-stainless-os" in response.headers["access-control-allow-headers"]
    assert response.headers["access-control-allow-private-network"] == "true"


@pytest.mark.parametrize(
    ("method", "route", "body", "status"),
    [
        ("POST", "/v1/completions", b"{", 400),
        ("GET", "/nowhere", b"", 404),
        ("GET", "/v1/completions", b"", 405),
        ("POST", "/v1/completions", b" " * 30_000, 413),
        ("POST", "/v1/completions", b'{"prompt": "a", "stream": true, "max_tokens": 1}', 200),
    ],
)
def test_a_web_page_can_read_errors_and_streams(
    live: Live, method: str, route: str, body: bytes, status: int
) -> None:
    headers = {"origin": "http://localhost:3000"}
    response = live.http.request(method, route, content=body, headers=headers)
    assert response.status_code == status
    assert response.headers["access-control-allow-origin"] == "http://localhost:3000"
    assert "x-nanollama-ignored" in response.headers["access-control-expose-headers"]


# ---- the web chat's own routes -------------------------------------------------------------------


def web_events(response: httpx.Response) -> list[dict[str, Any]]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in response.text.split("\n\n")[:-1]]


def test_the_web_chat_streams_tokens_then_done(live: Live) -> None:
    request = {"messages": USER, "temperature": 0, "max_tokens": 9}
    *tokens, done = web_events(live.http.post("/chat/completions", json=request))
    assert done == {"done": True}
    assert all(set(event) == {"token", "gpu"} and event["gpu"] == 0 for event in tokens)
    answer = live.chat(temperature=0, max_tokens=9).json()["choices"][0]["message"]["content"]
    assert "".join(event["token"] for event in tokens) == answer


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, (0.8, 50, 512)),
        ({"temperature": None, "top_k": None, "max_tokens": None}, (0.8, 50, 512)),
        ({"temperature": 99, "top_k": 999, "max_tokens": 99999}, (2.0, 200, 4096)),
        ({"temperature": -1, "top_k": -1, "max_tokens": 0}, (0.0, 0, 1)),
        ({"temperature": 1e999, "max_tokens": -1}, (2.0, 50, 1)),
    ],
)
def test_the_web_chat_clamps(
    live: Live, monkeypatch: pytest.MonkeyPatch, fields: dict[str, Any], expected: tuple[Any, ...]
) -> None:
    seen: list[nanollama.GenerationRequest] = []
    start = live.pool.start
    monkeypatch.setattr(
        live.pool, "start", lambda requests, names: seen.extend(requests) or start(requests)
    )
    body = json.dumps({"messages": USER, **fields}).replace("Infinity", "1e999")
    web_events(live.http.post("/chat/completions", content=body))
    params = seen[0].params
    assert (params.temperature, params.top_k, params.max_tokens) == expected


@pytest.mark.parametrize(
    "sizes", [[1] * 501, [8001], [8000, 8000, 8000, 8000, 1]], ids=["many", "long", "all"]
)
def test_the_web_chat_has_limits(tiny: Callable[..., Path], live: Live, sizes: list[int]) -> None:
    with serving(lambda: nanollama.LLM(tiny())) as server:
        messages = [{"role": "user", "content": "a" * size} for size in sizes]
        response = server.http.post("/chat/completions", json={"messages": messages})
        assert error_of(response, 400)["param"] == "messages"
        assert re.search("500|8000", response.json()["error"]["message"])


def test_health_and_stats(live: Live) -> None:
    wait_until(live.is_idle)
    assert live.http.get("/health").json() == {
        "status": "ok", "ready": True, "num_gpus": 1, "available_workers": 1,
    }  # fmt: skip
    stats = live.http.get("/stats").json()
    assert (stats["total_workers"], stats["available_workers"], stats["busy_workers"]) == (1, 1, 0)
    (worker,) = stats["workers"]
    assert (worker["gpu_id"], worker["device"], worker["slots"]) == (0, "cpu", 2)


def test_the_page_runs_its_own_script_and_style_alone(live: Live) -> None:
    response = live.http.get("/")
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(
        part.split(" ", 1) for part in response.headers["content-security-policy"].split("; ")
    )
    assert policy["default-src"] == "'none'"
    for tag in ("script", "style"):
        texts = re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", response.text, re.DOTALL)
        digests = [hashlib.sha256(text.encode()).digest() for text in texts]
        allowed = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
        assert policy[f"{tag}-src"].removesuffix(" 'strict-dynamic'").split(" ") == allowed
    assert response.headers["x-content-type-options"] == "nosniff"


# ---- the glass box -------------------------------------------------------------------------------


def test_tokenize_and_back(live: Live) -> None:
    text = "the quick brown caf\u00e9 \U0001f600 <|im_end|>"
    body = live.http.post("/tokenize", json={"prompt": text}).json()
    llm = live.pool.llm()
    assert body == {"tokens": llm.encode(text), "count": len(body["tokens"]), "max_model_len": 256}
    assert live.http.post("/tokenize", json={"prompt": ""}).json()["tokens"] == []
    back = live.http.post("/detokenize", json={"tokens": body["tokens"]}).json()["prompt"]
    assert back == text.removesuffix("<|im_end|>")
    assert error_of(live.http.post("/tokenize", json={}), 400)["param"] == "prompt"
    assert error_of(live.http.post("/tokenize", json={"prompt": 5}), 400)["param"] == "prompt"
    both = [
        live.http.post("/tokenize", json={"content": text, **more}).json()["tokens"]
        for more in ({}, {"add_special": True})
    ]
    assert both == [llm.encode(text, False), llm.encode(text)]
    pieces = live.http.post("/tokenize", json={"content": "the", "with_pieces": True}).json()
    assert "".join(one["piece"] for one in pieces["tokens"]) == "the"
    for bad in ([320], [-1], [True], ["a"], [None], "a"):
        error = error_of(live.http.post("/detokenize", json={"tokens": bad}), 400)
        assert error["param"] == "tokens"


def test_messages_are_tokenized_as_they_are_answered(live: Live) -> None:
    shown = live.http.post("/apply-template", json={"messages": USER}).json()
    tokens = live.http.post("/tokenize", json={"messages": USER}).json()["tokens"]
    assert shown["tokens"] == tokens
    assert live.chat().json()["usage"]["prompt_tokens"] == len(tokens)
    assert shown["prompt"] == "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n"
    assert shown["pieces"][0] == "<|im_start|>"
    assert len(shown["pieces"]) == len(tokens)


def test_tokenizer_info(live: Live) -> None:
    info = live.http.get("/tokenizer_info").json()
    assert (info["bos_token"], info["eos_token"], info["pad_token"]) == ("<s>", "</s>", None)
    assert info["chat_template"] == nanollama.CHATML


def test_metrics_count(live: Live) -> None:
    def read() -> dict[str, float]:
        response = live.http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        families = text_string_to_metric_families(response.text)
        return {
            sample.name + json.dumps(sample.labels): sample.value
            for family in families
            for sample in family.samples
        }

    before = read()
    live.text("hello " * 20, max_tokens=5, ignore_eos=True)
    live.text("hello " * 20, max_tokens=5, ignore_eos=True)
    live.chat(temperature=9)
    after = read()

    def grew(name: str, labels: dict[str, str] | None = None) -> float:
        key = f"nanollama_{name}" + json.dumps(labels or {})
        return after[key] - before.get(key, 0)

    assert grew("generated_tokens_total") == 10
    assert grew("prompt_tokens_total") == 2 * len(live.pool.llm().encode("hello " * 20))
    assert grew("cached_tokens_total") > 20
    assert grew("requests_total", {"route": "text", "status": "200"}) == 2
    assert grew("requests_total", {"route": "chat", "status": "400"}) == 1
    assert grew("time_to_first_token_seconds_count") == 2
    assert grew("time_per_output_token_seconds_count") == 2
    assert after["nanollama_running_sequences{}"] == after["nanollama_waiting_sequences{}"] == 0
    assert after["nanollama_kv_cache_bytes{}"] > 0


# ---- the log -------------------------------------------------------------------------------------


def test_the_log_has_requests_and_not_what_they_say(
    live: Live, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nanollama")
    response = live.chat("a secret wish", user="nobody", nickname="x")
    live.http.get("/nowhere%0aforged%1b[31m?key=secret")
    wait_until(lambda: len(caplog.messages) == 3)
    ignored, chat, missing = caplog.messages
    assert ignored == "fields that have no effect: user, nickname"
    request_id = response.headers["x-request-id"]
    assert re.fullmatch(rf"127\.0\.0\.1 POST /v1/chat/completions 200 \d+\.\d+s {request_id}", chat)
    assert "GET /nowhere%0aforged%1b[31m 404" in missing
    assert "secret" not in caplog.text


def test_prompts_are_logged_on_request(
    tiny: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "nanollama")
    with serving(lambda: nanollama.LLM(tiny()), log_prompts=True) as live:
        live.chat("a public \ud800wish".encode("utf-8", "replace").decode(), max_tokens=1)
        assert "a public ?wish" in caplog.text


# ---- time ----------------------------------------------------------------------------------------


def test_a_request_has_a_time_limit(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(lambda: nanollama.LLM(tiny()), timeout_s=0.2) as live:
        engine = live.pool.llm().engine
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda: time.sleep(0.05) or step())
        response = live.text(max_tokens=200, ignore_eos=True)
        assert error_of(response, 504)["code"] == "timeout"
        assert response.headers["x-should-retry"] == "false"
        events = live.text(max_tokens=200, ignore_eos=True, stream=True).text.split("\n\n")
        assert '"text"' in events[0]
        assert '"code": "timeout"' in events[-3]
        assert events[-2:] == ["data: [DONE]", ""]
        wait_until(live.is_idle)


def test_a_silent_stream_is_kept_open(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nanollama, "PING_S", 0.01)
    engine, go = live.pool.llm().engine, threading.Event()
    step = engine.step
    monkeypatch.setattr(engine, "step", lambda: go.wait() and step())
    for route, body in (
        ("/v1/completions", {"prompt": "hello", "stream": True}),
        ("/chat/completions", {"messages": USER, "max_tokens": 3}),
    ):
        go.clear()
        with live.http.stream("POST", route, json=body) as response:
            lines = response.iter_lines()
            assert next(lines) == ": ping"
            go.set()
            assert [line for line in lines if line.startswith("data: ")]


# ---- --serve -------------------------------------------------------------------------------------


class Process:
    """`nanollama.py --serve` on a free port; `log` grows with what it writes to stderr."""

    def __init__(self, model: Path | str, *flags: str, **env: str) -> None:
        command = [sys.executable, nanollama.__file__, "--serve", "--model", str(model)]
        self.process = subprocess.Popen(
            [*command, "--port", "0", *flags],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, **env},
        )
        self.log: list[str] = []
        self.reader = threading.Thread(target=lambda: self.log.extend(self.process.stderr))
        self.reader.start()

    def __enter__(self) -> Process:
        wait_until(lambda: self.log or self.process.poll() is not None, "start-up")
        self.http = httpx.Client(base_url=url_in(self.log[0]), timeout=60)
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.http.close()
        self.end()

    def is_ready(self) -> bool:
        try:
            return self.http.get("/health").status_code == 200
        except httpx.TransportError:
            return False

    def end(self) -> int:
        """The exit code, once it has ended."""
        code = self.process.wait(60)
        self.reader.join()
        for stream in (self.process.stdout, self.process.stderr):
            assert stream.closed or stream.read() == ""  # stdout stays empty
            stream.close()
        return code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_finishes_what_runs_and_refuses_new_work(
    tiny: Callable[..., Path], number: int
) -> None:
    model = tiny(max_position_embeddings=4096)
    with Process(model, NANOLLAMA_API_KEY="k1, k2") as server:
        wait_until(server.is_ready, "loading")
        server.http.headers["authorization"] = "Bearer k2"
        body = {"messages": [{"role": "user", "content": "a secret"}], "stream": True}
        more = {"max_tokens": 600, "ignore_eos": True, "seed": 1}
        with server.http.stream("POST", "/v1/chat/completions", json={**body, **more}) as response:
            lines = response.iter_lines()
            assert "assistant" in next(lines)
            server.process.send_signal(number)
            wait_until(lambda: not server.is_ready(), "closing")
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
        assert events[-1]["choices"][0]["finish_reason"] == "length"
        assert events[-1]["timings"]["predicted_n"] == 599
        assert server.end() == 0
        assert all("secret" not in line and "Traceback" not in line for line in server.log)
        assert any(": loaded in " in line for line in server.log)


READS_FOR_EVER = """
import signal, threading, time, types
from nanollama_extras.api import signals
signals.LAST_S = 0.1
server, models = types.SimpleNamespace(should_exit=False), types.SimpleNamespace(workers=[])
threading.Thread(target=time.sleep, args=(60,)).start()
signals.new_stop(server, models)(signal.SIGTERM, None)
"""


def test_a_thread_that_works_for_nobody_does_not_keep_a_server() -> None:
    """As one that encodes an image does after its client is gone."""
    assert subprocess.run([sys.executable, "-c", READS_FOR_EVER], timeout=30).returncode == 0


LOADS_FOR_EVER = """
import nanollama, {library}
def load(*_, **__):
    while True:
        {work}
nanollama.Settings.load = load
raise SystemExit(nanollama.main(["--serve", "--model", "tiny-random", "--port", "0"]))
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(
    ("library", "work"),
    [("time", "time.sleep(60)"), ("torch", "torch.ones(300, 300) @ torch.ones(300, 300)")],
)
def test_a_signal_while_loading_ends_at_once(library: str, work: str, number: int) -> None:
    """Also inside a kernel of torch's, where Python's own exit would crash."""
    command = [sys.executable, "-c", LOADS_FOR_EVER.format(library=library, work=work)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        assert url_in(process.stderr.readline())
        time.sleep(0.2)  # most of what it does from here on is `work`
        process.send_signal(number)
        assert process.stderr.read() == ""
        assert process.wait(60) == 0


def test_a_model_that_cannot_be_loaded_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "bad.gguf").write_bytes(b"GGUF\x03")
    with Process(tmp_path / "bad.gguf") as server:
        assert server.end() == 1
        url, error = server.log
        assert url_in(url).startswith("http://127.0.0.1:")
        assert " error: " in error
        assert "bad.gguf" in error


def test_small_pieces_are_sent_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without TCP_NODELAY every answer waits for the client's delayed acknowledgement."""
    options = []

    def run(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        assert server.config.timeout_keep_alive == 75
        assert not server.config.proxy_headers  # the log has the address of the connection

        async def accept() -> None:
            def connected(_: Any, writer: asyncio.StreamWriter) -> None:
                accepted = writer.get_extra_info("socket")
                options.append(accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
                writer.close()

            async with await asyncio.start_server(connected, sock=sockets[0]) as listening:
                address = listening.sockets[0].getsockname()
                reader, _ = await asyncio.open_connection(*address)
                await reader.read()

        asyncio.run(accept())

    monkeypatch.setattr(nanollama.signal, "signal", lambda *_: None)
    monkeypatch.setattr(uvicorn.Server, "run", run)
    nanollama.serve(Shelf({}, nanollama.ServerConfig(port=0)))
    assert options
    assert all(options)


def test_any_other_reason_is_one_line_too(monkeypatch: pytest.MonkeyPatch) -> None:
    def load() -> nanollama.LLM:
        raise MemoryError("no room\nat all")

    monkeypatch.setattr(nanollama.signal, "signal", lambda *_: None)  # those of the tests stay
    config = nanollama.ServerConfig(port=0)
    models = nanollama.Models({"it": nanollama.ModelSource("it", load)}, config)
    with pytest.raises(nanollama.NanollamaError, match=r"cannot be run: MemoryError: no room$"):
        nanollama.serve(models)


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What --serve would have started."""
    calls: list[Any] = []
    monkeypatch.setattr(nanollama, "serve", lambda *args: calls.append(args))
    monkeypatch.delenv("NANOLLAMA_API_KEY", raising=False)
    return calls


def test_flags_become_the_server_config(
    served: list[Any], tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = (
        "--host ::1 --port 1234 --api-key a --api-key b --cors-origin https://x --max-queue 5 "
        "--timeout 2.5 --any-model --strict --log-prompts --reasoning-name reasoning --temp 0.5 "
        "--allowed-host box --idle-timeout 9 --alias me"
    )
    assert nanollama.main(["--serve", "--model", str(tiny()), *flags.split()]) == 0
    (models,) = served[0]
    assert models.config == nanollama.ServerConfig(
        host="::1", port=1234, api_keys=("a", "b"), max_queue=5,
        cors_origins=("https://x",), timeout_s=2.5, any_model=True, strict=True, log_prompts=True,
        reasoning_name="reasoning", allowed_hosts=("box",), idle_s=9,
        served_names=("me",),
    )  # fmt: skip
    (source,) = models.named.values()
    assert source.name == "me"
    assert source.sampling == {"temperature": 0.5}
    assert not source.replicas
    assert not models.middleware
    assert "warning" not in capsys.readouterr().err


def test_keys_from_the_environment(served: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NANOLLAMA_API_KEY", "a, b,")
    assert nanollama.main(["--serve"]) == 0
    assert served[0][0].config.api_keys == ("a", "b")
    assert nanollama.main(["--serve", "--api-key", "c"]) == 0
    assert served[1][0].config.api_keys == ("c",)


@pytest.mark.parametrize(
    ("flags", "warns"),
    [
        ("", False),
        ("--host 0.0.0.0", True),
        ("--host ::", True),
        ("--host 0.0.0.0 --api-key a", False),
    ],
)
def test_an_open_address_without_a_key_warns(
    served: list[Any], caplog: pytest.LogCaptureFixture, flags: str, warns: bool
) -> None:
    assert nanollama.main(["--serve", *flags.split()]) == 0
    assert ("no --api-key is set" in caplog.text) == warns


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--num-gpus 99", "--num-gpus is 99; this machine has"),
        ("--num-gpus 0", "num_gpus is 0; it must be"),
        ("--max-queue -1", "max_queue is -1; it must be"),
        ("--timeout 0", "timeout_s is 0.0; it must be"),
        ("--port 70000", "port is 70000; it must be"),
        ("--port -1", "port is -1; it must be"),
    ],
)
def test_flags_that_make_no_sense(
    served: list[Any], caplog: pytest.LogCaptureFixture, flags: str, message: str
) -> None:
    assert nanollama.main(["--serve", *flags.split()]) == 2
    assert message in caplog.text
    assert not served


def test_a_port_that_is_taken(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert nanollama.main(["--serve", "--model", "/nowhere", "--port", port]) == 2
    assert f"cannot listen on 127.0.0.1:{port}" in caplog.text


def test_a_keep_alive_connection_serves_many_requests(live: Live) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", httpx.URL(live.url).port)
    connection.connect()
    address = connection.sock.getsockname()
    for stream in (False, True, False):
        body = json.dumps({"prompt": "a", "max_tokens": 2, "stream": stream})
        connection.request("POST", "/v1/completions", body)
        response = connection.getresponse()
        assert response.status == 200
        assert response.read()
        assert connection.sock.getsockname() == address
    connection.close()
