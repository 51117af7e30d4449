"""Section 4: norm, rotation and attention against float64 loops, and rows that do not depend on
what else is in the call."""

from __future__ import annotations

import math

import pytest
import torch
import transformers
from torch import Tensor
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from nanollama import (
    KEY_TILE,
    ROW_TILE,
    Linear,
    attention,
    attention_bias,
    make_rope,
    quantize,
    rms_norm,
    rotate,
    round_up,
)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def naive_attention(
    q: Tensor, keys: Tensor, values: Tensor, start: int, window: int | None
) -> Tensor:
    """q (n, H, D), keys and values (Hkv, S, D) -> (n, H, D), one query and head at a time."""
    n, H, D = q.shape
    out = torch.zeros(n, H, D, dtype=torch.float64)
    for i in range(n):
        last = start + i
        first = 0 if window is None else max(0, last - window + 1)
        for h in range(H):
            kv = h // (H // len(keys))
            k, v = keys[kv, first : last + 1].double(), values[kv, first : last + 1].double()
            out[i, h] = torch.softmax(k @ q[i, h].double() / math.sqrt(D), 0) @ v
    return out


def strip(num_kv_heads: int, num_keys: int, head_dim: int, dtype: torch.dtype) -> list[Tensor]:
    """Keys and values, in room for a multiple of KEY_TILE whose rest holds zeros."""
    capacity = round_up(num_keys, KEY_TILE)
    made = [torch.zeros(num_kv_heads, capacity, head_dim, dtype=dtype) for _ in range(2)]
    for tensor in made:
        tensor[:, :num_keys] = torch.randn(num_kv_heads, num_keys, head_dim)
    return made


SHAPES = [(4, 4, 16), (9, 3, 64), (8, 2, 32), (6, 1, 16), (5, 5, 8)]  # H, Hkv, D


