"""Section 14: the command line: flags, streams, exit codes, batch files, bad input."""

from __future__ import annotations

import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from command_line import Ran

import nanollama
from nanollama import AnswerPrinter, Delta

SPEED = re.compile(r"\[prefill: (\d+) tok @ \d+ t/s \| decode: (\d+) tok @ \d+\.\d t/s\]")


pytestmark = pytest.mark.usefixtures("empty_caches")

# ---- the reference -------------------------------------------------------------------------------

EXAMPLES = """
python nanollama.py list
python nanollama.py rm deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B
python nanollama.py --prompt "The meaning of life is"
python nanollama.py --prompt "What is the capital of France?" --chat
python nanollama.py --interactive
python nanollama.py --interactive --system "You are a helpful coding assistant."
python nanollama.py --prompt "What is 2+2?" --temp 0
python nanollama.py --prompt "Once upon a time" --temp 1.5
python nanollama.py --prompt "Hello" --top-k 10
python nanollama.py --prompt "Hello" --top-p 0.8
python nanollama.py --prompt "Hello" --repeat-penalty 1.3
python nanollama.py --prompt "Hello" --max-tokens 30 --device cpu
python nanollama.py --prompt "Hello" --model TinyLlama/TinyLlama-1.1B-Chat-v1.0
python nanollama.py --prompt "Hello" --chat --dtype float16
python nanollama.py --prompt "Hello" --chat --quantize q8
python nanollama.py --prompt "Hello" --chat --quantize q4
python nanollama.py --prompt "Hello" --chat --compile
python nanollama.py --batch-file prompts.txt --chat --dtype float16
python nanollama.py --model path/to/model.gguf --tokenizer deepseek-ai/\
DeepSeek-R1-Distill-Qwen-1.5B --prompt "Hello" --chat --dtype float16
python nanollama.py --modelfile my.mf --prompt "Hello" --chat --dtype float16
""".strip().splitlines()


@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_of_the_reference_runs(
    cli: Callable[..., Ran],
    example: str,
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With a tiny model in the place of the large ones."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.txt").write_text("one\ntwo\n")
    (tmp_path / "my.mf").write_text(
        f"FROM {tiny()}\nPARAMETER temperature 0.7\nPARAMETER top_k 50\n"
        "SYSTEM You are a helpful coding assistant.\n"
    )
    monkeypatch.setattr(nanollama, "DEFAULT_MODEL", str(tiny()))
    argv = shlex.split(example)[2:]
    if argv[0] == "list":
        assert cli(*argv).code == 0
    elif argv[0] == "rm":
        assert cli(*argv).error.endswith("not in the cache; cached: nothing")
    else:
        models = "TinyLlama/TinyLlama-1.1B-Chat-v1.0 path/to/model.gguf deepseek-ai/".split()
        local = [str(tiny()) if a.startswith(tuple(models)) else a for a in argv]
        ran = cli(*local, "--max-tokens", "5", stdin=b"Hello\n")
        assert ran.code == 0
        assert ran.out.endswith("\n")
        assert SPEED.fullmatch(ran.err.splitlines()[-1])


def test_the_defaults_are_those_of_the_reference() -> None:
    args = nanollama.build_parser().parse_args(["--prompt", "x"])
    settings = nanollama.read_settings(args)
    assert settings.model == "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
    params = settings.params({})
    assert (params.temperature, params.top_k, params.top_p) == (0.7, 50, 0.9)
    assert (params.repeat_penalty, params.max_tokens) == (1.1, 200)
    assert nanollama.EngineConfig().dtype == "float32"


@pytest.mark.parametrize(
    ("short", "long"),
    [
        ("-p hi", "--prompt hi"),
        ("-p x -t 0.5", "--prompt x --temp 0.5"),
        ("-p x --temperature 0.5", "--prompt x --temp 0.5"),
        ("-p x -k 5", "--prompt x --top-k 5"),
        ("-p x -m 5", "--prompt x --max-tokens 5"),
        ("-p x -d bfloat16", "--prompt x --dtype bfloat16"),
        ("-p x --device-type cpu", "--prompt x --device cpu"),
        ("-p x --quantize Q8", "--prompt x --quantize q8"),
    ],
)
def test_the_chat_tools_spellings_mean_the_same(short: str, long: str) -> None:
    parse = nanollama.build_parser().parse_args
    assert parse(short.split()) == parse(long.split())


