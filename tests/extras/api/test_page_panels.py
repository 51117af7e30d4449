"""What stands beside a conversation on the chat page: settings, files, the prompt, models, keys."""

# ruff: noqa: F811 (parameters are fixtures)
from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

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
    texts,
)
from serving import serving

import nanollama

pytestmark = MARKS


def reply(answer: Answer, body: Any) -> None:
    answer.server.reply(answer.handler, 200, json.dumps(body).encode())


# ---- settings -----------------------------------------------------------------------------------


def test_settings_belong_to_a_conversation_and_start_new_ones_on_demand(
    page: Any, page_server: ScriptedServer
) -> None:
    page_server.script = says("A.")
    page_server.about = {"sampling": {"temperature": 0.7, "top_k": 50, "repeat_penalty": 1.0}}
    page.reload()
    expect(page.locator("#model")).to_have_text("scripted")
    page.locator("#configure").click()
    expect(page.get_by_label("Temperature")).to_have_attribute("placeholder", "0.7")
    expect(page.get_by_label("Top-k")).to_have_attribute("placeholder", "50")
    expect(page.get_by_label("Max tokens")).to_have_attribute("placeholder", "no limit")
    page.get_by_label("Temperature").fill("0.1")
    page.get_by_text("More", exact=True).click()
    expect(page.get_by_label("Repeat penalty")).to_have_attribute("placeholder", "1")
    page.get_by_label("Stop before").fill("END\n\\n\\n")
    page.get_by_label("Logit bias").fill("12 -100\n15: 2.5")
    page.locator("[name=reasoning_effort]").select_option("none")
    page.get_by_label("Go on past the end").check()
    page.keyboard.press("Escape")
    ask(page, "One?", "A.")
    page.get_by_role("link", name="New chat").click()
    ask(page, "Two?", "A.")
    own = {
        "temperature": 0.1,
        "stop": ["END", "\n\n"],
        "logit_bias": {"12": -100, "15": 2.5},
        "reasoning_effort": "none",
        "ignore_eos": True,
    }
    extra = page_server.requests[0].keys() - page_server.requests[1].keys()
    assert {name: page_server.requests[0][name] for name in extra} == own
    page.get_by_role("link", name="One?").click()
    page.locator("#configure").click()
    page.get_by_role("button", name="Use for new chats").click()
    page.keyboard.press("Escape")
    page.reload()
    page.get_by_role("link", name="New chat").click()
    ask(page, "Three?", "A.")
    assert {name: page_server.requests[2][name] for name in extra} == own


def test_presets_of_the_system_prompt(page: Any, page_server: ScriptedServer) -> None:
    page_server.script = says("A.")
    page.locator("#configure").click()
    presets = page.get_by_label("Presets of the system prompt")
    presets.select_option("Concise")
    expect(page.get_by_label("System prompt", exact=True)).to_have_value(re.compile("few words"))
    page.get_by_label("System prompt", exact=True).fill("Talk like a llama.")
    expect(presets).to_have_value("")
    page.get_by_role("button", name="Save as preset").click()
    expect(presets).to_have_value("Talk like a llama.")
    page.keyboard.press("Escape")
    ask(page, "One?", "A.")
    page.reload()
    page.get_by_role("link", name="New chat").click()
    page.locator("#configure").click()
    expect(page.get_by_label("System prompt", exact=True)).to_have_value("")
    presets.select_option("Talk like a llama.")
    page.keyboard.press("Escape")
    ask(page, "Two?", "A.")
    for request in page_server.requests:
        assert request["messages"][0] == {"role": "system", "content": "Talk like a llama."}
    page.locator("#configure").click()
    page.get_by_role("button", name="Delete preset").click()
    expect(presets.get_by_role("option", name="Talk like a llama.")).to_have_count(0)


# ---- a cut answer -------------------------------------------------------------------------------


