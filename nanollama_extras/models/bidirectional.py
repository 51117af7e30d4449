"""Models whose tokens see the tokens after them, too: EmbeddingGemma. They make embeddings only.

Adds       `new_decoder`: for such a model a decoder that reads each text in one step and keeps
           nothing of it, and that refuses to continue a text; for another, Gemma 3's, in which only
           tokens of an image see each other.
Seam       Family.decoder and Family.gguf_layout of Gemma 3; models.gemma_config reads its config.
           `Decoder.scheduler` and `Decoder.new_cache`. Imports kernels.arrays, models.layers and
           models.whole_images.
Source     https://github.com/huggingface/transformers (src/transformers/models/gemma3)
Remove     delete this file and let Gemma 3's row name models.layers:VariedDecoder.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NoReturn

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
from nanollama_extras.kernels.arrays import F, torch
from nanollama_extras.models.layers import VariedDecoder
from nanollama_extras.models.whole_images import WholeImages

if TYPE_CHECKING:
    from torch import Tensor

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
    num_queries: int, num_keys: int, offset: int, reach: int | None, num_groups: int
) -> Tensor:
    """Numbers to add to scores of queries, of which the first stands at key `offset`: -inf where a
    key is `reach` or more positions away, on either side. (rows, keys): queries repeated for each
    of `num_groups`, padded to ROW_TILE"""
    bias = torch.zeros(num_queries, num_keys)
    if reach is not None:
        distance = offset + torch.arange(num_queries).unsqueeze(1) - torch.arange(num_keys)
        bias.masked_fill_(distance.abs() >= reach, -math.inf)
    bias = bias.repeat(num_groups, 1)
    return F.pad(bias, (0, 0, 0, -len(bias) % ROW_TILE))


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
            end, first, last = min(start + QUERIES, num_new), 0, num_new
            if reach is not None:
                first, last = max(0, start - reach + 1), min(num_new, end + reach - 1)
            # the same for most parts of a text
            form = end - start, last - first, start - first if reach else 0, reach, num_groups
            bias = batch.memo.get(form)
            if bias is None:
                bias = batch.memo[form] = reach_bias(*form).to(q.device, q.dtype)
            scaling = config.attn_scale, config.attn_softcap, attn.sinks
            near_keys, near_values = keys[:, first:last], values[:, first:last]
            parts.append(attention(q[start:end], near_keys, near_values, bias, *scaling))
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


class GemmaDecoder(WholeImages, VariedDecoder):
    pass


def new_decoder(config: ModelConfig, weights: Weights, kv_dtype: str = "auto") -> Decoder:
    """The decoder of a model that may or may not be of this kind."""
    kind = WholeTextDecoder if "reach" in config.own else GemmaDecoder
    return kind(config, weights, kv_dtype)
