"""The web chat in a real browser: headless Chromium, driven by Playwright."""

from __future__ import annotations

import json
import re
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from mcp_server import ENTRY
from serving import Live, serving, wait_until

import nanollama
from nanollama_extras import testing
from nanollama_extras.answers.mcp_tools import open_servers
from nanollama_extras.api.page import PAGE, page_headers

sync_api = pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.xdist_group("browser"),  # one browser serves all of these tests
    pytest.mark.skipif(CHROMIUM is None, reason="needs Debian's chromium"),
]
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    " --disable-component-update --disable-sync"
)
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
        self.key = ""
        self.gate, self.left = threading.Event(), threading.Event()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: Any) -> None:
                pass

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
        elif handler.path == "/v1/models" and self.allowed(handler):
            more = {"object": "model", "created": 1, "state": "loaded", "max_model_len": 2048}
            models = [{"id": name, **more} for name in self.models]
            self.reply(handler, 200, json.dumps({"object": "list", "data": models}).encode())

    def post(self, handler: Any) -> None:
        body = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        assert handler.path == "/v1/chat/completions"
        if not self.allowed(handler):
            return
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


# ---- talking ------------------------------------------------------------------------------------


def test_an_answer_appears_while_it_is_written(page: Any, page_server: ScriptedServer) -> None:
    def script(answer: Answer) -> None:
        answer.delta(role="assistant", content="")
        answer.say("First part")
        page_server.gate.wait()
        answer.say(", second part.")
        answer.finish()

    page_server.script = script
    send(page, "Hello")
    expect(last(page)).to_have_text("First part")
    expect(page.locator("#send")).to_have_accessible_name("Stop (Esc)")
    page_server.gate.set()
    expect(last(page)).to_have_text("First part, second part.")
    expect(page.get_by_role("alert")).to_have_count(0)
    expect(page.locator("#send")).to_have_accessible_name("Send (Enter)")
    expect(page.locator("#input")).to_be_focused()
    expect(page.locator("#input")).to_have_value("")
    expect(page.locator(".assistant .actions")).to_contain_text(
        "24.1 tokens/s · 12 tokens · prompt 30 (20 cached)"
    )
    expect(page.locator("#used")).to_have_text("42 of 2,048 tokens")
    assert page.locator("#context").evaluate("(bar) => bar.value / bar.max") == 42 / 2048
    assert page.title() == "Hello · nanollama"


