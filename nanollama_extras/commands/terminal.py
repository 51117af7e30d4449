"""The terminal of a conversation: lines with history and completion, an editor, words that wrap,
and keys that wait for their turn.

readline carries it, and not prompt_toolkit: with it, all of this takes fewer lines and no package.

Seam       `nanollama.print_answer` writes through `wrapped`, `nanollama.confirmed` asks inside
           `asking`; commands.conversation uses the rest.
Remove     delete this file; lines then come from Python's `input` alone.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
import unicodedata
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from nanollama import PARAMETERS, PLAIN, ModelStore, UsageError

termios: Any
try:
    import termios
except ImportError:  # on Windows
    termios = None

STYLE = re.compile(r"\x1b\[[\d;]*m")
FENCE = "```"
Names = Callable[[], list[str]]


# ---- answers -------------------------------------------------------------------------------------


def num_columns(text: str) -> int:
    """The columns that a text takes on a terminal."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.category(c) in ("Mn", "Me", "Cf") for c in text)


class Wrapped:
    """A terminal on which a word that does not fit begins the next row. The width is asked for at
    each text, since the user may change it. Lines between fences stay as they are."""

    def __init__(self, out: IO[str]) -> None:
        self.out, self.width = out, 0
        self.column = 0  # of the cursor
        self.word = self.line = ""  # the unfinished word and line
        self.styled = ""  # the same word with its styles
        self.is_code = False

    def isatty(self) -> bool:
        return True

    def flush(self) -> None:
        self.out.flush()

    def write(self, text: str) -> None:
        width = os.get_terminal_size(self.out.fileno()).columns
        if width != self.width:  # rows moved: nothing that was written can be taken back
            self.column = self.column % max(width, 1)
            self.end_word()
        self.width = width
        for part in re.split(f"({STYLE.pattern})", text):
            if STYLE.fullmatch(part):
                self.styled += part
                self.out.write(part)
            else:
                for character in part:
                    self.put(character)

    def put(self, character: str) -> None:
        if character == "\n":
            self.is_code ^= self.line.lstrip().startswith(FENCE)
            self.column, self.line = 0, ""
            self.end_word()
            self.out.write(character)
            return
        self.line += character
        num = 8 - self.column % 8 if character == "\t" else num_columns(character)
        # the last column stays free: a cursor behind it would be between two rows
        if self.column + num >= self.width and not self.is_code:
            if self.begin_row(character):
                return
            num = num_columns(character)
        self.column += num
        if character.isspace():
            self.end_word()
        else:
            self.word, self.styled = self.word + character, self.styled + character
        self.out.write(character)

    def end_word(self) -> None:
        self.word, self.styled = "", active_style(self.styled)

    def begin_row(self, character: str) -> bool:
        """Begin a row, with the unfinished word. Returns whether the character is done with."""
        size = num_columns(self.word)
        moves = 0 < size < self.column and not character.isspace()
        style = active_style(self.styled)
        plain = PLAIN if style else ""  # a row is cleared in the colour of the moment
        if moves:
            self.out.write(f"{plain}\x1b[{size}D\x1b[K\n{self.styled}")
        else:
            self.out.write(f"{plain}\n{style}")
            self.end_word()
        self.column = size if moves else 0
        return character.isspace()


def active_style(text: str) -> str:
    """The styles that hold at the end of a text."""
    return "".join(STYLE.findall(text.rpartition(PLAIN)[2]))


def wrapped(out: IO[str]) -> Any:
    """A terminal with words that wrap; anything else as it is."""
    plain = os.environ.get("TERM") == "dumb" or os.environ.get("NANOLLAMA_NO_WRAP")
    return out if plain or not is_terminal(out) else Wrapped(out)


def is_terminal(stream: Any) -> bool:
    """Whether a stream is a terminal of the system, of which the size can be asked."""
    try:
        return bool(os.isatty(stream.fileno()))
    except (OSError, ValueError, AttributeError):
        return False


