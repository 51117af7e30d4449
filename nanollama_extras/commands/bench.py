"""`nanollama bench`: how fast a model runs here, and how near to the limit of its memory.

Seam: Command (the row "bench" of COMMANDS in nanollama.py). To remove it, delete this
module and that row.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import dataclasses
import functools
import itertools
import json
import math
import random
import re
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from nanollama import (
    GenerationRequest,
    MoE,
    Projection,
    SamplingParams,
    UsageError,
    add_model_options,
    command_parser,
    extra,
    human_bytes,
    library,
    notify,
    option_group,
    preferred,
    read_settings,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from nanollama import LLM, Backend, Decoder, Engine, Fields, Json, Settings


BANDWIDTH_BYTES = 1 << 29  # size of the buffer to read, larger than any cache


BANDWIDTH_S = 0.5  # duration of a measurement of the bandwidth
ARITHMETIC_S, ARITHMETIC_ROUNDS = 0.2, 20_000  # duration of one of the arithmetic; rounds of a call


GREEDY = SamplingParams(temperature=0, repeat_penalty=1, ignore_eos=True)


def torch_or_stand_in() -> Any:
    """torch, or its stand-in: as in other modes, native kernels run without torch."""
    return preferred("kernels.arrays", "stand_in", library)("torch")


def read_bandwidth(buffer: Tensor, backend: Backend) -> float:
    """Bytes per second at which the threads read `buffer`, over many passes, since the speed of a
    shared machine varies."""
    started, num_passes, seconds = time.perf_counter(), 0, 0.0
    read_all = getattr(backend, "read_all", lambda x: x.sum().item())  # native kernels have one
    while seconds < BANDWIDTH_S:
        read_all(buffer)
        num_passes += 1
        seconds = time.perf_counter() - started
    return num_passes * buffer.nbytes / seconds


def multiply_rate(backend: Backend) -> float:
    """Multiply-adds of int8 numbers per second that the threads reach in registers; NaN where the
    kernels are not native."""
    if not hasattr(backend, "run_kernel"):
        return math.nan
    library, total = extra("kernels.native", "native kernels").load_kernels(), ctypes.c_int64()
    num_threads = torch_or_stand_in().get_num_threads()
    started, done, seconds = time.perf_counter(), 0, 0.0
    while seconds < ARITHMETIC_S:
        done += library.multiply_all(ctypes.byref(total), ARITHMETIC_ROUNDS, num_threads)
        seconds = time.perf_counter() - started
    return done / seconds


def peak_memory() -> int:
    """Most bytes that this process has had resident; 0 where the system does not say."""
    with contextlib.suppress(OSError, IndexError):  # on Linux, getrusage counts the parent in
        status = Path("/proc/self/status").read_text()
        return 1024 * int(status.partition("VmHWM:")[2].split()[0])
    try:
        import resource
    except ImportError:  # not there on Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


BLOCKS = ("self_attn", "mamba", "mlp")  # of a layer, which may lack some


def matrices(decoder: Decoder) -> list[Projection]:
    """The matrices that every step multiplies by: all projections, but only as many experts as one
    token uses, and no embedding tables, of which a step reads single rows; the head's is last."""
    blocks = (vars(layer).get(name) for layer in decoder.layers for name in BLOCKS)
    modules: list[Any] = [block for block in blocks if block is not None]
    mixtures = [module for module in modules if isinstance(module, MoE)]
    modules += [mlp for m in mixtures for mlp in m.experts[: m.config.num_used]]
    modules += [m.shared_expert for m in mixtures if m.shared_expert]
    found = ((name, m) for module in modules for name, m in vars(module).items())
    projections = [m for name, m in found if isinstance(m, Projection) and name != "value_embed"]
    return [*projections, decoder.lm_head]


def weight_bytes(decoder: Decoder) -> int:
    """Bytes of the matrices that every step reads"""
    return sum(m.nbytes for m in matrices(decoder))


def multiply_adds(decoder: Decoder) -> int:
    """Multiply-adds of a prompt's token with the matrices; only its last token needs the head's."""
    parts = (part for m in matrices(decoder)[:-1] for part in m.parts)
    return sum(math.prod(part.shape) for part in parts)


