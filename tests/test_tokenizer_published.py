"""Section 8: published vocabularies as tokenizer.json and GGUF metadata give the ids of Hugging
Face's library and of llama.cpp."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import published
import pytest
import tokenizers
import transformers
from test_tokenizer import STRINGS, streamed

import nanollama
from nanollama import TextFiles, TextStream, Tokenizer


def texts_for(theirs: tokenizers.Tokenizer) -> list[str]:
    added = theirs.get_added_tokens_decoder().values()
    return published.strings(STRINGS, sorted(token.content for token in added))


def assert_same_tokenizer(
    ours: Tokenizer, theirs: tokenizers.Tokenizer, texts: list[str], plain: list[str]
) -> None:
    """Equal ids, of `plain` without reading control tokens, equal texts, and the way back."""
    for some, parse_special in ((texts, True), (plain, False)):
        theirs.encode_special_tokens = not parse_special
        expected = [e.ids for e in theirs.encode_batch_fast(some, add_special_tokens=False)]
        for text, ids in zip(some, expected):
            assert ours.encode(text, False, parse_special) == ids, text
    normalizer = theirs.normalizer
    for text, ids in zip(plain, expected):
        decoded = ours.decode(ids)
        assert decoded == theirs.decode(ids), text
        assert streamed(TextStream(ours), ids) == decoded
        if ours._byte_fallback:
            normal = text.replace("▁", " ")
        else:
            normal = normalizer.normalize_str(text) if normalizer else text
        assert decoded == normal, text


# Others have the same vocabulary, or the same kind with a smaller one.
ONCE = [name for name in published.NPM if name not in ("llama3_1", "gemma2")]


@pytest.fixture(scope="module", params=ONCE)
def directory(request: Any) -> Path:
    return published.npm_tokenizer(request.param)


def name_of(directory: Path) -> str:
    return directory.name.split("-")[1]


@pytest.fixture(scope="module")
def theirs(directory: Path) -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.no_truncation()
    return tokenizer


@pytest.mark.node
def test_a_published_tokenizer_json_gives_hugging_faces_ids(
    directory: Path, theirs: tokenizers.Tokenizer
) -> None:
    ours = Tokenizer(nanollama.open_text(directory))
    texts = texts_for(theirs)
    assert_same_tokenizer(ours, theirs, texts, texts)
    if name_of(directory) in ("llama2", "yi"):
        return  # transformers 5 does not read the tokenizer.json of Llama's class
    auto = transformers.AutoTokenizer.from_pretrained(directory)
    for text, ids in zip(texts, auto(texts).input_ids):
        assert ours.encode(text) == ids, text


# ---- GGUF ----------------------------------------------------------------------------------------


def looks_special(token: str) -> bool:
    """does_token_look_special of llama.cpp's converter."""
    if token in ("<pad>", "<mask>", "<2mass>", "[@BOS@]"):
        return True
    return bool(re.fullmatch(r"<\|.*\|>|<｜.*｜>|<unused.*>", token, re.DOTALL))


UNUSED, BYTE = 5, 6  # tokenizer.ggml.token_type


