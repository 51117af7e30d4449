"""Arguments of tool calls in a notation that is not JSON: Gemma 4's, and Python's (LFM2).

    Gemma 4   <|tool_call>call:weather{city:<|"|>Bern<|"|>,days:3}<tool_call|>
    LFM2      <|tool_call_start|>[weather(city="Bern", days=3)]<|tool_call_end|>

Adds       `Notation`: how values are written, read and, as a grammar, enforced.
Seam       ToolFormat.notation of answers.tools; answers.grammars asks it for rules.
           Imports answers.sandboxed, whose JSON numbers are.
Remove     delete this file and the two formats that name it; such models then write calls as any.
"""

from __future__ import annotations

import ast
import itertools
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import nanollama
from nanollama import RequestError
from nanollama_extras.answers.sandboxed import json_grammar

if TYPE_CHECKING:
    from nanollama_extras.answers.grammars import Grammars
    from nanollama_extras.answers.tools import Argument, Function

MAX_LEVELS = 32  # of values inside each other
WORDS = {"true": True, "false": False, "null": None, "True": True, "False": False, "None": None}
NUMBER = r"-?(?:0|[1-9]\d*)(?:\.\d+)?(?:[eE][+-]?\d+)?"
# a string ends at a quote behind which a value may end: models forget to escape apostrophes
STRING = r"""(['"])((?:[^\\]|\\.)*?)\1(?=\s*(?:[,)\]}:=]|\Z))"""
NAME = r"[\w.-]+"  # of an argument
SPACE = re.compile(r"\s*")


class IncompleteError(Exception):
    """The text ends before the value does."""


@dataclass(frozen=True, slots=True)
class Notation:
    """How arguments are written: members `KEY assign VALUE` of an object, joined."""

    assign: str  # between an argument's name and its value
    joint: str  # between arguments
    quote: str  # around a string, in which nothing is escaped; "": as Python writes strings
    true: str
    false: str
    null: str
    is_sorted: bool = False  # models write arguments in the order of their names

    def spell(self, arguments: Mapping[str, Any]) -> str:
        """Arguments as the model writes them."""
        members = (f"{self.key(k)}{self.assign}{self.value(v)}" for k, v in arguments.items())
        return self.joint.join(members)

    def value(self, value: Any) -> str:
        """A value as the model writes it."""
        if isinstance(value, str):
            return f"{self.quote}{value}{self.quote}" if self.quote else repr(value)
        if value is None or isinstance(value, bool):
            return self.null if value is None else self.true if value else self.false
        if isinstance(value, Mapping):
            key = self.key if self.quote else self.value
            members = (f"{key(str(k))}:{self.value(v)}" for k, v in value.items())
            return "{" + self.joint.join(members) + "}"
        if isinstance(value, (list, tuple)):
            return "[" + self.joint.join(map(self.value, value)) + "]"
        return json.dumps(value)

    def key(self, key: str) -> str:
        """A name, which has quotes only if it is no word."""
        return key if re.fullmatch(NAME, key) else self.value(key)

    def add_rules(
        self, name: str, grammars: Grammars, function: Function, rules: dict[str, str]
    ) -> None:
        """Add the rule `name` for the arguments of a function to those of a grammar. Raises
        RequestError for a strict function with a keyword that this cannot enforce."""
        LiteralRules(self, name, grammars, function, rules).add_all()


NOTATIONS = {
    "gemma": Notation(":", ",", '<|"|>', "true", "false", "null", is_sorted=True),
    "python": Notation("=", ", ", "", "True", "False", "None"),
}


# ---- reading -------------------------------------------------------------------------------------


