"""`bench --compare`: a tiny model beside a program that answers as llama-bench does."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import pytest

import nanollama
from nanollama import NanollamaError
from nanollama_extras.commands import bench as bench_command
from nanollama_extras.commands import bench_servers

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the peer is a script with #!")

PEER = """#!{python}
import json, sys
with open({log!r}, "a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
{body}
"""
ANSWER = 'print(json.dumps([{"build_number": 1, "avg_ts": 250.0, "samples_ts": [250.0]}]))'


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bench_command, "BANDWIDTH_BYTES", 1 << 22)
    return Path(gguf_files.convert(tiny("Llama"), tmp_path / "model.gguf")[0])


@pytest.fixture
def peer(tmp_path: Path) -> Callable[[str], Path]:
    """Makes a program that does `body`, and lists its arguments in calls.jsonl."""

    def make(body: str = ANSWER) -> Path:
        program = tmp_path / "llama-bench"
        log = str(tmp_path / "calls.jsonl")
        program.write_text(PEER.format(python=sys.executable, log=log, body=body))
        program.chmod(0o755)
        return program

    return make


def bench(*flags: Any) -> int:
    return nanollama.main(["bench", *map(str, flags)])


def test_both_programs_measure_the_same_tests_in_turns(
    model: Path, peer: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["-p", 16, "-n", 4, "-d", "0,8", "-r", 2, "--threads", 1, "--kv-dtype", "q8", "--json"]
    assert bench("--model", model, "--compare", peer(), *flags) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [(row["test"], row["depth"]) for row in rows] == [
        (test, depth) for depth in (0, 8) for test in ("pp16", "tg4")
    ]
    for row in rows:
        assert row["peer_tokens_per_s"] == 250
        assert row["ratio"] == pytest.approx(row["tokens_per_s"] / 250)
        assert len(row["pair_ratios"]) == 2
    calls = [json.loads(line) for line in (tmp_path / "calls.jsonl").read_text().splitlines()]
    assert len(calls) == 8
    given = dict(zip(calls[-1][::2], calls[-1][1::2]))
    same = {"-m": str(model), "-t": "1", "-p": "0", "-n": "4", "-d": "8", "-r": "1", "-ngl": "0"}
    assert given == {**same, "-ctk": "q8_0", "-ctv": "q8_0", "-fa": "auto", "-o": "json"}


def test_the_table_has_the_ratio(
    model: Path, peer: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--model", model, "--compare", peer(), "-p", 0, "-n", 4, "-r", 1) == 0
    head, row, rule, _ = capsys.readouterr().out.splitlines()
    assert head.split()[:5] == ["TEST", "DEPTH", "NANOLLAMA", "LLAMA.CPP", "RATIO"]
    test, depth, own, theirs, ratio, *pairs = row.split()
    assert (test, depth, theirs) == ("tg4", "0", "250.0")
    assert float(ratio) == pytest.approx(float(own) / 250, abs=0.01)
    assert pairs == [ratio, "to", ratio]
    assert rule.startswith("tokens a second, medians of 1 pairs in turns, ")


@pytest.mark.parametrize(
    ("body", "problem"),
    [
        ("print('[]')", "no result of llama-bench (exit code 0: 'no output')"),
        ("sys.exit('no model')", "no result of llama-bench (exit code 1: 'no model')"),
        ("print('[{\"avg_ts\": NaN}]')", "nan tokens a second"),
        ("print('[{\"avg_ts\": null}]')", "no result of llama-bench"),
    ],
)
def test_a_peer_that_fails_is_one_line(
    body: str,
    problem: str,
    model: Path,
    peer: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    program = peer(body)
    assert bench("--model", model, "--compare", program, "-p", 8, "-n", 0, "-r", 1) == 1
    error = capsys.readouterr().err.strip()
    assert error.startswith(f"error: --compare {program}: ")
    assert problem.replace("'", '"') in error.replace("'", '"')
    assert "\n" not in error


@pytest.mark.parametrize(
    ("flags", "code", "problem"),
    [
        ("--compare /not/there", 1, "--compare /not/there: not a program that can be run; give"),
        ("--compare /dev", 1, "--compare /dev/llama-bench: not a program that can be run"),
        ("--compare x -b 2", 2, "measures one sequence at a time"),
        ("--compare x --quantize q8", 2, "leave --quantize and --adapter out"),
    ],
)
def test_what_cannot_be_compared_is_refused(
    flags: str, code: int, problem: str, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--model", model, "-p", 8, "-n", 0, *flags.split()) == code
    assert problem in capsys.readouterr().err


def test_a_directory_of_safetensors_is_refused(
    tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench("--model", tiny("Llama"), "--compare", "x", "-p", 8, "-n", 0) == 2
    assert "--compare needs a model that is one GGUF file" in capsys.readouterr().err


SERVER = """#!{python}
import sys
import nanollama
port = sys.argv[sys.argv.index("--port") + 1]
nanollama.main(["--serve", "--script", "{script}", "--port", port])
"""


def test_a_folder_brings_its_server_in(
    model: Path,
    peer: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, value in {
        "CLIENTS": 2,
        "REQUESTS": 2,
        "PROMPT_TOKENS": 40,
        "ANSWER_TOKENS": 8,
    }.items():
        monkeypatch.setattr(bench_servers, name, value)
    script = tmp_path / "script.json"
    script.write_text(json.dumps([{"text": "one two three four", "token_delay": 0.01}]))
    server = peer().with_name("llama-server")
    server.write_text(SERVER.format(python=sys.executable, script=script))
    server.chmod(0o755)
    monkeypatch.setenv("PYTHONPATH", str(Path(nanollama.__file__).parent))
    flags = ["-p", 0, "-n", 2, "-r", 1, "--threads", 1, "--json"]
    assert bench("--model", model, "--compare", tmp_path, *flags) == 0
    _, *rows = json.loads(capsys.readouterr().out)["results"]
    found = {row["test"]: row for row in rows}
    assert list(found)[:3] == [
        "start to first token, s",
        "memory after it, MB",
        "2 clients, tokens/s",
    ]
    assert list(found)[3:] == [
        f"{wait} {mark}, ms"
        for wait in ("to first token", "between tokens")
        for mark in ("p50", "p99")
    ]
    for row in rows:
        assert row["ratio"] == row["value"] / row["peer_value"] > 0


def test_a_server_that_does_not_start_is_one_line(tmp_path: Path) -> None:
    program = tmp_path / "llama-server"
    program.write_text("#!/bin/sh\necho bad flag >&2\nexit 1\n")
    with (
        pytest.raises(NanollamaError, match="llama-server does not run: Permission denied"),
        bench_servers.serving([str(program)]),
    ):
        pass
    program.chmod(0o755)
    with (
        pytest.raises(NanollamaError, match="llama-server does not serve: 'bad flag'"),
        bench_servers.serving([str(program)]),
    ):
        pass
