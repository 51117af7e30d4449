"""Tool calls: how families of models write them, which functions an answer may call, and the calls
in an answer, taken apart as it comes.

Seam       Answer form. The core asks `read_tools` for the tools of a request body, `find_calls`
           for the functions that an answer may call, and `fit_to_template` for messages and tools
           that a template can render. It imports answers.sandboxed, to follow references, and
           answers.notations, for arguments that are not JSON.
Extend     a format of calls is a row of TOOL_FORMATS; a template without calls, of TOOL_MARKS.
Remove     delete this file and grammars.py; requests with tools or calls are then refused.
Source     https://huggingface.co/docs/transformers/chat_extras and each model's chat template
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import itertools
import json
import re
import secrets
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, NamedTuple

from nanollama import (
    Piece,
    RequestError,
    TemplateError,
    check_type,
    excerpt,
    first_line,
    held_back,
    log,
    message_text,
    refuse,
)
from nanollama_extras.answers.notations import NOTATIONS, LiteralReader, Notation
from nanollama_extras.answers.sandboxed import target

if TYPE_CHECKING:
    from nanollama import ChatTemplate, Fields, GenerationRequest, Json, Tokenizer


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether an answer calls functions, and which ones it may call."""

    mode: str = "auto"  # none, auto, required
    names: tuple[str, ...] | None = None  # the functions that may be called; None for all
    max_calls: int = 16

    @property
    def needs_tools(self) -> bool:
        return self.mode == "required" or bool(self.names)


@dataclass(frozen=True, slots=True)
class ToolFormat:
    """Text around the calls of a family of models: begin, call, between, call, .., end.

    An answer that contains `trigger` begins its calls there. Without a trigger, the text of a call
    up to its arguments must match."""

    call: str  # with NAME and ARGUMENTS
    begin: str = ""
    between: str = ""
    end: str = ""
    trigger: str = ""
    parameter: str = ""  # with KEY and VALUE, a string or JSON; "": all arguments are one object
    mark: str = ""  # with NAME: text of a rendered call, where models generate another
    notation: Notation | None = None  # of arguments that are neither JSON nor parameters

    def head(self, name: str) -> str:
        return self.call.partition("ARGUMENTS")[0].replace("NAME", name)

    @property
    def tail(self) -> str:
        return self.call.partition("ARGUMENTS")[2]

    def reader(self, schema: Mapping[str, Any]) -> JsonReader | ParameterReader | LiteralReader:
        """What reads the arguments of a call."""
        if self.notation:
            return LiteralReader(self.notation, self.tail)
        return ParameterReader(self, schema) if self.parameter else JsonReader()

    def spell(self, calls: Iterable[tuple[str, str]]) -> str:
        """Calls (name, arguments as JSON) as the model writes them."""
        texts = [
            self.head(name) + self.spell_arguments(arguments) + self.tail
            for name, arguments in calls
        ]
        return self.begin + self.between.join(texts) + self.end

    def spell_arguments(self, arguments: str) -> str:
        pairs = parsed_object(arguments)
        if self.notation and isinstance(pairs, dict):
            return self.notation.spell(pairs)
        if not self.parameter or not isinstance(pairs, dict):
            return arguments
        before, after = self.parameter.split("VALUE")
        return "".join(
            before.replace("KEY", key) + json_text(value) + after for key, value in pairs.items()
        )


