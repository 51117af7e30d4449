"""Layers of the kind mamba2, and the decoders of Granite 4 H, Nemotron-H and Falcon-H1.

Adds       `Mamba2`, a layer with a state of a matrix for each head; a decoder for each of these
           families; their layouts of tensors.
Seam       Family.layout, .gguf_layout and .decoder of these families. models.mamba2_config reads
           their configs, models.recurrent keeps the states. Imports models.families,
           models.delta_net and models.routers, which has the experts and names the tensors that
           nothing here reads.
Source     https://arxiv.org/abs/2405.21060 (mamba2), 2504.03624 (Nemotron-H),
           2507.22448 (Falcon-H1)
           https://github.com/huggingface/transformers (src/transformers/models/bamba)
Remove     delete this file and the rows of these families.

For each head, with a state S (d_state, head width), a step dt > 0 and a negative number A:

    S = exp(dt A) S + B (dt x)^T;   y = S^T C + D x
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import nanollama
from nanollama import (
    MLP,
    Attention,
    Batch,
    DecoderLayer,
    KVCache,
    ModelConfig,
    Norm,
    Rotation,
    TensorSource,
    Weights,
    make_norm,
)
from nanollama_extras.models.delta_net import by_row
from nanollama_extras.models.families import changed
from nanollama_extras.models.mamba2_config import Mamba2Shape
from nanollama_extras.models.recurrent import Inputs, RecurrentDecoder, RecurrentMixer
from nanollama_extras.models.routers import LatentMoE, RoutedMoE, prediction_tensors

Tensors = Mapping[str, TensorSource]

# ---- layouts of tensors --------------------------------------------------------------------------

# GGUF's name of a tensor -> the decoder's
GGUF_NAMES = {
    r"ssm_in\.weight": "mamba.in_proj.weight",
    r"ssm_conv1d\.(weight|bias)": r"mamba.conv1d.\1",
    r"ssm_dt\.bias": "mamba.dt_bias",
    r"ssm_a": "mamba.A",
    r"ssm_d": "mamba.D",
    r"ssm_norm\.weight": "mamba.norm.weight",
    r"ssm_out\.weight": "mamba.out_proj.weight",
}


def gguf_layout(tensors: Tensors, config: ModelConfig) -> dict[str, TensorSource]:
    """Tensors of GGUF files as the decoders want them; see `hub_layout`."""
    named: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        place = re.fullmatch(r"blk\.(\d+)\.(.+)", name)
        for theirs, ours in GGUF_NAMES.items() if place else ():
            if found := re.fullmatch(theirs, place[2]):  # type: ignore[index]
                name = f"model.layers.{place[1]}.{found.expand(ours)}"  # type: ignore[index]
        named[name] = tensor
    return common_layout(named, config)


def hub_layout(tensors: Tensors, config: ModelConfig) -> dict[str, TensorSource]:
    """Tensors of safetensors files as the decoders want them: A = -exp(A_log), conv1d as (taps,
    channels), numbers of heads and a norm's weights as vectors, Falcon-H1's factors in the
    weights, Granite's shared MLP as the only one where there are no experts."""
    named: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        if config.experts is None:
            name = name.replace("mlp.shared_expert.", "mlp.")
        if name.endswith(".A_log"):
            named[name.removesuffix("_log")] = changed(tensor, lambda x: -x.exp())
        else:
            named[name] = tensor
    return common_layout(folded(named, config), config)


def common_layout(tensors: Tensors, config: ModelConfig) -> dict[str, TensorSource]:
    """Shapes that do not depend on the format; no blocks that predict further tokens."""
    skipped = prediction_tensors(tensors, config.n_layers)
    named: dict[str, TensorSource] = {}
    for name in (name for name in tensors if name not in skipped):
        tensor = tensors[name]
        if name.endswith("mamba.conv1d.weight"):
            taps = (tensor.shape[-1], tensor.shape[0])
            tensor = changed(tensor, lambda x: x.flatten(1).T.contiguous(), taps)
        elif re.search(r"mamba\.(A|D|norm\.weight)$", name) and len(tensor.shape) == 2:
            tensor = changed(tensor, Tensor.flatten, (tensor.shape[0] * tensor.shape[1],))
        named[name] = tensor
    return named


