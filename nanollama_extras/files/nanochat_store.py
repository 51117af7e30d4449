"""Models in nanochat's own directory: the choice of a checkpoint by source, tag and step.

Seam: FINDERS. The core calls `find_model` for the name "nanochat" and for a directory with one of
nanochat's folders in it, `add_options` for --source, --model-tag and --step, and `chosen` for the
model that these choose.
To remove it: delete this file and its test, and the lines of the core that name it.
Source: https://github.com/karpathy/nanochat (nanochat/checkpoint_manager.py)
"""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanollama import ModelNotFoundError, UsageError, local_path, option_group

if TYPE_CHECKING:
    from nanollama import Settings

FOLDERS = {  # folder -> its source; a later one replaces an earlier one
    "base_checkpoints": "base",
    "mid_checkpoints": "mid",
    "rl_checkpoints": "rl",
    "chatrl_checkpoints": "rl",
    "sft_checkpoints": "sft",
    "chatsft_checkpoints": "sft",
}


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose one of nanochat's models."""
    add = option_group(parser, "nanochat")
    text = "kind of nanochat's models: sft, rl, mid, base (default: sft)"
    add("--source -i NAME", text, choices=("sft", "rl", "mid", "base"))
    add("--model-tag -g TAG", "the model with this tag, as in d20 (default: the largest)")
    add("--step -s N", "the model after N steps (default: the last)", int)


def chosen(settings: Settings, name: str | None) -> str | None:
    """The model that these options choose; without any of them, the one of that name. Raises as
    `choose_model`."""
    choice = [getattr(settings.args, name, None) for name in ("source", "model_tag", "step")]
    if choice == [None] * 3:
        return name
    return str(choose_model(name or settings.modelfile.model or "nanochat", *choice))


def find_model(reference: str, root: Path) -> Path:
    """The model in nanochat's directory that runs unless another one is chosen."""
    return choose_model(reference, None, None, None)


def choose_model(reference: str, source: str | None, tag: str | None, step: int | None) -> Path:
    """The model_NNNNNN.pt in a directory of nanochat, or in NANOCHAT_BASE_DIR (~/.cache/nanochat)
    where `reference` is not a path.

    By default: the source sft, the deepest model named dNN, else the model written last, and its
    last step. Raises ModelNotFoundError, listing the choices, and UsageError for a reference to
    other models."""
    default = os.environ.get("NANOCHAT_BASE_DIR") or "~/.cache/nanochat"
    base = local_path(reference)
    if not base or not any((base / name).is_dir() for name in FOLDERS):
        if reference != "nanochat":
            raise UsageError(
                "--source, --model-tag and --step choose one of nanochat's models; "
                f"{reference} is neither nanochat nor a directory of its models"
            )
        base = Path(default).expanduser()
    sources = {name: base / place for place, name in FOLDERS.items() if (base / place).is_dir()}
    folder = choose(base, "checkpoints of source", sources, source or "sft", max)
    tags = {path.name: path for path in folder.iterdir() if path.is_dir()}
    model = choose(folder, "model tag", tags, tag, deepest_or_latest)
    files = ((path, re.fullmatch(r"model_(\d+)\.pt", path.name)) for path in model.iterdir())
    return choose(model, "step", {int(m[1]): path for path, m in files if m}, step, max)


def choose(
    directory: Path,
    kind: str,
    choices: Mapping[Any, Path],
    wanted: Any,
    default: Callable[[Mapping[Any, Path]], Any],
) -> Path:
    """The choice that is wanted; for None, the default one. Raises ModelNotFoundError."""
    if choices and wanted is None:
        wanted = default(choices)
    if wanted in choices:
        return choices[wanted]
    known = ", ".join(map(str, sorted(choices))) or "nothing"
    name = "" if wanted is None else f" {wanted}"
    raise ModelNotFoundError(f"{directory}: no {kind}{name}; there is: {known}")


def deepest_or_latest(tags: Mapping[str, Path]) -> str:
    """The tag of the deepest model, or of the directory written last where no tag tells a depth."""
    depths = {tag: int(m[1]) for tag in tags if (m := re.match(r"d(\d+)", tag))}
    return max(depths or tags, key=lambda tag: depths.get(tag) or tags[tag].stat().st_mtime)