def test_a_cut_answer_goes_on(page: Any, page_server: ScriptedServer) -> None:
    def cut(answer: Answer) -> None:
        answer.say("The first half")
        answer.finish("length")

    page_server.script = cut
    ask(page, "Tell me", "The first half")
    expect(page.locator(".note")).to_contain_text("cut off at the token limit")
    page_server.script = says(" and the second.")
    page.get_by_role("button", name="Continue").click()
    expect(last(page)).to_have_text("The first half and the second.")
    expect(page.get_by_role("button", name="Continue")).to_be_hidden()
    request = page_server.requests[1]
    assert request["messages"][-1] == {"role": "assistant", "content": "The first half"}
    assert request["continue_final_message"] is True
    assert request["add_generation_prompt"] is False
    page.reload()
    expect(texts(page)).to_have_text(["Tell me", "The first half and the second."])


def test_an_answer_that_was_cut_inside_its_thought_goes_on(
    page: Any, page_server: ScriptedServer
) -> None:
    def cut(answer: Answer) -> None:
        answer.think("The cat")
        answer.finish("length")

    def rest(answer: Answer) -> None:
        answer.think(" sat.")
        answer.say("Yes.")
        answer.finish()

    page_server.script = cut
    send(page, "Did it sit?")
    more = page.get_by_role("button", name="Continue")
    expect(more).to_be_visible()
    page_server.script = rest
    more.click()
    expect(last(page)).to_have_text("Yes.")
    expect(page.locator(".thoughts .md")).to_have_text("The cat sat.")
    final = {"role": "assistant", "content": "", "reasoning_content": "The cat"}
    assert page_server.requests[1]["messages"][-1] == final


# ---- other servers ------------------------------------------------------------------------------


def test_the_page_uses_another_server_with_a_key_of_its_own(
    context: Any, page_server: ScriptedServer, tiny: Callable[..., Path]
) -> None:
    page = context.new_page()
    page_server.script, page_server.key = says("From afar."), "other-key"
    with serving(lambda: nanollama.LLM(tiny()), page_servers=(f"{page_server.url}/v1",)) as live:
        page.goto(live.url)
        expect(page.locator("#model")).to_have_text("model")
        page.locator("#configure").click()
        page.locator("[name=server]").select_option(page_server.url)
        expect(page.locator("#refused")).to_have_text("Incorrect API key provided.")
        page.get_by_label("API key").fill("other-key")
        page.keyboard.press("Escape")
        expect(page.locator("#model")).to_have_text("scripted")
        ask(page, "Who?", "From afar.")
        page.reload()
        expect(page.locator("#model")).to_have_text("scripted")
        page.locator("#configure").click()
        page.locator("[name=server]").select_option("")
        expect(page.get_by_label("API key")).to_have_value("")
        expect(page.locator("#model")).to_have_text("model")


def test_without_other_servers_the_page_has_no_choice(page: Any) -> None:
    page.locator("#configure").click()
    expect(page.locator("[name=server]")).to_be_hidden()


# ---- files --------------------------------------------------------------------------------------


def pick(page: Any, name: str, data: bytes) -> None:
    file = {"name": name, "mimeType": "text/plain", "buffer": data}
    page.locator("#picked").set_input_files(file)


def test_a_file_is_counted_and_sent_with_the_message(
    page: Any, page_server: ScriptedServer
) -> None:
    counted: list[Any] = []
    page_server.routes["/tokenize"] = lambda body, answer: (
        counted.append(body["content"]),
        reply(answer, {"count": 1234}),
    )
    page_server.script = says("A note.")
    pick(page, "notes.md", b"# Notes\n\n```\ncode\n```\n")
    expect(page.locator("#files li")).to_contain_text("1,234 tokens")
    pick(page, "two.txt", b"two")
    page.get_by_label("Remove two.txt").click()
    pick(page, "image.png", b"\x89PNG\0\0")
    expect(page.locator("#toast")).to_have_text("image.png is not a text file.")
    ask(page, "What is this?", "A note.")
    expect(page.locator("#files")).to_be_hidden()
    (message,) = page_server.requests[0]["messages"]
    assert message["content"] == (
        "notes.md:\n````\n# Notes\n\n```\ncode\n```\n\n````\n\nWhat is this?"
    )
    assert counted[0] == message["content"].removesuffix("\n\nWhat is this?")
    page.reload()
    expect(page.locator(".file summary")).to_have_text("notes.md · 1,234 tokens")
    page.locator(".file summary").click()
    expect(page.locator(".file pre")).to_contain_text("# Notes")


