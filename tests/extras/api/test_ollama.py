"""Ollama's API: all of its own Python client, against models from a hub on loopback."""

from __future__ import annotations

import asyncio
import gc
import json
import math
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import httpx
import ollama
import pytest
from hub_server import HubServer
from huggingface_hub import constants
from hypothesis import given
from hypothesis import strategies as st
from serving import Live, serving, wait_until
from test_store import use_endpoint

import nanollama
from nanollama import Modelfile, ModelfileError, parse_modelfile
from nanollama_extras.api import blobs, ollama_models
from nanollama_extras.api.ollama import ollama_messages
from nanollama_extras.api.ollama_models import OLLAMA_VERSION, format_modelfile
from nanollama_extras.api.shelf import KEEP_ALIVE_S, open_shelf

USER = [{"role": "user", "content": "hello"}]
TINY = "org/tiny"
GREEDY = {"temperature": 0, "num_predict": 8}
THINKER = "<think> {{ enable_thinking }}{{ reasoning_effort }}" + nanollama.CHATML


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Empty caches, and no token."""
    place = tmp_path_factory.mktemp("ollama")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLLAMA_CACHE", str(place / "own"))
        patch.setenv("HF_TOKEN", "")
        patch.setattr(constants, "HF_HUB_CACHE", str(place / "hub"))
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield place


@pytest.fixture(scope="module")
def hub(place: Path, tiny: Callable[..., Path]) -> Iterator[HubServer]:
    with HubServer() as hub, pytest.MonkeyPatch.context() as patch:
        use_endpoint(patch, hub.url)
        files = {file.name: file.read_bytes() for file in tiny().iterdir() if file.is_file()}
        hub.add(TINY, files)
        hub.add("org/other", {**files, "README.md": b"another"})
        hub.add("org/slow", {**files, "README.md": b"slow"})
        yield hub


def served(*flags: str, **config: Any) -> nanollama.Models:
    parser = nanollama.build_parser()
    settings = nanollama.read_settings(parser.parse_args(["--serve", *flags]))
    return open_shelf(settings, nanollama.ServerConfig(**config))


@pytest.fixture(scope="module")
def live(hub: HubServer) -> Iterator[Live]:
    """A server without --model; org/tiny is in its cache."""
    nanollama.ModelStore().pull(TINY)
    with serving(models=served("--kernels", "torch", "--parallel", "2")) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> ollama.Client:
    return ollama.Client(host=live.url)


def refusal(call: Callable[[], Any]) -> ollama.ResponseError:
    with pytest.raises(ollama.ResponseError) as caught:
        call()
    assert "\n" not in caught.value.error
    return caught.value


# ---- answers -------------------------------------------------------------------------------------


def test_a_chat_whole_and_streamed(client: ollama.Client, live: Live) -> None:
    whole = client.chat(TINY, USER, options=GREEDY)
    assert whole.message.role == "assistant"
    assert whole.message.content
    assert (whole.model, whole.done) == (TINY, True)
    lines = list(client.chat(TINY, USER, options=GREEDY, stream=True))
    assert "".join(line.message.content for line in lines) == whole.message.content
    assert [line.done for line in lines] == [False] * (len(lines) - 1) + [True]
    assert lines[-1].eval_count == whole.eval_count
    wanted = live.chat(model=TINY, temperature=0).json()["choices"][0]["message"]["content"]
    assert whole.message.content == wanted  # one engine, two dialects


def test_counts_and_durations_are_true(client: ollama.Client, live: Live) -> None:
    started = time.perf_counter()
    answer = client.chat(TINY, USER, options={**GREEDY, "num_predict": 5, "ignore_eos": True})
    took = (time.perf_counter() - started) * 1e9
    llm = live.models.pools[TINY].llm()
    request = nanollama.GenerationRequest(messages=USER)
    assert answer.prompt_eval_count == len(llm.prompt_ids(request))
    assert (answer.eval_count, answer.done_reason) == (5, "length")
    assert 0 <= answer.load_duration < answer.total_duration < took
    assert 0 < answer.prompt_eval_duration + answer.eval_duration < answer.total_duration
    made = datetime.fromisoformat(answer.created_at.replace("Z", "+00:00"))
    assert abs((datetime.now(timezone.utc) - made).total_seconds()) < 60


def test_generate_goes_through_the_template_unless_raw(client: ollama.Client, live: Live) -> None:
    chat = client.chat(TINY, [{"role": "system", "content": "Be brief."}, *USER], options=GREEDY)
    made = client.generate(TINY, "hello", system="Be brief.", options=GREEDY)
    assert made.response == chat.message.content
    raw = client.generate(TINY, "the quick", raw=True, options=GREEDY)
    plain = live.text("the quick", model=TINY, temperature=0, max_tokens=8).json()
    assert raw.response == plain["choices"][0]["text"]
    assert raw.context is None
    lines = list(client.generate(TINY, "hello", system="Be brief.", options=GREEDY, stream=True))
    assert "".join(line.response for line in lines) == made.response
    assert lines[-1].context == made.context


def test_a_context_is_what_was_said_so_far(client: ollama.Client, live: Live) -> None:
    first = client.generate(TINY, "hello", options=GREEDY)
    llm = live.models.pools[TINY].llm()
    assert len(first.context) == first.prompt_eval_count + first.eval_count
    second = client.generate(TINY, "more", context=first.context, options=GREEDY)
    asked = llm.prompt_ids(
        nanollama.GenerationRequest(messages=[{"role": "user", "content": "more"}])
    )
    assert list(second.context)[: second.prompt_eval_count] == [*first.context, *asked]


def test_options_are_honoured(client: ollama.Client) -> None:
    def say(**options: Any) -> ollama.GenerateResponse:
        return client.generate(TINY, "hello", raw=True, options={"num_predict": 30, **options})

    assert say(seed=1, temperature=1).response == say(seed=1, temperature=1).response
    assert say(temperature=0).response != say(seed=2, temperature=1.5, top_k=0).response
    assert say(temperature=0).response == say(seed=5, temperature=2, top_k=1).response
    cut = say(temperature=0, stop=["a", "e", "i", "o", "u", " "])
    assert cut.done_reason == "stop"
    assert cut.eval_count < 30
    assert say(temperature=0, num_predict=3).eval_count == 3
    assert (
        say(temperature=0, repeat_penalty=1.0).response
        != say(temperature=0, repeat_penalty=2.0).response
    )


def test_options_without_effect_are_named_and_others_refused(live: Live) -> None:
    def send(**options: Any) -> httpx.Response:
        body = {"model": TINY, "prompt": "a", "raw": True, "stream": False}
        return live.http.post("/api/generate", json={**body, "options": options})

    answer = send(num_ctx=4096, num_gpu=1, num_predict=1, mirostat=0)
    assert answer.headers["x-nanollama-ignored"] == "options.num_ctx, options.num_gpu"
    for options in ({"mirostat": 1}, {"tfs_z": 0.5}, {"temperature": "hot"}, {"top_p": 2}):
        answer = send(**options)
        assert answer.status_code == 400
        assert next(iter(options)) in answer.json()["error"]


def test_options_are_read_as_ollama_reads_them(client: ollama.Client) -> None:
    floats: Any = {"num_predict": 8.0, "top_k": -1.0, "temperature": 2.5, "seed": 1.0}
    numbers = {"num_predict": 8, "top_k": 0, "temperature": 2.5, "seed": 1}
    answers = [client.chat(TINY, USER, options=options) for options in (floats, numbers)]
    assert answers[0].message.content == answers[1].message.content
    assert answers[0].eval_count <= 8


def test_logprobs(client: ollama.Client) -> None:
    answer = client.chat(TINY, USER, options=GREEDY, logprobs=True, top_logprobs=2)
    assert all(entry.logprob <= 0 and len(entry.top_logprobs) == 2 for entry in answer.logprobs)
    assert answer.logprobs[0].top_logprobs[0].token == answer.logprobs[0].token


def test_a_format_is_kept_to(client: ollama.Client) -> None:
    schema = {
        "type": "object",
        "properties": {"age": {"type": "integer", "maximum": 99}, "ok": {"type": "boolean"}},
        "required": ["age", "ok"],
        "additionalProperties": False,
    }
    options = {"num_predict": 60, "seed": 1}
    for call in (
        lambda form: client.chat(TINY, USER, format=form, options=options).message.content,
        lambda form: client.generate(TINY, "hello", format=form, options=options).response,
    ):
        value = json.loads(call(schema))
        assert set(value) == {"age", "ok"}
        assert isinstance(value["age"], int)
    answer = client.chat(TINY, USER, format="json", options={"num_predict": 100, "seed": 3})
    if answer.done_reason == "stop":
        assert isinstance(json.loads(answer.message.content), dict)
    else:
        assert answer.message.content.startswith("{")
    assert refusal(lambda: client.chat(TINY, USER, format={"type": "wibble"})).status_code == 400


def weather(city: str) -> str:
    """The weather in a city

    Args:
        city: its name
    """
    return f"rain in {city}"


def test_tools_are_called_and_answered(test_server: nanollama.TestServer) -> None:
    call = {"name": "weather", "arguments": {"city": "Paris"}}
    client = ollama.Client(host=test_server.url)
    for stream in (False, True):
        test_server.answers({"text": "Let me see.", "tool_calls": [call]}, "Rain.")
        answer = client.chat("any", USER, tools=[weather], stream=stream)
        lines = list(answer) if stream else [answer]
        (made,) = [c for line in lines for c in line.message.tool_calls or []]
        assert (made.function.name, dict(made.function.arguments)) == ("weather", {"city": "Paris"})
        assert "".join(line.message.content for line in lines).strip() == "Let me see."
        assert (lines[-1].done, lines[-1].done_reason) == (True, "stop")
        said: Any = [line.message for line in lines if line.message.tool_calls]
        result = {"role": "tool", "tool_name": "weather", "content": weather("Paris")}
        assert (
            client.chat("any", [*USER, *said, result], tools=[weather]).message.content == "Rain."
        )
        asked = test_server.requests[1]["body"]["messages"]
        assert asked[1]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris"}


@pytest.mark.parametrize(
    ("calls", "results", "expected"),
    [
        ([{}, {}], [{}, {}], [0, 1]),  # in order, as Ollama takes them
        ([{}, {}], [{"tool_name": "f1"}, {"tool_name": "f0"}], [1, 0]),
        ([{"id": "a"}, {"id": "b"}], [{"tool_call_id": "b"}, {"tool_call_id": "a"}], [1, 0]),
        ([{"id": "a"}, {"id": "b"}], [{"tool_name": "f1"}, {}], [1, 0]),
        ([{}], [{}, {}], [0, 0]),
    ],
)
def test_a_result_belongs_to_its_call(calls: Any, results: Any, expected: list[int]) -> None:
    made = [
        {**call, "function": {"name": f"f{i}", "arguments": {}}} for i, call in enumerate(calls)
    ]
    turn: list[Any] = [{"role": "assistant", "tool_calls": made}]
    turn += [{"role": "tool", "content": "r", **result} for result in results]
    for messages in (turn, turn + turn):
        said = ollama_messages(messages)[-len(turn) :]
        ids = [call["id"] for call in said[0]["tool_calls"]]
        assert len(set(ids)) == len(ids)
        assert [given or own for given, own in zip((c.get("id") for c in calls), ids)] == ids
        assert [ids.index(message["tool_call_id"]) for message in said[1:]] == expected


def test_thoughts_are_apart_and_may_be_left_out(tiny: Callable[..., Path]) -> None:
    with serving(lambda: nanollama.LLM(tiny(), template=THINKER), model_id="t") as live:
        client = ollama.Client(host=live.url)

        def prompt(think: Any) -> str:
            body = {"model": "t", "messages": USER, "stream": False, "think": think}
            with pytest.MonkeyPatch.context() as patch:
                seen: list[str] = []
                llm, prepare = live.pool.llm(), live.pool.llm().prepare

                def watched(request: nanollama.GenerationRequest) -> nanollama.Prepared:
                    seen.append((prepared := prepare(request)).prompt_text)
                    return prepared

                patch.setattr(llm, "prepare", watched)
                live.http.post("/api/chat", json={**body, "options": {"num_predict": 1}})
            return seen[0].partition("<|im_start|>")[0].strip()

        assert prompt(True) == "<think> True"
        assert prompt(False) == "<think> False"
        assert prompt("high") == "<think> Truehigh"
        assert client.chat("t", USER, options=GREEDY, think=True).message.content is not None


def test_thinking_has_its_own_field(test_server: nanollama.TestServer) -> None:
    test_server.answers({"reasoning": "hm so", "text": "Yes it is."})
    client = ollama.Client(host=test_server.url)
    answer = client.chat("any", USER)
    assert (answer.message.thinking, answer.message.content) == ("hm so", "Yes it is.")
    made = list(client.generate("any", "hello", stream=True))
    assert "".join(line.thinking or "" for line in made) == "hm so"
    assert "".join(line.response for line in made) == "Yes it is."


@pytest.mark.parametrize("route", ["chat", "generate"])
@pytest.mark.parametrize(
    "fields",
    [
        {"suffix": "end"},
        {"images": ["aGk="]},
        {"template": "{{ .Prompt }}"},
        {"width": 64},
        {"format": "yaml"},
        {"format": 3},
        {"think": 3},
        {"options": []},
        {"options": {"num_predict": "many"}},
        {"keep_alive": "later"},
        {"model": 3},
        {"stream": "yes"},
        {"messages": [{"role": "user", "content": "a", "images": ["aGk="]}]},
        {"messages": [3]},
        {"messages": [{"role": "alien", "content": "a"}]},
        {"messages": [{"role": "assistant", "tool_calls": [3]}]},
        {"messages": [{"role": "assistant", "tool_calls": 3}]},
        {"context": ["a"]},
        {"context": [10**9]},
        {"context": [10**30]},
    ],
    ids=lambda fields: json.dumps(fields)[:40],
)
def test_what_cannot_be_done_is_a_400_with_a_reason(
    live: Live, route: str, fields: dict[str, Any]
) -> None:
    base: dict[str, Any] = {"model": TINY, "stream": False, "options": {"num_predict": 1}}
    base |= {"messages": USER} if route == "chat" else {"prompt": "a"}
    if ("messages" in fields and route == "generate") or ("context" in fields and route == "chat"):
        pytest.skip("a field of the other route")
    answer = live.http.post(f"/api/{route}", json={**base, **fields})
    assert answer.status_code == 400, answer.text
    assert list(answer.json()) == ["error"]
    (name, value), error = next(iter(fields.items())), answer.json()["error"]
    assert name in error or "token id" in error or next(iter(value)) in error


def test_a_model_that_is_not_here(client: ollama.Client, live: Live, tiny: Any) -> None:
    for name in ("nothing", "org/none", str(tiny()), "../tiny", "./org/tiny"):
        assert refusal(lambda: client.chat(name, USER)).status_code == 404  # noqa: B023
    assert live.http.post("/api/chat", json={"messages": USER}).status_code == 400
    with pytest.raises(ollama.ResponseError):
        list(client.generate("nothing", "a", stream=True))


@pytest.mark.parametrize("prefix", ["", "hf.co/", "huggingface.co/", "https://hf.co/"])
@pytest.mark.parametrize("suffix", ["", ":latest"])
def test_the_hubs_address_before_a_name_on_every_api(
    client: ollama.Client, live: Live, prefix: str, suffix: str
) -> None:
    name = prefix + TINY + suffix
    chat = {"model": name, "messages": USER, "max_tokens": 1}
    for route in ("/v1/chat/completions", "/chat/completions", "/apply-template"):
        assert live.http.post(route, json=chat).status_code == 200
    body = {"model": name, "input": "a", "max_output_tokens": 1}
    assert live.http.post("/v1/responses", json=body).status_code == 200
    assert live.http.post("/v1/embeddings", json=body).status_code == 200
    assert live.text(model=name, max_tokens=1).json()["model"] == name
    assert live.http.get(f"/v1/models/{name}").json()["id"] == name
    assert client.chat(name, USER, options=GREEDY).message.content
    assert client.show(name).details.family == "llama"
    assert client.copy(name, f"{prefix}org/again{suffix}").status == "success"
    assert client.chat("org/again", USER, options=GREEDY).message.content
    assert client.delete(f"{prefix}org/again{suffix}").status == "success"
    assert TINY in live.models.pools
    assert not any(other.startswith("h") or ":" in other for other in live.models.pools)


# ---- loading, unloading, looking around ----------------------------------------------------------


def test_a_request_without_a_prompt_loads_and_unloads(client: ollama.Client, live: Live) -> None:
    def names() -> list[str]:
        return [model.model for model in client.ps().models]

    client.generate(TINY, keep_alive=0)
    wait_until(lambda: TINY not in names())
    assert client.generate(TINY).done_reason == "load"
    (model,) = client.ps().models
    assert (model.name, model.context_length) == (TINY, 256)
    assert 100_000 < model.size < 10**8
    assert model.size_vram == 0
    left = (model.expires_at - datetime.now(timezone.utc)).total_seconds()
    assert KEEP_ALIVE_S - 30 < left < KEEP_ALIVE_S + 1
    assert client.chat(TINY, [], keep_alive=0).done_reason == "unload"
    wait_until(lambda: TINY not in names())
    assert client.chat(TINY, []).done_reason == "load"


def test_a_request_says_how_long_its_model_stays(client: ollama.Client) -> None:
    for keep, least, most in (
        *(("2h", 7000, 7300), (-1, 10**8, math.inf), (None, 200, 301)),
        *(("70000000h", 10**8, math.inf), ("999999999h", 10**8, math.inf)),
    ):
        client.chat(TINY, USER, options={"num_predict": 1}, keep_alive=keep)
        (model,) = client.ps().models
        left = (model.expires_at - datetime.now(timezone.utc)).total_seconds()
        assert least < left < most
    client.chat(TINY, USER, options={"num_predict": 1}, keep_alive=0)
    wait_until(lambda: not client.ps().models)


def test_tags_and_show_describe_what_is_here(client: ollama.Client) -> None:
    models = {model.model: model for model in client.list().models}
    tiny = models[TINY]
    assert tiny.details.family == "llama"
    assert tiny.details.format == "safetensors"
    assert tiny.details.quantization_level == "F32"
    assert len(tiny.digest) == 64
    assert tiny.size > 100_000
    assert tiny.modified_at is not None
    show = client.show(TINY)
    assert show.modelinfo["general.architecture"] == "llama"
    assert show.modelinfo["llama.context_length"] == 256
    assert show.modelinfo["llama.block_count"] == 2
    assert show.capabilities == ["completion", "tools"]  # which its template does not know
    assert "im_start" in show.template
    assert show.modelfile.startswith(f"FROM {TINY}\n")
    assert refusal(lambda: client.show("nothing")).status_code == 404


def test_looking_does_not_count_as_use(client: ollama.Client) -> None:
    before = {model.id: model.last_used for model in nanollama.ModelStore().models()}
    client.list()
    client.show(TINY)
    assert {model.id: model.last_used for model in nanollama.ModelStore().models()} == before


def test_health_checks_and_version(live: Live) -> None:
    assert live.http.head("/").status_code == 200
    assert live.http.get("/").status_code == 200
    version = live.http.get("/api/version").json()["version"]
    assert version == OLLAMA_VERSION
    assert tuple(map(int, version.split("."))) >= (0, 13, 4)  # which Codex asks for


# ---- embeddings ----------------------------------------------------------------------------------


def test_embeddings(client: ollama.Client, live: Live) -> None:
    texts = ["hello", "the quick brown fox"]
    answer = client.embed(TINY, texts)
    llm = live.models.pools[TINY].llm()
    assert answer.prompt_eval_count == sum(len(llm.encode(text)) for text in texts)
    single = client.embed(TINY, texts[1])
    assert list(single.embeddings[0]) == list(answer.embeddings[1])
    assert sum(x * x for x in answer.embeddings[0]) == pytest.approx(1)
    assert list(client.embeddings(TINY, texts[0]).embedding) == list(answer.embeddings[0])
    assert len(client.embed(TINY, "hello", dimensions=8).embeddings[0]) == 8
    data = live.http.post("/v1/embeddings", json={"model": TINY, "input": texts}).json()["data"]
    assert data[1]["embedding"] == list(answer.embeddings[1])
    assert list(client.embed(TINY, []).embeddings) == []
    assert list(client.embeddings(TINY, "").embedding) == []


def test_what_is_too_long_is_cut_or_refused(client: ollama.Client) -> None:
    text = "hello " * 400
    assert client.embed(TINY, text).prompt_eval_count == 256
    assert "256" in refusal(lambda: client.embed(TINY, text, truncate=False)).error


# ---- models of one's own -------------------------------------------------------------------------


def test_pull_tells_how_far_it_is(client: ollama.Client, hub: HubServer) -> None:
    lines = list(client.pull("hf.co/org/other:latest", stream=True))
    assert lines[0].status == "pulling manifest"
    assert lines[-1].status == "success"
    weights = [line for line in lines if line.digest == "model.safetensors"]
    assert weights[-1].completed == weights[-1].total > 100_000
    assert "org/other" in [model.model for model in client.list().models]
    assert client.pull("org/other").status == "success"  # again, in one piece
    assert client.chat("org/other", USER, options=GREEDY).message.content


def test_models_that_cannot_run_are_not_listed(
    live: Live, client: ollama.Client, place: Path, tiny: Callable[..., Path]
) -> None:
    weights = (tiny() / "model.safetensors").read_bytes()
    whole = {"model.safetensors": weights, "config.json": b'{"model_type": "whisper"}'}
    folders = []
    for name, files in (
        ("whisper", whole),
        ("tokenizer-alone", {"tokenizer.json": (tiny() / "tokenizer.json").read_bytes()}),
        ("interrupted", {"config.json": (tiny() / "config.json").read_bytes()}),
    ):
        folders.append(folder := place / "hub" / f"models--org--{name}")
        snapshot = folder / "snapshots" / ("0" * 40)
        snapshot.mkdir(parents=True)
        (folder / "refs").mkdir()
        (folder / "refs" / "main").write_text("0" * 40)
        for file, content in files.items():
            (snapshot / file).write_bytes(content)
    try:
        assert TINY in [model.model for model in client.list().models]
        listed = live.http.get("/v1/models").json()["data"]
        for rows in ([m["id"] for m in listed], [m.model for m in client.list().models]):
            assert not {"org/whisper", "org/tokenizer-alone", "org/interrupted"} & set(rows)
        assert live.text(max_tokens=1).status_code == 200  # no model is named
    finally:
        for folder in folders:
            shutil.rmtree(folder)


def test_many_pulls_do_not_hold_up_an_answer(
    live: Live, client: ollama.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    monkeypatch.setattr(ollama_models, "pull_lines", lambda name, report: go.wait() and None)
    num_threads = min(32, (os.cpu_count() or 1) + 4)  # of the event loop
    with ThreadPoolExecutor(num_threads) as threads:
        pulls = [threads.submit(client.pull, TINY) for _ in range(num_threads)]
        try:
            time.sleep(0.2)
            assert client.chat(TINY, USER, options={"num_predict": 1}).done
        finally:
            go.set()
        assert all(pull.result().status == "success" for pull in pulls)


def test_a_pull_that_fails_says_why(client: ollama.Client, tiny: Any) -> None:
    for name in ("org/nothing", "no such thing", str(tiny())):
        assert refusal(lambda: client.pull(name)).status_code == 404  # noqa: B023
        with pytest.raises(ollama.ResponseError):
            list(client.pull(name, stream=True))


def test_who_leaves_ends_the_pull(
    live: Live, hub: HubServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    ended, left = threading.Event(), threading.Event()
    fetch = nanollama.ModelStore.fetch

    def watched(store: Any, name: str, new_bar: Callable[[str], type]) -> Path:
        def late_bar(file: str) -> type:
            left.wait(30)  # the client leaves first
            return new_bar(file)

        try:
            return fetch(store, name, None, late_bar)
        finally:
            ended.set()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(nanollama.ModelStore, "fetch", watched)
        with live.http.stream("POST", "/api/pull", json={"model": "org/slow"}) as response:
            assert json.loads(next(response.iter_lines()))["status"] == "pulling manifest"
        wait_until(lambda: "/api/pull 200" in caplog.text)
        left.set()
        wait_until(ended.is_set)
    gc.collect()
    assert "never retrieved" not in caplog.text
    assert nanollama.ModelStore().find_cached("org/slow") is None


def test_a_model_is_created_from_another(client: ollama.Client, live: Live) -> None:
    lines = list(
        client.create(
            "mario:7b",
            from_=TINY,
            system="You are Mario.",
            parameters={"temperature": 0, "num_predict": 5, "stop": ["x!", 'a "b"\nc']},
            messages=[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ahoy"}],
            license=["MIT", "or so"],
            stream=True,
        )
    )
    assert lines[-1].status == "success"
    show = client.show("mario:7b")
    assert show.license == "MIT\nor so"
    assert 'SYSTEM """\nYou are Mario.\n"""' in show.modelfile
    assert parse_modelfile(show.modelfile, Path("x")).parameters["stop"] == ("x!", 'a "b"\nc')
    assert "num_predict" in show.parameters
    answer = client.chat("mario:7b", USER)
    spelled = [
        {"role": "system", "content": "You are Mario."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ahoy"},
        *USER,
    ]
    options = {"temperature": 0, "num_predict": 5}
    assert answer.message.content == client.chat(TINY, spelled, options=options).message.content
    assert answer.eval_count <= 5
    openai = live.chat(model="mario:7b", max_tokens=5).json()["choices"][0]["message"]["content"]
    assert openai == answer.message.content
    other = [{"role": "system", "content": "You are Luigi."}, *USER]
    luigi = client.chat("mario:7b", other)  # a system message of one's own comes instead
    assert luigi.message.content == client.chat(TINY, other, options=options).message.content
    client.create("luigi", from_="mario:7b", system="You are Luigi.")
    assert 'SYSTEM """\nYou are Luigi.' in client.show("luigi").modelfile
    assert "Ahoy" in client.show("luigi").modelfile
    for name in ("mario:7b", "luigi"):
        assert client.delete(name).status == "success"
    assert TINY in [model.model for model in client.list().models]


