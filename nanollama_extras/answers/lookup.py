"""Prompt lookup (`--lookup N`): drafts of the next tokens from those that followed the same tokens
earlier in the text (https://github.com/apoorvumang/prompt-lookup-decoding).

Adds       `drafters`, which makes a drafter for each sequence: a `PromptLookup`, without a model or
           tensors, or for `--lookup mtp` one of models.mtp. `Pace`, the length of the next draft.
Seam       Engine.new_drafter: each sequence gets a drafter; the engine verifies its drafts.
Remove     delete this file; --lookup then says that it needs it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from nanollama import extra

if TYPE_CHECKING:
    from nanollama import Drafter, Engine, EngineConfig, Sequence


def drafters(engine: Engine, config: EngineConfig) -> tuple[int, Callable[[], Drafter]]:
    """The length of the longest draft, and what makes a drafter for a sequence of the engine."""
    if config.lookup == "mtp":
        head = extra("models.mtp", "--lookup mtp").Head(engine)
        return head.most_drafted, head.new_drafter
    return int(config.lookup), PromptLookup


class Pace:
    """Drafts `guess`es, each twice as long as the last one if that was right, one token longer than
    what was right if a part was. Pauses between drafts grow while drafts miss."""

    MAX_PAUSE = 5  # the longest pause after misses is 2**5 - 1 tokens

    def __init__(self) -> None:
        self.max_length = 2**31  # of the next draft
        self.num_misses = 0  # in a row
        self.resume_length = 0  # of the text, at which the next draft may come

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """At most `most` guessed tokens after `tokens`, a continuation of the last call's."""
        raise NotImplementedError

    def length(self, seq: Sequence, most: int) -> int:
        """The length of a draft that follows a sequence, at most `most`; 0 in a pause."""
        num_tokens = len(seq.token_ids)
        room = seq.max_length - num_tokens - 1
        return max(0, min(most, self.max_length, room)) if num_tokens >= self.resume_length else 0

    def draft(self, seq: Sequence, most: int) -> list[int]:
        """At most `most` guessed tokens that a sequence may have next."""
        num = self.length(seq, most)
        guesses = self.guess(seq.token_ids, num) if num else []
        valid = seq.constraint.num_valid(guesses) if guesses and seq.constraint else num
        return guesses[:valid]

    def learn(self, num_drafted: int, num_accepted: int, num_tokens: int) -> None:
        """Adapt to how many drafted tokens were right; the text now has `num_tokens`."""
        self.max_length = 2 * num_drafted if num_accepted == num_drafted else num_accepted + 1
        self.num_misses = 0 if num_accepted else min(self.num_misses + 1, self.MAX_PAUSE + 1)
        self.resume_length = num_tokens + 2 ** max(self.num_misses - 1, 0) - 1


class PromptLookup(Pace):
    """Drafts the tokens that followed an earlier occurrence of the text's last tokens."""

    MAX_PLACES = 16  # earlier occurrences that are compared
    MAX_MATCH = 8  # a match of more tokens counts no more

    def __init__(self) -> None:
        super().__init__()
        self.latest: dict[tuple[int, int], int] = {}  # pair of tokens -> position after its last
        self.earlier = [0, 0]  # position after a pair -> position after the one before; 0 for none
        self.num_matched = 0  # tokens before the last guesses that occurred before

    def guess(self, tokens: list[int], most: int) -> list[int]:
        if len(tokens) < 3:
            return []
        for at in range(len(self.earlier), len(tokens)):
            pair = tokens[at - 2], tokens[at - 1]
            self.earlier.append(self.latest.get(pair, 0))
            self.latest[pair] = at
        start = self.longest_match(tokens)
        # where the match reaches the end of the text, the draft repeats itself
        return [tokens[start + i % (len(tokens) - start)] for i in range(most)] if start else []

    def longest_match(self, tokens: list[int]) -> int:
        """The position after the earlier text that shares most tokens with the end; 0 for none."""
        best = longest = 0
        at = self.latest.get((tokens[-2], tokens[-1]), 0)
        for _ in range(self.MAX_PLACES):
            if not at or longest == self.MAX_MATCH:
                break
            num = 2
            while num < min(self.MAX_MATCH, at) and tokens[at - 1 - num] == tokens[-1 - num]:
                num += 1
            if num > longest:
                best, longest = at, num
            at = self.earlier[at]
        self.num_matched = longest
        return best
