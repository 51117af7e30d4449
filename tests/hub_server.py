"""A small Hugging Face hub on loopback: the endpoints that huggingface_hub calls to fetch a model.

Weights go the way they go on the real hub: a redirect to another host, with the hash in headers.
https://huggingface.co/docs/hub/api, https://huggingface.co/docs/huggingface_hub"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

TOKEN = "hf_good"  # opens gated repos
LFS = (".safetensors", ".gguf", ".bin", ".pt")


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class HubServer(ThreadingHTTPServer):
    """Serves what `add` was given, and fails as told.

    `gated`: repos whose files need TOKEN. `cuts`: file name -> after how many bytes each of its
    next downloads breaks off. `stalls`: names of files whose downloads stop halfway and wait; then
    `stalled` is set. `damaged`: file name -> other content. `lies`: etag, or key of the list of
    files -> a wrong value. `lists_hashes`: as the real hub does. `status`, `body`: what to answer
    every request with. `seen`: (method, path, headers) of each request about a repo. `sent`: file
    name -> bytes of its content that were asked for."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.commits: dict[str, dict[str, str]] = {}  # repo -> branch, tag or commit -> commit
        self.files: dict[tuple[str, str], Mapping[str, bytes]] = {}  # repo, commit -> name -> data
        self.blobs: dict[str, bytes] = {}
        self.gated: set[str] = set()
        self.cuts: dict[str, list[int]] = {}
        self.stalls: set[str] = set()
        self.damaged: dict[str, bytes] = {}
        self.lies: dict[str, str] = {}
        self.lists_hashes = True
        self.stalled, self.closing = threading.Event(), threading.Event()
        self.status: int | None = None
        self.body: bytes | None = None
        self.seen: list[tuple[str, str, Mapping[str, str]]] = []
        self.sent: dict[str, int] = {}

    def add(self, repo: str, files: Mapping[str, bytes], branch: str = "main") -> str:
        """Commit `files` to a branch -> the commit's hash."""
        commit = hashlib.sha1(repr((repo, branch, sorted(files.items()))).encode()).hexdigest()
        self.commits.setdefault(repo, {}).update({branch: commit, commit: commit})
        self.files[repo, commit] = files
        self.blobs |= {hashlib.sha256(data).hexdigest(): data for data in files.values()}
        return commit

    def fetched(self) -> set[str]:
        """Names of the files whose content was asked for."""
        paths = [path for method, path, _ in self.seen if method == "GET"]
        found = (re.fullmatch(r"/cdn/\w+/(.+)|/.+/resolve/\w+/(.+)", path) for path in paths)
        return {match[1] or match[2] for match in found if match}

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.closing.set()
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubServer

    def do_GET(self) -> None:
        hub = self.server
        path = unquote(self.path.partition("?")[0])
        if not path.startswith("/api/agent-"):  # the client looks around at its start
            hub.seen.append((self.command, path, dict(self.headers)))
        if hub.status or hub.body is not None:
            return self.answer(hub.status or 200, hub.body or b"out of order")
        if cdn := re.fullmatch(r"/cdn/(\w+)/(.+)", path):
            return self.content(hub.blobs[cdn[1]], cdn[2])
        for pattern, method in (
            (r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>.+))?", self.model_info),
            (r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)", self.tree),
            (r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<name>.+)", self.resolve),
        ):
            if match := re.fullmatch(pattern, path):
                found = match.groupdict()
                repo, revision = found.pop("repo"), found.pop("revision") or "main"
                if repo not in hub.commits:  # the hub hides from strangers what is private
                    return self.fail(401, "RepoNotFound", "Invalid username or password.")
                if revision not in hub.commits[repo]:
                    return self.fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
                return method(repo, hub.commits[repo][revision], **found)
        return self.fail(404, "", "no such endpoint")

    do_HEAD = do_GET

    def model_info(self, repo: str, commit: str) -> None:
        lies, siblings = self.server.lies, []
        for name, data in self.server.files[repo, commit].items():
            sibling: dict[str, object] = {"rfilename": name}
            if "blobs=true" in self.path and self.server.lists_hashes:
                sibling |= {"size": len(data), "blobId": lies.get("blobId", git_id(data))}
                if name.endswith(LFS):
                    sha256 = lies.get("sha256", hashlib.sha256(data).hexdigest())
                    lfs = {"sha256": sha256, "size": len(data), "pointerSize": 128}
                    sibling |= {"lfs": lfs, "blobId": git_id(sha256.encode())}
            siblings.append(sibling)
        self.json({"id": repo, "sha": lies.get("sha", commit), "siblings": siblings})

    def tree(self, repo: str, commit: str) -> None:
        entries = []
        for name, data in self.server.files[repo, commit].items():
            sha256, blob = hashlib.sha256(data).hexdigest(), git_id(data)
            lfs = {"lfs": {"oid": sha256, "size": len(data), "pointerSize": 128}}
            entry = {"type": "file", "path": name, "size": len(data), "oid": blob}
            entries.append(entry | (lfs if name.endswith(LFS) else {}))
        self.json(entries)

    def resolve(self, repo: str, commit: str, name: str) -> None:
        token = self.headers.get("Authorization", "")
        if repo in self.server.gated and token != f"Bearer {TOKEN}":
            return self.fail(403 if token else 401, "GatedRepo", f"Access to {repo} is restricted.")
        data = self.server.files[repo, commit].get(name)
        if data is None:
            return self.fail(404, "EntryNotFound", "Entry not found")
        sha256 = hashlib.sha256(data).hexdigest()
        etag = self.server.lies.get("etag")
        headers = {"X-Repo-Commit": commit, "ETag": f'"{etag or git_id(data)}"'}
        if name.endswith(LFS):
            headers |= {"X-Linked-Etag": f'"{etag or sha256}"', "X-Linked-Size": str(len(data))}
            host = f"http://localhost:{self.server.server_port}"  # another host than 127.0.0.1
            return self.answer(302, b"", headers | {"Location": f"{host}/cdn/{sha256}/{name}"})
        return self.content(data, name, headers)

    def content(self, data: bytes, name: str, headers: Mapping[str, str] | None = None) -> None:
        """A file, or what a Range header asks of it; broken off where `cuts` says so."""
        data = self.server.damaged.get(name, data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        start = int(asked[1]) if asked else 0
        part = data[start : int(asked[2]) + 1] if asked and asked[2] else data[start:]
        ranged = {"Content-Range": f"bytes {start}-{start + len(part) - 1}/{len(data)}"}
        cuts = self.server.cuts.get(name) if self.command == "GET" else None
        cut = cuts.pop(0) if cuts else None
        if name in self.server.stalls and self.command == "GET":
            cut = len(part) // 2
        status, more = (206, ranged) if asked else (200, {})
        if self.command == "GET":
            self.server.sent[name] = self.server.sent.get(name, 0) + len(part)
        self.answer(status, part, {**(headers or {}), **more, "Accept-Ranges": "bytes"}, cut)

    def json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def fail(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Code": code, "X-Error-Message": message}
        self.answer(status, json.dumps({"error": message}).encode(), headers)

    def answer(
        self,
        status: int,
        body: bytes,
        headers: Mapping[str, str] | None = None,
        cut: int | None = None,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # a client that has read enough
            if self.command == "GET":
                self.wfile.write(body[:cut])
        if self.server.stalls and cut is not None:
            self.server.stalled.set()
            self.server.closing.wait()
        self.close_connection = self.close_connection or cut is not None

    def log_message(self, *args: object) -> None:
        """Quiet: tests read `seen`."""
