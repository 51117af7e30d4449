"""Models as GGUF files: the same model after every step, with the gguf package as judge."""

from __future__ import annotations

import dataclasses
import errno
import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import oracle
import pytest
import safetensors.torch
import torch
from families import ALL, GGUF_ROWS
from gguf_files import ERRORS
from oracle import Tiny, rewritten

import nanollama
from nanollama import LLM, CheckpointError, NanollamaError, open_checkpoint, read_gguf
from nanollama_extras.files import conversion, gguf_writer, mixtures
from nanollama_extras.files.conversion import Plan, convert_to_gguf
from nanollama_extras.files.gguf_writer import value_bytes

# Families whose layouts of tensors have no inverse yet, or that GGUF does not know
REFUSED = "nanochat olmo_hybrid bitnet muse_glimmer nemotron_h falcon_h1".split()
# What GGUF cannot say of a family that it knows
SPECIAL = {
    "qwen2_moe": "experts",  # layers without experts
    "ernie4_5_moe-biased": "experts",
    "smollm3-listed": "layer_ropes",
    "gemma2": "attn_scale",
    "gemma3_text": "attn_scale",
    "gemma3_text-capped": "attn_scale",
    "phimoe": "own",
    "llama4_text": "windows",
    "llama4_text-plain": "layer_ropes",
    "starcoder2-unbiased": "qkv_bias",
    "deepseek_v2-lite": "qkv_bias",
    "glm4_moe_lite-odd-widths": "qkv_bias",
    "deepseek_v3-halves": "own",
    "gemma3n_text-three": "own",
    "lfm2-biased": "own",
    "granitemoehybrid-attention": "mamba2",
    "granitemoehybrid-nope": "mamba2",
    "qwen3_next-dense": "experts",
}
NOT_WRITTEN = ["ministral", *(name for name in ALL if name.startswith(tuple(REFUSED)))]
WRITTEN = {name: row for name, row in ALL.items() if name not in SPECIAL} | GGUF_ROWS
NO_ROWS = (*NOT_WRITTEN, "granitemoehybrid-attention")  # which llama.cpp names granite
WRITTEN = {n: row for n, row in WRITTEN.items() if n not in NO_ROWS}
WRITTEN = {n: row for n, row in WRITTEN.items() if not n.startswith(tuple(REFUSED))}


def made(tiny: Tiny, variant: str, rows: dict[str, Any] = WRITTEN) -> Path:
    name, overrides = rows[variant]
    return tiny(name, **overrides)


def converted(path: Path, target: Path, quantize: str | None = None, **plan: Any) -> Path:
    convert_to_gguf(Plan(open_checkpoint(path), quantize, **plan), target)
    return target


@pytest.mark.parametrize("variant", WRITTEN)
def test_a_converted_model_is_the_same(tiny: Tiny, tmp_path: Path, variant: str) -> None:
    path, ids = made(tiny, variant), oracle.random_ids(60)
    file = converted(path, tmp_path / "model.gguf")
    one, two = (LLM(source, kernels="torch") for source in (path, file))
    if any(one.config.windows) and not any(two.config.windows):
        ids = ids[:8]  # GGUF has no place for the window
    torch.testing.assert_close(two.logits(ids), one.logits(ids), rtol=0, atol=1e-4)
    text = "the quick  brown fox;\n\n I'm 123"
    assert two.encode(text) == one.encode(text)
    assert two.tokenizer.end_ids == one.tokenizer.end_ids


@pytest.mark.parametrize("variant", NOT_WRITTEN)
def test_a_family_that_cannot_be_written_is_refused_by_name(
    tiny: Tiny, tmp_path: Path, variant: str
) -> None:
    path = made(tiny, variant, ALL)
    kind = nanollama.open_checkpoint(path).config.model_type
    with pytest.raises(CheckpointError, match=kind):
        converted(path, tmp_path / "model.gguf")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("variant", SPECIAL)
def test_what_gguf_cannot_say_is_named(tiny: Tiny, tmp_path: Path, variant: str) -> None:
    with pytest.raises(CheckpointError, match=SPECIAL[variant]):
        converted(made(tiny, variant, ALL), tmp_path / "model.gguf")


