"""GGUF files for tests: tiny checkpoints converted as llama.cpp's converter does it, and an encoder
that writes whatever it is told, true or not."""

from __future__ import annotations

import json
import math
import re
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.torch
import torch

Kind = gguf.GGMLQuantizationType
# relative root of the mean squared error that a quantizer may make of normal weights
ERRORS = {"Q2_K": 0.31, "Q3_K": 0.16, "Q4_K": 0.075, "Q5_K": 0.038, "Q6_K": 0.02}
ERRORS |= {"Q4_0": 0.092, "Q4_1": 0.075, "Q5_0": 0.046, "Q5_1": 0.038, "Q8_0": 0.0056}
DEQUANTIZABLE = sorted({"F32", "F16", "F64"} | {kind.name for kind in gguf.quants._type_traits})

# Where a block keeps its float16 scales, for the types that the gguf package cannot quantize to.
SCALES_AT = {
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
    "IQ4_NL": (0,),
    "IQ4_XS": (0,),
    "IQ3_S": (0,),
    "IQ3_XXS": (0,),
    "IQ2_S": (0,),
    "IQ2_XS": (0,),
    "IQ2_XXS": (0,),
    "IQ1_S": (0,),
}


def random_blocks(kind: Any, num_rows: int, num_cols: int, random: np.random.Generator) -> Any:
    """Rows of random blocks whose weights have a standard deviation of about 0.06."""
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    shape = (num_rows, num_cols // block, block_bytes)
    raw = random.integers(0, 256, shape, dtype=np.uint8)

    def put_scale(value: float) -> None:
        for at in SCALES_AT.get(kind.name, ()):
            scale = value * random.uniform(0.5, 1.5, (*shape[:2], 1))
            raw[..., at : at + 2] = scale.astype(np.float16).view(np.uint8)

    if kind.name == "IQ1_M":  # the scale is spread over the high nibbles of the last 4 words
        raw[..., 49::2] &= 0x0F
        raw[..., 55] |= 0x20  # 2 ** -7
    elif kind.name == "NVFP4":  # four 8-bit floats
        raw[..., :4] = random.integers(8, 16, (*shape[:2], 4), dtype=np.uint8)
    put_scale(1.0)
    put_scale(0.06 / gguf.quants.dequantize(raw.reshape(num_rows, -1), kind).std())
    return raw.reshape(num_rows, -1)


def rare_blocks(kind: Any, num_rows: int, num_cols: int, random: np.random.Generator) -> Any:
    """Rows of random blocks (rows, blocks, bytes) of a BlockType of files.gguf_types"""
    shape = num_rows, num_cols // kind.width, kind.num_bytes
    if kind.name in SCALES_AT or kind.name in ("IQ1_M", "NVFP4"):
        return random_blocks(Kind[kind.name], num_rows, num_cols, random).reshape(shape)
    raw = random.integers(0, 256, shape, dtype=np.uint8)
    at = kind.num_bytes - 2 if kind.name.startswith("TQ") else 0
    scale = random.normal(scale=0.06, size=(*shape[:2], 1)).astype(np.float16)
    raw[..., at : at + 2] = scale.view(np.uint8)
    return raw


def encode(weight: Any, kind: Any, random: np.random.Generator) -> Any:
    """Rows of `weight` in the type `kind`; random ones of its shape where the gguf package cannot
    quantize."""
    if kind.name == "F64":
        return weight.astype(np.float64)
    try:
        return gguf.quants.quantize(weight, kind)
    except NotImplementedError:
        return random_blocks(kind, *weight.shape, random)


def decode(raw: Any, kind: Any) -> Any:
    if kind.name == "F64":
        return raw.astype(np.float32)
    return gguf.quants.dequantize(raw, kind)


def permute(rows: Any, num_heads: int) -> Any:
    """LlamaModel.permute of llama.cpp's convert_hf_to_gguf.py"""
    half = rows.shape[0] // num_heads // 2
    return rows.reshape(num_heads, 2, half, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def llama3_divisors(rope: dict[str, Any], head_dim: int) -> Any:
    """rope_freqs.weight, as LlamaModel.generate_extra_tensors of the same script makes it."""
    old = rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    divisors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * math.pi * rope["rope_theta"] ** (i / head_dim)
        smooth = (old / wavelength - low) / (high - low)
        if wavelength < old / high:
            divisors.append(1.0)
        elif wavelength > old / low:
            divisors.append(rope["factor"])
        else:
            divisors.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    return np.array(divisors, dtype=np.float32)


ARCH = {
    "mistral": "LLAMA",
    "mixtral": "LLAMA",
    "ministral3": "MISTRAL3",
    "qwen2_moe": "QWEN2MOE",
    "qwen3_moe": "QWEN3MOE",
    "gemma3_text": "GEMMA3",
    "gemma3n_text": "GEMMA3N",
    "gemma4_text": "GEMMA4",
    "gemma4_unified_text": "GEMMA4",
    "olmo3": "OLMO2",
    "granitemoe": "GRANITE_MOE",
    "lfm2_moe": "LFM2MOE",
    "granitemoehybrid": "GRANITE_HYBRID",
    "hunyuan_v1_dense": "HUNYUAN_DENSE",
    "qwen3_5_text": "QWEN35",
    "qwen3_5_moe_text": "QWEN35MOE",
    "qwen3_next": "QWEN3NEXT",
    "qwen3_vl_text": "QWEN3VL",
    "qwen3_vl_moe_text": "QWEN3VLMOE",
    "glm4_moe": "GLM4_MOE",
    "minimax_m2": "MINIMAXM2",
    "muse_glimmer_text": "GEMMA2",  # the names of its tensors
    "llama4_text": "LLAMA4",
    "ernie4_5_moe": "ERNIE4_5_MOE",
    "deepseek_v2": "DEEPSEEK2",
    "deepseek_v3": "DEEPSEEK2",
    "glm4_moe_lite": "DEEPSEEK2",
}


def arch_of(config: dict[str, Any]) -> Any:
    """What the converter takes for general.architecture."""
    model_type = config["model_type"]
    name = ARCH.get(model_type, model_type.upper())
    if model_type == "granitemoehybrid" and "linear_attention" not in config["layer_types"]:
        name = "GRANITE"
    if config.get("use_bidirectional_attention") is True:
        name = "GEMMA_EMBEDDING"
    if model_type == "nemotron_h" and "moe" in config["layers_block_type"]:
        name = "NEMOTRON_H_MOE"
    return gguf.MODEL_ARCH[name]


PERMUTED = (
    "llama mistral mixtral ministral3 smollm3 granite granitemoe granitemoehybrid arcee".split()
)
PERMUTED.append("muse_glimmer_text")
# config.json -> the writer's method, as the set_gguf_parameters of the same script call them
WRITTEN = {
    "max_position_embeddings": "context_length",
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "intermediate_size": "feed_forward_length",
    "num_attention_heads": "head_count",
    "num_key_value_heads": "head_count_kv",
    "rms_norm_eps": "layer_norm_rms_eps",
    "norm_eps": "layer_norm_rms_eps",
    "conv_L_cache": "shortconv_l_cache",
    "num_dense_layers": "leading_dense_block_count",
    "layer_norm_eps": "layer_norm_eps",
    "norm_epsilon": "layer_norm_eps",
    "sliding_window": "sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "attention_multiplier": "attention_scale",
    "logits_scaling": "logit_scale",
    "logit_scale": "logit_scale",
    "num_local_experts": "expert_count",
    "num_experts": "expert_count",
    "num_experts_per_tok": "expert_used_count",
    "top_k_experts": "expert_used_count",
    "moe_intermediate_size": "expert_feed_forward_length",
    "shared_expert_intermediate_size": "expert_shared_feed_forward_length",
    "n_routed_experts": "expert_count",
    "n_group": "expert_group_count",
    "topk_group": "expert_group_used_count",
    "n_shared_experts": "expert_shared_count",
    "first_k_dense_replace": "leading_dense_block_count",
    "routed_scaling_factor": "expert_weights_scale",
    "moe_num_experts": "expert_count",
    "moe_k": "expert_used_count",
    "moe_num_shared_experts": "expert_shared_count",
    "moe_layer_start_index": "leading_dense_block_count",
    "moe_layer_interval": "interleave_moe_layer_step",
    "interleave_moe_layer_step": "interleave_moe_layer_step",
    "num_nextn_predict_layers": "nextn_predict_layers",
    "moe_latent_size": "moe_latent_size",
}
# of BitNet, Falcon-H1 and Muse Glimmer, which newer versions of the gguf package know
NEWER = {
    "pre_ff_layernorm": "blk.{}.ffn_norm",
    "gate_proj": "blk.{}.attn_gate",
    "lm_head": "output",
    "attn_sub_norm": "blk.{}.attn_sub_norm",
    "ffn_sub_norm": "blk.{}.ffn_sub_norm",
    "fc1_latent_proj": "blk.{}.ffn_latent_down",
    "fc2_latent_proj": "blk.{}.ffn_latent_up",
}
CENTRED = ("gemma_", "gemma2", "gemma3_", "qwen3_5", "qwen3_next", "muse_glimmer")
WINDOWED = "muse_glimmer_text phi3 gemma2 gemma3_text gemma4_text gemma4_unified_text".split()
WINDOWED += "gemma3n_text olmo3 gpt_oss exaone4 cohere2".split()


def add_metadata(writer: Any, config: dict[str, Any], tokenizer: dict[str, Any]) -> None:
    model_type = config["model_type"]
    if model_type in ("granitemoehybrid", "nemotron_h", "falcon_h1"):
        config = add_mamba2(writer, config)
    if num_predicted := config.get("num_nextn_predict_layers"):
        num_blocks = config["num_hidden_layers"] + num_predicted
        config = {**config, "num_hidden_layers": num_blocks}
    if config.get("norm_topk_prob") and "routed_scaling_factor" in config:
        writer.add_expert_weights_norm(config["norm_topk_prob"])
    if "kv_lora_rank" in config:
        config = add_latent(writer, config)
    if model_type.startswith("lfm2"):
        heads = [config["num_key_value_heads"] * (k != "conv") for k in config["layer_types"]]
        config = {**config, "num_key_value_heads": heads}
        if config.get("block_auto_adjust_ff_dim"):
            multiple = config["block_multiple_of"]
            width = int(2 * config["intermediate_size"] / 3)
            config["intermediate_size"] = -(-width // multiple) * multiple
    if model_type == "minimax_m2":
        config = {**config, "moe_intermediate_size": config["intermediate_size"]}
    if model_type == "llama4_text":
        widths = {"moe_intermediate_size": config["intermediate_size"]}
        config = {**config, **widths, "intermediate_size": config["intermediate_size_mlp"]}
    if model_type == "ernie4_5_moe":  # as Ernie4_5MoeModel computes it
        width = config["intermediate_size"] // config["num_key_value_heads"]
        writer.add_expert_shared_feed_forward_length(width)
    if model_type.startswith("gemma4"):
        config = gemma4_metadata(writer, config)
    if model_type == "gemma3n_text":
        gemma3n_metadata(writer, config)
    for key, method in WRITTEN.items():
        if config.get(key) and (key != "sliding_window" or model_type in WINDOWED):
            getattr(writer, f"add_{method}")(config[key])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    if config.get("head_dim") and "kv_lora_rank" not in config:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
    if "linear_num_key_heads" in config:
        add_delta_net(writer, config)
    rope = config["rope_parameters"]
    rope = rope.get("full_attention", rope)
    add_rope(writer, rope, config)
    turned = rope.get("partial_rotary_factor", 1.0) if "gemma4" not in model_type else 1.0
    writer.add_rope_dimension_count(int(head_dim * turned))
    tokens = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].get)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    tokens += [f"[PAD{i}]" for i in range(len(tokens), config["vocab_size"])]
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token in special else 1 for token in tokens])
    merges = [m if isinstance(m, str) else " ".join(m) for m in tokenizer["model"]["merges"]]
    writer.add_token_merges(merges)
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    if config.get("add_eos_token"):
        writer.add_add_eos_token(True)
    if "output_multiplier" in config:  # MuseGlimmerModel
        writer.add_logit_scale(config["output_multiplier"])
        slides = [kind == "sliding_attention" for kind in config["layer_types"]]
        writer.add_sliding_window_pattern(slides)
    if "pooling_type" in config:
        writer.add_pooling_type(gguf.PoolingType(config["pooling_type"]))


