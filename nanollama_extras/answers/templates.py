"""Chat templates with bounds: on the size of values, on all that is made, and on the time.

A template is a program from the internet. Jinja's sandbox keeps it away from Python's insides, but
lets it double a text thirty times, or count for a day; here, such a rendering ends with an error.

Seam       `nanollama.template_environment` takes this Environment in place of Jinja's sandbox.
Remove     delete this file; templates then run without these bounds, and without the tag
           {% generation %}.
Source     https://jinja.palletsprojects.com/en/stable/sandbox/
"""

from __future__ import annotations

import contextvars
import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NoReturn

import jinja2.ext
import jinja2.sandbox
from jinja2 import nodes

from nanollama import TemplateError

MOST_SIZE = 1 << 25  # characters of one value
MOST_MADE = 1 << 28  # characters that one rendering makes
ITEM_SIZE = 8  # characters that an item of a list counts for
MOST_BITS = 1 << 16  # of an integer
MOST_SECONDS = 10.0  # of processor time
# Filters that look at items one by one, and make no text of them
ITEM_FILTERS = frozenset(
    "attr batch count d default dictsort first groupby items last length list map max min random "
    "reject rejectattr reverse select selectattr slice sort sum unique".split()
)
# Filter, or method of texts, that takes a width, a count or a text to insert -> how often it may
# insert so much into a text
WIDE: dict[str, Callable[[str], int]] = {
    **dict.fromkeys(("center", "ljust", "rjust", "zfill"), lambda text: 1),
    **dict.fromkeys(("batch", "slice", "tojson"), lambda text: 1 << 12),
    "expandtabs": lambda text: text.count("\t"),
    "indent": lambda text: text.count("\n") + 1,
    "wordwrap": len,
}


class Budget:
    """What one rendering may still make, and the end of its time."""

    def __init__(self) -> None:
        self.size, self.end_s = MOST_MADE, time.thread_time() + MOST_SECONDS


BUDGET: contextvars.ContextVar[Budget | None] = contextvars.ContextVar("budget", default=None)


def refuse(reason: str) -> NoReturn:
    raise TemplateError(f"the chat template was stopped: {reason}", "messages")


def step() -> None:
    """Called for each turn of a loop and for each call. Raises TemplateError after MOST_SECONDS."""
    if (budget := BUDGET.get()) and time.thread_time() > budget.end_s:
        refuse(f"it ran for {MOST_SECONDS:g} seconds")


def check_size(size: int) -> None:
    """Raises TemplateError for a value of more than MOST_SIZE characters."""
    if size > MOST_SIZE:
        refuse(f"it makes a value of {size} characters; {MOST_SIZE} are allowed")


def check_bits(num_bits: int) -> None:
    """Raises TemplateError for an integer of more than MOST_BITS."""
    if num_bits > MOST_BITS:
        refuse(f"it makes an integer of {num_bits} bits; {MOST_BITS} are allowed")


def made(value: Any) -> Any:
    """Return a value that a template has made, after taking its size off the budget."""
    if isinstance(value, int):
        check_bits(value.bit_length())
    if isinstance(value, (str, bytes, list, tuple, dict)):
        size = len(value) * (1 if isinstance(value, (str, bytes)) else ITEM_SIZE)
        check_size(size)
        if budget := BUDGET.get():
            budget.size -= size
            if budget.size < 0:
                refuse(f"it makes more than {MOST_MADE} characters in all")
    return value


def check_text(value: Any) -> Any:
    """Return a value whose text is short enough: one list in another, many times over, is small in
    memory and large in text."""
    size, parts = 0, [value]
    while parts:
        part = parts.pop()
        size += len(part) if isinstance(part, (str, bytes, list, tuple, Mapping)) else 1
        check_size(size)
        if isinstance(part, Mapping):
            parts += [*part, *part.values()]
        elif isinstance(part, (list, tuple)):
            parts += part
    return value


def concat(parts: Iterable[Any]) -> str:
    """The parts as one text. No more of them are made than may be there."""
    texts, size = [], 0
    for part in parts:
        texts.append(text := str(check_text(part)))
        check_size(size := size + len(text))
    return str(made("".join(texts)))


