"""Sections 6, 8, 9: whatever a model's files hold, they load or are refused in one line, in memory
that the files' own size accounts for."""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf_files
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_formats import assert_memory_below, header_of, load, with_header

import nanollama
from nanollama import ChatTemplate, NanollamaError, TextStream, Tokenizer

SLACK_BYTES = 2**28  # of address space: threads and the allocator take it in large steps


@contextlib.contextmanager
def little_memory() -> Iterator[None]:
    """Allocations that have nothing to do with a file of a few kilobytes fail."""
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + SLACK_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@contextlib.contextmanager
def refused_in_one_line() -> Iterator[None]:
    """Or not refused at all."""
    message = ""
    try:
        yield
    except NanollamaError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < 1000, message


def use(path: Path) -> None:
    """Everything that is made of a model's files."""
    with refused_in_one_line():
        load(path)
    with refused_in_one_line():
        ChatTemplate(nanollama.open_text(path)).render([{"role": "user", "content": "hi"}])
    with refused_in_one_line():
        write_and_read(Tokenizer(nanollama.open_text(path)))


def write_and_read(tokenizer: Tokenizer) -> None:
    for parse_special in (True, False):
        ids = tokenizer.encode("Hi <s> there▁ 12\n\0é😀", parse_special=parse_special)
    stream = TextStream(tokenizer)
    streamed = "".join(map(stream.push, ids)) + stream.flush()
    assert streamed == tokenizer.decode(ids)
    tokenizer.decode(range(-1, 400))


def survive(path: Path, num_bytes: int) -> None:
    """Use the files, which hold `num_bytes`, with no more memory than these account for."""

    def use_with_little_memory() -> None:
        with little_memory():
            use(path)

    assert_memory_below(40 * num_bytes + 4_000_000, use_with_little_memory)


@pytest.fixture(scope="module", autouse=True)
def _warm(tiny: Any) -> None:
    """What is imported and built once takes its memory before memory is scarce."""
    use(tiny("Llama"))


# ---- GGUF ----------------------------------------------------------------------------------------

NUMBERS = st.sampled_from([0, 1, 2, 3, 32, 255, 2**16, 2**31, 2**32 - 1, 2**63, 2**64 - 1])
WORDS = st.sampled_from(
    ["", " ", "a", "b", "ab", "▁", "▁▁", "  ", "Ġ", "<s>", "<unk>", "<0x0A>", "é", "a b", "\n", "�"]
)
ARRAY = gguf_files.ARRAY


def array(kind: int, items: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.tuples(st.just(ARRAY), st.tuples(st.just(kind), st.lists(items, max_size=40)))


STRINGS = array(gguf_files.STRING, WORDS | st.text(max_size=3))
INTEGERS = array(5, st.integers(-1, 8) | st.sampled_from([2**31 - 1, -(2**31)]))
FLOATS = array(gguf_files.F32, st.floats(width=32))
SCALARS = st.one_of(
    st.tuples(st.just(gguf_files.U32), NUMBERS.filter(lambda n: n < 2**32)),
    st.tuples(st.just(gguf_files.U64), NUMBERS),
    st.tuples(st.just(12), st.floats()),
    st.tuples(st.just(7), st.booleans()),
    st.tuples(st.just(gguf_files.STRING), WORDS | st.text(max_size=8)),
)
ANYTHING = SCALARS | STRINGS | INTEGERS | FLOATS | st.none()
NAMES = st.sampled_from([(gguf_files.STRING, n) for n in ("gpt2", "llama", "gemma4", "bert")])
TOKENIZER = {
    "model": NAMES,
    "tokens": STRINGS,
    "pre": st.tuples(st.just(gguf_files.STRING), st.sampled_from([*nanollama.PRE_TOKENIZERS, "x"])),
    "token_type": INTEGERS,
    "scores": FLOATS,
    "merges": STRINGS,
    "bos_token_id": SCALARS,
    "eos_token_id": SCALARS,
    "unknown_token_id": SCALARS,
    "add_bos_token": SCALARS,
    "add_space_prefix": SCALARS,
    "remove_extra_whitespaces": SCALARS,
    "precompiled_charsmap": array(0, st.integers(0, 255)) | INTEGERS,
}


@settings(max_examples=200)
@given(
    st.fixed_dictionaries(
        {"tokenizer.ggml.tokens": STRINGS, "tokenizer.ggml.model": NAMES},
        optional={f"tokenizer.ggml.{key}": TOKENIZER[key] for key in [*TOKENIZER][2:]},
    ),
    st.dictionaries(
        st.sampled_from([f"tokenizer.ggml.{key}" for key in TOKENIZER]), ANYTHING, max_size=1
    ),
)
def test_any_vocabulary_in_a_gguf_is_used_or_refused(
    tmp_path: Path, vocabulary: dict[str, Any], odd: dict[str, Any]
) -> None:
    path = tmp_path / "vocabulary.gguf"
    raw, _ = gguf_files.smallest({**vocabulary, **odd})
    path.write_bytes(raw)
    survive(path, len(raw))


TENSORS = st.sampled_from(["token_embd.weight", "blk.0.attn_q.weight", "output_norm.weight"])


@settings(max_examples=200)
@given(
    st.dictionaries(TENSORS, st.lists(NUMBERS, max_size=5).map(tuple) | st.none(), max_size=2),
    st.dictionaries(TENSORS, st.integers(0, 45) | NUMBERS.filter(lambda n: n < 2**32), max_size=2),
    st.dictionaries(TENSORS, NUMBERS, max_size=2),
    st.dictionaries(st.sampled_from([*gguf_files.METADATA]) | WORDS, ANYTHING, max_size=2),
    st.integers(0, 40_000),
)
def test_any_tensor_list_in_a_gguf_is_loaded_or_refused(
    tmp_path: Path, shapes: Any, kinds: Any, offsets: Any, metadata: Any, num_cut: int
) -> None:
    raw, _ = gguf_files.smallest(metadata, shapes, kinds, offsets)
    path = tmp_path / "tensors.gguf"
    path.write_bytes(raw[: max(len(raw) - num_cut, 0)] if num_cut < 20_000 else raw)
    survive(path, len(raw))


# ---- safetensors ---------------------------------------------------------------------------------

DTYPES = "F64 F32 F16 BF16 I64 I32 I8 U8 BOOL F8_E4M3 F8_E5M2 C64 F4 X".split()
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(DTYPES) | st.none() | st.integers(),
        "shape": st.lists(NUMBERS | st.integers(-1, 80), max_size=4)
        | st.none()
        | st.text(max_size=2),
        "data_offsets": st.lists(NUMBERS | st.integers(-1, 9000), max_size=3) | st.none(),
    },
)


