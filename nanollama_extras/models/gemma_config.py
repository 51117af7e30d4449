"""The configs of Gemma 1 to 4, 3n and EmbeddingGemma.

Adds       what config.json and GGUF metadata say about them, as fields of ModelConfig, and names of
           tensors. This needs no torch, so that a list of models is quick.
Seam       Family.check and Family.from_gguf. models.gemma4, models.gemma3n and
           models.bidirectional have their layers. Imports models.rows.
Source     https://github.com/huggingface/transformers (src/transformers/models/gemma4)
           https://github.com/ggml-org/llama.cpp (conversion/gemma.py, src/models/gemma4.cpp)
Remove     delete this file and the rows of these families.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, cast

import nanollama
from nanollama import (
    LAYER_TYPES,
    CheckpointError,
    ConfigValues,
    Experts,
    check_value,
    excerpt,
    layer_windows,
    positive,
)
from nanollama_extras.models.rows import list_windows

Values = dict[str, Any]
FULL, SLIDING = LAYER_TYPES
ROPES: Values = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1e6},
    SLIDING: {"rope_type": "default", "rope_theta": 1e4},
}
EVERY = 6  # which layer has no window, unless the config says it
EVERY_3N = 5  # in Gemma 3n

nanollama.GGUF_TENSORS |= {
    "per_layer_token_embd": "model.embed_tokens_per_layer",
    "per_layer_model_proj": "model.per_layer_model_projection",
    "per_layer_proj_norm": "model.per_layer_projection_norm",
    "inp_gate": "per_layer_input_gate",
    "proj": "per_layer_projection",
    "post_norm": "post_per_layer_input_norm",
    "layer_output_scale": "layer_scalar",
    "pre_ffw_norm_2": "post_attention_layernorm_2",
    "post_ffw_norm_1": "post_mlp_layernorm_1",
    "post_ffw_norm_2": "post_mlp_layernorm_2",
    "ffn_gate_up_exps": "mlp.experts.gate_up_proj",
    "altup_proj": "model.altup_projections",
    "altup_unembd_proj": "model.altup_unembed_projections",
    "altup_correct_coef": "altup.correction_coefs",
    "altup_correct_scale": "altup.correct_output_scale",
    "altup_predict_coef": "altup.prediction_coefs",
    "altup_router": "altup.modality_router",
    "altup_router_norm": "altup.router_norm",
    "laurel_l": "laurel.linear_left",
    "laurel_r": "laurel.linear_right",
    "laurel_post_norm": "laurel.post_laurel_norm",
}
# Names in safetensors files -> those of the decoder, after the names of norms
NAMES = {
    r"(layer_scalar|correct_output_scale)$": r"\1.weight",
    r"(?<=\d)\.experts\.": ".mlp.experts.",
    r"router\.proj\.": "mlp.gate.",
    r"router\.(per_expert_scale|scale)$": r"mlp.gate.\1",
    r"^(?:model\.)?language_model\.(?=per_layer_|altup_)": "model.",
}


def check_gemma(values: ConfigValues) -> None:
    """Gemma 1's files say gelu and mean its approximation by tanh. Gemma 3's
    `max_position_embeddings` counts the factor of its RoPE. `query_pre_attn_scalar` is the width
    whose root divides scores."""
    values["embedding_multiplier"] = values.count("hidden_size") ** 0.5
    key = "hidden_activation" if "hidden_activation" in values else "hidden_act"
    if values.get(key) == "gelu":
        values[key] = "gelu_pytorch_tanh"
    rope = values.get("rope_scaling") or values.get("rope_parameters") or {}
    full = rope.get("full_attention") or rope if isinstance(rope, dict) else {}
    if isinstance(full, dict) and full.get("factor"):  # the context is the stretched one
        n_old = values.count("max_position_embeddings") / positive(full["factor"], "rope: factor")
        values.setdefault("original_max_position_embeddings", n_old)
    if values.get("query_pre_attn_scalar") and not values.get("attention_multiplier"):
        values["attention_multiplier"] = values.number("query_pre_attn_scalar") ** -0.5


def check_gemma3(values: ConfigValues) -> Values:
    """EmbeddingGemma's tokens see those after them, too; a window counts tokens on both sides."""
    check_gemma(values)
    if values.get("use_bidirectional_attention") is not True:
        return {}
    del values["use_bidirectional_attention"]
    values["sliding_window"] = values.count("sliding_window") // 2 + 1  # this one and one side
    list_windows(values)
    reach = layer_windows(values)
    return {"windows": (0,) * len(reach), "own": {"reach": reach}}


# Models whose queries are scaled by another width than a head's, which GGUF files leave out:
# https://github.com/ggml-org/llama.cpp/tree/master/src/models (gemma2.cpp, gemma3.cpp)
WIDE_SCALE_LAYERS = {"gemma2": 46, "gemma3_text": 62}  # layers of such a model


