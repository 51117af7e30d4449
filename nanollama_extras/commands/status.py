"""Signs of life: what a terminal shows while a model is loaded, and the bar of a batch.

Seam       `nanollama.Settings.load` runs inside `loading`; kernels.native runs its compiler inside
           `activity`; `nanollama.run_batch` counts with `count_answers`, commands.eval with
           `with_progress`.
Remove     delete this file; loading is then silent, and a batch has no bar.
"""

from __future__ import annotations

import contextlib
import gc
import logging
import os
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

from nanollama import DIM, PLAIN, Weights, human_bytes, log, printable

if TYPE_CHECKING:
    from nanollama import Settings, TensorSource

DELAY_S, REDRAW_S = 0.3, 0.1  # before the first line; between two
CLEAR = "\r\x1b[K"
Item = TypeVar("Item")
SHOWN: list[Callable[[], str]] = []  # activities, the innermost last


class Line(threading.Thread):
    """Writes the text of the innermost activity on one row of the terminal, and clears it."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.is_over, self.lock = threading.Event(), threading.Lock()
        self.is_drawn, self.text = False, ""

    def run(self) -> None:
        if self.is_over.wait(DELAY_S):
            return
        while not self.is_over.wait(REDRAW_S):
            with self.lock:
                width = os.get_terminal_size(sys.stderr.fileno()).columns
                text = printable(SHOWN[-1]() if SHOWN else "")[: max(width - 1, 1)]
                if self.is_drawn and text == self.text:
                    continue
                self.text = text
                sys.stderr.write(f"{CLEAR}{DIM}{text}{PLAIN}")
                sys.stderr.flush()
                self.is_drawn = True

    def clear(self, _: object = None) -> bool:
        """Clear the row. Used as a filter of the log, which lets every record pass."""
        with self.lock:
            if self.is_drawn:
                sys.stderr.write(CLEAR)
                sys.stderr.flush()
            self.is_drawn = False
        return True

    def stop(self) -> None:
        self.is_over.set()
        self.join()
        self.clear()


@contextlib.contextmanager
def activity(text: str | Callable[[], str]) -> Iterator[None]:
    """Show a text on the terminal while the block runs, if that takes more than 0.3 s. No trace
    of it stays."""
    SHOWN.append(text if callable(text) else lambda: text)
    is_outer, handlers = len(SHOWN) == 1, list[logging.Handler](log.handlers)
    shows = is_outer and sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    line = Line() if shows else None
    try:
        if line:
            line.start()
            for handler in handlers:
                handler.addFilter(line.clear)
        yield
    finally:
        SHOWN.pop()
        if line:
            line.stop()
            for handler in handlers:
                handler.removeFilter(line.clear)


@contextlib.contextmanager
def loading(model: str) -> Iterator[None]:
    """Show how much of a model has been read while the block loads it. No garbage is searched
    meanwhile: objects are many, and stay."""
    read: dict[int, int] = {}
    total = 0

    def note(weights: Weights, tensor: TensorSource) -> None:
        nonlocal total
        total = total or sum(t.nbytes for t in weights.tensors.values())
        read[id(tensor)] = tensor.nbytes

    def text() -> str:
        done = f": {human_bytes(sum(read.values()))} of {human_bytes(total)}" if total else ""
        return f"loading {model}{done}"

    plain, Weights.on_read = Weights.on_read, note
    collects = gc.isenabled()
    gc.disable()
    try:
        with activity(text):
            yield
    finally:
        Weights.on_read = plain
        if collects:
            gc.enable()


def with_progress(items: Iterable[Item], total: int, **options: Any) -> Iterable[Item]:
    """The items, counted by a progress bar where stderr is a terminal. Lines of the log stand
    above it."""
    import tqdm  # one answer needs no bar

    bar = tqdm.tqdm(items, total=total, file=sys.stderr, disable=None, **options)

    def make_room(_: object) -> bool:
        bar.clear()
        return True

    for handler in log.handlers:
        handler.addFilter(make_room)
    try:
        yield from bar
    finally:
        bar.close()
        for handler in log.handlers:
            handler.removeFilter(make_room)


def count_answers(settings: Settings, answers: Iterable[Item], total: int) -> Iterable[Item]:
    """The answers of a batch, counted by a bar, which never stands between answers."""
    to_file = getattr(settings.args, "output", None) not in (None, "-")
    if to_file or not sys.stdout.isatty():
        return with_progress(answers, total, unit="prompt")
    return answers
