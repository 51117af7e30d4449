"""The terminal: words that wrap, keys that wait, completion, the editor, Ctrl-C, signs of life."""

from __future__ import annotations

import io
import itertools
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import share_kernels
from hypothesis import given
from hypothesis import strategies as st
from serving import url_in

import nanollama

if sys.platform == "win32":
    pytest.skip("pseudo-terminals are POSIX", allow_module_level=True)

import pexpect

from nanollama_extras.commands import terminal
from nanollama_extras.commands.terminal import Wrapped, candidates, num_columns

NEVER = tuple(f"--logit-bias={end}=-100" for end in (1, 3))  # an answer without an end
MOMENTS = 10


# ---- words that wrap -----------------------------------------------------------------------------


class Screen(io.StringIO):
    """A terminal that knows line ends, moves to the left, and clearing to the end of a row."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.column = [""], 0

    def fileno(self) -> int:
        return 1

    def write(self, text: str) -> int:
        for part in re.findall(r"\x1b\[\d*[DKm]|.", text, re.DOTALL):
            row = self.rows[-1]
            if part == "\n":
                self.rows.append("")
                self.column = 0
            elif part.endswith("D") and len(part) > 1:
                self.column -= int(part[2:-1])
            elif part == "\x1b[K":
                self.rows[-1] = row[: self.column]
            elif len(part) == 1:
                self.rows[-1] = row[: self.column] + part + row[self.column + 1 :]
                self.column += 1
        return len(text)


def shown(pieces: list[str], widths: list[int], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The rows of a screen; each piece is written at a width of its own."""
    screen = Screen()
    wrapped = Wrapped(screen)
    for piece, width in zip(pieces, widths):
        size = os.terminal_size((width, 24))
        monkeypatch.setattr(os, "get_terminal_size", lambda *_, size=size: size)
        wrapped.write(piece)
    return screen.rows


words = st.lists(st.text("abcdef", min_size=1, max_size=9), max_size=30)


@given(words, st.integers(12, 40), st.integers(1, 7))
def test_words_stay_whole_and_rows_fit(text: list[str], width: int, size: int) -> None:
    whole = " ".join(text)
    pieces = [whole[i : i + size] for i in range(0, len(whole), size)]
    with pytest.MonkeyPatch.context() as patch:
        rows = shown(pieces, [width] * len(pieces), patch)
    assert " ".join(row.strip() for row in rows).split() == text
    assert all(len(row) < width for row in rows)
    for row, following in itertools.pairwise(rows):  # no row ends before it must
        assert len(row.rstrip()) + 1 + len(following.split()[0]) >= width - 1


