"""A model in the terms of GGUF: the inverse of how the core reads such a file.

Adds       `gguf_form`: metadata and tensors of a checkpoint under GGUF's names. The names come from
           the tables that the reader uses, and what the reader makes of the result is compared with
           the model: a family that GGUF cannot describe is refused.
Seam       files.conversion calls it. Imports files.gguf_families; models.routing, models.rows and
           models.ropes, for their tables of metadata; and models.routers, which names the tensors
           of blocks that predict further tokens.
Remove     delete this file with commands/convert.py.
Spec       https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import gguf
import numpy as np
import torch
from torch import Tensor

import nanollama
from nanollama import (
    GATED,
    GGUF_TENSORS,
    GGUF_VALUES,
    POST_NORMS,
    PRE_NORMS,
    Checkpoint,
    CheckpointError,
    ConfigValues,
    Family,
    ModelConfig,
    TensorSource,
    Weights,
    canonical_tensors,
    excerpt,
    find_family,
    head_order,
    inverse_wavelengths,
    make_rope,
    model_config,
    read_json,
    text_config,
)
from nanollama_extras.files import gguf_families
from nanollama_extras.models import ropes, routing, rows
from nanollama_extras.models.routers import prediction_tensors

# Layouts of tensors that a file has as the decoder does: norms with 1 added, experts apart
SAME_LAYOUTS = (
    "",
    "models.families:norms_plus_one",
    "models.gpt_oss:split_experts",
    "models.qwen3_vl:split_experts",
    "models.bidirectional:gguf_layout",
)
UNLIKE = ("bitnet",)  # architectures for which llama.cpp computes something else
GATING = {"softmax": 1, "sigmoid": 2}  # expert_gating_func
# Numbers that a family's own decoder needs -> key of config.json
MORE_KEYS = {
    "ernie4_5_moe": {
        "leading_dense_block_count": "moe_layer_start_index",
        "interleave_moe_layer_step": "moe_layer_interval",
    },
    "llama4_text": {"interleave_moe_layer_step": "interleave_moe_layer_step"},
}
# Families whose files say how wide the expert is that every token goes to, beside how many it is of
WIDTH_OF_SHARED = ("ernie4_5_moe",)
EPS_KEYS = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon", "norm_eps")
SKIPPED = ("rotary_emb.inv_freq", "masked_bias", "cls.output.weight")  # no weights


@dataclass(frozen=True, slots=True)
class Stack:
    """A tensor under its GGUF name: matrices, or one vector, of a checkpoint one after another.

    parts: the decoder's name of each, and the tensor"""

    name: str
    shape: tuple[int, ...]
    parts: tuple[tuple[str, TensorSource], ...]

    def source(self) -> TensorSource:
        """The tensor as a reader would have it, to be asked for its shape"""
        load = self.parts[0][1].load
        return TensorSource(self.shape, "F32", 4 * math.prod(self.shape), load)


@dataclass(frozen=True, slots=True)
class Form:
    """A model as GGUF has it."""

    arch: str
    metadata: Mapping[str, Any]
    stacks: tuple[Stack, ...]
    notes: tuple[str, ...] = ()  # what the file cannot say


