"""Rotary embeddings of some models only: yarn, dynamic NTK, NTK with an alpha, longrope, those of
the first columns of a head, those of positions in three dimensions.

Adds       rope_type yarn, dynamic, ntk, longrope (or su), proportional and mrope.
Seam       the core asks `check_rope` about rope_parameters of a type that it does not know,
           `from_gguf` for those of a GGUF file, and `ROPES` for the `Rope` of such a type.
Source     https://huggingface.co/docs/transformers/internal/rope_utils
           https://arxiv.org/abs/2309.00071 (yarn), 2402.13753 (longrope), 2409.12191 (mrope)
Remove     delete this file; a model with such a type then says that it needs it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

import nanollama
from nanollama import (
    Batch,
    CheckpointError,
    ConfigValues,
    KVCache,
    Rope,
    TensorSource,
    check_value,
    excerpt,
    positive,
)

if TYPE_CHECKING:
    import numpy.typing as npt

NUMBERS: dict[str, tuple[str, ...]] = {
    "yarn": ("factor",),
    "dynamic": ("factor",),
    "ntk": ("alpha",),
    "longrope": (),
    "proportional": (),
    "mrope": (),
}
OPTIONS = "beta_fast beta_slow attention_factor mscale mscale_all_dim".split()
OPTIONS += ["short_mscale", "long_mscale"]
ALIASES = {"su": "longrope"}
# GGUF metadata under {arch} -> key of rope_parameters
GGUF_KEYS = {
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "rope.scaling.yarn_attn_factor": "attention_factor",
    "rope.scaling.attn_factor": "attention_factor",
    "rope.scaling.yarn_beta_fast": "beta_fast",
    "rope.scaling.yarn_beta_slow": "beta_slow",
    "rope.scaling.yarn_log_multiplier": "mscale_all_dim",
    "attention.temperature_scale": "llama_4_scaling_beta",
}


def from_gguf(own: Mapping[str, Any], tensors: Mapping[str, TensorSource]) -> dict[str, Any]:
    """rope_parameters in GGUF metadata, of which `own` is the part under {arch}, and in tensors."""
    rope = {theirs: own[ours] for ours, theirs in GGUF_KEYS.items() if own.get(ours)}
    if "mscale_all_dim" in rope:
        rope["mscale"] = 1.0
    for length in ("long", "short"):
        if factors := tensors.get(f"rope_factors_{length}.weight"):
            numbers = cast("Tensor", factors.load()).flatten().tolist()
            rope |= {"rope_type": "longrope", f"{length}_factor": numbers}
    return rope


def check_rope(rope: dict[str, Any], values: ConfigValues) -> None:
    """Checks and completes rope_parameters. Raises CheckpointError."""
    kind = ALIASES.get(str(rope["rope_type"]), rope["rope_type"])
    if kind == "dynamic" and rope.get("alpha"):  # Hunyuan's files call a fixed stretch dynamic
        kind = "ntk"
    if str(kind) not in NUMBERS:
        supported = ", ".join((*nanollama.ROPE_NUMBERS, *NUMBERS))
        raise CheckpointError(
            f"rope_type {excerpt(kind)} is not supported; supported are: {supported}"
        )
    for key in (*NUMBERS[kind], *filter(rope.get, OPTIONS)):
        positive(rope.get(key), f"rope: {key}")
    rope["rope_type"] = kind
    n_ctx = values.count("max_position_embeddings")
    if kind == "proportional":
        rope["n_turned"], rope["n_rot"] = rope["n_rot"], rope["head_dim"]
    elif kind == "longrope":
        check_factors(rope)
        rope["factor"] = rope.get("factor") or n_ctx / rope["original_max_position_embeddings"]
    elif kind == "mrope":
        check_sections(rope)
    elif kind != "yarn" and rope["n_rot"] < 4:
        raise CheckpointError(f"rope turns {rope['n_rot']} columns; {kind} needs 4 or more")
    elif kind == "dynamic":  # transformers ignores another number
        rope["original_max_position_embeddings"] = n_ctx


def check_factors(rope: Mapping[str, Any]) -> None:
    """Checks the lists of divisors, one for short texts and one for long ones, and perhaps two
    factors on cos and sin."""
    if bool(rope.get("short_mscale")) != bool(rope.get("long_mscale")):
        raise CheckpointError("rope short_mscale and long_mscale are needed, or neither")
    for key in ("short_factor", "long_factor"):
        factors, size = rope.get(key), rope["n_rot"] // 2
        if not isinstance(factors, list) or len(factors) != size:
            raise CheckpointError(f"rope {key} is {excerpt(factors)}; {size} numbers are needed")
        for factor in factors:
            positive(factor, f"rope {key}")
    if (n_old := rope["original_max_position_embeddings"]) <= 1:
        raise CheckpointError(
            f"rope original_max_position_embeddings is {n_old}; it must be above 1"
        )


def check_sections(rope: Mapping[str, Any]) -> None:
    """Checks `mrope_section`: columns for time, height and width, which in some families alternate
    and must add up in the others."""
    sections = rope.get("mrope_section")
    is_valid = isinstance(sections, list) and [type(n) for n in sections] == [int] * 3
    check_value(is_valid, "rope: mrope_section", sections, "a list of three integers")
    if not rope.get("mrope_interleaved") and sum(cast("list[int]", sections)) != rope["n_rot"] // 2:
        raise CheckpointError(
            f"rope mrope_section {sections} does not add up to {rope['n_rot'] // 2}"
        )


class YarnRope(Rope):
    """Columns that turn often within the old context keep their frequency, those that turn rarely
    are stretched by the factor, with a ramp between."""

    def frequencies(self) -> tuple[Tensor, float]:
        rope, n_rot = self.parameters, self.n_rot
        theta, factor = float(rope["rope_theta"]), float(rope["factor"])
        n_old = rope["original_max_position_embeddings"]

        def column(turns: float) -> float:
            return n_rot * math.log(n_old / (turns * 2 * math.pi)) / (2 * math.log(theta))

        first, last = column(rope.get("beta_fast") or 32), column(rope.get("beta_slow") or 1)
        if rope.get("truncate", True):
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, n_rot - 1)
        ramp = ((torch.arange(n_rot // 2) - first) / (max(last - first, 0.001))).clamp(0, 1)
        inv_freq = nanollama.inverse_wavelengths(theta, n_rot)
        return ramp * inv_freq / factor + (1 - ramp) * inv_freq, self.attention_factor()

    def attention_factor(self) -> float:
        """The factor on cos and sin."""
        rope, factor = self.parameters, float(self.parameters["factor"])
        if rope.get("attention_factor") is not None:
            return float(rope["attention_factor"])

        def mscale(weight: float) -> float:
            return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

        if rope.get("mscale") and rope.get("mscale_all_dim"):
            return mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
        return mscale(1.0)


class NTKRope(Rope):
    """A larger theta: theta alpha^(n_rot / (n_rot - 2))."""

    def frequencies(self) -> tuple[Tensor, float]:
        rope = self.parameters
        theta = float(rope["rope_theta"])
        theta *= rope["alpha"] ** (self.n_rot / (self.n_rot - 2))
        return nanollama.inverse_wavelengths(theta, self.n_rot), 1.0


class DynamicRope(Rope):
    """Dynamic NTK: theta grows with the length of the text once it exceeds the old context.

    A token is turned as if it were the last of the text, so that neither chunks nor cached prefixes
    change a result; a transformers model that decodes with a cache, token by token, does the same.
    """

    def frequencies(self) -> tuple[Tensor, float]:
        theta = float(self.parameters["rope_theta"])
        return nanollama.inverse_wavelengths(theta, self.n_rot), 1.0

    def angles(self, positions: Any, batch: Batch, cache: KVCache) -> Any:
        factor, n_old = (
            self.parameters[key] for key in ("factor", "original_max_position_embeddings")
        )
        stretch = factor * (positions + 1.0) / n_old - (factor - 1)
        angles = super().angles(positions, batch, cache)
        is_torch = isinstance(positions, torch.Tensor)
        device = positions.device if is_torch else "cpu"
        powers = -torch.arange(0, 2 * angles.shape[1], 2, device=device) / (self.n_rot - 2)
        return angles * stretch.clip(min=1) ** (powers if is_torch else powers.numpy())


class LongRope(Rope):
    """Two sets of frequencies: for texts within the old context, and for longer ones. Keys of one
    set are of no use to the other, so a text that outgrows the old context is read again."""

    short_scales: Any = None  # `scales` of short texts, where long ones have others (Phi-MoE)

    def frequencies(self) -> tuple[Tensor, float]:
        rope = self.parameters
        factor, n_old = float(rope["factor"]), rope["original_max_position_embeddings"]
        scale = math.sqrt(1 + math.log(factor) / math.log(n_old)) if factor > 1 else 1.0
        inv_freq = nanollama.inverse_wavelengths(float(rope["rope_theta"]), self.n_rot)
        divisors = torch.tensor([rope["short_factor"], rope["long_factor"]])
        return inv_freq / divisors, float(
            rope.get("short_mscale") or rope.get("attention_factor") or scale
        )

    def regime(self, num_tokens: int) -> int:
        return int(num_tokens > self.parameters["original_max_position_embeddings"])

    def angles(self, positions: Any, batch: Batch, cache: KVCache) -> Any:
        # without spans, the batch is a recorded step of decoding: each row ends its text
        is_long = positions[:, 0] + 1 > self.parameters["original_max_position_embeddings"]
        for span in batch.spans:
            is_long[span.row : span.row + span.num_new] = bool(cache.regimes[span.slot])
        if "long_mscale" in self.parameters:
            if self.short_scales is None:
                self.short_scales = self.scales
            ratio = self.parameters["long_mscale"] / self.parameters["short_mscale"]
            self.scales = self.short_scales * (1 + (ratio - 1) * is_long[:, None])
        return positions * self.freqs[is_long * 1]


class ProportionalRope(Rope):
    """The wavelengths of a head that turns as a whole, of which only the shortest ones turn: column
    i with column i + D/2, as always."""

    def frequencies(self) -> tuple[Tensor, float]:
        rope = self.parameters
        inv_freq = nanollama.inverse_wavelengths(float(rope["rope_theta"]), self.n_rot)
        inv_freq[rope["n_turned"] // 2 :] = 0
        return inv_freq / float(rope.get("factor") or 1), 1.0


class Places(NamedTuple):
    """Positions in time, height and width (T, 3) of a text up to the end of its last image; later
    tokens have their index + `shift` thrice."""

    table: npt.NDArray[np.float32]
    shift: int

    def of(self, index: npt.NDArray[np.int64]) -> npt.NDArray[np.float32]:
        """The positions (n, 3) of tokens (n,)"""
        later = np.repeat(np.float32(index + self.shift)[:, None], 3, axis=1)
        near = self.table[index.clip(0, len(self.table) - 1)]
        return np.where((index < len(self.table))[:, None], near, later)


def read_places(text: list[int]) -> Places | None:
    """The places of a text whose rows of images have a `place`; None without images."""
    rows = [i for i, token_id in enumerate(text) if hasattr(token_id, "place")]
    if not rows:
        return None
    table, last = np.zeros((rows[-1] + 1, 3), dtype=np.float32), -1
    for i, token_id in enumerate(text[: len(table)]):
        own = getattr(token_id, "place", (last + 1,) * 3)
        table[i], last = own, max(last, *own)
    return Places(table, last + 1 - len(table))


class ThreeRope(Rope):
    """Some columns turn by a token's position in time, others by its height or width in an image
    (mrope). These differ in images only; the text after one goes on at the largest position + 1."""

    def __init__(self, parameters: Mapping[str, Any], head_dim: int) -> None:
        super().__init__(parameters, head_dim)
        sections = parameters["mrope_section"]
        axes = [axis for axis, size in enumerate(sections) for _ in range(size)]
        if parameters.get("mrope_interleaved"):
            axes = [i % 3 if i < 3 * sections[i % 3] else 0 for i in range(self.n_rot // 2)]
        self.axes = np.array(axes + [0] * (head_dim // 2 - len(axes)))  # of each pair of columns
        self.known: dict[int, tuple[list[int], Places | None]] = {}  # of the text in each slot

    def angles(self, positions: Any, batch: Batch, cache: KVCache) -> Any:
        spans = [(span, found) for span in batch.spans if (found := self.find(cache, span.slot))]
        if not spans:
            return super().angles(positions, batch, cache)
        is_torch = isinstance(positions, torch.Tensor)
        three = np.repeat(positions.cpu().numpy() if is_torch else positions, 3, axis=1)
        for span, found in spans:
            index = np.arange(span.start, span.start + span.num_new)
            three[span.row : span.row + span.num_new] = found.of(index)
        turned: Any = np.take(three, self.axes, axis=1)  # in the order that kernels read
        return (torch.from_numpy(turned).to(positions.device) if is_torch else turned) * self.freqs

    def find(self, cache: KVCache, slot: int) -> Places | None:
        """The places of the text in a slot; None for one without images."""
        text = cache.texts[slot]
        if self.known.get(slot, ([], None))[0] is not text:
            self.known[slot] = text, read_places(text)
        return self.known[slot][1]


ROPES = {
    "yarn": YarnRope,
    "dynamic": DynamicRope,
    "ntk": NTKRope,
    "longrope": LongRope,
    "proportional": ProportionalRope,
    "mrope": ThreeRope,
}
