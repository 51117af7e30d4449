"""Section 8: ids equal to Hugging Face's and SentencePiece's, decoding, streaming, stop strings."""

from __future__ import annotations

import contextlib
import json
import random
import time
import unicodedata
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

import nanollama
from nanollama import CheckpointError, RequestError, TextFiles, TextStream, Tokenizer
from nanollama_extras.answers.grammars import all_bytes

DATA = Path(__file__).parent / "data"

STRINGS = [
    "",
    " ",
    "The quick brown fox can't, won't, I'LL, she'd; THEY'RE don’t it's",
    "Привет, мир! Съешь ещё этих мягких французских булок, да выпей чаю.",
    "你好，世界。今天天气很好，我们去公园散步吧！",
    "こんにちは、世界。カタカナとひらがな漢字 ｶﾀｶﾅ",
    "안녕하세요 세계! 한국어 문장입니다.",
    "مرحبا بالعالم، كيف حالك؟ ١٢٣ שלום עולם",
    "नमस्ते दुनिया, यह एक वाक्य है। สวัสดีชาวโลก",
    "Xin chào thế giới, Việt Nam; Ça va? naïve café résumé Ångström ﬁ ﬂ",
    "cafe\u0301 e\u0301 A\u030a \u1e9b\u0323 \u212b \u2126 \u0344",
    "😀😃 👨‍👩‍👧‍👦 🏳️‍🌈 🇫🇷🇩🇪 👍🏽 ☺️",
    "   leading and   multiple   spaces   ",
    "\t\ttabs\tand\n\n\nnewlines\r\n\r\nmixed \n \n  \r",
    "def f(x):\n    return x**2 + 1  # comment\n\n\tif x != 0:\n\t\tpass",
    "1234567890 3.14159 1,000,000 ４５６ ½ ² Ⅷ 2026-01-31T12:00",
    "\x00\x01\x02\x1b[31m\x7f\x85\xa0\u2028\u2029\u200b\u200d\ufeff\ufffd",
    "<|im_start|>user\nhi<|im_end|> <s> </s> <unk> <|endoftext|> <|eot_id|> [INST]",
    "<0x0A> <0xE2> ▁▁ ▁a Ġ Ċ ĠĠ <|im_start <|im_ end|>",
    "!@#$%^&*()_+-=[]{}|;':\",./<>?`~ .\n..\n ...\n\n !\n\n?",
    "http://example.com/path?query=1&b=2#frag user@mail.com",
    "a\u00a0b\u3000c\u2003d\u1680e 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𐍈 𠮷野家 \U0010ffff \ue000",
    "ǅ ǈ ʰʱ ﷽ ꙮ ߷ ᏣᎳᎩ ሰላም ᚠᚢᚦ 'S 'T 'ſ K 's't're",
    "camelCase snake_case kebab-case HTTPServer2Go iPhone15ProMax",
    *(random.Random(i).randbytes(40).decode("utf-8", errors="replace") for i in range(20)),
]


# ---- GGUF metadata against the tokenizer it was made from ----------------------------------------


def gguf_metadata(tokenizer: tokenizers.Tokenizer, pre: str) -> dict[str, Any]:
    """What a converter writes into a GGUF file for a byte-level tokenizer."""
    described = json.loads(tokenizer.to_str())
    special = {token["id"]: token["special"] for token in described["added_tokens"]}
    vocab = {**described["model"]["vocab"]}
    vocab |= {token["content"]: token["id"] for token in described["added_tokens"]}
    names = {i: token for token, i in vocab.items()}
    kinds = {None: nanollama.TOKEN_NORMAL, True: nanollama.TOKEN_CONTROL}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": [names[i] for i in range(len(names))],
        "tokenizer.ggml.token_type": [
            kinds.get(special.get(i), nanollama.TOKEN_USER_DEFINED) for i in range(len(names))
        ],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in described["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }


def trained(parts: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """A small BPE trained on STRINGS, with a published normalizer, pre-tokenizer and decoder."""
    shell = json.loads(tokenizers.Tokenizer(models.BPE()).to_str())
    shell |= {name: parts[name] for name in ("normalizer", "pre_tokenizer", "decoder")}
    shell["model"]["ignore_merges"] = parts["ignore_merges"]
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(shell))
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<s>", "</s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(STRINGS * 3, trainer)
    with_word = json.loads(tokenizer.to_str())  # a word that no merge leads to
    with_word["model"]["vocab"]["Ġboulevard"] = tokenizer.get_vocab_size()
    tokenizer = tokenizers.Tokenizer.from_str(json.dumps(with_word))
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False, special=False)])
    return tokenizer


