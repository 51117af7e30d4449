"""Recorded decode steps on native kernels: the same bits as steps made in Python."""

from __future__ import annotations

import functools
import gc
import itertools
import operator
import weakref
from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch
from families import ALL

from nanollama import LLM, Batch, GenerationRequest, KernelError, SamplingParams
from nanollama_extras.kernels.native import KernelCalls, find_compiler, load_kernels
from nanollama_extras.kernels.recorded import Arena, DecodeCalls

try:
    find_compiler()
except KernelError:
    pytest.skip("there is no C compiler", allow_module_level=True)

CPU = torch.device("cpu")
OPTIONS: dict[str, dict[str, Any]] = {
    "llama": {"quantize": "q4"},
    "qwen2": {"prefill_chunk": 16},
    "qwen3": {"kv_dtype": "float32"},
    "mistral": {"kv_dtype": "q8", "prefill_chunk": 16},
}


INDEX = torch.tensor([0, 2])
COMPUTES: dict[str, Callable[[torch.Tensor], Any]] = {
    "add": lambda x: x + 1,
    "mul_": lambda x: x[1:].mul_(2),
    "__setitem__": lambda x: operator.setitem(x, 0, 1.0),
    "__getitem__": lambda x: x[INDEX],
    "half": lambda x: x.half(),
    "item": lambda x: x[0].item(),
    "numpy": lambda x: x.numpy(),
    "pad": lambda x: torch.nn.functional.pad(x, (0, 1)),
    "zeros": lambda x: torch.zeros(3),
}


# for no kernel: widths that are no multiples of 16, biases, experts narrower than the model
ODD = ["qwen3_5-odd-widths", "glm4_moe_lite-odd-widths", "olmo_hybrid-nope", "nemotron_h-biased"]
ODD += ["nemotron_h-latent"]
RECORDED = [kind for kind in ALL if kind not in ODD]
FLOATS = "llama qwen2_moe gpt_oss deepseek_v3 gemma3n_text qwen3_next nemotron_h lfm2".split()
AS_FLOATS = [pytest.param(kind, {"quantize": None}, id=f"{kind}-floats") for kind in FLOATS]
CASES = [*(pytest.param(kind, {}, id=kind) for kind in RECORDED), *AS_FLOATS]


def load(kind: str, tiny: oracle.Tiny, parallel: int = 3, **others: Any) -> LLM:
    name, overrides = ALL[kind]
    options = {"quantize": "q8", **OPTIONS.get(kind, {}), **others}
    return LLM(tiny(name, **overrides), kernels="native", parallel=parallel, **options)


def requests() -> list[GenerationRequest]:
    """Prompts of several lengths, with answers of several lengths."""
    params = [SamplingParams(seed=i, max_tokens=4 + 3 * i, ignore_eos=True) for i in range(5)]
    prompts = [oracle.random_ids(3 + 9 * i, seed=i) for i in range(5)]
    return [GenerationRequest(ids, params=p) for ids, p in zip(prompts, params)]


def answers(llm: LLM) -> list[list[tuple[int, Any]]]:
    """Token ids and their log-probabilities."""
    found: list[list[tuple[int, Any]]] = [[] for _ in requests()]
    llm.engine.forget()
    for delta in llm.stream(requests()):
        if delta.token_id is not None:
            found[delta.index].append((delta.token_id, delta.logprobs))
    return found


@pytest.mark.parametrize(("kind", "others"), CASES)
def test_a_recorded_step_is_the_step_bit_for_bit(
    kind: str, others: dict[str, Any], tiny: oracle.Tiny
) -> None:
    decoder = load(kind, tiny, **others).engine.decoder
    caches = [decoder.new_cache(4, 16) for _ in range(2)]
    with torch.inference_mode():
        steps = DecodeCalls(decoder, caches[0])
        for cache in caches:
            for slot in range(3):
                cache.reserve(slot, 200)
            work = [(slot, 0, [7, 8, 9][: slot + 1], 1) for slot in (2, 0, 1)]
            decoder(Batch(work, CPU, decoder.row_tile), cache)
        lengths = [1, 2, 3]
        for turn in range(110):  # around rings, and past the short context of longrope
            slots = [[2, 0, 1], [0, 1], [2], [1, 2]][turn % 4]
            # a piece of a prompt, all logits of a draft, and single tokens
            sizes = [(5, 1), (3, 2), (1, 1)] if steps.most_new > 1 and turn % 8 == 4 else [(1, 1)]
            work = [
                (slot, lengths[slot], [*range(30 + slot, 30 + slot + num)], num_rows)
                for slot, (num, num_rows) in zip(slots, itertools.cycle(sizes))
            ]
            for slot, _, new, _ in work:
                lengths[slot] += len(new)  # strips move when they grow
                caches[0].strips[slot] = caches[0].strips[slot].clone()
            expected = decoder(Batch(work, CPU, decoder.row_tile), caches[1])
            found = steps(work)
            assert found is not None
            assert torch.equal(found, expected)
    for ours, theirs in zip(caches[0].strips + caches[0].rings, caches[1].strips + caches[1].rings):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize(("kind", "others"), CASES)
