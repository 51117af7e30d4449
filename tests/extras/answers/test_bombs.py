"""Chains, bombs and nestings in every field that is compiled, on every API of one server."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import hypothesis
import pytest
from hypothesis import strategies as st
from serving import Live, serving, wait_until

from nanollama import LLM

USER = [{"role": "user", "content": "hello"}]


@pytest.fixture(scope="module")
def live(tiny: Callable[..., Path]) -> Iterator[Live]:
    with serving(lambda: LLM(tiny(), parallel=4)) as live:
        yield live


# ---- bombs: of a size -> a schema, a regex or a grammar ------------------------------------------


def ref_chain(n: int) -> Any:
    links = {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(n)}
    return {"type": "object", "$ref": "#/$defs/d0", "$defs": {**links, f"d{n}": {"type": "null"}}}


def nested_arrays(n: int) -> Any:
    text = '{"items":' * n + "{}" + "}" * n
    return {"type": "object", "properties": {"a": text}} if n > 900 else json.loads(text)


def patterns(n: int) -> Any:
    return {"type": "object", "patternProperties": {f"^k{i}.*x{i}$": {} for i in range(n)}}


def multiples(n: int) -> Any:
    primes = [p for p in range(2, 999) if all(p % q for q in range(2, p))]
    return {"allOf": [{"type": "integer", "multipleOf": p} for p in primes[-(n % 9) :]]}


def many_choices(n: int) -> Any:
    part = [{"properties": {f"{name}": {"type": "string"}}} for name in "ab"]
    return {"type": "object", "allOf": [{"anyOf": part}] * (n % 12)}


def doubled_references(n: int) -> Any:
    links = {f"d{i}": {"allOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(n)}
    return {"type": "object", "$ref": "#/$defs/d0", "$defs": {**links, f"d{n}": {}}}


SCHEMAS = [ref_chain, nested_arrays, patterns, multiples, many_choices, doubled_references]
REGEXES: list[Callable[[int], str]] = [
    lambda n: "(" * (n % 8) + "a" + "){9}" * (n % 8),
    lambda n: "(" * n * 9,
    lambda n: rf"(.|\n)*[a-e](.|\n){{{n}}}",
    lambda n: "|".join(f"word{i}" for i in range(n)),
    lambda n: "a?" * n + "a" * n,
]
GRAMMARS: list[Callable[[int], str]] = [
    lambda n: "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(n)) + f'r{n}: "a"\n',
    lambda n: "start: R0\n" + "".join(f'R{i}: R{i + 1} "b"\n' for i in range(n)) + f'R{n}: "a"\n',
    lambda n: "root ::= r0\n" + "".join(f"r{i} ::= r{i + 1}\n" for i in range(n)) + f'r{n} ::= "a"',
    lambda n: "start: " + "(" * n + '"a"' + ")" * n,
    lambda n: "start: " + '"a"? ' * n,
    lambda n: f'start: b{{{n}}}\nb: c{{{n}}}\nc: "a"{{{n}}}\n',
    lambda n: "root ::= " + "(" * n + '"a"' + ")" * n,
    lambda n: f'start: %json {{"type": "array", "minItems": {n}}}\n',
]


def bodies(live: Live, kind: str, value: Any) -> list[tuple[str, dict[str, Any]]]:
    """A body for each API that takes such a value."""
    chat = {"messages": USER, "max_tokens": 3}
    text = {"prompt": "hello", "max_tokens": 3}
    if kind != "schema":
        field = {"structured_outputs": {kind: value}}
        return [("/v1/chat/completions", chat | field), ("/v1/completions", text | field)]
    function = {"name": "f", "parameters": {"type": "object", "properties": {"a": value}}}
    tools = [{"type": "function", "function": function}]
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}
    loose = {"type": "json_schema", "json_schema": {**form["json_schema"], "strict": False}}  # type: ignore[dict-item]
    answer = {"input": "hello", "max_output_tokens": 3}
    ollama = {"model": "model", "stream": False, "options": {"num_predict": 3}}
    named = {"type": "json_schema", "name": "x", "schema": value}
    return [
        ("/v1/chat/completions", {**chat, "response_format": form}),
        ("/v1/chat/completions", {**chat, "response_format": loose}),
        ("/v1/chat/completions", {**chat, "tools": tools}),
        ("/v1/completions", {**text, "guided_json": value}),
        ("/v1/responses", {**answer, "text": {"format": named}}),
        ("/v1/responses", {**answer, "tools": [{"type": "function", **function}]}),
        ("/api/chat", {**ollama, "messages": USER, "format": value}),
        ("/api/generate", {**ollama, "prompt": "hello", "format": value}),
    ]


def resident() -> int:
    """Memory of this process in bytes."""
    if sys.platform != "linux":
        return 0
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


KINDS = {"schema": SCHEMAS, "regex": REGEXES, "grammar": GRAMMARS}
BOMBS = [(kind, bomb) for kind, bombs in KINDS.items() for bomb in bombs]


def check_alive(live: Live) -> None:
    wait_until(live.is_idle)
    assert live.http.get("/health").status_code == 200
    answer = live.chat()
    assert answer.status_code == 200
    assert answer.json()["usage"]["completion_tokens"] > 0


@hypothesis.settings(
    max_examples=30,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)
@hypothesis.given(
    bomb=st.sampled_from(BOMBS), size=st.sampled_from([3, 70, 400, 5000]), index=st.integers(0, 7)
)
def test_no_schema_regex_or_grammar_takes_the_server_along(
    live: Live, bomb: tuple[str, Callable[[int], Any]], size: int, index: int
) -> None:
    kind, make = bomb
    offers = bodies(live, kind, make(size))
    path, body = offers[index % len(offers)]
    answer = live.http.post(path, json=body)
    assert answer.status_code in (200, 400), answer.text[:300]
    assert len(answer.text) < 5_000


def test_the_server_is_as_before_after_all_of_them(live: Live) -> None:
    check_alive(live)
    before = resident()
    for path, body in bodies(live, "schema", ref_chain(3000)):
        answer = live.http.post(path, json=body)
        assert answer.status_code == 400, path
        assert "chain" in answer.text
    deep = "[" * 50_000 + "]" * 50_000
    for field in ("messages", "tools", "chat_template_kwargs", "response_format"):
        text = f'{{"messages": {json.dumps(USER)}, "max_tokens": 2, "{field}": {deep}}}'
        answer = live.http.post("/v1/chat/completions", content=text)
        assert answer.status_code == 400, field
    check_alive(live)
    assert resident() - before < 200 << 20


def test_clients_that_hang_up_leave_the_others_alone(live: Live) -> None:
    """Schemas that take as long as they may, of clients that leave at once."""

    def slow(i: int) -> dict[str, Any]:
        names = {f"p{i}-{n}": {"type": "string"} for n in range(3000)}
        schema = {"type": "object", "properties": names, "additionalProperties": False}
        return {"messages": USER, "guided_json": schema}

    async def all_leave() -> None:
        async with httpx.AsyncClient(base_url=live.url, timeout=0.3) as http:
            posts = [http.post("/v1/chat/completions", json=slow(i)) for i in range(4)]
            await asyncio.gather(*posts, return_exceptions=True)

    asyncio.run(all_leave())
    assert live.http.get("/health").elapsed.total_seconds() < 5
    assert live.chat().status_code == 200
    wait_until(live.is_idle)
    assert live.chat(guided_regex="[a-c]{3}", max_tokens=9).status_code == 200
