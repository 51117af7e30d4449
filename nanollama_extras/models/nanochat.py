"""nanochat: the checkpoints that it writes (model_NNNNNN.pt), and its ways around the layers.

Adds       an opener of .pt files, and a decoder with gated value embeddings, a scaled residual
           stream that gets the embedding again, smear (some of the previous token's embedding)
           and backout (the middle layer's output is subtracted at the end).
Seam       OPENERS: `open_checkpoint` for the suffix .pt. The row "nanochat" of the families names
           `NanochatDecoder`.
Imports    nanollama_extras.files.vocabularies, for the template and the bos token that belong to
           nanochat's tokenizer.
Source     https://github.com/karpathy/nanochat (nanochat/gpt.py, dev/LOG.md)
Remove     delete this file; a .pt file then says that it needs it, as does model_type nanochat.
"""

from __future__ import annotations

import dataclasses
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import nanollama
from nanollama import (
    Attention,
    Batch,
    Checkpoint,
    CheckpointError,
    Decoder,
    DecoderLayer,
    KVCache,
    ModelConfig,
    Norm,
    Rotation,
    TensorSource,
    Weights,
    excerpt,
)
from nanollama_extras.files.vocabularies import NANOCHAT_BOS, NANOCHAT_TEMPLATE

# ---- the decoder ---------------------------------------------------------------------------------


def optional_tensor(weights: Weights, name: str, *shape: int) -> Tensor | None:
    """A float tensor that only some checkpoints have; 0 in its shape stands for any size."""
    if (tensor := weights.tensors.get(name)) is None:
        return None
    return weights.take(name, *(size or there for size, there in zip(shape, tensor.shape)))


class ValueAttention(Attention):
    """Attention whose values get each token's own vector, through a gate for each head."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, index: int) -> None:
        super().__init__(config, weights, prefix, index)
        Hkv, D = config.n_kv_heads, config.head_dim
        self.value_gate = optional_tensor(weights, f"{prefix}.value_gate.weight", Hkv, 0)
        if self.value_gate is not None:
            outputs = {f"model.value_embeds.{index}": config.n_vocab}
            self.value_embed = weights.linear(outputs, Hkv * D, is_table=True)

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None,
        rotation: Rotation,
        cache: KVCache,
        batch: Batch,
        residual: Tensor | None,
    ) -> Tensor:
        if self.value_gate is None or norm is None:
            return super().__call__(x, norm, rotation, cache, batch, residual)
        qkv = self.qkv_proj(x, norm=norm)  # (N, (H + 2 Hkv) D)
        columns = norm(x)[:, None, : self.value_gate.shape[1]]
        gate = (columns * self.value_gate).sum(2).sigmoid()  # (N, Hkv)
        value = self.value_embed.rows(batch.token_ids).unflatten(1, (-1, self.head_dim))
        qkv[:, -self.sizes[2] * self.head_dim :] += (gate.unsqueeze(2) * value).flatten(1)
        return self.o_proj(cache.attend(self, qkv, rotation, batch), residual=residual)


class NanochatLayer(DecoderLayer):
    mixer = ValueAttention


class NanochatDecoder(Decoder):
    """Decoder with nanochat's additions, each where the checkpoint has its tensors."""

    layer = NanochatLayer

    def __init__(self, config: ModelConfig, weights: Weights, kv_dtype: str = "auto") -> None:
        L = config.n_layers
        self.resid_lambdas = optional_tensor(weights, "model.resid_lambdas", L)
        self.x0_lambdas = optional_tensor(weights, "model.x0_lambdas", L)
        self.backout_lambda = optional_tensor(weights, "model.backout_lambda", 1)
        self.smear_gate = optional_tensor(weights, "model.smear_gate.weight", 1, 0)
        self.smear_lambda = optional_tensor(weights, "model.smear_lambda", 1)
        self.is_recordable = self.smear_gate is None
        super().__init__(config, weights, kv_dtype)
        for rope in self.ropes:  # nanochat turns the other way
            rope.freqs = -rope.freqs

    def new_cache(self, num_slots: int, most_new: int = 0, **saving: Any) -> KVCache:
        cache = super().new_cache(num_slots, most_new)
        return (
            cast("KVCache", SmearCache(cache, num_slots)) if self.smear_gate is not None else cache
        )

    def hidden(self, batch: Batch, cache: KVCache) -> Tensor:
        config, rotations = self.config, batch.rotations or self.rotations(batch, cache)
        x = self.norm(self.embed_tokens.rows(batch.token_ids, config.embed_scale))  # (N, C)
        start = middle = x = self.smear(x, batch, cache)
        for i, layer in enumerate(self.layers):
            if self.resid_lambdas is not None and self.x0_lambdas is not None:
                x = self.resid_lambdas[i] * x + self.x0_lambdas[i] * start
            x = layer(x, rotations[config.layer_ropes[i]], cache, batch)
            middle = x if i == len(self.layers) // 2 else middle
        return x if self.backout_lambda is None else x - self.backout_lambda * middle

    def smear(self, x: Tensor, batch: Batch, cache: KVCache) -> Tensor:
        """Embeddings (N, C), each with some of the embedding before it."""
        if self.smear_gate is None or self.smear_lambda is None:
            return x
        before = cast("SmearCache", cache).previous_tokens(batch)
        columns = x[:, : self.smear_gate.shape[1]]
        gate = self.smear_lambda * (columns * self.smear_gate).sum(1, keepdim=True).sigmoid()
        gate = gate * (before >= 0).unsqueeze(1)  # the first token of a text has none before it
        return x + gate * self.norm(self.embed_tokens.rows(before.clamp_min(0)))


