"""`eval`: transformers gives the same perplexity, lm-evaluation-harness the same choices."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import tokenizers
from serving import serving

import nanollama
from nanollama import LLM
from nanollama_extras.commands import eval as eval_command

ROOT = Path(__file__).parents[3]
TEXT = "the quick brown fox jumps over the lazy dog, and the café 日本 too\n" * 6


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path / "text.txt"


@pytest.fixture
def task(tmp_path: Path) -> Path:
    """Thirty questions in random words."""
    pick = random.Random(0)
    words = "the fox dog quick lazy capital of France jumps over what brown".split()
    rows = []
    for number in range(30):
        choices = [" " + " ".join(pick.choices(words, k=pick.randint(1, 5))) for _ in range(3)]
        prompt = " ".join(pick.choices(words, k=20)) + " " * (number % 2)
        rows.append({"prompt": prompt, "choices": choices, "answer": pick.randrange(3)})
    path = tmp_path / "task.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def evaluate(capsys: pytest.CaptureFixture[str], *flags: object) -> dict[str, Any]:
    assert nanollama.main(["eval", *map(str, flags), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def logprobs(model: Any, ids: list[int], start: int) -> list[float]:
    rows = oracle.logits(model, ids).log_softmax(-1)
    return [float(rows[i - 1, ids[i]]) for i in range(start, len(ids))]


def test_score_equals_transformers_and_processes_a_shared_prefix_once(
    tiny: Callable[..., Path],
) -> None:
    llm, model = LLM(tiny("Llama"), prefill_chunk=16, parallel=3), oracle.load(tiny("Llama"))
    shared = oracle.random_ids(60)
    texts = [(shared + oracle.random_ids(n, seed=n), 58 + n % 3) for n in range(2, 14)]
    texts += [(oracle.random_ids(2, seed=99), 1), (oracle.random_ids(40, seed=98), 39)]
    found = dict(llm.score(texts))
    assert sorted(found) == list(range(len(texts)))
    for index, (ids, start) in enumerate(texts):
        assert found[index] == pytest.approx(logprobs(model, ids, start), abs=1e-4)
    alone = sum(len(ids) for ids, _ in texts)
    assert llm.engine.stats.prefill_tokens < alone - 10 * 50
    assert not llm.engine.has_work


def test_leaving_score_early_leaves_nothing_running(tiny_llm: LLM) -> None:
    scores = tiny_llm.score([(oracle.random_ids(30, seed=n), 5) for n in range(40)])
    next(scores)
    scores.close()
    assert not tiny_llm.engine.has_work


def test_a_text_that_fits_is_scored_whole(
    tiny: Callable[..., Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny("Llama", max_position_embeddings=1024)
    found = evaluate(capsys, path, "--text", text)["text"]
    ids = LLM(path).encode(TEXT)
    expected = logprobs(oracle.load(path), ids, 1)
    assert found["tokens"] == len(expected)
    assert found["bytes"] == len(TEXT.encode()) - len("the")  # the first token
    assert found["perplexity"] == pytest.approx(math.exp(-sum(expected) / len(expected)))
    bits = -sum(expected) / math.log(2)
    assert found["bits_per_byte"] == pytest.approx(bits / found["bytes"])


def test_a_longer_text_is_scored_in_windows_that_overlap(
    tiny: Callable[..., Path], text: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny("Llama")
    flags = ("--model", path, "--text", text, "--window", 50, "--stride", 20)
    found = evaluate(capsys, *flags)["text"]
    model, ids = oracle.load(path), LLM(path).encode(TEXT)
    expected = logprobs(model, ids[:50], 1)
    for at in range(50, len(ids), 20):
        end = min(at + 20, len(ids))
        expected += logprobs(model, ids[end - 50 : end], 50 - (end - at))
    assert found["tokens"] == len(expected) == len(ids) - 1
    assert found["perplexity"] == pytest.approx(math.exp(-sum(expected) / len(expected)))


@pytest.mark.parametrize("num", [1, 5, 9, 10, 11, 30])
def test_windows_score_every_token_once_and_begin_with_bos(num: int) -> None:
    ids = list(range(1, num + 1))
    seen: list[int] = []
    for window, start in eval_command.text_windows([0], ids, 10, 4):
        assert window[0] == 0
        assert len(window) <= 10
        assert window[1:] == list(range(window[1], window[-1] + 1))
        seen += window[start:]
    assert seen == ids


def test_choices_are_the_likeliest_by_transformers(
    tiny: Callable[..., Path], task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny("Llama")
    found = evaluate(capsys, "--model", path, "--task", task)["task"]
    llm, model = LLM(path), oracle.load(path)
    right = right_norm = 0
    for line in task.read_text().splitlines():
        row = json.loads(line)
        start = len(llm.encode(row["prompt"].rstrip()))
        sums = [
            sum(logprobs(model, llm.encode(row["prompt"] + choice), start))
            for choice in row["choices"]
        ]
        norms = [total / len(choice) for total, choice in zip(sums, row["choices"])]
        right += sums.index(max(sums)) == row["answer"]
        right_norm += norms.index(max(norms)) == row["answer"]
    assert found["questions"] == 30
    assert found["accuracy"] == right / 30
    assert found["accuracy_norm"] == right_norm / 30
    low, high = found["accuracy_interval"]
    assert 0 < low < right / 30 < high < 1


def test_the_interval_is_wilsons() -> None:
    """Newcombe 1998, https://doi.org/10.1002/(SICI)1097-0258(19980430)17:8<857::AID-SIM777>3.0"""
    assert eval_command.interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert eval_command.interval(0, 20) == pytest.approx((0.0, 0.1611), abs=5e-5)


