"""`nanollama bench --compare FOLDER`: what users of a server wait for, beside llama-server.

Both servers run the same GGUF file with the same threads, type of cache and clients, one after the
other. Measured are the time from a program's start to the first token of an answer, the server's
memory after it, and then many clients at once: tokens per second, the time to the first token and
the gaps between tokens.

Seam: `--compare` of commands.bench_peer, which imports this module where it names a folder. To
remove it, delete this module and that line. It imports commands.bench_peer.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nanollama
from nanollama import NanollamaError, excerpt
from nanollama_extras.commands.bench_peer import CACHE_TYPES, Peer

if TYPE_CHECKING:
    from nanollama import LLM, Json

START_S, ANSWER_S = 300, 900  # how long a server may take to start, and a client to be answered
CLIENTS, REQUESTS = 16, 3  # clients at once, requests of each
PROMPT_TOKENS, ANSWER_TOKENS = 500, 64  # of each request
MARKS = {"p50": 0.5, "p99": 0.99}  # name -> the part of all values that are smaller
HEAD = "AS SERVERS                         NANOLLAMA    LLAMA.CPP    RATIO"


@dataclass(frozen=True, slots=True)
class Server:
    """A running server: its process, port, and when it was started (`time.perf_counter`)."""

    process: subprocess.Popen[bytes]
    port: int
    started: float

    def stream(self, prompt: str, num_tokens: int) -> tuple[float, list[float], int]:
        """Seconds to the first token of an answer, those between tokens, and how many tokens it
        has. Raises NanollamaError."""
        body = {
            "prompt": prompt,
            "max_tokens": num_tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
            "ignore_eos": True,
        }
        times, usage, line, asked = [], 0, b"", time.perf_counter()
        try:
            with contextlib.closing(self.connection(ANSWER_S)) as client:
                headers = {"content-type": "application/json"}
                client.request("POST", "/v1/completions", json.dumps(body), headers)
                answer = client.getresponse()
                for line in answer:
                    if line.startswith(b"data: {"):
                        event = json.loads(line[6:])
                        usage = (event.get("usage") or {}).get("completion_tokens", usage)
                        if any(choice["text"] for choice in event["choices"]):
                            times.append(time.perf_counter())
        except (OSError, http.client.HTTPException, ValueError, LookupError) as error:
            raise NanollamaError(f"port {self.port}: no answer: {error!r}") from None
        if not times:
            said = excerpt(line.decode(errors="replace"))
            raise NanollamaError(f"port {self.port}: status {answer.status}, no text: {said}")
        gaps = [after - before for before, after in itertools.pairwise(times)]
        return times[0] - asked, gaps, usage

    def connection(self, timeout: float) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)

    def is_ready(self) -> bool:
        with contextlib.closing(self.connection(5)) as client:
            try:
                client.request("GET", "/health")
                return client.getresponse().status == 200
            except (OSError, http.client.HTTPException):
                return False

    def resident_bytes(self) -> float:
        """Resident memory, pages of files included; NaN where the system has no /proc."""
        status = Path(f"/proc/{self.process.pid}/status")
        try:
            return 1024 * float(re.findall(r"VmRSS:\s+(\d+) kB", status.read_text())[0])
        except (OSError, IndexError):
            return float("nan")


@contextlib.contextmanager
def serving(command: list[str]) -> Iterator[Server]:
    """Start a server on a free port, and wait until it answers. Raises NanollamaError."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        try:
            process = subprocess.Popen([*command, "--port", str(port)], stdout=log, stderr=log)
        except OSError as error:
            raise NanollamaError(f"{command[0]} does not run: {error.strerror or error}") from None
        server = Server(process, port, started)
        try:
            while not server.is_ready():
                if process.poll() is not None or time.perf_counter() - started > START_S:
                    log.seek(0)
                    last = (log.read().decode(errors="replace").strip() or "no output").splitlines()
                    raise NanollamaError(f"{command[0]} does not serve: {excerpt(last[-1])}")
                time.sleep(0.01)
            yield server
        finally:
            process.terminate()
            process.wait()


