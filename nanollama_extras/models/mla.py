"""Multi-head latent attention (MLA): keys and values of all heads are made of one short vector.

Adds       `LatentAttention`, which caches of a token and layer that vector, its latent, and the one
           key that has RoPE: 512 + 64 numbers for DeepSeek and GLM-4.7-Flash, however many heads
           there are. `LatentDecoder`, whose layers have it, and experts with routers of any kind.
Seam       Family.layout, .gguf_layout and .decoder of these families; models.mla_config reads their
           configs. `kv_planes` of ModelConfig is 1: a value is the beginning of its key. The native
           kernels `latent_heads` and `head_linear` compute the same. Imports models.routers.
Source     https://arxiv.org/abs/2405.04434 (DeepSeek-V2)
           https://github.com/huggingface/transformers (src/transformers/models/deepseek_v3)
Remove     delete this file and the rows of these families.

A head has matrices K (nope, latent) and V (value, latent). With a query q | r and latents c, each
with a rotated key k:

    score = (K^T q) . c + r . k          out = V (sum of weight c)

So no head's keys and values are ever made, neither in prefill nor in decoding: a token's numbers
must not depend on how its prompt was cut. Long prompts pay for that: for each pair of tokens and
head, 2 latent + rope multiplications (1088) instead of nope + rope + value (512 for GLM-4.7-Flash,
320 for DeepSeek-V3). At 3,000 tokens of context, attention multiplies as often as GLM-4.7-Flash's
matrices. In native code, it takes twice as long as attention to keys and values of 256 that are
there already; a decode step takes a fifth, since it reads so much less.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from nanollama import (
    GROUP,
    Attention,
    Batch,
    KVCache,
    ModelConfig,
    Norm,
    PackedLinear,
    Rotation,
    TensorSource,
    Weights,
    quantize,
)
from nanollama_extras.models.mla_config import LatentShape
from nanollama_extras.models.routers import RoutedDecoder, RoutedLayer

if TYPE_CHECKING:
    from nanollama import Heads

Tensors = Mapping[str, TensorSource]
EPS = 1e-6  # of the norms of latents, whatever the config says: transformers' default

# ---- layouts of tensors --------------------------------------------------------------------------


def transposed(tensor: TensorSource) -> TensorSource:
    """A matrix with rows and columns exchanged. A packed one is packed again, in 8 bits, if its
    width then allows it."""
    rows, cols = tensor.shape
    packs = tensor.is_packed and rows % GROUP == 0

    def load(*at: Any) -> Tensor | PackedLinear:
        weight = tensor.load()
        weight = weight.dequantize().float() if isinstance(weight, PackedLinear) else weight
        turned = weight.T.contiguous()
        if packs:
            return quantize(turned, 8).select(*at or (slice(None),))
        return turned[at[0]] if at else turned

    kind = "F32" if tensor.is_packed and not packs else tensor.kind
    return TensorSource((cols, rows), kind, tensor.nbytes, load, packs, bits=8.5 * packs)


def rope_last(tensor: TensorSource, num_heads: int, shape: LatentShape) -> TensorSource:
    """A tensor whose heads end with the rows that RoPE turns: these in the order in which `rotate`
    pairs them."""
    num_rows = tensor.shape[0]
    if not shape.interleaved or num_rows % num_heads or num_rows // num_heads < shape.rope:
        return tensor
    rows = torch.arange(num_rows).view(num_heads, -1)
    pairs = rows[:, -shape.rope :].unflatten(1, (-1, 2)).mT.flatten(1)
    return tensor.part(torch.cat((rows[:, : -shape.rope], pairs), dim=1).flatten())


def hub_layout(tensors: Tensors, config: ModelConfig) -> dict[str, TensorSource]:
    """Tensors as `LatentAttention` wants them: kv_b_proj as k_b_proj and v_b_proj of each head."""
    shape: LatentShape = config.own["latent"]
    H, width = config.n_heads, shape.nope + shape.v_dim
    named: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        stem, _, part = name.rpartition("self_attn.")
        if part.startswith("q_b_proj."):
            named[name] = rope_last(tensor, H, shape)
        elif part.startswith("kv_a_proj_with_mqa."):
            named[name] = rope_last(tensor, 1, shape)
        elif part == "kv_b_proj.weight" and tensor.shape == (H * width, shape.latent):
            for h, rows in enumerate(torch.arange(H * width).split(width)):
                k, v = (tensor.part(each) for each in rows.split([shape.nope, shape.v_dim]))
                named[f"{stem}self_attn.k_b_proj.{h}.weight"] = transposed(k)
                named[f"{stem}self_attn.v_b_proj.{h}.weight"] = v
        else:
            named[name] = tensor
    return named


def gguf_layout(tensors: Tensors, config: ModelConfig) -> dict[str, TensorSource]:
    """Tensors of GGUF files as `LatentAttention` wants them: k_b_proj and v_b_proj, (H, ..), of
    each head. Older files have kv_b_proj, too or instead."""
    named: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"(.+\.self_attn)\.(q|[kv]_b|kv_b)_proj\.weight", name)
        stem, part = found.groups() if found else ("", "")
        if part == "q":
            named[f"{stem}.q_b_proj.weight"] = tensor
        elif part in ("k_b", "v_b") and len(tensor.shape) == 3:
            rows = torch.arange(tensor.shape[1])
            for h in range(tensor.shape[0]):
                named[f"{stem}.{part}_proj.{h}.weight"] = tensor.part(rows, h)
        elif part != "kv_b" or f"{stem}.k_b_proj.weight" not in tensors:
            named[name] = tensor
    return hub_layout(named, config)


# ---- the layers ----------------------------------------------------------------------------------


class HeadLinear:
    """A matrix for each head, (N, H cols) -> (N, H rows)."""

    def __init__(self, weights: Weights, name: str, num_heads: int, rows: int, cols: int) -> None:
        self.num_heads, self.rows, self.cols = num_heads, rows, cols
        outputs = {f"{name}.{h}": rows for h in range(num_heads)}
        self.projection: Any = weights.linear(outputs, cols)
        is_native = hasattr(self.projection, "address")
        self.run_kernel = getattr(weights.backend, "run_kernel", None) if is_native else None

    @property
    def nbytes(self) -> int:
        return int(self.projection.nbytes)

    @property
    def parts(self) -> list[Any]:
        parts: list[Any] = self.projection.parts
        return parts

    def __call__(self, x: Tensor) -> Tensor:
        if self.run_kernel is None:
            heads = x.unflatten(1, (self.num_heads, self.cols)).unbind(1)
            return torch.cat([part(one.contiguous()) for part, one in zip(self.parts, heads)], 1)
        out = torch.empty(x.size(0), self.num_heads * self.rows)
        fields = {"parts": self.projection.address, "num_heads": self.num_heads}
        return cast("Tensor", self.run_kernel("head_linear", out, x=x, **fields))


class LatentAttention(Attention):
    """Attention whose queries go to the latents: see above."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, index: int) -> None:
        self.shape = s = cast("LatentShape", config.own["latent"])
        C, H, bias = config.n_embd, config.n_heads, config.qkv_bias
        self.backend, self.index, self.sizes = weights.backend, index, (H, 1, 0)
        self.head_dim, self.q_norm, self.k_norm = s.latent + s.rope, None, None
        self.q_a_layernorm: Norm | None = None

        def norm(name: str, width: int) -> Norm:
            return Norm(weights.backend, weights.take(f"{prefix}.{name}.weight", width), EPS)

        width = s.q_latent or C
        self.q_b_proj = weights.linear({f"{prefix}.q_b_proj": H * (s.nope + s.rope)}, width)
        if s.q_latent:
            self.q_a_proj = weights.linear({f"{prefix}.q_a_proj": s.q_latent}, C, bias)
            self.q_a_layernorm = norm("q_a_layernorm", s.q_latent)
        name = f"{prefix}.kv_a_proj_with_mqa"
        self.kv_a_proj = weights.linear({name: self.head_dim}, C, bias)
        self.kv_a_layernorm = norm("kv_a_layernorm", s.latent)
        self.k_b_proj = HeadLinear(weights, f"{prefix}.k_b_proj", H, s.latent, s.nope)
        self.v_b_proj = HeadLinear(weights, f"{prefix}.v_b_proj", H, s.v_dim, s.latent)
        self.o_proj = weights.linear({f"{prefix}.o_proj": C}, H * s.v_dim, config.o_bias)

    def heads(self, qkv: Tensor, rotation: Rotation) -> Heads:
        """qkv (N, (H + 1) D) -> q and k, which are rotated already"""
        q, k, _ = qkv.unflatten(1, (-1, self.head_dim)).split(self.sizes, dim=1)
        return q if rotation.q_scale is None else q * rotation.q_scale.unsqueeze(2), k

    def latent_heads(self, q: Tensor, kv: Tensor, rotation: Rotation) -> Tensor:
        """q (N, H (nope + rope)) and kv (N, latent + rope) -> the queries to latents, rotated, and
        the key (N, (H + 1) D)"""
        s, H, half = self.shape, self.sizes[0], self.shape.rope // 2
        if self.k_b_proj.run_kernel is not None and s.latent % 16 == s.rope % 2 == 0:
            out = torch.empty(q.size(0), (H + 1) * self.head_dim)
            fields: dict[str, Any] = {"num_heads": H, "nope": s.nope, "rope": s.rope}
            fields |= {"latent": s.latent, "norm": self.kv_a_layernorm.weight, "eps": EPS}
            fields |= {"q": q, "kv": kv}
            fields |= {"parts": self.k_b_proj.projection.address}
            fields |= {"cos": rotation.cos, "sin": rotation.sin}
            return cast("Tensor", self.k_b_proj.run_kernel("latent_heads", out, **fields))
        nope, r = q.unflatten(1, (H, -1)).split([s.nope, s.rope], dim=2)
        latent, k = kv.split([s.latent, s.rope], dim=1)
        cos, sin = (x[:, :half].contiguous() for x in (rotation.cos, rotation.sin))
        turned = self.backend.rotate(torch.cat((r, k.unsqueeze(1)), dim=1), cos, sin)
        queries = self.k_b_proj(nope.flatten(1)).unflatten(1, (H, -1))
        still = torch.cat((queries, self.kv_a_layernorm(latent).unsqueeze(1)), dim=1)
        return torch.cat((still, turned), dim=2).flatten(1)

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None,
        rotation: Rotation,
        cache: KVCache,
        batch: Batch,
        residual: Tensor | None,
    ) -> Tensor:
        q = self.q_a_proj(x, norm=norm) if self.q_a_layernorm else x
        q = self.q_b_proj(q, norm=self.q_a_layernorm or norm)
        heads = self.latent_heads(q, self.kv_a_proj(x, norm=norm), rotation)
        out = cache.attend(self, heads, rotation, batch)  # (N, H latent), or wider
        if out.size(1) > self.sizes[0] * self.shape.latent:
            out = out.unflatten(1, (self.sizes[0], -1))[..., : self.shape.latent].flatten(1)
        return self.o_proj(self.v_b_proj(out), residual=residual)  # (N, C)


class LatentLayer(RoutedLayer):
    mixer = LatentAttention  # type: ignore[assignment]


class LatentDecoder(RoutedDecoder):
    layer = LatentLayer
    is_recordable = False  # as a CUDA graph