class LiteralReader:
    """As the JsonReader of answers.tools, for arguments up to `tail`, which come all at once."""

    def __init__(self, notation: Notation, tail: str) -> None:
        self.notation, self.tail, self.is_done = notation, tail, False

    def read(self, text: str) -> tuple[int, str]:
        """Raises ValueError for text that is not written in the notation."""
        self.text = text
        try:
            arguments, end = self.members(0)
        except IncompleteError:
            return 0, ""
        self.is_done = True
        return end, json.dumps(arguments, ensure_ascii=False)[1:]

    def members(self, at: int) -> tuple[dict[str, Any], int]:
        """Arguments from a place up to the tail -> these, and the tail's place"""
        found: dict[str, Any] = {}
        while True:
            at = self.skip(at)
            if self.has(self.tail, at):
                return found, at
            name, at = self.name(at)
            found[name], at = self.value(self.expect(self.notation.assign.strip(), at))
            at = self.skip(at)
            at += self.has(",", at)

    def value(self, at: int, level: int = 0) -> tuple[Any, int]:
        """A value -> it, and the place behind it"""
        if level > MAX_LEVELS:
            raise ValueError(f"more than {MAX_LEVELS} values inside each other")
        at = self.skip(at)
        if at == len(self.text):
            raise IncompleteError
        if self.text[at] in "[({":
            return self.items(at, level)
        quote = self.notation.quote
        if self.text[at] in "'\"" or (quote and self.has(quote, at)):
            return self.string(at)
        match = re.compile(r"[\w.+-]*").match(self.text, at)
        word, end = (match[0], match.end()) if match else ("", at)
        if end == len(self.text):
            raise IncompleteError
        if word not in WORDS and not re.fullmatch(NUMBER, word):
            raise ValueError(f"a value is needed, not {self.text[at : at + 20]!r}")
        return WORDS[word] if word in WORDS else json.loads(word), end

    def items(self, at: int, level: int) -> tuple[Any, int]:
        """A list or an object."""
        is_object, closing = self.text[at] == "{", "])}"["[({".index(self.text[at])]
        found: list[Any] = []
        at += 1
        while True:
            at = self.skip(at)
            if self.has(closing, at):
                return dict(found) if is_object else found, at + 1
            key = None
            if is_object:
                key, at = self.name(at)
                at = self.expect(":", at)
            item, at = self.value(at, level + 1)
            found.append((key, item) if is_object else item)
            at = self.skip(at)
            at += self.has(",", at)

    def name(self, at: int) -> tuple[str, int]:
        """A name of an argument or a member."""
        if match := re.compile(NAME).match(self.text, at):
            if match.end() == len(self.text):
                raise IncompleteError
            return match[0], match.end()
        return self.string(at)

    def string(self, at: int) -> tuple[str, int]:
        quote = self.notation.quote
        if quote and self.has(quote, at):
            end = self.text.find(quote, at + len(quote))
            if end < 0:
                raise IncompleteError
            return self.text[at + len(quote) : end], end + len(quote)
        if self.text[at] not in "'\"":
            raise ValueError(f"a string is needed, not {self.text[at : at + 20]!r}")
        match = re.compile(STRING, re.DOTALL).match(self.text, at)
        if match is None or match.end() == len(self.text):
            raise IncompleteError
        inner = re.sub(r"\\.|['\n]", lambda m: ESCAPES.get(m[0], m[0]), match[2], flags=re.DOTALL)
        try:
            return str(ast.literal_eval(f"'{inner}'")), match.end()
        except (ValueError, SyntaxError):  # such as an incomplete \x
            return match[2], match.end()

    def expect(self, sign: str, at: int) -> int:
        """The place behind a sign that must come."""
        at = self.skip(at)
        if not self.has(sign, at):
            raise ValueError(f"{sign!r} is needed, not {self.text[at : at + 20]!r}")
        return at + len(sign)

    def has(self, sign: str, at: int) -> bool:
        """Whether a sign comes. Raises IncompleteError where the text ends within it."""
        if self.text.startswith(sign, at):
            return True
        if sign.startswith(self.text[at:]):
            raise IncompleteError
        return False

    def skip(self, at: int) -> int:
        return SPACE.match(self.text, at).end()  # type: ignore[union-attr]


ESCAPES = {"'": r"\'", "\n": r"\n", r"\'": r"\'"}


# ---- enforcing -----------------------------------------------------------------------------------