CALL = '{"name": "NAME", "arguments": ARGUMENTS}'
DEEPSEEK = "<｜tool▁call▁begin｜>{}ARGUMENTS{}<｜tool▁call▁end｜>", "<｜tool▁calls▁begin｜>"
# A format is recognized by a call that the template renders. Unknown templates get "hermes".
TOOL_FORMATS = {
    "hermes": ToolFormat(f"<tool_call>\n{CALL}\n</tool_call>", "", "\n", "", "<tool_call>"),
    "smollm2": ToolFormat(CALL, "<tool_call>[\n", ",\n", "\n]</tool_call>", "<tool_call>"),
    "llama": ToolFormat('{"name": "NAME", "parameters": ARGUMENTS}', "", "; "),
    "mistral": ToolFormat(CALL, "[TOOL_CALLS][", ", ", "]", "[TOOL_CALLS]"),
    "mistral-args": ToolFormat("[TOOL_CALLS]NAME[ARGS]ARGUMENTS", trigger="[TOOL_CALLS]"),
    "granite": ToolFormat(CALL, "<|tool_call|>[", ", ", "]", "<|tool_call|>"),
    "deepseek": ToolFormat(
        DEEPSEEK[0].format("function<｜tool▁sep｜>NAME\n```json\n", "\n```"),
        DEEPSEEK[1],
        "\n",
        "<｜tool▁calls▁end｜>",
        DEEPSEEK[1],
    ),
    "deepseek-v3.1": ToolFormat(
        DEEPSEEK[0].format("NAME<｜tool▁sep｜>", ""),
        DEEPSEEK[1],
        "",
        "<｜tool▁calls▁end｜>",
        DEEPSEEK[1],
    ),
    "qwen3-coder": ToolFormat(
        "<tool_call>\n<function=NAME>\nARGUMENTS</function>\n</tool_call>",
        between="\n",
        trigger="<tool_call>",
        parameter="<parameter=KEY>\nVALUE\n</parameter>\n",
    ),
    "seed-oss": ToolFormat(
        "<seed:tool_call>\n<function=NAME>\nARGUMENTS</function>\n</seed:tool_call>",
        between="\n",
        trigger="<seed:tool_call>",
        parameter="<parameter=KEY>VALUE</parameter>\n",
    ),
    "glm-4.5": ToolFormat(
        "<tool_call>NAME\nARGUMENTS</tool_call>",
        between="\n",
        trigger="<tool_call>",
        parameter="<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n",
    ),
    "glm-4.7": ToolFormat(
        "<tool_call>NAMEARGUMENTS</tool_call>",
        trigger="<tool_call>",
        parameter="<arg_key>KEY</arg_key><arg_value>VALUE</arg_value>",
    ),
    "harmony": ToolFormat(
        "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>ARGUMENTS",
        between="<|call|><|start|>assistant",
        mark=" to=functions.NAME<|channel|>commentary json<|message|>",
    ),
    "minimax-m2": ToolFormat(
        '<invoke name="NAME">\nARGUMENTS</invoke>\n',
        begin="<minimax:tool_call>\n",
        end="</minimax:tool_call>",
        trigger="<minimax:tool_call>",
        parameter='<parameter name="KEY">VALUE</parameter>\n',
    ),
    "gemma-4": ToolFormat(
        "<|tool_call>call:NAME{ARGUMENTS}<tool_call|>",
        trigger="<|tool_call>",
        notation=NOTATIONS["gemma"],
    ),
    "lfm2": ToolFormat(
        "NAME(ARGUMENTS)",
        "<|tool_call_start|>[",
        ", ",
        "]<|tool_call_end|>",
        "<|tool_call_start|>",
        notation=NOTATIONS["python"],
    ),
    "nemotron-2": ToolFormat(CALL, "<TOOLCALL>[", ", ", "]</TOOLCALL>", "<TOOLCALL>"),
}
# Text in a template that cannot render calls -> the format of its model. The first match counts.
TOOL_MARKS = {
    "[ARGS]": "mistral-args",
    "[TOOL_CALLS]": "mistral",
    "<|tool_call|>": "granite",
    "<|start_header_id|>": "llama",
    "tool▁call▁begin": "deepseek",
    "<|tool_list_start|>": "lfm2",
    "/no_think": "hermes",
    "named SmolLM": "smollm2",
}
PROBE = "probe_function"
TOOLS_PROMPT = """You can call these functions:
{tools}
To call one, answer with this alone, its name and its arguments filled in, and wait for the result:
{example}"""


@dataclass(frozen=True, slots=True)
class ToolStyle:
    """How a model calls functions, and what its template can render."""

    form: ToolFormat
    lists_tools: bool  # the template describes the tools, and the format of calls is known
    writes_calls: bool  # the template renders calls and results


