"""The chat page: tokens shaded by their probability, their cards, branches, the prompt's tokens."""

# ruff: noqa: F811 (parameters are fixtures)
from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
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
    page,
    page_server,
    send,
)
from serving import serving

import nanollama

pytestmark = MARKS
TOKENS = [  # text, probability, and what else could have stood there
    ("The", 0.9, {" A": 0.05}),
    (" capital", 0.8, {" city": 0.1}),
    (" is", 0.95, {}),
    (" Lyon", 0.04, {" Paris": 0.7, " Rome": 0.1}),
    (".", 0.99, {"<|end|>": 0.005}),
]


def entry(text: str, share: float, others: dict[str, float]) -> dict[str, Any]:
    """A token as OpenAI's log-probabilities have it; control tokens have no bytes."""
    ranked = sorted({text: share, **others}.items(), key=lambda pair: -pair[1])
    made = [
        {"token": t, "logprob": math.log(p), "bytes": [] if t[0] == "<" else list(t.encode())}
        for t, p in ranked
    ]
    own = next(one for one in made if one["token"] == text)
    return {**own, "top_logprobs": made}


def speaks(tokens: list[tuple[str, float, dict[str, float]]]) -> Callable[[Answer], None]:
    def script(answer: Answer) -> None:
        for token in tokens:
            delta, content = {"content": token[0]}, [entry(*token)]
            logprobs = {"content": content, "refusal": None}
            answer.event(
                choices=[{"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": None}]
            )
        answer.finish(tokens=len(tokens))

    return script


@pytest.fixture
def shaded(page: Any, page_server: ScriptedServer) -> Any:
    """The page with an answer whose tokens are shaded."""
    page_server.script = speaks(TOKENS)
    page.locator("#xray").click()
    send(page, "Capital?")
    expect(page.locator(".tokens .tok")).to_have_count(len(TOKENS))
    expect(page.locator("article.live")).to_have_count(0)
    return page


def tokens(page: Any) -> Any:
    return page.locator(".assistant .tokens").last


def test_the_switch_asks_for_probabilities_and_shades_tokens(
    shaded: Any, page_server: ScriptedServer
) -> None:
    asked = page_server.requests[0]
    assert (asked["logprobs"], asked["top_logprobs"]) == (True, 5)
    expect(tokens(shaded)).to_have_text("The capital is Lyon.")
    expect(shaded.locator(".odd")).to_have_text([" Lyon"])
    surprise = "(all) => all.map((n) => Number(n.style.getPropertyValue('--surprise')))"
    shares = tokens(shaded).locator(".tok").evaluate_all(surprise)
    assert shares == sorted(shares, key=lambda x: shares.index(x))
    assert max(shares) == shares[3]
    shaded.locator("#xray").click()
    expect(tokens(shaded)).to_be_hidden()
    expect(shaded.locator(".assistant .text p")).to_have_text("The capital is Lyon.")
    ask(shaded, "Again?", "The capital is Lyon.")
    assert "logprobs" not in page_server.requests[1]
    shaded.keyboard.press("Control+Shift+L")
    expect(shaded.locator("#xray")).to_have_attribute("aria-pressed", "true")
    shaded.reload()
    expect(shaded.locator(".tokens .tok")).to_have_count(2 * len(TOKENS))


def test_hover_and_keys_show_what_else_could_have_stood_there(shaded: Any) -> None:
    card, some = shaded.locator("#card"), tokens(shaded).locator(".tok")
    some.nth(3).hover()
    expect(card).to_contain_text("“ Lyon” token 4 · 4.0 % · 4.6 bits")
    expect(card.get_by_role("button")).to_have_text(
        [re.compile("Paris *70 %"), re.compile("Rome *10 %"), "Stages of the sampler"]
    )
    expect(card.locator(".taken")).to_contain_text("Lyon")
    shaded.locator("#title").hover()
    expect(card).to_be_hidden()
    shaded.get_by_label("Copy").last.focus()
    shaded.keyboard.press("Shift+Tab")
    expect(some.first).to_be_focused()
    expect(card).to_contain_text("token 1")
    shaded.keyboard.press("End")
    shaded.keyboard.press("ArrowLeft")
    expect(some.nth(3)).to_be_focused()
    assert some.nth(3).get_attribute("aria-label") == " Lyon, 4.0 %, surprising"
    shaded.keyboard.press("Enter")
    expect(shaded.get_by_role("dialog", name="Token 4")).to_be_visible()
    expect(card.get_by_role("button").first).to_be_focused()
    shaded.keyboard.press("ArrowDown")
    expect(card.get_by_role("button", name="Rome 10 %")).to_be_focused()
    shaded.keyboard.press("Escape")
    expect(card).to_be_hidden()
    expect(some.nth(3)).to_be_focused()


def test_another_candidate_makes_a_named_version(shaded: Any, page_server: ScriptedServer) -> None:
    page_server.script = speaks([(".", 0.9, {}), (" Yes", 0.5, {}), (".", 0.9, {})])
    tokens(shaded).locator(".tok").nth(3).click()
    shaded.get_by_role("button", name="Paris").click()
    expect(tokens(shaded)).to_have_text("The capital is Paris. Yes.")
    asked = page_server.requests[-1]
    assert asked["messages"][-1] == {"role": "assistant", "content": "The capital is Paris"}
    assert (asked["continue_final_message"], asked["add_generation_prompt"]) == (True, False)
    versions = shaded.locator(".assistant .versions")
    expect(versions).to_have_text("2 / 2“Paris” for “Lyon”")
    shaded.get_by_label("Earlier version").click()
    expect(tokens(shaded)).to_have_text("The capital is Lyon.")
    shaded.reload()
    shaded.get_by_label("Later version").click()
    expect(shaded.locator(".tokens .tok")).to_have_count(7)
    expect(versions).to_contain_text("“Paris” for “Lyon”")


