"""nanollama.py copied alone into an empty folder: the core works there, and each feature that needs
nanollama_extras says so in one line."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf_files
import httpx
import openai
import oracle
import pytest
from features import FEATURES
from hub_server import HubServer
from oracle import Tiny

import nanollama

ROOT = Path(__file__).parents[1]
# The project may be installed where the tests run, so that its extras could be imported anywhere.
WITHOUT_EXTRAS = """
import sys


class WithoutExtras:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "nanollama_extras":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, WithoutExtras())
"""
QUESTION = "Name the capital of France."
ANSWER = "The capital of France is Paris."
SPEED = re.compile(r"\[prefill: \d+ tok @ \d+ t/s \| decode: \d+ tok @ \d+\.\d t/s\]")
SMOLLM2 = ("--model", "smollm2", "--temp", 0)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nanollama.py and nothing else."""
    folder = tmp_path_factory.mktemp("alone")
    shutil.copy(ROOT / "nanollama.py", folder)
    return folder


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of programs that cannot import nanollama_extras."""
    folder = tmp_path_factory.mktemp("without")
    (folder / "sitecustomize.py").write_text(WITHOUT_EXTRAS)
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(alone: Path, environment: dict[str, str]) -> Run:
    """run(*argv, stdin="", NAME=value) runs the script to its end."""

    def run_script(
        *argv: object, stdin: str = "", **variables: str
    ) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "nanollama.py", *map(str, argv)],
            cwd=alone,
            env={**environment, **variables},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=300,
        )

    return run_script


@contextlib.contextmanager
def serving_alone(alone: Path, environment: dict[str, str], *argv: str) -> Iterator[str]:
    """--serve, until the block ends -> the server's address"""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [sys.executable, "nanollama.py", "--serve", "--port", str(port), *argv]
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command, cwd=alone, env=environment) as server:
        try:
            end = time.monotonic() + 120
            while True:
                with contextlib.suppress(httpx.HTTPError):
                    if httpx.get(f"{url}/health").is_success:
                        break
                assert server.poll() is None, "the server has ended"
                assert time.monotonic() < end, "the server did not start"
                time.sleep(0.05)
            yield url
        finally:
            server.terminate()


@pytest.fixture(scope="module")
def url(smollm2: Path, alone: Path, environment: dict[str, str]) -> Iterator[str]:
    """A server of SmolLM2."""
    with serving_alone(alone, environment, "--model", "smollm2") as url:
        yield url


# ---- the modes -----------------------------------------------------------------------------------


def test_the_folder_holds_one_file(alone: Path, environment: dict[str, str]) -> None:
    code = "import nanollama; print(nanollama.__file__); import nanollama_extras"
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=alone, env=environment, capture_output=True, text=True
    )
    assert ran.stdout == f"{alone / 'nanollama.py'}\n"
    assert "ModuleNotFoundError" in ran.stderr
    assert [path.name for path in alone.iterdir()] == ["nanollama.py"]


def test_one_prompt(run: Run, smollm2: Path) -> None:
    chat = run(*SMOLLM2, "--chat", "--prompt", QUESTION)
    assert (chat.returncode, chat.stdout) == (0, ANSWER + "\n")
    assert SPEED.fullmatch(chat.stderr.splitlines()[-1])
    raw = run(*SMOLLM2, "--prompt", "-", "--max-tokens", 6, stdin="The capital of France is")
    assert raw.returncode == 0
    assert "Paris" in raw.stdout


def test_a_conversation(run: Run, smollm2: Path) -> None:
    """The core has /help, /clear and /quit."""
    others = "load prompt retry save set show system tokens tools undo".split()
    lines = [QUESTION, "/clear", QUESTION, "/help", *(f"/{name} x" for name in others), "/quit"]
    ran = run(*SMOLLM2, "--interactive", stdin="\n".join(lines))
    assert (ran.returncode, ran.stdout) == (0, f"{ANSWER}\n{ANSWER}\n")
    assert "/clear " in ran.stderr
    assert len(re.findall(NEEDS.format(r"commands\.conversation"), ran.stderr)) == len(others)


