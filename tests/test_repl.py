"""Section 14: the conversation, fed through a pipe and driven through a pseudo-terminal."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import safetensors.torch
from command_line import share_kernels

import nanollama
from nanollama_extras.commands.conversation import Conversation

CUT = re.compile(r"^\[cut at .*\]\n", re.MULTILINE)
SPEED = re.compile(r"^\[prefill: (\d+) tok .*t/s\]$", re.MULTILINE)


class Said(NamedTuple):
    code: int
    answers: list[str]  # the lines of stdout
    notes: str  # stderr without the lines about speed and the length of answers


@pytest.fixture
def talk(
    tiny: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Callable[..., Said]:
    """talk(*lines, flags=()) pipes lines into --interactive with a tiny model.

    Its answers are one line each: a stop text and a bias keep line breaks out of them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path / "own"))
    model = str(tiny())
    capsys.readouterr()

    def run(*lines: str | bytes, flags: tuple[str, ...] = ()) -> Said:
        raw = b"".join((ln if isinstance(ln, bytes) else ln.encode()) + b"\n" for ln in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
        quiet = ("--temp", "0", "--max-tokens", "4", "--stop", "\n", "--stop", "\r")
        code = nanollama.main(["--interactive", "--model", model, *quiet, *flags])
        out, err = capsys.readouterr()
        return Said(code, out.split("\n")[:-1], SPEED.sub("", CUT.sub("", err)))

    return run


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried 3 TB")])
def test_the_chat_goes_on_when_memory_was_short(
    error: Exception, talk: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    usual = talk("hello", "fox").answers
    forward, calls = nanollama.Engine.forward, iter(range(1000))

    def fail_once(engine: nanollama.Engine, work: Any) -> Any:
        if next(calls) == 2:  # while the first answer grows
            raise error
        return forward(engine, work)

    monkeypatch.setattr(nanollama.Engine, "forward", fail_once)
    said = talk("hello", "/clear", "hello", "fox")
    remedy = "take a smaller model, --ctx or --parallel"
    assert f"error: out of memory: {nanollama.first_line(error)}; {remedy}\n" in said.notes
    assert (said.code, said.answers[-2:]) == (0, usual)


def prompt(said: Said) -> str:
    """What /prompt printed, which must have been the last command."""
    return said.notes[said.notes.index("<|im_start|>") : -1]


def turn(role: str, content: str) -> str:
    return f"<|im_start|>{role}\n{content}<|im_end|>\n"


ASK = "<|im_start|>assistant\n"

# ---- through a pipe ------------------------------------------------------------------------------


def test_through_a_pipe_stdout_has_the_answers_alone(talk: Callable[..., Said]) -> None:
    said = talk("fox", "", "   ", "dog")
    assert said.code == 0
    assert len(said.answers) == 2
    assert said.notes.strip() == ""
    assert talk() == (0, [], "")


def test_each_turn_sends_the_whole_conversation(talk: Callable[..., Said]) -> None:
    said = talk("fox", "dog", "/prompt")
    first, _ = said.answers
    assert (
        prompt(said) == turn("user", "fox") + turn("assistant", first) + turn("user", "dog") + ASK
    )


def test_a_message_can_have_several_lines(talk: Callable[..., Said]) -> None:
    said = talk('"""', "one", "", '/exit is text here"""', "/prompt")
    assert prompt(said) == turn("user", "one\n\n/exit is text here") + ASK
    assert prompt(talk('"""one"""', "/prompt")) == turn("user", "one") + ASK


def test_a_message_that_is_never_closed_is_not_sent(talk: Callable[..., Said]) -> None:
    said = talk("fox", '"""', "one")
    assert len(said.answers) == 1
    assert said.notes.strip() == 'error: the message was not sent: no """ closed it'


@pytest.mark.parametrize("word", ["/quit", "/exit", "quit", "exit", "EXIT", "/quit now", "/bye"])
def test_a_word_leaves(talk: Callable[..., Said], word: str) -> None:
    assert talk(word, "fox") == (0, [], "")


@pytest.mark.parametrize("word", ["clear", "/clear", "Clear"])
def test_clear_forgets_the_conversation_and_keeps_the_system_prompt(
    talk: Callable[..., Said], word: str
) -> None:
    said = talk("fox", word, "dog", "/prompt", flags=("--system", "Be brief."))
    assert "Conversation cleared." in said.notes
    assert prompt(said) == turn("system", "Be brief.") + turn("user", "dog") + ASK


def test_help_names_every_command(talk: Callable[..., Said]) -> None:
    notes = talk("/help").notes
    commands = [name[3:] for name in dir(Conversation) if name.startswith("do_")]
    assert len(commands) > 15
    assert all(f"/{name}" in notes for name in [*commands, "exit"])
    assert talk("/?").notes == notes
    assert '"""' in notes


def test_without_tools_the_list_says_how_to_get_some(talk: Callable[..., Said]) -> None:
    assert talk("/tools").notes.strip().startswith("no tools; start again with --tools FILE")


def test_an_unknown_command_is_reported(talk: Callable[..., Said]) -> None:
    said = talk("/hlep", "fox")
    assert said.notes.strip() == "error: unknown command /hlep; /help lists the commands"
    assert len(said.answers) == 1


def test_a_path_is_a_message(talk: Callable[..., Said]) -> None:
    assert prompt(talk("/usr/bin what", "/prompt")) == turn("user", "/usr/bin what") + ASK


def test_the_system_prompt_can_be_shown_and_changed(talk: Callable[..., Said]) -> None:
    said = talk("/system", "/system Be kind.", "fox", "/system", "/prompt")
    assert "system: (none)\nsystem: Be kind.\n\nsystem: Be kind.\n" in said.notes
    assert prompt(said) == turn("system", "Be kind.") + turn("user", "fox") + ASK


def test_parameters_can_be_set(talk: Callable[..., Said]) -> None:
    one, four = talk("/set max_tokens 1", "fox").answers, talk("fox").answers
    assert four[0].startswith(one[0])
    assert one != four
    notes = talk("/set temp 0.25", "/set top-k 7", '/set stop "A B"', "/show").notes
    for line in (r"temperature +0\.25", r"top_k +7", r"stop +\['A B'\]"):
        assert re.search(rf"^  {line}  \(now\)$", notes, re.MULTILINE)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/set", "/set needs a name and a value, as in /set temperature 0.2"),
        ("/set temperature", "/set needs a name and a value"),
        ("/set temprature 1", "unknown parameter 'temprature'; did you mean temperature?"),
        ("/set temperature hot", "temperature is 'hot'; it must be a number"),
        ("/set top_k -2", "top_k is -2"),
        ('/set stop ""', "stop is ('',)"),
        ("/set mirostat 2", "mirostat 2 is not supported; leave it out, or set it to 0"),
        ("/set num_ctx 9", "num_ctx cannot change now; start again with --ctx 9"),
        ("/load", "/load: no such file"),
        ("/load absent.json", "absent.json: no such file"),
        ("/load .", ".: no such file"),
        ("/load broken.json", "broken.json: not readable as JSON"),
        ("/load other.json", "other.json: holds no list of messages as /save writes it"),
        ("/save", "/save needs a file name"),
        ("/save absent/x", "error: absent/x: cannot be written: No such file or directory"),
        ("/save ~\0", "cannot be written: "),
        ("/undo", "there is no message yet"),
        ("/retry", "there is no message yet"),
        ("x" * 300, "the prompt has 3"),
    ],
)
def test_an_error_is_one_line_and_the_session_goes_on(
    talk: Callable[..., Said], tmp_path: Path, line: str, message: str
) -> None:
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "other.json").write_text('{"messages": [{"role": "user"}]}')
    said = talk(line, "fox")
    (error,) = said.notes.strip().splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert said.answers == talk("fox").answers


