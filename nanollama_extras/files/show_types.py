"""`show`: the types of a model's tensors with their bytes, also of a model that is incomplete.

Adds       a table of types to `nanollama show`: tensors, bytes in the file, bytes and form in
           memory; and `show` of files that are truncated, still downloading or missing in part.
Seam       `nanollama.command_show` lets `look` open a model.
Imports    commands.details.
Remove     delete this file; `show` then names the type of most weights alone, and refuses models
           that are incomplete.

Only headers are read. Of a GGUF file, the header must be there; it is the file's beginning.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import re
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, cast

from huggingface_hub import constants

import nanollama
from nanollama import (
    Checkpoint,
    CheckpointError,
    EngineConfig,
    NanollamaError,
    Settings,
    TensorSource,
    excerpt,
    human_bytes,
    log,
    open_checkpoint,
    parse_hub_ref,
    read_json,
)
from nanollama_extras.commands.details import Memory, chosen_kernels

MOST_HEADER_BYTES = 100 << 20  # of a safetensors file, as in its own library
Tensors = dict[str, TensorSource]


def look(path: Path | None, settings: Settings) -> tuple[Checkpoint, list[str]] | None:
    """A model, or what is there of it, and the table of its types; None where nothing is there.
    `path` is None for a model that is not complete in a cache. Raises CheckpointError."""
    if (path := path or find_part(settings.model)) is None:
        return None
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError:
        if not (part := open_partial(path)):
            raise
        checkpoint = part
    return checkpoint, type_lines(checkpoint, settings)


# ---- the table -----------------------------------------------------------------------------------


def type_lines(checkpoint: Checkpoint, settings: Settings) -> list[str]:
    """The lines of `show` about types, that with most bytes first."""
    engine, (backend, _) = settings.engine(), chosen_kernels(checkpoint, settings)
    memory = Memory(checkpoint, engine, backend)
    rows: dict[tuple[str, str], Tensors] = {}
    for name, tensor in checkpoint.tensors.items():
        key = tensor.kind.partition(",")[0], form(tensor, memory.bits(name), engine)
        rows.setdefault(key, {})[name] = tensor
    width = max((len(kind) for kind, _ in rows), default=0)
    lines = {}
    for (kind, words), found in rows.items():
        num_bytes = sum(tensor.nbytes for tensor in found.values())
        sizes = human_bytes(num_bytes), human_bytes(memory.num_bytes(found))
        line = f"  {kind:<{width}}  {len(found):>5} tensors  {sizes[0]:>9} in the file"
        lines[f"{line}  {sizes[1]:>9} in memory: {words}"] = num_bytes
    return ["types", *sorted(lines, key=lambda line: -lines[line])]


def form(tensor: TensorSource, bits: float, engine: EngineConfig) -> str:
    """What becomes of a tensor whose weights take so many bits in memory, in words."""
    if tensor.stays:
        return "rows are read from the file"
    if tensor.is_packed:
        return f"packed, {bits:.3g} bits a weight"
    if engine.quantize:
        return f"matrices rounded to {engine.quantize}"
    return "float32" if bits > 16 else "16-bit floats"


# ---- incomplete models ---------------------------------------------------------------------------


def open_partial(path: Path) -> Checkpoint | None:
    """What is there of an incomplete model, as a Checkpoint whose tensors cannot be read; None for
    any other model."""
    try:
        return open_directory(path) if path.is_dir() else open_gguf(path)
    except (NanollamaError, OSError):
        return None


def find_part(reference: str) -> Path | None:
    """The GGUF file of a hub model that is being downloaded, or the folder of its safetensors, in
    Hugging Face's cache; None where nothing of it is there."""
    if (hub := parse_hub_ref(reference)) is None:
        return None
    folder = Path(constants.HF_HUB_CACHE) / f"models--{hub.repo.replace('/', '--')}"
    found = [path for path in folder.glob("snapshots/*") if (path / "config.json").exists()]
    for part in folder.glob("blobs/*.incomplete"):
        with part.open("rb") as file:
            if file.read(4) == b"GGUF":
                found.append(part)
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


class Part(NamedTuple):
    """What is there of a model: bytes of the total, and how many files are missing."""

    checkpoint: Checkpoint
    there: int
    total: int
    missing: int


