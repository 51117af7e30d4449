"""What a model computes on the way: tensors to look at, and to replace.

Adds       `trace`, for `LLM.trace`, and `hooks`, for `LLM.hooks`. A `Probe` runs the tokens of one
           request through a copy of the decoder whose layers call hooks; it has a cache of its own.
           So other requests of a batch run as ever, and no request begins with what hooks changed.
Seam       `add`, `forward` and `advance` of Engine, which the first block with hooks replaces by
           those of `Watching`; before that, a model computes and costs what it does without this
           module. `Sequence.shared_ids`. answers.library has the methods of LLM.
Remove     delete this file; `LLM.trace`, `LLM.hooks` and `nanollama lens` then say that they need
           it.

    resid.0   [ layer 0: q.0 k.0 v.0 -> patterns.0 -> attn.0 | router.0 -> mlp.0 ]   resid.1 ..

Where queries, keys, values or patterns are wanted, attention runs on torch's operations, on every
backend; where the router is, so do the experts. All else is computed as always, bit for bit.
"""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nanollama import (
    Attention,
    Backend,
    Batch,
    Engine,
    KVCache,
    MoE,
    NanollamaError,
    RequestError,
    excerpt,
    first_line,
    log,
)

if TYPE_CHECKING:
    from nanollama import LLM, Decoder, ModelConfig, Sequence, Span

# Kind of tensor -> its shape for T tokens
KINDS = {
    "resid": "(T, C): the input of a layer; that of number L is the last layer's output",
    "attn": "(T, C): what attention, or another mixer, gives",
    "mlp": "(T, C): what the MLP or the mixture of experts gives",
    "q": "(T, H, D): queries, normed and turned to their positions",
    "k": "(T, Hkv, D): keys, likewise",
    "v": "(T, Hkv, D): values",
    "patterns": "(H, T, T): the weight that each token's query gives each token's value",
    "router": "(T, E): the weight of each expert, 0 for one that is not used",
    "logits": "(T, V): for the next token",
}
INNER = ("q", "k", "v", "patterns")  # of attention


class Place(NamedTuple):
    """Where a hook is called: `attn.3` is the tensor `attn` of layer 3."""

    name: str
    kind: str
    layer: int
    positions: range  # of the tokens, whose rows the tensor has


Hook = Callable[[Tensor, Place], "Tensor | None"]
Table = Mapping[str, list[Hook]]  # by name


# ---- which tensors there are ---------------------------------------------------------------------


def blocks_of(layer: Any) -> dict[str, Any]:
    """The mixer and the MLP of a layer, without absent ones, and experts beside the MLP."""
    found = {name: getattr(layer, name, None) for name in ("self_attn", "mlp", "experts")}
    return {name: block for name, block in found.items() if callable(block)}


def names_of(decoder: Decoder) -> list[str]:
    """The names of all tensors of a model, layer by layer."""
    names = []
    for i, layer in enumerate(decoder.layers):
        blocks = blocks_of(layer)
        kinds = ["resid"] + ["attn"] * ("self_attn" in blocks) + ["mlp"] * ("mlp" in blocks)
        if isinstance(attn := blocks.get("self_attn"), Attention):
            kinds += [kind for kind in INNER if kind != "v" or attn.sizes[2]]
        if any(isinstance(block, MoE) for block in blocks.values()):
            kinds.append("router")
        names += [f"{kind}.{i}" for kind in kinds]
    last = len(decoder.layers)
    return [*names, f"resid.{last}", f"logits.{last}"]


def wanted_names(decoder: Decoder, layers: Iterable[int] | None, what: Iterable[str]) -> list[str]:
    """The names that `trace` is asked for. Raises RequestError."""
    names, n_layers, kinds = names_of(decoder), len(decoder.layers), list(what)
    found = {name.partition(".")[0] for name in names}
    for kind in kinds:
        if kind not in found:
            known = ", ".join(k for k in KINDS if k in found)
            raise RequestError(f"this model has no {excerpt(kind)}; it has {known}", "what")
    chosen = set(range(n_layers + 1)) if layers is None else set(layers)
    for i in chosen:
        if not -n_layers <= i <= n_layers:
            raise RequestError(f"layer {i} is not one of 0 to {n_layers}", "layers")
    chosen = {i + n_layers if i < 0 else i for i in chosen}
    chosen |= {n_layers} if "logits" in kinds else set()
    pairs = [(name, *name.split(".")) for name in names]
    return [name for name, kind, i in pairs if kind in kinds and int(i) in chosen]


