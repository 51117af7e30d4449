"""`--max-gap`: steps so short that answers do not stall while prompts are read.

Adds       `keep_pace`, which gives an engine a `MeasuredPace`. A step in which sequences answer
           reads as much of the prompts as the speed of earlier steps allows within the gap, short
           prompts first.
Seam       `Scheduler.pace`. Servers call `keep_pace` for each model, and an engine does for
           `--max-gap`.
Remove     delete this file: a step then always reads up to `--prefill-chunk` tokens, and
           `--max-gap` says that it needs this file.
Source     rank: earliest deadline first, with deadlines in proportion to the work
           (https://doi.org/10.1145/321738.321743); short pieces beside rows that decode:
           https://arxiv.org/abs/2403.02310
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanollama import Engine, Sequence

    Work = list[tuple[Sequence, int]]  # sequences with their new tokens

DEFAULT_GAP = 80.0  # milliseconds, of a server: shorter ones cost throughput
LEAST_PIECE = 16  # prompt tokens: smaller pieces would read the weights for too little work
PATIENCE = 4  # a prompt's deadline comes after so many times the time that it takes alone
SMOOTHING = 0.4  # share of the last step in the speed
MEMORY = 0.03  # share of the last step in the line
ORIGIN = 0.05  # standard deviation of rows, as a part of their mean, that the origin weighs against
LEAST_SLOPE = 0.02  # of the line, as a part of the slope from the origin
LEAST_WORK = 2  # time for a step's rows, as a multiple of what it takes besides: two thirds of it
PROBE = 16  # steps, of which one is half or twice as large
FIRST_SPEED = 1000.0  # rows per second, before any step was measured


def keep_pace(engine: Engine, max_gap: float | None = None) -> None:
    """Keep an engine's steps within `max_gap` milliseconds; 0: any time. None leaves the gap that
    the engine has, or sets the one of servers."""
    scheduler = engine.scheduler
    if max_gap is None:
        if isinstance(scheduler.pace, MeasuredPace):
            return
        max_gap = DEFAULT_GAP
    scheduler.pace = MeasuredPace(scheduler.prefill_chunk, max_gap / 1000)


class Line:
    """Seconds as a line of rows, fitted to the latest steps: `each` row takes some, `base` is what
    a step takes besides. Without steps of different sizes, `base` is 0.

    A regression whose sums forget, with a little weight for a line through the origin."""

    def __init__(self) -> None:
        self.rows = self.seconds = self.variance = self.covariance = 0.0  # of rows; the means first

    def add(self, num_rows: int, seconds: float) -> None:
        share = MEMORY if self.rows else 1
        off_rows, off_seconds = num_rows - self.rows, seconds - self.seconds
        self.rows += share * off_rows
        self.seconds += share * off_seconds
        self.variance += share * ((1 - share) * off_rows * off_rows - self.variance)
        self.covariance += share * ((1 - share) * off_rows * off_seconds - self.covariance)

    @property
    def each(self) -> float:
        doubt = (ORIGIN * self.rows) ** 2
        slope = self.covariance + doubt * self.seconds / self.rows
        return max(slope / (self.variance + doubt), LEAST_SLOPE * self.seconds / self.rows)

    @property
    def base(self) -> float:
        return max(self.seconds - self.each * self.rows, 0.0)


class MeasuredPace:
    """Reads as much in a step as its measured speed allows.

    Rows per second hardly depend on how many rows a step has, once it has some; so the next step's
    rows follow from the speed of the last ones, whatever the model, the machine and the depth.
    Where a step takes long besides its rows, as on a busy machine, short ones would waste most of
    the time: there, steps are longer than the gap."""

    def __init__(self, most: int, gap_s: float) -> None:
        self.most, self.gap_s = most, gap_s  # prompt tokens in a step; seconds
        self.speed = 0.0  # rows per second; 0: not measured yet
        self.line, self.num_steps = Line(), 0

    def rank(self, seq: Sequence) -> float:
        """The deadline by which a prompt should have been read. Between prompts that wait equally
        long, the one with less left comes first; later ones pass only until then."""
        num_left = len(seq.token_ids) - seq.num_computed
        return seq.created_s + PATIENCE * num_left / (self.speed or FIRST_SPEED)

    def room(self, num_rows: int) -> int:
        """As many prompt tokens as fit into the gap beside `num_rows` rows, but no fewer than these
        and LEAST_PIECE, so that no load of answers keeps prompts from being read."""
        if not num_rows or not self.gap_s:
            return self.most
        wanted = self.speed * self.gap_s
        if self.line.rows:
            wanted = max(wanted, LEAST_WORK * self.line.base / self.line.each)
        room = max(int(wanted) - num_rows, num_rows, LEAST_PIECE)
        if self.num_steps % PROBE == 0:  # a step of another size, for the line
            room = room // 2 if room >= 2 * LEAST_PIECE else 2 * room
        return min(room, self.most)

    def learn(self, work: Work, seconds: float) -> None:
        """Hear how long a step took. For the speed, one without prompts says nothing, and one with
        few rows says little, because these cost more than rows of a full step."""
        seconds = max(seconds, 1e-9)
        num_rows = sum(num_new + len(seq.draft) for seq, num_new in work)
        self.line.add(num_rows, seconds)
        if any(num_new > 1 for _, num_new in work):
            self.num_steps += 1
            fullness = num_rows / max(num_rows, self.speed * self.gap_s)
            share = SMOOTHING * fullness if self.speed else 1
            self.speed += (num_rows / seconds - self.speed) * share
