"""Filling in the middle: a prompt of what stands before a gap and of what stands after it.

Models that can do so have three control tokens for it. The answer is the text of the gap:

    PREFIX def f(x): return  SUFFIX  # done  MIDDLE     ->     x + 1

Other files of the same project go before it: REPOSITORY name FILE name text FILE name text ..

Seam       `nanollama.TextSide.encode_request` asks for the prompt of a request with a suffix;
           api.infill for one with other files.
Extend     the tokens of another family are a row of MARKS.
Remove     delete this file; a request with a suffix is then refused.
Source     https://arxiv.org/abs/2207.14255, https://arxiv.org/abs/2409.12186 (several files), and
           the model cards of the families
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from nanollama import RequestError

if TYPE_CHECKING:
    from nanollama import GenerationRequest, Tokenizer


class Marks(NamedTuple):
    """The tokens before the prefix, the suffix and the gap's text; before the name of a repository
    and of a file, where a family has them."""

    prefix: str
    suffix: str
    middle: str
    repository: str = ""
    file: str = ""


MARKS = (
    Marks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|repo_name|>", "<|file_sep|>"),
    Marks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "", "<|file_separator|>"),
    Marks("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    Marks("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<repo_name>", "<file_sep>"),
    Marks("<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<reponame>", "<filename>"),
    Marks("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    Marks("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    Marks("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),  # DeepSeek coder
    Marks("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM 4
)  # the first three: Qwen coder, CodeGemma; then StarCoder2, Granite
GGUF_NAMES = ("fim_pre_token", "fim_suf_token", "fim_mid_token", "fim_rep_token", "fim_sep_token")
PADS = ("<|fim_pad|>", "<fim_pad>", "<fim-pad>")
REPOSITORY, FILE = "repository", "file"  # names where a request gives none
BETWEEN = "\n\n--- snippet ---\n\n"  # before a file, for models without a token for files


def find_marks(tokenizer: Tokenizer) -> Marks:
    """The marks that a GGUF file declares, or those of a family that the vocabulary has. Raises
    RequestError for a model without them."""
    known, special = tokenizer.added, tokenizer.text.special_tokens
    declared = Marks(*(special.get(name, "") for name in GGUF_NAMES))
    words = [word if word in known else "" for word in declared]
    for marks in (Marks(*words), *MARKS):
        if all(marks[:3]) and all(word in known for word in marks if word):
            return marks
    raise RequestError(
        "suffix cannot be used: the model has no tokens to fill in the middle", "suffix"
    )


class Gap:
    """Makes prompts for one tokenizer. Raises RequestError for a model without marks."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer, self.marks = tokenizer, find_marks(tokenizer)
        self.names = re.compile(f"({'|'.join(re.escape(word) for word in self.marks if word)})")

    @property
    def ends(self) -> tuple[str, ...]:
        """The tokens that end an answer, beside those of the model: another file begins."""
        pads = (self.tokenizer.text.special_tokens.get("fim_pad_token", ""), *PADS)
        known = [word for word in pads if word in self.tokenizer.added]
        return tuple(dict.fromkeys(word for word in (*self.marks[3:], *known) if word))

    def encode(self, text: str) -> list[int]:
        """The ids of a text, in which a mark is plain text."""
        ids = []
        for i, piece in enumerate(self.names.split(text)):
            whole = self.tokenizer.spell(piece) if i % 2 else []
            ids += whole or self.tokenizer.encode(piece, False, False)
        return ids

    def fill(
        self,
        prefix: str | list[int],
        suffix: str,
        start: str = "",
        files: Sequence[tuple[str, str]] = (),
        room: int | None = None,
    ) -> list[int]:
        """The ids of a prompt for the text of a gap, of which `start` is the beginning. `files` are
        others of the project, each a name and a text; the first ones are left out where the prompt
        would be longer than `room`."""
        id_of, marks = self.tokenizer.added, self.marks
        before = prefix if isinstance(prefix, list) else self.encode(prefix)
        ids = [id_of[marks.prefix], *before, id_of[marks.suffix], *self.encode(suffix)]
        ids += [id_of[marks.middle], *self.encode(start)]
        head = (
            [id_of[marks.repository], *self.encode(f"{REPOSITORY}\n")] if marks.repository else []
        )
        tail = self.file(FILE, "") if marks.file else []
        parts = [self.file(name, text) for name, text in files]
        if room is not None:
            parts = last_that_fit(parts, room - len(head) - len(tail) - len(ids) - 1)
        if parts:
            ids = [*head, *itertools.chain(*parts), *tail, *ids]
        bos = self.tokenizer.text.special_tokens.get("bos_token")
        return [i for i in self.tokenizer.encode("") if self.tokenizer.piece(i) == bos] + ids

    def file(self, name: str, text: str) -> list[int]:
        """The ids of another file."""
        if self.marks.file:
            mark = self.tokenizer.added[self.marks.file]
            return [mark, *self.encode(f"{name}\n"), *self.encode(text)]
        return self.encode(BETWEEN + text)


def last_that_fit(parts: list[list[int]], room: int) -> list[list[int]]:
    """The last parts, as many as have no more than `room` ids together."""
    sizes = itertools.accumulate(map(len, reversed(parts)))
    num_left = sum(1 for size in sizes if size <= room)
    return parts[len(parts) - num_left :]


def encode_request(tokenizer: Tokenizer, request: GenerationRequest) -> tuple[list[int], str]:
    """The prompt of a request with a suffix as ids, and the text before the gap. Raises
    RequestError."""
    if request.params.prompt_logprobs:
        raise RequestError("echo with logprobs cannot be used with a suffix", "echo")
    prompt = request.prompt
    assert prompt is not None
    ids = Gap(tokenizer).fill(prompt, request.suffix)
    return ids, prompt if isinstance(prompt, str) else tokenizer.decode(prompt)
