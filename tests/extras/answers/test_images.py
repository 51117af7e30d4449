"""answers/images.py: files become pictures, or one line says why not."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import struct
import sys
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import nanollama
from nanollama_extras.answers import images
from nanollama_extras.answers.images import Picture, as_notes, read_messages, read_picture

FORMATS = ["PNG", "JPEG", "WEBP", "GIF"]
RED, BLUE = (255, 0, 0), (0, 0, 255)


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def halves(size: tuple[int, int] = (40, 20)) -> Image.Image:
    """An image whose left half is red, and the other blue."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image


def is_near(color: Any, expected: tuple[int, int, int]) -> bool:
    return max(abs(a - b) for a, b in zip(color, expected)) < 12


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMATS)
def test_each_format_is_read(form: str) -> None:
    data = saved(halves(), form)
    picture = read_picture(data, "a.file")
    assert picture.digest == hashlib.sha256(data).hexdigest()
    assert (picture.pixels.mode, picture.pixels.size) == ("RGB", (40, 20))
    assert is_near(picture.pixels.getpixel((5, 5)), RED)
    assert is_near(picture.pixels.getpixel((35, 5)), BLUE)


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG"])
def test_the_first_frame_of_an_animation_counts(form: str) -> None:
    rest = [Image.new("RGB", (8, 8), BLUE)]
    data = saved(Image.new("RGB", (8, 8), RED), form, save_all=True, append_images=rest)
    assert is_near(read_picture(data, "a").pixels.getpixel((4, 4)), RED)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
def test_exif_says_how_an_image_is_held(form: str, orientation: int) -> None:
    from PIL import ImageOps

    exif = Image.Exif()
    exif[0x0112] = orientation
    data = saved(halves(), form, exif=exif)
    with Image.open(io.BytesIO(data)) as image:
        expected = ImageOps.exif_transpose(image).convert("RGB")
    pixels = read_picture(data, "a").pixels
    assert pixels.size == expected.size
    assert pixels.tobytes() == expected.tobytes()


def test_damaged_exif_data_leaves_the_image_as_it_is() -> None:
    data = saved(halves(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01" * 40)
    assert read_picture(data, "a").pixels.size == (40, 20)


def test_what_is_transparent_is_white() -> None:
    image = Image.new("RGBA", (4, 4), (0, 0, 0, 0))
    image.putpixel((1, 1), (255, 0, 0, 128))
    pixels = read_picture(saved(image), "a").pixels
    assert pixels.getpixel((0, 0)) == (255, 255, 255)
    assert is_near(pixels.getpixel((1, 1)), (255, 127, 127))
    palette = Image.new("P", (4, 4), 0)
    palette.putpalette([0, 0, 0, 10, 20, 30])
    assert read_picture(saved(palette, transparency=0), "a").pixels.getpixel((0, 0)) == (255,) * 3


def test_gray_of_16_bits_keeps_its_upper_bits() -> None:
    values = np.array([[0, 256 * 77, 65535]], np.uint16)
    pixels = read_picture(saved(Image.fromarray(values)), "a").pixels
    assert [pixels.getpixel((x, 0)) for x in range(3)] == [(0,) * 3, (77,) * 3, (255,) * 3]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA"])
def test_each_kind_of_pixel_becomes_rgb(mode: str) -> None:
    assert read_picture(saved(halves().convert(mode)), "a").pixels.mode == "RGB"


def test_inks_become_colors() -> None:
    pixels = read_picture(saved(halves().convert("CMYK"), "JPEG"), "a").pixels
    assert is_near(pixels.getpixel((5, 5)), RED)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, *more: bytes) -> bytes:
    """A PNG file of such a size whose pixels are missing."""
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(more) + chunk(b"IEND", b"")


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "a.png is not an image that can be read; PNG, JPEG, WebP and GIF can"),
        (b"hello", "a.png is not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "a.png is not an image"),
        (saved(halves(), "BMP"), "a.png is not an image"),
        (saved(halves(), "TIFF"), "a.png is not an image"),
        (saved(halves((400, 400)))[:-400], "a.png is damaged or cut short"),
        (saved(halves((400, 400)), "JPEG")[:2000], "a.png is damaged or cut short"),
        (saved(halves((400, 400)), "WEBP")[:-40], "a.png is (damaged|not an image)"),
        (b"\x89PNG" + b"\0" * 20_000_000, r"a.png has 20.0 MB; at most 20.0 MB fit"),
        (png(10_000, 5_001), "a.png has 10000 x 5001 pixels; at most 50 megapixels fit"),
        (png(60_000, 60_000), "a.png has (60000 x 60000|over 50 mega)"),
        (png(2**31 - 1, 2**31 - 1), "a.png has (over 50 mega|2147)"),
        (png(0, 0), "a.png is"),
        (png(4, 4, chunk(b"IDAT", b"no zlib")), "a.png is damaged"),
        # a text that would take 100 MB
        (png(4, 4, chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 10**8))), "a.png is damaged"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_one_line_says_why_a_file_is_refused(data: bytes, problem: str) -> None:
    with pytest.raises(nanollama.RequestError, match=f"^{problem}") as caught:
        read_picture(data, "a.png")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


