"""The cores and the memory that a container leaves a program (Linux's control groups).

A container may have fewer cores and less memory than its machine, and torch and /proc/meminfo tell
those of the machine: too many threads then wait for each other, and a model that is larger than the
limit gets the program killed.

Seam: `num_cores` stands for os.cpu_count where a model's threads are chosen, `free_memory` limits
the core's `available_memory`. To remove it, delete this module.
Source: Linux's Documentation/admin-guide/cgroup-v2.rst (cpu.max, memory.max, memory.current,
memory.high, memory.stat), cgroup-v1/memory.rst, scheduler/sched-bwc.rst (cpu.cfs_quota_us) and
filesystems/proc.rst (mountinfo).
"""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path

OWN = Path("/proc/self/cgroup")
MOUNTS = Path("/proc/self/mountinfo")
ESCAPED = re.compile(r"\\([0-7]{3})")  # spaces and others, in a mount's paths


def mounts(controller: str) -> Iterator[tuple[str, Path]]:
    """Where the groups that limit a controller are, "" for those of version 2: the group that a
    mount shows, and the folder that shows it."""
    with contextlib.suppress(OSError):
        for line in MOUNTS.read_text().splitlines():
            before, _, after = line.partition(" - ")
            fields, about = before.split(" "), after.split(" ")
            if len(fields) < 5 or len(about) < 3:
                continue
            is_second = about[0] == "cgroup2" and not controller
            if is_second or (about[0] == "cgroup" and controller in about[2].split(",")):
                root, place = (ESCAPED.sub(lambda m: chr(int(m[1], 8)), f) for f in fields[3:5])
                yield root, Path(place)


def parts_below(root: str, path: str) -> tuple[str, ...]:
    """The folders from one group down to another; none where it is not below."""
    if ".." in path or not f"{path}/".startswith(root.rstrip("/") + "/"):
        return ()
    return Path(path.removeprefix(root.rstrip("/")).lstrip("/")).parts


def folders(controller: str) -> Iterator[Path]:
    """The folders of this program's groups that limit `controller`, of version 2 and of 1; each
    group is also limited by those around it. In a container, its own group may be the root."""
    with contextlib.suppress(OSError):
        for line in OWN.read_text().splitlines():
            controllers, _, path = line.partition(":")[2].partition(":")
            if controllers and controller not in controllers.split(","):
                continue
            for root, place in mounts(controller if controllers else ""):
                parts = parts_below(root, path)
                yield from (place.joinpath(*parts[:n]) for n in range(len(parts), -1, -1))


def numbers(file: Path) -> list[float]:
    """The numbers of a file: of "max 100000", infinity and 100000; none where it cannot be read."""
    with contextlib.suppress(OSError, ValueError):
        return [math.inf if word == "max" else float(word) for word in file.read_text().split()]
    return []


def core_limits() -> Iterator[float]:
    """Cores by each group's quota: microseconds of processor time in a period."""
    for folder in folders("cpu"):
        quota = numbers(folder / "cpu.max")
        if not quota:
            quota = numbers(folder / "cpu.cfs_quota_us") + numbers(folder / "cpu.cfs_period_us")
        if len(quota) == 2 and min(quota) > 0:  # version 1 writes -1 for no limit
            yield quota[0] / quota[1]


def num_cores() -> int:
    """Cores that this program may use, at least 1. A quota of 1.5 is 1, one of 1.6 is 2: threads
    that together use a quota up before its period ends stand still until the next one."""
    own = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # not there on macOS and Windows
        own = len(os.sched_getaffinity(0))
    return max(1, math.ceil(min(own, *core_limits(), math.inf) - 0.5))


def reclaimable(folder: Path) -> float:
    """Bytes of a group's memory, and of the groups in it, that only hold files, which the system
    gives up when asked."""
    with contextlib.suppress(OSError, ValueError):
        lines = (folder / "memory.stat").read_text().splitlines()
        found = dict(line.split() for line in lines)
        total = "total_" if "total_inactive_file" in found else ""  # in version 1
        return sum(float(found.get(f"{total}{kind}_file", 0)) for kind in ("inactive", "active"))
    return 0.0


def free_memory(free: float) -> float:
    """The least of `free` and of the bytes that each group's limit leaves, at least 0."""
    for folder in folders("memory"):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.high", "memory.current"),  # above it, the system slows a program down
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            found = numbers(folder / limit) + numbers(folder / used)
            if len(found) == 2:
                free = min(free, found[0] - found[1] + reclaimable(folder))
    return max(free, 0.0)
