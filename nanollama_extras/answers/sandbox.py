"""Runs answers/sandboxed.py, the program that compiles grammars on trial: a few processes at most,
which wait for their next task. A grammar that ends one of them has an error like any other.

Seam       Answer form. answers/grammars.py tries every grammar here before it compiles it, and
           keeps what it has compiled, or the refusal, by content. It imports answers.sandboxed.
Remove     delete this file together with answers/grammars.py.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any, Generic, TypeVar

from nanollama import NanollamaError, RequestError, WireError, library
from nanollama_extras.answers import sandboxed
from nanollama_extras.answers.sandboxed import CPU_S, STACK, TOO_DEEP, TOO_LARGE

Item = TypeVar("Item")

NUM_PROCESSES = 2  # compilations at once
WAIT_S = 5.0  # of a request for its turn; then the server is too busy
WALL_S = 30.0  # of one task, on a machine that is busy with other work


class Process:
    """A process that runs tasks, one after another, until one of them ends it."""

    def __init__(self, folder: str) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-I", "-S", sandboxed.__file__, folder],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "MALLOC_ARENA_MAX": "1"},
            start_new_session=True,  # Ctrl-C ends an answer, not this process
        )
        self.is_usable = True

    def run(self, task: str, arguments: dict[str, Any]) -> dict[str, Any]:
        """The result of a task; its error, where it ends the process."""
        source, target = self.popen.stdout, self.popen.stdin
        assert source
        assert target
        line = json.dumps({"task": task, "arguments": arguments}).encode() + b"\n"
        reply, self.is_usable = b"", False  # until the reply has been read
        with contextlib.suppress(OSError), selectors.DefaultSelector() as selector:
            target.write(line)
            target.flush()
            selector.register(source, selectors.EVENT_READ)
            if selector.select(WALL_S):
                reply = source.readline()
        if not reply.endswith(b"\n"):
            return {"error": self.end_reason()}
        result: dict[str, Any] = json.loads(reply)
        self.is_usable = not result.pop("is_last")
        return result

    def end_reason(self) -> str:
        """The reason why a task has ended the process, or has to be ended. Raises NanollamaError
        for a process that cannot run any."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.popen.wait(1)
        code = self.popen.poll()
        self.close()
        if code in (None, -getattr(signal, "SIGPROF", 27)):
            return f"it takes longer than {CPU_S:g} s to compile"
        if code in (1, 2):
            raise NanollamaError("the program that compiles grammars cannot be started")
        overflows = {-signal.SIGSEGV, -getattr(signal, "SIGBUS", signal.SIGSEGV)}
        return TOO_DEEP if code in overflows else TOO_LARGE

    def close(self) -> None:
        """End the process."""
        self.popen.kill()
        self.popen.wait()
        for pipe in (self.popen.stdin, self.popen.stdout):
            with contextlib.suppress(OSError):
                assert pipe
                pipe.close()


def packages_folder(package: str) -> str:
    """The folder of packages that holds a package, which is not imported. Raises PackageError."""
    spec = importlib.util.find_spec(package)
    place = spec.origin if spec and spec.origin else library(package).__file__
    return os.path.dirname(os.path.dirname(place))


def compiled_part(package: str) -> Any:
    """llguidance without its modules in Python. Raises PackageError."""
    try:
        return sandboxed.library_part(packages_folder(package))
    except ImportError:  # the whole package says why
        return library(f"{package}._lib")


class Sandbox:
    """The processes of this program. Threads share it."""

    def __init__(self) -> None:
        self.turns = threading.BoundedSemaphore(NUM_PROCESSES)
        self.idle: list[Process] = []

    def start(self) -> Process:
        """A process that is ready soon. Raises PackageError without llguidance."""
        return Process(packages_folder("llguidance"))

    @contextlib.contextmanager
    def turn(self) -> Iterator[Callable[..., dict[str, Any]]]:
        """Wait for one of NUM_PROCESSES turns: the block gets a function that runs a task of
        answers/sandboxed.py. A process that it has not used up waits for the next turn. Raises
        WireError 503."""
        if not self.turns.acquire(timeout=WAIT_S):
            message = "too many grammars and schemas are being compiled; try again soon"
            raise WireError(503, "compiler_busy", message, {"retry-after": "1"})
        process = None
        try:
            process = self.idle.pop() if self.idle else self.start()

            def run(task: str, **arguments: Any) -> dict[str, Any]:
                nonlocal process
                assert process
                if not process.is_usable or process.popen.poll() is not None:
                    process.close()
                    process = self.start()
                return process.run(task, arguments)

            yield run
        finally:
            if process and process.is_usable:
                self.idle.append(process)
            elif process:
                process.close()
            self.turns.release()

    def close(self) -> None:
        """End the processes that wait."""
        while self.idle:
            self.idle.pop().close()


@functools.cache
def shared_sandbox() -> Sandbox:
    """The sandbox of this program; its processes end with the program."""
    sandbox = Sandbox()
    atexit.register(sandbox.close)
    return sandbox


class Kept(Generic[Item]):
    """What `make` makes of a text, or the RequestError that it raises: the last results, each made
    once, also for requests that come together."""

    def __init__(self, make: Callable[[str], Item], most: int) -> None:
        self.make, self.most, self.lock = make, most, threading.Lock()
        self.futures: OrderedDict[bytes, Future[Item]] = OrderedDict()

    def __call__(self, text: str) -> Item:
        key, future = self.key(text), Future[Item]()
        with self.lock:
            found = self.futures.setdefault(key, future)
            self.futures.move_to_end(key)
            while len(self.futures) > self.most:
                self.futures.popitem(last=False)
        if found is future:
            self.fill(future, text)
        try:
            return found.result()
        except RequestError as error:  # its own copy for each caller, who names the field
            raise RequestError(str(error), error.param) from None

    def fill(self, future: Future[Item], text: str) -> None:
        """Make the item of a text for all that wait for it."""
        try:
            future.set_result(self.make(text))
        except BaseException as error:
            if not isinstance(error, RequestError):
                self.forget(text)
            future.set_exception(error)

    @staticmethod
    def key(text: str) -> bytes:
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()

    def forget(self, text: str) -> None:
        """Make the item of a text again when it is asked for."""
        with self.lock:
            self.futures.pop(self.key(text), None)


def in_thread(function: Callable[[], Item]) -> Future[Item]:
    """Run a function in a thread of its own."""
    future = Future[Item]()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work).start()
    return future


def on_deep_stack(function: Callable[[], Item]) -> Item:
    """Run a function in a thread with twice the stack that the trial had."""
    usual = threading.stack_size(2 * STACK)
    try:
        future = in_thread(function)
    finally:
        threading.stack_size(usual)
    return future.result()


class Started(Generic[Item]):
    """What `make` makes, once, in a thread: `start` begins, and a call waits for it."""

    def __init__(self, make: Callable[[], Item]) -> None:
        self.make, self.lock = make, threading.Lock()
        self.future: Future[Item] | None = None

    def start(self) -> Future[Item]:
        """Begin, unless it has begun before and has not failed."""
        with self.lock:
            if not self.future or (self.future.done() and self.future.exception()):
                self.future = in_thread(self.make)
            return self.future

    def __call__(self) -> Item:
        return self.start().result()