PUBLISHED = json.loads((DATA / "pre_tokenizers.json").read_text(encoding="utf-8"))


def check_published_pre_tokenizer(pre: str) -> None:
    theirs = trained(PUBLISHED[pre])
    ours = Tokenizer(TextFiles("memory", gguf=gguf_metadata(theirs, pre)))
    texts = [*STRINGS, *(a + b for a, b in zip(STRINGS, reversed(STRINGS)))]
    texts += ["call <tool_call>x</tool_call> <|im_end|>", "the boulevard"]
    for text in texts:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False) == expected, text
        assert ours.decode(expected) == theirs.decode(expected), text


@pytest.mark.parametrize("pre", sorted(PUBLISHED.keys() & nanollama.PRE_TOKENIZERS))
def test_ids_from_gguf_metadata_equal_those_of_the_published_pre_tokenizer(pre: str) -> None:
    check_published_pre_tokenizer(pre)


def test_a_byte_level_vocabulary_stays_one_with_another_decoder(tmp_path: Path) -> None:
    """Mistral's conversions of tekken have SentencePiece's decoder, which leaves bytes spelled."""
    tokenizer = trained(PUBLISHED["llama-bpe"])
    space = decoders.Strip(" ", 1, 0)
    replace = decoders.Replace("\u2581", " ")
    tokenizer.decoder = decoders.Sequence(
        [replace, decoders.ByteFallback(), decoders.Fuse(), space]
    )
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer(TextFiles("memory", tokenizer_file=tmp_path / "tokenizer.json"))
    for text in STRINGS:
        assert ours.decode(ours.encode(text, parse_special=False)) == text


def smollm2_as_published(path: Path) -> tokenizers.Tokenizer:
    """SmolLM2's tokenizer as its tokenizer.json describes it: digits one by one, then GPT-2's own
    splitting. Only vocabulary and merges come from the GGUF file."""
    metadata = nanollama.read_gguf(path)[0]
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = tokenizers.Tokenizer(
        models.BPE({token: i for i, token in enumerate(tokens)}, merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True) for t in tokens[:17]])
    return tokenizer


@pytest.fixture(scope="module")
def published(smollm2: Path) -> tokenizers.Tokenizer:
    return smollm2_as_published(smollm2)


@pytest.fixture(scope="module")
def tokenizer(smollm2: Path) -> Tokenizer:
    return Tokenizer(nanollama.open_text(smollm2))


def test_smollm2_ids_equal_hugging_faces(
    tokenizer: Tokenizer, published: tokenizers.Tokenizer
) -> None:
    for parse_special in (True, False):
        published.encode_special_tokens = not parse_special
        for text in STRINGS:
            expected = published.encode(text).ids
            assert tokenizer.encode(text, parse_special=parse_special) == expected, text


def spellable(tokenizer: Tokenizer, text: str) -> bool:
    """Whether the vocabulary has all bytes of the text: SmolLM2's lacks some control characters."""
    there = b"".join(map(tokenizer.token_bytes, range(600)))
    return set(text.encode()) <= set(there)


def test_smollm2_ids_equal_hugging_faces_on_any_text(
    tokenizer: Tokenizer, published: tokenizers.Tokenizer
) -> None:
    published.encode_special_tokens = False

    @settings(max_examples=300, deadline=None)
    @given(st.text())
    def check(text: str) -> None:
        ids = tokenizer.encode(text)
        assert ids == published.encode(text).ids
        if spellable(tokenizer, text):
            assert tokenizer.decode(ids) == text

    check()