@pytest.mark.parametrize("variant", ["llama", "qwen2", "mixtral", "phi3", "gemma3_text"])
def test_names_shapes_and_metadata_are_those_of_llama_cpps_converter(
    tiny: Tiny, tmp_path: Path, variant: str
) -> None:
    path = made(tiny, variant)
    ours = converted(path, tmp_path / "ours.gguf", "F32")
    theirs = gguf_files.convert(path, tmp_path / "theirs.gguf")[0]
    (values, tensors), (their_values, their_tensors) = map(read_gguf, (ours, theirs))
    shapes = [{name: t.shape for name, t in of.items()} for of in (tensors, their_tensors)]
    assert shapes[0] == shapes[1]
    for name, tensor in their_tensors.items():
        torch.testing.assert_close(tensors[name].load(), tensor.load(), rtol=0, atol=1e-6)
    arch = values["general.architecture"]
    for key, value in their_values.items():
        if key.startswith(f"{arch}.") and key in values:
            assert values[key] == pytest.approx(value), key
    again = gguf.GGUFReader(ours)
    assert {t.name for t in again.tensors} == tensors.keys()


def test_a_mistral_4_file_says_both_numbers_of_the_queries_scale(
    tiny: Tiny, tmp_path: Path
) -> None:
    values = read_gguf(converted(made(tiny, "mistral4"), tmp_path / "m.gguf"))[0]
    length = values["mistral4.rope.scaling.original_context_length"]
    assert values["mistral4.attention.temperature_scale"] == pytest.approx(0.1)
    assert values["mistral4.attention.temperature_length"] == length  # llama.cpp aborts without it


@pytest.mark.parametrize("quantize", mixtures.MIXTURES)
def test_every_mixture_gives_a_model_near_the_original(
    tiny: Tiny, tmp_path: Path, quantize: str
) -> None:
    path = tiny(hidden_size=256, intermediate_size=288, vocab_size=320)
    file = converted(path, tmp_path / "model.gguf", quantize)
    exact = read_gguf(converted(path, tmp_path / "exact.gguf"))[1]
    most = {**ERRORS, "F32": 0.0, "F16": 1e-3, "BF16": 4e-3}
    for name, tensor in read_gguf(file)[1].items():
        x, y = (conversion.floats(each).flatten() for each in (exact[name], tensor))
        assert (y - x).norm() <= most[tensor.kind] * x.norm()
    reader = gguf.GGUFReader(file)
    kinds = {t.name: t.tensor_type.name for t in reader.tensors}
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    file_type = reader.fields["general.file_type"].contents()
    assert file_type == mixtures.MIXTURES[quantize].file_type


@pytest.mark.parametrize("bits", ["q8", "q4"])
def test_q8_and_q4_are_those_of_a_model_that_is_packed_while_it_loads(
    tiny: Tiny, tmp_path: Path, bits: str
) -> None:
    path, ids = tiny(), oracle.random_ids(30)
    file = converted(path, tmp_path / "model.gguf", bits)
    expected = LLM(path, quantize=bits, kernels="torch").logits(ids)
    torch.testing.assert_close(LLM(file, kernels="torch").logits(ids), expected, rtol=0, atol=1e-5)


def test_a_gguf_file_keeps_its_metadata_and_what_stays(tiny: Tiny, tmp_path: Path) -> None:
    source = gguf_files.convert(tiny(), tmp_path / "source.gguf", "Q4_0")[0]
    same = converted(source, tmp_path / "same.gguf")
    other = converted(source, tmp_path / "other.gguf", "Q4_0")
    (values, _), (again, _), (_, mixed) = map(read_gguf, (source, same, other))
    assert values == again
    raw = {t.name: bytes(t.data) for t in gguf.GGUFReader(source).tensors}
    assert raw == {t.name: bytes(t.data) for t in gguf.GGUFReader(same).tensors}
    assert mixed["blk.0.ffn_up.weight"].kind == "Q4_0"
    found = {t.name: bytes(t.data) for t in gguf.GGUFReader(other).tensors}
    assert found["blk.0.ffn_up.weight"] == raw["blk.0.ffn_up.weight"]


def test_packed_weights_of_safetensors_are_written_without_loss(tmp_path: Path) -> None:
    for kind in ("Q4_0", "Q4_1", "Q8_0", "MXFP4"):
        x = torch.randn(8, 64, generator=torch.Generator().manual_seed(0)).numpy()
        raw = gguf.quantize(x, gguf.GGMLQuantizationType[kind])
        width = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]][1]
        packed = nanollama.REPACK[kind](torch.from_numpy(raw).reshape(8, 2, width))
        assert conversion.packed_kind(packed) == kind
        assert conversion.packed_blocks(packed).numpy().tobytes() == raw.tobytes()


