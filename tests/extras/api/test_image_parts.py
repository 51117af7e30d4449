"""Images in messages, sent by the clients of each API: what the model gets, and what is refused."""

from __future__ import annotations

import base64
import io
import logging
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import anthropic
import ollama
import openai
import pytest
from PIL import Image
from serving import Live, serving

import nanollama
from nanollama import GenerationRequest, RequestError
from nanollama_extras.answers.images import read_messages
from nanollama_extras.api import image_hosts
from nanollama_extras.testing import Script, ScriptLLM


def png(width: int, height: int = 4) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height), "red").save(out, "PNG")
    return out.getvalue()


def encoded(width: int) -> str:
    return base64.b64encode(png(width)).decode()


def url(width: int) -> str:
    return f"data:image/png;base64,{encoded(width)}"


class Seer(ScriptLLM):
    """A script that notes what a model with vision gets: the width stands for each image."""

    def __init__(self, vision: Any = nanollama.encode_chat) -> None:
        super().__init__(Script([{"text": "A cat."}]))
        self.vision = vision
        self.seen: list[Any] = []

    def encode_request(self, request: GenerationRequest) -> tuple[list[int], str]:
        def short(part: Any) -> Any:
            return part["image"].pixels.width if part["type"] == "image" else part["text"]

        read = read_messages(self, request.messages or [])
        contents = [(m["role"], m.get("content")) for m in read]
        self.seen = [(r, [*map(short, c)] if isinstance(c, list) else c) for r, c in contents]
        return super().encode_request(request)


@pytest.fixture(scope="module")
def seer() -> Seer:
    return Seer()


@pytest.fixture(scope="module")
def live(seer: Seer) -> Iterator[Live]:
    with serving(lambda: seer, any_model=True) as live:
        yield live


@pytest.fixture(scope="module")
def blind() -> Iterator[Live]:
    """A server of a model without vision."""
    with serving(lambda: Seer(vision=None), any_model=True) as live:
        yield live


# ---- each API, by its own client -----------------------------------------------------------------


def ask_openai(host: str, stream: bool = False) -> Any:
    parts = [{"type": "text", "text": "What?"}, {"type": "image_url", "image_url": {"url": url(5)}}]
    messages: Any = [{"role": "user", "content": [*parts, {"type": "text", "text": "And?"}]}]
    client = openai.OpenAI(base_url=f"{host}/v1", api_key="x", max_retries=0)
    return client.chat.completions.create(model="m", messages=messages).choices[0].message.content


def ask_responses(host: str) -> Any:
    parts = [{"type": "input_text", "text": "What?"}, {"type": "input_image", "image_url": url(5)}]
    client = openai.OpenAI(base_url=f"{host}/v1", api_key="x", max_retries=0)
    content: Any = [*parts, {"type": "input_text", "text": "And?"}]
    items: Any = [{"role": "user", "content": content}]
    return client.responses.create(model="m", input=items).output_text


def ask_anthropic(host: str) -> Any:
    source = {"type": "base64", "media_type": "image/png", "data": encoded(5)}
    texts = [{"type": "text", "text": text} for text in ("What?", "And?")]
    content: Any = [texts[0], {"type": "image", "source": source}, texts[1]]
    client = anthropic.Anthropic(base_url=host, api_key="x", max_retries=0)
    messages: Any = [{"role": "user", "content": content}]
    blocks: Any = client.messages.create(model="m", max_tokens=9, messages=messages).content
    return blocks[0].text


def ask_ollama_chat(host: str) -> Any:
    message = ollama.Message(role="user", content="What?", images=[ollama.Image(value=png(5))])
    return ollama.Client(host=host).chat("m", [message]).message.content


def ask_ollama_generate(host: str) -> Any:
    return ollama.Client(host=host).generate("m", "What?", images=[png(5)]).response


CLIENTS: dict[str, tuple[Callable[[str], Any], list[Any]]] = {
    "openai": (ask_openai, ["What?", 5, "And?"]),
    "responses": (ask_responses, ["What?", 5, "And?"]),
    "anthropic": (ask_anthropic, ["What?", 5, "And?"]),
    "ollama chat": (ask_ollama_chat, [5, "What?"]),
    "ollama generate": (ask_ollama_generate, [5, "What?"]),
}


