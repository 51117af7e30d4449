"""Files of the hub that are checked while they come, and downloads that go on after a break.

Adds       `fetch_file` in place of the core's: a Range request for the rest of an interrupted
           download, a comparison with the hash that the hub's list of files gives, and a look at
           the first bytes of a GGUF before the rest is fetched.
Seam       `nanollama.pull_from_hub` asks for this module, which needs files.refusals.
Remove     delete this file and its tests; huggingface_hub then fetches the files from their start.
Spec       https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import hashlib
import io
import os
import shutil
from pathlib import Path
from typing import Any, cast

from huggingface_hub import constants, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import WeakFileLock, build_hf_headers  # type: ignore[attr-defined]

from nanollama import DownloadError, check_inside, errors_about
from nanollama_extras.files.refusals import check_start


def fetch_file(repo: str, sha: str, file: Any, tqdm_class: Any = None) -> Path:
    """Fetch a file of a commit as huggingface_hub lays out its cache: a link in the snapshot leads
    to a blob, whose name is the hash of its content. Raises DownloadError and CheckpointError."""
    name, cache = str(file.rfilename), Path(constants.HF_HUB_CACHE)
    known = file.lfs.sha256 if file.lfs else file.blob_id
    id = check_inside(known or f"{sha}-{name.replace('/', '-')}").replace("/", "-")
    folder = cache / f"models--{repo.replace('/', '--')}"
    link, blob = folder / "snapshots" / sha / name, folder / "blobs" / id
    lock = cache / ".locks" / folder.name / f"{id}.lock"
    for path in (link, blob, lock):
        path.parent.mkdir(parents=True, exist_ok=True)
    with WeakFileLock(lock):
        if not is_intact(link, known):
            if not is_intact(blob, known):
                fetch_blob(hf_hub_url(repo, name, revision=sha), blob, file, known, tqdm_class)
            link.unlink(missing_ok=True)
            try:
                link.symlink_to(os.path.relpath(blob, link.parent))
            except OSError:  # Windows lets few users make links
                shutil.copyfile(blob, link)
    return link


def fetch_blob(url: str, blob: Path, file: Any, known: str | None, tqdm_class: Any) -> None:
    """Fetch the rest of a file. What is there after a break stays for the next try."""
    part = blob.with_name(blob.name + ".incomplete")
    if part.exists() and file.size is not None and part.stat().st_size > file.size:
        part.unlink()
    kind = io.BufferedWriter if "mmproj" in file.rfilename.lower() else PartFile
    with errors_about(file.rfilename), kind(part.open("ab", buffering=0)) as out:
        http_get(
            url,
            cast("io.BufferedWriter", out),
            resume_size=out.tell(),
            headers=build_hf_headers(),
            expected_size=file.size,
            displayed_filename=str(file.rfilename),
            tqdm_class=tqdm_class,
        )
    if not is_intact(part, known):
        part.unlink()
        raise DownloadError(
            f"{file.rfilename}: came with other bytes than the hub's list names (hash {known}); "
            "pull again, or set HF_ENDPOINT to another mirror"
        )
    os.replace(part, blob)


class PartFile(io.BufferedWriter):
    """The part of a file that has come. Refuses the start of a GGUF that is not supported."""

    def write(self, data: Any) -> int:
        if not self.tell():
            check_start(bytes(data))
        return super().write(data)


def is_intact(path: Path, known: str | None) -> bool:
    """True for a file whose content has the hash of git-lfs (SHA-256) or git (SHA-1), if known."""
    if not path.is_file():
        return False
    if known is None:
        return True
    is_git = len(known) == 40
    digest = hashlib.sha1(b"blob %d\0" % path.stat().st_size) if is_git else hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest() == known
