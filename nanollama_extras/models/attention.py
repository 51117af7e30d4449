"""Attention with capped scores or sinks (Gemma 2, gpt-oss) by torch's operations.

Seam: `attention` of nanollama.py, which uses torch's own operation for all other models. To remove
the feature, delete this file: such models then need the native backend, which has its own.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from nanollama import KEY_TILE


def capped_attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    num_new: int,
) -> Tensor:
    """Attention with a softcap or sinks, for which torch has no operation, KEY_TILE keys at a time,
    so that no sum depends on the number of keys (https://arxiv.org/abs/2112.05682).
    q (Hkv, rows, D): each head's `num_new` queries, then padding; sinks (H,) -> as q"""
    most = q.new_full((*q.shape[:2], 1), -1e30, dtype=torch.float32)
    total = torch.zeros_like(most)
    if sinks is not None:
        most = sinks.view(len(keys), -1, 1).repeat_interleave(num_new, dim=1)
        most = F.pad(most, (0, 0, 0, q.shape[1] - most.shape[1]))  # (Hkv, rows, 1)
        total = torch.ones_like(most)
    out = torch.zeros_like(q, dtype=torch.float32)
    for at in range(0, keys.shape[1], KEY_TILE):
        block = slice(at, at + KEY_TILE)
        scores = (q @ keys[:, block].mT).float() * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        scores += bias[:, block]
        top = torch.maximum(most, scores.amax(-1, keepdim=True))
        weight, shrink = torch.exp(scores - top), torch.exp(most - top)
        total = total * shrink + weight.sum(-1, keepdim=True)
        out = out * shrink + (weight.to(q.dtype) @ values[:, block]).float()
        most = top
    return (out / total).to(q.dtype)
