"""Files of prompts and answers, JSON lines or Parquet, on this machine or wherever fsspec reads.

Answers collect in a folder beside the output, OUT.parts: run.json says what they depend on, and
each other file has JSON lines in the order in which they came. A run that ends early leaves the
folder; the next one reads which lines it has. A last line without its end is no line.

Seam       cluster.batch reads prompts and writes answers with this module. It needs no Ray;
           Parquet needs pyarrow, which the package `cluster` brings. Imports commands.batch_lines.
Remove     delete it together with cluster.batch.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from nanollama import BatchRow, NanollamaError, RequestError, UsageError, first_line, library
from nanollama import read_input as read_stdin
from nanollama_extras.commands.batch_lines import SUFFIXES, json_row, value_row

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
if TYPE_CHECKING:
    from nanollama import Json

FLUSH_S = 10  # between two parts, where a file cannot be appended to
ROWS = 10_000  # of a Parquet file that are made at once


@contextlib.contextmanager
def file_errors(name: str, done: str) -> Iterator[None]:
    """Turn errors of a file system into RequestErrors: "NAME: cannot be read: .."."""
    try:
        yield
    except NanollamaError:
        raise
    except Exception as error:  # each file system of fsspec has its own
        reason = getattr(error, "strerror", None) or first_line(error)
        raise RequestError(f"{name}: cannot be {done}: {reason}") from None


def open_place(url: str) -> tuple[Any, str]:
    """The file system of a path or URL, and the path on it."""
    import fsspec

    fs, path = fsspec.core.url_to_fs(url)
    return fs, path


def arrow(*submodules: str) -> Any:
    """The module pyarrow. Raises PackageError."""
    return library("pyarrow", *submodules, install='pip install ".[cluster]"')


# ---- prompts -------------------------------------------------------------------------------------


def read_prompts(name: str) -> tuple[list[BatchRow], str]:
    """The rows of a file, with a hash of it. Raises RequestError."""
    if name == "-":
        data = read_stdin(name)
    else:
        with file_errors(name, "read"):
            fs, path = open_place(name)
            data = fs.cat_file(path)
    if name.endswith(".parquet"):
        rows = parquet_rows(name, data)
    else:
        lines = data.removeprefix(codecs.BOM_UTF8).splitlines()
        new_row = json_row if name.endswith(SUFFIXES) else text_row
        rows = [new_row(n, line) for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise RequestError(f"{name}: holds no prompts")
    return rows, hashlib.sha256(data).hexdigest()


def text_row(number: int, line: bytes) -> BatchRow:
    try:
        return BatchRow(number, line.decode("utf-8"))
    except UnicodeDecodeError:
        return BatchRow(number, None, RequestError("the line is not UTF-8 text"))


def parquet_rows(name: str, data: bytes) -> list[BatchRow]:
    """The rows of a Parquet file with a column `prompt`. Raises RequestError."""
    pyarrow = arrow("parquet")
    with file_errors(name, "read"):
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        if "prompt" not in file.schema_arrow.names:
            columns = ", ".join(file.schema_arrow.names)
            raise RequestError(f"{name}: has no column prompt, but {columns}")
        values = file.read(["prompt"])["prompt"].to_pylist()
    return [value_row(number, value) for number, value in enumerate(values, 1)]


# ---- answers -------------------------------------------------------------------------------------


class Parts:
    """The folder OUT.parts, while one run adds to it. Raises UsageError for another run's."""

    def __init__(self, target: str, run: Json) -> None:
        self.target, self.run = target, run
        with file_errors(target, "written"):
            self.fs, self.path = open_place(target)
        self.is_local = "file" in self.fs.protocol
        self.folder = f"{self.path}.parts"
        self.waiting: list[str] = []
        self.last_flush = time.monotonic()
        self.file: IO[bytes] | None = None  # of a local folder
        self.locked: IO[bytes] | None = None

    def __enter__(self) -> Parts:
        with file_errors(self.target, "written"):
            if self.is_local:
                self.check_place()
            self.fs.makedirs(self.folder, exist_ok=True)
            self.lock()
            try:
                self.check_run()
            except BaseException:
                self.close()
                raise
            self.number = len(self.names()) + 1
        return self

    def check_place(self) -> None:
        """Raises RequestError or OSError for a place that a batch without Ray refuses, too."""
        if os.path.isdir(self.path):
            raise RequestError(f"{self.target}: cannot be written: it is a directory")
        os.stat(os.path.dirname(self.path))

    def __exit__(self, *_: object) -> None:
        self.flush()
        if self.fs.exists(self.folder) and not self.names():
            self.fs.rm(self.folder, recursive=True)
        self.close()

    def close(self) -> None:
        for file in filter(None, (self.file, self.locked)):
            file.close()

    def names(self) -> list[str]:
        """The paths of the parts, in order."""
        found = self.fs.ls(self.folder, detail=False)
        return sorted(name for name in found if name.endswith(".jsonl"))

    def check_run(self) -> None:
        """Note what the answers depend on, or compare it with what the folder says."""
        note = f"{self.folder}/run.json"
        old = self.run
        if self.names():
            old = json.loads(self.fs.cat_file(note))
        else:
            self.fs.pipe_file(note, json.dumps(self.run, indent=1).encode())
        if changed := [name for name in self.run if old.get(name) != self.run[name]]:
            raise UsageError(
                f"{self.target}.parts holds the answers of a run with another {changed[0]}; finish "
                "that run, delete the folder, or name another --output"
            )

    def lock(self) -> None:
        """Keep other runs out until this one ends, where the system can."""
        if not self.is_local or fcntl is None:
            return
        self.locked = open(f"{self.folder}/lock", "ab")  # noqa: SIM115
        try:
            fcntl.flock(self.locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(f"{self.target}: another run writes it; wait for its end") from None

    def part(self, name: str) -> bytes:
        """The whole lines of a part."""
        data: bytes = self.fs.cat_file(name)
        return data[: data.rfind(b"\n") + 1]

    def lines(self) -> set[int]:
        """The numbers of the lines that are answered."""
        with file_errors(f"{self.target}.parts", "read"):
            return {
                json.loads(line)["line"]
                for name in self.names()
                for line in self.part(name).splitlines()
            }

    def add(self, lines: Iterable[str]) -> None:
        """Write answers: at once where files can be appended to, else every few seconds."""
        self.waiting += lines
        if self.is_local or time.monotonic() - self.last_flush > FLUSH_S:
            self.flush()

    def flush(self) -> None:
        data, self.waiting = "".join(self.waiting).encode("utf-8"), []
        if not data:
            return
        name = f"{self.folder}/{self.number:06}.jsonl"
        with file_errors(f"{self.target}.parts", "written"):
            if self.is_local:
                self.file = self.file or open(name, "ab")  # noqa: SIM115
                self.file.write(data)
                self.file.flush()
            else:
                self.fs.pipe_file(name, data)
                self.number += 1
        self.last_flush = time.monotonic()

    def merge(self, is_ordered: bool) -> tuple[int, int]:
        """Make the output of all parts, in one step, and remove them. Returns the numbers of lines
        and of failed ones."""
        self.flush()
        with file_errors(self.target, "written"), tempfile.TemporaryDirectory() as scratch:
            whole = Path(scratch) / "all"
            places = self.gather(whole)
            failed = sum(is_failed for *_, is_failed in places)
            ordered = sorted(places) if is_ordered else places
            made = Path(scratch) / "made"
            write = write_parquet if self.target.endswith(".parquet") else write_lines
            with open(whole, "rb") as source:
                write(made, (read_at(source, start, end) for _, start, end, _ in ordered))
            self.deliver(made)
            if self.file:
                self.file.close()
                self.file = None
            self.fs.rm(self.folder, recursive=True)
        return len(places), failed

    def gather(self, whole: Path) -> list[tuple[int, int, int, bool]]:
        """Copy all parts into one file -> number, start and end of each line, whether it failed."""
        places, position = [], 0
        with open(whole, "wb") as out:
            for name in self.names():
                for line in self.part(name).splitlines(keepends=True):
                    fields, end = json.loads(line), position + len(line)
                    places.append((fields["line"], position, end, "error" in fields))
                    out.write(line)
                    position = end
        return places

    def deliver(self, made: Path) -> None:
        """Put a file in the place of the output, in one step."""
        if not self.is_local:
            self.fs.put_file(str(made), self.path)
            return
        beside = f"{self.folder}/output"  # on the disk of the output
        shutil.copyfile(made, beside)
        os.replace(beside, self.path)


def read_at(source: IO[bytes], start: int, end: int) -> bytes:
    source.seek(start)
    return source.read(end - start)


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    with open(path, "wb") as out:
        out.writelines(lines)


def write_parquet(path: Path, lines: Iterable[bytes]) -> None:
    """A Parquet file with a column for each field of the lines."""
    pyarrow = arrow("parquet")
    with pyarrow.parquet.ParquetWriter(path, schema(pyarrow)) as writer:
        rows: list[Json] = []
        for line in lines:
            rows.append({name: in_utf8(value) for name, value in json.loads(line).items()})
            if len(rows) == ROWS:
                writer.write_table(pyarrow.Table.from_pylist(rows, schema(pyarrow)))
                rows = []
        writer.write_table(pyarrow.Table.from_pylist(rows, schema(pyarrow)))


def in_utf8(value: Any) -> Any:
    """A value, or a text with a question mark in the place of each lone surrogate."""
    return value.encode(errors="replace").decode() if isinstance(value, str) else value


def schema(pyarrow: Any) -> Any:
    """The columns of answers: the fields of `commands.json_lines.json_line`."""
    from dataclasses import fields

    from nanollama import Usage

    kinds = {"int": pyarrow.int64(), "float": pyarrow.float64()}
    usage = pyarrow.struct([(field.name, kinds[str(field.type)]) for field in fields(Usage)])
    names = ("custom_id", "prompt", "text", "error", "finish_reason")
    texts = [(name, pyarrow.string()) for name in names]
    return pyarrow.schema([("line", pyarrow.int64()), *texts, ("usage", usage)])
