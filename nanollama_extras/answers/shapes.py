"""Messages in the form that a template takes: templates disagree on the order of roles, on messages
without text, and on text in parts. Images stay where they are. And a final message that the model
continues.

Seam       Answer form. `ChatTemplate.render` hands its messages and tools to `draw_any`.
Needs      answers/call_shapes.py, for conversations with tools and calls.
Remove     delete this file; templates then get messages as they are, and no message is continued.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

from nanollama import THOUGHTS, TemplateError, extra, is_about_calls, message_text, warn_once

Messages = list[dict[str, Any]]
Shape = tuple[Messages, str]  # with a notice for the log, "" for none
Draw = Callable[[Messages, Any], str]  # messages and tools -> the prompt. Raises TemplateError.
NO_SYSTEM = "the chat template takes no system message: its text goes before the first question"
NO_LATE_SYSTEM = "the chat template takes a system message first only: a later one is the user's"
IN_TURNS = "the chat template takes turns only: neighbouring messages of a role are joined"
NO_OPENING = "the chat template takes a question first only: an empty one goes before the answer"
KEPT = "\ufdd4"  # a noncharacter that shows which messages the template writes

# A noncharacter, which Unicode reserves for a program's own use; the space shows whether a template
# strips the content of messages
CUT_HERE = "\ufdd2 "
THOUGHT_NAMES = ("reasoning_content", "thinking", "reasoning")  # of a message's thoughts


def draw_any(
    source: str | None,
    draw: Draw,
    messages: Messages,
    tools: list[dict[str, Any]] | None,
    continues: bool,
) -> str:
    """The prompt of messages and tools; if the final message `continues`, up to its end. Raises
    TemplateError where the template takes no form of them."""
    if not continues:
        return draw_shapes(source, draw, messages, tools, lambda text: text)
    errors: list[TemplateError] = []
    for last in cut_endings(messages[-1], source):
        try:
            return draw_shapes(source, draw, [*messages[:-1], last], tools, up_to_cut)
        except TemplateError as error:
            errors.append(error)
    raise errors[0]


def cut_endings(last: dict[str, Any], source: str | None) -> Iterator[dict[str, Any]]:
    """A message to continue, marked where that begins: at the end of its text, or of its thoughts
    if it has no text. These are in the content for templates that do not write thoughts."""
    text, thought = message_text(last), str(last.get("reasoning_content", "")).strip()
    if text or not thought:
        yield {**last, "content": with_text(last, CUT_HERE)}
        return
    thoughts = dict.fromkeys(THOUGHT_NAMES, thought + CUT_HERE)
    yield {**last, **thoughts, "content": ""}
    tags = next((tags for tags in THOUGHTS if tags.close in (source or "")), THOUGHTS[0])
    rest = {name: value for name, value in last.items() if name not in THOUGHT_NAMES}
    yield {**rest, "content": f"{tags.open}\n{thought}{CUT_HERE}"}


def draw_shapes(
    source: str | None,
    draw: Draw,
    messages: Messages,
    tools: list[dict[str, Any]] | None,
    end: Callable[[str], str],
) -> str:
    """What `end` makes of the prompt of the first form that the template takes. Raises
    TemplateError, that of the first form, where the template takes none."""
    errors: list[TemplateError] = []
    whole: list[str] = []  # prompts that lack no more than a system message
    lists: list[Any] = [None, []]  # some templates iterate over no tools
    if tools:
        lists = extra("answers.call_shapes", "a list of tools").tool_shapes(tools)
    for (shape, notice), listed in itertools.product(message_shapes(messages, source), lists):
        try:
            fitted = [fit_content(source, draw, message) for message in shape]
            text = draw(fitted, listed)
            check_nulls(text, draw, fitted, listed)
            whole.append(end(text))
            check_systems(draw, fitted, listed)
        except TemplateError as error:
            errors.append(error)
            continue
        if notice:
            warn_once(notice)
        return whole[-1]
    if whole:
        return whole[0]
    raise errors[0]


def up_to_cut(text: str) -> str:
    """A rendered conversation up to the end of its last message's content, where the model goes on.
    Raises TemplateError where the template left that content out."""
    before, cut, _ = text.rpartition(CUT_HERE[0])
    if not cut:
        raise TemplateError("there is no final message to continue", "continue_final_message")
    return before if text.startswith(CUT_HERE, len(before)) else before.rstrip()


def message_shapes(messages: Messages, source: str | None = None) -> Iterator[Shape]:
    """The messages in each form that some template needs, the usual one first; with a notice."""
    shapes: list[Shape] = [(messages, "")]
    calls = None
    if any(map(is_about_calls, messages)):
        calls = extra("answers.call_shapes", "a conversation with calls")
        shapes = calls.call_shapes(messages)
        messages = shapes[1][0]
    if not all("content" in message for message in messages):
        shapes.append(([{"content": "", **message} for message in messages], ""))  # Qwen3
    yield from shapes
    asked = late_system_as_user(messages)
    turns, notice = in_turns(asked), IN_TURNS if asked == messages else NO_LATE_SYSTEM  # Mistral
    spoken = in_turns([message for message in turns if is_spoken(message)])
    yield from ((turns, notice), (spoken, notice))
    if any(message.get("role") == "system" for message in messages):  # Gemma 2, Mistral 7B
        yield in_turns([as_user(message) for message in spoken]), NO_SYSTEM
    as_text = calls.text_shapes(messages, source) if calls else []
    yield from as_text
    for shape, _ in [*reversed(shapes), (spoken, ""), *as_text]:
        if (opened := with_question(in_turns(late_system_as_user(shape)))) is not None:
            yield opened, NO_OPENING
            yield in_turns([as_user(message) for message in opened]), NO_OPENING


def is_spoken(message: dict[str, Any]) -> bool:
    """False for an answer without a text and calls, of which some templates make an error."""
    is_answer = message.get("role") == "assistant"
    return not is_answer or bool(message_text(message) or message.get("tool_calls"))


def with_question(messages: Messages) -> Messages | None:
    """The messages with an empty question before an answer that comes first; None where none
    does."""
    first = next((i for i, m in enumerate(messages) if m.get("role") != "system"), 0)
    if not messages or messages[first].get("role") != "assistant":
        return None
    return [*messages[:first], {"role": "user", "content": ""}, *messages[first:]]


def check_systems(draw: Draw, messages: Messages, tools: Any) -> None:
    """Raise TemplateError where a template leaves out a system message, as several do with one
    that is not the first, or with all but the last. One message before a question is safe."""
    roles = [message.get("role") for message in messages]
    places = [i for i, role in enumerate(roles) if role == "system" and messages[i].get("content")]
    if places in ([], [0]) and (not places or "user" in roles):
        return
    marked = [dict(message) for message in messages]
    for i in places:
        content = marked[i]["content"]
        marked[i]["content"] = (
            content + KEPT if isinstance(content, str) else [*content, as_part(KEPT)]
        )
    if draw(marked, tools).count(KEPT) < len(places):
        raise TemplateError("the chat template leaves out a system message", "messages")


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
            turns[-1] = {**last, **message, "content": joined(last, message)}
        else:
            turns.append(message)
    return turns


def shows(message: dict[str, Any]) -> bool:
    """Whether a message has an image."""
    content = message.get("content")
    return isinstance(content, list) and not all("text" in part for part in content)


def as_part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


def joined(first: dict[str, Any], second: dict[str, Any]) -> Any:
    """The content of two messages as that of one, with an empty line between their texts."""
    if not shows(first) and not shows(second):
        return "\n\n".join(text for m in (first, second) if (text := message_text(m)))
    one, other = (m["content"] if shows(m) else [as_part(message_text(m))] for m in (first, second))
    return [*one, as_part("\n\n"), *other]


def with_text(message: dict[str, Any], text: str) -> Any:
    """The content of a message with a text behind it."""
    return [*message["content"], as_part(text)] if shows(message) else message_text(message) + text


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
    if shows(message):
        if reads(source, draw, role, True):
            return message
        raise TemplateError("the chat template takes no images", "messages")
    if isinstance(content, list) and not reads(source, draw, role, True):
        return {**message, "content": message_text(message)}
    is_lost = isinstance(content, str) and not reads(source, draw, role, False)
    if is_lost and reads(source, draw, role, True):
        return {**message, "content": [as_part(str(content))]}
    return message


def reads(source: str | None, draw: Draw, role: str, in_parts: bool) -> bool:
    """Whether text of a role reaches the prompt, and not as the notation of a part."""
    key = source, role, in_parts
    if key not in READS:

        def content(text: str) -> Any:
            return [as_part(text)] if in_parts else text

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
