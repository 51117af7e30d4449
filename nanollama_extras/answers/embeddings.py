"""Embeddings of texts: hidden states after the last norm, pooled, put through the modules of
sentence-transformers, and scaled to unit length.

Seam       Sequence.pooler: the core hands it the states of a text's tokens, and takes the embedding
           in place of an answer.
           A request to rank gets its pooler from answers.ranks.
Remove     delete this file; `LLM.embed`, --embed and the routes of embeddings then say that they
           need it.
Source     https://sbert.net/docs/package_reference/sentence_transformer/modules.html
"""

from __future__ import annotations

import functools
import json
import re
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from nanollama import (
    Checkpoint,
    CheckpointError,
    GenerationRequest,
    PackedLinear,
    RequestError,
    check_number,
    excerpt,
    extra,
    read_json,
    read_safetensors,
)

if TYPE_CHECKING:
    from nanollama import LLM

# {arch}.pooling_type in GGUF metadata (https://github.com/ggml-org/llama.cpp, llama_pooling_type)
GGUF_POOLING = {"1": "mean", "2": "cls", "3": "last", "4": "rank"}
# Dense layers after pooling in GGUF files, whose only other metadata repeat their shapes
GGUF_DENSE = ("dense_2.weight", "dense_3.weight")
# Class of torch.nn in the config of a Dense module -> its function
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Identity": lambda x: x,
    "Tanh": torch.tanh,
    "ReLU": F.relu,
    "GELU": F.gelu,
    "SiLU": F.silu,
    "Sigmoid": torch.sigmoid,
}
Step = Callable[[Tensor], Tensor]  # an embedding (C,) -> (C,)


@dataclass(frozen=True, slots=True)
class Pooling:
    """How the files of a model make an embedding of its states."""

    kind: str  # mean or last
    steps: tuple[Step, ...]


_poolings: weakref.WeakKeyDictionary[LLM, Pooling] = weakref.WeakKeyDictionary()


def embed(llm: LLM, texts: Iterable[str | list[int]]) -> list[list[float]]:
    """An embedding of unit length for each text. Raises RequestError."""
    requests = [GenerationRequest(prompt=text, embed=True) for text in texts]
    embeddings = {d.index: d.embedding for d in llm.stream(requests) if d.embedding}
    return [embeddings[i] for i in range(len(requests))]


def new_pooler(llm: LLM, request: GenerationRequest) -> Any:
    """A pooler for one text. Files are read for the first one. Raises RequestError and
    CheckpointError."""
    if request.embed == "rank":
        return extra("answers.ranks", "a rank").new_pooler(llm)
    if llm not in _poolings:
        _poolings[llm] = read_pooling(llm.checkpoint)
    return Pooler(_poolings[llm])


def read_pooling(checkpoint: Checkpoint) -> Pooling:
    """The pooling that the files declare, the mean by default. Raises RequestError for a kind, and
    CheckpointError for a module, that is not supported."""
    modules = read_modules(checkpoint.path)
    kind = GGUF_POOLING.get(str(checkpoint.pooling))
    if folder := next((folder for name, folder in modules if name == "Pooling"), None):
        kind = declared_kind(read_json(folder / "config.json", required=False))
    if kind not in (None, "mean", "last"):
        raise RequestError(f"this model pools by {excerpt(kind)}; mean and last are supported")
    width, steps = checkpoint.config.n_embd, stored_layers(checkpoint)
    for name, folder in modules:
        if name in ("Transformer", "Pooling", "Dropout"):
            continue
        if name not in MODULES:
            raise CheckpointError(
                f"{checkpoint.path / 'modules.json'}: module {excerpt(name)} is not supported; "
                f"{', '.join(MODULES)} are"
            )
        step, width = MODULES[name](folder, width)
        steps.append(step)
    return Pooling(kind or "mean", tuple(steps))


def stored_layers(checkpoint: Checkpoint) -> list[Step]:
    """The dense layers that a GGUF file has itself. Raises CheckpointError."""
    width, steps = checkpoint.config.n_embd, list[Step]()
    for name in filter(checkpoint.tensors.get, GGUF_DENSE):
        tensor, title = checkpoint.tensors[name], f"{checkpoint.path}: tensor {name}"
        if len(tensor.shape) != 2 or tensor.shape[1] != width:
            raise CheckpointError(f"{title} has shape {tensor.shape}; (.., {width}) is needed")
        loaded, width = tensor.load(), tensor.shape[0]
        weight = loaded.dequantize() if isinstance(loaded, PackedLinear) else loaded
        steps.append(functools.partial(F.linear, weight=weight.double()))
    return steps


