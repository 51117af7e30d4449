"""Says what a file is that cannot be opened as a model, and what to do with it.

Seam       `nanollama.open_checkpoint` hands every refusal to `explain`, which may raise another one
           that says more; `pull_from_hub` asks `check_repo` about the files of a repo,
           files.hub_files `check_start` about the first bytes of a download, `nanollama list`
           `cached_note` about each model, and a name without a model is shown `close_names`.
Remove     delete this file and its tests; the core's own messages are then seen.
Source     https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (general.type, split.count)
           https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md
"""

from __future__ import annotations

import contextlib
import difflib
import re
import struct
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from nanollama import (
    ALIASES,
    CachedModel,
    CheckpointError,
    GGUFCursor,
    HubRef,
    ModelNotFoundError,
    ModelStore,
    NanollamaError,
    excerpt,
    fetch_file,
    find_family,
    first_line,
    gguf_model_type,
    hub_errors,
    read_json,
    read_modelfile,
    text_config,
)

HEAD_BYTES = 1 << 24  # the start of a GGUF that is looked at
NOTE_BYTES = 1 << 16  # and for `list`: the general metadata come first
# The start of a file -> what the file is, and what to do
STARTS = {
    rb"version https://git-lfs": "is a git-lfs pointer, not the file itself; run `git lfs pull` in "
    "its repository, or get the model with `nanollama pull`",
    rb"(?i)\s*<(!doctype|html|\?xml)": "is a web page, not a model; download it again",
    rb"lmgg|fmgg|tjgg|algg": "is a GGML file of before GGUF; convert the original model again",
    rb"PK\x03\x04|\x80[\x02-\x05]": "is a PyTorch pickle, which is never opened; take the model's "
    "safetensors or a GGUF file",
    rb"\x1f\x8b|BZh|\xfd7zXZ|\x28\xb5\x2f\xfd": "is compressed; unpack it",
}
# Number of a tensor type that llama.cpp removed -> its name, and the type to make instead
REMOVED_TYPES = {
    4: ("Q4_2", "Q4_K_M"),
    5: ("Q4_3", "Q4_K_M"),
    **{n: (f"Q4_0_{m}", "Q4_0") for n, m in ((31, "4_4"), (32, "4_8"), (33, "8_8"))},
    **{n: (f"IQ4_NL_{m}", "IQ4_NL") for n, m in ((36, "4_4"), (37, "4_8"), (38, "8_8"))},
}
# general.type or general.architecture -> what a GGUF is, and what to do
GGUF_KINDS = {
    "clip": "is the image part (mmproj) of a multimodal model; give the GGUF of its text, "
    "and this one to --mmproj",
    "adapter": "is a LoRA adapter; give the model that it changes, and to --adapter the directory "
    "that PEFT saved",
    "imatrix": "is a table of statistics for llama-quantize (imatrix); give the model's own GGUF",
    "vocab": "holds a vocabulary without weights; give the model's own GGUF",
}
GGUF_KINDS["mmproj"] = GGUF_KINDS["clip"]


def explain(path: Path, error: CheckpointError) -> None:
    """Raise a CheckpointError that says more than `error` about a path, where there is one."""
    with contextlib.suppress(OSError):
        for file, words in described(path, str(error)):
            raise CheckpointError(f"{file}: {words}") from None