def test_an_adapter_is_merged(tiny: Tiny, tmp_path: Path) -> None:
    from nanollama_extras.models.lora import open_adapter

    path, ids = tiny(), oracle.random_ids(20)
    adapter = save_adapter(tmp_path / "adapter", path)
    lora = open_adapter(adapter, open_checkpoint(path).config)
    expected = LLM(path, adapter=adapter, kernels="torch").logits(ids)
    plain = LLM(path, kernels="torch").logits(ids)
    assert not torch.allclose(plain, expected, atol=1e-2)
    source = gguf_files.convert(path, tmp_path / "source.gguf")[0]
    for model in (path, source):
        file = converted(model, tmp_path / f"{model.name}-out.gguf", "F32", adapter=lora)
        logits = LLM(file, kernels="torch").logits(ids)
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-3)


def save_adapter(target: Path, model: Path) -> Path:
    """A random adapter of all q_proj and down_proj."""
    target.mkdir()
    random = torch.Generator().manual_seed(3)
    weights = safetensors.torch.load_file(model / "model.safetensors")
    tensors = {}
    for name, weight in weights.items():
        if name.endswith(("q_proj.weight", "down_proj.weight")):
            stem = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{stem}.lora_A.weight"] = torch.randn(4, weight.shape[1], generator=random)
            tensors[f"{stem}.lora_B.weight"] = torch.randn(weight.shape[0], 4, generator=random)
    safetensors.torch.save_file(tensors, target / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "r": 4, "lora_alpha": 0.2, "target_modules": ["q_proj"]}
    (target / "adapter_config.json").write_text(json.dumps(settings))
    return target


def test_importance_weighs_every_matrix_and_lowers_the_error(tiny: Tiny, tmp_path: Path) -> None:
    for variant in ("llama", "mixtral"):
        plan = Plan(open_checkpoint(made(tiny, variant)), "Q4_0")
        plan = conversion.weighted(plan, "the quick brown fox " * 40, 4)
        matrices = {n for n, t in plan.checkpoint.tensors.items() if len(t.shape) == 2}
        routers = {n for n in matrices if n.endswith("mlp.gate.weight")}
        seen = {f"{name}.weight" for name in plan.importance}
        experts = {n for n in matrices if ".experts." in n}  # some of which no token went to
        assert matrices - routers - experts <= seen | {"model.embed_tokens.weight"}
        written = convert_to_gguf(plan, tmp_path / f"{variant}.gguf")
        assert 0 < written.gain.with_weights < 0.99 * written.gain.without


def test_nothing_is_left_after_an_error(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model.gguf"

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(conversion, "write_gguf", full)
        with pytest.raises(NanollamaError, match="No space left"):
            converted(tiny(), target)
    assert not list(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        usage = shutil._ntuple_diskusage(100, 90, 10)  # type: ignore[attr-defined]
        patch.setattr(gguf_writer.shutil, "disk_usage", lambda _: usage)
        with pytest.raises(NanollamaError, match="are free"):
            converted(tiny(), target)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_to_gguf(Plan(open_checkpoint(tiny())), target, done=interrupted)
    assert not list(tmp_path.iterdir())


def test_a_file_that_exists_stays_unless_forced(tiny: Tiny, tmp_path: Path) -> None:
    target = tmp_path / "model.gguf"
    target.write_text("mine")
    with pytest.raises(NanollamaError, match="exists"):
        converted(tiny(), target)
    assert target.read_text() == "mine"
    convert_to_gguf(Plan(open_checkpoint(tiny())), target, force=True)
    assert LLM(target).config.n_layers == 2


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (True, "BOOL"),
        (3, "UINT32"),
        (-3, "INT32"),
        (2**40, "UINT64"),
        (0.5, "FLOAT32"),
        ("é", "STRING"),
        ([1, 2], "INT32"),
        ([0.5, 1], "FLOAT32"),
        (["a", ""], "STRING"),
        ([True, False], "BOOL"),
    ],
)
def test_a_value_is_read_back(tmp_path: Path, value: Any, kind: str) -> None:
    file = tmp_path / "values.gguf"
    with open(file, "wb") as out:
        metadata = {"general.architecture": value_bytes("x"), "x.value": value_bytes(value)}
        gguf_writer.write_gguf(out, metadata, [], lambda _: None)
    field = gguf.GGUFReader(file).fields["x.value"]
    assert field.types[-1].name == kind
    assert read_gguf(file)[0]["x.value"] == value
    assert gguf_writer.copied_values(file) == metadata


