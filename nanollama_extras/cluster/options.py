"""`--ray` and `--tensor-parallel`: the options of a cluster, and the modes that run on one.

Seam       `nanollama.build_parser` calls `add_options`, which adds `enter` to the parser's default
           of that name; `nanollama.run_mode` calls it before a mode runs. The modes are modules
           beside this one, imported when they run: cluster.serve, cluster.batch,
           cluster.tensor_parallel.
Remove     delete the folder; the flags then name it. Ray itself is the extra package `cluster`.
"""

from __future__ import annotations

import argparse
import os
import re
import socket
from typing import TYPE_CHECKING, Any

from nanollama import UsageError, extra, first_line, library, option_group

if TYPE_CHECKING:
    from nanollama import Settings

LOCAL, NOT_GIVEN = "local", ""  # values of --ray: without an address; implied by another option


class NeedsRay(argparse.Action):
    """Stores a value, or that a flag was given, and notes that it has no effect without --ray."""

    def __call__(self, parser: Any, namespace: Any, value: Any, flag: str | None = None) -> None:
        setattr(namespace, self.dest, value if self.nargs is None else True)
        namespace.ray = NOT_GIVEN if namespace.ray is None else namespace.ray


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of a cluster."""
    add = option_group(parser, "cluster")
    text = "with --serve or --batch-file: run on Ray, here or on the cluster at ADDRESS (or auto)"
    add("--ray ADDRESS", text, nargs="?", const=LOCAL)
    text = "with --ray: least and most replicas, or their number (default: 1)"
    add("--replicas MIN:MAX", text, replica_range, action=NeedsRay)
    text = "with --batch-file and --ray: answers in the order in which they are done"
    add("--unordered", text, action=NeedsRay, nargs=0)
    text = "with --ray: cores of a replica, also its threads (default: --threads, or 1)"
    add("--num-cpus N", text, int, action=NeedsRay)
    text = "split the model over N processes of this machine; torchrun does over several"
    add("--tensor-parallel N", text, int)
    parser.set_defaults(enter=[enter, *(parser.get_default("enter") or ())])


def enter(settings: Settings, argv: list[str]) -> int | None:
    """Run the mode of the command line in other processes -> the exit code; None to run it here.
    Raises UsageError, PackageError and others of the modes."""
    if settings.args.ray is not None:
        return run(settings)
    if settings.args.tensor_parallel is None and "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    split = extra("cluster.tensor_parallel", "--tensor-parallel")
    code: int | None = split.enter(settings, argv)
    return code


def replica_range(text: str) -> tuple[int, int]:
    """The least and the most of "2:8", or of "2". Raises UsageError."""
    numbers = re.fullmatch(r"(\d{1,5})(?::(\d{1,5}))?", text)
    least, most = (int(numbers[1]), int(numbers[2] or numbers[1])) if numbers else (0, 0)
    if not 1 <= least <= most:
        raise UsageError(f"--replicas is {text}; give MIN:MAX, such as 1:4, or a number from 1")
    return least, most


def check_address(address: str) -> None:
    """Refuse HOST:PORT where nothing listens: Ray itself would try for minutes. Raises
    UsageError."""
    found = re.fullmatch(r"(?:ray://)?(\[.+\]|[^:/]+):(\d{1,5})", address)
    try:
        if found:
            socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=5).close()
    except (OSError, OverflowError) as error:
        raise UsageError(f"--ray: {address} cannot be reached: {first_line(error)}") from None


def import_ray(*submodules: str) -> Any:
    """Ray, with submodules. Raises PackageError, with the command that installs it."""
    return library("ray", *submodules, install='pip install ".[cluster]"')


def run(settings: Settings) -> int:
    """Run the mode of the command line on Ray. Raises UsageError and PackageError."""
    if settings.args.ray == NOT_GIVEN:
        raise UsageError("--replicas, --num-cpus and --unordered need --ray")
    if settings.args.tensor_parallel is not None:
        raise UsageError("--ray and --tensor-parallel do not go together")
    check_address(settings.args.ray)
    if settings.args.batch_file is not None and not settings.args.embed:
        return int(extra("cluster.batch", "--batch-file --ray").run(settings))
    if not settings.args.serve:
        raise UsageError("--ray needs --serve or --batch-file, without --embed")
    if settings.args.unordered:
        raise UsageError("--unordered needs --batch-file")
    import_ray("serve")
    return int(extra("cluster.serve", "--serve --ray").run(settings))
