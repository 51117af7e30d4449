"""Layers, modules and tensors that a program replaces: the next step runs them, and nothing that
was computed before is reused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import oracle
import pytest
import torch

from nanollama import LLM, GenerationRequest, Linear, Projection, SamplingParams

PARAMS = SamplingParams(temperature=0, repeat_penalty=1, max_tokens=12, ignore_eos=True)
PROMPT = list(range(40, 80))
MIXTURE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
WAYS = [{"kernels": "native", "quantize": "q8"}, {"kernels": "torch"}]


def float_twin(projection: Projection, factor: float) -> Projection:
    """The same matrices as floats, times a factor."""
    matrices = [getattr(p, "weight", None) for p in projection.parts]
    weights = [p.dequantize() if w is None else w for p, w in zip(projection.parts, matrices)]
    return Projection([Linear(w * factor) for w in weights])


def swap_layers(decoder: Any) -> None:
    decoder.layers[0], decoder.layers[1] = decoder.layers[1], decoder.layers[0]


def replace_mlp(decoder: Any) -> None:
    decoder.layers[1].mlp = decoder.layers[0].mlp


def replace_matrix(decoder: Any) -> None:
    decoder.layers[0].self_attn.o_proj = float_twin(decoder.layers[0].self_attn.o_proj, -1)


def replace_norm(decoder: Any) -> None:
    norm = decoder.layers[0].input_layernorm
    norm.weight = norm.weight.flip(0).clone()


def replace_head(decoder: Any) -> None:
    decoder.lm_head = float_twin(decoder.lm_head, -1)


def skip_layer(decoder: Any) -> None:
    decoder.layers[0] = lambda x, *rest: x


CHANGES: list[Callable[[Any], None]] = [swap_layers, replace_mlp, replace_matrix]
CHANGES += [replace_norm, replace_head, skip_layer]


def load(tiny: oracle.Tiny, options: dict[str, Any], name: str = "Llama", **config: Any) -> LLM:
    return LLM(tiny(name, **config), parallel=2, **options)


def answer(llm: LLM) -> tuple[list[int], int]:
    done = llm.complete(GenerationRequest(PROMPT, params=PARAMS))
    return done.token_ids, done.usage.cached_tokens


def fresh_answer(llm: LLM) -> list[int]:
    """The answer without recorded steps and without anything from the cache."""
    llm.engine.forget()
    steps, llm.engine.decode_steps = llm.engine.decode_steps, None
    tokens, _ = answer(llm)
    llm.engine.decode_steps = steps
    return tokens


@pytest.mark.parametrize("options", WAYS, ids=["native", "torch"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_replaces_a_part_runs_from_the_next_step_on(
    change: Callable[[Any], None], options: dict[str, Any], tiny: oracle.Tiny
) -> None:
    llm = load(tiny, options)
    before, _ = answer(llm)
    assert answer(llm)[1] > 0, "prefixes are reused"
    change(llm.decoder)
    after, num_cached = answer(llm)
    assert num_cached == 0
    assert after != before
    assert after == fresh_answer(llm)
    assert answer(llm)[0] == after


def test_an_expert_may_be_replaced(tiny: oracle.Tiny) -> None:
    llm = load(tiny, WAYS[0], "Qwen3Moe", **MIXTURE)
    before, _ = answer(llm)
    for mixture in (layer.mlp for layer in llm.decoder.layers):
        for expert in mixture.experts:  # type: ignore[union-attr]
            expert.down_proj = float_twin(expert.down_proj, 0)
    after, num_cached = answer(llm)
    assert num_cached == 0
    assert after != before
    assert after == fresh_answer(llm)


def test_recorded_steps_run_again_when_a_part_is_back(tiny: oracle.Tiny) -> None:
    llm = load(tiny, WAYS[0])
    decoder, steps = llm.decoder, llm.engine.decode_steps
    assert steps is not None
    before, _ = answer(llm)
    mlp, calls = decoder.layers[0].mlp, []

    def watched(*args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(args)
        return mlp(*args, **kwargs)

    decoder.layers[0].mlp = watched  # type: ignore[assignment]
    assert answer(llm) == (before, 0)
    assert len(calls) == PARAMS.max_tokens
    decoder.layers[0].mlp = mlp
    assert answer(llm) == (before, 0)
    assert len(calls) == PARAMS.max_tokens


def test_an_answer_goes_on_with_the_new_part_and_leaves_nothing_to_reuse(tiny: oracle.Tiny) -> None:
    llm = load(tiny, WAYS[0])
    decoder, tokens = llm.decoder, []
    for delta in llm.stream(GenerationRequest(PROMPT, params=PARAMS)):
        tokens.append(delta.token_id)
        if len(tokens) == 4:
            skip_layer(decoder)
    after, num_cached = answer(llm)
    assert num_cached == 0
    assert tokens[:4] != after[:4] or tokens != after
    assert after == fresh_answer(llm)


def test_a_layer_of_the_engines_decoder_is_noticed_too(tiny: oracle.Tiny) -> None:
    llm = load(tiny, WAYS[0])
    answer(llm)
    skip_layer(llm.engine.decoder)
    after, num_cached = answer(llm)
    assert num_cached == 0
    assert after == fresh_answer(llm)


def test_a_change_in_place_is_told_by_forget(tiny: oracle.Tiny) -> None:
    llm = load(tiny, WAYS[1])
    before, _ = answer(llm)
    with torch.inference_mode():
        llm.decoder.layers[0].mlp.down_proj.parts[0].weight.zero_()  # type: ignore[union-attr]
    llm.forget()
    after, num_cached = answer(llm)
    assert (after != before, num_cached) == (True, 0)
