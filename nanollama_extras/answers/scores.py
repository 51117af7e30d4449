"""Scores of texts: log-probabilities of their tokens, for many texts together; logits of one text,
and how far those of two models are from each other.

Seam       `LLM.score` and `LLM.logits`. Each text to score is a sequence with prompt_logprobs and
           no answer.
Remove     delete this file; `LLM.score`, `LLM.logits`, `nanollama eval` and `nanollama verify`
           then say that they need it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from nanollama import Batch, GenerationRequest, Item, RequestError, SamplingParams, preferred

if TYPE_CHECKING:
    from torch import Tensor

    from nanollama import LLM, Fields, Json, Sequence

MEASURES = "kl agrees logprobs_a logprobs_b".split()  # lists, with a value for each token
ROWS = 32  # distributions that are compared at once, in float64


def logits(llm: LLM, token_ids: list[int]) -> Tensor:
    """Logits (T, V) float32 after each of T ids, computed without the engine's cache. Raises
    RequestError for no ids, and for ids outside the vocabulary."""
    return torch.cat(list(logit_pieces(llm, token_ids)))


def logit_pieces(llm: LLM, token_ids: list[int], start: int = 0) -> Iterator[Tensor]:
    """The logits of `logits` from id `start` on, a piece (n, V) at a time. Raises as `logits`."""
    token_ids, _ = llm.encode_request(GenerationRequest(token_ids))
    llm.engine.check_ids(token_ids, "token_ids")
    if not token_ids:
        raise RequestError("there are no token ids to run", "token_ids")
    decoder, chunk = llm.engine.decoder, llm.engine.scheduler.prefill_chunk
    cache = decoder.new_cache(1, chunk)
    cache.reserve(0, len(token_ids))
    for at in range(0, len(token_ids), chunk):
        new = token_ids[at : at + chunk]
        num_wanted = min(len(new), at + len(new) - start)
        with llm.engine.lock, torch.inference_mode():
            batch = Batch([(0, at, new, max(0, num_wanted))], decoder.device, decoder.row_tile)
            x = decoder.hidden(batch, cache)
            piece = decoder.logits(x, batch).cpu() if num_wanted > 0 else None
        if piece is not None:
            yield piece


def compare(reference: Tensor, other: Tensor, token_ids: list[int]) -> Json:
    """The measures of n tokens, of which two models expect logits (n, V): the Kullback-Leibler
    divergence of `other` from `reference` in nats, the log-probabilities of the token itself, and
    whether the likeliest token is the same."""
    found: Json = {key: [] for key in MEASURES}
    ids = torch.tensor(token_ids).unsqueeze(1)
    for *logits, id_rows in zip(*(x.split(ROWS) for x in (reference, other, ids))):
        p, q = (x.double().log_softmax(-1) for x in logits)
        found["kl"] += (p.exp() * (p - q)).sum(-1).clamp_(min=0).tolist()
        found["agrees"] += (p.argmax(-1) == q.argmax(-1)).tolist()
        for key, rows in (("logprobs_a", p), ("logprobs_b", q)):
            found[key] += rows.gather(1, id_rows).squeeze(1).tolist()
    return found


def summary(*parts: Fields) -> Json:
    """The measures of all tokens of some texts, in short."""
    found = {key: [value for part in parts for value in part[key]] for key in MEASURES}
    kl = sorted(found["kl"])
    num = len(kl)

    def perplexity(logprobs: list[float]) -> float:
        return math.exp(min(700.0, -sum(logprobs) / num))

    return {
        "tokens": num,
        "kl_mean": sum(kl) / num,
        "kl_median": kl[num // 2],
        "kl_99": kl[num * 99 // 100],
        "kl_max": kl[-1],
        "agreement": sum(found["agrees"]) / num,
        "perplexity_a": perplexity(found["logprobs_a"]),
        "perplexity_b": perplexity(found["logprobs_b"]),
    }


def counted(items: Iterable[Item], total: int, **options: Any) -> Iterable[Item]:
    """The items, counted by a progress bar on a terminal, where commands.status is installed.
    options: of tqdm"""
    bar: Any = preferred("commands.status", "with_progress", None)
    return bar(items, total, **options) if bar else items


def score(llm: LLM, texts: Iterable[tuple[list[int], int]]) -> Iterator[tuple[int, list[float]]]:
    """For each (ids, start): its index and the log-probabilities of the ids from `start` on, each
    after all ids before it; texts come when they are done. Raises LogitsError.

    Only as many texts wait as there are slots; neighbours share the work for a common beginning."""
    params = SamplingParams(max_tokens=0, prompt_logprobs=True)
    pending = enumerate(texts)
    engine, running = llm.engine, list["Sequence"]()
    try:
        while True:
            num_wanted = engine.num_slots - len(engine.scheduler.waiting)
            for index, (ids, start) in itertools.islice(pending, num_wanted):
                request = GenerationRequest(ids, params=params)
                running.append(llm.start(request, index, logprobs_from=start))
            if not running:
                return
            engine.step()
            done = [seq for seq in running if seq.finish_reason]
            running = [seq for seq in running if not seq.finish_reason]
            for seq in done:
                if error := seq.outbox[-1].error:
                    raise error
                yield seq.index, [entry.logprob for entry in seq.prompt_logprobs]
    finally:
        for seq in running:
            engine.cancel(seq)
