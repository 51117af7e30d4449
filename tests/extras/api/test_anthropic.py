"""POST /v1/messages and /v1/messages/count_tokens, through the official SDK."""

from __future__ import annotations

import concurrent.futures
import json
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import anthropic
import pydantic
import pytest
from anthropic.types import Message
from serving import Live, serving

from nanollama import LLM, ServerConfig, TestServer, WireError
from nanollama_extras.api.anthropic import error_body
from nanollama_extras.api.anthropic_body import ToolList, chat_body, read_tools
from nanollama_extras.api.limits import IMAGE_BYTES
from nanollama_extras.api.sealed import seal, unseal

WEATHER: Any = {
    "name": "get_weather",
    "description": "The weather in a city",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 8}},
        "required": ["city"],
        "additionalProperties": False,
    },
}
HELLO: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def live(tiny: Callable[..., Path]) -> Iterator[Live]:
    model = tiny(max_position_embeddings=2048)
    with serving(lambda: LLM(model, parallel=2), model_id="tiny") as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=live.url, api_key="any", max_retries=0)


def scripted(server: TestServer) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, api_key="any", max_retries=0)


def ask(client: anthropic.Anthropic, messages: Any = HELLO, **fields: Any) -> Message:
    body = {"model": "tiny", "max_tokens": 24, "messages": messages, **fields}
    body["extra_body"] = {"temperature": 0, **fields.get("extra_body", {})}
    answer = client.messages.create(**body)
    Message.model_validate(answer.model_dump(warnings=False))
    return answer


def translated(**body: Any) -> dict[str, Any]:
    """The chat that a body asks for."""
    tools = ToolList()
    read_tools(body, tools)
    return chat_body({"messages": HELLO, **body}, tools)


def chat_text(live: Live, messages: Any) -> str:
    answer = live.http.post(
        "/v1/chat/completions", json={"messages": messages, "temperature": 0, "max_tokens": 24}
    )
    return str(answer.json()["choices"][0]["message"]["content"])


def test_a_message_is_what_a_chat_answers(live: Live, client: anthropic.Anthropic) -> None:
    answer = ask(client, system="Be brief.")
    system = {"role": "system", "content": "Be brief."}
    (block,) = answer.content
    assert block.type == "text"
    assert block.text == chat_text(live, [system, *HELLO])
    assert answer.id.startswith("msg_")
    assert (answer.role, answer.model, answer.type) == ("assistant", "tiny", "message")
    assert answer.stop_reason == ("max_tokens" if answer.usage.output_tokens == 24 else "end_turn")


def test_text_in_blocks_is_the_same_prompt_as_text(client: anthropic.Anthropic) -> None:
    cached: Any = {"type": "ephemeral"}
    blocks: Any = [{"type": "text", "text": "hello", "cache_control": cached}]
    system: Any = [{"type": "text", "text": "Be brief.", "cache_control": cached}]
    plain = ask(client, HELLO, system="Be brief.")
    answer = ask(client, [{"role": "user", "content": blocks}], system=system)
    assert answer.content == plain.content
    used, usage = plain.usage, answer.usage
    num_prompt = used.input_tokens + (used.cache_read_input_tokens or 0)
    assert (usage.input_tokens, usage.cache_read_input_tokens) == (1, num_prompt - 1)


def test_a_stream_has_the_events_of_the_sdk(client: anthropic.Anthropic) -> None:
    whole = ask(client)
    fields: Any = {"model": "tiny", "max_tokens": 24, "messages": HELLO}
    fields["extra_body"] = {"temperature": 0}
    events = list(client.messages.create(stream=True, **fields))
    kinds = [event.type for event in events]
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert set(kinds[2:-3]) == {"content_block_delta"}
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert events[0].message.usage.input_tokens > 0
    for event in events:
        type(event).model_validate(event.model_dump(warnings=False))
    with client.messages.stream(**fields) as stream:
        text = "".join(stream.text_stream)
        final = stream.get_final_message()
    assert [block.text for block in whole.content] == [text]
    assert (final.content[0].text, final.stop_reason) == (text, whole.stop_reason)
    assert final.usage.output_tokens == whole.usage.output_tokens


