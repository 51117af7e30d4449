"""Packages of npm, for the tests of clients that are written in JavaScript."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import filelock
import pytest

import nanollama

DATA = Path(__file__).parent / "data"


def node_version() -> int:
    """The major version of node; 0 where it, or npm, is absent."""
    if not (shutil.which("node") and shutil.which("npm")):
        return 0
    told = subprocess.run(["node", "--version"], capture_output=True, text=True, check=True).stdout
    return int(told.removeprefix("v").split(".")[0])


def installed(*packages: str) -> Path:
    """A folder where packages are installed, once, and kept in the user's cache. Skips the test
    where npm cannot deliver them."""
    if node_version() < 20:
        pytest.skip("needs node 20 or later, and npm")
    name = re.sub(r"[^\w.-]+", "-", "_".join(packages)).strip("-")
    folder = nanollama.cache_root() / "test" / f"npm-{name}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(f"{folder}.lock"):  # test processes install them once
        if not folder.exists():
            scratch = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(scratch, ignore_errors=True)
            command = ["npm", "install", "--no-audit", "--no-fund", "--force", "--prefix"]
            try:
                command += [str(scratch), *packages]
                subprocess.run(command, capture_output=True, timeout=300, check=True)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
                shutil.rmtree(scratch, ignore_errors=True)
                pytest.skip(f"npm cannot install {' '.join(packages)} here")
            scratch.rename(folder)
    return folder


def run_script(name: str, folder: Path, *arguments: str) -> None:
    """Run a script of tests/data with the packages of a folder. It says at its end that all is
    well."""
    shutil.copy(DATA / name, folder)
    ran = subprocess.run(
        ["node", name, *arguments], cwd=folder, capture_output=True, text=True, timeout=120
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.split("\n")[-2] == "all good"
