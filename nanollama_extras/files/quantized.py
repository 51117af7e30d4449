"""Quantized safetensors files: the format that a config describes, and steps common to formats.

Adds       `read_config`, which finds the format's module, and the steps from a format's codes,
           scales and zero points to PackedLinears: groups of 32 columns of 4 or 8 bits.
Seam       ModelConfig.packing: `read_config` gives it from `quantization_config` (MLX writes
           `quantization`, and so does ModelOpt in hf_quant_config.json), and it turns a file's
           tensors into packed ones. A format is a module whose `packing(settings)` makes it, and a
           row of METHODS.
Imports    the module of the format, by its name in METHODS.
Remove     delete this file and the modules of METHODS; quantized safetensors files then say that
           they need it.

Scales that float16 holds stay float16. Others are float32, which native kernels round to float16.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import Tensor

from nanollama import (
    GROUP,
    CheckpointError,
    ModelConfig,
    PackedLinear,
    TensorSource,
    check_value,
    excerpt,
    extra,
    pack_nibbles,
    preferred,
)

Tensors = Mapping[str, TensorSource]
Packing = Callable[[Tensors], Tensors]
Settings = Mapping[str, Any]
Load = Callable[..., "Tensor | PackedLinear"]

# quant_method of quantization_config -> the module whose `packing(settings)` reads its tensors
METHODS = {
    "fp8": "files.fp8",
    "fbgemm_fp8": "files.fp8",
    "awq": "files.gptq",
    "gptq": "files.gptq",
    "auto-round": "files.gptq",
    "mlx": "files.mlx",
    "compressed-tensors": "files.compressed",
    "modelopt": "files.nvfp4",
    "mxfp4": "files.mxfp4",
    "bitnet": "files.bitnet",
    "bitsandbytes": "files.bitsandbytes",
    "torchao": "files.torchao",
}


def read_config(settings: Any) -> Callable[..., Tensors]:
    """What packs the tensors of files with these settings; it takes them and perhaps the model's
    ModelConfig. Raises CheckpointError."""
    method = method_of(settings) if isinstance(settings, Mapping) else None
    if method not in METHODS:
        raise CheckpointError(
            f"quantization_config {excerpt(settings)} is not supported; take GGUF, float weights "
            f"or one of {', '.join(METHODS)}"
        )
    settings = {**settings, "quant_method": method}
    packing: Packing = extra(METHODS[method], f"quant_method {method}").packing(settings)
    return functools.partial(packed, packing)


def method_of(settings: Settings) -> str:
    """The quant_method of settings, which ModelOpt and MLX leave out."""
    method = settings.get("quant_method")
    if method is None and "quant_algo" in settings:
        return "modelopt"
    if method is None and "group_size" in settings:
        return "mlx"
    return str(method).removeprefix("intel/")  # of auto-round


# Matrices -> the field of ModelConfig that tells whether they have biases
BIASES = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj", "qkv_proj"), "qkv_bias"),
    "o_proj": "o_bias",
    **dict.fromkeys(("gate_proj", "up_proj", "down_proj", "gate_up_proj"), "mlp_bias"),
}


def packed(packing: Packing, tensors: Tensors, config: ModelConfig | None = None) -> Tensors:
    """Packed tensors, without biases of zeros that the model has not: AutoGPTQ gives every matrix
    a bias."""
    found = dict(packing(tensors))
    for name in stems(found, ".bias") if config else ():
        own = BIASES.get(name.rpartition(".")[2])
        weight = found.get(f"{name}.weight")
        is_unknown = own and weight and weight.is_packed and not getattr(config, own)
        if is_unknown and not bool(cast("Tensor", found[f"{name}.bias"].load()).any()):
            del found[f"{name}.bias"]
    return found


# ---- settings and tensors, checked ---------------------------------------------------------------


def choice(settings: Settings, key: str, *choices: Any, default: Any = None) -> Any:
    """One of `choices`; of these, None and `default` stand for a value that is absent."""
    value = settings.get(key)
    value = default if value is None else value
    is_valid = any(type(value) is type(each) and value == each for each in choices)
    needed = " or ".join(map(str, choices))
    check_value(is_valid, f"quantization_config: {key}", value, needed)
    return value


def width(settings: Settings, key: str, least: int = 1, default: Any = None) -> int:
    """A number of columns or rows that share a scale."""
    value = settings.get(key, default)
    is_valid = type(value) is int and least <= value < 2**31
    check_value(is_valid, f"quantization_config: {key}", value, f"an integer from {least} on")
    return cast("int", value)


def stems(tensors: Tensors, suffix: str) -> Iterator[str]:
    """The beginnings of names that end in this suffix."""
    return (name.removesuffix(suffix) for name in list(tensors) if name.endswith(suffix))


def check_found(found: object, method: str, suffix: str) -> None:
    """Raises CheckpointError where a file has no tensors of the format in its config."""
    if not found:
        raise CheckpointError(
            f"quantization_config says {method}, but no tensor is named *{suffix}; the config is "
            "of other files, or the weights are floats: then remove it"
        )


def part_of(tensors: Tensors, name: str, kinds: str, shape: tuple[int, ...]) -> TensorSource:
    """The tensor of a name. Raises CheckpointError if it is missing, or of a kind other than the
    `kinds`, or of another shape, in which -1 is any length."""
    found = tensors.get(name)
    if found is None:
        raise CheckpointError(f"tensor {excerpt(name)} is missing, which its quantization needs")
    if found.kind not in kinds.split():
        needed = " or ".join(kinds.split())
        raise CheckpointError(f"tensor {excerpt(name)} is of type {found.kind}; {needed} is needed")
    fits = len(found.shape) == len(shape) and all(
        want in (-1, have) for want, have in zip(shape, found.shape)
    )
    if not fits:
        raise CheckpointError(
            f"tensor {excerpt(name)} has shape {found.shape}; its quantization asks for "
            f"{str(shape).replace('-1', 'any')}"
        )
    return found


def check_width(name: str, found: float, bits: int) -> None:
    """Raises CheckpointError for a matrix whose shapes are those of other `bits` than its config
    says."""
    if found != bits and found in (2, 3, 4, 5, 6, 8):
        raise CheckpointError(
            f"tensor {excerpt(name)} has {found:g} bits by its shapes; quantization_config says "
            f"{bits}, and nothing else of this layer"
        )


FLOATS = "F16 BF16 F32"


# ---- codes, scales and offsets to groups of 32 ---------------------------------------------------


def packed_source(
    title: str, shape: tuple[int, ...], bits: float, load: Load, *parts: TensorSource | None
) -> TensorSource:
    """A matrix (rows, cols), or matrices (E, rows, cols), of which `load` gives rows in `bits` a
    weight, with scales and offsets, made of `parts` of the file. `load` gives floats where 32 does
    not divide the columns."""
    num_bytes = sum(part.nbytes for part in parts if part is not None)
    if shape[-1] % GROUP:
        return TensorSource(shape, f"{title}, unpacked", num_bytes, load)
    kind = f"{title}, packed as {8 if bits >= 8 else 4} bits"
    return TensorSource(shape, kind, num_bytes, load, is_packed=True, bits=bits)


def unpacked_bits(words: Tensor, bits: int) -> Tensor:
    """Integers (.., W) that hold numbers of `bits` bits, lowest bits first, perhaps across their
    borders -> (.., numbers) uint8"""
    data = words.contiguous().view(torch.uint8)
    if bits == 8:
        return data
    if bits in (2, 4):
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
        return (data.unsqueeze(-1) >> shifts & (2**bits - 1)).flatten(-2)
    eights = data.unflatten(-1, (-1, bits)).to(torch.int16)  # the bytes of eight numbers
    found = []
    for start in range(0, 8 * bits, bits):
        byte, shift = divmod(start, 8)
        number = eights[..., byte] >> shift
        if shift + bits > 8:
            number = number | eights[..., byte + 1] << (8 - shift)
        found.append((number & (2**bits - 1)).to(torch.uint8))
    return torch.stack(found, dim=-1).flatten(-2)


def spread(x: Tensor, num_cols: int, group: int) -> Tensor:
    """Numbers of groups (rows, G) -> of groups of 32 columns (rows, num_cols / 32), where `group`
    is a multiple of 32 or all columns"""
    wide = x.repeat_interleave(max(1, group // GROUP), dim=-1)
    return wide[..., : num_cols // GROUP].contiguous()


def halved(*numbers: Tensor) -> list[Any]:
    """Scales and offsets in float16 if it holds all of them, else in float32. Raises
    CheckpointError for numbers beyond it."""
    floats = [x.float() for x in numbers]
    halves = [x.to(torch.float16) for x in floats]
    if not all(bool(x.isfinite().all()) for x in halves):
        raise CheckpointError("a scale is too large for float16, infinite or NaN")
    return halves if all(bool((h == x).all()) for h, x in zip(halves, floats)) else floats


def grouped(q: Tensor, scale: Tensor, offset: Tensor | None = None) -> PackedLinear:
    """A PackedLinear of q (rows, G, 32 or 16 bytes), with scales and offsets (rows, G). Raises
    CheckpointError for numbers beyond float16."""
    if offset is None:
        return PackedLinear(q, *halved(scale))
    return PackedLinear(q, *halved(scale, offset))


def affine(
    q: Tensor, scale: Tensor, offset: Tensor | None, bits: int, group: int = GROUP
) -> PackedLinear:
    """w = q * scale + offset, or without an offset (q - middle) * scale, where the middle is
    2^(bits - 1): q (rows, cols) from 0 to 2^bits - 1, scale and offset (rows, cols / 32), which are
    the same for `group` columns."""
    groups = q.unflatten(-1, (-1, GROUP))
    if offset is None:
        if bits <= 4:
            groups = groups + (8 - 2 ** (bits - 1))
        else:
            groups = (groups.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)
    elif bits == 8:
        offset, groups = offset.float() + 128 * scale.float(), groups ^ 128
    packed = grouped(pack_nibbles(groups) if bits <= 4 else groups.view(torch.int8), scale, offset)
    return wide(packed, group) if bits <= 4 else packed


def wide(packed: PackedLinear, group: int) -> PackedLinear:
    """A weight of 4 bits whose scales are the same for `group` columns, as native kernels hold it
    in fewer bytes"""
    kind: Any = preferred("kernels.fine", "WideLinear", None)
    if kind is None or group % GROUP:
        return packed
    return cast("PackedLinear", kind(packed.q, packed.scale, packed.offset).widened(group))


def rounded(weight: Tensor) -> PackedLinear:
    """Floats (rows, cols) rounded to 8 bits in groups of 32."""
    groups = weight.unflatten(-1, (-1, GROUP))
    scale = (groups.abs().amax(-1) / 127).to(torch.float16)
    divisor = torch.where(scale == 0, 1.0, scale.float()).unsqueeze(-1)
    q = (groups / divisor).round_().clamp_(-127, 127).to(torch.int8)
    return grouped(q, scale)


class WholeMatrix:
    """The last matrix that was read whole and packed, for formats whose rows are not side by side
    in the file: kept until its last row is taken, so that it is read once."""

    def __init__(self, pack: Callable[[], PackedLinear]) -> None:
        self.pack = pack
        self.packed: PackedLinear | None = None

    def load(self, at: slice | Tensor = slice(None)) -> PackedLinear:
        packed = self.pack() if self.packed is None else self.packed
        last = packed.shape[0] - 1
        self.packed = None if last in torch.arange(last + 1)[at] else packed
        return packed.select(at)


def renamed(tensors: Tensors, change: Callable[[str], str]) -> dict[str, TensorSource]:
    """The tensors under other names."""
    return {change(name): tensor for name, tensor in tensors.items()}
