"""Layers with states: requests in any company, prefixes, guesses, memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import oracle
import pytest
import safetensors.torch
import torch
from families import ROWS
from oracle import Tiny, rewritten
from traffic import answer, assert_company_changes_nothing, greedy

from nanollama import LLM, CheckpointError, GenerationRequest, SamplingParams, model_config
from nanollama_extras.models import recurrent

FAMILIES = ["qwen3_5_text", "lfm2", "granitemoehybrid", "nemotron_h", "falcon_h1"]
SHAPE = ROWS["qwen3_5_text"][1]
OPTIONS: list[dict[str, Any]] = [
    {"kernels": "torch"},
    {"kernels": "native"},
    {"kernels": "native", "quantize": "q8"},
    {"kernels": "native", "quantize": "q8", "lookup": 4},
]


def long_context(tiny: Tiny, variant: str) -> Path:
    name, overrides = ROWS[variant]
    return tiny(name, **overrides, max_position_embeddings=4096)


@pytest.fixture(params=FAMILIES)
def path(request: pytest.FixtureRequest, tiny: Tiny) -> Path:
    return long_context(tiny, request.param)


BROKEN = [
    ({"layer_types": ["conv"]}, "layer_types"),
    ({"layer_types": None, "full_attention_interval": 0}, "full_attention_interval"),
    ({"linear_num_value_heads": 3}, "linear_num_value_heads 3 is no multiple"),
    ({"linear_key_head_dim": -1}, "linear_key_head_dim"),
    ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1"),
]


@pytest.mark.parametrize(("edit", "message"), BROKEN)
def test_a_config_that_makes_no_sense_is_refused(edit: dict[str, Any], message: str) -> None:
    values = {"model_type": "qwen3_5_text", "hidden_size": 64, "num_attention_heads": 4}
    values |= {"num_hidden_layers": 3, "intermediate_size": 64, "vocab_size": 99, **SHAPE, **edit}
    with pytest.raises(CheckpointError, match=message):
        model_config(values, "x")


def test_decode_steps_are_recorded(path: Path) -> None:
    assert LLM(path, kernels="native", quantize="q8").engine.decode_steps is not None


def test_states_take_the_memory_that_is_foretold(path: Path) -> None:
    llm = LLM(path, parallel=2, state_mb=0)
    llm.complete(greedy([5, 6, 7]))
    cache: Any = llm.engine.cache
    assert llm.config.state_bytes == 4 * cache.num_floats
    assert cache.nbytes == llm.config.kv_bytes(
        cache.strips[0].shape[3] or cache.tile, cache.kv_dtype
    )


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_requests_that_come_and_go_get_the_answers_that_each_gets_alone(
    path: Path, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recurrent, "SAVE_EVERY", 32)
    assert_company_changes_nothing(path, 2000 if "lookup" in options else 300, **options)


def test_a_next_turn_an_edit_and_a_retry_resume_near_the_end(path: Path) -> None:
    llm = LLM(path, parallel=1, kernels="native", quantize="q8")
    end, turns = 1, [oracle.random_ids(40, seed=i) for i in range(4)]  # </s> ends a turn
    turns = [[token if token > 3 else 4 for token in turn] for turn in turns]
    system, first = [*turns[0], end], [*turns[1], end]
    prompt = [*system, *first, 2, 7]  # as if an answer were to follow
    cached, text = answer(llm, prompt)
    assert cached == 0
    assert answer(llm, [*prompt, *text[:-1], end, 7, 8])[0] == len(prompt) + 7  # the next turn
    assert answer(llm, prompt)[0] == len(system) + len(first)  # again
    thoughts_dropped = [*system, *first, 2, 9, 9, *turns[2], end, 2, 7]
    assert answer(llm, thoughts_dropped)[0] == len(system) + len(first)
    edited = [*system, *turns[3], end, 2, 7]
    assert answer(llm, edited)[0] == len(system)
    other = LLM(path, parallel=1, kernels="native", quantize="q8")
    for ids in (prompt, thoughts_dropped, edited):
        other.engine.forget()
        assert answer(llm, ids)[1] == answer(other, ids)[1]


def test_samples_of_one_prompt_share_its_prefill(path: Path) -> None:
    llm = LLM(path, parallel=3, prefill_chunk=32)
    ids = oracle.random_ids(100)
    deltas = list(llm.stream(greedy(ids) for _ in range(3)))
    cached = [d.usage.cached_tokens for d in deltas if d.usage]
    assert cached[0] == 0
    assert min(cached[1:]) >= 96  # all but the last piece
    answers = [[d.token_id for d in deltas if d.index == i] for i in range(3)]
    assert answers[0] == answers[1] == answers[2]


def test_a_long_text_is_saved_every_so_many_tokens(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recurrent, "SAVE_EVERY", 64)
    llm = LLM(path, parallel=1, quantize="q8")
    ids = oracle.random_ids(300, seed=3)
    _, text = answer(llm, ids, 100)
    assert answer(llm, [*ids[:200], 5])[0] == 192
    assert answer(llm, ids, 100)[1] == text
    assert answer(llm, [*ids, *text[:90], 5])[0] == 384


def test_saved_states_stay_within_their_budget(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recurrent, "SAVE_EVERY", 4)
    llm = LLM(path, parallel=2, state_mb=1)
    cache: Any = llm.engine.cache
    for seed in range(6):
        answer(llm, oracle.random_ids(150, seed=seed))
        assert len(cache.saved_ages()) * 4 * cache.num_floats <= 1 << 20
    assert len(cache.saved_ages()) > 5
    none = LLM(path, parallel=1, state_mb=0)
    ids = oracle.random_ids(50)
    text = answer(none, ids)[1]
    assert answer(none, ids) == (0, text)
    assert answer(none, [*ids, *text[:-1], 5])[0] == 57  # the state of the answer's end is there


def test_guesses_leave_no_trace(path: Path) -> None:
    plain = LLM(path, parallel=1, quantize="q8")
    looking = LLM(path, parallel=1, quantize="q8", lookup=6)
    few = SamplingParams(seed=3, max_tokens=90, logit_bias={5: 60.0, 6: 60.0, 7: 60.0})
    request = GenerationRequest(prompt=oracle.random_ids(30), params=few)
    done = looking.complete(request)
    assert done.token_ids == plain.complete(request).token_ids
    assert 0 < done.usage.accepted_tokens < done.usage.drafted_tokens  # some right, some wrong


def test_blocks_that_predict_further_tokens_are_left_out(path: Path, tmp_path: Path) -> None:
    if "Qwen3_5" not in json.loads((path / "config.json").read_text())["architectures"][0]:
        pytest.skip("has no such blocks")
    more = rewritten(path, tmp_path / "more", lambda config: None)
    tensors = safetensors.torch.load_file(more / "model.safetensors")
    tensors |= {f"mtp.{name}": torch.ones(2, 2) for name in ("fc.weight", "norm.weight")}
    safetensors.torch.save_file(tensors, more / "model.safetensors")
    ids = oracle.random_ids(9)
    assert torch.equal(LLM(more).logits(ids), LLM(path).logits(ids))
