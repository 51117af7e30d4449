"""A cache for models whose layers do not all have the same key/value heads.

Adds       `GroupedCache`: a KVCache of the layers without a window, and one of those with a window.
           A layer may also read the keys and values of an earlier one.
Seam       `Decoder.new_cache` of such a family. Imports models.whole_images, for images whose
           tokens see each other in layers with a window. ModelConfig.window_heads has the heads of
           layers with a window. An attention says which cache is its own (`group`), its place there
           (`index`), and whether it reads what another layer wrote (`is_reader`).
Remove     delete this file and the families that import it.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from nanollama import Batch, ModelConfig, Rotation
from nanollama_extras.models.whole_images import whole_spans

if TYPE_CHECKING:
    from nanollama import Attention, KVCache


def head_groups(config: ModelConfig) -> tuple[ModelConfig, ModelConfig]:
    """Views of a config: the layers that keep all keys and values, and those with a window."""
    heads, width = config.window_heads or (config.n_kv_heads, config.head_dim)
    whole, sliding = (
        tuple(window for window in config.windows if window != 0 and bool(window) == slides)
        for slides in (False, True)
    )
    plain = dataclasses.replace(config, window_heads=None)
    return (
        dataclasses.replace(plain, windows=whole),
        dataclasses.replace(plain, windows=sliding, n_kv_heads=heads, head_dim=width),
    )


class GroupedCache:
    """A KVCache for each of `head_groups`, as one."""

    def __init__(self, caches: list[KVCache], whole_images: bool = False) -> None:
        self.caches, self.whole_images = caches, whole_images
        if all(hasattr(cache, "fill") for cache in caches):
            self.new_tables, self.fill = self.new_group_tables, self.fill_groups

    def __getattr__(self, name: str) -> Any:
        return getattr(self.caches[0], name)

    @property
    def rings(self) -> list[Tensor]:
        return self.caches[1].rings

    @property
    def nbytes(self) -> int:
        return sum(cache.nbytes for cache in self.caches)

    def reserve(self, slot: int, num_tokens: int) -> None:
        for cache in self.caches:
            cache.reserve(slot, num_tokens)

    def resumable(self, slot: int, num_tokens: int, length: int) -> int:
        return min(cache.resumable(slot, num_tokens, length) for cache in self.caches)

    def outgrown(self, slot: int, length: int) -> bool:
        return any(cache.outgrown(slot, length) for cache in self.caches)

    def start(self, source: int, target: int, num_tokens: int, token_ids: list[int]) -> None:
        for cache in self.caches:
            cache.start(source, target, num_tokens, token_ids)

    def attend(self, attn: Attention, qkv: Tensor, rotation: Rotation, batch: Batch) -> Tensor:
        """As KVCache.attend; the qkv of a layer that reads those of another one is (N, H D)."""
        own = cast("Any", attn)
        cache, view = self.caches[own.group], self.views(batch)[own.group]
        if not getattr(cache, "has_readers", False):  # it gets the other layer's, and writes again
            if own.is_reader:
                qkv = torch.cat((qkv, view.memo["kv", attn.index]), dim=1)
            view.memo["kv", attn.index] = qkv[:, attn.sizes[0] * attn.head_dim :]
        return cache.attend(attn, qkv, rotation, view)

    def views(self, batch: Batch) -> list[Batch]:
        """The batch for each cache: what a cache computes once for all of its layers is its own."""
        if "groups" not in batch.memo:
            batch.memo["groups"] = [copy.copy(batch) for _ in self.caches]
            for view in batch.memo["groups"]:
                view.memo = {}
            if self.whole_images and batch.vectors:
                batch.memo["groups"][1].spans = whole_spans(batch)
        return cast("list[Batch]", batch.memo["groups"])

    # -- recorded steps --------------------------------------------------------------------------

    def new_group_tables(self, batch: Batch, num_rows: int) -> None:
        """Put what a recorded step reads into a batch; `fill` changes it."""
        for cache, view in zip(self.caches, self.views(batch)):
            cast("Any", cache).new_tables(view, num_rows)

    def fill_groups(self, batch: Batch) -> None:
        """Write the spans of a step into its tables."""
        for cache, view in zip(self.caches, self.views(batch)):
            view.spans = batch.spans
            cast("Any", cache).fill(view)
