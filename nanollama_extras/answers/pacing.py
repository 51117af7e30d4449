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

DEFAULT_GAP = 15.0  # milliseconds, of a server
LEAST_PIECE = 16  # prompt tokens: smaller pieces would read the weights for too little work
PATIENCE = 4  # a prompt's deadline comes after so many times the time that it takes alone
SMOOTHING = 0.4  # share of the last step in the speed
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


class MeasuredPace:
    """Reads as much in a step as its measured speed allows.

    Rows per second hardly depend on how many rows a step has, once it has some; so the next step's
    rows follow from the speed of the last ones, whatever the model, the machine and the depth."""

    def __init__(self, most: int, gap_s: float) -> None:
        self.most, self.gap_s = most, gap_s  # prompt tokens in a step; seconds
        self.speed = 0.0  # rows per second; 0: not measured yet

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
        least = max(num_rows, LEAST_PIECE)
        return min(max(int(self.speed * self.gap_s) - num_rows, least), self.most)

    def learn(self, work: Work, seconds: float) -> None:
        """Hear how long a step took. One without prompts says nothing, and one with few rows says
        little, because these cost more than rows of a full step."""
        if any(num_new > 1 for _, num_new in work):
            num_rows = sum(num_new + len(seq.draft) for seq, num_new in work)
            fullness = num_rows / max(num_rows, self.speed * self.gap_s)
            share = SMOOTHING * fullness if self.speed else 1
            self.speed += (num_rows / max(seconds, 1e-9) - self.speed) * share
