"""`nanollama lens TEXT`: what each layer of a model would say next, where it looks, and which
experts it asks.

Adds       the logit lens, in the terminal: the likeliest token after each layer at each position
           (https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru/interpreting-gpt-the-logit-lens), with
           patterns of attention and choices of the router; with --html, a picture of all of them in
           one file, commands/lens.html with the numbers in it.
Seam       Command (the row "lens" of COMMANDS in nanollama.py). Imports models.tracing.
Remove     delete this file, lens.html and that row.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nanollama import (
    UsageError,
    add_model_options,
    command_parser,
    option_group,
    printable,
    read_input,
    read_settings,
)

if TYPE_CHECKING:
    from torch import Tensor

    from nanollama import LLM, Json

CELL = 11  # columns of a token and its probability
SHADES = " .:-=+*#%@"  # of a weight of attention, from 0 to 1
MOST_TOKENS = 256  # of a picture: its patterns are (L, H, T, T)


# ---- what is shown -------------------------------------------------------------------------------


def token_names(llm: LLM, ids: list[int]) -> list[str]:
    """Each token as text; bytes of a part of a character as in \\xf0."""
    raw = (llm.tokenizer.token_bytes(i) for i in ids)
    texts = [b.decode("utf-8", "backslashreplace") for b in raw]
    return [text or llm.tokenizer.piece(i) for text, i in zip(texts, ids)]


def lens_rows(llm: LLM, ids: list[int], num_top: int) -> list[list[list[tuple[str, float]]]]:
    """For the embedding and each layer, at each position: the likeliest next tokens with their
    probabilities, best first."""
    from nanollama_extras.models.tracing import trace, unembed

    decoder, rows = llm.engine.decoder, []
    for stream in trace(llm, ids, None, ["resid"]).values():
        first = stream if stream.dim() == 2 else stream[0]  # of several streams
        top = unembed(decoder, first).softmax(dim=-1).topk(num_top, dim=-1)
        names = [token_names(llm, row) for row in top.indices.tolist()]
        rows.append([list(zip(*pair)) for pair in zip(names, top.values.tolist())])
    return rows


def looked_into(llm: LLM, ids: list[int], num_top: int, with_patterns: bool) -> Json:
    """All that `lens` shows, as JSON: `lens` (L + 1, T, num_top), `patterns` {layer: (H, T, T)},
    `router` {layer: (T, E)}"""
    from nanollama_extras.models.tracing import names_of, trace

    names = names_of(llm.engine.decoder)
    kinds = {name.partition(".")[0] for name in names}
    wanted = [kind for kind in ("patterns", "router") if kind in kinds]
    wanted = [kind for kind in wanted if with_patterns or kind == "router"]
    found: dict[str, dict[str, Any]] = {"patterns": {}, "router": {}}
    for name, tensor in trace(llm, ids, None, wanted).items() if wanted else ():
        kind, layer = name.split(".")
        found[kind][layer] = [rounded(part) for part in tensor]
    return {
        "model": repr(llm),
        "tokens": token_names(llm, ids),
        "lens": [
            [[(token, round(p, 6)) for token, p in best] for best in row]
            for row in lens_rows(llm, ids, num_top)
        ],
        **found,
    }


def rounded(x: Tensor) -> Any:
    """A tensor as lists of numbers with three digits behind the point."""
    return [rounded(part) for part in x] if x.dim() > 1 else [round(v, 3) for v in x.tolist()]


# ---- the terminal --------------------------------------------------------------------------------


def cell(text: str, width: int = CELL - 1) -> str:
    """A token in `width` columns, its spaces and breaks visible."""
    shown = printable(text.replace("\n", "⏎").replace("\t", "⇥")).replace(" ", "·", 1)
    return f"{shown[:width]:<{width}}"


def shaded(text: str, share: float) -> str:
    """Text on a terminal, brighter the larger its share."""
    grey = 240 + round(15 * min(max(share, 0.0), 1.0))
    return f"\x1b[38;5;{grey}m{text}\x1b[0m" if sys.stdout.isatty() else text


def lens_lines(seen: Json, width: int) -> list[str]:
    """The table of the lens: a line for each layer, a column for each of the last positions."""
    num = max(1, (width - 11) // (CELL + 5))
    skipped = max(0, len(seen["tokens"]) - num)
    head = " ".join(f"{cell(token):<{CELL + 4}}" for token in seen["tokens"][skipped:])
    lines = [f"{'':<10} {head}".rstrip()]
    for i, row in enumerate(seen["lens"]):
        name = f"layer {i - 1}" if i else "embedding"
        cells = [shaded(f"{cell(t)} {p:>4.0%}", p) for (t, p), *_ in row[skipped:]]
        lines.append(f"{name:<10} {' '.join(cells)}".rstrip())
    if skipped:
        lines.append(f"(the last {num} of {len(seen['tokens'])} positions; --html has all)")
    return lines


def next_lines(seen: Json) -> list[str]:
    """The likeliest tokens after the last one."""
    best = ", ".join(f"{token!r} {p:.1%}" for token, p in seen["lens"][-1][-1])
    return ["", f"next: {best}"]


def attention_lines(seen: Json, wanted: str) -> list[str]:
    """A pattern of attention as a square of shades. Raises UsageError."""
    layer, _, head = wanted.partition(".")
    heads = seen["patterns"].get(layer)
    if heads is None or (head and int(head) >= len(heads)):
        known = ", ".join(seen["patterns"])
        count = len(next(iter(seen["patterns"].values()), ()))
        problem = f"--attention {wanted}: layers with attention are {known or 'absent'}"
        raise UsageError(f"{problem}; each has {count} heads, from 0 on")
    chosen = heads if not head else [heads[int(head)]]
    title = f"attention of layer {layer}, " + (f"head {head}" if head else "mean of all heads")
    lines = ["", f"{title}: each line shows where its token looks"]
    for i, token in enumerate(seen["tokens"]):
        weights = [sum(head[i][j] for head in chosen) / len(chosen) for j in range(i + 1)]
        marks = "".join(SHADES[min(int(w * len(SHADES)), len(SHADES) - 1)] for w in weights)
        lines.append(f"{cell(token)} |{marks:<{len(seen['tokens'])}}|")
    return lines


def router_lines(seen: Json) -> list[str]:
    """The experts that each layer asks for the last token, with their weights."""
    lines = ["", f"experts for {seen['tokens'][-1]!r}"] if seen["router"] else []
    for layer, rows in seen["router"].items():
        chosen = sorted(((w, e) for e, w in enumerate(rows[-1]) if w), reverse=True)
        lines.append(f"layer {layer:<4} " + "  ".join(f"{e} ({w:.0%})" for w, e in chosen))
    return lines


# ---- the picture, and the command ----------------------------------------------------------------


def picture(seen: Json) -> str:
    """A page that shows everything, and loads nothing from elsewhere."""
    page = Path(__file__).with_name("lens.html").read_text(encoding="utf-8")
    data = json.dumps(seen, ensure_ascii=False).replace("<", "\\u003c")
    title = html.escape("".join(seen["tokens"])[:60])
    return page.replace("{{title}}", title).replace("{{data}}", data)


def lens_parser() -> argparse.ArgumentParser:
    usage = "nanollama.py lens TEXT [--model MODEL] [--attention LAYER.HEAD] [--html FILE]"
    parser = command_parser("lens", usage=usage)
    parser.add_argument("text", metavar="TEXT", help="the text to read; - is stdin")
    add_model_options(parser)
    add = option_group(parser, "lens")
    add("--top N", "likeliest tokens to list (default: 5)", int, default=5)
    add("--attention LAYER.HEAD", "show where tokens look; without .HEAD, the mean of all heads")
    add("--html FILE", "write a picture of all layers, heads and experts")
    add("--json", "print one JSON object instead of tables", action="store_true")
    return parser


def run(argv: list[str]) -> int:
    """The command. Returns the exit code. Raises UsageError."""
    parser = lens_parser()
    args = parser.parse_args(argv)
    if not 1 <= args.top <= 100:
        parser.error(f"--top is {args.top}; it must be between 1 and 100")
    if args.attention and not re.fullmatch(r"\d{1,4}(\.\d{1,4})?", args.attention):
        parser.error(f"--attention is {args.attention}; give a layer and a head, as in 3.0")
    text = read_input("-").decode("utf-8", "replace") if args.text == "-" else args.text
    llm = read_settings(args).load()
    ids = llm.encode(text)
    if args.html and len(ids) > MOST_TOKENS:
        raise UsageError(f"the text has {len(ids)} tokens; a picture holds {MOST_TOKENS}")
    seen = looked_into(llm, ids, args.top, bool(args.html or args.attention or args.json))
    if args.html:
        try:  # a name of a file need not be UTF-8
            Path(args.html).write_text(picture(seen), encoding="utf-8", errors="replace")
        except OSError as error:
            raise UsageError(f"{args.html}: cannot be written: {error.strerror}") from None
    if args.json:
        print(json.dumps(seen, ensure_ascii=False))
        return 0
    lines = lens_lines(seen, shutil.get_terminal_size().columns) + next_lines(seen)
    if args.attention:
        lines += attention_lines(seen, args.attention)
    print("\n".join(lines + router_lines(seen)))
    return 0
