"""A tokenizer and its chat templates as metadata of GGUF: the inverse of how the core reads them.

Adds       `vocabulary_values`. The name of the pre-tokenizer is the one of our own tables that
           splits texts as the tokenizer does, and the result is tried on texts: a vocabulary that
           GGUF cannot hold is refused.
Seam       files.conversion calls it. Imports files.pre_tokenizers and files.vocabularies.
Remove     delete this file with commands/convert.py.
Spec       https://github.com/ggml-org/ggml/blob/master/docs/gguf.md (Tokenizer)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import tokenizers

from nanollama import (
    PRE_TOKENIZERS,
    TOKEN_CONTROL,
    TOKEN_NORMAL,
    TOKEN_UNKNOWN,
    TOKEN_USER_DEFINED,
    CheckpointError,
    PreTokenizer,
    TextFiles,
    Tokenizer,
    excerpt,
    gguf_tokenizer,
)
from nanollama_extras.files import pre_tokenizers
from nanollama_extras.files.vocabularies import TOKEN_BYTE, TOKEN_UNUSED

# Texts on which tokenizers differ that split text, or treat spaces, in other ways
PROBES = (
    "Hello, world! I'm sure they'LL say it's 1234567890 or 3.14159 (±0.5 %).",
    "  two  spaces,\ttab\n\n\nlines \r\n  and an end   ",
    "def f(x_1):\n    return x ** 2  # a path: /usr/bin/x?q=a%20b&c=d#e\n\n\n        ....----",
    "L'été, naïveté, Übergröße, żółw HTTPServer camelCase ABCdef don't DON'T",
    "Съешь же ещё этих мягких французских булок 2024年3月",
    "敏捷的棕色狐狸跳过懒狗。いろはにほへと 다람쥐 헌 쳇바퀴 नमस्ते दुनिया สวัสดี",
    '😀 👩‍👩‍👧‍👦 🇫🇷 e\u0301 {"a": [1, 2.5e-3]} aaaaaaaaaaaaaaaa !!!???',
)
PIECES = "tokenizer.ggml."
# special token of a tokenizer -> GGUF's key
SPECIAL = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding", "sep": "seperator"}
SPECIAL |= {"cls": "cls", "mask": "mask"}
UNUSED_SCORE = -1e4


def vocabulary_values(text: TextFiles, n_vocab: int) -> dict[str, Any]:
    """Metadata of a vocabulary with `n_vocab` tokens and of its chat templates.

    Raises CheckpointError for one that GGUF cannot hold, naming the text that it would split in
    another way."""
    tokenizer = Tokenizer(text)
    text, library = tokenizer.text, tokenizer._tokenizer
    described = json.loads(library.to_str())
    if described["model"]["type"] != "BPE":
        kind = described["model"]["type"]
        raise CheckpointError(f"{text.source}: GGUF has no vocabulary of the kind {kind}")
    values = pieces(described, n_vocab, text.source)
    ids = {token: i for i, token in enumerate(values["tokens"])}
    if has_bytes(described):
        values |= {"model": "llama", "scores": scores(described, values)}
        values["add_space_prefix"] = begins_with_space(library)
    else:
        values |= {"model": "gpt2", "pre": pre_name(library, text.source)}
        values["merges"] = [" ".join(merge) for merge in merge_list(described)]
    values |= special_ids(text, ids, tokenizer)
    check_same(values, tokenizer, text.source)
    found = {f"{PIECES}{key}": value for key, value in values.items()}
    return {**found, **template_values(text.templates)}


def merge_list(described: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Merges as pairs; older files have one text for both"""
    pairs = (m.split(" ", 1) if isinstance(m, str) else m for m in described["model"]["merges"])
    return [(left, right) for left, right in pairs]


def has_bytes(described: Mapping[str, Any]) -> bool:
    """Whether pieces are text, and bytes stand for characters that they lack (SentencePiece)"""
    return bool(described["model"].get("byte_fallback"))


def pieces(described: Mapping[str, Any], n_vocab: int, source: str) -> dict[str, Any]:
    """Tokens and their types; unused ones fill a table that is larger. Raises CheckpointError."""
    vocab, unknown = described["model"]["vocab"], described["model"].get("unk_token")
    added = {token["id"]: token for token in described.get("added_tokens", [])}
    last = max([*vocab.values(), *added], default=-1)
    if last >= n_vocab:
        raise CheckpointError(f"{source}: token {last} is beyond the model's {n_vocab} tokens")
    tokens = [f"[PAD{i}]" for i in range(n_vocab)]
    types = [TOKEN_UNUSED] * n_vocab
    for token, i in vocab.items():
        tokens[i], types[i] = token, TOKEN_NORMAL
        if has_bytes(described) and len(token) == 6 and token.startswith("<0x"):
            types[i] = TOKEN_BYTE
    for i, token in added.items():
        tokens[i] = token["content"]
        types[i] = TOKEN_CONTROL if token["special"] else TOKEN_USER_DEFINED
    if unknown in vocab:
        types[vocab[unknown]] = TOKEN_UNKNOWN
    return {"tokens": tokens, "token_type": types}