def test_many_prompts_at_once(run: Run, smollm2: Path, tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text(f"{QUESTION}\nWhat is the capital of Egypt?\n")
    ran = run(*SMOLLM2, "--chat", "--batch-file", prompts)
    assert (ran.returncode, ran.stdout) == (0, f"{ANSWER}\nThe capital of Egypt is Cairo.\n")


def test_a_modelfile(run: Run, smollm2: Path, tmp_path: Path) -> None:
    path = tmp_path / "Modelfile"
    path.write_text("FROM smollm2\nPARAMETER temperature 0\nPARAMETER stop Paris\n")
    ran = run("--modelfile", path, "--chat", "--prompt", QUESTION)
    assert ran.stdout == "The capital of France is \n"


def test_openais_client(url: str) -> None:
    client: Any = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
    assert [model.id for model in client.models.list()] == ["smollm2"]
    chat = {"model": "smollm2", "messages": [{"role": "user", "content": QUESTION}]}
    whole = client.chat.completions.create(**chat, temperature=0)
    assert whole.choices[0].message.content == ANSWER
    assert whole.choices[0].finish_reason == "stop"
    chunks = list(client.chat.completions.create(**chat, temperature=0, stream=True))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER
    several = client.chat.completions.create(**chat, n=2, seed=1, max_tokens=4, logprobs=True)
    assert [choice.index for choice in several.choices] == [0, 1]
    assert len(several.choices[0].logprobs.content) == several.usage.completion_tokens // 2
    text = {"model": "smollm2", "prompt": "The capital of France is", "max_tokens": 5}
    completed = client.completions.create(**text, temperature=0, echo=True)
    assert completed.choices[0].text.startswith("The capital of France is Paris")
    streamed = list(client.completions.create(**text, temperature=0, stream=True))
    joined = "".join(chunk.choices[0].text for chunk in streamed)
    assert text["prompt"] + joined == completed.choices[0].text


# ---- the models ----------------------------------------------------------------------------------

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": oracle.LLAMA3}),
    "qwen2": ("Qwen2", {"use_sliding_window": False}),
    "qwen2_moe": ("Qwen2Moe", {**EXPERTS, "num_experts": 6, "shared_expert_intermediate_size": 96}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**EXPERTS, "num_experts": 5, "head_dim": 16, "norm_topk_prob": True},
    ),
}
GREEDY_IDS = """
import json, sys
import torch
from nanollama import LLM, GenerationRequest, SamplingParams
torch.set_num_threads(1)
options = {"temperature": 0, "repeat_penalty": 1, "max_tokens": 24, "logprobs": 5}
params = SamplingParams(**options, ignore_eos=True)
for line in sys.stdin:
    path, quantize, ids = json.loads(line)
    llm = LLM(path, quantize=quantize)
    answer = llm.complete(GenerationRequest(prompt=ids, params=params))
    first = [token_id for token_id, _ in answer.logprobs[0].top]
    print(json.dumps([first, answer.token_ids]), flush=True)
"""


