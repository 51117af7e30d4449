"""Section 10: every link of the sampler chain against transformers and plain NumPy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import nanollama
from nanollama import RequestError, SamplingParams

PLAIN: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repeat_penalty": 1.0,
}


Row = npt.NDArray[np.float32]


def random_logits(seed: int, n_vocab: int = 200) -> Row:
    return np.random.default_rng(seed).standard_normal(n_vocab, dtype=np.float32) * 4


def row(*logits: float) -> Row:
    return np.array(logits, dtype=np.float32)


def probabilities(logits: Row, params: SamplingParams, history: list[int]) -> np.ndarray:
    """The distribution a token is drawn from, in float64, by transformers' own processors."""
    scores = torch.from_numpy(logits).double()[None]
    ids = torch.tensor([history])
    if params.repeat_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(params.repeat_penalty)(ids, scores)
    links: list[Any] = [TemperatureLogitsWarper(params.temperature)]
    if params.top_k:
        links.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        links.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0:
        links.append(MinPLogitsWarper(params.min_p))
    for link in links:
        scores = link(ids, scores)
    return scores[0].softmax(0).numpy()


def draws(
    logits: Row, params: SamplingParams, num: int, prefix: tuple[int, ...] = (5, 6, 7)
) -> np.ndarray:
    """`num` draws with as many seeds."""
    history = list(prefix)
    return np.array([nanollama.sample(logits, params, s, history, 1) for s in range(num)])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"temperature": 0.5},
        {"temperature": 2.0},
        {"top_k": 5},
        {"top_k": 10**6},
        {"top_p": 0.7},
        {"min_p": 0.1},
        {"repeat_penalty": 1.5},
        {"top_k": 20, "top_p": 0.8, "min_p": 0.02, "temperature": 1.7, "repeat_penalty": 1.3},
    ],
)
def test_draws_follow_the_distribution_of_transformers_chain(changes: dict[str, Any]) -> None:
    params = SamplingParams(**{**PLAIN, **changes})
    for seed in range(2):
        logits = random_logits(seed, 40)
        expected = probabilities(logits, params, [5, 6, 7])
        num = 3000
        counts = np.bincount(draws(logits, params, num), minlength=40)
        assert not counts[expected == 0].any()  # nothing that the chain cuts is ever drawn
        likely = expected * num >= 5
        chi2 = ((counts[likely] - expected[likely] * num) ** 2 / (expected[likely] * num)).sum()
        degrees = max(int(likely.sum()) - 1, 1)
        assert chi2 < degrees + 4 * math.sqrt(2 * degrees) + 6  # about p > 0.0001


@settings(max_examples=150, deadline=None)
@given(
    st.integers(0, 10**6), st.integers(0, 60), st.floats(0, 1), st.floats(0, 1), st.floats(0.05, 3)
)
def test_only_tokens_that_transformers_keeps_are_drawn(
    seed: int, top_k: int, top_p: float, min_p: float, temperature: float
) -> None:
    logits = random_logits(seed, 60)
    params = SamplingParams(
        **{**PLAIN, "top_k": top_k, "top_p": top_p, "min_p": min_p, "temperature": temperature}
    )
    # float rounding may move a token across a threshold: allow what a slightly wider chain keeps
    wider = SamplingParams(
        **{
            **PLAIN,
            "top_k": top_k,
            "top_p": min(1.0, top_p + 1e-9),
            "min_p": min_p * (1 - 1e-9),
            "temperature": temperature,
        }
    )
    kept = probabilities(logits, wider, [0]) > 0
    for i in range(5):
        assert kept[nanollama.sample(logits, params, seed + i, [0], 1)]


def test_the_draw_inverts_the_cumulative_distribution() -> None:
    logits = random_logits(3, 30)
    params = SamplingParams(**PLAIN)
    order = np.argsort(-logits, kind="stable")
    cumulative = np.cumsum(probabilities(logits, params, [0])[order])
    for seed in range(200):
        u = nanollama.uniform(seed, 4)
        expected = order[np.searchsorted(cumulative, u, side="right")]
        assert nanollama.sample(logits, params, seed, [1, 2, 3, 4], 1) == expected


