"""Modules and tensors of a loaded model, which a program may replace.

Adds       `opened`, for `LLM.decoder`. From then on, each step compares all modules and tensors of
           the decoder with those of the step before, a fraction of a millisecond for a small model.
           A program that never asks for `LLM.decoder` does not pay for it.
Seam       `Decoder.parts`, which `Engine.step` compares: the core looks at whole layers only.
Remove     delete this file; `LLM.decoder` then says that it needs it.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from nanollama import LLM, Backend, Engine, KVCache, Rope, Weights

if TYPE_CHECKING:
    from nanollama import Decoder


class Parts(list[Any]):
    """Modules and tensors; equal to others only if all are the same objects."""

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Parts) or len(self) != len(other):
            return False
        return all(map(operator.is_, self, other))

    def __ne__(self, other: object) -> bool:
        return not self == other

    __hash__ = None


def values(item: object) -> Iterable[Any]:
    """What a module or a list consists of."""
    if isinstance(item, (list, tuple)):
        return item
    is_ours = type(item).__module__.startswith(("nanollama", "__main__"))
    is_module = is_ours and hasattr(item, "__dict__") and not isinstance(item, NO_MODULES)
    return vars(item).values() if is_module else ()


class PartFinder:
    """Finds every module and tensor of a decoder, and every other object in the place of one. As
    long as nothing is replaced, a call only compares the ids of what each module consists of."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder, self.found = decoder, Parts()
        # what a module consists of, live; the same as a list; their ids
        self.known: list[tuple[Iterable[Any], list[Any], list[int]]] = []

    def __call__(self) -> Parts:
        if not self.known or any([*map(id, live)] != ids for live, _, ids in self.known):
            self.found, self.known = Parts(), []
            self.visit(values(self.decoder), set())
        return self.found

    def visit(self, live: Iterable[Any], seen: set[int]) -> None:
        items = list(live)
        self.known.append((live, items, [*map(id, items)]))
        for item in items:
            inside = values(item)
            is_part = callable(item) or isinstance(item, torch.Tensor) or inside
            if is_part and id(item) not in seen:
                seen.add(id(item))
                self.found.append(item)
                if inside:
                    self.visit(inside, seen)


NO_MODULES = (LLM, Engine, Backend, KVCache, Rope, Weights, PartFinder)  # but may be in modules


def opened(llm: LLM) -> Decoder:
    """The decoder, whose parts are compared from now on."""
    engine, decoder = llm.engine, llm.engine.decoder
    with engine.lock:
        if "parts" not in vars(decoder):
            steps, before = engine.decode_steps, decoder.parts()
            is_recorded = steps is not None and steps.parts == before
            finder = PartFinder(decoder)
            decoder.parts = finder  # type: ignore[method-assign]
            if engine.parts == before:
                engine.parts = finder()
            if steps and is_recorded:
                steps.parts = finder()
    return decoder
