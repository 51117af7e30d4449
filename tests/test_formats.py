"""Section 6: GGUF against transformers and the gguf package, directories, and damaged files."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import oracle
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from oracle import LLAMA3, VARIANTS, Tiny, matrices

import nanollama
from nanollama import LLM, CheckpointError, Decoder, NanollamaError, Weights, open_checkpoint

SPEECH = Path(__file__).parent / "data" / "jefferson-1801.txt"


def reference(directory: Path, weights: dict[str, torch.Tensor]) -> Any:
    """transformers' model of `directory` with other weights."""
    model = oracle.load(directory)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert not [name for name in missing if not name.endswith("inv_freq")]
    return model


# ---- GGUF: the same model as transformers' ------------------------------------------------------

THROUGH_GGUF = [
    "llama",
    "llama-tied",
    "llama-biases",
    "llama-head_dim",
    "llama-mqa",
    "llama-eps-theta",
    "llama-llama3",
    "llama-linear",
    "llama-yarn",
    "llama-yarn-beta",
    "llama-yarn-attention_factor",
    "mistral",
    "qwen2",
    "qwen2-tied-yarn",
    "qwen3",
]


@pytest.mark.parametrize("variant", THROUGH_GGUF)
def test_a_gguf_is_the_model_it_was_made_from(tiny: Tiny, tmp_path: Path, variant: str) -> None:
    name, overrides = VARIANTS[variant]
    directory = tiny(name, **overrides)
    path, weights = gguf_files.convert(directory, tmp_path / "model.gguf")
    llm = LLM(path, kernels="torch")
    oracle.assert_same_model(llm, reference(directory, weights), oracle.random_ids(70))


@pytest.mark.parametrize("kind", gguf_files.DEQUANTIZABLE)
def test_every_type_that_the_gguf_package_dequantizes_loads(
    tiny: Tiny, tmp_path: Path, kind: str
) -> None:
    directory = tiny("Llama", hidden_size=256, intermediate_size=256)
    path, weights = gguf_files.convert(directory, tmp_path / "model.gguf", kind)
    llm = LLM(path, kernels="torch")
    assert llm.checkpoint.quantization == kind
    oracle.assert_same_model(llm, reference(directory, weights), oracle.random_ids(24))


@pytest.mark.parametrize("kernels", ["torch"])
@pytest.mark.parametrize("kind", nanollama.REPACK)
def test_packed_types_stay_packed(tiny: Tiny, tmp_path: Path, kind: str, kernels: str) -> None:
    directory = tiny("Llama", hidden_size=256, intermediate_size=256)
    path, _ = gguf_files.convert(directory, tmp_path / "model.gguf", kind)
    llm = LLM(path, kernels=kernels)
    weights = matrices(llm.engine.decoder)
    assert not any(isinstance(weight, nanollama.Linear) for weight in weights)
    # five bits take eight, and scales of 6 bits float32: the most that is added to the file's bytes
    num_matrix_bytes = sum(t.nbytes for t in llm.checkpoint.tensors.values() if len(t.shape) == 2)
    assert sum(weight.nbytes for weight in weights) < 1.85 * num_matrix_bytes


@pytest.mark.parametrize("kind", ["Q8_1", "Q8_K", "I32"])
def test_a_type_that_nobody_dequantizes_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    number = gguf_files.Kind[kind].value
    path = tmp_path / "x.gguf"
    # the type of the last tensor of a matrix shape; 256 columns are a whole block of any type
    raw, _ = gguf_files.smallest(
        {"llama.feed_forward_length": (gguf_files.U32, 256)},
        {
            "blk.0.ffn_gate.weight": (256, 32),
            "blk.0.ffn_up.weight": (256, 32),
            "blk.0.ffn_down.weight": (32, 256),
        },
        {"blk.0.ffn_down.weight": number},
    )
    path.write_bytes(raw + bytes(100_000))
    with pytest.raises(CheckpointError, match=rf"x\.gguf: tensor .*ffn_down.* of type {kind}"):
        load(path)


@pytest.mark.parametrize("variant", ["llama", "qwen2-tied-yarn"])
def test_a_split_gguf_is_one_model(tiny: Tiny, tmp_path: Path, variant: str) -> None:
    name, overrides = VARIANTS[variant]
    directory = tiny(name, **overrides)
    _, weights = gguf_files.convert(directory, tmp_path / "model.gguf", split_max_tensors=9)
    shards = sorted(tmp_path.iterdir())
    assert shards[0].name == f"model-00001-of-{len(shards):05d}.gguf"
    assert len(shards) > 2
    model, ids = reference(directory, weights), oracle.random_ids(30)
    for shard in shards[:2]:  # whichever part is named
        oracle.assert_same_model(LLM(shard), model, ids)
    shards[1].unlink()
    with pytest.raises(CheckpointError, match=rf"{shards[1].name}: missing"):
        open_checkpoint(shards[0])


