"""Grammars as regular expressions, against the library lark."""

from __future__ import annotations

import re

import lark
import pytest

from nanollama_extras.answers.lark_regex import NotRegularError, as_regex

APPLY_PATCH = r"""
start: begin_patch hunk+ end_patch
begin_patch: "*** Begin Patch" LF
end_patch: "*** End Patch" LF?
hunk: add_hunk | delete_hunk | update_hunk
add_hunk: "*** Add File: " filename LF add_line+
delete_hunk: "*** Delete File: " filename LF
update_hunk: "*** Update File: " filename LF change_move? change?
filename: /(.+)/
add_line: "+" /(.*)/ LF -> line
change_move: "*** Move to: " filename LF
change: (change_context | change_line)+ eof_line?
change_context: ("@@" | "@@ " /(.+)/) LF
change_line: ("+" | "-" | " ") /(.*)/ LF
eof_line: "*** End of File" LF

%import common.LF
"""
GRAMMARS = {
    "patch": APPLY_PATCH,
    "ranges": 'start: A ~ 2..3 [B]\nA: "0".."3" // a comment\nB.2: "x"i\n',
    "lines": 'start: ("a"\n  | "b")+\n  | "c" ?\n',
    "signs": 'start: "(" "." "*" "\\"" "\\\\" "\\n" "/" /\\/+/ "é-]"',
    "ignored": (
        'start: "let" NAME ("=" NAME)+\nNAME: "a".."c" /[0-9]/?\n%ignore " "\n%ignore /#.*/\n'
    ),
    "ahead": r"""start: "BEGIN" LF line+ "END" LF?
        line: /(?!END)[^\n]+/ LF | "+" /(?!a-_).+/ LF
        LF: /\n/""",
    "terminals": (
        "%import common (INT, WS_INLINE)\n%import common.WORD -> W\nstart: INT WS_INLINE W"
    ),
}
TEXTS = [
    "*** Begin Patch\n*** Add File: a.py\n+x = 1\n+\n*** End Patch",
    "*** Begin Patch\n*** Update File: a b\n*** Move to: c\n@@ f\n-x\n+y\n z\n*** End of File\n"
    "*** Delete File: d\n*** End Patch\n",
    "*** Begin Patch\n*** End Patch",
    "*** Begin Patch\n*** Add File: a.py\n*** End Patch",
    "*** Begin Patch\n*** Add File: a.py\nx = 1\n*** End Patch",
    *("0", "01", "012", "0123", "01x", "012X", "0x", "04", "45"),
    *("a", "ab", "abba", "c", "ac", "cc", ""),
    *('(.*"\\\n//é-]', '(.*"\\\n///é-]', '(x*"\\\n//é-]', "()"),
    *("leta=b", " let a0 = b1 =c #d", "let a 0=b", "le ta=b", "leta=", "let#=\na=b"),
    *(f"BEGIN\n{line}\nEND" for line in ("E", "EN", "END", "ENDx", "EN\nENX", "x\nxEND", "")),
    *(f"BEGIN\nx\n+{line}\nEND\n" for line in ("a", "a-", "a-_", "a-_b", "ab-_")),
    *("12 ab", "12\tab", "12ab", "x ab", "1 a1"),
]


@pytest.mark.parametrize("name", GRAMMARS)
def test_the_expression_matches_what_the_grammar_derives(name: str) -> None:
    without_empty = GRAMMARS[name].replace("/(.*)/", "/(.+)/?")  # lark refuses an empty terminal
    parser = lark.Lark(without_empty, parser="earley", lexer="dynamic_complete")
    pattern = re.compile(as_regex(GRAMMARS[name]))
    derived = []
    for text in TEXTS:
        try:
            parser.parse(text)
            derived.append(text)
        except lark.exceptions.LarkError:
            continue
    assert derived
    assert [text for text in TEXTS if pattern.fullmatch(text)] == derived


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ('start: a\na: "(" a ")" | "x"', "refers to itself"),
        ('%ignore WS\nstart: "a"', "no rule WS"),
        ('%declare A\nstart: "a"', "not supported"),
        ("%import common.SH_COMMENT\nstart: SH_COMMENT", "not known"),
        ("start: b", "no rule b"),
        ("start: /a(?!b)/", "looks ahead"),
        ("start: " + "(" * 9000, "nested too deeply"),
        ('a: "x"', "no rule start"),
        ('start: ("a"', "not closed"),
        ('start: "a")', "opening bracket"),
        ('start: "a', "not understood"),
        ('"a"', "outside a rule"),
        ("start: " + "a " * 200 + '\na: "' + "x" * 200 + '"', "characters"),
        ("", "no rule start"),
    ],
)
def test_other_grammars_are_told(grammar: str, reason: str) -> None:
    with pytest.raises(NotRegularError, match=reason):
        as_regex(grammar)
