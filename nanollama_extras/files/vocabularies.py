"""Vocabularies in other files than tokenizer.json and GGUF: Mistral's tekken.json, tiktoken's ranks
(Llama 3, Qwen 1), SentencePiece's tokenizer.model, and the tokenizer.pkl of nanochat; and
SentencePiece's, Phi-3's and Gemma 4's vocabularies in GGUF files. Imports files.scored_pieces
where that is there.

Seam: Vocabulary. The rows of `nanollama.VOCABULARIES` that name this module; the core then calls
`read_vocabulary`, and `mistral_template` for a tekken.json. Each reader puts a file into the terms
of GGUF metadata, from which `nanollama.gguf_tokenizer` builds the tokenizer. For a GGUF file the
core calls `complete` for any tokenizer.ggml.model but gpt2, and reads SHOWN_CONTROL where the
vocabulary is nanochat's.
To remove it: delete this file, its rows in VOCABULARIES, and its tests. GGUF files with a
vocabulary of SentencePiece then need --tokenizer.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
import io
import json
import math
import pickle
import re
import struct
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import numpy.typing as npt
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

import nanollama
from nanollama import CheckpointError, Flags, PreTokenizer, TextFiles, excerpt

TOKEN_UNUSED, TOKEN_BYTE = 5, 6  # tokenizer.ggml.token_type, as the core's TOKEN_NORMAL
MERGEABLE = (nanollama.TOKEN_NORMAL, TOKEN_UNUSED, nanollama.TOKEN_USER_DEFINED)


class Build(Protocol):
    """Makes a tokenizer of metadata, the ids of the pieces, and the type of each piece."""

    def __call__(
        self, metadata: Mapping[str, Any], vocab: dict[str, int], types: list[int]
    ) -> Tokenizer: ...


# The library reads SentencePiece's own format; it is imported when a tokenizer.model is opened.
sentencepiece_model: Any = nanollama.LazyModule(
    "sentencepiece.sentencepiece_model_pb2", install='pip install ".[sentencepiece]"'
)


def read_vocabulary(text: TextFiles) -> tuple[TextFiles, Tokenizer]:
    """The tokenizer of a file, and `text` with what the file says about templates and special
    tokens.

    tokenizer_config.json and added_tokens.json beside the file are read, too. Raises
    CheckpointError, and PackageError where a SentencePiece model lacks its library."""
    path = text.tokenizer_file
    assert path is not None
    raw = path.read_bytes()
    is_tiktoken = re.match(rb"[A-Za-z0-9+/]+=* \d+\s", raw)
    readers = {".json": read_tekken, ".pkl": read_nanochat}
    read = readers.get(path.suffix, read_tiktoken if is_tiktoken else read_sentencepiece)
    metadata, build = read(raw)
    flags = name_added_tokens(metadata, path.parent)
    tokenizer = nanollama.gguf_tokenizer(metadata, build, flags)
    described = nanollama._gguf_text(metadata, text.source)
    text = dataclasses.replace(
        text,
        templates={**described.templates, **text.templates},
        special_tokens={**described.special_tokens, **text.special_tokens},
        eos_ids=described.eos_ids | text.eos_ids,
    )
    return text, tokenizer


def name_added_tokens(metadata: dict[str, Any], directory: Path) -> dict[int, Any]:
    """Add the tokens of tokenizer_config.json and added_tokens.json to the vocabulary -> their
    flags by id. Raises CheckpointError for an id far beyond the vocabulary."""
    settings = nanollama.read_json(directory / "tokenizer_config.json", required=False)
    ids_by_token = nanollama.read_json(directory / "added_tokens.json", required=False)
    added: dict[int, Any] = {i: {"content": token} for token, i in ids_by_token.items()}
    added |= {int(i): token for i, token in (settings.get("added_tokens_decoder") or {}).items()}
    tokens, types, scores = map(metadata.__getitem__, ("tokens", "token_type", "scores"))
    if added and not 0 <= min(added) <= max(added) < len(tokens) + 2**16:
        raise CheckpointError(f"added tokens have the ids {min(added)} to {max(added)}")
    for i in range(len(tokens), max(added, default=0) + 1):
        tokens.append(f"[PAD{i}]")
        types.append(TOKEN_UNUSED)
        scores.append(-1e4)
    for i, token in added.items():
        is_special = token.get("special")
        tokens[i] = token["content"]
        types[i] = nanollama.TOKEN_CONTROL if is_special else nanollama.TOKEN_USER_DEFINED
    metadata["legacy"] = settings.get("legacy")
    if isinstance(add_bos := settings.get("add_bos_token"), bool):
        metadata["add_bos_token"] = add_bos
    names = ("lstrip", "rstrip", "single_word", "normalized")
    return {i: {name: token[name] for name in names if name in token} for i, token in added.items()}


# ---- rarer vocabularies in GGUF files ------------------------------------------------------------


def complete(
    metadata: Mapping[str, Any], build: Build | None, flags: Flags | None
) -> tuple[Mapping[str, Any], Build, Flags | None]:
    """Metadata, builder and flags of added tokens for a tokenizer.ggml.model that is not gpt2; a
    builder or flags that are given stay. Raises CheckpointError for an unknown model."""
    kind, tokens = metadata.get("model"), [str(token) for token in metadata["tokens"]]
    types = list(metadata.get("token_type") or [])[: len(tokens)]
    for i, token in enumerate(tokens[: len(types)]):
        if types[i] == nanollama.TOKEN_USER_DEFINED and not token.strip(" "):
            tokens[i] = "▁" * len(token)  # Gemma's runs of spaces, which converters write as spaces
    builds: dict[Any, Build] = {"llama": build_llama, "gemma4": build_gemma4}
    if not build and kind not in builds:
        raise CheckpointError(
            f"tokenizer.ggml.model {excerpt(kind)} is not supported (gpt2, llama and gemma4 "
            "are); give --tokenizer with a model directory or hub id"
        )
    if flags is None and "<|placeholder1|>" in tokens:
        flags = phi3_flags(tokens, types)
    return {"add_bos_token": True, **metadata, "tokens": tokens}, build or builds[kind], flags


def build_llama(metadata: Mapping[str, Any], vocab: dict[str, int], types: list[int]) -> Tokenizer:
    """SentencePiece's pieces with scores."""
    scores = metadata.get("scores") or [0.0] * len(vocab)
    new_model = functools.partial(piece_model, types=types)
    merges = functools.partial(scored_merges, scores, vocab, types)
    scored: Any = nanollama.preferred("files.scored_pieces", "ScoredModel", None)
    if scored:
        tokenizer = scored(new_model, merges, vocab, scores, types).new_tokenizer()
    else:
        tokenizer = Tokenizer(new_model(vocab, merges()))
    return with_spaces(tokenizer, metadata.get("add_space_prefix", True))


