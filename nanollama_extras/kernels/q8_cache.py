"""Keys and values in 8 bits by torch's operations: `--kv-dtype q8` without native kernels.

Adds       a KVCache whose strips hold int8 with float16 scales.
Seam       `Backend.new_cache` takes `Q8Cache` for the type q8.
Remove     delete this file; --kv-dtype q8 then says that it needs it, except with native kernels,
           which have their own.
"""

from __future__ import annotations

import torch
from torch import Tensor

from nanollama import KVCache, head_bytes


def num_scales(head_dim: int) -> int:
    """Number of scales of a head's key or value."""
    return (head_bytes(head_dim, "q8") - head_dim) // 2


class Q8Cache(KVCache):
    """A head's bytes are its int8 elements, then the scales of its groups."""

    def encoded(self, x: Tensor) -> Tensor:
        groups = x.float().unflatten(-1, (num_scales(x.shape[-1]), -1))
        scale = groups.abs().amax(-1) / 127
        divisor = torch.where(scale == 0, 1.0, scale).unsqueeze(-1)
        q = (groups / divisor).round_().to(torch.int8).flatten(-2)
        return torch.cat((q.view(torch.uint8), scale.half().view(torch.uint8)), dim=-1)

    def decoded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        D = self.config.head_dim
        q = x[..., :D].view(torch.int8).unflatten(-1, (num_scales(D), -1))
        scale = x[..., D:].contiguous().view(torch.float16).unsqueeze(-1)
        y: Tensor = q.to(dtype) * scale.to(dtype)
        return y.flatten(-2)
