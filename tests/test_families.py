"""Sections 2, 5 and 6: every family against transformers, as safetensors and as GGUF."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import transformers
from oracle import KINDS, LLAMA3, YARN, Tiny

import nanollama
from nanollama import LLM, Batch, GenerationRequest, SamplingParams

EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.1, 1.2, 1.5, 1.7, 2.0, 2.2, 2.5],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0],
    "original_max_position_embeddings": 64,
}
# family -> the prefix of transformers' classes, what its config says beside the tiny dimensions
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_parameters": LLAMA3}),
    "mistral": ("Mistral", {"sliding_window": 8, "head_dim": 32}),
    "ministral": ("Ministral", {"sliding_window": 8, "head_dim": 16, "layer_types": KINDS}),
    "ministral3": (
        "Ministral3",
        {"head_dim": 16, "rope_parameters": {**YARN, "llama_4_scaling_beta": 0.1}},
    ),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 8}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}),
    "qwen2_moe": (
        "Qwen2Moe",
        {
            **EXPERTS,
            "num_experts": 6,
            "shared_expert_intermediate_size": 96,
            "num_hidden_layers": 3,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3_moe": (
        "Qwen3Moe",
        {**EXPERTS, "num_experts": 5, "head_dim": 16, "norm_topk_prob": True},
    ),
    "smollm3": ("SmolLM3", {"num_hidden_layers": 4}),
    "phi3": ("Phi3", {"partial_rotary_factor": 0.75, "sliding_window": 20}),
    "gemma": ("Gemma", {"head_dim": 32}),
    "gemma2": ("Gemma2", {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 24}),
    "gemma3_text": (
        "Gemma3Text",
        {
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": KINDS,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": LOCAL,
            },
        },
    ),
    "olmo2": ("Olmo2", {}),
    "olmo3": (
        "Olmo3",
        {
            "sliding_window": 8,
            "layer_types": KINDS,
            "rope_parameters": {"full_attention": YARN, "sliding_attention": LOCAL},
        },
    ),
    "olmoe": ("Olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
    "granite": (
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.22,
            "logits_scaling": 0.25,
        },
    ),
    "granitemoe": (
        "GraniteMoe",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "embedding_multiplier": 12.0,
            "attention_multiplier": 0.1,
            "residual_multiplier": 0.22,
            "logits_scaling": 0.25,
        },
    ),
    "gpt_oss": (
        "GptOss",
        {
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "head_dim": 16,
            "sliding_window": 8,
            "layer_types": KINDS,
            "intermediate_size": 64,
            "rope_parameters": {**YARN, "truncate": False},
        },
    ),
    "nanochat": ("NanoChat", {}),
    "seed_oss": ("SeedOss", {"head_dim": 16}),
    "arcee": ("Arcee", {}),
    "hunyuan_v1_dense": (
        "HunYuanDenseV1",
        {
            "head_dim": 16,
            "rope_parameters": {
                "rope_type": "dynamic",
                "rope_theta": 1e4,
                "alpha": 1000.0,
                "factor": 1.0,
            },
        },
    ),
    "exaone4": ("Exaone4", {"sliding_window": 8, "layer_types": KINDS}),
    "glm4": ("Glm4", {"head_dim": 16}),
    "cohere2": ("Cohere2", {"sliding_window": 8, "layer_types": KINDS, "logit_scale": 0.5}),
    "starcoder2": ("Starcoder2", {"norm_epsilon": 1e-5, "sliding_window": 8}),
    "stablelm": ("StableLm", {"use_qkv_bias": True}),
}
# what a family does only with other values
MORE: dict[str, tuple[str, dict[str, Any]]] = {
    "phi3-longrope": (
        "Phi3",
        {"original_max_position_embeddings": 64, "rope_parameters": LONGROPE},
    ),
    "stablelm-whole": ("StableLm", {"partial_rotary_factor": 1.0}),
    "smollm3-listed": ("SmolLM3", {"no_rope_layers": [0, 1]}),
    "starcoder2-unbiased": ("Starcoder2", {"use_bias": False}),
    "granite-biased": ("Granite", {"attention_bias": True, "mlp_bias": True}),
    "seed_oss-biased": ("SeedOss", {"head_dim": 16, "attention_out_bias": True}),
    "gemma3_text-capped": ("Gemma3Text", {"head_dim": 16, "final_logit_softcapping": 3.0}),
}
ALL = ROWS | MORE


def test_there_is_a_row_for_every_family() -> None:
    assert list(ROWS) == list(nanollama.FAMILIES)


def made(tiny: Tiny, variant: str) -> Path:
    name, overrides = ALL[variant]
    return tiny(name, **overrides)


@torch.inference_mode()
def hidden_states(llm: LLM, ids: list[int]) -> list[torch.Tensor]:
    """What each layer gives (T, C)"""
    found: list[torch.Tensor] = []
    decoder = llm.engine.decoder

    def watched(layer: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            found.append(layer(*args))
            return found[-1]

        run.rope = layer.rope  # type: ignore[attr-defined]
        return run

    layers, decoder.layers = decoder.layers, [watched(layer) for layer in decoder.layers]  # type: ignore
    llm.logits(ids)
    decoder.layers = layers
    return [x[: len(ids)] for x in found]


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("variant", ALL)
def test_logits_hidden_states_and_greedy_tokens_are_those_of_transformers(
    tiny: Tiny, variant: str, kernels: str
) -> None:
    path, ids = made(tiny, variant), oracle.random_ids(70)
    llm, model = LLM(path, kernels=kernels), oracle.load(path)
    oracle.assert_same_model(llm, model, ids)
    with torch.inference_mode():
        theirs = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[1:-1]
    unit = getattr(model.config, "residual_multiplier", 1.0)
    for ours, expected in zip(hidden_states(llm, ids), theirs):
        torch.testing.assert_close(unit * ours, expected[0], rtol=1e-5, atol=1e-4)


# ---- rows and their neighbours -------------------------------------------------------------------


def forward(llm: LLM, cache: nanollama.KVCache, work: list[Any], lengths: Any = ()) -> torch.Tensor:
    """Logits of every token of (slot, start, ids) triples."""
    for slot, start, ids in work:
        cache.reserve(slot, start + len(ids))
    decoder = llm.engine.decoder
    items = [(*one, len(one[2])) for one in work]
    with torch.inference_mode():
        return decoder(Batch(items, decoder.device, decoder.row_tile, lengths), cache)


OPTIONS: list[dict[str, Any]] = [
    {"kernels": "torch"},
    {"kernels": "native"},
    {"kernels": "native", "quantize": "q4"},
    {"kernels": "torch", "quantize": "q8"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
@pytest.mark.parametrize("variant", ROWS)
def test_a_row_is_the_same_in_any_company_and_however_its_prompt_is_cut(
    tiny: Tiny, variant: str, options: dict[str, Any]
) -> None:
    llm, ids = LLM(made(tiny, variant), **options), oracle.random_ids(50)
    decoder = llm.engine.decoder
    whole = forward(llm, decoder.new_cache(1), [(0, 0, ids)])
    assert torch.isfinite(whole).all()
    cache, others = decoder.new_cache(3), oracle.random_ids(33, seed=5)
    first = forward(llm, cache, [(2, 0, others[:13]), (0, 0, ids[:7]), (1, 0, others[:1])])
    second = forward(llm, cache, [(0, 7, ids[7:8])])
    third = forward(llm, cache, [(0, 8, ids[8:]), (2, 13, others[13:])])
    assert torch.equal(torch.cat((first[13:20], second, third[:42])), whole)


# ---- windows -------------------------------------------------------------------------------------

WINDOWED = ["mistral", "gemma2", "gemma3_text", "olmo3", "gpt_oss", "cohere2"]


@pytest.fixture(params=["torch", "native"])
def kernels(request: pytest.FixtureRequest) -> Any:
    return request.param


def long_context(tiny: Tiny, variant: str) -> Path:
    name, overrides = ROWS[variant]
    return tiny(name, **overrides, max_position_embeddings=2048)


@pytest.mark.parametrize("variant", WINDOWED)
def test_layers_with_a_window_forget_what_nobody_sees(
    tiny: Tiny, variant: str, kernels: str
) -> None:
    path, ids = long_context(tiny, variant), oracle.random_ids(1300)
    llm, model = LLM(path, kernels=kernels, prefill_chunk=100, parallel=1), oracle.load(path)
    expected = oracle.logits(model, ids)
    torch.testing.assert_close(llm.logits(ids), expected, rtol=0, atol=2e-4)
    assert torch.equal(LLM(path, kernels=kernels, prefill_chunk=37).logits(ids), llm.logits(ids))
    params = SamplingParams(temperature=0, repeat_penalty=1, max_tokens=4, ignore_eos=True)
    request = GenerationRequest(prompt=ids, params=params)
    assert llm.complete(request).token_ids == oracle.greedy(model, ids, 4)
    cache, windows = llm.engine.cache, llm.config.windows
    assert [ring.shape[3] for ring in cache.rings] == [512]
    capacity = cache.strips[0].shape[3] if None in windows else 0
    bytes_at_512, bytes_at_1 = (
        llm.config.kv_bytes(n, "float32", 100) for n in (capacity or 512, 1)
    )
    assert cache.nbytes == bytes_at_512
    per_layer = bytes_at_1 // len(windows)
    assert cache.nbytes == per_layer * sum(512 if w else capacity for w in windows)


@pytest.mark.parametrize("lookup", [0, 8])
def test_a_prefix_is_reused_as_far_as_the_windows_still_hold_it(
    tiny: Tiny, kernels: str, lookup: int
) -> None:
    path, ids = long_context(tiny, "gemma2"), oracle.random_ids(40) * 25
    llm = LLM(path, kernels=kernels, prefill_chunk=64, parallel=2, lookup=lookup)
    fresh = LLM(path, kernels=kernels, prefill_chunk=64, parallel=1)
    params = SamplingParams(temperature=0, repeat_penalty=1, max_tokens=9, ignore_eos=True)

    def run(prompt: list[int]) -> tuple[int, list[int]]:
        done = llm.complete(GenerationRequest(prompt=prompt, params=params))
        fresh.engine.forget()
        alone = fresh.complete(GenerationRequest(prompt=prompt, params=params))
        assert done.token_ids == alone.token_ids
        return done.usage.cached_tokens, done.token_ids

    cached, answer = run(ids)
    assert cached == 0
    longer = [*ids, *answer[:-1], 7, 8, 9]
    assert run(longer)[0] >= len(ids) + 8  # the next turn
    assert run([*ids[:900], 5, 6])[0] == 900  # not far back
    assert run([*ids[:300], 5, 6])[0] == 0  # its window is gone
    assert run([*ids[:300], 5, 6, 7])[0] == 302


def test_equal_prompts_that_come_together_do_not_wait_for_what_will_be_gone(tiny: Tiny) -> None:
    llm = LLM(long_context(tiny, "mistral"), prefill_chunk=64, parallel=2)
    ids = oracle.random_ids(900)
    params = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)
    prompts = [ids, [*ids[:100], 3, 4, 5]]
    deltas = list(llm.stream(GenerationRequest(prompt=p, params=params) for p in prompts))
    assert {d.index for d in deltas[:2]} == {0, 1}
    assert [d.usage.cached_tokens for d in deltas if d.usage] == [0, 100]


# ---- RoPE that depends on the length -------------------------------------------------------------


def test_longrope_reads_a_text_anew_when_it_outgrows_the_old_context(
    tiny: Tiny, kernels: str
) -> None:
    path = made(tiny, "phi3-longrope")
    model = oracle.load(path)
    llm = LLM(path, kernels=kernels, prefill_chunk=16, lookup=4, parallel=1)
    # what is kept of a long text is of no use to a short one, and the other way round
    for length, num_cached in ((65, 0), (30, 0), (56, 30), (64, 0), (66, 64), (67, 66)):
        ids = oracle.random_ids(length)
        torch.testing.assert_close(llm.logits(ids), oracle.logits(model, ids), rtol=0, atol=1e-4)
        done = llm.complete(GenerationRequest(prompt=ids, params=oracle.GREEDY))
        assert done.token_ids == oracle.greedy(model, ids)
        assert done.usage.cached_tokens == num_cached


def test_prompt_logprobs_of_a_text_that_outgrows_it_are_counted_once(tiny: Tiny) -> None:
    params = SamplingParams(max_tokens=9, logprobs=0, prompt_logprobs=True, ignore_eos=True)
    llm = LLM(made(tiny, "phi3-longrope"))
    seq = llm.start(GenerationRequest(prompt=oracle.random_ids(60), params=params))
    while llm.engine.has_work:
        llm.engine.step()
    assert len(seq.prompt_logprobs) == 59
    assert seq.num_generated == 9


def test_dynamic_ntk_is_that_of_a_cached_decode_token_by_token(tiny: Tiny, kernels: str) -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    path = tiny("Llama", rope_parameters=rope, max_position_embeddings=24)
    llm, model, ids = LLM(path, kernels=kernels), oracle.load(path), oracle.random_ids(40)
    assert llm.config.n_ctx == 48
    short = oracle.logits(model, ids[:24])
    torch.testing.assert_close(llm.logits(ids[:24]), short, rtol=0, atol=1e-4)
    cache = transformers.DynamicCache(config=model.config)
    with torch.inference_mode():
        rows = [model(torch.tensor([[i]]), past_key_values=cache).logits[0, 0] for i in ids]
    torch.testing.assert_close(llm.logits(ids), torch.stack(rows), rtol=0, atol=1e-4)
