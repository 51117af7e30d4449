"""Whatever a tekken.json, a tiktoken file or a SentencePiece model holds, it is read or refused in
one line, in memory that its own size accounts for."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import sentencepiece_model_pb2
from test_formats_fuzz import FILES, WORDS, _warm, changed, copy_once, survive

from nanollama_extras.files import vocabularies

__all__ = ["_warm"]  # a fixture


@pytest.mark.parametrize("name", ["tekken.json", "tokenizer.model", "llama.tiktoken"])
def test_any_other_vocabulary_is_used_or_refused(
    tiny: Any, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = copy_once(tiny("Llama"), tmp_path / "model")
    (directory / "tokenizer.json").unlink()
    (directory / "tokenizer_config.json").write_text(json.dumps(FILES["tokenizer_config.json"]))
    monkeypatch.setattr(
        vocabularies,
        "TIKTOKEN",
        {256: ("llama-bpe", ["<s>", "</s>"], "<s>", "</s>"), 1: ("x", [], None, "!")},
    )
    raw = VOCABULARY[name]()

    @settings(max_examples=100)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        damaged = bytearray(raw)
        if data.draw(st.booleans()):
            damaged = DAMAGE[name](raw, data)
        else:
            for _ in range(data.draw(st.integers(1, 2))):
                at = data.draw(st.integers(0, len(raw) - 1))
                damaged[at : at + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
        (directory / name).write_bytes(damaged)
        survive(directory, len(raw) + 200_000)

    check()


def tekken() -> bytes:
    vocab = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode()} for i in range(256)]
    config = {"pattern": r"\s+|\S+", "default_vocab_size": 266, "default_num_special_tokens": 10}
    control = [{"rank": i, "token_str": name} for i, name in enumerate(vocabularies.TEKKEN[:4])]
    return json.dumps({"config": config, "vocab": vocab, "special_tokens": control}).encode()


def tiktoken() -> bytes:
    return b"".join(b"%s %d\n" % (base64.b64encode(bytes([i])), i) for i in range(256))


def sentencepiece_model() -> bytes:
    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = model.trainer_spec.BPE
    model.normalizer_spec.remove_extra_whitespaces = False
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3), *((f"<0x{i:02X}>", 6) for i in range(256))]
    for i, (piece, kind) in enumerate([*pieces, ("▁", 1), ("a", 1), ("▁a", 1), ("▁▁", 4)]):
        model.pieces.add(piece=piece, type=kind, score=-i)
    return bytes(model.SerializeToString())


def damaged_pieces(raw: bytes, data: st.DataObject) -> bytes:
    model = sentencepiece_model_pb2.ModelProto.FromString(raw)
    for _ in range(data.draw(st.integers(1, 9))):
        piece = model.pieces[data.draw(st.sampled_from([*range(-5, 5)]))]
        piece.piece = data.draw(WORDS | st.text(max_size=3))
        piece.type = data.draw(st.integers(1, 6))
        piece.score = data.draw(st.floats(width=32))
    trained = model.trainer_spec
    trained.bos_id, trained.eos_id, trained.unk_id = data.draw(
        st.tuples(*[st.integers(-1, 300) | st.sampled_from([2**31 - 1, -(2**31)])] * 3)
    )
    trained.model_type = data.draw(st.sampled_from([2, 2, 2, 1, 3, 4]))
    return bytes(model.SerializeToString())


def damaged_lines(raw: bytes, data: st.DataObject) -> bytes:
    lines = data.draw(st.permutations(raw.splitlines()[:5])) + raw.splitlines()[5:]
    lines[data.draw(st.integers(0, 255))] = data.draw(
        st.sampled_from(
            [b"", b"IQ==", b"IQ== -1", b"IQ== 99999999999999999999", b"IQ== 1 1", b"= 1"]
        )
    )
    return b"\n".join(lines)


VOCABULARY = {
    "tekken.json": tekken,
    "tokenizer.model": sentencepiece_model,
    "llama.tiktoken": tiktoken,
}
DAMAGE = {
    "tekken.json": lambda raw, data: json.dumps(changed(json.loads(raw), data)).encode(),
    "tokenizer.model": damaged_pieces,
    "llama.tiktoken": damaged_lines,
}
