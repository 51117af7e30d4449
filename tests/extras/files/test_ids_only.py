"""A model without a tokenizer takes and gives token ids; what needs text says what is missing."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import pytest
from serving import serving

import nanollama
from nanollama import LLM, CheckpointError, GenerationRequest, SamplingParams
from nanollama_extras.files import ids_only

IDS = [(7 * i) % 320 for i in range(20)]
GREEDY = SamplingParams(temperature=0, max_tokens=12)
CHAT = [{"role": "user", "content": "hi"}]
MISSING = r"holds no tokenizer \(tokenizer.json, .*\); give --tokenizer with a model that has one$"


@pytest.fixture
def bare(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny Llama whose directory has no tokenizer."""
    path = shutil.copytree(tiny("Llama"), tmp_path / "bare")
    (path / "tokenizer.json").unlink()
    return path


def test_ids_give_the_same_as_with_a_tokenizer(bare: Path, tiny_llm: LLM) -> None:
    llm, request = LLM(bare), GenerationRequest(IDS, params=GREEDY)
    ours, theirs = llm.complete(request), tiny_llm.complete(request)
    assert ours.text == ""
    assert (ours.token_ids, ours.finish_reason) == (theirs.token_ids, theirs.finish_reason)
    assert llm.logits(IDS).equal(tiny_llm.logits(IDS))
    assert llm.embed([IDS]) == tiny_llm.embed([IDS])
    assert list(llm.score([(IDS, 5)])) == list(tiny_llm.score([(IDS, 5)]))


def test_the_end_is_the_one_that_the_files_declare(bare: Path) -> None:
    llm, request = LLM(bare), GenerationRequest(IDS, params=GREEDY)
    token_ids = llm.complete(request).token_ids
    end = next(i for i, token in enumerate(token_ids) if token not in token_ids[:i] and i)
    (bare / "generation_config.json").write_text(f'{{"eos_token_id": [{token_ids[end]}]}}')
    answer = LLM(bare).complete(request)
    assert (answer.token_ids, answer.finish_reason) == (token_ids[: end + 1], "stop")


@pytest.mark.parametrize(
    "use",
    [
        lambda llm: llm.complete(GenerationRequest("hello", params=GREEDY)),
        lambda llm: llm.complete(GenerationRequest("x" * 9000, params=GREEDY)),
        lambda llm: llm.complete(GenerationRequest(messages=CHAT)),
        lambda llm: llm.complete(
            GenerationRequest(messages=CHAT, tools=[{"function": {"name": "f"}}])
        ),
        lambda llm: llm.complete(GenerationRequest(IDS, params=SamplingParams(stop=("a",)))),
        lambda llm: llm.complete(GenerationRequest(IDS, params=SamplingParams(regex="a+"))),
        lambda llm: llm.complete(GenerationRequest(IDS, params=SamplingParams(schema={}))),
        lambda llm: llm.encode("hello"),
        lambda llm: llm.decode(IDS),
        lambda llm: llm.embed(["hello"]),
        lambda llm: llm.tokenizer.spell("hello"),
    ],
)
def test_text_needs_a_tokenizer(use: Callable[[LLM], Any], bare: Path) -> None:
    with pytest.raises(CheckpointError, match=MISSING):
        use(LLM(bare))


def test_a_gguf_without_a_vocabulary_runs_on_ids(
    tiny: Callable[..., Path], tiny_llm: LLM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in ("add_tokenizer_model", "add_tokenizer_pre", "add_token_list"):
        monkeypatch.setattr(gguf_files.gguf.GGUFWriter, method, lambda *_: None)
    file, _ = gguf_files.convert(tiny("Llama"), tmp_path / "bare.gguf")
    llm = LLM(file)
    request = GenerationRequest(IDS, params=GREEDY)
    assert llm.complete(request).token_ids == tiny_llm.complete(request).token_ids
    assert llm.tokenizer.end_ids == {1}  # tokenizer.ggml.eos_token_id
    with pytest.raises(CheckpointError, match=MISSING):
        llm.encode("hello")
    assert LLM(file, tokenizer=str(tiny("Llama"))).encode("fox") == tiny_llm.encode("fox")


def test_a_tokenizer_that_is_damaged_is_no_missing_one(bare: Path) -> None:
    (bare / "tokenizer.json").write_text("{}")
    with pytest.raises(CheckpointError, match="the tokenizer cannot be built"):
        LLM(bare)


MODES = ["--prompt x", "--prompt x --chat", "--interactive", "--batch-file -", "--embed --prompt x"]


@pytest.mark.parametrize("flags", [*MODES, "--serve --port 0"])
def test_the_command_line_says_so_before_the_weights_are_read(
    flags: str, bare: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nanollama.Weights, "_find", lambda *_: pytest.fail("weights are read"))
    monkeypatch.setattr(nanollama.signal, "signal", lambda *_: None)
    monkeypatch.setattr(nanollama, "read_input", lambda name: b"x")
    assert nanollama.main([*flags.split(), "--model", str(bare)]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"error: {bare}: holds no tokenizer" in error  # a server's begins with the time
    assert error.endswith("; give --tokenizer with a model that has one")


def test_bench_measures_on_ids(bare: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "-p 8 -n 4 -r 1 --kernels torch".split()
    assert nanollama.main(["bench", "--model", str(bare), *flags]) == 0
    assert "pp8" in capsys.readouterr().out


def test_a_server_of_another_program_takes_ids(bare: Path) -> None:
    with serving(lambda: LLM(bare)) as live:
        answer = live.text(IDS, max_tokens=3, temperature=0)
        assert answer.status_code == 200
        assert answer.json()["usage"]["completion_tokens"] == 3
        refused = live.text("hello")
        assert refused.status_code == 500
        assert "give --tokenizer" in refused.json()["error"]["message"]


def test_reading_the_text_of_each_token_is_harmless(bare: Path) -> None:
    tokenizer = ids_only.open_tokenizer(nanollama.open_text(bare))
    assert tokenizer.num_tokens == 0
    assert set(itertools.chain(map(tokenizer.token_bytes, IDS))) == {b""}
