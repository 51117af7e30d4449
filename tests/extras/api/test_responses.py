"""POST /v1/responses, through the official SDK."""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lark
import openai
import pydantic
import pytest
from openai.types.responses import Response, ResponseCompactionItem
from serving import Live, serving

import nanollama
from nanollama import LLM, RequestError, TestServer
from nanollama_extras.api import responses
from nanollama_extras.api.compaction import summary_request
from nanollama_extras.api.response_tools import TextArgument, chat_name
from nanollama_extras.api.responses import parse_response

GREEDY: dict[str, Any] = {"temperature": 0, "max_output_tokens": 24}
WEATHER: Any = {
    "type": "function",
    "name": "get_weather",
    "description": "The weather in a city",
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}},
        "required": ["city"],
        "additionalProperties": False,
    },
    "strict": True,
}


@pytest.fixture(scope="module")
def live(tiny: Callable[..., Path]) -> Iterator[Live]:
    model = tiny(max_position_embeddings=1024)
    with serving(lambda: LLM(model, parallel=2), model_id="tiny") as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)


def scripted(server: TestServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url, api_key="any", max_retries=0)


def chat(client: openai.OpenAI, messages: Any) -> str:
    answer = client.chat.completions.create(
        model="tiny", messages=messages, temperature=0, max_tokens=24
    )
    return answer.choices[0].message.content or ""


def test_a_response_is_what_a_chat_answers(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="tiny", input="hello", instructions="Be brief.", **GREEDY
    )
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello"}]
    assert response.output_text == chat(client, messages)
    assert response.id.startswith("resp_")
    assert response.status == ("incomplete" if response.incomplete_details else "completed")
    (item,) = response.output
    assert (item.type, item.role) == ("message", "assistant")
    usage = response.usage
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert 0 < usage.output_tokens <= 24
    assert (response.instructions, response.temperature, response.model) == ("Be brief.", 0, "tiny")
    Response.model_validate(response.model_dump(warnings=False))


def test_input_items_are_messages(client: openai.OpenAI) -> None:
    items: Any = [
        {"role": "developer", "content": "Be brief."},
        {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "one"}]},
        {"role": "assistant", "content": [{"type": "output_text", "text": "two"}]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"role": "user", "content": [{"type": "input_text", "text": "th"}] * 2},
    ]
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "thth"},
    ]
    response = client.responses.create(model="tiny", input=items, **GREEDY)
    assert response.output_text == chat(client, messages)


def test_a_stream_has_the_events_that_the_sdk_expects(client: openai.OpenAI) -> None:
    whole = client.responses.create(model="tiny", input="hello", **GREEDY)
    events = list(client.responses.create(model="tiny", input="hello", stream=True, **GREEDY))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    kinds = [event.type for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert set(kinds[4:-4]) == {"response.output_text.delta"}
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        f"response.{whole.status}",
    ]
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == whole.output_text == events[-4].text == events[-1].response.output_text
    assert events[0].response.id == events[-1].response.id
    assert events[2].item.id == events[-2].item.id == events[-1].response.output[0].id
    for event in events:
        type(event).model_validate(event.model_dump(warnings=False))


def test_the_sdks_stream_helper(client: openai.OpenAI, test_server: TestServer) -> None:
    test_server.answers("The answer is 42.")
    with scripted(test_server).responses.stream(model="any", input="hello") as stream:
        events = list(stream)
        final = stream.get_final_response()
    assert final.output_text == "The answer is 42."
    snapshots = [event.snapshot for event in events if event.type == "response.output_text.delta"]
    assert snapshots[-1] == final.output_text


def test_parse_gives_what_a_pydantic_model_says(client: openai.OpenAI) -> None:
    class Place(pydantic.BaseModel):
        visited: bool
        rank: int = pydantic.Field(ge=0, le=9)

    response = client.responses.parse(model="tiny", input="hello", text_format=Place)
    assert isinstance(response.output_parsed, Place)
    with client.responses.stream(model="tiny", input="hello", text_format=Place) as stream:
        assert isinstance(stream.get_final_response().output_parsed, Place)


