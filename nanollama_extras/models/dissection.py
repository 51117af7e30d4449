"""What a decoder consists of: blocks, their tensors, and what a token costs in each.

Adds       `dissect`: parameters, bytes and multiply-adds by part, the code that runs each block,
           and how a layer's blocks are connected.
Seam       Decoder of nanollama.py, whose modules are looked at; models.sketch makes one of shapes.
Imports    models.sketch, and models.tracing for modules with other methods.
Remove     delete this file with commands/anatomy.py, whose `explain` needs it.

How blocks are connected is found by calling a layer with symbols in place of tensors. A layer that
computes with them by itself has no such drawing; its blocks are listed.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import nanollama
from nanollama import MLP, Attention, Linear, MoE, Norm
from nanollama_extras.models.sketch import SketchedProjection, SketchWeights, Taken
from nanollama_extras.models.tracing import derived

if TYPE_CHECKING:
    from nanollama import Checkpoint, Decoder, Json

LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")  # of an expert or a head
# Class, or one that it is derived from -> what it is
WORDS = {
    "LatentAttention": "latent attention",
    "Attention": "attention",
    "GatedDeltaNet": "gated delta net",
    "Mamba2": "mamba2",
    "ShortConv": "short convolution",
    "MoE": "mixture of experts",
    "MLP": "MLP",
}
MIXERS = ("self_attn", "linear_attn", "conv", "mamba")  # how tensors of a mixer begin
# Attributes of a block in the order in which they run; others come before the state
FIRST = (
    "q_a_proj q_a_layernorm q_b_proj kv_a_proj kv_a_layernorm k_b_proj gate qkv_proj in_proj "
    "q_norm k_norm gate_proj gate_up_proj"
).split()
LAST = "v_b_proj sub_norm down_proj o_proj out_proj fc2_latent_proj".split()
STATE_STEPS = 3  # multiply-adds for a number of a recurrent state: decay, update, answer


# ---- where the code is ---------------------------------------------------------------------------


def code_of(function: Callable[..., Any]) -> str:
    """file:line of a function, the file as seen from the directory of nanollama.py."""
    function = inspect.unwrap(function)
    file = Path(inspect.getsourcefile(function) or "?")
    root = Path(nanollama.__file__ or "").resolve().parent
    file = file.resolve()
    shown = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
    return f"{shown}:{inspect.getsourcelines(function)[1]}"


def code_of_call(module: Any) -> str:
    return code_of(type(module).__call__)


@functools.cache
def kernel_lines() -> dict[str, str]:
    """Name of a native kernel -> file:line"""
    native = nanollama.extra("kernels.native", "kernels in C")
    lines = native.SOURCE.splitlines()
    found = ((re.match(r"void (\w+)\(", line), i) for i, line in enumerate(lines, 1))
    return {match[1]: f"nanollama_extras/kernels/native.c:{i}" for match, i in found if match}


# ---- parts ---------------------------------------------------------------------------------------


def word_of(module: Any) -> str:
    """What a module is, in words."""
    names = (kind.__name__ for kind in type(module).__mro__)
    return next((WORDS[name] for name in names if name in WORDS), type(module).__name__)


def mixer_of(layer: Any, first: str) -> Any:
    """The mixer whose tensors begin with `first`."""
    beside = getattr(layer, "mamba", None) if first == "mamba" else None
    return beside or layer.self_attn


def part_of(decoder: Decoder, name: str) -> str:
    """The part of a model that a tensor belongs to."""
    if not (found := LAYER.match(name)):
        outside = {"model.embed_tokens": "embedding", "lm_head": "head", "model.norm": "norms"}
        return outside.get(name.rpartition(".")[0], "other")
    layer, rest = decoder.layers[int(found[1])], found[2]
    first = rest.partition(".")[0]
    if first in MIXERS:
        return word_of(mixer_of(layer, first))
    if "norm" in first:
        return "norms"
    if first != "mlp":
        return "other"
    if "shared_expert" in rest:
        return "shared expert"
    if ".experts." in rest:
        return "experts"
    return "router" if rest.startswith("mlp.gate.") else "MLP"


class Costs(NamedTuple):
    """What a tensor, or several, are for a token."""

    num_parameters: float = 0
    num_bytes: float = 0
    used_parameters: float = 0
    read_bytes: float = 0
    multiply_adds: float = 0

    def plus(self, other: Costs) -> Costs:
        return Costs(*(a + b for a, b in zip(self, other)))


def costs_of(decoder: Decoder, taken: Taken) -> Costs:
    """A table is read by single rows; of the experts, a token uses some."""
    num, experts = taken.num_parameters, decoder.config.experts
    share = 1.0
    if experts and ".experts." in taken.name:
        share = experts.num_used / experts.count
    if taken.is_table:
        share = 1 / taken.shape[0]
    products = share * num if taken.is_matrix else 0.0
    return Costs(num, taken.num_bytes, share * num, share * taken.num_bytes, products)


def total(costs: Iterable[Costs]) -> Costs:
    return functools.reduce(Costs.plus, costs, Costs())


def head_costs(decoder: Decoder, taken: dict[str, Taken]) -> Costs | None:
    """Those of a head that is the embedding's table; None for one with a matrix of its own."""
    if decoder.lm_head is not decoder.embed_tokens:
        return None
    table = taken["model.embed_tokens.weight"]
    num = table.num_parameters - table.shape[1]  # of the row that is counted already
    return Costs(0, 0, num, table.num_bytes * num / table.num_parameters, table.num_parameters)