def test_token_bytes_joined_are_hugging_faces_decode(
    tokenizer: Tokenizer, published: tokenizers.Tokenizer
) -> None:
    ids = list(range(tokenizer.num_tokens))
    assert tokenizer.num_tokens == 49152
    assert [tokenizer.decode([i]) for i in ids] == [published.decode([i]) for i in ids]
    rng = random.Random(0)
    for _ in range(300):  # any order of tokens: bytes that are no UTF-8, control tokens between
        some = [rng.choice(ids[:400] if rng.random() < 0.7 else ids) for _ in range(12)]
        assert tokenizer.decode(some) == published.decode(some)


def test_the_bytes_of_all_tokens_are_those_of_each(tokenizer: Tokenizer, spm: Any) -> None:
    for own in (tokenizer, spm[1]):
        num = own.num_tokens + 3  # rows of the model beyond the vocabulary
        assert all_bytes(own, num) == [own.token_bytes(i) for i in range(num)]


def test_a_tokenizer_file_gives_the_ids_of_autotokenizer(tiny: Any) -> None:
    directory = tiny("Llama")
    ours = Tokenizer(nanollama.open_text(directory))
    theirs = transformers.AutoTokenizer.from_pretrained(directory)
    for text in STRINGS:
        assert ours.encode(text) == theirs(text).input_ids
        ids = theirs(text).input_ids
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)


def test_truncation_and_padding_of_a_tokenizer_file_are_switched_off(tmp_path: Path) -> None:
    theirs = trained(PUBLISHED["gpt-2"])
    theirs.enable_truncation(3)
    theirs.enable_padding(length=64)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer(TextFiles("memory", tmp_path / "tokenizer.json"))
    text = "the quick brown fox jumps over the lazy dog"
    assert ours.decode(ours.encode(text)) == text


# ---- SentencePiece -------------------------------------------------------------------------------


BYTE = 6  # tokenizer.ggml.token_type


def gguf_of_sentencepiece(theirs: Any, add_space_prefix: bool) -> dict[str, Any]:
    """What a converter writes into a GGUF file for a SentencePiece model."""
    kinds = {
        nanollama.TOKEN_UNKNOWN: theirs.is_unknown,
        nanollama.TOKEN_CONTROL: theirs.is_control,
        BYTE: theirs.is_byte,
        nanollama.TOKEN_USER_DEFINED: lambda i: theirs.id_to_piece(i) == "<tool>",
        nanollama.TOKEN_NORMAL: lambda i: True,
    }

    def kind_of(token_id: int) -> int:
        return next(kind for kind, is_it in kinds.items() if is_it(token_id))

    ids = range(theirs.vocab_size())
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [theirs.id_to_piece(i) for i in ids],
        "tokenizer.ggml.scores": [theirs.get_score(i) for i in ids],
        "tokenizer.ggml.token_type": [kind_of(i) for i in ids],
        "tokenizer.ggml.add_space_prefix": add_space_prefix,
    }


@pytest.fixture(scope="module", params=[True, False], ids=["prefix", "no_prefix"])
def spm(request: Any, tmp_path_factory: Any) -> tuple[Any, Tokenizer]:
    """A SentencePiece BPE model, and our tokenizer made from the metadata of its GGUF file."""
    directory = tmp_path_factory.mktemp("spm")
    (directory / "text").write_text("\n".join(STRINGS * 3).replace("\0", ""), encoding="utf-8")
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"),
        model_prefix=str(directory / "m"),
        model_type="bpe",
        vocab_size=900,
        byte_fallback=True,
        character_coverage=0.98,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        add_dummy_prefix=request.param,
        user_defined_symbols=["<tool>"],
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(directory / "m.model"))
    metadata = gguf_of_sentencepiece(theirs, add_space_prefix=request.param)
    return theirs, Tokenizer(TextFiles("memory", gguf=metadata))