def test_a_name_that_only_looks_split_is_one_file(tmp_path: Path) -> None:
    for name in ("x-00001-of-00000.gguf", "x-00003-of-00002.gguf", "x-1-of-2.gguf"):
        (tmp_path / name).write_bytes(gguf_files.smallest()[0])
        assert open_checkpoint(tmp_path / name).config.n_layers == 1


def test_float_gguf_files_can_be_quantized(tiny: Tiny, tmp_path: Path) -> None:
    directory = tiny("Llama")
    path, _ = gguf_files.convert(directory, tmp_path / "model.gguf", "F16")
    ids = oracle.random_ids(40)
    packed, exact = LLM(path, quantize="q8"), LLM(path)
    sizes = [llm.engine.decoder.embed_tokens.nbytes for llm in (packed, exact)]
    assert sizes[0] < 0.54 * sizes[1]
    assert (packed.logits(ids) - exact.logits(ids)).std() < exact.logits(ids).std() / 10


def test_rope_divisors_are_not_rounded_to_the_compute_type(tiny: Tiny, tmp_path: Path) -> None:
    directory = tiny("Llama", rope_parameters=LLAMA3)
    path, _ = gguf_files.convert(directory, tmp_path / "model.gguf")
    ours, theirs = (
        LLM(p, dtype="bfloat16").engine.decoder.ropes[0].freqs for p in (path, directory)
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


# ---- GGUF: the real one --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2_reference(smollm2: Path) -> Any:
    """transformers' model with SmolLM2's weights as the gguf package dequantizes them."""
    reader = gguf.GGUFReader(smollm2)
    read = {name: field.contents() for name, field in reader.fields.items() if "llama." in name}
    num_heads, num_kv_heads = 9, 3
    config = transformers.LlamaConfig(
        vocab_size=49152,
        hidden_size=read["llama.embedding_length"],
        intermediate_size=read["llama.feed_forward_length"],
        num_hidden_layers=read["llama.block_count"],
        num_attention_heads=num_heads,
        num_key_value_heads=num_kv_heads,
        max_position_embeddings=read["llama.context_length"],
        rms_norm_eps=read["llama.attention.layer_norm_rms_epsilon"],
        rope_theta=read["llama.rope.freq_base"],
        tie_word_embeddings=True,
    )
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    theirs = {f"{names.get_name(n[:-7])}.weight": n for n in model.state_dict()}
    weights = {}
    for tensor in reader.tensors:
        weight = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        part = tensor.name.split(".")[-2]
        if part in ("attn_q", "attn_k"):
            heads = num_heads if part == "attn_q" else num_kv_heads
            pairs = weight.reshape(heads, len(weight) // heads // 2, 2, -1)
            weight = pairs.swapaxes(1, 2).reshape(weight.shape)
        weights[theirs[tensor.name]] = torch.from_numpy(weight.copy())
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    model.load_state_dict(weights, strict=True, assign=True)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # the one buffer left on meta
    return model.eval()


def test_smollm2_is_the_model_that_transformers_runs(smollm2: Path, smollm2_reference: Any) -> None:
    llm = LLM(smollm2, kernels="torch")
    ids = llm.encode("The capital of France is Paris. The capital of Germany is")
    oracle.assert_same_model(llm, smollm2_reference, ids)
    whole = llm.encode(SPEECH.read_text())[:320]
    theirs = perplexity(oracle.logits(smollm2_reference, whole), whole)
    assert 5 < theirs < 100
    assert perplexity(llm.logits(whole), whole) == pytest.approx(theirs, rel=1e-4)


def perplexity(logits: torch.Tensor, ids: list[int]) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:-1], torch.tensor(ids[1:])).exp())


