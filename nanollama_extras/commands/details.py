"""What `show` says beyond the core: memory, kernels, settings, and parts that only models of extras
have.

Seam       `nanollama.describe` calls `add_details`, `command_show` `listed_settings`, and an LLM
           asks `weight_bytes` whether it fits; api.shelf asks `memory_needed` how many models do.
Remove     delete this file together with api/shelf.py; `show` then leaves these lines out.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from nanollama import (
    NOT_TEXT,
    PARAMETERS,
    CheckpointError,
    ModelStore,
    excerpt,
    human_bytes,
    keep_8_bits,
    library,
    notify,
    open_checkpoint,
    pick_backend,
    pick_device,
    preferred,
    read_safetensors,
    weight_files,
)

if TYPE_CHECKING:
    from nanollama import Backend, Checkpoint, EngineConfig, Settings, TensorSource

    Sampling = Mapping[str, tuple[Any, str]]  # values with their origins


def weight_bytes(checkpoint: Checkpoint, config: EngineConfig, backend: Backend) -> int:
    """About how many bytes the weights of a checkpoint take in memory. Where native kernels run, it
    needs no torch."""
    if hasattr(backend, "run_kernel"):
        return estimated_bytes(checkpoint, config, backend)
    return Memory(checkpoint, config, backend).num_bytes(checkpoint.tensors)


def estimated_bytes(checkpoint: Checkpoint, config: EngineConfig, backend: Backend) -> int:
    """Bytes of the weights as native kernels hold the types of their files."""
    tensors = {name: t for name, t in checkpoint.tensors.items() if not t.stays}
    wide = tensors if config.quantize == "q8" else keep_8_bits(tensors)

    def size(name: str, tensor: TensorSource) -> float:
        plain = 1.0625 if name in wide else 0.625
        plain = plain if config.quantize else backend.float_bytes(tensor.kind)
        bits = tensor.bits or (held_bits(tensor.kind) if tensor.is_packed else 0)
        is_plain = tensor.is_packed and not bits
        return tensor.nbytes if is_plain else math.prod(tensor.shape) * (bits / 8 or plain)

    return int(sum(itertools.starmap(size, tensors.items())))


@functools.cache
def held_bits(kind: str) -> float:
    """Bits of a weight of a GGUF type as native kernels hold it; 0 where that is not known."""
    places = "files.gguf_blocks", "files.gguf_types"
    for place in places:  # the second one imports torch
        size: Any = preferred(place, "held_bits", lambda _: 0)
        if bits := size(kind):
            return float(bits)
    return 0.0


def chosen_kernels(checkpoint: Checkpoint, settings: Settings) -> tuple[Backend, str]:
    """The backend that runs a model, and the type of its keys and values."""
    engine = settings.engine()
    torch = preferred("kernels.arrays", "stand_in", library)("torch")
    place = pick_device(engine.device), getattr(torch, engine.dtype)
    backend = pick_backend(engine.kernels, *place, starts_gpu=False)
    is_packed = bool(engine.quantize) or any(t.is_packed for t in checkpoint.tensors.values())
    return backend, backend.kv_dtype(engine.kv_dtype, is_packed)


class Memory:
    """What a checkpoint's tensors take in memory as the kernels lay them out; those of GPUs hold
    the forms of torch's on a CPU."""

    def __init__(self, checkpoint: Checkpoint, engine: EngineConfig, backend: Backend) -> None:
        self.checkpoint, self.engine, self.backend = checkpoint, engine, backend
        new_sizes = preferred("models.sketch", "weights_of", None)
        if not hasattr(backend, "run_kernel"):  # no native kernels
            engine = dataclasses.replace(engine, device="cpu", kernels="torch")
        self.sizes = new_sizes(checkpoint, engine) if new_sizes else None

    def num_bytes(self, names: Iterable[str]) -> int:
        """Bytes of these tensors."""
        if self.sizes is not None:
            return sum(map(self.sizes.tensor_bytes, names))
        tensors = {name: self.checkpoint.tensors[name] for name in names}
        part = dataclasses.replace(self.checkpoint, tensors=tensors)
        return estimated_bytes(part, self.engine, self.backend)

    def bits(self, name: str) -> float:
        """Bits of a weight of this tensor."""
        if self.sizes is not None:
            return float(self.sizes.tensor_bits(name))
        return 8 * self.num_bytes([name]) / max(1, math.prod(self.checkpoint.tensors[name].shape))


def memory_needed(checkpoint: Checkpoint, settings: Settings, most_ctx: int = 0) -> tuple[int, int]:
    """Bytes of the weights, and of the keys and values of at most `most_ctx` tokens, if given; both
    with those of the model that drafts."""
    engine, config = settings.engine(), checkpoint.config
    n_ctx = min(engine.ctx or config.n_ctx, most_ctx or config.n_ctx, config.n_ctx)
    num_weights = num_keys = 0
    for each in filter(None, (checkpoint, drafting(settings))):
        backend, kv_dtype = chosen_kernels(each, settings)
        num_weights += Memory(each, engine, backend).num_bytes(each.tensors)
        num_keys += each.config.kv_bytes(n_ctx, kv_dtype, engine.prefill_chunk)
    return num_weights, num_keys