def test_an_answer_that_is_cut_is_incomplete(client: openai.OpenAI) -> None:
    extra = {"ignore_eos": True}
    for stream in (False, True):
        got = client.responses.create(
            model="tiny", input="hello", max_output_tokens=3, extra_body=extra, stream=stream
        )
        response = list(got)[-1].response if stream else got
        assert response.status == "incomplete"
        assert response.incomplete_details.reason == "max_output_tokens"
        assert response.usage.output_tokens == 3


def test_logprobs_on_request(client: openai.OpenAI) -> None:
    include: Any = ["message.output_text.logprobs"]
    response = client.responses.create(
        model="tiny", input="hello", include=include, top_logprobs=2, **GREEDY
    )
    entries = response.output[0].content[0].logprobs
    assert "".join(bytes(entry.bytes).decode("latin-1") for entry in entries)
    assert all(len(entry.top_logprobs) == 2 for entry in entries)
    plain = client.responses.create(model="tiny", input="hello", **GREEDY)
    assert plain.output[0].content[0].logprobs == []


def test_thoughts_are_an_item_of_their_own(test_server: TestServer) -> None:
    test_server.answers({"reasoning": "hm so", "text": "Yes it is."})
    client = scripted(test_server)
    response = client.responses.create(model="any", input="hello")
    thought, message = response.output
    assert (thought.type, thought.content[0].text) == ("reasoning", "hm so")
    assert response.output_text == "Yes it is."
    assert 0 < response.usage.output_tokens_details.reasoning_tokens < response.usage.output_tokens
    kinds = [event.type for event in client.responses.create(model="any", input="a", stream=True)]
    assert "response.reasoning_text.delta" in kinds
    assert kinds.index("response.reasoning_text.done") < kinds.index("response.output_text.delta")
    assert message.type == "message"


# ---- tools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", ["required", {"type": "function", "name": "get_weather"}])
def test_a_call_that_is_asked_for_is_made(client: openai.OpenAI, choice: Any) -> None:
    response = client.responses.create(
        model="tiny", input="Rain?", tools=[WEATHER], tool_choice=choice, parallel_tool_calls=False
    )
    assert [item.type for item in response.output] == ["function_call"], response.output
    (call,) = response.output
    assert (call.type, call.name, call.status) == ("function_call", "get_weather", "completed")
    assert isinstance(json.loads(call.arguments)["city"], str)
    assert call.call_id != call.id
    assert response.tool_choice == choice or response.tool_choice.name == "get_weather"


def test_a_call_is_streamed_and_its_result_goes_back(test_server: TestServer) -> None:
    calls = [{"name": "get_weather", "arguments": {"city": city}} for city in ("Paris", "Rome")]
    test_server.answers({"text": "Let me see. ", "tool_calls": calls}, "Sunny.")
    client = scripted(test_server)
    with client.responses.stream(model="any", input="Rain?", tools=[WEATHER]) as stream:
        events = list(stream)
        response = stream.get_final_response()
    message, paris, rome = response.output
    assert message.content[0].text.strip() == "Let me see."
    assert [json.loads(call.arguments) for call in (paris, rome)] == [c["arguments"] for c in calls]
    pieces = [e.delta for e in events if e.type == "response.function_call_arguments.delta"]
    assert "".join(pieces) == paris.arguments + rome.arguments
    done = [e.arguments for e in events if e.type == "response.function_call_arguments.done"]
    assert done == [paris.arguments, rome.arguments]
    results: Any = [
        {"type": "function_call_output", "call_id": call.call_id, "output": "sun"}
        for call in (paris, rome)
    ]
    again = client.responses.create(
        model="any", input=results, previous_response_id=response.id, tools=[WEATHER]
    )
    assert again.output_text == "Sunny."
    items: Any = [{"role": "user", "content": "Rain?"}, *response.output, *results]
    spelled = client.responses.create(model="any", input=items, tools=[WEATHER])
    assert spelled.usage.input_tokens == again.usage.input_tokens


# ---- going on ------------------------------------------------------------------------------------


