"""Gemma 3n's layers: four streams of which a layer computes one, a learned residual, gates of which
most are 0; and keys and values that layers share, embeddings for layers, as in Gemma 4.

Adds       `Gemma3nDecoder`. Between its layers, a batch is (A, N, C): A streams.
Seam       Family.gguf_layout and Family.decoder. models.gemma_config reads the config; imports
           models.gemma4.
Source     https://github.com/huggingface/transformers (src/transformers/models/gemma3n)
           https://arxiv.org/abs/2301.13310 (AltUp), https://arxiv.org/abs/2411.07501 (LAuReL)
Remove     delete this file; Gemma 3n then says that it needs it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

import nanollama
from nanollama import Batch, KVCache, ModelConfig, Norm, Projection, Rotation, TensorSource, Weights
from nanollama_extras.models.gemma4 import Gemma4Decoder, Gemma4Layer, hub_layout
from nanollama_extras.models.gemma_config import AltUpShape

LEAST_SQUARE = 1e-5  # of a new stream's mean square, by which it is divided


def gguf_layout(
    tensors: Mapping[str, TensorSource], config: ModelConfig
) -> dict[str, TensorSource]:
    """The tensors, of which (A - 1, C, C) in one piece are matrices with names of their own."""
    named: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        stem, _, suffix = name.rpartition(".")
        if stem.startswith("model.altup_") and len(tensor.shape) == 3:
            rows = torch.arange(tensor.shape[1])
            for i in range(tensor.shape[0]):
                named[f"{stem}.{i}.{suffix}"] = tensor.part(rows, i)
        else:
            named[name] = tensor
    return hub_layout(named, config)


def empty_as(x: Tensor, run_kernel: Any, *more: int) -> Tensor:
    """An empty tensor like x, with more dimensions before its own; by the one function that
    recorded steps of kernels may call."""
    if run_kernel is None:
        return x.new_empty((*more, *x.shape))
    return torch.empty((*more, *x.shape))


class AltUp:
    """How a layer that computes one stream changes the others: it predicts all of them, and
    corrects them by the difference between the prediction and what it computed. A router weighs
    both for each token."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        self.shape: AltUpShape = config.own["altup"]
        A, C, self.eps = self.shape.num_streams, config.n_embd, config.norm_eps
        run = getattr(weights.backend, "run_kernel", None)
        self.run_kernel: Any = run if C % 16 == 0 else None

        def take(name: str, *shape: int) -> Tensor:
            return weights.take(f"{prefix}.{name}.weight", *shape, dtype=torch.float32)

        # its norm multiplies with weights, and what it norms is divided by C
        self.router = take("modality_router", A, C) * (take("router_norm", C) / C)
        self.prediction_coefs = take("prediction_coefs", A * A, A)
        self.correction_coefs = take("correction_coefs", A, A)
        scale = weights.take(f"{prefix}.correct_output_scale.weight", C)
        self.scale = scale if self.shape.scales_output else None

    def fields(self, streams: Tensor) -> dict[str, Any]:
        """Fields that the kernels have in common."""
        A, N, C = streams.shape
        sizes = {"num_streams": A, "active": self.shape.active, "stride": N * C, "cols": C}
        return {"router": self.router, "eps": self.eps, **sizes}

    def routed(self, x: Tensor, coefs: Tensor) -> Tensor:
        """Coefficients (N, rows of coefs) for rows of x (N, C). They are sums, in which torch's
        result does not depend on the number of rows; this is not so for its products."""
        x32 = x.float()
        factor = torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + self.eps)
        scores = torch.stack([(x32 * row).sum(-1) for row in self.router], dim=-1)  # (N, A)
        return (torch.tanh(scores * factor).unsqueeze(1) * coefs).sum(-1)

    def predict(self, x: Tensor) -> Tensor:
        """Predictions of all streams from all of them, (A, N, C) both"""
        predicted = empty_as(x, self.run_kernel)
        if self.run_kernel is not None:
            fields = {**self.fields(x), "coefs": self.prediction_coefs}
            self.run_kernel("altup_predict", predicted[0], x=x, **fields)
            return predicted
        coefs = self.routed(x[self.shape.active], self.prediction_coefs).to(x.dtype)
        for i, (old, of_stream) in enumerate(zip(x, coefs.chunk(len(x), dim=1))):
            y = old.clone()
            for j, other in enumerate(x):
                y += of_stream[:, j : j + 1] * other
            predicted[i] = y
        return predicted

    def correct(self, predicted: Tensor, computed: Tensor) -> tuple[Tensor, Tensor]:
        """Corrected streams (A, N, C), and the active one of them (N, C), scaled, from what a
        layer computed of it (N, C)."""
        corrected = empty_as(predicted, self.run_kernel)
        if self.run_kernel is not None:
            fields = {**self.fields(predicted), "coefs": self.correction_coefs}
            fields |= {"predicted": predicted, "corrected": corrected, "scale": self.scale}
            out = empty_as(computed, self.run_kernel)
            return corrected, self.run_kernel("altup_correct", out, x=computed, **fields)
        coefs = self.routed(computed, self.correction_coefs).to(computed.dtype) + 1
        innovation = computed - predicted[self.shape.active]
        for i, old in enumerate(predicted):
            corrected[i] = old + coefs[:, i : i + 1] * innovation
        first = corrected[self.shape.active]
        return corrected, first if self.scale is None else first * self.scale

    def add(self, streams: Tensor, added: Tensor, norm: Norm) -> Tensor:
        """Add norm(added) (N, C) to all streams (A, N, C) but the first, in place."""
        if self.run_kernel is None:
            streams[1:] += norm(added)
            return streams
        fields = {"weight": norm.weight, "cols": added.size(1), "eps": norm.eps}
        for i in range(1, self.shape.num_streams):
            self.run_kernel("norm", streams[i], x=added, residual=streams[i], **fields)
        return streams


