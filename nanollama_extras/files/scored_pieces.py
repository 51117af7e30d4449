"""SentencePiece's pieces without a list of merges: the library needs seconds and hundreds of
megabytes for one of 500,000, and a prompt needs the scores of a few pieces.

Adds       `ScoredTokenizer`, which has the library find characters and added tokens, and merges
           pieces itself. Ids are the library's, which at first knows these pieces alone: its table
           of all takes a sixth of a second, too. Long texts, many texts, and whatever else needs
           the merges, such as `to_str`, have the library's own tables made.
Seam       files.vocabularies makes a `ScoredModel` of the pieces of a GGUF file or a
           tokenizer.model, and has it make the tokenizer. Imports files.vocabularies.
Remove     delete this file; the library then gets all merges when a model is loaded.
"""

from __future__ import annotations

import functools
import heapq
import threading
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tokenizers import Tokenizer, models

from nanollama import TOKEN_USER_DEFINED
from nanollama_extras.files.vocabularies import MERGEABLE, merge_orders

MOST_CHARACTERS = 100_000  # to merge here: that takes about as long as the library's tables
# What the library does with characters alone, its attributes, and what it does without merges
LIGHT = frozenset(
    "no_truncation no_padding get_added_tokens_decoder "
    "normalizer pre_tokenizer post_processor decoder encode_special_tokens".split()
)
UNMERGED = frozenset("get_vocab token_to_id decode".split())


@dataclass(frozen=True, slots=True)
class Token:
    """As the library's, with its id alone"""

    id: int


@dataclass(frozen=True, slots=True)
class Encoding:
    """As the library's, with ids alone"""

    ids: list[int]


class ScoredModel:
    """A vocabulary whose pieces merge by their scores; stands for the library's model. `new_model`
    makes the library's of pieces and merges, `merges` all of them."""

    def __init__(
        self,
        new_model: Callable[[dict[str, int], list[tuple[str, str]]], models.BPE],
        merges: Callable[[], list[tuple[str, str]]],
        vocab: dict[str, int],
        scores: Sequence[float],
        types: Sequence[int],
    ) -> None:
        """Raises CheckpointError where scores are missing."""
        kinds: Any = np.array(types)
        self.orders = array("d", merge_orders(scores, kinds).tobytes())
        self.new_model, self.merges, self.vocab = new_model, merges, vocab
        self.mergeable = np.isin(kinds, MERGEABLE).tobytes()
        is_added = np.isin(kinds, MERGEABLE, invert=True) | (kinds == TOKEN_USER_DEFINED)
        self.is_added = is_added = is_added.tobytes()
        light = {p: i for p, i in vocab.items() if len(p) == 1 or is_added[i]}
        self.plain = new_model(light, [])
        self.pieces = list(vocab)  # each at its id, as a rule
        self.num_merged = 0  # characters

    @functools.cached_property
    def unmerged(self) -> models.BPE:
        return self.new_model(self.vocab, [])

    @functools.cached_property
    def full(self) -> models.BPE:
        return self.new_model(self.vocab, self.merges())

    def piece(self, token_id: int) -> str | None:
        """The piece of an id, where its place in the list tells it."""
        found = self.pieces[token_id] if 0 <= token_id < len(self.pieces) else ""
        return found if self.vocab.get(found) == token_id else None

    def new_tokenizer(self) -> ScoredTokenizer:
        return ScoredTokenizer(self)

    def tokenize(self, text: str) -> list[Token]:
        """The tokens of a text in which no added token is recognized."""
        found = self.plain.tokenize(text)
        return [Token(i) for i in self.merged([t.value for t in found], [t.id for t in found])]

    def merged(self, pieces: list[str], ids: list[int], words: Sequence[Any] = ()) -> list[int]:
        """Merge neighbours in `words` of the same number, as long as their sum is a piece. The best
        score comes first; of equal ones the lower id, then the lower id on the left, then the
        first in the text (https://github.com/google/sentencepiece, src/bpe_model.cc)."""
        self.num_merged += len(pieces)
        find, mergeable = self.vocab.get, self.mergeable
        after, before = [*range(1, len(ids) + 1)], [*range(-1, len(ids) - 1)]
        texts = [piece if mergeable[i] else "" for piece, i in zip(pieces, ids)]
        heap: list[tuple[float, int, int, int, int]] = []

        def offer(at: int) -> None:
            right = after[at]
            if right < len(ids) and texts[at] and texts[right]:
                whole = texts[at] + texts[right]
                i = find(whole)
                if i is not None and mergeable[i] and (not words or words[at] == words[right]):
                    heapq.heappush(heap, (self.orders[i], i, ids[at], at, len(whole)))

        for at in range(len(ids) - 1):
            offer(at)
        is_left = bytearray(b"\1" * len(ids))
        while heap:
            _, i, _, at, size = heapq.heappop(heap)
            right = after[at]
            is_next = is_left[at] and right < len(ids)
            if not is_next or len(texts[at]) + len(texts[right]) != size:
                continue  # one of the two has grown
            texts[at], ids[at], is_left[right] = texts[at] + texts[right], i, 0
            after[at] = after[right]
            if after[at] < len(ids):
                before[after[at]] = at
                offer(at)
            if before[at] >= 0:
                offer(before[at])
        return [i for i, is_it in zip(ids, is_left) if is_it]