@lru_cache(maxsize=64)
def tool_style(template: ChatTemplate) -> ToolStyle:
    """Render a call, its result and a list of tools with a template to learn its style."""
    form, writes_calls = probe_calls(template)
    name = next((n for mark, n in TOOL_MARKS.items() if mark in (template.source or "")), "")
    form = form or TOOL_FORMATS.get(name)
    lists_tools = form is not None and renders_tools(template)
    return ToolStyle(form or TOOL_FORMATS["hermes"], lists_tools, writes_calls)


def renders_tools(template: ChatTemplate) -> bool:
    tool = {"type": "function", "function": {"name": PROBE, "description": PROBE}}
    with contextlib.suppress(TemplateError):
        return PROBE in template.render([{"role": "user", "content": "?"}], [tool])
    return False


def probe_calls(template: ChatTemplate) -> tuple[ToolFormat | None, bool]:
    """The format of a rendered call; and whether the template renders calls and results."""
    function = {"name": PROBE, "arguments": "{}"}
    text, call = "", {"id": "probe0001", "type": "function", "function": function}
    with contextlib.suppress(TemplateError):
        text = template.render(
            [
                {"role": "user", "content": "?"},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "probe0001", "content": "done" + PROBE},
            ]
        )
    heads = [
        (form.mark.replace("NAME", PROBE) or form.begin + form.head(PROBE), form)
        for form in TOOL_FORMATS.values()
    ]
    matches = [form for head, form in heads if head in text]
    # formats that differ in spaces only are the same
    matches += [form for head, form in heads if squeezed(head) in squeezed(text)]
    is_known = bool(matches) and "done" + PROBE in text
    return (matches[0] if is_known else None), is_known


def fit_to_template(
    template: ChatTemplate, messages: list[Mapping[str, Any]], tools: list[dict[str, Any]] | None
) -> tuple[list[Mapping[str, Any]], list[dict[str, Any]] | None]:
    """Messages and tools for a template to render: tools that it does not list are described in the
    system prompt, calls and results that it cannot write become content. Tools with `defer_loading`
    may be called, and are described in some message."""
    style = tool_style(template)
    tools = [tool for tool in tools or () if not tool.get("defer_loading")] or None
    if tools and not style.lists_tools:
        messages, tools = introduce_tools(messages, tools, style.form), None
    if not style.writes_calls:
        messages = [call_as_content(message, style.form) for message in messages]
    return messages, tools


def introduce_tools(
    messages: list[Mapping[str, Any]], tools: list[dict[str, Any]], form: ToolFormat
) -> list[Mapping[str, Any]]:
    """The messages with a system prompt that describes the tools."""
    lines = [json.dumps(tool.get("function", tool), ensure_ascii=False) for tool in tools]
    example = form.spell([("function_name", '{"argument": "value"}')])
    text = TOOLS_PROMPT.format(tools="\n".join(lines), example=example)
    first = messages[0] if messages else {}
    if first.get("role") in ("system", "developer"):
        content = message_text(first)
        return [{**first, "content": f"{content}\n\n{text}"}, *messages[1:]]
    return [{"role": "system", "content": text}, *messages]


def call_as_content(message: Mapping[str, Any], form: ToolFormat) -> Mapping[str, Any]:
    """A message with its calls written into its content; a result as a user's message."""
    if not isinstance(message, Mapping):
        return message
    if message.get("role") == "tool":
        return result_as_text(message)
    if not message.get("tool_calls"):
        return message
    functions = [call["function"] for call in message["tool_calls"]]
    calls = [(str(f["name"]), json_text(arguments_object(f.get("arguments")))) for f in functions]
    rest = {key: value for key, value in message.items() if key != "tool_calls"}
    content = message_text(rest)
    return {**rest, "content": content + form.spell(calls)}


def result_as_text(message: Mapping[str, Any]) -> dict[str, Any]:
    """The result of a call as a user's message."""
    content = message_text(message)
    return {"role": "user", "content": f"<tool_response>\n{content}\n</tool_response>"}


