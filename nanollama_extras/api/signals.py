"""What Ctrl-C does to a server: the first says what the server waits for, the second ends it. After
SIGTERM or one Ctrl-C, it ends within LAST_S: a thread that reads an image, a long prompt or a
download for a client that is gone could keep it for minutes.

Seam       `nanollama.serve` gives uvicorn the function that `new_stop` makes.
Remove     delete this file; Ctrl-C then waits in silence, for as long as all threads take.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nanollama import SHUTDOWN_S

if TYPE_CHECKING:
    from nanollama import Models

LAST_S = SHUTDOWN_S + 5  # from the signal to the end: answers have SHUTDOWN_S


def waits_for(models: Models) -> str:
    """The running answers and downloads that a server completes before it ends."""
    num = sum(worker.num_sequences for worker in models.workers)
    return f"{num} answer{'s' * (num != 1)}" if num else ""


def new_stop(server: Any, models: Models) -> Callable[[int, Any], None]:
    """A handler of SIGINT and SIGTERM for uvicorn's server."""

    def stop(number: int, _: Any) -> None:
        if server.should_exit and number == signal.SIGINT:
            os._exit(130)
        if not server.should_exit:
            last = threading.Timer(LAST_S, os._exit, (0,))
            last.daemon = True
            last.start()
        named = waits_for(models)  # before models are told that the server closes
        server.should_exit = True
        if number == signal.SIGINT and named:
            text = f"\nwaiting up to {SHUTDOWN_S} s for {named}; Ctrl-C again stops at once\n"
            os.write(2, text.encode())  # the log may be what the signal interrupted

    return stop
