"""JSON Schemas as they are compiled: within limits, without annotations, and closed, so that an
object which lists its properties has no others.

Seam       Answer form. answers/grammars.py calls `readied` with each schema, before its compiler
           sees it. It imports answers.sandboxed.
Remove     delete this file together with answers/grammars.py.
Source     https://json-schema.org/draft/2020-12/json-schema-core (keywords that hold schemas)
           https://github.com/ggml-org/llama.cpp/blob/master/grammars/README.md (closed objects)
"""

from __future__ import annotations

import itertools
import json
import re
import urllib.parse
from collections.abc import Mapping
from typing import Any, NoReturn

from nanollama import RequestError
from nanollama_extras.answers.sandboxed import SHARED, target

MAX_BYTES = 512 << 10  # of a schema, a regex or a grammar
MAX_LEVELS = 120  # of a schema as JSON
MAX_CHAIN = 128  # references on the way to one part
MAX_REFERENCES = 5_000
MAX_PATTERNS = 64  # patternProperties of one object: each pair of them is compared
MAX_ALTERNATIVES = 1_000  # of one anyOf, oneOf or allOf
MAX_RULES = 2_000  # of a grammar
RULE = re.compile(r"(?m)^[ \t]*[?!]?[\w.-]+[^\n:|\"/]*:")

SCHEMA_MAPS = {"properties", "patternProperties", "dependentSchemas", *SHARED}
SCHEMA_LISTS = {"prefixItems", "allOf", "anyOf", "oneOf"}
SCHEMAS = {"additionalItems", "additionalProperties", "contains", "else", "if", "items", "not"}
SCHEMAS |= {"propertyNames", "then", "unevaluatedItems", "unevaluatedProperties"}

GRAMMAR = "x-lark"  # of a text that is a function's only argument: answers.lark_json enforces it
ANNOTATIONS = {GRAMMAR} | set(
    "title description default example examples $comment deprecated readOnly writeOnly "
    "contentMediaType contentEncoding contentSchema $vocabulary".split()
)
FORMATS = set(
    "date-time date time duration email idn-email hostname idn-hostname ipv4 ipv6 uri "
    "uri-reference iri iri-reference uuid uri-template json-pointer relative-json-pointer "
    "regex".split()
)
DRAFTS = re.compile(r"https?://json-schema\.org/draft(-0[467]|/20(19-09|20-12))/schema#?")


class BestEffort(dict[str, Any]):
    """A JSON Schema with `strict: false`: what cannot be enforced is left out, as OpenAI does."""


# ---- limits --------------------------------------------------------------------------------------


def check_size(text: str, name: str) -> None:
    """Raise RequestError for a schema, regex or grammar with too many bytes."""
    if len(text) > MAX_BYTES:
        limit = f"at most {MAX_BYTES >> 10} KB are compiled"
        raise RequestError(f"{name} cannot be used: it has {len(text) >> 10} KB; {limit}", name)


def check_rules(grammar: str, name: str) -> None:
    """Raise RequestError, with the line, for a grammar with too many rules."""
    for rule in itertools.islice(RULE.finditer(grammar), MAX_RULES, None):
        line = grammar.count("\n", 0, rule.start()) + 1
        problem = f"at line {line}: more than {MAX_RULES} rules"
        raise RequestError(f"the {name} cannot be used: {problem}", name)


def too_large(name: str, path: str, problem: str) -> NoReturn:
    raise RequestError(f"{name} cannot be used: at {path[:200] or '/'}: {problem}", name)


def check_counts(schema: Mapping[str, Any], name: str) -> None:
    """Raise RequestError, with the place, for a schema with more parts than are compiled."""
    num_references = 0
    parts: list[tuple[str, Any, int]] = [("", schema, 0)]
    while parts:
        path, part, level = parts.pop()
        if level > MAX_LEVELS:
            too_large(name, path, f"it is nested too deeply: more than {MAX_LEVELS} levels")
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            num_references += key == "$ref"
            if num_references > MAX_REFERENCES:
                too_large(name, f"{path}/{key}", f"more than {MAX_REFERENCES} references")
            if not isinstance(value, (dict, list)):
                continue
            if key == "patternProperties" and len(value) > MAX_PATTERNS:
                too_large(name, f"{path}/{key}", f"more than {MAX_PATTERNS} patterns")
            if key in ("anyOf", "oneOf", "allOf") and len(value) > MAX_ALTERNATIVES:
                too_large(name, f"{path}/{key}", f"more than {MAX_ALTERNATIVES} alternatives")
            parts.append((f"{path}/{key}", value, level + 1))


