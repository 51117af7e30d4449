"""The chat page as files: scripts that are JavaScript, their hashes, sizes and licences."""

from __future__ import annotations

import base64
import gzip
import hashlib
import re
import shutil
import subprocess
from pathlib import Path

import npm
import pytest
from starlette.requests import Request

import nanollama
from nanollama_extras.api.page import MATH, PAGE, WEB, page_headers, page_server, text_response

VENDORED = WEB / "vendored"


def elements(tag: str) -> list[str]:
    return re.findall(rf"<{tag}\b[^>]*>(.*?)</{tag}>", PAGE, re.DOTALL)


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node")
@pytest.mark.parametrize("path", sorted(WEB.glob("*.js")), ids=lambda path: path.name)
def test_the_scripts_are_javascript(path: Path) -> None:
    done = subprocess.run(["node", "--check", str(path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_file_is_written_into_the_page() -> None:
    assert not re.search(r"<script[^>]* src|<link[^>]* stylesheet", PAGE)
    for path in [*WEB.glob("*.js"), *WEB.glob("*.css"), VENDORED / "prism.js"]:
        assert path.read_text(encoding="utf-8") in PAGE, path.name
        assert "</script" not in path.read_text(encoding="utf-8")
        assert "<script" not in path.read_text(encoding="utf-8")  # after <!--, it hides the end


@pytest.mark.parametrize("tag", ["script", "style"])
def test_the_policy_has_the_hash_of_each_element(tag: str) -> None:
    assert elements(tag)
    for text in elements(tag):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in page_headers()["content-security-policy"]
    assert "unsafe" not in page_headers()["content-security-policy"]


def test_the_page_is_small() -> None:
    """Of one request, and, on the wire, with the library that only formulas load."""
    assert len(PAGE.encode()) < 200_000
    assert len(gzip.compress(PAGE.encode())) + len(gzip.compress(MATH.encode())) < 120_000


@pytest.mark.parametrize("accepted", [b"gzip, br", b"identity"])
def test_a_client_gets_the_coding_that_it_takes(accepted: bytes) -> None:
    request = Request({"type": "http", "headers": [(b"accept-encoding", accepted)]})
    response = text_response(request, PAGE, "text/html")
    is_packed = response.headers.get("content-encoding") == "gzip"
    assert is_packed == (accepted != b"identity")
    body = bytes(response.body)
    assert (gzip.decompress(body) if is_packed else body).decode() == PAGE
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["vary"] == "accept-encoding"


@pytest.mark.node
def test_the_libraries_are_the_published_ones() -> None:
    rows = re.findall(
        r"(?m)^\| `(.+?)` \| (\S+) (\S+) \| (.+?) \|", (VENDORED / "README.md").read_text()
    )
    folder = npm.installed(*(f"{name}@{version}" for _, name, version, _ in rows)) / "node_modules"
    for file, name, _, parts in rows:
        names = [part.strip() for part in parts.partition(": ")[2].partition(";")[0].split(",")]
        pattern = re.findall("`(.+?)`", parts)[0]
        paths = [pattern.replace("*", one) for one in names] if "*" in pattern else [pattern]
        texts = [(folder / name / path).read_text(encoding="utf-8") for path in paths]
        found = "".join(f"{text}\n" for text in texts) if len(texts) > 1 else texts[0]
        assert (VENDORED / file).read_text(encoding="utf-8") == found
        licence = (folder / name / "LICENSE").read_text(encoding="utf-8")
        assert (VENDORED / f"{Path(file).stem}.LICENSE").read_text(encoding="utf-8") == licence


def test_the_page_may_reach_the_servers_that_an_option_names_and_no_others() -> None:
    servers = ("https://a.example", "http://[::1]:8080/llm", "http://[::1]:8080/two")
    policy = page_headers(servers)["content-security-policy"]
    assert "connect-src 'self' https://a.example http://[::1]:8080; " in policy
    assert "connect-src 'self'; " in page_headers()["content-security-policy"]


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("http://localhost:8080", "http://localhost:8080"),
        ("http://localhost:8080/v1/", "http://localhost:8080"),
        ("https://a.example/llm/v1", "https://a.example/llm"),
        ("localhost:8080", None),
        ("http://a.example; script-src *", None),
        ('http://a.example/"><script>', None),
        ("ftp://a.example", None),
    ],
)
def test_an_address_of_a_server_for_the_page(url: str, address: str | None) -> None:
    if address:
        assert page_server(url) == address
        return
    with pytest.raises(nanollama.UsageError, match="--page-server"):
        page_server(url)
