"""Scores of texts: log-probabilities of their tokens, for many texts together.

Seam       `LLM.score`. Each text is a sequence with prompt_logprobs and no answer.
Remove     delete this file; `LLM.score` and `nanollama eval` then say that they need it.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from nanollama import GenerationRequest, SamplingParams

if TYPE_CHECKING:
    from nanollama import LLM, Sequence


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
