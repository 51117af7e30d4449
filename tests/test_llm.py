"""Section 11, `LLM`: the library's public surface, as the README promises it."""

from __future__ import annotations

import inspect
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import nanollama
from nanollama import (
    LLM,
    CheckpointError,
    Completion,
    Delta,
    GenerationRequest,
    ModelNotFoundError,
    RequestError,
    SamplingParams,
)
from nanollama_extras.answers.library import Library
from nanollama_extras.commands.conversation import fit_context

GREEDY = SamplingParams(temperature=0, repeat_penalty=1, max_tokens=6)


# ---- names and parameters ------------------------------------------------------------------------


def parameters(function: Any) -> dict[str, Any]:
    empty = inspect.Parameter.empty
    found = inspect.signature(function).parameters.values()
    return {p.name: ... if p.default is empty else p.default for p in found}


def test_the_public_names_have_the_promised_parameters() -> None:
    first = list(parameters(LLM).items())[:4]
    assert [name for name, _ in first] == ["model", "device", "dtype", "quantize"]
    assert dict(first[1:]) == {"device": None, "dtype": "float32", "quantize": None}
    assert next(iter(parameters(LLM.stream))) == "self"
    assert list(parameters(LLM.stream))[1] == "requests"
    assert list(parameters(LLM.complete))[:2] == ["self", "request"]
    assert parameters(LLM.encode) == {"self": ..., "text": ..., "add_special_tokens": True}
    assert list(parameters(LLM.decode)) == ["self", "ids"]
    assert parameters(Library.render) == {
        "self": ...,
        "messages": ...,
        "tools": None,
        "add_generation_prompt": True,
        "template_kwargs": ...,
    }
    assert list(parameters(Library.logits)) == ["self", "token_ids"]


def test_everything_exported_exists_and_is_documented() -> None:
    for name in nanollama.__all__:
        assert inspect.getdoc(getattr(nanollama, name)), name
    for name in ("LLM", "SamplingParams", "GenerationRequest", "Delta", "Completion"):
        assert name in nanollama.__all__
    for kind in (LLM, Library):
        for name, method in inspect.getmembers(kind, inspect.isfunction):
            assert name.startswith("_") or method.__doc__, name


def test_config_is_the_models(tiny_llm: LLM) -> None:
    assert (tiny_llm.config.n_vocab, tiny_llm.config.n_ctx) == (320, 256)
    assert tiny_llm.config.model_type == "llama"


# ---- text and ids --------------------------------------------------------------------------------


def test_encode_and_decode_are_transformers(tiny: Callable[..., Path], tiny_llm: LLM) -> None:
    theirs = transformers.AutoTokenizer.from_pretrained(tiny("Llama"))
    text = "the quick <|im_end|> fox ünïcode 😀"
    assert tiny_llm.encode(text) == theirs(text).input_ids
    ids = tiny_llm.encode(text, add_special_tokens=False)
    assert tiny_llm.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
    assert tiny_llm.decode(i for i in ids) == tiny_llm.decode(torch.tensor(ids).tolist())


def test_render_is_apply_chat_template(smollm2_llm: LLM) -> None:
    empty = nanollama.tokenizers.Tokenizer(nanollama.tokenizers.models.BPE())
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=empty)
    theirs.chat_template = smollm2_llm.template.source
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    for add_generation_prompt in (True, False):
        assert smollm2_llm.render(
            messages, add_generation_prompt=add_generation_prompt
        ) == theirs.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=add_generation_prompt
        )
    assert smollm2_llm.render(messages[:1], [{"x": 1}], True, unused=5).endswith("assistant\n")


def test_a_template_can_be_given(tiny: Callable[..., Path]) -> None:
    llm = LLM(tiny("Llama"), template="{{ messages[0].content }}|{{ mood }}|{{ tools }}")
    messages = [{"role": "user", "content": "hey"}]
    assert llm.render(messages, mood="good") == "hey|good|None"
    one = GenerationRequest(messages=messages, params=GREEDY, template_kwargs={"mood": "good"})
    assert llm.complete(one).usage.prompt_tokens == len(llm.encode("hey|good|None"))


