"""Replicas on Ray behind a front in this process: one cluster for all of these tests."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import anthropic
import httpx
import openai
import pytest
from replicas import ENDLESS, num_running, replica_pids, run_stream, settings_for
from serving import Live, serving, wait_until

import nanollama

ray = pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("ray.serve")

from ray import serve  # noqa: E402

from nanollama_extras.cluster import front  # noqa: E402
from nanollama_extras.cluster import serve as cluster_serve  # noqa: E402
from nanollama_extras.cluster.placement import LIVE, Beginning  # noqa: E402

pytestmark = pytest.mark.ray
SLOTS = 6  # of a replica, and no queue
OPTIONS = ("--parallel", str(SLOTS), "--max-queue", "0")
LONG = {"max_tokens": 3000, "stream": True, "temperature": 0}


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("Llama", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def started(ray_address: str) -> Iterator[int]:
    """Ray Serve -> the port of its proxy."""
    with contextlib.closing(nanollama.listen("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield port
    serve.shutdown()


@pytest.fixture(scope="module")
def live(started: int, model: Path) -> Iterator[Live]:
    """A front with two replicas."""
    settings = settings_for(model, "--replicas", "2", *OPTIONS)
    config = nanollama.ServerConfig()
    with serving(models=cluster_serve.open_front(settings, config)) as live:
        live.models.disconnect = lambda: None  # other tests go on
        wait_until(lambda: len(LIVE[cluster_serve.APP]) == 2, "two replicas")
        yield live


@pytest.fixture(scope="module")
def plain(model: Path) -> Iterator[Live]:
    """The plain server of the same model, as an oracle."""
    sampling = {"logit_bias": ENDLESS}
    llm = nanollama.LLM(model, parallel=2 * SLOTS)
    with serving(lambda: llm, model_id="tiny", sampling=sampling) as live:
        yield live


CHAT = {"messages": [{"role": "user", "content": "hello"}], "seed": 3, "max_tokens": 12}
PIXEL = "data:image/gif;base64,R0lGODdhAQABAIEAAAAAAAAAAAAAAAAAACwAAAAAAQABAAAIBAABBAQAOw=="
IMAGE = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": PIXEL}]}]}
CLAUDE = {**CHAT, "model": "tiny", "stream": True}
CLAUDE.pop("seed")
REQUESTS: dict[str, tuple[str, str, Any]] = {
    "chat": ("POST", "/v1/chat/completions", CHAT),
    "chat stream": ("POST", "/v1/chat/completions", {**CHAT, "stream": True}),
    "text": ("POST", "/v1/completions", {"prompt": ["a", "b"], "seed": 1, "max_tokens": 9}),
    "claude": ("POST", "/v1/messages", {**CLAUDE, "temperature": 0}),
    "ollama": ("POST", "/api/generate", {"prompt": "x", "options": {"seed": 1, "num_predict": 5}}),
    "tokenize": ("POST", "/tokenize", {"prompt": "hello"}),
    "models": ("GET", "/v1/models", None),
    "a model by its name": ("GET", "/v1/models/tiny", None),
    "no route": ("GET", "/v1/nothing", None),
    "another method": ("GET", "/v1/chat/completions", None),
    "no model of this name": ("POST", "/v1/chat/completions", {**CHAT, "model": "other"}),
    "a wrong field": ("POST", "/v1/chat/completions", {**CHAT, "temperature": "hot"}),
    "a wrong field of Claude": ("POST", "/v1/messages", {"messages": 3}),
    "no messages": ("POST", "/v1/responses", {}),
    "too long": ("POST", "/v1/completions", {"prompt": "hello " * 5000}),
    "an image": ("POST", "/v1/chat/completions", IMAGE),
    "an unknown response": ("GET", "/v1/responses/resp_x", None),
}
VARYING = {"id", "created", "created_at", "timings", "owned_by"}


def same_part(value: Any) -> Any:
    """A value without ids and times."""
    if isinstance(value, dict):
        rest = {k: v for k, v in value.items() if k not in VARYING and "duration" not in k}
        return {name: same_part(part) for name, part in rest.items()}
    return [same_part(one) for one in value] if isinstance(value, list) else value


def bodies(response: httpx.Response) -> list[Any]:
    """The objects of an answer: of a stream's events, of lines, or the only one."""
    texts = [line.removeprefix("data: ") for line in response.text.splitlines() if line]
    texts = [text for text in texts if text.startswith("{")]
    return [same_part(json.loads(text)) for text in texts]