def commands(peer: Peer, n_ctx: int) -> list[list[str]]:
    """nanollama's command and llama-server's, with the settings that both have."""
    threads, slots = str(peer.threads), str(CLIENTS)
    own = [sys.executable, str(nanollama.__file__), "--serve", "--model", peer.file]
    own += ["--threads", threads, "--parallel", slots, "--ctx", str(n_ctx)]
    own += ["--kv-dtype", peer.kv_dtype]
    cache = CACHE_TYPES[peer.kv_dtype]
    program = str(Path(peer.program).with_name("llama-server"))
    theirs = [program, "-m", peer.file, "-t", threads, "-np", slots, "-fa", "auto"]
    theirs += ["-c", str(CLIENTS * n_ctx), "-ctk", cache, "-ctv", cache]
    return [own, [*theirs, *(["-ngl", "0"] if peer.is_cpu else [])]]


def prompt_of(llm: LLM, number: int) -> str:
    """A text of about PROMPT_TOKENS tokens that no other number has."""
    words = (str(number * 7919 + i * 31) for i in itertools.count())
    text = f"Go on, number {number}:"
    while len(llm.encode(text)) < PROMPT_TOKENS:
        text = f"{text} {' '.join(itertools.islice(words, 8))}"
    return text


def measured(server: Server, llm: LLM) -> dict[str, float]:
    """One run of one server: name of a figure -> seconds, bytes or tokens per second."""
    server.stream("Say hello.", 1)
    figures = {"start to first token, s": time.perf_counter() - server.started}
    figures["memory after it, MB"] = server.resident_bytes() / 1e6
    prompts = [prompt_of(llm, number) for number in range(CLIENTS * REQUESTS)]
    begun = time.perf_counter()
    with ThreadPoolExecutor(CLIENTS) as threads:
        done = list(threads.map(lambda text: server.stream(text, ANSWER_TOKENS), prompts))
    seconds = time.perf_counter() - begun
    figures[f"{CLIENTS} clients, tokens/s"] = sum(tokens for *_, tokens in done) / seconds
    waits = {
        "to first token": [first for first, _, _ in done],
        "between tokens": [gap for _, gaps, _ in done for gap in gaps] or [0.0],
    }
    for (name, values), (mark, part) in itertools.product(waits.items(), MARKS.items()):
        value = sorted(values)[min(int(part * len(values)), len(values) - 1)]
        figures[f"{name} {mark}, ms"] = 1000 * value
    return figures


def compared(peer: Peer, llm: LLM, repetitions: int) -> Iterator[Json]:
    """A row for each figure, of medians; the servers take turns."""
    n_ctx = min(llm.config.n_ctx, 2 * PROMPT_TOKENS + ANSWER_TOKENS)
    pair = commands(peer, n_ctx)
    runs: list[list[dict[str, float]]] = [[], []]
    for _, (command, own) in itertools.product(range(repetitions), zip(pair, runs)):
        with serving(command) as server:
            own.append(measured(server, llm))
    for name in runs[0][0]:
        ours, theirs = (statistics.median(run[name] for run in own) for own in runs)
        yield {"test": name, "value": ours, "peer_value": theirs, "ratio": ours / theirs}


def compare(peer: Peer, llm: LLM, repetitions: int, show: Callable[[str], Any]) -> list[Json]:
    """Measure the servers -> rows, each also given to `show` as a line. Raises NanollamaError."""
    show(f"\n{HEAD}")
    rows = []
    for row in compared(peer, llm, repetitions):
        rows.append(row)
        values = f"{row['value']:>12.4g} {row['peer_value']:>12.4g} {row['ratio']:>8.2f}"
        show(f"{row['test']:<32}{values}")
    return rows
