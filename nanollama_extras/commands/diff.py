"""`nanollama diff A B`: how much the predictions of one model differ from those of another.

Seam       Command (the row "diff" of COMMANDS in nanollama.py).
Imports    answers.scores, for logits and divergences; commands.eval, for windows over a text.
Remove     delete this file and that row.

A is the reference, with nanollama's defaults. The engine's options, as --quantize, are for B. With
--text, both read the same tokens. With --prompts, A answers each prompt, and B is given A's answer
behind the prompt that its own template makes.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import TYPE_CHECKING

from nanollama import (
    GenerationRequest,
    LazyModule,
    Modelfile,
    RequestError,
    SamplingParams,
    Settings,
    add_model_options,
    command_parser,
    common_prefix,
    extra,
    option_group,
    read_input,
    read_rows,
    read_settings,
    use_model,
)

if TYPE_CHECKING:
    import argparse

    import torch

    from nanollama import LLM, Fields, Json
else:  # --help and usage errors do without it
    torch = LazyModule("torch")

WINDOW = 512  # tokens of a text that are read at once, with both sets of logits in memory
NUM_WORST = 5  # positions to show
SHARED = "device ctx threads".split()  # options of both models; other options are B's


def compare_tokens(a: LLM, b: LLM, ids_a: list[int], ids_b: list[int], num: int) -> Json:
    """The measures of the last `num` tokens, which both texts share."""
    scores = extra("answers.scores", "diff")
    wholes = [
        torch.cat(list(scores.logit_pieces(llm, ids[:-1], len(ids) - 1 - num)))
        for llm, ids in ((a, ids_a), (b, ids_b))
    ]
    found: Json = scores.compare(*wholes, ids_a[-num:])
    return found


def check_vocabularies(a: LLM, b: LLM, texts: list[str]) -> None:
    """Raises RequestError for models whose token ids do not mean the same."""
    sizes = [llm.engine.n_vocab for llm in (a, b)]
    encoded = [[llm.encode(text, add_special_tokens=False) for text in texts] for llm in (a, b)]
    if sizes[0] != sizes[1] or encoded[0] != encoded[1]:
        raise RequestError(
            f"the models have different vocabularies ({sizes[0]} and {sizes[1]} tokens), so their "
            "predictions cannot be compared; take models with the same tokenizer"
        )


def diff_text(a: LLM, b: LLM, text: str, window: int) -> Json:
    """Both models on one text."""
    text_windows = extra("commands.eval", "diff").text_windows
    prefix, ids = a.encode(""), a.encode(text, add_special_tokens=False)
    if len(prefix) + len(ids) < 2:
        raise RequestError("the text is too short to compare; give two tokens or more")
    windows = list(text_windows(prefix, ids, window, window // 2))
    parts, places = [], []
    for piece, start in windows:
        parts.append(compare_tokens(a, b, piece, piece, len(piece) - start))
        places += [(kl, piece[: at + 1]) for at, kl in enumerate(parts[-1]["kl"], start)]
        places = sorted(places, key=lambda place: -place[0])[:NUM_WORST]
    worst = [
        {"kl": kl, "after": a.decode(ids[-13:-1]), "token": a.decode(ids[-1:])}
        for kl, ids in places
    ]
    return {**extra("answers.scores", "diff").summary(*parts), "worst": worst}


def diff_prompts(a: LLM, b: LLM, prompts: list[str], max_tokens: int) -> Json:
    """Both models on prompts, which A answers greedily, and B too."""
    params = SamplingParams(temperature=0, repeat_penalty=1, max_tokens=max_tokens)
    chats = [[{"role": "user", "content": text}] for text in prompts]
    requests = [GenerationRequest(messages=chat, params=params) for chat in chats]
    answers = []
    for llm in (a, b):
        tokens: list[list[int]] = [[] for _ in requests]
        for delta in llm.stream(requests):
            if delta.token_id is not None:
                tokens[delta.index].append(delta.token_id)
        answers.append(tokens)
    summary, parts, rows = extra("answers.scores", "diff").summary, [], []
    for request, prompt, ours, theirs in zip(requests, prompts, *answers):
        ids_a, ids_b = (llm.prompt_ids(request) + ours for llm in (a, b))
        parts.append(compare_tokens(a, b, ids_a, ids_b, len(ours)))
        first = None if ours == theirs else common_prefix(ours, theirs)
        rows.append({"prompt": prompt, "first_difference": first, **summary(parts[-1])})
    return {**summary(*parts), "prompts": rows}


def report(result: Fields) -> Iterator[str]:
    """The result as text."""
    yield f"A  {result['a']}  {result['fingerprint_a']}  {result['kernels_a']}"
    yield f"B  {result['b']}  {result['fingerprint_b']}  {result['kernels_b']}"
    for row in result.get("prompts", ()):
        first = row["first_difference"]
        word = "equal" if first is None else f"differs at token {first}"
        yield f"  {word:<22} mean KL {row['kl_mean']:<9.3g} {row['prompt'][:50]!r}"
    yield f"{result['tokens']} tokens"
    yield f"  perplexity     A {result['perplexity_a']:.3f}, B {result['perplexity_b']:.3f}"
    yield (
        f"  KL divergence  mean {result['kl_mean']:.3g}, median {result['kl_median']:.3g}, "
        f"99 % {result['kl_99']:.3g}, largest {result['kl_max']:.3g} nats"
    )
    yield f"  same likeliest {result['agreement']:.2%}"
    for row in result.get("worst", ()):
        yield f"  {row['kl']:8.3g} at {row['token']!r} after {row['after']!r}"


def settings_of_a(settings: Settings, name: str) -> Settings:
    """The settings of the reference: the defaults, with the options that both models share."""
    args: argparse.Namespace = copy.copy(settings.args)
    parser = command_parser("diff")
    add_model_options(parser)
    for option, value in vars(parser.parse_args([])).items():
        if option not in SHARED:
            setattr(args, option, value)
    return use_model(Settings(args, Modelfile(), {}), name)


def run(argv: list[str]) -> int:
    """The command. Returns 1 if the mean divergence is above --max-kl, else 0."""
    parser = command_parser("diff")
    parser.add_argument("a", metavar="A", help="the reference: a model with the default settings")
    parser.add_argument("b", metavar="B", help="the model to compare, with the options below")
    add_model_options(parser)
    add = option_group(parser, "diff")
    add("--text FILE", "compare the predictions of each token of this text")
    add("--prompts FILE", "compare answers: one prompt a line")
    add("--max-tokens N", "tokens of an answer (default: 64)", int, default=64)
    add("--max-kl X", "fail (exit code 1) where the mean divergence is above X nats", float)
    add("--json", "print one JSON object", action="store_true")
    args = parser.parse_args(argv)
    if bool(args.text) == bool(args.prompts):
        parser.error("give --text FILE or --prompts FILE")
    settings = read_settings(args)
    a = settings_of_a(settings, args.a).load()
    b = use_model(settings, args.b).load()
    if args.text:
        text = read_input(args.text).decode("utf-8", "replace")
        check_vocabularies(a, b, [text])
        window = min(WINDOW, a.engine.n_ctx - 1, b.engine.n_ctx - 1)
        result = diff_text(a, b, text, window)
    else:
        prompts = [row.prompt for row in read_rows(args.prompts) if row.prompt is not None]
        check_vocabularies(a, b, prompts)
        result = diff_prompts(a, b, prompts, args.max_tokens)
    result = {"a": args.a, "b": args.b, **result}
    for key, llm in (("a", a), ("b", b)):
        names = {"fingerprint": llm.fingerprint, "kernels": llm.engine.decoder.kernels}
        result |= {f"{name}_{key}": value for name, value in names.items()}
    print(json.dumps(result, ensure_ascii=False) if args.json else "\n".join(report(result)))
    return 1 if args.max_kl is not None and not result["kl_mean"] <= args.max_kl else 0
