"""The CUDA backend. Without a GPU, Triton's interpreter runs the kernels on the CPU and its
compiler shows that they compile; what only a GPU can tell is skipped then.

The interpreter knows no bfloat16, which is therefore tested on a GPU only."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import VARIANTS
from torch import Tensor

import nanollama
from nanollama import (
    KEY_TILE,
    LLM,
    Batch,
    GenerationRequest,
    PackedLinear,
    SamplingParams,
    attention,
    attention_bias,
    pack_nibbles,
    rms_norm,
    rotate,
    round_up,
)

pytest.importorskip("triton")
from nanollama_extras.kernels import cuda
from nanollama_extras.kernels.cuda import (
    CudaBackend,
    DecodeGraphs,
    StripRows,
    TritonLinear,
    strip_attention,
    triton_linear,
    triton_rms_norm,
    triton_rotate,
)
from nanollama_extras.models.families import Chunk

HAS_CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CUDA else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if HAS_CUDA else [])]
needs_cuda = pytest.mark.skipif(not HAS_CUDA, reason="there is no GPU")
EPS = {torch.float32: 1e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.fixture
def _kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernels compute whatever they can, on the CPU too."""
    monkeypatch.setattr(
        nanollama, "pick_backend", lambda wanted, device, dtype: CudaBackend(device, dtype, wanted)
    )
    if not HAS_CUDA:  # one program after the other: the fewer the faster
        monkeypatch.setattr(cuda, "STRIP_PROGRAMS", 1)
        monkeypatch.setattr(cuda, "STRIP_PARTS", 2)


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape).to(DEVICE, dtype)


def random_packed(
    bits: int, group: int, offset: bool, num_rows: int, num_groups: int, dtype: torch.dtype
) -> PackedLinear:
    shape = (num_rows, num_groups, group)
    if bits == 4:
        q = pack_nibbles(torch.randint(0, 16, shape))
    else:
        q = torch.randint(-128, 128, shape, dtype=torch.int8)
    scale = torch.randn(shape[:2]).half() / 2**bits
    packed = PackedLinear(q, scale, torch.randn(shape[:2]).half() if offset else None)
    packed, bias = packed.to(DEVICE, dtype), random(num_rows, dtype=dtype)
    return TritonLinear(packed.q, packed.scale, packed.offset, bias, dtype)


def close(ours: Tensor, exact: Tensor, dtype: torch.dtype) -> bool:
    return bool((ours.double() - exact).norm() <= EPS[dtype] * exact.norm())


def is_product(y: Tensor | None, x: Tensor, packed: PackedLinear) -> bool:
    """Whether y is x W^T + b but for the rounding of what is added up."""
    assert y is not None
    assert packed.bias is not None
    assert y.dtype == x.dtype
    x64, weight, bias = x.double(), packed.to(x.device, torch.float64).dequantize(), packed.bias
    error = y.double() - (x64 @ weight.T + bias.double())
    terms = x64.abs() @ weight.abs().T + bias.double().abs()
    return bool((error.abs() <= EPS[x.dtype] * terms).all())


FORMATS = [(4, 32, False), (4, 32, True), (4, 16, True), (8, 32, False), (8, 32, True)]
FORMATS += [(8, 16, False)]  # Q6_K


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group", "offset"), FORMATS)
def test_a_packed_product_is_that_of_the_float_weight(
    bits: int, group: int, offset: bool, dtype: torch.dtype
) -> None:
    for num_rows, num_groups, num_x in ((1, 1, 1), (5, 3, 2), (33, 18, 8), (16, 33, 37)):
        packed = random_packed(bits, group, offset, num_rows, num_groups, dtype)
        x = random(num_x, num_groups * group, dtype=dtype)
        assert is_product(triton_linear(x, packed), x, packed), (num_rows, num_groups, num_x)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("bits", [4, 8])
def test_a_product_reads_rows_that_are_strided(bits: int) -> None:
    packed = random_packed(bits, 32, True, 7, 2, torch.float32)
    x = random(64, 3).T
    assert is_product(triton_linear(x, packed), x, packed)


@pytest.mark.usefixtures("_kernels")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("bits", "group", "offset"), FORMATS)
def test_a_row_of_a_packed_product_does_not_depend_on_the_others(
    bits: int, group: int, offset: bool, dtype: torch.dtype
) -> None:
    packed = random_packed(bits, group, offset, 19, 40, dtype)
    x = random(50, 40 * group, dtype=dtype)
    whole = packed(x)
    for num_x in (1, 2, 8, 15, 16, 17, 31, 33):
        assert torch.equal(packed(x[:num_x]), whole[:num_x]), num_x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 64), (3, 5, 576), (7, 96)])