def test_after_a_resize_rows_have_the_new_width(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "one two three four five six seven eight nine ten eleven twelve "
    pieces = [text, "\n" + text, "\n" + text]
    rows = shown(pieces, [60, 20, 30], monkeypatch)
    lengths = [len(row.rstrip()) for row in rows if row.strip()]
    assert lengths[0] > 30
    assert max(lengths[2:6]) < 20
    assert 20 < max(lengths[6:]) < 30


def test_a_long_word_and_wide_letters_are_broken_where_the_row_ends(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert shown(["x" * 45], [20], monkeypatch) == ["x" * 19, "x" * 19, "x" * 7]
    assert num_columns("日本e\u0301") == 5
    rows = shown(["日本語" * 6], [21], monkeypatch)
    assert "".join(rows) == "日本語" * 6
    assert all(num_columns(row) < 21 for row in rows)


def test_code_between_fences_keeps_its_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    code = "    print('a long line of code that is wider than the terminal')"
    rows = shown([f"```python\n{code}\n```\n", "a b c d e f g"], [20, 10], monkeypatch)
    assert rows[:3] == ["```python", code, "```"]
    assert rows[3:] == ["a b c d e", "f g"]


def test_a_word_keeps_its_style(monkeypatch: pytest.MonkeyPatch) -> None:
    out = Screen()
    monkeypatch.setattr(os, "get_terminal_size", lambda *_: os.terminal_size((12, 24)))
    written: list[str] = []
    monkeypatch.setattr(out, "write", written.append)
    Wrapped(out).write("\x1b[2mone two three\x1b[0m")
    assert "".join(written).endswith("\x1b[3D\x1b[K\n\x1b[2mthree\x1b[0m")


# ---- completion ----------------------------------------------------------------------------------


def test_what_completes_depends_on_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path / "own"))
    (tmp_path / "talk.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    commands = ["set", "save", "show", "load"]
    assert candidates("", "/s", commands) == ["/set ", "/save ", "/show "]
    assert candidates("/set ", "repeat_", commands) == ["repeat_last_n ", "repeat_penalty "]
    assert candidates("/load ", "ta", commands) == ["talk.json "]
    assert candidates("read ", "fo", commands) == ["folder/"]
    assert candidates("/load ", f"{tmp_path}/ta", commands) == [f"{tmp_path}/talk.json "]
    assert candidates("/load ", "absent/x", commands) == []


# ---- a conversation ------------------------------------------------------------------------------


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """start(*argv) -> the program in a pseudo-terminal of 80 columns."""
    children = []
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    share_kernels(tmp_path / "own")
    monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path / "own"))

    def run(*argv: object) -> Any:
        command = [nanollama.__file__, *map(str, argv)]
        child = pexpect.spawn(
            sys.executable, command, encoding="utf-8", timeout=120, cwd=str(tmp_path)
        )
        child.setwinsize(24, 80)
        children.append(child)
        return child

    yield run
    for child in children:
        child.close(force=True)


@pytest.fixture
def talk(start: Callable[..., Any], tiny: Callable[..., Path]) -> Callable[..., Any]:
    """talk(*flags) -> a conversation at its first prompt, whose answers have no end."""

    def run(*flags: object) -> Any:
        model = tiny("Llama", max_position_embeddings=1_000_000)
        flags = ("--temp", "0", "--threads", "1", "--kernels", "torch", *NEVER, *flags)
        child = start("run", model, *flags)
        child.expect_exact(">>> ")
        return child

    return run


def stop_answer(child: Any) -> None:
    child.sendintr()
    child.expect_exact("(stopped)")


def test_keys_pressed_during_an_answer_wait_for_the_prompt(talk: Callable[..., Any]) -> None:
    child = talk()
    child.send("fox\r")
    child.expect(".{40}")
    child.send("/set max_tok")
    child.expect(".{200}")
    stop_answer(child)
    assert "/set" not in child.before
    child.expect_exact(">>> ")
    child.expect_exact("/set max_tok")
    child.send("ens 3\r")
    child.expect_exact("max_tokens = 3")


def test_tab_completes_commands_and_parameters(talk: Callable[..., Any]) -> None:
    child = talk()
    child.send("/se\ttemper\t0.25\r")
    child.expect_exact("temperature = 0.25")
    child.expect_exact(">>> ")
    child.send("/cl\t\r")
    child.expect_exact("Conversation cleared.")


def test_ctrl_g_opens_the_editor(
    talk: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    editor = tmp_path / "editor"
    editor.write_text('#!/bin/sh\necho " from the editor" >> "$1"\n')
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(editor))
    child = talk("--max-tokens", "3")
    child.send("a draft\x07")
    child.expect_exact("[cut at 3 tokens; --max-tokens N or /continue]")
    child.expect_exact(">>> ")
    child.send("/prompt\r")
    child.expect_exact("user\r\na draft from the editor<|im_end|>")


