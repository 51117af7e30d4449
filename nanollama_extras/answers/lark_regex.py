"""A Lark grammar as one regular expression, where its rules do not refer to themselves.

A call holds the input of a tool inside a JSON string. There a regular expression can be enforced,
character by character, and a grammar of its own cannot. So the rules are put into each other:

    start: "+" /(.*)/ LF+     LF: /\\n/     ->     (?:\\+(?:(.*))(?:(?:\\n))+)

Seam       api.responses, for tools with a grammar. The result is a `pattern` of a JSON Schema.
Remove     delete this file; such tools then take any text.
Source     https://lark-parser.readthedocs.io/en/stable/grammar.html
"""

from __future__ import annotations

import re
from collections.abc import Mapping

MOST_CHARS = 20_000  # of a grammar, and of its expression
TOKEN = re.compile(
    r"""(?P<space>[ \t]+|//[^\n]*|\#[^\n]*)
    |(?P<line>\n\s*)
    |(?P<text>"(?:\\.|[^"\\\n])*"i?)
    |(?P<regex>/(?:\\.|\[(?:\\.|[^\]\\\n])*\]|[^/\\\n])+/[imslux]*)
    |(?P<name>[?!]?_?[A-Za-z][A-Za-z0-9_]*)
    |(?P<repeat>~\s*\d+(?:\s*\.\.\s*\d+)?|[*+?])
    |(?P<alias>->\s*\w+)
    |(?P<priority>\.-?\d+(?=\s*:))
    |(?P<directive>%\w+[^\n]*)
    |(?P<sign>\.\.|[:|()\[\]])""",
    re.VERBOSE,
)
# The terminals of lark's common.lark that a grammar may import
COMMON = {
    "LF": r"\n",
    "CR": r"\r",
    "NEWLINE": r"(?:\r?\n)+",
    "WS": r"[ \t\f\r\n]+",
    "WS_INLINE": r"[ \t]+",
    "DIGIT": "[0-9]",
    "HEXDIGIT": "[0-9a-fA-F]",
    "INT": "[0-9]+",
    "SIGNED_INT": r"[+-]?[0-9]+",
    "DECIMAL": r"(?:[0-9]+\.[0-9]*|\.[0-9]+)",
    "LETTER": "[A-Za-z]",
    "WORD": "[A-Za-z]+",
    "CNAME": "[_A-Za-z][_A-Za-z0-9]*",
    "ESCAPED_STRING": r'"(?:[^"\\\n]|\\.)*"',
}
IGNORED = "%ignore"
AHEAD = re.compile(
    r"\(\?!(?P<text>[^\\()\[\]{}.*+?^$|]+)\)(?P<set>\[\^(?:\\.|[^\]\\])+\]|\.)(?P<sign>[+*])"
)
LOOKAROUND = re.compile(r"(?<!\\)(?:\\\\)*\(\?[=!<]")
Tokens = list[tuple[str, str]]


class NotRegularError(ValueError):
    """A grammar that this module cannot write as a regular expression."""


def as_regex(grammar: str) -> str:
    """The expression of the texts that a grammar derives. Raises NotRegularError."""
    try:
        expansion = Expansion(read_rules(tokens_of(grammar)))
        return expansion.skip + expansion.rule("start")
    except RecursionError:
        raise NotRegularError("it is nested too deeply") from None


def tokens_of(grammar: str) -> Tokens:
    """The tokens of a grammar, without spaces and comments. Raises NotRegularError."""
    if len(grammar) > MOST_CHARS:
        raise NotRegularError(f"it has more than {MOST_CHARS} characters")
    tokens, at = list[tuple[str, str]](), 0
    while at < len(grammar):
        match = TOKEN.match(grammar, at)
        if match is None:
            raise NotRegularError(f"{grammar[at : at + 20]!r} is not understood")
        kind, at = str(match.lastgroup), match.end()
        if kind not in ("space", "alias", "priority"):
            tokens.append((kind, match[0]))
    return tokens


def read_rules(tokens: Tokens) -> dict[str, Tokens]:
    """The body of each rule, by its name, and all that %ignore names, as that of IGNORED. Imported
    terminals have an expression as their body. Raises NotRegularError without a rule start."""
    rules: dict[str, Tokens] = {}
    name = ""
    for i, (kind, text) in enumerate(tokens):
        follows = tokens[i + 1][1] if i + 1 < len(tokens) else ""
        if kind == "directive" and text.startswith(IGNORED):
            inner = tokens_of(text.removeprefix(IGNORED))
            rules[IGNORED] = [*rules.get(IGNORED, []), ("sign", "|"), *inner]
        elif kind == "directive":
            rules |= imported(text)
            name = ""
        elif kind == "name" and follows == ":":
            name = text.lstrip("?!")
            rules[name] = []
        elif kind == "line":
            # a line that begins with | goes on with the rule
            name = name if follows.startswith("|") or has_open_bracket(rules.get(name, [])) else ""
        elif text != ":" or kind != "sign":
            if not name:
                raise NotRegularError(f"{text!r} stands outside a rule")
            rules[name].append((kind, text))
    if "start" not in rules:
        raise NotRegularError("there is no rule start")
    if IGNORED in rules:
        del rules[IGNORED][0]  # a sign between two
    return rules


def has_open_bracket(body: Tokens) -> bool:
    signs = [text for kind, text in body if kind == "sign"]
    return signs.count("(") + signs.count("[") > signs.count(")") + signs.count("]")


