"""`nanollama ps`, `stop`, `cp` and `create`: the models of a running server, and models of one's
own, as Ollama's commands of these names.

Seam       Command (rows of COMMANDS in nanollama.py). `ps` and `stop` ask a server through Ollama's
           API; `cp` and `create` write a Modelfile into the store, as that API does, with the
           functions of api.ollama_models.
Remove     delete this file and those rows.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import urllib.error
import urllib.request
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanollama import (
    PROGRAM,
    Modelfile,
    ModelNotFoundError,
    ModelStore,
    NanollamaError,
    UsageError,
    command_parser,
    extra,
    human_bytes,
    local_path,
    log,
    plain_name,
    put,
    read_modelfile,
)

if TYPE_CHECKING:
    from nanollama import Json

URL = "http://127.0.0.1:8000"
FAR_S = 400 * 24 * 3600  # a model that is unloaded later than this stays for ever


def ask(args: argparse.Namespace, path: str, body: Json | None = None) -> Any:
    """The answer of a server: GET, or POST of a body. Raises NanollamaError."""
    url = args.url.rstrip("/")
    key = args.api_key or os.environ.get("NANOLLAMA_API_KEY", "").split(",")[0]
    headers = {"authorization": f"Bearer {key}"} if key else {}
    data = None if body is None else json.dumps(body).encode()
    try:
        request = urllib.request.Request(url + path, data, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise NanollamaError(f"{url}: {reason(error)}") from None
    except (OSError, ValueError) as error:
        cause = getattr(error, "reason", error)
        message = f"no server answers at {url} ({cause}); start one with: {PROGRAM} serve"
        raise NanollamaError(f"{message}, or give its --url") from None


def reason(error: urllib.error.HTTPError) -> str:
    """The text of an error of the server, in any of its dialects."""
    try:
        found = json.load(error)["error"]
        return str(found["message"] if isinstance(found, dict) else found)
    except (ValueError, KeyError, TypeError):
        return f"{error.code} {error.reason}"


def server_parser(name: str) -> argparse.ArgumentParser:
    parser = command_parser(name)
    parser.add_argument("--url", metavar="URL", default=URL, help=f"the server (default: {URL})")
    parser.add_argument("--api-key", metavar="KEY", help="its key (or NANOLLAMA_API_KEY)")
    return parser


def until(expires: str) -> str:
    """How long a model stays: for ever, or minutes and seconds from now."""
    moment = datetime.fromisoformat(expires.replace("Z", "+00:00"))
    seconds = (moment - datetime.now(timezone.utc)).total_seconds()
    if seconds > FAR_S:
        return "for ever"
    minutes, rest = divmod(max(int(seconds), 0), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def ps(argv: list[str]) -> int:
    """`ps`: the models in the memory of a server."""
    models = ask(server_parser("ps").parse_args(argv), "/api/ps")["models"]
    width = max([4, *(len(model["name"]) for model in models)])
    put(f"{'NAME':<{width}}  {'SIZE':>8}  {'DEVICE':<6}  {'CONTEXT':>7}  STAYS\n")
    for model in models:
        device = "gpu" if model["size_vram"] else "cpu"
        size, context = human_bytes(model["size"]), model["context_length"]
        row = f"{model['name']:<{width}}  {size:>8}  {device:<6}  {context:>7}"
        put(f"{row}  {until(model['expires_at'])}\n")
    return 0


def stop(argv: list[str]) -> int:
    """`stop MODEL`: unload a model of a server."""
    parser = server_parser("stop")
    parser.add_argument("ref", metavar="MODEL", help="a model that `ps` lists")
    args = parser.parse_args(argv)
    loaded = [model["name"] for model in ask(args, "/api/ps")["models"]]
    if plain_name(args.ref) not in map(plain_name, loaded):
        raise ModelNotFoundError(
            f"{args.ref}: not loaded; loaded: {', '.join(loaded) or 'nothing'}"
        )
    ask(args, "/api/generate", {"model": args.ref, "keep_alive": 0, "stream": False})
    log.warning(f"{args.ref} is unloaded")
    return 0


def base(name: str) -> Modelfile:
    """The Modelfile of a model that another one is based on. Raises ModelNotFoundError."""
    path = local_path(name)
    if path is not None:
        return Modelfile(model=os.path.abspath(path))
    try:
        found: Modelfile = extra("api.ollama_models", "a model's copy").base_modelfile(name)
    except ModelNotFoundError:
        remedy = f"get it with: {PROGRAM} pull {name}"
        raise ModelNotFoundError(f"{name}: not on this machine; {remedy}") from None
    return found


def write(name: str, modelfile: Modelfile) -> None:
    extra("api.ollama_models", "a model's copy").write_modelfile(plain_name(name), modelfile)
    log.warning(f"{plain_name(name)} is a model now; {PROGRAM} run {plain_name(name)} runs it")


def cp(argv: list[str]) -> int:
    """`cp MODEL NAME`: a second name for a model, which shares its files."""
    parser = command_parser("cp")
    parser.add_argument("ref", metavar="MODEL", help="a model on this machine, or a path")
    parser.add_argument("name", metavar="NAME", help="its second name: name or name:tag")
    args = parser.parse_args(argv)
    write(args.name, base(args.ref))
    return 0


def create(argv: list[str]) -> int:
    """`create NAME -f Modelfile`: a model with its own system prompt and settings."""
    parser = command_parser("create")
    parser.add_argument("name", metavar="NAME", help="name or name:tag")
    text = "the Modelfile (default: Modelfile in this directory)"
    parser.add_argument("--file", "-f", metavar="FILE", type=Path, default="Modelfile", help=text)
    args = parser.parse_args(argv)
    own = read_modelfile(args.file)
    if not own.model:
        raise UsageError(f"{args.file}: has no FROM")
    under, paths = base(own.model), ("tokenizer", "adapter", "draft", "mmproj")
    if not local_path(own.model) and ModelStore().modelfile(plain_name(own.model)):
        own = dataclasses.replace(own, model=under.model)
    fields = {f.name: getattr(own, f.name) for f in dataclasses.fields(own)}
    fields |= {name: absolute(fields[name]) for name in ("model", *paths)}
    lower = {name: getattr(under, name) for name, value in fields.items() if value in (None, ())}
    parameters = {**under.parameters, **own.parameters}
    write(args.name, Modelfile(**{**fields, **lower, "parameters": parameters}))
    return 0


def absolute(reference: str | None) -> str | None:
    """A reference, or the absolute form of a path, since the Modelfile moves into the store."""
    path = local_path(reference) if reference else None
    return os.path.abspath(path) if path else reference
