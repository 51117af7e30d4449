"""`nanollama launch CLIENT -- ARGS`: runs a coding agent on a model of this machine.

The server that answers at --url is used; where none does, one is started for --model and ends with
the client. Each client is told about it by environment variables, or by a configuration file in a
temporary folder; the user's own files stay as they are. --print shows these and runs nothing.

Seam       Command (the row "launch" of COMMANDS in nanollama.py).
Extend     a client is a row of CLIENTS.
Remove     delete this file and that row.
Source     docs/agents.md says what each client reads.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nanollama
from nanollama import NanollamaError, UsageError, command_parser, log, put

if TYPE_CHECKING:
    from nanollama import Json

START_S = 600.0  # for a server to load its model
NO_KEY = "none"  # clients insist on a key


@dataclass(frozen=True, slots=True)
class Target:
    """A server and a model: what a client is told. folder: where its configuration may go."""

    url: str
    model: str
    key: str
    n_ctx: int
    folder: Path


@dataclass(frozen=True, slots=True)
class Plan:
    """How a client is run."""

    command: list[str]
    variables: dict[str, str]
    files: dict[Path, str] = field(default_factory=dict)


def claude(target: Target) -> Plan:
    kinds = "ANTHROPIC_MODEL", "CLAUDE_CODE_SUBAGENT_MODEL"
    names = [*kinds, *(f"ANTHROPIC_DEFAULT_{k}_MODEL" for k in ("OPUS", "SONNET", "HAIKU"))]
    variables = {
        "ANTHROPIC_BASE_URL": target.url,
        "ANTHROPIC_AUTH_TOKEN": target.key,
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        **dict.fromkeys(names, target.model),
    }
    return Plan(["claude"], variables)


def codex(target: Target) -> Plan:
    lines = {"model": target.model, "model_provider": "nanollama"}
    provider = {
        "name": "nanollama",
        "base_url": f"{target.url}/v1",
        "wire_api": "responses",
        "env_key": "NANOLLAMA_API_KEY",
    }
    text = "".join(f"{name} = {json.dumps(value)}\n" for name, value in lines.items())
    if target.n_ctx:
        text += f"model_context_window = {target.n_ctx}\n"
    text += "\n[model_providers.nanollama]\n"
    text += "".join(f"{name} = {json.dumps(value)}\n" for name, value in provider.items())
    variables = {"CODEX_HOME": str(target.folder), "NANOLLAMA_API_KEY": target.key}
    return Plan(["codex"], variables, {target.folder / "config.toml": text})


def opencode(target: Target) -> Plan:
    limit = {"context": target.n_ctx, "output": max(target.n_ctx // 4, 1)}
    model: Json = {"limit": limit} if target.n_ctx else {}
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "options": {"baseURL": f"{target.url}/v1", "apiKey": target.key},
        "models": {target.model: model},
    }
    name = f"nanollama/{target.model}"
    body = {"provider": {"nanollama": provider}, "model": name, "small_model": name}
    path = target.folder / "opencode.json"
    variables = {"OPENCODE_CONFIG": str(path), "OPENCODE_DISABLE_MODELS_FETCH": "1"}
    return Plan(["opencode"], variables, {path: json.dumps(body, indent=2) + "\n"})


def qwen_code(target: Target) -> Plan:
    variables = {
        "OPENAI_BASE_URL": f"{target.url}/v1",
        "OPENAI_API_KEY": target.key,
        "OPENAI_MODEL": target.model,
    }
    return Plan(["qwen", "--auth-type", "openai"], variables)


CLIENTS: dict[str, Callable[[Target], Plan]] = {
    "claude": claude,
    "codex": codex,
    "opencode": opencode,
    "qwen-code": qwen_code,
}


def ask(url: str, key: str) -> Any:
    """The JSON at a URL; None where no server is ready there."""
    request = urllib.request.Request(url, headers={"authorization": f"Bearer {key}"})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return json.load(answer)
    except (OSError, ValueError):
        return None


def served(url: str, key: str, model: str | None) -> tuple[str, int]:
    """The model of a server that is ready, and its context (0: not known). Raises UsageError."""
    listed = ask(f"{url}/v1/models", key) or {}
    models = {one["id"]: one for one in listed.get("data", [])}
    name = model or next(iter(models), None)
    if name is None:
        raise UsageError(f"the server at {url} lists no models; give --model, or check --api-key")
    return name, int(models.get(name, {}).get("max_model_len", 0))


@contextlib.contextmanager
def started(model: str, flags: list[str], key: str) -> Iterator[str]:
    """The address of a new server with these flags, which ends with the block. Raises
    NanollamaError."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    command = [sys.executable, str(nanollama.__file__), "--serve", "--model", model, "--any-model"]
    command += ["--port", str(port), *flags]
    variables = {} if key == NO_KEY else {"NANOLLAMA_API_KEY": key}
    log.warning(f"starting a server for {model} at {url}")
    server = subprocess.Popen(
        command,
        env={**os.environ, **variables},
        stdout=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL,
    )
    try:
        end_s = time.monotonic() + START_S
        while ask(f"{url}/health", key) is None:
            if server.poll() is not None or time.monotonic() > end_s:
                raise NanollamaError(f"the server for {model} did not start; its error is above")
            time.sleep(0.1)
        yield url
    finally:
        server.terminate()
        server.wait()


