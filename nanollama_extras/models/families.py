"""Model families beyond Llama, Mistral and Qwen: Gemma, Phi-3, OLMo, Granite, gpt-oss and others.

Adds       a row of FAMILIES for each further `model_type`. Their keys of config.json and GGUF that
           the core does not know become keys that it knows.
           Those with states have their configs read by models.hybrid_config and
           models.mamba2_config, Gemma by models.gemma_config; those with latents are rows of
           models.mla_config.
Seam       `find_family` and `all_families` of the core look here for what their own rows lack.
           Imports models.routing, which reads the keys of routers, and models.rows.
Remove     delete this file, or a row; a model of such a family then says that it needs it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import nanollama
from nanollama import (
    LAYER_TYPES,
    NO_WINDOW,
    POST_NORMS,
    PRE_NORMS,
    CheckpointError,
    ConfigValues,
    Family,
    ModelConfig,
    TensorSource,
    check_value,
    excerpt,
)
from nanollama_extras.models import gemma_config, mla_config, routing
from nanollama_extras.models.hybrid_config import (
    check_delta_net,
    check_olmo_hybrid,
    check_short_conv,
    check_short_conv_moe,
    delta_net_from_gguf,
    short_conv_from_gguf,
)
from nanollama_extras.models.mamba2_config import (
    check_falcon_h1,
    check_granite,
    check_granite_hybrid,
    check_nemotron_h,
    falcon_from_gguf,
    granite_from_gguf,
    nemotron_from_gguf,
)
from nanollama_extras.models.routing import CORRECTION, ROUTED_NAMES
from nanollama_extras.models.rows import Values, family, keys, list_ropes, read_sections, yarn

if TYPE_CHECKING:
    from torch import Tensor

nanollama.GGUF_TENSORS |= {
    "exp_probs_b": "mlp.gate.e_score_correction",
    "attn_sub_norm": "self_attn.attn_sub_norm",
    "ffn_sub_norm": "mlp.ffn_sub_norm",
    "ffn_latent_down": "mlp.fc1_latent_proj",
    "ffn_latent_up": "mlp.fc2_latent_proj",
}


CHUNKED = "chunked_attention"
XIELU = ("alpha_p", "alpha_n", "beta", "eps")  # numbers of Apertus's activation


# ---- keys of config.json -------------------------------------------------------------------------


def check_gpt_oss(values: ConfigValues) -> None:
    """Refuses limits of the activation that `clamped_swiglu` does not have."""
    for key, only in (("swiglu_limit", 7.0), ("swiglu_alpha", 1.702)):
        if values.get(key, only) != only:
            raise CheckpointError(f"{key} {excerpt(values[key])} is not supported; {only} is")
        values.pop(key, None)


class Chunk(int):
    """A window of attention that begins anew at its multiples; a negative one for kernels."""

    @property
    def signed(self) -> int:
        return -self

    def reach(self, positions: Tensor) -> Tensor:
        """How many keys a query at each of the positions sees"""
        return positions % self + 1


def check_llama4(values: ConfigValues) -> Values:
    """Adds the router, whose weights scale the experts' input, and chunks as windows; every n-th
    layer has neither RoPE nor chunks."""
    n_layers, width = values.count("num_hidden_layers", most=2**16), "moe_intermediate_size"
    values[width] = values.count("intermediate_size")
    values["intermediate_size"] = values.count("intermediate_size_mlp")
    values["n_shared_experts"] = 1
    step, listed = values.count("interleave_moe_layer_step"), values.get("moe_layers")
    sparse = listed if isinstance(listed, list) else range(step - 1, n_layers, step)
    values["mlp_only_layers"] = [i for i in range(n_layers) if i not in sparse]
    list_ropes(values)
    kinds, turned = values.pop("layer_types", None), values.get("no_rope_layers") or [1] * n_layers
    if kinds is None and isinstance(turned, list):
        kinds = [CHUNKED if turns else LAYER_TYPES[0] for turns in turned]
    is_valid = isinstance(kinds, list) and {*map(str, kinds)} <= {CHUNKED, LAYER_TYPES[0]}
    check_value(is_valid, "layer_types", kinds, f"a list of {CHUNKED} or {LAYER_TYPES[0]}")
    size = values.count("attention_chunk_size") if CHUNKED in kinds else 0
    values.pop("sliding_window", None)
    own = {"use_qk_norm": bool(values.get("use_qk_norm")), "attn_scale": 0.0}
    if values.get("attn_temperature_tuning"):
        own |= {name: values.number(name) for name in ("attn_scale", "floor_scale")}
    router = routing.routed(values, scoring="sigmoid", scales_input=True)
    windows = tuple(Chunk(size) if kind == CHUNKED else None for kind in kinds)
    check_value(len(windows) == n_layers, "layer_types", kinds, f"a list of {n_layers}")
    return {"own": {**own, **router["own"]}, "windows": windows}


def in_three(*sections: int, alternates: bool = False) -> Callable[[ConfigValues], None]:
    """A check that gives tokens positions in three dimensions."""
    return lambda values: read_sections(values, [*sections], alternates)


def check_glm4v_moe(values: ConfigValues) -> Values:
    """GLM-4.5V: as GLM-4.5, with positions in three dimensions."""
    read_sections(values, [8, 12, 12], False)
    return routing.check_glm4_moe(values)


def check_muse(values: ConfigValues) -> Values:
    """Of every four layers, counted from the last, three have a window and RoPE."""
    n_layers = values.count("num_hidden_layers", most=2**16)
    slides = [(n_layers - 1 - i) % 4 > 0 for i in range(n_layers)]
    if "sliding_window_pattern" not in values:
        values.setdefault("layer_types", [LAYER_TYPES[slide] for slide in slides])
    thetas = values.get("layer_rope_theta", slides)
    is_valid = isinstance(thetas, list) and all(type(x) in (int, float, bool) for x in thetas)
    check_value(is_valid, "layer_rope_theta", thetas, f"a list of {n_layers} numbers")
    values["no_rope_layers"] = [int(theta != 0) for theta in thetas]
    values["logit_scale"] = values.number("output_multiplier")
    own = {key: values.number(key) for key in ("qk_scale_factor", "post_norm_eps")}
    return {"own": own}


def muse_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Layers with a window have RoPE. The factor of logits has another name."""
    values["output_multiplier"] = values.pop("logits_scaling", None)
    slides = own.get("attention.sliding_window_pattern")
    if isinstance(slides, list):
        values["layer_rope_theta"] = [int(slide is True) for slide in slides]