def test_ids_equal_sentencepieces(spm: tuple[Any, Tokenizer]) -> None:
    theirs, ours = spm
    texts = [*STRINGS, *(a + b for a, b in zip(STRINGS, reversed(STRINGS))), "Ωmega 𓀀 unseen"]
    for text in texts:
        ids = theirs.encode(text)
        assert ours.encode(text, add_special_tokens=False, parse_special=False) == ids, text
        assert ours.encode(text, parse_special=False) == [theirs.bos_id(), *ids]
        assert ours.decode(ids) == theirs.decode(ids)


def test_merges_apply_by_score_whatever_the_order_of_ids(spm: tuple[Any, Tokenizer]) -> None:
    theirs, _ = spm
    metadata = gguf_of_sentencepiece(theirs, add_space_prefix=True)
    order = list(range(theirs.vocab_size()))
    random.Random(0).shuffle(order)  # new id -> old id
    for key in ("tokens", "scores", "token_type"):
        name = f"tokenizer.ggml.{key}"
        metadata[name] = [metadata[name][old] for old in order]
    metadata["tokenizer.ggml.bos_token_id"] = order.index(theirs.bos_id())
    shuffled = Tokenizer(TextFiles("memory", gguf=metadata))
    plain = Tokenizer(TextFiles("memory", gguf=gguf_of_sentencepiece(theirs, True)))
    for text in STRINGS:
        assert [order[i] for i in shuffled.encode(text, parse_special=False)] == plain.encode(
            text, parse_special=False
        )


def test_an_answer_streams_as_decode_gives_it_and_a_continuation_keeps_its_space(
    spm: tuple[Any, Tokenizer],
) -> None:
    theirs, ours = spm
    ids = theirs.encode("Việt Nam 😀 ok")
    assert streamed(TextStream(ours), ids) == ours.decode(ids) == "Việt Nam 😀 ok"
    prefix = " " if ours.strips_space else ""
    assert streamed(TextStream(ours, continues=True), ids) == prefix + "Việt Nam 😀 ok"


@pytest.mark.parametrize("scheme", ["always", "first", "never"])
def test_a_metaspace_tokenizer_decodes_as_hugging_faces(scheme: str, tmp_path: Path) -> None:
    theirs = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    theirs.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    theirs.decoder = decoders.Metaspace(prepend_scheme=scheme)
    trainer = trainers.BpeTrainer(special_tokens=["<unk>", "<s>"], show_progress=False)
    theirs.train_from_iterator(STRINGS, trainer)
    theirs.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer(TextFiles("memory", tmp_path / "tokenizer.json"))
    for text in STRINGS:
        ids = theirs.encode(text).ids
        assert ours.encode(text) == ids
        assert ours.decode(ids) == theirs.decode(ids)


# ---- special tokens, odd vocabularies ------------------------------------------------------------


def test_bos_is_added_where_the_file_or_the_vocabularys_custom_says_so() -> None:
    plain = trained(PUBLISHED["gpt-2"])
    for pre, add_bos, expected in (
        ("gpt-2", None, False),
        ("llama-bpe", None, True),
        ("llama-bpe", False, False),
        ("gpt-2", True, True),
    ):
        metadata = gguf_metadata(plain, pre) | {"tokenizer.ggml.add_bos_token": add_bos}
        if add_bos is None:
            del metadata["tokenizer.ggml.add_bos_token"]
        ours = Tokenizer(TextFiles("memory", gguf=metadata))
        assert (ours.encode("hi")[0] == 0) is expected
        assert ours.encode("hi", add_special_tokens=False)[0] != 0


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("eos", [False, True, None])
def test_a_gguf_vocabulary_puts_around_a_text_what_its_tokenizer_json_puts(
    tmp_path: Path, bos: bool, eos: bool | None
) -> None:
    theirs = trained(PUBLISHED["gpt-2"])
    theirs.post_processor = processors.TemplateProcessing(
        single=["<s>"] * bos + ["$A"] + ["</s>"] * bool(eos),
        special_tokens=[("<s>", 0), ("</s>", 1)],
    )
    theirs.save(str(tmp_path / "tokenizer.json"))
    metadata = gguf_metadata(theirs, "gpt-2") | {"tokenizer.ggml.add_bos_token": bos}
    metadata |= {"tokenizer.ggml.eos_token_id": 1, "tokenizer.ggml.add_sep_token": False}
    if eos is not None:
        metadata["tokenizer.ggml.add_eos_token"] = eos
    ours = Tokenizer(TextFiles("memory", gguf=metadata))
    hf = Tokenizer(TextFiles("memory", tmp_path / "tokenizer.json"))
    for text in STRINGS:
        assert ours.encode(text) == hf.encode(text) == theirs.encode(text).ids
        plain = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text, add_special_tokens=False) == plain


