"""Gemma 4: keys and values that layers share, heads of two widths, a table that stays on disk."""

from __future__ import annotations

import dataclasses
import random
import shutil
from pathlib import Path
from typing import Any

import conftest
import gguf_files
import oracle
import pytest
import safetensors.torch
import torch
import transformers
from families import GEMMA3N, GEMMA4, GEMMA4_EXPERTS, GEMMA4_SMALL
from oracle import Tiny, rewritten

import nanollama
from nanollama import (
    LLM,
    CheckpointError,
    GenerationRequest,
    SamplingParams,
    TensorSource,
    model_config,
)
from nanollama_extras.commands.details import weight_bytes
from nanollama_extras.kernels.native import NativeKVCache
from nanollama_extras.models import gemma4
from nanollama_extras.models.gemma4 import TABLE

LONG = {"max_position_embeddings": 2048}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "small": ("Gemma4Text", GEMMA4_SMALL),
    "experts": ("Gemma4Text", GEMMA4_EXPERTS),
    "3n": ("Gemma3nText", GEMMA3N),
}
OPTIONS: list[dict[str, Any]] = [
    {"kernels": "torch"},
    {"kernels": "native"},
    {"kernels": "native", "quantize": "q8"},
    {"kernels": "native", "quantize": "q4", "kv_dtype": "q8", "lookup": 4},
]


@pytest.fixture(params=KINDS)
def path(request: pytest.FixtureRequest, tiny: Tiny) -> Path:
    name, overrides = KINDS[request.param]
    return tiny(name, **{**overrides, **LONG})


def greedy(ids: list[int], num: int = 8) -> GenerationRequest:
    params = SamplingParams(temperature=0, repeat_penalty=1, max_tokens=num, ignore_eos=True)
    return GenerationRequest(prompt=ids, params=params)


def answer(llm: LLM, ids: list[int], num: int = 8) -> tuple[int, list[int]]:
    """The number of cached tokens, and the answer."""
    done = llm.complete(greedy(ids, num))
    return done.usage.cached_tokens, done.token_ids


# ---- keys and values -----------------------------------------------------------------------------


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_rings_and_strips_hold_a_long_text(path: Path, kernels: str) -> None:
    ids, model = oracle.random_ids(1300), oracle.load(path)
    llm = LLM(path, kernels=kernels, prefill_chunk=100, parallel=1)
    torch.testing.assert_close(llm.logits(ids), oracle.logits(model, ids), rtol=0, atol=2e-4)
    assert torch.equal(LLM(path, kernels=kernels, prefill_chunk=37).logits(ids), llm.logits(ids))
    assert answer(llm, ids, 4)[1] == oracle.greedy(model, ids, 4)
    cache, config = llm.engine.cache, llm.config
    assert [ring.shape[3] for ring in cache.rings] == [512]
    capacity = cache.strips[0].shape[3]
    assert cache.nbytes == config.kv_bytes(capacity, "float32", 100)
    listed = getattr(model.config, "per_layer_config", [model.config] * config.n_layers)
    layers = [listed[i] for i in range(config.n_layers)]
    first = config.n_layers - model.config.num_kv_shared_layers
    widths = [2 * 4 * layer.num_key_value_heads * layer.head_dim for layer in layers[:first]]
    kinds = model.config.layer_types
    kept = [512 if kind == "sliding_attention" else capacity for kind in kinds]
    assert cache.nbytes == sum(width * num for width, num in zip(widths, kept))