def test_eight_bit_activations_hardly_change_smollm2(
    smollm2_llm: LLM, smollm2_reference: Any
) -> None:
    ids = smollm2_llm.encode(SPEECH.read_text())[:320]
    ours, theirs = smollm2_llm.logits(ids), oracle.logits(smollm2_reference, ids)
    assert perplexity(ours, ids) == pytest.approx(perplexity(theirs, ids), rel=2e-2)
    assert (ours.argmax(-1) == theirs.argmax(-1)).float().mean() > 0.92  # llama.cpp: 0.96
    kl = torch.nn.functional.kl_div(
        ours.log_softmax(-1), theirs.log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert kl < 8e-3


def test_smollm2_is_described_by_its_file(smollm2_llm: LLM) -> None:
    checkpoint = smollm2_llm.checkpoint
    assert checkpoint.quantization == "Q4_1"
    assert 134e6 < checkpoint.num_parameters < 135e6
    assert 0.9 < checkpoint.num_bytes / checkpoint.path.stat().st_size <= 1
    assert smollm2_llm.config.tie_embeddings


# ---- GGUF: what the parser reads -----------------------------------------------------------------


def test_metadata_and_tensors_are_read_as_the_gguf_package_reads_them(tmp_path: Path) -> None:
    path = tmp_path / "every.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("a.uint8", 255)
    writer.add_int8("a.int8", -128)
    writer.add_uint16("a.uint16", 65535)
    writer.add_int16("a.int16", -32768)
    writer.add_uint32("a.uint32", 2**32 - 1)
    writer.add_int32("a.int32", -(2**31))
    writer.add_uint64("a.uint64", 2**64 - 1)
    writer.add_int64("a.int64", -(2**63))
    writer.add_float32("a.float32", 0.1)
    writer.add_float64("a.float64", 0.1)
    writer.add_bool("a.bool", True)
    writer.add_string("a.string", "Grüße 🌍\n")
    writer.add_array("a.strings", ["", "α", "🌍"])
    writer.add_array("a.ints", [1, -2, 3])
    writer.add_array("a.floats", [0.5, -1.5])
    writer.add_array("a.bools", [True, False])
    random = torch.Generator().manual_seed(0)
    tensors = {
        "one": torch.randn(7, generator=random),
        "two": torch.randn(3, 64, generator=random).half(),
        "three": torch.randn(2, 3, 32, generator=random),
        "four": torch.randn(2, 1, 3, 5, generator=random).double(),
    }
    for name, tensor in tensors.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (metadata, ours), theirs = nanollama.read_gguf(path), gguf.GGUFReader(path)
    expected = {
        name: field.contents() for name, field in theirs.fields.items() if name[:5] != "GGUF."
    }
    assert metadata == expected
    assert list(ours) == list(tensors)
    for name, tensor in tensors.items():
        assert ours[name].shape == tuple(tensor.shape)
        assert torch.equal(ours[name].load(), tensor)


@pytest.mark.parametrize("alignment", [8, 32, 64, 4096])
def test_the_alignment_of_a_file_is_honoured(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, alignment: int
) -> None:
    add = gguf_files.add_metadata

    def aligned(writer: Any, *args: Any) -> None:
        writer.add_custom_alignment(alignment)
        add(writer, *args)

    monkeypatch.setattr(gguf_files, "add_metadata", aligned)
    path, weights = gguf_files.convert(tiny("Llama"), tmp_path / "model.gguf")
    tensors = open_checkpoint(path).tensors
    assert torch.equal(tensors["model.norm.weight"].load(), weights["model.norm.weight"])


def test_the_old_way_to_write_linear_scaling_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_files.smallest({"llama.rope.scale_linear": (gguf_files.F32, 4.0)})[0])
    rope = open_checkpoint(path).config.rope
    assert (rope["rope_type"], rope["factor"]) == ("linear", 4.0)


def test_templates_ends_and_sampling_come_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    string, u32, f32 = gguf_files.STRING, gguf_files.U32, gguf_files.F32
    path.write_bytes(
        gguf_files.smallest(
            {
                "tokenizer.chat_template": (string, "default one"),
                "tokenizer.chat_template.tool_use": (string, "another"),
                "tokenizer.ggml.eot_token_id": (u32, 3),
                "tokenizer.ggml.bos_token_id": (u32, 0),
                "general.sampling.temp": (f32, 0.5),
                "general.sampling.top_k": (5, 7),
            }
        )[0]
    )
    checkpoint = open_checkpoint(path)
    assert checkpoint.text.templates == {"default": "default one", "tool_use": "another"}
    assert checkpoint.text.eos_ids == {2, 3}
    assert checkpoint.text.special_tokens["bos_token"] == "a"
    assert checkpoint.sampling == {"temperature": 0.5, "top_k": 7}


# ---- damaged GGUF files --------------------------------------------------------------------------


def load(path: Path) -> Decoder:
    """Everything that opening a model reads, up to a decoder that ran two tokens."""
    checkpoint = open_checkpoint(path)
    weights = Weights(checkpoint.tensors, str(path), torch.device("cpu"), torch.float32)
    decoder = Decoder(checkpoint.config, weights)
    cache = decoder.new_cache(1)
    cache.reserve(0, 2)
    with torch.inference_mode():
        decoder(nanollama.Batch([(0, 0, [0, 0], 2)], decoder.device), cache)
    return decoder


def load_or_refuse(path: Path, most_characters: int) -> None:
    """A refusal is one line of fewer characters."""
    message = ""
    try:
        load(path)
    except NanollamaError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < most_characters


def assert_memory_below(num_bytes: int, call: Callable[[], Any]) -> None:
    """A call needs less memory of Python's. Threads that other tests have left may allocate at the
    same time, so that a call that seems to need more is made again, a little later."""
    peaks = []
    for pause in (0, 0.1, 0.5, 2):
        time.sleep(pause)
        tracemalloc.start()
        try:
            call()
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
        if peaks[-1] < num_bytes:
            break
    assert min(peaks) < num_bytes, peaks


