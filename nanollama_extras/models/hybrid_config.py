"""The configs of families some of whose layers keep a state instead of keys and values.

Adds       what config.json and GGUF metadata say about such layers, as fields of ModelConfig. This
           needs no torch, so that a list of models is quick.
Seam       Family.check and Family.from_gguf. models.routing reads the keys of routers, models.rows
           those of positions.
Remove     delete this file and the rows of these families.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from nanollama import CheckpointError, ConfigValues, check_value
from nanollama_extras.models.routing import read_router, without_predictions
from nanollama_extras.models.rows import read_sections

Values = dict[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class DeltaNetShape:
    """Heads and widths of gated delta nets."""

    k_heads: int
    v_heads: int
    k_dim: int
    v_dim: int
    taps: int  # tokens that the convolution sees
    tiled: bool  # value head i has key head i % k_heads, not i // (v_heads / k_heads)
    beta: float = 1.0  # most that beta may be; with 2, a state may change its sign
    eps: float | None = None  # of the norm of the output, if it is not that of other norms

    @property
    def channels(self) -> int:
        """Columns of q | k | v."""
        return 2 * self.k_heads * self.k_dim + self.v_heads * self.v_dim

    @property
    def num_floats(self) -> int:
        """Of a state: the inputs of the convolution's earlier taps, and a matrix for each head."""
        return (self.taps - 1) * self.channels + self.v_heads * self.k_dim * self.v_dim


def state_fields(
    values: ConfigValues, kinds: Any, stateful: str, num_floats: int, **own: Any
) -> Values:
    """Fields of ModelConfig for layers of `kinds`, of which those of the kind `stateful` keep
    `num_floats` each. Raises CheckpointError for other kinds."""
    n_layers, known = values.count("num_hidden_layers", most=2**16), (stateful, "full_attention")
    is_valid = isinstance(kinds, list) and [k in known for k in kinds] == [True] * n_layers
    check_value(is_valid, "layer_types", kinds, f"a list of {n_layers} of {known}")
    windows = tuple(0 if kind == stateful else None for kind in kinds)
    return {"windows": windows, "state_bytes": 4 * num_floats * windows.count(0), "own": own}


def kv_heads(counts: Any) -> Any:
    """The number of key/value heads from a list with a number for each layer, 0 without keys."""
    is_listed = isinstance(counts, list) and all(type(count) is int for count in counts)
    return max(counts, default=0) if is_listed else counts


def conv_taps(values: ConfigValues, key: str) -> int:
    """The number of tokens that a convolution sees."""
    taps = values.count(key, most=2**8)
    check_value(taps > 1, key, taps, "an integer from 2 to 256")
    return taps


def check_delta_net(values: ConfigValues) -> Values:
    """Fields of ModelConfig for layers that are gated delta nets. Raises CheckpointError."""
    kinds, every = values.pop("layer_types", None), values.count("full_attention_interval", 4)
    if kinds is None:
        n_layers = values.count("num_hidden_layers", most=2**16)
        kinds = [
            "linear_attention" if (i + 1) % every else "full_attention" for i in range(n_layers)
        ]
    if values.get("model_type") != "qwen3_next":  # the one whose text has positions in one
        read_sections(values, [11, 11, 10], True)
    shape = DeltaNetShape(
        k_heads=values.count("linear_num_key_heads", most=2**16),
        v_heads=values.count("linear_num_value_heads", most=2**16),
        k_dim=values.count("linear_key_head_dim", most=2**16),
        v_dim=values.count("linear_value_head_dim", most=2**16),
        taps=conv_taps(values, "linear_conv_kernel_dim"),
        tiled=bool(values.get("linear_heads_are_tiled")),
    )
    if shape.v_heads % shape.k_heads:
        heads = f"linear_num_value_heads {shape.v_heads}"
        raise CheckpointError(f"{heads} is no multiple of {shape.k_heads} key heads")
    return state_fields(values, kinds, "linear_attention", shape.num_floats, delta_net=shape)


