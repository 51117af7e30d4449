"""Layers of Qwen3.5, Qwen3-Next and OLMo hybrid: gated delta nets, and attention with a gate.

Adds       `GatedDeltaNet`, a layer with a state of a matrix for each head; `GatedAttention`;
           `DeltaNetDecoder`, which has one or the other in each layer; their layouts of tensors.
Seam       Family.layout, .gguf_layout and .decoder of these families. models.hybrid_config reads
           their configs, models.recurrent keeps the states. Imports models.families,
           models.layers, whose norms OLMo hybrid has, and models.routers, which names the tensors
           of blocks that predict further tokens. Only models.mtp reads these.
Source     https://arxiv.org/abs/2412.06464 (gated delta networks), https://qwen.ai (models)
           https://github.com/huggingface/transformers (src/transformers/models/qwen3_5)
Remove     delete this file and the rows of these families.

For each head, with a state S (key width, value width) and unit vectors q and k:

    S = exp(g) S;   S = S + k (beta (v - S^T k))^T;   o = S^T q / sqrt(key width)
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import nanollama
from nanollama import (
    POST_NORMS,
    PRE_NORMS,
    Attention,
    Batch,
    DecoderLayer,
    KernelError,
    KVCache,
    ModelConfig,
    Norm,
    Rotation,
    TensorSource,
    Weights,
)
from nanollama_extras.models.families import changed, plus_one
from nanollama_extras.models.hybrid_config import DeltaNetShape
from nanollama_extras.models.layers import VariedAttention, VariedLayer
from nanollama_extras.models.recurrent import Inputs, RecurrentDecoder, RecurrentMixer
from nanollama_extras.models.routers import prediction_tensors

if TYPE_CHECKING:
    from nanollama_extras.models.mtp import Head

Tensors = Mapping[str, TensorSource]

# ---- layouts of tensors --------------------------------------------------------------------------


def split_gate(name: str, tensor: TensorSource, config: ModelConfig) -> dict[str, TensorSource]:
    """q_proj, whose rows of a head are queries, then gates -> q_proj and gate_proj"""
    D, stem = config.head_dim, name.rpartition(".q_proj.")
    if tensor.shape[:1] != (2 * config.n_heads * D,):
        return {name: tensor}
    rows = torch.arange(tensor.shape[0]).view(-1, 2, D)
    return {
        f"{stem[0]}.{part}.{stem[2]}": tensor.part(rows[:, i].flatten())
        for i, part in enumerate(("q_proj", "gate_proj"))
    }


def split_fused(name: str, tensor: TensorSource, shape: DeltaNetShape) -> dict[str, TensorSource]:
    """in_proj_qkvz and in_proj_ba, whose rows follow key heads -> in_proj_qkv, _z, _b and _a"""
    stem, _, part = name.removesuffix(".weight").rpartition("in_proj_")
    group = shape.v_heads // shape.k_heads
    sizes = {"q": shape.k_dim, "k": shape.k_dim, "v": group * shape.v_dim, "z": group * shape.v_dim}
    sizes = sizes if part == "qkvz" else {"b": group, "a": group}
    if part not in ("qkvz", "ba") or tensor.shape[0] != shape.k_heads * sum(sizes.values()):
        return {name: tensor}
    columns = torch.arange(tensor.shape[0]).view(shape.k_heads, -1).split([*sizes.values()], dim=1)
    rows = {key: each.flatten() for key, each in zip(sizes, columns)}
    if part == "qkvz":
        rows = {"qkv": torch.cat([rows[key] for key in "qkv"]), "z": rows["z"]}
    return {f"{stem}in_proj_{key}.weight": tensor.part(each) for key, each in rows.items()}


def hub_layout(tensors: Tensors, config: ModelConfig) -> dict[str, TensorSource]:
    """Tensors of safetensors files as `DeltaNetDecoder` wants them: A = -exp(A_log), norms with 1
    added."""
    named: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        name = re.sub(r"^model\.(?=mtp\.)", "", name)
        if name.endswith(".A_log"):
            named[name.removesuffix("_log")] = changed(tensor, lambda x: -x.exp())
        elif re.search(r"norm(_\w+)?\.weight$", name) and "linear_attn" not in name:
            named[name] = plus_one(tensor)
        else:
            named[name] = tensor
    return common_layout(named, config)


# OLMo's name of a delta net's tensor -> the decoder's
OLMO_NAMES = {"g_proj": "in_proj_z", "o_proj": "out_proj", "o_norm": "norm"}
OLMO_NAMES |= {f"{part}_proj": f"in_proj_{part}" for part in "qkvab"}
# of a layer with a delta net, and of one with attention, which transformers 5.24 writes in two ways
OLMO_NORMS = {
    "linear_attn": {
        "attention_layer_norm": "input_layernorm",
        "feedforward_layer_norm": "post_attention_layernorm",
    },
    "self_attn": {
        "feedforward_layer_norm": "post_self_attn_layernorm",
        "post_attention_layernorm": "post_self_attn_layernorm",
        "post_feedforward_layernorm": "post_mlp_layernorm",
    },
}


def olmo_layout(tensors: Tensors, config: ModelConfig) -> dict[str, TensorSource]:
    """Tensors of OLMo hybrid as its decoder wants them; see `hub_layout`. The filters of q, k and v
    become one tensor, and norms are plain."""
    named: dict[str, TensorSource] = {}
    filters: dict[str, dict[str, TensorSource]] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(model\.layers\.(\d+)\.)(\w+)\.?(\w*)(.*)", name)
        if found is None or int(found[2]) >= config.n_layers:
            named[name] = tensor
        elif found[4].endswith("_conv1d"):
            filters.setdefault(f"{found[1]}linear_attn.conv1d.weight", {})[found[4]] = tensor
        elif name.endswith(".A_log"):
            named[name.removesuffix("_log")] = changed(tensor, lambda x: -x.exp())
        elif found[3] == "linear_attn":
            part = OLMO_NAMES.get(found[4], found[4])
            named[f"{found[1]}linear_attn.{part}{found[5]}"] = tensor
        else:
            kind = "linear_attn" if config.windows[int(found[2])] == 0 else "self_attn"
            own = OLMO_NORMS[kind].get(found[3], found[3])
            named[f"{found[1]}{own}.{found[4]}{found[5]}"] = tensor
    for name, parts in filters.items():
        named[name] = joined(
            [parts[key] for key in sorted(parts, key=lambda part: "qkv".find(part[0]))]
        )
    return common_layout(named, config)


def joined(parts: list[TensorSource]) -> TensorSource:
    """The rows of several tensors, as one."""
    shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
    load = lambda: torch.cat([cast("Tensor", part.load()) for part in parts])  # noqa: E731
    return dataclasses.replace(parts[0], shape=shape, load=load)


# GGUF's name of a tensor -> the decoder's
GGUF_NAMES = {
    r"self_attn\.qkv_proj\.weight": "linear_attn.in_proj_qkv.weight",
    r"attn_gate\.weight": "linear_attn.in_proj_z.weight",
    r"ssm_alpha\.weight": "linear_attn.in_proj_a.weight",
    r"ssm_beta\.weight": "linear_attn.in_proj_b.weight",
    r"ssm_ba\.weight": "linear_attn.in_proj_ba.weight",
    r"ssm_in\.weight": "linear_attn.in_proj_qkvz.weight",
    r"ssm_conv1d\.weight": "linear_attn.conv1d.weight",
    r"ssm_dt\.bias": "linear_attn.dt_bias",
    r"ssm_a": "linear_attn.A",
    r"ssm_norm\.weight": "linear_attn.norm.weight",
    r"ssm_out\.weight": "linear_attn.out_proj.weight",
}
# the same for a block that predicts further tokens, which is a layer behind the others
GGUF_PREDICTION = {
    "nextn.eh_proj": "mtp.fc",
    "nextn.enorm": "mtp.pre_fc_norm_embedding",
    "nextn.hnorm": "mtp.pre_fc_norm_hidden",
    "nextn.shared_head_norm": "mtp.norm",
}


def gguf_layout(tensors: Tensors, config: ModelConfig) -> dict[str, TensorSource]:
    """Tensors of GGUF files as `DeltaNetDecoder` wants them; see `hub_layout`."""
    further = prediction_tensors(tensors, config.n_layers)
    named: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        place = re.fullmatch(r"(?:blk|model\.layers)\.(\d+)\.(.+)", name)
        if name in further and place:
            part = place[2].removesuffix(".weight")
            name = f"mtp.layers.{int(place[1]) - config.n_layers}.{place[2]}"
            name = f"{GGUF_PREDICTION[part]}.weight" if part in GGUF_PREDICTION else name
        elif place:
            ours = next((o for g, o in GGUF_NAMES.items() if re.fullmatch(g, place[2])), place[2])
            name = f"model.layers.{place[1]}.{ours}"
        named[name] = tensor
    return common_layout(named, config)


def common_layout(tensors: Tensors, config: ModelConfig) -> dict[str, TensorSource]:
    """conv1d as (taps, channels), fused projections split. Only models.mtp reads the head's."""
    shape: DeltaNetShape = config.own["delta_net"]
    named: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        tensor = dataclasses.replace(tensor, stays=tensor.stays or name.startswith("mtp."))
        if name.endswith((".self_attn.q_proj.weight", ".self_attn.q_proj.bias")):
            named |= split_gate(name, tensor, config)
        elif name.endswith("conv1d.weight"):
            taps = (tensor.shape[-1], tensor.shape[0])
            named[name] = changed(tensor, lambda x: x.flatten(1).T.contiguous(), taps)
        elif "in_proj_" in name:
            named |= split_fused(name, tensor, shape)
        else:
            named[name] = tensor
    return named


