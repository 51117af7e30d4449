"""`--tools FILE`: the functions of a Python file, which the model may ask the user to run.

Seam: the CLI asks `open_toolbox(args)` for an object with `tools` (definitions for a request) and
`call(call)` (a call of the model -> the message that answers it). `function_tool` is public: it
turns a function into a definition. Uses answers.tools for the names of JSON types. To remove it,
delete this module and the row of `function_tool` in PUBLIC_EXTRAS.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import re
import sys
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanollama import UsageError, confirmed, excerpt, first_line, log
from nanollama_extras.answers.tools import JSON_NAMES

if TYPE_CHECKING:
    import argparse

    from nanollama import Fields, Json


def hint_schema(hint: Any) -> Json:
    """A type hint as JSON Schema. Raises KeyError for a type that JSON has nothing like."""
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
    """A function as a tool: hints say what its arguments are; the docstring, up to `Args:`, what it
    does, and below, in lines `name: text`, what they mean. Raises UsageError."""
    name, text = function.__name__, inspect.getdoc(function) or ""
    description, _, rest = text.partition("Args:")
    about = dict(re.findall(r"(?m)^\s+(\w+)(?: *\(.*?\))?: *(.+)$", rest))
    hints, properties, required = typing.get_type_hints(function), {}, []
    for parameter in inspect.signature(function).parameters.values():
        try:
            if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
                raise KeyError
            schema = hint_schema(hints[parameter.name])
        except KeyError:
            problem = "a hint is needed: str, int, float, bool, list, dict, Literal or a union"
            raise UsageError(f"{name}: argument {parameter}: {problem}") from None
        told = {"description": about[parameter.name]} if parameter.name in about else {}
        properties[parameter.name] = {**schema, **told}
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    parameters = {"type": "object", "properties": properties, "required": required}
    body = {"name": name, "description": description.strip(), "parameters": parameters}
    return {"type": "function", "function": body}


class Toolbox:
    """The functions of a Python file, which the model may call when the user says yes. Raises
    UsageError for a file that cannot be loaded."""

    def __init__(self, path: str, asks: bool = True) -> None:
        self.asks, own = asks, "nanollama_tools"
        module = sys.modules[own] = types.ModuleType(own)  # dataclasses look themselves up there
        module.__file__ = path
        try:
            exec(compile(Path(path).read_bytes(), path, "exec", dont_inherit=True), vars(module))
            found = [f for f in vars(module).values() if inspect.isfunction(f)]
            public = [f for f in found if f.__module__ == own and not f.__name__.startswith("_")]
            self.functions = {f.__name__: f for f in public}
            self.tools = [function_tool(function) for function in self.functions.values()]
        except UsageError as error:
            raise UsageError(f"{path}: {error}") from None
        except (Exception, SystemExit) as error:  # it is the user's program
            reason = f"{type(error).__name__}: {first_line(error)}"
            raise UsageError(f"{path}: cannot be loaded: {reason}") from None
        if not self.tools:
            raise UsageError(f"{path}: holds no functions")

    def call(self, call: Fields) -> Json:
        """The message that answers a call of the model."""
        name, arguments = call["function"]["name"], json.loads(call["function"]["arguments"])
        shown = f"{name}({', '.join(f'{key}={json.dumps(v)}' for key, v in arguments.items())})"
        if self.asks and not (sys.stdin.isatty() and confirmed(f"Run {shown}? [y/N] ")):
            log.warning(f"{shown} was not run" + ("" if sys.stdin.isatty() else ": nobody to ask"))
            content = "The user did not allow this call."
        else:
            try:
                with contextlib.redirect_stdout(sys.stderr):  # stdout is for answers
                    result = self.functions[name](**arguments)
                content = result if isinstance(result, str) else json.dumps(result, default=str)
            except Exception as error:  # the model is told, as it may have caused it
                content = f"{type(error).__name__}: {first_line(error)}"
            log.warning(f"{shown} -> {excerpt(content)}")
        return {"role": "tool", "tool_call_id": call["id"], "name": name, "content": content}


def open_toolbox(args: argparse.Namespace) -> Toolbox:
    """The toolbox of --tools. Raises UsageError."""
    return Toolbox(args.tools, asks=not args.yes_tools)
