"""The configs of families with mamba2 layers: Granite 4 H, Nemotron-H and Falcon-H1.

Adds       what config.json and GGUF metadata say about mamba2 layers, and about the blocks beside
           them, as fields of ModelConfig. This needs no torch, so that a list of models is quick.
Seam       Family.check and Family.from_gguf. Imports models.hybrid_config and models.routing.
Remove     delete this file and the rows of these families.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from nanollama import CheckpointError, ConfigValues, Experts, check_value
from nanollama_extras.models.hybrid_config import conv_taps, kv_heads
from nanollama_extras.models.routing import read_router, without_predictions

Values = dict[str, Any]
KINDS = {  # of layers, in each of their spellings
    "mamba": "mamba",
    "linear_attention": "mamba",
    "attention": "attention",
    "full_attention": "attention",
    "mlp": "mlp",
    "moe": "moe",
}
PATTERN = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}  # Nemotron's, a letter a layer


@dataclasses.dataclass(frozen=True, slots=True)
class Mamba2Shape:
    """Heads and widths of mamba2 layers."""

    heads: int
    head_dim: int
    groups: int  # of heads that share B and C
    d_state: int
    taps: int  # tokens that the convolution sees
    eps: float
    norm: str = "gated"  # of the output times its gate, or "ungated" before the gate, or none
    norm_is_optional: bool = False  # the file says whether it has a norm
    conv_bias: bool = True
    in_bias: bool = False
    out_bias: bool = False
    dt_limits: tuple[float, float] = (0.0, math.inf)

    @property
    def inner(self) -> int:
        """Columns of x, of the gate z and of the output."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """Columns of x | B | C, which the convolution sees."""
        return self.inner + 2 * self.groups * self.d_state

    @property
    def num_floats(self) -> int:
        """Of a state: the inputs of the convolution's earlier taps, and a matrix for each head."""
        return (self.taps - 1) * self.channels + self.inner * self.d_state


def read_limits(values: ConfigValues) -> tuple[float, float]:
    """`time_step_limit`, in which transformers 5 writes infinity as {"__float__": "Infinity"}."""
    limits = values.get("time_step_limit") or (0.0, math.inf)
    is_pair = isinstance(limits, (list, tuple)) and len(limits) == 2
    if is_pair:
        limits = [x.get("__float__") if isinstance(x, Mapping) else x for x in limits]
        limits = [math.inf if x == "Infinity" else x for x in limits]
        is_pair = all(type(x) in (int, float) for x in limits) and 0 <= limits[0] <= limits[1]
    check_value(is_pair, "time_step_limit", limits, "the least and the most of a step")
    return float(limits[0]), float(limits[1])


def read_mamba2(values: ConfigValues, inner: int | None = None, **rest: Any) -> Mamba2Shape:
    """The shape of mamba2 layers, whose output has `inner` columns if the config says so."""
    heads, groups = values.count("mamba_n_heads", most=2**16), values.count("mamba_n_groups", 1)
    head_dim = values.get("mamba_d_head")
    if inner is not None and head_dim in (None, "auto"):
        values["mamba_d_head"] = head_dim = inner // heads
    shape = Mamba2Shape(
        heads=heads,
        head_dim=values.count("mamba_d_head", most=2**16),
        groups=groups,
        d_state=values.count("mamba_d_state", most=2**16),
        taps=conv_taps(values, "mamba_d_conv"),
        eps=values.number("rms_norm_eps", 1e-6),
        conv_bias=bool(values.get("mamba_conv_bias", True)),
        dt_limits=read_limits(values),
        **rest,
    )
    if heads % groups or shape.inner != (shape.inner if inner is None else inner):
        width = f"{heads} heads of width {head_dim} in {groups} groups"
        raise CheckpointError(f"mamba2: {width} do not make {inner or shape.inner} columns")
    return shape


def fields_of(shape: Mamba2Shape, kinds: list[str], **own: Any) -> Values:
    """Fields of ModelConfig for layers of `kinds`, of which those with attention have keys."""
    windows = tuple(None if kind == "attention" else 0 for kind in kinds)
    own = {"mamba2": shape, "kinds": tuple(kinds), **own}
    num_states = kinds.count("mamba")
    return {"windows": windows, "state_bytes": 4 * shape.num_floats * num_states, "own": own}


def named_kinds(listed: Any, known: tuple[str, ...], n_layers: int) -> list[str]:
    """What each layer is, in this module's spelling."""
    is_valid = isinstance(listed, list) and len(listed) == n_layers
    kinds = [KINDS.get(str(kind), "") for kind in listed] if is_valid else [""]
    names = f"a list of {n_layers} of {', '.join(k for k, v in KINDS.items() if v in known)}"
    check_value(set(kinds) <= set(known), "layer_types", listed, names)
    return kinds