def test_models_are_those_of_transformers(
    alone: Path, environment: dict[str, str], tiny: Tiny, tmp_path: Path
) -> None:
    ids, jobs, expected = oracle.random_ids(70), [], []
    for label, (name, overrides) in MODELS.items():
        path = tiny(name, **overrides)
        model = oracle.load(path)
        greedy, top = oracle.greedy(model, ids), oracle.logits(model, ids)[-1].topk(5).indices
        file, _ = gguf_files.convert(path, tmp_path / f"{label}.gguf", "F32")
        packed, _ = gguf_files.convert(path, tmp_path / f"{label}-q8.gguf", "Q8_0")
        jobs += [(path, None), (file, None), (packed, None), (path, "q8"), (path, "q4")]
        expected += [(top.tolist(), greedy)] * 2 + [(top.tolist(), None)] * 2 + [(None, None)]
    ran = subprocess.run(
        [sys.executable, "-c", GREEDY_IDS],
        cwd=alone,
        env=environment,
        input="\n".join(json.dumps([str(path), quantize, ids]) for path, quantize in jobs),
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    answers = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(answers) == len(jobs)
    for job, (first, answer), (top_ids, greedy_ids) in zip(jobs, answers, expected):
        assert len(answer) == 24
        assert greedy_ids is None or answer == greedy_ids, job
        assert top_ids is None or first[0] in top_ids, job


def test_quantize(run: Run, tiny: Tiny) -> None:
    for kind in ("q8", "q4"):
        command = ("--model", tiny("Qwen3"), "--quantize", kind, "--prompt", "x", "--max-tokens", 4)
        ran = run(*command, "--seed", 1)
        assert (ran.returncode, ran.stdout != "") == (0, True), ran.stderr


# ---- the cache -----------------------------------------------------------------------------------


def test_models_are_pulled_listed_shown_and_removed(run: Run, tiny: Tiny, tmp_path: Path) -> None:
    files = {file.name: file.read_bytes() for file in tiny().iterdir() if file.is_file()}
    with HubServer() as hub:
        hub.add("org/tiny", files)
        place = {
            "NANOLLAMA_CACHE": str(tmp_path / "own"),
            "HF_HUB_CACHE": str(tmp_path / "hub"),
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "",
        }
        pulled = run("pull", "org/tiny", **place)
    assert pulled.returncode == 0, pulled.stderr
    assert (Path(pulled.stdout.strip()) / "model.safetensors").exists()
    place["HF_HUB_OFFLINE"] = "1"
    assert "org/tiny" in run("list", **place).stdout
    assert "org/tiny" in run("show", "org/tiny", **place).stdout
    ran = run("--model", "org/tiny", "--prompt", "x", "--max-tokens", "2", **place)
    assert ran.returncode == 0, ran.stderr
    assert run("rm", "org/tiny", "--yes", **place).returncode == 0
    assert "org/tiny" not in run("list", **place).stdout


def test_help_and_version(run: Run) -> None:
    for flag in ("--help", "--version"):
        ran = run(flag)
        assert (ran.returncode, ran.stderr, ran.stdout != "") == (0, "", True)


# ---- the features that need an extra -------------------------------------------------------------

NEEDS = (
    r"needs nanollama_extras\.{}, which is not installed; put the folder nanollama_extras beside "
)
ON_MODEL = "--model smollm2 --prompt x"
COMMANDS = {  # module of nanollama_extras -> command lines that need it
    "answers.budgets": (f"{ON_MODEL} --thinking-budget 4",),
    "answers.grammars": (f"{ON_MODEL} --regex a", f"{ON_MODEL} --schema {{}}"),
    "answers.lookup": (f"{ON_MODEL} --lookup 4",),
    "answers.pacing": (f"{ON_MODEL} --max-gap 5",),
    "answers.prompt_cache": (f"{ON_MODEL} --prompt-cache folder",),
    "kernels.laid_out": (f"{ON_MODEL} --packed-cache folder",),
    "answers.toolbox": (f"{ON_MODEL} --chat --mcp a.json",),
    "api.access_log": ("--serve --log-json",),
    "api.shelf": (
        "--serve",
        "--serve --model a --model b",
        "--serve --model a --keep-alive 5m",
        "--serve --model a --num-gpus 2",
    ),
    "commands.bench": ("bench --model smollm2",),
    "commands.completion": ("completion bash",),
    "commands.control": ("ps", "stop a", "cp a b", "create a"),
    "commands.options": (
        f"{ON_MODEL} --chat --tools features.py",
        f"{ON_MODEL} --embed",
        f"{ON_MODEL} --quiet",
        f"{ON_MODEL} --explain",
        "--model smollm2 --batch-file nanollama.py --output -",
        "--interactive -c",
    ),
    "commands.verbs": ("run smollm2", "chat smollm2", "serve", "batch a b", "embed a b"),
    "commands.eval": ("eval --model smollm2",),
    "commands.launch": ("launch claude",),
    "commands.logs": ("logs",),
    "commands.diff": ("diff a b --text c",),
    "commands.record": (f"{ON_MODEL} --record answers.jsonl",),
    "commands.replay": ("replay answers.jsonl",),
    "commands.verify": ("verify --help",),
    "cluster.options": ("--serve --ray", "--serve --tensor-parallel 2"),
    "files.nanochat_store": (
        "--model nanochat --prompt x",
        "--prompt x --source sft",
        "--prompt x -g d20 -s 100",
        "show nanochat --step 7",
    ),
    "files.tiny_random": ("--model tiny-random --prompt x",),
    "kernels.native": (f"{ON_MODEL} --kernels native",),
    "models.drafts": (f"{ON_MODEL} --draft smollm2",),
    "models.lora": (f"{ON_MODEL} --adapter .",),
    "models.mtp": (f"{ON_MODEL} --lookup mtp",),
    "testing": ("--serve --script answers.yaml",),
}
COMMAND_LINES = [(module, line) for module, lines in COMMANDS.items() for line in lines]
RUN_EACH = """
import contextlib, io, json, sys
import nanollama
for line in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = nanollama.main(line.split())
        except SystemExit as ended:
            code = ended.code
    nanollama.log.handlers.clear()
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""


@pytest.fixture(scope="module")
def outcomes(
    alone: Path,
    environment: dict[str, str],
    smollm2: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> dict[str, tuple[int, str, str]]:
    """Exit code, stdout and stderr of each command line; one process runs them all, with a cache
    that holds SmolLM2 alone."""
    cache = tmp_path_factory.mktemp("cache")
    (cache / "models").mkdir()
    (cache / "models" / "smollm2").symlink_to(smollm2.parent)
    lines = [line for _, line in COMMAND_LINES]
    ran = subprocess.run(
        [sys.executable, "-c", RUN_EACH],
        cwd=alone,
        env={**environment, "NANOLLAMA_CACHE": str(cache)},
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr
    return dict(zip(lines, map(json.loads, ran.stdout.splitlines()), strict=True))


@pytest.mark.parametrize(("module", "line"), COMMAND_LINES)
def test_a_command_line_that_needs_an_extra_says_so(
    outcomes: dict[str, tuple[int, str, str]], module: str, line: str
) -> None:
    code, out, err = outcomes[line]
    assert (code, out) == (2, "")
    *_, last = err.splitlines()
    assert last.startswith("error: ")
    assert re.search(NEEDS.format(re.escape(module)), last), last


def test_every_option_is_known(alone: Path, environment: dict[str, str]) -> None:
    program = "import nanollama; print(*nanollama.build_parser()._option_string_actions)"
    command = [sys.executable, "-c", program]
    ran = subprocess.run(command, cwd=alone, env=environment, capture_output=True, text=True)
    assert set(ran.stdout.split()) == set(nanollama.build_parser()._option_string_actions)


CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}
REQUESTS: list[tuple[str, str, str, dict[str, Any] | None]] = [
    # module of nanollama_extras; method, path and body of a request that needs it
    ("answers.guides", "POST", "/v1/chat/completions", {**CHAT, "response_format": SCHEMA}),
    ("answers.tools", "POST", "/v1/chat/completions", {**CHAT, "tools": TOOLS}),
    ("api.best_of", "POST", "/v1/completions", {"prompt": "x", "best_of": 2}),
    ("api.embeddings", "POST", "/v1/embeddings", {"input": "x"}),
    ("api.inspect", "POST", "/tokenize", {"prompt": "x"}),
    ("api.inspect", "POST", "/detokenize", {"tokens": [5]}),
    ("api.xray", "POST", "/xray", CHAT),
    ("api.inspect", "GET", "/openapi.json", None),
    ("api.inspect", "GET", "/v1/capabilities", None),
    ("api.metrics", "GET", "/metrics", None),
    ("api.page", "GET", "/", None),
    ("api.page", "POST", "/chat/completions", CHAT),
    ("api.responses", "POST", "/v1/responses", {"input": "x"}),
    ("api.responses", "GET", "/v1/responses/resp_1", None),
    ("api.anthropic", "POST", "/v1/messages", CHAT),
    ("api.lent_tools", "GET", "/tools", None),
    ("api.infill", "POST", "/infill", {"input_prefix": "x", "input_suffix": "y"}),
    ("api.rerank", "POST", "/v1/rerank", {"query": "x", "documents": ["y"]}),
    ("api.ollama", "POST", "/api/chat", CHAT),
    ("api.ollama", "GET", "/api/tags", None),
]


@pytest.mark.parametrize(("module", "method", "path", "body"), REQUESTS)
def test_a_request_that_needs_an_extra_is_answered_with_501(
    url: str, module: str, method: str, path: str, body: dict[str, Any] | None
) -> None:
    answer = httpx.request(method, url + path, json=body)
    assert answer.status_code == 501, answer.text
    error = answer.json()["error"]
    assert re.search(NEEDS.format(re.escape(module)), error["message"])
    assert error["code"] == "extra_not_installed"
    assert "\n" not in error["message"]


def test_every_feature_works_or_names_its_extra(
    alone: Path, environment: dict[str, str], tiny: Tiny
) -> None:
    path = os.pathsep.join([environment["PYTHONPATH"], str(alone), str(ROOT / "tests")])
    ran = subprocess.run(
        [sys.executable, ROOT / "tests" / "features.py", tiny(max_position_embeddings=1024)],
        cwd=alone,
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    outcomes: dict[str, str] = json.loads(ran.stdout.splitlines()[-1])
    assert list(outcomes) == list(FEATURES)
    for name, (needed, _) in FEATURES.items():
        assert outcomes[name] in (needed or {"ok"}), f"{name}: {outcomes[name]}"


# A GPU, a conversation (`test_a_conversation`), weights of gpt-oss, and a hub that does not answer
# are more than a use of a feature can bring; without kernels.memory, kernels.containers and those
# of templates, of parameters without effect and of models without a tokenizer, no feature of these
# fails.
UNUSED = {
    "cluster.batch",
    "cluster.batch_files",
    "cluster.calls",
    "cluster.front",
    "cluster.links",
    "cluster.options",
    "cluster.placement",
    "cluster.replica",
    "cluster.serve",
    "cluster.shards",
    "cluster.shipped",
    "cluster.tensor_parallel",
    "kernels.cuda",
    "kernels.floats",
    "commands.bench_servers",
    "commands.bench_whole",
    "commands.batch_lines",
    "kernels.int4",
    "commands.conversation",
    "commands.notices",
    "commands.status",
    "commands.terminal",
    "api.signals",
    "files.headers",
    "files.mxfp4",
    "files.quantized",
    "files.fp8",
    "files.gptq",
    "files.mlx",
    "files.compressed",
    "files.nvfp4",
    "models.gpt_oss",
    "models.qwen3_vl",
    "files.bitnet",
    "files.conversion",
    "files.gguf_blocks",
    "files.gguf_lists",
    "files.gguf_families",
    "files.gguf_model",
    "files.gguf_vocabulary",
    "files.gguf_writer",
    "files.importance",
    "files.mapped",
    "files.measures",
    "files.mixtures",
    "files.mmproj",
    "files.packed_directory",
    "files.quantizers",
    "files.scored_pieces",
    "files.bitsandbytes",
    "files.show_types",
    "files.torchao",
    "models.apertus",
    "models.bidirectional",
    "models.dissection",
    "models.bitnet",
    "models.llama4",
    "models.mla",
    "models.mla_config",
    "models.routers",
    "models.routing",
    "models.rows",
    "models.delta_net",
    "models.gemma3n",
    "models.gemma4",
    "models.gemma_config",
    "models.grouped_cache",
    "models.hybrid_config",
    "models.mamba2",
    "models.mamba2_config",
    "models.mtp",
    "models.muse_glimmer",
    "models.part_times",
    "models.lfm2_pixels",
    "models.pixtral",
    "models.recurrent",
    "models.short_conv",
    "models.sketch",
    "models.paired_towers",
    "models.vision",
    "models.vision_towers",
    "models.vision_weights",
    "models.whole_images",
    "answers.templates",
    "files.hub_files",
    "files.ids_only",
    "files.package_index",
    "files.parameters",
    "files.refusals",
    "kernels.containers",
    "kernels.memory",
    "kernels.recorded",
    "kernels.thread_choice",
}


def test_every_extra_has_a_feature() -> None:
    folder = ROOT / "nanollama_extras"
    files = [path for path in folder.rglob("*.py") if path.name != "__init__.py"]
    modules = {".".join(path.relative_to(folder).with_suffix("").parts) for path in files}
    needed = {module for modules, _ in FEATURES.values() for module in modules}
    assert modules - needed == UNUSED
    assert needed <= modules