def merge_orders(scores: Sequence[float], types: Sequence[int]) -> npt.NDArray[np.float64]:
    """The order in which merges into each piece apply, the lowest number first -> (V,)

    A better score comes earlier; user-defined pieces come first, because converters give them any
    score. Raises CheckpointError where scores are missing."""
    if len(scores) < len(types):
        raise CheckpointError(f"there are {len(scores)} scores for {len(types)} tokens")
    orders = -np.array(scores, np.float64)[: len(types)]
    orders[np.array(types) == nanollama.TOKEN_USER_DEFINED] = -math.inf
    return orders


def scored_merges(
    scores: list[float], vocab: Mapping[str, int], types: list[int]
) -> list[tuple[str, str]]:
    """Merges of a vocabulary that has scores instead: each way to split a piece into two pieces.
    Raises as `merge_orders`."""
    orders = merge_orders(scores, types)
    pieces = [piece for piece, i in vocab.items() if types[i] in MERGEABLE]
    ids = np.array([vocab[piece] for piece in pieces], np.int64)
    ranks = np.lexsort((ids, orders[ids])).argsort()
    whole, left, right = halves(pieces)
    at = (ranks[whole] << 32 | ids[left]).argsort()
    names = ([pieces[i] for i in part[at].tolist()] for part in (left, right))
    return list(zip(*names))


Numbers = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]
BASE = 0x9E3779B97F4A7C15  # odd: it has an inverse modulo 2^64