def test_rms_norm_is_that_of_torch(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, weight = 10 * random(*shape, dtype=dtype), random(shape[-1], dtype=dtype)
    ours, theirs = triton_rms_norm(x, weight, 1e-5), rms_norm(x.cpu(), weight.cpu(), 1e-5)
    assert ours.dtype == dtype
    assert close(ours.cpu(), theirs.double(), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("H", "D"), [(4, 16), (9, 64), (1, 96), (5, 8)])
def test_rotation_is_that_of_torch_also_of_a_part_of_each_row(
    H: int, D: int, dtype: torch.dtype
) -> None:
    x = random(3, H * D + 40, dtype=dtype)[:, 24 : H * D + 24].unflatten(1, (H, D))
    cos, sin = random(3, D // 2, dtype=dtype), random(3, D // 2, dtype=dtype)
    exact = rotate(x.cpu().double(), cos.cpu().double(), sin.cpu().double())
    ours = triton_rotate(x, cos, sin)
    assert ours.dtype == dtype
    assert close(ours.cpu(), exact, dtype)


def some_strips(num_tokens: list[int], Hkv: int, D: int, dtype: torch.dtype) -> list[Tensor]:
    """Strips of two layers, with room for a multiple of KEY_TILE tokens, garbage behind the end."""
    return [random(2, 2, Hkv, round_up(n, KEY_TILE), D, dtype=dtype) for n in num_tokens]


def strip_rows(rows: list[int], positions: list[int], strips: list[Tensor]) -> StripRows:
    addresses, room = [s.data_ptr() for s in strips], [s.shape[3] for s in strips]
    return StripRows(*torch.tensor([rows, positions, addresses, room], device=DEVICE))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("H", "Hkv", "D"), [(4, 2, 16), (9, 3, 64), (3, 1, 96), (2, 2, 8)])
@pytest.mark.parametrize("window", [None, 1, 7, 100, Chunk(7), Chunk(100)])
def test_one_call_attends_to_many_strips(
    H: int, Hkv: int, D: int, window: int | None, dtype: torch.dtype
) -> None:
    num_tokens, rows = [1, 65, 700, 1300], [5, 0, 2, 3]
    strips = some_strips(num_tokens, Hkv, D, dtype)
    q, k, v = (random(6, heads, D, dtype=dtype) for heads in (H, Hkv, Hkv))
    expected, exact = [s.clone() for s in strips], torch.zeros(6, H, D, dtype=torch.float64)
    for row, n, strip in zip(rows, num_tokens, expected):
        strip[:, 1, :, n - 1] = torch.stack((k[row], v[row]))
        bias = attention_bias(n - 1, 1, H // Hkv, window, like=exact)
        keys, values = strip[:, 1, :, : bias.shape[1]].cpu().double()
        exact[row] = attention(q[row : row + 1].cpu().double(), keys, values, bias)[0]
    out = torch.zeros_like(q)
    table = strip_rows(rows, [n - 1 for n in num_tokens], strips)
    strip_attention(out, q, k, v, table, layer=1, n_layers=2, window=window)
    assert close(out.cpu(), exact, dtype)
    assert all(map(torch.equal, strips, expected)), "the new keys and values, and nothing else"


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_attention_row_does_not_depend_on_how_many_others_there_are(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_tokens = [1100, 3, 70]
    strips = some_strips(num_tokens, 1, 16, dtype)
    q, k, v = (random(3, heads, 16, dtype=dtype) for heads in (2, 1, 1))

    def attend(count: int) -> Tensor:
        out = torch.zeros_like(q)
        positions = [n - 1 for n in num_tokens[:count]]
        table = strip_rows(list(range(count)), positions, strips[:count])
        strip_attention(out, q, k, v, table, 0, 2, None)
        return out[:1]

    alone = attend(1)  # 16 programs for each row
    monkeypatch.setattr(cuda, "STRIP_PROGRAMS", 15)  # 5, as if there were many rows
    assert torch.equal(attend(3), alone)


@pytest.mark.parametrize(
    "how",
    [{"scale": 0.3}, {"softcap": 1.5}, {"sinks": torch.tensor([2.0, -1.0, 0.5, 3.0])}],
    ids=str,
)
def test_scores_may_be_scaled_capped_and_beside_a_sink(how: dict[str, Any]) -> None:
    (strip,) = some_strips([700], 2, 16, torch.float32)
    q, k, v = (random(1, heads, 16, dtype=torch.float32) for heads in (4, 2, 2))
    on_device = {n: x.to(DEVICE) if isinstance(x, Tensor) else x for n, x in how.items()}
    out = torch.zeros_like(q)
    strip_attention(out, q, k, v, strip_rows([0], [699], [strip]), 1, 2, 90, **on_device)
    exact = torch.zeros(1, 4, 16, dtype=torch.float64)
    bias = attention_bias(699, 1, 2, 90, like=exact)
    keys, values = strip[:, 1, :, : bias.shape[1]].cpu().double()
    exact = attention(q.cpu().double(), keys, values, bias, **how)
    torch.testing.assert_close(out.cpu().double(), exact.double(), rtol=0, atol=1e-5)


def test_a_ring_holds_the_last_positions() -> None:
    ring = some_strips([512], 1, 16, torch.float32)[0]
    strip = random(2, 2, 1, 1024, 16, dtype=torch.float32)
    positions = torch.arange(200, 700)
    ring[:, :, :, positions % 512] = strip[:, :, :, positions]
    q, k, v = (random(1, heads, 16, dtype=torch.float32) for heads in (2, 1, 1))
    ours, theirs = torch.zeros_like(q), torch.zeros_like(q)
    strip_attention(ours, q, k, v, strip_rows([0], [700], [ring]), 0, 2, 300, ring=512)
    strip_attention(theirs, q, k, v, strip_rows([0], [700], [strip]), 0, 2, 300)
    assert torch.equal(ours, theirs)
    assert torch.equal(ring[:, 0, 0, 700 % 512], torch.stack((k[0, 0], v[0, 0])))


PROMPTS = [[5, 6, 7], list(range(20, 50)), [9]]
GREEDY = SamplingParams(temperature=0, max_tokens=3, ignore_eos=True)


def answers(llm: LLM) -> list[list[int]]:
    """What the model says to PROMPTS, all at once."""
    found: list[list[int]] = [[] for _ in PROMPTS]
    for delta in llm.stream([GenerationRequest(ids, params=GREEDY) for ids in PROMPTS]):
        if delta.token_id is not None:
            found[delta.index].append(delta.token_id)
    return found


@pytest.mark.parametrize("quantize", [None, "q4", "q8"])
def test_a_model_on_the_kernels_is_the_model_on_torch(
    tiny: Callable[..., Path], quantize: str | None, request: pytest.FixtureRequest
) -> None:
    name, overrides = VARIANTS["qwen2-window"]
    path = tiny(name, **overrides)
    with_torch = LLM(path, device="cpu", quantize=quantize, parallel=3, kernels="torch")
    expected, said = with_torch.logits(PROMPTS[1]), answers(with_torch)
    request.getfixturevalue("_kernels")
    llm = LLM(
        path, device=str(DEVICE), quantize=quantize, parallel=3, prefill_chunk=25, kernels="torch"
    )
    torch.testing.assert_close(llm.logits(PROMPTS[1]).cpu(), expected, rtol=0, atol=1e-4)
    assert answers(llm) == said


class Eager(DecodeGraphs):
    """Runs a step each time instead of recording it."""

    def record(self, batch: cuda.DecodeBatch) -> Callable[[], Tensor]:
        return lambda: self.decoder(batch, self.cache)


@pytest.fixture(params=[Eager, pytest.param(DecodeGraphs, marks=needs_cuda)])
def graphs(request: pytest.FixtureRequest) -> type[DecodeGraphs]:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def tiny_q4(tiny: Callable[..., Path], _kernels: None) -> Iterator[LLM]:
    with torch.inference_mode():
        yield LLM(
            tiny("Llama", num_hidden_layers=1),
            device=str(DEVICE),
            quantize="q4",
            parallel=4,
            kernels="torch",
        )


def test_a_step_in_fixed_tensors_is_an_ordinary_step(
    tiny_q4: LLM, graphs: type[DecodeGraphs]
) -> None:
    decoder = tiny_q4.engine.decoder
    caches = [decoder.new_cache(4) for _ in range(2)]
    work = [(slot, 0, [7, 8, 9][: slot + 1], 1) for slot in (2, 0, 1)]
    for cache in caches:
        for slot, *_ in work:
            cache.reserve(slot, 4)
        decoder(Batch(work, DEVICE), cache)
    steps = graphs(decoder, caches[0])
    for turn, slots in enumerate(([2, 0, 1], [0, 1], [2], [1, 2])):  # 3 rows: 4, one for nobody
        work = [(slot, 1 + slot + turn, [30 + slot], 1) for slot in slots]
        for slot in slots:  # strips move when they grow
            caches[0].strips[slot] = caches[0].strips[slot].clone()
        found = steps(work)
        assert found is not None
        assert torch.equal(found, decoder(Batch(work, DEVICE), caches[1]))
    assert sorted(steps.recorded) == [1, 2, 4]
    assert steps([(0, 9, [1, 2], 1)]) is None
    assert steps([(0, 9, [1], 1)] * 5) is None
    for ours, theirs in zip(caches[0].strips, caches[1].strips):
        assert torch.equal(ours, theirs)


def test_the_engine_says_the_same_with_recorded_steps(
    tiny_q4: LLM, graphs: type[DecodeGraphs]
) -> None:
    expected = answers(tiny_q4)
    tiny_q4.engine.forget()
    tiny_q4.engine.decode_steps = graphs(tiny_q4.engine.decoder, tiny_q4.engine.cache)
    assert answers(tiny_q4) == expected
    assert tiny_q4.engine.decode_steps.recorded


def test_compile_is_left_off_where_it_has_nothing_to_gain(
    tiny: Callable[..., Path], caplog: pytest.LogCaptureFixture
) -> None:
    llm = LLM(tiny("Llama"), device="cpu", compile=True)
    assert not isinstance(llm.engine.decode_steps, DecodeGraphs)
    assert caplog.messages == ["compile has nothing to gain on cpu: it is left off"]


@pytest.mark.skipif(HAS_CUDA, reason="Triton works here")
def test_it_is_said_once_when_triton_does_not_work(caplog: pytest.LogCaptureFixture) -> None:
    cuda.triton_works.cache_clear()
    assert not cuda.triton_works()
    assert not cuda.triton_works()
    assert len(caplog.messages) == 1
    assert caplog.messages[0].startswith("Triton does not work here, CUDA will be slower: ")


def run(script: str) -> str:
    """Output of a fresh Python, where Triton is not interpreted."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    root = Path(__file__).parents[3]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_triton_is_not_imported_before_it_is_needed() -> None:
    run("import nanollama, sys; nanollama.build_parser(); assert 'triton' not in sys.modules")


COMPILE = """
import sys, torch, triton
from triton.backends.compiler import GPUTarget
import nanollama
import nanollama_extras.kernels.cuda as n

class Driver:  # of a GPU that is not there
    get_current_target = lambda self: GPUTarget("cuda", {arch}, 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

def compiled(kernel, grid):
    return lambda *args, **more: made.append(kernel.jit.warmup(*args, grid=grid, **more))

made = []
triton.runtime.driver.set_active(Driver())
n.Kernel.__getitem__, n.shared_memory_limit = compiled, lambda device: {limit}
dtype = torch.{dtype}
for x in torch.zeros(1, 256, dtype=dtype), torch.zeros(20, 256, dtype=dtype):
    for bits in 4, 8:
        n.triton_linear(x, nanollama.quantize(torch.zeros(64, 256), bits))
n.triton_rms_norm(x, x[0], 1e-5)
q, k, cos = torch.zeros(2, 28, {D}), torch.zeros(2, 4, {D}), torch.zeros(2, {D} // 2)
q, k, cos = q.to(dtype), k.to(dtype), cos.to(dtype)
n.triton_rotate(q, cos, cos)
table = torch.zeros(2, dtype=torch.int64)
n.strip_attention(q, q, k, k, n.StripRows(table, table, table, table), 0, 2, None)
print(len(made), max(kernel.metadata.shared for kernel in made))
"""
SMALL = 99 * 1024  # of an RTX 3090, 4090 or 5090; A100 and later have more


@pytest.mark.parametrize(
    ("arch", "dtype", "D", "limit"),
    [(80, "float32", 128, SMALL), (90, "bfloat16", 128, SMALL), (120, "float16", 256, SMALL)],
)
def test_the_kernels_compile_and_fit_into_a_gpu(
    arch: int, dtype: str, D: int, limit: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    script = COMPILE.format(arch=arch, dtype=dtype, D=D, limit=limit)
    num_kernels, shared_bytes = map(int, run(script).split())
    assert num_kernels == 9
    assert shared_bytes <= limit


@needs_cuda
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quantize", [None, "q4", "q8"])
def test_logits_on_the_gpu_are_those_on_the_cpu(
    smollm2: Path, dtype: str, quantize: str | None
) -> None:
    ids = list(range(100, 400))
    gpu = LLM(smollm2, device="cuda", dtype=dtype, quantize=quantize).logits(ids).cpu()
    cpu = LLM(smollm2, device="cpu", quantize=quantize, kernels="torch").logits(ids)
    difference = (gpu - cpu).norm() / cpu.norm()
    assert difference < {"float32": 1e-4, "bfloat16": 3e-2}[dtype]


@needs_cuda
def test_the_same_text_alone_and_in_company_with_and_without_graphs(smollm2: Path) -> None:
    params = SamplingParams(seed=1, max_tokens=40)
    requests = [GenerationRequest(f"Once upon a time, {i}", params=params) for i in range(20)]
    for compile in (False, True):
        llm = LLM(smollm2, device="cuda", dtype="bfloat16", parallel=20, compile=compile)
        alone = llm.complete(requests[3]).token_ids
        together: list[int] = []
        for delta in llm.stream(requests):
            if delta.index == 3 and delta.token_id is not None:
                together.append(delta.token_id)
        assert together == alone
