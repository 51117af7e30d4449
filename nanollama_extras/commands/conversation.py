"""Commands of `--interactive` beyond the core's: /save, /load, /prompt, /tokens; and its history.

Seam: the rows of MORE_COMMANDS in nanollama.py. Each names a function here that takes the
conversation and the text after the command. To remove it, delete this module and those rows.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from nanollama import GenerationRequest, RequestError, UsageError, local_path, log, read_json

if TYPE_CHECKING:
    from nanollama import Repl


def open_history(path: Path) -> None:
    """Edit lines with a history that is kept in a file between sessions."""
    try:
        import readline
    except ImportError:  # on Windows, input() offers no history
        return

    def save_history() -> None:
        with contextlib.suppress(OSError):
            path.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(path)

    with contextlib.suppress(OSError):
        readline.read_history_file(path)
    readline.set_history_length(1000)
    atexit.register(save_history)


def save(repl: Repl, argument: str) -> None:
    """/save FILE. Raises UsageError and RequestError."""
    if not argument:
        raise UsageError("/save needs a file name")
    body = {"model": repl.settings.model, "messages": repl.messages}
    try:
        Path(os.path.expanduser(argument)).write_text(
            json.dumps(body, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise RequestError(f"{argument}: cannot be written: {reason}") from None
    log.warning(f"saved {len(repl.messages)} messages to {argument}")


def load(repl: Repl, argument: str) -> None:
    """/load FILE. Raises UsageError."""
    path = local_path(argument)
    if path is None or not path.is_file():
        raise UsageError(f"{argument or '/load'}: no such file")
    messages = read_json(path).get("messages")
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("content"), str) and "role" in m for m in messages
    ):
        raise UsageError(f"{argument}: holds no list of messages as /save writes it")
    repl.messages = messages
    log.warning(f"loaded {len(messages)} messages from {argument}")


def prompt(repl: Repl, argument: str) -> None:
    """/prompt: the exact text that was last sent to the model."""
    log.warning(repl.llm.render(repl.sent or repl.messages, repl.tools))


def tokens(repl: Repl, argument: str) -> None:
    """/tokens: the same as token ids, each with its text."""
    sent = GenerationRequest(messages=repl.sent or repl.messages, tools=repl.tools)
    ids = repl.llm.prompt_ids(sent)
    log.warning(" ".join(f"{i}:{repl.llm.tokenizer.piece(i)!r}" for i in ids))
    log.warning(f"{len(ids)} tokens")
