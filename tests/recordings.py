"""Requests of coding agents, recorded in November 2026; their texts are replaced by filler."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent / "data" / "agent_shapes"
LOREM = (
    "lorem ipsum dolor sit amet consectetur adipiscing elit sed do eiusmod tempor\n"
    "incididunt ut labore et dolore magna aliqua enim ad minim veniam quis nostrud\n"
)


def filled(value: Any, shorter: int) -> Any:
    """A value in which filler stands for each ~N, a text of N characters. Long ones are shorter."""
    if isinstance(value, dict):
        return {key: filled(item, shorter) for key, item in value.items()}
    if isinstance(value, list):
        return [filled(item, shorter) for item in value]
    if not isinstance(value, str) or not re.fullmatch(r"~\d+", value):
        return value
    num = int(value[1:])
    num = max(num // shorter, 41)
    return (LOREM * (num // len(LOREM) + 1))[:num]


def recorded(name: str, shorter: int = 1) -> list[dict[str, Any]]:
    """The requests in a file: method, path, body."""
    requests = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return [{**request, "body": filled(request["body"], shorter)} for request in requests]


def names() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))
