"""Families with layouts of tensors, or keys of metadata, of their own in GGUF.

Adds       `FAMILIES`, the inverse of how the decoders of models.delta_net, models.short_conv,
           models.mamba2, models.mla, models.gemma3n, models.gemma4 and models.apertus read them.
Seam       files.gguf_model asks it for tensors and metadata. Imports models.families, for the names
           of an activation's numbers.
Remove     delete this file with commands/convert.py.
Source     https://github.com/ggml-org/llama.cpp (conversion)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from nanollama import CheckpointError, ModelConfig, TensorSource
from nanollama_extras.models.families import XIELU

Parts = list[tuple[str, TensorSource]]  # the decoder's name of each part, and the part
Own = dict[str, tuple[tuple[int, ...], Parts]]  # GGUF's name -> shape and parts
Tensors = dict[str, TensorSource]
InOrder = Callable[[str, TensorSource], TensorSource]  # rows of queries and keys as GGUF has them
Sources = Mapping[str, TensorSource]
Given = Mapping[str, Any]
Values = dict[str, Any]
MROPE_SECTIONS = [11, 11, 10, 0]  # of Qwen3.5's RoPE, unless the config says it


@dataclass(frozen=True, slots=True)
class Outward:
    """A family on its way into GGUF.

    tensors: takes tensors of its own out of all, in `tensors` -> these under GGUF's names
    values: the config, the keys of config.json and all tensors -> metadata under {arch}. Raises
        CheckpointError.
    expected: what a reader of the file should find, where that is not the config itself"""

    tensors: Callable[[Tensors, ModelConfig, InOrder], Own]
    values: Callable[[ModelConfig, Given, Sources], Values]
    expected: Callable[[ModelConfig, Sources], ModelConfig] = lambda c, _: c
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)  # decoder's -> GGUF's


def one(name: str, tensor: TensorSource) -> tuple[tuple[int, ...], Parts]:
    return tensor.shape, [(name, tensor)]


def remade(
    tensor: TensorSource, change: Callable[[Tensor], Tensor], shape: tuple[int, ...]
) -> TensorSource:
    """A tensor that is computed from the whole of another one, in floats"""

    def load(*at: Any) -> Tensor:
        loaded = tensor.load()
        whole = loaded.float() if isinstance(loaded, Tensor) else loaded.dequantize().float()
        return change(whole)[at] if at else change(whole)

    return TensorSource(shape, "F32", 4 * math.prod(shape), load)


def turned(tensor: TensorSource) -> TensorSource:
    """A convolution's filters (taps, channels) as (channels, taps)"""
    return remade(tensor, lambda x: x.T.contiguous(), tensor.shape[::-1])


def places(tensors: Tensors, pattern: str) -> list[tuple[str, tuple[str, ...]]]:
    """The names that a pattern behind `model.layers.` matches, with its groups"""
    found = ((name, re.fullmatch(rf"model\.layers\.{pattern}", name)) for name in tensors)
    return [(name, match.groups()) for name, match in found if match]


# ---- Qwen3-Next and Qwen3.5: gated delta nets ----------------------------------------------------

DELTA_NET_NAMES = {
    "in_proj_qkv.weight": "attn_qkv.weight",
    "in_proj_z.weight": "attn_gate.weight",
    "in_proj_a.weight": "ssm_alpha.weight",
    "in_proj_b.weight": "ssm_beta.weight",
    "conv1d.weight": "ssm_conv1d.weight",
    "A": "ssm_a",
    "dt_bias": "ssm_dt.bias",
    "norm.weight": "ssm_norm.weight",
    "out_proj.weight": "ssm_out.weight",
}


def is_tiled(config: ModelConfig) -> bool:
    """Whether value head i has key head i % k_heads in GGUF, not i // (v_heads / k_heads)"""
    return config.model_type.startswith("qwen3_5")


