"""--tools: functions of a file as tools, asked for, run, and told to the model."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
from command_line import share_kernels
from scripted_program import DRIVER

import nanollama
from nanollama import Delta, GenerationRequest, UsageError
from nanollama_extras.answers import toolbox
from nanollama_extras.answers.toolbox import Toolbox
from nanollama_extras.answers.tools import TOOL_FORMATS

pexpect: Any = pytest.importorskip("pexpect")

FILE = '''
"""Tools."""
from __future__ import annotations
from dataclasses import dataclass
from json import dumps  # not a tool: it comes from elsewhere

@dataclass
class Place:
    name: str

def weather(city: str, days: int = 1) -> str:
    """The weather somewhere.

    Args:
        city: its name
        days (int): how many
    """
    print("not on stdout")
    return f"sunny in {Place(city).name} for {days}"

def divide(a: float, b: float) -> dict:
    if not a:
        raise SystemExit("nothing to divide")
    return {"result": a / b}

def _helper():
    pass
'''


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my_tools.py"
    path.write_text(FILE, encoding="utf-8")
    return path


def documented(
    a: str,
    b: int | None,
    c: Literal["x", "y"] = "x",
    d: list[dict[str, float]] | None = None,
    *,
    e: bool = False,
    f: Any = None,
    g: list = [],  # noqa: B006
    h: dict[str, Any] | None = None,
) -> None:
    """What it does,
    in two lines.

    Args:
        a: the first
        c (str): the third
    """


def test_hints_and_docstrings_become_a_schema() -> None:
    function = nanollama.function_tool(documented)["function"]
    assert function["name"] == "documented"
    assert function["description"] == "What it does,\nin two lines."
    shape = function["parameters"]
    assert shape["required"] == ["a", "b"]
    null, numbers = {"type": "null"}, {"type": "object", "additionalProperties": {"type": "number"}}
    assert shape["properties"] == {
        "a": {"type": "string", "description": "the first"},
        "b": {"anyOf": [{"type": "integer"}, null]},
        "c": {"enum": ["x", "y"], "description": "the third"},
        "d": {"anyOf": [{"type": "array", "items": numbers}, null]},
        "e": {"type": "boolean"},
        "f": {},
        "g": {"type": "array"},
        "h": {"anyOf": [{"type": "object", "additionalProperties": {}}, null]},
    }


def test_a_file_gives_its_own_public_functions(file: Path) -> None:
    box = Toolbox(str(file))
    assert list(box.functions) == ["weather", "divide"]
    weather = box.tools[0]["function"]["parameters"]
    assert weather["properties"]["days"] == {"type": "integer", "description": "how many"}


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("x = 1", "holds no functions"),
        ("1 / 0", "ZeroDivisionError"),
        ("def f(:", "SyntaxError"),
        ("raise SystemExit(3)", "SystemExit"),
        ("def f(x): pass", "argument x: a hint is needed"),
        ("def f(x: bytes): pass", "argument x: bytes"),
        ("def f(*x: int): pass", "*x: int"),
        ("def f(x: Unknown): pass", "Unknown"),
        (None, "FileNotFoundError"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_line(
    tmp_path: Path, source: str | None, reason: str
) -> None:
    path = tmp_path / "bad.py"
    if source is not None:
        path.write_text(source)
    with pytest.raises(UsageError) as caught:
        Toolbox(str(path))
    assert reason in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# ---- the loop, with a model that says what a script says -----------------------------------------


def spelled(name: str, **arguments: Any) -> str:
    return TOOL_FORMATS["hermes"].spell([(name, json.dumps(arguments))])


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[GenerationRequest]]:
    """script(answer, ..): what the model says, turn by turn -> the requests it gets."""

    def install(*answers: str) -> list[GenerationRequest]:
        left, asked = list(answers), []

        def stream(self: nanollama.LLM, prepared: nanollama.Prepared) -> Iterator[Delta]:
            asked.append(prepared.request)
            text = left.pop(0) if len(left) > 1 else left[0]
            yield Delta(0, text[:9])
            yield Delta(0, text[9:], finish_reason="stop")

        monkeypatch.setattr(nanollama.LLM, "stream", stream)
        return asked

    return install


def ask(tiny: Path, file: Path, *flags: str) -> int:
    words = ["--model", str(tiny), "--chat", "--prompt", "Weather?", "--tools", str(file), *flags]
    return nanollama.main(words)


def test_calls_are_run_and_their_results_go_back(
    tiny: Callable[..., Path], file: Path, script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = script("Let me see." + spelled("weather", city="Bern"), "It is sunny.")
    assert ask(tiny(), file, "--yes-tools") == 0
    out, err = capsys.readouterr()
    assert out == "Let me see.\nIt is sunny.\n"
    assert 'weather(city="Bern") -> ' in err
    assert "not on stdout" in err
    assert [tool["function"]["name"] for tool in asked[0].tools] == ["weather", "divide"]
    question, call, result = asked[1].messages
    assert question == {"role": "user", "content": "Weather?"}
    assert call["content"] == "Let me see."
    assert result["tool_call_id"] == call["tool_calls"][0]["id"]
    assert result["content"] == "sunny in Bern for 1"


def test_a_tool_that_fails_tells_the_model(
    tiny: Callable[..., Path], file: Path, script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    calls = [spelled("divide", a=1, b=0), spelled("divide", a=1, b=4), spelled("divide", a=0, b=1)]
    asked = script(*calls, "Done.")
    assert ask(tiny(), file, "--yes-tools") == 0
    results = [m["content"] for m in asked[3].messages if m["role"] == "tool"]
    assert results[0].startswith("ZeroDivisionError: ")
    assert results[1:] == ['{"result": 0.25}', "SystemExit: nothing to divide"]
    assert capsys.readouterr().out == "Done.\n"


def test_nothing_is_run_when_nobody_can_be_asked(
    tiny: Callable[..., Path], file: Path, script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = script(spelled("weather", city="Bern"), "Then not.")
    assert ask(tiny(), file) == 0
    assert asked[1].messages[-1]["content"] == "The user did not allow this call."
    out, err = capsys.readouterr()
    assert out == "Then not.\n"
    assert "was not run: no terminal to ask on" in err
    assert "sunny" not in err


def test_a_model_that_calls_for_ever_is_stopped(
    tiny: Callable[..., Path], file: Path, script: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = script(spelled("weather", city="Bern"))
    assert ask(tiny(), file, "--yes-tools") == 0
    assert len(asked) == toolbox.MAX_ROUNDS
    assert "no answer after" in capsys.readouterr().err


def test_tools_need_a_chat(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--prompt", "x"], ["--serve"], ["--batch-file", "x", "--chat"]):
        assert nanollama.main([*words, "--tools", str(file)]) == 2
        assert "--tools needs" in capsys.readouterr().err


def test_on_a_terminal_each_call_is_asked_for(
    tiny: Callable[..., Path], file: Path, tmp_path: Path
) -> None:
    """In a conversation: yes, then no; the transcript holds both."""
    answers = [
        spelled("weather", city="Bern") + "\n" + spelled("weather", city="\x1b[2J"),
        "Sunny.",
        "You are welcome.",
    ]
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER.format(answers=answers))
    words = [str(driver), "--model", str(tiny()), "--interactive", "--tools", str(file)]
    env = {**nanollama.os.environ, "PYTHONPATH": str(Path(nanollama.__file__).parent)}
    env |= {"TERM": "dumb", "NANOLLAMA_CACHE": str(tmp_path)}
    share_kernels(tmp_path)
    child = pexpect.spawn(sys.executable, words, encoding="utf-8", timeout=120, env=env)
    try:
        child.expect(">>> ")
        child.sendline("Weather?")
        child.expect_exact('Run weather(city="Bern")? [y/N] ')
        child.sendline("y")
        child.expect_exact("sunny in Bern")
        child.expect_exact(r'Run weather(city="\u001b[2J")? [y/N] ')
        child.sendline("")
        child.expect_exact("was not run")
        child.expect_exact("Sunny.")
        child.expect(">>> ")
        child.sendline(f"/save {tmp_path / 'talk.json'}")
        child.expect("saved 5 messages")
        child.sendline("/undo")
        child.expect("0 messages left")
        child.sendline("/quit")
        child.expect(pexpect.EOF)
    finally:
        child.close(force=True)
