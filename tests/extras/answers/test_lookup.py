"""Prompt lookup: the same answers in fewer steps, whatever the parameters and the company."""

from __future__ import annotations

import dataclasses
import itertools
import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from serving import serving
from streams import alone, run

import nanollama
from nanollama import (
    LLM,
    EngineStats,
    GenerationRequest,
    RequestError,
    SamplingParams,
    Scheduler,
    Sequence,
    TextStream,
)
from nanollama_extras.answers.lookup import PromptLookup

FEW = dict.fromkeys((70, 71, 72), 100.0)  # a text of three tokens repeats itself all the time
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "repeat_penalty": 1.0, "logit_bias": FEW},
    "greedy, penalty": {"temperature": 0.0, "logit_bias": FEW},
    "few tokens": {"temperature": 1.0, "logit_bias": FEW, "repeat_penalty": 1.0},
    "hot": {"temperature": 1.5, "top_k": 0, "top_p": 1.0, "logit_bias": FEW},
    "nucleus": {"temperature": 0.9, "top_k": 0, "top_p": 0.7, "logit_bias": FEW},
    "min_p": {"temperature": 0.3, "min_p": 0.1, "logit_bias": FEW},
    "penalties": {
        "temperature": 0.8,
        "presence_penalty": 0.3,
        "frequency_penalty": 0.2,
        "repeat_last_n": 5,
        "logit_bias": FEW,
    },
    "logprobs": {"temperature": 0.5, "logit_bias": FEW, "logprobs": 3, "prompt_logprobs": True},
}


def prompt(seed: int, length: int = 12, repeats: int = 3) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(4, 320) for _ in range(length)] * repeats


def request(ids: list[int], **params: Any) -> GenerationRequest:
    return GenerationRequest(
        ids, params=SamplingParams(**{"ignore_eos": True, "max_tokens": 40, **params})
    )


def accepted(llm: LLM) -> int:
    return llm.engine.stats.accepted_tokens


@pytest.fixture(scope="module")
def plain(tiny: Callable[..., Path]) -> LLM:
    return LLM(tiny("Llama"), parallel=6)


@pytest.fixture(scope="module")
def looking(tiny: Callable[..., Path]) -> LLM:
    return LLM(tiny("Llama"), parallel=6, lookup=8)


# ---- the same answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_the_same_at_every_seed(kind: str, plain: LLM, looking: LLM) -> None:
    requests = [request(prompt(seed), seed=seed, **KINDS[kind]) for seed in range(6)]
    before = accepted(looking)
    assert alone(looking, requests) == alone(plain, requests)
    assert accepted(looking) > before


def test_the_rows_that_tokens_are_sampled_from_are_the_same_bit_for_bit(
    plain: LLM, looking: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    sample = nanollama.sample
    rows: dict[tuple[int, ...], np.ndarray] = {}

    def spy(logits: np.ndarray, params: Any, seed: int, history: list[int], *rest: Any) -> int:
        seen = rows.setdefault(tuple(history), logits.copy())
        assert np.array_equal(seen, logits)
        return sample(logits, params, seed, history, *rest)

    monkeypatch.setattr(nanollama, "sample", spy)
    requests = [request(prompt(9), seed=2, **KINDS[kind]) for kind in KINDS]
    alone(plain, requests)
    num_rows, before = len(rows), accepted(looking)
    alone(looking, requests)
    run(looking, requests)
    assert len(rows) == num_rows
    assert accepted(looking) > before


@pytest.mark.parametrize("num", [2, 3, 5, 6, 14])
def test_a_batch_answers_as_each_does_alone(num: int, plain: LLM, looking: LLM) -> None:
    kinds = [*KINDS.values(), *KINDS.values()][:num]
    requests = [
        request(prompt(i, 3 + 5 * i), seed=i, **kind | {"max_tokens": 10 + 7 * i})
        for i, kind in enumerate(kinds)
    ]
    expected, before = alone(plain, requests), accepted(looking)
    assert run(looking, requests) == expected
    assert run(looking, requests[::-1]) == expected[::-1]  # warm, in another order
    assert accepted(looking) > before


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("Mistral", {"sliding_window": 16}, {}),
        ("Qwen2", {}, {"quantize": "q4"}),
        ("Qwen3", {"head_dim": 32}, {"dtype": "bfloat16"}),
        ("Llama", {}, {"prefill_chunk": 3, "parallel": 2}),
    ],
)
def test_every_kind_of_model_answers_the_same(
    name: str, config: dict[str, Any], options: dict[str, Any], tiny: Callable[..., Path]
) -> None:
    requests = [request(prompt(i), seed=i, **kind) for i, kind in enumerate(KINDS.values())]
    expected = alone(LLM(tiny(name, **config), **options), requests)
    llm = LLM(tiny(name, **config), lookup=5, **options)
    assert run(llm, requests) == expected
    assert accepted(llm)


