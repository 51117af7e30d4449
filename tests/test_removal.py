"""Removing a module of nanollama_extras takes its own features away, and no other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from features import FEATURES
from oracle import Tiny

ROOT = Path(__file__).parents[1]


def outcomes(tree: Path, model: Path, **variables: str) -> dict[str, str]:
    """What comes of each feature in a copy of the sources."""
    ran = subprocess.run(
        [sys.executable, ROOT / "tests" / "features.py", model],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": f"{tree}{os.pathsep}{ROOT / 'tests'}", **variables},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    result: dict[str, str] = json.loads(ran.stdout.splitlines()[-1])
    return result


@pytest.mark.parametrize("module", ["api.ollama", "commands.bench", "answers.tools"])
def test_without_a_module_only_its_own_features_are_gone(
    tiny: Tiny, tmp_path: Path, module: str
) -> None:
    shutil.copy(ROOT / "nanollama.py", tmp_path)
    folder = tmp_path / "nanollama_extras"
    shutil.copytree(ROOT / "nanollama_extras", folder, ignore=shutil.ignore_patterns("__pycache__"))
    folder.joinpath(*module.split(".")).with_suffix(".py").unlink()
    assert outcomes(tmp_path, tiny(max_position_embeddings=1024)) == {
        name: module if module in needed else "ok" for name, (needed, _) in FEATURES.items()
    }
