"""The conversations of the chat page: kept, found, renamed, branched, deleted, exported."""

# ruff: noqa: F811 (parameters are fixtures)
from __future__ import annotations

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
    texts,
)

pytestmark = MARKS


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
    page.get_by_label("Options for Renamed").click()
    page.get_by_role("menuitem", name="Delete").click()
    expect(page.locator("article")).to_have_count(0)
    expect(links).to_have_text(["Second question"])
    page.get_by_role("button", name="Undo").click()
    expect(texts(page)).to_have_text(["First question", "A bold answer."])
    page.get_by_label("This conversation").click()
    page.get_by_role("menuitem", name="Delete").click()
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


# ---- branches -----------------------------------------------------------------------------------


def test_edit_and_regenerate_keep_the_earlier_versions(
    page: Any, page_server: ScriptedServer
) -> None:
    page_server.script = says("A.")
    ask(page, "One?", "A.")
    ask(page, "Two?", "A.")
    page_server.script = says("B.")
    page.get_by_role("button", name="Regenerate").last.click()
    expect(texts(page)).to_have_text(["One?", "A.", "Two?", "B."])
    expect(page.locator(".versions:visible")).to_have_text("2 / 2")
    page.locator(".user").first.hover()
    page.get_by_role("button", name="Edit").first.click()
    page.get_by_label("Edit the message").fill("Eins?")
    page_server.script = says("C.")
    page.get_by_label("Edit the message").press("Enter")
    expect(texts(page)).to_have_text(["Eins?", "C."])
    assert [m["content"] for m in page_server.requests[-1]["messages"]] == ["Eins?"]

    page.reload()
    expect(texts(page)).to_have_text(["Eins?", "C."])
    page.get_by_label("Earlier version").first.click()
    expect(texts(page)).to_have_text(["One?", "A.", "Two?", "B."])
    expect(page.get_by_label("Later version").first).to_be_focused()
    page.get_by_label("Earlier version").last.click()
    expect(texts(page)).to_have_text(["One?", "A.", "Two?", "A."])
    ask(page, "Three?", "C.")
    said = [m["content"] for m in page_server.requests[-1]["messages"]]
    assert said == ["One?", "A.", "Two?", "A.", "Three?"]
    page.get_by_label("Later version").last.click()
    expect(texts(page)).to_have_text(["One?", "A.", "Two?", "B."])


def test_a_failed_answer_leaves_no_version(page: Any, page_server: ScriptedServer) -> None:
    page_server.script = lambda answer: answer.refuse(500, "out of memory")
    send(page, "One?")
    again = page.get_by_role("button", name="Try again")
    expect(again).to_be_visible()
    page_server.script = says("A.")
    again.click()
    expect(texts(page)).to_have_text(["One?", "A."])
    expect(page.locator(".versions:visible")).to_have_count(0)


OLD = {
    "id": "old",
    "title": "An old one",
    "updated": 1_700_000_000_000,
    "messages": [
        {"role": "user", "content": "One?"},
        {"role": "assistant", "content": "A.", "reasoning": "", "finish": "stop", "used": 7},
        {"role": "user", "content": "Two?"},
        {"role": "assistant", "content": "B.", "reasoning": "", "finish": "length"},
    ],
}


def put(page: Any, chat: dict[str, Any]) -> None:
    page.evaluate(
        "(chat) => localStorage.setItem(`nanollama.chat.${chat.id}`, JSON.stringify(chat))", chat
    )


def test_a_conversation_of_an_earlier_page_opens(page: Any, page_server: ScriptedServer) -> None:
    put(page, OLD)
    page.evaluate("localStorage.setItem('nanollama.settings', '{\"seed\": \"7\"}')")
    page.reload()
    page.get_by_role("link", name="An old one").click()
    expect(texts(page)).to_have_text(["One?", "A.", "Two?", "B."])
    page_server.script = says("C.")
    ask(page, "Three?", "C.")
    assert [m["content"] for m in page_server.requests[0]["messages"]][-1] == "Three?"
    assert page_server.requests[0]["seed"] == 7
    page.get_by_label("Regenerate").nth(1).click()
    expect(texts(page)).to_have_text(["One?", "A.", "Two?", "C."])


def test_no_stored_tree_hangs_the_page(page: Any, page_server: ScriptedServer) -> None:
    """A message must not be its own ancestor."""
    for parent in (0, 5, 0.5, "x", -2):
        message = {"role": "user", "content": "loop", "parent": parent}
        put(page, {"id": f"bad{parent}", "title": "bad", "messages": [message]})
    put(page, OLD)
    page.reload()
    expect(page.locator("#chats a")).to_have_text(["An old one", "bad"])  # -2: the root, too