def test_create_reads_a_modelfile_too(live: Live) -> None:
    text = f"FROM {TINY}\nPARAMETER temperature 0.25\nSYSTEM Be kind.\n"
    body = {"name": "kind", "modelfile": text, "stream": False}
    assert live.http.post("/api/create", json=body).json() == {"status": "success"}
    shown = live.http.post("/api/show", json={"name": "kind"}).json()
    assert shown["system"] == "Be kind."
    assert "0.25" in shown["parameters"]
    assert live.http.request("DELETE", "/api/delete", json={"name": "kind"}).status_code == 200


def test_create_accepts_parameters_without_effect(live: Live) -> None:
    parameters = {"num_keep": 4, "use_mmap": True, "mirostat": 0, "num_gpu": 99, "top_k": 5}
    body = {"model": "kept", "from": TINY, "parameters": parameters, "stream": False}
    assert live.http.post("/api/create", json=body).json() == {"status": "success"}
    shown = live.http.post("/api/show", json={"name": "kept"}).json()
    assert "top_k 5" in shown["modelfile"]
    assert not parameters.keys() & {*shown["modelfile"].replace("top_k", "").split()}
    assert live.http.request("DELETE", "/api/delete", json={"name": "kept"}).status_code == 200


@pytest.mark.parametrize(
    "text",
    [
        f'FROM "{TINY}"\r\nSYSTEM Be kind.',
        f'SYSTEM """\nFROM elsewhere\n"""\nFROM   {TINY}  \n',
        f"# FROM elsewhere\nfrom hf.co/{TINY}",
    ],
)
def test_the_base_of_a_modelfile_is_read_as_its_other_values(live: Live, text: str) -> None:
    body = {"name": "based", "modelfile": text, "stream": False}
    assert live.http.post("/api/create", json=body).json() == {"status": "success"}
    shown = live.http.post("/api/show", json={"name": "based"}).json()
    assert shown["modelfile"].startswith(("FROM org/tiny\n", "FROM hf.co/org/tiny\n"))
    assert live.http.request("DELETE", "/api/delete", json={"name": "based"}).status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"from": "/etc/passwd"},
        {"from": "nothing"},
        {"model": "../up", "from": TINY},
        {"model": "a/b/c", "from": TINY},
        {"model": "smollm2", "from": TINY},
        {"model": TINY, "from": TINY},
        {"model": "x"},
        {"from": TINY, "template": "{{ 1 }}"},
        {"files": {"a": "b"}},
        {"files": {"../a": f"sha256:{'0' * 64}"}},
        {"files": {"model.gguf": f"sha256:{'0' * 64}"}},
        {"files": {"model.gguf": 3}},
        {"from": TINY, "quantize": "q4_K_X"},
        {"from": TINY, "system": 'three quotes """'},
        {"from": TINY, "parameters": {"temperature": "hot"}},
        {"from": TINY, "parameters": {"colour": 1}},
        {"from": TINY, "parameters": {"mirostat": 2}},
        {"modelfile": f"FROM {TINY}\nPARAMETER tfs_z 0.5"},
        {"from": TINY, "parameters": {"stop": []}, "messages": [{"role": "tool", "content": "a"}]},
        {"modelfile": f"FROM {TINY}\nTEMPLATE x"},
        {"modelfile": f"FROM {TINY}\nADAPTER x"},
        {"modelfile": f"FROM {TINY}\nDRAFT x"},
        {"modelfile": "FROM /etc/passwd"},
        {"modelfile": "SYSTEM x"},
        {"modelfile": "WIBBLE"},
    ],
    ids=lambda fields: json.dumps(fields)[:50],
)
def test_what_no_model_can_be_made_of(live: Live, place: Path, fields: dict[str, Any]) -> None:
    before = sorted((place / "own").rglob("*"))
    for stream in (True, False):
        answer = live.http.post("/api/create", json={"model": "new", "stream": stream, **fields})
        assert '"error"' in answer.text
        assert answer.status_code in ((200, 400, 404) if stream else (400, 404))
    after = sorted((place / "own").rglob("*"))
    assert set(after) - set(before) <= {place / "own" / "modelfiles"}


