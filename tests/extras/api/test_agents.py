"""Requests that coding agents were seen to send, against a model: each is answered, and the second
request of a conversation finds the first one's prompt in the cache."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from agents import names, recorded
from serving import Live, serving

from nanollama import LLM

pytestmark = pytest.mark.xdist_group("agents")
SHORTER = 20  # texts, by this factor: a test machine reads few tokens a second


@pytest.fixture(scope="module")
def live(tiny: Callable[..., Path], smollm2: Path) -> Iterator[Live]:
    """A model of random weights with the vocabulary of SmolLM2 and a long context."""
    model = tiny(vocab_size=49152, max_position_embeddings=1 << 15, num_hidden_layers=1)
    load = lambda: LLM(model, tokenizer=str(smollm2), parallel=4)  # noqa: E731
    with serving(load, any_model=True) as live:
        yield live


def send(live: Live, request: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """The answer to a recorded request, whole and short."""
    body = {**request["body"], "stream": False, **changed}
    body.pop("stream_options", None)
    limit = "max_output_tokens" if "/responses" in request["path"] else "max_tokens"
    body.pop("max_completion_tokens", None)
    if "count_tokens" not in request["path"]:
        body[limit] = 2
    answer = live.http.post(request["path"], json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def tokens_read(answer: dict[str, Any]) -> tuple[int, int]:
    """Tokens of the prompt, and those that were in the cache."""
    usage = answer["usage"]
    if "cache_read_input_tokens" in usage:
        cached = usage["cache_read_input_tokens"]
        return usage["input_tokens"] + cached, cached
    if "input_tokens" in usage:
        return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


@pytest.mark.parametrize("name", names())
def test_each_request_is_answered_and_the_next_one_reads_its_prompt_from_the_cache(
    live: Live, name: str
) -> None:
    before = None
    for request in recorded(name, SHORTER):
        if request["method"] != "POST" or not request["body"]:
            assert live.http.request(request["method"], request["path"]).status_code == 200
            continue
        answer = send(live, request)
        if "count_tokens" in request["path"]:
            assert answer["input_tokens"] > 0
            continue
        num_prompt, num_cached = tokens_read(answer)
        body = request["body"]
        talk = body.get("messages") or body.get("input")
        if before and isinstance(talk, list) and len(talk) > len(before[0]) and before[1] > 50:
            assert num_cached >= before[1] - 1, json.dumps(answer["usage"])
        before = talk, num_prompt
