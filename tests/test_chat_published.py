"""Section 9: every chat template that package indexes deliver renders as in transformers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import published
import pytest
from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from test_chat import (
    ANSWER,
    CALL,
    CONVERSATIONS,
    RESULT,
    SPECIAL,
    SYSTEM,
    THOUGHT,
    TOOLS,
    USER,
    chat_template,
    hugging_face,
    outcome,
)
from transformers.utils.chat_template_utils import _compile_jinja_template

import nanollama
from nanollama import TemplateError
from nanollama_extras.answers import shapes

__all__ = ["hugging_face"]  # a fixture


def call(number: int, **arguments: Any) -> dict[str, Any]:
    function = {"name": "get_weather", "arguments": arguments}
    return {"id": f"call{number:05d}", "type": "function", "function": function}


CALLS = {
    "role": "assistant",
    "content": "",
    "tool_calls": [call(1, city="Köln"), call(2, city="<Ulm>", days=[1, 2], deep={"a": True})],
}
RESULTS = [
    {**RESULT, "tool_call_id": "call00001"},
    {**RESULT, "tool_call_id": "call00002", "content": '{"t": 3}'},
]
NO_ARGUMENTS = {
    "type": "function",
    "function": {"name": "f", "description": "", "parameters": {"type": "object"}},
}
THINKING_CALL = {**CALL, "reasoning_content": "look it up"}
BARE_CALL = {key: value for key, value in CALL.items() if key != "content"}

MORE: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    **CONVERSATIONS,
    "two calls": ([USER, CALLS, *RESULTS], {"tools": TOOLS}),
    "a turn after two calls": ([SYSTEM, USER, CALLS, *RESULTS, ANSWER, USER], {"tools": TOOLS}),
    "a thought before a call": ([USER, THINKING_CALL, RESULT], {"tools": TOOLS}),
    "a thought after a call": ([USER, THINKING_CALL, RESULT, THOUGHT, USER], {"tools": TOOLS}),
    "words before a call": ([USER, {**CALL, "content": "Wait."}, RESULT], {"tools": TOOLS}),
    "a call without content": ([USER, BARE_CALL, RESULT], {"tools": TOOLS}),
    "two tools": ([USER], {"tools": [*TOOLS, NO_ARGUMENTS]}),
    "calls without tools": ([USER, CALL, RESULT], {}),
    "tools, thinking off": ([USER], {"tools": TOOLS, "enable_thinking": False}),
    "thinking, as DeepSeek spells it": ([USER], {"thinking": True}),
    "an effort": ([SYSTEM, USER], {"reasoning_effort": "high"}),
    "a date": ([USER], {"date_string": "1 Jan 2026"}),
    "thoughts kept": ([USER, THOUGHT, USER], {"preserve_thinking": True, "clear_thinking": False}),
    "many turns": ([SYSTEM, USER, ANSWER, USER, THOUGHT, USER, ANSWER, USER], {}),
    "an empty message": ([{"role": "user", "content": ""}], {}),
    "a system message alone": ([SYSTEM], {}),
    "a system message last": ([USER, ANSWER, SYSTEM], {}),
}


def respelled(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """What transformers' own Jinja makes of these messages, null values included."""
    options = {
        "tools": None,
        "documents": None,
        "add_generation_prompt": True,
        **SPECIAL,
        **options,
    }
    return _compile_jinja_template(source).render(messages=messages, **options)


def in_parts(message: dict[str, Any]) -> dict[str, Any]:
    if not isinstance(text := message.get("content"), str):
        return message
    return {**message, "content": [{"type": "text", "text": text}]}


def loses_system(texts: set[str | None], messages: list[dict[str, Any]]) -> bool:
    """Whether a template leaves out a system message."""
    return any(
        nanollama.message_text(m).strip() not in str(text)
        for m in messages
        if m["role"] == "system"
        for text in texts
    )


def check(source: str, hugging_face: Callable[..., str]) -> None:
    """Our text is theirs. Where they have none, or lose a text, it is theirs for the same messages
    spelled another way, or has every text, or is an error of one line."""
    ours = chat_template(source)
    for title, (messages, options) in MORE.items():
        theirs = {outcome(hugging_face, source, messages, **options)} - {None}
        if messages and not options.get("continue_final_message"):
            clean = [nanollama.clean_message(message) for message in messages]
            spellings = []
            if not theirs or loses_system(theirs, clean):
                spellings = [shape for shape, _ in shapes.message_shapes(clean, source)]
            spellings.append([in_parts(message) for message in clean])
            for more in ({}, {"tools": []}):  # some templates iterate over no tools
                rest = {**more, **options}
                theirs |= {outcome(respelled, source, one, **rest) for one in spellings} - {None}
        if theirs:
            assert ours.render(messages, **options) in theirs, title
            continue
        text = outcome(ours.render, messages, **options)
        if text is None:
            with pytest.raises(TemplateError) as caught:
                ours.render(messages, **options)
            assert "\n" not in str(caught.value), title
        else:  # contents have another form, as well
            texts = [nanollama.message_text(message).strip() for message in messages]
            assert all(one in text for one in texts), title


def test_llama_cpps_collection_renders_as_in_transformers(hugging_face: Callable[..., str]) -> None:
    templates = sorted(published.llama_cpp().glob("*.jinja"))
    assert len(templates) == 70
    for path in templates:
        check(path.read_text(encoding="utf-8"), hugging_face)


@pytest.mark.node
@pytest.mark.parametrize("name", published.NPM)
def test_templates_of_published_tokenizers_render_as_in_transformers(
    name: str, hugging_face: Callable[..., str]
) -> None:
    templates = nanollama.open_text(published.npm_tokenizer(name)).templates
    if not templates:
        pytest.skip("has no template")
    for source in templates.values():
        check(source, hugging_face)


def mistral_templates() -> Iterator[str]:
    for version in TokenizerVersion:
        for is_spm in (True, False):
            for thinks in (True, False):
                try:
                    yield generate_chat_template(
                        is_spm, version, False, False, thinks, None, False, True, None, None, None
                    )
                except ValueError:  # a version has one kind of tokenizer, and thinks or does not
                    continue


def test_mistrals_own_templates_render_as_in_transformers(hugging_face: Callable[..., str]) -> None:
    templates = set(mistral_templates())
    assert len(templates) > 8
    for source in templates:
        check(source, hugging_face)


@pytest.mark.node
def test_a_directory_with_named_templates_uses_the_one_for_tools(
    hugging_face: Callable[..., str],
) -> None:
    text = nanollama.open_text(published.npm_tokenizer("command_r_plus"))
    assert {"default", "tool_use", "rag"} <= text.templates.keys()
    ours = nanollama.ChatTemplate(text)
    ours.special_tokens = chat_template("").special_tokens
    flat = [{"name": "f", "description": "Does it", "parameter_definitions": {}}]
    for tools, name in ((None, "default"), (flat, "tool_use")):
        source = text.templates[name]
        assert ours.render([SYSTEM, USER], tools) == hugging_face(
            source, [SYSTEM, USER], tools=tools
        )
