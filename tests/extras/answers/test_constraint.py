"""What an answer must be: schemas, regexes and grammars, in the engine, on the wire, as flags."""

from __future__ import annotations

import itertools
import json
import random
import re
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import openai
import pydantic
import pytest
from serving import Live, serving, wait_until

import nanollama
from nanollama import LLM, GenerationRequest, RequestError, SamplingParams, parse_chat, parse_text
from nanollama_extras.answers.grammars import Constraint, Grammars
from nanollama_extras.answers.tools import branches

USER = [{"role": "user", "content": "hello"}]
OPEN = {"top_k": 0, "top_p": 1.0, "repeat_penalty": 1.0, "temperature": 1.0}
CITY = {
    "type": "object",
    "properties": {"name": {"enum": ["Bern", "Rome"]}, "size": {"type": "integer", "maximum": 99}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


def ask(llm: LLM, prompt: Any = "hello", **fields: Any) -> nanollama.Completion:
    params = SamplingParams(**{**OPEN, "seed": 1, "max_tokens": 150, **fields})
    return llm.complete(GenerationRequest(prompt, params=params))


def refusal(llm: LLM, **fields: Any) -> RequestError:
    with pytest.raises(RequestError) as caught:
        ask(llm, **fields)
    assert "\n" not in str(caught.value)
    return caught.value


# ---- any schema ----------------------------------------------------------------------------------


def random_schema(rng: random.Random, depth: int = 0) -> dict[str, Any]:
    """Something of everything that can be compiled, small enough for its answers to end."""
    kinds = ["string", "pattern", "format", "integer", "number", "multiple", "boolean", "null"]
    kinds += ["enum", "const", "ref"]
    if depth < 3:
        kinds += ["object", "object", "array", "tuple", "anyOf", "oneOf", "allOf"]
    kind = rng.choice(kinds)
    inner = lambda: random_schema(rng, depth + 1)  # noqa: E731
    low = rng.randint(-50, 50)
    if kind == "object":
        names = rng.sample(["a", "b", "naïve", "with space", 'quo"te', "é"], rng.randint(0, 3))
        extra = rng.choice([False, False, {"type": "null"}])
        required = [name for name in names if rng.random() < 0.6]
        shape = {"properties": {name: inner() for name in names}, "required": required}
        return {"type": "object", **shape, "additionalProperties": extra}
    return {
        "string": lambda: {"type": "string", "minLength": rng.randint(0, 3), "maxLength": 6},
        "pattern": lambda: {
            "type": "string",
            "pattern": rng.choice([r"^[a-f]{2,4}$", "^(x|yz)-?$"]),
        },
        "format": lambda: {"type": "string", "format": rng.choice(["date", "uuid", "ipv4"])},
        "integer": lambda: {"type": "integer", "minimum": low, "maximum": low + rng.randint(0, 99)},
        "number": lambda: {"type": "number", "minimum": low, "exclusiveMaximum": low + 0.5},
        "multiple": lambda: {"type": "integer", "minimum": 0, "maximum": 99, "multipleOf": 7},
        "boolean": lambda: {"type": "boolean"},
        "null": lambda: {"type": ["null", "boolean"]},
        "enum": lambda: {"enum": rng.sample(["a", "ü", 1, 2.5, None, True, {"k": [1]}], 3)},
        "const": lambda: {"const": rng.choice(["c", 0, -1.5, None, [1, "x"]])},
        "ref": lambda: {"$ref": "#/$defs/tree"},
        "array": lambda: {"type": "array", "items": inner(), "minItems": 1, "maxItems": 2},
        "tuple": lambda: {"type": "array", "prefixItems": [inner()], "items": False, "minItems": 1},
        "anyOf": lambda: {"anyOf": [inner(), {"type": "null"}]},
        "oneOf": lambda: {"oneOf": [{"type": "boolean"}, {"type": "string", "maxLength": 3}]},
        "allOf": lambda: {"allOf": [{"type": "integer", "minimum": 3}, {"maximum": 9}]},
    }[kind]()


def random_schemas(num: int) -> list[dict[str, Any]]:
    rng = random.Random(6)
    tree = {
        "type": "object",
        "properties": {"n": {"type": ["integer", "null"], "maximum": 9, "minimum": 0}},
        "additionalProperties": {"anyOf": [{"$ref": "#/$defs/tree"}, {"type": "null"}]},
        "maxProperties": 1,
        "required": ["n"],
    }
    return [{**random_schema(rng), "$defs": {"tree": tree}} for _ in range(num)]


def test_every_finished_answer_validates_whatever_the_schema(tiny: Callable[..., Path]) -> None:
    """300 schemas, a model of random weights, greedy and not, with lookup, many at once."""
    llm = LLM(tiny(), parallel=16, lookup=4)
    schemas = random_schemas(300)
    requests = [
        GenerationRequest(
            messages=USER,
            params=SamplingParams(
                **{**OPEN, "temperature": i % 3 / 2, "seed": i, "max_tokens": 150, "schema": schema}
            ),
        )
        for i, schema in enumerate(schemas)
    ]
    texts, reasons = [""] * len(schemas), [""] * len(schemas)
    for delta in llm.stream(requests):
        texts[delta.index] += delta.text
        reasons[delta.index] = delta.finish_reason or ""
    for schema, text, reason in zip(schemas, texts, reasons):
        assert reason in ("stop", "length"), reason
        if reason == "stop":
            jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
    assert reasons.count("stop") > 250


SUITE = "jsonschema==4.26.0"  # its source distribution holds the JSON Schema test suite
# Valid all the same, but never written: a whole number is written without a point, and a string
# with a format has that format.
NOT_WRITTEN = {
    ("vocabulary.json", '{"numberProperty": 1}'),  # its dialect of schemas is not known
    ("const.json", "0.0"),
    ("const.json", "1.0"),
    ("const.json", "-2.0"),
    ("const.json", "9007199254740992.0"),
    ("enum.json", "0.0"),
    ("enum.json", "[0.0]"),
    ("enum.json", "1.0"),
    ("enum.json", "[1.0]"),
    ("type.json", "1.0"),
    ("format.json", '"2962"'),
    ("format.json", '"127.0.0.0.1"'),
    ("format.json", '"12345::"'),
    ("format.json", '"-a-host-name-that-starts-with--"'),
    ("format.json", '"06/19/1963"'),
    ("format.json", '"1990-02-31T15:59:60.123-08:00"'),
    ("format.json", '"08:30:06 PST"'),
    ("format.json", '"//foo.bar/?baz=qux#quux"'),
    ("format.json", '"2eb8aa08-aa98-11ea-b4aa-73b441d1638"'),
    ("format.json", '"PT1D"'),
}


@pytest.fixture(scope="session")
def suite() -> dict[str, list[dict[str, Any]]]:
    """JSON-Schema-Test-Suite, draft 2020-12: file -> groups. Kept beside the models."""
    directory = nanollama.cache_root() / "tests"
    path = directory / f"{SUITE.replace('==', '-')}.tar.gz"
    if not path.exists():
        pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "-q"]
        wanted = ["--no-deps", "--no-binary", "jsonschema", "-d", str(directory), SUITE]
        subprocess.run([*pip, *wanted], check=True)
    with tarfile.open(path) as archive:
        wanted_file = r"/tests/draft2020-12/(optional/ecmascript-regex|[\w-]+)\.json$"
        files = [m for m in archive if re.search(wanted_file, m.name)]
        opened = {Path(member.name).name: archive.extractfile(member) for member in files}
        return {name: json.load(file) for name, file in opened.items() if file is not None}


class Bytes:
    """A tokenizer whose tokens are the 256 bytes."""

    control: dict[str, int] = {}  # noqa: RUF012
    end_ids: frozenset[int] = frozenset()
    _byte_level, _added_ids = True, frozenset[int]()

    def __init__(self) -> None:
        self._tokenizer = self  # as the library's

    def id_to_token(self, token_id: int) -> str:
        return {byte: character for character, byte in nanollama.byte_alphabet().items()}[token_id]

    def encode(self, text: str, *_: bool) -> list[int]:
        return list(text.encode())


def spellings(value: Any) -> Iterator[str]:
    """A JSON value in every order of its keys: properties are written in the schema's order."""
    if isinstance(value, dict):
        for items in itertools.permutations(value.items()):
            for texts in itertools.product(*(list(spellings(item)) for _, item in items)):
                pairs = (
                    f"{json.dumps(key, ensure_ascii=False)}:{text}"
                    for (key, _), text in zip(items, texts)
                )
                yield "{" + ",".join(pairs) + "}"
    elif isinstance(value, list):
        for texts in itertools.product(*(list(spellings(item)) for item in value)):
            yield "[" + ",".join(texts) + "]"
    else:
        yield json.dumps(value, ensure_ascii=False)


def opened(schema: Any) -> Any:
    """A schema whose objects say that they may have other properties than those listed."""
    if isinstance(schema, list):
        return [opened(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    free = {"additionalProperties": True} if isinstance(schema.get("properties"), dict) else {}
    return free | {key: opened(part) for key, part in schema.items()}


def accepts(constraint: Constraint, text: str) -> bool:
    ids, matcher = list(text.encode()), constraint.matcher.deep_copy()
    return bool(matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting())


def test_the_official_suite_agrees_about_every_schema_that_compiles(
    suite: dict[str, list[dict[str, Any]]],
) -> None:
    grammars = Grammars(Bytes(), 256)  # type: ignore[arg-type]
    num_compiled, wrong = 0, set()
    for name, groups in suite.items():
        for group in groups:
            try:
                schema = opened(group["schema"])  # what is not listed, we never write
                constraint = grammars.constraint(SamplingParams(schema=schema), "", None)
            except RequestError:
                continue  # refused: it fails closed
            if constraint is None:  # the schema is `true` or `false`
                continue
            num_compiled += 1
            for test in group["tests"]:
                texts = itertools.islice(spellings(test["data"]), 40)
                if any(accepts(constraint, text) for text in texts) != test["valid"]:
                    wrong.add((name, json.dumps(test["data"])))
                    assert test["valid"], f"accepted: {test['data']} for {group['schema']}"
    assert wrong == NOT_WRITTEN
    assert num_compiled > 150


PATTERNS = [  # of ECMA-262: what fits, and what does not
    (r'^[^<>()[\]\\.,;:\s@"]+$', ["ab"], ["a[b", "a]b", "a b"]),
    ("^[[a]$", ["[", "a"], ["b"]),
    ("^[^[]$", ["a"], ["["]),
    ("^[[:alpha:]]$", ["a"], [":"]),  # as Rust has it: no ECMA-262 means its own
    ("^[a&&b]$", ["a", "&", "b"], ["c"]),
    ("^[a~~b]$", ["a", "~"], ["c"]),
    ("^[+--]$", ["+", ",", "-"], ["."]),
    ("^[--0]$", ["-", "/", "0"], ["1"]),
    ("^a[^]b$", ["a\nb", "a]b"], ["ab"]),
    (r"^\<b\>$", ["<b>"], ["b"]),
    (r"^\ud83d\ude00\u{1f600}$", ["\U0001f600\U0001f600"], ["\U0001f600"]),
    (r"^[\b]\cJ\0$", ["\b\n\0"], ["b"]),
    (r"^\${a}{b}c{,3}{2}$", ["${a}{b}c{,3}}"], ["$"]),
    (r"^(\[\p{L}{2}\]){1,}$", ["[ab][cd]"], ["[a]"]),
]


@pytest.mark.parametrize(("pattern", "fitting", "others"), PATTERNS, ids=[p[0] for p in PATTERNS])
def test_a_pattern_is_read_as_ecma_262(pattern: str, fitting: list[str], others: list[str]) -> None:
    schemas = {"type": "string", "pattern": pattern}, {"patternProperties": {pattern: {}}}
    for schema in (schemas[0], {**schemas[1], "type": "object", "additionalProperties": False}):
        constraint = Grammars(Bytes(), 256).constraint(  # type: ignore[arg-type]
            SamplingParams(schema=schema), "", None
        )
        assert constraint
        for texts, fits in ((fitting, True), (others, False)):
            for text in texts:
                spelled = json.dumps(text, ensure_ascii=False)
                whole = f"{{{spelled}:1}}" if "patternProperties" in schema else spelled
                assert accepts(constraint, whole) == fits, text


@pytest.mark.parametrize(
    ("name", "reference"),
    [
        ("List[int]", "List[int]"),
        ("List[int]", "List%5Bint%5D"),
        ("Gr\u00f6\u00dfe", "Gr\u00f6\u00dfe"),
        ("a b<c>|d", "a b<c>|d"),
        ("a/b~c", "a~1b~0c"),
    ],
)
def test_a_definition_may_have_any_name(name: str, reference: str) -> None:
    """References are URIs, which many tools do not encode."""
    schema = {
        "$defs": {name: {"type": "object", "properties": {"n": {"type": "integer"}}}},
        "type": "array",
        "items": {"$ref": f"#/$defs/{reference}"},
    }
    grammars = Grammars(Bytes(), 256)  # type: ignore[arg-type]
    constraint = grammars.constraint(SamplingParams(schema=schema), "", None)
    assert constraint
    assert accepts(constraint, '[{"n":3}]')
    assert not accepts(constraint, '[{"n":"x"}]')
    assert not accepts(constraint, '[{"m":3}]')  # closed
    assert [*branches({"$ref": f"#/$defs/{reference}"}, schema)] == [schema["$defs"][name]]


# ---- what is refused, and where ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schema", "where", "why"),
    [
        ({"type": "wibble"}, "at /:", "wibble"),
        ({"properties": {"x": {"type": "wibble"}}}, "at /properties/x:", "wibble"),
        ({"type": "array", "uniqueItems": True}, "at /:", "uniqueItems"),
        ({"anyOf": [{}, {"items": {"not": {}}}]}, "at /anyOf/1/items:", "not"),
        ({"$defs": {"n": {"type": 3}}, "$ref": "#/$defs/n"}, "at /$defs/n:", "type"),
        ({"$ref": "#/nowhere"}, "at /:", "/nowhere"),
        ({"$ref": "https://example.com/schema.json"}, "at /:", "example.com"),
        ({"type": "string", "pattern": "(?=a)b"}, "at /:", "look-ahead"),
        ({"type": "string", "format": "regex"}, "at /:", "regex"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "at /:", "minimum"),
        ({"items": {"multipleOf": 123456789}}, "at /items:", "multipleOf"),
        ({"oneOf": [{"type": "number"}, {"type": "integer"}]}, "at /:", "oneOf"),
        ({"uniqueItems": True, "x-guidance": {"lenient": True}}, "at /:", "uniqueItems"),
    ],
)
def test_a_schema_that_cannot_be_compiled_is_refused_with_the_place(
    tiny_llm: LLM, schema: dict[str, Any], where: str, why: str
) -> None:
    error = refusal(tiny_llm, schema=schema)
    assert error.param == "schema"
    assert where in str(error)
    assert why in str(error)


def test_what_nothing_can_satisfy_is_refused_before_it_runs(tiny_llm: LLM) -> None:
    loop = {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/a"}}}
    assert refusal(tiny_llm, schema=loop).status == 400
    assert refusal(tiny_llm, schema=loop).param == "schema"
    assert str(refusal(tiny_llm, grammar="start: start")).endswith("fits: no token can follow")
    assert refusal(tiny_llm, regex="a(").param == "regex"
    assert refusal(tiny_llm, regex="\ud800").param == "regex"
    assert len(str(refusal(tiny_llm, regex="(" * 9999))) < 500
    assert refusal(tiny_llm, grammar="start: nothing").param == "grammar"
    assert refusal(tiny_llm, grammar="root ::= (").param == "grammar"
    many = {f"p{i}": {"type": "integer", "multipleOf": 9973 - i} for i in range(60)}
    assert "multipleOf" in str(refusal(tiny_llm, schema={"properties": many}))
    deep: dict[str, Any] = {}
    for _ in range(5000):
        deep = {"items": deep}
    assert "deeply" in str(refusal(tiny_llm, schema=deep))


@pytest.mark.parametrize(
    "fields",
    [{"schema": []}, {"regex": 3}, {"grammar": b"x"}, {"schema": {}, "regex": "a"}],
    ids=str,
)
def test_a_constraint_of_the_wrong_kind_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(RequestError):
        SamplingParams(**fields)


# ---- with everything else ------------------------------------------------------------------------

FORMS = {
    "regex": {"regex": r"(north|south)-\d{3}/[a-c]+!"},
    "lark": {"grammar": 'start: "x" NUMBER ("," NUMBER)*\nNUMBER: /[0-9]{2}/'},
    "gbnf": {"grammar": 'root ::= "x" num ("," num)*\nnum ::= [0-9] [0-9]'},
}


@pytest.mark.parametrize("form", FORMS)
def test_text_fits_a_regex_or_grammar_from_end_to_end(tiny_llm: LLM, form: str) -> None:
    pattern = FORMS[form].get("regex", r"x\d\d(,\d\d)*")
    for seed in range(6):
        answer = ask(tiny_llm, **FORMS[form], seed=seed)
        if answer.finish_reason == "stop":
            assert re.fullmatch(pattern, answer.text)
    assert answer.text


def test_the_limit_is_reported_as_such_and_zero_tokens_are_none(tiny_llm: LLM) -> None:
    cut = ask(tiny_llm, schema=CITY, max_tokens=3)
    assert cut.finish_reason == "length"
    assert len(cut.token_ids) == 3
    assert ask(tiny_llm, schema=CITY, max_tokens=0).text == ""


@pytest.mark.parametrize(
    "fields",
    [
        {"temperature": 0},
        {"temperature": 5.0},
        {"top_k": 1},
        {"top_k": 40, "top_p": 0.5},
        {"min_p": 0.3},
        {"repeat_penalty": 2.0, "presence_penalty": 2.0},
        {"ignore_eos": True},
        {"logit_bias": dict.fromkeys(range(320), -100.0)},
        {"logit_bias": dict.fromkeys(range(160), 100.0)},
        {"logprobs": 5},
    ],
    ids=str,
)
def test_every_sampling_setting_keeps_the_answer_valid(
    tiny_llm: LLM, fields: dict[str, Any]
) -> None:
    answer = ask(tiny_llm, schema=CITY, **fields)
    assert answer.finish_reason == "stop"
    jsonschema.validate(json.loads(answer.text), CITY)
    assert all(entry.logprob <= 0 for entry in answer.logprobs)


def test_a_banned_token_is_taken_only_where_nothing_else_fits(tiny_llm: LLM) -> None:
    (quote,) = tiny_llm.encode('"', False)
    spelled = ask(tiny_llm, regex="[ab]*", logit_bias={tiny_llm.encode("a")[0]: -100}, seed=3)
    assert "a" not in spelled.text
    assert ask(tiny_llm, regex='"', logit_bias={quote: -100}).text == '"'


def test_a_stop_string_cuts_as_it_was_asked_to(tiny_llm: LLM) -> None:
    answer = ask(tiny_llm, schema=CITY, stop=(":",))
    assert answer.finish_reason == "stop"
    assert re.fullmatch(r'\{\s*"name"\s*', answer.text)


def test_an_answer_does_not_depend_on_its_neighbours_or_on_lookup(
    tiny: Callable[..., Path], tiny_llm: LLM
) -> None:
    def requests() -> list[GenerationRequest]:
        forms = [{"schema": CITY}, {}, {"regex": "[a-z ]{5,30}"}, {"schema": {"type": "object"}}]
        params = [
            SamplingParams(**{**OPEN, "seed": i, "max_tokens": 40, **form})
            for i, form in enumerate(forms * 2)
        ]
        return [GenerationRequest("hello", params=p) for p in params]

    def together(llm: LLM) -> list[str]:
        texts = [""] * 8
        for delta in llm.stream(requests()):
            texts[delta.index] += delta.text
        return texts

    alone = [tiny_llm.complete(request).text for request in requests()]
    assert together(LLM(tiny(), parallel=8)) == alone
    looking = LLM(tiny(), parallel=2, lookup=8)
    assert together(looking) == alone


def test_drafts_are_cut_where_the_answer_may_not_go(tiny: Callable[..., Path]) -> None:
    """A prompt full of what the regex wants, followed by what it forbids."""
    llm = LLM(tiny(), lookup=8)
    prompt = "abababababZZababababZZabababab"
    answer = ask(llm, prompt, regex="(ab){20}", temperature=0)
    assert answer.text == "ab" * 20
    assert answer.usage.accepted_tokens > 0
    assert ask(LLM(tiny()), prompt, regex="(ab){20}", temperature=0).text == answer.text


def test_samples_of_one_request_are_constrained_on_their_own(tiny_llm: LLM) -> None:
    params = [SamplingParams(**{**OPEN, "seed": i, "schema": CITY}) for i in range(4)]
    texts = {
        tiny_llm.complete(GenerationRequest(USER[0]["content"], params=p)).text for p in params
    }
    assert len(texts) > 1
    for text in texts:
        jsonschema.validate(json.loads(text), CITY)


def test_a_constraint_that_grows_too_complex_ends_its_own_answer_only(
    tiny_llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(max_tokens=5, ignore_eos=True)
    good = tiny_llm.start(GenerationRequest("hello", params=params))
    bad = tiny_llm.start(GenerationRequest("hello", params=SamplingParams(regex="a{30}")))
    tiny_llm.engine.step()
    assert bad.constraint
    bad.constraint.push(0)  # as if the library had given up
    while tiny_llm.engine.has_work:
        tiny_llm.engine.step()
    assert bad.finish_reason == "error"
    assert isinstance(bad.take()[-1].error, RequestError)
    assert good.finish_reason == "length"


def test_any_number_of_choices_can_be_made(tiny_llm: LLM) -> None:
    words = [f"item {i}" for i in range(5000)]
    grammar = params({"guided_choice": words}).grammar
    answers = [ask(tiny_llm, grammar=grammar, seed=seed) for seed in range(3)]
    assert all(answer.finish_reason == "stop" and answer.text in words for answer in answers)


def test_only_the_form_is_not_free(tiny: Callable[..., Path]) -> None:
    """What the repeat penalty asks: thoughts are free, and so is text before a call."""
    llm = LLM(tiny(max_position_embeddings=1024), template=THINKING)
    kwargs, call = {"mood": "<think>\n"}, '<tool_call>\n{"name": "f", "arguments": {"a": "b'
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}
    schema = SamplingParams(schema={"type": "object"})
    thinking = GenerationRequest(messages=USER, params=schema, template_kwargs=kwargs)
    calling = GenerationRequest(messages=USER, tools=[tool])
    for request, said in ((thinking, 'hm </think>{"a": "b'), (calling, f"Let me see. {call}")):
        seq, was_free = llm.start(request), []
        form = seq.constraint
        assert form
        for token_id in llm.encode(said, False):
            assert form.allowed()[token_id]
            was_free.append((llm.tokenizer.token_bytes(token_id).decode(), form.is_free))
            form.push(token_id)
        llm.engine.cancel(seq)
        begins = next(i for i, (text, _) in enumerate(was_free) if text.lstrip()[:1] in "<{")
        assert all(is_free for _, is_free in was_free[:begins])
        assert not form.allowed()[llm.encode("\n", False)[0]]
        assert not form.is_free


THINKING = nanollama.CHATML + "{% if mood %}{{ mood }}{% endif %}{# </think> #}"


@pytest.mark.parametrize("mood", ["<think>\n", "<think>\n\n</think>\n\n", ""])
def test_the_constraint_starts_after_the_thoughts(tiny: Callable[..., Path], mood: str) -> None:
    """What is thought is free, and cannot end the answer; the rest fits."""
    llm = LLM(tiny(), template=THINKING)
    request = GenerationRequest(
        messages=USER,
        params=SamplingParams(**{**OPEN, "seed": 2, "regex": "[a-c]{4}", "max_tokens": 100}),
        template_kwargs={"mood": mood},
    )
    seq = llm.start(request)
    # the model is random: push it through its thoughts
    said = {"<think>\n": "hm, {1} </think>", "": "<think>so</think>"}.get(mood, "")
    assert seq.constraint
    assert bool(seq.constraint.allowed()[tiny_end(llm)]) is False
    for token_id in llm.encode(said, False):
        assert seq.constraint.allowed()[token_id]
        seq.constraint.push(token_id)
    allowed = {llm.tokenizer.token_bytes(int(i)) for i in seq.constraint.allowed().nonzero()[0]}
    assert allowed >= {b"a", b"b", b"c"}
    assert not allowed & {b"d", b"\n", b"</"}
    if said or not mood:
        llm.engine.cancel(seq)
    else:
        assert re.fullmatch("[a-c]{4}", llm.complete(request).text)


def tiny_end(llm: LLM) -> int:
    return min(llm.tokenizer.end_ids)


def test_masks_cover_a_vocabulary_that_is_wider_than_the_tokenizer(
    tiny: Callable[..., Path],
) -> None:
    llm = LLM(tiny(vocab_size=333))
    for seed in range(4):
        answer = ask(llm, schema=CITY, seed=seed)
        assert max(answer.token_ids) < 320
        jsonschema.validate(json.loads(answer.text), CITY)


def test_likeliest_leaves_out_what_cannot_come() -> None:
    logits = np.full(1000, -np.inf, dtype=np.float32)
    logits[[3, 500, 999]] = 1.0, 3.0, 1.0
    values, ids = nanollama.likeliest(logits, 50)
    assert ids.tolist() == [500, 3, 999]
    assert values.tolist() == [3.0, 1.0, 1.0]


# ---- the wire ------------------------------------------------------------------------------------


def params(body: dict[str, Any], defaults: dict[str, Any] | None = None) -> SamplingParams:
    chat = parse_chat({"messages": USER, **body}, defaults or {}).requests[0].params
    text = parse_text({"prompt": "hello", **body}, defaults or {}).requests[0].params
    for name in ("schema", "regex", "grammar"):
        assert getattr(chat, name) == getattr(text, name)
    return chat


def test_each_dialect_names_the_same_constraints() -> None:
    nested = {"type": "json_schema", "json_schema": {"name": "city", "schema": CITY}}
    for body in (
        {"response_format": nested},
        {"response_format": {**nested, "json_schema": {**nested["json_schema"], "strict": True}}},
        {"guided_json": CITY},
        {"guided_json": json.dumps(CITY)},
        {"json_schema": CITY},
        {"structured_outputs": {"json": CITY, "regex": None}},
        {"structured_outputs": {"json": CITY}, "response_format": {"type": "text"}},
    ):
        assert params(body).schema == CITY, body
    for body in (
        {"response_format": {"type": "json_object"}},
        {"structured_outputs": {"json_object": True}},
    ):
        assert params(body).schema == {"type": "object"}
    assert params({"guided_regex": "a+"}).regex == "a+"
    assert params({"structured_outputs": {"regex": "a+"}}).regex == "a+"
    assert params({"guided_grammar": "root ::= x"}).grammar == "root ::= x"
    assert params({"grammar": 'start: "x"'}).grammar == 'start: "x"'
    choice = params({"guided_choice": ["yes", 'n"o']})
    assert choice == params({"structured_outputs": {"choice": ["yes", 'n"o']}})
    assert choice.grammar == 'start: WORD\nWORD: "yes" | "n\\"o"'


def test_a_request_outranks_what_the_server_was_started_with() -> None:
    assert params({}, {"schema": CITY}).schema == CITY
    assert params({"guided_regex": "a"}, {"schema": CITY}).schema is None
    assert params({"response_format": {"type": "text"}}, {"schema": CITY}).schema is None


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {}}, "response_format.type"),
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
        ),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": ["a", 1]}, "guided_choice"),
        ({"structured_outputs": {"structural_tag": "x"}}, "structured_outputs.structural_tag"),
        ({"structured_outputs": {"regex": 3}}, "structured_outputs.regex"),
        ({"guided_json": CITY, "guided_regex": "a"}, "guided_regex"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_by_name(body: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        parse_chat({"messages": USER, **body}, {})
    assert caught.value.param == param


@pytest.fixture(scope="module")
def live(tiny: Callable[..., Path]) -> Iterator[Live]:
    with serving(lambda: LLM(tiny(), parallel=4), model_id="tiny", sampling=OPEN) as live:
        yield live


@pytest.fixture(scope="module")
def client(live: Live) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)


class City(pydantic.BaseModel):
    name: str = pydantic.Field(max_length=8)
    tags: list[str] = pydantic.Field(max_length=0)
    mayor: Person | None


class Person(pydantic.BaseModel):
    age: int = pydantic.Field(ge=0, lt=100)


def test_the_sdk_parses_answers_into_pydantic_models(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model="tiny", messages=USER, response_format=City, seed=3, n=3, temperature=1.2
    )
    for choice in answer.choices:
        assert choice.finish_reason == "stop"
        assert isinstance(choice.message.parsed, City)


def test_the_sdks_streaming_helper_parses_too(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(
        model="tiny", messages=USER, response_format=City, seed=4
    ) as stream:
        kinds = [event.type for event in stream]
        final = stream.get_final_completion()
    assert {"content.delta", "content.done", "chunk"} <= set(kinds)
    assert isinstance(final.choices[0].message.parsed, City)


def test_a_cut_answer_raises_in_the_sdk(client: openai.OpenAI) -> None:
    with pytest.raises(openai.LengthFinishReasonError):
        client.chat.completions.parse(
            model="tiny", messages=USER, response_format=City, max_tokens=2
        )


def test_vllms_fields_work_through_the_sdk(client: openai.OpenAI) -> None:
    def text(**extra: Any) -> str:
        answer = client.chat.completions.create(
            model="tiny", messages=USER, seed=1, extra_body=extra
        )
        return answer.choices[0].message.content or ""

    assert text(guided_choice=["red", "green"]) in ("red", "green")
    assert re.fullmatch(r"\d{4}", text(structured_outputs={"regex": r"\d{4}"}))
    plain = client.completions.create(
        model="tiny", prompt="x", extra_body={"guided_json": CITY}, max_tokens=100
    )
    jsonschema.validate(json.loads(plain.choices[0].text), CITY)


def test_over_http_a_schema_that_cannot_be_compiled_names_its_field_and_place(live: Live) -> None:
    schema = {"type": "object", "properties": {"x": {"type": "array", "uniqueItems": True}}}
    wanted = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    for stream in (False, True):
        answer = live.chat(response_format=wanted, stream=stream)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == "response_format.json_schema.schema"
        assert "/properties/x" in error["message"]
    assert live.text(guided_regex="(").json()["error"]["param"] == "guided_regex"
    assert live.is_idle()


@pytest.mark.parametrize("strict", [False, True, None])
def test_only_strict_false_leaves_out_what_cannot_be_enforced(
    live: Live, caplog: pytest.LogCaptureFixture, strict: bool | None
) -> None:
    """As OpenAI does; the log says once what is left out."""
    mail = {"type": "string", "pattern": f"^(?=.*@)[a-d@]{{3}}{strict or ''}", "maxLength": 9}
    schema = {"type": "object", "properties": {"mail": mail}, "required": ["mail"]}
    wanted = {"name": "x", "schema": schema, "strict": strict}
    for _ in range(2):
        form = {"type": "json_schema", "json_schema": wanted}
        answer = live.chat(response_format=form, max_tokens=60, seed=1)
        assert answer.status_code == (200 if strict is False else 400)
    lost = [line for line in caplog.messages if "/properties/mail/pattern" in line]
    assert len(lost) == (strict is False)


def test_annotations_and_unlisted_properties_on_the_wire(live: Live) -> None:
    """What pydantic and zod write: no property is invented, and nothing is refused."""
    inner = {"type": "object", "title": "I", "properties": {"k": {"enum": [1, 2]}}}
    schema = {
        "$schema": "https://example.com/dialect",
        "type": "object",
        "propertyNames": {"type": "string"},
        "properties": {
            "tags": {"type": "array", "items": inner, "uniqueItems": False, "maxItems": 2},
            "size": {"type": "integer", "format": "int32", "minimum": 0, "maximum": 9},
            "name": {"enum": ["x"], "format": "wibble", "default": "y", "deprecated": True},
        },
    }
    form = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema, "strict": True}}
    for seed in range(4):
        answer = live.chat(response_format=form, max_tokens=150, seed=seed, temperature=1.5)
        assert answer.status_code == 200, answer.text
        value = json.loads(answer.json()["choices"][0]["message"]["content"])
        assert value.keys() <= schema["properties"].keys()
        assert all(tag.keys() <= {"k"} for tag in value.get("tags", []))


