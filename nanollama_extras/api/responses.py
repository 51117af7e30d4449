"""OpenAI's Responses API: POST /v1/responses, and a store of earlier responses.

A body is translated to a chat; the pieces of the answer become items and their events. Items in
are read by api.response_input, tools by api.response_tools. Thoughts go out sealed (api.sealed) to
clients that keep them. api.compaction shortens a conversation.

Seam       a dialect: a row of `nanollama.DIALECTS`.
Remove     delete this file, api/response_input.py, api/response_tools.py, api/compaction.py and the
           row.
Spec       https://developers.openai.com/api/reference/resources/responses
"""

from __future__ import annotations

import dataclasses
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanollama import (
    SAMPLING_FIELDS,
    SSE,
    ChatReply,
    Handlers,
    RequestError,
    Route,
    WireError,
    as_json,
    check_type,
    excerpt,
    ignored_header,
    parse_chat,
    read_fields,
    refuse,
    required,
    sse,
    table,
)
from nanollama_extras.api.compaction import COMPACT_FIELDS, compacted, summary_request
from nanollama_extras.api.response_input import add_item, response_input, without_lone_thoughts
from nanollama_extras.api.response_tools import CallItem, Tool, ToolSet, in_own_words, read_tools
from nanollama_extras.api.sealed import seal

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from nanollama import (
        AnswerSplitter,
        Delta,
        Fields,
        Job,
        Json,
        Models,
        NanollamaError,
        Observer,
        Pool,
        Reply,
        Sequence,
        ServerConfig,
        WireRequest,
    )

MAX_STORED_RESPONSES, MAX_STORED_CHARS = 1000, 1 << 26
RESPONSE_FIELDS = table(
    {n: kind for n, kind in SAMPLING_FIELDS.items() if n not in ("max_tokens", "logit_bias")},
    string_or_array="input",
    string="model instructions previous_response_id",
    integer="max_output_tokens top_logprobs",
    boolean="stream parallel_tool_calls store",
    object="stream_options text reasoning metadata",
    array="tools include",
    string_or_object="tool_choice",
)


RESPONSE_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "background": (False,),
    "truncation": ("disabled",),
    **dict.fromkeys("conversation prompt image context_management max_tool_calls".split(), ()),
    "modalities": (["text"],),
}


WITH_LOGPROBS, SEALED = "message.output_text.logprobs", "reasoning.encrypted_content"


# Field of a chat -> its name in this API, for errors
RESPONSE_NAMES = {
    "messages": "input",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
}


RESPONSE_TEXTS = {
    "message": "output_text",
    "reasoning": "reasoning_text",
}  # item -> type of its parts


RESPONSE_ITEMS = {"message": "msg", "reasoning": "rs"}  # item -> prefix of its id


def response_body(
    given: Fields, earlier: list[Json], earlier_items: Fields, tools: ToolSet
) -> Json:
    """The fields of a body of /v1/responses as those of /v1/chat/completions. earlier: the messages
    of the response that it continues. earlier_items: see `response_input`. Raises RequestError."""
    shared = ("model", "stream", "parallel_tool_calls", "metadata")
    body = {name: given[name] for name in (*shared, *SAMPLING_FIELDS) if name in given}
    if tools.functions:
        body["tools"] = tools.functions
    choice = given.get("tool_choice")
    if choice is not None and (tools.functions or choice not in ("auto", "none")):
        body["tool_choice"] = tools.choice(choice)
    system = (
        [{"role": "system", "content": given["instructions"]}] if given.get("instructions") else []
    )
    body["messages"] = [*system, *earlier, *response_input(required(given, "input"), earlier_items)]
    if "max_output_tokens" in given:
        body["max_tokens"] = given["max_output_tokens"]
    effort = given.get("reasoning", {}).get("effort")
    if effort is not None:
        check_type("reasoning.effort", effort, "string")
        body["reasoning_effort"] = effort
    form = given.get("text", {}).get("format")
    if form is not None:
        check_type("text.format", form, "object")
        body["response_format"] = {**form, "json_schema": form}  # flat in this API
    if WITH_LOGPROBS in given.get("include", []) or given.get("top_logprobs"):
        body |= {"logprobs": True, "top_logprobs": given.get("top_logprobs", 0)}
    return body


