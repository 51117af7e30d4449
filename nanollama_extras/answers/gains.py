"""How far to guess: what a draft is expected to gain, from costs and odds measured while it runs.

Adds       `Gains`: seconds of a step by its rows, of a pass of a small model by its tokens, and how
           often guesses were right; `Plan`, one step as it is expected.
Seam       models.drafts asks it before each pass of its small model.
Remove     delete this file together with models/drafts.py.

A step without a draft adds one token of each sequence. Guesses add rows to it, which cost seconds,
and tokens, if they are right. They are worth it where tokens per second grow:

    tokens   1 + p1 + p1 p2 + ..                 p: the chance of a guess, if those before are right
    seconds  step(1 + guesses) + passes of the small model

Where they would lose, steps go without them, but for trials, which may take a small share of the
time: costs and texts change.
"""

from __future__ import annotations

import bisect
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from nanollama import EngineStats

HOPE = 0.7  # chance of a guess of which nothing is known
MARGIN = 1.03  # tokens per second must grow by more than measurements err
TRIAL_SHARE = 0.02  # of the time of all steps
REMEASURE = 64  # steps with drafts, after which one goes without, to measure what it takes
LONG_READ = 64  # tokens: passes of fewer have a cost of their own
SHORT_READ = 16  # tokens: a pass that reads as many shows what a token of a long text takes


class Odds:
    """How often guesses of about the same likelihood were right. With few cases of its own, it goes
    by `broader` odds, and these go by the likelihood itself."""

    NUM_BINS = 8
    PRIOR_CASES = 4.0  # that what is believed before counts for
    MOST_CASES = 128.0  # of a bin; earlier ones count half from then on

    def __init__(self, broader: Odds | None = None) -> None:
        self.broader = broader
        self.cases = [0.0] * (self.NUM_BINS + 1)  # the last bin has all guesses
        self.right = self.cases.copy()

    def chance(self, likelihood: float | None = None) -> float:
        """That a guess is right, if those before it are: one of this likelihood, or any."""
        place = self.NUM_BINS if likelihood is None else self.bin(likelihood)
        believed = HOPE if likelihood is None else likelihood
        if self.broader:
            believed = self.broader.chance(likelihood)
        cases = self.cases[place] + self.PRIOR_CASES
        return (self.right[place] + self.PRIOR_CASES * believed) / cases

    def bin(self, likelihood: float) -> int:
        return min(int(likelihood * self.NUM_BINS), self.NUM_BINS - 1)

    def note(self, likelihood: float, is_right: bool) -> None:
        for place in (self.bin(likelihood), self.NUM_BINS):
            self.cases[place] += 1
            self.right[place] += is_right
            if self.cases[place] >= self.MOST_CASES:
                self.cases[place] /= 2
                self.right[place] /= 2
        if self.broader:
            self.broader.note(likelihood, is_right)


