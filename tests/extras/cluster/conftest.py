"""One Ray for the tests of a process."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="session")
def ray_address() -> Iterator[str]:
    """The address of a Ray that this process has started. Its six cores are what Ray counts."""
    ray = pytest.importorskip("ray")
    options = {"include_dashboard": False, "log_to_driver": False, "logging_level": "error"}
    ray.init(num_cpus=6, object_store_memory=200 * 1024 * 1024, **options)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()
