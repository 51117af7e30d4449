"""Arguments of calls that are not JSON: as published templates write them, and as models may."""

from __future__ import annotations

import json
from typing import Any

import published
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_chat import chat_template

from nanollama_extras.answers.notations import NOTATIONS, LiteralReader
from nanollama_extras.answers.tools import TOOL_FORMATS, ToolSplitter, tool_style

PUBLISHED = {
    "google-gemma-4-31B-it": "gemma-4",
    "LFM2.5-8B-A1B": "lfm2",
    "NVIDIA-Nemotron-Nano-v2": "nemotron-2",
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "The weather.",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
        },
    }
]
ARGUMENTS = {
    "city": "Bern, or Basel",
    "days": 3,
    "exact": True,
    "where": [1, -2.5],
    "zone": {"name": "CET", "at": 1},
}


def read(name: str, text: str) -> Any:
    """The calls that a splitter finds in an answer."""
    splitter = ToolSplitter(TOOL_FORMATS[name], {"weather": {"type": "object"}})
    pieces = [*splitter.push(text), *splitter.flush()]
    assert splitter.has_calls, text
    return json.loads("".join(piece.text for piece in pieces if piece.kind == "arguments"))


@pytest.mark.parametrize("path", PUBLISHED)
def test_calls_are_read_as_published_templates_write_them(path: str) -> None:
    template = chat_template((published.llama_cpp() / f"{path}.jinja").read_text(encoding="utf-8"))
    name = PUBLISHED[path]
    assert tool_style(template).form is TOOL_FORMATS[name]
    function = {"name": "weather", "arguments": json.dumps(ARGUMENTS)}
    call = {"id": "call00001", "type": "function", "function": function}
    talk = [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call00001", "content": "sunny"},
    ]
    text = template.prompt(talk, TOOLS)
    begin = text.rindex(TOOL_FORMATS[name].trigger)
    assert read(name, text[begin : text.index("sunny")]) == ARGUMENTS


@pytest.mark.parametrize(
    ("notation", "text", "value"),
    [
        ("python", "a='it''s'", {"a": "it''s"}),
        ("python", "a='it's fine', b=2", {"a": "it's fine", "b": 2}),
        ("python", r"a='it\'s', b='\n\\'", {"a": "it's", "b": "\n\\"}),
        ("python", 'a="x, y)", b=(1, 2,)', {"a": "x, y)", "b": [1, 2]}),
        ("python", "a=[], b={}, c=None, d=false", {"a": [], "b": {}, "c": None, "d": False}),
        ("python", "a={'k': [True, {\"m\": 1e3}]}", {"a": {"k": [True, {"m": 1000.0}]}}),
        ("gemma", 'a:<|"|>}<|"|>,b:{k:[1,<|"|>"<|"|>]}', {"a": "}", "b": {"k": [1, '"']}}),
        ("gemma", 'a: "plain", b : null', {"a": "plain", "b": None}),
        ("gemma", 'a:{<|"|>k<|"|>:true}', {"a": {"k": True}}),
        ("gemma", "a:,", None),
        ("python", "a=" + "[" * 50, None),
        ("python", "3", None),
    ],
)
def test_values_are_read_or_refused(notation: str, text: str, value: Any) -> None:
    tail = {"python": ")", "gemma": "}<tool_call|>"}[notation]
    reader = LiteralReader(NOTATIONS[notation], tail)
    if value is None:
        with pytest.raises(ValueError, match=r"needed|inside each other"):
            reader.read(text + tail)
    else:
        num, arguments = reader.read(text + tail)
        assert (num, json.loads("{" + arguments)) == (len(text), value)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(alphabet="ab'\"\\,)}]\n é", max_size=6),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text("ab-", min_size=1), inner),
    max_leaves=8,
)


@given(st.sampled_from(sorted(NOTATIONS)), st.dictionaries(st.text("abc", min_size=1), VALUES))
def test_any_arguments_are_read_as_they_are_written(name: str, arguments: dict[str, Any]) -> None:
    notation, tail = NOTATIONS[name], {"python": ")", "gemma": "}<tool_call|>"}[name]
    text = notation.spell(arguments) + tail
    for end in range(len(text)):
        assert LiteralReader(notation, tail).read(text[:end]) == (0, "")
    num, found = LiteralReader(notation, tail).read(text)
    assert (num, json.loads("{" + found)) == (len(text) - len(tail), arguments)