def scores(described: Mapping[str, Any], values: Mapping[str, Any]) -> list[float]:
    """A score for each piece: the earlier a merge makes it, the higher"""
    ranks: dict[str, int] = {}
    for left, right in merge_list(described):
        ranks.setdefault(left + right, len(ranks))
    normal = (TOKEN_NORMAL, TOKEN_USER_DEFINED)
    return [
        -float(ranks.get(token, len(ranks))) if kind in normal else 0.0
        for token, kind in zip(values["tokens"], values["token_type"])
    ]


def begins_with_space(library: tokenizers.Tokenizer) -> bool:
    """Whether the tokenizer puts a space before a text"""
    return library.encode("a", add_special_tokens=False).tokens[:1] != ["a"]


def pre_name(library: tokenizers.Tokenizer, source: str) -> str:
    """The pre-tokenizer's name in GGUF: of those that split the probes as the tokenizer does, one
    that also agrees about words taken whole and about NFC. Raises CheckpointError for none."""
    described = json.loads(library.to_str())
    whole = bool(described["model"].get("ignore_merges"))
    is_nfc = "NFC" in json.dumps(described.get("normalizer"))
    wanted = [splits(library.pre_tokenizer, probe) for probe in PROBES]
    known = {**PRE_TOKENIZERS, **pre_tokenizers.PRE_TOKENIZERS}
    fitting = [name for name, row in known.items() if split_all(row) == wanted]
    if not fitting:
        raise CheckpointError(f"{source}: GGUF has no name for how this tokenizer splits text")
    return max(fitting, key=lambda n: (known[n].ignore_merges == whole, known[n].is_nfc == is_nfc))


def splits(pre: Any, text: str) -> list[str]:
    return [word for word, _ in pre.pre_tokenize_str(text)] if pre else [text]


def split_all(row: PreTokenizer) -> list[list[str]]:
    """The probes as a pre-tokenizer of our tables splits them"""
    split = tokenizers.pre_tokenizers
    words = [split.Split(tokenizers.Regex(pattern), "isolated") for pattern in row.patterns]
    whole = split.Sequence([*words, split.ByteLevel(add_prefix_space=False, use_regex=False)])
    return [splits(whole, probe) for probe in PROBES]


def special_ids(text: TextFiles, ids: Mapping[str, int], tokenizer: Tokenizer) -> dict[str, Any]:
    """Ids of special tokens, and which ones the tokenizer puts around a text"""
    found: dict[str, Any] = {}
    for ours, theirs in SPECIAL.items():
        if (i := ids.get(text.special_tokens.get(f"{ours}_token", ""))) is not None:
            found[f"{theirs}_token_id"] = i
    ends = sorted(text.eos_ids - {found.get("eos_token_id")})
    for name in ("eos", "eot", "eom"):
        if f"{name}_token_id" not in found and ends:
            found[f"{name}_token_id"] = ends.pop(0)
    around = tokenizer.encode("a")
    alone = tokenizer.encode("a", add_special_tokens=False)
    found["add_bos_token"] = around[:1] != alone[:1]
    found["add_eos_token"] = around[-1:] != alone[-1:]
    if found["add_bos_token"]:
        found["bos_token_id"] = around[0]
    if found["add_eos_token"]:
        found["eos_token_id"] = around[-1]
    return found


def check_same(values: Mapping[str, Any], tokenizer: Tokenizer, source: str) -> None:
    """Raises CheckpointError where the metadata give other ids for a probe than the tokenizer."""
    again = gguf_tokenizer(values)
    for probe in PROBES:
        ours, theirs = tokenizer.encode(probe), again.encode(probe).ids
        if ours != theirs:
            at = next((i for i, (a, b) in enumerate(zip(ours, theirs)) if a != b), len(ours))
            raise CheckpointError(
                f"{source}: GGUF cannot hold this vocabulary; it would give {theirs[at : at + 3]} "
                f"in place of {ours[at : at + 3]} at token {at} of {excerpt(probe)}"
            )


def template_values(templates: Mapping[str, str]) -> dict[str, Any]:
    """Chat templates: the default one, and others by their names"""
    found: dict[str, Any] = {}
    for name, source in templates.items():
        suffix = "" if name == "default" else f".{name}"
        found[f"tokenizer.chat_template{suffix}"] = source
    if others := [name for name in templates if name != "default"]:
        found["tokenizer.chat_templates"] = others
    return found