def arguments_object(value: Any) -> dict[str, Any]:
    """Arguments of a call as an object: JSON is read, an end that is missing is added; a value that
    is no object gets a name."""
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            return arguments_object(json.loads(value))
        if value.lstrip().startswith("{"):
            return completed_object(value)
    if isinstance(value, Mapping):
        return dict(value)
    return {} if value is None or value == "" else {"arguments": value}


def completed_object(text: str) -> dict[str, Any]:
    """The object that a text of JSON begins, without a member that has no value yet."""
    # not in the middle of an escape sequence
    text = re.sub(r"(?<!\\)((?:\\\\)*)\\(?:u[0-9a-fA-F]{0,3})?$", r"\1", text)
    closers, quoted, escaped, without_last = "", False, False, "{}"
    for i, character in enumerate(text):
        if quoted:
            quoted = escaped or character != '"'
            escaped = not escaped and character == "\\"
        elif character == '"':
            quoted = True
        elif character in "{[":
            closers = ("}" if character == "{" else "]") + closers
        elif character in "}]":
            closers = closers[1:]
        elif character == ",":
            without_last = text[:i] + closers
    found = (parsed_object(one) for one in (text + '"' * quoted + closers, without_last))
    return next((value for value in found if isinstance(value, dict)), {})


def parsed_object(value: Any) -> Any:
    """The object that a text of JSON holds; any other value as it is."""
    with contextlib.suppress(ValueError, RecursionError):
        if isinstance(value, str) and isinstance(parsed := json.loads(value), dict):
            return parsed
    return value


def json_text(value: Any) -> Any:
    """Text as it is, any other value as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# ---- arguments and their schemas -----------------------------------------------------------------

JSON_KINDS = "string integer number boolean null array object".split()
JSON_NAMES = dict(zip((str, int, float, bool, types.NoneType, list, dict), JSON_KINDS))
PYTHON_WORDS = {"True": "true", "False": "false", "None": "null"}  # as templates write these
BOUNDS = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"}
MAX_LEVELS, MAX_BRANCHES = 32, 64  # of a schema, and alternatives of an argument, that are read


def branches(
    schema: Any, root: Mapping[str, Any], num_levels: int = MAX_LEVELS
) -> Iterator[dict[str, Any]]:
    """Split a schema, a part of `root`, into alternatives that have at most one type each."""
    branch = dict(schema) if isinstance(schema, Mapping) and num_levels else {}
    kinds = branch.pop("type", None)
    known = [*filter(JSON_KINDS.__contains__, kinds if isinstance(kinds, list) else [kinds])]
    branch |= {"type": known if known[1:] else known[0]} if known else {}
    if isinstance(path := branch.pop("$ref", None), str):
        alternatives = [target(root, path)]
    elif keys := branch.keys() & {"anyOf", "oneOf"}:
        alternatives = branch.pop(min(keys))
        alternatives = alternatives if isinstance(alternatives, list) and alternatives else [{}]
    elif isinstance(branch.get("type"), list):
        alternatives = [{"type": kind} for kind in branch["type"]]
    else:
        alternatives = []
        yield branch
    for alternative in alternatives:
        keywords = alternative if isinstance(alternative, Mapping) else {}
        yield from branches({**branch, **keywords}, root, num_levels - 1)


class Argument:
    """One argument of a call that writes its arguments one by one.

    Its schema, a part of `root`, is split into alternatives. listed: values of an enum or const, as
    text -> JSON. texts: schemas of strings, which the model writes without quotes. others: schemas
    of values that it writes as JSON. kinds: types of JSON that text is read as."""

    def __init__(self, schema: Any, root: Mapping[str, Any], is_required: bool = False) -> None:
        self.is_required, self.listed = is_required, dict[str, str]()
        self.texts, self.others, self.kinds = list[Any](), list[Any](), set[str]()
        for branch in itertools.islice(branches(schema, root), MAX_BRANCHES):
            kind = branch.get("type")
            values = branch.get("enum", [branch["const"]] if "const" in branch else ())
            if isinstance(values, list) and values:
                fit = [v for v in values if kind in (None, "number", JSON_NAMES[type(v)])]
                self.listed |= {json_text(value): json_text([value])[1:-1] for value in fit}
            else:
                (self.texts if kind in (None, "string") else self.others).append(branch)
        for branch in self.texts + self.others:
            if "type" not in branch:
                self.kinds = {*JSON_NAMES.values()} - {"string"}
            elif branch in self.others and not (self.texts and branch.keys() & BOUNDS):
                self.kinds |= {branch["type"], branch["type"].replace("number", "integer")}
        self.is_text = not self.listed and not self.kinds

    def read(self, text: str) -> str | None:
        """The text of a value -> JSON; None where the schema allows no such value."""
        word = text.strip(" \t\r\n")
        word = PYTHON_WORDS.get(word, word)
        if value := self.listed.get(text, self.listed.get(word)):
            return value
        with contextlib.suppress(ValueError, RecursionError):
            if JSON_NAMES[type(json.loads(word, parse_constant=int))] in self.kinds:
                return word  # as parse_constant, int refuses NaN and Infinity
        return json.dumps(text, ensure_ascii=False) if self.texts or not self.others else None


def read_arguments(schema: Mapping[str, Any]) -> dict[str, Argument]:
    """The arguments that a function's schema names."""
    top = next(branches(schema, schema))
    required, properties = top.get("required"), top.get("properties")
    required = (
        [key for key in required if isinstance(key, str)] if isinstance(required, list) else []
    )
    properties = properties if isinstance(properties, Mapping) else {}
    named = dict.fromkeys(required, top.get("additionalProperties")) | dict(properties)
    return {key: Argument(part, schema, key in required) for key, part in named.items()}


