"""Sections 5 and 6: LoRA adapters against PEFT."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import oracle
import peft
import pytest
import safetensors.torch
import torch
from oracle import Tiny

import nanollama
from nanollama import LLM, CheckpointError, GenerationRequest

Made = Callable[..., tuple[Path, Path, Any]]


@pytest.fixture
def made(tiny: Tiny, tmp_path: Path) -> Made:
    """made("Llama", {..}, r=4, ..) -> a checkpoint, an adapter for it, PEFT's model of both."""

    def make(name: str, overrides: dict[str, Any], **lora: Any) -> tuple[Path, Path, Any]:
        path, target = tiny(name, **overrides), tmp_path / "adapter"
        settings = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", **lora}
        torch.manual_seed(1)
        model = peft.get_peft_model(oracle.load(path), peft.LoraConfig(**settings))
        for part, parameter in model.named_parameters():
            if "lora_" in part:  # PEFT begins with B = 0
                torch.nn.init.normal_(parameter, std=0.1)
        model.save_pretrained(target)
        return path, target, model.eval()

    return make


LORA = {
    "plain": {},
    "rank-stabilized": {"use_rslora": True},
    "some": {"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]},
    "gaussian": {"init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "PiSSA": {"init_lora_weights": "pissa"},
    "PiSSA of ranks": {"init_lora_weights": "pissa", "rank_pattern": {"q_proj": 8}},
    "OLoRA": {"init_lora_weights": "olora", "use_rslora": True},
    "patterns": {"rank_pattern": {"q_proj": 8}, "alpha_pattern": {"layers.1.mlp.up_proj": 3}},
}


@pytest.mark.parametrize("kernels", ["torch", "native"])
@pytest.mark.parametrize("kind", LORA)
def test_an_adapted_model_is_that_of_peft(made: Made, kind: str, kernels: str) -> None:
    path, adapter, model = made("Llama", {}, **LORA[kind])
    llm, ids = LLM(path, adapter=adapter, kernels=kernels), oracle.random_ids(50)
    oracle.assert_same_model(llm, model, ids)
    assert (llm.logits(ids) - LLM(path).logits(ids)).std() > 0.1


@pytest.mark.parametrize(
    ("name", "overrides"),
    [
        ("Phi3", {"partial_rotary_factor": 0.5}),
        ("Glm4", {"head_dim": 16}),
        ("Cohere2", {"logit_scale": 0.5}),
        ("Gemma3Text", {"head_dim": 16}),
        ("NanoChat", {}),
    ],
)
def test_fused_and_reordered_matrices_are_adapted_too(
    made: Made, name: str, overrides: dict[str, Any]
) -> None:
    path, adapter, model = made(name, overrides)
    oracle.assert_same_model(LLM(path, adapter=adapter), model, oracle.random_ids(50))


@pytest.mark.parametrize("start", ["pissa", "olora"])
@pytest.mark.parametrize("name", ["Phi3", "Gemma3Text"])
def test_fused_and_reordered_matrices_lose_what_they_lost_in_peft(
    made: Made, name: str, start: str
) -> None:
    path, adapter, model = made(name, {"head_dim": 16}, init_lora_weights=start)
    oracle.assert_same_model(LLM(path, adapter=adapter), model, oracle.random_ids(50))


def test_an_adapter_that_peft_saved_answers_as_where_peft_loads_it(made: Made) -> None:
    path, adapter, _ = made("Llama", {}, init_lora_weights="pissa")
    loaded = peft.PeftModel.from_pretrained(oracle.load(path), adapter)
    oracle.assert_same_model(LLM(path, adapter=adapter), loaded.eval(), oracle.random_ids(50))


def test_what_only_float_weights_tell_is_not_guessed(made: Made, tmp_path: Path) -> None:
    path, adapter, _ = made("Llama", {}, init_lora_weights="pissa")
    file, _ = gguf_files.convert(path, tmp_path / "model.gguf", "Q8_0")
    with pytest.raises(CheckpointError, match=r"'pissa' took a part of .*use the float model"):
        LLM(file, adapter=adapter)


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_packed_weights_are_adapted(made: Made, tmp_path: Path, kernels: str) -> None:
    path, adapter, model = made("Llama", {})
    file, weights = gguf_files.convert(path, tmp_path / "model.gguf", "Q8_0")
    state = {
        name.replace("base_model.model.", "").replace(".base_layer", ""): parameter
        for name, parameter in model.named_parameters()
    }
    for name, weight in weights.items():
        state[name].data.copy_(weight)
    ids = oracle.random_ids(50)
    llm, expected = LLM(file, adapter=adapter, kernels=kernels), oracle.logits(model, ids)
    error = llm.logits(ids) - expected
    assert error.std() < (1e-4 if kernels == "torch" else 0.05) * expected.std()


@pytest.mark.parametrize("options", [{}, {"quantize": "q8"}, {"kernels": "torch"}])
def test_a_row_does_not_depend_on_its_neighbours(made: Made, options: dict[str, Any]) -> None:
    path, adapter, _ = made("Llama", {})
    llm, ids = LLM(path, adapter=adapter, prefill_chunk=9, **options), oracle.random_ids(40)
    whole = LLM(path, adapter=adapter, **options).logits(ids)
    assert torch.equal(llm.logits(ids), whole)
    alone = llm.complete(GenerationRequest(prompt=ids, params=oracle.GREEDY)).token_ids
    llm.engine.forget()
    prompts = [ids, ids[:5], ids[3:22]]
    deltas = llm.stream(GenerationRequest(prompt=p, params=oracle.GREEDY) for p in prompts)
    assert [d.token_id for d in deltas if d.index == 0] == alone


def test_a_modelfile_names_an_adapter(made: Made, tmp_path: Path) -> None:
    path, adapter, _ = made("Llama", {})
    (tmp_path / "Modelfile").write_text(f"FROM {path}\nADAPTER ./adapter\n")
    assert nanollama.read_modelfile(tmp_path / "Modelfile").adapter == str(adapter)


def edited(adapter: Path, **changes: Any) -> Path:
    settings = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, **changes}))
    return adapter


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora True"),
        ({"bias": "all"}, "bias 'all'"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save \['lm_head'\]"),
        ({"peft_type": "LOHA"}, "peft_type 'LOHA' is not supported; LORA is"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"alpha_pattern": {"(a+)+$": 3}}, "alpha_pattern .* plain names"),
        ({"alpha_pattern": [1]}, r"alpha_pattern is \[1\]"),
        *(
            ({"init_lora_weights": start}, f"init_lora_weights '?{start}'? changed .* convert")
            for start in ("pissa_niter_4", "corda", "loftq", "lora_ga", "unheard", 7)
        ),
    ],
)
def test_what_is_more_than_a_and_b_is_refused(
    made: Made, changes: dict[str, Any], named: str
) -> None:
    path, adapter, _ = made("Llama", {})
    with pytest.raises(CheckpointError, match=named):
        LLM(path, adapter=edited(adapter, **changes))


