"""`--max-gap`: steps so short that answers do not stall while prompts are read.

Adds       `keep_pace`, which gives an engine a `MeasuredPace`. A step in which sequences answer
           reads as much of the prompts as the speed of earlier steps allows within the gap, short
           prompts first. After a long step, one has answers alone.
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

DEFAULT_GAP = 160.0  # milliseconds, of a server: shorter ones cost throughput and the first token
LEAST_PIECE = 16  # prompt tokens: smaller pieces would read the weights for too little work
PATIENCE = 4  # a prompt's deadline comes after so many times the time that it takes alone
SMOOTHING = 0.3  # share of the last full piece in the time of a prompt token
MEMORY = 0.05  # share of the last step in the line
ORIGIN = 0.05  # standard deviation of rows, as a part of their mean, that the origin weighs against
LEAST_SLOPE = 0.02  # of the line, as a part of the slope from the origin
OUTLIER = 2  # a time of as many times the expected one counts as no more
LONG = 2  # times as long as a step of answers alone: one follows
ROW_COST = 2  # an answer's row may take as many times as long as a prompt token; more is overhead
LEAST_WORK = 2  # time for a piece, as a multiple of this overhead: two thirds of a step
PROBE = 8  # pieces, after which a step has answers alone
FIRST_EACH = 0.001  # seconds for a prompt token, before any was measured


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
    """Seconds of a step of answers alone, as a line of its rows that is fitted to the latest ones.

    A regression whose sums forget, with a little weight for a line through the origin."""

    def __init__(self) -> None:
        self.rows = self.seconds = self.variance = self.covariance = 0.0  # of rows; the means first

    def add(self, num_rows: int, seconds: float) -> None:
        share = MEMORY if self.rows else 1
        if self.rows:
            seconds = min(seconds, OUTLIER * self.of(num_rows))
        off_rows, off_seconds = num_rows - self.rows, seconds - self.seconds
        self.rows += share * off_rows
        self.seconds += share * off_seconds
        self.variance += share * ((1 - share) * off_rows * off_rows - self.variance)
        self.covariance += share * ((1 - share) * off_rows * off_seconds - self.covariance)

    def of(self, num_rows: int) -> float:
        """Seconds of a step; 0 without any."""
        if not self.rows:
            return 0.0
        doubt, least = (ORIGIN * self.rows) ** 2, LEAST_SLOPE * self.seconds / self.rows
        slope = self.covariance + doubt * self.seconds / self.rows
        each = max(slope / (self.variance + doubt), least)
        return max(self.seconds + each * (num_rows - self.rows), least * num_rows)


class MeasuredPace:
    """Reads as much of the prompts in a step as its measured speed allows.

    A step takes what its answers take alone, and a time for each prompt token that hardly depends
    on how many there are. Both are learned from the last steps, whatever the model, the machine and
    the depth. Where a step takes long besides its rows, as on a busy machine, short ones would
    waste most of the time: there, steps are longer than the gap.

        step      | piece ............ | answers | piece ............ | answers | ..
        seconds   |<-------- at most the gap --->|  alone: short"""

    def __init__(self, most: int, gap_s: float) -> None:
        self.most, self.gap_s = most, gap_s  # prompt tokens in a step; seconds
        self.each_s = 0.0  # of a prompt token; 0: not measured yet
        self.alone = Line()
        self.num_pieces, self.must_rest = 0, False

    def rank(self, seq: Sequence) -> float:
        """The deadline by which a prompt should have been read. Between prompts that wait equally
        long, the one with less left comes first; later ones pass only until then."""
        num_left = len(seq.token_ids) - seq.num_computed
        return seq.created_s + PATIENCE * num_left * (self.each_s or FIRST_EACH)

    def room(self, num_rows: int) -> int:
        """As many prompt tokens as fit into the gap beside `num_rows` rows, but no fewer than these
        and LEAST_PIECE, so that no load of answers keeps prompts from being read. None where a
        step should have answers alone."""
        if not num_rows or not self.gap_s:
            return self.most
        if self.must_rest:
            return 0
        least = max(num_rows, LEAST_PIECE)
        if not self.each_s:
            return min(least, self.most)
        alone_s = self.alone.of(num_rows)
        overhead_s = max(alone_s - ROW_COST * self.each_s * num_rows, 0.0)
        piece_s = max(self.gap_s - alone_s, LEAST_WORK * overhead_s)
        return min(max(int(piece_s / self.each_s), least), self.most)

    def learn(self, work: Work, seconds: float) -> None:
        """Take a step's time. A small piece says little of what a prompt token takes, because it
        takes more than in a full one."""
        seconds = max(seconds, 1e-9)
        num_read = sum(num_new for _, num_new in work if num_new > 1)
        num_rows = sum(1 + len(seq.draft) for seq, num_new in work if num_new == 1)
        if not num_read:
            self.alone.add(num_rows, seconds)
            self.must_rest = False
            return
        alone_s = self.alone.of(num_rows) if num_rows else 0.0
        each_s, share = max(seconds - alone_s, seconds / 8) / num_read, 1.0
        if self.each_s:
            each_s = min(each_s, OUTLIER * self.each_s)
            share = SMOOTHING * min(1.0, num_read * self.each_s / (self.gap_s or seconds))
        self.each_s += (each_s - self.each_s) * share
        self.num_pieces += 1
        is_long = seconds >= LONG * alone_s or self.num_pieces % PROBE == 0
        self.must_rest = is_long and num_rows > 0
