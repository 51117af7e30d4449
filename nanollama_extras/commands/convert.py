"""`nanollama convert`: a model as a GGUF file or a directory, with weights in other types.

Seam       Command (the row "convert" of COMMANDS in nanollama.py). Asks by name for
           files.conversion, files.measures, files.mixtures, files.packed_directory and models.lora.
Remove     delete this file and that row.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tqdm

from nanollama import (
    Modelfile,
    ModelStore,
    RequestError,
    command_parser,
    extra,
    human_bytes,
    local_path,
    open_checkpoint,
    put,
    read_input,
)

if TYPE_CHECKING:
    from nanollama import Json

TEXT_WINDOWS = 64  # of a text, at most, that importance is taken from


def convert_parser() -> argparse.ArgumentParser:
    parser = command_parser("convert")
    add = parser.add_argument
    add("model", metavar="MODEL", help="alias, hub id, path, or the name of a created model")
    text = "the GGUF file to write, if it ends in .gguf; else a directory of safetensors"
    add("out", metavar="OUT", type=Path, help=text)
    text = "types of the weights: f32, f16, bf16, q8, q4, Q4_0 .. Q8_0, Q2_K, Q3_K_M .. Q6_K"
    add("--quantize", metavar="TYPE", help=f"{text} (default: as they are)")
    text = "weigh errors by how a model uses its weights on this text; measure with it, too"
    add("--text", metavar="FILE", help=text)
    add("--measure", action="store_true", help="compare the result with the original")
    add("--adapter", metavar="DIR", help="merge a LoRA adapter in PEFT's layout")
    add("--revision", metavar="REV", help="branch, tag or commit of a hub model")
    add("--force", action="store_true", help="replace OUT if it exists")
    add("--json", action="store_true", help="print one JSON object")
    return parser


def read_args(argv: list[str]) -> argparse.Namespace:
    """The arguments; ends the program on a wrong one."""
    parser = convert_parser()
    args = parser.parse_args(argv)
    mixtures = extra("files.mixtures", "nanollama convert")
    if args.quantize is not None:
        name = mixtures.find_mixture(args.quantize)
        if name is None:
            known = ", ".join(mixtures.MIXTURES)
            parser.error(f"--quantize {args.quantize} is not known; known are: {known}")
        args.quantize = name
    if not os.access(args.out.absolute().parent, os.W_OK):
        parser.error(f"{args.out}: its directory does not exist or is not writable")
    if args.out.exists() and not args.force:
        parser.error(f"{args.out} exists; give another name, or --force to replace it")
    return args


def created_model(name: str) -> Modelfile:
    """The Modelfile of a model that was created under a name, or one for any other model"""
    created = None if local_path(name) else ModelStore().modelfile(name)
    return created or Modelfile(model=name)


def importance_text(name: str) -> str:
    try:
        return read_input(name).decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError(f"{name}: not UTF-8 text") from None


def run(argv: list[str]) -> int:
    """The command. Returns the exit code."""
    args = read_args(argv)
    conversion = extra("files.conversion", "nanollama convert")
    made = created_model(args.model)
    path = ModelStore().resolve(str(made.model), args.revision)
    checkpoint = open_checkpoint(path)
    adapter = args.adapter or made.adapter
    lora = adapter and extra("models.lora", "--adapter").open_adapter(adapter, checkpoint.config)
    text = None if args.text is None else importance_text(args.text)
    plan = conversion.Plan(checkpoint, args.quantize, adapter=lora, template=made.template)
    if text is not None and args.quantize:
        plan = conversion.weighted(plan, text, TEXT_WINDOWS)
    with tqdm.tqdm(unit="B", unit_scale=True, disable=None, leave=False) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        convert = conversion.convert_to_gguf
        if args.out.suffix != ".gguf":
            convert = extra("files.packed_directory", "a directory").convert_to_directory
        written = convert(plan, args.out, args.force, show)
    result: Json = {
        "model": args.model,
        "out": str(args.out),
        "bytes": written.num_bytes,
        "original_bytes": checkpoint.num_bytes,
        "types": dict(written.kinds),
        "importance": gain_of(written),
        "notes": list(written.notes),
    }
    if args.measure:
        compare = extra("files.measures", "--measure").compare
        result["measured"] = compare(path, adapter, args.out, text)
    put(json.dumps(result, ensure_ascii=False, indent=1) + "\n" if args.json else lines_of(result))
    return 0


def gain_of(written: Any) -> float | None:
    """The weighted squared error with importance, relative to that without; None if unused"""
    gain = written.gain
    return gain.with_weights / gain.without if gain.without else None


def lines_of(result: Json) -> str:
    """The result as text"""
    return "\n".join(result_lines(result)) + "\n"


def result_lines(result: Json) -> Iterator[str]:
    types = ", ".join(f"{kind} {human_bytes(size)}" for kind, size in result["types"].items())
    yield f"{result['out']}: {human_bytes(result['bytes'])} ({types})"
    yield from (f"note: {note}" for note in result["notes"])
    if result["importance"] is not None:
        lower = 1 - result["importance"]
        yield f"importance from the text lowers the weighted squared error by {lower:.1%}"
    if found := result.get("measured"):
        yield f"{'':<11} {'size':>9} {'perplexity':>11} {'KL (nats)':>10} {'same top':>9}"
        size = human_bytes(result["original_bytes"])
        yield f"{'original':<11} {size:>9} {found['perplexity']:>11.3f}"
        size, kl = human_bytes(result["bytes"]), found["divergence"]
        row = f"{found['converted_perplexity']:>11.3f} {kl:>10.5f} {found['same_top']:>9.1%}"
        yield f"{'converted':<11} {size:>9} {row}"
        yield f"over {found['tokens']} tokens"
