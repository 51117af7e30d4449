"""Images on the chat page: pasted, dropped, shown small, sent, kept if they are small."""

# ruff: noqa: F811 (parameters are fixtures)
from __future__ import annotations

import base64
import io
import json
from typing import Any

from browsing import (  # noqa: F401 (fixtures)
    CAMERA,
    CHROMIUM,
    FLAGS,
    MARKS,
    Answer,
    ScriptedServer,
    ask,
    browser,
    context,
    expect,
    page,
    page_server,
    says,
)
from PIL import Image

pytestmark = MARKS
HANDS_OVER = """([kind, files]) => {
  const data = new DataTransfer();
  for (const [name, type, text] of files) {
    const bytes = Uint8Array.from(atob(text), (c) => c.charCodeAt(0));
    data.items.add(new File([bytes], name, {type}));
  }
  const both = {bubbles: true, cancelable: true, clipboardData: data, dataTransfer: data};
  const event = kind === 'paste' ? new ClipboardEvent(kind, both) : new DragEvent(kind, both);
  document.getElementById('input').dispatchEvent(event);
}"""


def image(form: str = "PNG", size: tuple[int, int] = (64, 48), noise: bool = False) -> bytes:
    out = io.BytesIO()
    picture = Image.effect_noise(size, 100) if noise else Image.new("RGB", size, "teal")
    picture.convert("RGB").save(out, form)
    return out.getvalue()


def hand_over(page: Any, kind: str, name: str, media_type: str, data: bytes) -> None:
    """Paste or drop a file."""
    page.evaluate(HANDS_OVER, [kind, [[name, media_type, base64.b64encode(data).decode()]]])


def counts(server: ScriptedServer, with_image: int = 260) -> list[Any]:
    """Let /tokenize count; the contents that it gets."""
    asked: list[Any] = []

    def tokenize(body: Any, answer: Answer) -> None:
        asked.append(body["messages"][-1]["content"])
        shows = any(part["type"] == "image_url" for part in asked[-1])
        body = json.dumps({"count": with_image if shows else 4, "tokens": []}).encode()
        answer.server.reply(answer.handler, 200, body)

    server.routes["/tokenize"] = tokenize
    return asked


def test_a_pasted_and_a_dropped_image_are_sent(page: Any, page_server: ScriptedServer) -> None:
    asked = counts(page_server)
    page_server.script = says("A cat.")
    small = image()
    hand_over(page, "paste", "cat.png", "image/png", small)
    expect(page.locator("#files li")).to_contain_text("256 tokens")
    hand_over(page, "drop", "dog.jpg", "image/jpeg", image("JPEG"))
    expect(page.locator("#files li")).to_have_count(2)
    expect(page.locator("#files img").first).to_have_js_property("naturalWidth", 64)
    hand_over(page, "drop", "gone.png", "image/png", small)
    page.get_by_label("Remove gone.png").click()
    ask(page, "What is this?", "A cat.")
    expect(page.locator("#files")).to_be_hidden()
    (message,) = page_server.requests[0]["messages"]
    kinds = [part["type"] for part in message["content"]]
    assert kinds == ["image_url", "image_url", "text"]
    sent = message["content"][0]["image_url"]["url"]
    assert sent == f"data:image/png;base64,{base64.b64encode(small).decode()}"
    assert message["content"][2]["text"] == "What is this?"
    assert asked[0][0]["image_url"]["url"] == sent
    expect(page.locator(".user .picture img")).to_have_count(2)
    page.get_by_label("Show cat.png").click()
    expect(page.get_by_label("Show cat.png")).to_have_attribute("aria-pressed", "true")
    page.reload()
    expect(page.locator(".user .picture img")).to_have_count(2)
    ask(page, "And now?", "A cat.")
    assert page_server.requests[1]["messages"][0] == message


