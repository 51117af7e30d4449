"""Drafts of a small model: the same answers, whatever it guesses, and no time lost by errors."""

from __future__ import annotations

import dataclasses
import gc
import itertools
import random
import re
import shutil
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st
from serving import serving
from streams import alone, run

import nanollama
from nanollama import (
    LLM,
    EngineConfig,
    EngineStats,
    GenerationRequest,
    NanollamaError,
    SamplingParams,
    UsageError,
    extra,
)
from nanollama_extras.answers import gains
from nanollama_extras.answers.gains import Costs, Gains, Odds, Plan
from nanollama_extras.models import drafts as drafts_module
from nanollama_extras.models.drafts import Drafts, attach

FREE: dict[str, Any] = {"ignore_eos": True, "max_tokens": 30}
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0, "repeat_penalty": 1.0},
    "greedy, penalty": {"temperature": 0.0},
    "defaults": {},
    "hot": {"temperature": 1.5, "top_k": 0, "top_p": 1.0},
    "penalties": {"presence_penalty": 0.3, "frequency_penalty": 0.2, "repeat_last_n": 5},
    "logprobs": {"temperature": 0.5, "logprobs": 3, "prompt_logprobs": True},
    "bias": {"temperature": 1.0, "logit_bias": {70: 4.0, 71: 4.0, 72: 4.0}},
    "own sampler": {"sampler": lambda seq, logits: int(logits.argsort()[-2])},
}
GUESSERS = ("same", "close", "other")


class Eager(Gains):
    """Drafts that cost nothing are as long as they may be."""

    def begin_step(self, stats: EngineStats) -> None:
        self.steps.note(1, 1.0)

    def pass_s(self, num_tokens: int) -> float:
        return 0.0

    def reading_s(self, num_tokens: int) -> float:
        return 0.0

    def must_measure(self, num_rows: int) -> bool:
        return False


def of(llm: LLM) -> Drafts:
    """The drafts of a model's engine."""
    drafter: Any = llm.engine.new_drafter and llm.engine.new_drafter()
    found: Drafts = drafter.drafts
    return found


def with_draft(path: Path, draft: Path, **options: Any) -> LLM:
    """A model that drafts as far as it may."""
    llm = LLM(path, draft=str(draft), **{"parallel": 6, **options})
    drafts = of(llm)
    drafts.gains, drafts.most_copied = Eager(1.0), 0
    return llm


@pytest.fixture(autouse=True)
def no_margin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Any gain counts, however unlikely."""
    monkeypatch.setattr(gains, "MARGIN", 1.0)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drafts_module, "Gains", Eager)


@pytest.fixture(scope="module")
def paths(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model, one that is close to it, and one that has only its vocabulary."""
    close = tmp_path_factory.mktemp("close") / "model"
    shutil.copytree(tiny(), close)
    (file,) = close.glob("*.safetensors")
    tensors = safetensors.torch.load_file(file)
    torch.manual_seed(1)
    noisy = {name: t + 0.002 * torch.randn_like(t) for name, t in tensors.items()}
    safetensors.torch.save_file(noisy, file, metadata={"format": "pt"})
    return {"same": tiny(), "close": close, "other": tiny("Llama", num_hidden_layers=1)}


@pytest.fixture(scope="module")
def plain(tiny: Callable[..., Path]) -> LLM:
    return LLM(tiny(), parallel=6)


@pytest.fixture(scope="module")
def drafting(paths: dict[str, Path]) -> dict[str, LLM]:
    return {name: with_draft(paths["same"], path) for name, path in paths.items()}


def request(seed: int, length: int = 20, **params: Any) -> GenerationRequest:
    rng = random.Random(seed)
    ids = [rng.randrange(4, 320) for _ in range(length)]
    return GenerationRequest(ids, params=SamplingParams(**{**FREE, "seed": seed, **params}))


def counts(llm: LLM) -> tuple[int, int]:
    """Drafted and accepted tokens so far."""
    return llm.engine.stats.drafted_tokens, llm.engine.stats.accepted_tokens


