"""Compiles grammars on trial, as a program of its own: a grammar that overflows the stack, fills
the memory or takes too long ends this process, and not the server.

    a line of JSON {"task": name, ..} -> a line of JSON: what the task returns, or {"error": text}

It imports the standard library and llguidance alone: it starts in a fraction of a second.

Seam       Answer form. answers/sandbox.py runs this file; answers/grammars.py compiles with the
           same limits and options.
Remove     delete this file together with answers/grammars.py.
Source     https://github.com/guidance-ai/llguidance/blob/main/docs/json_schema.md
"""

from __future__ import annotations

import contextlib
import decimal
import functools
import importlib
import importlib.util
import json
import os
import re
import signal
import sys
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from importlib.machinery import PathFinder
from typing import Any

TOO_DEEP = "it is nested too deeply, or its parts refer to each other in a chain"
TOO_LARGE = "it needs too much memory"
CPU_S = 1.0  # of one task
MEMORY = 320 << 20  # address space of the process, of which Python and the library take 30 MB
NUM_STEPS = 8  # tokens of an answer that are written on trial
STACK = 8 << 20  # of the thread that compiles; the server's has twice as much
# Of llguidance.LLParserLimits. A step costs at most some tenths of a second, and a grammar's states
# some tens of megabytes.
PARSER_LIMITS: Any = {
    "initial_lexer_fuel": 400_000,
    "step_lexer_fuel": 100_000,
    "max_lexer_states": 50_000,
    "max_grammar_size": 100_000,
    "verbose_errors": False,
}
# JSON as models write it: on one line, or indented. Small models never leave unlimited space.
JSON_OPTIONS: Any = {
    "whitespace_pattern": r" ?|\n[ \t]{0,16}",
    "lenient": False,  # keywords that cannot be enforced are errors
    "coerce_one_of": False,
    "item_separator": ",",
    "key_separator": ":",
}
# The largest sum of a schema's multipleOf, read without decimal points: each needs so many states.
MAX_MULTIPLE = 10_000
MAX_LEVELS = 32  # levels of a schema that are searched for a fault
MAX_CURES = 50  # keywords that a search leaves out, one after another
SHARED = "$defs", "definitions"  # what a $ref may refer to

llguidance: Any = None  # the library's compiled part, from `main` on
importing = threading.Lock()


def library_part(folder: str, name: str = "_lib") -> Any:
    """A module of llguidance in this folder of packages, without the package's __init__, which
    takes as long as all the rest: it reads the metadata of packages. Raises ImportError."""
    path = f"llguidance.{name}"
    with importing:
        if path not in sys.modules:
            spec: Any = PathFinder.find_spec(path, [os.path.join(folder, "llguidance")])
            if not spec:
                raise ImportError(f"there is no {path} in {folder}")
            module = importlib.util.module_from_spec(spec)
            sys.modules[path] = module
            spec.loader.exec_module(module)
    return sys.modules[path]


def error_line(text: str) -> str:
    """The first line of llguidance's message, and the reason that its regex compiler adds."""
    head = text.partition("<state>")[0].strip().partition("\n")[0][:300]
    head = head.replace("NoExtensionBias", "no token can follow")
    reason = re.search(r"(?m)^error: (.+)$", text)
    return f"{head} {reason[1]}" if reason else head


def json_grammar(schema: Mapping[str, Any], strict: bool = True) -> str:
    """A JSON Schema as an expression of llguidance's Lark; unless strict, without the keywords that
    llguidance cannot enforce."""
    options = JSON_OPTIONS if strict else {**JSON_OPTIONS, "lenient": True, "coerce_one_of": True}
    return "%json " + json.dumps({**schema, "x-guidance": options})


# ---- faults of schemas ---------------------------------------------------------------------------