def test_answers_are_the_same_without_recorded_steps(
    kind: str, others: dict[str, Any], tiny: oracle.Tiny
) -> None:
    llm = load(kind, tiny, **others)
    recorded = answers(llm)
    llm.engine.decode_steps = None
    assert answers(llm) == recorded


@pytest.mark.parametrize("temperature", [0, 0.8, 3])  # guesses are right, or some, or none
def test_answers_are_the_same_without_steps_ahead(temperature: float, tiny: oracle.Tiny) -> None:
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=90, ignore_eos=True)
    request = GenerationRequest(oracle.random_ids(5), params=params)
    llm, plain = load("llama", tiny, 2, threads=2), load("llama", tiny, 2, threads=2)
    ahead: Any = llm.engine.decode_steps
    ahead, plain.engine.decode_steps = ahead.ahead, None
    expected, begun = plain.complete(request).token_ids, list[Any]()
    for index, _ in enumerate(llm.stream(request)):
        begun += ahead.expected
        if index == 40:
            assert llm.complete(request).token_ids == expected
        if index == 80:
            break  # a step ahead still runs
    assert begun
    assert llm.complete(request).token_ids == expected


def test_a_step_ahead_ends_before_what_it_reads_is_freed(
    tiny: oracle.Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernels, calls = load_kernels(), list[Any]()
    stop, are_there = kernels.stop_ahead, list[bool]()

    def stop_and_look() -> None:
        are_there.append(all(each() is not None for each in calls))
        stop()

    monkeypatch.setattr(kernels, "stop_ahead", stop_and_look)
    llm = load("llama", tiny, 1, threads=2)
    steps: Any = llm.engine.decode_steps
    calls += [weakref.ref(x) for x in (steps.calls, steps.batch, steps.cache, steps.decoder)]
    next(llm.stream(GenerationRequest([1, 2], params=SamplingParams(temperature=0))))
    are_there.clear()
    del llm, steps
    gc.collect()
    assert are_there[:1] == [True]


def test_more_sequences_than_were_recorded_run_all_the_same(
    tiny: oracle.Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = answers(load("qwen3", tiny, 5))
    monkeypatch.setattr(DecodeCalls, "most_sequences", 2)
    few = load("qwen3", tiny, 5)
    steps: Any = few.engine.decode_steps
    assert steps([(0, 0, [1], 1)] * 3) is None
    assert answers(few) == expected


def test_pieces_of_prompts_and_drafts_are_recorded(
    tiny: oracle.Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, sizes = answers(load("qwen3", tiny, 3)), []
    llm = load("qwen3", tiny, 3, max_gap=1e-3, lookup=4)
    steps: Any = llm.engine.decode_steps

    def watched(work: Any) -> Any:
        logits = steps(work)
        if logits is not None:
            sizes.append(max(len(new) for _, _, new, _ in work))
        return logits

    watched.parts = steps.parts  # type: ignore[attr-defined]
    monkeypatch.setattr(llm.engine, "decode_steps", watched)
    assert answers(llm) == expected
    assert max(sizes) >= 16  # the least piece of a prompt; the rest is up to the measured speed
    assert steps([(0, 0, [1, 2], 0)]) is None  # a pooler takes hidden states


def test_results_that_nothing_reads_any_more_leave_their_memory_to_others() -> None:
    arena = Arena()
    a, b = arena.empty(3, 4), arena.empty((3, 4), dtype=torch.int64)
    places = a.data_ptr(), b.data_ptr()
    part = a[1:]
    del a, b
    assert arena.empty(2, 6, dtype=torch.int64).data_ptr() == places[1]
    assert arena.empty(12).data_ptr() != places[0]
    assert arena.owns(part)
    del part
    assert arena.empty(12).data_ptr() == places[0]
    assert not arena.owns(torch.empty(12))


@pytest.mark.parametrize("name", ["layers", "lm_head"])
def test_a_part_that_a_program_replaces_runs_in_every_step(tiny: oracle.Tiny, name: str) -> None:
    llm = load("llama", tiny)
    decoder, before = llm.engine.decoder, answers(llm)
    part, calls = getattr(decoder, name), []

    def watched(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        return (part[1] if name == "layers" else part)(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decoder, name, [part[0], watched] if name == "layers" else watched)
        assert answers(llm) == before
        assert len(calls) >= 16
    num_calls = len(calls)
    assert answers(llm) == before  # the recorded steps again
    assert len(calls) == num_calls


def test_a_model_that_computes_with_torch_too_is_not_recorded(tiny: oracle.Tiny) -> None:
    llm = LLM(tiny(intermediate_size=72), kernels="native", parallel=3)  # no multiple of 16
    assert llm.engine.decode_steps is None
    assert [len(answer) for answer in answers(llm)] == [4, 7, 10, 13, 16]


def test_what_is_not_a_kernel_cannot_be_recorded(tiny: oracle.Tiny) -> None:
    x = torch.zeros(3)
    KernelCalls(lambda: x[1:].float())
    for name, function in COMPUTES.items():
        with pytest.raises(KernelError, match=f"^{name} is not a native kernel$"):
            KernelCalls(functools.partial(function, x))
    assert load("qwen3", tiny).logits([1, 2, 3]).any()  # kernels run again
