"""`bench --compare`: a tiny model beside a program that answers as llama-bench does."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf_files
import pytest

import nanollama
from nanollama import Json, NanollamaError
from nanollama_extras.commands import bench as bench_command
from nanollama_extras.commands import bench_peer, bench_servers, bench_whole

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the peer is a script with #!")

PEER = """#!{python}
import json, sys
with open({log!r}, "a") as log:
    print(json.dumps(sys.argv[1:]), file=log)
{body}
"""
# As b11434 prints it, without fields of settings
RESULT = """[
  {
    "build_commit": "0c1e570",
    "build_number": 1,
    "cpu_info": "AMD EPYC",
    "backends": "CPU",
    "model_type": "llama 256M Q4_1",
    "n_threads": 2,
    "type_k": "f16",
    "n_prompt": 16,
    "n_gen": 0,
    "n_depth": 0,
    "test_time": "2026-12-02T05:56:54Z",
    "avg_ns": 64000000,
    "stddev_ns": 0,
    "avg_ts": 250.000000,
    "stddev_ts": 0.000000,
    "samples_ns": [ 64000000 ],
    "samples_ts": [ 250 ]
  }
]"""
ANSWER = f"print({RESULT!r})"


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
    head, row, rule, *_ = capsys.readouterr().out.splitlines()
    assert head.split()[:6] == ["TEST", "THREADS", "DEPTH", "NANOLLAMA", "LLAMA.CPP", "RATIO"]
    test, threads, depth, own, theirs, ratio, *pairs, limit = row.split()
    assert (test, threads, depth, theirs) == ("tg4", "1", "0", "250.0")
    assert float(ratio) == pytest.approx(float(own) / 250, abs=0.01)
    assert pairs == [ratio, "to", ratio]
    assert re.fullmatch(r"\d+%", limit)
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


def figures(scene: bench_whole.Scene) -> Iterator[Json]:
    yield bench_whole.row("load, s", 2.0, 1.0)
    yield bench_whole.row("schema, ms", 5.0)


def test_without_tests_of_its_own_the_table_has_whole_commands(
    model: Path,
    peer: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = bench_command.torch_or_stand_in().get_num_threads()
    usual = {"cold start": bench_whole.cold_rows, "load": figures}
    monkeypatch.setattr(bench_whole, "FIGURES", usual)
    monkeypatch.setattr(bench_whole, "ELSEWHERE", (("long texts", "{long} -d 16384"),))
    flags = {"prompt_tokens": [16], "gen_tokens": [4]}
    parser = bench_command.bench_parser()
    parser.set_defaults(**flags)
    monkeypatch.setattr(bench_command, "bench_parser", lambda: parser)
    program = peer()
    try:
        assert bench("--model", model, "--compare", program, "-r", 1, "--threads", 2) == 0
    finally:
        bench_command.torch_or_stand_in().set_num_threads(before)
    text = capsys.readouterr().out
    rows = [line.split()[:2] for line in text.splitlines() if line[:2] in ("pp", "tg")]
    assert rows == [["pp16", "2"], ["tg4", "2"], ["tg4", "1"]]
    assert f"cold start: left out: there is no llama-completion beside {program}\n" in text
    assert re.search(r"(?m)^load, s +2 +1 +2$", text)
    assert re.search(r"(?m)^schema, ms +5 +- +-$", text)
    long = f"--model FILE_OF_LONG_CONTEXT --compare {program} -r 3 -d 16384"
    assert re.search(rf"(?m)^long texts +nanollama bench {re.escape(long)}$", text)


def test_cold_starts_take_turns_after_one_of_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("llama-bench", "llama-completion"):
        (tmp_path / name).touch(0o755)
    programs = list[str]()
    times = iter([(9.0, 9e6), (9.0, 9e6), (1.0, 4e6), (2.0, 5e6), (3.0, 6e6), (4.0, 7e6)])

    def watched(command: list[str]) -> tuple[float, float]:
        programs.append(Path(command[0]).name)
        return next(times)

    monkeypatch.setattr(bench_whole, "watched", watched)
    peer = bench_peer.Peer(str(tmp_path / "llama-bench"), "model.gguf", 2, "float16", True)
    seconds, memory = bench_whole.cold_rows(bench_whole.Scene(peer, None, 2))  # type: ignore[arg-type]
    assert programs == [Path(sys.executable).name, "llama-completion"] * 3
    assert (seconds["value"], seconds["peer_value"]) == (2.0, 3.0)
    assert (memory["value"], memory["peer_value"], memory["ratio"]) == (5.0, 6.0, 5 / 6)


def test_a_watched_command_gives_its_time_and_memory_or_why_it_failed() -> None:
    seconds, memory = bench_whole.watched([sys.executable, "-c", "x = b'x' * (1 << 25)"])
    assert seconds > 0
    assert 1 << 25 < memory < 1 << 28
    with pytest.raises(NanollamaError, match=r"exit code 3: 'no file'"):
        bench_whole.watched(["sh", "-c", "echo no file >&2; exit 3"])


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