# ---- the same answers ----------------------------------------------------------------------------


@pytest.mark.parametrize("guesser", GUESSERS)
@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_is_the_same_at_every_seed(
    kind: str, guesser: str, plain: LLM, drafting: dict[str, LLM]
) -> None:
    requests = [request(seed, **KINDS[kind]) for seed in range(3)]
    llm, before = drafting[guesser], counts(drafting[guesser])
    assert alone(llm, requests) == alone(plain, requests)
    num_drafted, num_right = (b - a for a, b in zip(before, counts(llm)))
    assert num_drafted
    if guesser == "same" and kind != "own sampler":  # which guesses know nothing of
        assert num_right == num_drafted > 75


@pytest.mark.parametrize("guesser", GUESSERS)
@pytest.mark.parametrize("num", [2, 3, 6, 11])
def test_a_batch_answers_as_each_does_alone(
    num: int, guesser: str, plain: LLM, drafting: dict[str, LLM]
) -> None:
    kinds = [*KINDS.values(), *KINDS.values()][:num]
    requests = [
        request(i, 3 + 9 * i, **kind | {"max_tokens": 8 + 5 * i}) for i, kind in enumerate(kinds)
    ]
    expected = alone(plain, requests)
    assert run(drafting[guesser], requests) == expected
    assert run(drafting[guesser], requests[::-1]) == expected[::-1]  # warm, in another order


def test_a_close_model_is_mostly_right_and_another_one_is_not(drafting: dict[str, LLM]) -> None:
    shares = {}
    for guesser, llm in drafting.items():
        before = counts(llm)
        alone(llm, [request(seed, **KINDS["greedy"]) for seed in range(20, 24)])
        num_drafted, num_right = (b - a for a, b in zip(before, counts(llm)))
        shares[guesser] = num_right / num_drafted
    assert shares["other"] < 0.2 < shares["close"] <= shares["same"] == 1


@pytest.mark.parametrize(
    ("name", "config", "options"),
    [
        ("Mistral", {"sliding_window": 16}, {"prefill_chunk": 3}),
        ("Llama", {}, {"prefill_chunk": 2, "parallel": 2}),
        ("Qwen2", {}, {"quantize": "q4", "kv_dtype": "q8"}),
        ("Llama", {}, {"dtype": "bfloat16"}),
        ("Qwen3", {}, {"dtype": "bfloat16", "kernels": "torch"}),
        ("Qwen3_5Text", {}, {}),
    ],
)
def test_every_kind_of_model_answers_the_same(
    name: str, config: dict[str, Any], options: dict[str, Any], tiny: Callable[..., Path]
) -> None:
    requests = [request(i, 30, **kind) for i, kind in enumerate(KINDS.values())]
    path = tiny(name, **config)
    expected = alone(LLM(path, **options), requests)
    draft = tiny("Mistral", sliding_window=16) if name != "Qwen2" else path
    llm = with_draft(path, draft, **options)
    assert run(llm, requests) == expected
    assert counts(llm)[0] > 20


def test_a_real_packed_model_answers_the_same(smollm2: Path, smollm2_llm: LLM) -> None:
    ids = smollm2_llm.encode("The capital of France is")
    requests = [
        GenerationRequest(ids, params=SamplingParams(temperature=t, seed=3, max_tokens=20))
        for t in (0.0, 0.8)
    ]
    expected = alone(smollm2_llm, requests)
    llm = with_draft(smollm2, smollm2)
    assert alone(llm, requests) == expected
    assert counts(llm)[0] == counts(llm)[1] > 20


# ---- where an answer ends, and forms of answers --------------------------------------------------


