"""`nanollama bench --compare PROGRAM`: the same tests by llama.cpp's llama-bench, in turns; with
the folder of that program also its server.

Seam: the option `--compare` of commands.bench, which imports this module. To remove it, delete this
module and that option. It imports commands.bench, and commands.bench_servers for a folder.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanollama import NanollamaError, UsageError, excerpt, extra
from nanollama_extras.commands.bench import Bench

if TYPE_CHECKING:
    from nanollama import LLM, Json

CACHE_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8": "q8_0"}
HEAD = "TEST        DEPTH    NANOLLAMA    LLAMA.CPP    RATIO       RATIOS OF PAIRS"
RULE = "tokens a second, medians of {} pairs in turns, {} threads, {} cache"


@dataclass(frozen=True, slots=True)
class Peer:
    """llama-bench with a file and the settings that both programs have."""

    program: str
    file: str
    threads: int
    kv_dtype: str
    is_cpu: bool

    def rate(self, num_prompt: int, num_gen: int, depth: int) -> float:
        """Tokens per second of one test, after a warm-up of its own. Raises NanollamaError."""
        cache = CACHE_TYPES[self.kv_dtype]
        values = {"-m": self.file, "-t": self.threads, "-ctk": cache, "-ctv": cache, "-r": 1}
        values |= {"-p": num_prompt, "-n": num_gen, "-d": depth, "-o": "json", "-fa": "auto"}
        if self.is_cpu:
            values["-ngl"] = 0
        command = [self.program, *(str(word) for pair in values.items() for word in pair)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace")
        except OSError as error:
            raise NanollamaError(f"--compare {self.program}: {error.strerror or error}") from None
        try:
            rate = float(json.loads(done.stdout)[0]["avg_ts"])
        except (ValueError, LookupError, TypeError):
            last = (done.stderr.strip().splitlines() or ["no output"])[-1]
            problem = f"exit code {done.returncode}: {excerpt(last)}"
            raise NanollamaError(
                f"--compare {self.program}: no result of llama-bench ({problem})"
            ) from None
        if not (math.isfinite(rate) and rate > 0):
            raise NanollamaError(f"--compare {self.program}: {rate} tokens a second")
        return rate


def peer_of(llm: LLM, args: argparse.Namespace, threads: int) -> Peer:
    """The peer for a loaded model. Raises UsageError for what llama-bench cannot measure."""
    file = llm.checkpoint.path
    if file.suffix != ".gguf" or not file.is_file():
        raise UsageError(f"--compare needs a model that is one GGUF file; {file} is none")
    if args.batch != [1]:
        raise UsageError("--compare measures one sequence at a time: leave --batch out")
    if args.quantize or args.adapter:
        raise UsageError("--compare measures the file as it is: leave --quantize and --adapter out")
    decoder = llm.engine.decoder
    is_cpu = decoder.device.type == "cpu"
    program = programs(args.compare)[0]
    return Peer(program, str(file), threads, decoder.kv_dtype, is_cpu)


def programs(given: str) -> list[str]:
    """The programs that `--compare` names: llama-bench, and the server of a folder. Raises
    NanollamaError for one that is not there, or is no program."""
    folder = Path(given)
    names = [given]
    if folder.is_dir():
        names = [str(folder / name) for name in ("llama-bench", "llama-server")]
    for name in names:
        if shutil.which(name) is None:
            problem = "not a program that can be run; give llama-bench, or the folder that has it"
            raise NanollamaError(f"--compare {name}: {problem}")
    return names


def compared(bench: Bench, peer: Peer, args: argparse.Namespace) -> Iterator[Json]:
    """A row for each test; the two programs take turns."""
    tests = [(num, 0) for num in args.prompt_tokens if num]
    tests += [(0, num) for num in args.gen_tokens if num]
    for depth, (num_prompt, num_gen) in itertools.product(args.depth, tests):
        bench.once(1, depth, num_prompt or 1, num_gen)  # warms up
        own: list[float] = []
        theirs: list[float] = []
        for _ in range(args.repetitions):
            seconds, _ = bench.once(1, depth, num_prompt or 1, num_gen)
            own.append((num_prompt or num_gen) / seconds)
            theirs.append(peer.rate(num_prompt, num_gen, depth))
        yield {
            "test": f"pp{num_prompt}" if num_prompt else f"tg{num_gen}",
            "depth": depth,
            "tokens_per_s": statistics.median(own),
            "peer_tokens_per_s": statistics.median(theirs),
            "ratio": statistics.median(own) / statistics.median(theirs),
            "pair_ratios": [a / b for a, b in zip(own, theirs)],
        }


def line(row: Any) -> str:
    """A row of the table."""
    rates = f"{row['tokens_per_s']:>11.1f}  {row['peer_tokens_per_s']:>11.1f}"
    pairs = f"{min(row['pair_ratios']):.2f} to {max(row['pair_ratios']):.2f}"
    return f"{row['test']:<8}  {row['depth']:>7}  {rates}  {row['ratio']:>7.2f}  {pairs:>20}"


def compare(bench: Bench, args: argparse.Namespace, threads: int) -> list[Json]:
    """Measure, and print the table unless `--json` is given. Raises NanollamaError."""
    peer, rows = peer_of(bench.llm, args, threads), []
    show = print if not args.json else lambda *_, **__: None
    show(HEAD)
    for row in compared(bench, peer, args):
        rows.append(row)
        show(line(row), flush=True)
    show(RULE.format(args.repetitions, threads, peer.kv_dtype))
    if Path(args.compare).is_dir():
        servers = extra("commands.bench_servers", "--compare FOLDER")
        rows += servers.compare(peer, bench.llm, args.repetitions, show)
    return rows