def delta_net_tensors(tensors: Tensors, config: ModelConfig, in_order: InOrder) -> Own:
    """Queries with their gates behind each head; heads of values in GGUF's order."""
    shape, found = config.own["delta_net"], Own()
    order = torch.arange(shape.v_heads)
    if is_tiled(config):
        order = order.view(shape.k_heads, -1).T.flatten()

    def by_head(width: int, start: int = 0) -> Tensor:
        rows = (order[:, None] * width + torch.arange(width)).flatten()
        return torch.cat((torch.arange(start), start + rows))

    values, keys = by_head(shape.v_dim), by_head(shape.v_dim, 2 * shape.k_heads * shape.k_dim)
    rows = {"in_proj_z.weight": values, "in_proj_qkv.weight": keys, "conv1d.weight": keys}
    rows |= dict.fromkeys(("in_proj_a.weight", "in_proj_b.weight", "A", "dt_bias"), by_head(1))
    for name, (layer, part) in places(tensors, r"(\d+)\.linear_attn\.(.+)"):
        tensor = tensors.pop(name)
        if part == "conv1d.weight":
            tensor = turned(tensor)
        if part == "out_proj.weight":
            if is_tiled(config) and shape.k_heads < shape.v_heads:
                tensor = remade(tensor, lambda x: x[:, values], tensor.shape)
        elif part in rows:
            tensor = tensor.part(rows[part])
        found[f"blk.{layer}.{DELTA_NET_NAMES[part]}"] = one(name, tensor)
    if not is_tiled(config):
        join_beta_alpha(found, shape.k_heads)
    for name, (layer, suffix) in places(tensors, r"(\d+)\.self_attn\.q_proj\.(\w+)"):
        gate_name = name.replace("q_proj", "gate_proj")
        q, gate = in_order(name, tensors.pop(name)), tensors.pop(gate_name)
        heads = torch.arange(q.shape[0]).split(config.head_dim)
        pairs = (((name, q.part(each)), (gate_name, gate.part(each))) for each in heads)
        parts = [part for pair in pairs for part in pair]
        found[f"blk.{layer}.attn_q.{suffix}"] = (2 * q.shape[0], *q.shape[1:]), parts
    return found


