"""Ollama's API: POST /api/chat, /api/generate, /api/embed and /api/embeddings.

A body is translated to OpenAI's chat; the pieces of the answer become Ollama's lines. The routes
about models are in api.ollama_models; vectors come from api.embeddings, models from api.shelf, and
the options without effect from files.parameters.

Seam       a dialect: a row of `nanollama.DIALECTS`; the core asks for `error_body`.
Remove     delete this file, api/ollama_models.py and the row.
Spec       https://github.com/ollama/ollama/blob/main/docs/api.md
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanollama import (
    SAMPLING_FIELDS,
    ChatReply,
    GenerationRequest,
    Route,
    as_json,
    check_type,
    excerpt,
    extra,
    ignored_header,
    parse_chat,
    read_fields,
    refuse,
    table,
)
from nanollama_extras.api.ollama_models import NDJSON, ModelHandlers, ollama_name, timestamp
from nanollama_extras.api.shelf import parse_duration
from nanollama_extras.files.parameters import WITHOUT_EFFECT

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from nanollama import (
        LLM,
        AnswerSplitter,
        Delta,
        Fields,
        Json,
        NanollamaError,
        Sequence,
        WireRequest,
    )
    from nanollama_extras.api.shelf import ShelfPool

OLLAMA_COMMON = table(string="model", object="options", string_or_number="keep_alive")


OLLAMA_ANSWER = table(
    OLLAMA_COMMON,
    boolean="stream logprobs",
    string_or_object="format",
    boolean_or_string="think",
    integer="top_logprobs",
)


OLLAMA_CHAT = table(OLLAMA_ANSWER, array="messages tools")


OLLAMA_GENERATE = table(
    OLLAMA_ANSWER,
    string="prompt system suffix",
    boolean="raw",
    array="context",
    string_or_array="images",  # an array: an error about a string would show what is in it
)


OLLAMA_EMBED = table(
    OLLAMA_COMMON, string_or_array="input", boolean="truncate", integer="dimensions"
)


OLLAMA_EMBEDDINGS = table(OLLAMA_COMMON, string="prompt")


# `options`: SamplingParams fields, num_predict for max_tokens, and options without effect here
OLLAMA_OPTIONS = table(
    {name: kind for name, kind in SAMPLING_FIELDS.items() if name != "logit_bias"},
    integer="num_predict",
)


# without effect on a model in memory
OLLAMA_LOAD_OPTIONS = {"num_ctx", "num_thread", *(n for n, v in WITHOUT_EFFECT.items() if not v)}
OLLAMA_NEUTRAL_OPTIONS = {name: values for name, values in WITHOUT_EFFECT.items() if values}


OLLAMA_NAMES = {"content": "content", "thought": "thinking"}  # piece of an answer -> Ollama's field


def ollama_body(given: Fields, strict: bool = False) -> tuple[Json, tuple[str, ...]]:
    """The fields of a body of /api/chat or /api/generate as those of /v1/chat/completions, and the
    options without effect. Raises RequestError."""
    options, ignored = read_fields(
        given.get("options", {}), OLLAMA_OPTIONS, strict=False, neutral=OLLAMA_NEUTRAL_OPTIONS
    )
    if unknown := [name for name in ignored if strict and name not in OLLAMA_LOAD_OPTIONS]:
        refuse(f"option {unknown[0]!r} is not known (the server is strict)", "options")
    shared = ("logprobs", "top_logprobs", "tools")
    body: Json = {name: given[name] for name in shared if name in given}
    body |= {name: value for name, value in options.items() if name != "num_predict"}
    if "num_predict" in options:  # -2 fills the context, as -1 does here
        body["max_tokens"] = max(options["num_predict"], -1) or 1
    form = given.get("format") or None
    if isinstance(form, dict):
        body["json_schema"] = form
    elif form == "json":
        body["response_format"] = {"type": "json_object"}
    elif form is not None:
        refuse(f"format is {excerpt(form)}; use json or a JSON Schema", "format")
    think = given.get("think")
    if isinstance(think, str):
        body["reasoning_effort"] = think
    elif think is not None:
        body["chat_template_kwargs"] = {"enable_thinking": think}
    if "messages" in given:
        body["messages"] = ollama_messages(given["messages"])
    else:
        system = [{"role": "system", "content": given["system"]}] if given.get("system") else []
        content = with_images(given["prompt"], given.get("images"), "images")
        body["messages"] = [*system, {"role": "user", "content": content}]
    return body, tuple(f"options.{name}" for name in ignored)


def ollama_messages(messages: list[Any]) -> list[Any]:
    """Ollama's messages as OpenAI's, whose tool calls have ids for the results to name."""
    out, num_calls, latest, answered = [], 0, list[dict[str, Any]](), set[str]()
    for i, message in enumerate(messages):
        check_type(f"messages[{i}]", message, "object")
        one = {
            k: v for k, v in message.items() if v is not None and k not in ("images", "thinking")
        }
        one.setdefault("content", "")
        one["content"] = with_images(one["content"], message.get("images"), f"messages[{i}].images")
        if message.get("thinking"):
            one["reasoning_content"] = message["thinking"]
        calls, where = [], f"messages[{i}].tool_calls"
        check_type(where, message.get("tool_calls") or [], "array")
        for call in message.get("tool_calls") or []:
            check_type(where, call, "object")
            check_type(where, call.get("function"), "object")
            given, num_calls = call.get("id"), num_calls + 1
            call_id = given if given and isinstance(given, str) else f"call_{num_calls - 1}"
            calls.append({"id": call_id, "type": "function", "function": call["function"]})
        if calls:
            one["tool_calls"], latest, answered = calls, calls, set()
        if message.get("role") == "tool":
            one["tool_call_id"] = answered_call(message, latest, answered)
            answered.add(one["tool_call_id"])
            one |= {"name": message["tool_name"]} if message.get("tool_name") else {}
        out.append(one)
    return out


def with_images(text: Any, files: Any, where: str) -> Any:
    """The content of a message with images in base64, which come before its text. Raises
    RequestError."""
    if not files:
        return text
    if not isinstance(files, list):
        refuse(f"{where} must be a list of images in base64", where)
    check_type(where.removesuffix("images") + "content", text, "string")
    base64_part = extra("answers.images", "an image").base64_part
    parts = [base64_part(file, f"{where}[{i}]") for i, file in enumerate(files)]
    return [*parts, {"type": "text", "text": text}]


def answered_call(message: Json, calls: list[Json], answered: set[str]) -> str:
    """The id of the call whose result a message is: the one that it names by id or function, else
    the first that has no result yet."""
    if given := message.get("tool_call_id"):
        return str(given)
    left = [call for call in calls if call["id"] not in answered] or calls[-1:]
    name = message.get("tool_name")
    named = [call for call in left if call["function"].get("name") == name]
    return next((str(call["id"]) for call in named or left), "")


@dataclass(frozen=True, slots=True)
class Clock:
    """The time of a request (time.perf_counter), and its wait for the model."""

    started_s: float
    load_s: float

    def durations(self) -> dict[str, int]:
        total = time.perf_counter() - self.started_s
        return {"total_duration": int(total * 1e9), "load_duration": int(self.load_s * 1e9)}


def ollama_line(model: str, is_chat: bool, pieces: Fields, **fields: Any) -> Json:
    """One object of an answer, whose pieces are a message or a response; None fields are left
    out."""
    head = {"model": model, "created_at": timestamp()}
    pieces, fields = {"content": "", **pieces}, {k: v for k, v in fields.items() if v is not None}
    if is_chat:
        return {**head, "message": {"role": "assistant", **pieces}, **fields}
    return {**head, "response": pieces.pop("content"), **pieces, **fields}


class OllamaReply(ChatReply):
    """An answer of /api/chat or /api/generate. With `with_context`, its last line has the ids of
    prompt and answer."""

    def __init__(
        self,
        seq: Sequence,
        splitter: AnswerSplitter,
        model: str,
        clock: Clock,
        is_chat: bool,
        with_context: bool,
    ) -> None:
        super().__init__(seq, splitter)
        self.line = functools.partial(ollama_line, model, is_chat)
        self.clock, self.with_context = clock, with_context

    def push(self, delta: Delta) -> list[Json]:
        return [
            self.line({OLLAMA_NAMES[kind]: text}, done=False, logprobs=entries or None)
            for kind, text, entries in self.read(delta)
            if kind != "call"
        ]

    def tool_calls(self) -> list[Json]:
        """The calls, whose arguments are objects here: those of a call that was cut end where the
        text ended."""
        tools: Any = extra("answers.tools", "a tool call") if self.calls else None
        calls = []
        for index, call in enumerate(self.calls):
            arguments = tools.arguments_object(call["function"]["arguments"])
            function = {"index": index, **call["function"], "arguments": arguments}
            calls.append({"id": call["id"], "function": function})
        return calls

    def end(self) -> list[Json]:
        calls = self.tool_calls()
        before = [self.line({"tool_calls": calls}, done=False)] if calls else []
        return [*before, self.line({}, done=True, **self._closing())]

    def _closing(self) -> Json:
        usage = self.usage
        assert usage is not None
        return {
            "done_reason": "length" if self.finish_reason == "length" else "stop",
            "context": list(self.seq.token_ids) if self.with_context else None,
            **self.clock.durations(),
            "prompt_eval_count": usage.prompt_tokens,
            "prompt_eval_duration": int(usage.prefill_s * 1e9),
            "eval_count": usage.completion_tokens,
            "eval_duration": int(usage.decode_s * 1e9),
        }

    def result(self) -> Json:
        pieces: Json = {OLLAMA_NAMES[kind]: text for kind, text in self.text.items()}
        pieces["tool_calls"] = self.tool_calls()
        pieces = {name: value for name, value in pieces.items() if value}
        return self.line(pieces, done=True, logprobs=self.logprobs, **self._closing())


def generate_wire(given: Fields, wire: WireRequest, llm: LLM) -> WireRequest:
    """The request of /api/generate, whose prompt stays as it is (raw), stands before a gap that a
    suffix ends, or follows the ids of a context."""
    context, request = given.get("context") or [], wire.requests[0]
    if any(type(i) is not int or not 0 <= i < llm.engine.n_vocab for i in context):
        refuse("context must list token ids of the model", "context")
    suffix = given.get("suffix") or ""
    if given.get("images") and (suffix or given.get("raw") or context):
        refuse("images cannot be combined with raw, suffix or context", "images")
    if suffix or given.get("raw"):
        prompt: str | list[int] = given["prompt"]
    elif context:
        prompt = [*context, *llm.encode_request(request)[0]]
    else:
        return wire
    one = dataclasses.replace(
        request, messages=None, prompt=prompt, suffix=suffix, template_kwargs={}
    )
    return dataclasses.replace(wire, requests=(one,))


def error_body(error: NanollamaError) -> Json:
    """The error object of Ollama's API."""
    return {"error": str(error)}


