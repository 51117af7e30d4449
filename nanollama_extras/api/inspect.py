"""Routes that show what a server does: its routes, its fields, its tokens and its load.

GET /openapi.json, /v1/capabilities, /stats and /tokenizer_info; POST /tokenize, /detokenize and
/apply-template, in the form of vLLM, which lm-eval speaks.

Seam       a dialect: a row of `nanollama.DIALECTS`.
Remove     delete this file and its row.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
from typing import TYPE_CHECKING, Any

from nanollama import (
    CHAT_FIELDS,
    CHATML,
    DIALECTS,
    HARMLESS,
    NEUTRAL,
    ExtraError,
    Handlers,
    OpenAI,
    Route,
    __version__,
    as_json,
    excerpt,
    load_dialect,
    parse_chat,
    preferred,
    read_fields,
    refuse,
    required,
    table,
    token_text,
)

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from nanollama import Engine, Json

# content, add_special and with_pieces are llama.cpp's
TOKENIZE_FIELDS = table(
    string="prompt content", boolean="add_special_tokens add_special with_pieces"
)
DETOKENIZE_FIELDS = table(array="tokens", string="model")


def all_routes() -> list[Route]:
    """The routes of the core and of every dialect that is installed."""
    routes = [*OpenAI.routes]
    for module in DIALECTS:
        with contextlib.suppress(ExtraError):
            routes += load_dialect(module).routes
    return routes


def openapi_body() -> Json:
    """The routes as an OpenAPI description (https://spec.openapis.org/oas/v3.1.1)."""
    paths: dict[str, Json] = {}
    for route in all_routes():
        for method, path in (name.split() for name in route.names):
            place = paths.setdefault(path.replace(":path", ""), {})
            place[method.lower()] = openapi_operation(route, method, path)
    info = {"title": "nanollama", "version": __version__}
    return {"openapi": "3.1.0", "info": info, "paths": paths}


def openapi_operation(route: Route, method: str, path: str) -> Json:
    """The description of a method of a path: parameters, body, answers."""
    answers = {"200": {"description": "the answer"}}
    if route.fields is not None or "{" in path:
        answers["4XX"] = {"description": "an error object that says what is wrong"}
    answers["503"] = {"description": "the model is still loading, or the server is ending"}
    slug = re.sub(r"\W+", "_", f"{method.lower()}{path}").strip("_")
    summary = (route.handler.__doc__ or "").strip().partition(": ")[2] or path
    body: Json = {"operationId": slug, "summary": " ".join(summary.split())}
    if names := re.findall(r"\{(\w+)", path):
        schema = {"type": "string", "minLength": 1}
        body["parameters"] = [
            {"name": name, "in": "path", "required": True, "schema": schema} for name in names
        ]
    if route.fields is not None:
        types = {name: kind.split(" or ") for name, kind in route.fields.items()}
        fields = {name: {"type": [*kinds, "null"]} for name, kinds in types.items()}
        schema = {"type": "object", "properties": fields, "required": list(route.required)}
        content = {"application/json": {"schema": schema}}
        body["requestBody"] = {"required": True, "content": content}
    return {**body, "responses": answers}


def engine_state(engine: Engine) -> Json:
    """The device, the load, and the totals since the start."""
    threads_used: Any = preferred("kernels.thread_choice", "threads_used", lambda _: {})
    return {
        "device": str(engine.decoder.device),
        "kernels": engine.decoder.kernels,
        "kv_dtype": engine.decoder.kv_dtype,
        **threads_used(engine),
        "running": len(engine.scheduler.running),
        "waiting": len(engine.scheduler.waiting),
        "slots": engine.num_slots,
        "kv_cache_bytes": engine.cache.nbytes,
        **dataclasses.asdict(engine.stats),
    }


class API(Handlers):
    """What a server shows of itself."""

    async def stats(self, request: Request) -> Response:
        """GET /stats: the load of each replica"""
        self.models.check_ready()
        rows = [
            {"gpu_id": index, "model": name, **engine_state(worker.llm.engine)}
            for name, pool in self.models.pools.items()
            for index, worker in enumerate(pool.workers)
            if worker.llm is not None
        ]
        num_busy = sum(worker.num_sequences > 0 for worker in self.models.workers)
        body = {
            "total_workers": len(rows),
            "available_workers": len(rows) - num_busy,
            "busy_workers": num_busy,
            "workers": rows,
        }
        return as_json(body)

    async def openapi(self, request: Request) -> Response:
        """GET /openapi.json: this API in the form of OpenAPI"""
        return as_json(openapi_body())

    async def capabilities(self, request: Request) -> Response:
        """GET /v1/capabilities: the fields of each route with their JSON types"""
        body = {
            **{name.split()[1]: r.fields for r in all_routes() for name in r.names if r.fields},
            "accepted_without_effect": HARMLESS,
            "refused_unless": {name: list(values) for name, values in NEUTRAL.items()},
            "other_fields": "refused" if self.config.strict else "named in x-nanollama-ignored",
        }
        return as_json(body)

    async def tokenize(self, request: Request) -> Response:
        """POST /tokenize {prompt | content | messages} -> {tokens, count, max_model_len}"""
        body, pool = await self.read_request(request)
        llm = pool.llm()
        if body.get("messages") is not None:
            chat = parse_chat(body, pool.sampling, opening=pool.source.opening).requests[0]
            ids, _ = await asyncio.to_thread(llm.encode_request, chat)
        else:
            given, _ = read_fields(body, TOKENIZE_FIELDS)
            is_prompt = "content" not in given  # llama.cpp adds special tokens when it is asked to
            text = required(given, "prompt" if is_prompt else "content")
            special = bool(given.get("add_special_tokens", given.get("add_special", is_prompt)))
            ids = await asyncio.to_thread(llm.encode, text, special)
        tokens: list[Any] = ids
        if body.get("with_pieces"):
            tokens = [{"id": i, "piece": token_text(llm.tokenizer, i)[0]} for i in ids]
        return as_json({"tokens": tokens, "count": len(ids), "max_model_len": llm.engine.n_ctx})

    async def detokenize(self, request: Request) -> Response:
        """POST /detokenize {tokens} -> {prompt}"""
        given, _ = read_fields(await self.body(request), DETOKENIZE_FIELDS)
        ids, llm = given.get("tokens", []), (await self.models.pool(given.get("model"))).llm()
        n_vocab = llm.engine.n_vocab
        for i in ids:
            if type(i) is not int or not 0 <= i < n_vocab:
                refuse(f"tokens has {excerpt(i)}, which is not a token id", "tokens")
        return as_json({"prompt": llm.decode(ids)})

    async def tokenizer_info(self, request: Request) -> Response:
        """GET /tokenizer_info"""
        template = (await self.models.pool(request.query_params.get("model"))).llm().template
        names = ("bos_token", "eos_token", "unk_token", "pad_token")
        words = {name: template.special_tokens.get(name) for name in names}
        return as_json({**words, "chat_template": template.source or CHATML})

    async def apply_template(self, request: Request) -> Response:
        """POST /apply-template, a chat request -> {prompt, tokens, pieces} as the model gets it"""
        body, pool = await self.read_request(request)
        llm = pool.llm()
        chat = parse_chat(body, pool.sampling, opening=pool.source.opening).requests[0]
        ids, text = await asyncio.to_thread(llm.encode_request, chat)
        pieces = [llm.tokenizer.piece(i) for i in ids]
        return as_json({"prompt": text, "tokens": ids, "pieces": pieces})

    routes = (
        Route(stats, ("GET /stats",)),
        Route(capabilities, ("GET /v1/capabilities",)),
        Route(openapi, ("GET /openapi.json",)),
        Route(tokenize, ("POST /tokenize",), table(TOKENIZE_FIELDS, CHAT_FIELDS)),
        Route(detokenize, ("POST /detokenize",), DETOKENIZE_FIELDS),
        Route(tokenizer_info, ("GET /tokenizer_info",)),
        Route(apply_template, ("POST /apply-template",), CHAT_FIELDS, ("messages",)),
    )