def check_chains(schema: Mapping[str, Any], name: str) -> None:
    """Raise RequestError, with the place, for references that lead to others too many times."""
    seen = set[str]()
    parts: list[tuple[str, Any, int]] = [("", schema, 0)]
    while parts:
        path, part, num_links = parts.pop()
        for key, value in part.items() if isinstance(part, dict) else enumerate(part):
            if key == "$ref" and isinstance(value, str) and value[:1] == "#" and value not in seen:
                seen.add(value)
                if num_links >= MAX_CHAIN:
                    too_large(name, f"{path}/$ref", f"a chain of over {MAX_CHAIN} references")
                parts.append((value[1:], target(schema, value), num_links + 1))
            elif key not in SHARED:  # these count where a reference leads to them
                parts.append((f"{path}/{key}", value, num_links))
        parts = [item for item in parts if isinstance(item[1], (dict, list))]


# ---- annotations and keywords without effect -----------------------------------------------------


def has_no_effect(key: str, value: Any, schema: Mapping[str, Any]) -> bool:
    """Whether a keyword allows everything; its parts have lost their own."""
    anything = value is True or value == {}
    if key in ANNOTATIONS:
        return True
    if key == "format":
        return isinstance(value, str) and value not in FORMATS
    if key == "$schema":
        return isinstance(value, str) and not DRAFTS.fullmatch(value)
    if key == "contains":
        return schema.get("minContains") == 0 and "maxContains" not in schema
    if key in ("minContains", "maxContains"):
        return "contains" not in schema or has_no_effect("contains", None, schema)
    if key == "if":
        return not schema.keys() & {"then", "else"}
    if key in ("then", "else"):
        return "if" not in schema or anything
    if key == "propertyNames":
        return anything or value == {"type": "string"}
    if key in ("dependentRequired", "dependentSchemas", "dependencies"):
        return isinstance(value, dict) and not any(map(is_condition, value.values()))
    free = key in ("unevaluatedProperties", "unevaluatedItems") and anything
    return free or (key, value) in (("uniqueItems", False), ("not", False))


def is_condition(value: Any) -> bool:
    return value not in (True, {}, [])


def plain(schema: Any) -> Any:
    """A schema without annotations and without keywords that allow everything, with its patterns as
    the compiler reads them."""
    if not isinstance(schema, dict):
        return schema
    parts = {key: mapped(plain, key, value) for key, value in schema.items()}
    if isinstance(pattern := parts.get("pattern"), str):
        parts["pattern"] = rust_regex(pattern)
    if isinstance(by_pattern := parts.get("patternProperties"), dict):
        parts["patternProperties"] = {rust_regex(key): part for key, part in by_pattern.items()}
    return {key: value for key, value in parts.items() if not has_no_effect(key, value, parts)}


def mapped(function: Any, key: str, value: Any) -> Any:
    """The value of a keyword with a function applied to each schema in it."""
    if key in SCHEMA_MAPS and isinstance(value, dict):
        return {name: function(part) for name, part in value.items()}
    if (key in SCHEMA_LISTS or key == "items") and isinstance(value, list):
        return [function(part) for part in value]
    return function(value) if key in SCHEMAS else value


# ---- patterns ------------------------------------------------------------------------------------

