"""Files of bytes under names, in a folder with a budget: each is complete and right, or absent.

Adds       `BlockStore`: `put` writes a file in a thread of its own, `fetch` reads one in another.
           Several processes may use a folder. What was not used for longest goes first when the
           files exceed the budget. `model_marks`, which tells a model's files from others.
Seam       none: answers.prompt_cache keeps its blocks in one, kernels.laid_out its weights.
Remove     delete this file together with answers/prompt_cache.py and kernels/laid_out.py.

A file is a head, the payload and BLAKE2b's digest of both. Its reader says which head it expects,
byte for byte, and of how many bytes the payload is; nothing in a file is believed. A file that
differs is deleted. A new file gets its name when it is complete. Files are read, not mapped: a
program that cuts a mapped file short would end this process.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from nanollama import NanollamaError, gguf_shards, human_bytes, log

Payload = npt.NDArray[np.uint8]

KINDS = "kv|state"  # of the files of --prompt-cache: the ends of their names
OLD_S = 3600  # age of a file that no process completes any more
DIGEST = 32  # bytes
SAMPLE = 1 << 16  # bytes of each of a few places of a file, to tell it from others
MOST_PENDING = 256 << 20  # bytes that wait to be written; a process ends after they are
SCAN_PART = 64  # the folder is looked through each time that this part of the budget was written
READ_FLAGS = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_BINARY", "O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC")
)
WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)


class Entry(NamedTuple):
    """A file of the store; the one with the least `used` goes first."""

    used: int  # nanoseconds since 1970
    num_bytes: int
    path: Path


def digest_of(*parts: bytes | Payload) -> bytes:
    """BLAKE2b's digest of all parts (RFC 7693)."""
    made = hashlib.blake2b(digest_size=DIGEST)
    for part in parts:
        made.update(part)  # type: ignore[arg-type]  # an array has a buffer
    return made.digest()


def read_whole(path: Path, num_bytes: int) -> Payload | None:
    """The bytes of a regular file; None if it has another size. Raises OSError."""
    with open(os.open(path, READ_FLAGS), "rb", buffering=0) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_size != num_bytes:
            return None
        data = np.empty(num_bytes, np.uint8)
        room = memoryview(data)  # type: ignore[arg-type]  # an array has a buffer
        while room and (num := file.readinto(room)):
            room = room[num:]
        return None if room else data


def is_right(data: Payload, head: bytes) -> bool:
    """Whether the bytes of a file begin with its head and end with their digest."""
    begins = data[: len(head)].tobytes() == head
    return begins and digest_of(data[:-DIGEST]) == data[-DIGEST:].tobytes()


def read_payload(path: Path, head: bytes, num_bytes: int) -> Payload | None:
    """The payload of a file; None, and the file is deleted, unless it is as `write_file` makes it
    with this head and a payload of `num_bytes`."""
    with contextlib.suppress(FileNotFoundError):
        try:
            data = read_whole(path, len(head) + num_bytes + DIGEST)
        except (OSError, MemoryError) as error:
            log.debug(f"{path}: {error}")
            data = None
        if data is not None and is_right(data, head):
            return data[len(head) : -DIGEST]
        with contextlib.suppress(OSError):
            path.unlink()
            log.debug(f"{path}: damaged, or of another program; deleted")
    return None


def mark_used(folder: Path, times: Mapping[str, int]) -> None:
    for name, used in times.items():
        with contextlib.suppress(OSError):  # it is not there any more
            os.utime(folder / name, ns=(used, used))


def checked(head: bytes, payload: Payload) -> Iterator[bytes | Payload]:
    """The parts of a file that `read_payload` reads."""
    yield head
    yield payload
    yield digest_of(head, payload)


def write_file(path: Path, parts: Iterable[bytes | Payload], used: int) -> None:
    """Write a file, which gets its name when it is complete. Raises OSError."""
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}~")
    try:
        with open(os.open(scratch, WRITE_FLAGS, 0o600), "wb") as file:
            for part in parts:
                file.write(part)  # type: ignore[arg-type]  # an array has a buffer
        os.replace(scratch, path)
        mark_used(path.parent, {path.name: used})
    finally:
        with contextlib.suppress(OSError):
            scratch.unlink()


def read_entries(folder: Path, kinds: str = KINDS) -> list[Entry]:
    """A store's files. Scratch files of processes that have ended are deleted. Raises OSError."""
    found = []
    with os.scandir(folder) as listed:
        for each in listed:
            is_scratch = re.fullmatch(rf"\.[0-9a-f]{{40}}\.({kinds})\.[0-9a-f]{{8}}~", each.name)
            if not (is_scratch or re.fullmatch(rf"[0-9a-f]{{40}}\.({kinds})", each.name)):
                continue
            with contextlib.suppress(OSError):  # another process has deleted it
                about = each.stat(follow_symlinks=False)
                if not is_scratch:
                    found.append(Entry(about.st_mtime_ns, about.st_size, Path(each.path)))
                elif about.st_mtime < time.time() - OLD_S:
                    os.unlink(each.path)
    return found


