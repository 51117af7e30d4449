"""`--output FILE`: the answers of a batch file as JSON lines.

Seam: the CLI calls this `run_batch(settings, rows) -> exit code` in place of the core's. To remove
it, delete this module and the flag.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

import nanollama
from nanollama import RequestError

if TYPE_CHECKING:
    from nanollama import BatchRow, Json, Settings


def json_line(row: BatchRow) -> str:
    """A line of the file: number and text of a prompt, its answer, its end, tokens and seconds."""
    fields: Json = {"line": row.line, "prompt": row.prompt, "text": row.text}
    if custom_id := getattr(row.prompt, "custom_id", None):
        fields = {"line": row.line, "custom_id": custom_id, **fields}
    if row.error:
        fields["error"] = str(row.error)
    fields["finish_reason"] = row.last.finish_reason if row.last else "error"
    if row.last and row.last.usage:
        fields["usage"] = dataclasses.asdict(row.last.usage)
    text = json.dumps(fields, ensure_ascii=False) + "\n"
    return text.encode(errors="backslashreplace").decode()  # lone surrogates, as JSON has them


def open_output(name: str) -> TextIO:
    """The file of --output, opened but not emptied; - is stdout. Raises RequestError."""
    with writing(name):
        return sys.stdout if name == "-" else open(name, "a", encoding="utf-8")


@contextlib.contextmanager
def writing(name: str) -> Iterator[None]:
    """Begin an error of the system with the file's name, unless it names another file. Raises
    RequestError."""
    try:
        yield
    except OSError as error:
        if error.filename not in (None, name):  # such as one of the model's
            raise
        raise RequestError(f"{name}: cannot be written: {error.strerror}") from None


def run_batch(settings: Settings, rows: list[BatchRow]) -> int:
    """Write a line for each row. The file keeps its old content until the first row is done: a
    model may not load, or need an extra. Returns the exit code."""
    out = open_output(settings.args.output)
    is_empty = out is sys.stdout

    def write(row: BatchRow) -> None:
        nonlocal is_empty
        if not is_empty:
            with contextlib.suppress(OSError):  # a pipe or a device cannot be truncated
                out.truncate(0)
            is_empty = True
        out.write(json_line(row))
        out.flush()

    if out is sys.stdout:
        return nanollama.run_batch(settings, rows, write)
    with writing(settings.args.output), out:
        return nanollama.run_batch(settings, rows, write)
