"""Mixtures of experts with other routers than a softmax: GLM-4.5, MiniMax-M2, ERNIE 4.5 and others.

Adds       `RoutedMoE`, whose router weighs by sigmoids, a corrected softmax or sparsemixer, in the
           best groups of experts only, and whose shared expert has no gate. The native kernel
           `experts` computes the same. `LatentMoE`, whose experts are narrower than the model.
Seam       Family.decoder names `RoutedDecoder`, whose layers have it as their `mixture`.
           ModelConfig.own has a Routing. Imports models.layers and models.routing.
Source     https://arxiv.org/abs/2412.19437 (DeepSeek-V3), 2409.12136 (sparsemixer)
Remove     delete this file; the families that name it then say that they need it.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor

from nanollama import MLP, Experts, Linear, ModelConfig, MoE, Norm, Weights
from nanollama_extras.models.layers import VariedDecoder, VariedLayer
from nanollama_extras.models.routing import Routing


def sigmoid(x: Tensor) -> Tensor:
    """torch's own depends on the number of elements; this is the softmax of x and 0."""
    return torch.stack((x, torch.zeros_like(x)), dim=-1).softmax(dim=-1)[..., 0]


def best_groups(ranks: Tensor, routing: Routing) -> Tensor:
    """The ranks of experts (N, E), -inf for those outside the best groups"""
    groups = ranks.unflatten(1, (routing.num_groups, -1))
    good = groups.topk(routing.group_best, dim=-1)[0].sum(dim=-1)  # (N, groups)
    best = good.topk(routing.groups_used, dim=-1)[1]
    is_out = torch.ones_like(good, dtype=torch.bool).scatter(1, best, False)
    return groups.masked_fill(is_out.unsqueeze(2), -torch.inf).flatten(1)


def mix_sparsely(scores: Tensor, num_used: int, jitter: float) -> tuple[Tensor, Tensor]:
    """Sparsemixer: the best expert, the best of the others, ..; each with its share in a softmax of
    those scores left that are, within the jitter, as good as it -> as `choose`"""
    left, weights, chosen = scores, [], []
    for _ in range(num_used):
        most, best = left.max(dim=-1, keepdim=True)
        is_worse = most - left > 2 * jitter * scores.abs().maximum(most)
        shares = left.masked_fill(is_worse, -torch.inf).softmax(dim=-1)
        weights.append(shares.gather(1, best))
        chosen.append(best)
        left = left.scatter(1, best, -torch.inf)
    return torch.cat(weights, dim=1), torch.cat(chosen, dim=1)


class RoutedMoE(MoE):
    """A mixture with a router of any kind, and perhaps an expert that runs for every token."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        super().__init__(config, weights, prefix)
        self.read_routing(config, weights, prefix)

    def read_routing(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        """Read what the router and the expert for every token need."""
        self.routing: Routing = config.own.get("routing", Routing())
        self.correction: Tensor | None = None
        if self.routing.correction:
            name, count = f"{prefix}.gate.e_score_correction.bias", self.config.count
            found = weights.tensors.get(name)
            shape = (1, count) if found and found.shape == (1, count) else (count,)
            self.correction = weights.take(name, *shape, dtype=torch.float32).view(-1)
        if width := self.routing.n_ff_shared:
            name = f"{prefix}.shared_expert"
            self.shared_expert = MLP(config, weights, name, width, config.mlp_bias)

    def plain(self, x: Tensor, residual: Tensor | None, *routed: Tensor) -> Tensor:
        if self.shared_expert is not None and self.shared_expert_gate is None:
            residual = self.shared_expert(x, residual=residual)
        return super().plain(x, residual, *routed)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        routing, num_used = self.routing, self.config.num_used
        if routing.scoring == "sparsemixer":
            return mix_sparsely(scores, num_used, routing.jitter)
        weights = sigmoid(scores) if routing.scoring == "sigmoid" else scores.softmax(dim=-1)
        ranks = scores if routing.num_groups == 1 else weights  # sigmoids may be equal
        ranks = ranks if self.correction is None else weights + self.correction
        if routing.num_groups > 1:
            ranks = best_groups(ranks, routing)
        chosen = ranks.topk(num_used, dim=-1)[1]
        weight = weights.gather(1, chosen)
        if self.config.renormalized:
            weight = weight / (weight.sum(dim=-1, keepdim=True) + routing.least)
        return weight * routing.factor, chosen

    def mix(self, x: Tensor, y: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        if not self.routing.scales_input:
            return super().mix(x, y, weight, chosen)
        for share, expert in zip(weight.to(x.dtype).split(1, 1), chosen.split(1, 1)):
            y = super().mix(x * share, y, torch.ones_like(share), expert)
        return y


class LatentMoE(RoutedMoE):
    """A mixture whose experts read a projection of the input to fewer columns, and whose sum is
    projected back."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        self.config = experts = cast("Experts", config.experts)
        self.backend, C, latent = weights.backend, config.n_embd, config.own["moe_latent_size"]
        self.gate = Linear(weights.take(f"{prefix}.gate.weight", experts.count, C))
        narrow = dataclasses.replace(config, n_embd=latent)
        self.experts = [
            MLP(narrow, weights, f"{prefix}.experts.{i}", experts.n_ff, experts.bias)
            for i in range(experts.count)
        ]
        self.shared_expert = self.shared_expert_gate = None
        self.read_routing(config, weights, prefix)
        bias = config.mlp_bias
        self.fc1_latent_proj = weights.linear({f"{prefix}.fc1_latent_proj": latent}, C, bias)
        self.fc2_latent_proj = weights.linear({f"{prefix}.fc2_latent_proj": C}, latent, bias)

    def __call__(self, x: Tensor, norm: Norm | None, residual: Tensor | None = None) -> Tensor:
        x = norm(x) if norm else x
        if self.shared_expert is not None:
            residual = self.shared_expert(x, residual=residual)
        scores = self.gate(x).float()
        narrow = self.fc1_latent_proj(x)
        mixed = self.mix(narrow, torch.zeros_like(narrow), *self.choose(scores))
        return self.fc2_latent_proj(mixed, residual=residual)


class RoutedLayer(VariedLayer):
    mixture = RoutedMoE


class RoutedDecoder(VariedDecoder):
    layer = RoutedLayer

    def __init__(self, config: ModelConfig, weights: Weights, kv_dtype: str = "auto") -> None:
        weights.used |= prediction_tensors(weights.tensors, config.n_layers)
        bias = "lm_head.bias" in weights.tensors
        weights.used |= {"lm_head.bias"} if bias else set()
        super().__init__(config, weights, kv_dtype)
        if bias:
            self.lm_head = weights.linear({"lm_head": config.n_vocab}, config.n_embd, True)


def prediction_tensors(names: Iterable[str], n_layers: int) -> set[str]:
    """The tensors of blocks that predict further tokens, which lie behind the layers."""
    block = re.compile(r"(?:model\.layers|blk)\.(\d+)\.")
    marks = {int(found[1]) for name in names if "eh_proj" in name and (found := block.match(name))}
    return {
        name
        for name in names
        if re.match(r"(model\.)?mtp", name)
        or ((found := block.match(name)) and int(found[1]) in marks and int(found[1]) >= n_layers)
    }