def test_every_end_of_generation_token_counts_as_the_end(tokenizer: Tokenizer) -> None:
    ends = {tokenizer.control[name] for name in ("<|endoftext|>", "<|im_end|>")}
    assert tokenizer.end_ids == ends


def test_only_control_tokens_end_a_generation_by_name() -> None:
    metadata = gguf_metadata(trained(PUBLISHED["gpt-2"]), "gpt-2")
    metadata["tokenizer.ggml.token_type"][1] = nanollama.TOKEN_USER_DEFINED  # </s> as plain text
    ours = Tokenizer(TextFiles("memory", gguf=metadata, eos_ids=frozenset({7})))
    assert ours.end_ids == {7, ours.control["<|im_end|>"]}


def test_repeated_and_empty_pieces_keep_the_first_id() -> None:
    metadata = gguf_metadata(trained(PUBLISHED["gpt-2"]), "gpt-2")
    tokens = metadata["tokenizer.ggml.tokens"]
    num_tokens = len(tokens)
    tokens += ["a", "", ""]
    ours = Tokenizer(TextFiles("memory", gguf=metadata))
    assert ours.encode("a") == [tokens.index("a")]
    assert ours.num_tokens == num_tokens + 3


def test_repeated_and_added_pieces_are_written_as_their_text() -> None:
    metadata = gguf_metadata(trained(PUBLISHED["gpt-2"]), "gpt-2")
    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    pieces = ["a", "Ġa", "", "", "ö", "▁", "Ü ö"]  # the last three as in deepseek-coder's files
    ids = range(len(tokens), len(tokens) + len(pieces))
    tokens += pieces
    types += [nanollama.TOKEN_NORMAL] * 4 + [nanollama.TOKEN_USER_DEFINED] * 3
    ours = Tokenizer(TextFiles("memory", gguf=metadata))
    assert [ours.decode([i]) for i in ids] == ["a", " a", "", "", "ö", "▁", "Ü ö"]
    assert [ours.piece(i) for i in ids] == pieces
    written = [ours.token_bytes(i) for i in range(ours.num_tokens)]
    assert all_bytes(ours, ours.num_tokens) == written
    assert ours.encode("xÜ öy")[1:-1] == [ids[-1]]
    assert streamed(TextStream(ours), [*ids]) == "a aö▁Ü ö"


def test_a_vocabulary_without_a_pre_tokenizer_is_split_as_by_default_with_one_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    metadata = gguf_metadata(trained(PUBLISHED["gpt-2"]), "gpt-2")
    default = {**metadata, "tokenizer.ggml.pre": "default"}
    del metadata["tokenizer.ggml.pre"]
    nanollama.warn_once.cache_clear()
    for _ in range(2):
        ours = Tokenizer(TextFiles("memory", gguf=metadata))
    assert ["tokenizer.ggml.pre" in line for line in caplog.messages] == [True]
    named = Tokenizer(TextFiles("memory", gguf=default))
    assert [ours.encode(text) for text in STRINGS] == [named.encode(text) for text in STRINGS]


def test_templates_get_the_whole_map_of_special_tokens(tmp_path: Path) -> None:
    values: dict[str, Any] = {
        f"{name}_token": f"<{name}>" for name in ("bos", "eos", "unk", "sep", "pad", "cls")
    }
    values["mask_token"] = {"content": "<mask>", "__type": "AddedToken"}
    values["extra_special_tokens"] = {"image_token": "<image>"}
    trained(PUBLISHED["gpt-2"]).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path).special_tokens_map
    found = nanollama.open_text(tmp_path).special_tokens
    assert found == {name: str(token) for name, token in theirs.items()}
    (tmp_path / "tokenizer_config.json").rename(tmp_path / "special_tokens_map.json")
    del found["image_token"]
    assert nanollama.open_text(tmp_path).special_tokens == found