def test_the_smallest_gguf_loads(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    for version in (2, 3):
        path.write_bytes(gguf_files.smallest(version=version)[0])
        assert load(path).config.n_vocab == 4


def refused(tmp_path: Path, raw: bytes, named: str = "") -> str:
    """The message of the CheckpointError that a file of these bytes gives: one line, with the
    file's name in it."""
    path = tmp_path / "damaged.gguf"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=named) as caught:
        load(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    assert len(message) < 800  # the list of families included
    return message


def test_a_gguf_cut_anywhere_is_refused(tmp_path: Path) -> None:
    raw, num_header = gguf_files.smallest()
    cuts = {*range(num_header), *range(num_header, len(raw), 211), len(raw) - 1}
    for cut in sorted(cuts):
        refused(tmp_path, raw[:cut], "not a GGUF|truncated|empty")


def test_the_part_that_is_cut_is_named(tmp_path: Path) -> None:
    raw, num_header = gguf_files.smallest()
    for cut, named in [
        (0, "the file is empty"),
        (3, "not a GGUF file: it starts with b'GGU'"),
        (6, "the header needs 1 x 4 bytes at 4, the file has 6"),
        (20, "the header"),
        (raw.index(b"general.arch") + 30, "the metadata needs 14 x 13 bytes"),
        (raw.index(b"llama.rope.freq_base") + 25, "metadata value 'llama.rope.freq_base'"),
        (raw.index(b"tokenizer.ggml.tokens") + 40, "metadata value 'tokenizer.ggml.tokens'"),
        (raw.index(b"blk.0.ffn_up.weight") + 25, "tensor 'blk.0.ffn_up.weight'"),
        (num_header + 50, "tensor 'token_embd.weight' is truncated: it ends at byte"),
        (len(raw) - 1, "tensor 'output_norm.weight' is truncated: it ends at byte"),
    ]:
        refused(tmp_path, raw[:cut], named)


@pytest.mark.parametrize(
    ("raw", "named"),
    [
        (b"", "the file is empty"),
        (b"GG", "not a GGUF file"),
        (b"PK\x03\x04" + bytes(100), "is a PyTorch pickle, which is never opened"),
        (b"\x80\x02}q\x00." + bytes(100), "is a PyTorch pickle, which is never opened"),
        (gguf_files.smallest(magic=b"GGML")[0], "not a GGUF file"),
        (gguf_files.smallest(version=1)[0], "GGUF version 1"),
        (gguf_files.smallest(version=4)[0], "GGUF version 4"),
        (gguf_files.smallest(version=3 << 24)[0], "is big-endian"),
        (gguf_files.smallest(num_tensors=2**63)[0], "needs 9223372036854775808 x 24 bytes"),
        (gguf_files.smallest(num_tensors=100)[0], "tensor"),
        (gguf_files.smallest(num_values=2**40)[0], "needs 1099511627776 x 13 bytes"),
        (gguf_files.smallest(num_values=15)[0], "metadata|truncated|tensor"),
    ],
)
def test_headers_that_lie_are_refused(tmp_path: Path, raw: bytes, named: str) -> None:
    refused(tmp_path, raw, named)


ONES = (gguf_files.ARRAY, (gguf_files.U32, [2, 3]))


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"general.architecture": None}, "general.architecture None"),
        (
            {"general.architecture": (gguf_files.STRING, "bert")},
            "'bert'.*: .*llama, .*qwen2, .*qwen3",
        ),
        ({"general.architecture": ONES}, r"general.architecture \[2, 3\]"),
        ({"general.alignment": (gguf_files.U32, 0)}, "general.alignment is 0"),
        ({"general.alignment": (gguf_files.U32, 12)}, "general.alignment is 12"),
        ({"general.alignment": (gguf_files.STRING, "32")}, "general.alignment is '32'"),
        ({"general.alignment": (gguf_files.U64, 2**60)}, "truncated"),
        ({"llama.block_count": None}, "llama.block_count is None"),
        ({"llama.block_count": (gguf_files.U32, 0)}, "num_hidden_layers is 0"),
        ({"llama.block_count": (gguf_files.U32, 2)}, r"model\.layers\.1\..* is missing"),
        ({"llama.block_count": (gguf_files.U32, 2**32 - 1)}, "num_hidden_layers is 4294967295"),
        ({"llama.block_count": (gguf_files.STRING, "1")}, "llama.block_count is '1'"),
        ({"llama.block_count": (5, -1)}, "num_hidden_layers is -1"),
        ({"llama.attention.head_count": ONES}, r"attention.head_count is \[2, 3\]"),
        ({"llama.attention.head_count": (gguf_files.F32, float("nan"))}, "heads is nan"),
        ({"llama.attention.head_count": (gguf_files.U32, 0)}, "num_attention_heads is 0"),
        ({"llama.attention.head_count_kv": ONES}, r"num_key_value_heads is \[2, 3\]"),
        ({"llama.attention.head_count_kv": (gguf_files.U32, 7)}, "7 key/value heads"),
        ({"llama.attention.key_length": (gguf_files.U32, 2**31)}, "head_dim is 2147483648"),
        ({"llama.attention.key_length": (gguf_files.U32, 8)}, "rope turns 16 of the 8 columns"),
        ({"llama.attention.key_length": (gguf_files.U32, 32)}, r"q_proj.* \(32, 32\).* \(64, 32\)"),
        ({"llama.embedding_length": (gguf_files.U32, 64)}, r"shape .*; its config asks for"),
        ({"llama.feed_forward_length": ONES}, r"intermediate_size is \[2, 3\]"),
        (
            {"llama.attention.layer_norm_rms_epsilon": (gguf_files.F32, float("nan"))},
            "rms_norm_eps is nan",
        ),
        (
            {"llama.attention.layer_norm_rms_epsilon": (gguf_files.F32, -1.0)},
            "rms_norm_eps is -1.0",
        ),
        ({"llama.rope.freq_base": (gguf_files.F32, float("inf"))}, "rope_theta is inf"),
        ({"llama.rope.freq_base": (gguf_files.STRING, "1e4")}, "rope_theta is '1e4'"),
        (
            {"llama.rope.scaling.type": (gguf_files.STRING, "longrope")},
            "rope short_factor is None; 8 numbers are needed",
        ),
        ({"llama.rope.scaling.type": (gguf_files.STRING, "yarn")}, "factor is None"),
        ({"llama.rope.scale_linear": (gguf_files.F32, 0.0)}, "factor is 0.0"),
        ({"llama.context_length": (gguf_files.U64, 2**63)}, "max_position_embeddings"),
        ({"x": (gguf_files.ARRAY, (99, []))}, "array of unknown type 99"),
    ],
)
def test_metadata_that_makes_no_sense_is_named(
    tmp_path: Path, changed: dict[str, Any], named: str
) -> None:
    refused(tmp_path, gguf_files.smallest(changed)[0], named)


