"""Commands of `--interactive` beyond /help, /clear and /quit; messages of several lines; the
history of lines; and the end of old turns when the context is full.

Seam: TALK_COMMANDS in nanollama.py. Each names a function here that takes the conversation and
the text after the command; TALK_HELP here is the text of /help. Repl also calls `open_history`,
`whole` and `fit_context`. To remove it, delete this module and those rows.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

from nanollama import (
    GenerationRequest,
    Json,
    RequestError,
    SamplingParams,
    UsageError,
    describe,
    local_path,
    log,
    read_json,
    set_parameter,
    settings_lines,
    split_word,
)

if TYPE_CHECKING:
    from nanollama import LLM, Repl

TALK_HELP = '''\
  /clear              forget all messages but the system prompt
  /help               print this list
  /load FILE          continue a conversation written by /save
  /prompt             print the text last sent to the model
  /quit, /exit        leave; so does Ctrl-D
  /retry              answer the last message again
  /save FILE          write the conversation to a JSON file
  /set NAME VALUE     change a sampling parameter, as in /set temperature 0.2
  /show               print the model and the sampling parameters
  /system [TEXT]      set or print the system prompt
  /tokens             print the token ids last sent, with their text
  /tools              list the tools that the model may call
  /undo               remove the last message and its answer
  """                 start and end a message of several lines
  quit, exit, clear   like /quit, /exit, /clear; Ctrl-C stops an answer'''
# the message that /retry answered last, and the number of its retries
RETRIES: weakref.WeakKeyDictionary[Repl, tuple[Json, int]] = weakref.WeakKeyDictionary()


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
    if os.environ.get("TERM") != "dumb":  # which shows the marks that this sends
        readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one message
    atexit.register(save_history)


def whole(repl: Repl, text: str) -> str:
    """A message that begins with this line: the line, or all lines between two triple quotes.
    Raises UsageError."""
    if not text.lstrip().startswith('"""'):
        return text.strip()
    lines = [text.lstrip()[3:]]
    try:
        while '"""' not in lines[-1]:
            lines.append(repl.read_line("... "))
    except EOFError:
        raise UsageError('the message was not sent: no """ closed it') from None
    return "\n".join(lines).replace('"""', "", 1).strip("\n")


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
    log.warning(repl.llm.template.prompt(repl.sent or repl.messages, repl.tools))


def tokens(repl: Repl, argument: str) -> None:
    """/tokens: the same as token ids, each with its text."""
    sent = GenerationRequest(messages=repl.sent or repl.messages, tools=repl.tools)
    ids, _ = repl.llm.encode_request(sent)
    log.warning(" ".join(f"{i}:{repl.llm.tokenizer.piece(i)!r}" for i in ids))
    log.warning(f"{len(ids)} tokens")


def tools(repl: Repl, argument: str) -> None:
    """/tools: each tool with the first line of its description."""
    functions = [tool["function"] for tool in repl.tools or ()]
    width = max((len(function["name"]) for function in functions), default=0)
    for function in functions:
        line = (function["description"].strip().splitlines() or [""])[0]
        log.warning(f"  {function['name']:<{width}}  {line}".rstrip())
    if not functions:
        log.warning("no tools; start again with --tools FILE or --mcp FILE")


def fit_context(
    llm: LLM, messages: list[Json], num_reserved: int, tools: list[Json] | None = None
) -> list[Json]:
    """Drop the oldest turns of a conversation, except system messages and the last message, until
    `num_reserved` tokens of the context, at most half of it, are free. Returns the rest."""
    n_ctx = llm.engine.n_ctx
    limit = n_ctx - min(num_reserved, n_ctx // 2)
    recent = list(messages)
    while len(llm.encode_request(GenerationRequest(messages=recent, tools=tools))[0]) > limit:
        turns = [i for i, m in enumerate(recent[:-1]) if m["role"] != "system"]
        if not turns:
            break
        # drop up to the next message of the user: a turn ends with its answers
        after = (i for i in turns[1:] if recent[i]["role"] == "user")
        end = next(after, len(recent) - 1)
        recent = [m for i, m in enumerate(recent) if i >= end or m["role"] == "system"]
    if num_dropped := len(messages) - len(recent):
        log.warning(
            f"(the context of {n_ctx} tokens is full: dropped the oldest {num_dropped} messages)"
        )
    return recent


def system(repl: Repl, argument: str) -> None:
    """/system [TEXT]: set or print the system prompt."""
    rest = [m for m in repl.messages if m["role"] != "system"]
    if argument:
        repl.settings.args.system = argument
        repl.messages = [{"role": "system", "content": argument}, *rest]
    log.warning(f"system: {repl.settings.value('system')[0] or '(none)'}")


def set(repl: Repl, argument: str) -> None:
    """/set NAME VALUE: change a sampling parameter. Raises UsageError and RequestError."""
    name, value = split_word(argument)
    if not value:
        raise UsageError("/set needs a name and a value, as in /set temperature 0.2")
    given: Json = {}
    set_parameter(given, name, value.strip('"'))
    for key, parsed in given.items():
        if key not in repl.values:
            raise UsageError(f"{name} cannot change now; start again with --{key} {value}")
        repl.values[key] = parsed
        log.warning(f"{key} = {parsed}")


def show(repl: Repl, argument: str) -> None:
    """/show: the model and the sampling parameters, each with its origin."""
    settings, llm = repl.settings, repl.llm
    lines = describe(llm.checkpoint, settings, llm.template)
    now = settings.sampling(llm.sampling)
    now |= {n: (v, "now") for n, v in repl.values.items() if v != now[n][0]}
    log.warning("\n".join([*lines, *settings_lines(settings, now)]))


def without_last_turn(repl: Repl) -> list[Json]:
    """The messages before the user's last one. Raises UsageError without one."""
    last = max((i for i, m in enumerate(repl.messages) if m["role"] == "user"), default=None)
    if last is None:
        raise UsageError("there is no message yet")
    return repl.messages[:last]


def undo(repl: Repl, argument: str) -> None:
    """/undo: remove the last message and its answer. Raises UsageError."""
    repl.messages = without_last_turn(repl)
    log.warning(f"{len(repl.messages)} messages left")


def retry(repl: Repl, argument: str) -> None:
    """/retry: answer the last message again. A fixed seed grows by one at each retry, so that the
    answers differ, repeatably. Raises UsageError."""
    messages, values = without_last_turn(repl), repl.values
    question = repl.messages[len(messages)]
    retried, num_retries = RETRIES.get(repl, ({}, 0))
    RETRIES[repl] = question, num_retries + 1 if retried is question else 1
    seed = SamplingParams(**values).seed
    if seed is not None:
        repl.values = {**values, "seed": seed + RETRIES[repl][1]}
    try:
        repl.answer([*messages, question])
    finally:
        repl.values = values
