"""`--tools FILE`: the functions of a Python file, which the model may ask the user to run; beside
them, with --mcp, the tools of MCP servers.

Seam: the CLI asks `open_toolbox(args)` for an object with `tools` (definitions for a request) and
`converse` (answers with tool calls between them); it is a context, at whose end the MCP servers
end. `function_tool` is public: it turns a function into a definition. Uses answers.tools for the
names of JSON types, and answers.mcp_tools for --mcp. To remove it, delete this module and the row
of `function_tool` in PUBLIC_EXTRAS.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanollama import UsageError, confirmed, excerpt, extra, first_line, log
from nanollama_extras.answers.tools import JSON_NAMES, ToolChoice

if TYPE_CHECKING:
    import argparse

    from nanollama import Fields, GenerationRequest, Json
    from nanollama_extras.answers.mcp_tools import LentTool, Servers

MAX_ROUNDS = 10  # of tool calls for one answer
CHOICES = ("auto", "none", "required")  # of --tool-choice, beside names of functions


def hint_schema(hint: Any) -> Json:
    """A type hint as JSON Schema. Raises KeyError for a type without a JSON equivalent."""
    kind, inner = typing.get_origin(hint), typing.get_args(hint)
    if kind is typing.Literal:
        return {"enum": list(inner)}
    if kind in (typing.Union, types.UnionType):
        return {"anyOf": [hint_schema(part) for part in inner]}
    if (kind or hint) is list:
        return {"type": "array", **({"items": hint_schema(inner[0])} if inner else {})}
    if (kind or hint) is dict:
        values = {"additionalProperties": hint_schema(inner[1])} if inner else {}
        return {"type": "object", **values}
    return {} if hint is Any else {"type": JSON_NAMES[hint]}


def function_tool(function: Callable[..., Any]) -> Json:
    """The definition of a function as a tool. Type hints become the schema of its arguments; the
    docstring up to `Args:` becomes the description, and lines `name: text` below it describe the
    arguments. Raises UsageError."""
    name, text = function.__name__, inspect.getdoc(function) or ""
    description, _, rest = text.partition("Args:")
    descriptions = dict(re.findall(r"(?m)^\s+(\w+)(?: *\(.*?\))?: *(.+)$", rest))
    hints, properties, required = typing.get_type_hints(function), {}, []
    for parameter in inspect.signature(function).parameters.values():
        try:
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise KeyError
            schema = hint_schema(hints[parameter.name])
        except KeyError:
            problem = "a hint is needed: str, int, float, bool, list, dict, Literal or a union"
            raise UsageError(f"{name}: argument {parameter}: {problem}") from None
        if parameter.name in descriptions:
            schema["description"] = descriptions[parameter.name]
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    body = {"name": name, "description": description.strip(), "parameters": parameters}
    return {"type": "function", "function": body}


def load_functions(path: str) -> tuple[dict[str, Callable[..., Any]], list[Json]]:
    """The public functions that a Python file defines, by name, and their definitions. Raises
    UsageError."""
    own = "nanollama_tools"
    module = sys.modules[own] = types.ModuleType(own)  # dataclasses look up their module
    module.__file__ = path
    try:
        exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), vars(module))
        found = [f for f in vars(module).values() if inspect.isfunction(f)]
        public = [f for f in found if f.__module__ == own and not f.__name__.startswith("_")]
        tools = [function_tool(function) for function in public]
    except UsageError as error:
        raise UsageError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:  # of any kind: this is the user's program
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise UsageError(f"{path}: cannot be loaded: {reason}") from None
    if not tools:
        raise UsageError(f"{path}: holds no functions")
    return {f.__name__: f for f in public}, tools


class Toolbox:
    """The functions of a Python file and the tools of MCP servers, run for the model when the user
    agrees. Raises UsageError for a file that cannot be loaded."""

    def __init__(
        self,
        path: str | None,
        asks: bool = True,
        servers: Servers | None = None,
        choice: str | None = None,
    ) -> None:
        self.asks, self.servers, self.choice = asks, servers, choice
        self.functions, self.own_tools = load_functions(path) if path else ({}, [])

    def __enter__(self) -> Toolbox:
        return self

    def __exit__(self, *_: object) -> None:
        if self.servers:
            self.servers.close()

    @functools.cached_property
    def lent(self) -> dict[str, LentTool]:
        """The tools of MCP servers, by name, once these have started."""
        return self.servers.tools(taken=self.functions) if self.servers else {}

    @property
    def tools(self) -> list[Json]:
        return [*self.own_tools, *(tool.definition(name) for name, tool in self.lent.items())]

    def converse(
        self, request: GenerationRequest, answer: Callable[[GenerationRequest], Json]
    ) -> list[Json]:
        """Answer a request, run the calls in the answer, answer their results, and so on until an
        answer has no calls. Returns the new messages."""
        messages = request.messages or []
        new: list[Json] = []
        tools, choice = self.tools or None, self.tool_choice()
        for _ in range(MAX_ROUNDS):
            whole = [*messages, *new]
            request = dataclasses.replace(request, messages=whole, tools=tools, tool_choice=choice)
            new.append(answer(request))
            choice = None  # a required call has been made
            if "tool_calls" not in new[-1]:
                return new
            new += [self.call(call) for call in new[-1]["tool_calls"]]
        log.warning(f"(no answer after {MAX_ROUNDS} rounds of calls)")
        return new

    def tool_choice(self) -> ToolChoice | None:
        """The choice of --tool-choice. Raises UsageError for a function that is not there."""
        names = [tool["function"]["name"] for tool in self.tools]
        if self.choice is None or self.choice in CHOICES:
            return ToolChoice(self.choice) if self.choice else None
        if self.choice not in names:
            known = ", ".join([*CHOICES, *names])
            raise UsageError(f"--tool-choice {self.choice}: choose one of {known}")
        return ToolChoice("required", (self.choice,))

    def call(self, call: Fields) -> Json:
        """Run a call of the model, if the user agrees. Returns the message with its result."""
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        shown = f"{name}({', '.join(f'{key}={json.dumps(v)}' for key, v in arguments.items())})"
        if name in self.lent:
            shown += f" on {self.lent[name].server}"
        if self.asks and not (sys.stdin.isatty() and confirmed(f"Run {shown}? [y/N] ")):
            log.warning(
                f"{shown} was not run" + ("" if sys.stdin.isatty() else ": no terminal to ask on")
            )
            content = "The user did not allow this call."
        else:
            content = self.run(name, arguments)
            log.warning(f"{shown} -> {excerpt(content)}")
        return {"role": "tool", "tool_call_id": call["id"], "name": name, "content": content}

    def run(self, name: str, arguments: Fields) -> str:
        """The result of a call as text, or its error, which goes to the model."""
        if self.servers and name in self.lent:
            return self.servers.call(self.lent[name], arguments)
        try:
            with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
                result = self.functions[name](**arguments)
            return result if isinstance(result, str) else json.dumps(result, default=str)
        except (Exception, SystemExit) as error:  # the model may have caused it
            return f"{type(error).__name__}: {first_line(error)}"


def open_toolbox(args: argparse.Namespace) -> Toolbox:
    """The toolbox of --tools and --mcp. Raises UsageError, and PackageError without `mcp`."""
    servers = extra("answers.mcp_tools", "--mcp").open_servers(args.mcp) if args.mcp else None
    choice = getattr(args, "tool_choice", None)
    asks, path = not getattr(args, "yes_tools", False), getattr(args, "tools", None)
    return Toolbox(path, asks=asks, servers=servers, choice=choice)
