"""Quantized safetensors files, made of tiny float models, and the floats that they stand for."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import oracle
import safetensors.torch
import torch
from torch import Tensor

import nanollama
from nanollama import LLM, Decoder, PackedLinear, TensorSource

# weight (rows, cols) -> tensors by the ends of their names, the floats that they stand for
Quantizer = Callable[[Tensor], tuple[dict[str, Tensor], Tensor]]
MATRICES = r"layers\.\d+\..*_proj\.weight$"
SIZES = {"Qwen3Moe": {"moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2}}
IDS = oracle.random_ids(40)


def saved(
    path: Path,
    target: Path,
    settings: dict[str, Any],
    quantizer: Quantizer,
    pattern: str = MATRICES,
    key: str = "quantization_config",
) -> tuple[Path, Path]:
    """Directories below `target` with the quantized model, and with its floats."""
    packed = oracle.rewritten(path, target / "packed", lambda c: c.update({key: settings}))
    plain = oracle.rewritten(path, target / "plain", lambda c: None)
    tensors = safetensors.torch.load_file(path / "model.safetensors")
    floats = dict(tensors)
    names = [name for name in tensors if re.search(pattern, name)]
    assert names
    for name in names:
        parts, weight = quantizer(tensors.pop(name))
        floats[name] = weight.float().contiguous()
        stem = name.removesuffix(".weight")
        tensors |= {f"{stem}.{end}": part.contiguous() for end, part in parts.items()}
    safetensors.torch.save_file(tensors, packed / "model.safetensors")
    safetensors.torch.save_file(floats, plain / "model.safetensors")
    return packed, plain


def check(packed: Path, plain: Path, bound: float = 1e-5) -> None:
    """Logits of the packed model are those of its floats, within `bound` of their spread for
    torch's kernels, and within the rounding of activations for native ones."""
    expected = LLM(plain, kernels="torch").logits(IDS)
    llm = LLM(packed, kernels="torch")
    assert any(isinstance(each, PackedLinear) for each in oracle.matrices(decoder(llm)))
    assert (llm.logits(IDS) - expected).std() <= bound * expected.std()
    native = LLM(packed, kernels="native").logits(IDS)
    assert (native - expected).std() < 0.1 * expected.std()


def decoder(llm: LLM) -> Decoder:
    return llm.engine.decoder


def sources(settings: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, TensorSource]:
    """These tensors, by name, as a file with these settings has them."""
    packing = nanollama.extra("files.quantized", "a test").read_config(settings)
    kinds = {torch.float8_e4m3fn: "F8_E4M3", torch.float8_e8m0fnu: "F8_E8M0"}
    kinds |= {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
    kinds |= {torch.int32: "I32", torch.uint32: "U32", torch.int8: "I8", torch.uint8: "U8"}
    kinds[torch.int64] = "I64"

    def source(tensor: Tensor) -> TensorSource:
        def load(*index: Any) -> Tensor:
            return tensor[index] if index else tensor

        kind = kinds[tensor.dtype]
        return TensorSource(tuple(tensor.shape), kind, tensor.nbytes, load)

    found: dict[str, TensorSource] = packing({n: source(t) for n, t in tensors.items()})
    return found


def unpacked(source: TensorSource, *index: Any) -> Tensor:
    """The floats of a packed tensor."""
    packed = source.load(*index)
    return packed.dequantize() if isinstance(packed, PackedLinear) else packed


def words(q: Tensor, bits: int) -> Tensor:
    """Numbers (.., n) of `bits` bits as a string of bits, the lowest first -> int32 (.., words)"""
    stream = (q.long().unsqueeze(-1) >> torch.arange(bits) & 1).flatten(-2)
    values = stream.unflatten(-1, (-1, 32)) << torch.arange(32)
    return values.sum(-1).to(torch.int32)  # the highest bit is the sign


def grid(weight: Tensor, bits: int, group: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Codes (rows, cols) from 0 on, float16 scales and zeros (rows, G) that approach a weight."""
    x = weight.unflatten(-1, (-1, group))
    low, high = x.aminmax(dim=-1)
    scale = ((high - low) / (2**bits - 1)).half()
    zero = (-low / scale.float()).round().clamp(0, 2**bits - 1)
    q = (x / scale.float().unsqueeze(-1) + zero.unsqueeze(-1)).round().clamp(0, 2**bits - 1)
    return q.flatten(-2).long(), scale, zero.long()


def centred(weight: Tensor, bits: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """The same, with the middle as each zero."""
    x = weight.unflatten(-1, (-1, group))
    middle = 2 ** (bits - 1)
    scale = (x.abs().amax(-1) / (middle - 0.5)).half()
    q = (x / scale.float().unsqueeze(-1)).round().clamp(-middle, middle - 1) + middle
    return q.flatten(-2).long(), scale, torch.full_like(scale, middle).long()


def floats(q: Tensor, scale: Tensor, zero: Tensor, group: int) -> Tensor:
    """(q - zero) * scale"""
    scale, zero = (part.float().repeat_interleave(group, -1) for part in (scale, zero))
    return (q - zero) * scale