def state_costs(decoder: Decoder, depth: int) -> dict[str, Costs]:
    """What a token costs beside the weights: the keys and values of `depth` tokens, by part."""
    config, found = decoder.config, dict[str, Costs]()
    for i, layer in enumerate(decoder.layers):
        for mixer in filter(None, (getattr(layer, name, None) for name in ("self_attn", "mamba"))):
            if isinstance(mixer, Attention):
                window = config.windows[i]
                seen = depth if window is None else min(depth, window)
                latent = getattr(getattr(mixer, "shape", None), "latent", mixer.head_dim)
                cost = Costs(multiply_adds=seen * mixer.sizes[0] * (mixer.head_dim + latent))
            else:
                num = getattr(mixer, "num_floats", 0)
                cost = Costs(read_bytes=8 * num, multiply_adds=STATE_STEPS * num)
            name = word_of(mixer)
            found[name] = found.get(name, Costs()).plus(cost)
    num_bytes = config.kv_bytes(depth, decoder.kv_dtype) - config.state_bytes
    name = next((word for word in found if "attention" in word), "")
    if name:
        found[name] = found[name].plus(Costs(read_bytes=num_bytes))
    return found


# ---- how the blocks of a layer are connected -----------------------------------------------------


class Symbol:
    """Stands for a tensor of the stream."""


@dataclass(frozen=True, slots=True)
class Event:
    """A block, or a norm by itself, that gets `source` and maybe adds `residual`."""

    name: str
    source: Symbol
    norm: str
    residual: Symbol | None
    result: Symbol


def events_of(layer: Any) -> list[Event] | None:
    """The calls that a layer makes, in their order; None for one that computes with tensors."""
    events: list[Event] = []
    modules = {name: part for name, part in vars(layer).items() if callable(part)}
    names = {id(part): name for name, part in modules.items()}

    def call(name: str, source: Any, *rest: Any, residual: Any = None) -> Symbol:
        given = [part for part in rest if isinstance(part, Symbol)]
        norm = next((names[id(part)] for part in rest if isinstance(part, Norm)), "")
        symbols = [*given, residual] if isinstance(residual, Symbol) else given
        if not isinstance(source, Symbol) or len(symbols) > 1:
            raise TypeError(name)
        events.append(Event(name, source, norm, symbols[0] if symbols else None, Symbol()))
        return events[-1].result

    view = derived(layer, {})
    for name, part in modules.items():
        if isinstance(part, Norm):
            stand = derived(part, {"__call__": lambda _, *a, n=name, **k: call(n, *a, **k)})
            names[id(stand)] = name
            setattr(view, name, stand)
        else:
            setattr(view, name, functools.partial(call, name))
    try:
        result = type(layer).__call__(view, Symbol(), None, None, None)
    except Exception:  # of any kind: a symbol is no tensor
        return None
    return events if events and result is events[-1].result else None


