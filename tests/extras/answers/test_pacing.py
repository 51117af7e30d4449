"""`--max-gap`: on a simulated clock, how long steps take, and that nobody waits for ever."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from typing import Any

import oracle
import pytest
from serving import serving

import nanollama
from nanollama import LLM, GenerationRequest, SamplingParams, Scheduler, TextStream
from nanollama_extras.answers import pacing
from nanollama_extras.answers.pacing import LEAST_PIECE, LONG, PATIENCE, PROBE, MeasuredPace

GAP, CHUNK = 0.015, 512  # seconds; prompt tokens
FAST = 1 / 3000  # seconds for a row: a small model

Cost = Callable[[int], float]  # rows of a step -> seconds


class Clock:
    """Runs a scheduler on a machine whose steps take the time that `cost` says."""

    def __init__(self, cost: Cost, num_slots: int = 16, gap_s: float = GAP) -> None:
        self.scheduler = Scheduler(num_slots, CHUNK, 0, lambda slot, num, length: 0)
        self.pace = self.scheduler.pace = MeasuredPace(CHUNK, gap_s)
        self.cost, self.now, self.steps = cost, 0.0, list[tuple[int, int, float]]()
        self.ended: dict[nanollama.Sequence, float] = {}  # when its prompt was read

    def add(self, num_tokens: int, num_answer: int = 1) -> nanollama.Sequence:
        text, params = TextStream.__new__(TextStream), SamplingParams(max_tokens=num_answer)
        seq = nanollama.Sequence(0, [len(self.ended)] * num_tokens, params, text)
        seq.created_s = self.now
        self.scheduler.add(seq)
        return seq

    def step(self) -> None:
        while admitted := self.scheduler.admit():
            admitted[0].num_computed = 0
        work = self.scheduler.schedule()
        assert work
        num_rows = sum(num for _, num in work)
        num_read = sum(num for seq, num in work if not seq.num_generated)
        seconds = self.cost(num_rows)
        self.now += seconds
        self.steps.append((num_rows - num_read, num_read, seconds))
        for seq, num in work:
            seq.num_computed += num
            if seq.num_computed == len(seq.token_ids):
                self.ended.setdefault(seq, self.now)
                seq.token_ids.append(0)
                if seq.num_generated == seq.params.max_tokens:
                    self.scheduler.retire(seq)
        self.pace.learn(work, seconds)

    def until(self, is_over: Callable[[], bool]) -> None:
        while not is_over():
            self.step()


MACHINES: dict[str, tuple[Cost, int]] = {  # and the number of sequences that answer
    "small": (lambda rows: 0.001 + FAST * rows, 8),
    "by-memory": (lambda rows: max(0.005, FAST * rows), 8),  # reads weights for a few rows
    "GPU": (lambda rows: 0.008 + rows / 100_000, 8),
    "large": (lambda rows: max(0.1, rows / 50), 3),  # one row takes longer than the gap
    "crowded": (lambda rows: 0.002 + FAST * rows, 60),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_steps_fit_into_the_gap_once_the_speed_is_known(machine: str) -> None:
    cost, num_answers = MACHINES[machine]
    clock = Clock(cost, num_answers + 2)
    answers = [clock.add(2, 10**6) for _ in range(num_answers)]
    clock.until(lambda: len(clock.ended) == len(answers))
    first = clock.add(20_000)
    clock.until(lambda: first in clock.ended)  # the speed is learned
    del clock.steps[:]
    long = clock.add(20_000)
    clock.until(lambda: long in clock.ended)
    num_used = num_long = 0
    pieces = [step for step in clock.steps[:-1] if step[1]]
    for num_answering, num_read, seconds in pieces:
        assert num_answering == num_answers
        is_least = num_read <= max(LEAST_PIECE, num_answering)
        num_long += not is_least and seconds > 1.05 * GAP
        num_used += seconds > 0.9 * GAP or num_read in (CHUNK, max(LEAST_PIECE, num_answering))
    assert num_long < 0.03 * len(pieces)
    assert num_used > 0.97 * len(pieces)


@pytest.mark.parametrize("machine", MACHINES)
def test_a_step_that_took_long_is_followed_by_answers_alone(machine: str) -> None:
    cost, num_answers = MACHINES[machine]
    clock = Clock(cost, num_answers + 1)
    for _ in range(num_answers):
        clock.add(2, 10**6)
    clock.until(lambda: len(clock.ended) == num_answers)
    long = clock.add(10_000)
    clock.until(lambda: long in clock.ended)
    later = clock.steps[num_answers + 2 * PROBE : -1]  # the speed is learned
    for (_, num_read, seconds), (_, num_next, _) in itertools.pairwise(later):
        assert not (num_read and num_next) or seconds < 1.05 * LONG * cost(num_answers)
    alone_s = sum(seconds for _, num_read, seconds in later if not num_read)
    assert alone_s < 0.4 * sum(seconds for *_, seconds in later)


def test_steps_are_longer_than_the_gap_where_that_would_waste_most_of_the_time() -> None:
    noise = random.Random(1)
    base, each = 0.06, 0.0014  # a busy machine: threads wait for a core in every layer
    clock = Clock(lambda rows: base * noise.uniform(0.8, 1.2) + each * rows)
    for _ in range(4):
        clock.add(2, 10**6)
    long = clock.add(30_000)
    clock.until(lambda: long in clock.ended)
    later = sorted(num_read for _, num_read, _ in clock.steps[100:] if num_read)
    assert 1.4 * base < each * later[len(later) // 2] < 3 * base


def test_without_answers_steps_are_as_large_as_they_may_be() -> None:
    clock = Clock(MACHINES["small"][0])
    long = clock.add(5 * CHUNK + 3)
    clock.until(lambda: long in clock.ended)
    assert [num_read for _, num_read, _ in clock.steps] == [CHUNK] * 5 + [3]


def test_short_prompts_that_come_together_are_read_together() -> None:
    clock = Clock(MACHINES["small"][0])
    for num in (1, 6):
        texts = [clock.add(2) for _ in range(num)]
        clock.step()
        assert all(seq in clock.ended for seq in texts)


def test_a_prompt_that_ends_with_a_step_does_not_wait_for_the_rest_of_a_long_one() -> None:
    clock = Clock(MACHINES["small"][0])
    clock.add(20_000)
    clock.step()
    short = clock.add(40)
    clock.step()
    assert short in clock.ended
    assert clock.steps[-1][2] < 1.1 * GAP


def test_prompts_of_the_same_length_are_read_in_order_of_arrival() -> None:
    clock = Clock(MACHINES["small"][0])
    prompts = [clock.add(500 - n, 30) for n in range(40)]  # a little shorter each
    clock.now += 0.1
    prompts += [clock.add(500, 30) for _ in range(10)]
    clock.until(lambda: len(clock.ended) == 50)
    order = list(clock.ended)
    assert all(abs(order.index(seq) - i) < 40 for i, seq in enumerate(prompts))
    assert set(order[40:]) == set(prompts[40:])


@pytest.mark.parametrize("load", [0.5, 2.0])  # of the machine's time, by short prompts
def test_a_long_prompt_among_endless_short_ones_ends_in_time(load: float) -> None:
    clock, length = Clock(MACHINES["small"][0], num_slots=4), 12_000
    long, every = clock.add(length), 100 * FAST / load
    num_short, arrived = 0, 0
    while long not in clock.ended:
        while arrived * every <= clock.now:
            clock.add(100, 4)
            arrived += 1
        num_short = sum(seq is not long for seq in clock.ended)
        clock.step()
    alone = length * FAST
    assert clock.now < (PATIENCE * max(load, 1) + 1) * 1.3 * alone
    assert num_short > 5  # which came later
    assert num_short * 100 * FAST < clock.now


def test_one_slow_step_changes_little() -> None:
    clock = Clock(MACHINES["small"][0])
    clock.add(2, 10**6)
    clock.add(50_000)
    for _ in range(30):
        clock.step()
    before = max(num_read for _, num_read, _ in clock.steps[-2:])
    for num_new in (40, 1):
        # another program took the machine
        clock.pace.learn([(clock.scheduler.running[1], num_new)], 2.0)
        for _ in range(2):
            clock.step()
        assert max(num_read for _, num_read, _ in clock.steps[-2:]) > before / 2
    for _ in range(80):
        clock.step()
    assert max(num_read for _, num_read, _ in clock.steps[-2:]) >= before - 2


def test_a_gap_of_0_is_no_limit() -> None:
    clock = Clock(MACHINES["small"][0], gap_s=0)
    clock.add(2, 10**6)
    clock.step()
    clock.add(2000)
    clock.step()
    assert clock.steps[-1][:2] == (1, CHUNK)


# ---- with a model --------------------------------------------------------------------------------


def answers(llm: LLM) -> list[list[int | None]]:
    prompts = [oracle.random_ids(3 + 40 * i, seed=i) for i in range(5)]
    requests = [
        GenerationRequest(ids, params=SamplingParams(seed=i, max_tokens=20, ignore_eos=True))
        for i, ids in enumerate(prompts)
    ]
    found: list[list[int | None]] = [[] for _ in prompts]
    for delta in llm.stream(requests):
        found[delta.index].append(delta.token_id)
    return found


@pytest.mark.parametrize("max_gap", [0, 0.01, 1, 1000.0])
def test_answers_do_not_depend_on_the_gap(max_gap: float, tiny: oracle.Tiny) -> None:
    plain, paced = LLM(tiny("Llama"), parallel=3), LLM(tiny("Llama"), parallel=3, max_gap=max_gap)
    assert plain.engine.scheduler.pace is plain.engine.scheduler
    assert answers(paced) == answers(plain)
    learned: Any = paced.engine.scheduler.pace
    assert max_gap == 0 or learned.each_s > 0


def test_a_server_keeps_a_gap_unless_it_is_told_otherwise(tiny: oracle.Tiny) -> None:
    for options, gap_s in (({}, pacing.DEFAULT_GAP / 1000), ({"max_gap": 0}, 0)):
        with serving(lambda options=options: LLM(tiny("Llama"), parallel=2, **options)) as live:
            pace: Any = live.pool.llm().engine.scheduler.pace
            assert pace.gap_s == gap_s