def test_heads_as_wide_as_the_real_ones_run_on_native_kernels(tiny: Tiny) -> None:
    wide = {**GEMMA4_SMALL, "head_dim": 256, "global_head_dim": 512}
    path, ids = tiny("Gemma4Text", **wide), oracle.random_ids(60)
    # scores are sums of 512 products, and not scaled
    oracle.assert_same_model(LLM(path, kernels="native"), oracle.load(path), ids, atol=1e-3)
    llm = LLM(path, kernels="native", quantize="q8")
    assert [type(cache) for cache in llm.engine.cache.caches] == [NativeKVCache] * 2
    assert llm.engine.decode_steps is not None


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "q8"])
@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_other_types_of_keys_and_values_stay_close(path: Path, kernels: str, kind: str) -> None:
    ids = oracle.random_ids(60)
    exact = LLM(path, kernels=kernels).logits(ids)
    close = LLM(path, kernels=kernels, kv_dtype=kind).logits(ids)
    assert 0 < (close - exact).std() < 0.15 * exact.std()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_requests_that_come_and_go_get_the_answers_that_each_gets_alone(
    path: Path, options: dict[str, Any]
) -> None:
    rng = random.Random(1)
    llm = LLM(path, parallel=3, prefill_chunk=24, **options)
    alone = LLM(path, parallel=1, prefill_chunk=512, **{**options, "lookup": 0})
    texts = [[rng.randrange(2, 40) for _ in range(50)] for _ in range(3)]
    known: dict[tuple[int, ...], list[int]] = {}
    running: list[Any] = []
    num_checked = num_cached = 0
    for _ in range(300):
        if rng.random() < 0.15:
            base = rng.choice(texts)
            prompt = [*base[: rng.randrange(1, len(base))], rng.randrange(2, 320)]
            running.append((prompt, llm.start(greedy(prompt, rng.randrange(1, 20)))))
        if running and rng.random() < 0.03:
            llm.engine.cancel(running.pop(rng.randrange(len(running)))[1])
        if llm.engine.has_work:
            llm.engine.step()
        for item in [item for item in running if item[1].finish_reason]:
            running.remove(item)
            prompt, seq = item
            if tuple(prompt) not in known:
                alone.engine.forget()
                known[tuple(prompt)] = answer(alone, prompt, 20)[1]
            given = seq.token_ids[len(prompt) :]
            assert given == known[tuple(prompt)][: len(given)]
            num_checked, num_cached = num_checked + 1, num_cached + seq.num_cached
    assert num_checked > 20
    assert num_cached > 200


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(map(str, o.values())))
def test_a_prefix_is_reused_as_far_as_the_windows_still_hold_it(
    path: Path, options: dict[str, Any]
) -> None:
    ids = oracle.random_ids(40) * 25
    llm = LLM(path, prefill_chunk=64, parallel=2, **options)
    fresh = LLM(path, prefill_chunk=64, parallel=1, **{**options, "lookup": 0})

    def run(prompt: list[int]) -> tuple[int, list[int]]:
        cached, text = answer(llm, prompt, 9)
        fresh.engine.forget()
        assert text == answer(fresh, prompt, 9)[1]
        return cached, text

    cached, text = run(ids)
    assert cached == 0
    assert run([*ids, *text[:-1], 7, 8, 9])[0] >= len(ids) + 8  # the next turn
    assert run([*ids[:900], 5, 6])[0] == 900  # not far back
    assert run([*ids[:300], 5, 6])[0] == 0  # its window is gone


