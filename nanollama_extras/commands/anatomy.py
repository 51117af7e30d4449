"""`nanollama explain MODEL`: what a model consists of, what a token costs, and what limits it.

Adds       parameters, bytes and multiply-adds of every part, the code that runs it, a drawing of
           each kind of layer, and the bound that this machine's memory and arithmetic set; with
           --run, what is reached and where the time goes. Of a model that is not here, only
           config.json and the headers of its weights are fetched.
Seam       Command (the row "explain" of COMMANDS in nanollama.py).
Imports    commands.bench, for the memory's bandwidth and --run; models.sketch, models.dissection,
           models.part_times; files.headers, where it is installed.
Remove     delete this file, anatomy.html, models/sketch.py, dissection.py, part_times.py and that
           row.
"""

from __future__ import annotations

import argparse
import html
import itertools
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanollama import (
    LazyModule,
    ModelStore,
    Settings,
    UsageError,
    add_model_options,
    command_parser,
    extra,
    human_bytes,
    open_checkpoint,
    option_group,
    put,
    read_settings,
)

if TYPE_CHECKING:
    import torch

    from nanollama import Backend, Checkpoint, Json
    from nanollama_extras.models.sketch import SketchWeights
else:
    torch = LazyModule("torch")

ARITHMETIC_S = 0.3  # duration of the measurement of arithmetic
BATCH_ROWS = 256  # tokens at once: arithmetic, and not memory, then limits a product
MOST_SAMPLE = 1 << 22  # weights of the matrix that is multiplied
GEN_TOKENS = 32  # of --run
NAME_WIDTH = 34


# ---- the model -----------------------------------------------------------------------------------


def find(settings: Settings, revision: str | None) -> tuple[Checkpoint, int | None]:
    """A model that is here, or the headers of one on the hub with the bytes that were read."""
    if path := ModelStore().find(settings.model, revision):
        return open_checkpoint(path), None
    remote = extra("files.headers", f"{settings.model} without a download")
    checkpoint, num_bytes = remote.open_remote(settings.model, revision)
    return checkpoint, num_bytes


def explained(settings: Settings, depth: int) -> tuple[Json, SketchWeights]:
    """What is known without running the model. Raises NanollamaErrors."""
    from nanollama_extras.models.dissection import dissect, kernel_lines
    from nanollama_extras.models.sketch import sketch

    checkpoint, num_fetched = find(settings, settings.args.revision)
    decoder, weights = sketch(checkpoint, settings.engine())
    found = {
        "model": settings.model,
        "fetched_bytes": num_fetched,
        **dissect(checkpoint, decoder, weights, depth),
    }
    if hasattr(weights.backend, "run_kernel"):
        found["product_code"] = kernel_lines()["linear"]
        found["attention_code"] = kernel_lines()["attention"]
    return found, weights


# ---- the bound -----------------------------------------------------------------------------------


