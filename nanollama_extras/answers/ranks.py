"""Ranks: how well a text answers a query, by a model that was trained to say yes or no.

The score is the probability of yes, of the two: softmax of the logits of both words after

    system: judge ..   user: <Instruct>: .. <Query>: .. <Document>: ..   assistant:

Only models rank whose files say so. A GGUF file has the pooling type rank, and a template of its
own; sentence-transformers' modules.json has a LogitScore; Qwen3-Reranker's first files have their
name alone.

Seam       answers.embeddings asks for `new_pooler` where a request is to be ranked: the core hands
           it the states of a text's tokens. api.rerank asks for `find_ranker`.
Remove     delete this file and api/rerank.py.
Source     https://huggingface.co/Qwen/Qwen3-Reranker-0.6B,
           https://github.com/ggml-org/llama.cpp (convert_hf_to_gguf.py, `_find_rerank_config`),
           https://sbert.net/docs/package_reference/cross_encoder/modules.html
"""

from __future__ import annotations

import math
import re
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from nanollama import (
    CheckpointError,
    RequestError,
    check_number,
    encode_chat,
    excerpt,
    gguf_shards,
    read_gguf,
    read_json,
)
from nanollama_extras.answers.embeddings import GGUF_POOLING, read_modules

if TYPE_CHECKING:
    from nanollama import LLM, Checkpoint, Json

ROLES = ("query", "document")
INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
QWEN3 = (
    "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and "
    'the Instruct provided. Note that the answer can only be "yes" or "no".<|im_end|>\n'
    "<|im_start|>user\n<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}"
    "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
PLACE = re.compile(r"\{(instruction|query|document)\}")


@dataclass(frozen=True, slots=True)
class Ranker:
    """How a model ranks. form: its prompt with {query} and {document}; "" for a chat template with
    messages of these roles. yes, no: the ids of its answers; a no of -1 stands for the logit 0.
    head: the rows (2, C) for both, in place of the model's own."""

    form: str
    yes: int
    no: int = -1
    head: Tensor | None = None

    def prompt(self, llm: LLM, query: str, document: str, instruction: str = "") -> list[int]:
        """The ids of the prompt for a query and a document, in which a control token is text."""
        if not self.form:
            texts = {"query": query, "document": document}
            messages = [{"role": role, "content": text} for role, text in texts.items()]
            system = [{"role": "system", "content": instruction}] if instruction else []
            return encode_chat(llm.tokenizer, llm.template, [*system, *messages])[0]
        values = {"query": query, "document": document, "instruction": instruction or INSTRUCTION}
        control = "|".join(map(re.escape, llm.tokenizer.control)) or "(?!)"
        places = list(PLACE.finditer(self.form))
        words = [match.span() for match in re.finditer(control, self.form)]
        start = max((end for _, end in words if end <= places[0].start()), default=0)
        end = min((at for at, _ in words if at >= places[-1].end()), default=len(self.form))
        text = PLACE.sub(lambda match: values[match[1]], self.form[start:end])
        encode = llm.tokenizer.encode
        around = [encode(self.form[:start], start == 0), encode(self.form[end:], False)]
        return [*around[0], *encode(text, False, False), *around[1]]


def find_ranker(llm: LLM) -> Ranker:
    """How the model ranks, by its files. Raises RequestError for a model that does not."""
    checkpoint = getattr(llm, "checkpoint", None)  # a script has none
    found = checkpoint and read_ranker(llm, checkpoint)
    if not found:
        raise RequestError("this model does not rank: its files do not say that it can", "model")
    return found


def read_ranker(llm: LLM, checkpoint: Checkpoint) -> Ranker | None:
    """The ranker that the files declare; None for none."""
    source, folders = llm.template.source or "", dict(read_modules(checkpoint.path))
    if folder := folders.get("LogitScore"):
        config = read_json(folder / "config.json", required=False)
        yes, no = token_of(llm, config, "true_token_id"), token_of(llm, config, "false_token_id")
        if yes is not None:
            has_roles = all(re.search(f"[\"']{role}[\"']", source) for role in ROLES)
            return Ranker("" if has_roles else QWEN3, yes, -1 if no is None else no)
    declares = GGUF_POOLING.get(str(checkpoint.pooling)) == "rank"
    is_named = "qwen3-reranker" in str(checkpoint.path).lower()
    if checkpoint.config.model_type != "qwen3" or not (declares or is_named):
        return None
    words = [llm.tokenizer.encode(word, False) for word in ("yes", "no")]
    form = checkpoint.text.templates.get("rerank", QWEN3)
    if [len(ids) for ids in words] != [1, 1] or not {*ROLES} <= {*PLACE.findall(form)}:
        return None
    return Ranker(form, words[0][0], words[1][0], read_head(checkpoint) if declares else None)


def read_head(checkpoint: Checkpoint) -> Tensor | None:
    """The rows (2, C) of the head for yes and no, which a GGUF file may have in place of the whole
    head; None where it has none. Raises CheckpointError for labels of another kind."""
    metadata = read_gguf(gguf_shards(checkpoint.path)[0])[0]
    labels = metadata.get(f"{metadata.get('general.architecture')}.classifier.output_labels")
    tensor = checkpoint.tensors.get("cls.output.weight")
    if tensor is None:
        return None
    labels = labels or ["yes", "no"]
    if sorted(map(str, labels)) != ["no", "yes"] or tensor.shape[0] != 2:
        problem = f"ranks by the labels {excerpt(labels)}; yes and no are supported"
        raise CheckpointError(f"{checkpoint.path}: {problem}")
    head = tensor.load()
    rows = head.float() if isinstance(head, Tensor) else head.dequantize().float()
    return rows if labels[0] == "yes" else rows.flip(0)


def token_of(llm: LLM, config: Json, name: str) -> int | None:
    """A token id of a module's config; None where there is none."""
    value = config.get(name)
    return value if type(value) is int and 0 <= value < llm.engine.n_vocab else None


_rankers: weakref.WeakKeyDictionary[LLM, Ranker] = weakref.WeakKeyDictionary()


def new_pooler(llm: LLM) -> RankPooler:
    """A pooler for one prompt. Raises RequestError for a model that does not rank."""
    if llm not in _rankers:
        _rankers[llm] = find_ranker(llm)
    return RankPooler(llm, _rankers[llm])


class RankPooler:
    """Makes the score of one prompt from its last state; the embedding is this number alone."""

    def __init__(self, llm: LLM, ranker: Ranker) -> None:
        self.decoder, self.ranker = llm.engine.decoder, ranker
        self.last: Tensor | None = None

    def take(self, states: Tensor) -> None:
        """Keep the last of the states (n, C) of the next n tokens."""
        self.last = states[-1:].clone()

    def embedding(self) -> list[float]:
        """The score. Raises LogitsError where the model computed no numbers."""
        decoder: Any = self.decoder
        assert self.last is not None
        if self.ranker.head is not None:
            yes, no = map(float, self.ranker.head @ self.last[0])
        else:
            x = self.last.to(decoder.device, decoder.backend.dtype)
            logits = decoder.capped(decoder.lm_head(x).float())[0]
            yes = float(logits[self.ranker.yes])
            no = float(logits[self.ranker.no]) if self.ranker.no >= 0 else 0.0
        difference = yes - no
        check_number(difference, "score")
        return [1 / (1 + math.exp(-max(min(difference, 700.0), -700.0)))]
