"""Answers of a model in each mode. As a program, which gets a model's path and a folder for its
files, it prints them as JSON, with the modules that were imported for them; it imports no torch."""

from __future__ import annotations

import contextlib
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest

import nanollama
from nanollama import LLM, SamplingParams
from nanollama_extras.commands import bench

GREEDY = SamplingParams(temperature=0, max_tokens=8, logprobs=2)


def by_command(*argv: object, stdin: str = "") -> str:
    """What a command line prints"""
    out, before = io.StringIO(), sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        with contextlib.redirect_stdout(out):
            assert nanollama.main([str(word) for word in argv]) == 0
    finally:
        sys.stdin = before
    return out.getvalue()


def by_bench(model: Path) -> Any:
    flags = ("-p", 4, "-n", 2, "-r", 1, "--json")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "BANDWIDTH_BYTES", 1 << 20)
        patch.setattr(bench, "BANDWIDTH_S", 0.001)
        return json.loads(by_command("bench", "--model", model, *flags))["kernels"]


def by_server(llm: LLM) -> Any:
    from serving import serving

    with serving(lambda: llm) as live:
        fields = {"temperature": 0, "max_tokens": 6, "seed": 1}
        answers = live.text("the fox", logprobs=2, **fields), live.chat("hello", **fields)
    return [answer.json()["choices"] for answer in answers]


def all_answers(model: Path, folder: Path) -> dict[str, Any]:
    prompts = folder / "prompts.txt"
    prompts.write_text("hello\nthe lazy dog\n")
    plain = ("--model", model, "--temp", 0, "--max-tokens", 6)
    llm = LLM(model)
    request = nanollama.GenerationRequest("the quick brown fox " * 9, params=GREEDY)
    answer = llm.complete(request)
    return {
        "prompt": by_command(*plain, "--prompt", "hello"),
        "batch": by_command(*plain, "--batch-file", prompts),
        "talk": by_command(*plain, "--interactive", stdin="hello\nwhy\n"),
        "library": [answer.token_ids, [(e.logprob, e.top) for e in answer.logprobs]],
        "schema": llm.complete("hello", schema={"type": "boolean"}, seed=1).text,
        "bench": by_bench(model),
        "server": by_server(llm),
    }


if __name__ == "__main__":
    found: Any = [
        all_answers(Path(model), Path(sys.argv[1])) | {"torch": "torch" in sys.modules}
        for model in sys.argv[2:]
    ]
    llm = LLM(sys.argv[2])
    before = llm.complete("the fox", temperature=0, max_tokens=20).token_ids
    warnings.simplefilter("error")
    logits = llm.logits(before)  # from here on, torch is imported
    others = [LLM(sys.argv[2], kernels="torch"), llm]
    found += [[x.complete("the fox", temperature=0, max_tokens=20).token_ids for x in others]]
    found += [before, len(llm.embed(["hello"])[0]), list(logits.shape), llm.config.n_vocab]
    print(json.dumps(found))