def turns(items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop, with a step before each."""
    for item in items:
        step()
        yield item


def is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def check_format(form: str) -> None:
    """Raises TemplateError for a format with a width that is long, or that an argument gives."""
    if re.search(r"\d{5}|%[^%a-zA-Z]*\*|\{[^{}]*:[^{}]*\{", form):
        refuse("it formats a value with a large width")


def check_call(name: str, arguments: list[Any]) -> None:
    """Check what a filter or a method of a text will make of its arguments, the text first."""
    subject = arguments[0] if arguments else None
    if name in WIDE:
        widths = [len(text) for text in arguments[1:] if isinstance(text, str)]
        widths += [n for n in arguments[1:] if isinstance(n, int) and name != "wordwrap"]
        check_size(WIDE[name](str(subject)) * max(widths, default=0))
    elif name == "replace" and len(arguments) > 2:
        text, old, new = map(str, arguments[:3])
        check_size(len(text) + (text.count(old) if old else len(text) + 1) * len(new))
    elif name in ("format", "format_map") and isinstance(subject, str):
        check_format(subject)
    elif name == "translate" or (name == "sum" and any(map(is_list, arguments[1:]))):
        refuse(f"{name} may make too much of this")


def check_joined(parts: list[Any], separator: Any) -> None:
    check_text(parts)
    check_size(len(parts) * len(str(separator)))


class Filters(dict[str, Callable[..., Any]]):
    """Filters that are checked, and whose results are counted."""

    def __setitem__(self, name: str, function: Callable[..., Any]) -> None:
        has_context = hasattr(function, "jinja_pass_arg")  # as the first argument

        @functools.wraps(function)  # keeps that mark
        def call(*arguments: Any, **named: Any) -> Any:
            step()
            context, given = arguments[:has_context], list(arguments[has_context:])
            if name == "join":
                given[0] = list(given[0])
                check_joined(given[0], named.get("d", given[1] if len(given) > 1 else ""))
            elif name not in ITEM_FILTERS:
                check_text([*given, *named.values()])
            check_call(name, [*given, *named.values()])
            return made(function(*context, *given, **named))

        super().__setitem__(name, call)


class GenerationTag(jinja2.ext.Extension):
    """{% generation %} marks the assistant's part for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012 (as the base class declares it)

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class BoundedTemplate(jinja2.Template):
    """A template, each of whose renderings has a budget."""

    def render(self, *args: Any, **kwargs: Any) -> str:
        token = BUDGET.set(Budget())
        try:
            return super().render(*args, **kwargs)
        finally:
            BUDGET.reset(token)


class Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """Jinja's sandbox with bounds."""

    template_class = BoundedTemplate
    intercepted_binops = frozenset(("+", "*", "**", "%"))
    concat = staticmethod(concat)  # of the parts of a rendering, a macro, a block

    def __init__(self, *, extensions: Iterable[Any] = (), **options: Any) -> None:
        super().__init__(extensions=[*extensions, GenerationTag], finalize=check_text, **options)
        known = {**self.filters, "bounded_turns": turns, "bounded_text": concat}
        self.filters = Filters()
        for name, function in known.items():
            self.filters[name] = function
        del self.globals["lipsum"]

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Jinja's tree of a template, in which loops take steps, and ~ checks what it makes."""
        tree = super()._parse(source, name, filename)

        def through(filter_name: str, node: Any) -> nodes.Filter:
            place = {"lineno": node.lineno, "environment": self}
            return nodes.Filter(node, filter_name, [], [], None, None, **place)

        for loop in list(tree.find_all(nodes.For)):
            loop.iter = through("bounded_turns", loop.iter)
        for text in list(tree.find_all(nodes.Concat)):
            parts = nodes.List(text.nodes, lineno=text.lineno, environment=self)
            text.nodes = [through("bounded_text", parts)]
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """The result of an operator, unless it is too large."""
        step()
        for value, count in ((left, right), (right, left)):
            if operator == "*" and isinstance(count, int) and isinstance(value, (str, list, tuple)):
                check_size(len(value) * count * (1 if isinstance(value, str) else ITEM_SIZE))
        if operator == "**" and isinstance(left, int) and isinstance(right, int):
            check_bits(left.bit_length() * right)
        elif operator == "%" and isinstance(left, str):
            check_format(left)
            check_text(right)
        return made(super().call_binop(context, operator, left, right))

    def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
        """The result of a function, unless it is too large."""
        step()
        method = getattr(function, "__wrapped__", function)  # str.format comes wrapped
        if isinstance(owner := getattr(method, "__self__", None), str):
            if method.__name__ == "join" and args:
                args = (list(args[0]), *args[1:])
                check_joined(args[0], owner)
            check_text([*args, *kwargs.values()])
            check_call(method.__name__, [owner, *args, *kwargs.values()])
        return made(super().call(context, function, *args, **kwargs))
