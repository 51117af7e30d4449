"""Pairs of GGUF files, a text and its image part, of the tiny models of tests/vision_models.py.

The image part is as llama.cpp's converter writes it, under the gguf package's names of tensors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.torch
import torch

from nanollama import open_checkpoint
from nanollama_extras.files.conversion import Plan, convert_to_gguf

SUFFIXES = (".weight", ".bias", ".input_max", ".input_min", ".output_max", ".output_min")
PROJECTORS = {
    **dict.fromkeys(("idefics3", "smolvlm"), "idefics3"),
    **dict.fromkeys(("qwen3_vl", "qwen3_vl_moe", "qwen3_5", "qwen3_5_moe"), "qwen3vl_merger"),
    "qwen2_vl": "qwen2vl_merger",
    "qwen2_5_vl": "qwen2.5vl_merger",
    "gemma3": "gemma3",
    "gemma4": "gemma4v",
    "gemma4_unified": "gemma4uv",
}
VISION = re.compile(
    r"(model\.)?(vision_tower|vision_model|vision_embedder|visual|multi_modal_projector|connector|embed_vision)\."
)


def write_pair(source: Path, directory: Path, kind: str = "F32") -> Path:
    """A model in two files -> that of the text, `model.gguf`."""
    convert_to_gguf(Plan(open_checkpoint(source), None), directory / "model.gguf")
    write_image_part(source, directory / f"mmproj-model-{kind}.gguf", kind)
    return directory / "model.gguf"


def write_image_part(source: Path, file: Path, kind: str = "F32") -> None:
    config = json.loads((source / "config.json").read_text())
    files = ("preprocessor_config.json", "processor_config.json")
    pixels: dict[str, Any] = {}
    for name in files:
        found = json.loads((source / name).read_text())
        pixels |= {**found, **found.get("image_processor", {})}
    writer = gguf.GGUFWriter(file, "clip")
    writer.add_type("mmproj")
    writer.add_clip_has_vision_encoder(True)
    add_sizes(writer, config, pixels)
    ADD[PROJECTORS[config["model_type"]]](writer, config, pixels)
    for name, tensor in image_tensors(source, config).items():
        is_plain = tensor.dim() < 2 or "embd" in name or tensor.shape[-1] % 32
        used = gguf.GGMLQuantizationType["F32" if is_plain else kind]
        data = gguf.quants.quantize(tensor.float().contiguous().numpy(), used)
        writer.add_tensor(name, data, raw_dtype=used)
    finish(writer)


def add_sizes(writer: Any, config: dict[str, Any], pixels: dict[str, Any]) -> None:
    """MmprojModel.set_gguf_parameters"""
    vision, text = config["vision_config"], config["text_config"]
    writer.add_vision_projection_dim(text["hidden_size"])
    side = int(vision.get("num_position_embeddings", 0) ** 0.5)
    writer.add_vision_image_size(vision.get("image_size") or side * vision["patch_size"] or 224)
    writer.add_vision_patch_size(vision["patch_size"])
    keys = ("embed_dim", "mm_embed_dim", "hidden_size")
    width = next(vision[key] for key in keys if key in vision)
    writer.add_vision_embedding_length(width)
    writer.add_vision_feed_forward_length(vision.get("intermediate_size") or 4 * width)
    writer.add_vision_block_count(vision.get("num_hidden_layers") or vision.get("depth", 0))
    writer.add_vision_head_count(vision.get("num_attention_heads") or vision.get("num_heads", 0))
    writer.add_vision_image_mean(pixels["image_mean"])
    writer.add_vision_image_std(pixels["image_std"])


def add_idefics(writer: Any, config: dict[str, Any], pixels: dict[str, Any]) -> None:
    """SmolVLMModel.set_gguf_parameters"""
    writer.add_clip_projector_type("idefics3")
    writer.add_vision_attention_layernorm_eps(config["vision_config"]["layer_norm_eps"])
    writer.add_vision_projector_scale_factor(config["scale_factor"])
    writer.add_vision_use_gelu(True)
    writer.add_vision_preproc_image_size(pixels["size"]["longest_edge"])


def add_gemma3(writer: Any, config: dict[str, Any], pixels: dict[str, Any]) -> None:
    """Gemma3VisionModel.set_gguf_parameters"""
    vision = config["vision_config"]
    writer.add_clip_projector_type("gemma3")
    writer.add_vision_attention_layernorm_eps(vision["layer_norm_eps"])
    writer.add_vision_use_gelu(True)
    side = int(pixels["image_seq_length"] ** 0.5)
    writer.add_vision_projector_scale_factor(vision["image_size"] // vision["patch_size"] // side)


def add_gemma4(writer: Any, config: dict[str, Any], pixels: dict[str, Any]) -> None:
    """Gemma4VisionAudioModel.set_gguf_parameters; real models have the default factor"""
    writer.add_clip_vision_projector_type("gemma4v")
    writer.add_vision_attention_layernorm_eps(config["vision_config"]["rms_norm_eps"])
    writer.add_vision_projector_scale_factor(pixels["pooling_kernel_size"])


def add_gemma4_unified(writer: Any, config: dict[str, Any], pixels: dict[str, Any]) -> None:
    """Gemma4UnifiedVisionAudioModel.set_gguf_parameters"""
    writer.add_clip_vision_projector_type("gemma4uv")
    writer.add_vision_attention_layernorm_eps(config["vision_config"]["rms_norm_eps"])
    writer.add_vision_projector_scale_factor(config["vision_config"]["pooling_kernel_size"])


def add_qwen3(writer: Any, config: dict[str, Any], pixels: dict[str, Any]) -> None:
    """Qwen3VLVisionModel.set_gguf_parameters, and limits for small pictures"""
    vision = config["vision_config"]
    writer.add_clip_projector_type("qwen3vl_merger")
    writer.add_vision_use_gelu(True)
    writer.add_vision_spatial_merge_size(vision["spatial_merge_size"])
    writer.add_vision_attention_layernorm_eps(config["text_config"]["rms_norm_eps"])
    deep = vision.get("deepstack_visual_indexes", [])
    writer.add_vision_is_deepstack_layers([i in deep for i in range(vision["depth"])])
    for key, name in (("min", "shortest_edge"), ("max", "longest_edge")):
        writer.add_uint32(f"clip.vision.image_{key}_pixels", pixels["size"][name])


def add_qwen2(writer: Any, config: dict[str, Any], pixels: dict[str, Any]) -> None:
    """Qwen2VLVisionModel.set_gguf_parameters, and limits for small pictures and windows"""
    vision = config["vision_config"]
    writer.add_clip_projector_type(PROJECTORS[config["model_type"]])
    if "fullatt_block_indexes" in vision:
        writer.add_vision_use_silu(True)
        writer.add_vision_n_wa_pattern(vision["fullatt_block_indexes"][0] + 1)
        writer.add_uint32("clip.vision.window_size", vision["window_size"])
    writer.add_vision_attention_layernorm_eps(1e-6)
    for key, name in (("min", "shortest_edge"), ("max", "longest_edge")):
        writer.add_uint32(f"clip.vision.image_{key}_pixels", pixels["size"][name])


ADD = {
    "qwen2vl_merger": add_qwen2,
    "qwen2.5vl_merger": add_qwen2,
    "idefics3": add_idefics,
    "gemma3": add_gemma3,
    "gemma4v": add_gemma4,
    "gemma4uv": add_gemma4_unified,
    "qwen3vl_merger": add_qwen3,
}


def image_tensors(source: Path, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The tensors of a model's vision part, as modify_tensors of these classes leaves them."""
    found = {}
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, 64)
    change = CHANGES[PROJECTORS[config["model_type"]]]
    for file in source.glob("*.safetensors"):
        for name, tensor in safetensors.torch.load_file(file).items():
            if VISION.match(name):
                for theirs, part in change(name, tensor, config["vision_config"]).items():
                    plain = theirs.startswith(("v.", "mm."))
                    mapped = theirs if plain else names.get_name(theirs, try_suffixes=SUFFIXES)
                    assert mapped, theirs
                    found[mapped] = part
    return found


