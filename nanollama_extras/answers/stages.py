"""What each stage of the sampler makes of the logits for one token: the X-ray of a choice.

Adds       `links`: a row of logits after each link of the chain, for commands.xray and api.xray;
           `Probe`, which looks at one token of an answer.
Seam       `SamplingParams.sampler`: the Probe of a request that draws one token. The links are
           `nanollama.penalize` and `nanollama.candidates` themselves, of which `nanollama.sample`
           consists, with the fields of all later links neutral. Of a sampler of one's own, the
           logits that it hands to `Sequence.choose` are a link.
Remove     delete this file, commands/xray.py and api/xray.py.

    logits > repeat > presence > bias > form > temperature > top-k > top-p > min-p
    (V,) of logits                             (V,) of probabilities, 0 for what was removed
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from nanollama import (
    ANSWER_FIELDS,
    GenerationRequest,
    RequestError,
    candidates,
    likeliest,
    penalize,
    softmax,
    token_text,
)

if TYPE_CHECKING:
    from nanollama import LLM, Constraint, Json, SamplingParams, Sequence, Tokenizer

Row = npt.NDArray[Any]  # (V,)

NEUTRAL: dict[str, Any] = {  # values of fields at which a link does nothing
    "repeat_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "logit_bias": {},
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
}
PENALTIES = {  # links that change logits, and their fields
    "repeat": ("repeat_penalty",),
    "presence": ("presence_penalty", "frequency_penalty"),
    "bias": ("logit_bias",),
}
CUTS = ("temperature", "top_k", "top_p", "min_p")  # links that give probabilities
NUM_SHOWN = 8  # candidates in a report
NUM_REMOVED = 3  # tokens that a link removed, in a report


@dataclass(frozen=True, slots=True)
class Link:
    """A row after one link of the chain."""

    name: str
    setting: str
    values: Row  # logits, -inf for a token that cannot come; or probabilities, 0 for one
    is_probability: bool = False

    def left(self) -> npt.NDArray[np.bool_]:
        """Which tokens (V,) may still come."""
        return self.values > (0 if self.is_probability else -np.inf)

    def shares(self) -> Row:
        """Probabilities (V,): those of a softmax, for logits."""
        return self.values if self.is_probability else softmax(self.values, 1.0)


def shown_setting(values: list[Any]) -> str:
    """The values of a link's fields, in few letters."""
    texts = [f"{len(v)} ids" if isinstance(v, dict) else f"{v:g}" for v in values]
    return ", ".join(texts)


def links(
    logits: Row,
    params: SamplingParams,
    history: list[int],
    num_prompt: int,
    allowed: npt.NDArray[np.bool_] | None = None,
    is_free: bool = True,
) -> Iterator[Link]:
    """A row of logits (V,) after each link that has an effect; temperature always counts. The
    arguments are those of `nanollama.sample`."""
    row, used = logits, dict(NEUTRAL)
    for name, fields in PENALTIES.items():
        own = {field: getattr(params, field) for field in fields}
        used |= own
        if any(own[field] != NEUTRAL[field] for field in fields):
            with np.errstate(over="ignore"):
                now = replace(params, **used)
                row = penalize(logits, now, history, num_prompt, None, is_free)
            yield Link(name, shown_setting(list(own.values())), row)
    if allowed is not None:
        row = np.where(allowed, row, np.float32(-np.inf))
        yield Link("form", "", row)
    for name in CUTS:
        used[name] = getattr(params, name)
        if name == "temperature" or used[name] != NEUTRAL[name]:
            probs, ids = candidates(row, replace(params, **used))
            values = np.zeros(len(row))
            values[ids] = probs / probs.sum()
            yield Link(name.replace("_", "-"), f"{used[name]:g}", values, True)
        if params.temperature == 0:  # the likeliest token is taken: later links see no other
            return


# ---- one token -----------------------------------------------------------------------------------


class Overheard:
    """A Sequence that notes the logits which a sampler hands to `choose`."""

    def __init__(self, seq: Sequence) -> None:
        self.seq = seq
        self.logits: Any = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.seq, name)

    def choose(self, logits: Any) -> int:
        self.logits = logits.copy()
        return self.seq.choose(logits)