def folded(tensors: Tensors, config: ModelConfig) -> dict[str, TensorSource]:
    """Falcon-H1's weights times its factors; those of other families as they are."""
    factors: Mapping[str, Any] = config.own.get("factors", {})
    if not factors:
        return dict(tensors)
    s: Mamba2Shape = config.own["mamba2"]
    sizes = [s.inner, s.inner, s.groups * s.d_state, s.groups * s.d_state, s.heads]
    parts = [torch.full((n,), x) for n, x in zip(sizes, factors["ssm_multipliers"])]
    gate, down = factors["mlp_multipliers"]
    of_key, of_input = factors["key_multiplier"], factors["attention_in_multiplier"]
    rows: dict[str, Any] = {  # of weights, and of biases
        r"k_proj\.weight": of_key * of_input,
        r"k_proj\.bias": of_key,
        r"[qv]_proj\.weight": of_input,
        r"o_proj\.(weight|bias)": factors["attention_out_multiplier"],
        r"mamba\.in_proj\.weight": torch.cat(parts) * factors["ssm_in_multiplier"],
        r"mamba\.in_proj\.bias": torch.cat(parts),
        r"mamba\.out_proj\.(weight|bias)": factors["ssm_out_multiplier"],
        r"gate_proj\.(weight|bias)": gate,
        r"down_proj\.(weight|bias)": down,
    }
    named: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        factor = next((f for suffix, f in rows.items() if re.search(rf"\b{suffix}$", name)), 1)
        one = isinstance(factor, (int, float)) and factor == 1
        named[name] = tensor if one else scaled(tensor, torch.as_tensor(factor))
    return named


def scaled(tensor: TensorSource, factor: Tensor) -> TensorSource:
    """A tensor times a factor, or its rows times theirs."""

    def load(at: Any = slice(None)) -> Tensor:
        x = cast("Tensor", tensor.load(at)).float()
        each = factor.expand(tensor.shape[:1])[at]
        return x * each.view(-1, *[1] * (x.dim() - 1))

    return dataclasses.replace(tensor, load=load)


# ---- the layers ----------------------------------------------------------------------------------


class Mamba2(RecurrentMixer):
    """A mamba2 layer. Its state: the last inputs of the convolution, then S of each head."""

    kernel = "mamba2"

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        self.shape = s = cast("Mamba2Shape", config.own["mamba2"])
        self.num_floats, self.width = s.num_floats, s.inner
        num_rows, C = s.inner + s.channels + s.heads, config.n_embd  # z | x B C | dt
        self.in_proj = weights.linear({f"{prefix}.in_proj": num_rows}, C, s.in_bias)
        self.out_proj = weights.linear({f"{prefix}.out_proj": C}, s.inner, s.out_bias)
        take = {"dtype": torch.float32}
        self.conv = weights.take(f"{prefix}.conv1d.weight", s.taps, s.channels, **take)
        self.conv_bias = None
        if s.conv_bias:
            self.conv_bias = weights.take(f"{prefix}.conv1d.bias", s.channels, **take)
        self.A, self.D, self.dt_bias = (
            weights.take(f"{prefix}.{name}", s.heads, **take) for name in ("A", "D", "dt_bias")
        )
        self.norm = None
        name = f"{prefix}.norm.weight"
        if s.norm and not (s.norm_is_optional and name not in weights.tensors):
            self.norm = weights.take(name, s.inner, **take)
        fits = s.head_dim % 16 == s.channels % 16 == s.d_state % 4 == 0 and s.taps <= 8
        fits = fits and s.inner // s.groups % 16 == 0
        self.run_kernel = getattr(weights.backend, "run_kernel", None) if fits else None

    def inputs(self, x: Tensor, norm: Norm | None) -> Inputs:
        return (self.in_proj(x, norm=norm),)

    def kernel_fields(self, inputs: Inputs) -> dict[str, Any]:
        s = self.shape
        return {
            "x": inputs[0],
            "conv": self.conv,
            "bias": self.conv_bias,
            "A": self.A,
            "D": self.D,
            "dt_bias": self.dt_bias,
            "norm": self.norm,
            "heads": s.heads,
            "head_dim": s.head_dim,
            "groups": s.groups,
            "d_state": s.d_state,
            "taps": s.taps,
            "is_gated": s.norm == "gated",
            "eps": s.eps,
            "dt_min": s.dt_limits[0],
            "dt_max": s.dt_limits[1],
        }

    def scan_span(self, inputs: Inputs, state: Tensor) -> Tensor:
        s, mixed = self.shape, inputs[0].float()
        n, last = len(mixed), (s.taps - 1) * s.channels
        z, xbc, dt = mixed.split([s.inner, s.channels, s.heads], dim=1)
        tail, S = state[:last].view(-1, s.channels), state[last:].view(-1, s.d_state, s.head_dim)
        seen = torch.cat((tail, xbc))  # (taps - 1 + n, channels)
        tail.copy_(seen[n:])
        mixed = self.conv[0] * seen[:n]
        for j in range(1, s.taps):
            mixed += self.conv[j] * seen[j : j + n]
        mixed = by_row(F.silu, mixed if self.conv_bias is None else mixed + self.conv_bias)
        x, b, c = mixed.split([s.inner, s.groups * s.d_state, s.groups * s.d_state], dim=1)
        x = x.view(n, s.heads, s.head_dim)
        per_group = s.heads // s.groups
        b, c = (
            part.view(n, s.groups, s.d_state).repeat_interleave(per_group, 1) for part in (b, c)
        )
        dt = by_row(F.softplus, dt + self.dt_bias).clamp(*s.dt_limits)  # (n, heads)
        decay = by_row(torch.exp, self.A * dt)
        y = torch.empty_like(x)
        for t in range(n):
            S *= decay[t, :, None, None]
            S += b[t, :, :, None] * (dt[t, :, None] * x[t])[:, None]
            y[t] = (S * c[t, :, :, None]).sum(1)
        y = (y + self.D[:, None] * x).flatten(1)
        gate = by_row(F.silu, z)
        if self.norm is None:
            return y * gate
        if s.norm == "gated":
            y = y * gate
        groups = y.view(n, s.groups, -1)
        y = nanollama.rms_norm(groups, self.norm.view(s.groups, -1), s.eps).flatten(1)
        return y if s.norm == "gated" else y * gate


