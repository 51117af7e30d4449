"""Vision towers of transformers from the image part of a model in GGUF.

Adds       `open_pair`: the config, processor and model that `vision_towers.open_directory` makes of
           a directory. The processor gets a tokenizer of the names of image tokens alone: its text
           is taken, and the model's own vocabulary makes ids of it.
Seam       models.vision calls it. Imports files.mmproj, which finds such a file and says what is in
           it, and models.vision_towers.
Remove     delete this file with files/mmproj.py.
Source     https://github.com/ggml-org/llama.cpp (gguf-py/gguf/tensor_mapping.py,
           conversion/gemma.py, conversion/qwen3vl.py, conversion/smolvlm.py)
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import tokenizers
import torch
from torch import Tensor

from nanollama import CheckpointError, PackedLinear, TensorSource, check_value, errors_about
from nanollama_extras.files.mmproj import Pair, deep_layers
from nanollama_extras.models.vision_towers import TextWatch, library, new_processor, without_text

Tensors = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Names:
    """transformers' names of the tensors of an image part.

    tower: of the whole tower; layers: of its layers in it; parts: of parts in it; in_layer: of
    parts of a layer; rest: of tensors outside of the tower."""

    tower: str
    layers: str
    parts: Mapping[str, str]
    in_layer: Mapping[str, str]
    rest: Mapping[str, str] = field(default_factory=dict)


SIGLIP_PARTS = {
    "patch_embd": "embeddings.patch_embedding",
    "position_embd": "embeddings.position_embedding",
    "post_ln": "post_layernorm",
}
SIGLIP_LAYER = {
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")},
    **{f"ln{i}": f"layer_norm{i}" for i in (1, 2)},
    "ffn_up": "mlp.fc1",
    "ffn_down": "mlp.fc2",
}
GEMMA4_LAYER = {
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in "qkv"},
    **{f"attn_{part}_norm": f"self_attn.{part}_norm" for part in "qk"},
    **{f"ffn_{part}": f"mlp.{part}_proj" for part in ("gate", "up", "down")},
    "attn_out": "self_attn.o_proj",
    "ln1": "input_layernorm",
    "ln2": "pre_feedforward_layernorm",
    "attn_post_norm": "post_attention_layernorm",
    "ffn_post_norm": "post_feedforward_layernorm",
}
QWEN_LAYER = {
    "attn_qkv": "attn.qkv",
    "attn_out": "attn.proj",
    **{f"ln{i}": f"norm{i}" for i in (1, 2)},
    "ffn_up": "mlp.linear_fc1",
    "ffn_down": "mlp.linear_fc2",
}
QWEN_PARTS = {"patch_embd": "patch_embed.proj", "position_embd": "pos_embed"}
QWEN_PARTS |= {"post_ln": "merger.norm"}
QWEN2_LAYER = {**QWEN_LAYER, "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
QWEN25_LAYER = {**QWEN_LAYER, **{f"ffn_{x}": f"mlp.{x}_proj" for x in ("gate", "up", "down")}}
NAMES = {  # projector type -> names
    "idefics3": Names(
        "model.vision_model",
        "encoder.layers",
        SIGLIP_PARTS,
        SIGLIP_LAYER,
        {"mm.model.fc.weight": "model.connector.modality_projection.proj.weight"},
    ),
    "gemma3": Names(
        "model.vision_tower",
        "encoder.layers",
        SIGLIP_PARTS,
        SIGLIP_LAYER,
        {
            f"mm.{name}.weight": f"model.multi_modal_projector.mm_{name}{suffix}"
            for name, suffix in (("input_projection", "_weight"), ("soft_emb_norm", ".weight"))
        },
    ),
    "gemma4v": Names(
        "model.vision_tower",
        "encoder.layers",
        {"patch_embd": "patch_embedder.input_proj"},
        GEMMA4_LAYER,
        {
            "mm.input_projection.weight": "model.embed_vision.embedding_projection.weight",
            "v.position_embd.weight": "model.vision_tower.patch_embedder.position_embedding_table",
            **{f"v.std_{part}": f"model.vision_tower.std_{part}" for part in ("bias", "scale")},
        },
    ),
    "gemma4uv": Names(
        "model.embed_vision",
        "",
        {"patch_embd": "patch_dense"},
        {},
        {
            "mm.input_projection.weight": (
                "model.embed_vision.multimodal_embedder.embedding_projection.weight"
            ),
            "v.position_embd.weight": "model.embed_vision.pos_embedding",
            **{
                f"v.patch_norm.{i}.{part}": f"model.embed_vision.{name}.{part}"
                for i, name in ((1, "patch_ln1"), (2, "patch_ln2"), (3, "pos_norm"))
                for part in ("weight", "bias")
            },
        },
    ),
    **{
        name: Names(
            "model.visual",
            "blocks",
            {"patch_embd": "patch_embed.proj", "post_ln": "merger.ln_q"},
            layer,
            {
                f"mm.{i}.{part}": f"model.visual.merger.mlp.{i}.{part}"
                for i in (0, 2)
                for part in ("weight", "bias")
            },
        )
        for name, layer in (("qwen2vl_merger", QWEN2_LAYER), ("qwen2.5vl_merger", QWEN25_LAYER))
    },
    "qwen3vl_merger": Names(
        "model.visual",
        "blocks",
        QWEN_PARTS,
        QWEN_LAYER,
        {
            f"mm.{at}.{part}": f"model.visual.merger.linear_fc{i}.{part}"
            for at, i in ((0, 1), (2, 2))
            for part in ("weight", "bias")
        },
    ),
}


def open_pair(pair: Pair, dtype: torch.dtype) -> tuple[Any, Any, Any]:
    """The config, the processor and the model of an image part. Raises PackageError and
    CheckpointError."""
    transformers = library()
    with errors_about(pair.path):
        config = transformers.AutoConfig.for_model(**pair.config())
        processor = pair_processor(pair)
        cut = without_text(config)
        tensors = {name: tensor.to(dtype) for name, tensor in tower_tensors(pair).items()}
        kind = transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING[type(cut)]
        check_shapes(kind, cut, tensors)
        model = kind.from_pretrained(None, config=cut, state_dict=tensors, dtype=dtype)
    return config, processor, model.eval().requires_grad_(False).model


def pair_processor(pair: Pair) -> Any:
    """The family's processor, with what the file says and what the family's own files say."""
    transformers = library()
    names = transformers.models.auto.processing_auto.PROCESSOR_MAPPING_NAMES
    images = getattr(transformers, f"{pair.row.images}ImageProcessorPil")(**pair.pixels())
    base = getattr(transformers, names[pair.model_type])
    parts = {"image_processor": images, "tokenizer": named_tokens(pair.row.tokens)}
    return new_processor(base, parts, pair.described().processor)


def named_tokens(names: Mapping[str, str]) -> TextWatch:
    """A tokenizer that knows these tokens alone; all others are one."""
    transformers = library()
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0}, unk_token="?"))
    words.add_special_tokens([*names.values()])
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="?", pad_token="?", extra_special_tokens=dict(names)
    )
    return TextWatch(fast)


# ---- tensors -------------------------------------------------------------------------------------


def tower_tensors(pair: Pair) -> Tensors:
    """The tensors under transformers' names, as its modules have them. Raises CheckpointError."""
    tensors, names = restored(pair), NAMES[pair.projector]
    deep = {str(layer): i for i, layer in enumerate(deep_layers(pair))}
    return {their_name(name, names, deep, pair): tensor for name, tensor in tensors.items()}