def test_each_event_of_the_stream_is_named(live: Live) -> None:
    body = {"max_tokens": 2, "messages": HELLO, "stream": True}
    text = live.http.post("/v1/messages?beta=true", json=body).text
    for part in text.strip().split("\n\n"):
        name, data = part.split("\n")
        assert name == f"event: {json.loads(data.removeprefix('data: '))['type']}"


def test_a_silent_stream_shows_that_it_is_alive(
    test_server: TestServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanollama.PING_S", 0.01)
    test_server.answers({"text": "late", "delay": 0.2})
    body = {"model": "any", "max_tokens": 9, "messages": HELLO, "stream": True}
    response = anthropic.Anthropic(base_url=test_server.url, api_key="x").messages
    with response.with_streaming_response.create(**body) as stream:  # type: ignore[arg-type]
        text = "".join(stream.iter_text())
    assert 'event: ping\ndata: {"type": "ping"}\n\n' in text
    test_server.answers({"text": "late", "delay": 0.1})
    with scripted(test_server).messages.stream(**{k: body[k] for k in body if k != "stream"}) as s:
        assert s.get_final_text() == "late"


def test_an_unfinished_answer_says_so(client: anthropic.Anthropic) -> None:
    answer = ask(client, max_tokens=3, extra_body={"ignore_eos": True})
    assert (answer.stop_reason, answer.usage.output_tokens) == ("max_tokens", 3)


def test_more_tokens_than_the_context_holds_are_not_refused(client: anthropic.Anthropic) -> None:
    patient = client.with_options(timeout=600)  # the SDK wants long answers streamed
    assert ask(patient, max_tokens=128_000, stop_sequences=["e", "a", " "]).stop_reason


@pytest.mark.parametrize("stops", [["three"], ["no", "three", "four"], [" thr", "three", "two t"]])
def test_the_stop_sequence_that_ended_an_answer_is_named(
    test_server: TestServer, stops: list[str]
) -> None:
    test_server.answers("one two three four five")
    answer = ask(scripted(test_server), stop_sequences=stops)
    assert answer.stop_reason == "stop_sequence"
    assert answer.stop_sequence in stops
    assert f"{answer.content[0].text}{answer.stop_sequence}" in "one two three four five"
    test_server.answers("one two")
    answer = ask(scripted(test_server), stop_sequences=["three"])
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)


# ---- tools ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("choice", [{"type": "any"}, {"type": "tool", "name": "get_weather"}])
def test_a_call_that_is_asked_for_is_made(client: anthropic.Anthropic, choice: Any) -> None:
    choice = {**choice, "disable_parallel_tool_use": True}
    answer = ask(client, tools=[WEATHER], tool_choice=choice, max_tokens=200)
    (block,) = answer.content
    assert block.type == "tool_use"
    assert block.name == "get_weather"
    assert set(block.input) == {"city"}
    assert answer.stop_reason == "tool_use"


def test_no_call_where_none_is_wanted(client: anthropic.Anthropic) -> None:
    answer = ask(client, tools=[WEATHER], tool_choice={"type": "none"})
    assert [block.type for block in answer.content] == ["text"]


def test_the_sdks_tool_runner_calls_and_goes_on(test_server: TestServer) -> None:
    asked = []

    @anthropic.beta_tool
    def get_weather(city: str) -> str:
        """The weather in a city."""
        asked.append(city)
        return f"{city}: sunny"

    calls = [{"name": "get_weather", "arguments": {"city": name}} for name in ("Bern", "Oslo")]
    test_server.answers({"text": "Let me look. ", "tool_calls": calls}, "Both are sunny.")
    runner = scripted(test_server).beta.messages.tool_runner(
        model="any",
        max_tokens=99,
        tools=[get_weather],
        messages=[{"role": "user", "content": "How is it?"}],
    )
    final = runner.until_done()
    assert asked == ["Bern", "Oslo"]
    assert final.content[0].text == "Both are sunny."
    assert len(test_server.requests) == 2  # the server had kept the conversation


