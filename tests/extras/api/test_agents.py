"""Requests that coding agents were seen to send, against a model: each is answered, and the second
request of a conversation finds the first one's prompt in the cache."""

from __future__ import annotations

import concurrent.futures
import json
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from recordings import names, recorded
from serving import Live, serving, wait_until

import nanollama
from nanollama import LLM, ChatTemplate, TextFiles, parse_chat
from nanollama_extras.api import anthropic_body
from nanollama_extras.api.responses import parse_response

WITHOUT_EFFECT = {  # fields of the recorded requests
    "client_metadata",
    "context_management",
    "metadata",
    "prompt_cache_key",
    "safeguards",
    "store",  # except on /v1/responses
}
SHORTER = 20  # texts, by this factor: a test machine reads few tokens a second


@pytest.fixture(scope="module")
def live(tiny: Callable[..., Path], smollm2: Path) -> Iterator[Live]:
    """A model of random weights with the vocabulary of SmolLM2 and a long context."""
    model = tiny(vocab_size=49152, max_position_embeddings=1 << 15, num_hidden_layers=1)
    load = lambda: LLM(model, tokenizer=str(smollm2), parallel=4)  # noqa: E731
    with serving(load, any_model=True) as live:
        yield live


def send(live: Live, request: dict[str, Any], **changed: Any) -> dict[str, Any]:
    """The answer to a recorded request, whole and short."""
    body = {**request["body"], "stream": False, **changed}
    body.pop("stream_options", None)
    limit = "max_output_tokens" if "/responses" in request["path"] else "max_tokens"
    body.pop("max_completion_tokens", None)
    if "count_tokens" not in request["path"]:
        body[limit] = 2
    answer = live.http.post(request["path"], json=body)
    assert answer.status_code == 200, answer.text
    ignored = re.findall(r"[^, ]+", answer.headers.get("x-nanollama-ignored", ""))
    expected = WITHOUT_EFFECT & body.keys()
    if "/responses" in request["path"]:
        expected -= {"store"}
    assert {name for name in ignored if "tools" not in name} == expected
    return dict(answer.json())


def tokens_read(answer: dict[str, Any]) -> tuple[int, int]:
    """Tokens of the prompt, and those that were in the cache."""
    usage = answer["usage"]
    if "cache_read_input_tokens" in usage:
        cached = usage["cache_read_input_tokens"]
        return usage["input_tokens"] + cached, cached
    if "input_tokens" in usage:
        return usage["input_tokens"], usage["input_tokens_details"]["cached_tokens"]
    return usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]


def stream(live: Live, request: dict[str, Any]) -> list[str]:
    """The data of the events of a recorded request, which asks for a stream; a short answer."""
    limit = "max_output_tokens" if "/responses" in request["path"] else "max_tokens"
    body = {k: v for k, v in request["body"].items() if k != "max_completion_tokens"}
    answer = live.http.post(request["path"], json={**body, "stream": True, limit: 3})
    assert answer.status_code == 200, answer.text
    lines = answer.text.splitlines()
    return [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]


@pytest.mark.parametrize("name", names())
def test_each_request_is_answered_and_the_next_one_reads_its_prompt_from_the_cache(
    live: Live, name: str
) -> None:
    before = None
    for request in recorded(name, SHORTER):
        if request["method"] != "POST" or not request["body"]:
            assert live.http.request(request["method"], request["path"]).status_code == 200
            continue
        answer = send(live, request)
        if "count_tokens" in request["path"]:
            assert answer["input_tokens"] > 0
            continue
        num_prompt, num_cached = tokens_read(answer)
        body = request["body"]
        talk = body.get("messages") or body.get("input")
        if before and isinstance(talk, list) and len(talk) > len(before[0]) and before[1] > 50:
            assert num_cached >= before[1] - 1, json.dumps(answer["usage"])
        before = talk, num_prompt


CHATS = [
    name
    for name in names()
    if recorded(name)[0]["path"] == "/v1/chat/completions" and "tools" in recorded(name)[-1]["body"]
]


