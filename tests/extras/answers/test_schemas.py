"""Schemas before they are compiled: closed, without annotations, within limits."""

from __future__ import annotations

from typing import Any

import pytest

from nanollama import RequestError
from nanollama_extras.answers.sandboxed import target
from nanollama_extras.answers.schemas import plain, readied

TEXT = {"type": "string"}
A, B = {"properties": {"a": TEXT}}, {"properties": {"b": TEXT}}


def closed(schema: Any) -> Any:
    return {**schema, "additionalProperties": False}


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (A, closed(A)),
        ({"type": "object"}, {"type": "object"}),
        ({**A, "additionalProperties": True}, {**A, "additionalProperties": True}),
        ({"items": A}, {"items": closed(A)}),
        ({"prefixItems": [A]}, {"prefixItems": [closed(A)]}),
        ({"$defs": {"x": A}}, {"$defs": {"x": closed(A)}}),
        ({"anyOf": [A, {"type": "null"}]}, {"anyOf": [closed(A), {"type": "null"}]}),
        ({"additionalProperties": A}, {"additionalProperties": closed(A)}),
        ({"properties": {"p": A}}, closed({"properties": {"p": closed(A)}})),
        ({"allOf": [A]}, {"allOf": [closed(A)]}),
        (
            {"allOf": [A, B]},
            {"allOf": [A, B], "properties": {"a": {}, "b": {}}, "additionalProperties": False},
        ),
        (
            {**A, "anyOf": [B, {"required": ["c"]}]},
            closed(
                {"properties": {"a": TEXT, "b": {}, "c": {}}, "anyOf": [B, {"required": ["c"]}]}
            ),
        ),
        ({**A, "required": ["z"]}, closed({"properties": {"a": TEXT, "z": {}}, "required": ["z"]})),
        ({**A, "minProperties": 2}, {**A, "minProperties": 2}),
        ({"enum": [A]}, {"enum": [A]}),
        ({"not": A}, {"not": A}),
    ],
    ids=str,
)
def test_an_object_that_lists_properties_has_no_others(schema: Any, expected: Any) -> None:
    assert readied(schema, "schema") == expected


def test_a_definition_is_closed_where_it_stands_alone_and_open_beside_others() -> None:
    schema = {
        "$defs": {"base": A},
        "properties": {"x": {"$ref": "#/$defs/base"}, "y": {"$ref": "#/$defs/base", **B}},
    }
    ready = readied(schema, "schema")
    x, y = ready["properties"]["x"], ready["properties"]["y"]
    assert target(ready, x["$ref"]) == closed(A)
    assert target(ready, y["$ref"]) == A
    assert y["properties"] == {"b": TEXT, "a": {}}
    assert y["additionalProperties"] is False


NOTHING: list[dict[str, Any]] = [
    {"title": "x"},
    {"description": 3},
    {"default": 1},
    {"examples": [1]},
    {"$comment": "x"},
    {"deprecated": True},
    {"readOnly": True},
    {"contentMediaType": "image/png"},
    {"contentEncoding": "base64"},
    {"propertyNames": {"type": "string"}},
    {"propertyNames": {"title": "name"}},
    {"propertyNames": True},
    {"uniqueItems": False},
    {"format": "int32"},
    {"format": "wibble"},
    {"not": False},
    {"if": {"type": "string"}},
    {"then": {"type": "string"}},
    {"contains": {"type": "string"}, "minContains": 0},
    {"minContains": 1},
    {"dependentRequired": {}},
    {"dependentSchemas": {"a": True}},
    {"unevaluatedProperties": True},
    {"unevaluatedItems": {}},
    {"$schema": "https://example.com/my-dialect"},
]


@pytest.mark.parametrize("keywords", NOTHING, ids=str)
def test_annotations_and_keywords_that_allow_everything_are_ignored(keywords: Any) -> None:
    assert plain(keywords) == {}
    assert plain({"items": keywords}) == {"items": {}}
    assert plain({"$defs": {"title": keywords}}) == {"$defs": {"title": {}}}
    assert plain({"const": keywords}) == {"const": keywords}


@pytest.mark.parametrize(
    "keywords",
    [
        {"uniqueItems": True},
        {"propertyNames": {"pattern": "^a"}},
        {"format": "regex"},
        {"not": {"type": "string"}},
        {"contains": {}},
        {"if": {}, "then": {"type": "string"}},
        {"dependentRequired": {"a": ["b"]}},
        {"unevaluatedProperties": False},
        {"$schema": "https://json-schema.org/draft/2020-12/schema"},
    ],
    ids=str,
)
def test_keywords_that_forbid_something_are_kept(keywords: Any) -> None:
    assert plain(keywords) == keywords


def test_a_reference_within_a_part_that_has_definitions_of_its_own_is_found() -> None:
    part = {"$defs": {"n": {"type": "integer"}}, "$ref": "#/$defs/n"}
    ready = readied({"type": "object", "properties": {"a/b": part}}, "schema")
    assert target(ready, ready["properties"]["a/b"]["$ref"]) == {"type": "integer"}


def chain(num: int) -> dict[str, Any]:
    links = {f"d{i}": {"properties": {"a": {"$ref": f"#/$defs/d{i + 1}"}}} for i in range(num)}
    return {"$ref": "#/$defs/d0", "$defs": links | {f"d{num}": TEXT}}


def nested(num: int) -> dict[str, Any]:
    return {"items": nested(num - 1)} if num else {}


@pytest.mark.parametrize(
    ("schema", "where", "why"),
    [
        (chain(200), "at /$defs/d127/properties/a/$ref", "128 references"),
        (nested(150), "at /items/items", "deeply"),
        ({"items": {"patternProperties": {f"^{i}": {} for i in range(65)}}}, "at /items/", "64"),
        ({"anyOf": [{"const": i} for i in range(1001)]}, "at /anyOf", "1000 alternatives"),
        ({"items": {"const": "x" * 600_000}}, "", "512 KB"),
        ({"anyOf": [{"prefixItems": [{"$ref": "#"}] * 999}] * 6}, "at /anyOf/", "5000 references"),
    ],
    ids=["chain", "nested", "patterns", "alternatives", "bytes", "references"],
)
def test_what_is_too_large_is_refused_with_the_place(schema: Any, where: str, why: str) -> None:
    with pytest.raises(RequestError) as caught:
        readied(schema, "schema")
    assert where in str(caught.value)
    assert why in str(caught.value)
    assert len(str(caught.value)) < 400