def test_a_response_goes_on_from_an_earlier_one(client: openai.OpenAI) -> None:
    first = client.responses.create(model="tiny", input="hello", instructions="Be brief.", **GREEDY)
    second = client.responses.create(
        model="tiny", input="more", previous_response_id=first.id, **GREEDY
    )
    said = {"role": "assistant", "content": first.output_text}
    messages = [{"role": "user", "content": "hello"}, said, {"role": "user", "content": "more"}]
    assert second.output_text == chat(client, messages)  # instructions are not carried on
    assert second.previous_response_id == first.id
    third = list(
        client.responses.create(
            model="tiny", input="a", previous_response_id=second.id, stream=True, **GREEDY
        )
    )[-1].response
    messages += [
        {"role": "assistant", "content": second.output_text},
        {"role": "user", "content": "a"},
    ]
    assert third.output_text == chat(client, messages)
    item: Any = [{"type": "item_reference", "id": first.output[0].id}, *messages[2:3]]
    told = client.responses.create(model="tiny", input=item, **GREEDY)
    assert told.output_text == chat(client, messages[1:3])


def test_responses_are_kept_until_they_are_deleted(client: openai.OpenAI) -> None:
    made = client.responses.create(model="tiny", input="hello", **GREEDY)
    assert client.responses.retrieve(made.id).output_text == made.output_text
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)
    with pytest.raises(openai.BadRequestError) as caught:
        client.responses.create(model="tiny", input="a", previous_response_id=made.id)
    assert caught.value.code == "previous_response_not_found"
    unkept = client.responses.create(model="tiny", input="hello", store=False, **GREEDY)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(unkept.id)


def test_old_responses_make_room(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(responses, "MAX_STORED_RESPONSES", 2)
    made = [client.responses.create(model="tiny", input="a", **GREEDY).id for _ in range(3)]
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made[0])
    assert client.responses.retrieve(made[2]).id == made[2]
    monkeypatch.setattr(responses, "MAX_STORED_CHARS", 10)
    last = client.responses.create(model="tiny", input="a", **GREEDY).id
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(last)


# ---- refusals ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": None}, "input"),
        ({"input": []}, "input"),
        ({"input": 3}, "input"),
        ({"input": [3]}, "input[0]"),
        ({"input": [{"role": "alien", "content": "a"}]}, "input[0].role"),
        ({"input": [{"type": "web_search_call", "id": "a"}]}, "input[0]"),
        ({"input": [{"type": "item_reference", "id": "msg_none"}]}, "input"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image"}]}]},
            "input[0].content[0]",
        ),
        ({"input": [{"type": "function_call", "name": "f"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call_output", "output": "a"}]}, "input[0].call_id"),
        ({"input": [{"type": "function_call", "call_id": "a"}]}, "input[0].name"),
        ({"input": [{"type": "function_call_output", "call_id": "a"}]}, "input[0].output"),
        ({"input": [{"role": "user", "content": ["input_text"]}]}, "input[0].content[0]"),
        ({"tools": [{"type": "telepathy"}]}, "tools[0]"),
        ({"tools": [{"type": "namespace", "name": "n", "tools": [3]}]}, "tools[0].tools[0]"),
        ({"tools": [{"type": "custom"}]}, "tools[0].name"),
        ({"tools": [{"type": "web_search"}], "tool_choice": {"type": "web_search"}}, "tool_choice"),
        ({"tool_choice": {"type": "file_search"}}, "tool_choice"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"prompt": {"id": "p"}}, "prompt"),
        ({"background": True}, "background"),
        ({"truncation": "auto"}, "truncation"),
        ({"max_output_tokens": 0}, "max_output_tokens"),
        ({"temperature": 3}, "temperature"),
        ({"text": {"format": {"type": "yaml"}}}, "text.format.type"),
        ({"text": {"format": {"type": "json_schema", "name": "a"}}}, "text.format.schema"),
        ({"reasoning": {"effort": 3}}, "reasoning.effort"),
    ],
    ids=lambda value: json.dumps(value)[:50],
)
def test_what_is_not_supported_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_response({"input": "hello", **fields}, {})
    assert caught.value.param == param


def test_an_item_reference_needs_an_id_that_is_text(live: Live) -> None:
    body = {"model": "tiny", "input": [{"type": "item_reference", "id": []}]}
    answer = live.http.post("/v1/responses", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "input[0].id")


def test_a_schema_that_cannot_be_used_names_the_field(live: Live) -> None:
    form = {"type": "json_schema", "name": "a", "schema": {"type": "wibble"}}
    response = live.http.post("/v1/responses", json={"input": "a", "text": {"format": form}})
    assert response.status_code == 400
    assert response.json()["error"]["param"] == "text.format.schema"


def test_fields_without_effect_are_named(live: Live) -> None:
    body = {"input": "a", "max_output_tokens": 1, "user": "me", "colour": 1}
    response = live.http.post("/v1/responses", json=body)
    assert response.headers["x-nanollama-ignored"] == "user, colour"


def test_an_error_after_the_stream_began_is_an_event(test_server: TestServer) -> None:
    test_server.answers({"text": "a b c", "token_delay": 0.01})
    original = nanollama.Handlers.watch

    async def failing(self: Any, job: Any) -> Any:
        async for deltas in original(self, job):
            yield deltas
            raise nanollama.WireError(500, "step_failed", "the model failed")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nanollama.Handlers, "watch", failing)
        events = list(scripted(test_server).responses.create(model="a", input="a", stream=True))
    assert (events[-1].type, events[-1].code) == ("error", "step_failed")
    assert events[-1].sequence_number == len(events) - 1


