"""Answers in a form: JSON that a schema accepts, text of a regex or a grammar, and tool calls.

One grammar describes the whole answer, and where thoughts and calls may stand in it:

    schema | regex | grammar ─┐
    tools in their ToolFormat ┴> Lark -> trial -> LLMatcher -> a mask (V,) for each token

The trial compiles the grammar in another process: nothing that a request holds may end this one.

Seam       Answer form. The core asks `Grammars.constraint` for a Constraint; the engine asks that
           one which tokens may come next. --schema asks for `read_schema`. For the calls of an
           answer it asks for answers.tools, for the grammar of a tool's text for
           answers.lark_json. It imports answers.schemas, which readies schemas, and
           answers.sandbox and answers.sandboxed for the trial.
Remove     delete this file; requests with a schema, regex, grammar or tools are then refused.
Source     https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md (grammars)
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import re
import weakref
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np

import nanollama
from nanollama import REPEATED, THOUGHTS, RequestError, byte_alphabet, first_line, read_input
from nanollama_extras.answers.sandbox import (
    Kept,
    Started,
    compiled_part,
    on_deep_stack,
    shared_sandbox,
)
from nanollama_extras.answers.sandboxed import PARSER_LIMITS, error_line, json_grammar
from nanollama_extras.answers.schemas import GRAMMAR, BestEffort, check_rules, check_size, readied

if TYPE_CHECKING:
    import numpy.typing as npt

    from nanollama import SamplingParams, Thoughts, Tokenizer
    from nanollama_extras.answers.tools import Argument, Calls, Function, ToolFormat

# The library that compiles grammars; it is imported when the first one is compiled.
llguidance: Any = nanollama.LazyModule("llguidance", find=compiled_part)
log = logging.getLogger("nanollama")
# Tokens whose mask is made with the tree: a state that allows all of them looks at the others
# alone. Each set takes a sixth of the tree's time. One for strings without a limit of length,
# beside this one, makes no mask faster.
SLICES = [r'[^"\\\x00-\x1f\x7f]{1,30}']  # of a JSON string


def read_schema(name: str) -> Any:
    """The value of --schema: JSON in a file, or a JSON object itself. Raises RequestError."""
    try:
        is_object = name.lstrip().startswith("{")
        return json.loads(name if is_object else read_input(name).decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{name}: not valid JSON: {first_line(error)}") from None


def all_bytes(tokenizer: Tokenizer, n_vocab: int) -> list[bytes]:
    """`token_bytes` of each token, most of them made of all pieces at once."""
    if tokenizer._byte_level:  # a character is a byte
        find = tokenizer._tokenizer.id_to_token  # quicker than `piece`
        pieces = [piece or "" for piece in map(find, range(n_vocab))]
        alphabet = {ord(character): byte for character, byte in byte_alphabet().items()}
        values = np.full(max(alphabet) + 2, 256, np.uint16)  # 256: of no byte
        values[[*alphabet]] = [*alphabet.values()]
        points = np.frombuffer("".join(pieces).encode("utf-32-le"), np.uint32)
        found = values[np.minimum(points, len(values) - 1)]
        ends = np.cumsum([len(piece) for piece in pieces])
        data, bounds = found.astype(np.uint8).tobytes(), itertools.pairwise([0, *ends.tolist()])
        tokens = [data[start:end] for start, end in bounds]
        special = {*ends.searchsorted((found == 256).nonzero()[0], "right").tolist()}
        special |= tokenizer._added_ids
    else:
        pieces = list(map(tokenizer.piece, range(n_vocab)))
        text = REPEATED.join(pieces).replace("▁", " ")  # a piece has no such sign
        tokens = text.encode().split(REPEATED.encode())
        special = {i for i, piece in enumerate(pieces) if piece[:3] == "<0x"}
        special |= {*tokenizer.control.values()}
    for i in special:
        if i < n_vocab:
            tokens[i] = tokenizer.token_bytes(i)
    return tokens


class Vocabulary:
    """A tokenizer as llguidance expects it: the bytes of each of V tokens, the names of control
    tokens, and one more token that ends answers of models without an end token."""

    is_tokenizer_wrapper = True
    bos_token_id = None

    def __init__(self, tokenizer: Tokenizer, n_vocab: int) -> None:
        self.tokenizer = tokenizer
        names = {i: name.encode() for name, i in tokenizer.control.items() if i < n_vocab}
        self.tokens, self.special_token_ids = all_bytes(tokenizer, n_vocab), [*names, n_vocab]
        for i, name in names.items():
            self.tokens[i] = name
        self.tokens.append(b"<end>")
        self.eos_token_id = n_vocab

    def __call__(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, False, False)


class Constraint:
    """The state of one answer: `allowed` says which tokens may come next, `push` takes the one that
    was chosen.

    num_free: number of tokens that are allowed where any text is. on_error: called when no more
    tokens can be found. is_free: whether the last call of `allowed` allowed as many as `num_free`,
    as before a call or in a thought."""

    def __init__(
        self, matcher: Any, n_vocab: int, num_free: int, on_error: Callable[[], object] = str
    ) -> None:
        self.matcher, self.n_vocab, self.num_free = matcher, n_vocab, num_free
        self.on_error, self.is_free = on_error, False

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
            self.on_error()
            raise RequestError(f"the answer cannot go on as it must: {reason}", "grammar")
        self.is_free = int(np.count_nonzero(allowed)) >= self.num_free
        return allowed

    def copy(self) -> Constraint:
        return Constraint(self.matcher.deep_copy(), self.n_vocab, self.num_free, self.on_error)

    def push(self, token_id: int) -> None:
        self.matcher.consume_token(token_id)

    def num_valid(self, token_ids: list[int]) -> int:
        """How many leading tokens of a draft could come next."""
        return int(self.matcher.validate_tokens(token_ids))


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


def text_argument(schema: Mapping[str, Any], text: str) -> str:
    """An expression for the JSON object whose only value is a text of the expression `text`."""
    space = "( ?|\\n[ \\t]{0,16})"  # as in JSON_OPTIONS
    (name,) = schema["properties"]
    key = llguidance.regex_to_lark(re.escape(json.dumps(name)))
    return rf'/\{{{space}{key}{space}:{space}"/ {text} /"{space}\}}/'


def ready_schema(text: str) -> dict[str, Any]:
    """The place of a schema in a request, whether to be strict, and the schema, as JSON -> the
    schema as it is compiled. Raises RequestError with the place and the reason."""
    name, strict, schema = json.loads(text)
    schema = readied(schema, name)
    with shared_sandbox().turn() as run:
        result = run("check_schema" if strict else "mend_schema", schema=schema)
    if error := result.get("error"):
        raise RequestError(f"{name} cannot be used: {error}", name)
    if lost := result.get("lost"):
        log.warning("%s is used without %s, which cannot be enforced", name, ", ".join(lost)[:500])
    return cast("dict[str, Any]", result.get("schema", schema))


READY_SCHEMAS = Kept(ready_schema, 256)


class Grammars:
    """Compiles the forms of answers for the vocabulary of one model. Threads may share it."""

    def __init__(self, tokenizer: Tokenizer, n_vocab: int) -> None:
        self.tokenizer, self.n_vocab = tokenizer, n_vocab
        this = weakref.proxy(self)  # what is kept here is freed together with this
        self.vocabulary = Started[Any](lambda: this.new_vocabulary())
        self.compiled = Kept[Any](lambda grammar: this.compile(grammar), 64)
        self.checked = Kept[str](lambda grammar: this.check(grammar), 256)

    def new_vocabulary(self) -> Any:
        """The vocabulary as llguidance searches it: a tree. Other Python waits meanwhile."""
        ends = sorted(i for i in self.tokenizer.end_ids if i < self.n_vocab) or [self.n_vocab]
        words: Any = Vocabulary(self.tokenizer, self.n_vocab)
        return llguidance.LLTokenizer(words, eos_token=ends, slices=SLICES)

    @functools.cached_property
    def num_free(self) -> int:
        """The number of tokens that are allowed where any text is."""
        anything = self.matcher(llguidance.LLMatcher.grammar_from_lark(r"start: /(.|\n)+/"))
        return int(np.count_nonzero(Constraint(anything, self.n_vocab, 0).allowed()))

    def matcher(self, grammar: str) -> Any:
        """A grammar in llguidance's notation -> its matcher. Raises RequestError."""
        limits = llguidance.LLParserLimits(**PARSER_LIMITS)
        matcher = llguidance.LLMatcher(self.vocabulary(), grammar, log_level=0, limits=limits)
        try:
            Constraint(matcher, self.n_vocab, 0).allowed()
        except RequestError:
            reason = error_line(matcher.get_error()) or "no token of this model does"
            raise RequestError(f"no answer fits: {reason}") from None
        return matcher

    def compile(self, grammar: str) -> Any:
        """As `matcher`, for a grammar that a request may hold: first on trial. Raises RequestError,
        and WireError 503 where too many wait for their trial."""
        with shared_sandbox().turn() as run:
            if error := run("begin", grammar=grammar, names=self.names(grammar)).get("error"):
                raise RequestError(f"no answer fits: {error}")
            return on_deep_stack(lambda: self.matcher(grammar))

    def check(self, text: str) -> str:
        """A field of SamplingParams and the regex or grammar in it, as JSON -> the regex as Lark
        quotes it, or the grammar in Lark. Raises RequestError."""
        name, source = json.loads(text)
        check_size(source, name)
        check_rules(source, name)
        with shared_sandbox().turn() as run:
            task = "regex_to_lark" if name == "regex" else "grammar_to_lark"
            result = run(task, text=source, names=self.names(source))
        if error := result.get("error"):
            raise RequestError(f"the {name} cannot be used: {error}", name)
        return str(result["lark"])

    def names(self, grammar: str) -> list[str]:
        """The control tokens that a grammar may name."""
        return [name for name in self.tokenizer.control if name in grammar]

    def answer(self, params: SamplingParams) -> tuple[str, str]:
        """The form of an answer as an expression, '' for any text, and the grammar that the
        expression names as @answer. Raises RequestError."""
        if params.schema is not None:
            strict = not isinstance(params.schema, BestEffort)
            return json_grammar(self.ready(params.schema, "schema", strict), strict), ""
        if params.regex is not None:
            return f"/{self.checked(json.dumps(['regex', params.regex]))}/", ""
        if params.grammar is not None:
            return "@answer", self.checked(json.dumps(["grammar", params.grammar]))
        return "", ""

    def ready(self, schema: Mapping[str, Any], name: str, strict: bool = True) -> dict[str, Any]:
        """A JSON Schema as it is compiled; unless strict, without the keywords that cannot be
        enforced. Raises RequestError with the place and the reason."""
        try:
            return READY_SCHEMAS(json.dumps([name, strict, schema]))
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

    def calls(self, calls: Calls, is_free: bool, named: dict[str, str]) -> str:
        """The rules of `calls`; if free, any text may precede them. Adds to `named` the grammars
        that the rules name. Raises RequestError."""
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
            if text := self.text_of(function, form):
                rules[f"arguments_{i}"] = text_argument(function.schema, f"@text_{i}")
                named[f"text_{i}"] = text
                continue
            schema = self.ready(function.schema, function.where, function.strict)
            schema = {**schema, "type": "object"}
            rules[f"arguments_{i}"] = json_grammar(schema, function.strict)
            ready = function._replace(schema=schema)
            if form.parameter:
                self.parameters(form.parameter, f"arguments_{i}", ready, rules)
            elif form.notation:
                form.notation.add_rules(f"arguments_{i}", self, ready, rules)
        for kind in ("first", "next"):
            rules[kind] = " | ".join(f"{kind}_{i}" for i in range(len(calls.functions)))
        return "\n".join(f"{name}: {rule}" for name, rule in rules.items())

    def text_of(self, function: Function, form: ToolFormat) -> str:
        """The grammar of the only argument of a function, inside a JSON string; '' where it has
        none, or where calls of this form cannot keep it, which is logged."""
        properties = function.schema.get("properties")
        schemas = [*properties.values()] if isinstance(properties, Mapping) else []
        found = [one[GRAMMAR] for one in schemas if isinstance(one, Mapping) and GRAMMAR in one]
        if len(schemas) != 1 or not found or not isinstance(source := found[0], str):
            return ""
        problem = "this model does not write its calls in JSON"
        if not (form.parameter or form.notation):
            try:
                lark = nanollama.extra("answers.lark_json", "the grammar of a tool's text")
                return self.checked(json.dumps(["grammar", lark.in_json(source)]))
            except (ValueError, RequestError) as error:
                problem = str(error)
        nanollama.warn_once(f"{function.where} is used without its grammar: {problem}")
        return ""

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
        if not (params.answer_field or calls):
            return None
        if not self.vocabulary.future:
            with shared_sandbox().turn():  # a process starts, and will try the grammar meanwhile
                self.vocabulary.start()
        answer, nested = self.answer(params)
        thought, thought_rules = self.thought(prompt, tags)
        rules = "\n".join(f"{name}: {rule}" for name, rule in thought_rules.items())
        header = self.literal(tags.answer) if tags else ""
        is_required = calls is not None and calls.choice.mode == "required"
        choices = [] if is_required else [f"{thought} {header} answer"]
        named = {"answer": nested} if nested else {}
        if calls:  # models often begin a new line for them
            choices.append(thought.replace("thought", "(thought SPACE?)") + " calls")
            is_free = not (answer or is_required or header)
            rules += "\n" + self.calls(calls, is_free, named)
        top = f"start: {' | '.join(choices)}\n{rules}\nanswer: {answer or 'TEXT'}\n"
        top += "TEXT: /(.|\\n)*/\nSPACE: /[ \\n]{1,8}/\n"
        named = {"top": top, **named}
        grammars = [{"name": name, "lark_grammar": text} for name, text in named.items()]
        grammar = json.dumps({"grammars": grammars})
        try:
            matcher = self.compiled(grammar)
        except RequestError as error:
            error.param = params.answer_field or "tools"
            raise
        forget = functools.partial(self.compiled.forget, grammar)  # its states may be used up
        return Constraint(matcher, self.n_vocab, self.num_free, forget)
