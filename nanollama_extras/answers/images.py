"""Images in messages: files become pictures, and parts of messages become parts with a picture.

Until a prompt is made, an image in a message is as OpenAI's chat has it, {"type": "image_url",
"image_url": {"url": "data:.."}}: messages stay JSON, which can be stored and sent. `read_messages`
decodes all of a request at once, in the thread that prepares it.

Seam       `nanollama.clean_part` calls `checked` while a body is read, `TextSide.encode_request`
           calls `read_messages`, and what writes bodies to a log calls `without_data`.
Needs      api/image_hosts.py, for images that are not in the message itself; models/vision.py says
           why a model reads none.
Remove     delete this file; a message with an image then names it.
"""

from __future__ import annotations

import base64
import hashlib
import io
import itertools
import math
import re
import threading
import warnings
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from nanollama import (
    NanollamaError,
    extra,
    first_line,
    human_bytes,
    joined_text,
    library,
    preferred,
    refuse,
)

if TYPE_CHECKING:
    from PIL import Image

    from nanollama import Json

MAX_BYTES = 20_000_000  # of a file
MAX_PIXELS = 50_000_000  # of an image
MAX_IMAGES, MAX_ALL_PIXELS = 100, 200_000_000  # of a request
FORMATS = ("PNG", "JPEG", "WEBP", "GIF")
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif")
NO_VISION = "this model does not read images; use a model with vision"
ORIENTATION = 0x0112  # EXIF's tag -> what makes the image upright, by its value
UPRIGHT = {
    2: "FLIP_LEFT_RIGHT",
    3: "ROTATE_180",
    4: "FLIP_TOP_BOTTOM",
    5: "TRANSPOSE",
    6: "ROTATE_270",
    7: "TRANSVERSE",
    8: "ROTATE_90",
}
LONG_DATA = 128  # characters of a string that may be a file


class Picture:
    """An image: the SHA-256 of its file in hex, and its pixels, RGB and upright, or a function that
    gives them when they are needed, with their size."""

    def __init__(
        self,
        digest: str,
        pixels: Image.Image | Callable[[], Image.Image],
        size: tuple[int, int] | None = None,
    ) -> None:
        self.digest, self._pixels = digest, pixels
        self.size: tuple[int, int] = size or self.pixels.size

    @property
    def pixels(self) -> Image.Image:
        if callable(self._pixels):
            self._pixels = self._pixels()
        return self._pixels


class KnownFiles:
    """The hashes of files that were decoded without an error, with their sizes in pixels: each turn
    of a conversation sends its images again, whose rows the model may have kept."""

    def __init__(self, most: int = 4096) -> None:
        self.most, self.sizes, self.lock = most, dict[str, tuple[int, int]](), threading.Lock()

    def picture(self, data: bytes, name: str) -> Picture:
        """The picture in a file. Raises as `decoded`, for a file that is not known."""
        digest, pixels = hashlib.sha256(data).hexdigest(), partial(decoded, data, name)
        if (size := self.sizes.get(digest)) is None:
            found = Picture(digest, pixels())
            with self.lock:
                self.sizes[digest] = found.size
                for old in list(self.sizes)[: -self.most]:
                    del self.sizes[old]
            return found
        return Picture(digest, pixels, size)


KNOWN = KnownFiles()


# ---- files ---------------------------------------------------------------------------------------


@lru_cache(maxsize=1)
def pillow() -> Any:
    """The module PIL.Image. Raises PackageError."""
    module = library("PIL.Image", install="pip install 'nanollama[vision]'")
    # sizes are checked here, to a lower limit; damage is an error, or does not matter
    warnings.filterwarnings("ignore", module=r"PIL\.")
    return module


def read_picture(data: bytes, name: str) -> Picture:
    """The picture in a PNG, JPEG, WebP or GIF file, of which the first frame counts. Raises
    RequestError, which begins with `name`, and PackageError."""
    if len(data) > MAX_BYTES:
        refuse(f"{name} has {human_bytes(len(data))}; at most {human_bytes(MAX_BYTES)} fit", name)
    pillow()  # must be there, also for a file that is known
    return KNOWN.picture(data, name)


def decoded(data: bytes, name: str) -> Image.Image:
    """The pixels of a file, RGB and upright. Raises as `read_picture`."""
    image_module = pillow()
    try:
        with image_module.open(io.BytesIO(data), formats=FORMATS) as image:
            check_size(image.size, name)
            image.load()
            return as_rgb(upright(image))
    except (NanollamaError, MemoryError):
        raise
    except image_module.DecompressionBombError:
        refuse(f"{name} has over {MAX_PIXELS // 10**6} megapixels; send a smaller image", name)
    except image_module.UnidentifiedImageError:
        refuse(f"{name} is not an image that can be read; PNG, JPEG, WebP and GIF can", name)
    except Exception as error:  # each format has errors of its own
        refuse(f"{name} is damaged or cut short: {first_line(error)}", name)