# Parts of a regex of ECMA-262 that the compiler, written in Rust, reads otherwise; or a character
ECMA_PARTS = re.compile(
    r"""\\u(?P<high>[dD][89abAB][0-9a-fA-F]{2})\\u(?P<low>[dD][c-fC-F][0-9a-fA-F]{2})
    | \\c(?P<control>[A-Za-z]) | \\[upPx]\{[^}]*\} | \\.
    | \[:\^?[a-z]+:\] | \[\^?\]? | -- | \{(?:\d+(?:,\d*)?\})? | .""",
    re.VERBOSE | re.DOTALL,
)
RUST_ESCAPES = {
    r"\0": r"\x00",
    r"\<": "<",  # in Rust the beginning of a word
    r"\>": ">",
    r"\s": r"[\s\x{feff}--\x{85}]",
    r"\S": r"[^\s\x{feff}--\x{85}]",
}


def rust_regex(pattern: str, escapes: Mapping[str, str] = RUST_ESCAPES) -> str:
    """A pattern of a JSON Schema, whose dialect is that of ECMA-262, in that of Rust. Without
    `escapes`, an expression of Python."""
    out, in_class = list[str](), False
    for match in ECMA_PARTS.finditer(pattern):
        part = match[0]
        if part[0] == "\\":
            part = rust_escape(match, in_class, escapes)
        elif not in_class:
            in_class = part in ("[", "[^")
            part = {"[]": r"[^\s\S]", "[^]": r"[\s\S]", "{": r"\{"}.get(part, part)
        elif part.endswith("]") and not part.startswith("[:"):
            in_class, part = False, part.replace("[", r"\[")
        elif part == "--":  # from or to a minus
            part = r"\--" if out[-1] in ("[", "[^") else r"-\-"
        else:  # signs of nested classes, intersections and differences
            part = re.sub(r"^([&~]|\[(?!:))", r"\\\1", part)
        out.append(part)
    return "".join(out)


def rust_escape(match: re.Match[str], in_class: bool, escapes: Mapping[str, str]) -> str:
    """An escape sequence of ECMA-262 in the dialect of Rust."""
    high, low, control = match["high"], match["low"], match["control"]
    if high:
        return rf"\x{{{0x10000 + ((int(high, 16) & 0x3FF) << 10) + (int(low, 16) & 0x3FF):x}}}"
    if control:
        return rf"\x{ord(control) % 32:02x}"
    return r"\x08" if in_class and match[0] == r"\b" else escapes.get(match[0], match[0])


# ---- references to definitions of a part ---------------------------------------------------------


def rooted(schema: Any, root: Any, path: str, scopes: tuple[tuple[str, Any], ...]) -> Any:
    """A schema whose references all begin at the root: many tools have parts with definitions of
    their own, to which they refer as if the part were the whole schema."""
    if isinstance(schema, list):
        return [rooted(part, root, f"{path}/{i}", scopes) for i, part in enumerate(schema)]
    if not isinstance(schema, dict):
        return schema
    if schema.keys() & {*SHARED}:
        scopes = ((path, schema), *scopes)
    out = {}
    for key, value in schema.items():
        escaped = str(key).replace("~", "~0").replace("/", "~1")
        out[key] = rooted(value, root, f"{path}/{escaped}", scopes)
    reference = schema.get("$ref")
    if not isinstance(reference, str) or reference[:2] != "#/":
        return out
    if target(root, reference) is None:
        for scope_path, scope in scopes:
            if target(scope, reference) is not None and "$id" not in scope:
                reference = f"#{scope_path}{reference[1:]}"
                break
    # names such as List[int] and Größe, which some tools do not encode
    return {**out, "$ref": urllib.parse.quote(reference, safe="#%/~!$&'()*+,;=:@?")}


# ---- closed objects ------------------------------------------------------------------------------

IN_PLACE = {"allOf", "anyOf", "oneOf", "$ref"}  # they describe the object that the schema describes
OWN = {"properties", "required", "patternProperties", "additionalProperties"}
VALUES = {"properties", "patternProperties", "prefixItems", "items", *SHARED}
VALUES |= {"additionalProperties", "additionalItems"}  # these describe other values


