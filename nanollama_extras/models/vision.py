"""Images in messages: a model's own vision part turns them into rows of its prompt.

Adds       `opened`, the `Vision` of a model: it encodes each image once, lets the template
           write its placeholders, and gives ids in which each row of an image is a `VectorId`.
           Rows are kept by the hash of the image, up to KEPT_BYTES.
Seam       `TextSide.vision`, which the core calls instead of `encode_chat`. A VectorId has a
           `vector`, which Decoder.embed takes instead of the id's embedding; two are equal if they
           are the same row of the same image, so prefixes are reused as those of texts are.
Needs      models.vision_towers, which runs transformers' image processors and vision towers;
           files.mmproj and models.paired_towers, for models in GGUF;
           models.ropes, for positions in three dimensions; answers.images has `Picture`.
Remove     delete this file and vision_towers.py; models then refuse images.
"""

from __future__ import annotations

import functools
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nanollama import (
    PLAIN_START,
    ChatTemplate,
    Checkpoint,
    CheckpointError,
    Decoder,
    NanollamaError,
    RequestError,
    TemplateError,
    Tokenizer,
    encode_chat,
    extra,
    read_json,
)

if TYPE_CHECKING:
    from pathlib import Path

    from torch import Tensor

    from nanollama_extras.answers.images import Picture
    from nanollama_extras.files.mmproj import Pair
    from nanollama_extras.models.vision_towers import Tower

KEPT_BYTES = 512 << 20  # of encoded images


@dataclass(frozen=True, slots=True)
class VisionFamily:
    """How a family's images differ from one row of its prompt for each row of the tower's output.

    `model_type` is that of the whole config.json."""

    in_three: bool = False  # positions in three dimensions (mrope)
    id_of_padding: bool = False  # embeddings of layers are those of the padding


# model_type of config.json -> how it differs
FAMILIES = {
    **dict.fromkeys(
        "idefics3 smolvlm gemma3 llava llava_onevision mistral3 internvl lfm2_vl".split(),
        VisionFamily(),
    ),
    **dict.fromkeys(
        "qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe qwen3_5 qwen3_5_moe glm4v glm4v_moe".split(),
        VisionFamily(in_three=True),
    ),
    **dict.fromkeys(("gemma4", "gemma4_unified"), VisionFamily(id_of_padding=True)),
}


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """An image as rows of a prompt: `rows` (n, C) instead of embeddings, and `deep`, tensors (n, C)
    that are added after the first layers. `text` is what the placeholder grows to; `grid` (1, 3)
    is the number of patches in time, height and width of a family with such positions."""

    digest: str
    text: str
    rows: Tensor
    deep: tuple[Tensor, ...] = ()
    grid: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in (self.rows, *self.deep))


class VectorId(int):
    """A row of an image in a prompt; as a number, the id that stands in its place. Its `place` has
    its positions in time, height and width."""

    image: Encoded
    index: int
    place: tuple[int, ...]

    @classmethod
    def of(cls, token_id: int, image: Encoded, index: int) -> VectorId:
        made = cls(token_id)
        made.image, made.index = image, index
        return made

    @property
    def vector(self) -> Tensor:
        return self.image.rows[self.index]

    @property
    def key(self) -> tuple[str, int]:
        return self.image.digest, self.index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VectorId) and self.key == other.key

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash(self.key)


