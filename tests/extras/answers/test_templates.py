"""A chat template is bounded in what it makes and in its time; others render as ever."""

from __future__ import annotations

import resource
from typing import Any

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

import nanollama
from nanollama import ChatTemplate, TemplateError, TextFiles
from nanollama_extras.answers import templates

USER = {"role": "user", "content": "hello\n there"}
BIG = "{% set s = 'abcdefgh' * 2000000 %}"  # 16 million characters
NESTED = (
    "{% set ns = namespace(l=['x' * 1000]) %}"
    "{% for i in range(40) %}{% set ns.l = [ns.l, ns.l] %}{% endfor %}"
)
DOUBLED = "{% set ns = namespace(s='xy') %}{% for i in range(60) %}{% set ns.s = "
END = " %}{% endfor %}{{ ns.s | length }}"


def render(source: str, **fields: Any) -> str:
    template = ChatTemplate(TextFiles("memory", templates={"default": source}))
    return template.render([{**USER, **fields}])


@pytest.fixture(autouse=True)
def _little_memory() -> Any:
    """An address space in which a value of gigabytes has no place."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        used = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (3 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize(
    "source",
    [
        "{{ 'x' * 100000000 }}",
        "{{ 100000000 * 'x' }}",
        "{{ ([0] * 100000000) | length }}",
        "{% for i in range(100000) %}" + "x" * 1000 + "{% endfor %}",
        "{% macro m() %}{% for i in range(99999) %}"
        + "x" * 999
        + "{% endfor %}{% endmacro %}{{ m() }}",
        DOUBLED + "ns.s ~ ns.s" + END,
        DOUBLED + "ns.s + ns.s" + END,
        DOUBLED + "ns.s.replace('x', 'xx')" + END,
        DOUBLED + "ns.s | replace('x', 'xx')" + END,
        DOUBLED + "'%s%s' % (ns.s, ns.s)" + END,
        DOUBLED + "'{0}{0}'.format(ns.s)" + END,
        DOUBLED + "[ns.s, ns.s] | join" + END,
        DOUBLED + "''.join([ns.s, ns.s])" + END,
        DOUBLED.replace("'xy'", "[1]") + "ns.s + ns.s" + END,
        DOUBLED.replace("'xy'", "9") + "ns.s * ns.s" + END,
        "{{ 9 ** 99999999 }}",
        "{{ 'x' | center(100000000) }}",
        "{{ 'x'.ljust(100000000) }}",
        "{{ 'x'.zfill(100000000) }}",
        "{{ ('\t' * 1000).expandtabs(1000000) }}",
        "{{ ('a\n' * 1000) | indent(1000000) }}",
        "{{ ('a ' * 100000) | wordwrap(1, wrapstring='x' * 10000) }}",
        "{{ messages | tojson(indent=100000000) }}",
        "{{ [1] | batch(1000000000, 2) | list | length }}",
        "{{ '%100000000d' % 1 }}",
        "{{ '%*d' % (100000000, 1) }}",
        "{{ '%100000000d' | format(1) }}",
        "{{ '{:100000000}'.format(1) }}",
        "{{ '{:{}}'.format(1, 100000000) }}",
        BIG + "{{ s.translate({97: s}) }}",
        BIG + "{{ ([0] * 1000) | join(s) }}",
        BIG + "{{ s.join(messages[0].content * 100) }}",
        BIG + "{{ [s] * 100 }}",
        BIG + "{{ ([s] * 100) | tojson }}",
        BIG + "{{ ([s] * 100) | string | length }}",
        BIG + "{{ '' ~ [s] * 100 }}",
        BIG + "{{ '%s' % ([s] * 100) }}",
        BIG + "{% for i in range(99) %}{{ s.upper() | length }}{% endfor %}",
        NESTED + "{{ ns.l }}",
        NESTED + "{{ ns.l | tojson }}",
        NESTED + "{{ ns.l | string | length }}",
        NESTED + "{{ '{}'.format(ns.l) | length }}",
        NESTED + "{{ [ns.l] | join | length }}",
        "{{ ([[1] * 9999] * 9999) | sum(start=[]) | length }}",
    ],
)
def test_a_template_that_makes_too_much_is_stopped(source: str) -> None:
    with pytest.raises(TemplateError, match="the chat template was stopped: "):
        render(source)


@pytest.mark.parametrize(
    "source",
    [
        "{% set r = range(100000) %}{% for i in r %}{% for j in r %}{% for k in r %}"
        "{% endfor %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{{ m(n - 1) ~ m(n - 1) if n else '' }}{% endmacro %}{{ m(99) }}",
        "{% for i in range(100000) %}{{ (range(100000) | map('string') | list | length) and '' }}"
        "{% endfor %}",
    ],
)
def test_a_template_that_runs_long_is_stopped(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MOST_SECONDS", 0.2)
    with pytest.raises(
        TemplateError, match=r"the chat template was stopped: it ran for 0\.2 second"
    ):
        render(source)


@pytest.mark.parametrize(
    "source",
    ["{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{{ " + "[" * 9999 + "]" * 9999 + " }}"],
)
def test_recursion_has_an_end(source: str) -> None:
    with pytest.raises(TemplateError, match="the chat template failed: RecursionError"):
        render(source)


def test_a_rendering_has_a_budget_of_its_own() -> None:
    source = BIG + "{% for i in range(12) %}{{ s.upper() | length }} {% endfor %}"
    for _ in range(3):
        assert render(source) == "16000000 " * 12


def test_a_long_conversation_is_rendered() -> None:
    content = "word " * 400_000
    template = ChatTemplate(TextFiles("memory", templates={"default": nanollama.CHATML}))
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": content}] * 4
    assert len(template.render(messages)) > 8 * len(content)


SOURCES = r"""
{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{% endfor %}
{% for m in messages %}{{ loop.previtem }}{{ loop.nextitem }}{{ loop.revindex }}{% endfor %}
{% for k, v in messages[0].items() if k != 'role' %}{{ k }}{{ v }}{% else %}none{% endfor %}
{% for x in nothing %}x{% else %}empty{% endfor %}{% for x in 'abc' %}{{ x }}.{% endfor %}
{% for x in [1, [2, [3]]] recursive %}{{ loop(x) if x is iterable else x }}{% endfor %}
{{ 'a' ~ 1 ~ none ~ nothing ~ true ~ [1, 'x'] }}{{ 1 + 2 * 3 ** 2 % 5 }}{{ 'ab' * 3 }}
{{ '%5.1f|%-8s|%d' % (1.25, 'x', 7) }}{{ '{:>8}|{a}'.format('x', a=2) }}
{{ '%s' | format(3) }}{{ ['a', 1] | join(', ') }}{{ messages | join('-', attribute='role') }}
{{ ', '.join(['x']) }}{{ nothing | join }}{{ nothing | default('d') }}{{ [3, 1] | sort | first }}
{{ [1, 2] | sum }}{{ messages | sum(attribute='n', start=4) }}{{ messages | map('length') | list }}
{{ messages | map(attribute='content') | list }}{{ messages | selectattr('role') | list }}
{{ messages[0].content | replace('l', 'L') | upper | indent(2) | trim }}{{ 'x' | center(9) }}
{{ 'a b'.split() }}{{ ' x '.strip() }}{{ 'abc'.replace('b', '') }}{{ 'a'.startswith('a') }}
{% filter upper %}x{% endfilter %}{% set b %}y{% endset %}{{ b }}{{ messages[0].n }}
{% macro n(a, b=2) %}{{ a }}{{ b }}{{ caller() }}{% endmacro %}{% call n(1) %}z{% endcall %}
{{ [1, 2, 3] | batch(2) | list }}{{ 'a b c' | wordwrap(3) }}{{ {'a': 1} | dictsort }}
{{ range(3) | list }}{{ 7 | string ~ 'x' }}{{ '9' | int + 1 }}{{ 1.5 | round }}{{ [1] + [2] }}
"""


@pytest.mark.parametrize("source", SOURCES.strip().splitlines())
def test_templates_render_as_jinja_does(source: str) -> None:
    theirs = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    expected = theirs.from_string(source).render(messages=[{**USER, "n": 3}])
    assert render(source, n=3) == expected
