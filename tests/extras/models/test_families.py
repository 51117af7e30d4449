"""Sections 2, 5 and 6: every family against transformers, as safetensors and as GGUF."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import conftest
import gguf
import gguf_files
import oracle
import pytest
import safetensors.torch
import torch
import transformers
import vision_models
from families import ALL, GGUF_ROWS, LONGROPE, ROWS
from oracle import Tiny, rewritten

import nanollama
from nanollama import LLM, Batch, CheckpointError, GenerationRequest, SamplingParams
from nanollama_extras.kernels.native import NativeLinear


def test_there_is_a_row_for_every_family() -> None:
    with_images = {str(row["text"]["model_type"]) for row in vision_models.FAMILIES.values()}
    assert sorted(ROWS.keys() | with_images) == sorted(nanollama.all_families())


def made(tiny: Tiny, variant: str) -> Path:
    name, overrides = ALL[variant]
    return tiny(name, **overrides)


@torch.inference_mode()
def hidden_states(llm: LLM, ids: list[int]) -> list[torch.Tensor]:
    """What each layer gives (T, C), or (A, T, C)"""
    found: list[torch.Tensor] = []
    decoder = llm.engine.decoder

    def watched(layer: Any) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            found.append(layer(*args))
            return found[-1]

        return run

    layers, decoder.layers = decoder.layers, [watched(layer) for layer in decoder.layers]  # type: ignore
    llm.logits(ids)
    decoder.layers = layers
    return [x[..., : len(ids), :] for x in found]


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
        expected = expected.squeeze(-3)  # of (1, T, C), or (A, 1, T, C)
        torch.testing.assert_close(unit * ours, expected, rtol=1e-5, atol=1e-4)


# ---- other ways to write the same model ----------------------------------------------------------


def as_in_4x(config: dict[str, Any]) -> None:
    """rope_theta beside rope_scaling (and rope_local_base_freq), and how many instead of which."""
    whole, config = config, config.get("text_config", config)
    rope = config.pop("rope_parameters", {"rope_theta": 1e4, "rope_type": "default"})
    local = rope.get("sliding_attention")
    rope = dict(rope.get("full_attention", rope))
    config["rope_theta"] = rope.pop("rope_theta")
    if local:
        config["rope_local_base_freq"] = local["rope_theta"]
    for key in ("partial_rotary_factor", "original_max_position_embeddings"):
        if key in rope and key in config:
            rope.pop(key)
        elif key == "partial_rotary_factor" and key in rope:
            config[key] = rope.pop(key)
    rope["type"] = rope.pop("rope_type")
    config["rope_scaling"] = None if rope == {"type": "default"} else rope
    whole["torch_dtype"] = whole.pop("dtype")
    if config["model_type"] in ("gemma2", "gpt_oss", "mistral", "qwen2"):  # patterns of their own
        config.pop("layer_types", None)
    for layer in config.pop("per_layer_config", {}).values():  # of layers without a window
        config["global_head_dim"] = layer["head_dim"]
        config["num_global_key_value_heads"] = layer.get("num_key_value_heads")
    if "hidden_activation" in config:
        config["hidden_act"] = config["hidden_activation"]


@pytest.mark.parametrize("variant", sorted(ALL.keys() - {"olmo_hybrid-nope"}))  # 5.x only
def test_the_older_spelling_of_config_json_is_the_same_model(
    tiny: Tiny, tmp_path: Path, variant: str
) -> None:
    path, ids = made(tiny, variant), oracle.random_ids(70)
    old = rewritten(path, tmp_path / "old", as_in_4x)
    assert "rope_parameters" not in json.loads((old / "config.json").read_text())
    assert torch.equal(LLM(old).logits(ids), LLM(path).logits(ids))


def test_the_text_part_of_a_multimodal_model_is_run(tiny: Tiny, tmp_path: Path) -> None:
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    text = {**conftest.TINY, **ROWS["gemma3_text"][1]}
    config = transformers.Gemma3Config(text_config=text, vision_config=vision)
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path)
    shutil.copy(tiny() / "tokenizer.json", tmp_path)
    oracle.assert_same_model(LLM(tmp_path), model, oracle.random_ids(40))
    # as files of some other models are
    tensors = safetensors.torch.load_file(tmp_path / "model.safetensors")
    renamed = {
        re.sub(r"^language_model\.model\.", "model.language_model.", name): tensor
        for name, tensor in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    expected = LLM(tmp_path).logits(oracle.random_ids(40))
    safetensors.torch.save_file(renamed, tmp_path / "model.safetensors")
    assert torch.equal(LLM(tmp_path).logits(oracle.random_ids(40)), expected)


def mxfp4(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(.., cols) -> blocks (.., G, 16) and scales (.., G) uint8 as gpt-oss's files have them, and
    the weight that they stand for, as transformers unpacks it"""
    groups = weight.unflatten(-1, (-1, 32))
    exponent = torch.floor(torch.log2(groups.abs().amax(-1, keepdim=True))) - 2
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    values = torch.cat((values, -values))
    codes = ((groups / 2**exponent).unsqueeze(-1) - values).abs().argmin(-1).to(torch.uint8)
    blocks = codes[..., ::2] | codes[..., 1::2] << 4
    scales = (exponent.squeeze(-1) + 127).to(torch.uint8)
    unpacked = transformers.integrations.mxfp4.convert_moe_packed_tensors(
        blocks, scales, dtype=torch.float32
    )
    return blocks, scales, unpacked  # of (E, rows, cols): (E, cols, rows)


