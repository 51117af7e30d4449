"""Images whose tokens see each other: Gemma 3 and the larger Gemma 4.

Adds       `whole_spans`, a batch's spans cut where such an image begins and ends, and
           `WholeImages`, a decoder's part that has every image in one step: a piece of a prompt
           never ends inside one, and no prefix is reused up to its midst.
Seam       `Decoder.scheduler`, `Decoder.new_cache`, `Decoder.hidden` and `Span.is_whole`.
Remove     delete this file and its names in models/bidirectional.py and models/gemma4.py.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from nanollama import Batch, Scheduler, Sequence, Span

if TYPE_CHECKING:
    from torch import Tensor

    from nanollama import KVCache

MOST_TOKENS = 280  # of an image, if a step has no room for more: Gemma 3 has 256


def is_inside(ids: list[int], at: int) -> bool:
    """Whether a cut before token `at` would be inside an image."""
    return 0 < at < len(ids) and all(hasattr(i, "vector") for i in ids[at - 1 : at + 1])


def image_start(ids: list[int], at: int) -> int:
    """`at`, or the start of the image that a cut there would be inside of."""
    while is_inside(ids, at):
        at -= 1
    return at


def image_end(ids: list[int], at: int) -> int:
    """`at`, or the end of the image that a cut there would be inside of."""
    while is_inside(ids, at):
        at += 1
    return at


def whole_spans(batch: Batch) -> list[Span]:
    """The spans of a batch, those with images cut at the ends of these."""
    spans: list[Span] = []
    for span in batch.spans:
        rows = range(span.row, span.row + span.num_new)
        kinds = [row in batch.vectors for row in rows]
        cuts = [i for i in range(1, span.num_new) if kinds[i] != kinds[i - 1]]
        for first, end in zip([0, *cuts], [*cuts, span.num_new]):
            part = span.slot, span.start + first, end - first, span.row + first
            num_rows = span.num_rows if end == span.num_new else 0
            spans.append(Span(*part, num_rows, is_whole=kinds[first]))
    return spans


class ImageScheduler(Scheduler):
    """Gives a sequence all tokens of an image in one step."""

    def admit(self) -> tuple[Sequence, int] | None:
        admitted = super().admit()
        if admitted:
            seq, source = admitted
            if (start := image_start(seq.token_ids, seq.num_cached)) != seq.num_cached:
                seq.num_cached = self.resumable(source, start, len(seq.token_ids))
        return admitted

    def schedule(self) -> list[tuple[Sequence, int]]:
        return [(seq, num_whole(seq, num_new)) for seq, num_new in super().schedule()]


def num_whole(seq: Sequence, num_new: int) -> int:
    """The number of next tokens, about `num_new`, that ends in no image's midst."""
    ids, at = seq.token_ids, seq.num_computed
    before = image_start(ids, at + num_new) - at
    return before if before > 0 else image_end(ids, at + num_new) - at


class WholeImages:
    """The first base of a Decoder all of whose layers have such images."""

    scheduler = ImageScheduler
    most_image: int  # tokens that a step has room for

    def new_cache(self, num_slots: int, most_new: int = 0, **saving: Any) -> KVCache:
        self.most_image = max(most_new, MOST_TOKENS)
        most = most_new and self.most_image
        cache: KVCache = super().new_cache(num_slots, most, **saving)  # type: ignore[misc]
        return cache

    def hidden(self, batch: Batch, cache: KVCache) -> Tensor:
        x: Tensor = super().hidden(cut(batch), cache)  # type: ignore[misc]
        return x


def cut(batch: Batch) -> Batch:
    """The batch, or a view of it with `whole_spans`."""
    if not batch.vectors:
        return batch
    view = copy.copy(batch)
    view.spans, view.memo = whole_spans(batch), {}
    return view