def test_a_ggufs_other_special_tokens_are_found() -> None:
    metadata = gguf_metadata(trained(PUBLISHED["gpt-2"]), "gpt-2")
    for i, name in enumerate(("cls", "mask", "seperator"), 5):
        metadata[f"tokenizer.ggml.{name}_token_id"] = i
    found = nanollama._gguf_text(metadata, "x").special_tokens
    names = ("cls_token", "mask_token", "sep_token")
    assert [found[name] for name in names] == metadata["tokenizer.ggml.tokens"][5:8]


def test_ids_that_do_not_exist_stand_for_nothing(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([-1, 10**6, 2**40, 10**30]) == ""


def test_a_long_text_has_the_same_ids_and_lets_other_threads_run(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "The quick fox <|im_end|> said: 1234! " * 10_000
    with ThreadPoolExecutor() as threads:
        for parse_special in (True, False):
            encoding = threads.submit(tokenizer.encode, text, parse_special=parse_special)
            num_turns = 0
            while not encoding.done():
                num_turns += 1
                time.sleep(0.001)
            assert num_turns > 10
            with monkeypatch.context() as patch:
                patch.setattr(nanollama, "LONG_TEXT", 10**9)
                assert tokenizer.encode(text, parse_special=parse_special) == encoding.result()


def test_a_lone_surrogate_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(RequestError, match="surrogate"):
        tokenizer.encode("a\ud800b")


ODD_VALUES = [None, 0, -1, 2**70, 1.5, "x", "", [], [1], ["a b"], [None], [[]], {}, True]


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_damaged_metadata_is_a_checkpoint_error_or_harmless(kind: str) -> None:
    whole = gguf_metadata(trained(PUBLISHED["gpt-2"]), "gpt-2")
    whole |= {"tokenizer.ggml.model": kind, "tokenizer.ggml.scores": [0.0] * 5000}
    for key in whole:
        for value in ODD_VALUES:
            with contextlib.suppress(CheckpointError):
                Tokenizer(TextFiles("some.gguf", gguf={**whole, key: value}))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("tokenizer.ggml.model", "rwkv", "'rwkv' is not supported"),
        ("tokenizer.ggml.pre", "martian", "'martian' is not known"),
        ("tokenizer.ggml.bos_token_id", 10**6, "bos_token_id is 1000000 of"),
        ("tokenizer.ggml.eos_token_id", -1, "eos_token_id is -1 of"),
    ],
)
def test_what_a_file_asks_for_and_we_lack_is_named(key: str, value: Any, message: str) -> None:
    metadata = gguf_metadata(trained(PUBLISHED["gpt-2"]), "gpt-2")
    metadata |= {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.add_eos_token": True}
    metadata[key] = value
    with pytest.raises(CheckpointError, match=f"some.gguf: .*{message}") as caught:
        Tokenizer(TextFiles("some.gguf", gguf=metadata))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {}}', "\0\0", "null"])
def test_a_broken_tokenizer_file_is_named(tmp_path: Path, content: str) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(CheckpointError) as caught:
        Tokenizer(TextFiles("memory", path))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_tokenizer_at_all_asks_for_one() -> None:
    with pytest.raises(CheckpointError, match=r"here.*--tokenizer"):
        Tokenizer(TextFiles("here"))


def test_a_tokenizer_file_that_has_gone_is_named(tmp_path: Path) -> None:
    path = tmp_path / "here/tokenizer.json"
    with pytest.raises(CheckpointError, match=r"here/tokenizer\.json: .*No such file"):
        Tokenizer(TextFiles("here", path))


# ---- TextStream ----------------------------------------------------------------------------------


