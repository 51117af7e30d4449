"""nanochat's own files, written as it writes them, and its forward pass written down once more."""

from __future__ import annotations

import json
import math
import pickle
from pathlib import Path
from typing import Any

import tiktoken
import torch
import torch.nn.functional as F

PATTERN = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,2}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)
CONTROL = (
    "<|bos|> <|user_start|> <|user_end|> <|assistant_start|> <|assistant_end|> <|python_start|> "
    "<|python_end|> <|output_start|> <|output_end|>"
).split()
WORDS = b"th he the in er an re nd on en at ou ed ha to or it is hi es ng  t  a  th  the".split(
    b" "
)
ENCODING = tiktoken.Encoding(
    name="rustbpe",
    pat_str=PATTERN,
    mergeable_ranks={
        token: rank
        for rank, token in enumerate(
            [bytes([i]) for i in range(256)] + list(dict.fromkeys(w for w in WORDS if len(w) > 1))
        )
    },
    special_tokens={},
)
NUM_RANKS = ENCODING.n_vocab
ENCODING = tiktoken.Encoding(
    name="rustbpe",
    pat_str=PATTERN,
    mergeable_ranks=ENCODING._mergeable_ranks,
    special_tokens={name: NUM_RANKS + i for i, name in enumerate(CONTROL)},
)
CONFIG = {
    "sequence_len": 256,
    "vocab_size": ENCODING.n_vocab,
    "n_layer": 4,
    "n_head": 4,
    "n_kv_head": 2,
    "n_embd": 64,
}
# Parameters beyond the first ones, keys of model_config, and what the program that wrote them had
# built in: base of RoPE, cap of the logits, factors of q and k and of value embeddings, window.
OLD = {"theta": 1e4, "cap": 15.0, "qk": 1.0, "value": 2.0, "short": 128}
VARIANTS: dict[str, tuple[set[str], dict[str, Any], dict[str, float]]] = {
    "first": (set(), {}, OLD),
    "windows": (set(), {"window_pattern": "SSSL"}, OLD),
    "lambdas": ({"resid", "x0"}, {"window_pattern": "SL"}, OLD),
    "resid": ({"resid"}, {}, OLD),
    "x0": ({"x0"}, {}, OLD),
    "values": ({"resid", "x0", "gate32"}, {"window_pattern": "SSSL", "softcap": 15}, OLD),
    "values-20": ({"resid", "x0", "gate32"}, {"softcap": 20}, {**OLD, "cap": 20.0}),
    "spring": (
        {"resid", "x0", "gate12"},
        {"window_pattern": "SSL", "softcap": 20},
        {"theta": 1e5, "cap": 20.0, "qk": 1.15, "value": 3.0, "short": 128},
    ),
    "smear": (
        {"resid", "x0", "gate12", "smear", "backout"},
        {"window_pattern": "SSSL"},
        {"theta": 1e5, "cap": 15.0, "qk": 1.2, "value": 3.0, "short": 128},
    ),
    "summer": (
        {"resid", "x0", "gate12", "backout"},
        {"window_pattern": "SSSL", "short_seq_len": 32},
        {"theta": 1e5, "cap": 15.0, "qk": 1.2, "value": 3.0, "short": 32},
    ),
}


