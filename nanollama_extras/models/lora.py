"""LoRA adapters in the layout of PEFT (https://huggingface.co/docs/peft): `--adapter DIRECTORY`.

Adds       y += scale B A x beside the matrices that an adapter changes
           (https://arxiv.org/abs/2106.09685).
Seam       `Weights.adapter`: the core hands every matrix that it builds to `wrap`, and asks
           `check_used` at the end whether every module of the adapter has found its matrix.
Remove     delete this file; --adapter then says that it needs it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

import nanollama
from nanollama import (
    CheckpointError,
    ModelConfig,
    Norm,
    Projection,
    TensorSource,
    Weights,
    linear,
    operand,
)

ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
# Keys of adapter_config.json by which an adapter is more than pairs of A and B.
UNSUPPORTED_KEYS = (
    "use_dora modules_to_save lora_bias fan_in_fan_out layer_replication target_parameters "
    "trainable_token_indices use_qalora alora_invocation_tokens use_bdlora arrow_config "
    "kasa_config velora_config monteclora_config".split()
)
# Values of init_lora_weights that leave the base model as it is, and those that take from each
# matrix a part that can be computed from it again.
PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")
TAKING_STARTS = ("pissa", "olora")


@dataclass(frozen=True, slots=True)
class LowRank:
    """The update of one matrix: y += scale B A x."""

    a: TensorSource  # (rank, cols)
    b: TensorSource  # (rows, rank)
    scale: float


@dataclass(frozen=True, slots=True)
class Adapter:
    """The updates of an adapter by the name of the module that each belongs to."""

    path: Path
    modules: Mapping[str, LowRank]
    taken: str | None = None  # the start, of TAKING_STARTS, that took from the base model
    used: set[str] = field(default_factory=set)  # names of modules that `wrap` has seen

    def wrap(
        self, weights: Weights, projection: Projection, outputs: Mapping[str, int], num_cols: int
    ) -> Projection:
        """The projection with the updates of its matrices, which `outputs` names with their number
        of rows. Raises CheckpointError for an update of another shape."""
        updates: list[tuple[int, Tensor, Tensor]] = []
        start, taken = 0, dict[int, dict[str, tuple[Tensor, Tensor]]]()
        for name, num_rows in outputs.items():
            if low_rank := self.modules.get(name):
                a, b, rank = low_rank.a, low_rank.b, low_rank.b.shape[-1]
                if (a.shape, b.shape) != ((rank, num_cols), (num_rows, rank)):
                    raise CheckpointError(
                        f"{self.path}: {name} has A {a.shape} and B {b.shape}; the model's matrix "
                        f"is {(num_rows, num_cols)}"
                    )
                loaded = (cast("Tensor", source.load()) for source in (a, b))
                down, up = (x.to(weights.device, torch.float32) for x in loaded)
                up = up * low_rank.scale
                updates.append((start, down.to(weights.dtype), up.to(weights.dtype)))
                if self.taken:
                    if id(a) not in taken:
                        taken[id(a)] = self.taken_parts(weights, low_rank)
                    down, up = (x.to(weights.device, weights.dtype) for x in taken[id(a)][name])
                    updates.append((start, down, -up))
                self.used.add(name)
            start += num_rows
        return AdaptedProjection(projection, updates) if updates else projection

    def taken_parts(self, weights: Weights, low_rank: LowRank) -> dict[str, tuple[Tensor, Tensor]]:
        """The part (A, B) that PEFT took from each matrix of a module before training: the
        principal part of PiSSA (https://arxiv.org/abs/2404.02948), or the first columns' part of
        OLoRA (https://arxiv.org/abs/2406.01775). The parts of a fused matrix share an A."""
        names = [name for name, other in self.modules.items() if other.a is low_rank.a]
        sources = [weights.tensors[f"{name}.weight"] for name in names]
        if any(source.is_packed for source in sources):
            raise CheckpointError(
                f"{self.path}: init_lora_weights {self.taken!r} took a part of {names[0]}, which "
                "only float weights tell; use the float model, with --quantize where wanted"
            )
        whole = torch.cat([cast("Tensor", source.load()).float() for source in sources])
        rank = low_rank.a.shape[0]
        if self.taken == "pissa":
            left, sizes, right = torch.linalg.svd(whole, full_matrices=False)
            a, b = right[:rank], left[:, :rank] * sizes[:rank]
        else:
            left, right = torch.linalg.qr(whole)
            a, b = right[:rank], left[:, :rank] * low_rank.scale
        rows = b.split([source.shape[0] for source in sources])
        return {name: (a, part) for name, part in zip(names, rows)}

    def check_used(self) -> None:
        """Raises CheckpointError for a module that the model does not have."""
        if unused := sorted(self.modules.keys() - self.used):
            raise CheckpointError(
                f"{self.path}: it changes {nanollama.excerpt(unused[0])}, which this model does "
                "not have, or which cannot be adapted here"
            )


class AdaptedProjection(Projection):
    """A projection and its updates: (first row of the output, A (rank, cols), B (rows, rank))."""

    def __init__(self, base: Projection, updates: list[tuple[int, Tensor, Tensor]]) -> None:
        super().__init__(base.parts)
        self.base, self.updates = base, updates

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None = None,
        act: str = "",
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        x = operand(x, norm, act)
        y = self.base(x, residual=residual, out=out)
        for start, a, b in self.updates:
            y[:, start : start + len(b)] += linear(linear(x, a), b)
        return y

    @property
    def nbytes(self) -> int:
        return self.base.nbytes + sum(a.nbytes + b.nbytes for _, a, b in self.updates)


def open_adapter(directory: str | Path, config: ModelConfig) -> Adapter:
    """Open a directory with adapter_config.json and adapter_model.safetensors.

    Raises CheckpointError, naming the file."""
    path = Path(directory).expanduser()
    if not path.is_dir():
        problem = "not a directory" if path.exists() else "no such directory"
        raise CheckpointError(f"{path}: {problem}; an adapter is a directory with {ADAPTER_FILE}")
    if not (path / ADAPTER_FILE).exists():
        pickled = (path / "adapter_model.bin").exists()
        hint = "; adapter_model.bin is a pickle, which is never opened" if pickled else ""
        raise CheckpointError(f"{path}: no {ADAPTER_FILE}{hint}")
    settings = nanollama.read_json(path / ADAPTER_CONFIG)
    tensors = nanollama.read_safetensors(path / ADAPTER_FILE)
    with nanollama.errors_about(path / ADAPTER_CONFIG):
        scale, taken = check_settings(settings), check_start(settings.get("init_lora_weights"))
    with nanollama.errors_about(path / ADAPTER_FILE):
        return Adapter(path, low_ranks(tensors, scale, config), taken)


def check_settings(settings: Mapping[str, Any]) -> Callable[[str, int], float]:
    """The scale of each module by its name and rank. Raises CheckpointError for an adapter that
    needs more than pairs of A and B."""
    if settings.get("peft_type") != "LORA":
        kind = nanollama.excerpt(settings.get("peft_type"))
        raise CheckpointError(f"peft_type {kind} is not supported; LORA is")
    for key in ("bias", *UNSUPPORTED_KEYS):
        if settings.get(key) and (key, settings[key]) != ("bias", "none"):
            raise CheckpointError(f"{key} {nanollama.excerpt(settings[key])} is not supported")
    return module_scale(settings)


def check_start(start: object) -> str | None:
    """The start of training that took from the base model, None for one that did not. Raises
    CheckpointError for a start that changed it in a way that the files do not tell."""
    name = start.lower() if isinstance(start, str) else start
    if name in TAKING_STARTS:
        return str(name)
    if name not in PLAIN_STARTS:
        raise CheckpointError(
            f"init_lora_weights {nanollama.excerpt(start)} changed the base model in a way that "
            "these files do not tell; convert the adapter with PEFT's save_pretrained(.., "
            "path_initial_model_for_weight_conversion=..), or use the merged model"
        )
    return None


def low_ranks(
    tensors: Mapping[str, TensorSource], scale: Callable[[str, int], float], config: ModelConfig
) -> dict[str, LowRank]:
    """A and B of each module, in the decoder's names and order of rows: B is renamed and reordered
    like the weight that it changes, and the parts of a fused matrix share one A."""
    family = nanollama.find_family(config.model_type)
    a: dict[str, tuple[TensorSource, float]] = {}
    b: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name)
        if match is None or len(tensor.shape) != 2:
            raise CheckpointError(f"tensor {nanollama.excerpt(name)} is not supported")
        if match[2] == "A":
            module = nanollama.canonical_name(f"{match[1]}.lora_A", family).removesuffix(".lora_A")
            a[module] = tensor, scale(match[1], tensor.shape[0])
        else:
            b[f"{match[1]}.lora_B"] = tensor
    updates = {}
    for name, tensor in nanollama.canonical_tensors(b, config).items():
        module = name.removesuffix(".lora_B")
        fused = re.sub(r"\.[qkv]_proj$", ".qkv_proj", module)
        fused = re.sub(r"\.(gate|up)_proj$", ".gate_up_proj", fused)
        if not (its_a := a.get(module) or a.get(fused)):
            raise CheckpointError(f"{module} has a B and no A")
        updates[module] = LowRank(its_a[0], tensor, its_a[1])
    return updates


def module_scale(settings: Mapping[str, Any]) -> Callable[[str, int], float]:
    """A function from a module's name and rank to its scale, which is alpha / rank or
    alpha / sqrt(rank); alpha_pattern has the alphas of modules that depart from lora_alpha."""
    patterns = settings.get("alpha_pattern") or {}
    if not isinstance(patterns, Mapping):
        raise CheckpointError(
            f"alpha_pattern is {nanollama.excerpt(patterns)}; an object is needed"
        )
    for pattern in patterns:
        if re.search(r"[^\w.]", pattern):  # PEFT takes it for a regular expression
            raise CheckpointError(
                f"alpha_pattern {nanollama.excerpt(pattern)} is not supported; plain names of "
                "modules are"
            )
    default = nanollama.positive(settings.get("lora_alpha"), "lora_alpha")
    alphas = {
        pattern: nanollama.positive(alpha, "lora_alpha") for pattern, alpha in patterns.items()
    }
    power = 0.5 if settings.get("use_rslora") else 1.0

    def scale(module: str, rank: int) -> float:
        matching = (alpha for end, alpha in alphas.items() if f".{module}".endswith(f".{end}"))
        return next(matching, default) / math.pow(max(rank, 1), power)

    return scale
