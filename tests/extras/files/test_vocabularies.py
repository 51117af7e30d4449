"""SentencePiece models, tiktoken files, tekken.json and nanochat's tokenizer.pkl give the ids of
their publishers' own libraries, and no pickle is run."""

from __future__ import annotations

import base64
import json
import math
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mistral_common.tokens.tokenizers
import nanochat_files as files
import published
import pytest
import sentencepiece
import tiktoken
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from mistral_common.integrations.chat_templates.chat_templates import generate_chat_template
from mistral_common.tokens.tokenizers.base import TokenizerVersion
from mistral_common.tokens.tokenizers.tekken import Tekkenizer
from test_chat import ANSWER, SYSTEM, USER, chat_template, hugging_face
from test_tokenizer import STRINGS, streamed
from test_tokenizer_published import assert_same_tokenizer, texts_for

import nanollama
from nanollama import CheckpointError, TextStream, Tokenizer
from nanollama_extras.files import vocabularies

__all__ = ["hugging_face"]  # a fixture

NORMAL, OWN = nanollama.TOKEN_NORMAL, nanollama.TOKEN_USER_DEFINED
MISTRAL = Path(mistral_common.tokens.tokenizers.__file__).parents[2] / "data"


def tokenizer_of(tmp_path: Path, name: str, content: bytes, **beside: Any) -> Tokenizer:
    """Our tokenizer of a directory with this file, and with JSON files named `beside` it."""
    (tmp_path / name).write_bytes(content)
    for file, value in beside.items():
        (tmp_path / f"{file}.json").write_text(json.dumps(value))
    return Tokenizer(nanollama.open_text(tmp_path))