@pytest.mark.parametrize(
    "fields",
    [
        {"system": "\ud800"},
        {"license": ["MIT", "\udfff"]},
        {"messages": [{"role": "user", "content": "a\ud800"}]},
        {"parameters": {"stop": ["\ud800"]}},
        {"modelfile": f"FROM {TINY}\nSYSTEM \ud800"},
        {"model": "\ud800"},
        {"from": "\ud800"},
    ],
    ids=lambda fields: next(iter(fields)),
)
def test_a_lone_surrogate_is_no_text_of_a_model(live: Live, fields: dict[str, Any]) -> None:
    body = {"model": "new", "from": TINY, "stream": False, **fields}
    answer = live.http.post("/api/create", content=json.dumps(body))
    assert answer.status_code in (400, 404)
    assert "internal" not in answer.text
    assert live.http.post("/api/show", json={"model": "new"}).status_code == 404


LONG_NAMES = [
    *("a" * 201, "a" + "\u00e9" * 99, "a" + "\U0001d4b3" * 99, "a" * 100_000),
    *(f"{'a' * 100}/{'b' * 100}:{'c' * 99}", f"org/{'b' * 300}", f"{TINY}:{'q' * 300}"),
    *(f"org/x/{'y' * 300}.gguf", "~\ud800/x", "a\0b", "~" + "x" * 300),
]


