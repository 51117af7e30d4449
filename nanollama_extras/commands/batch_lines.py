"""JSON lines as a batch file: prompts, conversations, and the bodies of OpenAI's batches.

A line of FILE.jsonl or FILE.ndjson is a text, or one of these objects; `messages` may have images:

    {"prompt": "a text"}
    {"messages": [..], "max_tokens": 64, ..}
    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"messages": [..]}}

Fields of a body are those of the API; options of the command line are their defaults. The model is
that of the command line.

Seam       commands.options calls `opened` for such a file. commands.json_lines writes `custom_id`,
           and cluster.batch hands the lines to its engines.
Remove     delete this file; such files then name it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from nanollama import (
    BatchRow,
    GenerationRequest,
    RequestError,
    Settings,
    WireRequest,
    excerpt,
    first_line,
    parse_chat,
    parse_text,
    preferred,
    read_input,
    refuse,
    warn_once,
)

if TYPE_CHECKING:
    from nanollama import LLM

SUFFIXES = (".jsonl", ".ndjson")
CHAT = "/v1/chat/completions"
PARSERS = {CHAT: parse_chat, "/v1/completions": parse_text}
UNSAID = frozenset("id custom_id method url user".split())  # without effect, and without a warning


class BodyText(str):
    """What an output shows as the prompt of a line that has a body. `line` is that line."""

    line: str
    url: str
    body: Mapping[str, Any]
    custom_id: str | None

    def __bool__(self) -> bool:
        """True, whatever is shown: the body may have no text."""
        return True

    def request(self, settings: Settings, llm: LLM) -> GenerationRequest:
        """The request of the body, over the settings. Raises RequestError."""
        sampling = settings.sampling(llm.sampling).items()
        given = {name: value for name, (value, _) in sampling if value is not None}
        parse: Any = PARSERS[self.url]
        opening = {"opening": settings.messages()} if self.url == CHAT else {}
        return only_request(parse(self.body, given, **opening))


class LineSettings(Settings):
    """Settings whose prompts may be those of bodies."""

    def request(self, text: str, llm: LLM) -> GenerationRequest:
        if isinstance(text, BodyText):
            return text.request(self, llm)
        return Settings.request(self, text, llm)


def only_request(wire: WireRequest) -> GenerationRequest:
    """The request of a body, of which a batch can answer all. Raises RequestError."""
    request, *more = wire.requests
    for is_wrong, name, problem in (
        (wire.stream, "stream", "it must be false"),
        (more, "n" if wire.num_prompts == 1 else "prompt", "it must ask for one answer"),
        (wire.echo, "echo", "it must be false"),
        (request.tools, "tools", "tools are not supported there"),
        (request.params.logprobs is not None, "logprobs", "they are not written there"),
    ):
        if is_wrong:
            refuse(f"{name} in a line of a batch: {problem}", name, "unsupported_parameter")
    for name in sorted(set(wire.ignored) - UNSAID):
        warn_once(f"warning: the field {name} of lines has no effect")
    return request


# ---- reading -------------------------------------------------------------------------------------


def opened(settings: Settings) -> tuple[Settings, list[BatchRow]]:
    """The settings and the rows of a file of JSON lines. Raises RequestError."""
    name = settings.args.batch_file
    lines = enumerate(read_input(name).splitlines(), 1)
    rows = [json_row(number, line) for number, line in lines if line.strip()]
    if not rows:
        raise RequestError(f"{name}: holds no prompts; write one on each line")
    return own_settings(settings), rows


def own_settings(settings: Settings) -> Settings:
    return LineSettings(settings.args, settings.modelfile, settings.flags)


def json_row(number: int, line: bytes) -> BatchRow:
    """The row of a JSON line."""
    try:
        text = line.decode("utf-8")
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        reason = f"the line is not valid JSON: {first_line(error)}"
        return BatchRow(number, None, RequestError(reason))
    return value_row(number, value, text)


def value_row(number: int, value: Any, line: str = "") -> BatchRow:
    """The row of a text, or of an object in one of the forms above."""
    try:
        return BatchRow(number, prompt_of(value, line))
    except RequestError as error:
        return BatchRow(number, None, error)


def prompt_of(value: Any, line: str) -> str:
    """The prompt of a line's value. Raises RequestError."""
    fields = value if isinstance(value, Mapping) else {"prompt": value}
    if "body" in fields or "messages" in fields:
        return body_text(fields, line)
    if not isinstance(prompt := fields.get("prompt"), str):
        other = ', and no "messages" or "body"' if fields is value else ""
        raise RequestError(f'the line has no text as "prompt"{other}')
    if re.search("[\ud800-\udfff]", prompt):  # which no file and no block of Ray's takes
        raise RequestError("the text holds a lone surrogate")
    return prompt


def body_text(fields: Mapping[str, Any], line: str) -> BodyText:
    """The prompt of a line with a body, or that is one. Raises RequestError."""
    body, url = fields.get("body", fields), fields.get("url", CHAT)
    method, custom_id = fields.get("method", "POST"), fields.get("custom_id")
    if not isinstance(body, Mapping):
        raise RequestError(f"the line's body is {excerpt(body)}; it must be an object")
    if not isinstance(url, str) or url not in PARSERS or method != "POST":
        problem = f"the line asks for {excerpt(f'{method} {url}')}"
        raise RequestError(f"{problem}; a batch file can have POST {' and '.join(PARSERS)}")
    text = BodyText(shown(body))
    text.line, text.url, text.body = line, url, body
    text.custom_id = None if custom_id is None else str(custom_id)
    return text


def shown(body: Mapping[str, Any]) -> str:
    """What an output shows as the prompt: the text of a body's last message, with a note for each
    image."""
    messages = body.get("messages")
    last = messages[-1] if isinstance(messages, list) and messages else {}
    note: Any = preferred("answers.images", "as_notes", lambda message: message)
    content = note(last).get("content") if isinstance(last, Mapping) else None
    if isinstance(content, list):
        texts = [part.get("text") for part in content if isinstance(part, Mapping)]
        content = "\n".join(text for text in texts if isinstance(text, str))
    return str(body.get("prompt", "") if content is None else content)