def gemma4_metadata(writer: Any, config: dict[str, Any]) -> dict[str, Any]:
    """Gemma4Model.set_gguf_parameters -> the config for the other keys"""
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    wide, n_layers = config["per_layer_config"][str(len(slides) - 1)], len(slides)
    writer.add_shared_kv_layers(config["num_kv_shared_layers"])
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_sliding_window_pattern(slides)
    writer.add_key_length_swa(config["head_dim"])
    writer.add_value_length_swa(config["head_dim"])
    writer.add_rope_dimension_count_swa(config["head_dim"])
    writer.add_rope_freq_base_swa(config["rope_parameters"]["sliding_attention"]["rope_theta"])
    config = {**config, "head_dim": wide["head_dim"]}
    if config["use_double_wide_mlp"]:
        first, n_ff = n_layers - config["num_kv_shared_layers"], config["intermediate_size"]
        config["intermediate_size"] = [n_ff * (1 + (i >= first)) for i in range(n_layers)]
    if heads := wide.get("num_key_value_heads"):
        own = config["num_key_value_heads"]
        config["num_key_value_heads"] = [own if slide else heads for slide in slides]
    return config


def gemma3n_metadata(writer: Any, config: dict[str, Any]) -> None:
    """Gemma3NModel.set_gguf_parameters"""
    writer.add_altup_active_idx(config["altup_active_idx"])
    writer.add_altup_num_inputs(config["altup_num_inputs"])
    writer.add_embedding_length_per_layer_input(config["hidden_size_per_layer_input"])
    writer.add_shared_kv_layers(config["num_kv_shared_layers"])
    shares = torch.tensor(config["activation_sparsity_pattern"])
    scales = torch.distributions.normal.Normal(0, 1).icdf(shares)
    writer.add_activation_sparsity_scale(scales.tolist())
    slides = [kind == "sliding_attention" for kind in config["layer_types"]]
    writer.add_sliding_window_pattern(slides)