def test_arrays_and_strings_longer_than_the_file_are_refused(tmp_path: Path) -> None:
    raw, _ = gguf_files.smallest()
    array_count = raw.index(b"tokenizer.ggml.tokens") + 21 + 4 + 4
    type_count = raw.index(b"tokenizer.ggml.token_type") + 25 + 4 + 4
    text_length = raw.index(b"general.architecture") + 20 + 4
    for at, named in [
        (array_count, "the metadata value 'tokenizer.ggml.tokens' needs"),
        (type_count, "the metadata value 'tokenizer.ggml.token_type' needs"),
        (text_length, "the metadata value 'general.architecture' needs"),
    ]:
        for lie in (2**64 - 1, 2**63, 2**40, len(raw)):
            damaged = raw[:at] + struct.pack("<Q", lie) + raw[at + 8 :]
            refused(tmp_path, damaged, f"truncated or corrupt: {named}")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"shapes": {"token_embd.weight": None}}, "token_embd.weight is missing"),
        ({"shapes": {"blk.0.ffn_up.weight": None}}, r"layers\.0\.mlp\.up_proj\.weight is missing"),
        ({"shapes": {"blk.1.ffn_up.weight": (32, 32)}}, r"unexpected tensor 'model\.layers\.1"),
        ({"shapes": {"v.patch_embd.weight": (32,)}}, "unexpected tensor 'v.patch_embd.weight"),
        ({"shapes": {"rope_freqs.weight": (9,)}}, r"rope_freqs.weight has shape \(9,\)"),
        ({"shapes": {"output_norm.weight": ()}}, "has 0 dimensions"),
        ({"shapes": {"output_norm.weight": (1, 1, 1, 1, 32)}}, "has 5 dimensions"),
        ({"shapes": {"output_norm.weight": (0,)}}, r"the shape \(0,\)"),
        ({"shapes": {"output_norm.weight": (2**62,)}}, "tensor 'output_norm.weight' is truncated"),
        (
            {"shapes": {"token_embd.weight": (2**62, 2**62)}},
            "tensor 'token_embd.weight' is truncated",
        ),
        ({"kinds": {"output_norm.weight": 99}}, "'output_norm.weight' has unknown type 99"),
        ({"kinds": {"output_norm.weight": 4}}, "the type Q4_2, which llama.cpp removed"),
        (
            {"kinds": {"blk.0.ffn_up.weight": 12}},
            r"'blk.0.ffn_up.weight' of Q4_K cannot have the shape \(32, 32",
        ),
        (
            {"offsets": {"output_norm.weight": 2**64 - 1}},
            "tensor 'output_norm.weight' is truncated",
        ),
        ({"offsets": {"output_norm.weight": 10**6}}, "tensor 'output_norm.weight' is truncated"),
    ],
)
def test_tensor_descriptions_that_lie_are_named(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    refused(tmp_path, gguf_files.smallest(**changes)[0], named)


def test_a_tensor_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    raw, _ = gguf_files.smallest(shapes={"blk.0.ffn_uq.weight": (32, 32)})
    damaged = raw.replace(b"blk.0.ffn_uq.weight", b"blk.0.ffn_up.weight")
    refused(tmp_path, damaged, "'blk.0.ffn_up.weight' is there twice")


INTERESTING = [0, 1, 2, 0x7F, 0x80, 0xFF, 2**16, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1]


@settings(max_examples=600)
@given(st.data())
def test_a_gguf_with_damaged_bytes_loads_or_is_refused_in_one_line(
    tmp_path: Path, data: st.DataObject
) -> None:
    raw, num_header = gguf_files.smallest()
    damaged = bytearray(raw)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(4, num_header - 9))
        number = data.draw(st.sampled_from(INTERESTING) | st.integers(0, 2**64 - 1))
        width = data.draw(st.sampled_from([1, 4, 8]))
        damaged[at : at + width] = (number % 256**width).to_bytes(width, "little")
    path = tmp_path / "damaged.gguf"
    path.write_bytes(damaged)
    assert_memory_below(40 * len(raw) + 2_000_000, lambda: load_or_refuse(path, 1000))