def check_granite(values: ConfigValues) -> None:
    """x + m f(norm(x)) in units of m: a layer's output needs no factor, and norms do not see it."""
    factor = values.number("residual_multiplier", 1.0)
    values["embedding_multiplier"] = values.number("embedding_multiplier", 1.0) / factor
    values["rms_norm_eps"] = values.number("rms_norm_eps", 1e-6) / factor**2


def check_granite_hybrid(values: ConfigValues) -> Values:
    """Granite 4: mamba2 or attention in each layer, then an MLP for all tokens (`shared_mlp`),
    beside experts if there are any."""
    n_layers = values.count("num_hidden_layers", most=2**16)
    listed = values.pop("layer_types", None) or values.pop("layers_block_type", None)
    kinds = named_kinds(listed or ["mamba"] * n_layers, ("mamba", "attention"), n_layers)
    width = values.count("shared_intermediate_size")
    fields: Values = {"own": {"kinds": kinds}}
    if "mamba" in kinds:
        inner = values.count("mamba_expand", 2) * values.count("hidden_size")
        has_bias = bool(values.get("mamba_proj_bias"))
        shape = read_mamba2(values, inner, in_bias=has_bias, out_bias=has_bias)
        fields = fields_of(shape, kinds)
    if values.get("num_local_experts"):
        values["num_experts"] = values["num_local_experts"]
        router = dataclasses.replace(read_router(values), n_ff_shared=width)
        n_ff, layers = values.count("intermediate_size"), frozenset(range(n_layers))
        fields["experts"] = experts_of(values, n_ff, layers, True)
        fields["own"] = {**fields["own"], "routing": router}
    values["intermediate_size"] = width
    if values.get("position_embedding_type") != "rope":
        values["no_rope_layers"] = [0] * n_layers
    check_granite(values)
    return fields


def experts_of(values: ConfigValues, n_ff: int, layers: frozenset[int], is_sum: bool) -> Experts:
    """The experts of `layers`, whose weights add up to 1 if `is_sum`."""
    count = values.count("num_experts", most=2**16)
    used = values.count("num_experts_per_tok", most=count)
    return Experts(count, used, n_ff, layers, renormalized=is_sum, bias=False)


def check_nemotron_h(values: ConfigValues) -> Values:
    """Nemotron-H: one block in each layer, which is mamba2, attention without RoPE, an MLP or a
    mixture of experts."""
    pattern = values.get("hybrid_override_pattern")
    listed = values.pop("layers_block_type", None) or values.pop("layer_types", None)
    if listed is None and isinstance(pattern, str):
        listed = [PATTERN.get(letter, letter) for letter in pattern]
    n_layers = len(listed) if isinstance(listed, list) and listed else 1
    kinds = named_kinds(listed, tuple(PATTERN.values()), n_layers)
    values.pop("layer_types", None)
    values.pop("sliding_window", None)
    values["num_hidden_layers"], values["no_rope_layers"] = n_layers, [0] * n_layers
    for theirs, ours in NEMOTRON_KEYS.items():
        if theirs in values:
            values[ours] = values.pop(theirs)
    values["hidden_act"] = act = values.pop("mlp_hidden_act", "relu2")
    check_value(act == "relu2", "mlp_hidden_act", act, "relu2")
    has_bias = bool(values.pop("use_bias", False))
    fields = fields_of(read_mamba2(values, in_bias=has_bias, out_bias=has_bias), kinds)
    if "moe" in kinds:
        latent = values.count("moe_latent_size") if values.get("moe_latent_size") else 0
        values["num_experts"] = values["n_routed_experts"]
        num_shared = values.pop("n_shared_experts", 0)
        shared = values.count("moe_shared_expert_intermediate_size") if num_shared else 0
        router = read_router(values, scoring="sigmoid", correction=True, least=1e-20)
        layers = frozenset(i for i, kind in enumerate(kinds) if kind == "moe")
        n_ff, is_sum = values.count("moe_intermediate_size"), bool(values.get("norm_topk_prob"))
        fields["experts"] = experts_of(values, n_ff, layers, is_sum)
        router = dataclasses.replace(router, n_ff_shared=shared)
        fields["own"] = {**fields["own"], "routing": router, "moe_latent_size": latent}
    return fields


