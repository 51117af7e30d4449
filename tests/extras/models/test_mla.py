"""Latent attention: what is cached, prefixes, guesses, other ways to write the same model."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import oracle
import pytest
import safetensors.torch
import torch
from families import ROWS
from oracle import Tiny, rewritten

import nanollama
from nanollama import LLM, CheckpointError, GenerationRequest, SamplingParams, model_config
from nanollama_extras.kernels.native import NativeLinear

LATENT = ["deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite", "mistral4"]
OPTIONS: list[dict[str, Any]] = [
    {"kernels": "torch"},
    {"kernels": "torch", "kv_dtype": "q8"},
    {"kernels": "native"},
    {"kernels": "native", "quantize": "q4"},
    {"kernels": "native", "quantize": "q8", "kv_dtype": "q8"},
]


def made(tiny: Tiny, variant: str, **more: Any) -> Path:
    name, overrides = ROWS[variant]
    return tiny(name, **{**overrides, **more})


def greedy(ids: list[int], num: int = 12) -> GenerationRequest:
    params = SamplingParams(temperature=0, repeat_penalty=1, max_tokens=num, ignore_eos=True)
    return GenerationRequest(prompt=ids, params=params)


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize(
    ("kv_dtype", "num_bytes"), [("float32", 384), ("float16", 192), ("q8", 102)]
)
def test_a_token_takes_a_latent_and_a_key_however_many_heads_there_are(
    tiny: Tiny, kernels: str, kv_dtype: str, num_bytes: int
) -> None:
    for H in (2, 4):
        path = made(tiny, "glm4_moe_lite", num_attention_heads=H)
        llm = LLM(path, kernels=kernels, kv_dtype=kv_dtype, parallel=1)
        llm.complete(greedy(oracle.random_ids(40)))
        cache, config = llm.engine.cache, llm.config
        capacity = cache.strips[0].shape[3]
        assert cache.nbytes == capacity * config.n_layers * num_bytes
        assert config.kv_bytes(capacity, kv_dtype) == cache.nbytes


def test_the_sizes_of_known_models() -> None:
    values = {"hidden_size": 2048, "num_attention_heads": 20, "num_hidden_layers": 47}
    values |= {"intermediate_size": 10240, "vocab_size": 154880}
    flash = model_config({"model_type": "glm4_moe_lite", **values}, "x")
    assert flash.kv_bytes(1, "float16") == 47 * 576 * 2
    r1 = {**values, "num_attention_heads": 128, "num_hidden_layers": 61}
    assert model_config({"model_type": "deepseek_v3", **r1}, "x").kv_bytes(1, "q8") == 61 * 612


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_latents_in_8_bits_stay_close(tiny: Tiny, kernels: str) -> None:
    path, ids = made(tiny, "deepseek_v2"), oracle.random_ids(60)
    exact = LLM(path, kernels=kernels).logits(ids)
    rounded = LLM(path, kernels=kernels, kv_dtype="q8").logits(ids)
    assert 0 < (rounded - exact).std() < 0.1 * exact.std()


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o.values()))
def test_answers_do_not_depend_on_company_chunks_prefixes_or_guesses(
    tiny: Tiny, options: dict[str, Any]
) -> None:
    path = made(tiny, "deepseek_v3")
    alone = LLM(path, parallel=1, **options)
    ids = oracle.random_ids(50) * 2
    prompts = [ids, ids[:70], [*ids[:60], 5, 6, 7], ids[3:40]]
    answers = []
    for prompt in prompts:
        alone.engine.forget()
        answers.append(alone.complete(greedy(prompt)).token_ids)
    for lookup in (0, 4):
        llm = LLM(path, parallel=4, prefill_chunk=16, lookup=lookup, **options)
        deltas = list(llm.stream(map(greedy, prompts)))
        assert [[d.token_id for d in deltas if d.index == i] for i in range(4)] == answers
        done = llm.complete(greedy([*ids, *answers[0], 9]))  # the next turn
        assert done.usage.cached_tokens >= len(ids)
        alone.engine.forget()
        assert done.token_ids == alone.complete(greedy([*ids, *answers[0], 9])).token_ids


@pytest.mark.parametrize("variant", LATENT)
def test_nothing_falls_back_to_torch_beside_packed_weights(tiny: Tiny, variant: str) -> None:
    llm = LLM(made(tiny, variant), kernels="native", quantize="q4", kv_dtype="q8")
    assert llm.engine.decode_steps is not None  # which torch's operations would prevent


# ---- the files ----


@pytest.mark.parametrize("variant", ["deepseek_v2", "deepseek_v3", "glm4_moe_lite"])
def test_older_gguf_files_have_kv_b_in_one(tiny: Tiny, tmp_path: Path, variant: str) -> None:
    path, ids = made(tiny, variant), oracle.random_ids(60)
    old = gguf_files.convert(path, tmp_path / "old.gguf", old_latents=True)[0]
    oracle.assert_same_model(LLM(old), oracle.load(path), ids)
    packed = gguf_files.convert(path, tmp_path / "packed.gguf", "Q8_0", old_latents=True)[0]
    plain = gguf_files.convert(path, tmp_path / "x.gguf", "Q8_0", True, old_latents=True)[0]
    llm = LLM(packed, kernels="native")
    assert all(isinstance(m, NativeLinear) for m in oracle.matrices(llm.engine.decoder))
    expected = LLM(plain, kernels="torch").logits(ids)
    close = LLM(packed, kernels="torch").logits(ids)
    assert (close - expected).std() < 0.1 * expected.std()  # k_b is packed anew


def test_a_gguf_that_leaves_out_groups_is_of_a_known_model(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for method in ("add_expert_group_count", "add_expert_group_used_count"):
        monkeypatch.setattr(gguf_files.gguf.GGUFWriter, method, lambda *args: None)
    for count, groups in ((256, (8, 4)), (64, (1, 1))):
        path = made(tiny, "deepseek_v3", n_routed_experts=count)
        config = LLM(gguf_files.convert(path, tmp_path / f"{count}.gguf")[0]).config
        routing = config.own["routing"]
        assert (routing.num_groups, routing.groups_used) == groups


def as_kimi_k25(config: dict[str, Any]) -> None:
    """As config.json of Kimi K2.5 on the hub has its text part."""
    text = {**config, "model_type": "kimi_k2"}
    config.clear()
    config.update(model_type="kimi_k25", text_config=text, vision_config={"depth": 1})


def test_the_text_part_of_kimi_k25_is_run(tiny: Tiny, tmp_path: Path) -> None:
    path, ids = made(tiny, "kimi_k2"), oracle.random_ids(40)
    whole = rewritten(path, tmp_path / "whole", as_kimi_k25)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    tensors = {f"language_model.{name}": tensor for name, tensor in tensors.items()}
    for name in ("vision_tower.encoder.weight", "mm_projector.proj.0.weight"):
        tensors[name] = torch.ones(2, 2)
    safetensors.torch.save_file(tensors, whole / "model.safetensors")
    assert torch.equal(LLM(whole).logits(ids), LLM(path).logits(ids))


def as_on_the_hub(config: dict[str, Any]) -> None:
    """Keys that transformers does not write, or has under other names."""
    config.pop("mlp_layer_types", None)
    config |= {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "ep_size": 1}
    config |= {"moe_layer_freq": 1, "aux_loss_alpha": 0.001, "seq_aux": True}


@pytest.mark.parametrize("variant", ["deepseek_v3", "glm4_moe_lite"])
def test_keys_and_blocks_of_files_on_the_hub(
    tiny: Tiny, tmp_path: Path, variant: str, caplog: pytest.LogCaptureFixture
) -> None:
    path, ids = made(tiny, variant), oracle.random_ids(40)
    hub = rewritten(path, tmp_path / "hub", as_on_the_hub)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    block = gguf_files.prediction_block(tensors, 3)
    safetensors.torch.save_file(tensors | block, hub / "model.safetensors")
    assert torch.equal(LLM(hub).logits(ids), LLM(path).logits(ids))
    assert not caplog.records


@pytest.mark.parametrize(
    ("variant", "edit", "message"),
    [
        ("deepseek_v2", {"topk_method": "noaux_tc"}, "topk_method is 'noaux_tc'"),
        ("deepseek_v3", {"scoring_func": "softmax"}, "scoring_func 'softmax'"),
        ("deepseek_v3", {"kv_lora_rank": 0}, "kv_lora_rank is 0"),
        ("deepseek_v3", {"qk_rope_head_dim": 31, "kv_lora_rank": 65}, "rope turns 31"),
        ("deepseek_v3", {"q_lora_rank": "x"}, "q_lora_rank is 'x'"),
        ("glm4_moe_lite", {"mlp_layer_types": ["dense"]}, "mlp_layer_types"),
        ("mistral4", {"v_head_dim": None, "kv_lora_rank": 1.5}, "kv_lora_rank is 1.5"),
        ("glm4_moe_lite", {"kv_lora_rank": 65}, "width must be even"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(
    tiny: Tiny, tmp_path: Path, variant: str, edit: dict[str, Any], message: str
) -> None:
    path = rewritten(made(tiny, variant), tmp_path / "x", lambda config: config.update(edit))
    with pytest.raises(CheckpointError, match=message):
        LLM(path)


def test_a_matrix_of_another_shape_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    path = made(tiny, "deepseek_v3")
    for name in ("kv_b_proj", "kv_a_proj_with_mqa", "q_b_proj"):
        other = rewritten(path, tmp_path / name, lambda config: None)
        tensors = safetensors.torch.load_file(path / "model.safetensors")
        key = f"model.layers.1.self_attn.{name}.weight"
        tensors[key] = tensors[key][:-1].contiguous()
        safetensors.torch.save_file(tensors, other / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"layers\.1\.self_attn"):
            LLM(other)


# ---- adapters ----


@pytest.fixture
def adapter(tiny: Tiny, tmp_path: Path) -> Callable[[list[str]], tuple[Path, Path, Any]]:
    """adapter([..]) -> a checkpoint, an adapter of these modules, PEFT's model of both."""
    import peft

    def make(modules: list[str]) -> tuple[Path, Path, Any]:
        path = made(tiny, "deepseek_v3")
        settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=modules)
        model = peft.get_peft_model(oracle.load(path), settings)
        for part, parameter in model.named_parameters():
            if "lora_" in part:
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(tmp_path / "adapter")
        return path, tmp_path / "adapter", model.eval()

    return make