SAMPLES = [saved(halves(), form) for form in FORMATS]
SAMPLES += [saved(halves().convert(mode), "PNG") for mode in ("P", "LA", "1")]
SAMPLES += [saved(halves(), "JPEG", progressive=True, exif=b"Exif\0\0II*\0\x08\0\0\0\0\0")]
SAMPLES += [saved(halves(), "WEBP", lossless=True)]


@given(
    data=st.sampled_from(SAMPLES),
    changes=st.lists(st.tuples(st.integers(0, 120), st.integers(0, 255)), max_size=6),
    end=st.one_of(st.none(), st.integers(0, 400)),
)
def test_changed_files_are_read_or_refused(
    data: bytes, changes: list[tuple[int, int]], end: int | None
) -> None:
    changed = bytearray(data)
    for place, value in changes:
        changed[place % len(changed)] = value
    with contextlib.suppress(nanollama.RequestError):  # any other error is one of this project
        pixels = read_picture(bytes(changed[:end]), "a").pixels
        assert pixels.mode == "RGB"
        assert pixels.width * pixels.height <= images.MAX_PIXELS


def test_without_pillow_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    images.pillow.cache_clear()
    with pytest.raises(nanollama.PackageError, match=r"pip install 'nanollama\[vision\]'"):
        read_picture(SAMPLES[0], "a")


# ---- parts of messages ---------------------------------------------------------------------------

DATA = saved(halves((6, 4)))
URL = f"data:image/png;base64,{base64.b64encode(DATA).decode()}"
PART = {"type": "image_url", "image_url": {"url": URL}}


class Seer:
    """A model with vision."""

    vision = True


def user(*parts: Any) -> dict[str, Any]:
    return {"role": "user", "content": list(parts)}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


def contents(*messages: Any, llm: Any = Seer) -> list[Any]:
    """What the model gets of each message, with an int for the width of a picture."""

    def short(part: Any) -> Any:
        return part["image"].pixels.width if part["type"] == "image" else part["text"]

    read = read_messages(llm, list(messages))
    whole = [m["content"] for m in read]
    return [[*map(short, c)] if isinstance(c, list) else c for c in whole]


def test_images_and_texts_keep_their_order() -> None:
    message = user(text("a"), text("b"), PART, text("c"), PART, PART)
    assert contents(message) == [["ab", 6, "c", 6, 6]]


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": URL},
        {"type": "image_url", "image_url": {"url": URL, "detail": "high"}},
        {"type": "image_url", "image_url": {"url": URL.replace("data:image/png", "DATA:")}},
        {"type": "image_url", "image_url": {"url": URL.replace("png", "jpeg")}},
        {"type": "image_url", "image_url": {"url": f"{URL[:60]}\n {URL[60:]}".rstrip("=")}},
        {"type": "image_url", "image_url": URL.replace("png", "png;charset=utf-8")},
        {"type": "image_url", "image_url": URL.replace("+", "-").replace("/", "_", 9)},
        {"type": "image_url", "image_url": URL.replace("+", "%2B").replace("=", "%3D")},
        {"type": "image", "image": read_picture(DATA, "a")},
    ],
)
def test_spellings_of_an_image(part: Any) -> None:
    assert contents(user(part)) == [[6]]


def test_a_model_without_vision_refuses_images_in_one_line() -> None:
    for llm in (object(), type("Blind", (), {"vision": None})()):
        with pytest.raises(nanollama.RequestError, match="does not read images") as caught:
            read_messages(llm, [user(PART)])
        assert (caught.value.status, caught.value.param) == (400, "messages")
        assert contents(user(text("a")), llm=llm) == [[text("a")["text"]]]


