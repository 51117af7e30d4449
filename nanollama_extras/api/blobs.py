"""Files that clients send to Ollama's API, and the models that /api/create makes of them.

Adds       `receive_blob` and `blob_path`, for /api/blobs/DIGEST; `made_of_files` and `quantized`,
           which give the path of a new model's weights; `discard_unused`.
Seam       api/ollama_models.py imports it. Asks by name for files.conversion and models.lora.
Remove     delete this file together with api/ollama.py.
Spec       https://github.com/ollama/ollama/blob/main/docs/api.md (Create a Model, Push a Blob)

Blobs lie in the cache under blobs/, named after their SHA-256; the weights of created models under
created/, each in a directory of its own, whose files are links to blobs or were quantized here.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import os
import re
import secrets
import shutil
import threading
from collections.abc import AsyncIterator, Callable, Mapping
from pathlib import Path
from typing import Any

from nanollama import (
    GGUF_MODEL,
    Json,
    Modelfile,
    ModelStore,
    RequestError,
    WireError,
    excerpt,
    extra,
    open_checkpoint,
    preferred,
    refuse,
)

Report = Callable[[Json], None]  # receives a line of progress
DIGEST = re.compile(r"sha256[:-]([0-9a-f]{64})", re.A)
FILE_NAME = re.compile(r"[A-Za-z0-9_][\w.-]{0,199}", re.A)  # no path leads out of a directory
WRITE_BYTES = 1 << 22  # of a blob, at a time
CREATING = threading.Lock()  # held while the weights of a model are made
KEPT_FREE = 1 << 28  # bytes of the disk that blobs leave


def blob_path(digest: object) -> Path:
    """Where a blob lies, or would lie. Raises RequestError for what is no digest."""
    match = DIGEST.fullmatch(digest) if isinstance(digest, str) else None
    if match is None:
        raise RequestError(f"{excerpt(digest)} is no digest; sha256:HEX is needed", "digest")
    return ModelStore().root / "blobs" / f"sha256-{match[1]}"


async def receive_blob(digest: str, chunks: AsyncIterator[bytes]) -> bool:
    """Keep a file that comes in chunks; False if it was there. Raises RequestError if it is another
    file, WireError 507 where the disk is full."""
    path = blob_path(digest)
    if path.exists():
        async for _ in chunks:
            pass
        return False
    scratch, sha256, waiting = path.with_name(f"{secrets.token_hex(8)}~"), hashlib.sha256(), b""
    try:
        with disk_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(scratch, "wb") as file:
                async for chunk in chunks:
                    waiting += chunk
                    if len(waiting) >= WRITE_BYTES:
                        await asyncio.to_thread(store, file, sha256, waiting)
                        waiting = b""
                await asyncio.to_thread(store, file, sha256, waiting)
            if sha256.hexdigest() != path.name.removeprefix("sha256-"):
                found = f"sha256:{sha256.hexdigest()}"
                raise RequestError(f"the file has the digest {found}, not {digest}", "digest")
            scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return True


def store(file: Any, sha256: Any, data: bytes) -> None:
    """Write a part of a blob. Raises OSError, before the disk is full to the brim."""
    if shutil.disk_usage(file.name if os.path.exists(file.name) else ".").free < KEPT_FREE:
        raise OSError(28, "the disk is full")
    sha256.update(data)
    file.write(data)


@contextlib.contextmanager
def disk_errors(path: Path) -> Any:
    """Turn errors of the file system into WireError 507."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise WireError(507, "not_stored", f"{path.name} cannot be kept: {reason}") from None


# ---- weights of created models -------------------------------------------------------------------


def created_root() -> Path:
    return ModelStore().root / "created"