@pytest.mark.parametrize("name", CLIENTS)
def test_the_model_gets_the_images_of_a_client(live: Live, seer: Seer, name: str) -> None:
    ask, expected = CLIENTS[name]
    assert ask(live.url) == "A cat."
    assert seer.seen[-1] == ("user", expected)


@pytest.mark.parametrize("name", CLIENTS)
def test_a_model_without_vision_is_a_400_that_the_client_understands(
    blind: Live, name: str
) -> None:
    errors = (openai.BadRequestError, anthropic.BadRequestError, ollama.ResponseError)
    with pytest.raises(errors, match="does not read images") as caught:
        CLIENTS[name][0](blind.url)
    assert getattr(caught.value, "status_code", 0) == 400
    assert encoded(5)[20:40] not in str(caught.value)


def test_images_of_results_come_with_the_next_message(live: Live, seer: Seer) -> None:
    source = {"type": "base64", "media_type": "image/png", "data": encoded(7)}
    result = {"type": "tool_result", "tool_use_id": "t", "content": [
        {"type": "text", "text": "read"}, {"type": "image", "source": source}]}  # fmt: skip
    call = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
    messages: Any = [
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result, {"type": "text", "text": "Well?"}]},
    ]
    body = {"max_tokens": 5, "messages": messages}
    assert live.http.post("/v1/messages", json=body).status_code == 200
    assert seer.seen[-2:] == [("tool", ["read"]), ("user", [7, "Well?"])]
    output = [{"type": "input_image", "image_url": url(7)}]
    items = [
        {"role": "user", "content": "Look."},
        {"type": "function_call", "call_id": "t", "name": "f", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "t", "output": output},
    ]
    assert live.http.post("/v1/responses", json={"input": items}).status_code == 200
    assert seer.seen[-2:] == [("tool", "(an image)"), ("user", [7])]


def test_a_response_goes_on_with_the_images_of_the_last_one(live: Live, seer: Seer) -> None:
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="x")
    items: Any = [{"role": "user", "content": [{"type": "input_image", "image_url": url(6)}]}]
    first = client.responses.create(model="m", input=items)
    client.responses.create(model="m", input="Why?", previous_response_id=first.id)
    assert seer.seen == [("user", [6]), ("assistant", "A cat."), ("user", "Why?")]
    compacted = live.http.post("/v1/responses/compact", json={"input": items}).json()
    assert compacted["output"][0]["content"] == [{"type": "input_image", "image_url": url(6)}]


@pytest.mark.parametrize(
    ("path", "body", "problem"),
    [
        ("/api/chat", {"messages": [{"role": "user", "content": "a", "images": "AA"}]}, "a list"),
        ("/api/chat", {"messages": [{"role": "user", "images": [3]}]}, r"images[0] must be"),
        ("/api/generate", {"prompt": "a", "images": ["https://a.b/c.png"]}, "images[0] is a URL"),
        ("/api/generate", {"prompt": "a", "images": ["aGk="], "raw": True}, "cannot be combined"),
        ("/api/generate", {"prompt": "a", "images": ["aGk="]}, "images[0] is not an image"),
        ("/api/generate", {"prompt": "a", "images": {}}, "images is {}"),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_image", "file_id": "f"}]}]},
            "input[0].content[0] has no image_url",
        ),
        (
            "/v1/responses",
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]},
            "input[0].content[0]",
        ),
        (
            "/v1/messages",
            {"max_tokens": 1, "messages": [{"role": "user", "content": [
                {"type": "image", "source": {"type": "base64", "data": "aGk="}}]}]},
            "messages.0.content.0.source.data is not an image",
        ),
        (
            "/v1/messages",
            {"max_tokens": 1, "messages": [{"role": "user", "content": [
                {"type": "image", "source": {"type": "file", "file_id": "f"}}]}]},
            "messages.0.content.0.source: an object of type 'base64' or 'url'",
        ),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": [
                {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}]}]},
            "images of example.com are not fetched (--allow-image-hosts)",
        ),
    ],
)  # fmt: skip
def test_an_error_names_the_place_and_the_problem(
    live: Live, path: str, body: Any, problem: str
) -> None:
    answer = live.http.post(path, json={"model": "m", **body})
    assert answer.status_code == 400, answer.text
    assert problem in str(answer.json()["error"]), answer.text


