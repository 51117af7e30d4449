"""The field `timings` of OpenAI's answers, as llama.cpp's server names it.

Seam       `nanollama.ChoicesReply` adds it to an answer.
Remove     delete this file; answers then have no timings, and the page shows no speed.
Spec       https://github.com/ggml-org/llama.cpp/blob/master/tools/server/README.md
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanollama import Json, Usage


def timings_field(usages: list[Usage]) -> Json:
    """The field, to be added to an answer."""
    return {"timings": timings_body(usages)}


def timings_body(usages: list[Usage]) -> Json:
    """`timings` as llama.cpp names them, summed over all choices."""
    total = Counter[str]()
    for usage in usages:
        total.update(dataclasses.asdict(usage))
    cached, prompt_s, decode_s = total["cached_tokens"], total["prefill_s"], total["decode_s"]
    num_prompt, num_drafted = total["prompt_tokens"] - cached, total["drafted_tokens"]
    # the first token comes with the prompt: decoding starts after it
    num_decoded = sum(max(u.completion_tokens - 1, 0) for u in usages)
    drafts = {"draft_n": num_drafted, "draft_n_accepted": total["accepted_tokens"]}
    return {
        "prompt_n": num_prompt,
        "cache_n": cached,
        "prompt_ms": prompt_s * 1e3,
        "prompt_per_second": num_prompt / prompt_s if prompt_s else 0.0,
        "predicted_n": num_decoded,
        "predicted_ms": decode_s * 1e3,
        "predicted_per_second": num_decoded / decode_s if decode_s else 0.0,
        **(drafts if num_drafted else {}),
    }
