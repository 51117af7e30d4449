"""OpenAI's embeddings: POST /v1/embeddings answers each text with a vector.

Seam       a dialect: a row of `nanollama.DIALECTS`. `embed` also serves Ollama's API
           and api.rerank.
Remove     delete this file and its row; api/ollama.py imports it, so its embeddings go as well.
Spec       https://platform.openai.com/docs/api-reference/embeddings
"""

from __future__ import annotations

import base64
import math
import struct
from typing import TYPE_CHECKING, Any

from nanollama import (
    GenerationRequest,
    Handlers,
    Route,
    WireRequest,
    as_json,
    excerpt,
    ignored_header,
    read_fields,
    read_prompts,
    refuse,
    table,
    unless_disconnected,
)

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from nanollama import Delta, Fields, Job, Json, Pool

EMBED_FIELDS = table(string_or_array="input", string="model encoding_format", integer="dimensions")
MAX_INPUTS = 2048
TEXTS_AT_ONCE = 32  # of one request, so that other requests come in between


def parse_embed(body: Fields, strict: bool = False) -> tuple[WireRequest, Json]:
    """A body of /v1/embeddings -> the request and the fields of the body. Raises RequestError."""
    given, ignored = read_fields(body, EMBED_FIELDS, strict)
    prompts = read_prompts(given, "input")
    if len(prompts) > MAX_INPUTS or "" in prompts:
        refuse(f"input must have 1 to {MAX_INPUTS} texts, none of them empty", "input")
    form = given.get("encoding_format", "float")
    if form not in ("float", "base64"):
        refuse(f"encoding_format is {excerpt(form)}; use float or base64", "encoding_format")
    requests = tuple(GenerationRequest(prompt=prompt, embed=True) for prompt in prompts)
    return WireRequest(requests, given.get("model"), ignored=ignored), given


def cut_embedding(vector: list[float], dimensions: int | None) -> list[float]:
    """The first `dimensions` numbers, scaled to unit length, as models trained for it expect
    (https://arxiv.org/abs/2205.13147). Raises RequestError for more than there are."""
    if dimensions is None:
        return vector
    if not 1 <= dimensions <= len(vector):
        refuse(f"dimensions is {dimensions}; this model gives 1 to {len(vector)}", "dimensions")
    length = math.sqrt(sum(x * x for x in vector[:dimensions])) or 1.0
    return [x / length for x in vector[:dimensions]]


def embed_body(deltas: list[Delta], given: Fields, model: str) -> Json:
    """The answer to a body of /v1/embeddings: one delta for each input, in order."""
    data = []
    for index, delta in enumerate(deltas):
        vector: Any = cut_embedding(delta.embedding or [], given.get("dimensions"))
        if given.get("encoding_format") == "base64":
            vector = base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        data.append({"object": "embedding", "index": index, "embedding": vector})
    num_tokens = sum(delta.usage.prompt_tokens for delta in deltas if delta.usage)
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "data": data, "model": model, "usage": usage}


async def embed(
    api: Handlers,
    request: Request,
    pool: Pool,
    prompts: tuple[GenerationRequest, ...],
    name: str = "input",
) -> list[Delta]:
    """The last delta of each prompt, which has its embedding. name: the prompts' field, for
    errors."""

    async def read(job: Job) -> list[Delta]:
        last = {delta.index: delta async for deltas in api.watch(job) for delta in deltas}
        return [last[i] for i in range(len(last))]

    embedded: list[Delta] = []
    for at in range(0, len(prompts), TEXTS_AT_ONCE):
        job = await pool.start(prompts[at : at + TEXTS_AT_ONCE], {"prompt": name})
        embedded += await unless_disconnected(request.receive, read(job), job.finish)
    return embedded


class API(Handlers):
    """OpenAI's embeddings."""

    async def embeddings(self, request: Request) -> Response:
        """POST /v1/embeddings"""
        body, pool = await self.read_request(request)
        wire, given = parse_embed(body, self.config.strict)
        deltas = await embed(self, request, pool, wire.requests)
        answer = embed_body(deltas, given, wire.model or pool.source.name)
        return as_json(answer, headers=ignored_header(wire.ignored))

    routes = (
        Route(embeddings, ("POST /v1/embeddings", "POST /embeddings"), EMBED_FIELDS, ("input",)),
    )
