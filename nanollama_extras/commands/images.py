"""--image FILE, and images in a conversation: /image FILE, or a file dropped on the terminal.

Seam       commands.options calls `run_prompt` for --image with a prompt; commands.conversation
           calls `dropped`, `file_parts` and `with_images`.
Imports    answers.images, which reads the files.
Remove     delete this file; --image and /image then name it.
"""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from urllib.request import url2pathname

from nanollama import (
    local_path,
    log,
    print_answers,
    print_speed,
    read_input,
    read_text,
    read_toolbox,
)
from nanollama_extras.answers.images import SUFFIXES, data_url, image_part, read_picture

if TYPE_CHECKING:
    from nanollama import Json, Settings

WORD = re.compile(r"""'[^']*'|"[^"]*"|(?:\\.|[^\s\\])+""")
COMMAND = re.compile(r"/[a-z]+(\s|\Z)", re.IGNORECASE)


def file_parts(names: list[str]) -> list[Json]:
    """The parts of a message for image files. Raises RequestError for one that cannot be read."""
    parts = []
    for name in names:
        data = read_input(os.path.expanduser(name))
        width, height = read_picture(data, name).size
        log.debug(f"{name}: {width} x {height} pixels")
        parts.append(image_part(data_url(data), name))
    return parts


def with_images(parts: list[Json], text: str) -> list[Json]:
    """The content of a message: the images come before the text, as most models learned it."""
    return [*parts, {"type": "text", "text": text}]


def run_prompt(settings: Settings) -> int:
    """--prompt with --image: one answer. Returns the exit code."""
    args = settings.args
    text = read_text("-") if args.prompt == "-" else str(args.prompt)
    parts = file_parts(args.images)
    toolbox, llm = read_toolbox(args), settings.load()
    request = settings.request(text, llm)
    assert request.messages
    request.messages[-1]["content"] = with_images(parts, text)
    print_answers(settings, llm, request, toolbox)
    print_speed(settings, llm.engine.stats)
    return 0


# ---- what a terminal writes for a file that is dropped on it -------------------------------------


def unquoted(word: str) -> str:
    """A word without its quotes, backslashes and file://."""
    if word[:1] in ("'", '"'):
        word = word[1:-1]
    elif os.name != "nt":  # where a backslash is part of a path
        word = re.sub(r"\\(.)", r"\1", word)
    return url2pathname(urlsplit(word).path) if word.startswith("file://") else word


def is_image_file(name: str) -> bool:
    path = local_path(name) if name.lower().endswith(SUFFIXES) else None
    return path is not None and path.is_file()


def is_path(name: str) -> bool:
    """Whether a name has a folder: a bare name in a text is a word of that text."""
    return name.startswith("~") or os.path.basename(name) != name


def dropped(text: str, is_whole: bool = False) -> tuple[list[str], str]:
    """The image files that a message begins or ends with, and its other words. is_whole: bare names
    are files, too."""
    if not is_whole and COMMAND.match(text):
        return [], text

    def is_dropped(word: re.Match[str]) -> bool:
        name = unquoted(word[0])
        return (is_whole or is_path(name)) and is_image_file(name)

    words, first, last = list(WORD.finditer(text)), list[str](), list[str]()
    while words and is_dropped(words[0]):
        first.append(unquoted(words.pop(0)[0]))
    while words and is_dropped(words[-1]):
        last.insert(0, unquoted(words.pop()[0]))
    rest = text[words[0].start() : words[-1].end()] if words else ""
    return [*first, *last], rest if first or last else text
