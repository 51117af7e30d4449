"""`nanollama run`, `chat`, `serve`, `batch` and `embed`: the modes as verbs.

Seam       Command (rows of COMMANDS in nanollama.py). Each verb reads its own words and flags,
           fills in those of the modes, and calls `nanollama.run_mode`.
Remove     delete this file and those rows; the flags of the modes do the same.
"""

from __future__ import annotations

import argparse
import copy
import sys
from typing import TYPE_CHECKING, Any

from nanollama import UsageError, build_parser, command_parser, read_text, run_mode

if TYPE_CHECKING:
    from collections.abc import Callable

    Mode = Callable[[argparse.Namespace], dict[str, Any]]


ANSWERS = "chat and output, model, nanochat, sampling, cluster"


def verb_parser(name: str, groups: str, *left_out: str) -> argparse.ArgumentParser:
    """A parser with the options of these groups of the modes' parser, except those `left_out`.
    Values of all other options are their defaults."""
    parser, modes = command_parser(name), build_parser()
    for group in modes._action_groups:
        if group.title in groups.split(", "):
            shown = parser.add_argument_group(group.title)
            for action in group._group_actions:
                if action.dest not in left_out:
                    shown._add_action(own_action(action, name))
    own = {a.dest: a.default for a in modes._actions if a.default != argparse.SUPPRESS}
    parser.set_defaults(**own | modes._defaults)
    return parser


def own_action(action: argparse.Action, verb: str) -> argparse.Action:
    """An option of the modes as one of a verb: answers of run and chat have another limit."""
    if action.dest != "max_tokens" or verb not in ("run", "chat"):
        return action
    own = copy.copy(action)
    own.help = "tokens in an answer (default: up to the end of the context)"
    return own


def run_verb(name: str, parser: argparse.ArgumentParser, argv: list[str], mode: Mode) -> int:
    """Parse the words of a verb, and run the mode whose flags `mode` returns for them."""
    args = parser.parse_intermixed_args(argv)
    vars(args).update(mode(args))
    return run_mode(args, [name, *argv])


def piped() -> str:
    """The text on standard input; empty on a terminal. Raises RequestError."""
    return "" if sys.stdin.isatty() else read_text("-")


def split_words(args: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The model among the words of a verb, and the other words. Raises UsageError."""
    if args.models or args.modelfile or getattr(args, "goes_on", False):
        return args.models, args.words
    if not args.words:
        raise UsageError("give a MODEL, as in smollm2 or org/name")
    return args.words[:1], args.words[1:]


def run(argv: list[str]) -> int:
    """`run MODEL [PROMPT ..]`: an answer to the words and to what is piped in, or a
    conversation."""
    parser = verb_parser("run", ANSWERS, "chat", "embed", "output")
    parser.add_argument("words", nargs="*", metavar="PROMPT", help="a message; else a conversation")

    def mode(args: argparse.Namespace) -> dict[str, Any]:
        models, words = split_words(args)
        texts = [" ".join(words) if words != ["-"] else "", piped()]
        prompt = "\n\n".join(text for text in texts if text.strip())
        if not prompt and not sys.stdin.isatty():
            raise UsageError("there is no prompt, and standard input is empty")
        own = {"prompt": prompt, "chat": True} if prompt else {"interactive": True}
        return {"models": models, "is_open": True, **own}

    return run_verb("run", parser, argv, mode)


def chat(argv: list[str]) -> int:
    """`chat MODEL`: a conversation, also through a pipe: one message a line."""
    parser = verb_parser("chat", ANSWERS, "chat", "embed", "output")
    parser.add_argument("words", nargs="*", metavar="MODEL", help="alias, hub id or path")

    def mode(args: argparse.Namespace) -> dict[str, Any]:
        models, words = split_words(args)
        if words:
            raise UsageError(
                f"unexpected words: {' '.join(words)}; run MODEL PROMPT takes a prompt"
            )
        return {"models": models, "interactive": True}

    return run_verb("chat", parser, argv, mode)


def serve(argv: list[str]) -> int:
    """`serve [MODEL ..]`: a server of these models, or of all models on this machine."""
    parser = verb_parser("serve", "model, nanochat, sampling, server, cluster")
    parser.add_argument("words", nargs="*", metavar="MODEL", help="none: all on this machine")

    def mode(args: argparse.Namespace) -> dict[str, Any]:
        return {"models": [*args.words, *args.models], "serve": True}

    return run_verb("serve", parser, argv, mode)


def batch(argv: list[str]) -> int:
    """`batch MODEL FILE`: answers to the lines of a file as chat messages."""
    parser = verb_parser("batch", ANSWERS, "chat", "embed", "goes_on", "explain")
    parser.add_argument("words", nargs="*", metavar="FILE", help="one prompt a line; - reads stdin")

    def mode(args: argparse.Namespace) -> dict[str, Any]:
        models, words = split_words(args)
        if len(words) != 1:
            raise UsageError("give one FILE with a prompt on each line; - reads standard input")
        return {"models": models, "batch_file": words[0], "chat": True}

    return run_verb("batch", parser, argv, mode)


def embed(argv: list[str]) -> int:
    """`embed MODEL [TEXT ..]`: the embedding of the words, of what is piped in, or of each line of
    a file."""
    parser = verb_parser("embed", "model, nanochat")
    parser.add_argument("--batch-file", metavar="FILE", help="embed each line; - reads stdin")
    parser.add_argument("words", nargs="*", metavar="TEXT", help="a text; else standard input")

    def mode(args: argparse.Namespace) -> dict[str, Any]:
        models, words = split_words(args)
        text = None if args.batch_file else " ".join(words) or piped()
        if text == "":
            raise UsageError("give a TEXT, or --batch-file FILE, or pipe a text in")
        return {"models": models, "embed": True, "prompt": text}

    return run_verb("embed", parser, argv, mode)
