"""Filling in the middle: a prompt of what stands before a gap and of what stands after it.

Models that can do so have three control tokens for it. The answer is the text of the gap:

    PREFIX def f(x): return  SUFFIX  # done  MIDDLE     ->     x + 1

Seam       api.ollama asks `fill_ids` for the prompt of a request with a suffix.
Extend     the tokens of another family are a row of TOKENS.
Remove     delete this file; a request with a suffix is then refused.
Source     https://arxiv.org/abs/2207.14255, and the model cards of the families
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanollama import RequestError

if TYPE_CHECKING:
    from nanollama import Tokenizer

TOKENS = (  # before the prefix, before the suffix, before the gap's text
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder2, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek coder
)


def fill_ids(tokenizer: Tokenizer, prefix: str, suffix: str) -> list[int]:
    """The ids of a prompt that asks for the text between two others. Raises RequestError."""
    known = tokenizer.added
    form = next((words for words in TOKENS if all(word in known for word in words)), None)
    if form is None:
        raise RequestError(
            "suffix cannot be used: the model has no tokens to fill in the middle", "suffix"
        )
    before, hole, after = (known[word] for word in form)
    bos = tokenizer.text.special_tokens.get("bos_token")
    first = [i for i in tokenizer.encode("") if tokenizer.piece(i) == bos]
    texts = [tokenizer.encode(text, False, False) for text in (prefix, suffix)]
    return [*first, before, *texts[0], hole, *texts[1], after]