VALUES = st.one_of(
    st.tuples(st.just(gguf_files.U32), st.integers(0, 2**32 - 1)),
    st.tuples(st.just(5), st.integers(-(2**31), 2**31 - 1)),
    st.tuples(st.just(gguf_files.U64), st.sampled_from(INTERESTING)),
    st.tuples(st.just(12), st.floats()),
    st.tuples(st.just(7), st.booleans()),
    st.tuples(st.just(gguf_files.STRING), st.text(max_size=8)),
    st.tuples(st.just(gguf_files.STRING), st.sampled_from(["linear", "yarn", "llama3", "none"])),
    st.tuples(
        st.just(gguf_files.ARRAY),
        st.tuples(st.just(gguf_files.U32), st.lists(st.integers(0, 9), max_size=4)),
    ),
    st.none(),
)
KEYS = [
    *gguf_files.METADATA,
    *(
        f"llama.rope.scaling.{key}"
        for key in "type factor original_context_length yarn_attn_factor yarn_beta_fast".split()
    ),
    *"llama.attention.key_length llama.rope.scale_linear general.alignment "
    "general.sampling.temp tokenizer.chat_template tokenizer.ggml.eot_token_id".split(),
]


@settings(max_examples=400)
@given(st.dictionaries(st.sampled_from(KEYS), VALUES, min_size=1, max_size=3))
def test_any_metadata_values_load_or_are_refused_in_one_line(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    path = tmp_path / "changed.gguf"
    path.write_bytes(gguf_files.smallest(changed)[0])
    load_or_refuse(path, 800)  # the list of families included


# ---- damaged directories -------------------------------------------------------------------------


@pytest.fixture
def copied(tiny: Tiny, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny("Llama"), tmp_path / "model"))


def refused_directory(path: Path, named: str) -> None:
    with pytest.raises(CheckpointError, match=named) as caught:
        LLM(path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("text", "named"),
    [
        (None, "no config.json, which a model needs"),
        (b"", r"config\.json: not readable as JSON"),
        (b"{", r"config\.json: not readable as JSON"),
        (b"[1, 2]", r"config\.json: holds a list; a JSON object is needed"),
        (b"null", r"config\.json: holds a NoneType"),
        (b"\xff\xfe{}", r"config\.json: not readable as JSON"),
        (b"[" * 100_000, r"config\.json: not readable as JSON"),
        (b"{}", r"config\.json: model_type None is not supported; supported are: llama"),
        (b'{"model_type": "gpt2"}', r"model_type 'gpt2' is not supported"),
        (b'{"model_type": "llama"}', r"hidden_size is None"),
    ],
)
def test_a_config_that_cannot_be_read_is_refused(
    copied: Path, text: bytes | None, named: str
) -> None:
    (copied / "config.json").unlink()
    if text is not None:
        (copied / "config.json").write_bytes(text)
    refused_directory(copied, named)


def test_a_config_that_is_a_directory_is_refused(copied: Path) -> None:
    (copied / "config.json").unlink()
    (copied / "config.json").mkdir()
    refused_directory(copied, r"config\.json: not readable")