def halves(pieces: list[str]) -> tuple[Numbers, Numbers, Numbers]:
    """Each way to cut a piece into two pieces -> the numbers of the piece, its beginning, its end.

    Texts are compared by hashes, modulo 2^64: the sum of each character times BASE^i, where i is
    its place in the text. Sums over all pieces in a row give each part's by one subtraction."""
    text = "".join(pieces).encode("utf-32-le", "surrogatepass")
    codes = np.frombuffer(text, "<u4").astype(np.uint64) + np.uint64(1)
    sizes = np.array([len(piece) for piece in pieces], np.int64)
    ends = sizes.cumsum()
    starts = ends - sizes
    up, down = (powers(base, len(codes) + 1) for base in (BASE, pow(BASE, -1, 2**64)))
    sums = np.concatenate((np.zeros(1, np.uint64), (codes * up[:-1]).cumsum(dtype=np.uint64)))

    def hashes(start: Numbers, stop: Numbers) -> Hashes:
        return (sums[stop] - sums[start]) * down[start]

    find, is_inner = finder(hashes(starts, ends)), np.ones(len(codes), bool)
    is_inner[starts[sizes > 0]] = False
    cuts, whole = is_inner.nonzero()[0], np.arange(len(pieces)).repeat(np.maximum(sizes - 1, 0))
    right = find(hashes(cuts, ends[whole]))
    cuts, whole, right = (part[right >= 0] for part in (cuts, whole, right))
    left = find(hashes(starts[whole], cuts))
    return whole[left >= 0], left[left >= 0], right[left >= 0]


def powers(base: int, count: int) -> Hashes:
    """base^0, base^1, .. modulo 2^64 (count,)"""
    factors = np.full(count, base, np.uint64)
    factors[0] = 1
    return factors.cumprod(dtype=np.uint64)


def finder(known: Hashes) -> Callable[[Hashes], Numbers]:
    """A function from hashes to their places in `known`; -1 for others.

    Places lie in tables by the first bits of the hash. Where two meet, one is in the next table,
    which takes the first bits of the hash times another number."""
    shift, rest = np.uint64(61 - len(known).bit_length()), np.arange(len(known))
    tables: list[npt.NDArray[np.int32]] = []

    def slots(hashes: Hashes, level: int) -> Any:
        return hashes * np.uint64(BASE + 2 * level) >> shift

    while len(rest):
        slot = slots(known[rest], len(tables))
        tables.append(np.full(1 << 64 - int(shift), -1, np.int32))
        tables[-1][slot] = rest
        rest = rest[tables[-1][slot] != rest]

    def find(hashes: Hashes) -> Numbers:
        found, rest = np.full(len(hashes), -1), np.arange(len(hashes))
        for level, table in enumerate(tables):
            place = table[slots(hashes[rest], level)]
            rest, place = rest[place >= 0], place[place >= 0]
            is_it = known[place] == hashes[rest]
            found[rest[is_it]] = place[is_it]
            rest = rest[~is_it]
        return found

    return find


def piece_model(
    vocab: dict[str, int], merges: list[tuple[str, str]], types: list[int]
) -> models.BPE:
    """BPE over characters, with bytes for those that the vocabulary lacks
    (https://github.com/google/sentencepiece)."""
    unknown = next((p for p, i in vocab.items() if types[i] == nanollama.TOKEN_UNKNOWN), None)
    return models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)


def with_spaces(tokenizer: Tokenizer, has_prefix: bool) -> Tokenizer:
    """The tokenizer with spaces as ▁. `has_prefix`: a text begins with a space."""
    prefix = [normalizers.Prepend("▁")] if has_prefix else []
    tokenizer.normalizer = normalizers.Sequence([*prefix, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if has_prefix else []
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip]
    )
    return tokenizer


def build_gemma4(metadata: Mapping[str, Any], vocab: dict[str, int], types: list[int]) -> Tokenizer:
    """SentencePiece's pieces with merges in a list; newlines stay apart from other text."""
    merges = nanollama.file_merges(metadata, vocab)
    has_prefix = metadata.get("add_space_prefix", False)
    tokenizer = Tokenizer(piece_model(vocab, merges, types))
    with_spaces(tokenizer, has_prefix)
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("\n+"), "isolated")
    return tokenizer


# Phi-3's control tokens that leave the spaces behind them in the text (llama-vocab.cpp)
PHI3_KEEPS_SPACES = frozenset({"<unk>", "<s>", "<|endoftext|>"})


def phi3_flags(tokens: list[str], types: list[int]) -> dict[int, dict[str, bool]]:
    """Flags that GGUF lacks: Phi-3's control tokens swallow the spaces behind them."""
    control = (nanollama.TOKEN_CONTROL, nanollama.TOKEN_UNKNOWN)
    swallow = {
        i for i, kind in enumerate(types) if kind in control and tokens[i] not in PHI3_KEEPS_SPACES
    }
    return {i: {"rstrip": True} for i in swallow}


# ---- pieces by rank ------------------------------------------------------------------------------


