"""What a connection may cost: slow heads and bodies, large ones, many at once, many values."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from serving import Live, serving, wait_until

import nanollama
from nanollama_extras.api import limits

USER = [{"role": "user", "content": "hello"}]
MAX_BODY = 300_000


@pytest.fixture(scope="module")
def live(tiny: Callable[..., Path]) -> Iterator[Live]:
    """A server on which nothing may wait for longer than a second."""
    with serving(lambda: nanollama.LLM(tiny()), idle_s=1, max_body_bytes=MAX_BODY) as live:
        yield live


def connect(live: Live, data: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", httpx.URL(live.url).port), timeout=60)
    connection.sendall(data)
    return connection


def head(length: int, path: str = "/v1/completions", *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "Host: localhost", f"Content-Length: {length}", *headers]
    return "\r\n".join([*lines, "", ""]).encode()


def read(connection: socket.socket) -> bytes:
    """Everything until the server closes."""
    return b"".join(iter(lambda: connection.recv(65536), b""))


def read_one(connection: socket.socket) -> tuple[int, dict[str, str], Any]:
    """Status, headers and JSON of one answer."""
    data = b""
    while b"\r\n\r\n" not in data:
        data += connection.recv(1)
    lines = data.decode().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if ": " in line)
    body = b""
    while len(body) < int(headers["content-length"]):
        body += connection.recv(65536)
    return int(lines[0].split()[1]), headers, json.loads(body)


# ---- time ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "data",
    [b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n"],
    ids=["nothing", "half a line", "half a head"],
)
def test_a_connection_without_a_whole_request_is_closed(live: Live, data: bytes) -> None:
    with connect(live, data) as connection:
        assert read(connection) == b""


def test_a_second_request_has_no_more_time_than_the_first(live: Live) -> None:
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with connect(live, whole) as connection:
        assert read_one(connection)[0] == 200
        connection.sendall(b"GET /hea")
        assert read(connection) == b""


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/responses", "/api/chat", "/tokenize"])
@pytest.mark.parametrize("start", [b"", b'{"prompt": "a", "messages": ['])
def test_a_body_that_does_not_come_is_a_408(live: Live, path: str, start: bytes) -> None:
    with connect(live, head(1000, path) + start) as connection:
        status, headers, body = read_one(connection)
        assert (status, headers["connection"]) == (408, "close")
        assert "did not come" in json.dumps(body)
        assert isinstance(body["error"], str) == path.startswith("/api")
        assert read(connection) == b""
    wait_until(live.is_idle)


def test_the_rest_of_a_refused_body_is_not_awaited_for_ever(live: Live) -> None:
    with connect(live, head(MAX_BODY + 1)) as connection:
        assert read_one(connection)[0] == 413
        connection.sendall(b"x" * 1000)
        assert read(connection) == b""


def test_a_request_may_run_longer_than_a_connection_may_idle(live: Live) -> None:
    body = {"prompt": "a", "max_tokens": 200, "ignore_eos": True, "stream": True}
    step = live.pool.llm().engine.step

    def slow_step() -> None:
        time.sleep(0.01)
        step()

    live.pool.llm().engine.step = slow_step  # type: ignore[method-assign]
    try:
        text = live.http.post("/v1/completions", json=body).text
    finally:
        live.pool.llm().engine.step = step  # type: ignore[method-assign]
    assert text.endswith("data: [DONE]\n\n")


# ---- size ----------------------------------------------------------------------------------------


def test_a_length_over_the_limit_is_refused_before_the_body(live: Live) -> None:
    with connect(live, head(MAX_BODY + 1)) as connection:
        status, _, body = read_one(connection)
        assert (status, body["error"]["code"]) == (413, "request_too_large")


def test_a_connection_goes_on_after_a_body_that_was_refused(live: Live) -> None:
    good = json.dumps({"prompt": "a", "max_tokens": 1}).encode()
    with connect(live, head(MAX_BODY + 1) + b"x" * (MAX_BODY + 1)) as connection:
        assert read_one(connection)[0] == 413
        connection.sendall(head(len(good)) + good)
        assert read_one(connection)[0] == 200


def test_without_a_key_no_body_is_read(tiny: Callable[..., Path]) -> None:
    with serving(lambda: nanollama.LLM(tiny()), idle_s=1, api_keys=("k",)) as live:
        for length in (1000, 10**12):
            with connect(live, head(length)) as connection:
                assert read_one(connection)[0] == 401
                connection.sendall(b"x")
                assert read(connection) == b""


def test_bodies_have_room_together_and_small_ones_always(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[limits.Bodies] = []

    def layer(app: Any, config: Any) -> limits.Bodies:
        made.append(limits.Bodies(app, config))
        return made[0]

    monkeypatch.setattr(limits, "MAX_BODIES", 1)
    monkeypatch.setattr(limits, "layer", layer)
    body = json.dumps({"prompt": "a", "max_tokens": 1, "user": "x" * 250_000}).encode()
    num_held = len(body) - limits.SMALL_BYTES
    with serving(lambda: nanollama.LLM(tiny()), max_body_bytes=MAX_BODY) as live:
        with connect(live, head(len(body)) + body[:-1]) as connection:
            wait_until(lambda: made[0].num_bytes == num_held - 1)
            refused = live.http.post("/v1/completions", content=body)
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert live.text(max_tokens=1).status_code == 200
            connection.sendall(body[-1:])
            assert read_one(connection)[0] == 200
        assert live.http.post("/v1/completions", content=body).status_code == 200
        with connect(live, head(len(body)) + body[:-1]):
            wait_until(lambda: made[0].num_bytes == num_held - 1)
        wait_until(lambda: made[0].num_bytes == 0, "the client hung up: room")
        assert live.http.post("/v1/completions", content=body).status_code == 200


def test_the_longest_idle_connection_makes_room(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(limits, "MAX_CONNECTIONS", 3)
    whole = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    idle = [connect(live, b"GET") for _ in range(6)]
    with connect(live, whole) as connection:
        assert b"200 OK" in read(connection)
    for connection in idle:
        assert connection.recv(1) == b""
        connection.close()


# ---- numbers -------------------------------------------------------------------------------------

TOOL = {"type": "function", "function": {"name": "f"}}
CHAT = {"model": "model", "messages": USER, "max_tokens": 1}
TOO_MANY = [
    ("/v1/chat/completions", {"stop": ["a"] * 65}, "stop"),
    ("/v1/completions", {"prompt": "a", "stop": ["a"] * 65}, "stop"),
    ("/v1/responses", {"input": "a", "stop": ["a"] * 65}, "stop"),
    ("/api/chat", {"options": {"stop": ["a"] * 65}}, "stop"),
    ("/api/generate", {"prompt": "a", "options": {"stop": ["a"] * 65}}, "stop"),
    ("/v1/chat/completions", {"stop": ["a", "b" * 1001]}, "stop"),
    ("/api/chat", {"options": {"stop": ["b" * 1001]}}, "stop"),
    ("/v1/chat/completions", {"logit_bias": dict.fromkeys(map(str, range(1025)), 1)}, "logit_bias"),
    ("/v1/chat/completions", {"tools": [TOOL] * 513}, "tools"),
    ("/v1/responses", {"input": "a", "tools": [TOOL] * 513}, "tools"),
    ("/api/chat", {"tools": [TOOL] * 513}, "tools"),
]


@pytest.mark.parametrize(
    ("path", "fields", "name"), TOO_MANY, ids=[f"{path} {name}" for path, _, name in TOO_MANY]
)
def test_a_list_that_is_too_long_is_a_400_that_names_it(
    live: Live, path: str, fields: dict[str, Any], name: str
) -> None:
    response = live.http.post(path, json={**CHAT, **fields})
    assert response.status_code == 400
    assert name in response.json()["error"] if path.startswith("/api") else (
        response.json()["error"]["param"] == name
    )  # fmt: skip


def test_as_many_as_fit_are_honoured(live: Live) -> None:
    stop = [f"never{i}" for i in range(63)] + ["x" * 1000]
    assert live.chat(stop=stop, max_tokens=2).status_code == 200
    bias = {str(i): 0 for i in range(live.pool.llm().engine.n_vocab)}
    assert len(bias) < 1024
    assert live.chat(logit_bias=bias, max_tokens=2).status_code == 200


def test_messages_and_items_have_a_limit(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_OBJECTS", 3)
    assert live.http.post("/tokenize", json={"messages": USER * 3}).status_code == 200
    for path, name in (("/v1/chat/completions", "messages"), ("/v1/responses", "input")):
        error = live.http.post(path, json={**CHAT, name: USER * 4}).json()["error"]
        assert error["param"] == name
        assert "4 entries" in error["message"]


def test_values_are_counted_and_text_is_not(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limits, "MAX_VALUES", 1000)
    for many in ("[" + "[]," * 1000 + "1]", json.dumps(dict.fromkeys(map(str, range(1001)), 1))):
        body = f'{{"prompt": "a", "max_tokens": 1, "metadata": {{"x": {many}}}}}'
        response = live.http.post("/v1/completions", content=body)
        assert response.status_code == 400
        assert "more than 1000 values" in response.json()["error"]["message"]
    text = '[{"a": "\\"}, {\\\\", ' * 2000
    assert live.http.post("/tokenize", json={"prompt": text}).status_code == 200


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.sampled_from('",[{\\'),
    lambda inner: st.lists(inner, max_size=6) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=30,
)


def num_entries(value: Any) -> int:
    """Containers in a value, and entries after the first of each."""
    if not isinstance(value, (list, dict)):
        return 0
    inner = value.values() if isinstance(value, dict) else value
    return max(len(value), 1) + sum(map(num_entries, inner))


@given(JSON_VALUES, st.booleans())
def test_values_are_counted_as_a_parser_would(value: Any, is_ascii: bool) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(limits, "MAX_VALUES", 10)
        data = json.dumps(value, ensure_ascii=is_ascii).encode(errors="replace")
        assert limits.has_many_values(data) == (num_entries(json.loads(data)) > 10)


@given(st.text("ab", max_size=12), st.lists(st.text("ab", min_size=1, max_size=6), max_size=4))
def test_text_is_held_back_for_a_stop_string(text: str, words: list[str]) -> None:
    begun = [n for w in words for n in range(len(w)) if text.endswith(w[:n])]
    assert nanollama.held_back(text, words) == max(begun, default=0)