def test_counting_reads_images(live: Live, seer: Seer) -> None:
    client = anthropic.Anthropic(base_url=live.url, api_key="x")
    source: Any = {"type": "base64", "media_type": "image/png", "data": encoded(9)}
    messages: Any = [{"role": "user", "content": [{"type": "image", "source": source}]}]
    assert client.messages.count_tokens(model="m", messages=messages).input_tokens > 0
    assert seer.seen == [("user", [9])]


# ---- bodies and logs -----------------------------------------------------------------------------


def test_bodies_with_messages_have_room_for_an_image(seer: Seer) -> None:
    noise = base64.b64encode(bytes(range(256)) * 200).decode()
    user = {"role": "user", "content": "a", "images": [noise]}
    with serving(lambda: seer, max_body_bytes=20_000, any_model=True) as live:
        answer = live.http.post("/api/chat", json={"model": "m", "messages": [user]})
        assert (answer.status_code, "is not an image" in answer.text) == (400, True)
        assert live.text("a" * 20_000).status_code == 413
        assert live.chat("a" * 20_000).status_code == 200


def test_the_log_of_requests_has_no_image(seer: Seer, caplog: pytest.LogCaptureFixture) -> None:
    noise = base64.b64encode(bytes(range(256)) * 8).decode()
    body: Any = {"model": "m", "messages": [{"role": "user", "content": "hi", "images": [noise]}]}
    with serving(lambda: seer, log_prompts=True, any_model=True) as live:
        caplog.set_level(logging.DEBUG)
        live.http.post("/api/chat", json=body)
    assert '"content": "hi"' in caplog.text
    assert noise[100:120] not in caplog.text


# ---- images of other servers ---------------------------------------------------------------------


class Files(BaseHTTPRequestHandler):
    """A server of images, of redirects, and of what is neither."""

    def do_GET(self) -> None:
        name, _, rest = self.path.partition("?")[0][1:].partition("/")
        if name == "to":
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
        elif name == "big":
            self.send_response(200)
            self.end_headers()
            self.wfile.write(bytes(3000))
        else:
            self.send_response(200 if name == "a.png" else 404)
            self.send_header("Content-Length", str(len(png(8))))
            self.end_headers()
            self.wfile.write(png(8))

    def log_message(self, *_: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def files() -> Iterator[str]:
    """The host of a server of images."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"localhost:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def allowed(files: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The same host, allowed, and as if it were one of the internet."""
    monkeypatch.setattr(image_hosts, "is_public", lambda _: True)
    token = image_hosts.HOSTS.set((files,))
    yield files
    image_hosts.HOSTS.reset(token)


def test_a_named_host_is_asked(allowed: str, seer: Seer) -> None:
    with serving(lambda: seer, image_hosts=(allowed,), any_model=True) as live:
        part = {"type": "image_url", "image_url": {"url": f"http://{allowed}/a.png?x=1"}}
        body = {"messages": [{"role": "user", "content": [part]}]}
        answer = live.http.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    assert seer.seen == [("user", [8])]


def test_redirects_are_followed_within_the_rules(allowed: str) -> None:
    assert image_hosts.fetch(f"http://{allowed}/to//to//a.png", "x") == png(8)
    for target, problem in (
        ("http://other.example/a.png", "images of other.example are not fetched"),
        ("file:///etc/passwd", "no http or https URL"),
        ("/to//to//to//a.png", "status 302"),
        ("", "status 302"),
    ):
        with pytest.raises(RequestError, match=problem):
            image_hosts.fetch(f"http://{allowed}/to/{target}", "x")


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("http://localhost/a.png", "images of localhost are not fetched"),
        ("http://localhost:1/a.png", "images of localhost:1 are not fetched"),
        ("http://user@other.example/a.png", "images of other.example are not fetched"),
        ("ftp://HOST/a.png", "no http or https URL"),
        ("http://HOST/none.png", "answered with status 404"),
        ("http://HOST/big", "the file is over 1.0 KB"),
        ("http://HOST/a b", "cannot be read"),
        ("http://", "not fetched"),
        ("http://[::1", "no http or https URL"),
        ("http://a.b:99999/", "no http or https URL"),
    ],
)
def test_what_is_not_fetched(
    allowed: str, place: str, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_hosts, "MAX_BYTES", 1000)
    with pytest.raises(RequestError, match=problem) as caught:
        image_hosts.fetch(place.replace("HOST", allowed), "images[0]")
    assert str(caught.value).startswith("images[0]: ")