def their_name(name: str, names: Names, deep: Mapping[str, int], pair: Pair) -> str:
    """transformers' name of a tensor. Raises CheckpointError for one that the family lacks."""
    if name in names.rest:
        return names.rest[name]
    form = r"v\.(?:blk\.(\d+)\.)?(\w+)\.(weight|bias|(?:in|out)put_(?:min|max))"
    if found := re.fullmatch(form, name):
        layer, part, suffix = found.groups()
        known = names.parts if layer is None else names.in_layer
        if part in known:
            prefix = names.tower if layer is None else f"{names.tower}.{names.layers}.{layer}"
            inner = ".linear" if is_clipped(pair, part, suffix) else ""
            return f"{prefix}.{known[part]}{inner}.{suffix}"
    if found := re.fullmatch(r"v\.deepstack\.(\d+)\.(norm|fc\d)\.(weight|bias)", name):
        layer, part, suffix = found.groups()
        if layer in deep:
            part = part.replace("fc", "linear_fc")
            return f"{names.tower}.deepstack_merger_list.{deep[layer]}.{part}.{suffix}"
    raise CheckpointError(f"tensor {name[:80]} is unknown for the type {pair.projector}")


def is_clipped(pair: Pair, part: str, suffix: str) -> bool:
    """Whether a weight is inside a module that may clip what goes in and comes out."""
    is_linear = re.fullmatch("attn_(q|k|v|out)|ffn_(gate|up|down)", part)
    return pair.projector == "gemma4v" and suffix == "weight" and bool(is_linear)


