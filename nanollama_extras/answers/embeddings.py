"""Embeddings of texts: hidden states after the last norm, pooled and scaled to unit length.

Seam       Sequence.pooler: the core hands it the states of a text's tokens, and takes the embedding
           in place of an answer.
Remove     delete this file; `LLM.embed`, --embed and the routes of embeddings then say that they
           need it.
Source     https://sbert.net/docs/package_reference/sentence_transformer/modules.html (Pooling)
"""

from __future__ import annotations

import json
import re

import torch
import torch.nn.functional as F
from torch import Tensor

from nanollama import Checkpoint, RequestError, check_number, excerpt, read_json

# {arch}.pooling_type in GGUF metadata (https://github.com/ggml-org/llama.cpp, llama_pooling_type)
GGUF_POOLING = {"1": "mean", "2": "cls", "3": "last", "4": "rank"}


def declared_pooling(checkpoint: Checkpoint) -> str | None:
    """The pooling that a model's files declare: GGUF's pooling_type, or the file of
    sentence-transformers, 1_Pooling/config.json with its pooling_mode_*. None for none."""
    path = checkpoint.path
    if not path.is_dir():
        return GGUF_POOLING.get(str(checkpoint.pooling))
    try:
        modules = json.loads((path / "modules.json").read_text(encoding="utf-8"))
        folder = next(m["path"] for m in modules if str(m["type"]).endswith("Pooling"))
    except (OSError, ValueError, TypeError, KeyError, StopIteration):
        return None
    if not re.fullmatch(r"[\w.-]+", str(folder)) or folder == "..":
        return None
    modes = read_json(path / folder / "config.json", required=False)
    prefix = "pooling_mode_"
    active = [
        key[len(prefix) :] for key, on in modes.items() if key.startswith(prefix) and on is True
    ]
    if "pooling_mode" in modes:  # newer files
        active = [str(modes["pooling_mode"])]
    names = {"mean_tokens": "mean", "lasttoken": "last"}
    return "+".join(names.get(name, name) for name in active) or None


class Pooler:
    """Pools the states of one text by their mean, or takes the last one, as the checkpoint
    declares; the mean is the default. Raises RequestError for other kinds."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        kind = declared_pooling(checkpoint)
        if kind not in (None, "mean", "last"):
            raise RequestError(f"this model pools by {excerpt(kind)}; mean and last are supported")
        self.kind = kind or "mean"
        self.chunks: list[Tensor] = []  # of states (n, C)

    def take(self, states: Tensor) -> None:
        """Keep the states (n, C) of the next n tokens."""
        if self.kind == "last":
            self.chunks = [states[-1:].clone()]
        else:
            self.chunks.append(states)

    def embedding(self) -> list[float]:
        """The embedding (C,). Raises LogitsError where the model computed no numbers."""
        states = torch.cat(self.chunks).double()  # float64: the size of chunks must not matter
        pooled = F.normalize(states.mean(0), dim=0)
        check_number(float(pooled.sum()), "embedding")
        embedding: list[float] = pooled.tolist()
        return embedding