def test_experts_in_mxfp4_are_what_transformers_unpacks(tiny: Tiny, tmp_path: Path) -> None:
    path = made(tiny, "gpt_oss")
    method = {"quant_method": "mxfp4"}
    packed = rewritten(path, tmp_path / "packed", lambda c: c.update(quantization_config=method))
    plain = rewritten(path, tmp_path / "plain", lambda c: None)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    unpacked = dict(tensors)
    for name in [name for name in tensors if re.search(r"experts\.\w+_proj$", name)]:
        weight = tensors.pop(name).transpose(1, 2)
        blocks, scales, unpacked[name] = mxfp4(weight)
        tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
    safetensors.torch.save_file(tensors, packed / "model.safetensors")
    unpacked = {name: tensor.contiguous() for name, tensor in unpacked.items()}
    safetensors.torch.save_file(unpacked, plain / "model.safetensors")
    ids = oracle.random_ids(60)
    llm = LLM(packed, kernels="torch")
    oracle.assert_same_model(llm, oracle.load(plain), ids)
    expert = llm.engine.decoder.layers[0].mlp.experts[0]  # type: ignore[union-attr]
    assert isinstance(expert.down_proj.parts[0], nanollama.PackedLinear)
    native = LLM(packed, kernels="native").logits(ids)
    assert (native - llm.logits(ids)).std() < 0.1 * native.std()
    tensors.pop("model.layers.0.mlp.experts.down_proj_scales")
    safetensors.torch.save_file(tensors, packed / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"down_proj.*is missing"):
        LLM(packed)


def ternary_files(path: Path, plain: Path, packed: Path) -> None:
    """A BitNet with ternary weights times a scale in floats, and the same in 2 bits."""
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    packable = dict(tensors)
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().mean().bfloat16().view(1)
        ternary = (tensors[name] / scale.float()).round().clamp(-1, 1)
        tensors[name] = ternary * scale.float()
        packable[name] = transformers.integrations.bitnet.pack_weights(ternary)
        packable[f"{name}_scale"] = scale
    safetensors.torch.save_file(tensors, plain / "model.safetensors")
    safetensors.torch.save_file(packable, packed / "model.safetensors")