def test_another_server_counts_roughly_and_too_much_is_said(
    page: Any, page_server: ScriptedServer
) -> None:
    pick(page, "short.txt", b"word " * 80)
    expect(page.locator("#files li")).to_contain_text("≈ 105 tokens")
    expect(page.locator("#files .over")).to_have_count(0)
    pick(page, "long.txt", b"word " * 2000)
    expect(page.locator("#files .over")).to_have_text(
        "Too long: the context has room for 2,048 tokens."
    )


# ---- the prompt ---------------------------------------------------------------------------------


def test_the_prompt_and_its_tokens_are_one_click_away(
    page: Any, page_server: ScriptedServer
) -> None:
    asked: list[Any] = []

    def tokenize(body: Any, answer: Answer) -> None:
        asked.append(body)
        tokens = [{"id": 1, "piece": "<|im_start|>"}, {"id": 198, "piece": "user\n"}]
        reply(answer, {"count": 2, "tokens": tokens})

    page_server.routes["/tokenize"] = tokenize
    page_server.script = says("A.")
    ask(page, "One?", "A.")
    page.get_by_label("Show its prompt").click()
    expect(page.locator("#prompt-text span")).to_have_text(["<|im_start|>", "user⏎\n"])
    expect(page.locator("#prompt-about")).to_contain_text("2 tokens · scripted")
    page.get_by_label("Token ids").check()
    expect(page.locator("#prompt-text")).to_have_class("ids")
    page.keyboard.press("Escape")
    page.locator("#input").fill("Two?")
    page.keyboard.press("Control+Shift+P")
    expect(page.locator("#prompt-about")).to_contain_text("2 tokens")
    assert asked[0] == {**page_server.requests[0], "with_pieces": True}
    assert [m["content"] for m in asked[1]["messages"]] == ["One?", "A.", "Two?"]


def test_the_request_is_shown_where_a_server_has_no_tokens_to_show(
    page: Any, page_server: ScriptedServer
) -> None:
    page.locator("#input").fill("Two?")
    page.get_by_role("button", name="The prompt and its tokens").click()
    expect(page.locator("#prompt-text")).to_contain_text('"content": "Two?"')


# ---- models -------------------------------------------------------------------------------------


def test_the_first_run_offers_a_model_and_shows_the_download(
    page: Any, page_server: ScriptedServer
) -> None:
    def pull(body: Any, answer: Answer) -> None:
        assert body == {"model": "smollm2", "stream": True}
        answer.raw(b'{"status": "pulling manifest"}\n')
        line = {"status": "pulling a", "digest": "a", "total": 145e6, "completed": 36.25e6}
        answer.raw(json.dumps(line).encode()[:20])
        answer.raw(json.dumps(line).encode()[20:] + b"\n")
        answer.server.gate.wait()
        answer.server.models = ["smollm2"]
        answer.raw(b'{"status": "success"}\n')

    page_server.routes["/api/pull"] = pull
    page_server.models = []
    page.reload()
    page.get_by_role("button", name="Download smollm2").click()
    bar = page.get_by_role("progressbar", name="Download of smollm2")
    expect(bar).to_have_js_property("value", 36.25e6)
    expect(page.locator(".download")).to_contain_text("36 MB of 145 MB · 25 %")
    page_server.gate.set()
    expect(page.locator("#model")).to_have_text("smollm2")
    expect(page.locator(".welcome")).to_contain_text("What is on your mind?")
    page_server.script = says("Hello.")
    ask(page, "Hi", "Hello.")


def test_a_download_may_fail_and_be_cancelled(page: Any, page_server: ScriptedServer) -> None:
    page_server.models = []
    page_server.routes["/api/pull"] = lambda body, answer: answer.raw(
        json.dumps({"error": f"{body['model']}: no such model on the hub"}).encode() + b"\n"
    )
    page.reload()
    page.get_by_label("Another model to download").fill("no/such")
    page.keyboard.press("Enter")
    expect(page.get_by_role("alert")).to_contain_text("no/such was not downloaded: no/such: no")

    def endless(body: Any, answer: Answer) -> None:
        answer.raw(b'{"status": "pulling manifest"}\n')
        while True:
            answer.server.gate.wait(0.01)
            answer.raw(b"\n")

    page_server.routes["/api/pull"] = endless
    page.get_by_role("button", name="Download smollm2").click()
    page.get_by_role("button", name="Cancel").click()
    expect(page.get_by_role("button", name="Download smollm2")).to_be_visible()


