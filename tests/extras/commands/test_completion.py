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
    for words in (["run", ""], ["show", "mi"], ["--model", ""], ["serve", "other", "m"]):
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


@pytest.mark.parametrize("shell", ASK)
def test_a_shell_shows_the_candidates(shell: str, tmp_path: Path) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    command = tmp_path / "nanollama"
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" "{nanollama.__file__}" "$@"\n')
    command.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path)}
    for words, expected in (
        ("nanollama comp", ["completion"]),
        ("nanollama list --he", ["--help"]),
    ):
        line = ASK[shell].format(words=words)
        ran = subprocess.run([shell, "-c", line], env=env, capture_output=True, text=True)
        assert ran.stdout.split() == expected, ran.stderr


@pytest.mark.parametrize("shell", SCRIPTS)
def test_a_script_is_valid(cli: Run, shell: str, tmp_path: Path) -> None:
    if not shutil.which(shell):
        pytest.skip(f"{shell} is not installed")
    path = tmp_path / "script"
    path.write_text(cli("completion", shell).out)
    ran = subprocess.run([shell, "-n", str(path)], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