# ---- a decoder whose layers call hooks -----------------------------------------------------------


class Watch:
    """The hooks of one request."""

    def __init__(self, table: Table) -> None:
        self.table, self.positions = table, range(0)
        self.kinds = {name.partition(".")[0] for name, hooks in table.items() if hooks}

    def has(self, *kinds: str) -> bool:
        return not self.kinds.isdisjoint(kinds)

    def see(self, kind: str, layer: int, x: Tensor, dim: int = 0) -> Tensor:
        """Show the hooks the rows of x, which may be padded -> x, or another with their rows."""
        name = f"{kind}.{layer}"
        place, num_rows = Place(name, kind, layer, self.positions), len(self.positions)
        rows = before = x.narrow(dim, 0, num_rows)
        for hook in self.table.get(name, ()):
            new = hook(rows.clone(), place)
            if new is not None:
                if not isinstance(new, Tensor) or new.shape != rows.shape:
                    shape = tuple(getattr(new, "shape", ())) or excerpt(new)
                    problem = f"a hook of {name} gives {shape} for {tuple(rows.shape)}"
                    raise RequestError(f"{problem}; give None, or a tensor of this shape", "hooks")
                rows = new.to(x.device, x.dtype)
        if rows is before:
            return x
        x = x.clone()
        x.narrow(dim, 0, num_rows).copy_(rows)
        return x


def derived(module: Any, methods: Mapping[str, Callable[..., Any]]) -> Any:
    """A copy of a module with other methods; for a function, `__call__` with it."""
    new, kind = copy.copy(module), type(module)
    try:
        new.__class__ = type(kind.__name__, (kind,), dict(methods))
    except TypeError:
        return functools.partial(methods["__call__"], module)
    return new


def changed_backend(backend: Backend, **methods: Callable[..., Any]) -> Any:
    """A copy of a backend with other methods, which get the copy."""
    new = copy.copy(backend)
    vars(new).update({name: functools.partial(method, new) for name, method in methods.items()})
    return new


def watched_mixer(mixer: Any, layer: int, watch: Watch) -> Any:
    """A layer's attention, or what it has in its place, that shows `attn`, queries, keys, values"""
    kind = type(mixer)

    def call(self: Any, x: Tensor, *rest: Any, residual: Tensor | None = None) -> Tensor:
        if len(rest) == 5:  # norm, rotation, cache, batch, residual
            *rest, residual = rest  # type: ignore[assignment]
        y = watch.see("attn", layer, kind.__call__(self, x, *rest, residual=None))
        return y if residual is None else residual + y

    def heads(self: Any, *args: Any) -> tuple[Tensor, ...]:
        found = zip("qkv", kind.heads(self, *args))
        return tuple(watch.see(name, layer, x) for name, x in found)

    is_attention = isinstance(mixer, Attention) and watch.has(*INNER)
    new = derived(mixer, {"__call__": call, **({"heads": heads} if is_attention else {})})
    if is_attention:
        new.watched_layer = layer
    return new


def watched_mlp(mlp: Any, layer: int, watch: Watch) -> Any:
    """A layer's MLP that shows `mlp`."""
    kind = type(mlp)

    def call(self: Any, x: Tensor, *rest: Any, residual: Tensor | None = None) -> Tensor:
        norm, *more = *rest, None
        if len(rest) > 1:
            residual = more[0]
        if len(rest) == 3:  # a piece of a long call
            return cast("Tensor", kind.__call__(self, x, *rest))
        is_sum = isinstance(self, MoE) and residual is not None  # in an order that must stay
        whole = kind.__call__(self, x, norm, residual if is_sum else None)
        y = whole - residual if is_sum else whole
        new = watch.see("mlp", layer, y)
        if residual is None or (is_sum and new is y):
            return cast("Tensor", whole if new is y else new)
        return residual + new

    return derived(mlp, {"__call__": call})