@pytest.mark.parametrize("name", LONG_NAMES, ids=lambda name: ascii(name[:8]) + str(len(name)))
def test_a_name_that_no_file_can_have_is_refused(live: Live, name: str) -> None:
    chat = {"model": name, "messages": USER, "input": "a", "prompt": "a"}
    routes = "chat generate embed embeddings show".split()
    paths = [f"/api/{route}" for route in routes] + ["/v1/chat/completions", "/v1/embeddings"]
    for path in (*paths, "/v1/responses", "/tokenize"):
        answer = live.http.post(path, content=json.dumps(chat))
        assert answer.status_code == 404, path
    for path, body in (
        ("create", {"model": name, "from": TINY, "stream": False}),
        ("create", {"model": "new", "from": name, "stream": False}),
        ("copy", {"source": TINY, "destination": name}),
        ("copy", {"source": name, "destination": "new"}),
    ):
        answer = live.http.post(f"/api/{path}", content=json.dumps(body))
        assert answer.status_code in (400, 404), path
    answer = live.http.request("DELETE", "/api/delete", content=json.dumps({"model": name}))
    assert answer.status_code == 404
    for path in ("/api/tags", "/v1/models", "/api/ps"):
        assert live.http.get(path).status_code == 200


def test_the_longest_name_works(client: ollama.Client) -> None:
    name = f"{'a' * 120}/{'b' * 60}:{'c' * 18}"
    assert len(name) == 200
    assert client.create(name, from_=TINY).status == "success"
    assert client.chat(name, USER, options=GREEDY).message.content
    assert name in [model.model for model in client.list().models]
    assert client.delete(name).status == "success"


