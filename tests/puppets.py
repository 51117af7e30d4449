"""Tiny models whose answers are known: embeddings are one-hot, attention and MLP are zero, and the
head leads from each token to the next one of a script."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

import nanollama

CONTROL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
CHATML = nanollama.CHATML


def spelled(text: str) -> str:
    """A piece in the alphabet of byte-level vocabularies."""
    alphabet = {byte: character for character, byte in nanollama.byte_alphabet().items()}
    return "".join(alphabet[byte] for byte in text.encode())


def write(
    path: Path,
    script: Sequence[str],
    control: Sequence[str] = (),
    user: Sequence[str] = (),
    template: str = CHATML,
    **settings: Any,
) -> Path:
    """A directory of a Llama that answers any prompt with the pieces of a script, one token each,
    and then <|im_end|>. `control` and `user` are added tokens, special and not."""
    special = [*CONTROL, *control]
    vocab = nanollama.byte_alphabet() | {w: 256 + i for i, w in enumerate([*special, *user])}
    ids = []
    for word in script:
        piece = word if word in (*special, *user) else spelled(word)
        ids.append(vocab.setdefault(piece, len(vocab)))
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": vocab[w], "content": w, "special": w in special, **flags}
            for w in (*special, *user)
        ],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": vocab, "merges": []},
    }
    num, width = len(vocab), (len(vocab) + 31) // 32 * 32
    following = dict(zip(ids, [*ids[1:], vocab["<|im_end|>"]]))
    head = torch.zeros(num, width)
    for i in range(num):
        head[following.get(i, ids[0]), i] = 1.0
    layer = "model.layers.0."
    tensors = {
        "model.embed_tokens.weight": torch.eye(num, width),
        "lm_head.weight": head,
        "model.norm.weight": torch.ones(width),
        layer + "input_layernorm.weight": torch.ones(width),
        layer + "post_attention_layernorm.weight": torch.ones(width),
        layer + "mlp.gate_proj.weight": torch.zeros(32, width),
        layer + "mlp.up_proj.weight": torch.zeros(32, width),
        layer + "mlp.down_proj.weight": torch.zeros(width, 32),
    }
    tensors |= {f"{layer}self_attn.{n}_proj.weight": torch.zeros(width, width) for n in "qkvo"}
    config = {
        "model_type": "llama",
        "vocab_size": num,
        "hidden_size": width,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": width // 32,
        "num_key_value_heads": width // 32,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "eos_token_id": vocab["<|im_end|>"],
    }
    path.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, path / "model.safetensors")
    for name, value in {
        "config.json": config,
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"eos_token": "<|im_end|>", "chat_template": template, **settings},
    }.items():
        (path / name).write_text(json.dumps(value), encoding="utf-8")
    return path
