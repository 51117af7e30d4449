"""Section 5: the decoder against transformers on tiny random checkpoints, and its cache."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import pytest
import safetensors.torch
import torch
from oracle import VARIANTS, Tiny, matrices, rewritten

import nanollama
from nanollama import LLM, Batch, CheckpointError, KVCache, ModelConfig


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_greedy_tokens_are_those_of_transformers(tiny: Tiny, variant: str) -> None:
    name, overrides = VARIANTS[variant]
    path = tiny(name, **overrides)
    oracle.assert_same_model(LLM(path), oracle.load(path), oracle.random_ids(70))


@pytest.mark.parametrize("kind", ["rope_type", "type"])
@pytest.mark.parametrize(
    "variant",
    "llama llama-llama3 llama-linear llama-yarn llama-tied mistral-window qwen2-window "
    "qwen2-tied-yarn qwen3".split(),
)
def test_the_older_spelling_of_config_json_is_the_same_model(
    tiny: Tiny, tmp_path: Path, variant: str, kind: str
) -> None:
    def as_in_4x(config: dict[str, Any]) -> None:
        rope = config.pop("rope_parameters")
        config["rope_theta"] = rope.pop("rope_theta")
        rope[kind] = rope.pop("rope_type")
        config["rope_scaling"] = None if rope == {kind: "default"} else rope
        config["torch_dtype"] = config.pop("dtype")
        config.pop("layer_types", None)

    name, overrides = VARIANTS[variant]
    path = tiny(name, **overrides)
    old = rewritten(path, tmp_path / "old", as_in_4x)
    ids = oracle.random_ids(70)
    assert torch.equal(LLM(old).logits(ids), LLM(path).logits(ids))


def test_a_head_stored_beside_a_tied_embedding_is_ignored(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny("Llama", tie_word_embeddings=True)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    copy = rewritten(path, tmp_path / "copy", lambda config: None)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)
    safetensors.torch.save_file(tensors, copy / "model.safetensors")
    ids = oracle.random_ids(20)
    assert torch.equal(LLM(copy).logits(ids), LLM(path).logits(ids))


@pytest.mark.parametrize("quantize", [None, "q8"])
def test_a_head_that_differs_from_a_tied_embedding_is_the_head(
    tiny: Tiny, tmp_path: Path, quantize: str | None
) -> None:
    path = tiny("Llama", tie_word_embeddings=True)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    copy = rewritten(path, tmp_path / "copy", lambda config: None)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].flip(0).contiguous()
    safetensors.torch.save_file(tensors, copy / "model.safetensors")
    ids, model = oracle.random_ids(20), oracle.load(copy)
    assert torch.equal(model.lm_head.weight, tensors["lm_head.weight"])  # transformers keeps both
    error = LLM(copy, quantize=quantize).logits(ids) - oracle.logits(model, ids)
    assert error.abs().max() < (0.5 if quantize else 1e-4)
    tied = LLM(path).logits(ids)
    torch.testing.assert_close(LLM(copy).logits(ids).flip(1), tied, rtol=0, atol=1e-4)


def test_a_head_of_another_shape_beside_a_tied_embedding_is_refused(
    tiny: Tiny, tmp_path: Path
) -> None:
    path = broken(
        tiny,
        tmp_path / "broken",
        lambda t: t.update({"lm_head.weight": torch.zeros(321, 64)}),
        tie_word_embeddings=True,
    )
    with pytest.raises(CheckpointError, match=r"lm_head.weight has shape \(321, 64\)"):
        LLM(path)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_files_run_in_float32(tiny: Tiny, tmp_path: Path, dtype: Any) -> None:
    path = tiny("Llama")
    oracle.load(path).to(dtype).save_pretrained(tmp_path)
    shutil.copy(path / "tokenizer.json", tmp_path)
    llm = LLM(tmp_path)
    assert llm.checkpoint.quantization == {"bfloat16": "BF16", "float16": "F16"}[str(dtype)[6:]]
    assert llm.checkpoint.num_bytes == 2 * llm.checkpoint.num_parameters
    oracle.assert_same_model(llm, oracle.load(tmp_path), oracle.random_ids(40))


def test_sharded_files_are_one_model(tiny: Tiny, tmp_path: Path) -> None:
    path = tiny("Llama")
    model = oracle.load(path)
    model.save_pretrained(tmp_path, max_shard_size="60KB")
    shutil.copy(path / "tokenizer.json", tmp_path)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    assert not (tmp_path / "model.safetensors").exists()
    llm = LLM(tmp_path)
    assert llm.checkpoint.num_parameters == sum(p.numel() for p in model.parameters())
    oracle.assert_same_model(llm, model, oracle.random_ids(40))


@pytest.mark.parametrize(("dtype", "atol"), [("bfloat16", 0.5), ("float16", 0.05)])
def test_half_precision_arithmetic_stays_close(tiny: Tiny, dtype: str, atol: float) -> None:
    path, ids = tiny("Llama"), oracle.random_ids(40)
    half, exact = LLM(path, dtype=dtype).logits(ids), LLM(path).logits(ids)
    assert half.dtype == torch.float32
    torch.testing.assert_close(half, exact, rtol=0, atol=atol)
    assert not torch.equal(half, exact)


# ---- quantization of float checkpoints -----------------------------------------------------------


@pytest.mark.parametrize(("quantize", "bits", "size"), [("q8", 8, 0.27), ("q4", 4, 0.23)])
@pytest.mark.parametrize("variant", ["llama", "llama-tied", "llama-biases", "qwen2", "qwen3"])
def test_a_quantized_model_is_the_model_of_the_rounded_weights_in_less_memory(
    tiny: Tiny, variant: str, quantize: str, bits: int, size: float
) -> None:
    name, overrides = VARIANTS[variant]
    path = tiny(name, **overrides)
    llm, model = LLM(path, quantize=quantize, kernels="torch"), oracle.load(path)
    packed, unpacked = (
        sum(m.nbytes for m in matrices(each.engine.decoder)) for each in (llm, LLM(path))
    )
    assert packed / unpacked < size
    with torch.no_grad():
        parameters = dict(model.named_parameters())
        sensitive = nanollama.keep_8_bits(parameters)
        for name, parameter in parameters.items():
            if parameter.ndim == 2:
                kept = 8 if name in sensitive else bits
                parameter.copy_(nanollama.quantize(parameter, kept).dequantize())
    oracle.assert_same_model(llm, model, oracle.random_ids(60))


def test_more_bits_give_logits_closer_to_the_float_ones(tiny: Tiny) -> None:
    path, ids = tiny("Llama"), oracle.random_ids(60)
    exact = LLM(path).logits(ids)
    q8, q4 = (LLM(path, quantize=q).logits(ids) - exact for q in ("q8", "q4"))
    assert q8.std() < exact.std() / 10
    assert q8.std() < q4.std() / 5
    assert q4.std() < exact.std()


def test_a_matrix_that_groups_do_not_divide_stays_float(tiny: Tiny) -> None:
    llm = LLM(tiny("Llama", intermediate_size=72), quantize="q8")
    mlp = llm.engine.decoder.layers[0].mlp
    assert isinstance(mlp.down_proj.parts[0], nanollama.Linear)  # 72 columns
    assert not isinstance(mlp.gate_up_proj.parts[0], nanollama.Linear)  # 64 columns
    assert torch.isfinite(llm.logits(oracle.random_ids(5))).all()


# ---- the cache -----------------------------------------------------------------------------------


def forward(llm: LLM, cache: KVCache, work: list[tuple[int, int, list[int]]]) -> torch.Tensor:
    """Logits of every token of (slot, start, ids) triples."""
    for slot, start, ids in work:
        cache.reserve(slot, start + len(ids))
    decoder = llm.engine.decoder
    with torch.inference_mode():
        batch = Batch([(*one, len(one[2])) for one in work], decoder.device, decoder.row_tile)
        return decoder(batch, cache)


def new_cache(llm: LLM, num_slots: int = 1) -> KVCache:
    return llm.engine.decoder.new_cache(num_slots)


CACHED = ["llama", "mistral-window", "qwen2-window", "qwen3"]


@pytest.mark.parametrize("variant", CACHED)
def test_a_cached_decode_equals_a_full_forward_token_by_token(tiny: Tiny, variant: str) -> None:
    name, overrides = VARIANTS[variant]
    llm, ids = LLM(tiny(name, **overrides)), oracle.random_ids(40)
    cache = new_cache(llm)
    for i, token in enumerate(ids):
        row = forward(llm, cache, [(0, i, [token])])
        assert torch.equal(row[0], llm.logits(ids[: i + 1])[-1]), i


@pytest.mark.parametrize(
    "options",
    [
        *({"dtype": dtype, "kernels": "torch"} for dtype in ("float32", "bfloat16")),
        *({"dtype": d, "kernels": "torch", "quantize": "q4"} for d in ("float32", "bfloat16")),
        {"kernels": "torch", "kv_dtype": "q8"},
    ],
    ids=repr,
)
def test_rows_are_bit_for_bit_the_same_however_a_prompt_is_cut(
    tiny: Tiny, options: dict[str, str]
) -> None:
    llm, ids = LLM(tiny("Llama"), **options), oracle.random_ids(600)
    whole = forward(llm, new_cache(llm), [(0, 0, ids)])
    for chunk in (1, 7, 64, 513):
        cache = new_cache(llm)
        stop = 40 if chunk == 1 else 600
        parts = [
            forward(llm, cache, [(0, at, ids[at : min(at + chunk, stop)])])
            for at in range(0, stop, chunk)
        ]
        assert torch.equal(torch.cat(parts), whole[:stop]), chunk


@pytest.mark.parametrize("variant", CACHED)
def test_a_row_does_not_depend_on_its_neighbours(tiny: Tiny, variant: str) -> None:
    name, overrides = VARIANTS[variant]
    llm = LLM(tiny(name, **overrides))
    prompts = [oracle.random_ids(n, seed=n) for n in (1, 30, 13, 70, 2)]
    alone = [forward(llm, new_cache(llm), [(0, 0, ids)]) for ids in prompts]
    cache = new_cache(llm, 5)
    together = forward(llm, cache, [(slot, 0, ids) for slot, ids in enumerate(prompts)])
    assert torch.equal(together, torch.cat(alone))
    # one more token for some of them, in another order, beside a second prompt in a used slot
    work = [(3, 70, [5]), (1, 30, [6, 7]), (0, 0, [9] * 12)]
    expected = [llm.logits([*prompts[3], 5])[70:], llm.logits([*prompts[1], 6, 7])[30:]]
    mixed = forward(llm, cache, work)
    assert torch.equal(mixed, torch.cat([*expected, llm.logits([9] * 12)]))


@pytest.mark.parametrize("kernels", ["torch"])
def test_a_strip_grows_by_doubling_and_keeps_what_it_holds(tiny: Tiny, kernels: str) -> None:
    tiny_llm = LLM(tiny("Llama", max_position_embeddings=8192), kernels=kernels)
    cache, ids = new_cache(tiny_llm, 2), oracle.random_ids(12)
    assert cache.nbytes == 0
    forward(tiny_llm, cache, [(0, 0, ids)])
    before = cache.strips[0].clone()
    tile = cache.tile
    assert before.shape[3] == tile
    cache.reserve(0, tile)
    assert cache.strips[0].shape[3] == tile
    cache.reserve(0, tile + 1)
    assert cache.strips[0].shape[3] == 2 * tile
    assert torch.equal(cache.strips[0][:, :, :, :tile], before)
    assert (cache.strips[0][:, :, :, tile:] == 0).all()
    cache.reserve(0, 2 * tile + 1)
    assert cache.strips[0].shape[3] == 4 * tile
    cache.reserve(0, 9 * tile)
    assert cache.strips[0].shape[3] == 9 * tile
    assert cache.nbytes == tiny_llm.config.kv_bytes(9 * tile, "float32")
    assert cache.strips[1].shape[3] == 0  # the other slot took nothing
    row = forward(tiny_llm, cache, [(0, 12, [3])])
    assert torch.equal(row[0], tiny_llm.logits([*ids, 3])[-1])


def test_a_copied_prefix_continues_like_the_original(tiny_llm: LLM) -> None:
    cache, ids = new_cache(tiny_llm, 3), oracle.random_ids(30)
    forward(tiny_llm, cache, [(0, 0, ids), (2, 0, [7] * 40)])
    source = cache.strips[0].clone()
    cache.start(0, 1, 18, [*ids[:18], 4, 5])
    cache.start(0, 2, 18, [*ids[:18], 4, 5])  # over a slot that held something longer
    for slot in (1, 2):
        rows = forward(tiny_llm, cache, [(slot, 18, [4, 5])])
        assert torch.equal(rows, tiny_llm.logits([*ids[:18], 4, 5])[18:])
    assert torch.equal(cache.strips[0], source)


def test_logits_do_not_touch_the_engine_s_cache(tiny: Tiny) -> None:
    llm = LLM(tiny("Llama"), prefill_chunk=16)
    whole = llm.logits(oracle.random_ids(50))
    assert whole.shape == (50, 320)
    assert whole.dtype == torch.float32
    assert llm.engine.cache.nbytes == 0


@pytest.mark.parametrize("ids", [[], [320], [3, -1], [2**70]])
def test_logits_of_ids_that_do_not_exist_are_refused(tiny_llm: LLM, ids: list[int]) -> None:
    with pytest.raises(nanollama.RequestError):
        tiny_llm.logits(ids)


# ---- checkpoints that do not fit their config ----------------------------------------------------


def broken(
    tiny: Tiny, target: Path, edit: Callable[[dict[str, torch.Tensor]], Any], **overrides: Any
) -> Path:
    """A tiny Llama whose tensors went through `edit`."""
    copy = rewritten(tiny("Llama", **overrides), target, lambda config: None)
    tensors = safetensors.torch.load_file(copy / "model.safetensors")
    edit(tensors)
    safetensors.torch.save_file(tensors, copy / "model.safetensors")
    return copy


NORM = "model.layers.1.input_layernorm.weight"
V_PROJ = "model.layers.0.self_attn.v_proj.weight"


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop(NORM), f"tensor {NORM} is missing"),
        (lambda t: t.pop("lm_head.weight"), "tensor lm_head.weight is missing"),
        (lambda t: t.pop("model.embed_tokens.weight"), "model.embed_tokens.weight is missing"),
        (
            lambda t: t.update({V_PROJ: torch.zeros(32, 63)}),
            rf"tensor {V_PROJ} has shape \(32, 63\); its config asks for \(32, 64\)",
        ),
        (lambda t: t.update({NORM: torch.zeros(64, 1)}), rf"{NORM} has shape \(64, 1\)"),
        (lambda t: t.update({NORM: torch.tensor(1.0)}), rf"{NORM} has shape \(\)"),
        (
            lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": torch.zeros(64)}),
            "unexpected tensor 'model.layers.0.self_attn.q_proj.bias",
        ),
        (
            lambda t: t.update({f"model.layers.{i}.mlp.x": torch.zeros(1) for i in range(9)}),
            "unexpected tensor 'model.layers.0.mlp.x', .* and 6 more",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_with_their_file(
    tiny: Tiny, tmp_path: Path, edit: Any, named: str
) -> None:
    path = broken(tiny, tmp_path / "broken", edit)
    with pytest.raises(CheckpointError, match=named) as caught:
        LLM(path)
    assert str(path) in str(caught.value)


def test_more_layers_than_the_config_says_are_refused(tiny: Tiny, tmp_path: Path) -> None:
    path = rewritten(
        tiny("Llama"), tmp_path / "x", lambda config: config.update(num_hidden_layers=1)
    )
    with pytest.raises(CheckpointError, match=r"unexpected tensor 'model\.layers\.1\."):
        LLM(path)


def test_a_tensor_type_that_torch_cannot_hold_is_refused(tiny: Tiny, tmp_path: Path) -> None:
    path = rewritten(tiny("Llama"), tmp_path / "x", lambda config: None)
    raw = (path / "model.safetensors").read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    entry = header["model.norm.weight"]
    entry["dtype"], entry["shape"] = "F4", [8 * entry["shape"][0]]
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + raw[8 + size :]
    )
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight"):
        LLM(path)


def test_the_shape_of_a_config_is_what_the_decoder_has(tiny_llm: LLM) -> None:
    config: ModelConfig = tiny_llm.config
    decoder = tiny_llm.engine.decoder
    table = decoder.embed_tokens.rows(torch.arange(config.n_vocab))
    assert (len(decoder.layers), *table.shape) == (config.n_layers, config.n_vocab, config.n_embd)