def parameters(extras: set[str], config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random ones, large enough that every term matters."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int, std: float = 0.2) -> torch.Tensor:
        return torch.randn(shape, generator=random) * std

    C, L, D = config["n_embd"], config["n_layer"], config["n_embd"] // config["n_head"]
    padded, kv = -(-config["vocab_size"] // 64) * 64, config["n_kv_head"] * D
    state = {"transformer.wte.weight": normal(padded, C), "lm_head.weight": normal(padded, C)}
    for i in range(L):
        h = f"transformer.h.{i}"
        state |= {f"{h}.attn.c_q.weight": normal(C, C), f"{h}.attn.c_k.weight": normal(kv, C)}
        state |= {f"{h}.attn.c_v.weight": normal(kv, C), f"{h}.attn.c_proj.weight": normal(C, C)}
        state |= {f"{h}.mlp.c_fc.weight": normal(4 * C, C)}
        state |= {f"{h}.mlp.c_proj.weight": normal(C, 4 * C, std=0.05)}
        width = 32 if "gate32" in extras else 12 if "gate12" in extras else 0
        if width and i % 2 == (L - 1) % 2:
            state[f"{h}.attn.ve_gate.weight"] = normal(config["n_kv_head"], width)
            state[f"value_embeds.{i}.weight"] = normal(padded, kv, std=0.5)
    if "resid" in extras:
        state["resid_lambdas"] = 1 + normal(L)
    if "x0" in extras:
        state["x0_lambdas"] = normal(L)
    if "smear" in extras:
        state |= {"smear_gate.weight": normal(1, 24, std=1), "smear_lambda": torch.tensor([0.7])}
    if "backout" in extras:
        state["backout_lambda"] = torch.tensor([0.3])
    return state


def save_tokenizer(base: Path) -> None:
    (base / "tokenizer").mkdir(parents=True, exist_ok=True)
    (base / "tokenizer" / "tokenizer.pkl").write_bytes(pickle.dumps(ENCODING))


def save(
    base: Path, variant: str = "first", place: str = "chatsft_checkpoints/d4", step: int = 7
) -> Path:
    """A base directory with one checkpoint -> the checkpoint."""
    extras, more, _ = VARIANTS[variant]
    config = {**CONFIG, **more}
    (base / place).mkdir(parents=True, exist_ok=True)
    save_tokenizer(base)
    path = base / place / f"model_{step:06d}.pt"
    torch.save(parameters(extras, config, step), path)
    meta = {"step": step, "val_bpb": 0.8, "model_config": config, "user_config": {"depth": 4}}
    path.with_name(f"meta_{step:06d}.json").write_text(json.dumps(meta))
    return path


def norm(x: torch.Tensor) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + 2**-23).rsqrt()


def attention(
    state: dict[str, torch.Tensor], i: int, x: torch.Tensor, ids: torch.Tensor, window: float,
    config: dict[str, Any], built_in: dict[str, float],
) -> torch.Tensor:  # fmt: skip
    T, D = len(x), config["n_embd"] // config["n_head"]
    h = f"transformer.h.{i}.attn"
    q, k, v = (F.linear(x, state[f"{h}.c_{n}.weight"]).view(T, -1, D) for n in "qkv")
    if f"{h}.ve_gate.weight" in state:
        gate = state[f"{h}.ve_gate.weight"]
        opened = built_in["value"] * F.linear(x[:, : gate.shape[1]], gate).sigmoid()
        v = v + opened[..., None] * state[f"value_embeds.{i}.weight"][ids].view(T, -1, D)
    angle = torch.outer(torch.arange(T), built_in["theta"] ** -(torch.arange(0, D, 2) / D))
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    q, k = (
        norm(torch.cat((a * cos + b * sin, b * cos - a * sin), -1)) * built_in["qk"]
        for a, b in (q.chunk(2, -1), k.chunk(2, -1))
    )
    k, v = (t.repeat_interleave(config["n_head"] // config["n_kv_head"], 1) for t in (k, v))
    back = torch.arange(T)[:, None] - torch.arange(T)
    scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(D)
    scores = scores.masked_fill((back < 0) | (back > window), -math.inf)
    y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    return F.linear(y, state[f"{h}.c_proj.weight"])


def logits(variant: str, ids: list[int], seed: int = 7) -> torch.Tensor:
    """nanochat's forward pass of a whole text (T,) -> (T, V)"""
    extras, more, built_in = VARIANTS[variant]
    config = {**CONFIG, **more}
    state, tokens, L = parameters(extras, config, seed), torch.tensor(ids), config["n_layer"]
    x = norm(state["transformer.wte.weight"][tokens])
    if "smear" in extras:
        gate = (state["smear_lambda"] * F.linear(x[:, :24], state["smear_gate.weight"]).sigmoid())[
            1:
        ]
        x = torch.cat((x[:1], x[1:] + gate * x[:-1]))
    first, middle, pattern = x, x, config.get("window_pattern", "L")
    for i in range(L):
        resid = state["resid_lambdas"][i] if "resid" in extras else 1
        x = resid * x + (state["x0_lambdas"][i] * first if "x0" in extras else 0)
        is_short = pattern[i % len(pattern)] == "S" and i < L - 1
        window = built_in["short"] if is_short else math.inf
        x = x + attention(state, i, norm(x), tokens, window, config, built_in)
        h = F.linear(norm(x), state[f"transformer.h.{i}.mlp.c_fc.weight"]).relu().square()
        x = x + F.linear(h, state[f"transformer.h.{i}.mlp.c_proj.weight"])
        middle = x if i == L // 2 else middle
    if "backout" in extras:
        x = x - state["backout_lambda"] * middle
    out = F.linear(norm(x), state["lm_head.weight"])[:, : config["vocab_size"]]
    return built_in["cap"] * torch.tanh(out / built_in["cap"])