class Costs:
    """Seconds by a size: the median of the latest few for each size that occurred."""

    LATEST = 5

    def __init__(self) -> None:
        self.latest: dict[int, deque[float]] = {}
        self.sizes: list[int] = []  # in order
        self.medians: dict[int, float] = {}

    def note(self, size: int, seconds: float) -> None:
        if size not in self.latest:
            self.latest[size] = deque(maxlen=self.LATEST)
            bisect.insort(self.sizes, size)
        values = self.latest[size]
        values.append(seconds)
        self.medians[size] = sorted(values)[len(values) // 2]

    def of(self, size: int) -> float:
        """Between sizes that occurred, on the line through both; outside, as the nearest."""
        if size in self.medians:
            return self.medians[size]
        at = bisect.bisect(self.sizes, size)
        below, above = self.sizes[max(at - 1, 0)], self.sizes[min(at, len(self.sizes) - 1)]
        low, high = self.medians[below], self.medians[above]
        return low if above <= below else low + (high - low) * (size - below) / (above - below)


class Going(Protocol):
    """A sequence whose draft may grow."""

    likelihood: float  # that all its guesses so far are right
    chance: float  # of each further one


class Gains:
    """What drafts of a small model cost and save."""

    def __init__(self, ratio: float) -> None:
        """`ratio`: of its size to the model's, the first estimate of the ratio of their seconds."""
        self.odds, self.steps, self.passes = Odds(), Costs(), Costs()
        self.ratio, self.read_s = ratio, 0.0  # of a token, in a long pass
        self.credit_s = 0.0  # for trials
        self.num_drafted = 0  # steps since one without a draft
        self.before: tuple[float, int, int] | None = None  # totals of the engine's statistics
        self.num_rows, self.drafting_s = 0, 0.0  # of the step that runs, without its draft

    def begin_step(self, stats: EngineStats) -> None:
        """Note what the last step took, unless it read prompts, too."""
        now = stats.prefill_s + stats.decode_s, stats.prefill_tokens, stats.drafted_tokens
        if self.before:
            seconds, num_read, num_drafted = (b - a for a, b in zip(self.before, now))
            seconds -= self.drafting_s
            if self.num_rows and not num_read and seconds > 0:
                self.steps.note(self.num_rows + int(num_drafted), seconds)
                self.credit_s += TRIAL_SHARE * seconds
                self.num_drafted = self.num_drafted + 1 if num_drafted else 0
        self.before, self.num_rows = now, 0

    def end_draft(self, num_rows: int, seconds: float) -> None:
        """Drafts of a step with `num_rows` rows beside them took so long."""
        self.num_rows, self.drafting_s = num_rows, seconds

    def note_pass(self, num_tokens: int, seconds: float) -> None:
        if num_tokens < LONG_READ:
            self.passes.note(num_tokens, seconds)
        if num_tokens >= SHORT_READ:
            each = seconds / num_tokens
            self.read_s = 0.75 * self.read_s + 0.25 * each if self.read_s else each

    def pass_s(self, num_tokens: int) -> float:
        """Seconds of a pass of the small model. Before any short pass, it is as much faster than a
        step as the small model is smaller; the first one, which reads a text, says little of it."""
        if 1 not in self.passes.medians:
            self.passes.note(1, self.ratio * self.steps.of(1))
        return self.passes.of(num_tokens)

    def reading_s(self, num_tokens: int) -> float:
        """Seconds for which it reads a text."""
        return num_tokens * (self.read_s or self.pass_s(1) / 8)

    def must_measure(self, num_rows: int) -> bool:
        """Whether this step has to go without a draft, for its time is not known or long ago."""
        is_known = num_rows in self.steps.medians
        return not is_known or self.num_drafted >= REMEASURE

    def pay(self, price_s: float) -> bool:
        """Take the price of a trial, if there is credit for it."""
        if price_s > self.credit_s:
            return False
        self.credit_s -= price_s
        return True


@dataclass(slots=True)
class Plan:
    """What a step is expected to do: the rows that it has so far, the tokens that they add, and the
    seconds that passes of the small model took."""

    gains: Gains
    rows: int
    tokens: float
    spent_s: float = 0.0

    @property
    def token_s(self) -> float:
        """Seconds for each token."""
        return (self.gains.steps.of(self.rows) + self.spent_s) / self.tokens

    def row_s(self, num: int = 1) -> float:
        """Seconds that `num` more rows take."""
        return self.gains.steps.of(self.rows + num) - self.gains.steps.of(self.rows)

    def add(self, chance: float) -> None:
        """Another guess, which is right with this chance."""
        self.rows += 1
        self.tokens += chance

    def is_worth_a_row(self, chance: float) -> bool:
        """Whether a guess that is made, and is right with this chance, is worth verifying."""
        return chance * self.token_s >= self.row_s()

    def longest(self, going: Iterable[Going], most: int) -> tuple[int, float]:
        """The number of further guesses of each sequence, at most `most`, which gives most tokens
        per second, and the seconds for each token with it. 0 where none gains."""
        chances = [(each.likelihood, each.chance) for each in going]
        best, best_s = 0, self.token_s
        if not chances:
            return best, best_s
        tokens, cost, limit = self.tokens, self.spent_s, best_s / MARGIN
        step_s: Callable[[int], float] = self.gains.steps.of
        for num in range(1, most + 1):
            chances = [(likelihood * chance, chance) for likelihood, chance in chances]
            tokens += sum(likelihood for likelihood, _ in chances)
            cost += self.gains.pass_s(len(chances))
            each_s = (step_s(self.rows + num * len(chances)) + cost) / tokens
            if each_s < min(best_s, limit):
                best, best_s = num, each_s
        return best, best_s