def described(path: Path, error: str) -> Iterator[tuple[Path, str]]:
    """Files at a path that are no part of a model, each with a description."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    names = {file.name for file in files}
    if path.is_dir() and is_adapter(names):
        title, base = adapter_title(path / "adapter_config.json")
        yield path, f"is {title}; give its base ({base}) to --model, it to --adapter"
    ggufs = [name for name in sorted(names) if name.endswith(".gguf")]
    if path.is_dir() and ggufs and "config.json" not in names:
        yield path, f"is a directory of GGUF files; give one of them: {', '.join(ggufs[:9])}"
    for file in files:
        if file.suffix in (".safetensors", ".gguf", ".json", ".model") and file.is_file():
            with file.open("rb") as opened:
                start = opened.read(64)
            if words := start_words(start):
                yield file, words
            if start[:4] == b"GGUF" and file == path:
                with file.open("rb") as opened:
                    words = gguf_words(opened.read(min(HEAD_BYTES, path.stat().st_size)), error)
                if words:
                    yield file, words
    if path.is_file() and path.suffix == ".safetensors":
        yield path, "is one file of a model; give the directory that holds it and its config.json"
    pickles = [f for f in files if f.suffix in (".bin", ".pt", ".pth")]
    if pickles and path.is_dir() and "no model.safetensors" in error:
        yield path, f"no model.safetensors; {pickles[0].name} is a pickle, which is never opened"


def is_adapter(names: Iterable[str]) -> bool:
    """Whether these files, some in a folder, are those of an adapter alone."""
    own = [name for name in names if "/" not in name]
    weights = [name for name in own if name.endswith((".safetensors", ".gguf"))]
    return "adapter_config.json" in own and all(n.startswith("adapter_") for n in weights)


def adapter_title(config: Path) -> tuple[str, str]:
    """What an adapter_config.json describes, and the model that it changes."""
    settings = read_json(config)
    kind, base = settings.get("peft_type", "LORA"), settings.get("base_model_name_or_path")
    title = "a LoRA adapter" if kind == "LORA" else f"an adapter of the kind {excerpt(kind)}"
    return title, excerpt(base) if base else "it names none"


def check_repo(hub: HubRef, sha: str, files: Mapping[str, Any]) -> None:
    """Raises ModelNotFoundError for a repo that holds an adapter and no model; it names the base
    and the flags."""
    if hub.file or hub.quant or not is_adapter(files):
        return
    with hub_errors(hub):
        title, base = adapter_title(fetch_file(hub.repo, sha, files["adapter_config.json"], None))
    raise ModelNotFoundError(
        f"{hub.tag}: is {title}, not a model; fetch it with `hf download {hub.repo} --local-dir "
        f"DIR`, then give its base ({base}) to --model, and DIR to --adapter"
    )


def start_words(start: bytes) -> str | None:
    """The description of a file that starts like this; None for what may be part of a model."""
    if start[8:9] == b"{":  # safetensors; its first bytes are a length, thus any
        return None
    return next((words for head, words in STARTS.items() if re.match(head, start)), None)


def gguf_words(data: bytes, error: str = "") -> str | None:
    """The description of a GGUF that starts with `data`; None for a model that may run."""
    version = int.from_bytes(data[4:8], "little")
    if version == 1:
        return "is of GGUF version 1; 2 and 3 are supported; convert the original model again"
    if struct.unpack(">I", data[4:8].ljust(4, b"\0"))[0] in (1, 2, 3):
        return "is big-endian; convert it with gguf-py's gguf_convert_endian.py, or get another one"
    if removed := re.search(r"unknown type (\d+)", error):
        name, instead = REMOVED_TYPES.get(int(removed[1]), ("", ""))
        return name and (
            f"has tensors of the type {name}, which llama.cpp removed; get the model as {instead}"
        )
    metadata = dict(first_metadata(data))
    for key in ("general.type", "general.architecture"):
        if words := GGUF_KINDS.get(str(metadata.get(key))):
            return words
    is_alone = re.search("not named like one|architecture None|embd.weight is missing", error)
    if isinstance(count := metadata.get("split.count"), int) and count > 1 and is_alone:
        number = metadata.get("split.no")
        which = f"part {number + 1}" if isinstance(number, int) else "one"
        return (
            f"is {which} of {count} files of a model; keep them side by side, with names that end "
            f"in -00001-of-{count:05d}.gguf and so on, and give the first"
        )
    has_tensors = any(data[8:16])  # their number
    is_vocabulary = "token_embd.weight is missing" in error and not has_tensors
    return GGUF_KINDS["vocab"] if is_vocabulary else None


def first_metadata(data: bytes) -> Iterator[tuple[str, Any]]:
    """The metadata of a GGUF's first bytes, as far as they go."""
    with contextlib.suppress(CheckpointError):
        cursor = GGUFCursor(memoryview(data))
        cursor.at = 16
        for _ in range(cursor.scalar("Q")):
            key = cursor.string()
            yield key, cursor.value(cursor.scalar("I"))


def check_start(data: bytes) -> None:
    """Raises CheckpointError where a file that starts with `data` is of no supported model."""
    is_gguf = data[:4] == b"GGUF"
    if words := gguf_words(data) if is_gguf else start_words(data[:64]):
        raise CheckpointError(words)
    if is_gguf:
        metadata = dict(first_metadata(data))
        if "general.architecture" in metadata:
            gguf_model_type(metadata)


def close_names(reference: str, store: ModelStore) -> str:
    """A question about models with a similar name; "" where there are none."""
    known = [*ALIASES, *(model.id for model in store.models())]
    short = {name.split("/")[-1].lower(): name for name in known}
    close = difflib.get_close_matches(reference.lower(), short, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(short[name] for name in close)}?" if close else ""


def cached_note(model: CachedModel) -> str:
    """The end of a model's line in `list`: the reason why it cannot run, or nothing. Reads the
    beginning of its files, and neither weights nor torch."""
    if "mmproj" in model.id.rpartition("/")[2].lower():
        return "  the image part of the models beside it"
    try:
        check_cached(model)
    except (NanollamaError, OSError) as error:
        return f"  cannot run: {first_line(error).partition(';')[0]}"
    return ""


def check_cached(model: CachedModel) -> None:
    """Raises CheckpointError for a model of the caches that surely cannot run."""
    if model.format == "other":
        raise CheckpointError("it has no weights")
    name = model.id
    if model.format == "modelfile":
        name = read_modelfile(model.paths[0]).model or ""
    path = ModelStore().find_cached(name)
    found = [file for path in model.paths for file in path.glob("snapshots/*/adapter_config.json")]
    for folder in {file.parent for file in found}:
        if is_adapter([file.name for file in folder.iterdir()]):
            title, base = adapter_title(folder / "adapter_config.json")
            raise CheckpointError(f"it is {title}, with the base {base}")
    if path is None:
        reason = f"its base {excerpt(name)} is missing" if name != model.id else "it is incomplete"
        raise CheckpointError(f"{reason}; pull it")
    if path.is_dir():
        find_family(text_config(read_json(path / "config.json")).get("model_type"))
        return
    with path.open("rb") as file:
        data = file.read(NOTE_BYTES)
    check_start(data)
