"""A model without a tokenizer, which takes and gives token ids alone.

Seam       Vocabulary: `nanollama.LLM` calls `open_tokenizer` unless its caller needs text.
Remove     delete this file and its tests; such a model is then refused, unless --tokenizer names
           another one's tokenizer.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NoReturn

from nanollama import CheckpointError, TextFiles, Tokenizer


def open_tokenizer(text: TextFiles) -> Tokenizer:
    """The tokenizer of a model's files; an IdsOnly where they hold none. Raises CheckpointError for
    files that cannot be read."""
    try:
        return Tokenizer(text)
    except CheckpointError as error:
        if text.gguf or text.tokenizer_file:
            raise
        return IdsOnly(text, str(error))


class IdsOnly(Tokenizer):
    """Stands for a tokenizer: no token has a text. What turns text into ids, or ids into text,
    raises CheckpointError, which says that the model has no tokenizer."""

    num_tokens = 0

    def __init__(self, text: TextFiles, reason: str) -> None:
        self.text, self.reason = text, reason
        self.end_ids, self.control, self.shown, self.strips_space = text.eos_ids, {}, {}, False
        self.token_bytes = lru_cache(maxsize=1)(lambda token_id: b"")

    def piece(self, token_id: int) -> str:
        return ""

    def refuse(self, *_: object, **__: object) -> NoReturn:
        raise CheckpointError(self.reason)

    encode = spell = decode = refuse

    def __getattr__(self, name: str) -> NoReturn:
        """Refuse every other part of a vocabulary, as `added`, which each conversation reads."""
        if name.startswith("__"):  # Python asks for these itself
            raise AttributeError(name)
        self.refuse()
