"""Embeddings: the hidden states of transformers, pooled; the API, the SDK, and --embed."""

from __future__ import annotations

import base64
import json
import math
import random
import shutil
import struct
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import openai
import oracle
import pytest
import safetensors.torch
import tokenizers
import torch
from serving import Live, serving

import nanollama
from nanollama import LLM, GenerationRequest, SamplingParams
from nanollama_extras.answers import embeddings
from nanollama_extras.answers.embeddings import read_modules, read_pooling
from nanollama_extras.api.embeddings import parse_embed

TEXTS = ["hello", "the quick brown fox jumps over the lazy dog " * 3, "what is the capital?"]


def expected(model: Any, ids: list[int], pooling: str) -> torch.Tensor:
    """What transformers' last hidden states give."""
    with torch.inference_mode():
        states = model.model(torch.tensor([ids])).last_hidden_state[0].double()
    pooled = states.mean(0) if pooling == "mean" else states[-1]
    return pooled / pooled.norm()


def with_pooling(source: Path, target: Path, pooling: dict[str, Any]) -> Path:
    """A copy of a model directory with sentence-transformers' files."""
    shutil.copytree(source, target)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {
            "idx": 1,
            "name": "1",
            "path": "1_Pooling",
            "type": "sentence_transformers.models.Pooling",
        },
    ]
    (target / "modules.json").write_text(json.dumps(modules))
    (target / "1_Pooling").mkdir()
    (target / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return target


@pytest.mark.parametrize(
    ("modes", "pooling"),
    [
        (None, "mean"),
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}, "mean"),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_lasttoken": True}, "last"),
        ({"pooling_mode": "lasttoken"}, "last"),
    ],
)
@pytest.mark.parametrize("chunk", [16, 512])
def test_an_embedding_is_what_transformers_gives(
    tiny: Callable[..., Path], tmp_path: Path, modes: Any, pooling: str, chunk: int
) -> None:
    path = tiny("Qwen3", head_dim=16)
    model = oracle.load(path)
    if modes:
        path = with_pooling(path, tmp_path / "model", {"word_embedding_dimension": 64, **modes})
    llm = LLM(path, prefill_chunk=chunk)
    assert read_pooling(llm.checkpoint).kind == pooling
    for text, vector in zip(TEXTS, llm.embed(TEXTS)):
        wanted = expected(model, llm.encode(text), pooling)
        torch.testing.assert_close(torch.tensor(vector).double(), wanted, rtol=0, atol=1e-5)
        assert math.isclose(sum(x * x for x in vector), 1, abs_tol=1e-9)


def test_a_model_saved_without_its_head_embeds_too(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    path = tiny(tie_word_embeddings=True)
    oracle.load(path).model.save_pretrained(tmp_path)  # as sentence-transformers save them
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(path / file, tmp_path)
    assert LLM(tmp_path).embed(TEXTS) == LLM(path).embed(TEXTS)


@pytest.mark.parametrize("modes", [{"pooling_mode_cls_token": True}, {"pooling_mode": "max"}])
def test_other_ways_of_pooling_are_refused(
    tiny: Callable[..., Path], tmp_path: Path, modes: dict[str, Any]
) -> None:
    llm = LLM(with_pooling(tiny(), tmp_path / "model", modes))
    with pytest.raises(nanollama.RequestError, match="mean and last are supported"):
        llm.embed(["a"])


@pytest.mark.parametrize(
    "files",
    [
        "[",
        "[3]",
        '[{"type": "x", "path": 3}, null]',
        '[{"type": "Pooling", "path": "../.."}]',
        "{}",
    ],
)
def test_damaged_files_of_pooling_say_nothing(
    tiny: Callable[..., Path], tmp_path: Path, files: str
) -> None:
    path = with_pooling(tiny(), tmp_path / "model", {})
    (path / "modules.json").write_text(files)
    assert read_modules(path) == []
    assert read_pooling(nanollama.open_checkpoint(path)) == embeddings.Pooling("mean", ())


def with_module(path: Path, kind: str, config: dict[str, Any] | None = None) -> Path:
    """Another module at the end of modules.json -> its folder"""
    modules = json.loads((path / "modules.json").read_text())
    folder = path / f"{len(modules)}_{kind}"
    modules.append({"path": folder.name, "type": f"sentence_transformers.models.{kind}"})
    (path / "modules.json").write_text(json.dumps(modules))
    folder.mkdir()
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("activation", [torch.nn.Tanh(), torch.nn.Identity(), torch.nn.GELU()])
@pytest.mark.parametrize("bias", [True, False])
def test_modules_after_pooling_are_those_of_sentence_transformers(
    tiny: Callable[..., Path], tmp_path: Path, activation: torch.nn.Module, bias: bool
) -> None:
    modules = pytest.importorskip("sentence_transformers.models")
    path = with_pooling(tiny(), tmp_path / "model", {"pooling_mode_mean_tokens": True})
    torch.manual_seed(0)
    chain = [
        modules.Dense(64, 48, bias=bias, activation_function=activation),
        modules.Normalize(),
        modules.Dense(48, 32, activation_function=torch.nn.Identity(), use_residual=True),
        modules.LayerNorm(32),
        modules.Dropout(0.5),
    ]
    torch.nn.init.normal_(chain[3].norm.weight)
    for module in chain:
        folder = with_module(path, type(module).__name__)
        module.eval().save(str(folder))
    llm, model = LLM(path), oracle.load(tiny())
    for text, vector in zip(TEXTS, llm.embed(TEXTS)):
        with torch.inference_mode():
            states = model.model(torch.tensor([llm.encode(text)])).last_hidden_state
            features = {"sentence_embedding": states.mean(1)}
            for module in chain:
                features = module(features)
        wanted = torch.nn.functional.normalize(features["sentence_embedding"][0], dim=0)
        torch.testing.assert_close(torch.tensor(vector), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "config", "message"),
    [
        ("CNN", {}, "modules.json: module 'CNN' is not supported"),
        ("Dense", {"activation_function": "torch.nn.Hardswish"}, "'Hardswish'"),
        ("Dense", {"module_input_name": "token_embeddings"}, "'token_embeddings'"),
        ("Dense", {"out_features": 8}, "no model.safetensors; pytorch_model.bin is a pickle"),
        ("LayerNorm", {}, "no model.safetensors"),
    ],
)
def test_a_module_that_cannot_be_applied_is_named(
    tiny: Callable[..., Path], tmp_path: Path, kind: str, config: dict[str, Any], message: str
) -> None:
    path = with_pooling(tiny(), tmp_path / "model", {})
    folder = with_module(path, kind, config)
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    llm = LLM(path)
    with pytest.raises(nanollama.CheckpointError) as error:
        llm.embed(["a"])
    assert message in str(error.value)
    assert len(str(error.value).splitlines()) == 1