@pytest.mark.parametrize(("H", "Hkv", "D"), SHAPES)
@pytest.mark.parametrize("window", [None, 1, 7, 1000])
def test_attention_is_what_a_loop_over_queries_and_heads_computes(
    H: int, Hkv: int, D: int, window: int | None
) -> None:
    for start, n in ((0, 1), (0, 13), (70, 5), (511, 1), (510, 4)):
        q = torch.randn(n, H, D)
        keys, values = strip(Hkv, start + n, D, torch.float32)
        ours = attention(q, keys, values, attention_bias(start, n, H // Hkv, window, like=q))
        theirs = naive_attention(q, keys, values, start, window)
        torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=1e-6)


def test_a_query_sees_neither_the_future_nor_the_unused_end_of_the_strip() -> None:
    q = torch.randn(3, 4, 16)
    keys, values = strip(2, 10, 16, torch.float32)
    bias = attention_bias(7, 3, 2, None, like=q)
    before = attention(q, keys, values, bias)
    keys[:, 10:], values[:, 10:] = 1e4, 1e4
    assert torch.equal(attention(q, keys, values, bias), before)
    values[:, 9] = 1e4  # the newest key: only the last query may notice
    after = attention(q, keys, values, bias)
    assert torch.equal(after[:2], before[:2])
    assert not torch.equal(after[2], before[2])


@pytest.mark.parametrize("num_threads", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("H", "Hkv", "D"), SHAPES)
def test_an_attention_row_is_bit_for_bit_the_same_however_the_queries_are_cut(
    H: int, Hkv: int, D: int, dtype: torch.dtype, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    T = 700
    q = torch.randn(T, H, D).to(dtype)
    keys, values = strip(Hkv, T, D, dtype)

    def rows(start: int, stop: int) -> Tensor:
        num_keys = round_up(stop, KEY_TILE)
        bias = attention_bias(start, stop - start, H // Hkv, None, like=q)
        return attention(q[start:stop], keys[:, :num_keys], values[:, :num_keys], bias)

    whole = rows(0, T)
    for start, stop in ((0, 1), (0, 7), (63, 66), (139, 164), (245, 246), (510, 520), (699, 700)):
        assert torch.equal(rows(start, stop), whole[start:stop]), (start, stop)


@pytest.mark.parametrize("num_threads", [1, 2, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_rows", [1, 4, 16, 32, 64, 96, 577])
def test_a_linear_row_is_bit_for_bit_the_same_whatever_the_number_of_rows(
    num_rows: int, dtype: torch.dtype, num_threads: int
) -> None:
    torch.set_num_threads(num_threads)
    weight = torch.randn(num_rows, 576)
    x = torch.randn(128, 576).to(dtype)
    cpu = torch.device("cpu")
    linears = [Linear(weight.to(dtype)), *(quantize(weight, b).to(cpu, dtype) for b in (8, 4))]
    for linear in linears:
        whole = linear(x)
        for n in (1, 2, 3, 4, 5, 8, 12, 31, 64):
            assert torch.equal(linear(x[:n]), whole[:n]), (type(linear), n)


def test_rms_norm_is_the_formula_in_float64() -> None:
    x, weight = torch.randn(5, 3, 64) * 10, torch.randn(64)
    exact = (
        x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight.double()
    )
    torch.testing.assert_close(rms_norm(x, weight, 1e-5).double(), exact, rtol=1e-5, atol=1e-6)


def test_rms_norm_of_half_precision_sums_in_float32() -> None:
    x = torch.full((1, 4096), 300.0, dtype=torch.float16)  # 300^2 is beyond float16
    normed = rms_norm(x, torch.ones(4096, dtype=torch.float16), 1e-6)
    assert normed.dtype == torch.float16
    assert torch.equal(normed, torch.ones_like(x))


def test_the_eps_of_rms_norm_keeps_zeros_finite() -> None:
    assert torch.equal(rms_norm(torch.zeros(2, 8), torch.ones(8), 1e-6), torch.zeros(2, 8))


def test_rotate_turns_pairs_as_complex_numbers_do() -> None:
    x = torch.randn(6, 2, 16)
    angles = (
        torch.arange(6).unsqueeze(1)
        * make_rope({"rope_type": "default", "rope_theta": 1e4}, 16).freqs
    )
    turned = rotate(x, angles.cos(), angles.sin())
    pairs = torch.complex(x[..., :8].double(), x[..., 8:].double())
    exact = pairs * torch.polar(torch.ones(6, 1, 8).double(), angles.double().unsqueeze(1))
    torch.testing.assert_close(
        turned.double(), torch.cat((exact.real, exact.imag), -1), rtol=1e-5, atol=1e-6
    )


def test_rotated_scores_depend_on_the_distance_only() -> None:
    inv_freq = make_rope({"rope_type": "default", "rope_theta": 1e4}, 32).freqs
    q, k = torch.randn(1, 1, 32), torch.randn(1, 1, 32)

    def score(i: int, j: int) -> Tensor:
        turned = [
            rotate(x, (p * inv_freq).cos().view(1, -1), (p * inv_freq).sin().view(1, -1))
            for x, p in ((q, i), (k, j))
        ]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(5, 2), score(105, 102), rtol=1e-4, atol=1e-4)
    assert not torch.isclose(score(5, 2), score(5, 3), rtol=1e-2)


@pytest.mark.parametrize("head_dim", [64, 128, 96])
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 1e6},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
        {  # Llama 3.1
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        {  # Qwen 2.5 and 3 beyond 32k
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 32768,
        },
        {  # DeepSeek
            "rope_type": "yarn",
            "rope_theta": 1e4,
            "factor": 40.0,
            "beta_fast": 16,
            "beta_slow": 2,
            "mscale": 0.707,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        {  # gpt-oss
            "rope_type": "yarn",
            "rope_theta": 15e4,
            "factor": 32.0,
            "truncate": False,
            "original_max_position_embeddings": 4096,
        },
    ],
)
def test_frequencies_of_real_models_are_those_of_transformers(
    rope: dict[str, float], head_dim: int
) -> None:
    config = transformers.LlamaConfig(head_dim=head_dim, rope_parameters=dict(rope))
    theirs = LlamaRotaryEmbedding(config)
    inv_freq, scale = make_rope(rope, head_dim).frequencies()
    torch.testing.assert_close(inv_freq, theirs.inv_freq, rtol=1e-6, atol=0)
    assert scale == pytest.approx(theirs.attention_scaling)


def test_the_bias_pads_rows_and_keys_to_their_tiles() -> None:
    bias = attention_bias(600, 5, 3, 8, like=torch.zeros(1))
    assert bias.shape == (round_up(15, ROW_TILE), round_up(605, KEY_TILE))
    for i in range(15):  # head by head, the five queries at positions 600 to 604
        position = 600 + i % 5
        visible = (bias[i] == 0).nonzero().flatten().tolist()
        assert visible == list(range(position - 7, position + 1))
    assert (bias[15:] == 0).all()  # a padding row that saw nothing would be nan
