"""Every route of /openapi.json, fuzzed: no 5xx, no hang, errors in the words of their API."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import schemathesis
from hypothesis import strategies as st
from schemathesis.core import NOT_SET
from serving import Live, serving

import nanollama
from nanollama_extras.api.inspect import all_routes, openapi_body
from nanollama_extras.api.ollama import OLLAMA_OPTIONS
from nanollama_extras.api.shelf import Library, ServedModel, Shelf

EXAMPLES = hypothesis.settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Empty caches, and a hub that is not there."""
    place = tmp_path_factory.mktemp("fuzz")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOLLAMA_CACHE", str(place))
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(place / "hub"))
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        yield place


@pytest.fixture(scope="module")
def fixed(tiny: Callable[..., Path]) -> Iterator[Live]:
    with serving(lambda: nanollama.LLM(tiny(), parallel=4), any_model=True) as live:
        yield live


@pytest.fixture(scope="module")
def free(place: Path, tiny: Callable[..., Path]) -> Iterator[Live]:
    """A server that may pull, create and delete."""
    source = ServedModel("tiny", lambda: nanollama.LLM(tiny(), parallel=4))
    library = Library({"tiny": source}.get, lambda: ["tiny"])
    with serving(models=Shelf({}, library=library)) as live:
        yield live


OPERATIONS = [
    (method.upper(), path) for path, place in openapi_body()["paths"].items() for method in place
]


@pytest.fixture(scope="module")
def schema() -> Any:
    return schemathesis.openapi.from_dict(openapi_body())


def test_every_route_is_described() -> None:
    listed = {name.replace(":path", "") for route in all_routes() for name in route.names}
    assert {f"{method} {path}" for method, path in OPERATIONS} == listed


def test_the_description_is_served_and_valid(fixed: Live, schema: Any) -> None:
    assert fixed.http.get("/openapi.json").json() == openapi_body()
    schema.validate()


def send(live: Live, method: str, path: str, body: Any) -> None:
    """One request; whatever it asks for, the answer is in time and no internal error."""
    if isinstance(body, dict):  # long answers are not what is looked for
        if path == "/api/chat" or path == "/api/generate":
            options = body.get("options")
            if isinstance(options, dict) or options is None:
                body = {**body, "options": {**(options or {}), "num_predict": 2}}
        elif path != "/chat/completions":
            body = {"max_tokens": 2, "max_output_tokens": 2, **body}
            for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
                if isinstance(body.get(name), int) and not 0 <= body[name] <= 4:
                    body[name] = 2
        else:
            body = {**body, "max_tokens": 2}
    data = None if body is None else json.dumps(body)
    response = live.http.request(method, path, content=data, timeout=30)
    assert response.status_code < 500, (response.status_code, response.text)
    assert "internal_error" not in response.text
    assert "internal error" not in response.text
    if response.status_code >= 400 and method.lower() != "head":
        error = response.json()["error"]
        assert isinstance(error, str) if path.startswith("/api/") else set(error) >= {"message"}
        assert "\n" not in (error if isinstance(error, str) else error["message"])


@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_no_request_is_an_internal_error(
    fixed: Live, free: Live, schema: Any, method: str, path: str
) -> None:
    operation = schema[path][method]
    live = free if path.startswith("/api/") else fixed

    @EXAMPLES
    @hypothesis.given(case=operation.as_strategy())
    def fuzz(case: Any) -> None:
        where = case.formatted_path
        body = case.body if case.body is not NOT_SET else None
        send(live, method, where, body)

    fuzz()


TEXT = st.sampled_from(["hello", "", "tiny", "-1", "json", "\ud800", "org/x", "5m", "<|im_end|>"])
SMALL = st.none() | st.booleans() | st.integers(-2, 3) | st.floats(-1, 2) | TEXT
MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "tool", "system", "x"]), "content": TEXT},
    optional={"tool_calls": st.lists(SMALL | st.just({"function": {"name": "f"}}), max_size=2)},
)
VALUES = {
    "model": st.sampled_from(["tiny", "tiny:latest", "none"]),
    "messages": st.lists(MESSAGE | SMALL, max_size=2),
    "input": TEXT | st.lists(MESSAGE | SMALL, max_size=2),
    "prompt": TEXT | st.lists(SMALL, max_size=2),
    "options": st.dictionaries(st.sampled_from([*OLLAMA_OPTIONS, "mirostat"]), SMALL),
    "tools": st.lists(
        SMALL | st.just({"type": "function", "name": "f", "function": {"name": "f"}}), max_size=2
    ),
    "parameters": st.dictionaries(st.sampled_from(["temperature", "stop", "num_ctx"]), SMALL),
    "stream": st.booleans(),
    "from": st.sampled_from(["tiny", "none", "../x"]),
}


@pytest.mark.parametrize(("method", "path"), [o for o in OPERATIONS if o[0] != "GET"])
def test_no_body_that_is_nearly_right_is_an_internal_error(
    fixed: Live, free: Live, method: str, path: str
) -> None:
    route = (
        next(r for r in all_routes() if f"{method} {path}" in r.names) if "{" not in path else None
    )
    if route is None or route.fields is None:
        pytest.skip("takes no body")
    live = free if path.startswith("/api/") else fixed
    fields = {name: VALUES.get(name, SMALL) for name in route.fields}
    needed = {name: fields.pop(name) for name in route.required}

    @hypothesis.settings(EXAMPLES, max_examples=25)
    @hypothesis.given(st.fixed_dictionaries(needed, optional=fields))
    def fuzz(body: dict[str, Any]) -> None:
        send(live, method, path, body)

    fuzz()