def test_a_module_of_another_width_is_named(tiny: Callable[..., Path], tmp_path: Path) -> None:
    path = with_pooling(tiny(), tmp_path / "model", {})
    folder = with_module(path, "Dense", {"out_features": 8, "bias": False})
    weights = {"linear.weight": torch.zeros(8, 63)}
    safetensors.torch.save_file(weights, folder / "model.safetensors")
    with pytest.raises(nanollama.CheckpointError, match=r"\(8, 63\).*\(8, 64\)"):
        LLM(path).embed(["a"])


def test_files_of_pooling_are_read_once(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = LLM(with_pooling(tiny(), tmp_path / "model", {"pooling_mode_lasttoken": True}))
    first = llm.embed(["a"])
    shutil.rmtree(tmp_path / "model")
    assert llm.embed(["a", "b"])[0] == first[0]


def test_gguf_says_how_to_pool(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = oracle.load(tiny())
    directory = tmp_path / "model"
    shutil.copytree(tiny(), directory)
    config = json.loads((directory / "config.json").read_text())
    for kind, pooling in ((1, "mean"), (3, "last")):
        (directory / "config.json").write_text(json.dumps({**config, "pooling_type": kind}))
        path, _ = gguf_files.convert(directory, tmp_path / f"{pooling}.gguf")
        llm = LLM(path)
        assert read_pooling(llm.checkpoint).kind == pooling
        wanted = expected(model, llm.encode(TEXTS[1]), pooling)
        vector = torch.tensor(llm.embed([TEXTS[1]])[0]).double()
        torch.testing.assert_close(vector, wanted, rtol=0, atol=1e-4)


def test_both_forms_of_a_model_that_adds_eos_embed_alike(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "model"
    shutil.copytree(tiny(), path)
    tokenizer = tokenizers.Tokenizer.from_file(str(path / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    tokenizer.save(str(path / "tokenizer.json"))
    config = json.loads((path / "config.json").read_text())
    config |= {"add_eos_token": True, "pooling_type": 3}
    (path / "config.json").write_text(json.dumps(config))
    file, _ = gguf_files.convert(path, tmp_path / "model.gguf")
    modules = with_pooling(path, tmp_path / "directory", {"pooling_mode_lasttoken": True})
    for one, other in zip(LLM(file).embed(TEXTS), LLM(modules).embed(TEXTS)):
        assert sum(a * b for a, b in zip(one, other)) > 0.9999


def test_an_embedding_does_not_depend_on_its_neighbours(tiny: Callable[..., Path]) -> None:
    llm = LLM(tiny(), parallel=4, prefill_chunk=16)
    alone = [llm.embed([text])[0] for text in TEXTS]
    assert llm.embed(TEXTS) == alone
    assert llm.embed(TEXTS[::-1] * 3) == alone[::-1] * 3
    params = SamplingParams(max_tokens=30, ignore_eos=True, seed=1)
    chat = GenerationRequest(prompt="the quick", params=params)
    text = llm.complete(chat).token_ids
    requests = [chat, *(GenerationRequest(prompt=t, embed=True) for t in TEXTS), chat]
    deltas = list(llm.stream(requests))
    assert [d.embedding for d in sorted(deltas, key=lambda d: d.index) if d.embedding] == alone
    assert [d.token_id for d in deltas if d.index == 0] == text


def test_native_kernels_give_the_same_embedding(smollm2_llm: LLM) -> None:
    one, other, far = smollm2_llm.embed(
        ["A cat sat on the mat.", "A cat is sitting on a mat.", "Stock prices fell on Tuesday."]
    )
    near = sum(a * b for a, b in zip(one, other))
    assert near > sum(a * b for a, b in zip(one, far))


# ---- the API -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def live(tiny: Callable[..., Path]) -> Iterator[Live]:
    with serving(lambda: LLM(tiny(), parallel=2), model_id="tiny") as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)


@pytest.mark.parametrize("form", ["float", "base64", openai.omit])
def test_the_sdk_gets_vectors_in_order(client: openai.OpenAI, live: Live, form: Any) -> None:
    answer = client.embeddings.create(model="tiny", input=TEXTS, encoding_format=form)
    llm = live.pool.llm()
    wanted = [expected(oracle.load(llm.checkpoint.path), llm.encode(t), "mean") for t in TEXTS]
    for index, (item, vector) in enumerate(zip(answer.data, wanted)):
        assert item.index == index
        got = item.embedding
        if form == "base64":
            got = np.frombuffer(base64.b64decode(got), dtype="<f4").tolist()
        torch.testing.assert_close(torch.tensor(got).double(), vector, rtol=0, atol=1e-5)
    num_tokens = sum(len(llm.encode(text)) for text in TEXTS)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens == num_tokens
    assert (answer.object, answer.model) == ("list", "tiny")


def test_text_and_ids_are_the_same(client: openai.OpenAI, live: Live) -> None:
    ids = live.pool.llm().encode("hello")
    forms: list[Any] = ["hello", ["hello"], ids, [ids]]
    found = [client.embeddings.create(model="tiny", input=form).data for form in forms]
    assert all(len(data) == 1 for data in found)
    assert len({tuple(data[0].embedding) for data in found}) == 1


def test_fewer_dimensions_are_of_unit_length_again(client: openai.OpenAI) -> None:
    whole = client.embeddings.create(model="tiny", input="hello").data[0].embedding
    short = client.embeddings.create(model="tiny", input="hello", dimensions=8).data[0].embedding
    assert len(short) == 8
    length = math.sqrt(sum(x * x for x in whole[:8]))
    assert short == pytest.approx([x / length for x in whole[:8]], abs=1e-6)


def test_many_inputs_beside_an_answer(live: Live, client: openai.OpenAI) -> None:
    words = [f"text number {i}" for i in range(100)]
    random.Random(0).shuffle(words)
    with live.http.stream(
        "POST", "/v1/completions", json={"prompt": "a", "max_tokens": 150, "stream": True}
    ) as response:
        data = client.embeddings.create(model="tiny", input=words).data
        assert "[DONE]" in response.read().decode()
    alone = client.embeddings.create(model="tiny", input=words[57]).data[0].embedding
    assert data[57].embedding == alone


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "input"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": ["a", 3]}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": [[]]}, "input"),
        ({"input": [400]}, "input"),
        ({"input": "hello " * 400}, "input"),
        ({"input": ["a"] * 2049}, "input"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
        ({"input": "a", "dimensions": 0}, "dimensions"),
        ({"input": "a", "dimensions": 65}, "dimensions"),
        ({"input": "a", "dimensions": 1.5}, "dimensions"),
    ],
)
def test_what_cannot_be_embedded_is_refused_by_name(
    live: Live, fields: dict[str, Any], param: str
) -> None:
    response = live.http.post("/v1/embeddings", json=fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_unknown_fields_are_named() -> None:
    assert parse_embed({"input": "a", "colour": 1, "user": "me"})[0].ignored == ("colour", "user")
    with pytest.raises(nanollama.RequestError, match="colour"):
        parse_embed({"input": "a", "colour": 1}, strict=True)


# ---- --embed -------------------------------------------------------------------------------------


def test_the_command_line_prints_arrays(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    llm = LLM(tiny())
    model = ["--model", str(tiny())]
    assert nanollama.main([*model, "--embed", "--prompt", "hello"]) == 0
    assert json.loads(capsys.readouterr().out) == llm.embed(["hello"])[0]
    lines = tmp_path / "lines.txt"
    lines.write_text("hello\n" + "long " * 400 + "\nthe quick\n")
    assert nanollama.main([*model, "--embed", "--batch-file", str(lines)]) == 1
    shown = capsys.readouterr()
    one, none, other = map(json.loads, shown.out.splitlines())
    assert [one, other] == llm.embed(["hello", "the quick"])
    assert none is None
    assert "line 2: the prompt has" in shown.err
    assert nanollama.main(["--embed", "--interactive"]) == 2
    error, _ = capsys.readouterr().err.splitlines()
    assert error == "error: --embed needs --prompt or --batch-file"


def test_base64_is_little_endian_float32(live: Live) -> None:
    body = {"input": "hello", "encoding_format": "base64"}
    text = live.http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    assert sys.byteorder == "little"
    assert len(struct.unpack("<64f", base64.b64decode(text))) == 64
