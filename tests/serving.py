"""nanollama's server on a free port, in a thread of the test's process."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import httpx
import uvicorn

import nanollama


def wait_until(condition: Callable[[], Any], what: str = "it", timeout_s: float = 60) -> None:
    """Poll for something that another thread does. The limit only turns a hang into a failure."""
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen in {timeout_s} s"
        time.sleep(0.002)


def url_in(line: str) -> str:
    """The address in the first line of a server's log."""
    found = re.search(r"http://\S+", line)
    assert found, line
    return found[0]


@dataclass
class Live:
    """A running server: its address, its insides, and an HTTP client."""

    url: str
    models: nanollama.Models
    http: httpx.Client
    stop: Callable[[], None]  # as a signal would; the server's own end is waited for later
    failures: list[BaseException] = field(default_factory=list)

    def chat(self, content: str = "hello", **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": content}], "max_tokens": 8, **fields}
        return self.http.post("/v1/chat/completions", json=body)

    def text(self, prompt: Any = "hello", **fields: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"prompt": prompt, **fields})

    @property
    def pool(self) -> nanollama.Pool:
        """The only model, or the one asked for first."""
        return next(iter(self.models.pools.values()))

    def is_idle(self) -> bool:
        """Whether nothing of any request is left."""
        engines = [worker.llm.engine for worker in self.models.workers if worker.llm]
        return not any(
            [worker.jobs or worker.num_sequences for worker in self.models.workers]
            + [engine.has_work for engine in engines]
            + [len(e.scheduler.free) != len(e.scheduler.contents) for e in engines]
        )


@contextlib.contextmanager
def serving(
    *loaders: Callable[[], nanollama.LLM],
    ready: bool = True,
    sampling: Any = None,
    shutdown_s: int = 10,
    model_id: str = "model",
    models: nanollama.Models | None = None,
    **config: Any,
) -> Iterator[Live]:
    """A server with one replica for each loader, or with other models, until the block ends."""
    failures: list[BaseException] = []
    if models is None:
        source = nanollama.ModelSource(model_id, loaders[0], sampling or {})
        if len(loaders) > 1:
            shelf = nanollama.extra("api.shelf", "replicas")
            source = dataclasses.replace(shelf.as_served(source), replicas=loaders)
        shelf = nanollama.preferred("api.shelf", "Shelf", nanollama.Models)
        models = shelf({model_id: source}, nanollama.ServerConfig(**config))
    models.on_failure = failures.append
    app = nanollama.create_app(models)
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.bind(("127.0.0.1", 0))
    listener.listen()
    settings = uvicorn.Config(
        app,
        proxy_headers=False,
        **nanollama.preferred("api.limits", "CONNECTIONS", {}),
        timeout_keep_alive=models.config.idle_s,
        log_config=None,
        timeout_graceful_shutdown=shutdown_s,
    )
    server = uvicorn.Server(settings)

    def stop() -> None:
        server.should_exit = True

    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    with httpx.Client(base_url=url, timeout=60) as http:
        try:
            wait_until(lambda: server.started, "start-up")
            if ready:
                wait_until(lambda: models.ready or failures, "loading")
            yield Live(url, models, http, stop, failures)
        finally:
            stop()
            thread.join()