def check_bitnet(values: ConfigValues) -> None:
    """Refuses weights that are made ternary anew at each step, or that a scale divides."""
    quantized = values.get("quantization_config")
    if isinstance(quantized, Mapping) and quantized.get("quant_method") == "bitnet":
        for key, only in (("linear_class", "autobitlinear"), ("quantization_mode", "offline")):
            if quantized.get(key) != only:
                given = f"quantization_config: {key} {excerpt(quantized.get(key))}"
                raise CheckpointError(f"{given} is not supported; take the packed weights or GGUF")


def check_apertus(values: ConfigValues) -> Values:
    """Adds the numbers of each layer's activation, which are metadata in a GGUF file."""
    act = values.pop("hidden_act", "xielu")
    check_value(act == "xielu", "hidden_act", act, "xielu")
    n_layers, numbers = values.count("num_hidden_layers", most=2**16), []
    for name in XIELU:
        listed = values.get(f"xielu.{name}")
        if listed is None:
            return {}
        is_valid = isinstance(listed, list) and [type(x) for x in listed] == [float] * n_layers
        check_value(is_valid, f"xielu.{name}", listed, f"a list of {n_layers} numbers")
        numbers.append(listed)
    return {"own": {"xielu": list(zip(*numbers))}}


def changed(
    tensor: TensorSource, change: Callable[[Tensor], Tensor], shape: tuple[int, ...] = ()
) -> TensorSource:
    """A float tensor after `change`, which keeps its shape unless another one is given."""
    load = lambda *rows: change(cast("Tensor", tensor.load(*rows)).float())  # noqa: E731
    return dataclasses.replace(tensor, load=load, shape=shape or tensor.shape)


def plus_one(tensor: TensorSource) -> TensorSource:
    """The weights of a norm that multiplies with 1 + weight."""
    return changed(tensor, lambda x: x + 1)


def norms_plus_one(
    tensors: Mapping[str, TensorSource], config: ModelConfig
) -> dict[str, TensorSource]:
    """Gemma's norms multiply with 1 + weight."""
    return {name: plus_one(t) if "norm" in name else t for name, t in tensors.items()}


# ---- metadata of GGUF files ----------------------------------------------------------------------


