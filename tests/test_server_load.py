"""Many clients on one engine: joining, leaving, failing, queueing, and several replicas."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import logging
import random
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from serving import Live, serving, wait_until

import nanollama

USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def live(tiny: Callable[..., Path]) -> Iterator[Live]:
    def load() -> nanollama.LLM:
        return nanollama.LLM(tiny(), parallel=4, prefill_chunk=16)

    with serving(load) as live:
        yield live


@pytest.fixture
def steps(live: Live, monkeypatch: pytest.MonkeyPatch) -> Iterator[Steps]:
    """Hold the engine: it takes a step only when a test allows it."""
    wait_until(live.is_idle)
    steps = Steps(live.pool.llm().engine, monkeypatch)
    yield steps
    steps.allow(10**4)
    wait_until(live.is_idle)


class Steps:
    def __init__(self, engine: nanollama.Engine, monkeypatch: pytest.MonkeyPatch) -> None:
        self.allowed, self.num_begun, self.num_done = threading.Semaphore(0), 0, 0
        step = engine.step

        def held() -> None:
            self.num_begun += 1
            self.allowed.acquire()
            try:
                step()
            finally:
                self.num_done += 1

        monkeypatch.setattr(engine, "step", held)

    def allow(self, count: int) -> None:
        for _ in range(count):
            self.allowed.release()

    def run(self, count: int) -> None:
        """Let exactly so many steps happen; the next one is then waiting to."""
        target = self.num_done + count
        self.allow(count)
        wait_until(lambda: self.num_done == target and self.num_begun == target + 1)


def deltas(text: str) -> str:
    """The content of a stream's events, which must end properly."""
    events = text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event[6:]) for event in events[:-2] if event.startswith("data: ")]
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks].count(None) == len(chunks) - 1
    return "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


# ---- a crowd -------------------------------------------------------------------------------------


def crowd() -> list[dict[str, Any]]:
    """32 requests of random lengths; every third client leaves, at some chunk or before any."""
    dice = random.Random(5)
    clients = []
    for i in range(32):
        words = " ".join(
            dice.choices(["fox", "dog", "lazy", "quick", "the"], k=dice.randint(1, 25))
        )
        body = {
            "messages": [{"role": "user", "content": words}],
            "max_tokens": dice.randint(1, 90),
            "seed": i,
            "temperature": 1,
            "ignore_eos": True,
            "stream": i % 4 != 3,
        }
        leaves = dice.choice([0, 0, 1, 5, 20]) if i % 3 == 0 else None
        clients.append({"body": body, "leaves": leaves})
    return clients


async def visit(http: httpx.AsyncClient, body: dict[str, Any], leaves: int | None) -> str | None:
    """The text a client gets; None for one that leaves after so many events."""
    request = http.build_request("POST", "/v1/chat/completions", json=body)
    if leaves == 0 or (leaves and not body["stream"]):
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(http.send(request, stream=body["stream"]), 0.02 * (leaves + 1))
        return None
    response = await http.send(request, stream=True)
    assert response.status_code == 200, await response.aread()
    text = ""
    async for part in response.aiter_text():
        text += part
        if leaves and text.count("\n\n") >= leaves:
            await response.aclose()
            return None
    return deltas(text) if body["stream"] else json.loads(text)["choices"][0]["message"]["content"]


async def visit_together(url: str, clients: list[dict[str, Any]]) -> tuple[list[str | None], int]:
    """What each client got, and how often /health answered meanwhile."""
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits) as http:
        crowd = asyncio.gather(*[visit(http, **client) for client in clients])
        num_healthy = 0
        while not crowd.done():
            response = await http.get("/health")
            assert response.json()["status"] == "ok"
            num_healthy += 1
            await asyncio.sleep(0.02)
        return await crowd, num_healthy