class Bench:
    """Runs prompts of random ids through an engine and measures the time."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.random = llm, random.Random(0)
        self.peak_before, self.device = peak_memory(), llm.engine.decoder.device
        self.buffer, self.past = self.new_buffer(), list[list[int]]([[]])
        notify("kernels.memory", "join_pages")  # what a program in use does in the background

    def new_buffer(self) -> Tensor:
        """Memory to read, in pages like those of the weights"""
        own = torch_or_stand_in()

        def plain(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
            return cast("Tensor", own.empty(shape, dtype=dtype, device=self.device))

        pages = preferred("kernels.memory", "large_pages", plain)
        new = pages if self.device.type == "cpu" else plain
        buffer = new((BANDWIDTH_BYTES // 4,), own.float32)
        buffer[...] = 1
        return buffer

    def peak_memory(self) -> int:
        """Most bytes of the process, without the buffer, which exists all the time."""
        buffer_bytes = self.buffer.nbytes if self.device.type == "cpu" else 0
        return max(self.peak_before, peak_memory() - buffer_bytes)

    def run(self, prompts: list[list[int]], num_gen: int) -> tuple[float, int]:
        """Read prompts together and generate `num_gen` tokens for each -> seconds, steps"""
        params = dataclasses.replace(GREEDY, max_tokens=num_gen)
        for ids in prompts:
            self.llm.start(GenerationRequest(ids, params=params))
        started, num_steps = time.perf_counter(), 0
        while self.llm.engine.has_work:
            self.llm.engine.step()
            num_steps += 1
        return time.perf_counter() - started, num_steps

    def once(self, batch: int, depth: int, num_prompt: int, num_gen: int) -> tuple[float, int]:
        """`run` with new prompts whose first `depth` tokens are already in the cache. They are the
        same in all runs of a depth, so only the first one reads them."""
        if not depth or (batch, depth) != (len(self.past), len(self.past[0])):
            self.llm.engine.forget()
            self.past = self.random_ids(batch, depth)
        if depth:
            self.run(self.past, 0)
        new = self.random_ids(batch, num_prompt)
        return self.run([past + ids for past, ids in zip(self.past, new)], num_gen)

    def random_ids(self, num_rows: int, num: int) -> list[list[int]]:
        ids = range(self.llm.config.n_vocab)
        return [self.random.choices(ids, k=num) for _ in range(num_rows)]

    def prefill(self, batch: int, depth: int, num_prompt: int, repetitions: int) -> Json:
        """The speed of reading prompts, after one warm-up run."""
        seconds = [self.once(batch, depth, num_prompt, 0)[0] for _ in range(repetitions + 1)]
        rates = [batch * num_prompt / s for s in seconds[1:]]
        return speed(f"pp{num_prompt}", batch, depth, rates)

    def step_bytes(self, batch: int, depth: int, num_gen: int) -> int:
        """Bytes that a decode step reads, a mean of the answer's."""
        decoder, num_tokens = self.llm.engine.decoder, depth + (num_gen + 1) // 2
        kv_bytes = batch * decoder.config.kv_bytes(num_tokens, decoder.kv_dtype, 1)
        return weight_bytes(decoder) + int(kv_bytes)

    def decode(self, batch: int, depth: int, num_gen: int, repetitions: int) -> Json:
        """The speed of generating, after one warm-up run, and its share of the memory bandwidth: a
        step reads all weights, and the keys and values of each sequence."""
        decoder, rates, reads, machine = self.llm.engine.decoder, [], [], []
        step_bytes = self.step_bytes(batch, depth, num_gen)
        for _ in range(repetitions + 1):
            seconds, num_steps = self.once(batch, depth, 1, num_gen)
            rates.append(batch * num_gen / seconds)
            reads.append(step_bytes * num_steps / seconds)
            machine.append(read_bandwidth(self.buffer, decoder.backend))
        per_s, bandwidth = statistics.mean(reads[1:]), statistics.mean(machine[1:])
        return {
            **speed(f"tg{num_gen}", batch, depth, rates[1:]),
            "bytes_per_step": step_bytes,
            "bytes_per_s": per_s,
            "read_bandwidth": bandwidth,
            "bandwidth_fraction": per_s / bandwidth,
        }


def speed(test: str, batch: int, depth: int, samples: list[float]) -> Json:
    """A result: mean and standard deviation of tokens per second."""
    row = {"test": test, "batch": batch, "depth": depth, "tokens_per_s": statistics.mean(samples)}
    stddev = statistics.stdev(samples) if len(samples) > 1 else 0.0
    return {**row, "stddev": stddev, "samples": samples}


def bench_line(row: Fields) -> str:
    """A result as a line of the table."""
    rate = f"{row['tokens_per_s']:.1f} ± {row['stddev']:.1f}"
    line = f"{row['test']:<8}  {row['batch']:>5}  {row['depth']:>6}  {rate:>17}"
    if "bytes_per_s" not in row:
        return line
    reads, machine = human_bytes(row["bytes_per_s"]), human_bytes(row["read_bandwidth"])
    return f"{line}  {reads + '/s':>11}  {machine + '/s':>11}  {row['bandwidth_fraction']:>7.0%}"


def numbers(text: str, least: int) -> list[int]:
    """1,16 -> [1, 16]"""
    if re.fullmatch(r"\d{1,9}(,\d{1,9})*", text):
        values = [int(word) for word in text.split(",")]
        if min(values) >= least:
            return values
    expected = f"whole numbers from {least} up, with commas between them"
    raise argparse.ArgumentTypeError(f"{text!r} is not {expected}")


