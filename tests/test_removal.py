"""Removing a module of nanollama_extras takes its own features away, and no other."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

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


def test_without_modules_only_their_own_features_are_gone(tiny: Tiny, tmp_path: Path) -> None:
    """One module of each of three seams, at once: no feature needs two of them."""
    removed = {"api.ollama", "commands.bench", "answers.tools"}
    shutil.copy(ROOT / "nanollama.py", tmp_path)
    folder = tmp_path / "nanollama_extras"
    shutil.copytree(ROOT / "nanollama_extras", folder, ignore=shutil.ignore_patterns("__pycache__"))
    for module in removed:
        folder.joinpath(*module.split(".")).with_suffix(".py").unlink()
    expected = {
        name: "".join(removed & set(needed)) or "ok" for name, (needed, _) in FEATURES.items()
    }
    assert removed < set(expected.values())
    assert outcomes(tmp_path, tiny(max_position_embeddings=1024)) == expected