@pytest.mark.parametrize("form", ["safetensors", "bfloat16", "F32", "BF16", "Q8_0", "Q4_0"])
def test_a_file_that_changes_later_does_not_change_the_model(
    tiny: Tiny, tmp_path: Path, form: str
) -> None:
    directory = tmp_path / "model"
    shutil.copytree(tiny(), directory)
    path, file, options = directory, directory / "model.safetensors", {}
    if form == "bfloat16":
        options = {"dtype": "bfloat16"}
        weights = safetensors.torch.load_file(file)
        halves = {name: tensor.bfloat16() for name, tensor in weights.items()}
        safetensors.torch.save_file(halves, file)
    elif form != "safetensors":
        file, _ = gguf_files.convert(path, tmp_path / "model.gguf", form)
        path = file
    llm, ids = LLM(path, kernels="torch", **options), oracle.random_ids(20)
    before, size = llm.logits(ids), file.stat().st_size
    with file.open("r+b") as opened:  # the same file, in place
        opened.seek(size // 4)
        opened.write(b"\x11" * (size // 2))
    assert torch.equal(llm.logits(ids), before)
    with file.open("r+b") as opened:  # a page that is gone would end the process
        opened.truncate(10)
    assert torch.equal(llm.logits(ids), before)


def test_pickles_are_never_opened(copied: Path) -> None:
    (copied / "model.safetensors").unlink()
    refused_directory(copied, "no model.safetensors")
    (copied / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\n")
    refused_directory(copied, "pytorch_model.bin is a pickle, which is never opened")


def header_of(raw: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def with_header(header: Any, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def lie(raw: bytes, **entry: Any) -> bytes:
    header, data = header_of(raw)
    header["model.norm.weight"].update(entry)
    return with_header(header, data)


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: b"",
        lambda raw: raw[:7],
        lambda raw: raw[:100],
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:-1],
        lambda raw: raw + b"x",
        lambda raw: b"\xff" * 8 + raw[8:],
        lambda raw: (2**40).to_bytes(8, "little") + raw[8:],
        lambda raw: b"GGUF" + raw[4:],
        lambda raw: raw[:8] + b"[" + raw[9:],
        lambda raw: with_header([], header_of(raw)[1]),
        lambda raw: with_header({"x": 1}, header_of(raw)[1]),
        lambda raw: lie(raw, shape=[2**62, 2**62]),
        lambda raw: lie(raw, shape=[-64]),
        lambda raw: lie(raw, dtype="F31"),
        lambda raw: lie(raw, dtype="F64"),
        lambda raw: lie(raw, data_offsets=[0, 2**63]),
        lambda raw: lie(raw, data_offsets=[10, 5]),
        lambda raw: lie(raw, data_offsets=[0, 256]),
    ],
)
def test_a_safetensors_file_that_lies_is_refused_by_name(copied: Path, damage: Any) -> None:
    file = copied / "model.safetensors"
    file.write_bytes(damage(file.read_bytes()))
    refused_directory(copied, r"model\.safetensors: not a full safetensors file")


@settings(max_examples=200)
@given(st.data())
def test_a_safetensors_file_with_damaged_bytes_loads_or_is_refused(
    tiny: Tiny, tmp_path: Path, data: st.DataObject
) -> None:
    directory = tmp_path / "damaged"
    if not directory.exists():
        shutil.copytree(tiny("Llama"), directory)
    raw = bytearray((tiny("Llama") / "model.safetensors").read_bytes())
    size = int.from_bytes(raw[:8], "little")
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, size + 7))] = data.draw(st.sampled_from(b'0159{}[]":,-eFIB'))
    (directory / "model.safetensors").write_bytes(raw)
    message = ""
    try:
        load(directory)
    except NanollamaError as error:
        message = str(error)
    assert "\n" not in message