# ---- the layers ----------------------------------------------------------------------------------


class GatedDeltaNet(RecurrentMixer):
    """A gated delta net. Its state: the last inputs of the convolution, then S of each head."""

    kernel = "delta_net"

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        self.shape = s = cast("DeltaNetShape", config.own["delta_net"])
        self.eps, self.num_floats = s.eps or config.norm_eps, s.num_floats
        self.width = s.v_heads * s.v_dim
        rows = {"qkv": s.channels, "z": self.width}
        if f"{prefix}.in_proj_q.weight" in weights.tensors:
            keys = s.k_heads * s.k_dim
            rows = {"q": keys, "k": keys, "v": self.width, "z": self.width}
        named = {f"{prefix}.in_proj_{part}": num for part, num in rows.items()}
        self.in_proj = weights.linear(named, config.n_embd)
        self.out_proj = weights.linear({f"{prefix}.out_proj": config.n_embd}, self.width)
        # a few rows, of which llama.cpp keeps some as floats, too
        names = [f"{prefix}.in_proj_{part}.weight" for part in "ba"]
        self.ba = torch.cat([weights.take(name, s.v_heads, config.n_embd) for name in names])
        take = {"dtype": torch.float32}
        self.conv = weights.take(f"{prefix}.conv1d.weight", s.taps, s.channels, **take)
        self.A, self.dt_bias = (
            weights.take(f"{prefix}.{name}", s.v_heads, **take) for name in ("A", "dt_bias")
        )
        self.norm = weights.take(f"{prefix}.norm.weight", s.v_dim, **take)
        heads = torch.arange(s.v_heads, device=weights.device)
        self.key_head = heads % s.k_heads if s.tiled else heads // (s.v_heads // s.k_heads)
        fits = s.k_dim % 16 == s.v_dim % 16 == s.channels % 16 == 0 and s.taps <= 8
        fits = fits and config.n_embd % 16 == 0
        self.run_kernel = getattr(weights.backend, "run_kernel", None) if fits else None

    def inputs(self, x: Tensor, norm: Norm | None) -> Inputs:
        """qkv | z (N, columns) and b | a (N, 2 Hv)"""
        mixed = self.in_proj(x, norm=norm)
        x = x if norm is None else norm(x)
        if self.run_kernel is None:
            return mixed, nanollama.linear(x, self.ba)
        empty = torch.empty(x.size(0), self.ba.size(0))
        out = self.run_kernel(
            "few_rows", empty, x=x, weight=self.ba, cols=x.size(1), rows=self.ba.size(0)
        )
        return mixed, out

    def kernel_fields(self, inputs: Inputs) -> dict[str, Any]:
        s, (x, ba) = self.shape, inputs
        return {
            "x": x,
            "ba": ba,
            "conv": self.conv,
            "norm": self.norm,
            "A": self.A,
            "dt_bias": self.dt_bias,
            "taps": s.taps,
            "k_heads": s.k_heads,
            "v_heads": s.v_heads,
            "k_dim": s.k_dim,
            "v_dim": s.v_dim,
            "is_tiled": s.tiled,
            "eps": self.eps,
            "most": s.beta,
        }

    def scan_span(self, inputs: Inputs, state: Tensor) -> Tensor:
        s, (x, ba) = self.shape, inputs
        n, keys, last = len(x), s.k_heads * s.k_dim, (s.taps - 1) * s.channels
        qkv, z = x.float().split([s.channels, self.width], dim=1)
        b, a = ba.float().chunk(2, dim=1)
        tail, S = state[:last].view(-1, s.channels), state[last:].view(-1, s.k_dim, s.v_dim)
        seen = torch.cat((tail, qkv))  # (taps - 1 + n, channels)
        tail.copy_(seen[n:])
        mixed = self.conv[0] * seen[:n]
        for j in range(1, s.taps):
            mixed += self.conv[j] * seen[j : j + n]
        mixed = by_row(F.silu, mixed)
        q, k, v = mixed.split([keys, keys, self.width], dim=1)
        q, k = (unit(part.view(n, -1, s.k_dim))[:, self.key_head] for part in (q, k))
        q, v = q * s.k_dim**-0.5, v.view(n, -1, s.v_dim)
        decay = by_row(torch.exp, self.A * by_row(F.softplus, a + self.dt_bias))  # (n, Hv)
        beta = s.beta * by_row(torch.sigmoid, b)
        o = torch.empty_like(v)
        for t in range(n):
            S *= decay[t, :, None, None]
            known = (S * k[t, :, :, None]).sum(1)  # (Hv, value width)
            S += k[t, :, :, None] * (beta[t, :, None] * (v[t] - known))[:, None]
            o[t] = (S * q[t, :, :, None]).sum(1)
        o = nanollama.rms_norm(o, self.norm, self.eps)
        return o.flatten(1) * by_row(F.silu, z)


