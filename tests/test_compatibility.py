"""The comparison with other servers in docs/serving.md: each row is true of this one."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import vision_models
from pages import codes, table
from puppets import write
from serving import Live, serving

import nanollama
from nanollama_extras.answers.fim import MARKS
from nanollama_extras.answers.guides import GUIDES
from nanollama_extras.api import anthropic as anthropic_api
from nanollama_extras.api import infill as infill_api
from nanollama_extras.api import ollama as ollama_api
from nanollama_extras.api import ollama_models
from nanollama_extras.api import rerank as rerank_api
from nanollama_extras.api.shelf import Library, ServedModel, Shelf

USER = [{"role": "user", "content": "hello"}]
SCHEMA = {
    "type": "object",
    "properties": {"a": {"type": "boolean"}},
    "required": ["a"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMA}}
TOOL = {"type": "function", "function": {"name": "f", "parameters": SCHEMA}}
PNG = "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAIAAACQd1PeAAAADElEQVR4nGP4z8AAAAMBAQDJ/pLvAAAAAElFTkSuQmCC"


@pytest.fixture(scope="module")
def live(tiny: Callable[..., Path]) -> Iterator[Live]:
    model = tiny(max_position_embeddings=1024)
    sources = {
        name: ServedModel(name, lambda: nanollama.LLM(model, parallel=4)) for name in ("one", "two")
    }
    with serving(models=Shelf({}, library=Library(sources.get, lambda: list(sources)))) as live:
        yield live


def post(live: Live, path: str, **body: Any) -> Any:
    response = live.http.post(path, json={"model": "one", **body})
    assert response.status_code == 200, response.text
    return response.json()


def said(live: Live, **fields: Any) -> str:
    body = {"messages": USER, "max_tokens": 40, **fields}
    return str(post(live, "/v1/chat/completions", **body)["choices"][0]["message"]["content"])


def refused(response: httpx.Response) -> bool:
    return response.status_code in (400, 404)


def three_endpoints(live: Live) -> bool:
    post(live, "/v1/completions", prompt="a", max_tokens=1)
    return bool(said(live, max_tokens=1) is not None and post(live, "/v1/embeddings", input="a"))


def goes_on(live: Live) -> bool:
    first = post(live, "/v1/responses", input="a", max_output_tokens=2)
    more = {"input": "b", "max_output_tokens": 2, "previous_response_id": first["id"]}
    return bool(post(live, "/v1/responses", **more)["usage"]["input_tokens"] > 10)


def ollama(live: Live) -> bool:
    body = {"stream": False, "options": {"num_predict": 2}}
    assert post(live, "/api/chat", messages=USER, **body)["done"]
    assert (
        live.http.post("/api/pull", json={"model": "no such", "stream": False}).status_code == 404
    )
    return bool(post(live, "/api/generate", prompt="a", **body)["done"])


def ordinary_sampling(live: Live) -> bool:
    fields = {"temperature": 1.5, "top_p": 1, "top_k": 0, "seed": 7}
    assert said(live, **fields) == said(live, **fields) != said(live, **{**fields, "seed": 8})
    assert said(live, **{**fields, "top_p": 0.0001}) == said(live, **{**fields, "temperature": 0})
    text = said(live, **fields)
    return said(live, **fields, stop=text[-1]) != text


def other_sampling(live: Live) -> bool:
    greedy = said(live, temperature=0)
    return said(live, temperature=2, seed=3, top_k=1) == greedy and (
        said(live, temperature=2, seed=3, min_p=1, top_k=0, top_p=1) == greedy
    )


def choices(live: Live) -> bool:
    return len(post(live, "/v1/chat/completions", messages=USER, n=3, max_tokens=1)["choices"]) == 3


def bias(live: Live) -> bool:
    ids = post(live, "/tokenize", prompt="x", add_special_tokens=False)["tokens"]
    return said(live, logit_bias={str(ids[0]): 100}, max_tokens=3, repeat_penalty=1) == "xxx"


def logprobs(live: Live) -> bool:
    body = {"messages": USER, "max_tokens": 2, "logprobs": True, "top_logprobs": 3}
    entries = post(live, "/v1/chat/completions", **body)["choices"][0]["logprobs"]["content"]
    return all(len(entry["top_logprobs"]) == 3 for entry in entries)


def echo(live: Live) -> bool:
    body = {"prompt": "hello", "echo": True, "logprobs": 1, "max_tokens": 1}
    choice = post(live, "/v1/completions", **body)["choices"][0]
    return bool(choice["text"].startswith("hello") and choice["logprobs"]["token_logprobs"][1] < 0)


def usage_in_stream(live: Live) -> bool:
    body = {"model": "one", "messages": USER, "max_tokens": 1, "stream": True}
    options = {"stream_options": {"include_usage": True}}
    lines = live.http.post("/v1/chat/completions", json={**body, **options}).text.split("\n\n")
    return bool(json.loads(lines[-3][6:])["usage"]["total_tokens"])


def schema(live: Live) -> bool:
    return set(json.loads(said(live, response_format=FORMAT))) == {"a"}


def vllm_forms(live: Live) -> bool:
    assert said(live, structured_outputs={"choice": ["left", "right"]}) in ("left", "right")
    assert said(live, structured_outputs={"grammar": 'start: "yes"'}) == "yes"
    return said(live, structured_outputs={"regex": "[0-9]{3}"}).isdigit()


def llama_forms(live: Live) -> bool:
    assert said(live, grammar='root ::= "yes"') == "yes"
    return set(json.loads(said(live, json_schema=SCHEMA))) == {"a"}


def calls(live: Live, **fields: Any) -> list[Any]:
    body = {"messages": USER, "tools": [TOOL], "max_tokens": 400, "seed": 1, **fields}
    message = post(live, "/v1/chat/completions", **body)["choices"][0]["message"]
    return [json.loads(c["function"]["arguments"])["a"] for c in message.get("tool_calls") or []]


def one_call(live: Live) -> bool:
    found = [calls(live, tool_choice="required", parallel_tool_calls=False, seed=i) for i in (1, 2)]
    return [len(one) for one in found] == [1, 1]


def short_vectors(live: Live) -> bool:
    data = post(live, "/v1/embeddings", input="a", dimensions=8)["data"]
    return len(data[0]["embedding"]) == 8


def on_demand(live: Live) -> bool:
    post(live, "/v1/completions", model="two", prompt="a", max_tokens=1)
    models = live.http.get("/v1/models").json()["data"]
    return {model["id"]: model["state"] for model in models}["two"] == "loaded"


def pulls_and_deletes(live: Live) -> bool:
    pull = live.http.post("/api/pull", json={"model": "no such", "stream": False})
    delete = live.http.request("DELETE", "/api/delete", json={"model": "no such"})
    return (pull.status_code, delete.status_code) == (404, 404)  # test_ollama does it for models


def alone_and_together(live: Live) -> bool:
    fields = {"temperature": 1, "seed": 5, "ignore_eos": True}
    alone = said(live, **fields)
    with ThreadPoolExecutor(4) as threads:
        return {alone} == set(threads.map(lambda _: said(live, **fields), range(4)))


def tokens(live: Live) -> bool:
    ids = post(live, "/tokenize", prompt="hello")["tokens"]
    return post(live, "/detokenize", tokens=ids)["prompt"] == "hello"


def unknown_fields(live: Live) -> bool:
    body = {"model": "one", "messages": USER, "max_tokens": 1, "colour": "red"}
    response = live.http.post("/v1/chat/completions", json=body)
    return response.headers["x-nanollama-ignored"] == "colour"


def scripted(live: Live) -> bool:
    with nanollama.TestServer("as the script says") as server:
        answer = httpx.post(f"{server.base_url}/chat/completions", json={"messages": USER})
        return bool(answer.json()["choices"][0]["message"]["content"] == "as the script says")


def images(live: Live) -> bool:
    part = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{PNG}"}}
    body = {"messages": [{"role": "user", "content": [part]}], "max_tokens": 1}
    with tempfile.TemporaryDirectory() as folder:
        llm = nanollama.LLM(vision_models.save(Path(folder), "smolvlm"))
        with serving(lambda: llm) as other:
            return not refused(other.http.post("/v1/chat/completions", json=body))


def coder(path: str, **body: Any) -> Any:
    """The answer of a model with tokens for a gap."""
    with tempfile.TemporaryDirectory() as folder:
        llm = nanollama.LLM(write(Path(folder), [MARKS[0].middle, "x"], control=MARKS[0]))
        with serving(lambda: llm) as live:
            return live.http.post(path, json=body).json()


def reranking(live: Live) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        path = write(Path(folder), ["x"])
        (path / "modules.json").write_text('[{"type": "LogitScore", "path": "1_LogitScore"}]')
        (path / "1_LogitScore").mkdir()
        (path / "1_LogitScore" / "config.json").write_text('{"true_token_id": 65}')
        llm, body = nanollama.LLM(path), {"query": "a", "documents": ["b", "c"]}
        with serving(lambda: llm) as other:
            results = other.http.post("/v1/rerank", json=body).json()["results"]
    return [row["index"] for row in results] == [0, 1]


def suffix(live: Live) -> bool:
    answer = coder("/v1/completions", prompt="a", suffix="b", temperature=0)
    return bool(answer["choices"][0]["text"] == "x")


def infill(live: Live) -> bool:
    answer = coder("/infill", input_prefix="a", input_suffix="b", temperature=0)
    return bool(answer["content"] == "x")


CHECKS: dict[str, Callable[[Live], bool]] = {
    "`/v1/chat/completions`, `/v1/completions`, `/v1/embeddings`": three_endpoints,
    "`/v1/responses`": lambda live: bool(post(live, "/v1/responses", input="a")["output"]),
    "`previous_response_id`": goes_on,
    "Anthropic's `/v1/messages`": lambda live: bool(
        post(live, "/v1/messages", messages=USER, max_tokens=2)["content"]
    ),
    "Ollama's `/api/chat`, `/api/generate`, `/api/pull`": ollama,
    "reranking": reranking,
    "images in messages": images,
    "`seed`, `stop`, `temperature`, `top_p`": ordinary_sampling,
    "`top_k`, `min_p` in OpenAI's API": other_sampling,
    "`n`": choices,
    "`logit_bias`": bias,
    "`logprobs`, `top_logprobs`": logprobs,
    "`echo` with `logprobs`": echo,
    "`suffix`": suffix,
    "`/infill`": infill,
    "`stream_options.include_usage`": usage_in_stream,
    "`response_format` with a JSON Schema": schema,
    "`structured_outputs` (regex, choice, grammar)": vllm_forms,
    "`grammar`, `json_schema` beside the messages": llama_forms,
    "`tools`": lambda live: isinstance(calls(live), list),
    "`tool_choice`": lambda live: bool(calls(live, tool_choice="required")),
    "`parallel_tool_calls: false`": one_call,
    "`dimensions` of embeddings": short_vectors,
    "models loaded when a request names them": on_demand,
    "pulling and deleting models over HTTP": pulls_and_deletes,
    "the same text alone and in a batch": alone_and_together,
    "`/tokenize`, `/detokenize`": tokens,
    "`/metrics`": lambda live: "nanollama_requests_total" in live.http.get("/metrics").text,
    "unknown fields named in the answer": unknown_fields,
    "answers from a script, for tests": scripted,
}
ROWS = {row[0]: row[1] for row in table("Beside other servers")}


def test_every_row_has_a_check() -> None:
    assert list(ROWS) == list(CHECKS)


@pytest.mark.parametrize("row", ROWS)
def test_a_row_is_true_of_this_server(live: Live, row: str) -> None:
    assert CHECKS[row](live) == (ROWS[row] == "yes")


def names(heading: str) -> set[str]:
    """The fields that a table of the documentation lists, without places inside them."""
    found = {code for row in table(heading) for code in codes(row[0])}
    return {code.partition(".")[0] for code in found if "/" not in code and "*" not in code}


def test_the_table_of_ollamas_fields_is_the_codes() -> None:
    tables = [route.fields for route in ollama_api.API.routes]
    known = {name for fields in tables for name in fields or {}}
    own = {"name", "verbose", "insecure", "source", "destination", "prompt"}  # other names, extras
    listed = names("Ollama's API")
    assert known - own <= listed
    assert listed <= known | set(ollama_models.OLLAMA_NEUTRAL)
    (options,) = [row[1] for row in table("Ollama's API") if row[0] == "`options`"]
    honoured = set(codes(options.partition(" are honoured")[0]))
    assert honoured == set(ollama_api.OLLAMA_OPTIONS) - {"ignore_eos", "max_tokens"}


def test_the_table_of_anthropics_fields_is_the_codes() -> None:
    known = {name for route in anthropic_api.API.routes for name in route.fields or {}}
    assert names("Anthropic's API") == known


def test_the_table_of_infills_fields_is_the_codes() -> None:
    known = {name for route in infill_api.API.routes for name in route.fields or {}}
    assert names("Filling in the middle") == known


def test_the_table_of_rerankings_fields_is_the_codes() -> None:
    assert names("Reranking") == {*rerank_api.FIELDS}


def test_the_fields_of_openais_table_are_known() -> None:
    known = {
        *nanollama.CHAT_FIELDS,
        *nanollama.TEXT_FIELDS,
        *nanollama.HARMLESS,
        *nanollama.NEUTRAL,
    }
    assert names("Compatibility with OpenAI's API") <= known
    assert known - names("Compatibility with OpenAI's API") <= {
        "model",
        "modalities",
        "add_generation_prompt",
        *GUIDES,
        *(name for name in nanollama.HARMLESS if name.startswith("prompt_cache_")),
    }
