"""Conversations with calls, in the forms that templates take: templates disagree on arguments, ids,
results without calls, calls without results, and on several calls at once.

Seam       Answer form. answers.shapes asks for `call_shapes`, `text_shapes` and `tool_shapes`.
Needs      answers.tools and answers.shapes, which it imports.
Extend     another form is a row of what `call_shapes` returns; the first that a template takes
           counts.
Remove     delete this file; conversations with calls then fail.
Source     https://huggingface.co/docs/transformers/chat_extras and each model's chat template
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from nanollama_extras.answers.shapes import Messages, Shape, in_turns, late_system_as_user
from nanollama_extras.answers.tools import (
    PROBE,
    TOOL_FORMATS,
    TOOL_MARKS,
    arguments_object,
    call_as_content,
    json_text,
    result_as_text,
)

LONE_RESULT = "the chat template takes the result of a call only: one without a call is the user's"
NO_RESULT = "the chat template takes a call only with its result: one without a result is text"
ONE_CALL = "the chat template takes one call at a time: several become several messages"
ALL_TEXT = "the chat template takes no such calls: calls and results are written as text"


def call_shapes(messages: Messages) -> list[Shape]:
    """Messages with calls in each form that some template needs, with notices: arguments as
    objects, the usual form, then with short ids, which all others have, too."""
    messages = [with_arguments(message, arguments_object) for message in messages]
    short = [short_ids(message) for message in with_ids(messages)]  # Mistral
    as_text = [with_arguments(message, json_text) for message in short]  # Functionary
    without_content = [  # DeepSeek
        [{"content": None, **message} for message in shape] for shape in (short, as_text)
    ]
    single = one_call_each(short)  # Llama 3.1
    matched = with_lone_results_as_text(short)  # gpt-oss
    last = in_turns(with_answers(late_system_as_user(matched)))
    usual = [messages, short, as_text, *without_content]
    rarer: list[Shape] = [(single, ONE_CALL)] if single != short else []
    rarer += [(matched, LONE_RESULT if matched != short else ""), (last, "")]
    return [*((shape, "") for shape in usual), *rarer]


def text_shapes(messages: Messages, source: str | None) -> list[Shape]:
    """Messages, in the usual form with short ids, with calls as text: those without a result, then
    all. None of them where answers.tools asks if the template writes calls."""
    if is_probe(messages):
        return []
    answered = with_lone_results_as_text(without_results_as_text(messages, source))
    shapes = [answered, in_turns(with_answers(late_system_as_user(answered)))]
    plain = in_turns(late_system_as_user(without_calls(messages, source)))
    return [*((shape, NO_RESULT) for shape in shapes), (plain, ALL_TEXT)]


def is_probe(messages: Messages) -> bool:
    """Whether answers.tools asks if a template writes calls: text in their place is no answer."""
    calls = [call for message in messages for call in message.get("tool_calls") or ()]
    return any(call["function"]["name"] == PROBE for call in calls if isinstance(call, Mapping))


def without_calls(messages: Messages, source: str | None) -> Messages:
    """The messages with all calls and results as text, as the model may write them."""
    name = next((n for mark, n in TOOL_MARKS.items() if mark in (source or "")), "hermes")
    return [dict(call_as_content(message, TOOL_FORMATS[name])) for message in messages]


def without_results_as_text(messages: Messages, source: str | None) -> Messages:
    """The messages with each call as text that no result follows, unless it is the last message."""
    as_text, out = without_calls(messages, source), []
    for i, (message, plain) in enumerate(zip(messages, as_text)):
        rest = messages[i + 1 : i + 2]
        is_open = bool(message.get("tool_calls")) and bool(rest) and rest[0].get("role") != "tool"
        out.append(plain if is_open else message)
    return out


def one_call_each(messages: Messages) -> Messages:
    """The messages with one call each, and its result after it. The messages have ids."""
    out: Messages = []
    for i, message in enumerate(messages):
        calls = message.get("tool_calls")
        if not isinstance(calls, list) or len(calls) < 2:
            out.append(message)
            continue
        results: dict[Any, dict[str, Any]] = {}
        for result in messages[i + 1 :]:
            if result.get("role") != "tool":
                break
            results.setdefault(result.get("tool_call_id"), result)
        for j, call in enumerate(calls):
            text = {} if j == 0 else {"content": ""}
            found = results.get(call.get("id") if isinstance(call, Mapping) else None)
            out += [{**message, **text, "tool_calls": [call]}, *([found] if found else [])]
    seen: set[int] = set()
    once = []
    for message in out:  # a result stands after its call, and where it was
        if message.get("role") != "tool" or id(message) not in seen:
            once.append(message)
        seen.add(id(message))
    return once


def with_arguments(message: dict[str, Any], convert: Callable[[Any], Any]) -> dict[str, Any]:
    """The message with the arguments of its calls converted; missing ones are None."""

    def converted(call: Any) -> Any:
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping):
            return call
        arguments = convert(function.get("arguments"))
        return {**call, "function": {**function, "arguments": arguments}}

    if not isinstance(calls := message.get("tool_calls"), list):
        return message
    return {**message, "tool_calls": [*map(converted, calls)]}


def with_ids(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with an id for each call, and for each result that of its call."""
    out, open_ids = [], list[str]()
    for i, message in enumerate(messages):
        if isinstance(calls := message.get("tool_calls"), list):
            is_named = [isinstance(c, Mapping) and isinstance(c.get("id"), str) for c in calls]
            calls = [
                call if named or not isinstance(call, Mapping) else {**call, "id": f"call{i}x{j}"}
                for j, (call, named) in enumerate(zip(calls, is_named))
            ]
            open_ids = [call["id"] for call in calls if isinstance(call, Mapping)]
            message = {**message, "tool_calls": calls}
        elif message.get("role") == "tool":
            given = message.get("tool_call_id")
            found = given if isinstance(given, str) else (open_ids or ["call"])[0]
            open_ids = [name for name in open_ids if name != found]
            message = {**message, "tool_call_id": found}
        out.append(message)
    return out


