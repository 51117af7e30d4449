"""`--log FILE`, `-c` and `nanollama logs`: one's own conversations in an SQLite file.

Nothing is kept without --log or NANOLLAMA_LOG. The table `answers` has one row for each answer: a
conversation, the model, the time, all messages up to the answer as JSON, and the answer.

Seam       `nanollama.print_answers` calls `record`, `nanollama.run_mode` calls `resumed`; Command
           (the row "logs" of COMMANDS).
Remove     delete this file and that row; the flags then name it.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import secrets
import sqlite3
from collections.abc import Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanollama import (
    Json,
    RequestError,
    UsageError,
    command_parser,
    first_line,
    log,
    preferred,
    put,
    use_model,
)

if TYPE_CHECKING:
    from nanollama import LLM, GenerationRequest, Settings

SCHEMA = """
CREATE TABLE IF NOT EXISTS answers (
    id INTEGER PRIMARY KEY, conversation TEXT NOT NULL, time TEXT NOT NULL, model TEXT NOT NULL,
    prompt TEXT, messages TEXT, answer TEXT NOT NULL, params TEXT NOT NULL
);
CREATE INDEX IF NOT EXISTS by_conversation ON answers (conversation);
"""
COLUMNS = "conversation, time, model, prompt, messages, answer, params"


def log_file(args: argparse.Namespace) -> str | None:
    """The file of --log, or of NANOLLAMA_LOG."""
    return getattr(args, "log", None) or os.environ.get("NANOLLAMA_LOG") or None


@contextlib.contextmanager
def opened(name: str) -> Iterator[sqlite3.Connection]:
    """The database in a file, which is made if it is missing; committed at the end. Raises
    RequestError."""
    path = Path(name).expanduser()
    try:
        with contextlib.closing(sqlite3.connect(path)) as database, database:
            database.row_factory = sqlite3.Row
            database.executescript(SCHEMA)
            os.chmod(path, 0o600)  # conversations are private
            yield database
    except (sqlite3.Error, OSError) as error:
        raise RequestError(f"{name}: cannot keep conversations: {first_line(error)}") from None


def record(settings: Settings, llm: LLM, request: GenerationRequest, new: list[Json]) -> None:
    """Keep an answer, with --log. An error is a warning: the answer has been given."""
    args = settings.args
    name = log_file(args)
    if not name:
        return
    if not getattr(args, "conversation", None):
        args.conversation = secrets.token_hex(8)
    given = dataclasses.asdict(request.params).items()
    params = {key: value for key, value in given if value not in (None, (), {}, False)}
    messages = None
    if request.messages is not None:
        noted: Any = preferred("answers.images", "as_notes", lambda message: message)
        messages = [*map(noted, request.messages), *new]  # images are not kept
        if not request.is_new_turn:  # the answer goes on with the last message
            last, rest = request.messages[-1], new[0]
            names = [name for name in ("content", "reasoning_content") if name in last]
            whole = {name: last[name] + rest.get(name, "") for name in names}
            messages[-2:] = [rest | whole]
    row = (
        args.conversation,
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        settings.model,
        request.prompt if isinstance(request.prompt, str) else None,
        as_text(messages),
        new[-1]["content"],
        as_text(params),
    )
    try:
        with opened(name) as database:
            database.execute(f"INSERT INTO answers ({COLUMNS}) VALUES (?, ?, ?, ?, ?, ?, ?)", row)
    except RequestError as error:
        log.warning(f"warning: {error}")


def as_text(value: Any) -> str | None:
    """JSON, in which a lone surrogate, which no file can hold, is a question mark."""
    if value is None:
        return None
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text.encode("utf-8", "replace").decode("utf-8")


def resumed(settings: Settings) -> Settings:
    """The settings with the last conversation of the log, with --continue. Its model is used unless
    another one is named. Raises UsageError and RequestError."""
    args = settings.args
    if not getattr(args, "goes_on", False):
        return settings
    name = log_file(args)
    if not name or not Path(name).expanduser().is_file():
        raise UsageError(f"{name or '--continue'}: no log; keep conversations with --log FILE")
    with opened(name) as database:
        text = f"SELECT {COLUMNS} FROM answers WHERE messages NOT NULL ORDER BY id DESC LIMIT 1"
        row = database.execute(text).fetchone()
    if row is None:
        raise UsageError(f"{name}: holds no conversation yet")
    if not (args.models or args.modelfile):
        settings = use_model(settings, row["model"])
    messages = tuple(json.loads(row["messages"]))
    settings.args.conversation = row["conversation"]
    if messages[0]["role"] == "system":
        settings.args.system, messages = messages[0]["content"], messages[1:]
    modelfile = dataclasses.replace(settings.modelfile, messages=messages)
    log.warning(f"continues a conversation of {len(messages)} messages with {settings.model}")
    return dataclasses.replace(settings, modelfile=modelfile)


# ---- the command ---------------------------------------------------------------------------------


def conversations(name: str, query: str) -> list[sqlite3.Row]:
    """The last answer of each conversation that holds a text, the latest first."""
    text = (
        "SELECT * FROM answers WHERE id IN (SELECT max(id) FROM answers GROUP BY conversation) "
        "AND instr(lower(coalesce(prompt, '') || coalesce(messages, '') || answer), lower(?)) "
        "ORDER BY id DESC"
    )
    with opened(name) as database:
        return list(database.execute(text, (query,)))


def question(row: sqlite3.Row) -> str:
    """The first message of the user, as one line."""
    messages = json.loads(row["messages"] or "[]")
    users = (m["content"] for m in messages if m["role"] == "user")
    text = " ".join(str(next(users, row["prompt"] or "")).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def transcript(row: sqlite3.Row) -> str:
    """A conversation as text."""
    messages = json.loads(row["messages"] or "null")
    if messages is None:
        return f"{row['prompt']}{row['answer']}\n"
    return "".join(f"{m['role']}: {m['content']}\n\n" for m in messages)


def run(argv: list[str]) -> int:
    """`logs [ID]`: list the conversations of a log, or print one."""
    parser = command_parser("logs")
    parser.add_argument("ref", nargs="?", metavar="ID", help="print this conversation, or `last`")
    parser.add_argument("--log", metavar="FILE", help="the file (or NANOLLAMA_LOG)")
    parser.add_argument("--query", "-q", metavar="TEXT", default="", help="those that hold a text")
    parser.add_argument("--json", action="store_true", help="print JSON lines")
    args = parser.parse_args(argv)
    name = log_file(args)
    if not name or not Path(name).expanduser().is_file():
        raise UsageError(f"{name or 'logs'}: no such log; keep conversations with --log FILE")
    rows = conversations(name, args.query)
    if args.ref:
        rows = rows[:1] if args.ref == "last" else [r for r in rows if is_named(r, args.ref)]
        if len(rows) != 1:
            raise UsageError(f"{args.ref}: {len(rows)} conversations of {name} have this id")
    for row in rows:
        if args.json:
            put(json.dumps(whole(row), ensure_ascii=False) + "\n")
        elif args.ref:
            put(transcript(row))
        else:
            put(f"{row['conversation'][:8]}  {row['time'][:16]}  {row['model']}  {question(row)}\n")
    return 0


def is_named(row: sqlite3.Row, name: str) -> bool:
    return str(row["conversation"]).startswith(name)


def whole(row: sqlite3.Row) -> Json:
    """A row as an object."""
    parts = {name: json.loads(row[name] or "null") for name in ("messages", "params")}
    return {**dict(zip(row.keys(), row)), **parts}
