"""The configs of families with latent attention (DeepSeek V2 and V3, GLM-4.7-Flash, Mistral 4).

Adds       the rows of these families, and what config.json and GGUF metadata say about latents, as
           fields of ModelConfig. This needs no torch, so that a list of models is quick.
Seam       models.families has the rows. models.routing reads the keys of routers; imports
           models.rows.
Remove     delete this file with models.mla, and the line of models.families.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import nanollama
from nanollama import CheckpointError, ConfigValues, Family, check_value, excerpt, positive
from nanollama_extras.models import routing
from nanollama_extras.models.rows import Values, family, keys, yarn

nanollama.GGUF_TENSORS |= {
    "attn_q_a_norm": "self_attn.q_a_layernorm",
    "attn_kv_a_norm": "self_attn.kv_a_layernorm",
    "attn_kv_a_mqa": "self_attn.kv_a_proj_with_mqa",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in ("q_a", "q_b", "k_b", "v_b", "kv_b")},
}


@dataclass(frozen=True, slots=True)
class LatentShape:
    """Widths of latent attention."""

    latent: int  # of what keys and values of all heads are made of
    rope: int  # of the part of queries and keys that has positions; one such key for all heads
    nope: int  # of their part without
    v_dim: int  # of a head's value
    q_latent: int  # of what queries are made of; 0 where they are made of the layer's input
    interleaved: bool  # whether columns 2i and 2i + 1 are rotated together


def check_latent(values: ConfigValues) -> Values:
    """Fields of ModelConfig for latent attention: one key/value head, which is the latent and the
    key with positions. Raises CheckpointError."""

    def count(key: str) -> int:
        return values.count(key, most=2**16)

    shape = LatentShape(
        latent=count("kv_lora_rank"),
        rope=count("qk_rope_head_dim"),
        nope=count("qk_nope_head_dim"),
        v_dim=count("v_head_dim"),
        q_latent=count("q_lora_rank") if values.get("q_lora_rank") else 0,
        interleaved=bool(values.get("rope_interleave", True)),
    )
    width = shape.latent + shape.rope
    values |= {"head_dim": width, "num_key_value_heads": 1}
    scale = (shape.nope + shape.rope) ** -0.5
    written = values.pop("rope_scaling", None) or values.get("rope_parameters") or {}
    values["rope_parameters"] = written
    if isinstance(written, Mapping):
        # half a column more, so that rounding down gives the number of columns
        written = {**written, "partial_rotary_factor": (shape.rope + 0.5) / width}
        values["rope_parameters"] = written
        kind = written.get("rope_type") or written.get("type") or "default"
        if kind != "default" and (weight := written.get("mscale_all_dim")):
            factor = positive(written.get("factor"), "rope: factor")
            weight = positive(weight, "rope: mscale_all_dim")
            scale *= (0.1 * weight * math.log(factor) + 1) ** 2 if factor > 1 else 1
    return {"attn_scale": scale, "kv_planes": 1, "own": {"latent": shape}}


def with_router(values: ConfigValues, **fixed: Any) -> Values:
    """`check_latent`, and the router."""
    fields = check_latent(values)
    router = routing.routed(values, **fixed)
    return {**fields, "own": {**fields["own"], **router["own"]}}


def check_deepseek_v2(values: ConfigValues) -> Values:
    """A softmax whose weights are never divided by their sum; a group is as good as its best."""
    values["norm_topk_prob"] = False
    method = values.get("topk_method")
    known = ("greedy", "group_limited_greedy")
    check_value(method in known, "topk_method", method, " or ".join(known))
    if method == "greedy":
        values |= {"n_group": 1, "topk_group": 1}
    return with_router(values, group_best=1)


def check_deepseek_v3(values: ConfigValues) -> Values:
    """Sigmoids, with a bias for the choice alone; a group is as good as its best two. Some files
    list the layers with experts."""
    kinds = values.get("mlp_layer_types")
    if kinds is not None:
        n_layers = values.count("num_hidden_layers", most=2**16)
        known = ("dense", "sparse")
        is_valid = isinstance(kinds, list) and [k in known for k in kinds] == [True] * n_layers
        check_value(is_valid, "mlp_layer_types", kinds, f"a list of {n_layers} of {known}")
        values["mlp_only_layers"] = [i for i, kind in enumerate(kinds) if kind == "dense"]
    scoring = values.get("scoring_func", "sigmoid")
    if scoring != "sigmoid":
        raise CheckpointError(f"scoring_func {excerpt(scoring)} is not supported; sigmoid is")
    return with_router(values, scoring="sigmoid", correction=True, least=1e-20)


def check_mistral4(values: ConfigValues) -> Values:
    """A softmax; a group is as good as its best two."""
    return with_router(values, least=1e-20)


# experts -> groups and used ones, of models whose older GGUF files leave them out
OLD_GROUPS = {256: (8, 4), 160: (8, 3)}
SIGMOID = 2  # a value of expert_gating_func


def latent_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Adds the widths and the family: `deepseek2` stands for several, which differ by their router.
    Files older than `key_length_mla` have the widths of a head in other keys."""
    routing.glm4_moe_from_gguf(own, values)
    length = own.get("attention.key_length_mla", own.get("attention.key_length"))
    n_rot = own.get("rope.dimension_count")
    is_whole = isinstance(length, int) and isinstance(n_rot, int)
    values |= {
        "kv_lora_rank": own.get("attention.kv_lora_rank"),
        "q_lora_rank": own.get("attention.q_lora_rank"),
        "qk_rope_head_dim": n_rot,
        "qk_nope_head_dim": length - n_rot if is_whole else None,
        "v_head_dim": own.get("attention.value_length_mla", own.get("attention.value_length")),
        "topk_method": "group_limited_greedy",
    }
    gating, is_divided = own.get("expert_gating_func"), values.get("norm_topk_prob")
    if values["model_type"] != "mistral4" and gating != SIGMOID and (gating or not is_divided):
        values["model_type"] = "mistral4" if is_divided else "deepseek_v2"
    groups = OLD_GROUPS.get(values["n_routed_experts"], (1, 1))
    defaults = {"n_group": groups[0], "topk_group": groups[1], "routed_scaling_factor": 1.0}
    defaults |= {"first_k_dense_replace": 0, "n_shared_experts": 0, "norm_topk_prob": False}
    values.update({key: value for key, value in defaults.items() if key not in values})
    rope = values["rope_parameters"]
    if "mscale_all_dim" in rope:  # llama.cpp's converter writes a tenth of it for this architecture
        rope["mscale_all_dim"] *= 10
        rope["mscale"] = rope["mscale_all_dim"]
    if own.get("rope.scaling.type") == "yarn" and values["model_type"] == "mistral4":
        rope.setdefault("llama_4_scaling_beta", 0.1)  # of all such models; not in their files


