"""Gemma 3n: what its files may say and leave out. tests/extras/models/test_gemma4.py has its keys
and values; test_families.py, its logits."""

from __future__ import annotations

import json
import math
import shutil
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
from families import GEMMA3N
from oracle import Tiny, rewritten

import nanollama
from nanollama import LLM, CheckpointError, model_config
from nanollama_extras.kernels.native import NativeLinear
from nanollama_extras.models.gemma4 import TABLE

PUBLISHED = {"model_type": "gemma3n_text", "hidden_size": 2048, "intermediate_size": 8192}


def test_defaults_are_those_of_transformers() -> None:
    for n_layers, num_shared in ((30, 10), (35, 15)):
        values = {**PUBLISHED, "num_hidden_layers": n_layers, "num_kv_shared_layers": num_shared}
        theirs = transformers.Gemma3nTextConfig(**values)
        config = model_config({**values, "vocab_size": theirs.vocab_size}, "x")
        slides = [kind == "sliding_attention" for kind in theirs.layer_types]
        own = {None: False, 512: True}
        assert [own[window] for window in config.windows[:20]] == slides[:20]
        assert config.windows[20:] == (0,) * num_shared
        sources = config.own["shape"].sources
        shared = range(20, n_layers)
        assert [sources[i] for i in shared] == [19 - slides[i] for i in shared]
        assert config.logit_softcap == theirs.final_logit_softcapping
        assert config.n_ctx == theirs.max_position_embeddings
        assert config.attn_scale == 1.0
        assert [rope["rope_theta"] for rope in config.ropes] == [1e6, 1e4]
        altup, normal = config.own["altup"], torch.distributions.Normal(0, 1)
        cutoff = float(normal.icdf(torch.tensor(0.95)))
        assert altup.cutoffs[10:] == (None,) * (n_layers - 10)
        assert all(abs(each - cutoff) < 1e-6 for each in altup.cutoffs[:10])
        names = ("altup_num_inputs", "altup_active_idx", "altup_correct_scale", "laurel_rank")
        found = (altup.num_streams, altup.active, altup.scales_output, altup.laurel_rank)
        assert found == tuple(getattr(theirs, name) for name in names)


def test_a_width_by_which_others_scale_their_scores_means_nothing(
    tiny: Tiny, tmp_path: Path
) -> None:
    path, ids = tiny("Gemma3nText", **GEMMA3N), oracle.random_ids(30)
    found = rewritten(path, tmp_path / "x", lambda c: c.update(query_pre_attn_scalar=24))
    assert torch.equal(LLM(found).logits(ids), LLM(path).logits(ids))


def test_the_text_part_of_a_multimodal_model_is_run(tiny: Tiny, tmp_path: Path) -> None:
    path, ids = tiny("Gemma3nText", **GEMMA3N), oracle.random_ids(30)

    def nest(config: dict[str, Any]) -> None:
        text = dict(config)
        config.clear()
        config |= {"model_type": "gemma3n", "text_config": text, "vision_config": {}}

    whole = rewritten(path, tmp_path / "whole", nest)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    names = {name: name.replace("model.", "model.language_model.", 1) for name in tensors}
    renamed = {names[name]: tensor for name, tensor in tensors.items()}
    for part in ("vision_tower.timm_model.x", "audio_tower.x", "embed_vision.x", "embed_audio.x"):
        renamed[f"model.{part}.weight"] = torch.zeros(3)
    for name in ("k_proj", "v_proj", "k_norm"):  # which layers that share them may have
        first = f"model.language_model.layers.0.self_attn.{name}.weight"
        renamed[first.replace("layers.0", "layers.5")] = renamed[first].clone()
    safetensors.torch.save_file(renamed, whole / "model.safetensors")
    assert torch.equal(LLM(whole).logits(ids), LLM(path).logits(ids))


def test_the_table_of_embeddings_for_layers_stays_in_the_file(tiny: Tiny) -> None:
    checkpoint = nanollama.open_checkpoint(tiny("Gemma3nText", **GEMMA3N))
    assert [name for name, tensor in checkpoint.tensors.items() if tensor.stays] == [TABLE]


def test_heads_as_wide_as_the_real_ones_run_on_native_kernels(tiny: Tiny) -> None:
    path, ids = tiny("Gemma3nText", **{**GEMMA3N, "head_dim": 256}), oracle.random_ids(60)
    # scores are sums of 256 products, and not scaled
    oracle.assert_same_model(LLM(path, kernels="native"), oracle.load(path), ids, atol=1e-3)
    assert LLM(path, kernels="native", quantize="q8").engine.decode_steps is not None


def test_matrices_in_floats_among_packed_weights_are_native(tiny: Tiny, tmp_path: Path) -> None:
    """Files that llama.cpp quantizes have streams and the learned residual so."""
    path = tiny("Gemma3nText", **{**GEMMA3N, "laurel_rank": 64})
    path = gguf_files.convert(path, tmp_path / "x.gguf", "Q8_0")[0]
    kinds = {n: t.kind for n, t in nanollama.open_checkpoint(path).tensors.items()}
    assert {kind for name, kind in kinds.items() if "altup" in name or "laurel" in name} == {"F32"}
    llm, ids = LLM(path, kernels="native"), oracle.random_ids(40)
    assert llm.engine.decode_steps is not None
    expected = LLM(path, kernels="torch").logits(ids)
    assert (llm.logits(ids) - expected).std() < 0.1 * expected.std()


