"""Model families beyond Llama, Mistral and Qwen: Gemma, Phi-3, OLMo, Granite, gpt-oss and others.

Adds       a row of FAMILIES for each further `model_type`.
Seam       `find_family` and `all_families` of the core look here for what their own rows lack.
Remove     delete this file, or a row; a model of such a family then says that it needs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from nanollama import NO_WINDOW, POST_NORMS, PRE_NORMS, CheckpointError, Family, excerpt

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


def check_gemma(values: Values) -> None:
    """Gemma 1's files say gelu and mean its approximation by tanh."""
    key = "hidden_activation" if "hidden_activation" in values else "hidden_act"
    if values.get(key) == "gelu":
        values[key] = "gelu_pytorch_tanh"


def check_gpt_oss(values: Values) -> None:
    """Refuses limits of the activation that `clamped_swiglu` does not have."""
    for key, only in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        if values.get(key, only) != only:
            raise CheckpointError(f"{key} {excerpt(values[key])} is not supported; {only} is")
        values.pop(key, None)


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
        values["rope_local_base_freq"] = own.get("rope.freq_base_swa", 10000.0)


def olmo3_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Adds the RoPE of layers with a window."""
    values["rope_local_base_freq"] = own.get("rope.freq_base_swa", own.get("rope.freq_base"))


def cohere2_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Cohere multiplies logits with the number by which other families divide."""
    if "logits_scaling" in values:
        values["logit_scale"] = values.pop("logits_scaling")