def test_an_adapter_that_does_not_fit_is_named(made: Made, tiny: Tiny, tmp_path: Path) -> None:
    _, adapter, _ = made("Llama", {})
    wide = tiny("Llama", hidden_size=128)
    with pytest.raises(CheckpointError, match=r"adapter: .*q_proj has A \(4, 64\) and B \(64, 4\)"):
        LLM(wide, adapter=adapter)
    short = tiny("Llama", num_hidden_layers=1)
    with pytest.raises(CheckpointError, match=r"it changes 'model\.layers\.1\..*does not have"):
        LLM(short, adapter=adapter)


def test_files_that_are_no_adapter_are_refused(made: Made, tiny: Tiny, tmp_path: Path) -> None:
    path, adapter, _ = made("Llama", {})
    tensors = safetensors.torch.load_file(adapter / "adapter_model.safetensors")
    for changed, named in (
        (
            {"base_model.model.lm_head.weight": torch.zeros(2, 2)},
            "lm_head.weight' is not supported",
        ),
        ({name: t for name, t in tensors.items() if "lora_B" in name}, "has a B and no A"),
    ):
        safetensors.torch.save_file(changed, adapter / "adapter_model.safetensors")
        with pytest.raises(CheckpointError, match=named):
            LLM(path, adapter=adapter)
    (adapter / "adapter_model.safetensors").unlink()
    (adapter / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"adapter_model\.bin is a pickle, which is never"):
        LLM(path, adapter=adapter)
    shutil.rmtree(adapter)
    with pytest.raises(CheckpointError, match="no such directory; an adapter is a directory with"):
        LLM(path, adapter=adapter)
    with pytest.raises(CheckpointError, match="not a directory"):
        LLM(path, adapter=path / "config.json")


def test_verify_compares_with_what_peft_makes_of_model_and_adapter(
    made: Made, capsys: pytest.CaptureFixture[str]
) -> None:
    path, adapter, _ = made("Llama", {})
    flags = ["verify", str(path), "--adapter", str(adapter)]
    assert nanollama.main(flags) == 0
    edited(adapter, lora_alpha="x")
    assert nanollama.main(flags) == 1
    assert "PEFT cannot load it" in capsys.readouterr().err
