"""The help of the command line: one screen for `nanollama --help`, groups of options for a verb.

Seam       `nanollama.CommandLine` asks `format_help` and `explained` for its texts; where this
           file is missing, argparse's own lists everything. `--help-all` does so here, too.
Remove     delete this file. Uses files.nanochat_store, where it is installed.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator
from typing import Any

from nanollama import COMMANDS, PROGRAM, local_path, preferred

# Verb -> placeholders of its arguments, and what it does
VERBS = {
    "run": ("MODEL [PROMPT ..]", "ask a model, or talk with it"),
    "chat": ("MODEL", "talk with a model in the terminal"),
    "serve": ("[MODEL ..]", "serve models over HTTP, with a web page"),
    "batch": ("MODEL FILE", "answer each line of a file"),
    "embed": ("MODEL [TEXT ..]", "print the embedding of a text"),
    "pull": ("MODEL", "download a model, or bring it up to date"),
    "list": ("", "list the models on this machine (or: ls)"),
    "ls": ("", "list the models on this machine"),
    "show": ("MODEL", "describe a model, and every setting with its origin"),
    "rm": ("MODEL", "delete a model from this machine"),
    "cp": ("MODEL NAME", "give a model a second name"),
    "create": ("NAME [-f FILE]", "make a model from a Modelfile"),
    "ps": ("", "list the models that a server has loaded"),
    "stop": ("MODEL", "unload a model of a server"),
    "bench": ("[MODEL]", "measure how fast a model runs here"),
    "eval": ("[MODEL] [--text FILE] [--task FILE]", "measure how well a model predicts"),
    "verify": ("MODEL", "compare a model with transformers"),
    "diff": ("A B", "compare the predictions of two models"),
    "replay": ("FILE", "run recorded answers again, and compare"),
    "launch": ("CLIENT", "run a coding agent on a local model"),
    "lens": ("TEXT [--model MODEL]", "show what each layer would say next"),
    "explain": ("MODEL", "show what a model consists of, costs and reaches"),
    "convert": ("MODEL OUT", "convert a model to GGUF, or pack it"),
    "logs": ("[ID]", "print conversations that --log keeps"),
    "completion": ("SHELL", "print completions for bash, zsh or fish"),
}
MAIN_VERBS = "run chat serve batch embed pull list show rm cp create ps stop".split()
POPULAR = (
    "--model --chat --system --temp --top-k --top-p --repeat-penalty --max-tokens --seed --stop "
    "--schema --ctx --quantize --device --port"
).split()
MODES = ("--prompt", "--interactive", "--batch-file", "--serve")
NANOCHAT = ("source", "model_tag", "step")  # options of nanochat's models alone
ROW = 50  # letters of a row's text
NANOCHAT_SHORT = "-d"  # as nanochat's own programs spell --dtype
EXAMPLES = f"""\
Run language models on this machine.

  {PROGRAM} run smollm2 "Why is the sky blue?"
  git diff | {PROGRAM} run smollm2 "Summarize this."
  {PROGRAM} serve smollm2
"""


class Screen(argparse.HelpFormatter):
    """Short flags first, and one placeholder for all spellings of an option."""

    def __init__(self, prog: str) -> None:
        width = min(shutil.get_terminal_size().columns - 1, 100)
        super().__init__(prog, max_help_position=30, width=width)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "".join(indent + line for line in text.splitlines(keepends=True))

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        hidden = NANOCHAT_SHORT if action.dest == "dtype" and not shows_nanochat() else ""
        flags = [flag for flag in action.option_strings if flag != hidden]
        text = ", ".join(sorted(flags, key=len))
        if action.nargs != 0:
            text += f" {self._format_args(action, self._get_default_metavar_for_optional(action))}"
        return text


def shows_nanochat() -> bool:
    """Whether a word of the command line is a model of nanochat, or --help-all."""
    folders = preferred("files.nanochat_store", "FOLDERS", dict[str, str]())
    return any(is_nanochat(word, folders) for word in sys.argv[1:])


def is_nanochat(word: str, folders: Any) -> bool:
    if word in ("nanochat", "--help-all") or word.endswith(".pt"):
        return True
    path = None if word.startswith("-") else local_path(word)
    return path is not None and any((path / name).is_dir() for name in folders)


def explained(parser: argparse.ArgumentParser, message: str) -> str:
    """A message of argparse; for an unknown flag, with the known ones that look like it."""
    if not (unknown := re.match(r"unrecognized arguments: (--[^\s=]+)", message)):
        return message
    close = difflib.get_close_matches(unknown[1], parser._option_string_actions, n=3, cutoff=0.75)
    return f"{message}; did you mean {' or '.join(close)}?" if close else message


def format_help(parser: argparse.ArgumentParser) -> str:
    """The text of --help of a verb, or of the modes."""
    if parser.prog == PROGRAM and "--help-all" not in sys.argv:
        return EXAMPLES + "".join(main_screen(parser))
    return full_help(parser)


def full_help(parser: argparse.ArgumentParser) -> str:
    """Every option, by groups."""
    screen = Screen(parser.prog)
    words, text = VERBS.get(parser.prog.split()[-1], ("", parser.description or ""))
    screen.add_usage(f"{parser.prog} {words} [options]".replace("  ", " "), [], [])
    screen.add_text(text[:1].upper() + text[1:])
    for group in parser._action_groups:
        shown = [a for a in group._group_actions if a.dest not in NANOCHAT or shows_nanochat()]
        screen.start_section(group.title)
        screen.add_arguments(shown)
        screen.end_section()
    screen.add_text(parser.epilog)
    return screen.format_help()


def main_screen(parser: argparse.ArgumentParser) -> Iterator[str]:
    """The verbs, the modes, and the flags that people use most: a row for each."""
    yield f"\nverbs ({PROGRAM} VERB --help explains one):\n"
    for name in MAIN_VERBS:
        words, text = VERBS[name]
        yield f"  {f'{name} {words}':<24}  {text}\n"
    others = ", ".join(name for name in COMMANDS if name not in (*MAIN_VERBS, "ls"))
    yield textwrap.fill(others, 80, initial_indent="  and ", subsequent_indent=6 * " ") + "\n"
    by_flag = parser._option_string_actions
    for title, flags in (("modes without a verb", MODES), ("options", POPULAR)):
        yield f"\n{title}:\n"
        for flag in flags:
            yield option_row(by_flag[flag], flag)
    yield f"\n{PROGRAM} --help-all lists every option.\n"


def option_row(action: argparse.Action, flag: str) -> str:
    """A row for an option under one name, and its short one; a default that is long is left out."""
    short = [f for f in action.option_strings if len(f) == 2 and f != NANOCHAT_SHORT]
    value = "" if action.nargs == 0 else action.metavar or "/".join(action.choices or ())
    text = action.help or ""
    if len(text) > ROW:
        text = re.split(r" \(default|; ", text)[0]
    return f"  {', '.join([*short, flag])} {value}".ljust(28) + f"{text}\n"
