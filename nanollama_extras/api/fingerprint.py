"""The field `system_fingerprint` of OpenAI's answers: a hash of a model and of the code.

Seam       `nanollama.LLM.fingerprint` asks for it.
Remove     delete this file; the field then names the version of the code alone.
"""

from __future__ import annotations

import contextlib
import hashlib
from typing import TYPE_CHECKING

from nanollama import CheckpointError, gguf_shards, weight_files

if TYPE_CHECKING:
    from nanollama import LLM


def fingerprint(llm: LLM) -> str:
    """A short hash of samples of the weights, the code's version and the precision."""
    path, digest = llm.checkpoint.path, hashlib.sha256(llm.build.encode())
    with contextlib.suppress(OSError, CheckpointError):  # the files may be gone by now
        for file in gguf_shards(path) if path.is_file() else map(path.joinpath, weight_files(path)):
            with file.open("rb") as opened:
                for i in range(16):
                    opened.seek(file.stat().st_size * i // 16)
                    digest.update(opened.read(1 << 16))
    return f"fp_{digest.hexdigest()[:12]}"