def test_show_describes_the_model(talk: Callable[..., Said], tiny: Callable[..., Path]) -> None:
    notes = talk("/show").notes
    assert re.search(rf"^path +{re.escape(str(tiny()))}$", notes, re.MULTILINE)
    assert re.search(r"^template +ChatML", notes, re.MULTILINE)
    assert re.search(r"^  temperature +0\.0  \(flag\)$", notes, re.MULTILINE)
    assert re.search(r"^  top_p +0\.9  \(built-in\)$", notes, re.MULTILINE)


def test_a_conversation_is_saved_and_loaded(talk: Callable[..., Said], tmp_path: Path) -> None:
    said = talk("fox", "/save chat.json", "dog")
    saved = json.loads((tmp_path / "chat.json").read_text(encoding="utf-8"))
    assert saved["messages"] == [
        {"role": "user", "content": "fox"},
        {"role": "assistant", "content": said.answers[0]},
    ]
    assert talk("other", "/load chat.json", "dog").answers[1] == said.answers[1]


@pytest.mark.parametrize(
    ("cut", "new", "whole"),
    [
        ({"content": "The c"}, {"content": "at."}, {"content": "The cat."}),
        (
            {"content": "", "reasoning_content": "The c"},
            {"content": "Yes.", "reasoning_content": "at sat."},
            {"content": "Yes.", "reasoning_content": "The cat sat."},
        ),
    ],
)
def test_a_cut_answer_goes_on_where_it_ended(
    talk: Callable[..., Said],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    cut: dict[str, str],
    new: dict[str, str],
    whole: dict[str, str],
) -> None:
    said = [{"role": "user", "content": "fox"}, {"role": "assistant", **cut}]
    (tmp_path / "cut.json").write_text(json.dumps({"messages": said}))
    requests: list[nanollama.GenerationRequest] = []

    def answer(_: Any, llm: Any, request: Any, *rest: Any, **options: Any) -> list[Any]:
        requests.append(request)
        return [{"role": "assistant", **new}]

    monkeypatch.setattr("nanollama_extras.commands.conversation.print_answers", answer)
    talk("/load cut.json", "/continue", "/save whole.json")
    assert requests[0].messages == said
    saved = json.loads((tmp_path / "whole.json").read_text(encoding="utf-8"))["messages"]
    assert saved[-1] == {"role": "assistant", **whole}