class Closer:
    """Closes the objects of a schema: where `properties` are listed and `additionalProperties` is
    absent, there are no others. `schema` is the result.

    Several parts of a schema may describe the same object: those of an allOf, a $ref and what
    stands beside it, properties and the anyOf beside them. These parts stay open, and the outermost
    schema lists the properties of all."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.root = schema
        self.opened: dict[str, str] = {}  # $ref -> name of the same definition, open
        self.definitions: dict[str, Any] = {}  # the open ones
        self.schema: dict[str, Any] = self.closed(schema)
        if self.definitions:
            shared = self.schema.get("$defs")
            known = shared if isinstance(shared, dict) else {}
            self.schema["$defs"] = {**known, **self.definitions}

    def closed(self, schema: Any, is_part: bool = False) -> Any:
        """A schema with its objects closed; as a part, except the object that it describes."""
        if not isinstance(schema, dict):
            return schema
        num_parts = bool(schema.keys() & OWN) + len(schema.keys() & IN_PLACE)
        all_of = schema.get("allOf")
        num_parts += isinstance(all_of, list) and len(all_of) > 1
        is_split = is_part or num_parts > 1
        out = {key: self.keyword(key, value, is_split) for key, value in schema.items()}
        names = dict[str, None]()
        if (
            is_part
            or not (is_split or "properties" in schema)
            or not self.list_names(schema, names)
        ):
            return out
        least = schema.get("minProperties")
        if isinstance(least, (int, float)) and least > len(names):
            return out
        own = out.setdefault("properties", {})
        if not isinstance(own, dict):
            return out
        out["properties"] = {**own, **{name: {} for name in names if name not in own}}
        return {**out, "additionalProperties": False}

    def keyword(self, key: str, value: Any, is_split: bool) -> Any:
        """The value of a keyword, closed."""
        if key == "$ref":
            return self.open_reference(value) if is_split else value
        if key in IN_PLACE and isinstance(value, list):
            return [self.closed(part, is_split) for part in value]
        return mapped(self.closed, key, value) if key in VALUES else value

    def open_reference(self, reference: Any) -> Any:
        """A reference to the same definition, open."""
        found = self.find(reference)
        if not isinstance(found, dict) or not found.keys() & {"properties", *IN_PLACE}:
            return reference
        if reference not in self.opened:
            numbers = (f"open-{i}" for i in itertools.count(len(self.opened)))
            name = next(n for n in numbers if target(self.root, f"#/$defs/{n}") is None)
            self.opened[reference] = name
            own = {key: value for key, value in found.items() if key not in SHARED}
            self.definitions[name] = self.closed(own, is_part=True)
        return f"#/$defs/{self.opened[reference]}"

    def find(self, reference: Any) -> Any:
        """What a reference refers to; None for what is not in this schema."""
        if reference == "#":
            return self.root
        is_path = isinstance(reference, str) and reference.startswith("#/")
        return target(self.root, reference) if is_path else None

    def list_names(self, schema: Any, names: dict[str, None]) -> bool:
        """Add the names of an object's properties, from all parts that describe it. Returns whether
        some are listed, and no part says what else there may be."""
        seen, parts, is_listed = set[int](), [schema], False
        while parts:
            part = parts.pop(0)
            if not isinstance(part, dict) or id(part) in seen:
                continue
            seen.add(id(part))
            if "additionalProperties" in part or "unevaluatedProperties" in part:
                return False
            listed, required = part.get("properties"), part.get("required")
            if isinstance(listed, dict):
                names |= dict.fromkeys(listed)
                is_listed = True
            if isinstance(required, list):
                names |= dict.fromkeys(name for name in required if isinstance(name, str))
            for key in ("allOf", "anyOf", "oneOf"):
                inner = part.get(key)
                parts += inner if isinstance(inner, list) else ()
            parts.append(self.find(part.get("$ref")))
        return is_listed


# ---- all of it -----------------------------------------------------------------------------------


def readied(schema: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A schema as it is compiled. `name` is its place in the request. Raises RequestError."""
    try:
        check_size(json.dumps(schema), name)
        check_counts(schema, name)
        root = rooted(dict(schema), schema, "", ())
        check_chains(root, name)
        return Closer(plain(root)).schema
    except RecursionError:
        raise RequestError(f"{name} cannot be used: it is nested too deeply", name) from None