def test_models_are_created_listed_and_deleted_at_once(live: Live) -> None:
    body = {"model": "racy", "from": TINY, "stream": False}
    requests: list[tuple[str, str, Any]] = [
        ("POST", "/api/create", body),
        ("DELETE", "/api/delete", {"model": "racy"}),
        ("GET", "/api/tags", None),
        ("POST", "/api/show", {"model": "racy"}),
        ("GET", "/v1/models", None),
        ("DELETE", "/api/delete", {"model": "racy"}),
    ]

    def work(i: int) -> set[int]:
        method, path, json = requests[i]
        with httpx.Client(base_url=live.url, timeout=60) as http:
            return {http.request(method, path, json=json).status_code for _ in range(30)}

    with ThreadPoolExecutor(len(requests)) as threads:
        for i, statuses in enumerate(threads.map(work, range(len(requests)))):
            assert statuses <= ({200, 404} if i % 2 else {200}), requests[i]
    live.http.request("DELETE", "/api/delete", json={"model": "racy"})


def test_copy_and_delete(client: ollama.Client) -> None:
    assert client.copy(TINY, "mine").status == "success"
    assert client.chat("mine", USER, options=GREEDY).message.content
    assert client.copy("mine", "yours").status == "success"
    assert {"mine", "yours"} <= {model.model for model in client.list().models}
    assert "mine" in [model.model for model in client.ps().models]
    assert client.delete("mine").status == "success"
    assert "mine" not in [model.model for model in client.ps().models]
    assert refusal(lambda: client.delete("mine")).status_code == 404
    assert refusal(lambda: client.copy("mine", "other")).status_code == 404
    assert refusal(lambda: client.delete("/etc/passwd")).status_code == 404
    assert refusal(lambda: client.delete("../own")).status_code == 404
    client.delete("yours")
    client.pull("org/other")
    assert client.delete("org/other").status == "success"
    assert "org/other" not in [model.model for model in client.list().models]


