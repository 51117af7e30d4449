"""Request fields that give the form of an answer: guided_json, structured_outputs, response_format,
grammar and their like, as vLLM, llama.cpp and OpenAI spell them.

Seam       Answer form. The core's reader of bodies calls `guided` when a body has one of
           `nanollama.GUIDE_FIELDS`; answers/grammars.py then compiles the form. It imports
           answers.schemas.
Remove     delete this file; requests with such a field are then refused.
Source     https://docs.vllm.ai/en/latest/features/structured_outputs.html
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from nanollama import ANSWER_FIELDS, check_type, excerpt, first_line, refuse, required
from nanollama_extras.answers.schemas import BestEffort

if TYPE_CHECKING:
    from nanollama import Fields, Json

# field of a body -> kind of guide
GUIDES = {
    "guided_json": "schema",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "json_schema": "schema",
    "grammar": "grammar",
}


GUIDE_TYPES = {
    "schema": "string or object",
    "regex": "string",
    "choice": "array",
    "grammar": "string",
    "json_object": "boolean",
}


def guided(given: Fields, own: Fields, values: Json) -> tuple[Json, dict[str, str]]:
    """SamplingParams fields with the form of an answer that a body asks for, if any, and the place
    of that form. own: the fields that the caller chose. Raises RequestError."""
    guide = read_guide(given)
    if guide is None:
        return values, {}
    name, value, where = guide
    values = values | dict.fromkeys(ANSWER_FIELDS)
    if "repeat_penalty" not in own:  # forms may loop
        del values["repeat_penalty"]
    return (values | {name: value} if name else values), {name: where}


def read_guide(given: Fields) -> tuple[str, Any, str] | None:
    """The form of an answer that a body asks for: the SamplingParams field ('' for any text), its
    value, and its place in the body; None without one. Raises RequestError."""
    guides = [(kind, given[name], name) for name, kind in GUIDES.items() if name in given]
    for name, value in given.get("structured_outputs", {}).items():
        kind, where = "schema" if name == "json" else name, f"structured_outputs.{name}"
        if value is not None and value is not False:
            if kind not in GUIDE_TYPES:
                refuse(f"{where} is not supported", where, "unsupported_parameter")
            guides.append((kind, value, where))
    if "response_format" in given:
        guides.append(read_format(given["response_format"], "response_format"))
    guides = [guide for guide in guides if guide[0]] or guides
    if len(guides) > 1:
        refuse(f"{guides[0][2]} and {guides[1][2]} exclude each other; give one", guides[1][2])
    return checked_guide(*guides[0]) if guides else None


def read_format(form: Fields, where: str) -> tuple[str, Any, str]:
    """A `response_format` -> kind of guide, value, place."""
    kind = form.get("type")
    if kind == "json_schema":
        where = f"{where}.json_schema"
        check_type(where, inner := required(form, "json_schema"), "object")
        if inner.get("strict") is not None:
            check_type(f"{where}.strict", inner["strict"], "boolean")
        check_type(f"{where}.schema", schema := inner.get("schema"), "object")
        kind_of_schema = BestEffort if inner.get("strict") is False else dict
        return "schema", kind_of_schema(schema), f"{where}.schema"
    if kind == "json_object":
        return "json_object", True, where
    if kind != "text":
        known = "text, json_object, json_schema"
        refuse(f"{where}.type is {excerpt(kind)}; use one of {known}", f"{where}.type")
    return "", None, where


def checked_guide(kind: str, value: Any, where: str) -> tuple[str, Any, str]:
    """A guide of the body as a SamplingParams field, its value, and its place."""
    if kind:
        check_type(where, value, GUIDE_TYPES[kind])
    if kind == "json_object":
        return "schema", {"type": "object"}, where
    if kind == "schema" and isinstance(value, str):
        try:
            check_type(where, value := json.loads(value), "object")
        except ValueError as error:
            refuse(f"{where} is not JSON: {first_line(error)}", where)
    if kind == "choice":
        if not value or not all(isinstance(word, str) and word for word in value):
            refuse(f"{where} is {excerpt(value)}; it must list non-empty strings", where)
        # a terminal (in capitals) is one regular expression, however many words it has
        return "grammar", f"start: WORD\nWORD: {' | '.join(map(json.dumps, value))}", where
    return kind, value, where