def test_the_async_client(live: Live) -> None:
    async def talk() -> None:
        client = openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)
        whole = await client.responses.create(model="tiny", input="hello", **GREEDY)
        stream = await client.responses.create(model="tiny", input="hello", stream=True, **GREEDY)
        events = [event async for event in stream]
        assert events[-1].response.output_text == whole.output_text

    asyncio.run(talk())


# ---- tools of other types ------------------------------------------------------------------------

PATCH = r"""start: "*** Begin Patch" LF hunk+ "*** End Patch" LF?
hunk: "*** Add File: " /[a-z]{1,8}/ LF line+
line: "+" /[a-c"\\]{1,4}/ LF
%import common.LF
"""
APPLY_PATCH: Any = {
    "type": "custom",
    "name": "apply_patch",
    "description": "Edit files",
    "format": {"type": "grammar", "syntax": "lark", "definition": PATCH},
}
AGENTS: Any = {
    "type": "namespace",
    "name": "agents",
    "description": "Other agents",
    "tools": [{**WEATHER, "name": "close", "strict": False}],
}


@pytest.mark.parametrize("choice", ["required", {"type": "custom", "name": "apply_patch"}])
def test_the_input_of_a_custom_tool_keeps_to_its_grammar(
    client: openai.OpenAI, choice: Any
) -> None:
    for seed in range(3):
        response = client.responses.create(
            model="tiny",
            input="hello",
            tools=[APPLY_PATCH],
            tool_choice=choice,
            parallel_tool_calls=False,
            extra_body={"seed": seed, "temperature": 1.5},
        )
        (call,) = response.output
        assert (call.type, call.name) == ("custom_tool_call", "apply_patch")
        assert call.id.startswith("ctc_")
        lark.Lark(PATCH, parser="earley", lexer="dynamic_complete").parse(call.input)


def test_a_regex_of_a_custom_tool_is_kept(client: openai.OpenAI) -> None:
    form = {"type": "grammar", "syntax": "regex", "definition": '[0-9]{3}"x"\n'}
    tool: Any = {"type": "custom", "name": "dial", "format": form}
    response = client.responses.create(
        model="tiny", input="a", tools=[tool], tool_choice="required", parallel_tool_calls=False
    )
    assert re.fullmatch('[0-9]{3}"x"\n', response.output[0].input)


NESTED = r"""start: "(" start ")" | TEXT
TEXT: /["\\\n\/é]{1,5}/
%ignore "."
"""


