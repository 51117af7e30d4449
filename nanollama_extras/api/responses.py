"""OpenAI's Responses API: POST /v1/responses, and the responses that are kept.

A body is put into the words of a chat; the pieces of the answer become items with their events.

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

MAX_KEPT_RESPONSES, MAX_KEPT_CHARS = 1000, 1 << 26
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


# What of a chat's field names is called otherwise here, for errors.
RESPONSE_NAMES = {
    "messages": "input",
    "response_format.json_schema": "text.format",
    "response_format": "text.format",
    "max_tokens": "max_output_tokens",
    "reasoning_effort": "reasoning.effort",
}


RESPONSE_TEXTS = {"message": "output_text", "reasoning": "reasoning_text"}  # what items consist of


RESPONSE_ITEMS = {"message": "msg", "reasoning": "rs", "function_call": "fc"}  # how ids begin


def response_input(value: Any, recall: Fields) -> list[Json]:
    """`input` as messages of a chat. `recall` has the output items of earlier responses by id.
    Raises RequestError, naming the item."""
    if isinstance(value, str):
        return [{"role": "user", "content": value}]
    messages: list[Json] = []
    for i, item in enumerate(value):
        check_type(f"input[{i}]", item, "object")
        if item.get("type") == "item_reference":
            if item.get("id") not in recall:
                refuse(
                    f"input[{i}] refers to {excerpt(item.get('id'))}, which is not kept", "input"
                )
            item = recall[item["id"]]
        _add_item(messages, item, f"input[{i}]")
    return messages


def _add_item(messages: list[Json], item: Fields, where: str) -> None:
    """Add what one input item says to the messages."""
    kind = item.get("type", "message")
    if kind == "message":
        message = {"role": item.get("role"), "content": _item_text(item.get("content"), where)}
        messages.append(message)
    elif kind == "function_call":
        for name in ("call_id", "name", "arguments"):
            check_type(f"{where}.{name}", item.get(name), "string")
        function = {"name": item["name"], "arguments": item["arguments"]}
        call = {"id": item["call_id"], "type": "function", "function": function}
        if not messages or messages[-1]["role"] != "assistant":  # calls of one turn are together
            messages.append({"role": "assistant", "content": None})
        messages[-1].setdefault("tool_calls", []).append(call)
    elif kind == "function_call_output":
        check_type(f"{where}.call_id", item.get("call_id"), "string")
        text = _item_text(item.get("output"), where)
        messages.append({"role": "tool", "tool_call_id": item["call_id"], "content": text})
    elif kind != "reasoning":  # thoughts are not said again
        refuse(f"{where} is of type {excerpt(kind)}, which is not supported", where)


def _item_text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    check_type(f"{where}.content", content, "string or array")
    texts: list[str] = []
    for part in content:
        part = part if isinstance(part, dict) else {"type": part}
        kind = part.get("type")
        text = part.get("refusal" if kind == "refusal" else "text")
        known = kind in ("input_text", "output_text", "refusal", "text")
        if not (known and isinstance(text, str)):
            refuse(f"{where} has a part of type {excerpt(kind)}; only text is read here", where)
        texts.append(text)
    return "".join(texts)


def under_type(value: Any) -> Any:
    """Tools and a choice of these, which are flat here, as a chat has them: what they say is under
    the name of their type."""
    if isinstance(value, list):
        return [under_type(item) for item in value]
    if not isinstance(value, dict) or not isinstance(kind := value.get("type"), str):
        return value
    inner = {k: v for k, v in value.items() if k != "type" and v is not None}
    if kind == "allowed_tools":
        inner["tools"] = under_type(inner.get("tools", []))
    return {"type": kind, kind: inner}


def response_body(given: Fields, earlier: list[Json], recall: Fields) -> Json:
    """The fields of a body of /v1/responses in the words of /v1/chat/completions. `earlier` are
    the messages of the response it goes on from. Raises RequestError."""
    same = ("model", "stream", "parallel_tool_calls", "metadata")
    body = {name: given[name] for name in (*same, *SAMPLING_FIELDS) if name in given}
    body |= {name: under_type(given[name]) for name in ("tools", "tool_choice") if name in given}
    for i, tool in enumerate(given.get("tools", [])):
        check_type(at := f"tools[{i}]", tool, "object")
        if (kind := tool.get("type")) != "function":
            refuse(f"{at} is of type {excerpt(kind)}; only functions can be called", at)
    system = (
        [{"role": "system", "content": given["instructions"]}] if given.get("instructions") else []
    )
    body["messages"] = [*system, *earlier, *response_input(required(given, "input"), recall)]
    if "max_output_tokens" in given:
        body["max_tokens"] = given["max_output_tokens"]
    effort = given.get("reasoning", {}).get("effort")
    if effort is not None:
        check_type("reasoning.effort", effort, "string")
        body["reasoning_effort"] = effort
    form = given.get("text", {}).get("format")
    if form is not None:
        check_type("text.format", form, "object")
        body["response_format"] = {**form, "json_schema": form}  # which is flat here
    if WITH_LOGPROBS in given.get("include", []) or given.get("top_logprobs"):
        body |= {"logprobs": True, "top_logprobs": given.get("top_logprobs", 0)}
    return body


def parse_response(
    body: Fields,
    defaults: Fields,
    strict: bool = False,
    opening: Iterable[Json] = (),
    kept: Mapping[str, KeptResponse] | None = None,
) -> tuple[WireRequest, Json]:
    """A body of /v1/responses -> the request, and the fields that were given. `kept` has earlier
    responses by id. Raises RequestError."""
    given, ignored = read_fields(body, RESPONSE_FIELDS, strict, RESPONSE_NEUTRAL)
    kept, earlier = kept or {}, []
    if (last := given.get("previous_response_id")) is not None:
        if last not in kept:
            what = f"previous_response_id {excerpt(last)} is not kept (any more)"
            refuse(what, "previous_response_id", "previous_response_not_found")
        earlier = kept[last].messages
    recall = {item["id"]: item for one in kept.values() for item in one.body["output"]}
    try:
        wire = parse_chat(response_body(given, earlier, recall), defaults, False, opening)
    except RequestError as error:  # about a field of a chat
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
class KeptResponse:
    """A response, for those that go on from it: its body, and its conversation as messages."""

    body: Json
    messages: list[Json]
    num_chars: int


class ResponseReply(ChatReply):
    """An answer of /v1/responses: items, of which one at a time is open. Its end gives it to
    `keep`."""

    def __init__(
        self,
        seq: Sequence,
        splitter: AnswerSplitter,
        wire: WireRequest,
        given: Fields,
        model: str,
        keep: Callable[[ResponseReply], None],
    ) -> None:
        super().__init__(seq, splitter)
        self.wire, self.keep = wire, keep
        self.num_events = self.num_thought = 0
        self.item: Json | None = None  # the open one; its text and logprobs
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
        """An event about the open item"""
        assert self.item is not None
        place = {"item_id": self.item["id"], "output_index": len(self.body["output"]) - 1}
        return self._event(f"response.{kind}", **place, **fields)

    def _whole(self, kind: str) -> Json:
        """An event that has the open item as it is now"""
        item, index = json.loads(json.dumps(self.item)), len(self.body["output"]) - 1
        return self._event(f"response.output_item.{kind}", output_index=index, item=item)

    def error(self, error: NanollamaError) -> Json:
        return self._event("error", code=error.code, message=str(error), param=error.param)

    def start(self) -> list[Json]:
        body = {**self.body, "output": []}
        kinds = ("response.created", "response.in_progress")
        return [self._event(kind, response=body) for kind in kinds]

    def _open(self, kind: str, **fields: Any) -> list[Json]:
        """Close what is open, and begin an item."""
        events, head = self._close(), {"type": kind, "status": "in_progress"}
        self.item = {"id": f"{RESPONSE_ITEMS[kind]}_{secrets.token_hex(12)}", **head, **fields}
        self.body["output"].append(self.item)
        events.append(self._whole("added"))
        if kind != "function_call":
            part = self._part()
            events.append(self._at("content_part.added", content_index=0, part=part))
        return events

    def _part(self) -> Json:
        """What the open item, a message or a thought, consists of"""
        assert self.item is not None
        part = {"type": RESPONSE_TEXTS[self.item["type"]], "text": self.item_text}
        if self.item["type"] == "reasoning":
            return part
        return {**part, "annotations": [], "logprobs": list(self.item_logprobs)}

    def _close(self, status: str = "completed") -> list[Json]:
        """End the open item, if there is one."""
        if (item := self.item) is None:
            return []
        item["status"] = status
        if item["type"] == "function_call":
            item["arguments"] = self.item_text
            about = {"name": item["name"], "arguments": self.item_text}
            events = [self._at("function_call_arguments.done", **about)]
        else:
            item["content"] = [part := self._part()]
            told = {key: part[key] for key in ("text", "logprobs") if key in part}
            events = [
                self._at(f"{part['type']}.done", content_index=0, **told),
                self._at("content_part.done", content_index=0, part=part),
            ]
        events.append(self._whole("done"))
        self.item, self.item_text, self.item_logprobs = None, "", []
        return events

    def _say(self, kind: str, text: str, entries: list[Json]) -> list[Json]:
        """A piece of a message or of a thought"""
        events = []
        if self.item is None or self.item["type"] != kind:
            head: Any = {"role": "assistant"} if kind == "message" else {"summary": []}
            events = self._open(kind, content=[], **head)
        self.item_text += text
        self.item_logprobs += entries
        more = {"logprobs": entries} if kind == "message" else {}
        name = f"{RESPONSE_TEXTS[kind]}.delta"
        return [*events, self._at(name, content_index=0, delta=text, **more)]

    def _call(self, news: Fields) -> list[Json]:
        """The beginning of a tool call, or a piece of its arguments"""
        function = news["function"]
        if "id" in news:
            about = {"call_id": news["id"], "name": function["name"]}
            return self._open("function_call", **about, arguments="")
        self.item_text += function["arguments"]
        return [self._at("function_call_arguments.delta", delta=function["arguments"])]

    def push(self, delta: Delta) -> list[Json]:
        thoughts = self.splitter.thoughts
        was_thinking, events = thoughts.thinking, []
        for kind, news, entries in self.read(delta):
            if kind == "call":
                events += self._call(news)
            else:
                events += self._say("message" if kind == "content" else "reasoning", news, entries)
        self.num_thought += was_thinking or thoughts.thinking
        return events

    def end(self) -> list[Json]:
        usage, is_cut = self.usage, self.finish_reason == "length"
        assert usage is not None
        status = "incomplete" if is_cut else "completed"
        events = []
        if not any(item["type"] != "reasoning" for item in self.body["output"]):
            events = self._say("message", "", [])[:-1]
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
        self.keep(self)
        return [*events, self._event(f"response.{status}", response=self.body)]

    def result(self) -> Json:
        return self.body

    def kept(self) -> KeptResponse:
        """This response, for the next one; without the system messages that it began with"""
        messages = list(self.wire.requests[0].messages or [])
        while messages and messages[0]["role"] == "system":
            messages.pop(0)
        for item in self.body["output"]:
            _add_item(messages, item, "output")
        return KeptResponse(self.body, messages, len(json.dumps([self.body, messages])))


NAMED_SSE = dataclasses.replace(
    SSE, encode=lambda value: f"event: {value['type']}\n".encode() + sse(value), last=b""
)


class API(Handlers):
    """The Responses API, with the responses that later ones may go on from."""

    def __init__(self, models: Models, config: ServerConfig, observer: Observer) -> None:
        super().__init__(models, config, observer)
        self.kept: dict[str, KeptResponse] = {}

    async def respond(self, request: Request) -> Response:
        """POST /v1/responses"""
        body, pool = await self.read_request(request)
        strict, opening = self.config.strict, pool.source.opening
        wire, given = parse_response(body, pool.sampling, strict, opening, self.kept)
        job = await pool.start(wire.requests, wire.names)
        model = wire.model or pool.source.name
        seq, splitter = job.sequences[0], job.splitters[0]
        reply = ResponseReply(seq, splitter, wire, given, model, self.keep)
        encoding = dataclasses.replace(NAMED_SSE, error=reply.error)
        return await self.answer(request, job, reply, encoding, wire.stream, wire.ignored)

    def keep(self, reply: ResponseReply) -> None:
        """Keep a response for those that go on from it; old ones make room."""
        if reply.body["store"]:
            self.kept[reply.body["id"]] = reply.kept()
        while (
            len(self.kept) > MAX_KEPT_RESPONSES
            or sum(kept.num_chars for kept in self.kept.values()) > MAX_KEPT_CHARS
        ):
            del self.kept[next(iter(self.kept))]

    async def response(self, request: Request) -> Response:
        """GET, DELETE /v1/responses/{id}: a response that is kept"""
        name = request.path_params["id"]
        if name not in self.kept:
            raise WireError(404, "not_found", f"response {name!r} is not kept (any more)")
        if request.method == "DELETE":
            del self.kept[name]
            return as_json({"id": name, "object": "response", "deleted": True})
        return as_json(self.kept[name].body)

    routes = (
        Route(respond, ("POST /v1/responses", "POST /responses"), RESPONSE_FIELDS, ("input",)),
        Route(response, ("GET /v1/responses/{id}", "DELETE /v1/responses/{id}")),
    )
