"""Models as GGUF files: their tensors in other types, one after another.

Adds       `convert_to_gguf`, for a model of any format that the core opens. A GGUF file keeps its
           metadata byte for byte, and tensors whose type stays are copied; packed weights of
           safetensors files are written without loss where GGUF has their form.
Seam       commands/convert.py and api/blobs.py call it. Imports files.gguf_model,
           files.gguf_types, files.gguf_vocabulary, files.gguf_writer, files.importance,
           files.measures, files.mixtures and files.quantizers.
Remove     delete this file with commands/convert.py.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import safetensors
import torch
from torch import Tensor

import nanollama
from nanollama import (
    FILE_SAMPLING,
    Checkpoint,
    CheckpointError,
    ModelConfig,
    PackedLinear,
    TensorSource,
    Tokenizer,
    Weights,
    find_family,
    first_line,
    gguf_shards,
    read_gguf,
)
from nanollama_extras.files import gguf_types, mixtures
from nanollama_extras.files.gguf_model import Stack, file_order, gguf_form
from nanollama_extras.files.gguf_vocabulary import template_values, vocabulary_values
from nanollama_extras.files.gguf_writer import (
    NewTensor,
    complete_or_absent,
    copied_values,
    value_bytes,
    write_gguf,
)
from nanollama_extras.files.importance import importance
from nanollama_extras.files.measures import windows
from nanollama_extras.files.quantizers import (
    FLOATS,
    PACKERS,
    Gain,
    packed_blocks,
    packed_kind,
    plain,
    quantized_rows,
)

PIECE = 1 << 24  # weights in memory at a time, as floats
COPY_BYTES = 1 << 24
NOT_KEPT = re.compile(r"split\.|general\.alignment$")
Importance = Mapping[str, Tensor]  # the decoder's name of a matrix -> one weight a column


@dataclass(frozen=True, slots=True)
class Plan:
    """What is to be written.

    quantize: a key of mixtures.MIXTURES; None keeps types. template: a chat template instead of the
    model's own. adapter: a LoRA adapter that is added to the weights."""

    checkpoint: Checkpoint
    quantize: str | None = None
    importance: Importance = field(default_factory=dict)
    adapter: Any = None
    template: str | None = None


@dataclass(frozen=True, slots=True)
class Written:
    """A result: bytes of its tensors by type, what it cannot say, and what importance changed."""

    num_bytes: int
    kinds: Mapping[str, int]
    notes: tuple[str, ...]
    gain: Gain


def convert_to_gguf(
    plan: Plan, target: Path, force: bool = False, done: Callable[[int, int], None] | None = None
) -> Written:
    """Write a model as a GGUF file, which appears when it is complete. `done` receives the bytes
    written so far and in the end. Raises NanollamaError."""
    metadata, stacks, notes = gguf_parts(plan)
    kinds = chosen_kinds(plan, stacks)
    gain = Gain()
    tensors = []
    for stack in stacks:
        kind = kinds[stack.name]
        load = functools.partial(pieces, stack, kind, plan, gain)
        tensors.append(NewTensor(stack.name, stack.shape, kind, load))
    total, written = sum(tensor.nbytes for tensor in tensors), 0

    def add(num_bytes: int) -> None:
        nonlocal written
        written += num_bytes
        if done:
            done(written, total)

    with complete_or_absent(target, total, force) as scratch, open(scratch, "wb") as file:
        write_gguf(file, metadata, tensors, add)
    by_kind: dict[str, int] = {}
    for tensor in tensors:
        by_kind[tensor.kind] = by_kind.get(tensor.kind, 0) + tensor.nbytes
    return Written(target.stat().st_size, by_kind, notes, gain)


def weighted(plan: Plan, text: str, most: int) -> Plan:
    """The plan with the importance of columns on a text, of which `most` windows are read. Raises
    RequestError for a text that is too short."""
    merged = dataclasses.replace(plan.checkpoint, tensors=merged_tensors(plan))
    pieces = windows(Tokenizer(plan.checkpoint.text), text, most, plan.checkpoint.config.n_ctx)
    return dataclasses.replace(plan, importance=importance(merged, pieces))


# ---- metadata and tensors ------------------------------------------------------------------------


