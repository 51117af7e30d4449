"""Messages in the form that a template takes: templates disagree on the order of roles, on messages
without text, and on text in parts. And a final message that the model continues.

Seam       Answer form. `ChatTemplate.render` hands its messages and tools to `draw_any`.
Needs      answers/tools.py, for conversations with tools and calls.
Remove     delete this file; templates then get messages as they are, and no message is continued.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

from nanollama import TemplateError, extra, is_about_calls, message_text, warn_once

Messages = list[dict[str, Any]]
Draw = Callable[[Messages, Any], str]  # messages and tools -> the prompt. Raises TemplateError.
NO_SYSTEM = "the chat template takes no system message: its text goes before the first question"
NO_LATE_SYSTEM = "the chat template takes a system message first only: a later one is the user's"
IN_TURNS = "the chat template takes turns only: neighbouring messages of a role are joined"


# A noncharacter, which Unicode reserves for a program's own use; the space shows whether a template
# strips the content of messages
CUT_HERE = "\ufdd2 "


def draw_any(
    source: str | None,
    draw: Draw,
    messages: Messages,
    tools: list[dict[str, Any]] | None,
    continues: bool,
) -> str:
    """The prompt of the first form of messages and tools that the template takes; if the final
    message `continues`, up to its end. Raises TemplateError, that of the first form, where the
    template takes none."""
    if continues:
        last = messages[-1]
        messages = [*messages[:-1], {**last, "content": message_text(last) + CUT_HERE}]
    errors: list[TemplateError] = []
    lists = extra("answers.tools", "a list of tools").tool_shapes(tools) if tools else [None]
    for (shape, notice), listed in itertools.product(message_shapes(messages), lists):
        try:
            fitted = [fit_content(source, draw, message) for message in shape]
            text = draw(fitted, listed)
            check_nulls(text, draw, fitted, listed)
            text = up_to_cut(text) if continues else text
        except TemplateError as error:
            errors.append(error)
            continue
        if notice:
            warn_once(notice)
        return text
    raise errors[0]


def up_to_cut(text: str) -> str:
    """A rendered conversation up to the end of its last message's content, where the model goes on.
    Raises TemplateError where the template left that content out."""
    before, cut, _ = text.rpartition(CUT_HERE[0])
    if not cut:
        raise TemplateError("there is no final message to continue", "continue_final_message")
    return before if text.startswith(CUT_HERE, len(before)) else before.rstrip()


def message_shapes(messages: Messages) -> Iterator[tuple[Messages, str]]:
    """The messages in each form that some template needs, the usual one first; with a notice."""
    shapes = [messages]
    if any(map(is_about_calls, messages)):
        shapes = extra("answers.tools", "a conversation with calls").call_shapes(messages)
        messages = shapes[1]
    if not all("content" in message for message in messages):
        shapes.append([{"content": "", **message} for message in messages])  # Qwen3
    yield from ((shape, "") for shape in shapes)
    asked = late_system_as_user(messages)
    turns = in_turns(asked)  # Mistral
    yield turns, IN_TURNS if asked == messages else NO_LATE_SYSTEM
    if any(message.get("role") == "system" for message in messages):  # Gemma 2, Mistral 7B
        yield in_turns([as_user(message) for message in turns]), NO_SYSTEM


def as_user(message: dict[str, Any]) -> dict[str, Any]:
    """A system message as the user's; any other as it is."""
    return {**message, "role": "user"} if message.get("role") == "system" else message


def late_system_as_user(messages: Messages) -> Messages:
    """The messages, of which those from the system are the user's unless they come first. They stay
    where they are: what goes before them is a prefix that later requests share."""
    roles = [message.get("role") for message in messages]
    num_first = next((i for i, role in enumerate(roles) if role != "system"), len(roles))
    return messages[:num_first] + [as_user(message) for message in messages[num_first:]]


def in_turns(messages: Messages) -> Messages:
    """The messages with neighbours of the same role joined."""
    turns: Messages = []
    for message in messages:
        last = turns[-1] if turns else {}
        joinable = "tool_calls" not in {**last, **message} and message.get("role") != "tool"
        if turns and joinable and last.get("role") == message.get("role"):
            texts = [text for m in (last, message) if (text := message_text(m))]
            turns[-1] = {**last, **message, "content": "\n\n".join(texts)}
        else:
            turns.append(message)
    return turns


def check_nulls(text: str, draw: Draw, messages: Messages, tools: Any) -> None:
    """Raise TemplateError where a template writes a content that is null as that word (LFM2)."""
    if not any("content" in m and m["content"] is None for m in messages):
        return
    filled = [{**m, "content": "" if m.get("content") is None else m["content"]} for m in messages]
    empty = draw(filled, tools)
    if any(text.count(word) > empty.count(word) for word in ("null", "None")):
        raise TemplateError("the chat template writes a message without text as null", "messages")


# ---- text in parts -------------------------------------------------------------------------------

READS: dict[tuple[str | None, str, bool], bool] = {}  # results of `reads`


def fit_content(source: str | None, draw: Draw, message: dict[str, Any]) -> dict[str, Any]:
    """The message with text as the template reads it: parts stay where the template joins them in
    its own way, and a string becomes a part where it would vanish."""
    role, content = str(message.get("role")), message.get("content")
    if isinstance(content, list) and not reads(source, draw, role, True):
        return {**message, "content": message_text(message)}
    is_lost = isinstance(content, str) and not reads(source, draw, role, False)
    if is_lost and reads(source, draw, role, True):
        return {**message, "content": [{"type": "text", "text": content}]}
    return message


def reads(source: str | None, draw: Draw, role: str, in_parts: bool) -> bool:
    """Whether text of a role reaches the prompt, and not as the notation of a part."""
    key = source, role, in_parts
    if key not in READS:

        def content(text: str) -> Any:
            return [{"type": "text", "text": text}] if in_parts else text

        word = f"probe-{role}"
        user = {"role": "user", "content": content("?")}
        one = {"role": role, "content": content(word)}
        talks = {"system": [one, user], "assistant": [user, one, user]}
        try:
            text = draw(talks.get(role, [one]), None)
        except TemplateError:
            text = ""
        READS[key] = word in text and not (in_parts and re.search(f"[\"']{word}", text))
    return READS[key]