def test_ternary_weights_stay_packed_and_are_exact(tiny: Tiny, tmp_path: Path) -> None:
    path = made(tiny, "bitnet")
    method = {"quant_method": "bitnet", "linear_class": "autobitlinear"}
    method["quantization_mode"] = "offline"
    packed = rewritten(path, tmp_path / "packed", lambda c: c.update(quantization_config=method))
    plain = rewritten(path, tmp_path / "plain", lambda c: None)
    ternary_files(path, plain, packed)
    ids, model = oracle.random_ids(60), oracle.load(plain)
    llm = LLM(packed, kernels="torch")
    oracle.assert_same_model(llm, model, ids)
    assert isinstance(
        llm.engine.decoder.layers[0].self_attn.o_proj.parts[0], nanollama.PackedLinear
    )
    native, expected = LLM(packed, kernels="native").logits(ids), llm.logits(ids)
    assert (native - expected).std() < 0.1 * expected.std()
    for key, value in (("linear_class", "bitlinear"), ("quantization_mode", "online")):
        other = rewritten(
            packed,
            tmp_path / value,
            lambda c, k=key, v=value: c["quantization_config"].update({k: v}),
        )
        with pytest.raises(CheckpointError, match=rf"{key} '{value}' is not supported"):
            LLM(other)


def test_experts_in_columns_are_those_in_rows(tiny: Tiny, tmp_path: Path) -> None:
    """Files of Qwen3-VL on the hub have each expert's matrices transposed."""
    path = made(tiny, "qwen3_vl_moe_text")
    hub = rewritten(path, tmp_path / "hub", lambda c: None)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    turned = {
        name: tensor.transpose(1, 2).contiguous() if "experts" in name else tensor
        for name, tensor in tensors.items()
    }
    safetensors.torch.save_file(turned, hub / "model.safetensors")
    ids = oracle.random_ids(40)
    assert torch.equal(LLM(hub).logits(ids), LLM(path).logits(ids))


def count_rotated_columns(config: dict[str, Any]) -> None:
    """As config.json of MiniMax-M2 on the hub does."""
    rope = config.pop("rope_parameters")
    config["rotary_dim"] = int(config["head_dim"] * rope["partial_rotary_factor"])
    config["rope_theta"] = rope["rope_theta"]


def end_with_the_last_layer(config: dict[str, Any]) -> None:
    config["moe_layer_end_index"] = -1


@pytest.mark.parametrize(
    ("variant", "edit"),
    [("minimax_m2", count_rotated_columns), ("ernie4_5_moe", end_with_the_last_layer)],
)
def test_keys_of_files_on_the_hub_mean_the_same(
    tiny: Tiny, tmp_path: Path, variant: str, edit: Callable[[dict[str, Any]], None]
) -> None:
    path, ids = made(tiny, variant), oracle.random_ids(40)
    hub = rewritten(path, tmp_path / "hub", edit)
    assert torch.equal(LLM(hub).logits(ids), LLM(path).logits(ids))


def test_a_block_that_predicts_further_tokens_is_left_out(
    tiny: Tiny, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = made(tiny, "glm4_moe")
    hub = rewritten(path, tmp_path / "hub", lambda c: None)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    block = gguf_files.prediction_block(tensors, 3)
    safetensors.torch.save_file(tensors | block, hub / "model.safetensors")
    ids = oracle.random_ids(40)
    assert torch.equal(LLM(hub).logits(ids), LLM(path).logits(ids))
    assert not caplog.records
    block.pop("model.layers.3.eh_proj.weight")  # a layer that config.json does not count
    safetensors.torch.save_file(tensors | block, hub / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"unexpected tensor 'model.layers.3"):
        LLM(hub)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"n_group": 3}, "8 experts in 3 groups"),
        ({"topk_group": 5}, "8 experts in 4 groups, of which 5"),
        ({"n_group": 8}, "8 experts in 8 groups"),
        ({"num_experts_per_tok": 5}, "5 experts are used, of 2 groups of 2"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace is -1"),
        ({"routed_scaling_factor": 0}, "routed_scaling_factor is 0"),
        ({"n_shared_experts": "2"}, "n_shared_experts is '2'"),
    ],
)
def test_a_router_that_makes_no_sense_is_refused(
    tiny: Tiny, tmp_path: Path, edit: dict[str, Any], message: str
) -> None:
    path = rewritten(made(tiny, "glm4_moe"), tmp_path / "x", lambda c: c.update(edit))
    with pytest.raises(CheckpointError, match=message):
        LLM(path)


