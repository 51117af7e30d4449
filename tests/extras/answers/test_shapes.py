"""Messages in the form that a template takes, against transformers' rendering of that form."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

import nanollama
from nanollama import ChatTemplate, TemplateError, TextFiles
from nanollama_extras.answers.tools import tool_style

LOOP = "{% for m in messages %}<{{ m.role }}>"
PARTS = "{% for c in m.content | selectattr('type', 'equalto', 'text') %}{{ c.text }}{% endfor %}"
STRING = "{{ m.content }}{% endfor %}"
EITHER = LOOP + "{% if m.content is string %}{{ m.content | trim }}{% else %}"
TEMPLATES = {  # how a template joins parts -> source, whether it reads strings, parts
    "selected": (LOOP + PARTS + "{% endfor %}", False, True),
    "first": ("{{ messages[0].content[0].text }}", False, True),
    "trimmed": (  # Gemma 3
        EITHER + "{% for c in m.content %}{{ c.text | trim }}{% endfor %}{% endif %}{% endfor %}",
        True,
        True,
    ),
    "lines": (  # Granite 4
        EITHER + "{{ m.content | map(attribute='text') | join('\n') }}{% endif %}{% endfor %}",
        True,
        True,
    ),
    "string": (LOOP + STRING, True, False),
    "notation": (LOOP + "{{ m.content | tojson }}{% endfor %}", True, False),
}
BY_ROLE = LOOP + "{% if m.role == 'system' %}" + PARTS + "{% else %}{{ m.content }}{% endif %}"


def render(source: str, messages: list[dict[str, Any]], **options: Any) -> str:
    """As transformers does."""
    return str(render_jinja_template([messages], chat_template=source, **options)[0][0])


def template(source: str) -> ChatTemplate:
    return ChatTemplate(TextFiles("memory", templates={"default": source}))


def in_parts(message: dict[str, Any], *texts: str) -> dict[str, Any]:
    return {**message, "content": [{"type": "text", "text": text} for text in texts]}


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_reaches_the_template_as_it_reads_it(name: str) -> None:
    source, reads_strings, reads_parts = TEMPLATES[name]
    user = {"role": "user", "content": " What is it? "}
    talk = [user, {"role": "assistant", "content": "Four. "}, user]
    given = [in_parts(m, m["content"]) for m in talk] if not reads_strings else talk
    assert template(source).render(talk) == render(source, given)
    two = in_parts(user, " What is", " it? \n")
    expected = [two if reads_parts else {**user, "content": " What is it? \n"}]
    assert template(source).render([two]) == render(source, expected)


def test_each_role_has_its_own_form() -> None:
    source = BY_ROLE + "{% endfor %}"
    system, user = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}
    expected = render(source, [in_parts(system, "Be kind."), user])
    assert template(source).render([system, user]) == expected
    assert "Be kind." in expected


NO_SYSTEM = (
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
)
ALTERNATE = (
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}"
)


@pytest.mark.parametrize("rule", [NO_SYSTEM, ALTERNATE, NO_SYSTEM + ALTERNATE])
def test_a_system_prompt_that_is_refused_goes_before_the_first_question(
    rule: str, caplog: pytest.LogCaptureFixture
) -> None:
    source = LOOP + rule + STRING
    system, user = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": "Hello"}
    nanollama.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            rendered = template(source).render([system, user, answer, user])
    joined = {"role": "user", "content": "Be kind.\n\nHi"}
    assert rendered == render(source, [joined, answer, user])
    assert sum("takes no system message" in line for line in caplog.messages) == 1


FIRST_ONLY = (
    "{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning') }}{% endif %}"
)


def test_a_system_message_that_comes_later_stays_where_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    system, user = {"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": "Hello"}
    nanollama.warn_once.cache_clear()
    source = LOOP + FIRST_ONLY + STRING
    late = {"role": "user", "content": "Hi\n\nBe kind."}
    with caplog.at_level(logging.WARNING):
        first = template(source).render([system, user, system])
        longer = template(source).render([system, user, system, answer, user])
    assert first == render(source, [system, late])
    assert longer.startswith(first)  # the prefix of the conversation
    assert sum("a later one is the user's" in line for line in caplog.messages) == 1


def test_messages_that_no_form_fits_get_the_first_error() -> None:
    with pytest.raises(TemplateError, match="No system role"):
        template(LOOP + "{{ raise_exception('No system role') }}{% endfor %}").render(
            [{"role": "system", "content": "x"}, {"role": "user", "content": "x"}]
        )


def test_a_call_without_text_is_not_written_as_null() -> None:
    source = (  # LFM2
        LOOP + "{% set text = m.content %}{% if text is not string %}{% set text = text | tojson %}"
        "{% endif %}{{ text }}{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}"
        "{% endfor %}"
    )
    function = {"name": "f", "arguments": '{"x": null}'}
    call = {"id": "a", "type": "function", "function": function}
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "tool_calls": [call]}]
    assert template(source).render(talk) == "<user>Hi<assistant>[f]"
    deepseek = LOOP + "{% if m.content is none %}!{% for c in m.tool_calls %}{{ c.function.name }}"
    deepseek += "{% endfor %}{% else %}{{ m.content + '' }}{% endif %}{% endfor %}"
    assert template(deepseek).render(talk) == "<user>Hi<assistant>!f"


# ---- conversations that published templates refuse or cut ----------------------------------------

USER, SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be kind."}
ANSWER = {"role": "assistant", "content": "Hello"}
FIRST = {"id": "call00001", "type": "function", "function": {"name": "f", "arguments": "{}"}}
SECOND = {**FIRST, "id": "call00002"}
CUT = {**FIRST, "function": {"name": "f", "arguments": '{"x": '}}
RESULT = {"role": "tool", "tool_call_id": "call00001", "content": "sunny"}
LATER = {**RESULT, "tool_call_id": "call00002", "content": "rainy"}


def calls(*listed: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": "", "tool_calls": list(listed)}


TALKS: dict[str, list[dict[str, Any]]] = {
    "a system message in the middle": [USER, ANSWER, SYSTEM, USER],
    "a system message last": [USER, ANSWER, SYSTEM],
    "a system message alone": [SYSTEM],
    "two users in a row": [USER, USER],
    "two answers in a row": [USER, ANSWER, ANSWER, USER],
    "an answer first": [ANSWER, USER],
    "an empty answer": [USER, {"role": "assistant"}, USER],
    "a result without a call": [USER, RESULT],
    "a result first": [RESULT, USER],
    "a call without a result": [USER, calls(FIRST), USER],
    "a call that was cut": [USER, calls(CUT), USER],
    "two calls": [USER, calls(FIRST, SECOND), RESULT, LATER, ANSWER, USER],
    "two calls, one result": [USER, calls(FIRST, SECOND), RESULT, USER],
    "a question before the result": [USER, calls(FIRST), USER, RESULT],
}
FOLDER = Path(__file__).parents[2] / "data" / "chat_templates"
PUBLISHED = {path.stem: path.read_text(encoding="utf-8") for path in FOLDER.glob("*.jinja")}
ONE_AT_A_TIME = (  # as Llama 3.1's
    LOOP + "{% if m.tool_calls %}{% if m.tool_calls | length != 1 %}"
    "{{ raise_exception('This model only supports single tool-calls at once!') }}{% endif %}"
    "[{{ m.tool_calls[0].id }}]{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.mark.parametrize("talk", TALKS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_no_conversation_is_refused_or_loses_a_text(name: str, talk: str) -> None:
    ours = template(PUBLISHED[name])
    ours.special_tokens = {"bos_token": "<s>", "eos_token": "</s>"}
    prompt = ours.prompt(TALKS[talk])
    for message in TALKS[talk]:
        assert str(message.get("content") or "") in prompt


def test_several_calls_become_several_messages(caplog: pytest.LogCaptureFixture) -> None:
    nanollama.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        text = template(ONE_AT_A_TIME).render([USER, calls(SECOND, FIRST), RESULT, LATER])
    assert text == ("<user>Hi<assistant>[call00002]<tool>rainy<assistant>[call00001]<tool>sunny")
    assert sum("takes one call at a time" in line for line in caplog.messages) == 1


def test_the_form_of_calls_is_learnt_from_the_template_alone() -> None:
    """Text in the place of a call is no answer to whether the template writes calls."""
    source = LOOP + NO_SYSTEM + ALTERNATE + STRING  # Gemma 2
    assert not tool_style(template(source)).writes_calls
    text = template(source).prompt([USER, calls(FIRST), RESULT])
    assert "<user>Hi<assistant>" in text
    assert "sunny" in text


def test_a_system_message_that_a_template_leaves_out_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    source = "{% if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
    source += LOOP + "{% if m.role != 'system' %}{{ m.content }}{% endif %}{% endfor %}"
    nanollama.warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        text = template(source).render([SYSTEM, USER, SYSTEM])
    assert text == "Be kind.<system><user>Hi\n\nBe kind."
    assert sum("a later one is the user's" in line for line in caplog.messages) == 1