def test_a_real_packed_model_copies_with_lookup_as_it_does_without(
    smollm2_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "one two three four five six seven eight nine ten. " * 3
    requests = [
        request(smollm2_llm.encode(text), seed=1, repeat_penalty=1.0, temperature=t, max_tokens=24)
        for t in (0.0, 0.7)
    ]
    expected, before = alone(smollm2_llm, requests), accepted(smollm2_llm)
    assert accepted(smollm2_llm) == before
    monkeypatch.setattr(smollm2_llm.engine.scheduler, "lookup", 8)
    monkeypatch.setattr(smollm2_llm.engine, "new_drafter", PromptLookup)
    assert alone(smollm2_llm, requests) == expected
    assert accepted(smollm2_llm) > before + 10


# ---- where an answer ends ------------------------------------------------------------------------


def test_max_tokens_ends_an_answer_anywhere_in_a_draft(plain: LLM, looking: LLM) -> None:
    for num in (0, 1, 2, 3, *range(10, 28)):
        one = [request(prompt(3), **KINDS["greedy"] | {"max_tokens": num})]
        answer = alone(looking, one)
        assert answer == alone(plain, one)
        assert len(answer[0]) == max(num, 1)


def test_a_stop_string_ends_an_answer_anywhere_in_a_draft(plain: LLM, looking: LLM) -> None:
    kind = {"seed": 5, **KINDS["few tokens"]}
    text = "".join(delta.text for delta in alone(plain, [request(prompt(4), **kind)])[0])
    stops = {text[start : start + 5] for start in range(len(text) - 5)}
    before = accepted(looking)
    for stop in sorted(stops):
        one = [request(prompt(4), stop=("\0never", stop), **kind)]
        assert alone(looking, one) == alone(plain, one)
    assert accepted(looking) > before


def test_an_end_token_ends_an_answer_inside_a_draft(plain: LLM, looking: LLM) -> None:
    end = min(plain.tokenizer.end_ids)
    ids = [70, 71, end, 72] * 6  # what is guessed holds the end token
    bias = {**FEW, end: 99.0}
    for seed in range(12):
        one = [request(ids, seed=seed, ignore_eos=False, temperature=2.0, logit_bias=bias)]
        answer = alone(looking, one)
        assert answer == alone(plain, one)
    assert answer[0][-1].finish_reason == "stop"


@pytest.mark.parametrize("ctx", [37, 38, 40, 47, 48, 64])
def test_the_context_is_filled_to_its_last_token_and_no_further(
    ctx: int, tiny: Callable[..., Path]
) -> None:
    one = [request(prompt(6), **KINDS["greedy"] | {"max_tokens": None})]
    llm = LLM(tiny("Llama"), ctx=ctx, lookup=64)
    answer = run(llm, one)
    assert answer == run(LLM(tiny("Llama"), ctx=ctx), one)
    assert len(answer[0]) == ctx - 36
    assert answer[0][-1].finish_reason == "length"


# ---- what stays in the slots ---------------------------------------------------------------------


def test_a_second_turn_reuses_what_was_computed_with_lookup(plain: LLM, looking: LLM) -> None:
    for kind in ("greedy", "few tokens"):
        looking.engine.forget()
        before = accepted(looking)
        first = looking.complete(request(prompt(7), seed=1, **KINDS[kind]))
        assert accepted(looking) > before
        turn = request([*prompt(7), *first.token_ids, 9, 10], seed=2, **KINDS[kind])
        second = looking.complete(turn)
        assert second.usage.cached_tokens == 36 + len(first.token_ids) - 1
        plain.engine.forget()
        assert second.token_ids == plain.complete(turn).token_ids


def test_rejected_guesses_are_not_taken_for_a_prefix(plain: LLM, looking: LLM) -> None:
    """A slot may hold keys and values of guesses: only what was computed for real counts."""
    requests = [request(prompt(8), seed=s, **KINDS["hot"]) for s in range(6)]
    looking.engine.forget()
    answers = run(looking, requests)
    drafted = looking.engine.stats.drafted_tokens
    assert drafted > accepted(looking)
    for slot, contents in enumerate(looking.engine.scheduler.contents):
        strip = looking.engine.cache.strips[slot].clone()
        looking.engine.forget()
        fresh = plain.engine.decoder.new_cache(1)
        fresh.reserve(0, len(contents))
        batch = nanollama.Batch([(0, 0, contents, 1)], plain.engine.decoder.device)
        with torch.inference_mode():
            plain.engine.decoder(batch, fresh)
        num = len(contents) // 16 * 16  # whole blocks of positions
        assert torch.equal(strip[..., :num, :], fresh.strips[0][..., :num, :])
    assert len(answers) == 6


def test_an_interrupted_step_loses_its_draft_only(
    plain: LLM, looking: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = [request(prompt(10), **KINDS["greedy"])]
    expected = alone(plain, one)
    looking.engine.forget()
    seq = looking.start(one[0])
    cache = looking.engine.cache
    attend, calls = cache.attend, iter(range(10**6))

    def interrupted(layer: int, *args: Any) -> torch.Tensor:
        if next(calls) % 7 == 6:
            raise KeyboardInterrupt
        return attend(layer, *args)

    monkeypatch.setattr(cache, "attend", interrupted)
    while seq.finish_reason is None:
        try:
            looking.engine.step()
        except KeyboardInterrupt:
            continue
    token_ids = [delta.token_id for delta in seq.take()]
    assert token_ids == [delta.token_id for delta in expected[0]]
    assert seq.num_accepted


# ---- fewer steps, bounded drafts -----------------------------------------------------------------


def test_a_text_that_repeats_itself_takes_fewer_steps(looking: LLM) -> None:
    looking.engine.forget()
    before = dataclasses.replace(looking.engine.stats)
    seq = looking.start(request([5, 6, 7], temperature=0, logit_bias={9: 100.0}))
    num_steps = 0
    while seq.finish_reason is None:
        looking.engine.step()
        num_steps += 1
    assert seq.num_generated == 40
    assert num_steps < 12
    done = looking.engine.stats.since(before)
    usage = seq.take()[-1].usage
    assert usage is not None
    assert usage.drafted_tokens == done.drafted_tokens == seq.num_drafted
    assert usage.accepted_tokens == done.accepted_tokens == 40 - num_steps
    assert done.decode_tokens == 39


def test_statistics_add_up_over_a_batch(looking: LLM) -> None:
    looking.engine.forget()
    before = dataclasses.replace(looking.engine.stats)
    requests = [request(prompt(i, 9), seed=i, **kind) for i, kind in enumerate(KINDS.values())]
    usages = [delta.usage for delta in looking.stream(requests) if delta.usage]
    done = looking.engine.stats.since(before)
    assert done.drafted_tokens == sum(usage.drafted_tokens for usage in usages)
    assert done.accepted_tokens == sum(usage.accepted_tokens for usage in usages)
    assert done.decode_tokens == sum(usage.completion_tokens - 1 for usage in usages)
    assert 0 < done.accepted_tokens < done.drafted_tokens


def sequence(tokens: list[int], max_length: int) -> Sequence:
    text = TextStream.__new__(TextStream)
    return Sequence(0, tokens, SamplingParams(), text, max_length=max_length)


def decoding(num: int, lookup: int, max_length: int = 1000) -> Scheduler:
    """A scheduler whose `num` sequences all repeat themselves and decode."""
    scheduler = Scheduler(num, 512, lookup, lambda slot, num, length: num)
    for _ in range(num):
        seq = sequence([1, 2, 3] * 9, max_length)
        seq.drafter = PromptLookup()
        scheduler.waiting.append(seq)
        scheduler.admit()
        seq.token_ids.append(1)
        seq.num_computed = 27
    return scheduler


@pytest.mark.parametrize("lookup", [1, 8, 64])
def test_drafts_share_a_bounded_number_of_rows(lookup: int) -> None:
    for num in (1, 2, 3, 8, 9, 40):
        work = decoding(num, lookup).schedule()
        drafts = [len(seq.draft) for seq, _ in work]
        limit = max(nanollama.DRAFT_ROWS, lookup + 1)
        assert [new for _, new in work] == [1] * num
        assert len(set(drafts)) == 1
        assert drafts[0] == min(lookup, max(limit // num - 1, 0))
        assert drafts[0] == 0 or num + sum(drafts) <= limit


def test_a_draft_leaves_room_for_the_token_after_it() -> None:
    for room in range(5):
        [(seq, _)] = decoding(1, 8, max_length=28 + room).schedule()
        assert len(seq.draft) == max(room - 1, 0)


def test_a_draft_lasts_for_one_step() -> None:
    scheduler = decoding(1, 8)
    [(seq, _)] = scheduler.schedule()
    assert seq.draft
    seq.token_ids.append(1)  # as after a step that was interrupted
    assert scheduler.schedule() == [(seq, 2)]
    assert seq.draft == []


def test_without_lookup_nothing_is_drafted() -> None:
    assert [seq.draft for seq, _ in decoding(3, 0).schedule()] == [[]] * 3


# ---- the drafter ---------------------------------------------------------------------------------


def test_the_longest_match_is_continued_and_of_equals_the_latest() -> None:
    long, short = [1, 2, 3, 4, 50], [3, 4, 60]
    assert PromptLookup().guess([*long, 9, *short, 9, 1, 2, 3, 4], 1) == [50]
    assert PromptLookup().guess([*short, 9, *long, 9, 8, 3, 4], 1) == [50]
    assert PromptLookup().guess([*long, 9, *short, 9, 8, 3, 4], 1) == [60]
    assert PromptLookup().guess([*long, 9, *short, 9, 8, 3, 4], 9) == [60, 9, 8, 3, 4, 60, 9, 8, 3]


def test_nothing_is_guessed_without_two_tokens_seen_before() -> None:
    for tokens in ([], [1], [1, 1], [1, 2, 3, 4], [1, 2, 9, 2], [2, 1, 9, 1, 2]):
        assert PromptLookup().guess(tokens, 8) == []
    assert PromptLookup().guess([1, 1, 1], 3) == [1, 1, 1]
    assert PromptLookup().guess([1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]


def longest_match(tokens: list[int]) -> int:
    """How many of the last tokens, up to 8, occurred before; 0 where they are fewer than two."""
    found = 0
    for num in range(2, min(8, len(tokens) - 1) + 1):
        places = range(len(tokens) - num)
        if any(tokens[at : at + num] == tokens[-num:] for at in places):
            found = num
    return found


@given(st.lists(st.integers(0, 3), max_size=40), st.integers(1, 9), st.data())
def test_a_guess_continues_the_longest_match_however_the_text_came(
    tokens: list[int], most: int, data: st.DataObject
) -> None:
    drafter, length = PromptLookup(), 0
    while length < len(tokens):
        length = data.draw(st.integers(length + 1, len(tokens)))
        draft = drafter.guess(tokens[:length], most)
    whole = PromptLookup().guess(tokens, most)
    assert not tokens or draft == whole
    num = longest_match(tokens)
    assert len(whole) == (most if num else 0)
    if num:  # that match, with the guess after it, is in the text which the guess has made longer
        text, found = tokens + whole, tokens[-num:] + whole
        assert any(text[at : at + len(found)] == found for at in range(len(tokens) - num))


def test_wrong_guesses_make_a_drafter_rare_and_right_ones_eager() -> None:
    drafter, tokens, asked = PromptLookup(), [1] * 10, []
    seq = sequence(tokens, 10**6)
    for _ in range(300):
        tokens.append(1)
        if draft := drafter.draft(seq, 8):
            asked.append((len(tokens), len(draft)))
            drafter.learn(len(draft), 0, len(tokens) + 1)
    gaps = [b - a for (a, _), (b, _) in itertools.pairwise(asked)]
    assert [num for _, num in asked] == [8] + [1] * (len(asked) - 1)
    assert gaps[:6] == [1, 2, 4, 8, 16, 32]
    assert set(gaps[6:]) == {32}
    sizes = []
    for _ in range(5):
        tokens += [1] * 32
        draft = drafter.draft(seq, 8)
        sizes.append(len(draft))
        drafter.learn(len(draft), len(draft), len(tokens))
    assert sizes == [1, 2, 4, 8, 8]
    drafter.learn(8, 3, len(tokens))
    assert len(drafter.draft(seq, 8)) == 4


# ---- flags and numbers ---------------------------------------------------------------------------


def test_the_flag_takes_a_number_or_a_good_one(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--model", str(tiny("Llama")), "--prompt", "fox fox fox", "--max-tokens", "30"]
    flags += ["--temp", "0", "--repeat-penalty", "1", "--logit-bias", "70=100"]
    line = re.compile(r"\[prefill: .* \| drafts: (\d+) of (\d+) right\]\n")
    assert nanollama.main(flags) == 0
    expected = capsys.readouterr()
    assert "drafts" not in expected.err
    for lookup in (["--lookup"], ["--lookup", "3"]):
        assert nanollama.main([*flags, *lookup]) == 0
        shown = capsys.readouterr()
        assert shown.out == expected.out
        counts = line.search(shown.err)
        assert counts
        assert 10 < int(counts[1]) <= int(counts[2])
    args = nanollama.build_parser().parse_args(["--prompt", "x", "--lookup"])
    assert args.lookup == 8


@pytest.mark.parametrize("value", ["-1", "65", "x"])
def test_a_bad_number_is_a_usage_error(value: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert nanollama.main(["--prompt", "x", "--lookup", value]) == 2
    assert "lookup" in capsys.readouterr().err.splitlines()[0]
    given: Any = value if value == "x" else int(value)
    wanted = "it must be an integer between 0 and 64 or mtp"
    with pytest.raises(RequestError, match=f"lookup is {given!r}; {wanted}"):
        LLM(lookup=given)


def test_the_speed_line_tells_of_drafts_where_there_were_any() -> None:
    stats = EngineStats(6, 29, 0.2, 2.9, 20, 12)
    line = nanollama.speed_line(stats)
    assert line == "[prefill: 6 tok @ 30 t/s | decode: 29 tok @ 10.0 t/s | drafts: 12 of 20 right]"


def test_a_server_counts_drafts(tiny: Callable[..., Path]) -> None:
    with serving(lambda: LLM(tiny("Llama"), lookup=8)) as live:
        fields = {"max_tokens": 20, "temperature": 0, "ignore_eos": True, "logit_bias": {"70": 100}}
        timings = live.text("fox", **fields).json()["timings"]
        [worker] = live.http.get("/stats").json()["workers"]
        metrics = live.http.get("/metrics").text
    assert timings["draft_n"] >= timings["draft_n_accepted"] > 10
    assert worker["drafted_tokens"] == timings["draft_n"]
    assert worker["accepted_tokens"] == timings["draft_n_accepted"]
    assert f"nanollama_drafted_tokens_total {timings['draft_n']}.0" in metrics
    assert f"nanollama_accepted_tokens_total {timings['draft_n_accepted']}.0" in metrics