def test_max_tokens_and_the_context_end_an_answer_anywhere_in_a_draft(
    plain: LLM, drafting: dict[str, LLM], tiny: Callable[..., Path]
) -> None:
    for num in range(12):
        one = [request(3, **KINDS["greedy"] | {"max_tokens": num})]
        answer = alone(drafting["same"], one)
        assert answer == alone(plain, one)
        assert len(answer[0]) == max(num, 1)
    one = [request(3, max_tokens=None)]
    for ctx in (21, 22, 29, 40):
        answer = run(with_draft(tiny(), tiny(), ctx=ctx), one)
        assert answer == run(LLM(tiny(), ctx=ctx), one)
        assert len(answer[0]) == ctx - 20


def test_a_draft_ends_where_the_context_of_the_small_model_does(
    plain: LLM, tiny: Callable[..., Path]
) -> None:
    llm = with_draft(tiny(), tiny("Llama", max_position_embeddings=32))
    one = [request(3)]
    assert run(llm, one) == alone(plain, one)
    assert 0 < counts(llm)[0] < 30


def test_a_stop_string_and_an_end_token_end_an_answer_inside_a_draft(
    plain: LLM, drafting: dict[str, LLM]
) -> None:
    text = "".join(delta.text for delta in alone(plain, [request(5)])[0])
    for start in range(0, len(text) - 3, 4):
        one = [request(5, stop=(text[start : start + 3],))]
        assert alone(drafting["same"], one) == alone(plain, one)
    bias = {min(plain.tokenizer.end_ids): 5.0}
    requests = [request(s, ignore_eos=False, temperature=2.0, logit_bias=bias) for s in range(8)]
    answers = alone(plain, requests)
    assert {answer[-1].finish_reason for answer in answers} == {"stop", "length"}
    assert alone(drafting["same"], requests) == answers


@pytest.mark.parametrize("guesser", ["same", "other"])
def test_the_form_of_an_answer_holds(guesser: str, plain: LLM, drafting: dict[str, LLM]) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
    forms: list[dict[str, Any]] = [{"regex": "(ab|cd|ef){4,9}x"}, {"schema": schema}]
    requests = [
        request(seed, ignore_eos=False, temperature=t, **form)
        for seed, (form, t) in enumerate(itertools.product(forms, (0.0, 1.0)))
    ]
    expected, before = alone(plain, requests), counts(drafting[guesser])
    assert alone(drafting[guesser], requests) == expected
    num_drafted, num_right = (b - a for a, b in zip(before, counts(drafting[guesser])))
    assert num_drafted > 0
    # the last token of an answer counts as a guess, but not as one that let it go on
    assert guesser == "other" or num_right >= num_drafted - len(requests)
    assert run(drafting[guesser], requests) == expected  # side by side


# ---- what the small model keeps ------------------------------------------------------------------


def test_a_second_turn_reads_only_what_is_new(plain: LLM, drafting: dict[str, LLM]) -> None:
    llm = drafting["close"]
    first = llm.complete(request(7, 60))
    ids = request(7, 60).prompt
    assert isinstance(ids, list)
    turn = GenerationRequest([*ids, *first.token_ids, 9, 10], params=SamplingParams(**FREE, seed=1))
    second = llm.start(turn)
    while second.finish_reason is None:
        llm.engine.step()
    drafter: Any = second.drafter
    assert drafter.shadow.num_cached >= 60 + 20
    plain.engine.forget()
    assert second.token_ids[second.num_prompt :] == plain.complete(turn).token_ids


def test_what_the_small_model_has_read_are_the_tokens_of_the_answer(
    plain: LLM, drafting: dict[str, LLM]
) -> None:
    """Keys and values in its slot are those of its shadow's tokens, not of wrong guesses."""
    llm = drafting["other"]
    seq, small = llm.start(request(8)), of(llm).small
    while seq.num_generated < 20:
        llm.engine.step()
    drafter: Any = seq.drafter
    drafter.follow(seq)
    shadow, num = drafter.shadow, drafter.shadow.num_computed // 16 * 16
    assert num >= 32
    fresh = small.decoder.new_cache(1)
    fresh.reserve(0, num)
    batch = nanollama.Batch([(0, 0, seq.token_ids[:num], 1)], small.decoder.device)
    with torch.inference_mode():
        small.decoder(batch, fresh)
    strip = small.cache.strips[shadow.slot]
    assert torch.equal(strip[..., :num, :], fresh.strips[0][..., :num, :])
    llm.engine.cancel(seq)


