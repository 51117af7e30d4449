"""`verify`: what is the same model passes, what is not fails and says where."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import nanochat_files
import pytest
import safetensors.torch
import sentencepiece
import torch
import transformers

import nanollama
from nanollama_extras.commands import verify as verify_command

SAME = [{"place": None, "token": None}] * 2
TEMPLATE = "{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"


@pytest.fixture
def model(tiny: Callable[..., Path], tmp_path: Path) -> Path:
    """A tiny Llama with a chat template, to be damaged."""
    path = shutil.copytree(tiny("Llama", num_hidden_layers=3), tmp_path / "model")
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return path


def verify(capsys: pytest.CaptureFixture[str], *flags: Any) -> tuple[int, dict[str, Any]]:
    code = nanollama.main(["verify", *map(str, flags), "--json"])
    return code, json.loads(capsys.readouterr().out)


def change_tensor(path: Path, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    file = path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    tensors[name] = change(tensors[name])
    safetensors.torch.save_file(tensors, file, {"format": "pt"})


@pytest.fixture
def reference(model: Path, tmp_path: Path) -> Path:
    path = tmp_path / "reference.safetensors"
    assert nanollama.main(["verify", str(model), "--save-reference", str(path)]) == 0
    return path


def test_a_model_passes_and_the_figures_are_those_of_float32(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = verify(capsys, model)
    assert code == 0
    assert found["passed"]
    assert found["texts"] == found["chats"] == []
    assert found["num_chats"] == 3
    assert found["error"] < 1e-3
    assert 0 <= found["divergence"] < 1e-6
    assert found["agreement"] == 1
    assert found["layer_error"] < 1e-4
    assert found["first"] == SAME
    assert [g["same"] for g in found["greedy"]] == [16, 16]


@pytest.mark.parametrize("name", ["Qwen3", "Gemma2", "Granite", "Olmo2", "NanoChat", "GptOss"])
def test_families_pass(
    name: str, tiny: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    code, found = verify(capsys, tiny(name))
    assert (code, found["first"]) == (0, SAME)
    assert found["layer_error"] < 1e-4


def test_a_saved_reference_is_small_and_needs_no_transformers(
    model: Path,
    reference: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert reference.stat().st_size < 500_000
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert nanollama.main(["verify", str(model), "--reference", str(reference)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1:3] == [
        "tokenization   12 of 12 texts equal",
        "template       3 of 3 conversations equal",
    ]
    assert lines[-1].startswith("pass ")
    assert nanollama.main(["verify", str(model)]) == 1
    assert capsys.readouterr().err.endswith(
        'run: pip install ".[verify]", or give --reference FILE, made where it is installed\n'
    )


@pytest.mark.parametrize("kernels", ["native", "torch"])
def test_the_layer_and_token_that_first_differ_are_named(
    kernels: str, model: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "model.layers.1.self_attn.o_proj.weight"
    change_tensor(model, name, lambda w: w * 1.5)
    code, found = verify(capsys, model, "--reference", reference, "--kernels", kernels)
    assert code == 1
    assert not found["passed"]
    assert [first["place"] for first in found["first"]] == ["layer 1"] * 2
    assert all(first["token"] is not None for first in found["first"])
    assert found["texts"] == []
    assert nanollama.main(["verify", str(model), "--reference", str(reference)]) == 1
    assert "prompt 0 first differs at layer 1, token " in capsys.readouterr().out


def test_a_model_of_nans_fails(
    model: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    change_tensor(model, "model.layers.1.mlp.down_proj.weight", lambda w: w * torch.nan)
    assert nanollama.main(["verify", str(model), "--reference", str(reference)]) == 1
    assert "prompt 0 first differs at layer 1, token 0" in capsys.readouterr().out


def test_an_embedding_that_differs_and_its_token_are_named(
    model: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about, _ = verify_command.read_reference(reference)
    ids = about["prompts"][0]
    rare = max(set(ids), key=ids.index)  # the id that comes latest

    def change(weight: torch.Tensor) -> torch.Tensor:
        weight[rare] += 1
        return weight

    change_tensor(model, "model.embed_tokens.weight", change)
    _, found = verify(capsys, model, "--reference", reference)
    assert found["first"][0] == {"place": "embedding", "token": ids.index(rare)}


LAYER_1 = "model.layers.1."
DAMAGED = [
    ("Llama", "model.embed_tokens.weight", "embedding"),
    ("Llama", "model.layers.0.input_layernorm.weight", "layer 0"),
    ("Llama", LAYER_1 + "self_attn.v_proj.weight", "layer 1"),
    ("Llama", LAYER_1 + "mlp.down_proj.weight", "layer 1"),
    ("Llama", "model.norm.weight", "final norm"),
    ("Llama", "lm_head.weight", "head"),
    ("Qwen2", LAYER_1 + "self_attn.q_proj.bias", "layer 1"),
    ("Gemma2", LAYER_1 + "post_feedforward_layernorm.weight", "layer 1"),
    ("Gemma2", "model.norm.weight", "final norm"),
    ("Starcoder2", "model.norm.bias", "final norm"),
    ("NanoChat", LAYER_1 + "mlp.fc2.weight", "layer 1"),
    ("NanoChat", "lm_head.weight", "head"),
    ("Cohere2", "model.norm.weight", "final norm"),
    ("GptOss", LAYER_1 + "self_attn.sinks", "layer 1"),
]


@pytest.mark.parametrize("kernels", ["native", "torch"])
@pytest.mark.parametrize(("family", "name", "place"), DAMAGED)
def test_the_place_of_the_damage_is_named(
    family: str,
    name: str,
    place: str,
    kernels: str,
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Layer 1 is the last one."""
    path = shutil.copytree(tiny(family), tmp_path / "damaged")
    change_tensor(path, name, lambda weight: weight * 1.7 + 0.1)
    file = tmp_path / "reference.safetensors"
    assert nanollama.main(["verify", str(tiny(family)), "--save-reference", str(file)]) == 0
    code, found = verify(capsys, path, "--reference", file, "--kernels", kernels)
    assert (code, [first["place"] for first in found["first"]]) == (1, [place] * 2)


