"""Thoughts as opaque text, which a client keeps and sends back: the server stores nothing.

Seam       Anthropic's `signature` (api.anthropic) and OpenAI's `encrypted_content` (api.responses)
           hold a sealed text. It is packed, not secret: its reader has the thoughts anyway.
Remove     delete this file together with both APIs.
"""

from __future__ import annotations

import base64
import binascii
import zlib

MARK = b"nanollama:"
MOST_BYTES = 1 << 24  # of a text


def seal(text: str) -> str:
    """A text in letters, digits and signs of base64."""
    packed = zlib.compress(MARK + text.encode("utf-8", errors="replace"))
    return base64.b64encode(packed).decode()


def unseal(value: object) -> str | None:
    """The text that `seal` packed; None for anything else, such as another server's signature."""
    try:
        packed = base64.b64decode(value if isinstance(value, str) else "", validate=True)
        raw = zlib.decompressobj().decompress(packed, MOST_BYTES)
        return raw[len(MARK) :].decode("utf-8") if raw.startswith(MARK) else None
    except (binascii.Error, zlib.error, ValueError):
        return None
