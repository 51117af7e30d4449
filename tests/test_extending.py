"""docs/extending.md works: its modules and rows do what its transcripts show."""

from __future__ import annotations

import ast
import os
import shutil
import sys
from pathlib import Path

import pytest
from pages import BLOCKS, ROOT
from test_docs import desk, normal, run_transcript, shell  # noqa: F401 (desk is a fixture)

EXTENDING = [block for block in BLOCKS if block.page == "extending"]
# A module's first line is the comment `# its path`; that of a row is `# nanollama.py, in TABLE`, or
# `after TABLE` for a statement that adds one.
CODE = [block.text for block in EXTENDING if block.language == "python3"]
ROWS = [text for text in CODE if text.startswith("# nanollama.py, ")]
MODULES = [text for text in CODE if text not in ROWS]


def add_row(source: str, place: str, row: str) -> str:
    """`source` with a row at the end of the dictionary or tuple TABLE, or after its assignment."""
    where, _, table = place.partition(" ")
    (node,) = [
        node
        for node in ast.parse(source).body
        if isinstance(node, (ast.Assign, ast.AnnAssign))
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and target.id == table
    ]
    lines = source.splitlines(keepends=True)
    if where == "after":
        return "".join([*lines[: node.end_lineno], row, *lines[node.end_lineno :]])
    assert isinstance(node.value, (ast.Dict, ast.Tuple)), table
    last = lines[node.value.end_lineno - 1].encode()
    end = sum(map(len, lines[: node.value.end_lineno - 1]))
    end += len(last[: node.value.end_col_offset - 1].decode())
    before = source[:end].rstrip()
    comma = "" if before.endswith((",", "(", "{")) else ","
    return f"{before}{comma}\n{row}{source[end:]}"


@pytest.fixture(scope="module")
def extended(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of nanollama with every module and row of the page."""
    root = tmp_path_factory.mktemp("extended")
    shutil.copytree(ROOT / "nanollama_extras", root / "nanollama_extras")
    source = (ROOT / "nanollama.py").read_text(encoding="utf-8")
    for text in ROWS:
        head, _, row = text.partition("\n")
        source = add_row(source, head.removeprefix("# nanollama.py, "), row)
    (root / "nanollama.py").write_text(source, encoding="utf-8")
    for text in MODULES:
        path, _, module = text.partition("\n")
        (root / path.removeprefix("# ")).write_text(module, encoding="utf-8")
    return root


@pytest.fixture
def extended_desk(desk: Path, extended: Path) -> Path:  # noqa: F811
    """A directory whose commands run the extended copy."""
    (desk / "nanollama.py").unlink()
    (desk / "nanollama.py").symlink_to(extended / "nanollama.py")
    (desk / "nanollama_extras").symlink_to(extended / "nanollama_extras")
    for name, script in {"python": "", "nanollama": extended / "nanollama.py"}.items():
        (desk / "bin" / name).write_text(
            f'#!/bin/sh\nPYTHONPATH="{extended}" exec "{sys.executable}" {script} "$@"\n'
        )
    return desk


@pytest.mark.parametrize("block", [b.text for b in EXTENDING if b.language == "console"])
def test_a_transcript_is_printed(block: str, extended_desk: Path) -> None:
    run_transcript(block, extended_desk)


@pytest.mark.parametrize("block", [b.text for b in EXTENDING if b.language == "python"])
def test_a_program_prints_its_comments(block: str, extended_desk: Path) -> None:
    (extended_desk / "block.py").write_text(block, encoding="utf-8")
    shown = shell(extended_desk, "python block.py").splitlines()
    comments = [line.partition(")  # ")[2] for line in block.splitlines() if ")  # " in line]
    assert shown == comments


@pytest.mark.parametrize("text", MODULES, ids=lambda text: text.partition("\n")[0])
def test_a_module_is_short_and_says_what_it_is(text: str) -> None:
    assert len(text.splitlines()) < 80
    assert "Seam" in (ast.get_docstring(ast.parse(text)) or "")


def test_every_code_block_belongs_to_a_module_or_a_table() -> None:
    assert MODULES
    assert ROWS
    for text in MODULES:
        assert text.startswith("# nanollama_extras/"), text
    assert os.sep == "/" or not MODULES
