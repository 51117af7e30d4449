"""llama.cpp's POST /infill: the text of a gap between a prefix and a suffix, as editors ask for it.

Other files of the project (`input_extra`) go before the prefix, the last ones as far as the context
has room. `prompt` is the beginning of the gap's text.

Seam       a dialect: a row of `nanollama.DIALECTS`.
Needs      answers/fim.py; api/timings.py for `timings`.
Remove     delete this file and its row.
Spec       https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from nanollama import (
    GUIDE_FIELDS,
    SAMPLING_FIELDS,
    SSE,
    ExtraError,
    Handlers,
    Reply,
    Route,
    check_type,
    extra,
    parse_text,
    read_fields,
    refuse,
    required,
    table,
)

if TYPE_CHECKING:
    from starlette.requests import Request
    from starlette.responses import Response

    from nanollama import LLM, Delta, Fields, Json, Sequence, WireRequest

OWN = table(string="input_prefix input_suffix prompt", array="input_extra response_fields")
REQUIRED = ("input_prefix", "input_suffix")
FORMS = table({name: GUIDE_FIELDS[name] for name in ("grammar", "json_schema")})
FIELDS = table(OWN, SAMPLING_FIELDS, FORMS, string="model", integer="n_predict", boolean="stream")
# Fields that editors send, about speed alone
WITHOUT_EFFECT = table(
    boolean="cache_prompt timings_per_token return_progress return_tokens",
    integer="id_slot n_indent n_keep n_cache_reuse t_max_prompt_ms t_max_predict_ms",
    string_or_array="samplers",
)
MAX_FILES, MAX_STOPS = 1024, 64


def other_files(given: Fields) -> list[tuple[str, str]]:
    """The names and texts of `input_extra`. Raises RequestError."""
    files = []
    if len(listed := given.get("input_extra", [])) > MAX_FILES:
        refuse(f"input_extra has {len(listed)} files; at most {MAX_FILES} fit", "input_extra")
    for i, file in enumerate(listed):
        where = f"input_extra[{i}]"
        check_type(where, file, "object")
        name, text = file.get("filename") or "file", file.get("text")
        check_type(f"{where}.filename", name, "string")
        check_type(f"{where}.text", text, "string")
        files.append((name, text))
    return files


def infill_wire(given: Fields, defaults: Fields, strict: bool) -> WireRequest:
    """The request of a body, whose prompt is not encoded yet. Raises RequestError."""
    names = (*SAMPLING_FIELDS, *FORMS, "model", "stream")
    body: Json = {name: given[name] for name in names if name in given}
    body["max_tokens"] = max(given.get("n_predict", given.get("max_tokens", -1)), -1)
    return parse_text({**body, "prompt": "-"}, defaults, strict)


def encode_gap(given: Fields, wire: WireRequest, llm: LLM) -> WireRequest:
    """The request with its prompt. Raises RequestError."""
    gap = extra("answers.fim", "/infill").Gap(llm.tokenizer)
    request, n_ctx = wire.requests[0], llm.engine.n_ctx
    most = request.params.max_tokens
    room = n_ctx - min(n_ctx // 2 if most is None else most, n_ctx // 2)
    texts = (given.get(name, "") for name in (*REQUIRED, "prompt"))
    ids = gap.fill(*texts, other_files(given), room)
    params = dataclasses.replace(request.params, stop=(*request.params.stop, *gap.ends)[:MAX_STOPS])
    one = dataclasses.replace(request, prompt=ids, params=params)
    return dataclasses.replace(wire, requests=(one,))


def nested(value: Any, path: str) -> Any:
    """The value at a path like timings/prompt_n; None where there is none."""
    for key in path.split("/"):
        value = value.get(key) if isinstance(value, dict) else None
    return value


class InfillReply(Reply):
    """An answer of /infill. With `wanted`, it has these fields alone."""

    def __init__(
        self, seq: Sequence, model: str, wanted: list[str], stops: tuple[str, ...]
    ) -> None:
        self.seq, self.model, self.wanted, self.stops = seq, model, wanted, stops
        self.text = ""
        self.last: Delta | None = None

    def chosen(self, body: Json) -> Json:
        found = {path: nested(body, path) for path in self.wanted}
        return {k: v for k, v in found.items() if v is not None} if self.wanted else body

    def push(self, delta: Delta) -> list[Json]:
        self.text += delta.text
        if not delta.finish_reason:
            tokens = [] if delta.token_id is None else [delta.token_id]
            return [self.chosen({"content": delta.text, "tokens": tokens, "stop": False})]
        self.last = delta
        return [self.chosen({**self.closing(), "content": delta.text})]

    def closing(self) -> Json:
        """The fields at the end of an answer."""
        assert self.last
        usage = self.last.usage
        assert usage
        whole = self.seq.text.tokenizer.decode(self.seq.token_ids[self.seq.num_prompt :])
        words = [word for word in self.stops if word in whole] if self.seq.text.stopped else []
        kind = "word" if words else "limit" if self.last.finish_reason == "length" else "eos"
        body: Json = {
            "index": 0,
            "content": self.text,
            "tokens": [],
            "stop": True,
            "model": self.model,
            "tokens_predicted": usage.completion_tokens,
            "tokens_evaluated": usage.prompt_tokens,
            "tokens_cached": usage.prompt_tokens + usage.completion_tokens,
            "has_new_line": "\n" in self.text,
            "truncated": False,
            "stop_type": kind,
            "stopping_word": words[0] if words else "",
        }
        with contextlib.suppress(ExtraError):
            body["timings"] = extra("api.timings", "timings").timings_body([usage])
        return body

    def result(self) -> Json:
        return self.chosen(self.closing())


class API(Handlers):
    """llama.cpp's completion for editors."""

    async def infill(self, request: Request) -> Response:
        """POST /infill: the text between input_prefix and input_suffix"""
        body, pool = await self.read_request(request)
        given, ignored = read_fields(body, table(FIELDS, WITHOUT_EFFECT), self.config.strict)
        for name in REQUIRED:
            required(given, name)
        wanted = given.get("response_fields", [])
        for path in wanted:
            check_type("response_fields", path, "string")
        wire = infill_wire(given, pool.sampling, self.config.strict)
        stops = wire.requests[0].params.stop
        held = getattr(pool, "held", contextlib.nullcontext)
        with held():  # a model that may come and go stays
            encode = functools.partial(encode_gap, given, wire, pool.llm())
            wire = await asyncio.to_thread(encode)
        job = await pool.start(wire.requests, {**wire.names, "prompt": "input_prefix"})
        reply = InfillReply(job.sequences[0], wire.model or pool.source.name, wanted, stops)
        ignored += tuple(name for name in WITHOUT_EFFECT if name in given)
        encoding = dataclasses.replace(SSE, last=b"")
        return await self.answer(request, job, reply, encoding, wire.stream, ignored)

    routes = (Route(infill, ("POST /infill",), table(FIELDS, WITHOUT_EFFECT), REQUIRED),)