def test_a_grammar_whose_rules_refer_to_themselves_is_kept(client: openai.OpenAI) -> None:
    form = {"type": "grammar", "syntax": "lark", "definition": NESTED}
    tool: Any = {"type": "custom", "name": "nest", "format": form}
    parser = lark.Lark(NESTED, parser="earley", lexer="dynamic_complete")
    for seed in range(4):
        response = client.responses.create(
            model="tiny",
            input="hello",
            tools=[tool],
            tool_choice="required",
            parallel_tool_calls=False,
            extra_body={"seed": seed, "temperature": 1.5},
        )
        (call,) = response.output
        parser.parse(call.input)


@pytest.mark.parametrize("definition", ["start: /x+?/ start?", "start: /(?!x)y/"])
def test_a_grammar_that_cannot_be_enforced_is_told_and_any_text_may_come(
    live: Live, definition: str, caplog: pytest.LogCaptureFixture
) -> None:
    form = {"type": "grammar", "syntax": "lark", "definition": definition}
    tool = {"type": "custom", "name": "edit", "format": form}
    with caplog.at_level(logging.WARNING):
        answer = live.http.post(
            "/v1/responses", json={"input": "a", "tools": [tool], "max_output_tokens": 4}
        )
    assert answer.status_code == 200, answer.text
    assert "tools[0]" in caplog.text
    assert "cannot be enforced" in caplog.text


def test_a_custom_call_is_streamed_and_goes_back(test_server: TestServer) -> None:
    text = '*** Begin "Patch"\n\t\\ é 🙂 \u2028'
    call = {"name": "apply_patch", "arguments": {"input": text}}
    test_server.answers({"tool_calls": [call]}, "Done.")
    client = scripted(test_server)
    with client.responses.stream(model="any", input="Edit.", tools=[APPLY_PATCH]) as stream:
        events = list(stream)
        (made,) = stream.get_final_response().output
    assert (made.type, made.input) == ("custom_tool_call", text)
    pieces = [e.delta for e in events if e.type == "response.custom_tool_call_input.delta"]
    assert len(pieces) > 1
    assert "".join(pieces) == text
    assert [e.input for e in events if e.type == "response.custom_tool_call_input.done"] == [text]
    for event in events:
        type(event).model_validate(event.model_dump(warnings=False))
    result: Any = {"type": "custom_tool_call_output", "call_id": made.call_id, "output": "ok"}
    items: Any = [{"role": "user", "content": "Edit."}, made.model_dump(), result]
    assert client.responses.create(model="any", input=items).output_text == "Done."
    (_, answer, told) = messages_of(items)
    function = {"name": "apply_patch", "arguments": {"input": text}}
    assert answer["tool_calls"] == [{"id": made.call_id, "type": "function", "function": function}]
    assert told == {"role": "tool", "tool_call_id": made.call_id, "content": "ok"}
    parts = {**result, "output": [{"type": "input_text", "text": text} for text in ("o", "k")]}
    assert messages_of([*items[:2], parts])[2] == told


def messages_of(items: Any, **fields: Any) -> list[Any]:
    """The chat that items ask for."""
    wire, _, _ = parse_response({"input": items, **fields}, {})
    return list(wire.requests[0].messages or [])


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
def test_the_text_of_a_custom_tool_comes_whole_however_it_is_cut(size: int) -> None:
    text = 'a"b\\c\n\té🙂\u2028\x01/'
    for spelled in (json.dumps({"input": text}), json.dumps({"input": text}, ensure_ascii=False)):
        reader = TextArgument()
        parts = [spelled[i : i + size] for i in range(0, len(spelled), size)]
        assert "".join(map(reader.read, parts)) == text


def test_a_function_of_a_namespace_is_called_under_both_names(client: openai.OpenAI) -> None:
    response = client.responses.create(
        model="tiny", input="a", tools=[AGENTS, WEATHER], tool_choice="required"
    )
    assert {item.type for item in response.output} == {"function_call"}
    choice: Any = {"type": "function", "name": "close", "namespace": "agents"}
    response = client.responses.create(
        model="tiny", input="a", tools=[AGENTS, WEATHER], tool_choice=choice
    )
    (call,) = response.output
    assert (call.name, call.namespace) == ("close", "agents")
    (message,) = messages_of([{k: v for k, v in call.model_dump().items() if v is not None}])
    assert message["tool_calls"][0]["function"]["name"] == "agents.close"


