"""What streams say, to be compared: their deltas, without what tells of time and of drafts."""

from __future__ import annotations

import dataclasses

from nanollama import LLM, Delta, GenerationRequest


def run(llm: LLM, requests: list[GenerationRequest]) -> list[list[Delta]]:
    """The deltas of each request, without what tells of time and of drafts."""
    answers: list[list[Delta]] = [[] for _ in requests]
    for delta in llm.stream(requests):
        usage = delta.usage and dataclasses.replace(
            delta.usage,
            queue_s=0,
            prefill_s=0,
            decode_s=0,
            cached_tokens=0,
            drafted_tokens=0,
            accepted_tokens=0,
        )
        answers[delta.index].append(dataclasses.replace(delta, index=0, usage=usage))
    return answers


def alone(llm: LLM, requests: list[GenerationRequest]) -> list[list[Delta]]:
    """Each request by itself, with nothing in the cache."""
    answers = []
    for one in requests:
        llm.engine.forget()
        answers += run(llm, [one])
    return answers