def as_granite_on_the_hub(config: dict[str, Any]) -> None:
    config["layer_types"] = [kind.split("_")[0] for kind in config["layer_types"]]
    config["layer_types"] = [k.replace("linear", "mamba") for k in config["layer_types"]]
    config["layer_types"] = [k.replace("full", "attention") for k in config["layer_types"]]
    config["mamba_d_head"], config["time_step_limit"] = "auto", [0.0, float("inf")]


def as_nemotron_on_the_hub(config: dict[str, Any]) -> None:
    letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
    config["hybrid_override_pattern"] = "".join(map(letters.get, config.pop("layers_block_type")))
    config |= {"num_hidden_layers": 99, "sliding_window": None, "rope_theta": 10000}
    config["time_step_limit"] = [0.0, float("inf")]


@pytest.mark.parametrize(
    ("variant", "edit"),
    [("granitemoehybrid", as_granite_on_the_hub), ("nemotron_h", as_nemotron_on_the_hub)],
)
def test_layers_of_hybrids_are_named_in_two_ways(
    tiny: Tiny, tmp_path: Path, variant: str, edit: Callable[[dict[str, Any]], None]
) -> None:
    path, ids = made(tiny, variant), oracle.random_ids(40)
    hub = rewritten(path, tmp_path / "hub", edit)
    assert torch.equal(LLM(hub).logits(ids), LLM(path).logits(ids))