def test_long_names_of_functions_stay_apart() -> None:
    names = [chat_name(f"{'n' * 80}{i}", "space") for i in range(2)]
    assert len(set(names)) == 2
    assert {len(name) for name in names} == {64}


@pytest.mark.parametrize(
    ("kind", "arguments", "field", "expected"),
    [
        (
            "local_shell",
            {"command": ["ls", "-l"]},
            "action",
            {"type": "exec", "command": ["ls", "-l"], "env": {}},
        ),
        (
            "shell",
            {"commands": ["ls"], "timeout_ms": 9},
            "action",
            {"commands": ["ls"], "timeout_ms": 9, "max_output_length": None},
        ),
        (
            "apply_patch",
            {"type": "create_file", "path": "a", "diff": "+x"},
            "operation",
            {"type": "create_file", "path": "a", "diff": "+x"},
        ),
    ],
)
def test_tools_with_a_schema_of_openais_have_items_of_their_own(
    test_server: TestServer, kind: str, arguments: Any, field: str, expected: Any
) -> None:
    test_server.answers({"tool_calls": [{"name": kind, "arguments": arguments}]})
    client = scripted(test_server)
    tool: Any = {"type": kind}
    with client.responses.stream(model="any", input="Go.", tools=[tool]) as stream:
        events = list(stream)
        (call,) = stream.get_final_response().output
    for event in events:
        type(event).model_validate(event.model_dump(warnings=False))
    item = events[-1].response.output[0].model_dump(exclude_unset=True)
    assert (item["type"], item[field], item["status"]) == (f"{kind}_call", expected, "completed")
    output = {"type": f"{kind}_call_output", "call_id": call.call_id, "output": "done"}
    (_, answer, result) = messages_of([{"role": "user", "content": "Go."}, item, output])
    (made,) = answer["tool_calls"]
    assert made["function"] == {
        "name": kind,
        "arguments": {k: v for k, v in expected.items() if v is not None and k in arguments},
    }
    assert result["content"] == "done"


@pytest.mark.parametrize(
    "kind", ["web_search", "image_generation", "mcp", "tool_search", "file_search"]
)
def test_tools_of_openais_servers_are_left_out_and_named(live: Live, kind: str) -> None:
    body = {"input": "a", "max_output_tokens": 1, "tools": [{"type": kind}, WEATHER]}
    answer = live.http.post("/v1/responses", json=body)
    assert answer.status_code == 200
    assert answer.headers["x-nanollama-ignored"] == f"tools.{kind}"
    refused = live.http.post("/v1/responses", json={**body, "tool_choice": {"type": kind}})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "tool_choice")
    with pytest.raises(RequestError, match=kind):
        parse_response(body, {}, strict=True)


def test_tools_may_come_with_the_input() -> None:
    items = [
        {"type": "additional_tools", "role": "developer", "tools": [AGENTS]},
        {"role": "user", "content": "a"},
    ]
    wire, _, _ = parse_response({"input": items}, {})
    assert [t["function"]["name"] for t in wire.requests[0].tools or []] == ["agents.close"]


def test_an_error_in_a_tools_schema_names_its_place(live: Live) -> None:
    bad = {"type": "function", "name": "bad", "parameters": {"type": "object", "properties": 3}}
    inner = {"type": "namespace", "name": "n", "tools": [{**bad, "strict": True}]}
    tools = [{"type": "web_search"}, inner]
    answer = live.http.post("/v1/responses", json={"input": "a", "tools": tools})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "tools[1].tools[0].parameters"


# ---- thoughts that the client keeps --------------------------------------------------------------


