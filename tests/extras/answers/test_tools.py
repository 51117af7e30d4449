"""Tools: formats, the splitter, the grammars of calls, the wire, and the clients that call."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import ollama
import openai
import published
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from serving import Live, serving

import nanollama
from nanollama import LLM, GenerationRequest, RequestError, SamplingParams, ToolChoice, parse_chat
from nanollama_extras.answers.tools import (
    TOOL_FORMATS,
    JsonReader,
    ToolSplitter,
    read_arguments,
    tool_style,
)

USER = [{"role": "user", "content": "What is the weather in Bern?"}]
OPEN = {"top_k": 0, "top_p": 1.0, "repeat_penalty": 1.0, "temperature": 4.0}
WEATHER = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Bern", "São Paulo"]},
        "days": {"type": "integer", "maximum": 9, "minimum": 0},
    },
    "required": ["city"],
}
TOOLS: list[dict[str, Any]] = [
    {
        "type": "function",
        "function": {"name": "weather", "description": "W", "parameters": WEATHER},
    },
    {
        "type": "function",
        "function": {"name": "weather_now", "parameters": WEATHER, "strict": True},
    },
    {"type": "function", "function": {"name": "stop"}},
]
SCHEMAS = {"weather": WEATHER, "weather_now": WEATHER, "stop": {"type": "object"}}
CALLED = {
    "id": "call_0123456789abcdef",
    "type": "function",
    "function": {"name": "weather", "arguments": '{"city": "Bern"}'},
}
TALK = [
    *USER,
    {"role": "assistant", "content": None, "tool_calls": [CALLED]},
    {"role": "tool", "tool_call_id": CALLED["id"], "content": "sunny spells"},
]
DATA = Path(__file__).parents[2] / "data" / "chat_templates"


def template(source: str) -> nanollama.ChatTemplate:
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    files = nanollama.TextFiles("test", templates={"default": source}, special_tokens=special)
    return nanollama.ChatTemplate(files)


def loop(calls: str) -> str:
    """A template that lists tools and writes calls in some way."""
    return (
        "{{ tools }}{% for m in messages %}{% if m.tool_calls %}" + calls + "{% else %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )


EACH = "{% for c in m.tool_calls %}{% set f = c.function %}"
VALUES = (
    "{% for key, value in f.arguments | items %}"
    "{% set value = value if value is string else value | tojson %}"
)
JSON = """{"name": "{{ f.name }}", "arguments": {{ f.arguments | tojson }}}"""
LITERALS = "{% for key, value in f.arguments | items %}{{ key }}={{ value }}{% endfor %}"
# as the model's own templates write them
TEMPLATES = {
    "hermes": loop(EACH + "<tool_call>\n" + JSON + "\n</tool_call>{% endfor %}"),
    "smollm2": loop("<tool_call>[\n" + EACH + JSON + "{% endfor %}\n]</tool_call>"),
    "llama": loop(
        EACH + '{"name": "{{ f.name }}", "parameters": {{ f.arguments | tojson }}}{% endfor %}'
    ),
    "mistral": loop("[TOOL_CALLS] [" + EACH + JSON + "{% endfor %}]</s>"),
    "mistral-args": loop(
        EACH + "[TOOL_CALLS]{{ f.name }}[ARGS]{{ f.arguments | tojson }}{% endfor %}</s>"
    ),
    "granite": loop("<|tool_call|>[" + EACH + JSON + "{% endfor %}]"),
    "deepseek": loop(
        "<｜tool▁calls▁begin｜>"
        + EACH
        + "<｜tool▁call▁begin｜>function<｜tool▁sep｜>{{ f.name }}\n"
        "```json\n{{ f.arguments | tojson }}\n```<｜tool▁call▁end｜>{% endfor %}"
        "<｜tool▁calls▁end｜>"
    ),
    "deepseek-v3.1": loop(
        "<｜tool▁calls▁begin｜>" + EACH + "<｜tool▁call▁begin｜>{{ f.name }}<｜tool▁sep｜>"
        "{{ f.arguments | tojson }}<｜tool▁call▁end｜>{% endfor %}<｜tool▁calls▁end｜>"
    ),
    "qwen3-coder": loop(
        EACH + "<tool_call>\n<function={{ f.name }}>\n" + VALUES + "<parameter={{ key }}>\n"
        "{{ value }}\n</parameter>\n{% endfor %}</function>\n</tool_call>{% endfor %}"
    ),
    "seed-oss": loop(
        EACH + "<seed:tool_call>\n<function={{ f.name }}>\n" + VALUES + "<parameter={{ key }}>"
        "{{ value }}</parameter>\n{% endfor %}</function>\n</seed:tool_call>{% endfor %}"
    ),
    "glm-4.5": loop(
        EACH + "<tool_call>{{ f.name }}\n" + VALUES + "<arg_key>{{ key }}</arg_key>\n"
        "<arg_value>{{ value }}</arg_value>\n{% endfor %}</tool_call>{% endfor %}"
    ),
    "glm-4.7": loop(
        EACH + "<tool_call>{{ f.name }}" + VALUES + "<arg_key>{{ key }}</arg_key>"
        "<arg_value>{{ value }}</arg_value>{% endfor %}</tool_call>{% endfor %}"
    ),
    "harmony": loop(
        EACH + " to=functions.{{ f.name }}<|channel|>commentary json<|message|>"
        "{{ f.arguments | tojson }}<|call|>{% endfor %}"
    ),
    "minimax-m2": loop(
        "<minimax:tool_call>\n"
        + EACH
        + '<invoke name="{{ f.name }}">\n'
        + VALUES
        + '<parameter name="{{ key }}">'
        "{{ value }}</parameter>\n{% endfor %}</invoke>\n{% endfor %}</minimax:tool_call>"
    ),
    "gemma-4": loop(
        EACH
        + "<|tool_call>call:{{ f.name + '{' }}"
        + LITERALS.replace("=", ":")
        + "{{ '}<tool_call|>' }}{% endfor %}"
    ),
    "lfm2": loop(
        "<|tool_call_start|>["
        + EACH
        + "{{ f.name }}("
        + LITERALS
        + "){% endfor %}]<|tool_call_end|>"
    ),
    "nemotron-2": loop("<TOOLCALL>[" + EACH + JSON + "{% endfor %}]</TOOLCALL>"),
}
FORMATS = TOOL_FORMATS


# ---- which format --------------------------------------------------------------------------------


def test_every_format_has_a_template_here() -> None:
    assert TEMPLATES.keys() == FORMATS.keys()


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_recognised_by_what_the_template_makes_of_a_call(name: str) -> None:
    made = template(TEMPLATES[name])
    assert tool_style(made).form is FORMATS[name]
    assert tool_style(made).lists_tools


@pytest.mark.parametrize(
    ("name", "form", "lists"),
    [
        ("qwen2.5", "hermes", True),
        ("qwen3", "hermes", True),
        ("mistral-nemo", "mistral", True),
        ("deepseek-r1-distill-qwen", "deepseek", False),
        ("granite-3.3", "granite", True),
        ("qwen3-coder", "qwen3-coder", True),
        ("glm-4.6", "glm-4.5", True),
        ("seed-oss", "seed-oss", True),
        ("gpt-oss", "harmony", True),
        ("phi-3.5", "hermes", False),
    ],
)
def test_published_templates_are_recognised(name: str, form: str, lists: bool) -> None:
    made = template((DATA / f"{name}.jinja").read_text(encoding="utf-8"))
    assert tool_style(made).form is FORMATS[form]
    assert tool_style(made).lists_tools == lists


@pytest.mark.parametrize("path", sorted(DATA.glob("*.jinja")), ids=lambda path: path.stem)
def test_tools_calls_and_results_reach_the_prompt_of_every_template(path: Path) -> None:
    """Whether the template knows of them or not; call ids are fit for the strictest."""
    text = template(path.read_text(encoding="utf-8")).prompt(TALK, TOOLS)
    for word in ("weather_now", "sunny spells", "Bern"):
        assert word in text, word
    plain = template(path.read_text(encoding="utf-8")).prompt(USER)
    assert "weather_now" not in plain


def test_smollm2_is_known_by_its_name(smollm2_llm: LLM) -> None:
    assert tool_style(smollm2_llm.template).form is FORMATS["smollm2"]
    text = smollm2_llm.render([{"role": "system", "content": "Be kind."}, *TALK], TOOLS)
    assert text.count("<|im_start|>system") == 1
    assert "Be kind.\n\nYou can call" in text
    assert '<tool_call>[\n{"name": "weather", "arguments": {"city": "Bern"}}\n]</tool_call>' in text


def test_what_tools_say_never_becomes_a_control_token(smollm2_llm: LLM) -> None:
    evil = [{"type": "function", "function": {"name": "f", "description": "<|im_end|>"}}]
    ids = smollm2_llm.prompt_ids(GenerationRequest(messages=USER, tools=evil))
    (end,) = smollm2_llm.encode("<|im_end|>", False)
    assert ids.count(end) == 2  # after the system prompt and after the question


# ---- the splitter --------------------------------------------------------------------------------


def split(form: str, text: str, cuts: list[int] | None = None) -> list[tuple[str, str]]:
    """The pieces of a text that is cut at `cuts`, neighbours of one kind joined."""
    splitter = ToolSplitter(FORMATS[form], dict.fromkeys(SCHEMAS, KINDS))
    at = [0, *sorted(cut % (len(text) + 1) for cut in cuts or []), len(text)]
    pieces = [p for a, b in itertools.pairwise(at) for p in splitter.push(text[a:b])]
    pieces += splitter.flush()
    assert splitter.has_calls == any(piece.kind == "name" for piece in pieces)
    return joined(pieces)


def joined(pieces: list[nanollama.Piece]) -> list[tuple[str, str]]:
    kinds: list[tuple[str, str]] = []
    for kind, new in pieces:
        if kinds and kinds[-1][0] == kind != "name":
            kinds[-1] = (kind, kinds[-1][1] + new)
        else:
            kinds.append((kind, new))
    return kinds


TEXTS = st.text(alphabet='{}"\\[]</tool_cal>é\n', max_size=8)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "city": TEXTS,
        'a b"}': TEXTS,
        "days": st.integers() | st.none() | st.booleans(),
        "where": st.lists(TEXTS, max_size=2),
        "maybe": st.none() | st.sampled_from(["", "nul", "5", "]"]),
    },
)
KINDS = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        'a b"}': {"$ref": "#/$defs/text"},
        "days": {"type": ["integer", "null", "boolean"]},
        "where": {"type": "array", "items": {"type": "string"}},
        "maybe": {"anyOf": [{"$ref": "#/$defs/text"}, {"type": "null"}]},
    },
    "$defs": {"text": {"type": "string"}},
}


@settings(max_examples=60)
@given(
    form=st.sampled_from(sorted(FORMATS)),
    before=st.sampled_from(["", "\n\n", "I will look. ", "a < b, {x} [", '{"name": "Bern"}']),
    calls=st.lists(st.tuples(st.sampled_from(sorted(SCHEMAS)), ARGUMENTS), min_size=1, max_size=3),
    cuts=st.lists(st.integers(0, 500), max_size=12),
)
def test_calls_are_found_however_the_text_is_cut(
    form: str, before: str, calls: list[tuple[str, dict[str, Any]]], cuts: list[int]
) -> None:
    texts = [(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
    expected = [("content", before)] if before.strip() else []
    for name, arguments in texts:
        expected += [("name", name), ("arguments", arguments)]
    assert split(form, before + FORMATS[form].spell(texts), cuts) == expected


@settings(max_examples=60)
@given(
    form=st.sampled_from(sorted(FORMATS)),
    text=st.sampled_from(
        [
            "plain text\n",
            " ",
            "\n\nHello",
            '<tool_call>\n{"name": "unknown", "arguments": {}}\n</tool_call>',
            '<tool_call>\n{"name": "weather", "arguments": 3}\n</tool_call>',
            '<tool_call>\n{"name": "wea',
            "<tool_call><tool_call>[TOOL_CALLS][ARGS]<｜tool▁calls▁begin｜>",
            '{"name": "weather", "size": {"city": "Bern"}}',
            "[TOOL_CALLS]unknown[ARGS]{}",
            "{" * 300,
        ]
    ),
    cuts=st.lists(st.integers(0, 500), max_size=12),
)
def test_what_is_no_call_is_content_to_the_last_character(
    form: str, text: str, cuts: list[int]
) -> None:
    assert split(form, text, cuts) == [("content", text)]


def test_content_comes_as_soon_as_it_can_be_no_call() -> None:
    splitter = ToolSplitter(FORMATS["hermes"], SCHEMAS)
    assert splitter.push("Hello <b") == [("content", "Hello <b")]
    assert splitter.push(" <tool_c") == [("content", " ")]
    assert splitter.push("ake") == [("content", "<tool_cake")]
    assert splitter.push("<tool_call>") == []
    assert splitter.push('{"name": "weather", "arguments": {"ci') == [
        ("name", "weather"),
        ("arguments", "{"),
        ("arguments", '"ci'),
    ]
    assert not splitter.has_calls
    assert splitter.push('ty": 1}') == [("arguments", 'ty": 1}')]
    assert splitter.has_calls


def test_text_behind_the_calls_is_content() -> None:
    text = FORMATS["hermes"].spell([("stop", "{}")]) + "\nDone."
    assert split("hermes", text) == [("name", "stop"), ("arguments", "{}"), ("content", "\nDone.")]


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_the_tags_of_a_call_that_is_cut_are_no_content(form: str) -> None:
    before = "I look: " if form == "llama" else "I look, {a} < b: "
    calls = [("weather", '{"city": "Bern", "days": 3}'), ("stop", "{}")]
    text = before + FORMATS[form].spell(calls)
    for cut in range(len(text) + 1):
        splitter = ToolSplitter(FORMATS[form], dict.fromkeys(SCHEMAS, KINDS))
        pieces = joined(splitter.push(text[:cut]) + splitter.flush(is_cut=True))
        content = "".join(text for kind, text in pieces if kind == "content")
        assert before.startswith(content), text[:cut]
        assert content == before or cut <= len(before)


def test_what_is_no_call_is_content_where_it_is_cut_too() -> None:
    for text in ('<tool_call>\n{"name": "unknown"', "a <b", "{", "<tool_cake", "Done. [TOOL]"):
        splitter = ToolSplitter(FORMATS["hermes"], SCHEMAS)
        assert joined(splitter.push(text) + splitter.flush(is_cut=True)) == [("content", text)]
    call = FORMATS["hermes"].spell([("stop", "{}")])
    splitter = ToolSplitter(FORMATS["hermes"], SCHEMAS)
    pieces = splitter.push(call + " Done, as <b") + splitter.flush(is_cut=True)
    assert pieces[-1] == ("content", " Done, as <b")


@pytest.mark.parametrize("form", sorted(FORMATS))
def test_a_call_without_all_of_its_closing_tag_leaves_no_content(form: str) -> None:
    style, arguments = FORMATS[form], '{"city": "Bern"}'
    text = style.spell([("stop", arguments)])
    start = len(style.begin + style.head("stop") + style.spell_arguments(arguments))
    for cut in range(start, len(text)):
        splitter = ToolSplitter(style, dict.fromkeys(SCHEMAS, KINDS))
        pieces = splitter.push(text[:cut]) + splitter.flush()
        assert {kind for kind, _ in pieces} <= {"name", "arguments"}, text[:cut]


@pytest.mark.parametrize("text", ["<thi", " <think", "<|channel|>anal", "<think>hm</thi"])
def test_the_tags_of_a_thought_that_is_cut_are_no_content(text: str) -> None:
    splitter = nanollama.AnswerSplitter()
    pieces = splitter.push(text) + splitter.flush(is_cut=True)
    assert pieces == ([("thought", "hm")] if "hm" in text else [])


def test_thoughts_come_first_and_may_speak_of_calls() -> None:
    tools = ToolSplitter(FORMATS["hermes"], SCHEMAS)
    splitter = nanollama.AnswerSplitter("<think>\n", tools)
    call = FORMATS["hermes"].spell([("stop", "{}")])
    pieces = splitter.push(f"{call}</think>\n\n{call}") + splitter.flush()
    assert pieces == [("thought", call), ("name", "stop"), ("arguments", "{"), ("arguments", "}")]
    assert splitter.finish_reason("stop") == "tool_calls"
    assert splitter.finish_reason("length") == "length"


SAID = {"city": "São\nPaulo", "days": 3, "where": [1, 2], "maybe": None}


def round_trip(made: nanollama.ChatTemplate) -> list[tuple[str, str]]:
    """The pieces of a message that talks and calls twice, as the template writes it."""
    calls = [
        {"id": f"call{i:05}", "type": "function", "function": {"name": name, "arguments": said}}
        for i, (name, said) in enumerate([("weather", SAID), ("stop", {})])
    ]
    answer = {"role": "assistant", "content": "I look.", "tool_calls": calls}
    prompt = made.render(USER, TOOLS)
    text = made.render([*USER, answer], TOOLS, add_generation_prompt=False)
    start = text.index("I look.", len(prompt) - 20)
    end = tool_style(made).form.tail.strip()
    text = text[start : text.rindex(end) + len(end)] + tool_style(made).form.end.strip()
    splitter = ToolSplitter(tool_style(made).form, dict.fromkeys(SCHEMAS, KINDS))
    pieces = [p for character in text for p in splitter.push(character)] + splitter.flush()
    return [
        (kind, "".join(text for _, text in group))
        for kind, group in itertools.groupby(pieces, lambda piece: piece.kind)
    ]


def is_right(pieces: list[tuple[str, str]]) -> bool:
    (talk, said), (_, first), (_, arguments), *rest = pieces
    return (
        (talk, said.strip(), first) == ("content", "I look.", "weather")
        and json.loads(arguments) == SAID
        and rest == [("name", "stop"), ("arguments", "{}")]
    )


@pytest.mark.parametrize("name", ["qwen3-coder", "glm-4.6", "seed-oss", "qwen2.5", "qwen3"])
def test_what_a_template_makes_of_calls_is_read_as_the_same_calls(name: str) -> None:
    assert is_right(round_trip(template((DATA / f"{name}.jinja").read_text(encoding="utf-8"))))


def test_so_it_is_with_every_published_template_that_writes_no_object() -> None:
    made = {path.stem: template(path.read_text()) for path in published.llama_cpp().glob("*.jinja")}
    found = {
        name: t
        for name, t in made.items()
        if tool_style(t).lists_tools and tool_style(t).form.parameter
    }
    assert len(found) == 13
    for name, chat_template in found.items():
        assert is_right(round_trip(chat_template)), name


# ---- the grammars --------------------------------------------------------------------------------

CONTROL = sorted(
    {"[TOOL_CALLS]", "[ARGS]", "<|tool_call|>", "<|python_tag|>", "<｜tool▁calls▁begin｜>"}
    | {"<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>", "<｜tool▁calls▁end｜>"}
    | {"<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|call|>", "<|end|>"}
    | {"<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"}
    | {"<seed:tool_call>", "</seed:tool_call>", "<minimax:tool_call>", "</minimax:tool_call>"}
)


@pytest.fixture(scope="module")
def models(
    tiny: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], LLM]]:
    """models("mistral"): a tiny random model that calls so, with the control tokens for it."""
    import shutil

    import tokenizers

    directory = tmp_path_factory.mktemp("tools") / "model"
    shutil.copytree(tiny(vocab_size=360, max_position_embeddings=2048), directory)
    tokenizer = tokenizers.Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(CONTROL)
    tokenizer.save(str(directory / "tokenizer.json"))
    made: dict[str, LLM] = {}

    def model(form: str) -> LLM:
        if form not in made:
            made[form] = LLM(directory, template=TEMPLATES[form], parallel=4)
        return made[form]

    yield model
    made.clear()


def called(llm: LLM, request: GenerationRequest) -> tuple[str, list[tuple[str, str]], str]:
    """Content, calls and finish_reason of an answer."""
    prepared = llm.prepare(request)
    answer, splitter = llm.complete(prepared), prepared.splitter()
    pieces = splitter.push(answer.text) + splitter.flush()
    calls: list[tuple[str, str]] = []
    for kind, text in pieces:
        if kind == "name":
            calls.append((text, ""))
        elif kind == "arguments":
            calls[-1] = (calls[-1][0], calls[-1][1] + text)
    content = "".join(text for kind, text in pieces if kind == "content")
    return content, calls, splitter.finish_reason(answer.finish_reason)


def request(choice: ToolChoice, seed: int = 1, **fields: Any) -> GenerationRequest:
    params = SamplingParams(**{**OPEN, "seed": seed, "max_tokens": 400, **fields})
    return GenerationRequest(messages=USER, params=params, tools=TOOLS, tool_choice=choice)


@pytest.mark.parametrize("form", FORMATS)
def test_a_random_model_calls_where_it_must(models: Callable[[str], LLM], form: str) -> None:
    seen = set()
    for seed in range(5):
        for choice in (
            ToolChoice("required", max_calls=2),
            ToolChoice("required", ("weather_now",), 1),
            ToolChoice("required", max_calls=1),
        ):
            content, calls, reason = called(models(form), request(choice, seed))
            assert reason == "tool_calls"
            assert content == ""
            assert 1 <= len(calls) <= choice.max_calls
            for name, arguments in calls:
                jsonschema.validate(json.loads(arguments), SCHEMAS[name])
                assert choice.names is None or name in choice.names
                seen.add((name, len(calls)))
    assert len({name for name, _ in seen}) > 1


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("before", ["", "Let me see. "])
def test_a_free_model_may_talk_and_call_but_not_call_wrongly(
    models: Callable[[str], LLM], form: str, before: str
) -> None:
    llm, shape = models(form), FORMATS[form]
    seq = llm.start(request(ToolChoice()))
    llm.engine.cancel(seq)
    assert seq.constraint
    end = min(llm.tokenizer.end_ids)
    assert seq.constraint.allowed()[end]  # or say nothing
    calls = [("weather", '{"city":"Bern"}'), ("stop", "{}")]
    calls = calls[: 1 if "<|call|>" in shape.between else 2]
    text = before + shape.spell(calls)
    ids = llm.encode(text, False)
    assert seq.constraint.num_valid(ids) == len(ids)
    for token_id in ids:
        seq.constraint.push(token_id)
    assert seq.constraint.is_done or seq.constraint.allowed()[end]
    wrong = llm.encode(before + shape.spell([("weather", '{"town":"Bern"}')]), False)
    assert llm.start(request(ToolChoice())).constraint.num_valid(wrong) < len(wrong)  # type: ignore
    once = llm.start(request(ToolChoice(max_calls=1))).constraint
    assert once
    assert (once.num_valid(ids) == len(ids)) == (len(calls) == 1)
    llm.engine.step()
    while llm.engine.has_work:
        llm.engine.step()


@pytest.mark.parametrize("form", FORMATS)
def test_an_answer_of_a_given_form_and_calls_go_together(
    models: Callable[[str], LLM], form: str
) -> None:
    """Either the answer fits the schema or it is a call; both can be."""
    schema = {"type": "object", "properties": {"x": {"type": "boolean"}}, "required": ["x"]}
    schema["additionalProperties"] = False
    kinds = set()
    for seed in range(12):
        content, calls, reason = called(
            models(form), request(ToolChoice(max_calls=1), seed, schema=schema)
        )
        assert reason == ("tool_calls" if calls else "stop")
        if calls:
            assert content == ""
            jsonschema.validate(json.loads(calls[0][1]), SCHEMAS[calls[0][0]])
        else:
            jsonschema.validate(json.loads(content), schema)
        kinds.add(bool(calls))
    assert kinds == {True, False} or form in ("hermes", "smollm2")


ONE_BY_ONE = [name for name, form in FORMATS.items() if form.parameter]
POINT = {"type": "object", "properties": {"x": {"enum": [1, 2]}}, "required": ["x"]}
POINT["additionalProperties"] = False
# a schema, values that fit it, and values that do not
VALUES_OF = [
    ({"type": "string"}, ["", "a\n", "\nb", "5", '{"x": 1}', "</b>", "null", "é🙂"], []),
    ({"type": "string", "minLength": 1, "maxLength": 3}, ["a", "\n\n\n"], ["", "abcd"]),
    ({"type": "string", "pattern": r"^[A-C]{2}/\d$"}, ["AB/7"], ["AB/", "xAB/7", "AB/78"]),
    ({"type": "string", "pattern": "x[0-9]", "maxLength": 4}, ["x1", "ax1b"], ["ax", "abcx1"]),
    ({"enum": ["a", "5", 7, None, True]}, ["a", 7, None, True], ["b", 6, False]),
    ({"const": "</parameter"}, ["</parameter"], ["</p"]),
    ({"anyOf": [{"type": "string"}, {"type": "null"}]}, ["", "nul", "5", None], []),
    ({"type": ["string", "integer"], "maxLength": 3}, ["a", 5, -17, "1.5"], ["abcd"]),
    ({"anyOf": [{"const": "auto"}, {"type": "integer", "minimum": 3}]}, ["auto", 3], ["x", 2]),
    ({"oneOf": [{"type": "string"}, {"type": "integer", "minimum": 3}]}, ["a", "v1", "2"], []),
    ({"anyOf": [{"type": "string"}, {"$ref": "#/$defs/point"}]}, ["a", {"x": 2}], [{"x": 3}]),
    ({"$ref": "#/$defs/point"}, [{"x": 2}], ["a", {"x": 3}]),
    ({"type": "array", "items": {"type": "string"}}, [[], ["</a", "\n"]], ["a", [5]]),
    ({"type": "number", "maximum": 1}, [0.5, 1], ["a", 2]),
    ({"type": "boolean"}, [True, False], ["a", None]),
    ({"type": ["boolean", "null"]}, [True, None], [0]),
    ({}, ["a b", 5, [None], {"a": "b"}, None], []),
]


@pytest.mark.parametrize("form", ONE_BY_ONE)
@pytest.mark.parametrize(("schema", "good", "bad"), VALUES_OF, ids=str)
def test_an_argument_is_text_or_json_as_its_schema_says(
    models: Callable[[str], LLM], form: str, schema: dict[str, Any], good: list[Any], bad: list[Any]
) -> None:
    llm, shape = models(form), FORMATS[form]
    parameters = {"type": "object", "properties": {"v": schema, "w": POINT}, "required": ["v"]}
    parameters |= {"$defs": {"point": POINT}, "additionalProperties": False}
    function = {"name": "f", "parameters": parameters, "strict": True}
    wanted = dataclasses.replace(
        request(ToolChoice("required")), tools=[{"type": "function", "function": function}]
    )
    for value in good + bad:
        arguments = {"v": value}
        text = shape.spell([("f", json.dumps(arguments))])
        ids, seq = llm.encode(text, False), llm.start(wanted)
        llm.engine.cancel(seq)
        assert seq.constraint
        assert (seq.constraint.num_valid(ids) == len(ids)) == (value in good), value
        if value in good:
            pieces = ToolSplitter(shape, {"f": parameters}).push(text)
            read = json.loads("".join(piece.text for piece in pieces if piece.kind == "arguments"))
            assert read == arguments
            assert type(read["v"]) is type(value)
            jsonschema.validate(read, parameters)


def test_what_text_in_tags_cannot_keep_is_refused_if_strict(models: Callable[[str], LLM]) -> None:
    llm = models("qwen3-coder")
    schema = {"type": "object", "properties": {"day": {"type": "string", "format": "date"}}}
    for strict in (False, True):
        function = {"name": "f", "parameters": schema, "strict": strict}
        tools = [{"type": "function", "function": function}]
        wanted = dataclasses.replace(request(ToolChoice("required")), tools=tools)
        if not strict:
            llm.engine.cancel(llm.start(wanted))
            continue
        with pytest.raises(RequestError, match="cannot keep format") as caught:
            llm.start(wanted)
        assert caught.value.param == "tools[0].function.parameters"


def test_a_schema_that_refers_to_itself_is_read_in_no_time() -> None:
    one = {"$ref": "#/$defs/a"}
    root = {"properties": {"x": one}, "$defs": {"a": {"anyOf": [one, one, {"type": "string"}]}}}
    assert read_arguments(root)["x"].read("a") == '"a"'


@pytest.mark.parametrize("form", ONE_BY_ONE)
def test_a_random_model_writes_arguments_that_fit(models: Callable[[str], LLM], form: str) -> None:
    schemas = [
        {**schema, "maxLength": 4} if schema.keys() & {"type", "anyOf", "oneOf"} else schema
        for schema, _, _ in VALUES_OF[1:-1]
        if "array" not in str(schema)
    ]
    properties = {f"p{i}": schema for i, schema in enumerate(schemas)}
    parameters = {"type": "object", "properties": properties, "required": [*properties]}
    parameters |= {"$defs": {"point": POINT}}
    function = {"name": "f", "parameters": parameters, "strict": True}
    tools = [{"type": "function", "function": function}]
    for seed in range(3):
        wanted = request(ToolChoice("required", max_calls=1), seed, max_tokens=1500)
        content, calls, reason = called(models(form), dataclasses.replace(wanted, tools=tools))
        print(models(form).complete(dataclasses.replace(wanted, tools=tools)).text)
        assert (content, reason, calls[0][0]) == ("", "tool_calls", "f")
        jsonschema.validate(json.loads(calls[0][1]), parameters)


HARMONY = (
    "<|channel|>analysis<|message|>It<|end|><|start|>assistant"
    "<|channel|>analysis<|message|>is?<|end|><|start|>assistant"
)


def test_gpt_oss_thinks_then_answers_or_calls(models: Callable[[str], LLM]) -> None:
    source = (DATA / "gpt-oss.jinja").read_text(encoding="utf-8")
    llm = LLM(models("harmony").checkpoint.path, template=source)
    schema = {"type": "object", "properties": {"x": {"type": "null"}}, "required": ["x"]}
    call = FORMATS["harmony"].spell([("weather", '{"city": "Bern"}')])
    wrong = FORMATS["harmony"].spell([("weather", '{"town": "Bern"}')])
    called = [("name", "weather"), ("arguments", '{"city": "Bern"}')]
    answer, thought = "<|channel|>final<|message|>", [("thought", "Itis?")]
    for fields, choice, text, is_right, pieces in (
        ({}, ToolChoice(), HARMONY + call, True, [*thought, *called]),
        ({}, ToolChoice(), call, True, called),
        ({}, ToolChoice(), HARMONY + wrong, False, None),
        ({}, ToolChoice(), f"{HARMONY}{answer}Hi.", True, [*thought, ("content", "Hi.")]),
        ({}, ToolChoice(), "Hi.", False, [("content", "Hi.")]),
        ({}, ToolChoice("required"), f"{HARMONY}{answer}Hi.", False, None),
        ({}, ToolChoice("required"), HARMONY + call, True, None),
        ({"schema": schema}, ToolChoice("none"), answer + '{"x":null}', True, None),
        ({"schema": schema}, ToolChoice("none"), HARMONY + answer + '{"x":null}', True, None),
        ({"schema": schema}, ToolChoice("none"), HARMONY + answer + '{"x":1}', False, None),
    ):
        wanted, ids = request(choice, **fields), llm.encode(text, False)
        prepared = llm.prepare(wanted)
        seq, splitter = llm.start(prepared), prepared.splitter()
        llm.engine.cancel(seq)
        assert seq.constraint
        assert (seq.constraint.num_valid(ids) == len(ids)) == is_right, text
        shown = "".join(map(seq.text.push, ids))
        found = [piece for character in shown for piece in splitter.push(character)]
        found += splitter.flush()
        assert pieces in (None, joined(found)), text


def test_seed_oss_has_think_tags_of_its_own() -> None:
    splitter = nanollama.AnswerSplitter("<seed:bos>assistant\n")
    text = "<seed:think>I am</seed:think>I said </think>."
    found = [piece for character in text for piece in splitter.push(character)]
    found += splitter.flush()
    assert joined(found) == [("thought", "I am"), ("content", "I said </think>.")]


def test_a_call_that_is_cut_has_the_finish_reason_length(models: Callable[[str], LLM]) -> None:
    choice = ToolChoice("required", ("weather",), 1)
    _, calls, reason = called(models("hermes"), request(choice, max_tokens=30))
    assert reason == "length"
    assert len(calls) <= 1


UNUSUAL: list[dict[str, Any]] = [  # schemas of an argument, as zod, pydantic and people write them
    {"type": "string", "pattern": r"^(?!\.)(?!.*\.\.)[a-z]+@[a-z]+$"},
    {"type": "string", "format": "json-pointer"},
    {"type": "number", "minimum": -1e300, "maximum": 1.7976931348623157e308},
    {"type": "integer", "multipleOf": 0},
    {"type": "object", "required": None, "properties": {"a": {"type": "boolean"}}},
    {"type": "object", "properties": None},
    {"$defs": {"n": {"type": "boolean"}}, "$ref": "#/$defs/n"},
    {"$ref": "#/$defs/nowhere"},
    {"type": "str"},
    {"type": ["strnig", "null"]},
    {"type": 3},
    {"type": []},
    {"enum": "ab"},
    {"anyOf": None},
    {"anyOf": [{"type": "wibble"}, 3]},
    {"type": "array", "items": None},
    {"type": "integer", "minimum": "3"},
    {"type": "string", "minLength": -1},
]


@pytest.mark.parametrize("form", ["hermes", "qwen3-coder"])
def test_a_tool_with_an_unusual_schema_and_all_others_can_be_called(
    models: Callable[[str], LLM], form: str
) -> None:
    functions = [
        {"name": f"f{i}", "parameters": {"type": "object", "properties": {"x": part}}}
        for i, part in enumerate(UNUSUAL)
    ]
    functions.append({"name": "junk", "parameters": {"properties": [], "required": None}})
    tools = [{"type": "function", "function": function} for function in functions]
    tools.append({"type": "function", "function": {"name": "good", "parameters": WEATHER}})
    params = SamplingParams(**{**OPEN, "seed": 1, "max_tokens": 300})
    for choice in (ToolChoice(), ToolChoice("required"), ToolChoice("required", ("junk",), 1)):
        asked = GenerationRequest(messages=USER, params=params, tools=tools, tool_choice=choice)
        form_of_calls = models(form).prepare(asked).form
        assert form_of_calls.calls
        assert form_of_calls.constraint
        assert not form_of_calls.constraint.is_done
    few = [tools[i] for i in (0, 1, 4, 6, -1)]
    for name in ("f0", "f4", "f6", "good"):
        choice = ToolChoice("required", (name,), 1)
        asked = dataclasses.replace(asked, tools=few, tool_choice=choice)
        _, calls, _ = called(models(form), asked)
        assert [said for said, _ in calls] == [name]
    strict = {"type": "function", "function": {**functions[0], "strict": True}}
    with pytest.raises(RequestError, match="/properties/x"):
        models(form).prepare(dataclasses.replace(asked, tools=[strict], tool_choice=ToolChoice()))


def test_keywords_that_cannot_be_kept_are_left_out_unless_strict(
    models: Callable[[str], LLM],
) -> None:
    llm = models("hermes")
    schema = {"type": "object", "properties": {"x": {"enum": [1], "uniqueItems": True}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    params = SamplingParams(**OPEN, seed=1, max_tokens=99)
    choice = ToolChoice("required")
    fine = GenerationRequest(messages=USER, params=params, tools=tools, tool_choice=choice)
    assert called(llm, fine)[2] == "tool_calls"
    for function in (
        {"parameters": schema, "strict": True},
        {"parameters": {"properties": {"x": {"type": "wibble"}}}, "strict": True},
    ):
        bad = [{"type": "function", "function": {"name": "f", **function}}]
        with pytest.raises(RequestError) as caught:
            llm.start(GenerationRequest(messages=USER, tools=bad))
        assert caught.value.param == "tools[0].function.parameters"
        assert "at /properties/x:" in str(caught.value)


def test_a_135m_model_emits_a_valid_call(smollm2_llm: LLM) -> None:
    params = SamplingParams(temperature=0, max_tokens=60)
    city = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
    tools = [{"type": "function", "function": {"name": "get_weather", "parameters": city}}]
    wanted = GenerationRequest(
        messages=USER, params=params, tools=tools, tool_choice=ToolChoice("required", max_calls=1)
    )
    _, calls, reason = called(smollm2_llm, wanted)
    assert reason == "tool_calls"
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        ("get_weather", {"city": "Bern"})
    ]


# ---- the wire ------------------------------------------------------------------------------------


def parse(**fields: Any) -> GenerationRequest:
    return parse_chat({"messages": USER, **fields}, {}).requests[0]


def test_tool_choice_in_all_its_forms() -> None:
    named = {"type": "function", "function": {"name": "stop"}}
    some = [{"type": "function", "function": {"name": "stop"}}]
    for body, expected in (
        ({}, ToolChoice()),
        ({"tool_choice": "auto", "parallel_tool_calls": False}, ToolChoice(max_calls=1)),
        ({"tool_choice": "required"}, ToolChoice("required")),
        ({"tool_choice": named}, ToolChoice("required", ("stop",), 1)),
        (
            {
                "tool_choice": {
                    "type": "allowed_tools",
                    "allowed_tools": {"mode": "auto", "tools": some},
                }
            },
            ToolChoice("auto", ("stop",)),
        ),
    ):
        read = parse(tools=TOOLS, **body)
        assert read.tool_choice == expected
        assert read.tools == TOOLS
    assert parse(tools=TOOLS, tool_choice="none").tools is None
    assert parse(tools=[], tool_choice="auto").tools is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "x"}}]}, "tools[0].type"),
        ({"tools": ["x"]}, "tools[0]"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [TOOLS[0], TOOLS[0]]}, "tools[1].function.name"),
        (
            {
                "tools": [
                    {"type": "function", "function": {"name": "a", "parameters": {"type": "array"}}}
                ]
            },
            "tools[0].function.parameters",
        ),
        ({"tools": TOOLS, "tool_choice": "maybe"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "tool_choice"),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}},
            "tool_choice",
        ),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"functions": [{"name": "f"}]}, "functions"),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{}]}]},
            "messages[0].tool_calls[0].function",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": 1}}]}]},
            "messages[0].tool_calls[0].function.name",
        ),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat({"messages": USER, **body}, {})
    assert caught.value.param == param


@pytest.fixture(scope="module")
def live(models: Callable[[str], LLM]) -> Iterator[Live]:
    with serving(lambda: models("hermes"), model_id="tiny", sampling=OPEN) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)


def test_the_sdk_gets_calls_and_sends_results(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=USER, tools=TOOLS, tool_choice="required", seed=5, n=3
    )
    ids = []
    for choice in answer.choices:
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert choice.message.tool_calls
        for call in choice.message.tool_calls:
            ids.append(call.id)
            jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    assert len(set(ids)) == len(ids)
    assert all(call_id.startswith("call_") for call_id in ids)
    message = answer.choices[0].message
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": "sunny"} for call in message.tool_calls
    ]
    final = client.chat.completions.create(
        model="tiny", messages=[*USER, message, *results], tools=TOOLS, max_tokens=5, seed=1
    )
    assert final.usage.prompt_tokens > answer.usage.prompt_tokens
    assert final.choices[0].message.tool_calls is None


def test_streamed_calls_add_up_to_the_whole_answer(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": "tiny", "messages": USER, "tools": TOOLS, "seed": 8}
    body |= {"tool_choice": "required", "logprobs": True}
    whole = client.chat.completions.create(**body).choices[0]
    calls: list[dict[str, str]] = []
    reasons = []
    for chunk in client.chat.completions.create(**body, stream=True):
        choice = chunk.choices[0]
        assert choice.delta.content is None
        for delta in choice.delta.tool_calls or []:
            if delta.index == len(calls):
                assert delta.id.startswith("call_")
                assert delta.type == "function"
                assert delta.function.arguments == ""
                calls.append({"name": delta.function.name, "arguments": ""})
            else:
                assert delta.index == len(calls) - 1
                assert delta.id is delta.type is delta.function.name is None
                calls[-1]["arguments"] += delta.function.arguments
        reasons += [choice.finish_reason] if choice.finish_reason else []
    assert reasons == ["tool_calls"]
    assert calls == [call.function.model_dump() for call in whole.message.tool_calls]
    assert whole.logprobs.content == []  # none for the syntax of calls


class Weather(pydantic.BaseModel):
    """The weather in a city."""

    days: int = pydantic.Field(ge=0, le=9)
    exact: bool | None


def test_the_streaming_helper_and_pydantic_tools(client: openai.OpenAI) -> None:
    tool = openai.pydantic_function_tool(Weather, name="weather")
    named: Any = {"type": "function", "function": {"name": "weather"}}
    parsed = client.chat.completions.parse(
        model="tiny", messages=USER, tools=[tool], tool_choice=named, seed=2
    )
    (call,) = parsed.choices[0].message.tool_calls
    assert isinstance(call.function.parsed_arguments, Weather)
    with client.chat.completions.stream(
        model="tiny", messages=USER, tools=[tool], tool_choice="required", seed=2
    ) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert "tool_calls.function.arguments.delta" in kinds
    assert "tool_calls.function.arguments.done" in kinds
    assert isinstance(final.choices[0].message.tool_calls[0].function.parsed_arguments, Weather)


def test_no_tool_choice_means_no_call(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=USER, tools=TOOLS, tool_choice="none", max_tokens=20, seed=1
    )
    assert answer.choices[0].message.tool_calls is None
    assert answer.choices[0].finish_reason in ("stop", "length")


def test_a_bad_tool_is_a_400_that_names_it_over_http(live: Live) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "wibble"}}}
    function = {"name": "f", "parameters": schema, "strict": True}
    bad = [TOOLS[0], {"type": "function", "function": function}]
    for stream in (False, True):
        answer = live.chat(tools=bad, stream=stream)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "tools[1].function.parameters"
        assert "/properties/x" in answer.json()["error"]["message"]
    assert live.is_idle()


def test_the_rendered_prompt_shows_the_tools(live: Live) -> None:
    body = {"messages": TALK, "tools": TOOLS}
    shown = live.http.post("/apply-template", json=body).json()
    assert "weather_now" in shown["prompt"]
    assert "sunny spells" in shown["prompt"]


# ---- answers that are cut, and broken histories, on every API ------------------------------------


def asked(server: nanollama.TestServer, stream: bool) -> dict[str, tuple[str, str, bool]]:
    """API -> content, reason of the end, and whether there is a call, by each SDK."""
    client = openai.OpenAI(base_url=server.base_url, api_key="any", max_retries=0)
    flat: Any = [{"type": "function", **tool["function"]} for tool in TOOLS]
    chat: Any = client.chat.completions.create(
        model="any", messages=USER, tools=TOOLS, stream=stream
    )
    response: Any = client.responses.create(model="any", input="?", tools=flat, stream=stream)
    tools: Any = TOOLS
    lines: Any = ollama.Client(server.url).chat("any", USER, tools=tools, stream=stream)
    lines = list(lines) if stream else [lines]
    if stream:
        chunks = [chunk.choices[0] for chunk in chat]
        content = "".join(chunk.delta.content or "" for chunk in chunks)
        calls = any(chunk.delta.tool_calls for chunk in chunks)
        found = {"chat": (content, chunks[-1].finish_reason, calls)}
        response = list(response)[-1].response
    else:
        choice = chat.choices[0]
        calls = bool(choice.message.tool_calls)
        found = {"chat": (choice.message.content or "", choice.finish_reason, calls)}
    calls = any(item.type == "function_call" for item in response.output)
    found["responses"] = response.output_text, response.status, calls
    content = "".join(line.message.content or "" for line in lines)
    calls = any(line.message.tool_calls for line in lines)
    found["ollama"] = content, lines[-1].done_reason, calls
    return found


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("text", "has_name"),
    [
        ("I look: <tool_", False),
        ('I look: <tool_call>\n{"name": "wea', False),
        ('I look: <tool_call>\n{"name": "weather", "arguments": {"ci', True),
        ('I look: <tool_call>\n{"name": "weather", "arguments": {"city": "Bern"', True),
    ],
)
def test_an_answer_that_is_cut_in_a_call_has_the_text_so_far(
    test_server: nanollama.TestServer, text: str, has_name: bool, stream: bool
) -> None:
    test_server.answers({"text": text, "finish_reason": "length"})
    found = asked(test_server, stream)
    assert {
        api: (content.strip(), reason, has) for api, (content, reason, has) in found.items()
    } == {
        "chat": ("I look:", "length", has_name),
        "responses": ("I look:", "incomplete", has_name),
        "ollama": ("I look:", "length", has_name),
    }


def test_whole_calls_before_the_cut_are_kept(test_server: nanollama.TestServer) -> None:
    call = FORMATS["hermes"].spell([("weather", '{"city": "Bern"}')])
    test_server.answers({"text": call + "\n<tool_call>\n{", "finish_reason": "length"})
    for stream in (False, True):
        assert asked(test_server, stream) == {
            "chat": ("", "length", True),
            "responses": ("", "incomplete", True),
            "ollama": ("", "length", True),
        }


BROKEN: list[tuple[Any, dict[str, Any]]] = [
    ('{"text": "cut of', {"text": "cut of"}),
    ('{"a": 1, "te', {"a": 1}),
    ('{"a": 1, "b": ', {"a": 1}),
    ('{"a": {"b": [1, "x', {"a": {"b": [1, "x"]}}),
    ('{"a": "x\\u00', {"a": "x"}),
    ('{"a": "x\\', {"a": "x"}),
    ('{"a": "x\\\\', {"a": "x\\"}),
    ("{", {}),
    ("", {}),
    (None, {}),
    ("null", {}),
    ({"a": 1}, {"a": 1}),
    ('"{}"', {}),
    ([1, 2], {"arguments": [1, 2]}),
    (7, {"arguments": 7}),
    ("seven", {"arguments": "seven"}),
]


@pytest.mark.parametrize("form", ["hermes", "qwen3-coder"])
@pytest.mark.parametrize(("arguments", "expected"), BROKEN, ids=repr)
def test_arguments_of_any_kind_are_an_object_for_the_template(
    arguments: Any, expected: dict[str, Any], form: str
) -> None:
    def prompt(arguments: Any) -> str:
        call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": arguments}}
        talk = parse(messages=[*USER, {"role": "assistant", "tool_calls": [call]}]).messages
        return template(TEMPLATES[form]).prompt(talk or [])

    assert prompt(arguments) == prompt(json.dumps(expected))


@pytest.mark.parametrize("path", sorted(DATA.glob("*.jinja")), ids=lambda path: path.stem)
def test_a_broken_history_never_ends_the_talk(path: Path) -> None:
    made = template(path.read_text(encoding="utf-8"))
    for arguments, _ in BROKEN:
        function = {"name": "weather", "arguments": arguments}
        call = {"type": "function", "function": function}
        result = {"role": "tool", "content": "sunny spells"}
        for talk in (
            [*USER, {"role": "assistant", "content": "", "tool_calls": [call]}, result, *USER],
            [*USER, {**result, "tool_call_id": "unknown"}, *USER],
            [*USER, {"role": "assistant", "content": "Hm."}, result],
        ):
            prompt = made.prompt(parse(messages=talk, tools=TOOLS).messages or [], TOOLS)
            assert "sunny spells" in prompt


@pytest.mark.parametrize("width", [1, 7, 1000])
def test_an_error_while_a_call_is_read_loses_no_text(
    width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read(reader: JsonReader, text: str) -> tuple[int, str]:
        raise RecursionError("too deep")

    monkeypatch.setattr(JsonReader, "read", read)
    text = 'Wait. <tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call> Done.'
    splitter = ToolSplitter(TOOL_FORMATS["hermes"], {"f": {}})
    pieces = [p for i in range(0, len(text), width) for p in splitter.push(text[i : i + width])]
    content = "".join(p.text for p in [*pieces, *splitter.flush()] if p.kind == "content")
    assert content.startswith("Wait. ")
    assert content.endswith('"x": 1}}\n</tool_call> Done.')
    assert not splitter.has_calls