# ---- what is inside a block ----------------------------------------------------------------------


def widths(projection: SketchedProjection) -> str:
    """q_proj | k_proj  64 -> 64 + 32"""
    short = [name.rpartition(".")[2] for name in projection.outputs]
    if len(short) > 1 and short[0].isdigit():  # a matrix for each head
        owner = next(iter(projection.outputs)).split(".")[-2]
        height = next(iter(projection.outputs.values()))
        return f"{owner}  {projection.num_cols} -> {height}, for each of {len(short)} heads"
    rows = " + ".join(map(str, projection.outputs.values()))
    return f"{' | '.join(short)}  {projection.num_cols} -> {rows}"


def place(name: str) -> tuple[int, int]:
    if name in LAST:
        return 2, LAST.index(name)
    return (0, FIRST.index(name)) if name in FIRST else (1, 0)


def inside(block: Any, decoder: Decoder, index: int) -> list[str]:
    """The lines of a block in a drawing, in the order in which they run."""
    lines: list[tuple[tuple[int, int], str]] = []
    for name, part in vars(block).items():
        inner = getattr(part, "projection", part)
        if isinstance(inner, SketchedProjection):
            lines.append((place(name), widths(inner)))
        elif isinstance(part, Linear):
            lines.append((place(name), f"{name}  {part.weight.shape[1]} -> {len(part.weight)}"))
        elif isinstance(part, Norm):
            lines.append((place(name), name))
        elif isinstance(part, MLP):
            lines += [((1, 2), f"{name}: {line}") for line in inside(part, decoder, index)]
    if isinstance(block, MoE):
        each = "; ".join(inside(block.experts[0], decoder, index))
        lines.append(((1, 1), f"the best {block.config.num_used} of {len(block.experts)}: {each}"))
    if isinstance(block, Attention):
        lines.append(((1, 9), f"softmax(q k) v over {span_of(decoder, index)}"))
    elif num := getattr(block, "num_floats", 0):
        lines.append(((1, 9), f"a state of {num} numbers, which each token changes"))
    return [text for _, text in sorted(lines, key=lambda line: line[0])]


def span_of(decoder: Decoder, index: int) -> str:
    window = decoder.config.windows[index]
    return "all tokens so far" if window is None else f"the last {int(window)} tokens"


def title_of(block: Any) -> str:
    """A block in words, with its numbers."""
    word = word_of(block)
    if isinstance(block, Attention):
        H, Hkv, _ = block.sizes
        return f"{word}: {H} heads over {Hkv} key/value head{'s' * (Hkv > 1)} of {block.head_dim}"
    if isinstance(block, MoE):
        return f"{word}: {block.config.num_used} of {len(block.experts)}"
    return f"{word} ({block.act})" if isinstance(block, MLP) else word


# ---- all of it -----------------------------------------------------------------------------------


def tensor_rows(decoder: Decoder, taken: Iterable[tuple[str, Taken]]) -> list[Json]:
    """Tensors as JSON, by short names; those of all experts, or heads, are one row."""
    rows: dict[tuple[Any, ...], Json] = {}
    for name, each in taken:
        cost = costs_of(decoder, each)
        key = NUMBER.sub("*", name), each.shape, each.kind
        row = rows.setdefault(
            key, {"name": key[0], "count": 0, "shape": each.shape, "type": each.kind}
        )
        row["count"] += 1
        for field, value in zip(COST_FIELDS, cost):
            row[field] = row.get(field, 0) + value
    return list(rows.values())


COST_FIELDS = ("parameters", "bytes", "used_parameters", "read_bytes", "multiply_adds")


def as_json(costs: Costs) -> Json:
    return {field: round(value) for field, value in zip(COST_FIELDS, costs)}


