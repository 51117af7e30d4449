"""`nanollama eval`: how well a model predicts a text, and how often it chooses the right answer.

Seam: Command (the row "eval" of COMMANDS in nanollama.py). To remove it, delete this
module and that row. answers.scores has the bar of a long measurement.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nanollama import (
    RequestError,
    add_model_options,
    command_parser,
    excerpt,
    extra,
    option_group,
    read_input,
    read_settings,
)

if TYPE_CHECKING:
    from nanollama import LLM, Fields, Json


EVAL_WINDOW = 2048  # tokens at most, unless --window says more


@dataclass(frozen=True, slots=True)
class Question:
    """One line of a task: a prompt, possible continuations, and the index of the right one."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


def read_task(name: str) -> list[Question]:
    """The questions of a file of JSON lines: {"prompt": .., "choices": [..], "answer": 0}; `prompt`
    may be called `context`. Raises RequestError, naming the line."""
    questions = []
    for number, line in enumerate(read_input(name).splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt = row["prompt"] if "prompt" in row else row["context"]
            choices, answer = tuple(row["choices"]), row["answer"]
            is_text = all(isinstance(text, str) and text for text in choices)
            if not (isinstance(prompt, str) and is_text and answer in range(len(choices))):
                raise ValueError
        except (ValueError, KeyError, TypeError, RecursionError):
            raise RequestError(
                f"{name}, line {number}: {excerpt(line.decode('utf-8', 'replace'))} is not "
                '{"prompt": TEXT, "choices": [TEXT, ..], "answer": INDEX}'
            ) from None
        questions.append(Question(prompt, choices, answer))
    if not questions:
        raise RequestError(f"{name}: holds no questions; write one as JSON on each line")
    return questions


def choice_ids(llm: LLM, prompt: str, choice: str) -> tuple[list[int], int]:
    """The ids of a prompt with a choice, and the index of the choice's first token. Spaces at the
    end of the prompt belong to the choice, since tokens begin with spaces. A long prompt loses its
    beginning. Raises RequestError if no token of it remains."""
    ids = llm.encode(prompt + choice)
    start = min(len(llm.encode(prompt.rstrip())), len(ids) - 1)
    cut = max(0, len(ids) - llm.engine.n_ctx + 1)
    if start <= cut:
        raise RequestError(
            f"{excerpt(prompt + choice)}: no token of the prompt precedes the choice in a context "
            f"of {llm.engine.n_ctx} tokens"
        )
    return ids[cut:], start - cut


def text_windows(
    prefix: list[int], ids: list[int], window: int, stride: int
) -> Iterator[tuple[list[int], int]]:
    """Windows over a text: `prefix` and text, at most `window` tokens, each with the index of the
    first token to score. The first window scores all tokens that it can, each later one the next
    `stride` tokens."""
    size = window - len(prefix)
    yield prefix + ids[:size], max(1, len(prefix))
    for end in range(min(size, len(ids)), len(ids), stride):
        begin = max(0, min(end + stride, len(ids)) - size)
        yield prefix + ids[begin : end + stride], len(prefix) + end - begin


def interval(num_right: float, num: int) -> tuple[float, float]:
    """95 % confidence interval of a proportion (Wilson, https://doi.org/10.2307/2276774)."""
    z, p = 1.959964, num_right / num
    middle = (p + z * z / (2 * num)) / (1 + z * z / num)
    width = z / (1 + z * z / num) * math.sqrt(p * (1 - p) / num + z * z / (4 * num * num))
    return middle - width, middle + width


def eval_text(llm: LLM, name: str, window: int, stride: int) -> Json:
    """Perplexity per token and bits per byte of a text. The first token and its bytes count only if
    the tokenizer puts a token before it."""
    try:
        text = read_input(name).decode("utf-8")
    except UnicodeDecodeError:
        raise RequestError(f"{name}: not UTF-8 text") from None
    prefix, ids = llm.encode(""), llm.encode(text, add_special_tokens=False)
    num_bytes = len(text.encode())
    if not prefix and ids:
        num_bytes -= len(llm.tokenizer.token_bytes(ids[0]))
    if num_bytes < 1 or len(prefix) + len(ids) < 2:
        raise RequestError(f"{name}: too short to score")
    windows = list(text_windows(prefix, ids, window, stride))
    num_tokens, bits = 0, 0.0
    counted = extra("answers.scores", "eval").counted
    for _, logprobs in counted(llm.score(windows), len(windows), leave=False):
        num_tokens, bits = num_tokens + len(logprobs), bits - sum(logprobs) / math.log(2)
    return {
        "file": name,
        "bytes": num_bytes,
        "tokens": num_tokens,
        "window": window,
        "stride": stride,
        "perplexity": 2 ** min(bits / num_tokens, 1000),
        "bits_per_byte": bits / num_bytes,
    }


def eval_task(llm: LLM, name: str) -> Json:
    """The share of questions whose right choice is the likeliest, by log-probability and by that a
    character (acc and acc_norm of https://github.com/EleutherAI/lm-evaluation-harness)."""
    questions = read_task(name)
    texts = [choice_ids(llm, q.prompt, choice) for q in questions for choice in q.choices]
    sums = [0.0] * len(texts)
    counted = extra("answers.scores", "eval").counted
    for index, logprobs in counted(llm.score(texts), len(texts), leave=False):
        sums[index] = sum(logprobs)
    result: Json = {"file": name, "questions": len(questions)}
    left = iter(sums)
    scored = [(q, list(itertools.islice(left, len(q.choices)))) for q in questions]
    for key, measure in (("accuracy", lambda text: 1), ("accuracy_norm", len)):
        num_right = 0
        for q, values in scored:
            per = [value / measure(text) for value, text in zip(values, q.choices)]
            num_right += per.index(max(per)) == q.answer
        low_high = interval(num_right, len(questions))
        result |= {key: num_right / len(questions), f"{key}_interval": low_high}
    return result


def eval_lines(results: Fields) -> Iterator[str]:
    """The results as text."""
    if text := results.get("text"):
        yield f"{text['file']}: {text['bytes']} bytes in {text['tokens']} tokens"
        yield f"  perplexity     {text['perplexity']:.3f}"
        yield f"  bits per byte  {text['bits_per_byte']:.4f}"
    if task := results.get("task"):
        yield f"{task['file']}: {task['questions']} questions"
        for key, name in (("accuracy", "accuracy"), ("accuracy_norm", "normalised")):
            low, high = task[f"{key}_interval"]
            yield f"  {name:<13}  {task[key]:.1%} (95 %: {low:.1%} to {high:.1%})"


def eval_parser() -> argparse.ArgumentParser:
    parser = command_parser("eval")
    parser.add_argument("ref", nargs="?", metavar="MODEL")
    add_model_options(parser)
    add = option_group(parser, "eval")
    add("--text FILE", "measure perplexity and bits per byte of this text")
    add("--task FILE", 'answer questions: JSON lines {"prompt": .., "choices": [..], "answer": 0}')
    text = f"tokens read at once (default: the context, at most {EVAL_WINDOW})"
    add("--window N", text, int)
    add("--stride N", "tokens that each later window scores (default: half a window)", int)
    add("--json", "print one JSON object", action="store_true")
    return parser


def run(argv: list[str]) -> int:
    """The command. Returns the exit code."""
    parser = eval_parser()
    args = parser.parse_args(argv)
    if not args.text and not args.task:
        parser.error("give --text FILE, --task FILE, or both")
    settings = read_settings(args)
    llm = settings.load()
    longest = llm.engine.n_ctx - 1
    window = min(longest, EVAL_WINDOW) if args.window is None else args.window
    stride = max(1, window // 2) if args.stride is None else args.stride
    if not 2 <= window <= longest or not 1 <= stride < window:
        parser.error(
            f"--window {window} --stride {stride}: a window must have 2 to {longest} tokens, and a "
            "stride fewer"
        )
    results: Json = {"model": settings.model}
    if args.text:
        results["text"] = eval_text(llm, args.text, window, stride)
    if args.task:
        results["task"] = eval_task(llm, args.task)
    if args.json:
        print(json.dumps(results, ensure_ascii=False, indent=1))
    else:
        print("\n".join(eval_lines(results)))
    return 0