def test_the_models_on_the_machine_are_listed_and_chosen(
    page: Any, page_server: ScriptedServer
) -> None:
    page_server.models = ["first", "second"]
    page_server.about = {"meta": {"n_params": 134_515_008, "size": 144_810_464}}
    page.reload()
    page.get_by_role("button", name="Models").click()
    entry = page.get_by_role("button", name="second")
    expect(entry).to_contain_text("135 M parameters · 145 MB · loaded")
    entry.click()
    expect(page.get_by_label("Model", exact=True)).to_have_value("second")


def test_loading_is_shown(page: Any, page_server: ScriptedServer) -> None:
    page_server.about = {"state": "loading", "meta": {"size": 144_810_464}}
    page.reload()
    expect(page.locator("#model")).to_contain_text("scripted · loading… · 145 MB")
    bar = page.get_by_role("progressbar", name="The model is loading")
    expect(bar).to_have_js_property("position", -1)  # nobody knows how long it takes
    page_server.about = {}
    expect(page.locator("#model")).to_have_text("scripted")
    expect(bar).to_be_hidden()
    page_server.about = {"state": "loading"}
    page.reload()
    expect(bar).to_be_visible()  # and now it is known
    assert bar.evaluate("(bar) => bar.position") >= 0


def test_the_real_server_counts_shows_its_values_and_continues(
    context: Any, tiny: Callable[..., Path]
) -> None:
    page = context.new_page()
    with serving(lambda: nanollama.LLM(tiny())) as live:
        page.goto(live.url)
        expect(page.locator("#model")).to_have_text("model")
        page.locator("#configure").click()
        expect(page.get_by_label("Temperature")).to_have_attribute("placeholder", "0.7")
        page.get_by_label("Max tokens").fill("2")
        page.get_by_label("Temperature").fill("0")
        page.keyboard.press("Escape")
        pick(page, "a.txt", b"some words")
        expect(page.locator("#files li")).to_contain_text(re.compile(r"a\.txt\d+ tokens"))
        send(page, "hello")
        expect(page.locator(".note")).to_contain_text("cut off at the token limit")
        page.get_by_label("Show its prompt").click()
        num_prompt = re.search(r"prompt (\d+)", page.locator(".note").inner_text())
        assert num_prompt
        expect(page.locator("#prompt-text span")).to_have_count(int(num_prompt[1]))
        page.keyboard.press("Escape")
        before = last(page).inner_text()
        page.get_by_role("button", name="Continue").click()
        expect(page.get_by_role("button", name="Continue")).to_be_visible()
        expect(page.get_by_role("alert")).to_have_count(0)
        assert last(page).inner_text().startswith(before.strip()[:3])


# ---- keys ---------------------------------------------------------------------------------------


def test_keys_and_their_sheet(page: Any, page_server: ScriptedServer) -> None:
    page_server.script = says("A.")
    ask(page, "One?", "A.")
    page.locator("#input").fill("?")  # a question mark is text here
    expect(page.locator("#help")).to_be_hidden()
    page.keyboard.press("Control+/")
    expect(page.get_by_role("dialog", name="Shortcuts")).to_contain_text("Search the conversations")
    page.keyboard.press("Escape")
    page.locator("#log").focus()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Shortcuts")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("/")
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.press("Control+,")
    expect(page.get_by_role("dialog", name="Settings")).to_be_visible()
    page.keyboard.press("Escape")
    page.keyboard.press("Control+Shift+O")
    expect(page.locator("article")).to_have_count(0)


def test_a_menu_is_walked_by_arrows_and_gives_the_focus_back(
    page: Any, page_server: ScriptedServer
) -> None:
    page_server.script = says("A.")
    ask(page, "One?", "A.")
    page.get_by_label("This conversation").focus()
    page.keyboard.press("Enter")
    expect(page.get_by_role("menuitem", name="Rename")).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_role("menuitem", name="Delete")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_label("This conversation")).to_be_focused()