def made_of_files(files: Mapping[str, Any]) -> Path:
    """The path of a model made of blobs by their names: of the first GGUF file, or of a directory
    of safetensors. Raises RequestError for a name with a path in it, and for a blob that was not
    sent."""
    if not files:
        refuse("files has no entry", "files")
    blobs = {}
    for name, digest in files.items():
        if not FILE_NAME.fullmatch(name):
            refuse(f"files: {excerpt(name)} is no plain name of a file", "files")
        blobs[name] = blob_path(digest)
        if not blobs[name].exists():
            refuse(f"files: {digest} was not sent; POST /api/blobs/{digest} first", "files")
    listed = "\n".join(f"{name} {blob.name}" for name, blob in sorted(blobs.items()))
    directory = created_root() / hashlib.sha256(listed.encode()).hexdigest()[:32]
    with disk_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
        for name, blob in blobs.items():
            if not (directory / name).exists():
                (directory / name).symlink_to(blob)
    ggufs = sorted(name for name in files if name.endswith(".gguf"))
    texts = [*filter(GGUF_MODEL.match, ggufs), *ggufs]  # an image part stays beside its text
    return directory / texts[0] if texts else directory


def quantized(modelfile: Modelfile, kind: str, report: Report) -> Modelfile:
    """A Modelfile of the model in other types, with its adapter merged. Raises RequestError for an
    unknown type, and NanollamaError."""
    mixtures = extra("files.mixtures", "quantize")
    name = mixtures.find_mixture(kind)
    if name is None:
        known = ", ".join(mixtures.MIXTURES)
        refuse(f"quantize {excerpt(kind)} is not known; known are: {known}", "quantize")
    conversion = extra("files.conversion", "quantize")
    path = ModelStore().resolve(str(modelfile.model))
    checkpoint = open_checkpoint(path)
    adapter = modelfile.adapter
    lora = adapter and extra("models.lora", "ADAPTER").open_adapter(adapter, checkpoint.config)
    config = path / "config.json" if path.is_dir() else path
    identity = f"{path.resolve()} {config.stat().st_mtime_ns} {adapter} {name}"
    directory = created_root() / hashlib.sha256(identity.encode()).hexdigest()[:32]
    target, title = (
        directory / "model.gguf",
        f"quantizing {checkpoint.quantization} model to {name}",
    )
    report({"status": title})
    reported = -1

    def tell(done: int, total: int) -> None:
        nonlocal reported
        if (percent := 100 * done // max(total, 1)) != reported:
            reported = percent
            report({"status": title, "digest": directory.name, "total": total, "completed": done})

    if not target.exists():
        with disk_errors(directory):
            directory.mkdir(parents=True, exist_ok=True)
        conversion.convert_to_gguf(
            conversion.Plan(checkpoint, name, adapter=lora), target, done=tell
        )
    mmproj = modelfile.mmproj or preferred("files.mmproj", "beside", lambda _: None)(path)
    return dataclasses.replace(modelfile, model=str(target), mmproj=mmproj, adapter=None)


def discard_unused() -> None:
    """Delete the weights of created models that no Modelfile names any more, and blobs that none of
    the others need. Blobs that were just sent, and have made no model yet, stay."""
    if not CREATING.acquire(blocking=False):
        return  # the weights of a model that has no Modelfile yet
    with contextlib.ExitStack() as stack:
        stack.callback(CREATING.release)
        remove_unnamed(ModelStore())


def remove_unnamed(store: ModelStore) -> None:
    used = set()
    for path in (store.root / "modelfiles").glob("*[!~]"):
        with contextlib.suppress(OSError):
            text = path.read_text("utf-8", "replace")
            used |= set(re.findall(r"created[/\\]([0-9a-f]{32})", text))
    created = [d for d in created_root().glob("*") if d.name not in used]
    gone = [d for d in created if not any(d.glob(".*~"))]  # another server writes to the rest
    linked = {os.path.realpath(link) for d in gone for link in d.glob("*") if link.is_symlink()}
    for directory in gone:
        shutil.rmtree(directory, ignore_errors=True)
    kept = {os.path.realpath(link) for link in created_root().glob("*/*") if link.is_symlink()}
    for blob in linked - kept:
        if Path(blob).parent == store.root / "blobs":
            with contextlib.suppress(OSError):
                os.unlink(blob)
