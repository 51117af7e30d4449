"""Every script in examples/ runs with the command its docstring gives."""

from __future__ import annotations

import ast
import asyncio
import contextlib
import inspect
import io
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nanollama

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(
    path
    for path in (ROOT / "examples").glob("*.py")
    if path.stem not in ("harness", "serve_bench", "train_tiny")  # which have tests of their own
)
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))
# What each prints, as a pattern.
PRINTS = {
    "batch": r"request 2 is done \(stop\)\n.*is' -> ' Rome\.'.*three,' -> ' four, five, six,'",
    "chat_history": r"Paris.* [1-9]\d* of them cached.* [1-9]\d* of them cached",
    "engine_loop": r"step  3  request 0 .*step  3  request 1 .*request 1 [^\n]*<- length",
    "kv_cache": r"tokens .*model: 25, 234\nthe same text: True .* times faster\n.",
    "logit_lens": r"after layer  0 .*after layer 29  ' cold'",
    "next_token": r"^ *\d+\.\d%  ' Paris'.*perplexity [\d. ]+Four .*perplexity [\d. ]+Nation ",
    "speed_vs_llama_cpp": r"nanollama +\d+ +\d+\.\d +llama\.cpp ",
    "tools": r'^population \{"city": "Vienna"\} -> 2030000$',
    "stream": r".+\n(stop|length): \d+ tokens",
}
# The measurement, made tiny.
ARGUMENTS = {"kv_cache": ["12"], "speed_vs_llama_cpp": ["16", "4", "1"]}


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


def run_cell(source: str, names: dict[str, Any]) -> str:
    """What a cell of a notebook prints, its last value included; `await` may stand alone."""
    tree, flags = ast.parse(source), ast.PyCF_ALLOW_TOP_LEVEL_AWAIT
    parts: list[tuple[Any, str]] = [(tree, "exec")]
    if isinstance(last := tree.body[-1], ast.Expr):
        tree.body.pop()
        parts.append((ast.Expression(last.value), "eval"))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for part, mode in parts:
            value = eval(compile(part, "cell", mode, flags), names)
            value = asyncio.run(value) if inspect.iscoroutine(value) else value
            if value is not None:
                print(repr(value))
    return out.getvalue()


@pytest.mark.usefixtures("smollm2")
@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_gives_the_outputs_that_it_shows(notebook: Path) -> None:
    book, names = json.loads(notebook.read_text(encoding="utf-8")), dict[str, Any]()
    assert (book["nbformat"], book["nbformat_minor"]) == (4, 5)
    for cell in book["cells"]:
        if cell["cell_type"] == "code":
            shown = "".join(line for output in cell["outputs"] for line in output["text"])
            assert run_cell("".join(cell["source"]), names) == shown


def train_tiny(monkeypatch: pytest.MonkeyPatch, *flags: object) -> None:
    monkeypatch.setattr(sys, "argv", ["train_tiny.py", *map(str, flags)])
    runpy.run_path(str(ROOT / "examples" / "train_tiny.py"), run_name="__main__")


def test_a_model_is_trained_and_an_interrupted_run_goes_on_to_the_same_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    steps = ("--steps", 2, "--sft-steps", 2)
    train_tiny(monkeypatch, tmp_path / "whole", *steps)
    shown = capsys.readouterr().out
    assert re.search(
        r"(?s)918,656 parameters.*bits per byte.* [\d.]+\npretrain 00002/00002 \(100.00%\) \| "
        r"loss: \d.*eta: 0.0m\nbits per byte.*\nsft 00002/00002.*words: \d+ of 20\n> Who are you",
        shown,
    )
    with pytest.raises(SystemExit, match="stopped at step 1"):
        train_tiny(monkeypatch, tmp_path / "parts", *steps, "--stop-at", 1)
    train_tiny(monkeypatch, tmp_path / "parts", *steps)
    whole, parts = (tmp_path / name / "model.safetensors" for name in ("whole", "parts"))
    assert whole.read_bytes() == parts.read_bytes()
    train_tiny(monkeypatch, tmp_path / "other", *steps, "--seed", 1)
    assert (tmp_path / "other" / "model.safetensors").read_bytes() != whole.read_bytes()


def test_the_trained_model_is_what_transformers_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    train_tiny(monkeypatch, tmp_path, "--steps", 1, "--sft-steps", 1)
    capsys.readouterr()
    assert nanollama.main(["verify", str(tmp_path)]) == 0
    flags = ["--model", str(tmp_path), "--chat", "-m", "5"]
    assert nanollama.main([*flags, "-p", "Hello!"]) == 0