def parse_response(
    body: Fields,
    defaults: Fields,
    strict: bool = False,
    opening: Iterable[Json] = (),
    stored: Mapping[str, StoredResponse] | None = None,
) -> tuple[WireRequest, Json, ToolSet]:
    """A body of /v1/responses -> the request, the fields of the body, its tools. stored: earlier
    responses by id. Raises RequestError."""
    given, ignored = read_fields(body, RESPONSE_FIELDS, strict, RESPONSE_NEUTRAL)
    stored, earlier = stored or {}, []
    if (last := given.get("previous_response_id")) is not None:
        if last not in stored:
            message = f"previous_response_id {excerpt(last)} is not stored (any more)"
            refuse(message, "previous_response_id", "previous_response_not_found")
        earlier = stored[last].messages
    earlier_items = {
        item["id"]: item for response in stored.values() for item in response.body["output"]
    }
    tools = read_tools(given, strict)
    try:
        chat = response_body(given, earlier, earlier_items, tools)
        wire = parse_chat(chat, defaults, False, opening)
    except RequestError as error:  # it names a field of the chat
        param = in_own_words(error, tools).param or ""
        if (name := _response_name(param)) == param:
            raise
        refuse(str(error).replace(param, name), name, error.code)
    names = {"messages": "input"} | {n: _response_name(where) for n, where in wire.names.items()}
    return dataclasses.replace(wire, ignored=(*ignored, *tools.ignored), names=names), given, tools