def olmo3_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Adds the RoPE of layers with a window."""
    values["rope_local_base_freq"] = own.get("rope.freq_base_swa", own.get("rope.freq_base"))


def gpt_oss_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Adds a number of yarn that gpt-oss leaves out."""
    values["rope_parameters"]["truncate"] = False


def cohere2_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Cohere multiplies logits with the number by which other families divide."""
    if "logits_scaling" in values:
        values["logit_scale"] = values.pop("logits_scaling")


def llama4_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Renames widths, and adds what llama.cpp knows of the models without reading it."""
    values["intermediate_size_mlp"] = values["intermediate_size"]
    values["intermediate_size"] = values.get("moe_intermediate_size")
    values["interleave_moe_layer_step"] = own.get("interleave_moe_layer_step")
    values["use_qk_norm"] = own.get("expert_count") != 128
    if own.get("attention.sliding_window") == 0:
        n_layers = values["num_hidden_layers"]
        values |= {"no_rope_layers": [1] * n_layers, "layer_types": LAYER_TYPES[:1] * n_layers}


def apertus_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Adds the numbers of each layer's activation."""
    for name in XIELU:
        values[f"xielu.{name}"] = own.get(f"xielu.{name}", [])


def phimoe_from_gguf(own: Mapping[str, Any], values: Values) -> None:
    """Replaces the factor on cos and sin by that of Phi-3.5-MoE, which the converter computes by
    Phi-3's formula."""
    if "rope.scaling.attn_factor" in own:
        values["rope_parameters"]["attention_factor"] = PHI_MOE_MSCALE


# ---- the families --------------------------------------------------------------------------------

VARIED = "models.layers:VariedDecoder"
ROUTED = "models.routers:RoutedDecoder"
GRANITE_MOE_NAMES = {
    r"block_sparse_moe\.router\.layer": "mlp.gate",
    r"block_sparse_moe\.input_linear": "mlp.experts.gate_up_proj",
    r"block_sparse_moe\.output_linear": "mlp.experts.down_proj",
    r"shared_mlp\.input_linear": "mlp.shared_expert.gate_up_proj",
    r"shared_mlp\.output_linear": "mlp.shared_expert.down_proj",
}
NEMOTRON_NAMES = {
    r"^backbone\.": "model.",
    r"^model\.embeddings\.": "model.embed_tokens.",
    r"^model\.norm_f\.": "model.norm.",
    r"(layers\.\d+)\.norm\.": r"\1.input_layernorm.",
    r"mixer\.([qkvo]_proj)": r"self_attn.\1",
    r"mixer\.(?=gate\.|experts\.|shared_experts\.|(up|down)_proj|fc[12]_latent)": "mlp.",
    r"\.mixer\.": ".mamba.",
    r"(?<=mlp\.experts)\.(up_proj|down_proj)$": r".\1.weight",
    **ROUTED_NAMES,
}
MIXTRAL_NAMES = {
    "block_sparse_moe": "mlp",
    r"\.w1\.": ".gate_proj.",
    r"\.w3\.": ".up_proj.",
    r"\.w2\.": ".down_proj.",
}
APERTUS_ROPE: Values = {"rope_type": "llama3", "rope_theta": 12e6, "factor": 8.0}
APERTUS_ROPE |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
APERTUS_ROPE |= {"original_max_position_embeddings": 8192}
PHI_MOE_MSCALE = 1.243163121016122
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
GEMMA4: Values = {**GEMMA, "num_attention_heads": 8, "n_kv_heads": 4, "window": 512}
GEMMA4 |= {"global_head_dim": 512, "hidden_size_per_layer_input": 256, "theta": 1e6}
GEMMA4 |= {"vocab_size_per_layer_input": 262144, "rope": gemma_config.ROPES}
PLUS_ONE = "models.families:norms_plus_one"
GEGLU: Values = {"act": "geglu"}
GEMMA4_LAYERS: Values = {
    "check": gemma_config.check_gemma4,
    "switches": {**GEGLU, **SANDWICH, "qk_norm": "head"},
    "names": POST_NORM_NAMES | gemma_config.NAMES,
    "layout": "models.gemma4:hub_layout",
    "decoder": "models.gemma4:Gemma4Decoder",
    "gguf": "gemma4",
    "from_gguf": gemma_config.gemma4_from_gguf,
    "gguf_layout": "models.gemma4:gguf_layout",
}
DELTA_NET: Values = {"linear_num_key_heads": 16, "linear_num_value_heads": 32}
DELTA_NET |= {"linear_key_head_dim": 128, "linear_value_head_dim": 128}
DELTA_NET |= {"linear_conv_kernel_dim": 4}
QWEN_HYBRID: Values = {
    "check": check_delta_net,
    "from_gguf": delta_net_from_gguf,
    "layout": "models.delta_net:hub_layout",
    "gguf_layout": "models.delta_net:gguf_layout",
    "decoder": "models.delta_net:DeltaNetDecoder",
}
SHORT_CONV: Values = {
    "from_gguf": short_conv_from_gguf,
    "gguf_layout": "models.short_conv:gguf_layout",
    "decoder": "models.short_conv:ShortConvDecoder",
    "switches": {"qk_norm": "head"},
    "names": {
        r"feed_forward\.expert_bias$": f"mlp.{CORRECTION}",
        "feed_forward": "mlp",
        "operator_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
        r"model\.embedding_norm": "model.norm",
        r"self_attn\.out_proj": "self_attn.o_proj",
        r"([qk])_layernorm": r"\1_norm",
        r"\.w1\.": ".gate_proj.",
        r"\.w3\.": ".up_proj.",
        r"\.w2\.": ".down_proj.",
    },
}
QWEN_VL: Values = {"switches": {"qkv_bias": True, "o_bias": False}, "check": in_three(16, 24, 24)}
QWEN_VL |= {"gguf": "qwen2vl"}
DEEP: Values = {"decoder": "models.qwen3_vl:DeepDecoder"}
DEEP |= {"check": in_three(24, 20, 20, alternates=True)}
MINISTRAL3_ROPE = yarn(16.0, 16384, rope_theta=1e6, mscale=1.0, mscale_all_dim=1.0)
MINISTRAL3_ROPE |= {"llama_4_scaling_beta": 0.1}
# Sizes of transformers' classes, which configs of whole models leave out of their text part
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
SIZES_LEFT_OUT = {
    "llama": (32000, 4096, 11008, 32),  # LLaVA 1.5 leaves all out but the first
    "mistral": (32000, 4096, 14336, 32),  # Pixtral 12B: the number of heads
    "qwen2": (151936, 4096, 22016, 32),
}


