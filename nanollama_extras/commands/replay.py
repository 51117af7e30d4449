"""`nanollama replay FILE`: run recorded answers again, and say where and how much they differ.

Seam       Command (the row "replay" of COMMANDS in nanollama.py).
Imports    answers.scores, for logits of a text and divergences.
Remove     delete this file and that row; --record still writes its files.

Each answer is generated again from the ids of its prompt, with its seed and settings. Then its own
tokens are given to the model, so that the distributions of both are compared at each position, also
behind the first token that differs.

The file has the 20 likeliest tokens of each position. Their divergence, with all other tokens taken
as one, is a lower bound of the whole distribution's.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, Any

from nanollama import (
    GenerationRequest,
    NanollamaError,
    RequestError,
    SamplingParams,
    add_model_options,
    command_parser,
    common_prefix,
    excerpt,
    extra,
    option_group,
    read_input,
    read_settings,
)

if TYPE_CHECKING:
    import argparse

    from nanollama import LLM, Fields, Json, Settings

Top = list[tuple[int, float]]  # ids and log-probabilities of the likeliest tokens, best first


@dataclass(frozen=True, slots=True)
class Answer:
    """A recorded answer."""

    line: int
    ids: list[int]
    tokens: list[int]
    tops: list[Top]
    params: SamplingParams  # with the seed that was used, and without stop texts
    is_constrained: bool  # by a grammar or tools, which the file does not have
    seconds: float


@dataclass(slots=True)
class Run:
    """The answers of one model, in one process."""

    about: Json
    answers: list[Answer] = field(default_factory=list)


def read_record(name: str) -> list[Run]:
    """The runs of a file that --record wrote. Raises RequestError, naming the line."""
    runs: dict[str, Run] = {}
    for number, line in enumerate(read_input(name).splitlines(), 1):
        try:
            row = json.loads(line)
            if "model" in row:
                runs[row["run"]] = Run({"engine": {}, **row})
            else:
                runs[row["run"]].answers.append(read_answer(number, row))
        except (ValueError, TypeError, LookupError, RecursionError, NanollamaError):
            text = excerpt(line.decode("utf-8", "replace"))
            raise RequestError(
                f"{name}, line {number}: {text} is not a line that --record writes"
            ) from None
    if not any(run.answers for run in runs.values()):
        raise RequestError(f"{name}: holds no answers; make some with --record {name}")
    return list(runs.values())


def read_answer(number: int, row: Fields) -> Answer:
    """A line. Raises ValueError, TypeError, LookupError or RequestError for another file's."""
    ids, tokens = ([int(i) for i in row[key]] for key in ("ids", "answer"))
    tops = [[(int(i), float(p)) for i, p in top] for _, top in row["logprobs"]]
    if not ids or not tokens or len(tops) != len(tokens) or not all(tops):
        raise ValueError("an answer has no tokens, or as many log-probabilities")
    given = dict(row["params"])
    given["logit_bias"] = {int(i): bias for i, bias in given.get("logit_bias", {}).items()}
    known = {each.name for each in fields(SamplingParams)}
    forms = dict.fromkeys("schema regex grammar thinking_budget logprobs".split())
    plain: Json = {"stop": (), "prompt_logprobs": False, **forms}
    own = {"seed": int(row["seed"]), "max_tokens": len(tokens)}
    params = SamplingParams(**{n: v for n, v in given.items() if n in known} | plain | own)
    is_constrained, seconds = bool(row["is_constrained"]), float(row["seconds"])
    return Answer(number, ids, tokens, tops, params, is_constrained, seconds)


def top_divergence(recorded: Top, logprobs: Any) -> float:
    """The Kullback-Leibler divergence in nats of log-probabilities (V,) from the recorded ones of
    the likeliest tokens, all others taken as one token. At most that of the whole distributions
    (the data processing inequality)."""
    kl, rest_p, rest_q = 0.0, 1.0, 1.0
    for token_id, log_p in recorded:
        p, log_q = math.exp(log_p), float(logprobs[token_id])
        kl, rest_p, rest_q = kl + p * (log_p - log_q), rest_p - p, rest_q - math.exp(log_q)
    if rest_p > 1e-6:  # below it, it is the rounding of the sum
        kl += rest_p * math.log(rest_p / max(rest_q, 1e-9))
    return max(0.0, kl)


def forced(llm: LLM, answer: Answer) -> Iterator[tuple[float, bool]]:
    """At each position of an answer, given its own tokens: the divergence, and whether the
    likeliest token is the recorded one."""
    pieces = extra("answers.scores", "replay").logit_pieces
    tops = iter(answer.tops)
    ids = answer.ids + answer.tokens[:-1]
    for piece in pieces(llm, ids, len(answer.ids) - 1):
        for row in piece.double().log_softmax(-1):
            top = next(tops)
            yield top_divergence(top, row), int(row.argmax()) == top[0][0]