def add_latent(writer: Any, config: dict[str, Any]) -> dict[str, Any]:
    """DeepseekV2Model.set_gguf_parameters -> the config for the other keys"""
    head_dim = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    rope = dict(config["rope_parameters"])
    rope.pop("partial_rotary_factor", None)
    changed = {"head_dim": config["qk_rope_head_dim"], "rope_parameters": rope}
    if config["old_latents"]:  # as before April 2025
        writer.add_key_length(head_dim)
        writer.add_value_length(config["v_head_dim"])
    else:
        changed["num_key_value_heads"] = 1
        writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
        writer.add_value_length(config["kv_lora_rank"])
        writer.add_key_length_mla(head_dim)
        writer.add_value_length_mla(config["v_head_dim"])
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    if config.get("q_lora_rank"):
        writer.add_q_lora_rank(config["q_lora_rank"])
    scoring = {"deepseek_v2": "SOFTMAX", "deepseek_v3": "SIGMOID"}.get(config["model_type"])
    if scoring:
        writer.add_expert_gating_func(gguf.ExpertGatingFuncType[scoring])
    rope.pop("llama_4_scaling_beta", None)
    if "mscale_all_dim" in rope:
        rope["mscale_all_dim"] *= 0.1
    return {**config, **changed}


def split_kv_b(tensors: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """kv_b_proj as k_b_proj, transposed, and v_b_proj: DeepseekV2Model.modify_tensors"""
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("kv_b_proj.weight") and not config["old_latents"]:
            heads = tensor.view(config["num_attention_heads"], -1, tensor.shape[1])
            k, v = heads.split([config["qk_nope_head_dim"], config["v_head_dim"]], dim=1)
            found[name.replace("kv_b", "k_b")] = k.transpose(1, 2).contiguous()
            found[name.replace("kv_b", "v_b")] = v.contiguous()
        else:
            found[name] = tensor
    return found


def add_delta_net(writer: Any, config: dict[str, Any]) -> None:
    """Qwen3NextModel.set_gguf_parameters"""
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_ssm_state_size(config["linear_key_head_dim"])
    writer.add_ssm_group_count(config["linear_num_key_heads"])
    writer.add_ssm_time_step_rank(config["linear_num_value_heads"])
    width = config["linear_value_head_dim"] * config["linear_num_value_heads"]
    writer.add_ssm_inner_size(width)
    arch = ARCH[config["model_type"]].lower()
    recurrent = [kind == "linear_attention" for kind in config["layer_types"]]
    recurrent += [False] * config.get("num_nextn_predict_layers", 0)
    writer.add_array(f"{arch}.attention.recurrent_layers", recurrent)
    writer.add_uint32(f"{arch}.full_attention_interval", 4)
    if "qwen3_5" in config["model_type"]:
        writer.add_rope_dimension_sections([11, 11, 10, 0])


MAMBA2_KEYS = {  # of Granite 4 and Falcon-H1; Nemotron-H
    "conv_kernel": ("mamba_d_conv", "conv_kernel"),
    "state_size": ("mamba_d_state", "ssm_state_size"),
    "group_count": ("mamba_n_groups", "n_groups"),
    "time_step_rank": ("mamba_n_heads", "mamba_num_heads"),
}


def add_mamba2(writer: Any, config: dict[str, Any]) -> dict[str, Any]:
    """GraniteHybridModel, NemotronHModel and FalconH1Model.set_gguf_parameters -> the config with
    the values that these write for the usual keys"""
    config, kinds = dict(config), config.get("layer_types") or config.get("layers_block_type")
    for theirs, keys in MAMBA2_KEYS.items():
        value = next(config[key] for key in keys if key in config)
        getattr(writer, f"add_ssm_{theirs}")(value)
    width = config.get("mamba_d_head") or config["mamba_head_dim"]
    writer.add_ssm_inner_size(width * (config.get("mamba_n_heads") or config["mamba_num_heads"]))
    if config["model_type"] == "falcon_h1":  # folded into the weights
        return {**config, "embedding_multiplier": None}
    heads = [config["num_key_value_heads"] * (kind == "full_attention") for kind in kinds]
    config |= {"num_key_value_heads": heads, "num_hidden_layers": len(kinds)}
    if config["model_type"] == "granitemoehybrid":
        if config["num_local_experts"]:
            writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])
        else:
            config |= {"num_experts_per_tok": 0}
            config["intermediate_size"] = config["shared_intermediate_size"]
        is_hybrid = "linear_attention" in kinds
        writer.add_rope_scaling_finetuned(not is_hybrid)
        return {**config, "max_position_embeddings": 2**20 if is_hybrid else 256}
    config["rms_norm_eps"] = config["layer_norm_epsilon"]
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    wide = "moe" if "moe" in kinds else "mlp"
    width = config["moe_intermediate_size" if wide == "moe" else "intermediate_size"]
    writer.add_feed_forward_length([width * (kind == wide) for kind in kinds])
    config.pop("intermediate_size")
    if wide == "moe":
        writer.add_expert_shared_feed_forward_length(config["moe_shared_expert_intermediate_size"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        return config
    left_out = ("n_routed_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group")
    return {**config, **dict.fromkeys((*left_out, "n_shared_experts", "topk_group"))}


def mamba2_tensor(name: str, tensor: Any, config: dict[str, Any]) -> dict[str, Any]:
    """A tensor of a mamba2 layer, as Mamba2Model and FalconH1Model.modify_tensors have it"""
    layer, part = f"blk.{name.split('.')[2]}", re.split(r"mamba\.|mixer\.", name)[1]
    groups = config.get("mamba_n_groups") or config["n_groups"]
    theirs = {
        "in_proj.weight": "ssm_in.weight",
        "conv1d.weight": "ssm_conv1d.weight",
        "conv1d.bias": "ssm_conv1d.bias",
        "A_log": "ssm_a",
        "D": "ssm_d",
        "dt_bias": "ssm_dt.bias",
        "norm.weight": "ssm_norm.weight",
        "out_proj.weight": "ssm_out.weight",
    }
    if part == "A_log":
        tensor = -np.exp(tensor)
    if part in ("A_log", "D"):
        tensor = tensor.reshape(-1, 1)
    elif part == "conv1d.weight":
        tensor = tensor.squeeze(1)
    elif part == "norm.weight":
        tensor = tensor.reshape(groups, -1)
    return {f"{layer}.{theirs[part]}": tensor}


def folded(name: str, tensor: Any, config: dict[str, Any]) -> Any:
    """A weight of Falcon-H1 with its multipliers, as FalconH1Model.modify_tensors has it"""
    of_input = config["attention_in_multiplier"]
    factors = {
        "down_proj": config["mlp_multipliers"][1],
        "gate_proj": config["mlp_multipliers"][0],
        "k_proj": config["key_multiplier"] * of_input,
        "q_proj": of_input,
        "v_proj": of_input,
        "o_proj": config["attention_out_multiplier"],
        "out_proj": config["ssm_out_multiplier"],
        "lm_head": config["lm_head_multiplier"],
        "embed_tokens": config["embedding_multiplier"],
    }
    stem = name.split(".")[-2]
    if stem != "in_proj":
        return tensor * np.float32(factors.get(stem, 1))
    inner, states = config["mamba_d_ssm"], config["mamba_n_groups"] * config["mamba_d_state"]
    sizes = (inner, inner, states, states, config["mamba_n_heads"])
    rows = np.repeat(config["ssm_multipliers"], sizes).astype(np.float32)
    return tensor * np.float32(config["ssm_in_multiplier"]) * rows[:, None]


def tiled(rows: Any, config: dict[str, Any], first: int = 0) -> Any:
    """_reorder_v_heads of _LinearAttentionVReorderBase: from row `first` on, value heads in turns
    of key heads"""
    groups = config["linear_num_key_heads"], -1
    per_key = config["linear_num_value_heads"] // groups[0]
    moved = rows[first:].reshape(groups[0], per_key, -1, *rows.shape[1:]).swapaxes(0, 1)
    return np.concatenate((rows[:first], moved.reshape(rows[first:].shape)))


def delta_net_tensor(name: str, tensor: Any, config: dict[str, Any]) -> dict[str, Any]:
    """A tensor of `linear_attn`, as modify_tensors of the same classes has it"""
    layer, part = f"blk.{name.split('.')[2]}", name.split("linear_attn.")[1]
    keys = config["linear_num_key_heads"] * config["linear_key_head_dim"]
    if part == "A_log":
        tensor = -np.exp(tensor)
    if part == "conv1d.weight":
        tensor = tensor.squeeze(1)
    theirs = {
        "in_proj_qkv.weight": "attn_qkv.weight",
        "in_proj_z.weight": "attn_gate.weight",
        "in_proj_a.weight": "ssm_alpha.weight",
        "in_proj_b.weight": "ssm_beta.weight",
        "in_proj_ba.weight": "ssm_ba.weight",
        "conv1d.weight": "ssm_conv1d.weight",
        "A_log": "ssm_a",
        "dt_bias": "ssm_dt.bias",
        "norm.weight": "ssm_norm.weight",
        "out_proj.weight": "ssm_out.weight",
    }
    if part == "in_proj_qkvz.weight":
        D, values = config["linear_key_head_dim"], config["linear_value_head_dim"]
        group = config["linear_num_value_heads"] // config["linear_num_key_heads"] * values
        rows = tensor.reshape(config["linear_num_key_heads"], -1, *tensor.shape[1:])
        q, k, v, z = (
            one.reshape(-1, *tensor.shape[1:])
            for one in np.split(rows, [D, 2 * D, 2 * D + group], 1)
        )
        return {
            f"{layer}.attn_qkv.weight": np.concatenate((q, k, v)),
            f"{layer}.attn_gate.weight": z,
        }
    if "qwen3_5" in config["model_type"]:
        if part in ("in_proj_z.weight", "in_proj_a.weight", "in_proj_b.weight", "A_log", "dt_bias"):
            tensor = tiled(tensor, config)
        elif part in ("in_proj_qkv.weight", "conv1d.weight"):
            tensor = tiled(tensor, config, 2 * keys)
        elif part == "out_proj.weight":
            per_head = tensor.shape[1] // config["linear_num_value_heads"]
            heads = tensor.reshape(len(tensor), -1, per_head)
            tensor = np.stack([tiled(row, config) for row in heads]).reshape(tensor.shape)
    return {f"{layer}.{theirs[part]}": tensor}


def add_rope(writer: Any, rope: dict[str, Any], config: dict[str, Any]) -> None:
    theta = rope["rope_theta"]
    if rope.get("alpha"):  # HunYuanModel.set_gguf_parameters
        head_dim = config["head_dim"]
        theta *= rope["alpha"] ** (head_dim / (head_dim - 2))
    writer.add_rope_freq_base(theta)
    if rope["rope_type"] in ("linear", "yarn"):
        writer.add_rope_scaling_type(gguf.RopeScalingType(rope["rope_type"]))
        writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "longrope":
        factor = config["max_position_embeddings"] / rope["original_max_position_embeddings"]
        scale = math.sqrt(1 + math.log(factor) / math.log(rope["original_max_position_embeddings"]))
        writer.add_rope_scaling_attn_factors(scale)
    if rope["rope_type"] in ("yarn", "longrope"):
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])
        for key, add in (
            ("attention_factor", writer.add_rope_scaling_yarn_attn_factor),
            ("beta_fast", writer.add_rope_scaling_yarn_beta_fast),
            ("beta_slow", writer.add_rope_scaling_yarn_beta_slow),
            ("mscale_all_dim", writer.add_rope_scaling_yarn_log_mul),
            ("llama_4_scaling_beta", writer.add_attn_temperature_scale),
        ):
            if key in rope:
                add(rope[key])


