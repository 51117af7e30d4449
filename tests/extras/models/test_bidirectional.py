"""EmbeddingGemma: tokens that see those after them, read in one step, for embeddings alone."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import conftest
import gguf
import gguf_files
import oracle
import pytest
import safetensors.torch
import torch
from families import LOCAL
from oracle import Tiny, rewritten
from serving import serving

import nanollama
from nanollama import LLM, CheckpointError, GenerationRequest, RequestError, model_config
from nanollama_extras.api.ollama_models import ollama_details

SHAPE: dict[str, Any] = {
    "num_hidden_layers": 6,
    "head_dim": 32,
    "num_key_value_heads": 1,
    "query_pre_attn_scalar": 32,
    "sliding_window": 8,
    "max_position_embeddings": 1024,
    "use_bidirectional_attention": True,
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 1e6},
        "sliding_attention": LOCAL,
    },
}
LENGTHS = (1, 4, 5, 37, 120, 300, 700)
TEXTS = [oracle.random_ids(length, seed=length) for length in LENGTHS]


def with_modules(source: Path, target: Path) -> Path:
    """A copy with the files of sentence-transformers that EmbeddingGemma has."""
    shutil.copytree(source, target)
    folders = {
        "": "Transformer",
        "1_Pooling": "Pooling",
        "2_Dense": "Dense",
        "3_Dense": "Dense",
        "4_Normalize": "Normalize",
    }
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
        for i, (path, kind) in enumerate(folders.items())
    ]
    (target / "modules.json").write_text(json.dumps(modules))
    for folder in [*folders][1:]:
        (target / folder).mkdir()
    pooling = {"word_embedding_dimension": 64, "pooling_mode_mean_tokens": True}
    (target / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    torch.manual_seed(1)
    for folder, rows, cols in (("2_Dense", 96, 64), ("3_Dense", 64, 96)):
        config = {"in_features": cols, "out_features": rows, "bias": False}
        config["activation_function"] = "torch.nn.modules.linear.Identity"
        (target / folder / "config.json").write_text(json.dumps(config))
        weights = {"linear.weight": torch.randn(rows, cols)}
        safetensors.torch.save_file(weights, target / folder / "model.safetensors")
    return target


@pytest.fixture(scope="module")
def path(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return with_modules(tiny("Gemma3Text", **SHAPE), tmp_path_factory.mktemp("model") / "dense")


@pytest.fixture(scope="module")
def wanted(path: Path) -> list[torch.Tensor]:
    """transformers' last hidden states, through the arithmetic of sentence-transformers."""
    model, found = oracle.load(path), []
    assert model.config.use_bidirectional_attention
    layers = [
        safetensors.torch.load_file(path / f"{i}_Dense" / "model.safetensors")["linear.weight"]
        for i in (2, 3)
    ]
    for ids in TEXTS:
        with torch.inference_mode():
            pooled = model.model(torch.tensor([ids])).last_hidden_state[0].mean(0)
        found.append(torch.nn.functional.normalize(layers[1] @ (layers[0] @ pooled), dim=0))
    return found


def assert_close(vectors: list[list[float]], wanted: list[torch.Tensor], atol: float) -> None:
    assert len(vectors) == len(wanted)
    for vector, expected in zip(vectors, wanted):
        torch.testing.assert_close(torch.tensor(vector), expected, rtol=0, atol=atol)


@pytest.mark.parametrize("window", [8, 9, 400])
@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_states_are_those_of_transformers(tiny: Tiny, kernels: str, window: int) -> None:
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    shape = {**SHAPE, "num_hidden_layers": 3, "layer_types": kinds, "sliding_window": window}
    path = tiny("Gemma3Text", **shape)
    model, llm = oracle.load(path), LLM(path, kernels=kernels)
    for ids in TEXTS:
        states: list[torch.Tensor] = []
        seq = llm.start(GenerationRequest(prompt=ids, embed=True))
        assert seq.pooler is not None
        seq.pooler.take = states.append  # type: ignore[method-assign]
        seq.pooler.embedding = list  # type: ignore[method-assign]
        while not seq.finish_reason:
            llm.engine.step()
        with torch.inference_mode():
            expected = model.model(torch.tensor([ids])).last_hidden_state[0]
        assert expected.std() > 0.5
        (found,) = states  # of one step
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("kernels", ["torch", "native"])
def test_embeddings_are_those_of_sentence_transformers(
    path: Path, wanted: list[torch.Tensor], kernels: str
) -> None:
    assert_close(LLM(path, kernels=kernels).embed(TEXTS), wanted, 1e-5)


