"""The image processor of LFM2-VL on Pillow and NumPy.

transformers has it for torchvision alone. A picture of many pixels becomes a grid of tiles and once
a thumbnail of the whole; another is resized to sides that patches divide.

Seam       models.vision_towers makes a `Processor` for the model_type lfm2_vl.
Source     https://github.com/huggingface/transformers
           (src/transformers/models/lfm2_vl/image_processing_lfm2_vl.py)
Remove     delete this file; images of LFM2-VL then name it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import BatchFeature, ImageProcessingMixin

from nanollama import check_value

Floats = np.ndarray[Any, np.dtype[np.float32]]
# Settings of the files that are read, with the values of transformers
COUNTS = {"downsample_factor": 2, "min_tiles": 2, "max_tiles": 10, "min_image_tokens": 64}
COUNTS |= {"max_image_tokens": 256, "encoder_patch_size": 16, "tile_size": 512}
MOST = 2**12  # of each of these
MOST_TILES = 64


class Processor(ImageProcessingMixin):
    """Pictures -> patches. settings: those of preprocessor_config.json"""

    model_input_names = ("pixel_values", "pixel_attention_mask", "spatial_shapes")

    def __init__(self, settings: Mapping[str, Any]) -> None:
        """Raises CheckpointError."""
        super().__init__()  # type: ignore[no-untyped-call]
        found = {key: settings.get(key, default) for key, default in COUNTS.items()}
        for key, value in found.items():
            most = MOST_TILES if key.endswith("tiles") else MOST
            is_count = type(value) is int and 0 < value <= most
            check_value(is_count, key, value, f"a number from 1 to {most}")
        self.patch, self.tile_size = found["encoder_patch_size"], found["tile_size"]
        self.encoder_patch_size, self.downsample_factor = self.patch, found["downsample_factor"]
        self.tokens = found["min_image_tokens"], found["max_image_tokens"]
        self.splits = bool(settings.get("do_image_splitting", True))
        self.tiles = (found["min_tiles"], found["max_tiles"]) if self.splits else (1, 1)
        self.tolerance = float(settings.get("max_pixels_tolerance", 2.0))
        self.use_thumbnail = bool(settings.get("use_thumbnail", True))
        self.resample = settings.get("resample", 2)  # bilinear
        colors = ("image_mean", 0.5), ("image_std", 0.5)
        mean, std = (np.broadcast_to(np.float32(settings.get(*color)), 3) for color in colors)
        self.scale, self.shift = 1 / (255 * std), mean / std
        num_patches = found["max_image_tokens"] * self.downsample_factor**2
        of_a_tile = (self.tile_size // self.patch) ** 2 if self.splits else 0
        self.max_num_patches = max(num_patches, of_a_tile)

    @property
    def side(self) -> int:
        """Pixels of a side of a row of the prompt."""
        return self.patch * self.downsample_factor

    def fetch_images(self, images: Any) -> Any:
        return images

    def __call__(self, images: Sequence[Any], **options: Any) -> BatchFeature:
        """Patches of all tiles (N, P, 3 p²), padded, which of them are no padding, (N, P), and the
        patches in height and width of each tile, (N, 2)."""
        flat = [x for image in images for x in (image if isinstance(image, list) else [image])]
        made = [self.tiles_of(image) for image in flat]
        patches, masks, shapes = [], [], []
        for tile in (tile for tiles, *_ in made for tile in tiles):
            rows, shape = self.patches(tile)
            padding = self.max_num_patches - len(rows)
            patches.append(np.pad(rows, ((0, padding), (0, 0))))
            masks.append([1] * len(rows) + [0] * padding)
            shapes.append(shape)
        data: dict[str, Any] = {
            "pixel_values": torch.from_numpy(np.stack(patches)),
            "pixel_attention_mask": torch.tensor(masks, dtype=torch.int32),
            "spatial_shapes": torch.tensor(shapes),
            "image_rows": [rows for _, (_, rows), _ in made],
            "image_cols": [columns for _, (columns, _), _ in made],
            "image_sizes": [[height, width] for _, _, (width, height) in made],
        }
        return BatchFeature(data)

    def patches(self, tile: Any) -> tuple[Floats, tuple[int, int]]:
        """The patches of a tile (n, 3 p²), and their number in height and width."""
        p = self.patch
        pixels = np.asarray(tile, dtype=np.float32) * self.scale - self.shift
        height, width = pixels.shape[0] // p, pixels.shape[1] // p
        parts = pixels.reshape(height, p, width, p, 3).transpose(0, 2, 1, 3, 4)
        return parts.reshape(height * width, -1), (height, width)

    def tiles_of(self, image: Any) -> tuple[list[Any], tuple[int, int], tuple[int, int]]:
        """A picture as tiles, the last of them perhaps a thumbnail; the numbers of tiles in width
        and height; the size of the whole in one piece."""
        size = self.whole_size(*image.size)
        if self.tiles == (1, 1) or not self.is_large(*image.size):
            return [image.resize(size, self.resample)], (1, 1), size
        columns, rows = self.grid(*image.size)
        side = self.tile_size
        whole = image.resize((columns * side, rows * side), self.resample)
        tiles = [
            whole.crop((x * side, y * side, (x + 1) * side, (y + 1) * side))
            for y in range(rows)
            for x in range(columns)
        ]
        if self.use_thumbnail and len(tiles) > 1:
            tiles.append(image.resize(size, self.resample))
        return tiles, (columns, rows), size

    def is_large(self, width: int, height: int) -> bool:
        """Whether a picture takes more rows than one in one piece may have."""
        w, h = (max(self.patch, round(x / self.side) * self.side) for x in (width, height))
        return w * h > self.tokens[1] * self.side**2 * self.tolerance

    def whole_size(self, width: int, height: int) -> tuple[int, int]:
        """The size of a picture in one piece, whose sides are multiples of `side`."""
        side = self.side
        least, most = (count * side**2 for count in self.tokens)
        w, h = (max(side, round(x / side) * side) for x in (width, height))
        if w * h > most:
            shrink = math.sqrt(width * height / most)
            w, h = (max(side, math.floor(x / shrink / side) * side) for x in (width, height))
        elif w * h < least:
            grow = math.sqrt(least / (width * height))
            w, h = (math.ceil(x * grow / side) * side for x in (width, height))
        return w, h

    def grid(self, width: int, height: int) -> tuple[int, int]:
        """The numbers of tiles in width and height nearest to the picture's shape; of equally near
        ones, the largest that the picture fills by half."""
        least, most = self.tiles
        counts = range(1, most + 1)
        grids = [(w, h) for w in counts for h in counts if least <= w * h <= most]
        best, best_distance = (1, 1), math.inf
        for w, h in sorted(grids, key=lambda grid: (grid[0] * grid[1], grid)):
            distance = abs(width / height - w / h)
            fills = width * height > self.tile_size**2 * w * h / 2
            if distance < best_distance or (distance == best_distance and fills):
                best, best_distance = (w, h), distance
        return best