def test_sealed_thoughts_come_back(test_server: TestServer) -> None:
    test_server.answers({"reasoning": "hm so", "text": "Yes."})
    include: Any = ["reasoning.encrypted_content"]
    response = scripted(test_server).responses.create(
        model="any", input="hello", include=include, store=False
    )
    thought, message = response.output
    assert thought.encrypted_content
    sealed = {"type": "reasoning", "summary": [], "encrypted_content": thought.encrypted_content}
    expected = {"role": "assistant", "content": "Yes.", "reasoning_content": "hm so"}
    assert messages_of([sealed, message.model_dump()]) == [expected]
    plain = {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "hm so"}]}
    assert messages_of([plain, message.model_dump()]) == [expected]
    call = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    (answer,) = messages_of([sealed, call])
    assert answer["reasoning_content"] == "hm so"
    assert len(answer["tool_calls"]) == 1
    foreign = {**sealed, "encrypted_content": "gAAAAABo"}
    question = {"role": "user", "content": "a"}
    assert messages_of([question, foreign]) == [question]
    assert messages_of([question, sealed]) == [question]
    assert messages_of([question, {"type": "compaction", "encrypted_content": "x"}]) == [question]


# ---- Codex ---------------------------------------------------------------------------------------


def test_a_silent_stream_has_events(
    test_server: TestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanollama.PING_S", 0.01)
    test_server.answers({"text": "late", "delay": 0.2})
    events = list(scripted(test_server).responses.create(model="a", input="a", stream=True))
    kinds = [event.type for event in events]
    assert kinds[1:5] == ["response.in_progress"] * 4
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert kinds[-1] == "response.completed"


def test_the_warm_up_of_codex(live: Live) -> None:
    answer = live.http.post("/v1/responses", json={"input": "", "max_output_tokens": 1})
    assert answer.status_code == 200


def test_the_items_of_a_request_can_be_listed(client: openai.OpenAI) -> None:
    items: Any = [{"role": "user", "content": f"{i}"} for i in range(3)]
    made = client.responses.create(model="tiny", input=items, **GREEDY)
    listed = client.responses.input_items.list(made.id, limit=2)
    assert [item.content for item in listed] == ["2", "1", "0"]  # two pages
    ordered = client.responses.input_items.list(made.id, order="asc")
    assert [item.content for item in ordered.data] == ["0", "1", "2"]
    text = client.responses.create(model="tiny", input="one", **GREEDY)
    (item,) = client.responses.input_items.list(text.id).data
    assert item.content[0].text == "one"
    with pytest.raises(openai.NotFoundError):
        client.responses.input_items.list("resp_none")
    with pytest.raises(openai.BadRequestError):
        client.responses.cancel(made.id)


def test_a_conversation_is_compacted_to_a_summary(test_server: TestServer) -> None:
    """What comes back is sent in the place of the conversation, whose next summary replaces it."""
    client = scripted(test_server)
    test_server.answers("They want calc.py fixed.", "It is fixed.", "All is done.")
    call = {"type": "function_call", "call_id": "c", "name": "ls", "arguments": "{}"}
    items: Any = [
        {"role": "user", "content": "Fix it."},
        call,
        {"type": "function_call_output", "call_id": "c", "output": "calc.py"},
    ]
    first = client.responses.compact(model="any", input=items, instructions="Be brief.")
    assert (first.object, first.usage.output_tokens) == ("response.compaction", 5)
    asked = test_server.requests[0]["body"]
    assert asked["input"] == items
    question, summary = first.output
    assert (question.role, question.content[0].text) == ("user", "Fix it.")
    ResponseCompactionItem.model_validate(summary.model_dump())
    shorter: Any = [item.model_dump(warnings=False) for item in first.output]
    again: Any = [*shorter, {"role": "user", "content": "Go on."}]
    answer = client.responses.create(model="any", input=again)
    assert answer.output_text == "It is fixed."
    second = client.responses.compact(model="any", previous_response_id=answer.id)
    assert [item.content[0].text for item in second.output[:-1]] == ["Fix it.", "Go on."]
    assert messages_of([second.output[-1].model_dump()]) == [
        {"role": "user", "content": "A summary of the conversation so far:\nAll is done."}
    ]


def test_a_summary_has_the_whole_conversation_before_it() -> None:
    body, _ = summary_request({"input": "Hi", "tools": []}, False)
    assert body["input"][0] == {"role": "user", "content": "Hi"}
    assert body["input"][1]["content"].startswith("Summarize this conversation")
    with pytest.raises(RequestError, match="input is missing"):
        summary_request({"input": []}, False)