def copy_once(model: Path, target: Path) -> Path:
    if not target.exists():
        shutil.copytree(model, target)
    return target


@settings(max_examples=120)
@given(st.data())
def test_any_safetensors_header_is_loaded_or_refused(
    tiny: Any, tmp_path: Path, data: st.DataObject
) -> None:
    directory = copy_once(tiny("Llama"), tmp_path / "model")
    raw = (tiny("Llama") / "model.safetensors").read_bytes()
    header, weights = header_of(raw)
    for name in data.draw(st.lists(st.sampled_from([*header, "new"]), max_size=3)):
        changed = data.draw(ENTRY | st.none() | st.just("gone"))
        if changed == "gone":
            header.pop(name, None)
        else:
            kept = header.get(name) or {}
            header[name] = {**kept, **changed} if isinstance(changed, dict) else changed
    damaged = with_header(header, weights[: data.draw(st.sampled_from([len(weights), 4096, 0]))])
    if data.draw(st.booleans()):
        length = data.draw(NUMBERS | st.integers(0, len(damaged)))
        damaged = length.to_bytes(8, "little") + damaged[8:]
    (directory / "model.safetensors").write_bytes(damaged)
    survive(directory, len(raw))


# ---- JSON ----------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none()
    | st.booleans()
    | NUMBERS
    | st.integers(-3, 400)
    | st.floats()
    | WORDS
    | st.sampled_from(["{{ x.y }}", "{% for %}", "BPE", "ByteLevel", "Llama", "bfloat16", "</s>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=5,
)
FILES = {
    "generation_config.json": {"eos_token_id": [1], "temperature": 0.5},
    "special_tokens_map.json": {"bos_token": {"content": "<s>"}},
    "chat_template.json": {"chat_template": "{{ messages[0].content }}"},
    "tokenizer_config.json": {
        "bos_token": "<s>",
        "eos_token": {"content": "</s>"},
        "add_bos_token": True,
        "chat_template": [{"name": "default", "template": "{{ messages[0].content }}"}],
        "added_tokens_decoder": {"0": {"content": "<s>", "special": True}},
        "legacy": False,
    },
}


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Every place in a JSON value, long lists and dictionaries by their first and last items."""
    yield path
    if isinstance(value, (dict, list)):
        keys = [*value] if isinstance(value, dict) else [*range(len(value))]
        for key in keys if len(keys) < 20 else keys[:3] + keys[-3:]:
            yield from places(value[key], (*path, key))


def changed(value: Any, data: st.DataObject) -> Any:
    """A copy of a JSON value with a place or two changed, left out or renamed."""
    value = copy.deepcopy(value)
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(sorted(places(value), key=repr)))
        if not path:
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        old = parent.pop(path[-1])
        action = data.draw(st.sampled_from(["replace", "remove", "repeat"]))
        new = data.draw(JSON) if action == "replace" else old
        if isinstance(parent, list) and action != "remove":
            parent[path[-1] : path[-1]] = [new] if action == "replace" else [old, old]
        elif action == "replace":
            parent[path[-1]] = new
        elif action == "repeat":
            parent[data.draw(WORDS)] = old
    return value


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", *FILES])
def test_any_json_beside_the_weights_is_used_or_refused(
    tiny: Any, tmp_path: Path, name: str
) -> None:
    directory = copy_once(tiny("Llama"), tmp_path / "model")
    whole = FILES.get(name) or json.loads((directory / name).read_text(encoding="utf-8"))
    num_bytes = sum(file.stat().st_size for file in directory.iterdir())

    @settings(max_examples=150 if name == "tokenizer.json" else 60)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        (directory / name).write_text(json.dumps(changed(whole, data)))
        survive(directory, num_bytes)

    check()
