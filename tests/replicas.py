"""What tests of replicas on Ray share: how they are started, watched and asked."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from serving import Live

import nanollama

CHAT = "/v1/chat/completions"
ENDLESS = {1: -100.0, 3: -100.0}  # logit_bias against </s> and <|im_end|> of the tiny models


def settings_for(path: Path, *options: str) -> nanollama.Settings:
    """The settings of a front whose tiny replicas never end a text themselves."""
    argv = ["--serve", "--ray", "local", "--model", str(path), "--alias", "tiny", *options]
    argv += ["--dtype", "float32", "--kernels", "torch"]
    argv += [f"--logit-bias={token}={bias}" for token, bias in ENDLESS.items()]
    parser = nanollama.build_parser()
    return nanollama.read_settings(parser.parse_args(argv))


def parents(pid: int) -> Iterator[int]:
    """The processes above one."""
    while pid > 1:
        pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        yield pid


def replica_pids(app: str) -> list[int]:
    """The processes of replicas that this process's Ray started."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError):
            command = (path / "cmdline").read_bytes()
            is_one = command.startswith(b"ray::ServeReplica:%s:Engine" % app.encode())
            if is_one and os.getpid() in parents(int(path.name)):
                found.append(int(path.name))
    return found


def run_stream(
    live: Live, path: str, body: Any, begun: Callable[[], Any] = lambda: None
) -> list[Any]:
    """The events of a stream. begun: called at the first one."""
    events: list[Any] = []
    with live.http.stream("POST", path, json=body) as response:
        for line in response.iter_lines():
            if line.startswith(("data: {", "{")):
                events.append(json.loads(line.removeprefix("data: ")))
                if len(events) == 1:
                    begun()
    return events


def text_of(events: list[Any]) -> str:
    """The text of the events of a chat's stream."""
    deltas = [event["choices"][0]["delta"] for event in events if event.get("choices")]
    return "".join(delta.get("content") or "" for delta in deltas)


def num_running(live: Live) -> int:
    """The sequences of all replicas that run or wait."""
    return sum(row["running"] + row["waiting"] for row in live.http.get("/stats").json()["workers"])