def test_a_missing_shard_is_named(tiny: Tiny, tmp_path: Path) -> None:
    oracle.load(tiny("Llama")).save_pretrained(tmp_path, max_shard_size="60KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[2]
    shard.unlink()
    refused_directory(tmp_path, rf"{shard.name}: this shard is missing")


@pytest.mark.parametrize(
    ("index", "named"),
    [
        (
            {"weight_map": {"x": "../../secret.safetensors"}},
            r"names '\.\./\.\./secret.safetensors'",
        ),
        ({"weight_map": {"x": "/etc/passwd"}}, "names '/etc/passwd'"),
        ({"weight_map": {"x": "..\\secret.safetensors"}}, "which is not a file beside it"),
        ({"weight_map": {"x": "model.bin"}}, "names 'model.bin'"),
        ({"weight_map": {"x": 7}}, "names '7'"),
        ({"weight_map": {}}, "has no weight_map"),
        ({"weight_map": ["model.safetensors"]}, "has no weight_map"),
        ({}, "has no weight_map"),
        ([], "holds a list"),
    ],
)
def test_an_index_that_lies_is_refused(copied: Path, index: Any, named: str) -> None:
    (copied / "model.safetensors.index.json").write_text(json.dumps(index))
    refused_directory(copied, rf"index\.json: .*{named}")


def test_one_safetensors_file_of_any_name_is_the_model(copied: Path) -> None:
    (copied / "model.safetensors").rename(copied / "weights.safetensors")
    assert open_checkpoint(copied).num_parameters > 0
    shutil.copy(copied / "weights.safetensors", copied / "adapter.safetensors")
    refused_directory(copied, "no model.safetensors or model.safetensors.index.json")


def test_side_files_with_odd_contents_do_no_harm(
    copied: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = copied / "generation_config.json"
    file.write_text(
        '{"eos_token_id": [1, null, "2", [3], 4, -1, true, 1e3, -7],'
        ' "temperature": "hot", "top_k": -1, "top_p": 7}'
    )
    (copied / "tokenizer_config.json").write_text(
        '{"bos_token": {"content": 3}, "eos_token": {"content": "</s>"}, "pad_token": 7,'
        ' "chat_template": [{"name": "a"}, "b", {"name": "default", "template": "c"}]}'
    )
    checkpoint = open_checkpoint(copied)
    assert checkpoint.text.eos_ids == {1, 4}
    assert checkpoint.sampling == {"top_k": -1}  # -1 is off
    values = {"temperature": "'hot'", "top_p": 7}
    odd = [f"{file}: {name} is {value}, which is left out" for name, value in values.items()]
    assert caplog.messages == odd
    assert checkpoint.text.special_tokens == {"eos_token": "</s>"}
    assert checkpoint.text.templates == {"default": "c"}


@pytest.mark.parametrize("declared", [-1, [-1], True, "</s>", {"a": 1}, [[[1]]], 10**30, 1.0])
def test_a_model_that_declares_no_end_runs_to_the_limit(declared: Any, copied: Path) -> None:
    for name in ("config.json", "generation_config.json"):
        file = copied / name
        old = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps({**old, "eos_token_id": declared}))
    (copied / "tokenizer_config.json").unlink()
    (copied / "tokenizer.json").write_text(
        (copied / "tokenizer.json").read_text().replace('"</s>"', '"<end>"')
    )
    llm = nanollama.LLM(copied)
    params = nanollama.SamplingParams(temperature=0, max_tokens=5, regex="[ab]+")
    answer = llm.complete(nanollama.GenerationRequest("fox", params=params))
    assert (len(answer.token_ids), answer.finish_reason) == (5, "length")


def test_templates_are_found_wherever_they_are_kept(copied: Path) -> None:
    (copied / "tokenizer_config.json").write_text('{"chat_template": "inline"}')
    assert open_checkpoint(copied).text.templates == {"default": "inline"}
    (copied / "chat_template.json").write_text('{"chat_template": "json"}')
    assert open_checkpoint(copied).text.templates == {"default": "json"}
    (copied / "chat_template.jinja").write_text("file")
    (copied / "additional_chat_templates").mkdir()
    (copied / "additional_chat_templates" / "rag.jinja").write_text("rag")
    assert open_checkpoint(copied).text.templates == {"default": "file", "rag": "rag"}
    (copied / "chat_template.jinja").write_bytes(b"\xff\xff")
    refused_directory(copied, r"chat_template\.jinja: not readable")


# ---- what is not a file --------------------------------------------------------------------------


def test_a_directory_named_like_a_gguf_is_a_directory(tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.mkdir()
    with pytest.raises(CheckpointError, match=r"x\.gguf: no config\.json"):
        open_checkpoint(path)


def test_a_path_that_leads_nowhere_is_not_found(tmp_path: Path) -> None:
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "dangling.gguf").symlink_to(tmp_path / "nothing")
    for name in ("none.gguf", "loop", "dangling.gguf"):
        with pytest.raises(nanollama.ModelNotFoundError, match=name):
            open_checkpoint(tmp_path / name)


def test_what_cannot_be_read_is_a_checkpoint_error(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(CheckpointError, match=r"pipe\.gguf"):
        open_checkpoint(tmp_path / "pipe.gguf")


def test_a_file_that_may_not_be_read_is_a_checkpoint_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(gguf_files.smallest()[0])
    path.chmod(0)
    if os.access(path, os.R_OK):  # root may read everything: let the system say no in its place

        def refuse(*args: Any, **kwargs: Any) -> None:
            raise PermissionError(13, "Permission denied", str(path))

        monkeypatch.setattr("nanollama.np.memmap", refuse)
    with pytest.raises(CheckpointError, match=r"x\.gguf: cannot be read: Permission denied"):
        open_checkpoint(path)


def test_nothing_in_a_gguf_is_copied_before_it_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.gguf"
    raw, _ = gguf_files.smallest()
    path.write_bytes(raw + bytes(50_000_000))  # a sparse tail stands for large weights
    assert_memory_below(5_000_000, lambda: open_checkpoint(path))
    assert path.read_bytes()[: len(raw)] == raw


def test_opening_reads_a_tensor_only_when_it_is_asked_for(copied: Path) -> None:
    tensors: Callable[[], Any] = lambda: open_checkpoint(copied).tensors  # noqa: E731
    weights = safetensors.torch.load_file(copied / "model.safetensors")
    assert {name: t.shape for name, t in tensors().items()} == {
        name: tuple(w.shape) for name, w in weights.items()
    }
    assert torch.equal(tensors()["model.norm.weight"].load(), weights["model.norm.weight"])