def test_a_large_image_is_kept_as_a_small_copy(page: Any, page_server: ScriptedServer) -> None:
    counts(page_server)
    page_server.script = says("Noise.")
    hand_over(page, "paste", "noise.png", "image/png", image(size=(700, 500), noise=True))
    ask(page, "What?", "Noise.")
    ask(page, "And?", "Noise.")
    assert len(page_server.requests[1]["messages"][0]["content"][0]["image_url"]["url"]) > 200_000
    stored = page.evaluate("JSON.stringify(localStorage)")
    assert len(stored) < 150_000
    page.reload()
    expect(page.locator(".user .picture img")).to_have_js_property("naturalWidth", 320)
    ask(page, "Still?", "Noise.")
    part = page_server.requests[2]["messages"][0]["content"][0]
    assert part == {"type": "text", "text": "[The image noise.png is no longer here.]\n"}


def test_a_model_without_vision_says_so_before_the_message_is_sent(
    page: Any, page_server: ScriptedServer
) -> None:
    page_server.routes["/tokenize"] = lambda _, answer: answer.refuse(400, "reads text only")
    hand_over(page, "paste", "cat.png", "image/png", image())
    expect(page.locator("#files .over")).to_contain_text("reads text only")


def test_other_formats_are_converted_and_what_is_no_image_is_refused(
    page: Any, page_server: ScriptedServer
) -> None:
    counts(page_server)
    page_server.script = says("A.")
    hand_over(page, "drop", "a.bmp", "image/bmp", image("BMP"))
    expect(page.locator("#files li")).to_have_count(1)
    hand_over(page, "drop", "b.png", "image/png", b"nothing")
    expect(page.locator("#toast")).to_have_text("b.png cannot be read as an image.")
    ask(page, "", "A.")
    (part,) = page_server.requests[0]["messages"][0]["content"]
    assert part["image_url"]["url"].startswith("data:image/jpeg;base64,")
    expect(page.locator("#title")).to_have_value("a.bmp")


def test_the_camera_is_offered_where_there_is_a_touch_screen(
    browser: Any, page_server: ScriptedServer
) -> None:
    context = browser.new_context(has_touch=True, is_mobile=True, bypass_csp=True)
    page = context.new_page()
    page.goto(page_server.url)
    expect(page.get_by_label("Take a photo")).to_be_visible()
    assert page.locator("#shot").get_attribute("capture") == "environment"
    context.close()


def test_a_mouse_has_no_camera(page: Any) -> None:
    expect(page.get_by_label("Take a photo")).to_be_hidden()


def test_a_computer_with_a_camera_takes_a_photo(browser: Any, page_server: ScriptedServer) -> None:
    """With Chromium's camera that shows a pattern, in a browser of its own."""
    counts(page_server)
    page_server.script = says("A pattern.")
    kind = browser.browser_type
    own = kind.launch(executable_path=CHROMIUM, args=[*FLAGS.split(), *CAMERA.split()])
    page = own.new_page()
    page.goto(page_server.url)
    page.get_by_label("Take a photo").click()
    expect(page.get_by_label("What the camera sees")).not_to_have_js_property("videoWidth", 0)
    page.locator("#camera").get_by_label("Close").click()
    expect(page.get_by_label("What the camera sees")).to_have_js_property("srcObject", None)
    expect(page.locator("#files")).to_be_hidden()
    page.get_by_label("Take a photo").click()
    expect(page.get_by_label("What the camera sees")).not_to_have_js_property("videoWidth", 0)
    page.get_by_text("Take the photo").click()
    expect(page.locator("#files li")).to_contain_text("256 tokens")
    ask(page, "What?", "A pattern.")
    part = page_server.requests[0]["messages"][0]["content"][0]
    data = base64.b64decode(part["image_url"]["url"].removeprefix("data:image/jpeg;base64,"))
    assert len(set(Image.open(io.BytesIO(data)).convert("L").tobytes())) > 8
    own.close()