def watched_router(moe: MoE, layer: int, watch: Watch) -> MoE:
    """A mixture of experts by torch's operations, that shows `router`."""
    kind = type(moe)

    def choose(self: MoE, scores: Tensor) -> tuple[Tensor, Tensor]:
        weight, chosen = kind.choose(self, scores)
        shares = torch.zeros_like(scores).scatter(1, chosen, weight.to(scores.dtype))
        new = watch.see("router", layer, shares)
        if new is shares:
            return weight, chosen
        best = new.topk(self.config.num_used, dim=-1)
        return best.values, best.indices

    new: MoE = derived(moe, {"choose": choose})
    new.backend = changed_backend(moe.backend, experts=Backend.experts)
    return new


def watched_layer(layer: Any, number: int, watch: Watch) -> Any:
    """A layer that shows its input, and whose blocks show theirs."""
    kind = type(layer)

    def call(self: Any, x: Tensor, *rest: Any) -> Any:
        return kind.__call__(self, watch.see("resid", number, x, -2), *rest)

    new = derived(layer, {"__call__": call})
    for name, block in blocks_of(layer).items():
        if watch.has("router") and isinstance(block, MoE):
            block = watched_router(block, number, watch)
        if name == "self_attn" and watch.has("attn", *INNER):
            block = watched_mixer(block, number, watch)
        elif name == "mlp" and watch.has("mlp"):
            block = watched_mlp(block, number, watch)
        if block is not getattr(layer, name):
            setattr(new, name, block)
    return new


