"""A model in a program of asyncio.

Adds       `AsyncLLM`, and `LLM.astream`: a thread for each stream runs it, and hands its deltas to
           the event loop. Streams that run at once share the steps of the model's engine.
Seam       `nanollama.AsyncLLM` is a row of PUBLIC_EXTRAS; `LLM.astream` is in answers.library,
           which this module imports.
Remove     delete this file; both names then say that they need it.
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any, cast

from nanollama import LLM, Completion, Delta
from nanollama_extras.answers.library import conversation


async def astream(llm: LLM, requests: Any, **params: Any) -> AsyncIterator[Delta]:
    """As `LLM.stream`. The thread ends with the loop over the deltas, however that ends."""
    loop, events = asyncio.get_running_loop(), asyncio.Queue[Delta | BaseException | None]()
    is_left = threading.Event()

    def post(event: Delta | BaseException | None) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(events.put_nowait, event)

    def run() -> None:
        try:
            with contextlib.closing(cast("Any", llm.stream(requests, **params))) as deltas:
                for delta in deltas:
                    post(delta)
                    if is_left.is_set():
                        break
            post(None)
        except BaseException as error:
            post(error)

    context = contextvars.copy_context()  # of the caller, as in asyncio.to_thread
    threading.Thread(target=context.run, args=(run,)).start()
    try:
        while (event := await events.get()) is not None:
            if isinstance(event, BaseException):
                raise event
            yield event
    finally:
        is_left.set()


class AsyncLLM:
    """An LLM for programs of asyncio: `await llm.chat("Hi")`, `async for delta in llm.stream(..)`.

    Takes the parameters of LLM, or a loaded LLM. Its other methods are those of `llm`."""

    def __init__(self, model: LLM | str | Path, *args: Any, **options: Any) -> None:
        """Load a model, which blocks; `AsyncLLM.load` does not. Raises as LLM."""
        self.llm = model if isinstance(model, LLM) else LLM(model, *args, **options)

    def __repr__(self) -> str:
        return f"Async{self.llm!r}"

    @classmethod
    async def load(cls, model: str | Path, *args: Any, **options: Any) -> AsyncLLM:
        """Load a model in a thread. Raises as LLM."""
        return cls(await asyncio.to_thread(LLM, model, *args, **options))

    def stream(self, requests: Any, **params: Any) -> AsyncIterator[Delta]:
        """As `LLM.stream`. Leaving the loop early cancels all that still run."""
        return astream(self.llm, requests, **params)

    async def complete(self, request: Any, **params: Any) -> Completion:
        """As `LLM.complete`; a cancelled task cancels the answer."""
        return Completion.of([delta async for delta in astream(self.llm, [request], **params)])

    async def chat(self, messages: Any, **params: Any) -> Completion:
        """As `LLM.chat`; a cancelled task cancels the answer."""
        return await self.complete({"messages": conversation(messages)}, **params)