def test_a_slow_server_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_hosts, "is_public", lambda _: True)
    monkeypatch.setattr(image_hosts, "MAX_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        host = f"localhost:{silent.getsockname()[1]}"
        token = image_hosts.HOSTS.set((host,))
        with pytest.raises(RequestError, match=r"took more than 0\.2 s"):
            image_hosts.fetch(f"http://{host}/a.png", "x")
        image_hosts.HOSTS.reset(token)


@pytest.mark.parametrize(
    "address",
    [
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "10.0.0.1", "172.16.0.1", "192.168.1.1"),
        *("169.254.169.254", "100.64.0.1", "224.0.0.1", "255.255.255.255", "192.0.2.1"),
        *("::1", "::", "fe80::1", "fe80::1%eth0", "fc00::1", "ff02::1", "::ffff:127.0.0.1"),
        *("::ffff:10.0.0.1", "2002:7f00:1::", "64:ff9b::7f00:1", "2001:db8::1"),
        *("fec0::1", "::127.0.0.1", "::10.0.0.1", "::ffff:0:127.0.0.1", "64:ff9b:1::a00:1"),
    ],
)
def test_addresses_that_only_this_machine_reaches_are_refused(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not image_hosts.is_public(address)
    rows = [(0, 0, 0, "", (one, 80)) for one in ("8.8.8.8", address)]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: rows)
    token = image_hosts.HOSTS.set(("a.example",))
    with pytest.raises(RequestError, match=r"a\.example is not a host of the internet"):
        image_hosts.fetch("http://a.example/x.png", "x")
    image_hosts.HOSTS.reset(token)


def test_a_name_that_takes_long_to_resolve_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_hosts, "MAX_SECONDS", 0.1)
    end = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: end.wait(60))
    token = image_hosts.HOSTS.set(("a.example",))
    with pytest.raises(RequestError, match=r"a\.example took more than 0\.1 s"):
        image_hosts.fetch("http://a.example/x.png", "x")
    end.set()
    image_hosts.HOSTS.reset(token)


def test_a_name_is_resolved_once(files: str, monkeypatch: pytest.MonkeyPatch) -> None:
    port, asked = int(files.partition(":")[2]), []

    def resolve(host: str, *_: Any, **__: Any) -> Any:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", port))]

    monkeypatch.setattr(image_hosts, "is_public", lambda _: True)
    monkeypatch.setattr(socket, "getaddrinfo", resolve)
    token = image_hosts.HOSTS.set((f"a.example:{port}",))
    assert image_hosts.fetch(f"http://a.example:{port}/a.png", "x") == png(8)
    image_hosts.HOSTS.reset(token)
    assert [host for host in asked if host != "127.0.0.1"] == ["a.example"]


@pytest.mark.parametrize("address", ["8.8.8.8", "1.1.1.1", "2606:4700:4700::1111"])
def test_addresses_of_the_internet_are_allowed(address: str) -> None:
    assert image_hosts.is_public(address)


def test_options_of_a_server_reach_it(tiny: Callable[..., Path]) -> None:
    flags = ["--serve", "--allow-image-hosts", "A.example", "--allow-image-hosts", "b.example:81"]
    args = nanollama.build_parser().parse_args(flags)
    config = nanollama.ServerConfig(**nanollama.given_flags(args, nanollama.ServerConfig))
    assert config.image_hosts == ("A.example", "b.example:81")