class Gates(Projection):
    """Gate and up of an MLP; gates below a cutoff are 0, and others what they are above it."""

    def __init__(self, inner: Projection, width: int, cutoff: float, run_kernel: Any) -> None:
        super().__init__(inner.parts)
        self.inner, self.width, self.cutoff = inner, width, cutoff
        self.run_kernel = run_kernel if width % 16 == 0 else None

    def __call__(self, x: Tensor, *args: Any, **fields: Any) -> Tensor:
        """x (N, C) -> gate | up (N, 2 F)"""
        y = self.inner(x, *args, **fields)
        if self.run_kernel is not None:
            run = cast("Any", self.run_kernel)
            return cast("Tensor", run("cut_gates", y, cols=self.width, factor=self.cutoff))
        gate = y[:, : self.width].contiguous()
        gate = gate - gate.mean(-1, keepdim=True)
        deviation = gate.pow(2).mean(-1, keepdim=True).sqrt()
        y[:, : self.width] = F.relu(gate - deviation * self.cutoff)
        return y


class Gemma3nLayer(Gemma4Layer):
    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        super().__init__(config, weights, index)
        prefix, C, shape = f"model.layers.{index}", config.n_embd, config.own["altup"]
        self.altup = AltUp(config, weights, f"{prefix}.altup")
        rank, laurel = shape.laurel_rank, f"{prefix}.laurel"
        self.laurel_left = weights.linear({f"{laurel}.linear_left": rank}, C)
        self.laurel_right = weights.linear({f"{laurel}.linear_right": C}, rank)
        self.post_laurel_norm = nanollama.make_norm(
            config, weights, f"{laurel}.post_laurel_norm", C
        )
        if (cutoff := shape.cutoffs[index]) is not None:
            mlp, width = cast("nanollama.MLP", self.mlp), config.own["shape"].n_ffs[index]
            mlp.gate_up_proj = Gates(mlp.gate_up_proj, width, cutoff, self.run_kernel)

    def __call__(self, x: Tensor, rotation: Rotation, cache: KVCache, batch: Batch) -> Tensor:
        """All streams (A, N, C) -> (A, N, C)"""
        predicted = self.altup.predict(x)
        active, norm = predicted[self.altup.shape.active], cast("Norm", self.input_layernorm)
        normed = norm(active)
        learned = self.laurel_right(self.laurel_left(normed))
        residual = self.post_laurel_norm(learned, norm(active, active))
        added = self.self_attn(normed, None, rotation, cache, batch, None)
        h = cast("Norm", self.post_self_attn_layernorm)(added, residual)
        h = self.scaled(h, 0.5**0.5)
        added = self.mlp(h, self.post_attention_layernorm)
        h = cast("Norm", self.post_mlp_layernorm)(added, h)
        corrected, first = self.altup.correct(predicted, h)
        added = self.gated(self.per_layer_input_gate(first), batch.memo["per_layer"])
        added = self.per_layer_projection(added)
        return self.altup.add(corrected, added, self.post_per_layer_input_norm)


