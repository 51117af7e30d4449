"""The processor of Pixtral's images, which Mistral Small 3, Ministral 3 and Pixtral 12B use.

transformers' PixtralProcessor needs torchvision, of which it uses nothing; its image processor on
Pillow does not. An image of w x h patches becomes h rows of w placeholders, each row with a token
for its end:

    [IMG][IMG][IMG][IMG_BREAK][IMG][IMG][IMG][IMG_END]

Seam       models.vision_towers makes a `Processor` where the files name PixtralProcessor.
Source     https://github.com/huggingface/transformers (models/pixtral/processing_pixtral.py)
Remove     delete this file; images of these models then name it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Processor:
    """settings: those of processor_config.json"""

    def __init__(self, image_processor: Any, tokenizer: Any, settings: Mapping[str, Any]) -> None:
        self.image_processor, self.tokenizer = image_processor, tokenizer
        self.size = int(settings.get("patch_size", 16)) * int(settings.get("spatial_merge_size", 1))
        self.image_token = str(settings.get("image_token", "[IMG]"))
        self.row_end = str(settings.get("image_break_token", "[IMG_BREAK]"))
        self.end = str(settings.get("image_end_token", "[IMG_END]"))

    def __call__(
        self, images: Sequence[Any], text: Sequence[str], return_tensors: str, **options: Any
    ) -> dict[str, Any]:
        """A text with a placeholder for each image -> ids, pixels and sizes."""
        sides = {"height": self.size, "width": self.size}
        inputs = self.image_processor(images, patch_size=sides, return_tensors=return_tensors)
        first, *rest = text[0].split(self.image_token)
        sizes = inputs["image_sizes"].tolist()
        if len(rest) != len(sizes):
            raise ValueError(f"{len(rest)} placeholders for {len(sizes)} images")
        whole = first + "".join(self.grown(*size) + part for size, part in zip(sizes, rest))
        return {**self.tokenizer(whole, return_tensors=return_tensors, **options), **inputs}

    def grown(self, height: int, width: int) -> str:
        """The text of an image of so many pixels."""
        row = self.image_token * (width // self.size)
        return self.row_end.join([row] * (height // self.size)) + self.end