def test_an_adapter_of_latent_attention_is_that_of_peft(adapter: Any) -> None:
    path, directory, model = adapter(["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "o_proj"])
    oracle.assert_same_model(LLM(path, adapter=directory), model, oracle.random_ids(40))


def test_an_adapter_of_what_is_split_is_refused(adapter: Any) -> None:
    path, directory, _ = adapter(["kv_b_proj"])
    with pytest.raises(CheckpointError, match=r"changes .*kv_b_proj.* cannot be adapted"):
        LLM(path, adapter=directory)


def test_names_are_not_those_of_attention_with_heads_of_its_own() -> None:
    config = model_config(
        {"model_type": "deepseek_v2", "hidden_size": 64, "num_attention_heads": 3}
        | {"num_hidden_layers": 1, "intermediate_size": 8, "vocab_size": 9, "q_lora_rank": None}
        | {"num_experts_per_tok": 2},
        "x",
    )
    rows = 3 * 192  # a multiple of head_dim, whose rows `head_order` would move
    assert rows % config.head_dim == 0
    source = nanollama.TensorSource((rows, 64), "F32", 0, lambda at: torch.arange(rows)[at])
    named = nanollama.canonical_tensors({"model.layers.0.self_attn.q_proj.weight": source}, config)
    (name,) = named
    assert re.search(r"q_b_proj\.weight$", name)
    order = named[name].load()
    assert order[:128].tolist() == list(range(128))
    assert order[128:192].tolist() == [*range(128, 192, 2), *range(129, 192, 2)]