def tower_memory(checkpoint: Checkpoint, settings: Settings) -> int:
    """Bytes that the part of a model that reads images takes in memory, as floats."""
    num_parameters, _ = tower_size(checkpoint, settings.value("mmproj")[0])
    return num_parameters * (4 if settings.engine().dtype == "float32" else 2)


def drafting(settings: Settings) -> Checkpoint | None:
    """The model of --draft, if it is on this machine."""
    name = settings.value("draft")[0]
    path = ModelStore().find(name) if name else None
    return open_checkpoint(path) if path else None


def add_details(lines: dict[str, str], checkpoint: Checkpoint, settings: Settings) -> None:
    """Complete the lines of `show`."""
    config, states = checkpoint.config, ""
    n_ctx = min(settings.value("ctx")[0] or config.n_ctx, config.n_ctx)
    backend, kv_dtype = chosen_kernels(checkpoint, settings)
    num_weights, kv_bytes = map(human_bytes, memory_needed(checkpoint, settings))
    if config.rope["rope_type"] not in ("default", "proportional", "mrope"):
        lines["context"] += f" (RoPE scaling: {config.rope['rope_type']})"
    heads = f"{config.n_heads} heads over {config.n_kv_heads} key/value heads of {config.head_dim}"
    lines["layers"] = f"{config.n_layers} of width {config.n_embd}, {heads}"
    if config.window_heads:
        lines["layers"] += " ({} of {} in windows)".format(*config.window_heads)
    if "mtp.fc.weight" in checkpoint.tensors:
        lines["layers"] += ", and one that drafts (--lookup mtp)"
    if config.state_bytes:
        each = human_bytes(config.kv_bytes(2, kv_dtype) - config.kv_bytes(1, kv_dtype))
        states = f", {each} each, and a state of {human_bytes(config.state_bytes)}"
    lines["vocabulary"] = f"{config.n_vocab} tokens"
    keys = f"up to {kv_bytes} for the keys and values of {n_ctx} tokens"
    beside = ", with those of the draft model" if settings.value("draft")[0] else ""
    lines["memory"] = f"{num_weights} weights + {keys}{states}{beside}"
    num_parameters, num_bytes = tower_size(checkpoint, settings.value("mmproj")[0])
    if num_parameters:
        size = f"{num_parameters / 1e6:.1f} M more parameters ({human_bytes(num_bytes)})"
        in_memory = human_bytes(tower_memory(checkpoint, settings))
        lines["images"] = f"read by {size}; {in_memory} of memory from the first image on"
    lines["kernels"] = f"{backend.describe()}; keys and values in {kv_dtype}"
    notify("kernels.thread_choice", "add_details", lines, settings.engine(), backend)
    for place in ("answers.prompt_cache", "kernels.laid_out"):
        notify(place, "add_details", lines, settings.engine())


def tower_size(checkpoint: Checkpoint, mmproj: str | None = None) -> tuple[int, int]:
    """Parameters and bytes of the part of a model that reads images; 0 for a model without one.
    mmproj: the file that has it, for a model in GGUF, instead of one beside the model."""
    tensors: list[TensorSource] = []
    if checkpoint.format == "gguf":
        find: Any = preferred("files.mmproj", "find_pair", None)
        with contextlib.suppress(CheckpointError):  # without one that fits
            tensors = [*find(checkpoint, mmproj).tensors.values()] if find else []
    elif preferred("models.vision", "has_vision", lambda _: False)(checkpoint):
        with contextlib.suppress(CheckpointError):  # of files that are not all there
            for file in weight_files(checkpoint.path):
                found = read_safetensors(checkpoint.path / file)
                tensors += [tensor for name, tensor in found.items() if NOT_TEXT.match(name)]
    num_parameters = sum(math.prod(tensor.shape) for tensor in tensors)
    return num_parameters, sum(tensor.nbytes for tensor in tensors)


def settings_lines(settings: Settings, sampling: Sampling) -> list[str]:
    """One line for each setting, with its origin; - stands for no value."""
    rows = {n: settings.value(n) for n in "system tokenizer adapter draft ctx threads".split()}
    rows |= {n: row for n, row in sampling.items() if n in PARAMETERS or n == "logit_bias"}
    shown = {name: list(v) if isinstance(v, tuple) else v for name, (v, _) in rows.items()}
    return [
        f"  {name:<18} {'-' if shown[name] in (None, [], {}) else excerpt(shown[name])}  ({origin})"
        for name, (_, origin) in rows.items()
    ]


def listed_settings(settings: Settings, sampling: Sampling) -> list[str]:
    """The lines of `show` about settings."""
    return ["settings", *settings_lines(settings, sampling)]
