"""What Ctrl-C does to a server: the first says what the server waits for, the second ends it.

Seam       `nanollama.serve` gives uvicorn the function that `new_stop` makes.
Remove     delete this file; Ctrl-C then waits in silence.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nanollama import SHUTDOWN_S

if TYPE_CHECKING:
    from nanollama import Models


def waits_for(models: Models) -> str:
    """The running answers and downloads that a server completes before it ends."""
    num = sum(worker.num_sequences for worker in models.workers)
    return f"{num} answer{'s' * (num != 1)}" if num else ""


def new_stop(server: Any, models: Models) -> Callable[[int, Any], None]:
    """A handler of SIGINT and SIGTERM for uvicorn's server."""

    def stop(number: int, _: Any) -> None:
        if server.should_exit and number == signal.SIGINT:
            os._exit(130)
        named = waits_for(models)  # before models are told that the server closes
        server.should_exit = True
        if number == signal.SIGINT and named:
            text = f"\nwaiting up to {SHUTDOWN_S} s for {named}; Ctrl-C again stops at once\n"
            os.write(2, text.encode())  # the log may be what the signal interrupted

    return stop