@pytest.mark.parametrize("name", CHATS)
def test_a_stream_says_why_it_ends_before_it_ends(live: Live, name: str) -> None:
    """Cline fails without a finish_reason, others ask again."""
    *chunks, last = stream(live, recorded(name, SHORTER)[-1])
    assert last == "[DONE]"
    choices = [json.loads(chunk)["choices"] for chunk in chunks]
    reasons = [choice["finish_reason"] for one in choices for choice in one]
    assert reasons[-1] in ("stop", "length", "tool_calls")
    assert not any(reasons[:-1])


@pytest.mark.parametrize("name", ["claude_code_2.1.332", "codex"])
def test_a_streamed_answer_ends_with_its_last_event(live: Live, name: str) -> None:
    kinds = [json.loads(data)["type"] for data in stream(live, recorded(name, SHORTER)[0])]
    assert kinds[-1] in ("message_stop", "response.incomplete", "response.completed")


def functions(name: str) -> list[Any]:
    """The functions of a recorded chat."""
    return list(recorded(name, 1000)[-1]["body"]["tools"])


@pytest.mark.parametrize("name", CHATS)
def test_each_tool_of_a_chat_can_be_required(live: Live, name: str) -> None:
    for tool in functions(name):
        body = {"messages": [{"role": "user", "content": "?"}], "tools": [tool], "max_tokens": 1}
        answer = live.http.post("/v1/chat/completions", json={**body, "tool_choice": "required"})
        assert answer.status_code == 200, (tool, answer.text)


def test_side_requests_leave_the_conversation_in_the_cache(live: Live) -> None:
    """opencode asks for a title at once, Qwen Code for notes, each with a prompt of its own."""
    title, turn, later = recorded("opencode", SHORTER)
    num_prompt, _ = tokens_read(send(live, turn))
    with concurrent.futures.ThreadPoolExecutor(2) as threads:
        list(threads.map(lambda request: send(live, request), [title, title]))
    _, num_cached = tokens_read(send(live, later))
    assert num_cached >= num_prompt - 1


@pytest.mark.parametrize("name", ["claude_code_2.1.332", "codex"])
def test_a_request_that_was_cancelled_leaves_its_prompt_for_the_next_try(
    live: Live, name: str
) -> None:
    """Clients give up after a time without events, and send the same again."""
    (request, *_) = recorded(name, 10)
    mark = {"role": "user", "content": f"cancelled {name}"}  # no other test has read this
    field = "input" if "/responses" in request["path"] else "messages"
    body = {**request["body"], "stream": True, field: [*request["body"][field], mark]}
    body["ignore_eos"] = True
    with live.http.stream("POST", request["path"], json=body) as answer:
        chunks = answer.iter_bytes()  # closes the connection when it is freed
        next(chunks)
        engine = live.pool.llm().engine
        wait_until(lambda: any(s.num_computed > 1000 for s in engine.scheduler.running))
    wait_until(live.is_idle, "the end of the request")
    _, num_cached = tokens_read(send(live, {**request, "body": body}))
    assert num_cached > 1000


def test_a_model_that_is_not_loaded_yet_asks_to_come_again(tiny: Callable[..., Path]) -> None:
    go = threading.Event()

    def load() -> LLM:
        go.wait()
        return LLM(tiny())

    talk = [{"role": "user", "content": "hello"}]
    body = {"model": "model", "messages": talk, "input": "hello", "max_tokens": 1}
    with serving(load, ready=False) as live:
        for path in ("/v1/chat/completions", "/v1/responses", "/v1/messages", "/api/chat"):
            answer = live.http.post(path, json=body)
            assert answer.status_code == (529 if path == "/v1/messages" else 503), path
            assert answer.headers["retry-after"] == "1", path
        go.set()
        wait_until(lambda: live.models.ready, "loading")
        assert live.http.post(path, json=body).status_code == 200


def test_a_prompt_that_is_too_long_is_told_to_codex(live: Live) -> None:
    body = {"input": "what? " * 40_000}
    answer = live.http.post("/v1/responses", json={**body, "stream": True})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")


