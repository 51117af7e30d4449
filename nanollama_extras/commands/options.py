"""Options of answers beyond those of the core, and the modes --embed, --image and --output.

Seam       `nanollama.build_parser` calls `add_options`, which adds `enter` to the parser's default
           of that name; `nanollama.run_mode` calls it, and `check`, before a mode runs.
           The options are read by `nanollama.print_speed`, commands.logs, commands.embed,
           commands.images, commands.json_lines, commands.conversation, commands.xray and
           answers.toolbox.
Remove     delete this file; the flags then name it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from nanollama import UsageError, extra, option_group, read_rows, run_batch

if TYPE_CHECKING:
    import argparse

    from nanollama import Settings


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    add = option_group(parser, "chat and output")
    add("--tools FILE", "Python file with functions that the model may call")
    add("--yes-tools", "run calls without asking", action="store_true")
    text = "with --tools: auto, none, required, or the name of a function (default: auto)"
    add("--tool-choice CHOICE", text)
    add("--embed", "print the embedding of the prompt as JSON", action="store_true")
    add("--output FILE", "with --batch-file: write JSON lines; - is stdout")
    add("--quiet", "no line with the speeds", action="store_true")
    add("--log FILE", "keep conversations in this SQLite file (or NANOLLAMA_LOG)")
    text = "go on with the last conversation in the file of --log"
    add("--continue -c", text, action="store_true", dest="goes_on")
    text = "shade each token by its probability, and mark surprising ones"
    add("--explain", text, action="store_true")
    text = "image for the prompt, or for the first message; repeatable"
    add("--image FILE", text, action="append", dest="images", default=[])
    add("--help-all", "list every option", action="help")
    parser.set_defaults(enter=[*(parser.get_default("enter") or ()), enter])


def enter(settings: Settings, _: list[str]) -> int | None:
    """Run --embed, --image or --output -> the exit code; None without them. Raises as these."""
    args = settings.args
    if args.explain:
        extra("commands.xray", "--explain").start(settings)
    if args.embed:
        return int(extra("commands.embed", "--embed").run(settings))
    if args.images and args.prompt is not None:
        return int(extra("commands.images", "--image").run_prompt(settings))
    if args.batch_file is None:
        return None
    if args.batch_file.endswith((".jsonl", ".ndjson")):
        lines = extra("commands.batch_lines", "a batch file of JSON lines")
        settings, rows = lines.opened(settings)
    elif args.output:
        rows = read_rows(args.batch_file)
    else:
        return None
    run = extra("commands.json_lines", "--output").run_batch if args.output else run_batch
    return int(run(settings, rows))


def check(args: argparse.Namespace) -> None:
    """Raises UsageError for an option without the one that it needs. An image makes a chat."""
    args.chat = args.chat or bool(args.images and args.prompt is not None)
    talks = args.interactive or (args.chat and args.prompt is not None)
    has_tools = args.tools or args.mcp
    for is_wrong, message in (
        (args.tools and not talks, "--tools needs --interactive, or --prompt and --chat"),
        (args.mcp and not (talks or args.serve), "--mcp needs --interactive, --chat or --serve"),
        (args.output and args.batch_file is None, "--output needs --batch-file"),
        (args.images and not talks, "--image needs --prompt or --interactive"),
        (args.script and (args.models or not args.serve), "--script needs --serve without --model"),
        (args.tool_choice and not has_tools, "--tool-choice needs --tools or --mcp"),
        (
            args.explain and not (args.interactive or (args.prompt is not None and not args.embed)),
            "--explain needs --prompt or --interactive",
        ),
        (args.goes_on and not talks, "--continue needs --interactive, or --prompt and --chat"),
    ):
        if is_wrong:
            raise UsageError(message)
    if args.log or args.goes_on:
        extra("commands.logs", "--log")