def blocks_of(layer: Any) -> Iterator[tuple[str, Any]]:
    """The modules of a layer that have tensors, without norms."""
    for name, part in vars(layer).items():
        if callable(part) and not (isinstance(part, Norm) or inspect.isroutine(part)):
            yield name, part


def layer_shape(decoder: Decoder, index: int, taken: list[tuple[str, Taken]]) -> Json:
    """A layer as JSON; layers that are equal give equal ones."""
    layer = decoder.layers[index]
    events = events_of(layer)
    symbols: list[Symbol | None] = [None]
    for event in events or ():
        symbols += [s for s in (event.source, event.residual) if s not in symbols] + [event.result]
    flow = [
        {
            "block": event.name,
            "input": symbols.index(event.source) - 1,
            "norm": event.norm,
            "added_to": symbols.index(event.residual) - 1 if event.residual else None,
            "result": symbols.index(event.result) - 1,
        }
        for event in events or ()
    ]
    blocks = {
        name: {
            "title": title_of(block) if not isinstance(block, SketchedProjection) else "projection",
            "code": code_of_call(block),
            "inside": [widths(block)]
            if isinstance(block, SketchedProjection)
            else inside(block, decoder, index),
        }
        for name, block in blocks_of(layer)
    }
    return {
        "class": type(layer).__name__,
        "code": code_of_call(layer),
        "blocks": blocks,
        "flow": flow,
        "tensors": tensor_rows(decoder, taken),
    }


def layer_groups(decoder: Decoder, weights: SketchWeights) -> list[Json]:
    """The kinds of layers, each with the numbers of its layers."""
    by_layer: list[list[tuple[str, Taken]]] = [[] for _ in decoder.layers]
    for name, taken in weights.taken.items():
        if found := LAYER.match(name):
            by_layer[int(found[1])].append((found[2], taken))
    groups: list[Json] = []
    for i, tensors in enumerate(by_layer):
        shape = layer_shape(decoder, i, tensors)
        known = next((g for g in groups if shape == {k: g[k] for k in shape}), None)
        if known is None:
            groups.append(known := {"layers": [], **shape})
        known["layers"].append(i)
    return groups


def dissect(checkpoint: Checkpoint, decoder: Decoder, weights: SketchWeights, depth: int) -> Json:
    """All that `explain` says of a model without running it, for a token with `depth` before it."""
    config, taken = decoder.config, weights.taken
    parts: dict[str, Costs] = {}
    for each in taken.values():
        name = part_of(decoder, each.name)
        parts[name] = parts.get(name, Costs()).plus(costs_of(decoder, each))
    if head := head_costs(decoder, taken):
        parts["head"] = parts.get("head", Costs()).plus(head)
    whole = total(parts.values())
    for name, cost in state_costs(decoder, depth).items():
        parts[name] = parts.get(name, Costs()).plus(cost)
    kv_bytes = [config.kv_bytes(num, decoder.kv_dtype) for num in (1, 2)]
    outside = [(n, t) for n, t in taken.items() if not LAYER.match(n)]
    return {
        "architecture": config.model_type,
        "format": checkpoint.format,
        "quantization": checkpoint.quantization,
        "n_layers": config.n_layers,
        "width": config.n_embd,
        "vocabulary": config.n_vocab,
        "context": config.n_ctx,
        "kernels": decoder.kernels,
        "kv_dtype": decoder.kv_dtype,
        "file_bytes": checkpoint.num_bytes,
        "weights": as_json(whole),
        "parts": {name: as_json(cost) for name, cost in parts.items()},
        "token": {"depth": depth, **as_json(total(parts.values()))},
        "kv": {
            "bytes_per_token": kv_bytes[1] - kv_bytes[0],
            "state_bytes": config.state_bytes,
            "bytes_at_context": config.kv_bytes(config.n_ctx, decoder.kv_dtype),
        },
        "unused": sorted({*weights.tensors} - {*taken}),
        "decoder": {"class": type(decoder).__name__, "code": code_of(type(decoder).hidden)},
        "outside": tensor_rows(decoder, outside),
        "groups": layer_groups(decoder, weights),
    }
