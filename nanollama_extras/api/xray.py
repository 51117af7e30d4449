"""POST /xray: why a token of an answer was taken, for the page and other programs.

Adds       the candidates of one token through every stage of the sampler, as JSON.
Seam       a dialect (the row "api.xray" of `nanollama.DIALECTS`). Imports answers.stages.
Remove     delete this file and its row; the page then shows probabilities without stages.

A request is that of the chat, with `answer_ids`, the ids of the answer before the token, and
`token_id`, the token. The model runs for this token once more, after what is in its cache.
"""

from __future__ import annotations

import asyncio
import secrets
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from nanollama import (
    CHAT_FIELDS,
    Handlers,
    Route,
    as_json,
    excerpt,
    parse_chat,
    read_fields,
    refuse,
    table,
    unless_disconnected,
)
from nanollama_extras.answers.stages import probe_request, report

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from nanollama import GenerationRequest, Job

FIELDS = table(array="answer_ids", integer="token_id")


def read_ids(value: Any, n_vocab: int) -> list[int]:
    """Token ids of a body. Raises RequestError."""
    for i in value:
        if type(i) is not int or not 0 <= i < n_vocab:
            refuse(f"answer_ids has {excerpt(i)}, which is not a token id", "answer_ids")
    return list(value)


def check_free(chat: GenerationRequest) -> None:
    """Raise RequestError for an answer in a given form, whose constraint is not made here."""
    if form := chat.params.answer_field:
        refuse(f"the stages of an answer with a {form} are not shown", "response_format")
    if chat.tool_choice and chat.tool_choice.needs_tools:
        refuse("the stages of an answer with a tool_choice are not shown", "tool_choice")


class API(Handlers):
    """The stages of the sampler."""

    async def xray(self, request: Request) -> Response:
        """POST /xray: the candidates of a token of an answer through every stage of the sampler"""
        body, pool = await self.read_request(request)
        own, _ = read_fields({name: body.pop(name, None) for name in FIELDS}, FIELDS)
        wire = parse_chat(body, pool.sampling, self.config.strict, pool.source.opening)
        chat, llm = wire.requests[0], pool.llm()
        check_free(chat)
        n_vocab, token_id = llm.engine.n_vocab, own.get("token_id")
        if token_id is not None and not 0 <= token_id < n_vocab:
            refuse(f"token_id is {token_id}, which is not a token id", "token_id")
        answer = read_ids(own.get("answer_ids", []), n_vocab)
        if getattr(llm, "checkpoint", None) is None:
            refuse("a script has no stages; start the server with a model", "model")
        prompt, _ = await asyncio.to_thread(llm.encode_request, chat)
        seed = secrets.randbits(63) if chat.params.seed is None else chat.params.seed
        drawn = replace(chat, params=replace(chat.params, seed=seed))
        asked = probe_request(drawn, prompt, answer)
        job = await pool.start((asked,), wire.names)
        await unless_disconnected(request.receive, self.used(job), job.finish)
        found = report(asked.params.sampler, llm.tokenizer, token_id)
        # without a seed, the draw of this request is not that of the answer
        found["drawn_id"] = found["drawn_id"] if chat.params.seed is not None else None
        return as_json({**found, "cached_tokens": job.sequences[0].num_cached})

    async def used(self, job: Job) -> None:
        """Wait for the end of a job."""
        async for _ in self.watch(job):
            pass

    routes = (Route(xray, ("POST /xray",), table(FIELDS, CHAT_FIELDS), ("messages",)),)
