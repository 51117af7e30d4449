"""How a mixture of experts chooses: the data of models.routers, read from config.json or GGUF.

Adds       `Routing`, and `read_router`, which makes it of the keys that DeepSeek-V3 introduced;
           `check` and `from_gguf` of families that differ from Llama by their router.
Seam       rows of families.py name these; what they return is for ModelConfig.own.
Remove     delete this file with routers.py; models with such routers then say what they need.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from nanollama import CheckpointError, ConfigValues, check_value, excerpt, positive

Values = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Routing:
    """The weights of a token's experts, from the router's scores."""

    scoring: str = "softmax"  # or "sigmoid", "sparsemixer"
    correction: bool = False  # a bias is added to weights, to choose experts and for nothing else
    num_groups: int = 1
    groups_used: int = 1  # experts are chosen in the best groups only
    group_best: int = 2  # so many of a group's experts, added up, decide how good it is
    factor: float = 1.0  # of all weights
    least: float = 0.0  # added to the sum by which weights are divided
    jitter: float = 0.0  # sparsemixer's distance of scores that count as equal, relative
    scales_input: bool = False  # an expert's input has the weight, not its output
    n_ff_shared: int = 0  # width of an expert, without a gate, that every token goes to


# names of tensors in safetensors files -> the decoder's
CORRECTION = "gate.e_score_correction.bias"
ROUTED_NAMES = {
    r"gate\.e_score_correction_bias$": CORRECTION,
    r"shared_experts\.": "shared_expert.",
}

# GGUF metadata under {arch} -> key of config.json
GGUF_KEYS = {
    "expert_shared_count": "n_shared_experts",
    "expert_group_count": "n_group",
    "expert_group_used_count": "topk_group",
    "expert_weights_scale": "routed_scaling_factor",
    "expert_weights_norm": "norm_topk_prob",
    "leading_dense_block_count": "first_k_dense_replace",
}


def read_router(values: ConfigValues, **fixed: Any) -> Routing:
    """The Routing of `values`, whose other keys of experts become those of the core. `fixed` are
    fields that the family, and no key, decides."""
    if "n_routed_experts" in values:
        values["num_experts"] = values["n_routed_experts"]
    if "mlp_only_layers" not in values:
        values["mlp_only_layers"] = dense_layers(values)
    count = values.count("num_experts", most=2**16)
    groups, used = values.count("n_group", 1), values.count("topk_group", 1)
    best = fixed.setdefault("group_best", 2)
    if groups > 1 and (count % groups or used > groups or count // groups < best):
        raise CheckpointError(f"{count} experts in {groups} groups, of which {used} are used")
    if (num_used := values.count("num_experts_per_tok")) > count // groups * used:
        raise CheckpointError(f"{num_used} experts are used, of {used} groups of {count // groups}")
    width = 0
    if values.get("n_shared_experts"):
        width = values.count("n_shared_experts") * values.count("moe_intermediate_size")
    return Routing(
        num_groups=groups,
        groups_used=used,
        factor=values.number("routed_scaling_factor", 1.0),
        n_ff_shared=width,
        **fixed,
    )


def dense_layers(values: ConfigValues) -> list[int]:
    """The layers without experts: the first `first_k_dense_replace`, and of the others all but
    every `moe_layer_freq`-th."""
    first, step = values.get("first_k_dense_replace", 0), values.count("moe_layer_freq", 1)
    is_number = type(first) is int and first >= 0
    check_value(is_number, "first_k_dense_replace", first, "a number of layers")
    n_layers = values.count("num_hidden_layers", most=2**16)
    return [i for i in range(n_layers) if i < first or i % step]


def without_predictions(own: Mapping[str, Any], values: Values) -> None:
    """GGUF files count the blocks that predict further tokens as layers."""
    num_extra = own.get("nextn_predict_layers", 0)
    if isinstance(num_extra, int) and isinstance(values["num_hidden_layers"], int):
        values["num_hidden_layers"] -= num_extra


# ---- families ------------------------------------------------------------------------------------


def routed(values: ConfigValues, **fixed: Any) -> Values:
    """The router of `values`, as a field of ModelConfig."""
    return {"own": {"routing": read_router(values, **fixed)}}


def check_glm4_moe(values: ConfigValues) -> Values:
    """Adds the router; some of these models norm queries and keys."""
    router = routed(values, scoring="sigmoid", correction=True, least=1e-20)
    return {**router, "qk_norm": "head" if values.get("use_qk_norm") else ""}


def check_minimax_m2(values: ConfigValues) -> Values:
    """Adds the router; files on the hub count the columns that RoPE turns."""
    if n_rot := values.get("rotary_dim"):
        width = values.count("head_dim")
        values["partial_rotary_factor"] = positive(n_rot, "rotary_dim") / width
    return routed(values, scoring="sigmoid", correction=True)


def check_ernie_moe(values: ConfigValues) -> Values:
    """Adds the router, whose bias corrects the choice alone; every n-th layer from a first to a
    last one has experts."""
    values["num_experts"] = values.count("moe_num_experts")
    values["num_experts_per_tok"] = values.count("moe_k")
    values["n_shared_experts"] = values.get("moe_num_shared_experts")
    n_layers = values.count("num_hidden_layers", most=2**16)
    first: Any = values.get("moe_layer_start_index")
    last: Any = values.get("moe_layer_end_index")
    for name, index in (("moe_layer_start_index", first), ("moe_layer_end_index", last)):
        check_value(type(index) is int, name, index, "a number")
    sparse = range(first, n_layers if last == -1 else last + 1)
    step = values.count("moe_layer_interval")
    dense = [i for i in range(n_layers) if (i + 1) % step or i not in sparse]
    values["mlp_only_layers"] = dense
    return routed(values, correction=True, least=1e-12)


def check_phimoe(values: ConfigValues) -> Values:
    """Adds the router, which always chooses two experts. `sliding_window` has no effect."""
    values.pop("sliding_window", None)
    if values.get("num_experts_per_tok") != 2:
        used = excerpt(values.get("num_experts_per_tok"))
        raise CheckpointError(f"num_experts_per_tok is {used}; 2 is needed")
    jitter = values.number("router_jitter_noise")
    return routed(values, scoring="sparsemixer", jitter=jitter)


def glm4_moe_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Takes off the blocks that predict further tokens; the count of experts has another name."""
    without_predictions(own, values)
    values["n_routed_experts"] = values.pop("num_experts", None)


def ernie_moe_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Renames what counts experts. The width of the shared one is that of its parts."""
    values.pop("shared_expert_intermediate_size", None)
    renamed = {
        "moe_num_experts": "expert_count",
        "moe_k": "expert_used_count",
        "moe_num_shared_experts": "expert_shared_count",
        "moe_layer_start_index": "leading_dense_block_count",
        "moe_layer_interval": "interleave_moe_layer_step",
    }
    values |= {theirs: own[ours] for theirs, ours in renamed.items() if ours in own}