def test_these_matrices_keep_8_bits_in_q4(tiny: Tiny) -> None:
    llm = LLM(tiny("Gemma3nText", **GEMMA3N), kernels="native", quantize="q4")
    decoder: Any = llm.engine.decoder
    layer, streams = decoder.layers[0], decoder.streams
    wide = [layer.laurel_left, layer.laurel_right, *streams.projections, *streams.unembeddings]
    parts = [part for projection in wide for part in projection.parts]
    assert all(isinstance(part, NativeLinear) and part.fields["bits"] == 8 for part in parts)
    assert layer.per_layer_projection.parts[0].fields["bits"] == 4


def test_published_gguf_files_count_shared_layers_in_floats(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def add(writer: Any, value: int) -> None:
        writer.add_float32("gemma3n.attention.shared_kv_layers", float(value) + fraction)

    monkeypatch.setattr(gguf.GGUFWriter, "add_shared_kv_layers", add)
    path, fraction = tiny("Gemma3nText", **GEMMA3N), 0.0
    found = gguf_files.convert(path, tmp_path / "x.gguf")[0]
    assert nanollama.open_checkpoint(found).config.own["shape"].sources == (0, 1, 2, 3, 2, 3)
    fraction = 0.5
    with pytest.raises(CheckpointError, match=r"num_kv_shared_layers is 2\.5"):
        nanollama.open_checkpoint(gguf_files.convert(path, tmp_path / "y.gguf")[0])


def test_a_gguf_may_leave_out_how_many_layers_share_keys(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All models have 20 layers with keys and values of their own."""
    shape = {**GEMMA3N, "num_hidden_layers": 22, "laurel_rank": 64}
    shape["layer_types"] = ["sliding_attention", "full_attention"] * 11
    shape["activation_sparsity_pattern"] = None
    path = tiny("Gemma3nText", **shape)
    expected = gguf_files.convert(path, tmp_path / "whole.gguf")[0]
    monkeypatch.setattr(gguf.GGUFWriter, "add_shared_kv_layers", lambda *args: None)
    monkeypatch.setattr(gguf.GGUFWriter, "add_activation_sparsity_scale", lambda *args: None)
    found = gguf_files.convert(path, tmp_path / "without.gguf")[0]
    one, other = (nanollama.open_checkpoint(each).config for each in (expected, found))
    assert one.windows == other.windows
    for ours, theirs in zip(other.own["altup"].cutoffs, one.own["altup"].cutoffs):
        assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("width", [24, 64])
def test_widths_without_a_kernel_are_computed_by_torch(tiny: Tiny, width: int) -> None:
    """24 is no multiple of 16."""
    shape = {**GEMMA3N, "hidden_size": width, "intermediate_size": width + 4}
    path, ids = tiny("Gemma3nText", **shape), oracle.random_ids(40)
    expected = oracle.logits(oracle.load(path), ids)
    torch.testing.assert_close(LLM(path, kernels="native").logits(ids), expected, rtol=0, atol=1e-4)


def test_verify_compares_the_first_stream(
    tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tiny("Gemma3nText", **GEMMA3N)
    assert nanollama.main(["verify", str(path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["passed"]
    assert found["layer_error"] < 1e-3
    other = shutil.copytree(path, tmp_path / "other")
    tensors = safetensors.torch.load_file(other / "model.safetensors")
    tensors["model.layers.3.altup.correction_coefs.weight"] += 1
    safetensors.torch.save_file(tensors, other / "model.safetensors", {"format": "pt"})
    reference = tmp_path / "reference.safetensors"
    assert nanollama.main(["verify", str(path), "--save-reference", str(reference)]) == 0
    capsys.readouterr()
    assert nanollama.main(["verify", str(other), "--reference", str(reference), "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["first"][0]["place"] == "layer 3"


BROKEN: list[tuple[dict[str, Any], str]] = [
    ({"altup_active_idx": 4}, "altup_active_idx is 4; an integer from 0 to 3"),
    ({"altup_active_idx": "x"}, "altup_active_idx is 'x'"),
    ({"altup_num_inputs": 9}, "altup_num_inputs is 9"),
    ({"laurel_rank": 0}, "laurel_rank is 0"),
    ({"layer_types": ["full_attention"]}, "layer_types is"),
    ({"layer_types": 3}, "layer_types is 3"),
    ({"sliding_window": None}, "sliding_window is None"),
    ({"intermediate_size": [96]}, "intermediate_size is"),
    ({"intermediate_size": [0] * 6}, "intermediate_size is"),
    ({"num_kv_shared_layers": 6}, "num_kv_shared_layers is 6"),
    ({"num_kv_shared_layers": 5}, "no earlier layer is of type full_attention"),
    ({"activation_sparsity_pattern": 0.95}, "activation_sparsity_pattern is 0.95"),
    ({"activation_sparsity_pattern": [1.0] * 6}, "activation_sparsity_pattern is"),
    ({"activation_sparsity_pattern": ["a"] * 6}, "activation_sparsity_pattern is"),
    ({"activation_sparsity_scale": [math.nan] * 6}, "activation_sparsity_scale is"),
    ({"activation_sparsity_scale": [1.0]}, "activation_sparsity_scale is"),
    ({"hidden_size_per_layer_input": 0}, "hidden_size_per_layer_input is 0"),
    ({"num_key_value_heads": 3}, "heads must divide evenly"),
]


@pytest.mark.parametrize(("edit", "message"), BROKEN)
def test_a_config_that_makes_no_sense_is_refused(edit: dict[str, Any], message: str) -> None:
    values = {**conftest.TINY, "model_type": "gemma3n_text", **GEMMA3N, **edit}
    with pytest.raises(CheckpointError, match=message):
        model_config(values, "x")