class LiteralRules:
    """Makes the rules of a grammar for the arguments of a function, with names of one prefix."""

    def __init__(
        self,
        notation: Notation,
        prefix: str,
        grammars: Grammars,
        function: Function,
        rules: dict[str, str],
    ) -> None:
        self.notation, self.prefix, self.grammars = notation, prefix, grammars
        self.function, self.rules, self.numbers = function, rules, itertools.count()
        self.tools = nanollama.extra("answers.tools", "a tool call")

    def add_all(self) -> None:
        found = self.tools.read_arguments(self.function.schema)
        self.rules[self.prefix] = self.members(found, self.notation.assign, MAX_LEVELS)

    def members(self, found: Mapping[str, Argument], assign: str, levels: int) -> str:
        """An expression for members in their order, of which some may be left out."""
        names = sorted(found, key=str.lower) if self.notation.is_sorted else [*found]
        first, later = '""', '""'  # what follows no member, and what follows one
        joint = self.literal(self.notation.joint)
        for key in reversed(names):
            argument = found[key]
            is_inner = levels < MAX_LEVELS
            name = self.inner_key(key) if is_inner else self.notation.key(key)
            member = self.add(f"{self.literal(name + assign)} ({self.value(argument, levels)})")
            rest = self.add(later)
            begun, further = f"{member} {rest}", f"{joint} {member} {rest}"
            if not argument.is_required:
                begun, further = f"{begun} | {self.add(first)}", f"{further} | {rest}"
            first, later = begun, further
        return first

    def inner_key(self, key: str) -> str:
        return self.notation.key(key) if self.notation.quote else self.notation.value(key)

    def value(self, argument: Argument, levels: int) -> str:
        """An expression for a value."""
        known = [self.notation.value(json.loads(value)) for value in argument.listed.values()]
        options = [self.literal(text) for text in known]
        if argument.texts:
            self.refuse_lost(argument.texts)
            options.append(self.string())
        for schema in argument.others:
            options.append(self.kind(schema, levels))
        if any("type" not in schema for schema in argument.texts):
            options += [self.any_value(levels)]
        return " | ".join(options) or self.any_value(levels)

    def kind(self, schema: Mapping[str, Any], levels: int) -> str:
        """An expression for a value of a schema with one type."""
        kind, n = schema["type"], self.notation
        if kind in ("integer", "number"):  # as in JSON
            return json_grammar(dict(schema), self.function.strict)
        self.refuse_lost([schema])
        if kind in ("boolean", "null"):
            words = (n.null,) if kind == "null" else (n.true, n.false)
            return " | ".join(map(json.dumps, words))
        if not levels:
            return self.any_value(0)
        root = self.function.schema
        if kind == "object":
            named = self.tools.read_arguments({**root, **schema})
            if not named:
                return self.any_object(levels)
            return f'"{{" ({self.members(named, ":", levels - 1)}) "}}"'
        if not isinstance(schema.get("items"), Mapping):
            return self.any_list(levels)
        argument = self.tools.Argument(schema["items"], root)
        item = self.add(self.value(argument, levels - 1))
        return f'"[" ({item} ({self.literal(n.joint)} {item})*)? "]"'

    def refuse_lost(self, schemas: list[Any]) -> None:
        """Raise RequestError if a strict function has a keyword that is not enforced."""
        kept = {"type", "properties", "required", "items", "enum", "const", "additionalProperties"}
        kept |= {"description", "title", "default", "examples", "$defs", "definitions", "$comment"}
        if self.function.strict and (lost := {key for each in schemas for key in each} - kept):
            where, reason = (
                self.function.where,
                f"calls of this model's kind cannot keep {min(lost)}",
            )
            raise RequestError(f"{where} cannot be used: {reason}", where)

    def string(self) -> str:
        """A string, which in quotes of several signs may hold anything but these."""
        quote = self.notation.quote
        if not quote:
            return r"/'([^'\\\n]|\\.)*'/ | /\"([^\"\\\n]|\\.)*\"/"
        name = f"{self.prefix}_text_{next(self.numbers)}"
        return f"{self.literal(quote)} {self.grammars.until(quote, name, self.rules)}"

    def any_value(self, levels: int) -> str:
        """A value of any type, with lists and objects of such values."""
        name = f"{self.prefix}_any"
        if name not in self.rules:
            self.rules[name] = ""  # it refers to itself
            n = self.notation
            words = " | ".join(map(json.dumps, (n.true, n.false, n.null)))
            key = f"/[A-Za-z_][A-Za-z_0-9]*/ | {self.string()}" if n.quote else self.string()
            joint = self.literal(n.joint)
            entry = self.add(f"({key}) {self.literal(':')} {name}")
            self.rules[f"{name}_list"] = f'"[" ({name} ({joint} {name})*)? "]"'
            self.rules[f"{name}_object"] = f'"{{" ({entry} ({joint} {entry})*)? "}}"'
            scalar = f"{self.string()} | /{PLAIN_NUMBER}/ | {words}"
            self.rules[name] = f"{scalar} | {name}_list | {name}_object"
        return name

    def any_list(self, levels: int) -> str:
        return f"{self.any_value(levels)}_list"

    def any_object(self, levels: int) -> str:
        return f"{self.any_value(levels)}_object"

    def add(self, expression: str) -> str:
        """A new rule for an expression -> its name"""
        name = f"{self.prefix}_{next(self.numbers)}"
        self.rules[name] = expression
        return name

    def literal(self, text: str) -> str:
        return self.grammars.literal(text)


PLAIN_NUMBER = r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?"