def with_sizes(text: Mapping[str, Any]) -> dict[str, Any]:
    """The config of a text part, with the sizes of its class that it leaves out."""
    sizes = SIZES_LEFT_OUT.get(str(text.get("model_type")))
    usual = {**dict(zip(SIZES, sizes)), "num_attention_heads": 32} if sizes else {}
    return {**usual, **text}


FAMILIES: dict[str, Family] = {
    "ministral": family(keys(131072, n_kv_heads=8, window=4096)),
    "ministral3": family(
        keys(262144, n_kv_heads=8, head_dim=128, eps=1e-5, rope=MINISTRAL3_ROPE),
        gguf="mistral3",
        permuted=True,
    ),
    "mixtral": family(
        keys(131072, n_kv_heads=8, eps=1e-5, theta=1e6, **EXPERTS),
        gguf="llama",
        gguf_key="expert_count",
        permuted=True,
        switches={"experts": True},
        names=MIXTRAL_NAMES,
    ),
    "minimax_m2": family(
        keys(196608, n_kv_heads=8, head_dim=128, theta=5e6, n_experts=256, n_used=8)
        | keys(norm_topk_prob=True),
        check=routing.check_minimax_m2,
        switches={"experts": True, "qk_norm": "full"},
        names=MIXTRAL_NAMES | {r"mlp\.e_score_correction_bias$": f"mlp.{CORRECTION}"},
        decoder=ROUTED,
        gguf="minimax-m2",
    ),
    "smollm3": family(
        keys(32768, n_kv_heads=4, theta=2e6, tied=True, no_rope_layer_interval=4, **NO_WINDOW),
        permuted=True,
        gguf="smollm3",
    ),
    "phi3": family(keys(4096, eps=1e-5), gguf="phi3"),
    "phimoe": family(
        keys(131072, n_kv_heads=8, eps=1e-5, theta=1e6, n_experts=16, n_used=2)
        | {"router_jitter_noise": 0.01},
        check=routing.check_phimoe,
        switches={"experts": True, "norm": "layer_bias"},
        names=MIXTRAL_NAMES | {r"mlp\.router\.": "mlp.gate."},
        from_gguf=phimoe_from_gguf,
        decoder=ROUTED,
        gguf="phimoe",
    ),
    "gemma": family(
        keys(8192, n_kv_heads=16, **GEMMA),
        layout=PLUS_ONE,
        switches=GEGLU,
        check=gemma_config.check_gemma,
        gguf="gemma",
    ),
    "gemma2": family(
        keys(8192, pattern=2, vocab_size=256000, **GEMMA2)
        | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        layout=PLUS_ONE,
        switches={**GEGLU, **SANDWICH},
        names=POST_NORM_NAMES,
        check=gemma_config.check_gemma,
        from_gguf=gemma_config.gemma_from_gguf,
        decoder=VARIED,
        gguf="gemma2",
    ),
    "gemma3_text": family(
        keys(131072, pattern=6, vocab_size=262208, theta=1e6, rope_local_base_freq=1e4, **GEMMA2),
        gguf="gemma3 gemma-embedding",
        layout=PLUS_ONE,
        gguf_layout="models.bidirectional:gguf_layout",
        switches={**GEGLU, **SANDWICH, "qk_norm": "head"},
        names=POST_NORM_NAMES,
        check=gemma_config.check_gemma3,
        from_gguf=gemma_config.gemma_from_gguf,
        decoder="models.bidirectional:new_decoder",
    ),
    "gemma3n_text": family(
        keys(32768, n_kv_heads=2, num_attention_heads=8, window=512, theta=1e6, **GEMMA)
        | keys(rope_local_base_freq=1e4, final_logit_softcapping=30.0, num_kv_shared_layers=15)
        | keys(hidden_size_per_layer_input=256, vocab_size_per_layer_input=262144)
        | keys(altup_num_inputs=4, altup_active_idx=0, altup_correct_scale=True, laurel_rank=64),
        check=gemma_config.check_gemma3n,
        switches={**GEGLU, **SANDWICH, "qk_norm": "head"},
        names=POST_NORM_NAMES | gemma_config.NAMES,
        layout="models.gemma4:hub_layout",
        gguf="gemma3n",
        from_gguf=gemma_config.gemma3n_from_gguf,
        gguf_layout="models.gemma3n:gguf_layout",
        decoder="models.gemma3n:Gemma3nDecoder",
    ),
    "gemma4_text": family(keys(131072, **GEMMA4), **GEMMA4_LAYERS),
    "gemma4_unified_text": family(
        keys(262144, **GEMMA4 | {"window": 1024, "hidden_size_per_layer_input": 0})
        | keys(use_bidirectional_attention="vision"),
        **GEMMA4_LAYERS,
    ),
    "olmo2": family(
        keys(eps=1e-5),
        switches={"norms": POST_NORMS, "qk_norm": "full"},
        names=POST_NORM_NAMES,
        decoder=VARIED,
        gguf="olmo2",
    ),
    "olmo3": family(
        keys(eps=1e-5, theta=5e5, rope_local_base_freq=5e5, window=4096, pattern=4),
        gguf="olmo2",
        gguf_key="attention.sliding_window",
        switches={"norms": POST_NORMS, "qk_norm": "full"},
        names=POST_NORM_NAMES,
        from_gguf=olmo3_from_gguf,
        decoder=VARIED,
    ),
    "olmoe": family(
        keys(4096, eps=1e-5, n_experts=64, n_used=8),
        switches={"experts": True, "qk_norm": "full"},
        decoder=VARIED,
        gguf="olmoe",
    ),
    "granite": family(
        keys(attention_multiplier=1.0), gguf="granite", permuted=True, check=check_granite
    ),
    "granitemoe": family(
        keys(attention_multiplier=1.0, **EXPERTS),
        permuted=True,
        check=check_granite,
        switches={"experts": True},
        names=GRANITE_MOE_NAMES,
        gguf="granitemoe",
    ),
    "granitemoehybrid": family(
        keys(attention_multiplier=1.0, num_local_experts=8, num_experts_per_tok=2, eps=1e-6)
        | keys(norm_topk_prob=True, shared_intermediate_size=1024, mamba_n_heads=128)
        | keys(mamba_d_state=256, mamba_d_conv=4),
        check=check_granite_hybrid,
        names=GRANITE_MOE_NAMES,
        layout="models.mamba2:hub_layout",
        gguf_layout="models.mamba2:gguf_layout",
        from_gguf=granite_from_gguf,
        permuted=True,
        decoder="models.mamba2:GraniteHybridDecoder",
        gguf="granitehybrid",
    ),
    "nemotron_h": family(
        keys(4096, n_kv_heads=8, head_dim=128, layer_norm_epsilon=1e-5, ssm_state_size=128)
        | keys(mamba_num_heads=128, mamba_head_dim=64, n_groups=8, conv_kernel=4)
        | keys(n_routed_experts=8, n_shared_experts=1, moe_intermediate_size=7688, n_used=2)
        | keys(moe_shared_expert_intermediate_size=7688, norm_topk_prob=True)
        | keys(intermediate_size=21504, hybrid_override_pattern="ME*-"),
        check=check_nemotron_h,
        names=NEMOTRON_NAMES,
        layout="models.mamba2:hub_layout",
        gguf_layout="models.mamba2:gguf_layout",
        from_gguf=nemotron_from_gguf,
        decoder="models.mamba2:NemotronDecoder",
        gguf="nemotron_h nemotron_h_moe",
    ),
    "falcon_h1": family(
        keys(8192, n_kv_heads=8, eps=1e-5, mamba_d_ssm=1024, mamba_n_heads=128)
        | keys(mamba_d_state=256, mamba_d_conv=4),
        check=check_falcon_h1,
        names={
            r"feed_forward\.": "mlp.",
            "pre_ff_layernorm": "post_attention_layernorm",
            "final_layernorm": "norm",
        },
        layout="models.mamba2:hub_layout",
        gguf_layout="models.mamba2:gguf_layout",
        from_gguf=falcon_from_gguf,
        decoder="models.mamba2:FalconDecoder",
        gguf="falcon-h1",
    ),
    "gpt_oss": family(
        keys(131072, n_kv_heads=8, head_dim=64, eps=1e-5, theta=150000.0, window=128, pattern=2)
        | keys(n_experts=128, n_used=4, norm_topk_prob=True, expert_bias=True)
        | keys(attention_bias=True, rope=yarn(32.0, 4096, truncate=False)),
        gguf="gpt-oss",
        layout="models.gpt_oss:split_experts",
        from_gguf=gpt_oss_from_gguf,
        switches={"experts": True, "act": "clamped_swiglu", "sinks": True},
        names={
            r"mlp\.router": "mlp.gate",
            r"(?<=experts)\.(gate_up_proj|down_proj)_": r".\1.",
            "sinks$": "sinks.weight",
        },
        check=check_gpt_oss,
        decoder=VARIED,
    ),
    "nanochat": Family(
        keys(hidden_act="relu2", final_logit_softcapping=15.0),
        switches={"norm": "weightless", "qk_norm": "head"},
        names={r"mlp\.fc1\.": "mlp.up_proj.", r"mlp\.fc2\.": "mlp.down_proj."},
        decoder="models.nanochat:NanochatDecoder",
    ),
    "muse_glimmer_text": family(
        keys(131072, n_kv_heads=2, head_dim=128, eps=1e-5, window=2048, qk_scale_factor=3.87)
        | keys(final_logit_softcapping=20.0, output_multiplier=26**-0.5, post_norm_eps=1e-8),
        permuted=True,
        switches={**SANDWICH, "qk_norm": "head"},
        names=POST_NORM_NAMES,
        check=check_muse,
        from_gguf=muse_from_gguf,
        layout="models.muse_glimmer:hub_layout",
        gguf_layout="models.muse_glimmer:gguf_layout",
        decoder="models.muse_glimmer:MuseDecoder",
        gguf="muse-glimmer",
    ),
    "seed_oss": family(
        keys(524288, n_kv_heads=8, head_dim=128, attention_bias=True, attention_out_bias=False),
        gguf="seed_oss",
    ),
    "ernie4_5": family(
        keys(131072, n_kv_heads=2, head_dim=128, eps=1e-5, theta=5e5, tied=True),
        interleaved=True,
        gguf="ernie4_5",
    ),
    "ernie4_5_moe": family(
        keys(131072, n_kv_heads=4, eps=1e-5, theta=5e5, tied=True, norm_topk_prob=True)
        | keys(moe_k=6, moe_num_experts=64, moe_intermediate_size=1536, moe_num_shared_experts=2)
        | keys(moe_layer_start_index=1, moe_layer_end_index=-1, moe_layer_interval=1),
        check=routing.check_ernie_moe,
        interleaved=True,
        switches={"experts": True},
        names=ROUTED_NAMES | {r"(gate\.)?moe_statics\.e_score_correction_bias$": CORRECTION},
        from_gguf=routing.ernie_moe_from_gguf,
        decoder=ROUTED,
        gguf="ernie4_5-moe",
    ),
    "bitnet": family(
        keys(2048, n_kv_heads=5, eps=1e-5, theta=5e5, hidden_act="relu2"),
        check=check_bitnet,
        switches={"act": "reglu2"},
        decoder="models.bitnet:BitDecoder",
        gguf="bitnet",
    ),
    "apertus": family(
        keys(65536, eps=1e-5, theta=12e6, rope=APERTUS_ROPE),
        check=check_apertus,
        switches={"act": "xielu", "qk_norm": "head"},
        names={
            "attention_layernorm": "input_layernorm",
            "feedforward_layernorm": "post_attention_layernorm",
        },
        from_gguf=apertus_from_gguf,
        decoder="models.apertus:XieluDecoder",
        gguf="apertus",
    ),
    "llama4_text": family(
        keys(131072, n_kv_heads=8, head_dim=128, eps=1e-5, theta=5e5, n_experts=16, n_used=1)
        | keys(no_rope_layer_interval=4, attention_chunk_size=8192, interleave_moe_layer_step=1)
        | keys(attn_temperature_tuning=True, attn_scale=0.1, floor_scale=8192, use_qk_norm=True)
        | keys(intermediate_size_mlp=16384),
        check=check_llama4,
        interleaved=True,
        switches={"experts": True},
        names={r"feed_forward\.": "mlp.", r"mlp\.router\.": "mlp.gate."},
        layout="models.qwen3_vl:split_experts",
        from_gguf=llama4_from_gguf,
        decoder="models.llama4:Llama4Decoder",
        gguf="llama4",
    ),
    "qwen3_vl_text": family(
        keys(128000, n_kv_heads=32, head_dim=128, theta=5e5),
        gguf="qwen3vl",
        switches={"qk_norm": "head"},
        **DEEP,
    ),
    "qwen3_vl_moe_text": family(
        keys(128000, n_kv_heads=16, theta=5e5, norm_topk_prob=True, tied=True)
        | keys(n_experts=60, n_used=4, moe_intermediate_size=1408),
        gguf="qwen3vlmoe",
        switches={"experts": True, "qk_norm": "head"},
        layout="models.qwen3_vl:split_experts",
        **DEEP,
    ),
    **dict.fromkeys(
        ("qwen2_vl_text", "qwen2_5_vl_text"),
        family(keys(32768, n_kv_heads=8, theta=1e6, eps=1e-5, **NO_WINDOW), **QWEN_VL),
    ),
    "qwen3_5_text": family(
        keys(32768, n_kv_heads=4, head_dim=256, partial_rotary_factor=0.25, **DELTA_NET),
        gguf="qwen35",
        switches={"qk_norm": "head"},
        **QWEN_HYBRID,
    ),
    "qwen3_5_moe_text": family(
        keys(32768, n_kv_heads=2, head_dim=256, partial_rotary_factor=0.25, n_experts=256)
        | keys(n_used=8, norm_topk_prob=True, moe_intermediate_size=512, intermediate_size=512)
        | keys(shared_expert_intermediate_size=512, **DELTA_NET),
        gguf="qwen35moe",
        gguf_values={"norm_topk_prob": True},
        switches={"qk_norm": "head", "experts": True},
        **QWEN_HYBRID,
    ),
    "qwen3_next": family(
        keys(32768, n_kv_heads=2, head_dim=256, partial_rotary_factor=0.25, n_experts=512)
        | keys(n_used=10, norm_topk_prob=True, moe_intermediate_size=512, intermediate_size=5632)
        | keys(shared_expert_intermediate_size=512, **DELTA_NET),
        gguf="qwen3next",
        gguf_values={"norm_topk_prob": True},
        switches={"qk_norm": "head", "experts": True},
        **QWEN_HYBRID,
    ),
    "olmo_hybrid": family(
        keys(65536, eps=1e-6, linear_conv_kernel_dim=4),
        switches={"qk_norm": "full"},
        check=check_olmo_hybrid,
        layout="models.delta_net:olmo_layout",
        decoder="models.delta_net:OlmoHybridDecoder",
    ),
    "lfm2": family(
        keys(128000, n_kv_heads=8, eps=1e-5, theta=1e6, tied=True, conv_L_cache=3)
        | keys(block_auto_adjust_ff_dim=True, intermediate_size=12288),
        check=check_short_conv,
        gguf="lfm2",
        **SHORT_CONV,
    ),
    "lfm2_moe": family(
        keys(128000, n_kv_heads=8, eps=1e-5, theta=1e6, tied=True, conv_L_cache=3)
        | keys(n_experts=32, n_used=4, moe_intermediate_size=1792, num_dense_layers=2)
        | keys(norm_topk_prob=True, use_expert_bias=True, intermediate_size=7168),
        check=check_short_conv_moe,
        gguf="lfm2moe",
        **SHORT_CONV | {"switches": {"qk_norm": "head", "experts": True}},
    ),
    "arcee": family(keys(4096, eps=1e-5, hidden_act="relu2"), gguf="arcee", permuted=True),
    "hunyuan_v1_dense": family(
        keys(eps=1e-5),
        gguf="hunyuan-dense",
        switches={"qk_norm": "after_rope"},
        names={"query_layernorm": "q_norm", "key_layernorm": "k_norm"},
        decoder=VARIED,
    ),
    "exaone4": family(
        keys(eps=1e-5, n_kv_heads=32, window=4096, pattern=4, rope_only_in_windows=True),
        switches={"norms": POST_NORMS, "qk_norm": "head"},
        names=POST_NORM_NAMES,
        decoder=VARIED,
        gguf="exaone4",
    ),
    "glm4": family(
        keys(131072, n_kv_heads=2, head_dim=128, eps=1.5625e-7, attention_bias=True)
        | {"partial_rotary_factor": 0.5},
        interleaved=True,
        switches={**SANDWICH, "o_bias": False},
        decoder=VARIED,
        gguf="glm4",
    ),
    "glm4_moe": family(
        keys(131072, n_kv_heads=8, eps=1e-5, partial_rotary_factor=0.5, norm_topk_prob=True)
        | keys(n_used=8, n_routed_experts=128, moe_intermediate_size=1408, n_shared_experts=1)
        | keys(first_k_dense_replace=1),
        check=routing.check_glm4_moe,
        switches={"experts": True, "o_bias": False},
        names=ROUTED_NAMES,
        from_gguf=routing.glm4_moe_from_gguf,
        decoder=ROUTED,
        gguf="glm4moe",
    ),
    "glm4v_text": family(
        keys(32768, n_kv_heads=2, eps=1e-5, attention_bias=True),
        check=in_three(8, 12, 12),
        interleaved=True,
        switches={**SANDWICH, "o_bias": False},
        decoder=VARIED,
    ),
    "glm4v_moe_text": family(
        keys(65536, n_kv_heads=8, eps=1e-5, partial_rotary_factor=0.5, norm_topk_prob=True)
        | keys(n_used=8, n_routed_experts=128, moe_intermediate_size=1408, n_shared_experts=1)
        | keys(first_k_dense_replace=1, attention_bias=True),
        check=check_glm4v_moe,
        switches={"experts": True, "o_bias": False},
        names=ROUTED_NAMES,
        decoder=ROUTED,
    ),
    **mla_config.FAMILIES,
    "cohere2": family(
        keys(8192, tied=True, layer_norm_eps=1e-5, logit_scale=0.0625, window=4096, pattern=4)
        | {"rope_only_in_windows": True},
        interleaved=True,
        switches={"norms": PRE_NORMS[:1], "norm": "layer", "parallel": True},
        from_gguf=cohere2_from_gguf,
        decoder=VARIED,
        gguf="cohere2",
    ),
    "starcoder2": family(
        keys(4096, n_kv_heads=2, tied=True, norm_epsilon=1e-5, use_bias=True)
        | {"hidden_act": "gelu_pytorch_tanh"},
        switches={"norm": "layer_bias", "act": "gelu"},
        names={r"mlp\.c_fc\.": "mlp.up_proj.", r"mlp\.c_proj\.": "mlp.down_proj."},
        gguf="starcoder2",
    ),
    "stablelm": family(
        keys(4096, n_kv_heads=32, layer_norm_eps=1e-5, partial_rotary_factor=0.25),
        switches={"norm": "layer_bias", "o_bias": False},
        gguf="stablelm",
    ),
}
