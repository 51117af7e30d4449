"""Every model family as transformers configures it, in tiny dimensions."""

from __future__ import annotations

from typing import Any

from oracle import KINDS, LLAMA3, YARN

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# no width of a matrix is that of another one
ROUTED = {"num_experts_per_tok": 3, "moe_intermediate_size": 96, "intermediate_size": 160}
SHARED_EXPERT = {**EXPERTS, "num_experts": 5, "shared_expert_intermediate_size": 96}
DELTA_NET = {
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
}
MAMBA2 = {
    "num_hidden_layers": 3,
    "mamba_n_heads": 4,
    "mamba_d_head": 32,
    "mamba_n_groups": 2,
    "mamba_d_state": 24,
}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.1,
    "residual_multiplier": 0.22,
    "logits_scaling": 0.25,
}
NEMOTRON = {
    "layers_block_type": ["linear_attention", "mlp", "full_attention", "moe", "linear_attention"],
    "head_dim": 32,
    "mamba_num_heads": 6,
    "mamba_head_dim": 16,
    "n_groups": 3,
    "ssm_state_size": 24,
    "n_routed_experts": 8,
    "n_group": 4,
    "topk_group": 2,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 160,
    "routed_scaling_factor": 1.5,
}
FALCON = {
    "mamba_d_ssm": 96,
    "mamba_n_heads": 6,
    "mamba_d_head": 16,
    "mamba_n_groups": 2,
    "mamba_d_state": 24,
    "head_dim": 16,
    "lm_head_multiplier": 0.5,
    "embedding_multiplier": 3.0,
    "mlp_multipliers": [0.7, 1.3],
    "key_multiplier": 0.6,
    "attention_in_multiplier": 1.2,
    "attention_out_multiplier": 0.9,
    "ssm_multipliers": [0.8, 1.1, 0.7, 1.4, 0.9],
    "ssm_in_multiplier": 1.3,
    "ssm_out_multiplier": 0.75,
}
LATENT = {
    **ROUTED,
    "num_hidden_layers": 3,
    "n_routed_experts": 8,
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_rope_head_dim": 32,
    "qk_nope_head_dim": 32,
    "v_head_dim": 24,
}
SHORT_CONV = {
    "num_hidden_layers": 3,
    "layer_types": ["conv", "full_attention", "conv"],
    "block_multiple_of": 32,
}
GEMMA4 = {
    "num_hidden_layers": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "sliding_window": 8,
    "head_dim": 32,
    "global_head_dim": 64,
    "hidden_size_per_layer_input": 0,
}
GEMMA4_SMALL = {  # as E2B
    **GEMMA4,
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 320,
    "num_key_value_heads": 1,
}
GEMMA4_EXPERTS = {  # as 26B-A4B
    **GEMMA4,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "enable_moe_block": True,
    "num_experts": 6,
    "top_k_experts": 3,
    "moe_intermediate_size": 160,
    "final_logit_softcapping": 3.0,
}
GEMMA3N: dict[str, Any] = {
    "num_hidden_layers": 6,
    "layer_types": ["sliding_attention", "full_attention"] * 3,
    "sliding_window": 8,
    "head_dim": 16,
    "num_kv_shared_layers": 2,
    "hidden_size_per_layer_input": 32,
    "vocab_size_per_layer_input": 320,
    "laurel_rank": 32,
    "activation_sparsity_pattern": [0.95, 0.6, 0.0, 0.3, 0.95, 0.0],
}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.5, 1.7, 2.0, 2.2, 2.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
    "original_max_position_embeddings": 64,
}
# family -> the prefix of transformers' classes, what its config says beside the tiny dimensions
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": 8, "head_dim": 32}),
    "ministral": ("Ministral", {"sliding_window": 8, "head_dim": 16, "layer_types": KINDS}),
    "ministral3": (
        "Ministral3",
        {"head_dim": 16, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 8}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            **EXPERTS,
            "num_experts": 6,
            "shared_expert_intermediate_size": 96,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**EXPERTS, "num_experts": 5, "head_dim": 16, "norm_topk_prob": True},
    ),
    "minimax_m2": (
        "MiniMaxM2",
        {
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "head_dim": 32,
            "rope_parameters": {**LOCAL, "partial_rotary_factor": 0.5},
        },
    ),
    "ernie4_5_moe": (
        "Ernie4_5_Moe",
        {
            "moe_num_experts": 6,
            "moe_k": 3,
            "moe_intermediate_size": 96,
            "intermediate_size": 160,
            "num_hidden_layers": 4,
            "moe_layer_interval": 2,
            "head_dim": 16,
        },
    ),
    "phimoe": (
        "Phimoe",
        {
            "num_local_experts": 5,
            "router_jitter_noise": 0.1,
            "attention_bias": True,
            "lm_head_bias": True,
        },
    ),
    "bitnet": ("BitNet", {}),
    "apertus": ("Apertus", {"rope_parameters": LLAMA3}),
    "llama4_text": (
        "Llama4Text",
        {
            "num_local_experts": 4,
            "intermediate_size": 96,
            "intermediate_size_mlp": 160,
            "interleave_moe_layer_step": 2,
            "num_hidden_layers": 4,
            "head_dim": 16,
            "attention_chunk_size": 24,
            "floor_scale": 16,
            "rope_parameters": LLAMA3,
        },
    ),
    "muse_glimmer_text": (
        "MuseGlimmerText",
        {
            "num_hidden_layers": 5,
            "head_dim": 16,
            "sliding_window": 8,
            "qk_scale_factor": 2.5,
            "post_norm_eps": 0.1,
            "output_multiplier": 0.5,
        },
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.75, "sliding_window": 20}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}),
    "gemma3_text": (
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": KINDS,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": LOCAL,
            },
        },
    ),
    "gemma3n_text": ("Gemma3nText", GEMMA3N),
    "gemma4_text": ("Gemma4Text", GEMMA4_SMALL),
    "gemma4_unified_text": (
        "Gemma4UnifiedText",
        {**GEMMA4, "attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "olmo2": ("Olmo2", {}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 8,
            "layer_types": KINDS,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": LOCAL},
        },
    ),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.22,
            "logits_scaling": 0.25,
        },
    ),
    "granitemoe": (
        "GraniteMoe",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.22,
            "logits_scaling": 0.25,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": KINDS,
            "intermediate_size": 64,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "nanochat": ("NanoChat", {}),
    "seed_oss": ("SeedOss", {"head_dim": 16}),
    "ernie4_5": ("Ernie4_5", {"head_dim": 16}),
    "qwen3_vl_text": ("Qwen3VLText", {"head_dim": 16}),
    "qwen3_vl_moe_text": ("Qwen3VLMoeText", {**EXPERTS, "num_experts": 5, "head_dim": 16}),
    "qwen3_5_text": ("Qwen3_5Text", DELTA_NET),
    "qwen3_5_moe_text": ("Qwen3_5MoeText", {**DELTA_NET, **SHARED_EXPERT}),
    "qwen3_next": ("Qwen3Next", {**DELTA_NET, **SHARED_EXPERT}),
    "olmo_hybrid": (
        "OlmoHybrid",
        {
            "num_hidden_layers": 3,
            "layer_types": DELTA_NET["layer_types"],
            "linear_key_head_dim": 16,
        },
    ),
    "lfm2": ("Lfm2", SHORT_CONV),
    "lfm2_moe": ("Lfm2Moe", {**SHORT_CONV, **EXPERTS, "num_experts": 5, "num_dense_layers": 1}),
    "granitemoehybrid": (
        "GraniteMoeHybrid",
        {
            **MAMBA2,
            **GRANITE,
            "num_local_experts": 5,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 160,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        },
    ),
    "nemotron_h": ("NemotronH", NEMOTRON),
    "falcon_h1": ("FalconH1", {**FALCON, "mamba_rms_norm": True, "mamba_norm_before_gate": False}),
    "arcee": ("Arcee", {}),
    "hunyuan_v1_dense": (
        "HunYuanDenseV1",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 1e4,
                "alpha": 1000.0,
                "factor": 1.0,
            },
        },
    ),
    "exaone4": ("Exaone4", {"sliding_window": 8, "layer_types": KINDS}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "glm4_moe": (
        "Glm4Moe",
        {
            **ROUTED,
            "num_hidden_layers": 3,
            "n_routed_experts": 8,
            "n_group": 4,
            "topk_group": 2,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.5,
            "attention_bias": True,
            "head_dim": 32,
        },
    ),
    "deepseek_v2": (
        "DeepseekV2",
        {
            **LATENT,
            "n_group": 4,
            "topk_group": 2,
            "topk_method": "group_limited_greedy",
            "num_hidden_layers": 2,
            "n_shared_experts": 2,
            "routed_scaling_factor": 1.5,
            "first_k_dense_replace": 1,
            "rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 0.7},
        },
    ),
    "deepseek_v3": (
        "DeepseekV3",
        {
            **LATENT,
            "n_group": 4,
            "topk_group": 2,
            "routed_scaling_factor": 1.2,
            "first_k_dense_replace": 1,
            "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0},
        },
    ),
    "kimi_k2": (  # transformers has its shape under this name
        "DeepseekV3",
        {
            **LATENT,
            "n_group": 1,
            "topk_group": 1,
            "routed_scaling_factor": 0.5,
            "num_hidden_layers": 2,
            "q_lora_rank": None,
            "first_k_dense_replace": 0,
        },
    ),
    "glm4_moe_lite": (
        "Glm4MoeLite",
        {
            **LATENT,
            "routed_scaling_factor": 1.2,
            "first_k_dense_replace": 1,
            "num_nextn_predict_layers": 1,
        },
    ),
    "mistral4": (
        "Mistral4",
        {
            **LATENT,
            "num_hidden_layers": 2,
            "n_group": 4,
            "topk_group": 2,
            "rope_parameters": {
                **YARN,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
                "llama_4_scaling_beta": 0.1,
            },
        },
    ),
    "cohere2": ("Cohere2", {"sliding_window": 8, "layer_types": KINDS, "logit_scale": 0.5}),
    "starcoder2": ("Starcoder2", {"norm_epsilon": 1e-5, "sliding_window": 8}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
}
PHI_MOE_LONGROPE = {**LONGROPE, "short_mscale": 1.243163121016122, "long_mscale": 1.6}
# what a family does only with other values
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3-longrope": (
        "Phi3",
        {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE},
    ),
    "deepseek_v2-lite": (
        "DeepseekV2",
        {**LATENT, "q_lora_rank": None, "n_shared_experts": 1, "attention_bias": True},
    ),
    "deepseek_v3-halves": ("DeepseekV3", {**LATENT, "n_group": 1, "rope_interleave": False}),
    "glm4_moe_lite-odd-widths": (
        "Glm4MoeLite",
        {**LATENT, "kv_lora_rank": 40, "qk_nope_head_dim": 12, "attention_bias": True},
    ),
    "glm4_moe-normed": (
        "Glm4Moe",
        {**ROUTED, "n_routed_experts": 6, "use_qk_norm": True, "norm_topk_prob": False},
    ),
    "llama4_text-plain": (
        "Llama4Text",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "intermediate_size": 96,
            "head_dim": 16,
            "use_qk_norm": False,
            "attn_temperature_tuning": False,
            "attention_chunk_size": None,
            "no_rope_layers": [1, 0],
            "rope_parameters": {**LLAMA3, "high_freq_factor": 1.0},  # as in Scout's files
        },
    ),
    "phimoe-longrope": (  # transformers takes short_factor for long texts, too
        "Phimoe",
        {
            "num_local_experts": 5,
            "original_max_position_embeddings": 64,
            "rope_parameters": {**PHI_MOE_LONGROPE, "long_factor": LONGROPE["short_factor"]},
        },
    ),
    "ernie4_5_moe-biased": (
        "Ernie4_5_Moe",
        {
            "moe_num_experts": 6,
            "moe_k": 3,
            "moe_intermediate_size": 96,
            "moe_num_shared_experts": 0,
            "num_hidden_layers": 3,
            "moe_layer_end_index": 1,
            "use_bias": True,
            "tie_word_embeddings": False,
        },
    ),
    "gemma3n_text-three": (
        "Gemma3nText",
        {
            **GEMMA3N,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "activation_sparsity_pattern": None,
            "num_kv_shared_layers": 0,
            "altup_num_inputs": 3,
            "altup_active_idx": 1,
            "altup_correct_scale": False,
            "intermediate_size": [96, 64, 128, 96],
            "vocab_size_per_layer_input": 200,
            "final_logit_softcapping": 3.0,
        },
    ),
    "gemma4_text-experts": ("Gemma4Text", GEMMA4_EXPERTS),
    "gemma4_text-dense": ("Gemma4Text", {**GEMMA4, "attention_k_eq_v": True}),
    "ernie4_5-biased": ("Ernie4_5", {"head_dim": 16, "use_bias": True}),
    "granitemoehybrid-dense": (
        "GraniteMoeHybrid",
        {
            **MAMBA2,
            **GRANITE,
            "num_local_experts": 0,
            "shared_intermediate_size": 128,
            "mamba_conv_bias": False,
            "mamba_proj_bias": True,
            "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        },
    ),
    "granitemoehybrid-attention": (
        "GraniteMoeHybrid",
        {
            **GRANITE,
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
            "intermediate_size": 64,
            "layer_types": ["full_attention"] * 2,
            "position_embedding_type": "rope",
            "mamba_n_heads": 2,
        },
    ),
    "nemotron_h-latent": (
        "NemotronH",
        {**NEMOTRON, "moe_latent_size": 32, "moe_intermediate_size": 64},
    ),
    "nemotron_h-biased": (
        "NemotronH",
        {**NEMOTRON, "use_bias": True, "mlp_bias": True, "n_group": 1, "topk_group": 1}
        | {"norm_topk_prob": False, "use_conv_bias": False, "ssm_state_size": 20},
    ),
    "falcon_h1-plain": ("FalconH1", {**FALCON, "attention_bias": True, "projectors_bias": True}),
    "falcon_h1-ungated": (
        "FalconH1",
        {**FALCON, "mamba_rms_norm": True, "mamba_proj_bias": True, "mlp_bias": True},
    ),
    "granitemoehybrid-nope": (
        "GraniteMoeHybrid",
        {
            "num_local_experts": 0,
            "shared_intermediate_size": 96,
            "layer_types": ["full_attention"] * 2,
            "mamba_n_heads": 2,
        },
    ),
    "lfm2-biased": ("Lfm2", {**SHORT_CONV, "conv_bias": True, "block_auto_adjust_ff_dim": False}),
    "qwen3_next-dense": ("Qwen3Next", {**DELTA_NET, **SHARED_EXPERT, "mlp_only_layers": [1]}),
    "qwen3_5-equal-heads": ("Qwen3_5Text", {**DELTA_NET, "linear_num_value_heads": 2}),
    "olmo_hybrid-nope": (
        "OlmoHybrid",
        {
            "linear_num_key_heads": 2,
            "linear_allow_neg_eigval": False,
            "layer_types": DELTA_NET["layer_types"][:2],
            "rope_parameters": {"rope_theta": None, "rope_type": "default"},
        },
    ),
    "qwen3_5-odd-widths": ("Qwen3_5Text", {**DELTA_NET, "linear_key_head_dim": 12}),
    "stablelm-whole": ("StableLm", {"partial_rotary_factor": 1.0}),
    "smollm3-listed": ("SmolLM3", {"no_rope_layers": [0, 1]}),
    "starcoder2-unbiased": ("Starcoder2", {"use_bias": False}),
    "granite-biased": ("Granite", {"attention_bias": True, "mlp_bias": True}),
    "seed_oss-biased": ("SeedOss", {"head_dim": 16, "attention_out_bias": True}),
    "gemma3_text-capped": ("Gemma3Text", {"head_dim": 16, "final_logit_softcapping": 3.0}),
}
ALL = ROWS | MORE
# what GGUF cannot say, or says by patterns of its own
GGUF_ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    **ROWS,
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": None}),
    "qwen2": ("Qwen2", {"use_sliding_window": False}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 96}),
    "gemma3_text": (
        "Gemma3Text",
        {
            **ROWS["gemma3_text"][1],
            "layer_types": None,
            "num_hidden_layers": 6,
            "query_pre_attn_scalar": 16,
        },
    ),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}),
    "gemma3n_text": ("Gemma3nText", {**GEMMA3N, "hidden_size": 96, "laurel_rank": 64}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 8,
            "num_hidden_layers": 4,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": LOCAL},
        },
    ),
    "exaone4": ("Exaone4", {"sliding_window": 8, "num_hidden_layers": 4}),
    "cohere2": ("Cohere2", {"sliding_window": 8, "num_hidden_layers": 4, "logit_scale": 0.5}),
    "starcoder2": ("Starcoder2", {"norm_epsilon": 1e-5, "sliding_window": None}),
    "phi3-longrope": MORE["phi3-longrope"],
    "llama4_text": (
        "Llama4Text",
        {**ROWS["llama4_text"][1], "attention_chunk_size": 8192, "floor_scale": 8192},
    ),
    "granitemoehybrid-attention": MORE["granitemoehybrid-attention"],
    "falcon_h1-plain": ("FalconH1", FALCON),
    "granitemoehybrid-dense": (
        "GraniteMoeHybrid",
        {**MORE["granitemoehybrid-dense"][1], "mamba_conv_bias": True, "mamba_proj_bias": False},
    ),
    "nemotron_h": (
        "NemotronH",
        {**NEMOTRON, "layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    ),
    "nemotron_h-latent": (
        "NemotronH",
        MORE["nemotron_h-latent"][1]
        | {"layers_block_type": ["linear_attention", "moe", "full_attention"]},
    ),
    "nemotron_h-dense": (
        "NemotronH",
        {
            **ROWS["nemotron_h"][1],
            "layers_block_type": ["linear_attention", "mlp"] * 2 + ["full_attention"],
        },
    ),
    "muse_glimmer_text": (
        "MuseGlimmerText",
        {**ROWS["muse_glimmer_text"][1], "post_norm_eps": 1e-8},  # GGUF readers know this number
    ),
    "gemma4_text-experts": MORE["gemma4_text-experts"],
    "gemma4_text-dense": MORE["gemma4_text-dense"],
    "bitnet": ("BitNet", {"tie_word_embeddings": True}),
    "phimoe": ("Phimoe", {"num_local_experts": 5, "attention_bias": True, "lm_head_bias": True}),
    "phimoe-longrope": (
        "Phimoe",
        {
            "num_local_experts": 5,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                **PHI_MOE_LONGROPE,
                "long_factor": LONGROPE["short_factor"],
                "long_mscale": PHI_MOE_LONGROPE["short_mscale"],
            },
        },
    ),
}
for without in ("mistral", "ministral", "nanochat", "olmo_hybrid"):
    del GGUF_ROWS[without]