def test_every_command_explains_itself(cli: Callable[..., Ran]) -> None:
    for command in nanollama.COMMANDS:
        ran = cli(command, "--help")
        assert (ran.code, ran.err) == (0, "")
        assert ran.out.startswith(f"usage: nanollama.py {command.replace('ls', 'list')}")
    assert cli("--version").out == f"nanollama {nanollama.__version__}\n"


# ---- one answer ----------------------------------------------------------------------------------


def test_stdout_carries_the_text_alone(
    cli: Callable[..., Ran], tiny: Callable[..., Path], tiny_llm: nanollama.LLM
) -> None:
    ran = cli("--model", tiny(), "--prompt", "the quick", "--max-tokens", "9", "--temp", "0")
    params = nanollama.SamplingParams(temperature=0, max_tokens=9)
    request = nanollama.GenerationRequest("the quick", params=params)
    completion = tiny_llm.complete(request)
    assert ran.out == completion.text + "\n"
    speed = SPEED.fullmatch(ran.err.splitlines()[-1])
    assert speed
    assert int(speed[1]) == len(tiny_llm.encode("the quick"))
    assert int(speed[2]) == completion.usage.completion_tokens - 1  # the first comes with prefill


def test_the_real_model_answers(cli: Callable[..., Ran], smollm2: Path) -> None:
    question = ("--prompt", "Name the capital of France.", "--max-tokens", "8")
    ran = cli("--model", smollm2, "--chat", *question, "--temp", "0", "--stop", ".")
    assert ran.out == "The capital of France is Paris\n"


def test_the_same_seed_gives_the_same_text(
    cli: Callable[..., Ran], tiny: Callable[..., Path]
) -> None:
    def text(*flags: str) -> str:
        return cli("--model", tiny(), "-p", "fox", "-t", "1.5", "-m", "12", *flags).out

    assert text("--seed", "1") == text("--seed", "1") != text("--seed", "2")
    assert text() != text()


def test_an_answer_ends_before_any_stop_text(
    cli: Callable[..., Ran], tiny: Callable[..., Path]
) -> None:
    command = ("--model", tiny(), "-p", "fox", "-t", "0", "-m", "20")
    whole = cli(*command).out[:-1]
    late, early = whole[9:11], whole[5:7]
    cut = cli(*command, "--stop", late, "--stop", early).out[:-1]
    assert cut == whole[: min(whole.index(late), whole.index(early))]


def test_a_biased_token_is_never_chosen(
    cli: Callable[..., Ran], tiny: Callable[..., Path], tiny_llm: nanollama.LLM
) -> None:
    command = ("--model", tiny(), "-p", "fox", "-t", "0", "-m", "1")
    params = nanollama.SamplingParams(temperature=0, max_tokens=1)
    (first,) = tiny_llm.complete(nanollama.GenerationRequest("fox", params=params)).token_ids
    assert cli(*command, "--logit-bias", f"{first}=-100").out != cli(*command).out


@pytest.mark.parametrize("stdin", [b"fox", b"fox\n", b"fox\r\n", b"\xef\xbb\xbffox\n"])
def test_a_dash_reads_the_prompt_from_stdin(
    cli: Callable[..., Ran], tiny: Callable[..., Path], stdin: bytes
) -> None:
    flags = ("--model", tiny(), "--temp", "0", "--max-tokens", "5")
    assert cli(*flags, "--prompt", "-", stdin=stdin).out == cli(*flags, "--prompt", "fox").out


def test_the_system_prompt_belongs_to_chat(
    cli: Callable[..., Ran], tiny: Callable[..., Path]
) -> None:
    flags = ("--model", tiny(), "--temp", "0", "--max-tokens", "5", "--prompt", "fox")
    system = ("--system", "Be brief.")
    assert cli(*flags, "--chat").out != cli(*flags, "--chat", *system).out
    ignored = cli(*flags, *system)
    assert ignored.out == cli(*flags).out
    assert "with --chat only" in ignored.err