def unit(x: Tensor) -> Tensor:
    """Vectors (.., D) of length 1."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def by_row(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x) of each row of x (n, columns), whatever n is: torch computes the last elements of
    a tensor, which do not fill a vector, by other instructions."""
    return function(F.pad(x, (0, -x.shape[1] % 32)))[:, : x.shape[1]]


class GatedAttention(Attention):
    """Attention whose output is multiplied with the sigmoid of a gate."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, index: int) -> None:
        super().__init__(config, weights, prefix, index)
        rows = {f"{prefix}.gate_proj": config.n_heads * config.head_dim}
        self.gate_proj = weights.linear(rows, config.n_embd, config.qkv_bias)

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None,
        rotation: Rotation,
        cache: KVCache,
        batch: Batch,
        residual: Tensor | None,
    ) -> Tensor:
        out = cache.attend(self, self.qkv_proj(x, norm=norm), rotation, batch)
        gate = self.gate_proj(x, norm=norm)  # (N, H D)
        run_kernel = getattr(self.backend, "run_kernel", None)
        if run_kernel is None or out.size(1) % 16:
            gated = out * by_row(torch.sigmoid, gate)
        else:
            empty = torch.empty(out.size(0), out.size(1))
            gated = run_kernel("sigmoid_gate", empty, x=out, gate=gate, cols=out.size(1))
        return self.o_proj(gated, residual=residual)


class DeltaNetLayer(DecoderLayer):
    @staticmethod
    def mixer(  # type: ignore[override]
        config: ModelConfig, weights: Weights, prefix: str, index: int
    ) -> GatedAttention | GatedDeltaNet:
        if config.windows[index] == 0:
            return GatedDeltaNet(config, weights, prefix.replace("self_attn", "linear_attn"))
        return GatedAttention(config, weights, prefix, index)


class DeltaNetDecoder(RecurrentDecoder):
    layer = DeltaNetLayer
    head: Head | None = None  # that predicts further tokens; models.mtp puts it here

    def __init__(self, config: ModelConfig, weights: Weights, kv_dtype: str = "auto") -> None:
        weights.used |= prediction_tensors(weights.tensors, config.n_layers)
        super().__init__(config, weights, kv_dtype)
        self.weights = weights  # for models.mtp

    def prepare(self, batch: Batch) -> None:
        """Raises KernelError where the head needs the hidden states, which a recorded step hides"""
        if self.head:
            raise KernelError("hidden states are needed for drafts")

    def hidden(self, batch: Batch, cache: KVCache) -> Tensor:
        x = super().hidden(batch, cache)
        if self.head:
            self.head.observe(self, batch, cache, x)
        return x


class OlmoHybridLayer(VariedLayer):
    """A delta net after a norm, or attention before one."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        norms = PRE_NORMS if config.windows[index] == 0 else POST_NORMS
        super().__init__(dataclasses.replace(config, norms=norms), weights, index)

    @staticmethod
    def mixer(  # type: ignore[override]
        config: ModelConfig, weights: Weights, prefix: str, index: int
    ) -> VariedAttention | GatedDeltaNet:
        if config.windows[index] == 0:
            return GatedDeltaNet(config, weights, prefix.replace("self_attn", "linear_attn"))
        return VariedAttention(config, weights, prefix, index)


class OlmoHybridDecoder(RecurrentDecoder):
    layer = OlmoHybridLayer
