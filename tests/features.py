"""One use of each feature, with the modules of nanollama_extras that it needs.

Run as a program with the directory of a small model, it uses each feature and prints the outcomes
as JSON."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from serving import serving

import nanollama
from nanollama import LLM, GenerationRequest, NanollamaError, SamplingParams

USER = [{"role": "user", "content": "hello"}]
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
SHORT = SamplingParams(seed=1, max_tokens=4)
MISSING = re.compile(r"needs nanollama_extras\.([\w.]+), which is not installed")


def command(*argv: object) -> Callable[[LLM], None]:
    """A use of the command line; MODEL stands for the model's directory."""

    def run(llm: LLM) -> None:
        path = str(llm.checkpoint.path)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
            assert nanollama.run([path if word == "MODEL" else str(word) for word in argv]) == 0

    return run


def request(method: str, path: str, body: Any = None, **changed: Any) -> Callable[[LLM], None]:
    """A request to a server of the model."""

    def run(llm: LLM) -> None:
        with serving(lambda: llm) as live:
            answer = live.http.request(method, path, json=body)
        found = MISSING.search(answer.text) if answer.status_code == 501 else None
        if found:
            raise NanollamaError(found[0])
        assert answer.status_code == 200, answer.text

    return run


def answer(**fields: Any) -> Callable[[LLM], None]:
    """An answer to one request."""

    def run(llm: LLM) -> None:
        params = SamplingParams(seed=1, max_tokens=4, **fields.pop("params", {}))
        llm.complete(GenerationRequest(params=params, **fields))

    return run


def adapt(llm: LLM) -> None:
    with contextlib.suppress(nanollama.CheckpointError):  # there is no such adapter
        LLM(llm.checkpoint.path, adapter="no-such-directory")


def make_tiny_random(llm: LLM) -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["NANOLLAMA_CACHE"] = cache
        nanollama.ModelStore().resolve("tiny-random")


def run_test_server(llm: LLM) -> None:
    with nanollama.TestServer("hello") as server:
        body = {"messages": USER}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code == 200


OLLAMA = {"model": "model", "stream": False, "options": {"num_predict": 4}}
CHAT = {"messages": USER, "max_tokens": 4}
# feature -> modules of nanollama_extras that it needs, a use of it
FEATURES: dict[str, tuple[set[str], Callable[[LLM], None]]] = {
    "a prompt": (set(), answer(prompt="hello")),
    "a chat": (set(), answer(messages=USER)),
    "a batch": (
        set(),
        lambda llm: list(llm.stream([GenerationRequest("a", params=SHORT)] * 3)) and None,
    ),
    "q8": (set(), lambda llm: LLM(llm.checkpoint.path, quantize="q8") and None),
    "list": (set(), command("list")),
    "show": (set(), command("show", "MODEL")),
    "chat completions": (set(), request("POST", "/v1/chat/completions", CHAT)),
    "text completions": (
        set(),
        request("POST", "/v1/completions", {"prompt": "x", "max_tokens": 4}),
    ),
    "models": (set(), request("GET", "/v1/models")),
    "bench": ({"commands.bench"}, command("bench", "--model", "MODEL", "-p", 4, "-n", 2, "-r", 1)),
    "eval": ({"commands.eval"}, command("eval", "--model", "MODEL", "--text", __file__, "--json")),
    "verify": ({"commands.verify"}, command("verify", "--help")),
    "an adapter": ({"models.lora"}, adapt),
    "tiny-random": ({"files.tiny_random"}, make_tiny_random),
    "native kernels": (
        {"kernels.native"},
        lambda llm: LLM(llm.checkpoint.path, kernels="native") and None,
    ),
    "a regular expression": (
        {"answers.grammars"},
        answer(messages=USER, params={"regex": "[a-c]{2}"}),
    ),
    "tools": ({"answers.tools", "answers.grammars"}, answer(messages=USER, tools=TOOLS)),
    "tools over HTTP": (
        {"answers.tools", "answers.grammars"},
        request("POST", "/v1/chat/completions", {**CHAT, "tools": TOOLS}),
    ),
    "Responses": (
        {"api.responses"},
        request("POST", "/v1/responses", {"input": "hi", "max_output_tokens": 4}),
    ),
    "embeddings": ({"api.embeddings"}, request("POST", "/v1/embeddings", {"input": "hi"})),
    "Ollama's chat": ({"api.ollama"}, request("POST", "/api/chat", {**OLLAMA, "messages": USER})),
    "Ollama's generate": (
        {"api.ollama"},
        request("POST", "/api/generate", {**OLLAMA, "prompt": "x"}),
    ),
    "the web chat": ({"api.page"}, request("GET", "/")),
    "a test server": ({"testing"}, run_test_server),
}


def outcome(use: Callable[[LLM], None], llm: LLM) -> str:
    """ok, the module that is missing, or the error."""
    try:
        use(llm)
    except NanollamaError as error:
        found = MISSING.search(str(error))
        return found[1] if found else repr(error)
    except Exception as error:
        return repr(error)
    return "ok"


if __name__ == "__main__":
    llm = LLM(Path(sys.argv[1]), parallel=2)
    print(json.dumps({name: outcome(use, llm) for name, (_, use) in FEATURES.items()}))