def gemma_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Adds the width by which queries are scaled, and the RoPE of layers with a window."""
    model_type, n_heads = values["model_type"], values["num_attention_heads"]
    is_wide = own.get("block_count") == WIDE_SCALE_LAYERS[model_type]
    wide = values["hidden_size"] / max(n_heads, 1)
    values["query_pre_attn_scalar"] = wide if is_wide else values["head_dim"]
    if model_type == "gemma3_text":
        # Ollama's converter has one name for all; the mean of causal states would say little
        embeds = (
            own.get("general.architecture") == "gemma-embedding" or own.get("pooling_type") == 1
        )
        values["use_bidirectional_attention"] = not own.get("attention.causal", not embeds)
        local = own.get("rope.local.freq_base", 10000.0)  # Ollama's converter has its own keys
        values["rope_local_base_freq"] = own.get("rope.freq_base_swa", local)
        if theta := own.get("rope.global.freq_base"):
            values["rope_parameters"].setdefault("rope_theta", theta)


@dataclasses.dataclass(frozen=True, slots=True)
class Gemma4Shape:
    """What ModelConfig has no field for."""

    sources: tuple[int, ...]  # the layer whose keys and values each layer reads: itself, or another
    n_ffs: tuple[int, ...]  # F of each layer
    per_layer: int  # P, the width of embeddings of each layer; 0 for none
    table_rows: int  # tokens that have such embeddings
    k_is_v: bool = False  # layers without a window and without v_proj: their values are their keys


def check_gemma4(values: ConfigValues) -> Values:
    """Fields of ModelConfig that the layers' types decide. Raises CheckpointError."""
    n_layers, kinds = values.count("num_hidden_layers", most=2**16), values.get("layer_types")
    if kinds is None:
        kinds = [SLIDING if (i + 1) % EVERY else FULL for i in range(n_layers)]
    is_valid = isinstance(kinds, list) and [k in LAYER_TYPES for k in kinds] == [True] * n_layers
    check_value(is_valid, "layer_types", kinds, f"a list of {n_layers} of {LAYER_TYPES}")
    values["layer_types"] = kinds = [*kinds[:-1], FULL]  # as transformers has it
    values.count("sliding_window")
    values["embedding_multiplier"] = values.count("hidden_size") ** 0.5
    # among the tokens of an image, in layers with a window
    whole_images = values.get("use_bidirectional_attention") == "vision"
    if whole_images:
        del values["use_bidirectional_attention"]
    window_heads = read_heads(values, kinds)
    read_ropes(values, window_heads[1])
    sources, n_ff = read_sources(values, kinds), values.count("intermediate_size")
    wide = n_ff * (2 if values.get("use_double_wide_mlp") else 1)  # of layers without own keys
    per_layer = values.count("hidden_size_per_layer_input", most=2**16) if has_tables(values) else 0
    shape = Gemma4Shape(
        sources=sources,
        n_ffs=tuple(n_ff if source == i else wide for i, source in enumerate(sources)),
        per_layer=per_layer,
        table_rows=values.count("vocab_size_per_layer_input", values.count("vocab_size")),
        k_is_v=bool(values.get("attention_k_eq_v")),
    )
    fields: Values = {"windows": kept_windows(values, sources), "window_heads": window_heads}
    fields["attn_scale"] = 1.0
    if values.get("enable_moe_block"):
        fields["experts"] = read_experts(values, n_layers)
    return {**fields, "own": {"shape": shape, "whole_images": whole_images}}


def has_tables(values: ConfigValues) -> bool:
    return bool(values.get("hidden_size_per_layer_input"))


def read_heads(values: ConfigValues, kinds: list[str]) -> tuple[int, int]:
    """Key/value heads and their width in layers with a window; those of other layers go to the
    core's keys. Files on the hub count these in keys of their own, version 5.24 in
    `per_layer_config`, by the number of a layer. Raises CheckpointError."""
    own = {"num_key_value_heads": values.count("num_key_value_heads")}
    own["head_dim"] = values.count("head_dim", most=2**16)
    wide = {**own, "head_dim": values.count("global_head_dim", most=2**16)}
    if values.get("attention_k_eq_v") and values.get("num_global_key_value_heads"):
        wide["num_key_value_heads"] = values.count("num_global_key_value_heads")
    listed = values.get("per_layer_config")
    if listed is not None:
        is_object = isinstance(listed, Mapping) and all(
            isinstance(layer, Mapping) and layer.keys() <= own.keys() for layer in listed.values()
        )
        check_value(is_object, "per_layer_config", listed, f"an object with {' or '.join(own)}")
        layers = [{**own, **listed.get(str(i), {})} for i in range(len(kinds))]
        wide = layers[-1]
        is_plain = layers == [wide if kind == FULL else own for kind in kinds]
        check_value(is_plain, "per_layer_config", listed, "one shape for each type of layer")
    n_heads = values.count("num_attention_heads")
    if n_heads % own["num_key_value_heads"] or own["head_dim"] % 2:
        raise CheckpointError(f"{n_heads} heads over {excerpt(own)} do not divide evenly")
    values |= wide
    return own["num_key_value_heads"], own["head_dim"]


