"""A program for torchrun: each process loads its part of each model in turn, and process 0 prints
the outcome of each as a line of JSON. `outcome` is also used on whole models."""

from __future__ import annotations

import json
import sys
from typing import Any

import torch

from nanollama import LLM, GenerationRequest, SamplingParams

GREEDY = {"temperature": 0, "repeat_penalty": 1, "ignore_eos": True}


def requests(prompts: list[list[int]], num_tokens: int) -> list[GenerationRequest]:
    params = SamplingParams(**GREEDY, max_tokens=num_tokens, logprobs=2)
    return [GenerationRequest(prompt=ids, params=params) for ids in prompts]


def outcome(llm: LLM, prompts: list[list[int]], num_tokens: int = 24) -> dict[str, Any]:
    """Greedy tokens of the first prompt alone, of all together and of a longer text that begins
    with the first; the least margin by which a token was the best; logits of the first."""
    first = llm.complete(requests(prompts[:1], num_tokens)[0])
    together: list[list[int]] = [[] for _ in prompts]
    margins = [entry.top[0][1] - entry.top[1][1] for entry in first.logprobs]
    for delta in llm.stream(requests(prompts, num_tokens)):
        if delta.token_id is not None and delta.logprobs:
            together[delta.index].append(delta.token_id)
            (_, best), (_, other) = delta.logprobs.top
            margins.append(best - other)
    longer = prompts[0] + first.token_ids + prompts[1][:5]
    resumed = llm.complete(requests([longer], num_tokens)[0])
    margins += [entry.top[0][1] - entry.top[1][1] for entry in resumed.logprobs]
    return {
        "alone": first.token_ids,
        "together": together,
        "resumed": resumed.token_ids,
        "cached": resumed.usage.cached_tokens,
        "margin": min(margins),
        "logits": llm.logits(prompts[0]).tolist(),
    }


def main() -> None:
    from nanollama_extras.cluster import tensor_parallel

    torch.set_num_threads(1)
    world = tensor_parallel.join()
    for line in open(sys.argv[1], encoding="utf-8"):
        path, options, prompts = json.loads(line)
        try:
            llm = LLM(path, **options)
        except tensor_parallel.SplitError as error:
            if world.is_first:
                print(json.dumps({"error": str(error)}), flush=True)
            continue
        if world.is_first:
            found = outcome(llm, prompts)
            decoder: Any = llm.engine.decoder
            parts = (part for layer in decoder.layers for part in vars(layer.self_attn).values())
            found["bytes"] = sum(getattr(part, "nbytes", 0) for part in parts)
            print(json.dumps(found), flush=True)
            world.dismiss()
        else:
            tensor_parallel.follow(llm.engine.decoder)


if __name__ == "__main__":
    main()