def gguf_tensors(config: dict[str, Any], tensors: dict[str, Any]) -> dict[str, Any]:
    """The tensors of a checkpoint under GGUF's names, as modify_tensors of the same script has
    them: experts stacked, q and k permuted, norms that multiply with their weights."""
    model_type, arch = config["model_type"], arch_of(config)
    num_layers = config.get("num_hidden_layers") or len(config["layers_block_type"])
    num_blocks = num_layers + config.get("num_nextn_predict_layers", 0)
    names = gguf.get_tensor_name_map(arch, num_blocks)
    found: dict[str, Any] = {}
    experts: dict[str, dict[int, Any]] = {}
    for name, tensor in tensors.items():
        if ".act_fn." in name:
            continue
        if expert := re.fullmatch(r"\w+\.(layers\.\d+)\..*experts\.(\d+)\.(\w+)\.weight", name):
            part = {"w1": "gate", "w2": "down", "w3": "up"}.get(expert[3], expert[3][:-5])
            layer = expert[1].replace("layers", "blk")
            experts.setdefault(f"{layer}.ffn_{part}_exps.weight", {})[int(expert[2])] = tensor
        elif re.search(r"\.mamba\.|mixer\.(in_proj|out_proj|conv1d|A_log|D$|dt_bias|norm)", name):
            found |= mamba2_tensor(name, tensor, config)
        elif "linear_attn." in name:
            found |= delta_net_tensor(name, tensor, config)
        elif "shared_mlp.input_linear" in name:
            parts = zip(("gate", "up"), np.split(tensor, 2))
            layer = f"blk.{name.split('.')[2]}"
            shared = "_shexp" if config["num_local_experts"] else ""
            found |= {f"{layer}.ffn_{part}{shared}.weight": half for part, half in parts}
        elif "shared_mlp.output_linear" in name:
            shared = "_shexp" if config["num_local_experts"] else ""
            found[f"blk.{name.split('.')[2]}.ffn_down{shared}.weight"] = tensor
        elif "router." in name and "gemma4" in model_type and "proj" not in name:
            part = "ffn_down_exps" if "per_expert" in name else "ffn_gate_inp"
            found[f"blk.{name.split('.')[2]}.{part}.scale"] = tensor
        elif altup := re.fullmatch(r"model\.(altup_\w+)\.(\d)\.weight", name):
            experts.setdefault(f"{names.get_name('model.' + altup[1])}.weight", {})[
                int(altup[2])
            ] = tensor
        elif ".experts." in name or "put_linear" in name:
            found |= fused_experts(name, tensor, model_type)
        else:
            if "e_score_correction_bias" in name:
                name = name.replace("e_score_correction_bias", "e_score_correction.bias")
                tensor = tensor.squeeze()
            if name.endswith(("layer_scalar", "correct_output_scale")):
                name += ".weight"
            if name.endswith("feed_forward.expert_bias"):
                name += ".bias"
            if name.endswith("conv.conv.weight"):
                tensor = tensor.squeeze(1)
            stem, suffix = name.rsplit(".", 1)
            if stem.endswith(".self_attn") and suffix == "sinks":
                stem, suffix = f"{stem}.sinks", "weight"
            if model_type in PERMUTED and ("q_proj" in stem or "k_proj" in stem):
                heads = "num_attention_heads" if "q_proj" in stem else "num_key_value_heads"
                tensor = permute(tensor, config[heads])
            centred = "layernorm" if model_type == "muse_glimmer_text" else "norm"
            if f"{model_type}_".startswith(CENTRED) and centred in name:
                tensor = tensor + 1
            theirs = (
                names.get_name(stem)
                or nextn_name(stem)
                or NEWER.get(stem.split(".")[-1], "").format(*stem.split(".")[2:3])
            )
            assert theirs, stem
            found[f"{theirs}.{suffix}"] = tensor
    if model_type == "muse_glimmer_text":  # MuseGlimmerModel.modify_tensors
        for i in range(config["num_hidden_layers"]):
            for part, factor in (("q", config["qk_scale_factor"]), ("k", 1.0)):
                weight = np.full(config["head_dim"], factor, dtype=np.float32)
                found[f"blk.{i}.attn_{part}_norm.weight"] = weight
    found |= {name: np.stack([of[i] for i in sorted(of)]) for name, of in experts.items()}
    return found


