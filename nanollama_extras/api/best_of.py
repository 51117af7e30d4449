"""`best_of` of POST /v1/completions: more answers are made than returned, the likeliest are kept.

Seam       `nanollama.parse_text` hands a body with `best_of` to `widen`; the class of replies that
           comes back then picks the answers.
Remove     delete this file and its tests; a best_of that differs from n is then refused.
Spec       https://developers.openai.com/api/reference/resources/completions
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

from nanollama import MAX_CHOICES, ChoicesReply, TextChoice, excerpt, refuse

if TYPE_CHECKING:
    from nanollama import Fields, Json


def widen(given: Fields, sampling: Json) -> tuple[Json, Json, Any]:
    """A body and its sampling fields -> those of `best_of` choices with log-probabilities, and the
    class of the reply. Raises RequestError."""
    n, best_of = given.get("n", 1), given["best_of"]
    if not n <= best_of <= MAX_CHOICES:
        refuse(
            f"best_of is {excerpt(best_of)}; it must be from {n} (n) to {MAX_CHOICES}", "best_of"
        )
    if given.get("stream"):
        refuse(f"best_of is {best_of}; a stream can only have the value of n, {n}", "best_of")
    wanted = sampling["logprobs"]
    reply = functools.partial(BestReply, n=n, shows_logprobs=wanted is not None)
    return {**given, "n": best_of}, {**sampling, "logprobs": wanted or 0}, reply


class BestReply(ChoicesReply):
    """An answer with the `n` choices of each prompt whose tokens are the likeliest on average."""

    def __init__(self, *args: Any, n: int, shows_logprobs: bool) -> None:
        super().__init__(*args)
        self.n, self.shows_logprobs = n, shows_logprobs

    def result(self) -> Json:
        body, kept = super().result(), []
        num_each = len(self.choices) // self.wire.num_prompts
        for first in range(0, len(self.choices), num_each):
            places = range(first, first + num_each)
            kept += sorted(places, key=lambda i: -mean_logprob(self.choices[i]))[: self.n]
        hidden = {} if self.shows_logprobs else {"logprobs": None}
        chosen = [{**body["choices"][i], "index": index, **hidden} for index, i in enumerate(kept)]
        return {**body, "choices": chosen}


def mean_logprob(choice: Any) -> float:
    """The mean log-probability of the tokens of a choice, without those of an echoed prompt."""
    assert isinstance(choice, TextChoice)
    values = [row[TextChoice.LOGPROBS.index("token_logprobs")] for row in choice.rows]
    own = values[len(values) - choice.seq.num_generated :]
    return sum(own) / max(len(own), 1)
