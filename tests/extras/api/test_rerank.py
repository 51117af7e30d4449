"""Reranking: scores are those of Qwen3-Reranker's model card, computed by transformers."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import pytest
import torch
import transformers
from serving import serving

from nanollama import LLM, RequestError
from nanollama_extras.answers.ranks import INSTRUCTION, QWEN3, find_ranker

QUERY = "what is the capital of France?"
DOCUMENTS = [
    "Paris is the capital of France.",
    "the lazy dog",
    "the quick <|im_end|> fox",
    "it rains",
]
PREFIX, _, REST = QWEN3.partition("<Instruct>")
SUFFIX = REST[REST.index("<|im_end|>") :]


def reranker(tiny: Callable[..., Path], folder: Path, tied: bool = True) -> Path:
    """A tiny Qwen3 whose vocabulary has yes and no."""
    made = tiny(
        "Qwen3", vocab_size=322, max_position_embeddings=1024, head_dim=16,
        tie_word_embeddings=tied,
    )  # fmt: skip
    shutil.copytree(made, folder)
    file = folder / "tokenizer.json"
    tokenizer = json.loads(file.read_text())
    for word in ("yes", "no"):
        vocab = tokenizer["model"]["vocab"]
        vocab[word] = len(vocab)
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)
        tokenizer["added_tokens"].append({"id": vocab[word], "content": word, **flags})
    file.write_text(json.dumps(tokenizer))
    return folder


def expected(folder: Path, instruction: str = INSTRUCTION) -> list[float]:
    """The scores of DOCUMENTS as the model card computes them, with control tokens in a document
    as text."""
    tokenizer = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    yes, no = tokenizer.convert_tokens_to_ids(["yes", "no"])
    scores = []
    for document in DOCUMENTS:
        pair = f"<Instruct>: {instruction}\n<Query>: {QUERY}\n<Document>: {document}"
        plain = transformers.PreTrainedTokenizerFast.from_pretrained(
            folder, split_special_tokens=True
        )
        ids = tokenizer.encode(PREFIX) + plain.encode(pair) + tokenizer.encode(SUFFIX)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, -1]
        scores.append(torch.softmax(logits[[no, yes]], 0)[1].item())
    return scores


def ranked(llm: LLM, **fields: Any) -> Any:
    body = {"query": QUERY, "documents": DOCUMENTS, **fields}
    with serving(lambda: llm) as live:
        answer = live.http.post("/v1/rerank", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def check(body: Any, scores: list[float]) -> None:
    order = sorted(range(len(scores)), key=lambda i: -scores[i])
    assert [row["index"] for row in body["results"]] == order
    found = {row["index"]: row["relevance_score"] for row in body["results"]}
    assert [found[i] for i in range(len(scores))] == pytest.approx(scores, abs=2e-4)
    assert max(scores) - min(scores) > 0.01


@pytest.fixture(scope="module")
def folder(tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return reranker(tiny, tmp_path_factory.mktemp("models") / "Qwen3-Reranker-0.6B")


def test_the_scores_are_the_model_cards(folder: Path) -> None:
    llm = LLM(folder)
    check(ranked(llm), expected(folder))
    other = "Given a title, find its text"
    check(ranked(llm, instruction=other), expected(folder, other))


@pytest.mark.parametrize("tied", [True, False])
def test_a_gguf_file_declares_its_labels_and_its_prompt(
    tiny: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    folder = reranker(tiny, tmp_path / "model", tied)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    head = model.get_output_embeddings().weight.detach().numpy()
    usual, usual_tensors = gguf_files.add_metadata, gguf_files.gguf_tensors
    form = QWEN3.replace("{instruction}", INSTRUCTION)

    def add_metadata(writer: Any, *rest: Any) -> None:
        usual(writer, *rest)
        writer.add_pooling_type(gguf_files.gguf.PoolingType.RANK)
        writer.add_classifier_output_labels(["no", "yes"])
        writer.add_chat_template([{"name": "rerank", "template": form}])
        writer.add_tensor("cls.output.weight", head[[vocab["no"], vocab["yes"]]])

    def gguf_tensors(*rest: Any) -> dict[str, Any]:  # as llama.cpp's converter: no head
        return {n: t for n, t in usual_tensors(*rest).items() if n != "output.weight"}

    monkeypatch.setattr(gguf_files, "add_metadata", add_metadata)
    monkeypatch.setattr(gguf_files, "gguf_tensors", gguf_tensors)
    file, _ = gguf_files.convert(folder, tmp_path / "model.gguf")
    check(ranked(LLM(file)), expected(folder))


def test_a_module_of_sentence_transformers_names_the_tokens(
    tiny: Callable[..., Path], tmp_path: Path
) -> None:
    folder = reranker(tiny, tmp_path / "model")
    place = "sentence_transformers.cross_encoder.modules.logit_score.LogitScore"
    modules = [{"idx": 1, "name": "1", "path": "1_LogitScore", "type": place}]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_LogitScore").mkdir()
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    config = {"true_token_id": vocab["yes"], "false_token_id": vocab["no"]}
    (folder / "1_LogitScore" / "config.json").write_text(json.dumps(config))
    check(ranked(LLM(folder)), expected(folder))
    template = "{% for m in messages %}{% if m.role == 'query' %}<q>{{ m.content }}"
    template += "{% elif m.role == 'document' %}<d>{{ m.content }}{% endif %}{% endfor %}"
    (folder / "chat_template.jinja").write_text(template)
    llm = LLM(folder)
    ids = find_ranker(llm).prompt(llm, "a", "b")
    assert ids == llm.encode("<q>a<d>b", False)


def test_the_answer_has_what_is_asked_for(folder: Path) -> None:
    llm = LLM(folder)
    body = ranked(llm, documents=[{"text": text} for text in DOCUMENTS], return_documents=True)
    assert [row["document"]["text"] for row in body["results"]] == [
        DOCUMENTS[row["index"]] for row in body["results"]
    ]
    best = ranked(llm, top_n=2)["results"]
    assert (
        best == [{k: row[k] for k in ("index", "relevance_score")} for row in body["results"]][:2]
    )
    assert body["usage"]["total_tokens"] == sum(
        len(find_ranker(llm).prompt(llm, QUERY, text)) for text in DOCUMENTS
    )
    short = ranked(llm, max_tokens_per_doc=2)["results"]
    cut = ranked(llm, documents=[llm.decode(llm.encode(d, False)[:2]) for d in DOCUMENTS])
    assert short == cut["results"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"query": ""}, "query"),
        ({"documents": []}, "documents"),
        ({"documents": ["a", 1]}, "documents[1]"),
        ({"documents": [{"image": "a"}]}, "documents[0]"),
        ({"top_n": 0}, "top_n"),
        ({"documents": ["x " * 2000]}, "documents"),
    ],
)
def test_a_wrong_field_is_named(folder: Path, fields: dict[str, Any], param: str) -> None:
    with serving(lambda: LLM(folder)) as live:
        for path in ("/v1/rerank", "/v2/rerank", "/rerank"):
            answer = live.http.post(path, json={"query": "a", "documents": ["b"], **fields})
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


def test_a_model_that_does_not_rank_says_so(tiny_llm: LLM) -> None:
    with pytest.raises(RequestError, match="does not rank"):
        find_ranker(tiny_llm)
    with serving(lambda: tiny_llm) as live:
        answer = live.http.post("/v1/rerank", json={"query": "a", "documents": ["b"]})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model")
