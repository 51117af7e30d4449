"""The model `tiny-random`, for tests: a Llama of random weights with a byte-level tokenizer.

Adds       `find_model`, which makes the same files on every machine.
Seam       FINDERS: the name "tiny-random".
Remove     delete this file; `--model tiny-random` then says that it needs it.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import tempfile
from pathlib import Path

import safetensors.torch
import torch

import nanollama

TINY_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 260,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
}
TINY_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<unk>")  # after the 256 bytes


def find_model(reference: str, root: Path) -> Path:
    """The directory in `root` in which the model is written the first time."""
    directory = root / reference / nanollama.__version__
    if not directory.exists():
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
            new = Path(scratch) / "new"
            new.mkdir()
            write_tiny_random(new)
            with contextlib.suppress(OSError):  # another process was faster
                new.rename(directory)
    return directory


def write_tiny_random(directory: Path) -> None:
    """Write config, weights and tokenizer into a directory. Raises OSError."""
    shapes = tensor_shapes().items()
    tensors = {name: torch.tensor(tensor_values(name, shape)).view(shape) for name, shape in shapes}
    (directory / "model.safetensors").write_bytes(safetensors.torch.save(tensors))
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = {word: 256 + i for i, word in enumerate(TINY_SPECIAL)}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": w, "special": True, **flags} for w, i in special.items()
        ],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {"type": "BPE", "vocab": nanollama.byte_alphabet() | special, "merges": []},
    }
    for file, value in {
        "config.json": {**TINY_CONFIG, "eos_token_id": special["<|im_end|>"]},
        "tokenizer.json": tokenizer,
        "tokenizer_config.json": {"eos_token": "<|im_end|>"},
    }.items():
        (directory / file).write_text(json.dumps(value), encoding="utf-8")


def tensor_shapes() -> dict[str, tuple[int, ...]]:
    """The shape of each tensor by its name."""
    V, C, F, kv = 260, 64, 96, 32
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens": (V, C), "norm": (C,)}
    for layer in ("layers.0", "layers.1"):
        shapes |= {f"{layer}.{n}_layernorm": (C,) for n in ("input", "post_attention")}
        rows = {"q": C, "k": kv, "v": kv, "o": C}
        shapes |= {f"{layer}.self_attn.{n}_proj": (num, C) for n, num in rows.items()}
        shapes |= {f"{layer}.mlp.{n}_proj": (F, C) for n in ("gate", "up")}
        shapes[f"{layer}.mlp.down_proj"] = (C, F)
    names = {f"model.{name}.weight": shape for name, shape in shapes.items()}
    return {**names, "lm_head.weight": (V, C)}


def tensor_values(name: str, shape: tuple[int, ...]) -> list[float]:
    """Random numbers with a pattern in channel 0: it is large in every embedding, and the head's
    rows of printable ASCII and of <|im_end|> favour it, so answers consist of these."""
    rng = random.Random(name)
    values = [rng.gauss(float("norm" in name), 0.2) for _ in range(math.prod(shape))]
    if "embed" in name:
        values[::64] = [16.0] * 260
    if "lm_head" in name:
        values[::64] = [2.0 if 31 < i < 127 or i == 258 else -2.0 for i in range(260)]
    return values