def mamba2_or_attention(
    config: ModelConfig, weights: Weights, prefix: str, index: int
) -> Attention | Mamba2:
    """The mixer of a layer, by its kind."""
    if config.own["kinds"][index] == "mamba":
        return Mamba2(config, weights, prefix.replace("self_attn", "mamba"))
    return Attention(config, weights, prefix, index)


class GraniteLayer(DecoderLayer):
    """Mamba2 or attention, then an MLP, or experts and an MLP."""

    mixer = staticmethod(mamba2_or_attention)  # type: ignore[assignment]
    mixture = RoutedMoE


class GraniteHybridDecoder(RecurrentDecoder):
    layer = GraniteLayer


class NemotronLayer(DecoderLayer):
    """One block: mamba2, attention, an MLP or experts."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        prefix, kind = f"model.layers.{index}", config.own["kinds"][index]
        name = f"{prefix}.input_layernorm"
        self.input_layernorm = make_norm(config, weights, name, config.n_embd)
        self.self_attn: Any = None
        self.mlp: Any = None
        if kind == "moe":
            mixture = LatentMoE if config.own["moe_latent_size"] else RoutedMoE
            self.mlp = mixture(config, weights, f"{prefix}.mlp")
        elif kind == "mlp":
            self.mlp = MLP(config, weights, f"{prefix}.mlp", config.n_ff, config.mlp_bias)
        else:
            self.self_attn = mamba2_or_attention(config, weights, f"{prefix}.self_attn", index)

    def __call__(self, x: Tensor, rotation: Rotation, cache: KVCache, batch: Batch) -> Tensor:
        norm = self.input_layernorm
        if self.mlp is not None:
            return cast("Tensor", self.mlp(x, norm, residual=x))
        return cast("Tensor", self.self_attn(x, norm, rotation, cache, batch, residual=x))


class NemotronDecoder(RecurrentDecoder):
    layer = NemotronLayer


class FalconLayer(DecoderLayer):
    """Mamba2 and attention of the same input, added up, then an MLP."""

    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        super().__init__(config, weights, index)
        self.mamba = Mamba2(config, weights, f"model.layers.{index}.mamba")

    def __call__(self, x: Tensor, rotation: Rotation, cache: KVCache, batch: Batch) -> Tensor:
        h = self.mamba(x, self.input_layernorm, rotation, cache, batch, residual=x)
        h = self.self_attn(x, self.input_layernorm, rotation, cache, batch, residual=h)
        return self.mlp(h, self.post_attention_layernorm, residual=h)


class FalconDecoder(RecurrentDecoder):
    layer = FalconLayer
