"""--prompt-cache: prompts that another engine has read, with the same answers to the last bit."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
from command_line import Ran
from families import ALL, ROWS
from oracle import Tiny
from serving import serving
from traffic import assert_company_changes_nothing

from nanollama import LLM, Completion, GenerationRequest, SamplingParams
from nanollama_extras.answers import prompt_cache
from nanollama_extras.models import recurrent

BLOCK = 16
IDS = oracle.random_ids(110, seed=1)
NUM_BLOCKS = len(IDS) // BLOCK


@pytest.fixture(autouse=True)
def _short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompt_cache, "BLOCK", BLOCK)


def load(path: Path, folder: Path | None, **options: Any) -> LLM:
    return LLM(path, parallel=2, prefill_chunk=40, prompt_cache=folder, **options)


def ask(llm: LLM, ids: list[int], **params: Any) -> Completion:
    fixed = {"seed": 5, "max_tokens": 12, "logprobs": 3, "ignore_eos": True}
    return llm.complete(GenerationRequest(ids, params=SamplingParams(**{**fixed, **params})))


def wait(llm: LLM) -> list[Path]:
    """The files of an engine, once they are written."""
    store = llm.engine.scheduler.disk.store  # type: ignore[attr-defined]
    store.wait()
    return sorted(store.folder.iterdir())


def essence(answer: Completion) -> Any:
    return answer.token_ids, answer.logprobs


def essences(llm: LLM, ids: list[int]) -> list[Any]:
    return [essence(ask(llm, ids, temperature=temperature)) for temperature in (0.7, 0.0)]


def assert_read_from_files(path: Path, folder: Path, ids: list[int], **options: Any) -> int:
    """A second engine takes what a first one computed, and answers as one without files does ->
    the number of tokens that it takes"""
    expected = essences(load(path, None, **options), ids)
    first = load(path, folder, **options)
    assert essences(first, ids) == expected
    wait(first)
    second = load(path, folder, **options)
    answer = ask(second, ids)
    assert essences(second, ids) == expected
    assert essence(answer) == expected[0]
    return answer.usage.cached_tokens


KINDS: dict[str, dict[str, Any]] = {
    "float32": {"kernels": "torch", "kv_dtype": "float32"},
    "bfloat16": {"kernels": "torch", "kv_dtype": "bfloat16"},
    "q8": {"kernels": "torch", "kv_dtype": "q8"},
    "native-float32": {"kernels": "native", "kv_dtype": "float32"},
    "native-float16": {"kernels": "native", "kv_dtype": "float16", "quantize": "q4"},
    "native-q8": {"kernels": "native", "kv_dtype": "q8", "quantize": "q8", "lookup": 4},
}


@pytest.mark.parametrize("kind", KINDS)
def test_every_type_of_keys_and_values(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    assert assert_read_from_files(tiny(), tmp_path, IDS, **KINDS[kind]) == NUM_BLOCKS * BLOCK


@pytest.mark.parametrize(
    ("family", "kernels"),
    [
        ("mistral", "torch"),
        ("mistral", "native"),
        ("gemma4_text", "native"),
        ("deepseek_v3", "native"),
    ],
)
def test_windows_shared_layers_and_latents(
    tiny: Tiny, tmp_path: Path, family: str, kernels: str
) -> None:
    """The text is longer than a ring, which has 512 positions."""
    name, shape = ROWS[family]
    path, ids = tiny(name, **shape, max_position_embeddings=2048), oracle.random_ids(700, seed=2)
    assert assert_read_from_files(path, tmp_path, ids, kernels=kernels) == 688


@pytest.mark.parametrize("family", ["qwen3_5_text", "falcon_h1"])
def test_states_resume_at_the_end_of_a_block(tiny: Tiny, tmp_path: Path, family: str) -> None:
    name, shape = ROWS[family]
    path, ids = tiny(name, **shape), [token if token > 3 else 4 for token in IDS]
    ids[50] = 1  # the end of the first turn
    assert assert_read_from_files(path, tmp_path, ids, quantize="q8") == 96
    other = [*ids[:51], *reversed(ids[51:])]
    assert ask(load(path, tmp_path, quantize="q8"), other).usage.cached_tokens == 48


def test_a_text_that_outgrows_its_rope_has_other_blocks(tiny: Tiny, tmp_path: Path) -> None:
    """Up to 64 tokens, this RoPE has other wavelengths; the answer goes beyond."""
    path = tiny("Phi3", **ALL["phi3-longrope"][1])
    assert assert_read_from_files(path, tmp_path, IDS[:60]) == 3 * BLOCK
    assert assert_read_from_files(path, tmp_path, IDS) == NUM_BLOCKS * BLOCK
    assert len(list(tmp_path.iterdir())) == 3 + NUM_BLOCKS


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3_5_text"])
def test_requests_that_come_and_go_get_the_answers_that_each_gets_alone(
    tiny: Tiny, tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recurrent, "SAVE_EVERY", 32)
    name, shape = ROWS[family]
    for _ in range(2):
        path = tiny(name, **shape)
        llm = assert_company_changes_nothing(path, 300, prompt_cache=tmp_path)
        assert wait(llm)


@pytest.fixture(scope="module")
def path(tiny: Tiny) -> Path:
    return tiny()


@pytest.fixture
def folder(path: Path, tmp_path: Path) -> Path:
    """A folder with the blocks of IDS."""
    llm = load(path, tmp_path)
    ask(llm, IDS)
    assert len(wait(llm)) == NUM_BLOCKS
    return tmp_path


def test_another_question_begins_after_the_same_blocks(path: Path, folder: Path) -> None:
    assert ask(load(path, folder), [*IDS[:70], *IDS[:20]]).usage.cached_tokens == 64
    assert ask(load(path, folder), [7, *IDS]).usage.cached_tokens == 0


def test_the_last_token_is_read_for_its_logits(path: Path, folder: Path) -> None:
    assert ask(load(path, folder), IDS[: 4 * BLOCK]).usage.cached_tokens == 3 * BLOCK
    scored = ask(load(path, folder), IDS, prompt_logprobs=True)
    assert scored.usage.cached_tokens == 0


def test_a_longer_prefix_in_memory_is_preferred(path: Path, folder: Path) -> None:
    llm = load(path, folder)
    ask(llm, IDS)
    assert ask(llm, IDS).usage.cached_tokens == len(IDS) - 1


def test_files_of_another_model_are_not_read(path: Path, folder: Path) -> None:
    for options in ({"quantize": "q8"}, {"kv_dtype": "float16"}):
        assert ask(load(path, folder, **options), IDS).usage.cached_tokens == 0
    weights = path / "model.safetensors"
    times = weights.stat()
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns + 1))  # as if it were written anew
    try:
        assert ask(load(path, folder), IDS).usage.cached_tokens == 0
    finally:
        os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert ask(load(path, folder), IDS).usage.cached_tokens == NUM_BLOCKS * BLOCK


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen3_5_text"])
def test_a_damaged_block_is_computed_and_written_anew(
    tiny: Tiny, tmp_path: Path, family: str
) -> None:
    name, shape = ROWS[family]
    path = tiny(name, **shape)
    llm = load(path, tmp_path)
    expected = essence(ask(llm, IDS))
    before = {file: file.read_bytes() for file in wait(llm)}
    plan = llm.engine.scheduler.disk.keys(IDS, 0)  # type: ignore[attr-defined]
    damaged = tmp_path / f"{plan[2]}.kv"
    damaged.write_bytes(before[damaged][:-1] + bytes([before[damaged][-1] ^ 1]))
    other = load(path, tmp_path)
    answer = ask(other, IDS)
    assert essence(answer) == expected
    assert answer.usage.cached_tokens == (0 if family == "qwen3_5_text" else 2 * BLOCK)
    assert {file: file.read_bytes() for file in wait(other)} == before


def test_a_changed_weight_ends_it(path: Path, folder: Path) -> None:
    llm = load(path, folder)
    llm.forget()
    assert ask(llm, [*IDS, *IDS]).usage.cached_tokens == 0
    assert len(wait(llm)) == NUM_BLOCKS
    other = load(path, folder)
    other.engine.decoder.layers[0] = other.engine.decoder.layers[1]
    assert ask(other, [*IDS, *IDS]).usage.cached_tokens == 0
    assert len(wait(other)) == NUM_BLOCKS


def test_a_cancelled_prompt_leaves_what_it_has_computed(path: Path, folder: Path) -> None:
    llm = load(path, folder)
    ids = oracle.random_ids(100, seed=9)
    seq = llm.start(GenerationRequest(ids))
    llm.engine.step()
    llm.engine.cancel(seq)
    assert len(wait(llm)) == NUM_BLOCKS + 2  # of 40 tokens
    assert ask(load(path, folder), ids).usage.cached_tokens == 2 * BLOCK


def test_blocks_before_an_image_have_keys(path: Path, folder: Path) -> None:
    class Row(int):
        vector = torch.zeros(64)

    disk: Any = load(path, folder).engine.scheduler.disk  # type: ignore[attr-defined]
    assert disk.keys([*IDS[:40], Row(5), *IDS], 0) == disk.keys(IDS, 0)[:2]


def test_the_budget_holds_and_a_prompts_beginning_stays(path: Path, tmp_path: Path) -> None:
    llm = load(path, tmp_path, prompt_cache_mb=1)
    disk: Any = llm.engine.scheduler.disk
    disk.store.most_bytes = 3 * disk.layout.num_bytes + 1000
    ask(llm, IDS)
    assert sorted(file.stem for file in wait(llm)) == sorted(disk.keys(IDS, 0)[:3])
    assert ask(load(path, tmp_path), IDS).usage.cached_tokens == 3 * BLOCK


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("qwen3_5_text", {"state_mb": 0}, "--state-mb leaves no room"),
        ("mistral", {"prefill_chunk": 500}, "too short for --prefill-chunk 500"),
    ],
)
def test_a_model_without_an_effect_says_so(
    tiny: Tiny,
    tmp_path: Path,
    cli: Callable[..., Ran],
    family: str,
    options: dict[str, Any],
    reason: str,
) -> None:
    name, shape = ROWS[family]
    flags = [word for key, n in options.items() for word in (f"--{key.replace('_', '-')}", n)]
    model = ("--model", tiny(name, **shape), "--prompt", "hello", "-m", 2)
    ran = cli(*model, *flags, "--prompt-cache", tmp_path / "new")
    assert ran.code == 0
    assert "--prompt-cache has no effect for this model: " in ran.err
    assert reason in ran.err
    assert not (tmp_path / "new").exists()


def test_the_command_line_keeps_prompts_until_it_ends(
    tiny: Tiny, tmp_path: Path, cli: Callable[..., Ran]
) -> None:
    """The first process writes blocks of the usual length before it ends."""
    path = tiny(max_position_embeddings=1024)
    prompt = "the quick brown fox jumps over the lazy dog; " * 24
    flags = ["--model", str(path), "--prompt", prompt, "-m", "1", "--prompt-cache", str(tmp_path)]
    first = [sys.executable, "-m", "nanollama", *flags, "--kernels", "torch", "--threads", "1"]
    subprocess.run(first, check=True, capture_output=True)
    files = list(tmp_path.iterdir())
    assert files
    assert all(file.suffix == ".kv" for file in files)
    prompt_cache.BLOCK = 128
    second = cli(*first[3:], "--verbose")
    assert f"{128 * len(files)} of " in second.err
    shown = cli("show", path, "--prompt-cache", tmp_path).out
    assert f"prompt cache  {tmp_path}, " in shown


def test_usage_counts_what_comes_from_files(path: Path, folder: Path) -> None:
    with serving(lambda: load(path, folder)) as live:
        usage = live.text(IDS, max_tokens=2).json()["usage"]
        metrics = live.http.get("/metrics").text
    assert usage["prompt_tokens_details"]["cached_tokens"] == NUM_BLOCKS * BLOCK
    assert f"nanollama_cached_tokens_total {float(NUM_BLOCKS * BLOCK)}" in metrics