def join_beta_alpha(found: Own, num_groups: int) -> None:
    """Puts ssm_beta and ssm_alpha together as ssm_ba: of each key head, those of its value heads"""
    for name in [name for name in found if name.endswith("ssm_beta.weight")]:
        _, b = found.pop(name)
        _, a = found.pop(name.replace("beta", "alpha"))
        num_rows, *cols = b[0][1].shape
        groups = torch.arange(num_rows).split(num_rows // num_groups)
        parts = [(key, tensor.part(rows)) for rows in groups for key, tensor in (b[0], a[0])]
        found[name.replace("ssm_beta", "ssm_ba")] = (2 * num_rows, *cols), parts


def delta_net_values(config: ModelConfig, given: Given, _: Sources) -> Values:
    shape = config.own["delta_net"]
    found = {
        "ssm.conv_kernel": shape.taps,
        "ssm.state_size": shape.k_dim,
        "ssm.group_count": shape.k_heads,
        "ssm.time_step_rank": shape.v_heads,
        "ssm.inner_size": shape.v_heads * shape.v_dim,
        "attention.recurrent_layers": [window == 0 for window in config.windows],
        "full_attention_interval": given.get("full_attention_interval") or 4,
    }
    if is_tiled(config):
        rope = given.get("rope_parameters") or given.get("rope_scaling") or {}
        sections = [*rope.get("mrope_section", MROPE_SECTIONS), 0][:4]
        found["rope.dimension_sections"] = sections
    return found


def delta_net_expected(config: ModelConfig, _: Sources) -> ModelConfig:
    shape = dataclasses.replace(config.own["delta_net"], tiled=is_tiled(config))
    return dataclasses.replace(config, own={**config.own, "delta_net": shape})


# ---- LFM2: short convolutions --------------------------------------------------------------------


def heads_by_layer(config: ModelConfig) -> list[int]:
    """Key/value heads of each layer, 0 in those with a state"""
    return [config.n_kv_heads * (window != 0) for window in config.windows]


def short_conv_tensors(tensors: Tensors, config: ModelConfig, _: InOrder) -> Own:
    found = Own()
    for name, (layer, part) in places(tensors, r"(\d+)\.conv\.(.+)"):
        tensor = tensors.pop(name)
        if part == "conv.weight":
            shape = (tensor.shape[0], tensor.shape[-1])
            tensor = remade(tensor, lambda x: x.flatten(1), shape)
        found[f"blk.{layer}.shortconv.{part}"] = one(name, tensor)
    return found


def short_conv_values(config: ModelConfig, given: Given, _: Sources) -> Values:
    heads, taps = heads_by_layer(config), config.own["taps"]
    found = {"shortconv.l_cache": taps, "attention.head_count_kv": heads}
    if config.experts:
        found["leading_dense_block_count"] = min(config.experts.layers)
    return found


# ---- Granite 4: mamba2 ---------------------------------------------------------------------------

MAMBA2_NAMES = {
    "in_proj": "ssm_in",
    "conv1d": "ssm_conv1d",
    "norm": "ssm_norm",
    "out_proj": "ssm_out",
    "dt_bias": "ssm_dt.bias",
    "A": "ssm_a",
    "D": "ssm_d",
}


def mamba2_tensors(tensors: Tensors, config: ModelConfig, _: InOrder) -> Own:
    """Numbers of heads as columns, a norm's weights by groups."""
    found = Own()
    for name, (layer, part, suffix) in places(tensors, r"(\d+)\.mamba\.(\w+)(.*)"):
        tensor, groups = tensors.pop(name), config.own["mamba2"].groups
        if f"{part}{suffix}" == "conv1d.weight":
            tensor = turned(tensor)
        elif part in ("A", "D", "norm"):
            num = groups if part == "norm" else tensor.shape[0]
            sizes = (num, tensor.shape[0] // num)
            tensor = remade(tensor, functools.partial(torch.reshape, shape=sizes), sizes)
        found[f"blk.{layer}.{MAMBA2_NAMES[part]}{suffix}"] = one(name, tensor)
    return found


def granite_values(config: ModelConfig, given: Given, _: Sources) -> Values:
    found: Values = {"attention.head_count_kv": heads_by_layer(config)}
    found["rope.scaling.finetuned"] = any(rope is not None for rope in config.layer_ropes)
    shape = config.own.get("mamba2")
    if shape is None:
        raise CheckpointError(f"model_type {config.model_type}: GGUF needs a layer of mamba2")
    found |= {
        "ssm.conv_kernel": shape.taps,
        "ssm.state_size": shape.d_state,
        "ssm.group_count": shape.groups,
        "ssm.time_step_rank": shape.heads,
        "ssm.inner_size": shape.inner,
    }
    if config.experts:
        found["feed_forward_length"] = config.experts.n_ff
        found["expert_shared_feed_forward_length"] = config.own["routing"].n_ff_shared
    return found


# ---- DeepSeek: latent attention ------------------------------------------------------------------


def latent_tensors(tensors: Tensors, config: ModelConfig, _: InOrder) -> Own:
    """k_b and v_b of all heads on top of each other; pairs that RoPE turns side by side."""
    shape, found = config.own["latent"], Own()
    heads: dict[str, dict[int, tuple[str, TensorSource]]] = {}
    for name, (layer, part, head) in places(
        tensors, r"(\d+)\.self_attn\.([kv]_b)_proj\.(\d+)\.weight"
    ):
        stack = heads.setdefault(f"blk.{layer}.attn_{part}.weight", {})
        stack[int(head)] = name, tensors.pop(name)
    for stem, of in heads.items():
        parts = [of[h] for h in sorted(of)]
        found[stem] = (len(parts), *parts[0][1].shape), parts
    turned_parts = {
        "q_b_proj": ("attn_q_b" if shape.q_latent else "attn_q", config.n_heads),
        "kv_a_proj_with_mqa": ("attn_kv_a_mqa", 1),
    }
    for part, (theirs, num) in turned_parts.items():
        for name, (layer, suffix) in places(tensors, rf"(\d+)\.self_attn\.{part}\.(\w+)"):
            tensor = pairs_together(tensors.pop(name), num, shape.rope)
            found[f"blk.{layer}.{theirs}.{suffix}"] = one(name, tensor)
    return found


def pairs_together(tensor: TensorSource, num_heads: int, n_rot: int) -> TensorSource:
    """The inverse of models.mla's `rope_last`"""
    rows = torch.arange(tensor.shape[0]).view(num_heads, -1)
    halves = rows[:, -n_rot:].unflatten(1, (2, -1)).mT.flatten(1)
    return tensor.part(torch.cat((rows[:, :-n_rot], halves), dim=1).flatten())


def latent_values(config: ModelConfig, given: Given, _: Sources) -> Values:
    shape, found = config.own["latent"], Values()
    found["attention.key_length"] = shape.latent + shape.rope
    found["attention.value_length"] = shape.latent
    found["attention.key_length_mla"] = shape.nope + shape.rope
    found["attention.value_length_mla"] = shape.v_dim
    found["attention.kv_lora_rank"] = shape.latent
    if shape.q_latent:
        found["attention.q_lora_rank"] = shape.q_latent
    if weight := config.rope.get("mscale_all_dim"):
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * weight
    return found


# ---- Gemma 3n and Gemma 4 ------------------------------------------------------------------------


def gemma4_tensors(tensors: Tensors, config: ModelConfig, _: InOrder) -> Own:
    """Experts' gates and ups together, and which columns turn."""
    found = padded_table(tensors, config)
    names = {"scale": "ffn_gate_inp.scale", "per_expert_scale": "ffn_down_exps.scale"}
    for name, (layer, part) in places(tensors, r"(\d+)\.mlp\.gate\.(scale|per_expert_scale)"):
        found[f"blk.{layer}.{names[part]}"] = one(name, tensors.pop(name))
    for name, (layer,) in places(tensors, r"(\d+)\.mlp\.experts\.0\.gate_proj\.weight"):
        assert config.experts
        parts: Parts = []
        for expert in range(config.experts.count):
            for part in ("gate_proj", "up_proj"):
                own = name.replace("experts.0.gate_proj", f"experts.{expert}.{part}")
                parts.append((own, tensors.pop(own)))
        num_rows, cols = parts[0][1].shape
        shape = (config.experts.count, 2 * num_rows, cols)
        found[f"blk.{layer}.ffn_gate_up_exps.weight"] = shape, parts
    half = config.head_dim // 2
    divisors = torch.full((half,), 1e30)
    divisors[: config.rope.get("n_turned", config.head_dim) // 2] = 1.0
    source = TensorSource((half,), "F32", 4 * half, lambda *at: divisors[at] if at else divisors)
    found["rope_freqs.weight"] = one("rope_freqs.weight", source)
    return found


def gemma4_values(config: ModelConfig, given: Given, _: Sources) -> Values:
    shape, slides = config.own["shape"], slides_of(config)
    assert config.window_heads
    heads, width = config.window_heads
    found = shared_values(config) | {
        "attention.sliding_window": max(w for w in config.windows if w),
        "attention.key_length_swa": width,
        "attention.value_length_swa": width,
        "rope.dimension_count": config.head_dim,
        "rope.dimension_count_swa": width,
    }
    if heads != config.n_kv_heads:
        found["attention.head_count_kv"] = [heads if s else config.n_kv_heads for s in slides]
    if len(set(shape.n_ffs)) > 1:
        found["feed_forward_length"] = list(shape.n_ffs)
    return found


def slides_of(config: ModelConfig) -> list[bool]:
    """Whether each layer has a window, also if it reads the keys of another one"""
    return [config.windows[source] is not None for source in config.own["shape"].sources]


def shared_values(config: ModelConfig) -> Values:
    shape = config.own["shape"]
    num_shared = sum(source != i for i, source in enumerate(shape.sources))
    return {
        "attention.shared_kv_layers": num_shared,
        "attention.sliding_window_pattern": slides_of(config),
        "embedding_length_per_layer_input": shape.per_layer,
    }


TABLE = "model.embed_tokens_per_layer.weight"


def padded_table(tensors: Tensors, config: ModelConfig) -> Own:
    """The table of embeddings for layers, with zeros for tokens that have none"""
    missing = config.n_vocab - config.own["shape"].table_rows
    if TABLE not in tensors or missing <= 0:
        return {}
    table = tensors.pop(TABLE)
    shape = (missing, table.shape[1])
    zeros = TensorSource(shape, table.kind, 0, lambda *at: torch.zeros(shape)[at])
    parts = [(TABLE, table), (TABLE, zeros)]
    return {"per_layer_token_embd.weight": ((config.n_vocab, shape[1]), parts)}


def gemma_expected(config: ModelConfig, _: Sources) -> ModelConfig:
    own = config.own["shape"]  # without tables, their size means nothing
    num_rows = max(own.table_rows, config.n_vocab) if own.per_layer else config.n_vocab
    shape = dataclasses.replace(own, table_rows=num_rows)
    return dataclasses.replace(config, own={**config.own, "shape": shape})


def gemma4_expected(config: ModelConfig, tensors: Sources) -> ModelConfig:
    config = gemma_expected(config, tensors)
    shape = dataclasses.replace(config.own["shape"], k_is_v=True)  # where v_proj is missing
    own = {**config.own, "shape": shape, "whole_images": not shape.per_layer}
    return dataclasses.replace(config, own=own)


def gemma3n_tensors(tensors: Tensors, config: ModelConfig, _: InOrder) -> Own:
    """The matrices of streams on top of each other."""
    found = padded_table(tensors, config)
    stacked = {"altup_projections": "altup_proj", "altup_unembed_projections": "altup_unembd_proj"}
    for part, theirs in stacked.items():
        names = sorted(name for name in tensors if name.startswith(f"model.{part}."))
        parts = [(name, tensors.pop(name)) for name in names]
        found[f"{theirs}.weight"] = (len(parts), *parts[0][1].shape), parts
    return found


def gemma3n_values(config: ModelConfig, given: Given, _: Sources) -> Values:
    shape, altup = config.own["shape"], config.own["altup"]
    found = shared_values(config) | {
        "altup.num_inputs": altup.num_streams,
        "altup.active_idx": altup.active,
        "activation_sparsity_scale": [-math.inf if x is None else x for x in altup.cutoffs],
    }
    if len(set(shape.n_ffs)) > 1:
        found["feed_forward_length"] = list(shape.n_ffs)
    return found


# ---- Apertus: an activation with numbers ---------------------------------------------------------


WITHOUT_ARCH = tuple(
    f"xielu.{part}" for part in XIELU
)  # keys of metadata that are not under {arch}


def apertus_tensors(tensors: Tensors, config: ModelConfig, _: InOrder) -> Own:
    """None: the numbers are metadata."""
    for name, _layer in places(tensors, r"(\d+)\.mlp\.act_fn\.\w+"):
        del tensors[name]
    return {}


def activation_numbers(config: ModelConfig, tensors: Sources) -> list[list[float]]:
    """alpha_p, alpha_n, beta and eps, each with a number for each layer"""
    layers = range(config.n_layers)
    names = [[f"model.layers.{i}.mlp.act_fn.{part}" for i in layers] for part in XIELU]
    return [[float(cast("Tensor", tensors[name].load())) for name in row] for row in names]


def apertus_values(config: ModelConfig, _: Given, tensors: Sources) -> Values:
    numbers = activation_numbers(config, tensors)
    return {f"xielu.{part}": row for part, row in zip(XIELU, numbers)}


def apertus_expected(config: ModelConfig, tensors: Sources) -> ModelConfig:
    return dataclasses.replace(
        config, own={"xielu": list(zip(*activation_numbers(config, tensors)))}
    )


# ---- all of them ---------------------------------------------------------------------------------

# what Qwen's files call the norm before an MLP
AFTER_ATTENTION = {"post_attention_layernorm": "post_attention_norm"}
DELTA_NET = Outward(delta_net_tensors, delta_net_values, delta_net_expected, AFTER_ATTENTION)
SHORT_CONV = Outward(short_conv_tensors, short_conv_values, names={"model.norm": "token_embd_norm"})
LATENT = Outward(latent_tensors, latent_values)
GEMMA4 = Outward(gemma4_tensors, gemma4_values, gemma4_expected)
FAMILIES = {
    **dict.fromkeys(("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text"), DELTA_NET),
    **dict.fromkeys(("lfm2", "lfm2_moe"), SHORT_CONV),
    "granitemoehybrid": Outward(mamba2_tensors, granite_values),
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "kimi_k2", "glm4_moe_lite"), LATENT),
    "mistral4": LATENT,
    "gemma3n_text": Outward(gemma3n_tensors, gemma3n_values, gemma_expected),
    **dict.fromkeys(("gemma4_text", "gemma4_unified_text"), GEMMA4),
    "apertus": Outward(apertus_tensors, apertus_values, apertus_expected),
}