def check_size(size: tuple[int, int], name: str) -> None:
    """Raise RequestError for an image with too many pixels."""
    width, height = size
    if width * height > MAX_PIXELS:
        limit = MAX_PIXELS // 10**6
        refuse(f"{name} has {width} x {height} pixels; at most {limit} megapixels fit", name)


def upright(image: Image.Image) -> Image.Image:
    """The image as its EXIF data says that it is to be held."""
    try:
        value = image.getexif().get(ORIENTATION)
    except Exception:  # damaged EXIF data: the pixels are whole
        return image
    method = UPRIGHT.get(value) if isinstance(value, int) else None
    return image.transpose(getattr(pillow().Transpose, method)) if method else image


def as_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB: transparent pixels show white, gray of 16 bits keeps its upper 8."""
    if image.mode.startswith("I;16") or image.mode == "I":
        image = image.convert("I").point(lambda value: value * (1 / 256)).convert("L")
    if not image.has_transparency_data:
        return image.convert("RGB")
    seen = image.convert("RGBA")
    ground = pillow().new("RGB", image.size, "white")
    ground.paste(seen, mask=seen.getchannel("A"))
    return ground


def data_url(data: bytes) -> str:
    """A file as a URL that contains it."""
    return f"data:image;base64,{base64.b64encode(data).decode()}"


def read_data_url(url: str, name: str) -> bytes:
    """The file in a data: URL. Raises RequestError."""
    head, _, text = url.partition(",")
    if not head.lower().endswith(";base64"):
        refuse(f"{name} is a data: URL of another form; use data:image/png;base64,..", name)
    return read_base64(text, name)


def read_base64(text: str, name: str) -> bytes:
    """The bytes that a text in base64 stands for, also in the alphabet of URLs; line breaks,
    %-escapes and missing padding do not matter. Raises RequestError."""
    if len(text) > 2 * MAX_BYTES:
        refuse(f"{name} has over {human_bytes(MAX_BYTES)}; send a smaller image", name)
    text = "".join((unquote(text) if "%" in text else text).split()).rstrip("=")
    try:
        padded = text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4)
        data = base64.b64decode(padded, validate=True)
    except ValueError:
        refuse(f"{name} is not base64", name)
    if not data:
        refuse(f"{name} is empty", name)
    return data


# ---- parts of messages ---------------------------------------------------------------------------


def image_part(url: str, name: str) -> Json:
    """The part of a message for an image, which errors call `name`."""
    return {"type": "image_url", "image_url": {"url": url}, "name": name}


def base64_part(value: Any, name: str) -> Json:
    """The part of a message for an image that a body has in base64. Raises RequestError."""
    if not isinstance(value, str) or not value:
        refuse(f"{name} must be an image in base64", name)
    if value[:5].lower() == "data:":
        return image_part(value, name)
    if re.match("(?i)https?:", value):
        refuse(f"{name} is a URL; this API takes images in base64", name)
    return image_part(f"data:image;base64,{value}", name)


def is_image(part: Any) -> bool:
    return isinstance(part, Mapping) and part.get("type") in ("image", "image_url")


def has_images(message: Any) -> bool:
    content = message.get("content") if isinstance(message, Mapping) else None
    return isinstance(content, list) and any(map(is_image, content))


def merged(parts: Iterable[Any]) -> list[Any]:
    """Parts of a message with neighbouring texts as one, in which names of control tokens show."""
    out: list[Any] = []
    for shows, grouped in itertools.groupby(parts, is_image):
        run = list(grouped)
        out += run if shows else [{"type": "text", "text": joined_text(run, "content")}]
    return out


def checked(part: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A part with an image, whose form is right. Raises RequestError."""
    if part["type"] == "image":
        if not isinstance(part.get("image"), Picture):
            refuse(f"{where} is of type 'image'; use image_url with a data: URL", where)
        return part
    url = part_url(part)
    if not isinstance(url, str):
        refuse(f"{where}.image_url has no url; give a data: URL", where)
    if not re.match("(?i)data:|https?:", url):
        refuse(f"{where}.image_url.url must begin with data:image/png;base64, or https:", where)
    return part