def multiply_rate(weights: SketchWeights) -> float:
    """Multiply-adds per second of products with a matrix of the model's main kind, many tokens at
    once."""
    from nanollama_extras.models.part_times import synchronize

    matrices = [each for each in weights.taken.values() if each.is_matrix and len(each.shape) == 2]
    largest = max(matrices, key=lambda each: each.num_bytes and each.num_parameters)
    num_cols = largest.shape[1]
    num_rows = max(1, min(largest.shape[0], MOST_SAMPLE // num_cols))
    projection = weights.backend.linear([weights.sample(largest.name, num_rows)])
    x = torch.randn(BATCH_ROWS, num_cols).to(weights.device, weights.dtype)
    with torch.inference_mode():
        projection(x)
        synchronize(weights.device)
        started, count, seconds = time.perf_counter(), 0, 0.0
        while seconds < ARITHMETIC_S:
            projection(x)
            synchronize(weights.device)
            count += 1
            seconds = time.perf_counter() - started
    return count * BATCH_ROWS * num_rows * num_cols / seconds


def bandwidth_of(backend: Backend) -> float:
    """Bytes per second that this machine reads, as `bench` measures it."""
    from nanollama_extras.commands.bench import BANDWIDTH_BYTES, read_bandwidth

    return read_bandwidth(torch.ones(BANDWIDTH_BYTES // 4, device=backend.device), backend)


def bound(found: Json, weights: SketchWeights) -> Json:
    """The most tokens per second, of one sequence, that memory and arithmetic allow here."""
    token = found["token"]
    bandwidth, rate = bandwidth_of(weights.backend), multiply_rate(weights)
    by = {"memory": bandwidth / token["read_bytes"], "arithmetic": rate / token["multiply_adds"]}
    return {
        "read_bandwidth": bandwidth,
        "multiply_adds_per_s": rate,
        "threads": torch.get_num_threads(),
        "tokens_per_s": min(by.values()),
        "by": min(by, key=lambda name: by[name]),
        **{f"{name}_tokens_per_s": value for name, value in by.items()},
    }


def measured(settings: Settings, depth: int) -> Json:
    """What the model reaches, and where the time of a token goes."""
    from nanollama_extras.commands.bench import Bench
    from nanollama_extras.models.part_times import part_times

    settings.args.parallel = settings.args.parallel or 1
    llm = settings.load(needs_text=False)
    if depth + GEN_TOKENS + 1 >= llm.engine.n_ctx:
        raise UsageError(f"--depth {depth} leaves no room in a context of {llm.engine.n_ctx}")
    speed = Bench(llm).decode(1, depth, GEN_TOKENS, 2)
    times = part_times(llm, depth)
    token_s = 1 / speed["tokens_per_s"]
    return {
        "tokens_per_s": speed["tokens_per_s"],
        "token_s": token_s,
        "read_bandwidth": speed["read_bandwidth"],
        **times,
        "engine_s": max(0.0, token_s - times["step_s"]),
    }


# ---- the terminal --------------------------------------------------------------------------------


def count(num: float) -> str:
    """12345678 -> '12.3 M'"""
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if num >= factor:
            return f"{num / factor:.1f} {unit}"
    return f"{num:.0f}"


def head_lines(found: Json) -> Iterator[str]:
    """The model, its size and what a token costs."""
    weights, token, kv = found["weights"], found["token"], found["kv"]
    used = f", {count(weights['used_parameters'])} for each token"
    all_used = weights["used_parameters"] > 0.99 * weights["parameters"]
    yield f"{'model':<13} {found['model']} ({found['architecture']}, {found['format']})"
    if found["fetched_bytes"] is not None:
        yield f"{'fetched':<13} {human_bytes(found['fetched_bytes'])} of headers; no weights"
    yield f"{'parameters':<13} {count(weights['parameters'])}{'' if all_used else used}"
    sizes = human_bytes(found["file_bytes"]), human_bytes(weights["bytes"])
    yield f"{'weights':<13} {sizes[0]} in the file ({found['quantization']}), {sizes[1]} in memory"
    yield f"{'kernels':<13} {found['kernels']}; keys and values in {found['kv_dtype']}"
    state = f", and a state of {human_bytes(kv['state_bytes'])}" if kv["state_bytes"] else ""
    full = f"{human_bytes(kv['bytes_at_context'])} for all {found['context']} tokens"
    yield f"{'cache':<13} {human_bytes(kv['bytes_per_token'])} a token{state}, {full}"
    cost = (
        f"{count(token['multiply_adds'])} multiply-adds, reads {human_bytes(token['read_bytes'])}"
    )
    yield f"{'a token':<13} {cost}, with {token['depth']} tokens before it"
    if found["unused"]:
        yield f"{'unused':<13} {len(found['unused'])} tensors, as {found['unused'][0]}"


def bound_lines(limits: Json) -> Iterator[str]:
    """The most tokens per second, by memory and by arithmetic."""
    rate, speed = human_bytes(limits["read_bandwidth"]), count(limits["multiply_adds_per_s"])
    yield f"{'memory':<13} {rate}/s: at most {limits['memory_tokens_per_s']:.1f} tokens/s"
    at_most = f"at most {limits['arithmetic_tokens_per_s']:.1f} tokens/s"
    yield f"{'arithmetic':<13} {speed} multiply-adds/s: {at_most}"
    yield f"{'bound':<13} {limits['tokens_per_s']:.1f} tokens/s, by {limits['by']}"


def run_lines(found: Json) -> Iterator[str]:
    """What was reached, and the time of a token by part."""
    run, limits = found["run"], found["bound"]
    share = run["tokens_per_s"] / limits["tokens_per_s"]
    yield f"{'reached':<13} {run['tokens_per_s']:.1f} tokens/s, {share:.0%} of the bound"
    yield ""
    yield f"{'TIME OF A TOKEN':<44} {'MS':>8}  SHARE  KERNELS"
    rows = {part: row["seconds"] for part, row in run["parts"].items()}
    rows["sampler, scheduler and Python"] = run["engine_s"]
    for part, seconds in sorted(rows.items(), key=lambda row: -row[1]):
        kernels = run["parts"].get(part, {}).get("kernels", {})
        names = ", ".join(f"{name}:{line.rpartition(':')[2]}" for name, line in kernels.items())
        line = f"{part:<44} {1e3 * seconds:>8.3f}  {seconds / run['token_s']:>5.0%}  {names}"
        yield line.rstrip()
    over = run["parts_s"] / run["step_s"] - 1
    yield f"({run['method']}; the pieces take {over:+.0%} of the whole step's time)"


def part_lines(found: Json) -> Iterator[str]:
    """A line for each part, that with most parameters first."""
    title = f"{'PART':<{NAME_WIDTH}} {'PARAMETERS':>10} {'SHARE':>6} {'IN MEMORY':>10}"
    yield f"{title} {'READ':>10}  MULTIPLY-ADDS"
    whole = found["weights"]["parameters"]
    rows = sorted(found["parts"].items(), key=lambda row: -row[1]["parameters"])
    for name, part in [*rows, ("all", found["token"])]:
        num = part["parameters"]
        sizes = human_bytes(part["bytes"]), human_bytes(part["read_bytes"])
        line = f"{name:<{NAME_WIDTH}} {count(num):>10} {num / whole:>6.1%} {sizes[0]:>10}"
        yield f"{line} {sizes[1]:>10}  {count(part['multiply_adds']):>13}"


def tensor_lines(rows: list[Json]) -> Iterator[str]:
    for row in rows:
        shape = " x ".join(map(str, row["shape"]))
        many = f"{row['count']} of " if row["count"] > 1 else ""
        line = f"  {row['name']:<{NAME_WIDTH}} {many + shape:<24} {row['type']:<8}"
        yield f"{line} {count(row['parameters']):>9} {human_bytes(row['bytes']):>10}"


def layer_title(group: Json) -> str:
    numbers = group["layers"]
    if len(numbers) == 1:
        return f"layer {numbers[0]}"
    steps = {b - a for a, b in itertools.pairwise(numbers)}
    shown = f"{numbers[0]} to {numbers[-1]}" if steps == {1} else ", ".join(map(str, numbers))
    return f"layers {shown} ({len(numbers)})"


def box(name: str, group: Json, norm: str) -> list[str]:
    """The lines of a block in a drawing: its norm, its name, what is inside."""
    block = group["blocks"].get(name)
    above = [norm] if norm else []
    if block is None:
        return [*above, name]
    title = block["title"] if name in ("self_attn", "mlp") else f"{name}: {block['title']}"
    return [*above, f"{title}  [{block['code']}]", *(f"  {line}" for line in block["inside"])]


def drawing(group: Json) -> list[str]:
    """A layer in ASCII: the stream of the layer runs down the left side, and each branch reads from
    it and is added to it."""
    if not group["flow"]:
        lines = [line for name in group["blocks"] for line in ["", *box(name, group, "")]]
        return ["  blocks, which this layer connects by arithmetic of its own:", *lines[1:]]
    lines, chain, stream, start = ["  x"], list[str](), -1, 0
    start = stream = group["flow"][0]["input"]
    for call in group["flow"]:
        if not chain:
            start = call["input"]
        chain += box(call["block"], group, call["norm"])
        if call["added_to"] is None:
            continue
        from_above = start != stream
        lines.append("  |" + ("  (reads what the branch above reads)" if from_above else ""))
        lines.append("  +---." if not from_above else "  |   .")
        lines += [f"  |   | {line}" for line in chain]
        lines.append("  +<--'  added")
        chain, stream = [], call["result"]
    return [*lines, *(f"  |   {line}" for line in chain), "  v"]


def layer_lines(found: Json) -> Iterator[str]:
    """Each kind of layer: drawing and tensors; then what is outside of layers."""
    for group in found["groups"]:
        yield ""
        yield f"{layer_title(group)}: {group['class']}  [{group['code']}]"
        yield from drawing(group)
        yield from tensor_lines(group["tensors"])
    yield ""
    yield f"outside of layers: {found['decoder']['class']}  [{found['decoder']['code']}]"
    yield from tensor_lines(found["outside"])
    if "product_code" in found:
        yield f"products run in {found['product_code']}, attention in {found['attention_code']}"


def text_of(found: Json) -> str:
    """All of it for the terminal."""
    lines = [*head_lines(found), *bound_lines(found["bound"])]
    lines += run_lines(found) if "run" in found else []
    return "\n".join([*lines, "", *part_lines(found), *layer_lines(found), ""])


# ---- the page, and the command -------------------------------------------------------------------


def page_of(found: Json) -> str:
    """A page that shows everything, and loads nothing from elsewhere."""
    page = Path(__file__).with_name("anatomy.html").read_text(encoding="utf-8")
    drawings = {"drawings": [[layer_title(g), *drawing(g)] for g in found["groups"]]}
    data = json.dumps(found | drawings, ensure_ascii=False).replace("<", "\\u003c")
    return page.replace("{{title}}", html.escape(found["model"])).replace("{{data}}", data)


def explain_parser() -> argparse.ArgumentParser:
    parser = command_parser("explain")
    parser.add_argument("ref", nargs="?", metavar="MODEL", help="a path, alias or hub id")
    add_model_options(parser)
    add: Any = option_group(parser, "explain")
    add("--depth N", "tokens before the one that is counted (default: 512)", int, default=512)
    add("--run", "load the model, and measure where its time goes", action="store_true")
    add("--html FILE", "write a page that shows everything, and needs nothing else")
    add("--json", "print one JSON object instead of tables", action="store_true")
    return parser


def run(argv: list[str]) -> int:
    """The command. Returns the exit code. Raises UsageError and others."""
    parser = explain_parser()
    args = parser.parse_args(argv)
    if not 0 <= args.depth <= 2**24:
        parser.error(f"--depth is {args.depth}; it must be between 0 and {2**24}")
    settings = read_settings(args)
    if threads := settings.engine().threads:
        torch.set_num_threads(threads)
    found, weights = explained(settings, args.depth)
    found["bound"] = bound(found, weights)
    if args.run:
        found["run"] = measured(settings, args.depth)
    if args.html:
        try:  # a name of a file need not be UTF-8
            Path(args.html).write_text(page_of(found), encoding="utf-8", errors="replace")
        except OSError as error:
            raise UsageError(f"{args.html}: cannot be written: {error.strerror}") from None
    put(json.dumps(found, ensure_ascii=False) + "\n" if args.json else text_of(found))
    return 0