def test_temperature_zero_and_top_k_one_take_the_best() -> None:
    for seed in range(20):
        logits = random_logits(seed)
        best = int(logits.argmax())
        for change in ({"temperature": 0.0}, {"top_k": 1}, {"top_p": 0.0}, {"min_p": 1.0}):
            params = SamplingParams(**{**PLAIN, **change})
            assert {int(i) for i in draws(logits, params, 5)} == {best}


@pytest.mark.parametrize("temperature", [1e-300, 5e-324, 1e-30, 100.0])
def test_no_temperature_overflows(temperature: float) -> None:
    logits = row(-3e38, 1.0, 3e38, 2.0)
    params = SamplingParams(**{**PLAIN, "temperature": temperature})
    assert set(draws(logits, params, 20)) == {2}


def test_greedy_follows_the_repetition_penalty_and_the_bias() -> None:
    logits = row(2.0, 1.9, -1.0)
    greedy = {**PLAIN, "temperature": 0.0}
    assert nanollama.sample(logits, SamplingParams(**greedy), 0, [0], 1) == 0
    repeat = SamplingParams(**{**greedy, "repeat_penalty": 1.1})
    assert nanollama.sample(logits, repeat, 0, [0], 1) == 1
    biased = SamplingParams(**{**greedy, "logit_bias": {2: 5.0}})
    assert nanollama.sample(logits, biased, 0, [0], 1) == 2


def test_in_a_given_form_repetition_is_what_the_answer_said_twice() -> None:
    """The prompt's own words (id 0) belong there; what the answer said already (id 1) does not."""
    logits = row(2.0, 1.9, 1.8)
    for last_n in (-1, 9, 2):
        fields = {"temperature": 0.0, "repeat_penalty": 1.2, "repeat_last_n": last_n}
        params = SamplingParams(**{**PLAIN, **fields})
        assert nanollama.sample(logits, params, 0, [2, 0], 2) == 1
        assert nanollama.sample(logits, params, 0, [2, 0], 2, is_free=False) == 0
        assert nanollama.sample(logits, params, 0, [0, 0, 1], 2, is_free=False) == 0
        assert nanollama.sample(logits, params, 0, [2, 2, 0, 1], 2, is_free=False) == 2


# ---- without sorting the vocabulary --------------------------------------------------------------


def penalized(logits: Row, params: SamplingParams, history: list[int]) -> Row:
    """The repetition penalty, token by token."""
    logits = logits.copy()
    recent = history if params.repeat_last_n < 0 else history[-params.repeat_last_n :]
    for i in set(recent) if params.repeat_last_n else ():
        penalty = params.repeat_penalty
        logits[i] = logits[i] / penalty if logits[i] > 0 else logits[i] * penalty
    return logits


def sample_from_all(logits: Row, params: SamplingParams, seed: int, history: list[int]) -> int:
    """The chain as its formulas say: the whole vocabulary sorted, then cut."""
    whole = torch.from_numpy(penalized(logits, params, history))
    top, ids = whole.sort(descending=True, stable=True)
    if params.temperature == 0:
        return int(ids[0])
    top = top[: params.top_k or len(top)]
    probs = ((top - top[0]).double() / params.temperature).softmax(0)
    if params.top_p < 1:
        probs = probs[(probs.cumsum(0) - probs < params.top_p) | (probs == probs[0])]
    probs = probs[probs >= params.min_p * probs[0]]
    cumulative = probs.cumsum(0)
    drawn = nanollama.uniform(seed, len(history)) * cumulative[-1]
    return int(ids[min(int((cumulative <= drawn).sum()), len(probs) - 1)])