class JsonReader:
    """Reads the arguments of a call, one JSON object, from behind its first brace.

    `read` takes text and returns how many characters of it are arguments, and these as JSON."""

    def __init__(self) -> None:
        self.depth = 1
        self.quoted = self.escaped = self.is_done = False

    def read(self, text: str) -> tuple[int, str]:
        for i, character in enumerate(text):
            if self.quoted:
                self.quoted = self.escaped or character != '"'
                self.escaped = not self.escaped and character == "\\"
            elif character == '"':
                self.quoted = True
            else:
                self.depth += (character == "{") - (character == "}")
            if not self.depth:
                self.is_done = True
                return i + 1, text[: i + 1]
        return len(text), text


class ParameterReader:
    """As JsonReader, for a call that writes its arguments one by one. Strings are passed on as they
    come, other values when they are complete."""

    def __init__(self, form: ToolFormat, schema: Mapping[str, Any]) -> None:
        self.arguments, self.is_done, self.comma = read_arguments(schema), False, ""
        self.argument: Argument | None = None  # whose value is being read
        before, after = form.parameter.split("VALUE")
        # one newline belongs to the format, a second one to the value
        newline = r"(?:\n|(?=[^\n]))" if before.endswith("\n") else ""
        self.before = re.compile(r"\s*" + spaced_pattern(before) + newline)
        self.ends = after.rstrip(), after.strip()
        self.after = re.compile(r"\n?" * after.startswith("\n") + re.escape(self.ends[1]))
        self.tail = re.compile(r"\s*" + spaced_pattern(form.tail))

    def read(self, text: str) -> tuple[int, str]:
        if self.argument is None:
            if match := self.before.match(text):
                self.argument = self.arguments.get(match[1]) or Argument(None, {})
                key = f"{self.comma}{json.dumps(match[1], ensure_ascii=False)}: "
                self.comma = ", "
                return match.end(), key + '"' * self.argument.is_text
            self.is_done = bool(self.tail.match(text))
            return 0, "}" * self.is_done
        is_text = self.argument.is_text
        num = is_text * (len(text) - held_back(text, self.ends))
        for end in self.after.finditer(text):
            value = self.argument.read(text[: end.start()])
            if value is not None:
                self.argument = None
                return end.end(), value[is_text:]
        return num, json.dumps(text[:num], ensure_ascii=False)[1:-1]


