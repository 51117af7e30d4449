"""Grammars of texts inside a JSON string, against the library lark."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import lark
import llguidance
import pytest

import nanollama
from nanollama import LLM
from nanollama_extras.answers.grammars import text_argument
from nanollama_extras.answers.lark_json import in_json
from nanollama_extras.answers.lark_regex import NotRegularError
from nanollama_extras.answers.tools import tool_style
from nanollama_extras.api.responses import parse_response

TEMPLATES = Path(__file__).parents[2] / "data" / "chat_templates"
SCHEMA = {"properties": {"input": {}}}
SUMS = r"""
start: sum
?sum: product (("+" | "-") product)* -> sum
product: atom ("*" atom) ~ 0..2
atom: INT | NAME | "(" sum ")"
NAME: "a".."z" /[^\W\d"]/i*
%import common.INT
%ignore /[ \n]+/
"""
VALUES = r"""
start: value
value: STRING | "[" [value ("," value)*] "]" | /tr(ue)?/ | "NULL"i
STRING: /"(?:[^"\\\n]|\\["\\nt])*"/
%ignore " "
%ignore /\t/
"""
LINES = r"""
start: "BEGIN" LF line+ "END" LF?
line: "+" /(?!"X).+/? LF | "{" LF line* "}" LF
LF: /\n/
"""
PAIRS = r"""
start: "(" start ")" | WORD
WORD: ("\n" | LETTER ("\\" "é\tX"i) ~ 1..2)+
LETTER: /[\w"](?:,|\x09){2}|/
"""
CASES = {
    "sums": (
        SUMS,
        ["1", "1+2", "(1 + 23)*x", "((aB))", "a*b*c", "(1\n+ x)- (y)"],
        ["1+", "a*b*c*d", "(1", "1)", "Ab", 'a"', "1\t+2", ""],
    ),
    "values": (
        VALUES,
        ['"a"', "[]", '["a\\"b", [tr], "\\\\"]', "true", "nUll", '[\t"é🙂/",true]'],
        ['"a', "[tr", '"\\x"', '"a\nb"', "[,]", "tru", "nul"],
    ),
    "lines": (
        LINES,
        ["BEGIN\n+\nEND", 'BEGIN\n+"\n+"x\nEND', 'BEGIN\n+\\"EN\n{\n{\n+}\t/\n}\n}\nEND\n'],
        ["BEGIN\nEND", "BEGIN\n+\nENDx", 'BEGIN\n+"X\nEND', "BEGIN\n{\n+x\nEND"],
    ),
    "pairs": (
        PAIRS,
        ["\n", "(\\É\tx)", '((",\t\\é\tX\\É\tX\n\n))', "é,,\\é\tX"],
        ["()", "x\\é\tX", "x,\t,\\é\tx", "(\n", "\\e\tX", "\\"],
    ),
}


def derives(grammar: str, text: str) -> bool:
    """Whether a call with this text is one that the grammar allows."""
    grammars = {"top": f"start: {text_argument(SCHEMA, '@text')}", "text": in_json(grammar)}
    parts = [{"name": name, "lark_grammar": source} for name, source in grammars.items()]
    vocabulary = llguidance.LLTokenizer("byte")
    matcher = llguidance.LLMatcher(vocabulary, json.dumps({"grammars": parts}), log_level=0)
    assert not matcher.is_error(), matcher.get_error()
    call = json.dumps({"input": text}, ensure_ascii=False)
    return bool(matcher.try_consume_tokens(ids := [*call.encode()]) == len(ids)) and bool(
        matcher.is_accepting()
    )


@pytest.mark.parametrize("name", CASES)
def test_a_call_has_a_text_that_the_grammar_derives(name: str) -> None:
    grammar, good, bad = CASES[name]
    parser = lark.Lark(grammar, parser="earley", lexer="dynamic_complete")
    for text in good:
        parser.parse(text)
    for text in bad:
        with pytest.raises(lark.exceptions.LarkError):
            parser.parse(text)
    assert [text for text in [*good, *bad] if derives(grammar, text)] == good


@pytest.mark.parametrize(("template", "is_kept"), [("qwen3", True), ("qwen3-coder", False)])
def test_calls_that_are_not_json_are_told_of(
    tiny: Callable[..., Path], template: str, is_kept: bool, caplog: pytest.LogCaptureFixture
) -> None:
    nanollama.warn_once.cache_clear()
    source = (TEMPLATES / f"{template}.jinja").read_text(encoding="utf-8")
    llm = LLM(tiny(max_position_embeddings=2048), template=source)
    form = {"type": "grammar", "syntax": "lark", "definition": SUMS}
    tool = {"type": "custom", "name": "add", "format": form}
    body = {"input": "Add.", "tools": [tool], "tool_choice": "required"}
    with caplog.at_level(logging.WARNING):
        constraint = llm.prepare(parse_response(body, {})[0].requests[0]).form.constraint
    assert ("is used without its grammar" in caplog.text) != is_kept
    assert constraint
    for text, is_derived in (("(1+x)", True), ("(1+x", False)):
        call = tool_style(llm.template).form.spell([("add", json.dumps({"input": text}))])
        ids, matcher = llm.encode(call), constraint.matcher.deep_copy()
        is_whole = matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()
        assert is_whole == (is_derived or not is_kept)


@pytest.mark.parametrize(
    ("grammar", "reason"),
    [
        ("start: /x(?!y)/", "not supported in an expression"),
        ("start: /(?<=a)b/", "not supported in an expression"),
        (r"start: /a\b/", "not supported in an expression"),
        ("start: /^a$/", "not supported in an expression"),
        ("start: /a/m", "flag m"),
        ("start: /a+?/", "not supported in an expression"),
        ("start: /[z-a]/", "bad character range"),
        ("start: /(a/", "missing"),
        ("start: /*a/", "nothing to repeat"),
        ('start: ("a"', "not closed"),
        ('start: "a")', "opening bracket"),
        ('start: A\nA: "a" A', "refers to itself"),
        ('start: A\nA: a\na: "a"', "for terminals"),
        ("start: +", "not expected"),
        ('start: B\nA: "x"', "no rule B"),
        ("start: " + "(" * 9000, "nested too deeply"),
        ("start: /" + "(" * 9000 + ")" * 9000 + "/", "nested too deeply"),
        ("start: a", "no rule a"),
        ('start: "a"..b', "no end"),
        ("start: " + "start " * 4000, "characters"),
        ("start: " + "A" * 99 + "\n" + "A: /" + "[ab]" * 2000 + "/", "no rule AAA"),
        ("start: C\nA: /" + "[ab]" * 999 + "/\nB: A A A A\nC: B B B B", "characters"),
    ],
)
def test_other_grammars_are_told(grammar: str, reason: str) -> None:
    with pytest.raises(NotRegularError, match=reason):
        in_json(grammar)