def check_olmo_hybrid(values: ConfigValues) -> Values:
    """OLMo hybrid: as `check_delta_net`, with widths that depend on others, and a RoPE only if it
    has a theta. At least one layer has attention."""
    n_layers = values.count("num_hidden_layers", most=2**16)
    n_heads = values.count("num_attention_heads")
    full = {*range(3, n_layers, 4)} or {n_layers - 1}
    kinds = ["full_attention" if i in full else "linear_attention" for i in range(n_layers)]
    values.setdefault("layer_types", kinds)
    heads = values.count("linear_num_key_heads", n_heads)
    width = values.count(
        "linear_key_head_dim", max(1, values.count("hidden_size") * 3 // heads // 4)
    )
    defaults = {"linear_num_key_heads": heads, "linear_num_value_heads": n_heads}
    defaults |= {"linear_key_head_dim": width, "linear_value_head_dim": 2 * width}
    for key, default in defaults.items():
        values.setdefault(key, default)
    rope = values.get("rope_parameters")
    if isinstance(rope, Mapping) and "rope_theta" in rope and rope["rope_theta"] is None:
        values["no_rope_layers"] = [0] * n_layers
        values.pop("rope_parameters")
    fields = check_delta_net(values)
    beta = 2.0 if values.get("linear_allow_neg_eigval", True) else 1.0
    shape = dataclasses.replace(fields["own"]["delta_net"], beta=beta, eps=1e-5)
    return {**fields, "own": {"delta_net": shape}}


def check_short_conv(values: ConfigValues) -> Values:
    """Fields of ModelConfig for layers that are short convolutions (LFM2). Older files list only
    the layers with attention, and a width of the MLP that is to be rounded. Raises
    CheckpointError."""
    kinds, indices = values.pop("layer_types", None), values.get("full_attn_idxs")
    if kinds is None:
        layers = range(values.count("num_hidden_layers", most=2**16))
        indices = indices if isinstance(indices, list) else layers
        kinds = ["full_attention" if i in indices else "conv" for i in layers]
    if "norm_eps" in values:
        values["rms_norm_eps"] = values["norm_eps"]
    if "tie_embedding" in values:
        values["tie_word_embeddings"] = values["tie_embedding"]
    if "block_ff_dim" in values:
        values["intermediate_size"] = values["block_ff_dim"]
    if values.get("block_auto_adjust_ff_dim"):
        width, multiple = values.count("intermediate_size"), values.count("block_multiple_of", 256)
        width = int(values.number("block_ffn_dim_multiplier", 1.0) * int(2 * width / 3))
        values["intermediate_size"] = -(-width // multiple) * multiple
    taps = conv_taps(values, "conv_L_cache")
    own = {"taps": taps, "conv_bias": bool(values.get("conv_bias"))}
    return state_fields(values, kinds, "conv", (taps - 1) * values.count("hidden_size"), **own)


def check_short_conv_moe(values: ConfigValues) -> Values:
    """As `check_short_conv`, with the router of LFM2-MoE."""
    fields = check_short_conv(values)
    values["first_k_dense_replace"] = values.get("num_dense_layers", 0)
    bias = bool(values.get("use_expert_bias"))
    router = read_router(values, scoring="sigmoid", correction=bias, least=1e-6)
    return fields | {"own": {**fields["own"], "routing": router}}


def short_conv_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Adds the types of layers, of which those with convolutions have no key/value heads."""
    values["conv_L_cache"] = own.get("shortconv.l_cache")
    values["block_auto_adjust_ff_dim"] = False
    values["num_dense_layers"] = own.get("leading_dense_block_count", 0)
    heads = values["num_key_value_heads"]
    values["num_key_value_heads"] = kv_heads(heads)
    if isinstance(heads, list):
        values["layer_types"] = ["full_attention" if num else "conv" for num in heads]


def delta_net_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Adds the heads of delta nets and the types of layers; leaves out layers that predict several
    tokens ahead."""
    keys = {
        "linear_num_key_heads": "group_count",
        "linear_num_value_heads": "time_step_rank",
        "linear_key_head_dim": "state_size",
        "linear_conv_kernel_dim": "conv_kernel",
    }
    values.update({theirs: own.get(f"ssm.{ours}") for theirs, ours in keys.items()})
    inner, heads = own.get("ssm.inner_size"), values["linear_num_value_heads"]
    if isinstance(inner, int) and isinstance(heads, int) and heads > 0:
        values["linear_value_head_dim"] = inner // heads
    without_predictions(own, values)
    recurrent = own.get("attention.recurrent_layers")
    if isinstance(recurrent, list):
        kinds = ["linear_attention" if each else "full_attention" for each in recurrent]
        values["layer_types"] = kinds[: max(values["num_hidden_layers"], 0)]
    if "full_attention_interval" in own:
        values["full_attention_interval"] = own["full_attention_interval"]
    values["num_key_value_heads"] = kv_heads(values["num_key_value_heads"])
    values["linear_heads_are_tiled"] = values["model_type"].startswith("qwen3_5")
