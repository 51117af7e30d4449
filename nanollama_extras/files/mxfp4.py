"""Weights in MXFP4, as gpt-oss has them: in safetensors files (quant_method mxfp4) and in GGUF.

Adds       matrices (E, rows, cols) of 4-bit floats that stay packed, made from pairs of tensors:
           blocks (E, rows, G, 16), whose bytes hold columns 2i and 2i + 1, and scales (E, rows, G).
Seam       a row of METHODS in files.quantized: `packing`; a row of REPACK: `repack`.
Source     https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf
Remove     delete this file; a model with such weights then says that it needs it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor

from nanollama import PackedLinear, TensorSource, pack_nibbles


def packed_floats(exponent: Tensor, q: Tensor) -> PackedLinear:
    """4-bit floats q (rows, G, 16) with a power of two for each group (rows, G)."""
    return PackedLinear(q, torch.exp2(exponent.float() - 128).half(), float4=True)


def repack(b: Tensor) -> PackedLinear:
    """Blocks of a GGUF file (rows, G, 17): an exponent, and 16 bytes of nibbles."""
    return packed_floats(b[..., 0], b[..., 1:].contiguous())


def packing(settings: object) -> Callable[[Mapping[str, TensorSource]], dict[str, TensorSource]]:
    """It needs no settings."""
    return packed_tensors


def packed_tensors(tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """The tensors, with NAME.weight in place of each pair NAME.blocks and NAME.scales."""
    packed = dict(tensors)
    for name, blocks in tensors.items():
        stem, _, suffix = name.rpartition(".")
        scales = tensors.get(f"{stem}.scales") if suffix == "blocks" else None
        if scales and len(blocks.shape) == 4 and scales.shape == blocks.shape[:3]:
            del packed[name], packed[f"{stem}.scales"]
            packed[f"{stem}.weight"] = mxfp4_source(blocks, scales)
    return packed


def mxfp4_source(blocks: TensorSource, scales: TensorSource) -> TensorSource:
    """The matrices of one pair of tensors."""

    def load(expert: int, rows: Tensor) -> PackedLinear:
        codes = cast("Tensor", blocks.load(expert, rows))
        columns = torch.stack((codes & 15, codes >> 4), dim=-1).flatten(-2)
        exponents = cast("Tensor", scales.load(expert, rows))
        return packed_floats(exponents, pack_nibbles(columns))

    E, num_rows, num_groups, width = blocks.shape
    shape = (E, num_rows, num_groups * width * 2)
    num_bytes = blocks.nbytes + scales.nbytes
    return TensorSource(shape, "MXFP4", num_bytes, load, is_packed=True, bits=4.5)
