"""The limits of control groups, in folders laid out as Linux has them, and in a real model."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nanollama import LLM, available_memory
from nanollama_extras.kernels import containers

MOUNTS = """\
29 23 0:26 / /proc rw,relatime shared:9 - proc proc rw
30 23 0:26 / GROUPS rw,nosuid shared:9 - cgroup2 cgroup2 rw
32 31 0:29 / GROUPS/cpu rw - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / GROUPS/memory rw - cgroup cgroup rw,memory
"""
GROW = 1 << 40  # bytes that are free on the machine


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes /proc/self/cgroup, files of groups and, unless given, where these are mounted."""
    monkeypatch.setattr(containers, "MOUNTS", tmp_path / "mounts")
    monkeypatch.setattr(containers, "OWN", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    def write(own: str, files: dict[str, str] | None = None, mounts: str = MOUNTS) -> None:
        (tmp_path / "own").write_text(own)
        (tmp_path / "mounts").write_text(mounts.replace("GROUPS", str(tmp_path / "groups")))
        for name, text in (files or {}).items():
            file = tmp_path.joinpath("groups", name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text + "\n")

    return write


@pytest.mark.parametrize(
    ("quota", "cores"),
    [("200000 100000", 2), ("150000 100000", 1), ("5000 100000", 1), ("max 100000", 8), ("x", 8)],
)
def test_a_quota_of_version_2_limits_the_cores(
    group: Callable[..., None], quota: str, cores: int
) -> None:
    group("0::/", {"cpu.max": quota})
    assert containers.num_cores() == cores


def test_the_groups_around_a_group_limit_it_too(group: Callable[..., None]) -> None:
    group("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"})
    assert containers.num_cores() == 3


@pytest.mark.parametrize(("quota", "cores"), [("250001", 3), ("250000", 2), ("-1", 8)])
def test_a_quota_of_version_1_limits_the_cores(
    group: Callable[..., None], quota: str, cores: int
) -> None:
    files = {"cpu/box/cpu.cfs_quota_us": quota, "cpu/box/cpu.cfs_period_us": "100000"}
    group("4:memory:/box\n3:cpu,cpuacct:/box", files)
    assert containers.num_cores() == cores


def test_a_mount_may_show_the_groups_below_another_one_only(group: Callable[..., None]) -> None:
    """As that of a container whose groups are named as outside of it."""
    mounts = "30 23 0:26 /docker/c0 GROUPS/my\\040box rw - cgroup cgroup rw,cpuacct,cpu\nbroken"
    quota, period = "cpu.cfs_quota_us", "cpu.cfs_period_us"
    files = {f"my box/{quota}": "500000", f"my box/{period}": "100000"}
    group("3:cpu,cpuacct:/docker/c0", files, mounts)
    assert containers.num_cores() == 5
    files = {f"my box/a/{quota}": "99", f"my box/a/{period}": "99"}
    group("3:cpu,cpuacct:/docker/c0/a", files, mounts)
    assert containers.num_cores() == 1
    group("3:cpu,cpuacct:/docker/c01/a", {}, mounts)  # not below: only the mount's own limit
    assert containers.num_cores() == 5


def test_memory_is_the_limit_less_what_is_used_but_for_files(group: Callable[..., None]) -> None:
    stat = "anon 700\ninactive_file 40\nactive_file 60\nslab 1"
    group("0::/", {"memory.max": "1000", "memory.current": "800", "memory.stat": stat})
    assert containers.free_memory(GROW) == 300
    assert containers.free_memory(200) == 200
    group("0::/", {"memory.max": "max", "memory.high": "900"})
    assert containers.free_memory(GROW) == 200


def test_memory_of_version_1_and_without_a_limit(group: Callable[..., None]) -> None:
    one = {"memory/m/memory.limit_in_bytes": "1000", "memory/m/memory.usage_in_bytes": "1200"}
    group("4:memory:/m", one)
    assert containers.free_memory(GROW) == 0
    group("4:memory:/m", {"memory/m/memory.stat": "inactive_file 1\ntotal_inactive_file 300"})
    assert containers.free_memory(GROW) == 100
    group("0::/", {"memory.max": "max", "memory.current": "5"})
    assert containers.free_memory(GROW) == GROW


@given(st.text(), st.text(), st.sampled_from(["cgroup", "cgroup2"]))
def test_any_text_says_where_groups_are_or_nothing(own: str, before: str, kind: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(containers, "OWN", Mock(read_text=lambda: f"0::{own}\n1:cpu:/{own}"))
        mounts = f"1 2 3 {before} {before} {before} - {kind} c cpu"
        patch.setattr(containers, "MOUNTS", Mock(read_text=lambda: mounts))
        assert all(isinstance(folder, Path) for folder in containers.folders("cpu"))


@pytest.mark.parametrize("own", ["", "nonsense", "0::/../../etc", "0::/gone"])
def test_groups_that_cannot_be_read_limit_nothing(group: Callable[..., None], own: str) -> None:
    group(own)
    assert (containers.num_cores(), containers.free_memory(GROW)) == (8, GROW)


def test_a_model_takes_no_more_threads_and_memory_than_its_container_has(
    group: Callable[..., None], tiny: Callable[..., Path]
) -> None:
    before = torch.get_num_threads()
    group("0::/", {"cpu.max": "100000 100000", "memory.max": "64", "memory.current": "4"})
    try:
        torch.set_num_threads(2)
        LLM(tiny("Llama"), force=True)
        assert torch.get_num_threads() == 1
        assert available_memory(torch.device("cpu")) == 60
    finally:
        torch.set_num_threads(before)