def test_a_tokenizer_can_come_from_elsewhere(tiny: Callable[..., Path], tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(tiny("Llama"), bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="--tokenizer"):
        LLM(bare, needs_text=True)
    llm = LLM(bare, tokenizer=str(tiny("Llama")))
    assert llm.encode("the fox") == LLM(tiny("Llama")).encode("the fox")


# ---- logits --------------------------------------------------------------------------------------


def test_logits_are_transformers_at_every_position(
    tiny: Callable[..., Path], tiny_llm: LLM
) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tiny("Llama"), dtype="float32")
    ids = [(7 * i) % 320 for i in range(70)]
    with torch.no_grad():
        expected = theirs(torch.tensor([ids])).logits[0]
    found = tiny_llm.logits(ids)
    assert found.shape == (70, 320)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert torch.equal(found, tiny_llm.logits(np.array(ids)))  # type: ignore[arg-type]
    assert torch.equal(found, tiny_llm.logits(torch.tensor(ids)))  # type: ignore[arg-type]


def test_logits_are_float32_whatever_the_model_computes_in(tiny: Callable[..., Path]) -> None:
    llm = LLM(tiny("Llama"), dtype="bfloat16", prefill_chunk=4)
    assert llm.logits([1, 2, 3, 4, 5, 6]).dtype == torch.float32


def test_logits_leave_no_trace_in_the_engine(tiny_llm: LLM) -> None:
    one = GenerationRequest([5, 6, 7], params=GREEDY)
    stream = tiny_llm.stream(one)
    deltas = [next(stream)]
    tiny_llm.logits([9, 8, 7, 6])
    deltas += stream
    assert [delta.token_id for delta in deltas] == tiny_llm.complete(one).token_ids


@pytest.mark.parametrize("ids", [[], [320], [-1], ["a"], [1.5], 5])
def test_logits_of_what_are_no_ids_are_refused(ids: Any, tiny_llm: LLM) -> None:
    with pytest.raises(RequestError):
        tiny_llm.logits(ids)


# ---- stream and complete -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params",
    [
        GREEDY,
        SamplingParams(seed=5, max_tokens=30, logprobs=2),
        SamplingParams(seed=5, max_tokens=30, stop=("e", "a")),
        SamplingParams(temperature=0, logit_bias={1: 100}),
        SamplingParams(max_tokens=0),
    ],
)
def test_complete_is_a_fold_over_stream(params: SamplingParams, tiny_llm: LLM) -> None:
    one = GenerationRequest("the quick brown", params=params)
    deltas = list(tiny_llm.stream(one))
    whole = tiny_llm.complete(one)
    assert isinstance(whole, Completion)
    assert whole.text == "".join(delta.text for delta in deltas)
    assert whole.token_ids == [d.token_id for d in deltas if d.token_id is not None]
    assert whole.logprobs == [delta.logprobs for delta in deltas if delta.logprobs]
    assert [delta.finish_reason for delta in deltas[:-1]] == [None] * (len(deltas) - 1)
    assert whole.finish_reason == deltas[-1].finish_reason
    assert deltas[-1].usage is not None
    assert whole.usage.completion_tokens == len(whole.token_ids)
    assert whole.usage.prompt_tokens == len(tiny_llm.encode("the quick brown"))


def test_stream_takes_one_request_or_any_iterable_of_them(tiny_llm: LLM) -> None:
    one = GenerationRequest("the fox", params=GREEDY)
    expected = [d.token_id for d in tiny_llm.stream(one)]
    for requests in ([one, one], (one, one), (request for request in (one, one))):
        deltas = list(tiny_llm.stream(requests))
        for index in (0, 1):
            assert [d.token_id for d in deltas if d.index == index] == expected
    assert list(tiny_llm.stream([])) == []


