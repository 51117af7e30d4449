"""Metrics for Prometheus: GET /metrics.

Seam       an `Observer`, which the server tells of its work, and a dialect: a row of
           `nanollama.DIALECTS`.
Remove     delete this file and its row; the server then observes nothing.
Spec       https://prometheus.io/docs/instrumenting/exposition_formats
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import prometheus_client
from starlette.responses import Response

from nanollama import Handlers, Observer, Route

if TYPE_CHECKING:
    from starlette.requests import Request

    from nanollama import EngineWorker, Usage

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics(Observer):
    """Counters and gauges of a server, and their text."""

    def __init__(self) -> None:
        self.registry = prometheus_client.CollectorRegistry()

        def make(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            return kind(f"nanollama_{name}", text, labels, registry=self.registry, **options)

        counter, gauge = prometheus_client.Counter, prometheus_client.Gauge
        self.requests = make(counter, "requests", "HTTP requests", "route", "status")
        self.prompt_tokens = make(counter, "prompt_tokens", "Prompt tokens, cached ones included")
        self.cached_tokens = make(counter, "cached_tokens", "Prompt tokens found in the cache")
        self.generated_tokens = make(counter, "generated_tokens", "Tokens generated")
        self.drafted_tokens = make(
            counter, "drafted_tokens", "Tokens guessed, by lookup or a draft model"
        )
        self.accepted_tokens = make(counter, "accepted_tokens", "Guesses that came true")
        self.running = make(gauge, "running_sequences", "Sequences in the batch")
        self.waiting = make(gauge, "waiting_sequences", "Sequences in the queue")
        self.kv_bytes = make(gauge, "kv_cache_bytes", "Memory of keys and values")
        histogram = functools.partial(make, prometheus_client.Histogram, buckets=SECONDS)
        text = "From submission to the first token"
        self.first_token_s = histogram("time_to_first_token_seconds", text)
        text = "Mean time of a sequence's tokens after the first"
        self.per_token_s = histogram("time_per_output_token_seconds", text)

    def count_request(self, route: str, status: int) -> None:
        self.requests.labels(route, str(status)).inc()

    def count_usage(self, usage: Usage) -> None:
        self.prompt_tokens.inc(usage.prompt_tokens)
        self.cached_tokens.inc(usage.cached_tokens)
        self.generated_tokens.inc(usage.completion_tokens)
        self.drafted_tokens.inc(usage.drafted_tokens)
        self.accepted_tokens.inc(usage.accepted_tokens)
        self.first_token_s.observe(usage.queue_s + usage.prefill_s)
        if usage.completion_tokens > 1:
            self.per_token_s.observe(usage.decode_s / (usage.completion_tokens - 1))

    def render(self, workers: list[EngineWorker]) -> bytes:
        """The text of /metrics."""
        engines = [worker.llm.engine for worker in workers if worker.llm is not None]
        self.running.set(sum(len(engine.scheduler.running) for engine in engines))
        self.waiting.set(sum(len(engine.scheduler.waiting) for engine in engines))
        self.kv_bytes.set(sum(engine.cache.nbytes for engine in engines))
        return prometheus_client.generate_latest(self.registry)


class API(Handlers):
    """The route that Prometheus reads."""

    async def prometheus(self, request: Request) -> Response:
        """GET /metrics"""
        observer: Any = self.observer  # Metrics, perhaps behind that of the log
        text = observer.render(self.models.workers)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    routes = (Route(prometheus, ("GET /metrics",)),)