def test_the_modelfile_is_used(
    cli: Callable[..., Ran], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "Modelfile"
    path.write_text(f"FROM {tiny()}\nPARAMETER temperature 0\nPARAMETER num_predict 4\nSYSTEM Hi")
    flags = ("--model", tiny(), "--temp", "0", "--max-tokens", "4", "--system", "Hi")
    prompt = ("--chat", "--prompt", "fox")
    assert cli("--modelfile", path, *prompt).out == cli(*flags, *prompt).out


def test_ctrl_c_ends_with_130(tiny: Callable[..., Path]) -> None:
    running = endless(tiny)
    assert running.stdout
    running.stdout.read(1)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate()
    assert running.returncode == 130
    assert out.endswith(b"\n")
    assert err == b"interrupted\n"


def test_a_reader_that_leaves_is_no_error(tiny: Callable[..., Path]) -> None:
    running = endless(tiny)
    assert running.stdout
    assert running.stderr
    running.stdout.read(20)
    running.stdout.close()
    assert running.stderr.read() == b""
    assert running.wait() == 0


def endless(tiny: Callable[..., Path]) -> subprocess.Popen[bytes]:
    """A run in a process of its own whose answer has no end."""
    never = [f"--logit-bias={end}=-100" for end in (1, 3)]
    flags = ["--prompt", "x", "--max-tokens", "1000000", "--threads", "1", *never]
    model = str(tiny("Llama", max_position_embeddings=1_000_000))
    command = [sys.executable, nanollama.__file__, "--model", model, *flags]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
def test_a_full_disk_under_stdout_is_one_line(tmp_path: Path) -> None:
    alias = tmp_path / "own" / "models" / "smollm2" / nanollama.ALIASES["smollm2"].file
    alias.parent.mkdir(parents=True)
    alias.touch()
    with open("/dev/full", "w") as full:
        command = [sys.executable, nanollama.__file__, "list"]
        ran = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr == "error: cannot write: No space left on device\n"


@pytest.mark.parametrize("closed", ["0<&-", "1>&-", "2>&-"])
def test_a_closed_stream_is_an_empty_one(tiny: Callable[..., Path], closed: str) -> None:
    flags = ("--model", str(tiny()), "--prompt", "-" if "<" in closed else "x", "--max-tokens", "1")
    command = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, nanollama.__file__, *flags]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == ("<" in closed)
    expected = {"0": ["error: "], "1": ["[cut at ", "[prefill: "], "2": []}[closed[0]]
    assert all(map(str.startswith, ran.stderr.splitlines(), expected))
    assert len(ran.stderr.splitlines()) == len(expected)


# ---- thoughts ------------------------------------------------------------------------------------


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(pieces: list[str], out: io.StringIO, hide: bool, prompt: str = "") -> AnswerPrinter:
    splitter = nanollama.AnswerSplitter(prompt, keep_tags=True)
    printer = AnswerPrinter(splitter, hide, out)
    for piece in pieces[:-1]:
        printer.push(Delta(0, piece))
    printer.push(Delta(0, pieces[-1], finish_reason="stop"))
    return printer


PIECES = ["<thi", "nk>Let me", " see.</th", "ink>\n\nParis", " it is"]


def test_thoughts_are_dimmed_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    out = Terminal()
    shown(PIECES, out, hide=False)
    dimmed = "".join(re.findall(r"\x1b\[2m(.*?)\x1b\[0m", out.getvalue()))
    assert dimmed == "<think>Let me see.</think>"
    assert re.sub(r"\x1b\[2m.*?\x1b\[0m", "", out.getvalue()) == "\n\nParis it is"