def spaced_pattern(literal: str, names: Iterable[str] = ()) -> str:
    """A regex for `literal`, one of `names` for NAME, with any space between words and signs."""
    known = {"NAME": f"({'|'.join(map(re.escape, names))})", "KEY": "(.+?)"}
    words = re.findall(r"NAME|KEY|\w+|[^\w\s]", literal)
    return r"\s*".join(known.get(word) or re.escape(word) for word in words)


def squeezed(text: str) -> str:
    return "".join(text.split())


def is_begun(text: str, starts: Iterable[str]) -> bool:
    """Whether a text is the beginning of one of `starts`, apart from space."""
    return any(start.startswith(squeezed(text)) for start in starts)


class ToolSplitter:
    """Finds the calls in an answer: `push` text, get pieces. Text is content unless it is a call in
    the model's format of a function in `schemas`, which has the schema of each one's arguments."""

    def __init__(self, form: ToolFormat, schemas: Mapping[str, Mapping[str, Any]]) -> None:
        self.form, self.schemas, head = form, schemas, form.head("NAME")
        pattern = functools.partial(spaced_pattern, names=schemas)
        self.opener = form.trigger or form.call[0]
        arguments = "" if form.notation else r"\s*{"
        if form.parameter:
            key = spaced_pattern(form.parameter.partition("KEY")[0])
            arguments = rf"\s*(?={key}|{spaced_pattern(form.tail)})"
        self.first = re.compile(pattern(form.begin + head) + arguments)
        self.next = re.compile(r"\s*" + pattern(form.tail + form.between + head) + arguments)
        self.last = re.compile(r"\s*" + spaced_pattern(form.tail + form.end))
        self.reach = 2 * len(form.begin + head) + max(map(len, schemas), default=0)
        self.reach += 2 * len(form.parameter + form.tail)
        # text without its space: all of a first call, or of a later one, before its arguments
        key = form.parameter.partition("KEY")[0]
        ends = (key, form.tail) if key else ("",) if form.notation else ("{",)
        starts = [form.head(n) + text for n in schemas for text in ends]
        self.first_starts = [squeezed(form.begin + start) for start in starts]
        self.closing = squeezed(form.tail + form.end)
        self.next_starts = [squeezed(form.tail + form.between + start) for start in starts]
        self.num_calls, self.has_content, self._held = 0, False, ""
        self.is_broken = False  # by an error while a call was read
        # of the call that is incomplete
        self.reader: JsonReader | ParameterReader | LiteralReader | None = None

    def push(self, text: str) -> list[Piece]:
        return self._pieces(text, final=False)

    def flush(self, is_cut: bool = False) -> list[Piece]:
        if is_cut:
            self._held = self._held[: self._begun()]
        return self._pieces("", final=True)

    def _pieces(self, new: str, final: bool) -> list[Piece]:
        """As `_split`. An error of its own makes the rest of the answer content."""
        held = self._held + new
        if not self.is_broken:
            try:
                return self._split(new, final)
            except Exception as error:
                log.error(f"a call cannot be read: {type(error).__name__}: {first_line(error)}")
                self.is_broken, self._held = True, ""
        return [Piece("content", held)] if held else []

    @property
    def has_calls(self) -> bool:
        """Whether there were calls, and the last one is complete."""
        return self.num_calls > 0 and self.reader is None and not self.is_broken

    def _split(self, new: str, final: bool) -> list[Piece]:
        self._held += new
        out: list[Piece] = []
        while self._held:
            if self.reader:
                num, arguments = self.reader.read(self._held)
                self._take(num)
                out.append(Piece("arguments", arguments))
                if self.reader.is_done:
                    self.reader = None
                elif not arguments:
                    break
                continue
            pattern = self.next if self.num_calls else self.first
            match = pattern.match(self._held) if self.num_calls else pattern.search(self._held)
            if match is None:
                out += self._rest(final)
                break
            before = self._take(match.start())
            if before.strip() or self.has_content:
                out.append(Piece("content", before))
            self._take(match.end() - match.start())
            self.num_calls += 1
            self.reader = self.form.reader(self.schemas[match[1]])
            out += [Piece("name", match[1]), Piece("arguments", "{")]
        out = [piece for piece in out if piece.text]
        self.has_content |= any(piece.kind == "content" for piece in out)
        return out

    def _begun(self) -> int:
        """The place in held text where the tags of a call begin, which is cut before its
        arguments."""
        if self.reader:
            return len(self._held)
        if self.num_calls and is_begun(self._held, self.next_starts):
            return 0
        last = self.last.match(self._held) if self.num_calls else None
        at = last.end() if last else 0
        while (at := self._held.find(self.opener[0], at)) >= 0:
            if is_begun(self._held[at:], self.first_starts):
                return at
            at += 1
        return len(self._held)

    def _take(self, num: int) -> str:
        taken, self._held = self._held[:num], self._held[num:]
        return taken

    def _rest(self, final: bool) -> list[Piece]:
        """The content of held text in which no call begins; the end of it may have to wait."""
        if self.num_calls:  # `form.end` is not content; text after it is passed on at the end
            text = self._take(len(self._held)) if final else ""
            if last := self.last.match(text):
                text = text[last.end() :]
            elif self.closing.startswith(squeezed(text)):
                text = ""
            return [Piece("content", text)] if text.strip() else []
        text, at = self._held, self._held.find(self.opener)
        while 0 <= at < len(text) - self.reach - len(self.opener):
            at = text.find(self.opener, at + 1)
        num = at if at >= 0 else len(text) - held_back(text, (self.opener,))
        if final:
            num = len(text)
        elif not text[:num].strip() and not self.has_content:
            num = 0  # space before a call is not content
        return [Piece("content", self._take(num))]


