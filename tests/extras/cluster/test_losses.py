"""Replicas that come and go while clients read: Ray kills nothing here, the tests do."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from replicas import CHAT, ENDLESS, parents, replica_pids, run_stream, settings_for, text_of
from serving import Live, serving, wait_until

import nanollama

pytest.importorskip("ray", reason="Ray is not installed")
pytest.importorskip("ray.serve")

from ray import serve

from nanollama_extras.cluster import serve as cluster_serve
from nanollama_extras.cluster.placement import LIVE

pytestmark = pytest.mark.ray
CLIENTS = 32
BODIES = [
    {"messages": [{"role": "user", "content": f"tell {i}"}], "seed": i, "max_tokens": 40 + i}
    for i in range(CLIENTS)
]
FAST = {"upscale_delay_s": 0, "downscale_delay_s": 0, "metrics_interval_s": 0.2}
FAST |= {"look_back_period_s": 1}


@pytest.fixture(scope="module")
def model(tiny: Callable[..., Path]) -> Path:
    return tiny("Llama", max_position_embeddings=4096)


@pytest.fixture(scope="module")
def texts(model: Path) -> list[str]:
    """What one process answers to BODIES."""
    llm = nanollama.LLM(model)
    with (
        serving(lambda: llm, model_id="tiny", sampling={"logit_bias": ENDLESS}) as live,
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        answers = list(pool.map(lambda body: live.http.post(CHAT, json=body).json(), BODIES))
    return [answer["choices"][0]["message"]["content"] for answer in answers]


@contextlib.contextmanager
def replicated(model: Path, *options: str) -> Iterator[Live]:
    """A front with replicas."""
    settings = settings_for(model, *options)
    try:
        with serving(models=cluster_serve.open_front(settings, nanollama.ServerConfig())) as live:
            live.models.disconnect = lambda: None  # other tests go on
            yield live
    finally:
        serve.shutdown()


@pytest.fixture(scope="module")
def nodes(ray_cluster: Any) -> Iterator[Any]:
    """The second node of a cluster, with room for one replica."""
    node = ray_cluster.add_node(num_cpus=1, object_store_memory=80 * 1024 * 1024)
    yield node
    if node in ray_cluster.worker_nodes:
        ray_cluster.remove_node(node)


@pytest.fixture(scope="module")
def live(nodes: Any, model: Path) -> Iterator[Live]:
    """A front with two replicas of four places each, and room for all clients to wait."""
    with replicated(model, "--replicas", "2", "--parallel", "4") as live:
        wait_until(lambda: len(live.models.placement.replicas()) == 2, "two replicas")
        yield live


def on_node(pid: int, node: Any) -> bool:
    """Whether a process is of a node of the cluster."""
    raylets = node.all_processes["raylet"]
    return any(info.process.pid in parents(pid) for info in raylets)


def check_streams(live: Live, texts: list[str], kill: Callable[[], None]) -> None:
    """All clients stream while something is killed: each gets its whole text, or an error after a
    part of it if its stream had begun."""
    begun = threading.Semaphore(0)

    def talk(body: Any) -> list[Any]:
        return run_stream(live, CHAT, {**body, "stream": True}, begun.release)

    lost = live.models.num_lost
    with ThreadPoolExecutor(CLIENTS) as pool:
        answers = [pool.submit(talk, body) for body in BODIES]
        for _ in range(6):  # some have begun; 24 or more wait
            begun.acquire()
        kill()
        streams = [answer.result() for answer in answers]
    broken = [stream for stream in streams if "error" in stream[-1]]
    for stream, text in zip(streams, texts):
        assert all(event.get("choices") for event in stream[:-1])
        if stream in broken:
            assert text.startswith(text_of(stream[:-1]))
            assert stream[-1]["error"]["code"] == "replica_lost"
        else:
            assert text_of(stream) == text
            assert stream[-1]["choices"][0]["finish_reason"] == "length"
    assert len(broken) <= 4  # the places of one replica
    assert live.models.num_lost > lost  # others were waiting there


def test_a_node_that_is_killed_loses_streams_that_had_begun(
    live: Live, texts: list[str], nodes: Any, ray_cluster: Any
) -> None:
    assert [on_node(pid, nodes) for pid in replica_pids(cluster_serve.APP)].count(True) == 1
    check_streams(live, texts, lambda: ray_cluster.remove_node(nodes, allow_graceful=False))
    wait_until(lambda: len(live.models.placement.replicas()) == 2, "another replica", 120)


def test_a_replica_that_is_killed_loses_streams_that_had_begun(
    live: Live, texts: list[str]
) -> None:
    pid, *_ = replica_pids(cluster_serve.APP)
    check_streams(live, texts, lambda: os.kill(pid, signal.SIGKILL))


def test_replicas_come_under_load_and_go_after_it(
    ray_address: str, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster_serve, "SCALING", FAST)
    monkeypatch.setattr(cluster_serve, "APP", "scaled")
    body = {"messages": [], "stream": True, "max_tokens": 3000}
    with replicated(model, "--replicas", "1:2", "--parallel", "2") as live:
        replicas = live.models.placement.replicas
        assert len(replicas()) == 1
        with contextlib.ExitStack() as streams:
            for i in range(5):
                body["messages"] = [{"role": "user", "content": str(i)}]
                request = live.http.stream("POST", CHAT, json=body)
                assert streams.enter_context(request).status_code == 200
            wait_until(lambda: len(replicas()) == 2, "a second replica", 120)
            assert live.chat("more").is_success
        wait_until(lambda: len(replicas()) == 1, "the end of a replica", 120)
        assert live.chat("more").is_success
        assert len(LIVE["scaled"]) == 1
