"""Anthropic's Messages API, which Claude Code speaks: POST /v1/messages, streamed or whole, and
POST /v1/messages/count_tokens.

A body is translated to a chat by api.anthropic_body; the pieces of the answer become blocks and
their events. A thought that is not to be shown goes into its block's signature, by api.sealed, so
that the next request brings it back. A conversation with the field `thread` is kept in memory, so
that its next request need only bring what is new.

Seam       a dialect: a row of `nanollama.DIALECTS`, which asks for `error_body`.
Remove     delete this file, api/anthropic_body.py and the row.
Spec       https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import json
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from nanollama import (
    SSE,
    ChatReply,
    ContextLengthError,
    Handlers,
    RequestError,
    Route,
    WireError,
    as_json,
    excerpt,
    extra,
    ignored_header,
    parse_chat,
    read_fields,
    refuse,
    required,
    sse,
    table,
)
from nanollama_extras.api.anthropic_body import (
    COUNT_FIELDS,
    FIELDS,
    WITHOUT_EFFECT,
    ToolList,
    chat_body,
    in_own_words,
    read_tools,
)
from nanollama_extras.api.sealed import seal

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
        Pool,
        Sequence,
        ServerConfig,
        WireRequest,
    )

ERROR_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
    504: "timeout_error",
    529: "overloaded_error",
}
OVERLOADED = 529  # for what is busy or not ready yet; a client tries again
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}
LOST = "thread_not_found"
MOST_THREADS, MOST_THREAD_CHARS = 1000, 1 << 26  # conversations that are kept, and their size
MOST_STOP_TOKENS = 1024  # at the end of an answer, in which a stop sequence is looked for


def error_body(error: NanollamaError) -> Json:
    """The error object of Anthropic's API."""
    kind = "invalid_request_error" if error.status < 500 else "api_error"
    kind, message = ERROR_TYPES.get(error.status, kind), str(error)
    if isinstance(error, ContextLengthError):  # Claude Code reads these words and numbers
        num_prompt, num_context = (re.findall(r"\d+", message) * 2)[:2]
        message = f"prompt is too long: {num_prompt} tokens > {num_context} maximum"
    body: Json = {"type": kind, "message": message}
    if error.code == LOST:  # the SDK then sends the whole conversation
        body["details"] = {"error_code": LOST}
    return {"type": "error", "error": body}


BODY, COUNT_BODY = table(FIELDS, WITHOUT_EFFECT), table(COUNT_FIELDS, WITHOUT_EFFECT)
EVENTS = dataclasses.replace(
    SSE,
    encode=lambda value: f"event: {value['type']}\n".encode() + sse(value),
    error=error_body,
    ping=b'event: ping\ndata: {"type": "ping"}\n\n',
    last=b"",
)


def stopped_by(seq: Sequence) -> str | None:
    """The stop sequence that ended an answer, if one did."""
    stops, tokenizer = seq.params.stop, seq.text.tokenizer
    if not seq.text.stopped or len(stops) == 1:
        return stops[0] if seq.text.stopped else None
    tail = seq.token_ids[seq.num_prompt :][-MOST_STOP_TOKENS:]
    text, before = tokenizer.decode(tail), tokenizer.decode(tail[:-1])
    # the one that the last token completed first
    ends = {stop: text.find(stop, max(len(before) - len(stop), 0)) for stop in stops}
    found = [(at + len(stop), at, stop) for stop, at in ends.items() if at >= 0]
    return min(found)[2] if found else stops[0]