def read_ropes(values: ConfigValues, width: int) -> None:
    """The RoPE of layers with a window turns all columns of their narrower heads."""
    written = values.pop("rope_scaling", None) or values.get("rope_parameters") or {}
    check_value(isinstance(written, Mapping), "rope_parameters", written, "an object")
    full, local = (written.get(kind, {}) for kind in LAYER_TYPES)
    if not (full or local):
        full, local = written, {"rope_theta": values.get("rope_local_base_freq", 1e4)}
    is_valid = isinstance(full, Mapping) and isinstance(local, Mapping)
    check_value(is_valid, "rope_parameters", written, "an object for each type of layer")
    values["rope_parameters"] = {
        FULL: {**full},
        SLIDING: {"rope_theta": 1e4, "partial_rotary_factor": 1.0, **local, "head_dim": width},
    }


def read_sources(values: ConfigValues, kinds: list[str]) -> tuple[int, ...]:
    """The layer whose keys and values each layer reads: the last layers read those of the last
    layer of their type before them. Raises CheckpointError."""
    num_shared, key = values.get("num_kv_shared_layers", 0), "num_kv_shared_layers"
    is_valid = type(num_shared) is int and 0 <= num_shared < len(kinds)
    check_value(is_valid, key, num_shared, f"an integer from 0 to {len(kinds) - 1}")
    first = len(kinds) - num_shared
    if missing := {*kinds[first:]} - {*kinds[:first]}:
        raise CheckpointError(f"{key} {num_shared}: no earlier layer is of type {missing.pop()}")
    last = {kind: i for i, kind in enumerate(kinds[:first])}
    return tuple(i if i < first else last[kind] for i, kind in enumerate(kinds))


def kept_windows(values: ConfigValues, sources: tuple[int, ...]) -> tuple[int | None, ...]:
    """The windows of layers, and 0 for those that keep no keys and values of their own."""
    windows = layer_windows(values)
    return tuple(window if sources[i] == i else 0 for i, window in enumerate(windows))


def read_experts(values: ConfigValues, n_layers: int) -> Experts:
    """The experts beside the MLP of each layer."""
    count = values.count("num_experts", most=2**16)
    return Experts(
        count=count,
        num_used=values.count("top_k_experts", most=count),
        n_ff=values.count("moe_intermediate_size"),
        layers=frozenset(range(n_layers)),
        renormalized=True,
        bias=False,
    )


@dataclasses.dataclass(frozen=True, slots=True)
class AltUpShape:
    """What Gemma 3n has beside Gemma 4's shared keys and embeddings for layers."""

    num_streams: int  # A, of which a layer computes one
    active: int  # this one
    scales_output: bool  # whether it is scaled before embeddings for layers are added
    laurel_rank: int
    # of each layer: gates below their mean + cutoff * deviation are 0; None for all gates
    cutoffs: tuple[float | None, ...]


def check_gemma3n(values: ConfigValues) -> Values:
    """Fields of ModelConfig. `query_pre_attn_scalar` means nothing: scores are not scaled."""
    n_layers = values.count("num_hidden_layers", most=2**16)
    list_windows(values)
    kinds = values.setdefault(
        "layer_types", [SLIDING if (i + 1) % EVERY_3N else FULL for i in range(n_layers)]
    )
    is_valid = isinstance(kinds, list) and [k in LAYER_TYPES for k in kinds] == [True] * n_layers
    check_value(is_valid, "layer_types", kinds, f"a list of {n_layers} of {LAYER_TYPES}")
    values.count("sliding_window")
    values["embedding_multiplier"] = values.count("hidden_size") ** 0.5
    sources, n_ffs = read_sources(values, kinds), read_widths(values, n_layers)
    shape = Gemma4Shape(
        sources=sources,
        n_ffs=n_ffs,
        per_layer=values.count("hidden_size_per_layer_input", most=2**16),
        table_rows=values.count("vocab_size_per_layer_input"),
    )
    num_streams, active = values.count("altup_num_inputs", most=8), values.get("altup_active_idx")
    is_valid = type(active) is int and 0 <= active < num_streams
    check_value(is_valid, "altup_active_idx", active, f"an integer from 0 to {num_streams - 1}")
    altup = AltUpShape(
        num_streams=num_streams,
        active=cast("int", active),
        scales_output=bool(values.get("altup_correct_scale")),
        laurel_rank=values.count("laurel_rank", most=2**16),
        cutoffs=read_cutoffs(values, n_layers),
    )
    own = {"shape": shape, "altup": altup}
    return {"windows": kept_windows(values, sources), "attn_scale": 1.0, "own": own}