# ---- templates -----------------------------------------------------------------------------------

FOLDER = Path(__file__).parents[2] / "data" / "chat_templates"
TEMPLATES = sorted(path.stem for path in FOLDER.glob("*.jinja"))


def template_of(name: str) -> ChatTemplate:
    """A published template; nanollama's own for ''."""
    words = {"bos_token": "<s>", "eos_token": "</s>"}
    if not name:
        return ChatTemplate(TextFiles("memory", special_tokens=words))
    source = (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    return ChatTemplate(TextFiles("memory", templates={"default": source}, special_tokens=words))


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("name", ["claude_code_2.1.332", "codex", "opencode", "qwen_code"])
def test_what_agents_send_renders_under_every_template(name: str, template: str) -> None:
    """A system message after the user's, two of a role in a row, calls without text, parts."""
    made, texts = template_of(template), []
    for request in recorded(name, 100)[-2:]:
        body = request["body"]
        if "/messages" in request["path"]:
            tools = anthropic_body.ToolList()
            anthropic_body.read_tools(body, tools)
            body = anthropic_body.chat_body(body, tools)
        if "/responses" in request["path"]:
            chat = parse_response(body, {})[0].requests[0]
        else:
            chat = parse_chat({**body, "stream_options": None}, {}).requests[0]
        texts.append(made.prompt(chat.messages or [], chat.tools))
    assert "List the files here" in texts[0]
    items = json.dumps(recorded(name, 100)[-1]["body"].get("input"))
    assert not [one for one in re.findall(r'"id": "(\w+)"', items) if one in texts[-1]]
    if template == "mistral-nemo":  # writes the system's text into a last question only
        return
    assert len(texts[1]) > len(texts[0])
    if name in ("claude_code_2.1.332", "codex"):  # the second goes on where the first one ends
        length = texts[0].index("List the files here") + 30
        assert texts[0][:length] == texts[1][:length]


CALLS: list[Any] = [
    {"id": f"call0000{i}", "type": "function", "function": {"name": "get_goal", "arguments": "{}"}}
    for i in range(2)
]
TALK: list[Any] = [  # of forms that clients send, and templates do not expect
    {"role": "system", "content": "said-0"},
    {"role": "user", "content": "said-1"},
    {"role": "user", "content": [{"type": "text", "text": "said-2"}]},
    {"role": "assistant", "content": None, "tool_calls": CALLS[:1]},
    {"role": "tool", "tool_call_id": "call00000", "content": [{"type": "text", "text": "said-3"}]},
    {"role": "assistant", "content": "", "tool_calls": CALLS[1:]},
    {"role": "tool", "tool_call_id": "call00001", "content": "said-4"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "said-5"},
    {"role": "user", "content": "said-6"},
]


@pytest.mark.parametrize("template", ["", *TEMPLATES])
def test_no_template_loses_a_text_of_a_conversation_with_calls(template: str) -> None:
    tools = [{"type": "function", "function": {"name": "get_goal", "description": "told-0"}}]
    chat = parse_chat({"messages": TALK, "tools": tools}, {}).requests[0]
    text = template_of(template).prompt(chat.messages or [], chat.tools)
    found = [int(number) for number in re.findall(r"said-(\d)", text)]
    assert [number for number in found if number] == list(range(1, 7))
    assert found.count(0) == 1  # the system's, which some write later
    assert "told-0" in text
    assert text.count("get_goal") >= 3


def test_the_benchmark_measures_the_first_two_requests_of_an_agent(live: Live) -> None:
    script = Path(nanollama.__file__).parent / "examples" / "serve_bench.py"
    command = [sys.executable, str(script), f"{live.url}/v1", "--agent", "40"]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    cold, warm = (line.split() for line in ran.stdout.splitlines()[1:])
    assert int(cold[1]) < int(cold[0]) / 2
    assert int(warm[0]) > int(cold[0])
    assert int(warm[1]) > 0.9 * int(cold[0])