class SmearCache:
    """A KVCache that also keeps the token ids of each slot: the first token of a span needs the
    token before it."""

    def __init__(self, cache: KVCache, num_slots: int) -> None:
        self.cache = cache
        self.tokens: list[list[int]] = [[] for _ in range(num_slots)]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def start(self, source: int, target: int, num_tokens: int, token_ids: list[int]) -> None:
        """KVCache.start, with the token ids."""
        self.cache.start(source, target, num_tokens, token_ids)
        self.tokens[target] = self.tokens[source][:num_tokens]

    def previous_tokens(self, batch: Batch) -> Tensor:
        """The id (N,) before each of the batch's tokens, which are then kept; -1 for the first
        token of a text."""
        before = batch.token_ids.roll(1)
        for span in batch.spans:
            tokens, rows = self.tokens[span.slot], slice(span.row, span.row + span.num_new)
            before[span.row] = tokens[span.start - 1] if span.start else -1
            tokens[span.start :] = batch.token_ids[rows].tolist()
        return before


# ---- checkpoints ---------------------------------------------------------------------------------

# nanochat's name of a tensor, without the layer prefix -> Hugging Face's name
TENSOR_NAMES = {
    "transformer.wte": "model.embed_tokens",
    "transformer.h": "model.layers",
    "attn.c_q": "self_attn.q_proj",
    "attn.c_k": "self_attn.k_proj",
    "attn.c_v": "self_attn.v_proj",
    "attn.c_proj": "self_attn.o_proj",
    "attn.ve_gate": "self_attn.value_gate",
    "mlp.c_fc": "mlp.up_proj",
    "mlp.c_proj": "mlp.down_proj",
}
# Constants that nanochat has in its code and not in its checkpoints. Parameters identify the
# version: the columns of the gates of value embeddings (0 without), and whether there is a backout.
CONSTANTS: dict[tuple[int, bool], dict[str, Any]] = {
    (0, False): {"rope_base": 1e4, "softcap": 15.0, "qk_scale": 1.0, "short": (2, 1)},
    (32, False): {"rope_base": 1e4, "qk_scale": 1.0, "value_scale": 2.0, "short": (2, 1)},
    (12, False): {"rope_base": 1e5, "qk_scale": 1.15, "value_scale": 3.0, "short": (3, 128)},
    (12, True): {"rope_base": 1e5, "qk_scale": 1.2, "value_scale": 3.0, "short": (4, 128)}
    | {"softcap": 15.0},
}
COUNTS = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
KNOWN_KEYS = {*COUNTS, "window_pattern", "short_seq_len", "softcap"}
SAMPLING = {"temperature": 0.6, "top_k": 50, "top_p": 1.0, "repeat_penalty": 1.0}


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model_NNNNNN.pt with the meta_NNNNNN.json beside it and the tokenizer directory above.

    Raises CheckpointError."""
    beside = path.with_name(path.name.replace("model", "meta", 1)).with_suffix(".json")
    if not beside.exists():
        raise CheckpointError(
            f"{path}: a .pt file is run as nanochat writes it only; no {beside.name} is beside it"
        )
    tensors, meta = read_tensors(path), nanollama.read_json(beside)
    try:
        with nanollama.errors_about(f"{beside}: model_config"):
            raw = hugging_face_config(dict(meta["model_config"]), tensors)
    except (TypeError, ValueError, LookupError, ArithmeticError) as error:
        raise CheckpointError(f"{beside}: its model_config cannot be used: {error}") from None
    directory = next((d for up in path.parents if (d := up / "tokenizer").is_dir()), None)
    text = dataclasses.replace(
        nanollama.open_text(directory) if directory else nanollama.TextFiles(str(path)),
        templates={"default": NANOCHAT_TEMPLATE},
        special_tokens={"bos_token": NANOCHAT_BOS, "eos_token": NANOCHAT_BOS},
    )
    model = nanollama.model_config(raw, str(beside))
    return Checkpoint(path, "nanochat", model, tensors, text, SAMPLING)


def read_tensors(path: Path) -> dict[str, TensorSource]:
    """The tensors of a .pt file, read by torch's loader for files of tensors only. Raises
    CheckpointError."""
    try:  # torch before 1.6 wrote files that are not zip files and cannot be mapped
        is_zip = zipfile.is_zipfile(path)
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError:  # its text recommends to run the file's code
        raise CheckpointError(f"{path}: holds more than tensors, and is not loaded") from None
    except Exception as error:  # a damaged file may raise any error
        raise CheckpointError(
            f"{path}: no file of tensors: {nanollama.first_line(error)}"
        ) from None
    pattern = re.compile("|".join(rf"\b{re.escape(name)}\b" for name in TENSOR_NAMES))
    tensors = {}
    for key, tensor in state.items() if isinstance(state, dict) else [("the file", state)]:
        if not isinstance(tensor, torch.Tensor) or not isinstance(key, str):
            raise CheckpointError(
                f"{path}: {excerpt(key)} is {excerpt(tensor)}; a tensor is needed"
            )
        name = pattern.sub(lambda m: TENSOR_NAMES[m[0]], key.removeprefix("_orig_mod."))
        prefix = "" if name.startswith(("model.", "lm_head.")) else "model."
        tensors[prefix + name] = tensor_source(tensor)
    return tensors


def tensor_source(tensor: Tensor, scale: float = 1.0) -> TensorSource:
    """The source of a tensor in memory, which is multiplied by `scale` when it is read."""
    name = str(tensor.dtype).removeprefix("torch.")
    kind = {theirs: kind for kind, theirs in nanollama.FLOAT_KINDS.items()}.get(name, name)

    def load(rows: Any = slice(None)) -> Tensor:
        return tensor[rows] if scale == 1 else tensor[rows].float() * scale

    return TensorSource(tuple(tensor.shape), kind, tensor.nbytes, load)


def hugging_face_config(
    config: Mapping[str, Any], tensors: dict[str, TensorSource]
) -> dict[str, Any]:
    """The config.json of the model in Hugging Face's form. Cuts the padding off `tensors`, and adds
    those that nanochat adds to older checkpoints.

    Raises CheckpointError for an unknown variant."""
    if unknown := sorted(config.keys() - KNOWN_KEYS):
        raise CheckpointError(f"{excerpt(unknown[0])} is not known")
    counts = map(nanollama.ConfigValues(config).count, COUNTS)
    n_ctx, n_vocab, n_layers, n_heads, n_kv_heads, n_embd = counts
    constants = program_constants(config, tensors)
    for name, tensor in list(tensors.items()):
        if name.startswith(("model.embed", "model.value_embeds", "lm_head")):
            scale = constants.get("value_scale", 1.0) if "value_embeds" in name else 1.0
            tensors[name] = tensor_source(cast("Tensor", tensor.load(slice(0, n_vocab))), scale)
    layers = min(n_layers, 2**16)
    lambdas = {"model.resid_lambdas": torch.ones, "model.x0_lambdas": torch.zeros}
    for name, fill in lambdas.items() if lambdas.keys() & tensors else ():
        tensors.setdefault(name, tensor_source(fill(layers)))
    pattern = str(config.get("window_pattern") or "L").upper()
    if set(pattern) - {"S", "L"}:
        raise CheckpointError(f"window_pattern is {excerpt(pattern)}; S and L are known")
    short = [pattern[i % len(pattern)] == "S" and i < layers - 1 for i in range(layers)]
    divisor, tile = constants["short"]
    window = config.get("short_seq_len") or nanollama.round_up(-(-n_ctx // divisor), tile)
    width = tensors.get("model.layers.0.mlp.up_proj.weight")
    return {
        "model_type": "nanochat",
        "max_position_embeddings": n_ctx,
        "vocab_size": n_vocab,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "hidden_size": n_embd,
        "intermediate_size": width.shape[0] if width else 4 * n_embd,
        "rms_norm_eps": 2.0**-23,  # what torch takes for float32 where none is given
        "rope_theta": constants["rope_base"],
        "final_logit_softcapping": constants["softcap"],
        "attention_multiplier": constants["qk_scale"] ** 2 * (n_embd / n_heads) ** -0.5,
        "sliding_window": window + 1,  # nanochat does not count the token itself
        "layer_types": [nanollama.LAYER_TYPES[is_short] for is_short in short],
    }


def program_constants(
    config: Mapping[str, Any], tensors: Mapping[str, TensorSource]
) -> dict[str, Any]:
    """The constants of the version of nanochat that wrote a checkpoint.

    Raises CheckpointError where the files do not determine them."""
    gates = {t.shape[-1] for name, t in tensors.items() if name.endswith("value_gate.weight")}
    kind = max(gates, default=0), "model.backout_lambda" in tensors
    constants = CONSTANTS.get(kind)
    if constants is None or len(gates) > 1:
        raise CheckpointError(
            "no known version of nanochat has value embeddings with gates of "
            f"{excerpt(sorted(gates))} columns {'with' if kind[1] else 'without'} backout_lambda"
        )
    if "softcap" not in config and "softcap" not in constants:
        raise CheckpointError(
            "versions of nanochat with these parameters capped logits at 15 or, for some time from "
            '2 March 2026 on, at 20, and the files lack the value: add "softcap": 15 (or 20)'
        )
    return {**constants, "softcap": float(config.get("softcap", constants.get("softcap", 0)))}
