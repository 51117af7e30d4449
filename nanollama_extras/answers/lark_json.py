"""A Lark grammar as one of texts inside a JSON string, for grammars that no expression stands for.

    start: "(" start ")" | /[^\\n]/+     ->     rule_0: "(" rule_0 ")" | (/[^\\n"..]/ | /\\\\"|../)+

JSON writes some characters as escapes, all of which begin with a backslash. llguidance decides at
that first byte where a terminal ends. So a terminal here never holds an escape beside others: a
terminal of the grammar becomes a rule of escapes and of the text between them. Of several ways to
cut a text into terminals, the one with the longest is taken, as OpenAI's servers do it.

Seam       api.response_tools asks for the `keyword` of a tool with such a grammar; answers.grammars
           asks what that stands for. It imports answers.lark_regex, which reads the grammar, and
           answers.schemas.
Remove     delete this file; requests with such a tool are then refused.
Source     https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md
"""

from __future__ import annotations

import json
import re
import warnings
from dataclasses import dataclass

from nanollama_extras.answers.lark_regex import (
    IGNORED,
    MOST_CHARS,
    NotRegularError,
    Tokens,
    is_terminal,
    literal,
    read_rules,
    tokens_of,
    without_lookahead,
)
from nanollama_extras.answers.schemas import GRAMMAR, rust_regex

ESCAPES = {char: json.dumps(char)[1:-1] for char in ('"', "\\", *map(chr, range(32)))}
ESCAPED = r'["\\\x00-\x1f]'  # the characters of ESCAPES
PART = re.compile(
    r"""(?P<sign>\((?:\?:|(?!\?))|[)|]|(?:[*+?]|\{\d+(?:,\d*)?\})(?![?+]))
    |(?P<atom>\\(?:x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[dDwWsSntrfv]|[^\w\n])
        |\[\^?\]?(?:\\.|[^\]\\])*\]
        |[^\\^$()|*+?\[])""",
    re.VERBOSE | re.DOTALL,
)


def keyword(grammar: str) -> dict[str, str]:
    """The keyword of a schema for the texts of a grammar. Raises NotRegularError."""
    in_json(grammar)
    return {GRAMMAR: grammar}


def in_json(grammar: str) -> str:
    """The grammar of the texts that a grammar derives, inside a JSON string. Raises
    NotRegularError for one that cannot be written so."""
    try:
        return Writer(read_rules(tokens_of(grammar))).text()
    except RecursionError:
        raise NotRegularError("it is nested too deeply") from None


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a grammar. text: an expression if is_plain, which stands for texts without escapes;
    else what a rule derives. run: one or more of it, where it is one character."""

    text: str
    is_plain: bool = False
    run: str = ""

    @property
    def body(self) -> str:
        """What a rule derives."""
        return f"/{self.text}/" if self.is_plain and self.text else self.text or '""'

    def repeated(self, sign: str) -> Piece:
        if self.is_plain:
            return Piece(f"(?:{self.text}){sign}", True)
        return Piece(f"({self.run if self.run and sign in ('+', '*') else self.text}){sign}")


def sequence(pieces: list[Piece]) -> Piece:
    """One piece after the other; neighbours without escapes become one."""
    joined = list[Piece]()
    for piece in pieces:
        if joined and piece.is_plain and joined[-1].is_plain:
            joined[-1] = Piece(joined[-1].text + piece.text, True)
        else:
            joined.append(piece)
    if len(joined) == 1:
        return limited(joined[0])
    return limited(Piece(" ".join(piece.body for piece in joined), not joined))


def choice(pieces: list[Piece]) -> Piece:
    """One of the pieces."""
    if len(pieces) == 1:
        return pieces[0]
    if all(piece.is_plain for piece in pieces):
        return limited(Piece(f"(?:{'|'.join(piece.text for piece in pieces)})", True))
    return limited(Piece(f"({' | '.join(piece.body for piece in pieces)})"))


def limited(piece: Piece) -> Piece:
    if len(piece.text) > MOST_CHARS:
        raise NotRegularError(f"a rule needs more than {MOST_CHARS} characters")
    return piece


# ---- expressions ---------------------------------------------------------------------------------


def expression(regex: str, flags: str) -> Piece:
    """The piece of an expression. Raises NotRegularError for one that is not supported."""
    if unknown := set(flags) - set("isul"):
        raise NotRegularError(f"the flag {min(unknown)} of an expression is not supported")
    parts, at = list[tuple[str, str]](), 0
    while at < len(regex):
        match = PART.match(regex, at)
        if match is None:
            raise NotRegularError(f"{regex[at : at + 20]!r} is not supported in an expression")
        parts.append((str(match.lastgroup), match[0]))
        at = match.end()
    try:
        compiled(regex)  # so brackets have partners, and signs have operands
        return alternatives(parts, flags)
    except (re.error, OverflowError) as error:
        raise NotRegularError(f"{regex[:20]!r} is no expression: {error}") from None


def compiled(regex: str, flags: str = "") -> re.Pattern[str]:
    """Python's form of an expression, without its warnings about signs that it may read otherwise
    one day."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return re.compile(regex, re.IGNORECASE if "i" in flags else 0)


def alternatives(parts: list[tuple[str, str]], flags: str) -> Piece:
    """The piece of alternatives, up to a closing bracket. Takes the parts off."""
    branches: list[list[Piece]] = [[]]
    while parts and parts[0] != ("sign", ")"):
        kind, text = parts.pop(0)
        if kind == "atom":
            branches[-1].append(character(text, flags))
        elif text == "|":
            branches.append([])
        elif text.startswith("("):
            branches[-1].append(alternatives(parts, flags))
            parts.pop(0)
        else:
            branches[-1][-1:] = [branches[-1][-1].repeated(text)]
    return choice([sequence(branch) for branch in branches])


