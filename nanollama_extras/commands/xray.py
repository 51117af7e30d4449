"""The X-ray of an answer in the terminal: --explain, /explain, /why and /branch.

Adds       tokens shaded by their probability, with a mark ‹N› behind those that are surprising;
           the candidates of a token through every stage of the sampler; answers that go on from
           another candidate, and read again only what is not in the cache.
Seam       `nanollama.print_answer` takes its printer from `printer_for`; commands.options calls
           `start`, and commands.conversation `toggle`, `why` and `branch`. Imports answers.stages
           and commands.terminal.
Remove     delete this file; --explain, /explain, /why and /branch then say so.

An answer is explained by its log-probabilities, which come with its tokens. `/why` runs the model
for one token once more, after the same tokens: a row never depends on anything else, so it is the
row that the token was drawn from. A draw that differs is named.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import IO, TYPE_CHECKING, Any

from nanollama import AnswerPrinter, Piece, RequestError, UsageError, log, split_word, token_text
from nanollama_extras.answers.stages import look, probe_request, report

if TYPE_CHECKING:
    from nanollama import (
        LLM,
        Delta,
        GenerationRequest,
        Json,
        Prepared,
        SamplingParams,
        Sequence,
        Settings,
        TokenLogprobs,
    )
    from nanollama_extras.commands.conversation import Conversation

NUM_TOP = 5  # log-probabilities of alternatives that come with each token
SURPRISING = 0.1  # a token under this probability that is not the likeliest has a mark
NUM_LISTED = 5  # surprising tokens listed after an answer
# Least probability -> colour of the 256, behind black letters: green, yellow, orange, red
SHADES = ((0.9, 194), (0.5, 157), (0.25, 229), (SURPRISING, 222), (0.02, 216), (0.0, 210))
PLAIN = "\x1b[0m"
COLUMN = 11  # columns of a stage in the table of /why


# ---- tokens --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Token:
    """A token of an answer; number 1 is the first."""

    number: int
    token_id: int
    logprobs: TokenLogprobs

    @property
    def share(self) -> float:
        """Its probability, before penalties and temperature."""
        return math.exp(self.logprobs.logprob)

    @property
    def is_surprising(self) -> bool:
        return self.share < SURPRISING and self.logprobs.top[0][0] != self.token_id


def percent(share: float) -> str:
    """A probability in at most six columns."""
    return f"{share:.1%}" if share >= 0.0005 or not share else "<0.1%"


def quoted(llm: LLM, token_id: int) -> str:
    """The text of a token, its spaces and line breaks visible."""
    return repr(token_text(llm.tokenizer, token_id)[0])


def surprise_line(llm: LLM, token: Token) -> str:
    """‹7› ' Lyon' 3.1%; likelier: ' Paris' 62.0%, ' the' 8.1%"""
    pairs = [(i, math.exp(value)) for i, value in token.logprobs.top]
    likelier = [f"{quoted(llm, i)} {percent(p)}" for i, p in pairs if p > token.share][:3]
    own = f"‹{token.number}› {quoted(llm, token.token_id)} {percent(token.share)}"
    return f"{own}; likelier: {', '.join(likelier)}"


def summary_lines(llm: LLM, tokens: list[Token]) -> list[str]:
    """What is said after an answer: how sure the model was, and of what it was least sure."""
    mean = sum(token.logprobs.logprob for token in tokens) / len(tokens)
    odd = [token for token in tokens if token.is_surprising]
    head = f"[{len(tokens)} tokens, perplexity {math.exp(-mean):.2f}, {len(odd)} surprising]"
    worst = sorted(odd, key=lambda token: token.share)[:NUM_LISTED]
    worst.sort(key=lambda token: token.number)
    return [head, *(surprise_line(llm, token) for token in worst)]


# ---- the printed answer --------------------------------------------------------------------------


class Shaded:
    """A stream that writes each text between the style of its token and a mark."""

    def __init__(self, out: IO[str]) -> None:
        self.out, self.style, self.mark = out, "", ""

    def isatty(self) -> bool:
        return self.out.isatty()

    def flush(self) -> None:
        self.out.flush()

    def write(self, text: str) -> None:
        """Lines are styled one by one: a break inside a style would colour the rest of its row."""
        lines = text.split("\n")
        marked = max((i for i, line in enumerate(lines) if line.strip()), default=0)
        for i, line in enumerate(lines):
            styled = f"{self.style}{line}{PLAIN}" if self.style and line else line
            self.out.write(("\n" if i else "") + styled + (self.mark if i == marked else ""))


def can_colour(out: Any) -> bool:
    """Whether a stream is a terminal on which the user wants colours (https://no-color.org)."""
    plain = os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb"
    return bool(out.isatty() and not plain)


class XrayPrinter(AnswerPrinter):
    """An AnswerPrinter that shades the tokens which have log-probabilities."""

    def __init__(self, llm: LLM, splitter: Any, hide_thinking: bool, out: Any) -> None:
        self.shaded = Shaded(out)
        super().__init__(splitter, hide_thinking, self.shaded)  # type: ignore[arg-type]
        self.llm, self.has_colours = llm, can_colour(out)
        self.tokens: list[Token] = []
        # tokens whose texts were not written yet, with what is left of these
        self.waiting: deque[tuple[Token, str]] = deque()

    def push(self, delta: Delta) -> None:
        if delta.logprobs and delta.token_id is not None:
            token = Token(len(self.tokens) + 1, delta.token_id, delta.logprobs)
            self.tokens.append(token)
            self.waiting.append((token, delta.text))
        super().push(delta)

    def write(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if piece.kind not in self.text:
                self.waiting.clear()  # the texts of its tokens are in the call
                super().write([piece])
                continue
            for token, text, is_last in self.parts(piece.text):
                self.shaded.style = self.style(token)
                self.shaded.mark = (
                    f"‹{token.number}›" if token and self.marks(token, is_last) else ""
                )
                super().write([Piece(piece.kind, text)])
            self.shaded.style = self.shaded.mark = ""

    def parts(self, text: str) -> Iterator[tuple[Token | None, str, bool]]:
        """A text as the parts that single tokens wrote, and whether a part ends its token."""
        while text:
            token, own = self.waiting.popleft() if self.waiting else (None, text)
            part, text = text[: len(own)], text[len(own) :]
            if token and (rest := own[len(part) :]):
                self.waiting.appendleft((token, rest))
            if part:
                yield token, part, len(part) == len(own)

    def style(self, token: Token | None) -> str:
        if token is None or not self.has_colours:
            return ""
        colour = next(colour for least, colour in SHADES if token.share >= least)
        return f"\x1b[30;48;5;{colour}m"

    def marks(self, token: Token, is_last: bool) -> bool:
        return is_last and token.is_surprising

    def message(self) -> Json:
        """The answer as a message, after a summary of its tokens on stderr."""
        if self.tokens:
            log.warning("\n".join(summary_lines(self.llm, self.tokens)))
        return super().message()


def printer_for(llm: LLM) -> Any:
    """What makes the printer of an answer of this model, with the arguments of AnswerPrinter."""
    return lambda *args: XrayPrinter(llm, *args)


def start(settings: Settings) -> None:
    """--explain: answers come with log-probabilities."""
    settings.flags["logprobs"] = NUM_TOP


# ---- answers that can be explained, and gone on from elsewhere ----------------------------------


@dataclass(slots=True)
class Answer:
    """An answer with all that made it."""

    prepared: Prepared
    tokens: list[Token] = field(default_factory=list)
    num_cached: int = 0  # tokens whose keys and values were in the cache

    def add(self, delta: Delta) -> None:
        if delta.logprobs and delta.token_id is not None:
            token = Token(len(self.tokens) + 1, delta.token_id, delta.logprobs)
            self.tokens.append(token)
        if delta.usage:
            self.num_cached = delta.usage.cached_tokens


@dataclass(frozen=True, slots=True)
class Fork:
    """How an answer begins: tokens of an earlier one, and ids to take next."""

    kept: list[Token]
    token_ids: list[int]
    seed: int | None


class Forced:
    """A sampler that takes given ids, and then leaves the choice to the usual chain."""

    def __init__(self, token_ids: list[int], params: SamplingParams) -> None:
        self.token_ids, self.params = deque(token_ids), params

    def __call__(self, seq: Sequence, _: Any) -> int:
        token_id = self.token_ids.popleft()
        if seq.constraint and not seq.constraint.allowed()[token_id]:
            raise RequestError(f"token {token_id} does not fit the form of the answer", "branch")
        if not self.token_ids:
            seq.params = self.params
        return token_id


def forked(llm: LLM, prepared: Prepared, fork: Fork) -> Iterator[Delta]:
    """The deltas of an answer that begins as `fork` says. The engine reads the kept tokens as it
    reads a prompt, so it takes from the cache what is there."""
    params = prepared.request.params
    request = replace(
        prepared.request, params=replace(params, sampler=Forced(fork.token_ids, params))
    )
    with llm.engine.lock:
        seq = llm.start(replace(prepared, request=request))
        kept = [seq.append(token.token_id, token.logprobs, False) for token in fork.kept]
        seq.first_token_s = 0.0  # of the first token that is made, not kept
    try:
        yield from kept
        while not seq.finish_reason:
            llm.engine.step()
            for delta in seq.take():
                if delta.error:
                    raise delta.error
                yield delta
    finally:
        llm.engine.cancel(seq)


class Watched:
    """An LLM that remembers its last answer, whose seed it fixes: a token can be drawn again."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm
        self.answer: Answer | None = None
        self.fork: Fork | None = None  # of the next answer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.llm, name)

    def prepare(self, request: GenerationRequest) -> Prepared:
        params = request.params
        if params.seed is None:
            known = self.fork.seed if self.fork else None
            params = replace(params, seed=secrets.randbits(63) if known is None else known)
        return self.llm.prepare(replace(request, params=params))

    def stream(self, prepared: Prepared) -> Iterator[Delta]:
        fork, self.fork, self.answer = self.fork, None, Answer(prepared)
        llm = self.llm
        deltas: Any = forked(llm, prepared, fork) if fork else llm.stream(prepared)
        with contextlib.closing(deltas):
            for delta in deltas:
                self.answer.add(delta)
                yield delta


def watched(talk: Conversation) -> Watched:
    """The model of a conversation that is explained. Raises UsageError."""
    llm: Any = talk.llm
    if not isinstance(llm, Watched):
        raise UsageError("answers are not explained; /explain turns that on")
    return llm


def explained(talk: Conversation) -> Answer:
    """The last answer of a conversation. Raises UsageError."""
    answer = watched(talk).answer
    if answer is None or not answer.tokens:
        raise UsageError("there is no answer yet that was explained")
    return answer


# ---- the commands --------------------------------------------------------------------------------


def watch(talk: Conversation) -> None:
    """Explain the answers of a conversation from now on."""
    llm: Any = talk.llm
    talk.llm = llm if isinstance(llm, Watched) else Watched(llm)  # type: ignore[assignment]
    talk.values["logprobs"] = NUM_TOP


def toggle(talk: Conversation) -> None:
    """/explain: begin or end to explain answers."""
    llm: Any = talk.llm
    if isinstance(llm, Watched):
        talk.llm, talk.values["logprobs"] = llm.llm, None
        log.warning("Answers are plain.")
        return
    watch(talk)
    log.warning(
        "Answers are shaded by probability; ‹N› marks a surprising token.\n"
        "/why N explains token N, /branch N TEXT goes on from another one."
    )


def number_of(answer: Answer, word: str) -> int:
    """The number of a token. Raises UsageError."""
    most = len(answer.tokens)
    if not word.isdecimal() or not 1 <= int(word) <= most:
        raise UsageError(f"there is no token {word or '(none given)'}; the answer has 1 to {most}")
    return int(word)


def token_lines(llm: LLM, answer: Answer, width: int = 78) -> list[str]:
    """All tokens with number and probability, ! before a surprising one."""
    cells = [
        f"{'!' * t.is_surprising}{t.number} {quoted(llm, t.token_id)} {percent(t.share)}"
        for t in answer.tokens
    ]
    lines = [""]
    for cell in cells:
        if lines[-1] and len(lines[-1]) + 2 + len(cell) > width:
            lines.append("")
        lines[-1] += ("  " if lines[-1] else "") + cell
    return lines


def why(talk: Conversation, argument: str) -> None:
    """/why [N]: the candidates of token N through every stage; without N, all tokens. Raises
    UsageError."""
    answer, llm = explained(talk), talk.llm
    if not argument:
        log.warning("\n".join(token_lines(llm, answer)))
        return
    number = number_of(answer, argument)
    before = [token.token_id for token in answer.tokens[: number - 1]]
    made = answer.prepared
    request = probe_request(made.request, made.ids, before, made.form.constraint)
    taken = answer.tokens[number - 1].token_id
    body = report(look(watched(talk).llm, request), llm.tokenizer, taken)
    log.warning("\n".join(why_lines(number, body)))


def why_lines(number: int, body: Json) -> list[str]:
    """A report of answers.stages as a table: a line for each candidate, a column for each stage."""
    surprise, own = body["surprise_bits"], f"{body['text']!r} (id {body['token_id']})"
    share = f"{percent(body['probability'])}, rank {body['rank']} of {body['vocabulary']}"
    bits = "" if surprise is None else f", surprise {surprise:.1f} bits"
    left = f"{body['entropy_left_bits']:.2f} bits after all stages"
    lines = [f"token {number}: {own}, {share}{bits}"]
    lines += [f"entropy: {body['entropy_bits']:.2f} bits, {left}", *table_lines(body)]
    for stage in body["stages"]:
        if stage["removed"]:
            names = ", ".join(map(repr, stage["removed_first"]))
            more = ", .." if stage["removed"] > len(stage["removed_first"]) else ""
            lines.append(f"{stage['name']} removed {names}{more}")
    if body["drawn_id"] != body["token_id"]:
        drawn = next(c["text"] for c in body["candidates"] if c["id"] == body["drawn_id"])
        lines.append(f"(the sampler itself draws {drawn!r} here)")
    return lines


def table_lines(body: Json) -> list[str]:
    """The candidates, > before the one taken; and how many tokens each stage left and removed."""
    stages = body["stages"]
    rows = [["", *(f"{s['name']} {s['setting']}".strip() for s in stages)]]
    for i, one in enumerate(body["candidates"]):
        mark = ">" if one["id"] == body["token_id"] else " "
        cells = [stage_cell(s["values"][i], s["kind"]) for s in stages]
        rows.append([f"{mark} {one['id']:>6} {one['text'][:12]!r}", *cells])
    shares = [percent(s["removed_share"]) if s["removed"] else "" for s in stages]
    rows.append(["tokens left", *(str(s["left"]) for s in stages)])
    rows.append(["removed", *(str(s["removed"] or "") for s in stages)])
    rows.append(["their share", *shares])
    first = max(len(row[0]) for row in rows)
    widths = [max(COLUMN, len(cell) + 2) for cell in rows[0][1:]]
    columns = ["".join(f"{c:>{w}}" for c, w in zip(cells, widths)) for _, *cells in rows]
    return [f"{row[0]:<{first}}{cells}".rstrip() for row, cells in zip(rows, columns)]


def stage_cell(value: float | None, kind: str) -> str:
    if value is None:
        return "-"
    return f"{value:.2f}" if kind == "logit" else percent(value)


def candidate_ids(llm: LLM, token: Token, wanted: str) -> list[int]:
    """The ids that `/branch` names, by an id or by a text, which quotes may enclose. Raises
    UsageError."""
    if wanted.isdecimal():
        llm.engine.check_ids([int(wanted)], "branch")
        return [int(wanted)]
    text = re.sub(r"^(['\"])(.*)\1$", r"\2", wanted)
    texts = {token_text(llm.tokenizer, i)[0]: i for i, _ in reversed(token.logprobs.top)}
    for own, token_id in texts.items():
        if own == text or (text == wanted and own.strip() == text):
            return [token_id]
    has_space = token_text(llm.tokenizer, token.token_id)[0][:1] == " "
    ids = llm.tokenizer.encode(" " * (has_space and text == wanted) + text, False)
    if not ids:
        raise UsageError("/branch needs a number and a token, as in /branch 7 Paris")
    return ids


def branch(talk: Conversation, argument: str) -> None:
    """/branch N ID|TEXT: the last answer once more, with another token in place of N. Raises
    UsageError."""
    answer, llm = explained(talk), watched(talk)
    made = answer.prepared.request
    if made.messages != talk.messages[:-1] or not made.is_new_turn:
        raise UsageError("/branch goes on from the last answer, written in one piece")
    word, wanted = split_word(argument)
    number = number_of(answer, word)
    ids = candidate_ids(llm.llm, answer.tokens[number - 1], wanted)
    llm.fork = Fork(answer.tokens[: number - 1], ids, made.params.seed)
    try:
        talk.answer(talk.messages[:-1])
    finally:
        llm.fork = None
    if (new := llm.answer) and new is not answer:
        whole = len(new.prepared.ids) + number - 1
        log.warning(
            f"(token {number} replaced; {new.num_cached} of {whole} tokens before it cached)"
        )