def gguf_parts(plan: Plan) -> tuple[dict[str, bytes], list[Stack], tuple[str, ...]]:
    """Metadata, tensors under GGUF's names, and notes"""
    checkpoint = plan.checkpoint
    notes: tuple[str, ...] = ()
    if checkpoint.format == "gguf":
        metadata, stacks = copied_parts(plan)
        stacks = [merged_stack(stack, plan) for stack in stacks]
    else:
        merged = dataclasses.replace(checkpoint, tensors=merged_tensors(plan))
        form = gguf_form(merged)
        values = {
            **form.metadata,
            "general.name": checkpoint.path.name,
            **sampling_values(checkpoint.sampling),
            **vocabulary_values(checkpoint.text, checkpoint.config.n_vocab),
        }
        metadata = {key: value_bytes(value) for key, value in values.items()}
        stacks, notes = list(form.stacks), form.notes
    if plan.template is not None:
        values = template_values({"default": plan.template})
        metadata |= {key: value_bytes(value) for key, value in values.items()}
    if plan.quantize:
        mixture = mixtures.MIXTURES[plan.quantize]
        metadata["general.file_type"] = value_bytes(mixture.file_type)
        metadata["general.quantization_version"] = value_bytes(2)
    return metadata, stacks, notes


def sampling_values(sampling: Mapping[str, Any]) -> dict[str, Any]:
    """A model's defaults of sampling, under the names that the core reads"""
    names = {ours: theirs for theirs, ours in FILE_SAMPLING.items() if theirs.startswith("general")}
    return {names[name]: value for name, value in sampling.items() if name in names}


def copied_parts(plan: Plan) -> tuple[dict[str, bytes], list[Stack]]:
    """The metadata of a GGUF file and its tensors"""
    shards, config = gguf_shards(plan.checkpoint.path), plan.checkpoint.config
    metadata = copied_values(shards[0])
    stacks = []
    for shard in shards:
        tensors = read_gguf(shard)[1]
        if plan.quantize:
            tensors = gguf_types.scaled(tensors)
        names = {id(t): ours for ours, t in nanollama._gguf_names(tensors, config).items()}
        for name, tensor in tensors.items():
            stacks.append(Stack(name, tensor.shape, ((names.get(id(tensor), name), tensor),)))
    return {key: value for key, value in metadata.items() if not NOT_KEPT.match(key)}, stacks


# ---- adapters ------------------------------------------------------------------------------------


def merged_tensors(plan: Plan) -> dict[str, TensorSource]:
    """The checkpoint's tensors with the adapter's updates. Raises CheckpointError."""
    tensors, adapter = dict(plan.checkpoint.tensors), plan.adapter
    for module in adapter.modules if adapter else ():
        name = f"{module}.weight"
        if name not in tensors:
            raise CheckpointError(f"{adapter.path}: it changes {module}, which this model lacks")
        tensors[name] = updated(tensors[name], plan, module, adapter.modules[module].b)
    return tensors


def merged_stack(stack: Stack, plan: Plan) -> Stack:
    """A tensor of a GGUF file with the adapter's update. Raises CheckpointError for an update of a
    matrix that is part of another one."""
    name, tensor = stack.parts[0]
    adapter, module = plan.adapter, name.removesuffix(".weight")
    if not adapter:
        return stack
    if re.search(r"(qkv|gate_up)_proj$|mlp\.experts\.\w+$", module):
        start = re.sub(r"\w+$", "", module)
        if any(other.startswith(start) for other in adapter.modules):
            raise CheckpointError(f"{adapter.path}: cannot be merged into {stack.name}")
    if module not in adapter.modules:
        return stack
    config: ModelConfig = plan.checkpoint.config
    b = file_order(name, adapter.modules[module].b, config, find_family(config.model_type))
    return Stack(stack.name, stack.shape, ((name, updated(tensor, plan, module, b)),))


def updated(tensor: TensorSource, plan: Plan, module: str, b: TensorSource) -> TensorSource:
    """W + scale B A, in floats; and without the part that the adapter's start took from W"""
    adapter, low_rank = plan.adapter, plan.adapter.modules[module]
    if (low_rank.a.shape[1], b.shape[0]) != tensor.shape[::-1]:
        raise CheckpointError(f"{adapter.path}: {module} is not of the model's {tensor.shape}")
    down = cast("Tensor", low_rank.a.load()).float()
    up = cast("Tensor", b.load()).float() * low_rank.scale
    if adapter.taken:
        checkpoint, device = plan.checkpoint, torch.device("cpu")
        weights = Weights(checkpoint.tensors, str(checkpoint.path), device, torch.float32)
        a, own = adapter.taken_parts(weights, low_rank)[module]
        up, down = torch.cat((up, -own.float()), 1), torch.cat((down, a.float()))

    def load(at: slice | Tensor = slice(None)) -> Tensor:
        return floats(tensor, at) + up[at] @ down

    return TensorSource(tensor.shape, "F32", tensor.nbytes, load)


