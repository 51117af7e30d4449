"""The part of a model that one of several processes holds.

    attention   heads: rows of q, k and v, columns of o (or rows, see below)
    MLP         rows of gate and up, columns of down (or rows)
    experts     whole ones, in turn
    vocabulary  rows of embeddings and of the head
    the rest    is the same in all processes

Columns give a part of every sum; rows give all of some sums, and need all columns of the operand.
Rows are taken where kernels round the operand.

Adds       the parts of tensors and of a ModelConfig, and the reasons why a model cannot be split.
Seam       cluster.tensor_parallel hands its tensors out. A part is a TensorSource that reads its
           own rows, or its own columns.
Remove     delete this file with cluster.tensor_parallel.
"""

from __future__ import annotations

import dataclasses
import math
import mmap
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

import nanollama
from nanollama import (
    GROUP,
    CheckpointError,
    ModelConfig,
    Norm,
    PackedLinear,
    Projection,
    TensorSource,
    Weights,
    find_family,
)

VOCABULARY = ("model.embed_tokens", "lm_head")
EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")
_OWNER = r"\.mlp\.(?:shared_expert\.)?"
BY_ROWS = re.compile(
    rf"\.self_attn\.[qkv]_proj\.(weight|bias)$|\.self_attn\.sinks\.weight$"
    rf"|{_OWNER}(gate|up)_proj\.(weight|bias)$"
    r"|^(model\.embed_tokens|lm_head)\.(weight|bias)$"
)
BY_COLUMNS = re.compile(rf"(\.self_attn\.o_proj|{_OWNER}down_proj)\.(weight|bias)$")
SUMMED = re.compile(r"\.self_attn\.o_proj$|\.mlp\.down_proj$")  # experts are summed together
READ_WEIGHTS = 1 << 20  # of which columns are taken at a time

DECODERS: dict[str, str] = {}  # model_type -> Family.decoder, before it was replaced
CAUSAL_OR_NOT, CAUSAL = "models.bidirectional:new_decoder", "models.bidirectional:GemmaDecoder"
SPLITTABLE = (
    "",
    CAUSAL,
    "models.layers:VariedDecoder",
    "models.routers:RoutedDecoder",
    "models.qwen3_vl:DeepDecoder",
)
LAYERS = {  # module of a decoder -> the layers that are not attention and MLPs of the usual kind
    "models.delta_net": "gated delta nets",
    "models.mamba2": "Mamba-2 layers",
    "models.short_conv": "short convolutions",
    "models.mla": "latent attention",
    "models.bidirectional": "attention to later tokens",
    "models.gemma3n": "several streams",
    "models.gemma4": "layers of two kinds of heads",
    "models.bitnet": "norms of whole hidden rows",
    "models.nanochat": "value embeddings",
    "models.apertus": "xIELU activations",
    "models.llama4": "chunked attention",
    "models.muse_glimmer": "scaled heads",
}
ignores_memory = False  # --force


class SplitError(CheckpointError):
    """A model that cannot be split over so many processes; every process finds the same."""