def test_after_a_resize_an_answer_has_the_new_width(talk: Callable[..., Any]) -> None:
    child = talk("--repeat-penalty", "1.3")
    child.send("fox\r")
    child.expect(r"(.*\r\n){6}")
    child.setwinsize(24, 40)
    child.expect(r"(.*\r\n){4}")
    child.expect(r"(.*\r\n){6}")
    narrow = child.after
    stop_answer(child)
    rows = [re.sub(r"\x1b\[[\d;]*\w", "", row) for row in narrow.split("\r\n")]
    assert max(num_columns(row) for row in rows if "\x1b" not in row) <= 80


def test_a_cut_answer_goes_on(talk: Callable[..., Any]) -> None:
    child = talk("--max-tokens", "5")
    child.send("fox\r")
    child.expect_exact("[cut at 5 tokens; --max-tokens N or /continue]")
    child.expect_exact(">>> ")
    child.send("/continue\r")
    child.expect_exact("[cut at 5 tokens; --max-tokens N or /continue]")
    child.expect_exact(">>> ")
    child.send("/save talk.json\r")
    child.expect_exact("saved 2 messages")


def test_the_speed_line_is_dimmed_and_can_be_left_out(talk: Callable[..., Any]) -> None:
    child = talk("--max-tokens", "3")
    child.send("fox\r")
    child.expect(r"\x1b\[2m\[prefill: .*\]\r\n\x1b\[0m")
    child = talk("--max-tokens", "3", "--quiet")
    child.send("fox\r")
    child.expect_exact("[cut at 3 tokens")
    child.send("/quit\r")
    child.expect_exact("Goodbye!")
    assert "prefill" not in child.before


def test_another_model_goes_on_with_the_conversation(
    talk: Callable[..., Any], tiny: Callable[..., Path]
) -> None:
    child = talk("--max-tokens", "3")
    child.send("fox\r")
    child.expect_exact("[cut at 3 tokens")
    child.expect_exact(">>> ")
    other = tiny("Qwen3", head_dim=32)
    child.send(f"/model {other}\r")
    child.expect_exact(f"model: {other}")
    child.expect_exact(">>> ")
    child.send("/model absent/x.gguf\r")
    child.expect_exact("error: absent/x.gguf")
    child.expect_exact(">>> ")
    child.send("dog\r")
    child.expect_exact("[cut at 3 tokens")
    child.expect_exact(">>> ")
    child.send("/undo\r")
    child.expect_exact("2 messages left")


# ---- Ctrl-C --------------------------------------------------------------------------------------

ENTRY = """
import os, sys
sys.argv[0] = "nanollama"  # as the installed command
os.write(1, b"started")
from nanollama import main
sys.exit(main())
"""


@pytest.mark.parametrize("moment", range(MOMENTS))
def test_ctrl_c_at_any_moment_shows_no_traceback(
    tiny: Callable[..., Path], moment: int, tmp_path: Path
) -> None:
    """From the first line of the program on: what comes before is Python's own start."""
    (tmp_path / "entry.py").write_text(ENTRY)
    model = tiny("Llama", max_position_embeddings=1_000_000)
    flags = ["--model", str(model), "--prompt", "x", "--max-tokens", "1000000", *NEVER]
    root = str(Path(nanollama.__file__).parent)
    child = pexpect.spawn(
        sys.executable,
        [str(tmp_path / "entry.py"), *flags],
        encoding="utf-8",
        codec_errors="replace",  # the last write may end inside a letter
        timeout=120,
        env={**os.environ, "PYTHONPATH": root},
    )
    child.expect_exact("started")
    time.sleep(random.Random(moment).uniform(0.1, 4))
    child.sendintr()
    rest = child.read()
    child.close()
    assert "Traceback" not in rest
    assert "Exception ignored" not in rest
    assert child.exitstatus == 130 or child.signalstatus == signal.SIGINT


