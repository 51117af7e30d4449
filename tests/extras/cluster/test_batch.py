"""A file of prompts on Ray: the answers are those of one machine, and no line is answered twice."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import psutil
import pytest

import nanollama
from nanollama_extras.cluster.batch import absolute

ROOT = Path(__file__).parents[3]
MODEL = ["--model", "tiny-random", "--seed", "7", "--max-tokens", "24", "--threads", "1"]


def run(*args: object) -> int:
    """The exit code of a command line."""
    try:
        return nanollama.main([str(arg) for arg in args])
    except SystemExit as ended:
        return int(ended.code or 0)


def answers(data: bytes) -> list[dict[str, Any]]:
    """The JSON lines of an output, without what depends on time and neighbours."""
    rows = [json.loads(line) for line in data.splitlines()]
    return [row | {"usage": row.get("usage", {}).get("completion_tokens")} for row in rows]


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    """Forty prompts; line 3 is no text, line 5 too long, line 6 empty."""
    lines = [b"Prompt %d of a file" % number for number in range(1, 41)]
    lines[2], lines[4], lines[5] = b"\xff", b"long " * 2000, b""
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\n".join(lines))
    return path


@pytest.fixture
def expected(prompts: Path, tmp_path: Path) -> list[dict[str, Any]]:
    """The answers of a batch without Ray."""
    output = tmp_path / "expected.jsonl"
    assert run(*MODEL, "--batch-file", prompts, "--output", output) == 1
    return answers(output.read_bytes())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--batch-file x --ray", "--batch-file with --ray needs --output FILE"),
        ("--batch-file x --ray --output -", "--batch-file with --ray needs --output FILE"),
        ("--batch-file x --unordered", "--replicas, --num-cpus and --unordered need --ray"),
        ("--serve --ray --unordered", "--unordered needs --batch-file"),
        ("--batch-file x --ray --embed", "--ray needs --serve or --batch-file, without --embed"),
    ],
)
def test_options_that_do_not_go_together(
    flags: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*flags.split()) == 2
    assert message in capsys.readouterr().err


def test_paths_of_models_are_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Actors may have another working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    names = ("model", "./model", "smollm2", "tiny-random", "org/name", None)
    path = str(tmp_path / "model")
    assert [absolute(name) for name in names] == [path, path, *names[2:]]


@pytest.mark.ray
def test_answers_are_those_of_one_machine_in_the_order_of_the_lines(
    ray_address: str,
    prompts: Path,
    expected: list[dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    output = tmp_path / "out.jsonl"
    flags = ("--ray", ray_address, "--replicas", 2, "--parallel", 4)
    assert run(*MODEL, "--batch-file", prompts, "--output", output, *flags) == 1
    assert answers(output.read_bytes()) == expected
    shown = capsys.readouterr()
    assert shown.out == ""
    failed = [line for line in shown.err.splitlines() if line.startswith("line ")]
    assert [line.split(":")[0] for line in sorted(failed)] == ["line 3", "line 5"]
    assert "[39 lines, 2 failed | " in shown.err
    assert sorted(path.name for path in tmp_path.glob("out*")) == ["out.jsonl"]


@pytest.mark.ray
def test_parquet_anywhere_and_in_any_order(
    ray_address: str, prompts: Path, expected: list[dict[str, Any]]
) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    texts = [line.decode("utf-8", "replace") for line in prompts.read_bytes().split(b"\n")]
    with fsspec.open("memory://batch/in.parquet", "wb") as file:
        parquet.write_table(pyarrow.table({"prompt": [None, *texts[6:]]}), file)
    flags = ("--unordered", "--ray", ray_address, "--replicas", "1:2", "--parallel", 4)
    places = ("--batch-file", "memory://batch/in.parquet", "--output", "memory://batch/o.parquet")
    assert run(*MODEL, *places, *flags) == 1
    with fsspec.open("memory://batch/o.parquet", "rb") as file:
        rows = {row["line"]: row for row in parquet.read_table(file).to_pylist()}
    assert rows.pop(1)["error"] == 'the line has no text as "prompt"'
    assert [rows[number]["text"] for number in sorted(rows)] == [r["text"] for r in expected[5:]]


@pytest.mark.ray
def test_a_model_that_does_not_load_is_one_line(
    ray_address: str, prompts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("work of hours\n")
    places = ("--batch-file", prompts, "--output", output)
    assert run("--model", "absent.gguf", *places, "--ray", ray_address) == 1
    (error,) = [line for line in capsys.readouterr().err.splitlines() if "error: " in line]
    assert error.startswith("error: absent.gguf: ")
    assert output.read_text() == "work of hours\n"
    assert sorted(numbers(tmp_path / "out.jsonl.parts" / "000001.jsonl")) == [3]


# ---- runs that end early -------------------------------------------------------------------------


def numbers(part: Path) -> list[int]:
    """The numbers of the whole lines of a part."""
    whole = part.read_bytes().rpartition(b"\n")[0]
    return [json.loads(line)["line"] for line in whole.splitlines()]


def wait_for(part: Path, process: subprocess.Popen[bytes], least: int) -> None:
    """Wait until a part has so many lines."""
    while not (part.exists() and len(numbers(part)) >= least):
        assert process.poll() is None, "it ended before"
        time.sleep(0.02)


def engines() -> Iterator[psutil.Process]:
    """The processes of engines on this machine that belong to Ray's of this test."""
    for process in psutil.Process().children(recursive=True):
        if process.cmdline()[:1] and "MapWorker" in process.cmdline()[0]:
            yield process


@pytest.mark.ray
def test_a_killed_run_goes_on_and_repeats_no_line(
    ray_address: str, prompts: Path, expected: list[dict[str, Any]], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    first, second = (tmp_path / "out.jsonl.parts" / f"00000{n}.jsonl" for n in (1, 2))
    flags = [*MODEL, "--ray", ray_address, "--replicas", "2", "--parallel", "1"]  # two slices each
    flags += ["--batch-file", str(prompts), "--output", str(output)]
    command = [sys.executable, ROOT / "nanollama.py", *flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    process = subprocess.Popen(command, env=environment)
    wait_for(first, process, 5)  # two of them failed at once
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not output.exists()
    before = numbers(first)

    process = subprocess.Popen(command, env=environment)
    wait_for(second, process, 3)
    next(engines()).kill()  # its blocks are answered again
    assert process.wait() == 1
    assert answers(output.read_bytes()) == expected  # each line once
    assert 5 <= len(before) < len(expected)