def test_a_cancelled_sequence_frees_its_slot(plain: LLM, drafting: dict[str, LLM]) -> None:
    llm = drafting["close"]
    sequences = [llm.start(request(seed)) for seed in range(6)]
    for _ in range(3):
        llm.engine.step()
    drafts = of(llm)
    assert len(drafts.pairs) == 6
    assert not drafts.small.scheduler.free
    for seq in sequences:
        llm.engine.cancel(seq)
    assert alone(llm, [request(9)]) == alone(plain, [request(9)])
    assert len(drafts.pairs) == 1
    assert len(drafts.small.scheduler.free) == 5


@pytest.mark.parametrize("guesser", GUESSERS)
def test_neighbours_answer_the_same_when_a_sequence_is_cancelled(
    guesser: str, plain: LLM, drafting: dict[str, LLM]
) -> None:
    requests = [request(seed, 5 + 9 * seed, **KINDS["hot"]) for seed in range(4)]
    expected = [[delta.token_id for delta in answer] for answer in alone(plain, requests)]
    llm = drafting[guesser]
    sequences = [llm.start(one) for one in requests]
    while sequences[1].num_generated <= 3:
        llm.engine.step()
    cancelled = sequences.pop(1)
    llm.engine.cancel(cancelled)
    del expected[1]
    while any(seq.finish_reason is None for seq in sequences):
        llm.engine.step()
    assert [seq.token_ids[seq.num_prompt :] for seq in sequences] == expected
    assert cancelled.num_generated < len(expected[0])


