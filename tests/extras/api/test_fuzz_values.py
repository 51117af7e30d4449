"""Every value of every body, replaced by one of another kind: no internal error, no hang, and a 400
that names the field."""

from __future__ import annotations

import asyncio
import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import nanollama
from nanollama_extras.api.inspect import all_routes
from nanollama_extras.api.ollama import OLLAMA_EMBED, OLLAMA_EMBEDDINGS
from nanollama_extras.api.rerank import FIELDS as RERANK
from nanollama_extras.api.shelf import Library, ServedModel, Shelf
from nanollama_extras.testing import Script, ScriptLLM

# an image of one pixel
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"
URL = f"data:image/png;base64,{PNG}"
IMAGE = {"type": "image_url", "image_url": {"url": URL, "detail": "low"}}
BLOCK = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": PNG}}
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}
FUNCTION = {"name": "f", "description": "d", "strict": False, "parameters": SCHEMA}
TOOL = {"type": "function", "function": FUNCTION}
CALL = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
TALK: list[Any] = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": [{"type": "text", "text": "a"}, IMAGE]},
    {"role": "assistant", "content": None, "tool_calls": [CALL], "reasoning_content": "t"},
    {"role": "tool", "tool_call_id": "c", "name": "f", "content": [IMAGE]},
    {"role": "assistant", "content": [{"type": "text", "text": "no"}]},
    {"role": "user", "content": "hello"},
]
CHAT = {
    "messages": TALK,
    "tools": [TOOL],
    "tool_choice": {"type": "function", "function": {"name": "f"}},
    "stream": True,
    "stream_options": {"include_usage": True},
    "metadata": {"a": "b"},
    "logit_bias": {"1": 1},
    "stop": ["x"],
    "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    "chat_template_kwargs": {"a": 1},
    "prediction": {"type": "content", "content": "x"},
    "logprobs": True,
    "top_logprobs": 1,
}
ALLOWED = {"mode": "auto", "tools": [{"type": "function", "function": {"name": "f"}}]}
CHOICES = {
    "messages": TALK[-1:],
    "tools": [TOOL],
    "tool_choice": {"type": "allowed_tools", "allowed_tools": ALLOWED},
    "structured_outputs": {"json": SCHEMA},
}
FLAT = {"type": "function", **FUNCTION}
NEST = {"type": "grammar", "syntax": "lark", "definition": 'start: "(" start ")" | "x"'}
RESPONSE = {
    "input": [
        {
            "type": "message",
            "role": "user",
            "content": [
                {"type": "input_text", "text": "a"},
                {"type": "input_image", "image_url": URL, "detail": "auto"},
            ],
        },
        {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"},
        {
            "type": "function_call_output",
            "call_id": "c",
            "output": [{"type": "input_text", "text": "a"}],
        },
        {"type": "reasoning", "summary": []},
    ],
    "text": {"format": {"type": "json_schema", "name": "n", "schema": SCHEMA}},
    "reasoning": {"effort": "low", "summary": "auto"},
    "tools": [FLAT, {"type": "custom", "name": "g", "format": NEST}],
    "tool_choice": {"type": "function", "name": "f"},
    "include": ["message.output_text.logprobs"],
    "metadata": {"a": "b"},
}
OLLAMA = {
    "messages": [
        {"role": "user", "content": "a", "images": [PNG]},
        {"role": "assistant", "content": "", "thinking": "t", "tool_calls": [CALL]},
        {"role": "tool", "tool_name": "f", "content": "r"},
    ],
    "tools": [TOOL],
    "format": SCHEMA,
    "options": {"num_predict": 3, "stop": ["x"], "temperature": 1, "num_ctx": 64},
    "keep_alive": "5m",
    "think": True,
    "stream": False,
}
THOUGHT = {"type": "thinking", "thinking": "t", "signature": ""}
RESULT = {
    "type": "tool_result",
    "tool_use_id": "c",
    "content": [{"type": "text", "text": "r"}, BLOCK],
}
COUNTED = {
    "system": [{"type": "text", "text": "s", "cache_control": {"type": "ephemeral"}}],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "a"}, BLOCK]},
        {
            "role": "assistant",
            "content": [THOUGHT, {"type": "tool_use", "id": "c", "name": "f", "input": {"a": 1}}],
        },
        {"role": "user", "content": [{**RESULT, "is_error": True}, {"type": "text", "text": "b"}]},
    ],
    "tools": [{"name": "f", "description": "d", "input_schema": SCHEMA}],
    "tool_choice": {"type": "auto", "disable_parallel_tool_use": True},
    "thinking": {"type": "enabled", "budget_tokens": 1024},
}
MESSAGES = {
    **COUNTED,
    "max_tokens": 5,
    "output_config": {"effort": "low"},
    "stop_sequences": ["x"],
    "metadata": {"user_id": "u"},
    "stream": False,
}
BODIES: dict[str, list[dict[str, Any]]] = {
    "/v1/messages": [MESSAGES],
    "/v1/messages/count_tokens": [COUNTED],
    "/v1/chat/completions": [CHAT, CHOICES],
    "/chat/completions": [{"messages": TALK[-1:]}],
    "/v1/completions": [{"prompt": ["a", [1]], "logprobs": 1, "logit_bias": {"1": 2}}],
    "/infill": [
        {
            "input_prefix": "a",
            "input_suffix": "b",
            "prompt": "c",
            "input_extra": [{"filename": "d", "text": "e"}],
            "response_fields": ["content"],
            "n_predict": 3,
            "samplers": ["top_k"],
        }
    ],
    "/v1/rerank": [{"query": "a", "documents": ["b", {"text": "c"}], "top_n": 1}],
    "/v1/responses": [RESPONSE],
    "/v1/responses/compact": [{"input": RESPONSE["input"], "reasoning": {"effort": "low"}}],
    "/v1/embeddings": [{"input": ["a", [1]], "encoding_format": "base64", "dimensions": 2}],
    "/tools/call": [{"name": "a", "arguments": {"b": 1}}],
    "/tokenize": [{"prompt": "a"}, {"content": "a", "with_pieces": True}, CHAT],
    "/detokenize": [{"tokens": [1, 2]}],
    "/apply-template": [CHAT],
    "/xray": [{"messages": TALK[-1:], "answer_ids": [1, 2], "token_id": 3}],
    "/api/chat": [OLLAMA],
    "/api/generate": [
        {"prompt": "a", "context": [1], "options": {"num_predict": 2}},
        {"prompt": "a", "images": [PNG]},
    ],
    "/api/embed": [{"input": ["a"], "options": {"num_ctx": 1}, "dimensions": 2}],
    "/api/embeddings": [{"prompt": "a"}],
    "/api/show": [{}],
    "/api/pull": [{"stream": False}],
    "/api/create": [
        {
            "model": "new",
            "from": "m",
            "parameters": {"temperature": 1, "stop": ["a"]},
            "messages": [{"role": "user", "content": "a"}],
            "license": ["a"],
            "stream": False,
        },
        {"model": "new", "modelfile": "FROM m\nSYSTEM x", "stream": False},
    ],
    "/api/copy": [{"source": "m", "destination": "k"}],
    "/api/delete": [{"model": "unknown"}],
}
VALUES: list[Any] = [
    *(None, True, 0, -1, 2.5, 1e300, 10**30, "", "x", "\ud800", "a" * 70, "é" * 200, "../x", "\0"),
    *([], [None], [[]], [{}], ["a", 1], {}, {"a": []}, {"type": []}, {"": ""}, [[[1]]]),
    {"type": {}, "id": [], "function": []},
    {"type": "item_reference", "id": []},
]
NUM_VALUES = 2  # tried in each place


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of each value inside a body."""
    items: Any = value.items() if isinstance(value, dict) else []
    for key, item in enumerate(value) if isinstance(value, list) else items:
        yield (*place, key)
        yield from places(item, (*place, key))


def replaced(body: Any, place: tuple[Any, ...], value: Any) -> Any:
    body = part = copy.deepcopy(body)
    for key in place[:-1]:
        part = part[key]
    part[place[-1]] = value
    return body


ROUTES = [route for route in all_routes() if route.fields is not None]


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.names[0].split()[1])
def test_a_value_of_any_kind_is_answered_or_refused_by_name(
    route: nanollama.Route, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    script = Script([{"text": "Hi", "tool_calls": [{"name": "f"}]}])
    source = ServedModel("m", lambda: ScriptLLM(script))
    library = Library({"m": source}.get, lambda: ["m"])
    app = nanollama.create_app(Shelf({}, nanollama.ServerConfig(), library=library))
    method, path = route.names[0].split()
    chance = random.Random(path)

    async def run() -> None:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        client = httpx.AsyncClient(transport=transport, base_url="http://localhost")
        async with app.router.lifespan_context(app), client:
            for example in BODIES[path]:
                body = {**dict.fromkeys(route.fields or ()), "model": "m", **example}
                for place in places(body):
                    for value in chance.sample(VALUES, NUM_VALUES):
                        data = json.dumps(replaced(body, place, value))
                        request = client.request(method, path, content=data)
                        answer = await asyncio.wait_for(request, timeout=20)
                        assert answer.status_code < 500, (place, value, answer.text)
                        assert "internal error" not in answer.text, (place, value)
                        if answer.status_code == 400 and method == "POST":
                            name = next(key for key in reversed(place) if isinstance(key, str))
                            known = {name, place[0], *ALIASES.get(place[0], ())}
                            known |= {"a script has no stages"} if path == "/xray" else set()
                            found = any(word in answer.text.lower() for word in known)
                            assert found, (place, value, answer.text)

    asyncio.run(run())


# Field -> words in an error that may come from another field beside it
ALIASES: dict[str, tuple[str, ...]] = {"tools": ("tool_choice",), "modelfile": ("from",)}
GUIDES = ("schema", "regex", "grammar", "choice")
ALIASES |= dict.fromkeys(nanollama.GUIDE_FIELDS, GUIDES)
ALIASES |= dict.fromkeys(RERANK, ("does not rank",))
ALIASES |= dict.fromkeys(OLLAMA_EMBED | OLLAMA_EMBEDDINGS, ("a script has no embeddings",))
