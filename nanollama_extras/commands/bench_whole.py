"""`nanollama bench --compare` without -p, -n and -d: what users wait for beside the tests.

Whole commands from their start to the first token, the time to load, the memory of an idle server,
and the first use of a schema; then the commands that measure the rest. What cannot be measured here
is left out with a line that says why.

Seam: `compare` of commands.bench_peer, which imports this module. To remove it, delete this module
and that line. It imports commands.bench_peer and commands.bench_servers.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nanollama
from nanollama import NanollamaError, excerpt
from nanollama_extras.commands import bench_servers
from nanollama_extras.commands.bench_peer import Peer

if TYPE_CHECKING:
    from nanollama import LLM, Json

HEAD = "WHOLE COMMANDS                          NANOLLAMA     BESIDE IT    RATIO"
PROMPT = "Tell me in a few words where the city of Paris lies."
IDLE_S = 8  # of a server: code that only loading needed is returned 5 s after it
READ_BYTES = 1 << 22  # of a file at a time
ANSWER_TOKENS = 48  # in a form

# Runs a program for its time, the most memory, exit code and last line. In a process of its own,
# since a child's memory counts that of the process that starts it.
WATCH = """
import json, resource, subprocess, sys, time
started = time.perf_counter()
done = subprocess.run(sys.argv[1:], stdin=subprocess.DEVNULL, capture_output=True)
seconds = time.perf_counter() - started
kilobytes = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
last = (done.stderr.decode(errors="replace").strip().splitlines() or ["no output"])[-1]
print(json.dumps([seconds, kilobytes, done.returncode, last]))
"""
LOAD = """
import sys, time, nanollama
started = time.perf_counter()
nanollama.LLM(sys.argv[1])
print(time.perf_counter() - started)
"""
# The time of a request's first preparation, and of each token's mask in an answer.
FORM = """
import json, sys, time, nanollama
llm = nanollama.LLM(sys.argv[1])
fields = json.loads(sys.argv[2])
if "tools" in fields:
    fields["tool_choice"] = nanollama.ToolChoice("required")
request = llm.request(fields)
started = time.perf_counter()
form = llm.prepare(request)
first = time.perf_counter() - started
started = time.perf_counter()
ids = llm.complete(form).token_ids
answer, constraint = time.perf_counter() - started, form.form.constraint.copy()
started = time.perf_counter()
for token_id in ids:
    constraint.allowed()
    constraint.push(token_id)