class MessageReply(ChatReply):
    """An answer of /v1/messages: a list of blocks, of which the last one may be open. The finished
    message is passed to `keep`."""

    def __init__(
        self,
        seq: Sequence,
        splitter: AnswerSplitter,
        model: str,
        hides_thoughts: bool,
        keep: Callable[[Json], None],
    ) -> None:
        super().__init__(seq, splitter)
        self.hides_thoughts, self.hidden, self.keep = hides_thoughts, "", keep
        self.blocks: list[Json] = []
        self.open: Json | None = None
        self.head: Json = {
            "id": f"msg_{secrets.token_hex(12)}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }

    def _body(self) -> Json:
        """The message so far."""
        reason, stop = None, None
        if self.finish_reason:
            stop = stopped_by(self.seq) if self.finish_reason == "stop" else None
            reason = "stop_sequence" if stop is not None else STOP_REASONS[self.finish_reason]
        ending = {"stop_reason": reason, "stop_sequence": stop, "usage": self._usage()}
        return {**self.head, "content": self.blocks, **ending}

    def _usage(self) -> Json:
        """Input tokens are those that were not in the cache, once that is known."""
        usage = self.usage
        num_prompt = usage.prompt_tokens if usage else self.seq.num_prompt
        num_cached, num_new = (usage.cached_tokens, usage.completion_tokens) if usage else (0, 0)
        return {
            "input_tokens": num_prompt - num_cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": num_cached,
            "output_tokens": num_new,
            "output_tokens_details": {"thinking_tokens": min(self.num_thought, num_new)},
        }

    def start(self) -> list[Json]:
        return [{"type": "message_start", "message": {**self._body(), "content": []}}]

    def _event(self, kind: str, **fields: Any) -> Json:
        """An event about the last block."""
        return {"type": f"content_block_{kind}", "index": len(self.blocks) - 1, **fields}

    def _begin(self, kind: str, **fields: Any) -> list[Json]:
        """Close the open block, and begin another."""
        events = self._close()
        self.open = {"type": kind, **fields}
        self.blocks.append(self.open)
        return [*events, self._event("start", content_block=dict(self.open))]

    def _close(self) -> list[Json]:
        """Close the open block, if any."""
        block, self.open, events = self.open, None, []
        if block is None:
            return []
        if block["type"] == "thinking":
            block["signature"], self.hidden = seal(self.hidden), ""
            signature = {"type": "signature_delta", "signature": block["signature"]}
            events.append(self._event("delta", delta=signature))
        elif block["type"] == "tool_use":
            index = sum(one["type"] == "tool_use" for one in self.blocks) - 1
            arguments = self.calls[index]["function"]["arguments"]
            block["input"] = extra("answers.tools", "a tool call").arguments_object(arguments)
        return [*events, self._event("stop")]

    def _text(self, kind: str, text: str) -> list[Json]:
        """Events of a piece of text or of a thought."""
        fields = {"signature": ""} if kind == "thinking" else {}
        is_open = self.open is not None and self.open["type"] == kind
        name = "thinking" if kind == "thinking" else "text"
        events = [] if is_open else self._begin(kind, **{name: ""}, **fields)
        if kind == "thinking" and self.hides_thoughts:
            self.hidden += text
            return events
        assert self.open is not None
        self.open[name] += text
        return [*events, self._event("delta", delta={"type": f"{name}_delta", name: text})]

    def _call(self, piece: Fields) -> list[Json]:
        """Events of the beginning of a call, or of a piece of its arguments."""
        if "id" in piece:
            name, call_id = piece["function"]["name"], piece["id"].replace("call_", "toolu_")
            return self._begin("tool_use", id=call_id, name=name, input={})
        delta = {"type": "input_json_delta", "partial_json": piece["function"]["arguments"]}
        return [self._event("delta", delta=delta)]

    def push(self, delta: Delta) -> list[Json]:
        events: list[Json] = []
        for kind, piece, _ in self.read(delta):
            if kind == "call":
                events += self._call(piece)
            else:
                events += self._text("thinking" if kind == "thought" else "text", piece)
        return events

    def end(self) -> list[Json]:
        events = self._close()
        if all(block["type"] == "thinking" for block in self.blocks):
            events += [*self._begin("text", text=""), *self._close()]
        body = self._body()
        self.keep(body)
        ending = {name: body[name] for name in ("stop_reason", "stop_sequence")}
        events.append({"type": "message_delta", "delta": ending, "usage": body["usage"]})
        return [*events, {"type": "message_stop"}]

    def result(self) -> Json:
        return self._body()


@dataclass(frozen=True, slots=True)
class Thread:
    """A conversation up to an answer: messages, system, tools."""

    fields: Json
    num_chars: int


@contextlib.contextmanager
def own_errors() -> Iterator[ToolList]:
    """Turn errors about the chat into those of this API. The block fills the list of tools."""
    tools = ToolList()
    try:
        yield tools
    except RequestError as error:
        raise in_own_words(error, tools) from None
    except WireError as error:
        error.status = OVERLOADED if error.status == 503 else error.status
        raise


class API(Handlers):
    """Anthropic's Messages API, with a store of conversations that later requests continue."""

    def __init__(self, models: Models, config: ServerConfig, observer: Observer) -> None:
        super().__init__(models, config, observer)
        self.threads: dict[str, Thread] = {}  # by the id of the last message, the oldest first

    def continued(self, given: Json) -> Json:
        """The fields of a body with those of the conversation that it continues. Raises
        WireError 404 for one that is not kept."""
        thread = given.get("thread", {})
        if thread.get("type") != "continue":
            return given
        name = thread.get("previous_message_id")
        earlier = self.threads.get(name) if isinstance(name, str) else None
        if earlier is None:
            raise WireError(404, LOST, f"message {excerpt(name)} is not kept (any more)")
        messages = [*earlier.fields["messages"], *given.get("messages", [])]
        return {**given, **earlier.fields, "messages": messages}

    def keep(self, given: Json, message: Json) -> None:
        """Keep a conversation for a request that continues it; the oldest ones make room."""
        if given.get("thread"):
            fields: Json = {name: given[name] for name in ("system", "tools") if name in given}
            answer = {"role": "assistant", "content": message["content"]}
            fields["messages"] = [*given["messages"], answer]
            self.threads[message["id"]] = Thread(fields, len(json.dumps(fields)))
        num_chars = sum(thread.num_chars for thread in self.threads.values())
        while num_chars > MOST_THREAD_CHARS or len(self.threads) > MOST_THREADS:
            num_chars -= self.threads.pop(next(iter(self.threads))).num_chars

    async def read(
        self, request: Request, tools: ToolList, needed: tuple[str, ...]
    ) -> tuple[Json, WireRequest, Pool]:
        """The fields of a body, the chat that it asks for, and the model. Fills the list of tools.
        Raises RequestError and WireError."""
        body, strict = await self.body(request), self.config.strict
        given, unknown = read_fields(body, {**FIELDS, **WITHOUT_EFFECT}, strict, {})
        for name in needed:
            required(given, name)
        given = self.continued(given)
        read_tools(given, tools)
        if strict and tools.hosted:
            refuse(f"tools: {tools.hosted[0]} cannot be run by this server", "tools")
        pool = await self.models.pool(given.get("model"))
        wire = parse_chat(chat_body(given, tools), pool.sampling, False, pool.source.opening)
        unused = [name for name in given if name in WITHOUT_EFFECT]
        hosted = [f"tools.{kind}" for kind in tools.hosted]
        return given, dataclasses.replace(wire, ignored=(*unknown, *unused, *hosted)), pool

    async def messages(self, request: Request) -> Response:
        """POST /v1/messages"""
        with own_errors() as tools:
            given, wire, pool = await self.read(request, tools, ("max_tokens",))
            job = await pool.start(wire.requests, wire.names)
        seq, splitter = job.sequences[0], job.prepared[0].splitter()
        hides_thoughts = given.get("thinking", {}).get("display") == "omitted"
        model, keep = wire.model or pool.source.name, functools.partial(self.keep, given)
        reply = MessageReply(seq, splitter, model, hides_thoughts, keep)
        return await self.answer(request, job, reply, EVENTS, wire.stream, wire.ignored)

    async def count_tokens(self, request: Request) -> Response:
        """POST /v1/messages/count_tokens: the number of tokens of a prompt, {input_tokens}"""
        with own_errors() as tools:
            _, wire, pool = await self.read(request, tools, ())
            llm = pool.llm()  # counting takes no turn on the model
            ids, _ = await asyncio.to_thread(llm.encode_request, wire.requests[0])
        return as_json({"input_tokens": len(ids)}, headers=ignored_header(wire.ignored))

    routes = (
        Route(messages, ("POST /v1/messages",), BODY, ("max_tokens", "messages")),
        Route(count_tokens, ("POST /v1/messages/count_tokens",), COUNT_BODY, ("messages",)),
    )
