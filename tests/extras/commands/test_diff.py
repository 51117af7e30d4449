"""`diff`: divergences equal torch's, perplexities transformers'; errors are one line."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch

import nanollama
from nanollama import LLM

TEXT = "the quick brown fox jumps over the lazy dog, and the café 日本 too\n" * 3


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    (tmp_path / "prompts.txt").write_text("hello\nthe capital of France\n", encoding="utf-8")
    return tmp_path / "prompts.txt"


def diff(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, dict[str, Any]]:
    code = nanollama.main(["diff", *map(str, argv), "--json"])
    return code, json.loads(capsys.readouterr().out)


def test_a_model_does_not_differ_from_itself(
    tiny: Callable[..., Path], text: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny("Llama", max_position_embeddings=1024)
    for flags in (["--text", text], ["--prompts", prompts]):
        code, found = diff(capsys, path, path, *flags, "--max-kl", "1e-12")
        assert code == 0
        assert found["kl_max"] == 0
        assert found["agreement"] == 1
        assert found["perplexity_a"] == found["perplexity_b"]
    assert [row["first_difference"] for row in found["prompts"]] == [None, None]


def test_divergence_and_perplexity_are_those_of_torch_and_transformers(
    tiny: Callable[..., Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = [tiny("Llama", max_position_embeddings=1024, rope_theta=t) for t in (1e4, 1e6)]
    _, found = diff(capsys, *paths, "--text", text)
    ids = LLM(paths[0]).encode(TEXT)
    p, q = (oracle.logits(oracle.load(path), ids)[:-1].double().log_softmax(-1) for path in paths)
    kl = torch.nn.functional.kl_div(q, p, reduction="none", log_target=True).sum(-1)
    assert found["tokens"] == len(ids) - 1
    assert found["kl_mean"] == pytest.approx(float(kl.mean()), rel=1e-3)
    assert found["kl_max"] == pytest.approx(float(kl.max()), rel=1e-3)
    assert found["worst"][0]["kl"] == found["kl_max"]
    agreement = (p.argmax(-1) == q.argmax(-1)).double().mean()
    assert found["agreement"] == pytest.approx(float(agreement))
    for key, rows in (("perplexity_a", p), ("perplexity_b", q)):
        expected = rows.gather(1, torch.tensor(ids[1:]).unsqueeze(1)).mean()
        assert found[key] == pytest.approx(math.exp(-float(expected)), rel=1e-4)


def test_a_longer_text_is_compared_in_windows(
    tiny: Callable[..., Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny("Llama")
    code, found = diff(capsys, path, path, "--text", text, "--ctx", "40")
    assert code == 0
    assert found["tokens"] == len(LLM(path).encode(TEXT)) - 1


def test_options_are_those_of_the_second_model(
    tiny: Callable[..., Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny("Llama", max_position_embeddings=1024)
    code, found = diff(capsys, path, path, "--text", text, "--quantize", "q4", "--max-kl", "1e-9")
    assert code == 1
    assert 0 < found["kl_mean"] < 1
    assert found["fingerprint_a"] == LLM(path).fingerprint != found["fingerprint_b"]


def test_the_answer_of_the_first_model_is_read_behind_each_template(
    tiny: Callable[..., Path], prompts: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    modelfile = tmp_path / "Modelfile"
    modelfile.write_text(f'FROM {tiny("Llama")}\nTEMPLATE """<{{{{ messages[0].content }}}}>"""\n')
    flags = ["--prompts", prompts, "--modelfile", modelfile, "--max-tokens", "6"]
    _, found = diff(capsys, tiny("Llama"), tiny("Llama"), *flags)
    assert found["kl_mean"] > 0
    assert 2 <= found["tokens"] <= 12


def test_the_report_is_for_people(
    tiny: Callable[..., Path], text: Path, prompts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny("Llama", max_position_embeddings=1024)
    for flags in (["--text", text], ["--prompts", prompts]):
        assert nanollama.main(["diff", str(path), str(path), *map(str, flags)]) == 0
        out = capsys.readouterr().out
        assert "KL divergence  mean 0, median 0, 99 % 0, largest 0 nats" in out
        assert "same likeliest 100.00%" in out


def test_models_of_different_vocabularies_are_refused(
    tiny: Callable[..., Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tiny("Llama", vocab_size=400)
    capsys.readouterr()
    assert nanollama.main(["diff", str(tiny("Llama")), str(other), "--text", str(text)]) == 1
    error = capsys.readouterr().err
    assert "different vocabularies" in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("flags", [[], ["--text", "a", "--prompts", "b"]])
def test_one_of_text_and_prompts_is_needed(
    flags: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert nanollama.main(["diff", "a", "b", *flags]) == 2
    assert "--text FILE or --prompts FILE" in capsys.readouterr().err
