"""The number of threads of decode steps: on simulated machines, and what it leaves alone."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from nanollama import LLM, GenerationRequest, SamplingParams
from nanollama_extras.kernels import arrays, containers, thread_choice
from nanollama_extras.kernels.thread_choice import ThreadChoice, numbers

Machine = Callable[[int, int], float]  # threads, step -> seconds


def steps_of(machine: Machine, choice: ThreadChoice, first: int, end: int) -> Iterator[int]:
    """Run steps; the threads of each."""
    for step in range(first, end):
        yield choice.count
        choice.learn(1, machine(choice.count, step))


def noisy(times: dict[int, float], noise: float, seed: int = 0) -> Machine:
    """Steps with times that vary as a shared machine's do: up, and sometimes far."""
    draw = random.Random(seed)

    def machine(threads: int, step: int) -> float:
        outlier = 20.0 if draw.random() < 0.004 else 0.0
        return times[threads] * (1 + noise * draw.expovariate(1) + outlier)

    return machine


def seconds_lost(machine: Machine, used: list[int], best: int) -> float:
    """The part of the time that other numbers of threads than the best one cost."""
    own = sum(machine(threads, step) for step, threads in enumerate(used))
    return own / sum(machine(best, step) for step in range(len(used))) - 1


TWO_CORES = {1: 4.3, 2: 3.6}
FOUR_CORES = {1: 8.0, 2: 4.2, 3: 3.0, 4: 2.4}


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("times", [TWO_CORES, FOUR_CORES, {1: 5.0, 2: 2.6}])
def test_a_quiet_machine_keeps_its_cores_and_loses_less_than_one_percent(
    times: dict[int, float], noise: float
) -> None:
    choice = ThreadChoice(sorted(times), max(times))
    used = list(steps_of(noisy(times, noise), choice, 0, 8000))
    assert seconds_lost(lambda threads, _: times[threads], used, max(times)) < 0.01
    assert used[:100] == [max(times)] * 100 or noise


@pytest.mark.parametrize(("eight", "best"), [(0.9, 8), (1.15, 4)])
@pytest.mark.parametrize("seed", range(3))
def test_hyperthreads_are_used_where_they_are_faster(eight: float, best: int, seed: int) -> None:
    times = {**FOUR_CORES, 8: FOUR_CORES[4] * eight}
    choice = ThreadChoice(numbers(4, 8), 4)
    used = list(steps_of(noisy(times, 0.1, seed), choice, 0, 6000))
    assert sum(threads == best for threads in used[1000:]) > 0.93 * 5000


def neighbour(times: dict[int, float], busy: range, seed: int) -> Machine:
    """One that takes a core for a while: a step with a thread on it waits half the time."""
    quiet = noisy(times, 0.1, seed)
    draw = random.Random(seed + 1)

    def machine(threads: int, step: int) -> float:
        is_hit = step in busy and threads == max(times)
        return quiet(threads, step) * (draw.choice([1.0, 2.6]) if is_hit else 1.0)

    return machine


@pytest.mark.parametrize("times", [TWO_CORES, FOUR_CORES])
@pytest.mark.parametrize("seed", range(3))
def test_a_core_that_a_neighbour_takes_is_left_to_it_until_it_goes(
    times: dict[int, float], seed: int
) -> None:
    machine = neighbour(times, range(2000, 5000), seed)
    choice = ThreadChoice(sorted(times), max(times))
    used = list(steps_of(machine, choice, 0, 8000))
    most, fewer = max(times), max(times) - 1
    assert sum(threads == most for threads in used[:2000]) > 0.96 * 2000
    assert sum(threads == fewer for threads in used[2200:5000]) > 0.94 * 2800
    assert sum(threads == most for threads in used[6200:]) > 0.95 * 1800


@pytest.mark.parametrize("seed", range(3))
def test_a_core_that_is_busy_from_the_start_is_left_soon(seed: int) -> None:
    choice = ThreadChoice([1, 2], 2)
    used = list(steps_of(neighbour(TWO_CORES, range(9999), seed), choice, 0, 500))
    assert sum(threads == 1 for threads in used[100:]) > 0.9 * 400


