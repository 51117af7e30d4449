"""Reranking: POST /v1/rerank orders documents by how well they answer a query.

The body is Jina's and Cohere's, the answer has the fields of both.

Seam       a dialect: a row of `nanollama.DIALECTS`.
Needs      answers/ranks.py for the scores, api/embeddings.py to run the prompts.
Remove     delete this file and its row.
Spec       https://api.jina.ai/redoc#tag/rerank, https://docs.cohere.com/reference/rerank
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from nanollama import (
    GenerationRequest,
    Handlers,
    Route,
    as_json,
    check_type,
    excerpt,
    extra,
    ignored_header,
    read_fields,
    refuse,
    required,
    table,
)

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from nanollama import LLM, Delta, Fields, Json

FIELDS = table(
    string="model query instruction",
    array="documents",
    integer="top_n max_tokens_per_doc",
    boolean="return_documents",
)
MAX_DOCUMENTS = 2048


def read_documents(given: Fields) -> list[str]:
    """The texts of `documents`, each a string or an object with a text. Raises RequestError."""
    documents = required(given, "documents")
    if len(documents) > MAX_DOCUMENTS:
        refuse(f"documents has {len(documents)} texts; at most {MAX_DOCUMENTS} fit", "documents")
    texts: list[str] = []
    for i, document in enumerate(documents):
        text = document.get("text") if isinstance(document, dict) else document
        check_type(f"documents[{i}]", text, "string")
        texts.append(str(text))
    return texts


def rank_requests(given: Fields, texts: list[str], llm: LLM) -> tuple[GenerationRequest, ...]:
    """A request for each document. Raises RequestError for a model that does not rank."""
    ranker = extra("answers.ranks", "/v1/rerank").find_ranker(llm)
    query, most = given["query"], given.get("max_tokens_per_doc")
    if most is not None:
        texts = [llm.decode(llm.encode(text, False)[:most]) for text in texts]
    instruction = given.get("instruction", "")
    prompts = [ranker.prompt(llm, query, text, instruction) for text in texts]
    return tuple(GenerationRequest(prompt=ids, embed="rank") for ids in prompts)


def rerank_body(given: Fields, deltas: list[Delta], texts: list[str], model: str) -> Json:
    """The answer: the documents with the highest scores first."""
    scores = [delta.embedding[0] if delta.embedding else 0.0 for delta in deltas]
    order = sorted(range(len(scores)), key=lambda i: -scores[i])[: given.get("top_n")]
    results: list[Json] = [{"index": i, "relevance_score": scores[i]} for i in order]
    if given.get("return_documents"):
        results = [{**row, "document": {"text": texts[row["index"]]}} for row in results]
    num_tokens = sum(delta.usage.prompt_tokens for delta in deltas if delta.usage)
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
    return {"object": "list", "model": model, "results": results, "usage": usage}


class API(Handlers):
    """Jina's and Cohere's reranking."""

    async def rerank(self, request: Request) -> Response:
        """POST /v1/rerank: documents, ordered by how well they answer a query"""
        body, pool = await self.read_request(request)
        given, ignored = read_fields(body, FIELDS, self.config.strict)
        for name in ("top_n", "max_tokens_per_doc"):
            if given.get(name, 1) < 1:
                refuse(f"{name} is {excerpt(given[name])}; at least 1 is needed", name)
        texts: list[str] = read_documents(given)
        if not required(given, "query"):
            refuse("query is empty", "query")
        held: Any = getattr(pool, "held", contextlib.nullcontext)
        with held():  # a model that may come and go stays
            requests = await asyncio.to_thread(rank_requests, given, texts, pool.llm())
        embed = extra("api.embeddings", "/v1/rerank").embed
        deltas = await embed(self, request, pool, requests, "documents")
        answer = rerank_body(given, deltas, texts, given.get("model") or pool.source.name)
        return as_json(answer, headers=ignored_header(ignored))

    routes = (
        Route(
            rerank,
            ("POST /v1/rerank", "POST /v2/rerank", "POST /rerank"),
            FIELDS,
            ("query", "documents"),
        ),
    )