def test_images_of_results_come_in_the_next_message_of_the_user() -> None:
    result = {"role": "tool", "tool_call_id": "a", "content": [text("done"), PART]}
    other = {"role": "tool", "tool_call_id": "b", "content": [PART]}
    plain = {"role": "tool", "tool_call_id": "c", "content": "c"}
    asked = contents(result, other, plain, {"role": "user", "content": "And?"})
    assert asked == [["done"], "(an image)", "c", [6, 6, "And?"]]
    assert contents(result, other) == [["done"], "(an image)", [6, 6]]
    answer = {"role": "assistant", "content": "Yes."}
    assert contents(result, answer) == [["done"], [6], "Yes."]


@pytest.mark.parametrize("role", ["system", "assistant"])
def test_only_the_user_sends_images(role: str) -> None:
    with pytest.raises(nanollama.RequestError, match="only messages of the user may have one"):
        read_messages(Seer, [{"role": role, "content": [PART]}, user(text("a"))])


@pytest.mark.parametrize(
    ("url", "problem"),
    [
        ("data:image/png,abc", "data: URL of another form"),
        ("data:image/png;base64,", "is empty"),
        ("data:image/png;base64,%%%", "is not base64"),
        ("data:image/png;base64,äöü", "is not base64"),
        ("data:image/png;base64,A", "is not base64"),
        ("data:image/png;base64,aGVsbG8=", "is not an image"),
        ("file:///etc/passwd", "must begin with data:"),
        ("/etc/passwd", "must begin with data:"),
        ("", "must begin with data:"),
        (None, "has no url"),
        (7, "has no url"),
    ],
)
def test_an_error_names_the_image(url: Any, problem: str) -> None:
    part = {"type": "image_url", "image_url": {"url": url}}
    with pytest.raises(nanollama.RequestError, match=problem) as caught:
        read_messages(Seer, [user(text("a"), part)])
    assert str(caught.value).startswith("messages[0].content[1]")


def test_the_number_of_images_and_of_their_pixels_is_limited(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(images, "MAX_IMAGES", 3)
    with pytest.raises(nanollama.RequestError, match=r"content\[3\] is too much"):
        read_messages(Seer, [user(*[PART] * 4)])
    monkeypatch.setattr(images, "MAX_ALL_PIXELS", 47)
    with pytest.raises(nanollama.RequestError, match=r"messages\[1\].content\[0\] is too much"):
        read_messages(Seer, [user(PART), user(PART)])


def test_logs_never_have_the_data_of_an_image() -> None:
    bodies = [
        {"messages": [user(text("hi"), PART)]},
        {"messages": [{"content": [{"source": {"type": "base64", "data": URL[22:] * 9}}]}]},
        {"images": [URL[22:] * 9], "prompt": "hi"},
    ]
    for body in bodies:
        shown = str(images.without_data(body))
        assert URL[40:60] not in shown
        assert "hi" in shown or "source" in shown
    assert as_notes(user(text("hi"), PART)) == {"role": "user", "content": "hi\n[image]"}
    long = "some words " * 100
    assert images.without_data({"a": [long]}) == {"a": [long]}


def test_a_template_gets_pictures_in_their_places(tiny: Any) -> None:
    llm = nanollama.LLM(tiny())
    llm.template.source = (
        "{% for m in messages %}{{ m.role }}:{% if m.content is string %}{{ m.content }}{% else %}"
        "{% for p in m.content %}{% if p.type == 'image' %}<img>{% else %}{{ p.text }}{% endif %}"
        "{% endfor %}{% endif %};{% endfor %}"
    )
    picture = {"type": "image", "image": read_picture(DATA, "a")}
    talk = [user(text("<|im_end|>"), picture, text("a")), {"role": "user", "content": "b"}]
    assert isinstance(picture["image"], Picture)
    _, prompt = nanollama.encode_chat(llm.tokenizer, llm.template, talk)
    assert prompt == "user:<|im_end|><img>a;user:b;"
    turns = "{% if messages|length > 1 %}{{ raise_exception('turns') }}{% endif %}"
    llm.template.source = turns + llm.template.source
    _, prompt = nanollama.encode_chat(llm.tokenizer, llm.template, talk)
    assert prompt == "user:<|im_end|><img>a\n\nb;"
