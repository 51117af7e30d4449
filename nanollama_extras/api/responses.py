"""OpenAI's Responses API: POST /v1/responses, and a store of earlier responses.

A body is translated to a chat; the pieces of the answer become items and their events.

Seam       a dialect: a row of `nanollama.DIALECTS`.
Remove     delete this file and its row.
Spec       https://developers.openai.com/api/reference/resources/responses
"""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
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
    joined_text,
    parse_chat,
    read_fields,
    refuse,
    required,
    sse,
    table,
)

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from nanollama import (
        AnswerSplitter,
        Delta,
        Fields,
        Json,
        Models,
        NanollamaError,
        Observer,
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


WITH_LOGPROBS = "message.output_text.logprobs"


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


RESPONSE_ITEMS = {
    "message": "msg",
    "reasoning": "rs",
    "function_call": "fc",
}  # item -> prefix of its id


def response_input(value: Any, earlier_items: Fields) -> list[Json]:
    """`input` as messages of a chat. earlier_items: output items of earlier responses by id. Raises
    RequestError, which names the item."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    messages: list[Json] = []
    for i, item in enumerate(value):
        check_type(f"input[{i}]", item, "object")
        if item.get("type") == "item_reference":
            check_type(f"input[{i}].id", item.get("id"), "string")
            if item["id"] not in earlier_items:
                refuse(
                    f"input[{i}] refers to {excerpt(item.get('id'))}, which is not stored", "input"
                )
            item = earlier_items[item["id"]]
        _add_item(messages, item, f"input[{i}]")
    return messages


def _add_item(messages: list[Json], item: Fields, where: str) -> None:
    """Add an input item to the messages."""
    kind = item.get("type", "message")
    if kind == "message":
        message = {"role": item.get("role"), "content": _item_text(item, "content", where)}
        messages.append(message)
    elif kind == "function_call":
        for name in ("call_id", "name"):
            check_type(f"{where}.{name}", item.get(name), "string")
        function = {"name": item["name"], "arguments": item.get("arguments")}
        call = {"id": item["call_id"], "type": "function", "function": function}
        # the calls of one turn share a message
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": None})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        check_type(f"{where}.call_id", item.get("call_id"), "string")
        text = _item_text(item, "output", where)
        messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": text})
    elif kind != "reasoning":  # earlier thoughts are left out
        refuse(f"{where} is of type {excerpt(kind)}, which is not supported", where)


def _item_text(item: Fields, name: str, where: str) -> str:
    """The text of a field of an item; its parts are those of a chat under other names."""
    content = item.get(name)

    def chat_part(part: Any) -> Any:
        kind = part.get("type") if isinstance(part, dict) else part
        return {**part, "type": "text"} if kind in ("input_text", "output_text") else part

    parts = [*map(chat_part, content)] if isinstance(content, list) else content
    return joined_text(parts, f"{where}.{name}")


def under_type(value: Any) -> Any:
    """Tools or a tool choice, flat in this API, in the form of a chat: their fields are below the
    name of their type."""
    if isinstance(value, list):
        return [under_type(item) for item in value]
    if not isinstance(value, dict) or not isinstance(kind := value.get("type"), str):
        return value
    inner = {k: v for k, v in value.items() if k != "type" and v is not None}
    if kind == "allowed_tools":
        inner["tools"] = under_type(inner.get("tools", []))
    return {"type": kind, kind: inner}


def response_body(given: Fields, earlier: list[Json], earlier_items: Fields) -> Json:
    """The fields of a body of /v1/responses as those of /v1/chat/completions. earlier: the messages
    of the response that it continues. earlier_items: see `response_input`. Raises RequestError."""
    shared = ("model", "stream", "parallel_tool_calls", "metadata")
    body = {name: given[name] for name in (*shared, *SAMPLING_FIELDS) if name in given}
    body |= {name: under_type(given[name]) for name in ("tools", "tool_choice") if name in given}
    for i, tool in enumerate(given.get("tools", [])):
        check_type(at := f"tools[{i}]", tool, "object")
        if (kind := tool.get("type")) != "function":
            refuse(f"{at} is of type {excerpt(kind)}; only function is supported", at)
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
) -> tuple[WireRequest, Json]:
    """A body of /v1/responses -> the request, and the fields of the body. stored: earlier responses
    by id. Raises RequestError."""
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
    try:
        wire = parse_chat(response_body(given, earlier, earlier_items), defaults, False, opening)
    except RequestError as error:  # it names a field of the chat
        param = error.param or ""
        if (name := _response_name(param)) == param:
            raise
        refuse(str(error).replace(param, name), name, error.code)
    names = {"messages": "input"} | {n: _response_name(where) for n, where in wire.names.items()}
    return dataclasses.replace(wire, ignored=ignored, names=names), given


def _response_name(name: str) -> str:
    found = next((chat for chat in RESPONSE_NAMES if name.startswith(chat)), "")
    return RESPONSE_NAMES.get(found, "") + name[len(found) :]


@dataclass(frozen=True, slots=True)
class StoredResponse:
    """A response that later ones may continue: its body, and its conversation as messages."""

    body: Json
    messages: list[Json]
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
        model: str,
        store: Callable[[ResponseReply], None],
    ) -> None:
        super().__init__(seq, splitter)
        self.wire, self.store = wire, store
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

    def _open(self, kind: str, **fields: Any) -> list[Json]:
        """Close the open item, and begin another."""
        events, head = self._close(), {"type": kind, "status": "in_progress"}
        self.item = {"id": f"{RESPONSE_ITEMS[kind]}_{secrets.token_hex(12)}", **head, **fields}
        self.body["output"].append(self.item)
        events.append(self._whole("added"))
        if kind != "function_call":
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
        if item["type"] == "function_call":
            item["arguments"] = self.item_text
            call = {"name": item["name"], "arguments": self.item_text}
            events = [self._at("function_call_arguments.done", **call)]
        else:
            item["content"] = [part := self._part()]
            fields = {key: part[key] for key in ("text", "logprobs") if key in part}
            events = [
                self._at(f"{part['type']}.done", content_index=0, **fields),
                self._at("content_part.done", content_index=0, part=part),
            ]
        events.append(self._whole("done"))
        self.item, self.item_text, self.item_logprobs = None, "", []
        return events

    def _text(self, kind: str, text: str, entries: list[Json]) -> list[Json]:
        """Events of a piece of a message or of a thought."""
        events = []
        if self.item is None or self.item["type"] != kind:
            head: Any = {"role": "assistant"} if kind == "message" else {"summary": []}
            events = self._open(kind, content=[], **head)
        self.item_text += text
        self.item_logprobs += entries
        logprobs = {"logprobs": entries} if kind == "message" else {}
        name = f"{RESPONSE_TEXTS[kind]}.delta"
        return [*events, self._at(name, content_index=0, delta=text, **logprobs)]

    def _call(self, piece: Fields) -> list[Json]:
        """Events of the beginning of a tool call, or of a piece of its arguments."""
        function = piece["function"]
        if "id" in piece:
            call = {"call_id": piece["id"], "name": function["name"]}
            return self._open("function_call", **call, arguments="")
        self.item_text += function["arguments"]
        return [self._at("function_call_arguments.delta", delta=function["arguments"])]

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
            _add_item(messages, item, "output")
        return StoredResponse(self.body, messages, len(json.dumps([self.body, messages])))


NAMED_SSE = dataclasses.replace(
    SSE, encode=lambda value: f"event: {value['type']}\n".encode() + sse(value), last=b""
)


class API(Handlers):
    """The Responses API, with a store of responses that later ones may continue."""

    def __init__(self, models: Models, config: ServerConfig, observer: Observer) -> None:
        super().__init__(models, config, observer)
        self.stored: dict[str, StoredResponse] = {}

    async def respond(self, request: Request) -> Response:
        """POST /v1/responses"""
        body, pool = await self.read_request(request)
        strict, opening = self.config.strict, pool.source.opening
        wire, given = parse_response(body, pool.sampling, strict, opening, self.stored)
        job = await pool.start(wire.requests, wire.names)
        model = wire.model or pool.source.name
        seq, splitter = job.sequences[0], job.prepared[0].splitter()
        reply = ResponseReply(seq, splitter, wire, given, model, self.store)
        encoding = dataclasses.replace(NAMED_SSE, error=reply.error)
        return await self.answer(request, job, reply, encoding, wire.stream, wire.ignored)

    def store(self, reply: ResponseReply) -> None:
        """Store a response for later ones; the oldest make room."""
        if reply.body["store"]:
            self.stored[reply.body["id"]] = reply.stored()
        while (
            len(self.stored) > MAX_STORED_RESPONSES
            or sum(response.num_chars for response in self.stored.values()) > MAX_STORED_CHARS
        ):
            del self.stored[next(iter(self.stored))]

    async def response(self, request: Request) -> Response:
        """GET, DELETE /v1/responses/{id}: a stored response"""
        name = request.path_params["id"]
        if name not in self.stored:
            raise WireError(404, "not_found", f"response {name!r} is not stored (any more)")
        if request.method == "DELETE":
            del self.stored[name]
            return as_json({"id": name, "object": "response", "deleted": True})
        return as_json(self.stored[name].body)

    routes = (
        Route(respond, ("POST /v1/responses", "POST /responses"), RESPONSE_FIELDS, ("input",)),
        Route(response, ("GET /v1/responses/{id}", "DELETE /v1/responses/{id}")),
    )