class ScoredTokenizer:
    """The library's tokenizer of a ScoredModel. Threads may share it."""

    library: Tokenizer
    model: ScoredModel
    lock: threading.Lock
    is_light: bool  # the library knows added tokens and characters alone
    is_full: bool  # the library has the merges

    def __init__(self, model: ScoredModel) -> None:
        own = {"model": model, "library": Tokenizer(model.plain), "lock": threading.Lock()}
        vars(self).update(own, is_light=True, is_full=False)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in UNMERGED:
            self.widen()
        elif name not in LIGHT:
            self.complete()
        return getattr(self.library, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.library, name, value)

    def complete(self) -> None:
        """Have the library's tables of merges made."""
        with self.lock:
            if not self.is_full:
                self.library.model = self.model.full
                vars(self).update(is_full=True, is_light=False)

    def widen(self) -> None:
        """Have the library know all pieces."""
        with self.lock:
            if self.is_light:
                self.library.model = self.model.unmerged
                vars(self)["is_light"] = False

    def add_tokens(self, tokens: list[Any]) -> int:
        """As the library's, which gives pieces their ids and new ones those behind all pieces"""
        self.find(tokens)
        return int(self.library.add_tokens(tokens))

    def add_special_tokens(self, tokens: list[Any]) -> int:
        """As `add_tokens`"""
        self.find(tokens)
        return int(self.library.add_special_tokens(tokens))

    def find(self, tokens: list[Any]) -> None:
        """Complete the library for tokens that are not of the types of added ones."""
        ids = [self.model.vocab.get(getattr(token, "content", token)) for token in tokens]
        if not all(i is not None and self.model.is_added[i] for i in ids):
            self.complete()

    def get_vocab_size(self, with_added_tokens: bool = True) -> int:
        """As the library's, which is complete where a token is none of the pieces"""
        if self.is_light:
            return len(self.model.vocab)
        return int(self.library.get_vocab_size(with_added_tokens))

    def id_to_token(self, token_id: int) -> str | None:
        """As the library's"""
        found: str | None = self.model.piece(token_id)
        if found is None:
            self.widen()
            found = self.library.id_to_token(token_id)
        return found

    def encode(self, text: str, add_special_tokens: bool = True) -> Any:
        """As the library's"""
        if self.model.num_merged + len(text) > MOST_CHARACTERS:
            self.complete()
        with self.lock:
            found = self.library.encode(text, add_special_tokens=add_special_tokens)
            if self.is_full:
                return found
        return Encoding(self.model.merged(found.tokens, found.ids, found.word_ids))