def test_a_thread_goes_on_where_it_was_and_a_lost_one_is_told(live: Live) -> None:
    body = {"max_tokens": 8, "temperature": 0, "messages": HELLO, "tools": [WEATHER], "system": "S"}
    first = live.http.post("/v1/messages", json={**body, "thread": {"type": "create"}}).json()
    answer = {"role": "assistant", "content": first["content"]}
    whole = live.http.post("/v1/messages", json={**body, "messages": [*HELLO, answer, *HELLO]})
    thread = {"type": "continue", "previous_message_id": first["id"]}
    rest = {"max_tokens": 8, "temperature": 0, "messages": HELLO, "thread": thread}
    continued = live.http.post("/v1/messages", json=rest)
    assert continued.json()["content"] == whole.json()["content"]
    thread["previous_message_id"] = "msg_0"
    lost = live.http.post("/v1/messages", json=rest)
    assert lost.status_code == 404
    assert lost.json()["error"]["details"] == {"error_code": "thread_not_found"}


def test_old_threads_make_room(
    client: anthropic.Anthropic, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nanollama_extras.api.anthropic.MOST_THREADS", 2)
    create = {"thread": {"type": "create"}}
    ids = [ask(client, max_tokens=1, extra_body=create).id for _ in range(3)]
    for name, is_kept in zip(ids, (False, True, True)):
        thread = {"thread": {"type": "continue", "previous_message_id": name}}
        if is_kept:
            assert ask(client, max_tokens=1, extra_body=thread)
        else:
            with pytest.raises(anthropic.NotFoundError):
                ask(client, max_tokens=1, extra_body=thread)
        monkeypatch.setattr("nanollama_extras.api.anthropic.MOST_THREADS", 9)


def test_calls_are_streamed_in_pieces(test_server: TestServer) -> None:
    calls = [{"name": "get_weather", "arguments": {"city": name}} for name in ("Bern", "Oslo")]
    test_server.answers({"text": "Look: ", "tool_calls": calls})
    fields: Any = {"model": "any", "max_tokens": 99, "tools": [WEATHER], "messages": HELLO}
    with scripted(test_server).messages.stream(**fields) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_message()
    assert "input_json" in kinds
    assert [b.type for b in final.content] == ["text", "tool_use", "tool_use"]
    assert [b.input for b in final.content[1:]] == [{"city": "Bern"}, {"city": "Oslo"}]
    assert len({b.id for b in final.content[1:]}) == 2
    assert final.stop_reason == "tool_use"


def test_blocks_become_messages_of_a_chat() -> None:
    call = {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": 1}}
    results = [
        {"type": "tool_result", "tool_use_id": "t1", "content": "4", "is_error": False},
        {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "no"}]},
        {"type": "tool_result", "tool_use_id": "t3", "content": "broken", "is_error": True},
        {"type": "tool_result", "tool_use_id": "t4"},
        {"type": "text", "text": "go on"},
    ]
    thought = {"type": "thinking", "thinking": "hm", "signature": ""}
    answer = [thought, {"type": "redacted_thinking", "data": "?"}, {"type": "text", "text": "a"}]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": t} for t in ("one", "two")]},
        {"role": "system", "content": "Be kind."},
        {"role": "assistant", "content": [*answer, call]},
        {"role": "user", "content": results},
    ]
    function = {"name": "f", "arguments": {"x": 1}}
    assert translated(messages=messages, system="S")["messages"] == [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "one\ntwo"},
        {"role": "system", "content": "Be kind."},
        {
            "role": "assistant",
            "content": "a",
            "reasoning_content": "hm",
            "tool_calls": [{"id": "t1", "type": "function", "function": function}],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "4"},
        {"role": "tool", "tool_call_id": "t2", "content": "no"},
        {"role": "tool", "tool_call_id": "t3", "content": "Error: broken"},
        {"role": "tool", "tool_call_id": "t4", "content": ""},
        {"role": "user", "content": "go on"},
    ]


