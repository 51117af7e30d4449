"""Models as directories of safetensors whose matrices are packed as compressed-tensors has them.

Adds       `convert_to_directory`: pack-quantized weights of 4 or 8 bits, symmetric, in groups of
           32, which vLLM and transformers read, too; or floats of another type.
Seam       commands/convert.py calls it. Imports files.conversion, files.gguf_writer,
           files.mixtures and files.quantizers.
Remove     delete this file; a directory as OUT then says that it needs it.
Source     https://github.com/vllm-project/compressed-tensors (compressors/pack_quantized)
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanollama import (
    GROUP,
    QUANTIZED,
    CheckpointError,
    Json,
    TensorSource,
    canonical_name,
    find_family,
    read_json,
    read_safetensors,
    weight_files,
)
from nanollama_extras.files.conversion import Plan, Written, floats, importance_of, merged_tensors
from nanollama_extras.files.gguf_writer import complete_or_absent
from nanollama_extras.files.quantizers import (
    FLOATS,
    Gain,
    Groups,
    column_weights,
    levels,
    symmetric_scales,
)

BITS = {"q4": 4, "Q4_0": 4, "q8": 8, "Q8_0": 8}  # key of mixtures.MIXTURES -> bits of a code
COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "additional_chat_templates")
NOT_COPIED = re.compile(r"config\.json|.*\.index\.json|adapter_.*")
PIECE = 1 << 24  # weights in memory at a time


@dataclass(frozen=True, slots=True)
class NewTensor:
    """A tensor to be written: its type and shape, and its bytes, a piece at a time."""

    name: str
    kind: str  # as safetensors names it
    shape: tuple[int, ...]
    pieces: Callable[[], Iterator[bytes]]

    @property
    def nbytes(self) -> int:
        match = re.search(r"\d+", self.kind)
        return math.prod(self.shape) * int(match[0] if match else 8) // 8


def convert_to_directory(
    plan: Plan, target: Path, force: bool = False, done: Callable[[int, int], None] | None = None
) -> Written:
    """Write a model of safetensors as another directory, which appears when it is complete. `done`
    receives the bytes written so far and in the end. Raises NanollamaError."""
    path = plan.checkpoint.path
    if plan.checkpoint.format != "safetensors":
        raise CheckpointError(f"{path}: only safetensors become a directory; name a .gguf file")
    config = read_json(path / "config.json")
    if any(map(config.get, QUANTIZED)):
        raise CheckpointError(f"{path}: its weights are quantized already; name a .gguf file")
    if plan.quantize and plan.quantize not in (*BITS, *FLOATS):
        known = ", ".join((*BITS, *FLOATS))
        raise CheckpointError(f"{plan.quantize} is a type of GGUF files; for a directory: {known}")
    gain = Gain()
    tensors, ignored = new_tensors(plan, gain)
    if bits := BITS.get(plan.quantize or ""):
        config["quantization_config"] = quantization(bits, ignored)
    total, written = sum(tensor.nbytes for tensor in tensors), 0
    with complete_or_absent(target, total, force) as scratch:
        scratch.mkdir()
        copy_files(plan, scratch)
        (scratch / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
        with open(scratch / "model.safetensors", "wb") as file:
            file.write(header(tensors))
            for tensor in tensors:
                for piece in tensor.pieces():
                    file.write(piece)
                    written += len(piece)
                    if done:
                        done(written, total)
    by_kind: dict[str, int] = {}
    for tensor in tensors:
        by_kind[tensor.kind] = by_kind.get(tensor.kind, 0) + tensor.nbytes
    return Written(total, by_kind, (), gain)


def copy_files(plan: Plan, target: Path) -> None:
    """The files of the tokenizer, the templates and so on; a template of the plan's instead"""
    path = plan.checkpoint.path
    for file in {file for pattern in COPIED for file in path.glob(pattern)}:
        if file.is_dir():
            shutil.copytree(file, target / file.name)
        elif not NOT_COPIED.fullmatch(file.name):
            shutil.copyfile(file, target / file.name)
    if plan.template is not None:
        (target / "chat_template.jinja").write_text(plan.template, encoding="utf-8")


def header(tensors: list[NewTensor]) -> bytes:
    """The head of a safetensors file (https://huggingface.co/docs/safetensors)"""
    head: Json = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.nbytes
        head[tensor.name] = {
            "dtype": tensor.kind,
            "shape": tensor.shape,
            "data_offsets": [offset, end],
        }
        offset = end
    raw = json.dumps(head).encode()
    raw += b" " * (-len(raw) % 8)
    return len(raw).to_bytes(8, "little") + raw


def quantization(bits: int, ignored: list[str]) -> Json:
    """The quantization_config of weights in `bits`"""
    weights: Json = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group"}
    weights |= {"group_size": GROUP, "dynamic": False, "actorder": None, "observer": "mse"}
    group: Json = {"targets": ["Linear"], "weights": weights, "format": "pack-quantized"}
    group |= {"input_activations": None, "output_activations": None}
    return {
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "format": "pack-quantized",
        "config_groups": {"group_0": group},
        "ignore": ignored,
        "kv_cache_scheme": None,
    }


