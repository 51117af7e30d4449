"""The documentation as data: README.md and docs/*.md, their code blocks, tables and links."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = {path: path.read_text(encoding="utf-8") for path in PAGES}


@dataclass(frozen=True)
class Block:
    """A fenced code block: its page, its language and its text."""

    page: str
    language: str
    text: str


BLOCKS = [
    Block(path.stem, language, text)
    for path, page in TEXTS.items()
    for language, text in re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", page)
]


def blocks(language: str) -> list[str]:
    """The different blocks of a language, in order, without those of test_extending.py."""
    used = [block for block in BLOCKS if block.page != "extending" and block.language == language]
    return list(dict.fromkeys(block.text for block in used))


def lines(language: str) -> list[str]:
    """The different lines of all blocks of a language: one command each."""
    return list(dict.fromkeys(line for text in blocks(language) for line in text.splitlines()))


def prose(text: str) -> str:
    """A page without its code blocks."""
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def headings(text: str) -> list[str]:
    return re.findall(r"(?m)^#+ (.+)$", prose(text))


def anchor(heading: str) -> str:
    """The anchor that code hosts give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def table(heading: str) -> list[list[str]]:
    """The cells of the table under the only heading of this name, without its first two lines."""
    (text,) = [page for page in TEXTS.values() if heading in headings(page)]
    section = re.split(rf"(?m)^#+ {re.escape(heading)}$", text)[1]
    rows = re.search(r"(?m)(?:^\|.*\|\n)+", section)
    assert rows
    return [
        [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        for line in rows[0].splitlines()[2:]
    ]


def codes(cell: str) -> list[str]:
    """The words in backquotes."""
    return re.findall(r"`([^`]+)`", cell)