def gguf_form(checkpoint: Checkpoint) -> Form:
    """The metadata, without those of the vocabulary, and the tensors of a checkpoint.

    Raises CheckpointError for a model that GGUF cannot describe."""
    config = checkpoint.config
    family = find_family(config.model_type)
    arch = family.gguf.partition(" ")[0]
    title = f"{checkpoint.path}: model_type {config.model_type}"
    if not arch:
        raise CheckpointError(f"{title} has no architecture in GGUF; write a directory instead")
    own_family = gguf_families.FAMILIES.get(config.model_type)
    is_alike = own_family or {family.layout, family.gguf_layout} <= set(SAME_LAYOUTS)
    if arch in UNLIKE or not is_alike:
        raise CheckpointError(f"{title} cannot be written as GGUF yet; write a directory instead")
    values, given = family_values(checkpoint, family)
    stacks = named_stacks(checkpoint, family, arch)
    stacks += rope_stacks(config)
    expected, more = config, dict[str, Any]()
    if own_family:
        expected = own_family.expected(config, checkpoint.tensors)
        more = own_family.values(config, given, checkpoint.tensors)
    own = {
        **shape_values(config, given),
        **rope_values(config),
        **table_values(config, values, given),
        **more,
    }
    own["context_length"] = values.get("max_position_embeddings", config.n_ctx)  # not stretched
    own |= image_values(checkpoint)
    named = {name: f"{arch}." * (name not in gguf_families.WITHOUT_ARCH) + name for name in own}
    metadata = {named[name]: value for name, value in own.items()}
    metadata = {"general.architecture": arch, "general.type": "model", **metadata}
    metadata, notes = checked(title, expected, metadata, stacks)
    if prediction_tensors(checkpoint.tensors, config.n_layers):
        notes.append("the blocks that predict further tokens are left out")
    return Form(arch, metadata, tuple(stacks), tuple(notes))


def family_values(checkpoint: Checkpoint, family: Family) -> tuple[ConfigValues, Mapping[str, Any]]:
    """The keys of config.json, completed by the family, and as they were before that."""
    raw = text_config(read_json(checkpoint.path / "config.json"))
    given = {**family.defaults, **raw}
    values = ConfigValues({key: value for key, value in given.items() if value is not None})
    if family.check:
        family.check(values)
    return values, given


def image_values(checkpoint: Checkpoint) -> dict[str, Any]:
    """The number of layers that take more of an image than its rows, which llama.cpp compares with
    the image part (mmproj)."""
    vision = read_json(checkpoint.path / "config.json").get("vision_config")
    deep = vision.get("deepstack_visual_indexes") if isinstance(vision, Mapping) else None
    return {"n_deepstack_layers": len(deep)} if isinstance(deep, list) and deep else {}


# ---- tensors -------------------------------------------------------------------------------------


def arch_tensors(arch: str) -> set[str]:
    """GGUF_TENSORS' names of the tensors that an architecture has; empty if the gguf package does
    not know it"""
    by_name = {name: key for key, name in gguf.MODEL_ARCH_NAMES.items()}
    listed = gguf.MODEL_TENSORS[by_name[arch]] if arch in by_name else []
    return {gguf.TENSOR_NAMES[key].replace("blk.{bid}.", "") for key in listed}


def own_names(config: ModelConfig, known: set[str]) -> dict[str, str]:
    """The decoder's name of a part -> GGUF's"""
    names = {ours: theirs for theirs, ours in GGUF_TENSORS.items()}
    if POST_NORMS[0] not in config.norms and known and "ffn_norm" not in known:
        names[PRE_NORMS[1]] = "post_attention_norm"
    return names


def named_stacks(checkpoint: Checkpoint, family: Family, arch: str) -> list[Stack]:
    """The checkpoint's tensors under GGUF's names, in their order: experts on top of each other,
    matrices fused that the architecture has fused. Raises CheckpointError for other tensors."""
    config, tensors = checkpoint.config, dict(checkpoint.tensors)
    known, own_family = arch_tensors(arch), gguf_families.FAMILIES.get(config.model_type)
    names = {**own_names(config, known), **(own_family.names if own_family else {})}
    for name in prediction_tensors(tensors, config.n_layers):
        del tensors[name]
    if config.tie_embeddings and "lm_head.weight" in tensors:
        weights = Weights(tensors, str(checkpoint.path), torch.device("cpu"), torch.float32)
        if weights.is_copy("lm_head", "model.embed_tokens"):
            del tensors["lm_head.weight"]
    in_order = functools.partial(file_order, config=config, family=family)
    own = own_family.tensors(tensors, config, in_order) if own_family else {}
    parts: dict[str, list[tuple[str, TensorSource]]] = {name: of for name, (_, of) in own.items()}
    for name, tensor in tensors.items():
        if name.endswith(SKIPPED):
            continue
        found = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(\w+)", name)
        layer, stem, suffix = found.groups() if found else ("", name, "")
        stem = re.sub(r"(?<=\.experts)\.\d+", "", stem)
        if stem not in names or suffix not in ("weight", "bias"):
            title = f"{checkpoint.path}: model_type {config.model_type}"
            raise CheckpointError(f"{title}: GGUF has no name for tensor {excerpt(name)}")
        block = "" if layer is None else f"blk.{layer}."
        theirs = f"{block}{names[stem]}.{suffix}"
        parts.setdefault(theirs, []).append((name, file_order(name, tensor, config, family)))
    if config.act in GATED and known and not known & {"ffn_gate", "ffn_gate_exps"}:
        parts = fused(parts, ("ffn_gate", "ffn_up"), "ffn_up")
    if known and "attn_qkv" in known and arch == "phi3":
        parts = fused(parts, ("attn_q", "attn_k", "attn_v"), "attn_qkv")
    return [
        Stack(name, own[name][0], tuple(of)) if name in own else stacked(name, tuple(of))
        for name, of in sorted_parts(parts).items()
    ]


