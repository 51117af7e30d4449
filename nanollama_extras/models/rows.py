"""How a row of a family is written: short names of keys, and keys that many families share.

Adds       `family`, which makes a Family whose patterns of windows and of layers without RoPE, in
           config.json and in GGUF metadata, become keys that the core knows; `read_sections`, for
           positions in three dimensions.
Seam       models.families and the modules that it names have their rows made here. Imports
           models.routing, for the keys of routers.
Remove     delete this file with models.families.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from nanollama import (
    LAYER_TYPES,
    CheckpointError,
    ConfigValues,
    Family,
    check_value,
    excerpt,
    layer_windows,
)
from nanollama_extras.models import routing

Values = dict[str, Any]
SHORT_KEYS = {
    "n_ctx": "max_position_embeddings",
    "eps": "rms_norm_eps",
    "n_kv_heads": "num_key_value_heads",
    "theta": "rope_theta",
    "window": "sliding_window",
    "pattern": "sliding_window_pattern",
    "n_experts": "num_experts",
    "n_used": "num_experts_per_tok",
    "rope": "rope_parameters",
    "tied": "tie_word_embeddings",
}


def keys(n_ctx: int | None = None, **values: Any) -> Values:
    """Keys of config.json from their short names."""
    if n_ctx:
        values["n_ctx"] = n_ctx
    return {SHORT_KEYS.get(name, name): value for name, value in values.items()}


def yarn(factor: float, n_old: int, **others: Any) -> Values:
    """rope_parameters of type yarn that stretch a context of `n_old` tokens."""
    stretch = {"factor": factor, "original_max_position_embeddings": n_old}
    return {"rope_type": "yarn", "beta_fast": 32.0, "beta_slow": 1.0, **stretch, **others}


# GGUF metadata under {arch} -> key of config.json
GGUF_KEYS = {
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "residual_scale": "residual_multiplier",
    "use_parallel_residual": "use_parallel_residual",
    **routing.GGUF_KEYS,
}


def list_windows(values: ConfigValues) -> None:
    """`sliding_window_pattern` says which layers have no window: every n-th one; or it has a letter
    for each of n layers, the last one without a window; or a boolean for each layer of the model.
    They become `layer_types`."""
    names = ("sliding_window_pattern", "_sliding_window_pattern")
    pattern = next((values[name] for name in names if name in values), 0)
    if not pattern or values.get("layer_types"):
        return
    n_layers = values.count("num_hidden_layers", most=2**16)
    if isinstance(pattern, list):
        slides = [bool(slide) for slide in pattern]
    else:
        step = len(pattern) if isinstance(pattern, str) else pattern
        if not isinstance(step, int) or step < 1:
            raise CheckpointError(f"sliding_window_pattern is {excerpt(pattern)}; n is needed")
        slides = [(i + 1) % step > 0 for i in range(n_layers)]
    values["layer_types"] = [LAYER_TYPES[slide] for slide in slides]


def list_ropes(values: ConfigValues) -> None:
    """Version 4 writes `rope_local_base_freq`, the theta of layers with a window; SmolLM3 leaves
    out the RoPE of every n-th layer; others have it in layers with a window only."""
    written = values.get("rope_scaling") or values.get("rope_parameters") or {}
    local = values.get("rope_local_base_freq")
    is_plain = isinstance(written, Mapping) and not any(map(written.get, LAYER_TYPES))
    if local is not None and is_plain:
        nested = dict(written), {"rope_theta": local}
        values["rope_parameters"] = dict(zip(LAYER_TYPES, nested))
        values.pop("rope_scaling", None)
    if values.get("no_rope_layer_interval") and not values.get("no_rope_layers"):
        step = values.count("no_rope_layer_interval")
        n_layers = values.count("num_hidden_layers", most=2**16)
        values["no_rope_layers"] = [(i + 1) % step for i in range(n_layers)]
    if values.get("rope_only_in_windows") and any(windows := layer_windows(values)):
        values["no_rope_layers"] = [window or 0 for window in windows]


def read_sections(values: ConfigValues, default: list[int], alternates: bool) -> None:
    """Positions in three dimensions: the sections of columns that time, height and width turn, and
    whether these alternate, go into rope_parameters of type mrope."""
    written = values.pop("rope_scaling", None) or values.get("rope_parameters") or {}
    check_value(isinstance(written, Mapping), "rope_parameters", written, "an object")
    rope = {key: value for key, value in written.items() if not key.startswith("mrope")}
    kind = rope.pop("type", None) or "default"
    rope["rope_type"] = kind = rope.get("rope_type") or kind
    if kind in ("default", "mrope"):
        sections = written.get("mrope_section") or default
        rope |= {"rope_type": "mrope", "mrope_section": sections, "mrope_interleaved": alternates}
    values["rope_parameters"] = rope


def layers_without_rope(values: ConfigValues) -> Values:
    """The field `layer_ropes` if `no_rope_layers` has 0 for some layers."""
    turned, windows = values.get("no_rope_layers"), layer_windows(values)
    if not turned:
        return {}
    is_valid = isinstance(turned, list) and len(turned) >= len(windows)
    check_value(is_valid, "no_rope_layers", turned, f"a list of {len(windows)} numbers")
    ropes = values.get("rope_scaling") or values.get("rope_parameters") or {}
    in_window = isinstance(ropes, Mapping) and any(map(ropes.get, LAYER_TYPES))
    pairs = zip(turned, windows)
    return {"layer_ropes": tuple(in_window * bool(w) if turns else None for turns, w in pairs)}


def family(
    defaults: Values,
    check: Callable[[ConfigValues], Values | None] | None = None,
    from_gguf: Callable[[Mapping[str, Any], Values], None] | None = None,
    **rest: Any,
) -> Family:
    """A row whose keys of config.json become those that the core knows, after `check`."""

    def check_all(values: ConfigValues) -> Values | None:
        more = check(values) if check else None
        list_windows(values)
        list_ropes(values)
        return {**(more or {}), **layers_without_rope(values)}

    def all_from_gguf(own: Mapping[str, Any], values: Values) -> None:
        values.update({theirs: own[ours] for ours, theirs in GGUF_KEYS.items() if ours in own})
        if isinstance(sections := own.get("rope.dimension_sections"), list):
            values["rope_parameters"]["mrope_section"] = sections[:3]
        heads = values["num_key_value_heads"]  # of each layer, in files of Granite 4
        if isinstance(heads, list) and heads and heads == heads[:1] * len(heads):
            values["num_key_value_heads"] = heads[0]
        if from_gguf:
            from_gguf(own, values)

    return Family(defaults, check=check_all, from_gguf=all_from_gguf, **rest)