# ---- types ---------------------------------------------------------------------------------------


def chosen_kinds(plan: Plan, stacks: list[Stack]) -> dict[str, str]:
    """The type of each tensor by its name"""
    shapes = {stack.name: stack.shape for stack in stacks}
    if plan.quantize is None:
        return {stack.name: kept_kind(stack, plan.checkpoint.format == "gguf") for stack in stacks}
    config, experts = plan.checkpoint.config, plan.checkpoint.config.experts
    model = mixtures.Shape(
        n_layers=config.n_layers,
        gqa=config.n_heads // config.n_kv_heads,
        n_experts=experts.count if experts else 0,
        arch=find_family(config.model_type).gguf,
        is_tied=mixtures.HEAD not in shapes,
    )
    return mixtures.kinds(plan.quantize, shapes, model)


def kept_kind(stack: Stack, is_gguf: bool) -> str:
    """The type that holds a tensor as it is"""
    tensor = stack.parts[0][1]
    if is_gguf:
        return tensor.kind
    if len(stack.shape) < 2 or mixtures.STAYS.search(stack.name):
        return "F32"
    if not tensor.is_packed:
        return tensor.kind if tensor.kind in FLOATS else "F32"
    return packed_kind(plain(cast("PackedLinear", tensor.load(slice(0, 1))))) or "F16"


# ---- bytes ---------------------------------------------------------------------------------------


def floats(tensor: TensorSource, *at: Any) -> Tensor:
    """A tensor, or a part of it, in float32"""
    loaded = tensor.load(*at)
    return loaded.float() if isinstance(loaded, Tensor) else loaded.dequantize()


def pieces(stack: Stack, kind: str, plan: Plan, gain: Gain) -> Iterator[memoryview]:
    """The bytes of a tensor in a type. Raises CheckpointError, naming the tensor."""
    try:
        for name, tensor in stack.parts:
            load: Any = tensor.load
            if tensor.kind == kind and getattr(load, "func", None) is nanollama._load_gguf:
                raw = memoryview(cast("Any", load.args[0]))
                yield from (raw[at : at + COPY_BYTES] for at in range(0, len(raw), COPY_BYTES))
                continue
            for matrix, part in loaded_parts(name, tensor):
                weight = importance_of(matrix, plan.importance)
                blocks: Any = block_rows(part, kind, weight, gain).numpy()
                yield memoryview(blocks).cast("B")
    except (RuntimeError, OSError, ValueError, safetensors.SafetensorError) as error:
        if isinstance(error, OSError):  # of the file that is written
            raise
        path = plan.checkpoint.path
        raise CheckpointError(f"{path}: tensor {stack.name}: {first_line(error)}") from None


def loaded_parts(name: str, tensor: TensorSource) -> Iterator[tuple[str, Tensor | PackedLinear]]:
    """A tensor's rows, some at a time, for each matrix of a larger tensor, with its name"""
    if len(tensor.shape) < 2 or len(tensor.shape) > 3:
        yield name, floats(tensor).flatten().unsqueeze(0)
        return
    num_rows, num_cols = tensor.shape[-2:]
    step = max(1, PIECE // num_cols)
    for expert in [()] if len(tensor.shape) == 2 else [(e,) for e in range(tensor.shape[0])]:
        matrix = name.replace("experts.", f"experts.{expert[0]}.") if expert else name
        for at in range(0, num_rows, step):
            yield matrix, tensor.load(*expert, slice(at, at + step))


def block_rows(part: Tensor | PackedLinear, kind: str, weight: Tensor | None, gain: Gain) -> Tensor:
    """Rows as bytes (rows, bytes) of a type: exactly if they are packed in it"""
    if not isinstance(part, Tensor):
        if packed_kind(packed := plain(part)) == kind:
            return packed_blocks(packed).contiguous()
        part = part.dequantize()
    return quantized_rows(part.float(), kind, weight if kind in PACKERS else None, gain)


def importance_of(name: str, importance: Importance) -> Tensor | None:
    """The importance of the columns of a matrix, which those fused with it share"""
    module = name.removesuffix(".weight")
    module = module.replace("qkv_proj", "q_proj").replace("gate_up_proj", "gate_proj")
    return importance.get(module)
