"""One use of each feature, with the modules of nanollama_extras that it needs.

Run as a program with the directory of a small model, it uses each feature and prints the outcomes
as JSON."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf_files
import httpx
import torch
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


def compare_with_a_peer(llm: LLM) -> None:
    """`bench --compare` on a GGUF of the model, which a script measures like llama-bench."""
    with tempfile.TemporaryDirectory() as name:
        file, _ = gguf_files.convert(llm.checkpoint.path, Path(name, "model.gguf"))
        peer = Path(name, "llama-bench")
        peer.write_text(f"#!{sys.executable}\nprint('[{{\"avg_ts\": 1}}]')\n")
        peer.chmod(0o755)
        command("bench", "--model", file, "-p", 4, "-n", 0, "-r", 1, "--compare", peer)(llm)


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


def load(changes: dict[str, Any], **files: str) -> Callable[[LLM], None]:
    """The model, loaded once more after changes to its config.json, with other files; `None` in the
    place of a file's content deletes it. The model may be broken: only a missing extra counts."""

    def run(llm: LLM) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(shutil.copytree(llm.checkpoint.path, Path(scratch) / "model"))
            config = json.loads((folder / "config.json").read_text())
            (folder / "config.json").write_text(json.dumps({**config, **changes}))
            for name, content in files.items():
                (folder / name.replace("_json", ".json")).write_text(content)
            if "tekken_json" in files:
                (folder / "tokenizer.json").unlink()
            with contextlib.suppress(nanollama.CheckpointError):
                LLM(folder)

    return run


def load_gguf(key: str, value: str) -> Callable[[LLM], None]:
    """A GGUF with another vocabulary; it may be broken: only a missing extra counts."""

    def run(llm: LLM) -> None:
        raw, _ = gguf_files.smallest({f"tokenizer.ggml.{key}": (gguf_files.STRING, value)})
        with tempfile.TemporaryDirectory() as scratch:
            path = Path(scratch) / "model.gguf"
            path.write_bytes(raw)
            with contextlib.suppress(nanollama.CheckpointError):
                LLM(path)

    return run


def load_rare_type(llm: LLM) -> None:
    raw, _ = gguf_files.smallest(kinds={"blk.0.ffn_up.weight": 20})  # IQ4_NL
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model.gguf"
        path.write_bytes(raw)
        with contextlib.suppress(nanollama.CheckpointError):
            LLM(path)


def option(**options: Any) -> Callable[[LLM], None]:
    """The model, loaded with an option; an adapter that is no adapter is no missing extra."""

    def run(llm: LLM) -> None:
        with contextlib.suppress(nanollama.CheckpointError):
            LLM(llm.checkpoint.path, **options)

    return run


def draft(llm: LLM) -> None:
    LLM(llm.checkpoint.path, draft=str(llm.checkpoint.path))


def attend_capped(llm: LLM) -> None:
    q, keys, bias = torch.zeros(4, 2, 16), torch.zeros(2, 4, 16), torch.zeros(4, 4)
    nanollama.attention(q, keys, keys, bias, softcap=2.0)


def load_nanochat(llm: LLM) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "model_000001.pt"
        path.write_bytes(b"")
        with contextlib.suppress(nanollama.CheckpointError):
            LLM(path)


def make_tiny_random(llm: LLM) -> None:
    with tempfile.TemporaryDirectory() as cache:
        os.environ["NANOLLAMA_CACHE"] = cache
        nanollama.ModelStore().resolve("tiny-random")


def find_nanochat(llm: LLM) -> None:
    with contextlib.suppress(nanollama.ModelNotFoundError, nanollama.CheckpointError):
        nanollama.ModelStore().resolve("nanochat")


def run_batch(llm: LLM) -> None:
    assert len(list(llm.stream([GenerationRequest("a", params=SHORT)] * 3))) >= 3


def run_test_server(llm: LLM) -> None:
    with nanollama.TestServer("hello") as server:
        body = {"messages": USER}
        assert httpx.post(f"{server.url}/v1/chat/completions", json=body).status_code == 200


def serve_all_models(llm: LLM) -> None:
    """What --serve without --model serves."""
    parser = nanollama.build_parser()
    settings = nanollama.read_settings(parser.parse_args(["--serve"]))
    open_models = nanollama.preferred("api.shelf", "open_shelf", nanollama.open_model)
    assert not open_models(settings, nanollama.ServerConfig()).named


def serve_with(flag: str) -> Callable[[LLM], None]:
    """A command line of a server with a flag."""
    return lambda _: vars(nanollama.build_parser().parse_args(["--serve", flag])).clear()


def show_timings(llm: LLM) -> None:
    with serving(lambda: llm) as live:
        if "timings" not in live.text(max_tokens=1).json():
            raise NanollamaError("needs nanollama_extras.api.timings, which is not installed")


