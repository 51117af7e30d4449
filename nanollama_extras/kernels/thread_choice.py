"""How many threads a decode step takes, by the time that steps took.

Two threads of one core may be faster or slower than one, and on a machine whose other cores are
busy, threads that share a core with other programs hold the rest up. So a few steps of an answer
now and then take another number of threads, which stays if they are faster.

Adds       `ThreadChoice`, which needs times alone, and `new_choice`, one for this machine; a line
           of `show`.
Seam       kernels.recorded asks `new_choice` for one, commands.details for the line. `--threads`,
           OMP_NUM_THREADS and a program that calls torch.set_num_threads leave nothing to choose.
Imports    kernels.arrays, kernels.containers
Remove     delete this file: decode steps then take a thread for each core.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanollama import log, preferred
from nanollama_extras.kernels.arrays import Threads, default_threads, from_environment, torch

if TYPE_CHECKING:
    from nanollama import Backend, Engine, EngineConfig

SOON = 16  # steps before a trial after a change
LATER = 256  # steps before the first trial, and at most between those away from the first number
LONGEST = 1024  # steps between trials; their number doubles after each that changes nothing
COST = 0.01  # of the time may go into trials
PAIRS = 40  # of steps in a trial at most; so a number that takes another's place is 5 % faster
OUTLIER = 3  # a step counts as at most so many usual ones
CHANGE = 1.4  # times the usual time, or as much less: the machine has changed
DRIFT = 1.01  # by which a least time grows with each step
RECENT, USUAL = 1 / 16, 1 / 256  # shares of a step in these times


@dataclass(slots=True)
class Trial:
    """Steps with another number of threads, in turns with those of the number in use."""

    at: int  # the other number's place among those that can be chosen
    is_other: bool = False  # the step that runs now
    own_s: float = 0.0  # of the pair's step with the number in use; 0: none yet
    own_sum: float = 0.0  # of whole pairs
    other_sum: float = 0.0
    num_pairs: int = 0

    @property
    def ratio(self) -> float:
        return self.other_sum / self.own_sum

    @property
    def is_won(self) -> bool:
        return self.ratio < 1 - 2 / self.num_pairs

    @property
    def is_lost(self) -> bool:
        return self.ratio > 1 + 2 / self.num_pairs or self.num_pairs >= PAIRS


class ThreadChoice:
    """Chooses among numbers of threads by the times of steps.

    A trial ends as soon as the two numbers differ clearly, after two pairs of steps where one takes
    half as long again. What it lost is then paid back, COST of the time, before the next one. That
    comes soon where steps take longer or shorter than before. Before the first one, their usual
    time is nearly the least one: times that vary are those of a busy machine."""

    def __init__(self, counts: Sequence[int], count: int) -> None:
        """counts: the numbers to choose from, in ascending order; count: the first in use."""
        self.counts = counts
        self.first = self.at = counts.index(count)
        self.trial: Trial | None = None
        self.turn = 0  # of the ways to change the number
        self.interval = self.left = LATER  # steps: between trials, until the next one
        self.num_rows, self.usual_s, self.recent_s = 0, 0.0, 0.0
        self.is_new = True  # without a trial so far
        self.debt_s = 0.0  # lost in trials and not paid back

    @property
    def count(self) -> int:
        """The number of threads of the next step"""
        trial = self.trial
        return self.counts[trial.at if trial and trial.is_other else self.at]

    def learn(self, num_rows: int, seconds: float) -> None:
        """Take the time of a step with `count` threads and `num_rows` rows."""
        if num_rows != self.num_rows:  # times are compared for one number of rows
            self.num_rows = num_rows
            self.usual_s = self.recent_s = seconds
            if self.trial:
                self.trial.is_other, self.trial.own_s = False, 0.0
            return
        if self.trial:
            self.compare(self.trial, min(seconds, OUTLIER * self.usual_s))
            return
        seconds = min(seconds, OUTLIER * self.usual_s)
        self.recent_s += RECENT * (seconds - self.recent_s)
        if self.is_new:
            self.usual_s = min(seconds, DRIFT * self.usual_s)
        else:
            self.usual_s += USUAL * (seconds - self.usual_s)
        self.debt_s -= COST * seconds
        self.left -= 1
        if self.left > SOON and not 1 / CHANGE < self.recent_s / self.usual_s < CHANGE:
            self.interval = self.left = SOON
        if self.left <= 0 and self.debt_s <= 0:
            self.begin()

    def begin(self) -> None:
        """Try the next number down or up, or, since several cores may be busy, half as many: one
        after the other, the same way again after a gain."""
        half = bisect.bisect(self.counts, self.counts[self.at] // 2) - 1
        places = dict.fromkeys((self.at - 1, self.at + 1, half))
        found = [at for at in places if 0 <= at < len(self.counts)]
        self.trial = Trial(found[self.turn % len(found)])
        self.is_new, self.debt_s = False, 0.0

    def compare(self, trial: Trial, seconds: float) -> None:
        """Take the time of a step of a trial."""
        if not trial.is_other:
            trial.own_s, trial.is_other = seconds, True
            return
        trial.is_other = False
        trial.own_sum += trial.own_s
        trial.other_sum += seconds
        trial.num_pairs += 1
        if trial.num_pairs < 2:
            return
        if trial.is_won:
            self.at = trial.at
            log.debug(f"decode steps take {self.count} threads")
            self.interval = self.left = SOON
            self.trial = None
            self.usual_s = self.recent_s = trial.other_sum / trial.num_pairs
        elif trial.is_lost:
            self.debt_s = max(trial.other_sum - trial.own_sum, 0.0)
            self.trial, self.turn = None, self.turn + 1
            self.usual_s = self.recent_s = trial.own_sum / trial.num_pairs
            longest = LONGEST if self.at == self.first else LATER
            self.interval = self.left = min(2 * self.interval, longest)


def new_choice(is_given: bool | None = None) -> ThreadChoice | None:
    """A choice for this machine; None where the number is given, or only one is possible."""
    if is_given is None:
        is_given = Threads.is_given
    count, most = torch.get_num_threads(), num_cores()
    if is_given or from_environment() or count != min(default_threads(), most) or most < 2:
        return None
    return ThreadChoice(numbers(count, most), count)


def num_cores() -> int:
    return preferred("kernels.containers", "num_cores", os.cpu_count)() or 1


def numbers(cores: int, most: int) -> list[int]:
    """Numbers to choose from: some up to that of the cores, and that of all their threads."""
    ladder = {n for power in range(12) for n in (1 << power, 3 << power) if n < cores}
    return sorted(ladder | {max(1, cores - 1), cores, most})


def threads_used(engine: Engine) -> dict[str, int]:
    """The threads of an engine, and those that its decode steps take now."""
    count = torch.get_num_threads()
    choice = getattr(engine.decode_steps, "threads", None)
    return {"threads": count, "decode_threads": choice.count if choice else count}


def add_details(lines: dict[str, str], config: EngineConfig, backend: Backend) -> None:
    """Add the line of `show`."""
    count = min(config.threads or torch.get_num_threads(), num_cores())
    is_native = hasattr(backend, "run_kernel")
    choice = new_choice(config.threads is not None) if is_native else None
    lines["threads"] = str(count)
    if choice:
        least, most = choice.counts[0], choice.counts[-1]
        lines["threads"] += f"; decode steps take {least} to {most}, whichever is fastest"
