"""Looks, sizes, scrolling and accessibility of the chat page."""

# ruff: noqa: F811 (parameters are fixtures)
from __future__ import annotations

import re
import threading
from typing import Any

import npm
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
)

pytestmark = MARKS


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


# ---- accessibility ------------------------------------------------------------------------------

RICH = """# Title\n\n| a | b |\n|---|--:|\n| 1 | `2` |\n\n- [x] done\n- [ ] to do\n
$x^2$ and [a link](https://example.com) and ![a cat](https://example.com/cat.png)\n
```python\ndef f(x):  # a comment\n    return "s" + 1\n```\n\n> quoted\n"""


def violations(page: Any) -> list[str]:
    """What axe-core finds on the page: rules and nodes."""
    found = page.evaluate("axe.run().then(({violations}) => violations)")
    serious = [v for v in found if v["impact"] in ("serious", "critical", "moderate")]
    return [f"{v['id']}: {node['html'][:120]}" for v in serious for node in v["nodes"]]


@pytest.mark.node
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_axe_finds_nothing(
    browser: Any, page_server: ScriptedServer, scheme: str, width: int
) -> None:
    """On each view of the page; https://github.com/dequelabs/axe-core"""
    axe = npm.installed("axe-core@4.14.1") / "node_modules/axe-core/axe.min.js"
    size = {"width": width, "height": 800}
    context = browser.new_context(color_scheme=scheme, viewport=size, bypass_csp=True)
    page = context.new_page()
    page.add_init_script(path=axe)
    page.goto(page_server.url)
    expect(page.locator("#model")).to_have_text("scripted")
    assert violations(page) == []
    page_server.script = lambda answer: (answer.think("Hm."), says(RICH)(answer))
    ask(page, "A question", "quoted")
    expect(page.locator("math")).to_have_count(1)
    page.locator("summary").first.click()
    page.get_by_role("button", name="Regenerate").click()
    expect(page.locator("article.live")).to_have_count(0)
    assert violations(page) == []
    page_server.script = lambda answer: answer.refuse(401, "Incorrect API key provided.")
    send(page, "Another")
    expect(page.get_by_role("alert")).to_be_visible()
    assert violations(page) == []
    for opener, dialog in (
        ("#configure", "#settings"),
        ("#inspect", "#prompt"),
        ("#more", "#menu"),
    ):
        page.locator(opener).click()
        expect(page.locator(dialog)).to_be_visible()
        assert violations(page) == [], dialog
        page.keyboard.press("Escape")
    page.evaluate("$('help').showModal()")
    assert violations(page) == []
    page.evaluate("$('help').close(), $('models').click()")
    assert violations(page) == []
    context.close()


def test_at_200_percent_everything_is_in_reach(page: Any, page_server: ScriptedServer) -> None:
    """A window of 1280 x 720 has 640 x 360 CSS pixels then."""
    page.set_viewport_size({"width": 640, "height": 360})
    page_server.script = says(RICH)
    ask(page, "A question", "quoted")
    assert page.evaluate("document.documentElement.scrollWidth") <= 640
    assert page.locator("#log").evaluate("(log) => log.clientHeight") > 120
    for selector in ("#input", "#send", "#attach", "#inspect", "#configure", "#more"):
        box = page.locator(selector).bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 640
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= 360
    page.locator("#configure").click()
    page.get_by_role("button", name="Done").click()  # the dialog scrolls


def test_the_focus_goes_in_the_order_of_the_page(page: Any, page_server: ScriptedServer) -> None:
    page_server.script = says("A.")
    ask(page, "One?", "A.")
    page.locator("#new").focus()
    order = []
    for _ in range(20):
        order.append(page.evaluate("document.activeElement.id || document.activeElement.ariaLabel"))
        page.keyboard.press("Tab")
    chat = page.evaluate("current.id")
    assert order[:9] == [
        "new",
        "search",
        f"open-{chat}",
        f"more-{chat}",
        "models",
        "import",
        "export",
        "keys",
        "title",
    ]
    assert order[9:] == [
        "more",
        "configure",
        "log",
        "Copy",
        "Edit",
        "Copy",
        "Regenerate",
        "Show its prompt",
        "input",
        "attach",
        "inspect",
    ]


def test_nothing_moves_for_those_who_ask_for_that(page: Any, page_server: ScriptedServer) -> None:
    page.emulate_media(reduced_motion="reduce")
    page_server.script = lambda answer: answer.server.gate.wait()
    send(page, "Wait")
    dot = "getComputedStyle(document.querySelector('.live .text'), '::after').animationName"
    expect(page.locator("article.live")).to_have_count(1)
    assert page.evaluate(dot) == "none"
    page.emulate_media(reduced_motion="no-preference")
    assert page.evaluate(dot) == "pulse"


def test_a_table_scrolls_and_breaks_no_word(page: Any, page_server: ScriptedServer) -> None:
    page.set_viewport_size({"width": 390, "height": 844})
    words = " | ".join(f"`incomprehensibilities_{i}`" for i in range(6))
    page_server.script = says(f"| {words} |\n{'|--' * 6}|\n| {words} |\n")
    ask(page, "A table", "incomprehensibilities_5")
    frame = page.locator(".table")
    assert frame.evaluate("(node) => node.scrollWidth > node.clientWidth")
    heights = frame.locator("td code").evaluate_all(
        "(all) => all.map((n) => n.getClientRects().length)"
    )
    assert heights == [1] * 6
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_the_page_is_one_request_and_a_formula_another(
    context: Any, page_server: ScriptedServer
) -> None:
    page, paths = context.new_page(), []
    page.on("request", lambda request: paths.append(request.url.removeprefix(page_server.url)))
    page.goto(page_server.url)
    page_server.script = says("See ![x](https://example.com/x.png), `code` and **bold**.")
    ask(page, "One?", "bold")
    assert [path for path in paths if "data:" not in path] == [
        "/",
        "/v1/models",
        "/v1/chat/completions",
    ]
    page_server.script = says("It is $\\frac{1}{2}$ or $\\oops{$.")
    ask(page, "Two?", "oops")
    expect(page.locator("mfrac")).to_have_count(1)
    expect(page.locator(".tex.raw")).to_have_text("$\\oops{$")
    assert paths.count("/?temml") == 1
