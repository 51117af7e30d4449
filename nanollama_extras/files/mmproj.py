"""The image part of a model in GGUF: a second file, mmproj-*.gguf, beside that of its text.

Adds       `find_pair`: the file that goes with a model, checked against it, and what it says as a
           config of transformers; `model_files`, with which a download fetches that file, too.
Seam       models.vision asks for a pair, models.paired_towers builds its tower;
           `nanollama.pull_from_hub` takes `model_files` in place of its own.
Remove     delete this file with models/paired_towers.py; GGUF files then read no images.
Source     https://github.com/ggml-org/llama.cpp (conversion/base.py, tools/mtmd/clip-impl.h) for
           the keys and the tensors; the numbers of image processors that a GGUF file leaves out are
           those of the models' own files
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nanollama
from nanollama import (
    GGUF_MODEL,
    Checkpoint,
    CheckpointError,
    HubRef,
    TensorSource,
    check_value,
    errors_about,
    excerpt,
    read_gguf,
)

Values = dict[str, Any]
Tensors = Mapping[str, TensorSource]
TYPES = ("F16", "BF16", "F32", "Q8_0")  # in a file's name, the preferred one first
MOST = 2**16  # of any number of a vision part
QWEN_TOKENS = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
QWEN_TOKENS |= {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
GEMMA4_TOKENS = {"boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>"}
GEMMA4_TOKENS |= {"boa_token": "<|audio>", "audio_token": "<|audio|>", "eoa_token": "<audio|>"}


@dataclass(frozen=True, slots=True)
class Described:
    """What transformers is told: a vision config, further keys of the whole config, and settings of
    the image processor and of the processor."""

    vision: Values
    whole: Values
    pixels: Values
    processor: Values


@dataclass(frozen=True, slots=True)
class Projector:
    """A type of image part. texts: model_type of a text -> that of the whole model in transformers;
    images: the name of its image processor; tokens: names of tokens for its processor."""

    texts: Mapping[str, str]
    images: str
    tokens: Mapping[str, str]
    describe: Callable[[Pair], Described]
    normalized: bool = True  # whether pixels are, by the file's mean and deviation


@dataclass(frozen=True, slots=True)
class Pair:
    """The image part of a model. `width` (C) is that of the text's embeddings; `image_id` and
    `padding_id` are tokens of its vocabulary."""

    path: Path
    projector: str
    model_type: str
    metadata: Values
    tensors: Tensors
    width: int
    image_id: int = 0
    padding_id: int = 0

    @property
    def row(self) -> Projector:
        return PROJECTORS[self.projector]

    def value(self, key: str, default: Any = None) -> Any:
        return self.metadata.get(f"clip.vision.{key}", default)

    def count(self, key: str, default: int | None = None) -> int:
        """A number from 1 to MOST. Raises CheckpointError."""
        value = self.value(key, default)
        is_count = type(value) is int and 0 < value < MOST
        check_value(is_count, f"clip.vision.{key}", value, f"a number below {MOST}")
        return int(value)

    def eps(self) -> float:
        """The epsilon of norms. Raises CheckpointError."""
        key = "attention.layer_norm_epsilon"
        value = self.value(key, 1e-6)
        is_small = isinstance(value, float) and 0 <= value < 1
        check_value(is_small, f"clip.vision.{key}", value, "a number below 1")
        return float(value)

    def shape(self, name: str, num_dims: int) -> tuple[int, ...]:
        """The shape of a tensor. Raises CheckpointError."""
        if name not in self.tensors:
            raise CheckpointError(f"tensor {name} is missing")
        shape = self.tensors[name].shape
        check_value(len(shape) == num_dims, f"tensor {name}", shape, f"a shape of {num_dims}")
        return shape

    def num_layers(self) -> int:
        """The number of layers, which all have tensors. Raises CheckpointError."""
        found = {int(m[1]) for name in self.tensors if (m := re.match(r"v\.blk\.(\d+)\.", name))}
        count = self.count("block_count")
        check_value(found == {*range(count)}, "clip.vision.block_count", count, str(len(found)))
        return count

    def grid(self) -> int:
        """The number of patches on a side of the image that positions are for. Raises
        CheckpointError."""
        num_rows, _ = self.shape("v.position_embd.weight", 2)
        side = math.isqrt(num_rows)
        check_value(side**2 == num_rows, "rows of v.position_embd", num_rows, "a square number")
        return side

    def described(self) -> Described:
        """What the file says. Raises CheckpointError."""
        with errors_about(self.path):
            return self.row.describe(self)

    def config(self) -> Values:
        """The config of the whole model, with a text part of this width. Raises CheckpointError."""
        made = self.described()
        return {
            "model_type": self.model_type,
            "text_config": {"hidden_size": self.width, "pad_token_id": self.padding_id},
            "vision_config": made.vision,
            "image_token_id": self.image_id,
            **made.whole,
        }

    def pixels(self) -> Values:
        """The settings of the image processor. Raises CheckpointError."""
        found = dict(self.described().pixels)
        if self.row.normalized:
            for key in ("image_mean", "image_std"):
                value = self.value(key)
                is_color = isinstance(value, list) and [type(x) for x in value] == [float] * 3
                lowest = 1e-3 if key == "image_std" else 0
                is_color = is_color and all(lowest <= x <= 1 for x in value)
                check_value(is_color, f"clip.vision.{key}", value, "three numbers from 0 to 1")
                found[key] = value
        return found


# ---- what each type of file says -----------------------------------------------------------------


def tower_values(pair: Pair) -> Values:
    """The sizes that all vision towers have. Raises CheckpointError."""
    width, _, patch, _ = pair.shape("v.patch_embd.weight", 4)
    heads = pair.count("attention.head_count")
    check_value(
        width % heads == 0, "clip.vision.attention.head_count", heads, f"a divisor of {width}"
    )
    # legacy files have the names of the two matrices the other way around
    n_ff = max(pair.shape("v.blk.0.ffn_up.weight", 2))
    if n_ff == width:
        n_ff = min(pair.shape("v.blk.0.ffn_up.weight", 2))
    sizes = {"hidden_size": width, "patch_size": patch, "intermediate_size": n_ff}
    return {**sizes, "num_hidden_layers": pair.num_layers(), "num_attention_heads": heads}


def siglip_values(pair: Pair) -> Values:
    """The sizes of a SigLIP tower, for square images of one size. Raises CheckpointError."""
    values, size = tower_values(pair), pair.count("image_size")
    is_same = size // values["patch_size"] == pair.grid()
    check_value(is_same, "clip.vision.image_size", size, f"a size of {pair.grid()} patches")
    return {**values, "image_size": size, "layer_norm_eps": pair.eps()}


def merged_side(pair: Pair, default: int) -> tuple[int, int]:
    """Patches that become one row, on a side, and the number of rows on a side of an image. Raises
    CheckpointError."""
    factor, side = pair.count("projector.scale_factor", default), pair.grid()
    check_value(factor <= side, "clip.vision.projector.scale_factor", factor, f"at most {side}")
    return factor, side // factor


def idefics_described(pair: Pair) -> Described:
    """SmolVLM and Idefics3: an image in tiles, and once as a whole."""
    vision, (factor, side) = siglip_values(pair), merged_side(pair, 2)
    columns = pair.shape("mm.model.fc.weight", 2)[1]
    needed = vision["hidden_size"] * factor**2
    check_value(columns == needed, "columns of mm.model.fc.weight", columns, f"{needed}")
    tile = vision["image_size"]
    pixels = {
        "size": {"longest_edge": pair.count("preproc_image_size", 4 * tile)},
        "max_image_size": {"longest_edge": tile},
    }
    text = {"model_type": "llama", "hidden_size": pair.width, "pad_token_id": 0}
    whole = {"scale_factor": factor, "text_config": {**text, **ONE_HEAD}}
    return Described(vision, whole, pixels, {"image_seq_len": side**2})


ONE_HEAD = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 2}


def gemma3_described(pair: Pair) -> Described:
    """Gemma 3: an image as a square of one size."""
    vision, (_, side) = siglip_values(pair), merged_side(pair, 4)
    vision["vision_use_head"] = False
    whole = {"mm_tokens_per_image": side**2, "image_token_index": pair.image_id}
    size = {"height": vision["image_size"], "width": vision["image_size"]}
    return Described(vision, whole, {"size": size}, {"image_seq_length": side**2})


def gemma4_described(pair: Pair) -> Described:
    """Gemma 4: images of any shape, in up to 280 rows."""
    vision, patch = tower_values(pair), pair.shape("v.patch_embd.weight", 4)[2]
    axes, places, _ = pair.shape("v.position_embd.weight", 3)
    check_value(axes == 2, "axes of v.position_embd.weight", axes, "2")
    (width,) = pair.shape("v.blk.0.attn_q_norm.weight", 1)
    factor = pair.count("projector.scale_factor", 3)
    check_value(factor < 64, "clip.vision.projector.scale_factor", factor, "below 64")
    vision |= {
        "head_dim": width,
        "num_key_value_heads": pair.shape("v.blk.0.attn_k.weight", 2)[0] // width,
        "rms_norm_eps": pair.eps(),
        "pooling_kernel_size": factor,
        "position_embedding_size": places,
        "use_clipped_linears": any(name.endswith(".input_max") for name in pair.tensors),
        "standardize": "v.std_bias" in pair.tensors,
    }
    pixels = {"patch_size": patch, "pooling_kernel_size": factor}
    return Described(vision, {"audio_config": None}, pixels, {})


def gemma4_unified_described(pair: Pair) -> Described:
    """Gemma 4 12B: as Gemma 4, of whose patches a layer makes rows, without a tower."""
    width, columns = pair.shape("v.patch_embd.weight", 2)
    axes, places, _ = pair.shape("v.position_embd.weight", 3)
    check_value(axes == 2, "axes of v.position_embd.weight", axes, "2")
    patch, factor = pair.count("patch_size"), pair.count("projector.scale_factor", 3)
    needed = 3 * (patch * factor) ** 2
    check_value(columns == needed, "columns of v.patch_embd.weight", columns, f"{needed}")
    vision = {
        "patch_size": patch,
        "pooling_kernel_size": factor,
        "mm_embed_dim": width,
        "output_proj_dims": width,
        "mm_posemb_size": places,
        "rms_norm_eps": pair.eps(),
    }
    pixels = {"patch_size": patch * factor, "pooling_kernel_size": 1}
    return Described(vision, {"audio_config": None}, pixels, {})


def qwen3_described(pair: Pair, least: int = 64) -> Described:
    """Qwen3-VL and Qwen3.5: images of any shape, in squares of patches; in `least` rows or more."""
    sizes, merge = tower_values(pair), pair.count("spatial_merge_size", 2)
    check_value(merge < 64, "clip.vision.spatial_merge_size", merge, "below 64")
    patch = sizes["patch_size"]
    vision = {
        "depth": sizes["num_hidden_layers"],
        "num_heads": sizes["num_attention_heads"],
        "hidden_size": sizes["hidden_size"],
        "intermediate_size": sizes["intermediate_size"],
        "patch_size": patch,
        "temporal_patch_size": 2,
        "spatial_merge_size": merge,
        "out_hidden_size": pair.width,
    }
    if "v.position_embd.weight" in pair.tensors:
        vision["num_position_embeddings"] = pair.grid() ** 2
    if pair.model_type.startswith("qwen3_vl"):
        vision["deepstack_visual_indexes"] = deep_layers(pair)
    square = (patch * merge) ** 2  # pixels of a row of the prompt
    size = {
        "shortest_edge": pixels_of(pair, "image_min_pixels", least * square),
        "longest_edge": pixels_of(pair, "image_max_pixels", 16384 * square),
    }
    pixels = {"size": size, "patch_size": patch, "temporal_patch_size": 2, "merge_size": merge}
    return Described(vision, {}, pixels, {})


def qwen2_described(pair: Pair) -> Described:
    """Qwen2-VL and Qwen2.5-VL, whose layers but each n-th see a window."""
    made, merge = qwen3_described(pair, least=4), pair.count("spatial_merge_size", 2)
    vision, sizes = made.vision, tower_values(pair)
    for key in ("num_position_embeddings", "deepstack_visual_indexes"):
        vision.pop(key, None)
    if pair.model_type == "qwen2_vl":
        width, n_ff = sizes["hidden_size"], vision.pop("intermediate_size")
        check_value(n_ff % width == 0, "rows of v.blk.0.ffn_up.weight", n_ff, f"a multiple {width}")
        vision |= {"embed_dim": width, "mlp_ratio": n_ff // width}
        vision["hidden_size"] = vision.pop("out_hidden_size")
    else:
        step, window = pair.count("n_wa_pattern"), pair.count("window_size", 112)
        square = vision["patch_size"] * merge
        check_value(window >= square, "clip.vision.window_size", window, f"at least {square}")
        vision["window_size"] = window
        vision["fullatt_block_indexes"] = [*range(step - 1, vision["depth"], step)]
    text = {"hidden_size": pair.width, "pad_token_id": pair.padding_id, **ONE_HEAD}
    return Described(vision, {"text_config": text}, made.pixels, {})


def deep_layers(pair: Pair) -> list[int]:
    """The layers of the tower of which layers of the text get rows, too."""
    found = (re.match(r"v\.deepstack\.(\d+)\.norm\.weight", name) for name in pair.tensors)
    return sorted(int(match[1]) for match in found if match)


def pixels_of(pair: Pair, key: str, default: int) -> int:
    value = pair.value(key, default)
    is_area = type(value) is int and 0 < value < 2**28
    check_value(is_area, f"clip.vision.{key}", value, "a number of pixels")
    return int(value)


PROJECTORS = {
    "idefics3": Projector(
        {"llama": "idefics3"}, "Idefics3", {"image_token": "<image>"}, idefics_described
    ),
    "gemma3": Projector(
        {"gemma3_text": "gemma3"},
        "Gemma3",
        {
            "boi_token": "<start_of_image>",
            "image_token": "<image_soft_token>",
            "eoi_token": "<end_of_image>",
        },
        gemma3_described,
    ),
    "gemma4v": Projector(
        {"gemma4_text": "gemma4"}, "Gemma4", GEMMA4_TOKENS, gemma4_described, normalized=False
    ),
    "gemma4uv": Projector(
        {"gemma4_text": "gemma4_unified"},
        "Gemma4",
        GEMMA4_TOKENS,
        gemma4_unified_described,
        normalized=False,
    ),
    **{
        f"{name}_merger": Projector(
            dict.fromkeys(("qwen2_vl_text", "qwen2_5_vl_text"), model_type),
            "Qwen2VL",
            QWEN_TOKENS,
            qwen2_described,
        )
        for name, model_type in (("qwen2vl", "qwen2_vl"), ("qwen2.5vl", "qwen2_5_vl"))
    },
    "qwen3vl_merger": Projector(
        {f"{name}_text": name for name in ("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe")},
        "Qwen2VL",
        QWEN_TOKENS,
        qwen3_described,
    ),
}


# ---- which file goes with a model ----------------------------------------------------------------


def is_image_part(name: str) -> bool:
    return name.lower().endswith(".gguf") and not GGUF_MODEL.match(name)


def by_type(name: str) -> tuple[int, str]:
    """The order of image parts of one model."""
    found = [i for i, kind in enumerate(TYPES) if re.search(rf"(?i)\b_*{kind}\b", name)]
    return found[0] if found else len(TYPES), name


def candidates(path: Path) -> list[Path]:
    """The image parts beside a model, the preferred one first; those of a folder above it in a
    repository of the hub come last."""
    folders = [path.parent]
    if path.parent.parent.parent.name == "snapshots":
        folders.append(path.parent.parent)
    found = (
        sorted(f for f in folder.glob("*.gguf") if is_image_part(f.name)) for folder in folders
    )
    return [file for files in found for file in sorted(files, key=lambda f: by_type(f.name))]


def beside(path: Path) -> str | None:
    """The image part that the model in a file would be given, if it fits; None without one."""
    return next(map(str, candidates(path)), None) if path.is_file() else None


def open_pair(checkpoint: Checkpoint, file: Path) -> Pair:
    """The image part in `file`, which fits the model. Raises CheckpointError."""
    metadata, tensors = read_gguf(file)
    with errors_about(file):
        kind = metadata.get("general.architecture")
        check_value(kind == "clip", "general.architecture", kind, "clip")
        kinds = (metadata.get(f"clip.{part}projector_type") for part in ("", "vision."))
        projector = str(next(filter(None, kinds), None))
        if projector not in PROJECTORS:
            known = ", ".join(PROJECTORS)
            raise CheckpointError(
                f"projector type {excerpt(projector)} is not supported; supported are: {known}; "
                "take the model in safetensors"
            )
        row, text, width = PROJECTORS[projector], checkpoint.config, checkpoint.config.n_embd
        if text.model_type not in row.texts:
            raise CheckpointError(
                f"an image part of the type {projector} goes with {' or '.join(row.texts)}, "
                f"and {checkpoint.path.name} is {text.model_type}"
            )
        wanted = f"{width}, the width of {checkpoint.path.name}"
        given = metadata.get("clip.vision.projection_dim")
        check_value(given == width, "clip.vision.projection_dim", given, wanted)
        image_id, padding_id = token_ids(checkpoint, row.tokens["image_token"])
        kept = {name: t for name, t in tensors.items() if not re.match(r"(mm\.)?a\.", name)}
        ids = {"image_id": image_id, "padding_id": padding_id}
        model_type = row.texts[text.model_type]
        return Pair(file, projector, model_type, metadata, kept, width, **ids)


def token_ids(checkpoint: Checkpoint, image_token: str) -> tuple[int, int]:
    """The ids of an image's rows and of padding. Raises CheckpointError."""
    values = checkpoint.text.gguf
    if values is None:  # freed: the model is loaded, and was asked before
        return 0, 0
    tokens, padding = values["tokens"], values.get("padding_token_id", 0)
    if image_token not in tokens:
        name = checkpoint.path.name
        raise CheckpointError(f"the vocabulary of {name} has no {image_token}, which it needs")
    is_known = type(padding) is int and 0 <= padding < len(tokens)
    return tokens.index(image_token), padding if is_known else 0


