"""Requests that come, go and are cancelled, each with the answer that it gets alone."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from nanollama import LLM, GenerationRequest, SamplingParams

PLAIN: dict[str, Any] = {"lookup": 0, "prompt_cache": None}  # of what others are compared with


def greedy(ids: list[int], num: int = 8) -> GenerationRequest:
    params = SamplingParams(temperature=0, repeat_penalty=1, max_tokens=num, ignore_eos=True)
    return GenerationRequest(prompt=ids, params=params)


def answer(llm: LLM, ids: list[int], num: int = 8) -> tuple[int, list[int]]:
    """The number of cached tokens, and the answer."""
    done = llm.complete(greedy(ids, num))
    return done.usage.cached_tokens, done.token_ids


def assert_company_changes_nothing(path: Path, num_steps: int, **options: Any) -> LLM:
    """Run a model for so many steps, with prompts that begin alike and next turns -> the model"""
    rng = random.Random(1)
    llm = LLM(path, parallel=3, prefill_chunk=24, **options)
    alone = LLM(path, parallel=1, prefill_chunk=512, state_mb=0, **{**options, **PLAIN})
    texts = [[rng.randrange(2, 40) for _ in range(50)] for _ in range(3)]
    known: dict[tuple[int, ...], list[int]] = {}
    running: list[Any] = []
    num_checked = num_cached = 0
    for _ in range(num_steps):
        if rng.random() < 0.15:
            base = rng.choice(texts)
            prompt = base[: rng.randrange(1, len(base))] + [rng.randrange(2, 320)] * rng.randrange(
                3
            )
            running.append((prompt, llm.start(greedy(prompt, rng.randrange(1, 20)))))
        if running and rng.random() < 0.03:
            llm.engine.cancel(running.pop(rng.randrange(len(running)))[1])
        if llm.engine.has_work:
            llm.engine.step()
        for item in [item for item in running if item[1].finish_reason]:
            running.remove(item)
            prompt, seq = item
            key = tuple(prompt)
            if key not in known:
                alone.engine.forget()
                known[key] = answer(alone, prompt, 20)[1]
            given = seq.token_ids[len(prompt) :]
            assert given == known[key][: len(given)]
            num_checked, num_cached = num_checked + 1, num_cached + seq.num_cached
            if rng.random() < 0.5:  # the next turn
                texts[rng.randrange(3)] = [*seq.token_ids, 3, 9, 4][-200:]
    assert num_checked > 30
    assert num_cached > 200
    return llm