SANDWICH: Values = {"norms": PRE_NORMS + POST_NORMS}
# Names of the norms in families with a norm after each block, in the order of renaming.
POST_NORM_NAMES = {
    "post_attention_layernorm": "post_self_attn_layernorm",
    "pre_feedforward_layernorm": "post_attention_layernorm",
    "post_feedforward_layernorm": "post_mlp_layernorm",
}
EXPERTS: Values = {"norm_topk_prob": True, "n_experts": 8, "n_used": 2}
GEMMA: Values = {"tied": True, "head_dim": 256}
GEMMA2: Values = {**GEMMA, "num_attention_heads": 8, "n_kv_heads": 4, "window": 4096}
GEMMA2 |= {"query_pre_attn_scalar": 256}
GEGLU: Values = {"act": "geglu", "embed_root": True}
MINISTRAL3_ROPE = yarn(16.0, 16384, rope_theta=1e6, mscale=1.0, mscale_all_dim=1.0)
MINISTRAL3_ROPE |= {"llama_4_scaling_beta": 0.1}
FAMILIES: dict[str, Family] = {
    "ministral": Family(keys(131072, n_kv_heads=8, window=4096), gguf=""),
    "ministral3": Family(
        keys(262144, n_kv_heads=8, head_dim=128, eps=1e-5, rope=MINISTRAL3_ROPE),
        gguf="mistral3",
        permuted=True,
    ),
    "mixtral": Family(
        keys(131072, n_kv_heads=8, eps=1e-5, theta=1e6, **EXPERTS),
        gguf="llama",
        gguf_key="expert_count",
        permuted=True,
        switches={"experts": True},
        names={
            "block_sparse_moe": "mlp",
            r"\.w1\.": ".gate_proj.",
            r"\.w3\.": ".up_proj.",
            r"\.w2\.": ".down_proj.",
        },
    ),
    "smollm3": Family(
        keys(32768, n_kv_heads=4, theta=2e6, tied=True, no_rope_layer_interval=4, **NO_WINDOW),
        permuted=True,
    ),
    "phi3": Family(keys(4096, eps=1e-5)),
    "gemma": Family(
        keys(8192, n_kv_heads=16, **GEMMA), plus_one=True, switches=GEGLU, check=check_gemma
    ),
    "gemma2": Family(
        keys(8192, pattern=2, vocab_size=256000, **GEMMA2)
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        plus_one=True,
        switches={**GEGLU, **SANDWICH},
        names=POST_NORM_NAMES,
        from_gguf=gemma_from_gguf,
    ),
    "gemma3_text": Family(
        keys(131072, pattern=6, vocab_size=262208, theta=1e6, rope_local_base_freq=1e4, **GEMMA2),
        gguf="gemma3",
        plus_one=True,
        switches={**GEGLU, **SANDWICH, "qk_norm": "head"},
        names=POST_NORM_NAMES,
        from_gguf=gemma_from_gguf,
    ),
    "olmo2": Family(
        keys(eps=1e-5), switches={"norms": POST_NORMS, "qk_norm": "full"}, names=POST_NORM_NAMES
    ),
    "olmo3": Family(
        keys(eps=1e-5, theta=5e5, rope_local_base_freq=5e5, window=4096, pattern=4),
        gguf="olmo2",
        gguf_key="attention.sliding_window",
        switches={"norms": POST_NORMS, "qk_norm": "full"},
        names=POST_NORM_NAMES,
        from_gguf=olmo3_from_gguf,
    ),
    "olmoe": Family(
        keys(4096, eps=1e-5, n_experts=64, n_used=8), switches={"experts": True, "qk_norm": "full"}
    ),
    "granite": Family(keys(attention_multiplier=1.0), permuted=True),
    "granitemoe": Family(
        keys(attention_multiplier=1.0, **EXPERTS),
        permuted=True,
        switches={"experts": True},
        names={
            r"block_sparse_moe\.router\.layer": "mlp.gate",
            r"block_sparse_moe\.input_linear": "mlp.experts.gate_up_proj",
            r"block_sparse_moe\.output_linear": "mlp.experts.down_proj",
        },
    ),
    "gpt_oss": Family(
        keys(131072, n_kv_heads=8, head_dim=64, eps=1e-5, theta=150000.0, window=128, pattern=2)
        | keys(n_experts=128, n_used=4, norm_topk_prob=True, expert_bias=True)
        | keys(attention_bias=True, rope=yarn(32.0, 4096, truncate=False)),
        gguf="gpt-oss",
        layout="models.gpt_oss:split_experts",
        gguf_values={"rope_parameters": {"truncate": False}},
        switches={"experts": True, "act": "clamped_swiglu", "sinks": True},
        names={
            r"mlp\.router": "mlp.gate",
            r"(?<=experts)\.(gate_up_proj|down_proj)_": r".\1.",
            "sinks$": "sinks.weight",
        },
        check=check_gpt_oss,
    ),
    "nanochat": Family(
        keys(hidden_act="relu2", final_logit_softcapping=15.0),
        gguf="",
        switches={"norm": "weightless", "qk_norm": "head"},
        names={r"mlp\.fc1\.": "mlp.up_proj.", r"mlp\.fc2\.": "mlp.down_proj."},
        decoder="models.nanochat:NanochatDecoder",
    ),
    "seed_oss": Family(
        keys(524288, n_kv_heads=8, head_dim=128, attention_bias=True, attention_out_bias=False)
    ),
    "arcee": Family(keys(4096, eps=1e-5, hidden_act="relu2"), permuted=True),
    "hunyuan_v1_dense": Family(
        keys(eps=1e-5),
        gguf="hunyuan-dense",
        switches={"qk_norm": "after_rope"},
        names={"query_layernorm": "q_norm", "key_layernorm": "k_norm"},
    ),
    "exaone4": Family(
        keys(eps=1e-5, n_kv_heads=32, window=4096, pattern=4, rope_only_in_windows=True),
        switches={"norms": POST_NORMS, "qk_norm": "head"},
        names=POST_NORM_NAMES,
    ),
    "glm4": Family(
        keys(131072, n_kv_heads=2, head_dim=128, eps=1.5625e-7, attention_bias=True)
        | {"partial_rotary_factor": 0.5},
        interleaved=True,
        switches={**SANDWICH, "o_bias": False},
    ),
    "cohere2": Family(
        keys(8192, tied=True, layer_norm_eps=1e-5, logit_scale=0.0625, window=4096, pattern=4)
        | {"rope_only_in_windows": True},
        interleaved=True,
        switches={"norms": PRE_NORMS[:1], "norm": "layer", "parallel": True},
        from_gguf=cohere2_from_gguf,
    ),
    "starcoder2": Family(
        keys(4096, n_kv_heads=2, tied=True, norm_epsilon=1e-5, use_bias=True)
        | {"hidden_act": "gelu_pytorch_tanh"},
        switches={"norm": "layer_bias", "act": "gelu"},
        names={r"mlp\.c_fc\.": "mlp.up_proj.", r"mlp\.c_proj\.": "mlp.down_proj."},
    ),
    "stablelm": Family(
        keys(4096, n_kv_heads=32, layer_norm_eps=1e-5, partial_rotary_factor=0.25),
        switches={"norm": "layer_bias", "o_bias": False},
    ),
}
