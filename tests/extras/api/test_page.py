"""The chat page in a real browser: questions and answers, errors, the real server, tools."""

# ruff: noqa: F811 (parameters are fixtures)
from __future__ import annotations

import json
import re
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from browsing import (  # noqa: F401 (fixtures)
    MARKS,
    Answer,
    ScriptedServer,
    ask,
    browser,
    context,
    expect,
    last,
    page,
    page_server,
    says,
    send,
    talks_on,
    texts,
)
from mcp_server import ENTRY
from serving import Live, serving, wait_until

import nanollama
from nanollama_extras import testing
from nanollama_extras.answers.mcp_tools import open_servers

pytestmark = MARKS


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
    page.get_by_label("System prompt", exact=True).fill("Be brief.")
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


def test_regenerate_asks_the_same_again(page: Any, page_server: ScriptedServer) -> None:
    page_server.script = says("A.")
    ask(page, "One?", "A.")
    ask(page, "Two?", "A.")
    page_server.script = says("B.")
    page.get_by_role("button", name="Regenerate").last.click()
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
    thoughts = page.locator("details.thoughts")
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


# ---- errors ------------------------------------------------------------------------------------


def test_an_error_is_shown_as_what_it_is_and_can_be_retried(
    page: Any, page_server: ScriptedServer
) -> None:
    page_server.script = lambda answer: answer.refuse(429, "The queue is full.", Retry_After="3")
    send(page, "Hello?")
    error = page.get_by_role("alert")
    expect(error).to_contain_text(
        "The server is busy. Error 429: The queue is full. Try again in 3 s."
    )
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
    expect(page.get_by_role("alert")).to_contain_text("Something went wrong. out of memory <b>")
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("Something went wrong. out of memory <b>")
    expect(texts(page)).to_have_text(["Hello?", "The beginning"])


def test_a_connection_that_ends_early_is_an_error(page: Any, page_server: ScriptedServer) -> None:
    page_server.script = lambda answer: answer.say("The beginning")
    send(page, "Hello?")
    expect(page.get_by_role("alert")).to_contain_text("closed before the answer was complete")
    expect(last(page)).to_have_text("The beginning")


def test_a_server_that_is_gone_is_an_error(page: Any, page_server: ScriptedServer) -> None:
    page_server.close()
    send(page, "Hello?")
    expect(page.get_by_role("alert")).to_contain_text("No connection: the server has stopped")
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


# ---- tools ---------------------------------------------------------------------------------------


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