def test_tokens_see_those_after_them(path: Path) -> None:
    llm = LLM(path)
    first, other = llm.embed([[5, 6, 7, 8], [5, 6, 7, 9]])
    assert max(abs(a - b) for a, b in zip(first, other)) > 0.01


OPTIONS: list[dict[str, Any]] = [{"kernels": "torch"}, {"kernels": "native"}, {"quantize": "q8"}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options.values()))
def test_a_text_alone_in_a_batch_and_with_any_size_of_step(
    path: Path, options: dict[str, Any]
) -> None:
    llm = LLM(path, **options)
    alone = [llm.embed([ids])[0] for ids in TEXTS]
    assert llm.embed(TEXTS) == alone
    small = LLM(path, parallel=3, prefill_chunk=16, lookup=4, **options)
    assert small.embed(TEXTS[::-1] * 2) == alone[::-1] * 2


def test_steps_are_as_large_as_they_may_be_and_a_text_is_never_cut(path: Path) -> None:
    llm, sizes = LLM(path, parallel=4, prefill_chunk=200), []
    forward = llm.engine.forward

    def watched(work: Any) -> Any:
        sizes.append([num_new for _, num_new in work])
        return forward(work)

    llm.engine.forward = watched  # type: ignore[method-assign]
    llm.embed(TEXTS)
    assert sizes == [[1, 4, 5, 37], [120], [300], [700]]


def test_nothing_is_kept_of_a_text(path: Path) -> None:
    llm = LLM(path)
    ids = TEXTS[-1]
    for _ in range(2):
        (delta,) = llm.stream(GenerationRequest(prompt=ids, embed=True))
        assert delta.usage is not None
        assert delta.usage.cached_tokens == 0
    assert llm.engine.cache.nbytes == 0
    assert llm.config.kv_bytes(1000, "float32") == 0


def test_a_directory_without_a_head_is_the_same_model(path: Path, tmp_path: Path) -> None:
    """As sentence-transformers save it."""
    other = shutil.copytree(path, tmp_path / "other")
    oracle.load(path).model.save_pretrained(other)
    assert "embed_tokens.weight" in safetensors.torch.load_file(other / "model.safetensors")
    assert LLM(other).embed(TEXTS) == LLM(path).embed(TEXTS)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_stays_close(path: Path, wanted: list[torch.Tensor], dtype: str) -> None:
    for vector, expected in zip(LLM(path, dtype=dtype).embed(TEXTS), wanted):
        assert float(torch.tensor(vector) @ expected) > 0.99


# ---- GGUF ----------------------------------------------------------------------------------------


def converted(path: Path, target: Path, kind: str = "F32") -> Path:
    pooled = rewritten(path, target.with_suffix(""), lambda c: c.update(pooling_type=1))
    return gguf_files.convert(pooled, target, kind)[0]


def test_a_gguf_file_is_the_same_model(
    path: Path, wanted: list[torch.Tensor], tmp_path: Path
) -> None:
    found = converted(path, tmp_path / "model.gguf")
    assert nanollama.read_gguf(found)[0]["gemma-embedding.attention.sliding_window"] == 8
    assert_close(LLM(found).embed(TEXTS), wanted, 1e-5)
    llm = LLM(converted(path, tmp_path / "packed.gguf", "Q8_0"))
    for vector, expected in zip(llm.embed(TEXTS), wanted):
        assert float(torch.tensor(vector) @ expected) > 0.99


def test_a_gguf_file_may_leave_out_the_dense_layers(tiny: Tiny, tmp_path: Path) -> None:
    """The converter writes them only if it is asked to."""
    path = tiny("Gemma3Text", **SHAPE)
    found = LLM(converted(path, tmp_path / "model.gguf")).embed(TEXTS)
    assert_close(found, list(map(torch.tensor, LLM(path).embed(TEXTS))), 1e-5)