def ranked_build(pre: PreTokenizer) -> Build:
    """The builder of a byte-level BPE whose pieces merge in the order of their ranks."""

    def build(metadata: Mapping[str, Any], vocab: dict[str, int], types: list[int]) -> Tokenizer:
        merges = scored_merges(metadata["scores"], vocab, types)
        return nanollama.byte_level_bpe(vocab, merges, pre._replace(ignore_merges=True))

    return build


def ranked_metadata(
    ranks: Mapping[bytes, int], before: list[str], behind: list[str], bos: str | None, eos: str
) -> dict[str, Any]:
    """Metadata of a byte-level BPE whose pieces merge in the order of their ranks; `before` and
    `behind` are the control tokens around them. Raises CheckpointError for ranks with gaps."""
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise CheckpointError("the ranks are not 0, 1, 2 and so on")
    alphabet = {byte: character for character, byte in nanollama.byte_alphabet().items()}
    pieces = [p.decode("latin-1").translate(alphabet) for p in sorted(ranks, key=ranks.__getitem__)]
    tokens = [*before, *pieces, *behind]
    control, normal = [nanollama.TOKEN_CONTROL], [nanollama.TOKEN_NORMAL]
    return {
        "model": "gpt2",
        "tokens": tokens,
        "token_type": control * len(before) + normal * len(pieces) + control * len(behind),
        "scores": [-i for i in range(len(tokens))],
        "bos_token_id": tokens.index(bos) if bos else None,
        "add_bos_token": bos is not None,
        "eos_token_id": tokens.index(eos),
    }


# ---- Mistral's tekken.json -----------------------------------------------------------------------

# Control tokens from id 0 on, for a tekken.json that does not list them
# https://github.com/mistralai/mistral-common (tokens/tokenizers/tekken.py)
TEKKEN = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
    "[/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] "
    "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()

# The prompt that Mistral's library writes for a chat without tools. From version 7 on, a system
# message stands where it is in the chat; older versions put it before the last question (`old`).
# https://github.com/mistralai/mistral-common (integrations/chat_templates)
MISTRAL_TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(system='', turn=0) %}{% for message in messages %}"
    "{% if message.role == 'system' and old %}"
    "{% set ns.system = ns.system + message.content + '\n\n' %}"
    "{% elif message.role == 'user' %}{% set ns.turn = ns.turn + 1 %}{% endif %}{% endfor %}"
    "{% for message in messages %}"
    "{% if message.role != 'system' and message.role == (loop.previtem or {}).role %}"
    "{{ raise_exception('roles must alternate between user and assistant') }}"
    "{% elif message.role == 'user' %}{% set ns.turn = ns.turn - 1 %}"
    "[INST]{{ '' if ns.turn else ns.system }}{{ message.content }}[/INST]"
    "{% elif message.role == 'assistant' %}{{ message.content }}{{ eos_token }}"
    "{% elif message.role != 'system' %}"
    "{{ raise_exception('only system, user and assistant messages are supported') }}"
    "{% elif not old %}[SYSTEM_PROMPT]{{ message.content }}[/SYSTEM_PROMPT]{% endif %}{% endfor %}"
)


def mistral_template(tekken: Path) -> str:
    """Jinja template for chats with the model of a tekken.json, which holds its version."""
    config = nanollama.read_json(tekken).get("config")
    version = config.get("version") if isinstance(config, Mapping) else None
    match = re.fullmatch(r"v(\d{1,4})\w*", str(version))
    old = "true" if match and int(match[1]) < 7 else "false"
    return f"{{% set old = {old} %}}{MISTRAL_TEMPLATE}"


def read_tekken(raw: bytes) -> tuple[dict[str, Any], Build]:
    """A tekken.json: control tokens first, then pieces by rank, and the expression that splits
    text."""
    vocabulary = json.loads(raw)
    config, entries = vocabulary["config"], vocabulary["vocab"]
    num_control, num_tokens = config["default_num_special_tokens"], config["default_vocab_size"]
    named = vocabulary.get("special_tokens") or [
        {"rank": i, "token_str": name} for i, name in enumerate(TEKKEN)
    ]
    if not len(named) <= num_control <= len(entries):
        raise CheckpointError(f"{excerpt(num_control)} control tokens; the file names {len(named)}")
    control = [f"<SPECIAL_{i}>" for i in range(num_control)]
    for token in named:
        control[token["rank"]] = token["token_str"]
    ranks = {
        base64.b64decode(entry["token_bytes"]): entry["rank"]
        for entry in entries[: num_tokens - num_control]
    }
    metadata = ranked_metadata(ranks, control, [], "<s>", "</s>")
    return metadata, ranked_build(PreTokenizer((config["pattern"],)))


