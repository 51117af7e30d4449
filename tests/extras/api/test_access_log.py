"""The log of a server: what the line of a request says, as text and as JSON."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator

import pytest
from serving import Live, serving, wait_until

import nanollama
from nanollama_extras.api.access_log import JsonFormatter, ServerFormatter, reason


class Lines(logging.Handler):
    """Keeps the lines of the log in a form."""

    def __init__(self, form: logging.Formatter) -> None:
        super().__init__()
        self.formatter, self.lines = form, list[str]()

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def logged() -> Iterator[dict[str, Lines]]:
    handlers = {"text": Lines(ServerFormatter()), "json": Lines(JsonFormatter())}
    level = nanollama.log.level
    nanollama.log.setLevel(logging.INFO)
    for handler in handlers.values():
        nanollama.log.addHandler(handler)
    yield handlers
    for handler in handlers.values():
        nanollama.log.removeHandler(handler)
    nanollama.log.setLevel(level)


@pytest.fixture
def live(tiny_llm: nanollama.LLM, logged: dict[str, Lines]) -> Iterator[Live]:
    with serving(lambda: tiny_llm) as live:
        yield live


def wait_for_line(logged: dict[str, Lines], path: str) -> None:
    """Wait for the line of a request, which is written after the client has its answer."""
    wait_until(lambda: path in logged["json"].lines[-1], f"the line of {path}")


TIME = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


@pytest.mark.parametrize("stream", [False, True])
def test_a_line_has_time_status_tokens_and_speed(
    live: Live, logged: dict[str, Lines], stream: bool
) -> None:
    live.chat(max_tokens=4, stream=stream, logit_bias={"1": -100, "3": -100})
    wait_for_line(logged, "/v1/chat/completions")
    text, row = logged["text"].lines[-1], json.loads(logged["json"].lines[-1])
    assert re.fullmatch(
        rf"{TIME} 127\.0\.0\.1 POST /v1/chat/completions 200 [\d.]+s \w{{16}} "
        r"\d+\+4 tokens [\d.]+ t/s",
        text,
    )
    assert row["level"] == "info"
    assert (row["method"], row["path"], row["status"]) == ("POST", "/v1/chat/completions", 200)
    assert row["completion_tokens"] == 4
    assert row["id"] in text
    assert row["tokens_per_second"] > 0


def test_the_reason_of_an_error_is_in_its_line(live: Live, logged: dict[str, Lines]) -> None:
    for path, body in (("/v1/chat/completions", {"messages": 5}), ("/api/chat", {"model": 5})):
        said = live.http.post(path, json=body).json()["error"]
        wait_for_line(logged, path)
        message = said["message"] if isinstance(said, dict) else said
        assert logged["text"].lines[-1].endswith(f" ({message})")
        assert json.loads(logged["json"].lines[-1])["reason"] == message


def test_other_lines_have_their_time(logged: dict[str, Lines]) -> None:
    nanollama.log.warning("one \x1b[31m")
    assert re.fullmatch(rf"{TIME} one \\u001b\[31m", logged["text"].lines[-1])
    row = json.loads(logged["json"].lines[-1])
    assert (row["level"], row["message"]) == ("warning", "one \x1b[31m")
    assert set(row) == {"time", "level", "message"}


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"error": 5}', b'{"error": {}}', b'"error"'])
def test_a_body_without_a_message_has_no_reason(body: bytes) -> None:
    assert reason(body) in ("", "5")