@pytest.mark.skipif(not importlib.util.find_spec("lm_eval"), reason="needs lm-eval, 600 MB")
def test_the_harness_finds_the_same_through_the_server(
    tiny: Callable[..., Path], task: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(tiny("Llama"), tmp_path / "model")
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        "<s> $A", special_tokens=[("<s>", 0)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    expected = evaluate(capsys, "--model", path, "--task", task)["task"]
    with serving(lambda: LLM(path), model_id="tiny") as live:
        done = subprocess.run(
            [sys.executable, "examples/harness.py", live.url, str(task)],
            cwd=ROOT,
            env={**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    figures = dict(line.split() for line in done.stdout.splitlines() if line.startswith("acc"))
    assert float(figures["acc"]) == pytest.approx(expected["accuracy"], abs=1e-4)
    assert float(figures["acc_norm"]) == pytest.approx(expected["accuracy_norm"], abs=1e-4)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{}", "is not"),
        ("[1]", "is not"),
        ('{"prompt": "a", "choices": ["b"], "answer": 1}', "is not"),
        ('{"prompt": "a", "choices": [""], "answer": 0}', "is not"),
        ('{"prompt": "a", "choices": [], "answer": 0}', "is not"),
        ('{"prompt": "", "choices": ["b"], "answer": 0}', "no token of the prompt"),
        (json.dumps({"prompt": "a", "choices": ["b" * 600], "answer": 0}), "no token of the"),
        ("", "holds no questions"),
        ("\udcff", "line 1"),
    ],
)
def test_a_task_that_cannot_be_asked_is_one_line(
    line: str,
    message: str,
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "task.jsonl"
    path.write_text(line + "\n", encoding="utf-8", errors="surrogateescape")
    assert nanollama.main(["eval", "--model", str(tiny("Llama")), "--task", str(path)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "flags", [(), ("--text", "x", "--window", "1"), ("--text", "x", "--stride", "255")]
)
def test_flags_that_make_no_sense_are_usage_errors(
    flags: tuple[str, ...], tiny: Callable[..., Path]
) -> None:
    assert nanollama.main(["eval", "--model", str(tiny("Llama")), *flags]) == 2