def test_everybody_in_a_crowd_gets_what_they_get_alone(live: Live) -> None:
    clients = crowd()
    together, num_healthy = asyncio.run(visit_together(live.url, clients))
    assert num_healthy > 5
    wait_until(live.is_idle)
    metrics = live.http.get("/metrics").text
    assert "nanollama_running_sequences 0.0" in metrics
    assert "nanollama_waiting_sequences 0.0" in metrics
    stayed = [
        (client["body"], text)
        for client, text in zip(clients, together)
        if client["leaves"] is None
    ]
    assert len(stayed) == 21
    for body, text in stayed:
        alone = live.http.post("/v1/chat/completions", json={**body, "stream": False}).json()
        assert text == alone["choices"][0]["message"]["content"]


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads memory from /proc")
def test_500_requests_leave_nothing_behind(live: Live, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, logger="nanollama")  # pytest keeps each line of the log

    def send(count: int) -> None:
        for i in range(count):
            body = {"prompt": f"number {i}", "max_tokens": 2, "stream": i % 2 == 0, "logprobs": 2}
            if i % 5 == 0:  # hangs up
                with live.http.stream("POST", "/v1/completions", json=body):
                    pass
            else:
                assert live.http.post("/v1/completions", json=body).status_code == 200
        wait_until(live.is_idle)
        gc.collect()

    send(300)
    num_objects, before = len(gc.get_objects()), resident_bytes()  # the list takes memory too
    send(500)
    assert len(gc.get_objects()) - num_objects < 1000  # less than two for each request
    assert resident_bytes() - before < 6_000_000


# ---- leaving -------------------------------------------------------------------------------------


class Caller:
    """A client that hangs up when told to, whatever it is waiting for."""

    def __init__(self, live: Live, body: dict[str, Any]) -> None:
        data = json.dumps(body).encode()
        self.socket = socket.create_connection(("127.0.0.1", httpx.URL(live.url).port))
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        self.socket.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)

    def read(self, word: bytes) -> None:
        seen = b""
        while word not in seen:
            seen += self.socket.recv(65536)


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("num_steps", [0, 1, 5])
def test_a_client_that_leaves_frees_its_slot_within_a_step(
    live: Live, steps: Steps, stream: bool, num_steps: int
) -> None:
    worker, engine = live.pool.workers[0], live.pool.llm().engine
    body = {"messages": USER, "stream": stream, "ignore_eos": True, "max_tokens": 200, "n": 2}
    caller = Caller(live, body)
    wait_until(lambda: worker.jobs and steps.num_begun == 1)
    steps.run(num_steps)
    if stream:
        caller.read(b"assistant")
    caller.socket.close()
    wait_until(lambda: worker.num_sequences == 0, "noticing")
    assert engine.has_work
    steps.allow(1)  # the step that was about to happen
    wait_until(lambda: not engine.has_work, "freeing")
    assert steps.num_done == num_steps + 1
    wait_until(live.is_idle)


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_never_runs(live: Live, steps: Steps, stream: bool) -> None:
    worker, scheduler = live.pool.workers[0], live.pool.llm().engine.scheduler
    stays = Caller(live, {"messages": USER, "n": 4, "max_tokens": 30, "ignore_eos": True})
    wait_until(lambda: steps.num_begun == 1)
    steps.run(3)
    assert (len(scheduler.running), len(scheduler.free)) == (4, 0)
    leaves = Caller(live, {"messages": USER, "stream": stream, "max_tokens": 5})
    while not scheduler.waiting:
        steps.run(1)
    leaves.socket.close()
    wait_until(lambda: worker.num_sequences == 4, "noticing")
    steps.run(1)
    assert len(scheduler.waiting) == 0
    num_prompts = live.pool.llm().engine.stats.prefill_tokens
    steps.allow(100)
    stays.read(b'"usage"')
    assert live.pool.llm().engine.stats.prefill_tokens == num_prompts


# ---- sharing -------------------------------------------------------------------------------------


def test_a_long_prompt_does_not_hold_up_the_others(live: Live, steps: Steps) -> None:
    scheduler = live.pool.llm().engine.scheduler
    talking = Caller(
        live, {"messages": USER, "stream": True, "max_tokens": 100, "ignore_eos": True}
    )
    wait_until(lambda: steps.num_begun == 1)
    steps.run(4)
    long = [{"role": "user", "content": "xyzzy " * 30}]
    asking = Caller(live, {"messages": long, "max_tokens": 1})
    while len(scheduler.running) < 2:
        steps.run(1)
    first, second = scheduler.running
    while second.num_computed < second.num_prompt:
        before = first.num_generated, second.num_computed
        steps.run(1)
        assert first.num_generated == before[0] + 1
        assert second.num_computed - before[1] <= 16
    assert first.num_generated > 8
    for caller in (talking, asking):
        caller.socket.close()


