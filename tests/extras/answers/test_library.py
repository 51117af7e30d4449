"""The library: requests made of texts, messages and fields; samplers and stops of the program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from nanollama import LLM, GenerationRequest, RequestError, SamplingParams, Sequence

USER = {"role": "user", "content": "the quick"}
GREEDY: dict[str, Any] = {"temperature": 0, "repeat_penalty": 1, "max_tokens": 6}
PLAIN = SamplingParams(**GREEDY)


@pytest.mark.parametrize(
    ("given", "request_"),
    [
        ("the fox", GenerationRequest("the fox", params=PLAIN)),
        ([5, 6, 7], GenerationRequest([5, 6, 7], params=PLAIN)),
        (USER, GenerationRequest(messages=[USER], params=PLAIN)),
        ([USER, USER], GenerationRequest(messages=[USER, USER], params=PLAIN)),
        ({"messages": [USER], "seed": 1}, GenerationRequest(messages=[USER], params=PLAIN)),
        ({"prompt": "the fox", "suffix": ""}, GenerationRequest("the fox", params=PLAIN)),
    ],
)
def test_a_request_may_be_a_text_ids_messages_or_fields(
    given: Any, request_: GenerationRequest, tiny_llm: LLM
) -> None:
    expected = tiny_llm.complete(request_)
    answer = tiny_llm.complete(given, **GREEDY)
    assert (answer.text, answer.token_ids) == (expected.text, expected.token_ids)


def test_a_conversation_may_be_a_text_a_message_or_a_list_of_both(tiny_llm: LLM) -> None:
    expected = tiny_llm.complete(GenerationRequest(messages=[USER], params=PLAIN))
    for messages in ("the quick", USER, [USER], ["the quick"]):
        assert tiny_llm.chat(messages, **GREEDY).token_ids == expected.token_ids


def test_several_requests_of_any_form_run_together(tiny_llm: LLM) -> None:
    forms: list[Any] = ["the fox", {"prompt": [5, 6], "max_tokens": 2}, USER]
    tokens: list[list[int]] = [[], [], []]
    for delta in tiny_llm.stream(forms, temperature=0, repeat_penalty=1):
        tokens[delta.index] += [] if delta.token_id is None else [delta.token_id]
    for form, found in zip(forms, tokens):
        alone = tiny_llm.complete(form, temperature=0, repeat_penalty=1)
        assert found == alone.token_ids
    assert len(tokens[1]) == 2


def test_parameters_that_are_left_out_are_the_models_own(tiny: Callable[..., Path]) -> None:
    llm = LLM(tiny())
    llm.sampling.update(temperature=0.0, top_k=3)
    request = llm.request("fox", top_k=5, stop="x")
    assert isinstance(request, GenerationRequest)
    assert (request.params.temperature, request.params.top_k) == (0.0, 5)
    assert request.params.stop == ("x",)


@pytest.mark.parametrize(
    ("given", "params", "message"),
    [
        ("fox", {"temperatur": 1}, "no field 'temperatur'; did you mean temperature"),
        ("fox", {"temperature": -1}, "temperature is -1"),
        ({"prompt": "a", "messages": [USER]}, {}, "either a prompt or messages"),
        ({}, {}, "either a prompt or messages"),
        (5, {}, "a prompt is 5"),
        (GenerationRequest("fox"), {"top_k": 1}, "top_k beside a whole request"),
        ({"prompt": "a", "params": PLAIN}, {"top_k": 1}, "top_k beside params"),
        ([USER, 5], {}, "a prompt is"),
    ],
)
def test_a_request_that_makes_no_sense_is_refused(
    given: Any, params: dict[str, Any], message: str, tiny_llm: LLM
) -> None:
    with pytest.raises(RequestError, match=message):
        tiny_llm.complete(given, **params)


def test_repr_says_what_a_model_is(tiny: Callable[..., Path]) -> None:
    shown = repr(LLM(tiny(), kernels="torch", ctx=99))
    assert shown.startswith(f"<LLM {tiny().name}: llama, 0M parameters in F32, 99 tokens, torch")


def test_a_wrong_name_is_answered_with_the_closest_one(tiny_llm: LLM) -> None:
    with pytest.raises(AttributeError, match="no attribute 'compleet'; did you mean complete"):
        _ = tiny_llm.compleet
    assert not hasattr(tiny_llm, "_hidden")


# ---- samplers ------------------------------------------------------------------------------------


def test_a_sampler_chooses_the_tokens(tiny_llm: LLM) -> None:
    expected = tiny_llm.complete("the fox", **GREEDY).token_ids
    taken = tiny_llm.complete("the fox", sampler=lambda seq, logits: logits.argmax(), max_tokens=6)
    assert taken.token_ids == expected


def test_a_sampler_may_change_logits_before_the_chain(tiny_llm: LLM) -> None:
    banned = tiny_llm.complete("the fox", **GREEDY).token_ids[0]

    def without(seq: Sequence, logits: Any) -> int:
        logits[banned] = -np.inf
        return seq.choose(logits)

    params: dict[str, Any] = {"seed": 3, "logprobs": 1, "max_tokens": 30}
    answer = tiny_llm.complete("the fox", sampler=without, **params)
    assert banned not in answer.token_ids
    top = answer.logprobs[0].top[0]
    assert top[0] == banned, "log-probabilities are the model's"
    biased = tiny_llm.complete("the fox", logit_bias={banned: -100}, **params)
    assert answer.token_ids == biased.token_ids


def broken(seq: Sequence, logits: Any = None) -> Any:
    if seq.num_generated == 2:
        raise ValueError("out of ideas")
    return int(logits.argmax()) if logits is not None else False


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"sampler": broken}, "sampler or stop_when failed: ValueError: out of ideas"),
        ({"stop_when": broken}, "sampler or stop_when failed: ValueError: out of ideas"),
        ({"sampler": lambda seq, logits: 320}, "token id 320 is outside the vocabulary of 320"),
        ({"sampler": lambda seq, logits: "a"}, "sampler or stop_when failed: TypeError"),
    ],
)
def test_a_function_that_fails_ends_its_own_request_only(
    params: dict[str, Any], message: str, tiny_llm: LLM
) -> None:
    expected = tiny_llm.complete("the fox", **GREEDY).token_ids
    requests = [tiny_llm.request("the fox", **{**GREEDY, **extra}) for extra in ({}, params, {})]
    deltas = list(tiny_llm.stream(requests, raise_errors=False))
    assert message in str(next(d.error for d in deltas if d.index == 1 and d.error))
    for index in (0, 2):
        assert [d.token_id for d in deltas if d.index == index] == expected
    with pytest.raises(RequestError, match=message):
        tiny_llm.complete("the fox", **{**GREEDY, **params})
    assert not tiny_llm.engine.has_work


def test_a_function_may_end_an_answer(tiny_llm: LLM) -> None:
    whole = tiny_llm.complete("the fox", **GREEDY)
    answer = tiny_llm.complete("the fox", **GREEDY, stop_when=lambda seq: seq.num_generated == 3)
    assert (answer.token_ids, answer.finish_reason) == (whole.token_ids[:3], "stop")
    assert whole.text.startswith(answer.text)