def write_gguf(directory: Path, path: Path, pre: str) -> None:
    """What llama.cpp's converter (get_vocab_base, _create_vocab_sentencepiece) writes."""
    described = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))
    model, added = described["model"], described["added_tokens"]
    vocab = {**model["vocab"], **{token["content"]: token["id"] for token in added}}
    size = max(vocab.values()) + 1
    tokens, types = [f"[PAD{i}]" for i in range(size)], [UNUSED] * size
    for token, i in vocab.items():
        is_byte = not pre and re.fullmatch("<0x[0-9A-F]{2}>", token)
        tokens[i], types[i] = token, BYTE if is_byte else nanollama.TOKEN_NORMAL
    for token in added:
        i, control = token["id"], token["special"] or looks_special(token["content"])
        types[i] = nanollama.TOKEN_CONTROL if control else nanollama.TOKEN_USER_DEFINED
        tokens[i] = tokens[i] if control else tokens[i].replace("▁", " ")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("gpt2" if pre else "llama")
    writer.add_tokenizer_pre(pre or "default")
    if not pre:
        rank = {"".join(merge): -i for i, merge in reversed([*enumerate(merges_of(model))])}
        rank |= {token["content"].replace("▁", " "): -1000 for token in added}
        writer.add_token_scores([float(rank.get(token, -1e6)) for token in tokens])
        types[vocab[model["unk_token"]]] = nanollama.TOKEN_UNKNOWN
        writer.add_add_space_prefix("Prepend" in json.dumps(described["normalizer"]))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    gguf.SpecialVocab(directory, load_merges=bool(pre), n_vocab=size).add_to_gguf(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def merges_of(model: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(m.split(" ", 1)) if isinstance(m, str) else tuple(m) for m in model["merges"]]


NOT_IN_GGUF = {"claude"}
COMMON = [
    name
    for name in ONCE
    if name not in NOT_IN_GGUF and published.NPM[name] in ("", *nanollama.PRE_TOKENIZERS)
]


def check_gguf_of_published_tokenizer(name: str, tmp_path: Path) -> None:
    directory, pre = published.npm_tokenizer(name), published.NPM[name]
    theirs = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    theirs.no_truncation()
    write_gguf(directory, tmp_path / "x.gguf", pre)
    metadata = nanollama.read_gguf(tmp_path / "x.gguf")[0]
    ours = Tokenizer(TextFiles("x.gguf", gguf=metadata))
    texts, added = texts_for(theirs), theirs.get_added_tokens_decoder().values()
    # plain tokens that the converter turns into control tokens
    made = [token.content for token in added if looks_special(token.content) and not token.special]
    plain = [text for text in texts if not any(token in text for token in made)]
    assert len(plain) > 450
    assert_same_tokenizer(ours, theirs, texts, plain)
    # llama.cpp's rule: as the file says, or as the vocabulary is used to
    used_to = pre in ("", "llama-bpe", "tekken")
    with_bos = metadata.get("tokenizer.ggml.add_bos_token", used_to)
    expected = [metadata["tokenizer.ggml.bos_token_id"]] if with_bos else []
    assert ours.encode("a") == expected + ours.encode("a", False)


@pytest.mark.node
@pytest.mark.parametrize("name", COMMON)
def test_a_gguf_of_a_published_tokenizer_gives_hugging_faces_ids(name: str, tmp_path: Path) -> None:
    check_gguf_of_published_tokenizer(name, tmp_path)


# ---- llama.cpp's own tests of vocabularies -------------------------------------------------------


def check_vocabulary_of_llama_cpp(name: str) -> None:
    path = published.llama_cpp() / f"ggml-vocab-{name}.gguf"
    metadata = nanollama.read_gguf(path)[0]
    ours = Tokenizer(TextFiles(path.name, gguf=metadata))
    with open(f"{path}.inp", encoding="utf-8", newline="") as file:
        texts = file.read().split("\n__ggml_vocab_test__\n")
    expected = Path(f"{path}.out").read_text().split("\n")
    assert len(texts) > 40
    for text, line in zip(texts, expected):
        if name == "qwen35" and not unicodedata.is_normalized("NFC", text):
            continue  # Hugging Face's tokenizer normalises, llama.cpp does not
        ids = [int(word) for word in line.split()]
        assert ours.encode(text, False, parse_special=False) == ids, text


# its other files have the vocabularies of npm's packages
@pytest.mark.parametrize("name", "gemma-4 llama-spm mpt phi-3 refact starcoder".split())
def test_llama_cpps_vocabulary_files_give_the_ids_that_it_expects(name: str) -> None:
    check_vocabulary_of_llama_cpp(name)


def test_phi_3s_control_tokens_swallow_the_spaces_behind_them() -> None:
    metadata = nanollama.read_gguf(published.llama_cpp() / "ggml-vocab-phi-3.gguf")[0]
    for name in ("Phi-3-mini-4k-instruct", "Phi 3.5 Mini Instruct", "a fine-tune"):
        ours = Tokenizer(TextFiles("x", gguf=metadata | {"general.name": name}))
        tight, loose = (ours.encode(f"<|user|>{gap}hi") for gap in ("", " \n"))
        assert tight == loose
        assert ours.encode("<s> hi") != ours.encode("<s>hi")


def check_splits_and_joins(names: list[str]) -> None:
    assert all(re.fullmatch(r"[a-z0-9._-]+[a-z0-9]", name) for name in names)
    alphabet = list(nanollama.byte_alphabet())
    metadata = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": alphabet}
    ours = Tokenizer(TextFiles("x", gguf=metadata | {"tokenizer.ggml.pre": names[0]}))
    for text in STRINGS:
        is_nfc = nanollama.pre_tokenizer({"pre": names[0]}).is_nfc
        same = unicodedata.normalize("NFC", text) if is_nfc else text
        assert ours.decode(ours.encode(text)) == same


def names_by_patterns(table: Mapping[str, nanollama.PreTokenizer]) -> list[list[str]]:
    rows: dict[nanollama.PreTokenizer, list[str]] = {}
    for name, pre in table.items():
        rows.setdefault(pre, []).append(name)
    return list(rows.values())


@pytest.mark.parametrize("names", names_by_patterns(nanollama.PRE_TOKENIZERS))
def test_every_pre_tokenizer_splits_and_joins(names: list[str]) -> None:
    check_splits_and_joins(names)