def streamed(stream: TextStream, ids: list[int]) -> str:
    return "".join([*(stream.push(i) for i in ids), stream.flush()])


def test_a_stream_joined_is_decode_for_any_ids(tokenizer: Tokenizer) -> None:
    by_byte = [i for i in range(600) if len(tokenizer.token_bytes(i)) == 1]  # torn characters

    @settings(max_examples=300, deadline=None)
    @given(st.lists(st.one_of(st.sampled_from(by_byte), st.integers(0, 49151)), max_size=30))
    def check(ids: list[int]) -> None:
        assert streamed(TextStream(tokenizer), ids) == tokenizer.decode(ids)

    check()


def test_a_character_is_never_emitted_in_halves(tokenizer: Tokenizer) -> None:
    text = "".join(text for text in STRINGS if spellable(tokenizer, text)).replace("\ufffd", "")
    stream, pieces = TextStream(tokenizer), []
    for token_id in tokenizer.encode(text, parse_special=False):
        pieces.append(stream.push(token_id))
        assert "\ufffd" not in pieces[-1]
        assert text.startswith("".join(pieces))
    assert "".join(pieces) + stream.flush() == text


def test_text_appears_as_soon_as_its_character_is_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("😀!")
    assert len(ids) > 2
    stream = TextStream(tokenizer)
    pieces = [stream.push(i) for i in ids]
    assert pieces[-2:] == ["😀", "!"]
    assert not any(pieces[:-2])


class Chunks:
    """Stands in for a tokenizer: id i is the i-th chunk of bytes."""

    strips_space = False
    control: Mapping[str, int] = {}

    def __init__(self, chunks: list[bytes]) -> None:
        self.chunks = chunks

    def token_bytes(self, token_id: int) -> bytes:
        return self.chunks[token_id]


def cut_at_stop(text: str, stops: list[str]) -> tuple[str, bool]:
    """The plain reference: read character by character until some stop string is complete."""
    for end in range(1, len(text) + 1):
        complete = [stop for stop in stops if text[:end].endswith(stop)]
        if complete:
            return text[: end - max(map(len, complete))], True
    return text, False


@settings(max_examples=500, deadline=None)
@given(
    st.lists(st.text("abé", max_size=4), max_size=8),
    st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
    st.integers(1, 3),
)
def test_stop_strings_cut_exactly_however_the_text_is_chunked(
    texts: list[str], stops: list[str], size: int
) -> None:
    whole = "".join(texts)
    expected, stopped = cut_at_stop(whole, stops)
    raw = whole.encode()
    for chunks in (
        [text.encode() for text in texts],
        [raw[at : at + size] for at in range(0, len(raw), size)],
    ):
        stream = TextStream(Chunks(chunks), stops)  # type: ignore[arg-type]
        emitted = ""
        for i in range(len(chunks)):
            emitted += stream.push(i)
            assert expected.startswith(emitted)
            fed = b"".join(chunks[: i + 1]).decode(errors="ignore")
            if not stream.stopped:  # no more is held back than the start of a stop string
                longest = max((len(stop) for stop in stops), default=1)
                assert len(fed) - len(emitted) < longest
        assert emitted + stream.flush() == expected
        assert stream.stopped is stopped


def test_stop_strings_in_real_text(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("One, two, three 😀 four. END of it")
    assert streamed(TextStream(tokenizer, [" 😀"]), ids) == "One, two, three"
    assert (
        streamed(TextStream(tokenizer, ["five", "END", "four. EN"]), ids) == "One, two, three 😀 "
    )
    assert streamed(TextStream(tokenizer, ["it's"]), ids) == "One, two, three 😀 four. END of it"
    stream = TextStream(tokenizer, ["two"])
    streamed(stream, ids)
    assert stream.stopped
    assert stream.push(ids[0]) == stream.flush() == ""


def test_nothing_is_normalised_on_the_way_through(tokenizer: Tokenizer) -> None:
    for text in ("e\u0301", "\u212b", "ﬁ"):
        assert unicodedata.normalize("NFKC", text) != text
        assert tokenizer.decode(tokenizer.encode(text)) == text
