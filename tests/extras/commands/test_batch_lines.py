"""A batch file of JSON lines: texts, conversations and bodies, each answered as the API does."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Ran
from oracle import Tiny

import nanollama
from nanollama_extras.commands import json_lines
from nanollama_extras.commands.batch_lines import BodyText, json_row

Run = Callable[..., Ran]
USER = {"role": "user", "content": "hello"}
FLAGS = ("--temp", 0, "--max-tokens", 6, "--kernels", "torch", "--ctx", 512)


def openai_line(**fields: Any) -> dict[str, Any]:
    body = {"model": "gpt-x", "messages": [USER]}
    line = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}
    return {**line, **fields}


def answers(cli: Run, model: Path, file: Path, *flags: object) -> tuple[list[Any], Ran]:
    ran = cli("--model", model, "--batch-file", file, "--output", "-", *FLAGS, *flags)
    return [json.loads(line) for line in ran.out.splitlines()], ran


def written(folder: Path, *lines: Any, name: str = "in.jsonl") -> Path:
    path = folder / name
    path.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    return path


def test_each_form_of_a_line_is_answered(cli: Run, tiny: Tiny, tmp_path: Path) -> None:
    model, text = tiny("Llama"), tmp_path / "in.txt"
    text.write_text("hello\n")
    text_line = openai_line(url="/v1/completions", body={"prompt": "hello"})
    chats = {"messages": [USER]}, openai_line()
    lines = "hello", {"prompt": "hello", "id": 3}, *chats, text_line
    found, ran = answers(cli, model, written(tmp_path, *lines))
    assert ran.code == 0, ran.err
    (plain,), _ = answers(cli, model, text)
    (chat,), _ = answers(cli, model, text, "--chat")
    expected = [plain, plain, chat, chat, plain]
    assert [row["text"] for row in found] == [row["text"] for row in expected]
    assert [row["prompt"] for row in found] == ["hello"] * 5
    assert [row.get("custom_id") for row in found] == [None, None, None, "a", "a"]
    assert [row["line"] for row in found] == [1, 2, 3, 4, 5]


def test_fields_of_a_body_come_before_options(cli: Run, tiny: Tiny, tmp_path: Path) -> None:
    body = {"messages": [USER], "max_tokens": 2, "stop": "never"}
    lines = written(tmp_path, body, {"messages": [USER]}, {**body, "user": "me", "odd": 1})
    found, ran = answers(cli, tiny("Llama"), lines, "--system", "Be brief.")
    assert [row["usage"]["completion_tokens"] for row in found] == [2, 6, 2]
    with_system = found[0]["usage"]["prompt_tokens"]
    own = written(tmp_path, {"messages": [{"role": "system", "content": "x"}, USER]})
    (row,), _ = answers(cli, tiny("Llama"), own, "--system", "Be brief.")
    assert row["usage"]["prompt_tokens"] < with_system
    assert ran.err.count("the field odd of lines has no effect") == 1
    assert "the field user" not in ran.err


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ({"text": "x"}, 'the line has no text as "prompt", and no "messages" or "body"'),
        ([1], 'the line has no text as "prompt"'),
        (openai_line(url="/v1/embeddings"), "the line asks for 'POST /v1/embeddings'; a batch"),
        (openai_line(url=[]), "the line asks for 'POST []'; a batch file can have POST /v1/chat"),
        (openai_line(method="GET"), "the line asks for 'GET /v1/chat/completions'"),
        (openai_line(body=3), "the line's body is 3; it must be an object"),
        (openai_line(body={}), "messages is missing or empty"),
        ({"messages": [USER], "temperature": 9}, "temperature is 9; it must be between 0 and 2"),
        ({"messages": [USER], "n": 2}, "n in a line of a batch: it must ask for one answer"),
        ({"messages": [USER], "stream": True}, "stream in a line of a batch: it must be false"),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "is of type 'x'"),
        ({"messages": [3]}, "messages[0] is 3; its JSON type must be object"),
    ],
)
def test_a_line_that_cannot_be_answered_says_why(
    cli: Run, tiny: Tiny, tmp_path: Path, line: Any, problem: str
) -> None:
    found, ran = answers(cli, tiny("Llama"), written(tmp_path, "hello", line, name="in.ndjson"))
    assert (ran.code, len(found)) == (1, 2)
    assert problem in found[1]["error"]
    assert "error" not in found[0]
    assert "line 2: " in ran.err


def test_a_line_that_is_not_json_says_why() -> None:
    for line in (b"{", b"\xff", b"[" * 100_000):
        row = json_row(4, line)
        assert str(row.error).startswith("the line is not valid JSON: ")


def test_a_lone_surrogate_ends_no_batch(cli: Run, tiny: Tiny, tmp_path: Path) -> None:
    lines = written(tmp_path, "\ud800", openai_line(custom_id="b\udfff"), "hello")
    out = tmp_path / "out.jsonl"
    ran = cli("--model", tiny("Llama"), "--batch-file", lines, "--output", out, *FLAGS)
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert (ran.code, found[0]["error"]) == (1, "the text holds a lone surrogate")
    assert (found[0]["prompt"], found[1]["custom_id"]) == (None, "b\udfff")
    assert found[2]["finish_reason"] == "length"


def test_an_output_shows_the_last_message(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "What is"}, {"type": "image_url", "image_url": {"url": "x"}}]
    for messages, shown in (
        ([USER, {"role": "user", "content": parts}], "What is\n[image]"),
        ([{"role": "user", "content": parts[:1]}], "What is"),
        ([{"role": "assistant", "content": None}], ""),
        ("no list", ""),
        ([[]], ""),
    ):
        prompt = json_row(1, json.dumps({"messages": messages}).encode()).prompt
        assert isinstance(prompt, BodyText)
        assert prompt == shown


def test_engines_of_ray_get_whole_lines(tiny: Tiny, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    pytest.importorskip("fsspec")
    from nanollama_extras.cluster import batch
    from nanollama_extras.cluster.batch_files import read_prompts

    lines = written(tmp_path, "hello", openai_line(), {"messages": [USER], "max_tokens": 2})
    rows, _ = read_prompts(str(lines))
    argv = ["--model", tiny("Llama"), "--batch-file", lines, "--ray", "--replicas", 1, *FLAGS]
    args = nanollama.build_parser().parse_args([str(each) for each in argv])
    settings = nanollama.read_settings(args)
    answerer = batch.Answerer(batch.packed(settings))
    (block,) = batch.blocks(settings, rows)
    found = [json.loads(line) for line in answerer(block).to_pylist()[0]["answers"]]
    assert [row.get("custom_id") for row in found] == [None, "a", None]
    assert [row["usage"]["completion_tokens"] for row in found] == [6, 6, 2]


def test_an_error_of_another_file_is_not_said_of_the_output() -> None:
    with pytest.raises(PermissionError, match="weights"), json_lines.writing("out"):
        raise PermissionError(13, "Permission denied", "weights")