# ---- tiktoken's ranks ----------------------------------------------------------------------------

# A tiktoken file holds ranks only. The number of ranks tells the model: the name of its
# pre-tokenizer, the control tokens behind the ranks, and the first and last token of a text.
# https://github.com/meta-llama/llama-models (llama3/tokenizer.py),
# https://huggingface.co/Qwen/Qwen-7B (tokenization_qwen.py)
_LLAMA3 = (
    "begin_of_text end_of_text reserved_special_token_0 reserved_special_token_1 "
    "finetune_right_pad_id step_id start_header_id end_header_id eom_id eot_id python_tag image"
).split() + [f"reserved_special_token_{i}" for i in range(2, 246)]
_QWEN1 = ["endoftext", "im_start", "im_end", *(f"extra_{i}" for i in range(205))]
TIKTOKEN = {
    128000: ("llama-bpe", [f"<|{name}|>" for name in _LLAMA3], "<|begin_of_text|>", "<|eot_id|>"),
    151643: ("qwen2", [f"<|{name}|>" for name in _QWEN1], None, "<|im_end|>"),
}


def read_tiktoken(raw: bytes) -> tuple[dict[str, Any], Build]:
    """Lines of a piece in base64 and its rank. Raises CheckpointError for an unknown number of
    ranks (https://github.com/openai/tiktoken, load.py)."""
    lines = map(bytes.split, raw.splitlines())
    ranks = {base64.b64decode(line[0]): int(line[1]) for line in lines if line}
    if len(ranks) not in TIKTOKEN:
        known = ", ".join(map(str, TIKTOKEN))
        raise CheckpointError(
            f"a tiktoken file of {len(ranks)} tokens is not known (those of {known} are); give "
            "--tokenizer with a model directory or hub id"
        )
    pre, control, bos, eos = TIKTOKEN[len(ranks)]
    build = ranked_build(nanollama.PRE_TOKENIZERS[pre])
    return ranked_metadata(ranks, [], control, bos, eos), build


# ---- SentencePiece models ------------------------------------------------------------------------


def read_sentencepiece(raw: bytes) -> tuple[dict[str, Any], Build]:
    """A SentencePiece model of the kind BPE that leaves text as it is. Raises CheckpointError for
    any other (https://github.com/google/sentencepiece, src/sentencepiece_model.proto)."""
    model = sentencepiece_model.ModelProto.FromString(raw)
    trained, normalized = model.trainer_spec, model.normalizer_spec
    if not model.pieces:
        raise CheckpointError("the file holds no vocabulary")
    if trained.model_type != trained.BPE:
        kind = trained.ModelType.Name(trained.model_type)
        raise CheckpointError(f"SentencePiece models of the kind {kind} are not supported; BPE is")
    if normalized.precompiled_charsmap or normalized.remove_extra_whitespaces:
        raise CheckpointError(
            f"the SentencePiece model normalises text ({normalized.name or 'its spaces'}), which "
            "is not supported"
        )
    ids = {"bos": trained.bos_id, "eos": trained.eos_id, "unknown": trained.unk_id}
    metadata = {
        "model": "llama",
        "tokens": [piece.piece for piece in model.pieces],
        "token_type": [piece.type for piece in model.pieces],  # numbered as GGUF's
        "scores": [piece.score for piece in model.pieces],
        "add_space_prefix": normalized.add_dummy_prefix,
        **{f"{name}_token_id": i if i >= 0 else None for name, i in ids.items()},
    }
    return metadata, build_sentencepiece


def build_sentencepiece(
    metadata: Mapping[str, Any], vocab: dict[str, int], types: list[int]
) -> Tokenizer:
    """As the core for GGUF, except that the legacy code alone puts a space behind control tokens,
    too (https://huggingface.co/docs/transformers/model_doc/llama, `legacy`)."""
    tokenizer = build_llama(metadata, vocab, types)
    if metadata["add_space_prefix"] and metadata["legacy"] is False:
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return tokenizer


# ---- nanochat's tokenizer.pkl --------------------------------------------------------------------