def test_a_request_has_the_conversation_and_only_the_settings_that_were_changed(
    page: Any, page_server: ScriptedServer
) -> None:
    page_server.script = says("Yes.")
    ask(page, "One?", "Yes.")
    assert page_server.requests[0] == {
        "model": "scripted",
        "messages": [{"role": "user", "content": "One?"}],
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    page.locator("#configure").click()
    page.get_by_label("System prompt").fill("Be brief.")
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Top-p").fill("0.9")
    page.get_by_label("Top-k").fill("2.5")  # not an integer: not taken
    page.get_by_label("Max tokens").fill("64")
    page.get_by_label("Seed").fill("7")
    page.get_by_label("Top-k").fill("")
    page.get_by_role("button", name="Done").click()
    page_server.script = says("Again.")
    ask(page, "Two?", "Again.")
    request = page_server.requests[1]
    assert [m["content"] for m in request["messages"]] == ["Be brief.", "One?", "Yes.", "Two?"]
    assert [m["role"] for m in request["messages"]] == ["system", "user", "assistant", "user"]
    changed = {"temperature": 0, "top_p": 0.9, "max_tokens": 64, "seed": 7}
    assert {k: v for k, v in request.items() if k not in page_server.requests[0]} == changed

    page.reload()  # settings stay
    ask(page, "Three?", "Again.")
    assert page_server.requests[2]["seed"] == 7
    page.locator("#configure").click()
    page.get_by_role("button", name="Server's defaults").click()
    page.keyboard.press("Escape")
    ask(page, "Four?", "Again.")
    assert not changed.keys() & page_server.requests[3].keys()


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stop_ends_the_request_and_keeps_what_was_said(
    page: Any, page_server: ScriptedServer, how: str
) -> None:
    page_server.script = talks_on
    send(page, "Talk")
    expect(last(page)).to_contain_text("one two three and on and on")
    page.locator("#input").fill("a draft")
    page.locator("#input").press("Enter")  # while an answer is written, nothing is sent or stopped
    if how == "Escape":
        page.keyboard.press("Escape")
    else:
        page.get_by_role("button", name="Stop (Esc)").click()
    assert page_server.left.wait(15)
    expect(page.locator(".assistant .actions")).to_contain_text("stopped")
    expect(page.locator("#input")).to_have_value("a draft")
    assert len(page_server.requests) == 1
    page_server.script = says("Fine.")
    ask(page, "Enough", "Fine.")
    assert page_server.requests[1]["messages"][1]["content"].startswith("one two three and on")


def test_regenerate_replaces_the_last_answer(page: Any, page_server: ScriptedServer) -> None:
    page_server.script = says("A.")
    ask(page, "One?", "A.")
    ask(page, "Two?", "A.")
    again = page.get_by_role("button", name="Regenerate")
    expect(again).to_have_count(1)  # the last answer alone offers it
    page_server.script = says("B.")
    again.click()
    expect(last(page)).to_have_text("B.")
    expect(texts(page)).to_have_text(["One?", "A.", "Two?", "B."])
    assert page_server.requests[2] == page_server.requests[1]


def test_an_edited_message_cuts_the_conversation_there(
    page: Any, page_server: ScriptedServer
) -> None:
    page_server.script = says("A.")
    for question in ("One?", "Two?", "Three?"):
        ask(page, question, "A.")
    page.locator(".user").nth(1).hover()
    page.get_by_role("button", name="Edit").nth(1).click()
    area = page.get_by_label("Edit the message")
    expect(area).to_be_focused()
    area.fill("Zwei?")
    page_server.script = says("B.")
    area.press("Enter")
    expect(last(page)).to_have_text("B.")
    expect(texts(page)).to_have_text(["One?", "A.", "Zwei?", "B."])
    assert [m["content"] for m in page_server.requests[3]["messages"]] == ["One?", "A.", "Zwei?"]
    page.locator("#input").press("ArrowUp")  # edits the last message
    expect(area).to_have_value("Zwei?")
    area.press("Escape")
    expect(texts(page)).to_have_text(["One?", "A.", "Zwei?", "B."])
    expect(page.locator("#input")).to_be_focused()


def test_keys_are_safe_for_input_methods(page: Any, page_server: ScriptedServer) -> None:
    page_server.script = says("A.")
    box = page.locator("#input")
    box.press_sequentially("eins")
    box.press("Shift+Enter")
    box.press_sequentially("zwei")
    for composing in ({"isComposing": True}, {"keyCode": 229}):
        keydown = "new KeyboardEvent('keydown', {key: 'Enter', bubbles: true, ...how})"
        box.evaluate(f"(box, how) => box.dispatchEvent({keydown})", composing)
    assert page_server.requests == []
    box.press("Enter")
    expect(last(page)).to_have_text("A.")
    assert page_server.requests[0]["messages"][0]["content"] == "eins\nzwei"
    box.fill("  \n ")
    box.press("Enter")
    assert len(page_server.requests) == 1


def test_thoughts_are_folded_away(page: Any, page_server: ScriptedServer) -> None:
    def script(answer: Answer) -> None:
        answer.think("Hm, **let me** think.")
        page_server.gate.wait()
        answer.say("42")
        answer.finish()

    page_server.script = script
    send(page, "Why?")
    thoughts = page.locator("details")
    expect(thoughts.locator("summary")).to_have_text("Thinking…")
    page_server.gate.set()
    expect(last(page)).to_have_text("42")
    expect(thoughts.locator("summary")).to_have_text(re.compile(r"Thought for \d+ s"))
    expect(thoughts.locator("div")).to_be_hidden()
    thoughts.locator("summary").click()
    expect(thoughts.locator("div")).to_have_text("Hm, let me think.")
    page_server.script = says("No.")
    ask(page, "Sure?", "No.")
    assert page_server.requests[1]["messages"][1] == {"role": "assistant", "content": "42"}


def test_the_stream_may_be_cut_anywhere(page: Any, page_server: ScriptedServer) -> None:
    def script(answer: Answer) -> None:
        answer.raw(b": a comment\n\n")
        chunk = {"choices": [{"index": 0, "delta": {"content": "Zürich 🦙 ok"}}]}
        event = f"event: message\r\ndata: {json.dumps(chunk, ensure_ascii=False)}\r\n\r\n"
        end = {"choices": [{"index": 0, "delta": {"content": "."}, "finish_reason": "stop"}]}
        for byte in event.encode() + f"data:{json.dumps(end)}\n\ndata: [DONE]\n\n".encode():
            answer.raw(bytes([byte]))

    page_server.script = script
    ask(page, "Where?", "Zürich 🦙 ok.")


# ---- conversations ------------------------------------------------------------------------------


def test_conversations_outlive_a_reload(page: Any, page_server: ScriptedServer) -> None:
    page_server.script = says("A **bold** answer.")
    ask(page, "First question", "A bold answer.")
    page.get_by_role("link", name="New chat").click()
    expect(page.locator("article")).to_have_count(0)
    ask(page, "Second question", "A bold answer.")
    page.reload()
    expect(texts(page)).to_have_text(["Second question", "A bold answer."])
    expect(page.locator("#used")).to_have_text("42 of 2,048 tokens")
    links = page.locator("#chats a")
    expect(links).to_have_text(["Second question", "First question"])
    links.nth(1).click()
    expect(texts(page)).to_have_text(["First question", "A bold answer."])
    page.get_by_label("Title of the conversation").fill("Renamed")
    page.get_by_label("Title of the conversation").press("Enter")
    page.reload()
    expect(links).to_have_text(["Second question", "Renamed"])
    assert page.title() == "Renamed · nanollama"
    page.get_by_label("Delete Renamed").click()  # the browser's question is answered with no
    expect(texts(page)).to_have_text(["First question", "A bold answer."])
    page.once("dialog", lambda dialog: dialog.accept())
    page.get_by_label("Delete Renamed").click()
    expect(page.locator("article")).to_have_count(0)
    page.reload()
    expect(links).to_have_text(["Second question"])


def test_an_answer_goes_on_while_another_conversation_is_read(
    page: Any, page_server: ScriptedServer
) -> None:
    def script(answer: Answer) -> None:
        answer.say("Slowly")
        page_server.gate.wait()
        answer.say(" done.")
        answer.finish()

    page_server.script = script
    send(page, "Slow question")
    expect(last(page)).to_have_text("Slowly")
    page.get_by_role("link", name="New chat").click()
    page_server.script = says("Fast.")
    ask(page, "Fast question", "Fast.")
    page_server.gate.set()
    expect(page.locator("#chats .live")).to_have_count(0)
    expect(texts(page)).to_have_text(["Fast question", "Fast."])
    page.get_by_role("link", name="Slow question").click()
    expect(texts(page)).to_have_text(["Slow question", "Slowly done."])


def test_a_reload_keeps_the_part_that_was_written(page: Any, page_server: ScriptedServer) -> None:
    def script(answer: Answer) -> None:
        answer.say("Half of it")
        page_server.gate.wait()

    page_server.script = script
    send(page, "Tell me")
    expect(last(page)).to_have_text("Half of it")
    page.reload()
    expect(texts(page)).to_have_text(["Tell me", "Half of it"])
    expect(page.locator(".assistant .actions")).to_contain_text("stopped")


def test_tabs_share_the_conversations(page: Any, context: Any, page_server: ScriptedServer) -> None:
    other = context.new_page()
    other.goto(page_server.url)
    page_server.script = says("A.")
    ask(page, "One?", "A.")
    other.get_by_role("link", name="One?").click()
    expect(texts(other)).to_have_text(["One?", "A."])
    ask(other, "Two?", "A.")
    expect(texts(page)).to_have_text(["One?", "A.", "Two?", "A."])


BROKEN_STORAGE = {
    "blocked": "for (const name of ['localStorage', 'sessionStorage'])"
    " Object.defineProperty(window, name, {get() { throw new DOMException('no') }})",
    "full": "Storage.prototype.setItem = () => { throw new DOMException('QuotaExceededError') }",
}


@pytest.mark.parametrize("how", BROKEN_STORAGE)
def test_the_page_works_where_storage_does_not(
    page: Any, page_server: ScriptedServer, how: str
) -> None:
    page.add_init_script(BROKEN_STORAGE[how])
    page.goto(page_server.url)
    page_server.script = says("A.")
    ask(page, "One?", "A.")
    expect(page.locator("#model")).to_contain_text("The browser refuses to store more")
    ask(page, "Two?", "A.")
    page.get_by_role("link", name="New chat").click()
    page.get_by_role("link", name="One?").click()
    expect(texts(page)).to_have_text(["One?", "A.", "Two?", "A."])


def test_a_broken_entry_costs_only_itself(page: Any, page_server: ScriptedServer) -> None:
    page_server.script = says("A.")
    ask(page, "One?", "A.")
    for name, value in {
        "settings": "[1",
        "chat.a": "{",
        "chat.b": "null",
        "chat.c": '{"id": "c", "messages": [null]}',
        "chat.d": '{"id": "d", "messages": "text"}',
        "chat.e": '{"id": "other", "messages": []}',
    }.items():
        page.evaluate("([k, v]) => localStorage.setItem('nanollama.' + k, v)", [name, value])
    page.reload()
    expect(page.locator("#chats a")).to_have_text(["One?"])
    expect(texts(page)).to_have_text(["One?", "A."])


# ---- errors -------------------------------------------------------------------------------------


def test_an_error_is_shown_as_what_it_is_and_can_be_retried(
    page: Any, page_server: ScriptedServer
) -> None:
    page_server.script = lambda answer: answer.refuse(429, "The queue is full.", Retry_After="3")
    send(page, "Hello?")
    error = page.get_by_role("alert")
    expect(error).to_contain_text("Error 429: The queue is full. Try again in 3 s.")
    page_server.script = says("Hello.")
    error.get_by_role("button", name="Try again").click()
    expect(last(page)).to_have_text("Hello.")
    expect(error).to_have_count(0)
    assert page_server.requests[0] == page_server.requests[1]


def test_an_error_in_the_stream_keeps_the_text_before_it(
    page: Any, page_server: ScriptedServer
) -> None:
    def script(answer: Answer) -> None:
        answer.say("The beginning")
        answer.event(error={"message": "out of memory <b>", "type": "server_error"})
        answer.raw(b"data: [DONE]\n\n")

    page_server.script = script
    send(page, "Hello?")
    expect(page.get_by_role("alert")).to_contain_text("Error: out of memory <b>")
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("Error: out of memory <b>")
    expect(texts(page)).to_have_text(["Hello?", "The beginning"])


def test_a_connection_that_ends_early_is_an_error(page: Any, page_server: ScriptedServer) -> None:
    page_server.script = lambda answer: answer.say("The beginning")
    send(page, "Hello?")
    expect(page.get_by_role("alert")).to_contain_text("closed before the answer was complete")
    expect(last(page)).to_have_text("The beginning")


def test_a_server_that_is_gone_is_an_error(page: Any, page_server: ScriptedServer) -> None:
    page_server.close()
    send(page, "Hello?")
    expect(page.get_by_role("alert")).to_contain_text("Error: No connection")
    expect(page.locator("#model")).to_contain_text("No connection")


def test_a_missing_key_is_asked_for_and_forgotten_with_the_tab(
    page: Any, page_server: ScriptedServer
) -> None:
    page_server.key = "sk-secret"
    page_server.script = says("Welcome.")
    send(page, "Hello?")
    error = page.get_by_role("alert")
    expect(error).to_contain_text("Error 401: Incorrect API key provided.")
    error.get_by_role("button", name="Enter the API key").click()
    key = page.get_by_role("textbox", name="API key Incorrect API key provided.")
    expect(key).to_be_focused()
    page.keyboard.type("sk-wrong")
    page.keyboard.press("Enter")
    expect(key).to_be_focused()  # asked again
    key.fill("sk-secret")
    page.keyboard.press("Enter")
    expect(page.get_by_role("dialog")).to_be_hidden()
    error.get_by_role("button", name="Try again").click()
    expect(last(page)).to_have_text("Welcome.")
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")
    page.reload()  # the same tab still knows it
    expect(page.locator("#model")).to_have_text("scripted")
    page.locator("#configure").click()
    page.get_by_label("Remember the key").check()
    assert "sk-secret" in page.evaluate("JSON.stringify(localStorage)")
    page.get_by_label("Remember the key").uncheck()
    assert "secret" not in page.evaluate("JSON.stringify(localStorage)")


# ---- what a model may write ---------------------------------------------------------------------

HOSTILE = """<script>window.hacked = 1</script>
<img src=x onerror="window.hacked = 2"> **<b onclick=hack()>bold</b>** `<i>`

[a](javascript:alert(1)) [b](data:text/html,x) [c](https://example.com/?a=1&b=<i>)
[d](https://example.com/d "title") ![image](https://example.com/x.png) <https://example.com/e>

```html"><script>
</code></pre><script>window.hacked = 3</script>
```
| <u>x</u> | y |
|---|---|
| <script>window.hacked = 4</script> | [z](vbscript:x) |
"""


def test_what_a_model_writes_stays_text(page: Any, page_server: ScriptedServer) -> None:
    def script(answer: Answer) -> None:
        answer.think(HOSTILE)
        answer.say(HOSTILE, size=3)
        answer.finish()

    page_server.script = script
    ask(page, HOSTILE, "window.hacked = 4")
    page.locator("summary").click()
    page.get_by_label("Title of the conversation").fill(HOSTILE[:80])
    page.reload()
    tags = page.evaluate("[...log.querySelectorAll('*')].map((node) => node.localName)")
    made = "article h2 div p strong code pre a table tr th td button details summary span"
    assert set(tags) <= set(made.split())
    assert page.evaluate("window.hacked") is None
    shown = last(page).inner_text()
    for line in ("<script>window.hacked = 1</script>", '<img src=x onerror="window.hacked = 2">'):
        assert line in shown
    assert "[a](javascript:alert(1)) [b](data:text/html,x)" in shown
    links = last(page).locator("a").evaluate_all("(all) => all.map((a) => [a.href, a.rel])")
    hosts = {"https://example.com/d", "https://example.com/x.png", "https://example.com/e"}
    assert {href for href, _ in links} >= hosts
    assert all(re.match("https://example.com/", href) for href, _ in links)
    assert all(rel == "noopener noreferrer" for _, rel in links)


MARKDOWN = {
    "# One\n### Three #\ntext": "<h3>One</h3><h5>Three</h5><p>text</p>",
    "a **b *c*** d_e_f _g_ ~~h~~ `i *j*`": "<p>a <strong>b <em>c</em></strong> d_e_f <em>g</em>"
    " <del>h</del> <code>i *j*</code></p>",
    "2 * 3 * 4 and 2**3**": "<p>2 * 3 * 4 and 2<strong>3</strong></p>",
    r"\*not\* **open and `open": "<p>*not* **open and `open</p>",
    "- a\n- b\n  - c\n\n    d\n- e\n\nf": "<ul><li><p>a</p></li><li><p>b</p><ul><li><p>c</p>"
    "<p>d</p></li></ul></li><li><p>e</p></li></ul><p>f</p>",
    "3. a\n4. b\n- c": '<ol start="3"><li><p>a</p></li><li><p>b</p></li></ol>'
    "<ul><li><p>c</p></li></ul>",
    "> a\n> > b\n\n---": "<blockquote><p>a</p><blockquote><p>b</p></blockquote></blockquote><hr>",
    "a | b\n:-- | --:\n1 | `2`\n": "<table><tr><th>a</th><th>b</th></tr>"
    "<tr><td>1</td><td><code>2</code></td></tr></table>",
    "```py\nx = 1\n\n  y\n```\nz": "<pre><code>x = 1\n\n  y</code></pre><p>z</p>",
    "- a\n  ~~~\n  x\n   y": "<ul><li><p>a</p><pre><code>x\n y</code></pre></li></ul>",
    "see https://a.b/c_(d), ok": '<p>see <a href="https://a.b/c_(d">https://a.b/c_(d</a>), ok</p>',
}

RENDER = """([texts]) => texts.map((text) => {
    const root = document.createElement('div');
    new Markdown(root).update(text);
    for (const node of root.querySelectorAll('.code > div')) node.remove();
    for (const node of root.querySelectorAll('.code, .table')) node.replaceWith(...node.childNodes);
    for (const node of root.querySelectorAll('*')) {
        for (const name of node.getAttributeNames()) {
            if (name !== 'href' && name !== 'start') node.removeAttribute(name);
        }
    }
    return root.innerHTML;
})"""


def test_markdown(page: Any) -> None:
    rendered = page.evaluate(RENDER, [list(MARKDOWN)])
    assert dict(zip(MARKDOWN, rendered)) == MARKDOWN


def test_markdown_that_arrives_in_pieces_equals_the_whole(page: Any) -> None:
    """Any cut of any text: seeded pseudo-random documents, each compared after every piece."""
    differing = page.evaluate(
        r"""() => {
        let state = 1;
        const random = (n) => (state = state * 48271 % 2147483647) % n;
        const words = ['a', 'b c', '\n', '\n', '\n\n', '  ', '    ', '- ', '1. ', '12', '# ', '> ',
            '```', '`', '**', '*', '_', '|', '|--', '-', '---\n', '\t', '[x](https://y.z)', '~~~py',
            'é🦙', '\\', '<b>', '~~'];
        const html = (text) => {
            const root = document.createElement('div');
            new Markdown(root).update(text);
            return root.innerHTML;
        };
        const bad = [];
        for (let document_ = 0; document_ < 400; document_++) {
            const root = document.createElement('div'), grown = new Markdown(root);
            let text = '';
            for (let piece = 0; piece < 40; piece++) {
                text += words[random(words.length)];
                grown.update(text);
                if (root.innerHTML !== html(text)) { bad.push(text); break; }
            }
        }
        return bad;
    }"""
    )
    assert differing == []


def test_no_answer_hangs_the_page(page: Any) -> None:
    """Texts that cost a careless parser quadratic time, or its stack."""
    seeds = ["**a ", "_a ", "*", "[", "[a](", "`", "``a", "> ", "- ", "|", "~~a", "__a ", "*a **b "]
    seeds += ["  " * 50 + "- x\n", "a|b\n", "# # ", "\\", "<", "https://a", "1. \n\n", "- - - a\n"]
    render = "(text) => new Markdown(document.createElement('div')).update(text).localName"
    for seed in seeds:
        assert page.evaluate(render, seed * (200_000 // len(seed)) + "end") == "div"


def test_a_code_block_can_be_copied(page: Any, page_server: ScriptedServer) -> None:
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    code = "def f(x):\n\treturn x < 1\n\n# ü"
    page_server.script = says(f"Look:\n\n```python\n{code}\n```\nDone.")
    ask(page, "Code?", "Done.")
    page.get_by_label("Copy code").click()
    expect(page.locator("#spoken")).to_contain_text("Copied")
    assert page.evaluate("navigator.clipboard.readText()") == code
    page.evaluate("delete Navigator.prototype.clipboard")  # as on plain http
    page.locator("#input").fill("")
    page.get_by_label("Copy", exact=True).last.click()
    page.locator("#input").press("Control+v")
    expect(page.locator("#input")).to_have_value(f"Look:\n\n```python\n{code}\n```\nDone.")


# ---- looks --------------------------------------------------------------------------------------


def background(page: Any) -> int:
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    return sum(map(int, re.findall(r"\d+", colour)[:3])) // 3


def test_dark_and_light(page: Any) -> None:
    page.emulate_media(color_scheme="dark")
    assert background(page) < 60
    page.emulate_media(color_scheme="light")
    assert background(page) > 200
    page.locator("#configure").click()
    page.get_by_label("Theme").select_option("dark")
    assert background(page) < 60
    page.reload()
    assert background(page) < 60


LONG = "\n\n".join(f"Paragraph {i} " + "word " * 40 for i in range(30))
WIDE = f"{'x' * 300}\n\n```\n{'y' * 300}\n```\n\n| a | b |\n|---|---|\n| {'z' * 300} | c |\n"


def test_nothing_is_wider_than_a_phone(page: Any, page_server: ScriptedServer) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    page_server.script = says(WIDE)
    ask(page, "w" * 300, "xxx")
    for selector in ("html", "#log", "#drawer"):
        assert page.locator(selector).evaluate("(node) => node.scrollWidth <= node.clientWidth")
    drawer = page.get_by_role("navigation")
    expect(drawer).to_be_hidden()
    page.get_by_role("button", name="Conversations").click()
    expect(drawer).to_be_visible()
    page.keyboard.press("Escape")
    expect(drawer).to_be_hidden()
    page.get_by_role("button", name="Conversations").click()
    page.get_by_role("link", name="New chat").click()
    expect(drawer).to_be_hidden()
    expect(page.locator("article")).to_have_count(0)


def test_the_view_follows_only_while_its_end_is_in_sight(
    page: Any, page_server: ScriptedServer
) -> None:
    gates = [threading.Event(), threading.Event()]

    def script(answer: Answer) -> None:
        answer.say(LONG, 50)
        gates[0].wait()
        answer.say(LONG, 50)
        gates[1].wait()
        answer.say("\n\nThe end.")
        answer.finish()

    page_server.script = script
    send(page, "Write")
    below = "log.scrollHeight - log.scrollTop - log.clientHeight"
    expect(last(page)).to_contain_text("Paragraph 29")
    page.wait_for_function(f"() => {below} < 8")
    page.locator("#log").hover()
    page.mouse.wheel(0, -1000)
    page.wait_for_function(f"() => {below} > 500")
    top = page.evaluate("log.scrollTop")
    gates[0].set()
    expect(last(page).locator("p")).to_have_count(59)  # the 30th and the 31st are one
    assert page.evaluate("log.scrollTop") == top
    page.get_by_label("To the end").click()
    gates[1].set()
    expect(page.locator("article.live")).to_have_count(0)
    page.wait_for_function(f"() => {below} < 8")


def test_each_paragraph_has_its_own_direction(page: Any, page_server: ScriptedServer) -> None:
    page_server.script = says("left to right\n\nשלום עולם, this is Hebrew")
    ask(page, "שלום", "Hebrew")
    starts = (
        last(page)
        .locator("p")
        .evaluate_all(
            """(all) => all.map((node) => {
        const range = document.createRange(), box = node.getBoundingClientRect();
        range.selectNodeContents(node);
        return range.getBoundingClientRect().left - box.left;
    })"""
        )
    )
    assert starts[0] == 0
    assert starts[1] > 100


def test_a_screen_reader_hears_labels_and_each_finished_block(
    page: Any, page_server: ScriptedServer
) -> None:
    def script(answer: Answer) -> None:
        answer.say("First paragraph.\n\nSecond paragraph.\n\nThird")
        page_server.gate.wait()
        answer.say(" one.")
        answer.finish()

    page_server.script = script
    send(page, "Speak")
    spoken = page.locator("#spoken p")
    expect(last(page)).to_contain_text("Third")
    assert "Third" not in spoken.all_inner_texts()
    page_server.gate.set()
    expect(spoken).to_have_text(["First paragraph.", "Second paragraph.", "Third one."])
    page.wait_for_timeout(100)  # a late repaint must not say it again
    expect(spoken).to_have_count(3)
    assert page.locator("#spoken").get_attribute("aria-live") == "polite"
    page.locator("#configure").click()
    for role in ("button", "textbox", "link", "spinbutton", "combobox", "checkbox"):
        for node in page.get_by_role(role).all():
            expect(node).to_have_accessible_name(re.compile(r"\S"))


def test_the_focus_ring_is_visible(page: Any) -> None:
    page.keyboard.press("Tab")
    outline = "getComputedStyle(document.activeElement).outline"
    assert page.evaluate(outline).endswith("solid 2px")


def test_the_policy_refuses_what_is_not_the_page(context: Any, page_server: ScriptedServer) -> None:
    page = context.new_page()
    page.goto(page_server.url)
    page.evaluate(
        """() => {
        window.refused = [];
        onsecuritypolicyviolation = (event) => refused.push(event.effectiveDirective);
        const image = new Image();
        image.src = 'https://example.com/x.png';
        log.append(image);
        for (const hack of [
            () => log.setAttribute('onclick', 'window.hacked = 1'),
            () => log.append(document.createRange().createContextualFragment('<b>')),
        ]) {
            try { hack(); } catch { refused.push('thrown'); }
        }
        log.click();
    }"""
    )
    page.wait_for_function("() => refused.includes('img-src')")
    assert page.evaluate("window.hacked") is None
    assert page.evaluate("refused").count("thrown") == 2


# ---- the real server -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(smollm2: Path) -> Iterator[Live]:
    with serving(lambda: nanollama.LLM(smollm2, parallel=2), model_id="smollm2") as live:
        yield live


def test_a_chat_with_smollm2(context: Any, live: Live) -> None:
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("console", lambda message: message.type == "error" and faults.append(message.text))
    page.goto(live.url)
    expect(page.locator("#model")).to_have_text("smollm2")
    page.locator("#configure").click()
    page.get_by_label("Temperature").fill("0")
    page.get_by_label("Max tokens").fill("6")
    page.get_by_role("button", name="Done").click()
    send(page, "Name the capital of France.")
    note = page.locator(".assistant .actions")
    expect(note).to_contain_text(
        re.compile(r"\d tokens/s · 6 tokens · prompt \d+.* · cut off at the token limit"),
        timeout=60_000,
    )
    expect(last(page)).to_contain_text("Paris")
    expect(page.locator("#used")).to_have_text(re.compile(r"[1-9]\d+ of \d,\d{3} tokens"))
    expect(page.get_by_role("status")).to_have_text("smollm2")
    answer = last(page).inner_text()
    page.get_by_role("button", name="Regenerate").click()
    expect(note).to_contain_text("cached")
    expect(texts(page)).to_have_text(["Name the capital of France.", answer])
    assert faults == []


def test_stop_frees_the_slot(context: Any, live: Live) -> None:
    page = context.new_page()
    page.goto(live.url)
    send(page, "Write a very long story about the sea.")
    expect(last(page)).to_contain_text(" ", timeout=60_000)
    page.keyboard.press("Escape")
    wait_until(live.is_idle)
    expect(page.locator(".assistant .actions")).to_contain_text("stopped")


def test_one_of_several_models_is_chosen_for_good(page: Any, page_server: ScriptedServer) -> None:
    page_server.script = says("Yes.")
    expect(page.get_by_label("Model", exact=True)).to_be_hidden()
    page_server.models = ["first", "second"]
    page.reload()
    expect(page.get_by_label("Model", exact=True)).to_be_visible()  # the list has come
    ask(page, "One?", "Yes.")
    page.get_by_label("Model", exact=True).select_option("second")
    ask(page, "Two?", "Yes.")
    page.reload()
    expect(page.get_by_label("Model", exact=True)).to_have_value("second")
    ask(page, "Three?", "Yes.")
    page_server.models = ["first"]
    page.reload()
    expect(page.locator("#model")).to_have_text("first")
    ask(page, "Four?", "Yes.")
    assert [r["model"] for r in page_server.requests] == ["first", "second", "second", "first"]


def test_the_real_servers_errors_are_shown(context: Any, tiny: Callable[..., Path]) -> None:
    with serving(lambda: nanollama.LLM(tiny()), api_keys=("sk-one",)) as live:
        page = context.new_page()
        page.goto(live.url)
        key = page.get_by_role("textbox", name=re.compile("API key"))
        expect(key).to_be_focused()
        key.fill("sk-one")
        page.keyboard.press("Enter")
        expect(page.locator("#model")).to_have_text("model")
        send(page, "word " * 500)
        error = page.get_by_role("alert")
        expect(error).to_contain_text(re.compile(r"Error 400: .*256"))  # the context has 256 tokens


# ---- tools --------------------------------------------------------------------------------------


def test_a_tool_is_run_when_the_user_agrees(context: Any, tmp_path: Path) -> None:
    """One call is run and one refused; a reload keeps the question for a third."""
    pytest.importorskip("mcp")
    file = tmp_path / "mcp.json"
    file.write_text(json.dumps({"mcpServers": {"plain": ENTRY}}), encoding="utf-8")
    calls = [
        {"tool_calls": [{"name": "weather", "arguments": {"city": name}} for name in names]}
        for names in (["Oslo", "Bern"], ["Rome"])
    ]
    script = testing.Script([*calls, "Snow, of course."])
    config = nanollama.ServerConfig(any_model=True, mcp=str(file))
    requests: deque[Any] = deque()
    models = testing.scripted_models(lambda: testing.ScriptLLM(script), "model", config, requests)
    page = context.new_page()
    faults: list[str] = []
    page.on("pageerror", lambda error: faults.append(str(error)))
    with serving(models=models) as live:
        page.goto(live.url)
        expect(page.locator("#model")).to_have_text("model")
        send(page, "Weather?")
        asked = page.get_by_role("group", name="Call of weather")
        expect(asked).to_have_count(2)
        expect(asked.first).to_contain_text('weather({"city": "Oslo"}) on plain')
        asked.nth(1).get_by_role("button", name="Refuse").click()
        expect(asked).to_have_count(1)
        asked.get_by_role("button", name="Run").click()
        expect(asked).to_contain_text("Rome")  # the model went on
        page.reload()
        asked.get_by_role("button", name="Run").click()
        expect(last(page)).to_have_text("Snow, of course.")
        expect(asked).to_have_count(0)
        page.locator("details.call").first.click()
        expect(page.locator("details.call pre").first).to_have_text("snow in Oslo")
        open_servers(str(file)).close()
    sent = [request["body"]["messages"] for request in requests if "messages" in request["body"]]
    results = [message["content"] for message in sent[-1] if message["role"] == "tool"]
    assert results == ["snow in Oslo", "The user did not allow this call.", "snow in Rome"]
    assert [call["function"]["name"] for call in sent[-1][1]["tool_calls"]] == ["weather"] * 2
    assert requests[0]["body"]["tools"][0]["function"]["name"] == "weather"
    assert faults == []