print(json.dumps([first, (time.perf_counter() - started) / answer]))
"""
KINDS: tuple[Json, ...] = (
    {"type": "string"},
    {"type": "integer"},
    {"type": "boolean"},
    {"type": "array", "items": {"type": "string"}},
    {"type": "string", "enum": ["a", "b", "c"]},
)


def fields_of(number: int) -> Json:
    """An object's schema with so many properties of the usual kinds"""
    names = [f"property_{i}" for i in range(number)]
    kinds = dict(zip(names, itertools.cycle(KINDS)))
    return {"type": "object", "properties": kinds, "required": names[: (number + 1) // 2]}


def tool_of(number: int) -> Json:
    about = {"name": f"tool_{number}", "description": "does it", "parameters": fields_of(6)}
    return {"type": "function", "function": about}


QUESTION = {"role": "user", "content": "Tell me all."}
FORMS: dict[str, Json] = {
    "schema of 200 properties": {"prompt": PROMPT, "schema": fields_of(200)},
    "20 tools": {"messages": [QUESTION], "tools": [tool_of(i) for i in range(20)]},
}
LONGEST = 32_768 + 32  # tokens
# What other commands measure, since it takes minutes or another file
ELSEWHERE = (
    ("16 clients at once", "--model {model} -p 0 -n 16 --compare {folder}"),
    ("decode after 16k and 32k tokens", "{long} -p 0 -n 32 -d 16384,32768 --kv-dtype float16"),
    ("the same, 8-bit cache", "{long} -p 0 -n 32 -d 16384,32768 --kv-dtype q8"),
    ("a prompt of 16k tokens", "{long} -p 16384 -n 0"),
    ("without native kernels", "--model {model} -p 0 -n 16 --kernels torch --dtype bfloat16"),
    ("16-bit weights", "--model FILE_IN_F16 -p 0 -n 32 --kv-dtype float16 --compare {program}"),
)


@dataclass(frozen=True, slots=True)
class Scene:
    """What is measured: a model's file, how often, and the programs beside nanollama."""

    peer: Peer
    llm: LLM
    repetitions: int

    def beside(self, name: str) -> str:
        """A program in llama-bench's folder. Raises NanollamaError."""
        program = Path(self.peer.program).resolve().with_name(name)
        if not os.access(program, os.X_OK):
            raise NanollamaError(f"there is no {name} beside {self.peer.program}")
        return str(program)


def row(test: str, own: float, beside: float | None = None) -> Json:
    ratio = own / beside if beside else None
    return {"test": test, "value": own, "peer_value": beside, "ratio": ratio}


def run_python(code: str, *words: str) -> Any:
    """The JSON that a program in Python prints, which may import nanollama. Raises
    NanollamaError."""
    path = [str(Path(str(nanollama.__file__)).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path))}
    command = [sys.executable, "-c", code, *words]
    done = subprocess.run(command, env=environment, capture_output=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        lines = done.stderr.decode(errors="replace").strip().splitlines() or ["no output"]
        raise NanollamaError(excerpt(lines[-1]))
    return json.loads(done.stdout)


def watched(command: list[str]) -> tuple[float, float]:
    """Seconds that a command takes, and the most bytes of its memory. Raises NanollamaError."""
    seconds, memory, code, last = run_python(WATCH, *command)
    if code:
        raise NanollamaError(f"{command[0]}: exit code {code}: {excerpt(last)}")
    return seconds, memory * (1 if sys.platform == "darwin" else 1024)


def cold_rows(scene: Scene) -> Iterator[Json]:
    """From a command's start to its end after one token, in turns."""
    peer = scene.peer
    own = [sys.executable, str(nanollama.__file__), "--model", peer.file, "--prompt", PROMPT]
    theirs = [scene.beside("llama-completion"), "-m", peer.file, "-p", PROMPT, "-n", "1"]
    theirs += ["-t", str(peer.threads), "-no-cnv", *(["-ngl", "0"] if peer.is_cpu else [])]
    pair = [[*own, "-m", "1", "--quiet"], theirs]
    runs: list[list[tuple[float, float]]] = [[], []]
    for _, (command, found) in itertools.product(range(scene.repetitions + 1), zip(pair, runs)):
        found.append(watched(command))
    for place, (name, unit) in enumerate((("one token, s", 1), ("its most memory, MB", 1e6))):
        values = [statistics.median(run[place] for run in found[1:]) / unit for found in runs]
        yield row(f"cold start to {name}" if not place else name, *values)


def load_rows(scene: Scene) -> Iterator[Json]:
    """The time to load, beside that of reading the file, in turns."""
    own, read = list[float](), list[float]()
    for _ in range(scene.repetitions):
        own.append(run_python(LOAD, scene.peer.file))
        started = time.perf_counter()
        with Path(scene.peer.file).open("rb", buffering=0) as file:
            buffer = bytearray(READ_BYTES)
            while file.readinto(buffer):
                pass
        read.append(time.perf_counter() - started)
    yield row("load (beside: read the file), s", statistics.median(own), statistics.median(read))


def idle_memory(command: list[str]) -> float:
    """Megabytes of a server, a while after its first answer."""
    with bench_servers.serving(command) as server:
        server.stream(PROMPT, 16)
        time.sleep(IDLE_S)
        return server.resident_bytes() / 1e6


def idle_rows(scene: Scene) -> Iterator[Json]:
    """The memory of idle servers."""
    n_ctx = min(scene.llm.config.n_ctx, 2 * bench_servers.PROMPT_TOKENS)
    own, theirs = bench_servers.commands(scene.peer, n_ctx)
    file_mb = Path(scene.peer.file).stat().st_size / 1e6
    try:
        scene.beside("llama-server")
        other = idle_memory(theirs)
    except NanollamaError:
        other = None
    name = f"idle server (the file: {file_mb:.0f}), MB"
    yield row(name, idle_memory(own), other)


def form_rows(scene: Scene) -> Iterator[Json]:
    """Answers in a form: the first one, and the part of a token's time that its mask takes."""
    for name, fields in FORMS.items():
        greedy = {"max_tokens": ANSWER_TOKENS, "temperature": 0}
        words = scene.peer.file, json.dumps({**fields, **greedy})
        runs = [run_python(FORM, *words) for _ in range(scene.repetitions)]
        first, share = (statistics.median(values) for values in zip(*runs))
        yield row(f"first {name}, ms", 1000 * first)
        yield row("  masks, % of a token's time", 100 * share)


FIGURES: dict[str, Callable[[Scene], Iterator[Json]]] = {
    "cold start": cold_rows,
    "load": load_rows,
    "idle server": idle_rows,
    "schemas and tools": form_rows,
}


def line(found: Json) -> str:
    """A row of the table."""
    values = (found["value"], found["peer_value"], found["ratio"])
    shown = ("-" if value is None else f"{value:.3g}" for value in values)
    own, beside, ratio = shown
    return f"{found['test']:<36}  {own:>11}  {beside:>12}  {ratio:>7}"


def elsewhere(scene: Scene) -> Iterator[str]:
    """The lines that name the commands for the rest."""
    program, model = scene.peer.program, scene.peer.file
    names = {"model": model, "program": program, "folder": str(Path(program).parent)}
    long = model if scene.llm.config.n_ctx > LONGEST else "FILE_OF_LONG_CONTEXT"
    names["long"] = f"--model {long} --compare {program} -r 3"
    yield "\nMEASURED BY"
    for what, options in ELSEWHERE:
        yield f"{what:<34}nanollama bench {options.format(**names)}"


def compare(peer: Peer, llm: LLM, repetitions: int, show: Callable[[str], Any]) -> list[Json]:
    """Measure whole commands -> rows, each also given to `show` as a line."""
    scene = Scene(peer, llm, repetitions)
    rows: list[Json] = []
    show(f"\n{HEAD}")
    for name, figures in FIGURES.items():
        try:
            for found in figures(scene):
                rows.append(found)
                show(line(found))
        except NanollamaError as error:
            show(f"{name}: left out: {error}")
    for text in elsewhere(scene):
        show(text)
    return rows
