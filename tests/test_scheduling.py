"""How tests are dealt to processes: one that ends its process fails, and the others still run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import scheduling

pytest.importorskip("xdist")


def test_a_test_that_ends_its_process_fails_once_and_all_others_run(tmp_path: Path) -> None:
    source = Path(scheduling.__file__).read_text(encoding="utf-8")
    (tmp_path / "conftest.py").write_text(source, encoding="utf-8")
    for name, body in {"ends": "os._exit(3)", "plain": "pass"}.items():
        tests = f"import os\ndef test_a(): pass\ndef test_b(): {body}\ndef test_c(): pass\n"
        (tmp_path / f"test_{name}.py").write_text(tests, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "xdist", "-n", "2", "-p", "no:cacheprovider", "-q"],
        cwd=tmp_path,
        env=os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "FAILED test_ends.py::test_b" in done.stdout
    assert "1 failed, 5 passed" in done.stdout
