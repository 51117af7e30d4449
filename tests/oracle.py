"""transformers as the judge of logits and greedy tokens, and the kinds of model it judges."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

import nanollama

GREEDY = nanollama.SamplingParams(temperature=0, repeat_penalty=1, max_tokens=24, ignore_eos=True)


Tiny = Callable[..., Path]

YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e4,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
KINDS = ["sliding_attention", "full_attention"]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "llama-biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-head_dim": ("Llama", {"head_dim": 24}),
    "llama-mha": ("Llama", {"num_key_value_heads": 4}),
    "llama-mqa": ("Llama", {"num_key_value_heads": 1}),
    "llama-eps-theta": (
        "Llama",
        {"rms_norm_eps": 0.1, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}},
    ),
    "llama-llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "llama-linear": (
        "Llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}},
    ),
    "llama-yarn": ("Llama", {"rope_parameters": YARN}),
    "llama-yarn-full-context": (
        "Llama",
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
    ),
    "llama-yarn-beta": ("Llama", {"rope_parameters": {**YARN, "beta_fast": 8, "beta_slow": 2}}),
    "llama-yarn-attention_factor": (
        "Llama",
        {"rope_parameters": {**YARN, "attention_factor": 1.3}},
    ),
    "llama-yarn-mscale": (
        "Llama",
        {"rope_parameters": {**YARN, "mscale": 0.7, "mscale_all_dim": 1.4}},
    ),
    "llama-yarn-no-truncate": (
        "Llama",
        {"rope_parameters": {**YARN, "original_max_position_embeddings": 4096, "truncate": False}},
    ),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral-window": ("Mistral", {"sliding_window": 8, "head_dim": 32}),
    "qwen2": ("Qwen2", {}),
    "qwen2-window": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
    ),
    "qwen2-window-off": (
        "Qwen2",
        {"use_sliding_window": False, "sliding_window": 8, "max_window_layers": 0},
    ),
    "qwen2-layer_types": (
        "Qwen2",
        {"use_sliding_window": True, "sliding_window": 8, "layer_types": KINDS},
    ),
    "qwen2-tied-yarn": ("Qwen2", {"tie_word_embeddings": True, "rope_parameters": YARN}),
    "qwen3": ("Qwen3", {"head_dim": 32}),
    "qwen3-biases": ("Qwen3", {"head_dim": 16, "attention_bias": True}),
    "qwen3-window": (
        "Qwen3",
        {
            "head_dim": 16,
            "use_sliding_window": True,
            "sliding_window": 5,
            "layer_types": KINDS[::-1],
        },
    ),
}


def load(path: Path) -> Any:
    """transformers' model of a checkpoint directory, in float32 and with its plainest attention."""
    auto: Any = transformers.AutoModelForCausalLM
    config = json.loads((path / "config.json").read_text())
    if config["model_type"] == "mistral4":
        auto = transformers.Mistral4ForCausalLM
    if "text_config" in config:
        auto = transformers.AutoModelForMultimodalLM
    options: Any = {"dtype": torch.float32, "attn_implementation": "eager"}
    model = auto.from_pretrained(path, **options).eval()
    its_module = sys.modules[type(model).__module__]
    if rule := getattr(its_module, "torch_recurrent_gated_delta_rule", None):
        its_module.torch_chunk_gated_delta_rule = rule  # type: ignore[attr-defined]  # is exacter
    return model


@torch.inference_mode()
def logits(model: Any, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]), use_cache=False).logits[0]


def greedy(model: Any, ids: list[int], count: int = 24) -> list[int]:
    """The likeliest tokens one after the other, each from a forward pass over everything."""
    ids = list(ids)
    for _ in range(count):
        ids.append(int(logits(model, ids)[-1].argmax()))
    return ids[-count:]


def random_ids(count: int, n_vocab: int = 320, seed: int = 0) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(n_vocab, (count,), generator=generator).tolist()


def assert_same_model(llm: nanollama.LLM, model: Any, ids: list[int], atol: float = 1e-4) -> None:
    """Logits of every position within `atol`, and 24 greedy tokens equal."""
    expected = logits(model, ids)
    assert expected.std() > 0.5  # logits too small would hide a difference
    torch.testing.assert_close(llm.logits(ids), expected, rtol=0, atol=atol)
    request = nanollama.GenerationRequest(prompt=ids, params=GREEDY)
    assert llm.complete(request).token_ids == greedy(model, ids)


def matrices(decoder: nanollama.Decoder) -> list[Any]:
    """Every weight matrix of a decoder."""
    found = [decoder.embed_tokens, decoder.lm_head]
    for layer in decoder.layers:
        mlps = [*getattr(layer.mlp, "experts", ()), getattr(layer.mlp, "shared_expert", None)]
        for block in filter(None, (layer.self_attn, layer.mlp, *mlps)):
            found += [value for name, value in vars(block).items() if name.endswith("_proj")]
    return [part for projection in found for part in projection.parts]


def rewritten(path: Path, target: Path, edit: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy of a checkpoint whose config.json went through `edit`."""
    shutil.copytree(path, target)
    config = json.loads((target / "config.json").read_text())
    edit(config)
    (target / "config.json").write_text(json.dumps(config))
    return target