def new_tensors(plan: Plan, gain: Gain) -> tuple[list[NewTensor], list[str]]:
    """The tensors to be written, and the matrices of the model's layers that stay floats"""
    checkpoint = plan.checkpoint
    family, bits = find_family(checkpoint.config.model_type), BITS.get(plan.quantize or "")
    merged = merged_tensors(plan) if plan.adapter else {}
    found: list[NewTensor] = []
    ignored: list[str] = []
    for file in weight_files(checkpoint.path):
        for name, tensor in read_safetensors(checkpoint.path / file).items():
            ours = canonical_name(name, family)
            module = ours.removesuffix(".weight")
            if plan.adapter and module in plan.adapter.modules:
                tensor = merged_source(tensor, merged[ours], plan, module)
            if bits and is_packable(ours, tensor):
                weight = importance_of(ours, plan.importance)
                found += packed_tensors(name, tensor, bits, weight, gain)
                continue
            if len(tensor.shape) == 2 and "embed_tokens" not in ours:
                ignored.append(name.removesuffix(".weight"))
            found.append(plain_tensor(name, tensor, plan.quantize))
    return found, ignored


def merged_source(
    tensor: TensorSource, merged: TensorSource, plan: Plan, module: str
) -> TensorSource:
    """A merged matrix for the file. Raises CheckpointError where the decoder has its rows in
    another order, or is made of parts."""
    if merged.shape != tensor.shape or nanollama_order(plan):
        raise CheckpointError(f"{plan.adapter.path}: {module} cannot be merged; name a .gguf file")
    return dataclasses.replace(merged, kind=tensor.kind)


def nanollama_order(plan: Plan) -> bool:
    """Whether the decoder has rows of queries and keys in another order than the file"""
    from_file = find_family(plan.checkpoint.config.model_type).interleaved
    rope = plan.checkpoint.config.rope
    return from_file or rope["n_rot"] != plan.checkpoint.config.head_dim


def is_packable(name: str, tensor: TensorSource) -> bool:
    """Whether a matrix of a layer, by the decoder's name, is packed"""
    is_matrix = len(tensor.shape) == 2 and name.endswith("_proj.weight")
    return is_matrix and ".layers." in name and tensor.shape[1] % GROUP == 0


def plain_tensor(name: str, tensor: TensorSource, quantize: str | None) -> NewTensor:
    """A tensor as it is, or in the floats that are asked for"""
    kind = quantize if quantize in FLOATS and tensor.kind in FLOATS else tensor.kind
    dtype = FLOATS.get(str(kind))

    def pieces() -> Iterator[bytes]:
        for at in row_pieces(tensor):
            part = tensor.load(*at)
            assert isinstance(part, Tensor)
            part = part.to(dtype) if dtype else part
            yield part.contiguous().flatten().view(torch.uint8).numpy().tobytes()

    return NewTensor(name, str(kind), tensor.shape, pieces)


def row_pieces(tensor: TensorSource) -> Iterator[tuple[slice, ...]]:
    """Rows of a tensor, some at a time"""
    if not tensor.shape or not math.prod(tensor.shape):
        yield ()
        return
    step = max(1, PIECE * tensor.shape[0] // math.prod(tensor.shape))
    yield from ((slice(at, at + step),) for at in range(0, tensor.shape[0], step))


def packed_tensors(
    name: str, tensor: TensorSource, bits: int, weight: Tensor | None, gain: Gain
) -> Iterator[NewTensor]:
    """NAME_packed, NAME_scale and NAME_shape of a matrix NAME"""
    num_rows, num_cols = tensor.shape
    kind = tensor.kind if tensor.kind in FLOATS else "F32"
    scales: list[bytes] = []

    def codes() -> Iterator[bytes]:
        for at in row_pieces(tensor):
            q, scale = rounded(floats(tensor, *at), bits, FLOATS[kind], weight, gain)
            scales.append(scale.contiguous().view(torch.uint8).numpy().tobytes())
            yield q.contiguous().view(torch.uint8).numpy().tobytes()

    yield NewTensor(f"{name}_packed", "I32", (num_rows, num_cols * bits // 32), codes)
    yield NewTensor(f"{name}_scale", kind, (num_rows, num_cols // GROUP), lambda: iter(scales))
    shape = torch.tensor([num_rows, num_cols]).numpy().tobytes()
    yield NewTensor(f"{name}_shape", "I64", (2,), lambda: iter([shape]))


def rounded(
    rows: Tensor, bits: int, dtype: torch.dtype, weight: Tensor | None, gain: Gain
) -> tuple[Tensor, Tensor]:
    """Rows as codes (rows, cols * bits / 8) uint8, the first lowest, and scales of a type"""
    groups = [Groups(rows.unflatten(-1, (-1, GROUP)), None)]
    shares = None if weight is None else column_weights(weight)
    if shares is not None:
        groups.append(Groups(groups[0].x, shares.unflatten(-1, (-1, GROUP))))
    found = [codes_of(each, bits, dtype) for each in groups]
    if shares is not None:
        errors = [groups[1].errors(q * scale.float()).sum((1, 2)) for q, scale in found]
        gain.without += float(errors[0].sum())
        gain.with_weights += float(torch.minimum(*errors).sum())
        is_lower = (errors[1] < errors[0]).view(-1, 1, 1)
        q, scale = (torch.where(is_lower, *two) for two in zip(found[1], found[0]))
    else:
        q, scale = found[0]
    codes = (q + 2 ** (bits - 1)).to(torch.uint8).flatten(1)
    if bits == 4:
        codes = codes[:, ::2] | codes[:, 1::2] << 4
    return codes, scale.squeeze(-1)


def codes_of(groups: Groups, bits: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """q (rows, G, 32) and scales (rows, G, 1), which float16 holds where `dtype` is float32"""
    least = -(2 ** (bits - 1))
    scale = symmetric_scales(groups, least, -least - 1)
    scale = scale.half().float() if dtype == torch.float32 else scale.to(dtype)
    return levels(groups.x, scale.float(), least, -least - 1), scale
