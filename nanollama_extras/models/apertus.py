"""Apertus's activation, xIELU, whose numbers are each layer's own.

Adds       `XieluDecoder`, which reads them and gives each MLP its activation: a row of ACTS whose
           name has the numbers in it, so that the native kernels can read them, too.
Seam       Family.decoder.
Source     https://arxiv.org/abs/2411.13010
Remove     delete this file; the model_type apertus then says that it needs it.
"""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

import nanollama
from nanollama import MLP, CheckpointError, Decoder, DecoderLayer, ModelConfig, Weights

NAMES = {"alpha_p": (1,), "alpha_n": (1,), "beta": (), "eps": ()}


def xielu(alpha_p: float, alpha_n: float, beta: float, eps: float, x: Tensor) -> Tensor:
    """A parabola above 0, an integral of ELU below"""
    below = torch.expm1(x.clamp(max=eps)) - x
    return torch.where(x > 0, alpha_p * x * x, alpha_n * below) + beta * x


class XieluLayer(DecoderLayer):
    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        super().__init__(config, weights, index)
        assert isinstance(self.mlp, MLP)
        prefix = f"model.layers.{index}.mlp.act_fn"
        if listed := config.own.get("xielu"):
            numbers = listed[index]
        else:
            taken = (weights.take(f"{prefix}.{name}", *shape) for name, shape in NAMES.items())
            numbers = [number.item() for number in taken]
        if not all(map(math.isfinite, numbers)):
            raise CheckpointError(f"{weights.source}: {prefix} has numbers that are not finite")
        alpha_p, alpha_n = (F.softplus(torch.tensor(x)).item() for x in numbers[:2])
        beta, eps = numbers[2:]
        self.mlp.act = f"xielu {alpha_p!r} {beta + alpha_n!r} {beta!r} {eps!r}"
        act = functools.partial(xielu, alpha_p, beta + alpha_n, beta, eps)
        nanollama.ACTS[self.mlp.act] = act


class XieluDecoder(Decoder):
    layer = XieluLayer