def show(plan: Plan) -> None:
    """Print what a plan sets and runs."""
    for path, text in plan.files.items():
        put(f"# {path}\n{text}\n")
    for name, value in plan.variables.items():
        put(f"export {name}={shlex.quote(value)}\n")
    put(shlex.join(plan.command) + "\n")


def launch(plan: Plan) -> int:
    """Run a client. Returns its exit code. Raises UsageError where it is not installed."""
    found = shutil.which(plan.command[0])
    if found is None:
        raise UsageError(f"{plan.command[0]} is not installed, or not on the PATH")
    for path, text in plan.files.items():
        path.write_text(text, encoding="utf-8")
    env = {**os.environ, **plan.variables}
    return subprocess.run([found, *plan.command[1:]], env=env, check=False).returncode


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the client's own arguments, which stand behind --."""
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = command_parser("launch")
    parser.add_argument("client", choices=list(CLIENTS), help="the coding agent")
    parser.add_argument("--model", metavar="MODEL", help="its model; by default the server's first")
    parser.add_argument("--url", metavar="URL", help="the server", default="http://127.0.0.1:8000")
    parser.add_argument("--ctx", metavar="N", type=int, help="context of a server that is started")
    parser.add_argument("--prompt-cache", metavar="DIR", help="files of its prompts")
    parser.add_argument("--api-key", metavar="KEY", help="the server's key (or NANOLLAMA_API_KEY)")
    parser.add_argument("--print", action="store_true", help="show what would be set and run")
    return parser.parse_args(argv[:cut]), argv[cut + 1 :]


def run(argv: list[str]) -> int:
    args, own = parse(argv)
    url, key = args.url.rstrip("/"), args.api_key or os.environ.get("NANOLLAMA_API_KEY") or NO_KEY
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="nanollama-")))
        name, n_ctx = args.model, args.ctx or 0
        if ask(f"{url}/health", key) is not None:
            name, n_ctx = served(url, key, args.model)
        elif not name:
            raise UsageError(f"no server answers at {url}; give --model to start one, or --url")
        elif not args.print:
            chosen = {"--ctx": args.ctx, "--prompt-cache": args.prompt_cache}
            flags = [str(word) for row in chosen.items() if row[1] for word in row]
            url = stack.enter_context(started(name, flags, key))
            name, n_ctx = served(url, key, None)
        plan = CLIENTS[args.client](Target(url, name, key, n_ctx, folder))
        plan.command.extend(own)
        if args.print:
            show(plan)
            return 0
        return launch(plan)
