"""Packed weights on torch's own kernel of 4 bits."""

from __future__ import annotations

from pathlib import Path

import gguf_files
import pytest
import torch
from oracle import Tiny, random_ids
from test_quant import random_packed

from nanollama import LLM, Backend, GenerationRequest, KernelError, SamplingParams
from nanollama_extras.kernels.int4 import Int4Linear, new_linear

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_torch_s_own_kernel_computes_with_the_same_weights(name: str, dtype: torch.dtype) -> None:
    packed, bias, x = random_packed(name, num_rows=32), torch.randn(32), torch.randn(9, 96)
    exact = x @ packed.dequantize().T + bias
    linear = new_linear(packed.to(CPU, dtype), bias.to(dtype), True)
    assert linear
    y = linear(x.to(dtype))
    assert y.dtype == dtype
    assert (y.float() - exact).norm() < 6e-3 * exact.norm()  # bfloat16 keeps 8 bits
    for n in (1, 2, 5):
        assert torch.equal(linear(x.to(dtype)[:n]), y[:n])
    rows = torch.tensor([3, 3, 31])
    assert torch.equal(linear.rows(rows), packed.to(CPU, dtype).rows(rows))


def test_a_weight_that_the_kernel_does_not_take_stays_as_it_is() -> None:
    assert not new_linear(random_packed("Q4_1"), None, False)  # 24 rows
    for name in ("Q6_K", "MXFP4"):
        assert not new_linear(random_packed(name, num_rows=32), None, False)


def test_it_runs_where_native_kernels_cannot_be_had_and_in_bfloat16() -> None:
    packed = random_packed("Q4_1", num_rows=32)

    def made(dtype: torch.dtype, missing: str = "") -> type:
        backend = Backend(CPU, dtype, "torch", missing)
        return type(backend.pack(packed.shape, packed.select, None, False))

    assert made(torch.float32, "no compiler") is made(torch.bfloat16) is Int4Linear
    assert made(torch.float32) is not Int4Linear


def test_an_answer_is_the_same_alone_and_in_company(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> object:
        raise KernelError("no compiler")

    monkeypatch.setattr("nanollama_extras.kernels.native.make_backend", fail)
    path, _ = gguf_files.convert(tiny("Llama"), tmp_path / "model.gguf", "Q8_0")
    llm = LLM(path)
    assert llm.engine.decoder.row_tile == 1
    prompts = [random_ids(n) for n in (3, 17, 40)]
    params = SamplingParams(max_tokens=8, temperature=0.8, seed=1)
    requests = [GenerationRequest(prompt=ids, params=params) for ids in prompts]
    together = list(llm.stream(requests))
    for i, request in enumerate(requests):
        alone = [delta.token_id for delta in llm.stream([request])]
        assert alone == [delta.token_id for delta in together if delta.index == i]
