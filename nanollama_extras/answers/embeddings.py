"""Embeddings of texts: hidden states after the last norm, pooled and scaled to unit length.

Seam       Sequence.pooler: the core hands it the states of a text's tokens, and takes the embedding
           in place of an answer.
Remove     delete this file; `LLM.embed`, --embed and the routes of embeddings then say that they
           need it.
Source     https://sbert.net/docs/package_reference/sentence_transformer/modules.html (Pooling)
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanollama import RequestError, check_number, excerpt


class Pooler:
    """Pools the states of one text by their mean or takes the last one, as `kind` says; None is the
    mean. Raises RequestError for other kinds."""

    def __init__(self, kind: str | None) -> None:
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
