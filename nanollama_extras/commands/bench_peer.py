"""`nanollama bench --compare PROGRAM`: the same tests by llama.cpp's llama-bench, in turns; without
-p, -n and -d whole commands too, and with the folder of that program its server.

Seam: the option `--compare` of commands.bench, which imports this module. To remove it, delete this
module and that option. It imports commands.bench, commands.bench_servers for a folder, and
commands.bench_whole for whole commands.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import math
import shutil
import statistics
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nanollama import NanollamaError, UsageError, excerpt, extra
from nanollama_extras.commands.bench import (
    Bench,
    multiply_adds,
    multiply_rate,
    read_bandwidth,
    torch_or_stand_in,
)

if TYPE_CHECKING:
    from nanollama import LLM, Json

CACHE_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16", "q8": "q8_0"}
HEAD = "TEST      THREADS  DEPTH    NANOLLAMA    LLAMA.CPP    RATIO     RATIOS OF PAIRS  OF LIMIT"
RULE = """tokens a second, medians of {} pairs in turns, {} cache; limits: int8 multiply-adds that
the threads reach in registers, for prompts, and the memory that they read, for answers"""


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


@dataclass(frozen=True, slots=True)
class Test:
    """A prompt or an answer of so many tokens, after `depth` tokens."""

    num_prompt: int
    num_gen: int
    depth: int
    threads: int

    @property
    def name(self) -> str:
        return f"pp{self.num_prompt}" if self.num_prompt else f"tg{self.num_gen}"

    def own_rate(self, bench: Bench) -> tuple[float, float]:
        """nanollama's tokens per second, and the part of the machine's limit that they are."""
        decoder = bench.llm.engine.decoder
        run = bench.once(1, self.depth, self.num_prompt or 1, self.num_gen)
        rate = (self.num_prompt or self.num_gen) / run[0]
        if self.num_prompt:
            is_float = bench.llm.checkpoint.quantization in ("F32", "F16", "BF16")
            most = math.nan if is_float else multiply_rate(decoder.backend)
            return rate, rate * multiply_adds(decoder) / most
        step_bytes = bench.step_bytes(1, self.depth, self.num_gen)
        bandwidth = read_bandwidth(bench.buffer, decoder.backend)
        return rate, step_bytes * run[1] / run[0] / bandwidth


def tests_of(args: argparse.Namespace, threads: int) -> list[Test]:
    """What is measured; in the whole table, answers with one thread, too."""
    found = [
        Test(num_prompt, num_gen, depth, threads)
        for depth in args.depth
        for num_prompt, num_gen in [
            *((num, 0) for num in args.prompt_tokens if num),
            *((0, num) for num in args.gen_tokens if num),
        ]
    ]
    if args.is_whole and threads > 1:
        found += [dataclasses.replace(each, threads=1) for each in found if each.num_gen]
    return found


@contextlib.contextmanager
def on_threads(bench: Bench, count: int) -> Iterator[None]:
    """Run nanollama on `count` threads; decode steps too, if that is not their usual number."""
    own, steps = torch_or_stand_in(), bench.llm.engine.decode_steps
    before, choice = own.get_num_threads(), getattr(steps, "threads", None)
    own.set_num_threads(count)
    if choice and count != before:
        cast("Any", steps).threads = None
    try:
        yield
    finally:
        own.set_num_threads(before)
        if choice:
            cast("Any", steps).threads = choice


def compared(bench: Bench, peer: Peer, args: argparse.Namespace) -> Iterator[Json]:
    """A row for each test; the two programs take turns."""
    for test in tests_of(args, peer.threads):
        other = dataclasses.replace(peer, threads=test.threads)
        own: list[tuple[float, float]] = []
        theirs: list[float] = []
        with on_threads(bench, test.threads):
            bench.once(1, test.depth, test.num_prompt or 1, test.num_gen)  # warms up
            for _ in range(args.repetitions):
                own.append(test.own_rate(bench))
                theirs.append(other.rate(test.num_prompt, test.num_gen, test.depth))
        rates = [rate for rate, _ in own]
        yield {
            "test": test.name,
            "threads": test.threads,
            "depth": test.depth,
            "tokens_per_s": statistics.median(rates),
            "peer_tokens_per_s": statistics.median(theirs),
            "ratio": statistics.median(rates) / statistics.median(theirs),
            "pair_ratios": [a / b for a, b in zip(rates, theirs)],
            "limit_fraction": known(statistics.median(part for _, part in own)),
        }


def known(value: float) -> float | None:
    """A number, or None for NaN, which JSON has not."""
    return None if math.isnan(value) else value


def line(row: Any) -> str:
    """A row of the table."""
    rates = f"{row['tokens_per_s']:>11.1f}  {row['peer_tokens_per_s']:>11.1f}"
    pairs = f"{min(row['pair_ratios']):.2f} to {max(row['pair_ratios']):.2f}"
    limit = row["limit_fraction"]
    part = "-" if limit is None else f"{limit:.0%}"
    place = f"{row['test']:<8}  {row['threads']:>7}  {row['depth']:>5}"
    return f"{place}  {rates}  {row['ratio']:>7.2f}  {pairs:>18}  {part:>8}"


def compare(bench: Bench, args: argparse.Namespace, threads: int) -> list[Json]:
    """Measure, and print the table unless `--json` is given. Raises NanollamaError."""
    peer, rows = peer_of(bench.llm, args, threads), []
    show: Any = print if not args.json else lambda *_, **__: None
    show(HEAD)
    for row in compared(bench, peer, args):
        rows.append(row)
        show(line(row), flush=True)
    show(RULE.format(args.repetitions, peer.kv_dtype))
    if args.is_whole:
        whole = extra("commands.bench_whole", "--compare without -p, -n and -d")
        rows += whole.compare(peer, bench.llm, args.repetitions, show)
    if Path(args.compare).is_dir():
        servers = extra("commands.bench_servers", "--compare FOLDER")
        rows += servers.compare(peer, bench.llm, args.repetitions, show)
    return rows
