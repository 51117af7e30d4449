"""--record FILE: keep what each answer was made from, and its tokens, for `nanollama replay`.

Seam       LLM: with `EngineConfig.record` its engine is made by `recording_engine`.
Remove     delete this file and commands/replay.py; --record and `replay` then say so.

A file has JSON lines, which several models and processes may append to. The first line of a model
says what it is; each other line is an answer:

    {"run": ID, "version": .., "model": .., "fingerprint": .., "backend": .., "engine": {..}}
    {"run": ID, "ids": [prompt], "answer": [ids], "logprobs": [[LOGPROB, [[ID, LOGPROB], ..]], ..],
     "seed": .., "params": {..}, "finish_reason": .., "is_constrained": .., "seconds": ..}

The log-probabilities are those of the token and of the 20 likeliest, before temperature and
penalties. Keys and headers are never in it, nor are embeddings and answers of a sampler of one's
own, such as those of /branch. Only its owner may read a new file.
"""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from nanollama import Engine, NanollamaError, __version__, human_bytes, log, token_logprobs

if TYPE_CHECKING:
    from nanollama import LLM, Decoder, Delta, EngineConfig, Json, Row, Sequence, TokenLogprobs

NUM_TOP = 20  # likeliest tokens that are kept for each token
MOST_BYTES = 1 << 30  # of a file, which then takes no more answers


def open_record(path: str) -> int:
    """A file to append to. Raises NanollamaError."""
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_BINARY", 0)
    try:
        return os.open(path, flags, 0o600)
    except OSError as error:
        raise NanollamaError(f"--record {path}: {error.strerror}; name another file") from None


def changed_fields(settings: Any) -> Json:
    """The fields of a settings object that differ from their defaults."""
    default = type(settings)()
    names = [field.name for field in dataclasses.fields(settings)]
    return {n: getattr(settings, n) for n in names if getattr(settings, n) != getattr(default, n)}


class RecordingEngine(Engine):
    """An engine that appends each answer to a file when it ends, with the tokens of any engine."""

    def __init__(
        self, describe: Callable[[], Json], decoder: Decoder, end_ids: Any, config: EngineConfig
    ) -> None:
        """`describe` gives the first line. Raises NanollamaError for a file that cannot be
        written."""
        self.describe, self.config, self.path = describe, config, str(config.record)
        self.file: int | None = open_record(self.path)  # None once it is full
        self.run = ""  # until the first line is written
        self.logprobs: dict[int, list[TokenLogprobs]] = {}  # by id() of each running sequence
        super().__init__(decoder, end_ids, config)

    def add(self, seq: Sequence) -> None:
        super().add(seq)
        if not (seq.pooler or seq.params.sampler):  # what a function draws cannot be replayed
            self.logprobs[id(seq)] = []

    def sample(self, seq: Sequence, logits: Row) -> Delta:
        delta = super().sample(seq, logits)
        kept = self.logprobs.get(id(seq))
        if kept is not None and delta.token_id is not None:
            kept.append(token_logprobs(logits, delta.token_id, NUM_TOP))
        return delta

    def advance(self, seq: Sequence, logits: Any) -> None:
        super().advance(seq, logits)
        if seq.finish_reason:
            self.keep(seq)

    def cancel(self, seq: Sequence) -> None:
        super().cancel(seq)
        self.keep(seq)

    def keep(self, seq: Sequence) -> None:
        """Append an answer that has ended, once."""
        logprobs = self.logprobs.pop(id(seq), None)
        if not logprobs or self.file is None:  # no token, or kept already
            return
        is_first, self.run = not self.run, self.run or secrets.token_hex(8)
        rows = [{"run": self.run, **self.describe()}] if is_first else []
        rows.append({"run": self.run, **answer_row(seq, logprobs)})
        data = "".join(json.dumps(row) + "\n" for row in rows).encode()
        try:
            if os.fstat(self.file).st_size + len(data) > MOST_BYTES:
                raise OSError(0, f"the file has reached {human_bytes(MOST_BYTES)}")
            os.write(self.file, data)  # in one piece, as other processes may append to it too
        except OSError as error:
            os.close(self.file)
            self.file = None
            log.warning(f"--record {self.path}: {error.strerror}; later answers are not recorded")


def answer_row(seq: Sequence, logprobs: list[TokenLogprobs]) -> Json:
    usage = seq.usage()
    return {
        "ids": seq.token_ids[: seq.num_prompt],
        "answer": seq.token_ids[seq.num_prompt :],
        "logprobs": [(entry.logprob, entry.top) for entry in logprobs],
        "seed": seq.seed,
        "params": changed_fields(seq.params),
        "finish_reason": seq.finish_reason,
        "is_constrained": seq.constraint is not None,
        "seconds": usage.prefill_s + usage.decode_s,
    }


def recording_engine(llm: LLM, adapter: Any) -> Callable[..., Engine]:
    """What makes the engine of an LLM, instead of Engine."""

    def describe() -> Json:
        engine: Any = llm.engine
        own = dataclasses.replace(engine.config, record=None, prompt_cache=None, packed_cache=None)
        return {
            "version": __version__,
            "model": str(llm.checkpoint.path),
            "adapter": adapter and os.path.abspath(adapter),
            "fingerprint": llm.fingerprint,
            "backend": engine.decoder.kernels,
            "engine": changed_fields(own),
        }

    return lambda *args: RecordingEngine(describe, *args)
