"""BitNet's ternary weights in safetensors: 2 bits each, packed in bytes, and a scale for a matrix.

Adds       `packed_tensors`: weights of 2 bits (kernels.fine, which it imports), or of 4 where 64
           does not divide the columns.
Seam       a row of METHODS in files.quantized: `packing`. models.families checks its settings.
Source     https://github.com/huggingface/transformers (src/transformers/integrations/bitnet.py)
Remove     delete this file; BitNet's packed files then say that they need it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import cast

import torch
from torch import Tensor

from nanollama import GROUP, PackedLinear, TensorSource, pack_nibbles
from nanollama_extras.kernels.fine import Fine, FineLinear

BLOCK = 64  # columns of a block of kernels.fine


def packing(settings: object) -> Callable[[Mapping[str, TensorSource]], dict[str, TensorSource]]:
    """models.families has checked the settings."""
    return packed_tensors


def packed_tensors(tensors: Mapping[str, TensorSource]) -> dict[str, TensorSource]:
    """The tensors, with NAME.weight (rows / 4, cols) and NAME.weight_scale (1) as one of (rows,
    cols). Others stay as they are, and the decoder refuses those that it does not expect."""
    found = dict(tensors)
    for name, scale in tensors.items():
        weight = tensors.get(name.removesuffix("_scale"))
        if not name.endswith(".weight_scale") or weight is None or len(weight.shape) != 2:
            continue
        if weight.kind == "U8" and weight.shape[1] % GROUP == 0 and scale.shape == (1,):
            del found[name]
            found[name.removesuffix("_scale")] = ternary(weight, scale)
    return found


def ternary(weight: TensorSource, scale: TensorSource) -> TensorSource:
    """A byte's bits 2i and 2i + 1 are a weight of the i-th quarter of the rows, plus 1."""
    quarter, num_cols = weight.shape
    shape = (4 * quarter, num_cols)

    def load(at: slice | Tensor = slice(None)) -> PackedLinear:
        rows = torch.arange(shape[0])[at]
        data = cast("Tensor", weight.load())[rows % quarter]
        shift = (2 * (rows // quarter)).unsqueeze(1)
        codes, number = (data >> shift & 3).to(torch.uint8), cast("Tensor", scale.load())
        if not is_fine:
            q = pack_nibbles((codes + 7).view(len(rows), -1, GROUP))  # 8 stands for 0
            return PackedLinear(q, number.half().expand(q.shape[:2]).contiguous())
        ones = torch.ones(len(rows), num_cols // BLOCK, dtype=torch.float16)
        return FineLinear(Fine("ONE_SCALE", 2, codes, None, None, ones, unit=float(number)))

    is_fine, num_bytes = num_cols % BLOCK == 0, weight.nbytes + scale.nbytes
    bits = 2.25 if is_fine else 4.5
    return TensorSource(shape, "ternary", num_bytes, load, is_packed=True, bits=bits)
