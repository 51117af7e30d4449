"""A model in several processes or on several machines.

serve run nanollama_extras.cluster:app model=MODEL replicas=1:4
"""

from __future__ import annotations

from typing import Any


def app(args: dict[str, Any]) -> Any:
    """The application of `serve run` and of a config file of Ray Serve. args: options of
    `nanollama --serve`. Raises UsageError."""
    from nanollama_extras.cluster import serve

    return serve.app(args)