def restored(pair: Pair) -> Tensors:
    """The tensors of the file, without what its converter did to them. Raises CheckpointError."""
    found = {name: plain(tensor) for name, tensor in straight(pair).items()}
    if pair.projector == "gemma4uv":
        return with_colors_last(found)
    patches = found["v.patch_embd.weight"]  # (C, 3, P, P)
    if pair.projector.startswith("qwen"):
        found = with_qkv(found)
        second = found.pop("v.patch_embd.weight.1", None)
        if second is None or second.shape != patches.shape:
            raise CheckpointError("tensor v.patch_embd.weight.1 is missing, or of another shape")
        found["v.patch_embd.weight"] = torch.stack((patches, second), dim=2)
    elif pair.projector == "gemma4v":
        found["v.patch_embd.weight"] = patches.permute(0, 2, 3, 1).flatten(1)
        for name in [name for name in found if re.search("put_(min|max)$", name)]:
            found[name] = found[name].reshape(())
    elif pair.projector == "gemma3" and "mm.soft_emb_norm.weight" in found:
        found["mm.soft_emb_norm.weight"] -= 1
    return found


def with_colors_last(tensors: Tensors) -> Tensors:
    """Gemma 4 12B's tensors, whose columns go over colors, rows and columns of a patch."""
    found = dict(tensors)
    found["v.position_embd.weight"] = found["v.position_embd.weight"].transpose(0, 1).contiguous()
    for name in ("v.patch_embd.weight", "v.patch_norm.1.weight", "v.patch_norm.1.bias"):
        if name in found:
            side = math.isqrt(found[name].shape[-1] // 3)
            found[name] = found[name].unflatten(-1, (3, side, side)).movedim(-3, -1).flatten(-3)
    return found


def with_qkv(tensors: Tensors) -> Tensors:
    """The tensors with queries, keys and values of each layer in one."""
    found = dict(tensors)
    for name in tensors:
        parts = [name.replace(".attn_q.", f".attn_{part}.") for part in "qkv"]
        if ".attn_q." in name and all(part in tensors for part in parts):
            whole = torch.cat([found.pop(part) for part in parts])
            found[name.replace(".attn_q.", ".attn_qkv.")] = whole
    return found


def straight(pair: Pair) -> dict[str, TensorSource]:
    """The tensors, of which some files have those of the two steps of MLPs the other way around."""
    tensors = dict(pair.tensors)
    if pair.projector in ("gemma4v", "gemma4uv", "qwen3vl_merger"):
        return tensors
    width = pair.shape("v.patch_embd.weight", 4)[0]
    rows, columns = pair.shape("v.blk.0.ffn_up.weight", 2)
    if columns == width or rows != width:
        return tensors
    swapped = {"ffn_up": "ffn_down", "ffn_down": "ffn_up"}
    return {re.sub("ffn_(up|down)", lambda m: swapped[m[0]], n): t for n, t in tensors.items()}


def plain(tensor: TensorSource) -> Tensor:
    """A tensor in float32."""
    loaded = tensor.load()
    return (loaded.dequantize() if isinstance(loaded, PackedLinear) else loaded).float()


def check_shapes(kind: Any, config: Any, tensors: Tensors) -> None:
    """Raises CheckpointError unless the vision part of a model has just these tensors."""
    with torch.device("meta"):
        known = kind(config).state_dict()
    needed = {n: t for n, t in known.items() if not re.match(r"lm_head|.*(language|text)_model", n)}
    for name in sorted({*needed} ^ {*tensors}):
        problem = "is missing" if name in needed else "does not belong to its vision part"
        raise CheckpointError(f"tensor {name[:120]} {problem}")
    for name, tensor in needed.items():
        shape = tuple(tensors[name].shape)
        check_value(shape == tuple(tensor.shape), f"tensor {name}", shape, f"{tuple(tensor.shape)}")