@pytest.mark.parametrize(("name", "value"), [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_thoughts_are_not_dimmed_where_colours_are_off(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    out = Terminal()
    shown(PIECES, out, hide=False)
    assert out.getvalue() == "".join(PIECES)


CONTROLS = ["\x1b]0;own", "ed\x07\x1b[2J", "\x9bA\x00\x7f", "one\rtwo\r\n", "\tü\n"]


def test_a_terminal_shows_escape_sequences_and_does_not_obey_them() -> None:
    out = Terminal()
    shown(CONTROLS, out, hide=False)
    first = r"\u001b]0;owned\u0007\u001b[2J\u009bA\u0000\u007f"
    assert out.getvalue() == first + "onetwo\n\tü\n"
    out = Terminal()
    shown(["<think>\x1b[8m", "</think>"], out, hide=False)
    assert r"\u001b[8m" in out.getvalue()


def test_a_pipe_gets_the_bytes_of_the_answer() -> None:
    out = io.StringIO()
    shown(CONTROLS, out, hide=False)
    assert out.getvalue() == "".join(CONTROLS)


def test_a_log_line_has_no_escape_sequences(cli: Callable[..., Ran]) -> None:
    assert cli("--model", "\x1b[31mabsent/x", "-p", "x").error.startswith(r"error: \u001b[31mab")


def test_list_on_a_terminal_has_no_escape_sequences(
    cli: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The name of a model is that of a file, which an archive may have brought."""
    model = nanollama.CachedModel("\x1b[2Jx", "gguf", 5, 0.0, ())
    monkeypatch.setattr(nanollama.ModelStore, "models", lambda self: [model])
    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    assert nanollama.main(["list"]) == 0
    assert r"\u001b[2Jx" in out.getvalue()


def test_without_a_terminal_thoughts_are_text() -> None:
    out = io.StringIO()
    printer = shown(PIECES, out, hide=False)
    assert out.getvalue() == "".join(PIECES)
    assert printer.message() == {
        "role": "assistant",
        "content": "\n\nParis it is",
        "reasoning_content": "Let me see.",
    }


@pytest.mark.parametrize(
    ("pieces", "prompt"),
    [
        (PIECES, ""),
        ([*"".join(PIECES)], ""),
        (["hm", "m</think>", "\n", "\nParis it is"], "<|assistant|><think>\n"),
        (["Paris it is"], ""),
    ],
)
def test_hidden_thoughts_leave_the_answer_alone(pieces: list[str], prompt: str) -> None:
    out = Terminal()
    shown(pieces, out, hide=True, prompt=prompt)
    assert out.getvalue() == "Paris it is"


def test_an_answer_without_thoughts_has_no_reasoning() -> None:
    message = shown(["<b>", "fine"], io.StringIO(), hide=False).message()
    assert message == {"role": "assistant", "content": "<b>fine"}


# ---- batch files ---------------------------------------------------------------------------------

BATCH = ("--temp", "0", "--max-tokens", "6")


@pytest.fixture
def batch(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"the quick brown\r\n\n   \nfox\nWhat is the capital of France?\n")
    return path


def test_a_batch_gives_each_lines_answer_in_order(
    cli: Callable[..., Ran], tiny: Callable[..., Path], batch: Path
) -> None:
    ran = cli("--model", tiny(), "--batch-file", batch, *BATCH)
    prompts = ("the quick brown", "fox", "What is the capital of France?")
    alone = [cli("--model", tiny(), "--prompt", prompt, *BATCH).out for prompt in prompts]
    assert (ran.code, ran.out) == (0, "".join(alone))
    assert SPEED.fullmatch(ran.err.splitlines()[-1])
    stdin = cli("--model", tiny(), "--batch-file", "-", *BATCH, stdin=batch.read_bytes())
    assert stdin.out == ran.out


def test_a_batch_with_chat_answers_each_line_alone(
    cli: Callable[..., Ran], tiny: Callable[..., Path], batch: Path
) -> None:
    flags = ("--model", tiny(), "--chat", "--system", "Be brief.", *BATCH)
    lines = [line.strip() for line in batch.read_text().splitlines() if line.strip()]
    alone = [cli(*flags, "--prompt", line).out for line in lines]
    assert cli(*flags, "--batch-file", batch).out == "".join(alone)


def test_a_batch_writes_a_json_line_for_each_prompt(
    cli: Callable[..., Ran], tiny: Callable[..., Path], batch: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("what was there before")
    ran = cli("--model", tiny(), "--batch-file", batch, "--output", output, *BATCH)
    assert (ran.code, ran.out) == (0, "")
    rows = [json.loads(line) for line in output.read_text(encoding="utf-8").splitlines()]
    assert [(row["line"], row["prompt"]) for row in rows] == [
        (1, "the quick brown"),
        (4, "fox"),
        (5, "What is the capital of France?"),
    ]
    assert rows[1]["text"] + "\n" == cli("--model", tiny(), "--prompt", "fox", *BATCH).out
    assert {row["finish_reason"] for row in rows} <= {"length", "stop"}
    assert all(row["usage"]["completion_tokens"] <= 6 for row in rows)
    on_stdout = cli("--model", tiny(), "--batch-file", batch, "--output", "-", *BATCH)
    assert [json.loads(line)["text"] for line in on_stdout.out.splitlines()] == [
        row["text"] for row in rows
    ]


def test_a_failing_line_reports_itself_and_the_rest_goes_on(
    cli: Callable[..., Ran], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"fox\n" + b"x" * 300 + b"\nnot \xff UTF-8\nfox\n")
    flags = ("--model", tiny(), "--batch-file", path, *BATCH)
    ran = cli(*flags)
    answer = cli("--model", tiny(), "--prompt", "fox", *BATCH).out
    assert (ran.code, ran.out) == (1, f"{answer}\n\n{answer}")
    errors = [line for line in ran.err.splitlines() if line.startswith("line ")]
    assert errors[0].startswith("line 2: the prompt has 300 tokens and the context holds 256")
    assert errors[1:] == ["line 3: the line is not UTF-8 text"]
    rows = [json.loads(line) for line in cli(*flags, "--output", "-").out.splitlines()]
    assert [row["finish_reason"] == "error" for row in rows] == [False, True, True, False]
    assert [row["line"] for row in rows if "error" in row] == [2, 3]


def test_a_batch_can_hide_thoughts(
    cli: Callable[..., Ran], tiny_llm: nanollama.LLM, batch: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The engine is made to say what a tiny model cannot: an answer with a thought."""

    def stream(requests: Iterator[Any], raise_errors: bool) -> Iterator[Delta]:
        count = len(list(requests))
        for piece in PIECES:
            yield from (Delta(index, piece) for index in range(count))
        yield from (Delta(index, "!", finish_reason="stop") for index in range(count))

    monkeypatch.setattr(nanollama.Settings, "load", lambda self: tiny_llm)
    monkeypatch.setattr(tiny_llm, "stream", stream)
    assert cli("--batch-file", batch, "--chat", "--hide-thinking").out == "Paris it is!\n" * 3


@pytest.mark.parametrize("flags", [(), ("--output", "-")])
def test_answers_on_a_terminal_have_no_progress_bar_between_them(
    tiny_llm: nanollama.LLM, batch: Path, monkeypatch: pytest.MonkeyPatch, flags: tuple[str, ...]
) -> None:
    monkeypatch.setattr(nanollama.Settings, "load", lambda self: tiny_llm)
    out, err = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    assert nanollama.main(["--batch-file", str(batch), *BATCH, *flags]) == 0
    assert SPEED.search(err.getvalue())
    assert "prompt/s" not in err.getvalue()
    assert out.getvalue().count("\n") >= 3


@pytest.mark.parametrize("content", [b"", b"\n \n\t\n"])
def test_a_batch_without_prompts_is_an_error(
    cli: Callable[..., Ran], tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "prompts.txt"
    path.write_bytes(content)
    assert "holds no prompts" in cli("--batch-file", path).error


def test_an_output_file_survives_a_model_that_does_not_load(
    cli: Callable[..., Ran], batch: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    output.write_text("work of hours\n")
    assert cli("--model", "absent.gguf", "--batch-file", batch, "--output", output).error
    assert output.read_text() == "work of hours\n"


def test_an_output_file_survives_a_missing_extra(
    cli: Callable[..., Ran],
    tiny: Callable[..., Path],
    batch: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "nanollama_extras.answers.grammars", None)
    output = tmp_path / "out.jsonl"
    output.write_text("work of hours\n")
    flags = ("--model", tiny(), "--batch-file", batch, "--regex", "a")
    assert cli(*flags, "--output", output).code == 2
    assert output.read_text() == "work of hours\n"


# ---- show ----------------------------------------------------------------------------------------


def test_show_describes_a_model(cli: Callable[..., Ran], smollm2: Path) -> None:
    ran = cli("show", smollm2, "--top-k", "7", "--ctx", "1000", "--kv-dtype", "float16")
    assert (ran.code, ran.err) == (0, "")
    fields = dict(re.findall(r"^(\w+)  +(.+)$", ran.out, re.MULTILINE))
    assert fields["architecture"] == "llama"
    assert fields["parameters"] == "134.5 M"
    assert fields["context"] == "8192 tokens"
    assert fields["quantization"].startswith("Q4_1 (gguf, 96")
    assert fields["template"] == "model"
    # 2 (k, v) x 30 layers x 3 heads x 64 x 1000 tokens x 2 bytes
    assert fields["memory"].endswith("up to 23.0 MB for the keys and values of 1000 tokens")
    assert fields["kernels"].endswith("; keys and values in float16")
    assert re.search(r"^  top_k +7  \(flag\)$", ran.out, re.MULTILINE)
    assert re.search(r"^  temperature +0.7  \(built-in\)$", ran.out, re.MULTILINE)
    supported = ran.out.partition("supported architectures: ")[2].split()
    assert supported == ", ".join(nanollama.all_families()).split()


def test_show_knows_the_models_own_defaults_and_the_modelfile(
    cli: Callable[..., Ran], tiny: Callable[..., Path], tmp_path: Path
) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for file in tiny().iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    (model / "generation_config.json").write_text('{"temperature": 0.3, "top_p": 0.6}')
    path = tmp_path / "Modelfile"
    path.write_text("FROM ./model\nPARAMETER top_p 0.5\nSYSTEM Hi\nTEMPLATE {{ messages }}")
    out = cli("show", "--modelfile", path).out
    for pattern in (
        r"^path +.*model$",
        r"^template +Modelfile$",
        r"^  temperature +0.3  \(model\)$",
        r"^  top_p +0.5  \(Modelfile\)$",
        r"^  system +'Hi'  \(Modelfile\)$",
        r"^  stop +-  \(built-in\)$",
    ):
        assert re.search(pattern, out, re.MULTILINE), pattern


@pytest.mark.parametrize("command", ["show", "verify", "explain", "bench", "eval --text x"])
def test_an_empty_name_is_not_the_default_model(cli: Callable[..., Ran], command: str) -> None:
    assert cli(*command.split(), "").error.startswith("error: '': no such model; give an alias")


def test_show_of_a_model_that_is_not_here_says_how_to_fetch_it(cli: Callable[..., Ran]) -> None:
    assert cli("show", "org/name:Q4_0").error.endswith("nanollama.py pull org/name:Q4_0")


# ---- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("", "one of the arguments --prompt/-p --interactive --batch-file"),
        ("lsit", "unknown command 'lsit'; did you mean list?"),
        ("--prompt x --interactive", "not allowed with argument"),
        ("--prompt x --script a.yaml", "--script needs --serve without --model"),
        ("--serve --model x --script a.yaml", "--script needs --serve without --model"),
        ("--prompt", "expected one argument"),
        ("-p x --no-such-flag", "unrecognized arguments: --no-such-flag"),
        ("-p x --temp -1", "temperature is -1.0; it must be a number between 0 and 100"),
        ("-p x --temp nan", "temperature is nan"),
        ("-p x --temp hot", "invalid float value: 'hot'"),
        ("-p x --top-k -2", "top_k is -2"),
        ("-p x --top-k 1.5", "invalid int value: '1.5'"),
        ("-p x --top-p 1.1", "top_p is 1.1"),
        ("-p x --min-p -0.1", "min_p is -0.1"),
        ("-p x --repeat-penalty 0", "repeat_penalty is 0.0"),
        ("-p x --max-tokens -5", "max_tokens is -5"),
        (f"-p x --seed {2**64}", f"it must be an integer between {-(2**63)} and {2**64 - 1}"),
        ("-p x --stop=", "stop is ('',)"),
        ("-p x --logit-bias 5", "'5' is not ID=BIAS, as in 42=-100"),
        ("-p x --logit-bias a=1", "'a=1' is not ID=BIAS"),
        ("-p x --logit-bias 5=101", "a map from token ids to -100..100"),
        ("-p x --logit-bias=-5=1", "a map from token ids to -100..100"),
        ("-p x --ctx 0", "ctx is 0"),
        ("-p x --ctx 99999999999", "ctx is 99999999999"),
        ("-p x --threads 1000000", "threads is 1000000; it must be an integer between 1 and 1024"),
        ("-p x --parallel 1000000000", "parallel is 1000000000"),
        ("-p x --prefill-chunk -3", "prefill_chunk is -3"),
        ("-p x --dtype int8", "invalid choice: 'int8'"),
        ("-p x --quantize q2", "invalid choice: 'q2'"),
        ("-p x --output y", "--output needs --batch-file"),
        ("rm", "required: MODEL"),
        ("pull", "required: MODEL"),
        ("list everything", "unrecognized arguments: everything"),
        ("show org/x --top-p 2", "top_p is 2.0"),
    ],
)
def test_a_usage_error_is_explained(cli: Callable[..., Ran], argv: str, message: str) -> None:
    ran = cli(*argv.split())
    assert (ran.code, ran.out) == (2, "")
    error, hint = ran.err.splitlines()
    assert error.startswith("error: ")
    assert message in error
    assert re.fullmatch("see: nanollama.py (rm |pull |list |show )?--help", hint)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--model absent.gguf", "absent.gguf: no such file or directory"),
        ("--model ./absent", "./absent: no such file or directory"),
        ("--model=", "error: '': no such model"),
        ("--model smolm2", "did you mean smollm2?"),
        ("--model org/absent", "org/absent: cannot be fetched while HF_HUB_OFFLINE is set"),
        ("--model {tmp}", "is a directory of GGUF files; give one of them: empty.gguf"),
        ("--model {tmp}/empty.gguf", "the file is empty"),
        ("--model {tmp}/wrong.gguf", "is a PyTorch pickle, which is never opened"),
        ("--model {tiny} --tokenizer absent", "absent: no such model"),
        ("--model {tiny} --device gpu", "device 'gpu' is not available here; there is: "),
        ("--model {tiny} --device cpu:x", "device 'cpu:x' is not available here"),
        ("--model {tiny} --ctx 3", "tokens and the context holds 3, the answer included; shorten"),
        ("--model {tiny} --logit-bias 320=1", "token id 320 is outside the vocabulary of 320"),
        ("--modelfile {tmp}/absent", "absent: cannot be read: No such file or directory"),
        ("--modelfile {tmp}/bad.mf", "bad.mf:2: unknown directive 'FORM'"),
        ("--model {tmp}/refuses --chat", "the chat template refuses these messages: no way"),
        ("--model {tmp}/broken --chat", "the chat template failed: TemplateSyntaxError"),
    ],
)
def test_bad_input_is_one_line(
    cli: Callable[..., Ran],
    argv: str,
    message: str,
    tiny: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "wrong.gguf").write_bytes(b"PK\3\4" + b"\0" * 100)
    (tmp_path / "bad.mf").write_text("FROM x\nFORM y\n")
    for name, template in {"refuses": "{{ raise_exception('no way') }}", "broken": "{% if"}.items():
        (tmp_path / name).mkdir()
        for file in tiny().iterdir():
            (tmp_path / name / file.name).symlink_to(file)
        (tmp_path / name / "chat_template.jinja").write_text(template)
    flags = argv.format(tmp=tmp_path, tiny=tiny()).split()
    assert message in cli("--prompt", "fox!", "--max-tokens", "2", *flags).error


@pytest.mark.parametrize(
    ("argv", "stdin", "message"),
    [
        (("--prompt", ""), b"", "the prompt is empty: there is no token to continue"),
        (("--prompt", "-"), b"\xff", "the prompt on stdin is not UTF-8 text"),
        (("--prompt", "\udcff"), b"", "the text holds a lone surrogate"),
        (("--prompt", "x" * 300), b"", "the prompt has 300 tokens and the context holds 256"),
        (("--batch-file", "absent.txt"), b"", "absent.txt: cannot be read: No such file"),
        (("--batch-file", "."), b"", ".: cannot be read: "),
        (("--batch-file", ""), b"", "error: '': cannot be read: "),
        (("--embed", "--prompt", ""), b"", "the prompt is empty"),
        (("--batch-file", "-", "--output", "absent/x"), b"fox", "absent/x: cannot be written: "),
        pytest.param(
            ("--batch-file", "-", "--output", "/dev/full", "--max-tokens", "1"),
            b"fox",
            "/dev/full: cannot be written: No space left on device",
            marks=pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux"),
        ),
    ],
)
def test_a_bad_prompt_is_one_line(
    cli: Callable[..., Ran],
    tiny: Callable[..., Path],
    argv: tuple[str, ...],
    stdin: bytes,
    message: str,
) -> None:
    assert message in cli("--model", tiny(), *argv, stdin=stdin).error


MODES = ["--prompt fox", "--prompt fox --chat", "--batch-file -", "--embed --prompt fox"]
SHORT = [
    MemoryError("Unable to allocate 3 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory"),
    RuntimeError("CUDA out of memory. Tried to allocate 3 TB\nand more lines"),
]


@pytest.mark.parametrize("where", ["new_cache", "forward", "take"])
@pytest.mark.parametrize("error", SHORT, ids=lambda error: str(error)[:8])
@pytest.mark.parametrize("flags", MODES)
def test_a_lack_of_memory_is_one_line_with_a_remedy(
    flags: str,
    error: Exception,
    where: str,
    cli: Callable[..., Ran],
    tiny: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    owners = {"new_cache": nanollama.Decoder, "forward": nanollama.Engine}

    def fail(*_: Any, **__: Any) -> Any:
        raise error

    if where == "take":  # while the weights are read
        monkeypatch.setattr(nanollama, "_load_safetensor", fail)
    else:
        monkeypatch.setattr(owners[where], where, fail)
    ran = cli("--model", tiny(), *flags.split(), stdin=b"fox\n")
    assert ran.code == 1
    line = [line for line in ran.err.splitlines() if "out of memory: " in line][-1]
    remedy = "take a smaller model, --ctx or --parallel"
    assert line.endswith(f"out of memory: {nanollama.first_line(error)}; {remedy}")
    assert "Traceback" not in ran.err


def test_other_errors_of_torch_are_no_lack_of_memory(
    cli: Callable[..., Ran], tiny: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> Any:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(nanollama.Engine, "forward", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        cli("--model", tiny(), "--prompt", "fox")


def test_a_device_that_is_not_there_is_refused_before_the_download(cli: Callable[..., Ran]) -> None:
    assert "device 'gpu'" in cli("--model", "org/large", "--device", "gpu", "-p", "x").error


def test_a_context_cap_beyond_the_models_is_the_models(
    cli: Callable[..., Ran], tiny: Callable[..., Path]
) -> None:
    flags = ("--model", tiny(), "--ctx", "1000000000", "--prompt", "x" * 300)
    assert "the context holds 256" in cli(*flags).error


def test_the_speed_line_is_that_of_the_reference() -> None:
    stats = nanollama.EngineStats(6, 29, 6 / 28, 29 / 10.6)
    line = "[prefill: 6 tok @ 28 t/s | decode: 29 tok @ 10.6 t/s]"
    assert nanollama.speed_line(stats) == line
    assert SPEED.fullmatch(nanollama.speed_line(nanollama.EngineStats()))
