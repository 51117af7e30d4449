"""The conversation of `--interactive`, `run` and `chat` with all its commands: messages of several
lines, an editor, other models, parameters; and the end of old turns when the context is full.

Seam       `Conversation` is a subclass of `nanollama.Repl`; a command /NAME TEXT is a method
           do_NAME(TEXT), and a row of TALK_HELP. The terminal is that of commands.terminal, the
           lines about settings those of commands.details; `/explain`, `/why` and `/branch` are in
           commands.xray.
Remove     delete this file; the core's /help, /clear and /quit remain.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanollama import (
    GenerationRequest,
    Json,
    ModelStore,
    NanollamaError,
    Repl,
    RequestError,
    SamplingParams,
    UsageError,
    cache_root,
    describe,
    extra,
    local_path,
    log,
    notify,
    open_checkpoint,
    preferred,
    print_answers,
    print_speed,
    read_json,
    set_parameter,
    split_word,
    use_model,
)
from nanollama_extras.commands import terminal
from nanollama_extras.commands.details import settings_lines

if TYPE_CHECKING:
    from nanollama import LLM, Settings

TALK_HELP = '''\
  /branch N TEXT      another answer, in which TEXT, or a token id, is in the place of token N
  /clear              forget all messages but the system prompt
  /continue           go on with an answer that was cut
  /edit [TEXT]        write a message in $EDITOR; so does Ctrl-G
  /explain            shade tokens by their probability, and mark surprising ones; or stop that
  /help, /?           print this list
  /image FILE [TEXT]  send an image with the next message, or with TEXT; so does a dropped file
  /load FILE          continue a conversation written by /save
  /model NAME         go on with another model
  /prompt             print the text last sent to the model
  /quit, /exit        leave; so does Ctrl-D
  /retry              answer the last message again
  /save FILE          write the conversation to a JSON file
  /set NAME VALUE     change a sampling parameter, as in /set temperature 0.2 or /set seed none
  /show               print the model and the sampling parameters
  /system [TEXT]      set or print the system prompt
  /tokens             print the token ids last sent, with their text
  /tools              list the tools that the model may call
  /undo               remove the last message and its answer
  /why [N]            the candidates of token N through every stage of the sampler; or all tokens
  """                 start and end a message of several lines; pasted lines are one message
  quit, exit, clear   like /quit, /exit, /clear; Ctrl-C stops an answer, Tab completes'''
NO_VALUE = {"seed": None, "stop": (), "max_tokens": None, "thinking_budget": None}  # of /set X none
ROOM = 4  # a part of the context, one in so many, that an answer without a limit gets at least


class Conversation(Repl):
    """A conversation with all commands."""

    def __init__(self, settings: Settings, llm: LLM, toolbox: Any = None) -> None:
        super().__init__(settings, llm, toolbox)
        self.sent: list[Json] = []  # messages of the last prompt
        self.retried: tuple[Json, int] = {}, 0  # the message that /retry answered; how often
        self.tools: list[Json] | None = toolbox.tools if toolbox else None
        if getattr(settings.args, "explain", False):
            self.do_explain("")
        self.images: list[Json] = []  # of the next message
        if names := getattr(settings.args, "images", []):
            self.images = extra("commands.images", "--image").file_parts(names)

    def run(self) -> int:
        if self.is_terminal:
            names = [name[3:] for name in dir(self) if name.startswith("do_")]
            terminal.open_lines(cache_root() / "history", sorted(names))
        return super().run()

    def read_message(self) -> str:
        """A line, or all lines between two triple quotes. Raises UsageError."""
        text = self.read_line(">>> ")
        if not text.lstrip().startswith('"""'):
            return text.strip()
        lines = [text.lstrip()[3:]]
        try:
            while '"""' not in lines[-1]:
                lines.append(self.read_line("... "))
        except EOFError:
            raise UsageError('the message was not sent: no """ closed it') from None
        return "\n".join(lines).replace('"""', "", 1).strip("\n")

    def handle(self, text: str) -> None:
        """As Repl.handle; files that were dropped on the terminal are images of the message."""
        dropped: Any = preferred("commands.images", "dropped", lambda text: ([], text))
        names, text = dropped(text)
        self.add_images(names)
        super().handle(text)

    def add_images(self, names: list[str]) -> None:
        """Keep images for the next message. Raises RequestError."""
        if names:
            images = extra("commands.images", "/image")
            self.images += images.file_parts(names)
            log.warning(f"image: {', '.join(map(os.path.basename, names))}")

    def do_image(self, argument: str) -> None:
        """/image FILE [TEXT]: an image for the next message, which TEXT is. Raises UsageError."""
        names, text = extra("commands.images", "/image").dropped(argument, is_whole=True)
        if not names:
            problem = f"{argument}: no such image" if argument else "/image needs a file"
            raise UsageError(f"{problem}; give the path of a PNG, JPEG, WebP or GIF file")
        self.add_images(names)
        if text:
            self.answer([*self.messages, {"role": "user", "content": text}])

    def with_images(self, messages: list[Json]) -> list[Json]:
        """The messages with the images that wait in the last one, unless that was sent before."""
        *before, last = messages
        if not self.images or any(last is message for message in self.messages):
            return messages
        content = extra("commands.images", "/image").with_images(self.images, last["content"])
        self.images = []
        return [*before, {**last, "content": content}]

    def answer(self, messages: list[Json]) -> None:
        """As Repl.answer; a full context loses its oldest turns, and keys wait."""
        messages = self.with_images(messages)
        most, n_ctx = self.values["max_tokens"], self.llm.engine.n_ctx
        room = n_ctx // ROOM if most is None else most
        messages = fit_context(self.llm, messages, room, self.tools)
        with terminal.silent_keys():
            super().answer(messages)
        # up to the last answer: calls of tools and their results are messages, too
        self.sent = self.messages[:-1]

    def do_help(self, _: str) -> None:
        log.warning(TALK_HELP)

    def do_clear(self, argument: str) -> None:
        self.sent, self.images, args = [], [], self.settings.args
        args.conversation = None  # a new one in the log
        if getattr(args, "goes_on", False):
            modelfile = dataclasses.replace(self.settings.modelfile, messages=())
            self.settings = dataclasses.replace(self.settings, modelfile=modelfile)
        super().do_clear(argument)

    def do_continue(self, _: str) -> None:
        """/continue: go on with the last answer. Raises UsageError."""
        last = self.messages[-1] if self.messages else {}
        if last.get("role") != "assistant" or "tool_calls" in last:
            raise UsageError("there is no answer to continue")
        llm, params = self.llm, SamplingParams(**self.values)
        request = GenerationRequest(
            messages=self.messages,
            params=params,
            template_kwargs={"continue_final_message": True, "add_generation_prompt": False},
        )
        before = dataclasses.replace(llm.engine.stats)
        with terminal.silent_keys():
            (new,) = print_answers(self.settings, llm, request, None, catch=True)
        for name in ("reasoning_content", "content"):
            if name in last:
                new[name] = last[name] + new.get(name, "")
        self.messages = [*self.messages[:-1], new]
        print_speed(self.settings, llm.engine.stats.since(before))

    def do_edit(self, argument: str) -> None:
        """/edit [TEXT]: a message from the editor. Raises UsageError."""
        if not self.is_terminal:
            raise UsageError("/edit needs a terminal")
        if text := terminal.edited(argument):
            log.warning(text)
            self.answer([*self.messages, {"role": "user", "content": text}])

    def do_model(self, argument: str) -> None:
        """/model NAME: go on with another model; without a name, print the present one."""
        if argument:
            settings = use_model(self.settings, argument)
            open_checkpoint(ModelStore().resolve(settings.model, settings.args.revision))
            old = dataclasses.asdict(self.settings.params(self.llm.sampling))
            changed = {n: v for n, v in self.values.items() if v != old[n]}
            self.exchange(settings)
            self.values = dataclasses.asdict(settings.params(self.llm.sampling)) | changed
        log.warning(f"model: {self.settings.model}")

    def opened(self, settings: Settings) -> Any:
        """A model, whose tokens are watched if /explain asks for that."""
        llm = settings.load()
        explains = self.values["logprobs"]
        return extra("commands.xray", "/explain").Watched(llm) if explains else llm

    def exchange(self, settings: Settings) -> None:
        """Load another model into the memory of the present one, which is loaded again if that
        fails. Raises NanollamaError, and EOFError if neither can be loaded."""
        del self.llm
        gc.collect()
        notify("kernels.memory", "return_unused_memory")
        try:
            self.llm = self.opened(settings)
        except (NanollamaError, KeyboardInterrupt) as error:
            error.__traceback__ = None  # whose frames hold what was loaded
            try:
                self.llm = self.opened(self.settings)
            except (NanollamaError, KeyboardInterrupt):
                log.error(f"error: {error}; {self.settings.model} cannot be loaded again")
                raise EOFError from None
            raise
        self.settings = settings

    def do_explain(self, _: str) -> None:
        """/explain: begin, or end, to shade tokens by their probability."""
        extra("commands.xray", "/explain").toggle(self)

    def do_why(self, argument: str) -> None:
        """/why [N]: why a token of the last answer was taken. Raises UsageError."""
        extra("commands.xray", "/why").why(self, argument)

    def do_branch(self, argument: str) -> None:
        """/branch N ID|TEXT: the last answer with another token N. Raises UsageError."""
        extra("commands.xray", "/branch").branch(self, argument)

    def do_save(self, argument: str) -> None:
        """/save FILE. Raises UsageError and RequestError."""
        if not argument:
            raise UsageError("/save needs a file name")
        body = {"model": self.settings.model, "messages": self.messages}
        try:
            Path(os.path.expanduser(argument)).write_text(
                json.dumps(body, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
            )
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise RequestError(f"{argument}: cannot be written: {reason}") from None
        log.warning(f"saved {len(self.messages)} messages to {argument}")

    def do_load(self, argument: str) -> None:
        """/load FILE. Raises UsageError."""
        path = local_path(argument)
        if path is None or not path.is_file():
            raise UsageError(f"{argument or '/load'}: no such file")
        messages = read_json(path).get("messages")
        if not isinstance(messages, list) or not all(map(is_message, messages)):
            raise UsageError(f"{argument}: holds no list of messages as /save writes it")
        self.messages = messages
        log.warning(f"loaded {len(messages)} messages from {argument}")

    def do_prompt(self, _: str) -> None:
        """/prompt: the exact text that was last sent to the model."""
        sent = GenerationRequest(messages=self.sent or self.messages, tools=self.tools)
        log.warning(self.llm.encode_request(sent)[1])

    def do_tokens(self, _: str) -> None:
        """/tokens: the same as token ids, each with its text."""
        sent = GenerationRequest(messages=self.sent or self.messages, tools=self.tools)
        ids, _ = self.llm.encode_request(sent)
        log.warning(" ".join(f"{i}:{self.llm.tokenizer.piece(i)!r}" for i in ids))
        log.warning(f"{len(ids)} tokens")

    def do_tools(self, _: str) -> None:
        """/tools: each tool with the first line of its description."""
        functions = [tool["function"] for tool in self.tools or ()]
        width = max((len(function["name"]) for function in functions), default=0)
        for function in functions:
            line = (function["description"].strip().splitlines() or [""])[0]
            log.warning(f"  {function['name']:<{width}}  {line}".rstrip())
        if not functions:
            log.warning("no tools; start again with --tools FILE or --mcp FILE")

    def do_system(self, argument: str) -> None:
        """/system [TEXT]: set or print the system prompt."""
        rest = [m for m in self.messages if m["role"] != "system"]
        if argument:
            self.settings.args.system = argument
            self.messages = [{"role": "system", "content": argument}, *rest]
        log.warning(f"system: {self.settings.value('system')[0] or '(none)'}")

    def do_set(self, argument: str) -> None:
        """/set NAME VALUE: change a sampling parameter. Raises UsageError and RequestError."""
        name, value = split_word(argument)
        if not value:
            raise UsageError("/set needs a name and a value, as in /set temperature 0.2")
        if value.lower() == "none" and name in NO_VALUE:
            given = {name: NO_VALUE[name]}
        else:
            given = {}
            set_parameter(given, name, value.strip('"'))
        for key, parsed in given.items():
            if key not in self.values:
                raise UsageError(f"{name} cannot change now; start again with --{key} {value}")
            self.values[key] = parsed
            log.warning(f"{key} = {'none' if parsed in (None, ()) else parsed}")

    def do_show(self, _: str) -> None:
        """/show: the model and the sampling parameters, each with its origin."""
        settings, llm = self.settings, self.llm
        lines = describe(llm.checkpoint, settings, llm.template)
        now = settings.sampling(llm.sampling)
        now |= {n: (v, "now") for n, v in self.values.items() if v != now[n][0]}
        log.warning("\n".join([*lines, *settings_lines(settings, now)]))

    def without_last_turn(self) -> list[Json]:
        """The messages before the user's last one. Raises UsageError without one."""
        users = (i for i, m in enumerate(self.messages) if m["role"] == "user")
        last = max(users, default=None)
        if last is None:
            raise UsageError("there is no message yet")
        return self.messages[:last]

    def do_undo(self, _: str) -> None:
        """/undo: remove the last message and its answer. Raises UsageError."""
        self.messages = self.without_last_turn()
        log.warning(f"{len(self.messages)} messages left")

    def do_retry(self, _: str) -> None:
        """/retry: answer the last message again. A fixed seed grows by one at each retry, so that
        the answers differ, repeatably. Raises UsageError."""
        messages, values = self.without_last_turn(), self.values
        question = self.messages[len(messages)]
        retried, num_retries = self.retried
        self.retried = question, num_retries + 1 if retried is question else 1
        seed = SamplingParams(**values).seed
        if seed is not None:
            self.values = {**values, "seed": seed + self.retried[1]}
        try:
            self.answer([*messages, question])
        finally:
            self.values = values


def is_message(message: Any) -> bool:
    is_object = isinstance(message, dict) and isinstance(message.get("content"), (str, list))
    return is_object and "role" in message


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