def test_a_tool_that_is_loaded_later_is_described_where_it_is_referred_to() -> None:
    late = {**WEATHER, "name": "late", "defer_loading": True}
    other = {**WEATHER, "name": "other", "defer_loading": True}
    assert [t["function"]["name"] for t in translated(tools=[late, WEATHER])["tools"]] == [
        "get_weather"
    ]
    reference = {"type": "tool_reference", "tool_name": "late"}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [reference]}
    call = {"type": "tool_use", "id": "t1", "name": "find", "input": {}}
    messages = [*HELLO, {"role": "assistant", "content": [call]}]
    messages.append({"role": "user", "content": [result]})
    body = translated(messages=messages, tools=[other, late, WEATHER])
    names = {t["function"]["name"]: t.get("defer_loading", False) for t in body["tools"]}
    assert names == {"late": True, "get_weather": False}
    assert '"name": "late"' in body["messages"][-1]["content"]


def test_a_tool_that_is_loaded_later_keeps_the_prefix_and_can_be_called(live: Live) -> None:
    late = {**WEATHER, "name": "late", "defer_loading": True}
    call = {"type": "tool_use", "id": "t1", "name": "get_weather", "input": {"city": "x"}}
    reference = {"type": "tool_reference", "tool_name": "late"}
    result = {"type": "tool_result", "tool_use_id": "t1", "content": [reference]}
    longer = [
        *HELLO,
        {"role": "assistant", "content": [call]},
        {"role": "user", "content": [result]},
    ]
    first = {"max_tokens": 1, "messages": HELLO, "tools": [WEATHER]}
    choice = {"type": "tool", "name": "late"}
    second = {"max_tokens": 99, "messages": longer, "tools": [late, WEATHER], "tool_choice": choice}
    usage = live.http.post("/v1/messages", json=first).json()["usage"]
    answer = live.http.post("/v1/messages", json=second).json()
    num_first = usage["input_tokens"] + usage["cache_read_input_tokens"]
    assert answer["usage"]["cache_read_input_tokens"] >= num_first - 1
    assert [block["name"] for block in answer["content"]] == ["late"]


def test_tools_that_only_anthropic_can_run_are_left_out_and_named(live: Live) -> None:
    tools = [{"type": "web_search_20250305", "name": "web_search"}, WEATHER]
    tools.append({"type": "bash_20250124", "name": "bash"})
    body = {"max_tokens": 2, "messages": HELLO, "tools": tools}
    answer = live.http.post("/v1/messages", json=body)
    assert answer.status_code == 200
    assert answer.headers["x-nanollama-ignored"] == "tools.web_search_20250305"
    names = [tool["function"]["name"] for tool in translated(tools=tools)["tools"]]
    assert names == ["get_weather", "bash"]
    body["tool_choice"] = {"type": "tool", "name": "web_search"}
    answer = live.http.post("/v1/messages", json=body)
    assert (answer.status_code, "web_search" in answer.text) == (400, True)


def test_an_error_of_a_tool_names_its_place(live: Live) -> None:
    hosted = {"type": "web_search_20250305", "name": "web_search"}
    bad = {"name": "bad", "input_schema": {"type": "array"}}
    body = {"max_tokens": 2, "messages": HELLO, "tools": [hosted, bad]}
    answer = live.http.post("/v1/messages", json=body)
    assert answer.json()["error"]["message"].startswith("tools.1.input_schema is")


# ---- thoughts and forms --------------------------------------------------------------------------