def test_a_template_goes_with_the_model(tiny: Tiny, tmp_path: Path) -> None:
    path = rewritten(tiny(), tmp_path / "model", dict)
    (path / "chat_template.jinja").write_text("{{ messages[0].content }}!")
    (path / "additional_chat_templates").mkdir()
    (path / "additional_chat_templates" / "tool_use.jinja").write_text("tools")
    text = open_checkpoint(converted(path, tmp_path / "a.gguf")).text
    assert dict(text.templates) == {"default": "{{ messages[0].content }}!", "tool_use": "tools"}
    other = open_checkpoint(converted(path, tmp_path / "b.gguf", template="own")).text
    assert other.templates["default"] == "own"


# ---- mixtures ------------------------------------------------------------------------------------

LLAMA_8B = mixtures.Shape(n_layers=32, gqa=4, n_experts=0, arch="llama", is_tied=False)


def layers(num: int, cols: int = 4096) -> dict[str, tuple[int, ...]]:
    parts = "attn_q attn_k attn_v attn_output ffn_gate ffn_up ffn_down".split()
    found = {f"blk.{i}.{part}.weight": (64, cols) for i in range(num) for part in parts}
    found |= {f"blk.{i}.attn_norm.weight": (cols,) for i in range(num)}
    return found | {"token_embd.weight": (1000, cols), "output.weight": (1000, cols)}


@pytest.mark.parametrize(
    ("name", "counts"),
    [  # as llama-quantize counts them for Llama 3 8B
        ("Q4_K_M", {"Q4_K": 193, "Q6_K": 33}),
        ("Q4_K_S", {"Q4_K": 217, "Q5_K": 8, "Q6_K": 1}),
        ("Q5_K_M", {"Q5_K": 193, "Q6_K": 33}),
        ("Q3_K_M", {"Q3_K": 129, "Q4_K": 92, "Q5_K": 4, "Q6_K": 1}),
        ("Q2_K", {"Q2_K": 129, "Q3_K": 64, "Q4_K": 32, "Q6_K": 1}),
        ("Q6_K", {"Q6_K": 226}),
        ("Q8_0", {"Q8_0": 226}),
        ("Q4_0", {"Q4_0": 225, "Q6_K": 1}),
        ("F16", {"F16": 226}),
    ],
)
def test_mixtures_are_those_of_llama_cpp(name: str, counts: dict[str, int]) -> None:
    kinds = mixtures.kinds(name, layers(32), LLAMA_8B)
    found: dict[str, int] = {}
    for kind in kinds.values():
        found[kind] = found.get(kind, 0) + 1
    assert found.pop("F32") == 32
    assert found == counts


def test_rows_that_256_does_not_divide_get_another_type() -> None:
    model = dataclasses.replace(LLAMA_8B, n_layers=2, gqa=3, is_tied=True)
    shapes = layers(2, 576)
    del shapes["output.weight"]
    kinds = mixtures.kinds("Q4_K_M", shapes, model)
    assert kinds["blk.0.attn_q.weight"] == "Q5_0"
    assert kinds["token_embd.weight"] == "Q8_0"
    assert set(mixtures.kinds("Q4_0", layers(1, 100), LLAMA_8B).values()) == {"F16", "F32"}


def test_experts_routers_and_eight_of_them() -> None:
    model = dataclasses.replace(LLAMA_8B, n_layers=1, n_experts=8)
    shapes = layers(1) | {
        "blk.0.ffn_gate_inp.weight": (8, 4096),
        "blk.0.ffn_down_exps.weight": (8, 64, 4096),
    }
    kinds = mixtures.kinds("Q4_K_S", shapes, model)
    assert kinds["blk.0.ffn_gate_inp.weight"] == "F32"
    assert kinds["blk.0.attn_v.weight"] == kinds["blk.0.attn_k.weight"] == "Q8_0"
    assert kinds["blk.0.attn_output.weight"] == "Q5_K"
    assert kinds["blk.0.ffn_down_exps.weight"] == "Q4_K"