def sorted_parts(parts: dict[str, Any]) -> dict[str, Any]:
    """Tensors in the order of layers, those without a layer first"""

    def place(name: str) -> tuple[int, int]:
        layer = re.match(r"blk\.(\d+)", name)
        return (int(layer[1]) if layer else -1, list(parts).index(name) if not layer else 0)

    return {name: parts[name] for name in sorted(parts, key=place)}


def fused(
    parts: dict[str, list[tuple[str, TensorSource]]], names: tuple[str, ...], whole: str
) -> dict[str, list[tuple[str, TensorSource]]]:
    """The tensors with those of `names` in a layer put together as `whole`"""
    found: dict[str, list[tuple[str, TensorSource]]] = {}
    for name, of in parts.items():
        block = re.fullmatch(r"(blk\.\d+\.)(\w+)\.(weight|bias)", name)
        if not block or block[2] not in names:
            found[name] = of
        elif block[2] == names[0]:
            each = [parts[f"{block[1]}{part}.{block[3]}"] for part in names]
            found[f"{block[1]}{whole}.{block[3]}"] = [one for some in each for one in some]
    return found


def stacked(name: str, parts: tuple[tuple[str, TensorSource], ...]) -> Stack:
    first = parts[0][1].shape
    if "_exps." in name:
        number = re.compile(r"experts\.(\d+)")
        parts = tuple(sorted(parts, key=lambda part: int(number.findall(part[0])[0])))
        return Stack(name, (len(parts), *first), parts)
    return Stack(name, (sum(tensor.shape[0] for _, tensor in parts), *first[1:]), parts)


def file_order(
    name: str, tensor: TensorSource, config: ModelConfig, family: Family
) -> TensorSource:
    """The tensor with the rows of queries and keys as GGUF has them: the inverse of what
    `canonical_tensors` does."""
    order = head_order(config, family.interleaved or family.permuted)
    num_rows = tensor.shape[0]
    if order is None or num_rows % config.head_dim:
        return tensor
    if not re.search(r"self_attn\.[qk]_(proj|norm)", name):
        return tensor
    starts = np.arange(0, num_rows, config.head_dim)[:, None]
    return tensor.part((starts + order.argsort()).flatten())


def vector(name: str, values: Tensor) -> Stack:
    """A small tensor that is computed"""
    load = lambda *rows: values[rows] if rows else values  # noqa: E731
    source = TensorSource(tuple(values.shape), "F32", values.nbytes, load)
    return Stack(name, source.shape, ((name, source),))


