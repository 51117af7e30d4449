"""How far a converted model departs from the original: perplexity and KL divergence.

Adds       `windows`, which cuts a text into token ids, and `compare`, which runs two models over
           them, one after the other.
Seam       commands/convert.py calls it.
Imports    answers.scores, for the measures of two models' logits.
Remove     delete this file with commands/convert.py.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nanollama import LLM, RequestError, Tokenizer, extra

if TYPE_CHECKING:
    from nanollama import Json

WINDOW = 512  # tokens that are read together
MEASURED = 4  # windows at most
TEXT = (  # for a measurement without --text
    "The river begins as a spring under the roots of an old beech, too small to have a name. By "
    "the time it reaches the first village it is wide enough for a bridge of one stone arch, and "
    "the people there call it simply the water. In spring, when the snow melts on the hills, it "
    "carries branches and sometimes whole trees, and the miller opens both gates and waits.\n\n"
    "Measuring a river is harder than it looks. Its speed is greatest near the middle and just "
    "below the surface, and falls towards the bed, where stones and plants slow it down. An "
    "engineer divides the width into strips, measures depth and speed in each, and adds up the "
    "products: 0.8 m x 2.5 m x 0.6 m/s is 1.2 cubic metres in a second for one strip. The sum is "
    "the discharge. Repeated over many years, such numbers tell how often a flood will come.\n\n"
    '"How do you know it was higher in 1784?" asked the girl. The man pointed at a line cut into '
    'the wall, far above her head. "Somebody wrote it down," he said, "with a chisel, so that '
    'nobody would have to believe him." She put her hand on the stone and thought about it.\n\n'
    "def discharge(strips):\n"
    '    """The sum of width, depth and speed of each strip, in cubic metres a second."""\n'
    "    return sum(width * depth * speed for width, depth, speed in strips)\n\n"
    "Today a sensor on the bridge sends the level every ten minutes. It has no chisel, and its "
    "memory is a file on a computer in the city, which is copied every night. Whether anybody "
    "will read it in two hundred years depends on formats, on electricity, and on people who "
    "care; the line in the wall depends on the wall alone.\n"
)


def windows(tokenizer: Tokenizer, text: str, most: int, n_ctx: int = WINDOW) -> list[list[int]]:
    """At most `most` pieces of a text as token ids, each with the tokens that begin any text.
    Raises RequestError for a text without two tokens."""
    prefix, ids = tokenizer.encode(""), tokenizer.encode(text, add_special_tokens=False)
    size = min(WINDOW, n_ctx) - len(prefix)
    found = [prefix + ids[at : at + size] for at in range(0, len(ids), size)]
    found = [window for window in found if len(window) > 1][:most]
    if not found:
        raise RequestError("the text is too short; two tokens are needed")
    return found


def compare(path: Path, adapter: str | None, out: Path, text: str | None) -> Json:
    """Perplexity of a model and of the file made from it, the mean KL divergence of next tokens
    from the original's, in nats, and the share of equal likeliest tokens; over a text, or TEXT.
    Each model is in memory alone; logits wait in a file."""
    scores, parts = extra("answers.scores", "--measure"), []
    options: Any = {"ctx": WINDOW + 1, "parallel": 1, "force": True}
    with tempfile.TemporaryFile() as file:
        llm = LLM(path, adapter=adapter, **options)
        pieces = windows(llm.tokenizer, TEXT if text is None else text, MEASURED, llm.engine.n_ctx)
        for ids in scores.counted(pieces, len(pieces), desc="original"):
            np.save(file, llm.logits(ids).cpu().numpy())
        del llm
        file.seek(0)
        llm = LLM(out, **options)
        for ids in scores.counted(pieces, len(pieces), desc="converted"):
            original = torch.from_numpy(np.load(file))
            parts.append(scores.compare(original[:-1], llm.logits(ids).cpu()[:-1], ids[1:]))
    found = scores.summary(*parts)
    return {
        "tokens": found["tokens"],
        "perplexity": found["perplexity_a"],
        "converted_perplexity": found["perplexity_b"],
        "divergence": found["kl_mean"],
        "same_top": found["agreement"],
    }