@contextlib.contextmanager
def silent_keys() -> Iterator[None]:
    """Keep keys that are pressed meanwhile out of the answer; the next prompt shows them."""
    if termios is None or not (is_terminal(sys.stdin) and is_terminal(sys.stdout)):
        yield
        return
    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)
    mode = [*before]
    mode[3] = mode[3] & ~termios.ECHO | termios.NOFLSH  # Ctrl-C drops no keys
    termios.tcsetattr(stdin, termios.TCSANOW, mode)
    try:
        yield
    finally:
        termios.tcsetattr(stdin, termios.TCSANOW, before)


@contextlib.contextmanager
def asking() -> Iterator[None]:
    """Show the keys of an answer to a question; those pressed before it do not answer it."""
    if termios is None or not is_terminal(sys.stdin):
        yield
        return
    stdin = sys.stdin.fileno()
    before = termios.tcgetattr(stdin)
    mode = [*before]
    mode[3] |= termios.ECHO
    termios.tcsetattr(stdin, termios.TCSAFLUSH, mode)
    try:
        yield
    finally:
        termios.tcsetattr(stdin, termios.TCSANOW, before)


# ---- lines ---------------------------------------------------------------------------------------


def open_lines(history: Path, commands: list[str]) -> None:
    """Edit lines with a history that is kept in a file, with completion of `commands`, and with an
    editor behind Ctrl-G."""
    try:
        import readline
    except ImportError:  # on Windows, input() has no history
        return

    def save_history() -> None:
        with contextlib.suppress(OSError):
            history.parent.mkdir(parents=True, exist_ok=True)
            readline.write_history_file(history)

    with contextlib.suppress(OSError):
        readline.read_history_file(history)
    readline.set_history_length(1000)
    atexit.register(save_history)
    readline.set_completer_delims(" \t\n")
    readline.set_completer(completer(commands))
    if "libedit" in (readline.__doc__ or ""):  # macOS's own
        readline.parse_and_bind("bind ^I rl_complete")
        return
    readline.parse_and_bind("tab: complete")
    readline.parse_and_bind(r'"\C-g": "\C-a/edit \C-m"')
    if os.environ.get("TERM") != "dumb":  # which shows the marks that this sends
        readline.parse_and_bind("set enable-bracketed-paste on")  # pasted lines are one message


def completer(commands: list[str]) -> Callable[[str, int], str | None]:
    """readline's function: the candidate of a number for the word under the cursor."""

    import readline

    def candidate(word: str, number: int) -> str | None:
        found = candidates(readline.get_line_buffer()[: readline.get_begidx()], word, commands)
        return found[number] if number < len(found) else None

    return candidate


def candidates(before: str, word: str, commands: list[str]) -> list[str]:
    """What may stand for `word` behind the text before it: a command, the name of a parameter or a
    model, else a file."""
    first = before.split()[:1]
    if not before.strip() and word.startswith("/") and "/" not in word[1:]:
        found = [f"/{name} " for name in commands]
    elif first == ["/set"] and len(before.split()) == 1:
        found = [f"{name} " for name in sorted(PARAMETERS)]
    elif first == ["/model"]:
        found = [f"{model.id} " for model in ModelStore().models()]
    else:
        found = files(word)
    return [name for name in found if name.startswith(word)]


def files(word: str) -> list[str]:
    """The files and directories whose path begins with a word."""
    folder, _, start = word.rpartition("/")
    place = Path(os.path.expanduser(f"{folder}/" if "/" in word else "."))
    prefix = f"{folder}/" if "/" in word else ""
    try:
        paths = sorted(path for path in place.iterdir() if path.name.startswith(start))
    except OSError:
        return []
    return [f"{prefix}{path.name}{'/' if path.is_dir() else ' '}" for path in paths]


def edited(text: str) -> str:
    """A text after the user changed it in $VISUAL or $EDITOR, or in vi. Raises UsageError."""
    command = os.environ.get("VISUAL") or os.environ.get("EDITOR") or "vi"
    with tempfile.TemporaryDirectory(prefix="nanollama-") as folder:
        path = Path(folder) / "message.md"
        path.write_text(text, encoding="utf-8")
        try:
            subprocess.run([*shlex.split(command), str(path)], check=True)
            return path.read_text(encoding="utf-8", errors="replace").strip()
        except (OSError, ValueError, subprocess.CalledProcessError) as error:
            raise UsageError(f"{command}: {error}; name an editor in EDITOR") from None
