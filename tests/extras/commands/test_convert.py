"""`nanollama convert` from the command line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import nanollama
from nanollama import LLM

Capture = pytest.CaptureFixture[str]


def test_a_model_is_converted_and_measured(
    tiny: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    out, text = tmp_path / "model.gguf", tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20)
    flags = ["--quantize", "q4_0", "--text", str(text), "--measure", "--json"]
    assert nanollama.main(["convert", str(tiny()), str(out), *flags]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["bytes"] == out.stat().st_size
    assert set(result["types"]) == {"F32", "Q4_0", "Q8_0"}
    assert 0 < result["importance"] < 1
    measured = result["measured"]
    assert 0 < measured["divergence"] < 1
    assert 0.3 < measured["same_top"] <= 1
    assert measured["converted_perplexity"] == pytest.approx(measured["perplexity"], rel=0.5)


def test_the_same_model_measures_the_same(
    tiny: Callable[..., Path], tmp_path: Path, capsys: Capture
) -> None:
    out = tmp_path / "model.gguf"
    assert nanollama.main(["convert", str(tiny()), str(out), "--measure"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{out}: ")
    original, converted = (line.split() for line in lines[-3:-1])
    assert original[0] == "original"
    assert converted[0] == "converted"
    assert original[-1] == converted[-3]  # perplexity
    assert converted[-2:] == ["0.00000", "100.0%"]


def test_a_directory_is_written_too(tiny: Callable[..., Path], tmp_path: Path) -> None:
    out = tmp_path / "packed"
    assert nanollama.main(["convert", str(tiny()), str(out), "--quantize", "q8"]) == 0
    assert LLM(out).checkpoint.format == "safetensors"


def test_a_created_model_brings_its_template(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path / "cache"))
    file = nanollama.ModelStore().modelfile_path("mine")
    file.parent.mkdir(parents=True)
    file.write_text(f'FROM {tiny()}\nTEMPLATE """\n{{{{ messages[0].content }}}}\n"""\n')
    out = tmp_path / "mine.gguf"
    assert nanollama.main(["convert", "mine", str(out)]) == 0
    assert "messages[0]" in nanollama.open_checkpoint(out).text.templates["default"]


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["MODEL", "OUT.gguf", "--quantize", "q9"], "q9 is not known; known are: F32, F16"),
        (["MODEL", "no/such/OUT.gguf"], "its directory does not exist"),
        (["MODEL", "here.gguf"], "here.gguf exists"),
    ],
)
def test_wrong_usage(
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: Capture,
    argv: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.gguf").write_text("mine")
    words = [str(tiny()) if word == "MODEL" else word for word in argv]
    assert nanollama.main(["convert", *words]) == 2
    assert message in capsys.readouterr().err


def test_errors_are_one_line(tmp_path: Path, tiny: Callable[..., Path], capsys: Capture) -> None:
    calls: dict[str, list[Any]] = {
        "no such file or directory": ["./no/such", tmp_path / "a.gguf"],
        "not UTF-8": [tiny(), tmp_path / "a.gguf", "--quantize", "q4", "--text", tmp_path / "raw"],
    }
    (tmp_path / "raw").write_bytes(b"\xff\xfe")
    for message, argv in calls.items():
        assert nanollama.main(["convert", *map(str, argv)]) == 1
        err = capsys.readouterr().err
        assert message in err
        assert err.count("\n") == 1
    assert not list(tmp_path.glob("*.gguf"))