def test_thoughts_are_blocks_of_their_own(test_server: TestServer) -> None:
    test_server.answers({"reasoning": "Hm, well.", "text": "Four."})
    answer = ask(scripted(test_server), thinking={"type": "adaptive"})
    assert [b.type for b in answer.content] == ["thinking", "text"]
    assert answer.content[0].thinking == "Hm, well."
    assert answer.usage.output_tokens_details.thinking_tokens > 0


def test_hidden_thoughts_come_back_in_the_signature(test_server: TestServer) -> None:
    test_server.answers({"reasoning": "Hm, well.", "text": "Four."})
    client = scripted(test_server)
    fields: Any = {"model": "any", "max_tokens": 99, "messages": HELLO}
    with client.messages.stream(**fields, thinking={"type": "adaptive", "display": "omitted"}) as s:
        thought, text = s.get_final_message().content
    assert (thought.thinking, text.text) == ("", "Four.")
    answer = {"role": "assistant", "content": [thought.model_dump(), text.model_dump()]}
    back = translated(messages=[*HELLO, answer, *HELLO])["messages"][1]
    assert back == {"role": "assistant", "content": "Four.", "reasoning_content": "Hm, well."}


@pytest.mark.parametrize("text", ["", "thought \n é 🙂", "x" * 100_000])
def test_what_is_sealed_can_be_read_again(text: str) -> None:
    assert unseal(seal(text)) == text


@pytest.mark.parametrize("value", ["", "EqoB", "é", None, 3, "eJwDAAAAAAE=", "AAAA" * 9])
def test_a_signature_of_another_server_is_no_thought(value: Any) -> None:
    assert unseal(value) is None
    block = {"type": "thinking", "thinking": "", "signature": value}
    messages = [*HELLO, {"role": "assistant", "content": [block]}, *HELLO]
    assert translated(messages=messages)["messages"][1] == {"role": "assistant", "content": ""}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"type": "enabled", "budget_tokens": 2000}, {"enable_thinking": True}),
        ({"type": "disabled"}, {"enable_thinking": False}),
        ({"type": "adaptive", "display": "updates"}, None),
    ],
)
def test_thinking_is_passed_to_the_template(fields: Any, expected: Any) -> None:
    assert translated(thinking=fields).get("chat_template_kwargs") == expected


def test_effort_is_passed_to_the_template_unless_thoughts_are_off() -> None:
    effort = {"effort": "high"}
    assert translated(output_config=effort)["reasoning_effort"] == "high"
    off = translated(output_config=effort, thinking={"type": "disabled"})
    assert "reasoning_effort" not in off


def test_an_answer_in_a_form(client: anthropic.Anthropic) -> None:
    class Place(pydantic.BaseModel):
        visited: bool
        rank: Literal["low", "high"]

    answer = client.messages.parse(
        model="tiny", max_tokens=200, messages=HELLO, output_format=Place
    )
    assert isinstance(answer.parsed_output, Place)


def test_an_answer_goes_on_from_the_last_message(live: Live, client: anthropic.Anthropic) -> None:
    messages: Any = [*HELLO, {"role": "assistant", "content": "The"}]
    (block,) = ask(client, messages).content
    body = {"messages": messages, "temperature": 0, "max_tokens": 24}
    continued = live.http.post(
        "/v1/chat/completions", json={**body, "continue_final_message": True}
    ).json()
    assert block.text == continued["choices"][0]["message"]["content"]


# ---- what differs between two requests -----------------------------------------------------------


def test_a_block_about_billing_is_no_part_of_the_prompt(
    client: anthropic.Anthropic, caplog: pytest.LogCaptureFixture
) -> None:
    billing = "x-anthropic-billing-header: cc_version=2.1.332.{};"
    blocks = [
        [{"type": "text", "text": text} for text in (billing.format(suffix), "Be terse.")]
        for suffix in ("4bb", "dcb")
    ]
    with caplog.at_level(logging.INFO):
        ask(client, system=blocks[0])
    assert "billing-header" in caplog.text
    answer = ask(client, system=blocks[1])
    assert answer.usage.input_tokens == 1
    assert translated(system=f"{billing}\nBe terse.") == translated(system="Be terse.")
    assert translated(system=billing)["messages"] == HELLO


