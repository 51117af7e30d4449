"""`nanollama launch`: what it sets for each client; and the clients, where npm has them."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import npm
import pytest

import nanollama
from nanollama import TestServer, UsageError
from nanollama_extras.commands.launch import CLIENTS, Target, run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

QUESTION = "Run the command, then say done."
COMMAND = "echo made-$((40 + 2)); sleep 1"  # no client knows the number without running it
# (qwen-code on a busy machine loses what a program prints as it ends: hence the sleep)


@pytest.fixture
def target(tmp_path: Path) -> Target:
    return Target("http://127.0.0.1:9", "org/m:Q4", "secret", 4096, tmp_path)


def test_claude_is_told_by_variables(target: Target) -> None:
    plan = CLIENTS["claude"](target)
    assert plan.command == ["claude"]
    assert plan.variables["ANTHROPIC_BASE_URL"] == "http://127.0.0.1:9"
    assert plan.variables["ANTHROPIC_AUTH_TOKEN"] == "secret"
    assert plan.variables["ANTHROPIC_DEFAULT_HAIKU_MODEL"] == "org/m:Q4"
    assert not plan.files


def test_codex_has_a_home_of_its_own(target: Target) -> None:
    plan = CLIENTS["codex"](target)
    ((path, text),) = plan.files.items()
    assert path == Path(plan.variables["CODEX_HOME"]) / "config.toml"
    config = tomllib.loads(text)
    assert (config["model"], config["model_context_window"]) == ("org/m:Q4", 4096)
    provider = config["model_providers"][config["model_provider"]]
    assert provider["base_url"] == "http://127.0.0.1:9/v1"
    assert plan.variables[provider["env_key"]] == "secret"


def test_opencode_has_a_file_of_its_own(target: Target) -> None:
    plan = CLIENTS["opencode"](target)
    ((path, text),) = plan.files.items()
    assert str(path) == plan.variables["OPENCODE_CONFIG"]
    config = json.loads(text)
    provider, _, name = config["model"].partition("/")
    models = config["provider"][provider]["models"]
    assert models[name]["limit"]["context"] == 4096


def test_print_shows_and_runs_nothing(
    test_server: TestServer, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["qwen-code", "--url", test_server.url, "--print", "--", "-p", "hi there"]) == 0
    shown = capsys.readouterr().out
    assert f"export OPENAI_BASE_URL={test_server.url}/v1\n" in shown
    assert "export OPENAI_MODEL=test-model\n" in shown
    assert shown.endswith("qwen --auth-type openai -p 'hi there'\n")


def test_the_client_runs_with_its_variables_and_arguments(
    test_server: TestServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "codex"
    program.write_text(
        f'#!/bin/sh\ncp "$CODEX_HOME/config.toml" {tmp_path}\necho "$@" > {tmp_path}/said\nexit 7\n'
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert run(["codex", "--url", test_server.url, "--", "exec", "--x"]) == 7
    assert (tmp_path / "said").read_text() == "exec --x\n"
    assert 'model = "test-model"' in (tmp_path / "config.toml").read_text()


def test_a_server_is_started_where_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "claude"
    fetch = "import os, urllib.request as u; url = os.environ['ANTHROPIC_BASE_URL'] + '/health'"
    fetch += "; print(u.urlopen(url).status)"
    program.write_text(f'#!/bin/sh\n"{sys.executable}" -c "{fetch}" > {tmp_path}/status\n')
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path / "cache"))
    flags = ["--url", "http://127.0.0.1:9", "--model", "tiny-random"]
    assert run(["claude", *flags, "--prompt-cache", str(tmp_path / "prompts")]) == 0
    assert (tmp_path / "status").read_text() == "200\n"
    assert (tmp_path / "prompts").is_dir()


def test_what_is_missing_is_told(test_server: TestServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no server answers at .*; give --model"):
        run(["claude", "--url", "http://127.0.0.1:9"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="claude is not installed"):
        run(["claude", "--url", test_server.url])
    with pytest.raises(UsageError, match="invalid choice: 'emacs'"):
        run(["emacs"])


# ---- the clients themselves ----------------------------------------------------------------------

BASH: Any = {"name": "bash", "arguments": {"command": COMMAND, "description": "Print a number"}}
CODEX = ["exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox"]
EXEC: Any = {"name": "exec_command", "arguments": {"cmd": COMMAND}}
# client -> the version that was seen to work, arguments, a call of its tool
RUNS: dict[str, tuple[str, list[str], Any]] = {
    "claude": (
        "@anthropic-ai/claude-code@2.1.332",
        ["-p", "--dangerously-skip-permissions", QUESTION],
        {**BASH, "name": "Bash"},
    ),
    "codex": ("@openai/codex@0.171.0", [*CODEX, QUESTION], EXEC),
    "opencode": ("opencode-ai@1.18.33", ["run", QUESTION], BASH),
    "qwen-code": (
        "@qwen-code/qwen-code@0.24.4",
        ["--yolo", "-p", QUESTION],
        {"name": "run_shell_command", "arguments": {**BASH["arguments"], "is_background": False}},
    ),
}


def run_client(name: str, command: list[str], home: Path, **variables: str) -> str:
    """Run a command with a client's program on the path, in an empty folder. Returns what it
    prints."""
    programs = npm.installed(RUNS[name][0]) / "node_modules" / ".bin"
    for part in ("home", "project"):
        (home / part).mkdir()
    ran = subprocess.run(
        command,
        cwd=home / "project",
        env={
            **os.environ,
            "HOME": str(home / "home"),
            "PWD": str(home / "project"),  # opencode reads it
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "IS_SANDBOX": "1",  # Claude Code, run by root
            **variables,
        },
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def check_round_trip(server: TestServer, printed: str) -> None:
    """The call was run, its result went back, and the answer to that was printed."""
    assert any("made-42" in json.dumps(one["body"]) for one in server.requests)
    assert "All done here." in printed


@pytest.mark.node
@pytest.mark.parametrize("name", RUNS)
def test_a_client_calls_a_tool_and_prints_the_answer(tmp_path: Path, name: str) -> None:
    _, arguments, call = RUNS[name]
    look = {"text": "I look. ", "tool_calls": [call]}
    # opencode asks for a title at once, which takes one of the answers
    with TestServer(*[look] * (1 + (name == "opencode")), "All done here.") as server:
        command = [sys.executable, str(nanollama.__file__), "launch", name, "--url", server.url]
        check_round_trip(server, run_client(name, [*command, "--", *arguments], tmp_path))


@pytest.mark.node
def test_codex_takes_the_server_for_ollama(tmp_path: Path) -> None:
    """Before it uses /v1/responses, it asks for Ollama's version and for the list of its models."""
    with TestServer({"text": "I look. ", "tool_calls": [EXEC]}, "All done here.") as server:
        command = ["codex", *CODEX, "--oss", "--local-provider", "ollama", "-m", "test-model"]
        url = {"CODEX_OSS_BASE_URL": server.base_url}
        check_round_trip(server, run_client("codex", [*command, QUESTION], tmp_path, **url))