@pytest.mark.parametrize("n_vocab", [3, 320, 8191, 50257, 151936])
@pytest.mark.parametrize(
    "changes",
    [
        {"temperature": 0.7, "top_k": 40, "repeat_penalty": 1.1},
        {"temperature": 0.0, "repeat_penalty": 1.1},
        {"temperature": 1.5, "top_k": 1000},
        {"top_p": 0.9},
        {"top_p": 0.9, "min_p": 0.01, "temperature": 2.0},
        {"min_p": 0.02, "repeat_penalty": 1.3, "repeat_last_n": 7},
        {"temperature": 3.0, "top_p": 0.999},
        {},
    ],
    ids=str,
)
def test_a_token_is_the_one_that_sorting_the_whole_vocabulary_gives(
    changes: dict[str, Any], n_vocab: int
) -> None:
    params = SamplingParams(**{**PLAIN, **changes})
    flat, equal = np.zeros(n_vocab, dtype=np.float32), random_logits(2, n_vocab).round(1)
    masked = random_logits(3, n_vocab)
    masked[np.arange(n_vocab) % 1000 != 1] = -math.inf
    for seed, logits in enumerate((random_logits(1, n_vocab), flat, equal, masked)):
        history = [(i * 7919) % n_vocab for i in range(50)]
        for s in (seed, seed + 10):
            expected = sample_from_all(logits, params, s, history)
            assert nanollama.sample(logits, params, s, history, 1) == expected