def test_a_model_that_changes_is_loaded_anew_and_answers_go_on(
    client: ollama.Client, live: Live
) -> None:
    client.create("moody", from_=TINY, parameters={"num_predict": 150, "seed": 1})
    options = {"ignore_eos": True}
    lines = client.chat("moody", USER, options=options, stream=True)
    next(iter(lines))
    old = live.models.pools["moody"]
    client.create("moody", from_=TINY, parameters={"num_predict": 2})
    assert client.chat("moody", USER, options=options).eval_count == 2
    assert live.models.pools["moody"] is not old
    assert list(lines)[-1].eval_count == 150
    wait_until(lambda: not any(worker.is_alive() for worker in old.workers))
    lines = client.chat("moody", USER, options={**options, "num_predict": 150}, stream=True)
    next(iter(lines))
    client.delete("moody")
    assert list(lines)[-1].eval_count == 150
    assert refusal(lambda: client.chat("moody", USER)).status_code == 404


def test_a_created_model_is_one_on_the_command_line_too(
    client: ollama.Client, capsys: pytest.CaptureFixture[str]
) -> None:
    client.create("short", from_=TINY, parameters={"num_predict": 3, "temperature": 0})
    assert nanollama.main(["list"]) == 0
    assert "short" in capsys.readouterr().out
    flags = ["--model", "short", "--chat", "--prompt", "hello", "--kernels", "torch"]
    assert nanollama.main(flags) == 0
    text = capsys.readouterr().out
    assert text.rstrip("\n") == client.chat("short", USER).message.content.rstrip("\n")
    assert nanollama.main(["rm", "short", "--yes"]) == 0
    assert nanollama.ModelStore().modelfile("short") is None


