"""Every script in examples/ runs with the command its docstring gives."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path
    for path in (ROOT / "examples").glob("*.py")
    if path.stem not in ("harness", "serve_bench")  # need a server: other tests have one
)
# What each prints, as a pattern.
PRINTS = {
    "batch": r"request 2 is done \(stop\)\n.*is' -> ' Rome\.'.*three,' -> ' four, five, six,'",
    "chat_history": r"Paris.* [1-9]\d* of them cached.* [1-9]\d* of them cached",
    "engine_loop": r"step  3  request 0 .*step  3  request 1 .*request 1 [^\n]*<- length",
    "logit_lens": r"after layer  0 .*after layer 29  ' cold'",
    "next_token": r"^ *\d+\.\d%  ' Paris'.*perplexity [\d. ]+Four .*perplexity [\d. ]+Nation ",
    "speed_vs_llama_cpp": r"nanollama +\d+ +\d+\.\d +llama\.cpp ",
    "stream": r".+\n(stop|length): \d+ tokens",
}
# The measurement, made tiny.
ARGUMENTS = {"speed_vs_llama_cpp": ["16", "4", "1"]}


@pytest.mark.usefixtures("smollm2")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_runs_with_the_command_in_its_docstring(script: Path) -> None:
    docstring = ast.get_docstring(ast.parse(script.read_text(encoding="utf-8"))) or ""
    command = re.search(r"^python (examples/\w+\.py)", docstring, re.MULTILINE)
    assert command
    assert command[1] == f"examples/{script.name}"
    done = subprocess.run(
        [sys.executable, command[1], *ARGUMENTS.get(script.stem, [])],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(PRINTS[script.stem], done.stdout, re.DOTALL), done.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
def test_an_example_is_short(script: Path) -> None:
    assert 15 <= len(script.read_text(encoding="utf-8").splitlines()) <= 60
