"""The stages of the sampler, as they are shown, against the sampler itself and transformers."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

import nanollama
from nanollama import LLM, GenerationRequest, SamplingParams
from nanollama_extras.answers.stages import (
    NEUTRAL,
    Probe,
    entropy,
    links,
    look,
    probe_request,
    rank,
    report,
)

HISTORY = [5, 6, 7, 5, 9]
PARAMS = st.builds(
    SamplingParams,
    temperature=st.floats(0.2, 3) | st.just(0.0),
    top_k=st.integers(0, 70),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.5),
    repeat_penalty=st.floats(0.5, 2) | st.just(1.0),
    repeat_last_n=st.sampled_from([-1, 0, 3]),
    presence_penalty=st.floats(-2, 2) | st.just(0.0),
    frequency_penalty=st.floats(-2, 2) | st.just(0.0),
    logit_bias=st.dictionaries(st.integers(0, 59), st.floats(-100, 100), max_size=3),
)


def random_logits(seed: int, n_vocab: int = 60) -> Any:
    return np.random.default_rng(seed).standard_normal(n_vocab, dtype=np.float32) * 4


def drawn_from(shares: Any, seed: int) -> int:
    """The token that a distribution (V,) gives: the draw of section 10, for one that is shown."""
    order = np.argsort(-shares, kind="stable")
    u = nanollama.uniform(seed, len(HISTORY))
    return int(order[np.searchsorted(shares[order].cumsum(), u, side="right")])


@given(st.integers(0, 10**6), PARAMS, st.booleans())
def test_the_last_stage_is_what_a_token_is_drawn_from(
    seed: int, params: SamplingParams, has_form: bool
) -> None:
    logits = random_logits(seed)
    allowed = np.arange(60) % 3 == 0 if has_form else None
    rest: Any = (HISTORY, 2, allowed)
    shown = [*links(logits, params, *rest)]
    for draw in range(5):
        expected = nanollama.sample(logits, params, draw, HISTORY, 2, None, allowed)
        assert drawn_from(shown[-1].values, draw) == expected


@given(st.integers(0, 10**6), PARAMS)
def test_each_stage_is_what_a_chain_that_ends_there_draws_from(
    seed: int, params: SamplingParams
) -> None:
    logits = random_logits(seed)
    for link in links(logits, params, HISTORY, 2):
        field = link.name.replace("-", "_")
        own = {"repeat": "repeat_penalty", "presence": "frequency_penalty", "bias": "logit_bias"}
        later = list(NEUTRAL)[list(NEUTRAL).index(own.get(field, field)) + 1 :]
        shorter = nanollama.dataclasses.replace(params, **{n: NEUTRAL[n] for n in later})
        for draw in range(3):
            expected = nanollama.sample(logits, shorter, draw, HISTORY, 2)
            assert drawn_from(link.shares(), draw) == expected


@pytest.mark.parametrize("seed", range(4))
def test_the_last_stage_equals_transformers_chain(seed: int) -> None:
    params = SamplingParams(0.7, 20, 0.8, 0.05, 1.3)
    logits = random_logits(seed)
    chain = [RepetitionPenaltyLogitsProcessor(1.3), TemperatureLogitsWarper(0.7)]
    chain += [TopKLogitsWarper(20), TopPLogitsWarper(0.8), MinPLogitsWarper(0.05)]
    scores = torch.from_numpy(logits).double()[None]
    expected = LogitsProcessorList(chain)(torch.tensor([HISTORY]), scores).softmax(-1)[0].numpy()
    *_, last = links(logits, params, HISTORY, 2)
    np.testing.assert_allclose(last.values, expected, atol=1e-6)


def test_stages_without_effect_are_left_out() -> None:
    plain = SamplingParams(**{**NEUTRAL, "temperature": 0.5})
    assert [link.name for link in links(random_logits(1), plain, HISTORY, 2)] == ["temperature"]
    greedy = SamplingParams(temperature=0, top_k=5, top_p=0.5)
    names = [(link.name, int(link.left().sum())) for link in links(random_logits(1), greedy, [], 0)]
    assert names == [("repeat", 60), ("temperature", 1)]


def test_rank_and_entropy() -> None:
    logits = np.array([1, 3, 3, 0, -np.inf], dtype=np.float32)
    assert [rank(logits, i) for i in range(5)] == [3, 1, 2, 4, 5]
    shares = nanollama.softmax(random_logits(2), 1.0)
    nats = torch.distributions.Categorical(torch.from_numpy(shares)).entropy().item()
    assert entropy(shares) == pytest.approx(nats / math.log(2))
    assert entropy(np.array([0.0, 1.0])) == 0


# ---- the tokens of an answer ---------------------------------------------------------------------

CHAINS: list[dict[str, Any]] = [
    {},
    {"temperature": 0},
    {"temperature": 1.5, "top_k": 0, "min_p": 0.001, "presence_penalty": 1.0},
    {"logit_bias": {7: 5.0, 9: -100.0}, "frequency_penalty": 0.5},
    {"regex": "[a-h]{8}", "temperature": 2.0},
]


@pytest.mark.parametrize("params", CHAINS)
def test_a_probe_draws_each_token_of_an_answer_again(params: dict[str, Any], tiny_llm: LLM) -> None:
    request = GenerationRequest("the fox", params=SamplingParams(seed=3, max_tokens=8, **params))
    made = tiny_llm.prepare(request)
    answer = tiny_llm.complete(made)
    assert len(answer.token_ids) >= 3
    for i, token_id in enumerate(answer.token_ids):
        before = answer.token_ids[:i]
        one = probe_request(request, made.ids, before, made.form.constraint)
        probe = look(tiny_llm, one)
        assert probe.drawn == token_id
        assert probe.links[-1].values[token_id] > 0
        shown = nanollama.softmax(probe.links[0].values, 1.0)
        np.testing.assert_allclose(
            shown[token_id],
            tiny_llm.logits([*made.ids, *before])[-1].softmax(-1)[token_id].item(),
            rtol=1e-4,
        )


def first_token(llm: LLM, **params: Any) -> Probe:
    """The probe of the first token after a text."""
    request = GenerationRequest("the fox", params=SamplingParams(**params))
    return look(llm, probe_request(request, llm.encode("the fox"), []))


def test_a_sampler_of_ones_own_is_a_stage(tiny_llm: LLM) -> None:
    def without(seq: nanollama.Sequence, logits: Any) -> int:
        logits[:100] = -np.inf
        return seq.choose(logits)

    probe = first_token(tiny_llm, seed=1, sampler=without)
    assert [link.name for link in probe.links[:2]] == ["logits", "sampler"]
    assert probe.links[-1].values[:100].sum() == 0
    probe = first_token(tiny_llm, sampler=lambda seq, logits: 5)
    assert ([link.name for link in probe.links], probe.drawn) == (["logits"], 5)


def test_a_report_counts_what_each_stage_removed(tiny_llm: LLM) -> None:
    probe = first_token(tiny_llm, seed=1, top_k=6, top_p=0.5, repeat_penalty=1.0)
    body = report(probe, tiny_llm.tokenizer, token_id=200)
    stages = {stage["name"]: stage for stage in body["stages"]}
    assert [*stages] == ["logits", "temperature", "top-k", "top-p"]
    assert [stage["removed"] for stage in stages.values()][:3] == [0, 0, 314]
    assert stages["top-k"]["left"] == 6 == stages["top-p"]["left"] + stages["top-p"]["removed"]
    assert 0.3 < stages["top-p"]["removed_share"] < 0.5
    ids = [one["id"] for one in body["candidates"]]
    assert {200, probe.drawn} <= {*ids}
    assert len(ids) == len({*ids})
    assert body["drawn_id"] == probe.drawn
    left = [value for value in stages["top-p"]["values"] if value is not None]
    assert sum(left) == pytest.approx(1)
    assert body["rank"] == rank(probe.links[0].values, 200)


def test_images_are_refused() -> None:
    """A row of logits after ids alone is not the one after their images."""
    parts = [
        {"type": "text", "text": "what?"},
        {"type": "image_url", "image_url": {"url": "data:"}},
    ]
    request = GenerationRequest(messages=[{"role": "user", "content": parts}])
    with pytest.raises(nanollama.RequestError, match="an answer to images"):
        probe_request(request, [5], [])
