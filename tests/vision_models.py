"""Tiny random models that read images, of every family, with their processors' files."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import conftest
import families
import numpy as np
import tokenizers
import torch
import transformers
from PIL import Image

from nanollama_extras.answers.images import Picture

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content is string %}{{ m.content }}"
    "{% else %}{% for p in m.content %}{% if p.type == 'image' %}IMAGE{% else %}{{ p.text }}"
    "{% endif %}{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
FEW_LAYERS = {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
SQUARE = {"hidden_size": 32, **FEW_LAYERS, "image_size": 32, "patch_size": 8}
QWEN = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": 8}
QWEN |= {"out_hidden_size": 64}
QWEN_PIXELS = {"patch_size": 8, "size": {"shortest_edge": 16 * 16, "longest_edge": 64 * 64}}
QWEN_TOKENS = "<|vision_start|> <|image_pad|> <|vision_end|> <|video_pad|>"
QWEN_NAMES = {"image_token": "<|image_pad|>", "video_token": "<|video_pad|>"}
QWEN_NAMES |= {"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"}
IN_QWEN = "<|vision_start|><|image_pad|><|vision_end|>"
THREE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}
WIDE_THREE = {**THREE, "mrope_section": [6, 5, 5]}
TILES = " ".join(f"<row_{row}_col_{col}>" for row in (1, 2) for col in (1, 2))
IDEFICS: dict[str, Any] = {
    "text": {"model_type": "llama"},
    "vision": SQUARE,
    "tokens": f"<image> <fake_token_around_image> <global-img> <end_of_utterance> {TILES}",
    "names": {"image_token": "<image>"},
    "pixels": {"size": {"longest_edge": 64}, "max_image_size": {"longest_edge": 32}},
    "processor": {"image_seq_len": 4},
    "image": "<image>",
}
QWEN3: dict[str, Any] = {
    "vision": {**QWEN, "num_position_embeddings": 16},
    "tokens": QWEN_TOKENS,
    "names": QWEN_NAMES,
    "image_processor": "Qwen2VL",
    "pixels": QWEN_PIXELS,
    "image": IN_QWEN,
}
GLM: dict[str, Any] = {
    "vision": {**QWEN, "image_size": 64},
    "tokens": "<|begin_of_image|> <|image|> <|end_of_image|> <|video|>",
    "names": {"image_token": "<|image|>", "video_token": "<|video|>"},
    "image_processor": "Glm4v",
    "pixels": QWEN_PIXELS,
    "image": "<|begin_of_image|><|image|><|end_of_image|>",
}
HALF_THREE = {**THREE, "partial_rotary_factor": 0.5, "mrope_section": [1, 1, 2]}
GEMMA4: dict[str, Any] = {
    "kind": "Gemma4",
    "vision": {
        **FEW_LAYERS,
        "num_hidden_layers": 1,
        "hidden_size": 32,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "patch_size": 8,
        "pooling_kernel_size": 2,
        "position_embedding_size": 64,
    },
    "whole": {"audio_config": None},
    "tokens": "<|image> <|image|> <image|> <|video|> <|audio> <|audio|> <audio|>",
    "names": {"boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>"}
    | {"boa_token": "<|audio>", "audio_token": "<|audio|>", "eoa_token": "<audio|>"},
    "pixels": {"patch_size": 8, "pooling_kernel_size": 2, "max_soft_tokens": 70},
    "image": "<|image|>",
}
DELTA_NET = {
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 3,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 32,
    "linear_value_head_dim": 32,
    "rope_parameters": {**THREE, "partial_rotary_factor": 0.5, "mrope_section": [3, 3, 2]},
}
PIXTRAL: dict[str, Any] = {
    "vision": {"model_type": "pixtral", **SQUARE, "image_size": 64},
    "tokens": "[IMG] [IMG_BREAK] [IMG_END]",
    "names": {"image_token": "[IMG]"},
    "image_processor": "Pixtral",
    "pixels": {"size": {"longest_edge": 64}, "patch_size": {"height": 8, "width": 8}},
    "processor": {
        "processor_class": "PixtralProcessor",
        "patch_size": 8,
        "image_token": "[IMG]",
        "image_break_token": "[IMG_BREAK]",
        "image_end_token": "[IMG_END]",
    },
    "image": "[IMG]",
}
PINPOINTS = [[32, 32], [32, 64], [64, 32], [64, 64]]
# model_type -> the parts of its config, the tokens beside those of texts, what its files say about
# pixels, and what the template writes for an image
FAMILIES: dict[str, dict[str, Any]] = {
    "idefics3": {**IDEFICS, "kind": "Idefics3"},
    "smolvlm": {**IDEFICS, "kind": "SmolVLM"},
    "gemma3": {
        "kind": "Gemma3",
        "text": {
            "model_type": "gemma3_text",
            "head_dim": 16,
            "sliding_window": 12,
            "query_pre_attn_scalar": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
        "vision": {**SQUARE, "image_size": 64},
        "whole": {"mm_tokens_per_image": 16},
        "tokens": "<start_of_image> <image_soft_token> <end_of_image>",
        "names": {
            "boi_token": "<start_of_image>",
            "image_token": "<image_soft_token>",
            "eoi_token": "<end_of_image>",
        },
        "pixels": {"size": {"height": 64, "width": 64}},
        "processor": {"image_seq_length": 16},
        "image": "<start_of_image>",
    },
    "qwen2_5_vl": {
        "kind": "Qwen2_5_VL",
        "text": {"model_type": "qwen2_5_vl_text", "rope_parameters": THREE},
        "vision": {**QWEN, "window_size": 32, "fullatt_block_indexes": [1]},
        "tokens": QWEN_TOKENS,
        "names": QWEN_NAMES,
        "image_processor": "Qwen2VL",
        "pixels": QWEN_PIXELS,
        "image": IN_QWEN,
    },
    "qwen3_vl": {
        **QWEN3,
        "kind": "Qwen3VL",
        "text": {
            "model_type": "qwen3_vl_text",
            "num_hidden_layers": 3,
            "head_dim": 32,
            "rope_parameters": WIDE_THREE,
        },
        "vision": {**QWEN3["vision"], "deepstack_visual_indexes": [0, 1]},
    },
    "qwen3_vl_moe": {
        **QWEN3,
        "kind": "Qwen3VLMoe",
        "text": {
            "model_type": "qwen3_vl_moe_text",
            "head_dim": 32,
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "rope_parameters": WIDE_THREE,
        },
        "vision": {**QWEN3["vision"], "deepstack_visual_indexes": [1]},
    },
    "qwen3_5": {**QWEN3, "kind": "Qwen3_5", "text": DELTA_NET},
    "qwen3_5_moe": {
        **QWEN3,
        "kind": "Qwen3_5Moe",
        "text": {
            **DELTA_NET,
            "model_type": "qwen3_5_moe_text",
            "num_experts": 5,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "shared_expert_intermediate_size": 32,
        },
    },
    "qwen2_vl": {
        **QWEN3,
        "kind": "Qwen2VL",
        "text": {"model_type": "qwen2_vl_text", "rope_parameters": THREE},
        "vision": {"depth": 2, "embed_dim": 32, "hidden_size": 64, "num_heads": 2, "patch_size": 8},
    },
    "glm4v": {
        **GLM,
        "kind": "Glm4v",
        "text": {"model_type": "glm4v_text", "rope_parameters": HALF_THREE},
    },
    "glm4v_moe": {
        **GLM,
        "kind": "Glm4vMoe",
        "text": {
            "model_type": "glm4v_moe_text",
            "num_hidden_layers": 3,
            "n_routed_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 32,
            "head_dim": 16,
            "rope_parameters": HALF_THREE,
        },
    },
    "gemma4": {
        **GEMMA4,
        "text": {
            "model_type": "gemma4_text",
            **families.GEMMA4_SMALL,
            "vocab_size_per_layer_input": 384,
        },
    },
    "gemma4-whole": {
        **GEMMA4,
        "text": {
            "model_type": "gemma4_text",
            **families.GEMMA4,
            "sliding_window": 20,
            "use_bidirectional_attention": "vision",
        },
    },
    "gemma4_unified": {
        **GEMMA4,
        "kind": "Gemma4Unified",
        "image_processor": "Gemma4",
        "text": {
            "model_type": "gemma4_unified_text",
            **families.ROWS["gemma4_unified_text"][1],
            "sliding_window": 20,
        },
        "vision": {
            "patch_size": 8,
            "pooling_kernel_size": 2,
            "mm_embed_dim": 48,
            "mm_posemb_size": 64,
            "output_proj_dims": 48,
        },
    },
    "llava_onevision": {
        "kind": "LlavaOnevision",
        "text": {"model_type": "qwen2"},
        "vision": {"model_type": "siglip_vision_model", **SQUARE},
        "whole": {"image_grid_pinpoints": PINPOINTS},
        "tokens": "<image> <video>",
        "names": {"image_token": "<image>", "video_token": "<video>"},
        "pixels": {"size": {"height": 32, "width": 32}, "image_grid_pinpoints": PINPOINTS},
        "processor": {"num_image_tokens": 16, "vision_feature_select_strategy": "full"},
        "image": "<image>\n",
    },
    "llava": {
        "kind": "Llava",
        "text": {"model_type": "llama"},
        "vision": {"model_type": "clip_vision_model", **SQUARE},
        "tokens": "<image>",
        "names": {"image_token": "<image>"},
        "image_processor": "CLIP",
        "pixels": {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}},
        "processor": {
            "patch_size": 8,
            "vision_feature_select_strategy": "default",
            "num_additional_image_tokens": 1,
        },
        "image": "<image>\n",
    },
    "llava-pixtral": {
        **PIXTRAL,
        "kind": "Llava",
        "text": {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        "whole": {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"},
    },
    "mistral3": {
        **PIXTRAL,
        "kind": "Mistral3",
        "text": {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        "processor": {**PIXTRAL["processor"], "spatial_merge_size": 2},
    },
    "lfm2_vl": {
        "kind": "Lfm2Vl",
        "text": {
            "model_type": "lfm2",
            "num_hidden_layers": 3,
            "layer_types": ["conv", "full_attention", "conv"],
            "block_multiple_of": 32,
        },
        "vision": {
            **{key: value for key, value in SQUARE.items() if key != "image_size"},
            "num_patches": 64,
        },
        "whole": {"projector_hidden_size": 48},
        "tokens": "<image> <|image_start|> <|image_end|> <|img_thumbnail|> "
        + TILES.replace("<row", "<|img_row").replace(">", "|>"),
        "names": {"image_token": "<image>"},
        "pixels": {
            "encoder_patch_size": 8,
            "tile_size": 32,
            "min_image_tokens": 4,
            "max_image_tokens": 16,
            "min_tiles": 2,
            "max_tiles": 4,
            "max_num_patches": 64,
        },
        "image": "<image>",
    },
    "internvl": {
        "kind": "InternVL",
        "text": {"model_type": "qwen2"},
        "vision": {**SQUARE, "image_size": [32, 32], "patch_size": [8, 8]},
        "whole": {"image_seq_length": 4},
        "tokens": "<img> <IMG_CONTEXT> </img> <video>",
        "names": {
            "start_image_token": "<img>",
            "context_image_token": "<IMG_CONTEXT>",
            "end_image_token": "</img>",
            "video_token": "<video>",
        },
        "image_processor": "GotOcr2",
        "pixels": {
            "size": {"height": 32, "width": 32},
            "crop_to_patches": True,
            "min_patches": 1,
            "max_patches": 3,
        },
        "processor": {"image_seq_length": 4},
        "image": "<IMG_CONTEXT>\n",
    },
}


def picture(width: int, height: int, seed: int = 0) -> Picture:
    """A picture of random pixels."""
    random = np.random.default_rng((width, height, seed))
    pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
    digest = hashlib.sha256(pixels.tobytes() + bytes([seed])).hexdigest()
    return Picture(digest, Image.fromarray(pixels))


def save_tokenizer(directory: Path, row: dict[str, Any]) -> tokenizers.Tokenizer:
    """The tiny tokenizer, with the family's tokens for images and a template."""
    conftest.save_tiny_tokenizer(directory)
    file = directory / "tokenizer.json"
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.add_special_tokens(row["tokens"].split())
    tokenizer.save(str(file))
    values = json.loads((directory / "tokenizer_config.json").read_text())
    values |= {"extra_special_tokens": row["names"], "pad_token": "</s>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(values))
    (directory / "chat_template.jinja").write_text(TEMPLATE.replace("IMAGE", row["image"]))
    return tokenizer


def save_processor(directory: Path, row: dict[str, Any]) -> None:
    name = row.get("image_processor", row["kind"])
    (directory / "processor_config.json").write_text(json.dumps(row.get("processor", {})))
    if row["kind"] == "Lfm2Vl":  # transformers' own class needs torchvision
        values = {"image_processor_type": "Lfm2VlImageProcessor", **row["pixels"]}
        (directory / "preprocessor_config.json").write_text(json.dumps(values))
        return
    pil, own = f"{name}ImageProcessorPil", f"{name}ImageProcessor"
    kind = getattr(transformers, pil if hasattr(transformers, pil) else own)
    kind(**row["pixels"]).save_pretrained(directory)


def save(directory: Path, family: str, **changed: Any) -> Path:
    """A tiny random model of a family with all of its files; `changed` are keys of its config."""
    row = FAMILIES[family]
    tokenizer = save_tokenizer(directory, row)
    save_processor(directory, row)
    text = {**conftest.TINY, "vocab_size": 384, "max_position_embeddings": 1024, **row["text"]}
    name = row["names"].get("image_token") or row["names"]["context_image_token"]
    ids = dict.fromkeys(("image_token_id", "image_token_index"), tokenizer.token_to_id(name))
    kind = getattr(transformers, f"{row['kind']}Config")
    known = kind().to_dict()
    ids = {key: value for key, value in ids.items() if key in known} or ids
    fields = {"text_config": text, "vision_config": row["vision"], **row.get("whole", {}), **ids}
    config = kind(**{**fields, **changed})
    torch.manual_seed(0)
    model = transformers.AutoModelForMultimodalLM.from_config(config).eval()
    for part, parameter in model.named_parameters():  # large enough that every term matters
        plus_one = family in ("gemma3", "qwen3_5", "qwen3_5_moe") and "linear_attn" not in part
        plus_one &= "visual" not in part and "vision" not in part
        mean = float("norm" in part and part.endswith("weight") and not plus_one)
        torch.nn.init.normal_(parameter, mean=mean, std=0.2)
    model.save_pretrained(directory)
    return directory