def rope_stacks(config: ModelConfig) -> list[Stack]:
    """The divisors of frequencies that GGUF has as tensors, for scaling as Llama 3 or longrope"""
    rope = config.rope
    kind, n_rot = rope["rope_type"], rope["n_rot"]
    plain = inverse_wavelengths(float(rope["rope_theta"]), n_rot)
    if kind == "llama3":
        freqs = make_rope(rope, rope["head_dim"]).freqs[: n_rot // 2]
        return [vector("rope_freqs.weight", plain / freqs)]
    lengths = ("long", "short") if kind == "longrope" else ()
    found = {length: torch.tensor(rope[f"{length}_factor"]) for length in lengths}
    return [vector(f"rope_factors_{length}.weight", each) for length, each in found.items()]


# ---- metadata ------------------------------------------------------------------------------------


def shape_values(config: ModelConfig, given: Mapping[str, Any]) -> dict[str, Any]:
    """The keys under {arch} that every model has, and those of experts and windows"""
    norm_eps = next((given[key] for key in EPS_KEYS if given.get(key)), config.norm_eps)
    found: dict[str, Any] = {
        "block_count": config.n_layers,
        "context_length": config.n_ctx,
        "embedding_length": config.n_embd,
        "feed_forward_length": config.n_ff,
        "vocab_size": config.n_vocab,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(norm_eps),
    }
    if config.norm.startswith("layer"):  # llama.cpp reads the one or the other, by architecture
        found["attention.layer_norm_epsilon"] = float(norm_eps)
    if experts := config.experts:
        found["expert_count"] = experts.count
        found["expert_used_count"] = experts.num_used
        found["expert_feed_forward_length"] = experts.n_ff
        shared = experts.n_ff_shared
        if config.model_type in WIDTH_OF_SHARED:
            shared = config.own["routing"].n_ff_shared
        if shared:
            found["expert_shared_feed_forward_length"] = shared
    if scoring := GATING.get(getattr(config.own.get("routing"), "scoring", "")):
        found["expert_gating_func"] = scoring
    if window := max(filter(None, config.windows), default=0):
        found["attention.sliding_window"] = int(window)
    return found


def rope_values(config: ModelConfig) -> dict[str, Any]:
    """The keys under {arch} about RoPE"""
    rope, theta = config.rope, float(config.rope["rope_theta"])
    kind, n_rot = rope["rope_type"], rope["n_rot"]
    if kind == "ntk":
        theta *= rope["alpha"] ** (n_rot / (n_rot - 2))
    found: dict[str, Any] = {"rope.freq_base": theta, "rope.dimension_count": n_rot}
    if len(config.ropes) > 1:
        found["rope.freq_base_swa"] = float(config.ropes[1]["rope_theta"])
    if kind == "mrope":
        found["rope.dimension_sections"] = [*rope["mrope_section"], 0][:4]
    if kind in ("linear", "yarn"):
        found |= {"rope.scaling.type": kind, "rope.scaling.factor": float(rope["factor"])}
    if kind == "longrope":
        found["rope.scaling.attn_factor"] = float(make_rope(rope, rope["head_dim"]).scales[0])
        found["rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    if kind == "yarn":
        for ours, theirs in ropes.GGUF_KEYS.items():
            if rope.get(theirs) and ours != "rope.scaling.attn_factor":
                is_count = theirs == "original_max_position_embeddings"
                found[ours] = int(rope[theirs]) if is_count else float(rope[theirs])
        if "attention.temperature_scale" in found:  # llama.cpp reads both for Mistral 4
            length = found["rope.scaling.original_context_length"]
            found["attention.temperature_length"] = length
    return found


def table_values(
    config: ModelConfig, values: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """The keys under {arch} of the reader's tables, where the model has a number for them"""
    found = {}
    tables = {**GGUF_VALUES, **rows.GGUF_KEYS, **MORE_KEYS.get(config.model_type, {})}
    for ours, theirs in tables.items():
        value = (values if ours in routing.GGUF_KEYS else given).get(theirs)
        if theirs == "logits_scaling" and value is None:
            value = given.get("logit_scale")
        is_number = isinstance(value, (bool, int, float))
        if is_number and not ours.startswith(("expert_count", "expert_used", "expert_feed")):
            found[ours] = value
    found.pop("attention.sliding_window", None)
    found.pop("attention.sliding_window_pattern", None)
    return found


# ---- what the reader makes of it -----------------------------------------------------------------


def checked(
    title: str, config: ModelConfig, metadata: dict[str, Any], stacks: list[Stack]
) -> tuple[dict[str, Any], list[str]]:
    """The metadata, with a pattern of windows if the reader needs it to find the same model, and
    what the file cannot say. Raises CheckpointError where the reader finds another model."""
    arch, notes = metadata["general.architecture"], []
    again, names = reread(metadata, stacks)
    if again.windows != config.windows and any(config.windows):
        pattern = f"{arch}.attention.sliding_window_pattern"
        with_pattern = {**metadata, pattern: [bool(window) for window in config.windows]}
        other, other_names = reread(with_pattern, stacks)
        if other.windows == config.windows:
            metadata, again, names = with_pattern, other, other_names
        elif not any(again.windows):
            width = max(filter(None, config.windows))
            notes.append(f"GGUF has no place for this model's attention window of {width} tokens")
            again = dataclasses.replace(again, windows=config.windows)
    missing = {part for stack in stacks for part, _ in stack.parts} - names
    if missing:
        raise CheckpointError(f"{title}: a GGUF file would not give tensor {min(missing)}")
    wrong = [name for name in DESCRIBED if not is_same(name, config, again)]
    if not same_ropes(config, again, stacks):
        wrong.append("ropes")
    if wrong:
        name = wrong[0]
        raise CheckpointError(
            f"{title} cannot be written as GGUF, which has no place for its {name} "
            f"({excerpt(getattr(config, name))})"
        )
    return metadata, notes


LEFT_OUT = ("model_type", "packing", "tie_embeddings", "ropes")
DESCRIBED = tuple(f.name for f in dataclasses.fields(ModelConfig) if f.name not in LEFT_OUT)


def reread(metadata: Mapping[str, Any], stacks: list[Stack]) -> tuple[ModelConfig, set[str]]:
    """The configuration, and the tensors' names, that the core reads from such a file"""
    prefix = f"{metadata['general.architecture']}."
    own = {key.removeprefix(prefix): value for key, value in metadata.items()}
    tensors = {stack.name: stack.source() for stack in stacks}
    model_type = nanollama.gguf_model_type(metadata)
    config = model_config(nanollama._gguf_config(own, tensors, model_type), "GGUF")
    named = canonical_tensors(nanollama._gguf_names(tensors, config), config, from_gguf=True)
    left_out = {stack.name for stack in stacks if stack.name.startswith("rope_factors_")}
    return config, {*named, *left_out}


def is_same(name: str, config: ModelConfig, other: ModelConfig) -> bool:
    return is_close(getattr(config, name), getattr(other, name))


def is_close(a: Any, b: Any) -> bool:
    """Whether two values are equal but for the rounding of numbers to float32"""
    if dataclasses.is_dataclass(a) and type(a) is type(b):
        names = [f.name for f in dataclasses.fields(a)]
        return all(is_close(getattr(a, name), getattr(b, name)) for name in names)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(is_close(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(is_close, a, b))
    if isinstance(a, float) or isinstance(b, float):
        return a is not None and b is not None and math.isclose(a, b, rel_tol=1e-6)
    return bool(a == b)


def same_ropes(config: ModelConfig, other: ModelConfig, stacks: list[Stack]) -> bool:
    """Whether both turn columns alike, the second one with the divisors among the tensors"""
    divisors = next((s for s in stacks if s.name == "rope_freqs.weight"), None)
    if len(config.ropes) != len(other.ropes):
        return False
    for i, (a, b) in enumerate(zip(config.ropes, other.ropes)):
        one, two = make_rope(a, a["head_dim"]), make_rope(b, b["head_dim"])
        freqs = two.freqs
        if divisors and not i:
            by = cast("Tensor", divisors.parts[0][1].load())
            freqs = freqs.clone()
            freqs[..., : len(by)] /= by
        is_same_kind = type(one).angles is type(two).angles
        betas = [rope.get("llama_4_scaling_beta", 0.0) for rope in (a, b)]
        if not is_same_kind or one.freqs.shape != freqs.shape or not is_close(*betas):
            return False
        if not torch.allclose(one.freqs, freqs, rtol=1e-5, atol=1e-20):
            return False
        if not torch.allclose(one.scales, two.scales, rtol=1e-5):
            return False
    return True