@pytest.mark.parametrize("file", sorted(path.name for path in MISTRAL.glob("*.model*")))
def test_mistrals_sentencepiece_models_give_sentencepieces_ids(tmp_path: Path, file: str) -> None:
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(MISTRAL / file))
    ours = tokenizer_of(tmp_path, "tokenizer.model", (MISTRAL / file).read_bytes())
    control = [theirs.id_to_piece(i) for i in range(20) if theirs.is_control(i)]
    for text in published.strings(STRINGS, control):
        ids = theirs.encode(text)
        assert ours.encode(text, parse_special=False) == [1, *ids], text
        assert streamed(TextStream(ours), ids) == ours.decode(ids) == theirs.decode(ids)
    assert ours.text.special_tokens == {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    assert ours.end_ids == {theirs.eos_id()}


@pytest.mark.node
def test_a_sentencepiece_model_gives_the_ids_of_the_tokenizer_json_made_from_it(
    tmp_path: Path,
) -> None:
    directory = published.npm_tokenizer("llama2")
    theirs = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    ours = tokenizer_of(tmp_path, "tokenizer.model", (MISTRAL / "tokenizer.model.v1").read_bytes())
    assert_same_tokenizer(ours, theirs, texts := texts_for(theirs), texts)


@pytest.mark.parametrize("file", sorted(path.name for path in MISTRAL.glob("tekken*")))
def test_mistrals_tekken_files_give_the_ids_of_mistral_common(tmp_path: Path, file: str) -> None:
    theirs = Tekkenizer.from_file(MISTRAL / file)
    ours = tokenizer_of(tmp_path, "tekken.json", (MISTRAL / file).read_bytes())
    control = [theirs.id_to_piece(i) for i in range(40)]
    assert [ours.piece(i) for i in range(40)] == control
    assert ours.control.keys() >= set(control)
    for text in published.strings(STRINGS, control):
        ids = theirs.encode(text, bos=True, eos=False)
        assert ours.encode(text, parse_special=False) == ids, text
        assert ours.decode(ids) == theirs.decode(ids)
        assert streamed(TextStream(ours), ids) == text
    assert ours.text.special_tokens["bos_token"] == "<s>"
    assert ours.end_ids == {2}


def test_no_vocabulary_file_is_said_to_lack_what_gguf_files_have(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    nanollama.warn_once.cache_clear()
    for name, file in (("tekken.json", "tekken*"), ("tokenizer.model", "*.v1")):
        directory = tmp_path / file[-2:]
        directory.mkdir()
        tokenizer_of(directory, name, next(MISTRAL.glob(file)).read_bytes())
    files.save_tokenizer(tmp_path)
    Tokenizer(nanollama.open_text(tmp_path / "tokenizer"))
    assert caplog.messages == []


@pytest.mark.node
@pytest.mark.parametrize(
    ("name", "file", "eos"),
    [("llama3_1", "tokenizer.model", "<|eot_id|>"), ("qwen2_5", "qwen.tiktoken", "<|im_end|>")],
)
def test_tiktoken_files_give_the_ids_of_tiktoken_and_hugging_face(
    tmp_path: Path, name: str, file: str, eos: str
) -> None:
    directory = published.npm_tokenizer(name)
    theirs = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    model = json.loads((directory / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    alphabet = nanollama.byte_alphabet()
    ranks = {bytes(alphabet[c] for c in piece): i for piece, i in model["vocab"].items()}
    lines = [b"%s %d\n" % (base64.b64encode(piece), i) for piece, i in ranks.items()]
    ours = tokenizer_of(tmp_path, file, b"".join(lines))
    control = {piece: i for piece, i in ours.control.items() if i >= len(ranks)}
    pre, named, bos, _ = vocabularies.TIKTOKEN[len(ranks)]
    reference = tiktoken.Encoding(
        name,
        pat_str=nanollama.PRE_TOKENIZERS[pre].patterns[0],
        mergeable_ranks=ranks,
        special_tokens={token: len(ranks) + i for i, token in enumerate(named)},
    )
    normalize = theirs.normalizer.normalize_str if theirs.normalizer else str
    same = {token for token, i in control.items() if theirs.token_to_id(token) == i}
    assert {eos, "<|im_start|>" if bos is None else "<|start_header_id|>"} <= same
    for text in published.strings(STRINGS, sorted(same)):
        ids = reference.encode(normalize(text), allowed_special="all")
        assert ours.encode(text, add_special_tokens=False) == ids, text
        if not any(token in text for token in control.keys() ^ same):
            assert theirs.encode(text, add_special_tokens=False).ids == ids, text
        assert ours.decode(ours.encode(text, False, False)) == normalize(text)
    assert ours.encode("a") == ([ours.control[bos]] if bos else []) + ours.encode("a", False)
    assert ours.text.special_tokens["eos_token"] == eos
    assert ours.control[eos] in ours.end_ids


TOKENIZER_CONFIG = {
    "add_bos_token": False,
    "bos_token": "<s>",
    "eos_token": {"content": "<|done|>"},
    "added_tokens_decoder": {
        "2": {"content": "</s>", "special": True},
        "32000": {"content": "<|user|>", "special": True, "rstrip": True},
        "32003": {"content": "<|done|>", "special": True},
    },
}


def test_the_files_beside_a_vocabulary_add_tokens_to_it(tmp_path: Path) -> None:
    raw = (MISTRAL / "tokenizer.model.v1").read_bytes()
    added = {"<tool>": 32001, "<|user|>": 32000}
    ours = tokenizer_of(
        tmp_path, "tokenizer.model", raw, tokenizer_config=TOKENIZER_CONFIG, added_tokens=added
    )
    plain = tokenizer_of(tmp_path / "..", "tokenizer.model", raw)
    hi, tool = plain.encode("hi", False), ours.encode("<tool>")
    assert ours.encode("<|user|>  \nhi<|done|>") == [32000, *hi, 32003]
    assert tool == [32001]
    assert ours.decode([32000, *tool, *hi, 32003]) == "<tool> hi"
    assert ours.end_ids == {2, 32003}
    assert ours.text.special_tokens["eos_token"] == "<|done|>"


@pytest.mark.parametrize("legacy", [True, False])
def test_spaces_after_a_control_token_are_as_in_transformers(tmp_path: Path, legacy: bool) -> None:
    raw = (MISTRAL / "tokenizer.model.v1").read_bytes()
    ours = tokenizer_of(tmp_path, "tokenizer.model", raw, tokenizer_config={"legacy": legacy})
    wanted = "▁." if legacy else "."
    assert [ours.piece(i) for i in ours.encode("</s>.")] == ["<s>", "</s>", wanted]
    assert [ours.piece(i) for i in ours.encode(".")] == ["<s>", "▁."]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.model", b"", "the file holds no vocabulary"),
        ("tokenizer.model", b"\n\xff\xff\xff\x7f", "DecodeError"),
        ("tokenizer.model", b"IQ== 0\nIg== 1\n", "tiktoken file of 2 tokens is not known"),
        ("a.tiktoken", b"IQ== 0\nIQ== x\n", "ValueError"),
        ("tekken.json", b"{}", "KeyError"),
        ("tekken.json", b"[]", "a JSON object is needed"),
        (
            "tekken.json",
            b'{"config": {"default_num_special_tokens": 999999999, "default_vocab_size": 1}, '
            b'"vocab": []}',
            "999999999 control tokens",
        ),
    ],
)
def test_a_broken_vocabulary_is_named_in_one_line(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        tokenizer_of(tmp_path, name, content)
    assert str(tmp_path / name) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model_type": "unigram"}, "of the kind UNIGRAM are not supported; BPE is"),
        ({"model_type": "bpe"}, r"normalises text \(nmt_nfkc\)"),
        (
            {"model_type": "bpe", "normalization_rule_name": "identity"},
            r"normalises text \(identity",
        ),
    ],
)
def test_what_a_sentencepiece_model_asks_for_and_we_lack_is_named(
    tmp_path: Path, options: dict[str, str], message: str
) -> None:
    (tmp_path / "text").write_text("\n".join(STRINGS * 3).replace("\0", ""), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=700,
        hard_vocab_limit=options["model_type"] == "bpe",
        minloglevel=2,
        **options,
    )
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(nanollama.open_text(tmp_path))


def test_without_sentencepiece_its_models_ask_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = nanollama.LazyModule("not_there", install='pip install ".[sentencepiece]"')
    monkeypatch.setattr(vocabularies, "sentencepiece_model", absent)
    with pytest.raises(nanollama.PackageError, match=r"not_there .*sentencepiece"):
        tokenizer_of(tmp_path, "tokenizer.model", (MISTRAL / "tokenizer.model.v1").read_bytes())


# ---- scores --------------------------------------------------------------------------------------


@given(
    st.lists(
        st.tuples(
            st.text("ab▁é🙂", min_size=1, max_size=6),
            st.integers(-3, 3),
            st.sampled_from((NORMAL, NORMAL, NORMAL, OWN, nanollama.TOKEN_CONTROL)),
        ),
        unique_by=lambda piece: piece[0],
        max_size=60,
    )
)
def test_merges_of_scores_are_all_ways_to_split_a_piece_best_score_first(
    pieces: list[tuple[str, int, int]],
) -> None:
    vocab = {text: i for i, (text, _, _) in enumerate(pieces)}
    merged = {text: row for text, *row in pieces if row[1] in (NORMAL, OWN)}
    expected = sorted(
        (-math.inf if kind == OWN else -score, vocab[text], vocab[text[:cut]], text, cut)
        for text, (score, kind) in merged.items()
        for cut in range(1, len(text))
        if text[:cut] in merged and text[cut:] in merged
    )
    scores, types = [row[1] for row in pieces], [row[2] for row in pieces]
    found = vocabularies.scored_merges(scores, vocab, types)
    assert found == [(text[:cut], text[cut:]) for *_, text, cut in expected]


# ---- nanochat's tokenizer.pkl --------------------------------------------------------------------


def good_state() -> dict[str, Any]:
    return {"name": "rustbpe", "pat_str": "a", "mergeable_ranks": {b"a": 0}, "special_tokens": {}}


@pytest.mark.parametrize(
    "value",
    [
        {},
        [],
        "text",
        {**good_state(), "mergeable_ranks": {"a": 0}},
        {**good_state(), "mergeable_ranks": {b"a": "0"}},
        {**good_state(), "special_tokens": {b"a": 1}},
        {**good_state(), "pat_str": b"a"},
        set(),
        len,
    ],
    ids=repr,
)
def test_other_pickles_are_refused(value: Any) -> None:
    with pytest.raises(CheckpointError, match="no other pickle is read"):
        vocabularies.read_encoding(pickle.dumps(value))


@pytest.mark.filterwarnings("ignore:invalid escape sequence:DeprecationWarning")
def test_a_damaged_pickle_is_one_error() -> None:
    whole = pickle.dumps(files.ENCODING)
    assert vocabularies.read_encoding(whole)["pat_str"] == files.PATTERN
    pick, errors = random.Random(0), []
    for _ in range(1500):
        raw = bytearray(whole)
        for _ in range(pick.randint(1, 3)):
            raw[pick.randrange(min(len(raw), pick.choice((60, len(raw)))))] = pick.randrange(256)
        raw = raw[: pick.choice((len(raw), pick.randrange(len(raw))))]
        try:
            vocabularies.read_encoding(bytes(raw))
        except CheckpointError as error:
            errors.append(str(error))
    assert len(errors) > 1000
    assert not any("\n" in error for error in errors)


def test_tokens_are_tiktokens(tmp_path: Path) -> None:
    files.save_tokenizer(tmp_path)
    tokenizer = Tokenizer(nanollama.open_text(tmp_path / "tokenizer"))
    pick, bos = random.Random(1), files.NUM_RANKS
    pieces = (
        "the |then| in| 12345|'ll|don't|\n|\r\n\n| \t |é|日本|😀|!?!|<|bos|>|<|user_end|>".split(
            "|"
        )
    )
    for _ in range(500):
        text = "".join(pick.choices(pieces, k=pick.randint(1, 12))) + chr(pick.randrange(32, 9999))
        expected = files.ENCODING.encode_ordinary(text)
        assert tokenizer.encode(text, False, parse_special=False) == expected
        assert tokenizer.encode(text, parse_special=False) == [bos, *expected]
        assert tokenizer.decode(expected) == text
    assert tokenizer.end_ids == {bos, bos + files.CONTROL.index("<|assistant_end|>")}


# ---- Mistral's template --------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v3", "v7", "v11", "v13"])
def test_a_directory_with_mistrals_vocabulary_and_no_template_has_mistrals(
    version: str, tmp_path: Path, hugging_face: Callable[..., str]
) -> None:
    (tmp_path / "tekken.json").write_text(json.dumps({"config": {"version": version}}))
    ours = nanollama.ChatTemplate(nanollama.open_text(tmp_path))
    ours.special_tokens = chat_template("").special_tokens
    theirs = generate_chat_template(
        False, TokenizerVersion(version), False, False, False, None, False, True, None, None, None
    )
    for messages in (
        [USER],
        [SYSTEM, USER],
        [SYSTEM, USER, ANSWER, USER],
        [SYSTEM, USER, USER, ANSWER, ANSWER, USER],
    ):
        assert ours.render(messages) == hugging_face(theirs, messages)
    (tmp_path / "chat_template.jinja").write_text("mine")
    assert nanollama.open_text(tmp_path).templates == {"default": "mine"}