# ---- the families --------------------------------------------------------------------------------

LATENT: Values = {
    "switches": {"experts": True},
    "names": routing.ROUTED_NAMES | {r"self_attn\.q_proj\.": "self_attn.q_b_proj."},
    "from_gguf": latent_from_gguf,
    "layout": "models.mla:hub_layout",
    "gguf_layout": "models.mla:gguf_layout",
    "decoder": "models.mla:LatentDecoder",
}
LATENT_KEYS: Values = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128}
LATENT_KEYS |= {"v_head_dim": 128, "q_lora_rank": 1536}
DEEPSEEK_V3 = family(
    keys(4096, n_group=8, topk_group=4, n_used=8, n_routed_experts=256, n_shared_experts=1)
    | keys(norm_topk_prob=True, moe_intermediate_size=2048, routed_scaling_factor=2.5)
    | keys(first_k_dense_replace=3, **LATENT_KEYS),
    check=check_deepseek_v3,
    gguf="deepseek2",
    **LATENT,
)
MISTRAL4_ROPE = yarn(128.0, 8192, rope_theta=1e4, mscale=1.0, mscale_all_dim=1.0)
MISTRAL4_ROPE |= {"llama_4_scaling_beta": 0.1}
FAMILIES: dict[str, Family] = {
    "deepseek_v3": DEEPSEEK_V3,
    "kimi_k2": DEEPSEEK_V3,
    "deepseek_v2": family(
        keys(2048, n_routed_experts=64, n_shared_experts=2, moe_intermediate_size=1407)
        | keys(topk_method="greedy", **LATENT_KEYS),
        check=check_deepseek_v2,
        gguf="deepseek2",
        **LATENT,
    ),
    "glm4_moe_lite": family(
        keys(202752, eps=1e-5, n_used=4, n_routed_experts=64, n_shared_experts=1)
        | keys(norm_topk_prob=True, moe_intermediate_size=1536, routed_scaling_factor=1.8)
        | keys(first_k_dense_replace=1, **LATENT_KEYS)
        | {"q_lora_rank": 768, "qk_nope_head_dim": 192, "v_head_dim": 256},
        check=check_deepseek_v3,
        gguf="deepseek2",
        **LATENT,
    ),
    "mistral4": family(
        keys(1048576, n_used=4, n_routed_experts=128, n_shared_experts=1, norm_topk_prob=True)
        | keys(moe_intermediate_size=2048, rope=MISTRAL4_ROPE, **LATENT_KEYS)
        | {"kv_lora_rank": 256, "q_lora_rank": 1024, "qk_nope_head_dim": 64},
        check=check_mistral4,
        gguf="mistral4",
        **LATENT,
    ),
}