def test_requests_are_made_when_they_are_due(tiny_llm: LLM) -> None:
    """So a long batch, or one with images, takes no memory for all of its prompts."""
    made: list[int] = []

    def requests() -> Iterator[GenerationRequest]:
        for number in range(3 * most):
            made.append(number)
            yield GenerationRequest([5, 6], params=SamplingParams(max_tokens=1))

    most = tiny_llm.engine.num_slots
    stream = tiny_llm.stream(requests())
    first = next(stream)
    assert len(made) == most + 1
    assert {first.index, *(delta.index for delta in stream)} == {*range(3 * most)}


def test_a_stream_is_made_while_it_is_read(tiny_llm: LLM) -> None:
    stream = tiny_llm.stream(GenerationRequest("the fox", params=GREEDY))
    assert not tiny_llm.engine.has_work
    first = next(stream)
    assert isinstance(first, Delta)
    assert tiny_llm.engine.has_work
    assert len(list(stream)) == 5


def test_an_answer_joined_is_decode_of_its_ids(tiny_llm: LLM) -> None:
    for seed in range(5):
        params = SamplingParams(seed=seed, temperature=2, max_tokens=40, ignore_eos=True)
        answer = tiny_llm.complete(GenerationRequest("the fox", params=params))
        assert answer.text == tiny_llm.decode(answer.token_ids)


def test_smollm2_knows_the_capital_of_france(smollm2_llm: LLM) -> None:
    messages = [{"role": "user", "content": "Name the capital of France."}]
    params = SamplingParams(temperature=0, max_tokens=12)
    answer = smollm2_llm.complete(GenerationRequest(messages=messages, params=params))
    assert "Paris" in answer.text


def test_a_request_is_a_prompt_or_messages() -> None:
    for fields in ({}, {"prompt": "a", "messages": [{"role": "user", "content": "b"}]}):
        with pytest.raises(RequestError, match="either a prompt or messages"):
            GenerationRequest(**fields)


