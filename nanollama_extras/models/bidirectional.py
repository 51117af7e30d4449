"""Models whose tokens see the tokens after them, too: EmbeddingGemma. They make embeddings only.

Adds       `new_decoder`: for such a model a decoder that reads each text in one step and keeps
           nothing of it, and that refuses to continue a text.
Seam       Family.decoder and Family.gguf_layout of Gemma 3; models.gemma_config reads its config.
           `Decoder.scheduler` and `Decoder.new_cache`. Imports models.layers.
Source     https://github.com/huggingface/transformers (src/transformers/models/gemma3)
Remove     delete this file and let Gemma 3's row name models.layers:VariedDecoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from nanollama import (
    ROW_TILE,
    Attention,
    Batch,
    Decoder,
    KVCache,
    ModelConfig,
    RequestError,
    Scheduler,
    Sequence,
    Span,
    TensorSource,
    Weights,
    attention,
)
from nanollama_extras.models.layers import VariedDecoder

QUERIES = 256  # rows of attention at a time, for which a table of scores is small
# Layers after pooling, in GGUF files of llama.cpp's converter and of Ollama's
DENSE = {"dense.0.weight": "dense_2.weight", "dense.1.weight": "dense_3.weight"}


def gguf_layout(
    tensors: Mapping[str, TensorSource], config: ModelConfig
) -> dict[str, TensorSource]:
    return {DENSE.get(name, name): tensor for name, tensor in tensors.items()}


def refuse_text() -> NoReturn:
    raise RequestError(
        "this model makes embeddings and writes no text; use --embed, LLM.embed or /v1/embeddings",
        "model",
    )


class WholeTexts(Scheduler):
    """Gives each sequence all of its tokens in one step, as many sequences as fit into a step."""

    def add(self, seq: Sequence) -> None:
        if seq.pooler is None:
            refuse_text()
        super().add(seq)

    def schedule(self) -> list[tuple[Sequence, int]]:
        room, work = self.prefill_chunk, list[tuple[Sequence, int]]()
        for seq in self.running:
            num_new = len(seq.token_ids)
            if not work or num_new <= room:
                work.append((seq, num_new))
                room -= num_new
        return work


def reach_bias(
    queries: range, keys: range, reach: int | None, num_groups: int, like: Tensor
) -> Tensor:
    """Numbers to add to scores: -inf where a key is `reach` or more positions away from a query, on
    either side. (rows, keys): queries repeated for each of `num_groups`, padded to ROW_TILE"""
    bias = torch.zeros(len(queries), len(keys))
    if reach is not None:
        distance = torch.tensor(queries).unsqueeze(1) - torch.tensor(keys)
        bias.masked_fill_(distance.abs() >= reach, -math.inf)
    bias = bias.repeat(num_groups, 1)
    return F.pad(bias, (0, 0, 0, -len(bias) % ROW_TILE)).to(like.device, like.dtype)


class WholeTextCache(KVCache):
    """Keeps nothing after a step; in it, the tokens of a text see each other."""

    def resumable(self, slot: int, num_tokens: int, length: int) -> int:
        return 0

    def attend_span(
        self, attn: Attention, heads: tuple[Tensor, ...], batch: Batch, span: Span
    ) -> Tensor:
        config, num_new = self.config, span.num_new
        q, k, v = (x[span.row : span.row + num_new] for x in heads)
        reach, num_groups = config.own["reach"][attn.index], q.shape[1] // k.shape[1]
        keys, values = k.transpose(0, 1), v.transpose(0, 1)  # (Hkv, n, D)
        parts = []
        for start in range(0, num_new, QUERIES):
            queries = range(start, min(start + QUERIES, num_new))
            seen = range(num_new)
            if reach is not None:
                seen = seen[max(0, queries[0] - reach + 1) : queries[-1] + reach]
            at = span.row, start, reach
            bias = batch.memo.get(at)
            if bias is None:
                bias = batch.memo[at] = reach_bias(queries, seen, reach, num_groups, q)
            near = slice(seen.start, seen.stop)
            scaling = config.attn_scale, config.attn_softcap, attn.sinks
            rows = q[queries.start : queries.stop]
            parts.append(attention(rows, keys[:, near], values[:, near], bias, *scaling))
        return torch.cat(parts)


class WholeTextDecoder(VariedDecoder):
    scheduler = WholeTexts
    is_recordable = False  # there is no decode step

    def __init__(self, config: ModelConfig, weights: Weights, kv_dtype: str = "auto") -> None:
        weights.used |= {*DENSE.values()}  # answers.embeddings reads them
        super().__init__(config, weights, kv_dtype)

    def new_cache(self, num_slots: int, most_new: int = 0, **saving: Any) -> KVCache:
        return WholeTextCache(self.config, num_slots, self.kv_dtype, self.device)

    def logits(self, x: Tensor, batch: Batch) -> Tensor:
        refuse_text()


def new_decoder(config: ModelConfig, weights: Weights, kv_dtype: str = "auto") -> Decoder:
    """The decoder of a model that may or may not be of this kind."""
    kind = WholeTextDecoder if "reach" in config.own else VariedDecoder
    return kind(config, weights, kv_dtype)
