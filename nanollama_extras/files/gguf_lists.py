"""The two long lists of a GGUF file's vocabulary, its pieces and its merges, read in a third of the
time. Importing it costs no NumPy: `list` reads files, too.

Seam       `nanollama.GGUFCursor` calls `strings`, `nanollama.gguf_tokenizer` calls `file_merges`.
Remove     delete this file; the core then reads them itself.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any

import nanollama
from nanollama import GGUFCursor


def strings(cursor: GGUFCursor, count: int) -> list[str]:
    """The next `count` strings, read without a call for each. Raises CheckpointError."""
    texts, data, at = list[str](), cursor.data, cursor.at
    size_at = struct.Struct("<Q").unpack_from
    try:
        for _ in range(count if type(cursor) is GGUFCursor else 0):
            start = at + 8
            at = start + size_at(data, at)[0]
            texts.append(str(data[start:at], "utf-8", "replace"))
    except (struct.error, OverflowError):
        at = len(data) + 1
    cursor.at = at
    cursor.bounded(0, 1)
    return texts or [cursor.string() for _ in range(count)]  # of a file that is still coming


def file_merges(metadata: Mapping[str, Any], vocab: dict[str, int]) -> list[Any]:
    """As the core's: pairs of pieces, each in the vocabulary as their sum is."""
    lines = metadata.get("merges") or []
    pairs, known = [tuple(line.split(" ")) for line in lines], vocab.keys()
    is_usual = set(map(len, pairs)) <= {2} and set(map("".join, pairs)) <= known
    if is_usual and {left for left, _ in pairs} <= known and {right for _, right in pairs} <= known:
        return pairs
    return nanollama.file_merges(metadata, vocab)
