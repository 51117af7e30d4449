"""files.block_store: a file is as it was written, or absent; several processes; a budget."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanollama import NanollamaError
from nanollama_extras.files import block_store
from nanollama_extras.files.block_store import (
    BlockStore,
    Payload,
    checked,
    read_payload,
    write_file,
)

HEAD = b'{"of": "a test"}\n'
BYTES = 40
NAMES = [f"{i:040x}.kv" for i in range(8)]


def payload(seed: int, num_bytes: int = BYTES) -> Payload:
    return np.random.default_rng(seed).integers(0, 256, num_bytes, np.uint8)


def fill(store: BlockStore, numbers: range) -> None:
    for i in numbers:
        assert store.put(NAMES[i], HEAD, payload(i), i + 1)
    store.wait()


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    store = BlockStore(tmp_path / "new" / "folder", 1 << 20)
    fill(store, range(2))
    assert store.folder.stat().st_mode & 0o777 == 0o700
    assert sorted(p.name for p in store.folder.iterdir()) == NAMES[:2]  # and nothing else
    assert all(p.stat().st_mode & 0o777 == 0o600 for p in store.folder.iterdir())
    assert store.has(NAMES[1])
    assert not store.has(NAMES[2])
    assert not store.has("x" * 999)  # which the system refuses to look for
    assert store.fetch(NAMES[2], HEAD, BYTES).result() is None
    found = store.fetch(NAMES[1], HEAD, BYTES).result()
    assert found is not None
    assert np.array_equal(found, payload(1))


@given(data=st.binary(max_size=200) | st.binary(min_size=89, max_size=89))
def test_any_bytes_are_a_miss_and_are_deleted(
    tmp_path_factory: pytest.TempPathFactory, data: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / NAMES[0]
    for content in (data, HEAD + data[len(HEAD) :]):
        path.write_bytes(content)
        assert read_payload(path, HEAD, BYTES) is None
        assert not path.exists()


@given(at=st.integers(0, 88), flip=st.integers(1, 255), cut=st.integers(-5, 5))
def test_a_damaged_file_is_a_miss(
    tmp_path_factory: pytest.TempPathFactory, at: int, flip: int, cut: int
) -> None:
    path = tmp_path_factory.getbasetemp() / NAMES[1]
    write_file(path, checked(HEAD, payload(1)), 0)
    data = bytearray(path.read_bytes())
    assert len(data) == 89
    data[at] ^= flip
    path.write_bytes((bytes(data) + bytes(5))[: len(data) + cut])
    assert read_payload(path, HEAD, BYTES) is None
    assert not path.exists()


def test_a_file_of_another_head_or_size_is_a_miss(tmp_path: Path) -> None:
    path = tmp_path / NAMES[0]
    for head, size in ((HEAD.replace(b"a test", b"others"), BYTES), (HEAD, BYTES + 1), (HEAD, 0)):
        write_file(path, checked(HEAD, payload(0)), 0)
        assert read_payload(path, head, size) is None
        assert not path.exists()


def test_what_is_no_file_is_a_miss(tmp_path: Path) -> None:
    (tmp_path / NAMES[0]).mkdir()
    (tmp_path / "target").write_bytes(b"x")
    (tmp_path / NAMES[1]).symlink_to(tmp_path / "target")
    os.mkfifo(tmp_path / NAMES[2])
    assert [read_payload(tmp_path / name, HEAD, BYTES) for name in NAMES[:3]] == [None] * 3
    assert (tmp_path / "target").exists()


def test_what_was_not_used_for_longest_goes_first(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, 4 * 89)
    (tmp_path / "notes.txt").write_text("x" * 1000)  # of somebody else
    fill(store, range(4))
    store.use({NAMES[0]: 100})
    store.wait()
    fill(store, range(4, 6))
    assert [store.has(name) for name in NAMES[:6]] == [True, False, False, True, True, True]
    assert (tmp_path / "notes.txt").exists()
    described = block_store.describe(tmp_path, store.most_bytes)
    assert described == f"{tmp_path}, 356 B of 356 B in 4 files"


def test_a_smaller_budget_holds_from_the_start(tmp_path: Path) -> None:
    fill(BlockStore(tmp_path, 8 * 89), range(8))
    store = BlockStore(tmp_path, 2 * 89)
    store.wait()
    assert [store.has(name) for name in NAMES] == [False] * 6 + [True] * 2


def test_what_a_process_left_half_written_is_deleted_later(tmp_path: Path) -> None:
    old, new = (tmp_path / f".{NAMES[0]}.{i:08x}~" for i in range(2))
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (1, 1))
    BlockStore(tmp_path, 1000).trim()
    assert (old.exists(), new.exists()) == (False, True)


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(NanollamaError, match=r"--prompt-cache .*; name another folder"):
        BlockStore(tmp_path / "file" / "folder", 1)


def test_a_full_disk_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    monkeypatch.setattr(block_store.log, "propagate", True)
    store = BlockStore(tmp_path, 1 << 20)
    for name in NAMES:
        store.put(name, HEAD, payload(0), 0)
    store.wait()
    assert caplog.text.count("No space left on device; nothing more is written there") == 1
    assert not store.put(NAMES[0], HEAD, payload(0), 0)
    assert list(tmp_path.iterdir()) == []


def test_no_more_waits_than_there_is_room_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_store, "MOST_PENDING", 2 * BYTES)
    store = BlockStore(tmp_path, 1 << 20)
    with store.lock:
        store.num_pending = BYTES + 1
    assert not store.put(NAMES[0], HEAD, payload(0), 0)
    with store.lock:
        store.num_pending = BYTES
    assert store.put(NAMES[0], HEAD, payload(0), 0)
    store.wait()
    assert store.num_pending == BYTES


PROGRAM = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_block_store import BYTES, HEAD, NAMES, BlockStore, np, payload
store, num_found = BlockStore(Path(sys.argv[1]), 5 * 89), 0
for i in range(400):
    store.put(NAMES[i % 8], HEAD, payload(i % 8), i)
    found = store.fetch(NAMES[i * 5 % 8], HEAD, BYTES).result()
    num_found += found is not None
    assert found is None or np.array_equal(found, payload(i * 5 % 8))
store.wait()
assert num_found
"""


def test_several_processes_share_a_folder(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM, str(tmp_path), str(Path(__file__).parent)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        _, error = process.communicate()
        assert process.returncode == 0, error
        assert "warning" not in error
        assert "written" not in error
    left = sorted(p.name for p in tmp_path.iterdir())
    assert left
    assert set(left) <= set(NAMES)
    for name in left:
        found = read_payload(tmp_path / name, HEAD, BYTES)
        assert found is not None
        assert np.array_equal(found, payload(NAMES.index(name)))
