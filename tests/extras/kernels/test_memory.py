"""Memory for weights (nanollama_extras/kernels/memory.py)."""

from __future__ import annotations

import gc
import mmap
import sys
import weakref

import pytest
import torch

from nanollama_extras.kernels import memory

has_large_pages = pytest.mark.skipif(sys.platform != "linux", reason="the system has no such pages")


def test_weights_lie_one_behind_the_other_and_do_not_overlap() -> None:
    shapes = [(3, 5), (1, 64), (0, 4), (7,)]
    made = [memory.large_pages(shape, torch.float16) for shape in shapes]
    for i, part in enumerate(made):
        assert part.shape == shapes[i]
        assert part.data_ptr() % 64 == 0
        part.fill_(i)
    assert [part.unique().tolist() for part in made] == [[0], [1], [], [3]]


def test_weights_made_for_inference_alone_leave_room_for_others() -> None:
    with torch.inference_mode():
        memory.large_pages((3,), torch.float32).fill_(1)
    assert memory.large_pages((3,), torch.float32).fill_(2).tolist() == [2, 2, 2]


@has_large_pages
def test_large_weights_begin_with_a_page_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_weights", memory.Weights())  # nothing is left of another load
    part = memory.large_pages((memory.RESERVED + 1,), torch.uint8)
    assert part.data_ptr() % memory.LARGE_PAGE == 0
    assert len(part) == memory.RESERVED + 1


@has_large_pages
def test_memory_returns_with_the_last_weight_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = []

    class Map(mmap.mmap):
        def __init__(self, *_: object) -> None:
            maps.append(weakref.ref(self))

    monkeypatch.setattr(mmap, "mmap", Map)
    monkeypatch.setattr(memory, "_weights", memory.Weights())
    first, second = (memory.large_pages((100,), torch.uint8) for _ in range(2))
    memory.return_unused_memory()
    other = memory.large_pages((100,), torch.uint8)
    assert len(maps) == 2
    del first
    gc.collect()
    assert all(m() for m in maps)
    del second
    gc.collect()
    assert [m() is None for m in maps] == [True, False]
    assert len(other) == 100


@has_large_pages
def test_joined_pages_hold_the_same_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "_weights", memory.Weights())
    part = memory.large_pages((5, memory.LARGE_PAGE // 8), torch.int32)
    part.copy_(torch.arange(part.numel(), dtype=torch.int32).view_as(part))
    memory.join_pages()
    assert torch.equal(part.flatten(), torch.arange(part.numel(), dtype=torch.int32))
    assert memory._weights.chunks[0].num_joined in (0, 2 * memory.LARGE_PAGE)  # 0: old Linux


@has_large_pages
def test_memory_that_came_early_holds_weights_and_the_rest_of_it_returns() -> None:
    weights = memory.Weights()
    weights.reserve(2 * memory.POPULATED + memory.RESERVED)
    weights.populate(weights.chunks[-1], 2 * memory.POPULATED)
    part = weights.take(100)
    assert len(weights.chunks) == 1
    assert not part.any()
    part.fill_(7)
    rest = weights.memory[memory.POPULATED :][:100].fill_(8)
    weights.drop()
    assert part.tolist() == [7] * 100
    assert not rest.any()


@has_large_pages
def test_without_such_pages_weights_lie_in_others(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("Invalid argument")

    monkeypatch.setattr(memory, "mapped", refuse)
    monkeypatch.setattr(memory, "_weights", memory.Weights())
    assert memory.large_pages((2, 3), torch.float32).shape == (2, 3)
