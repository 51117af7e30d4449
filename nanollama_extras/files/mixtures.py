"""Which type each tensor of a quantized GGUF file has.

Adds       `MIXTURES`, the names that --quantize accepts, and `kinds`, which follows the rules of
           llama.cpp's quantizer: more bits for the head, for values and for down projections.
Seam       files.conversion calls it. No other extra is imported.
Remove     delete this file with commands/convert.py.
Source     https://github.com/ggml-org/llama.cpp/blob/master/src/llama-quant.cpp
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import gguf

from nanollama import FLOAT_KINDS


@dataclass(frozen=True, slots=True)
class Mixture:
    """The type of most matrices, and the file's number in general.file_type."""

    kind: str
    file_type: int


def file_type(name: str) -> int:
    return int(gguf.LlamaFileType[name if name == "ALL_F32" else f"MOSTLY_{name}"])


PLAIN = ("F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q6_K")
K_SIZES = ("Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M")
MIXTURES = {
    "F32": Mixture("F32", file_type("ALL_F32")),
    **{name: Mixture(name, file_type(name)) for name in PLAIN},
    **{name: Mixture(name[:4], file_type(name)) for name in K_SIZES},
    "q8": Mixture("Q8_0", file_type("Q8_0")),  # as --quantize of other commands
    "q4": Mixture("Q4_1", file_type("Q4_1")),
}
# Types for rows that 256 does not divide
FALLBACKS = {"Q2_K": "Q4_0", "Q3_K": "Q4_0", "Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}
# Tensors that are never quantized, beside those of one dimension: norms, routers, convolutions
STAYS = re.compile(
    r"_norm\.weight|ffn_gate_inp|altup|laurel|per_layer_model_proj|ssm_conv1d|shortconv\.conv|"
    r"position_embd|token_types|attn_rel_b|(?<!weight)$"
)
HEAD, TABLE = "output.weight", re.compile(r"(per_layer_)?token_embd\.weight")
ROLES = {
    **dict.fromkeys(("attn_v", "attn_qkv", "attn_kv_b"), "value"),
    "attn_k": "key",
    "attn_output": "output",
    "ffn_down": "down",
}
BLOCK = re.compile(
    r"blk\.(\d+)\.(attn_(?:qkv|kv_b|v|k|output)(?=\.weight)|ffn_down(?=\w*\.weight))"
)


def find_mixture(name: str) -> str | None:
    """The key of MIXTURES that a name means, whatever its case; None for another name"""
    return next((key for key in MIXTURES if key.lower() == name.lower()), None)


def fits(kind: str, num_cols: int) -> bool:
    return num_cols % gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][0] == 0


def fitting(kind: str, num_cols: int) -> str:
    """The type, or the one that takes its place for rows that its blocks do not divide"""
    if not fits(kind, num_cols):
        kind = FALLBACKS.get(kind, kind)
    return kind if fits(kind, num_cols) else "F16"


def uses_more_bits(place: int, count: int) -> bool:
    """Whether the matrix of a layer is one of those that mixtures favour."""
    first = count // 8
    return place < first or place >= 7 * count // 8 or (place - first) % 3 == 2


@dataclass(frozen=True, slots=True)
class Shape:
    """What the rules ask about a model."""

    n_layers: int
    gqa: int  # query heads of a key/value head
    n_experts: int
    arch: str
    is_tied: bool


def kinds(name: str, shapes: Mapping[str, tuple[int, ...]], model: Shape) -> dict[str, str]:
    """The type of each tensor of a mixture, by its GGUF name; `shapes` are row-major."""
    blocks = {tensor: block for tensor in shapes if (block := BLOCK.match(tensor))}
    places: dict[str, list[int]] = {"value": [], "down": []}  # layers with such matrices
    for block in blocks.values():
        if (role := ROLES.get(block[2])) in places:
            places[role].append(int(block[1]))
    ranks = {role: {layer: i for i, layer in enumerate(sorted(of))} for role, of in places.items()}

    def rule(tensor: str, num_cols: int) -> str:
        block = blocks.get(tensor)
        role = ROLES.get(block[2], "") if block else ""
        layer = int(block[1]) if block else 0
        if tensor == HEAD or (model.is_tied and TABLE.fullmatch(tensor)):
            usual = "Q8_0" if default == "Q8_0" else "Q6_K"
            return usual if fits(default, num_cols) else "Q8_0"
        if role == "value":
            return value_kind(name, ranks[role][layer], len(ranks[role]), model)
        if role == "down":
            place = layer if model.n_experts > 1 else ranks[role][layer]
            return down_kind(name, place, model.n_layers)
        if role == "output":
            return output_kind(name, model)
        return "Q8_0" if role == "key" and model.n_experts == 8 else default

    default, found = MIXTURES[name].kind, {}
    for tensor, shape in shapes.items():
        if len(shape) < 2 or STAYS.search(tensor):
            found[tensor] = "F32"
        elif default in FLOAT_KINDS:
            found[tensor] = default
        elif name in ("q8", "q4"):
            found[tensor] = library_kind(name, tensor, shape[-1], model.n_layers)
        else:
            found[tensor] = fitting(rule(tensor, shape[-1]), shape[-1])
    return found


def library_kind(name: str, tensor: str, num_cols: int, n_layers: int) -> str:
    """The types of --quantize q4 and q8 while a model runs: 8 bits where 4 would cost most."""
    if not fits("Q8_0", num_cols):
        return "F16"
    last = f"blk.{n_layers - 1}.ffn_"
    is_sensitive = tensor == HEAD or TABLE.fullmatch(tensor) or "attn_v." in tensor
    return "Q8_0" if name == "q8" or is_sensitive or tensor.startswith(last) else "Q4_1"


def value_kind(name: str, place: int, count: int, model: Shape) -> str:
    """The type of the matrix that makes values, which many query heads share"""
    kind = MIXTURES[name].kind
    if name == "Q2_K":
        kind = "Q4_K" if model.gqa >= 4 else "Q3_K"
    elif name == "Q3_K_M":
        kind = "Q5_K" if place < 2 else "Q4_K"
    elif name == "Q3_K_L":
        kind = "Q5_K"
    elif name in ("Q4_K_M", "Q5_K_M") and uses_more_bits(place, count):
        kind = "Q6_K"
    elif name == "Q4_K_S" and place < 4:
        kind = "Q5_K"
    is_70b = model.n_layers == 80 and model.gqa > 1 and model.arch in ("llama", "qwen2")
    if is_70b and kind in ("Q3_K", "Q4_K"):
        kind = "Q5_K"
    return "Q8_0" if model.n_experts == 8 else kind


def down_kind(name: str, place: int, count: int) -> str:
    """The type of the matrix that ends an MLP"""
    if name == "Q2_K":
        return "Q3_K"
    if name == "Q3_K_M":
        return "Q5_K" if place < count // 16 else "Q4_K"
    if name == "Q3_K_L":
        return "Q5_K"
    if name in ("Q4_K_M", "Q5_K_M") and uses_more_bits(place, count):
        return "Q6_K"
    if name == "Q4_K_S" and place < count // 8:
        return "Q5_K"
    return MIXTURES[name].kind


def output_kind(name: str, model: Shape) -> str:
    """The type of the matrix that ends attention"""
    if model.n_experts == 8:
        is_small = name in ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M")
        return "Q5_K" if is_small else MIXTURES[name].kind
    more = {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}
    return more.get(name, MIXTURES[name].kind)