def test_keys_of_layers_that_read_those_of_others_are_left_out(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path, ids = tiny("Gemma4Text", **GEMMA4_SMALL), oracle.random_ids(20)
    more = rewritten(path, tmp_path / "more", lambda config: None)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    names = [name for name in tensors if "layers.1.self_attn" in name and "q_" not in name]
    copies = {name.replace(".1.", ".5."): tensors[name].clone() for name in names}
    assert len(copies) == 4  # k_proj, v_proj, k_norm, o_proj
    safetensors.torch.save_file(copies | tensors, more / "model.safetensors")
    assert torch.equal(LLM(more).logits(ids), LLM(path).logits(ids))
    gguf = gguf_files.convert(more, tmp_path / "more.gguf")[0]
    torch.testing.assert_close(LLM(gguf).logits(ids), LLM(path).logits(ids), rtol=0, atol=1e-4)
    assert not caplog.records


# ---- embeddings for layers -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["safetensors", "gguf"])
def test_only_rows_of_the_table_are_read_as_tokens_need_them(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    path = tiny("Gemma4Text", **GEMMA4_SMALL)
    if kind == "gguf":
        path = gguf_files.convert(path, tmp_path / "model.gguf", "Q8_0")[0]
    read: list[Any] = []

    def watched_layout(*args: Any) -> dict[str, TensorSource]:
        tensors = hub_layout(*args)
        (name,) = {name for name, tensor in tensors.items() if tensor.stays}
        assert name == TABLE
        load = tensors[name].load
        loud = lambda *at: (read.append(at), load(*at))[1]  # noqa: E731
        return {**tensors, name: dataclasses.replace(tensors[name], load=loud)}

    hub_layout = gemma4.hub_layout
    monkeypatch.setattr(gemma4, "hub_layout", watched_layout)
    llm = LLM(path, kernels="native", quantize=None if kind == "gguf" else "q8")
    assert all(at == (slice(0, 1),) for at in read)  # when a step was recorded
    read.clear()
    llm.logits([7, 9, 7, 300])
    assert {(at.start, at.stop) for (at,) in read} == {(7, 8), (9, 10), (300, 301)}


def test_the_table_takes_no_memory(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny("Gemma4Text", **GEMMA4_SMALL)
    gguf = gguf_files.convert(path, tmp_path / "model.gguf", "Q8_0")[0]
    for each, options in ((path, {}), (path, {"quantize": "q8"}), (gguf, {})):
        checkpoint = nanollama.open_checkpoint(each)
        table = checkpoint.tensors[TABLE]
        plain = {**checkpoint.tensors, TABLE: None}
        rest = {name: tensor for name, tensor in plain.items() if tensor is not None}
        without = dataclasses.replace(checkpoint, tensors=rest)
        engine = nanollama.EngineConfig(**options)
        backend = nanollama.Backend(torch.device("cpu"), torch.float32, "torch")
        sizes = [weight_bytes(c, engine, backend) for c in (checkpoint, without)]
        assert sizes[0] == sizes[1]
        assert checkpoint.num_parameters - without.num_parameters == 320 * 6 * 32
        assert table.stays


def test_a_projection_in_floats_among_packed_weights_is_native(tiny: Tiny, tmp_path: Path) -> None:
    """Files that llama.cpp quantizes have it so."""
    path = gguf_files.convert(tiny("Gemma4Text", **GEMMA4_SMALL), tmp_path / "x.gguf", "Q4_0")[0]
    assert (
        nanollama.open_checkpoint(path).tensors["model.per_layer_model_projection.weight"].kind
        == "F32"
    )
    llm = LLM(path, kernels="native")
    assert llm.engine.decode_steps is not None
    ids = oracle.random_ids(40)
    expected = LLM(path, kernels="torch").logits(ids)
    assert (llm.logits(ids) - expected).std() < 0.15 * expected.std()


# ---- files ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Gemma4", "Gemma4Unified"])
def test_the_text_part_of_a_multimodal_model_is_run(tiny: Tiny, tmp_path: Path, name: str) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 8}
    vision |= {"num_attention_heads": 2, "num_key_value_heads": 2, "position_embedding_size": 8}
    vision |= {"mm_embed_dim": 16, "output_proj_dims": 16} if name == "Gemma4Unified" else {}
    kind = GEMMA4_SMALL if name == "Gemma4" else {**GEMMA4, "attention_k_eq_v": True}
    text = getattr(transformers, f"{name}TextConfig")(**{**conftest.TINY, **kind})
    config = getattr(transformers, f"{name}Config")(
        text_config=text.to_dict(), vision_config=vision, audio_config=None
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    for part, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in part), std=0.2)
    model.save_pretrained(tmp_path)
    shutil.copy(tiny() / "tokenizer.json", tmp_path)
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert any("embed_vision" in name for name in tensors)
    ids = oracle.random_ids(40)
    oracle.assert_same_model(LLM(tmp_path), oracle.load(tmp_path), ids)


def test_what_the_hubs_files_leave_out(tiny: Tiny, tmp_path: Path) -> None:
    """Their heads are spelt by `global_head_dim`, and nulls stand for what a model lacks."""
    path, ids = tiny("Gemma4Text", **GEMMA4_EXPERTS), oracle.random_ids(30)

    def hub(config: dict[str, Any]) -> None:
        config.pop("per_layer_config")
        config |= {"global_head_dim": 64, "num_global_key_value_heads": 1}
        config["use_bidirectional_attention"] = "vision"
        config["rope_parameters"].pop("sliding_attention")
        config["rope_parameters"]["sliding_attention"] = {"rope_type": "default"}

    found = rewritten(path, tmp_path / "hub", hub)
    assert torch.equal(LLM(found).logits(ids), LLM(path).logits(ids))


def test_layers_have_windows_but_every_sixth_one_and_the_last() -> None:
    values = {"model_type": "gemma4_text", "hidden_size": 64, "intermediate_size": 64}
    values |= {"vocab_size": 99, "num_hidden_layers": 8}
    for edit in ({}, {"layer_types": ["sliding_attention"] * 8}):
        kinds = transformers.Gemma4TextConfig(**values, **edit).layer_types
        windows = model_config({**values, **edit}, "x").windows
        assert [window is None for window in windows] == [k == "full_attention" for k in kinds]


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all'"),
    ({"sliding_window": None}, "sliding_window is None"),
    ({"num_kv_shared_layers": 4}, "num_kv_shared_layers is 4"),
    ({"num_kv_shared_layers": 3}, "no earlier layer is of type full_attention"),
    ({"global_head_dim": "wide"}, "global_head_dim is 'wide'"),
    ({"head_dim": 15}, "do not divide evenly"),
    ({"num_key_value_heads": 3}, "do not divide evenly"),
    ({"per_layer_config": [1]}, "per_layer_config is"),
    ({"per_layer_config": {"1": {"head_dim": 64}}}, "per_layer_config is"),
    ({"per_layer_config": {"3": {"head_dim": "x"}, "1": {"head_dim": "x"}}}, "head_dim is 'x'"),
    ({"per_layer_config": {"1": {"sliding_window": 3}}}, "per_layer_config is"),
    ({"rope_parameters": {"full_attention": 3}}, "rope_parameters is"),
    ({"rope_parameters": 3}, "rope_parameters is 3"),
    ({"enable_moe_block": True}, "num_experts is None"),
    ({"layer_types": ["full_attention"]}, "layer_types is"),
]


@pytest.mark.parametrize(("edit", "message"), BROKEN)
def test_a_config_that_makes_no_sense_is_refused(edit: dict[str, Any], message: str) -> None:
    values = {**conftest.TINY, "model_type": "gemma4_text", **GEMMA4, **edit}
    with pytest.raises(CheckpointError, match=message):
        model_config(values, "x")


def test_a_gguf_that_does_not_say_which_columns_turn_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    path = gguf_files.convert(tiny("Gemma4Text", **GEMMA4), tmp_path / "x.gguf")[0]
    raw = path.read_bytes()
    path.write_bytes(raw.replace(b"rope_freqs.weight", b"rope_freqz.weight"))
    with pytest.raises(CheckpointError, match=r"rope_freqs\.weight is missing"):
        LLM(path)


def test_show_tells_both_shapes_of_heads(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    assert nanollama.main(["show", str(tiny("Gemma4Text", **GEMMA4_SMALL))]) == 0
    shown = capsys.readouterr().out
    assert "4 heads over 1 key/value heads of 64 (1 of 32 in windows)" in shown
    assert "RoPE scaling" not in shown
