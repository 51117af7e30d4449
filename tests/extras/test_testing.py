"""The server for other people's tests: scripts, tiny-random, what was asked, the pytest fixture."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
import yaml
from pages import blocks
from serving import serving, url_in, wait_until
from test_server import Process

import nanollama
from nanollama import LLM, TestServer, UsageError
from nanollama_extras.files import tiny_random
from nanollama_extras.testing import MAX_RECORDED_REQUESTS, SCRIPT_FIELDS, Script, read_script

USER: Any = [{"role": "user", "content": "hello"}]
ROOT = Path(nanollama.__file__).parent


def client_of(server: TestServer) -> openai.OpenAI:
    return openai.OpenAI(base_url=server.base_url, api_key="any", max_retries=0)


def ask(server: TestServer, content: str = "hello", **fields: Any) -> str:
    messages: Any = [{"role": "user", "content": content}]
    answer = client_of(server).chat.completions.create(model="any", messages=messages, **fields)
    return answer.choices[0].message.content or ""


def streamed(server: TestServer, **fields: Any) -> list[str]:
    chunks = client_of(server).chat.completions.create(
        model="any", messages=USER, stream=True, **fields
    )
    return [c.choices[0].delta.content for c in chunks if c.choices[0].delta.content]


def test_answers_come_in_order_and_the_last_one_stays(test_server: TestServer) -> None:
    test_server.answers("one", {"text": "two"}, "three")
    assert [ask(test_server) for _ in range(4)] == ["one", "two", "three", "three"]


def test_an_answer_may_wait_for_its_question(test_server: TestServer) -> None:
    test_server.answers("first", {"match": "weather", "text": "Rain."}, "second")
    asked = ["hi", "the weather?", "hi", "weather", "hi"]
    answers = ["first", "Rain.", "second", "Rain.", "second"]
    assert [ask(test_server, content) for content in asked] == answers


def test_an_answer_is_streamed_word_by_word(test_server: TestServer) -> None:
    test_server.answers("one two\nthree  4")
    assert streamed(test_server) == ["one", " two", "\nthree", " ", " 4"]
    assert ask(test_server) == "one two\nthree  4"


def test_limits_and_stop_strings_hold(test_server: TestServer) -> None:
    test_server.answers("one two three four")
    answer = client_of(test_server).chat.completions.create(
        model="any", messages=USER, max_tokens=2, n=2, logprobs=True
    )
    for choice in answer.choices:
        assert (choice.message.content, choice.finish_reason) == ("one two", "length")
        assert [entry.token for entry in choice.logprobs.content] == ["one", " two"]
    assert answer.usage.completion_tokens == 4
    assert ask(test_server, stop="three") == "one two "


def test_thoughts_and_reasons(test_server: TestServer) -> None:
    test_server.answers({"reasoning": "hm so", "text": "Yes.", "finish_reason": "content_filter"})
    answer = client_of(test_server).chat.completions.create(model="any", messages=USER)
    choice = answer.choices[0]
    assert (choice.message.content, choice.finish_reason) == ("Yes.", "content_filter")
    assert choice.message.reasoning_content == "hm so"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (400, openai.BadRequestError),
    ],
)
def test_errors_are_the_sdks_classes(
    test_server: TestServer, status: int, kind: type[openai.APIStatusError]
) -> None:
    test_server.answers({"error": status, "message": "as told"}, "fine")
    with pytest.raises(kind, match="as told") as caught:
        ask(test_server)
    assert caught.value.status_code == status
    assert ask(test_server) == "fine"


def test_retries_get_the_next_answer(test_server: TestServer) -> None:
    test_server.answers({"error": 429}, {"error": 500}, "at last")
    patient = openai.OpenAI(base_url=test_server.base_url, api_key="any", max_retries=2)
    answer = patient.chat.completions.create(model="any", messages=USER)
    assert answer.choices[0].message.content == "at last"
    assert len(test_server.requests) == 3


def test_a_delay_is_waited_for(test_server: TestServer) -> None:
    test_server.answers({"text": "a b c", "delay": 0.2, "token_delay": 0.1})
    body = {"prompt": "a", "stream": True}
    r = httpx.post(f"{test_server.base_url}/completions", json=body)
    assert r.elapsed.total_seconds() >= 0.2 + 2 * 0.1


@pytest.mark.parametrize("stream", [True, False])
def test_a_connection_breaks(test_server: TestServer, stream: bool) -> None:
    test_server.answers({"text": "a b c d", "cut_after": 2}, "fine")
    got: list[str | None] = []

    def read() -> None:
        chunks = client_of(test_server).chat.completions.create(
            model="any", messages=USER, stream=True
        )
        got.extend(chunk.choices[0].delta.content for chunk in chunks)

    with pytest.raises((httpx.RemoteProtocolError, openai.APIConnectionError)):
        read() if stream else ask(test_server)
    assert ask(test_server) == "fine"


def test_an_event_is_torn(test_server: TestServer) -> None:
    test_server.answers(
        {"text": "a b c d", "malformed_after": 2}, {"text": "a", "malformed_after": 0}
    )
    with pytest.raises(json.JSONDecodeError):
        streamed(test_server)
    body = {"messages": USER}
    whole = httpx.post(f"{test_server.base_url}/chat/completions", json=body)
    assert whole.status_code == 200
    with pytest.raises(json.JSONDecodeError):
        whole.json()


def test_what_was_asked_is_kept_within_bounds(test_server: TestServer) -> None:
    ask(test_server, "a question", temperature=0.5)
    url = f"{test_server.url}/_test/requests"
    (asked,) = httpx.get(url).json()["requests"]
    assert (asked["method"], asked["path"]) == ("POST", "/v1/chat/completions")
    assert asked["body"]["messages"][0]["content"] == "a question"
    assert asked["body"]["temperature"] == 0.5
    assert asked["headers"]["user-agent"].startswith("OpenAI")
    assert test_server.requests[0]["body"] == asked["body"]
    with httpx.Client() as client:
        for i in range(300):
            client.post(f"{test_server.base_url}/completions", content=f"no json {i}")
    assert len(httpx.delete(url).json()["requests"]) == MAX_RECORDED_REQUESTS
    assert httpx.get(url).json() == {"requests": []}


def test_secrets_of_clients_are_not_kept(test_server: TestServer) -> None:
    secrets = dict.fromkeys(
        "authorization x-api-key api-key cookie proxy-authorization x-goog-api-key "
        "x-auth-token openai-api-key x-amz-security-token".split(),
        "hunter2",
    )
    url = f"{test_server.base_url}/completions"
    httpx.post(url, json={"prompt": "a"}, headers={**secrets, "x-other": "kept"})
    shown = httpx.get(f"{test_server.url}/_test/requests")
    (asked,) = shown.json()["requests"]
    assert asked["headers"]["x-other"] == "kept"
    assert not secrets.keys() & asked["headers"].keys()
    assert "hunter2" not in shown.text
    assert "hunter2" not in str(test_server.requests)


def test_a_script_has_metrics_and_statistics(test_server: TestServer) -> None:
    ask(test_server)
    for route in ("/metrics", "/stats", "/health", "/api/ps", "/api/tags"):
        assert httpx.get(test_server.url + route).status_code == 200, route
    assert "nanollama_generated_tokens_total" in httpx.get(f"{test_server.url}/metrics").text


def test_the_log_has_the_address_of_the_connection(
    test_server: TestServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "nanollama")
    httpx.get(f"{test_server.url}/health", headers={"x-forwarded-for": "203.0.113.7"})
    wait_until(lambda: "127.0.0.1 GET /health" in caplog.text)  # it is written after the answer
    assert "203.0.113.7" not in caplog.text


def test_other_servers_keep_nothing(tiny_llm: LLM) -> None:
    with serving(lambda: tiny_llm) as live:
        live.chat()
        assert live.http.get("/_test/requests").status_code == 404


def test_two_servers_do_not_know_of_each_other() -> None:
    with TestServer("one") as one, TestServer("two") as two:
        assert (ask(one), ask(two)) == ("one", "two")
        assert len(one.requests) == len(two.requests) == 1
    with pytest.raises(openai.APIConnectionError):
        ask(one)


@pytest.mark.parametrize(
    ("answers", "told"),
    [
        ([{"txt": "a"}], "answer 1 of the script: txt is not known"),
        (["a", {"text": 1}], "answer 2 of the script: text is 1"),
        ([{"error": 200}], "error is 200"),
        ([{"delay": -1}], "delay is -1; it must be at least 0"),
        ([{"token_delay": math.inf}], "token_delay is inf"),
        ([{"delay": math.nan}], "delay is nan"),
        ([3], "answer 1"),
        ([{"tool_calls": [{"nme": "f"}]}], "name is None"),
    ],
)
def test_a_script_that_means_nothing_is_refused(answers: Any, told: str) -> None:
    with pytest.raises(UsageError, match=re.escape(told)):
        Script(answers)


def test_a_script_file_is_yaml_or_json(tmp_path: Path) -> None:
    path = tmp_path / "script.yaml"
    for text in ("- a\n- {text: b, delay: 0.5}\n", '["a", {"text": "b", "delay": 0.5}]'):
        path.write_text(text)
        assert list(read_script(path).others) == [{"text": "a"}, {"text": "b", "delay": 0.5}]
    for text in ("- [", "\x00", "!!python/object:os.system {}", "- &a [*a]"):
        path.write_text(text)
        with pytest.raises(UsageError):
            read_script(path)
    with pytest.raises(UsageError, match="cannot be read"):
        read_script(tmp_path / "none")


def test_the_documented_script_is_one(tmp_path: Path) -> None:
    (block,) = (block for block in blocks("yaml") if block.startswith("- Hello!"))
    (tmp_path / "script.yaml").write_text(block)
    script = read_script(tmp_path / "script.yaml")
    assert script.next("a question about the weather")["text"] == "Rain."
    assert [script.next("hi").get("text") for _ in range(8)][-2:] == [
        "The last answer, from then on."
    ] * 2
    used = {name for answer in yaml.safe_load(block) if isinstance(answer, dict) for name in answer}
    assert set(SCRIPT_FIELDS) - used == {"finish_reason"}


def test_a_scripted_server_starts_without_torch(tmp_path: Path) -> None:
    script = tmp_path / "script.json"
    script.write_text('["Hello from a file!"]')
    code = (
        "import sys, nanollama; server = nanollama.TestServer('hi').__enter__(); import httpx; "
        "r = httpx.post(server.base_url + '/chat/completions', "
        "json={'messages': [{'role': 'user', 'content': 'a'}]}); assert r.status_code == 200; "
        "print([m for m in ('torch', 'tokenizers', 'pytest', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
    command = [
        sys.executable,
        nanollama.__file__,
        "--serve",
        "--port",
        "0",
        "--script",
        str(script),
    ]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            client = openai.OpenAI(base_url=url_in(process.stderr.readline()) + "/v1", api_key="a")
            answer = client.chat.completions.create(model="gpt-4o", messages=USER)
            assert answer.choices[0].message.content == "Hello from a file!"
        finally:
            process.terminate()


def test_the_fixture_works_in_other_peoples_tests(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text("from nanollama import test_server\n")
    (tmp_path / "test_it.py").write_text(
        "import urllib.request\n"
        "def test_one(test_server):\n"
        "    test_server.answers('a')\n"
        "    assert urllib.request.urlopen(test_server.url + '/health').status == 200\n"
        "def test_two(test_server):\n"
        "    assert not test_server.requests\n"
    )
    (block,) = blocks("py3")
    (tmp_path / "test_readme.py").write_text(block)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)]
    done = subprocess.run(
        command, capture_output=True, text=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
    )
    assert "3 passed" in done.stdout, done.stdout


# ---- tiny-random ---------------------------------------------------------------------------------


def test_tiny_random_is_the_same_everywhere_and_writes_ascii(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = []
    for place in "ab":
        monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path / place))
        llm = LLM("tiny-random", kernels="torch")
        params = nanollama.SamplingParams(temperature=1, top_k=0, top_p=1, seed=1, max_tokens=80)
        request = nanollama.GenerationRequest(messages=USER, params=params)
        texts.append(llm.complete(request).text)
    assert texts[0] == texts[1]
    assert texts[0].isascii()
    assert len(set(texts[0])) > 15  # not one letter over and over
    text = "any text: \u00e9\u20ac\U0001f600\n<|im_end|>"
    assert llm.decode(llm.tokenizer.encode(text, parse_special=False)) == text
    assert llm.encode("<|im_end|>") == [258]


def test_tiny_random_is_what_transformers_makes_of_its_files(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    tiny_random.write_tiny_random(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    ids = list(b"hello world")
    with torch.inference_mode():
        expected = model(torch.tensor([ids])).logits[0]
    torch.testing.assert_close(LLM(tmp_path).logits(ids), expected, rtol=0, atol=1e-4)


def test_tiny_random_serves_any_name_and_shows_what_was_asked(tmp_path: Path) -> None:
    with Process("tiny-random", NANOLLAMA_CACHE=str(tmp_path)) as server:
        wait_until(server.is_ready, "loading")
        client = openai.OpenAI(base_url=f"{server.http.base_url}/v1", api_key="a")
        answer = client.chat.completions.create(model="gpt-4o", messages=USER, max_tokens=3)
        assert answer.usage.completion_tokens <= 3
        assert server.http.get("/_test/requests").json()["requests"]


# ---- tool calls ----------------------------------------------------------------------------------


def test_calls_come_as_the_tools_that_were_offered(test_server: TestServer) -> None:
    calls = [{"name": "weather", "arguments": {"city": "Paris"}}, {"name": "clock"}]
    test_server.answers({"text": "Wait.", "tool_calls": calls})
    tools: Any = [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
        for name in ("weather", "clock")
    ]
    answer = client_of(test_server).chat.completions.create(model="any", messages=USER, tools=tools)
    made = answer.choices[0].message.tool_calls
    assert [(c.function.name, json.loads(c.function.arguments)) for c in made] == [
        ("weather", {"city": "Paris"}),
        ("clock", {}),
    ]
    assert answer.choices[0].finish_reason == "tool_calls"
    assert answer.choices[0].message.content.strip() == "Wait."
