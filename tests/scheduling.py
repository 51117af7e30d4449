"""How the tests are dealt to processes. Those of a file stay together, because fixtures of a file
are slow to make, and so do files that share more than that. The slowest begin, so that all
processes end at about the same time."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# The files that take longest, slowest first. Those of a row share a cluster of Ray, or kernels.
ROWS = [
    "cluster/test_serve cluster/test_losses cluster/test_batch",
    "kernels/test_native kernels/test_floats",
    "test_docs",
    "test_alone",
    "kernels/test_sanitizers",
    "kernels/test_cuda",
    "test_tokenizer_published",
    "cluster/test_tensor_parallel",
    "test_removal",
    "kernels/test_native_c",
    "test_quantize",
    "test_deploy",
]
PLACES = {name: place for place, row in enumerate(ROWS) for name in row.split()}


def unit(nodeid: str) -> str:
    """The tests of a unit run in one process: those of a row, or of another file."""
    name = nodeid.partition("::")[0].removeprefix("tests/").removeprefix("extras/")
    place = PLACES.get(name.removesuffix(".py"))
    return name if place is None else ROWS[place]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow units first, then those with the most tests."""
    units = {item: unit(item.nodeid) for item in items}
    counts, rows = Counter(units.values()), {row: place for place, row in enumerate(ROWS)}
    names = sorted(counts, key=lambda name: (rows.get(name, len(rows)), -counts[name]))
    order = {name: place for place, name in enumerate(names)}
    items.sort(key=lambda item: order[units[item]])


class UnitScheduling(LoadScopeScheduling):
    def _split_scope(self, nodeid: str) -> str:
        return unit(nodeid)

    def remove_node(self, node: Any) -> str | None:
        """A test that ended its process is not given to the next process, which it would end."""
        for tests in self.assigned_work[node].values():
            if crashed := next((name for name, is_done in tests.items() if not is_done), None):
                tests[crashed] = True
                break
        else:
            crashed = None
        super().remove_node(node)
        return crashed


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> UnitScheduling:
    config.option.loadscopereorder = False  # the order is that of the items
    return UnitScheduling(config, log)