def imported(directive: str) -> dict[str, Tokens]:
    """The terminals that a line %import common.NAME, %import common (A, B) brings."""
    match = re.fullmatch(
        r"%import\s+common(?:\.(\w+)(?:\s*->\s*(\w+))?|\s*\(([\w\s,]+)\))\s*", directive
    )
    if match is None:
        raise NotRegularError(f"{directive.strip()!r} is not supported")
    names = {match[2] or match[1]: match[1]} if match[1] else {}
    names |= {name.strip(): name.strip() for name in (match[3] or "").split(",") if name.strip()}
    if unknown := [name for name in names.values() if name not in COMMON]:
        raise NotRegularError(f"common.{unknown[0]} is not known")
    return {name: [("regex", f"/{COMMON[known]}/")] for name, known in names.items()}


def is_terminal(name: str) -> bool:
    return name.lstrip("_")[:1].isupper() or name == IGNORED


class Expansion:
    """Puts rules into each other. skip: the expression of what may stand between two terminals."""

    def __init__(self, rules: Mapping[str, Tokens]) -> None:
        self.rules, self.known, self.open = rules, dict[str, str](), list[str]()
        self.skip = ""
        if IGNORED in rules:
            self.skip = f"{self.rule(IGNORED)}*"

    def rule(self, name: str) -> str:
        """The expression of a rule."""
        if name not in self.rules:
            raise NotRegularError(f"there is no rule {name}")
        if name in self.open:
            raise NotRegularError(f"the rule {name} refers to itself")
        if name not in self.known:
            self.open.append(name)
            tokens = list(self.rules[name])
            self.known[name] = f"(?:{self.choices(tokens)})"
            self.open.pop()
            if tokens:
                raise NotRegularError(f"{tokens[0][1]!r} has no opening bracket")
        return self.known[name]

    def choices(self, tokens: Tokens) -> str:
        """The expression of alternatives, up to a closing bracket. Takes the tokens off."""
        parts = [""]
        while tokens and tokens[0][1] not in (")", "]"):
            kind, text = tokens.pop(0)
            if (kind, text) == ("sign", "|"):
                parts.append("")
            elif kind != "line":
                parts[-1] += self.item(kind, text, tokens)
            if sum(map(len, parts)) > MOST_CHARS:
                raise NotRegularError(f"it needs more than {MOST_CHARS} characters")
        return "|".join(parts)

    def item(self, kind: str, text: str, tokens: Tokens) -> str:
        """The expression of one item with its repetition."""
        if kind == "text" and tokens and tokens[0][1] == "..":
            last = tokens[1:2]
            del tokens[:2]
            if not last or last[0][0] != "text":
                raise NotRegularError("a range has no end")
            found = f"[{re.escape(literal(text))}-{re.escape(literal(last[0][1]))}]"
        elif kind == "text":
            is_any_case = text.endswith("i")
            found = f"(?{'i' * is_any_case}:{escaped(literal(text.removesuffix('i')))})"
        elif kind == "regex":
            source, _, flags = text[1:].rpartition("/")
            source = source if flags else without_lookahead(source)
            if LOOKAROUND.search(source):
                raise NotRegularError(f"{text[:20]} looks ahead or back")
            found = (
                f"(?{flags.replace('l', '').replace('u', '')}:{source.replace(chr(92) + '/', '/')})"
            )
        elif kind == "name":
            found = self.rule(text)
        elif text in ("(", "["):
            inner = self.choices(tokens)
            if not tokens:
                raise NotRegularError("a bracket is not closed")
            tokens.pop(0)
            found = f"(?:{inner})" + "?" * (text == "[")
        else:
            raise NotRegularError(f"{text!r} is not expected here")
        is_whole = kind in ("text", "regex") or (kind == "name" and is_terminal(text))
        if self.skip and is_whole and not any(map(is_terminal, self.open)):
            found = f"(?:{found}{self.skip})"
        return found + self.repetition(tokens)

    def repetition(self, tokens: Tokens) -> str:
        """The repetition that follows an item."""
        if not tokens or tokens[0][0] != "repeat":
            return ""
        text = tokens.pop(0)[1]
        if not text.startswith("~"):
            return text
        least, _, most = re.sub(r"[~\s]", "", text).partition("..")
        return f"{{{least},{most}}}" if most else f"{{{least}}}"


def without_lookahead(source: str) -> str:
    """(?!END)[^x]+ without its lookahead: texts that depart from END at some character."""
    match = AHEAD.fullmatch(source)
    if match is None or not all(re.fullmatch(match["set"], char) for char in match["text"]):
        return source
    text, one = match["text"], match["set"]
    excluded = r"\n" if one == "." else one[2:-1]
    branches = []
    for i, char in enumerate(text):
        rest = f"(?:[^{excluded}{re.escape(char)}]{one}*)"
        is_optional = i > 0 or match["sign"] == "*"
        branches.append(escaped(text[:i]) + rest + "?" * is_optional)
    return f"(?:{'|'.join(branches)})"


def kept_escape(match: re.Match[str]) -> str:
    """An escape that Python knows; any other backslash is doubled."""
    return match[0] if match[1] else "\\\\"


def literal(text: str) -> str:
    """The text that a string of a grammar stands for."""
    try:
        # a backslash before any other character stands for itself
        inner = re.sub(r"\\(?=.)([nrtfvabxuU0-7\\\"'])?", kept_escape, text[1:-1])
        return inner.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError as error:
        raise NotRegularError(f"{text} is not a string: {error.reason}") from None


def escaped(text: str) -> str:
    """Text as an expression; re.escape would escape spaces, which some engines refuse."""
    return re.sub(r"([\\.^$|?*+()\[\]{}/-])", r"\\\1", text).replace("\n", r"\n")
