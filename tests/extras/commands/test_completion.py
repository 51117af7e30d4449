"""Completion: the candidates, and bash, zsh and fish that show them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Ran

import nanollama
from nanollama_extras.commands.completion import CLIENTS, SCRIPTS
from nanollama_extras.commands.launch import CLIENTS as LAUNCHED

pytestmark = pytest.mark.usefixtures("empty_caches")
Run = Callable[..., Ran]


def found(cli: Run, *words: str) -> list[str]:
    return cli("completion", "--words", *words).out.splitlines()


def test_the_first_word_is_a_verb_or_a_flag(cli: Run) -> None:
    assert found(cli, "") == list(nanollama.COMMANDS)
    assert found(cli, "se") == ["serve"]
    assert {"--prompt", "--interactive", "--port"} <= set(found(cli, "--"))


def test_flags_are_those_of_the_verb(cli: Run) -> None:
    assert found(cli, "run", "m", "--repeat") == ["--repeat-penalty", "--repeat-last-n"]
    assert found(cli, "run", "m", "--po") == []
    assert found(cli, "serve", "--po") == ["--port"]
    assert "--yes" in found(cli, "rm", "--")


def test_values_that_a_flag_chooses_from_are_known(cli: Run) -> None:
    assert found(cli, "run", "m", "--kernels", "") == ["auto", "native", "torch"]
    assert found(cli, "--quantize", "q") == ["q8", "q4"]
    assert found(cli, "completion", "") == list(SCRIPTS)
    assert found(cli, "launch", "co") == ["codex"]
    assert list(LAUNCHED) == CLIENTS


def test_models_are_those_of_this_machine(cli: Run, tiny: Callable[..., Path]) -> None:
    assert cli("cp", tiny(), "mine").code == 0
    for words in (
        ["run", ""],
        ["show", "mi"],
        ["bench", ""],
        ["explain", ""],
        ["--model", ""],
        ["serve", "other", "m"],
    ):
        assert found(cli, *words) == ["mine"], words
    assert found(cli, "run", "mine", "") == []  # a prompt: no candidate


# What each shell is asked to show: the completion of its own, at the end of a line
ASK = {
    "bash": (
        "eval \"$(nanollama completion bash)\"; COMP_LINE='{words}'; COMP_POINT=${{#COMP_LINE}}; "
        "_nanollama nanollama; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    ),
    "fish": "nanollama completion fish | source; complete -C '{words}'",
}


@pytest.fixture
def program(tmp_path: Path) -> dict[str, str]:
    """An environment with the command `nanollama`."""
    command = tmp_path / "nanollama"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{nanollama.__file__}" "$@"\n')
    command.chmod(0o755)
    return {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}


@pytest.mark.parametrize("shell", ASK)
def test_a_shell_shows_the_candidates(shell: str, program: dict[str, str], tmp_path: Path) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    (tmp_path / "notes.txt").write_text("")
    for words, expected in (
        ("nanollama comp", ["completion"]),
        ("nanollama completion ", ["bash", "zsh", "fish"]),
        ("nanollama --batch-file no", ["notes.txt"] if shell == "fish" else []),
    ):
        line = ASK[shell].format(words=words)
        ran = subprocess.run(
            [shell, "-c", line], env=program, cwd=tmp_path, capture_output=True, text=True
        )
        assert sorted(ran.stdout.split()) == sorted(expected), ran.stderr


@pytest.mark.skipif(shutil.which("zsh") is None, reason="zsh is not installed")
def test_zsh_completes_at_its_prompt(tmp_path: Path, program: dict[str, str]) -> None:
    pexpect = pytest.importorskip("pexpect")
    start = 'autoload -U compinit; compinit -u; eval "$(nanollama completion zsh)"; echo ready'
    (tmp_path / ".zshrc").write_text(f"PS1='zsh> '\n{start}\n")
    (tmp_path / "notes.txt").write_text("")
    env = {**program, "ZDOTDIR": str(tmp_path), "TERM": "dumb"}
    shell = pexpect.spawn("zsh", ["-i"], env=env, cwd=str(tmp_path), encoding="utf-8", timeout=60)
    shell.expect_exact("ready")
    for typed, expected in (
        ("nanollama comp\tzsh\r", "#compdef nanollama"),
        ("nanollama completion --he\t\r", "usage:"),
        ("nanollama --prompt a --batch-file no\t\r", "notes.txt"),
    ):
        shell.expect_exact("zsh> ")
        shell.send(typed)
        shell.expect_exact(expected)
    shell.close(force=True)


@pytest.mark.parametrize("shell", SCRIPTS)
def test_a_script_is_valid(cli: Run, shell: str, tmp_path: Path) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    path = tmp_path / "script"
    path.write_text(cli("completion", shell).out)
    ran = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