class Streams:
    """Makes A streams of one, and one of A: each further stream is a projection that gets the mean
    square of the first one."""

    def __init__(self, config: ModelConfig, weights: Weights) -> None:
        C, num = config.n_embd, config.own["altup"].num_streams
        self.num_streams = num
        run = getattr(weights.backend, "run_kernel", None)
        self.run_kernel: Any = run if C % 16 == 0 else None
        self.projections, self.unembeddings = (
            [weights.linear({f"model.{name}.{i}": C}, C) for i in range(num - 1)]
            for name in ("altup_projections", "altup_unembed_projections")
        )

    def matched(
        self, x: Tensor, like: Tensor, out: Tensor, residual: Tensor | None, factor: float
    ) -> Tensor:
        """out = (residual + x with the mean square of `like`) * factor, (N, C) all"""
        if self.run_kernel is not None:
            numbers = {"factor": factor, "least": LEAST_SQUARE, "cols": x.size(1)}
            fields = {"x": x, "like": like, "residual": residual}
            return cast("Tensor", self.run_kernel("match_scale", out, **fields, **numbers))
        mine, theirs = (each.float().pow(2).mean(-1, keepdim=True) for each in (x, like))
        y = x * (theirs.sqrt() / mine.clamp(min=LEAST_SQUARE).sqrt()).to(x.dtype)
        return out.copy_((y if residual is None else residual + y) * factor)

    def spread(self, x: Tensor) -> Tensor:
        """(N, C) -> (A, N, C)"""
        streams = empty_as(x, self.run_kernel, self.num_streams)
        if self.run_kernel is None:
            streams[0] = x
        else:
            self.run_kernel("product", streams[0], x=x, cols=x.size(1), factor=1.0)
        for i, project in enumerate(self.projections, 1):
            self.matched(project(x), x, streams[i], None, 1.0)
        return streams

    def merged(self, streams: Tensor) -> Tensor:
        """(A, N, C) -> (N, C)"""
        total, num = streams[0], self.num_streams
        for i, project in enumerate(self.unembeddings, 1):
            out, factor = empty_as(total, self.run_kernel), 1 / num if i == num - 1 else 1.0
            total = self.matched(project(streams[i]), streams[0], out, total, factor)
        return total


class Gemma3nDecoder(Gemma4Decoder):
    layer = Gemma3nLayer

    def __init__(self, config: ModelConfig, weights: Weights, kv_dtype: str = "auto") -> None:
        # as llama.cpp, whose files have these matrices in floats
        weights.sensitive |= {*filter(re.compile(r"altup|laurel").search, weights.tensors)}
        self.streams = Streams(config, weights)
        super().__init__(config, weights, kv_dtype)

    def embedded(self, batch: Batch) -> Tensor:
        return self.streams.spread(super().embedded(batch))

    def merged(self, x: Tensor) -> Tensor:
        return self.streams.merged(x)
