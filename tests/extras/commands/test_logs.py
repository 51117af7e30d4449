"""--log, --continue and `nanollama logs`: conversations in an SQLite file."""

from __future__ import annotations

import json
import sqlite3
import stat
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import Ran

import nanollama

pytestmark = pytest.mark.usefixtures("empty_caches")
Run = Callable[..., Ran]
FLAGS = ("--temp", "0", "--max-tokens", "4", "--quiet")


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path / "talks.db"


def rows(file: Path) -> list[sqlite3.Row]:
    database = sqlite3.connect(file)
    database.row_factory = sqlite3.Row
    return list(database.execute("SELECT * FROM answers ORDER BY id"))


def test_nothing_is_kept_unless_asked_for(
    cli: Run, tiny: Callable[..., Path], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cli("run", tiny(), "fox", *FLAGS).code == 0
    assert not list(file.parent.glob("*.db"))
    monkeypatch.setenv("NANOLLAMA_LOG", str(file))
    assert cli("run", tiny(), "fox", *FLAGS).code == 0
    assert len(rows(file)) == 1
    if sys.platform != "win32":
        assert stat.S_IMODE(file.stat().st_mode) == 0o600


def test_an_answer_is_kept_with_all_that_led_to_it(
    cli: Run, tiny: Callable[..., Path], file: Path
) -> None:
    ran = cli("run", tiny(), "fox", "--system", "Be brief.", *FLAGS, "--log", file)
    (row,) = rows(file)
    assert row["model"] == str(tiny())
    assert row["answer"] + "\n" == ran.out
    assert json.loads(row["messages"]) == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "fox"},
        {"role": "assistant", "content": row["answer"]},
    ]
    assert json.loads(row["params"])["max_tokens"] == 4
    cli("--model", tiny(), "--prompt", "raw", *FLAGS, "--log", file)
    assert (rows(file)[1]["prompt"], rows(file)[1]["messages"]) == ("raw", None)


def test_the_last_conversation_goes_on(cli: Run, tiny: Callable[..., Path], file: Path) -> None:
    talk = cli("chat", tiny(), *FLAGS, "--stop", "\n", stdin=b"fox\ndog\n")
    first = cli("run", tiny(), "fox", *FLAGS, "--stop", "\n", "--log", file)
    second = cli("run", "-c", "dog", *FLAGS, "--stop", "\n", "--log", file)
    assert first.out + second.out == talk.out
    assert "continues a conversation of 2 messages" in second.err
    third = cli("--interactive", "-c", *FLAGS, "--log", file, stdin=b"cat\n/clear\nowl\n")
    assert third.code == 0
    talks = [row["conversation"] for row in rows(file)]
    assert talks[0] == talks[1] == talks[2] != talks[3]
    assert [len(json.loads(row["messages"])) for row in rows(file)] == [2, 4, 6, 2]


def test_a_system_prompt_is_not_sent_twice(cli: Run, tiny: Callable[..., Path], file: Path) -> None:
    cli("run", tiny(), "fox", "--system", "Be brief.", *FLAGS, "--log", file)
    cli("run", "-c", "dog", *FLAGS, "--log", file)
    roles = [message["role"] for message in json.loads(rows(file)[1]["messages"])]
    assert roles == ["system", "user", "assistant", "user", "assistant"]


def test_logs_lists_and_prints_conversations(
    cli: Run, tiny: Callable[..., Path], file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NANOLLAMA_LOG", str(file))
    for text in ("first question", "second question"):
        cli("run", tiny(), text, *FLAGS)
    listed = cli("logs").out.splitlines()
    assert ["second question" in listed[0], "first question" in listed[1]] == [True, True]
    assert "first question" in cli("logs", "--query", "irst qu").out
    assert cli("logs", "--query", "100%").out == ""
    assert cli("logs", "last").out.startswith("user: second question\n\nassistant: ")
    assert cli("logs", listed[1][:8]).out.startswith("user: first question\n")
    (line,) = cli("logs", "last", "--json").out.splitlines()
    assert json.loads(line)["messages"][0]["content"] == "second question"


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("logs", "logs: no such log; keep conversations with --log FILE"),
        ("logs --log absent.db", "absent.db: no such log"),
        ("run -c x", "--continue: no log; keep conversations with --log FILE"),
        ("--batch-file x -c", "--continue needs --interactive, or --prompt and --chat"),
        ("logs nowhere --log talks.db", "nowhere: 0 conversations of talks.db have this id"),
    ],
)
def test_a_log_that_is_not_there_is_a_usage_error(
    cli: Run, file: Path, argv: str, message: str, tiny: Callable[..., Path]
) -> None:
    cli("run", tiny(), "fox", *FLAGS, "--log", file)
    ran = cli(*argv.split())
    assert ran.code == 2
    assert ran.err.startswith(f"error: {message}")


def test_a_log_that_cannot_be_written_is_a_warning(
    cli: Run, tiny: Callable[..., Path], file: Path
) -> None:
    file.write_text("no database, but some text that is long enough to be looked at")
    ran = cli("run", tiny(), "fox", *FLAGS, "--log", file)
    assert (ran.code, ran.out != "") == (0, True)
    assert f"warning: {file}: cannot keep conversations: " in ran.err


def test_a_lone_surrogate_is_kept_as_a_question_mark(file: Path) -> None:
    as_text = nanollama.extra("commands.logs", "the test").as_text
    assert json.loads(as_text({"a": "\udcff", "b": [1]})) == {"a": "?", "b": [1]}