class Probe:
    """A sampler for a request whose prompt is a prompt and a part of its answer. The chain of the
    answer is what it looks at: its parameters, its constraint, and where it begins."""

    def __init__(
        self, params: SamplingParams, num_prompt: int, constraint: Constraint | None = None
    ) -> None:
        self.params, self.num_prompt, self.constraint = params, num_prompt, constraint
        self.links: list[Link] = []
        self.drawn = -1  # the id that the chain draws

    def __call__(self, seq: Sequence, logits: Row) -> int:
        own, params = self.params.sampler, replace(self.params, sampler=None, stop_when=None)
        seq.params, seq.num_prompt, seq.constraint = params, self.num_prompt, self.constraint
        self.links = [Link("logits", "", logits.copy())]
        overheard: Any = Overheard(seq)
        self.drawn = int(own(overheard, logits)) if own else overheard.choose(logits)
        given, form = overheard.logits, self.constraint
        if own and given is not None:
            self.links.append(Link("sampler", "", given))
        if given is not None:
            mask, is_free = (form.allowed(), form.is_free) if form else (None, True)
            rest = (seq.token_ids, seq.num_prompt, mask, is_free)
            self.links += links(given, params, *rest)
        return self.drawn


def probe_request(
    request: GenerationRequest,
    prompt: list[int],
    answer: list[int],
    constraint: Constraint | None = None,
) -> GenerationRequest:
    """A request that draws the token after the ids of the prompt of another one, and of its answer
    so far. Its `params.sampler` is the Probe. constraint: of the answer, before its first token.
    Raises RequestError for images, which ids alone do not have."""
    params, contents = request.params, [m.get("content") for m in request.messages or ()]
    parts = [part for content in contents if isinstance(content, list) for part in content]
    if any("text" not in part for part in parts):
        raise RequestError("the stages of an answer to images are not shown", "messages")
    if constraint:
        constraint = constraint.copy()
        for token_id in answer:
            constraint.push(token_id)
    probe = Probe(params, len(prompt), constraint)
    plain: dict[str, Any] = {**dict.fromkeys(ANSWER_FIELDS), "stop": (), "thinking_budget": None}
    plain |= {"logprobs": None, "prompt_logprobs": False, "max_tokens": 1, "stop_when": None}
    return GenerationRequest([*prompt, *answer], params=replace(params, sampler=probe, **plain))


def look(llm: LLM, request: GenerationRequest) -> Probe:
    """The probe of a request of `probe_request`, after it was used. Raises RequestError."""
    llm.complete(request)
    probe: Probe = request.params.sampler
    return probe


def entropy(shares: Row) -> float:
    """The entropy of probabilities (V,), in bits."""
    some = shares[shares > 0]
    return max(0.0, -float((some * np.log2(some)).sum()))


def rank(logits: Row, token_id: int) -> int:
    """The place of a token among all, from 1 on; of equal ones, the lower id comes first."""
    own = logits[token_id]
    return 1 + int((logits > own).sum()) + int((logits[:token_id] == own).sum())


def removed(before: Link, after: Link, tokenizer: Tokenizer) -> Json:
    """What a link removed: how many tokens, their share, and the likeliest of them."""
    shares, gone = before.shares(), before.left() & ~after.left()
    ids = np.flatnonzero(gone)
    best = ids[np.argsort(-shares[ids], kind="stable")][:NUM_REMOVED]
    first = [token_text(tokenizer, int(i))[0] for i in best]
    return {"removed": len(ids), "removed_share": float(shares[ids].sum()), "removed_first": first}


def report(probe: Probe, tokenizer: Tokenizer, token_id: int | None = None) -> Json:
    """All that is shown of one token, as JSON: the token taken (by default the one drawn), its
    place among all, and the candidates through every stage. Values are logits or probabilities,
    and null for a token that a stage, or one before it, removed."""
    taken = probe.drawn if token_id is None else token_id
    raw, last = probe.links[0], probe.links[-1]
    shares = raw.shares()
    shown = [
        *likeliest(raw.values, min(NUM_SHOWN, len(shares)))[1].tolist(),
        *np.argsort(-last.shares(), kind="stable")[: NUM_SHOWN // 2].tolist(),
    ]
    ids = list(dict.fromkeys([*shown, taken, probe.drawn]))
    stages = []
    for i, link in enumerate(probe.links):
        left = link.left()
        values = [float(v) if left[j] else None for j, v in zip(ids, link.values[ids])]
        kind = "probability" if link.is_probability else "logit"
        stage = {"name": link.name, "setting": link.setting, "kind": kind, "values": values}
        before = probe.links[max(i - 1, 0)]
        stages.append({**stage, "left": int(left.sum()), **removed(before, link, tokenizer)})
    texts = [token_text(tokenizer, i)[0] for i in ids]
    share = float(shares[taken])
    return {
        "token_id": taken,
        "drawn_id": probe.drawn,
        "text": token_text(tokenizer, taken)[0],
        "probability": share,
        "surprise_bits": -math.log2(share) if share else None,
        "entropy_bits": entropy(shares),
        "entropy_left_bits": entropy(last.shares()),
        "rank": rank(raw.values, taken),
        "vocabulary": len(shares),
        "candidates": [{"id": i, "text": text} for i, text in zip(ids, texts)],
        "stages": stages,
    }