def warn(path: Path, part: Part) -> None:
    also = f", and {part.missing} more files are missing" if part.missing else ""
    sizes = f"{human_bytes(part.there)} of {human_bytes(part.total)}"
    log.warning(f"warning: {path}: incomplete: {sizes} are here{also}")


def open_gguf(path: Path) -> Checkpoint | None:
    """A GGUF file, or several, of which parts may be missing; None for one that is whole."""
    part = gguf_part(path)
    if not part.missing and part.there == part.total:
        return None
    warn(path, part)
    return part.checkpoint


def gguf_part(path: Path) -> Part:
    """What is there of a GGUF model, whose header must be."""
    split = re.fullmatch(r"(.+)-\d{5}-of-(\d{5})\.gguf", path.name)
    files, missing = [path], 0
    if split:
        files = sorted(path.parent.glob(f"{glob.escape(split[1])}-?????-of-{split[2]}.gguf"))
        missing = int(split[2]) - len(files)
    read = [nanollama.read_gguf(file, partial=True) for file in files]
    read[0][0]["split.count"] = len(files)
    tensors = [tensor for _, found in read for tensor in found.values()]
    total = sum(tensor.nbytes for tensor in tensors)
    there = sum(cast("Any", tensor.load).args[0].nbytes for tensor in tensors)
    return Part(nanollama._open_gguf(path, read), there, total, missing)


def open_directory(path: Path) -> Checkpoint | None:
    """A directory of safetensors, of which parts may be missing; None for one that is whole."""
    part = directory_part(path)
    if not part.missing and part.there >= part.total:
        return None
    warn(path, part)
    return part.checkpoint


def directory_part(path: Path) -> Part:
    """What is there of a directory of safetensors, whose headers must be."""
    names = nanollama.weight_files(path)
    tensors: Tensors = {}
    there = total = 0
    for file in filter(Path.exists, (path / name for name in names)):
        found, size = read_header(file)
        tensors |= found
        there, total = there + file.stat().st_size, total + size
    missing = sum(not (path / name).exists() for name in names)
    raw = read_json(path / "hf_quant_config.json", required=False) | read_json(path / "config.json")
    config, source = nanollama.model_config(raw, str(path)), path / "generation_config.json"
    try:
        named = nanollama.canonical_tensors(tensors, config)
    except CheckpointError:  # such as a scale that is in a missing file
        named = nanollama.canonical_tensors(tensors, dataclasses.replace(config, packing=None))
    sampling = nanollama._file_sampling(read_json(source, required=False), source)
    text = nanollama.open_text(path)
    checkpoint = Checkpoint(path, "safetensors", config, named, text, sampling)
    return Part(checkpoint, there, total, missing)


def read_header(file: Path) -> tuple[Tensors, int]:
    """The tensors of a safetensors file that may be truncated, and its whole size. Raises
    CheckpointError. https://huggingface.co/docs/safetensors"""
    with file.open("rb") as opened:
        size = int.from_bytes(opened.read(8), "little")
        try:
            raw: Any = json.loads(opened.read(size)) if size <= MOST_HEADER_BYTES else None
            raw.pop("__metadata__", None)
            ends = [header_entry(entry)[2] for entry in raw.values()]
            tensors = {name: cut_tensor(file, entry) for name, entry in raw.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
            raise CheckpointError(f"{file}: its header is missing, cut or damaged") from None
    return tensors, 8 + size + max(ends, default=0)


def header_entry(entry: Any) -> tuple[str, tuple[int, ...], int]:
    """Type, shape and last byte of a tensor. Raises ValueError, TypeError or KeyError."""
    shape, (start, stop) = tuple(entry["shape"]), entry["data_offsets"]
    if not all(type(n) is int and 0 <= n < 2**48 for n in (*shape, start, stop)):
        raise ValueError(excerpt(entry))
    return str(entry["dtype"]), shape, stop


def cut_tensor(file: Path, entry: Any) -> TensorSource:
    kind, shape, stop = header_entry(entry)
    start = entry["data_offsets"][0]
    return TensorSource(shape, kind, max(0, stop - start), functools.partial(refuse, file))


def refuse(file: Path, *index: Any) -> NoReturn:
    raise CheckpointError(f"{file}: is incomplete; pull the model again")
