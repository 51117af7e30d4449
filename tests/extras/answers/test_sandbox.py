"""Grammars on trial: what ends the process that compiles them, and what is kept."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from nanollama import RequestError, WireError
from nanollama_extras.answers import sandbox
from nanollama_extras.answers.sandbox import Kept, Sandbox, Started, on_deep_stack
from nanollama_extras.answers.sandboxed import TOO_DEEP, TOO_LARGE


def chain(num: int) -> str:
    return "start: r0\n" + "".join(f"r{i}: r{i + 1}\n" for i in range(num)) + f'r{num}: "a"\n'


@pytest.fixture(scope="module")
def box() -> Any:
    box = Sandbox()
    yield box
    box.close()


def attempt(box: Sandbox, grammar: str) -> str:
    with box.turn() as run:
        return str(run("begin", grammar=grammar, names=[])["error"])


def test_a_grammar_that_ends_the_process_has_an_error_and_the_next_one_compiles(
    box: Sandbox,
) -> None:
    slow = "start: " + " ".join(['"a"?'] * 20_000)  # time grows with the square
    assert attempt(box, chain(20_000)) == TOO_DEEP
    assert attempt(box, 'start: "a"') == ""
    assert "takes longer than" in attempt(box, slow)
    assert attempt(box, 'start: "a"') == ""


def test_memory_is_limited_where_the_system_can(box: Sandbox) -> None:
    if sys.platform != "linux":
        pytest.skip("RLIMIT_AS is enforced on Linux")
    with box.turn() as run:
        assert run("regex_to_lark", text="a" * 100_000_000, names=[])["error"] == TOO_LARGE
    assert attempt(box, 'start: "a"') == ""


def test_a_process_that_was_ended_from_outside_is_replaced(box: Sandbox) -> None:
    assert attempt(box, 'start: "a"') == ""
    process = box.idle[-1].popen
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert attempt(box, 'start: "a"') == ""


def test_it_waits_for_its_turn_but_not_for_ever(
    box: Sandbox, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sandbox, "WAIT_S", 0.01)
    with box.turn(), box.turn(), pytest.raises(WireError) as caught, box.turn():
        pass
    assert caught.value.status == 503
    assert attempt(box, 'start: "a"') == ""


def test_the_processes_end_with_the_program() -> None:
    code = (
        "from nanollama_extras.answers.sandbox import shared_sandbox as s\n"
        "with s().turn() as run: run('begin', grammar='start: \"a\"', names=[])\n"
        "print(s().idle[0].popen.pid)"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    with pytest.raises(ProcessLookupError):
        os.kill(int(ran.stdout), 0)


def test_a_turn_without_a_task_leaves_a_process_for_the_next_one() -> None:
    box = Sandbox()
    for _ in range(2):
        with box.turn():
            pass
    (waiting,) = box.idle
    assert attempt(box, 'start: "a"') == ""
    assert box.idle == [waiting]
    box.close()


def test_the_library_is_imported_in_part_and_whole_afterwards() -> None:
    code = (
        "import sys; from nanollama_extras.answers.sandbox import compiled_part\n"
        "part = compiled_part('llguidance')\n"
        "assert 'llguidance' not in sys.modules\n"
        "import llguidance\n"
        "assert llguidance.LLMatcher is part.LLMatcher\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_package_without_its_compiled_part_is_named(tmp_path: Path) -> None:
    (tmp_path / "llguidance").mkdir()
    (tmp_path / "llguidance" / "__init__.py").touch()
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from nanollama_extras.answers.sandbox import compiled_part\n"
        "try: compiled_part('llguidance')\n"
        "except Exception as error: print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("PackageError llguidance cannot be imported: ")


def test_what_is_kept_is_made_once_for_all_who_ask_together() -> None:
    made = []

    def make(text: str) -> str:
        made.append(text)
        time.sleep(0.05)
        return text.upper()

    kept = Kept(make, 2)
    with ThreadPoolExecutor(4) as pool:
        assert [*pool.map(kept, "aaaa")] == ["A"] * 4
    assert made == ["a"]
    kept("b"), kept("c"), kept("a")
    assert made == ["a", "b", "c", "a"]
    kept.forget("a")
    kept("a")
    assert made[4:] == ["a"]


def test_a_refusal_is_kept_and_other_errors_are_not() -> None:
    made = []

    def make(text: str) -> str:
        made.append(text)
        raise RequestError("no", "x") if text == "a" else WireError(503, "busy", "later")

    kept = Kept(make, 9)
    for text in "aabb":
        with pytest.raises((RequestError, WireError)) as caught:
            kept(text)
        caught.value.param = "changed"
    assert made == ["a", "b", "b"]


def test_a_deep_stack_is_for_one_function() -> None:
    usual = threading.stack_size()
    assert on_deep_stack(lambda: 3) == 3
    with pytest.raises(ZeroDivisionError):
        on_deep_stack(lambda: 1 // 0)
    assert threading.stack_size() == usual


def test_what_is_started_is_made_once_and_again_after_a_failure() -> None:
    made = list[int]()

    def make() -> int:
        made.append(len(made))
        return 1 // made[-1]  # fails the first time

    started = Started(make)
    with pytest.raises(ZeroDivisionError):
        started()
    assert [started.start().result(), started(), started()] == [1, 1, 1]
    assert made == [0, 1]