def test_fields_without_effect_are_named(live: Live) -> None:
    body = {
        "max_tokens": 2,
        "messages": HELLO,
        "metadata": {"user_id": "x"},
        "context_management": {"edits": []},
        "safeguards": [{"type": "x"}],
        "service_tier": "auto",
        "unheard_of": 1,
    }
    headers = {"anthropic-beta": "never-heard-of-2031-01-01", "anthropic-version": "2099-01-01"}
    answer = live.http.post("/v1/messages", json=body, headers=headers)
    assert answer.status_code == 200
    names = set(answer.headers["x-nanollama-ignored"].split(", "))
    assert names == set(body) - {"max_tokens", "messages"}


# ---- counting ------------------------------------------------------------------------------------


def test_tokens_are_counted_as_an_answer_counts_them(client: anthropic.Anthropic) -> None:
    fields: Any = {"system": "Be brief.", "tools": [WEATHER], "messages": HELLO}
    count = client.messages.count_tokens(model="tiny", **fields)
    usage = ask(client, **fields).usage
    assert count.input_tokens == usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_counting_needs_no_turn_on_the_model(test_server: TestServer) -> None:
    test_server.answers(*[{"text": "slow", "delay": 30}] * 80)
    with concurrent.futures.ThreadPoolExecutor(30) as threads:
        client = anthropic.Anthropic(base_url=test_server.url, api_key="x", max_retries=0)
        stream = client.messages.create(model="any", max_tokens=9, messages=HELLO, stream=True)
        counts = threads.map(
            lambda i: client.messages.count_tokens(
                model="any", messages=[{"role": "user", "content": "word " * i}]
            ),
            range(1, 27),
        )
        assert len({count.input_tokens for count in counts}) == 26
        stream.close()