def test_what_there_is_nothing_like_here(client: ollama.Client, tmp_path: Path) -> None:
    assert "not supported" in refusal(lambda: client.push(TINY)).error


def test_a_blob_is_kept_under_its_digest(
    client: ollama.Client, live: Live, place: Path, tmp_path: Path
) -> None:
    file = tmp_path / "blob"
    file.write_bytes(b"blob" * 3_000_000)  # more than the body of another request may have
    digest = client.create_blob(file)
    assert live.http.head(f"/api/blobs/{digest}").status_code == 200
    assert live.http.post(f"/api/blobs/{digest}", content=b"again").status_code == 200
    name = digest.replace(":", "-")
    assert (place / "own" / "blobs" / name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "digest", ["sha256:00", "../../x", "md5:" + "0" * 64, "sha256:" + "G" * 64]
)
def test_a_name_that_is_no_digest_is_refused(live: Live, digest: str) -> None:
    for method in ("POST", "HEAD"):
        answer = live.http.request(method, f"/api/blobs/{digest}", content=b"x")
        assert answer.status_code in (400, 404)


def test_a_blob_with_another_digest_leaves_nothing(live: Live, place: Path) -> None:
    digest = "sha256:" + "0" * 64
    answer = live.http.post(f"/api/blobs/{digest}", content=b"x")
    assert answer.status_code == 400
    assert "digest" in answer.json()["error"]
    assert live.http.head(f"/api/blobs/{digest}").status_code == 404
    assert not list((place / "own" / "blobs").glob("*~"))


def test_a_disk_without_room_is_an_error(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blobs, "KEPT_FREE", 1 << 62)
    answer = live.http.post(f"/api/blobs/sha256:{'1' * 64}", content=b"x")
    assert answer.status_code == 507
    assert "disk is full" in answer.json()["error"]


def test_a_model_is_made_of_files(
    client: ollama.Client, live: Live, place: Path, tiny: Callable[..., Path]
) -> None:
    names = [file.name for file in tiny().iterdir() if file.is_file()]
    digests = {name: client.create_blob(tiny() / name) for name in names}
    client.create("filed", files=digests)
    lines = list(client.create("filed:q8", files=digests, quantize="q8_0", stream=True))
    statuses = [line.status or "" for line in lines]
    assert statuses[-2:] == ["writing manifest", "success"]
    assert any(status.startswith("quantizing F32 model to Q8_0") for status in statuses)
    found = {name: client.show(name).details.quantization_level for name in ("filed", "filed:q8")}
    assert found == {"filed": "F32", "filed:q8": "Q8_0"}
    expected = client.chat(TINY, USER, options=GREEDY).message.content
    assert client.chat("filed", USER, options=GREEDY).message.content == expected
    gguf = next((place / "own" / "created").rglob("model.gguf"))
    digest = client.create_blob(gguf)
    client.create("filed:gguf", files={"any.gguf": digest}, system="Be brief.")
    answers = [
        client.generate(name, "hello", raw=True, options=GREEDY).response
        for name in ("filed:q8", "filed:gguf")
    ]
    assert answers[0] == answers[1]
    for name in ("filed", "filed:q8", "filed:gguf"):
        client.delete(name)
    assert not list((place / "own" / "created").iterdir())
    assert not (place / "own" / "blobs" / digest.replace(":", "-")).exists()