@pytest.mark.parametrize("name", REQUESTS)
def test_the_front_answers_as_the_plain_server(live: Live, plain: Live, name: str) -> None:
    method, path, body = REQUESTS[name]
    ours, theirs = (one.http.request(method, path, json=body) for one in (live, plain))
    assert ours.status_code == theirs.status_code
    assert ours.headers["content-type"] == theirs.headers["content-type"]
    assert bodies(ours) == bodies(theirs) != []
    assert len(ours.headers.get_list("x-request-id")) == 1


def test_a_body_that_is_no_json_is_refused(live: Live, plain: Live) -> None:
    answers = [one.http.post("/v1/completions", content=b"{") for one in (live, plain)]
    assert answers[0].status_code == 400
    assert answers[0].json() == answers[1].json()


def test_official_clients_work(live: Live) -> None:
    client = openai.OpenAI(base_url=f"{live.url}/v1", api_key="any")
    stream = client.chat.completions.create(model="tiny", stream=True, **CHAT)
    streamed = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    whole = client.chat.completions.create(model="tiny", **CHAT)
    assert streamed == whole.choices[0].message.content != ""
    claude = anthropic.Anthropic(base_url=live.url, api_key="any")
    message = claude.messages.create(model="tiny", max_tokens=3, messages=CHAT["messages"])
    assert message.usage.output_tokens == 3


def test_stored_responses_are_reachable_wherever_they_were_made(live: Live) -> None:
    def respond(text: str, **fields: Any) -> Any:
        body = {"input": text, "max_output_tokens": 3, **fields}
        return live.http.post("/v1/responses", json=body).json()

    first = [respond(f"question {i}") for i in range(4)]
    for body in first:
        path = f"/v1/responses/{body['id']}"
        assert live.http.get(path).json() == body
        items = live.http.get(f"{path}/input_items").json()["data"]
        more = respond("and then?", previous_response_id=body["id"])
        assert more["usage"]["input_tokens"] > body["usage"]["input_tokens"]
        assert more["previous_response_id"] == body["id"]
        given = {"type": "item_reference", "id": body["output"][0]["id"]}
        assert "id" in respond("x", input=[given, {"role": "user", "content": "y"}]), items
        assert live.http.delete(path).json()["deleted"]
        assert live.http.get(path).status_code == 404


def test_keys_are_checked_by_the_front(live: Live) -> None:
    config = nanollama.ServerConfig(api_keys=("secret",))
    handle = live.models.handle
    models = cluster_serve.front_of("keys", config, cluster_serve.APP, connect=lambda: handle)
    with serving(models=models) as locked:
        assert locked.chat().status_code == 401
        locked.http.headers["authorization"] = "Bearer secret"
        assert locked.chat().is_success


def test_metrics_and_stats_cover_all_replicas(live: Live) -> None:
    def tokens() -> float:
        text = live.http.get("/metrics").text
        return float(text.partition("\nnanollama_generated_tokens_total ")[2].split()[0])

    before = tokens()
    for i in range(4):  # new chats go round
        assert live.chat(f"number {i}", max_tokens=5).is_success
    assert tokens() == before + 20
    stats = live.http.get("/stats").json()
    assert [row["replica"] for row in stats["workers"]] == [0, 1]
    assert all(row["decode_tokens"] for row in stats["workers"])
    assert live.http.get("/health").json()["available_workers"] == 2
    assert "nanollama_front_replicas 2\n" in live.http.get("/metrics").text