NANOCHAT_BOS = "<|bos|>"
# Control tokens that an answer shows as blocks of Markdown: nanochat's code, and its results.
# nanochat's template turns the blocks of an earlier answer into the tokens again.
SHOWN_CONTROL = {
    "<|python_start|>": "\n~~~python\n",
    "<|python_end|>": "\n~~~\n",
    "<|output_start|>": "\n~~~~output\n",
    "<|output_end|>": "\n~~~~\n",
}
NANOCHAT_TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(system='', turn=0) %}{% for message in messages %}"
    "{% if message.role == 'system' and loop.first %}"
    "{% set ns.system = message.content + '\n\n' %}"
    "{% elif message.role != ('user', 'assistant')[ns.turn % 2] %}"
    "{{ raise_exception('roles must alternate between user and assistant') }}"
    "{% else %}{% set ns.turn = ns.turn + 1 %}{% if message.role == 'user' %}"
    "<|user_start|>{{ ns.system + message.content }}<|user_end|>{% set ns.system = '' %}"
    "{% else %}<|assistant_start|>{{ message.content"
    + "".join(f"|replace({shown!r}, {token!r})" for token, shown in SHOWN_CONTROL.items())
    + " }}<|assistant_end|>{% endif %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant_start|>{% endif %}"
)


def read_nanochat(raw: bytes) -> tuple[dict[str, Any], Build]:
    """A pickled tiktoken.Encoding, as nanochat saves it: pieces by rank, then control tokens."""
    encoding = read_encoding(raw)
    ranks, control = encoding["mergeable_ranks"], encoding["special_tokens"]
    names = sorted(control, key=control.__getitem__)
    if [control[name] for name in names] != list(range(len(ranks), len(ranks) + len(names))):
        raise CheckpointError("the control tokens do not follow the other tokens")
    metadata = ranked_metadata(ranks, [], names, NANOCHAT_BOS, "<|assistant_end|>") | {
        "eot_token_id": control[NANOCHAT_BOS],  # the beginning of another text ends an answer, too
        "tokenizer.chat_template": NANOCHAT_TEMPLATE,
    }
    return metadata, ranked_build(PreTokenizer((encoding["pat_str"],)))


def read_encoding(raw: bytes) -> dict[str, Any]:
    """The pat_str, mergeable_ranks and special_tokens of a pickled tiktoken.Encoding.

    Raises CheckpointError for any other pickle, and runs no code of any."""
    try:
        state = EncodingUnpickler(io.BytesIO(raw)).load().state
        key_types = {"mergeable_ranks": bytes, "special_tokens": str}
        for name, key_type in key_types.items():
            for key, value in state[name].items():
                if not isinstance(key, key_type) or not isinstance(value, int):
                    raise ValueError(f"{name} has {excerpt(key)}: {excerpt(value)}")
        if not isinstance(state["pat_str"], str):
            raise ValueError(f"pat_str is {excerpt(state['pat_str'])}")
        return dict(state)
    except (ValueError, LookupError, TypeError, AttributeError, *PICKLE_ERRORS) as error:
        raise CheckpointError(
            "not a tiktoken encoding as nanochat saves it, and no other pickle is read: "
            f"{type(error).__name__}: {error}"
        ) from None


PICKLE_ERRORS = (pickle.UnpicklingError, EOFError, struct.error)
ENCODING_INSTRUCTIONS = (
    *(pickle.PROTO, pickle.FRAME, pickle.MARK, pickle.STOP),
    *(pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINBYTES, pickle.SHORT_BINBYTES),
    *(pickle.BININT, pickle.BININT1, pickle.BININT2),
    *(pickle.EMPTY_DICT, pickle.EMPTY_TUPLE, pickle.SETITEM, pickle.SETITEMS),
    *(pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET),
    *(pickle.STACK_GLOBAL, pickle.NEWOBJ, pickle.BUILD),
)


class PickledEncoding:
    """Stands for tiktoken.Encoding while a pickle is read; it keeps the state and does nothing."""

    def __setstate__(self, state: Any) -> None:
        self.state = state


class EncodingUnpickler(pickle._Unpickler):
    """Reads the pickle of one tiktoken.Encoding. Raises KeyError for an instruction that is not
    listed (none that is listed calls a function), and UnpicklingError for another class.

    Only the unpickler in Python has a table of instructions
    (https://github.com/python/cpython/blob/main/Lib/pickle.py)."""

    dispatch: ClassVar = {
        code[0]: pickle._Unpickler.dispatch[code[0]] for code in ENCODING_INSTRUCTIONS
    }

    def find_class(self, module: str, name: str) -> type:
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it holds a {excerpt(f'{module}.{name}')}")
        return PickledEncoding
