"""A limit on thoughts: after so many tokens, the mark that ends a thought is forced, and the answer
follows.

The limit is `thinking_budget`. Where a request has a `reasoning_effort` instead and the chat
template has no such switch, the effort stands for a limit.

Seam       Answer form: a Constraint around the one of the answer, if there is one. The core asks
           `limited` for it.
Remove     delete this file; a request with thinking_budget is then refused, and an effort is for
           templates alone.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import numpy as np

from nanollama import THOUGHTS

if TYPE_CHECKING:
    import numpy.typing as npt

    from nanollama import Constraint, GenerationRequest, TextSide, Thoughts, Tokenizer

EFFORTS = {"none": 0, "minimal": 256, "low": 1024, "medium": 4096, "high": 16384}  # tokens
MOST_MARK_TOKENS = 16  # of the mark at the end of a prompt, or in an answer


def limited(
    form: Constraint | None, request: GenerationRequest, side: TextSide, ids: list[int]
) -> Constraint | None:
    """The constraint of an answer to the prompt `ids`, with the limit that the request asks for."""
    budget, tags = request.params.thinking_budget, side.template.thoughts
    if budget is None:
        budget = effort_budget(request, side.template.source or "")
    if budget is None or tags is None or not request.is_new_turn:
        return form
    tail = "".join(map(spelled(side.tokenizer), ids[-MOST_MARK_TOKENS:])).rstrip()
    opened = next((tags for tags in THOUGHTS if tail.endswith(tags.open)), None)
    limit = ThoughtLimit(side.tokenizer, opened or tags, budget, side.config.n_vocab, form)
    limit.is_open = opened is not None
    return limit


def effort_budget(request: GenerationRequest, source: str) -> int | None:
    """The limit that an effort stands for; None where the template knows the effort itself."""
    effort = request.template_kwargs.get("reasoning_effort")
    switch = "enable_thinking" if effort == "none" else "reasoning_effort"
    return None if switch in source else EFFORTS.get(str(effort))


def spelled(tokenizer: Tokenizer) -> Any:
    """A function from an id to its text, control tokens by their names."""
    names = {i: name for name, i in tokenizer.control.items()}

    def spell(token_id: int) -> str:
        text = tokenizer.token_bytes(token_id).decode("utf-8", errors="replace")
        return names.get(token_id, text)

    return spell


class ThoughtLimit:
    """A Constraint that ends a thought after `budget` tokens. inner: that of the answer, or None.

    A thought may begin an answer, or the prompt has begun it (is_open)."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        tags: Thoughts,
        budget: int,
        n_vocab: int,
        inner: Constraint | None,
    ) -> None:
        self.spell, self.tags, self.left, self.n_vocab = spelled(tokenizer), tags, budget, n_vocab
        self.inner = inner
        self.is_open, self.is_over = False, False  # in a thought; no thought can come any more
        self.closing = tokenizer.encode(tags.close + tags.answer, False)
        self.forced: list[int] = []  # tokens of the mark that must come next
        self.latest: list[str] = []  # texts of tokens in which a mark may stand

    @property
    def is_free(self) -> bool:
        return self.inner is None or self.inner.is_free

    @is_free.setter
    def is_free(self, value: bool) -> None:
        raise AttributeError("is_free follows from the answer's own form")

    @property
    def is_done(self) -> bool:
        return self.inner is not None and self.inner.is_done

    def copy(self) -> ThoughtLimit:
        one = copy.copy(self)
        one.inner = self.inner.copy() if self.inner else None
        one.forced, one.latest = [*self.forced], [*self.latest]
        return one

    def allowed(self) -> npt.NDArray[np.bool_]:
        """The tokens that may come next (V,): that of the mark where the thought must end."""
        allowed = self.inner.allowed() if self.inner else np.ones(self.n_vocab, np.bool_)
        if self.is_open and self.left <= 0 and not self.forced and not self.ends_in_part():
            self.forced = [*self.closing]
        if not self.forced or not allowed[self.forced[0]]:  # the form of the answer comes first
            return allowed
        only = np.zeros(self.n_vocab, np.bool_)
        only[self.forced[0]] = True
        return only

    def ends_in_part(self) -> bool:
        """Whether the model is about to write the mark itself."""
        text, close = "".join(self.latest), self.tags.close
        return self.left > -MOST_MARK_TOKENS and any(
            text.endswith(close[:n]) for n in range(1, len(close))
        )

    def push(self, token_id: int) -> None:
        if self.inner:
            self.inner.push(token_id)
        if self.is_over:
            return
        self.forced = self.forced[1:] if self.forced[:1] == [token_id] else []
        self.latest = [*self.latest, self.spell(token_id)][-MOST_MARK_TOKENS:]
        text = "".join(self.latest)
        if self.is_open:
            self.left -= 1
            if self.tags.close in text:
                self.is_open, self.latest = False, []
                self.is_over = not self.tags.answer
            return
        start = text.lstrip()
        if start.startswith(self.tags.open):
            self.is_open, self.latest = True, []
        else:
            self.is_over = not self.tags.open.startswith(start)

    def num_valid(self, token_ids: list[int]) -> int:
        """How many leading tokens of a draft could come next."""
        num = self.inner.num_valid(token_ids) if self.inner else len(token_ids)
        return min(num, max(self.left, 0)) if self.is_open else num
