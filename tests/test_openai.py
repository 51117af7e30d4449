"""The wire format (section 12): bodies in, choices out; and the clients that speak it."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import npm
import openai
import puppets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import Completion, chat, completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from serving import Live, serving, wait_until

import nanollama
from nanollama import Delta, RequestError, SamplingParams, parse_chat, parse_text
from nanollama_extras.api.timings import timings_body

USER = [{"role": "user", "content": "hello"}]
# ChatML that shows what else it is given
TEMPLATE = "{{ reasoning_effort }}{{ enable_thinking }}{{ mood }}" + nanollama.CHATML
NEUTRAL_SAMPLING = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "repeat_penalty": 1.0}


@pytest.fixture(scope="module")
def live(tiny: Callable[..., Path]) -> Iterator[Live]:
    def load() -> nanollama.LLM:
        return nanollama.LLM(tiny(), parallel=4, template=TEMPLATE)

    with serving(load, model_id="org/tiny:Q4", sampling=NEUTRAL_SAMPLING) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)


def parse(messages: Any = USER, **fields: Any) -> nanollama.WireRequest:
    return parse_chat({"messages": messages, **fields}, {})


def params(**fields: Any) -> SamplingParams:
    return parse(**fields).requests[0].params


def refusal(call: Callable[..., Any], *args: Any, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        call(*args, **fields)
    assert "\n" not in str(caught.value)
    return caught.value


# ---- every field of the schema -------------------------------------------------------------------

CHAT_EXAMPLES = {
    "audio": {"voice": "alloy", "format": "wav"},
    "frequency_penalty": 2,
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "logit_bias": {"70": 100},
    "logprobs": True,
    "max_completion_tokens": 2,
    "max_tokens": 2,
    "messages": [{"role": "user", "content": "another"}],
    "metadata": {"topic": "llamas"},
    "modalities": ["text", "audio"],
    "model": "gpt-4o",
    "moderation": {"model": "omni-moderation-latest"},
    "n": 2,
    "parallel_tool_calls": False,
    "prediction": {"type": "content", "content": "hi"},
    "presence_penalty": 2,
    "prompt_cache_key": "k",
    "prompt_cache_options": {"ttl": "24h"},
    "prompt_cache_retention": "24h",
    "reasoning_effort": "low",
    "response_format": {"type": "json_object"},
    "safety_identifier": "me",
    "seed": 2,
    "service_tier": "flex",
    "stop": ["a", "e", "i", "o", "u", " ", "\ufffd"],
    "store": True,
    "stream_options": {"include_usage": True},
    "temperature": 0,
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {}}}],
    "top_logprobs": 2,
    "top_p": 0.001,
    "user": "me",
    "verbosity": "low",
    "web_search_options": {},
}
TEXT_EXAMPLES = {
    "best_of": 5,
    "echo": True,
    "logprobs": 1,
    "prompt": "another",
    "suffix": "the end",
    **{
        name: CHAT_EXAMPLES[name]
        for name in (
            "frequency_penalty logit_bias max_tokens model n presence_penalty seed stop "
            "stream_options temperature top_p user"
        ).split()
    },
}
OWN_EXAMPLES = {
    "top_k": 1,
    "min_p": 0.9,
    "repeat_penalty": 2,
    "repeat_last_n": 0,
    "ignore_eos": False,
}
BASE = {
    "seed": 1,
    "repeat_penalty": 1.1,
    "max_tokens": 40,
    "logit_bias": {"1": 6},  # the end token comes up
    "ignore_eos": True,
}
ROUTES: dict[str, tuple[dict[str, Any], dict[str, Any], Any]] = {
    "/v1/chat/completions": (
        {"messages": USER, **BASE},
        {
            **CHAT_EXAMPLES,
            **OWN_EXAMPLES,
            "chat_template_kwargs": {"mood": "sunny"},
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
        chat_create_params.CompletionCreateParamsBase,
    ),
    "/v1/completions": (
        {"prompt": "hello", **BASE},
        {**TEXT_EXAMPLES, **OWN_EXAMPLES},
        completion_create_params.CompletionCreateParamsBase,
    ),
}
FIELDS = [
    (route, name)
    for route, (_, examples, schema) in ROUTES.items()
    for name in {**examples, **schema.__annotations__}
]


def outcome(response: Any) -> dict[str, Any]:
    """A response without what differs from one to the next."""
    changing = ("id", "created", "timings", "usage")
    return {name: value for name, value in response.json().items() if name not in changing}


@pytest.fixture(scope="module")
def plain(live: Live) -> dict[str, Any]:
    """What each route answers to its base request."""
    return {
        route: outcome(live.http.post(route, json=base)) for route, (base, *_) in ROUTES.items()
    }


@pytest.mark.parametrize(("route", "name"), FIELDS)
def test_every_field_has_an_effect_or_is_refused_or_named_as_ignored(
    live: Live, plain: dict[str, Any], route: str, name: str
) -> None:
    base, examples, _ = ROUTES[route]
    capabilities = live.http.get("/v1/capabilities").json()
    assert plain[route]["choices"][0]["finish_reason"] == "length"
    value = examples.get(name, "a field that a later SDK knows")
    response = live.http.post(route, json={**base, name: value})
    if name in capabilities["refused_unless"]:
        assert response.status_code == 400
        assert response.json()["error"]["param"] == name
        assert response.json()["error"]["code"] == "unsupported_parameter"
        for neutral in capabilities["refused_unless"][name]:
            assert outcome(live.http.post(route, json={**base, name: neutral})) == plain[route]
    elif name in capabilities["accepted_without_effect"] or name not in examples:
        assert response.headers["x-nanollama-ignored"] == name
        assert outcome(response) == plain[route]
    elif name == "parallel_tool_calls":  # there is nothing to call here
        assert outcome(response) == plain[route]
    else:
        assert set(capabilities[route][name].split(" or ")) <= set(nanollama.JSON_TYPES)
        assert "x-nanollama-ignored" not in response.headers
        assert outcome(response) != plain[route]
        if response.status_code == 400:  # the example makes sense beside another field only
            assert response.json()["error"]["param"] == name


@pytest.mark.parametrize(("route", "name"), [*FIELDS, ("/v1/chat/completions", "stream")])
def test_null_means_the_default(route: str, name: str) -> None:
    base = {"messages": USER} if "chat" in route else {"prompt": "hello"}
    read = parse_chat if "chat" in route else parse_text
    if name in base:
        assert refusal(read, {name: None}, {}).code == "missing_required_parameter"
    else:
        assert read({**base, name: None}, {}) == read(base, {})


KINDS = {"number": 1.5, "integer": 1, "boolean": True, "string": "x", "array": [1], "object": {}}


@pytest.mark.parametrize("route", ROUTES)
def test_a_value_of_another_json_type_is_refused(route: str) -> None:
    base, read, fields = (
        ({"messages": USER}, parse_chat, nanollama.CHAT_FIELDS)
        if "chat" in route
        else ({"prompt": "hello"}, parse_text, nanollama.TEXT_FIELDS)
    )
    for name, wanted in {**fields, **nanollama.HARMLESS}.items():
        for kind, value in KINDS.items():
            if kind not in wanted and (kind, wanted) != ("integer", "number"):
                error = refusal(read, {**base, name: value}, {})
                assert (error.param, error.code) == (name, "invalid_type")


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("inf")}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"min_p": -1}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"stop": ["a", 1]}, "stop"),
        ({"presence_penalty": 2.1}, "presence_penalty"),
        ({"frequency_penalty": -2.1}, "frequency_penalty"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"1": "1"}}, "logit_bias"),
        ({"logit_bias": {"1": True}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 1}, "top_logprobs"),
        ({"stream_options": {}}, "stream_options"),
        ({"stream": True, "stream_options": {"include_usage": 1}}, "stream_options.include_usage"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(fields: dict[str, Any], param: str) -> None:
    assert refusal(parse, **fields).param == param


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1.0]}, "prompt"),
        ({"logprobs": 21}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"n": 3, "best_of": 2}, "best_of"),
        ({"best_of": 2, "stream": True}, "best_of"),
        ({"best_of": 129}, "best_of"),
        ({"n": 65, "prompt": ["a", "b"]}, "n"),
    ],
)
def test_a_completion_value_out_of_range_is_refused_by_name(
    fields: dict[str, Any], param: str
) -> None:
    assert refusal(parse_text, {"prompt": "hello", **fields}, {}).param == param


def test_token_limits() -> None:
    assert params().max_tokens is None
    assert parse_chat({"messages": USER}, {"max_tokens": 9}).requests[0].params.max_tokens == 9
    assert params(max_tokens=3, max_completion_tokens=5).max_tokens == 5
    assert params(max_tokens=-1).max_tokens is None
    assert params(max_tokens=10**30).max_tokens == 2**31
    assert params(max_tokens=64.0, top_k=-1.0, seed=7.0) == params(max_tokens=64, top_k=-1, seed=7)
    assert parse_text({"prompt": "a"}, {}).requests[0].params.max_tokens == 16
    assert parse_text({"prompt": "a", "max_tokens": 0}, {}).requests[0].params.max_tokens == 0


def test_request_over_server_defaults() -> None:
    defaults = {"temperature": 0.3, "top_k": 7, "stop": ("x",)}
    got = parse_chat({"messages": USER, "top_k": 9, "stop": []}, defaults).requests[0].params
    assert (got.temperature, got.top_k, got.stop) == (0.3, 9, ())


def test_stop_is_a_string_or_a_list_of_any_length() -> None:
    assert params(stop="END").stop == ("END",)
    assert params(stop=["a", "", "b", "c", "d", "e"]).stop == ("a", "b", "c", "d", "e")


def test_choices_of_one_seed_differ_and_are_the_same_again() -> None:
    seeds = [request.params.seed for request in parse(n=5, seed=42).requests]
    assert seeds[0] == 42
    assert len(set(seeds)) == 5
    assert seeds == [request.params.seed for request in parse(n=5, seed=42).requests]
    assert {request.params.seed for request in parse(n=5).requests} == {None}


def test_prompts_of_every_form() -> None:
    forms: list[tuple[Any, list[Any]]] = [
        ("a", ["a"]),
        ("", [""]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ]
    for given_prompt, prompts in forms:
        wire = parse_text({"prompt": given_prompt, "n": 2}, {})
        assert [request.prompt for request in wire.requests[::2]] == prompts
        assert [request.prompt for request in wire.requests[1::2]] == prompts
        assert wire.num_prompts == len(prompts)


def test_unknown_fields_are_named_and_refused_when_strict() -> None:
    body = {"messages": USER, "colour": "red", "user": "me", "nothing": None}
    assert parse_chat(body, {}).ignored == ("colour", "user")
    assert refusal(parse_chat, body, {}, strict=True).param == "colour"
    assert parse_chat({"messages": USER, "user": "me", "top_k": 1}, {}, strict=True)


# ---- messages ------------------------------------------------------------------------------------


def test_messages_of_every_role_and_form() -> None:
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [
        {"role": "system", "content": "s"},
        {"role": "developer", "content": [{"type": "text", "text": "d"}]},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c", "content": "result"},
        {"role": "assistant", "content": "x", "reasoning_content": "thought", "refusal": None},
        {"role": "user", "content": ""},
    ]
    read = parse(messages).requests[0].messages
    assert read is not None
    assert [message["role"] for message in read] == [message["role"] for message in messages]
    assert [message["content"] for message in read] == [m["content"] for m in messages]
    assert read[3]["tool_calls"] == [call]
    assert read[5]["reasoning_content"] == "thought"


@pytest.mark.parametrize(
    ("message", "where"),
    [
        ("hello", ""),
        ({"content": "hi"}, ".role"),
        ({"role": "wizard", "content": "hi"}, ".role"),
        ({"role": ["user"], "content": "hi"}, ".role"),
        ({"role": "user"}, ".content"),
        ({"role": "user", "content": None}, ".content"),
        ({"role": "user", "content": 5}, ".content"),
        ({"role": "user", "content": {"type": "text", "text": "hi"}}, ".content"),
        ({"role": "user", "content": ["hi"]}, ".content[0]"),
        ({"role": "user", "content": [{"text": "hi"}]}, ".content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": 5}]}, ".content[0]"),
        ({"role": "user", "content": [{"type": "text", "text": ""}, {"type": "image_url"}]},
         ".content[1]"),
    ],
)  # fmt: skip
def test_a_message_that_cannot_be_read_is_refused_by_place(message: Any, where: str) -> None:
    assert refusal(parse, [*USER, message]).param == f"messages[1]{where}"


@pytest.mark.parametrize("messages", [None, [], "hello", {}])
def test_messages_are_needed(messages: Any) -> None:
    assert refusal(parse, messages).param == "messages"


STRICT_TEMPLATE = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}[{{ m.role }}:{{ m.content }}]"
    "{% endfor %}"
)


def test_neighbours_of_one_role_are_merged_for_a_template_that_refuses_them(
    tiny_llm: nanollama.LLM,
) -> None:
    template = nanollama.ChatTemplate(tiny_llm.checkpoint.text, STRICT_TEMPLATE)
    roles = ("user", "user", "assistant", "assistant", "user")
    messages = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    assert template.render(messages) == "[user:0\n\n1][assistant:2\n\n3][user:4]"
    # one that takes them gets them as they are
    assert tiny_llm.render(messages).count("<|im_start|>user\n") == 3


def test_late_system_messages_stay_in_place_for_a_template_that_takes_one_in_front(
    tiny_llm: nanollama.LLM,
) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
        "{{ raise_exception('system first') }}{% endif %}[{{ m.role }}:{{ m.content }}]{% endfor %}"
    )
    template = nanollama.ChatTemplate(tiny_llm.checkpoint.text, source)
    roles = ("system", "user", "developer", "user")
    messages = [{"role": role, "content": str(i)} for i, role in enumerate(roles)]
    assert template.render(messages) == "[system:0][user:1\n\n2\n\n3]"


# ---- answers, from scripted deltas ---------------------------------------------------------------

USAGE = nanollama.Usage(3, 2, 1, 0.0, 0.5, 0.25)


def scripted(
    llm: nanollama.LLM, texts: list[str], prompt: str = "", logprobs: bool = False
) -> tuple[nanollama.ChatChoice, list[dict[str, Any]]]:
    """A choice that was given a delta for each text, and all of its chunks. Each text is a token
    of the vocabulary, so that logprobs have something to show."""
    sampling = SamplingParams(logprobs=0 if logprobs else None)
    seq = nanollama.Sequence(0, [5], sampling, nanollama.TextStream(llm.tokenizer))
    splitter = nanollama.AnswerSplitter(prompt)
    choice = nanollama.ChatChoice(0, seq, splitter, "reasoning_content")
    chunks = choice.start()
    for i, text in enumerate(texts):
        last = i == len(texts) - 1
        ids = llm.encode(text) or [1]
        reported = nanollama.TokenLogprobs(-1.0) if logprobs else None
        reason, usage = ("stop", USAGE) if last else (None, None)
        chunks += choice.push(Delta(0, text, ids[0], reported, reason, usage))
    return choice, chunks


@pytest.mark.parametrize(
    ("prompt", "texts"),
    [
        ("", ["<thi", "nk>", "so", " so", "</th", "ink>", "yes", ""]),
        ("..<think>\n", ["so", " so", "</think>", "yes"]),
    ],
)
def test_thoughts_stream_apart_from_the_content(
    tiny_llm: nanollama.LLM, prompt: str, texts: list[str]
) -> None:
    choice, chunks = scripted(tiny_llm, texts, prompt)
    deltas = [chunk["delta"] for chunk in chunks]
    assert "".join(delta.get("reasoning_content", "") for delta in deltas) == "so so"
    assert "".join(delta.get("content", "") for delta in deltas) == "yes"
    message = choice.result()["message"]
    assert (message["reasoning_content"], message["content"]) == ("so so", "yes")


def test_logprobs_are_those_of_the_content_alone(tiny_llm: nanollama.LLM) -> None:
    texts = ["<", "t", "h", "i", "n", "k", ">", "a", "<", "/", "t", "h", "i", "n", "k", ">"]
    choice, chunks = scripted(tiny_llm, [*texts, "y", "<", "s", ""], logprobs=True)
    entries = choice.result()["logprobs"]["content"]
    assert b"".join(bytes(entry["bytes"]) for entry in entries) == b"y<s"
    streamed = [chunk["logprobs"]["content"] for chunk in chunks if chunk["logprobs"]]
    assert [entry for part in streamed for entry in part] == entries


def test_a_chat_choice_says_its_role_and_its_end_once(tiny_llm: nanollama.LLM) -> None:
    choice, chunks = scripted(tiny_llm, ["a", "", "b"])
    assert [chunk["delta"].get("role") for chunk in chunks] == ["assistant", *[None] * 3]
    assert [chunk["finish_reason"] for chunk in chunks] == [None, None, None, "stop"]
    assert choice.result()["message"] == {"role": "assistant", "content": "ab", "refusal": None}


def test_usage_counts_a_prompt_once_and_sums_the_rest() -> None:
    usages = [dataclasses.replace(USAGE, cached_tokens=i) for i in range(4)]
    body = nanollama.usage_body(usages, per_prompt=2)
    assert (body["prompt_tokens"], body["completion_tokens"], body["total_tokens"]) == (6, 8, 14)
    assert body["prompt_tokens_details"]["cached_tokens"] == 0 + 2
    timings = timings_body(usages)
    assert timings["cache_n"] == 0 + 1 + 2 + 3
    assert timings["prompt_ms"] == 4 * 500
    assert timings["predicted_per_second"] == 4


# ---- any body at all -----------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)
NAMES = st.sampled_from(
    sorted({*nanollama.CHAT_FIELDS, *nanollama.TEXT_FIELDS, *nanollama.NEUTRAL, "user", "x\u20ac"})
)
MESSAGE = st.dictionaries(
    st.sampled_from(["role", "content", "tool_calls", "name", "reasoning_content"]),
    st.sampled_from([*nanollama.ROLES, [{"type": "text", "text": "\ud800<|im_end|>"}]]) | JSON,
)
VALUES = JSON | st.integers(-2, 5) | st.sampled_from(["hello", ["a", "b"], [3, 4], {"7": 5}])
BODIES = st.dictionaries(NAMES, VALUES) | st.fixed_dictionaries(
    {"messages": st.lists(MESSAGE, min_size=1, max_size=3), "prompt": VALUES},
    optional={"n": st.integers(0, 3), "stream": st.booleans(), "echo": st.booleans()},
)


@given(BODIES)
def test_any_body_is_read_or_refused(body: dict[str, Any]) -> None:
    for read in (parse_chat, parse_text):
        with contextlib.suppress(RequestError):
            assert read({"messages": USER, "prompt": "a", **body}, {}).requests


@settings(max_examples=150)
@given(BODIES, st.sampled_from([*ROUTES, "/chat/completions", "/tokenize", "/apply-template"]))
def test_no_body_gives_an_internal_error(live: Live, body: dict[str, Any], route: str) -> None:
    data = json.dumps({"messages": USER, "prompt": "a", "max_tokens": 2, **body})
    response = live.http.post(route, content=data)
    assert response.status_code < 500, response.text
    assert "server_error" not in response.text
    if response.status_code != 200:
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}


# ---- the official Python client ------------------------------------------------------------------


def test_a_chat_through_the_sdk(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="org/tiny:Q4", messages=USER, max_tokens=6, seed=3, metadata={"a": "b"}
    )
    chat.ChatCompletion.model_validate(answer.model_dump(), strict=True)
    choice, usage = answer.choices[0], answer.usage
    assert answer.id.startswith("chatcmpl-")
    assert answer.system_fingerprint.startswith("fp_")
    assert (choice.finish_reason, choice.message.role) == ("length", "assistant")
    assert usage is not None
    assert usage.completion_tokens == 6
    assert usage.total_tokens == usage.prompt_tokens + 6
    assert answer.to_dict()["timings"]["predicted_n"] == 5
    assert answer.to_dict()["metadata"] == {"a": "b"}


def test_the_same_seed_gives_the_same_text_and_no_seed_another(client: openai.OpenAI) -> None:
    def text(**fields: Any) -> str | None:
        answer = client.chat.completions.create(
            model="org/tiny:Q4", messages=USER, max_tokens=20, **fields
        )
        return answer.choices[0].message.content

    assert text(seed=7) == text(seed=7) != text(seed=8)
    assert text() != text()
    assert text(temperature=0) == text(temperature=0, seed=1)


def test_a_second_request_finds_its_prefix_in_the_cache(client: openai.OpenAI) -> None:
    message = [
        {"role": "user", "content": "a question that nobody has asked before, cached or not"}
    ]
    cached, total = [], []
    for _ in range(2):
        answer = client.chat.completions.create(model="org/tiny:Q4", messages=message, max_tokens=1)
        cached.append(answer.usage.prompt_tokens_details.cached_tokens)
        total.append(answer.usage.prompt_tokens)
    assert cached[0] < cached[1] == total[1] - 1


def test_what_streams_adds_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "org/tiny:Q4", "messages": USER, "max_tokens": 30, "seed": 5, "n": 3,
        "logprobs": True, "top_logprobs": 2,
    }  # fmt: skip
    whole = client.chat.completions.create(**request)
    chunks = list(
        client.chat.completions.create(
            **request, stream=True, stream_options={"include_usage": True}
        )
    )
    texts, entries, reasons, roles = ["", "", ""], [[], [], []], [[], [], []], [[], [], []]
    for chunk in chunks:
        chat.ChatCompletionChunk.model_validate(chunk.model_dump(), strict=True)
        for choice in chunk.choices:
            assert not reasons[choice.index], "nothing comes after the finish_reason"
            texts[choice.index] += choice.delta.content or ""
            roles[choice.index] += [choice.delta.role] if choice.delta.role else []
            reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
            entries[choice.index] += choice.logprobs.content if choice.logprobs else []
    assert texts == [choice.message.content for choice in whole.choices]
    assert entries == [choice.logprobs.content for choice in whole.choices]
    assert reasons == [[choice.finish_reason] for choice in whole.choices]
    assert roles == [["assistant"]] * 3
    assert len(set(texts)) == 3
    first = [next(i for i, c in enumerate(chunks) if c.choices[0].index == n) for n in range(3)]
    assert first == sorted(first)
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens


def test_the_sdks_own_stream_helper(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "org/tiny:Q4", "messages": USER, "seed": 5, "logit_bias": {"1": 6},
    }  # fmt: skip
    with client.chat.completions.stream(**request, n=2) as stream:
        for _ in stream:
            pass
        final = stream.get_final_completion()
    whole = client.chat.completions.create(**request, n=2)
    assert [c.message.content for c in final.choices] == [c.message.content for c in whole.choices]
    assert final.usage is None


def test_the_raw_stream_ends_once(live: Live) -> None:
    lines = live.chat(stream=True).text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    events = [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]
    assert all(event["object"] == "chat.completion.chunk" for event in events)
    assert all("usage" not in event for event in events)
    assert "timings" in events[-1]


def test_the_async_client(live: Live) -> None:
    request: dict[str, Any] = {
        "model": "org/tiny:Q4", "messages": USER, "max_tokens": 12, "seed": 5,
    }  # fmt: skip

    async def streamed(client: openai.AsyncOpenAI) -> str:
        chunks = await client.chat.completions.create(**request, stream=True)
        return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])

    async def talk() -> tuple[str | None, list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{live.url}/v1", api_key="any") as client:
            whole = await client.chat.completions.create(**request)
            texts = await asyncio.gather(*[streamed(client) for _ in range(3)])
            return whole.choices[0].message.content, texts

    whole, texts = asyncio.run(talk())
    assert texts == [whole] * 3


def test_raw_responses_have_the_headers(client: openai.OpenAI) -> None:
    raw = client.chat.completions.with_raw_response.create(
        model="org/tiny:Q4", messages=USER, max_tokens=1, user="me", extra_body={"colour\u20ac": 1}
    )
    assert raw.headers["x-nanollama-ignored"] == "user, colour\\u20ac"
    assert len(raw.headers["x-request-id"]) == 16
    assert raw.parse().usage.completion_tokens == 1
    with client.chat.completions.with_streaming_response.create(
        model="org/tiny:Q4", messages=USER, max_tokens=1, stream=True
    ) as streamed:
        assert streamed.headers["content-type"].startswith("text/event-stream")
        assert streamed.headers["cache-control"] == "no-cache"


def test_models_through_the_sdk(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.owned_by) == ("org/tiny:Q4", "model", "nanollama")
    assert client.models.retrieve("org/tiny:Q4") == model
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-4o")
    assert caught.value.code == "model_not_found"


def test_stop_strings_are_left_out_of_whole_and_streamed_text(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "org/tiny:Q4",
        "messages": USER,
        "max_tokens": 40,
        "seed": 5,
    }
    full = client.chat.completions.create(**request).choices[0].message.content
    stop = [full[10:13], full[10:14] + "never"]  # some characters in the middle
    answer = client.chat.completions.create(**request, stop=stop)
    expected = full[: full.index(stop[0])]
    assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (
        expected,
        "stop",
    )
    chunks = client.chat.completions.create(**request, stop=stop, stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == expected


def test_a_bias_bans_and_forces_tokens(client: openai.OpenAI, live: Live) -> None:
    token = live.http.post("/tokenize", json={"prompt": "z"}).json()["tokens"][0]
    forced = client.chat.completions.create(
        model="org/tiny:Q4", messages=USER, max_tokens=5, logit_bias={str(token): 100}
    )
    assert forced.choices[0].message.content == "zzzzz"
    with pytest.raises(openai.BadRequestError, match="outside the vocabulary") as caught:
        client.chat.completions.create(
            model="org/tiny:Q4", messages=USER, logit_bias={"320": 1}, max_tokens=1
        )
    assert caught.value.param == "logit_bias"


def test_chat_logprobs_are_the_models_own(client: openai.OpenAI, live: Live) -> None:
    answer = client.chat.completions.create(
        model="org/tiny:Q4", messages=USER, max_tokens=12, seed=2, logprobs=True, top_logprobs=3,
        temperature=2, presence_penalty=1, logit_bias={"70": 3},
    )  # fmt: skip
    content, entries = answer.choices[0].message.content, answer.choices[0].logprobs.content
    assert b"".join(bytes(e.bytes) for e in entries).decode(errors="replace") == content
    assert len(entries) == answer.usage.completion_tokens
    llm = live.pool.llm()
    prompt = live.http.post("/apply-template", json={"messages": USER}).json()["tokens"]
    ids = [entry.to_dict()["id"] for entry in entries]
    rows = llm.logits(prompt + ids).log_softmax(-1)[len(prompt) - 1 :]
    for entry, token_id, row in zip(entries, ids, rows):
        assert entry.logprob == pytest.approx(float(row[token_id]), abs=1e-4)
        best = row.topk(3)
        got = [(top.to_dict()["id"], top.logprob) for top in entry.top_logprobs]
        assert [i for i, _ in got] == best.indices.tolist()
        assert [lp for _, lp in got] == pytest.approx(best.values.tolist(), abs=1e-4)


def test_logprobs_without_alternatives(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="org/tiny:Q4", messages=USER, max_tokens=2, seed=5, logprobs=True
    )
    assert [entry.top_logprobs for entry in answer.choices[0].logprobs.content] == [[], []]


@pytest.mark.parametrize(
    ("fields", "kind", "param", "code"),
    [
        ({"temperature": 3}, openai.BadRequestError, "temperature", "invalid_value"),
        ({"messages": []}, openai.BadRequestError, "messages", "missing_required_parameter"),
        ({"functions": [{}]}, openai.BadRequestError, "functions", "unsupported_parameter"),
        ({"model": "gpt-4o"}, openai.NotFoundError, None, "model_not_found"),
        (
            {"messages": [{"role": "user", "content": "word " * 300}]},
            openai.BadRequestError,
            "messages",
            "context_length_exceeded",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_are_the_sdks_classes_before_a_stream_begins(
    client: openai.OpenAI, fields: dict[str, Any], kind: type, param: str, code: str, stream: bool
) -> None:
    request: dict[str, Any] = {"model": "org/tiny:Q4", "messages": USER, "stream": stream, **fields}
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**request)
    error = caught.value
    assert (error.type, error.param, error.code) == ("invalid_request_error", param, code)


def test_a_key_that_is_wrong_or_missing(tiny: Callable[..., Path]) -> None:
    with serving(lambda: nanollama.LLM(tiny()), api_keys=("first", "second")) as live:
        for key in ("first", "second"):
            client = openai.OpenAI(base_url=f"{live.url}/v1", api_key=key, max_retries=0)
            assert client.models.list().data
        with pytest.raises(openai.AuthenticationError) as caught:
            openai.OpenAI(base_url=f"{live.url}/v1", api_key="third").models.list()
        assert caught.value.code == "invalid_api_key"


def test_not_ready_is_an_internal_server_error_with_retry_after(tiny: Callable[..., Path]) -> None:
    import threading

    go = threading.Event()

    def load() -> nanollama.LLM:
        go.wait()
        return nanollama.LLM(tiny())

    with serving(load, ready=False) as live:
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)
        for call in (
            lambda: client.chat.completions.create(model="model", messages=USER),
            lambda: client.completions.create(model="model", prompt="hello"),
        ):
            with pytest.raises(openai.InternalServerError) as caught:
                call()
            assert caught.value.status_code == 503
            assert caught.value.code == "model_loading"
            assert caught.value.response.headers["retry-after"] == "1"
        assert live.http.get("/health").status_code == 503
        assert live.http.get("/stats").status_code == 503
        assert live.http.get("/v1/models").json()["data"][0]["id"] == "model"
        go.set()
        wait_until(lambda: live.http.get("/health").status_code == 200, "loading")
        assert client.chat.completions.create(model="model", messages=USER, max_tokens=1)


def test_an_error_after_the_stream_began_is_raised_by_the_sdk(
    client: openai.OpenAI, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = live.pool.llm().engine
    forward, calls = engine.forward, iter(range(100))

    def fail_once(work: Any) -> Any:
        if next(calls) == 3:
            raise RuntimeError("CUDA out of memory. Tried to allocate 3 TB\nand more lines")
        return forward(work)

    monkeypatch.setattr(engine, "forward", fail_once)
    chunks = client.chat.completions.create(
        model="org/tiny:Q4", messages=USER, stream=True, max_tokens=50, seed=5
    )
    assert next(chunks).choices
    with pytest.raises(openai.APIError, match=r"the model failed: out of memory: CUDA out"):
        list(chunks)
    assert live.chat().status_code == 200
    wait_until(live.is_idle)


# ---- /v1/completions -----------------------------------------------------------------------------


def test_a_completion_through_the_sdk(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="org/tiny:Q4", prompt="the quick", seed=2)
    Completion.model_validate(answer.model_dump(), strict=True)
    assert (answer.object, answer.id[:5]) == ("text_completion", "cmpl-")
    assert answer.usage.completion_tokens == 16


def test_zero_alternatives_may_be_asked_for_without_logprobs() -> None:
    """vLLM takes this, too: some clients send both fields with each request."""
    body = {"messages": [{"role": "user", "content": "hi"}], "top_logprobs": 0}
    for logprobs, expected in ((None, None), (False, None), (True, 0)):
        wire = parse_chat({**body, "logprobs": logprobs}, {})
        assert wire.requests[0].params.logprobs == expected


def test_a_completion_streams_every_choice_of_every_prompt(client: openai.OpenAI) -> None:
    request: dict[str, Any] = {
        "model": "org/tiny:Q4", "prompt": ["a", "b"], "n": 2, "seed": 1, "max_tokens": 9,
        "echo": True, "logprobs": 1, "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    whole = client.completions.create(**request)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert [choice.text[0] for choice in whole.choices] == ["a", "a", "b", "b"]
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (2, 36)
    texts, columns, reasons = [""] * 4, [[] for _ in range(4)], [[] for _ in range(4)]
    for chunk in client.completions.create(**request, stream=True):
        (choice,) = chunk.choices
        assert not reasons[choice.index]
        texts[choice.index] += choice.text
        columns[choice.index] += choice.logprobs.token_logprobs if choice.logprobs else []
        reasons[choice.index] += [choice.finish_reason] if choice.finish_reason else []
    assert texts == [choice.text for choice in whole.choices]
    assert columns == [choice.logprobs.token_logprobs for choice in whole.choices]
    assert reasons == [["length"]] * 4


@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_scores_a_prompt_as_lm_eval_does(live: Live, max_tokens: int) -> None:
    llm = live.pool.llm()
    prompts = [llm.encode("the quick brown fox"), [0, *llm.encode("caf\u00e9 \U0001f600")]]
    answer = live.text(
        prompts, max_tokens=max_tokens, logprobs=1, echo=True, temperature=0, seed=1234
    ).json()
    for ids, choice in zip(prompts, answer["choices"]):
        scored = choice["logprobs"]
        assert choice["finish_reason"] == "length"
        assert scored["token_ids"][: len(ids)] == ids
        assert len({len(scored[name]) for name in nanollama.TextChoice.LOGPROBS}) == 1
        assert len(scored["tokens"]) == len(ids) + max_tokens
        assert scored["token_logprobs"][0] is scored["top_logprobs"][0] is None
        everything = llm.logits(scored["token_ids"])
        rows = everything.log_softmax(-1)
        for i in range(1, len(scored["tokens"])):
            value = scored["token_logprobs"][i]
            assert value == pytest.approx(float(rows[i - 1, scored["token_ids"][i]]), abs=1e-4)
            is_greedy = value == max(scored["top_logprobs"][i].values())
            assert is_greedy == (int(everything[i - 1].argmax()) == scored["token_ids"][i])
        # a token that begins inside a character has the place of the character
        known = [llm.decode(scored["token_ids"][:i]) for i in range(len(scored["tokens"]))]
        assert scored["text_offset"] == [len(text.rstrip("\ufffd")) for text in known]
    assert choice["text"].startswith("caf\u00e9 \U0001f600")  # without the <s> in front


def test_offsets_are_places_in_the_text(tmp_path: Path) -> None:
    path = puppets.write(tmp_path, [" w\u00f6rld", " \U0001f600", "!"])
    with serving(lambda: nanollama.LLM(path)) as live:
        for echo in (False, True):
            answer = live.text(
                "\u00e9<|im_end|>z", echo=echo, logprobs=0, temperature=0, max_tokens=3
            )
            choice = answer.json()["choices"][0]
            scored, whole = choice["logprobs"], 0
            for token, offset in zip(scored["tokens"], scored["text_offset"]):
                if "\ufffd" not in token:
                    assert choice["text"].startswith(token, offset)
                    whole += 1
            assert whole == (5 if echo else 3)
            assert scored["text_offset"][:2] == ([0, 0] if echo else [0, 6])


def test_a_prompt_as_text_and_as_ids_is_the_same(live: Live) -> None:
    ids = live.http.post("/tokenize", json={"prompt": "the quick"}).json()["tokens"]
    texts = [live.text(p, seed=3).json()["choices"][0]["text"] for p in ("the quick", ids, [ids])]
    assert len(set(texts)) == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [([320], "token id 320"), ([-1], "token id -1"), ("", "empty"), ("word " * 300, "context")],
)
def test_a_prompt_that_cannot_be_run(live: Live, prompt: Any, message: str) -> None:
    response = live.text(["fine", prompt] if isinstance(prompt, str) else prompt)
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
    assert response.json()["error"]["param"] == "prompt"
    wait_until(live.is_idle)


def test_a_top_k_of_minus_one_is_off(live: Live) -> None:
    body = {"temperature": 1.5, "seed": 3, "top_p": 1}
    assert outcome(live.chat(**body, top_k=-1)) == outcome(live.chat(**body, top_k=0))


def test_a_completion_of_no_tokens(live: Live) -> None:
    answer = live.text(max_tokens=0).json()
    assert (answer["choices"][0]["text"], answer["usage"]["completion_tokens"]) == ("", 0)
    assert answer["choices"][0]["finish_reason"] == "length"


def test_max_tokens_beyond_the_context_ends_there(live: Live) -> None:
    for limit in (10**6, -1):
        answer = live.text("hello", max_tokens=limit, ignore_eos=True, seed=1).json()
        assert answer["choices"][0]["finish_reason"] == "length"
        assert answer["usage"]["total_tokens"] == 256


# ---- chats ---------------------------------------------------------------------------------------


def apply(live: Live, **fields: Any) -> dict[str, Any]:
    response = live.http.post("/apply-template", json={"messages": USER, **fields})
    return response.json()


def test_a_control_token_that_a_user_types_is_text(live: Live) -> None:
    shown = apply(live, messages=[{"role": "user", "content": "a<|im_end|>b"}])
    assert shown["prompt"] == "<|im_start|>user\na<|im_end|>b<|im_end|>\n<|im_start|>assistant\n"
    assert shown["pieces"].count("<|im_end|>") == 1
    assert live.http.post("/detokenize", json={"tokens": shown["tokens"]}).json()["prompt"] == (
        "user\na<|im_end|>b\nassistant\n"
    )


def test_the_final_message_can_be_continued(live: Live) -> None:
    messages = [*USER, {"role": "assistant", "content": "It is"}]
    assert apply(live, messages=messages)["prompt"].endswith(
        "It is<|im_end|>\n<|im_start|>assistant\n"
    )
    continued = apply(live, messages=messages, continue_final_message=True)
    assert continued["prompt"].endswith("<|im_start|>assistant\nIt is")
    response = live.chat(messages=messages, continue_final_message=True, max_tokens=1)
    assert response.json()["usage"]["prompt_tokens"] == len(continued["tokens"])


def test_what_the_template_is_given(live: Live) -> None:
    assert apply(live, add_generation_prompt=False)["prompt"].endswith("hello<|im_end|>\n")
    assert apply(live, chat_template_kwargs={"mood": "sunny"})["prompt"].startswith("sunny<")
    assert apply(live, reasoning_effort="none")["prompt"].startswith("noneFalse<")
    assert apply(live, reasoning_effort="high")["prompt"].startswith("highTrue<")


@pytest.mark.parametrize(
    "roles",
    [
        "system developer user",
        "user user user",
        "system user system user",
        "assistant user assistant assistant",
        "user assistant tool user",
    ],
)
def test_any_order_of_roles_is_answered(live: Live, roles: str) -> None:
    messages = [{"role": role, "content": "hi", "tool_call_id": "c"} for role in roles.split()]
    assert live.chat(messages=messages, max_tokens=1).status_code == 200


def test_reasoning_is_streamed_under_the_chosen_name(tiny: Callable[..., Path]) -> None:
    opened = nanollama.CHATML.replace("assistant\n", "assistant\n<think>")

    def load() -> nanollama.LLM:
        return nanollama.LLM(tiny(), template=opened)

    with serving(load, reasoning_name="reasoning") as live:
        message = live.chat(seed=1).json()["choices"][0]["message"]
        assert message["content"] == ""
        assert len(message["reasoning"]) > 2
        lines = live.chat(seed=1, stream=True).text.split("\n\n")[:-2]
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines]
        assert "".join(delta.get("reasoning", "") for delta in deltas) == message["reasoning"]
        again = live.chat(messages=[*USER, message, *USER], max_tokens=1)
        assert again.status_code == 200


# ---- other clients -------------------------------------------------------------------------------


def test_langchain(live: Live) -> None:
    langchain_openai = pytest.importorskip("langchain_openai")
    model = langchain_openai.ChatOpenAI(
        base_url=f"{live.url}/v1", api_key="any", model="org/tiny:Q4", seed=5, max_tokens=9,
        max_retries=0, stream_usage=True,
    )  # fmt: skip
    message = model.invoke("hello")
    assert message.usage_metadata["output_tokens"] == 9
    assert message.response_metadata["finish_reason"] == "length"
    chunks = list(model.stream("hello"))
    assert "".join(chunk.text for chunk in chunks) == message.text
    assert (
        sum(chunk.usage_metadata["output_tokens"] for chunk in chunks if chunk.usage_metadata) == 9
    )
    assert [answer.text for answer in model.batch(["hello"] * 3)] == [message.text] * 3
    doubled = [("system", "a"), ("system", "b"), ("human", "c"), ("human", "d")]
    assert model.invoke(doubled).text
    with pytest.raises(openai.BadRequestError):
        model.invoke("word " * 300)


@pytest.mark.node
def test_the_npm_client(live: Live) -> None:
    npm.run_script("openai.mjs", npm.installed("openai@6"), f"{live.url}/v1", "org/tiny:Q4")


# ---- the real SmolLM2 ----------------------------------------------------------------------------


def test_smollm2_answers_over_http(smollm2: Path) -> None:
    with serving(lambda: nanollama.LLM(smollm2, parallel=2), model_id="smollm2") as live:
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="any")
        request: dict[str, Any] = {
            "model": "smollm2",
            "messages": [{"role": "user", "content": "Name the capital of France."}],
            "temperature": 0,
            "max_tokens": 8,
        }
        whole = client.chat.completions.create(**request)
        assert "Paris" in whole.choices[0].message.content
        chunks = client.chat.completions.create(**request, stream=True)
        streamed = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert streamed == whole.choices[0].message.content
        scored = live.text(
            "The capital of France is Paris", max_tokens=0, echo=True, logprobs=0
        ).json()["choices"][0]["logprobs"]
        rows = live.pool.llm().logits(scored["token_ids"]).log_softmax(-1)
        expected = [float(row[i]) for row, i in zip(rows, scored["token_ids"][1:])]
        assert scored["token_logprobs"][1:] == pytest.approx(expected, abs=1e-3)
        assert torch.tensor(expected[1:]).mean() > -5
