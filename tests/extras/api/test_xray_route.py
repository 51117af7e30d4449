"""/xray: the stages of the sampler over HTTP."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Live, serving

import nanollama

SAID = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def live(tiny: Callable[..., Path]) -> Iterator[Live]:
    with serving(lambda: nanollama.LLM(tiny(), parallel=2)) as live:
        yield live


def test_each_token_of_an_answer_is_the_one_that_its_stages_draw(live: Live) -> None:
    fields: dict[str, Any] = {"seed": 3, "presence_penalty": 1.0, "top_p": 0.8, "max_tokens": 6}
    answer = live.chat(logprobs=True, **fields).json()["choices"][0]
    ids = [entry["id"] for entry in answer["logprobs"]["content"]]
    assert len(ids) >= 3
    for i, token_id in enumerate(ids):
        body = {"messages": SAID, "answer_ids": ids[:i], **fields, "token_id": token_id}
        found = live.http.post("/xray", json=body).json()
        assert found["drawn_id"] == token_id == found["token_id"]
        logprob = answer["logprobs"]["content"][i]["logprob"]
        assert found["surprise_bits"] == pytest.approx(-logprob / 0.693147, abs=1e-3)
        assert [stage["name"] for stage in found["stages"]][-1] == "top-p"
        assert "presence" in [stage["name"] for stage in found["stages"]] or not i
    assert found["cached_tokens"] > len(ids)


def test_without_a_seed_no_draw_is_shown(live: Live) -> None:
    found = live.http.post("/xray", json={"messages": SAID, "token_id": 7}).json()
    assert (found["drawn_id"], found["token_id"]) == (None, 7)
    assert len(found["candidates"]) == len(found["stages"][0]["values"])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"answer_ids": [5, "x"]}, "answer_ids"),
        ({"answer_ids": [-1]}, "answer_ids"),
        ({"answer_ids": "x"}, "answer_ids"),
        ({"token_id": 10**6}, "token_id"),
        ({"messages": []}, "messages"),
        ({"guided_regex": "a"}, "response_format"),
    ],
)
def test_mistakes_are_named(fields: dict[str, Any], param: str, live: Live) -> None:
    answer = live.http.post("/xray", json={"messages": SAID, **fields})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_script_has_no_stages() -> None:
    with nanollama.TestServer("hi") as server:
        answer = httpx.post(f"{server.url}/xray", json={"messages": SAID})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