def character(atom: str, flags: str) -> Piece:
    """The piece of an expression for one character."""
    if atom == ".":
        atom = r"[\s\S]" if "s" in flags else r"[^\n]"
    pattern = compiled(atom, flags)
    escapes = [re.escape(text) for char, text in ESCAPES.items() if pattern.fullmatch(char)]
    plain = rust_regex(atom, {}).replace("/", r"\x2f")
    is_set = plain.startswith("[") or atom[1:] in tuple("dDwWsS")
    if escapes and is_set:
        plain = f"[{plain}--{ESCAPED}]"
    if "i" in flags:
        plain = f"(?i:{plain})"
    if not escapes:
        return Piece(plain, True)
    written = f"/{'|'.join(escapes)}/"
    return (
        Piece(f"(/{plain}/ | {written})", run=f"/{plain}+/ | {written}")
        if is_set
        else Piece(written)
    )


# ---- rules ---------------------------------------------------------------------------------------


class Writer:
    """Writes the rules of a grammar. skip: what may stand between two terminals."""

    def __init__(self, rules: dict[str, Tokens]) -> None:
        self.rules, self.open = rules, list[str]()
        self.names = {"start": "rule_0"}  # of the rules to write
        self.known: dict[str, Piece] = {}  # terminals
        self.skip = [Piece("skip")] if IGNORED in rules else []

    def text(self) -> str:
        """The grammar."""
        lines = [f"start: {sequence([*self.skip, Piece('rule_0')]).text}"]
        if self.skip:
            lines.append(f"skip: ({self.terminal(IGNORED).body})*")
        written = 0
        while written < len(self.names):  # a rule may name others
            name = list(self.names)[written]
            lines.append(f"rule_{written}: {self.body(name).body}")
            written += 1
        return "\n".join(lines) + "\n"

    def body(self, name: str) -> Piece:
        """The piece of a rule or terminal."""
        tokens = list(self.rules[name])
        found = self.choices(tokens, is_terminal(name))
        if tokens:
            raise NotRegularError(f"{tokens[0][1]!r} has no opening bracket")
        return found

    def terminal(self, name: str) -> Piece:
        """The piece of a terminal."""
        if name in self.open:
            raise NotRegularError(f"the terminal {name} refers to itself")
        if name not in self.known:
            self.open.append(name)
            self.known[name] = self.body(name)
            self.open.pop()
        return self.known[name]

    def choices(self, tokens: Tokens, in_terminal: bool) -> Piece:
        """The piece of alternatives, up to a closing bracket. Takes the tokens off."""
        branches: list[list[Piece]] = [[]]
        while tokens and tokens[0][1] not in (")", "]"):
            kind, text = tokens.pop(0)
            if (kind, text) == ("sign", "|"):
                branches.append([])
            elif kind != "line":
                branches[-1].append(self.item(kind, text, tokens, in_terminal))
        return choice([sequence(branch) for branch in branches])

    def item(self, kind: str, text: str, tokens: Tokens, in_terminal: bool) -> Piece:
        """The piece of one item with its repetition."""
        if text in ("(", "["):
            found = self.choices(tokens, in_terminal)
            if not tokens:
                raise NotRegularError("a bracket is not closed")
            tokens.pop(0)
            found = found.repeated("?") if text == "[" else found
        elif kind == "name" and not is_terminal(text):
            found = self.reference(text, in_terminal)
        else:
            found = self.whole(kind, text, tokens)
            if not in_terminal:  # it stays apart from its neighbours
                found = Piece(" ".join([found.body, *(piece.text for piece in self.skip)]))
        if tokens and tokens[0][0] == "repeat":
            found = found.repeated(repetition(tokens.pop(0)[1]))
        return found

    def reference(self, name: str, in_terminal: bool) -> Piece:
        if name not in self.rules or in_terminal:
            raise NotRegularError(f"there is no rule {name}" + " for terminals" * in_terminal)
        return Piece(self.names.setdefault(name, f"rule_{len(self.names)}"))

    def whole(self, kind: str, text: str, tokens: Tokens) -> Piece:
        """The piece of a text, of a range, of an expression, or of a terminal by name."""
        if kind == "name" and text in self.rules:
            return self.terminal(text)
        if kind == "regex":
            source, _, flags = text[1:].rpartition("/")
            source = source.replace("\\/", "/")
            return expression(source if flags else without_lookahead(source), flags)
        if kind != "text":
            problem = "there is no rule" if kind == "name" else "not expected here:"
            raise NotRegularError(f"{problem} {text}")
        if tokens and tokens[0][1] == "..":
            (_, last), tokens[:2] = (tokens[1:2] or [("", "")])[0], []
            if not last.startswith('"'):
                raise NotRegularError("a range has no end")
            return character(f"[{re.escape(literal(text))}-{re.escape(literal(last))}]", "")
        flags = "i" * text.endswith("i")
        inner = literal(text.removesuffix("i"))
        return sequence([character(re.escape(char), flags) for char in inner])


def repetition(text: str) -> str:
    """A sign of repetition as llguidance has it."""
    least, dots, most = re.sub(r"[~\s]", "", text).partition("..")
    return f"{{{least},{most if dots else least}}}" if text.startswith("~") else text