def test_a_rope_that_differs_is_its_first_layers(
    model: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 100.0
    (model / "config.json").write_text(json.dumps(config))
    _, found = verify(capsys, model, "--reference", reference)
    assert [first["place"] for first in found["first"]] == ["layer 0"] * 2


def test_a_reference_of_an_older_release_ends_with_the_last_layers_input(
    model: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about, tensors = verify_command.read_reference(reference)
    tensors |= {f"{i}.streams": tensors[f"{i}.streams"][:3] for i in range(2)}
    reference.write_bytes(safetensors.torch.save(tensors, {"nanollama": json.dumps(about)}))
    code, found = verify(capsys, model, "--reference", reference)
    assert (code, found["first"]) == (0, SAME)


def test_another_tokenizer_or_template_fails(
    model: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = model / "tokenizer.json"
    settings = json.loads(file.read_text())
    settings["model"]["merges"] = settings["model"]["merges"][1:]
    file.write_text(json.dumps(settings))
    (model / "chat_template.jinja").write_text(TEMPLATE.replace("] ", "]"))
    code, found = verify(capsys, model, "--reference", reference)
    assert code == 1
    assert found["texts"]
    assert len(found["chats"]) == 3
    assert found["first"] == SAME  # the model is the same


def test_the_side_that_deviates_from_sentencepiece_is_named(
    model: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    about, tensors = verify_command.read_reference(reference)
    texts, right = verify_command.VERIFY_TEXTS, about["texts"]
    about["witness"] = [("SentencePiece", ids) for ids in right]
    about["texts"] = [[*right[0], 5], *right[1:]]  # transformers alone
    edited = model.with_name("edited.safetensors")

    def outcome() -> tuple[int, dict[str, Any]]:
        raw = safetensors.torch.save(tensors, {"nanollama": json.dumps(about)})
        edited.write_bytes(raw)
        return verify(capsys, model, "--reference", edited)

    code, found = outcome()
    assert (code, found["texts"]) == (0, [])
    assert found["deviates"] == {texts[0]: "transformers deviates from SentencePiece"}
    lines = "\n".join(verify_command.verify_lines(found, verify_command.TOLERANCES["float32"]))
    assert f"{len(texts) - 1} of {len(texts)} texts equal" in lines
    assert "differs: 'Hello, world!' (transformers deviates from SentencePiece)" in lines
    about["witness"][0] = "SentencePiece", about["texts"][0]  # as transformers has it
    about["texts"][1], about["witness"][1] = [5], None
    code, found = outcome()
    assert (code, found["texts"]) == (1, [texts[0], texts[1]])
    assert found["deviates"] == {texts[0]: "nanollama deviates from SentencePiece"}


def test_the_second_opinion_is_that_of_sentencepiece_or_the_tokenizers_library(
    model: Path, tmp_path: Path
) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    opinions = verify_command.witness_ids(tokenizer, model)
    for text, opinion in zip(verify_command.VERIFY_TEXTS, opinions):
        expected = None if "<s>" in text else ("tokenizer.json", tokenizer(text).input_ids)
        assert opinion == expected
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 9),
        model_prefix=str(tmp_path / "tokenizer"),
        model_type="bpe",
        vocab_size=300,
        byte_fallback=True,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    opinions = verify_command.witness_ids(tokenizer, tmp_path)
    assert opinions[0] == ("SentencePiece", theirs.encode(verify_command.VERIFY_TEXTS[0]))
    assert verify_command.witness_ids(tokenizer, tmp_path / "nothing") == []


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--quantize", "q8"], "q8"),
        (["--quantize", "q4"], "q4"),
        (["--dtype", "bfloat16"], "16 bits"),
        (["--kv-dtype", "q8"], "16 bits"),
        ([], "float32"),
    ],
)
def test_each_precision_has_its_own_tolerance(
    flags: list[str], name: str, model: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nanollama.main(["verify", str(model), "--reference", str(reference), *flags])
    assert capsys.readouterr().out.splitlines()[-1].endswith(verify_command.TOLERANCES[name].reason)


@pytest.mark.parametrize(("kind", "name"), [("F32", "float32"), ("Q8_0", "q8"), ("Q4_1", "q4")])
def test_a_gguf_file_is_compared_with_the_reference_of_its_original(
    kind: str, name: str, model: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = gguf_files.convert(model, model / "model.gguf", kind)
    code, found = verify(capsys, file, "--reference", reference, "--tokenizer", model)
    assert found["texts"] == found["chats"] == []
    assert (found["error"] < 1e-3) == (kind == "F32")
    assert code == (kind == "Q4_1")  # random weights are not worth much in 4 bits
    nanollama.main(["verify", str(file), "--reference", str(reference)])
    assert verify_command.TOLERANCES[name].reason in capsys.readouterr().out


def test_a_gguf_file_is_compared_with_what_transformers_makes_of_it(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = gguf_files.convert(model, model / "model.gguf", "Q8_0")
    flags = (file, "--tokenizer", model)
    code, found = verify(capsys, *flags, "--kernels", "torch")
    assert code == 0
    assert found["error"] < 1e-3
    code, found = verify(capsys, *flags)
    assert 1e-3 < found["error"] < verify_command.TOLERANCES["packed"].error


def test_what_is_no_reference_is_one_line(
    model: Path,
    reference: Path,
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    broken = tmp_path / "broken"
    broken.write_bytes(reference.read_bytes()[:1000])
    plain = model / "model.safetensors"
    other = tiny("Llama", vocab_size=400)
    for path, file, message in (
        (model, broken, "not a saved reference"),
        (model, plain, "not a saved reference"),
        (model, tmp_path / "none", "not a saved reference"),
        (tiny("Llama", hidden_size=32), reference, "of another model"),
        (other, reference, ""),
    ):
        capsys.readouterr()
        assert nanollama.main(["verify", str(path), "--reference", str(file)]) == 1
        error = capsys.readouterr().err
        assert message in error
        assert error.count("\n") <= 1


def test_a_reference_that_cannot_be_written_is_one_line(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert nanollama.main(["verify", str(model), "--save-reference", str(model / "no/file")]) == 2
    assert "its directory does not exist or is not writable" in capsys.readouterr().err


def test_nanochats_own_files_need_a_reference(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = nanochat_files.save(tmp_path)
    assert nanollama.main(["verify", str(path)]) == 1
    assert "transformers does not read nanochat's own files" in capsys.readouterr().err


def test_what_transformers_cannot_load_is_said(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((model / "config.json").read_text())
    (model / "config.json").write_text(json.dumps({**config, "model_type": "unheard-of"}))
    assert nanollama.main(["verify", str(model)]) == 1
    assert "cannot load this" in capsys.readouterr().err