class Function(NamedTuple):
    """A function that may be called."""

    schema: Mapping[str, Any]  # of its arguments
    strict: bool  # refuse a schema of which a keyword cannot be enforced
    where: str  # the schema's place in the request


def tool_functions(tools: list[dict[str, Any]] | None, choice: ToolChoice) -> dict[str, Function]:
    """The functions that may be called, by name. Raises RequestError, naming the tool."""
    functions: dict[str, Function] = {}
    for i, tool in enumerate(tools or []):
        where = f"tools[{i}].function"
        function = tool.get("function") if isinstance(tool, Mapping) else None
        if not isinstance(function, Mapping):
            raise RequestError(f"tools[{i}] is {excerpt(tool)}; a function is needed", where)
        name, schema = function.get("name"), function.get("parameters")
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,64}", name):
            problem = "1 to 64 letters, digits, _ and - are needed"
            raise RequestError(f"{where}.name is {excerpt(name)}; {problem}", f"{where}.name")
        if name in functions:
            raise RequestError(f"{where}.name is {name!r}, as is another's", f"{where}.name")
        schema = {"type": "object", "properties": {}} if schema in (None, {}) else schema
        if not isinstance(schema, Mapping) or schema.get("type", "object") != "object":
            problem = "a JSON Schema of type object is needed"
            raise RequestError(
                f"{where}.parameters is {excerpt(schema)}; {problem}", f"{where}.parameters"
            )
        schema = {"type": "object", **schema}
        functions[name] = Function(schema, bool(function.get("strict")), f"{where}.parameters")
    if unknown := [name for name in choice.names or () if name not in functions]:
        raise RequestError(f"tool_choice names {unknown[0]!r}, which no tool has", "tool_choice")
    if choice.mode == "required" and not functions:
        raise RequestError("tool_choice needs tools", "tool_choice")
    names = functions if choice.names is None else choice.names
    return {name: functions[name] for name in names if choice.mode != "none"}


