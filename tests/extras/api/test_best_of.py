"""`best_of`: the likeliest answers of several, by the log-probabilities that each has alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from serving import Live, serving

import nanollama


@pytest.fixture(scope="module")
def live(tiny: Callable[..., Path]) -> Iterator[Live]:
    with serving(lambda: nanollama.LLM(tiny())) as live:
        yield live


@pytest.mark.parametrize("echo", [False, True])
def test_the_likeliest_answers_are_kept(live: Live, echo: bool) -> None:
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="any")
    body: Any = {"model": "model", "prompt": ["hello", "the quick"], "max_tokens": 6}
    body |= {"seed": 5, "temperature": 2, "echo": echo}
    every = client.completions.create(**body, n=5, logprobs=0)
    best = client.completions.create(**body, n=2, best_of=5)

    def mean(choice: Any) -> float:
        own = choice.logprobs.token_logprobs[-6:]
        return sum(own) / len(own)

    expected: list[str] = []
    for choices in (every.choices[:5], every.choices[5:]):
        expected += [choice.text for choice in sorted(choices, key=mean, reverse=True)[:2]]
    assert [choice.text for choice in best.choices] == expected
    assert [choice.index for choice in best.choices] == [0, 1, 2, 3]
    assert all(choice.logprobs is None for choice in best.choices)
    assert best.usage.completion_tokens == every.usage.completion_tokens == 2 * 5 * 6
    assert best.usage.prompt_tokens == every.usage.prompt_tokens


def test_log_probabilities_come_if_they_are_wanted(live: Live) -> None:
    body = {"max_tokens": 3, "best_of": 2, "logprobs": 2, "seed": 5}
    (choice,) = live.text(**body).json()["choices"]
    own = choice["logprobs"]
    assert len(own["tokens"]) == len(own["top_logprobs"]) == 3
    # two candidates and the chosen token; those that spell the same text are one entry
    assert all(text in top for text, top in zip(own["tokens"], own["top_logprobs"]))
    assert all(len(top) <= 3 for top in own["top_logprobs"])