def describe(folder: Path, most_bytes: int, kinds: str = KINDS) -> str:
    """DIR, 1.2 GB of 4.3 GB in 408 files"""
    found: list[Entry] = []
    with contextlib.suppress(OSError):  # it is made when it is needed
        found = read_entries(folder, kinds)
    size = human_bytes(sum(each.num_bytes for each in found))
    return f"{folder}, {size} of {human_bytes(most_bytes)} in {len(found)} files"


def file_marks(path: Path) -> Iterator[Any]:
    """What tells a file from others: name, size, time of change, hash of samples. Raises OSError"""
    with path.open("rb") as opened:
        about, samples = os.fstat(opened.fileno()), hashlib.sha256()
        for i in range(4):
            opened.seek(about.st_size * i // 4)
            samples.update(opened.read(SAMPLE))
    yield from (path.name, about.st_size, about.st_mtime_ns, samples.hexdigest())


def model_marks(path: Path) -> list[Any]:
    """What tells a model, or an adapter, from others. Raises OSError and CheckpointError."""
    files = gguf_shards(path) if path.is_file() else sorted(path.iterdir())
    return [mark for file in files if file.is_file() for mark in file_marks(file)]


class BlockStore:
    """The files of a folder for an option, whose names end in some kinds. The budget may have
    become smaller since they were written, so they are looked through at once, in the writer's
    thread."""

    def __init__(
        self, folder: Path, most_bytes: int, option: str = "--prompt-cache", kinds: str = KINDS
    ) -> None:
        """Raises NanollamaError for a folder that cannot be made, or not written to."""
        self.folder, self.most_bytes, self.option, self.kinds = folder, most_bytes, option, kinds
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            (probe := folder / f".{secrets.token_hex(4)}~").touch(0o600)
            probe.unlink()
        except OSError as error:
            reason = f"{folder}: {error.strerror or error}"
            raise NanollamaError(f"{option} {reason}; name another folder") from None
        self.lock = threading.Lock()
        self.num_pending = 0  # bytes
        self.num_unseen = 0  # bytes written since the folder was looked through
        self.is_full = False  # of the disk: nothing more is written
        # Python ends when the threads of executors have done their work
        self.writer = ThreadPoolExecutor(1, f"{option.strip('-')}-writer")
        self.readers = ThreadPoolExecutor(2, f"{option.strip('-')}-reader")
        self.writer.submit(self.trim)

    def has(self, name: str) -> bool:
        return os.path.exists(self.folder / name)  # False, too, where the system cannot say

    def fetch(self, name: str, head: bytes, num_bytes: int) -> Future[Payload | None]:
        """Read a file in another thread -> `read_payload`"""
        try:
            return self.readers.submit(read_payload, self.folder / name, head, num_bytes)
        except RuntimeError:  # Python ends, and only its last threads go on
            nothing: Future[Payload | None] = Future()
            nothing.set_result(None)
            return nothing

    def use(self, times: Mapping[str, int]) -> None:
        """Note when files were used, in another thread."""
        with contextlib.suppress(RuntimeError):
            self.readers.submit(mark_used, self.folder, times)

    def takes(self, num_bytes: int) -> bool:
        """Whether there is room for a payload among what waits, and files are still written."""
        is_much = self.num_pending and self.num_pending + num_bytes > MOST_PENDING
        return not (is_much or self.is_full)

    def put(self, name: str, head: bytes, payload: Payload, used: int) -> bool:
        """Write a file in another thread -> whether `takes` it"""
        return self.put_parts(name, checked(head, payload), payload.nbytes, used)

    def put_parts(
        self, name: str, parts: Iterable[bytes | Payload], num_bytes: int, used: int
    ) -> bool:
        """Write a file of `num_bytes`, whose parts the other thread makes -> whether `takes` it"""
        with self.lock:
            if not self.takes(num_bytes):
                return False
            self.num_pending += num_bytes
        try:
            self.writer.submit(self.write, self.folder / name, parts, num_bytes, used)
        except RuntimeError:  # Python ends
            self.is_full = True
        return not self.is_full

    def write(
        self, path: Path, parts: Iterable[bytes | Payload], num_bytes: int, used: int
    ) -> None:
        """`put_parts`, in the writer's thread. After the first error, which is a warning, no more
        is written."""
        try:
            if not self.is_full:
                write_file(path, parts, used)
                self.num_unseen += num_bytes
                if self.num_unseen * SCAN_PART >= self.most_bytes:
                    self.trim()
        except (OSError, MemoryError) as error:
            self.is_full = True
            log.warning(f"{self.option} {self.folder}: {error}; nothing more is written there")
        finally:
            with self.lock:
                self.num_pending -= num_bytes

    def trim(self) -> None:
        """Delete what was not used for longest until the rest is within the budget."""
        self.num_unseen = 0
        found = sorted(read_entries(self.folder, self.kinds))
        excess = sum(each.num_bytes for each in found) - self.most_bytes
        for each in found:
            if excess <= 0:
                break
            with contextlib.suppress(OSError):
                each.path.unlink()
                excess -= each.num_bytes

    def wait(self) -> None:
        """Return when all that was `put` is written, and all uses are noted."""
        self.writer.submit(int).result()
        self.readers.submit(int).result()