def test_another_model_takes_the_memory_of_the_old_one(
    talk: Callable[..., Said], tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[Any] = []  # weak references to the decoders
    alive: list[int] = []  # of these, while another one is loaded
    load = nanollama.Settings.load

    def counted(settings: Any, *args: Any, **options: Any) -> Any:
        alive.append(sum(each() is not None for each in loaded))
        llm = load(settings, *args, **options)
        loaded.append(weakref.ref(llm.engine.decoder))
        return llm

    monkeypatch.setattr(nanollama.Settings, "load", counted)
    other = tiny("Qwen3", head_dim=32)
    broken = tiny("Qwen3", head_dim=16).parent / "broken"
    shutil.copytree(other, broken)
    weights = safetensors.torch.load_file(broken / "model.safetensors")
    del weights["model.norm.weight"]
    safetensors.torch.save_file(weights, broken / "model.safetensors")
    said = talk("fox", f"/model {other}", f"/model {broken}", "/model absent/x.gguf", "/model", "a")
    assert alive == [0, 0, 0, 0]  # the second one again, behind the broken one
    assert said.notes.count(f"model: {other}\n") == 2
    assert "model.norm.weight" in said.notes
    assert len(said.answers) == 2


def test_ctrl_c_while_the_prompt_is_prepared_keeps_the_turn(
    talk: Callable[..., Said], monkeypatch: pytest.MonkeyPatch
) -> None:
    prepare, interrupts = nanollama.LLM.prepare, iter([KeyboardInterrupt])

    def prepare_or_stop(self: nanollama.LLM, request: nanollama.GenerationRequest) -> Any:
        for interrupt in interrupts:
            raise interrupt
        return prepare(self, request)

    monkeypatch.setattr(nanollama.LLM, "prepare", prepare_or_stop)
    said = talk("fox", "/retry")
    assert said.notes.count("(stopped)") == 1
    assert len(said.answers) == 1


def test_retry_answers_the_last_message_again(talk: Callable[..., Said]) -> None:
    flags = ("--temp", "1.5", "--seed", "7", "--max-tokens", "9")
    said = talk("fox", "/retry", "/retry", "/prompt", flags=flags)
    assert len(set(said.answers)) == 3
    assert said.answers == talk("fox", "/retry", "/retry", flags=flags).answers
    assert prompt(said) == turn("user", "fox") + ASK


def test_undo_takes_back_the_last_turn(talk: Callable[..., Said]) -> None:
    said = talk("fox", "dog", "/undo", "cat", "/prompt")
    first = said.answers[0]
    assert (
        prompt(said) == turn("user", "fox") + turn("assistant", first) + turn("user", "cat") + ASK
    )
    assert "2 messages left" in said.notes


def test_prompt_and_tokens_show_what_was_sent(
    talk: Callable[..., Said], tiny_llm: nanollama.LLM
) -> None:
    notes = talk("fox", "/tokens").notes
    messages = [{"role": "user", "content": "fox"}]
    ids = tiny_llm.prompt_ids(nanollama.GenerationRequest(messages=messages))
    assert [int(i) for i in re.findall(r"(\d+):'", notes)] == ids
    assert f"{len(ids)} tokens" in notes
    assert tiny_llm.render(messages) in talk("fox", "/prompt").notes


def test_text_that_is_not_utf_8_does_not_end_the_session(talk: Callable[..., Said]) -> None:
    said = talk("fox", b"\xff\xfe", "dog")
    assert (said.code, len(said.answers)) == (0, 3)


def test_when_the_context_is_full_the_oldest_turns_go(talk: Callable[..., Said]) -> None:
    words = [f"{number:02d} " + "x" * 60 for number in range(5)]
    said = talk(*words, "/prompt")
    assert len(said.answers) == 5
    assert "the context of 256 tokens is full: dropped the oldest 2 messages" in said.notes
    assert "04 x" in prompt(said)
    assert "00 x" not in prompt(said)


def test_the_second_turn_processes_only_what_is_new(
    smollm2_llm: nanollama.LLM, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nanollama.Settings, "load", lambda self: smollm2_llm)
    lines = b"Name the capital of France.\nAnd of Italy?\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), encoding="utf-8"))
    assert nanollama.main(["--interactive", "--temp", "0", "--max-tokens", "7"]) == 0
    out, err = capsys.readouterr()
    first, second = out.split("\n")[:2]
    assert first == "The capital of France is Paris."
    messages = [{"role": "user", "content": "Name the capital of France."}]
    start = len(smollm2_llm.prompt_ids(nanollama.GenerationRequest(messages=messages)))
    messages += [{"role": "assistant", "content": first}]
    messages += [{"role": "user", "content": "And of Italy?"}]
    whole = len(smollm2_llm.prompt_ids(nanollama.GenerationRequest(messages=messages)))
    assert second
    assert int(SPEED.findall(err)[1]) <= whole - start - 6  # 7 tokens, the last not processed yet


# ---- through a terminal --------------------------------------------------------------------------

pexpect: Any = pytest.importorskip("pexpect")
if sys.platform == "win32":
    pytest.skip("pseudo-terminals are POSIX", allow_module_level=True)


@pytest.fixture
def terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """terminal(*flags) -> --interactive in a pseudo-terminal, at its first prompt."""
    spawned = []
    monkeypatch.setenv("TERM", "dumb")  # readline then sends no control sequences
    share_kernels(tmp_path / "own")
    monkeypatch.setenv("NANOLLAMA_CACHE", str(tmp_path / "own"))

    def run(*flags: object) -> Any:
        command = [nanollama.__file__, "--interactive", "--threads", "1", *map(str, flags)]
        spawned.append(pexpect.spawn(sys.executable, command, encoding="utf-8", timeout=120))
        spawned[-1].expect_exact(">>> ")
        return spawned[-1]

    yield run
    for child in spawned:
        child.close(force=True)


def test_a_conversation_in_a_terminal(
    terminal: Callable[..., Any], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """Ctrl-C stops an answer that would never end, and the session goes on."""
    never = [f"--logit-bias={end}=-100" for end in (1, 3)]
    model = tiny("Llama", max_position_embeddings=1_000_000)
    child = terminal("--model", model, "--temp", "0", "--max-tokens", "500000", *never)
    child.sendline("fox")
    child.expect_exact("fox\r\n")
    child.expect(".{20}")  # it is answering
    child.sendintr()
    child.expect_exact("(stopped)")
    child.expect(r"\[prefill: \d+ tok @ .*decode: \d+ tok @ .*\]")
    child.expect_exact(">>> ")
    child.sendline("/set max_tokens 3")
    child.expect_exact("max_tokens = 3")
    child.expect_exact(">>> ")
    child.sendline("/undo")
    child.expect_exact("0 messages left")
    child.expect_exact(">>> ")
    child.sendline('"""the quick')
    child.expect_exact("... ")
    child.sendline('brown"""')
    child.expect(r"\[prefill: ")
    child.expect_exact(">>> ")
    child.sendline("/prompt")
    child.expect_exact("the quick\r\nbrown<|im_end|>")
    child.expect_exact(">>> ")
    child.sendintr()
    child.expect_exact("(Ctrl-D or /quit leaves)")
    child.expect_exact(">>> ")
    child.sendeof()
    child.expect_exact("Goodbye!")
    child.expect(pexpect.EOF)
    child.wait()
    assert (child.exitstatus, child.signalstatus) == (0, None)
    history = (tmp_path / "own" / "history").read_text()
    assert "/set max_tokens 3" in history.splitlines()

    child = terminal("--model", model)
    child.send("\x10")  # Ctrl-P: the line before, of the last session
    child.expect_exact("/prompt")
    child.sendintr()
    child.expect_exact(">>> ")
    child.sendline("exit")
    child.expect_exact("Goodbye!")


def test_pasted_lines_are_one_message(
    terminal: Callable[..., Any], tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A terminal puts brackets around a paste: https://invisible-island.net/xterm/xterm-paste64.html"""
    monkeypatch.setenv("TERM", "xterm")
    child = terminal("--model", tiny(), "--temp", "0", "--max-tokens", "2")
    child.send("\x1b[200~one\rtwo\rthree\x1b[201~")
    child.send("\r")
    child.expect(r"\[prefill: ")
    child.send("/prompt\r")
    child.expect_exact("one\r\ntwo\r\nthree<|im_end|>")
    child.sendline("/quit")
    child.expect_exact("Goodbye!")


def test_the_real_model_in_a_terminal(terminal: Callable[..., Any], smollm2: Path) -> None:
    child = terminal("--model", smollm2, "--temp", "0", "--max-tokens", "7")
    child.sendline("Name the capital of France.")
    child.expect_exact("The capital of France is Paris.")
    child.expect_exact(">>> ")
    child.sendeof()
    child.expect(pexpect.EOF)
    assert "\x1b" not in child.before