def test_ollamas_files_have_other_names(
    path: Path, wanted: list[torch.Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(gguf.MODEL_ARCH_NAMES, gguf.MODEL_ARCH.GEMMA_EMBEDDING, "gemma3")
    found = converted(path, tmp_path / "model.gguf")
    raw = found.read_bytes()
    for i in (0, 1):
        raw = raw.replace(f"dense_{i + 2}.weight".encode(), f"dense.{i}.weight".encode())
    found.write_bytes(raw)
    assert_close(LLM(found).embed(TEXTS), wanted, 1e-5)


@pytest.mark.parametrize(
    ("arch", "pooling", "causal", "is_causal"),
    [
        ("gemma3", None, None, True),
        ("gemma3", 1, None, False),
        ("gemma3", 3, None, True),  # of a decoder, as Qwen3-Embedding is one
        ("gemma3", 3, False, False),
        ("gemma3", 1, True, True),
        ("gemma-embedding", 1, None, False),
        ("gemma-embedding", 3, True, True),
    ],
)
def test_metadata_say_whether_tokens_see_those_after_them(
    tiny: Tiny,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arch: str,
    pooling: int | None,
    causal: bool | None,
    is_causal: bool,
) -> None:
    monkeypatch.setitem(gguf.MODEL_ARCH_NAMES, gguf.MODEL_ARCH.GEMMA_EMBEDDING, arch)
    add = gguf_files.add_metadata

    def with_causal(writer: Any, *args: Any) -> None:
        add(writer, *args)
        if causal is not None:
            writer.add_causal_attention(causal)

    monkeypatch.setattr(gguf_files, "add_metadata", with_causal)
    values = {} if pooling is None else {"pooling_type": pooling}
    path = rewritten(tiny("Gemma3Text", **SHAPE), tmp_path / "model", lambda c: c.update(values))
    config = nanollama.open_checkpoint(gguf_files.convert(path, tmp_path / "x.gguf")[0]).config
    assert ("reach" not in config.own) == is_causal
    assert any(config.windows) == is_causal


def test_a_dense_layer_of_another_width_is_named(path: Path, tmp_path: Path) -> None:
    other = shutil.copytree(path, tmp_path / "other")
    weights = {"linear.weight": torch.zeros(64, 95)}
    safetensors.torch.save_file(weights, other / "3_Dense" / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"dense_3\.weight has shape \(64, 95\)"):
        LLM(converted(other, tmp_path / "model.gguf")).embed(["a"])


# ---- what it does not do -------------------------------------------------------------------------


def test_it_writes_no_text(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    llm = LLM(path)
    for use in (
        lambda: llm.complete(GenerationRequest(prompt=[5, 6])),
        lambda: llm.logits([5, 6]),
        lambda: list(llm.score([([5, 6, 7], 1)])),
    ):
        with pytest.raises(RequestError, match="makes embeddings and writes no text"):
            use()
    assert nanollama.main(["--model", str(path), "--prompt", "hello"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: this model makes embeddings")


def test_the_routes_of_embeddings_serve_it(path: Path) -> None:
    llm = LLM(path)
    texts = ["hello", "the quick brown fox"]
    with serving(lambda: llm, model_id="tiny") as live:
        data = live.http.post("/v1/embeddings", json={"input": texts}).json()["data"]
        ollama = live.http.post("/api/embed", json={"model": "tiny", "input": texts}).json()
        refused = [live.chat(), live.text()]
    assert [item["embedding"] for item in data] == ollama["embeddings"] == llm.embed(texts)
    for response in refused:
        assert response.status_code == 400
        assert "makes embeddings" in response.json()["error"]["message"]


def test_ollamas_clients_are_told_that_it_embeds(path: Path) -> None:
    assert ollama_details(path, 0)["capabilities"] == ["embedding"]


def test_show_counts_no_keys_and_values(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert nanollama.main(["show", str(path)]) == 0
    assert "up to 0 B for the keys and values" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"sliding_window": "x"}, "sliding_window is 'x'"),
        ({"sliding_window": None}, "sliding_window is None"),
        ({"use_bidirectional_attention": "all"}, "use_bidirectional_attention 'all'"),
    ],
)
def test_a_config_that_makes_no_sense_is_refused(edit: dict[str, Any], message: str) -> None:
    values = {**conftest.TINY, "model_type": "gemma3_text", **SHAPE, **edit}
    with pytest.raises(CheckpointError, match=message):
        model_config(values, "x")