def show_fingerprint(llm: LLM) -> None:
    with serving(lambda: llm) as live:
        if live.text(max_tokens=1).json()["system_fingerprint"] == f"fp_{nanollama.__version__}":
            raise NanollamaError("needs nanollama_extras.api.fingerprint, which is not installed")


def limit_bodies(llm: LLM) -> None:
    with serving(lambda: llm) as live:
        if live.text(max_tokens=1, unknown=[{}] * 10_001).status_code == 200:
            raise NanollamaError("needs nanollama_extras.api.limits, which is not installed")


def read_from_another_origin(llm: LLM) -> None:
    with serving(lambda: llm) as live:
        response = live.http.get("/health", headers={"origin": "http://localhost:3000"})
        if "access-control-allow-origin" not in response.headers:
            raise NanollamaError("needs nanollama_extras.api.origins, which is not installed")


def run_tools(llm: LLM) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write('def f() -> str:\n    """Nothing."""\n    return ""\n')
        file.flush()
        flags = ("--chat", "--prompt", "x", "--max-tokens", 2, "--yes-tools", "--tools", file.name)
        command("--model", "MODEL", *flags)(llm)


@contextlib.contextmanager
def mcp_file() -> Iterator[str]:
    """A file of an MCP server that ends at once, which is a warning."""
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"mcpServers": {"a": {"command": "false"}}}, file)
        file.flush()
        yield file.name


def lend_tools(llm: LLM) -> None:
    with mcp_file() as name:
        flags = ("--chat", "--prompt", "x", "--max-tokens", 2, "--mcp", name)
        command("--model", "MODEL", *flags)(llm)


def lend_tools_to_the_page(llm: LLM) -> None:
    with mcp_file() as name, serving(lambda: llm, mcp=name) as live:
        if found := MISSING.search(live.http.get("/tools").text):
            raise NanollamaError(found[0])


def refused(path: str, **body: Any) -> Callable[[LLM], None]:
    """A request that the model cannot answer: only a missing extra counts."""

    def run(llm: LLM) -> None:
        with serving(lambda: llm) as live:
            found = MISSING.search(live.http.post(path, json=body).text)
        if found:
            raise NanollamaError(found[0])

    return run


def send_image_file(llm: LLM) -> None:
    """A prompt with an image that is not there: only a missing extra counts."""
    flags = ("--prompt", "x", "--image", "no-such-file.png")
    with contextlib.suppress(nanollama.RequestError):
        command("--model", "MODEL", *flags)(llm)