@dataclass
class KeptImages:
    """Encoded images by their hash; those not used for longest go when they take too many bytes."""

    most_bytes: int = KEPT_BYTES
    images: OrderedDict[str, Encoded] = field(default_factory=OrderedDict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def find(self, digest: str) -> Encoded | None:
        with self.lock:
            if found := self.images.get(digest):
                self.images.move_to_end(digest)
            return found

    def add(self, image: Encoded) -> None:
        with self.lock:
            self.images[image.digest] = image
            num_bytes = sum(one.nbytes for one in self.images.values())
            while len(self.images) > 1 and num_bytes > self.most_bytes:
                num_bytes -= self.images.popitem(last=False)[1].nbytes


class ImageTemplate(ChatTemplate):
    """A chat template whose placeholders grow to what each image needs."""

    def __init__(self, template: ChatTemplate, placeholder: str, images: list[Encoded]) -> None:
        self.template, self.placeholder, self.images = template, placeholder, images
        self.source, self.special_tokens = template.source, template.special_tokens

    def prompt(
        self,
        messages: Iterable[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> str:
        """As ChatTemplate.prompt. Raises TemplateError where it leaves images out."""
        text = self.template.prompt(messages, tools, **template_kwargs)
        own = f"(?<!{PLAIN_START}){re.escape(self.placeholder)}"  # and no user's
        first, *rest = re.split(own, text)
        if len(rest) != len(self.images):
            found = f"{len(rest)} placeholders for {len(self.images)} images"
            raise TemplateError(f"the chat template writes {found}", "messages")
        return first + "".join(image.text + part for image, part in zip(self.images, rest))


class Vision:
    """The vision part of a model. Called as `encode_chat`, by any thread; it encodes one image at a
    time, in the caller's thread, while the engine's thread and requests without new images go
    on."""

    def __init__(
        self, path: Path, model_type: str, decoder: Decoder, pair: Pair | None = None
    ) -> None:
        """model_type: of the whole model. pair: the image part of a model in GGUF."""
        self.path, self.model_type, self.decoder, self.pair = path, model_type, decoder, pair
        self.lock, self.kept = threading.Lock(), KeptImages()
        self.num_encoded = 0
        self._tower: Tower | None = None

    @property
    def tower(self) -> Tower:
        """The image processor and the tower, which are read when they are first needed."""
        if self._tower is None:
            towers = extra("models.vision_towers", "an image")
            read = functools.partial(towers.open_directory, self.path, self.decoder.config)
            if self.pair:
                open_pair = extra("models.paired_towers", "an image").open_pair
                read = functools.partial(open_pair, self.pair)
            family = FAMILIES[self.model_type]
            self._tower = towers.Tower(self.path, family, self.decoder, read)
        return self._tower

    def __call__(
        self,
        tokenizer: Tokenizer,
        template: ChatTemplate,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> tuple[list[int], str]:
        """As `encode_chat`, with images in the messages. Raises RequestError."""
        pictures = list(find_pictures(messages))
        if not pictures:
            return encode_chat(tokenizer, template, messages, tools, **template_kwargs)
        images = [self.encode(p, f"images[{i}]") for i, p in enumerate(pictures)]
        grown = ImageTemplate(template, self.tower.placeholder, images)
        ids, text = encode_chat(tokenizer, grown, messages, tools, **template_kwargs)
        return self.with_rows(ids, images), text

    def encode(self, picture: Picture, where: str) -> Encoded:
        """A picture as rows, from those kept or now. Raises RequestError."""
        if found := self.kept.find(picture.digest):
            return found
        with self.lock:
            if found := self.kept.find(picture.digest):  # meanwhile
                return found
            self.num_encoded += 1
            image = Encoded(picture.digest, *self.tower.encode(picture.pixels, where))
            self.kept.add(image)
            return image

    def with_rows(self, ids: list[int], images: list[Encoded]) -> list[int]:
        """The ids with a VectorId in place of each placeholder. Raises RequestError."""
        tower = self.tower
        places = [i for i, token_id in enumerate(ids) if token_id == tower.image_id]
        rows = [(image, index) for image in images for index in range(len(image.rows))]
        if len(places) != len(rows):
            found = f"{len(places)} tokens for {len(rows)} rows of images"
            raise RequestError(
                f"the prompt has {found}; the model's files do not agree", "messages"
            )
        found_places = tower.places(ids, images)
        most = getattr(self.decoder, "most_image", None)
        if most and (longest := max(len(image.rows) for image in images)) > most:
            problem = f"an image takes {longest} tokens, and a step has room for {most}"
            raise RequestError(f"{problem}; use --prefill-chunk {longest}", "messages")
        new = list(ids)
        for at, (image, index) in zip(places, rows):
            new[at] = row = VectorId.of(tower.stand_in, image, index)
            if found_places is not None:
                row.place = tuple(found_places[at])
        return new


def find_pictures(messages: Iterable[Mapping[str, Any]]) -> Iterable[Picture]:
    """The pictures of messages in their order."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list) else ():
            if isinstance(part, Mapping) and hasattr(part.get("image"), "digest"):
                yield part["image"]


def why_not(checkpoint: Checkpoint) -> str:
    """Why a model reads no images, in one sentence; "" for one that does."""
    path = checkpoint.path
    if not path.is_dir():
        try:
            pairs().find_pair(checkpoint)
        except NanollamaError as error:
            return str(error).replace(f"{path.parent}{os.sep}", "")  # a client reads it
        return ""
    config = read_json(path / "config.json")
    if not isinstance(config.get("vision_config"), Mapping):
        return f"{checkpoint.config.model_type}: this model reads no images"
    if (kind := str(config.get("model_type"))) not in FAMILIES:
        return f"images are not supported for {kind}; they are for: {', '.join(sorted(FAMILIES))}"
    if not any((path / f"{part}processor_config.json").exists() for part in ("", "pre")):
        return f"{path}: no preprocessor_config.json, which images need"
    return ""


def has_vision(checkpoint: Checkpoint) -> bool:
    """Whether a model reads images, from its config and the names of its files."""
    try:
        return not why_not(checkpoint)
    except CheckpointError:
        return False


def pairs() -> Any:
    return extra("files.mmproj", "an image for a model in GGUF")


def opened(checkpoint: Checkpoint, decoder: Decoder, mmproj: str | None = None) -> Vision | None:
    """The vision part of a model, which is not read yet; None for a model without one. mmproj: the
    file with that of a model in GGUF. Raises CheckpointError for such a file of another model."""
    path = checkpoint.path
    if mmproj or not path.is_dir():
        try:
            pair = pairs().find_pair(checkpoint, mmproj)
        except NanollamaError:
            if mmproj:
                raise
            return None
        return Vision(pair.path, pair.model_type, decoder, pair)
    if not has_vision(checkpoint):
        return None
    return Vision(path, str(read_json(path / "config.json")["model_type"]), decoder)