@dataclass(frozen=True, slots=True)
class Calls:
    """The functions that an answer may or must call, and how the model writes calls."""

    form: ToolFormat
    functions: Mapping[str, Function]
    choice: ToolChoice

    def splitter(self) -> ToolSplitter:
        return ToolSplitter(self.form, {name: f.schema for name, f in self.functions.items()})

    def control_ids(self, tokenizer: Tokenizer) -> frozenset[int]:
        """The control tokens that calls are written with."""
        signs = self.form.begin + self.form.call + self.form.parameter + self.form.end
        signs += self.form.notation.quote if self.form.notation else ""
        return frozenset(i for word, i in tokenizer.control.items() if word in signs)


PYTHON_TAG = "<|python_tag|>"  # before calls of Llama 3


def find_calls(
    request: GenerationRequest, template: ChatTemplate, tokenizer: Tokenizer
) -> Calls | None:
    """The functions that the answer to a request may call; None for none. Raises RequestError."""
    choice, form = request.tool_choice or ToolChoice(), tool_style(template).form
    functions = tool_functions(request.tools, choice)
    if not functions:
        return None
    is_json = (form.begin + form.call).startswith("{")
    if choice.mode == "auto" and request.params.answer_field and is_json:
        if PYTHON_TAG not in tokenizer.control:  # calls and answers would look the same
            raise RequestError("this model's calls look like answers in JSON: not both", "tools")
        form = dataclasses.replace(form, begin=PYTHON_TAG, trigger=PYTHON_TAG)
    return Calls(form, functions, choice)


def read_tools(given: Fields) -> tuple[list[dict[str, Any]] | None, ToolChoice]:
    """The tools of a request body, and which of them its answer may call. Raises RequestError."""
    tools = given.get("tools") or None
    for i, tool in enumerate(tools or []):
        check_type(f"tools[{i}]", tool, "object")
        if tool.get("type", "function") != "function":
            where = f"tools[{i}].type"
            refuse(f"{where} is {excerpt(tool['type'])}; only function is supported", where)
    choice = read_tool_choice(given.get("tool_choice", "auto"))
    if not given.get("parallel_tool_calls", True):
        choice = dataclasses.replace(choice, max_calls=1)
    if tools or choice.needs_tools:
        tool_functions(tools, choice)
    return (None if choice.mode == "none" else tools), choice


def read_tool_choice(choice: Any) -> ToolChoice:
    """`tool_choice` of a request body: a word, a function, or some of the tools with a mode."""
    kind = choice if isinstance(choice, str) else choice.get("type")
    known = "none, auto, required, {type: function, function: {name}} or {type: allowed_tools, ..}"
    if kind in ("none", "auto", "required") and isinstance(choice, str):
        return ToolChoice(kind)
    with contextlib.suppress(KeyError, TypeError):
        if kind == "function":
            return ToolChoice("required", (str(choice["function"]["name"]),), 1)
        if kind == "allowed_tools" and choice[kind]["mode"] in ("auto", "required"):
            names = tuple(str(tool["function"]["name"]) for tool in choice[kind]["tools"])
            return ToolChoice(choice[kind]["mode"], names)
    raise RequestError(f"tool_choice is {excerpt(choice)}; use {known}", "tool_choice")


def check_calls(calls: Any, where: str) -> None:
    """Raise RequestError for `tool_calls` of a message that are none. Arguments may be of any kind:
    a client sends back an answer that was cut, or that another model wrote."""
    check_type(where, calls, "array")
    for i, call in enumerate(calls):
        at = f"{where}[{i}].function"
        function: Any = call.get("function") if isinstance(call, dict) else call
        check_type(at, function, "object")
        check_type(f"{at}.name", function.get("name"), "string")


def add_to_calls(calls: list[Json], piece: Piece) -> Json:
    """Add a piece, the name that begins a call or a part of its arguments -> its stream delta."""
    if piece.kind == "name":
        function = {"name": piece.text, "arguments": ""}
        call_id = "call_" + secrets.token_hex(12)
        calls.append({"id": call_id, "type": "function", "function": function})
        delta = {**calls[-1], "function": dict(function)}
    else:
        calls[-1]["function"]["arguments"] += piece.text
        delta = {"function": {"arguments": piece.text}}
    return {"index": len(calls) - 1, **delta}