def bench_parser() -> argparse.ArgumentParser:
    # --dtype leaves -d to --depth
    parser = command_parser("bench", conflict_handler="resolve")
    parser.add_argument("ref", nargs="?", metavar="MODEL")
    add_model_options(parser)
    add = option_group(parser, "bench")
    for flags, least, default, text in (
        ("-p --prompt-tokens", 0, 512, "prompt lengths; 0 for none"),
        ("-n --gen-tokens", 0, 128, "answer lengths; 0 for none"),
        ("-d --depth", 0, 0, "tokens in the cache before the measurement"),
        ("-b --batch", 1, 1, "sequences at once"),
    ):
        kind, shown = functools.partial(numbers, least=least), f"{text} (default: {default})"
        add(f"{flags} N,..", shown, kind, default=[default])
    text = "measured runs, after a warm-up run (default: 3)"
    add("-r --repetitions N", text, int, default=3)
    text = "take turns with llama.cpp's llama-bench on the same GGUF file; without -p, -n and -d, "
    text += "compare whole commands too; with the folder of that program, also llama-server"
    add("--compare PROGRAM", text)
    add("--json", "print one JSON object instead of a table", action="store_true")
    return parser


def bench_rows(bench: Bench, args: argparse.Namespace) -> Iterator[Json]:
    """The results, one after the other."""
    for batch, depth in itertools.product(args.batch, args.depth):
        for num in filter(None, args.prompt_tokens):
            yield bench.prefill(batch, depth, num, args.repetitions)
        for num in filter(None, args.gen_tokens):
            yield bench.decode(batch, depth, num, args.repetitions)


def measure(bench: Bench, args: argparse.Namespace) -> list[Json]:
    """The results, printed as they come unless `--json` is given."""
    rows = []
    if not args.json:
        print("TEST      BATCH   DEPTH           TOKENS/S        READS    BANDWIDTH  REACHED")
    for row in bench_rows(bench, args):
        rows.append(row)
        if not args.json:
            print(bench_line(row), flush=True)
    return rows


def threads_used(engine: Engine) -> dict[str, int]:
    """The threads in use."""

    def plain(_: Engine) -> dict[str, int]:
        return {"threads": torch_or_stand_in().get_num_threads()}

    used: dict[str, int] = preferred("kernels.thread_choice", "threads_used", plain)(engine)
    return used


def bench_model(settings: Settings, bench: Bench) -> Json:
    """The model, device and memory of the measurement."""
    llm, packed = bench.llm, settings.args.quantize
    kind = llm.checkpoint.quantization
    return {
        "model": settings.model,
        "quantization": f"{kind} to {packed}" if packed else kind,
        "device": str(bench.device),
        "kernels": llm.engine.decoder.kernels,
        "kv_dtype": llm.engine.decoder.kv_dtype,
        **threads_used(llm.engine),
        "weight_bytes": weight_bytes(llm.engine.decoder),
        "peak_memory_bytes": bench.peak_memory(),
    }


def run(argv: list[str]) -> int:
    """The command. Returns the exit code."""
    parser = bench_parser()
    args = parser.parse_args(argv)
    if args.repetitions < 1:
        parser.error(f"repetitions is {args.repetitions}; it must be at least 1")
    if not any(args.prompt_tokens + args.gen_tokens):
        parser.error("--prompt-tokens 0 and --gen-tokens 0 leave nothing to measure")
    usual = ("prompt_tokens", "gen_tokens", "depth")
    args.is_whole = all(getattr(args, name) is parser.get_default(name) for name in usual)
    args.parallel = max(args.parallel or 0, *args.batch)
    settings = read_settings(args)
    llm = settings.load(needs_text=False)
    length = max(args.depth) + max(*args.prompt_tokens, *args.gen_tokens) + 1
    if length > llm.engine.n_ctx:
        raise UsageError(f"the test needs {length} tokens; the context holds {llm.engine.n_ctx}")
    bench = Bench(llm)
    if args.compare:
        peer = extra("commands.bench_peer", "--compare")
        rows = peer.compare(bench, args, torch_or_stand_in().get_num_threads())
    else:
        rows = measure(bench, args)
    about = bench_model(settings, bench)
    if args.json:
        print(json.dumps({**about, "results": rows}, ensure_ascii=False, indent=1))
    else:
        memory = human_bytes(about["peak_memory_bytes"])
        threads, now = about["threads"], about.get("decode_threads", about["threads"])
        chosen = f" ({now} in the last decode steps)" if now != threads else ""
        where = f"{about['device']}, {threads} threads{chosen}, peak memory {memory}"
        print(f"{about['model']} ({about['quantization']}), {where}")
    return 0