class API(ModelHandlers):
    """Ollama's API."""

    @property
    def embeddings(self) -> Any:
        """The module of OpenAI's embeddings. Raises ExtraError."""
        return extra("api.embeddings", "an embedding")

    async def ollama_pool(self, given: Fields) -> tuple[ShelfPool, Clock]:
        """The model that a body names, loaded, with the idle time of the body."""
        started = time.perf_counter()
        keep = given.get("keep_alive")
        keep_s = None if keep is None else parse_duration(keep)
        pool = await self.models.pool(ollama_name(given), keep_s)
        return pool, Clock(started, time.perf_counter() - started)

    async def ollama_chat(self, request: Request) -> Response:
        """POST /api/chat"""
        return await self.ollama_answer(request, OLLAMA_CHAT)

    async def ollama_generate(self, request: Request) -> Response:
        """POST /api/generate"""
        return await self.ollama_answer(request, OLLAMA_GENERATE)

    async def ollama_answer(self, request: Request, fields: Mapping[str, str]) -> Response:
        """Answer a body, as a stream unless it has `stream: false`."""
        given, ignored = await self.ollama_given(request, fields)
        is_chat = "messages" in fields
        if not given.get("messages" if is_chat else "prompt"):
            return await self.ollama_load(given, is_chat)
        body, without_effect = ollama_body(given, self.config.strict)
        pool, clock = await self.ollama_pool(given)
        # as a default, temperature may be above 2, the limit of OpenAI's API
        heat = {"temperature": body.pop("temperature")} if "temperature" in body else {}
        wire = parse_chat(body, {**pool.sampling, **heat}, False, pool.source.opening)
        if not is_chat:
            with pool.held():
                wire = await asyncio.to_thread(generate_wire, given, wire, pool.llm())
        job = await pool.start(wire.requests, wire.names)
        with_context = not is_chat and not given.get("raw") and not given.get("images")
        seq, splitter = job.sequences[0], job.prepared[0].splitter()
        reply = OllamaReply(seq, splitter, given["model"], clock, is_chat, with_context)
        is_stream = given.get("stream", True)
        return await self.answer(
            request, job, reply, NDJSON, is_stream, (*ignored, *without_effect)
        )

    async def ollama_load(self, given: Fields, is_chat: bool) -> Response:
        """Load or unload the model of a body without a prompt."""
        name, keep, reason = ollama_name(given), given.get("keep_alive"), "load"
        if keep is not None and parse_duration(keep) == 0:
            self.models.check_ready()
            if pool := self.models.pools.get((await self.models.source(name)).name):
                pool.keep_s = 0
                self.models.note_use(pool)
            reason = "unload"
        else:
            await self.ollama_pool(given)
        return as_json(ollama_line(name, is_chat, {}, done=True, done_reason=reason))

    async def ollama_embed(self, request: Request) -> Response:
        """POST /api/embed"""
        given, ignored = await self.ollama_given(request, OLLAMA_EMBED)
        cuts = given.get("truncate", True)
        deltas, clock = await self.ollama_vectors(request, given, "input", cuts)
        cut, dimensions = self.embeddings.cut_embedding, given.get("dimensions") or None
        body = {
            "model": given["model"],
            "embeddings": [cut(delta.embedding or [], dimensions) for delta in deltas],
            **clock.durations(),
            "prompt_eval_count": sum(delta.usage.prompt_tokens for delta in deltas if delta.usage),
        }
        return as_json(body, headers=ignored_header(ignored))

    async def ollama_embeddings(self, request: Request) -> Response:
        """POST /api/embeddings, superseded by /api/embed"""
        given, ignored = await self.ollama_given(request, OLLAMA_EMBEDDINGS)
        deltas, _ = await self.ollama_vectors(request, given, "prompt", True)
        body = {"embedding": deltas[0].embedding if deltas else []}
        return as_json(body, headers=ignored_header(ignored))

    async def ollama_vectors(
        self, request: Request, given: Fields, name: str, cuts: bool
    ) -> tuple[list[Delta], Clock]:
        """The embedding of each text of a field. With `cuts`, long texts are cut to the context."""
        texts = given.get(name) or []
        texts = [texts] if isinstance(texts, str) else texts
        limit = self.embeddings.MAX_INPUTS
        pool, clock = await self.ollama_pool(given)
        if len(texts) > limit or not all(isinstance(text, str) and text for text in texts):
            refuse(f"input must have up to {limit} texts, none of them empty", "input")
        llm = pool.llm()

        def encode() -> list[list[int]]:
            encoded = [llm.encode(text) for text in texts]
            return [ids[: llm.engine.n_ctx] for ids in encoded] if cuts else encoded

        with pool.held():
            ids = await asyncio.to_thread(encode)
        requests = tuple(GenerationRequest(prompt=text_ids, embed=True) for text_ids in ids)
        return await self.embeddings.embed(self, request, pool, requests), clock

    routes = (
        Route(ollama_chat, ("POST /api/chat",), OLLAMA_CHAT, ("model",)),
        Route(ollama_generate, ("POST /api/generate",), OLLAMA_GENERATE, ("model",)),
        Route(ollama_embed, ("POST /api/embed",), OLLAMA_EMBED, ("model",)),
        Route(ollama_embeddings, ("POST /api/embeddings",), OLLAMA_EMBEDDINGS, ("model",)),
        *ModelHandlers.routes,
    )
