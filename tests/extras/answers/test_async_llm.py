"""AsyncLLM and LLM.astream: the same answers, in a program of asyncio."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nanollama import LLM, AsyncLLM, RequestError

GREEDY: dict[str, Any] = {"temperature": 0, "repeat_penalty": 1, "max_tokens": 8}
LONG: dict[str, Any] = {**GREEDY, "max_tokens": 200, "ignore_eos": True}


async def until_idle(llm: LLM) -> None:
    while llm.engine.has_work:
        await asyncio.sleep(0.01)


async def test_a_stream_has_the_deltas_of_llm_stream(tiny_llm: LLM) -> None:
    requests = ["the fox", "a dog"]
    expected = list(tiny_llm.stream(requests, **GREEDY))
    found = [delta async for delta in tiny_llm.astream(requests, **GREEDY)]
    assert [(d.index, d.token_id, d.text) for d in found] == [
        (d.index, d.token_id, d.text) for d in expected
    ]


async def test_many_answers_at_once_are_those_that_each_gets_alone(tiny_llm: LLM) -> None:
    llm, texts = AsyncLLM(tiny_llm), ["fox", "the quick", "dog " * 9] * 3
    answers = await asyncio.gather(*(llm.complete(text, **GREEDY) for text in texts))
    assert [a.token_ids for a in answers] == [
        tiny_llm.complete(text, **GREEDY).token_ids for text in texts
    ]


async def test_chat_takes_what_llm_chat_takes(tiny_llm: LLM) -> None:
    expected = tiny_llm.chat("the quick", **GREEDY)
    answer = await AsyncLLM(tiny_llm).chat(["the quick"], **GREEDY)
    assert (answer.text, answer.finish_reason) == (expected.text, expected.finish_reason)


async def test_a_model_is_loaded_beside_other_tasks(tiny: Callable[..., Path]) -> None:
    llm = await AsyncLLM.load(tiny(), ctx=64)
    assert repr(llm).startswith("Async<LLM ")
    assert llm.llm.engine.n_ctx == 64


async def test_a_stream_that_is_left_or_cancelled_ends_its_sequences(tiny_llm: LLM) -> None:
    stream = tiny_llm.astream("the fox", **LONG)
    async for _ in stream:
        break
    await stream.aclose()  # type: ignore[attr-defined]
    await asyncio.wait_for(until_idle(tiny_llm), 30)
    task = asyncio.create_task(AsyncLLM(tiny_llm).complete("the fox", **LONG))
    while not tiny_llm.engine.has_work:
        await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await asyncio.wait_for(until_idle(tiny_llm), 30)


async def test_an_error_is_raised_where_the_answer_is_awaited(tiny_llm: LLM) -> None:
    with pytest.raises(RequestError, match="no field 'temprature'"):
        await AsyncLLM(tiny_llm).complete("the fox", temprature=1)