def fetch_image(llm: LLM) -> None:
    """An image of a host that is not allowed: only a missing extra counts."""
    part = {"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}
    with contextlib.suppress(nanollama.RequestError):
        nanollama.extra("answers.images", "an image").part_picture(part, "image")


def write_json_lines(llm: LLM) -> None:
    with tempfile.NamedTemporaryFile("w") as file:
        file.write("hello\n")
        file.flush()
        flags = ("--batch-file", file.name, "--output", "-", "--max-tokens", 2)
        command("--model", "MODEL", *flags)(llm)


def keep_prompts(llm: LLM) -> None:
    with tempfile.TemporaryDirectory() as folder:
        LLM(llm.checkpoint.path, prompt_cache=folder)


def keep_weights(llm: LLM) -> None:
    with tempfile.TemporaryDirectory() as folder:
        LLM(llm.checkpoint.path, packed_cache=folder)


def record_and_replay(llm: LLM) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/answers.jsonl"
        command("--model", "MODEL", "--prompt", "hello", "-m", 2, "--record", path)(llm)
        command("replay", path, "--json")(llm)


def score(llm: LLM) -> None:
    assert llm.logits([5, 6]).shape[0] == 2
    assert [index for index, _ in llm.score([([5, 6, 7], 1)])] == [0]


def put_away(result: object) -> None:
    """Nothing is done with the result of a feature."""


def ask_in_asyncio(llm: LLM) -> None:
    put_away(asyncio.run(nanollama.AsyncLLM(llm).chat("hi", max_tokens=4)))


def embed(llm: LLM) -> None:
    assert len(llm.embed(["hello"])) == 1


GRAMMARS = {f"answers.{name}" for name in ("grammars", "sandbox", "sandboxed", "schemas")}
FORMS = {*GRAMMARS, "answers.notations", "answers.tools"}
RESPONSES = {f"api.{name}" for name in ("responses", "response_input", "response_tools", "sealed")}
RESPONSES |= {"api.compaction", "answers.lark_regex"}
NEST = {"type": "grammar", "syntax": "lark", "definition": 'start: "(" start ")" | "x"'}
OLLAMA_API = {"api.ollama", "api.ollama_models", "api.blobs", "api.shelf", "commands.details"}
GAP: dict[str, Any] = {"model": "model", "prompt": "a", "suffix": "b", "stream": False}
CALL = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
CALLED = [
    *USER,
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "done"},
]
OLLAMA = {"model": "model", "stream": False, "options": {"num_predict": 4}}
CHAT = {"messages": USER, "max_tokens": 4}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
TEXT = {"prompt": "x", "max_tokens": 4}
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
# feature -> modules of nanollama_extras that it needs, a use of it
FEATURES: dict[str, tuple[set[str], Callable[[LLM], None]]] = {
    "a prompt": (set(), answer(prompt="hello")),
    "a chat": (set(), answer(messages=USER)),
    "a message to continue": (
        {"answers.shapes"},
        answer(messages=USER, template_kwargs={"continue_final_message": True}),
    ),
    "a batch": (set(), run_batch),
    "q8": (set(), option(quantize="q8")),
    "q4": (set(), option(quantize="q4")),
    "keys and values in 8 bits": ({"kernels.q8_cache"}, option(kv_dtype="q8", kernels="torch")),
    "list": (set(), command("list")),
    "show": (set(), command("show", "MODEL")),
    "chat completions": (set(), request("POST", "/v1/chat/completions", CHAT)),
    "a streamed chat": (set(), request("POST", "/v1/chat/completions", {**CHAT, "stream": True})),
    "text completions": (set(), request("POST", "/v1/completions", TEXT)),
    "a streamed text": (set(), request("POST", "/v1/completions", {**TEXT, "stream": True})),
    "models": (set(), request("GET", "/v1/models")),
    "health": (set(), request("GET", "/health")),
    "several models": ({"api.shelf", "commands.details"}, serve_all_models),
    "timings": ({"api.timings"}, show_timings),
    "fingerprint": ({"api.fingerprint"}, show_fingerprint),
    "limits": ({"api.limits"}, limit_bodies),
    "web pages of other origins": ({"api.origins"}, read_from_another_origin),
    "bench": ({"commands.bench"}, command("bench", "--model", "MODEL", "-p", 4, "-n", 2, "-r", 1)),
    "bench --compare": ({"commands.bench", "commands.bench_peer"}, compare_with_a_peer),
    "eval": (
        {"commands.eval", "answers.scores", "answers.library"},
        command("eval", "--model", "MODEL", "--text", __file__, "--json"),
    ),
    "lens": ({"commands.lens", "models.tracing"}, command("lens", "hello", "--model", "MODEL")),
    "explain": ({"commands.anatomy"}, command("explain", "--help")),
    "hooks": ({"models.tracing", "answers.library"}, lambda llm: put_away(llm.hooks({}))),
    "diff": (
        {"commands.diff", "commands.eval", "answers.scores"},
        command("diff", "MODEL", "MODEL", "--text", __file__, "--json"),
    ),
    "--prompt-cache": ({"answers.prompt_cache", "files.block_store"}, keep_prompts),
    "--packed-cache": ({"kernels.laid_out", "files.block_store"}, keep_weights),
    "--record and replay": (
        {"commands.record", "commands.replay", "answers.scores"},
        record_and_replay,
    ),
    "--explain": (
        {"commands.xray", "answers.stages", "commands.options"},
        command("--explain", "--model", "MODEL", "--prompt", "hello", "--max-tokens", 2),
    ),
    "stages of the sampler": (
        {"api.xray", "answers.stages"},
        request("POST", "/xray", {**CHAT, "answer_ids": [5]}),
    ),
    "verify": ({"commands.verify"}, command("verify", "--help")),
    "convert": ({"commands.convert"}, command("convert", "--help")),
    "run": ({"commands.verbs"}, command("run", "MODEL", "hello", "--max-tokens", 2)),
    "ps": ({"commands.control"}, command("ps", "--help")),
    "logs": ({"commands.logs"}, command("logs", "--help")),
    "completion": ({"commands.completion", "commands.help"}, command("completion", "bash")),
    "--log-json": ({"api.access_log"}, serve_with("--log-json")),
    "launch": ({"commands.launch"}, command("launch", "--help")),
    "--embed": (
        {"commands.embed", "commands.options", "answers.embeddings"},
        command("--embed", "--model", "MODEL", "--prompt", "hello"),
    ),
    "--output": ({"commands.json_lines", "commands.options"}, write_json_lines),
    "--tools": ({"answers.toolbox", "commands.options", *FORMS}, run_tools),
    "--mcp": ({"answers.toolbox", "answers.mcp_tools", *FORMS}, lend_tools),
    "tools of the page": (
        {"api.lent_tools", "answers.mcp_tools", "answers.schemas", "answers.sandboxed"},
        lend_tools_to_the_page,
    ),
    "an adapter": ({"models.lora"}, option(adapter="no-such-directory")),
    "a rarer family": ({"models.families", "models.layers"}, load({"model_type": "olmo2"})),
    "a rarer rope": (
        {"models.ropes"},
        load({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}}),
    ),
    "a nanochat checkpoint": ({"models.nanochat"}, load_nanochat),
    "nanochat's directory": ({"files.nanochat_store"}, find_nanochat),
    "tiny-random": ({"files.tiny_random"}, make_tiny_random),
    "a rarer GGUF type": ({"files.gguf_types", "kernels.fine"}, load_rare_type),
    "a rarer pre-tokenizer": ({"files.pre_tokenizers"}, load_gguf("pre", "tekken")),
    "SentencePiece in GGUF": ({"files.vocabularies"}, load_gguf("model", "llama")),
    "tekken.json": ({"files.vocabularies"}, load({}, tekken_json="{}")),
    "capped attention": ({"models.attention"}, attend_capped),
    "native kernels": ({"kernels.arrays", "kernels.native"}, option(kernels="native")),
    "guesses": ({"answers.lookup"}, option(lookup=4)),
    "short steps": ({"answers.pacing"}, option(max_gap=5)),
    "a draft model": ({"models.drafts", "answers.gains", "answers.lookup"}, draft),
    "scores": ({"answers.scores", "answers.library"}, score),
    "an embedding": ({"answers.embeddings", "answers.library"}, embed),
    "a question": ({"answers.library"}, lambda llm: put_away(llm.chat("hi", max_tokens=4))),
    "a model in asyncio": ({"answers.async_llm", "answers.library"}, ask_in_asyncio),
    "a replaced module": ({"models.parts", "answers.library"}, lambda llm: put_away(llm.decoder)),
    "an image": (
        {"answers.images"},
        refused("/v1/chat/completions", messages=[{"role": "user", "content": [IMAGE]}]),
    ),
    "an image of another server": ({"answers.images", "api.image_hosts"}, fetch_image),
    "--image": ({"commands.images", "commands.options", "answers.images"}, send_image_file),
    "a regular expression": (GRAMMARS, answer(messages=USER, params={"regex": "[a-c]{2}"})),
    "a conversation with calls": ({*FORMS, "answers.call_shapes"}, answer(messages=CALLED)),
    "tools": (FORMS, answer(messages=USER, tools=TOOLS)),
    "tools over HTTP": (FORMS, request("POST", "/v1/chat/completions", {**CHAT, "tools": TOOLS})),
    "response_format": (
        {*GRAMMARS, "answers.guides"},
        request("POST", "/v1/chat/completions", {**CHAT, "response_format": SCHEMA}),
    ),
    "Responses": (
        RESPONSES,
        request("POST", "/v1/responses", {"input": "hi", "max_output_tokens": 4}),
    ),
    "a tool with a grammar": (
        {*FORMS, *RESPONSES, "answers.lark_json"},
        request(
            "POST",
            "/v1/responses",
            {
                "input": "hi",
                "max_output_tokens": 4,
                "tools": [{"type": "custom", "name": "f", "format": NEST}],
            },
        ),
    ),
    "Messages": (
        {"api.anthropic", "api.anthropic_body", "api.sealed"},
        request("POST", "/v1/messages", {"messages": USER, "max_tokens": 4}),
    ),
    "embeddings": (
        {"api.embeddings", "answers.embeddings"},
        request("POST", "/v1/embeddings", {"input": "hi"}),
    ),
    "Ollama's chat": (OLLAMA_API, request("POST", "/api/chat", {**OLLAMA, "messages": USER})),
    "Ollama's generate": (OLLAMA_API, request("POST", "/api/generate", {**OLLAMA, "prompt": "x"})),
    "Ollama's suffix": ({*OLLAMA_API, "answers.fim"}, refused("/api/generate", **GAP)),
    "a suffix": ({"answers.fim"}, refused("/v1/completions", **GAP)),
    "a gap in a file": (
        {"api.infill", "answers.fim"},
        refused("/infill", input_prefix="a", input_suffix="b"),
    ),
    "reranking": (
        {"api.rerank", "api.embeddings", "answers.ranks", "answers.embeddings"},
        refused("/v1/rerank", query="a", documents=["b"]),
    ),
    "Ollama's tags": (OLLAMA_API, request("GET", "/api/tags")),
    "the web chat": ({"api.page"}, request("GET", "/")),
    "metrics": ({"api.metrics"}, request("GET", "/metrics")),
    "a limit on thoughts": (
        {"answers.budgets"},
        answer(messages=USER, params={"thinking_budget": 4}),
    ),
    "best of": ({"api.best_of"}, request("POST", "/v1/completions", {**TEXT, "best_of": 2})),
    "tokenize": ({"api.inspect"}, request("POST", "/tokenize", {"prompt": "hello"})),
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