def nextn_name(stem: str) -> str | None:
    """The name of a block that predicts further tokens, where the gguf package has none for it."""
    found = re.fullmatch(
        r"model\.layers\.(\d+)\.(eh_proj|[eh]norm|embed_tokens|shared_head\..*)", stem
    )
    return found and f"blk.{found[1]}.nextn.{found[2].replace('.', '_')}"


def fused_experts(name: str, tensor: Any, model_type: str) -> dict[str, Any]:
    """GraniteMoe's input_linear and output_linear, gate_up_proj and down_proj of others"""
    layer = f"blk.{name.split('.')[2]}"
    if "output_linear" in name:
        return {f"{layer}.ffn_down_exps.weight": tensor}
    if "gate_up" in name and "gemma4" in model_type:
        return {f"{layer}.ffn_gate_up_exps.weight": tensor}
    if "input_linear" in name or (model_type != "gpt_oss" and "gate_up" in name):
        half = tensor.shape[1] // 2
        both = tensor[:, :half], tensor[:, half:]
    else:
        suffix = "bias" if name.endswith("_bias") else "weight"
        if "down_proj" in name:
            return {f"{layer}.ffn_down_exps.{suffix}": tensor}
        names = [f"{layer}.ffn_{part}_exps.{suffix}" for part in ("gate", "up")]
        return dict(zip(names, (tensor[:, ::2], tensor[:, 1::2])))
    return dict(zip((f"{layer}.ffn_{part}_exps.weight" for part in ("gate", "up")), both))