def read_modules(path: Path) -> list[tuple[str, Path]]:
    """The modules of sentence-transformers, in their order: class and folder. None of them for a
    file that is damaged."""
    try:
        listed = json.loads((path / "modules.json").read_text(encoding="utf-8"))
        modules = [(str(m["type"]).rpartition(".")[2], str(m["path"] or "")) for m in listed]
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return []
    if not all(re.fullmatch(r"[\w.-]*", folder) and folder != ".." for _, folder in modules):
        return []
    return [(name, path / folder) for name, folder in modules]


def declared_kind(modes: Mapping[str, Any]) -> str | None:
    """The pooling that 1_Pooling/config.json declares by pooling_mode_*; None for none."""
    prefix = "pooling_mode_"
    active = [
        key[len(prefix) :] for key, on in modes.items() if key.startswith(prefix) and on is True
    ]
    if "pooling_mode" in modes:  # newer files
        active = [str(modes["pooling_mode"])]
    names = {"mean_tokens": "mean", "lasttoken": "last"}
    return "+".join(names.get(name, name) for name in active) or None


def read_tensors(folder: Path, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Tensor]:
    """The tensors of a module, in float64. Raises CheckpointError for other names or shapes."""
    file = folder / "model.safetensors"
    if not file.exists():
        pickled = (folder / "pytorch_model.bin").exists()
        hint = "; pytorch_model.bin is a pickle, which is never opened" if pickled else ""
        raise CheckpointError(f"{folder}: no model.safetensors{hint}")
    found = read_safetensors(file)
    if (there := {name: tensor.shape for name, tensor in found.items()}) != shapes:
        raise CheckpointError(f"{file}: has {excerpt(there)}; {excerpt(dict(shapes))} is needed")
    return {name: cast("Tensor", tensor.load()).double() for name, tensor in found.items()}


def dense(folder: Path, width: int) -> tuple[Step, int]:
    """A module Dense: activation(W x + b), with a residual if wanted. Returns the width, too."""
    config = read_json(folder / "config.json")
    name = str(config.get("activation_function", "torch.nn.Tanh")).rpartition(".")[2]
    inputs = config.get("module_input_name", "sentence_embedding")
    outputs = config.get("module_output_name") or inputs
    if name not in ACTIVATIONS or {inputs, outputs} != {"sentence_embedding"}:
        raise CheckpointError(
            f"{folder / 'config.json'}: activation_function {excerpt(name)} from {excerpt(inputs)} "
            f"to {excerpt(outputs)} is not supported; {', '.join(ACTIVATIONS)} of the embedding are"
        )
    num_rows, residual = config.get("out_features"), config.get("use_residual") is True
    shapes: dict[str, tuple[Any, ...]] = {"linear.weight": (num_rows, width)}
    shapes |= {"linear.bias": (num_rows,)} if config.get("bias", True) else {}
    shapes |= {"residual.weight": (num_rows, width)} if residual and num_rows != width else {}
    tensors, act = read_tensors(folder, shapes), ACTIVATIONS[name]
    weight, bias = tensors["linear.weight"], tensors.get("linear.bias")

    def step(x: Tensor) -> Tensor:
        y = act(F.linear(x, weight, bias))
        if residual:
            y = y + (F.linear(x, tensors["residual.weight"]) if len(tensors) > 2 else x)
        return y

    return step, int(weight.shape[0])


def layer_norm(folder: Path, width: int) -> tuple[Step, int]:
    tensors = read_tensors(folder, {"norm.weight": (width,), "norm.bias": (width,)})
    norm = functools.partial(
        F.layer_norm,
        normalized_shape=(width,),
        weight=tensors["norm.weight"],
        bias=tensors["norm.bias"],
    )
    return norm, width


# Class of sentence-transformers -> its function, from a folder and the width of its input
MODULES: dict[str, Callable[[Path, int], tuple[Step, int]]] = {
    "Dense": dense,
    "LayerNorm": layer_norm,
    "Normalize": lambda folder, width: (functools.partial(F.normalize, dim=0), width),
}


class Pooler:
    """Makes the embedding of one text: pools its states, and applies the modules."""

    def __init__(self, pooling: Pooling) -> None:
        self.pooling = pooling
        self.chunks: list[Tensor] = []  # of states (n, C)

    def take(self, states: Tensor) -> None:
        """Keep the states (n, C) of the next n tokens."""
        if self.pooling.kind == "last":
            self.chunks = [states[-1:].clone()]
        else:
            self.chunks.append(states)

    def embedding(self) -> list[float]:
        """The embedding (C,). Raises LogitsError where the model computed no numbers."""
        states = torch.cat(self.chunks).double()  # float64: the size of chunks must not matter
        pooled = states.mean(0).cpu()
        for step in self.pooling.steps:
            pooled = step(pooled)
        pooled = F.normalize(pooled, dim=0)
        check_number(float(pooled.sum()), "embedding")
        embedding: list[float] = pooled.tolist()
        return embedding