def part_url(part: Mapping[str, Any]) -> Any:
    """The URL of an image; some clients send it without the object around it."""
    value = part.get("image_url")
    return value.get("url") if isinstance(value, Mapping) else value


def part_picture(part: Mapping[str, Any], where: str) -> Picture:
    """The picture of a part. Raises RequestError, and NanollamaError for one that is elsewhere."""
    checked(part, where)
    if part["type"] == "image":
        picture: Picture = part["image"]
        return picture
    url, name = part_url(part), part.get("name")
    name = name if isinstance(name, str) else where
    if url[:5].lower() == "data:":
        return read_picture(read_data_url(url, name), name)
    fetch = extra("api.image_hosts", "an image that is not in the message").fetch
    return read_picture(fetch(url, name), name)


def read_messages(llm: Any, messages: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages of a request with a picture in the place of each image; those of a result of a
    call come in the user's next message. Raises RequestError, also for a model without vision."""
    messages = list(messages)
    first = next((i for i, message in enumerate(messages) if has_images(message)), None)
    if first is None:
        return messages
    if getattr(llm, "vision", None) is None:
        why_not: Any = preferred("models.vision", "why_not", lambda _: "")
        checkpoint = getattr(llm, "checkpoint", None)
        reason = (checkpoint and why_not(checkpoint)) or NO_VISION
        refuse(f"messages[{first}] has an image: {reason}", "messages", "unsupported_image")
    pictures: list[Picture] = []
    return [with_pictures(m, i, pictures) for i, m in enumerate(after_results(messages))]


def with_pictures(
    message: Mapping[str, Any], index: int, pictures: list[Picture]
) -> Mapping[str, Any]:
    """A message with its pictures, which are added to those of the request. Raises RequestError."""
    if not has_images(message):
        return message
    if message.get("role") != "user":
        where = f"messages[{index}]"
        refuse(f"{where} has an image; only messages of the user may have one", where)
    parts = []
    for i, part in enumerate(message["content"]):
        if is_image(part):
            where = f"messages[{index}].content[{i}]"
            picture = part_picture(part, where)
            pictures.append(picture)
            num_pixels = sum(math.prod(one.size) for one in pictures)
            if len(pictures) > MAX_IMAGES or num_pixels > MAX_ALL_PIXELS:
                most = f"{MAX_IMAGES} images with {MAX_ALL_PIXELS // 10**6} megapixels in all"
                refuse(f"{where} is too much for one request; at most {most} fit", where)
            part = {"type": "image", "image": picture}
        parts.append(part)
    return {**message, "content": merged(parts)}


def after_results(messages: list[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages with the images of results of calls in the user's message that follows, which
    is made where there is none: templates take text alone from a result."""
    out: list[Mapping[str, Any]] = []
    held: list[Any] = []
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role == "tool" and has_images(message):
            held += [part for part in message["content"] if is_image(part)]
            rest = [part for part in message["content"] if not is_image(part)]
            message = {**message, "content": rest or "(an image)"}
        elif held and role != "tool":
            if role == "user":
                texts = [{"type": "text", "text": content}] if isinstance(content, str) else content
                message = {**message, "content": [*held, *(texts or [])]}
            else:
                out.append({"role": "user", "content": held})
            held = []
        out.append(message)
    return [*out, {"role": "user", "content": held}] if held else out


# ---- what people read ----------------------------------------------------------------------------


def without_data(value: Any) -> Any:
    """A value of JSON for a log: how long each image is stands in the place of the image."""
    if isinstance(value, str):
        head, comma, _ = value[:LONG_DATA].partition(",")
        if comma and head[:5].lower() == "data:":
            return f"{head},[{len(value)} characters]"
        is_file = len(value) > LONG_DATA and not re.search(r"[^\w+/=-]", value[:LONG_DATA])
        return f"[{len(value)} characters]" if is_file else value
    if isinstance(value, Mapping):
        return {key: without_data(item) for key, item in value.items()}
    if isinstance(value, Picture):
        return f"[image {value.digest[:8]}]"
    return [*map(without_data, value)] if isinstance(value, (list, tuple)) else value


def as_notes(message: Mapping[str, Any]) -> Mapping[str, Any]:
    """A message with a note in the place of each image: what the log of conversations keeps."""
    if not has_images(message):
        return message
    parts = message["content"]
    texts = ["[image]" if is_image(part) else str(part.get("text", "")) for part in parts]
    return {**message, "content": "\n".join(texts)}


def noted(llm: Any, messages: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The messages of a request with a note in the place of each image. Raises as
    `read_messages`."""
    return [*map(as_notes, read_messages(llm, messages))]