def prediction_block(tensors: dict[str, Any], n_layers: int) -> dict[str, Any]:
    """The tensors of a block behind the layers that predicts the token after the next, as files of
    GLM-4.5 on the hub have it."""
    last = f"model.layers.{n_layers - 1}."
    block = {k.removeprefix(last): t.clone() for k, t in tensors.items() if k.startswith(last)}
    norm, head = tensors["model.norm.weight"], tensors["lm_head.weight"]
    block |= {f"{name}.weight": norm.clone() for name in ("enorm", "hnorm", "shared_head.norm")}
    block |= {f"{name}.weight": head.clone() for name in ("embed_tokens", "shared_head.head")}
    block["eh_proj.weight"] = torch.cat((head[: len(norm)], head[-len(norm) :]), dim=1)
    return {f"model.layers.{n_layers}.{name}": tensor for name, tensor in block.items()}


def prediction_name(name: str, n_layers: int) -> str:
    """A name of a head in Qwen3.5's files as _Qwen35MtpMixin.filter_tensors has it."""
    theirs = {"fc": "eh_proj", "pre_fc_norm_embedding": "enorm", "pre_fc_norm_hidden": "hnorm"}
    theirs |= {"norm": "shared_head.norm"}
    if found := re.fullmatch(r"mtp\.layers\.(\d+)\.(.*)", name):
        return f"model.layers.{n_layers + int(found[1])}.{found[2]}"
    found = re.fullmatch(r"mtp\.(\w+)\.weight", name)
    return f"model.layers.{n_layers}.{theirs[found[1]]}.weight" if found else name