def test_a_draw_from_all_tokens_sorts_only_the_likeliest(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, likeliest = 3 * random_logits(1, 50_000), nanollama.likeliest
    numbers: list[int] = []

    def counted(row: Any, num: int) -> Any:
        numbers.append(num)
        return likeliest(row, num)

    monkeypatch.setattr(nanollama, "likeliest", counted)
    for seed in range(20):
        nanollama.sample(logits, SamplingParams(**PLAIN), seed, [0], 1)
    assert min(numbers) == 64
    assert max(numbers) < len(logits)


@given(
    st.integers(1, 2000).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
    st.integers(0, 10**6),
    st.sampled_from([0.1, 1.0, 1000.0]),
)
def test_the_likeliest_come_best_first_and_equal_ones_by_id(
    sizes: tuple[int, int], seed: int, scale: float
) -> None:
    n_vocab, num = sizes
    logits = (random_logits(seed, n_vocab) * scale).round()  # small scales make many equal
    values, ids = nanollama.likeliest(logits, num)
    order = np.argsort(-logits, kind="stable")
    assert np.array_equal(values, logits[order[:num]])
    assert np.array_equal(ids, order[:num])


@given(st.lists(st.integers(0, 199), min_size=1, max_size=80), st.data())
def test_a_history_read_bit_by_bit_is_penalized_like_one_read_at_once(
    history: list[int], data: st.DataObject
) -> None:
    logits, params = random_logits(8), SamplingParams(repeat_penalty=1.3)
    seen, length = nanollama.DistinctTokens(), 0
    while length < len(history):
        length = data.draw(st.integers(length + 1, len(history)))
        found = nanollama.penalize(logits, params, history[:length], 1, seen)
        assert np.array_equal(found, penalized(logits, params, history[:length]))
        assert sorted(seen.ids.tolist()) == sorted(set(history[:length]))


# ---- penalties -----------------------------------------------------------------------------------


def test_the_repetition_penalty_is_transformers() -> None:
    logits, history = random_logits(0), [3, 3, 9, 150, 42, 9]
    for penalty in (1.3, 0.7):
        params = SamplingParams(**{**PLAIN, "repeat_penalty": penalty})
        both = torch.tensor([history]), torch.from_numpy(logits)[None]
        theirs = RepetitionPenaltyLogitsProcessor(penalty)(*both)
        assert np.array_equal(nanollama.penalize(logits, params, history, 2), theirs[0].numpy())


def test_repeat_last_n_bounds_what_the_penalty_sees() -> None:
    logits, history = random_logits(1), [3, 9, 150, 42]
    for last_n, seen in ((-1, history), (2, [150, 42]), (0, []), (99, history)):
        params = SamplingParams(**{**PLAIN, "repeat_penalty": 2.0, "repeat_last_n": last_n})
        changed = nanollama.penalize(logits, params, history, 1) != logits
        assert changed.nonzero()[0].tolist() == sorted(seen)


def test_presence_and_frequency_penalties_count_the_answer_only() -> None:
    logits, history = random_logits(2), [7, 7, 8, 1, 1, 1, 2]
    params = SamplingParams(**PLAIN, presence_penalty=0.5, frequency_penalty=0.25)
    expected = logits.copy()
    expected[1] -= 0.5 + 3 * 0.25
    expected[2] -= 0.5 + 0.25
    assert np.allclose(nanollama.penalize(logits, params, history, 3), expected)
    assert np.array_equal(nanollama.penalize(logits, params, history, len(history)), logits)


def test_penalties_never_change_the_row_they_are_given() -> None:
    logits = random_logits(4)
    before = logits.copy()
    params = SamplingParams(
        repeat_penalty=2, presence_penalty=1, frequency_penalty=1, logit_bias={0: 9.0}
    )
    nanollama.sample(logits, params, 0, [1, 2, 3], 1)
    assert np.array_equal(logits, before)


def test_logit_bias_forces_and_bans() -> None:
    logits = random_logits(5)
    best = int(logits.argmax())
    forced = SamplingParams(**PLAIN, logit_bias={17: 100.0})
    assert set(draws(logits, forced, 50)) == {17}
    banned = SamplingParams(**PLAIN, logit_bias={best: -100.0})
    assert best not in set(draws(logits, banned, 300))


# ---- randomness ----------------------------------------------------------------------------------


def splitmix64(state: int, num: int) -> int:
    """Output number `num` of the generator, as its authors' C code has it, on wrapping uint64."""
    with np.errstate(over="ignore"):
        z = np.uint64(state % 2**64) + np.uint64((num + 1) % 2**64) * np.uint64(0x9E3779B97F4A7C15)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return int(z ^ (z >> np.uint64(31)))


def test_the_generator_is_splitmix64() -> None:
    # the first outputs for state 1234567, published with Java's and Rosetta Code's versions
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert [splitmix64(1234567, n) for n in range(3)] == published


@settings(deadline=None)
@given(st.integers(-(2**63), 2**64 - 1), st.integers(0, 2**31))
def test_uniform_is_splitmix64_in_the_unit_interval(seed: int, position: int) -> None:
    u = nanollama.uniform(seed, position)
    assert 0 <= u < 1
    assert u == (splitmix64(splitmix64(0, seed), position) >> 11) / 2**53


def test_uniform_gives_the_same_numbers_for_ever() -> None:
    """A change here changes every seeded answer: not without a new major version."""
    pairs = ((0, 0), (42, 7), (-1, 1), (2**64 - 1, 1))
    known = [0.6524484863740322, 0.5273463677060787, 0.43152799704850997, 0.43152799704850997]
    assert [nanollama.uniform(*pair) for pair in pairs] == known


def test_uniform_is_spread_evenly_over_seeds_and_positions() -> None:
    for pairs in (
        [(seed, 10) for seed in range(20000)],
        [(1, position) for position in range(20000)],
        [(n, n) for n in range(20000)],
        [(n, 20000 - n) for n in range(20000)],
    ):
        numbers = np.array([nanollama.uniform(*pair) for pair in pairs])
        counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
        chi2 = ((counts - 400) ** 2 / 400).sum()  # 49 degrees of freedom
        assert chi2 < 49 + 5 * math.sqrt(98)
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.03
        assert len(np.unique(numbers)) == 20000


def test_a_draw_depends_on_seed_and_position_alone() -> None:
    logits = random_logits(6)
    params = SamplingParams(**PLAIN)
    first = nanollama.sample(logits, params, 123, [1, 2, 3], 1)
    for _ in range(3):
        torch.manual_seed(0)
        assert nanollama.sample(logits, params, 123, [9, 9, 9], 2) == first
    assert len(set(draws(logits, params, 50))) > 5
    assert len({nanollama.sample(logits, params, 1, [0] * n, 1) for n in range(1, 50)}) > 5


# ---- log-probabilities ---------------------------------------------------------------------------


def test_logprobs_are_those_of_the_raw_distribution_best_first() -> None:
    logits = random_logits(7)
    expected = logits.astype(np.float64)
    expected -= np.log(np.exp(expected).sum())
    found = nanollama.token_logprobs(logits, 11, 5)
    assert found.logprob == pytest.approx(expected[11], abs=1e-5)
    assert [i for i, _ in found.top] == np.argsort(-expected)[:5].tolist()
    assert [p for _, p in found.top] == pytest.approx(sorted(expected)[:-6:-1], abs=1e-5)
    assert nanollama.token_logprobs(logits, 11, 0).top == ()
    best = nanollama.token_logprobs(logits, int(logits.argmax()), 5)
    assert best.logprob == best.top[0][1]  # which is how clients see that a token was the best
    assert len(nanollama.token_logprobs(logits[:3], 1, 20).top) == 3


# ---- validation ----------------------------------------------------------------------------------

NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [-0.1, 100.1, NAN, INF, -INF, "1", None, True, [1]]),
        ("top_k", [-2, 2**31 + 1, 1.5, "5", None, True]),
        ("top_p", [-0.1, 1.1, NAN, INF, "x", None, False]),
        ("min_p", [-0.1, 1.1, NAN, INF, "x", None, False]),
        ("repeat_penalty", [0, -1, 101, NAN, INF, "x", None, True]),
        ("repeat_last_n", [-2, 1.5, NAN, "x", None, True]),
        ("presence_penalty", [-2.1, 2.1, NAN, "x", None]),
        ("frequency_penalty", [-2.1, 2.1, NAN, "x", None]),
        ("seed", [-(2**63) - 1, 2**64, 1.5, NAN, "x", True]),
        ("max_tokens", [-1, 2**31 + 1, 1.5, INF, "x", True]),
        ("logprobs", [-1, 21, 1.5, "x", True]),
        ("stop", ["text", ("",), [1], (None,), None, 5, {"a"}]),
        ("logit_bias", [{-1: 0}, {0: 101}, {0: NAN}, {"0": 1}, {1.5: 1}, {0: "x"}, [1], None]),
        ("ignore_eos", ["yes", 1, None]),
        ("prompt_logprobs", ["yes", 1, None]),
    ],
)
def test_a_value_that_makes_no_sense_is_refused_by_name(field: str, values: list[Any]) -> None:
    for value in values:
        with pytest.raises(RequestError, match=f"^{field} ") as caught:
            SamplingParams(**{field: value})
        assert caught.value.param == field
        assert "\n" not in str(caught.value)


def test_the_edges_of_every_range_are_allowed() -> None:
    for field, values in {
        "temperature": [0, 0.0, 100],
        "top_k": [0, 1, 10**6],
        "top_p": [0, 1, 0.5],
        "min_p": [0, 1],
        "repeat_penalty": [0.01, 1, 100],
        "repeat_last_n": [-1, 0, 64],
        "presence_penalty": [-2, 2],
        "frequency_penalty": [-2, 2],
        "seed": [None, -(2**63), 2**64 - 1, 0],
        "max_tokens": [None, 0, 1, 2**31],
        "logprobs": [None, 0, 20],
        "stop": [(), ("a", "b"), ["a"]],
        "logit_bias": [{}, {0: -100, 5: 100.0}],
    }.items():
        for value in values:
            assert getattr(SamplingParams(**{field: value}), field) == value


def test_the_defaults_are_those_of_the_reference() -> None:
    params = SamplingParams()
    assert (params.temperature, params.top_k, params.top_p) == (0.7, 50, 0.9)
    assert (params.repeat_penalty, params.max_tokens) == (1.1, 200)
