"""Pieces with scores are merged as the library merges them by its tables."""

from __future__ import annotations

import threading
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import nanollama
from nanollama import TOKEN_CONTROL, TOKEN_NORMAL, TOKEN_UNKNOWN, TOKEN_USER_DEFINED, Tokenizer
from nanollama_extras.files import scored_pieces, vocabularies

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
KINDS = (TOKEN_NORMAL, TOKEN_NORMAL, TOKEN_NORMAL, TOKEN_USER_DEFINED, TOKEN_CONTROL)
PIECES = st.lists(
    st.tuples(
        st.text("ab▁é🙂", min_size=1, max_size=6), st.integers(-3, 3), st.sampled_from(KINDS)
    ),
    unique_by=lambda piece: piece[0],
    max_size=40,
)


def tokenizer_of(pieces: list[tuple[str, int, int]]) -> Tokenizer:
    rows = [("<unk>", 0, TOKEN_UNKNOWN), *((byte, 0, vocabularies.TOKEN_BYTE) for byte in BYTES)]
    tokens, scores, types = zip(*rows, *pieces)
    metadata: dict[str, Any] = {"model": "llama"}
    metadata |= {"tokens": [*tokens], "scores": [*scores], "token_type": [*types]}
    metadata |= {"add_bos_token": False, "unknown_token_id": 0}
    return Tokenizer(nanollama.TextFiles("memory", gguf=metadata))


@given(PIECES, st.lists(st.text("ab ▁é🙂c", max_size=20), max_size=4))
def test_ids_are_those_of_the_librarys_tables(
    pieces: list[tuple[str, int, int]], texts: list[str]
) -> None:
    tokenizer = tokenizer_of(pieces)
    library: Any = tokenizer._tokenizer
    plain: Any = tokenizer._plain

    def ids() -> list[list[int]]:
        asked = [(text, special) for text in texts for special in (True, False)]
        spelled = [tokenizer.spell(text) for text in texts]
        return spelled + [tokenizer.encode(text, parse_special=p) for text, p in asked]

    found = ids()
    assert not library.is_full
    library.complete()
    plain.complete()
    library.model.tokenize = library.model.full.tokenize
    assert found == ids()


@given(PIECES, st.sampled_from(["a", "ab", "new"]))
def test_the_vocabulary_and_added_tokens_are_the_librarys(
    pieces: list[tuple[str, int, int]], text: str
) -> None:
    light, whole = (tokenizer_of(pieces)._tokenizer for _ in range(2))
    whole.complete()  # type: ignore[attr-defined]
    size, ids = light.get_vocab_size(), range(-1, light.get_vocab_size() + 2)
    assert size == whole.get_vocab_size() == len(light.get_vocab())
    assert [light.id_to_token(max(i, 0)) for i in ids] == [
        whole.id_to_token(max(i, 0)) for i in ids
    ]
    light, whole = (tokenizer_of(pieces)._tokenizer for _ in range(2))
    whole.complete()  # type: ignore[attr-defined]
    for tokenizer in (light, whole):  # one that is a piece, or is not
        tokenizer.add_special_tokens([text])
    assert light.get_vocab_size() == whole.get_vocab_size()
    assert light.encode(f"b{text}a").ids == whole.encode(f"b{text}a").ids
    assert light.get_vocab() == whole.get_vocab()
    assert light.decode(list(ids)[1:-2]) == whole.decode(list(ids)[1:-2])


def test_long_texts_and_whole_vocabularies_have_the_librarys_tables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pieces = [("a", 0, TOKEN_NORMAL), ("aa", 1, TOKEN_NORMAL), ("▁", 0, TOKEN_NORMAL)]
    by_length, by_sum, by_name = (tokenizer_of(pieces) for _ in range(3))
    monkeypatch.setattr(scored_pieces, "MOST_CHARACTERS", 50)
    for tokenizer, text in ((by_length, "a" * nanollama.LONG_TEXT), (by_sum, "a" * 30)):
        assert tokenizer.encode(text) == tokenizer.encode(text)
        assert vars(tokenizer._tokenizer)["is_full"]
    assert '"merges"' in by_name._tokenizer.to_str()
    assert by_name.encode("aa") == by_sum.encode("aa") == by_length.encode("aa")


def test_threads_get_the_same_ids_while_the_tables_are_made() -> None:
    tokenizer = tokenizer_of([("a", 0, TOKEN_NORMAL), ("aa", 1, TOKEN_NORMAL)])
    expected, found = tokenizer.encode("a" * 99), list[list[int]]()
    threads = [
        threading.Thread(target=lambda: found.append(tokenizer.encode("a" * 99))) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    tokenizer._tokenizer.to_str()
    for thread in threads:
        thread.join()
    assert found == [expected] * 4
