"""Headless Chromium, driven by Playwright, before the chat page of a scripted server: fixtures
`page_server` and `page`, and how a test talks."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from nanollama_extras.api.page import MATH, PAGE, page_headers

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
MARKS = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium"),
]
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
)
CAMERA = "--use-fake-device-for-media-stream --use-fake-ui-for-media-stream"
expect = sync_api.expect


# ---- a server that says what a test tells it to say ---------------------------------------------


class Answer:
    """One streamed answer, as a script writes it."""

    def __init__(self, handler: BaseHTTPRequestHandler, server: ScriptedServer) -> None:
        self.handler, self.server, self.open = handler, server, False

    def raw(self, data: bytes) -> None:
        if not self.open:
            self.handler.send_response(200)
            self.handler.send_header("Content-Type", "text/event-stream")
            self.handler.end_headers()
            self.open = True
        self.handler.wfile.write(data)
        self.handler.wfile.flush()

    def event(self, **fields: Any) -> None:
        chunk = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, **fields}
        self.raw(f"data: {json.dumps({'model': 'scripted', **chunk})}\n\n".encode())

    def delta(self, finish: str | None = None, **delta: str) -> None:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}
        self.event(choices=[choice])

    def say(self, text: str, size: int = 7) -> None:
        for at in range(0, len(text), size):
            self.delta(content=text[at : at + size])

    def think(self, text: str) -> None:
        for at in range(0, len(text), 7):
            self.delta(reasoning_content=text[at : at + 7])

    def finish(self, reason: str = "stop", tokens: int = 12) -> None:
        self.delta(reason)
        details = {"cached_tokens": 20}
        usage = {"prompt_tokens": 30, "completion_tokens": tokens, "total_tokens": 30 + tokens}
        timings = {"prompt_n": 10, "predicted_n": tokens, "predicted_per_second": 24.06}
        self.event(choices=[], usage={**usage, "prompt_tokens_details": details}, timings=timings)
        self.raw(b"data: [DONE]\n\n")

    def refuse(self, status: int, message: str, **headers: str) -> None:
        body = {"error": {"message": message, "type": "x", "param": None, "code": None}}
        self.server.reply(self.handler, status, json.dumps(body).encode(), **headers)


Script = Callable[[Answer], None]


class ScriptedServer:
    """The page behind its policy, and chat completions whose text comes from `script`."""

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.script: Script = lambda answer: None
        self.models = ["scripted"]
        self.about: dict[str, Any] = {}  # more fields of each model
        self.routes: dict[str, Callable[[Any, Answer], None]] = {}  # other paths of POST requests
        self.key = ""
        self.gate, self.left = threading.Event(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

            def end_headers(self) -> None:  # for pages of other servers
                self.send_header("Access-Control-Allow-Origin", "*")
                self.send_header("Access-Control-Allow-Headers", "authorization, content-type")
                super().end_headers()

            def do_OPTIONS(self) -> None:
                self.send_response(204)
                self.end_headers()

            def do_GET(self) -> None:
                outer.get(self)

            def do_POST(self) -> None:
                outer.post(self)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self.gate.set()
        self.http.shutdown()
        self.http.server_close()

    def reply(self, handler: Any, status: int, body: bytes, **headers: str) -> None:
        handler.send_response(status)
        for name, value in {"Content-Type": "application/json", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(body)))
        handler.end_headers()
        handler.wfile.write(body)

    def allowed(self, handler: Any) -> bool:
        if self.key and handler.headers.get("Authorization") != f"Bearer {self.key}":
            Answer(handler, self).refuse(401, "Incorrect API key provided.")
            return False
        return True

    def get(self, handler: Any) -> None:
        if handler.path == "/":
            headers = {"Content_Type": "text/html", **page_headers()}
            self.reply(handler, 200, PAGE.encode(), **headers)
        elif handler.path == "/?temml":
            headers = {"Content_Type": "text/javascript", **page_headers()}
            self.reply(handler, 200, MATH.encode(), **headers)
        elif handler.path == "/v1/models" and self.allowed(handler):
            more = {"object": "model", "created": 1, "state": "loaded", "max_model_len": 2048}
            models = [{"id": name, **more, **self.about} for name in self.models]
            self.reply(handler, 200, json.dumps({"object": "list", "data": models}).encode())

    def post(self, handler: Any) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if not self.allowed(handler):
            return None
        if handler.path != "/v1/chat/completions":
            route = self.routes.get(handler.path)
            return route(body, Answer(handler, self)) if route else handler.send_error(404)
        self.requests.append(body)
        try:
            self.script(Answer(handler, self))
        except OSError:
            self.left.set()


def says(text: str) -> Script:
    def script(answer: Answer) -> None:
        answer.delta(role="assistant", content="")
        answer.say(text)
        answer.finish()

    return script


def talks_on(answer: Answer) -> None:
    """Until the client hangs up."""
    answer.say("one two three ")
    while True:
        answer.say("and on ")
        answer.server.gate.wait(0.01)


@pytest.fixture
def page_server() -> Iterator[ScriptedServer]:
    server = ScriptedServer()
    yield server
    server.close()


# ---- the browser --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Any) -> Iterator[Any]:
    context = browser.new_context()
    context.set_default_timeout(15_000)
    yield context
    context.close()


@pytest.fixture
def page(context: Any, page_server: ScriptedServer) -> Iterator[Any]:
    """The loaded page. It must end without a console error, a refused script or a stray request."""
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: message.type == "error" and faults.append(message.text))
    page.on(
        "request",
        lambda request: (
            request.url.startswith((page_server.url, "data:")) or faults.append(request.url)
        ),
    )
    page.goto(page_server.url)
    expect(page.locator("#model")).to_have_text("scripted")
    yield page
    # The browser logs each HTTP error, which tests of errors cause.
    assert [fault for fault in faults if "Failed to load resource" not in fault] == []


def send(page: Any, text: str) -> None:
    page.locator("#input").fill(text)
    page.locator("#input").press("Enter")


def ask(page: Any, text: str, answer: str) -> None:
    send(page, text)
    expect(last(page)).to_contain_text(answer)
    expect(page.locator("article.live")).to_have_count(0)
    expect(page.get_by_role("alert")).to_have_count(0)


def last(page: Any) -> Any:
    return page.locator(".assistant .text").last


def texts(page: Any) -> Any:
    return page.locator("#log article .text")
