"""A prompt that is too long: each API says so in its own form, with both numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import openai
import pytest
from serving import Live, serving

from nanollama import LLM

N_CTX = 256
TEXT = "word " * 300
BODIES: dict[str, dict[str, Any]] = {
    "/v1/chat/completions": {"messages": [{"role": "user", "content": TEXT}]},
    "/v1/completions": {"prompt": TEXT},
    "/v1/embeddings": {"input": TEXT},
    "/v1/responses": {"input": TEXT},
    "/v1/messages": {"messages": [{"role": "user", "content": TEXT}], "max_tokens": 8},
    "/api/chat": {"model": "model", "messages": [{"role": "user", "content": TEXT}]},
    "/api/generate": {"model": "model", "prompt": TEXT, "raw": True},
    "/api/embed": {"model": "model", "input": TEXT, "truncate": False},
}


@pytest.fixture(scope="module")
def live(tiny: Callable[..., Path]) -> Iterator[Live]:
    with serving(lambda: LLM(tiny(max_position_embeddings=N_CTX))) as live:
        yield live


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
@pytest.mark.parametrize("path", BODIES)
def test_the_error_has_both_numbers(live: Live, path: str, stream: bool) -> None:
    body = dict(BODIES[path])
    if "embed" not in path:
        body["stream"] = stream
    answer = live.http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    error, tokens = answer.json()["error"], live.pool.llm().encode(TEXT)
    message = error if isinstance(error, str) else error["message"]
    numbers = [int(word) for word in message.replace(",", " ").split() if word.isdigit()]
    assert len(numbers) == 2
    assert len(tokens) <= numbers[0] < len(tokens) + 40  # the template adds some
    assert numbers[1] == N_CTX
    if path == "/v1/messages":
        assert error["type"] == "invalid_request_error"
        assert message == f"prompt is too long: {numbers[0]} tokens > {N_CTX} maximum"
    elif path.startswith("/v1"):
        assert error["code"] == "context_length_exceeded"
        assert error["type"] == "invalid_request_error"


def test_the_clients_know_the_error(live: Live) -> None:
    ours: Any = {"base_url": f"{live.url}/v1", "api_key": "none", "max_retries": 0}
    with pytest.raises(openai.BadRequestError) as error:
        openai.OpenAI(**ours).chat.completions.create(
            model="model", **BODIES["/v1/chat/completions"]
        )
    assert error.value.code == "context_length_exceeded"
    theirs = anthropic.Anthropic(base_url=live.url, api_key="none", max_retries=0)
    with pytest.raises(anthropic.BadRequestError, match="prompt is too long"):
        theirs.messages.create(model="model", **BODIES["/v1/messages"])


def test_a_text_of_many_contexts_is_refused_early(live: Live) -> None:
    answer = live.chat("word " * 100_000)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (400, "context_length_exceeded")
    assert str(N_CTX) in error["message"]


def test_an_answer_without_a_limit_may_fill_the_context(live: Live) -> None:
    """To Codex, an answer that a lower limit cuts is an error."""
    free = {"ignore_eos": True}
    usage = live.http.post("/v1/responses", json={"input": "hello", **free}).json()["usage"]
    assert usage["total_tokens"] == N_CTX
    messages = [{"role": "user", "content": "hello"}]
    answer = live.http.post("/v1/chat/completions", json={"messages": messages, **free}).json()
    assert answer["usage"]["total_tokens"] == N_CTX
