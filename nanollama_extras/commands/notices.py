"""Notices on standard error: that an answer was cut, and that an option has nothing to do.

Seam       `nanollama.print_answer` and `run_batch` call `note_cut`, `nanollama.Settings.load` calls
           `note_load`.
Imports    kernels.floats, for the gain of --quantize.
Remove     delete this file; an answer that was cut then looks like a whole one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanollama import extra, log

if TYPE_CHECKING:
    from nanollama import LLM, AnswerPrinter, Settings


def is_cut(printer: AnswerPrinter) -> bool:
    return printer.last is not None and printer.last.finish_reason == "length"


def cut_place(printer: AnswerPrinter, most: int | None) -> str:
    """Where an answer was cut: at so many tokens, in a thought, by the end of the context."""
    assert printer.last
    usage = printer.last.usage
    num = usage.completion_tokens if usage else 0
    text = f"cut at {num} token{'s' * (num != 1)}"
    if printer.text["thought"] and not printer.text["content"].strip():
        text += ", inside a thought"
    return text if num == most else f"{text}, where the context ends"


def note_cut(printers: list[AnswerPrinter], most: int | None, talks: bool = False) -> None:
    """Say which answers were cut, at `most` tokens or by the context, and what continues them.
    talks: in a conversation, whose last answer /continue takes up."""
    cut = [printer for printer in printers if is_cut(printer)]
    if not cut:
        return
    text = cut_place(cut[0], most)
    if len(printers) > 1:
        text = f"{len(cut)} of {len(printers)} answers are cut"
    ways = ["--max-tokens N"] * any(is_at_limit(p, most) for p in cut) + ["/continue"] * talks
    log.warning(f"[{text}{'; ' if ways else ''}{' or '.join(ways)}]")


def is_at_limit(printer: AnswerPrinter, most: int | None) -> bool:
    usage = printer.last.usage if printer.last else None
    return bool(usage and usage.completion_tokens == most)


def note_load(settings: Settings, llm: LLM) -> None:
    """Say that --quantize does nothing to weights that are packed, what it would gain for floats,
    and that a prompt that is continued has no system prompt; with --verbose, what was chosen."""
    args, checkpoint, decoder = settings.args, llm.checkpoint, llm.engine.decoder
    log.debug(f"kernels: {decoder.kernels}; keys and values: {decoder.kv_dtype}")
    log.debug(f"template: {llm.template.origin}; slots: {llm.engine.num_slots}")
    if floats := getattr(decoder.backend, "floats", None):
        extra("kernels.floats", "--dtype").advise(floats)
    quantize, kind = getattr(args, "quantize", None), checkpoint.quantization
    continues = getattr(args, "prompt", None) is not None and not (args.chat or args.embed)
    if continues and settings.value("system")[0]:
        log.warning("the system prompt is used with --chat only")
    if quantize and any(t.is_packed and t.kind == kind for t in checkpoint.tensors.values()):
        log.warning(f"--quantize {quantize} does nothing: the weights are packed already ({kind})")