def test_conversations_without_a_date_stand_last(page: Any, page_server: ScriptedServer) -> None:
    for number in range(8):
        dated = {"title": str(number), "updated": 1000 * number} if number % 2 else {"title": "0"}
        put(page, {"id": f"id{number}", "messages": [], **dated})
    page.reload()
    expect(page.locator("#chats a")).to_have_text([*"7531", *"0000"])


# ---- the list -----------------------------------------------------------------------------------


def menu(page: Any, title: str, entry: str) -> None:
    page.get_by_label(f"Options for {title}").click()
    page.get_by_role("menuitem", name=entry, exact=True).click()


def test_conversations_are_found_by_title_and_text(page: Any, page_server: ScriptedServer) -> None:
    for question, answer in (("Apples?", "They are red."), ("Pears?", "They are green.")):
        page.get_by_role("link", name="New chat").click()
        page_server.script = says(answer)
        ask(page, question, answer)
    links = page.locator("#chats a")
    page.keyboard.press("Control+k")
    expect(page.get_by_label("Search the conversations")).to_be_focused()
    page.keyboard.type("APPLE")
    expect(links).to_have_text(["Apples?"])
    page.get_by_label("Search the conversations").fill("green")
    expect(links).to_have_text(["Pears?They are green."])
    page.get_by_label("Search the conversations").fill("plums")
    expect(page.locator("#chats")).to_have_text("Nothing found.")
    page.get_by_label("Search the conversations").fill("red")
    page.keyboard.press("Enter")
    expect(texts(page)).to_have_text(["Apples?", "They are red."])


def test_pin_rename_and_whole_titles(page: Any, page_server: ScriptedServer) -> None:
    page_server.script = says("A.")
    long = "Why does a very long question of many words stay whole in the list of conversations?"
    ask(page, long, "A.")
    page.get_by_role("link", name="New chat").click()
    ask(page, "Short", "A.")
    links = page.locator("#chats a")
    expect(links).to_have_text(["Short", long])
    assert links.nth(1).evaluate("(node) => node.scrollWidth <= node.clientWidth")
    menu(page, long, "Pin")
    expect(links).to_have_text([long, "Short"])
    expect(page.locator("#chats h2")).to_have_text(["Pinned", "Today"])
    menu(page, "Short", "Rename")
    page.get_by_label("New title").fill("Brief")
    page.get_by_label("New title").press("Enter")
    expect(links).to_have_text([long, "Brief"])
    menu(page, "Brief", "Rename")
    page.get_by_label("New title").fill("Nothing")
    page.get_by_label("New title").press("Escape")
    page.reload()
    expect(links).to_have_text([long, "Brief"])
    expect(page.get_by_label("Title of the conversation")).to_have_value("Brief")
    menu(page, long, "Unpin")
    expect(links).to_have_text(["Brief", long])


# ---- export and import --------------------------------------------------------------------------


def download(page: Any, press: Any) -> tuple[str, str]:
    with page.expect_download() as found:
        press()
    return found.value.suggested_filename, found.value.path().read_text(encoding="utf-8")


def upload(page: Any, name: str, text: str) -> None:
    page.locator("#imported").set_input_files(
        {"name": name, "mimeType": "text/plain", "buffer": text.encode()}
    )


def test_a_conversation_survives_export_and_import(page: Any, page_server: ScriptedServer) -> None:
    page_server.script = says("A **bold** answer.\n\n# You\n\n```\n## Answer\n```")
    ask(page, "A question\n\nof two paragraphs", "bold")
    page_server.script = says("Another.")
    page.get_by_role("button", name="Regenerate").click()
    expect(last(page)).to_have_text("Another.")
    shown = [text.strip() for text in texts(page).all_inner_texts()]
    name, markdown = download(page, lambda: menu(page, "A question", "Export as Markdown"))
    assert name == "A-question.md"
    assert markdown.startswith("# A question\n")
    assert "A question\n\nof two paragraphs" in markdown
    _, one = download(page, lambda: menu(page, "A question", "Export as JSON"))
    name, everything = download(page, lambda: page.get_by_text("Export all").click())
    assert name == "nanollama-chats.json"
    menu(page, "A question", "Delete")
    for file, text in (("a.md", markdown), ("b.json", one), ("c.json", everything)):
        upload(page, file, text)
        expect(page.locator("#toast")).to_contain_text("Imported 1 conversation.")
        expect(page.locator("#chats a")).to_have_text(["A question"])
        assert [text.strip() for text in texts(page).all_inner_texts()] == shown
        versions = page.locator(".versions:visible")
        expect(versions).to_have_count(0 if file == "a.md" else 1)
        menu(page, "A question", "Delete")
    upload(page, "d.json", '{"messages": [{"role": 1}]}')
    expect(page.locator("#toast")).to_contain_text("d.json was not imported: it holds no")
    expect(page.locator("#chats a")).to_have_count(0)
