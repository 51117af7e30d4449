"""A limit on thoughts, with a model whose thoughts and answer are known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx
import pytest
from puppets import CHATML, write
from serving import serving

from nanollama import LLM, GenerationRequest, RequestError, SamplingParams

WORDS = [f"w{i} " for i in range(20)]
SCRIPT = ["<think>", *WORDS, "</think>", "yes"]
OPENING = CHATML.replace("assistant\n", "assistant\n<think>")
MARKED = "{# <think> </think> #}"
SWITCH = "{# reasoning_effort enable_thinking #}"


def puppet(path: Path, template: str = CHATML, script: Any = SCRIPT, **tokens: Any) -> LLM:
    tokens = tokens or {"user": ("<think>", "</think>")}
    return LLM(write(path, script, template=template + MARKED, **tokens))


def said(llm: LLM, budget: int | None = None, effort: str | None = None, **params: Any) -> str:
    """The answer to a question, thoughts with their tags."""
    sampling = SamplingParams(
        temperature=0, max_tokens=60, repeat_penalty=1, thinking_budget=budget, **params
    )
    kwargs = {"reasoning_effort": effort} if effort else {}
    messages = [{"role": "user", "content": "?"}]
    request = GenerationRequest(messages=messages, params=sampling, template_kwargs=kwargs)
    return llm.complete(request).text


@pytest.mark.parametrize("budget", [0, 1, 5, 19, 20, 21, None])
@pytest.mark.parametrize("kind", ["user", "control"])
def test_a_thought_ends_after_its_budget(tmp_path: Path, budget: int | None, kind: str) -> None:
    llm = puppet(tmp_path, **{kind: ("<think>", "</think>")})
    words = "".join(WORDS[:budget])
    assert said(llm, budget) == f"<think>{words}</think>yes"


@pytest.mark.parametrize("budget", [0, 3, None])
def test_a_thought_that_the_prompt_has_opened_ends_too(tmp_path: Path, budget: int | None) -> None:
    llm = puppet(tmp_path, OPENING)
    assert said(llm, budget) == f"{''.join(WORDS[:budget])}</think>yes"


def test_an_answer_without_thoughts_is_as_it_was(tmp_path: Path) -> None:
    assert said(puppet(tmp_path, script=["one ", "two ", "three"]), 1) == "one two three"


def test_the_form_of_an_answer_holds_after_a_short_thought(tmp_path: Path) -> None:
    assert said(puppet(tmp_path), 2, regex="yes|no") == "<think>w0 w1 </think>yes"


def test_several_answers_have_a_budget_each(tmp_path: Path) -> None:
    llm = puppet(tmp_path)
    params = SamplingParams(temperature=0, max_tokens=60, repeat_penalty=1, thinking_budget=3)
    request = GenerationRequest(messages=[{"role": "user", "content": "?"}], params=params)
    prepared = llm.prepare(request)
    for _ in range(2):
        assert llm.complete(prepared).text == "<think>w0 w1 w2 </think>yes"


def test_guessed_tokens_keep_the_budget(tmp_path: Path) -> None:
    path = write(tmp_path, SCRIPT, user=("<think>", "</think>"), template=CHATML + MARKED)
    llm = LLM(path, lookup=4)
    for _ in range(2):
        assert said(llm, 6) == f"<think>{''.join(WORDS[:6])}</think>yes"


@pytest.mark.parametrize(
    ("effort", "template", "is_cut"),
    [
        ("none", CHATML, True),
        ("none", CHATML + SWITCH, False),
        ("high", CHATML, False),
        ("max", CHATML, False),
    ],
)
def test_an_effort_is_a_budget_where_the_template_has_no_switch(
    tmp_path: Path, effort: str, template: str, is_cut: bool
) -> None:
    words = "" if is_cut else "".join(WORDS)
    assert said(puppet(tmp_path, template), effort=effort) == f"<think>{words}</think>yes"


def test_each_api_has_the_budget(tmp_path: Path) -> None:
    llm = puppet(tmp_path)
    question = [{"role": "user", "content": "?"}]
    greedy = {"temperature": 0, "max_tokens": 60}
    with serving(lambda: llm) as live:

        def post(path: str, **body: Any) -> httpx.Response:
            return live.http.post(path, json={"messages": question, **body})

        chat = post("/v1/chat/completions", thinking_budget=2, **greedy).json()
        assert chat["choices"][0]["message"]["reasoning_content"] == "w0 w1 "
        thinking = {"type": "enabled", "budget_tokens": 2}
        message = post("/v1/messages", thinking=thinking, **greedy).json()
        assert [block["type"] for block in message["content"]] == ["thinking", "text"]
        assert message["content"][0]["thinking"] == "w0 w1 "
        options = {"temperature": 0, "thinking_budget": 2}
        ollama = post("/api/chat", model="model", stream=False, options=options).json()
        assert ollama["message"]["thinking"] == "w0 w1 "
        body = {"input": "?", "thinking_budget": 2, "temperature": 0}
        response = live.http.post("/v1/responses", json=body).json()
        assert response["output"][0]["content"][0]["text"] == "w0 w1 "
        wrong = post("/v1/messages", thinking={"type": "enabled", "budget_tokens": -1}, **greedy)
        assert wrong.json()["error"]["message"].startswith("thinking.budget_tokens is -1")


def test_a_budget_is_a_number() -> None:
    with pytest.raises(RequestError, match="thinking_budget is -1"):
        SamplingParams(thinking_budget=-1)
