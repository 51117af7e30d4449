"""`nanollama launch`: what it sets for each client; and the clients, where npm has them."""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import nanollama
from nanollama import TestServer, UsageError
from nanollama_extras.commands.launch import CLIENTS, Target, run

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

pytestmark = pytest.mark.xdist_group("launch")
PACKAGES = {  # client -> the version that was seen to work
    "claude": "@anthropic-ai/claude-code@2.1.332",
    "codex": "@openai/codex@0.171.0",
    "opencode": "opencode-ai@1.18.33",
}
QUESTION = "List the files here, then say done."


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
    assert run(["claude", "--url", "http://127.0.0.1:9", "--model", "tiny-random"]) == 0
    assert (tmp_path / "status").read_text() == "200\n"


def test_what_is_missing_is_told(test_server: TestServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"no server answers at .*; give --model"):
        run(["claude", "--url", "http://127.0.0.1:9"])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(UsageError, match="claude is not installed"):
        run(["claude", "--url", test_server.url])
    with pytest.raises(SystemExit):
        run(["emacs"])


# ---- the clients themselves ----------------------------------------------------------------------


@pytest.fixture(scope="session")
def clients(pytestconfig: pytest.Config) -> Any:
    """A function from a client to the folder of its program, installed once and kept."""

    def install(name: str) -> Path:
        if not (shutil.which("node") and shutil.which("npm")):
            pytest.skip("needs node and npm")
        assert pytestconfig.cache is not None
        folder = pytestconfig.cache.mkdir(f"npm-{name}")
        if not (folder / "node_modules" / ".bin").exists():
            command = ["npm", "install", "--no-audit", "--no-fund", "--force", "--prefix"]
            command += [str(folder), PACKAGES[name]]
            try:
                subprocess.run(command, capture_output=True, timeout=300, check=True)
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired):
                shutil.rmtree(folder, ignore_errors=True)
                pytest.skip(f"npm cannot install {PACKAGES[name]} here")
        return folder / "node_modules" / ".bin"

    return install


RUNS: dict[str, tuple[list[str], dict[str, Any]]] = {  # arguments, and a call of the client's tool
    "claude": (
        ["-p", "--dangerously-skip-permissions", QUESTION],
        {"name": "Bash", "arguments": {"command": "ls", "description": "List files"}},
    ),
    "codex": (
        ["exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", QUESTION],
        {"name": "exec_command", "arguments": {"cmd": "ls"}},
    ),
    "opencode": (
        ["run", QUESTION],
        {"name": "bash", "arguments": {"command": "ls", "description": "List files"}},
    ),
}


@pytest.mark.node
@pytest.mark.parametrize("name", RUNS)
def test_a_client_calls_a_tool_and_prints_the_answer(
    clients: Any, tmp_path: Path, name: str
) -> None:
    folder = clients(name)
    for part in ("home", "project"):
        (tmp_path / part).mkdir()
    (tmp_path / "project" / "hello.txt").write_text("hi")
    arguments, call = RUNS[name]
    done = {"text": "All done here."}
    look = {"text": "I look. ", "tool_calls": [call]}
    # opencode asks for a title at once, which takes one of the answers
    with TestServer(*[look] * (1 + (name == "opencode")), *[done] * 4) as server:
        ran = subprocess.run(
            [
                sys.executable,
                nanollama.__file__,
                "launch",
                name,
                "--url",
                server.url,
                "--",
                *arguments,
            ],
            cwd=tmp_path / "project",
            env={
                **os.environ,
                "HOME": str(tmp_path / "home"),
                "PWD": str(tmp_path / "project"),  # opencode reads it
                "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
                "IS_SANDBOX": "1",  # Claude Code, run by root
            },
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=180,
            check=False,
        )
        bodies = [json.dumps(one["body"]) for one in server.requests]
    assert ran.returncode == 0, ran.stderr
    assert "All done here." in ran.stdout
    assert any("hello.txt" in body for body in bodies)  # the result of the call went back
