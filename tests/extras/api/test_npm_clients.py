"""Clients in JavaScript: Anthropic's SDK, and the AI SDK, which many programs use."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import npm
import pytest
from serving import serving

from nanollama import LLM, Delta, Handlers, Job, TestServer, WireError

pytestmark = pytest.mark.node

CALL: Any = {"name": "get_weather", "arguments": {"city": "Bern"}}
LOOK: Any = {"text": "Let me look. ", "tool_calls": [CALL]}
ROUND = (LOOK, "Bern is sunny.")


def test_anthropics_sdk() -> None:
    folder = npm.installed("@anthropic-ai/sdk@0.137")
    errors = {"error": 429}, {"error": 503}
    with TestServer("Sunny in Bern.", LOOK, *ROUND, *ROUND, *errors) as server:
        npm.run_script("anthropic.mjs", folder, server.url)


def test_the_ai_sdk(tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Handlers.watch

    async def breaking_off(self: Handlers, job: Job) -> AsyncIterator[list[Delta]]:
        async for deltas in watch(self, job):
            yield deltas
            if job.sequences[0].params.max_tokens == 7:
                raise WireError(500, "step_failed", "the model failed")

    monkeypatch.setattr(Handlers, "watch", breaking_off)
    folder = npm.installed("ai@7", "@ai-sdk/openai-compatible@3", "zod@4")
    call = {"tool_calls": [{**CALL, "name": "weather"}]}
    script = TestServer(call, "Bern is sunny.", call, "Bern is sunny.", {"error": 429})
    model = tiny(max_position_embeddings=1024)
    with script as scripted, serving(lambda: LLM(model), model_id="tiny") as live:
        npm.run_script("ai.mjs", folder, f"{live.url}/v1", scripted.base_url)
