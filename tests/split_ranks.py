"""A program for torchrun: the processes load each model in turn, and process 0 prints the outcome
of each as a line of JSON. `outcome` also takes whole models."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from nanollama import LLM, AnswerForm, Delta, NanollamaError, Prepared, SamplingParams
from nanollama import GenerationRequest as Request
from nanollama_extras.cluster import tensor_parallel
from nanollama_extras.models.vision import Encoded, VectorId

Answer = list[tuple[int, float]]  # tokens, each with the margin by which it was the likeliest


def requests(prompts: list[list[int]]) -> list[Prepared]:
    greedy = {"temperature": 0, "repeat_penalty": 1, "ignore_eos": True, "max_tokens": 24}
    request = Request(prompt="", params=SamplingParams(**greedy, logprobs=2))
    return [Prepared(request, ids, "", AnswerForm()) for ids in prompts]


def with_image(ids: list[int], width: int) -> list[int]:
    """A prompt with an image of 3 x 4 rows after its fifth token."""
    random = torch.Generator().manual_seed(len(ids))
    rows, *deep = torch.randn(3, 12, width, generator=random)
    image = Encoded(f"image {len(ids)}", "", rows, tuple(deep))
    made = [VectorId.of(7, image, i) for i in range(12)]
    for i, row in enumerate(made):
        row.place = (5, 5 + i // 4, 5 + i % 4)
    return [*ids[:5], *made, *ids[5:]]


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


def outcome(llm: LLM, prompts: list[list[int]], has_image: bool = False) -> dict[str, Any]:
    """Answers to the first prompt alone, to all together, and to a text that begins with the first
    one and its answer; how many of this text's tokens were in the cache; logits of the first, which
    has no image there. has_image: whether the first two have one."""
    plain = prompts[0]
    if has_image:
        prompts = [with_image(ids, llm.config.n_embd) for ids in prompts[:2]] + prompts[2:]
    (alone,), _ = answers(llm, prompts[:1])
    together, _ = answers(llm, prompts)
    longer = prompts[0] + [token_id for token_id, _ in alone] + prompts[1][:5]
    (resumed,), (last,) = answers(llm, [longer])
    assert last.usage
    matrices = [layer.self_attn.qkv_proj.nbytes for layer in llm.engine.decoder.layers]
    return {
        "answers": [alone, *together, resumed],
        "cached": last.usage.cached_tokens,
        "logits": llm.logits(plain).tolist(),
        "bytes": sum(matrices) + llm.engine.decoder.embed_tokens.nbytes,
    }


def run_in_process_0(llm: LLM, prompts: list[list[int]], has_image: bool) -> dict[str, Any]:
    """The outcome, and the error of a product outside a step."""
    found, decoder = outcome(llm, prompts, has_image), llm.engine.decoder
    try:
        decoder.lm_head(torch.zeros(1, decoder.config.n_embd))
    except NanollamaError as error:
        found["error"] = str(error)
    return found


def main() -> None:
    torch.set_num_threads(1)
    world = tensor_parallel.join()
    for line in Path(sys.argv[1]).read_text().splitlines():
        path, options, prompts, has_image = json.loads(line)
        llm = LLM(path, **options)
        if world.is_first:
            print(json.dumps(run_in_process_0(llm, prompts, has_image)), flush=True)
            world.dismiss()
        else:
            tensor_parallel.follow(llm.engine.decoder)
    torch.distributed.destroy_process_group()  # else its threads may outlive what they use


if __name__ == "__main__":
    main()