def test_a_candidate_that_ends_the_answer_asks_nobody(
    shaded: Any, page_server: ScriptedServer
) -> None:
    tokens(shaded).locator(".tok").nth(4).click()
    shaded.get_by_role("button", name="ends the answer").click()
    expect(tokens(shaded)).to_have_text("The capital is Lyon")
    assert len(page_server.requests) == 1


def test_parts_of_characters_are_put_together(page: Any, page_server: ScriptedServer) -> None:
    def script(answer: Answer) -> None:
        raw = "🦙".encode()
        parts = [(raw[:2], ""), (raw[2:], "🦙")]
        for part, text in parts:
            own = {"token": "\ufffd", "logprob": -1.0, "bytes": list(part), "top_logprobs": []}
            choice = {"index": 0, "delta": {"content": text}, "logprobs": {"content": [own]}}
            answer.event(choices=[{**choice, "finish_reason": None}])
        answer.say(" ok")
        answer.finish()

    page_server.script = script
    page.locator("#xray").click()
    send(page, "Llama?")
    expect(tokens(page).locator(".tok")).to_have_text(["", "🦙"])
    expect(tokens(page)).to_have_text("🦙 ok")  # and what came without probabilities


def test_an_answer_without_probabilities_says_so(page: Any, page_server: ScriptedServer) -> None:
    page_server.script = lambda answer: (answer.say("Plain."), answer.finish())
    page.locator("#xray").click()
    send(page, "Capital?")
    expect(page.locator(".assistant .text")).to_have_text("Plain.")
    expect(page.locator(".note")).to_contain_text("made without probabilities")


def test_the_prompts_tokens_are_shaded_too(page: Any, page_server: ScriptedServer) -> None:
    asked: list[Any] = []

    def reply(answer: Answer, body: Any) -> None:
        answer.server.reply(answer.handler, 200, json.dumps(body).encode())

    def complete(body: Any, answer: Answer) -> None:
        asked.append(body)
        top = [None, {"x": -0.1, "b": -3.0}]
        logprobs = {"tokens": ["a", "b"], "token_logprobs": [None, -3.0], "top_logprobs": top}
        reply(answer, {"choices": [{"text": "ab", "logprobs": logprobs}]})

    pieces = [{"id": 5, "piece": "a"}, {"id": 6, "piece": "b"}]
    page_server.routes["/tokenize"] = lambda _, answer: reply(
        answer, {"count": 2, "tokens": pieces}
    )
    page_server.routes["/v1/completions"] = complete
    page.locator("#input").fill("ab")
    page.keyboard.press("Control+Shift+P")
    page.locator("#prompt").get_by_label("Probabilities").check()
    expect(page.locator("#prompt-text .odd")).to_have_text("b")
    expect(page.locator("#prompt-about")).to_contain_text("perplexity 20.09")
    assert asked == [
        {"model": "scripted", "prompt": [5, 6], "echo": True, "logprobs": 5, "max_tokens": 0}
    ]
    page.locator("#prompt-text .tok").last.click()
    card = page.locator("#card")
    expect(card).to_contain_text("“b” token 2 · 5.0 %")
    expect(card.get_by_role("button")).to_have_count(0)
    page.keyboard.press("Escape")
    page.keyboard.press("Escape")
    expect(page.locator("#prompt")).to_be_hidden()


@pytest.mark.node
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing(browser: Any, page_server: ScriptedServer, scheme: str) -> None:
    axe = npm.installed("axe-core@4.14.1") / "node_modules/axe-core/axe.min.js"
    context = browser.new_context(color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.add_init_script(path=axe)
    page.goto(page_server.url)
    page_server.script = speaks(TOKENS)
    page.locator("#xray").click()
    send(page, "Capital?")
    expect(page.locator(".tokens .tok")).to_have_count(len(TOKENS))
    tokens(page).locator(".tok").nth(3).click()
    expect(page.locator("#card")).to_be_visible()
    found = page.evaluate("axe.run().then(({violations}) => violations)")
    serious = [v for v in found if v["impact"] in ("serious", "critical", "moderate")]
    assert [f"{v['id']}: {n['html'][:120]}" for v in serious for n in v["nodes"]] == []
    context.close()


# ---- the real server -----------------------------------------------------------------------------


def test_the_real_server_shows_stages_and_goes_on(context: Any, tiny: Callable[..., Path]) -> None:
    with serving(lambda: nanollama.LLM(tiny(), parallel=2)) as live:
        page, faults = context.new_page(), []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: message.type == "error" and faults.append(message.text))
        page.goto(live.url)
        expect(page.locator("#model")).to_have_text("model")
        page.locator("#configure").click()
        page.get_by_label("Max tokens").fill("6")
        page.get_by_label("Seed").fill("3")
        page.get_by_role("button", name="Done").click()
        page.locator("#xray").click()
        send(page, "hello")
        expect(page.locator("article.live")).to_have_count(0)
        some = tokens(page).locator(".tok")
        expect(some.first).to_be_visible()
        some.nth(2).click()
        page.get_by_role("button", name="Stages of the sampler").click()
        table = page.locator("#card table")
        expect(table.locator("thead")).to_contain_text("temperature")
        expect(table.locator("tfoot")).to_contain_text("Tokens left")
        expect(table.locator("tr.taken")).to_have_count(1)
        page.locator("#card li button").first.click()
        expect(page.locator(".assistant .versions")).to_contain_text("2 / 2")
        expect(page.locator("article.live")).to_have_count(0)
        page.locator("#inspect").click()
        page.locator("#prompt").get_by_label("Probabilities").check()
        expect(page.locator("#prompt-about")).to_contain_text("perplexity")
        assert faults == []