def test_a_long_text_is_read_while_others_are_answered(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm, go = live.pool.llm(), threading.Event()
    prepare = llm.prepare

    def slow(request: nanollama.GenerationRequest) -> nanollama.Prepared:
        if request.prompt == "long":
            go.wait()
        return prepare(request)

    monkeypatch.setattr(llm, "prepare", slow)
    with ThreadPoolExecutor() as threads:
        long = threads.submit(live.text, "long", max_tokens=1)
        wait_until(lambda: live.pool.workers[0].num_sequences == 1)
        assert live.text("short", max_tokens=2).status_code == 200
        go.set()
        assert long.result().status_code == 200


def test_a_text_that_cannot_fit_is_refused_before_all_of_it_is_encoded(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, encoded = live.pool.llm().tokenizer, []
    encode = tokenizer.encode

    def note(text: str, *rest: Any, **named: Any) -> list[int]:
        encoded.append(len(text))
        return encode(text, *rest, **named)

    monkeypatch.setattr(tokenizer, "encode", note)
    text = "the lazy dog " * 100_000
    for path, body, param in (
        ("/v1/completions", {"prompt": text}, "prompt"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": text}]}, "messages"),
        ("/v1/responses", {"input": text}, "input"),
        ("/v1/embeddings", {"input": ["short", text]}, "input"),
        ("/api/chat", {"model": "model", "messages": [{"role": "user", "content": text}]}, ""),
        ("/api/generate", {"model": "model", "prompt": text}, ""),
    ):
        answer = live.http.post(path, json=body)
        assert answer.status_code == 400, path
        assert "the context holds" in answer.text
        if param:
            error = answer.json()["error"]
            assert (error["code"], error["param"]) == ("context_length_exceeded", param)
    assert max(encoded) <= 16 * live.pool.llm().engine.n_ctx


def test_the_event_loop_is_free_during_a_step(live: Live, steps: Steps) -> None:
    caller = Caller(live, {"messages": USER, "max_tokens": 3})
    wait_until(lambda: steps.num_begun == 1)
    for route in ("/health", "/stats", "/metrics", "/v1/models", "/"):
        assert live.http.get(route).status_code == 200
    assert live.http.get("/health").json()["available_workers"] == 0
    assert live.http.get("/stats").json()["busy_workers"] == 1
    assert live.chat(temperature=9).status_code == 400
    steps.allow(100)
    caller.read(b'"usage"')


def test_more_choices_than_slots_are_all_made(live: Live) -> None:
    many = live.chat(n=11, seed=1, max_tokens=4, temperature=1).json()
    assert [choice["index"] for choice in many["choices"]] == list(range(11))
    few = live.chat(n=3, seed=1, max_tokens=4, temperature=1).json()
    assert [c["message"] for c in many["choices"][:3]] == [c["message"] for c in few["choices"]]
    assert many["usage"]["prompt_tokens"] == few["usage"]["prompt_tokens"]


def test_choices_share_one_prefill(live: Live) -> None:
    stats = live.pool.llm().engine.stats
    before = stats.prefill_tokens
    prompt = "a prompt that was not seen before, and rather a long one " * 2
    answer = live.text(prompt, n=4, max_tokens=2).json()
    again = 3 * (nanollama.WORTH_WAITING + 1)  # what a choice may have to compute for itself
    assert stats.prefill_tokens - before <= answer["usage"]["prompt_tokens"] + again


def test_a_full_queue_asks_to_come_again(tiny: Callable[..., Path]) -> None:
    openai = pytest.importorskip("openai")
    with serving(lambda: nanollama.LLM(tiny(), parallel=1), max_queue=1) as live:
        go, step = threading.Event(), live.pool.llm().engine.step
        live.pool.llm().engine.step = lambda: go.wait() and step()  # type: ignore[method-assign]
        callers = [Caller(live, {"messages": USER, "max_tokens": 2}) for _ in range(2)]
        wait_until(lambda: live.pool.workers[0].num_sequences == 2)
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.RateLimitError) as caught:
            client.chat.completions.create(model="model", messages=USER)
        assert caught.value.code == "rate_limit_exceeded"
        assert caught.value.response.headers["retry-after"] == "1"
        assert live.http.post("/chat/completions", json={"messages": USER}).status_code == 429
        answer = live.http.post("/v1/messages", json={"messages": USER, "max_tokens": 1})
        assert answer.json()["error"]["type"] == "rate_limit_error"
        assert answer.headers["retry-after"] == "1"
        retrying = openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=3)
        with ThreadPoolExecutor() as threads:
            later = threads.submit(
                retrying.chat.completions.create, model="model", messages=USER, max_tokens=1
            )
            go.set()
            assert later.result().choices
        for caller in callers:
            caller.read(b'"usage"')
        wait_until(live.is_idle)
        assert len(live.chat(n=5, max_tokens=1).json()["choices"]) == 5  # nobody else is waiting


# ---- failing -------------------------------------------------------------------------------------


def test_a_failed_step_fails_what_ran_in_it_and_nothing_else(
    live: Live, steps: Steps, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = live.pool.llm().engine
    forward = engine.forward

    def fail(work: Any) -> Any:
        monkeypatch.setattr(engine, "forward", forward)
        raise MemoryError("out of memory\nsaid at length")

    with ThreadPoolExecutor() as threads:
        whole = threads.submit(live.chat, n=2, max_tokens=200, ignore_eos=True)
        stream = threads.submit(live.chat, n=2, max_tokens=200, ignore_eos=True, stream=True)
        wait_until(lambda: live.pool.workers[0].num_sequences == 4)
        wait_until(lambda: steps.num_begun == 1)
        while len(engine.scheduler.running) < 4:
            steps.run(1)
        queued = threads.submit(live.chat, max_tokens=3, seed=1, ignore_eos=True)
        while not engine.scheduler.waiting:
            steps.run(1)
        monkeypatch.setattr(engine, "forward", fail)
        steps.allow(100)
        assert whole.result().status_code == 500
        error = whole.result().json()["error"]
        assert error == {
            "message": "the model failed: out of memory: out of memory; "
            "take a smaller model, --ctx or --parallel", "type": "server_error",
            "param": None, "code": "step_failed",
        }  # fmt: skip
        events = stream.result().text.split("\n\n")
        assert json.loads(events[-3][6:]) == {"error": error}
        assert events[-2:] == ["data: [DONE]", ""]
        assert queued.result().json()["usage"]["completion_tokens"] == 3
    assert "a step failed: NanollamaError: out of memory: out of memory; take" in caplog.text
    steps.allow(100)
    again = live.chat(max_tokens=3, seed=1, ignore_eos=True).json()
    assert again["choices"][0]["message"] == queued.result().json()["choices"][0]["message"]


def test_a_prompt_too_large_for_the_memory_is_its_clients_error_alone(
    live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise MemoryError

    encode = nanollama.Tokenizer.encode
    monkeypatch.setattr(nanollama.Tokenizer, "encode", fail)
    answer = live.text("fox")
    assert answer.status_code == 500
    assert answer.json()["error"]["message"].startswith("out of memory: MemoryError; take a ")
    monkeypatch.setattr(nanollama.Tokenizer, "encode", encode)
    assert live.text("fox", max_tokens=1).status_code == 200


def test_work_that_outlasts_the_shutdown_ends_with_an_error_event(
    tiny: Callable[..., Path],
) -> None:
    openai = pytest.importorskip("openai")
    with serving(lambda: nanollama.LLM(tiny()), shutdown_s=1) as live:
        engine = live.pool.llm().engine
        step = engine.step
        engine.step = lambda: time.sleep(0.05) or step()  # type: ignore[func-returns-value, method-assign]
        client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)
        chunks = client.completions.create(
            model="model", prompt="a", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
        )
        next(chunks)
        live.stop()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(chunks)


def test_nothing_new_is_taken_during_the_shutdown(tiny: Callable[..., Path]) -> None:
    with serving(lambda: nanollama.LLM(tiny())) as live:
        live.models.is_closing = lambda: True
        response = live.chat()
        assert response.status_code == 503
        assert response.headers["retry-after"] == "1"
        assert response.json()["error"]["code"] == "shutting_down"
        assert live.http.get("/health").json()["status"] == "closing"


def test_a_replica_that_cannot_be_loaded_is_reported(tiny: Callable[..., Path]) -> None:
    def load() -> nanollama.LLM:
        raise nanollama.CheckpointError("broken")

    with serving(lambda: nanollama.LLM(tiny()), load) as live:
        wait_until(lambda: live.failures)
        assert str(live.failures[0]) == "broken"
        assert live.http.get("/health").status_code == 503


# ---- several replicas ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tiny: Callable[..., Path]) -> Iterator[Live]:
    with serving(*[lambda: nanollama.LLM(tiny(), parallel=2)] * 2) as pair:
        yield pair


def gpu_of(live: Live, content: str, max_tokens: int = 1) -> int:
    """Which replica answers the web chat."""
    message = {"role": "user", "content": content}
    body = {"messages": [message], "max_tokens": max_tokens, "temperature": 0}
    response = live.http.post("/chat/completions", json=body)
    events = [json.loads(line[6:]) for line in response.text.split("\n\n")[:-1]]
    return int(events[0]["gpu"])


def test_the_least_busy_replica_answers(pair: Live) -> None:
    assert pair.http.get("/health").json()["num_gpus"] == 2
    first, _ = pair.pool.workers
    go = threading.Event()
    first.inbox.put(lambda llm: go.wait() and None)  # holds the first one
    body = {"messages": USER, "max_tokens": 1}
    callers = []
    for num_waiting in (1, 2):
        callers.append(Caller(pair, body))
        wait_until(lambda: first.num_sequences == num_waiting)  # noqa: B023
    stats = pair.http.get("/stats").json()
    assert (stats["busy_workers"], stats["available_workers"]) == (1, 1)
    for _ in range(3):
        Caller(pair, body).read(b'"usage"')  # the second one answers
    assert gpu_of(pair, "somebody else entirely", 9) == 1
    go.set()
    for caller in callers:
        caller.read(b'"usage"')
    wait_until(pair.is_idle)
    assert {worker["gpu_id"] for worker in pair.http.get("/stats").json()["workers"]} == {0, 1}


def test_a_conversation_stays_with_the_replica_that_has_its_prefix(pair: Live) -> None:
    def ask(messages: list[dict[str, str]]) -> tuple[int, int]:
        """Who answered, and how many tokens it knew."""
        before = [worker.llm.engine.stats.prefill_tokens for worker in pair.pool.workers]
        usage = pair.chat(messages=messages, max_tokens=1).json()["usage"]
        after = [worker.llm.engine.stats.prefill_tokens for worker in pair.pool.workers]
        (who,) = [i for i in range(2) if after[i] > before[i]]
        return who, usage["prompt_tokens_details"]["cached_tokens"]

    talks = [[{"role": "user", "content": f"{i} is what I want to talk about"}] for i in "ab"]
    pair.pool.workers[0].num_sequences += 1  # as if it were busy: the second gets the talk
    try:
        homes = [ask(talks[0])[0]]
    finally:
        pair.pool.workers[0].num_sequences -= 1
    assert homes == [1]
    homes.append(ask(talks[1])[0])
    assert homes == [1, 0]
    for home, talk in zip(homes, talks):
        answered = [*talk, {"role": "assistant", "content": "Go on."}, *USER]
        who, num_cached = ask(answered)
        assert who == home
        assert num_cached > 20


def test_replicas_give_the_same_answers(pair: Live) -> None:
    def ask(_: int) -> str:
        answer = pair.chat(seed=4, max_tokens=30, temperature=1).json()
        return str(answer["choices"][0]["message"]["content"])

    with ThreadPoolExecutor(6) as threads:
        assert len(set(threads.map(ask, range(6)))) == 1
    wait_until(pair.is_idle)


# ---- measuring -----------------------------------------------------------------------------------


def test_the_benchmark_measures_any_server(live: Live) -> None:
    script = Path(nanollama.__file__).parent / "examples" / "serve_bench.py"
    url = f"{live.url}/v1"
    flags = "--clients 1 6 --requests 2 --prompt-words 5 --max-tokens 9".split()
    ran = subprocess.run(
        [sys.executable, str(script), url, url, *flags], capture_output=True, text=True, check=True
    )
    rows = [line.split() for line in ran.stdout.splitlines()[2:]]
    assert [row[0] for row in rows] == ["1", "1", "6", "6"]
    for _, num_prompt, speed, num_failed, *times, server in rows:
        assert (num_failed, server) == ("0", url)
        assert int(num_prompt) > 5
        first, between = [float(t) for t in times[:3]], [float(t) for t in times[3:]]
        assert len(between) == 3
        assert float(speed) > 0
        assert first == sorted(first)
        assert between == sorted(between)
    assert live.http.get("/stats").json()["busy_workers"] == 0