@dataclass(frozen=True, slots=True)
class Share:
    """Which part is that of process `rank` of `size`."""

    rank: int
    size: int

    def of(self, count: int, rank: int | None = None) -> range:
        """This process's part of `count` things, or that of another one."""
        rank = self.rank if rank is None else rank
        return range(count * rank // self.size, count * (rank + 1) // self.size)


# ---- what can be split ---------------------------------------------------------------------------


def own_decoder(config: ModelConfig) -> str:
    """The place of the family's own decoder."""
    place = DECODERS.get(config.model_type, find_family(config.model_type).decoder)
    return CAUSAL if place == CAUSAL_OR_NOT and "reach" not in config.own else place


def sizes(config: ModelConfig) -> Iterator[tuple[str, int]]:
    """Counts that the number of processes must divide."""
    yield "heads", config.n_heads
    yield "key/value heads", config.n_kv_heads
    experts = config.experts
    if experts is None or len(experts.layers) < config.n_layers:
        yield "rows of an MLP", config.n_ff
    if experts and experts.n_ff_shared:
        yield "rows of a shared expert", experts.n_ff_shared
    if routing := config.own.get("routing"):
        yield "rows of a shared expert", routing.n_ff_shared


def check_split(config: ModelConfig, size: int) -> None:
    """Raises SplitError for a model that cannot be split over `size` processes."""
    place, title = own_decoder(config), f"{config.model_type} cannot be split over {size} processes"
    module = place.partition(":")[0]
    if place not in SPLITTABLE:
        raise SplitError(f"{title}: {LAYERS.get(module, module)} cannot be split yet")
    if config.qk_norm == "full":
        raise SplitError(f"{title}: a norm of all heads together cannot be split yet")
    counts = list(sizes(config))
    for name, count in counts:
        if count % size:
            fits = [n for n in range(2, config.n_heads + 1) if not any(c % n for _, c in counts)]
            able = f"it can be over {', '.join(map(str, fits))}" if fits else "no number divides it"
            raise SplitError(f"{title}: it has {count} {name}; {able}")
    least = min(config.experts.count if config.experts else size, config.n_vocab)
    if least < size:
        raise SplitError(f"{title}: it has {least} experts")


def part_bytes(weights: Weights) -> int:
    """Bytes that the tensors of some weights take in memory."""
    bits, plain = weights.quantize_bits, weights.backend.float_bytes

    def size(tensor: TensorSource) -> int:
        item = bits * 1.0625 / 8 if bits else plain(tensor.kind)
        return tensor.nbytes if tensor.is_packed else int(math.prod(tensor.shape) * item)

    return sum(map(size, weights.tensors.values()))


# ---- the parts -----------------------------------------------------------------------------------


class SharedConfig(ModelConfig):
    """A ModelConfig of one process of several that share their memory."""

    __slots__ = ("num_sharing",)
    num_sharing: int

    def kv_bytes(self, num_tokens: int, kv_dtype: str, most_new: int = 2**31) -> int:
        """Bytes in all of these processes."""
        return self.num_sharing * super().kv_bytes(num_tokens, kv_dtype, most_new)


def split_config(config: ModelConfig, share: Share, num_sharing: int) -> ModelConfig:
    """The shape of one process's part; all parts have the same, but for the vocabulary and the
    experts, whose numbers stay as they are."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    for name in ("n_heads", "n_kv_heads", "n_ff"):
        fields[name] //= share.size
    if experts := config.experts:
        width = experts.n_ff_shared // share.size
        fields["experts"] = dataclasses.replace(experts, n_ff_shared=width)
    if routing := config.own.get("routing"):
        width = routing.n_ff_shared // share.size
        fields["own"] = {**config.own, "routing": dataclasses.replace(routing, n_ff_shared=width)}
    own = SharedConfig(**fields)
    object.__setattr__(own, "num_sharing", num_sharing)
    return own


def is_packed(tensor: TensorSource, bits: int | None) -> bool:
    """Whether a matrix is packed in memory, with `bits` of --quantize."""
    return tensor.is_packed or bool(bits and tensor.shape[-1] % GROUP == 0)


def part_of(name: str, tensor: TensorSource, share: Share, bits: int | None) -> TensorSource:
    """A process's part of a tensor; `bits` of --quantize. Raises SplitError for packed columns that
    cannot be cut there."""
    expert = EXPERT.search(name)
    if expert is None and BY_ROWS.search(name) and tensor.shape:
        return rows_of(tensor, share.of(tensor.shape[0]))
    if expert or not BY_COLUMNS.search(name):
        return tensor
    if name.endswith(".bias"):
        return tensor if share.rank == 0 else without(tensor)  # it is added once
    own = share.of(tensor.shape[-1])
    if is_packed(tensor, bits) and (len(own) % GROUP or own.start % GROUP):
        cut = f"{name} has {tensor.shape[-1]} columns, {len(own)} for each of {share.size}"
        raise SplitError(f"{cut} processes; packed ones are cut at multiples of {GROUP}")
    return columns_of(tensor, own)


def without(tensor: TensorSource) -> TensorSource:
    """Zeros in place of a float tensor."""
    load = lambda *rows: torch.zeros(tensor.shape)[rows or ...]  # noqa: E731
    return dataclasses.replace(tensor, load=load, nbytes=0, is_packed=False)


def _changed(tensor: TensorSource, shape: tuple[int, ...], load: Any) -> TensorSource:
    nbytes = tensor.nbytes * math.prod(shape) // max(math.prod(tensor.shape), 1)
    return dataclasses.replace(tensor, shape=shape, nbytes=nbytes, load=load)


def rows_of(tensor: TensorSource, own: range) -> TensorSource:
    """The given rows of a tensor."""

    def load(at: slice | Tensor = slice(None)) -> Tensor | PackedLinear:
        if isinstance(at, Tensor):
            return tensor.load(at + own.start)
        part = own[at]
        return tensor.load(slice(part.start, part.stop))

    return _changed(tensor, (len(own), *tensor.shape[1:]), load)


def columns_of(tensor: TensorSource, own: range) -> TensorSource:
    """The given columns of a matrix. Of safetensors and GGUF files, they are read alone; of others,
    whole rows are, a few at a time."""
    num_rows, num_cols = tensor.shape
    loader: Any = tensor.load
    place = getattr(loader, "func", None)

    def load(at: slice = slice(None)) -> Tensor | PackedLinear:
        rows = range(num_rows)[at]
        if place is nanollama._load_safetensor:
            opened, key = loader.args
            part: Tensor = opened.get_slice(key)[rows.start : rows.stop, own.start : own.stop]
            return part.clone()
        if place is nanollama._load_gguf:
            return gguf_columns(loader.args, rows, own)
        step = max(1, READ_WEIGHTS // num_cols)
        starts = range(rows.start, max(rows.stop, rows.start + 1), step)
        pieces = [tensor.load(slice(i, min(i + step, rows.stop))) for i in starts]
        return joined([cut(piece, own, num_cols) for piece in pieces])

    return _changed(tensor, (num_rows, len(own)), load)


def gguf_columns(place: tuple[Any, ...], rows: range, own: range) -> Tensor | PackedLinear:
    """Columns of some rows of a matrix. place: its bytes, type and shape. Only the blocks that hold
    them are read."""
    raw, kind, shape = place
    block, block_bytes = kind.width, kind.num_bytes
    first, last = own.start // block, -(-own.stop // block)
    table = raw.reshape(shape[0], -1)[rows.start : rows.stop]
    data = np.array(table[:, first * block_bytes : last * block_bytes]).reshape(-1)
    width = (last - first) * block
    if (file := getattr(raw, "_mmap", None)) is not None and hasattr(mmap, "MADV_DONTNEED"):
        file.madvise(mmap.MADV_DONTNEED)  # the pages stay in the system's cache only
    part = nanollama._load_gguf(data, kind, (len(rows), width))
    if width == len(own):
        return part
    return cut(part, range(own.start - first * block, own.stop - first * block), width)


def cut(piece: Tensor | PackedLinear, own: range, num_cols: int) -> Tensor | PackedLinear:
    """Columns of some rows, as a copy."""
    if isinstance(piece, Tensor):
        return piece[:, own.start : own.stop].clone()
    width = num_cols // piece.q.shape[1]
    groups = slice(own.start // width, own.stop // width)
    return changed(piece, lambda each: each[0][:, groups].clone(), piece)


def joined(pieces: list[Tensor | PackedLinear]) -> Tensor | PackedLinear:
    """The rows of all pieces."""
    if len(pieces) == 1:
        return pieces[0]
    if isinstance(pieces[0], Tensor):
        return torch.cat(cast("list[Tensor]", pieces))
    return changed(pieces[0], torch.cat, *cast("list[PackedLinear]", pieces))


def changed(like: PackedLinear, change: Any, *pieces: PackedLinear) -> PackedLinear:
    """A PackedLinear whose arrays are `change` of the lists of those of the pieces."""
    q, scale = change([p.q for p in pieces]), change([p.scale for p in pieces])
    offset = None if like.offset is None else change([p.offset for p in pieces])
    return PackedLinear(q, scale, offset, dtype=like.dtype, float4=like.float4)


class Absent(Projection):
    """A matrix of an expert that another process has: it gives zeros."""

    address = None  # for kernels, which leave the expert out
    nbytes = 0

    def __init__(self, outputs: Mapping[str, int]) -> None:
        super().__init__([None] * len(outputs))
        self.num_rows = sum(outputs.values())

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None = None,
        act: str = "",
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        return x.new_zeros(len(x), self.num_rows) if out is None else out.zero_()
