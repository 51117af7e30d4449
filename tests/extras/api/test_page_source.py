"""The chat page as a file: its script is JavaScript, and its policy names exactly what it holds."""

from __future__ import annotations

import base64
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from nanollama_extras.api.page import PAGE, page_headers


def element(tag: str) -> str:
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", PAGE, re.DOTALL)
    return str(text)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
def test_the_script_is_javascript(tmp_path: Path) -> None:
    path = tmp_path / "page.js"
    path.write_text(element("script"), encoding="utf-8")
    done = subprocess.run(["node", "--check", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("tag", ["script", "style"])
def test_the_policy_has_the_hash_of_each_element(tag: str) -> None:
    digest = base64.b64encode(hashlib.sha256(element(tag).encode()).digest()).decode()
    assert f"{tag}-src 'sha256-{digest}'" in page_headers()["content-security-policy"]