# ---- the command line ----------------------------------------------------------------------------


def test_flags_constrain_every_mode(
    tiny: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "city.json"
    file.write_text(json.dumps(CITY))
    model = ["--model", str(tiny()), "--seed", "1", "--temp", "1"]
    for schema in (str(file), " " + json.dumps(CITY)):
        assert nanollama.main([*model, "--prompt", "hello", "--schema", schema]) == 0
        jsonschema.validate(json.loads(capsys.readouterr().out), CITY)
    lines = tmp_path / "lines.txt"
    lines.write_text("one\ntwo\n")
    assert nanollama.main([*model, "--batch-file", str(lines), "--regex", "[xy]{3}"]) == 0
    assert re.fullmatch(r"[xy]{3}\n[xy]{3}\n", capsys.readouterr().out)


def test_a_schema_file_that_is_none_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "x.json"
    for text, reason in ((None, "cannot be read"), ("{", "not valid JSON"), ("3", "object")):
        if text is not None:
            file.write_text(text)
        code = 2 if reason == "object" else 1
        assert nanollama.main(["--prompt", "x", "--schema", str(file)]) == code
        assert reason in capsys.readouterr().err


@pytest.mark.parametrize("stream", [False, True])
def test_a_constraint_that_fails_halfway_is_an_error_to_its_client_only(
    live: Live, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    allowed, calls = Constraint.allowed, itertools.count()

    def failing(self: Constraint) -> Any:
        if next(calls) > 3:
            raise RequestError("the answer cannot go on as it must: too complex", "grammar")
        return allowed(self)

    monkeypatch.setattr(Constraint, "allowed", failing)
    answer = live.chat(guided_regex="[a-z]{50}", stream=stream, max_tokens=50)
    if stream:
        assert answer.text.rstrip().endswith("data: [DONE]")
        assert '"error"' in answer.text.split("\n\n")[-3]
    else:
        assert answer.status_code == 400
    assert "too complex" in answer.text
    monkeypatch.undo()
    assert live.chat(guided_regex="[a-z]{5}").status_code == 200
    wait_until(live.is_idle)
