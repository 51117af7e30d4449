"""Models on the native backend: core tests of models and files, on native kernels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import test_formats
import test_model
from oracle import Tiny, matrices

from nanollama import LLM, REPACK, KernelError
from nanollama_extras.kernels.native import NativeLinear, find_compiler

try:
    find_compiler()
except KernelError:
    pytest.skip("there is no C compiler", allow_module_level=True)


@pytest.mark.parametrize(
    "options",
    [
        *({"kv_dtype": kv} for kv in ("float32", "float16", "q8", "bfloat16")),
        *({"quantize": q} for q in ("q4", "q8")),
    ],
    ids=repr,
)
def test_rows_are_bit_for_bit_the_same_however_a_prompt_is_cut(
    tiny: Tiny, options: dict[str, Any]
) -> None:
    options = {"kernels": "native", **options}
    test_model.test_rows_are_bit_for_bit_the_same_however_a_prompt_is_cut(tiny, options)


def test_a_strip_grows_by_doubling_and_keeps_what_it_holds(tiny: Tiny) -> None:
    test_model.test_a_strip_grows_by_doubling_and_keeps_what_it_holds(tiny, "native")


@pytest.mark.parametrize("kind", REPACK)
def test_packed_types_stay_packed(tiny: Tiny, tmp_path: Path, kind: str) -> None:
    test_formats.test_packed_types_stay_packed(tiny, tmp_path, kind, "native")


def test_quantized_weights_are_native(tiny: Tiny) -> None:
    llm = LLM(tiny("Llama"), quantize="q8", kernels="native")
    assert all(isinstance(weight, NativeLinear) for weight in matrices(llm.engine.decoder))
