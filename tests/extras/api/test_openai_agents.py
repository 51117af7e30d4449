"""OpenAI's Agents SDK, with its models of chat completions and of responses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import agents
import openai
import pydantic
import pytest
from serving import serving

from nanollama import LLM, TestServer

CALL: Any = {"name": "get_weather", "arguments": {"city": "Bern"}}
MODELS = {"chat": agents.OpenAIChatCompletionsModel, "responses": agents.OpenAIResponsesModel}


@agents.function_tool
def get_weather(city: str) -> str:
    """The weather in a city."""
    return f"{city}: sunny"


@pytest.fixture(autouse=True)
def _no_traces() -> None:
    """They would go to OpenAI."""
    agents.set_tracing_disabled(True)


def agent(kind: str, base_url: str, **fields: Any) -> agents.Agent:
    client = openai.AsyncOpenAI(base_url=base_url, api_key="any", max_retries=0)
    model: Any = MODELS[kind](model="tiny", openai_client=client)
    return agents.Agent(name="Guide", instructions="Be brief.", model=model, **fields)


@pytest.mark.parametrize("kind", MODELS)
def test_a_tool_is_called_and_its_result_goes_back(kind: str, test_server: TestServer) -> None:
    test_server.answers({"text": "Let me look. ", "tool_calls": [CALL]}, "Bern is sunny.")
    guide = agent(kind, test_server.base_url, tools=[get_weather])
    result = agents.Runner.run_sync(guide, "How is it in Bern?")
    assert result.final_output == "Bern is sunny."
    (output,) = [i.output for i in result.new_items if isinstance(i, agents.ToolCallOutputItem)]
    assert output == "Bern: sunny"
    assert "Bern: sunny" in str(test_server.requests[-1]["body"])
    assert len(test_server.requests) == 2


@pytest.mark.parametrize("kind", MODELS)
async def test_the_same_in_a_stream(kind: str, test_server: TestServer) -> None:
    test_server.answers({"text": "Let me look. ", "tool_calls": [CALL]}, "Bern is sunny.")
    guide = agent(kind, test_server.base_url, tools=[get_weather])
    result = agents.Runner.run_streamed(guide, "How is it in Bern?")
    events = [event async for event in result.stream_events()]
    raw = [event.data for event in events if event.type == "raw_response_event"]
    deltas = [event.delta for event in raw if event.type == "response.output_text.delta"]
    assert "".join(deltas) == "Let me look. Bern is sunny."
    assert result.final_output == "Bern is sunny."


class Place(pydantic.BaseModel):
    visited: bool
    rank: Literal["low", "high"]


def test_an_answer_in_a_form(tiny: Callable[..., Path]) -> None:
    with serving(lambda: LLM(tiny(max_position_embeddings=1024)), model_id="tiny") as live:
        for kind in MODELS:
            guide = agent(kind, f"{live.url}/v1", output_type=Place)
            assert isinstance(agents.Runner.run_sync(guide, "Go.").final_output, Place)