def nested_values(value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """The values inside a JSON value, down to a depth, each with its path."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in pairs if depth else ():
        yield f"/{key}", item
        if isinstance(item, (dict, list)):
            yield from ((f"/{key}{path}", inner) for path, inner in nested_values(item, depth - 1))


def multiple_error(schema: Mapping[str, Any]) -> str:
    """The error of multiples that need too many states."""
    total = 0
    for path, value in nested_values(schema, sys.maxsize):
        if path.endswith("/multipleOf") and isinstance(value, (int, float)) and value:
            total += int(f"{abs(decimal.Decimal(str(value))):f}".replace(".", ""))
            if total > MAX_MULTIPLE:
                return f"multipleOf {value} has too many digits"
    return ""


def schema_error(schema: Mapping[str, Any], strict: bool = True) -> str:
    """The reason why a JSON Schema cannot be compiled; '' where it can."""
    if error := multiple_error(schema):
        return error
    grammar = f"start: {json_grammar(schema, strict)}"
    limits = llguidance.LLParserLimits(**PARSER_LIMITS)
    error = llguidance.LLMatcher.validate_grammar(grammar, limits=limits)
    return error_line(error).rpartition("failed to compile JSON schema: ")[2]


def faulty_part(
    schema: dict[str, Any],
    error: str,
    shared: Mapping[str, Any],
    strict: bool,
    num_levels: int = MAX_LEVELS,
) -> tuple[str, dict[str, Any]]:
    """The innermost part of a schema that has this error, and its path. `shared` holds what a
    `$ref` may refer to."""
    shared_first = {**shared_parts(schema), **schema}
    for path, part in nested_values(shared_first, 2) if num_levels else ():
        if isinstance(part, dict) and schema_error({**shared, **part}, strict) == error:
            inner, found = faulty_part(part, error, shared, strict, num_levels - 1)
            return path + inner, found
    return "", schema


def shared_parts(schema: Mapping[str, Any]) -> dict[str, Any]:
    return {key: schema[key] for key in SHARED if key in schema}


# ---- a schema without its faults -----------------------------------------------------------------

PART_MAPS = ("properties", "patternProperties", *SHARED)
PART_LISTS = ("prefixItems", "allOf", "anyOf", "oneOf")
PARTS = ("items", "additionalProperties", "additionalItems")
WITH_PARTS = {*PART_MAPS, *PART_LISTS, *PARTS, "$ref"}


def are_schemas(values: Any) -> bool:
    return isinstance(values, list) and all(isinstance(value, (dict, bool)) for value in values)


def target(root: Any, pointer: str) -> Any:
    """The part of a schema that a `$ref` within it points to; None without one."""
    for key in urllib.parse.unquote(pointer).split("/")[1:]:
        key = key.replace("~1", "/").replace("~0", "~")
        if isinstance(root, list) and key.isdecimal():
            root = dict(enumerate(root)).get(int(key))
        else:
            root = root.get(key) if isinstance(root, dict) else None
    return root


class Mender:
    """Leaves out of a schema the keywords that cannot be kept: `schema` is the rest, and `lost` has
    their paths."""

    def __init__(self, schema: Mapping[str, Any]) -> None:
        self.root, self.lost = schema, list[str]()
        self.schema: dict[str, Any] = dict(schema)
        if not schema_error(schema):
            return
        self.schema = self.mended(schema, "")
        for _ in range(MAX_CURES):
            if not (error := schema_error(self.schema, False)):
                return
            self.cure(error)
        self.lost.append("/")
        self.schema = {}

    def cure(self, error: str) -> None:
        """Take the keyword that causes the error out of the schema; where several do, take out all
        of that part."""
        shared = shared_parts(self.schema)
        path, part = faulty_part(self.schema, error, shared, False)
        for key in sorted(part, key="type".__eq__):
            if key in SHARED:
                continue
            rest = {name: value for name, value in part.items() if name != key}
            if schema_error({**shared, **rest}, False) != error:
                self.lost.append(f"{path}/{key}")
                del part[key]
                return
        self.lost.append(path or "/")
        part.clear()

    def mended(self, schema: Any, path: str) -> Any:
        """A part of the schema, each keyword of which can be kept on its own."""
        if not isinstance(schema, dict):
            return schema
        kept = self.plain_keywords(schema)
        for key in schema:
            if key in WITH_PARTS and self.is_well_formed(key, schema[key]):
                kept[key] = self.mended_parts(key, schema[key], f"{path}/{key}")
        self.lost += [f"{path}/{key}" for key in schema if key not in kept]
        return {key: kept[key] for key in schema if key in kept}

    def plain_keywords(self, schema: Mapping[str, Any]) -> dict[str, Any]:
        """The keywords without parts that can be kept together; the type first."""
        names = sorted(schema.keys() - WITH_PARTS, key=lambda name: (name != "type", name))
        plain = {name: schema[name] for name in names}
        if not schema_error(plain):
            return plain
        kept: dict[str, Any] = {}
        for name, value in plain.items():
            if not schema_error({**kept, name: value}):
                kept[name] = value
        return kept

    def is_well_formed(self, key: str, value: Any) -> bool:
        if key in PART_MAPS:
            return isinstance(value, dict) and are_schemas([*value.values()])
        if key in PART_LISTS:
            return are_schemas(value) and bool(value)
        if key in PARTS:
            return are_schemas([value]) or (key == "items" and are_schemas(value))
        if not isinstance(value, str) or not value.startswith("#/"):
            return isinstance(value, str) and value.startswith("#")
        return are_schemas([target(self.root, value)])

    def mended_parts(self, key: str, value: Any, path: str) -> Any:
        """The value of a keyword with its parts mended."""
        if isinstance(value, list):
            return [self.mended(part, f"{path}/{i}") for i, part in enumerate(value)]
        if key not in PART_MAPS:
            return self.mended(value, path)
        parts = {name: self.mended(part, f"{path}/{name}") for name, part in value.items()}
        if key == "patternProperties":
            bad = [name for name in parts if schema_error({"type": "string", "pattern": name})]
            self.lost += [f"{path}/{name}" for name in bad]
            parts = {name: part for name, part in parts.items() if name not in bad}
        return parts


# ---- tasks ---------------------------------------------------------------------------------------


class Vocabulary:
    """A tokenizer as llguidance expects it, which stands for any model's: the 256 bytes, control
    tokens with these names, and the end."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, names: tuple[str, ...]) -> None:
        self.tokens = [bytes([i]) for i in range(256)] + [name.encode() for name in names]
        self.eos_token_id = len(self.tokens)
        self.special_token_ids = [*range(256, self.eos_token_id + 1)]
        self.tokens.append(b"<end>")

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


@functools.lru_cache(maxsize=8)
def tokenizer(names: tuple[str, ...]) -> Any:
    return llguidance.LLTokenizer(Vocabulary(names))


def without_ids(grammar: str) -> str:
    """A grammar with the first control token in place of tokens that it names by id."""
    return re.sub(r"<\[\^?[\d,-]{1,999}\]>", "<[256]>", grammar)


def begin(grammar: str, names: list[str]) -> dict[str, Any]:
    """Compile a grammar and write the beginning of an answer. What is too complex for that errs."""
    vocabulary = tokenizer(tuple(names) or ("<control>",))
    limits = llguidance.LLParserLimits(**PARSER_LIMITS)
    matcher = llguidance.LLMatcher(vocabulary, without_ids(grammar), log_level=0, limits=limits)
    for _ in range(NUM_STEPS):
        mask = matcher.compute_bitmask()
        tokens = (8 * i + bit for i, byte in enumerate(mask) for bit in range(8) if byte >> bit & 1)
        if matcher.is_error() or matcher.is_stopped():
            break
        matcher.consume_token(next(tokens))
    return {"error": error_line(matcher.get_error()) if matcher.is_error() else ""}


def grammar_error(grammar: str, names: list[str]) -> str:
    """The error of a grammar that becomes a part of another one; '' without one."""
    vocabulary = tokenizer(tuple(names) or ("<control>",))
    limits = llguidance.LLParserLimits(**PARSER_LIMITS)
    text = without_ids(grammar)
    return error_line(llguidance.LLMatcher.validate_grammar(text, vocabulary, limits=limits))


def regex_to_lark(text: str, names: list[str]) -> dict[str, Any]:
    """A regular expression -> the same as Lark quotes it."""
    error = grammar_error(llguidance.LLMatcher.grammar_from_regex(text), names)
    return {"lark": llguidance.regex_to_lark(text), "error": error}


def grammar_to_lark(text: str, names: list[str]) -> dict[str, Any]:
    """A grammar in Lark or GBNF -> Lark."""
    lark = library_part(sys.argv[1], "gbnf_to_lark").any_to_lark(text)
    return {"lark": lark, "error": grammar_error(lark, names)}


def check_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Find the first error of a schema, and its place."""
    if not (error := schema_error(schema)):
        return {"error": ""}
    path, _ = faulty_part(schema, error, shared_parts(schema), True)
    return {"error": f"at {path or '/'}: {error}"}


def mend_schema(schema: dict[str, Any]) -> dict[str, Any]:
    """Leave out the keywords of a schema that cannot be kept."""
    mender = Mender(schema)
    return {"schema": mender.schema, "lost": mender.lost}


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    task.__name__: task
    for task in (begin, check_schema, mend_schema, regex_to_lark, grammar_to_lark)
}


def answer(task: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """Run a task. What it raises is its error."""
    try:
        return TASKS[task](**arguments)
    except MemoryError:
        return {"error": TOO_LARGE}
    except RecursionError:
        return {"error": TOO_DEEP}
    except BaseException as error:  # the library's parser raises errors of many types, and panics
        lines = str(error).split("\n")
        return {"error": lines[0][:300] or type(error).__name__}


def limit_memory() -> None:
    """Limit the memory of the process; macOS does not enforce it, and Windows has no such limit."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        resource: Any = importlib.import_module("resource")
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def used_memory() -> int:
    """The memory that the process takes now; 0 where the system does not say so simply."""
    with contextlib.suppress(OSError), open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0


def limit_time(seconds: float) -> None:
    """End the process after so much CPU time, also inside of the library; 0 for no limit. Windows
    has no such timer."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def serve() -> None:
    """Read tasks and write results until the server closes the pipe or ends."""
    for line in sys.stdin.buffer:
        limit_time(CPU_S)
        result = answer(**json.loads(line))
        limit_time(0)
        result["is_last"] = used_memory() > MEMORY // 3  # the next task gets a new process
        sys.stdout.buffer.write(json.dumps(result).encode() + b"\n")
        sys.stdout.buffer.flush()


def main() -> None:
    global llguidance
    llguidance = library_part(sys.argv[1])
    limit_memory()
    threading.stack_size(STACK)
    thread = threading.Thread(target=serve)
    thread.start()
    thread.join()


if __name__ == "__main__":
    main()