def pattern(q: Tensor, keys: Tensor, bias: Tensor, config: ModelConfig, attn: Any) -> Tensor:
    """softmax(softcap(scale q k^T) + bias), float32: q (n, H, D), keys (Hkv, S, D) and bias (n, S)
    as in `attention` -> (H, n, S)"""
    keys = keys.repeat_interleave(q.shape[1] // len(keys), dim=0)
    scores = (q.transpose(0, 1) @ keys.mT).float() * (config.attn_scale or q.shape[2] ** -0.5)
    if cap := config.attn_softcap:
        scores = cap * torch.tanh(scores / cap)
    scores = scores + bias
    if attn.sinks is None:
        return scores.softmax(dim=-1)
    sinks = attn.sinks.view(-1, 1, 1).expand(-1, scores.shape[1], 1)
    return torch.cat((scores, sinks), dim=-1).softmax(dim=-1)[..., :-1]


def watched_cache(
    backend: Backend,
    config: ModelConfig,
    num_slots: int,
    kv_dtype: str,
    most_new: int,
    watch: Watch,
) -> KVCache:
    """A KVCache of the core, with strips alone, whose attention shows `patterns`."""
    cache = Backend.new_cache(backend, config, num_slots, kv_dtype, 0)
    kind = type(cache)

    def attend_span(
        self: KVCache, attn: Any, heads: tuple[Tensor, ...], batch: Batch, span: Span
    ) -> Tensor:
        out = kind.attend_span(self, attn, heads, batch, span)
        if not watch.has("patterns"):
            return out
        end, q = span.start + span.num_new, heads[0][span.row :][: span.num_new]
        strip = self.strips[span.slot][:, self.places[attn.index][1], :, :end]
        kept = self.decoded(strip, q.dtype)  # (planes, Hkv, S, D)
        bias = batch.memo[span.row, config.windows[attn.index]][: span.num_new, :end]
        weights = pattern(q, kept[0], bias.float(), config, attn)
        new = watch.see("patterns", attn.watched_layer, weights, 1)
        if new is weights:
            return out
        values = kept[-1].repeat_interleave(len(new) // kept.shape[1], dim=0)
        return (new.to(values.dtype) @ values).transpose(0, 1)

    return cast("KVCache", derived(cache, {"attend_span": attend_span}))


@functools.cache
def say_once(notice: str) -> None:
    log.info(notice)


def watched_decoder(decoder: Any, watch: Watch) -> Any:
    """A decoder whose layers call hooks. Raises RequestError for one in several processes."""
    if hasattr(decoder, "world"):
        raise RequestError("hooks need the whole model in one process", "hooks")
    view = copy.copy(decoder)
    view.layers = [watched_layer(layer, i, watch) for i, layer in enumerate(decoder.layers)]
    if getattr(view, "head", None) is not None:
        view.head = None  # which guesses for the engine's own sequences
    if watch.has(*INNER):
        new_cache = functools.partial(watched_cache, watch=watch)
        view.backend = changed_backend(decoder.backend, new_cache=new_cache)
    if watch.has(*INNER, "router") and type(decoder.backend) is not Backend:
        inner = ", ".join(kind for kind in (*INNER, "router") if watch.has(kind))
        say_once(f"{inner}: by torch's operations, for the requests that want them only")
    return view


# ---- one request ---------------------------------------------------------------------------------


class Probe:
    """Runs the tokens of one text through a watched decoder, with a cache of its own."""

    def __init__(self, engine: Engine, table: Table) -> None:
        """Raises RequestError."""
        self.engine, self.watch = engine, Watch(table)
        self.decoder = watched_decoder(engine.decoder, self.watch)
        self.cache = self.decoder.new_cache(1, engine.scheduler.prefill_chunk)

    def run(self, text: list[int], start: int, new: list[int], num_rows: int) -> Any:
        """Run the tokens `new` from position `start` of a text -> the stream (N, C) after the last
        layer, and logits (num_rows, V)"""
        end, last, watch = start + len(new), len(self.decoder.layers), self.watch
        if start == 0:
            self.cache.start(0, 0, 0, text)
        self.cache.reserve(0, end)
        batch = Batch([(0, start, new, num_rows)], self.decoder.device, self.decoder.row_tile)
        watch.positions = range(start, end)
        x = watch.see("resid", last, self.decoder.hidden(batch, self.cache), -2)
        if not num_rows:
            return x, x[:0]
        watch.positions = range(end - num_rows, end)
        return x, watch.see("logits", last, self.decoder.logits(x, batch))

    def __call__(self, seq: Sequence, num_new: int) -> Tensor:
        """The logits (rows, V) that Engine.forward gives for a sequence. An error of a hook ends
        the sequence."""
        try:
            new = seq.token_ids[seq.num_computed :][:num_new] + seq.draft
            num_rows = 0 if seq.pooler else len(seq.draft) + seq.num_rows(num_new)
            x, logits = self.run(seq.token_ids, seq.num_computed, new, num_rows)
            if seq.pooler:
                seq.pooler.take(self.decoder.norm(x[:num_new]).float().cpu())
            return cast("Tensor", logits.cpu())
        except Exception as error:
            problem = f"a hook failed: {type(error).__name__}: {first_line(error)}"
            known = isinstance(error, NanollamaError)
            told = error if known else RequestError(problem, "hooks")
            told.__cause__ = None if known else error
            seq.outbox.append(seq.end("error", error=told))
            self.engine.scheduler.retire(seq)
            return torch.empty(0, self.engine.n_vocab)


# ---- blocks with hooks, and traces ---------------------------------------------------------------

Active = tuple[int, Table]  # id of an engine
ACTIVE: ContextVar[tuple[Active, ...]] = ContextVar("hooks", default=())


def active_table(engine: Engine) -> dict[str, list[Hook]]:
    """The hooks of all open blocks of this thread or task, the outermost first."""
    table: dict[str, list[Hook]] = {}
    for owner, functions in ACTIVE.get():
        for name, found in functions.items() if owner == id(engine) else ():
            table.setdefault(name, []).extend(found)
    return table


class Watching(Engine):
    """An Engine some of whose sequences have a Probe, which runs their tokens."""

    probes: dict[Sequence, Probe]

    def add(self, seq: Sequence) -> None:
        table = active_table(self)
        probe = Probe(self, table) if table else None
        with self.lock:
            super().add(seq)
            if probe:
                self.probes = {s: p for s, p in self.probes.items() if not s.finish_reason}
                self.probes[seq], seq.shared_ids = probe, []

    def forward(self, work: list[tuple[Sequence, int]]) -> tuple[Tensor, ...]:
        plain = [item for item in work if item[0] not in self.probes]
        rows = iter(super().forward(plain) if plain else ())
        watched = ((self.probes.get(seq), seq, num_new) for seq, num_new in work)
        return tuple(probe(seq, num) if probe else next(rows) for probe, seq, num in watched)

    def advance(self, seq: Sequence, logits: Tensor) -> None:
        if not seq.finish_reason:  # an error of a hook ends it before
            super().advance(seq, logits)


def watch_engine(engine: Any) -> None:
    """Give an engine the methods of Watching above its own."""
    with engine.lock:
        if not isinstance(engine, Watching):
            engine.probes = {}
            engine.__class__ = type("Engine", (Watching, type(engine)), {})


@contextlib.contextmanager
def hooks(llm: LLM, functions: Mapping[str, Hook]) -> Iterator[None]:
    """As `Library.hooks`."""
    engine, table = llm.engine, dict[str, list[Hook]]()
    names = names_of(engine.decoder)
    for wanted, hook in functions.items():
        found = fnmatch.filter(names, wanted)
        if not found:
            kinds = sorted({name.partition(".")[0] for name in names}, key=[*KINDS].index)
            known = f"{', '.join(kinds)}, each with the number of a layer, as in {names[0]}"
            raise RequestError(f"no tensor is called {excerpt(wanted)}; there are {known}", "hooks")
        for name in found:
            table.setdefault(name, []).append(hook)
    watched_decoder(engine.decoder, Watch(table))  # refuses at once what cannot be
    watch_engine(engine)
    token = ACTIVE.set((*ACTIVE.get(), (id(engine), table)))
    try:
        yield
    finally:
        ACTIVE.reset(token)


ROWS_DIM = {"patterns": 1, "resid": -2}  # else the first dimension has the rows


def trace(
    llm: LLM, text: str | list[int], layers: Iterable[int] | None, what: Iterable[str]
) -> dict[str, Tensor]:
    """As `Library.trace`."""
    engine, ids = llm.engine, llm.encode(text) if isinstance(text, str) else list(text)
    engine.check_ids(ids, "text")
    if not ids:
        raise RequestError("there are no tokens to trace", "text")
    found: dict[str, list[Tensor]] = {
        name: [] for name in wanted_names(engine.decoder, layers, what)
    }
    table = active_table(engine)
    for name in found:
        keep = functools.partial(_keep, found[name])
        table[name] = [*table.get(name, ()), keep]
    chunk = engine.scheduler.prefill_chunk
    with engine.lock, torch.inference_mode():
        probe = Probe(engine, table)
        for at in range(0, len(ids), chunk):
            new = ids[at : at + chunk]
            probe.run(
                ids, at, new, len(new) if f"logits.{len(engine.decoder.layers)}" in found else 0
            )
    return {name: joined(name, parts, len(ids)) for name, parts in found.items() if parts}


def _keep(parts: list[Tensor], x: Tensor, place: Place) -> None:
    parts.append(x.cpu())


def joined(name: str, parts: list[Tensor], num_tokens: int) -> Tensor:
    """One tensor of the parts for each chunk of a text."""
    kind = name.partition(".")[0]
    if kind == "patterns":
        parts = [F.pad(part, (0, num_tokens - part.shape[2])) for part in parts]
    return torch.cat(parts, dim=ROWS_DIM.get(kind, 0))


def unembed(decoder: Decoder, x: Tensor) -> Tensor:
    """The logits (T, V) float32 that the stream x (T, C) would give after the last layer; for that
    of the last layer, the model's own, bit for bit."""
    tiled = F.pad(x.to(decoder.device), (0, 0, 0, -len(x) % decoder.row_tile))
    with torch.inference_mode():
        return decoder.capped(decoder.lm_head(tiled, norm=decoder.norm)[: len(x)].float())