def change_siglip(name: str, tensor: torch.Tensor, vision: Any) -> dict[str, torch.Tensor]:
    name = re.sub(r"^(model\.)?vision_tower\.(vision_model\.)?", "vision_tower.vision_model.", name)
    name = re.sub(r"^(model\.)?(?=multi_modal)", "", name).replace("_weight", ".weight")
    if ".head." in name:  # no part of Gemma 3
        return {}
    return {name: tensor + 1 if "soft_emb_norm" in name else tensor}


def change_gemma4(name: str, tensor: torch.Tensor, vision: Any) -> dict[str, torch.Tensor]:
    name = name.replace("model.vision_tower.encoder.", "vision_model.model.")
    name = name.replace(".linear.weight", ".weight")
    if name.endswith("position_embedding_table"):
        name += ".weight"
    if name.endswith("patch_embedder.input_proj.weight"):
        patch = vision["patch_size"]
        tensor = tensor.reshape(-1, patch, patch, 3).permute(0, 3, 1, 2)
    return {name: tensor if tensor.dim() else tensor.unsqueeze(0)}


def change_gemma4_unified(name: str, tensor: torch.Tensor, _: Any) -> dict[str, torch.Tensor]:
    part = re.sub(r".*(vision_embedder|embed_vision)\.(multimodal_embedder\.)?", "", name)
    if part.startswith(("patch_dense.w", "patch_ln1")):  # columns are those of ggml's im2col
        side = int((tensor.shape[-1] // 3) ** 0.5)
        tensor = tensor.unflatten(-1, (side, side, 3)).movedim(-1, -3).flatten(-3)
    part = part.replace("patch_dense", "v.patch_embd").replace("patch_ln", "v.patch_norm.")
    part = part.replace("pos_norm", "v.patch_norm.3").replace("embedding_proj", "mm.input_proj")
    if part == "pos_embedding":
        return {"v.position_embd.weight": tensor.transpose(0, 1)}
    return {part: tensor}


def change_qwen2(name: str, tensor: torch.Tensor, vision: Any) -> dict[str, torch.Tensor]:
    name = name.removeprefix("model.")
    if ".qkv." in name:
        return {name.replace("qkv", x): part for x, part in zip("qkv", tensor.chunk(3))}
    if name == "visual.patch_embed.proj.weight":
        return {f"v.patch_embd.weight{'.1' * i}": tensor[:, :, i] for i in (0, 1)}
    return {name: tensor}


def change_qwen3(name: str, tensor: torch.Tensor, vision: Any) -> dict[str, torch.Tensor]:
    name = name.removeprefix("model.")
    if found := re.fullmatch(r"visual\.deepstack_merger_list\.(\d+)\.(linear_)?(.+)", name):
        layer = vision["deepstack_visual_indexes"][int(found[1])]
        return {f"v.deepstack.{layer}.{found[3]}": tensor}
    if found := re.fullmatch(r"visual\.merger\.linear_fc(\d)\.(\w+)", name):
        return {f"mm.{ {'1': 0, '2': 2}[found[1]] }.{found[2]}": tensor}
    if name.startswith("visual.merger.norm"):
        return {name.replace("visual.merger.norm", "v.post_ln"): tensor}
    if name == "visual.patch_embed.proj.weight":
        return {f"v.patch_embd.weight{'.1' * i}": tensor[:, :, i] for i in (0, 1)}
    return {name: tensor}


CHANGES = {
    "idefics3": lambda name, tensor, _: {name: tensor},
    "gemma3": change_siglip,
    "gemma4v": change_gemma4,
    "gemma4uv": change_gemma4_unified,
    "qwen2vl_merger": change_qwen2,
    "qwen2.5vl_merger": change_qwen2,
    "qwen3vl_merger": change_qwen3,
}


def rewritten(
    file: Path,
    changed: dict[str, Any],
    tensors: dict[str, Any] | None = None,
    rename: Callable[[str], str] = str,
) -> Path:
    """The file with other values of keys (None removes one), other tensors and other names."""
    reader = gguf.GGUFReader(file)
    fields = {
        name: (field.contents(), field.types)
        for name, field in reader.fields.items()
        if not name.startswith("GGUF.") and name != "general.architecture"
    }
    data = {t.name: (np.array(t.data), t.tensor_type) for t in reader.tensors}
    del reader
    writer = gguf.GGUFWriter(file, changed.pop("general.architecture", "clip"))
    for name, (value, types) in fields.items():
        if name not in changed:
            writer.add_key_value(name, value, types[0], types[-1] if len(types) > 1 else None)
    for name, value in changed.items():
        if value is not None:
            inner = gguf.GGUFValueType.get_type(value[0]) if isinstance(value, list) else None
            writer.add_key_value(name, value, gguf.GGUFValueType.get_type(value), inner)
    for name, (array, kind) in data.items():
        array = (tensors or {}).get(name, array)
        if array is not None:
            writer.add_tensor(rename(name), np.ascontiguousarray(array), raw_dtype=kind)
    finish(writer)
    return file


def finish(writer: Any) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