# ---- errors --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: Input should be "),
        ({"messages": [{"role": "user", "content": 3}]}, "messages.0.content is 3"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "messages.0.content.0.source: an object of type",
        ),
        ({"messages": []}, "messages"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"max_tokens": None}, "max_tokens is missing"),
        ({"stop_sequences": ["x" * 1001]}, "stop_sequences is"),
        ({"thinking": {"type": "often"}}, "thinking.type: Input should be"),
        ({"tool_choice": {"type": "some"}}, "tool_choice.type: Input should be"),
        ({"tool_choice": {"type": "any"}}, "tool_choice needs tools"),
        ({"system": [{"type": "image"}]}, "system.0: 'image' blocks"),
        ({"output_config": {"format": {"type": "xml"}}}, "output_config.format: "),
        ({"tools": [3]}, "tools.0 is 3"),
    ],
)
def test_what_is_wrong_is_named_by_its_place(live: Live, fields: Any, message: str) -> None:
    body = {"max_tokens": 2, "messages": HELLO, **fields}
    answer = live.http.post("/v1/messages", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()
    assert (error["type"], error["error"]["type"]) == ("error", "invalid_request_error")
    assert error["error"]["message"].startswith(message)


def test_a_prompt_that_is_too_long_is_told_in_claudes_words(live: Live) -> None:
    for num_words, least in ((1500, 2048), (40_000, 2 * 2048)):
        long = [{"role": "user", "content": "what? " * num_words}]
        answer = live.http.post("/v1/messages", json={"max_tokens": 2, "messages": long})
        words = answer.json()["error"]["message"].split()
        assert answer.status_code == 400
        assert words[:4] == ["prompt", "is", "too", "long:"]
        assert [words[i] for i in (5, 6, 8)] == ["tokens", ">", "maximum"]
        assert int(words[4]) >= least
        assert words[7] == "2048"


def test_an_unknown_model_and_an_unknown_route_differ(live: Live) -> None:
    body = {"max_tokens": 2, "messages": HELLO, "model": "claude-opus-5-5"}
    model = live.http.post("/v1/messages", json=body)
    route = live.http.post("/v1/messages/batches", json=body)
    for answer in (model, route):
        assert answer.status_code == 404
        assert answer.json()["error"]["type"] == "not_found_error"
    assert "claude-opus-5-5" in model.json()["error"]["message"]
    assert "route" in route.json()["error"]["message"]
    assert live.http.head("/").status_code == 200
    assert live.http.get("/v1/messages").status_code == 405


def test_keys_come_in_either_header(tiny: Callable[..., Path]) -> None:
    body = {"max_tokens": 2, "messages": HELLO}
    with serving(lambda: LLM(tiny()), api_keys=("secret",), any_model=True) as live:
        good = [{"x-api-key": "secret"}, {"authorization": "Bearer secret"}]
        for headers in good:
            answer = live.http.post("/v1/messages", json=body, headers=headers)
            assert answer.status_code == 200
        for headers in ({}, {"x-api-key": "wrong"}, {"authorization": "Bearer wrong"}):
            answer = live.http.post("/v1/messages", json=body, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["type"] == "authentication_error"
            assert answer.headers["request-id"] == answer.headers["x-request-id"]
        client = anthropic.Anthropic(base_url=live.url, api_key="wrong", max_retries=0)
        with pytest.raises(anthropic.AuthenticationError) as error:
            ask(client)
        assert error.value.request_id
        assert ask(client.with_options(api_key="secret"), model="claude-opus-5-5")._request_id


@pytest.mark.parametrize(
    ("status", "kind", "raised"),
    [
        (429, "rate_limit_error", anthropic.RateLimitError),
        (500, "api_error", anthropic.InternalServerError),
        (503, "overloaded_error", anthropic.InternalServerError),
    ],
)
def test_errors_are_those_that_the_sdk_knows(
    test_server: TestServer, status: int, kind: str, raised: Any
) -> None:
    test_server.answers({"error": status, "message": "no"})
    with pytest.raises(raised) as error:
        ask(scripted(test_server))
    assert error.value.body["error"]["type"] == kind
    assert error.value.status_code == (529 if status == 503 else status)


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (401, "authentication_error"),
        (403, "permission_error"),
        (413, "request_too_large"),
        (418, "invalid_request_error"),
        (504, "timeout_error"),
        (599, "api_error"),
    ],
)
def test_each_status_has_a_type(status: int, kind: str) -> None:
    assert error_body(WireError(status, "code", "text"))["error"]["type"] == kind


def test_a_body_that_is_too_large_is_refused(live: Live) -> None:
    limit = ServerConfig().max_body_bytes + IMAGE_BYTES
    answer = live.http.post("/v1/messages", content=b"x" * (limit + 1))
    assert (answer.status_code, answer.json()["error"]["type"]) == (413, "request_too_large")


def test_an_error_in_the_middle_is_an_event(test_server: TestServer) -> None:
    test_server.answers({"text": "one two three", "malformed_after": 2})
    body = {"model": "any", "max_tokens": 9, "messages": HELLO, "stream": True}
    messages = scripted(test_server).messages
    with messages.with_streaming_response.create(**body) as stream:  # type: ignore[arg-type]
        text = "".join(stream.iter_text())
    assert "event: error\n" in text
    assert "message_stop" not in text


def test_strict_servers_refuse_what_they_do_not_know(tiny: Callable[..., Path]) -> None:
    hosted = {"type": "web_search_20250305", "name": "web_search"}
    body = {"max_tokens": 2, "messages": HELLO}
    with serving(lambda: LLM(tiny()), strict=True) as live:
        for fields in ({"unheard_of": 1}, {"tools": [hosted]}):
            answer = live.http.post("/v1/messages", json={**body, **fields})
            assert answer.status_code == 400
        answer = live.http.post("/v1/messages", json={**body, "metadata": {"user_id": "x"}})
        assert answer.status_code == 200