@pytest.mark.parametrize(
    ("variant", "edit", "message"),
    [
        ("granitemoehybrid", {"layer_types": ["mamba", "mlp", "mamba"]}, "layer_types is "),
        ("granitemoehybrid", {"layer_types": ["mamba"]}, "layer_types is "),
        ("granitemoehybrid", {"mamba_n_groups": 3}, "4 heads of width 32 in 3 groups"),
        ("granitemoehybrid", {"mamba_n_heads": 8}, "8 heads of width 32 in 2 groups do not"),
        ("granitemoehybrid", {"time_step_limit": [1, 0]}, "time_step_limit is "),
        ("granitemoehybrid", {"mamba_d_conv": 1}, "mamba_d_conv is 1"),
        ("nemotron_h", {"moe_latent_size": -1}, "moe_latent_size is -1; an integer"),
        ("nemotron_h", {"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu'; relu2"),
        ("nemotron_h", {"layers_block_type": 7}, "layer_types is 7"),
        ("nemotron_h", {"n_group": 3}, "8 experts in 3 groups"),
        ("falcon_h1", {"ssm_multipliers": [1.0]}, "ssm_multipliers is "),
        ("falcon_h1", {"key_multiplier": "x"}, "key_multiplier is 'x'"),
    ],
)
def test_a_hybrid_that_makes_no_sense_is_refused(
    tiny: Tiny, tmp_path: Path, variant: str, edit: dict[str, Any], message: str
) -> None:
    path = rewritten(made(tiny, variant), tmp_path / "x", lambda c: c.update(edit))
    with pytest.raises(CheckpointError, match=message):
        LLM(path)


def test_only_the_chosen_experts_run(tiny: Tiny) -> None:
    llm = LLM(made(tiny, "qwen3_moe"), quantize="q8", kernels="native")
    mlp = llm.engine.decoder.layers[0].mlp
    assert isinstance(mlp, nanollama.MoE)
    with torch.inference_mode():
        x = torch.randn(1, llm.config.n_embd, generator=torch.Generator().manual_seed(0))
        y, chosen = mlp(x, None), mlp.gate(x).topk(2).indices[0].tolist()
        for i in set(range(len(mlp.experts))) - set(chosen):
            for part in mlp.experts[i].gate_up_proj.parts:
                part.blocks.fill_(255)  # scales that are no numbers
        assert torch.equal(mlp(x, None), y)


# ---- rows and their neighbours -------------------------------------------------------------------


def forward(llm: LLM, cache: nanollama.KVCache, work: list[Any]) -> torch.Tensor:
    """Logits of every token of (slot, start, ids) triples."""
    for slot, start, ids in work:
        cache.reserve(slot, start + len(ids))
    decoder = llm.engine.decoder
    items = [(*one, len(one[2])) for one in work]
    with torch.inference_mode():
        return decoder(Batch(items, decoder.device, decoder.row_tile), cache)


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

WINDOWED = ["mistral", "gemma2", "gemma3_text", "olmo3", "gpt_oss", "cohere2", "llama4_text"]


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


def test_phi_moe_has_other_factors_for_long_texts(tiny: Tiny, tmp_path: Path, kernels: str) -> None:
    """The model's own code takes long_factor for them; transformers, short_factor always."""
    path = made(tiny, "phimoe-longrope")
    longer = {"long_factor": LONGROPE["long_factor"]}
    both = rewritten(path, tmp_path / "both", lambda c: c["rope_parameters"].update(longer))
    stretched = {"short_factor": LONGROPE["long_factor"]}
    as_long = rewritten(both, tmp_path / "long", lambda c: c["rope_parameters"].update(stretched))
    llm = LLM(both, kernels=kernels)
    for length, judge in ((64, path), (65, as_long)):
        ids = oracle.random_ids(length)
        expected = oracle.logits(oracle.load(judge), ids)
        torch.testing.assert_close(llm.logits(ids), expected, rtol=0, atol=1e-4)


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


# ---- GGUF ----------------------------------------------------------------------------------------


def gguf_made(tiny: Tiny, target: Path, variant: str, kind: str = "F32", **options: Any) -> Path:
    name, overrides = GGUF_ROWS[variant]
    return gguf_files.convert(tiny(name, **overrides), target, kind, **options)[0]


@pytest.mark.parametrize("variant", GGUF_ROWS)
def test_a_gguf_file_is_the_model_it_was_made_from(
    tiny: Tiny, tmp_path: Path, variant: str
) -> None:
    name, overrides = GGUF_ROWS[variant]
    llm = LLM(gguf_made(tiny, tmp_path / "model.gguf", variant))
    model = oracle.load(tiny(name, **overrides))
    oracle.assert_same_model(llm, model, oracle.random_ids(70))


# layers with a window by another pattern than the family's own
PATTERNS = {
    name: [True, False, False, True, True, False]
    for name in ("gemma2", "gemma3_text", "olmo3", "exaone4", "cohere2", "gpt_oss")
}


@pytest.mark.parametrize("variant", PATTERNS)
def test_a_gguf_says_which_of_its_layers_have_a_window(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    slides, add = PATTERNS[variant], gguf_files.add_metadata

    def with_pattern(writer: Any, *args: Any) -> None:
        add(writer, *args)
        writer.add_sliding_window_pattern(slides)

    monkeypatch.setattr(gguf_files, "add_metadata", with_pattern)
    name, overrides = GGUF_ROWS[variant]
    kinds = [nanollama.LAYER_TYPES[slide] for slide in slides]
    path = tiny(name, **{**overrides, "num_hidden_layers": len(kinds), "layer_types": kinds})
    llm = LLM(gguf_files.convert(path, tmp_path / "model.gguf")[0], kernels="torch")
    assert [window is not None for window in llm.config.windows] == slides
    ids, model = oracle.random_ids(40), oracle.load(path)
    torch.testing.assert_close(llm.logits(ids), oracle.logits(model, ids), rtol=0, atol=1e-3)


@pytest.mark.parametrize(("step", "num_full"), [(3, 2), (1, 6), (None, 1)])
def test_a_gguf_may_say_that_every_nth_layer_has_no_window(step: Any, num_full: int) -> None:
    values = {"model_type": "gemma3_text", "sliding_window_pattern": step, "hidden_size": 64}
    values |= {"num_hidden_layers": 6, "intermediate_size": 64, "sliding_window": 8}
    if step is None:  # the family's own
        values.pop("sliding_window_pattern")
    assert nanollama.model_config(values, "x").windows.count(None) == num_full


def test_a_pattern_for_another_number_of_layers_is_refused() -> None:
    values = {"model_type": "olmo3", "sliding_window_pattern": [True, False], "hidden_size": 64}
    values |= {"num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    for pattern in ([True, False], {"a": 1}, -2, 1.5):
        with pytest.raises(CheckpointError, match=r"layer_types|sliding_window_pattern"):
            nanollama.model_config({**values, "sliding_window_pattern": pattern}, "x")


@pytest.mark.parametrize("variant", ["gemma3_text", "smollm3", "gpt_oss", "mixtral", "qwen3"])
def test_a_gguf_without_theta_has_the_familys(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variant: str
) -> None:
    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_freq_base", lambda *args: None)
    theirs = transformers.CONFIG_MAPPING[variant]().rope_parameters
    llm = LLM(gguf_made(tiny, tmp_path / "model.gguf", variant))
    nested = theirs.get("full_attention", theirs)
    assert llm.config.rope["rope_theta"] == nested["rope_theta"]


def test_thetas_of_gemma_3_under_ollamas_keys(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(writer: Any, theta: float) -> None:
        writer.add_float32("gemma3.rope.global.freq_base", 5e5)
        writer.add_float32("gemma3.rope.local.freq_base", 2e4)

    monkeypatch.setattr(gguf.GGUFWriter, "add_rope_freq_base", add)
    llm = LLM(gguf_made(tiny, tmp_path / "model.gguf", "gemma3_text"))
    assert [rope["rope_theta"] for rope in llm.config.ropes] == [5e5, 2e4]


@pytest.mark.parametrize("variant", GGUF_ROWS)
def test_packed_weights_are_those_that_they_unpack_to(
    tiny: Tiny, tmp_path: Path, variant: str
) -> None:
    packed = gguf_made(tiny, tmp_path / "packed.gguf", variant, "Q8_0")
    plain = gguf_made(tiny, tmp_path / "plain.gguf", variant, "Q8_0", unpacked=True)
    ids = oracle.random_ids(50)
    expected = LLM(plain, kernels="torch").logits(ids)
    llm = LLM(packed, kernels="torch")
    torch.testing.assert_close(llm.logits(ids), expected, rtol=0, atol=2e-4)
    native = LLM(packed, kernels="native")
    assert (native.logits(ids) - expected).std() < 0.15 * expected.std()
    for each, kind in ((llm, nanollama.PackedLinear), (native, NativeLinear)):
        found = oracle.matrices(each.engine.decoder)
        assert len(found) > 8
        assert all(isinstance(matrix, kind) for matrix in found)
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    prompts = [ids, ids[:9], ids[5:7]]
    one = native.complete(GenerationRequest(prompt=ids, params=params)).token_ids
    native.engine.forget()
    deltas = native.stream(GenerationRequest(prompt=p, params=params) for p in prompts)
    assert [d.token_id for d in deltas if d.index == 0] == one


@pytest.mark.parametrize("variant", ALL)
def test_half_precision_stays_close(tiny: Tiny, variant: str) -> None:
    path, ids = made(tiny, variant), oracle.random_ids(40)
    exact = LLM(path, kernels="torch").logits(ids)
    half = LLM(path, dtype="bfloat16", kv_dtype="bfloat16").logits(ids)
    assert 0 < (half - exact).std() < 0.15 * exact.std()