# ---- loading -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device": "tpu"}, "device 'tpu' is not available here"),
        ({"device": "cuda:99"}, "device 'cuda:99' is not available here"),
        ({"dtype": "int8"}, "dtype is 'int8'; choose one of float32, float16, bfloat16"),
        ({"quantize": "q3"}, "quantize is 'q3'"),
        ({"ctx": 0}, "ctx is 0"),
        ({"parallel": -1}, "parallel is -1"),
        ({"prefill_chunk": 0}, "prefill_chunk is 0"),
        ({"threads": 0}, "threads is 0"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_anything_is_loaded(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        LLM("no/such-model", **options)


def test_a_model_that_is_not_there_is_named() -> None:
    with pytest.raises(ModelNotFoundError, match="no-such-directory"):
        LLM("./no-such-directory")


def test_ctx_caps_the_context_and_never_raises_it(tiny: Callable[..., Path]) -> None:
    assert LLM(tiny("Llama"), ctx=64).engine.n_ctx == 64
    assert LLM(tiny("Llama"), ctx=10**6).engine.n_ctx == 256


@pytest.mark.parametrize("quantize", ["q8", "q4"])
def test_quantized_weights_take_less_memory_and_answer_alike(
    quantize: str, tiny: Callable[..., Path], tiny_llm: LLM
) -> None:
    llm = LLM(tiny("Llama"), quantize=quantize)
    ids = list(range(40))
    packed, plain = llm.logits(ids), tiny_llm.logits(ids)
    likeness = torch.cosine_similarity(packed, plain, dim=-1).mean()
    assert {"q8": 0.99, "q4": 0.7}[quantize] < likeness < 1
    weight = llm.engine.decoder.layers[0].mlp.down_proj.nbytes
    assert weight < tiny_llm.engine.decoder.layers[0].mlp.down_proj.nbytes / 3


def test_threads_may_share_a_model(tiny: Callable[..., Path]) -> None:
    """Each answer is the one that its request gets alone, whichever thread runs the steps."""
    llm = LLM(tiny(), parallel=3)
    requests = [
        GenerationRequest(prompt=text, params=SamplingParams(seed=1, max_tokens=24))
        for text in ("fox", "the quick brown", "jumps over the lazy dog")
    ]
    alone = [llm.complete(request).token_ids for request in requests]
    logits = llm.logits([5, 6, 7])
    with ThreadPoolExecutor(4) as pool:
        answers = [pool.submit(llm.complete, request) for request in requests * 6]
        others = [pool.submit(llm.logits, [5, 6, 7]) for _ in range(6)]
        assert [answer.result().token_ids for answer in answers] == alone * 6
        assert all(torch.equal(other.result(), logits) for other in others)


@pytest.fixture
def num_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_there_is_at_most_one_thread_for_each_core(
    tiny: Callable[..., Path], num_threads: None
) -> None:
    LLM(tiny(), threads=1024)
    assert torch.get_num_threads() == os.cpu_count()


def test_a_model_larger_than_the_free_memory_is_refused(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = nanollama.open_checkpoint(tiny()).num_parameters * 4
    monkeypatch.setattr(nanollama, "available_memory", lambda device: needed / 2)
    shown = f"{nanollama.human_bytes(needed)}, and {nanollama.human_bytes(needed / 2)}"
    with pytest.raises(nanollama.NanollamaError, match=f"weights take {shown} are free; .*--force"):
        LLM(tiny())
    LLM(tiny(), force=True)
    LLM(tiny(), quantize="q8")
    LLM(tiny(), dtype="float16")


# ---- fit_context ---------------------------------------------------------------------------------


def conversation(lengths: list[int], with_system: bool) -> list[dict[str, Any]]:
    messages = [{"role": "system", "content": "be brief"}] if with_system else []
    for i, length in enumerate(lengths):
        role = "assistant" if i % 2 else "user"
        messages.append({"role": role, "content": f"{i}" + "x" * length})
    return messages


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 60), min_size=1, max_size=9).filter(lambda x: len(x) % 2),
    with_system=st.booleans(),
    num_reserved=st.integers(0, 300),
)
def test_the_oldest_turns_are_dropped_until_the_rest_fits(
    lengths: list[int], with_system: bool, num_reserved: int, tiny_llm: LLM
) -> None:
    messages = conversation(lengths, with_system)
    kept = fit_context(tiny_llm, messages, num_reserved)
    num_dropped = len(messages) - len(kept)
    num_system = int(with_system)
    assert kept == messages[:num_system] + messages[num_system + num_dropped :]
    assert kept[-1] == messages[-1]
    assert kept[num_system]["role"] == "user"

    def fits(some: list[dict[str, Any]]) -> bool:
        num_left = 256 - len(tiny_llm.prompt_ids(GenerationRequest(messages=some)))
        return num_left >= min(num_reserved, 128)

    assert fits(kept) or len(kept) == num_system + 1
    if num_dropped:  # nothing was dropped that could have stayed
        more = messages[:num_system] + messages[num_system + num_dropped - 2 :]
        assert not fits(more)


def test_fit_context_keeps_an_answers_tools_with_its_question(tiny_llm: LLM) -> None:
    long = "x" * 120
    messages = [
        {"role": "user", "content": long},
        {"role": "assistant", "content": "call"},
        {"role": "tool", "content": long},
        {"role": "assistant", "content": "done"},
        {"role": "user", "content": "next"},
    ]
    assert fit_context(tiny_llm, messages, 60) == messages[4:]


def test_the_fingerprint_tells_weights_and_precision_apart(tiny: Callable[..., Path]) -> None:
    models = [tiny(), tiny(hidden_size=128)]
    builds = [LLM(path, quantize=q) for path in models for q in (None, "q8", "q4")]
    builds.append(LLM(models[0], dtype="bfloat16"))
    prints = [llm.fingerprint for llm in builds]
    assert len(set(prints)) == len(prints)
    assert LLM(models[0], quantize="q4").fingerprint == prints[2]