def read_widths(values: ConfigValues, n_layers: int) -> tuple[int, ...]:
    """F of each layer, which may be a list."""
    widths = values.get("intermediate_size")
    if not isinstance(widths, list):
        widths = [values.count("intermediate_size")] * n_layers
    is_valid = len(widths) == n_layers and all(type(n) is int and 0 < n < 2**31 for n in widths)
    check_value(is_valid, "intermediate_size", widths, f"a number, or a list of {n_layers}")
    values["intermediate_size"] = widths[0]
    return tuple(widths)


def read_cutoffs(values: ConfigValues, n_layers: int) -> tuple[float | None, ...]:
    """Cutoffs of gates. config.json has the share of gates that are 0 if they are normally
    distributed; GGUF files have the cutoffs themselves, and -inf for none."""
    from statistics import NormalDist  # other configs load without it

    key, needed = "activation_sparsity_scale", f"a list of {n_layers} numbers"
    if key not in values:
        key, needed = "activation_sparsity_pattern", f"a list of {n_layers} numbers from 0 to 1"
    num_sparse = 10 if n_layers > 10 else 0
    listed = values.get(key, [0.95] * num_sparse + [0.0] * (n_layers - num_sparse))
    is_list = isinstance(listed, list) and len(listed) == n_layers
    check_value(is_list and all(type(x) in (int, float) for x in listed), key, listed, needed)
    if key == "activation_sparsity_scale":
        check_value(all(x == -math.inf or abs(x) < 1e3 for x in listed), key, listed, needed)
        return tuple(None if x == -math.inf else x for x in listed)
    check_value(all(0 <= x < 1 for x in listed), key, listed, needed)
    return tuple(NormalDist().inv_cdf(x) if x else None for x in listed)


def shared_layers(own: Mapping[str, Any], default: int) -> Any:
    """How many layers share keys and values; published files of Gemma 3n have 10.0 for 10."""
    value = own.get("attention.shared_kv_layers", default)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def gemma3n_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Adds the keys of config.json. Older files leave out how many layers share keys and values;
    all models have 20 others."""
    values["rope_local_base_freq"] = own.get("rope.freq_base_swa", 10000.0)
    num_shared = max(values["num_hidden_layers"] - 20, 0)
    values["num_kv_shared_layers"] = shared_layers(own, num_shared)
    values["vocab_size_per_layer_input"] = values["vocab_size"]
    for theirs, ours in (
        ("embedding_length_per_layer_input", "hidden_size_per_layer_input"),
        ("altup.num_inputs", "altup_num_inputs"),
        ("altup.active_idx", "altup_active_idx"),
        ("activation_sparsity_scale", "activation_sparsity_scale"),
    ):
        if theirs in own:
            values[ours] = own[theirs]


def gemma4_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Adds the keys of config.json. Numbers that layers have in common are lists where they are not
    the same for all layers."""
    slides = own.get("attention.sliding_window_pattern")
    if isinstance(slides, list):
        values["layer_types"] = [LAYER_TYPES[bool(each)] for each in slides]
    values["global_head_dim"] = values["head_dim"]
    values["head_dim"] = own.get("attention.key_length_swa", values["head_dim"])
    heads, n_ff = values["num_key_value_heads"], values["intermediate_size"]
    if isinstance(heads, list) and isinstance(slides, list) and len(heads) == len(slides):
        by_type = {bool(each): num for each, num in zip(slides, heads)}
        values["num_key_value_heads"] = by_type.get(True, heads[0])
        values["num_global_key_value_heads"] = by_type.get(False)
    if isinstance(n_ff, list) and n_ff:
        values["intermediate_size"] = n_ff[0]
        values["use_double_wide_mlp"] = n_ff[-1] == 2 * n_ff[0]
    values["attention_k_eq_v"] = True  # in layers without v_proj
    values["rope_local_base_freq"] = own.get("rope.freq_base_swa", 10000.0)
    values["num_kv_shared_layers"] = shared_layers(own, 0)
    values["hidden_size_per_layer_input"] = own.get("embedding_length_per_layer_input", 0)
    if not values["hidden_size_per_layer_input"]:  # all but E2B and E4B
        values["use_bidirectional_attention"] = "vision"
    values["vocab_size_per_layer_input"] = values["vocab_size"]
    values["enable_moe_block"] = bool(values.get("num_experts"))
    values["top_k_experts"] = values.get("num_experts_per_tok")