def again(llm: LLM, answers: list[Answer]) -> tuple[list[list[int]], float]:
    """The tokens of answers that are generated again, together, and the seconds that it took."""
    found: list[list[int]] = [[] for _ in answers]
    requests = [GenerationRequest(a.ids, params=a.params) for a in answers]
    started = time.perf_counter()
    for delta in llm.stream(requests, raise_errors=False):
        if delta.token_id is not None:
            found[delta.index].append(delta.token_id)
    return found, time.perf_counter() - started


def replay_run(llm: LLM, run: Run) -> Json:
    """Run the answers of a run again."""
    n_vocab = llm.engine.n_vocab
    for a in run.answers:
        if max((*a.ids, *a.tokens, *(i for top in a.tops for i, _ in top))) >= n_vocab:
            raise RequestError(
                f"line {a.line}: a token is outside the model's vocabulary of {n_vocab}; replay it "
                "with a model of the same vocabulary"
            )
    free = [a for a in run.answers if not a.is_constrained]
    texts, seconds = again(llm, free)
    firsts = {
        a.line: common_prefix(a.tokens, text) for a, text in zip(free, texts) if a.tokens != text
    }
    rows = []
    for a in run.answers:
        positions = list(forced(llm, a))
        rows.append(
            {
                "line": a.line,
                "tokens": len(a.tokens),
                "is_generated": not a.is_constrained,
                "first_difference": firsts.get(a.line),
                "kl": [kl for kl, _ in positions],
                "agreement": sum(same for _, same in positions) / len(positions),
            }
        )
    return {
        "model": str(llm.checkpoint.path),
        "recorded": {n: run.about.get(n) for n in ("model", "fingerprint", "backend", "version")},
        "fingerprint": llm.fingerprint,
        "backend": llm.engine.decoder.kernels,
        "seconds": seconds,
        "recorded_seconds": sum(a.seconds for a in free),
        "answers": rows,
    }


def report(result: Fields, most_kl: float | None) -> Iterator[str]:
    """The result as text."""
    then = result["recorded"]
    yield f"recorded   {then['model']} {then['fingerprint']} {then['backend']}"
    yield f"now        {result['model']} {result['fingerprint']} {result['backend']}"
    yield "  line  tokens   first difference   mean KL   largest at    same likeliest"
    for row in result["answers"]:
        kl, first = row["kl"], row["first_difference"]
        word = "none" if first is None else f"token {first}"
        if not row["is_generated"]:
            word = "(constrained)"
        yield (
            f"{row['line']:6d}{row['tokens']:8d}   {word:<16}{mean(kl):10.2g}{max(kl):10.2g}"
            f" {kl.index(max(kl)):<8d}{row['agreement']:11.1%}"
        )
    free = [row for row in result["answers"] if row["is_generated"]]
    num_same = sum(row["first_difference"] is None for row in free)
    yield (
        f"{num_same} of {len(free)} answers equal; {result['seconds']:.2f} s together, "
        f"{result['recorded_seconds']:.2f} s each by itself when recorded"
    )
    verdict = "equal" if passes(result, None) else "different"
    if most_kl is not None:
        verdict += f"; mean KL {'within' if passes(result, most_kl) else 'above'} {most_kl:g} nats"
    yield verdict


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def passes(result: Fields, most_kl: float | None) -> bool:
    """True where all answers are equal; with `most_kl`, where the mean divergence of each is at
    most that."""
    if most_kl is not None:
        return all(mean(row["kl"]) <= most_kl for row in result["answers"])
    return all(row["first_difference"] is None for row in result["answers"])


def settings_of(args: argparse.Namespace, about: Fields) -> Settings:
    """The settings of a recorded run, where no flag says otherwise."""
    values = vars(args).copy()
    if not args.models:
        values |= {"models": [str(about["model"])], "adapter": about.get("adapter")}
    for name, value in dict(about["engine"]).items():
        if name in values and values[name] in (None, False):
            values[name] = value
    return read_settings(type(args)(**values))


def run(argv: list[str]) -> int:
    """The command. Returns 0 if nothing differs, else 1."""
    parser = command_parser("replay")
    parser.add_argument("file", metavar="FILE", help="a file that --record wrote; - reads stdin")
    add_model_options(parser)
    add = option_group(parser, "replay")
    add("--max-kl X", "pass where the mean KL of each answer is at most X nats", float)
    add("--json", "print one JSON object for each recorded run", action="store_true")
    args = parser.parse_args(argv)
    args.record = None
    has_passed = True
    for recorded in read_record(args.file):
        if recorded.answers:
            result = replay_run(settings_of(args, recorded.about).load(), recorded)
            has_passed &= passes(result, args.max_kl)
            lines: Iterable[str] = report(result, args.max_kl)
            print(json.dumps(result) if args.json else "\n".join(lines))
    return 0 if has_passed else 1