NEMOTRON_KEYS = {
    "conv_kernel": "mamba_d_conv",
    "ssm_state_size": "mamba_d_state",
    "n_groups": "mamba_n_groups",
    "mamba_num_heads": "mamba_n_heads",
    "mamba_head_dim": "mamba_d_head",
    "use_conv_bias": "mamba_conv_bias",
    "layer_norm_epsilon": "rms_norm_eps",
}


def check_falcon_h1(values: ConfigValues) -> Values:
    """Falcon-H1: mamba2 and attention beside each other in each layer. What its multipliers scale
    is folded into the weights, as GGUF files have it."""
    n_layers, n_embd = values.count("num_hidden_layers", most=2**16), values.count("hidden_size")
    for key in ("layer_types", "layers_block_type"):
        values.pop(key, None)
    inner = values.count("mamba_d_ssm", values.count("mamba_expand", 2) * n_embd)
    is_gated = not values.get("mamba_norm_before_gate", True)
    norm = ("gated" if is_gated else "ungated") if values.get("mamba_rms_norm") else ""
    shape = read_mamba2(
        values,
        inner,
        norm=norm,
        norm_is_optional=bool(values.get("mamba_norm_is_optional")),
        in_bias=bool(values.get("mamba_proj_bias")),
        out_bias=bool(values.get("projectors_bias")),
    )
    values["logit_scale"] = values.number("lm_head_multiplier", 1.0)
    factors: Values = {key: values.number(key, 1.0) for key in FALCON_FACTORS}
    for key, count in (("mlp_multipliers", 2), ("ssm_multipliers", 5)):
        listed = values.get(key) or [1.0] * count
        is_valid = isinstance(listed, list) and [type(x) in (int, float) for x in listed]
        check_value(is_valid == [True] * count, key, listed, f"a list of {count} numbers")
        factors[key] = listed
    own = {"mamba2": shape, "factors": factors}
    windows = (None,) * n_layers
    return {"windows": windows, "state_bytes": 4 * shape.num_floats * n_layers, "own": own}


FALCON_FACTORS = tuple(
    f"{name}_multiplier" for name in ("key", "attention_in", "attention_out", "ssm_in", "ssm_out")
)


def mamba2_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Adds the shape of mamba2 layers."""
    keys = {
        "mamba_n_heads": "time_step_rank",
        "mamba_n_groups": "group_count",
        "mamba_d_state": "state_size",
        "mamba_d_conv": "conv_kernel",
    }
    values.update({theirs: own.get(f"ssm.{ours}") for theirs, ours in keys.items()})
    inner, heads = own.get("ssm.inner_size"), values["mamba_n_heads"]
    if isinstance(inner, int) and isinstance(heads, int) and heads > 0:
        values["mamba_d_head"], values["mamba_d_ssm"] = inner // heads, inner


def granite_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Adds what each layer is: those with mamba2 have no key/value heads."""
    mamba2_from_gguf(own, values)
    heads = values["num_key_value_heads"]
    values["num_key_value_heads"] = kv_heads(heads)
    if isinstance(heads, list):
        values["layer_types"] = ["attention" if num else "mamba" for num in heads]
    shared = values.pop("shared_expert_intermediate_size", None)
    values["shared_intermediate_size"] = shared or values["intermediate_size"]
    values["num_local_experts"] = values.pop("num_experts", 0)
    if own.get("rope.scaling.finetuned", True):
        values["position_embedding_type"] = "rope"


def nemotron_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Adds what each layer is: with key/value heads, or an MLP's width, or else mamba2."""
    mamba2_from_gguf(own, values)
    for theirs, ours in NEMOTRON_KEYS.items():
        if ours in values:
            values[theirs] = values.pop(ours)
    without_predictions(own, values)
    heads, widths = values["num_key_value_heads"], own.get("feed_forward_length")
    values["num_key_value_heads"] = kv_heads(heads)
    values["n_routed_experts"] = count = values.pop("num_experts", 0)
    shared = values.pop("shared_expert_intermediate_size", None)
    values["moe_shared_expert_intermediate_size"] = shared
    if own.get("moe_latent_size"):
        values["moe_latent_size"] = own["moe_latent_size"]
    if isinstance(heads, list) and isinstance(widths, list):
        wide = "moe" if count else "mlp"
        both = list(zip(heads, widths))[: values["num_hidden_layers"]]
        kinds = ["attention" if num else wide if width else "mamba" for num, width in both]
        values["layers_block_type"] = kinds


def falcon_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """The multipliers are in the weights."""
    mamba2_from_gguf(own, values)
    values |= {"mamba_rms_norm": True, "mamba_norm_before_gate": False}
    values["mamba_norm_is_optional"] = True