def test_an_interrupted_step_loses_its_draft_only(
    plain: LLM, drafting: dict[str, LLM], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = alone(plain, [request(10)])
    llm = drafting["close"]
    for engine in (llm.engine, of(llm).small):
        calls = iter(range(10**6))
        forward = engine.forward

        def interrupted(work: Any, forward: Any = forward, calls: Any = calls) -> Any:
            if next(calls) % 5 == 4:
                raise KeyboardInterrupt
            return forward(work)

        monkeypatch.setattr(engine, "forward", interrupted)
    seq = llm.start(request(10))
    while seq.finish_reason is None:
        try:
            llm.engine.step()
        except KeyboardInterrupt:
            continue
    assert [d.token_id for d in seq.take()] == [d.token_id for d in expected[0]]
    assert seq.num_drafted


def test_both_models_are_freed_together(paths: dict[str, Path]) -> None:
    llm = with_draft(paths["same"], paths["other"])
    llm.complete(request(1))
    found = [weakref.ref(engine.decoder) for engine in (llm.engine, of(llm).small)]
    del llm
    gc.collect()
    assert [ref() for ref in found] == [None, None]


def test_a_text_that_repeats_itself_is_copied(paths: dict[str, Path], plain: LLM) -> None:
    llm = with_draft(paths["same"], paths["other"])
    of(llm).most_copied = 8
    one = request(1, temperature=0, logit_bias={9: 100.0}, repeat_penalty=1.0)
    assert alone(llm, [one]) == alone(plain, [one])
    assert counts(llm)[1] > 20


# ---- what is refused -----------------------------------------------------------------------------


def test_a_small_model_that_cannot_draft_is_refused(
    paths: dict[str, Path], tiny: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    path, hybrid = paths["same"], tiny("Qwen3_5Text")
    with pytest.raises(UsageError, match="its layers keep a state, which wrong guesses cannot be"):
        LLM(path, draft=str(hybrid))
    with pytest.raises(UsageError, match="--draft and --lookup mtp exclude each other"):
        attach(cast("Any", None), EngineConfig(draft=str(path), lookup="mtp"))
    with pytest.raises(NanollamaError, match="nowhere"):
        LLM(path, draft="./nowhere")
    LLM(paths["other"], draft=str(path))
    assert "is larger than" in caplog.text


def test_another_vocabulary_is_refused_with_its_first_difference(
    paths: dict[str, Path], smollm2: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(own: dict[int, str], wanted: dict[int, str]) -> str:
        words = iter([own, wanted])
        monkeypatch.setattr(drafts_module, "words_of", lambda _: next(words))
        with pytest.raises(UsageError) as error:
            drafts_module.check_vocabulary("small", cast("Any", 0), "big", cast("Any", 0))
        return str(error.value)

    with pytest.raises(UsageError, match=r"of 49152 tokens is not that of .*: token 0 is"):
        LLM(paths["same"], draft=str(smollm2))
    start = "--draft small: its vocabulary of 3 tokens is not that of big, of"
    end = "token 1 is 'c' in small and 'b' in big"
    assert refusal({0: "a", 1: "c", 2: "d"}, {0: "a", 1: "b", 2: "x"}) == f"{start} 3: {end}"
    end = "token 2 is 'c' in small and missing in big"
    assert refusal({0: "a", 1: "b", 2: "c"}, {0: "a", 1: "b"}) == f"{start} 2: {end}"


# ---- how far to guess ----------------------------------------------------------------------------


def test_odds_go_by_cases_of_the_same_likelihood() -> None:
    broad = Odds()
    odds = Odds(broad)
    assert odds.chance() == pytest.approx(gains.HOPE)
    assert odds.chance(0.4) == pytest.approx(0.4)
    for _ in range(60):
        odds.note(0.9, True)
        odds.note(0.2, False)
    assert odds.chance(0.95) > 0.95
    assert odds.chance(0.2) < 0.05
    assert odds.chance() == pytest.approx(0.5, abs=0.03)
    assert Odds(broad).chance(0.2) < 0.05  # another text, with the same two models
    for _ in range(400):
        odds.note(0.2, True)
    assert odds.chance(0.2) > 0.9  # what was long ago counts little


def test_costs_are_medians_and_lie_between_known_ones() -> None:
    costs = Costs()
    for seconds in (3.0, 1.0, 9.0):
        costs.note(2, seconds)
    costs.note(6, 7.0)
    assert [costs.of(size) for size in (1, 2, 3, 4, 6, 9)] == [3, 3, 4, 5, 7, 7]
    for _ in range(5):
        costs.note(2, 1.0)
    assert costs.of(2) == 1


def test_a_pass_that_reads_a_text_says_little_of_a_short_one() -> None:
    known = Gains(0.1)
    known.steps.note(1, 1.0)
    known.note_pass(41, 4.1)
    assert [known.pass_s(num) for num in (1, 21, 41)] == pytest.approx([0.1, 2.1, 4.1])
    for _ in range(3):
        known.note_pass(1, 0.2)
    assert known.pass_s(1) == 0.2


@dataclasses.dataclass
class Each:
    likelihood: float
    chance: float


@given(
    st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=4),
    st.lists(st.floats(0.01, 3), min_size=20, max_size=20),
    st.floats(0.001, 2),
)
def test_the_longest_draft_is_that_of_most_tokens_per_second(
    each: list[tuple[float, float]], seconds: list[float], pass_s: float
) -> None:
    known = Gains(0.1)
    for rows, total in enumerate(itertools.accumulate(seconds), 1):
        known.steps.note(rows, total)
    known.passes.note(1, pass_s)
    plan = Plan(known, len(each), len(each))
    num, token_s = plan.longest([Each(*one) for one in each], 4)
    rates = [plan.token_s]
    for length in range(1, 5):
        right = sum(p * c**k for p, c in each for k in range(1, length + 1))
        step_s = known.steps.of(len(each) * (1 + length))
        rates.append((step_s + length * pass_s) / (len(each) + right))
    assert token_s == pytest.approx(min(rates))
    assert rates[num] == pytest.approx(min(rates))


class Machine:
    """A clock that only steps of two engines move: seconds by rows."""

    def __init__(self, llm: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(time, "perf_counter", lambda: self.now_s)
        drafts = of(llm)
        monkeypatch.setattr(drafts, "clock", time.perf_counter)
        monkeypatch.setattr(drafts, "gains", Gains(0.1))
        self.watch(llm.engine, 10, monkeypatch)
        self.watch(drafts.small, 1, monkeypatch)

    def watch(self, engine: Any, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
        forward = engine.forward

        def timed(work: Any) -> Any:
            num_rows = sum(num_new + len(seq.draft) for seq, num_new in work)
            self.now_s += scale * self.step_s(num_rows)
            return forward(work)

        monkeypatch.setattr(engine, "forward", timed)

    def step_s(self, num_rows: int) -> float:
        """As kernels that read weights for up to four rows and then compute."""
        return 1.0 + 0.05 * num_rows + 0.3 * max(num_rows - 4, 0)


@pytest.mark.parametrize(
    ("guesser", "num", "least", "most"),
    [
        ("same", 1, 0.2, 0.5),
        ("same", 2, 0.3, 0.8),
        ("other", 1, 0.99, 1.08),
        ("same", 6, 0.99, 1.03),
    ],
)
def test_drafts_gain_time_or_lose_little(
    guesser: str,
    num: int,
    least: float,
    most: float,
    drafting: dict[str, LLM],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(gains, "MARGIN", 1.03)
    seconds, llm = [], drafting[guesser]
    machine = Machine(llm, monkeypatch)
    for longest in (15, 0):
        monkeypatch.setattr(llm.engine.scheduler, "lookup", longest)
        started = machine.now_s
        for _ in range(2):
            llm.engine.forget()
            run(llm, [request(seed, 8, max_tokens=160) for seed in range(num)])
        seconds.append(machine.now_s - started)
    assert least <= seconds[0] / seconds[1] <= most


# ---- where it is named ---------------------------------------------------------------------------


@pytest.mark.usefixtures("eager")
def test_the_flag_and_the_modelfile_name_a_small_model(
    paths: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = paths["same"]
    flags = ["--prompt", "fox", "--max-tokens", "60", "--temp", "0"]
    assert nanollama.main(["--model", str(path), *flags]) == 0
    expected = capsys.readouterr().out
    (tmp_path / "small").symlink_to(path)
    (tmp_path / "Modelfile").write_text(f"FROM {path}\nDRAFT ./small\n")
    for chosen in (
        ["--model", str(path), "--draft", str(path)],
        ["--modelfile", str(tmp_path / "Modelfile")],
    ):
        assert nanollama.main([*chosen, *flags]) == 0
        shown = capsys.readouterr()
        assert shown.out == expected
        assert re.search(r"\| drafts: \d+ of \d+ right\]", shown.err)
    assert nanollama.main(["show", "--modelfile", str(tmp_path / "Modelfile")]) == 0
    out = capsys.readouterr().out
    assert re.search(r"draft +\S+small\S* +\(Modelfile\)", out)
    assert "with those of the draft model" in out
    file = nanollama.read_modelfile(tmp_path / "Modelfile")
    text = extra("api.ollama_models", "x").format_modelfile(file)
    assert nanollama.parse_modelfile(text, tmp_path / "Modelfile") == file


@pytest.mark.usefixtures("eager")
def test_a_server_counts_guesses(paths: dict[str, Path]) -> None:
    with serving(lambda: LLM(paths["same"], draft=str(paths["same"]))) as live:
        fields = {"max_tokens": 60, "temperature": 0, "ignore_eos": True}
        timings = live.text("fox", **fields).json()["timings"]
        metrics = live.http.get("/metrics").text
    assert timings["draft_n"] >= timings["draft_n_accepted"] > 0
    assert f"nanollama_drafted_tokens_total {timings['draft_n']}.0" in metrics