def _response_name(name: str) -> str:
    found = next((chat for chat in RESPONSE_NAMES if name.startswith(chat)), "")
    return RESPONSE_NAMES.get(found, "") + name[len(found) :]


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response that later ones may continue: its body, its conversation as messages, and the
    items of its request."""

    body: Json
    messages: list[Json]
    input_items: list[Json]
    num_chars: int


class ResponseReply(ChatReply):
    """An answer of /v1/responses: a list of items, at most one of which is open. The finished reply
    is passed to `store`."""

    def __init__(
        self,
        seq: Sequence,
        splitter: AnswerSplitter,
        wire: WireRequest,
        given: Fields,
        tools: ToolSet,
        model: str,
        store: Callable[[ResponseReply], None],
    ) -> None:
        super().__init__(seq, splitter)
        self.wire, self.given, self.tools, self.store = wire, given, tools, store
        self.seals = SEALED in given.get("include", [])
        self.call: CallItem | None = None  # the open item, if that is a call
        self.num_events = 0
        self.item: Json | None = None  # the open one, whose text and logprobs follow
        self.item_text = ""
        self.item_logprobs: list[Json] = []
        params = wire.requests[0].params
        self.body: Json = {
            "id": f"resp_{secrets.token_hex(16)}",
            "object": "response",
            "created_at": int(time.time()),
            "status": "in_progress",
            "background": False,
            "error": None,
            "incomplete_details": None,
            "instructions": given.get("instructions"),
            "max_output_tokens": given.get("max_output_tokens"),
            "model": model,
            "output": [],
            "parallel_tool_calls": given.get("parallel_tool_calls", True),
            "previous_response_id": given.get("previous_response_id"),
            "reasoning": {"effort": None, "summary": None, **given.get("reasoning", {})},
            "store": given.get("store", True),
            "temperature": params.temperature,
            "text": {"format": {"type": "text"}, **given.get("text", {})},
            "tool_choice": given.get("tool_choice", "auto"),
            "tools": given.get("tools", []),
            "top_logprobs": params.logprobs or 0,
            "top_p": params.top_p,
            "truncation": "disabled",
            "usage": None,
            "user": None,
            "metadata": given.get("metadata", {}),
        }

    def _event(self, kind: str, **fields: Any) -> Json:
        self.num_events += 1
        return {"type": kind, "sequence_number": self.num_events - 1, **fields}

    def _at(self, kind: str, **fields: Any) -> Json:
        """An event about the open item."""
        assert self.item is not None
        place = {"item_id": self.item["id"], "output_index": len(self.body["output"]) - 1}
        return self._event(f"response.{kind}", **place, **fields)

    def _whole(self, kind: str) -> Json:
        """An event with a copy of the open item."""
        item, index = json.loads(json.dumps(self.item)), len(self.body["output"]) - 1
        return self._event(f"response.output_item.{kind}", output_index=index, item=item)

    def error(self, error: NanollamaError) -> Json:
        return self._event("error", code=error.code, message=str(error), param=error.param)

    def start(self) -> list[Json]:
        body = {**self.body, "output": []}
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=body) for kind in kinds]

    def alive(self) -> Json:
        """An event that says no more than that the answer is on its way."""
        return self._event("response.in_progress", response={**self.body, "output": []})

    def _open(self, item: Json) -> list[Json]:
        """Close the open item, and begin another."""
        events = self._close()
        self.item = item
        self.body["output"].append(item)
        events.append(self._whole("added"))
        if item["type"] in RESPONSE_TEXTS:
            part = self._part()
            events.append(self._at("content_part.added", content_index=0, part=part))
        return events

    def _part(self) -> Json:
        """The content part of the open item, a message or a thought."""
        assert self.item is not None
        part = {"type": RESPONSE_TEXTS[self.item["type"]], "text": self.item_text}
        if self.item["type"] == "reasoning":
            return part
        return {**part, "annotations": [], "logprobs": list(self.item_logprobs)}

    def _close(self, status: str = "completed") -> list[Json]:
        """Close the open item, if any."""
        if (item := self.item) is None:
            return []
        item["status"] = status
        if self.call:
            ending = self.call.end()
            events = [self._at(ending[0], **ending[1])] if ending else []
        else:
            item["content"] = [part := self._part()]
            if self.seals and item["type"] == "reasoning":
                item["encrypted_content"] = seal(self.item_text)
            fields = {key: part[key] for key in ("text", "logprobs") if key in part}
            events = [
                self._at(f"{part['type']}.done", content_index=0, **fields),
                self._at("content_part.done", content_index=0, part=part),
            ]
        events.append(self._whole("done"))
        self.item, self.call, self.item_text, self.item_logprobs = None, None, "", []
        return events

    def _text(self, kind: str, text: str, entries: list[Json]) -> list[Json]:
        """Events of a piece of a message or of a thought."""
        events = []
        if self.item is None or self.item["type"] != kind:
            head: Any = {"role": "assistant"} if kind == "message" else {"summary": []}
            name = f"{RESPONSE_ITEMS[kind]}_{secrets.token_hex(12)}"
            events = self._open(
                {"id": name, "type": kind, "status": "in_progress", "content": [], **head}
            )
        self.item_text += text
        self.item_logprobs += entries
        logprobs = {"logprobs": entries} if kind == "message" else {}
        name = f"{RESPONSE_TEXTS[kind]}.delta"
        return [*events, self._at(name, content_index=0, delta=text, **logprobs)]

    def _call(self, piece: Fields) -> list[Json]:
        """Events of the beginning of a tool call, or of a piece of its arguments."""
        function = piece["function"]
        if "id" in piece:
            name = function["name"]
            call = CallItem(self.tools.tools.get(name) or Tool("function", name), piece["id"])
            events = self._open(call.item)
            self.call = call
            return events
        assert self.call is not None
        added = self.call.push(function["arguments"])
        return [self._at(added[0], delta=added[1])] if added else []

    def push(self, delta: Delta) -> list[Json]:
        events = []
        for kind, piece, entries in self.read(delta):
            if kind == "call":
                events += self._call(piece)
            else:
                events += self._text(
                    "message" if kind == "content" else "reasoning", piece, entries
                )
        return events

    def end(self) -> list[Json]:
        usage, is_cut = self.usage, self.finish_reason == "length"
        assert usage is not None
        status = "incomplete" if is_cut else "completed"
        events = []
        if not any(item["type"] != "reasoning" for item in self.body["output"]):
            events = self._text("message", "", [])[:-1]
        events += self._close(status)
        num_in, num_out = usage.prompt_tokens, usage.completion_tokens
        details = {"cached_tokens": usage.cached_tokens}
        details["cache_write_tokens"] = num_in - usage.cached_tokens
        self.body |= {
            "status": status,
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "completed_at": None if is_cut else int(time.time()),
            "usage": {
                "input_tokens": num_in,
                "input_tokens_details": details,
                "output_tokens": num_out,
                "output_tokens_details": {"reasoning_tokens": min(self.num_thought, num_out)},
                "total_tokens": num_in + num_out,
            },
        }
        self.store(self)
        return [*events, self._event(f"response.{status}", response=self.body)]

    def result(self) -> Json:
        return self.body

    def stored(self) -> StoredResponse:
        """This response without the system messages at its beginning, which the next one brings."""
        messages = list(self.wire.requests[0].messages or [])
        while messages and messages[0]["role"] == "system":
            messages.pop(0)
        for item in self.body["output"]:
            add_item(messages, item, "output")
        messages, items = without_lone_thoughts(messages), self.input_items()
        size = len(json.dumps([self.body, messages, items]))
        return StoredResponse(self.body, messages, items, size)

    def input_items(self) -> list[Json]:
        """The items of the request, each with an id."""
        value = self.given["input"]
        if isinstance(value, str):
            value = [{"role": "user", "content": [{"type": "input_text", "text": value}]}]
        name = self.body["id"].removeprefix("resp_")
        heads = ({"type": "message", "id": f"item_{name}_{i}"} for i in range(len(value)))
        return [{**head, **item} for head, item in zip(heads, value)]


NAMED_SSE = dataclasses.replace(
    SSE, encode=lambda value: f"event: {value['type']}\n".encode() + sse(value), last=b""
)


def make_room(stored: dict[str, StoredResponse]) -> None:
    """Forget the oldest responses beyond the limits."""
    while (
        len(stored) > MAX_STORED_RESPONSES
        or sum(response.num_chars for response in stored.values()) > MAX_STORED_CHARS
    ):
        del stored[next(iter(stored))]


# The stored responses of one request, where something beside this process keeps them
STORED: ContextVar[dict[str, StoredResponse] | None] = ContextVar("STORED", default=None)


class API(Handlers):
    """The Responses API, with a store of responses that later ones may continue."""

    def __init__(self, models: Models, config: ServerConfig, observer: Observer) -> None:
        super().__init__(models, config, observer)
        self.own_stored: dict[str, StoredResponse] = {}

    @property
    def stored(self) -> dict[str, StoredResponse]:
        kept = STORED.get()
        return self.own_stored if kept is None else kept

    async def respond(self, request: Request) -> Response:
        """POST /v1/responses"""
        body, pool = await self.read_request(request)
        job, reply = await self.begin(body, pool, self.store)
        encoding, wire = dataclasses.replace(NAMED_SSE, error=reply.error), reply.wire
        return await self.answer(request, job, reply, encoding, wire.stream, wire.ignored)

    async def compact(self, request: Request) -> Response:
        """POST /v1/responses/compact: a conversation as the user's messages and a summary"""
        body, pool = await self.read_request(request)
        question, ignored = summary_request(body, self.config.strict)
        job, reply = await self.begin(question, pool, lambda reply: None)
        await self.answer(request, job, reply, NAMED_SSE, is_stream=False)
        return as_json(compacted(reply), headers=ignored_header(ignored))

    async def begin(
        self, body: Fields, pool: Pool, store: Callable[[ResponseReply], None]
    ) -> tuple[Job, ResponseReply]:
        """Start the answer to a body; `store` gets it in the end. Raises RequestError."""
        strict, opening = self.config.strict, pool.source.opening
        wire, given, tools = parse_response(body, pool.sampling, strict, opening, self.stored)
        try:
            job = await pool.start(wire.requests, wire.names)
        except RequestError as error:
            raise in_own_words(error, tools) from None
        model = wire.model or pool.source.name
        seq, splitter = job.sequences[0], job.prepared[0].splitter()
        return job, ResponseReply(seq, splitter, wire, given, tools, model, store)

    def store(self, reply: ResponseReply) -> None:
        """Store a response for later ones; the oldest make room."""
        if reply.body["store"]:
            self.stored[reply.body["id"]] = reply.stored()
        make_room(self.stored)

    async def events(self, job: Job, reply: Reply) -> AsyncIterator[Json | None]:
        """The events of a reply. A silence has an event, too: Codex counts no comments, and starts
        over when no event comes for long."""
        async for event in super().events(job, reply):
            yield reply.alive() if event is None and isinstance(reply, ResponseReply) else event

    def find(self, request: Request) -> StoredResponse:
        """The response that a path names. Raises WireError 404."""
        name = request.path_params["id"]
        if name not in self.stored:
            raise WireError(404, "not_found", f"response {name!r} is not stored (any more)")
        return self.stored[name]

    async def response(self, request: Request) -> Response:
        """GET, DELETE /v1/responses/{id}: a stored response"""
        stored, name = self.find(request), request.path_params["id"]
        if request.method == "DELETE":
            del self.stored[name]
            return as_json({"id": name, "object": "response", "deleted": True})
        return as_json(stored.body)

    async def input_items(self, request: Request) -> Response:
        """GET /v1/responses/{id}/input_items: the items of its request, the last one first"""
        items, query = list(self.find(request).input_items), request.query_params
        if query.get("order", "desc") == "desc":
            items.reverse()
        limit = query.get("limit", "20")
        if not re.fullmatch("[1-9][0-9]?|100", limit):
            refuse(f"limit is {excerpt(limit)}; it must be from 1 to 100", "limit")
        ids = [item["id"] for item in items]
        first = ids.index(query["after"]) + 1 if query.get("after") in ids else 0
        page = items[first : first + int(limit)]
        ends = {"first_id": page[0]["id"], "last_id": page[-1]["id"]} if page else {}
        has_more = first + len(page) < len(items)
        return as_json({"object": "list", "data": page, **ends, "has_more": has_more})

    async def cancel(self, request: Request) -> Response:
        """POST /v1/responses/{id}/cancel: refused, for no response runs in the background"""
        self.find(request)
        refuse("only a response in the background can be cancelled; close the stream", "id")

    routes = (
        Route(respond, ("POST /v1/responses", "POST /responses"), RESPONSE_FIELDS, ("input",)),
        Route(compact, ("POST /v1/responses/compact",), COMPACT_FIELDS),
        Route(response, ("GET /v1/responses/{id}", "DELETE /v1/responses/{id}")),
        Route(input_items, ("GET /v1/responses/{id}/input_items",)),
        Route(cancel, ("POST /v1/responses/{id}/cancel",)),
    )