def test_a_model_is_made_of_another_in_fewer_bits(client: ollama.Client, place: Path) -> None:
    client.create("small", from_=TINY, quantize="q4_K_M", system="You are small.")
    details = client.show("small")
    assert details.details.format == "gguf"
    assert details.details.quantization_level.startswith("Q")
    assert details.modelfile.count("You are small.") == 1
    assert client.chat("small", USER, options=GREEDY).message.content
    client.create("smaller", from_="small", parameters={"temperature": 0})
    client.delete("small")
    assert client.chat("smaller", USER, options=GREEDY).message.content  # the file is still in use
    client.delete("smaller")
    assert not list((place / "own" / "created").iterdir())


def test_a_server_of_named_models_changes_nothing(tiny: Callable[..., Path]) -> None:
    with serving(lambda: nanollama.LLM(tiny()), model_id="fixed") as live:
        client = ollama.Client(host=live.url)
        assert client.chat("fixed", USER, options=GREEDY).message.content
        for call in (
            lambda: client.pull(TINY),
            lambda: client.create("a", from_="fixed"),
            lambda: client.copy("fixed", "b"),
            lambda: client.delete("fixed"),
        ):
            assert refusal(call).status_code == 403
        assert [model.model for model in client.list().models] == ["fixed"]
        assert [model.model for model in client.ps().models] == ["fixed"]


def test_web_pages_from_elsewhere_cannot_pull_or_delete(live: Live) -> None:
    for origin, status in (("http://evil.example", 403), ("http://localhost:3000", 400)):
        answer = live.http.post("/api/pull", json={}, headers={"origin": origin})
        assert answer.status_code == status
    with serving(models=served(cors_origins=("https://mine.example",))) as other:
        answer = other.http.post("/api/pull", json={}, headers={"origin": "https://mine.example"})
        assert answer.status_code == 400


def test_the_async_client(live: Live) -> None:
    async def talk() -> None:
        client = ollama.AsyncClient(host=live.url)
        whole = await client.chat(TINY, USER, options=GREEDY)
        parts = [p async for p in await client.chat(TINY, USER, options=GREEDY, stream=True)]
        assert "".join(part.message.content for part in parts) == whole.message.content
        made = await client.generate(TINY, "hello", options=GREEDY)
        assert made.response == whole.message.content
        assert len((await client.embed(TINY, ["a", "b"])).embeddings) == 2
        assert (await client.embeddings(TINY, "a")).embedding
        assert [line async for line in await client.pull(TINY, stream=True)][-1].status == "success"
        assert (await client.create("async", from_=TINY)).status == "success"
        assert (await client.copy("async", "async2")).status == "success"
        assert (await client.show("async2")).details.family == "llama"
        assert (await client.ps()).models
        for name in ("async", "async2"):
            assert (await client.delete(name)).status == "success"
        assert TINY in [model.model for model in (await client.list()).models]

    asyncio.run(talk())


# ---- Modelfiles ----------------------------------------------------------------------------------

TEXTS = st.text(st.characters(codec="utf-8", exclude_categories=["Cs", "Cc"]), min_size=1).filter(
    lambda text: text.strip() and '"""' not in text and not text.endswith('"')
)
MODELFILES = st.builds(
    Modelfile,
    model=st.just("org/name"),
    system=st.none() | TEXTS,
    license=st.none() | TEXTS,
    parameters=st.fixed_dictionaries(
        {},
        optional={
            "temperature": st.floats(0, 2),
            "top_k": st.integers(0, 100),
            "max_tokens": st.none() | st.integers(0, 100),
            "stop": st.lists(TEXTS, min_size=1).map(tuple),
            "ctx": st.integers(1, 9999),
        },
    ),
    messages=st.lists(
        st.fixed_dictionaries({"role": st.sampled_from(["user", "assistant"]), "content": TEXTS})
    ).map(tuple),
)


@given(MODELFILES)
def test_a_modelfile_that_is_written_is_read_back(modelfile: Modelfile) -> None:
    assert parse_modelfile(format_modelfile(modelfile), Path("x")) == modelfile


def test_a_text_that_no_modelfile_can_hold_is_noticed() -> None:
    text = format_modelfile(Modelfile(model="a", system='x """\ny'))
    with pytest.raises(ModelfileError):
        parse_modelfile(text, Path("x"))


def test_a_call_that_was_cut_is_not_lost(test_server: nanollama.TestServer) -> None:
    arguments = {"city": "Bern", "days": [1, 2, 3], "unit": "a long unit of many words"}
    test_server.answers({"tool_calls": [{"name": "get_weather", "arguments": arguments}]})
    function = {"name": "get_weather", "parameters": {"type": "object", "properties": {}}}
    body = {
        "model": "any",
        "messages": [{"role": "user", "content": "?"}],
        "tools": [{"type": "function", "function": function}],
        "stream": False,
        "options": {"num_predict": 9},
    }
    answer = httpx.post(f"{test_server.url}/api/chat", json=body).json()
    assert answer["done_reason"] == "length"
    (call,) = answer["message"]["tool_calls"]
    assert call["function"]["name"] == "get_weather"
    assert call["function"]["arguments"].items() <= {**arguments, "days": [1, 2]}.items()