def cached_share(live: Live, name: str, num_chats: int = 10, num_turns: int = 4) -> float:
    """The share of prompt tokens that is read from the cache, for chats that take turns."""
    chats = [
        [{"role": "user", "content": f"{name}{i}: tell me more. " * 4}] for i in range(num_chats)
    ]
    cached = total = 0
    for _ in range(num_turns):
        for messages in chats:
            body = {"messages": messages, "max_tokens": 8, "temperature": 0}
            answer = live.http.post("/v1/chat/completions", json=body).json()
            usage = answer["usage"]
            cached += usage["prompt_tokens_details"]["cached_tokens"]
            total += usage["prompt_tokens"]
            messages += [answer["choices"][0]["message"], {"role": "user", "content": "go on"}]
    return cached / total


def test_interleaved_chats_find_their_prefixes(
    live: Live, plain: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two replicas cache as much as one server with as many slots; those of a lottery do not."""
    ours, single = cached_share(live, "a"), cached_share(plain, "a")
    assert ours > 0.9 * single > 0.5
    chance = random.Random(0)
    monkeypatch.setattr(
        front.Placement, "pick", lambda self, *_: chance.choice(sorted(self.replicas()))
    )
    assert cached_share(live, "b") < 0.9 * ours


@contextlib.contextmanager
def streams(live: Live, num: int) -> Iterator[None]:
    """So many endless streams, each after its first token."""
    with contextlib.ExitStack() as stack:
        begun: list[Iterator[str]] = []
        for i in range(num):
            messages = [{"role": "user", "content": f"story {i}"}]
            request = ("POST", "/v1/chat/completions")
            response = stack.enter_context(
                live.http.stream(*request, json={"messages": messages, **LONG}, timeout=60)
            )
            assert response.status_code == 200
            begun.append(response.iter_lines())  # without it, the stream would be closed
            assert next(begun[-1]).startswith("data: ")
        yield


def test_full_replicas_refuse_and_clients_that_hang_up_free_them(live: Live) -> None:
    with streams(live, 2 * SLOTS):
        assert num_running(live) == 2 * SLOTS  # not one of them was refused
        refused = live.chat("one more")
        assert refused.status_code == 429
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        claude = live.http.post("/v1/messages", json={**CLAUDE, "model": "tiny"})
        assert claude.json()["error"]["type"] == "rate_limit_error"
    wait_until(lambda: num_running(live) == 0, "the end of abandoned streams")
    assert live.chat().is_success
    wait_until(lambda: not live.models.placement.loads, "the end of all counts")


def test_a_killed_replica_loses_no_unanswered_request(live: Live, plain: Live) -> None:
    """Streams that have begun end with an error event; whole answers come from the other one."""
    fields = {"max_tokens": 200, "seed": 5}
    asked = [{"messages": [{"role": "user", "content": f"tell {i}"}], **fields} for i in range(8)]
    chat = "/v1/chat/completions"
    expected = [plain.http.post(chat, json=body).json()["choices"][0] for body in asked]
    told = [
        {"model": "tiny", "messages": [{"role": "user", "content": f"on and on {i}"}]}
        | {"max_tokens": 3000, "stream": True}
        for i in range(3)
    ]
    endless = (
        (chat, told[0]),
        ("/v1/messages", told[1]),
        ("/v1/responses", {"input": "x", "max_output_tokens": 3000, "stream": True}),
        ("/api/chat", {**told[2], "options": {"num_predict": 3000}}),
    )
    pids = replica_pids(cluster_serve.APP)
    assert len(pids) == 2
    with ThreadPoolExecutor(20) as pool:
        streamed = []
        for number, one in enumerate(endless, 1):  # new chats go round: two for each replica
            streamed.append(pool.submit(run_stream, live, *one))
            wait_until(lambda number=number: num_running(live) == number, "one more stream")
        whole = [pool.submit(live.http.post, chat, json=body, timeout=120) for body in asked]
        wait_until(lambda: sum(live.models.placement.loads.values()) == 12, "twelve requests")
        wait_until(lambda: num_running(live) == 12, "twelve sequences")
        os.kill(pids[0], signal.SIGKILL)
        for future, choice in zip(whole, expected):
            answer = future.result()
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["message"] == choice["message"]
        ends = [future.result()[-1] for future in streamed]
    assert live.models.num_lost > 0
    assert sum("replica has ended" in json.dumps(end) for end in ends) == 2
    wait_until(lambda: len(LIVE[cluster_serve.APP]) == 2, "another replica", 120)


@pytest.mark.parametrize(
    ("path", "end"),
    [
        ("/v1/chat/completions", b"data: [DONE]\n\n"),
        ("/v1/messages", b'event: error\ndata: {"type": "error", "error": {"type": "api_error"'),
        ("/v1/responses", b'event: error\ndata: {"type": "error", "code": "replica_lost"'),
        ("/api/chat", b'{"error": "gone"}\n'),
    ],
)
def test_a_broken_stream_ends_in_the_words_of_its_api(path: str, end: bytes) -> None:
    error = nanollama.WireError(502, "replica_lost", "gone")
    data = front.stream_error(path, error, b'data: {"sequence_number": 7}\n\n')
    assert end in data
    assert b'"gone"' in data
    assert b'"sequence_number": 8' in data or path != "/v1/responses"


def test_metrics_are_added_up() -> None:
    text = '# HELP a b\na{x="1"} 2.0\na_created{x="1"} 7.0\n'
    assert front.summed([text, text]) == '# HELP a b\na{x="1"} 4.0\na_created{x="1"} 7.0\n'


def test_an_application_is_updated_without_a_lost_request(started: int, model: Path) -> None:
    """As `serve run` does it, and then `serve deploy` with another model."""
    url = f"http://127.0.0.1:{started}"

    def run(alias: str) -> None:
        args = {"model": str(model), "kernels": "torch", "alias": alias, "any_model": True}
        serve.run(cluster_serve.app(args), name="updated", route_prefix="/")

    run("before")
    with httpx.Client(base_url=url, timeout=60) as http, ThreadPoolExecutor(1) as pool:
        events = http.post("/v1/chat/completions", json={**CHAT, "stream": True}).text
        assert events.endswith("data: [DONE]\n\n")
        update = pool.submit(run, "after")
        names = []
        while not update.done() or names[-1] != "after":
            answer = http.post("/v1/chat/completions", json=CHAT)
            assert answer.status_code == 200, answer.text
            names.append(answer.json()["model"])
        update.result()
    assert names[0] == "before"


def test_options_of_an_application_are_those_of_the_command_line() -> None:
    with pytest.raises(nanollama.UsageError, match=r"--ctx: invalid int value: 'many'"):
        cluster_serve.app({"model": "m", "ctx": "many"})
    given = {"model": ["a", "b"], "strict": True, "any_model": "false"}
    assert " ".join(cluster_serve.argv_of(given)) == "--serve --model=a --model=b --strict"


def test_a_replica_that_cannot_start_says_why() -> None:
    report = """The deployment failed to start 3 times in a row. Error:
    ray::ServeReplica:x (pid=1)
    raise RuntimeError(f"nanollama: {error}")
RuntimeError: nanollama: /m: no such model"""
    assert cluster_serve.ray_reason(RuntimeError(report)) == "/m: no such model"
    other = report.replace("RuntimeError: nanollama: /m", "ImportError: a")
    assert cluster_serve.ray_reason(RuntimeError(other)) == "ImportError: a: no such model"
    assert cluster_serve.ray_reason(RuntimeError("a\nb")) == "a"


def test_a_session_of_the_front_is_remembered(live: Live) -> None:
    headers = {"x-session-id": "mine"}
    before = live.http.get("/stats").json()["workers"]
    for i in range(4):
        body = {"messages": [{"role": "user", "content": f"{i}!"}], "max_tokens": 2}
        live.http.post("/v1/chat/completions", json=body, headers=headers)
    after = live.http.get("/stats").json()["workers"]
    grown = [b["prefill_tokens"] < a["prefill_tokens"] for b, a in zip(before, after)]
    assert sorted(grown) == [False, True]
    assert live.models.placement.holder(Beginning(), LIVE[cluster_serve.APP]) is None
