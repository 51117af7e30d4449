"""Section 11: a row never depends on its neighbours; scheduling, cancelling, ends, errors."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nanollama
from nanollama import (
    LLM,
    ContextLengthError,
    Delta,
    GenerationRequest,
    RequestError,
    SamplingParams,
    Scheduler,
    TextStream,
)

GREEDY: dict[str, Any] = {"temperature": 0.0, "repeat_penalty": 1.0, "ignore_eos": True}


def prompt(seed: int, length: int, n_vocab: int = 320) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, n_vocab) for _ in range(length)]


def request(ids: list[int], **params: Any) -> GenerationRequest:
    return GenerationRequest(ids, params=SamplingParams(**{"ignore_eos": True, **params}))


def mixed_requests(num_tokens: int = 10, n_vocab: int = 320) -> list[GenerationRequest]:
    """Short and long prompts, each with parameters of its own; two share a long beginning."""
    base = prompt(0, 70, n_vocab)
    kinds: list[tuple[list[int], dict[str, Any]]] = [
        (prompt(1, 1, n_vocab), {"temperature": 0.0}),
        (prompt(2, 2, n_vocab), {"seed": 1, "top_k": 0, "top_p": 1.0, "temperature": 1.3}),
        (prompt(3, 7, n_vocab), {"seed": 2, "presence_penalty": 1.0, "frequency_penalty": 0.5}),
        (base, {"seed": 3, "min_p": 0.05, "repeat_penalty": 1.5}),
        (base + prompt(4, 33, n_vocab), {"seed": 4, "max_tokens": num_tokens // 2}),
        (prompt(5, 41, n_vocab), {"seed": 5, "logit_bias": {9: 3.0}, "repeat_last_n": 4}),
    ]
    return [request(ids, **{"max_tokens": num_tokens, **params}) for ids, params in kinds]


Rows = dict[tuple[int, ...], torch.Tensor]


@dataclasses.dataclass
class Answer:
    token_ids: list[int] = dataclasses.field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None


def fold(deltas: Iterator[Delta], num: int) -> list[Answer]:
    answers = [Answer() for _ in range(num)]
    for delta in deltas:
        answer = answers[delta.index]
        assert answer.finish_reason is None, "nothing comes after the end"
        if delta.token_id is not None:
            answer.token_ids.append(delta.token_id)
        answer.text += delta.text
        answer.finish_reason = delta.finish_reason
    return answers


def run(llm: LLM, requests: list[GenerationRequest]) -> list[Answer]:
    return fold(llm.stream(requests), len(requests))


def alone(llm: LLM, requests: list[GenerationRequest]) -> list[Answer]:
    """Each request by itself, with nothing in the cache."""
    answers = []
    for one in requests:
        llm.engine.forget()
        answers += run(llm, [one])
    llm.engine.forget()
    return answers


@pytest.fixture
def rows(monkeypatch: pytest.MonkeyPatch) -> Rows:
    """The logits that every token was sampled from, by history."""
    seen: Rows = {}
    sample = nanollama.sample

    def spy(logits: np.ndarray, params: Any, seed: int, history: list[int], *rest: Any) -> int:
        seen[tuple(history)] = torch.tensor(logits)
        return sample(logits, params, seed, history, *rest)

    monkeypatch.setattr(nanollama, "sample", spy)
    return seen


def assert_same_rows(rows: Rows, before: Rows) -> None:
    """Bit for bit."""
    assert rows.keys() == before.keys()
    for history, logits in rows.items():
        assert torch.equal(logits, before[history]), len(history)


# ---- a row never depends on its neighbours -------------------------------------------------------

VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama": ("Llama", {}, {}),
    "llama, wider": ("Llama", {"hidden_size": 192, "intermediate_size": 512}, {}),
    "mistral, window": ("Mistral", {"sliding_window": 16}, {}),
    "qwen2": ("Qwen2", {}, {}),
    "qwen3": ("Qwen3", {"head_dim": 32}, {}),
    "bfloat16": ("Llama", {}, {"dtype": "bfloat16"}),
    "float16": ("Llama", {}, {"dtype": "float16"}),
    "q8": ("Llama", {}, {"quantize": "q8"}),
    "q4": ("Llama", {}, {"quantize": "q4"}),
    "q4, bfloat16": ("Llama", {}, {"quantize": "q4", "dtype": "bfloat16"}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_batch_of_n_equals_n_single_runs_bit_for_bit(
    variant: str, tiny: Callable[..., Path], rows: Rows
) -> None:
    name, config, options = VARIANTS[variant]
    llm = LLM(tiny(name, **config), parallel=8, **options)
    requests = mixed_requests()
    expected = alone(llm, requests)
    before = dict(rows)
    rows.clear()
    assert run(llm, requests) == expected  # cold, all together
    assert_same_rows(rows, before)
    rows.clear()
    assert run(llm, requests[::-1]) == expected[::-1]  # warm, in another order
    assert_same_rows(rows, before)


@pytest.mark.parametrize("options", [{"prefill_chunk": 1}, {"prefill_chunk": 7}, {"parallel": 1}])
def test_chunks_and_slots_change_nothing(
    options: dict[str, int], tiny: Callable[..., Path], rows: Rows
) -> None:
    requests = mixed_requests()
    expected = alone(LLM(tiny("Llama"), parallel=8), requests)
    before = dict(rows)
    rows.clear()
    llm = LLM(tiny("Llama"), **{"parallel": 3, **options})
    assert run(llm, requests) == expected
    assert_same_rows(rows, before)


def test_threads_change_nothing_within_a_run(tiny: Callable[..., Path], rows: Rows) -> None:
    llm = LLM(tiny("Llama", hidden_size=192, intermediate_size=512), parallel=8)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        expected = alone(llm, mixed_requests())
        before = dict(rows)
        rows.clear()
        assert run(llm, mixed_requests()) == expected
        assert_same_rows(rows, before)
    finally:
        torch.set_num_threads(num_threads)


def test_a_real_packed_model_answers_the_same_alone_and_together(
    smollm2_llm: LLM, rows: Rows
) -> None:
    requests = mixed_requests(num_tokens=3, n_vocab=49152)[:4]
    expected = alone(smollm2_llm, requests)
    before = dict(rows)
    rows.clear()
    assert run(smollm2_llm, requests) == expected
    assert_same_rows(rows, before)


def test_the_same_seed_gives_the_same_text_and_another_seed_another(tiny_llm: LLM) -> None:
    ids = prompt(7, 12)
    seeded = [request(ids, seed=s, temperature=1.5, max_tokens=20) for s in (1, 1, 2, -1)]
    answers = run(tiny_llm, seeded)
    assert answers[0] == answers[1]
    assert len({answer.text for answer in answers}) == 3
    unseeded = [request(ids, temperature=1.5, max_tokens=20) for _ in range(4)]
    assert len({answer.text for answer in run(tiny_llm, unseeded)}) == 4


def test_a_cached_decode_equals_a_full_forward_token_by_token(tiny_llm: LLM, rows: Rows) -> None:
    ids = prompt(8, 30)
    answer = tiny_llm.complete(request(ids, temperature=0.0, max_tokens=12))
    logits = tiny_llm.logits(ids + answer.token_ids)
    for i, token_id in enumerate(answer.token_ids):
        history = ids + answer.token_ids[:i]
        torch.testing.assert_close(rows[tuple(history)], logits[len(history) - 1])
        penalised = nanollama.penalize(
            logits[len(history) - 1].numpy(), SamplingParams(), history, len(ids)
        )
        assert int(penalised.argmax()) == token_id


@pytest.mark.parametrize("changes", [{"temperature": 0.0}, {}, {"top_k": 0}], ids=str)
@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_model_that_computes_no_numbers_ends_the_answer_with_an_error(
    tiny: Callable[..., Path], weight: float, changes: dict[str, Any]
) -> None:
    llm = LLM(tiny("Llama"))
    decoder = llm.engine.decoder
    fine, decoder.norm = decoder.norm, copy.copy(decoder.norm)
    decoder.norm.weight = torch.full((64,), weight)
    with pytest.raises(nanollama.LogitsError, match="largest logit is nan: its weights are dam"):
        llm.complete(request([5, 6], **changes))
    with pytest.raises(nanollama.LogitsError, match="log-probability is nan"):
        list(llm.score([([5, 6, 7], 1)]))
    with pytest.raises(nanollama.LogitsError, match="embedding is nan"):
        llm.embed([[5, 6, 7]])
    decoder.norm = fine
    assert idle(llm)
    assert llm.complete(request([5, 6], max_tokens=3)).usage.completion_tokens == 3


# ---- cancelling, leaving, interleaving -----------------------------------------------------------


def idle(llm: LLM) -> bool:
    scheduler = llm.engine.scheduler
    num_slots = len(scheduler.contents)
    return not llm.engine.has_work and sorted(scheduler.free) == list(range(num_slots))


def test_cancelling_one_leaves_the_others_unchanged(tiny: Callable[..., Path]) -> None:
    llm = LLM(tiny("Llama"), parallel=3)
    requests = mixed_requests()
    expected = alone(llm, requests)
    for step_of_end in (0, 1, 4):
        sequences = [llm.start(one, i) for i, one in enumerate(requests)]
        for _ in range(step_of_end):
            llm.engine.step()
        llm.engine.cancel(sequences[2])
        llm.engine.cancel(sequences[3])
        while llm.engine.has_work:
            llm.engine.step()
        assert sequences[2].finish_reason == "cancelled"
        for i in (0, 1, 4, 5):
            assert fold(iter(sequences[i].take()), len(requests))[i] == expected[i]
        assert idle(llm)


def test_leaving_a_stream_early_frees_its_slots(tiny: Callable[..., Path]) -> None:
    llm = LLM(tiny("Llama"), parallel=2)
    expected = alone(llm, mixed_requests())
    stream = llm.stream(mixed_requests())
    next(stream)
    assert llm.engine.has_work
    stream.close()
    assert idle(llm)
    assert run(llm, mixed_requests()) == expected


def test_an_exception_in_the_loop_frees_the_slots(tiny_llm: LLM) -> None:
    def loop() -> None:
        for _ in tiny_llm.stream(mixed_requests()):
            raise KeyError("mine")

    with pytest.raises(KeyError):
        loop()
    assert idle(tiny_llm)


@pytest.mark.parametrize("order", ["", "aab" * 60, "abb" * 60, "b" * 99, "a" + "b" * 99])
def test_two_streams_at_once_neither_lose_nor_mix_deltas(
    order: str, tiny: Callable[..., Path]
) -> None:
    llm = LLM(tiny("Llama"), parallel=3)
    requests = mixed_requests()
    expected = alone(llm, requests)
    streams = {"a": llm.stream(requests[:3]), "b": llm.stream(requests[3:])}
    taken: dict[str, list[Delta]] = {"a": [], "b": []}
    for name in order + "ab" * 60:
        taken[name] += [delta for delta in [next(streams[name], None)] if delta is not None]
    assert fold(iter(taken["a"]), 3) == expected[:3]
    assert fold(iter(taken["b"]), 3) == expected[3:]
    assert idle(llm)


def test_an_answer_completes_inside_another_ones_stream(tiny_llm: LLM) -> None:
    requests = mixed_requests()
    expected = alone(tiny_llm, requests)
    deltas = []
    for delta in tiny_llm.stream(requests[3]):
        deltas.append(delta)
        assert tiny_llm.complete(requests[1]).text == expected[1].text
    assert fold(iter(deltas), 1) == [expected[3]]


def test_more_requests_than_slots_all_finish(tiny: Callable[..., Path]) -> None:
    llm = LLM(tiny("Llama"), parallel=2)
    requests = [request(prompt(i, 3 + i), seed=i, max_tokens=1 + i % 5) for i in range(11)]
    answers = run(llm, requests)
    assert [len(answer.token_ids) for answer in answers] == [1 + i % 5 for i in range(11)]
    assert answers == alone(llm, requests)
    assert idle(llm)


@pytest.mark.parametrize("where", ["start", "reserve", "attend"])
def test_an_interrupted_step_leaves_no_damage(
    where: str, tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(tiny("Llama"), parallel=4, kernels="torch")  # whose steps all call the cache
    ids = prompt(9, 60)
    first, second = (request([*ids, 5], **GREEDY), request([*ids, 6], max_tokens=4))
    expected = alone(llm, [dataclasses.replace(second, params=SamplingParams(**GREEDY))])
    running = llm.stream(first)
    next(running)

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(llm.engine.cache, where, interrupt)
        with pytest.raises(KeyboardInterrupt):
            list(llm.stream(second))
    again = dataclasses.replace(second, params=SamplingParams(**GREEDY))
    assert run(llm, [again]) == expected
    assert running.close() is None
    assert idle(llm)


# ---- prefixes ------------------------------------------------------------------------------------


def test_the_second_turn_computes_only_what_is_new(smollm2_llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=4)
    messages = [{"role": "user", "content": "Say hello to the second turn of this test."}]
    first = smollm2_llm.complete(GenerationRequest(messages=messages, params=params))
    messages += [
        {"role": "assistant", "content": first.text},
        {"role": "user", "content": "Again."},
    ]
    before = dataclasses.replace(smollm2_llm.engine.stats)
    second = smollm2_llm.complete(GenerationRequest(messages=messages, params=params))
    known = first.usage.prompt_tokens + first.usage.completion_tokens - 1
    assert second.usage.cached_tokens == known
    done = smollm2_llm.engine.stats.since(before)
    assert done.prefill_tokens == second.usage.prompt_tokens - known
    assert done.decode_tokens == second.usage.completion_tokens - 1


def test_a_repeated_prompt_computes_its_last_token_only(tiny_llm: LLM) -> None:
    tiny_llm.engine.forget()
    one = request(prompt(11, 50), max_tokens=3)
    assert tiny_llm.complete(one).usage.cached_tokens == 0
    assert tiny_llm.complete(one).usage.cached_tokens == 49


def test_a_shared_prefix_is_copied_from_a_running_sequence(tiny: Callable[..., Path]) -> None:
    llm = LLM(tiny("Llama"), parallel=4)
    ids = prompt(12, 90)
    expected = alone(llm, [request([*ids, i], seed=i, max_tokens=8) for i in range(4, 8)])
    before = dataclasses.replace(llm.engine.stats)
    assert run(llm, [request([*ids, i], seed=i, max_tokens=8) for i in range(4, 8)]) == expected
    assert llm.engine.stats.since(before).prefill_tokens <= 91 + 3  # the prefix, once


def test_two_conversations_keep_their_prefixes_apart(tiny: Callable[..., Path]) -> None:
    llm = LLM(tiny("Llama"), parallel=2)
    a, b = prompt(13, 40), prompt(14, 40)
    for turn in range(3):
        for ids in (a, b):
            answer = llm.complete(request(ids, max_tokens=5, seed=turn))
            if turn:
                assert answer.usage.cached_tokens >= 40
            ids += [*answer.token_ids, 17]


# ---- where an answer ends ------------------------------------------------------------------------


def test_every_end_id_ends_an_answer_unless_ignored(tiny_llm: LLM) -> None:
    end_ids = tiny_llm.tokenizer.end_ids
    assert len(end_ids) == 2  # </s> and <|im_end|>
    for end_id in end_ids:
        forced = {"logit_bias": {end_id: 100.0}, "max_tokens": 3}
        answer = tiny_llm.complete(request([5, 6], ignore_eos=False, **forced))
        assert (answer.finish_reason, answer.text) == ("stop", "")
        assert answer.usage.completion_tokens == 1
        ignored = tiny_llm.complete(request([5, 6], ignore_eos=True, **forced))
        assert (ignored.finish_reason, ignored.token_ids) == ("length", [end_id] * 3)


def test_an_answer_ends_at_max_tokens(tiny_llm: LLM) -> None:
    for num in (1, 2, 9):
        answer = tiny_llm.complete(request([5, 6], max_tokens=num))
        assert answer.finish_reason == "length"
        assert len(answer.token_ids) == answer.usage.completion_tokens == num


def test_without_a_limit_an_answer_runs_to_the_end_of_the_context(
    tiny: Callable[..., Path],
) -> None:
    llm = LLM(tiny("Llama"), ctx=48)
    for length in (1, 20, 47):
        answer = llm.complete(request(prompt(15, length), max_tokens=None))
        assert answer.finish_reason == "length"
        assert answer.usage.completion_tokens == 48 - length


def test_a_stop_string_cuts_the_text_exactly(tiny_llm: LLM) -> None:
    params = {"seed": 3, "temperature": 1.0, "max_tokens": 60}
    whole = tiny_llm.complete(request(prompt(16, 9), **params))
    for start in range(0, len(whole.text) - 4, 7):
        stop = whole.text[start : start + 4]
        answer = tiny_llm.complete(request(prompt(16, 9), stop=("\0never", stop), **params))
        assert answer.text == whole.text[: whole.text.find(stop)]
        assert answer.finish_reason == "stop"
        assert answer.token_ids == whole.token_ids[: len(answer.token_ids)]
        assert idle(tiny_llm)


def test_held_back_text_comes_out_at_the_end(tiny_llm: LLM) -> None:
    params = {"seed": 3, "temperature": 1.0, "max_tokens": 20}
    whole = tiny_llm.complete(request(prompt(16, 9), **params)).text
    answer = tiny_llm.complete(request(prompt(16, 9), stop=(whole[-3:] + "#never#",), **params))
    assert answer.text == whole
    assert answer.finish_reason == "length"


# ---- what cannot be run --------------------------------------------------------------------------


def test_a_prompt_over_the_context_names_both_counts(tiny: Callable[..., Path]) -> None:
    llm = LLM(tiny("Llama"), ctx=40)
    for length in (40, 41, 300):
        with pytest.raises(ContextLengthError, match=rf"{length} tokens .* holds 40\b.*--ctx"):
            llm.complete(request(prompt(17, length)))
    assert ContextLengthError.code == "context_length_exceeded"
    assert idle(llm)


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (GenerationRequest([]), "the prompt is empty"),
        (GenerationRequest(""), "the prompt is empty"),
        (GenerationRequest([5, 320]), "token id 320 is outside the vocabulary of 320"),
        (GenerationRequest([-1]), "token id -1 is outside"),
        (GenerationRequest([1.5]), "a prompt is .*1.5.*; it must be text or ids"),  # type: ignore
        (GenerationRequest(["a"]), "it must be text or ids"),  # type: ignore[list-item]
        (GenerationRequest(7), "it must be text or ids"),  # type: ignore[arg-type]
        (GenerationRequest([5], params=SamplingParams(logit_bias={320: 1})), "token id 320"),
        (GenerationRequest("a\udc80"), "surrogate"),
        (GenerationRequest(messages=[]), "no messages"),
        (GenerationRequest(messages=[{"text": "hi"}]), "an object with a role"),
    ],
)
def test_a_bad_request_is_refused_and_leaves_the_others_alone(
    bad: GenerationRequest, message: str, tiny_llm: LLM
) -> None:
    with pytest.raises(RequestError, match=message):
        list(tiny_llm.stream([request([5, 6]), bad]))
    assert idle(tiny_llm)
    good = [request([5, 6], seed=1, max_tokens=4), request([7], seed=2, max_tokens=6)]
    expected = alone(tiny_llm, good)
    deltas = list(tiny_llm.stream([good[0], bad, good[1]], raise_errors=False))
    failed = [delta for delta in deltas if delta.index == 1]
    assert [delta.finish_reason for delta in failed] == ["error"]
    assert isinstance(failed[0].error, RequestError)
    answers = fold(iter(deltas), 3)
    assert [answers[0], answers[2]] == expected


def test_a_refused_bias_names_its_field(tiny_llm: LLM) -> None:
    with pytest.raises(RequestError) as caught:
        tiny_llm.complete(request([5], logit_bias={400: 1.0}))
    assert caught.value.param == "logit_bias"


# ---- numbers -------------------------------------------------------------------------------------


def test_usage_and_statistics_add_up(tiny: Callable[..., Path]) -> None:
    llm = LLM(tiny("Llama"), parallel=4, prefill_chunk=16)
    requests = mixed_requests()
    last = [delta for delta in llm.stream(requests) if delta.finish_reason]
    usages = {delta.index: delta.usage for delta in last}
    for i, one in enumerate(requests):
        usage = usages[i]
        assert usage is not None
        assert usage.prompt_tokens == len(one.prompt or "")
        assert usage.completion_tokens == one.params.max_tokens
        assert 0 <= usage.cached_tokens < usage.prompt_tokens
        assert usage.prefill_s >= 0
        assert usage.decode_s >= 0
    stats = llm.engine.stats
    total = sum(u.prompt_tokens - u.cached_tokens for u in usages.values() if u)
    assert stats.prefill_tokens == total
    assert stats.decode_tokens == sum(u.completion_tokens - 1 for u in usages.values() if u)
    assert stats.prefill_s > 0
    assert stats.decode_s > 0


def test_logprobs_come_with_every_token_and_prompt_logprobs_with_every_other(tiny_llm: LLM) -> None:
    tiny_llm.engine.forget()
    ids = prompt(18, 40)
    params = SamplingParams(temperature=0, logprobs=3, prompt_logprobs=True, max_tokens=5)
    seq = tiny_llm.start(GenerationRequest(ids, params=params))
    while tiny_llm.engine.has_work:
        tiny_llm.engine.step()
    deltas = seq.take()
    expected = tiny_llm.logits(seq.token_ids).log_softmax(-1)
    assert len(seq.prompt_logprobs) == len(ids) - 1
    for i, found in enumerate([*seq.prompt_logprobs, *(d.logprobs for d in deltas)]):
        assert found is not None
        assert found.logprob == pytest.approx(float(expected[i, seq.token_ids[i + 1]]), abs=1e-4)
        values, best = expected[i].topk(3)
        assert [token_id for token_id, _ in found.top] == best.tolist()
        assert [value for _, value in found.top] == pytest.approx(values.tolist(), abs=1e-4)


# ---- the scheduler, without a model --------------------------------------------------------------


class Simulation:
    """Drives a Scheduler as the engine does. A strip is the list of tokens written to it."""

    def __init__(self, num_slots: int, prefill_chunk: int) -> None:
        self.scheduler = Scheduler(num_slots, prefill_chunk, 0, lambda slot, num, length: num)
        self.strips: list[list[int]] = [[] for _ in range(num_slots)]
        self.finished: list[nanollama.Sequence] = []

    def add(self, ids: list[int], max_tokens: int) -> nanollama.Sequence:
        params = SamplingParams(max_tokens=max_tokens)
        seq = nanollama.Sequence(0, list(ids), params, TextStream.__new__(TextStream))
        self.scheduler.waiting.append(seq)
        return seq

    def check(self) -> None:
        scheduler = self.scheduler
        used = [seq.slot for seq in scheduler.running]
        assert sorted(used + scheduler.free) == list(range(len(self.strips)))
        for seq in scheduler.running:
            assert self.strips[seq.slot][: seq.num_computed] == seq.token_ids[: seq.num_computed]
            assert seq.num_computed < len(seq.token_ids)
        for slot in scheduler.free:
            contents = scheduler.contents[slot]
            assert self.strips[slot][: len(contents)] == contents

    def step(self) -> int:
        scheduler = self.scheduler
        while admitted := scheduler.admit():
            seq, source = admitted
            if seq.num_cached and source != seq.slot:
                self.strips[seq.slot] = self.strips[source][: seq.num_cached]
            seq.num_computed = seq.num_cached
            assert seq.num_cached < seq.num_prompt
            self.check()
        work = scheduler.schedule()
        assert sum(n for _, n in work if n > 1) <= scheduler.prefill_chunk
        assert len({seq.slot for seq, _ in work}) == len(work)
        assert work or not scheduler.running
        for seq, num_new in work:
            assert num_new >= 1
            new = seq.token_ids[seq.num_computed :][:num_new]
            self.strips[seq.slot] = self.strips[seq.slot][: seq.num_computed] + new
            seq.num_computed += num_new
            if seq.num_computed == len(seq.token_ids):
                seq.token_ids.append(len(seq.token_ids) % 3)
                if seq.num_generated == seq.params.max_tokens:
                    seq.finish_reason = "length"
                    scheduler.retire(seq)
                    self.finished.append(seq)
        self.check()
        return len(work)


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 4),
    st.integers(1, 40),
    st.lists(
        st.one_of(
            st.tuples(st.lists(st.integers(0, 2), min_size=1, max_size=90), st.integers(1, 5)),
            st.integers(0, 5),  # cancel one of those that are there
            st.none(),  # a step
        ),
        max_size=25,
    ),
)
def test_no_slot_is_leaked_or_used_twice_and_every_sequence_finishes(
    num_slots: int, prefill_chunk: int, events: list[Any]
) -> None:
    simulation = Simulation(num_slots, prefill_chunk)
    scheduler, added, cancelled = simulation.scheduler, 0, 0
    for event in events:
        present = [*scheduler.running, *scheduler.waiting]
        if event is None:
            simulation.step()
        elif isinstance(event, int):
            if present:
                scheduler.retire(present[event % len(present)])
                cancelled += 1
        else:
            simulation.add(*event)
            added += 1
        simulation.check()
    for _ in range(3000):
        if not (scheduler.running or scheduler.waiting):
            break
        simulation.step()
    assert len(simulation.finished) + cancelled == added
    assert sorted(scheduler.free) == list(range(num_slots))


def test_prompts_share_a_chunk_in_order_and_decoding_never_waits() -> None:
    simulation = Simulation(num_slots=4, prefill_chunk=10)
    decoding = simulation.add([9], 50)
    simulation.step()
    long, short = simulation.add([1] * 25, 1), simulation.add([2] * 4, 1)
    simulation.step()
    assert (decoding.num_generated, long.num_computed, short.num_computed) == (2, 10, 0)
    simulation.step()
    simulation.step()
    assert long in simulation.finished  # 10 + 10 + 5, and what is left of the chunk
    assert short in simulation.finished
    assert decoding.num_generated == 4


def test_a_retired_sequence_can_be_retired_again() -> None:
    simulation = Simulation(2, 8)
    seq = simulation.add([1, 2, 3], 5)
    simulation.step()
    for _ in range(2):
        simulation.scheduler.retire(seq)
        assert sorted(simulation.scheduler.free) == [0, 1]


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)))
def test_common_prefix_is_as_long_as_it_can_be(a: list[int], b: list[int]) -> None:
    n = nanollama.common_prefix(a, b)
    assert a[:n] == b[:n]
    assert n == min(len(a), len(b)) or a[n] != b[n]