def convert(
    directory: Path,
    target: Path,
    kind: str = "F32",
    unpacked: bool = False,
    old_latents: bool = False,
    **writer_options: Any,
) -> tuple[Path, dict[str, torch.Tensor]]:
    """Write a tiny checkpoint as a GGUF whose matrices are of type `kind`, or `unpacked` from it ->
    the file, and the weights that it stands for, by their Hugging Face names."""
    config = json.loads((directory / "config.json").read_text())
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    is_tied = config.get("tie_word_embeddings")
    config = {**config.get("text_config", config), "tie_word_embeddings": is_tied}
    config["old_latents"] = old_latents
    if config["model_type"].startswith("deepseek"):  # of which the converter skips these blocks
        config.pop("num_nextn_predict_layers", None)
    if num_predicted := config.get("mtp_num_hidden_layers", 0):
        config["num_nextn_predict_layers"] = num_predicted
    model_type, arch = config["model_type"], arch_of(config)
    arch_name = gguf.MODEL_ARCH_NAMES[arch]
    if model_type == "muse_glimmer_text":  # which newer versions of the gguf package know
        arch_name = "muse-glimmer"
    writer = gguf.GGUFWriter(target, arch_name, **writer_options)
    add_metadata(writer, config, tokenizer)
    random = np.random.default_rng(0)
    weights: dict[str, torch.Tensor] = {}
    raws: dict[str, Any] = {}
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    if num_predicted:
        n_layers = config["num_hidden_layers"]
        tensors = {prediction_name(name, n_layers): each for name, each in tensors.items()}
    elif config.get("num_nextn_predict_layers"):
        tensors |= prediction_block(tensors, config["num_hidden_layers"])
    for name, tensor in split_kv_b(tensors, config).items():
        if name.startswith(("model.visual.", "model.vision_")):
            continue
        name = name.replace("model.language_model.", "model.")
        value = tensor.float().numpy()
        if value.ndim == 3 and model_type in ("gpt_oss", "llama4_text"):
            value = value.swapaxes(1, 2)
        if model_type == "falcon_h1":
            value = folded(name, value, config)
        routed = re.search(
            r"router|altup|laurel|per_layer_model_projection|\.gate\.|shared_expert_gate|_bias$|conv1d|conv\.conv",
            name,
        )
        its_kind = Kind[kind] if value.ndim > 1 and not routed else Kind.F32
        raw = encode(np.ascontiguousarray(value), its_kind, random)
        decoded = decode(raw, its_kind).copy()
        weights[name] = torch.from_numpy(decoded)
        raws[name] = decoded if unpacked else raw
    for key in ("alpha_p", "alpha_n", "beta", "eps") if model_type == "apertus" else ():
        layers = range(config["num_hidden_layers"])
        numbers = [tensors[f"model.layers.{i}.mlp.act_fn.{key}"].item() for i in layers]
        getattr(writer, f"add_xielu_{key}")(numbers)
    tensors = gguf_tensors(config, raws)
    for folder in sorted(directory.glob("[23]_Dense")):  # EmbeddingGemma.generate_extra_tensors
        weight = safetensors.torch.load_file(folder / "model.safetensors")["linear.weight"]
        stem = f"dense_{folder.name[0]}"
        writer.add_dense_features_dims(stem, *reversed(weight.shape))
        tensors[f"{stem}.weight"] = encode(weight.numpy(), Kind[kind], random)
    for name, raw in tensors.items():
        packed = raw.dtype == np.uint8
        writer.add_tensor(name, np.ascontiguousarray(raw), raw_dtype=Kind[kind] if packed else None)
    rope = config.get("rope_parameters", {})
    if model_type.startswith("gemma4"):  # Gemma4Model.generate_extra_tensors
        half = config["per_layer_config"][str(config["num_hidden_layers"] - 1)]["head_dim"] // 2
        num_turned = int(half * rope["full_attention"]["partial_rotary_factor"])
        divisors = np.array([1.0] * num_turned + [1e30] * (half - num_turned), dtype=np.float32)
        writer.add_tensor("rope_freqs.weight", divisors)
    if rope.get("rope_type") == "llama3":
        head_dim = config["hidden_size"] // config["num_attention_heads"]
        writer.add_tensor("rope_freqs.weight", llama3_divisors(rope, head_dim))
    for length in ("long", "short") if rope.get("rope_type") == "longrope" else ():
        factors = np.array(rope[f"{length}_factor"], dtype=np.float32)
        writer.add_tensor(f"rope_factors_{length}.weight", factors)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if config.get("tie_word_embeddings"):
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    return target, weights