def test_neighbours_on_half_of_the_cores_are_left_alone() -> None:
    before, after = (noisy({**FOUR_CORES, **late}, 0.1) for late in ({8: 2.5}, {3: 8, 4: 8, 8: 9}))
    choice = ThreadChoice(numbers(4, 8), 4)
    used = list(steps_of(before, choice, 0, 500)) + list(steps_of(after, choice, 500, 2500))
    assert sum(threads == 2 for threads in used[1000:]) > 0.95 * 1500


@pytest.mark.parametrize("noise", [0.5, 1.0])
def test_on_a_machine_of_noise_alone_trials_stay_within_their_cost(noise: float) -> None:
    times = {1: 1.8, 2: 1.0}
    choice = ThreadChoice([1, 2], 2)
    used = list(steps_of(noisy(times, noise), choice, 0, 8000))
    assert seconds_lost(lambda threads, _: times[threads], used, 2) < 0.015


def test_steps_with_other_rows_are_not_compared() -> None:
    draw, used = random.Random(0), list[int]()
    choice = ThreadChoice([1, 2], 2)
    for _ in range(6000):
        num_rows = draw.choice([1, 1, 1, 16])
        used.append(choice.count)
        choice.learn(num_rows, TWO_CORES[choice.count] * num_rows)
    assert sum(threads == 2 for threads in used) > 0.98 * 6000


@pytest.mark.parametrize(
    ("cores", "most", "expected"),
    [
        (1, 1, [1]),
        (1, 2, [1, 2]),
        (2, 2, [1, 2]),
        (4, 8, [1, 2, 3, 4, 8]),
        (16, 16, [1, 2, 3, 4, 6, 8, 12, 15, 16]),
    ],
)
def test_numbers_end_with_the_cores_and_their_threads(
    cores: int, most: int, expected: list[int]
) -> None:
    assert numbers(cores, most) == expected


@pytest.fixture
def four_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(containers, "num_cores", lambda: 8)
    monkeypatch.setattr(thread_choice, "default_threads", lambda: 4)
    monkeypatch.setattr(thread_choice.torch, "get_num_threads", lambda: 4)
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(arrays.Threads, "is_given", False)


@pytest.mark.usefixtures("four_cores")
def test_a_given_number_is_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    choice = thread_choice.new_choice()
    assert choice
    assert (choice.counts, choice.count) == ([1, 2, 3, 4, 8], 4)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert thread_choice.new_choice() is None
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr(arrays.Threads, "is_given", True)  # by --threads
    assert thread_choice.new_choice() is None
    monkeypatch.setattr(arrays.Threads, "is_given", False)
    monkeypatch.setattr(thread_choice.torch, "get_num_threads", lambda: 3)  # by a program
    assert thread_choice.new_choice() is None


def test_an_option_leaves_no_choice(tiny: Callable[..., Path]) -> None:
    before = torch.get_num_threads()
    try:
        assert LLM(tiny("Llama"), threads=1).engine.decode_steps.threads is None
        assert arrays.Threads.is_given
        LLM(tiny("Llama"))
        assert not arrays.Threads.is_given
    finally:
        torch.set_num_threads(before)


class Every(ThreadChoice):
    """Each step takes the next number of threads."""

    def learn(self, num_rows: int, seconds: float) -> None:
        self.at = (self.at + 1) % len(self.counts)


def test_answers_do_not_depend_on_the_threads(tiny: Callable[..., Path]) -> None:
    llm = LLM(tiny("Llama"), quantize="q4", parallel=2)
    answers = []
    params = SamplingParams(temperature=1, seed=3, max_tokens=40, ignore_eos=True)
    for choice in (None, Every([1, 2, 3, 7], 1)):
        llm.engine.forget()
        llm.engine.decode_steps.threads = choice
        seqs = [llm.start(GenerationRequest(list(range(n)), params=params)) for n in (9, 70)]
        while llm.engine.has_work:
            llm.engine.step()
        answers.append([seq.token_ids for seq in seqs])
    assert answers[0] == answers[1]
