"""Answers in a form: JSON that a schema accepts, text of a regex or a grammar, and tool calls.

One grammar describes the whole answer, and where thoughts and calls may stand in it:

    schema | regex | grammar ─┐
    tools in their ToolFormat ┴> Lark -> LLMatcher -> a mask (V,) for each token

Seam       Answer form. The core asks `Grammars.constraint` for a Constraint; the engine asks that
           one which tokens may come next. For the calls of an answer it asks for answers.tools.
Remove     delete this file; requests with a schema, regex, grammar or tools are then refused.
Source     https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md (grammars)
"""

from __future__ import annotations

import decimal
import functools
import itertools
import json
import re
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

import nanollama
from nanollama import THOUGHTS, RequestError, cached, first_line

if TYPE_CHECKING:
    import numpy.typing as npt

    from nanollama import SamplingParams, Thoughts, Tokenizer
    from nanollama_extras.answers.tools import Argument, Calls, Function

# The library that compiles grammars; it is imported when the first one is compiled.
llguidance: Any = nanollama.LazyModule("llguidance", "gbnf_to_lark")

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


class Vocabulary:
    """A tokenizer as llguidance expects it: the bytes of each of V tokens, the names of control
    tokens, and one more token that ends answers of models without an end token."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, n_vocab: int) -> None:
        self.tokenizer = tokenizer
        names = {i: name.encode() for name, i in tokenizer.control.items() if i < n_vocab}
        pieces = [names.get(i) or tokenizer.token_bytes(i) for i in range(n_vocab)]
        self.tokens, self.special_token_ids = [*pieces, b"<end>"], [*names, n_vocab]
        self.eos_token_id = n_vocab

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, False, False)


class Constraint:
    """The state of one answer: `allowed` says which tokens may come next, `push` takes the one that
    was chosen.

    num_free: number of tokens that are allowed where any text is. is_free: whether the last call of
    `allowed` allowed as many, as before a call or in a thought."""

    def __init__(self, matcher: Any, n_vocab: int, num_free: int) -> None:
        self.matcher, self.n_vocab, self.num_free = matcher, n_vocab, num_free
        self.is_free = False

    @property
    def is_done(self) -> bool:
        """Whether the answer is complete: nothing can follow."""
        return bool(self.matcher.is_stopped() and not self.matcher.is_error())

    def allowed(self) -> npt.NDArray[np.bool_]:
        """The tokens that may come next (V,). Raises RequestError when there is none."""
        mask = np.frombuffer(self.matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(mask, count=self.n_vocab, bitorder="little").view(np.bool_)
        if self.matcher.is_error() or not allowed.any():
            reason = error_line(self.matcher.get_error()) or "no token can follow"
            raise RequestError(f"the answer cannot go on as it must: {reason}", "grammar")
        self.is_free = int(np.count_nonzero(allowed)) >= self.num_free
        return allowed

    def copy(self) -> Constraint:
        return Constraint(self.matcher.deep_copy(), self.n_vocab, self.num_free)

    def push(self, token_id: int) -> None:
        self.matcher.consume_token(token_id)

    def num_valid(self, token_ids: list[int]) -> int:
        """How many leading tokens of a draft could come next."""
        return int(self.matcher.validate_tokens(token_ids))


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


def nested_values(value: Any, depth: int) -> Iterator[tuple[str, Any]]:
    """The values inside a JSON value, down to a depth, each with its path."""
    pairs = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in pairs if depth else ():
        yield f"/{key}", item
        if isinstance(item, (dict, list)):
            yield from ((f"/{key}{path}", inner) for path, inner in nested_values(item, depth - 1))


def schema_error(schema: Mapping[str, Any], strict: bool = True) -> str:
    """The reason why a JSON Schema cannot be compiled; '' where it can."""
    total = 0
    for path, value in nested_values(schema, sys.maxsize):
        if path.endswith("/multipleOf") and isinstance(value, (int, float)) and value:
            total += int(f"{abs(decimal.Decimal(str(value))):f}".replace(".", ""))
            if total > MAX_MULTIPLE:
                return f"multipleOf {value} has too many digits"
    grammar = f"start: {json_grammar(schema, strict)}"
    error = error_line(llguidance.LLMatcher.validate_grammar(grammar))
    return error.rpartition("failed to compile JSON schema: ")[2]


def faulty_part(
    schema: Mapping[str, Any],
    error: str,
    shared: Mapping[str, Any],
    strict: bool,
    num_levels: int = MAX_LEVELS,
) -> str:
    """The path to the innermost part of a schema that has this error. `shared` holds what a `$ref`
    may refer to."""
    for path, part in nested_values(schema, 2) if num_levels else ():
        if isinstance(part, dict) and schema_error({**shared, **part}, strict) == error:
            return path + faulty_part(part, error, shared, strict, num_levels - 1)
    return ""


# Keywords that the grammar of arguments written one by one cannot enforce.
UNENFORCED = frozenset(
    "allOf anyOf oneOf not if format patternProperties propertyNames minProperties maxProperties "
    "dependentRequired dependentSchemas dependencies".split()
)


def text_terminal(schema: Mapping[str, Any]) -> str:
    """A terminal for the strings that fit a schema."""
    length = f"{{{schema.get('minLength', 0)},{schema.get('maxLength', '')}}}"
    if not (pattern := schema.get("pattern")):
        return f"/(.|\\n){length}/"
    start, end = ("" if pattern[:1] == "^" else r"(.|\n)*"), r"(.|\n)*"
    if pattern.endswith("$") and not pattern.endswith(r"\$"):
        pattern, end = pattern[:-1], ""
    regex = llguidance.regex_to_lark(f"{start}({pattern.removeprefix('^')}){end}")
    return f"/(.|\\n){length}/ & /{regex}/"


class Grammars:
    """Compiles the forms of answers for the vocabulary of one model. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int) -> None:
        self.tokenizer, self.n_vocab = tokenizer, n_vocab
        self.compiled = cached(self, Grammars.compile, 64)

    @functools.cached_property
    def vocabulary(self) -> Any:
        ends = sorted(i for i in self.tokenizer.end_ids if i < self.n_vocab) or [self.n_vocab]
        words: Any = Vocabulary(self.tokenizer, self.n_vocab)
        return llguidance.LLTokenizer(words, eos_token=ends)

    @functools.cached_property
    def num_free(self) -> int:
        """The number of tokens that are allowed where any text is."""
        anything = self.compile(llguidance.LLMatcher.grammar_from_lark(r"start: /(.|\n)+/"))
        return int(np.count_nonzero(Constraint(anything, self.n_vocab, 0).allowed()))

    def compile(self, grammar: str) -> Any:
        """A grammar in llguidance's notation -> its matcher. Raises RequestError."""
        matcher = llguidance.LLMatcher(self.vocabulary, grammar, log_level=0)
        try:
            Constraint(matcher, self.n_vocab, 0).allowed()
        except RequestError:
            reason = error_line(matcher.get_error()) or "no token of this model does"
            raise RequestError(f"no answer fits: {reason}") from None
        return matcher

    def check(self, name: str, grammar: str) -> None:
        """Raises RequestError, naming the field, for a grammar that does not compile."""
        if error := llguidance.LLMatcher.validate_grammar(grammar, self.vocabulary):
            raise RequestError(f"the {name} cannot be used: {error_line(error)}", name)

    def answer(self, params: SamplingParams) -> tuple[str, str]:
        """The form of an answer as an expression, '' for any text, and the grammar that the
        expression names as @answer. Raises RequestError."""
        if params.schema is not None:
            return self.schema(params.schema, "schema"), ""
        if params.regex is not None:
            self.check("regex", llguidance.LLMatcher.grammar_from_regex(params.regex))
            return f"/{llguidance.regex_to_lark(params.regex)}/", ""
        if params.grammar is not None:
            try:
                lark: str = llguidance.gbnf_to_lark.any_to_lark(params.grammar)
            except Exception as error:  # the library's parser raises errors of many types
                reason = f"the grammar cannot be used: {first_line(error)}"
                raise RequestError(reason, "grammar") from None
            self.check("grammar", lark)
            return "@answer", lark
        return "", ""

    def schema(self, schema: Mapping[str, Any], name: str, strict: bool = True) -> str:
        """A JSON Schema as an expression. Raises RequestError with the place and the reason."""
        try:
            if error := schema_error(schema, strict):
                shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}
                where = faulty_part(schema, error, shared, strict) or "/"
                raise RequestError(f"{name} cannot be used: at {where}: {error}", name)
            return json_grammar(schema, strict)
        except RecursionError:
            raise RequestError(f"{name} is nested too deeply", name) from None

    @functools.cached_property
    def signs(self) -> re.Pattern[str]:
        """Matches a control token in a text."""
        words = sorted(self.tokenizer.control, key=len, reverse=True)
        return re.compile(f"({'|'.join(map(re.escape, words)) or '(?!)'})")

    def literal(self, text: str) -> str:
        """Text as an expression that matches its control tokens by id."""
        control = self.tokenizer.control
        return " ".join(
            f"<[{control[part]}]>" if part in control else json.dumps(part)
            for part in self.signs.split(text)
            if part
        )

    def until(self, end: str, name: str, rules: dict[str, str], text: str = "TEXT") -> str:
        """An expression for the terminal `text` up to the first `end`. Adds to `rules`."""
        plain = self.signs.split(end)[0]
        if plain:
            rules[f"{name}[lazy]"] = f"{text} {json.dumps(plain)}"
        return f"{name if plain else text} {self.literal(end[len(plain) :])}"

    def thought(self, prompt: str, tags: Thoughts | None) -> tuple[str, dict[str, str]]:
        """The thoughts before an answer to `prompt`: the beginning of a rule, and further rules."""
        text, rules, prompt = r"(.|\n)*", dict[str, str](), prompt.rstrip()
        opened = next((tags for tags in THOUGHTS if prompt.endswith(tags.open)), None)
        tags = opened or tags
        if not tags or (prompt.endswith(tags.close) and not tags.answer):
            return "", {}
        start, end = ("" if opened else rf"[ \n]*{tags.open}"), tags.close
        if len(self.signs.split(tags.open)) > 1:
            start = self.literal("" if opened else tags.open)
            rules["thought"] = f"{start} {self.until(end, 'thoughts', rules)}"
        else:
            rules["thought[lazy]"] = f"/{llguidance.regex_to_lark(start + text + end)}/"
        return "thought" + ("" if opened else "*" if tags.answer else "?"), rules

    def calls(self, calls: Calls, is_free: bool) -> str:
        """The rules of `calls`; if free, any text may precede them. Raises RequestError."""
        form, control = calls.form, self.tokenizer.control
        between = {control[word] for word in self.signs.findall(form.between)}
        num_further = 0 if between & self.tokenizer.end_ids else calls.choice.max_calls - 1
        further = f"({self.literal(form.between)} next){{0,{num_further}}}" if num_further else ""
        rules = {"calls": f"first {further} {self.literal(form.end)}"}
        for i, (name, function) in enumerate(calls.functions.items()):
            head, tail = form.head(name), f"arguments_{i} {self.literal(form.tail)}"
            opening = form.begin + head
            first, open_name = self.literal(opening), "open" if form.trigger else f"open_{i}"
            if is_free:
                trigger = form.trigger or opening
                first = self.until(trigger, open_name, rules)
                first += " " + self.literal(opening.removeprefix(trigger))
            rules |= {f"first_{i}": f"{first} {tail}", f"next_{i}": f"{self.literal(head)} {tail}"}
            rules[f"arguments_{i}"] = self.schema(function.schema, function.where, function.strict)
            if form.parameter:
                self.parameters(form.parameter, f"arguments_{i}", function, rules)
        for kind in ("first", "next"):
            rules[kind] = " | ".join(f"{kind}_{i}" for i in range(len(calls.functions)))
        return "\n".join(f"{name}: {rule}" for name, rule in rules.items())

    def parameters(self, form: str, rule: str, function: Function, rules: dict[str, str]) -> None:
        """Add the rules of arguments that are written one by one, in the schema's order. Raises
        RequestError for a strict function with a keyword that they cannot enforce."""
        before, after = form.split("VALUE")
        tools = nanollama.extra("answers.tools", "a tool call")
        root, terms, arguments = function.schema, [], tools.read_arguments(function.schema)
        texts = [text for argument in arguments.values() for text in argument.texts]
        schemas = root, next(tools.branches(root, root)), *texts
        if function.strict and (lost := UNENFORCED & {*itertools.chain(*schemas)}):
            reason = f"calls of this model's kind cannot keep {min(lost)}"
            raise RequestError(f"{function.where} cannot be used: {reason}", function.where)
        for i, (key, argument) in enumerate(arguments.items()):
            name = f"{rule}_{i}"
            terms.append(name if argument.is_required else f"{name}?")
            value = self.value(argument, after, name, function, rules)
            rules[name] = f"{self.literal(before.replace('KEY', key))} ({value})"
        rules[rule] = " ".join(terms) or '""'

    def value(
        self, argument: Argument, after: str, name: str, function: Function, rules: dict[str, str]
    ) -> str:
        """An expression for an argument and the text `after` it. A string must not contain `after`,
        nor look like an array or object where the schema allows these, too."""
        root = function.schema
        shared = {key: root[key] for key in ("$defs", "definitions") if key in root}
        alternatives = [self.literal(text + after) for text in argument.listed]
        excluded = [f"(.|\n)*{re.escape(after.strip())}(.|\n)*"]
        for other in argument.others:
            if not argument.texts or other["type"] in ("array", "object"):
                grammar = json_grammar({**shared, **other}, function.strict)
                alternatives.append(f"{grammar} {self.literal(after)}")
                excluded.append(r"\s*[\[{](.|\n)*")
        if argument.texts:
            texts = " | ".join(map(text_terminal, argument.texts))
            others = (f"& ~/{llguidance.regex_to_lark(regex)}/" for regex in excluded)
            rules[name.upper()] = f"({texts}) {' '.join(others)}"
            alternatives.append(self.until(after, f"{name}_text", rules, name.upper()))
        return " | ".join(alternatives)

    def constraint(
        self, params: SamplingParams, prompt: str, tags: Thoughts | None, calls: Calls | None = None
    ) -> Constraint | None:
        """The form of the answer to a prompt that ends with `prompt`; None for any text.

        tags: how the model marks its thoughts, if it may write any. Raises RequestError."""
        answer, nested = self.answer(params)
        if not answer and not calls:
            return None
        thought, thought_rules = self.thought(prompt, tags)
        rules = "\n".join(f"{name}: {rule}" for name, rule in thought_rules.items())
        header = self.literal(tags.answer) if tags else ""
        is_required = calls is not None and calls.choice.mode == "required"
        choices = [] if is_required else [f"{thought} {header} answer"]
        if calls:  # models often begin a new line for them
            choices.append(thought.replace("thought", "(thought SPACE?)") + " calls")
            rules += "\n" + self.calls(calls, is_free=not (answer or is_required or header))
        top = f"start: {' | '.join(choices)}\n{rules}\nanswer: {answer or 'TEXT'}\n"
        top += "TEXT: /(.|\\n)*/\nSPACE: /[ \\n]{1,8}/\n"
        named = {"top": top, "answer": nested} if nested else {"top": top}
        grammars = [{"name": name, "lark_grammar": text} for name, text in named.items()]
        try:
            matcher = self.compiled(json.dumps({"grammars": grammars}))
        except RequestError as error:
            error.param = params.answer_field or "tools"
            raise
        return Constraint(matcher, self.n_vocab, self.num_free)