# ---- an encoder that lies on request -------------------------------------------------------------

U32, F32, STRING, ARRAY, U64 = 4, 6, 8, 9, 10
SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}


def string(text: str | bytes) -> bytes:
    raw = text if isinstance(text, bytes) else text.encode()
    return struct.pack("<Q", len(raw)) + raw


def value(kind: int, item: Any) -> bytes:
    """A metadata value: ARRAY takes (item type, items)."""
    if kind == STRING:
        return string(item)
    if kind == ARRAY:
        item_kind, items = item
        head = struct.pack("<IQ", item_kind, len(items))
        return head + b"".join(value(item_kind, one) for one in items)
    return struct.pack("<" + SCALARS[kind], item)


METADATA: dict[str, tuple[int, Any]] = {
    "general.architecture": (STRING, "llama"),
    "llama.context_length": (U32, 64),
    "llama.embedding_length": (U32, 32),
    "llama.block_count": (U32, 1),
    "llama.feed_forward_length": (U32, 32),
    "llama.attention.head_count": (U32, 2),
    "llama.attention.head_count_kv": (U32, 1),
    "llama.attention.layer_norm_rms_epsilon": (F32, 1e-5),
    "llama.rope.freq_base": (F32, 1e4),
    "llama.rope.dimension_count": (U32, 16),
    "tokenizer.ggml.model": (STRING, "gpt2"),
    "tokenizer.ggml.tokens": (ARRAY, (STRING, ["a", "b", "</s>", "c"])),
    "tokenizer.ggml.token_type": (ARRAY, (5, [1, 1, 3, 1])),
    "tokenizer.ggml.eos_token_id": (U32, 2),
}
SHAPES = {
    "token_embd.weight": (4, 32),
    "blk.0.attn_norm.weight": (32,),
    "blk.0.attn_q.weight": (32, 32),
    "blk.0.attn_k.weight": (16, 32),
    "blk.0.attn_v.weight": (16, 32),
    "blk.0.attn_output.weight": (32, 32),
    "blk.0.ffn_norm.weight": (32,),
    "blk.0.ffn_gate.weight": (32, 32),
    "blk.0.ffn_up.weight": (32, 32),
    "blk.0.ffn_down.weight": (32, 32),
    "output_norm.weight": (32,),
}


def smallest(
    changed: dict[str, tuple[int, Any] | None] | None = None,
    shapes: dict[str, tuple[int, ...] | None] | None = None,
    kinds: dict[str, int] | None = None,
    offsets: dict[str, int] | None = None,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    num_tensors: int | None = None,
    num_values: int | None = None,
) -> tuple[bytes, int]:
    """A complete model of one layer and four tokens, with some values, shapes, type numbers or
    offsets replaced (None leaves one out) -> the file's bytes, and how many of them are header."""
    metadata = {k: v for k, v in {**METADATA, **(changed or {})}.items() if v is not None}
    tensors = {k: v for k, v in {**SHAPES, **(shapes or {})}.items() if v is not None}
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(metadata) if num_values is None else num_values,
    )
    for key, (kind, item) in metadata.items():
        head += string(key) + struct.pack("<I", kind) + value(kind, item)
    random, data = np.random.default_rng(0), b""
    for name, shape in tensors.items():
        kind = (kinds or {}).get(name, 8 if len(shape) == 2 else 0)  # Q8_0, F32
        head += string(name) + struct.pack("<I", len(shape))
        head += b"".join(struct.pack("<Q", n) for n in reversed(shape))
        head += struct.pack("<IQ", kind, (offsets or {}).get(name, len(data)))
        weight = random.normal(size=SHAPES.get(name, shape)).astype(np.float32)
        if weight.ndim == 2 and weight.shape[1] % 32 == 0:
            weight = gguf.quants.quantize(weight, Kind.Q8_0)
        data += weight.tobytes()
        data += bytes(-len(data) % 32)
    head += bytes(-len(head) % 32)
    return head + data, len(head)