def test_the_second_ctrl_c_ends_a_server_at_once(tiny: Callable[..., Path], tmp_path: Path) -> None:
    model = tiny("Llama", max_position_embeddings=1_000_000)
    command = [sys.executable, nanollama.__file__, "serve", str(model), "--port", "0"]
    command += ["--kernels", "torch"]
    env = {**os.environ, "NANOLLAMA_CACHE": str(tmp_path)}
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=env)
    assert server.stderr
    try:
        url = url_in(server.stderr.readline())
        bias = {"1": -100, "3": -100}
        body = json.dumps(
            {"prompt": "x", "max_tokens": 900_000, "stream": True, "logit_bias": bias}
        )
        ask = f"""
import json, time, urllib.request, urllib.error
while True:
    try:
        request = urllib.request.Request({url + "/v1/completions"!r}, {body.encode()!r})
        answer = urllib.request.urlopen(request)
        break
    except urllib.error.HTTPError as error:
        assert error.code == 503
        time.sleep(0.1)
print(answer.readline(), flush=True)
try:
    answer.read()
except Exception:
    pass
"""
        with subprocess.Popen([sys.executable, "-c", ask], stdout=subprocess.PIPE) as client:
            assert client.stdout
            assert client.stdout.readline().startswith(b"b'data:")
            server.send_signal(signal.SIGINT)
            lines = iter(server.stderr.readline, "")
            waits = next(line for line in lines if "waiting" in line)
            assert waits == "waiting up to 30 s for 1 answer; Ctrl-C again stops at once\n"
            server.send_signal(signal.SIGINT)
            rest = server.stderr.read()
            assert (server.wait(), "Traceback" in rest) == (130, False)
    finally:
        server.kill()
        server.wait()


# ---- signs of life -------------------------------------------------------------------------------

SLOW = """
import time
from nanollama_extras.commands.status import activity
with activity("outer"):
    time.sleep({outer})
    with activity(lambda: "inner"):
        time.sleep({inner})
print("done")
"""


def last_row(text: str) -> str:
    """The last row of a terminal after a text with clearings."""
    return text.replace("\r\n", "\n").rstrip("\n").split("\n")[-1].split("\r\x1b[K")[-1]


@pytest.mark.parametrize(
    ("outer", "inner", "seen"), [(0.0, 0.0, set()), (1.0, 0.0, {"outer"}), (0.0, 1.0, {"inner"})]
)
def test_a_slow_start_shows_what_it_does_and_leaves_no_trace(
    outer: float, inner: float, seen: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "xterm")
    code = SLOW.format(outer=outer, inner=inner)
    child = pexpect.spawn(sys.executable, ["-c", code], encoding="utf-8", timeout=60)
    text = child.read()
    assert set(re.findall(r"\x1b\[2m(\w+)\x1b\[0m", text)) >= seen
    assert seen or "outer" not in text
    assert last_row(text) == "done"


def test_loading_says_how_much_is_read(
    tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[str] = []
    status = nanollama.extra("commands.status", "the test")
    with status.loading("fox"):
        show = status.SHOWN[-1]
        note = nanollama.Weights.on_read
        monkeypatch.setattr(
            nanollama.Weights, "on_read", lambda *a: (note(*a), texts.append(show()))
        )
        nanollama.LLM(tiny())
    total = nanollama.human_bytes(nanollama.open_checkpoint(tiny()).num_bytes)
    assert texts[-1] == f"loading fox: {total} of {total}"
    assert len(set(texts)) > 3


def test_a_question_is_not_answered_by_keys_pressed_before_it() -> None:
    code = """
import time
from nanollama_extras.commands.terminal import silent_keys
from nanollama import confirmed
with silent_keys():
    print("go", flush=True)
    time.sleep(1)
    print(confirmed("sure? "))
"""
    child = pexpect.spawn(sys.executable, ["-c", code], encoding="utf-8", timeout=60)
    child.expect_exact("go")
    child.send("y\r")
    child.expect_exact("sure? ")
    child.send("n\r")
    child.expect_exact("n\r\n")
    child.expect_exact("False")


def test_a_stream_that_is_no_terminal_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    assert terminal.wrapped(out) is out