def with_lone_results_as_text(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with each result that follows no call as a user's message."""
    out, follows_call = [], False
    for message in messages:
        is_result = message.get("role") == "tool"
        follows_call = follows_call if is_result else bool(message.get("tool_calls"))
        out.append(result_as_text(message) if is_result and not follows_call else message)
    return out


def with_answers(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages with an empty answer between the result of a call and a question (Mistral)."""
    roles = [message.get("role") for message in messages]
    gaps = {i for i in range(1, len(roles)) if roles[i - 1 : i + 1] == ["tool", "user"]}
    answer = {"role": "assistant", "content": ""}
    return [one for i, m in enumerate(messages) for one in ([answer, m] if i in gaps else [m])]


def short_ids(message: dict[str, Any]) -> dict[str, Any]:
    """The message with ids of calls cut to their last nine letters and digits."""

    def short(item: Any, key: str = "id") -> Any:
        if not isinstance(item, Mapping) or not isinstance(item.get(key), str):
            return item
        return {**item, key: re.sub("[^A-Za-z0-9]", "", item[key])[-9:].rjust(9, "0")}

    message = short(message, "tool_call_id")
    calls = message.get("tool_calls")
    return {**message, "tool_calls": [*map(short, calls)]} if isinstance(calls, list) else message


def tool_shapes(tools: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The tools as they are; then with each description and parameters filled in (Seed-OSS)."""
    functions = [tool["function"] for tool in tools if isinstance(tool.get("function"), dict)]
    empty = {"description": "", "parameters": {"type": "object", "properties": {}}}
    filled = [{"type": "function", "function": {**empty, **function}} for function in functions]
    return [tools, filled] if filled else [tools]
