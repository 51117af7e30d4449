"""Quantized safetensors files, made of tiny float models, and the floats that they stand for."""

from __future__ import annotations

import json
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


# ---- AWQ, GPTQ and bitsandbytes ------------------------------------------------------------------

AWQ: dict[str, Any] = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
GPTQ: dict[str, Any] = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": True}
ONES = {2: 0x55555555, 4: 0x11111111, 8: 0x01010101}  # a 1 for each number of a word


NF4: dict[str, Any] = {
    "quant_method": "bitsandbytes",
    "load_in_4bit": True,
    "load_in_8bit": False,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_use_double_quant": True,
    "llm_int8_skip_modules": None,
}
MAPS = {
    "nf4": [
        *(-1, -0.69619, -0.52507, -0.39492, -0.28444, -0.18477, -0.09105, 0),
        *(0.07958, 0.16093, 0.24611, 0.33792, 0.44071, 0.56262, 0.72296, 1),
    ],
    "fp4": [sign * n / 192 for sign in (1, -1) for n in (0, 1, 128, 192, 64, 96, 32, 48)],
}
NESTED = torch.linspace(-0.993, 1, 256)  # like the dynamic map of bitsandbytes, in order


def awq_words(q: Tensor) -> Tensor:
    """Numbers (n, rows) as AutoAWQ packs them: columns 0, 2, 4, 6, 1, 3, 5, 7 of each eight."""
    eights = q.unflatten(1, (-1, 8))[..., [0, 2, 4, 6, 1, 3, 5, 7]]
    return words(eights.flatten(1), 4)


def awq(weight: Tensor, group: int = 32) -> tuple[dict[str, Tensor], Tensor]:
    q, scale, zero = grid(weight, 4, group)
    parts = {"qweight": awq_words(q.T), "qzeros": awq_words(zero.T), "scales": scale.T}
    return parts, floats(q, scale, zero, group)


def gptq(
    weight: Tensor,
    bits: int = 4,
    group: int = 32,
    is_symmetric: bool = True,
    version: str = "gptq",
    order: Tensor | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """`order`: the columns in the order in which they were quantized; a group is side by side
    there."""
    group = weight.shape[1] if group == -1 else group
    order = torch.arange(weight.shape[1]) if order is None else order[order < weight.shape[1]]
    pick = centred if is_symmetric else grid
    q, scale, zero = pick(weight[:, order], bits, group)
    expected = floats(q, scale, zero, group)
    inverse = order.argsort()
    is_v1 = version == "gptq"
    zeros = words((zero.T - int(is_v1 and bits == 3)) & (2**bits - 1), bits)
    if is_v1 and bits != 3:
        zeros = zeros - ONES[bits]
    parts = {
        "qweight": words(q[:, inverse], bits).T,
        "qzeros": zeros,
        "scales": scale.T,
        "g_idx": (torch.arange(weight.shape[1]) // group)[inverse].int(),
    }
    return parts, expected[:, inverse]


def bnb4(
    weight: Tensor,
    kind: str = "nf4",
    block: int = 64,
    is_double: bool = True,
    storage: torch.dtype = torch.uint8,
) -> tuple[dict[str, Tensor], Tensor]:
    values = torch.tensor(MAPS[kind])
    x = weight.flatten()
    blocks = torch.nn.functional.pad(x, (0, -len(x) % block)).view(-1, block)
    absmax = blocks.abs().amax(-1)
    codes = (blocks / absmax.unsqueeze(-1)).unsqueeze(-1).sub(values).abs().argmin(-1)
    flat = codes.flatten()[: len(x)].to(torch.uint8)
    state = {"quant_type": kind, "blocksize": block, "dtype": "bfloat16", "shape": weight.shape}
    parts = {"quant_map": values, "absmax": absmax}
    if is_double:
        offset = float(absmax.mean())
        wide = torch.nn.functional.pad(absmax - offset, (0, -len(absmax) % 256)).view(-1, 256)
        largest = wide.abs().amax(-1)
        nested = (wide / largest.unsqueeze(-1)).unsqueeze(-1).sub(NESTED).abs().argmin(-1)
        absmax = (NESTED[nested] * largest.unsqueeze(-1) + offset).flatten()[: len(absmax)]
        parts |= {"absmax": nested.flatten()[: len(absmax)].byte(), "nested_absmax": largest}
        parts["nested_quant_map"] = NESTED.clone()
        state |= {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": offset}
    data = json.dumps(state).encode()
    parts[f"quant_state.bitsandbytes__{kind}"] = torch.frombuffer(
        bytearray(data), dtype=torch.uint8
    )
    packed = (flat[::2] << 4 | flat[1::2]).view(storage).unsqueeze(1)
    expected = (values[codes] * absmax.unsqueeze(-1)).flatten()[: len(x)].view(weight.shape)
    return {"weight": packed, **{f"weight.{end}": part for end, part in parts.items()}}, expected