def find_pair(checkpoint: Checkpoint, file: str | None = None) -> Pair:
    """The image part of a model: `file`, or the first that fits of those beside it. Raises
    CheckpointError: why there is none."""
    path = checkpoint.path
    if checkpoint.format != "gguf":
        other = f"{file}: goes with a model in GGUF, and {path} is none"
        raise CheckpointError(other if file else f"{path}: this model reads no images")
    if file:
        try:
            return open_pair(checkpoint, Path(file).expanduser())
        except OSError as error:
            raise CheckpointError(f"{file}: cannot be read: {error.strerror}") from None
    problem = None
    for candidate in candidates(path):
        try:
            return open_pair(checkpoint, candidate)
        except CheckpointError as error:
            problem = problem or error
        except OSError as error:
            problem = problem or CheckpointError(f"{candidate}: {error.strerror}")
    missing = f"{path.name}: no image part (mmproj-*.gguf) beside it, which images need; "
    raise problem or CheckpointError(f"{missing}pull the model again, or give --mmproj FILE")


# ---- downloads -----------------------------------------------------------------------------------


def model_files(hub: HubRef, names: Iterable[str]) -> list[str]:
    """As the core's, with the image part of a model in GGUF before its weights."""
    names = list(names)
    needed: list[str] = nanollama.model_files(hub, names)
    if not GGUF_MODEL.match(needed[-1]):
        return needed
    folder = needed[-1].rpartition("/")[0]
    found = [
        [n for n in names if n.rpartition("/")[0] == place and is_image_part(n)]
        for place in dict.fromkeys((folder, ""))
    ]
    parts = next(filter(None, found), [])
    return [*sorted(parts, key=by_type)[:1], *needed]
