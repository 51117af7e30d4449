"""A program for torchrun: the processes load each model in turn, and process 0 prints the outcome
of each as a line of JSON. `outcome` also takes whole models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from nanollama import LLM, Delta, GenerationRequest, NanollamaError, SamplingParams
from nanollama_extras.cluster import tensor_parallel

Answer = list[tuple[int, float]]  # tokens, each with the margin by which it was the likeliest


def requests(prompts: list[list[int]]) -> list[GenerationRequest]:
    greedy = {"temperature": 0, "repeat_penalty": 1, "ignore_eos": True, "max_tokens": 24}
    params = SamplingParams(**greedy, logprobs=2)
    return [GenerationRequest(prompt=ids, params=params) for ids in prompts]


def answers(llm: LLM, prompts: list[list[int]]) -> tuple[list[Answer], list[Delta]]:
    """The answers to prompts that run together, and the last delta of each."""
    found: list[Answer] = [[] for _ in prompts]
    last = {}
    for delta in llm.stream(requests(prompts)):
        assert delta.token_id is not None
        assert delta.logprobs is not None
        (_, best), (_, other) = delta.logprobs.top
        found[delta.index].append((delta.token_id, best - other))
        last[delta.index] = delta
    return found, [last[i] for i in range(len(prompts))]


def outcome(llm: LLM, prompts: list[list[int]]) -> dict[str, Any]:
    """Answers to the first prompt alone, to all together, and to a text that begins with the first
    one and its answer; how many of this text's tokens were in the cache; logits of the first."""
    (alone,), _ = answers(llm, prompts[:1])
    together, _ = answers(llm, prompts)
    longer = prompts[0] + [token_id for token_id, _ in alone] + prompts[1][:5]
    (resumed,), (last,) = answers(llm, [longer])
    assert last.usage
    matrices = [layer.self_attn.qkv_proj.nbytes for layer in llm.engine.decoder.layers]
    return {
        "answers": [alone, *together, resumed],
        "cached": last.usage.cached_tokens,
        "logits": llm.logits(prompts[0]).tolist(),
        "bytes": sum(matrices) + llm.engine.decoder.embed_tokens.nbytes,
    }


def run_in_process_0(llm: LLM, prompts: list[list[int]]) -> dict[str, Any]:
    """The outcome, and the error of a product outside a step."""
    found, decoder = outcome(llm, prompts), llm.engine.decoder
    try:
        decoder.lm_head(torch.zeros(1, decoder.config.n_embd))
    except NanollamaError as error:
        found["error"] = str(error)
    return found


def main() -> None:
    torch.set_num_threads(1)
    world = tensor_parallel.join()
    for line in Path(sys.argv[1]).read_text().splitlines():
        path, options, prompts = json.loads(line)
        llm = LLM(path, **options)
        if world.is_first:
            print(json.dumps(run_in_process_0(llm, prompts)), flush=True)
            world.dismiss()
        else:
            tensor_parallel.follow(llm.engine.decoder)


if __name__ == "__main__":
    main()
