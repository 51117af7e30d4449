"""instructor and litellm, which need openai before 3 and so run in an environment of their own:
NANOLLAMA_OLD_CLIENTS names its Python (`.ci/run` makes one)."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from serving import Live, serving

import nanollama

PYTHON = os.environ.get("NANOLLAMA_OLD_CLIENTS", "")
pytestmark = [pytest.mark.skipif(not PYTHON, reason="NANOLLAMA_OLD_CLIENTS is not set")]
OPEN = {"top_k": 0, "top_p": 1.0, "repeat_penalty": 1.0, "temperature": 1.0, "seed": 1}


@pytest.fixture(scope="module")
def live(tiny: Callable[..., Path]) -> Iterator[Live]:
    path = tiny(max_position_embeddings=2048)
    with serving(lambda: nanollama.LLM(path), model_id="tiny", sampling=OPEN) as live:
        yield live


def run(live: Live, script: str) -> Any:
    """What a script prints as JSON in its last line."""
    done = subprocess.run(
        [PYTHON, "-c", script, f"{live.url}/v1"],
        env={**os.environ, "LITELLM_LOCAL_MODEL_COST_MAP": "True", "OPENAI_API_KEY": "any"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


INSTRUCTOR = """
import json, sys
import instructor, openai, pydantic
from typing import Literal

class User(pydantic.BaseModel):
    name: Literal["Ann", "Bob"]
    age: int = pydantic.Field(ge=0, le=120)

plain = openai.OpenAI(base_url=sys.argv[1], max_retries=0)
messages = [{"role": "user", "content": "Ann is 30."}]
found = {}
for mode in ("TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"):
    client = instructor.from_openai(plain, mode=instructor.Mode[mode])
    ask = dict(model="tiny", messages=messages, max_retries=0)
    user = client.chat.completions.create(response_model=User, **ask)
    *_, last = client.chat.completions.create_partial(response_model=User, **ask)
    found[mode] = [user.model_dump(), last.model_dump()]
print(json.dumps(found))
"""


def test_instructor(live: Live) -> None:
    found = run(live, INSTRUCTOR)
    assert found.keys() == {"TOOLS", "TOOLS_STRICT", "JSON_SCHEMA"}
    for whole, partial in found.values():
        for user in (whole, partial):
            assert user["name"] in ("Ann", "Bob")
            assert 0 <= user["age"] <= 120


LITELLM = """
import asyncio, json, sys
import litellm, pydantic

class Point(pydantic.BaseModel):
    x: bool

tool = {"type": "function", "function": {"name": "move", "parameters": Point.model_json_schema()}}
ask = dict(model="openai/tiny", api_base=sys.argv[1], api_key="any", num_retries=0, max_tokens=200)
ask["messages"] = [{"role": "user", "content": "Go."}]
calls = dict(tools=[tool], tool_choice="required", parallel_tool_calls=False)
found = {}
found["text"] = litellm.completion(**ask).choices[0].message.content
found["parsed"] = litellm.completion(**ask, response_format=Point).choices[0].message.content
found["reason"] = litellm.completion(**ask, **calls).choices[0].finish_reason
chunks = list(litellm.completion(**ask, **calls, stream=True))
whole = litellm.stream_chunk_builder(chunks)
found["call"] = whole.choices[0].message.tool_calls[0].function.model_dump()
later = asyncio.run(litellm.acompletion(**ask))
found["async"] = later.choices[0].message.content
found["usage"] = later.usage.model_dump()
print(json.dumps(found))
"""


def test_litellm(live: Live) -> None:
    found = run(live, LITELLM)
    assert found["text"] == found["async"] != ""
    assert isinstance(json.loads(found["parsed"])["x"], bool)
    assert found["reason"] == "tool_calls"
    assert found["call"]["name"] == "move"
    assert isinstance(json.loads(found["call"]["arguments"])["x"], bool)
    assert 0 < found["usage"]["completion_tokens"] <= 200
